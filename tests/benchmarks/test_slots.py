"""`python -m benchmarks slots`: what counts as a token's arrival, and what is refused."""

import json
from importlib.util import find_spec

import pytest
import torch

from benchmarks.slots import Options, arrivals, measure, table, times
from retentive.bench.lab import models


def event(text: str | None, count: int | None = None) -> bytes:
    usage = None if count is None else {"completion_tokens": count}
    choices = [] if text is None else [{"text": text}]
    return b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n"


def test_a_piece_arrives_with_its_last_byte():
    first, second = event("a"), event("b")
    answer = [(0.1, b"HTTP/1.1 200 OK\r\n\r\n"), (0.2, first + second[:9]), (0.3, second[9:])]
    answer += [(0.4, event("") + event(None, 2) + b"data: [DONE]\n\n"), (0.5, b"")]
    assert arrivals(answer, 2) == [0.2, 0.3]
    with pytest.raises(ArithmeticError, match=r"a stream of 3 tokens counted \{'completion_tokens': 2\}"):
        arrivals(answer, 3)
    with pytest.raises(ArithmeticError, match="counted None"):
        arrivals([(0.1, b"HTTP/1.1 400 Bad Request\r\n\r\n"), (0.1, b"")], 3)


def test_decoding_counts_from_the_last_begin_to_the_first_end():
    found = times([[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 6.0]], 4)
    assert found["tokens_per_second"] == 8 / 6
    assert found["decoding"] == 4 / 2  # 3.0 and 4.0 of both
    assert (found["p50"], found["most"], found["first"]) == (1.0, 1.0, 1.5)
    # a piece of two tokens counts as two
    assert times([[1.0, 2.0], [1.0, 2.0]], 4)["decoding"] == 4.0
    # one ended before the other began
    assert times([[1.0, 2.0], [3.0, 4.0]], 2)["decoding"] == 0.0


@pytest.mark.slow
@pytest.mark.skipif(
    bool(models.missing("native-int8", torch.device("cpu"))) or not find_spec("fastapi"),
    reason="needs the C engine and the extra serve",
)
def test_our_server_is_measured(sizes):
    names = ("native-w8a8", "llamacpp-q8_0")
    assert set(names) <= set(Options().models) <= set(models.NAMES)
    options = Options(models=names, size="tiny", vocab_size=300, streams=2, prompt=9, tokens=5, repeats=1)
    said: list[str] = []
    result = measure(options, said.append)
    assert [row["model"] for row in result["rows"]] == ["native-w8a8"]
    assert all(row["tokens_per_second"] > 0 for row in result["rows"])
    assert "without llamacpp-q8_0: " in said[0]
    assert table(result).count("\n") == 2


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="no such program"):
        measure(Options(llama_server=tmp_path / "none"))
    with pytest.raises(ValueError, match="model"):
        measure(Options(models=("nothing",)))
