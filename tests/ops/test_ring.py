"""A `Ring` against the recurrence: both implementations, through folds and rollbacks; and what it refuses."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from retentive.ops import Ring, backends, reference, retention, retention_step, using
from retentive.ops import cpu as cpu_module
from retentive.ops import ring as ring_module
from retentive.ops.ring import slots

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = [2, 4, 8, 64]

dtypes = pytest.mark.parametrize("dtype", DTYPES)
per = pytest.mark.parametrize("per", ["head", "row"])


@pytest.fixture(params=["torch", "c"])
def step(request):
    """`step(q, k, v, log_decay, scale, ring)`, in both implementations."""
    if request.param == "torch":
        return ring_module.decode_step
    if cpu_module.unavailable():
        pytest.skip(cpu_module.unavailable())
    return cpu_module.decode_step


def token(B=3, H=2, K=5, V=4, dtype=torch.float32, per="head") -> list[torch.Tensor]:
    """Returns q, k, v, log_decay of one step."""
    q, k, v = (torch.randn(B, H, n).to(dtype) for n in (K, K, V))
    return [q, k, v, -torch.rand(*((B, H) if per == "row" else (H,)))]


def opened(size=4, B=3, H=2, K=5, V=4, dtype=torch.float32) -> Ring:
    return Ring.open(torch.randn(B, H, K, V), dtype, size)


def tensors(ring: Ring) -> list[torch.Tensor]:
    """Returns what is defined of a ring: its free slots may hold anything."""
    return [ring.state, *ring.held(), ring.written, ring.folded]


def run(step, ring, tokens) -> list[torch.Tensor]:
    return [step(*x, 0.3, ring) for x in tokens]


def clone(ring: Ring) -> Ring:
    return ring.map(torch.clone)


# ---- the numbers ----

# A running sum of 64 log decays of 0.5 on average is exact to 2^-24 of 32, 2e-6, and so are its exponentials, most of
# them far better. In bf16 and fp16 this is negligible beside the rounding of o.
CLOSE = 1e-6
SHAPES = [(1, 1), (3, 5), (8, 16), (17, 33), (40, 72), (64, 108), (2, 150), (150, 2)]


@pytest.mark.parametrize("size", [*SIZES, None], ids=lambda size: f"R{size}")
@pytest.mark.parametrize(("K", "V"), SHAPES, ids=lambda n: str(n))
@dtypes
@per
def test_is_as_close_to_the_truth_as_a_step_that_writes_its_state(per, dtype, K, V, size, step, gold_rule, same):
    B, H = (3, 2) if K * V > 20 else (5, 4)
    ring = opened(size, B, H, K, V, DTYPES[dtype])
    R = ring.k.shape[2]
    tokens = [token(B, H, K, V, DTYPES[dtype], per) for _ in range(min(2 * R + 3, 70))]
    plain_state, exact, outs = ring.state.clone(), ring.state.double(), []
    for q, k, v, log_decay in tokens:
        o, plain_state = retention_step(q, k, v, log_decay, scale=0.3, state=plain_state)
        one = [x.double()[:, None] for x in (q, k, v, log_decay.expand(B, H))]
        gold, exact = reference.recurrent(*one, scale=0.3, state=exact)
        outs.append((gold[:, 0], step(q, k, v, log_decay, 0.3, ring), o))
    gold, got, plain = (torch.stack(x, 1) for x in zip(*outs, strict=True))
    assert got.dtype == DTYPES[dtype]
    if dtype == "fp32":
        same(got.double(), gold, CLOSE, "o")
    else:  # both round only once, and nearly always the same numbers
        gold_rule(gold, got, plain, 0.01, "o")
    same(ring.to_state().double(), exact, CLOSE, "state")
    assert ring.written.tolist() == [len(tokens)] * B
    assert all(R // 2 <= n < R for n in (ring.written - ring.folded).tolist())


@pytest.mark.parametrize("size", SIZES)
def test_in_float64_it_is_the_recurrence(size, same):
    B, H, K, V, T = 2, 3, 5, 4, 2 * size + 3
    ring = Ring.open(torch.randn(B, H, K, V).double(), torch.float64, size)
    q, k, v = (torch.randn(B, T, H, n).double() for n in (K, K, V))
    log_decay = -torch.rand(B, T, H).double()
    want = reference.recurrent(q, k, v, log_decay, scale=0.3, state=ring.state.clone())
    o = [retention_step(*(x[:, t] for x in (q, k, v, log_decay)), scale=0.3, state=ring)[0] for t in range(T)]
    same((torch.stack(o, 1), ring.to_state()), want, 1e-12)  # 53 bits, and sums of a few hundred terms


@pytest.mark.parametrize("decay", [-torch.inf, -1e4, -90.0, -1e-30, 0.0])
def test_decays_of_any_size(decay, step, same):
    """Decays 1 and 0: the ring follows the recurrence."""
    ring, state = opened(4), None
    state = ring.state.double()
    for n in range(11):
        q, k, v, log_decay = token()
        if n % 3 == 1:
            log_decay[0] = decay
        one = [x.double()[:, None] for x in (q, k, v, log_decay.expand(3, 2))]
        want, state = reference.recurrent(*one, scale=0.3, state=state)
        # the ring sums log decays of -100, exact to 2^-18 in float32
        same(step(q, k, v, log_decay, 0.3, ring).double(), want[:, 0], 2.0**-18)
        same(ring.to_state().double(), state, 2.0**-18)


def test_by_default_the_fewest_bytes_move():
    """A fold writes K V numbers per R / 2 steps, a step reads 3/4 R rows of K + V: the best power of two."""
    for K, V in ((1, 1), (16, 16), (64, 64), (64, 108), (128, 256), (256, 256), (256, 512), (3, 1000)):
        cost = {R: 2 * K * V / R + 0.75 * R * (K + V) for R in (4, 8, 16, 32, 64, 128)}
        assert cost[slots(K, V)] == min(cost.values())
        assert Ring.open(torch.zeros(1, 1, K, V), torch.float32).k.shape == (1, 1, slots(K, V), K)


@pytest.mark.parametrize("size", [1, 3, 7, 0, -2])
def test_an_odd_number_of_slots_is_refused(size, refuses):
    with refuses(f"a ring needs an even number of slots, got {size}"):
        opened(size)


# ---- rows ----


@dtypes
def test_rows_that_are_not_at_the_same_token_go_on_as_each_would_alone(dtype, step, same):
    """After a selection and rollbacks, when some rows fold and others do not."""
    B, T = 4, 19
    ring = opened(8, B, dtype=DTYPES[dtype])
    run(step, ring, [token(B, dtype=DTYPES[dtype]) for _ in range(11)])
    ring = ring.map(lambda x: x.index_select(0, torch.tensor([2, 0, 0, 3])))
    ring.rollback(torch.tensor([0, 1, 3, 5]))
    alone = [ring.map(lambda x, n=n: x[n : n + 1].clone()) for n in range(B)]
    differ = set()
    for _ in range(T):
        x = token(B, dtype=DTYPES[dtype], per="row")
        got = step(*x, 0.3, ring)
        differ |= {len(set(ring.folded.tolist()))}
        for n in range(B):
            want = step(*(y[n : n + 1] for y in x), 0.3, alone[n])
            same(got[n : n + 1].float(), want.float(), {"fp32": 1e-6, "bf16": 2.0**-8, "fp16": 2.0**-11}[dtype])
    assert max(differ) > 1
    for n in range(B):
        same(ring.map(lambda x, n=n: x[n : n + 1]).to_state(), alone[n].to_state(), 1e-6)


def test_what_is_folded_is_nothing_of_later_tokens(step, same):
    clean = opened(4)
    run(step, clean, [token() for _ in range(3)])
    ring, x = clone(clean), token()
    step(*x, 0.3, clean)
    for y in x[:3]:
        y.fill_(torch.nan)
    step(*x, 0.3, ring)  # the ring is full: its older half is folded, and this token stays
    same(ring.state, clean.state, 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_head(bad, step, same):
    clean, ring = opened(4), None
    ring = clone(clean)
    for n in range(9):
        x = token()
        want = step(*x, 0.3, clean)
        if n == 3:
            x[1][1, 1, 2] = bad
        got = step(*x, 0.3, ring)
        others = torch.ones(3, 2, dtype=torch.bool)
        others[1, 1] = False
        same(got[others], want[others], 0)
        assert n < 3 or not got[1, 1].isfinite().all()
        same(ring.state[others], clean.state[others], 0)


# ---- taking tokens back ----


@pytest.mark.parametrize("had", [1, 5, 8, 13, 21])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tokens_taken_back_might_never_have_been(dtype, size, had, step, same):
    """As many as it holds, whatever was folded because of them."""
    tokens, others = ([token(dtype=DTYPES[dtype]) for _ in range(n)] for n in (had, size + 3))
    start = opened(size, dtype=DTYPES[dtype])
    ring = clone(start)
    run(step, ring, tokens)
    held = int((ring.written - ring.folded)[0])
    assert held >= min(had, size // 2)  # half a ring can always be rolled back
    for back in range(held + 1):
        again = clone(ring)
        again.rollback(back)
        never = clone(start)
        run(step, never, tokens[: had - back])
        same(again.to_state(), never.to_state(), 1e-6)
        got, want = run(step, again, others), run(step, never, others)
        same([x.float() for x in got], [x.float() for x in want], 1e-6 if dtype == "fp32" else 2.0**-8)
        same(again.to_state(), never.to_state(), 1e-6)


def test_taken_back_by_row_or_all_alike(step, same):
    ring = opened(8)
    run(step, ring, [token() for _ in range(6)])
    for many in (2, torch.tensor(2), torch.tensor([2, 2, 2])):
        again = clone(ring)
        again.rollback(many)
        assert again.written.tolist() == [4, 4, 4]
    ring.rollback(torch.tensor([0, 6, 3]))
    assert ring.written.tolist() == [6, 0, 3]


@pytest.mark.parametrize("back", [3, -1, torch.tensor([0, 3, 0]), torch.tensor([0, 0, -1])], ids=str)
def test_more_than_it_holds_cannot_be_taken_back(back, step, refuses, same):
    ring = opened(4)
    run(step, ring, [token() for _ in range(6)])  # 4 are in the state
    before = [x.clone() for x in tensors(ring)]
    words = back.tolist() if isinstance(back, torch.Tensor) else back
    with refuses(f"the ring holds [2, 2, 2] tokens, cannot take back {words} of them"):
        ring.rollback(back)
    same(tensors(ring), before, 0)


def test_a_token_of_nan_taken_back_leaves_no_trace(step, same):
    ring = opened(8)
    run(step, ring, [token() for _ in range(6)])
    clean = clone(ring)
    step(*(x * torch.nan for x in token()[:3]), token()[3], 0.3, ring)
    ring.rollback(1)
    x = [token() for _ in range(9)]
    same(run(step, ring, x), run(step, clean, x), 0)
    same(ring.to_state(), clean.to_state(), 0)


# ---- memory ----


@pytest.mark.parametrize("size", [4, 64])
def test_free_slots_may_hold_anything(size, step, same, poisoned):
    """The ring starts as NaN here, and folded or rolled back tokens are NaN too."""
    start = torch.randn(3, 2, 5, 4)
    ring, other = Ring.open(start.clone(), torch.float32, size), Ring.open(start.clone(), torch.float32, size)
    assert poisoned["empty"] + poisoned["new_empty"] >= 6 and ring.k.isnan().all() and ring.log_decay.isnan().all()
    for x in (other.k, other.v, other.log_decay):
        x.zero_()
    for n in range(2 * size + 3):
        free = torch.arange(size) >= (ring.written - ring.folded)[:, None]
        slot = (ring.folded[:, None] + torch.arange(size)) % size
        for b in range(3):
            for x in (ring.k, ring.v, ring.log_decay):
                x[b, :, slot[b, free[b]]] = torch.nan
        same(ring.to_state(), other.to_state(), 0)
        x = token(per="row" if n % 2 else "head")
        same(step(*x, 0.3, ring), step(*x, 0.3, other), 0)
        if n % 5 == 4:
            ring.rollback(1), other.rollback(1)


def test_a_branch_goes_on_by_itself(step, same):
    ring = opened(4)
    run(step, ring, [token() for _ in range(5)])
    branch, before = clone(ring), [x.clone() for x in tensors(ring)]
    one, two = ([token() for _ in range(9)] for _ in range(2))
    run(step, branch, one)
    same(tensors(ring), before, 0)
    other = clone(ring)
    run(step, ring, two)
    run(step, other, one)
    same(tensors(other), tensors(branch), 0)


def test_looking_at_the_state_changes_nothing(step, same):
    ring = opened(4)
    for _ in range(10):
        before = [x.clone() for x in (ring.state, ring.k, ring.v, ring.log_decay, ring.written, ring.folded)]
        state = ring.to_state()
        after = (ring.state, ring.k, ring.v, ring.log_decay, ring.written, ring.folded)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(after, before, strict=True))
        step(*token(), 0.3, ring)
        assert not torch.equal(ring.to_state(), state)


def test_inputs_are_not_written_to_and_results_are_new_memory(step, same):
    ring = opened(4)
    for _ in range(6):
        x = token()
        before = [y.clone() for y in x]
        o = step(*x, 0.3, ring)
        same(x, before, 0)
        ours = {y.untyped_storage().data_ptr() for y in (*x, ring.state, ring.k, ring.v)}
        assert o.untyped_storage().data_ptr() not in ours


def test_memory_layout_does_not_matter(step, same):
    start = torch.randn(1, 2, 4, 5).expand(3, 2, 4, 5).mT
    ring, other = Ring.open(start, torch.float32, 4), Ring.open(start.clone(), torch.float32, 4)
    for _ in range(9):
        q, k, v, log_decay = token(per="row")
        strided = (
            q.transpose(0, 1).contiguous().transpose(0, 1),
            torch.stack((k, k), -1)[..., 1],
            v[:1].expand(v.shape),
            log_decay.mT.contiguous().mT,
        )
        assert not any(x.is_contiguous() for x in strided)
        got = step(*strided, 0.3, ring)
        same(got, step(*(x.contiguous() for x in strided), 0.3, other), 0)
    same(tensors(ring), tensors(other), 0)
    assert ring.state.data_ptr() != start.data_ptr()


@pytest.mark.parametrize("at", [10**6, 10**6 + 3, 2**40 + 5])
def test_after_a_million_tokens_it_is_as_at_first(at, step, same):
    ring = opened(6)  # not a power of two, so 2^32 is not a multiple of it
    late = clone(ring)
    late.written.add_(at)
    late.folded.add_(at)
    for n in range(20):
        x = token()
        same(step(*x, 0.3, late), step(*x, 0.3, ring), 0)
        if n == 9:
            late.rollback(2), ring.rollback(2)
    same(late.to_state(), ring.to_state(), 0)
    assert late.written.tolist() == [at + 18] * 3


def test_a_second_run_is_the_first_whatever_the_threads(same):
    if cpu_module.unavailable():
        pytest.skip(cpu_module.unavailable())
    start, tokens, before = opened(4, 3, 3, 17, 9), [token(3, 3, 17, 9) for _ in range(9)], torch.get_num_threads()
    results = []
    try:
        for threads in (2, 1, 13):
            torch.set_num_threads(threads)
            ring = clone(start)
            results.append(run(cpu_module.decode_step, ring, tokens) + tensors(ring))
    finally:
        torch.set_num_threads(before)
    same(results[1], results[0], 0)
    same(results[2], results[0], 0)


def test_rings_stepped_by_several_threads_at_once_do_not_meet(step, same):
    shapes = [(17, 9), (3, 40), (40, 3), (100, 100), (16, 16), (1, 1)]
    work = [(opened(4, 3, 2, *s), [token(3, 2, *s) for _ in range(30)]) for s in shapes]
    want = [run(step, clone(ring), tokens) for ring, tokens in work]
    with ThreadPoolExecutor(6) as pool:
        got = pool.map(lambda x: run(step, *x), work)
        same(list(got), want, 0)


# ---- the public function, and torch around it ----


def test_one_step_is_taken_in_place_and_the_ring_comes_back(same):
    ring = opened(4)
    other = clone(ring)
    for n in range(6):
        q, k, v, log_decay = token(per="row" if n % 2 else "head")
        o, back = retention_step(q, k, v, log_decay, scale=0.3, state=ring)
        assert back is ring
        same(o, ring_module.decode_step(q, k, v, log_decay, 0.3, other), 1e-6)
    q, k, v, log_decay = token(K=5)
    o, _ = retention_step(q, k, v, log_decay, state=ring)  # the default scale is K^-1/2
    same(o, ring_module.decode_step(q, k, v, log_decay, 5**-0.5, other), 1e-6)


def spoilt(name: str) -> list[torch.Tensor]:
    """Returns a token of B = 3, H = 2, K = 5, V = 4 that needs other checks than the one before it."""
    q, k, v, log_decay = token()
    match name:
        case "strided":
            q = torch.randn(3, 2, 10)[..., ::2]
        case "expanded":
            v = torch.randn(3, 1, 4).expand(3, 2, 4)
        case "decay of another dtype":
            log_decay = log_decay.double()
        case "decays by row":
            log_decay = -torch.rand(3, 2)
    return [q, k, v, log_decay]


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "strided", "expanded", "decay of another dtype", "decays by row"])
def test_a_token_after_the_first_is_checked_as_the_first_was(name, same):
    """The compiled path skips checks after the first token; here it must check again."""
    ring = opened(4)
    other = clone(ring)
    for n in range(7):
        x = spoilt(name) if n % 2 else token()
        o, _ = retention_step(*x, scale=0.3, state=ring)
        same(o, ring_module.decode_step(*x[:3], x[3].float(), 0.3, other), 1e-6)
    same(ring.to_state(), other.to_state(), 1e-6)
    before = [x.clone() for x in tensors(ring)]
    q, k, v, log_decay = token()
    bads = [[q[:2], k, v, log_decay], [q, k, v[..., :3], log_decay], [q, k, v, log_decay[:1]]]  # shapes
    bads += [[q.double(), k, v, log_decay], [q, k.half(), v, log_decay], [q, k, v, log_decay.half()]]
    bads += [[q.to("meta"), k, v, log_decay], [q, k, v, log_decay.to("meta")], [q, k, v, 1 - log_decay]]
    for bad in bads:
        with pytest.raises(ValueError):
            retention_step(*bad, state=ring)
        same(tensors(ring), before, 0)


@torch.no_grad()
def test_a_copy_does_not_write_where_its_original_does(same):
    ring, x = opened(4), token()
    retention_step(*x, state=ring)
    other = copy.deepcopy(ring)
    before = [x.clone() for x in tensors(ring)]
    retention_step(*x, state=other)
    same(tensors(ring), before, 0)
    assert other.written.tolist() == [2, 2, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):  # the plan would still point to the old tensor
        ring.state = other.state


BAD_DECAYS = {"positive": 1e-3, "nan": torch.nan, "inf": torch.inf}


@pytest.mark.parametrize("bad", BAD_DECAYS)
@per
def test_a_decay_above_0_is_refused_and_nothing_changed(per, bad, refuses, same):
    ring = opened(4)
    for _ in range(3):  # the next one would fold
        retention_step(*token(), state=ring)
    before = [x.clone() for x in tensors(ring)]
    q, k, v, log_decay = token(per=per)
    log_decay.view(-1)[-1] = BAD_DECAYS[bad]
    if bad == "nan" and log_decay.ndim > 1:
        pytest.skip("a token's goes on as NaN: the test below")
    with refuses("log_decay must be at most 0 everywhere"):
        retention_step(q, k, v, log_decay, state=ring)
    if cpu_module.unavailable() is None:  # the C function checks itself, since in a compiled graph nothing else does
        with refuses("log_decay must be at most 0 everywhere, got a larger one, or NaN for a head"):
            cpu_module.decode_step(q, k, v, log_decay, 0.3, ring)
    same(tensors(ring), before, 0)


def test_a_decay_of_nan_for_one_row_goes_on_in_that_row_alone(step, same):
    """Through the ring and through folds its o and state are NaN from then on, as with NaN in k or v."""
    ring = opened(4)
    healthy, tokens = clone(ring), [token(per="row") for _ in range(7)]
    tokens[2][3][1] = torch.nan
    for n, x in enumerate(tokens):
        o, want = step(*x, 0.3, ring), step(*(y.nan_to_num() for y in x), 0.3, healthy)
        others = [0, 2]
        same(o[others], want[others], 0)
        assert o[1].isnan().all() == (n >= 2), n
    assert ring.to_state()[1].isnan().all() and ring.to_state()[others].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by C, and by torch's operations
def test_a_decay_of_nan_for_one_token_goes_on_in_its_sequence_and_head(dtype):
    q, k, v = torch.randn(3, 2, 9, 2, 4, dtype=dtype)
    log_decay = -torch.rand(2, 9, 2, dtype=dtype)
    log_decay[1, 5, 0] = torch.nan
    for form in ("parallel", "recurrent", "chunkwise"):
        with using(form=form, chunk_size=4):
            o, state = retention(q, k, v, log_decay)
        assert state[1, 0].isnan().all() and o[1, 6:, 0].isnan().all(), form
        assert o[0].isfinite().all() and state[0].isfinite().all() and state[1, 1].isfinite().all(), form
        assert o[1, :, 1].isfinite().all() and o[1, :4, 0].isfinite().all(), form


@pytest.mark.parametrize("which", range(5), ids=["q", "k", "v", "log_decay", "state"])
def test_gradients_are_refused(which, refuses):
    x, start = token(), torch.randn(3, 2, 5, 4)
    [*x, start][which].requires_grad_()
    ring = Ring.open(start, torch.float32, 4)
    with refuses("a ring is updated in place and has no gradients: use torch.no_grad(), or ring.to_state()"):
        retention_step(*x, state=ring)
    assert ring.written.tolist() == [0, 0, 0]
    with torch.no_grad():
        retention_step(*x, state=ring)
    (o, _) = retention_step(*x, state=ring.to_state())
    assert o.requires_grad


@pytest.mark.parametrize("ring_dtype", ["bf16", "fp16"])
def test_another_dtype_than_it_was_opened_for_is_refused(ring_dtype, refuses):
    ring = opened(4, dtype=DTYPES[ring_dtype])
    with refuses(f"the ring was opened for {DTYPES[ring_dtype]}, got torch.float32"):
        retention_step(*token(), state=ring)
    with refuses("state must be torch.float64 [3, 2, 5, 4], got torch.float32"):
        other = opened(4)
        other = dataclasses.replace(other, k=other.k.double())
        q, k, v, log_decay = token(dtype=torch.float64)
        retention_step(q, k, v, log_decay, state=other)


@pytest.mark.parametrize("shape", [(2, 2, 5, 4), (3, 1, 5, 4), (3, 2, 4, 4), (3, 2, 5, 6)], ids=str)
def test_other_shapes_than_it_was_opened_for_are_refused(shape, refuses):
    with refuses("state must be torch.float32"):
        retention_step(*token(*shape), state=opened(4))


def test_in_inference_mode(step, same):
    ring, tokens = opened(4), [token() for _ in range(9)]
    want = run(step, clone(ring), tokens)
    with torch.inference_mode():
        ring = clone(ring)
        got = run(step, ring, tokens[:5])
        ring.rollback(1)
        got = got[:4] + run(step, ring, tokens[4:])
    same(got, want, 0)


@pytest.mark.parametrize("state_too", [False, True])
def test_a_ring_made_in_inference_mode_goes_on_outside(state_too, step, same):
    start, tokens = torch.randn(3, 2, 5, 4), [token() for _ in range(9)]
    want = run(step, Ring.open(start.clone(), torch.float32, 4), tokens)
    outside = start.clone()
    with torch.inference_mode():
        ring = Ring.open(start.clone() if state_too else outside, torch.float32, 4)
        first = run(step, ring, tokens[:5])
    ring.rollback(1)
    same(first[:4] + run(step, ring, tokens[4:]), want, 0)


def test_tensors_that_are_not_contiguous_are_refused(refuses):
    with refuses("the tensors of a ring must be contiguous, got state with strides"):
        opened(4, B=4).map(lambda x: x[::2])


def test_autocast_changes_nothing(same):
    ring, tokens = opened(4), [token() for _ in range(6)]
    exact = Ring.open(ring.state.double(), torch.float64, 4)
    wide = [[y.double() for y in x] for x in tokens]
    want = [retention_step(*x, state=r)[0] for r, xs in ((clone(ring), tokens), (clone(exact), wide)) for x in xs]
    with torch.autocast("cpu", torch.bfloat16):
        got = [retention_step(*x, state=r)[0] for r, xs in ((ring, tokens), (exact, wide)) for x in xs]
    same(got, want, 0)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@per
def test_compiles_as_one_graph(per, dtype, compiler, same):
    """Several steps with a fold, twice: the second call must see the first one's changes."""
    wide = dtype == "fp64"
    dtype = torch.float64 if wide else DTYPES[dtype]
    start = torch.randn(3, 2, 5, 4, dtype=torch.float64 if wide else torch.float32)
    ring = Ring.open(start, dtype, 4)
    other = clone(ring)

    def steps(ring, *tokens):
        return [retention_step(*x, scale=0.3, state=ring)[0] for x in tokens]

    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, backend=compiler)
    with torch.no_grad():
        for _ in range(2):
            tokens = [token(dtype=dtype, per=per) for _ in range(3)]
            if wide:
                tokens = [[*x[:3], x[3].double()] for x in tokens]
            same(compiled(ring, *tokens), steps(other, *tokens), 0)
    same(tensors(ring), tensors(other), 0)
    assert ring.written.tolist() == [6, 6, 6] and ring.folded.tolist() == [4, 4, 4]


