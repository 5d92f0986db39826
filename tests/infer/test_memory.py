"""Memories against the model that wrote them: files, reading in stretches, merging against the layer's formula."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from retentive.data.tokenizer import ByteTokenizer
from retentive.infer import SamplingParams, generate, write_on
from retentive.infer.memory import (
    Memory,
    blank,
    chain,
    chain_errors,
    fingerprint,
    keep_size,
    load_memory,
    merge,
    read,
    save,
    show,
)
from retentive.models import HybridConfig, RetNetConfig, build, twin
from retentive.ops import decay, rotary

CONFIG = RetNetConfig(vocab_size=61, dim=32, layers=3, heads=2)
HYBRID = HybridConfig(vocab_size=CONFIG.vocab_size, dim=CONFIG.dim, layers=2, heads=CONFIG.heads, attention_every=2)
MODELS = {"retnet": CONFIG, "transformer": twin(CONFIG), "hybrid": HYBRID}
EXACT = 1e-12  # float64, sums of some hundred terms


@pytest.fixture(params=MODELS)
def model(request):
    return build(MODELS[request.param]).eval()


@pytest.fixture(params=["interleaved", "half"])
def retnet(request):
    """In float64, with states of all sizes in all layers."""
    out = build(replace(CONFIG, rotary=request.param)).double().eval()
    for p in out.parameters():
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return out


def ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(61, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def remember(model, tokens: list[int], memory: Memory | None = None, **how) -> Memory:
    *_, last = read(model, [tokens], memory or blank(model), **how)
    last.sources = [*(memory.sources if memory else []), {"name": "a", "tokens": len(tokens), "sha256": str(tokens)}]
    return last


def after(model, memory: Memory, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]), memory.state.clone())[0]


# reading and files


@pytest.mark.parametrize("stretch", [1, 7, 64, 1000])
def test_reading_in_stretches_is_reading(model, stretch, same):
    tokens = ids(150)
    with torch.no_grad():
        want, _ = model(torch.tensor([[*tokens, 5, 6]]))
    seen = [m.tokens for m in read(model, [tokens[:40], [], tokens[40:41], tokens[41:]], blank(model), stretch=stretch)]
    assert seen == [min(n, 150) for n in range(stretch, 150 + stretch, stretch)]
    got = after(model, remember(model, tokens, stretch=stretch), [5, 6])
    same(got, want[:, -2:], 1e-4)  # float32, summed in other orders


def test_pending_tokens_are_read_first(model, same):
    memory = remember(model, ids(20))
    memory.pending = [7, 8]
    more = remember(model, [9], memory)
    assert more.tokens == 23 and more.pending == []
    same(after(model, more, [1]), after(model, remember(model, [*ids(20), 7, 8, 9]), [1]), 1e-4)


@pytest.mark.parametrize("prompt", ["", "or two "])
def test_writing_on_from_a_memory_is_writing_on_from_its_text(prompt):
    model, tokenizer = build(replace(CONFIG, vocab_size=257)).eval(), ByteTokenizer()
    how = dict(max_tokens=9, params=SamplingParams(temperature=0))
    memory = remember(model, [256, *tokenizer.encode("one ")])
    memory.pending = tokenizer.encode("f")
    got = "".join(write_on(model, tokenizer, prompt, state=memory.state.clone(), pending=memory.pending, **how))
    assert "one f" + got == "".join(write_on(model, tokenizer, "one f" + prompt, **how))


def test_a_file_holds_all_of_it(model, tmp_path, same):
    memory = remember(model, ids(30))
    memory.pending, memory.errors = [3], [0.5]
    save(memory, tmp_path / "a")
    loaded = load_memory(tmp_path / "a", model)
    for name in ("pending", "tokens", "model", "sources", "errors"):
        assert getattr(loaded, name) == getattr(memory, name), name
    assert type(model.config)(**loaded.config) == model.config
    same(after(model, loaded, [1, 2]), after(model, memory, [1, 2]), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_state_that_was_decoded_into_is_saved_whole(model, tmp_path, same):
    memory = remember(model, ids(30))
    memory.state = memory.state.for_decoding(torch.float32).reserve(40)
    greedy = SamplingParams(temperature=0)
    made = [t.id for t in generate(model, [4], greedy, max_tokens=5, state=memory.state.clone())]
    state = memory.state
    for token in [4, *made[:-1]]:
        with torch.no_grad():
            _, state = model(torch.tensor([[token]]), state)
    save(Memory(state, made[-1:], 34, memory.model, []), tmp_path / "a")
    loaded = load_memory(tmp_path / "a", model)
    assert int(loaded.state.position[0]) == 35
    more = [t.id for t in generate(model, loaded.pending, greedy, max_tokens=4, state=loaded.state)]
    whole = [t.id for t in generate(model, [*ids(30), 4], greedy, max_tokens=9)]
    assert made + more == whole


def test_a_file_is_as_large_after_much_as_after_little(tmp_path):
    model, sizes = build(CONFIG).eval(), set()
    memory = remember(model, ids(9))
    for tokens in (9, 12_345_678_901):
        memory.tokens = tokens
        save(memory, tmp_path / "a")
        sizes.add((tmp_path / "a").stat().st_size)
    assert len(sizes) == 1


def test_show_needs_no_model(model, tmp_path):
    memory = remember(model, ids(30))
    save(memory, tmp_path / "a")
    about = show(tmp_path / "a")
    assert about["tokens"] == about["position"] == 30 and about["sources"] == memory.sources
    assert about["kind"] == {"RetNet": "retention", "Transformer": "kv", "Hybrid": "hybrid"}[type(model).__name__]
    assert about["model"] == fingerprint(model) and about["config"]["dim"] == 32
    assert about["file_bytes"] == (tmp_path / "a").stat().st_size


def test_a_fingerprint_names_config_and_weights(model):
    name = fingerprint(model)
    other = build(model.config).eval()
    assert len(name) == 32 and fingerprint(other) != name
    other.load_state_dict(model.state_dict())
    assert fingerprint(other) == name
    assert fingerprint(other.double()) != name
    renamed = build(replace(model.config, norm_eps=1e-5))
    renamed.load_state_dict(model.state_dict())
    assert fingerprint(renamed) != name
    with torch.no_grad():
        model.blocks[1].ffn_norm.weight[3] += 1e-6
    assert fingerprint(model) != name


def rewrite(path, tensors=None, **metadata) -> None:
    """The file with other tensors or metadata."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    save_file(load_file(path) | (tensors or {}), path, metadata={**old, **metadata})


