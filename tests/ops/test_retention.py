"""`retention` with a ring, and `using`: which of several equivalent paths is chosen, and by whom."""

import contextvars
import threading

import pytest
import torch

from retentive.ops import Ring, backends, retention, using
from retentive.ops import retention_step as one_step

B, H, K, V = 2, 3, 4, 6
EXACT = 1e-12  # float64 has 53 bits, 1e-16; a dozen tokens summed in another order lose a few hundred times that


def tensors(T: int, dtype=torch.float64, per_token=False) -> list[torch.Tensor]:
    q, k, v = (torch.randn(B, T, H, n, dtype=dtype) for n in (K, K, V))
    return [q, k, v, -torch.rand(*((B, T, H) if per_token else (H,)), dtype=dtype)]


def ring_over(state: torch.Tensor, size: int = 8) -> Ring:
    return Ring.open(state.clone(), state.dtype, size)


# ---- a ring ----


@pytest.mark.parametrize("per_token", [False, True], ids=["per-head", "per-token"])
@pytest.mark.parametrize("T", [1, 3, 8])
@torch.no_grad()
def test_into_a_ring_tokens_go_one_by_one_and_it_comes_back(T, per_token, same):
    state = torch.randn(B, H, K, V, dtype=torch.float64)
    x = tensors(T, per_token=per_token)
    ring, other = ring_over(state), ring_over(state)
    o, back = retention(*x, scale=0.3, state=ring)
    assert back is ring and ring.written.tolist() == [T, T]
    steps = [one_step(*(y[:, t] if y.ndim > 1 else y for y in x), scale=0.3, state=other)[0] for t in range(T)]
    same(o, torch.stack(steps, 1), 0)
    want = retention(*x, scale=0.3, state=state, backend="reference")
    same((o, ring.to_state()), want, EXACT)


HOW = {
    "form": dict(form="chunkwise"),
    "backend": dict(backend="blocked"),
    "packed": dict(cu_seqlens=torch.tensor([0, 3])),
}


@pytest.mark.parametrize("how", [*HOW, "more", "grad", "other-dtype"])
def test_where_a_ring_cannot_take_them_its_state_is_gone_on_from(how, same):
    rows = 1 if how == "packed" else B
    state = torch.randn(rows, H, K, V)
    x = [y[:rows] if y.ndim > 1 else y for y in tensors(9 if how == "more" else 3, torch.float32)]
    ring = ring_over(state)
    if how == "other-dtype":
        x[:3] = (y.bfloat16() for y in x[:3])
    with torch.set_grad_enabled(how == "grad"):
        o, after = retention(*x, state=ring, **HOW.get(how, {}))
    assert isinstance(after, torch.Tensor) and ring.written.tolist() == [0] * rows
    want = retention(*x, state=state, **{"backend": "reference", **HOW.get(how, {})})
    same((o.float(), after), (want[0].float(), want[1]), 1e-2 if how == "other-dtype" else 1e-5)  # o is bf16 there


def test_gradients_go_through_the_state_of_a_ring(same):
    state = torch.randn(B, H, K, V, dtype=torch.float64, requires_grad=True)
    x = tensors(1)
    (got,) = torch.autograd.grad(retention(*x, state=Ring.open(state, state.dtype))[0].sum(), state)
    (want,) = torch.autograd.grad(retention(*x, state=state, backend="reference")[0].sum(), state)
    same(got, want, EXACT)


@torch.no_grad()
def test_shapes_are_checked_with_a_ring_too(refuses):
    q, k, v, log_decay = tensors(3)
    ring = ring_over(torch.zeros(B, H, K, V, dtype=torch.float64))
    with refuses("q and k [B,T,H,K]"):
        retention(q[:, 0], k[:, 0], v[:, 0], log_decay, state=ring)
    with refuses("got q (2, 3, 3, 4), k (2, 2, 3, 4)"):
        retention(q, k[:, :2], v, log_decay, state=ring)
    with refuses("log_decay must be at most 0"):
        retention(q[:, :1], k[:, :1], v[:, :1], log_decay + 2, state=ring)
    with refuses("at least one row and one token"):
        retention(q[:, :0], k[:, :0], v[:, :0], log_decay, state=ring)
    with refuses("log_decay must be [3] or [2, 3, 3], got [2, 4, 3]"):
        retention(q, k, v, log_decay.expand(B, 4, H), state=ring)
    with refuses("log_decay must be at most 0"):  # for the last token; the others have not entered the ring either
        retention(q, k, v, torch.stack([log_decay, log_decay, log_decay + 2]).expand(B, 3, H), state=ring)
    assert ring.written.tolist() == [0, 0]


@pytest.mark.parametrize("backend", ["auto", "blocked", "reference"])
def test_no_heads_and_heads_of_nothing_are_refused(backend, refuses):
    q, k, v, log_decay = tensors(3)
    for heads, keys, values in ((0, K, V), (H, 0, V), (H, K, 0)):
        with refuses("needs heads and numbers in them"):
            x = q[:, :, :heads, :keys], k[:, :, :heads, :keys], v[:, :, :heads, :values]
            retention(*x, log_decay[:heads], backend=backend)


