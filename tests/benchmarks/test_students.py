"""`python -m benchmarks students`: a teacher, its window and its student side by side, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("jinja2", reason="chat templates need pip install 'retentive[serve]'")

from benchmarks import students
from benchmarks.__main__ import run as program
from retentive.checkpoint import ModelFolder, save_model
from retentive.cli import main
from retentive.data.mixture import open_packed
from retentive.data.templates import TURNS
from retentive.data.tokenizer import ByteTokenizer
from retentive.evals.heldout import held_out_loss
from retentive.models import build, transformer
from retentive.models.students import student, take_over

TEACHER = transformer(vocab_size=257, dim=32, layers=2, heads=2)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    teacher = build(TEACHER)
    made = build(student(TEACHER, window=12, sinks=2))
    take_over(made, teacher)
    for name, model in (("teacher", teacher), ("made", made)):
        save_model(name, model, ByteTokenizer(), template=TURNS)
    Path("text.txt").write_text("".join(f"Line {n} of a text says little.\n" for n in range(4000)))
    main(["data", "text.txt", "--tokenizer", "bytes", "--out", "text"])
    return tmp_path


def test_models_side_by_side(place, capsys):
    pytest.importorskip("matplotlib")
    argv = ["students", "--models", "teacher", "teacher@12+2", "made", "--data", "text", "--lengths", "32", "64"]
    argv += [
        "--tokens",
        "500",
        "--recalls",
        "3",
        "--chats",
        "2",
        "--max-tokens",
        "4",
        "--dtype",
        "float32",
        "--json",
        "out.json",
    ]
    main(argv, program)
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["teacher", "teacher@12+2", "made"]
    data = open_packed((Path("text"),))
    for row, name in zip(rows, ("teacher", "teacher@12+2", "made"), strict=True):
        model = students.opened_as(name).model()
        for found, length in zip(row["loss"], (32, 64), strict=True):
            wanted = held_out_loss(model, data, length=length, tokens=500).loss
            assert found["length"] == length and found["value"] == pytest.approx(wanted, rel=1e-5)  # C against torch
        assert row["recall"]["value"] == 0 and len(row["recall"]["missed"]) == 3  # random weights
        assert 0 <= row["facts"]["value"] <= 1 and 0 <= row["ended"]["value"] <= 1
    teacher, windowed, made = (row["state_bytes"] for row in rows)
    assert windowed < made < teacher
    assert "| teacher@12+2 |" in capsys.readouterr().out
    assert Path("out.png").stat().st_size > 10_000


def test_a_number_is_told_and_asked_for_at_the_said_distance(place):
    tokenizer, data = ByteTokenizer(), open_packed((Path("text"),))
    for ids, number, distance in students.recalls(tokenizer, data, 20, 0):
        text = tokenizer.decode(ids)
        told = text.index(f" is {number}.\n") + len(f" is {number}.\n")
        asked = text.rindex("\nThe secret code of")
        assert asked - told == distance and 300 <= distance <= 1000 and text.count(number) == 1
        assert text.endswith(text[text.index("\nThe secret") : told].removesuffix(f" {number}.\n"))
    assert students.recalls(tokenizer, data, 5, 0) == students.recalls(tokenizer, data, 5, 0)


def test_questions_are_complete():
    asked = json.loads(students.QUESTIONS.read_text(encoding="utf-8"))
    assert len(asked["facts"]) == 40 and len(asked["chats"]) == len(set(asked["chats"])) == 200
    assert all(question and answers and all(answers) for question, answers in asked["facts"])


def test_what_is_refused(place, refuses):
    for name in ("teacher@12", "teacher@a+2"):
        with refuses(f"{name}: expected FOLDER@WINDOW+SINKS, such as teacher@256+4"):
            students.opened_as(name)
    assert students.opened_as("teacher").path == ModelFolder.open("teacher").path
    Path("short.txt").write_text("ab\n" * 300)
    main(["data", "short.txt", "--tokenizer", "bytes", "--out", "short"])
    with refuses("the held-out text has no 1,200 tokens to hide numbers in: give more, or `recalls` 0"):
        students.recalls(ByteTokenizer(), open_packed((Path("short"),)), 1, 0)
