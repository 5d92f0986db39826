"""Packed data to batches, each a pure function of (seed, step): to resume, only the step is needed.

    packed   windows of `length` tokens in a new keyed order every epoch; documents run into each other
    reset    the same windows, and `cu_seqlens` so that no state passes from document to document
    carry    truncated back-propagation through time: the documents, in a new order every epoch, make a stream
             cut into `batch` lanes; at every step each goes on where it stopped, its state handed over

The end-of-text token after a document is the first of the next one's sequence: every token is predicted, and a
model has learnt to begin a document from it.

All ranks see slices of the same global batch: the order does not depend on how many they are. It comes from
a Feistel network keyed with (seed, epoch), which permutes [0, n) without a table (Luby and Rackoff, 1988;
what lands outside goes through again, Black and Rogaway, 2002).
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retentive.data.pack import Meta, load_meta, shard_path
from retentive.data.tokenizer import Tokenizer


class Lanes(NamedTuple):
    first: Tensor
    """int64 [B]: which of the N sequences is each lane's first in this batch."""
    last: Tensor
    """int64 [B]: which is its last, whose final state the next step may need."""
    continues: Tensor
    """bool [B]: the first goes on from the last of the step before (hand its state in), or starts afresh."""


class Batch(NamedTuple):
    ids: Tensor
    """int64 [B, T], or [1, B*T] with cu_seqlens."""
    targets: Tensor
    """The next token of each, the same shape."""
    cu_seqlens: Tensor | None
    """int32 [N+1]: where the sequences of the flattened batch start, rows included, and its length."""
    lanes: Lanes | None
    """Only in mode "carry"."""


class Batches:
    """`batches[step]` for any step from 0 on, without end; see the module for the modes.

    `batch` counts the rows of all ranks together, `length` the tokens T of a row.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "train",
        mode: Literal["reset", "packed", "carry"] = "reset",
        batch: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if mode not in ("reset", "packed", "carry"):
            raise ValueError(f'mode is {mode!r}: expected "reset", "packed" or "carry"')
        if batch < 1 or length < 1:
            raise ValueError(f"batch is {batch} and length is {length}: expected at least 1 each")
        if not 0 <= rank < world or batch % world:
            raise ValueError(f"batch {batch}, rank {rank}, world {world}: expected a multiple of world, a rank below")
        self.meta = load_meta(path)
        self._stream = _Stream(path, self.meta, split)
        self.tokens = self._stream.tokens
        self.mode, self.length, self.seed = mode, length, seed
        self._batch, self._rows = batch, range(rank * batch // world, (rank + 1) * batch // world)
        self._windows = (self.tokens - 1) // length
        lanes_or_one = batch if mode == "carry" else 1
        if self._windows < lanes_or_one:
            what = f"{batch} lanes" if mode == "carry" else "a window"
            raise ValueError(
                f"the {split} split of {path} holds {self.tokens:,} tokens, too few for {what} of length "
                f"{length} and a target: use a smaller length or batch, or more text"
            )
        carried, all_once = self._windows // batch, -(-self._windows // batch)
        self.steps_per_epoch = carried if mode == "carry" else all_once
        self._layout: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f"step is {step}: steps count from 0")
        return self._carry(step) if self.mode == "carry" else self._shuffled(step)

    def _shuffled(self, step: int) -> Batch:
        epochs, index = np.divmod(step * self._batch + np.array(self._rows), self._windows)
        # A batch may hold the last windows of one epoch and the first of the next.
        for epoch in np.unique(epochs):
            index[epochs == epoch] = permute(index[epochs == epoch], self._windows, (self.seed, epoch))
        starts = [int(window) * self.length for window in index]
        rows = [self._stream.read(start, start + self.length + 1) for start in starts]
        if self.mode == "packed":
            block = torch.from_numpy(np.stack(rows))
            return Batch(block[:, :-1].contiguous(), block[:, 1:].contiguous(), None, None)
        ends = [self._stream.ends_in(start, start + self.length) - start for start in starts]
        return _joined(rows, ends)[0]

    def _carry(self, step: int) -> Batch:
        epoch, step = divmod(step, self.steps_per_epoch)
        order, starts = self._document_order(epoch)
        rows, ends, continues = [], [], []
        for lane in self._rows:
            place = (lane * self.steps_per_epoch + step) * self.length
            document = int(np.searchsorted(starts, place, "right")) - 1
            continues.append(step > 0 and place + 1 != starts[document + 1])  # not on an end of text
            stop = int(np.searchsorted(starts, place + self.length, "right"))
            ends.append(starts[document + 1 : stop] - place)
            rows.append(self._read_ordered(order, starts, document, place, self.length + 1))
        batch, first = _joined(rows, ends)
        lanes = Lanes(torch.from_numpy(first[:-1]), torch.from_numpy(first[1:] - 1), torch.tensor(continues))
        return batch._replace(lanes=lanes)

    def _document_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """This epoch's documents in order, and where each starts in their stream, whose length comes last."""
        if self._layout is None or self._layout[0] != epoch:
            ends = self._stream.ends_in(0, self.tokens)
            order = permute(np.arange(len(ends)), len(ends), (self.seed, epoch))
            lengths = np.diff(ends, prepend=0)
            self._layout = (epoch, order, np.concatenate([[0], np.cumsum(lengths[order])]))
        return self._layout[1:]

    def _read_ordered(self, order: np.ndarray, starts: np.ndarray, document: int, place: int, count: int) -> np.ndarray:
        parts = []
        while count:
            stop = min(place + count, int(starts[document + 1]))
            begin = self._stream.start_of(int(order[document])) + place - int(starts[document])
            parts.append(self._stream.read(begin, begin + stop - place))
            count, place, document = count - (stop - place), stop, document + 1
        return np.concatenate(parts)


