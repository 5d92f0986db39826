"""GGUF files: read back to the same tensors, and to llama.cpp's logits where llama-cpp-python is installed.

The oracle is the model in torch, whose decays and states have oracles of their own.
"""

from contextlib import closing

import numpy as np
import pytest
import torch

from retentive.checkpoint import ModelFolder, rwkv, save_model
from retentive.checkpoint.quantize import quantize
from retentive.cli import main
from retentive.data.templates import TURNS
from retentive.data.tokenizer import ByteTokenizer, train_bpe
from retentive.export import gguf
from retentive.export.folder import difference, export, reading
from retentive.models import PRESETS, build, retnet, transformer
from tests.configs import hybrid
from tests.export.variants import TINY, peaked_model

pytest.importorskip("gguf", reason="GGUF files are written by pip install 'retentive[gguf]'")
WIDE = {**TINY, "dim": 128, "layers": 2}
FITS = dict(rotary="none", qk_norm=False, gate_activation="sigmoid", value_dim=128)
MODELS = {
    "portable": dict(architecture="retnet-portable"),
    "fixed decays": dict(decay="lm", **FITS),
    "no decay": dict(decay="none", **FITS),
    "shared heads, tied": dict(decay="paper", kv_heads=1, tie_embeddings=True, embed_scale=True, **FITS),
    "biases": dict(decay="lm", qk_bias=True, kv_heads=1, **FITS),
    "fast decays": dict(decay=(-0.9, -0.2), **FITS),
}
ARCHITECTURE = {"biases": "rwkv6qwen2", "fast decays": "rwkv6qwen2"}
models = pytest.mark.parametrize("kind", MODELS)


def model_of(kind: str):
    return peaked_model(retnet(**WIDE | MODELS[kind]))


def written(model, path, **options):
    gguf.write(model, path, ByteTokenizer(), **options)
    return ModelFolder.open(path)


@models
def test_it_is_read_back_to_the_same_tensors(kind, tmp_path):
    model = model_of(kind)
    folder = written(model, tmp_path / "m.gguf", type="f32")
    assert folder.raw["model_type"] == ARCHITECTURE.get(kind, "arwkv7") and folder.config == model.config
    wanted, found = dict(model.named_parameters()), dict(folder.model().named_parameters())
    assert wanted.keys() == found.keys()
    for name, x in wanted.items():
        lifted = kind in ARCHITECTURE and ("q_proj" in name or "q_bias" in name)
        scaled = model.config.embed_scale and name == "embed.weight"
        # multiplied and divided by no power of 2
        torch.testing.assert_close(found[name], x, rtol=2e-7 if lifted or scaled else 0, atol=0)


