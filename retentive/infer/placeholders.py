"""Placeholders of pictures and sound among a prompt's ids: their embeddings chunk by chunk, and keys for the cache.

    placeholders = Placeholders(ids, rows, configs)         rows: per kind, for all its placeholders
    embeddings([(placeholders, begin, end)], encode)        by kind, for the placeholders among ids[begin:end]

Chunks of a prompt may begin and end anywhere. Sound is encoded chunk by chunk. A picture is encoded whole, before the
first chunk that holds one of its tokens. The embeddings of its other tokens wait here for the next chunks.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from retentive.data.media import Rows
from retentive.models.encoders import Config, check_rows

Encode = Callable[[str, Tensor], Tensor]
"""Function from a kind and its rows `[n, features]`, whole pictures, to embeddings `[n, D]`."""


class Placeholders:
    """Placeholders of one prompt, and the rows that they stand for.

    Args:
        configs: the encoders' configs by kind.

    Raises:
        ValueError: a kind has no encoder, placeholders and rows differ in number, rows have another width, or a
            picture is incomplete.
    """

    def __init__(self, ids: Sequence[int], rows: Rows, configs: Mapping[str, Config]):
        every = np.asarray(ids)
        places = {kind: np.flatnonzero(every == config.token) for kind, config in configs.items()}
        check_rows({kind: len(at) for kind, at in places.items()}, rows)
        self.kinds = {kind: OfKind(kind, given, places[kind], configs[kind]) for kind, given in rows.items()}
        self.tokens = frozenset(config.token for config in configs.values())
        """Ids of placeholders, of all kinds."""
        self.end = max((int(of_kind.places[-1]) + 1 for of_kind in self.kinds.values() if len(of_kind.rows)), default=0)
        """Index of the first id after the last placeholder."""

    def keys(self, ids: Sequence[int]) -> list[int]:
        """Returns the ids with a negative 63-bit hash of its content in place of each placeholder.

        Equal keys mean equal ids and equal pictures and sound. Takes about a microsecond a picture or row of sound.
        """
        keys = list(ids)
        for of_kind in self.kinds.values():
            for place, key in zip(of_kind.places.tolist(), of_kind.keys(), strict=True):
                keys[place] = key
        return keys

    def within(self, begin: int, end: int, room: int) -> tuple[int, int]:
        """Returns (end of the longest ids[begin:end] for which encoders read at most `room` rows, remaining room).

        A picture counts with all its rows, and is begun if there is any room.
        """
        for of_kind in self.kinds.values():
            end, room = of_kind.within(begin, end, room)
        return end, room

    def among(self, begin: int, end: int) -> dict[str, np.ndarray]:
        """Returns the rows of ids[begin:end], which must not cut a picture."""
        spans = {kind: slice(*of_kind.places.searchsorted((begin, end))) for kind, of_kind in self.kinds.items()}
        found = {kind: of_kind.rows[spans[kind]] for kind, of_kind in self.kinds.items()}
        return {kind: rows for kind, rows in found.items() if len(rows)}


class OfKind:
    """Placeholders of one kind. The n-th stands for row n."""

    def __init__(self, kind: str, rows: np.ndarray, places: np.ndarray, config: Config):
        self.kind, self.rows, self.places, self.unit = kind, rows, places, config.unit
        if rows.shape[1:] != (config.features,):
            raise ValueError(f"{kind} rows {list(rows.shape)}: the encoder reads rows of {config.features}")
        if len(rows) % self.unit:
            raise ValueError(f"{len(rows)} rows of {kind}: each has {self.unit}; give all of them")
        self.first, self.waiting = 0, torch.empty(0)
        """Embeddings that no chunk has read yet, from row `first` on."""

    def _due(self, begin: int, end: int) -> tuple[int, int, int, int]:
        """Returns (first, last) row of ids[begin:end], then (first, last) row to encode before it, whole pictures."""
        first, last = self.places.searchsorted((begin, end)).tolist()
        # a cached state may have read a part of a picture; the picture is still encoded from its beginning
        start = max(self.first + len(self.waiting), first - first % self.unit)
        return first, last, start, max(start, last + -last % self.unit)

    def due(self, begin: int, end: int) -> np.ndarray:
        """Returns the rows to encode before ids[begin:end] are read; none if they are encoded already."""
        _, _, start, stop = self._due(begin, end)
        return self.rows[start:stop]

    def take(self, begin: int, end: int, encoded: Tensor) -> Tensor:
        """Returns the embeddings of the placeholders among ids[begin:end]; `encoded` are those of the rows due."""
        first, last, start, _ = self._due(begin, end)
        if not len(self.waiting):
            self.first, self.waiting = start, encoded
        elif len(encoded):
            self.waiting = torch.cat([self.waiting, encoded])
        found = self.waiting[first - self.first : last - self.first]
        self.first, self.waiting = last, self.waiting[last - self.first :]
        return found

    def within(self, begin: int, end: int, room: int) -> tuple[int, int]:
        """Same as `Placeholders.within`, for this kind."""
        _, _, start, stop = self._due(begin, end)
        most = start + max(room + -room % self.unit, 0)
        if most < stop:
            end, stop = max(begin, int(self.places[most])), most
        return end, room - (stop - start)

    def keys(self) -> list[int]:
        """Returns a key for each placeholder, by the kind and all rows that are encoded together with its own."""
        keys = []
        for n in range(0, len(self.rows), self.unit):
            digest = hashlib.blake2b(self.kind.encode() + self.rows[n : n + self.unit].tobytes(), digest_size=8)
            keys += [-1 - (int.from_bytes(digest.digest(), "big") >> 1)] * self.unit
        return keys


def embeddings(parts: Sequence[tuple[Placeholders | None, int, int]], encode: Encode) -> dict[str, Tensor]:
    """Returns embeddings by kind for the placeholders among ids[begin:end] of several prompts, in order.

    Each encoder runs once for all prompts. None stands for a prompt of text alone.
    """
    spans: dict[str, list[tuple[OfKind, int, int]]] = {}
    for placeholders, begin, end in parts:
        for kind, of_kind in ({} if placeholders is None else placeholders.kinds).items():
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