def held_out(path: str | Path, *, length: int, tokens: int | None = None) -> Iterator[Batch]:
    """The held-out text in order, as batches [1, length] with `cu_seqlens`, the last one shorter.

    Covers the first `tokens` tokens (default: all). Each but the very first is predicted once.
    """
    if length < 1:
        raise ValueError(f"length is {length}: expected at least 1")
    stream, count = _held_out_stream(path, tokens)

    def windows() -> Iterator[Batch]:
        for start in range(0, count - 1, length):
            stop = min(start + length, count - 1)
            yield _joined([stream.read(start, stop + 1)], [stream.ends_in(start, stop) - start])[0]

    return windows()


def held_out_bytes(path: str | Path, tokenizer: Tokenizer, tokens: int | None = None) -> int:
    """The UTF-8 bytes of the text that `held_out(path, tokens=tokens)` covers, for bits per byte."""
    meta = load_meta(path)
    check_tokenizer(meta, tokenizer)
    stream, count = _held_out_stream(path, tokens)
    if count == stream.tokens:
        return meta.splits["valid"].bytes
    size = start = 0
    for end in [*stream.ends_in(0, count - 1).tolist(), count]:
        # Where the count ends inside a character, that character is not covered.
        size += len(tokenizer.decode(stream.read(start, end).tolist()).rstrip("\ufffd").encode())
        start = end
    return size


def first_tokens(path: str | Path, split: str, most: int) -> np.ndarray:
    """int64: the first `most` tokens of a split, or all."""
    stream = _Stream(path, load_meta(path), split)
    return stream.read(0, min(stream.tokens, most))


def check_tokenizer(meta: Meta, tokenizer: Tokenizer) -> None:
    """Raises ValueError unless the data were packed with this tokenizer."""
    if meta.tokenizer_sha256 != tokenizer.sha256:
        raise ValueError(
            f"the data were packed with tokenizer {meta.tokenizer_sha256[:12]}, not {tokenizer.sha256[:12]}: "
            f"use the tokenizer.json beside the data, or pack the text again with the other"
        )


