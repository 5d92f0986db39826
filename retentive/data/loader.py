"""Batches from packed tokens, each a pure function of (seed, step), so resuming needs only the step.

    packed   windows of `length` tokens in a new order every epoch; documents run into each other
    reset    the same windows, with `cu_seqlens`, so that no state passes from document to document
    whole    rows of whole documents, padded, with `cu_seqlens`; only documents longer than a row are cut
    carry    truncated back-propagation through time: the documents, shuffled every epoch, form one stream that is cut
             into `batch` rows; at every step each row continues where it stopped, with its state

The end-of-text token after a document is the first token of the next one's sequence. So every token is predicted, and
a model learns to begin a document from it. Conversations begin with their own first token, and only answers are
predicted: all other targets are IGNORE.

All ranks get slices of the same global batch, so the order does not depend on their number. It comes from a Feistel
network keyed with (seed, epoch), which permutes [0, n) without a table (Luby and Rackoff, 1988). Values outside [0, n)
go through it again (cycle walking: Black and Rogaway, 2002).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from retentive.data.shards import TokenStream
from retentive.ops.cross_entropy import IGNORE
from retentive.options import option

Mode = Literal["reset", "packed", "whole", "carry"]


class Carry(NamedTuple):
    """States that pass from one batch to the next (`models.carry` does it)."""

    first: Tensor
    """int64 [B]: index among the batch's N sequences of each row's first one."""
    last: Tensor
    """int64 [B]: index of each row's last sequence, whose final state the next step may continue from."""
    continues: Tensor
    """bool [B]: True if the first sequence continues the row's last one of the previous step."""


