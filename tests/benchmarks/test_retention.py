"""`bench retention`: gates against a wrong operator, the choice of rivals, rows.

Works are tiny, and the memory of processes of their own is made up where it is not what is tested.
"""

import importlib
import importlib.util
import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import retention
from benchmarks.lab import gate, isolated, rivals
from benchmarks.lab.roofline import Work, pairs
from benchmarks.retention import Options
from retentive.bench.lab.options import silent
from retentive.ops import backends

TINY = retention.Shape(1, 2, 16, 32, (64, 128))
WORK = Work(1, 2, 16, 32, 64)

torchscale = pytest.mark.skipif(
    importlib.util.find_spec("torchscale") is None,
    reason="torchscale is not installed: pip install --no-deps torchscale",
)


@pytest.fixture
def tiny(rates, monkeypatch):
    """A tiny shape, a machine whose rates are known; the memory of processes of their own made up."""
    monkeypatch.setitem(retention.SHAPES, "tiny", TINY)
    made_up = {"seconds": 0.001, "forward_seconds": 0.0004, "peak_bytes": 100_000}
    monkeypatch.setattr(isolated, "in_own_process", lambda *_: dict(made_up))
    monkeypatch.setattr(gate, "LENGTH", 70)


def measured(say=silent, **how):
    how = {"shapes": ("tiny",), "repeats": 2, "rivals": ("sdpa",), "device": "cpu", **how}
    return retention.measure(Options(**how), say)


def test_who_is_not_installed_is_told(monkeypatch, tiny, refuses):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = measured(rivals=("auto",))
    assert result["rivals"]["torchscale"] == "not installed" and result["rivals"]["fla"] == "needs a GPU"
    assert set(result["rows"][0]["contestants"]) == {"retentive", "blocked", "sdpa"}
    shown = retention.table(result)
    assert "| not installed |" in shown and "fla: needs a GPU" in shown
    with refuses("rival 'torchscale': not installed"):
        measured(rivals=("torchscale",))


@pytest.fixture(params=["o", "gradient", "nan"])
def wrong(request, monkeypatch):
    """The operator is off by a little in its outputs, or only in its gradients, or has a NaN."""
    real = backends.choose

    def choose(name, call):
        backend = real(name, call)
        if backend is backends.BACKENDS["reference"]:
            return backend

        def run(call):
            o, state = backend.run(call)
            if request.param == "gradient":
                return o + 0.1 * (o - o.detach()), state
            return (o * 1.02 if request.param == "o" else o.index_fill(1, torch.tensor([3]), math.nan)), state

        return backend._replace(run=run)

    monkeypatch.setattr(importlib.import_module("retentive.ops.retention"), "choose", choose)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nothing_is_timed_where_ours_is_wrong(dtype, wrong, tiny, never_timed, monkeypatch, refuses):
    monkeypatch.setattr(isolated, "in_own_process", lambda *_: pytest.fail("measured"))
    with refuses("retentive is wrong at H=2, K=16, V=32", ArithmeticError):
        measured(dtypes=(dtype,), say=lambda line: pytest.fail("printed"))


@torchscale
def test_nothing_is_printed_where_a_rival_is_wrong(tiny, monkeypatch, refuses):
    real = rivals.torchscale_decays
    monkeypatch.setattr(rivals, "torchscale_decays", lambda *a: (real(*a)[0] ** 2, *real(*a)[1:]))
    with refuses("torchscale is wrong", ArithmeticError):
        measured(rivals=("torchscale",), say=lambda line: pytest.fail("printed"))


def test_rows_hold_what_was_asked_for(tiny, rates):
    lines = []
    result = measured(dtypes=("fp32", "bf16"), say=lines.append)
    assert json.loads(json.dumps(result)) == result
    assert [(row["T"], row["dtype"]) for row in result["rows"]] == [
        (64, "fp32"), (128, "fp32"), (64, "bf16"), (128, "bf16"),
    ]  # fmt: skip
    assert result["hardware"]["torch"] == torch.__version__ and result["device"] == "cpu" and len(lines) == 4
    for row in result["rows"]:
        work = Work(*(row[n] for n in ("B", "H", "K", "V", "T", "dtype")))
        assert row["machine"] == {"before": rates, "after": rates} and row["qkvo_bytes"] == work.qkvo_bytes
        chunk = row["contestants"]["retentive"]["chunk"]
        flops, nbytes = work.flops(chunk, backward=True), work.bytes(backward=True)
        assert (row["limit"]["flops"], row["limit"]["bytes"]) == (flops, nbytes)
        assert row["limit"]["seconds"] == max(flops / 1e12, nbytes / 1e10)
        for name, one in row["contestants"].items():
            assert one["repeats"] == 2 and one["peak_bytes"] == 100_000
            assert 0 < one["seconds"] <= one["median_seconds"] and one["forward_seconds"] > 0
            own = work.attention_flops(backward=True) if name == "sdpa" else flops
            assert one["fraction"] == pytest.approx(max(own / 1e12, nbytes / 1e10) / one["seconds"])
        assert row["contestants"]["blocked"]["backend"] == "blocked"


