"""Mixture of several packed folders: training text mixed by weights, held-out text kept apart.

mixed = Mixture([Packed("data/novels"), Packed("data/letters")], [0.7, 0.3])
mixed.batches(batch=8, length=512)[0]        rows of both, a batch for any step

Rows are counted over all steps. Each BLOCK of them holds exactly each folder's share of rows, in an order chosen by the
seed. Rows of one folder come in the order in which that folder alone would be read. So the n-th row is a function of
the seed and n, and resuming needs only the step.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from retentive.data.loader import Batch, Batches, Mode, Row, check_ranks, joined_rows, permute
from retentive.data.pack import Meta, Split
from retentive.data.packed import Packed
from retentive.data.templates import ChatTemplate
from retentive.options import option
from retentive.tables import counted

BLOCK = 10_000
"""Rows that hold each folder's share exactly, so shares are rounded to a ten-thousandth."""


def open_packed(paths: Sequence[Path], weights: Sequence[float] = ()) -> "Packed | Mixture":
    """Opens one folder as `Packed`, or several as a `Mixture`.

    Raises:
        FileNotFoundError, ValueError: as `Packed` and `Mixture`; or weights are given for one folder.
    """
    if not paths:
        raise ValueError("`data` is empty; name one folder or several")
    if len(paths) == 1 and not weights:
        return Packed(paths[0])
    return Mixture([Packed(path) for path in paths], weights)


