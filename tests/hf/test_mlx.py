"""mlx-lm beside ours, on a CPU: logits of every kind of block, batches, padding, quantising and LoRA.

The oracle is the model in torch. Skipped where mlx-lm is not installed (pip install 'retentive[mlx]').
"""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("mlx_lm", reason="needs pip install 'retentive[mlx]'")

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.generate import batch_generate
from mlx_lm.models.cache import ArraysCache, load_prompt_cache, save_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from retentive.checkpoint import hf, save_model
from retentive.cli import main
from retentive.data.templates import TURNS
from retentive.data.tokenizer import ByteTokenizer
from retentive.hf import to_mlx
from retentive.hf.mlx import unfit
from retentive.hf.mlx_model import Model, ModelArgs
from retentive.models import build, retnet, transformer
from retentive.models.students import student
from tests.export.variants import ATTENDING, TINY, VARIANTS, peaked, peaked_model

mx.set_default_device(mx.cpu)
CLOSE = 2e-5
"""Two orders of float32 sums: at most this of the logits' size; measured up to 4e-6."""
MODELS = {
    **{name: lambda fields=fields: peaked(**fields) for name, fields in VARIANTS.items()},
    **{name: lambda c=c: peaked_model(c) for name, c in ATTENDING.items() if not unfit(c)},
    "output gate, scores by position": lambda: peaked_model(
        transformer(**TINY, output_gate=True, position_scale=9.0, qk_norm=True)
    ),
    "joint head norm": lambda: peaked(head_norm=True, head_norm_affine=True, head_norm_joint=True),
}
models = pytest.mark.parametrize("kind", MODELS)


def theirs_of(model, dtype=mx.float32) -> Model:
    """The same model for mlx."""
    theirs = Model(ModelArgs.from_dict(hf.write_config(model.config)))
    tensors = hf.write_tensors(dict(model.named_parameters()), model.config)
    theirs.load_weights([(name, mx.array(x.detach().float().numpy()).astype(dtype)) for name, x in tensors.items()])
    return theirs


def ids_of(batch: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 257, (batch, tokens))


@torch.no_grad()
def logits_of(model, ids: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(ids))[0].float().numpy()


def close(found, wanted: np.ndarray, far: float = CLOSE) -> None:
    assert np.abs(np.array(found.astype(mx.float32)) - wanted).max() <= far * np.abs(wanted).max()


@models
def test_logits_whole_in_parts_and_token_by_token(kind):
    model = MODELS[kind]()
    theirs, ids = theirs_of(model), ids_of(2, 150)
    wanted = logits_of(model, ids)
    close(theirs(mx.array(ids)), wanted)
    cache = theirs.make_cache()
    parts = [(0, 70), (70, 75), *((t, t + 1) for t in range(75, 90)), (90, 150)]
    found = [theirs(mx.array(ids[:, a:b]), cache) for a, b in parts]
    close(mx.concatenate(found, 1), wanted)


@models
def test_windows_that_fill_up_token_by_token(kind):
    model = MODELS[kind]()
    theirs, ids = theirs_of(model), ids_of(2, 40)
    wanted, cache = logits_of(model, ids), theirs.make_cache()
    parts = [*((t, t + 1) for t in range(4)), (4, 7), *((t, t + 1) for t in range(7, 30)), (30, 33), (33, 34), (34, 40)]
    found = [theirs(mx.array(ids[:, a:b]), cache) for a, b in parts]
    close(mx.concatenate(found, 1), wanted)


@models
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_in_parts_then_tokens(kind, side):
    model, pads, T = MODELS[kind](), [0, 13, 25], 40
    theirs, ids, more = theirs_of(model), ids_of(3, T), ids_of(3, T + 12)[:, T:]
    cache = [memory.merge([memory] * 3) for memory in theirs.make_cache()]
    if side == "left":
        for memory in flat(cache):
            memory.left_padding = mx.array(pads)
            if not isinstance(memory, ArraysCache):
                memory.offset = -memory.left_padding
    else:
        for memory in cache:
            memory.prepare(lengths=[T - pad for pad in pads], right_padding=pads)
    found = mx.concatenate([theirs(mx.array(ids[:, a:b]), cache) for a, b in ((0, 17), (17, 20), (20, T))], 1)
    if side == "right":
        for memory in cache:
            memory.finalize()
    after = mx.concatenate([theirs(mx.array(more[:, t : t + 1]), cache) for t in range(12)], 1)
    for n, pad in enumerate(pads):
        begin, end = (pad, T) if side == "left" else (0, T - pad)
        wanted = logits_of(model, np.concatenate((ids[n : n + 1, begin:end], more[n : n + 1]), 1))
        close(mx.concatenate((found[n : n + 1, begin:end], after[n : n + 1]), 1), wanted)


