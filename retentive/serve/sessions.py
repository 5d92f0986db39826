"""Sessions: conversations whose state stays in the server; and states saved as files. One API key never sees another's.

A session is checked out by one request at a time and changes only when that request is done: one that fails leaves it
as it was. In memory all sessions together are bounded in bytes; the least recently used is evicted first.
"""

import hashlib
import logging
import re
import tempfile
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from retentive.infer.conversation import NAME, Conversation
from retentive.infer.memory import Memory, head, load_memory, save
from retentive.models import LanguageModel
from retentive.serve.errors import Refused

MOST_FILES = 1000
"""Maximum saved states of one API key."""
EVICTED = 1000
"""Number of evicted sessions remembered by name, so that a client learns that its session is gone."""

log = logging.getLogger("retentive.serve")


class Sessions:
    """Conversations by owner and name, for the event loop's thread only.

    Args:
        most_bytes: maximum bytes of all conversations. Checked out ones count, but are not evicted.
        new: function that makes an empty conversation.
    """

    def __init__(self, most_bytes: int, new: Callable[[], Conversation]):
        self.most_bytes, self.new = most_bytes, new
        self.held: OrderedDict[tuple[str, str], Conversation] = OrderedDict()
        """Conversations, the least recently used first."""
        self.busy: set[tuple[str, str]] = set()  # checked out
        self.evicted: deque[tuple[str, str]] = deque(maxlen=EVICTED)
        self.evictions = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all conversations."""
        return sum(conversation.nbytes for conversation in self.held.values())

    @contextmanager
    def checkout(self, owner: str, name: str, *, new: bool = False) -> Iterator[Conversation]:
        """Yields the conversation, for one request only until the block ends; a new one if it is missing and `new`.

        Raises:
            Refused: 404 it does not exist; 409 another request has it; 410 it was evicted.
        """
        key = (owner, name)
        if key in self.evicted:
            raise Refused(
                410, f"session {name!r} was evicted by others: restore it from a saved state, or delete it first",
                param="session", code="session_gone",
            )  # fmt: skip
        if key not in self.held and not new:
            raise Refused(404, f"no session {name!r}", param="session", code="session_not_found")
        if key in self.busy:
            raise Refused(409, f"session {name!r} is answering another request", param="session", code="session_busy")
        conversation = self.held.setdefault(key, self.new())
        self.held.move_to_end(key)
        self.busy.add(key)
        try:
            yield conversation
        finally:
            self.busy.discard(key)
            if not conversation.begun:  # the first request failed, or `drop`: nothing to keep
                self.held.pop(key, None)
            self._evict()

    def put(self, owner: str, name: str, memory: Memory) -> Conversation:
        """Sets the memory of a conversation, new or not, and returns it; Refused 409 if it is checked out."""
        self._forget_eviction(owner, name)
        with self.checkout(owner, name, new=True) as conversation:
            conversation.memory = memory
        return conversation

    def drop(self, owner: str, name: str) -> None:
        """Drops a session, also an evicted one; raises Refused 404 and 409 as `checkout`."""
        if self._forget_eviction(owner, name):
            return
        with self.checkout(owner, name) as conversation:
            conversation.memory = self.new().memory  # blank: `checkout` then drops it

    def _forget_eviction(self, owner: str, name: str) -> bool:
        """Frees the name of an evicted session; returns True if it was evicted."""
        with suppress(ValueError):
            self.evicted.remove((owner, name))
            return True
        return False

    def _evict(self) -> None:
        """Evicts sessions that are not checked out, the least recently used first, until all fit in `most_bytes`."""
        excess = self.nbytes - self.most_bytes
        for key in [key for key in self.held if key not in self.busy]:
            if excess <= 0:
                return
            excess -= self.held.pop(key).nbytes
            self.evictions += 1
            self.evicted.append(key)


def owner_of(key: str) -> str:
    """Returns a one-way hash of an API key, for memory and folder names, so that neither holds the key."""
    return hashlib.sha256(b"retentive " + key.encode()).hexdigest()[:32]


class SavedStates:
    """Saved states, FOLDER/OWNER/NAME.safetensors. For any thread.

    Checks names again, though requests are checked when parsed, since names become paths.
    """

    def __init__(self, folder: Path, model: LanguageModel, fingerprint: str, model_name: str):
        self.folder, self.model, self.fingerprint, self.model_name = folder, model, fingerprint, model_name
        self.writing = threading.Lock()

    def _path(self, owner: str, name: str) -> Path:
        if not re.fullmatch(NAME, name):
            raise Refused(400, "a state's name is up to 64 letters, digits, '.', '_' and '-'", param="name")
        return self.folder / owner / f"{name}.safetensors"

    def save(self, owner: str, name: str, memory: Memory) -> dict[str, Any]:
        """Writes a state, replacing one of the same name, and returns its description.

        Raises:
            Refused: 409 nothing was read, or there are too many states; 507 the folder is not writable.
        """
        path = self._path(owner, name)
        if not path.exists() and len(self._files(owner)) >= MOST_FILES:
            raise Refused(409, f"{MOST_FILES} states are saved already: delete some", code="too_many_states")
        if not memory.tokens and not memory.pending:  # pending alone: the queue was full after every answer so far
            raise Refused(409, "the session has read nothing yet", param="session", code="session_empty")
        with self._changing():
            # 0o700, since the files have the usual rights, but other users must not read them
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            save(memory, path)
            return self._describe(path)

    def path(self, owner: str, name: str) -> Path:
        """Returns the file of a saved state; raises Refused (404) if there is none."""
        path = self._path(owner, name)
        if not path.is_file():
            raise _not_found(name)
        return path

    def add(self, owner: str, name: str, content: bytes) -> dict[str, Any]:
        """Keeps a file that the same model has written elsewhere, and returns its description.

        Raises:
            Refused: 409 it is none of this model's, or damaged; else as `save`.
        """
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "state.safetensors"
            file.write_bytes(content)
            memory = self._read(file, name)
        return self.save(owner, name, memory)

    def load(self, owner: str, name: str) -> Memory:
        """Returns the memory saved under a name.

        Raises:
            Refused: 404 it does not exist; 409 it is of another model, incomplete, changed or not readable.
        """
        return self._read(self._path(owner, name), name)

    def _read(self, path: Path, name: str) -> Memory:
        try:
            return load_memory(path, self.model, self.fingerprint)
        except FileNotFoundError:
            raise _not_found(name) from None
        except OSError as error:
            log.error("state %s cannot be read: %s", name, error)
            message = f"state {name!r} cannot be read: the server's log says more"
            raise Refused(409, message, param="name", code="state_refused") from None
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).replace(str(path), f"state {name!r}")  # hides our paths from clients
            raise Refused(409, reason, param="name", code="state_refused") from None

    def listed(self, owner: str) -> list[dict[str, Any]]:
        """Returns a description of each saved state by name, damaged files included, so that they can be deleted."""
        found = []
        for path in self._files(owner):
            with suppress(FileNotFoundError):  # deleted meanwhile
                found.append(self._describe(path))
        return found

    def delete(self, owner: str, name: str) -> None:
        """Deletes the file.

        Raises:
            Refused: 404 it does not exist; 507 the folder is not writable.
        """
        path = self.path(owner, name)
        with self._changing():
            path.unlink(missing_ok=True)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Allows one change at a time. Logs an OSError; the client does not get its text, which names paths."""
        try:
            with self.writing:
                yield
        except OSError as error:
            log.error("states cannot be written: %s", error)
            raise Refused(507, "the state cannot be written: the server's log says more", code="not_saved") from None

    def _describe(self, path: Path) -> dict[str, Any]:
        """Returns the JSON of a saved state, from the file's header; restoring it checks the tensors."""
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
        return sorted(path for path in (self.folder / owner).glob("*.safetensors") if path.is_file())


def _not_found(name: str) -> Refused:
    return Refused(404, f"no saved state {name!r}", param="name", code="state_not_found")
