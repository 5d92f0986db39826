"""Sharded checkpoints: safetensors files in which each rank writes and reads its own parts of the tensors.

    header length in 8 bytes | header in JSON: every tensor's dtype, shape, offsets | numbers, tensor after tensor

(https://github.com/huggingface/safetensors#format). Offsets depend on names and shapes only, so every rank can compute
them. Nothing is gathered, and the file equals a single process's byte for byte.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from retentive.checkpoint.weights import checksum
from retentive.files import load_tensors
from retentive.models import RetentionMemory, State
from retentive.models.memory import Memory
from retentive.train.parallel.cluster import Cluster
from retentive.train.parallel.data import local
from retentive.train.parallel.mesh import Axis
from retentive.train.parallel.tensor import split_dim

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of dtypes in a header."""
UNSEALED = {"crc32": "00000000"}
"""Metadata of a weights file until `seal` writes its checksum."""


class Shard(NamedTuple):
    """This rank's box of a tensor."""

    own: Tensor
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: tuple[int, ...]
    """Index of the first element of `own` in the whole tensor, per axis."""
    writes: bool = True
    """True if this rank writes the box; of several ranks with the same box, one does."""

    def copied(self) -> "Shard":
        """A copy in CPU memory for the rank that writes it, so that training can continue."""
        own = self.own.to("cpu", copy=True) if self.writes else torch.empty(0, dtype=self.own.dtype)
        return self._replace(own=own)


