"""From text to a packed folder in one call: held-out text, the tokenizer, concurrent writers."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from retentive.data import prepare as module
from retentive.data.pack import load_meta
from retentive.data.prepare import prepare
from retentive.data.tokenizer import load_tokenizer


@pytest.fixture
def books(tmp_path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"The cat number {number} sat on the mat.\n" * 20, "utf-8")
    return folder


def unpacked(folder: Path, split: str) -> list[str]:
    """Returns the documents of a split with one shard."""
    meta, tokenizer = load_meta(folder, verify=True), load_tokenizer(folder)
    ids = np.fromfile(folder / f"{split}-00000.bin", meta.dtype)
    ends = np.fromfile(folder / f"{split}-00000.idx", np.uint64).tolist()
    return [tokenizer.decode(ids[a : b - 1].tolist()) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def test_text_becomes_a_packed_folder_with_its_own_tokenizer(books, tmp_path):
    told = []
    meta = prepare(books, tmp_path / "data", vocab_size=270, valid_fraction=0.3, progress=lambda *how: told.append(how))
    train, valid = unpacked(tmp_path / "data", "train"), unpacked(tmp_path / "data", "valid")
    assert meta == load_meta(tmp_path / "data") and meta.vocab_size == 270
    assert sorted(train + valid) == sorted(file.read_text("utf-8") for file in books.iterdir()) and valid

    size = sum(file.stat().st_size for file in books.iterdir())
    stages = [stage for n, (stage, *_) in enumerate(told) if told[n - 1][0] != stage]
    assert stages == ["reading a sample", "learning a tokenizer", "packing"]
    last = {stage: (done, total) for stage, done, total in told}
    assert last["reading a sample"] == (sum(len(text.encode()) for text in train), size), "held-out text stays unseen"
    assert last["packing"] == (size, size)


def test_several_sources_are_read_in_a_row(books, tmp_path):
    (tmp_path / "more.txt").write_text("More.\n", "utf-8")
    (tmp_path / "lines.csv").write_text("body\nfrom a table\n", "utf-8")
    options = {"tokenizer": "bytes", "valid_fraction": 0.3, "field": "body", "seed": 1}
    alone = prepare(str(books), tmp_path / "alone", **options)
    prepare([books, tmp_path / "more.txt", tmp_path / "lines.csv"], tmp_path / "all", **options)
    added = {"More.\n", "from a table"}
    for split in alone.splits:  # a document's split does not depend on the other sources
        assert [t for t in unpacked(tmp_path / "all", split) if t not in added] == unpacked(tmp_path / "alone", split)
    assert added < set(unpacked(tmp_path / "all", "train") + unpacked(tmp_path / "all", "valid"))


def test_held_out_text_may_have_a_source_of_its_own(books, tmp_path):
    meta = prepare(books, tmp_path / "data", tokenizer="bytes", valid=str(books / "1.txt"), say=len)
    assert meta.splits["train"].documents == 12
    assert unpacked(tmp_path / "data", "valid") == [(books / "1.txt").read_text("utf-8")]


def test_what_is_left_out_is_said_once_though_the_text_is_read_twice(books, tmp_path):
    (books / "x.tex").write_text("left out", "utf-8")
    (books / "y.txt").write_bytes(b"\xff")
    said = []
    prepare(books, tmp_path / "data", vocab_size=270, on_bad_text="skip", say=said.append)
    assert [line.split(":")[0] for line in said] == [f"left out of {books}", f"{books}"]
    with pytest.warns(UserWarning) as told:
        prepare(books, tmp_path / "data", vocab_size=270, on_bad_text="skip", overwrite=True)
    assert [str(warning.message) for warning in told] == said
    prepare(books, tmp_path / "data", tokenizer="bytes", on_bad_text="skip", overwrite=True, suffix=("tex",), say=len)
    assert "left out" in unpacked(tmp_path / "data", "train") + unpacked(tmp_path / "data", "valid")


def test_two_at_once_on_one_folder_are_refused(books, tmp_path):
    """From the first text read, not from the first byte written, so that no work is done twice."""
    refused = Counter()

    def second(stage, done, total):
        with pytest.raises(BlockingIOError, match=r"data is being written by another process"):
            prepare(books, tmp_path / "data", tokenizer="bytes")
        refused[stage] += 1

    prepare(books, tmp_path / "data", vocab_size=270, progress=second)
    assert refused.keys() == {"reading a sample", "learning a tokenizer", "packing"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["books", "data"]


def test_what_cannot_be_is_refused_before_anything_is_made(books, tmp_path, refuses):
    out = tmp_path / "new" / "data"
    for sources, options, error, words in (
        ([], {}, ValueError, "`sources` is empty; name files, folders or hf:NAME"),
        ([books, "nowhere"], {}, FileNotFoundError, "no such file or folder: nowhere"),
        (books, {"valid": "nowhere"}, FileNotFoundError, "no such file or folder: nowhere"),
        (books, {"valid_fraction": 1}, ValueError, "`valid_fraction=1`: must be"),
    ):
        with refuses(words, error):
            prepare(sources, out, **options)
        assert not out.parent.exists()
    with refuses("books holds other things (0.txt)", FileExistsError):
        prepare(books / "0.txt", books)


def test_held_out_files_that_are_trained_on_are_told_of(books, tmp_path):
    said: list[str] = []
    (tmp_path / "link.txt").symlink_to(books / "0.txt")
    options = {"tokenizer": "bytes", "overwrite": True, "say": said.append}
    prepare(books, tmp_path / "data", valid=str(tmp_path / "link.txt"), **options)
    assert said == [f"trained on and held out as well: {books}/0.txt; held-out scores will be too good"]
    prepare(books, tmp_path / "data", valid=str(books), **options)
    files = len(list(books.iterdir()))
    assert said[1:] == [
        f"trained on and held out as well: {books}/0.txt and {files - 1} more; {said[0].split('; ')[1]}"
    ]
    prepare(books / "1.txt", tmp_path / "data", valid=str(books / "0.txt"), **options)
    assert len(said) == 2


def test_tokenizers_are_learnt_from_all_over_a_large_text(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 100)
    docs = [f"{n:05d}" for n in range(1000)]
    sample = module._sample(iter(docs), lambda _: None, all_of_it=True)
    numbers = [int(text) for text in sample]
    assert 10 <= len(sample) <= 20 and len(set(np.diff(numbers))) == 1 and numbers[-1] > 900
    assert [int(text) for text in module._sample(iter(docs), lambda _: None, all_of_it=False)] == list(range(21))