def test_compiled_it_refuses_a_decay_above_0_too(refuses, same):
    if cpu_module.unavailable():
        pytest.skip(cpu_module.unavailable())
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: retention_step(*x[:4], state=x[4])[0], fullgraph=True, backend="eager")
    ring = opened(4)
    with torch.no_grad():
        compiled(*token(), ring)
        before = [x.clone() for x in tensors(ring)]
        q, k, v, log_decay = token()
        with refuses("log_decay must be at most 0 everywhere"):
            compiled(q, k, v, log_decay + 2, ring)
    same(tensors(ring), before, 0)


# opcheck reads .grad of tensors that are not leaves, and torch 2.15 warns about it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("already", [0, 3], ids=["empty", "about-to-fold"])
@per
def test_opcheck(per, already):
    """The schema names the tensors it writes to, and no others change; compile and export rely on it."""
    ring = opened(4)
    for x in (ring.k, ring.v, ring.log_decay):  # opcheck compares all of them
        x.zero_()
    for _ in range(already):
        retention_step(*token(), state=ring)
    parts = (ring.state, ring.k, ring.v, ring.log_decay, ring.written, ring.folded)
    torch.library.opcheck(torch.ops.retentive.decode_step.default, (*token(per=per), 0.3, *parts))


def test_the_compiled_code_is_what_a_cpu_takes(monkeypatch):
    if cpu_module.unavailable():
        pytest.skip(cpu_module.unavailable())
    taken = []
    for name, room in (("c", cpu_module), ("torch", ring_module)):
        original = room.decode_step
        monkeypatch.setattr(room, "decode_step", lambda *x, name=name, f=original: taken.append(name) or f(*x))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        q, k, v, log_decay = token(dtype=dtype)
        state = torch.zeros(3, 2, 5, 4, dtype=torch.promote_types(dtype, torch.float32))
        backends.decode_step(q, k, v, log_decay.to(state.dtype), 0.3, Ring.open(state, dtype))
    assert taken == ["c", "c", "c", "torch"]


