"""States of prompts that were read before: who begins as another did goes on from there.

A prefix is kept where a reader stops at a multiple of `stretch` tokens, at a prompt's end, and at the end of a reply.
It is found by a hash of its tokens, longest first, and is exact: the state is the very one. Whoever was used last stays
longest, within a bound in bytes; what is pushed out goes to `folder`, if there is one, within a bound of its own.
"""

import hashlib
import json
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from retentive.models.state import State, load_state


def digest(ids: Sequence[int]) -> str:
    """The name of a prefix: 128 bits, so that two that differ do not meet."""
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).hexdigest()


class PrefixCache:
    """`longest(ids)` and `store(ids, state)`, for states of one sequence of one model.

    Args:
        most_bytes: of states in memory.
        stretch: tokens between kept states of a long prompt.
        folder: where states go that memory has no room for; None drops them.
        most_bytes_on_disk: of those; the oldest go first.
        model: names the model, so that a folder's states are never read by another.
    """

    def __init__(
        self,
        most_bytes: int,
        *,
        stretch: int = 512,
        folder: Path | None = None,
        most_bytes_on_disk: int = 8 << 30,
        model: str = "",
    ):
        if most_bytes < 0 or stretch < 1:
            raise ValueError(f"a prefix cache needs most_bytes >= 0 and stretch >= 1, got {most_bytes} and {stretch}")
        self.most_bytes, self.stretch, self.folder = most_bytes, stretch, folder
        self.most_bytes_on_disk, self.model = most_bytes_on_disk, model
        self.states: OrderedDict[str, tuple[int, State]] = OrderedDict()
        self.files: OrderedDict[str, tuple[int, int]] = OrderedDict()  # name: tokens, bytes
        self.lengths: Counter[int] = Counter()
        self.nbytes = self.nbytes_on_disk = self.hits = self.misses = 0
        self.lock = threading.Lock()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._find_files(folder)

    def longest(self, ids: Sequence[int]) -> tuple[int, State | None]:
        """(tokens, a copy of the state after them) for the longest prefix known, short of `ids` by a token at least."""
        with self.lock:
            for length in sorted((n for n in self.lengths if n < len(ids)), reverse=True):
                name = digest(ids[:length])
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
        name = digest(ids)
        with self.lock:
            if name in self.states:
                self.states.move_to_end(name)
            elif state.nbytes <= self.most_bytes:
                self._keep(name, len(ids), state.clone())

    def _keep(self, name: str, length: int, state: State) -> None:
        if name not in self.files:
            self.lengths[length] += 1
        self.states[name] = (length, state)
        self.nbytes += state.nbytes
        while self.nbytes > self.most_bytes:
            old, (tokens, dropped) = self.states.popitem(last=False)
            self.nbytes -= dropped.nbytes
            if self.folder is not None:
                self._write(old, tokens, dropped)
            if old not in self.files:
                self._forget(tokens)

    def _forget(self, tokens: int) -> None:
        self.lengths[tokens] -= 1
        if not self.lengths[tokens]:
            del self.lengths[tokens]

    # on disk

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _write(self, name: str, tokens: int, state: State) -> None:
        if name in self.files:
            self.files.move_to_end(name)
            return
        path = self._path(name)
        state.save(path, {"prefix": json.dumps({"tokens": tokens, "model": self.model})})
        self.files[name] = (tokens, path.stat().st_size)
        self.nbytes_on_disk += self.files[name][1]
        while self.nbytes_on_disk > self.most_bytes_on_disk:
            self._remove(next(iter(self.files)))

    def _read(self, name: str) -> State | None:
        try:
            self.files.move_to_end(name)
            return load_state(self._path(name))
        except (OSError, ValueError):  # somebody tidied up, or wrote into it
            self._remove(name)
            return None

    def _remove(self, name: str) -> None:
        tokens, size = self.files.pop(name)
        self.nbytes_on_disk -= size
        self._path(name).unlink(missing_ok=True)
        if name not in self.states:
            self._forget(tokens)

    def _find_files(self, folder: Path) -> None:
        """What an earlier process left there, of this model."""
        for path in sorted(folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime):
            try:
                with safe_open(path, framework="pt") as file:
                    about = json.loads((file.metadata() or {}).get("prefix", "{}"))
            except (SafetensorError, ValueError):
                continue
            if about.get("model") == self.model and isinstance(about.get("tokens"), int):
                self.files[path.stem] = (about["tokens"], path.stat().st_size)
                self.nbytes_on_disk += path.stat().st_size
                self.lengths[about["tokens"]] += 1
