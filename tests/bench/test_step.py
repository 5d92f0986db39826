"""`bench step`: its bytes against counting, its gate against wrong steps, its rows, table, picture, command."""

import json
import math
from pathlib import Path

import pytest
import torch

from retentive import machine
from retentive.bench import step
from retentive.bench.lab import clock
from retentive.bench.lab.tables import duration, size, span
from retentive.cli import main
from retentive.ops import Ring
from retentive.ops.ring import slots

READING = 1e10


@pytest.fixture(autouse=True)
def rate(monkeypatch):
    """The machine's rate of reading takes seconds to measure: made up."""
    monkeypatch.setattr(machine, "reading", lambda *_: READING)


@pytest.fixture
def tiny(monkeypatch):
    """A tiny shape over little memory."""
    monkeypatch.setitem(step.SHAPES, "tiny", step.Shape(2, 16, 32))
    monkeypatch.setattr(step, "SPREAD", 1 << 14)


def measure(**how):
    return step.measure(["tiny"], **{"batches": (1, 3), "repeats": 2, "spread": 1 << 14, **how})


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
        step.CONTESTANTS["ring"].step(q, k, v, torch.full((H,), -0.1), ring)
        moved += ring.state.nbytes * (2 if int(ring.folded[0]) > folded else 1)
        # rows of K and V: those in the ring, the new one written and the others read; q and o; k and v
        moved += B * H * (K + V) * itemsize * (held + 2)
    warm_up = slots(K, V)  # at first fewer tokens are held than later on
    assert step.ring_bytes(B, H, K, V, itemsize) == pytest.approx(moved / steps, rel=0.6 * warm_up / steps)


def test_bandwidth_and_clock_are_of_this_machine(monkeypatch):
    monkeypatch.undo()
    cpu = torch.device("cpu")
    rates = machine.bandwidth(cpu, size=1 << 20)
    assert set(rates) == {"read", "copy"} and all(1e8 < rate < 1e13 for rate in rates.values())
    assert machine.clock(cpu, lambda: sum(range(10_000))) > 1e-5
    assert clock.mean({"read": 1.0}, {"read": 3.0}) == {"read": 2.0}


# ---- the gate ----


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", step.CONTESTANTS)
def test_every_contestant_passes_with_its_error(name, dtype):
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
    real, count = step.CONTESTANTS["ring"], iter(range(10_000))

    def wrong(*args):
        return mistake(*real.step(*args), next(count))

    monkeypatch.setitem(step.CONTESTANTS, "ring", real._replace(step=wrong))
    monkeypatch.setattr(machine, "clock", lambda *_: pytest.fail("timed"))
    with refuses("the step by ring is wrong at H=2, K=16, V=32 in fp32", ArithmeticError):
        measure(say=lambda line: pytest.fail("printed"))


# ---- rows ----


def test_rows_hold_what_was_asked_for(tiny):
    lines = []
    result = measure(dtypes=("fp32", "bf16"), say=lines.append)
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
    seen, real = [], step.CONTESTANTS["ring"]

    def watched(q, k, v, decays, state):
        seen.append(id(state))
        return real.step(q, k, v, decays, state)

    monkeypatch.setattr(step, "CONTESTANTS", {"ring": real._replace(step=watched)})
    step.interleaved(step.Shape(2, 16, 32), 1, "fp32", torch.device("cpu"), repeats=1, spread=10 * 4096 - 1)
    layers = list(dict.fromkeys(seen))
    assert len(layers) == 10 and seen == layers * (2 * slots(16, 32) // 2)


# ---- what it shows ----


def test_the_table_and_the_plot_hold_the_rows(tiny, tmp_path):
    result = measure()
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
    pytest.importorskip("matplotlib")
    step.plot(result, tmp_path / "step.png", title="a title")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_numbers_to_read():
    assert [duration(x) for x in (12.345, 0.0123, 4.56e-6, 1e-9)] == ["12.3 s", "12.3 ms", "4.56 us", "0.001 us"]
    assert [size(x) for x in (1.5e9, 12_345_678, 100)] == ["1.5 GB", "12.3 MB", "0.1 kB"]
    assert [span([1.2, 0.9]), span([80.4, 1234.0])] == ["1", "80 to 1,234"]


def test_the_command_writes_what_it_measured(tiny, tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "results" / "step.json"
    argv = ["bench", "step", "--shapes", "tiny", "--batches", "1", "2", "--dtypes", "fp32", "--repeats", "1"]
    main([*argv, "--device", "cpu", "--json", str(out)])
    shown = capsys.readouterr()
    assert shown.out.startswith("| shape |") and shown.err.count("\n") == 2
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["command"].startswith("retentive bench step --shapes tiny") and len(result["rows"]) == 2
    assert sorted(path.name for path in out.parent.iterdir()) == ["step.json", "step.png"]


BAD = {
    "shape": (["--shapes", "big"], "unknown shape 'big', expected one of small, 1.3B, 6.7B"),
    "dtype": (["--dtypes", "int8"], "unknown dtype 'int8', expected one of fp32, bf16, fp16"),
    "batch": (["--batches", "0"], "batches must be at least 1, got 0"),
    "repeats": (["--repeats", "-1"], "repeats must be at least 1, got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_told_in_a_line(case, capsys):
    options, words = BAD[case]
    with pytest.raises(SystemExit) as stop:
        main(["bench", "step", *options])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and words in line
