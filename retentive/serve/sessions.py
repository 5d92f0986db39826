"""Conversations whose state stays in the server, and their files. What one key owns, no other key sees.

A session is lent to one request at a time and changes only when that request is done: what breaks off leaves it as it
was. In memory all sessions together are bounded in bytes; whoever was used longest ago goes first, and is remembered as
gone, so that a conversation is never begun anew behind its client's back.
"""

import hashlib
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from retentive.infer.memory import Memory, head, load_memory, save
from retentive.models import Model
from retentive.models.state import State
from retentive.serve.errors import Refused
from retentive.serve.options import NAME

MOST_FILES = 1000
"""Saved states of one key."""
MOST_GONE = 10_000
"""Names of pushed-out sessions that are remembered."""

log = logging.getLogger("retentive.serve")


@dataclass
class Session:
    """What a conversation has read: the state after all of its tokens but `pending`."""

    state: State | None = None
    pending: list[int] = field(default_factory=list)
    tokens: int = 0
    sources: list[dict] = field(default_factory=list)
    busy: bool = False

    def take(self, other: "Session") -> None:
        """Become what the other is."""
        self.state, self.pending, self.tokens, self.sources = other.state, other.pending, other.tokens, other.sources

    @property
    def nbytes(self) -> int:
        return (0 if self.state is None else self.state.nbytes) + 8 * len(self.pending)


class Sessions:
    """Sessions by owner and name; for one thread, the event loop's."""

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self.held: OrderedDict[tuple[str, str], Session] = OrderedDict()
        self.gone: OrderedDict[tuple[str, str], None] = OrderedDict()
        self.pushed_out = 0

    @property
    def nbytes(self) -> int:
        return sum(session.nbytes for session in self.held.values())

    @contextmanager
    def lent(self, owner: str, name: str, *, new: bool = False) -> Iterator[Session]:
        """The session for one request alone; where there is none and `new` allows it, one that has read nothing.

        Raises:
            Refused: 404 there is none; 409 another request has it; 410 it was pushed out.
        """
        key = (owner, name)
        if key in self.gone:
            raise Refused(
                410, f"session {name!r} was pushed out by others: restore it from a saved state, or delete it first",
                param="session", code="session_gone",
            )  # fmt: skip
        if key not in self.held and not new:
            raise Refused(404, f"no session {name!r}", param="session", code="session_not_found")
        session = self.held.setdefault(key, Session())
        if session.busy:
            raise Refused(409, f"session {name!r} is answering another request", param="session", code="session_busy")
        self.held.move_to_end(key)
        session.busy = True
        try:
            yield session
        finally:
            session.busy = False
            if not session.tokens:
                self.held.pop(key, None)
            self._make_room()

    def put(self, owner: str, name: str, session: Session) -> None:
        """In place of what had that name; Refused 409 if another request has it."""
        self.gone.pop((owner, name), None)
        with self.lent(owner, name, new=True) as held:
            held.take(session)

    def drop(self, owner: str, name: str) -> None:
        """Forget it; errors as `lent`, but for 410."""
        if (owner, name) in self.gone:
            del self.gone[owner, name]
            return
        with self.lent(owner, name) as held:
            held.take(Session())

    def _make_room(self) -> None:
        for key in [k for k, s in self.held.items() if not s.busy]:
            if self.nbytes <= self.most_bytes:
                return
            del self.held[key]
            self.pushed_out += 1
            self.gone[key] = None
            if len(self.gone) > MOST_GONE:
                self.gone.popitem(last=False)


def owner_of(key: str) -> str:
    """What stands for an API key wherever something is kept: it cannot be turned back."""
    return hashlib.sha256(b"retentive " + key.encode()).hexdigest()[:32]


class SavedStates:
    """States as files, FOLDER/OWNER/NAME.safetensors; names are checked before they come here, and here again."""

    def __init__(self, folder: Path, model: Model, fingerprint: str, model_name: str):
        self.folder, self.model, self.fingerprint, self.model_name = folder, model, fingerprint, model_name
        self.writing = threading.Lock()

    def _path(self, owner: str, name: str) -> Path:
        if not re.fullmatch(NAME, name):
            raise Refused(400, "a state's name is up to 64 letters, digits, '.', '_' and '-'", param="name")
        return self.folder / owner / f"{name}.safetensors"

    def save(self, owner: str, name: str, session: Session) -> dict[str, Any]:
        """Write it, in place of what had that name, and describe it; from any thread.

        Raises:
            Refused: 409 nothing read, or too many states; 507 the folder cannot be written to.
        """
        path = self._path(owner, name)
        if not path.exists() and len(self._files(owner)) >= MOST_FILES:
            raise Refused(409, f"{MOST_FILES} states are saved already: delete some", code="too_many_states")
        if session.state is None:
            raise Refused(409, "the session has read nothing yet", param="session", code="session_empty")
        config, sources = asdict(self.model.config), session.sources
        memory = Memory(session.state, session.pending, session.tokens, self.fingerprint, sources, config)
        try:
            with self.writing:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                save(memory, path)
        except (OSError, SafetensorError) as error:
            log.error("a state cannot be written", exc_info=error)
            raise Refused(507, "the state cannot be written: the server's log says more", code="not_saved") from None
        return self._describe(path)

    def load(self, owner: str, name: str) -> Session:
        """The session that was saved.

        Raises:
            Refused: 404 not there; 409 another model's, cut short or changed.
        """
        path = self._path(owner, name)
        try:
            memory = load_memory(path, self.model, self.fingerprint)
        except FileNotFoundError:
            raise Refused(404, f"no saved state {name!r}", param="name", code="state_not_found") from None
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).replace(str(path), f"state {name!r}")
            raise Refused(409, reason, param="name", code="state_refused") from None
        return Session(memory.state, memory.pending, memory.tokens, memory.sources)

    def listed(self, owner: str) -> list[dict[str, Any]]:
        """What is saved, by name; a damaged file is listed too, so that it can be deleted."""
        return [self._describe(path) for path in self._files(owner)]

    def delete(self, owner: str, name: str) -> None:
        try:
            self._path(owner, name).unlink()
        except FileNotFoundError:
            raise Refused(404, f"no saved state {name!r}", param="name", code="state_not_found") from None

    def _describe(self, path: Path) -> dict[str, Any]:
        """From the file's head: its tensors are looked at when it is restored."""
        tokens, model, about = 0, None, path.stat()
        with suppress(ValueError, OSError):
            found = head(path)
            tokens, model = found["tokens"], found["model"]
        return {
            "object": "state",
            "name": path.stem,
            "bytes": about.st_size,
            "tokens": tokens,
            "created": int(about.st_mtime),
            "model": self.model_name if model == self.fingerprint else model,
        }

    def _files(self, owner: str) -> list[Path]:
        return sorted((self.folder / owner).glob("*.safetensors"))
