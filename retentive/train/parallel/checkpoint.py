"""Sharded checkpoints: safetensors files to which each rank writes the parts of tensors that it has, and reads those.

    header's length in 8 bytes | header in JSON: every tensor's dtype, shape, place | numbers, tensor after tensor

(https://github.com/huggingface/safetensors#format). All ranks can tell where a tensor lies, since that depends on
names and shapes alone. So nothing is gathered, and the file is, byte for byte, that of a single process.
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
"""Their names in a header."""
UNSEALED = {"crc32": "00000000"}
"""Metadata of a file of weights until `seal` has written its checksum."""


class Shard(NamedTuple):
    """What this rank has of a tensor: a box of it."""

    own: Tensor
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: tuple[int, ...]
    """Where `own` begins in it, axis by axis."""
    writes: bool = True
    """True if this rank writes it: of several that have the same box one does."""

    def copied(self) -> "Shard":
        """The same in other memory, that of the CPU, for who writes it: training goes on in this one."""
        own = self.own.to("cpu", copy=True) if self.writes else torch.empty(0, dtype=self.own.dtype)
        return self._replace(own=own)


def shard_of(name: str, x: Any, cluster: Cluster) -> Shard:
    """What this rank has of a parameter, or of what belongs to one (a mean, a moment), in the same memory."""
    x, dim = x.detach(), split_dim(name)
    if x.ndim == 0:  # a count of steps
        return Shard(x, (), (), cluster.main)
    shape, start = list(x.shape), [0] * x.ndim
    first_replica = cluster.dp_cp.rank < cluster.shard.size
    if cluster.shard.size > 1:
        # FSDP2 divides along the first axis as `chunk` does; the last ranks may get nothing of a small tensor
        start[0] = min(cluster.shard.rank * -(-shape[0] // cluster.shard.size), shape[0])
    if dim is not None:
        start[dim] += cluster.tp.rank * shape[dim]
        shape[dim] *= cluster.tp.size
    writes = first_replica and (dim is not None or cluster.tp.rank == 0)
    return Shard(local(x, cluster), tuple(shape), tuple(start), writes)


def sharded_as(p: Tensor, own: Tensor, cluster: Cluster) -> Tensor:
    """What belongs to a parameter (a moment), made of this rank's part of it: divided as the parameter is."""
    own = own.to(p.device)
    if cluster.shard.size == 1 or own.ndim == 0:
        return own
    from torch.distributed.tensor import DTensor  # slow to import

    assert isinstance(p, DTensor)
    return DTensor.from_local(own, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def whole_state(state: State | None, cluster: Cluster) -> State | None:
    """The states of all rows of the global batch, of which this rank carries its own; all must call this."""
    if state is None or cluster.world_size == 1:
        return state
    state = state.settled().reserve(max(state.windows))  # as many slots on every rank
    memories = [of_heads(m, lambda x, dim: gathered(x, cluster.tp, dim)) for m in state.memories]
    return State(memories, state.position).map(lambda x: gathered(x, cluster.dp, 0))


def part_of_state(state: State | None, cluster: Cluster) -> State | None:
    """The inverse of `whole_state`: the rows and heads that this rank carries."""
    if state is None or cluster.world_size == 1:
        return state
    dp, tp = cluster.dp, cluster.tp
    memories = [of_heads(m, lambda x, dim: x.chunk(tp.size, dim)[tp.rank]) for m in state.settled().memories]
    return State(memories, state.position).map(lambda x: x.chunk(dp.size)[dp.rank])


def of_heads(memory: Any, f: Callable[[Tensor, int], Tensor]) -> Memory:
    """The memory with f applied to all tensors that have heads, and to the dimension that these are."""
    if memory.kind == "retention":
        return RetentionMemory(f(memory.tensor(), 1))
    return memory.filled(tuple(f(x, 2) for x in memory.layer))


def gathered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The equal parts that the ranks of an axis have, joined along a dimension."""
    if axis.group is None:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, dim)


def begin(path: Path, shards: Mapping[str, Shard], metadata: Mapping[str, str]) -> None:
    """Makes the file: its header, and the length that it will have.

    Raises:
        OSError: it cannot be made.
    """
    head, places = _layout(shards, metadata)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(max([len(head), *(start + length for start, length in places.values())]))


def write(path: Path, shards: Mapping[str, Shard], metadata: Mapping[str, str]) -> None:
    """Writes this rank's part of a file that `begin` has made with the same arguments, and has it on the disk.

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
    """Writes the checksum of a file of weights, whole by now, into the place that UNSEALED holds in its header."""
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
    """The box `like` of a tensor in a file that `safe_open` has opened; of a number, all of it.

    Raises:
        SafetensorError, ValueError: there is no such tensor, or one of another shape.
    """
    x = file.get_slice(name)
    if not (shape := tuple(x.get_shape())):
        return file.get_tensor(name).clone()
    if shape != like.shape:
        raise ValueError(f"{name} is {list(shape)}, expected {list(like.shape)}")
    if not like.own.numel():
        return torch.empty_like(like.own, device="cpu")
    box = tuple(slice(start, start + n) for start, n in zip(like.start, like.own.shape, strict=True))
    return x[box].clone()  # else it keeps all of the mapped file in memory


def _layout(shards: Mapping[str, Shard], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """(all before the numbers, where each tensor begins in the file and how many bytes it has), as safetensors does it.

    It puts those of wide numbers first, then goes by name, and fills the header to a multiple of 8 bytes.
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
    """(how many numbers of the whole tensor stand before it, piece) for the pieces of a box that lie in one there.

    All of a box that has whole rows; else, as of a matrix that is divided by columns, a piece a row.
    """
    own, shape, start = shard.own, shard.shape, shard.start
    if own.shape[1:] == shape[1:]:
        yield (start[0] * math.prod(shape[1:]) if shape else 0), own
        return
    rest = math.prod(shape[2:])
    for row, piece in enumerate(own, start[0]):
        yield (row * shape[1] + start[1]) * rest, piece
