"""Model folders: saved models come back, in three layouts; damaged or unknown folders are refused in one line."""

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import retentive
from retentive.checkpoint import ModelFolder, fla, save_model, torchscale
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import ARCHITECTURES, build, retnet, transformer
from retentive.sampling import SamplingParams
from tests.configs import changed, hybrid

SMALL = dict(vocab_size=31, dim=24, layers=2, heads=2)
OURS = {
    "retnet": retnet(**SMALL),
    "tied": retnet(**SMALL, tie_embeddings=True),
    "own-decays": retnet(**SMALL, decay=(-0.3, -0.1), embed_norm=True, final_norm=False, dropout=0.1),
    "decay-bias": retnet(**SMALL, decay_bias=True, gate=False, head_norm=True, head_norm_affine=True),
    "all-new": retnet(**SMALL, qk_norm=True, qk_bias=True, gate_activation="sigmoid", decay_scale=4.0),
    "transformer": transformer(**SMALL, kv_heads=1),
    "transformer-tied": transformer(**SMALL, tie_embeddings=True),
    "transformer-window": transformer(
        **SMALL, attention_window=4, forget_gate=True, qk_norm=True, rotary="interleaved"
    ),
    "hybrid-window": hybrid(**SMALL, attention_every=2, attention_window=4, attention_rotary="none"),
}
PAPER = retnet(**SMALL, **ARCHITECTURES["retnet-paper"])
TORCHSCALE = changed(PAPER, decay="paper", embed_norm=True, embed_scale=True, activation="gelu", norm_eps=1e-5)
FLA = changed(PAPER, decay="paper", rotary="half", score_norm=False, head_norm_affine=True)
FOREIGN = {
    "torchscale": ("torchscale", TORCHSCALE),
    "torchscale-tied": ("torchscale", changed(TORCHSCALE, tie_embeddings=True, embed_norm=False)),
    "torchscale-no-final-norm": ("torchscale", changed(TORCHSCALE, final_norm=False, dropout=0.1)),
    "syncdoth": ("syncdoth", TORCHSCALE),
    "syncdoth-lm-tied": ("syncdoth", changed(TORCHSCALE, decay="lm", tie_embeddings=True)),
    "fla": ("fla", FLA),
    "fla-tied": ("fla", changed(FLA, tie_embeddings=True)),
    "fla-kv-heads": ("fla", changed(FLA, heads=4, kv_heads=2)),
    "fla-no-gate": ("fla", changed(FLA, gate=False)),
    "fla-no-affine": ("fla", changed(FLA, head_norm_affine=False)),
    "fla-key-dim": ("fla", changed(FLA, key_dim=12, value_dim=40, ffn_dim=17)),
}