# ---- states of 16 bits ----


@pytest.mark.parametrize(("K", "V"), [(1, 1), (17, 33), (64, 112), (9, 150)], ids=lambda n: str(n))
@dtypes
def test_a_narrow_state_is_rounded_at_folds_and_nowhere_else(dtype, K, V, step, same):
    """Until the first fold its outputs are those of the same numbers in float32; then it is rounded once a fold."""
    start = torch.randn(2, 3, K, V).bfloat16()
    narrow = Ring.open(start.clone(), DTYPES[dtype], 8)
    wide = Ring.open(start.float(), DTYPES[dtype], 8)
    assert narrow.log_decay.dtype == torch.float32
    tokens = [token(2, 3, K, V, DTYPES[dtype], "row") for _ in range(8)]
    same(run(step, narrow, tokens[:7]), run(step, wide, tokens[:7]), 2e-6 if dtype == "fp32" else 1e-2)
    same(narrow.state, start, 0)
    step(*tokens[7], 0.3, narrow)
    step(*tokens[7], 0.3, wide)
    assert narrow.folded.tolist() == [4, 4]
    # the nearest of 8 bits, or its neighbour where sums in another order lie on both sides of the middle
    same(narrow.state.float(), wide.state.bfloat16().float(), 1e-3)
    assert narrow.to_state().dtype == torch.float32


