"""Safetensors files of tensors that processes hold in parts: each writes what it has where it belongs, and reads that.

    header's length in 8 bytes | header in JSON: every tensor's dtype, shape, place | numbers, tensor after tensor

(https://github.com/huggingface/safetensors#format). All processes can tell where a tensor lies, since that depends on
names and shapes alone. So nobody gathers anything, and the file is, byte for byte, that of a single process.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Their names in a header."""


class Shard(NamedTuple):
    """What this process has of a tensor: a box of it."""

    own: Tensor
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: tuple[int, ...]
    """Where `own` begins in it, axis by axis."""
    writes: bool = True
    """Whether this process writes it: of several that have the same box one does."""

    def copied(self) -> "Shard":
        """The same in other memory, that of the CPU, for who writes it: training goes on in this one."""
        own = self.own.to("cpu", copy=True) if self.writes else torch.empty(0, dtype=self.own.dtype)
        return self._replace(own=own)


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
    """Writes this process's part of a file that `begin` has made with the same arguments, and has it on the disk.

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
