"""`retentive train`'s own: flags that become a run, recipes with errors, and how it ends."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest

from retentive.cli import main
from retentive.data.packed import Packed
from retentive.train import Interrupted, TrainRun


@pytest.fixture
def ran(monkeypatch):
    """The runs that the command line would have trained, with their overrides."""
    calls = []
    monkeypatch.setattr(TrainRun, "run", lambda run, overrides=None, **how: calls.append((run, set(overrides))))
    return calls


def test_flags_become_a_run(ran):
    changes = ["--set", "dim=32", "decay=paper", "dropout=0.5"]
    main(["train", "--data", "d", "--out", "o", "--size", "1m", *changes, "--lr", "0.01", "--no-resume", "--steps=7"])
    ((run, overrides),) = ran
    assert run == TrainRun.of("d", "o", size="1m", set={"dim": 32, "decay": "paper", "dropout": 0.5}, lr=0.01, steps=7)
    assert overrides == {"data", "out", "size", "set", "lr", "resume", "steps"}


RECIPE = """
from retentive.train import TrainRun

def recipe():
    return TrainRun("d", "o", size="2m", set={"heads": 1})
"""


def test_a_recipe_is_a_run_of_which_everything_is_meant(ran, tmp_path):
    (tmp_path / "r.py").write_text(RECIPE, encoding="utf-8")
    main(["train", "--recipe", str(tmp_path / "r.py"), "--batch", "3"])
    main(["train", "--recipe", str(tmp_path / "r.py"), "--set", "layers=2"])
    (first, overrides), (second, _) = ran
    assert first == TrainRun.of("d", "o", size="2m", set={"heads": 1}, batch=3) and second.set == {"layers": 2}
    assert {"size", "steps", "lr", "mode"} <= overrides


def test_a_recipe_that_trains_on_has_no_size(ran, tmp_path):
    (tmp_path / "r.py").write_text(RECIPE.replace('size="2m"', 'init="base"'), encoding="utf-8")
    main(["train", "--recipe", str(tmp_path / "r.py")])
    main(["train", "--recipe", str(tmp_path / "r.py"), "--model", "retnet"])
    assert [overrides & {"size", "model", "init"} for _, overrides in ran] == [{"init"}, {"init", "model"}]


BROKEN = {
    "syntax": ("x = 1\ndef recipe(:\n", "r.py:2: SyntaxError: "),
    "at-import": ("x = 1\n\ny = x / 0\n", "r.py:3: ZeroDivisionError: division by zero"),
    "in-the-function": (RECIPE.replace('"2m"', "size"), "r.py:5: NameError: name 'size' is not defined"),
    "deeper": ("import json\ndef recipe():\n    return json.loads('{')\n", "r.py:3: JSONDecodeError: "),
    "unknown-option": (RECIPE.replace("size=", "sizes="), "r.py:5: TypeError: "),
    "a-field-of-another-type": (RECIPE.replace('"2m"', "2"), "r.py:5: TypeError: size must be a string, got 2"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_error_in_a_recipe_is_told_with_its_line(case, ran, tmp_path, monkeypatch, capsys):
    text, words = BROKEN[case]
    monkeypatch.chdir(tmp_path)
    Path("r.py").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--recipe", "r.py"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"retentive: {words}") and error.count("\n") == 1 and not ran


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, None)], ids=["SIGINT", "SIGTERM"])
def test_after_ctrl_c_a_script_does_not_go_on(number, code, monkeypatch, capsys):
    """`retentive train … && next`: 130, as shells have it; SIGTERM asked for an end, and gets a good one."""

    def stopped(run, overrides=None, **how):
        raise Interrupted("stopped at step 3 of 4, saved; go on with `resume=True`", number)

    monkeypatch.setattr(TrainRun, "run", stopped)
    ended = None
    try:
        main(["train", "--data", "d", "--out", "o"])
    except SystemExit as stop:
        ended = stop.code
    assert ended == code
    assert capsys.readouterr().err == "stopped at step 3 of 4, saved; go on with --resume\n"


def test_ctrl_c_before_the_loop_listens_says_what_is_saved(train, place, monkeypatch, capsys):
    """As a model is built; and a second one, which does not wait until the step is saved."""

    def ctrl_c(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainRun, "build", ctrl_c)
    for argv, words in (
        (train("new"), "stopped: nothing was saved yet"),
        (train("run", "--resume"), "stopped: step-00000004 is saved; go on with --resume"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 130 and capsys.readouterr().err.splitlines() == ["", words]


def test_resuming_what_is_not_there_is_said(train, place, capsys):
    """It may be a typing error."""
    main(train("typo", "--resume"))
    assert capsys.readouterr().err.splitlines()[0] == "the run at typo is not there: beginning it"
    shutil.rmtree("typo/checkpoints")
    Path("typo/.untrained").touch()
    main(train("typo", "--resume"))
    assert capsys.readouterr().err.splitlines()[0] == "the run at typo has no checkpoint yet: beginning it"
    main(train("run", "--resume", "--steps", "5"))
    assert "beginning" not in capsys.readouterr().err


def test_epochs_are_a_number_of_steps(train, place, capsys):
    """Steps of 2 rows of 32 tokens; typed steps win unless epochs are typed as well."""
    steps = Packed(place / "data").batches(batch=2, length=32).steps_per_epoch
    main(train("new", "--epochs", "0.25", "--save-every", "100"))
    assert json.loads(Path("new/train.json").read_text())["train"]["steps"] == math.ceil(steps / 4)
    for given, words in (("-1", "--epochs must be at least 0 and finite, got -1"), ("inf", "finite, got inf")):
        with pytest.raises(SystemExit):
            main(train("bad", "--epochs", given))
        assert words in capsys.readouterr().err.replace("\n", " ")


def test_a_slower_backend_is_told_of_when_training_begins(train, place, monkeypatch, capsys):
    monkeypatch.setattr("retentive.ops.backends.describe", lambda *_: "cpu")
    main(train("quiet"))
    assert "retention by" not in capsys.readouterr().err
    monkeypatch.setattr("retentive.ops.backends.describe", lambda *_: "blocked (cpu, which is faster: no C compiler)")
    main(train("told"))
    assert "steps on cpu, retention by blocked (cpu, which is faster: no C compiler)" in capsys.readouterr().err
