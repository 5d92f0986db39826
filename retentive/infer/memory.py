"""What a model has read, as a file: written once, asked any number of times, whatever its length was.

    save(memory, path), load_memory(path, model)
    show(path), head(path)                          what a file holds, without a model; without its tensors

`reading.py` makes memories of documents, `merge.py` one memory of several. The file is that of the state, with what was
read, by which model, and a digest in its metadata. The digest finds damage and mix-ups; it is no signature: who may
write the file may write another one.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from retentive.models import Model
from retentive.models.state import State, load_state

ABOUT = {"pending": list, "tokens": int, "model": str, "sources": list, "config": dict, "errors": list}
"""What is kept beside the state."""


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
    """Of a merged memory, one a layer, where they were measured: see `merge.chain_errors`."""

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


def blank(model: Model, name: str | None = None) -> Memory:
    """The memory of a model that has read nothing; `name` is its fingerprint, where it was computed before."""
    return Memory(model.init_state(1), [], 0, name or fingerprint(model), [], asdict(model.config))


def _hash(digest, x: Tensor) -> None:
    digest.update(f"{x.dtype}{list(x.shape)}".encode())
    digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy())


def tensors(state: State) -> list[Tensor]:
    """All that is written of a state, in order; its position comes last."""
    return [*state.named().values(), state.position]


def _digest(state: State, about: str) -> str:
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for x in tensors(state):
        _hash(digest, x)
    return digest.hexdigest()


# files


def save(memory: Memory, path: str | Path) -> None:
    """Write it as one safetensors file, whole or not at all."""
    about = json.dumps({name: getattr(memory, name) for name in ABOUT})
    about = about.ljust(-(-len(about) // 1024) * 1024)  # else the file would grow by a digit now and then
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
    metadata = _metadata(path)
    if metadata.get("digest") != _digest(state, metadata["memory"]):
        raise ValueError(f"{path} was changed after it was written (its digest does not fit): write it again")
    memory = Memory(state, **_parsed(metadata["memory"], path))
    if model is not None and expected is None:
        expected = fingerprint(model)
    if expected is not None and memory.model != expected:
        raise ValueError(
            f"{path} is the memory of another model (fingerprint {memory.model[:12]}, this one has {expected[:12]}): "
            "use the model that wrote it, with the same dtype"
        )
    if model is not None:
        _check_fit(memory, model, path)
        memory.state = memory.state.to(model.device)
    return memory


def head(path: str | Path) -> dict[str, Any]:
    """What a memory file says of itself: the fields of `Memory` but the state. Its tensors are not read.

    Damage beyond the file's head is found by `load_memory` alone.

    Raises:
        OSError: not there, or not readable.
        ValueError: no memory.
    """
    return _parsed(_metadata(path)["memory"], path)


def _metadata(path: str | Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): write it again") from None
    if "memory" not in metadata:
        raise ValueError(f"{path} holds a state but not what was read: expected a file of `retentive memory write`")
    return metadata


def _parsed(about: str, path: str | Path) -> dict[str, Any]:
    try:
        found = json.loads(about)
    except (ValueError, RecursionError):  # no JSON, or brackets without end
        found = None
    if not _well_formed(found):
        raise ValueError(f"{path} does not say what was read as this version does: write it again")
    return found


def _well_formed(about: Any) -> bool:
    """Whether it is what `save` writes."""
    if not isinstance(about, dict) or {name: type(value) for name, value in about.items()} != ABOUT:
        return False
    wanted = {"name": str, "tokens": int, "sha256": str}
    return all(type(i) is int for i in about["pending"]) and all(
        isinstance(source, dict) and all(type(source.get(key)) is kind for key, kind in wanted.items())
        for source in about["sources"]
    )


def _check_fit(memory: Memory, model: Model, path: str | Path) -> None:
    """Whoever made a file by hand may have put in anything: the shapes must be those of one sequence of the model."""
    tokens = int(memory.state.position[0]) if memory.state.position.shape == (1,) else -1
    fresh = model.init_state(1)
    want = [
        ([1, tokens, *x.shape[2:]] if name.startswith(("keys", "values")) else list(x.shape), x.dtype)
        for name, x in fresh.named().items()
    ]
    want.append(([1], torch.int64))
    got = [(list(x.shape), x.dtype) for x in tensors(memory.state)] if tokens >= 0 else []
    if type(fresh) is not type(memory.state) or got != want:
        raise ValueError(
            f"{path} does not fit the model: its state is not that of one sequence of {type(model).__name__}"
        )
    vocab = model.config.vocab_size
    if not all(0 <= i < vocab for i in memory.pending):
        raise ValueError(f"{path} does not fit the model: pending tokens must be in [0, {vocab})")


def show(path: str | Path) -> dict[str, Any]:
    """What is in the file at `path`, without a model; errors as `load_memory`."""
    memory = load_memory(path)
    return {
        "kind": memory.state.kind,
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
