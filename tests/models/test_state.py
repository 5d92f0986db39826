"""State of every kind of block: after every operation on a state, each row continues as it would alone.

The oracle is the model on each row's whole text (test_decoding.py).
"""

import errno

import pytest
import torch
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

from retentive.models import ARCHITECTURES, State, load_state, retnet, transformer
from retentive.ops import Ring, using
from retentive.ops.ring import slots
from tests.configs import changed, hybrid

SMALL = dict(vocab_size=31, dim=24, layers=2, heads=2)
CONFIGS = {
    "retnet": retnet(**SMALL),
    "retnet-paper": retnet(**SMALL, **ARCHITECTURES["retnet-paper"]),
    "hybrid": hybrid(**SMALL | dict(layers=3), attention_every=2),
    "transformer": transformer(**SMALL),
    "transformer-kv-heads": transformer(**SMALL | dict(heads=4), kv_heads=1),
    "hybrid-window": hybrid(**SMALL | dict(layers=4), attention_every=2, attention_window=4),
    "hybrid-four-window": hybrid(
        **SMALL | dict(layers=4), attention_every=4, attention_window=3, attention_rotary="none"
    ),
    "transformer-window": transformer(**SMALL, attention_window=4),
    "transformer-window-sinks": transformer(**SMALL, attention_window=4, attention_sinks=2),
    "hybrid-window-sinks": hybrid(**SMALL, attention=(0,), attention_window=2, attention_sinks=3),
    "hybrid-window-gate": hybrid(**SMALL, attention=(1,), attention_window=4, attention_forget=True),
    "retnet-convolution": retnet(**SMALL, convolution=3),
    "hybrid-window-convolution": hybrid(**SMALL, attention=(1,), attention_window=4, convolution=4),
    "transformer-gate": transformer(**SMALL, forget_gate=True),
    "transformer-window-gate": transformer(**SMALL, forget_gate=True, attention_window=4, qk_norm=True),
}
WINDOWS = [name for name, config in CONFIGS.items() if "window" in name]
EXACT = 1e-12  # float64 has 53 bits, 1e-16; two layers of sums in another order cost thousands of that

kinds = pytest.mark.parametrize("kind", CONFIGS)
both = pytest.mark.parametrize("kind", ["retnet", "hybrid", "transformer"])
windows = pytest.mark.parametrize("kind", WINDOWS)


def ids_of(B: int, T: int) -> torch.Tensor:
    return torch.randint(31, (B, T))


@pytest.fixture
def goes_on(same):
    """`goes_on(model, texts, state)`: row n of the state continues as texts[n] `[T]` would, for two calls."""

    def check(model, texts, state):
        assert state.position.tolist() == [len(text) for text in texts]
        more = ids_of(len(texts), 5)
        one, state = model(more[:, :3], state)
        two, state = model(more[:, 3:], state)
        got = torch.cat((one, two), 1)
        for n, text in enumerate(texts):
            want, _ = model(torch.cat((text, more[n]))[None])
            same(got[n], want[0, len(text) :], EXACT, f"row {n}")

    return check


@kinds
@torch.no_grad()
def test_rows_selected_reordered_and_repeated(kind, make, goes_on):
    model, ids = make(CONFIGS[kind]), ids_of(3, 7)
    _, state = model(ids)
    for rows in ([2, 0, 1], [1], [0, 0, 2, 2, 2]):
        goes_on(model, [ids[n] for n in rows], state.select(torch.tensor(rows)))
    goes_on(model, list(ids), state)  # and what was selected from is as it was


@kinds
@torch.no_grad()
def test_states_at_different_positions_joined(kind, make, goes_on):
    model = make(CONFIGS[kind])
    texts = [ids_of(2, 3), ids_of(1, 9), ids_of(1, 5)]
    states = [model(ids)[1] for ids in texts]
    _, grown = model(texts[2][:, :2])  # one with free slots: reached in several calls
    for t in range(2, 5):
        _, grown = model(texts[2][:, t : t + 1], grown)
    states[2] = grown
    joined = State.cat(states)
    goes_on(model, [row for ids in texts for row in ids], joined.clone())
    # and taken apart again
    goes_on(model, [texts[1][0], texts[0][1]], joined.select(torch.tensor([2, 1])))


