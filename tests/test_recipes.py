"""Every file of recipes/ is a recipe: its function returns a whole run or comparison, whose models can be built."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retentive.cli.train import read_recipe
from retentive.data.chats import chats
from retentive.models import build
from retentive.studies.compare import Comparison
from retentive.train import TrainRun

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe):
    kind = Comparison if recipe.stem.startswith("compare_") else TrainRun
    made, rest = read_recipe(["--recipe", str(recipe), "--steps", "1"], kind)
    assert rest == ["--steps", "1"] and made.train.steps > 1
    runs = [made] if isinstance(made, TrainRun) else [made.train_run(run) for run in made.plan()]
    for run in runs:
        if run.model in ("retnet", "transformer", "hybrid"):  # others need the extra `peers`
            with torch.device("meta"):
                model = build(run.config(4096))
            assert type(model).__name__.lower() == run.model


def prepared(recipe: str, *args: str, cwd: Path) -> str:
    """What a recipe says as a program, which prepares its data."""
    program = Path(__file__).parents[1] / "recipes" / recipe
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(cwd), *sys.path])}
    done = subprocess.run([sys.executable, program, *args], cwd=cwd, env=env, capture_output=True, text=True)
    return done.stderr.strip()


def turns(path: Path) -> list[list[str]]:
    return [[message["content"] for message in each.messages] for each in chats(path)]


def test_sentence_pairs_both_ways(tmp_path):
    (tmp_path / "a").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b").write_text("eins\nnichts\nzwei\n", encoding="utf-8")
    assert prepared("translate.py", "English", "a", "German", "b", "pairs/train.jsonl", cwd=tmp_path) == ""
    both = turns(tmp_path / "pairs/train.jsonl")
    assert both == [["To German: one", "eins"], ["To English: eins", "one"],
                    ["To German: two", "zwei"], ["To English: zwei", "two"]]  # fmt: skip
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == ["train.jsonl"]
    assert prepared("translate.py", "English", "a", "German", "b", "pairs/valid.jsonl", cwd=tmp_path) == ""
    assert (
        turns(tmp_path / "pairs/to-german.jsonl") == both[::2]
        and turns(tmp_path / "pairs/to-english.jsonl") == both[1::2]
    )
    (tmp_path / "b").write_text("eins\n", encoding="utf-8")
    said = prepared("translate.py", "English", "a", "German", "b", "pairs/new.jsonl", cwd=tmp_path)
    assert said == "a has 3 lines and b 1: line n must be line n's translation"
    assert not (tmp_path / "pairs/new.jsonl").exists()


def test_texts_with_questions(tmp_path):
    meeting = {
        "meeting_transcripts": [{"speaker": "Ann", "content": "Hello."}, {"speaker": "Bob", "content": "Bye."}],
        "general_query_list": [{"query": "What?", "answer": "Greetings."}],
        "specific_query_list": [{"query": "Who?", "answer": "Ann and Bob."}],
    }
    rows = [meeting, {"source": ["A.", "B."], "target": ["Letters.", "ABC."]}, {"document": "Long.", "summary": "L."}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepared("summarise.py", "in.jsonl", "out/train.jsonl", cwd=tmp_path) == ""
    said = "Ann: Hello.\nBob: Bye."
    assert turns(tmp_path / "out/train.jsonl") == [
        [f"{said}\n\nWhat?", "Greetings.", "Who?", "Ann and Bob."],
        ["A. B.\n\nSummarise this.", "Letters."],
        ["Long.\n\nSummarise this.", "L."],
    ]
    documents = (tmp_path / "out/documents.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in documents] == [{"text": said}, {"text": "A. B."}, {"text": "Long."}]
    assert prepared("summarise.py", "in.jsonl", "out/asked.jsonl", cwd=tmp_path) == ""
    assert turns(tmp_path / "out/asked.jsonl")[:2] == [[f"{said}\n\nWhat?", "Greetings."],
                                                      [f"{said}\n\nWho?", "Ann and Bob."]]  # fmt: skip
    for bad, why in (
        ({"document": " ", "summary": "x"}, "no text, or nothing is asked of it"),
        ({"document": "x", "summary": ""}, "no answer to 'Summarise this.'"),
        ({"text": "x"}, "expected document and summary, or SciTLDR's or QMSum's fields, got text"),
        ([], "expected an object, got list"),
    ):
        (tmp_path / "bad.jsonl").write_text("\n" + json.dumps(bad))
        assert (
            prepared("summarise.py", "in.jsonl", "bad.jsonl", "out/new.jsonl", cwd=tmp_path)
            == f"bad.jsonl:2: ValueError: {why}"
        )
    assert not (tmp_path / "out/new.jsonl").exists()


def test_small_talk(tmp_path):
    # in place of the package, what it gives
    (tmp_path / "chitchat_dataset.py").write_text("""
class Dataset(dict):
    def __init__(self):
        for n in range(200):
            said = [[{"text": f"Hi {n}"}, {"text": " you"}], [{"text": "Hello"}], [{"text": " "}], [{"text": "Well?"}]]
            self[str(n)] = {"messages": said if n else said[:1]}
""")
    assert prepared("dialogue.py", "chats", cwd=tmp_path) == ""
    train, valid = (turns(tmp_path / "chats" / f"{name}.jsonl") for name in ("train", "valid"))
    assert ["Hi 1\nyou", "Hello\nWell?"] in [*train, *valid]  # nobody spoke in between
    assert len(train) + len(valid) == 199 and 0 < len(valid) < 20  # who got no answer is left out
