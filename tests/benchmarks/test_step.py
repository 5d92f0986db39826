"""`bench step`: its bytes against counting, its gate against wrong steps, its rows, table and picture."""

import json
import math

import pytest
import torch

from benchmarks import step
from benchmarks.step import Options
from retentive.bench.lab.options import silent
from retentive.ops import Ring
from retentive.ops.ring import slots
from retentive.tables import duration

READING = 1e10


@pytest.fixture(autouse=True)
def tiny(rates, monkeypatch):
    """A tiny shape over little memory, and a machine whose rate of reading is known."""
    monkeypatch.setitem(step.SHAPES, "tiny", step.Shape(2, 16, 32))
    monkeypatch.setattr(step, "SPREAD", 1 << 14)


def measured(say=silent, **how):
    return step.measure(Options(**{"shapes": ("tiny",), "batches": (1, 3), "repeats": 2, "device": "cpu", **how}), say)


# ---- what it counts ----


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_those_of_a_ring_over_many_steps(dtype, itemsize):
    """The state read each step and written when tokens are folded, the rows held, q, k, v and o."""
    B, H, K, V, moved, steps = 2, 3, 16, 32, 0, 96
    ring = Ring.open(torch.zeros(B, H, K, V), dtype)
    for _ in range(steps):
        folded = int(ring.folded[0])
        held = int(ring.written[0]) - folded + 1
        q, k, v = (torch.randn(B, H, n).to(dtype) for n in (K, K, V))
        step.RIVALS["ring"].step(q, k, v, torch.full((H,), -0.1), ring)
        moved += ring.state.nbytes * (2 if int(ring.folded[0]) > folded else 1)
        # rows of K and V: those in the ring, the new one written and the others read; q and o; k and v
        moved += B * H * (K + V) * itemsize * (held + 2)
    warm_up = slots(K, V)  # at first fewer tokens are held than later on
    assert step.ring_bytes(B, H, K, V, itemsize) == pytest.approx(moved / steps, rel=0.6 * warm_up / steps)


# ---- the gate ----


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", step.RIVALS)
def test_every_rival_passes_with_its_error(name, dtype):
    error = step.check(name, step.Shape(2, 16, 32), dtype, torch.device("cpu"))
    assert 0 < error < step.TOLERANCE[dtype]


def off(o, state, n):
    return (o * 1.01 if n == 7 else o), state


def never_folds_right(o, state, n):
    if isinstance(state, Ring) and n == 8:
        state.state.mul_(1.01)
    return o, state


def not_a_number(o, state, n):
    return (o * math.nan if n == 3 else o), state


@pytest.mark.parametrize("mistake", [off, never_folds_right, not_a_number])
def test_nothing_is_timed_where_a_step_is_wrong(mistake, tiny, monkeypatch, refuses):
    real, count = step.RIVALS["ring"], iter(range(10_000))

    def wrong(*args):
        return mistake(*real.step(*args), next(count))

    monkeypatch.setitem(step.RIVALS, "ring", real._replace(step=wrong))
    with refuses("the step by ring is wrong at H=2, K=16, V=32 in fp32", ArithmeticError):
        measured(say=lambda line: pytest.fail("printed"))


# ---- rows ----


