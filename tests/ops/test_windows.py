"""Attention to a window in C against its formula, by the gold rule with all gradients."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from retentive.ops import cpu, windows
from tests.ops.test_blocked import DTYPES
from tests.ops.test_cpu import PAIRS, PORTABLE, must_build

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None and not must_build(), reason=str(cpu.unavailable()))
dtypes = pytest.mark.parametrize("dtype", DTYPES)
NAMES = ["o", "dq", "dk", "dv", "dlog_f"]

# rows, tokens, query heads, key heads, K, window, forget gate. The window: the token alone, one less and one more than
# a chunk, longer than the text. Tokens: one less and one more than a vector, a chunk, a window. K: odd, two panels.
CASES = [
    (1, 1, 2, 2, 3, 5, True), (2, 33, 2, 2, 5, 1, True), (1, 63, 4, 2, 16, 63, False), (2, 65, 2, 1, 17, 64, True),
    (1, 130, 2, 2, 40, 65, True), (1, 257, 2, 2, 32, 256, False), (1, 400, 6, 2, 32, 256, True),
    (2, 300, 1, 1, 64, 100, True), (1, 90, 2, 2, 100, 2000, True), (1, 520, 2, 2, 8, 129, True),
]  # fmt: skip
FEW = [CASES[3], CASES[6]]


def case_id(case) -> str:
    return "B{}-T{}-H{}-h{}-K{}-W{}-{}".format(*case[:6], "gate" if case[6] else "plain")


def inputs(B, T, H, h, K, _window=0, gate=True, *, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T * K)

    def normal(heads):
        return torch.randn(B, T, heads, K, generator=generator).to(dtype).requires_grad_()

    # gates that forget nothing, little, and half
    fade = [-torch.rand(B, T, H, generator=generator) * torch.tensor([0.0, 0.05, 0.7])[torch.arange(H) % 3]]
    return [normal(H), normal(h), normal(h), *(x.requires_grad_() for x in fade if gate)]


def plain(q, k, v, log_f=None, *, window, scale=0.3):
    """The formula, all but the gates in the dtype of q."""
    (B, T, H, _), place = q.shape, torch.arange(q.shape[1])
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    lag = place[:, None] - place
    bias = torch.zeros(B, H, T, T, dtype=q.dtype if log_f is None else log_f.dtype)
    if log_f is not None:
        since = log_f.transpose(1, 2).cumsum(-1)
        bias = since[..., :, None] - since[..., None, :]
    bias = bias.masked_fill((lag < 0) | (lag >= window), -torch.inf).to(q.dtype)
    scores = scale * (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) + bias
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


def ours(q, k, v, log_f=None, *, window, scale=0.3, cu=None):
    return windows.attend(q, k, v, log_f, window, scale, cu)


def with_gradients(function, tensors, do) -> list[torch.Tensor]:
    o = function(*tensors)
    return [o, *torch.autograd.grad(o, tensors, do)]


def follows_the_gold_rule(check, case, dtype):
    tensors, window = inputs(*case, dtype=DTYPES[dtype]), case[5]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    do = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    gold = with_gradients(lambda *x: plain(*x, window=window), exact, do.double())
    want = with_gradients(lambda *x: plain(*x, window=window), tensors, do)
    got = with_gradients(lambda *x: ours(*x, window=window), tensors, do)
    for name, *three in zip(NAMES, gold, got, want, strict=False):
        if window == 1 and name != "o" and name != "dv":  # a softmax of one number: nothing depends on q and k
            assert not three[1].any()
            continue
        # In float32 both round alike; the order of sums makes the difference, most for few numbers. In 16 bits scores,
        # the softmax and sums stay float32 here, and only operands of products are rounded.
        check(*three, 1.5 if dtype == "fp32" else 0.05, name)


@pytest.mark.parametrize("case", CASES, ids=case_id)
@dtypes
def test_is_as_close_to_the_truth_as_plain_torch(dtype, case, gold_rule):
    follows_the_gold_rule(gold_rule, case, dtype)


@pytest.fixture
def library(request, monkeypatch, compiled):
    """Runs the test with a library for another CPU that this one can run."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this machine cannot run all of them")
    if request.param.startswith("no-") and cpu.library().can_multiply_pairs() <= PAIRS.get(request.param, 0):
        pytest.skip("this machine's library does no more")
    monkeypatch.setattr(windows, "library", lambda: compiled(*PORTABLE[request.param]))


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW, ids=case_id)
@dtypes
@pytest.mark.parametrize("library", PORTABLE, indirect=True)
def test_so_it_is_as_built_for_other_cpus(library, dtype, case, gold_rule):
    follows_the_gold_rule(gold_rule, case, dtype)


