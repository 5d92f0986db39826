"""The Triton kernels against `reference` in float64, by the gold rule, with all gradients.

Without a GPU they run in Triton's interpreter (benchmarks/lab/interpreter.py), where float32 products are exact. Cases
are few and small, since a program takes milliseconds there.
"""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from retentive.ops import blocked, reference, retention_step
from retentive.ops import triton as room
from retentive.ops.triton import forward, tiles
from retentive.ops.triton.decode import decode_step as step

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 0.3
decays = pytest.mark.parametrize("decay", ["per-head", "per-token"])

# In 16 bits the kernels round less often than plain torch, and need hardly any allowance. In float32 only the order of
# sums differs, and a per-token gradient of the decay is a running sum, which scatters more. For sequences of one token
# that gradient is only <S, dS>, of states that the kernels round and plain torch keeps in float32.
TOL = {"16-bit": 0.05, "fp32": 1.0}
DECAY_TOL = {"16-bit": 0.1, "fp32": 2.0}
ONE_TOKEN_DECAY_TOL = 3.0


def inputs(B, T, H, K, V, *, decay="per-head", rows=None, dtype=torch.float32) -> list[torch.Tensor]:
    """Returns q, k, v, log_decay, state, with gradients except for a per-head log_decay; the last two in float32."""
    q, k, v = (torch.randn(B, T, H, n).to(dtype) for n in (K, K, V))
    log_decay = -torch.rand(*((B, T, H) if decay == "per-token" else (H,)))
    state = torch.randn(rows or B, H, K, V)
    for x in (q, k, v, state) if decay == "per-head" else (q, k, v, log_decay, state):
        x.requires_grad_()
    return [q, k, v, log_decay, state]


def run(q, k, v, log_decay, state, *, C, cu=None):
    """Runs the operator on DEVICE for tensors of any layout; returns results on the CPU."""
    *tensors, cu = (x if x is None else x.to(DEVICE) for x in (q, k, v, log_decay, state, cu))
    o, state = room.triton_retention(*tensors, cu, SCALE, C)
    return o.cpu(), state.cpu()


def alone(function, lengths=None):
    """Returns a form of retention as a function of the five tensors, one packed sequence after the other."""

    def packed(q, k, v, log_decay, state):
        if lengths is None:
            return function(q, k, v, log_decay, scale=SCALE, state=state)
        parts = []
        for n, (a, b) in enumerate(pairwise(torch.tensor([0, *lengths]).cumsum(0).tolist())):
            part = log_decay[:, a:b] if log_decay.ndim == 3 else log_decay
            parts.append(function(q[:, a:b], k[:, a:b], v[:, a:b], part, scale=SCALE, state=state[n : n + 1]))
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])

    return packed


def with_gradients(function, tensors, weights) -> list[torch.Tensor]:
    """Returns o, state, and the gradients of <weights, (o, state)> for all inputs that require one."""
    out = function(*tensors)
    loss = sum((w * x.to(w.dtype)).sum() for w, x in zip(weights, out, strict=True))
    return [*out, *torch.autograd.grad(loss, [x for x in tensors if x.requires_grad])]


def weights_for(tensors) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(tensors[2].shape), torch.randn(tensors[4].shape)


def gold_of(tensors, weights, lengths=None) -> list[torch.Tensor]:
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    return with_gradients(alone(reference.parallel, lengths), exact, [w.double() for w in weights])


@pytest.fixture
def check(gold_rule, plain_retention):
    """`check(tensors, C, lengths)` applies the gold rule to all outputs and gradients."""

    def checked(tensors, C, lengths=None):
        cu = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
        weights = weights_for(tensors)
        gold = gold_of(tensors, weights, lengths)
        test = with_gradients(lambda *x: run(*x, C=C, cu=cu), tensors, weights)
        plain = with_gradients(alone(plain_retention, lengths), tensors, weights)
        learned = ["dlog_decay"] if tensors[3].requires_grad else []
        for name, *three in zip(["o", "state", "dq", "dk", "dv", *learned, "dstate"], gold, test, plain, strict=True):
            wide = name.endswith(("state", "decay"))
            assert three[1].dtype == (torch.float32 if wide else tensors[0].dtype)
            width = "fp32" if tensors[0].dtype == torch.float32 else "16-bit"
            tol = (DECAY_TOL if name == "dlog_decay" else TOL)[width]
            if name == "dlog_decay" and max(lengths or [tensors[0].shape[1]]) == 1:
                tol = ONE_TOKEN_DECAY_TOL
            gold_rule(*three, tol, name)

    return checked


