"""What a model has read, as a file: written once, asked any number of times, whatever its length was.

    read(model, pieces, blank(model))                   a Memory after each stretch of tokens
    save(memory, path), load_memory(path, model), show(path)
    merge(memories), chain(memories)                    one of several that were read apart (docs/memory.md)

The file is that of the state, with what was read, by which model, and a digest in its metadata. The digest finds damage
and mix-ups; it is no signature: who may write the file may write another one.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from retentive.models import Model, RetNetConfig
from retentive.models.state import RetentionState, State, load_state
from retentive.ops import decay as decays
from retentive.ops import rotary

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
    """Of a merged memory, one a layer, where they were measured: see `chain_errors`."""

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
    return [*state.named().values(), state.position]


def _digest(state: State, about: str) -> str:
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for x in _tensors(state):
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
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "memory" not in metadata:
        raise ValueError(f"{path} holds a state but not what was read: expected a file of `retentive memory write`")
    if metadata.get("digest") != _digest(state, metadata["memory"]):
        raise ValueError(f"{path} was changed after it was written (its digest does not fit): write it again")
    about = json.loads(metadata["memory"])
    if not _well_formed(about):
        raise ValueError(f"{path} does not say what was read as this version does: write it again")
    memory = Memory(state, **about)
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
    got = [(list(x.shape), x.dtype) for x in _tensors(memory.state)] if tokens >= 0 else []
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


# reading


def blank(model: Model, name: str | None = None) -> Memory:
    """The memory of a model that has read nothing; `name` is its fingerprint, where it was computed before."""
    return Memory(model.init_state(1), [], 0, name or fingerprint(model), [], asdict(model.config))


@torch.no_grad()
def read(model: Model, pieces: Iterable[Sequence[int]], memory: Memory, *, stretch: int = 4096) -> Iterator[Memory]:
    """The memory after each stretch of the ids in `pieces`, going on from `memory` (which is used up).

    Reading takes the memory of one stretch, however much there is; `sources` are the caller's to write.
    """
    state: Any = memory.state
    tokens, device = memory.tokens, model.device
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


# merging


def keep_size(states: Tensor) -> Tensor:
    """Weight `[H,1,1]` of a sum of states `[M,H,K,V]` that leaves it as large as they are (root mean square), by heads.

    1/M where all are the same and 1/sqrt(M) where they have nothing in common; why, see docs/memory.md.
    """
    squares = states.square().sum((-2, -1), keepdim=True).mean(0)
    total = states.sum(0).square().sum((-2, -1), keepdim=True)
    return torch.where(total > 0, squares / total, 0).sqrt()


def merge(memories: Sequence[Memory], *, weight: Callable[[Tensor], Tensor] = keep_size) -> Memory:
    """Structured prompting (arXiv 2212.06713): one memory, as if each of `memories` stood right before what comes.

    Their states are turned to the same last position and summed, in each layer and head with `weight`. All are equally
    near, however many there are; merging copies of a memory gives that memory.

    Raises:
        ValueError: nothing to merge, different models, a Transformer's, or tokens that are still to be read.
    """
    config, states = _mergeable(memories)
    end = max(int(s.position[0]) for s in states)
    turned = [_turn(s, end - int(s.position[0]), config) for s in states]
    layers = []
    for parts in zip(*turned, strict=True):
        stack = torch.cat(parts)
        layers.append((weight(stack) * stack.sum(0))[None])
    return _merged(memories, layers, end)


def chain(memories: Sequence[Memory]) -> Memory:
    """`memories` one after the other, each as old as those behind it are long: a long reading done in parts.

    In the first layer this is what reading on would have given. In those above it is not: there keys and values depend
    on what came before, and each part was read without.

    Raises:
        ValueError: as for `merge`, or decays that depend on the tokens.
    """
    config, states = _mergeable(memories)
    if config.decay == "gated":
        raise ValueError("memories of a model with gated decay cannot be chained: how much it forgot is not known")
    log_decay = decays.log_decay(config.decay, config.heads, dtype=torch.float64)[:, None, None]
    layers: list[Tensor] = [torch.zeros(()) for _ in range(config.layers)]
    end = 0
    for state in states:
        length = int(state.position[0])
        turned = _turn(state, end, config)
        fade = (length * log_decay).exp().to(turned[0].device, turned[0].dtype)
        layers = [fade * old + new for old, new in zip(layers, turned, strict=True)]
        end += length
    return _merged(memories, layers, end)


def chain_errors(memories: Sequence[Memory], whole: Memory) -> list[float]:
    """|chain - whole| / |whole| of each layer: what it did to `memories` that each was read without those before it.

    Raises:
        ValueError: `whole` has not read the same documents in that order.
    """
    chained = chain(memories)
    _mergeable([chained, whole])
    position = int(whole.state.position[0])
    if _hashes(chained) != _hashes(whole) or int(chained.state.position[0]) != position:
        raise ValueError(
            f"expected a memory of the same {len(chained.sources)} documents ({chained.tokens} tokens) read in a row, "
            f"got one of {len(whole.sources)} documents ({whole.tokens} tokens)"
        )
    pairs = zip(_tensors(chained.state)[:-1], _tensors(whole.state)[:-1], strict=True)
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


def _hashes(memory: Memory) -> list[str]:
    return [source["sha256"] for source in memory.sources]


def _mergeable(memories: Sequence[Memory]) -> tuple[RetNetConfig, list[RetentionState]]:
    """The config that they share, and their states."""
    if not memories:
        raise ValueError("merging needs at least one memory, got none")
    first, states = memories[0], []
    for memory in memories:
        if memory.model != first.model:
            raise ValueError(
                f"memories of different models cannot be merged (fingerprints {first.model[:12]} and "
                f"{memory.model[:12]}): write them with one model"
            )
        if not isinstance(memory.state, RetentionState):
            raise ValueError("memories of a Transformer cannot be merged: a cache holds tokens, not their sum")
        if memory.pending:
            raise ValueError(
                f"a memory with tokens still to be read ({memory.pending}) cannot be merged: read them first"
            )
        if not memory.config:
            raise ValueError("merging needs the model's config in the memory: write it with this version")
        states.append(memory.state)
    return RetNetConfig(**first.config), states


def _turn(state: RetentionState, by: int, config: RetNetConfig) -> list[Tensor]:
    """The layers as if all tokens stood `by` positions later: their keys' rotation is the state's, exactly."""
    layers = state.tensors()
    cos, sin = rotary.phases(
        torch.tensor([by], device=layers[0].device), layers[0].shape[-2], config.rotary, dtype=layers[0].dtype
    )
    return [rotary.rotate(x.mT, cos, sin, config.rotary).mT.contiguous() for x in layers]


def _merged(memories: Sequence[Memory], layers: list[Tensor], end: int) -> Memory:
    first = memories[0]
    state = RetentionState(layers, torch.full_like(first.state.position, end))
    sources = [{**source, "part": n} for n, m in enumerate(memories) for source in m.sources]
    return Memory(state, [], sum(m.tokens for m in memories), first.model, sources, first.config)
