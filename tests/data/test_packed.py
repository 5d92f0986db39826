"""A packed folder, opened once: its held-out text against the text itself, and errors about damage."""

from pathlib import Path

import pytest

from retentive.data.pack import load_meta, pack
from retentive.data.packed import Packed
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer, train_bpe

EOS = 256
TRAIN = ["some text to train on, " * 3, "and more"]
VALID = ["é猫🙂" * 5, "b", "the last held out text"]
STREAM = [id for text in VALID for id in [*text.encode(), EOS]]


@pytest.fixture
def folder(tmp_path) -> Path:
    train, valid = ([Document(str(n), text) for n, text in enumerate(texts)] for texts in (TRAIN, VALID))
    pack(tmp_path / "packed", ByteTokenizer(), train, valid, shard_tokens=30)
    return tmp_path / "packed"


@pytest.fixture
def packed(folder) -> Packed:
    return Packed(folder)


def test_what_is_in_it(packed, folder):
    assert packed.meta == load_meta(folder) and packed.tokenizer.eos_id == EOS
    assert packed.first_tokens("train", 9).tolist() == list(TRAIN[0][:9].encode())
    assert len(packed.first_tokens("train", 10**6)) == packed.meta.splits["train"].tokens
    with pytest.raises(ValueError, match=r"no split 'test' in .*: it has train, valid"):
        packed.stream("test")


def test_the_fingerprint_is_that_of_the_data_wherever_they_are(folder, tmp_path):
    first = Packed(folder).fingerprint
    folder.rename(tmp_path / "moved")
    assert Packed(tmp_path / "moved").fingerprint == first
    pack(tmp_path / "other", ByteTokenizer(), [Document("a", "other text")], [])
    assert Packed(tmp_path / "other").fingerprint != first


@pytest.mark.parametrize("tokens", [None, 2, 21, 30, 40, 10_000])
@pytest.mark.parametrize("length", [1, 8, 1000])
def test_held_out_predicts_the_text_in_order(packed, tokens, length):
    count = min(tokens or len(STREAM), len(STREAM))
    batches = list(packed.held_out(length=length, tokens=tokens))
    assert [batch.ids.shape[1] for batch in batches[:-1]] == [length] * (len(batches) - 1)
    assert [id for batch in batches for id in batch.ids[0].tolist()] == STREAM[: count - 1]
    assert [id for batch in batches for id in batch.targets[0].tolist()] == STREAM[1:count]
    for batch in batches:
        ends = [i for i, id in enumerate(batch.ids[0].tolist()) if id == EOS]
        assert batch.cu_seqlens.tolist() == sorted({0, *ends, batch.ids.shape[1]})


def test_held_out_bytes(packed):
    everything = sum(len(text.encode()) for text in VALID)
    assert packed.held_out_bytes() == packed.held_out_bytes(10_000) == everything
    first = len(VALID[0].encode())
    assert packed.held_out_bytes(first) == packed.held_out_bytes(first + 1) == first
    assert packed.held_out_bytes(first + 3) == first + 1, "no bytes for the ends of documents"
    assert packed.held_out_bytes(first - 1) == first - 4, "half a character counts for nothing"


def test_held_out_bytes_of_a_document_that_ends_in_a_replacement_character(tmp_path):
    """Badly decoded text contains U+FFFD itself, which has three bytes. Only one made by the cut does not count."""
    pack(tmp_path / "data", ByteTokenizer(), [Document("t", "text")], [Document("a", "a\ufffd"), Document("b", "bcd")])
    data = Packed(tmp_path / "data")
    assert data.held_out_bytes(7) == len("a\ufffdbc".encode())  # a, the three bytes, an end of text, b, c


def test_another_tokenizer_beside_the_data_is_refused(folder, refuses):
    (folder / "tokenizer.json").unlink()
    train_bpe(TRAIN, 260).save(folder)
    with refuses(f"the data were packed with tokenizer {ByteTokenizer().sha256[:12]}, not "):
        Packed(folder)


def test_what_cannot_work_is_refused(packed, tmp_path, refuses):
    with refuses("tokens is 1: expected at least 2"):
        packed.held_out(length=8, tokens=1)
    with refuses("`length=0`: must be at least 1"):
        packed.held_out(length=0)
    pack(tmp_path / "a", ByteTokenizer(), [Document("a", "text")], [])
    with refuses("no held-out text; pack it with `valid_fraction` above 0, or with `valid`"):
        Packed(tmp_path / "a").held_out(length=8)
    with refuses("does not exist: expected a folder that `retentive data` wrote", FileNotFoundError):
        Packed(tmp_path / "nowhere")
