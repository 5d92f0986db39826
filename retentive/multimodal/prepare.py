"""Conversations with pictures and sound, packed: `data.prepare`, with what opens their files.

{"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What?"}]},
              {"role": "assistant", "content": "A cat."}]}
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from retentive.checkpoint import ModelFolder
from retentive.data.media import Media
from retentive.data.pack import Meta
from retentive.data.prepare import prepare as data_prepare
from retentive.models import LanguageModel
from retentive.models.encoders import AudioConfig, Config, ImageConfig, encoders_of
from retentive.multimodal.audio import MOST_SECONDS, open_audio, stream_audio
from retentive.multimodal.image import open_image

SEEN = ("size", "patch", "channels")
HEARD = ("rate", "mels", "window", "hop", "stack")
"""The fields of encoders' configs that say how files become rows; the others are the model's."""
NEEDS = {"image": ("PIL",), "audio": ("soundfile", "soxr")}
"""What opens files of a kind (extra `multimodal`)."""
NO_ENCODER = "the model has no encoder for {0}: it was trained without any (retentive data --{0} makes data for one)"
"""What is said to a model that takes none of a kind."""
UNSAID = "it holds {0}, and nothing says how that becomes tokens (retentive data --{0})"
"""What is said of a kind that is to be packed and has no fields."""


class Opener:
    """`data.media.Open`: opens what messages name, with the encoders' configs.

    Args:
        missing: what is said of a kind that none of them is of.
    """

    def __init__(self, configs: Mapping[str, Config], missing: str = NO_ENCODER):
        self.configs, self.missing = configs, missing

    @classmethod
    def of(cls, model: LanguageModel) -> "Opener":
        """What opens files for a model, as its own encoders see and hear."""
        return cls({kind: encoder.config for kind, encoder in encoders_of(model).items()})

    def __call__(self, kind: str, name: str, *, folder: Path) -> Media:
        if "://" in name or name.startswith("data:"):
            raise ValueError(f"{kind} {name[:40]!r} is no file: download it, and name it by its path")
        return self.rows(kind, folder / name)._replace(name=name)

    def parts(self, kind: str, source: Path | bytes) -> Iterator[Media]:
        """It in parts: of a sound some seconds each, so that hours of it take no more memory."""
        config = self._config(kind)
        if isinstance(config, ImageConfig):
            yield self.rows(kind, source)
        else:
            yield from (Media(kind, rows) for rows in stream_audio(source, config))

    def rows(self, kind: str, source: Path | bytes, most: int | None = None) -> Media:
        """A picture or a sound, from its file or its bytes; of sound at most so many tokens, known before they are."""
        config = self._config(kind)
        if isinstance(config, ImageConfig):
            return Media(kind, open_image(source, config))
        seconds = MOST_SECONDS if most is None else min(MOST_SECONDS, most / config.tokens_per_second)
        return Media(kind, open_audio(source, config, most_seconds=seconds))

    def _config(self, kind: str) -> Config:
        if kind not in self.configs:
            raise ValueError(self.missing.format(kind))
        return self.configs[kind]


def fields_of(model: str | Path | ModelFolder) -> dict[str, dict[str, Any]]:
    """`prepare`'s image and audio for conversations with the model of a folder: as it sees and hears.

    Nothing for a model that only reads.
    """
    names = {"image": SEEN, "audio": HEARD}
    found = ModelFolder.open(model).encoders.items()
    return {kind: {name: getattr(config, name) for name in names[kind]} for kind, config in found}


def prepare(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    image: Mapping[str, Any] | None = None,
    audio: Mapping[str, Any] | None = None,
    **options: Any,
) -> Meta:
    """The meta of the packed folder `out`, once written: whole, or nothing of it.

    Args:
        sources: conversations, as for `retentive.data.prepare`, whose other options these are.
        image: fields of ImageConfig that say how a picture becomes rows (SEEN); its defaults, if empty. None: no
            pictures.
        audio: of AudioConfig (HEARD), for sound.

    Raises:
        ValueError, OSError, ImportError: as `data.prepare`, `open_image` and `open_audio`, with the line of the file.
    """
    configs, encoded = dict[str, Config](), dict[str, dict[str, Any]]()
    for kind, given, names, make, dtype in (
        ("image", image, SEEN, ImageConfig, np.uint8),
        ("audio", audio, HEARD, AudioConfig, np.float16),
    ):
        if given is None:
            continue
        if unknown := sorted(set(given) - set(names)):
            own = unknown[0] in {f.name for f in fields(make)}
            why = "the model's (retentive train --set)" if own else f"none of {', '.join(names)}"
            raise ValueError(f"--{kind} {unknown[0]}: it is {why}")
        configs[kind] = config = make(token=0, **given)
        said = {name: getattr(config, name) for name in names}
        encoded[kind] = said | {"features": config.features, "dtype": np.dtype(dtype).name}
    if not configs:
        raise ValueError("neither image nor audio is given: such conversations are packed by retentive.data.prepare")
    return data_prepare(sources, out, chats=True, media=Opener(configs, UNSAID), encoded=encoded, **options)