@kinds
@torch.no_grad()
def test_a_state_before_the_first_token_joins_others(kind, make, goes_on):
    model, ids = make(CONFIGS[kind]), ids_of(1, 4)
    state = model(ids)[1]
    joined = State.cat([model.init_state(1), state])
    goes_on(model, [ids[0, :0], ids[0]], joined)


@kinds
@torch.no_grad()
def test_a_clone_is_a_branch_of_its_own(kind, make, goes_on):
    model, ids = make(CONFIGS[kind]), ids_of(2, 9)
    _, state = model(ids[:, :8])
    _, state = model(ids[:, 8:], state)  # a cache has free slots now, and is written in place
    texts = ids_of(2, 2), ids_of(2, 3)
    branches = [model(text, state.clone())[1] for text in texts]  # both grown before either is looked at
    for text, branch in zip(texts, branches, strict=True):
        goes_on(model, list(torch.cat((ids, text), 1)), branch)
    goes_on(model, list(ids), state)


@kinds
@torch.no_grad()
def test_saved_and_loaded_it_goes_on_bit_for_bit(kind, make, tmp_path, same):
    model, ids, more = make(CONFIGS[kind], torch.float32), ids_of(3, 6), ids_of(3, 4)
    _, state = model(ids, lengths=torch.tensor([6, 2, 4]))
    state.save(tmp_path / "state.safetensors", {"model": "small"})
    loaded = load_state(tmp_path / "state.safetensors")
    assert loaded.kinds == state.kinds and [x.name for x in tmp_path.iterdir()] == ["state.safetensors"]
    same(loaded.position, state.position, 0)
    for _ in range(2):
        (want, state), (got, loaded) = model(more, state), model(more, loaded)
        same(got, want, 0)
    state.save(tmp_path / "state.safetensors")  # over the old one, from another number of slots
    assert load_state(tmp_path / "state.safetensors").position.tolist() == [14, 10, 12]


@pytest.mark.parametrize("how", ["parallel", "recurrent", "chunkwise", "one token", "with gradients"])
def test_the_state_of_every_form_can_be_saved(how, make, tmp_path, same):
    model, ids = make(CONFIGS["retnet"], torch.float32), ids_of(2, 1 if how == "one token" else 5)
    with torch.set_grad_enabled(how == "with gradients"):
        form = how if how in ("parallel", "recurrent", "chunkwise") else "auto"
        with using(form=form, backend="reference" if form != "auto" else "auto"):
            _, state = model(ids)
    state.save(tmp_path / "state.safetensors")
    same(load_state(tmp_path / "state.safetensors").tensors(), [x.detach() for x in state.settled().tensors()], 0)


@both
@torch.no_grad()
def test_a_state_before_the_first_token_can_be_saved(kind, make, tmp_path, goes_on):
    model = make(CONFIGS[kind])
    model.init_state(2).save(tmp_path / "state.safetensors")
    goes_on(model, [ids_of(1, 0)[0]] * 2, load_state(tmp_path / "state.safetensors"))


@both
def test_detach_cuts_the_graph_and_keeps_the_values(kind, make, same):
    model, ids = make(CONFIGS[kind]), ids_of(2, 4)
    _, state = model(ids)
    tensors, kept = (list(x.named().values()) for x in (state, state.detach()))
    assert all(x.requires_grad for x in tensors) and not any(x.requires_grad for x in kept)
    same(kept, tensors, 0)


@both
@torch.no_grad()
def test_settled_it_has_no_rings_and_goes_on(kind, make, goes_on):
    model, ids = make(CONFIGS[kind]), ids_of(2, 5)
    _, plain = model(ids[:, :4])
    assert plain.settled() is plain
    _, state = model(ids[:, 4:], plain)
    settled = state.settled()
    assert not any(isinstance(m.value, Ring) for m in settled.memories if m.kind == "retention")
    goes_on(model, list(ids), settled.clone())
    goes_on(model, list(ids), state.clone())  # which is as it was
    state.rollback(1)  # in place: the settled one stays where it is
    assert settled.position.tolist() == [5, 5] or settled is state


