"""`blocked` against `reference`: exact in float64, by the gold rule in narrower types, with all gradients."""

import pytest
import torch

from retentive.ops import blocked as module
from retentive.ops import reference, retention, retention_step

# float64 has 53 bits, 1e-16; sums of up to 200 x 8 products in another order lose a few hundred times that
EXACT = 1e-12
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# [H] as in RetNet; [H] as a parameter, which ends up in the per-token path; [B,T,H]
DECAYS = ["per-head", "learned", "per-token"]
decays = pytest.mark.parametrize("decay", DECAYS)
chunks = pytest.mark.parametrize("C", [1, 5, 64, 1000], ids=lambda C: f"C{C}")


def inputs(B, T, H, K, V, *, decay="per-head", rows=None, dtype=torch.float64) -> list[torch.Tensor]:
    """Returns q, k, v, log_decay, state, with gradients but for a per-head log_decay; the last two at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (torch.randn(B, T, H, n).to(dtype) for n in (K, K, V))
    log_decay = -torch.rand(*((B, T, H) if decay == "per-token" else (H,)), dtype=wide)
    state = torch.randn(rows or B, H, K, V, dtype=wide)
    for x in (q, k, v, state) if decay == "per-head" else (q, k, v, log_decay, state):
        x.requires_grad_()
    return [q, k, v, log_decay, state]


def blocked(q, k, v, log_decay, state, *, C=None, form="chunkwise", cu=None):
    return retention(
        q, k, v, log_decay, scale=0.3, state=state, form=form, chunk_size=C, backend="blocked", cu_seqlens=cu
    )


def recurrent(q, k, v, log_decay, state):
    return reference.recurrent(q, k, v, log_decay, scale=0.3, state=state)


def parallel(q, k, v, log_decay, state):
    """The parallel form: an equally good oracle (test_reference.py), and faster for many tokens."""
    return reference.parallel(q, k, v, log_decay, scale=0.3, state=state)


def with_gradients(function, tensors, weights) -> list[torch.Tensor]:
    """Returns o, state, and the gradients of <weights, (o, state)> for all inputs that require one."""
    out = function(*tensors)
    loss = sum((w * x.to(w.dtype)).sum() for w, x in zip(weights, out, strict=True))
    return [*out, *torch.autograd.grad(loss, [x for x in tensors if x.requires_grad])]


def weights_for(tensors) -> tuple[torch.Tensor, torch.Tensor]:
    v, state = tensors[2], tensors[4]
    return torch.randn(v.shape, dtype=state.dtype), torch.randn(state.shape, dtype=state.dtype)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 2, 3), (2, 5, 2, 4, 3), (2, 37, 3, 6, 5), (1, 65, 2, 8, 4), (2, 64, 2, 4, 4)],
    ids=lambda s: "B{}-T{}-H{}-K{}-V{}".format(*s),
)
@chunks
@decays
def test_equals_the_recurrence(shape, C, decay, same):
    tensors = inputs(*shape, decay=decay)
    weights = weights_for(tensors)
    got = with_gradients(lambda *x: blocked(*x, C=C), tensors, weights)
    same(got, with_gradients(recurrent, tensors, weights), EXACT)


@decays
def test_the_parallel_form_is_one_chunk(decay, same):
    tensors = inputs(2, 37, 3, 6, 5, decay=decay)
    weights = weights_for(tensors)
    got = with_gradients(lambda *x: blocked(*x, form="parallel", C=4), tensors, weights)
    same(got, with_gradients(recurrent, tensors, weights), EXACT)


# alone: one token, one short of a chunk, a chunk, one more, several chunks and a rest
LENGTHS = {"ragged": [1, 63, 64, 65, 1, 4, 5, 6, 1], "one-sequence": [37], "ones": [1, 1, 1]}


@pytest.mark.parametrize("lengths", LENGTHS)
@chunks
@decays
def test_packed_sequences_are_sequences_alone(lengths, C, decay, same):
    lengths = LENGTHS[lengths]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tensors = inputs(1, sum(lengths), 2, 4, 3, decay=decay, rows=len(lengths))

    def alone(q, k, v, log_decay, state):
        parts = []
        for n in range(len(lengths)):
            a, b = cu[n], cu[n + 1]
            part = log_decay[:, a:b] if log_decay.ndim == 3 else log_decay
            parts.append(parallel(q[:, a:b], k[:, a:b], v[:, a:b], part, state[n : n + 1]))
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])

    weights = weights_for(tensors)
    got = with_gradients(lambda *x: blocked(*x, C=C, cu=cu), tensors, weights)
    same(got, with_gradients(alone, tensors, weights), EXACT)


def test_packed_chunks_are_no_longer_than_the_longest_sequence():
    """Otherwise the parallel form of N short sequences would hold N scores of T x T, T their total length."""
    cu = torch.arange(0, 101, 10)
    assert module.layout(1, 100, 100, cu, cu.device).C == 10


def strided(q, k, v, log_decay, state) -> list[torch.Tensor]:
    """Returns tensors laid out as [B,H,T,K], with gaps, with a stride of 0, reversed and transposed."""
    learned = log_decay.requires_grad
    q = q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.stack((k.detach(), k.detach()), -1)[..., 1]
    v = v.detach()[:1, :, :1].expand(v.shape)
    log_decay = log_decay.detach()
    log_decay = log_decay.view(-1).flip(0) if log_decay.ndim == 1 else log_decay[:, :1].expand(log_decay.shape)
    state = state.detach().mT.contiguous().mT
    return [x.requires_grad_() for x in (q, k, v)] + [log_decay.requires_grad_(learned), state.requires_grad_()]


@pytest.mark.parametrize("T", [37, 16], ids=["T37", "T16"])
@decays
def test_memory_layout_does_not_matter(T, decay, same):
    tensors = strided(*inputs(2, T, 3, 6, 5, decay=decay))
    assert not any(x.is_contiguous() for x in (*tensors[:3], tensors[4]))
    # the gradient of a sum is expanded too, with strides of 0
    weights = torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    got = with_gradients(lambda *x: blocked(*x, C=16), tensors, weights)
    same(got, with_gradients(recurrent, tensors, weights), EXACT)


# Both legs round about equally often, and norms over thousands of elements vary little. `blocked` also rounds the
# states between chunks and one more sum, up to a fifth more error in bf16. The per-head gradient of a log decay has
# only 3 elements, where one leg may be lucky; the per-token one is a running sum, which scatters more.
TOL, DECAY_TOL = 0.3, {"learned": 3.0, "per-token": 0.5}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [37, 200], ids=["T37", "T200"])
@decays
def test_is_as_close_to_the_truth_as_plain_torch(dtype, T, decay, gold_rule, plain_retention):
    tensors = inputs(2, T, 3, 16, 24, decay=decay, dtype=DTYPES[dtype])
    weights = weights_for(tensors)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    gold = with_gradients(parallel, exact, [w.double() for w in weights])
    test = with_gradients(lambda *x: blocked(*x, C=64), tensors, weights)
    plain = with_gradients(lambda *x: plain_retention(*x[:4], scale=0.3, state=x[4]), tensors, weights)
    names = ["o", "state", "dq", "dk", "dv", *(["dlog_decay"] if decay != "per-head" else []), "dstate"]
    for name, *three in zip(names, gold, test, plain, strict=True):
        assert three[1].dtype == (torch.float32 if name.endswith(("state", "decay")) else DTYPES[dtype])
        gold_rule(*three, DECAY_TOL[decay] if name == "dlog_decay" else TOL, name)


@decays
def test_the_state_is_carried_in_float32(decay):
    """A state that counts tokens: in bf16 it would stop at 256, since 256 + 1 is 256."""
    T = 1000
    one = torch.ones(1, T, 1, 1, dtype=torch.bfloat16)
    log_decay = torch.zeros(1, T, 1) if decay == "per-token" else torch.zeros(1)
    log_decay.requires_grad_(decay == "learned")
    start = torch.full((1, 1, 1, 1), 1 + 2.0**-10)
    for how in (dict(C=1), dict(C=16), dict(C=16, cu=torch.tensor([0, T]))):
        _, state = blocked(one, one, one, log_decay, start, **how)
        assert state.item() == T + 1 + 2.0**-10


@pytest.mark.parametrize("cu", [None, [0, 1, 18, 37]], ids=["rows", "packed"])
@decays
def test_reads_no_uninitialised_memory(cu, decay, same, poisoned):
    cu = None if cu is None else torch.tensor(cu)
    tensors = inputs(1, 37, 2, 4, 3, decay=decay, rows=1 if cu is None else 3)
    weights = weights_for(tensors)
    want = with_gradients(lambda *x: retention(*x[:4], scale=0.3, state=x[4], backend="reference", cu_seqlens=cu),
                          tensors, weights)  # fmt: skip
    poisoned.clear()
    got = with_gradients(lambda *x: blocked(*x, C=5, cu=cu), tensors, weights)
    assert poisoned["empty_like"] >= 3  # states before the chunks in both passes, and those after them
    assert cu is None or poisoned["new_empty"] >= 4  # o, dq, dk, dv of packed sequences
    same(got, want, EXACT)


def test_the_poison_would_show(poisoned, monkeypatch):
    """A scan that skips a chunk gives NaN under the poison, so the test above can fail."""
    scan = module.scan
    monkeypatch.setattr(module, "scan", lambda local, total, state, order: scan(local, total, state, order[:-1]))
    o, _ = blocked(*inputs(1, 37, 2, 4, 3), C=5)
    assert o.isnan().any()


OPCHECK = {"rows": (2, 10, None), "ragged": (2, 13, None), "packed": (1, 13, [0, 1, 9, 13])}


# opcheck reads .grad of tensors that are not leaves, and torch 2.15 warns about it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("layout", ["contiguous", pytest.param("strided", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", OPCHECK)
@pytest.mark.parametrize("decay", ["per-head", "per-token"])  # run_blocked expands a learned one before the op
def test_opcheck(case, decay, layout):
    """Checks schema, autograd registration and the fake implementation, which compile and export rely on."""
    B, T, cu = OPCHECK[case]
    cu = None if cu is None else torch.tensor(cu)
    tensors = inputs(B, T, 2, 4, 3, decay=decay, rows=B if cu is None else 3)
    if layout == "strided":
        tensors = strided(*tensors)
    torch.library.opcheck(torch.ops.retentive.blocked.default, (*tensors, cu, 0.3, 5))
    bare = [x.detach() for x in tensors]
    do, dstate = torch.randn_like(bare[2]), torch.randn_like(bare[4])
    torch.library.opcheck(torch.ops.retentive.blocked_backward.default, (do, dstate, *bare, cu, 0.3, 5))


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@decays
def test_compiles_as_one_graph(compiler, packed, decay, same):
    cu = torch.tensor([0, 1, 9, 13]) if packed else None
    tensors = inputs(1 if packed else 2, 13, 2, 4, 3, decay=decay, rows=3 if packed else 2)
    weights = weights_for(tensors)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: blocked(*x, C=5, cu=cu), fullgraph=True, backend=compiler)
    got = with_gradients(compiled, tensors, weights)
    same(got, with_gradients(lambda *x: blocked(*x, C=5, cu=cu), tensors, weights), EXACT)


# one chunk, chunks of one token, one head: here the chunked layout is a view of the input instead of a copy
@pytest.mark.parametrize("shape", [(1, 8, 1, 4, 4), (2, 8, 3, 4, 4)], ids=["H1", "H3"])
@pytest.mark.parametrize("C", [1, 4, 8], ids=lambda C: f"C{C}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inputs_are_never_written_to(shape, C, dtype):
    one_row = shape[0] == 1
    for decay, cu in ((d, cu) for d in DECAYS for cu in (None, *([torch.tensor([0, 8])] if one_row else []))):
        tensors = inputs(*shape, decay=decay, dtype=dtype)
        weights = weights_for(tensors)
        before = [x.detach().clone() for x in (*tensors, *weights)]
        out = with_gradients(lambda *x, cu=cu: blocked(*x, C=C, cu=cu), tensors, weights)
        assert all(torch.equal(a, b) for a, b in zip((*tensors, *weights), before, strict=True))
        # nor is a result a view of an input: writing to one would change the other
        pointers = {x.untyped_storage().data_ptr() for x in (*tensors, *weights)}
        assert pointers.isdisjoint(x.untyped_storage().data_ptr() for x in out)


@pytest.mark.parametrize("form", ["parallel", "chunkwise"])
@decays
def test_keeps_its_inputs_for_the_backward_pass_and_nothing_else(form, decay):
    """No T x T scores and no state per chunk, so training memory is linear in T. Counted by storage: views are free."""
    tensors = inputs(2, 40, 3, 4, 5, decay=decay)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        o, _ = blocked(*tensors, form=form, C=8)
    assert {x.untyped_storage().data_ptr() for x in saved} == {x.untyped_storage().data_ptr() for x in tensors}
    assert len(saved) == len(tensors)
    o.sum().backward()


def test_a_second_derivative_says_that_there_is_none():
    tensors = inputs(1, 5, 2, 4, 3, decay="per-token")
    (dq,) = torch.autograd.grad(blocked(*tensors)[0].sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="retention has no second derivative here"):
        torch.autograd.grad(dq.sum(), tensors[1])


FORMS = {
    "recurrent": dict(form="recurrent", backend="reference"),
    "parallel": dict(form="parallel", backend="reference"),
    "chunkwise": dict(form="chunkwise", backend="reference", chunk_size=3),
    "blocked-parallel": dict(form="parallel", backend="blocked"),
    "blocked-chunkwise": dict(form="chunkwise", backend="blocked", chunk_size=4),
}


def steps(q, k, v, log_decay, *, scale, state):
    o = []
    for t in range(q.shape[1]):
        o_t, state = retention_step(q[:, t], k[:, t], v[:, t], log_decay[:, t], scale=scale, state=state)
        o.append(o_t)
    return torch.stack(o, 1), state


@pytest.mark.parametrize("second", [*FORMS, "steps"])
@pytest.mark.parametrize("first", [*FORMS, "steps"])
def test_any_form_goes_on_where_any_other_stopped(first, second, same):
    T = 11
    q, k, v, log_decay, start = (x.detach() for x in inputs(2, T, 2, 4, 3, decay="per-token"))
    want = recurrent(q, k, v, log_decay, start)

    def run(name, part, state):
        sliced = [x[:, part] for x in (q, k, v, log_decay)]
        if name == "steps":
            return steps(*sliced, scale=0.3, state=state)
        return retention(*sliced, scale=0.3, state=state, **FORMS[name])

    for split in range(1, T):
        o_1, state = run(first, slice(0, split), start)
        o_2, state = run(second, slice(split, T), state)
        same((torch.cat((o_1, o_2), 1), state), want, EXACT, f"split at {split}")


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_autocast_changes_nothing(backend, same):
    """The operator computes in the dtype of its inputs: under autocast it is bit-identical, gradients included."""
    tensors = inputs(2, 13, 2, 4, 3, decay="per-token", dtype=torch.float32)
    weights = weights_for(tensors)

    def function(*x, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return retention(*x[:4], scale=0.3, state=x[4], backend=backend, chunk_size=5)

    want = with_gradients(lambda *x: function(*x, autocast=False), tensors, weights)
    same(with_gradients(lambda *x: function(*x, autocast=True), tensors, weights), want, 0)
    if backend == "blocked":  # torch advises against a backward pass inside autocast, but it is harmless here
        with torch.autocast("cpu", torch.bfloat16):
            same(with_gradients(lambda *x: function(*x, autocast=True), tensors, weights), want, 0)


def test_autocast_changes_no_step(same):
    q, k, v, log_decay, state = (x.detach() for x in inputs(2, 1, 2, 4, 3, decay="per-token", dtype=torch.float32))
    q, k, v, log_decay = (x[:, 0] for x in (q, k, v, log_decay))
    want = retention_step(q, k, v, log_decay, state=state)
    with torch.autocast("cpu", torch.bfloat16):
        same(retention_step(q, k, v, log_decay, state=state), want, 0)


@pytest.mark.parametrize("decay", ["per-head", "per-token"])
def test_a_decay_to_nothing_is_the_same_in_every_form(decay, same):
    """With log_decay -inf, gamma 0, all before the token is forgotten. The recurrence allows it, so all forms must."""
    q, k, v, log_decay, state = (x.detach() for x in inputs(1, 7, 2, 4, 3, decay=decay))
    log_decay[..., -1:] = -torch.inf
    if decay == "per-token":
        log_decay[:, 1::2] = -0.1
    want = recurrent(q, k, v, log_decay, state)
    for name, how in FORMS.items():
        same(retention(q, k, v, log_decay, scale=0.3, state=state, **how), want, EXACT, name)
