"""The command line: what a person types, from text to a converted model, and what bad input is answered with.

Bad input ends in one line on stderr that begins with "retentive:", exit code 2, no traceback, nothing half-written.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from retentive import cli, load
from retentive.cli import main
from retentive.cli.train import read_recipe

TRAIN = ["--size", "1m", "--batch", "2", "--length", "32", "--steps", "3", "--eval-tokens", "50", "--sample-every", "0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with texts, packed data and a run of three steps, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "texts").mkdir()
    for n in range(8):
        (folder / "texts" / f"{n}.txt").write_text(f"Story {n}: the fox met {n} geese. " * 30, encoding="utf-8")
    main(["data", str(folder / "texts"), "--out", str(folder / "data"), "--tokenizer", "bytes"])
    main(["train", "--data", str(folder / "data"), "--out", str(folder / "run"), *TRAIN])
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of it as the working directory."""
    shutil.copytree(made, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.delenv("RETENTIVE_DEBUG", raising=False)


def names() -> list[str]:
    return sorted(str(p) for p in Path().rglob("*"))


def test_usage_and_version(capsys):
    main([])
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in cli.VERBS)
    main(["--version"])
    assert capsys.readouterr().out.startswith("retentive 0.")


@pytest.mark.parametrize("verb", sorted(set(cli.VERBS) - {"bench"}))
def test_help_is_there(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: retentive {verb}" in shown and len(shown.splitlines()) > 10


def test_generate_writes_the_prompt_first_and_the_same_for_a_seed(here, capsys):
    texts = []
    for _ in range(2):
        main(["generate", "run", "--prompt", "the fox", "--max-tokens", "12", "--seed", "3"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("the fox") and len(texts[0]) > len("the fox\n")


def test_info_of_a_run_a_size_and_all_sizes(here, capsys):
    main(["info", "run"])
    shown = capsys.readouterr().out
    assert "RetNet" in shown and "trained 3 steps" in shown and "bits per byte" in shown
    main(["info", "paper-6.7b"])
    assert "6,7" in capsys.readouterr().out
    main(["info", "--sizes"])
    assert "torchscale-xl" in capsys.readouterr().out


@pytest.mark.parametrize("layout, config", [("torchscale", []), ("fla", ["rotary=half", "score_norm=false"])])
def test_convert_there_and_back_keeps_the_logits(here, layout, config):
    train = ["train", "--data", "data", "--out", "other", *TRAIN, "--set", "decay=paper", *config]
    main([*train, "value_dim=256", "ffn_dim=256"])
    main(["convert", "other", "theirs", "--to", layout])
    main(["convert", "theirs", "back"])
    ids = torch.arange(20)[None]
    want = load("other")[0](ids)[0]
    torch.testing.assert_close(load("back")[0](ids)[0], want, rtol=0, atol=0)
    assert "format" not in json.loads(Path("theirs/config.json").read_text())


def test_set_changes_the_config_and_model_gives_the_twin(here):
    main(["train", "--data", "data", "--out", "a", *TRAIN, "--set", "heads=4", "decay=paper", "dropout=0.1"])
    config = load("a")[0].config
    assert (config.heads, config.decay, config.dropout) == (4, "paper", 0.1)
    main(["train", "--data", "data", "--out", "b", *TRAIN, "--model", "transformer"])
    assert type(load("b")[0]).__name__ == "Transformer"


def test_a_recipe_gives_the_options_and_flags_change_them(here):
    Path("mine.py").write_text(
        "from pathlib import Path\n"
        "from retentive.cli.train import TrainCommand\n"
        "from retentive.train import TrainConfig\n"
        "def recipe():\n"
        "    options = TrainConfig(steps=2, eval_every=0, sample_every=0, eval_tokens=50)\n"
        "    return TrainCommand(data=Path('data'), out=Path('r'), size='1m', batch=2, length=16, train=options)\n"
    )
    main(["train", "--recipe", "mine.py", "--lr", "0.002", "--out", "r2"])
    stored = json.loads(Path("r2/train.json").read_text())
    assert (stored["train"]["steps"], stored["train"]["lr"], stored["command"]["batch"]) == (2, 0.002, 2)


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[2] / "recipes").glob("*.py")), ids=lambda p: p.stem)
def test_every_recipe_is_one(recipe):
    command, rest = read_recipe(["--recipe", str(recipe), "--steps", "1"])
    assert command.train.steps > 1 and rest == ["--steps", "1"]


def test_resume_goes_on_and_may_repeat_but_not_contradict(here, capsys):
    again = ["train", "--data", "data", "--out", "run", "--resume"]
    main([*again, *TRAIN])
    assert json.loads(Path("run/train.json").read_text())["train"]["steps"] == 3
    with pytest.raises(SystemExit):
        main([*again, "--lr", "0.5"])
    assert "--lr 0.5 contradicts the run at run" in capsys.readouterr().err
    main(["data", "texts", "--out", "other", "--tokenizer", "bytes", "--seed", "1"])
    with pytest.raises(SystemExit):
        main(["train", "--data", "other", "--out", "run", "--resume"])
    assert "other holds other data than the run at run" in capsys.readouterr().err


