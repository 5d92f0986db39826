"""Pictures and sound in a message, as rows of numbers: one row per token.

    {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is it?"}]}

In the ids a placeholder stands for each row; a model's encoder replaces it by an embedding (`models/encoders.py`).
Placeholder ids lie beyond the vocabulary, so any tokenizer works and no text can be mistaken for one. The caller passes
the function that opens files (`retentive.multimodal`), members of archives and rows of arrays (`data.archives`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from retentive.data.tokenizer import Tokenizer

KINDS = ("image", "audio")
"""Kinds of content besides "text"."""
SUFFIXES = {".png": "image", ".jpg": "image", ".jpeg": "image", ".webp": "image"}
SUFFIXES |= {".wav": "audio", ".flac": "audio", ".ogg": "audio"}
"""Kind of a file by its suffix."""


class Media(NamedTuple):
    """A picture or a sound."""

    kind: str
    """One of KINDS."""
    rows: np.ndarray
    """`[n, features]`: the features of its n tokens."""
    name: str = ""
    """File name as given in the message; "" for media received over HTTP."""


Rows = Mapping[str, np.ndarray]
"""For each kind the rows `[n, features]` of its placeholders among some ids, in order."""


class Open(Protocol):
    """Function that opens pictures and sounds."""

    def __call__(self, kind: str, name: str, *, folder: Path) -> Media:
        """Opens the file, member or row that a part names, relative to its folder; raises ValueError or OSError."""


def placeholder(kind: str) -> str:
    """Returns the placeholder for one row of this kind in a rendered template."""
    return f"<|{kind}|>"


def placeholder_id(kind: str, tokenizer: Tokenizer) -> int:
    """Returns the placeholder's token id."""
    return tokenizer.vocab_size + KINDS.index(kind)


def text_of(content: Any, shown: Callable[[Media], str] = lambda media: "", said: Callable[[str], str] = str) -> str:
    """Returns content as text: `said` of its texts and `shown` of its media, in order."""
    if isinstance(content, str):
        return said(content)
    return "".join(said(part) if isinstance(part, str) else shown(part) for part in content)


def placeholders(media: Media) -> str:
    """Returns the placeholders of all rows of the medium, as text."""
    return placeholder(media.kind) * len(media.rows)


def media_of(messages: Any) -> list[Media]:
    """Returns the media of messages, in order."""
    return [
        part for m in messages if not isinstance(m["content"], str) for part in m["content"] if isinstance(part, Media)
    ]


def rows_of(messages: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The rows of all media of messages, by kind; empty where they hold text alone."""
    found: dict[str, list[np.ndarray]] = {}
    for media in media_of(messages):
        found.setdefault(media.kind, []).append(media.rows)
    return {kind: np.concatenate(rows) for kind, rows in found.items()}