@pytest.mark.parametrize(("K", "V"), [(1, 1), (17, 33), (64, 112), (9, 150)], ids=lambda n: str(n))
@dtypes
def test_a_state_of_8_bits_is_rounded_at_folds_and_nowhere_else(dtype, K, V, step, same):
    start = torch.randn(2, 3, K, V)
    narrow = Ring.open(start, DTYPES[dtype], 8, torch.int8)
    rounded = ring_module.widened(narrow.state, torch.float32)
    same(rounded, start, 1e-2)  # 1/127 of the largest, three times as large as most, by the root of 12
    wide = Ring.open(rounded, DTYPES[dtype], 8)
    assert (narrow.nbytes < wide.nbytes) == (V > 1) and narrow.shape == wide.shape == (2, 3, K, V)
    tokens = [token(2, 3, K, V, DTYPES[dtype], "row") for _ in range(8)]
    same(run(step, narrow, tokens[:7]), run(step, wide, tokens[:7]), 2e-6 if dtype == "fp32" else 1e-2)
    same(narrow.to_state(), wide.to_state(), 1e-5)
    step(*tokens[7], 0.3, narrow)
    step(*tokens[7], 0.3, wide)
    assert narrow.folded.tolist() == [4, 4]
    got, want = ring_module.widened(narrow.state, torch.float32), wide.state
    step_of_row = want.abs().amax(-1, keepdim=True) / 127
    assert bool(((got - want).abs() <= 0.51 * step_of_row).all())  # to nearest, but for sums in another order


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.int8], ids=str)
@torch.no_grad()
def test_several_tokens_are_decoded_into_a_narrow_state(narrow, same):
    """As speculation does; the same as one by one."""
    (one, other), parts = [Ring.open(torch.zeros(2, 3, 9, 8), torch.float32, 8, narrow) for _ in range(2)], []
    q, k, v = (torch.randn(2, 5, 3, n) for n in (9, 9, 8))
    decay = -torch.rand(3)
    for t in range(5):
        parts.append(retention(*(x[:, t : t + 1] for x in (q, k, v)), decay, state=other)[0])
    same(retention(q, k, v, decay, state=one)[0], torch.cat(parts, 1), 0)


