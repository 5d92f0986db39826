"""Memory files: a memory comes back complete, and files that are no memory of this model are refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from retentive.data.tokenizer import ByteTokenizer
from retentive.infer import SamplingParams, generate, write_on
from retentive.infer.memory import Memory, fingerprint, head, load_memory, save, show
from retentive.models import ModelConfig, build
from tests.configs import changed
from tests.infer.memories import CONFIG, MODELS, after, ids, remember


@pytest.fixture(params=MODELS)
def model(request):
    return build(MODELS[request.param]).eval()


@pytest.mark.parametrize("prompt", ["", "or two "])
def test_writing_on_from_a_memory_is_writing_on_from_its_text(prompt):
    model, tokenizer = build(changed(CONFIG, vocab_size=257)).eval(), ByteTokenizer()
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
    assert ModelConfig.read(loaded.config) == model.config
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
    assert about["kinds"] == sorted(set(model.config.kinds))
    assert about["model"] == fingerprint(model) and about["config"]["dim"] == 32
    assert about["file_bytes"] == (tmp_path / "a").stat().st_size


def test_the_head_of_a_file_says_what_was_read(model, tmp_path, refuses):
    memory = remember(model, ids(30))
    save(memory, tmp_path / "a")
    flip(tmp_path / "a")  # in the last tensor, which is not looked at
    about = head(tmp_path / "a")
    assert about["tokens"] == 30 and about["model"] == memory.model and about["sources"] == memory.sources
    model.init_state(1).save(tmp_path / "b")
    with refuses("holds a state but not what was read"):
        head(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"hello")
    with refuses("is not a complete safetensors file"):
        head(tmp_path / "b")


def test_a_fingerprint_names_config_and_weights(model):
    name = fingerprint(model)
    other = build(model.config).eval()
    assert len(name) == 32 and fingerprint(other) != name
    other.load_state_dict(model.state_dict())
    assert fingerprint(other) == name
    assert fingerprint(other.double()) != name
    renamed = build(changed(model.config, norm_eps=1e-5))
    renamed.load_state_dict(model.state_dict())
    assert fingerprint(renamed) != name
    with torch.no_grad():
        model.blocks[-1].ffn_norm.weight[3] += 1e-6
    assert fingerprint(model) != name


def rewrite(path, tensors=None, **metadata) -> None:
    """Rewrite the file with other tensors or metadata."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    save_file(load_file(path) | (tensors or {}), path, metadata={**old, **metadata})


def forged(path, **about) -> None:
    """Write a forged file that is consistent in itself."""
    memory = load_memory(path)
    for name, value in about.items():
        setattr(memory, name, value)
    save(memory, path)


def flip(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def first_of(memory):
    """(memory, name of its first tensor, that tensor)."""
    name = {"retention": "value", "attention": "keys", "convolution": "rows"}[memory.kind]
    return memory, name, getattr(memory, name)


def short_state(model):
    state = remember(model, [1, 2]).state
    short = [replace(m, **{name: x[..., :2].contiguous()}) for m, name, x in map(first_of, state.memories)]
    return replace(state, memories=short)


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


@pytest.mark.parametrize("about", [json.dumps({"tokens": 1}), "[" * 100_000], ids=["version", "nested"])
def test_metadata_of_another_version_is_refused(tmp_path, refuses, about):
    model = build(CONFIG).eval()
    save(remember(model, [1]), tmp_path / "a")
    memory = load_memory(tmp_path / "a")
    from retentive.infer.memory import _digest

    memory.state.save(tmp_path / "a", {"memory": about, "digest": _digest(memory.state, about)})
    for read in (load_memory, head):
        with refuses("does not say what was read"):
            read(tmp_path / "a")


def test_a_missing_file_and_one_without_tensors(tmp_path, refuses):
    with refuses("no file at", FileNotFoundError):
        load_memory(tmp_path / "none")
    versions = {
        "layers.0": {"format": "retentive-state-1", "kind": "retention"},
        "keys": {"format": "retentive-state-2", "windows": "[0]"},
    }
    for missing, metadata in versions.items():
        save_file({"layers.1": torch.ones(1), "position": torch.ones(1)}, tmp_path / "a", metadata=metadata)
        with refuses(f"holds a state without {missing!r}"):
            load_memory(tmp_path / "a")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    model = build(CONFIG).eval()
    save(remember(model, [1, 2]), tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def full(tensors, path, **how):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(remember(model, [3]), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
