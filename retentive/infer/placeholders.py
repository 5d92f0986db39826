"""Pictures and sound among a prompt's ids: what is encoded before a chunk is read, and keys for the prefix cache.

    of_prompt = Placeholders(ids, rows, configs)            rows: for each kind those of all its placeholders
    embeddings([(of_prompt, begin, end)], encode)           by kind, for the placeholders among ids[begin:end]

Chunks of a prompt may begin and end anywhere. Sound is encoded chunk by chunk. A picture is encoded whole with the
first chunk that reads of it, and the embeddings of the rest wait here for the next ones.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from retentive.data.media import Rows
from retentive.models.encoders import Config, check_rows

Encode = Callable[[str, Tensor], Tensor]
"""Embeddings `[n, D]` of a kind's rows `[n, features]`, whole pictures."""


class Placeholders:
    """The placeholders of one prompt, and the rows that they stand for.

    Raises:
        ValueError: a kind without an encoder, another number of rows than of placeholders, rows of another width, part
            of a picture.
    """

    def __init__(self, ids: Sequence[int], rows: Rows, configs: Mapping[str, Config]):
        every = np.asarray(ids)
        places = {kind: np.flatnonzero(every == config.token) for kind, config in configs.items()}
        check_rows({kind: len(at) for kind, at in places.items()}, rows)
        self.kinds = {kind: OfKind(kind, given, places[kind], configs[kind]) for kind, given in rows.items()}
        self.tokens = frozenset(config.token for config in configs.values())
        """Ids of placeholders, of all kinds."""
        self.end = max((int(of_kind.places[-1]) + 1 for of_kind in self.kinds.values() if len(of_kind.rows)), default=0)
        """Where the ids after the last of them begin."""

    def keys(self, ids: Sequence[int]) -> list[int]:
        """The ids, with a negative hash of what it stands for in place of each placeholder: 63 bits of its picture.

        Takes some microseconds for each picture, and for each row of sound.
        """
        keys = list(ids)
        for of_kind in self.kinds.values():
            for place, key in zip(of_kind.places.tolist(), of_kind.keys(), strict=True):
                keys[place] = key
        return keys

    def within(self, begin: int, end: int, room: int) -> tuple[int, int]:
        """(the end of as many of ids[begin:end] as can be read, the room left) if encoders read at most `room` rows.

        A picture counts with all its rows; one is begun as long as there is any room.
        """
        for of_kind in self.kinds.values():
            end, room = of_kind.within(begin, end, room)
        return end, room


class OfKind:
    """The placeholders of one kind, of which the n-th stands for row n."""

    def __init__(self, kind: str, rows: np.ndarray, places: np.ndarray, config: Config):
        self.kind, self.rows, self.places, self.unit = kind, rows, places, config.unit
        if rows.shape[1:] != (config.features,):
            raise ValueError(f"{kind} rows {list(rows.shape)}: the model's encoder reads rows of {config.features}")
        if len(rows) % self.unit:
            raise ValueError(f"{len(rows)} rows of {kind}: each has {self.unit}, and is read whole")
        self.first, self.waiting = 0, torch.empty(0)
        """Embeddings that are not read yet, of the rows from `first` on."""

    def _due(self, begin: int, end: int) -> tuple[int, int, int, int]:
        """The rows that ids[begin:end] stand for, and those of them (whole pictures) that are not encoded yet."""
        first, last = self.places.searchsorted((begin, end)).tolist()
        # where a cached state has read part of a picture, it is encoded from its beginning on
        start = max(self.first + len(self.waiting), first - first % self.unit)
        return first, last, start, max(start, last + -last % self.unit)

    def due(self, begin: int, end: int) -> np.ndarray:
        """The rows to be encoded before ids[begin:end] are read; none where that was done."""
        _, _, start, stop = self._due(begin, end)
        return self.rows[start:stop]

    def take(self, begin: int, end: int, encoded: Tensor) -> Tensor:
        """The embeddings of the placeholders among ids[begin:end], of which those that were due are `encoded`."""
        first, last, start, _ = self._due(begin, end)
        if not len(self.waiting):
            self.first, self.waiting = start, encoded
        elif len(encoded):
            self.waiting = torch.cat([self.waiting, encoded])
        found = self.waiting[first - self.first : last - self.first]
        self.first, self.waiting = last, self.waiting[last - self.first :]
        return found

    def within(self, begin: int, end: int, room: int) -> tuple[int, int]:
        """As of `Placeholders`."""
        _, _, start, stop = self._due(begin, end)
        most = start + max(room + -room % self.unit, 0)
        if most < stop:
            end, stop = max(begin, int(self.places[most])), most
        return end, room - (stop - start)

    def keys(self) -> list[int]:
        """A negative number for each placeholder, by a hash of its kind and of all that is encoded with its row."""
        keys = []
        for n in range(0, len(self.rows), self.unit):
            digest = hashlib.blake2b(self.kind.encode(), digest_size=8)
            digest.update(self.rows[n : n + self.unit].tobytes())
            keys += [-1 - (int.from_bytes(digest.digest(), "big") >> 1)] * self.unit
        return keys


def among(placeholders: Placeholders | None, begin: int, end: int | None = None) -> Rows:
    """The rows of ids[begin:end], which cut no picture; none of a prompt of text alone."""
    found = {}
    for kind, of_kind in ({} if placeholders is None else placeholders.kinds).items():
        first, last = of_kind.places.searchsorted((begin, np.iinfo(np.int64).max if end is None else end))
        found[kind] = of_kind.rows[first:last]
    return {kind: rows for kind, rows in found.items() if len(rows)}


def embeddings(parts: Sequence[tuple[Placeholders | None, int, int]], encode: Encode) -> dict[str, Tensor]:
    """Embeddings for the placeholders among ids[begin:end] of several prompts, by kind, in the order of the prompts.

    Encoders run here, each once for all of the prompts.
    """
    spans: dict[str, list[tuple[OfKind, int, int]]] = {}
    for prompt, begin, end in parts:
        for kind, of_kind in ({} if prompt is None else prompt.kinds).items():
            spans.setdefault(kind, []).append((of_kind, begin, end))
    found = {}
    for kind, of_prompts in spans.items():
        due = [of_kind.due(begin, end) for of_kind, begin, end in of_prompts]
        made = encode(kind, torch.from_numpy(np.concatenate(due))) if any(map(len, due)) else torch.empty(0)
        each = zip(of_prompts, made.split([len(rows) for rows in due]), strict=True)
        taken = [of_kind.take(begin, end, encoded) for (of_kind, begin, end), encoded in each]
        if any(map(len, taken)):
            found[kind] = torch.cat([x for x in taken if len(x)])
    return found
