"""Prefix cache: states of prompts read before, from which a prompt with the same prefix continues.

The engine stores a state at multiples of `every` tokens, before a prompt's last token, and before a completion's last
token. `longest` finds it by a hash of its tokens, longest prefix first, and returns exactly the state that was stored.
When the states reach a bound in bytes, the least recently used is evicted. It goes to `folder`, if given, as a memory
file (`memory.py`), within a separate bound. A file that cannot be written or read is dropped: it can be recomputed.
"""

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from retentive.infer.memory import Memory, head, load_memory, save
from retentive.models.state import State


def prefix_hashes(ids: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, str]]:
    """(length, hash in hex) of the prefixes of `ids` with these ascending lengths; 128 bits, so none collide.

    Takes one pass over the ids for any number of lengths.
    """
    raw, digest, before, found = array("q", ids).tobytes(), hashlib.blake2b(digest_size=16), 0, []
    for length in lengths:  # copies the running digest at each length; an id takes 8 bytes ("q")
        digest.update(raw[8 * before : 8 * length])
        before = length
        found.append((length, digest.copy().hexdigest()))
    return found


class PrefixCache:
    """States of single sequences of one model by the tokens read: `longest(ids)`, `store(ids, state)`. Thread-safe.

    Args:
        most_bytes: maximum bytes of states in memory.
        every: tokens between kept states of a long prompt.
        folder: folder for evicted states; None drops them.
        most_bytes_on_disk: maximum bytes in the folder; the least recently used files are deleted first.
        model: the model's fingerprint, required with a folder: other models' files there are left alone.
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
        # by hash, the least recently used first; a state read back from disk is in both
        self.states: OrderedDict[str, tuple[int, State]] = OrderedDict()  # tokens, state
        self.files: OrderedDict[str, tuple[int, int]] = OrderedDict()  # tokens, bytes
        self.nbytes = self.nbytes_on_disk = self.hits = self.misses = 0
        self.lock = threading.Lock()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._find_files(folder)

    def longest(self, ids: Sequence[int]) -> tuple[int, State | None]:
        """(tokens, copy of the state after them) for the longest known prefix of `ids`; (0, None) if there is none.

        The prefix is at least one token shorter than `ids`: the last token must be decoded to give logits.
        """
        with self.lock:
            # hashes only lengths that occur; the hash then tells whether the tokens are the same
            known = {n for n, _ in (*self.states.values(), *self.files.values()) if n < len(ids)}
            for length, name in reversed(prefix_hashes(ids, sorted(known))):
                if name in self.states:
                    self.states.move_to_end(name)
                    self.hits += 1
                    return length, self.states[name][1].clone()  # decoding writes into a state in place
                if name in self.files and (state := self._read(name)) is not None:
                    self.hits += 1
                    if state.nbytes <= self.most_bytes:  # a larger one would evict all others, and then itself
                        self._keep(name, length, state.clone())
                    return length, state
            self.misses += 1
            return 0, None

    def store(self, ids: Sequence[int], state: State) -> None:
        """Store a copy of `state`, which has read `ids`, unless it is larger than the whole cache."""
        ((length, name),) = prefix_hashes(ids, [len(ids)])
        with self.lock:
            if name in self.states:
                self.states.move_to_end(name)
            elif state.nbytes <= self.most_bytes:
                self._keep(name, length, state.clone())

    def _keep(self, name: str, length: int, state: State) -> None:
        """Add a new state, and evict others until all fit. Called under the lock."""
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
        """Write an evicted state to disk. A state that cannot be written is lost, which only costs time."""
        if name in self.files:  # it was read back from disk: the file is still the same
            self.files.move_to_end(name)
            return
        path = self._path(name)
        try:
            save(Memory(state, [], tokens, self.model, []), path)
            size = path.stat().st_size
        except OSError:  # a full disk, a removed folder
            return
        self._add_file(name, tokens, size)

    def _add_file(self, name: str, tokens: int, size: int) -> None:
        """Add a file to the count, and delete the least recently used files until all fit."""
        self.files[name] = (tokens, size)
        self.nbytes_on_disk += size
        while self.nbytes_on_disk > self.most_bytes_on_disk:
            self._remove(next(iter(self.files)))

    def _read(self, name: str) -> State | None:
        self.files.move_to_end(name)
        try:
            return load_memory(self._path(name), expected=self.model).state
        except (OSError, ValueError):  # another process deleted it, or damaged it
            self._remove(name)
            return None

    def _remove(self, name: str) -> None:
        self.nbytes_on_disk -= self.files.pop(name)[1]
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError:  # no permission to delete it: it is no longer counted anyway
            return

    def _find_files(self, folder: Path) -> None:
        """Add the files that an earlier process left for this model, the oldest first."""
        found = []
        for path in folder.glob("*.safetensors"):
            try:
                stat, about = path.stat(), head(path)
            except (OSError, ValueError):  # deleted meanwhile by another process, or damaged
                continue
            if about["model"] == self.model:
                found.append((stat.st_mtime, path.stem, about["tokens"], stat.st_size))
        for _, name, tokens, size in sorted(found):  # by time of writing, as if evicted in that order
            self._add_file(name, tokens, size)
