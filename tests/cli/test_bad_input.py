"""Bad input against the command line's manners: exit code 2, one line that says what is wrong, every file as it was."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from retentive.checkpoint import save_model
from retentive.checkpoint.quantize import quantize
from retentive.cli import main
from retentive.data.pack import pack
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer, train_bpe
from retentive.models import build, retnet, twin


def files() -> dict[str, bytes]:
    """Everything below the working directory, folders too."""
    return {str(f): f.read_bytes() if f.is_file() else b"" for f in Path().rglob("*")}


@pytest.fixture
def refused(place, capsys):
    """`refused(argv, words)`: it is, in one line on stderr with `words`, all files as they were; gives the output."""

    def check(argv: list[str], words: str) -> str:
        before = files()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(argv)
        out, line = capsys.readouterr()
        assert stop.value.code == 2
        assert line.startswith("retentive: ") and line.endswith("\n") and line.count("\n") == 1, line
        assert words in line
        assert files() == before
        return out

    return check


def write(path: str, content: str | bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(path: str, size: int) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:size])


def other_tokenizer(folder: str) -> None:
    """The tokenizer.json of a BPE of 300 tokens."""
    Path(folder, "tokenizer.json").unlink()
    train_bpe([Path("corpus/0.txt").read_text(encoding="utf-8")], 300).save(folder)


SOURCES = {
    "missing": (lambda: None, ["nowhere"], "no such file or folder: nowhere"),
    "empty-file": (lambda: write("empty.txt", ""), ["empty.txt"], "no text in empty.txt: every document is empty"),
    "empty-folder": (lambda: Path("nothing").mkdir(), ["nothing"], "no readable text in nothing"),
    "latin1": (
        lambda: write("corpus/latin.txt", "café".encode("latin-1")),
        ["corpus"],
        "latin.txt is not UTF-8 text (unexpected end of data at 3): convert it",
    ),
    "taken": (lambda: None, ["corpus", "--out", "data"], "data holds packed data: choose another folder"),
    "missing-hub-name": (lambda: None, ["no/where"], "for the Hugging Face data set write hf:no/where"),
    "only-bad-text": (
        lambda: write("latin.txt", "café".encode("latin-1")),
        ["latin.txt", "--on-bad-text", "skip"],
        "every document is empty or was skipped",
    ),
    "unknown-kind": (lambda: write("a.pdf", "%PDF"), ["a.pdf"], "cannot read a.pdf: expected .txt"),
    "no-tokenizer": (lambda: None, ["corpus", "--tokenizer", "corpus"], "no tokenizer at corpus/tokenizer.json"),
    "small-vocabulary": (
        lambda: None,
        ["corpus", "--tokenizer", "train", "--vocab-size", "9"],
        "--vocab-size 9: must be at least 257",
    ),
    "fraction": (lambda: None, ["corpus", "--valid-fraction", "1.5"], "--valid-fraction 1.5: must be"),
    "taken-by-others": (lambda: None, ["corpus", "--out", "corpus"], "corpus holds other things (0.txt)"),
    "no-tiktoken": (
        lambda: write("v.tiktoken", "YQ== 0\n"),
        ["corpus", "--tokenizer", "v.tiktoken"],
        "pip install 'retentive[tiktoken]'",
    ),
}


@pytest.mark.filterwarnings("ignore:.*skipped 1 documents")  # told of beside the error
@pytest.mark.parametrize("case", SOURCES)
def test_data(case, refused, monkeypatch):
    prepare, argv, words = SOURCES[case]
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    prepare()
    refused(["data", "--out", "new", "--tokenizer", "bytes", *argv], words)


TRAINING = {
    "unknown-size": (["--size", "3m"], "unknown size '3m', expected one of 1m, 2m, 5m"),
    "heads-that-do-not-divide": (["--set", "heads=3"], "key_dim 32 is not divisible by heads 3"),
    "odd-key-head-dim": (["--set", "heads=2", "key_dim=6"], "must be even for the rotation"),
    "misspelt-field": (["--set", "atention_window=1"], "'atention_window': did you mean attention_window?"),
    "not-a-number-or-null": (["--set", "attention_window=none"], "expected a whole number, or null, got none"),
    "unknown-field": (["--set", "nonsense=1"], "--set nonsense=1: unknown field 'nonsense', expected one of"),
    "field-with-a-word": (["--set", "heads=two"], "--set heads=two"),
    "unknown-decay": (["--model", "retnet", "--set", "decay=slow"], "unknown decay schedule 'slow'"),
    "no-rate": (["--lr", "-1"], "--lr must be a number of at least 0, got -1.0"),
    "too-long": (["--length", "100000"], "too few for a window of length 100000"),
    "twin-in-carry": (["--mode", "carry", "--model", "transformer"], "use another mode"),
    "a-run-that-exists": (
        ["--out", "run"],
        "run already holds a run: --resume goes on with it, --overwrite begins",
    ),
    "recipe-missing": (["--recipe", "none.py"], "no recipe at none.py: give a path to one"),
    "recipe-not-named": (["--recipe"], "--recipe needs a file"),
    "recipe-without-function": (["--recipe", "other.py"], "other.py is no recipe: expected a function recipe()"),
    "field-given-twice": (["--set", "gate=true", "gate=false"], "--set gate=false: gate is given twice"),
    "field-without-its-number": (["--set", "heads="], "--set heads=: expected a whole number, got nothing"),
    "field-without-value": (["--set", "heads"], "--set heads: expected FIELD=VALUE, such as"),
    "all-decays": (
        ["--model", "retnet", "--set", "decay=slow"],
        "expected one of paper, lm, none, gated, sigmoid, 2 numbers",
    ),
    "no-vocabulary": (
        ["--set", "vocab_size=9"],
        "--set vocab_size=9: unknown field 'vocab_size', expected one of dim, norm_eps",
    ),
    "large-seed": (["--seed", str(2**70)], "--seed must be from -1,000,000,000,000 to 1,000,000,000,000, got"),
    "infinite-rate": (["--lr", "inf"], "--lr must be finite, got inf"),
    "decay-that-is-no-number": (["--weight-decay", "nan"], "--weight-decay must be a number of at least 0, got nan"),
    "device-that-computes-nothing": (["--device", "meta"], "unknown device 'meta'"),
    "out-is-the-data": (["--out", "data"], "data holds packed data: choose another folder for the run (--out)"),
    "out-is-full-of-others": (["--out", "corpus", "--overwrite"], "corpus holds other things (0.txt): choose a new or"),
    "out-below-a-file": (["--out", "corpus/0.txt/run"], "cannot write corpus/0.txt/run"),
    "field-with-a-fraction": (["--set", "layers=2.5"], "--set layers=2.5"),
    "field-with-a-string": (["--set", 'layers="2"'], '--set layers="2"'),
    "field-with-a-list": (["--set", "dim=[32]"], "--set dim=[32]"),
    "number-with-a-flag": (["--set", "dropout=true"], "--set dropout=true: expected a number, got true"),
    "no-steps": (["--steps", "0"], "--steps must be at least 1, got 0"),
    "too-few-held-out-tokens": (["--eval-tokens", "1", "--eval-every", "1"], "--eval-tokens must be at least 2, got 1"),
    "init-and-a-size": (["--init", "run", "--size", "5m"], "--init run brings its architecture: leave out --size"),
    "going-on-and-anew": (
        ["--resume", "--overwrite"],
        "--resume and --overwrite exclude each other",
    ),
    "no-batch": (["--batch", "0"], "--batch 0, --length 32: each must be at least 1"),
    "unknown-device": (["--device", "nonsense"], "nonsense"),
    "no-tensorboard": (["--tensorboard"], "--tensorboard needs an extra: pip install 'retentive[log]'"),
    "no-wandb": (["--wandb", "project"], "--wandb needs an extra: pip install 'retentive[log]'"),
    "out-is-a-file": (["--out", "corpus/0.txt"], "corpus/0.txt"),
    "two-tokenizers": (["--data", "data", "other"], "other was packed with another tokenizer than data: pack it again"),
    "weights-of-one": (["--data-weights", "1"], "1 weight for 1 folder of data: give one for each of several"),
    "no-data": (["--data"], "--data is empty; name one folder or several"),
    "carry-of-two": (["--data", "data", "more", "--mode", "carry"], "--mode carry reads one stream"),
    "unknown-part": (["--decay-fraction", "2"], "--decay-fraction must be in (0, 1], a part of the steps, got 2.0"),
    "recipe-of-something-else": (["--recipe", "wrong.py"], "wrong.py is no recipe"),
}


@pytest.mark.parametrize("case", TRAINING)
def test_train(case, refused, train, monkeypatch):
    argv, words = TRAINING[case]
    write("other.py", "x = 1\n")
    write("wrong.py", "def recipe():\n    return 3\n")
    pack("other", train_bpe(["some other text"] * 9, 260), [Document("a", "text " * 99)], [])
    pack("more", ByteTokenizer(), [Document("a", "text " * 99)], [])
    for name in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    refused(train("new", *argv), words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("argv", [["train"], ["generate", "run"]], ids=["train", "generate"])
def test_a_device_that_is_not_there(argv, refused, train):
    refused([*(train("new") if argv == ["train"] else argv), "--device", "cuda"], "cuda")


DATA = {
    "missing": (lambda: shutil.rmtree("data"), "data does not exist: name a text, a folder of texts, or packed data"),
    "not-packed": (lambda: Path("data/meta.json").unlink(), "data holds no meta.json"),
    "other-tokenizer": (lambda: other_tokenizer("data"), "the data were packed with tokenizer"),
    "cut-short": (lambda: cut("data/train-00000.bin", 100), "has 100 bytes, expected"),
    "damaged-meta": (lambda: write("data/meta.json", '{"a"'), "is not JSON: the folder is damaged"),
    "no-tokenizer": (lambda: Path("data/tokenizer.json").unlink(), "no tokenizer at data/tokenizer.json"),
}


@pytest.mark.parametrize("case", DATA)
def test_train_on_data(case, refused, train):
    prepare, words = DATA[case]
    prepare()
    refused(train("new"), words)


RESUMING = {
    "rate": (["--lr", "0.5"], "--lr 0.5 contradicts --lr 0.03125 of the run at run: leave it out"),
    "fewer-steps": (["--steps", "3"], "--steps 3 is less than the 4 that the run at run has done"),
    "size": (["--size", "10m"], "--size 10m contradicts --size 1m of the run at run: leave it out"),
    "size-of-the-default": (["--size", "5m"], "--size 5m contradicts --size 1m of the run at run: leave it out"),
    "set": (["--set", "dim=64"], "dim=64 contradicts --set dim=32 layers=2 heads=2 of the run at run"),
    "mode": (["--mode", "carry"], "--mode carry contradicts --mode reset of the run at run: leave it out"),
    "precision": (
        ["--precision", "bf16"],
        "--precision bf16 contradicts --precision fp32 of the run",
    ),
    "other-data": (["--data", "other"], "other holds other data than the run at run was trained on"),
}


@pytest.mark.parametrize("case", RESUMING)
def test_resuming_with_options_that_contradict(case, refused, train):
    argv, words = RESUMING[case]
    pack("other", train_bpe(["some other text"] * 9, 260), [Document("a", "text " * 99)], [])
    refused(train("run", "--resume", *argv), words)


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"train": ',
        "{}",
        '{"train": {}}',
        '{"train": {"x": 1}, "command": {}}',
        "[]",
        {"batch": "x"},
        {"mode": []},
        {"set": [1]},
    ],
    ids=str,
)
def test_resuming_a_run_whose_options_are_damaged(content, refused, train):
    if isinstance(content, dict):  # in place of what the run has
        record = json.loads(Path("run/train.json").read_text(encoding="utf-8"))
        content = json.dumps({**record, "command": record["command"] | content})
    write("run/train.json", content)
    refused(train("run", "--resume"), "run/train.json")


@pytest.mark.parametrize("content", ["", "null", '{"step": "x"}', '{"step": -5}', '{"step": 3}'])
def test_resuming_from_a_checkpoint_that_does_not_know_its_step(content, place, train, capsys):
    write("run/checkpoints/step-00000004/training.json", content)
    main(train("run", "--resume"))
    said = "step-00000004/training.json is damaged: put aside as damaged-step-00000004, going on from step 2\n"
    assert said in capsys.readouterr().err and Path("run/checkpoints/step-00000004/model.safetensors").is_file()


@pytest.mark.parametrize("name", ["model", "optimizer", "state"])
def test_resuming_from_a_damaged_checkpoint(name, refused, train):
    write(f"run/checkpoints/step-00000004/{name}.safetensors", b"half of it")
    damaged = f"step-00000004/{name}.safetensors is damaged: "
    Path("run/checkpoints/step-00000002").rename("elsewhere")
    refused(
        train("run", "--resume"), f"{damaged}there is no other whole checkpoint: --overwrite begins anew, --init run"
    )
    Path("elsewhere").rename("run/checkpoints/step-00000002")
    main(train("run", "--resume"))
    assert Path("run/checkpoints/damaged-step-00000004").is_dir() and not Path("elsewhere").exists()


def foreign_folder() -> None:
    write("run/config.json", json.dumps({"model_type": "bert", "hidden_size": 32}))


def pickled_folder() -> None:
    Path("run/model.safetensors").rename("run/pytorch_model.bin")


MODELS = {
    "missing": (lambda: shutil.rmtree("run"), "no model folder at"),
    "no-config": (lambda: Path("run/config.json").unlink(), "holds no config.json: expected a run directory"),
    "config-that-is-no-json": (lambda: write("run/config.json", "{"), "is not JSON"),
    "foreign": (foreign_folder, "describes 'bert'; expected a RetNet (retentive, torchscale, syncdoth, fla)"),
    "truncated": (lambda: cut("run/model.safetensors", 5000), "is not a complete safetensors file"),
    "empty": (lambda: cut("run/model.safetensors", 0), "is not a complete safetensors file"),
    "pickled": (pickled_folder, "it has pytorch_model.bin, but pickled weights are never loaded"),
    "no-weights": (lambda: Path("run/model.safetensors").unlink(), "holds no model.safetensors"),
}


@pytest.mark.parametrize("verb", ["generate", "convert"])
@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_loaded(case, verb, refused, place):
    prepare, words = MODELS[case]
    prepare()
    refused([verb, str(place / "run"), *(["new"] if verb == "convert" else [])], words)


@pytest.mark.parametrize("case", ["missing", "no-config", "config-that-is-no-json", "foreign"])
def test_info_of_what_is_no_model(case, refused, place):
    prepare, words = MODELS[case]
    prepare()
    refused(["info", str(place / "run")], words)


def test_a_name_that_is_neither_here_nor_on_the_hub(refused, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(["generate", "hf:runs/none"], "'runs/none' cannot be had from the Hugging Face hub")
    refused(["generate", "runs/none"], "no model folder at runs/none; for the Hugging Face repository write hf:runs/")


GENERATING = {
    "no-tokens": (["--max-tokens", "0"], "--max-tokens 0: must be at least 1"),
    "temperature": (["--temperature", "-1"], "--temperature -1.0: must be at least 0"),
    "top-p": (["--top-p", "2"], "--top-p 2.0: must be in (0, 1]"),
    "empty-stop": (["--stop", ""], "a stop string must not be empty"),
    "unknown-device": (["--device", "nonsense"], "nonsense"),
    "no-tokenizer": (["--tokenizer", "corpus"], "no tokenizer at corpus/tokenizer.json"),
    "larger-tokenizer": (["--tokenizer", "larger"], "tokens, the model 257: they do not belong together"),
    "two-ways": (["--lookup", "--draft", "run"], "--beams, --lookup and --draft exclude each other"),
    "negative-beams": (["--beams", "-1"], "--beams -1: must be at least 1, or 0 to sample"),
    "sampled-beams": (["--beams", "2", "--top-p", "0.5"], "--beams looks for the likeliest text"),
    "no-draft": (["--draft", "corpus"], "corpus holds no config.json"),
    "large-seed": (["--seed", str(2**70)], f"--seed {2**70}: must be from -2^63 to 2^63 - 1"),
    "bias": (["--bias", "99999", "1"], "expected token ids from 0 to 256, got [99999]"),
    "endless-beams": (["--beams", "1000000000"], "--beams 1000000000: the states take "),
    "infinite-temperature": (["--temperature", "inf"], "--temperature inf: must be at least 0"),
}


@pytest.mark.parametrize("case", GENERATING)
def test_generate(case, refused):
    argv, words = GENERATING[case]
    shutil.copytree("data", "larger")
    other_tokenizer("larger")
    assert refused(["generate", "run", "--prompt", "Once", "--max-tokens", "2", *argv], words) == ""


def test_generate_without_a_tokenizer(refused):
    Path("run/tokenizer.json").unlink()
    refused(["generate", "run"], "run has no tokenizer.json: name one as --tokenizer")


CONVERTING = {
    "taken": (["run", "data"], "data exists: choose another folder, nothing is overwritten"),
    "fla": (["run", "new", "--to", "fla"], "fla"),
    "twin": (["twin", "new", "--to", "torchscale"], "torchscale takes models of retention only, this is a Transformer"),
}


@pytest.mark.parametrize("case", CONVERTING)
def test_convert(case, refused):
    argv, words = CONVERTING[case]
    save_model("twin", build(twin(retnet(dim=16, layers=1, heads=2))))
    refused(["convert", *argv], words)


QUANTISING = {
    "taken": (["run", "--out", "data"], "data exists: choose another folder, nothing is overwritten"),
    "group": (["run", "--out", "new", "--group", "24"], "--group 24: must be a multiple of 16 columns, up to 256"),
    "no-text": (["run", "--out", "new", "--text", "nowhere"], "nowhere"),
    "no-tokens": (["run", "--out", "new", "--text", "corpus", "--tokens", "0"], "--tokens 0: must be at least 1"),
    "no-tokenizer": (["bare", "--out", "new", "--text", "corpus"], "bare has no tokenizer.json"),
    "NaN": (["damaged", "--out", "new"], "the weights are damaged: embed.weight holds a number that is not finite"),
    "huge": (["huge", "--out", "new"], "a weight of 1e+08 is too large for a scale of 16 bits"),
    "dangling": (["run", "--out", "dangling"], "dangling exists: choose another folder, nothing is overwritten"),
    "twice": (["quantised", "--out", "new"], "the model is quantised already: name the one that it was quantised from"),
}


@pytest.mark.parametrize("case", QUANTISING)
def test_quantize(case, refused):
    argv, words = QUANTISING[case]
    small = retnet(dim=16, layers=1, heads=2)
    save_model("twin", build(twin(small)))
    save_model("bare", build(small))
    save_model("quantised", quantize(build(small), 8))
    damaged = build(small)
    with torch.no_grad():
        damaged.embed.weight[3, 5] = torch.nan
        huge = build(small)
        huge.head.weight[2, 2] = 1e8
    save_model("damaged", damaged)
    save_model("huge", huge)
    Path("dangling").symlink_to("nothing")
    refused(["quantize", *argv, "--to", "int4"], words)
    assert not Path("new").exists()


@pytest.mark.parametrize("how", [{"bits": 8, "group": 128.0}, {"bits": 8.0, "group": 128}], ids=["group", "bits"])
def test_a_quantization_of_no_whole_numbers(how, refused):
    save_model("new", quantize(build(retnet(vocab_size=257, dim=16, layers=1, heads=2)), 8), ByteTokenizer())
    config = json.loads(Path("new/config.json").read_text())
    write("new/config.json", json.dumps(config | {"quantization": how}))
    refused(["generate", "new"], "128.0" if how["bits"] == 8 and isinstance(how["group"], float) else "8.0")


def test_a_quantised_model_is_not_trained_on(refused):
    save_model("small", quantize(build(retnet(vocab_size=257, dim=16, layers=1, heads=2)), 8), ByteTokenizer())
    argv = ["train", "--data", "data", "--out", "new", "--init", "small", "--steps", "2", "--length", "16"]
    refused(argv, "small is quantised: train an adapter on it (--lora), or the model that it was quantised from")


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        (["law=run", "law=run"], "--adapter law=run: two adapters have that name"),
        (["law=run", "run"], "--adapter run: expected NAME=RUN, as the others"),
        (["run", "run"], "--adapter run run: give several as NAME=RUN, or one to merge"),
        (["a/b=run"], "--adapter a/b: expected letters, digits"),
        (["run=run"], "--adapter run: is the model's own; choose another name"),
        (["law=run"], "run is a model, not an adapter"),
        (["law=nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_adapters_to_serve(adapters, words, refused):
    pytest.importorskip("fastapi", reason="the server needs pip install 'retentive[serve]'")
    refused(["serve", "run", "--port", "0", "--adapter", *adapters], words)


def test_without_memory(refused, monkeypatch):
    def full(*_, **__):
        raise MemoryError("no memory for 9 MB of packed weights")

    monkeypatch.setattr("retentive.native.model.Packed", full)
    refused(["generate", "run", "--prompt", "a", "--engine", "native"], "no memory for 9 MB of packed weights")


@pytest.mark.parametrize(
    ("full", "words"),
    [
        (
            lambda *_, **__: torch.empty(1 << 60),
            "the memory of the machine is full, 4611686018427387904 bytes more were wanted: take",
        ),
        (
            lambda *_, **__: (_ for _ in ()).throw(
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.10 GiB in all.")
            ),
            "the memory of the GPU is full, 20.00 GiB more were wanted: take smaller batches, shorter rows or",
        ),
    ],
    ids=["machine", "gpu"],
)
def test_without_memory_for_a_tensor(full, words, refused, monkeypatch):
    monkeypatch.setattr("retentive.native.model.Packed", full)
    refused(["generate", "run", "--prompt", "a", "--engine", "native"], words)


SFT = {
    "no-answers": (
        {"messages": [{"role": "user", "content": "a"}]},
        "chats.jsonl:1 cannot be taken: nobody answers",
    ),
    "order": (
        {"messages": [{"role": "assistant", "content": "a"}]},
        "message 1 is by the assistant, expected the user",
    ),
    "empty": ({"prompt": "a", "completion": ""}, "message 2, by assistant, is empty"),
    "text": (
        {"text": "a"},
        "prompt and completion, or instruction and output, got text",
    ),
    "cut": ('{"messages": [', "chats.jsonl:1 is not JSON"),
}


@pytest.mark.parametrize("case", SFT)
def test_conversations_that_are_none(case, refused):
    value, words = SFT[case]
    write("chats.jsonl", value if isinstance(value, str) else json.dumps(value))
    refused(["sft", "run", "--data", "chats.jsonl", "--out", "new"], words)


SFT_OPTIONS = {
    "no-model": (["nowhere", "--data", "chats.jsonl", "--out", "new"], "no model folder at nowhere"),
    "no-data": (["run", "--data", "nowhere", "--out", "new"], "no such file or folder: nowhere"),
    "texts": (["run", "--data", "data", "--out", "new"], "data holds texts, in which nothing is an answer"),
    "taken": (["run", "--data", "chats.jsonl", "--out", "taken"], "taken already holds a run: --resume goes on"),
    "itself": (["run", "--data", "chats.jsonl", "--out", "run"], "--out run is the model that the run begins with"),
    "quantised": (["small", "--data", "nowhere", "--out", "new"], "small is quantised: train an adapter on it"),
    "template": (
        ["run", "--data", "chats.jsonl", "--out", "new", "--template", "corpus/0.txt"],
        "corpus/0.txt: the chat template does not show each answer once: it cannot be taught",
    ),
}


@pytest.mark.parametrize("case", SFT_OPTIONS)
def test_sft(case, refused):
    argv, words = SFT_OPTIONS[case]
    write("chats.jsonl", json.dumps({"prompt": "a", "completion": "b"}))
    shutil.copytree("run", "taken")
    save_model("small", quantize(build(retnet(vocab_size=257, dim=16, layers=1, heads=2)), 8), ByteTokenizer())
    refused(["sft", *argv], words)


def test_engines_that_cannot_run_the_model(refused):
    save_model("half", build(retnet(vocab_size=257, dim=16, layers=1, heads=2)).half(), ByteTokenizer())
    words = "the native engine cannot run this model: it computes in float32 or bfloat16, the model is float16"
    refused(["generate", "half", "--engine", "native"], words)


OTHERS = {
    "unknown-verb": (["trian"], "unknown command 'trian': did you mean train?"),
    "a-verb-like-no-other": (["zzz"], "unknown command 'zzz': expected one of demo, data, train"),
    "unknown-shell": (["completion", "tcsh"], "shell tcsh: expected one of 'bash', 'zsh', 'fish'"),
    "two-prompts": (["generate", "novels", "Once", "--prompt", "Twice"], "the prompt 'Once' is given already"),
    "unknown-bench": (["bench", "speed"], "unknown bench 'speed', expected one of train, prefill, decode, serving"),
    "info-of-nothing": (
        ["info"],
        "info needs a run, a model folder, a size (retentive info --sizes lists them) or an architecture",
    ),
    "info-of-a-model-that-does-not-fit": (
        ["info", "1m", "--to", "gguf"],
        "llama.cpp cannot run this RetNet; its architecture arwkv7 needs rotary='none'; qk_norm=False",
    ),
    "info-for-another-runtime": (["info", "retnet-portable", "--to", "onnx"], "--to onnx: expected gguf"),
    "info-of-no-model-as-json": (["info", "--sizes", "--json", "x"], "--json is for one model: name a run, a size"),
    "bench-of-no-size": (["bench", "decode", "--size", "3m"], "unknown size '3m'"),
    "bench-onto-its-picture": (
        ["bench", "decode", "--size", "1m", "--json", "new/o.png"],
        "two files would be written to new/o.png: choose another name",
    ),
    "eval-two-in-one": (
        ["eval", "run", "--tasks", "piqa", "--data", "corpus", "--json", "new/o", "--examples", "corpus/../new/o"],
        "two files would be written to corpus/../new/o: choose another name",
    ),
    "compare-onto-its-picture": (
        ["compare", "--data", "data", "--out", "new", "--json", "o.png"],
        "two files would be written to o.png: choose another name",
    ),
    "bench-in-fp64": (["bench", "train", "--precision", "fp64"], "unknown precision 'fp64', expected one of fp32"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_others(case, refused):
    refused(*OTHERS[case])


PARSED = {
    "train": "missing: --data --out (retentive train --help)",
    "train --bogus 1": "unknown option --bogus (retentive train --help)",
    "train --dat x": "unknown option --dat: did you mean --data? (retentive train --help)",
    "train --leraning_rate 1": "unknown option --leraning-rate: did you mean --lr? (retentive train --help)",
    "train --learning_rate": "--lr needs a value (retentive train --help)",
    "sft run --no-resum": "unknown option --no-resum: did you mean --resume? (retentive sft --help)",
    "generate run --promt x": "unknown option --promt: did you mean --prompt? (retentive generate --help)",
    "generate run a b": "unexpected argument b (retentive generate --help)",
    "generate run --temperature warm": "--temperature warm: expected a number (retentive generate --help)",
    "generate run --seed 1.5": "--seed 1.5: expected a whole number (retentive generate --help)",
    "generate run --max-tokens few": "--max-tokens few: expected a whole number (retentive generate --help)",
    "quantize run --out new --to int3": "--to int3: expected one of 'int8', 'int4' (retentive quantize --help)",
    "compare --data x --out y --lrs fast": "--lrs fast: expected another type (retentive compare --help)",
    "convert run": "missing: OUT (retentive convert --help)",
    "data": "missing: --out (retentive data --help)",
}


@pytest.mark.parametrize("argv", PARSED)
def test_what_the_parser_refuses_is_one_line(argv, place, capsys):
    before = files()
    with pytest.raises(SystemExit) as stop:
        main(argv.split())
    assert stop.value.code == 2 and files() == before
    assert capsys.readouterr().err == f"retentive: {PARSED[argv]}\n"


def test_a_full_disk_is_told_in_a_line(place, train, monkeypatch, capsys):
    def full(path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("retentive.train.parallel.checkpoint.write", full)
    with pytest.raises(SystemExit) as stop:
        main(train("new"))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert [line for line in lines if line.startswith("retentive: ")] == lines[-1:] and "No space left" in lines[-1]
    assert not list(Path("new").glob("checkpoints/*")) and not list(Path("new").glob("*.partial"))