@models
@pytest.mark.parametrize("type", ["f32", "f16", "q8_0", "q4_0"])
def test_llama_cpp_computes_the_logits(kind, type, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama.cpp is run by pip install llama-cpp-python")
    folder = written(model_of(kind), tmp_path / "m.gguf", type=type)
    # of float32: that of two orders of summation; of others also what llama.cpp rounds, as in export/folder.py
    far = {"f32": 1e-5, "f16": 2e-2}.get(type, 0.4)
    with closing(gguf.LlamaCpp(tmp_path / "m.gguf")) as there:
        assert difference(reading(folder.model(dtype=torch.float32)), there.read, 257, far) < far


@pytest.mark.parametrize("size", [name for name in PRESETS if name in ("1m", "2m", "5m")])
def test_named_sizes_are_exact_over_100_tokens(size, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama.cpp is run by pip install llama-cpp-python")
    model = peaked_model(retnet(size, architecture="retnet-portable"))
    written(model, tmp_path / "m.gguf", type="f32")
    ids = np.random.default_rng(1).integers(0, 257, 100).tolist()
    read = reading(model)
    with closing(gguf.LlamaCpp(tmp_path / "m.gguf")) as there:
        for part in (ids[:61], *([id] for id in ids[61:])):
            wanted, got = read(part), there.read(part)
            # large random weights: float32's own error is 3e-6 of the logits' size (measured against float64)
            assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_wrong_tensor_is_seen(tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp", reason="llama.cpp is run by pip install llama-cpp-python")
    save_model(tmp_path / "model", model_of("portable"), ByteTokenizer())
    monkeypatch.setattr(rwkv, "_for_each_head", lambda weight, c: weight.flip(0))
    with pytest.raises(ValueError, match=r"the export's logits differ from the model's by .*: nothing is written"):
        export(tmp_path / "model", "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


LINES = [
    "The price is 1,234.56 , not 12 !", "  two  spaces\tand a tab\r\n", "Das Mädchen aß Käse für 3 €.",
    "東京は大きい。🙂",
    "def f(x):\n    return x ** 2  # it's", "", "don't we'll I'M", "a\u00a0b \u200b c", "…—“quoted”",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_llama_cpp_and_the_file_cut_text_as_the_tokenizer(kind, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is run by pip install llama-cpp-python")
    own = ByteTokenizer() if kind == "bytes" else train_bpe(LINES * 3, 400)
    model = peaked_model(retnet(**{**WIDE, "vocab_size": own.vocab_size + 7}, architecture="retnet-portable"))
    gguf.write(model, tmp_path / "m.gguf", own, type="f16", template="{{ messages[0].content }}")
    folder = ModelFolder.open(tmp_path / "m.gguf")
    assert folder.template_source == "{{ messages[0].content }}" and folder.tokenizer.eos_id == own.eos_id
    there = llama_cpp.Llama(str(tmp_path / "m.gguf"), verbose=False, vocab_only=True)
    for line in LINES:
        ids = own.encode(line)
        assert folder.tokenizer.encode(line) == ids and folder.tokenizer.decode(ids) == line
        assert there.tokenize(line.encode(), add_bos=False, special=False) == ids
        if ids:
            assert there.detokenize(ids).decode() == line


def test_llama_cpp_chats_by_the_template(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is run by pip install llama-cpp-python")
    own = train_bpe(LINES * 3, 400)
    model = peaked_model(retnet(**{**WIDE, "vocab_size": own.vocab_size}, architecture="retnet-portable"))
    gguf.write(model, tmp_path / "m.gguf", own, type="f32", template=TURNS)
    folder = ModelFolder.open(tmp_path / "m.gguf")
    said = [{"role": "user", "content": "don't we?"}]
    ids = folder.template(folder.tokenizer).first(said)
    state, step, answer = None, torch.tensor([ids]), []
    for _ in range(12):
        logits, state = model(step, state)
        answer.append(int(logits[0, -1].argmax()))
        step = torch.tensor([answer[-1:]])
    there = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=256, n_threads=1, use_mmap=False, verbose=False)
    found = there.create_chat_completion(said, max_tokens=12, temperature=0, repeat_penalty=1.0)
    assert found["usage"]["prompt_tokens"] == len(ids)
    text = b"".join(there.detokenize([id]) for id in answer).decode(errors="ignore")
    assert found["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        (retnet(**WIDE), "rotary='none'; qk_norm=False; gate_activation='sigmoid'; key_dim and value_dim 128"),
        (retnet(**WIDE | FITS, decay="sigmoid"), "decay_bias=True"),
        (retnet(**WIDE | FITS, decay=(-0.9, -1e-4)), "gamma above 0.5452 in every head (got 0.4066)"),
        (retnet(**WIDE | FITS, decay="lm", ffn_gate=False, final_norm=False), "final_norm=True; ffn_gate=True"),
        (transformer(**WIDE), "blocks of retention"),
        (hybrid(**WIDE, attention=(1,)), "blocks that are all alike"),
        (retnet(**WIDE, architecture="retnet-portable", convolution=4), "needs convolution=0. A model"),
    ],
)
def test_a_model_that_does_not_fit_is_told_everything(config, reasons, tmp_path):
    with pytest.raises(ValueError) as told:
        gguf.write(build(config), tmp_path / "m.gguf", ByteTokenizer())
    assert reasons in str(told.value) and "retnet-portable" in str(told.value)
    assert not (tmp_path / "m.gguf").exists()


def test_files_that_cannot_be_read(tmp_path):
    file = tmp_path / "m.gguf"
    written(model_of("portable"), file, type="f32")
    whole = file.read_bytes()
    for begin in (2000, len(whole) - 100):
        file.write_bytes(whole[:begin])
        with pytest.raises(ValueError, match="cut short"):
            ModelFolder.open(file).model()
    file.write_bytes(whole.replace(b"retentive.config", b"retentive.konfig"))
    with pytest.raises(ValueError, match="RWKV models are not read"):
        ModelFolder.open(file)
    file.write_bytes(whole.replace(b'"dim": 128', b'"dim": 1_8'))
    with pytest.raises(ValueError, match=r"m\.gguf"):
        ModelFolder.open(file)
    file.write_bytes(whole.replace(b"blk.1.attn_norm.weight", b"blk.1.attn_norm.konfig"))
    with pytest.raises(ValueError, match=r"blk\.1\.attn_norm\.weight is missing"):
        ModelFolder.open(file).model()


def test_the_command(tmp_path, capsys, monkeypatch):
    save_model(tmp_path / "model", model_of("portable"), ByteTokenizer(), template="{{ messages[0].content }}")
    monkeypatch.setattr("retentive.export.folder.find_spec", lambda name: None)
    run = ["export", str(tmp_path / "model"), "--to", "gguf", "--out", str(tmp_path / "out")]

    def refused(*argv: str) -> str:
        with pytest.raises(SystemExit):
            main([*argv])
        return capsys.readouterr().err

    told = refused(*run, "--weights", "int8")
    assert "--weights int8: a GGUF file has integers of its own: choose a --type" in told
    main([*run, "--type", "q8_0"])
    assert "llama-cpp-python is not installed" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    assert "exists" in refused(*run, "--type", "q8_0")
    assert "--type q8_0 is for --to gguf" in refused(*run[:3], "onnx", *run[4:], "--type", "q8_0")
    main(["convert", str(tmp_path / "out" / "model.gguf"), str(tmp_path / "back")])
    assert ModelFolder.open(tmp_path / "back").config == model_of("portable").config


def test_integers_are_refused(tmp_path):
    save_model(tmp_path / "int8", quantize(model_of("portable"), 8), ByteTokenizer())
    with pytest.raises(ValueError, match="an integer model is not written to GGUF"):
        export(tmp_path / "int8", "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
