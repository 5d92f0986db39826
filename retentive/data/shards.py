"""Shards of a packed split as one stream: tokens and document ends, memory-mapped from disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from retentive.data.pack import Meta, row_type, shard_path


class TokenStream:
    """All tokens of a split in order. Tokens and documents are counted from 0 across all shards.

    Raises:
        ValueError: the split does not exist, or a shard is damaged.
    """

    def __init__(self, folder: str | Path, meta: Meta, split: str):
        if split not in meta.splits:
            raise ValueError(f"no split {split!r} in {folder}: it has {', '.join(meta.splits)}")
        shards = meta.splits[split].shards
        self.name = f"{split} split of {folder}"
        """Name used in messages."""
        self._files = [shard_path(folder, split, n, ".bin") for n in range(len(shards))]
        dtype = np.dtype(meta.dtype).newbyteorder("<")  # the file's byte order, whatever the machine's
        # plain arrays over the mapped file: slicing a memmap takes several times as long
        self._ids = [np.asarray(np.memmap(file, dtype, "r")) for file in self._files]
        self._ends = [np.asarray(np.memmap(file.with_suffix(".idx"), "<u8", "r")) for file in self._files]
        for file, ids, ends in zip(self._files, self._ids, self._ends, strict=True):
            if ends[-1] != len(ids):
                raise ValueError(f"{file.with_suffix('.idx')} is damaged: pack the data again")
        self._answers = [np.memmap(file.with_suffix(".ans"), np.bool_, "r") for file in self._files if meta.chats]
        self.chats, self.eos_id = meta.chats, meta.eos_id
        """True for conversations; the end-of-text id."""
        self._rows = {
            kind: [
                np.memmap(file.with_suffix(f".{kind}"), row_type(meta, kind).base, "r").reshape(-1, how["features"])
                if (shard.rows or {}).get(kind) else np.empty((0, how["features"]), how["dtype"])
                for file, shard in zip(self._files, shards, strict=True)
            ]
            for kind, how in (meta.media or {}).items()
        }  # fmt: skip
        self.media = meta.media or {}
        """As in `Packed`."""
        # positions of the placeholders in each shard: the n-th has the n-th row
        self._places = {
            kind: [np.flatnonzero(ids == self.media[kind]["token"]) for ids in self._ids] for kind in self._rows
        }
        for kind, places in self._places.items():
            for file, where, rows in zip(self._files, places, self._rows[kind], strict=True):
                if len(where) != len(rows):
                    raise ValueError(f"{file.with_suffix(f'.{kind}')} is damaged: pack the data again")
        self._vocab_size = meta.vocab_size
        self._token_starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._document_starts = np.cumsum([0, *(shard.documents for shard in shards)])
        self.tokens = int(self._token_starts[-1])
        """Number of tokens."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the token ids from `start` to before `stop`, int64 [stop - start].

        Raises:
            ValueError: an id is beyond the vocabulary. An embedding would fail obscurely, and leave a GPU unusable.
        """

        def within(shard: int, low: int, high: int, _: int) -> np.ndarray:
            ids = self._ids[shard][low:high].astype(np.int64)
            known = ids < self._vocab_size
            for how in self.media.values():
                known |= ids == how["token"]
            if not known.all():
                largest = int(ids.max())
                raise ValueError(
                    f"{self._files[shard]} holds token {largest:,}, but the vocabulary has {self._vocab_size:,}: "
                    f"the file is damaged, pack the data again"
                )
            return ids

        return self._across(start, stop, within)

    def answered(self, start: int, stop: int) -> np.ndarray:
        """Returns which ids are training targets, bool [stop - start]: for conversations those of answers."""
        if not self.chats:
            return np.ones(stop - start, bool)
        return self._across(start, stop, lambda shard, low, high, _: self._answers[shard][low:high])

    def rows(self, kind: str, start: int, stop: int) -> np.ndarray:
        """Returns the rows of the placeholders among these ids, in order, `[n, features]`."""

        def within(shard: int, low: int, high: int, _: int) -> np.ndarray:
            first, last = np.searchsorted(self._places[kind][shard], [low, high])
            return np.array(self._rows[kind][shard][first:last])

        return self._across(start, stop, within).reshape(-1, self.media[kind]["features"])

    def ends_in(self, start: int, stop: int) -> np.ndarray:
        """Returns the document ends e with start < e <= stop, each just after an end-of-text token; int64."""

        def within(shard: int, low: int, high: int, base: int) -> np.ndarray:
            ends = self._ends[shard]
            # uint64 as in the file: for a Python int numpy would first convert all ends to float64.
            first, last = np.searchsorted(ends, np.array([low, high], np.uint64), "right")
            return ends[first:last].astype(np.int64) + base

        return self._across(start, stop, within)

    def start_of(self, document: int) -> int:
        """Returns the position in the stream where a document, given by number, begins."""
        shard = int(np.searchsorted(self._document_starts, document, "right")) - 1
        local = document - int(self._document_starts[shard])
        return int(self._token_starts[shard]) + (int(self._ends[shard][local - 1]) if local else 0)

    def _across(self, start: int, stop: int, take: Callable[[int, int, int, int], np.ndarray]) -> np.ndarray:
        """Joins `take(shard, low, high, base)` over all shards that hold tokens of [start, stop).

        low and high are relative to the shard's start, which is at `base` in the stream.
        """
        parts = []
        shard = int(np.searchsorted(self._token_starts, start, "right")) - 1
        while shard < len(self._ids) and (base := int(self._token_starts[shard])) < stop:
            low, high = max(start - base, 0), min(stop, int(self._token_starts[shard + 1])) - base
            parts.append(take(shard, low, high, base))
            shard += 1
        return np.concatenate(parts) if parts else np.empty(0, np.int64)
