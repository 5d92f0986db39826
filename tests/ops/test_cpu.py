"""The C kernels against `reference`, by the gold rule with all gradients; their memory accesses; the build."""

import ctypes
import fcntl
import functools
import os
import shutil
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from retentive.ops import compiler, reference, retention, retention_step
from retentive.ops import cpu as module
from retentive.ops.ring import Ring
from retentive.ops.ring import decode_step as plain_step
from tests.ops.test_blocked import DECAYS, DTYPES, LENGTHS, inputs, parallel, strided, weights_for, with_gradients

ROOT = Path(__file__).parents[2]
GROUP = module.GROUP
NAMES = {"per-head": ["o", "state", "dq", "dk", "dv", "dstate"],
         "per-token": ["o", "state", "dq", "dk", "dv", "dlog_decay", "dstate"]}  # fmt: skip
# a learned log decay is per token for the operator: it has its own test, and is added where autograd is involved
two_decays = pytest.mark.parametrize("decay", NAMES)
decays = pytest.mark.parametrize("decay", DECAYS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def must_build() -> bool:
    """True if there is a working GCC: a missing library is then a failure instead of a reason to skip."""
    if os.environ.get("CC") or sys.platform != "linux" or not shutil.which("gcc"):
        return False
    version = subprocess.run(["gcc", "-dumpversion"], capture_output=True, text=True).stdout
    return int(version.split(".")[0]) >= 12


pytestmark = pytest.mark.skipif(module.unavailable() is not None and not must_build(), reason=str(module.unavailable()))


def cpu(q, k, v, log_decay, state, *, C=None, cu=None):
    return retention(q, k, v, log_decay, scale=0.3, state=state, chunk_size=C, backend="cpu", cu_seqlens=cu)


def packed(function, cu):
    """Returns a function that applies `function` to each sequence alone and packs the results again."""

    def run(q, k, v, log_decay, state):
        parts = []
        for n, (a, b) in enumerate(pairwise(cu.tolist())):
            decay = log_decay[:, a:b] if log_decay.ndim == 3 else log_decay
            parts.append(function(q[:, a:b], k[:, a:b], v[:, a:b], decay, state[n : n + 1]))
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])

    return run


def cu_of(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


# ---- libraries for other CPUs, as the compiler makes them ----

PORTABLE = {
    "4-lanes": ["-march=x86-64"],
    "8-lanes": ["-march=x86-64-v3"],
    "no-tiles": ["-march=native", "-mno-amx-bf16"],
    "no-pairs": ["-march=native", "-mno-avx512bf16"],
}
PAIRS = {"no-tiles": 1}
"""How each multiplies pairs: 0 not at all, 1 in vectors, 2 in tiles."""


@pytest.fixture(params=["native", *(pytest.param(name, marks=pytest.mark.slow) for name in PORTABLE)])
def library(request, monkeypatch, compiled):
    """Runs the test with this machine's library, and with those for other CPUs that this one can run."""
    name = request.param
    if name == "native":
        return name
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this machine cannot run all of them")
    if name.startswith("no-") and module.library().can_multiply_pairs() <= PAIRS.get(name, 0):
        pytest.skip("this machine's library does no more")
    other = compiled(*PORTABLE[name])
    assert other.can_multiply_pairs() == PAIRS.get(name, 0)
    monkeypatch.setattr(module, "library", lambda: other)
    return name


# ---- the numbers ----

# In bf16 and fp16 the kernels keep sums, states and decays in float32, where plain torch rounds them. Their error is
# half of its, so no allowance is needed except for the luck of 30 numbers. In float32 both round alike, but plain torch
# subtracts running sums of log decays in one dtype, and some are float64 here. For few tokens it has up to twice the
# error, of which the order of sums alone makes 1.3. The gradient of a log decay is a running sum of differences, and
# scatters more.
TOL = {"fp32": 1.3, "bf16": 0.05, "fp16": 0.05}
DECAY_TOL = {"fp32": 1.5, "bf16": 0.5, "fp16": 0.5}

# tokens, K, V, chunk size: one token less and more than a vector of tokens, a chunk and a group of chunks. K and V with
# one long and one short, with more units than are summed at once (256), and odd numbers throughout.
CASES = [
    (31, 1, 1, 32), (33, 3, 5, 32), (63, 17, 33, 64), (65, 40, 72, 32), (65, 1, 1, None), (130, 64, 108, 64),
    (130, 17, 33, 32), (300, 3, 5, 32), (300, 17, 33, 64), (300, 40, 72, 128), (300, 64, 108, None), (300, 1, 1, 32),
    (40, 2, 300, 32), (40, 300, 2, 32), (2, 20, 9, 512), (600, 9, 20, 512), (257, 100, 16, None),
]  # fmt: skip
FEW = [(31, 1, 1, 32), (130, 17, 33, 32), (300, 40, 72, 64), (40, 300, 2, 32)]


def case_id(case) -> str:
    return "T{}-K{}-V{}-C{}".format(*case)


def follows_the_gold_rule(check, plain, case, decay, dtype, cu=None, B=2, H=3):
    T, K, V, C = case
    if K * V < 20:  # norms of few numbers mean little
        B, H = 4 if cu is None else 1, 8
    tensors = inputs(B, T, H, K, V, decay=decay, dtype=DTYPES[dtype], rows=None if cu is None else len(cu) - 1)
    weights = weights_for(tensors)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]

    def measure(q, k, v, log_decay, state):
        return plain(q, k, v, log_decay, scale=0.3, state=state)

    one, two = (parallel, measure) if cu is None else (packed(parallel, cu), packed(measure, cu))
    gold = with_gradients(one, exact, [w.double() for w in weights])
    test = with_gradients(lambda *x: cpu(*x, C=C, cu=cu), tensors, weights)
    want = with_gradients(two, tensors, weights)
    for name, *three in zip(NAMES[decay], gold, test, want, strict=True):
        assert three[1].dtype == (torch.float32 if name.endswith(("state", "decay")) else DTYPES[dtype])
        check(*three, (DECAY_TOL if name == "dlog_decay" else TOL)[dtype], name)