@both
@torch.no_grad()
def test_moves_to_another_device_whole(kind, make):
    _, state = make(CONFIGS[kind])(ids_of(2, 4))
    moved = state.to("meta")
    assert {x.device.type for x in moved.tensors()} == {"meta"}
    assert moved.nbytes == state.nbytes


@torch.no_grad()
def test_a_retention_state_has_the_size_of_its_formula_whatever_the_length(make):
    config = retnet(**SMALL | dict(layers=3), key_dim=12, value_dim=20)
    model = make(config, torch.bfloat16)  # of a bf16 model too it is float32
    N, H, K, V = 2, 2, 6, 10
    want = 4 * N * 3 * H * K * V + 8 * N
    assert model.init_state(N).nbytes == want
    for T in (2, 10, 300):
        assert model(ids_of(N, T))[1].nbytes == want
    R = slots(K, V)  # of a bf16 model the ring is bfloat16; its decays are float32, its two counts int64
    want += N * 3 * (H * R * (2 * (K + V) + 4) + 2 * 8)
    _, state = model(ids_of(N, 1), model.init_state(N))
    for _ in range(20):
        assert state.nbytes == want
        _, state = model(ids_of(N, 1), state)


@torch.no_grad()
def test_a_cache_grows_with_the_text_by_less_than_half_too_much(make):
    model = make(CONFIGS["transformer-kv-heads"], torch.float32)
    N, layers, kv_heads, K = 2, 2, 1, 6
    slot = 4 * 2 * N * layers * kv_heads * K
    assert model.init_state(N).nbytes == 8 * N
    _, state = model(ids_of(N, 10))
    assert state.nbytes == 10 * slot + 8 * N
    sizes = set()
    for t in range(11, 61):
        _, state = model(ids_of(N, 1), state)
        sizes.add(state.nbytes)
        assert t * slot <= state.nbytes - 8 * N <= 1.5 * t * slot
    assert len(sizes) <= 6  # from 10 to 60 slots by halves: copies stay linear in the length


def cache_of(state):
    """The first block's cache, whose slots all others have too."""
    return next(m for m in state.memories if m.kind == "attention")


def window_of(model) -> int:
    """The window of the model's attention; 0 without one."""
    return max(model.config.windows)


@windows
@torch.no_grad()
def test_with_a_window_it_stays_as_large_as_the_window(kind, make):
    """7 tokens, which growing by half would jump over."""
    config = CONFIGS[kind]
    model, N = make(changed(config, attention_window=7), torch.float32), 3
    _, full = model(ids_of(N, 20))
    assert cache_of(full).slots == window_of(model)
    for T in (window_of(model), 50):
        assert model(ids_of(N, T))[1].nbytes == full.nbytes
    state = model.init_state(N)
    for _ in range(30):
        _, state = model(ids_of(N, 1), state)
        assert cache_of(state).slots <= window_of(model)
    assert state.settled().nbytes == full.nbytes
    pool = model.init_state(N).for_decoding(model.dtype, rollback=2)
    size = pool.nbytes
    for T in (1, 2, 1, 30, 1):  # a chunk longer than the ring too
        _, pool = model(ids_of(N, T), pool)
        assert pool.nbytes == size or kind.startswith("hybrid")  # whose retention has no ring after a chunk
        assert cache_of(pool).slots == window_of(model) + 2


def test_a_state_of_other_taps_is_refused(make, refuses):
    state = make(retnet(**SMALL, convolution=4)).init_state(1)
    with refuses("the state is of 4 taps, this model has 3"):
        make(retnet(**SMALL, convolution=3))(ids_of(1, 2), state)


