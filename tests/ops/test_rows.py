"""RMSNorm, rotation, gates, convolution, softmax loss: compiled and by PyTorch, against float64; layouts, threads."""

import pytest
import torch
import torch.nn.functional as F

from retentive.ops import cpu as cpu_module
from retentive.ops import rotary, rows
from retentive.ops.rows import ACTIVATIONS, add_convolved, add_norm, convolve, gated, rms_norm, rotate, softmax_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request, monkeypatch) -> str:
    """Both implementations, whichever this machine would choose."""
    if request.param == "compiled" and cpu_module.unavailable():
        pytest.skip(cpu_module.unavailable())
    if request.param == "torch":
        monkeypatch.setattr(rows, "compiled", lambda x, weight=None: False)
    return request.param


def plain_norm(x, weight, eps):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def plain_rotate(x, cos, sin, variant, scale):
    y = rotary.rotate(x, cos, sin, variant)
    return (y if scale is None else y * scale[..., None]).to(x.dtype)


def gradients(f, x, others, do) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, *others)]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, do.to(y.dtype))]


# ---- RMSNorm ----


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("shape", [(3, 1), (7, 5), (2, 40, 33), (300, 64), (5, 3, 2, 216)], ids=str)
@dtypes
def test_norm_is_as_close_to_the_truth_as_pytorchs(dtype, shape, affine, gold_rule):
    x, do = ((3 * torch.randn(shape)).to(DTYPES[dtype]) for _ in range(2))
    weights = [torch.randn(shape[-1]).to(DTYPES[dtype])] if affine else []

    def with_eps(f):
        return lambda x, weight=None: f(x, weight, 1e-5)

    test = gradients(with_eps(rms_norm), x, weights, do)
    plain = gradients(with_eps(plain_norm), x, weights, do)
    gold = gradients(with_eps(plain_norm), x.double(), [w.double() for w in weights], do.double())
    for what, *three in zip(("y", "dx", "dweight"), gold, test, plain, strict=False):
        assert three[1].dtype == DTYPES[dtype]
        # single numbers may be luckily rounded on one side, and some tensors here have only a few
        gold_rule(*three, 0.5 if three[0].numel() > 200 else 20, what)


@dtypes
def test_without_gradients_the_norm_is_the_same(dtype, same):
    x, weight = torch.randn(9, 70).to(DTYPES[dtype]), torch.randn(70).to(DTYPES[dtype])
    want = rms_norm(x, weight, 1e-6)
    with torch.no_grad():
        # PyTorch composes the same operations differently
        same(rms_norm(x, weight, 1e-6), want.detach(), {"fp32": 1e-6, "bf16": 8e-3, "fp16": 1e-3}[dtype])


@pytest.mark.parametrize("shape", [(7, 5), (300, 64)], ids=str)
def test_a_norm_rounded_to_another_dtype_is_the_norm_then_rounded(shape, same):
    """And so is its gradient that of a norm whose result is cast."""
    x, weight, do = 3 * torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape).bfloat16()
    test = gradients(lambda x, weight: rms_norm(x, weight, 1e-5, torch.bfloat16), x, [weight], do)
    want = gradients(lambda x, weight: rms_norm(x, weight, 1e-5).bfloat16(), x, [weight], do)
    assert test[0].dtype == torch.bfloat16 and test[1].dtype == torch.float32
    same(test, want, 1e-6)  # sums of float32 in any order
    with torch.no_grad():
        same(rms_norm(x, weight, 1e-5, torch.bfloat16), want[0], 4e-3)  # PyTorch may round one number otherwise


ROUNDED = {"fp32": 1e-6, "bf16": 8e-3, "fp16": 1e-3}
"""A rounding more or less: half a unit in the last place, twice."""


