"""What a model has read, as a file: written once, asked any number of times, whatever its length was.

    read(model, pieces)                                 a Memory after each stretch of tokens
    save(memory, path), load_memory(path, model), show(path)
    merge(memories)                                     one of several that were read apart: structured prompting

The file is that of the state, with what was read, by which model, and a digest in its metadata. The digest finds damage
and mix-ups; it is no signature: who may write the file may write another one.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from retentive.models import Model
from retentive.models.state import RetentionState, State, load_state

ABOUT = ("pending", "tokens", "model", "sources", "config", "errors")


@dataclass
class Memory:
    """The state after all tokens but `pending`, and where it comes from."""

    state: State
    """Of one sequence."""
    pending: list[int]
    """Ids that were picked but not read yet; the next prompt begins with them."""
    tokens: int
    """Read in all; more than the state's position where memories were merged."""
    model: str
    """The model's fingerprint."""
    sources: list[dict]
    """name, tokens and sha256 of each document, in the order of reading."""
    config: dict = field(default_factory=dict)
    """The model's, as a dict; merging needs it."""
    errors: list[float] = field(default_factory=list)
    """Of a merged memory, a layer each, where it was measured: see `merge_errors`."""

    @property
    def nbytes(self) -> int:
        return self.state.nbytes


def fingerprint(model: Model) -> str:
    """32 hex digits that name a config with these weights, on whatever device they lie."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([type(model).__name__, asdict(model.config)], sort_keys=True).encode())
    for name, x in sorted(model.named_parameters()):
        digest.update(name.encode())
        _hash(digest, x.detach())
    return digest.hexdigest()


def _hash(digest, x: Tensor) -> None:
    digest.update(f"{x.dtype}{list(x.shape)}".encode())
    digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy())


def _tensors(state: State) -> list[Tensor]:
    """All that is written of a state, in order."""
    if isinstance(state, RetentionState):
        return [*state.tensors(), state.position]
    used = int(state.position.max())
    return [*(x[:, :used] for x in (*state.keys, *state.values)), state.position]


def _digest(state: State, about: str) -> str:
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for x in _tensors(state):
        _hash(digest, x)
    return digest.hexdigest()


# files


def save(memory: Memory, path: str | Path) -> None:
    """Write it as one safetensors file, whole or not at all."""
    about = json.dumps({name: getattr(memory, name) for name in ABOUT})
    state = memory.state.detach().to("cpu")
    state.save(path, {"memory": about, "digest": _digest(state, about)})


def load_memory(path: str | Path, model: Model | None = None, expected: str | None = None) -> Memory:
    """The memory that `save` wrote to `path`, on the model's device.

    Args:
        model: whose it must be.
        expected: that model's fingerprint, where it was computed before.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no memory, cut short, changed since it was written, or another model's.
    """
    try:
        state = load_state(path)
    except KeyError as missing:
        raise ValueError(f"{path} holds a state without {missing}: write it again") from None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "memory" not in metadata:
        raise ValueError(f"{path} holds a state but not what was read: expected a file of `retentive memory write`")
    if metadata.get("digest") != _digest(state, metadata["memory"]):
        raise ValueError(f"{path} was changed after it was written (its digest does not fit): write it again")
    about = json.loads(metadata["memory"])
    memory = Memory(state, **{name: about[name] for name in ABOUT})
    if model is not None and expected is None:
        expected = fingerprint(model)
    if expected is not None and memory.model != expected:
        raise ValueError(
            f"{path} is the memory of another model (fingerprint {memory.model[:12]}, this one has {expected[:12]}): "
            "use the model that wrote it, with the same dtype"
        )
    if model is not None:
        _check_fit(memory, model, path)
        memory.state = memory.state.to(model.embed.weight.device)
    return memory


def _check_fit(memory: Memory, model: Model, path: str | Path) -> None:
    """Whoever made a file by hand may have put in anything: the shapes must be those of one sequence of the model."""
    tokens = int(memory.state.position[0]) if memory.state.position.shape == (1,) else -1
    fresh = model.init_state(1)
    if isinstance(fresh, RetentionState):
        want = [(list(x.shape), x.dtype) for x in _tensors(fresh)]
    else:
        slots = [([1, tokens, *x.shape[2:]], x.dtype) for x in (*fresh.keys, *fresh.values)]
        want = [*slots, ([1], torch.int64)]
    got = [(list(x.shape), x.dtype) for x in _tensors(memory.state)] if tokens >= 0 else []
    if type(fresh) is not type(memory.state) or got != want:
        raise ValueError(
            f"{path} does not fit the model: its state is not that of one sequence of {type(model).__name__}"
        )
    vocab = model.config.vocab_size
    if not all(isinstance(i, int) and 0 <= i < vocab for i in memory.pending):
        raise ValueError(f"{path} does not fit the model: pending tokens must be in [0, {vocab})")


def show(path: str | Path) -> dict[str, Any]:
    """What is in the file at `path`, without a model; errors as `load_memory`."""
    memory = load_memory(path)
    return {
        "kind": "retention" if isinstance(memory.state, RetentionState) else "kv",
        "tokens": memory.tokens,
        "position": int(memory.state.position[0]),
        "pending": memory.pending,
        "state_bytes": memory.nbytes,
        "file_bytes": Path(path).stat().st_size,
        "model": memory.model,
        "config": memory.config,
        "sources": memory.sources,
        "errors": memory.errors,
    }


# reading


@torch.no_grad()
def read(
    model: Model, pieces: Iterable[Sequence[int]], memory: Memory | None = None, *, stretch: int = 4096
) -> Iterator[Memory]:
    """The memory after each stretch of the ids in `pieces`, going on from `memory` (which is used up).

    Reading takes the memory of one stretch, however much there is; sources are the caller's to fill in.
    """
    if memory is None:
        memory = Memory(model.init_state(1), [], 0, fingerprint(model), [], asdict(model.config))
    state, tokens, device = memory.state, memory.tokens, model.embed.weight.device
    for ids in _stretches(pieces, memory.pending, stretch):
        _, state = model.hidden(torch.tensor([ids], device=device), state)
        tokens += len(ids)
        yield Memory(state, [], tokens, memory.model, memory.sources, memory.config)


def _stretches(pieces: Iterable[Sequence[int]], first: Sequence[int], size: int) -> Iterator[list[int]]:
    held = list(first)
    for piece in pieces:
        held += piece
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held:
        yield held