class Mixture:
    """Several `Packed` folders with one tokenizer, with the interface of one.

    Args:
        packed: two or more folders.
        weights: mixing weight of each folder, in any unit. Default: proportional to its training tokens.

    Raises:
        ValueError: tokenizers, chat templates or encodings of media differ, or a weight is invalid.
    """

    def __init__(self, packed: Sequence[Packed], weights: Sequence[float] = ()):
        first, *others = packed
        if not others or (weights and len(weights) != len(packed)):
            raise ValueError(
                f"{counted(len(weights), 'weight')} for {counted(len(packed), 'folder')} of data: "
                "give one for each of several"
            )
        resolved = [part.path.resolve() for part in packed]
        if len(set(resolved)) < len(packed):
            raise ValueError(f"{first.path} or another folder is given twice: give it more weight instead")
        for other in others:
            if other.tokenizer.sha256 != first.tokenizer.sha256:
                raise ValueError(
                    f"{other.path} was packed with another tokenizer than {first.path}: pack it again "
                    f"(`retentive data` with {option('tokenizer', first.path)})"
                )
        names = [part.path.name for part in packed]
        if len(set(names)) < len(names):
            names = [str(part.path) for part in packed]
        self.parts = dict(zip(names, packed, strict=True))
        """The folders by name, or by path if two share a name."""
        self.tokenizer = first.tokenizer
        """The shared tokenizer."""
        self.template = _same_template(packed)
        """Chat template of the conversations; None for texts."""
        self.meta = _summed(packed)
        """Meta of a single folder with all the text."""
        given = weights or [part.meta.splits["train"].tokens for part in packed]
        if not all(weight > 0 and math.isfinite(weight) for weight in given):
            raise ValueError(f"weights of data must be above 0, got {', '.join(f'{weight:g}' for weight in given)}")
        self.shares = dict(zip(names, (weight / sum(given) for weight in given), strict=True))
        """Share of all rows for each folder: the normalised weights."""

    @property
    def path(self) -> str:
        """The folders, as named in messages."""
        return " ".join(str(part.path) for part in self.parts.values())

    @property
    def media(self) -> dict[str, dict[str, Any]]:
        """As in `Packed`."""
        return self.meta.media or {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the parts' fingerprints in order."""
        return hashlib.sha256("".join(part.fingerprint for part in self.parts.values()).encode()).hexdigest()

    def batches(
        self, *, mode: Mode = "reset", batch: int, length: int, seed: int = 0, rank: int = 0, world: int = 1
    ) -> "MixedBatches":
        """Returns the training text as `batches[step]` for any step; arguments as for `loader.Batches`.

        Raises:
            ValueError: mode is "carry", or as `Batches`.
        """
        if mode == "carry":
            raise ValueError("`mode='carry'` reads one stream, but these are several folders: use another mode")
        parts = [part.batches(mode=mode, batch=1, length=length, seed=seed) for part in self.parts.values()]
        return MixedBatches(parts, list(self.shares.values()), batch=batch, seed=seed, rank=rank, world=world)

    def held_out_parts(self, length: int) -> dict[str, Packed]:
        """Returns the folders that have held-out text for windows of this length."""
        return {name: part for name, part in self.parts.items() if part.holds_out(length)}

    def holds_out(self, length: int) -> bool:
        """True if a folder has held-out text, as in `Packed`."""
        return bool(self.held_out_parts(length))

    def first_question(self) -> tuple[list[int], dict[str, np.ndarray]]:
        """Returns the first question, as `Packed`, of the first folder that holds conversations."""
        return next(part for part in self.parts.values() if part.meta.chats).first_question()


class MixedBatches:
    """`batches[step]` is the batch of any step, from 0 without end: rows of several `Batches`.

    Args:
        parts: batches of one row each.
        shares: share of rows for each part; they sum to 1.
        batch, seed, rank, world: as for `Batches`.

    Raises:
        ValueError: a share rounds to no row, or the ranks cannot share the batch.
    """

    def __init__(
        self,
        parts: Sequence[Batches],
        shares: Sequence[float],
        *,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self._rows = check_ranks(batch, rank, world)
        self._parts, self._batch, self.seed = parts, batch, seed
        self.mode, self.length = parts[0].mode, parts[0].length
        # cumulative sums are rounded, instead of shares, so that the quotas sum to BLOCK
        self._cuts = np.round(np.cumsum([0, *shares]) * BLOCK).astype(np.int64)
        self._quota = np.diff(self._cuts)
        self._layout: tuple[int, np.ndarray] | None = None  # of the latest block
        if not self._quota.all():
            raise ValueError(f"a weight of data is below a {BLOCK:,}th of their sum: leave that folder out")

    @property
    def steps_per_epoch(self) -> int:
        """Steps that read as many rows as all parts have. Not every row is among them."""
        return -(-sum(part.steps_per_epoch for part in self._parts) // self._batch)

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f"step is {step}: steps count from 0")
        parts, numbers = self.places(step * self._batch + np.array(self._rows))
        rows: list[Row | None] = [None] * len(parts)
        for part in np.unique(parts):
            at = np.flatnonzero(parts == part)
            for n, row in zip(at, self._parts[part].rows(numbers[at]), strict=True):
                rows[n] = row
        return joined_rows([row for row in rows if row is not None], self.mode)

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (part, row number within the part), int64 each, for rows counted over all steps."""
        blocks, places = np.divmod(rows, BLOCK)
        found = np.empty((2, len(rows)), np.int64)
        for block in np.unique(blocks):
            found[:, blocks == block] = self._laid(int(block))[:, places[blocks == block]]
        return found[0], found[1]

    def _laid(self, block: int) -> np.ndarray:
        """Returns `[2, BLOCK]`: the part of each row of a block, and its number within the part."""
        if self._layout is None or self._layout[0] != block:
            order = permute(np.arange(BLOCK), BLOCK, (self.seed, block, len(self._parts)))
            parts = np.searchsorted(self._cuts, order, "right") - 1
            numbers = np.empty_like(parts)
            for part, quota in enumerate(self._quota):
                numbers[parts == part] = block * quota + np.arange(quota)
            self._layout = (block, np.stack([parts, numbers]))
        return self._layout[1]


def _same_template(packed: Sequence[Packed]) -> ChatTemplate | None:
    """Returns the chat template shared by all folders with conversations; None if there are none."""
    chats = [part for part in packed if part.template]
    for part in chats:
        if part.template and chats[0].template and part.template.source != chats[0].template.source:
            raise ValueError(
                f"{part.path} was packed with another chat template than {chats[0].path}: pack both with one "
                f"(`retentive data` with `template=FILE`)"
            )
    return chats[0].template if chats else None


def _summed(packed: Sequence[Packed]) -> Meta:
    """Returns a Meta with the text and media of all folders, without shards."""
    media: dict[str, dict[str, Any]] = {}
    for part in packed:
        for kind, how in part.media.items():
            if media.setdefault(kind, how) != how:
                raise ValueError(f"{part.path} has {kind} packed otherwise than the folders before it: pack them alike")
    splits = {}
    for name in packed[0].meta.splits:
        each = [part.meta.splits[name] for part in packed]
        documents, tokens, size = (sum(getattr(split, of) for split in each) for of in ("documents", "tokens", "bytes"))
        answers = [split.answers for split in each if split.answers is not None]
        splits[name] = Split(documents, tokens, size, (), sum(answers) if answers else None)
    vocabulary = max(part.meta.vocab_size for part in packed)
    return replace(packed[0].meta, vocab_size=vocabulary, splits=splits, media=media or None)
