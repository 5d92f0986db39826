"""Merges memories that were read apart: side by side (structured prompting), or one after the other (a chain).

    side by side   S = c sum_i R(P - L_i) S_i                    P the largest L_i, c keeps the size of the states
    in a chain     S_AB = exp(L_B log_decay) S_A + R(L_A) S_B

S_i is the state of one head after L_i tokens, R(n) rotates its keys by n positions. Both are exact in the first layer
and approximate above it; docs/memory.md shows how good they are, and derives c. Structured prompting: Hao et al.,
arXiv 2212.06713.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retentive.infer.memory import Memory, load_memory, save, tensors
from retentive.layers import RetentionConfig
from retentive.models import ModelConfig, RetentionMemory, State
from retentive.models.version_1 import read_version_1
from retentive.ops import rotary
from retentive.tables import counted


def keep_size(states: Tensor) -> Tensor:
    """Returns weights `[H,1,1]` that scale the sum of states `[M,H,K,V]` to their own root mean square, per head.

    1/M if all are equal, 1/sqrt(M) if they are uncorrelated; docs/memory.md says why.
    """
    squares = states.square().sum((-2, -1), keepdim=True).mean(0)
    total = states.sum(0).square().sum((-2, -1), keepdim=True)
    return torch.where(total > 0, squares / total, 0).sqrt()  # states that cancel or are zero stay zero


def merge(memories: Sequence[Memory], *, weight: Callable[[Tensor], Tensor] = keep_size) -> Memory:
    """Merges memories as if each stood right before the prompt: structured prompting.

    Their states are rotated to the same last position and summed, weighted by `weight` per layer and head. All are
    equally near, however many there are. Merging copies of one memory gives that memory.

    Raises:
        ValueError: there are no memories, they are of different models or of a Transformer, or have pending tokens.
    """
    mixers, states = _mergeable(memories)
    end = max(int(s.position[0]) for s in states)
    rotated = [_rotated(s, end - int(s.position[0]), mixers) for s in states]
    layers = []
    for parts in zip(*rotated, strict=True):
        stack = torch.cat(parts)
        layers.append((weight(stack) * stack.sum(0))[None])
    return _merged(memories, layers, end)


def chain(memories: Sequence[Memory]) -> Memory:
    """Merges memories as if they had been read one after the other.

    Exact in the first layer only: in higher layers keys and values depend on the text before, which each part was read
    without.

    Raises:
        ValueError: as for `merge`, or the decays depend on the tokens.
    """
    mixers, states = _mergeable(memories)
    if any(mixer.per_token for mixer in mixers):
        raise ValueError(
            "memories of a model with a decay per token cannot be chained: how much it forgot is not known"
        )
    # float64, since a rate close to 1 is raised to the power of a document's length
    decays = [torch.tensor(mixer.log_decay(), dtype=torch.float64)[:, None, None] for mixer in mixers]
    layers: list[Tensor] = [torch.zeros(()) for _ in mixers]  # broadcast in the first sum
    end = 0
    for state in states:
        length = int(state.position[0])
        rotated = _rotated(state, end, mixers)
        fades = [(length * log_decay).exp().to(rotated[0].device, rotated[0].dtype) for log_decay in decays]
        layers = [fade * old + new for fade, old, new in zip(fades, layers, rotated, strict=True)]
        end += length
    return _merged(memories, layers, end)


def chain_errors(memories: Sequence[Memory], whole: Memory) -> list[float]:
    """Returns |chain - whole| / |whole| of each layer, where `whole` has read consecutively what `memories` read apart.

    This is the cost of reading each memory without those before it.

    Raises:
        ValueError: `whole` has not read the same documents in that order.
    """
    chained = chain(memories)
    _mergeable([chained, whole])
    position = int(whole.state.position[0])
    if _hashes(chained) != _hashes(whole) or int(chained.state.position[0]) != position:
        want, got = (f"{counted(len(m.sources), 'document')} ({m.tokens} tokens)" for m in (chained, whole))
        raise ValueError(f"expected a memory of the same {want} read in a row, got one of {got}")
    # the last tensor is the position
    pairs = zip(tensors(chained.state)[:-1], tensors(whole.state)[:-1], strict=True)
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


def merge_files(
    files: Sequence[str | Path], out: str | Path, *, in_a_chain: bool = False, against: str | Path | None = None
) -> Memory:
    """Merges the memories in `files` by `merge` (or `chain`, with `in_a_chain`) and saves the result to the new `out`.

    Args:
        against: file of a memory that has read the same documents consecutively; the result then has the `errors` of
            `chain_errors`.

    Raises:
        ValueError: there are fewer than two files, or the memories cannot be merged.
        OSError: a file is missing, or `out` exists.
    """
    out = Path(out)
    if len(files) < 2:
        raise ValueError(f"merge needs two memory files or more, got {len(files)}")
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another file, nothing is overwritten")
    memories = [load_memory(file) for file in files]  # without a model: merging needs only the config in each file
    memory = chain(memories) if in_a_chain else merge(memories)
    if against is not None:
        memory.errors = chain_errors(memories, load_memory(against))
    save(memory, out)
    return memory


def _hashes(memory: Memory) -> list[str]:
    return [source["sha256"] for source in memory.sources]


def _mergeable(memories: Sequence[Memory]) -> tuple[list[RetentionConfig], list[State]]:
    """Returns (the shared retention of each block, the states); raises ValueError if they cannot be merged."""
    if not memories:
        raise ValueError("merging needs at least one memory, got none")
    first, states = memories[0], []
    for memory in memories:
        if memory.model != first.model:
            raise ValueError(
                f"memories of different models cannot be merged (fingerprints {first.model[:12]} and "
                f"{memory.model[:12]}): write them with one model"
            )
        if set(memory.state.kinds) != {RetentionConfig.kind}:
            raise ValueError("memories of attention cannot be merged: a cache holds tokens, not their sum")
        if memory.pending:
            raise ValueError(
                f"a memory with tokens still to be read ({memory.pending}) cannot be merged: read them first"
            )
        if not memory.config:
            raise ValueError("merging needs the model's config in the memory: write it with this version")
        states.append(memory.state)
    written = first.config
    config = ModelConfig.read(written) if "blocks" in written else read_version_1("retnet", written)
    mixers: Any = config.mixers  # of retention all, as the states are
    return list(mixers), states


def _rotated(state: State, by: int, mixers: Sequence[RetentionConfig]) -> list[Tensor]:
    """Returns the blocks' states `[1,H,K,V]` as if all tokens stood `by` positions later.

    A state is a sum of k v^T and the rotation of a key acts on K, so rotating the sum is exact.
    """
    rotated = []
    for x, mixer in zip(state.settled().tensors(), mixers, strict=False):  # the last tensor is the position
        offset = torch.tensor([by], device=x.device)
        cos, sin = rotary.phases(offset, x.shape[-2], mixer.rotary, base=mixer.rotary_base, dtype=x.dtype)
        # `rotate` acts on the last dimension, which in a state is V
        rotated.append(rotary.rotate(x.mT, cos, sin, mixer.rotary).mT.contiguous())
    return rotated


def _merged(memories: Sequence[Memory], layers: list[Tensor], end: int) -> Memory:
    """Returns the memory of these layers at position `end`; its sources tell which part each document is from."""
    first = memories[0]
    state = State([RetentionMemory(x) for x in layers], torch.full_like(first.state.position, end))
    sources = [{**source, "part": n} for n, m in enumerate(memories) for source in m.sources]
    return Memory(state, [], sum(m.tokens for m in memories), first.model, sources, first.config)