def test_a_row_of_zeros_or_without_bounds_in_8_bits(step):
    start = torch.randn(1, 1, 4, 5)
    start[0, 0, 1], start[0, 0, 2, 3] = 0, torch.inf
    ring = Ring.open(start, torch.float32, 2, torch.int8)
    for _ in range(2):
        kept = ring.to_state()[0, 0]
        assert kept[[0, 1, 3]].isfinite().all() and not kept[2].isfinite().any()
        step(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1, 5), torch.zeros(1), 0.3, ring)
        step(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1, 5), torch.zeros(1), 0.3, ring)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.int8], ids=str)
def test_a_narrow_state_is_the_same_in_c_as_in_torch(narrow, same):
    if cpu_module.unavailable():
        pytest.skip(cpu_module.unavailable())
    one, tokens = Ring.open(torch.randn(3, 2, 40, 72), torch.bfloat16, 4, narrow), None
    other, tokens = clone(one), [token(3, 2, 40, 72, torch.bfloat16) for _ in range(20)]
    got, want = run(cpu_module.decode_step, one, tokens), run(ring_module.decode_step, other, tokens)
    same(got, want, 1e-2)  # o is bfloat16
    same(one.to_state(), other.to_state(), 1e-3)


def test_states_of_other_precisions_are_put_into_one_of_8_bits(same):
    pool, given = Ring.open(torch.zeros(3, 2, 5, 4), torch.float32, 4, torch.int8), torch.randn(2, 2, 5, 4)
    pool.put(1, given, 1)
    pool.put(2, Ring.open(given.clone(), torch.float32, 4), 0)
    want = ring_module.narrowed(given, torch.int8)
    same(pool.state[1:].float(), want.flip(0).float(), 0)
    pool.put(0, pool, 2)
    same(pool.state[0].float(), want[0].float(), 0)
    wide = Ring.open(torch.zeros(1, 2, 5, 4), torch.float32, 4)
    wide.put(0, pool, 1)
    same(wide.state[0], given[1], 1e-2)


def test_states_of_other_precisions_are_put_into_a_narrow_one(same):
    pool = Ring.open(torch.zeros(3, 2, 5, 4), torch.float32, 4, torch.bfloat16)
    given = torch.randn(2, 2, 5, 4)
    pool.put(1, given, 1)
    pool.put(2, Ring.open(given.clone(), torch.float32, 4), 0)
    same(pool.state[1], given[1].bfloat16(), 0)
    same(pool.state[2], given[0].bfloat16(), 0)
    same(clone(pool).state, pool.state, 0)
