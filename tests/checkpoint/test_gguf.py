"""GGUF files: logits of the model they were made from, in every type, and every way in and out."""

import numpy as np
import pytest
import torch

import retentive
from retentive.checkpoint import ModelFolder, save_model
from retentive.checkpoint.adapter import targets_of, with_adapter
from retentive.checkpoint.gguf import TYPES, Gguf
from retentive.cli import main
from retentive.layers.lora import Adapter
from retentive.layers.quantized import Quantized
from retentive.native import NativeModel
from retentive.serve.service import open_service
from retentive.train.sft import SftRun
from tests.checkpoint.gguf_files import STORED, VOCAB, write_gguf

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")

# weights


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["llama", "llama-tied", "llama-wide", "llama-biased", "llama-linear", "llama-3", "qwen2", "qwen3"]
)
def test_floats_are_those_of_the_folder(kind, original, tmp_path, ids, same):
    model, folder = original(kind)
    file = write_gguf(tmp_path / "m.gguf", model, arch=kind.partition("-")[0], **STORED.get(kind, {}))
    ours, tokenizer = retentive.load(file)
    wanted, _ = retentive.load(folder)
    assert tokenizer is None and ours.config == wanted.config and ours.dtype == torch.float32
    same(dict(ours.named_parameters()).values(), dict(wanted.named_parameters()).values(), 0)
    same(ours.double()(ids)[0], model.double()(ids).logits, 1e-6)  # the library's norms and angles are float32
    model.float()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_other_types_are_decoded(kind, original, tmp_path, ids, same):
    """The oracle is the same model with each matrix rounded and decoded by the package, before it is permuted."""
    model, _ = original("llama")
    file = write_gguf(tmp_path / "m.gguf", model, kind)
    ours, _ = retentive.load(file, dtype="float32")
    stored, quants = gguf.GGMLQuantizationType[kind], gguf.quants
    rounded = {
        name: torch.from_numpy(quants.dequantize(quants.quantize(x.numpy(), stored), stored)) if x.ndim > 1 else x
        for name, x in model.state_dict().items()
    }
    theirs = type(model)(model.config).eval()
    theirs.load_state_dict(rounded)
    same(ours.double()(ids)[0], theirs.double()(ids).logits, 1e-6)
    by_default, _ = retentive.load(file)
    assert by_default.dtype == torch.bfloat16
    same(list(by_default.parameters()), [x.to(torch.bfloat16) for x in ours.parameters()], 0)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "weights"), [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4")])
def test_integers_of_the_same_bits_stay_as_they_are(kind, weights, original, tmp_path, same, capsys):
    file = write_gguf(tmp_path / "m.gguf", original("llama")[0], kind)
    wanted = retentive.load(file, dtype="float32")[0].state_dict()
    main(["quantize", str(file), "--to", weights, "--out", str(tmp_path / "q")])
    for model in (retentive.load(file, weights=weights)[0], retentive.load(tmp_path / "q")[0]):
        matrices = {name: m for name, m in model.named_modules() if isinstance(m, Quantized)}
        assert len(matrices) > 8
        for name, m in matrices.items():
            same(m.float().floats(), wanted[f"{name}.weight"], 0)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_decoded(kind, tmp_path, same):
    """The package writes none, so random blocks are read: finite scales, all else any bits."""
    stored = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[stored]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (VOCAB, size), dtype=np.uint8)
    for start in range(0, size - 1, 2):  # whatever is read as float16 has a small exponent
        raw[:, start + 1] &= 0xBB
    wanted = gguf.quants.dequantize(raw, stored)
    assert np.isfinite(wanted).all() and wanted.shape == (VOCAB, block)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
    writer.add_tensor("token_embd.weight", raw, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Gguf.open(tmp_path / "m.gguf").tensors(torch.float32)
    same(found["model.embed_tokens.weight"], torch.from_numpy(wanted), 0)


def test_every_type_that_is_read_is_tested():
    written = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    assert set(TYPES) == written


@torch.no_grad()
def test_it_decodes_in_c(original, tmp_path, ids, same):
    file = write_gguf(tmp_path / "m.gguf", original("llama")[0], "Q8_0")
    for dtype, tol in (("float32", 1e-5), ("bfloat16", 2e-2)):  # bfloat16 rounds to 8 bits, in another order of sums
        model, _ = retentive.load(file, dtype=dtype)
        same(NativeModel(model)(ids[:1])[0].float(), model(ids[:1])[0].float(), tol)


def test_a_folder_of_one_file_is_that_file(original, tmp_path, refuses):
    model, folder = original("llama")
    write_gguf(tmp_path / "m.gguf", model)
    opened = ModelFolder.open(tmp_path)
    assert opened.gguf.path.name == "m.gguf" and opened.short_name == "m" and len(opened.sha256) == 64
    write_gguf(tmp_path / "n.gguf", model)
    with refuses("holds 2 models (m.gguf, n.gguf, …): name a file"):
        ModelFolder.open(tmp_path)
    write_gguf(folder / "beside.gguf", model)  # config.json comes first
    assert ModelFolder.open(folder).gguf is None
    (folder / "beside.gguf").unlink()


# other ways out


@torch.no_grad()
def test_it_goes_through_our_folder_to_llamas(worded, original, tmp_path, ids, same, capsys):
    transformers = pytest.importorskip("transformers")
    file, (model, _) = worded(), original("llama-tied")
    main(["convert", str(file), str(tmp_path / "ours")])
    main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "llama"])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    same(again.double()(ids).logits, model.double()(ids).logits, 1e-10)
    model.float()
    before, after = ModelFolder.open(file), ModelFolder.open(tmp_path / "theirs")
    assert after.tokenizer.sha256 == before.tokenizer.sha256 and after.tokenizer.eos == before.tokenizer.eos
    message = [{"role": "user", "content": "the hat"}]
    templates = [each.template(each.tokenizer) for each in (before, after)]
    assert templates[0].first(message) == templates[1].first(message) and templates[1].bos == "<|im_start|>"