@pytest.mark.parametrize("given", [True, False], ids=["more", "alone"])
@pytest.mark.parametrize("shape", [(7, 5), (2, 150, 70)], ids=str)
@pytest.mark.parametrize(("stream", "inner"), [("fp32",) * 2, ("fp32", "bf16"), ("bf16",) * 2, ("fp16",) * 2])
def test_a_norm_beside_its_residual_stream_is_the_sum_and_its_norm(stream, inner, shape, given, same):
    x, dsum = (torch.randn(shape).to(DTYPES[stream]).requires_grad_() for _ in range(2))
    more, dy = (torch.randn(shape).to(DTYPES[inner]).requires_grad_() for _ in range(2))
    weight = torch.randn(shape[-1]).to(DTYPES[stream]).requires_grad_()

    def apart():
        total = x + more if given else x
        return total, rms_norm(total, weight, 1e-5, DTYPES[inner])

    leaves = [x, weight, more][: 3 if given else 2]
    got, want = add_norm(x, more if given else None, weight, 1e-5, DTYPES[inner]), apart()
    same(got[0].detach(), want[0].detach(), 0)
    same(got[1].detach(), want[1].detach(), 0)
    assert [y.dtype for y in got] == [y.dtype for y in want]
    for used in (slice(0, 2), slice(0, 1), slice(1, 2)):  # a result that nobody uses has no gradient
        test, plain = (
            torch.autograd.grad(y[used], leaves, (dsum, dy)[used], True, allow_unused=True) for y in (got, want)
        )
        for name, one, other in zip(("x", "weight", "more"), test, plain, strict=False):
            assert (one is None) == (other is None), name
            if one is not None:
                assert one.dtype == other.dtype
                same(one, other, ROUNDED[inner if name == "more" else stream] * (1 if name != "weight" else 10))
    with torch.no_grad():
        got = add_norm(x, more if given else None, weight, 1e-5, DTYPES[inner])
        same(got[0], want[0].detach(), 0)
        same(got[1], want[1].detach(), ROUNDED[inner])


def test_a_sum_of_a_wider_dtype_than_its_stream_is_pytorchs(same):
    x, more = torch.randn(4, 6).bfloat16(), torch.randn(4, 6)
    total, y = add_norm(x, more, None, 1e-5, torch.float32)
    same(total, x + more, 0)
    same(y, rms_norm(x + more, None, 1e-5), 0)


@torch.no_grad()
def test_a_dtype_that_the_compiler_lacks_is_left_to_pytorch(monkeypatch, same):
    """Without float16, C would write whole numbers."""
    x, weight, taps = torch.randn(1, 9, 6), torch.randn(6), torch.randn(3, 6).half()
    monkeypatch.setattr(rows, "unavailable", lambda dtype: "no float16" if dtype == torch.float16 else None)
    monkeypatch.setattr(rows, "compiled", lambda x, weight=None: x.dtype == torch.float32)
    monkeypatch.setattr(rows, "_call", lambda function, call: pytest.fail(f"{function} ran in C"))
    want = plain_norm(x, weight, 1e-5).half()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            same(rms_norm(x, weight, 1e-5, torch.float16), want, 1e-3)
            added = add_convolved(x, weight, 1e-5, torch.float16, taps)
        same(added, x + plain_convolve(want, taps, None), 1e-3)


def test_norms_of_any_layout_and_of_nothing(same):
    x = torch.randn(6, 8, 10)
    same(rms_norm(x.mT, None, 1e-6), rms_norm(x.mT.contiguous(), None, 1e-6), 1e-6)
    same(rms_norm(x[:, ::2], None, 1e-6), rms_norm(x, None, 1e-6)[:, ::2], 1e-6)
    assert rms_norm(x[:0], None, 1e-6).shape == (0, 8, 10)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_weights_that_the_compiled_code_cannot_read_are_pytorchs(grad, same):
    x, wide = torch.randn(5, 64), torch.randn(128)
    with torch.set_grad_enabled(grad):
        same(rms_norm(x, wide[::2], 1e-6), plain_norm(x, wide[::2].contiguous(), 1e-6), 1e-6)
        with pytest.raises(RuntimeError):
            rms_norm(x, wide[:32], 1e-6)


def test_a_row_that_is_not_finite_spoils_no_other(same):
    x = torch.randn(50, 64)
    want = rms_norm(x, None, 1e-6)
    x[7, 3] = torch.nan
    got = rms_norm(x, None, 1e-6)
    others = [n for n in range(50) if n != 7]
    same(got[others], want[others], 0)
    assert got[7].isnan().all()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_norm_does_not_depend_on_threads(n, same):
    """The rows do not; the gradient of the weight is a float64 sum, rounded once."""
    x, weight, do = torch.randn(700, 64), torch.randn(64), torch.randn(700, 64)
    want = gradients(lambda x, w: rms_norm(x, w, 1e-6), x, [weight], do)
    threads = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        got = gradients(lambda x, w: rms_norm(x, w, 1e-6), x, [weight], do)
    finally:
        torch.set_num_threads(threads)
    same(got, want, 1e-6)