@windows
@torch.no_grad()
def test_rings_of_different_sizes_are_joined_and_parted(kind, make, goes_on):
    """Every token is laid where the joined ring has it: states before, at and far beyond the first turn."""
    model = make(CONFIGS[kind])
    texts = [ids_of(1, n) for n in (0, 2, 4, 5, 9, 23)]
    rings = [model.init_state(1).for_decoding(model.dtype, rollback=3 * (n % 2)) for n in range(len(texts))]
    states = [model(ids, ring)[1] if ids.shape[1] else ring for ids, ring in zip(texts, rings, strict=True)]
    joined = State.cat(states)
    assert cache_of(joined).slots == window_of(model) + 3
    used = (cache_of(joined).keys != 0).flatten(2).any(-1).sum(1)  # the others are free, and as good as new
    assert used.tolist() == [min(ids.shape[1], window_of(model) + 3 * (n % 2)) for n, ids in enumerate(texts)]
    goes_on(model, [ids[0] for ids in texts], joined.clone())
    goes_on(model, [texts[5][0], texts[1][0]], joined.select(torch.tensor([5, 1])))


@pytest.mark.parametrize("slack", [(0, 0), (3, 0), (0, 3)], ids=["same", "into-larger", "into-smaller"])
@pytest.mark.parametrize("kind", [*WINDOWS, "transformer-gate", "hybrid"])
@torch.no_grad()
def test_a_sequence_put_over_another_in_a_pool(kind, slack, make, goes_on):
    model = make(CONFIGS[kind])
    texts = [ids_of(1, n) for n in (11, 3, 7)]
    pool = model.init_state(3).for_decoding(model.dtype, rollback=slack[0]).reserve(12)
    others = [model(ids)[1].for_decoding(model.dtype, rollback=slack[1]) for ids in texts]
    for n in (2, 0, 1, 0):
        pool.put(n, others[n])
    pool.put(1, pool, 0)
    goes_on(model, [texts[0][0], texts[0][0], texts[2][0]], pool)
    both = State.cat(others)
    blank = model.init_state(1).reserve(8)
    blank.put(0, both, 2)
    goes_on(model, [texts[2][0]], blank)


@windows
@torch.no_grad()
def test_a_pool_without_room_is_refused(kind, make, refuses):
    model = make(CONFIGS[kind])
    with refuses("the cache has 0 slots, the sequence 9 tokens: reserve them before"):
        model.init_state(1).put(0, model(ids_of(1, 9))[1])


@windows
@pytest.mark.parametrize("before", [3, 21])
@torch.no_grad()
def test_as_many_tokens_are_taken_back_as_were_asked_for(kind, before, make, goes_on, refuses):
    """Exactly those: token by token and in chunks, one rollback after another, and not one more."""
    model, ids = make(CONFIGS[kind]), ids_of(2, before)
    _, state = model(ids)
    state = state.for_decoding(model.dtype, rollback=3)
    texts = list(ids)

    def read(state, T):
        more = ids_of(2, T)
        _, state = model(more, state)
        return state, [torch.cat((text, row)) for text, row in zip(texts, more, strict=True)]

    state, texts = read(state, 4)
    for n, T in ((3, 3), (1, 2), (2, 4), (0, 1), (3, 1)):
        state.rollback(n)
        texts = [text[: len(text) - n] for text in texts]
        branch = state.clone()
        state, texts_after = read(state, T)
        goes_on(model, texts, branch)
        texts = texts_after
    goes_on(model, texts, state.clone())
    state, texts = read(state, 4)
    state.rollback(2)
    for _ in range(2):  # three in all are held: only one more
        with refuses("cannot take back 2 tokens: the "):
            state.rollback(2)
        with refuses("decode with for_decoding(dtype, rollback=2)"):
            state.rollback(2)
    texts = [text[:-2] for text in texts]
    assert state.position.tolist() == [len(text) for text in texts]  # a refused one moves nothing
    state.rollback(1)
    goes_on(model, [text[:-1] for text in texts], state)


@pytest.mark.parametrize("kind", [kind for kind in WINDOWS if "convolution" not in kind])  # which holds no token more
@torch.no_grad()
def test_without_room_nothing_is_taken_back_but_a_beginning(kind, make, refuses):
    model = make(CONFIGS[kind])
    state = model.init_state(2).for_decoding(model.dtype)
    for _ in range(window_of(model)):  # all of the text is in the ring still
        _, state = model(ids_of(2, 1), state)
    state.rollback(1)
    _, state = model(ids_of(2, 1), state)
    _, state = model(ids_of(2, 1), state)
    with refuses("cannot take back 1 tokens"):
        state.rollback(1)


