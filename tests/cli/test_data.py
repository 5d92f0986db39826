"""`retentive data`: packs, reports, and learns its tokenizer from all over the text."""

from pathlib import Path

import numpy as np
import pytest

from retentive.cli import data as command
from retentive.data.pack import load_meta
from retentive.data.sources import Document, documents
from retentive.data.tokenizer import load_tokenizer


def unpacked(folder: Path, split: str) -> list[str]:
    """The documents of a split of one shard."""
    meta, tokenizer = load_meta(folder, verify=True), load_tokenizer(folder)
    ids = np.fromfile(folder / f"{split}-00000.bin", meta.dtype)
    ends = np.fromfile(folder / f"{split}-00000.idx", np.uint64).tolist()
    return [tokenizer.decode(ids[a : b - 1].tolist()) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def test_command_packs_and_reports(tmp_path, capsys):
    source, out = tmp_path / "books", tmp_path / "my data"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.txt").write_text(f"The cat number {number} sat on the mat.\n" * 40)
    command.main([str(source), "--out", str(out), "--vocab-size", "270"])
    shown = capsys.readouterr().out
    meta = load_meta(out, verify=True)
    assert meta.vocab_size == 270 and meta.splits["train"].documents + meta.splits["valid"].documents == 6
    assert f"next: retentive train --data '{out}' --size 5m --out runs/mine" in shown.replace("\n", " ")
    assert f"{meta.splits['train'].tokens:,}" in shown and "bytes/token" in shown
    assert sorted(unpacked(out, "train") + unpacked(out, "valid")) == sorted(text for _, text in documents(source))
    with pytest.raises(FileExistsError, match=r"--overwrite"):
        command.main([str(source), "--out", str(out)])
    command.main(
        [
            str(source),
            "--out",
            str(out),
            "--overwrite",
            "--tokenizer",
            "bytes",
            "--valid",
            str(source / "1.txt"),
        ]
    )
    assert load_meta(out).splits["train"].documents == 6 and unpacked(out, "valid") == [(source / "1.txt").read_text()]
    config = command.DataConfig(source=str(source / "0.txt"), out=tmp_path / "one", tokenizer=str(out))
    assert command.prepare(config) == tmp_path / "one"
    assert load_meta(tmp_path / "one").splits["valid"].tokens > 0
    capsys.readouterr()


def test_tokenizers_are_learnt_from_all_over_a_large_text(monkeypatch):
    monkeypatch.setattr(command, "SAMPLE", 100)
    docs = [Document(str(n), f"{n:05d}") for n in range(1000)]
    sample = command._sample(iter(docs), lambda _: None, all_of_it=True)
    numbers = [int(text) for text in sample]
    assert 10 <= len(sample) <= 20 and len(set(np.diff(numbers))) == 1 and numbers[-1] > 900
    assert [int(text) for text in command._sample(iter(docs), lambda _: None, all_of_it=False)] == list(range(21))
