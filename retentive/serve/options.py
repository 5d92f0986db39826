"""Options of a server. The command line uses them, so this imports nothing of the extra `serve`."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from retentive.options import known, option

ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")
"""Origin as browsers send it, scheme and host without path; or * for any."""


@dataclass(frozen=True)
class Options:
    """Limits of a server, its access control, and its folders."""

    slots: int = 16
    """Simultaneous requests; each takes the memory of one state."""
    state_precision: str = "fp32"
    """Precision of retention states while decoding: fp32; bf16, half of the memory and traffic; int8, a quarter."""
    queue: int = 64
    """Requests that may wait for a slot; the server answers 429 to more."""
    max_tokens: int = 4096
    """Maximum tokens of an answer."""
    max_prompt: int = 131072
    """Maximum tokens of a prompt. A RetNet itself has no limit: reading takes time, not memory."""
    media: int = 16
    """Maximum pictures and sounds of a request, for models that see or hear."""
    most_media: int = 1 << 25
    """Maximum bytes of all pictures and sounds in a request, counted in base64 (default: 32 MiB)."""
    timeout: float = 600
    """Maximum seconds of a request."""
    cache: int = 1 << 28
    """Bytes of the prefix cache for states of earlier prompts (default: 256 MiB); 0 disables it."""
    cache_folder: Path | None = None
    """Folder for states that exceed the prefix cache; they survive a restart."""
    sessions: int = 1 << 30
    """Bytes of conversation states in memory (default: 1 GiB); the least recently used is evicted first."""
    states: Path | None = None
    """Folder of saved states; by default `states` in the run's folder."""
    template: Path | None = None
    """Chat template (jinja) to use instead of the model's own."""
    api_key: tuple[str, ...] = ()
    """Accepted API keys; without any, no key is needed. Other users of the machine can see command lines. Keys in the
    environment variable RETENTIVE_API_KEY, separated by commas, are safer."""
    cors: tuple[str, ...] = ()
    """Origins whose web pages may use the server, such as https://example.org; * for any."""

    def __post_init__(self):
        for name in ("slots", "queue", "max_tokens", "max_prompt", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{option(name, getattr(self, name))}: must be above 0")
        known([self.state_precision], ("fp32", "bf16", "int8"), "`state_precision`")
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
        """Maximum bytes of a request's body: max_prompt ids of up to 16 characters in JSON, and the other fields."""
        return 65536 + 16 * self.max_prompt

    def with_environment_keys(self, environment: Mapping[str, str] | None = None) -> "Options":
        """Returns these options with the keys in RETENTIVE_API_KEY, by default of this process's environment."""
        found = (os.environ if environment is None else environment).get("RETENTIVE_API_KEY", "").split(",")
        return replace(self, api_key=(*self.api_key, *(key.strip() for key in found if key.strip())))