def forged(path, **about) -> None:
    """A file in which all is consistent, made by somebody who knows how."""
    memory = load_memory(path)
    for name, value in about.items():
        setattr(memory, name, value)
    save(memory, path)


def flip(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def short_state(model):
    state = remember(model, [1, 2]).state
    part = state.retention if state.kind == "hybrid" else state
    name = "layers" if part.kind == "retention" else "keys"
    part = replace(part, **{name: [x[..., :2].contiguous() for x in getattr(part, name)]})
    return replace(state, retention=part) if state.kind == "hybrid" else part


SPOILT = {
    "not-safetensors": (lambda p, m: p.write_bytes(b"hello"), "is not a complete safetensors file"),
    "empty": (lambda p, m: p.write_bytes(b""), "is not a complete safetensors file"),
    "truncated": (lambda p, m: p.write_bytes(p.read_bytes()[:-100]), "is not a complete safetensors file"),
    "weights": (lambda p, m: save_file({"x": torch.ones(1)}, p), "holds no saved state"),
    "a-bare-state": (lambda p, m: m.init_state(1).save(p), "holds a state but not what was read"),
    "a-flipped-bit": (lambda p, m: flip(p), "was changed after it was written"),
    "other-tokens": (lambda p, m: rewrite(p, {"position": torch.tensor([31])}), "was changed after it was written"),
    "other-sources": (lambda p, m: rewrite(p, memory="{}"), "was changed after it was written"),
    "no-digest": (lambda p, m: rewrite(p, digest=""), "was changed after it was written"),
    "another-model": (lambda p, m: forged(p, model="0" * 32), "is the memory of another model"),
    "another-shape": (lambda p, m: forged(p, state=short_state(m)), "does not fit the model"),
    "two-sequences": (lambda p, m: forged(p, state=m.init_state(2)), "does not fit the model"),
    "unknown-ids": (lambda p, m: forged(p, pending=[61]), "does not fit the model"),
    "words-for-ids": (lambda p, m: forged(p, pending=["a"]), "does not say what was read"),
    "no-list-of-ids": (lambda p, m: forged(p, pending=None), "does not say what was read"),
    "nameless-sources": (lambda p, m: forged(p, sources=[{"tokens": 3}]), "does not say what was read"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_no_memory_of_this_model_is_refused(case, model, tmp_path, refuses):
    spoil, words = SPOILT[case]
    path = tmp_path / "a"
    save(remember(model, ids(30)), path)
    spoil(path, model)
    for expected in (None, fingerprint(model)):
        with refuses(words):
            load_memory(path, model, expected)


def test_a_state_of_the_other_kind_is_refused(tmp_path, refuses):
    retnet, transformer = (build(MODELS[name]).eval() for name in ("retnet", "transformer"))
    memory = remember(transformer, [1, 2])
    memory.model = fingerprint(retnet)
    save(memory, tmp_path / "a")
    with refuses("does not fit the model"):
        load_memory(tmp_path / "a", retnet)


def test_metadata_of_another_version_is_refused(tmp_path, refuses):
    model = build(CONFIG).eval()
    save(remember(model, [1]), tmp_path / "a")
    memory = load_memory(tmp_path / "a")
    from retentive.infer.memory import _digest

    about = json.dumps({"tokens": 1})
    memory.state.save(tmp_path / "a", {"memory": about, "digest": _digest(memory.state, about)})
    with refuses("does not say what was read"):
        load_memory(tmp_path / "a")


def test_a_missing_file_and_one_without_tensors(tmp_path, refuses):
    with refuses("no state file at", FileNotFoundError):
        load_memory(tmp_path / "none")
    save_file(
        {"layers.1": torch.ones(1)}, tmp_path / "a", metadata={"format": "retentive-state-1", "kind": "retention"}
    )
    with refuses("holds a state without 'layers.0'"):
        load_memory(tmp_path / "a")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    model = build(CONFIG).eval()
    save(remember(model, [1, 2]), tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def full(tensors, path, **how):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("retentive.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(remember(model, [3]), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# merging

LENGTHS = (5, 40, 23)


def by_hand(model, tokens: list[int], first: int) -> torch.Tensor:
    """The first layer's state `[H,K,V]` after `tokens` at positions first, first + 1, …: sum of gamma^age k v^T."""
    c, layer = model.config, model.blocks[0].retention
    x = model.blocks[0].retention_norm(model.embed(torch.tensor(tokens)))
    k = layer.k_proj(x).view(len(tokens), c.heads, -1)
    v = layer.v_proj(x).view(len(tokens), c.heads, -1)
    log_decay = decay.log_decay(c.decay, c.heads, dtype=torch.float64)
    state = torch.zeros(c.heads, k.shape[-1], v.shape[-1], dtype=torch.float64)
    for n in range(len(tokens)):
        cos, sin = rotary.phases(torch.tensor([first + n]), k.shape[-1], c.rotary, dtype=torch.float64)
        turned = rotary.rotate(k[n : n + 1], cos, sin, c.rotary)[0]
        age = len(tokens) - 1 - n
        state += (age * log_decay).exp()[:, None, None] * turned[:, :, None] * v[n][:, None, :]
    return state


@torch.no_grad()
def test_the_first_layer_of_a_merge_is_the_sum_of_groups_that_end_together(retnet, same):
    groups = [ids(n, n) for n in LENGTHS]
    merged = merge([remember(retnet, g) for g in groups], weight=lambda states: 1)
    assert int(merged.state.position[0]) == max(LENGTHS) and merged.tokens == sum(LENGTHS)
    want = sum(by_hand(retnet, g, max(LENGTHS) - len(g)) for g in groups)
    same(merged.state.layers[0][0], want, EXACT)


@torch.no_grad()
def test_the_first_layer_of_a_chain_is_that_of_reading_on(retnet, same):
    groups = [ids(n, n) for n in LENGTHS]
    parts = [remember(retnet, g) for g in groups]
    whole = None
    for g in groups:
        whole = remember(retnet, g, whole)
    chained = chain(parts)
    assert torch.equal(chained.state.position, whole.state.position) and chained.tokens == whole.tokens
    same(chained.state.layers[0], whole.state.layers[0], EXACT)
    first, *others = chain_errors(parts, whole)
    assert first < EXACT and all(1e-3 < error < 3 for error in others)
    distance = (chained.state.layers[2] - whole.state.layers[2]).norm() / whole.state.layers[2].norm()
    assert others[1] == pytest.approx(float(distance))


@torch.no_grad()
def test_where_a_memory_is_turned_to_does_not_matter(same):
    """Only differences of positions count; score_norm scales q by position, which the head norm all but takes out."""
    model = build(replace(CONFIG, score_norm=False)).double().eval()
    memory, nothing = remember(model, ids(20)), remember(model, ids(70, 1))
    for x in nothing.state.layers:
        x.zero_()
    turned = merge([memory, nothing], weight=lambda states: 1)
    assert int(turned.state.position[0]) == 70
    same(after(model, turned, [1, 2, 3]), after(model, memory, [1, 2, 3]), 1e-10)


def test_merging_copies_of_a_memory_gives_that_memory(retnet, same):
    memory = remember(retnet, ids(30))
    same(merge([memory] * 5).state.layers, memory.state.layers, EXACT)


def test_a_merged_state_is_as_large_as_its_parts(retnet):
    parts = [remember(retnet, ids(n, n)) for n in LENGTHS]
    merged = merge(parts)
    for layer, *states in zip(merged.state.layers, *(p.state.layers for p in parts), strict=True):
        norms = torch.stack([s.square().sum((-2, -1)) for s in states]).mean(0).sqrt()
        torch.testing.assert_close(layer.square().sum((-2, -1)).sqrt(), norms)


def test_weights_of_equal_and_of_unrelated_states():
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(keep_size(x.expand(7, -1, -1, -1)), torch.full((2, 1, 1), 1 / 7))
    apart = torch.zeros(4, 2, 4, 4)
    for n in range(4):
        apart[n, :, n] = 3
    torch.testing.assert_close(keep_size(apart), torch.full((2, 1, 1), 0.5))
    assert torch.equal(keep_size(torch.zeros(3, 2, 4, 4)), torch.zeros(2, 1, 1))


def test_a_merge_says_which_document_was_in_which_part(retnet):
    parts = [remember(retnet, ids(4, 4), remember(retnet, ids(3, 3))), remember(retnet, ids(5, 5))]
    for merged in (merge(parts), chain(parts)):
        assert [s["part"] for s in merged.sources] == [0, 0, 1]
        assert [s["tokens"] for s in merged.sources] == [3, 4, 5] and merged.tokens == 12


def test_merges_that_have_no_meaning_are_refused(refuses):
    model = build(CONFIG).eval()
    memory, foreign = remember(model, ids(5)), remember(build(CONFIG).eval(), ids(5))
    transformer = remember(build(twin(CONFIG)).eval(), ids(5))
    gated = remember(build(replace(CONFIG, decay="gated", score_norm=False)).eval(), ids(5))
    for merging in (merge, chain):
        for memories, words in (
            ([], "merging needs at least one memory"),
            ([memory, foreign], "memories of different models cannot be merged"),
            ([transformer, transformer], "memories of a Transformer cannot be merged"),
            ([memory, replace(memory, pending=[3])], "tokens still to be read ([3]) cannot be merged"),
            ([replace(memory, config={})], "needs the model's config"),
        ):
            with refuses(words):
                merging(memories)
    with refuses("gated decay cannot be chained"):
        chain([gated, gated])
    assert merge([gated, gated]).tokens == 10
    with refuses(
        "expected a memory of the same 2 documents (10 tokens) read in a row, got one of 1 documents (5 tokens)"
    ):
        chain_errors([memory, memory], memory)
