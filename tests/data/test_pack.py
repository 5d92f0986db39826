"""A packed folder holds every document exactly, is written atomically, and is refused when damaged."""

import errno
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retentive.data import pack as module
from retentive.data.pack import load_meta, pack, pieces
from retentive.data.sources import Document
from retentive.data.split import split_documents
from retentive.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe

TEXTS = ["first\n", "zweites — 猫\n" * 30, "x", "third\n\nwith lines\n" * 5, "last 🙂"]
TRAIN = [Document(f"{n}.txt", text) for n, text in enumerate(TEXTS)]
VALID = [Document("v.txt", "held out\n")]


class WideTokenizer(ByteTokenizer):
    """Bytes with ids that need 32 bits."""

    vocab_size = 70_000
    eos_id = 69_999


def unpacked(folder: Path, split: str) -> list[str]:
    meta, tokenizer = load_meta(folder, verify=True), load_tokenizer(folder)
    texts = []
    for number, shard in enumerate(meta.splits[split].shards):
        ids = np.fromfile(folder / f"{split}-{number:05d}.bin", meta.dtype)
        ends = np.fromfile(folder / f"{split}-{number:05d}.idx", np.uint64).tolist()
        assert (len(ids), len(ends), ends[-1]) == (shard.tokens, shard.documents, shard.tokens)
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            assert ids[end - 1] == meta.eos_id
            texts.append(tokenizer.decode(ids[start : end - 1].tolist()))
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), train_bpe(TEXTS, 270)], ids=["bytes", "bpe"])
def test_what_is_packed_comes_back(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 50)
    monkeypatch.setattr(module, "BATCH", 120)
    out = tmp_path / "new" / "packed"
    told = []
    meta = pack(out, tokenizer, iter(TRAIN), iter(VALID), progress=told.append)
    assert meta == load_meta(out)
    assert unpacked(out, "train") == TEXTS and unpacked(out, "valid") == ["held out\n"]
    train = meta.splits["train"]
    assert (train.documents, train.bytes) == (len(TEXTS), sum(len(text.encode()) for text in TEXTS))
    assert sum(told) == train.bytes + meta.splits["valid"].bytes
    assert (meta.vocab_size, meta.eos_id, meta.dtype) == (tokenizer.vocab_size, tokenizer.eos_id, "uint16")
    assert meta.tokenizer_sha256 == tokenizer.sha256 == load_tokenizer(out).sha256
    assert train.shards[0].sha256 == hashlib.sha256((out / "train-00000.bin").read_bytes()).hexdigest()
    assert [entry.name for entry in out.parent.iterdir()] == ["packed"], "no temporary folder is left"
    pack(tmp_path / "again", tokenizer, TRAIN, VALID)
    assert contents(tmp_path / "again").keys() == contents(out).keys()


def test_shards_end_at_document_ends(tmp_path):
    meta = pack(tmp_path / "a", ByteTokenizer(), TRAIN, VALID, shard_tokens=7)
    assert [shard.documents for shard in meta.splits["train"].shards] == [1, 1, 2, 1]
    assert unpacked(tmp_path / "a", "train") == TEXTS
    whole = pack(tmp_path / "b", ByteTokenizer(), TRAIN, VALID)
    parts = [(tmp_path / "a" / f"train-{number:05d}.bin").read_bytes() for number in range(4)]
    assert b"".join(parts) == (tmp_path / "b" / "train-00000.bin").read_bytes()
    assert whole.splits["train"].tokens == meta.splits["train"].tokens


def test_large_vocabularies_take_four_bytes(tmp_path):
    meta = pack(tmp_path / "a", WideTokenizer(), TRAIN, [])
    ids = np.fromfile(tmp_path / "a" / "train-00000.bin", np.uint32)
    assert meta.dtype == "uint32" and ids.max() == 69_999 and len(ids) == meta.splits["train"].tokens


