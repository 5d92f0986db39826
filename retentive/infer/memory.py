"""A memory: the state of a model that has read something, as a file. Read once, asked any number of times.

    save(memory, path), load_memory(path, model)
    show(path), head(path)                          what a file holds, without a model; without its tensors

`reading.py` makes memories of documents, `merge.py` one memory of several. The file is that of the state; its metadata
say what was read and by which model, with a digest of all. The digest finds damage and mix-ups; it is no signature:
whoever can write the file can write a matching one.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from retentive.models import LanguageModel
from retentive.models.state import State, load_state
from retentive.models.version_1 import version_1

ABOUT = {"pending": list, "tokens": int, "model": str, "sources": list, "config": dict, "errors": list}
"""Fields of `Memory` that are kept as JSON beside the state, and their types."""

PARTS = ("state", "keys", "values", "gates")
"""Names of a block's tensors in a state's file."""


@dataclass
class Memory:
    """The state after all tokens but `pending`, and where it comes from."""

    state: State
    """Of one sequence (N = 1)."""
    pending: list[int]
    """Ids that belong to the text but were not read yet; the next prompt begins with them."""
    tokens: int
    """Tokens read in all. Where memories were merged, more than the state's position, which is that of the longest."""
    model: str
    """The model's fingerprint."""
    sources: list[dict]
    """name, tokens and sha256 of each document, in the order of reading."""
    config: dict = field(default_factory=dict)
    """The model's config as a dict; merging needs it to rotate the state."""
    errors: list[float] = field(default_factory=list)
    """Of a merged memory, one for each layer, if they were measured: see `merge.chain_errors`."""

    @property
    def nbytes(self) -> int:
        return self.state.nbytes


def fingerprint(model: LanguageModel) -> str:
    """32 hex digits that stand for the config and the weights (with their dtype), on whatever device they are."""
    digest = hashlib.blake2b(digest_size=16)
    config = model.config  # as version 0.1.0 described it, where it could: its memory files stay this model's
    described = None if config.library else version_1(config)
    digest.update(json.dumps(described or ["Model", config.written()], sort_keys=True).encode())
    for name, x in sorted(model.named_parameters()):
        digest.update(name.encode())
        _hash(digest, x.detach())
    return digest.hexdigest()


def blank(model: LanguageModel, name: str | None = None) -> Memory:
    """The memory of a model that has read nothing; `name` is its fingerprint, to spare hashing all weights again."""
    return Memory(model.init_state(1), [], 0, name or fingerprint(model), [], model.config.written())


def _hash(digest, x: Tensor) -> None:
    # dtype and shape go in too: the same bytes in another shape are another tensor
    digest.update(f"{x.dtype}{list(x.shape)}".encode())
    digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy())  # as bytes: NumPy knows no bfloat16


def tensors(state: State) -> list[Tensor]:
    """All tensors of a state in the order that the digest takes them: by part, then by block, the position last."""
    named = state.named()
    return [*(x for part in PARTS for name, x in named.items() if name.endswith(f".{part}")), state.position]


def _digest(state: State, about: str) -> str:
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for x in tensors(state):
        _hash(digest, x)
    return digest.hexdigest()


# files


def save(memory: Memory, path: str | Path) -> None:
    """Write it as one safetensors file, whole or not at all."""
    about = json.dumps({name: getattr(memory, name) for name in ABOUT})
    # padded to whole KiB: the file keeps its size while the count of tokens gains digits (constant size is the promise)
    about = about.ljust(-(-len(about) // 1024) * 1024)
    state = memory.state.detach().to("cpu")
    state.save(path, {"memory": about, "digest": _digest(state, about)})


def load_memory(path: str | Path, model: LanguageModel | None = None, expected: str | None = None) -> Memory:
    """The memory that `save` wrote to `path`, on the model's device.

    Args:
        model: the model that must have written it; None accepts any, and leaves the state on the CPU.
        expected: that model's fingerprint, to spare hashing all weights again.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a memory file, cut short, changed since it was written, or another model's.
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
    """The fields of `Memory` but the state, from the metadata of a memory file. Its tensors are not read.

    Damage in the tensors is found by `load_memory` only.

    Raises:
        OSError: no such file, or not readable.
        ValueError: not a memory file.
    """
    return _parsed(_metadata(path)["memory"], path)


def _metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a memory file; raises ValueError for any other file."""
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
    """Whether `about` has the fields and types that `save` writes."""
    # type(), not isinstance: JSON's true would pass for an int
    if not isinstance(about, dict) or {name: type(value) for name, value in about.items()} != ABOUT:
        return False
    wanted = {"name": str, "tokens": int, "sha256": str}
    return all(type(i) is int for i in about["pending"]) and all(
        isinstance(source, dict) and all(type(source.get(key)) is kind for key, kind in wanted.items())
        for source in about["sources"]
    )


def _check_fit(memory: Memory, model: LanguageModel, path: str | Path) -> None:
    """Raises ValueError unless shapes, dtypes and ids are those of one sequence of the model.

    The digest proves no more than that the file is as it was written: one made by hand may hold anything, and a wrong
    shape would fail only deep in a kernel.
    """
    misfit = f"{path} does not fit the model: its state is not that of one sequence of this {model.config.name}"
    if memory.state.position.shape != (1,):
        raise ValueError(misfit)
    try:
        memory.state = model.checked(memory.state)
    except ValueError as error:
        raise ValueError(f"{misfit} ({error})") from None
    tokens = int(memory.state.position)
    want = [  # on "meta", since a forged position may ask for any number of slots
        (x.shape, x.dtype)
        for own in model.init_state(1).to("meta").memories
        for x in own.reserve(tokens).named(memory.state.position).values()
    ]
    got = [(x.shape, x.dtype) for x in memory.state.named().values()]
    if got != want or memory.state.position.dtype != torch.int64:
        raise ValueError(misfit)
    vocab = model.config.vocab_size
    if not all(0 <= i < vocab for i in memory.pending):
        raise ValueError(f"{path} does not fit the model: pending tokens must be in [0, {vocab})")


def show(path: str | Path) -> dict[str, Any]:
    """What is in the file at `path`, without a model; errors as `load_memory`."""
    memory = load_memory(path)
    return {
        "kinds": sorted(set(memory.state.kinds)),
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
