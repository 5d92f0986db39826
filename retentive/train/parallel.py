"""Training by several processes: how they are laid out, and functions that take a model and return it parallel.

Processes form one mesh of (dp_replicate, dp_shard, cp, tp), the last index fastest, so that those that talk most are
neighbours:

    dp_replicate   each has the weights and reads other rows; gradients are summed (DistributedDataParallel)
    dp_shard       each has a part of weights, gradients and moments and reads other rows (FSDP2, `fully_shard`)
    cp             each has a part of every sequence, and hands on states (`context`)
    tp             each has some heads and columns, of the same tokens (`heads`)

Models and layers know nothing of it: all is done to them from outside. The sum of the processes' losses over the number
of all targets is the loss, and its gradient that of one process, whatever the mesh.
"""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from retentive.checkpoint.adapter import adapter_of
from retentive.models import LanguageModel, RetentionMemory
from retentive.models.encoders import encoders_of
from retentive.models.state import State
from retentive.options import check_type
from retentive.train.context import on_piece, split_sequences, undivided_sequences
from retentive.train.heads import split_dim, split_heads
from retentive.train.objective import Objective
from retentive.train.processes import Processes
from retentive.train.shards import Shard


@dataclass(frozen=True)
class Parallel:
    """How many processes there are along each axis of the mesh; their product is the number of processes."""

    dp_replicate: int = -1
    """Replicas that read different rows and have all weights each; -1: as many as the other axes leave."""
    dp_shard: int = 1
    """Processes that read different rows and share weights, gradients and moments between them (FSDP); -1: the rest."""
    cp: int = 1
    """Processes that each read a part of every sequence and hand on states of retention; -1: the rest."""
    tp: int = 1
    """Processes that each have some of the heads and feed-forward columns; -1: the rest."""
    patience: int = 1800
    """Seconds that a process waits for the others, also while the first one evaluates and writes."""

    def __post_init__(self):
        for f in fields(self):
            check_type(f.name, getattr(self, f.name), int)
        for f in fields(self):
            least = (1,) if f.name == "patience" else (1, -1)
            if getattr(self, f.name) < 1 and getattr(self, f.name) not in least:
                what = "at least 1" + ("" if f.name == "patience" else ", or -1 for the rest of the processes")
                raise ValueError(f"{f.name} must be {what}, got {getattr(self, f.name)}")

    def sizes(self, world: int) -> tuple[int, int, int, int]:
        """(dp_replicate, dp_shard, cp, tp) for `world` processes.

        Raises:
            ValueError: they do not make so many.
        """
        asked = {name: getattr(self, name) for name in ("dp_replicate", "dp_shard", "cp", "tp")}
        explicit = [name for name, n in asked.items() if n == -1 and name != "dp_replicate"]
        if len(explicit) > 1:
            raise ValueError(f"{' and '.join(explicit)} are both -1: only one axis can take the rest of the processes")
        if explicit and asked["dp_replicate"] == -1:  # its default gives way to what was asked for
            asked["dp_replicate"] = 1
        given = math.prod(n for n in asked.values() if n != -1)
        rest = world // given
        if given * (rest if -1 in asked.values() else 1) != world:
            axes = " x ".join(f"{name} {n}" for name, n in asked.items() if n != -1)
            few = "is 1 process" if world == 1 else f"are {world} processes"
            raise ValueError(
                f"{axes} take {'a multiple of ' if -1 in asked.values() else ''}{given} processes, there {few}: "
                f"start others (--nproc N, or torchrun --nproc-per-node N) or change the mesh"
            )
        replicate, shard, cp, tp = (rest if n == -1 else n for n in asked.values())
        return replicate, shard, cp, tp


def parallelize(model: LanguageModel, device: torch.device, here: Processes) -> LanguageModel:
    """The model as this process trains it, changed in place: its heads (tp), its shards (dp_shard), on its device.

    Replicas are none of its business: `objective_of` sums their gradients.

    Raises:
        ValueError: a model that cannot be divided so.
    """
    check_divisible(model, here)
    if here.tp_group is not None:
        split_heads(model, here.tp_group, here.tp_rank, here.tp)
    if here.cp_group is not None:
        split_sequences(model, here.cp_group, here.cp_rank)
    if here.shard_mesh is None:
        return model.to(device)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method  # slow to import

    # Reduced in float32 whatever the precision: the default of this argument differs between versions of torch.
    # Parameters are gathered in float32 as well, and inputs left alone: autocast rounds what one process would round,
    # and decays, which are inputs of the blocks, stay as they are.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    wide = next(model.parameters()).dtype == torch.float64
    how: dict[str, Any] = {"mesh": here.shard_mesh, "mp_policy": MixedPrecisionPolicy() if wide else policy}
    for block in model.blocks:  # one by one: a device never holds more than one whole block
        fully_shard(block.to(device), **how)
    fully_shard(model.to(device), **how)
    register_fsdp_forward_method(model, "hidden")  # which is what objectives call
    return model


def checksum(model: nn.Module) -> int:
    """A number that tells models apart by their weights: those that processes divide must be the same everywhere."""
    found = 0
    for p in model.parameters():
        found = zlib.crc32(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, found)
    return found