def test_a_split_that_is_empty(tmp_path):
    meta = pack(tmp_path / "a", ByteTokenizer(), [*TRAIN, Document("empty", "")], [])
    assert meta.splits["valid"].shards == () and meta.splits["train"].documents == len(TRAIN)
    with pytest.raises(ValueError, match=r"no training text"):
        pack(tmp_path / "b", ByteTokenizer(), [Document("empty", "")], VALID)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_out_is_not_overwritten_by_accident(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    pack(out, ByteTokenizer(), TRAIN, VALID)
    before = contents(out)
    with pytest.raises(FileExistsError, match=r"holds packed data.*overwrite=True"):
        pack(out, ByteTokenizer(), TRAIN[:1], VALID)
    assert contents(out) == before
    pack(out, ByteTokenizer(), TRAIN[:1], VALID, overwrite=True)
    assert unpacked(out, "train") == TEXTS[:1]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds other things \(notes.txt\)"):
        pack(out, ByteTokenizer(), TRAIN, VALID, overwrite=True)
    with pytest.raises(FileExistsError, match=r"is a file"):
        pack(out / "notes.txt", ByteTokenizer(), TRAIN, VALID, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_may_not_be_entered_is_told_in_a_line(tmp_path, monkeypatch, refuses):
    def no(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "out")

    monkeypatch.setattr(Path, "stat", no)
    with refuses(f"cannot write {tmp_path}/out: permission denied", PermissionError):
        module.check_free(tmp_path / "out")


def test_nothing_is_left_when_the_source_fails(tmp_path):
    def failing():
        yield from TRAIN
        raise ValueError("x.jsonl:3 is not JSON")

    for arguments in ((failing(), VALID), (TRAIN, failing())):
        with pytest.raises(ValueError, match=r"x.jsonl:3"):
            pack(tmp_path / "out", ByteTokenizer(), *arguments, shard_tokens=8)
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("allowed", [0, 3, 6, 8])
def test_nothing_is_left_on_a_full_disk(tmp_path, monkeypatch, allowed):
    pack(tmp_path / "out", ByteTokenizer(), TRAIN[:1], VALID)
    before = contents(tmp_path / "out")
    left = allowed

    class File(io.FileIO):
        def write(self, data):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(module, "open", File, raising=False)
    with pytest.raises(OSError, match=r"^cannot write the packed data.*No space left.*nothing was kept") as caught:
        pack(tmp_path / "out", ByteTokenizer(), TRAIN, VALID, overwrite=True, shard_tokens=100)
    assert caught.value.errno == errno.ENOSPC
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"] and contents(tmp_path / "out") == before


def test_former_data_come_back_when_the_last_move_fails(tmp_path, monkeypatch):
    pack(tmp_path / "out", ByteTokenizer(), TRAIN[:1], VALID)
    before = contents(tmp_path / "out")
    replace = Path.replace

    def refusing(path, target):
        if path.name.endswith(".partial") and path.is_dir():
            raise PermissionError(errno.EACCES, "no")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refusing)
    with pytest.raises(PermissionError):
        pack(tmp_path / "out", ByteTokenizer(), TRAIN, VALID, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"] and contents(tmp_path / "out") == before


def killed_in_the_middle(out: Path, *, after_first_move: bool) -> None:
    """Leaves what a process killed while writing `out` leaves: SIGKILL runs no clean-up, and nothing does here."""
    partial = out.with_name(f".{out.name}.k1l_l3d8.partial")
    partial.mkdir()
    (partial / "train-00000.bin").write_bytes(b"half")
    out.with_name(f".{out.name}.lock").touch()
    if after_first_move:
        out.replace(partial.with_suffix(".old"))


@pytest.mark.parametrize("after_first_move", [False, True])
def test_what_a_killed_run_left_is_cleaned_by_the_next(tmp_path, after_first_move):
    out, mine = tmp_path / "out", tmp_path / ".out.settings"
    pack(out, ByteTokenizer(), TRAIN[:1], VALID)
    before = contents(out)
    mine.mkdir()
    killed_in_the_middle(out, after_first_move=after_first_move)
    with pytest.raises(FileExistsError, match=r"holds packed data"):
        pack(out, ByteTokenizer(), TRAIN, VALID)
    assert contents(out) == before, "what the killed one had moved away is there again"
    killed_in_the_middle(out, after_first_move=after_first_move)
    pack(out, ByteTokenizer(), TRAIN, VALID, overwrite=True)
    assert unpacked(out, "train") == TEXTS
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [mine.name, "out"]


def test_two_at_once_on_one_folder_are_refused(tmp_path):
    """Like two processes: the second does not touch what the first has not finished."""
    out = tmp_path / "out"

    def second():
        yield TRAIN[0]
        with pytest.raises(BlockingIOError, match=r"out is being written by another process"):
            pack(out, ByteTokenizer(), TRAIN, VALID, overwrite=True)
        yield TRAIN[1]

    pack(out, ByteTokenizer(), second(), VALID)
    assert unpacked(out, "train") == TEXTS[:2] and [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_load_meta_says_what_is_wrong(tmp_path):
    good = tmp_path / "good"
    pack(good, ByteTokenizer(), TRAIN, VALID)

    def message(change, error=ValueError, **options) -> str:
        folder = tmp_path / "bad"
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises(error) as caught:
            load_meta(folder, **options)
        shutil.rmtree(folder, ignore_errors=True)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def edit(**changes):
        def change(folder):
            form = json.loads((folder / "meta.json").read_text())
            (folder / "meta.json").write_text(json.dumps(form | changes))

        return change

    def flip(folder):
        data = bytearray((folder / "train-00000.bin").read_bytes())
        data[0] ^= 1
        (folder / "train-00000.bin").write_bytes(data)

    shorter = (good / "train-00000.bin").stat().st_size - 2
    assert "does not exist" in message(shutil.rmtree, FileNotFoundError)
    assert "holds no meta.json" in message(lambda f: (f / "meta.json").unlink(), FileNotFoundError)
    assert "is not JSON" in message(lambda f: (f / "meta.json").write_text("{"))
    assert "another program" in message(edit(format="other"))
    assert "format version 99, this program reads 1" in message(edit(version=99))
    assert "is damaged" in message(edit(surplus=1))
    assert "is damaged (ids of type 'float8')" in message(edit(dtype="float8"))
    assert "is damaged ('train')" in message(
        edit(splits={"valid": json.loads((good / "meta.json").read_text())["splits"]["valid"]})
    )
    assert "train-00000.bin is missing" in message(lambda f: (f / "train-00000.bin").unlink())
    assert "incomplete" in message(lambda f: (f / "valid-00000.idx").write_bytes(b""))
    cut = message(lambda f: (f / "train-00000.bin").write_bytes((f / "train-00000.bin").read_bytes()[:-2]))
    assert f"has {shorter:,} bytes, expected {shorter + 2:,}" in cut
    assert "its hash differs" in message(flip, verify=True)
    with pytest.raises(FileNotFoundError, match=r"is not a folder"):
        load_meta(good / "meta.json")


@given(text=st.text("ab\n", max_size=40), size=st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_pieces_join_to_the_text_and_end_at_line_ends(text, size):
    cut = list(pieces(text, size))
    assert "".join(cut) == text and all(0 < len(piece) <= size for piece in cut)
    assert all(piece.endswith("\n") or "\n" not in piece for piece in cut[:-1])


def test_split_is_by_name_and_seed():
    docs = [Document(f"{n}", f"text {n}") for n in range(2000)]
    train, valid = map(list, split_documents(iter(docs), 0.1, seed=1))
    assert sorted(train + valid) == sorted(docs) and 140 < len(valid) < 260
    assert list(map(list, split_documents(docs, 0.1, seed=1))) == [train, valid]
    assert list(map(list, split_documents(docs, 0.1, seed=2)))[1] != valid
    assert sorted(list(map(list, split_documents(docs[::-1], 0.1, seed=1)))[1]) == sorted(valid)
    fewer = [document for document in docs if document not in train[:500]]
    assert list(map(list, split_documents(fewer, 0.1, seed=1)))[1] == valid, "a document's side is its own"
    assert list(map(list, split_documents(docs, 0.0))) == [docs, []]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("fraction", [0.01, 0.95])
def test_few_documents_leave_something_for_both(seed, count, fraction):
    docs = [Document(f"{n}", f"text {n}") for n in range(count)]
    train, valid = map(list, split_documents(docs, fraction, seed))
    assert train and valid and sorted(train + valid) == docs


@pytest.mark.parametrize("seed", range(8))
def test_a_single_document_is_cut_at_a_line_end(seed):
    text = "a line\n" * 100
    (train,), (valid,) = map(list, split_documents([Document("x", text)], 0.3, seed))
    assert train.text + valid.text == text and train.text.endswith("\n") and 190 < len(valid.text) < 230


def test_split_refuses_what_would_go_wrong_silently():
    train, valid = split_documents(TRAIN, 0.5)
    next(train)
    with pytest.raises(RuntimeError, match=r"to their end first"):
        next(valid)
    with pytest.raises(ValueError, match=r"valid_fraction=1"):
        split_documents(TRAIN, 1)
