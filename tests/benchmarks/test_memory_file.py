"""`bench ask`: questions in turns to files of one size, however much was read."""

import json

import pytest

from benchmarks import memory_file
from benchmarks.memory_file import Options


def measured(say=lambda line: None, **changes):
    return memory_file.measure(Options(**{"size": "tiny", "vocab_size": 31, "repeats": 3, **changes}), say)


def test_asking_is_measured_in_turns_on_files_of_one_size(sizes, monkeypatch):
    said, asked, real = [], [], memory_file.ask
    monkeypatch.setattr(memory_file, "ask", lambda *how: asked.append(how[1].name) or real(*how))
    result = measured(said.append, lengths=(10, 5000))
    small, large = result["rows"]
    assert small["file_bytes"] == large["file_bytes"] and small["state_bytes"] == large["state_bytes"]
    assert result["file_ratio"] == 1 and result["time_ratio"] == large["median"] / small["median"] > 0
    assert all(len(row["milliseconds"]) == 3 and min(row["milliseconds"]) > 0 for row in result["rows"])
    assert asked == ["0.safetensors", "1.safetensors"] * 4
    assert len(said) == 2 and said[-1].startswith("read 5,000 tokens in ")
    assert len(memory_file.table(result).splitlines()) == 4 and json.dumps(result) and result["size"] == "tiny"


@pytest.mark.parametrize("how", [dict(lengths=()), dict(lengths=(0,)), dict(repeats=0)])
def test_lengths_and_repeats_below_one_are_refused(how, refuses):
    with refuses("must be at least 1"):
        measured(**how)