def flat(cache) -> list:
    """Memories of all blocks, those of a list one by one."""
    return [one for memory in cache for one in getattr(memory, "caches", [memory])]


@pytest.mark.slow
@models
def test_a_batch_of_prompts_is_each_of_them(kind, tmp_path):
    """All at once; and in batches of two, which they enter and leave at different tokens."""
    model = MODELS[kind]()
    save_model(tmp_path / "ours", model, ByteTokenizer())
    to_mlx(tmp_path / "ours", tmp_path / "theirs")
    theirs, tokenizer = mlx_lm.load(str(tmp_path / "theirs"), trust_remote_code=True)
    prompts = [ids_of(1, n)[0].tolist() for n in (5, 90, 1, 33)]
    wanted = [greedy(model, prompt, 20) for prompt in prompts]
    tokenizer.eos_token_ids = set()
    small = {"prefill_batch_size": 2, "completion_batch_size": 2, "prefill_step_size": 16}
    for counts, how in (([12] * 4, {}), ([3, 12, 20, 7], small)):
        found = batch_generate(theirs, tokenizer, prompts, max_tokens=counts, return_token_ids=True, **how).token_ids
        assert found == [text[:count] for text, count in zip(wanted, counts, strict=True)]


@torch.no_grad()
def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The next ids by the model in torch."""
    found, state, step = [], None, torch.tensor([prompt])
    for _ in range(count):
        logits, state = model(step, state)
        found.append(int(logits[0, -1].argmax()))
        step = torch.tensor([found[-1:]])
    return found


@pytest.mark.parametrize("kind", ["hybrid, window, convolution", "forget gate", "forget gate, window"])
def test_a_saved_prompt_cache_goes_on(kind, tmp_path):
    model = MODELS[kind]()
    theirs, ids = theirs_of(model), ids_of(1, 60)
    cache = theirs.make_cache()
    theirs(mx.array(ids[:, :40]), cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    found = theirs(mx.array(ids[:, 40:]), load_prompt_cache(str(tmp_path / "cache.safetensors")))
    close(found, logits_of(model, ids)[:, 40:])


@pytest.mark.slow
def test_forget_gates_are_exact_over_long_texts():
    """Gates that forget half at every token: their sum over the text is -2,800, where float32 has steps of 2e-4."""
    model = peaked_model(transformer(**TINY, forget_gate=True))
    with torch.no_grad():
        for block in model.blocks:
            block.attention.forget_proj.bias.fill_(0)
    theirs, ids = theirs_of(model), ids_of(1, 4000)
    ids[:, 100:3900] = ids[:, 100:101]  # a text that repeats itself, so that errors do not hide among random logits
    wanted = logits_of(model.double(), ids)
    cache = theirs.make_cache()
    parts = [theirs(mx.array(ids[:, a : a + 2048]), cache) for a in (0, 2048)]
    # measured 1.2e-5; 5e-5 with sums over each whole part, 1.6e-4 in torch's float32
    close(mx.concatenate(parts, 1), wanted, 3e-5)


@pytest.mark.parametrize("kind", ["hybrid, window, convolution", "forget gate", "convolution"])
def test_half_precision_is_as_close_as_torch(kind):
    model, ids = MODELS[kind](), ids_of(1, 300)
    exact, theirs = logits_of(model, ids), theirs_of(model, mx.bfloat16)
    ours = logits_of(model.bfloat16(), ids)
    cache = theirs.make_cache()
    parts = [theirs(mx.array(ids[:, a:b]), cache) for a, b in ((0, 200), *((t, t + 1) for t in range(200, 300)))]
    found = np.array(mx.concatenate(parts, 1).astype(mx.float32))
    assert np.linalg.norm(found - exact) < 1.2 * np.linalg.norm(ours - exact)


def test_positions_far_away_are_turned_exactly():
    model = peaked(rotary="half")
    theirs, ids = theirs_of(model), ids_of(1, 40)
    cache = theirs.make_cache()
    theirs(mx.array(ids), cache)
    with torch.no_grad():
        _, state = model(torch.from_numpy(ids))
    for far in (5_000, 1_000_000):
        state.position[:] = far
        for memory in cache:
            memory[1] = mx.array([far])
        with torch.no_grad():
            wanted, _ = model(torch.from_numpy(ids), state.clone())
        found = theirs(mx.array(ids), [copied(memory) for memory in cache])
        close(found, wanted.numpy(), 1e-3)  # float32 angles: half a thousandth of a radian at a million tokens


def copied(memory):
    new = type(memory)(size=2)
    new[0], new[1] = memory[0], memory[1]
    return new


def test_state_and_decays_stay_float32_in_bfloat16():
    slow = -1e-4  # 0.9999, which is 1 in bfloat16
    model = peaked(decay=(slow, slow), qk_norm=False)
    theirs = theirs_of(model, mx.bfloat16)
    cache = theirs.make_cache()
    ids = mx.array(ids_of(1, 3000))
    theirs(ids, cache)
    assert all(memory[0].dtype == mx.float32 for memory in cache)
    # 3,000 tokens later exp(-0.3) of the first is left
    layer = theirs.layers[0].retention
    assert layer.log_decay(mx.zeros((1, 1, 64), mx.bfloat16)).dtype == mx.float32
    before, x = cache[0][0], mx.zeros((1, 3000, 64), mx.bfloat16)
    layer(x, cache[0])
    left = np.array(cache[0][0] / before)
    assert np.allclose(left, np.exp(3000 * slow), rtol=1e-3)


def test_the_folder_writes_and_is_quantised(tmp_path, capsys):
    model = peaked(decay_bias=True)
    save_model(tmp_path / "ours", model, ByteTokenizer(), template=TURNS)
    main(["export", str(tmp_path / "ours"), "--to", "mlx", "--out", str(tmp_path / "theirs")])
    assert "the logits of mlx-lm differ by" in capsys.readouterr().err
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["model_file"] == "mlx_model.py" and "auto_map" not in config  # transformers would ask for torch
    assert "mlx_lm" in (tmp_path / "theirs" / "README.md").read_text()
    theirs, tokenizer = mlx_lm.load(str(tmp_path / "theirs"), trust_remote_code=True)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], add_generation_prompt=True)
    assert len(mlx_lm.generate(theirs, tokenizer, prompt=prompt, max_tokens=5)) > 0
    small = quantised(tmp_path / "theirs", tmp_path / "int8")
    layer = small.layers[0].retention
    assert "scales" in layer.q_proj and "scales" not in layer.decay_proj
    close(small(mx.array(ids_of(1, 40))), logits_of(model, ids_of(1, 40)), 0.1)  # 8 bits


def quantised(folder, out) -> Model:
    mlx_lm.convert(
        str(folder), str(out), quantize=True, q_bits=8, q_group_size=32, trust_remote_code=True
    )  # fmt: skip
    return mlx_lm.load(str(out), trust_remote_code=True)[0]


def test_convolutions_and_forget_gates_stay_floats(tmp_path):
    model = MODELS["hybrid, window, convolution"]()
    save_model(tmp_path / "ours", model, ByteTokenizer())
    assert to_mlx(tmp_path / "ours", tmp_path / "theirs") < CLOSE
    small = quantised(tmp_path / "theirs", tmp_path / "int8")
    attention = next(block.attention for block in small.layers if block.kind == "attention")
    assert "scales" in attention.q_proj and "scales" not in attention.forget_proj
    assert small.layers[0].kind == "convolution" and small.layers[0].convolution.weight.dtype == mx.float32
    close(small(mx.array(ids_of(1, 40))), logits_of(model, ids_of(1, 40)), 0.1)  # 8 bits


def test_lora_reaches_retention_and_learns():
    theirs = theirs_of(peaked())
    theirs.freeze()
    keys = ["retention.q_proj", "retention.g_proj", "retention.decay_proj"]
    linear_to_lora_layers(theirs, 2, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": keys})
    names = {name for name, _ in tree_flatten(theirs.trainable_parameters())}
    assert len(names) == 2 * 3 * 2 and all("lora_" in name for name in names)
    ids = mx.array(ids_of(1, 70))

    def loss(model):
        return -mx.take_along_axis(mx.log(mx.softmax(model(ids[:, :-1]), -1)), ids[:, 1:, None], -1).mean()

    import mlx.nn as nn

    gradient = tree_flatten(nn.value_and_grad(theirs, loss)(theirs)[1])
    assert all(bool(mx.isfinite(x).all()) for _, x in gradient)
    assert any(float(mx.abs(x).max()) > 0 for name, x in gradient if "decay_proj" in name)


def test_what_the_classes_lack_is_told(tmp_path):
    sinks = student(transformer(**TINY), window=8, sinks=2)
    save_model(tmp_path / "sinks", build(sinks), ByteTokenizer())
    with pytest.raises(ValueError, match="no attention sinks"):
        to_mlx(tmp_path / "sinks", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_model(tmp_path / "m", build(retnet(**TINY)), ByteTokenizer())
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        to_mlx(tmp_path / "m", tmp_path / "out")
