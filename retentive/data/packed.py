"""A packed folder, opened once: its meta, its tokenizer, and its text as batches.

data = Packed("data/mine")
data.meta.vocab_size, data.tokenizer.decode([…])
data.batches(batch=8, length=512)[0].ids          training text: a batch for any step, see `loader`
for batch in data.held_out(length=512): …         held-out text in order
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from retentive.data.loader import Batch, Batches, Mode, flattened, row_at
from retentive.data.pack import load_meta
from retentive.data.shards import TokenStream
from retentive.data.templates import ChatTemplate, load_template
from retentive.data.tokenizer import load_tokenizer
from retentive.options import option


class Packed:
    """Packed data with the tokenizer that made them.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: it is damaged, or another tokenizer is beside the data than the one that packed them.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        """The folder."""
        self.meta = load_meta(path)
        """Content of meta.json: sizes, vocabulary and shards."""
        self.tokenizer = load_tokenizer(path)
        """The tokenizer beside the data."""
        if self.meta.tokenizer_sha256 != self.tokenizer.sha256:
            raise ValueError(
                f"the data were packed with tokenizer {self.meta.tokenizer_sha256[:12]}, not "
                f"{self.tokenizer.sha256[:12]}: put the tokenizer.json back that was beside the data in {path}, "
                f"or pack the text again"
            )
        self._streams: dict[str, TokenStream] = {}

    @property
    def media(self) -> dict[str, dict[str, Any]]:
        """For image and audio, if present: how they were turned into rows."""
        return self.meta.media or {}

    @functools.cached_property
    def template(self) -> ChatTemplate | None:
        """Chat template of the conversations; None for texts."""
        return load_template(self.path, self.tokenizer) if self.meta.chats else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of meta.json, which holds those of all shards: equal for equal data in any folder."""
        return hashlib.sha256((self.path / "meta.json").read_bytes()).hexdigest()

    def stream(self, split: str) -> TokenStream:
        """Returns all tokens of "train" or "valid" in order."""
        if split not in self._streams:
            self._streams[split] = TokenStream(self.path, self.meta, split)
        return self._streams[split]

    def batches(
        self, *, mode: Mode = "reset", batch: int, length: int, seed: int = 0, rank: int = 0, world: int = 1
    ) -> Batches:
        """Returns the training text as `batches[step]` for any step; arguments as for `loader.Batches`."""
        stream = self.stream("train")
        return Batches(stream, mode=mode, batch=batch, length=length, seed=seed, rank=rank, world=world)

    def holds_out(self, length: int) -> bool:
        """True if there is held-out text: at least one row of this length with its targets, or a conversation."""
        return self.meta.splits["valid"].tokens > (1 if self.meta.chats else length)

    def held_out(self, *, length: int, tokens: int | None = None) -> Iterator[Batch]:
        """Yields the held-out text in order, as batches [1, length] with `cu_seqlens`; the last one is shorter.

        They cover the first `tokens` tokens (default: all) and predict each but the very first once. For conversations
        a batch is one whole conversation of any length, up to the one with the `tokens`-th token.

        Raises:
            ValueError: there is no held-out text, or a number is too small. Raised by the call, not by the first batch.
        """
        if length < 1:
            raise ValueError(f"{option('length', length)}: must be at least 1")
        stream, count = self._held_out(tokens)

        def windows() -> Iterator[Batch]:
            for start in range(0, count - 1, length):
                yield flattened([row_at(stream, start, min(length, count - 1 - start))])[0]

        def conversations() -> Iterator[Batch]:
            for start, stop in self._held_out_chats(tokens):
                yield flattened([row_at(stream, start, stop - 1 - start)])[0]

        return conversations() if stream.chats else windows()

    def _held_out_chats(self, tokens: int | None) -> Iterator[tuple[int, int]]:
        """Yields (start, stop) of each held-out conversation, up to the one with the `tokens`-th token."""
        stream, count = self._held_out(tokens)
        ends = stream.ends_in(0, stream.tokens)
        starts = np.concatenate([[0], ends[:-1]])
        yield from zip(starts[starts < count].tolist(), ends.tolist(), strict=False)

    def held_out_bytes(self, tokens: int | None = None) -> int:
        """Returns the UTF-8 bytes of the text that `held_out(tokens=tokens)` predicts (for chats, the answers)."""
        stream, count = self._held_out(tokens)
        if stream.chats:
            answers = (stream.read(*span)[stream.answered(*span)] for span in self._held_out_chats(tokens))
            return sum(len(self.tokenizer.decode(ids.tolist()).encode()) for ids in answers)
        if count == stream.tokens:
            return self.meta.splits["valid"].bytes
        size = start = 0
        for end in [*stream.ends_in(0, count - 1).tolist(), count]:
            text = self.tokenizer.decode(stream.read(start, end).tolist())
            if end == count:  # may be inside a character, which decodes to U+FFFD and does not count
                text = text.rstrip("\ufffd")
            size += len(text.encode())
            start = end
        return size

    def first_question(self) -> tuple[list[int], dict[str, np.ndarray]]:
        """Returns the ids of the first held-out (or else training) conversation up to its first answer.

        Also returns the rows of the placeholders among them, by kind.
        """
        stream = self.stream("valid" if self.meta.splits["valid"].tokens else "train")
        stop = int(stream.answered(0, int(stream.ends_in(0, stream.tokens)[0])).argmax())
        return stream.read(0, stop).tolist(), {kind: stream.rows(kind, 0, stop) for kind in stream.media}

    def first_tokens(self, split: str, most: int) -> np.ndarray:
        """Returns the first `most` tokens of a split, or all; int64."""
        stream = self.stream(split)
        return stream.read(0, min(stream.tokens, most))

    def _held_out(self, tokens: int | None) -> tuple[TokenStream, int]:
        """Returns the held-out stream, and how many of its tokens are used."""
        stream = self.stream("valid")
        if tokens is not None and tokens < 2:
            raise ValueError(f"tokens is {tokens}: expected at least 2, one to read and one to predict")
        if stream.tokens < 2:
            raise ValueError(f"{self.path}: no held-out text; pack it with `valid_fraction` above 0, or with `valid`")
        return stream, min(tokens or stream.tokens, stream.tokens)
