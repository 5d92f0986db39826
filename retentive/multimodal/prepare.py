"""Packs conversations with pictures and sound: `data.prepare`, with a function that opens their files.

{"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What?"}]},
              {"role": "assistant", "content": "A cat."}]}

A name may also be that of a member of an archive or of a row of an array (`data.archives`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from retentive.checkpoint import ModelFolder
from retentive.data.archives import Archives, Row
from retentive.data.media import Media
from retentive.data.pack import Meta
from retentive.data.prepare import prepare as data_prepare
from retentive.models import LanguageModel
from retentive.models.encoders import AudioConfig, Config, ImageConfig, encoders_of
from retentive.multimodal.audio import MOST_SECONDS, open_audio, stream_audio
from retentive.multimodal.image import MOST_PIXELS, open_image

SEEN = ("size", "patch", "channels")
HEARD = ("rate", "mels", "window", "hop", "stack")
"""Fields of encoders' configs that define how files become rows; the other fields belong to the model."""
NEEDS = {"image": ("PIL",), "audio": ("soundfile", "soxr")}
"""Packages that open files of each kind (extra `multimodal`)."""
MOST_BYTES = 4 * MOST_PIXELS
"""Maximum bytes of a member of an archive, which is in memory as a whole: four for each of the most pixels."""
NO_ENCODER = "the model has no encoder for {0}: train one on data with {0} (docs/see.md, docs/listen.md)"
"""Error for a model that accepts no media of a kind."""
UNSAID = "it holds {0}, but nothing says how {0} becomes tokens: give {0}, its encoder's fields"
"""Error for a kind of media in conversations to pack, whose encoder fields are not given."""


class Opener:
    """Opens the files that messages name, as the encoders' configs require (`data.media.Open`).

    Args:
        missing: error for a kind that no config is for.
    """

    def __init__(self, configs: Mapping[str, Config], missing: str = NO_ENCODER):
        self.configs, self.missing, self.archives = configs, missing, Archives()

    @classmethod
    def of(cls, model: LanguageModel) -> "Opener":
        """Returns the opener for a model's own encoders."""
        return cls({kind: encoder.config for kind, encoder in encoders_of(model).items()})

    def __call__(self, kind: str, name: str, *, folder: Path) -> Media:
        if "://" in name or name.startswith("data:"):
            raise ValueError(f"{kind} {name[:40]!r} is no file: download it, and name it by its path")
        path = folder / name
        found = self.archives.read(path, MOST_BYTES)
        return self.rows(kind, path if found is None else found, name=str(path))._replace(name=name)

    def parts(self, kind: str, source: Path | bytes) -> Iterator[Media]:
        """Opens it in parts, a sound some seconds at a time, so that long sounds need no more memory."""
        config = self._config(kind)
        if isinstance(config, ImageConfig):
            yield self.rows(kind, source)
        else:
            yield from (Media(kind, rows) for rows in stream_audio(source, config))

    def rows(self, kind: str, source: Path | bytes | Row, most: int | None = None, name: str = "") -> Media:
        """Opens a picture or sound from its file, bytes or row of an array.

        Args:
            most: refuses sound of more tokens before it is decoded.
            name: name in errors; by default that of the file.
        """
        config = self._config(kind)
        if isinstance(config, ImageConfig):
            if isinstance(source, Row) and source.rate is not None:
                raise ValueError(f"{name}: a picture has no sampling rate; leave out @{source.rate}")
            return Media(kind, open_image(source.values if isinstance(source, Row) else source, config, name))
        seconds = MOST_SECONDS if most is None else min(MOST_SECONDS, most / config.tokens_per_second)
        return Media(kind, open_audio(source, config, most_seconds=seconds, name=name))

    def _config(self, kind: str) -> Config:
        if kind not in self.configs:
            raise ValueError(self.missing.format(kind))
        return self.configs[kind]


def fields_of(model: str | Path | ModelFolder) -> dict[str, dict[str, Any]]:
    """Returns `image` and `audio` for `prepare`, from the encoders of the model in a folder.

    Empty for a model without encoders.
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
    """Writes the packed folder `out` atomically and returns its meta.

    Args:
        sources: conversations, as for `retentive.data.prepare`, which also takes the other options.
        image: fields of ImageConfig that define how a picture becomes rows (SEEN); defaults if empty. None: no
            pictures.
        audio: fields of AudioConfig (HEARD), for sound.

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
            why = "a field of the model, given to training" if own else f"none of {', '.join(names)}"
            raise ValueError(f"`{kind}` takes no {unknown[0]}: it is {why}")
        configs[kind] = config = make(token=0, **given)
        said = {name: getattr(config, name) for name in names}
        encoded[kind] = said | {"features": config.features, "dtype": np.dtype(dtype).name}
    if not configs:
        raise ValueError("neither `image` nor `audio` is given: use retentive.data.prepare for conversations of text")
    return data_prepare(sources, out, chats=True, media=Opener(configs, UNSAID), encoded=encoded, **options)
