"""Forward-mode derivatives and torch.func against their definitions: differences, or reverse mode."""

import pytest
import torch
from torch.autograd import forward_ad

from retentive.ops import Ring, retention, retention_step, rotary
from retentive.ops.cross_entropy import cross_entropy
from retentive.ops.rows import rms_norm, rotate
from retentive.ops.transforms import transformed

# torch's own forward mode loads decompositions with a deprecated torch function
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")
B, H, K, V = 1, 2, 4, 6
# float64 has 53 bits, 1e-16: a dozen tokens summed in another order lose a few hundred times that. float32: 6e-8
EXACT, CLOSE = 1e-13, 1e-5


def tensors(T: int, dtype=torch.float32) -> list[torch.Tensor]:
    q, k, v = (torch.randn(B, T, H, n, dtype=dtype) for n in (K, K, V))
    return [q, k, v, -torch.rand(H, dtype=dtype), torch.randn(B, H, K, V, dtype=dtype)]


def run(q, k, v, log_decay, state, **how):
    o, state = retention(q, k, v, log_decay, state=state, **how)
    return torch.cat((o.flatten(), state.flatten()))


def by_hand(function, inputs, tangents):
    """Computes J t of a function R^n -> R^m by reverse mode only: the derivative by u of u^T J t, linear in u."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    u = torch.zeros_like(y).requires_grad_()
    gradients = torch.autograd.grad(y, inputs, u, create_graph=True)
    return torch.autograd.grad(sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True)), u)[0]


@pytest.mark.parametrize("T", [1, 13])
@pytest.mark.parametrize("way", ["jvp", "dual", "dual-no-grad"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, EXACT), (torch.float32, CLOSE)], ids=["fp64", "fp32"])
def test_forward_mode_is_right(dtype, close, way, T, same):
    inputs, tangents = tensors(T, dtype), tensors(T, dtype)
    want = by_hand(lambda *x: run(*x, backend="reference"), inputs, tangents)
    if way == "jvp":
        got = torch.func.jvp(run, tuple(inputs), tuple(tangents))[1]
    else:
        with forward_ad.dual_level(), torch.set_grad_enabled(way == "dual"):
            duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
            got = forward_ad.unpack_dual(run(*duals)).tangent
    same(got.detach(), want.detach(), close)


@pytest.mark.parametrize("backend", ["triton", "cpu", "blocked"])
def test_a_backend_that_would_lose_the_tangent_says_so(backend, refuses):
    inputs, tangents = tuple(tensors(5)), tuple(tensors(5))
    with refuses(f"backend '{backend}' cannot do this: torch.func and forward-mode derivatives"):
        torch.func.jvp(lambda *x: run(*x, backend=backend), inputs, tangents)


def test_jacobians_forward_and_reverse_agree_in_the_decays(same):
    q, k, v, log_decay, state = tensors(7, torch.float64)

    def end(log_decay):
        return run(q, k, v, log_decay, state)

    want = torch.autograd.functional.jacobian(lambda g: run(q, k, v, g, state, backend="reference"), log_decay)
    same(torch.func.jacfwd(end)(log_decay), want, EXACT)
    same(torch.func.jacrev(end)(log_decay), want, EXACT)


def test_vmap_is_a_loop(same):
    rows = [tensors(5) for _ in range(3)]
    got = torch.func.vmap(run)(*(torch.stack(x) for x in zip(*rows, strict=True)))
    same(got, torch.stack([run(*x) for x in rows]), CLOSE)


def test_a_step_goes_forward_too(same):
    inputs, tangents = ([x[:, 0] if x.ndim == 4 and x.shape[1] == 1 else x for x in tensors(1)] for _ in range(2))

    def step(q, k, v, log_decay, state):
        return torch.cat([x.flatten() for x in retention_step(q, k, v, log_decay, state=state)])

    same(torch.func.jvp(step, tuple(inputs), tuple(tangents))[1], by_hand(step, inputs, tangents).detach(), CLOSE)


def test_a_ring_has_no_derivative_and_retention_takes_its_state(refuses, same):
    q, k, v, log_decay, state = tensors(1, torch.float64)
    ring, d = Ring.open(state.clone(), state.dtype), torch.randn_like(q)
    with refuses("a ring is updated in place and has no gradients"):
        torch.func.jvp(lambda q: retention_step(q[:, 0], k[:, 0], v[:, 0], log_decay, state=ring)[0], (q,), (d,))
    used = Ring.open(state.float(), torch.float32)
    one = [x[:, 0].float() for x in (q, k, v)]
    with torch.no_grad():
        retention_step(*one, log_decay.float(), state=used)  # from now on it has a plan
        with forward_ad.dual_level(), refuses("a ring is updated in place and has no gradients"):
            dual = forward_ad.make_dual(one[0], torch.randn_like(one[0]))
            retention_step(dual, *one[1:], log_decay.float(), state=used)
        got = torch.func.jvp(lambda q: retention(q, k, v, log_decay, state=ring)[0], (q,), (d,))[1]
    same(got, retention(d, k, v, log_decay, state=state)[0], EXACT)  # o is linear in q
    assert not ring.written.any()


COS, SIN = rotary.phases(torch.arange(9), 8, "half")
WEIGHT, TARGETS = torch.linspace(0.5, 1.5, 8), torch.tensor([3, -100, 6, 0, 2, 1, 5, 4, 0])
AROUND = {
    "norm": lambda x: rms_norm(x, WEIGHT, 1e-6),
    "rotation": lambda x: rotate(x.view(1, 9, 1, 8), COS, SIN, "half"),
    "cross-entropy": lambda x: cross_entropy(x, torch.eye(8)[:7], TARGETS, chunk=4),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("name", AROUND)
def test_what_stands_around_retention_goes_forward_and_through_torch_func(name, grad, same):
    f, x, t = AROUND[name], torch.randn(9, 8), torch.randn(9, 8)
    leaf = x.double().requires_grad_()
    y = f(leaf) if name == "cross-entropy" else f(leaf).square().sum()  # of a scalar, J t is <gradient, t>
    (gradient,) = torch.autograd.grad(y, leaf)

    def scalar(x):
        return f(x) if name == "cross-entropy" else f(x).square().sum()

    with torch.set_grad_enabled(grad):
        same(torch.func.jvp(scalar, (x,), (t,))[1].double(), (gradient * t).sum(), CLOSE)
        same(torch.func.grad(scalar)(x).double(), gradient, CLOSE)


def test_the_loss_is_not_differentiated_twice_in_silence():
    x = torch.randn(9, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(cross_entropy(x, torch.eye(8)[:7], TARGETS).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@pytest.mark.parametrize("way", ["inside", "dual"])
def test_a_compiled_graph_loses_no_tangent(way, same):
    (q, *others), d = tensors(5, torch.float64), torch.randn(B, 5, H, K, dtype=torch.float64)

    def function(q):
        return run(q, *others)

    want = torch.func.jvp(function, (q,), (d,))[1]
    torch._dynamo.reset()
    if way == "inside":
        compiled = torch.compile(lambda q, d: torch.func.jvp(function, (q,), (d,))[1], fullgraph=True, backend="eager")
        same(compiled(q, d), want, EXACT)
        return
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    same(compiled(q), function(q), EXACT)  # a graph that the next call must not reuse
    with forward_ad.dual_level():
        try:
            got = compiled(forward_ad.make_dual(q, d))
        except torch._dynamo.exc.Unsupported as refused:  # torch 2.15 itself refuses
            assert "tangent" in str(refused)
        else:
            same(forward_ad.unpack_dual(got).tangent, want, EXACT)


def test_outside_of_them_it_is_seen_that_there_is_none():
    assert not transformed()
    with forward_ad.dual_level():
        assert transformed()
    assert not transformed()
    assert torch.func.vmap(lambda x: x + transformed())(torch.zeros(2)).tolist() == [1, 1]