LENGTHS = [1, 64, 63, 65, 1, 128, 300]


@dtypes
def test_packed_sequences_are_sequences_alone_bit_for_bit(dtype, same):
    tensors = inputs(1, sum(LENGTHS), 2, 1, 20, dtype=DTYPES[dtype])
    do = torch.randn(tensors[0].shape).to(DTYPES[dtype])
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    got = with_gradients(lambda *x: ours(*x, window=100, cu=cu.int()), tensors, do)
    parts = []
    for a, b in pairwise(cu.tolist()):
        one = [x.detach()[:, a:b].requires_grad_() for x in tensors]
        parts.append(with_gradients(lambda *x: ours(*x, window=100), one, do[:, a:b]))
    same(got, [torch.cat(each, 1) for each in zip(*parts, strict=True)], 0)


def test_an_empty_sequence_is_nothing(same):
    tensors = [x.detach() for x in inputs(1, 90, 2, 2, 8)]
    cu = torch.tensor([0, 0, 40, 40, 90, 90])
    want = ours(*tensors, window=16, cu=torch.tensor([0, 40, 90]))
    same(ours(*tensors, window=16, cu=cu), want, 0)


@pytest.mark.parametrize("cu", [[0, 10], [1, 20], [0, 25, 20], [0, 30]], ids=str)
def test_borders_outside_of_the_row_are_refused(cu, refuses):
    with refuses("cu_seqlens must ascend from 0 to T = 20"):
        ours(*inputs(1, 20, 1, 1, 4), window=4, cu=torch.tensor(cu))