def test_the_norms_gradient_is_its_derivative():
    x, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x.requires_grad_(), weight.requires_grad_()))


@dtypes
def test_mixed_dtypes_of_weight_and_x(dtype, same):
    """As under autocast: a float32 gain on a bf16 row."""
    x, weight = torch.randn(40, 32).to(DTYPES[dtype]), torch.randn(32)
    y, dx, dweight = gradients(lambda x, w: rms_norm(x, w, 1e-6), x, [weight], torch.ones(40, 32))
    assert (y.dtype, dx.dtype, dweight.dtype) == (DTYPES[dtype], DTYPES[dtype], torch.float32)
    gold = gradients(lambda x, w: plain_norm(x, w, 1e-6), x.double(), [weight.double()], torch.ones(40, 32))
    close = {"fp32": 1e-6, "bf16": 4e-3, "fp16": 5e-4}[dtype]  # for results rounded once
    same([y.double(), dx.double()], gold[:2], close)
    same(dweight.double(), gold[2], 1e-6 if dtype == "fp32" else close)


# ---- rotation ----

SCALES = {"none": None, "heads": (1,), "tokens": (9,), "rows": (3, 9)}


@pytest.mark.parametrize("scaled", SCALES)
@pytest.mark.parametrize("by_row", [False, True], ids=["positions", "positions-by-row"])
@pytest.mark.parametrize("variant", rotary.VARIANTS)
@dtypes
def test_rotates_as_rotary_says(dtype, variant, by_row, scaled, gold_rule):
    B, T, H, K = 3, 9, 2, 14
    position = torch.randint(10**6, (B, T) if by_row else (T,))
    cos, sin = rotary.phases(position, K, variant)
    scale = None if SCALES[scaled] is None else torch.rand(*SCALES[scaled], H)
    x, do = (torch.randn(B, T, H, K).to(DTYPES[dtype]) for _ in range(2))

    def run(f, x, do, *phases):
        factor = None if scale is None else scale.to(phases[0].dtype)
        return gradients(lambda x: f(x, *phases, variant, factor), x, [], do)

    gold = run(plain_rotate, x.double(), do.double(), cos.double(), sin.double())
    for what, *three in zip(
        ("y", "dx"), gold, run(rotate, x, do, cos, sin), run(plain_rotate, x, do, cos, sin), strict=True
    ):
        assert three[1].dtype == DTYPES[dtype] and three[1].is_contiguous()
        gold_rule(*three, 0.3, what)


@pytest.mark.parametrize("gain", [True, False], ids=["gain", "none"])
@pytest.mark.parametrize("K", [14, 32, 130])
@pytest.mark.parametrize("variant", rotary.VARIANTS)
@dtypes
def test_rotates_after_a_norm_of_each_head(dtype, variant, K, gain, gold_rule):
    """As close to the truth as the two apart, and closer in half precision, which rounds between them."""
    (cos, sin), scale = rotary.phases(torch.arange(9), K, variant), torch.rand(9, 2)
    x, do = (torch.randn(3, 9, 2, K).to(DTYPES[dtype]) for _ in range(2))
    weight = [torch.randn(K)] if gain else []

    def plain(x, weight=None):
        phases = [t.to(torch.promote_types(x.dtype, torch.float32)) for t in (cos, sin)]
        y = plain_norm(x, None if weight is None else weight.to(x.dtype), 1e-5)
        return plain_rotate(y, *phases, variant, scale.to(phases[0].dtype))

    test = gradients(lambda x, w=None: rotate(x, cos, sin, variant, scale, (w, 1e-5)), x, weight, do)
    gold = gradients(plain, x.double(), [w.double() for w in weight], do.double())
    for what, *three in zip(("y", "dx", "dgain"), gold, test, gradients(plain, x, weight, do), strict=False):
        assert three[1].dtype == (torch.float32 if what == "dgain" else DTYPES[dtype])
        gold_rule(*three, 0.5, what)


