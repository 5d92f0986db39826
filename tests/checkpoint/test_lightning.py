"""HypeNet and MiniCPM-SALA against their papers' equations, token by token in float64, on random weights."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import retentive
from retentive.checkpoint.lightning import slopes
from retentive.native import with_engine

VOCAB, D, F, T, THETA, EPS = 61, 48, 80, 40, 10_000.0, 1e-6
COMMON = dict(
    vocab_size=VOCAB, hidden_size=D, intermediate_size=F, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    rms_norm_eps=EPS, hidden_act="silu", rope_theta=THETA, lightning_nh=6, lightning_head_dim=8,
    lightning_use_rope=True,
)  # fmt: skip
HYPENET = COMMON | dict(
    model_type="hypenet", mixer_types=["lightning-attn", "attn", "lightning-attn"], tie_word_embeddings=True,
    lightning_nkv=6, lightning_use_qk_norm=True, lightning_use_output_norm=True, lightning_use_output_gate=True,
    attn_use_rope=False, attn_use_output_gate=True, attn_logits_scaling="log 50",
)  # fmt: skip
SALA = COMMON | dict(
    model_type="minicpm_sala", mixer_types=["minicpm4", "lightning", "lightning_attn", "minicpm4"], lightning_nkv=3,
    qk_norm=True, use_output_gate=True, use_output_norm=True, attn_use_rope=False, attn_use_output_gate=True,
    scale_emb=12.0, scale_depth=1.4, mup_denominator=32, dim_model_base=16,
)  # fmt: skip
CONFIGS = {"hypenet": HYPENET, "sala": SALA}


def written(folder, config):
    """A folder of this layout with random weights, which are returned in float64."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, D) * 0.3, "model.norm.weight": 1 + 0.2 * torch.randn(D)}
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = torch.randn(VOCAB, D) * 0.3

    def matrix(name, rows, columns):
        tensors[f"{name}.weight"] = torch.randn(rows, columns) * columns**-0.5

    def gain(name, width):
        tensors[f"{name}.weight"] = 1 + 0.2 * torch.randn(width)

    for i, kind in enumerate(config["mixer_types"]):
        at, light = f"model.layers.{i}", kind.startswith("lightning")
        H, kv, K = (6, config["lightning_nkv"], 8) if light else (4, 2, 16)
        for name, rows, columns in (("q", H * K, D), ("k", kv * K, D), ("v", kv * K, D), ("o", D, H * K)):
            matrix(f"{at}.self_attn.{name}_proj", rows, columns)
        matrix(f"{at}.self_attn.{'z_proj' if light else 'o_gate'}", H * K, D)
        if light or config["model_type"] == "hypenet":
            gain(f"{at}.self_attn.q_norm", K)
            gain(f"{at}.self_attn.k_norm", K)
        if light:
            gain(f"{at}.self_attn.o_norm", H * K)
        for name, rows, columns in (("gate", F, D), ("up", F, D), ("down", D, F)):
            matrix(f"{at}.mlp.{name}_proj", rows, columns)
        gain(f"{at}.input_layernorm", D)
        gain(f"{at}.post_attention_layernorm", D)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(config["mixer_types"])}))
    save_file(tensors, folder / "model.safetensors")
    return {name: x.double() for name, x in tensors.items()}


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def turned(x, t):
    """x `[heads, K]` at position t, halves paired."""
    half = x.shape[-1] // 2
    angle = t * THETA ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def reference(w, config, ids):
    """Logits, token by token."""
    sala = config["model_type"] == "minicpm_sala"
    depth = 1.4 / math.sqrt(32) if sala else 1.0
    memories = [None] * len(config["mixer_types"])
    out = []
    for t, id in enumerate(ids):
        x = w["model.embed_tokens.weight"][id] * (12.0 if sala else 1.0)
        for i, kind in enumerate(config["mixer_types"]):
            own, light = (
                {n.split(f"layers.{i}.")[1]: p for n, p in w.items() if f"layers.{i}." in n},
                "lightning" in kind,
            )
            H, kv, K = (6, config["lightning_nkv"], 8) if light else (4, 2, 16)
            y = rms(x, own["input_layernorm.weight"])
            q, k, v = ((own[f"self_attn.{n}_proj.weight"] @ y).view(-1, K) for n in "qkv")
            if "self_attn.q_norm.weight" in own:
                q, k = rms(q, own["self_attn.q_norm.weight"]), rms(k, own["self_attn.k_norm.weight"])
            if light:
                q, k = turned(q, t), turned(k, t)
            k, v = (z.repeat_interleave(H // kv, 0) for z in (k, v))
            if light:
                first = torch.zeros(H, K, K).double() if memories[i] is None else memories[i]
                fading = torch.tensor([math.exp(-slope) for slope in slopes(H)], dtype=torch.float64)[:, None, None]
                memories[i] = fading * first + k[:, :, None] * v[:, None]
                o = torch.einsum("hk,hkv->hv", q, memories[i]) * K**-0.5
                o = rms(o.flatten(), own["self_attn.o_norm.weight"])
                o = o * torch.sigmoid(own["self_attn.z_proj.weight"] @ y)
            else:
                memories[i] = [*(memories[i] or []), (k, v)]
                keys, values = (torch.stack(z) for z in zip(*memories[i], strict=True))
                if config.get("attn_logits_scaling"):
                    q = q * math.log(t + 50) / math.log(50)
                weight = torch.softmax(torch.einsum("hk,thk->ht", q, keys) * K**-0.5, -1)
                o = torch.einsum("ht,thk->hk", weight, values).flatten()
                o = o * torch.sigmoid(own["self_attn.o_gate.weight"] @ y)
            x = x + depth * (own["self_attn.o_proj.weight"] @ o)
            y = rms(x, own["post_attention_layernorm.weight"])
            gate, up = own["mlp.gate_proj.weight"] @ y, own["mlp.up_proj.weight"] @ y
            x = x + depth * (own["mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up))
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        out.append(head @ (rms(x, w["model.norm.weight"]) / (D / 16 if sala else 1.0)))
    return torch.stack(out)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_the_equations(name, tmp_path, same):
    w = written(tmp_path / "theirs", CONFIGS[name])
    ids = torch.randint(VOCAB, (T,))
    want = reference(w, CONFIGS[name], ids.tolist())
    model, _ = retentive.load(tmp_path / "theirs", dtype="float64")
    # float64, but for SALA's constants in the float32 weights
    close = 1e-12 if name == "hypenet" else 1e-7
    same(model(ids[None])[0][0], want, close)
    state, parts = None, []
    for part in ids[None].split([17, 1, 1, T - 19], 1):
        logits, state = model(part, state)
        parts.append(logits[0])
    same(torch.cat(parts), want, close)
    lengths = torch.tensor([[7, 7 + T], [0, T]])  # padded on the left, and on the right
    padded = torch.stack((torch.cat((ids[:7], ids)), torch.cat((ids, ids[:7]))))
    logits, _ = model(padded, lengths=lengths)
    same(torch.stack((logits[0, 7:], logits[1, :T])), torch.stack((want, want)), close)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_saved_as_ours_and_for_transformers(name, tmp_path, same):
    written(tmp_path / "theirs", CONFIGS[name])
    model, _ = retentive.load(tmp_path / "theirs")
    retentive.checkpoint.save_model(tmp_path / "ours", model)
    again, _ = retentive.load(tmp_path / "ours")
    assert again.config == model.config
    same(list(again.parameters()), list(model.parameters()), 0)
    ids = torch.randint(VOCAB, (2, T))
    pytest.importorskip("transformers", minversion="5.16", reason="needs pip install 'retentive[hf]'")
    from tests.hf.conftest import theirs_of

    same(theirs_of(model)(ids).logits, model(ids)[0], 1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_c_engine_runs_them(name, tmp_path, same):
    written(tmp_path / "theirs", CONFIGS[name])
    model, _ = retentive.load(tmp_path / "theirs")
    ids = torch.randint(VOCAB, (2, T))
    native = with_engine(model, "auto")
    if native is model:
        pytest.skip("needs a C compiler")
    same(native(ids)[0], model(ids)[0], 1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lightning_use_short_conv=True), "lightning_use_short_conv=True (supported: False)"),
        (
            dict(lightning_scale="1/d", hidden_act="gelu"),
            "hidden_act='gelu' (supported: 'silu'), lightning_scale='1/d'",
        ),
        (dict(mixer_types=["attn", "mamba", "gdn"]), "mixers of gdn, mamba are not supported"),
        (dict(attn_logits_scaling=1.5), "attn_logits_scaling=1.5 (supported: a text with a number, or null)"),
    ],
)
def test_what_is_not_supported_is_named(changes, message, tmp_path, refuses):
    written(tmp_path / "theirs", HYPENET)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(HYPENET | changes))
    with refuses(message):
        retentive.load(tmp_path / "theirs")


def test_slopes_of_numbers_that_are_no_powers_of_two():
    assert slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
