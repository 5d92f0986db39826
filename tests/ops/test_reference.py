"""`reference.recurrent` against the paper's recurrence in explicit loops; the other forms against `recurrent`."""

import numpy as np
import pytest
import torch

from retentive.ops import reference, retention, retention_step

SHAPES = [(1, 1, 1, 2, 3), (2, 2, 2, 4, 3), (2, 37, 3, 6, 5), (1, 65, 2, 8, 4)]
FORMS = {"parallel": reference.parallel} | {
    f"chunkwise{C}": lambda *args, C=C, **kw: reference.chunkwise(*args, chunk_size=C, **kw) for C in (1, 5, 64, 100)
}
# float64 has 53 bits, 1e-16; sums of up to 65 x 8 products in another order lose a few dozen times that
EXACT = 1e-12

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-T{}-H{}-K{}-V{}".format(*s))
decays = pytest.mark.parametrize("per_token", [False, True], ids=["per-head", "per-token"])


def inputs(shape, per_token: bool) -> list[torch.Tensor]:
    """Returns q, k, v, log_decay, state in float64, all with gradients."""
    B, T, H, K, V = shape
    q, k, v = (torch.randn(B, T, H, n, dtype=torch.float64) for n in (K, K, V))
    log_decay = -torch.rand(B, T, H, dtype=torch.float64) if per_token else -torch.rand(H, dtype=torch.float64)
    return [x.requires_grad_() for x in (q, k, v, log_decay, torch.randn(B, H, K, V, dtype=torch.float64))]


def results(function, tensors, weights) -> list[torch.Tensor]:
    """Returns o, state, and the gradients of <weights, (o, state)> for all inputs."""
    q, k, v, log_decay, state = tensors
    out = function(q, k, v, log_decay, scale=0.3, state=state)
    return [*out, *torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, out, strict=True)), tensors)]


@shapes
@decays
def test_recurrent_is_the_papers_recurrence(shape, per_token):
    B, T, H, _, V = shape
    tensors = inputs(shape, per_token)
    q, k, v, log_decay, state = (x.detach().numpy() for x in tensors)
    S, o = state.copy(), np.zeros((B, T, H, V))
    for b in range(B):
        for h in range(H):
            for t in range(T):
                gamma = np.exp(log_decay[b, t, h] if per_token else log_decay[h])
                S[b, h] = gamma * S[b, h] + np.outer(k[b, t, h], v[b, t, h])
                o[b, t, h] = 0.3 * q[b, t, h] @ S[b, h]
    got = reference.recurrent(*tensors[:4], scale=0.3, state=tensors[4])
    for have, want in zip(got, (o, S), strict=True):
        assert np.linalg.norm(have.detach().numpy() - want) <= EXACT * np.linalg.norm(want)


@shapes
@decays
@pytest.mark.parametrize("form", FORMS)
def test_forms_agree_with_their_gradients(shape, per_token, form, same):
    tensors = inputs(shape, per_token)
    B, T, H, K, V = shape
    weights = torch.randn(B, T, H, V, dtype=torch.float64), torch.randn(B, H, K, V, dtype=torch.float64)
    same(results(FORMS[form], tensors, weights), results(reference.recurrent, tensors, weights), EXACT, form)


@decays
@pytest.mark.parametrize("form", ["recurrent", "parallel", "chunkwise"])
def test_gradients_are_those_of_finite_differences(form, per_token):
    chunk = {"chunk_size": 2} if form == "chunkwise" else {}

    def function(q, k, v, log_decay, state):
        return getattr(reference, form)(q, k, v, log_decay, scale=0.3, state=state, **chunk)

    assert torch.autograd.gradcheck(function, inputs((1, 3, 1, 2, 2), per_token))


def test_strong_decay_over_many_tokens_overflows_in_no_form():
    """exp(-20 x 500) is 0 and exp(+20 x 500) would be inf: masking before exp avoids inf * 0."""
    q, k, v = torch.randn(3, 1, 500, 2, 4, dtype=torch.float64)
    for how in (dict(form="parallel"), dict(form="chunkwise", chunk_size=100)):
        for backend in ("reference", "blocked"):
            o, state = retention(q, k, v, torch.tensor([-20.0, 0.0]), backend=backend, **how)
            assert o.isfinite().all() and state.isfinite().all()


@decays
def test_a_step_is_the_recurrence_of_one_token(per_token, same):
    q, k, v, log_decay, state = (x.detach() for x in inputs((2, 9, 3, 4, 5), per_token))
    want = retention(q, k, v, log_decay, scale=0.3, state=state, form="recurrent", backend="reference")
    o = []
    for t in range(9):
        decay = log_decay[:, t] if per_token else log_decay
        o_t, state = retention_step(q[:, t], k[:, t], v[:, t], decay, scale=0.3, state=state)
        o.append(o_t)
    same((torch.stack(o, 1), state), want, EXACT)


def test_left_out_are_the_scale_of_the_paper_and_a_state_of_zeros(same):
    q, k, v, log_decay, _ = (x.detach() for x in inputs((2, 7, 3, 4, 5), False))
    want = reference.recurrent(q, k, v, log_decay, scale=4**-0.5, state=q.new_zeros(2, 3, 4, 5))
    same(retention(q, k, v, log_decay), want, EXACT)
    o, _ = retention_step(q[:, 0], k[:, 0], v[:, 0], log_decay)
    same(o, want[0][:, 0], EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_the_state_is_never_narrower_than_float32(dtype):
    q, k, v = torch.randn(3, 1, 5, 2, 4).to(dtype)
    log_decay = torch.tensor([-0.1, -0.2])
    for form, backend in (("recurrent", "reference"), ("chunkwise", "reference"), ("auto", "blocked")):
        o, state = retention(q, k, v, log_decay, form=form, backend=backend)
        assert (o.dtype, state.dtype) == (dtype, torch.float32)
    o, state = retention_step(q[:, 0], k[:, 0], v[:, 0], log_decay)
    assert (o.dtype, state.dtype) == (dtype, torch.float32)
