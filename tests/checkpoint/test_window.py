"""Windows with sinks at load time: the model that was stored with such a config, in every kind of folder."""

from dataclasses import replace

import pytest
import torch

import retentive
from retentive.checkpoint import ModelFolder, save_model
from retentive.checkpoint.adapter import with_adapter
from retentive.checkpoint.quantize import quantization_of, quantize
from retentive.checkpoint.weights import weights_sha256
from retentive.data.tokenizer import ByteTokenizer
from retentive.infer.engine import Engine
from retentive.infer.generate import generate
from retentive.infer.memory import load_memory
from retentive.infer.reading import write_memory
from retentive.infer.sample import SamplingParams
from retentive.layers.lora import Adapter
from retentive.models import PeerConfig, build, cost, retnet, transformer
from retentive.native import NativeModel
from tests.configs import changed, hybrid

SMALL = dict(vocab_size=257, dim=32, layers=2, heads=2)
WINDOW, SINKS = 6, 2
CONFIGS = {
    "transformer": transformer(**SMALL, kv_heads=1, qkv_bias=True),
    "hybrid": hybrid(**SMALL, attention=(0,)),
    "larger-window": transformer(**SMALL, attention_window=9),
    "forget-gate": transformer(**SMALL, forget_gate=True),
    "retnet": retnet(**SMALL),
}
IDS = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(1))


def made(name):
    """A model whose tokens attend far and wide: queries and keys of some size."""
    model = build(CONFIGS[name]).eval()
    for name, p in model.named_parameters():
        if "attention" in name and p.ndim == 2:
            torch.nn.init.normal_(p, std=3 * p.shape[-1] ** -0.5)
    return model


