"""`bench retention`: counts against counting, gates against a wrong operator, rows, table, picture, command.

Works are tiny, and the memory of processes of their own is made up where it is not what is tested.
"""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from retentive import machine
from retentive.bench import retention, retention_report
from retentive.bench.lab import gate, isolated, rivals
from retentive.bench.lab.roofline import Work, limit, pairs
from retentive.cli import main
from retentive.ops import backends
from retentive.ops import retention as retention_op
from retentive.ops.decay import log_decay

TINY = retention.Shape(1, 2, 16, 32, (64, 128))
WORK = Work(1, 2, 16, 32, 64)
RATES = {"gemm": 1e11, "read": 1e10, "copy": 1e10}

torchscale = pytest.mark.skipif(
    importlib.util.find_spec("torchscale") is None,
    reason="torchscale is not installed: pip install --no-deps torchscale",
)


@pytest.fixture
def tiny(monkeypatch):
    """A tiny shape; the machine's speed and the memory of processes of their own, which take seconds, made up."""
    monkeypatch.setitem(retention.SHAPES, "tiny", TINY)
    monkeypatch.setattr(machine, "rates", lambda *_: RATES)
    made_up = {"seconds": 0.001, "forward_seconds": 0.0004, "peak_bytes": 100_000}
    monkeypatch.setattr(isolated, "in_process_of_its_own", lambda *_: dict(made_up))
    monkeypatch.setattr(gate, "LENGTH", 70)


def measure(**how):
    return retention.measure(["tiny"], **{"repeats": 2, "rivals": ("sdpa",), **how})


# ---- what it counts ----


@pytest.mark.parametrize("T", [8, 12, 13, 3])
def test_flops_are_those_of_a_loop_that_counts(T):
    """The chunkwise form as loops over single products, a multiply-add at a time, upper triangles left out."""
    K, V, C, count = 3, 5, 4, 0

    def multiply_add(n: int) -> None:
        nonlocal count
        count += 2 * n

    for start in range(0, T, C):
        n = min(C, T - start)
        for i in range(n):
            for _ in range(i + 1):
                multiply_add(K)  # a score
                multiply_add(V)  # times a v
            multiply_add(K * V)  # the query and the state
            multiply_add(K * V)  # k v^T into the state
    forward = count
    for start in range(0, T, C):
        n = min(C, T - start)
        for i in range(n):
            for _ in range(i + 1):
                multiply_add(K)  # the score again
                multiply_add(V)  # dv from do
                multiply_add(V)  # dP from do and v
                multiply_add(K)  # dq from dP and k
                multiply_add(K)  # dk from dP and q
            for _ in ("do S^T", "v dS^T", "k dS", "q^T do", "k^T v again"):
                multiply_add(K * V)
    work = Work(3, 2, K, V, T)
    assert work.flops(C, backward=False) == 6 * forward
    assert work.flops(C, backward=True) == 6 * count


def test_flops_of_attention_are_those_of_its_products():
    work = Work(2, 3, 4, 8, 10)
    assert work.attention_dim == 6
    assert work.attention_flops(backward=False) == 2 * 3 * 55 * 2 * (6 + 6)
    assert work.attention_flops(backward=True) == 2 * 3 * 55 * 2 * 7 * 6
    assert pairs(4) == 1 + 2 + 3 + 4


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_bytes_are_those_of_the_tensors(dtype, size):
    work = Work(2, 3, 16, 32, 10, dtype)
    tensors = [torch.empty(2, 10, 3, n, dtype=work.torch_dtype) for n in (16, 16, 32, 32)]
    assert work.qkvo_bytes == work.bytes(backward=False) == sum(x.nbytes for x in tensors)
    assert work.bytes(backward=True) == 2 * work.qkvo_bytes
    assert tensors[0].element_size() == size