class Batch(NamedTuple):
    """One batch of token ids and targets."""

    ids: Tensor
    """int64 [B, T], or [1, B*T] with cu_seqlens."""
    targets: Tensor
    """The next token of each id, same shape; IGNORE for those that are not predicted."""
    cu_seqlens: Tensor | None
    """int32 [N+1]: start of each sequence in the flattened batch (every row starts one), and its length."""
    carry: Carry | None
    """Set in mode "carry" only."""
    rows: Mapping[str, Tensor] | None = None
    """For image and audio: `[n, features]`, one row for each placeholder among the ids, in order."""

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch with all its tensors on the device."""
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        carry = None if self.carry is None else Carry(*(x.to(device) for x in self.carry))
        rows = None if self.rows is None else {kind: x.to(device) for kind, x in self.rows.items()}
        return Batch(self.ids.to(device), self.targets.to(device), cu_seqlens, carry, rows)


class Row(NamedTuple):
    """One row of a batch, before it is assembled."""

    ids: np.ndarray
    """int64 [T]."""
    targets: np.ndarray
    """int64 [T]."""
    begins: np.ndarray
    """Starts of sequences within (0, T), ascending; another one starts at 0."""
    rows: Mapping[str, np.ndarray] = MappingProxyType({})
    """As in Batch."""


class Batches:
    """`batches[step]` is the batch of any step, from 0 without end.

    Args:
        mode: see the module.
        batch: global batch size in rows, over all ranks.
        length: tokens T per row.
        seed: chooses the order.
        rank, world: this process's rank and the number of ranks; each gets `batch / world` rows.

    Raises:
        ValueError: the numbers do not fit together, or there is too little text for one batch.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        mode: Mode = "reset",
        batch: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if mode not in get_args(Mode):
            raise ValueError(f"{option('mode', mode)}: expected one of {', '.join(get_args(Mode))}")
        if batch < 1 or length < 1:
            raise ValueError(f"{option('batch', batch)}, {option('length', length)}: each must be at least 1")
        self._rows = check_ranks(batch, rank, world)
        self._stream, self.tokens = stream, stream.tokens
        self.mode, self.length, self.seed = mode, length, seed
        self._batch = batch
        self._windows = (self.tokens - 1) // length  # the last token of a window needs a target beyond it
        if stream.media and mode != "whole":
            kinds = " and ".join(stream.media)
            raise ValueError(f"{option('mode', mode)}: data with {kinds} need another; set `mode='whole'`")
        if mode == "whole":
            self._pieces, self._first_pieces = whole_rows(stream, length, seed)
            self._windows = len(self._first_pieces) - 1
        needed, what = (batch, f"{batch} rows") if mode == "carry" else (1, "a window")
        if self._windows < needed:
            raise ValueError(
                f"the {stream.name} holds {self.tokens:,} tokens, too few for {what} of length {length} and a "
                f"target: use a smaller `length` or `batch`, or more text"
            )
        # In mode carry the rows have equal lengths and leave a rest. Otherwise all windows are read, and the last batch
        # takes windows of the next epoch.
        self.steps_per_epoch = self._windows // batch if mode == "carry" else -(-self._windows // batch)
        self._layout: tuple[int, np.ndarray, np.ndarray] | None = None  # of the latest epoch

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f"step is {step}: steps count from 0")
        return self._carry(step) if self.mode == "carry" else self._shuffled(step)

    def _shuffled(self, step: int) -> Batch:
        return joined_rows(self.rows(step * self._batch + np.array(self._rows)), self.mode)

    def rows(self, numbers: np.ndarray) -> list[Row]:
        """Returns rows by number, counted over all steps. Not in mode "carry", whose rows continue each other."""
        epochs, index = np.divmod(numbers, self._windows)
        # A batch may hold the last windows of one epoch and the first ones of the next.
        for epoch in np.unique(epochs):
            index[epochs == epoch] = permute(index[epochs == epoch], self._windows, (self.seed, epoch))
        if self.mode == "whole":
            return [self._whole(int(row)) for row in index]
        return [row_at(self._stream, int(window) * self.length, self.length) for window in index]

    def _whole(self, row: int) -> Row:
        """Returns a row made of its pieces and padded with end-of-text ids."""
        ids, targets = (np.full(self.length, x, np.int64) for x in (self._stream.eos_id, IGNORE))
        at, begins, rows = 0, [], []
        for start, stop in self._pieces[self._first_pieces[row] : self._first_pieces[row + 1]]:
            begins.append(at)
            piece = row_at(self._stream, start, stop - start)
            ids[at : at + stop - start], targets[at : at + stop - start] = piece.ids, piece.targets
            rows.append(piece.rows)
            at += int(stop - start)
        inner = np.array([*begins[1:], at] if at < self.length else begins[1:], np.int64)
        return Row(ids, targets, inner, _joined(rows))

    def _carry(self, step: int) -> Batch:
        epoch, step = divmod(step, self.steps_per_epoch)
        order, starts = self._document_order(epoch)
        rows, continues, early = [], [], int(not self._stream.chats)  # a text starts at the end-of-text id before it
        for row in self._rows:
            start = (row * self.steps_per_epoch + step) * self.length
            document = int(np.searchsorted(starts, start, "right")) - 1
            # A row does not continue if one of its sequences begins at its start.
            begins = starts[document : int(np.searchsorted(starts, start + self.length, "right"))] - early - start
            continues.append(step > 0 and 0 not in begins)
            here = (order, starts, document, start, self.length + 1)
            ids, answered = (self._read_ordered(read, *here) for read in (self._stream.read, self._stream.answered))
            targets = np.where(answered[1:], ids[1:], IGNORE)
            rows.append(Row(ids[:-1], targets, begins[(begins > 0) & (begins < self.length)]))
        batch, first = flattened(rows)
        carry = Carry(torch.from_numpy(first[:-1]), torch.from_numpy(first[1:] - 1), torch.tensor(continues))
        return batch._replace(carry=carry)

    def _document_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns an epoch's documents in order, and each one's start in the stream they form, with its length last."""
        if self._layout is None or self._layout[0] != epoch:
            ends = self._stream.ends_in(0, self.tokens)
            order = permute(np.arange(len(ends)), len(ends), (self.seed, epoch))
            lengths = np.diff(ends, prepend=0)
            self._layout = (epoch, order, np.concatenate([[0], np.cumsum(lengths[order])]))
        return self._layout[1:]

    def _read_ordered(
        self,
        read: Callable[[int, int], np.ndarray],
        order: np.ndarray,
        starts: np.ndarray,
        document: int,
        start: int,
        count: int,
    ) -> np.ndarray:
        """Applies `read` to `count` tokens of the ordered documents, from `start` in the `document`-th on."""
        parts = []
        while count:
            stop = min(start + count, int(starts[document + 1]))
            begin = self._stream.start_of(int(order[document])) + start - int(starts[document])
            parts.append(read(begin, begin + stop - start))
            count, start, document = count - (stop - start), stop, document + 1
        return np.concatenate(parts)


def check_ranks(batch: int, rank: int, world: int) -> range:
    """Returns this rank's rows of a batch; raises ValueError if the ranks cannot share it."""
    if batch < 1 or not 0 <= rank < world or batch % world:
        raise ValueError(f"batch {batch}, rank {rank}, world {world}: expected a multiple of world, a rank below")
    return range(rank * batch // world, (rank + 1) * batch // world)


def permute(index: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Applies the permutation of [0, n) chosen by `key` to each index; returns int64.

    A Feistel network permutes [0, 4^half), the smallest such range that holds n; `key` salts its six rounds.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    word = np.uint64(32)
    name = ",".join(str(int(part)) for part in key)
    salts = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=48).digest(), "<u8")

    def shuffled(value: np.ndarray) -> np.ndarray:
        left, right = value >> half, value & mask
        for salt in salts:
            mixed = (right + salt) * np.uint64(0x9E3779B97F4A7C15)  # overflow is intended, as in a hash
            mixed = (mixed ^ mixed >> word) * np.uint64(0xD6E8FEB86659FD93) >> word
            left, right = right, left ^ mixed & mask
        return left << half | right

    out = shuffled(index.astype(np.uint64))
    # Cycle walking: values outside [0, n) are shuffled again until they are inside, which is still a permutation.
    # Fewer than four rounds on average, since 4^half < 4 n.
    while (outside := out >= n).any():
        out[outside] = shuffled(out[outside])
    return out.astype(np.int64)


