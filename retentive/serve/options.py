"""The options of a server. The command line is made from them, so this imports nothing of the extra `serve`."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from retentive.options import option

ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")
"""What browsers send as Origin: scheme and host, no path; or * for any."""


@dataclass(frozen=True)
class Options:
    """Bounds of a server, who may use it, and where it keeps things."""

    slots: int = 16
    """Requests answered at once; each takes the memory of one state."""
    queue: int = 64
    """Requests that may wait for a slot; more are refused for now (429)."""
    max_tokens: int = 4096
    """Tokens of an answer at most."""
    max_prompt: int = 131072
    """Tokens of a prompt at most. The model itself has no such bound: reading takes time, not memory."""
    media: int = 16
    """Pictures and sounds of a request at most, for models that see or hear."""
    most_media: int = 1 << 25
    """Bytes of these in a request at most, as base64."""
    timeout: float = 600
    """Seconds that a request may take."""
    cache: int = 1 << 28
    """Bytes of the prefix cache, which has states of prompts read before; 0 for none."""
    cache_folder: Path | None = None
    """Folder for states that the prefix cache has no room for; they survive a restart."""
    sessions: int = 1 << 30
    """Bytes of conversations' states in memory; the least recently used is evicted first."""
    states: Path | None = None
    """Folder of saved states; by default `states` in the run's folder."""
    template: Path | None = None
    """A chat template (jinja) in place of the model's own."""
    api_key: tuple[str, ...] = ()
    """Keys that are accepted; without any, no key is needed. Other users of the machine see command lines: better put
    keys, separated by commas, into the environment variable RETENTIVE_API_KEY."""
    cors: tuple[str, ...] = ()
    """Origins whose web pages may use the server, such as https://example.org; * for any."""

    def __post_init__(self):
        for name in ("slots", "queue", "max_tokens", "max_prompt", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{option(name, getattr(self, name))}: must be above 0")
        for name in ("cache", "sessions", "media", "most_media"):
            if getattr(self, name) < 0:
                raise ValueError(f"{option(name, getattr(self, name))}: must be at least 0")
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_key):
            raise ValueError("`api_key` has a key that is empty or not printable ASCII; choose another")
        for origin in self.cors:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"{option('cors', origin)}: expected * or an origin without path, https://example.org")
        for name in ("states", "cache_folder"):
            folder = getattr(self, name)
            if folder is not None and folder.exists() and not folder.is_dir():
                raise ValueError(f"{option(name, folder)}: a file; name a folder")

    @property
    def most_body(self) -> int:
        """Bytes of a request's body: max_prompt ids of up to 16 characters in JSON, and room for the other fields."""
        return 65536 + 16 * self.max_prompt

    def with_environment_keys(self, environment: Mapping[str, str] | None = None) -> "Options":
        """These options and the keys in RETENTIVE_API_KEY; `environment` is that of this process if not given."""
        found = (os.environ if environment is None else environment).get("RETENTIVE_API_KEY", "").split(",")
        return replace(self, api_key=(*self.api_key, *(key.strip() for key in found if key.strip())))
