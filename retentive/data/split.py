"""What is held out of the documents, or conversations, that a model is trained on."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar, cast

from retentive.data.sources import Document


class Named(Protocol):
    """A document or a conversation."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


def split_documents(docs: Iterable[T], valid_fraction: float, seed: int = 0) -> tuple[Iterator[T], Iterator[T]]:
    """(documents to train on, documents held out): about `valid_fraction` of them, by a hash of name and seed.

    One pass: read the first to its end before the second; held-out documents wait in memory meanwhile.
    With a positive fraction both get something: of few documents one is held out; a single text is cut, a single
    conversation is not held out.

    Raises:
        ValueError: a fraction below 0 or not below 1.
    """
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction is {valid_fraction}: expected at least 0 and less than 1")
    held: deque[T] = deque()
    done = False

    def share(document: T) -> float:
        # By the name alone: whether a document is held out depends on no other, nor on their order.
        name = document.name.encode("utf-8", "backslashreplace")  # names of files may be no UTF-8
        return int.from_bytes(hashlib.blake2b(name, key=str(seed).encode(), digest_size=8).digest(), "little") / 2**64

    def training() -> Iterator[T]:
        nonlocal done
        trained = 0
        # The document of the smallest share so far, held back as long as nothing is held out: if the text ends
        # like that, it is the one.
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
        if held and not trained:  # all are held out: one goes back, or the only one is cut in two
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
    """The document's beginning to train on and its end to hold out, cut at a line end if there is one near."""
    text = document.text
    end = max(1, round(len(text) * (1 - valid_fraction)))
    end = text.rfind("\n", end // 2, end) + 1 or end
    return document._replace(text=text[:end]), document._replace(text=text[end:])
