"""Folders for transformers: loaded with this package and without, and read back here, to the same tensors."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import retentive
from retentive.checkpoint import ModelFolder, save_model
from retentive.checkpoint.quantize import quantize
from retentive.cli import main
from retentive.data.templates import TURNS, load_template
from retentive.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from retentive.hf import RetentiveForCausalLM, to_hf
from retentive.models import build, peer, retnet
from retentive.models.students import student
from tests.export.variants import ATTENDING, peaked, peaked_model

MODELS = {
    "retnet": lambda: peaked(),
    "convolution": lambda: peaked_model(ATTENDING["hybrid, window, convolution"]),
    "tied": lambda: peaked(tie_embeddings=True, qk_bias=True, decay_bias=True),
    "sigmoid decay": lambda: peaked(decay="sigmoid", decay_bias=True, rotary="none"),
    "student": lambda: peaked_model(student(ATTENDING["biases"], window=8, sinks=3)),
    "forget gate": lambda: peaked_model(ATTENDING["forget gate"]),
}
ALONE = """
import sys
sys.modules["retentive"] = None  # as where it is not installed
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for folder, tensors, again in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert sys.modules[type(model).__module__].operator is None
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    found["logits"] = model(torch.arange(40)[None]).logits.detach()
    save_file(found, tensors)
    model.save_pretrained(again)
"""


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_comes_back(name, exported, tmp_path, same):
    model, ids = MODELS[name](), torch.arange(40)[None]
    folder = exported(model)
    want = {key: p.detach() for key, p in model.named_parameters()}
    # registered classes, which some loaders initialise anew; saved again, and read by `retentive.load`
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is RetentiveForCausalLM
    theirs.save_pretrained(tmp_path / "again")
    for place in (folder, tmp_path / "again"):
        ours, _ = retentive.load(place)
        same([p for _, p in ours.named_parameters()], list(want.values()), 0)
        assert ours.config == model.config and ModelFolder.open(place).layout == "hf"
    same(theirs(ids).logits, model(ids)[0], 1e-5)


@torch.no_grad()
def test_every_tensor_comes_back_by_the_code_in_the_folder(exported, tmp_path, same):
    """One process that has no `retentive` loads the folders of all models: it imports transformers for many seconds."""
    models = [make() for make in MODELS.values()]
    places = [
        (exported(model).rename(tmp_path / f"theirs{n}"), tmp_path / f"{n}.safetensors", tmp_path / f"again{n}")
        for n, model in enumerate(models)
    ]
    arguments = [str(path) for paths in places for path in paths]
    done = subprocess.run([sys.executable, "-c", ALONE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for model, (_, tensors, again) in zip(models, places, strict=True):
        found, want = load_file(tensors), {key: p.detach() for key, p in model.named_parameters()}
        same(found.pop("logits"), model(torch.arange(40)[None])[0], 1e-5)
        same([found["lm_head.weight" if k == "head.weight" else f"model.{k}"] for k in want], list(want.values()), 0)
        assert (again / "modeling_retentive.py").is_file()
        same(list(retentive.load(again)[0].parameters()), list(want.values()), 0)


def test_no_weight_is_drawn_anew(exported, same):
    """A class for classification has a new matrix, and every other tensor of the folder."""
    model = peaked()
    found = AutoModelForSequenceClassification.from_pretrained(exported(model), num_labels=3, pad_token_id=256)
    own = dict(found.model.named_parameters())
    same([own[n] for n, _ in model.named_parameters() if n != "head.weight"],
         [p for n, p in model.named_parameters() if n != "head.weight"], 0)  # fmt: skip
    assert found(torch.arange(10)[None]).logits.shape == (1, 3)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_words_begin_as_every_text_in_training(kind, exported):
    text = "It's the 5th of May — été, 東京!\n"
    words = ByteTokenizer() if kind == "bytes" else train_bpe([text * 20], 300)
    model = build(retnet(vocab_size=words.vocab_size, dim=32, layers=1, heads=2))
    folder = exported(model, TURNS, words)
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert theirs(text).input_ids == [words.eos_id, *words.encode(text)]
    assert theirs.decode(words.encode(text)) == text
    assert theirs.padding_side == "left" and theirs.eos_token_id == words.eos_id
    said = [{"role": "user", "content": "Who?"}]
    template = load_template({"chat_template": TURNS}, words)
    ids = theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=True).input_ids
    assert ids == template.first(said)
    if kind == "bpe":
        assert load_tokenizer(folder).encode(text) == words.encode(text)


@torch.no_grad()
def test_integers_are_written_as_floats(exported, same):
    made = quantize(peaked(tie_embeddings=True), 4)
    theirs = AutoModelForCausalLM.from_pretrained(exported(made))
    same(theirs.model.embed.weight, made.embed.floats(), 0)
    assert theirs.dtype == torch.bfloat16


def test_the_command_writes_a_card_and_says_how_close_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["export", "novels", "--to", "hf", "--out", "theirs"])
    said = capsys.readouterr().err
    assert "theirs: the logits of transformers differ by" in said
    assert "weights of 8 bits were written as floats, 12.0 MB: transformers has no integers of this kind" in said
    card = (tmp_path / "theirs" / "README.md").read_text()
    assert "trust_remote_code=True" in card and "English Novel Corpus" in card and '"down_proj"' in card
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, refuses, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with refuses("there exists: choose another folder", FileExistsError):
        to_hf("novels", tmp_path / "there")
    with pytest.raises(SystemExit, match="2"):
        main(["export", "novels", "--to", "hf", "--out", "x", "--weights", "int8"])
    assert "is for other runtimes: --to hf writes the model's floats as they are" in capsys.readouterr().err
    if find_spec("transformers"):
        save_model("peer", build(peer(retnet(vocab_size=257, dim=32, layers=1, heads=2), "llama")), ByteTokenizer())
        with refuses("is a model of transformers already"):
            to_hf("peer", tmp_path / "new")
    monkeypatch.setattr("retentive.hf.folder.FAR", -1.0)
    save_model("mine", peaked(), ByteTokenizer())
    with refuses("nothing is written"):
        to_hf("mine", tmp_path / "new")
    assert not (tmp_path / "new").exists()