@pytest.mark.parametrize("case", CASES, ids=case_id)
@dtypes
@two_decays
def test_is_as_close_to_the_truth_as_plain_torch(decay, dtype, case, gold_rule, plain_retention):
    follows_the_gold_rule(gold_rule, plain_retention, case, decay, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW, ids=case_id)
@dtypes
@two_decays
@pytest.mark.parametrize("library", PORTABLE, indirect=True)
def test_so_it_is_as_built_for_other_cpus(library, decay, dtype, case, gold_rule, plain_retention):
    follows_the_gold_rule(gold_rule, plain_retention, case, decay, dtype)


@two_decays
def test_so_it_is_with_the_largest_heads(decay, gold_rule, plain_retention):
    follows_the_gold_rule(gold_rule, plain_retention, (150, 256, 512, 32), decay, "bf16", B=1, H=1)


# one token; a chunk of 32, one less, one more; a group of 128, one less, one more; two groups and a rest
PACKED = [1, 32, 31, 33, 1, 1, 128, 127, 129, 2, 300]


@dtypes
@two_decays
def test_so_it_is_on_packed_sequences(decay, dtype, gold_rule, plain_retention):
    cu = cu_of(PACKED)
    follows_the_gold_rule(gold_rule, plain_retention, (sum(PACKED), 17, 24, 32), decay, dtype, cu, B=1, H=2)


@pytest.mark.parametrize(("K", "V"), [(1, 1), (3, 5), (64, 108)], ids=lambda n: str(n))
@decays
def test_one_token_is_what_the_recurrence_says(decay, K, V, same):
    """To float32's 24 bits instead of the gold rule, since plain torch hardly rounds here."""
    for cu in (None, cu_of(LENGTHS["ones"])):
        B, T = (4, 1) if cu is None else (1, 3)
        tensors = inputs(B, T, 3, K, V, decay=decay, dtype=torch.float32, rows=None if cu is None else 3)
        weights = weights_for(tensors)
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
        one = functools.partial(reference.recurrent, scale=0.3)

        def recurrent(q, k, v, log_decay, state, one=one):
            return one(q, k, v, log_decay, state=state)

        gold = with_gradients(packed(recurrent, cu) if cu is not None else recurrent, exact, weights)
        got = with_gradients(lambda *x, cu=cu: cpu(*x, cu=cu), tensors, weights)
        # the gradient of a decay is a sum of up to 7000 products, few of them large
        same([x.double() for x in got], [x.double() for x in gold], 4e-6)


@pytest.mark.parametrize("lengths", [PACKED, LENGTHS["ragged"], LENGTHS["ones"]], ids=["groups", "ragged", "ones"])
@dtypes
@two_decays
def test_packed_sequences_are_sequences_alone_bit_for_bit(decay, dtype, lengths, same):
    cu = cu_of(lengths)
    tensors = inputs(1, sum(lengths), 2, 5, 3, decay=decay, rows=len(lengths), dtype=DTYPES[dtype])
    weights = weights_for(tensors)
    got = with_gradients(lambda *x: cpu(*x, C=32, cu=cu), tensors, weights)
    same(got, with_gradients(packed(lambda *x: cpu(*x, C=32), cu), tensors, weights), 0)
    same(with_gradients(lambda *x: cpu(*x, C=32, cu=cu.long()), tensors, weights), got, 0)


def test_rows_and_heads_are_rows_and_heads_alone_bit_for_bit(same):
    tensors = [x.detach() for x in inputs(3, 70, 4, 5, 3, decay="per-token", dtype=torch.float32)]
    o, state = cpu(*tensors, C=32)
    for b in range(3):
        for h in range(4):
            q, k, v, log_decay = (x[b : b + 1, :, h : h + 1] for x in tensors[:4])
            alone = cpu(q, k, v, log_decay, tensors[4][b : b + 1, h : h + 1], C=32)
            same(alone, (o[b : b + 1, :, h : h + 1], state[b : b + 1, h : h + 1]), 0)


@dtypes
def test_a_learned_decay_has_the_gradient_of_all_tokens_together(dtype, same):
    tensors = inputs(2, 140, 3, 17, 9, decay="learned", dtype=DTYPES[dtype])
    weights = weights_for(tensors)
    each = [*tensors[:3], tensors[3].detach().expand(2, 140, 3).contiguous().requires_grad_(), tensors[4]]
    got, want = (with_gradients(lambda *x: cpu(*x, C=32), x, weights) for x in (tensors, each))
    want[5] = want[5].sum((0, 1))
    same(got[5], want[5], 1e-6)  # float32, 280 numbers in any order
    del got[5], want[5]
    same(got, want, 0)


@pytest.mark.parametrize("C", [32, 64, 96, 512])
@two_decays
def test_the_size_of_chunks_does_not_matter(decay, C, same):
    tensors = inputs(1, 600, 2, 9, 20, decay=decay, dtype=torch.float32)
    weights = weights_for(tensors)
    got, want = (with_gradients(lambda *x, C=C: cpu(*x, C=C), tensors, weights) for C in (C, 128))
    # sums of up to 512 log decays of 0.5 on average are exact to 2^-24 of 256, and so are their exponentials
    same(got, want, 2e-5)


@pytest.mark.parametrize("scale", [-2.0, 0.0, 1e-3])
def test_any_scale(scale, same):
    q, k, v, log_decay, state = (x.detach() for x in inputs(1, 40, 2, 9, 5, dtype=torch.float32))
    got = retention(q, k, v, log_decay, scale=scale, state=state, backend="cpu", chunk_size=32)
    exact = [x.double() for x in (q, k, v, log_decay)]
    want = reference.recurrent(*exact, scale=scale, state=state.double())
    same([x.double() for x in got], want, 1e-6)


@pytest.mark.parametrize("first", ["cpu", "blocked", "reference"])
@pytest.mark.parametrize("second", ["cpu", "blocked", "reference"])
def test_goes_on_where_any_other_backend_stopped(first, second, same):
    q, k, v, log_decay, state = (x.detach() for x in inputs(2, 70, 2, 4, 3, decay="per-token", dtype=torch.float32))
    exact = [x.double() for x in (q, k, v, log_decay)]
    want = reference.recurrent(*exact, scale=0.3, state=state.double())
    for split in (1, 32, 33, 64, 69):
        parts, between = [], state
        for backend, at in ((first, slice(0, split)), (second, slice(split, 70))):
            o, between = retention(*(x[:, at] for x in (q, k, v)), log_decay[:, at], scale=0.3, state=between,
                                   backend=backend)  # fmt: skip
            parts.append(o.double())
        same((torch.cat(parts, 1), between.double()), want, 2e-6, f"split at {split}")


