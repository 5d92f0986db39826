"""`bench replies`: each model's own scores beside each other, and what is refused."""

import json

import pytest

pytest.importorskip("jinja2", reason="chat templates need pip install 'retentive[serve]'")

import torch

from benchmarks import replies
from benchmarks.__main__ import run as program
from retentive.checkpoint import save_model
from retentive.cli import main
from retentive.data.templates import TURNS
from retentive.data.tokenizer import ByteTokenizer
from retentive.evals import evaluate
from retentive.models import build, retnet, twin

TINY = retnet(vocab_size=257, dim=32, layers=1, heads=2)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, config in (("run", TINY), ("twin", twin(TINY))):
        torch.manual_seed(0)
        save_model(name, build(config), ByteTokenizer(), template=TURNS)
    for name in ("answers", "talk"):
        pairs = [{"prompt": f"{name} {n}?", "completion": f"At {n}."} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tmp_path


def test_each_models_scores(place, capsys):
    pytest.importorskip("matplotlib")
    argv = ["replies", "--models", "run", "twin", "--max-lengths", "0", "9", "--tasks", "answers,dialogue:talk"]
    argv += ["--data", ".", "--limit", "3", "--max-tokens", "5", "--beams", "1", "2", "--json", "out.json"]
    main(argv, program)
    result = json.loads((place / "out.json").read_text())
    labels = ["run", "run, 2 beams", "twin, 9 tokens", "twin, 9 tokens, 2 beams"]
    assert list(dict.fromkeys(row["model"] for row in result["rows"])) == labels
    for label, model, length, beams in zip(labels, ("run", "run", "twin", "twin"), (None, None, 9, 9), (1, 2) * 2,
                                           strict=True):  # fmt: skip
        alone = evaluate(
            model, "answers,dialogue:talk", ".", limit=3, max_length=length, max_tokens=5, beams=beams
        ).rows
        for row, own in zip([row for row in result["rows"] if row["model"] == label], alone, strict=True):
            # the study reads by the engine, `evaluate` by torch: rounding apart, the same
            assert (row["task"], row["metric"], row["n"]) == (own["task"], own["metric"], own["n"])
            assert row["value"] == pytest.approx(own["value"], rel=1e-5)
    table = capsys.readouterr().out
    assert (
        "| task, questions | metric | run | run, 2 beams |" in table
        and "| dialogue:talk, 3 | people_distinct1 |" in table
    )
    assert (place / "out.png").stat().st_size > 10_000


def test_numbered_tasks_are_curves(place, monkeypatch):
    pytest.importorskip("matplotlib")
    for n in (1, 2, 10):
        (place / f"row-{n}.jsonl").write_text((place / "answers.jsonl").read_text())
    drawn = []
    monkeypatch.setattr(replies, "legend", lambda figure, axes: drawn.append(axes))
    tasks = ("answers", "answers:row-1", "answers:row-2", "answers:row-10")
    result = replies.measure(replies.Options(models=("run", "twin"), tasks=tasks, data=place, max_tokens=3))
    replies.plot(result, place / "out.png", title="both")
    titles = [axis.get_title() for axis in drawn[0][0]]
    assert titles == ["answers: 4 questions", "answers:row: 4 questions each"]
    curves = [line.get_xdata() for line in drawn[0][1, 1].get_lines() if len(line.get_xdata()) == 3]
    for of_model in (curves[0], curves[-1]):
        assert [round(x) for x in of_model] == [1, 2, 10]


def test_many_tasks_stand_in_bands(place, monkeypatch):
    pytest.importorskip("matplotlib")
    names = [f"row{n}" for n in range(5)]
    for name in names:
        (place / f"{name}.jsonl").write_text((place / "answers.jsonl").read_text())
    drawn = []
    monkeypatch.setattr(replies, "legend", lambda figure, axes: drawn.append(axes))
    tasks = tuple(f"answers:{name}" for name in names)
    result = replies.measure(replies.Options(models=("run",), tasks=tasks, data=place, max_tokens=3))
    replies.plot(result, place / "out.png", title="five")
    titles = [[axis.get_title() for axis in row] for row in drawn[0]]
    assert titles[0] == [f"answers:row{n}: 4 questions" for n in range(3)] and titles[1] == [""] * 3
    assert titles[2] == ["answers:row3: 4 questions", "answers:row4: 4 questions", ""]
    assert [axis.axison for axis in drawn[0][3]] == [True, True, False]


def test_what_is_refused(place, refuses):
    def measured(**changes):
        given = {"models": ("run",), "tasks": ("answers",), "data": place, **changes}
        return replies.measure(replies.Options(**given))

    with refuses("2 models and 1 max_lengths: one for each, or none at all"):
        measured(models=("run", "twin"), max_lengths=(5,))
    with refuses("unknown task 'piqa', expected one of translation, summarisation, answers, transcription, dialogue"):
        measured(tasks=("piqa",))
    with refuses("`: must be at least 1"):
        measured(beams=(0,))
    with refuses("`max_length=-2`: must be at least 1"):
        measured(max_lengths=(-2,))
    with refuses("no model folder at elsewhere", FileNotFoundError):
        measured(models=("run", "elsewhere"))
