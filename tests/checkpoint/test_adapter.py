"""Adapters: a new one changes nothing, the merged model equals the trained one, and other models refuse it."""

import shutil

import pytest
import torch

from retentive.checkpoint import ModelFolder, load, save_model
from retentive.checkpoint.adapter import adapter_of, merged, targets_of, with_adapter
from retentive.checkpoint.quantize import float_tensors, quantization_of, quantize
from retentive.checkpoint.weights import weights_sha256
from retentive.data.loader import Batch
from retentive.data.tokenizer import ByteTokenizer
from retentive.layers.lora import Adapter, LoRA
from retentive.models import build, retnet, transformer
from retentive.train.initial import adapter_for
from retentive.train.objective import language_modelling
from tests.configs import hybrid

SMALL = dict(vocab_size=257, dim=32, layers=2, heads=2)
CONFIGS = {
    "retnet": retnet(**SMALL),
    "tied": retnet(**SMALL, tie_embeddings=True, gate=False, ffn_gate=False),
    "transformer": transformer(**SMALL),
    "hybrid": hybrid(**SMALL, attention_every=2),
}


@pytest.fixture(params=CONFIGS)
def base(request, tmp_path):
    """A model folder and its model."""
    save_model(tmp_path / "base", build(CONFIGS[request.param]), ByteTokenizer())
    return tmp_path / "base", load(tmp_path / "base")[0]


def changed(folder, model, targets="all", rank=3, hashed=True):
    """The model with an adapter whose change is not zero."""
    sha256 = weights_sha256(folder) if hashed else ""
    adapter = Adapter(str(folder), sha256, rank, 6.0, targets_of(model, targets, rank))
    made = with_adapter(model, adapter)
    for name, p in made.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p, std=0.1)
    return made


IDS = torch.randint(257, (2, 20))


@torch.no_grad()
def test_at_first_nothing_is_changed_and_the_change_alone_is_trained(base):
    folder, model = base
    want = model(IDS)[0]
    adapter = Adapter(str(folder), "", 3, 6.0, targets_of(model, "all", 3))
    made = with_adapter(model, adapter)
    assert torch.equal(made(IDS)[0], want) and adapter_of(made) == adapter
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith(("lora_a", "lora_b")) for name in trained)
    assert {"q_proj", "out_proj", "down_proj", "embed"} <= set(adapter.targets)
    # a tied output matrix is changed with the embedding, and by the same change
    assert ("head" in adapter.targets) == (not model.config.tie_embeddings)
    assert (made.head.lora_a is made.embed.lora_a) == model.config.tie_embeddings