def check_divisible(model: LanguageModel, here: Processes) -> None:
    """Raises ValueError for a model that cannot be trained on this mesh."""
    if here.divided and model.config.library:
        raise ValueError(f"the blocks of {model.config.kind} are another library's: train it with --dp-replicate alone")
    if here.divided and adapter_of(model):
        raise ValueError("--lora trains too little to divide: use --dp-replicate alone")
    if here.divided and encoders_of(model):
        raise ValueError("a model with encoders of pictures or sound is trained with --dp-replicate alone")


class _Step(nn.Module):
    """An objective of a model as a module, whose forward pass DistributedDataParallel can follow."""

    def __init__(self, model: LanguageModel, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any, state: Any) -> tuple[Tensor, int, Any]:
        return self.objective(self.model, batch, state)


def objective_of(model: LanguageModel, objective: Objective, here: Processes) -> Objective:
    """The objective on this process's share of the batch; its backward pass averages gradients over the replicas.

    All processes must call this: replicas begin with the weights of the first.
    """
    if here.cp > 1:
        objective = on_piece(objective, here.cp_rank, here.cp)
    if here.shares == 1 or here.shard_mesh is not None:
        return objective
    replica = DistributedDataParallel(
        _Step(model, objective),
        process_group=here.share_group,
        # a batch without pictures does not use the encoder of pictures
        find_unused_parameters=bool(encoders_of(model)),
    )
    return lambda model, batch, state: replica(batch, state)


def clip_gradients(model: nn.Module, most: float, here: Processes) -> float:
    """The norm of the whole gradient, which is scaled down to `most` where it is longer.

    `nn.utils.clip_grad_norm_` for one process; here each part of the gradient counts once, wherever it lies.
    """
    if not here.divided:
        return float(nn.utils.clip_grad_norm_(model.parameters(), most))
    gradients = [(name, local(p.grad, here)) for name, p in model.named_parameters() if p.grad is not None]
    squares = torch.zeros(2, dtype=torch.float64, device=here.device)  # of what all have, and of what tp divides
    for name, part in gradients:
        squares[int(here.tp > 1 and split_dim(name) is not None)] += part.double().square().sum()
    if here.shard_group is not None:
        dist.all_reduce(squares, group=here.shard_group)
    if here.tp_group is not None:
        dist.all_reduce(squares[1], group=here.tp_group)
    norm = float(squares.sum().sqrt())
    if (scale := most / (norm + 1e-6)) < 1:
        for _, part in gradients:
            part.mul_(scale)
    return norm


def local(x: Any, here: Processes) -> Tensor:
    """This process's part of a parameter, or of what belongs to one, in the same memory."""
    return x.to_local() if here.shard_mesh is not None and x.ndim else x


def shard_of(name: str, x: Any, here: Processes) -> Shard:
    """What this process has of a parameter, or of what belongs to one (a mean, a moment), in the same memory."""
    x, axis = x.detach(), split_dim(name)
    if x.ndim == 0:  # a count of steps
        return Shard(x, (), (), here.main)
    shape, start = list(x.shape), [0] * x.ndim
    writes = here.share == 0 and (axis is not None or here.tp_rank == 0)
    if here.shard_mesh is not None:
        # FSDP2 divides along the first axis as `chunk` does; the last processes may get nothing of a small tensor
        start[0] = min(here.shard_rank * -(-shape[0] // here.shard_group_size), shape[0])
        writes = here.share < here.shard_group_size and (axis is not None or here.tp_rank == 0)
    if axis is not None:
        start[axis] += here.tp_rank * shape[axis]
        shape[axis] *= here.tp
    return Shard(local(x, here), tuple(shape), tuple(start), writes)


def divided_as(p: Tensor, own: Tensor, here: Processes) -> Tensor:
    """What belongs to a parameter (a moment), made of this process's part of it: divided as the parameter is."""
    own = own.to(p.device)
    if here.shard_mesh is None or own.ndim == 0:
        return own
    from torch.distributed.tensor import DTensor  # slow to import

    assert isinstance(p, DTensor)
    return DTensor.from_local(own, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def whole_state(state: State | None, here: Processes) -> State | None:
    """The states of all rows of the global batch, of which this process carries its own; all must call this.

    Heads are the second axis of each layer's states `[N,H,K,V]`.
    """
    if state is None or here.world == 1:
        return state
    *states, position = state.settled().tensors()
    whole = [RetentionMemory(gathered(gathered(x, here.tp_group, 1), here.dp_group, 0)) for x in states]
    return State(whole, gathered(position, here.dp_group, 0))


def part_of_state(state: State | None, here: Processes) -> State | None:
    """The inverse of `whole_state`: the rows and heads that this process carries."""
    if state is None or here.world == 1:
        return state
    *states, position = state.settled().tensors()
    own = [RetentionMemory(x.chunk(here.dp)[here.dp_rank].chunk(here.tp, 1)[here.tp_rank]) for x in states]
    return State(own, position.chunk(here.dp)[here.dp_rank])


def gathered(x: Tensor, group: dist.ProcessGroup | None, axis: int) -> Tensor:
    """The equal parts that the processes of a group have, joined along an axis; x itself without a group."""
    if group is None:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, axis)


@contextmanager
def reading(model: LanguageModel, here: Processes) -> Iterator[None]:
    """Where all processes that divide a model call it on the same tokens, whole sequences, without gradients.

    It is the very model that is trained, in parts: no whole copy of it is made.
    """
    try:
        with undivided_sequences(model) if here.cp > 1 else nullcontext():
            yield
    finally:
        if here.shard_mesh is not None:
            model.reshard()  # the outermost weights stay gathered after a forward pass