def row_at(stream: TokenStream, start: int, length: int) -> Row:
    """Returns the tokens of a stream from `start` on, with the token after them as the last target."""
    ids = stream.read(start, start + length + 1)
    targets = np.where(stream.answered(start + 1, start + length + 1), ids[1:], IGNORE)
    begins = stream.ends_in(start, start + length) - start - (not stream.chats)
    rows = {kind: stream.rows(kind, start, start + length) for kind in stream.media}
    return Row(ids[:-1], targets, begins[(begins > 0) & (begins < length)], rows)


def whole_rows(stream: TokenStream, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lays out whole documents in rows: (start and stop of pieces `[P,2]`, first piece of each row, with P last).

    A piece is a document without its last token, which is only a target. A document longer than a row becomes pieces as
    long as a row. Documents fill rows in an order chosen by the seed; the first that does not fit starts a new row.

    Raises:
        ValueError: a document with pictures or sound is longer than a row; these are never cut.
    """
    ends = stream.ends_in(0, stream.tokens)
    if stream.media and (longest := int(np.diff(ends, prepend=0).max())) > length + 1:
        need = option("length", longest)
        raise ValueError(f"the longest conversation has {longest:,} tokens, a row {length:,}: set {need}")
    # a text also reads the end-of-text id before it; the very first has none
    starts = np.concatenate([[0], ends[:-1] - (not stream.chats)])
    pieces, first, room = list[tuple[int, int]](), [0], length
    for document in permute(np.arange(len(ends)), len(ends), (seed, 0)).tolist():
        for start in range(int(starts[document]), int(ends[document]) - 1, length):
            stop = min(start + length, int(ends[document]) - 1)
            if stop - start > room:
                first.append(len(pieces))
                room = length
            pieces.append((start, stop))
            room -= stop - start
    return np.array(pieces, np.int64).reshape(-1, 2), np.array([*first, len(pieces)])


def joined_rows(rows: list[Row], mode: Mode) -> Batch:
    """Joins rows into a batch of their mode, one without carried states."""
    if mode != "packed":
        return flattened(rows)[0]
    ids, targets = (torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in Row._fields[:2])
    return Batch(ids, targets, None, None)


def flattened(rows: list[Row]) -> tuple[Batch, np.ndarray]:
    """Returns the rows as one batch [1, B*T], and the index of each row's first sequence, with N last."""
    starts: list[np.ndarray] = []
    first: list[int] = []
    length = 0
    for row in rows:
        first.append(sum(len(s) for s in starts))
        starts.append(length + np.concatenate([[0], row.begins]))
        length += len(row.ids)
    cu_seqlens = np.concatenate([*starts, [length]]).astype(np.int32)
    ids, targets = (
        torch.from_numpy(np.concatenate([getattr(row, name) for row in rows]))[None] for name in Row._fields[:2]
    )
    media = {kind: torch.from_numpy(x) for kind, x in _joined([row.rows for row in rows]).items()}
    batch = Batch(ids, targets, torch.from_numpy(cu_seqlens), None, media or None)
    return batch, np.array([*first, len(cu_seqlens) - 1])


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenates the media rows of several parts."""
    kinds = dict.fromkeys(kind for part in parts for kind in part)  # in a mixture some parts have none
    return {kind: np.concatenate([part[kind] for part in parts if kind in part]) for kind in kinds}