@decays
def test_the_state_is_carried_in_float32(decay, library):
    """A state that counts tokens: in bf16 it would stop at 256, since 256 + 1 is 256."""
    T = 1000
    one = torch.ones(1, T, 1, 1, dtype=torch.bfloat16)
    log_decay = torch.zeros(1, T, 1) if decay == "per-token" else torch.zeros(1)
    log_decay.requires_grad_(decay == "learned")
    start = torch.full((1, 1, 1, 1), 1 + 2.0**-10)
    for how in (dict(C=32), dict(), dict(C=64, cu=torch.tensor([0, T]))):
        _, state = cpu(one, one, one, log_decay, start, **how)
        assert state.item() == T + 1 + 2.0**-10


@pytest.mark.parametrize("C", [32, 128])
@two_decays
def test_decays_to_nothing_and_none_at_all(decay, C, same):
    """log_decay -inf forgets everything before the token, 0 forgets nothing."""
    q, k, v, log_decay, state = (x.detach() for x in inputs(1, 140, 3, 4, 3, decay=decay))
    log_decay[..., 0], log_decay[..., 1] = -torch.inf, 0
    if decay == "per-token":
        log_decay[:, ::7, 2] = -torch.inf
        log_decay[:, 1::2, 0] = 0
    want = reference.recurrent(q, k, v, log_decay, scale=0.3, state=state)
    tensors = [x.float().requires_grad_(x.ndim > 1) for x in (q, k, v, log_decay, state)]
    got = cpu(*tensors, C=C)
    # 20 tokens of -100 in a chunk are a running log decay of -2000, exact to 2^-13 in float32, as are its differences
    tol = 1e-6 if decay == "per-head" else 1e-4
    same([x.double() for x in got], want, tol)
    gradients = torch.autograd.grad(got[0].sum() + got[1].sum(), [x for x in tensors if x.requires_grad])
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@two_decays
def test_a_second_run_is_the_first_whatever_the_threads(decay, dtype, same):
    tensors = inputs(2, 140, 3, 17, 9, decay=decay, dtype=DTYPES[dtype])
    weights = weights_for(tensors)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (2, 1, 2, 7):  # 7: more than there are heads, in two rows of three
            torch.set_num_threads(threads)
            results.append(with_gradients(lambda *x: cpu(*x, C=32), tensors, weights))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        same(other, results[0], 0)


