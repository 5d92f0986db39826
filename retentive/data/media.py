"""What a message holds beside text: a picture or a sound, as rows of numbers, one for each token that stands for it.

    {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is it?"}]}

In ids a placeholder stands for each row, which a model's encoder puts an embedding in the place of
(`models/encoders.py`). It is beyond the vocabulary, so that any tokenizer serves, and no text is mistaken for it. Who
opens the files is handed in (`retentive.multimodal`): nothing here can.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from retentive.data.tokenizer import Tokenizer

KINDS = ("image", "audio")
"""What content may be of beside "text"."""
SUFFIXES = {".png": "image", ".jpg": "image", ".jpeg": "image", ".webp": "image"}
SUFFIXES |= {".wav": "audio", ".flac": "audio", ".ogg": "audio"}
"""What a file's name says of it."""


class Media(NamedTuple):
    """A picture or a sound."""

    kind: str
    """Of KINDS."""
    rows: np.ndarray
    """`[n, features]`: n tokens of it."""
    name: str = ""
    """The file, as a message names it; none of what came over HTTP."""


class Open(Protocol):
    """What opens pictures and sounds."""

    def __call__(self, kind: str, name: str, *, folder: Path) -> Media:
        """What a part of a message names, relative to the folder of its file; raises ValueError or OSError."""


def placeholder(kind: str) -> str:
    """What stands for a row of this kind in a text that a template renders."""
    return f"<|{kind}|>"


def placeholder_id(kind: str, tokenizer: Tokenizer) -> int:
    """What stands for it in ids."""
    return tokenizer.vocab_size + KINDS.index(kind)


def text_of(content: Any, shown: Callable[[Media], str] = lambda media: "", said: Callable[[str], str] = str) -> str:
    """A content as text: what is `said`, and what is `shown` of its media, in order."""
    if isinstance(content, str):
        return said(content)
    return "".join(said(part) if isinstance(part, str) else shown(part) for part in content)


def placeholders(media: Media) -> str:
    """What stands for it in a text."""
    return placeholder(media.kind) * len(media.rows)


def media_of(messages: Any) -> list[Media]:
    """The media of messages, in order."""
    return [
        part for m in messages if not isinstance(m["content"], str) for part in m["content"] if isinstance(part, Media)
    ]