@windows
@torch.no_grad()
def test_what_a_rollback_lost_stays_lost_in_every_copy(kind, make, tmp_path, refuses):
    """The ring looks full again after a rollback: that its oldest slots hold other tokens goes with it everywhere."""
    model = make(CONFIGS[kind])
    _, state = model(ids_of(1, 20))
    state = state.for_decoding(model.dtype, rollback=3)
    with refuses("cannot take back 1 tokens"):  # the ring has room for more, but they are not in it
        state.rollback(1)
    for _ in range(4):
        _, state = model(ids_of(1, 1), state)
    state.rollback(3)
    pool = model.init_state(2).for_decoding(model.dtype, rollback=3)
    pool.put(1, state)
    one = torch.tensor([1])
    joined = State.cat([model.init_state(1), state])
    larger = state.for_decoding(model.dtype, rollback=9)
    for copy in (state.clone(), state.select(torch.tensor([0])), state.view(1), pool.select(one), joined.select(one)):
        with refuses("cannot take back 1 tokens"):
            copy.rollback(1)
    with refuses("cannot take back 1 tokens"):
        larger.rollback(1)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_it_is_a_tree_of_tensors_and_the_window_a_constant(kind, make, goes_on):
    model, ids = make(CONFIGS[kind]), ids_of(2, 7)
    _, state = model(ids)
    leaves, spec = pytree.tree_flatten(state)
    assert all(isinstance(x, torch.Tensor) for x in leaves)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    goes_on(model, list(ids), pytree.tree_map(torch.clone, state))
    names = {pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(state)[0]}
    assert len(names) == len(leaves)
    position = torch.func.vmap(lambda state: state.position + max(state.windows))(
        state
    )  # sequences are the first dimension
    assert position.tolist() == [7 + window_of(model)] * 2


@pytest.mark.parametrize("T", [1, 3])
@torch.no_grad()
def test_a_state_of_another_window_is_refused(T, make, tmp_path, refuses):
    for kind, other in (("transformer", "transformer-window"), ("hybrid-window", "hybrid-window")):
        config = CONFIGS[other]
        model = make(changed(config, attention_window=6) if kind == other else CONFIGS[kind])
        make(config)(ids_of(1, 5))[1].save(tmp_path / "state.safetensors")
        with refuses("the state has attention windows [") as _:
            model(ids_of(1, T), load_state(tmp_path / "state.safetensors"))


@torch.no_grad()
def test_files_say_their_sinks_and_those_of_others_are_refused(make, tmp_path, refuses):
    path, (model, other) = (
        tmp_path / "state.safetensors",
        (make(CONFIGS[f"transformer-window{x}"]) for x in ("-sinks", "")),
    )
    model(ids_of(1, 9))[1].save(path)
    state = load_state(path)
    assert (state.windows, state.sinks) == ((6, 6), (2, 2)) == (model.config.windows, model.config.sinks)
    with refuses("the state has attention sinks [2], this model has [0]: another model's state?"):
        other(ids_of(1, 1), state)
    tensors = state.named() | {"position": state.position}
    about = {"format": "retentive-state-2", "windows": "[6, 6]"}
    for sinks, words in (
        ("[2]", "sinks [2] in windows"),
        ("[2, 7]", "sinks [2, 7] in windows"),
        ("2", "with sinks '2'"),
    ):
        save_file(tensors, path, metadata=about | {"sinks": sinks})
        with refuses(words):
            load_state(path)


def test_files_say_their_window_and_old_ones_have_none(make, tmp_path, refuses):
    path = tmp_path / "state.safetensors"
    with torch.no_grad():
        _, state = make(CONFIGS["transformer-window"])(ids_of(1, 9))
    tensors = {"position": state.position}
    tensors |= {f"{part}.{i}": getattr(m, part) for i, m in enumerate(state.memories) for part in ("keys", "values")}
    assert {x.shape[1] for x in state.named().values()} == {4}
    about = {"format": "retentive-state-1", "kind": "kv"}
    for window, want in (({}, 0), ({"window": "4"}, 4)):
        save_file(tensors, path, metadata=about | window)
        assert load_state(path).windows == (want, want)
    save_file(tensors, path, metadata=about | {"window": "5"})
    with refuses("holds 4 slots, its tokens and window need 5: write it again"):
        load_state(path)
    for window in ("-4", "four", ""):
        save_file(tensors, path, metadata=about | {"window": window})
        with refuses(f"holds a state with a window of '{window}'"):
            load_state(path)