@torch.no_grad()
def test_what_is_loaded_is_what_was_trained(base, tmp_path, same):
    folder, model = base
    before, made = load(folder)[0](IDS)[0], changed(folder, model)
    save_model(tmp_path / "change", made, ByteTokenizer(), template="{{ eos_token }}")
    want = made(IDS)[0]
    assert (want - before).abs().max() > 0.01
    assert (tmp_path / "change" / "model.safetensors").stat().st_size < (
        folder / "model.safetensors"
    ).stat().st_size / 2
    for found, tokenizer in (load(tmp_path / "change"), load(folder, adapter=tmp_path / "change")):
        same(found(IDS)[0], want, 1e-5)
        assert adapter_of(found) is None and tokenizer.vocab_size == 257
        assert all(p.requires_grad for p in found.parameters())
    same(load(folder)[0](IDS)[0], before, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_merged_weights(name, same):
    made = changed("", build(CONFIGS[name]).double(), hashed=False)
    adapter = adapter_of(made)
    batch = Batch(IDS[:, :-1], IDS[:, 1:], None, None)
    language_modelling(made, batch, None)[0].backward()
    named = {of: p.detach() for of, p in made.named_parameters()}
    weights = {of.replace(".layer.", "."): p for of, p in named.items() if "lora" not in of}
    changes = {of: p for of, p in named.items() if "lora" in of}
    plain = build(CONFIGS[name]).double()
    plain.load_state_dict(merged(weights, changes, adapter), strict=False)  # a tied head has no name of its own
    language_modelling(plain, batch, None)[0].backward()
    full = {of: p.grad for of, p in plain.named_parameters()}
    layers = {of: m for of, m in made.named_modules() if isinstance(m, LoRA)}
    assert {of.rpartition(".")[2] for of in layers} == {*adapter.targets, "head"}
    for of, layer in layers.items():
        if of != "head" or not plain.config.tie_embeddings:
            whole = full[f"{of}.weight"]
            # the merged weights went through float32
            same(layer.lora_b.grad, adapter.scale * whole @ layer.lora_a.T, 1e-4)
            same(layer.lora_a.grad, adapter.scale * layer.lora_b.T @ whole, 1e-4)
    assert all(p.grad is None for p in made.parameters() if not p.requires_grad)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_a_quantised_model(name, bits, asymmetric, tmp_path, same):
    """QLoRA: gradients and logits are those of the same adapter on the floats that the integers stand for."""
    if asymmetric and bits == 8:
        return  # minimums are of 4 bits
    folder = tmp_path / "base"
    save_model(folder, quantize(build(CONFIGS[name]), bits, asymmetric=asymmetric))
    base = load(folder, dtype="float32")[0]
    floats = build(CONFIGS[name])
    floats.load_state_dict(float_tensors(base), strict=False)  # a tied head has no name of its own
    made, plain = (changed(folder, model.train()) for model in (base, floats))
    assert adapter_of(made) == adapter_of(plain) and quantization_of(made)
    plain.load_state_dict({of: p for of, p in made.state_dict().items() if "lora" in of}, strict=False)
    batch = Batch(IDS[:, :-1], IDS[:, 1:], None, None)
    for model in (made, plain):
        language_modelling(model, batch, None)[0].backward()
    grads = [{of: p.grad for of, p in model.named_parameters() if "lora" in of} for model in (made, plain)]
    for of, grad in grads[1].items():
        same(grads[0][of], grad, 1e-5)
    assert all(p.grad is None for p in made.parameters() if not p.requires_grad)
    save_model(tmp_path / "change", made, ByteTokenizer())
    with torch.no_grad():
        want = made.eval()(IDS)[0]
        for found, _ in (
            load(tmp_path / "change", dtype="float32"),
            load(folder, dtype="float32", adapter=tmp_path / "change"),
        ):
            same(found(IDS)[0], want, 1e-5)
            assert not quantization_of(found)
        assert load(tmp_path / "change")[0].dtype == torch.bfloat16
        assert quantization_of(load(tmp_path / "change", weights="int4")[0]).bits == 4


def test_a_shipped_model_is_remembered_by_its_name(tmp_path, monkeypatch):
    """Its folder differs from one installation to the next; a path is remembered from the root."""
    folder = ModelFolder.open("novels")
    adapter = adapter_for(folder.model(), folder, 4, 8.0, "q_proj")
    assert adapter.base == "novels"
    save_model(tmp_path / "change", with_adapter(folder.model(), adapter), folder.tokenizer)
    assert ModelFolder.open(tmp_path / "change").base.path == folder.path
    monkeypatch.chdir(tmp_path)
    save_model("own", build(CONFIGS["retnet"]))
    own = ModelFolder.open("own")
    assert adapter_for(own.model(), own, 3, 6.0, "q_proj").base == str(tmp_path / "own")


def test_products_of_integers_keep_no_floats(same):
    """The backward pass converts the integers again, in bfloat16 as well."""
    layer = quantize(build(CONFIGS["retnet"]), 8).blocks[0].retention.q_proj
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 32, dtype=dtype, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t):
            y = layer(x)
        assert (32, 32) not in kept
        y.square().sum().backward()
        want = (2 * y.detach() @ layer.floats().to(dtype)).float()
        assert x.grad.dtype == dtype
        same(x.grad.float(), want, 1e-6)


def test_what_does_not_belong_together(tmp_path, refuses):
    folder = tmp_path / "base"
    save_model(folder, build(CONFIGS["retnet"]))
    save_model(tmp_path / "change", changed(folder, load(folder)[0]))
    save_model(tmp_path / "other", build(CONFIGS["retnet"]))
    with refuses(f"this adapter was trained on {folder}, not on {tmp_path / 'other'}; pass {folder}"):
        load(tmp_path / "other", adapter=tmp_path / "change")
    with refuses(f"{folder} is a model, not an adapter"):
        load(folder, adapter=folder)
    save_model(tmp_path / "small", quantize(build(CONFIGS["retnet"]), 8))
    with refuses(f"this adapter was trained on {folder}, not on {tmp_path / 'small'}; pass {folder}"):
        load(tmp_path / "small", adapter=tmp_path / "change")
    shutil.move(folder, tmp_path / "moved")
    with refuses("is an adapter of the model at", FileNotFoundError):
        load(tmp_path / "change")
    assert load(tmp_path / "moved", adapter=tmp_path / "change")
    save_model(folder, build(CONFIGS["retnet"]))
    with refuses(f"{folder} has changed since this adapter was trained on it; pass the model as it was then"):
        load(tmp_path / "change")
    (tmp_path / "change" / "config.json").write_text(
        (tmp_path / "change" / "config.json").read_text().replace('"rank": 3', '"rank": 0')
    )
    with refuses("describes no adapter of this version (the rank of an adapter must be at least 1, got 0)"):
        load(tmp_path / "change")


def test_targets_that_are_none(refuses):
    model = build(CONFIGS["retnet"])
    with refuses("an adapter's targets must be all or among decay_proj, down_proj"):
        targets_of(model, "q_proj,heads", 2)
    with refuses("a change of rank 64 is as large as what it changes (all): take a smaller rank"):
        targets_of(model, "all", 64)