# lengths: one token, one short of a chunk, one more, several chunks and a rest; sides below, at and between tiles
SHAPES = {
    "one-token": ((2, 1, 16, 16, 16), 16),
    "T63": ((1, 63, 2, 24, 40), 64),
    "T65": ((2, 65, 1, 16, 16), 32),
    "T130": ((1, 130, 2, 24, 40), 64),
    "T130-K64-V128": ((1, 130, 1, 64, 128), 64),
    "T130-K80-V136": ((1, 130, 2, 80, 136), 64),
    "T40-K256-V512": ((1, 40, 1, 256, 512), 16),
    "T128-C128": ((1, 128, 2, 34, 130), 128),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@decays
def test_is_as_close_to_the_truth_as_plain_torch(shape, decay, dtype, check):
    shape, C = SHAPES[shape]
    if dtype == "fp32":
        C = min(C, 64)
    check(inputs(*shape, decay=decay, dtype=DTYPES[dtype]), C)


# alone: one token, around a chunk of 16, several chunks and a rest
LENGTHS = {"ragged": [1, 15, 16, 17, 1, 40, 1], "one-sequence": [37], "ones": [1, 1, 1]}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lengths", LENGTHS)
@decays
def test_packed_sequences_are_sequences_alone(lengths, decay, dtype, check):
    lengths = LENGTHS[lengths]
    check(inputs(1, sum(lengths), 2, 24, 40, decay=decay, rows=len(lengths), dtype=DTYPES[dtype]), 16, lengths)


@decays
def test_an_odd_head_is_fine_in_float32(decay, check):
    check(inputs(1, 20, 2, 17, 33, decay=decay), 16)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@decays
def test_reads_no_uninitialised_memory(packed, decay, same, poisoned):
    lengths = [1, 20, 33] if packed else None
    tensors = inputs(1, 54, 2, 24, 40, decay=decay, rows=3 if packed else 1)
    weights = weights_for(tensors)
    want = [x.float() for x in gold_of(tensors, weights, lengths)]
    poisoned.clear()
    cu = torch.tensor([0, 1, 21, 54]) if packed else None
    got = with_gradients(lambda *x: run(*x, C=16, cu=cu), tensors, weights)
    assert poisoned["empty_like"] >= 7 and poisoned["new_empty"] >= 3  # results; states before, twice, and after chunks
    same(got, want, 3e-6)


@decays
def test_nan_after_the_last_token_stays_there(decay, same):
    """The last chunk is ragged: after it lies memory of others."""
    clean = [x.detach() for x in inputs(1, 37, 2, 24, 40, decay=decay)]

    def buried(x):
        return torch.cat((x, torch.full_like(x, torch.nan)), 1)[:, : x.shape[1]]

    dirty = [*map(buried, clean[:3]), buried(clean[3]) if decay == "per-token" else clean[3], clean[4]]
    do, dstate = torch.randn_like(clean[2]), torch.randn_like(clean[4])
    results = []
    for tensors, do_part in ((clean, do), (dirty, buried(do))):
        assert all(x.is_contiguous() for x in (*tensors, do_part))  # so that they are not copied
        out = run(*tensors, C=16)
        arguments = (x.to(DEVICE) for x in (do_part, dstate, *tensors))
        results.append([*out, *(x.cpu() for x in room.triton_retention_backward(*arguments, None, SCALE, 16))])
    same(*results, 0)
    assert results[0][5].numel() == (clean[3].numel() if decay == "per-token" else 0)


@decays
def test_a_decay_to_nothing(decay, same):
    """log_decay -inf, gamma 0: everything before the token is forgotten."""
    tensors = inputs(1, 37, 2, 16, 24, decay=decay)
    with torch.no_grad():
        tensors[3][..., -1:] = -torch.inf
        if decay == "per-token":
            tensors[3][:, 1::2] = -0.1
    weights = weights_for(tensors)
    got = with_gradients(lambda *x: run(*x, C=16), tensors, weights)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    with torch.no_grad():
        exact[3].clamp_(min=blocked.FORGOTTEN)
    want = with_gradients(alone(reference.recurrent), exact, [w.double() for w in weights])
    # sums of log decays of -100 have an error of 1e-5 in float32
    same(got, [x.float() for x in want], 1e-4)


def test_the_state_is_carried_in_float32():
    """A state that counts tokens: in bf16 it would stop at 256, since 256 + 1 is 256."""
    one = torch.ones(1, 600, 1, 16, dtype=torch.bfloat16)
    _, state = run(one, one, one, torch.zeros(1), torch.full((1, 1, 16, 16), 1 + 2.0**-10), C=64)
    assert (state == 601 + 2.0**-10).all()


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


@decays
def test_memory_layout_does_not_matter(decay, same):
    tensors = strided(*inputs(2, 20, 3, 16, 24, decay=decay))
    weights = torch.ones(()), torch.ones(())  # the gradient of a sum is expanded too, with strides of 0
    got = with_gradients(lambda *x: run(*x, C=16), tensors, weights)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    want = with_gradients(alone(reference.recurrent), exact, [w.double() for w in weights])
    same(got, [x.float() for x in want], 3e-6)


OPCHECK = {"rows": (2, 20, None), "packed": (1, 20, [0, 1, 17, 20])}


# opcheck reads .grad of tensors that are not leaves, and torch 2.15 warns about it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("case", OPCHECK)
@decays
def test_opcheck(case, decay, layout):
    """Checks schema, autograd registration and the fake implementation, which compile and export rely on."""
    B, T, cu = OPCHECK[case]
    cu = None if cu is None else torch.tensor(cu).to(DEVICE)
    tensors = inputs(B, T, 2, 16, 24, decay=decay, rows=B if cu is None else 3)
    if layout == "strided":
        tensors = strided(*tensors)
    tensors = [x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in tensors]
    torch.library.opcheck(torch.ops.retentive.triton.default, (*tensors, cu, SCALE, 16))
    bare = [x.detach() for x in tensors]
    do, dstate = torch.randn_like(bare[2]), torch.randn_like(bare[4])
    torch.library.opcheck(torch.ops.retentive.triton_backward.default, (do, dstate, *bare, cu, SCALE, 16))


def test_compiles_as_one_graph(same):
    tensors = inputs(1, 20, 2, 16, 24, decay="per-token", rows=2)
    weights, cu = weights_for(tensors), torch.tensor([0, 3, 20])
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: run(*x, C=16, cu=cu), fullgraph=True, backend="aot_eager")
    got = with_gradients(compiled, tensors, weights)
    same(got, with_gradients(lambda *x: run(*x, C=16, cu=cu), tensors, weights), 0)


