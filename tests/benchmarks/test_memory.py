"""Memory measured against the cost formulas; the table and the picture against the rows they show."""

import json
import sys

import pytest
import torch

from benchmarks import memory
from benchmarks.memory import Options
from retentive import machine
from retentive.models import build, cost, retnet, twin

CONFIG = retnet(vocab_size=31, dim=16, layers=2, heads=2)
CONTEXTS = (8, 32, 16)
ROWS = [
    {"context": 512, "R": {"bytes": 1_000_000, "ms_per_token": 2.0}, "T": {"bytes": 500_000, "ms_per_token": 1.0}},
    {"context": 16384, "R": {"bytes": 1_000_000, "ms_per_token": 2.0}, "T": {"bytes": 4e6, "ms_per_token": 9.0}},
]


@pytest.fixture
def models():
    return {"RetNet": build(CONFIG).eval(), "twin": build(twin(CONFIG)).eval()}


@pytest.mark.parametrize("batch", [1, 3], ids=lambda n: f"batch{n}")
def test_bytes_are_constant_for_retnet_and_those_of_all_tokens_for_the_twin(batch, models):
    rows = memory.of_models(models, contexts=CONTEXTS, batch=batch, steps=3)["rows"]
    assert [row["context"] for row in rows] == [8, 16, 32]
    position = 8 * batch
    for row in rows:
        assert row["RetNet"]["bytes"] == cost.state_bytes(CONFIG, sequences=batch) + position
        # slots that are free are held too: a cache grows by half at a time
        need = cost.cache_bytes(twin(CONFIG), row["context"], sequences=batch) + position
        assert need <= row["twin"]["bytes"] <= 1.5 * need
        assert all(row[name]["ms_per_token"] > 0 for name in models)
    sizes = [row["twin"]["bytes"] for row in rows]
    assert sizes == sorted(set(sizes)), "more at every context"


def test_the_models_have_read_every_token_up_to_the_context(models, monkeypatch):
    """And decode from copies: what a decoding step writes must not be part of the next context."""
    read, seen = {name: [] for name in models}, []
    for name, model in models.items():

        def watched(ids, state, *, name=name, hidden=model.hidden):
            start = 0 if state is None else int(state.position[0])
            read[name].append((start, ids.shape[1]))
            seen.append(ids)
            return hidden(ids, state)

        monkeypatch.setattr(model, "hidden", watched)
    memory.of_models(models, contexts=(8, 16), steps=3)
    steps = [(0, 8), (8, 1), (9, 1), (10, 1), (8, 8), (16, 1), (17, 1), (18, 1)]
    assert read == {"RetNet": steps, "twin": steps}
    assert torch.equal(seen[0], seen[4]), "both read the same tokens"


def test_the_table_holds_the_rows_and_their_ratios():
    header, rule, *lines = memory.table({"rows": ROWS}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, rule, *lines)]
    assert {len(row) for row in cells} == {7}
    assert cells[0][0] == "context" and cells[0][1].startswith("R:") and cells[0][2].startswith("T:")
    assert cells[2] == ["512", "1.00 MB", "0.50 MB", "0.50", "2.00", "1.00", "0.50"]
    assert cells[3] == ["16,384", "1.00 MB", "4.00 MB", "4.00", "2.00", "9.00", "4.50"]


def test_the_plot_shows_the_rows(tmp_path, lines):
    memory.plot({"rows": ROWS}, tmp_path / "memory.png", title="what it costs")
    contexts = [512, 16384]
    assert lines == {
        "R": [(contexts, [1.0, 1.0]), (contexts, [2.0, 2.0])],
        "T": [(contexts, [0.5, 4.0]), (contexts, [1.0, 9.0])],
    }


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with refuses("pip install 'retentive[plot]'", ModuleNotFoundError):
        memory.plot({"rows": ROWS}, tmp_path / "memory.png", title="")
    assert not list(tmp_path.iterdir())


def test_a_size_is_measured_with_its_twin_and_the_hardware_named(sizes, refuses):
    how = dict(size="tiny", vocab_size=31, contexts=(16, 8), batch=2)
    result = memory.measure(Options(**how))
    assert json.loads(json.dumps(result)) == result and [row["context"] for row in result["rows"]] == [8, 16]
    assert set(result["rows"][0]) == {"context", "RetNet", "Transformer twin"}
    assert (result["size"], result["vocab_size"], result["batch"]) == ("tiny", 31, 2)
    hardware = result["hardware"]
    assert hardware == machine.describe() and hardware["torch"] == torch.__version__ and hardware["cores"] >= 1
    assert all(hardware[key] for key in ("cpu", "system", "python", "retentive", "gpu", "threads"))
    with refuses("`contexts=(0,)`: must be at least 1"):
        memory.measure(Options(**how | {"contexts": (0,)}))
