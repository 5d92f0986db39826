"""Pictures and sound in messages: decoded from what a client sends, and opened within bounds.

    {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}
    {"type": "input_audio", "input_audio": {"data": "…", "format": "wav"}}

Addresses are not fetched: a server that opened what a client names would do so from inside its own network.
"""

import base64
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from retentive.data.media import Media
from retentive.models import LanguageModel
from retentive.models.encoders import encoders_of
from retentive.serve.errors import Refused
from retentive.serve.options import Options

OpenMedia = Callable[[str, bytes, int], Media]
"""(kind, the bytes of a file, the most tokens) -> it; raises ValueError."""
DATA_URL = re.compile(r"data:([a-z0-9/.+-]*)(?:;[a-z0-9-]+=[^;,]*)*(;base64)?,", re.IGNORECASE)
"""A data URL (RFC 2397): its type, and ";base64" if it is."""


def senses(model: LanguageModel) -> OpenMedia | None:
    """Returns a function that opens pictures and sounds for the model; None for one that reads only text.

    Raises:
        ImportError: it has encoders, and what opens files for them is not installed (extra `multimodal`).
    """
    if not encoders_of(model):
        return None
    from retentive.multimodal.prepare import NEEDS, Opener  # an extra

    for kind in encoders_of(model):
        if absent := [package for package in NEEDS[kind] if not find_spec(package)]:
            raise ImportError(f"a model that takes {kind} needs {absent[0]}: pip install 'retentive[multimodal]'")
    return Opener.of(model).rows


def content(
    parts: Sequence[Any], open_media: OpenMedia | None, before: Sequence[Media], options: Options, where: str
) -> str | list[str | Media]:
    """Returns the content of a message: its text, or texts and media in order.

    Args:
        parts: parts as in OpenAI's API.
        open_media: function that opens media; None for a model that reads only text.
        before: media of the messages before it.
        where: name of the field, for errors.

    Raises:
        Refused: a part is not text, picture or sound, or there are too many media.
    """
    found: list[str | Media] = []
    for n, part in enumerate(parts):
        field = f"{where}[{n}]"
        if part.type == "text":
            found.append(part.text)
            continue
        if open_media is None:
            raise Refused(400, f"this model reads only text: it takes no {part.type}", param=field)
        media = [*before, *(each for each in found if isinstance(each, Media))]
        if len(media) >= options.media:
            most = f"the pictures and sounds of a request are at most {options.media} here"
            raise Refused(400, most, param=field)
        if part.type == "image_url":
            kind, field = "image", field + ".image_url.url"
            encoded = _picture(part.encoded, field)
        else:
            kind, field, encoded = "audio", field + ".input_audio.data", part.encoded
        try:
            # `base64` and e-mail break it into lines
            raw = base64.b64decode("".join(encoded.split()), validate=True)
        except ValueError:
            raise Refused(400, "expected base64 (A to Z, a to z, 0 to 9, + and /) and no more", param=field) from None
        try:
            found.append(open_media(kind, raw, options.max_prompt - sum(len(each.rows) for each in media)))
        except ValueError as error:
            raise Refused(400, str(error), param=field) from None
    return found if any(isinstance(part, Media) for part in found) else "".join(map(str, found))


def _picture(url: str, where: str) -> str:
    """Returns the base64 of a picture's data URL; raises Refused for any other address or type."""
    head = DATA_URL.match(url)
    if head is None:
        wanted = "expected the picture itself as a data URL, data:image/png;base64,…: addresses are not fetched"
        raise Refused(400, wanted, param=where)
    if not (head[1].lower().startswith("image/") and head[2]):
        wrong = "not base64" if head[1].lower().startswith("image/") else "not the type of a picture"
        raise Refused(400, f"data:{head[1][:64]}: {wrong}; send data:image/png;base64,… (or jpeg, webp)", param=where)
    return url[head.end() :]
