"""Shards of a split as one stream: across their borders, in 32 bits, and when damaged."""

from pathlib import Path

import numpy as np
import pytest

from retentive.data.pack import load_meta, pack
from retentive.data.shards import TokenStream
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer

TEXTS = ["some text to train on, " * 3, "and more", "and more again"]
STREAM = [id for text in TEXTS for id in [*text.encode(), 256]]
ENDS = [n + 1 for n, id in enumerate(STREAM) if id == 256]


@pytest.fixture
def folder(tmp_path) -> Path:
    documents = [Document(str(n), text) for n, text in enumerate(TEXTS)]
    meta = pack(tmp_path / "packed", ByteTokenizer(), documents, [], shard_tokens=9)
    assert len(meta.splits["train"].shards) == 3
    return tmp_path / "packed"


def opened(folder: Path) -> TokenStream:
    return TokenStream(folder, load_meta(folder), "train")


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 5), (60, 75), (70, 71), (3, len(STREAM)), (75, 10**6)])
def test_tokens_and_document_ends_pass_over_shards(start, stop, folder):
    stream = opened(folder)
    assert stream.tokens == len(STREAM)
    assert stream.read(start, stop).tolist() == STREAM[start:stop]
    assert stream.ends_in(start, stop).tolist() == [end for end in ENDS if start < end <= stop]
    assert [stream.start_of(n) for n in range(3)] == [0, *ENDS[:2]]


def test_a_token_beyond_the_vocabulary_is_named_with_its_file(folder, refuses):
    """If a disk or a copy damaged a shard, an embedding would only report an index out of range."""
    ids = np.fromfile(folder / "train-00000.bin", "<u2")
    ids[5] = 65535
    ids.tofile(folder / "train-00000.bin")
    with refuses("train-00000.bin holds token 65,535, but the vocabulary has 257: the file is damaged"):
        opened(folder).read(0, 9)


def test_damaged_document_ends_are_noticed(folder, refuses):
    ends = np.fromfile(folder / "train-00000.idx", "<u8")
    ends[-1] += 1
    ends.tofile(folder / "train-00000.idx")
    with refuses("train-00000.idx is damaged"):
        opened(folder)


def test_vocabularies_above_16_bits(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size, eos_id = 70_000, 69_999

    pack(tmp_path / "a", Wide(), [Document("a", "abc" * 9)], [])
    assert opened(tmp_path / "a").read(0, 28).max() == 69_999
