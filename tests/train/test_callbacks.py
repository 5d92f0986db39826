"""`retentive.train(objective=…, callbacks=[…])`: a user's loss and functions after each step."""

import json
import re

import pytest
import torch

import retentive
from retentive.checkpoint import ModelFolder
from retentive.train.objective import language_modelling

FEW = dict(size="1m", set={"dim": 16, "layers": 1, "heads": 2}, batch=2, length=32, eval_every=0, save_every=100)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("Once upon a time a fox lived in a wood, and it was happy there.\n" * 200)
    return tmp_path


def losses(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def test_callbacks_see_every_step(place):
    seen = []
    made = retentive.train(
        "my.txt", "run", steps=4, **FEW, callbacks=[lambda t, metrics: seen.append((t.step, metrics["loss"]))]
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4] and [loss for _, loss in seen] == losses(made)


def test_an_objective_is_what_is_learnt(place):
    calls = []

    def doubled(model, batch, state):
        calls.append(batch.ids.numel())
        total, count, state = language_modelling(model, batch, state)
        return 2 * total, count, state

    plain = losses(retentive.train("my.txt", "plain", steps=1, **FEW))
    own = losses(retentive.train("my.txt", "own", steps=1, objective=doubled, **FEW))
    assert own == pytest.approx([2 * plain[0]], rel=1e-6) and calls == [64]


def test_a_callback_that_raises_saves_the_step_first(place, capsys):
    def broken(training, metrics):
        if training.step == 3:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        retentive.train("my.txt", "run", steps=6, callbacks=[broken], **FEW)
    assert "a callback failed at step 3, which is saved" in capsys.readouterr().err
    assert (place / "run" / "checkpoints" / "step-00000003").is_dir()
    resumed = retentive.train("my.txt", "run", steps=6, resume=True, **FEW)
    whole = retentive.train("my.txt", "whole", steps=6, **FEW)
    for a, b in zip(*(ModelFolder.open(x).model().parameters() for x in (resumed, whole)), strict=True):
        assert torch.equal(a, b)


def test_a_teacher_is_an_objective_already(place):
    retentive.train("my.txt", "teacher", steps=1, **FEW)
    with pytest.raises(ValueError, match="`teacher` is an objective: leave out either it or your own"):
        retentive.train("my.txt", "run", steps=1, teacher="teacher", objective=language_modelling, **FEW)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"callbacks": print}, "`callbacks` must be a list of functions"),
        ({"callbacks": [5]}, "a callback must be a function of the training and the metrics, got 5"),
        ({"callbacks": [dict]}, "a callback must be a function"),
        ({"objective": "mse"}, "`objective` must be a function of model, batch and state, got 'mse'"),
        ({"size": "1q"}, "1q"),
        ({"batch": 0}, "each must be at least 1"),
        ({"device": "tpu"}, "tpu"),
        ({"set": {"heads": 3}}, "heads"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_anything_is_packed(how, words, tmp_path):
    (tmp_path / "my.txt").write_text("Once upon a time.\n" * 200)
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        retentive.train(tmp_path / "my.txt", tmp_path / "run", **{"steps": 1, "size": "1m", **how})
    assert [file.name for file in tmp_path.iterdir()] == ["my.txt"]


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (
            lambda model, batch, state: model(batch.ids)[0].mean(),
            "an objective must return (sum of the losses, a tensor",
        ),
        (lambda model, batch, state: (model(batch.ids)[0].mean(), 1), "got a 2-tuple"),
        (lambda model, batch, state: (1.0, 1, None), "an objective must return"),
        (lambda model, batch, state: (model(batch.ids)[0].sum().detach(), 1, None), "has no gradient"),
    ],
)
def test_what_an_objective_returns_is_checked(objective, words, tmp_path):
    (tmp_path / "my.txt").write_text("Once upon a time.\n" * 200)
    tiny = dict(size="1m", set={"dim": 16, "layers": 1, "heads": 2}, batch=2, length=16)
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        retentive.train(tmp_path / "my.txt", tmp_path / "run", steps=1, objective=objective, **tiny)