def permute(index: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Where the keyed permutation of [0, n) sends each index; int64."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    word = np.uint64(32)
    name = ",".join(str(int(part)) for part in key)
    salts = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=48).digest(), "<u8")

    def shuffled(value: np.ndarray) -> np.ndarray:
        left, right = value >> half, value & mask
        for salt in salts:
            mixed = (right + salt) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as meant
            mixed = (mixed ^ mixed >> word) * np.uint64(0xD6E8FEB86659FD93) >> word
            left, right = right, left ^ mixed & mask
        return left << half | right

    out = shuffled(index.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = shuffled(out[outside])
    return out.astype(np.int64)


class _Stream:
    """The shards of a split as one stream of tokens and one list of document ends, both left on disk."""

    def __init__(self, path: str | Path, meta: Meta, split: str):
        if split not in meta.splits:
            raise ValueError(f"no split {split!r} in {path}: it has {', '.join(meta.splits)}")
        shards = meta.splits[split].shards
        files = range(len(shards))
        dtype = np.dtype(meta.dtype).newbyteorder("<")
        self._ids = [np.memmap(shard_path(path, split, n, ".bin"), dtype, "r") for n in files]
        self._ends = [np.memmap(shard_path(path, split, n, ".idx"), "<u8", "r") for n in files]
        for number, (ids, ends) in enumerate(zip(self._ids, self._ends, strict=True)):
            if ends[-1] != len(ids):
                raise ValueError(f"{shard_path(path, split, number, '.idx')} is damaged: pack the data again")
        self._token_starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._document_starts = np.cumsum([0, *(shard.documents for shard in shards)])
        self.tokens = int(self._token_starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]"""
        return self._across(self._ids, start, stop, lambda ids, low, high, _: ids[low:high])

    def ends_in(self, start: int, stop: int) -> np.ndarray:
        """The document ends e with start < e <= stop; int64."""

        def within(ends: np.ndarray, low: int, high: int, base: int) -> np.ndarray:
            # A Python int would send a uint64 search through float64.
            first, last = np.searchsorted(ends, np.array([low, high], np.uint64), "right")
            return ends[first:last].astype(np.int64) + base

        return self._across(self._ends, start, stop, within)

    def start_of(self, document: int) -> int:
        shard = int(np.searchsorted(self._document_starts, document, "right")) - 1
        local = document - int(self._document_starts[shard])
        return int(self._token_starts[shard]) + (int(self._ends[shard][local - 1]) if local else 0)

    def _across(self, arrays: list[np.memmap], start: int, stop: int, take: Callable[..., np.ndarray]) -> np.ndarray:
        """`take(array, low, high, base)` of every shard that holds tokens of [start, stop), joined."""
        parts = []
        shard = int(np.searchsorted(self._token_starts, start, "right")) - 1
        while shard < len(arrays) and (base := int(self._token_starts[shard])) < stop:
            low, high = max(start - base, 0), min(stop, int(self._token_starts[shard + 1])) - base
            parts.append(take(arrays[shard], low, high, base).astype(np.int64))
            shard += 1
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _joined(rows: list[np.ndarray], ends: list[np.ndarray]) -> tuple[Batch, np.ndarray]:
    """Rows of T+1 tokens with document ends in (0, T] flattened; each row's first sequence, and their count."""
    starts: list[np.ndarray] = []
    first: list[int] = []
    place = 0
    for row, end in zip(rows, ends, strict=True):
        first.append(sum(len(s) for s in starts))
        marks = end - 1  # where the end-of-text tokens stand
        starts.append(place + np.concatenate([[0], marks[marks > 0]]))
        place += len(row) - 1
    cu_seqlens = np.concatenate([*starts, [place]]).astype(np.int32)
    ids, targets = (np.concatenate([row[cut] for row in rows]) for cut in (slice(None, -1), slice(1, None)))
    batch = Batch(torch.from_numpy(ids)[None], torch.from_numpy(targets)[None], torch.from_numpy(cu_seqlens), None)
    return batch, np.array([*first, len(cu_seqlens) - 1])


def _held_out_stream(path: str | Path, tokens: int | None) -> tuple[_Stream, int]:
    stream = _Stream(path, load_meta(path), "valid")
    if tokens is not None and tokens < 2:
        raise ValueError(f"tokens is {tokens}: expected at least 2, one to read and one to predict")
    if stream.tokens < 2:
        raise ValueError(f"{path} has no held-out text: pack it with --valid-fraction above 0 or --valid")
    return stream, min(tokens or stream.tokens, stream.tokens)