def test_the_server_and_windows_take_it(worded, refuses):
    file = worded()
    service = open_service(ModelFolder.open(file).windowed(8, 2))
    assert service.name == "smollm" and service.template.own and service.states_folder == file.parent / "states"
    assert service.model.config.attention.slots == 10
    with refuses("is a GGUF file: make a folder of it first (`retentive convert`)"):
        SftRun(data=file.parent, init=str(file), out=file.parent / "run").folder()


def test_an_adapter_may_change_it(worded, tmp_path, refuses, same):
    file = worded()
    base = ModelFolder.open(file)
    model = base.model()
    targets = targets_of(model, "all", 2)
    save_model(tmp_path / "change", with_adapter(model, Adapter(str(file), base.sha256, 2, 4.0, targets)))
    ids = torch.arange(9)[None]
    with torch.no_grad():  # a new adapter changes nothing
        same(retentive.load(tmp_path / "change")[0](ids)[0], retentive.load(file)[0](ids)[0], 0)
    assert ModelFolder.open(tmp_path / "change").tokenizer.sha256 == base.tokenizer.sha256
    with open(file, "r+b") as opened:
        opened.seek(-4, 2)
        opened.write(bytes(4))
    with refuses("has changed since this adapter was trained on it; pass the model as it was then"):
        retentive.load(tmp_path / "change")


def test_verbs_take_it(worded, tmp_path, capsys):
    file = worded()
    main(["info", str(file)])
    assert "(GGUF of F32)" in capsys.readouterr().out
    main(["generate", str(file), "--prompt", "the", "--max-tokens", "5", "--temperature", "0"])
    shown = capsys.readouterr().out
    assert shown.startswith("the")
    main(["quantize", str(file), "--to", "int8", "--out", str(tmp_path / "int8")])
    main(["generate", str(tmp_path / "int8"), "--prompt", "the", "--max-tokens", "5", "--temperature", "0"])
    assert retentive.generate(file, prompt="the", max_tokens=5, temperature=0) == shown.removeprefix("the").rstrip("\n")
