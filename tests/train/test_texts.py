"""Training straight from text: packed once beside the run, resumed from there; rows that little text can fill."""

import json
from pathlib import Path

import pytest

import retentive
from retentive.checkpoint import ModelFolder, save_model
from retentive.cli import main
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import build, retnet

TEXT = "Once upon a time a fox lived in a wood, and it was happy there.\n"
FEW = dict(size="1m", set={"dim": 16, "layers": 1, "heads": 2}, batch=2, length=32, eval_every=0, save_every=1)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(TEXT * 200)
    (tmp_path / "folder").mkdir()
    for n in range(12):
        (tmp_path / "folder" / f"{n}.txt").write_text(TEXT * 20)
    return tmp_path


def record(run):
    return json.loads((run / "train.json").read_text())


@pytest.mark.parametrize("source", ["my.txt", "folder"])
def test_text_is_packed_beside_the_run_and_only_once(source, place, capsys):
    made = retentive.train(source, "runs/one", steps=2, **FEW)
    (folder,) = (place / "runs").glob("one-data-*")
    assert f"packing {source} into runs/{folder.name}" in capsys.readouterr().err
    assert (
        record(made)["command"]["data"] == f"runs/{folder.name}" and ModelFolder.open(made).tokenizer.vocab_size > 256
    )
    before = (folder / "meta.json").stat().st_mtime_ns
    retentive.train(source, "runs/one", steps=3, resume=True, **FEW)
    assert "packing" not in capsys.readouterr().err and (folder / "meta.json").stat().st_mtime_ns == before


def test_other_text_is_not_taken_for_the_runs_own(place):
    retentive.train("my.txt", "runs/one", steps=1, **FEW)
    (place / "my.txt").write_text(TEXT * 100)
    with pytest.raises(ValueError, match="holds other data than the run at runs/one was trained on"):
        retentive.train("my.txt", "runs/one", steps=2, resume=True, **FEW)
    assert len(list((place / "runs").glob("one-data-*"))) == 2


def test_a_model_to_begin_with_brings_its_tokenizer(place):
    save_model("base", build(retnet(vocab_size=257, dim=16, layers=1, heads=2)), ByteTokenizer())
    made = retentive.train("my.txt", "runs/on", init="base", steps=1, batch=2, length=32, eval_every=0)
    assert ModelFolder.open(made).tokenizer.sha256 == ByteTokenizer().sha256


def test_several_texts_are_packed_together(place, capsys):
    made = retentive.train(["my.txt", "folder"], "runs/both", steps=1, **FEW)
    assert "packing my.txt, folder into runs/both-data-" in capsys.readouterr().err
    assert len(list((place / "runs").glob("both-data-*"))) == 1 and ModelFolder.open(made).tokenizer is not None


def test_texts_beside_a_packed_folder_have_its_tokenizer(place):
    retentive.train("my.txt", "runs/one", steps=1, **FEW)
    (folder,) = (place / "runs").glob("one-data-*")
    made = retentive.train([folder, "folder"], "runs/both", steps=1, **FEW)
    assert ModelFolder.open(made).tokenizer.sha256 == ModelFolder.open("runs/one").tokenizer.sha256
    assert [Path(x).name.rsplit("-", 1)[0] for x in record(made)["command"]["data"]] == ["one-data", "both-data"]


def test_weights_are_of_packed_folders(place):
    with pytest.raises(ValueError, match="`data_weights` are of packed folders: pack each text first"):
        retentive.train(["my.txt", "folder"], "runs/both", steps=1, data_weights=[1, 2], **FEW)


def test_little_text_makes_smaller_batches_and_says_so(place, capsys):
    (place / "little.txt").write_text(TEXT * 3)
    options = {name: value for name, value in FEW.items() if name not in ("batch", "length")}
    made = retentive.train("little.txt", "runs/little", steps=1, **options)
    assert "little text: 8 x " in capsys.readouterr().err and record(made)["command"]["length"] < 200
    retentive.train("little.txt", "runs/carried", steps=1, mode="carry", length=16, **options)
    assert record(place / "runs" / "carried")["command"]["length"] == 16
    assert record(place / "runs" / "carried")["command"]["batch"] < 8


def test_chosen_sizes_are_kept(place):
    (place / "little.txt").write_text(TEXT * 3)
    with pytest.raises(ValueError, match="too few for a window of length 2000"):
        retentive.train("little.txt", "runs/little", steps=1, **FEW | {"length": 2000})


@pytest.mark.parametrize(
    ("argv", "data", "out"),
    [
        (["my.txt"], "my-data", "my"),
        (["folder", "--out", "runs/else"], "else-data", "else"),
    ],
)
def test_the_command_takes_text_by_position(argv, data, out, place):
    few = ["--set", "dim=16", "layers=1", "heads=2", "--size", "1m", "--steps", "1", "--batch", "2", "--length", "32"]
    main(["train", *argv, *few])
    assert record(place / "runs" / out)["command"]["data"].startswith(f"runs/{data}-")


@pytest.mark.parametrize(
    ("content", "argv", "words"),
    [
        (b"a\x00binary", [], "is not UTF-8 text"),
        (b"", [], "no text"),
        (TEXT.encode(), ["--data", "my.txt"], "--data: it.txt is named already"),
    ],
)
def test_bad_input_leaves_nothing(content, argv, words, place, capsys):
    (place / "it.txt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["train", "it.txt", *argv])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said.splitlines()[-1]
    assert not list(place.glob("runs/*"))


def test_a_file_that_is_no_text_names_no_option_of_another_command(tmp_path):
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(ValueError, match=r"convert it or leave it out$"):
        retentive.train(tmp_path / "binary.txt", tmp_path / "run", steps=2)
    assert not (tmp_path / "run").exists() and [file.name for file in tmp_path.iterdir()] == ["binary.txt"]
