"""Quantised matrices: their error, the gain of calibration, and folders of quantised models."""

import json
from importlib.util import find_spec

import pytest
import torch

from retentive.checkpoint import load, save_model
from retentive.checkpoint.quantize import (
    Quantization,
    as_quantized,
    batches_of,
    best_scale,
    fed_back,
    quantization_of,
    quantize,
    rounded,
)
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer
from retentive.files import load_tensors, save_tensors
from retentive.layers.quantized import Integers, Quantized, QuantizedEmbedding, QuantizedLinear
from retentive.models import ARCHITECTURES, build, peer, retnet, transformer
from tests.configs import hybrid, on_levels

SMALL = dict(vocab_size=67, dim=48, layers=2, heads=2, ffn_dim=50)
CONFIGS = {
    "retnet": {},
    "tied": dict(tie_embeddings=True),
    "decay-bias": dict(decay_bias=True, qk_bias=True),
    "paper": ARCHITECTURES["retnet-paper"],
    "plain": dict(gate=False, ffn_gate=False, final_norm=False),
}
MODELS = {
    **{name: retnet(**SMALL | fields) for name, fields in CONFIGS.items()},
    "transformer": transformer(**SMALL | dict(heads=4, kv_heads=2, qk_norm=True)),
    "forget-gate": transformer(**SMALL, forget_gate=True, attention_window=5),
    "hybrid": hybrid(**SMALL, attention=(1,)),
}


