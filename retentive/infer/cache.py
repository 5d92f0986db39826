"""States of prompts that were read before: who begins as another did goes on from there.

A prefix is kept where a reader stops at a multiple of `every` tokens, before a prompt's last token, and before that
of a reply. It is found by a hash of its tokens, longest first, and is exact: the state is the very one. Whoever was
used last stays longest, within a bound in bytes; what is evicted goes to `folder`, if there is one, as a memory file
(`memory.py`), within a bound of its own. What cannot be written or read is not kept: it can be computed anew.
"""

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from retentive.infer.memory import Memory, head, load_memory, save
from retentive.models.state import State


def names(ids: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, str]]:
    """(length, name) of the prefixes of `ids` of these ascending lengths; 128 bits, so that two that differ never meet.

    The ids are gone through once, however many lengths there are.
    """
    raw, digest, before, found = array("q", ids).tobytes(), hashlib.blake2b(digest_size=16), 0, []
    for length in lengths:
        digest.update(raw[8 * before : 8 * length])
        before = length
        found.append((length, digest.copy().hexdigest()))
    return found


class PrefixCache:
    """`longest(ids)` and `store(ids, state)`, for states of one sequence of one model, from any thread.

    Args:
        most_bytes: of states in memory.
        every: tokens between kept states of a long prompt.
        folder: where states go that memory has no room for; None drops them.
        most_bytes_on_disk: of those; the oldest go first.
        model: its fingerprint, so that a folder's states are never read by another; needed with a folder.
    """

    def __init__(
        self,
        most_bytes: int,
        *,
        every: int = 512,
        folder: Path | None = None,
        most_bytes_on_disk: int = 8 << 30,
        model: str = "",
    ):
        if most_bytes < 0 or every < 1:
            raise ValueError(f"a prefix cache needs most_bytes >= 0 and every >= 1, got {most_bytes} and {every}")
        if folder is not None and not model:
            raise ValueError("a prefix cache with a folder needs the model's fingerprint: other models may share it")
        self.most_bytes, self.every, self.folder = most_bytes, every, folder
        self.most_bytes_on_disk, self.model = most_bytes_on_disk, model
        self.states: OrderedDict[str, tuple[int, State]] = OrderedDict()
        self.files: OrderedDict[str, tuple[int, int]] = OrderedDict()  # name: tokens, bytes
        self.nbytes = self.nbytes_on_disk = self.hits = self.misses = 0
        self.lock = threading.Lock()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._find_files(folder)

    def longest(self, ids: Sequence[int]) -> tuple[int, State | None]:
        """(tokens, a copy of the state after them) for the longest prefix known, short of `ids` by a token at least."""
        with self.lock:
            known = {n for n, _ in (*self.states.values(), *self.files.values()) if n < len(ids)}
            for length, name in reversed(names(ids, sorted(known))):
                if name in self.states:
                    self.states.move_to_end(name)
                    self.hits += 1
                    return length, self.states[name][1].clone()
                if name in self.files and (state := self._read(name)) is not None:
                    self.hits += 1
                    self._keep(name, length, state)
                    return length, state.clone()
            self.misses += 1
            return 0, None

    def store(self, ids: Sequence[int], state: State) -> None:
        """Keeps a copy of `state`, which has read `ids`."""
        ((length, name),) = names(ids, [len(ids)])
        with self.lock:
            if name in self.states:
                self.states.move_to_end(name)
            elif state.nbytes <= self.most_bytes:
                self._keep(name, length, state.clone())

    def _keep(self, name: str, length: int, state: State) -> None:
        self.states[name] = (length, state)
        self.nbytes += state.nbytes
        while self.nbytes > self.most_bytes:
            old, (tokens, dropped) = self.states.popitem(last=False)
            self.nbytes -= dropped.nbytes
            if self.folder is not None:
                self._write(old, tokens, dropped)

    # on disk

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _write(self, name: str, tokens: int, state: State) -> None:
        if name in self.files:
            self.files.move_to_end(name)
            return
        path = self._path(name)
        try:
            save(Memory(state, [], tokens, self.model, []), path)
            size = path.stat().st_size
        except OSError:  # a full disk, a folder taken away
            return
        self._found(name, tokens, size)

    def _found(self, name: str, tokens: int, size: int) -> None:
        self.files[name] = (tokens, size)
        self.nbytes_on_disk += size
        while self.nbytes_on_disk > self.most_bytes_on_disk:
            self._remove(next(iter(self.files)))

    def _read(self, name: str) -> State | None:
        self.files.move_to_end(name)
        try:
            return load_memory(self._path(name), expected=self.model).state
        except (OSError, ValueError):  # somebody tidied up, or wrote into it
            self._remove(name)
            return None

    def _remove(self, name: str) -> None:
        self.nbytes_on_disk -= self.files.pop(name)[1]
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError:  # not ours to delete any more
            return

    def _find_files(self, folder: Path) -> None:
        """What an earlier process left there, of this model."""
        found = []
        for path in folder.glob("*.safetensors"):
            try:
                stat, about = path.stat(), head(path)
            except (OSError, ValueError):  # taken away meanwhile, or damaged
                continue
            if about["model"] == self.model:
                found.append((stat.st_mtime, path.stem, about["tokens"], stat.st_size))
        for _, name, tokens, size in sorted(found):
            self._found(name, tokens, size)
