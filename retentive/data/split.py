"""Held-out split of documents or conversations."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar, cast

from retentive.data.sources import Document
from retentive.options import option


class Named(Protocol):
    """A document or a conversation: anything with a name."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


def split_documents(docs: Iterable[T], valid_fraction: float, seed: int = 0) -> tuple[Iterator[T], Iterator[T]]:
    """Splits into (training documents, held-out documents), about `valid_fraction` held out by a hash of name and seed.

    Single pass: read the first iterator to its end before the second. Held-out documents wait in memory meanwhile. With
    a positive fraction both get something: of few documents one is held out, a single text is cut in two, and a single
    conversation is not held out.

    Raises:
        ValueError: the fraction is below 0 or not below 1.
    """
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"{option('valid_fraction', valid_fraction)}: must be at least 0 and less than 1")
    held: deque[T] = deque()
    done = False

    def share(document: T) -> float:
        # By name alone: the choice for a document depends on no other document and no order.
        name = document.name.encode("utf-8", "backslashreplace")  # file names may not be UTF-8
        return int.from_bytes(hashlib.blake2b(name, key=str(seed).encode(), digest_size=8).digest(), "little") / 2**64

    def training() -> Iterator[T]:
        nonlocal done
        trained = 0
        # The document with the smallest share so far, kept back while nothing is held out. If nothing is by the end,
        # it is the held-out one.
        spare: T | None = None
        for document in docs:
            ready: T | None = document
            if share(document) < valid_fraction:
                held.append(document)
                ready, spare = spare, None
            elif valid_fraction and not held and (spare is None or share(document) < share(spare)):
                ready, spare = spare, document
            if ready is not None:
                trained += 1
                yield ready
        if spare is not None:
            held.append(spare)
        if held and not trained:  # everything is held out: give one back, or cut the only one in two
            last = held.pop()
            if not held and isinstance(last, Document):
                last, rest = cast(tuple[T, T], _cut(last, valid_fraction))
                held.append(rest)
            yield last
        done = True

    def validation() -> Iterator[T]:
        if not done:
            raise RuntimeError(
                "read the documents to train on to their end first: until then it is open what is held out"
            )
        while held:
            yield held.popleft()

    return training(), validation()


def _cut(document: Document, valid_fraction: float) -> tuple[Document, Document]:
    """Cuts a document into its start for training and its end to hold out, at a line end if one is near."""
    text = document.text
    end = max(1, round(len(text) * (1 - valid_fraction)))
    end = text.rfind("\n", end // 2, end) + 1 or end
    return document._replace(text=text[:end]), document._replace(text=text[end:])