@pytest.fixture
def saved(make, tmp_path):
    """A good state file, and its bytes."""
    path = tmp_path / "state.safetensors"
    make(CONFIGS["retnet"])(ids_of(2, 4))[1].save(path)
    return path, path.read_bytes()


def test_nothing_there_is_said_in_one_line(tmp_path, refuses):
    with refuses("no file at", FileNotFoundError):
        load_state(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, -1], ids=["empty", "5-bytes", "in-header", "one-byte-short"])
def test_a_file_cut_short_is_refused(keep, saved, refuses):
    path, data = saved
    path.write_bytes(data[:keep])
    with refuses("is not a complete safetensors file"):
        load_state(path)


def test_a_file_that_holds_no_state_is_refused(tmp_path, refuses):
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors", metadata=metadata)
        with refuses("holds no saved state"):
            load_state(tmp_path / "model.safetensors")


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("other", [dict(dim=48), dict(heads=4, kv_heads=1)], ids=["K", "kv-heads"])
def test_a_cache_of_other_widths_is_refused(other, T, make, refuses):
    _, state = make(transformer(**SMALL | other))(ids_of(2, 4))
    with refuses("the cache must be of kv_heads, K = [2, 12], got"):
        make(CONFIGS["transformer"])(ids_of(2, T), state)


def test_a_kind_of_state_from_later_on_is_refused(saved, refuses):
    path, _ = saved
    save_file({"position": torch.zeros(1)}, path, metadata={"format": "retentive-state-1", "kind": "tree"})
    with refuses("holds a state of kind 'tree', expected one of retention, kv, hybrid"):
        load_state(path)


@both
@pytest.mark.parametrize("written", [0, 40], ids=["nothing-written", "half-written"])
def test_a_save_that_fails_leaves_the_old_file_and_no_other(kind, written, make, tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    _, state = make(CONFIGS[kind])(ids_of(2, 4))
    state.save(path)
    before = path.read_bytes()

    def full(tensors, filename, metadata=None):
        filename.write_bytes(b"x" * written)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        state.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@kinds
def test_what_a_row_held_before_does_not_reach_its_next_sequence(kind, make, goes_on):
    """Even NaN does not, in a row that is longer than the next sequence."""
    model = make(CONFIGS[kind])
    texts = [ids_of(1, 3)[0], ids_of(1, 9)[0]]
    pool = model(ids_of(2, 9))[1].for_decoding(torch.float64)
    poisoned = pool.map(lambda x: x.fill_(torch.nan) if x.is_floating_point() else x)
    for row, text in enumerate(texts):
        poisoned.put(row, model(text[None])[1])
    goes_on(model, texts, poisoned)


@kinds
@torch.no_grad()
def test_a_used_up_state_is_refused_and_never_read_in_silence(kind, make, refuses, tmp_path):
    """Branches from one kept state: the second is refused, as are a copy and a file of it."""
    model, ids = make(CONFIGS[kind]), ids_of(1, 6)
    state = None
    for t in range(6):  # with rings, and caches that have free slots
        _, state = model(ids[:, t : t + 1], state)
    kept, (one, other) = state.reserve(12), ids_of(2, 1)[:, None]
    model(one, kept)
    for use in (lambda: model(other, kept), kept.clone, lambda: kept.save(tmp_path / "state")):
        with refuses("the state was used: later tokens were written into it"):
            use()


@torch.no_grad()
def test_a_chunk_leaves_the_state_before_it_as_it_was(make, same):
    """Prompts are read into new states: only decoding writes in place."""
    model, ids = make(CONFIGS["retnet"]), ids_of(1, 9)
    _, state = model(ids[:, :4])
    first, second = (model(ids[:, 4:], state)[0] for _ in range(2))
    same(first, second, 0)