@pytest.mark.parametrize("variant", rotary.VARIANTS)
@torch.no_grad()
def test_rotating_slices_of_one_projection(variant, same):
    """q and k as views of one projection's output, rows in another order, one token of many."""
    cos, sin = rotary.phases(torch.arange(9), 8, variant)
    both = torch.randn(3, 9, 2 * 4 * 8)
    q, k = (x.unflatten(-1, (4, 8)) for x in both.chunk(2, -1))
    for x in (q, k, q.flip(0), q[:, :9:2].expand(3, 5, 4, 8), k[:, 3:4], k[1:2, 3:4], k.transpose(0, 1)[:9, :3]):
        phases = (cos[: x.shape[1]], sin[: x.shape[1]])
        same(rotate(x, *phases, variant), plain_rotate(x, *phases, variant, None), 1e-6)
        want = plain_rotate(plain_norm(x, None, 1e-5), *phases, variant, None)
        same(rotate(x, *phases, variant, norm=(None, 1e-5)), want, 1e-6)
    assert rotate(q[:0], cos, sin, variant).shape == (0, 9, 4, 8)


def test_float64_is_left_to_pytorch(same):
    x, weight = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    cos, sin = rotary.phases(torch.arange(5), 4, "half", dtype=torch.float64)
    same(rotate(x, cos, sin, "half"), rotary.rotate(x, cos, sin, "half"), 1e-15)
    same(rms_norm(x, weight, 1e-6), plain_norm(x, weight, 1e-6), 1e-14)


def test_in_a_compiled_graph_both_are_pytorchs(same):
    x, weight = torch.randn(2, 5, 3, 8), torch.randn(8)
    cos, sin = rotary.phases(torch.arange(5), 8, "interleaved")

    def f(x, weight):
        return rotate(x, cos, sin, "interleaved", torch.full((1, 3), 0.5), (weight, 1e-6))

    same(torch.compile(f, fullgraph=True, backend="eager")(x, weight), f(x, weight), 1e-6)


@dtypes
def test_no_number_is_read_that_nobody_wrote(dtype, poisoned, way):
    x, weight = torch.randn(5, 6, 3, 10).to(DTYPES[dtype]), torch.randn(10).to(DTYPES[dtype])
    cos, sin = rotary.phases(torch.arange(6), 10, "half")
    for f in (
        lambda x, w: rotate(rms_norm(x, w, 1e-6), cos, sin, "half"),
        lambda x, w: rotate(x, cos, sin, "half", norm=(w, 1e-6)),
    ):
        assert all(t.isfinite().all() for t in gradients(f, x, [weight], torch.ones(5, 6, 3, 10)))
    if way == "compiled":
        assert poisoned["empty"] and poisoned["empty_like"]


# ---- short convolutions ----


def plain_gated(g, x, activation):
    return ACTIVATIONS[activation](g) * x


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 40, 33), (50, 1025)], ids=str)
@dtypes
def test_a_gate_is_as_close_to_the_truth_as_pytorchs(dtype, shape, activation, gold_rule):
    g, x, do = ((3 * torch.randn(shape)).to(DTYPES[dtype]) for _ in range(3))
    test = gradients(lambda g, x: gated(g, x, activation), g, [x], do)
    plain = gradients(lambda g, x: plain_gated(g, x, activation), g, [x], do)
    gold = gradients(lambda g, x: plain_gated(g, x, activation), g.double(), [x.double()], do.double())
    for what, *three in zip(("y", "dg", "dx"), gold, test, plain, strict=True):
        assert three[1].dtype == DTYPES[dtype]
        gold_rule(*three, 0.5 if three[0].numel() > 200 else 20, what)


@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
def test_gates_wide_open_and_shut(activation, same):
    """No exp overflows, and a NaN stays where it is."""
    g = torch.tensor([-1e30, -100.0, -88.0, 0.0, 88.0, 1e4, torch.nan], requires_grad=True)
    x = torch.full((7,), 2.0)
    y = gated(g, x, activation)
    (dg,) = torch.autograd.grad(y.sum(), g)
    assert dg[:6].isfinite().all() and y[6].isnan() and dg[6].isnan()
    same(y[:6], plain_gated(g.double(), x, activation)[:6].float(), 1e-6)


def test_a_gate_of_another_layout_dtype_or_shape(same):
    g, x = torch.randn(6, 8), torch.randn(8, 6).mT
    same(gated(g, x, "swish"), F.silu(g) * x, 1e-6)
    same(gated(g.bfloat16(), x, "swish"), F.silu(g.bfloat16()) * x, 1e-6)
    same(gated(g[:, :1], x, "sigmoid"), g[:, :1].sigmoid() * x, 1e-6)