def test_the_limit_is_the_slower_of_computing_and_moving():
    assert limit(100, 10, 10, 10) == (10, "compute")
    assert limit(10, 100, 10, 10) == (10, "memory")


# ---- who takes part ----


@torchscale
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [64, 128])
def test_torchscale_computes_what_we_do_up_to_its_normaliser(dtype, chunk):
    assert 0 < gate.check("torchscale", replace(WORK, dtype=dtype), chunk) < gate.RIVAL_TOLERANCE[dtype]


@torchscale
def test_torchscale_gets_the_decays_that_it_makes_itself(monkeypatch):
    """Its module wants fairscale and more, for things that have no part in this."""
    for name in ("fairscale", "fairscale.nn", "timm", "timm.layers", "timm.models", "timm.models.layers", "apex"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    try:
        theirs = importlib.import_module("torchscale.architecture.retnet").RetNetRelPos
    except (ImportError, TypeError) as error:
        pytest.skip(f"torchscale's module does not load without its dependencies: {error}")
    config = SimpleNamespace(decoder_embed_dim=64, decoder_retention_heads=4, recurrent_chunk_size=32)
    _, expected = theirs(config)(64, chunkwise_recurrent=True)
    got = rivals.torchscale_decays(4, 32, torch.float32, torch.device("cpu"))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-7)  # float32 powers of theirs, float64 of ours


def test_ours_names_the_backend_that_auto_takes():
    auto, chunk = rivals.taken(replace(WORK, T=1000), "auto")
    q = torch.empty(1, 1000, 2, 16)
    call = backends.Call(q, q, q, torch.zeros(2), 1.0, torch.empty(1, 2, 16, 16), "auto", None, None)
    assert backends.choose("auto", call) is backends.BACKENDS[auto] and chunk == backends.chunk_size(call)
    assert rivals.taken(WORK, "blocked") == ("blocked", 64)


def test_who_is_not_installed_is_told(monkeypatch, tiny, refuses):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = measure(rivals=("auto",))
    assert result["rivals"]["torchscale"] == "not installed" and result["rivals"]["fla"] == "needs a GPU"
    assert set(result["rows"][0]["contestants"]) == {"retentive", "blocked", "sdpa"}
    assert "| not installed |" in retention_report.table(result) and "fla: needs a GPU" in retention_report.table(
        result
    )
    with refuses("rival 'torchscale': not installed"):
        measure(rivals=("torchscale",))


@pytest.mark.parametrize("older", [False, True])
def test_fla_is_called_with_tokens_before_heads(older, monkeypatch, refuses):
    """A stand-in with its signature: older ones took heads first unless told otherwise, and fp32 in TF32."""

    def chunk_retention(q, k, v, scale=None, initial_state=None, output_final_state=False):
        decays = log_decay("paper", q.shape[2])
        return retention_op(q, k, v, decays, backend="blocked")[0] * (1 + 1e-4), None

    def with_layout(q, k, v, head_first=True):
        return chunk_retention(*(x if not head_first else x.transpose(1, 2) for x in (q, k, v)))

    room = SimpleNamespace(chunk_retention=with_layout if older else chunk_retention)
    for name in ("fla", "fla.ops", "fla.ops.retention"):
        monkeypatch.setitem(sys.modules, name, room)
    assert gate.TOLERANCE["fp32"] < gate.check("fla", WORK) < gate.RIVAL_TOLERANCE["fp32"]


