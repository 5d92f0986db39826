"""The device mesh of a run: its ranks along the axes (dp_replicate, dp_shard, cp, tp), the last one varying fastest.

    dp_replicate   data parallel: each rank has all weights and its own rows (DistributedDataParallel, `data`)
    dp_shard       fully sharded data parallel: a part of weights, gradients, moments, its own rows (FSDP2, `data`)
    cp             context parallel: a part of the tokens of every sequence (`context`)
    tp             tensor parallel: some heads and feed-forward columns, of the same tokens (`tensor`)

Ranks that exchange the most data are neighbours.
"""

import datetime
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from retentive.options import check_type, option

AXES = ("dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Parallel:
    """Number of ranks along each axis of the mesh; their product is the number of processes."""

    dp_replicate: int = -1
    """Data parallelism: replicas that read different rows, each with all weights; -1: all ranks that others leave."""
    dp_shard: int = 1
    """Fully sharded data parallelism (FSDP): ranks that read different rows, each with a part of weights, gradients
    and moments; -1: the remaining ranks."""
    cp: int = 1
    """Context parallelism: ranks that each read a part of every sequence; -1: the remaining ranks."""
    tp: int = 1
    """Tensor parallelism: ranks that each have some heads and feed-forward columns; -1: the remaining ranks."""
    patience: int = 1800
    """Timeout: seconds that a rank waits for the others, including while rank 0 evaluates and writes."""

    def __post_init__(self):
        for f in fields(self):
            check_type(f.name, getattr(self, f.name), int)
        for f in fields(self):
            least = (1,) if f.name == "patience" else (1, -1)
            if getattr(self, f.name) < 1 and getattr(self, f.name) not in least:
                what = "at least 1" + ("" if f.name == "patience" else ", or -1 for the rest of the ranks")
                raise ValueError(f"{f.name} must be {what}, got {getattr(self, f.name)}")

    def sizes(self, world_size: int) -> tuple[int, int, int, int]:
        """(dp_replicate, dp_shard, cp, tp) for `world_size` processes.

        Raises:
            ValueError: the sizes do not multiply to `world_size`.
        """
        asked = {name: getattr(self, name) for name in AXES}
        explicit = [name for name, n in asked.items() if n == -1 and name != "dp_replicate"]
        if len(explicit) > 1:
            both = " and ".join(f"`{name}`" for name in explicit)
            raise ValueError(f"{both} are both -1: only one axis can take the rest of the processes")
        if explicit and asked["dp_replicate"] == -1:  # an explicit -1 of another axis overrides this default
            asked["dp_replicate"] = 1
        given = math.prod(n for n in asked.values() if n != -1)
        rest = world_size // given
        if given * (rest if -1 in asked.values() else 1) != world_size:
            axes = " x ".join(option(name, n) for name, n in asked.items() if n != -1)
            few = "is 1 process" if world_size == 1 else f"are {world_size} processes"
            raise ValueError(
                f"{axes} needs {'a multiple of ' if -1 in asked.values() else ''}{given} processes, there {few}: "
                f"start as many (`nproc={given}`, or torchrun), or change these axes"
            )
        replicate, shard, cp, tp = (rest if n == -1 else n for n in asked.values())
        return replicate, shard, cp, tp


class Axis(NamedTuple):
    """An axis of the mesh, or several combined into one, as a rank sees it."""

    size: int
    """Ranks along the axis."""
    rank: int
    """This rank's number along the axis."""
    group: dist.ProcessGroup | None
    """Process group of the axis; None if this rank is the only one."""


class Mesh:
    """The ranks of a run along the four axes, and combinations of axes with one process group each.

    Args:
        sizes: sizes of the axes, in the order of AXES.
        rank: rank of this process.
        timeout: how long a rank waits for the others.
    """

    def __init__(self, sizes: tuple[int, int, int, int], rank: int = 0, timeout: datetime.timedelta | None = None):
        self.rank, self.world_size, self.timeout = rank, math.prod(sizes), timeout
        self._ranks = torch.arange(self.world_size).view(sizes)
        # Every rank makes every process group, in the same order, as torch.distributed requires.
        self.tp = self._axis("tp")
        self.cp = self._axis("cp")
        self.dp = self._axis("dp_replicate", "dp_shard")
        """Ranks that read different rows."""
        self.dp_cp = self._axis("dp_replicate", "dp_shard", "cp")
        """Ranks that read different tokens; the loss is summed over them."""
        self.shard = self._axis("dp_shard", "cp") if sizes[1] > 1 else Axis(1, 0, None)
        """Ranks that weights, gradients and moments are divided over, those of cp included."""
        self.replicate = self._axis("dp_replicate") if sizes[1] > 1 else Axis(1, 0, None)
        self.sharded = sizes[1] * sizes[2] * sizes[3] > 1
        """True if no rank has a complete model that runs alone."""

    def _axis(self, *names: str) -> Axis:
        own = [AXES.index(name) for name in names]
        others = [n for n in range(len(AXES)) if n not in own]
        lines = self._ranks.permute(*others, *own).flatten(len(others)).flatten(0, -2)
        (place,) = (lines == self.rank).nonzero().tolist()
        size = lines.shape[1]
        group = dist.new_subgroups_by_enumeration(lines.tolist(), self.timeout)[0] if size > 1 else None
        return Axis(size, place[1], group)

    def device_mesh(self, device_type: str) -> DeviceMesh | None:
        """Mesh for `fully_shard`: (replicate, shard), or (shard,); None without `dp_shard`."""
        if self.shard.group is None:
            return None
        if self.replicate.group is None:
            return DeviceMesh.from_group(self.shard.group, device_type, mesh_dim_names=("shard",))
        ranks = self._ranks[..., self.tp.rank].flatten(1)  # parameters are divided over cp as well
        names = ("replicate", "shard")
        return DeviceMesh.from_group([self.replicate.group, self.shard.group], device_type, ranks, mesh_dim_names=names)

    def described(self) -> str:
        """Text of the axes with more than one rank, such as "dp_shard 2, tp 2"."""
        return ", ".join(f"{name} {n}" for name, n in zip(AXES, self._ranks.shape, strict=True) if n > 1)