def test_any_layout_of_tokens_evenly_apart_or_not(same):
    q, k, v, log_f = (x.detach() for x in inputs(2, 70, 3, 3, 6))
    fused = torch.cat([x.flatten(2) for x in (q, k, v)], -1).split(18, -1)
    views = [x.unflatten(-1, (3, 6)) for x in fused]
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    want = with_gradients(lambda *x: ours(*x, window=20), [x.requires_grad_() for x in (q, k, v, log_f)], q.detach())
    for some in (views, transposed):
        some = [x.detach().requires_grad_() for x in some]
        same(with_gradients(lambda *x: ours(*x, window=20), [*some, log_f], q.detach()), want, 0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_second_run_is_the_first_whatever_the_threads(dtype, same):
    tensors = inputs(2, 140, 4, 2, 17, dtype=DTYPES[dtype])
    do, before, results = torch.randn(tensors[0].shape).to(DTYPES[dtype]), torch.get_num_threads(), []
    try:
        for threads in (2, 1, 2, 7):
            torch.set_num_threads(threads)
            results.append(with_gradients(lambda *x: ours(*x, window=50), tensors, do))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        same(other, results[0], 0)


def test_calls_from_several_threads_at_once_do_not_meet(same):
    cases = [(inputs(2, T, 2, 1, K), W) for T, K, W in ((40, 17, 9), (300, 3, 64), (140, 40, 200), (70, 16, 1))]

    def run(case):
        return with_gradients(lambda *x: ours(*x, window=case[1]), case[0], case[0][0].detach())

    want = [run(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for n, got in enumerate(pool.map(run, cases * 5)):
            same(got, want[n % len(cases)], 0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_reads_nothing_that_it_has_not_written(dtype, same, poisoned):
    """Results start as NaN, and so does the work space, by a preceding call on nothing but NaN."""
    for K, W in ((17, 9), (40, 100), (4, 300)):
        tensors = inputs(1, 350, 2, 2, K, dtype=DTYPES[dtype])
        do = torch.randn(tensors[0].shape).to(DTYPES[dtype])
        want = with_gradients(lambda *x, W=W: ours(*x, window=W), tensors, do)
        poisoned.clear()
        spoilt = [torch.full_like(x, torch.nan).requires_grad_() for x in tensors]
        bad = with_gradients(lambda *x: ours(*x, window=333), spoilt, do)
        assert all(x.isnan().any() for x in bad)
        got = with_gradients(lambda *x, W=W: ours(*x, window=W), tensors, do)
        assert poisoned["empty"] >= 2 * 5  # o, the rows' sums and three gradients, in both calls
        same(got, want, 0)


@pytest.mark.parametrize("t", [20, 64, 127], ids=lambda t: f"t{t}")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_future_that_is_not_finite_never_reaches_the_past(dtype, t, same):
    """For q, k and gates. A v may reach the start of its block of rows, multiplied together, since 0 * NaN is NaN."""
    block = 32 if dtype == "bf16" and cpu.library().can_multiply_pairs() == 2 else 8  # in tiles, in vectors
    for which in range(4):
        tensors = [x.detach() for x in inputs(1, 140, 1, 1, 5, dtype=DTYPES[dtype])]
        want = ours(*tensors, window=50)
        tensors[which][:, t] = torch.nan
        o = ours(*tensors, window=50)
        before = t // block * block if which == 2 else t
        same(o[:, :before], want[:, :before], 0)
        if which < 3:
            assert o[:, t].isnan().all()


def test_gates_that_forget_everything_and_nothing(same):
    """log f of -inf, of -1e5 and of 0: only what is later than the last of the first two is seen."""
    q, k, v, log_f = (x.detach() for x in inputs(1, 200, 2, 2, 8))
    log_f[:] = 0
    log_f[:, 50, 0], log_f[:, 50, 1] = -torch.inf, -1e5
    log_f[:, 120:, 0] = -torch.inf
    tensors = [x.requires_grad_() for x in (q, k, v, log_f)]
    got = with_gradients(lambda *x: ours(*x, window=150), tensors, torch.ones_like(q))
    assert all(x.isfinite().all() for x in got)
    want = plain(*(x[:, 50:120] for x in (q, k, v)), window=150)
    same(got[0][:, 50:120], want, 1e-6)
    same(got[0][:, 120:, 0], v[:, 120:, 0], 0)  # each sees itself alone
    same(got[0][:, :50], plain(*(x[:, :50] for x in (q, k, v)), window=150), 1e-6)


def test_sums_of_gates_are_exact_at_any_distance(same):
    """Tokens that forget much lie before tokens that forget little: a running sum in float32 would lose the latter."""
    q, k, v, log_f = (x.detach() for x in inputs(1, 400, 1, 1, 8))
    log_f[:, :300], log_f[:, 300:] = -60.0, -0.01
    exact = [x.double() for x in (q, k, v, log_f)]
    same(ours(q, k, v, log_f, window=256).double(), plain(*exact, window=256), 1e-6)


def test_only_what_needs_gradients_gets_them(same):
    tensors = inputs(1, 70, 2, 2, 8)
    want = with_gradients(lambda *x: ours(*x, window=20), tensors, tensors[0].detach())
    for only in range(4):
        alone = [x.detach().requires_grad_(n == only) for n, x in enumerate(tensors)]
        o = ours(*alone, window=20)
        same(torch.autograd.grad(o, alone[only], tensors[0].detach())[0], want[1 + only], 0)
    with torch.inference_mode():
        same(ours(*tensors, window=20), want[0], 0)


def test_what_c_cannot_compute_is_left_to_pytorch():
    q = torch.randn(1, 8, 2, 4)
    assert windows.compiled(q, q, q)
    assert not windows.compiled(q.double(), q.double(), q.double())
    assert not windows.compiled(q, q, q.bfloat16())
    assert not windows.compiled(q[:, :0], q[:, :0], q[:, :0])
    assert not windows.compiled(q.to("meta"), q.to("meta"), q.to("meta"))
    seen = []
    torch.func.vmap(lambda x: seen.append(windows.compiled(x, x, x)) or x)(q[None])
    torch.compile(lambda x: seen.append(windows.compiled(x, x, x)) or x, backend="eager")(q)
    assert seen == [False, False]
