"""Memory: the state of a model that has read something, as a file. Read once, asked any number of times.

    save(memory, path), load_memory(path, model)
    show(path), head(path)                          a file's content, without a model; without its tensors

`reading.py` makes memories of documents, `merge.py` merges several into one. The file is that of the state; its
metadata record what was read and by which model, with a digest of everything. The digest detects damage and mix-ups.
It is no signature: anyone who can write the file can write a matching digest.
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
from retentive.options import quoted

ABOUT = {"pending": list, "tokens": int, "model": str, "sources": list, "config": dict, "errors": list}
"""Fields of `Memory` stored as JSON beside the state, and their types."""

PARTS = ("state", "keys", "values", "gates", "rows")
"""Names of a block's tensors in a state's file."""


@dataclass
class Memory:
    """The state after all tokens except `pending`, and its origin."""

    state: State
    """State of one sequence (N = 1)."""
    pending: list[int]
    """Ids of the text that were not read yet; the next prompt begins with them."""
    tokens: int
    """Number of tokens read. In merged memories it exceeds the state's position, which is that of the longest."""
    model: str
    """Fingerprint of the model."""
    sources: list[dict]
    """Name, tokens and sha256 of each document, in reading order."""
    config: dict = field(default_factory=dict)
    """The model's config as a dict, needed to rotate the state when merging."""
    errors: list[float] = field(default_factory=list)
    """For merged memories the error of each layer, if measured: see `merge.chain_errors`."""

    @property
    def nbytes(self) -> int:
        return self.state.nbytes


def fingerprint(model: LanguageModel) -> str:
    """Returns 32 hex digits that identify config and weights (with their dtype), independent of the device."""
    digest = hashlib.blake2b(digest_size=16)
    config = model.config  # in the form of version 0.1.0 if it has one, so that older memory files stay valid
    described = None if config.library else version_1(config)
    digest.update(json.dumps(described or ["Model", config.written()], sort_keys=True).encode())
    for name, x in sorted(model.named_parameters()):
        digest.update(name.encode())
        _hash(digest, x.detach())
    return digest.hexdigest()


def blank(model: LanguageModel, name: str | None = None) -> Memory:
    """Returns the memory of a model that has read nothing; `name` is its fingerprint, if already computed."""
    return Memory(model.init_state(1), [], 0, name or fingerprint(model), [], model.config.written())


def _hash(digest, x: Tensor) -> None:
    # includes dtype and shape: the same bytes in another shape are another tensor
    digest.update(f"{x.dtype}{list(x.shape)}".encode())
    digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy())  # as bytes, since NumPy has no bfloat16


def tensors(state: State) -> list[Tensor]:
    """Returns all tensors of a state in the digest's order: by part, then by block, the position last."""
    named = state.named()
    return [*(x for part in PARTS for name, x in named.items() if name.endswith(f".{part}")), state.position]


def _digest(state: State, about: str) -> str:
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for x in tensors(state):
        _hash(digest, x)
    return digest.hexdigest()


# files


def save(memory: Memory, path: str | Path) -> None:
    """Writes it as one safetensors file, atomically."""
    about = json.dumps({name: getattr(memory, name) for name in ABOUT})
    # padded to whole KiB, so that the file's size stays constant while the token count gains digits
    about = about.ljust(-(-len(about) // 1024) * 1024)
    state = memory.state.detach().to("cpu")
    state.save(path, {"memory": about, "digest": _digest(state, about)})


def load_memory(path: str | Path, model: LanguageModel | None = None, expected: str | None = None) -> Memory:
    """Loads the memory that `save` wrote to `path`, onto the model's device.

    Args:
        model: the model that must have written it; None accepts any, and leaves the state on the CPU.
        expected: that model's fingerprint, if already computed.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is no memory file, truncated, changed since it was written, or of another model.
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
            "use the model that wrote it, with the same `dtype`, `window` and `sinks`"
        )
    if model is not None:
        _check_fit(memory, model, path)
        memory.state = memory.state.to(model.device)
    return memory


def head(path: str | Path) -> dict[str, Any]:
    """Returns the fields of `Memory` except the state, from a memory file's metadata, without reading its tensors.

    Only `load_memory` detects damaged tensors.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: it is no memory file.
    """
    return _parsed(_metadata(path)["memory"], path)


def _metadata(path: str | Path) -> dict[str, str]:
    """Returns the metadata of a memory file; raises ValueError for other files."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({quoted(error)}): write it again") from None
    if "memory" not in metadata:
        raise ValueError(f"{path} holds a state but not what was read: expected a file of `retentive memory write`")
    return metadata


def _parsed(about: str, path: str | Path) -> dict[str, Any]:
    try:
        found = json.loads(about)
    except (ValueError, RecursionError):  # not JSON, or endless brackets
        found = None
    if not _well_formed(found):
        raise ValueError(f"{path} does not say what was read as this version does: write it again")
    return found


def _well_formed(about: Any) -> bool:
    """True if `about` has the fields and types that `save` writes."""
    # type(), since isinstance would accept JSON's true as an int
    if not isinstance(about, dict) or {name: type(value) for name, value in about.items()} != ABOUT:
        return False
    wanted = {"name": str, "tokens": int, "sha256": str}
    return all(type(i) is int for i in about["pending"]) and all(
        isinstance(source, dict) and all(type(source.get(key)) is kind for key, kind in wanted.items())
        for source in about["sources"]
    )


def _check_fit(memory: Memory, model: LanguageModel, path: str | Path) -> None:
    """Raises ValueError unless shapes, dtypes and ids are those of one sequence of the model.

    The digest only proves that the file is as it was written. A handmade file may hold anything, and a wrong shape
    would only fail deep in a kernel.
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
    """Returns a description of the file at `path`, without a model; raises as `load_memory`."""
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
