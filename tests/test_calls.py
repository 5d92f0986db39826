"""Commands as calls: the same options as on the command line, for a model in memory, a folder and a path."""

import inspect
import json
from dataclasses import fields

import pytest
import torch

import retentive
from retentive import calls
from retentive.checkpoint import ModelFolder, save_model
from retentive.cli import VERBS, chat, generate, memory, quantize, serve
from retentive.data.tokenizer import ByteTokenizer
from retentive.infer.sample import SamplingParams
from retentive.models import build, retnet
from retentive.serve.options import Options

SIZE = dict(vocab_size=257, dim=32, layers=2, heads=2)
LOADING = {"run", "source", "window", "sinks", "device", "dtype", "weights", "engine", "activations", "adapter"}
"""Flags of loading, for which Python has `load`."""


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(retnet(**SIZE)).eval()


@pytest.fixture
def given(model, tmp_path):
    """The model in the three ways in which calls take it, each with the tokenizer that goes with it."""
    save_model(tmp_path / "folder", model, ByteTokenizer())
    place = tmp_path / "folder"
    return {"memory": (model, ByteTokenizer()), "path": (place, None), "folder": (ModelFolder.open(place), None)}


ways = pytest.mark.parametrize("way", ["memory", "path", "folder"])


def options_of(*places) -> set[str]:
    """Names of the fields of dataclasses, and of the keywords of functions."""
    found = set()
    for place in places:
        if inspect.isclass(place):
            found |= {f.name for f in fields(place)}
        else:
            found |= {p.name for p in inspect.signature(place).parameters.values() if p.kind is not p.VAR_KEYWORD}
    return found


@pytest.mark.parametrize(
    ("command", "places"),
    [
        (quantize.QuantizeCommand, (calls.quantize, calls.quantize_folder)),
        (generate.GenerateCommand, (retentive.stream_generate, SamplingParams)),
        (memory.WriteCommand, (calls.memory,)),
        (chat.ChatCommand, (calls.chat, SamplingParams)),
        (serve.ServeCommand, (calls.serve, Options)),
    ],
)
def test_the_command_line_has_no_option_that_python_lacks(command, places):
    flags = {f.name for f in fields(command)} - LOADING - {"sampling", "options", "states", "text", "image", "audio"}
    assert flags <= options_of(*places)


def test_every_command_is_a_call():
    # `evaluate` is the verb eval; these verbs write or print files, and these calls are of Python alone
    verbs = set(VERBS) - {"data", "info", "convert", "report", "demo", "completion"}
    names = set(retentive.__all__) - {"load", "stream_generate", "embed", "classify", "history"}
    assert {"eval" if name == "evaluate" else name for name in names} == verbs


@ways
def test_quantize(way, given, tmp_path):
    model, tokenizer = given[way]
    made = retentive.quantize(model, tmp_path / "small", to="int4", tokenizer=tokenizer)
    folder = ModelFolder.open(made)
    assert folder.quantization.bits == 4 and folder.tokenizer.encode("a") == ByteTokenizer().encode("a")


@ways
def test_memory_and_chat(way, given, tmp_path):
    model, tokenizer = given[way]
    (tmp_path / "book.txt").write_text("A long story.")
    made = retentive.memory(model, tmp_path / "book.txt", tmp_path / "book.mem", tokenizer=tokenizer)
    assert made.tokens == 14  # with the end of text before it
    how = dict(max_tokens=4, temperature=0.0)
    with retentive.chat(model, tokenizer, memory=tmp_path / "book.mem", **how) as talk:
        answers = [talk("Who?"), "".join(talk.stream("And then?"))]
        talk.save(tmp_path / "talk.mem")
    with retentive.chat(model, tokenizer, memory=made, **how) as again:
        assert [again("Who?"), again("And then?")] == answers
    assert (tmp_path / "talk.mem").is_file()


@ways
def test_export(way, given, tmp_path):
    pytest.importorskip("onnx", reason="ONNX graphs are written by pip install 'retentive[onnx]'")
    model, tokenizer = given[way]
    made = retentive.export(model, "onnx", tmp_path / "there", tokenizer=tokenizer)
    assert made == tmp_path / "there" / "model.onnx" and (tmp_path / "there" / "tokenizer.json").is_file()


def test_serve(given, monkeypatch):
    pytest.importorskip("starlette", reason="the server is pip install 'retentive[serve]'")
    seen = []
    monkeypatch.setattr("retentive.serve.server.serve", lambda *service: seen.append(service))
    for model, tokenizer in given.values():
        retentive.serve(model, port=0, tokenizer=tokenizer, slots=2)
    assert [(s.options.slots, host, port) for s, host, port in seen] == [(2, "127.0.0.1", 0)] * 3


def test_a_model_in_memory_is_fine_tuned_from_a_folder_beside_the_run(given, tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b" * 40}) + "\n")
    model, tokenizer = given["memory"]
    how = dict(batch=1, length=32, steps=1, eval_every=0, sample_every=0)
    made = retentive.sft(model, tmp_path / "chats.jsonl", tmp_path / "run", tokenizer=tokenizer, **how)
    assert ModelFolder.open(made).config == model.config and (tmp_path / "run.init" / "config.json").is_file()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: retentive.quantize("novels", "x", too="int4"), "quantize has no option 'too'"),
        (lambda: retentive.quantize("novels", "x", to="int2"), "`to='int2'`: expected one of int8, int4"),
        (lambda: retentive.export("novels", "tflite", "x"), "unknown runtime 'tflite', expected one of onnx"),
        (lambda: retentive.export("novels", "hf", "x", weights="int4"), "export to hf has no option 'weights'"),
        (lambda: retentive.chat("novels", heat=2), "chat has no option 'heat'"),
        (lambda: retentive.chat("novels", max_tokens=0), "`max_tokens=0`: must be at least 1"),
        (lambda: retentive.serve("novels", slot=2), "serve has no option 'slot': did you mean slots?"),
        (lambda: retentive.bench("speed"), "unknown bench 'speed', expected one of train"),
        (lambda: retentive.bench("decode", sise="1m"), "bench decode has no option 'sise': did you mean size?"),
        (lambda: retentive.compare("d", "o", seed_s=(1,)), "compare has no option 'seed_s'"),
        (lambda: retentive.sft(3, "d", "o"), "model must be a model or its folder, got int"),
        (lambda: retentive.quantize(3, "o"), "model must be a model or its folder, got int"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert words in str(raised.value)
