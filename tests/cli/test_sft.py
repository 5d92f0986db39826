"""`retentive sft` from files of conversations to a run that answers, and what it refuses."""

import io
import json
import shutil
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import retentive
from retentive.cli import main
from retentive.data.templates import TEMPLATE, TURNS
from retentive.train import SftRun

SAID = [{"prompt": f"Where is number {n}?", "completion": f"By the river, {n} chairs."} for n in range(40)]
BRIEF = [
    "--batch",
    "2",
    "--length",
    "64",
    "--precision",
    "fp32",
    "--device",
    "cpu",
    "--warmup",
    "2",
    "--save-every",
    "2",
]


@pytest.fixture
def chats(place) -> str:
    Path("chats.jsonl").write_text("".join(json.dumps(each) + "\n" for each in SAID))
    return "chats.jsonl"


def steps(run: str) -> list[dict]:
    found = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line and "step" in line]


def test_a_run_that_answers(chats, capsys):
    main(["sft", "run", "--data", chats, "--out", "talks", "--epochs", "1", "--sample-every", "4", *BRIEF])
    said = capsys.readouterr().err
    assert "User: Where is number" in said and "Assistant:" in said, "a sample is an answer"
    record = json.loads(Path("talks/train.json").read_text())
    assert record["command"]["mode"] == "carry" and record["command"]["init"] == "run"
    assert Path("talks", TEMPLATE).read_text() == TURNS
    assert len(steps("talks")) == record["train"]["steps"] > 10
    losses = [line["loss"] for line in steps("talks")]
    assert sum(losses[-4:]) < sum(losses[:4])
    (packed,) = Path().glob("talks-data-*")
    main(["sft", "run", "--data", str(packed), "--out", "whole", "--mode", "whole", "--steps", "3", *BRIEF])
    assert len(steps("whole")) == 3
    main(["quantize", "talks", "--to", "int8", "--out", "small"])
    main(["convert", "talks", "plain"])
    assert Path("small", TEMPLATE).read_text() == Path("plain", TEMPLATE).read_text() == TURNS
    main(["train", "--data", "data", "--init", "talks", "--out", "more", "--steps", "2", *BRIEF])
    assert Path("more", TEMPLATE).read_text() == TURNS


def test_a_run_that_was_cut_short_goes_on(chats):
    main(["sft", "run", "--data", chats, "--out", "whole", "--steps", "6", *BRIEF])
    main(["sft", "run", "--data", chats, "--out", "cut", "--steps", "4", *BRIEF])
    main(["sft", "run", "--data", chats, "--out", "cut", "--steps", "6", "--resume", *BRIEF])
    assert [line["step"] for line in steps("cut")] == [1, 2, 3, 4, 5, 6]


def test_a_model_that_attends_reads_whole_conversations(chats):
    main(["train", "--data", "data", "--out", "twin", "--size", "1m", "--model", "transformer", "--steps", "2",
          "--set", "dim=32", "layers=2", "heads=2", *BRIEF])  # fmt: skip
    main(["sft", "twin", "--data", chats, "--out", "talks", "--steps", "2", *BRIEF])
    assert json.loads(Path("talks/train.json").read_text())["command"]["mode"] == "whole"


def test_one_call_fine_tunes(chats, place):
    """The run of the command line, bit for bit."""
    main(["sft", "run", "--data", chats, "--out", "typed", "--epochs", "1", *BRIEF])
    how = {"batch": 2, "length": 64, "precision": "fp32", "device": "cpu", "warmup": 2, "save_every": 2}
    assert retentive.sft("run", chats, "called", epochs=1, **how) == Path("called")
    assert Path("called/model.safetensors").read_bytes() == Path("typed/model.safetensors").read_bytes()
    with pytest.raises(TypeError, match="no option 'lorra': did you mean lora"):
        retentive.sft("run", chats, "other", lorra=2)
    with pytest.raises(ValueError, match="name the one to begin with"):
        SftRun(chats, "other")