def test_calls_from_several_threads_at_once_do_not_meet(same):
    shapes = [(40, 17, 9), (300, 3, 40), (140, 40, 3), (9, 100, 100), (70, 16, 16), (33, 1, 1)]
    cases = [inputs(2, *s[:1], 3, *s[1:], decay="per-token", dtype=torch.float32) for s in shapes]
    weights = [weights_for(tensors) for tensors in cases]
    want = [with_gradients(cpu, *case) for case in zip(cases, weights, strict=True)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            got = pool.map(lambda case: with_gradients(cpu, *case), zip(cases * 2, weights * 2, strict=True))
            for n, result in enumerate(got):
                same(result, want[n % len(want)], 0)


# ---- memory: reads, writes, what is kept ----


def spoiled(tensors) -> list[torch.Tensor]:
    return [torch.full_like(x, torch.nan if x.ndim != 1 else -1).requires_grad_(x.requires_grad) for x in tensors]


@pytest.mark.parametrize("lengths", [None, [1, 1, 33, 128, 7, 180]], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@two_decays
def test_reads_nothing_that_it_has_not_written(decay, dtype, lengths, library, same, poisoned):
    """Results start as NaN, and so does the work space, by a preceding call on nothing but NaN."""
    cu = None if lengths is None else cu_of(lengths)
    rows = None if cu is None else len(lengths)
    for K, V in ((17, 9), (4, 50), (40, 3)):  # a different padding each time
        tensors = inputs(1, 350, 2, K, V, decay=decay, rows=rows, dtype=DTYPES[dtype])
        weights = weights_for(tensors)
        want = with_gradients(lambda *x: cpu(*x, C=32, cu=cu), tensors, weights)
        poisoned.clear()
        nan = [w * torch.nan for w in weights]
        spoilt = spoiled(tensors)
        if decay == "per-token":
            spoilt[3] = tensors[3]  # NaN is refused
        bad = with_gradients(lambda *x: cpu(*x, C=64, cu=cu), spoilt, nan)
        assert all(x.isnan().any() for x in bad)
        got = with_gradients(lambda *x: cpu(*x, C=32, cu=cu), tensors, weights)
        assert poisoned["empty"] >= 2 * 8  # o, state, checkpoints and all gradients, in both calls
        assert all(x.isfinite().all() for x in got)
        same(got, want, 0)


def test_the_poison_would_show(poisoned, monkeypatch):
    """A call that computes one row less than it returns gives NaN, so the test above can fail."""
    chunks = module._chunks
    monkeypatch.setattr(module, "_chunks", lambda cu, B, *rest: chunks(cu, B - 1, *rest))
    assert cpu(*inputs(2, 37, 2, 4, 3, dtype=torch.float32))[0].isnan().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@two_decays
def test_what_is_not_finite_stays_in_its_row_and_head(decay, dtype, bad, library, same):
    for which in range(3):
        tensors = inputs(3, 70, 3, 5, 4, decay=decay, dtype=DTYPES[dtype])
        weights = weights_for(tensors)
        want = with_gradients(lambda *x: cpu(*x, C=32), tensors, weights)
        with torch.no_grad():
            tensors[which][1, 40, 1] = bad
        got = with_gradients(lambda *x: cpu(*x, C=32), tensors, weights)
        assert not all(x.isfinite().all() for x in got)
        for name, a, b in zip(NAMES[decay], got, want, strict=True):
            for b_, h in ((b_, h) for b_ in range(3) for h in range(3) if (b_, h) != (1, 1)):
                at = (b_, h) if name.endswith("state") else (b_, slice(None), h)
                same(a[at], b[at], 0, f"{name} of row {b_}, head {h}")


@pytest.mark.parametrize("t", [20, 37, 64, 127], ids=lambda t: f"t{t}")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@two_decays
def test_a_future_that_is_not_finite_never_reaches_the_past(decay, dtype, t, library, same):
    """For q and k. A v may reach the start of its block of rows, multiplied together, since 0 * NaN is NaN."""
    block = 32 if dtype == "bf16" and module.library().can_multiply_pairs() == 2 else 8  # in tiles, in vectors
    for which in range(3):
        tensors = [x.detach() for x in inputs(1, 140, 1, 5, 4, decay=decay, dtype=DTYPES[dtype])]
        want, _ = cpu(*tensors, C=32)
        tensors[which][:, t] = torch.nan
        o, _ = cpu(*tensors, C=32)
        before = t if which < 2 else t // block * block
        same(o[:, :before], want[:, :before], 0)
        assert o[:, t].isnan().all()
    do = torch.ones(1, 140, 1, 4)
    do[:, t] = torch.nan  # a gradient that is not finite never reaches later tokens either
    tensors = inputs(1, 140, 1, 5, 4, decay=decay, dtype=DTYPES[dtype])
    _, _, dq, dk, dv, *_ = with_gradients(lambda *x: cpu(*x, C=32), tensors, (do, torch.zeros(())))
    later = t // block * block + block
    assert all(x[:, later:].isfinite().all() for x in (dk, dv)) and dk[:, : t + 1].isnan().all()
    assert dq[:, t].isnan().all() and dq[:, t + 1 :].isfinite().all() and dq[:, :t].isfinite().all()


def fused(q, k, v, log_decay, state) -> list[torch.Tensor]:
    """Returns q, k, v as slices of one projection's output, and decays as a transposed view."""
    K, V = q.shape[-1], v.shape[-1]
    qkv = torch.cat([x.detach().flatten(2) for x in (q, k, v)], -1)
    sizes = [q.shape[2] * n for n in (K, K, V)]
    q, k, v = (x.unflatten(-1, (q.shape[2], -1)) for x in qkv.split(sizes, -1))
    if log_decay.ndim == 3:
        log_decay = log_decay.detach().mT.contiguous().mT
    return [*(x.detach().requires_grad_() for x in (q, k, v)), log_decay.detach(), state.detach().requires_grad_()]


def sliced(q, k, v, log_decay, state) -> list[torch.Tensor]:
    """Returns some tokens of longer rows (an even number, so that one row shows it too), and some heads of more."""
    more = [torch.cat((x.detach(), x.detach()), 1)[:, ::2] for x in (q, k)]
    v = torch.cat((v.detach(), v.detach()), 2)[:, :, 1:4]
    state = torch.cat((state.detach(), state.detach()), 1)[:, :3]
    return [*(x.detach().requires_grad_() for x in (*more, v)), log_decay.detach(), state.requires_grad_()]


@pytest.mark.parametrize("layout", [strided, fused, sliced])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@two_decays
def test_memory_layout_does_not_matter(decay, dtype, rows, layout, same):
    tensors = layout(*inputs(rows, 70, 3, 6, 5, decay=decay, dtype=DTYPES[dtype]))
    assert not any(x.is_contiguous() for x in tensors[:3])
    plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad) for x in tensors]
    # the gradient of a sum is expanded, with strides of 0
    weights = torch.ones(()), torch.ones(())
    got = with_gradients(lambda *x: cpu(*x, C=32), tensors, weights)
    same(got, with_gradients(lambda *x: cpu(*x, C=32), plain, weights), 0)


def test_no_copy_is_made_of_a_fused_projection(monkeypatch):
    """Nor of anything else whose tokens are evenly spaced, which is the purpose of `rows_of`."""
    tensors = fused(*inputs(2, 70, 3, 6, 5, dtype=torch.float32))
    for x in tensors[:3]:
        assert module.rows_of(x).data_ptr() == x.data_ptr()
    x = torch.randn(2, 70, 3, 6)
    for view in (x[:, ::2], x[:, :, 1:], x[:1, 1:], x[:1, :1].expand(1, 70, 3, 6), x[:1, :1].expand(2, 70, 3, 6)):
        assert module.rows_of(view).data_ptr() == view.data_ptr()
    for view in (x[:, 1:], x[..., 1:], x[..., ::2], x.transpose(1, 2)):
        assert module.rows_of(view).is_contiguous() and torch.equal(module.rows_of(view), view)


@pytest.mark.parametrize("shape", [(1, 64, 1, 4, 4), (2, 33, 3, 16, 16)], ids=["H1", "H3"])
@dtypes
def test_inputs_are_never_written_to(shape, dtype):
    for decay, cu in ((d, cu) for d in DECAYS for cu in (None, torch.tensor([0, shape[1]]))):
        if cu is not None and shape[0] > 1:
            continue
        tensors = inputs(*shape, decay=decay, dtype=DTYPES[dtype])
        weights = weights_for(tensors)
        before = [x.detach().clone() for x in (*tensors, *weights)]
        out = with_gradients(lambda *x, cu=cu: cpu(*x, C=32, cu=cu), tensors, weights)
        assert all(torch.equal(a, b) for a, b in zip((*tensors, *weights), before, strict=True))
        # nor is a result a view of an input: writing to one would change the other
        pointers = {x.untyped_storage().data_ptr() for x in (*tensors, *weights)}
        assert pointers.isdisjoint(x.untyped_storage().data_ptr() for x in out)