def names(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def round_trip(tmp_path, same):
    """The model that `save_model` in a layout and `load` give back; names, tensors and logits are the same."""

    def trip(model, layout="retentive", tokenizer=None):
        save_model(tmp_path / "new" / "model", model, tokenizer, layout=layout)
        loaded, loaded_tokenizer = retentive.load(tmp_path / "new" / "model")
        assert loaded.config == model.config and not loaded.training
        have, want = dict(loaded.named_parameters()), dict(model.named_parameters())
        assert list(have) == list(want)
        same(list(have.values()), list(want.values()), 0)
        ids = torch.randint(31, (2, 9))
        same(loaded(ids)[0], model.eval()(ids)[0], 0)
        return loaded, loaded_tokenizer

    return trip


@pytest.mark.parametrize("name", OURS)
def test_our_layout_brings_back_every_kind(name, round_trip, tmp_path):
    model = build(OURS[name])
    loaded, tokenizer = round_trip(model)
    assert tokenizer is None and names(tmp_path / "new" / "model") == {"config.json", "model.safetensors"}
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert (loaded.head.weight is loaded.embed.weight) == model.config.tie_embeddings


@pytest.mark.parametrize("name", FOREIGN)
def test_their_layouts_bring_back_what_they_can_express(name, round_trip, tmp_path):
    layout, config = FOREIGN[name]
    if layout == "fla":  # dropout is no field of its
        config = replace(config, dropout=0.0)
    round_trip(build(config), layout)
    folder = ModelFolder.open(tmp_path / "new" / "model")
    assert (folder.config, folder.layout) == (config, layout)


def test_the_dtype_is_that_of_the_file_or_the_one_asked_for(round_trip, tmp_path):
    loaded, _ = round_trip(build(OURS["retnet"]).bfloat16())
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    wide, _ = retentive.load(tmp_path / "new" / "model", dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


def test_a_tokenizer_travels_along(round_trip):
    _, tokenizer = round_trip(build(OURS["retnet"]), tokenizer=ByteTokenizer())
    assert tokenizer.encode("añ") == ByteTokenizer().encode("añ")


PARITY = ["torchscale-parallel-swish", "torchscale-parallel-gelu-tied", "fla-default", "fla-kv-heads", "fla-tied"]


@pytest.mark.parametrize("name", PARITY)
def test_a_foreign_folder_saved_again_holds_the_same_tensors(name, parity, tmp_path, same):
    layout = name.split("-")[0]
    model, _ = retentive.load(parity / name)
    save_model(tmp_path, model, layout=layout)
    have, want = load_file(tmp_path / "model.safetensors"), load_file(parity / name / "model.safetensors")
    assert sorted(have) == sorted(want)
    for key, x in want.items():
        # torchscale's own angles and decays are built in float32: pow and log are some last places (6e-8) off
        same(have[key], x, 1e-6 if key.startswith("retnet_rel_pos.") else 0, key)
    have, want = (json.loads((d / "config.json").read_text(encoding="utf-8")) for d in (tmp_path, parity / name))
    # of the fields that we write, fla's file may leave one open that we know (intermediate_size null)
    assert {k: v for k, v in want.items() if k in have and v is not None and v != have[k]} == {}
    found, theirs = ModelFolder.open(tmp_path), ModelFolder.open(parity / name)
    assert (found.config, found.layout) == (theirs.config, theirs.layout)


@torch.no_grad()
def test_syncdoths_names_are_torchscales_with_a_prefix(parity, tmp_path, same):
    """As its own convert_weights.py makes them of torchscale's."""
    theirs = parity / "torchscale-parallel-swish"
    tensors = load_file(theirs / "model.safetensors")
    renamed = {f"model.{name}": x for name, x in tensors.items()}
    renamed["lm_head.weight"] = renamed.pop("model.output_projection.weight")
    save_file(renamed, tmp_path / "model.safetensors")
    raw = json.loads((theirs / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": "retnet", "use_glu": True}), encoding="utf-8")
    ids = torch.randint(raw["vocab_size"], (1, 20))
    assert ModelFolder.open(tmp_path).layout == "syncdoth"
    same(retentive.load(tmp_path)[0](ids)[0], retentive.load(theirs)[0](ids)[0], 0)


def test_an_old_fused_fla_folder_is_saved_again_in_todays_layout(parity, tmp_path, same):
    model, _ = retentive.load(parity / "fla-old-fused")
    save_model(tmp_path, model, layout="fla")
    have, want = load_file(tmp_path / "model.safetensors"), load_file(parity / "fla-default" / "model.safetensors")
    assert sorted(have) == sorted(want)
    same([have[key] for key in want], list(want.values()), 0)


def test_fields_left_out_have_the_other_projects_defaults():
    """fla: its 1.3B is its default config. torchscale: the defaults of its RetNetConfig at commit 4d1e0e8."""
    assert fla.read_config({"model_type": "retnet", "hidden_size": 2048}) == retnet("fla-1.3b", vocab_size=32000)
    sizes = dict(dim=768, layers=12, heads=3, value_dim=1280 + 16, ffn_dim=1280, activation="gelu", decay="paper")
    sizes |= dict(score_norm=True, head_norm=True, qk_norm=False)
    raw = {"vocab_size": 100, "decoder_retention_heads": 3, "decoder_value_embed_dim": 1296}
    assert torchscale.read_config(raw) == retnet(vocab_size=100, **sizes)


# widths for which dim * (value_dim / dim) falls below value_dim in floating point: fla takes int() of the product
@pytest.mark.parametrize(("dim", "value_dim"), [(344, 456), (376, 496), (688, 912)], ids=str)
def test_flas_ratios_of_widths_survive_the_division(dim, value_dim, tmp_path):
    config = changed(FLA, dim=dim, key_dim=dim, value_dim=value_dim, ffn_dim=8, layers=1)
    save_model(tmp_path, build(config), layout="fla")
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert int(raw["hidden_size"] * raw["expand_v"]) == value_dim
    assert ModelFolder.open(tmp_path).config == config


def shard(folder) -> None:
    """The folder's one file as two, with the index that names them, as Hugging Face writes large models."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for n, part in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        file = f"model-0000{n}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.fixture
def saved(tmp_path):
    """A model, and the folder it was saved to."""
    model = build(OURS["retnet"]).eval()
    save_model(tmp_path / "model", model)
    return model, tmp_path / "model"


def test_shards_are_read_by_their_index(saved, same):
    model, folder = saved
    shard(folder)
    loaded, _ = retentive.load(folder)
    same(dict(loaded.named_parameters())["head.weight"], model.head.weight, 0)
    same(list(loaded.parameters()), list(model.parameters()), 0)


def test_saved_over_shards_the_new_weights_count(saved, same):
    _, folder = saved
    shard(folder)
    new = build(OURS["retnet"])
    save_model(folder, new)
    same(list(retentive.load(folder)[0].parameters()), list(new.parameters()), 0)


def test_a_missing_shard_is_named(saved, refuses):
    _, folder = saved
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with refuses("holds no model-00002-of-00002.safetensors", FileNotFoundError):
        retentive.load(folder)


@pytest.mark.parametrize("text", ["{", '{"metadata": {}}', "[]"], ids=["cut", "no-map", "list"])
def test_a_broken_index_is_named(text, saved, refuses):
    _, folder = saved
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with refuses("model.safetensors.index.json"):
        retentive.load(folder)


def test_nothing_there(tmp_path, refuses):
    with refuses(f"no model folder at {tmp_path}/none", FileNotFoundError):
        retentive.load(tmp_path / "none")
    with refuses("holds no config.json", FileNotFoundError):
        retentive.load(tmp_path)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with refuses("is a file; expected a model folder"):
        retentive.load(tmp_path / "file")


def test_arguments_of_the_wrong_type(saved, refuses):
    with refuses("path must name a model folder, got int", TypeError):
        retentive.load(5)
    for dtype in (torch.int8, "int8", "half", 16):
        with refuses("'`: expected one of float32, bfloat16, float16, float64"):
            retentive.load(saved[1], dtype=dtype)
    assert retentive.load(saved[1], dtype="bfloat16")[0].dtype == torch.bfloat16
    with refuses("`weights='int3'`: expected one of stored, int8, int4"):
        retentive.load(saved[1], weights="int3")


@pytest.mark.parametrize(
    ("said", "want"),
    [
        (None, None),
        ('{"eos_token_id": 2}', None),
        ('{"temperature": 0.6, "top_k": 20, "top_p": 0.95}', SamplingParams(temperature=0.6, top_k=20, top_p=0.95)),
        ('{"do_sample": false, "temperature": 0.6}', SamplingParams(temperature=0)),
        ('{"do_sample": false}', None),
    ],
    ids=str,
)
def test_the_sampling_that_a_model_recommends(said, want, saved):
    _, saved = saved
    if said is not None:
        (saved / "generation_config.json").write_text(said)
    assert ModelFolder.open(saved).sampling == want


@pytest.mark.parametrize("said", ["[", "[]", '{"temperature": "hot"}', '{"top_p": 7}'])
def test_a_recommendation_that_is_damaged(said, saved, refuses):
    _, saved = saved
    (saved / "generation_config.json").write_text(said)
    with refuses("generation_config.json"):
        _ = ModelFolder.open(saved).sampling


def test_config_json_is_read_once_and_by_one_file(saved, monkeypatch):
    """Opened once, a folder gives model, tokenizer and template without another look at it."""
    _, path = saved
    folder = ModelFolder.open(path)
    assert ModelFolder.open(folder) is folder
    (path / "config.json").unlink()
    model = folder.model(weights="int8")
    assert model.config == folder.config and folder.template_source is None
    readers = [
        f for f in Path(retentive.__file__).parent.rglob("*.py") if '"config.json").read' in f.read_text("utf-8")
    ]
    assert readers == []  # nobody but `folder.py`, by its own helper


def test_a_flipped_bit_of_float_weights_is_found(saved, refuses):
    _, path = saved
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with refuses("model.safetensors is damaged: its bytes are not those that were written"):
        retentive.load(path)


def test_pickled_weights_are_never_loaded(saved, refuses):
    _, folder = saved
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    words = "holds no model.safetensors (it has pytorch_model.bin, but pickled weights are never loaded: convert them)"
    with refuses(words, FileNotFoundError):
        retentive.load(folder)


CONFIGS = {
    "cut-json": ('{"format": "retentive-mo', "is not JSON"),
    "list": ("[1, 2]", "expected a JSON object, got list"),
    "llama": (
        '{"model_type": "llama"}',
        "describes 'llama'; expected a RetNet (retentive, torchscale",
    ),
    "empty": ("{}", "describes 'nothing known'"),
    "unknown-field": ('{"format": "retentive-model-1", "kind": "retnet", "config": {"width": 3}}', "width"),
    "unknown-kind": (
        '{"format": "retentive-model-1", "kind": "rwkv", "config": {}}',
        'does not describe a model of this version: expected "kind" to be one of retnet, transformer, hybrid, got',
    ),
    "list-of-kinds": (
        '{"format": "retentive-model-1", "kind": [], "config": {}}',
        'expected "kind" to be one of',
    ),
    "list-of-fields": (
        '{"format": "retentive-model-1", "kind": "retnet", "config": []}',
        "to be its fields",
    ),
    "no-fields": ('{"format": "retentive-model-1", "kind": "retnet"}', "it has no 'config'"),
    "wrong-type": (
        '{"format": "retentive-model-1", "kind": "retnet", "config": {"dim": "3"}}',
        "model/config.json: dim must be a whole number, got '3'",
    ),
    "too-many": (
        '{"format": "retentive-model-1", "kind": "retnet", "config": {"layers": 1000000000}}',
        "layers must be at most 10,000",
    ),
    "not-a-number": (
        '{"format": "retentive-model-1", "kind": "retnet", "config": {"norm_eps": NaN}}',
        "norm_eps must be in [0, 1], got nan",
    ),
    "nested": ("[" * 100_000, "is not JSON"),
    "bad-value": ('{"format": "retentive-model-1", "kind": "retnet", "config": {"dim": 0}}', "dim must be at least 1"),
    "later-format": ('{"format": "retentive-model-3"}', "describes 'retentive-model-3'"),
    "no-blocks": ('{"format": "retentive-model-2", "config": {"vocab_size": 3, "dim": 4}}', "it has no 'blocks'"),
    "a-number-of-blocks": ('{"format": "retentive-model-2", "config": {"blocks": 3}}', "does not describe a model"),
    "unknown-block": (
        '{"format": "retentive-model-2", "config": {"blocks": [{"mixer": {"kind": "mamba"}, "ffn": {}}]}}',
        "unknown kind of block 'mamba', expected one of retention, attention",
    ),
    "too-many-blocks": (
        '{"format": "retentive-model-2", "config": {"blocks": [{"repeat": 1000000000, "mixer": {}, "ffn": {}}]}}',
        "layers must be at most 10,000",
    ),
    "torchscale-no-vocab": ('{"decoder_retention_heads": 2}', "does not describe a model"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_not_ours_or_broken(case, saved, refuses):
    _, folder = saved
    text, words = CONFIGS[case]
    (folder / "config.json").write_text(text, encoding="utf-8")
    with refuses(words):
        retentive.load(folder)


# one field of a foreign config that changes what the model computes, in a way that ours cannot
UNSUPPORTED = {
    "torchscale": [("deepnorm", True), ("moe_freq", 2), ("multiway", True), ("no_output_layer", True),
                   ("xpos_rel_pos", True)],
    "fla": [("feature_map", "relu"), ("attn", {"layers": [1], "num_heads": 4}), ("attnres_block_size", 64)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "field", "value"),
    [
        pytest.param(project, *case, id=f"{project}-{case[0]}")
        for project, cases in UNSUPPORTED.items()
        for case in cases
    ],
)
def test_foreign_architectures_that_ours_has_not(layout, field, value, tmp_path, refuses):
    save_model(tmp_path, build(FOREIGN[layout][1]), layout=layout)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {field: value}), encoding="utf-8")
    with refuses(f"{layout} config has {field}="):
        retentive.load(tmp_path)


@pytest.mark.parametrize("layout", ["torchscale", "fla"])
def test_all_reasons_are_said_at_once(layout, tmp_path, refuses):
    """A default run fits neither layout: a user who trains anew needs all reasons beforehand."""
    words = f"{layout} needs qk_norm=False (this model: True), head_norm=True (this model: False), "
    words += "decay='paper' (this model: 'gated')"
    if layout == "fla":
        words += ", rotary='half' (this model: 'interleaved')"
    with refuses(words):
        save_model(tmp_path / "model", build(OURS["retnet"]), layout=layout)


INEXPRESSIBLE = {
    "torchscale": [dict(decay="lm"), dict(rotary="half"), dict(score_norm=False), dict(head_norm=False),
                   dict(head_norm_affine=True), dict(gate=False), dict(ffn_gate=False), dict(kv_heads=1),
                   dict(key_dim=12), dict(qk_norm=True), dict(qk_bias=True), dict(gate_activation="sigmoid")],
    "fla": [dict(decay="lm"), dict(rotary="interleaved"), dict(score_norm=True), dict(head_norm=False),
            dict(ffn_gate=False), dict(embed_scale=True), dict(embed_norm=True), dict(final_norm=False),
            dict(activation="gelu"), dict(qk_norm=True), dict(qk_bias=True), dict(gate_activation="sigmoid")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "changes"),
    [pytest.param(p, c, id=f"{p}-{next(iter(c))}") for p, cases in INEXPRESSIBLE.items() for c in cases],
)
def test_what_the_other_project_cannot_express_is_named_and_nothing_written(layout, changes, tmp_path, refuses):
    model = build(changed(FOREIGN[layout][1], **changes))
    with refuses(f"{layout} needs {next(iter(changes))}="):
        save_model(tmp_path / "model", model, layout=layout)
    assert not (tmp_path / "model").exists()


def test_a_config_from_before_a_field_means_what_it_meant_then(tmp_path, same):
    """Whatever the field's default is now: the first ones knew the paper's RetNet only."""
    model = build(PAPER)
    save_model(tmp_path, model)
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    later = ("decay_range", "decay_scale", "decay_bias", "qk_norm", "qk_bias", "gate_activation")
    for left_out in (later, (*later, "decay", "score_norm", "head_norm", "head_norm_affine")):
        old = {name: value for name, value in raw["config"].items() if name not in left_out}
        (tmp_path / "config.json").write_text(json.dumps(raw | {"config": old}), encoding="utf-8")
        assert ModelFolder.open(tmp_path).config == PAPER
    same(list(retentive.load(tmp_path)[0].parameters()), list(model.parameters()), 0)


def test_the_twin_has_no_foreign_layout(tmp_path, refuses):
    with refuses("fla takes models of retention only, this is a Transformer"):
        save_model(tmp_path / "model", build(OURS["transformer"]), layout="fla")


@pytest.mark.parametrize("keep", [0, 5, 300, -1], ids=["empty", "5-bytes", "in-header", "one-byte-short"])
def test_weights_cut_short(keep, saved, refuses):
    _, folder = saved
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with refuses("is not a complete safetensors file"):
        retentive.load(folder)


@pytest.mark.parametrize("case", ["missing", "extra", "wrong-shape"])
def test_tensors_that_do_not_fit_the_config(case, saved, refuses):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    if case == "missing":
        del tensors["blocks.1.ffn.up_proj.weight"]
        words = "1 tensors missing ['blocks.1.ffn.up_proj.weight'], 0 unexpected []"
    elif case == "extra":
        tensors["blocks.2.ffn.up_proj.weight"] = torch.zeros(2)
        words = "0 tensors missing [], 1 unexpected ['blocks.2.ffn.up_proj.weight']"
    else:
        tensors["norm.weight"] = torch.ones(25)
        words = "norm.weight is [25], expected [24]"
    save_file(tensors, folder / "model.safetensors")
    with refuses(words):
        retentive.load(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_no_floating_numbers(dtype, saved, refuses):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    with refuses(f"norm.weight is {dtype}, expected floating numbers of 16 to 64 bits"):
        retentive.load(folder)


def test_weights_of_several_dtypes(saved, refuses, same):
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    tensors["blocks.0.ffn.up_proj.weight"] = tensors["blocks.0.ffn.up_proj.weight"].double()
    save_file(tensors, folder / "model.safetensors")
    with refuses("blocks.0.ffn.up_proj.weight is torch.float64): name one (`dtype`)"):
        retentive.load(folder)
    loaded, _ = retentive.load(folder, dtype=torch.float32)
    same(list(loaded.parameters()), list(model.parameters()), 0)


def test_gains_may_be_wider_than_matrices(saved):
    _, folder = saved
    tensors = {name: x.bfloat16() if x.ndim > 1 else x for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    loaded, _ = retentive.load(folder)
    assert loaded.dtype == torch.bfloat16 and loaded.norm.weight.dtype == torch.float32
    assert loaded(torch.randint(31, (1, 5)))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("vocab", [256, 257, 1280, 1281, 4096])
def test_a_tokenizer_must_be_the_models_by_its_size(vocab, tmp_path, refuses):
    """The byte tokenizer has 257 tokens. A model may have up to 1023 rows more, by rounding up, and no other size."""
    save_model(tmp_path, build(changed(OURS["retnet"], vocab_size=vocab)), ByteTokenizer())
    if vocab in (257, 1280):
        assert ModelFolder.open(tmp_path).tokenizer_for_text().vocab_size == 257
        return
    for named in (None, "bytes"):
        with refuses(f"the tokenizer has 257 tokens, the model {vocab:,}: they do not belong together"):
            ModelFolder.open(tmp_path).tokenizer_for_text(named)


@pytest.mark.parametrize("layout", ["torchscale", "fla"])
def test_a_tensor_that_a_foreign_layout_does_not_know(layout, tmp_path, refuses):
    save_model(tmp_path, build(FOREIGN[layout][1]), layout=layout)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"adapter.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    with refuses("unexpected tensor 'adapter.weight' [2, 3]"):
        retentive.load(tmp_path)


def test_a_name_of_the_hub_is_fetched(saved, monkeypatch, same):
    model, folder = saved
    asked = []

    def snapshot_download(repo, *, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded, _ = retentive.load("hf:someone/retnet-tiny")
    same(list(loaded.parameters()), list(model.parameters()), 0)
    assert asked == [("someone/retnet-tiny", ["*.json", "*.safetensors"])]  # never a pickle


def hub_errors() -> dict:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    return {
        "offline": LocalEntryNotFoundError("Cannot find the files in the cache.\nCheck your connection."),
        "connection": ConnectionError("no route to host\nsecond line"),
        "silent": ConnectionError(),
        "name": HFValidationError("Repo id must use alphanumeric chars\nor '-'"),
    }


@pytest.mark.parametrize("case", hub_errors())
def test_a_hub_that_does_not_answer_is_said_in_one_line(case, monkeypatch, refuses):
    def snapshot_download(repo, **_):
        raise hub_errors()[case]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with refuses("'someone/retnet-tiny' cannot be had from the Hugging Face hub", FileNotFoundError):
        retentive.load("hf:someone/retnet-tiny")


@pytest.mark.parametrize("path", ["a/b/c", "/none/here", "./none", "../none", "none", "runs/mien"])
def test_without_hf_the_hub_is_not_asked(path, monkeypatch, refuses):
    """A typo in a path must not fetch a stranger's model; the error names hf: if the hub may have been meant."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    hint = "; for the Hugging Face repository write hf:runs/mien" if path == "runs/mien" else ""
    with refuses(f"no model folder at {path}{hint}", FileNotFoundError):
        retentive.load(path)


@pytest.mark.parametrize("failing", ["weights", "config"])
def test_a_save_that_fails_leaves_the_old_model_and_no_other_file(failing, saved, monkeypatch, same):
    model, folder = saved
    before = names(folder)

    def full(*args, **_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file" if failing == "weights" else "json.dumps", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(folder, build(changed(OURS["retnet"], layers=3)))
    monkeypatch.undo()
    assert names(folder) == before
    same(list(retentive.load(folder)[0].parameters()), list(model.parameters()), 0)


def test_a_model_in_use_outlives_its_folder(saved, same):
    """Weights are read into memory, not mapped: a folder may be replaced or deleted under a running model."""
    model, folder = saved
    loaded, _ = retentive.load(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * (folder / "model.safetensors").stat().st_size)
    shutil.rmtree(folder)
    same(list(loaded.parameters()), list(model.parameters()), 0)


def test_loading_imports_no_compiler(tmp_path):
    """torch's compiler takes most of a second to import, and loading does not need it."""
    save_model(tmp_path, build(retnet(vocab_size=67, dim=32, layers=1, heads=2)))
    code = "import sys, retentive; retentive.load(sys.argv[1]); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