def test_a_gates_gradient_is_its_derivative():
    g, x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(lambda g, x: gated(g, x, "swish"), (g, x))


def plain_convolve(x, weight, since):
    """The sum, token by token."""
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            most = t if since is None else int(since[b, t])
            rows.append(sum(weight[-1 - i] * x[b, t - i] for i in range(min(most, len(weight) - 1) + 1)))
    return torch.stack(rows).view(x.shape)


SINCE = torch.tensor([[0, 1, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 0, 1]], dtype=torch.int32)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(("n", "D"), [(2, 1), (4, 33), (12, 2500)])
@dtypes
def test_a_convolution_is_as_close_to_the_truth_as_pytorchs(dtype, n, D, packed, gold_rule):
    x, weight, do = (torch.randn(s).to(DTYPES[dtype]) for s in ((2, 9, D), (n, D), (2, 9, D)))
    since = SINCE if packed else None
    test = gradients(lambda x, w: convolve(x, w, since), x, [weight], do)
    plain = gradients(lambda x, w: plain_convolve(x, w, since), x, [weight], do)
    gold = gradients(lambda x, w: plain_convolve(x, w, since), x.double(), [weight.double()], do.double())
    for what, *three in zip(("y", "dx", "dweight"), gold, test, plain, strict=True):
        assert three[1].dtype == DTYPES[dtype]
        gold_rule(*three, 0.5 if three[0].numel() > 200 else 20, what)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_convolution_does_not_depend_on_threads(threads, same):
    """Outputs not at all; the weights' gradient is a sum over tokens, in another order (float32: 6e-8 each)."""
    x, weight, do = torch.randn(3, 300, 64), torch.randn(4, 64), torch.randn(3, 300, 64)
    had = torch.get_num_threads()
    want = gradients(lambda x, w: plain_convolve(x, w, None), x.double(), [weight.double()], do.double())
    try:
        torch.set_num_threads(threads)
        got = gradients(convolve, x, [weight], do)
    finally:
        torch.set_num_threads(had)
    for a, b in zip(got, want, strict=True):
        same(a.double(), b, 3e-6)


def test_a_convolutions_gradient_is_its_derivative():
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 9, 3), (4, 3)))
    assert torch.autograd.gradcheck(lambda x, w: convolve(x, w, SINCE), (x, weight))


def test_a_convolution_of_another_dtype_than_its_weights(same):
    x, weight = torch.randn(2, 9, 70).bfloat16(), torch.randn(4, 70)
    got = convolve(x, weight)
    assert got.dtype == torch.bfloat16
    same(got.float(), plain_convolve(x.float(), weight, None), 2**-8)


@pytest.mark.parametrize("gain", [True, False], ids=["gain", "none"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(("n", "D"), [(2, 1), (4, 33), (12, 700)])
@pytest.mark.parametrize("stream", ["fp32", "bf16"])
@dtypes
def test_a_stream_after_a_convolution_is_the_sum_of_both(dtype, stream, n, D, packed, gain, gold_rule):
    x, do = (torch.randn(2, 9, D).to(DTYPES[stream]) for _ in range(2))
    others = [torch.randn(n, D).to(DTYPES[stream]), *([torch.randn(D).to(DTYPES[stream])] if gain else [])]
    since, inner = SINCE if packed else None, DTYPES[dtype]

    def fused(x, weight, gain=None):
        return add_convolved(x, gain, 1e-5, inner, weight, since)

    def plain(x, weight, gain=None):
        h = plain_norm(x, gain, 1e-5).to(torch.float64 if x.dtype == torch.float64 else inner)
        return x + plain_convolve(h, weight, since).to(h.dtype)

    test, want = gradients(fused, x, others, do), gradients(plain, x, others, do)
    gold = gradients(plain, x.double(), [t.double() for t in others], do.double())
    for what, *three in zip(("y", "dx", "dweight", "dgain"), gold, test, want, strict=False):
        assert three[1].dtype == (three[2].dtype if what == "y" else DTYPES[stream])
        gold_rule(*three, 0.5 if three[0].numel() > 200 else 20, what)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_stream_after_a_convolution_does_not_depend_on_threads(threads, same):
    """Nor on where a thread's tokens begin; the gradients of gain and weight are sums over tokens in another order."""
    x, weight, gain, do = torch.randn(3, 300, 64), torch.randn(4, 64), torch.randn(64), torch.randn(3, 300, 64)
    had, since = torch.get_num_threads(), (torch.arange(900) % 7).view(3, 300).to(torch.int32)
    for order in (None, since):
        found = []
        for count in (1, threads):
            torch.set_num_threads(count)
            try:
                found.append(
                    gradients(
                        lambda x, w, g, order=order: add_convolved(x, g, 1e-5, x.dtype, w, order), x, [weight, gain], do
                    )
                )
            finally:
                torch.set_num_threads(had)
        same(found[1][:2], found[0][:2], 0)
        same(found[1][2:], found[0][2:], 1e-6)


def test_the_gradient_of_a_stream_after_a_convolution_is_its_derivative():
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 9, 3), (4, 3)))
    gain = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, g: add_convolved(x, g, 1e-5, x.dtype, w, SINCE), (x, weight, gain))


