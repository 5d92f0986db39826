"""State: a model's memory between calls, one memory per block (`memory.py`) and the positions.

    logits, state = model(ids)               returns one
    logits, state = model(more, state)       continues from it

Passing a state to the model consumes it if its memories are written in place, as rings and caches are. The model
refuses a consumed state. To continue twice from the same point, `clone()` it first.

State is a pytree node, so torch.export and torch.func see its tensors.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from retentive.files import load_tensors, write_tensors
from retentive.models.memory import MEMORIES, AttentionMemory, ConvolutionMemory, Memory, RetentionMemory

FORMAT = "retentive-state-2"
OWN_TENSOR = {RetentionMemory.kind: "state", ConvolutionMemory.kind: "rows"}
"""Name in a file of a tensor that only this kind of memory has; other memories are of attention."""


@dataclass
class State:
    """Memory of the tokens that N sequences have read; the first dimension of every tensor is N."""

    memories: Sequence[Memory]
    """Memory of each block."""
    position: Tensor
    """int64 `[N]`, number of tokens in each sequence (without padding)."""
    used: bool = field(default=False, compare=False, repr=False)
    """True once a model has written later tokens into these memories."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each memory: "retention", "attention" or "convolution"."""
        return tuple(m.kind for m in self.memories)

    @property
    def windows(self) -> tuple[int, ...]:
        """Maximum slots of each memory; 0 for unlimited, and for memories without slots."""
        return tuple(m.window for m in self.memories)

    @property
    def sinks(self) -> tuple[int, ...]:
        """Number of slots in each memory that keep the first tokens."""
        return tuple(m.sinks for m in self.memories)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, free slots included."""
        return sum(m.nbytes for m in self.memories) + self.position.nbytes

    def tensors(self) -> list[Tensor]:
        """Returns all its tensors, the position last."""
        return [*(x for m in self.memories for x in m.tensors()), self.position]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the memories without the number of slots, and windows: equal for states of the same model."""
        return [shape for m in self.memories for shape in m.shapes]

    def map(self, f: Callable[[Tensor], Tensor]) -> "State":
        """Returns a state with f applied to every tensor."""
        return State([m.map(f) for m in self.memories], f(self.position))

    def select(self, rows: Tensor) -> "State":
        """Returns the sequences `rows`, int64 `[n]`, repeated or reordered as for beam search."""
        return self.map(lambda x: x.index_select(0, rows.to(x.device)))

    def view(self, n: int) -> "State":
        """Returns the first n sequences, sharing memory."""
        return self.map(lambda x: x[:n])

    def clone(self) -> "State":
        """Returns a copy with its own memory.

        Raises:
            ValueError: a model has written into the state since.
        """
        self.check_unused()
        return self.map(lambda x: x.clone())

    def detach(self) -> "State":
        """Returns the same tensors without gradients."""
        return self.map(lambda x: x.detach())

    def to(self, device: torch.device | str) -> "State":
        """Returns the state on a device."""
        return self.map(lambda x: x.to(device))

    def settled(self) -> "State":
        """Returns plain tensors that include all tokens, without rings; itself if it has none."""
        settled = [m.settled() for m in self.memories]
        if all(a is b for a, b in zip(settled, self.memories, strict=True)):
            return self
        return State(settled, self.position.clone())

    def for_decoding(self, dtype: torch.dtype, rollback: int = 0, state_dtype: torch.dtype | None = None) -> "State":
        """Returns a state that decodes in place: retention uses rings for k and v of `dtype`.

        At least the last `rollback` decoded tokens can be taken back. The states of retention have `state_dtype`, by
        default their own, float32.
        """
        made = [m.for_decoding(dtype, rollback, self.position, state_dtype) for m in self.memories]
        return State(made, self.position)

    def reserve(self, slots: int) -> "State":
        """Returns the state with room for `slots` tokens per sequence; itself if it has it, as retention always has."""
        memories = [m.reserve(slots) for m in self.memories]
        if all(a is b for a, b in zip(memories, self.memories, strict=True)):
            return self
        return State(memories, self.position)

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` tokens of every sequence, in place.

        Raises:
            ValueError: more than `for_decoding` keeps; nothing has changed then.
        """
        for memory in self.memories:  # before any change, since one may hold more tokens than another
            memory.check_rollback(tokens, self.position)
        for memory in self.memories:
            memory.rollback(tokens)
        self.position -= tokens

    def put(self, row: int, other: "State", source: int = 0) -> None:
        """Overwrites the sequence at `row` with sequence `source` of another state, in place."""
        for mine, theirs in zip(self.memories, other.memories, strict=True):
            mine.put(row, theirs, source, other.position)  # type: ignore[arg-type]  # of the same kind
        self.position[row] = other.position[source]

    @staticmethod
    def cat(states: Sequence["State"]) -> "State":
        """Returns all sequences of `states`, in order."""
        positions = [s.position for s in states]
        by_block: Any = zip(*(s.memories for s in states), strict=True)
        return State([type(of[0]).cat(of, positions) for of in by_block], torch.cat(positions))

    def then(self, memories: Sequence[Memory], position: Tensor) -> "State":
        """Returns the state after more tokens; marks this one as used if they were written into its tensors."""
        if not torch.compiler.is_compiling():
            self.used = any(new.writes_into(old) for new, old in zip(memories, self.memories, strict=True))
        return State(memories, position)

    def check_unused(self) -> None:
        """Raises ValueError if a model has written later tokens into it."""
        if self.used:
            raise ValueError(
                "the state was used: later tokens were written into it; pass the one that came back, or clone() a "
                "state before you pass it"
            )

    def placed(self, kinds: Sequence[str]) -> "State":
        """Returns the state with its memories in the order of these kinds; itself if they are, or if they differ.

        Files of version 0.1.0 store the memories of retention and of attention separately.
        """
        if tuple(kinds) == self.kinds or sorted(kinds) != sorted(self.kinds):
            return self
        of_kind = {kind: iter([m for m in self.memories if m.kind == kind]) for kind in set(kinds)}
        return State([next(of_kind[kind]) for kind in kinds], self.position)

    def named(self) -> dict[str, Tensor]:
        """Returns the tensors by their names in a file, without the position."""
        return {
            f"memories.{i}.{name}": x
            for i, memory in enumerate(self.memories)
            for name, x in memory.named(self.position).items()
        }

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Writes one safetensors file for `load_state`, with `metadata` in addition to the format's own."""
        self.check_unused()
        about = {**(metadata or {}), "format": FORMAT, "windows": json.dumps(self.windows)}
        if any(self.sinks):
            about["sinks"] = json.dumps(self.sinks)
        write_tensors(Path(path), self.named() | {"position": self.position}, about)


pytree.register_pytree_node(
    State,
    lambda state: ([list(state.memories), state.position], None),
    lambda parts, _: State(*parts),
    serialized_type_name="retentive.State",
    flatten_with_keys_fn=lambda state: (
        [(pytree.GetAttrKey("memories"), list(state.memories)), (pytree.GetAttrKey("position"), state.position)],
        None,
    ),
)


def load_state(path: str | Path) -> State:
    """Loads the state that `save` wrote to `path`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is no state file, truncated, or of a later version.
        KeyError: a tensor is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder: expected a file" if path.is_dir() else f"no file at {path}")
    tensors, metadata = load_tensors(path)
    if metadata.get("format") == "retentive-state-1":
        names, windows = _version_1(tensors, metadata, path)
        sinks = [0] * len(windows)
    elif metadata.get("format") == FORMAT:
        windows = _numbers("windows", metadata.get("windows", ""), path)
        sinks = _numbers("sinks", metadata["sinks"], path) if "sinks" in metadata else [0] * len(windows)
        if len(sinks) != len(windows) or any(s > w for s, w in zip(sinks, windows, strict=False)):
            raise ValueError(f"{path} holds a state with sinks {sinks} in windows {windows}: write it again")
        names = [
            {name.removeprefix(f"memories.{i}."): x for name, x in tensors.items() if name.startswith(f"memories.{i}.")}
            for i in range(len(windows))
        ]
    else:
        raise ValueError(f"{path} holds no saved state (format {metadata.get('format')!r}, expected {FORMAT!r})")
    memories: list[Memory] = []
    for own, window, first in zip(names, windows, sinks, strict=True):
        kind = next((kind for kind, name in OWN_TENSOR.items() if name in own), AttentionMemory.kind)
        try:
            memories.append(MEMORIES[kind].read(own, window, tensors["position"], first))
        except ValueError as error:
            raise ValueError(f"{path} holds {error}") from None
    return State(memories, tensors["position"])


def _numbers(name: str, said: str, path: Path) -> list[int]:
    """Parses the windows or sinks in a file's metadata, one per memory."""
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(type(w) is int and w >= 0 for w in found):
        raise ValueError(f"{path} holds a state with {name} {said!r}, expected a list of numbers of tokens")
    return found


def _version_1(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> tuple[list[dict], list[int]]:
    """Returns (tensors of each memory, windows) of a file of version 0.1.0, which numbers each kind separately."""
    window = metadata.get("window", "0")  # absent in files from before windows existed
    if not (window.isascii() and window.isdigit()):
        raise ValueError(f"{path} holds a state with a window of {window!r}, expected a number of tokens")
    kinds = ("retention", "kv", "hybrid")
    if metadata.get("kind") not in kinds:
        raise ValueError(f"{path} holds a state of kind {metadata.get('kind')!r}, expected one of {', '.join(kinds)}")

    def count(name: str) -> int:
        return sum(key.startswith(name + ".") for key in tensors)

    retained = [{"state": tensors[f"layers.{i}"]} for i in range(count("layers"))]
    parts = [name for name in ("keys", "values", "gates") if count(name)]
    cached = [{name: tensors[f"{name}.{i}"] for name in parts} for i in range(count("keys"))]
    return [*retained, *cached], [0] * len(retained) + [int(window)] * len(cached)
