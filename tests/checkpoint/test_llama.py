"""Layout of Llama, Mistral, Qwen2, Qwen3: logits of the transformers library, both directions, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from retentive.checkpoint import ModelFolder, load, save_model
from retentive.checkpoint.quantize import quantize
from retentive.infer.generate import generate
from retentive.models import build, retnet, transformer
from retentive.native import NativeModel
from retentive.ops.rotary import frequencies, phases

SMALL = dict(
    vocab_size=61, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=80, max_position_embeddings=512, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""Rope scaling of Llama 3.1 for a first training on texts so short that all three kinds of angles are among those of
12 features."""
MODELS = {
    "llama": dict(rope_theta=500_000.0),
    "llama-tied-all-heads": dict(tie_word_embeddings=True, num_key_value_heads=4),
    "llama-wide-heads": dict(head_dim=20),
    "mistral": dict(sliding_window=None),
    "mistral-window": dict(sliding_window=9),
    "llama-biases": dict(attention_bias=True),
    "llama-linear": dict(rope={"rope_type": "linear", "factor": 4.0}),
    "llama-llama3": dict(rope=LLAMA3),
    "qwen2-linear": dict(rope={"rope_type": "linear", "factor": 2.5}),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen2-window": dict(use_sliding_window=True, sliding_window=9, max_window_layers=0),
    "qwen3": dict(head_dim=16, use_sliding_window=False),
}


@pytest.fixture(scope="module", params=MODELS)
def theirs(request, tmp_path_factory):
    """(the library's model, its folder)"""
    transformers = pytest.importorskip("transformers")
    kind = request.param.partition("-")[0]
    name = kind.capitalize()
    fields = dict(SMALL, **MODELS[request.param])
    theta, rope = fields.pop("rope_theta", 10_000.0), fields.pop("rope", {"rope_type": "default"})
    config = getattr(transformers, f"{name}Config")(**fields)
    if hasattr(config, "rope_parameters"):  # from version 5 on
        config.rope_parameters = {**rope, "rope_theta": theta}
    else:
        config.rope_theta, config.rope_scaling = theta, rope if rope["rope_type"] != "default" else None
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # initial gains are all 1
        for norm in (x for n, x in model.named_parameters() if n.endswith("norm.weight")):
            norm.uniform_(0.5, 1.5)
        for bias in (x for n, x in model.named_parameters() if n.endswith("bias") and "o_proj" not in n):  # they are 0
            bias.uniform_(-1, 1)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_logits_are_the_librarys(theirs, same):
    model, folder = theirs
    ours, tokenizer = load(folder)
    ids = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    assert ModelFolder.open(folder).layout == "llama" and tokenizer is None
    same(ours.double()(ids)[0], model.double()(ids).logits, 1e-6)  # its norms and angles are float32
    model.float()