# ---- the gate ----


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
def test_nothing_is_timed_where_ours_is_wrong(dtype, wrong, tiny, monkeypatch, refuses):
    monkeypatch.setattr(machine, "clock", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(isolated, "in_process_of_its_own", lambda *_: pytest.fail("measured"))
    with refuses("retentive is wrong at H=2, K=16, V=32", ArithmeticError):
        measure(dtypes=(dtype,), say=lambda line: pytest.fail("printed"))


@torchscale
def test_nothing_is_printed_where_a_rival_is_wrong(tiny, monkeypatch, refuses):
    real = rivals.torchscale_decays
    monkeypatch.setattr(rivals, "torchscale_decays", lambda *a: (real(*a)[0] ** 2, *real(*a)[1:]))
    with refuses("torchscale is wrong", ArithmeticError):
        measure(rivals=("torchscale",), say=lambda line: pytest.fail("printed"))


@pytest.mark.parametrize("name", rivals.OURS)
def test_ours_passes_with_its_error(name):
    assert 0 < gate.check(name, WORK) < gate.TOLERANCE["fp32"]


# ---- rows ----


def test_rows_hold_what_was_asked_for(tiny):
    lines = []
    result = measure(dtypes=("fp32", "bf16"), say=lines.append)
    assert json.loads(json.dumps(result)) == result
    assert [(row["T"], row["dtype"]) for row in result["rows"]] == [
        (64, "fp32"), (128, "fp32"), (64, "bf16"), (128, "bf16"),
    ]  # fmt: skip
    assert result["hardware"]["torch"] == torch.__version__ and result["device"] == "cpu" and len(lines) == 4
    for row in result["rows"]:
        work = Work(*(row[n] for n in ("B", "H", "K", "V", "T", "dtype")))
        assert row["machine"] == {"before": RATES, "after": RATES} and row["qkvo_bytes"] == work.qkvo_bytes
        chunk = row["contestants"]["retentive"]["chunk"]
        flops, nbytes = work.flops(chunk, backward=True), work.bytes(backward=True)
        assert (row["limit"]["flops"], row["limit"]["bytes"]) == (flops, nbytes)
        assert row["limit"]["seconds"] == max(flops / 1e11, nbytes / 1e10)
        for name, one in row["contestants"].items():
            assert one["repeats"] == 2 and one["peak_bytes"] == 100_000
            assert 0 < one["seconds"] <= one["median_seconds"] and one["forward_seconds"] > 0
            own = work.attention_flops(backward=True) if name == "sdpa" else flops
            assert one["fraction"] == pytest.approx(max(own / 1e11, nbytes / 1e10) / one["seconds"])
        assert row["contestants"]["blocked"]["backend"] == "blocked"


def test_contestants_take_turns_and_get_fresh_leaves(tiny, monkeypatch):
    order, real = [], isolated.forward

    def watched(one, inputs):
        order.append(one.backend)
        assert all(x.grad is None and x.is_leaf for x in inputs)
        return real(one, inputs)

    monkeypatch.setattr(isolated, "forward", watched)
    measure(lengths=(64,))
    names = order[:3]
    assert len(set(names)) == 3 and order == names * 3  # one round warms up


@torchscale
def test_torchscale_comes_with_its_best_chunk_or_a_reason(tiny):
    short, long = (
        row["contestants"]["torchscale"] for row in measure(rivals=("torchscale",), lengths=(63, 256))["rows"]
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

    monkeypatch.setattr(isolated, "in_process_of_its_own", one)
    options = retention.prepare("torchscale", replace(WORK, T=512), 600)
    assert {option["chunk"] for option in options} == taken
    assert options[0]["tried"] == {str(chunk): seconds[chunk] for chunk in tried}


def test_what_takes_long_runs_once_and_what_takes_too_long_does_not(tiny, monkeypatch):
    slow = {"seconds": 30.0, "forward_seconds": 10.0, "peak_bytes": 5}
    fast = {"seconds": 0.001, "forward_seconds": 0.0005, "peak_bytes": 5}
    monkeypatch.setattr(isolated, "in_process_of_its_own", lambda name, *_: dict(slow if name == "sdpa" else fast))
    sdpa = measure(lengths=(64,))["rows"][0]["contestants"]["sdpa"]
    assert (sdpa["repeats"], sdpa["seconds"], sdpa["median_seconds"]) == (1, 30.0, 30.0)

    monkeypatch.setattr(retention, "foretell", lambda name, *_: 5000.0 if name == "sdpa" else 0)
    result = measure(lengths=(64,))
    assert result["rows"][0]["contestants"]["sdpa"]["skipped"] == "would take 5000 s"
    assert "| would take 5000 s |" in retention_report.table(result)


def test_times_are_foretold_from_counted_work(monkeypatch):
    monkeypatch.setattr(retention, "warm", lambda *_: 0.5)
    work = replace(WORK, T=8192)
    one = rivals.contestant("sdpa", work)
    assert retention.foretell("sdpa", work, one) == pytest.approx(0.5 * pairs(8192) / pairs(2048))
    assert retention.foretell("sdpa", replace(WORK, T=2048), one) == 0


def test_no_memory_is_a_word_in_the_row(tiny, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(isolated, "in_process_of_its_own", full)
    results = measure(lengths=(64,))["rows"][0]["contestants"]
    assert all(result["skipped"] == isolated.NO_MEMORY and "seconds" not in result for result in results.values())


@pytest.mark.parametrize("name", ["retentive", "sdpa"])
def test_memory_of_a_process_of_its_own(name):
    """Outputs and gradients must fit into it, and ours needs hardly more."""
    work = Work(1, 4, 64, 128, 4096)
    result = isolated.in_process_of_its_own(name, work)
    assert 0 < result["forward_seconds"] < result["seconds"]
    assert 0.95 * work.qkvo_bytes < result["peak_bytes"] < 5 * work.qkvo_bytes


def test_a_process_that_needs_more_than_there_is_says_so():
    """2 TB of inputs."""
    assert isolated.in_process_of_its_own("sdpa", Work(1, 8, 64, 128, 1 << 30)) == {"skipped": isolated.NO_MEMORY}


def test_a_process_that_fails_is_told_in_a_line(refuses):
    with refuses("torchscale failed at T=64: ", ChildProcessError):
        isolated.in_process_of_its_own("torchscale", WORK, None)


# ---- what it shows ----


def made_row(T: int, dtype: str, **seconds) -> dict:
    def one(name, s):
        out = {"backend": name, "chunk": 64, "seconds": s, "forward_seconds": s / 3, "fraction": 0.5}
        return out | {"peak_bytes": int(s * 1e9)} | ({"seconds_by_chunk": {}} if name == "torchscale" else {})

    row = {"shape": "small", "B": 1, "H": 8, "K": 64, "V": 128, "T": T, "dtype": dtype, "qkvo_bytes": 1_000_000}
    row |= {"contestants": {n: one(n, s) if isinstance(s, float) else {"skipped": s} for n, s in seconds.items()}}
    return row | {"machine": {"before": RATES, "after": RATES}, "limit": {"seconds": 0.001}}


RESULT = {
    "hardware": {"cpu": "a CPU", "gpu": "none", "threads": 2},
    "device": "cpu",
    "no_compiled_kernel": "no C compiler found",
    "rivals": {"torchscale": "0.3.0", "sdpa": "2.13", "fla": "needs a GPU"},
    "rows": [
        made_row(8192, "fp32", retentive=0.02, blocked=0.04, torchscale=0.06, sdpa=0.5),
        made_row(32768, "fp32", retentive=0.08, blocked=0.16, torchscale=0.24, sdpa="would take 700 s"),
        made_row(8192, "bf16", retentive=0.01, blocked=0.02, torchscale=0.02, sdpa=0.4),
    ],
}


def test_the_table_holds_times_ratios_growth_and_dtypes():
    rows, growth, dtypes, notes = (part.splitlines() for part in retention_report.table(RESULT).split("\n\n"))
    for part in (rows, growth, dtypes):
        assert len({line.count("|") for line in part}) == 1
    cells = [cell.strip() for cell in rows[2].strip("|").split("|")]
    assert cells[:6] == ["small (8 x 64/128)", "8,192", "fp32", "20 ms (retentive)", "6.67 ms", "50%"]
    assert cells[6:10] == ["2.00x", "3.00x (C=64)", "25.00x", "needs a GPU"]
    assert cells[10:] == ["20 MB", "20.00", "2.00x", "3.00x", "25.00x"]
    assert "would take 700 s" in rows[3]
    assert "| 8k to 32k: 4x | 4.0x, 4.0x | 4.0x, 4.0x | 4.0x, 4.0x | – |" in growth[2] and len(growth) == 3
    assert "| 8,192 | bf16 | 2.00x faster than fp32 |" in dtypes[2] and len(dtypes) == 3
    assert "Without our compiled kernel: no C compiler found" in "".join(notes)
    assert "fp32 GEMM 100 GFLOP/s, reading 10 GB/s (a CPU)" in "".join(notes) and "torchscale: 0.3.0" in "".join(notes)


def test_a_disturbed_machine_is_told():
    busy = {**RESULT["rows"][0], "machine": {"before": RATES, "after": {**RATES, "gemm": 5e10}}}
    assert "did other work" in retention_report.table({**RESULT, "rows": [RESULT["rows"][0], busy]})
    assert "did other work" not in retention_report.table(RESULT)


def test_the_plot_shows_every_contestant_at_the_lengths_it_ran(tmp_path, lines):
    retention_report.plot(RESULT, tmp_path / "retention.png", title="a title")
    assert (tmp_path / "retention.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert lines["retentive, fp32"] == [
        ([8192, 32768], pytest.approx([20, 80])), ([8192, 32768], pytest.approx([20, 80])), ([8192, 32768], [0.5, 0.5]),
    ]  # fmt: skip
    assert lines["SDPA, fp32"][0] == ([8192], [500.0]) and "SDPA, bf16" in lines
    assert lines["limit, fp32"] == [([8192, 32768], [1.0, 1.0])]


# ---- the command ----


def test_the_command_writes_what_it_measured(tiny, tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "results" / "retention.json"
    argv = ["bench", "retention", "--shapes", "tiny", "--dtypes", "fp32,bf16", "--rivals", "sdpa", "--repeats", "1"]
    main([*argv, "--device", "cpu", "--lengths", "64", "--json", str(out)])
    shown = capsys.readouterr()
    assert shown.out.startswith("| shape |") and shown.err.count("\n") == 2
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["command"].startswith("retentive bench retention --shapes tiny") and len(result["rows"]) == 2
    assert sorted(path.name for path in out.parent.iterdir()) == ["retention.json", "retention.png"]
    assert retention_report.table(result) + "\n" == shown.out


BAD = {
    "shape": (["--shapes", "big"], "unknown shape 'big', expected one of 5m, small"),
    "dtype": (["--dtypes", "fp64"], "unknown dtype 'fp64', expected one of fp32, bf16, fp16"),
    "rival": (["--rivals", "flash"], "unknown rival 'flash', expected one of auto, none, torchscale, sdpa, fla"),
    "rival-not-here": (["--rivals", "fla", "--device", "cpu"], "rival 'fla': needs a GPU"),
    "length": (["--lengths", "64", "0"], "lengths must be at least 1, got 0"),
    "repeats": (["--repeats", "0"], "repeats must be at least 1, got 0"),
    "device": (["--device", "tpu"], "unknown device 'tpu'"),
    "nothing": (["--shapes", ","], "no shape given"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_told_in_a_line(case, tmp_path, capsys):
    options, words = BAD[case]
    with pytest.raises(SystemExit) as stop:
        main(["bench", "retention", *options, "--json", str(tmp_path / "new" / "x.json")])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and words in line
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tiny, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(retention, "interleaved", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "retention", "--shapes", "tiny", "--rivals", "none", "--json", str(tmp_path / "x.json")])
    assert stop.value.code == 130 and not list(tmp_path.iterdir())
