"""`retentive data`: its flags reach `prepare`, and it reports in units that a reader can take in."""

import pytest

from retentive.checkpoint import ModelFolder
from retentive.cli import data as command
from retentive.cli import main
from retentive.data.pack import load_meta
from retentive.data.packed import Packed


def lines_of(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_command_packs_and_reports(tmp_path, capsys):
    source, out = tmp_path / "books", tmp_path / "my data"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.txt").write_text(f"The cat number {number} sat on the mat.\n" * 40)
    command.main([str(source), "--out", str(out), "--vocab-size", "270"])
    shown = capsys.readouterr().out
    meta = load_meta(out, verify=True)
    train, valid = meta.splits["train"], meta.splits["valid"]
    assert meta.vocab_size == 270 and train.documents + valid.documents == 6
    assert f"next: retentive train --data '{out}' --size 5m --out runs/mine" in shown.replace("\n", " ")
    assert f"{train.tokens:,}" in shown and "bytes/token" in shown
    assert f"tokenizer: 270 tokens, learnt from {train.bytes / 1e3:.1f} kB" in shown, "not 0.0 MB"
    assert f" {train.bytes / 1e3:.1f} kB " in shown.split("bytes/token")[1]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        command.main([str(source), "--out", str(out)])
    command.main([str(source), "--out", str(out), "--overwrite", "--tokenizer", "bytes", "--valid", f"{source}/1.txt"])
    assert load_meta(out).splits["train"].documents == 6
    assert "tokenizer: 257 tokens, bytes" in lines_of(capsys)


def test_what_is_too_little_to_train_on_is_not_sent_to_training(tmp_path, capsys):
    for tokens in (512, 513):
        (tmp_path / "a.txt").write_text(" " * (tokens - 1))  # and the token that ends the document
        options = ["--tokenizer", "bytes", "--valid-fraction", "0", "--overwrite"]
        command.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "data"), *options])
        assert load_meta(tmp_path / "data").splits["train"].tokens == tokens
        assert ("next: retentive train" in capsys.readouterr().out) == (tokens > 512)


def test_command_takes_several_sources_and_other_suffixes_and_says_what_it_leaves_out(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "papers").mkdir()
    for name in ("papers/a.tex", "papers/b.TEX", "papers/c.bib", "one.txt", "LICENSE"):
        (tmp_path / name).write_text(f"The text of {name}.\n")
    bytes_to = ["--tokenizer", "bytes", "--out"]
    command.main(["papers", "one.txt", "LICENSE", "--suffix", ".tex", "none", *bytes_to, "out"])
    meta = load_meta("out")
    assert meta.splits["train"].documents + meta.splits["valid"].documents == 4
    assert lines_of(capsys)[0] == "left out of papers: 1 file of other kinds (.bib; --suffix reads more kinds)"
    command.main(["one.txt", "LICENSE", *bytes_to, "other"])
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--vocab-size", "1000000000", "--out", "new"], "--vocab-size 1000000000: must be at most 1,048,576"),
        (["--out", "text.txt"], "text.txt is a file: choose a new folder for the packed data"),
        (["--out", "text.txt/new"], "cannot write text.txt/new: file exists (text.txt), choose another"),
        (["--out", "new", "--valid", "packed/train-00000.bin"], "cannot read packed/train-00000.bin: expected .txt"),
    ],
    ids=["vocabulary", "a-file", "in-a-file", "binary"],
)
def test_what_cannot_be_is_told_in_a_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Text.\n" * 9)
    command.main(["text.txt", "--tokenizer", "bytes", "--out", "packed"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["data", "text.txt", *argv])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith(f"retentive: {words}") and line.count("\n") == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["packed", "text.txt"]


def test_the_tokenizer_may_be_that_of_any_model(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("The old house by the river. " * 200)
    main(["data", str(tmp_path / "a.txt"), "--out", str(tmp_path / "data"), "--tokenizer", "novels"])
    assert "tokenizer: 4,096 tokens, novels" in lines_of(capsys)
    assert Packed(tmp_path / "data").tokenizer.sha256 == ModelFolder.open("novels").tokenizer.sha256