def with_config(model, config):
    """The same weights in a model of another config."""
    other = build(config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


def stored(model):
    """The same weights with a window in the config, as a user would write it."""
    return with_config(model, changed(model.config, attention_window=WINDOW, attention_sinks=SINKS, moving_sinks=True))


FOLDERS = {
    "ours": ("transformer", {}),
    "hybrid": ("hybrid", {}),
    "larger-window": ("larger-window", {}),
    "llama": ("transformer", {"layout": "llama"}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FOLDERS)
def test_logits_are_those_of_a_model_stored_with_the_window(name, tmp_path, same):
    config, how = FOLDERS[name]
    model = made(config)
    save_model(tmp_path / "model", model, **how)
    found, _ = retentive.load(tmp_path / "model", window=WINDOW, sinks=SINKS)
    want = stored(model)
    assert found.config == want.config
    same(found(IDS)[0], want(IDS)[0], 0)
    assert (found(IDS)[0] - model(IDS)[0]).abs().max() > 0.01  # there is something that the window hides
    same(NativeModel(found)(IDS)[0], found(IDS)[0], 1e-4)
    save_model(tmp_path / "converted", found)
    again, _ = retentive.load(tmp_path / "converted")
    assert again.config == want.config
    same(again(IDS)[0], want(IDS)[0], 0)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_get_a_window_too(bits, tmp_path, same):
    low = quantize(made("transformer"), bits, dtype=torch.float32)
    save_model(tmp_path, low)
    found, _ = retentive.load(tmp_path, dtype="float32", window=WINDOW, sinks=SINKS)
    want = quantize(stored(made("transformer")), bits, dtype=torch.float32)
    want.load_state_dict(low.state_dict())  # of other random weights
    assert found.config == want.config and quantization_of(found).bits == bits
    same(found(IDS)[0], want(IDS)[0], 0)


@torch.no_grad()
def test_an_adapter_and_its_model_get_it(tmp_path, same):
    save_model(tmp_path / "base", made("transformer"), ByteTokenizer())
    model, _ = retentive.load(tmp_path / "base")
    with_adapter(model, Adapter(str(tmp_path / "base"), weights_sha256(tmp_path / "base"), 3, 6.0, ("q_proj",)))
    for name, p in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p, std=0.1)
    save_model(tmp_path / "change", model, ByteTokenizer())
    whole, _ = retentive.load(tmp_path / "change")
    want = stored(whole)(IDS)[0]
    assert (want - whole(IDS)[0]).abs().max() > 0.01
    how = dict(window=WINDOW, sinks=SINKS)
    for found, _ in (
        retentive.load(tmp_path / "change", **how),
        retentive.load(tmp_path / "base", adapter=tmp_path / "change", **how),
        retentive.load(ModelFolder.open(tmp_path / "change").windowed(WINDOW + 1, SINKS).windowed(WINDOW)),
    ):
        same(found(IDS)[0], want, 0)


@torch.no_grad()
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_memory_stops_growing(engine, tmp_path):
    save_model(tmp_path, made("transformer"))
    model, _ = retentive.load(tmp_path, window=WINDOW, sinks=SINKS)
    model = NativeModel(model) if engine == "native" else model
    state, sizes = None, []
    for begin in range(0, 40, 8):
        for part in (IDS[:1, begin : begin + 5], *IDS[:1, begin + 5 : begin + 8].split(1, 1)):
            state = model(part, state)[1]
        sizes.append(sum(x.nbytes for memory in state.memories for x in memory.tensors()))
    most = cost.memory_bytes(model.config, 10**6)
    assert sizes == [most + 8 * model.config.layers] * 5  # and of each layer the oldest position that is still there
    assert most == cost.memory_bytes(CONFIGS["transformer"], WINDOW + SINKS)


@torch.no_grad()
def test_engine_and_memory_files_go_on_as_the_stored_model(tmp_path):
    save_model(tmp_path / "model", made("transformer"), ByteTokenizer())
    model, tokenizer = retentive.load(tmp_path / "model", window=WINDOW, sinks=SINKS)
    want = stored(made("transformer"))
    want.load_state_dict(model.state_dict())
    greedy, ids = SamplingParams(temperature=0), IDS[0, :20].tolist()
    tokens = [token.id for token in generate(want, ids, greedy, max_tokens=30)]
    engine = Engine(NativeModel(model), slots=3).start()
    try:
        streams = [engine.submit(ids, greedy, max_tokens=30)[0] for _ in range(3)]
        assert [[token.id for token in stream] for stream in streams] == [tokens] * 3
    finally:
        engine.close()

    for name, count in (("short.mem", 3), ("long.mem", 20)):
        (tmp_path / f"{name}.txt").write_text("a river and a bridge. " * count)
        write_memory(model, tokenizer, [str(tmp_path / f"{name}.txt")], tmp_path / name)
    sizes = [load_memory(tmp_path / name, want).nbytes for name in ("short.mem", "long.mem")]  # the stored one's too
    assert sizes[0] == sizes[1]
    texts = [
        retentive.generate(one, tokenizer, "and", memory=tmp_path / "long.mem", max_tokens=20, temperature=0)
        for one in (model, want)
    ]
    assert texts[0] == texts[1]


def test_the_memory_of_another_window_is_refused(tmp_path, refuses):
    save_model(tmp_path / "model", made("transformer"), ByteTokenizer())
    model, tokenizer = retentive.load(tmp_path / "model", window=WINDOW, sinks=SINKS)
    (tmp_path / "text.txt").write_text("a river and a bridge. " * 20)
    write_memory(model, tokenizer, [str(tmp_path / "text.txt")], tmp_path / "text.mem")
    for window in (None, WINDOW + 1):
        with refuses("with the same `dtype`, `window` and `sinks`"):
            load_memory(tmp_path / "text.mem", retentive.load(tmp_path / "model", window=window)[0])


def test_smaller_windows_stay_and_sinks_are_kept_unless_given():
    config = transformer(**SMALL, attention_window=9, attention_sinks=1)
    other = changed(config, attention_window=4, attention_sinks=0)
    both = replace(config, blocks=(config.blocks[0], other.blocks[0]))
    assert [(m.window, m.sinks) for m in both.with_window(6).mixers] == [(6, 1), (4, 0)]
    assert [(m.window, m.sinks) for m in both.with_window(6, 3).mixers] == [(6, 3), (4, 0)]
    assert [(m.window, m.sinks) for m in both.with_window(9, 0).mixers] == [(9, 0), (4, 0)]
    assert both.with_window(None) is both
    # sinks of the training keep their distances, others move
    assert [m.moving_sinks for m in both.with_window(6, 3).mixers] == [False, False]
    moving = CONFIGS["transformer"].with_window(6, 3)
    assert all(m.moving_sinks for m in (*moving.mixers, *moving.with_window(5).mixers))
    assert not any(m.moving_sinks for m in (*moving.with_window(5, 0).mixers, *moving.with_window(6, 0).mixers))


def test_each_attention_layer_may_have_its_own_window():
    config = CONFIGS["transformer"]
    number = config.layers
    windows = tuple(range(3, 3 + number))
    assert [m.window for m in config.with_window(windows, 2).mixers] == list(windows)
    beside = CONFIGS["hybrid"]
    windows = [5 + n for n in range(sum(m.kind == "attention" for m in beside.mixers))]
    assert [m.window for m in beside.with_window(windows).mixers if m.kind == "attention"] == windows


PEER = PeerConfig(kind="llama", vocab_size=9, dim=16, layers=1, heads=2, ffn_dim=16)
BAD = {
    "retnet": (CONFIGS["retnet"], dict(window=8), "`window=8`: a RetNet has no attention to limit"),
    "larger": (
        CONFIGS["larger-window"],
        dict(window=10),
        "`window=10`: the model has a window of 9",
    ),
    "sinks": (CONFIGS["transformer"], dict(window=None, sinks=4), "`sinks=4`: without a window all tokens are seen"),
    "gate": (CONFIGS["forget-gate"], dict(window=8, sinks=4), "sinks 4 with a forget gate"),
    "nothing": (CONFIGS["transformer"], dict(window=0), "the window must be at least 1 token"),
    "negative": (CONFIGS["transformer"], dict(window=8, sinks=-1), "sinks must be at least 0, got -1"),
    "few": (CONFIGS["transformer"], dict(window=(8, 9, 9, 9)), "layers; give one number, or one for each"),
    "fraction": (CONFIGS["transformer"], dict(window=8.5), "window must be a whole number or null, got 8.5"),
    "peer": (PEER, dict(window=8), "`window` and `sinks` are of this package's models"),
}


@pytest.mark.parametrize("name", BAD)
def test_windows_that_cannot_be(name, refuses):
    config, how, words = BAD[name]
    with refuses(words):
        config.with_window(**how)
