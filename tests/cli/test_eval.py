"""`retentive eval`: the table, the files it keeps, and bad input in one line with every file as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from retentive.checkpoint import save_model
from retentive.cli import main
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import build, retnet
from tests.evals.task_rows import ROWS, variants


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory: run/, and data/ with a file of each task."""
    monkeypatch.chdir(tmp_path)
    save_model("run", tiny(), ByteTokenizer())
    Path("data").mkdir()
    for name in ROWS:
        lines = "".join(json.dumps(row) + "\n" for row in variants(name))
        Path(f"data/{name}.jsonl").write_text(lines, encoding="utf-8")
    Path("data/perplexity.jsonl").write_text('{"text": "some text"}\n', encoding="utf-8")
    return tmp_path


def tiny():
    torch.manual_seed(0)
    return build(retnet(vocab_size=257, dim=32, layers=1, heads=2))


def test_a_table_a_result_and_a_record_of_each_question(place, capsys):
    argv = ["eval", "run", "--tasks", ",".join([*ROWS, "perplexity"]), "--data", "data"]
    main([*argv, "--json", "out/result.json", "--examples", "out/examples.jsonl"])
    table = capsys.readouterr().out.splitlines()
    result = json.loads(Path("out/result.json").read_text(encoding="utf-8"))
    assert result["hardware"]["torch"] == torch.__version__ and result["command"].startswith("retentive eval run")
    assert result["scorer"] == "retentive, prompts of lm-eval 0.4.13"
    assert len(table) == 2 + len(result["results"])
    assert {row["task"] for row in result["results"]} == {*ROWS, "perplexity"}
    records = [json.loads(line) for line in Path("out/examples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == 5 * len(ROWS) + 1
    for row in result["results"]:
        of_task = [r for r in records if r["task"] == row["task"]]
        assert row["n"] == len(of_task)
        if row["metric"].startswith("acc"):
            assert row["value"] == sum(r[row["metric"]] for r in of_task) / 5


def test_examples_before_each_question(place, capsys):
    main(["eval", "run", "--tasks", "piqa", "--data", "data", "--shots", "4", "--limit", "2"])
    assert capsys.readouterr().out.splitlines()[2].startswith("| piqa | 4 | 2 | acc |")


def test_a_pipe_gets_a_line_now_and_then(place, monkeypatch, capsys):
    monkeypatch.setattr("retentive.cli.progress.SECONDS", 0)
    main(["eval", "run", "--tasks", "piqa", "--data", "data"])
    assert capsys.readouterr().err.splitlines()[-1] == "piqa: 5 of 5"
    monkeypatch.setattr("retentive.cli.progress.SECONDS", 1000)
    main(["eval", "run", "--tasks", "piqa", "--data", "data"])
    assert capsys.readouterr().err == ""


def no_tokenizer() -> None:
    Path("run/tokenizer.json").unlink()


def weights_of_nan() -> None:
    model = tiny()
    model.head.weight.data[3] = float("nan")
    save_model("run", model)


def break_line() -> None:
    with open("data/piqa.jsonl", "a", encoding="utf-8") as file:
        file.write('{"goal": "a"}\n')


REFUSED = {
    "no-data": (lambda: None, ["--tasks", "piqa"], "--data is needed: the folder that holds piqa.jsonl"),
    "unknown-task-without-data": (lambda: None, ["--tasks", "nonsense"], "unknown task 'nonsense', expected some of"),
    "unknown-task": (lambda: None, ["--tasks", "piqa,mmlu", "--data", "data"], "unknown task 'mmlu', expected some of"),
    "passkey-too": (lambda: None, ["--tasks", "mmlu", "--data", "data"], "gov_report, passkey with --contexts, or"),
    "passkey-without-contexts": (
        lambda: None,
        ["--tasks", "passkey", "--data", "data"],
        "--contexts is needed: the lengths at which passkey is asked",
    ),
    "nan": (weights_of_nan, ["--tasks", "piqa", "--data", "data"], "the model's logits are not finite"),
    "no-task": (lambda: None, ["--tasks", ",", "--data", "data"], "--tasks is empty"),
    "no-file": (
        lambda: Path("data/piqa.jsonl").unlink(),
        ["--tasks", "piqa", "--data", "data"],
        "piqa needs data/piqa",
    ),
    "no-folder": (lambda: shutil.rmtree("data"), ["--tasks", "piqa", "--data", "data"], "no such file"),
    "fields": (break_line, ["--tasks", "piqa", "--data", "data"], "piqa.jsonl line 6: no field 'sol1'"),
    "no-tokenizer": (no_tokenizer, ["--tasks", "piqa", "--data", "data"], "run has no tokenizer.json: name one as"),
    "no-run": (lambda: shutil.rmtree("run"), ["--tasks", "piqa", "--data", "data"], "no model folder at run"),
    "long": (
        lambda: None,
        ["--tasks", "piqa", "--data", "data", "--max-length", "9"],
        "tokens; raise --max-length 9",
    ),
    "shots-of-text": (lambda: None, ["--tasks", "perplexity", "--data", "data", "--shots", "1"], "holds texts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case, place, capsys):
    prepare, argv, words = REFUSED[case]
    prepare()
    before = {f: f.read_bytes() for f in place.rglob("*") if f.is_file()}
    with pytest.raises(SystemExit) as stop:
        main(["eval", "run", *argv, "--json", "out.json", "--examples", "out.jsonl"])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("retentive: ") and line.count("\n") == 1 and words in line
    assert {f: f.read_bytes() for f in place.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("flag", ["--json", "--examples"])
def test_no_place_for_the_result_is_told_before_anything_is_scored(flag, place, capsys, monkeypatch):
    monkeypatch.setattr("retentive.cli.eval.evaluate", lambda *_, **__: pytest.fail("it scored"))
    with pytest.raises(SystemExit):
        main(["eval", "run", "--tasks", "piqa", "--data", "data", flag, "data/piqa.jsonl/x"])
    assert "cannot write data/piqa.jsonl/x: Not a directory" in capsys.readouterr().err