def test_the_same_call_has_the_same_bits(same):
    tensors = inputs(1, 40, 2, 24, 40, decay="per-token", dtype=torch.bfloat16)
    weights = weights_for(tensors)
    first, second = (with_gradients(lambda *x: run(*x, C=16), tensors, weights) for _ in range(2))
    same(first, second, 0)


def test_the_gold_rule_sees_a_lost_state(check, monkeypatch):
    """Zeroes the states before the chunks, so the check above can fail."""
    run_scan = forward.run_scan
    monkeypatch.setattr(forward, "run_scan", lambda *x, **how: [part.zero_() for part in run_scan(*x, **how)])
    with pytest.raises(AssertionError, match="o is off"):
        check(inputs(1, 20, 1, 16, 16, dtype=torch.bfloat16), 16)


def test_offsets_are_64_bit():
    """Tokens times heads times K beyond 2^31: the last sequence of a row of 8.4 million tokens, in untouched memory.

    Runs in a separate process, which a wrong address would end, and only the programs of that sequence.
    """
    script = "tests.ops.triton.far_away"
    done = subprocess.run([sys.executable, "-m", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.returncode} {done.stderr[-2000:]}"


REFUSED = {
    "float64": (dict(dtype=torch.float64), None, "float64"),
    "K": (dict(K=257), None, "K up to 256"),
    "V": (dict(V=514), None, "V up to 512"),
    "odd-bf16": (dict(K=17, dtype=torch.bfloat16), None, "even K and V"),
    "chunk-8": ({}, 8, "power of two from 16 to 32"),
    "chunk-48": ({}, 48, "power of two from 16 to 32"),
    "chunk-64": ({}, 64, "power of two from 16 to 32"),
    "programs": (dict(T=2**31, H=64), None, "more than its grids and tiles can count"),
    "heads": (dict(T=1, H=2**23), None, "more than its grids and tiles can count"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_says_what_it_cannot_do(case):
    sizes, C, words = REFUSED[case]
    sizes = dict(T=20, H=2, K=16, V=16, dtype=torch.float32) | sizes
    q, v = (torch.empty(1, sizes["T"], sizes["H"], sizes[n], dtype=sizes["dtype"], device="meta") for n in "KV")
    reason = room.refuses_shapes(q, v, C)
    assert reason and words in reason and "\n" not in reason


def test_takes_what_the_table_has():
    for dtype, C in ((torch.float32, 32), (torch.bfloat16, 128)):
        q, v = (torch.empty(2, 1000, 8, n, dtype=dtype, device="meta") for n in (256, 512))
        assert room.chunk_size(q) == C
        assert all(room.refuses_shapes(q, v, size) is None for size in (None, 16, C))
        assert "needs an NVIDIA GPU" in room.refuses(q, v)


def test_the_choice_can_be_traced(monkeypatch):
    """`retention` may be compiled as one graph, which includes the question whether a backend can run."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))

    def asked(q, v):
        return q + (room.refuses_shapes(q, v, 16, 3) is None) + room.chunk_size(q) + tiles.device_family(0)

    torch._dynamo.reset()
    q, v = torch.zeros(1, 5, 2, 16), torch.zeros(1, 5, 2, 24)
    assert (torch.compile(asked, fullgraph=True, backend="eager")(q, v) == 1 + 32 + 80).all()


def test_every_gpu_has_a_row():
    expected = {"75": None, "80": 80, "86": 86, "89": 86, "90": 90, "100": 100, "103": 100, "120": 86}
    assert {sm: tiles.family((int(sm[:-1]), int(sm[-1]))) for sm in expected} == expected
    assert set(tiles.TABLE) == {(arch, kind) for arch in tiles.FAMILIES for kind in ("half", "tf32", "ieee")}


@pytest.mark.filterwarnings("ignore:Please use the new API settings:UserWarning")  # torch 2.9, about its older switch
def test_float32_is_exact_unless_torch_says_otherwise():
    assert tiles.precision() == "ieee"
    matmul = torch.backends.cuda.matmul
    try:
        torch.set_float32_matmul_precision("high")
        assert tiles.precision() == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert tiles.precision() == "ieee"
        matmul.fp32_precision = "tf32"
        assert tiles.precision() == "tf32"
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


def fresh(B, H, K, V, R, dtype, written) -> dict[str, torch.Tensor]:
    """Returns a state and an empty ring, with NaN in every slot, and rows at the given counts."""
    counts = torch.tensor(written)
    return {
        "state": torch.randn(B, H, K, V),
        "ring_k": torch.full((B, H, R, K), torch.nan, dtype=dtype),
        "ring_v": torch.full((B, H, R, V), torch.nan, dtype=dtype),
        "ring_decay": torch.full((B, H, R), torch.nan),
        "written": counts,
        "folded": counts.clone(),
    }


STEPS = {
    "R2": (3, 2, 16, 16, 2, "fp32"),
    "R6-odd": (3, 1, 17, 33, 6, "fp32"),
    "R8": (3, 2, 80, 48, 8, "fp32"),
    "R20": (2, 1, 24, 40, 20, "fp32"),
    "bf16": (3, 2, 80, 48, 8, "bf16"),
    "fp16": (3, 2, 24, 40, 8, "fp16"),
    "wide": (1, 1, 256, 512, 4, "bf16"),
}


@pytest.mark.parametrize("case", STEPS)
@decays
def test_steps_are_the_recurrence(case, decay, same):
    """3R tokens. Rows begin at different counts, so that they fold at different times and slots wrap around."""
    B, H, K, V, R, dtype = STEPS[case]
    place = {name: x.to(DEVICE) for name, x in fresh(B, H, K, V, R, DTYPES[dtype], [5, 0, 2 * R + 1][:B]).items()}
    want_state = place["state"].cpu().double()
    # rows join one by one: they hold different numbers of tokens, and a row that has not joined keeps its count
    tol = 3e-6 if dtype == "fp32" else {"bf16": 2**-8, "fp16": 2**-11}[dtype]
    for t in range(3 * R):
        q, k, v = (torch.randn(B, H, n).to(DTYPES[dtype]) for n in (K, K, V))
        log_decay = -torch.rand(B, H) if decay == "per-token" else -torch.rand(H) * 0.1
        if decay == "per-token" and t == R + 1:
            log_decay[0] = -torch.inf
        before = place["state"].clone()
        was_folded = place["folded"].clone()
        o = step(*(x.to(DEVICE) for x in (q, k, v, log_decay)), SCALE, **place).cpu()
        decay_64 = log_decay.double().clamp(min=blocked.FORGOTTEN)
        want, want_state = retention_step(q.double(), k.double(), v.double(), decay_64, scale=SCALE, state=want_state)
        assert o.dtype == DTYPES[dtype]
        same(o.double(), want, tol, f"o of token {t}")
        folds = place["folded"] != was_folded
        assert torch.equal(place["folded"] - was_folded, folds * (R // 2))
        assert torch.equal(place["state"][~folds], before[~folds])  # unchanged where nothing is folded
        held = place["written"] - place["folded"]
        assert (held >= 0).all() and (held < R).all()
    assert place["written"].tolist() == [n + 3 * R for n in [5, 0, 2 * R + 1][:B]]
    same(unfold(place), want_state.float(), 3e-6 if dtype == "fp32" else 1e-5, "state")


def unfold(place) -> torch.Tensor:
    """Returns the recurrence's state: the held tokens are folded in one by one."""
    state = place["state"].cpu().double()
    R = place["ring_k"].shape[2]
    for b in range(len(state)):
        for t in range(int(place["folded"][b]), int(place["written"][b])):
            k, v, g = (place[name][b, :, t % R].cpu().double() for name in ("ring_k", "ring_v", "ring_decay"))
            state[b] = g.exp()[:, None, None] * state[b] + k[:, :, None] * v[:, None, :]
    return state.float()


def test_rows_fold_at_their_own_time(same):
    """Rows that hold different numbers of tokens, as after a reset, fold when their own ring is full."""
    B, H, K, V, R = 3, 2, 16, 16, 4
    place = fresh(B, H, K, V, R, torch.float32, [0, 0, 0])
    want_state = place["state"].double()
    place = {name: x.to(DEVICE) for name, x in place.items()}
    held = []
    for t in range(3 * R):
        if t in (2, 5):  # row 1 returns to an empty ring, its tokens folded by hand
            state = unfold(place)
            place["state"][1] = state[1].to(DEVICE)
            place["folded"][1] = place["written"][1]
            for name in ("ring_k", "ring_v", "ring_decay"):
                place[name][1] = torch.nan
        q, k, v = (torch.randn(B, H, n) for n in (K, K, V))
        log_decay = -torch.rand(B, H)
        o = step(*(x.to(DEVICE) for x in (q, k, v, log_decay)), SCALE, **place).cpu()
        want, want_state = retention_step(*(x.double() for x in (q, k, v, log_decay)), scale=SCALE, state=want_state)
        same(o.double(), want, 3e-6, f"o of token {t}")
        held.append((place["written"] - place["folded"]).tolist())
    assert any(len(set(row)) > 1 for row in held)
    same(unfold(place), want_state.float(), 3e-6, "state")


def test_the_step_refuses_what_it_cannot_do_in_place(refuses):
    place = fresh(1, 1, 16, 16, 4, torch.float32, [0])
    q = torch.randn(1, 1, 16)
    with refuses("contiguous"):
        step(q, q, q, torch.zeros(1), SCALE, **place | {"state": place["state"].mT})
    place = fresh(1, 1, 16, 16, 5, torch.float32, [0])
    with refuses("even number of slots, 2 to 128, got 5"):
        step(q, q, q, torch.zeros(1), SCALE, **place)