@pytest.mark.parametrize("lengths", [None, [1, 127, 128, 144]], ids=["rows", "packed"])
@decays
def test_training_keeps_the_inputs_and_a_state_for_every_group_of_chunks(decay, lengths):
    T, C = 400, 32
    cu = None if lengths is None else cu_of(lengths)
    rows = 2 if cu is None else len(lengths)
    tensors = inputs(2 if cu is None else 1, T, 3, 4, 5, decay=decay, dtype=torch.float32, rows=rows)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        o, _ = cpu(*tensors, C=C, cu=cu)
    given = {x.untyped_storage().data_ptr() for x in (*tensors, *(() if cu is None else (cu,)))}
    own = [x for x in saved if x.untyped_storage().data_ptr() not in given]
    assert {x.untyped_storage().data_ptr() for x in saved} >= given and len(own) == 1
    # for packed sequences the maximum: the exact number depends on values in cu_seqlens
    most = 2 * -(-T // (C * GROUP)) if cu is None else T // (C * GROUP) + rows
    assert own[0].shape == (most, 3, 4, 5) and own[0].dtype == torch.float32
    o.sum().backward()


def test_inference_does_not_wait_for_dynamo():
    """torch imports Dynamo at the first call of an operator, which delayed a server's first picture by seconds."""
    code = """
import sys, torch
from retentive.ops import retention
q, k, v = torch.randn(3, 1, 40, 2, 8)
with torch.inference_mode():
    retention(q, k, v, -torch.rand(2))
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_who_looks_on_sees_the_operator():
    seen = []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    tensors = [x.detach() for x in inputs(2, 40, 3, 4, 5, dtype=torch.float32)]
    with Looking():
        cpu(*tensors)
    assert torch.ops.retentive.cpu.default in seen


def test_keeps_nothing_where_no_gradient_is_asked_for(monkeypatch):
    kept = []

    def spy(run, *args):
        out = run(*args)
        kept.append(out[2].numel())
        return out

    for name in ("cpu", "forward"):
        monkeypatch.setattr(module, name, functools.partial(spy, getattr(module, name)))
    tensors = inputs(2, 140, 3, 4, 5, decay="per-token", dtype=torch.float32)
    cpu(*(x.detach() for x in tensors))
    with torch.no_grad():
        cpu(*tensors)
    with torch.inference_mode():
        cpu(*tensors)
    assert kept == [0, 0, 0]
    for only in range(5):  # it keeps what it needs for any single one
        cpu(*(x.detach().requires_grad_(n == only) for n, x in enumerate(tensors)))
    assert len(kept) == 8 and all(kept[3:])


def test_each_gradient_can_be_asked_for_alone(same):
    tensors = inputs(2, 140, 3, 4, 5, decay="per-token", dtype=torch.float32)
    weights = weights_for(tensors)
    want = with_gradients(cpu, tensors, weights)[2:]
    for only in range(5):
        alone = [x.detach().requires_grad_(n == only) for n, x in enumerate(tensors)]
        same(with_gradients(cpu, alone, weights)[2:], want[only : only + 1], 0)


@two_decays
def test_the_gradient_of_one_result_alone(decay, same):
    """The other result gets no gradient: autograd passes zeros."""
    tensors = inputs(2, 140, 3, 4, 5, decay=decay, dtype=torch.float32)
    wanted = [x for x in tensors if x.requires_grad]
    w, ws = weights_for(tensors)
    o, state = cpu(*tensors)
    got = torch.autograd.grad((o * w).sum(), wanted, retain_graph=True)
    same(got, with_gradients(cpu, tensors, (w, 0 * ws))[2:], 0)
    of_state = torch.autograd.grad((state * ws).sum(), [x for x in wanted if x is not tensors[0]])
    want = with_gradients(cpu, tensors, (0 * w, ws))[2:]
    same(of_state, want[1:], 0)


FAR = 2**31 // 256 + 1000


@two_decays
def test_offsets_may_pass_2_to_the_31(decay, same):
    """The last 100 of 8.4 million tokens. Untouched memory is free, and the C function only sees those tokens."""
    T, K, C = 100, 256, 32
    tensors = [x.detach() for x in inputs(1, T, 1, K, K, decay=decay, dtype=torch.bfloat16)]
    do, dstate = torch.randn(1, T, 1, K).bfloat16(), torch.randn(1, 1, K, K)
    first = torch.zeros(1, dtype=torch.int64)

    def run(offset: int) -> list[torch.Tensor]:
        def placed(x, fill=True):
            row = torch.empty(offset + T, *x.shape[2:], dtype=x.dtype)
            if fill:
                row[offset:] = x[0]
            return row[None]

        begin = torch.tensor([offset, offset + T])
        q, k, v = (placed(x) for x in tensors[:3])
        log_decay = placed(tensors[3]) if decay == "per-token" else tensors[3]
        common = module._common(q, k, v, log_decay, tensors[4], 0.3, C, begin, first)
        o, final, checkpoints = placed(do, fill=False), torch.empty(1, 1, K, K), torch.empty(1, 1, K, K)
        module._run("retention_forward", **common, o=o, final=final, checkpoints=checkpoints)
        results = [o[:, offset:].clone(), final]
        del o
        dout = placed(do)
        dq, dk, dv = (placed(do, fill=False) for _ in range(3))
        dlog_decay, dinitial = torch.empty(1, offset + T, 1), torch.empty(1, 1, K, K)
        module._run("retention_backward", **common, dout=dout, do_stride=dout.stride(1), dstate=dstate, dq=dq, dk=dk,
                    dv=dv, checkpoints=checkpoints, dlog_decay=dlog_decay, dinitial=dinitial)  # fmt: skip
        gradients = [x[:, offset:].clone() for x in (dq, dk, dv, dlog_decay)[: 4 if decay == "per-token" else 3]]
        return [*results, *gradients, dinitial]

    assert FAR * K > 2**31
    got = run(FAR)
    assert all(x.isfinite().all() and x.any() for x in got)
    same(got, run(0), 0)


# ---- torch around it ----

OPCHECK = {"rows": (2, 40, None), "ragged": (2, 33, None), "packed": (1, 70, [0, 1, 34, 70])}


# opcheck reads .grad of tensors that are not leaves, and torch 2.15 warns about it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("layout", ["contiguous", pytest.param("strided", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", OPCHECK)
@two_decays
def test_opcheck(case, decay, layout):
    """Checks schema, autograd registration and the fake implementation, which compile and export rely on."""
    B, T, cu = OPCHECK[case]
    cu = None if cu is None else torch.tensor(cu)
    tensors = inputs(B, T, 2, 4, 3, decay=decay, rows=B if cu is None else 3, dtype=torch.float32)
    if layout == "strided":
        tensors = strided(*tensors)
    op, backward = torch.ops.retentive.cpu.default, torch.ops.retentive.cpu_backward.default
    torch.library.opcheck(op, (*tensors, cu, 0.3, 32, True))
    bare = [x.detach() for x in tensors]
    torch.library.opcheck(op, (*bare, cu, 0.3, 32, False))
    checkpoints = op(*bare, cu, 0.3, 32, True)[2]
    do, dstate = torch.randn_like(bare[2]), torch.randn_like(bare[4])
    torch.library.opcheck(backward, (do, dstate, *bare, checkpoints, cu, 0.3, 32))


@pytest.mark.parametrize("lengths", [None, [1, 33, 36]], ids=["rows", "packed"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@decays
def test_compiles_as_one_graph(compiler, lengths, decay, same):
    cu = None if lengths is None else cu_of(lengths)
    B, rows = (2, None) if cu is None else (1, len(lengths))
    tensors = inputs(B, 70, 2, 4, 3, decay=decay, rows=rows, dtype=torch.float32)
    weights = weights_for(tensors)
    torch._dynamo.reset()
    function = functools.partial(cpu, C=32)
    compiled = torch.compile(lambda *x: function(*x[:5], cu=x[5]), fullgraph=True, backend=compiler)
    got = with_gradients(lambda *x: compiled(*x, cu), tensors, weights)
    same(got, with_gradients(lambda *x: function(*x, cu=cu), tensors, weights), 0)
    with torch.no_grad():  # another graph, which keeps nothing
        same(compiled(*tensors, cu), function(*tensors, cu=cu), 0)


def test_auto_compiles_to_it_too(same):
    tensors = [x.detach() for x in inputs(2, 70, 2, 4, 3, dtype=torch.float32)]
    torch._dynamo.reset()
    seen = []

    def look(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(lambda *x: retention(*x[:4], state=x[4]), fullgraph=True, backend=look)
    same(compiled(*tensors), retention(*tensors[:4], state=tensors[4], backend="cpu"), 0)
    assert any("retentive.cpu" in name for name in seen)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
def test_activations_can_be_recomputed(reentrant, same):
    tensors = inputs(2, 140, 2, 4, 3, decay="per-token", dtype=torch.float32)
    weights = weights_for(tensors)
    got = with_gradients(lambda *x: checkpoint(functools.partial(cpu, C=32), *x, use_reentrant=reentrant),
                         tensors, weights) if not reentrant else None  # fmt: skip
    want = with_gradients(lambda *x: cpu(*x, C=32), tensors, weights)
    if reentrant:  # supports backward() only
        out = checkpoint(functools.partial(cpu, C=32), *tensors, use_reentrant=True)
        sum((w * x).sum() for w, x in zip(weights, out, strict=True)).backward()
        got = [*out, *(x.grad for x in tensors)]
    same(got, want, 0)


def test_autocast_changes_nothing(same):
    """Bit-identical with gradients, whether forward and backward are inside autocast or not."""
    tensors = inputs(2, 70, 2, 4, 3, decay="per-token", dtype=torch.float32)
    weights = weights_for(tensors)
    want = with_gradients(cpu, tensors, weights)

    def cast(*x):
        with torch.autocast("cpu", torch.bfloat16):
            return cpu(*x)

    same(with_gradients(cast, tensors, weights), want, 0)
    with torch.autocast("cpu", torch.bfloat16):
        same(with_gradients(cpu, tensors, weights), want, 0)


def test_a_second_derivative_says_that_there_is_none():
    tensors = inputs(1, 5, 2, 4, 3, decay="per-token", dtype=torch.float32)
    (dq,) = torch.autograd.grad(cpu(*tensors)[0].sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="retention has no second derivative here"):
        torch.autograd.grad(dq.sum(), tensors[1])


REFUSED = {
    "float64": (dict(), torch.float64, "it computes in float32 at most, got torch.float64"),
    "recurrent": (dict(form="recurrent"), torch.float32, "it computes the chunkwise form, not the recurrent one"),
    "parallel": (dict(form="parallel"), torch.float32, "it computes the chunkwise form, not the parallel one"),
    "33": (dict(chunk_size=33), torch.float32, "its chunks are of 32, 64, … 512 tokens, got 33"),
    "16": (dict(chunk_size=16), torch.float32, "its chunks are of 32, 64, … 512 tokens, got 16"),
    "544": (dict(chunk_size=544), torch.float32, "its chunks are of 32, 64, … 512 tokens, got 544"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_it_refuses_and_auto_does_otherwise(case, refuses, same):
    how, dtype, words = REFUSED[case]
    q, k, v, log_decay, state = (x.detach() for x in inputs(1, 40, 2, 4, 3, dtype=dtype))
    with refuses(f"backend 'cpu' cannot do this: {words}"):
        retention(q, k, v, log_decay, state=state, backend="cpu", **how)
    got = retention(q, k, v, log_decay, state=state, **how)
    want = retention(q, k, v, log_decay, state=state, backend="reference", **how)
    same(got, want, 1e-6)


def test_other_devices_are_refused(refuses):
    tensors = [x.detach().to("meta") for x in inputs(1, 5, 2, 4, 3, dtype=torch.float32)]
    with refuses("backend 'cpu' cannot do this: the tensors are on meta"):
        cpu(*tensors)


# ---- one token: libraries for other CPUs; test_ring.py has the rest ----


@pytest.mark.parametrize(("K", "V"), [(1, 1), (7, 9), (17, 33), (40, 72), (64, 108)], ids=lambda n: str(n))
@dtypes
def test_a_step_is_that_of_torch_whatever_the_cpu(dtype, K, V, library, same):
    B, H, R = 2, 3, 4
    one, two = (Ring.open(torch.ones(B, H, K, V), DTYPES[dtype], R) for _ in range(2))
    for _ in range(2 * R + 1):
        q, k, v = (torch.randn(B, H, n).to(DTYPES[dtype]) for n in (K, K, V))
        log_decay = -torch.rand(H)
        o, want = module.decode_step(q, k, v, log_decay, 0.3, one), plain_step(q, k, v, log_decay, 0.3, two)
        # both sum in float32 and round once, so the last bit may differ
        same(o.float(), want.float(), {"fp32": 1e-6, "bf16": 2.0**-8, "fp16": 2.0**-11}[dtype])
    same(one.state, two.state, 1e-6)
    same((one.written, one.folded), (two.written, two.folded), 0)


# ---- the build ----


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Resets to a process' start: no library, an empty cache (which it returns), and a source that compiles quickly."""
    monkeypatch.setattr(module, "library", functools.cache(module.library.__wrapped__))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "c" / "small.c"
    source.parent.mkdir()
    source.write_text("int answer(void) { return 42; }\n", encoding="utf-8")
    monkeypatch.setattr(module, "SOURCE", replace(module.SOURCE, units=(source,), folders=(source.parent,)))
    return tmp_path / "cache" / "retentive"


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_is_built_once_and_kept(fresh, monkeypatch, tmp_path):
    calls = tmp_path / "calls"
    monkeypatch.setenv("CC", script(tmp_path / "cc", f'echo called >> {calls}\nexec gcc "$@"\n'))
    assert module.unavailable() is None and module.library().answer() == 42
    (library,) = fresh.iterdir()  # and no intermediate files
    assert library.suffix == ".so"
    assert len(calls.read_text().split()) == 2  # one to compile, one to link
    module.library.cache_clear()
    assert module.unavailable() is None and len(calls.read_text().split()) == 2


def test_processes_that_start_together_compile_once(fresh, tmp_path):
    calls = tmp_path / "calls"
    slow = [script(tmp_path / "cc", f'echo called >> {calls}\nsleep 0.3\nexec gcc "$@"\n')]
    with ThreadPoolExecutor(4) as pool:  # each locks the folder by a descriptor of its own, as processes do
        libraries = set(pool.map(lambda _: compiler.build(module.SOURCE, slow, fresh), range(4)))
    assert libraries == set(fresh.iterdir()) and len(libraries) == 1
    assert len(calls.read_text().split()) == 2


def test_a_file_system_without_locks(fresh, monkeypatch):
    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert module.unavailable() is None and module.library().answer() == 42


def test_that_it_is_compiled_is_logged(fresh, caplog):
    with caplog.at_level("INFO", "retentive"):
        for _ in range(2):
            module.library.cache_clear()
            assert module.unavailable() is None
    assert [record.getMessage() for record in caplog.records] == [
        "compiling its cpu kernels for this CPU, once (some seconds)"
    ]


def test_another_source_other_flags_or_another_compiler_is_another_library(fresh, monkeypatch, tmp_path):
    folder = tmp_path / "libraries"
    libraries = {compiler.build(module.SOURCE, ["gcc"], folder)}
    source = replace(module.SOURCE, flags=(*module.SOURCE.flags, "-DX"))
    libraries.add(compiler.build(source, ["gcc"], folder))
    libraries.add(compiler.build(source, [script(tmp_path / "cc", 'exec gcc "$@"\n')], folder))
    source.units[0].write_text("int answer(void) { return 43; }\n", encoding="utf-8")
    libraries.add(compiler.build(source, ["gcc"], folder))
    (source.folders[0] / "included.h").write_text("/* may change what is compiled */\n", encoding="utf-8")
    libraries.add(compiler.build(source, ["gcc"], folder))
    monkeypatch.setattr(compiler, "_cpu", lambda: "another machine on the same home directory")
    libraries.add(compiler.build(source, ["gcc"], folder))
    assert len(libraries) == 6 and set(folder.iterdir()) == libraries


FAILURES = {
    "no-such": ("", "no C compiler found (looked for {cc})"),
    "complains": ("echo 'cpu.c:1: it is Monday' >&2\necho 'and more' >&2\nexit 1\n",
                  "{cc} could not compile the kernels: cpu.c:1: it is Monday"),
    "tells-where": ("echo 'cpu.c: In function f:' >&2\necho 'cpu.c:1: error: it is Monday' >&2\nexit 1\n",
                    "{cc} could not compile the kernels: cpu.c:1: error: it is Monday"),
    "silent": ("exit 3\n", "{cc} could not compile the kernels: exit code 3"),
    "killed": ("kill -9 $$\n", "{cc} could not compile the kernels: exit code -9"),
    "makes-nothing": ("exit 0\n", "{cc} makes no library: CC must name a C compiler"),
    "writes-half": ('for x; do [ "$o" = -o ] && echo half > "$x"; o=$x; done\nexit 1\n', "exit code 1"),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_without_a_compiler_that_works_the_reason_is_said_and_auto_does_without(
    failure, fresh, monkeypatch, tmp_path, refuses, capfd, same
):
    text, reason = FAILURES[failure]
    cc = script(tmp_path / "cc", text) if text else str(tmp_path / "cc")
    monkeypatch.setenv("CC", cc)
    assert reason.format(cc=cc) in module.unavailable() and "\n" not in module.unavailable()
    q, k, v, log_decay, state = (x.detach() for x in inputs(1, 40, 2, 4, 3, dtype=torch.float32))
    with refuses(f"backend 'cpu' cannot do this: {module.unavailable()}"):
        cpu(q, k, v, log_decay, state)
    got = retention(q, k, v, log_decay, scale=0.3, state=state)
    same(got, retention(q, k, v, log_decay, scale=0.3, state=state, backend="blocked"), 0)
    with torch.no_grad():
        o, _ = retention_step(q[:, 0], k[:, 0], v[:, 0], log_decay, scale=0.3, state=Ring.open(state, q.dtype))
    same(o, got[0][:, 0], 1e-6)
    assert capfd.readouterr() == ("", "")
    assert not fresh.exists() or not list(fresh.iterdir())  # no half-made file that would be used later


def test_a_cache_that_cannot_be_written_to(fresh, monkeypatch, tmp_path, refuses):
    (tmp_path / "cache").write_text("a file, where the folder should be")  # root can write to read-only folders
    assert "cache" in module.unavailable() and "\n" not in module.unavailable()
    with refuses("backend 'cpu' cannot do this: "):
        cpu(*inputs(1, 40, 2, 4, 3, dtype=torch.float32))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_cache(fresh, monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    assert "Permission denied" in module.unavailable()


@pytest.mark.parametrize("keep", [0, 0.5, 0.99], ids=["empty", "half", "nearly-all"])
def test_a_library_that_is_broken_is_built_anew(keep, fresh, monkeypatch):
    """As after a power cut. Of a truncated file the loader makes a library whose code ends in SIGBUS."""
    monkeypatch.setenv("CC", "gcc")
    library = compiler.build(module.SOURCE, [shutil.which("gcc")], fresh)
    whole = library.read_bytes()
    library.unlink()
    library.write_bytes(whole[: int(keep * len(whole))])
    assert module.unavailable() is None and module.library().answer() == 42
    (again,) = fresh.iterdir()
    assert again.stat().st_size == len(whole)


def test_a_compiler_that_hangs_is_given_up_with_all_that_it_started(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "PATIENCE", 0.5)
    pids = tmp_path / "pids"
    hangs = script(tmp_path / "cc", f"sleep 600 &\necho $! $$ > {pids}\nwait\n")
    monkeypatch.setenv("CC", hangs)
    assert module.unavailable() == f"{hangs} took more than 0.5 s to compile the kernels"
    for pid in pids.read_text().split():
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"  # gone, or an unreaped zombie
    assert not list(fresh.iterdir())


def test_the_step_stands_by_itself(tmp_path):
    """One C file and the headers it includes, which other engines compile alone."""
    flags = [flag for flag in module.SOURCE.flags if flag != "-fopenmp"]
    command = ["gcc", *flags, "-shared", str(module.FOLDER / "step.c"), "-o", str(tmp_path / "step.so"), *compiler.LINK]
    subprocess.run(command, check=True)
    assert ctypes.CDLL(str(tmp_path / "step.so")).retention_step


def test_the_compiler_may_be_named_with_what_it_is_always_given(fresh, monkeypatch):
    monkeypatch.setenv("CC", "gcc -DX='a b'")
    assert module.unavailable() is None and module.library().answer() == 42


def test_a_compiler_without_float16_is_left_alone_with_it(monkeypatch, compiled, refuses):
    other = compiled("-march=x86-64-v3", "-U__FLT16_MAX__", "-O0")
    assert module.library().has_half() and not other.has_half()
    monkeypatch.setattr(module, "library", lambda: other)
    assert module.unavailable() is None and module.unavailable(torch.bfloat16) is None
    with refuses("backend 'cpu' cannot do this: its compiler has no float16"):
        cpu(*inputs(1, 40, 2, 4, 3, dtype=torch.float16))


def test_built_by_several_at_once_it_is_whole_or_not_there(fresh, tmp_path):
    """Threads that share a folder behave like processes here: they share nothing else."""
    slow = [script(tmp_path / "cc", 'sleep 0.1\nexec gcc "$@"\n')]
    with ThreadPoolExecutor(5) as pool:
        builds = [pool.submit(compiler.build, module.SOURCE, slow, fresh) for _ in range(4)]
        while not all(x.done() for x in builds):  # any library visible meanwhile can be loaded
            for library in fresh.glob("*.so"):
                assert ctypes.CDLL(str(library)).answer() == 42
    assert len({x.result() for x in builds}) == 1 and len(list(fresh.iterdir())) == 1


NO_COMPILER = """
import torch
from retentive.ops import cpu, retention
q, k, v = torch.randn(3, 1, 40, 2, 4).unbind()
log_decay = -torch.rand(2)
auto, named = (retention(q, k, v, log_decay, backend=backend)[0] for backend in ("auto", "blocked"))
assert torch.equal(auto, named)
compiled = torch.compile(lambda *x: retention(*x)[0], backend="eager", fullgraph=True)
assert torch.equal(compiled(q, k, v, log_decay), named)
print(cpu.unavailable())
"""


def test_in_a_process_without_a_compiler(tmp_path):
    environment = os.environ | {"CC": "cc-of-nowhere", "XDG_CACHE_HOME": str(tmp_path)}
    # torch.compile warns about its own slowness on Python 3.13.0
    warnings = ["-W", "error", "-W", "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"]
    done = subprocess.run([sys.executable, *warnings, "-c", NO_COMPILER], env=environment, cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no C compiler found (looked for cc-of-nowhere); ") and done.stderr == ""
    assert not list(tmp_path.iterdir())


def test_products_of_others_on_the_same_threads_are_left_alone(same):
    """oneDNN also multiplies in AMX tiles on CPUs that have them: each library finds its own configuration."""
    q, k, v = (torch.randn(1, 300, 4, n).bfloat16() for n in (64, 64, 108))
    a, b, decays = torch.randn(77, 300).bfloat16(), torch.randn(300, 50).bfloat16(), torch.tensor([-0.1] * 4)
    want, wrong = [a @ b, *retention(q, k, v, decays)], []

    def work() -> None:
        for _ in range(30):
            got = [a @ b, *retention(q, k, v, decays)]
            if not all(torch.equal(x, y) for x, y in zip(got, want, strict=True)):
                wrong.append(got)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_instruction_set_may_be_forced(monkeypatch, refuses):
    monkeypatch.delenv("RETENTIVE_ISA", raising=False)
    native = compiler.instruction_flag()
    monkeypatch.setenv("RETENTIVE_ISA", list(compiler.SETS)[1])
    assert compiler.instruction_flag() not in (native, None)
    monkeypatch.setenv("RETENTIVE_ISA", "none")
    with refuses("RETENTIVE_ISA=none is unknown here, expected one of native, "):
        module.library.__wrapped__()
    strongest = "dotprod" if compiler.ARM else "avx512"
    monkeypatch.setenv("RETENTIVE_ISA", strongest)
    monkeypatch.setattr(compiler, "_cpu", lambda: "flags : mmx sse sse2")
    with refuses(f"RETENTIVE_ISA={strongest}: this CPU has no {compiler.NEEDED[strongest].split()[0]}"):
        module.library.__wrapped__()


def test_ziglangs_compiler_is_taken_where_there_is_no_other(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    assert compiler.find_compiler() is None
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: name == "ziglang")
    assert compiler.find_compiler() == [sys.executable, "-m", "ziglang", "cc"]