def test_a_resumed_run_needs_no_batch_and_length(chats):
    """Batch and length of its record count, also if it is too short for rows of the default length."""
    main(["sft", "run", "--data", chats, "--out", "cut", "--steps", "3", *BRIEF])
    shutil.rmtree("cut/checkpoints/step-00000003")
    main(["sft", "run", "--data", chats, "--out", "cut", "--resume"])
    assert [line["step"] for line in steps("cut")] == [1, 2, 3]


def test_a_low_rank_change_is_saved_alone(chats, capsys):
    before = Path("run/model.safetensors").read_bytes()
    lora = ["--lora", "2", "--lr", "1e-2"]
    main(["sft", "run", "--data", chats, "--out", "whole", "--steps", "6", *lora, *BRIEF])
    main(["sft", "run", "--data", chats, "--out", "change", "--steps", "4", *lora, *BRIEF])
    main(["sft", "run", "--data", chats, "--out", "change", "--steps", "6", "--resume", *lora, *BRIEF])
    assert Path("run/model.safetensors").read_bytes() == before
    tensors = load_file("change/model.safetensors")
    assert tensors and all(name.endswith(("lora_a", "lora_b")) for name in tensors)
    main(["convert", "run", "merged", "--merge", "change"])
    main(["convert", "change", "also"])
    assert Path("merged/model.safetensors").read_bytes() == Path("also/model.safetensors").read_bytes()
    assert Path("merged", TEMPLATE).read_text() == TURNS
    capsys.readouterr()
    texts = []
    for argv in (["change"], ["run", "--adapter", "change"], ["merged"], ["run"]):
        main(["generate", *argv, "--prompt", "The ", "--max-tokens", "20", "--temperature", "0"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    main(["quantize", "change", "--to", "int8", "--out", "small"])
    main(["info", "change"])


def test_what_a_change_is_of_stays_what_it_was(chats):
    lora = ["--data", chats, "--out", "change", "--lora", "2", *BRIEF]
    main(["sft", "run", "--steps", "2", *lora])
    shutil.move("run", "moved")  # known by its weights, wherever it is
    main(["sft", "moved", "--steps", "4", "--resume", *lora])
    weights = load_file("moved/model.safetensors")
    save_file({name: x + 0.1 for name, x in weights.items()}, "moved/model.safetensors")
    with refused("moved is not the model, or no longer, that the run at change changes"):
        main(["sft", "moved", "--steps", "6", "--resume", *lora])
    save_file(weights, "moved/model.safetensors")
    with refused("change is an adapter itself: merge it first"):
        main(["sft", "change", "--data", chats, "--out", "second", "--lora", "2", "--steps", "2", *BRIEF])
    assert not list(Path().glob("second*"))
    with refused("--out moved is the model that the run begins with"):
        main(["sft", "moved", "--data", chats, "--out", "moved", "--overwrite", "--steps", "2", *BRIEF])


def test_other_conversations_or_another_model_do_not_go_on(chats):
    argv = ["--out", "talks", "--steps", "4", *BRIEF]
    main(["sft", "run", "--data", chats, *argv, "--steps", "2"])
    Path("others.jsonl").write_text(Path(chats).read_text().replace("river", "sea"))
    with refused("holds other data than the run at talks was trained on"):
        main(["sft", "run", "--data", "others.jsonl", "--resume", *argv])
    assert len(list(Path().glob("talks-data-*"))) == 1  # the run's
    shutil.copytree("run", "other")
    with refused("RUN other contradicts RUN run of the run at talks"):
        main(["sft", "other", "--data", chats, "--resume", *argv])
    main(["sft", "run", "--data", chats, "--resume", *argv])
    assert len(steps("talks")) == 4


@contextmanager
def refused(words):
    with pytest.raises(SystemExit) as stop, redirect_stderr(io.StringIO()) as said:
        yield
    assert stop.value.code == 2 and words in said.getvalue(), said.getvalue()