def test_rivals_take_turns_and_get_fresh_leaves(tiny, monkeypatch):
    order, real = [], isolated.forward

    def watched(one, inputs):
        order.append(one.backend)
        assert all(x.grad is None and x.is_leaf for x in inputs)
        return real(one, inputs)

    monkeypatch.setattr(isolated, "forward", watched)
    measured(lengths=(64,))
    names = order[:3]
    assert len(set(names)) == 3 and order == names * 3  # one round warms up


@torchscale
def test_torchscale_comes_with_its_best_chunk_or_a_reason(tiny):
    short, long = (
        row["contestants"]["torchscale"] for row in measured(rivals=("torchscale",), lengths=(63, 256))["rows"]
    )
    assert short == {"skipped": "needs a multiple of 64 tokens"}
    turns = long["seconds_by_chunk"]
    assert set(long["tried"]) == set(turns) == {"64", "128", "256"}, "all as quick in the made-up first pass"
    assert long["seconds"] == turns[str(long["chunk"])] == min(turns.values())


@torchscale
@pytest.mark.parametrize(
    ("seconds", "tried", "taken"),
    [
        ({512: 3.0, 256: 2.0, 128: 2.5, 64: 9.0}, (512, 256, 128, 64), {512, 256, 128}),
        ({512: 2.0, 256: 4.0}, (512, 256), {512}),
        ({512: "not enough memory", 256: 1.0, 128: 1.2, 64: 1.4}, (512, 256, 128, 64), {256, 128, 64}),
        (dict.fromkeys((512, 256, 128, 64), "would take 9 s"), (512, 256, 128, 64), {512, 256, 128, 64}),
    ],
)
def test_chunks_of_torchscale_are_tried_from_the_longest_on(seconds, tried, taken, tiny, monkeypatch):
    def one(name, work, chunk):
        told = seconds[chunk]
        return {"skipped": told} if isinstance(told, str) else {"seconds": told, "peak_bytes": 1}

    monkeypatch.setattr(isolated, "in_own_process", one)
    options = retention.prepare("torchscale", replace(WORK, T=512), 600)
    assert {option["chunk"] for option in options} == taken
    assert options[0]["tried"] == {str(chunk): seconds[chunk] for chunk in tried}


def test_what_takes_long_runs_once_and_what_takes_too_long_does_not(tiny, monkeypatch):
    slow = {"seconds": 30.0, "forward_seconds": 10.0, "peak_bytes": 5}
    fast = {"seconds": 0.001, "forward_seconds": 0.0005, "peak_bytes": 5}
    monkeypatch.setattr(isolated, "in_own_process", lambda name, *_: dict(slow if name == "sdpa" else fast))
    sdpa = measured(lengths=(64,))["rows"][0]["contestants"]["sdpa"]
    assert (sdpa["repeats"], sdpa["seconds"], sdpa["median_seconds"]) == (1, 30.0, 30.0)

    monkeypatch.setattr(retention, "estimate", lambda name, *_: 5000.0 if name == "sdpa" else 0)
    result = measured(lengths=(64,))
    assert result["rows"][0]["contestants"]["sdpa"]["skipped"] == "would take 5000 s"
    assert "| would take 5000 s |" in retention.table(result)


def test_times_are_foretold_from_counted_work(monkeypatch):
    monkeypatch.setattr(retention, "warm", lambda *_: 0.5)
    work = replace(WORK, T=8192)
    one = rivals.make("sdpa", work)
    assert retention.estimate("sdpa", work, one) == pytest.approx(0.5 * pairs(8192) / pairs(2048))
    assert retention.estimate("sdpa", replace(WORK, T=2048), one) == 0


def test_a_lack_of_memory_is_said_in_the_row(tiny, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(isolated, "in_own_process", full)
    results = measured(lengths=(64,))["rows"][0]["contestants"]
    assert all(result["skipped"] == isolated.NO_MEMORY and "seconds" not in result for result in results.values())


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(shapes=("big",)), "unknown shape 'big', expected one of 5m, small"),
        (dict(dtypes=("fp64",)), "unknown dtype 'fp64', expected one of fp32, bf16, fp16"),
        (dict(rivals=("flash",)), "unknown rival 'flash', expected one of auto, none, torchscale, sdpa, fla"),
        (dict(rivals=("fla",)), "rival 'fla': needs a GPU"),
        (dict(lengths=(64, 0)), "`lengths=(64, 0)`: must be at least 1"),
        (dict(repeats=0), "`repeats=0`: must be at least 1"),
        (dict(shapes=(",",)), "no shape given"),
    ],
)
def test_what_cannot_be_measured_is_refused(how, words, tiny, never_timed, refuses):
    with refuses(words):
        measured(**how)