# ---- the loss of logits ----


def plain_loss(logits, target):
    """Returns its loss per row, and its gradient, by autograd in the dtype of the logits."""
    leaf = logits.clone().requires_grad_()
    wide = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
    loss = F.cross_entropy(wide, target, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("shape", [(5, 1), (7, 3), (40, 64), (33, 257), (9, 5000)], ids=str)
@dtypes
def test_the_loss_and_its_gradient_are_as_close_to_the_truth_as_pytorchs(dtype, shape, gold_rule, same):
    logits, target = (5 * torch.randn(shape)).to(DTYPES[dtype]), torch.randint(shape[1], shape[:1])
    gold, plain = plain_loss(logits.double(), target), plain_loss(logits, target)
    loss, gradient = softmax_loss(logits.clone(), target, -100)
    assert (loss.dtype, gradient.dtype) == (torch.float32, logits.dtype)
    # differences of float32 numbers up to 25 are exact to 1e-6: that is the loss, and a gradient's exponent
    same(loss.double(), gold[0], 4e-6)
    if dtype == "fp32":
        same(gradient.double(), gold[1], 4e-6)
    else:
        gold_rule(gold[1], gradient, plain[1], 0.5 if logits.numel() > 200 else 20, "gradient")


def test_rows_that_are_ignored_have_no_loss_whatever_they_hold():
    logits, target = torch.randn(4, 9), torch.tensor([3, -7, 0, -7])
    logits[1, 2], logits[3] = torch.nan, torch.inf
    want, gradient = plain_loss(logits[::2], target[::2])
    loss, got = softmax_loss(logits.clone(), target, -7)
    assert loss.tolist()[1::2] == [0, 0] and not got[1::2].any()
    torch.testing.assert_close((loss[::2], got[::2]), (want, gradient), rtol=1e-5, atol=1e-6)


def test_a_row_of_logits_that_is_not_finite_has_no_finite_loss():
    logits = torch.randn(3, 40)
    logits[1, 7] = torch.nan
    loss, gradient = softmax_loss(logits, torch.tensor([1, 2, 3]), -100)
    assert loss.isfinite().tolist() == [True, False, True] and gradient[0].isfinite().all()
    assert gradient[1].isnan().any()


def test_logits_far_apart(same):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 1e30, 5.0], [-torch.inf, 2.0, 2.0]])
    loss, gradient = softmax_loss(logits, torch.tensor([0, 0, 1]), -100)
    same(loss, torch.tensor([0.0, 2e30, 0.6931472]), 1e-6)
    same(gradient, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [0.0, -0.5, 0.5]]), 1e-6)


@pytest.mark.parametrize("target", [9, -1, 2**40])
def test_a_target_that_is_no_column_is_an_error(target):
    with pytest.raises((IndexError, RuntimeError), match="out"):
        softmax_loss(torch.randn(4, 9), torch.tensor([1, target, 2, 3]), -100)


def test_losses_do_not_depend_on_threads_or_layout(same):
    logits, target = torch.randn(2000, 70), torch.randint(70, (2000,))
    want = softmax_loss(logits.clone(), target, -100)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        same(softmax_loss(logits.T.contiguous().T, target.repeat_interleave(2)[::2], -100), want, 1e-6)
    finally:
        torch.set_num_threads(threads)