def shard_of(name: str, x: Any, cluster: Cluster) -> Shard:
    """This rank's shard of a parameter, or of its average or moment, in the same memory."""
    x, dim = x.detach(), split_dim(name)
    if x.ndim == 0:  # a count of steps
        return Shard(x, (), (), cluster.main)
    shape, start = list(x.shape), [0] * x.ndim
    first_replica = cluster.dp_cp.rank < cluster.shard.size
    if cluster.shard.size > 1:
        # FSDP2 divides along the first axis as `chunk` does; the last ranks may get no part of a small tensor
        start[0] = min(cluster.shard.rank * -(-shape[0] // cluster.shard.size), shape[0])
    if dim is not None:
        start[dim] += cluster.tp.rank * shape[dim]
        shape[dim] *= cluster.tp.size
    writes = first_replica and (dim is not None or cluster.tp.rank == 0)
    return Shard(local(x, cluster), tuple(shape), tuple(start), writes)


def sharded_as(p: Tensor, own: Tensor, cluster: Cluster) -> Tensor:
    """A moment of a parameter from this rank's part `own`, sharded as the parameter is."""
    own = own.to(p.device)
    if cluster.shard.size == 1 or own.ndim == 0:
        return own
    from torch.distributed.tensor import DTensor  # slow to import

    assert isinstance(p, DTensor)
    return DTensor.from_local(own, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def whole_state(state: State | None, cluster: Cluster) -> State | None:
    """Gather the carried states of all rows of the global batch; all must call this."""
    if state is None or cluster.world_size == 1:
        return state
    state = state.settled().reserve(max(state.windows))  # as many slots on every rank
    memories = [of_heads(m, lambda x, dim: gathered(x, cluster.tp, dim)) for m in state.memories]
    return State(memories, state.position).map(lambda x: gathered(x, cluster.dp, 0))


def part_of_state(state: State | None, cluster: Cluster) -> State | None:
    """Take the rows and heads that this rank carries: the inverse of `whole_state`."""
    if state is None or cluster.world_size == 1:
        return state
    dp, tp = cluster.dp, cluster.tp
    memories = [of_heads(m, lambda x, dim: x.chunk(tp.size, dim)[tp.rank]) for m in state.settled().memories]
    return State(memories, state.position).map(lambda x: x.chunk(dp.size)[dp.rank])


def of_heads(memory: Any, f: Callable[[Tensor, int], Tensor]) -> Memory:
    """The memory with f applied to all tensors that have heads, and to the dimension that these are."""
    if memory.kind == "retention":
        return RetentionMemory(f(memory.tensor(), 1))
    if memory.kind == "convolution":  # on every rank the same
        return memory
    return memory.filled(tuple(f(x, 2) for x in memory.layer))


def gathered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Gather the equal parts of the ranks of an axis, joined along a dimension."""
    if axis.group is None:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, dim)


def begin(path: Path, shards: Mapping[str, Shard], metadata: Mapping[str, str]) -> None:
    """Create the file with its header, at its final length.

    Raises:
        OSError: the file cannot be created.
    """
    head, places = _layout(shards, metadata)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(max([len(head), *(start + length for start, length in places.values())]))


def write(path: Path, shards: Mapping[str, Shard], metadata: Mapping[str, str]) -> None:
    """Write this rank's part of a file that `begin` made with the same arguments, and flush it to disk.

    Raises:
        OSError: the disk is full.
    """
    _, places = _layout(shards, metadata)
    with path.open("r+b", buffering=0) as file:
        for name, shard in shards.items():
            for at, piece in _runs(shard) if shard.writes and shard.own.numel() else ():
                data = piece.cpu().contiguous().flatten().view(torch.uint8).numpy().data
                file.seek(places[name][0] + at * piece.element_size())
                while data:  # a call writes 2 GB at most
                    data = data[file.write(data) :]
        os.fsync(file.fileno())


def seal(path: Path) -> None:
    """Write the checksum of a complete weights file over UNSEALED in its header."""
    found, about = load_tensors(path)
    if about.get("crc32") != UNSEALED["crc32"]:
        return
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        head = file.read(length)
        file.seek(8 + head.index(b'"crc32":"') + len(b'"crc32":"'))
        file.write(checksum(found).encode())
        file.flush()
        os.fsync(file.fileno())


def read(file: Any, name: str, like: Shard) -> Tensor:
    """Read the box `like` of a tensor from a file opened by `safe_open`; a scalar is read whole.

    Raises:
        SafetensorError, ValueError: the tensor is missing or has another shape.
    """
    x = file.get_slice(name)
    if not (shape := tuple(x.get_shape())):
        return file.get_tensor(name).clone()
    if shape != like.shape:
        raise ValueError(f"{name} is {list(shape)}, expected {list(like.shape)}")
    if not like.own.numel():
        return torch.empty_like(like.own, device="cpu")
    box = tuple(slice(start, start + n) for start, n in zip(like.start, like.own.shape, strict=True))
    return x[box].clone()  # a view would keep the whole mapped file in memory


def _layout(shards: Mapping[str, Shard], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Lay a file out as safetensors does: (bytes before the numbers, (offset, bytes) of each tensor in the file).

    Tensors with wider numbers come first, then by name. The header is padded to a multiple of 8 bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    end, spans = 0, {}
    for name in sorted(shards, key=lambda name: (-shards[name].own.element_size(), name)):
        dtype, length = shards[name].own.dtype, math.prod(shards[name].shape) * shards[name].own.element_size()
        spans[name] = (end, length)
        header[name] = {"dtype": DTYPES[dtype], "shape": shards[name].shape, "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: (len(head) + start, length) for name, (start, length) in spans.items()}


def _runs(shard: Shard) -> Iterator[tuple[int, Tensor]]:
    """Yield (offset in the whole tensor, piece) for each contiguous piece of a box; offsets count numbers.

    A box with whole rows is one piece. Otherwise, as in a matrix divided by columns, each row is a piece.
    """
    own, shape, start = shard.own, shard.shape, shard.start
    if own.shape[1:] == shape[1:]:
        yield (start[0] * math.prod(shape[1:]) if shape else 0), own
        return
    rest = math.prod(shape[2:])
    for row, piece in enumerate(own, start[0]):
        yield (row * shape[1] + start[1]) * rest, piece