@torch.no_grad()
def test_a_ring_over_what_there_is(same):
    k, v = torch.randn(B, 1, H, K), torch.randn(B, 1, H, V)
    fresh = Ring.over(None, k, v)
    assert fresh.state.shape == (B, H, K, V) and not fresh.state.any() and Ring.over(fresh, k, v) is fresh
    retention(k, k, v, torch.zeros(H), state=fresh)
    narrow = Ring.over(fresh, k.bfloat16(), v.bfloat16())
    assert narrow.k.dtype == torch.bfloat16
    same(narrow.state, fresh.to_state(), 0)


# ---- using ----


@pytest.fixture
def taken(monkeypatch) -> list[tuple]:
    """Records (backend, form, chunk length) of each call."""
    calls = []
    for name, backend in backends.BACKENDS.items():

        def run(call, name=name, backend=backend):
            calls.append((name, call.form, call.chunk_size))
            return backend.run(call)

        monkeypatch.setitem(backends.BACKENDS, name, backend._replace(run=run))
    return calls


def test_what_is_forced_holds_inside_and_the_calls_own_words_win(taken):
    x = tensors(5)
    with using(form="recurrent", backend="reference"):
        retention(*x)
        retention(*x, form="parallel")
        with using(chunk_size=3):  # other choices stay as outside
            retention(*x)
            retention(*x, form="chunkwise", chunk_size=2, backend="blocked")
        retention(*x)
    retention(*x)
    assert taken == [
        ("reference", "recurrent", None),
        ("reference", "parallel", None),
        ("reference", "recurrent", 3),
        ("blocked", "chunkwise", 2),
        ("reference", "recurrent", None),
        ("blocked", "auto", None),
    ]


def test_one_token_and_a_ring_obey_too(taken):
    q, k, v, log_decay = tensors(1)
    with torch.no_grad(), using(backend="blocked"):
        retention(q, k, v, log_decay)
        retention(q, k, v, log_decay, state=ring_over(torch.zeros(B, H, K, V, dtype=torch.float64)))
    assert taken == [("blocked", "auto", None)] * 2


def test_an_error_inside_ends_it(taken):
    with pytest.raises(KeyError), using(backend="reference"):
        raise KeyError
    retention(*tensors(5))
    assert taken == [("blocked", "auto", None)]


def test_other_threads_are_left_alone(taken):
    x = tensors(5)
    with using(backend="reference"):
        thread = threading.Thread(target=retention, args=x)
        thread.start()
        thread.join()
        retention(*x)
    assert [name for name, *_ in taken] == ["blocked", "reference"]


def test_a_backend_that_is_named_never_falls_back(refuses):
    with using(backend="cpu"), refuses("backend 'cpu' cannot do this: it computes in float32 at most"):
        retention(*tensors(5))


@pytest.mark.parametrize("T", [1, 5])
def test_a_compiled_graph_obeys_and_forgets(T, same):
    seen = []

    def look(graph, _):
        seen.append("blocked" if any("blocked" in str(node.target) for node in graph.graph.nodes) else "plain")
        return graph.forward

    torch._dynamo.reset()
    x = tensors(T)
    compiled = torch.compile(lambda *x: retention(*x), fullgraph=True, backend=look)
    want = retention(*x, backend="reference")
    same(compiled(*x), want, EXACT)
    with using(backend="reference"):
        same(compiled(*x), want, EXACT)
    with using(backend="blocked"):
        same(compiled(*x), want, EXACT)
    same(compiled(*x), want, EXACT)
    # float64: "auto" picks blocked, or plain steps for one token; the fourth call reuses the first one's graph
    assert seen == (["plain", "plain", "blocked"] if T == 1 else ["blocked", "plain", "blocked"])


def test_graphs_forget_in_whatever_order_threads_leave(same):
    first, way = contextvars.copy_context(), using(backend="reference")
    first.run(way.__enter__)  # as in a separate thread
    with using(backend="reference"):
        first.run(way.__exit__, None, None, None)
    graphs = []

    def look(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    torch._dynamo.reset()
    x = tensors(5)
    same(torch.compile(lambda *x: retention(*x), backend=look)(*x), retention(*x, backend="reference"), EXACT)
    assert "retentive.blocked" in graphs[0]


BAD = {
    "form": (dict(form="serial"), "unknown form 'serial', expected one of auto, parallel, recurrent, chunkwise"),
    "backend": (dict(backend="cuda"), "unknown backend 'cuda', expected auto, triton, cpu, blocked, reference"),
    "chunk": (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_forced_is_refused_at_once(case, refuses):
    how, words = BAD[case]
    with refuses(words), using(**how):
        pytest.fail("went in")