BAD = {
    "verb": (["frob"], "unknown verb 'frob'"),
    "bench": (["bench", "frob"], "unknown bench 'frob'"),
    "no data": (["data", "nowhere", "--out", "o"], "no such file or folder: nowhere"),
    "empty folder": (["data", "empty", "--out", "o"], "no readable text in empty"),
    "empty file": (["data", "empty.txt", "--out", "o"], "no text in empty.txt"),
    "not UTF-8": (["data", "latin", "--out", "o"], "x.txt is not UTF-8"),
    "data there": (["data", "texts", "--out", "data"], "--overwrite"),
    "no packed data": (["train", "--data", "nowhere", "--out", "o"], "nowhere does not exist"),
    "no packed data but a folder": (["train", "--data", "texts", "--out", "o"], "meta.json"),
    "other tokenizer": (["train", "--data", "mixed", "--out", "o"], "packed with tokenizer"),
    "size": (["train", "--data", "data", "--out", "o", "--size", "huge"], "unknown size 'huge', expected one of 1m"),
    "heads": (["train", "--data", "data", "--out", "o", "--set", "heads=3"], "not divisible by heads 3"),
    "odd K": (["train", "--data", "data", "--out", "o", "--set", "key_dim=12"], "must be even for the rotation"),
    "field": (["train", "--data", "data", "--out", "o", "--set", "nonsense=1"], "--set nonsense=1: expected FIELD"),
    "number": (["train", "--data", "data", "--out", "o", "--set", "heads=x"], "'x' is no number"),
    "decay": (["train", "--data", "data", "--out", "o", "--set", "decay=x"], "unknown decay schedule 'x'"),
    "length": (["train", "--data", "data", "--out", "o", "--length", "0"], "expected at least 1"),
    "too long": (["train", "--data", "data", "--out", "o", "--length", "999999"], "too few for a window"),
    "lr": (["train", "--data", "data", "--out", "o", "--lr", "-1"], "lr must be above 0"),
    "carry": (["train", "--data", "data", "--out", "o", "--mode", "carry", "--model", "transformer"], "mode carry"),
    "run there": (["train", "--data", "data", "--out", "run"], "already holds a run"),
    "no recipe": (["train", "--recipe", "nowhere.py"], "no recipe at nowhere.py"),
    "recipe without a file": (["train", "--recipe"], "--recipe needs a file"),
    "no recipe in it": (["train", "--recipe", "other.py"], "other.py is no recipe"),
    "no run": (["generate", "nowhere"], "no model folder at nowhere"),
    "no model in it": (["generate", "texts"], "texts holds no config.json"),
    "truncated": (["generate", "cut"], "not a complete safetensors file"),
    "pickled": (["generate", "pickled"], "pickled weights are never loaded"),
    "foreign": (["generate", "foreign"], "describes 'llama'"),
    "temperature": (["generate", "run", "--temperature", "-1"], "temperature must be at least 0"),
    "no tokenizer": (["generate", "bare"], "has no tokenizer.json"),
    "max tokens": (["generate", "run", "--max-tokens", "0"], "--max-tokens must be at least 1"),
    "info of nothing": (["info"], "info needs a run"),
    "convert onto": (["convert", "run", "data"], "data exists"),
    "convert what fla has not": (["convert", "run", "o", "--to", "fla"], "fla needs decay='paper'"),
}


@pytest.fixture
def broken(here):
    """What bad input needs beside the good."""
    for name in ("empty", "latin", "foreign"):
        Path(name).mkdir()
    Path("empty.txt").touch()
    Path("other.py").write_text("x = 1\n")
    Path("latin/x.txt").write_bytes(b"caf\xe9\n")
    Path("foreign/config.json").write_text('{"model_type": "llama"}')
    for name in ("cut", "pickled", "bare"):
        shutil.copytree("run", name)
    Path("cut/model.safetensors").write_bytes(Path("run/model.safetensors").read_bytes()[:1000])
    Path("pickled/model.safetensors").rename("pickled/pytorch_model.bin")
    Path("bare/tokenizer.json").unlink()
    main(["data", "texts", "--out", "learnt", "--vocab-size", "300"])
    shutil.copytree("data", "mixed")
    shutil.copyfile("learnt/tokenizer.json", "mixed/tokenizer.json")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, broken, capsys):
    argv, words = BAD[case]
    capsys.readouterr()
    before = names()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("retentive: ") and len(err.strip().splitlines()) == 1 and words in err
    assert names() == before, "nothing half-written"


def test_unknown_flags_are_refused(here, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--data", "data", "--out", "o", "--bogus", "1"])
    assert stop.value.code == 2 and "--bogus" in capsys.readouterr().err and not Path("o").exists()


def test_bad_text_can_be_skipped(broken):
    Path("latin/y.txt").write_text("good\n" * 9)
    with pytest.warns(UserWarning, match=r"x\.txt"):
        main(["data", "latin", "--out", "o", "--tokenizer", "bytes", "--on-bad-text", "skip"])
    assert Path("o/meta.json").is_file()


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(here, capsys):
    argv = ["train", "--data", "data", "--out", "o", *TRAIN, "--steps", "40", "--lr", "1e6", "--clip", "0"]
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--warmup", "3", "--save-every", "1"])
    assert stop.value.code == 2 and "the last good checkpoint is o/checkpoints/step-" in capsys.readouterr().err
    load("o")


def test_debug_shows_where_it_came_from(here, monkeypatch):
    monkeypatch.setenv("RETENTIVE_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["generate", "nowhere"])


def test_ctrl_c_is_130(here, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("retentive.cli.generate.main", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["generate", "run"])
    assert stop.value.code == 130