def test_rows_hold_what_was_asked_for():
    lines = []
    result = measured(dtypes=("fp32", "bf16"), say=lines.append)
    assert json.loads(json.dumps(result)) == result
    assert [(row["B"], row["dtype"]) for row in result["rows"]] == [(1, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
    assert result["hardware"]["torch"] == torch.__version__ and result["ring_backend"] in ("cpu", "torch")
    assert len(lines) == 4
    for row in result["rows"]:
        nbytes = step.ring_bytes(row["B"], 2, 16, 32, 4 if row["dtype"] == "fp32" else 2)
        assert row["state_bytes"] == row["B"] * 2 * 16 * 32 * 4 and row["slots"] == slots(16, 32)
        assert row["limit"] == {"bytes": nbytes, "seconds": nbytes / READING, "by": "memory"}
        assert row["machine"]["read"] == {"least": READING, "median": READING, "most": READING}
        alone = row["machine"]["alone"]
        assert 0 < alone["seconds"] <= alone["median_seconds"] and alone["fraction"] > 0
        assert set(row["contestants"]) == {"ring", "plain", "torch"}
        for one in row["contestants"].values():
            assert one["repeats"] == 2 and 0 < one["seconds"] <= one["median_seconds"]
            slowest = 2 * one["median_seconds"] - one["seconds"]
            assert one["seconds"] * 0.999 <= nbytes / READING / one["fraction"] <= slowest * 1.001
            assert 0 < one["gate_error"] < step.TOLERANCE[row["dtype"]]
            # a median of two ratios lies between the extremes
            slowest_read = 2 * alone["median_seconds"] - alone["seconds"]
            assert alone["seconds"] / slowest * 0.999 <= one["of_reading"] <= slowest_read / one["seconds"] * 1.001


def test_reading_alone_is_of_as_many_bytes_in_as_many_places():
    numbers = torch.arange(64.0 * 4096).view(-1, 4096)
    pieces = step.in_pieces(numbers, 3 * 4 * 4096 + 1000)
    assert len(pieces) == 64 // 3 and all(piece.shape == (3, 4096) for piece in pieces)
    assert torch.equal(torch.cat(pieces), numbers[:63])
    assert [len(step.in_pieces(numbers, n)) for n in (1, numbers.nbytes, 10 * numbers.nbytes)] == [64, 1, 1]


def test_states_of_many_layers_are_gone_through_in_turn(monkeypatch):
    """As many bytes as asked for, no state twice before all others, whole turns of the ring in a repetition."""
    seen, real = [], step.RIVALS["ring"]

    def watched(q, k, v, decays, state):
        seen.append(id(state))
        return real.step(q, k, v, decays, state)

    monkeypatch.setattr(step, "RIVALS", {"ring": real._replace(step=watched)})
    monkeypatch.setattr(step, "SPREAD", 10 * 4096 - 1)
    step.interleaved(step.Shape(2, 16, 32), 1, "fp32", torch.device("cpu"), repeats=1)
    layers = list(dict.fromkeys(seen))
    assert len(layers) == 10 and seen == layers * (2 * slots(16, 32) // 2)


# ---- what it shows ----


def test_the_table_and_the_plot_hold_the_rows(tmp_path, lines):
    result = measured()
    table, notes = step.table(result).split("\n\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert {len(line) for line in cells} == {10} and len(cells) == 2 + 4
    row = result["rows"][1]
    ring, plain, torch_ = row["contestants"].values()
    assert cells[3] == [
        "tiny (2 x 16/32)", "3", "fp32", "12.3 kB", duration(ring["seconds"]), f"{ring['fraction']:.0%}",
        f"{ring['of_reading']:.0%}", f"{plain['seconds'] / ring['seconds']:.2f}x",
        f"{torch_['seconds'] / ring['seconds']:.2f}x", f"{3 / ring['seconds']:,.0f}",
    ]  # fmt: skip
    assert "reading 10 GB/s" in notes
    for one in row["contestants"].values():  # a file from before it was measured
        del one["of_reading"]
    assert "| – |" in step.table(result)
    step.plot(result, tmp_path / "step.png", title="a title")
    drawn = [1e6 * row["contestants"]["ring"]["seconds"] for row in result["rows"] if row["dtype"] == "bf16"]
    assert lines["ring"][2] == ([1, 3], drawn) and len(lines["limit"]) == 2, "of time, for each dtype"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(shapes=("big",)), "unknown shape 'big', expected one of small, 1.3B, 6.7B"),
        (dict(dtypes=("int8",)), "unknown dtype 'int8', expected one of fp32, bf16, fp16"),
        (dict(batches=(0,)), "`batches=(0,)`: must be at least 1"),
        (dict(repeats=-1), "`repeats=-1`: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(how, words, never_timed, refuses):
    with refuses(words):
        measured(**how)