@pytest.fixture(params=MODELS)
def model(request):
    return build(MODELS[request.param]).eval()


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("bits", "minimums"), [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize("columns", [16, 7, 50])
def test_what_is_stored_comes_back(bits, minimums, columns, same):
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), dtype=torch.int8)
    scale = torch.rand(5, -(-columns // 16)).half()
    minimum = torch.randn(scale.shape).half() if minimums else None
    want = (q.float() + 8 * minimums) * scale.float().repeat_interleave(16, 1)[:, :columns]
    if minimums:
        want += minimum.float().repeat_interleave(16, 1)[:, :columns]
    linear = QuantizedLinear(5, columns, bits, 16, dtype=torch.float32)
    linear.store(Integers(q, scale, minimum))
    same(linear(torch.eye(columns)), want.T, 1e-6)
    embedding = QuantizedEmbedding(5, columns, bits, 16, dtype=torch.float32)
    embedding.store(Integers(q, scale, minimum))
    same(embedding(torch.tensor([[4, 0, 4]])), want[[4, 0, 4]][None], 0)
    for dtype in (torch.bfloat16, torch.float32):  # scales survive casts of the model
        embedding.to(dtype)
        assert embedding(torch.tensor([1])).dtype == dtype
    same(embedding(torch.tensor([2])), want[[2]], 0)


@pytest.mark.parametrize(("bits", "times"), [(8, 1.25), (4, 1.05)])
def test_the_scale_is_that_of_least_error(bits, times):
    """By trying 2,000, of which the best also had luck with how numbers fall on integers, the finer the more."""
    w, top = torch.randn(20, 32), 2 ** (bits - 1)
    found = best_scale(w, bits).float()
    least = torch.full((20,), torch.inf)
    for sign in (1, -1):
        for factor in torch.linspace(0.4, 1.2, 1000):
            scale = sign * factor * w.abs().amax(1) / top
            q = (w / scale[:, None]).round().clamp(-top, top - 1)
            least = torch.minimum(least, ((q * scale[:, None] - w) ** 2).sum(1))
    q = (w / found[:, None]).round().clamp(-top, top - 1)
    assert (((q * found[:, None] - w) ** 2).sum(1)).sum() <= times * least.sum()


def test_zeros_stay_zeros():
    w = torch.zeros(3, 40)
    w[1, 20] = 1e-30  # below what a float16 scale can say
    made = rounded(w, 4, 16)
    assert not made.q.any() and made.scale.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("calibrated", [False, True])
def test_matrices_on_levels_from_minimum_to_maximum_keep_their_integers(calibrated, tmp_path, same):
    model = on_levels(build(retnet(**SMALL | dict(dim=64, tie_embeddings=True)))).eval()
    ids = torch.randint(67, (1, 30))
    save_model(tmp_path, quantize(model, 4, batches=[ids] * calibrated))
    made, _ = load(tmp_path, dtype=torch.float32)
    kept = {name for name, layer in made.named_modules() if isinstance(layer, Quantized) and layer.minimum is not None}
    assert {name.rpartition(".")[2] for name in kept} >= {"embed", "head", "gate_proj"}
    assert sum(isinstance(layer, Quantized) for layer in made.modules()) > len(kept)
    for name in kept:
        same(made.get_submodule(name).floats(), model.get_submodule(name).weight, 0)
    assert rounded(model.embed.weight, 8, 32).minimum is rounded(model.embed.weight, 4, 16).minimum is None
    model.embed.weight[3, 40] += 1e-3
    assert rounded(model.embed.weight, 4, 32).minimum is None


def test_errors_fed_back_make_outputs_nearer():
    """On inputs with few directions, as a model's are, by at least a third; the matrix itself is then farther off."""
    x = torch.randn(400, 12) @ torch.randn(12, 96) + 0.05 * torch.randn(400, 96)
    w = torch.randn(40, 96)

    plain = rounded(w, 4, 32).floats(32)
    fed = fed_back(w, x.double().T @ x.double(), 4, 32).floats(32)
    assert error(x @ fed.T, x @ w.T) < 0.67 * error(x @ plain.T, x @ w.T)
    assert error(fed, w) > error(plain, w)


@torch.no_grad()
def test_logits_of_integers(model):
    ids = torch.randint(67, (2, 30))
    want = model(ids)[0]
    bounds = {8: 0.02, 4: 0.3}  # rounding to nearest is off by 2^-8 and 2^-4 of the largest of a group at most
    for bits, bound in bounds.items():
        made = quantize(model, bits, dtype=torch.float32)
        assert error(made(ids)[0], want) < bound
        assert quantization_of(made) == Quantization(bits, {8: 128, 4: 32}[bits])
        assert sum(isinstance(m, Quantized) for m in made.modules()) == sum(
            isinstance(m, torch.nn.Linear | torch.nn.Embedding) for m in model.modules()
        )
    assert quantization_of(model) is None  # a copy was quantised


@torch.no_grad()
@pytest.mark.parametrize("name", ["retnet", "forget-gate", "hybrid"])
def test_calibration_brings_logits_nearer_on_text_like_that(name):
    model = build(MODELS[name]).eval()
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    ids = torch.randint(12, (4, 200))  # few of the vocabulary
    want, seen = model(ids)[0], []
    plain = quantize(model, 4, dtype=torch.float32)
    fed = quantize(model, 4, batches=[ids], dtype=torch.float32, progress=lambda *done: seen.append(done))
    assert error(fed(ids)[0], want) < 0.8 * error(plain(ids)[0], want)
    assert seen == [(1, 2), (2, 2)]


@torch.no_grad()
@pytest.mark.parametrize("calibrated", [False, True])
def test_with_minimums_matrices_are_nearer(calibrated, tmp_path, same):
    """Also where errors are fed back, which moves a matrix away from what it was. Normal numbers: by 8 and by 10 %."""
    w, x = torch.randn(200, 96), torch.randn(400, 12) @ torch.randn(12, 96) + 0.05 * torch.randn(400, 96)
    moment = x.double().T @ x.double()
    plain, made = (
        fed_back(w, moment, 4, 32, asymmetric=a) if calibrated else rounded(w, 4, 32, asymmetric=a)
        for a in (False, True)
    )
    assert error(made.floats(32), w) < 0.97 * error(plain.floats(32), w)
    model = build(retnet(**SMALL | dict(dim=64, tie_embeddings=True))).eval()
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    ids = torch.randint(12, (4, 200))
    made = quantize(model, 4, batches=[ids] * calibrated, asymmetric=True, dtype=torch.float32)
    assert all(m.minimum is not None for m in made.modules() if isinstance(m, Quantized))
    save_model(tmp_path, made)
    same(load(tmp_path, dtype=torch.float32)[0](ids)[0], made(ids)[0], 0)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_a_folder_of_integers_is_loaded_as_it_was(model, bits, tmp_path, same):
    made, ids = quantize(model, bits, dtype=torch.float32), torch.randint(67, (1, 20))
    save_model(tmp_path, made)
    again, _ = load(tmp_path, dtype=torch.float32)
    same(again(ids)[0], made(ids)[0], 0)
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in made.named_parameters()]
    low, _ = load(tmp_path)
    assert low.dtype == torch.bfloat16 and error(low(ids)[0], made(ids)[0]) < 0.05
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["quantization"] == {"bits": bits, "group": {8: 128, 4: 32}[bits]}


def test_text_to_calibrate_on_comes_from_all_documents_in_turn():
    documents = [Document("a", "a" * 1000), Document("b", "b"), Document("c", "c" * 30)]
    parts = batches_of(documents, ByteTokenizer(), tokens=100, length=20)
    assert [len(part[0]) for part in parts] == [20, 2, 20, 20, 11, 20, 7]
    assert [ByteTokenizer().decode(part[0].tolist())[-1] for part in parts] == list("abcacaa")
    assert batches_of(documents[1:2], ByteTokenizer(), tokens=100)[0].shape == (1, 2)


def test_what_cannot_be_quantised_is_refused(model, refuses, tmp_path):
    if find_spec("transformers"):
        with refuses("only models of this package can be quantised, this is one of transformers"):
            quantize(build(peer(retnet(**SMALL), "llama")), 8)
    with refuses("weights can have 8 or 4 bits, got 5"):
        as_quantized(model, Quantization(5, 32), torch.float32)
    for group in (24, 0, 512):
        with refuses(f"`group={group}`: must be a multiple of 16 columns, up to 256"):
            quantize(model, 4, group)
    with refuses("`asymmetric` is for int4"):
        quantize(model, 8, asymmetric=True)
    made = quantize(model, 8)
    with refuses("the model is quantised already: name the one that it was quantised from"):
        quantize(made, 4)
    with refuses("fla cannot hold quantised weights"):
        save_model(tmp_path / "new", made, layout="fla")
    with refuses("`tokens=0`: calibration needs at least 1"):
        batches_of([], ByteTokenizer(), tokens=0)
    with torch.no_grad():
        model.blocks[1].ffn.down_proj.weight[3, 4] = torch.nan
    with refuses("the weights are damaged: blocks.1.ffn.down_proj.weight holds a number that is not finite"):
        quantize(model, 8)


def damaged_config(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization": {"bits": 3, "group": 32}}))


def other_scales(folder):
    tensors, _ = load_tensors(folder / "model.safetensors")
    tensors["embed.scale"] = tensors["embed.scale"].float()
    save_tensors(folder / "model.safetensors", tensors)


def cut_short(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def flipped_bit(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGES = {
    damaged_config: "unknown quantization {'bits': 3, 'group': 32} (weights can have 8 or 4 bits, got 3)",
    other_scales: "embed.scale is torch.float32, expected torch.float16",
    cut_short: "is not a complete safetensors file",
    flipped_bit: "is damaged: its bytes are not those that were written",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(damage, tmp_path, refuses):
    save_model(tmp_path, quantize(build(retnet(**SMALL)), 4))
    damage(tmp_path)
    with refuses(DAMAGES[damage]):
        load(tmp_path)