@torch.no_grad()
@pytest.mark.parametrize("rope", [LLAMA3, LLAMA3 | {"rope_type": "linear"}], ids=lambda rope: rope["rope_type"])
def test_angles_are_the_librarys_beyond_the_original_length(rope, tmp_path, same):
    """At positions up to 100,000 of 128 features, as in Llama 3.1; its angles are float32, so that theirs are off."""
    transformers = pytest.importorskip("transformers")
    rope = rope | {"original_max_position_embeddings": 8192, "rope_theta": 500_000.0}
    fields = SMALL | dict(head_dim=128, max_position_embeddings=131_072)
    config = transformers.LlamaConfig(**fields, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    theirs = transformers.LlamaForCausalLM(config).model.rotary_emb.inv_freq
    c = ModelFolder.open(tmp_path).config.attention
    ours = frequencies(128, c.rotary, base=c.rotary_base, scaling=c.rotary_scaling)
    assert c.rotary_scaling.kind == rope["rope_type"]
    plain = frequencies(128, c.rotary, base=c.rotary_base)
    assert len((plain / ours).round(decimals=3).unique()) > (1 if c.rotary_scaling.original else 0)
    same(theirs.double() / ours, torch.ones(64).double(), 1e-6)  # some roundings of float32
    at = torch.tensor([8191, 8192, 40_000, 100_000])
    cos, sin = phases(at, 128, c.rotary, base=c.rotary_base, scaling=c.rotary_scaling)
    angle = at[:, None] * theirs.double()
    same((cos, sin), (angle.cos().float(), angle.sin().float()), 1e-6 * float(angle.max()))


@torch.no_grad()
def test_they_decode_in_c_and_in_integers(theirs, same):
    _, folder = theirs
    model, _ = load(folder)
    ids = torch.randint(61, (1, 30), generator=torch.Generator().manual_seed(1))
    want = model(ids)[0]
    native = NativeModel(model)
    logits, state = native(ids[:, :20])
    parts = [logits]
    for t in range(20, 30):
        logits, state = native(ids[:, t : t + 1], state)
        parts.append(logits)
    same(torch.cat(parts, 1), want, 1e-4)
    low = quantize(model, 8)
    assert generate(NativeModel(low), ids[0].tolist(), max_tokens=5)


@torch.no_grad()
def test_our_folder_goes_back_to_theirs(theirs, tmp_path, same):
    transformers = pytest.importorskip("transformers")
    model, folder = theirs
    ours, _ = load(folder)
    save_model(tmp_path, ours, layout="llama")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).double().eval()
    ids = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    same(again(ids).logits, model.double()(ids).logits, 1e-10)
    model.float()


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("llama", (0, 4, 12)), ("mistral", (4096, 8, 12)), ("qwen2", (0, 32, 12)), ("qwen3", (0, 32, 128))],
)
def test_missing_fields_have_the_librarys_defaults(kind, wanted, tmp_path):
    heads = 4 if kind == "llama" else 32
    fields = {n: x for n, x in SMALL.items() if n != "num_key_value_heads"}
    fields |= {"model_type": kind, "num_attention_heads": heads, "hidden_size": 12 * heads}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    attention = ModelFolder.open(tmp_path).config.attention
    assert (attention.slots, attention.kv_heads, attention.head_dim) == wanted


REFUSED = {
    "scaled": (dict(rope_scaling={"rope_type": "yarn", "factor": 8.0}), "rope scaling 'yarn'"),
    "old-scaled": (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope scaling 'dynamic'"),
    "scaled-by-nothing": (dict(rope_scaling={"type": "linear"}), "it has no 'factor'"),
    "scaled-by-0": (dict(rope_scaling={"type": "linear", "factor": 0}), "rotary_scaling needs a factor above 0"),
    "half-of-the-features": (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 (supported: 1.0)"),
    "biases": (
        dict(model_type="mistral", attention_bias=True, mlp_bias=True),
        "attention_bias=True (supported: False), mlp_bias=True",
    ),
    "last-layers": (
        dict(model_type="qwen2", use_sliding_window=True, max_window_layers=1),
        "layer_types full_attention, sliding_attention (supported: one)",
    ),
    "activation": (dict(hidden_act="relu"), "hidden_act='relu' (supported: silu, swish, gelu)"),
    "layers-differ": (
        dict(
            model_type="qwen3",
            use_sliding_window=True,
            layer_types=["full_attention", "sliding_attention"],
            sliding_window=9,
        ),
        "layer_types full_attention, sliding_attention (supported: one)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(name, tmp_path, refuses):
    changes, words = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, **changes}))
    with refuses(words):
        ModelFolder.open(tmp_path)


def test_a_bias_of_the_output_projection_is_refused_unless_it_is_zero(tmp_path, refuses):
    model = build(transformer(vocab_size=61, dim=48, layers=1, heads=4, qkv_bias=True))
    save_model(tmp_path, model, layout="llama")
    file, name = tmp_path / "model.safetensors", "model.layers.0.self_attn.o_proj.bias"
    tensors = load_file(file)
    save_file(tensors | {name: torch.zeros(48)}, file)
    load(tmp_path)
    save_file(tensors | {name: torch.eye(48)[3]}, file)
    with refuses(f"{name} is not zero"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [(retnet(vocab_size=9, dim=16, layers=2, heads=2), "llama has attention only"),
     (transformer(vocab_size=9, dim=16, layers=2, heads=2, forget_gate=True), "forget_gate=False (this model: True)"),
     (transformer(vocab_size=9, dim=16, layers=2, heads=2, attention_window=4, attention_sinks=2), "sinks=0"),
     (transformer(vocab_size=9, dim=16, layers=2, heads=2, qk_norm=True, qkv_bias=True), "qkv_bias=False")],
)  # fmt: skip
def test_what_it_cannot_express_is_named(config, words, tmp_path, refuses):
    with refuses(words):
        save_model(tmp_path / "made", build(config), layout="llama")
    assert not (tmp_path / "made").exists()
