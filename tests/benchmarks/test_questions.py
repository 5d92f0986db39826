"""`bench questions`: each model reads one text once for any number of questions."""

import json

import pytest

from benchmarks import questions
from benchmarks.questions import Options
from retentive.infer import batch


def measured(say=lambda line: None, **changes):
    given = {"size": "tiny", "vocab_size": 31, "tokens": 300, "reply": 3, "repeats": 1, **changes}
    return questions.measure(Options(**given), say)


def test_a_text_is_read_once_for_all_questions(sizes, monkeypatch):
    read, real = [], batch.read
    monkeypatch.setattr(batch, "read", lambda model, ids, rows: read.append(len(ids)) or real(model, ids, rows))
    result = measured(models=("retnet", "transformer"), questions=(2, 5))
    # two models, two numbers of questions, and a first turn that warms up
    assert read == [300] * 8
    one, many, _, twins = result["rows"]
    assert one["ratio"] == 1 and many["ratio"] > 0 and one["state_bytes"] == many["state_bytes"]
    assert twins["questions"] == 5 and twins["seconds"] > 0 and twins["model"] == "transformer"
    assert len(questions.table(result).splitlines()) == 6 and json.dumps(result)


def test_what_is_refused(refuses):
    with refuses("a text of 99 tokens is shorter than 256"):
        measured(tokens=99)
    with refuses("unknown model 'llama'"):
        measured(models=("retnet", "llama"))
    with refuses("`: must be at least 1"):
        measured(questions=())


@pytest.mark.parametrize("name", ["reply", "repeats"])
def test_numbers_below_one_are_refused(name, refuses):
    with refuses("`: must be at least 1"):
        measured(**{name: 0})
