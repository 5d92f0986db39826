"""Data parallelism: replicas whose gradients are averaged (DDP), or shards of one set of weights (FSDP2).

The loss is the sum of all ranks' losses over the number of all targets, so the gradient equals that of one process.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from retentive.models import LanguageModel
from retentive.models.encoders import encoders_of
from retentive.train.objective import Objective
from retentive.train.parallel.cluster import Cluster
from retentive.train.parallel.tensor import split_dim


def shard_parameters(model: LanguageModel, device: torch.device, cluster: Cluster) -> LanguageModel:
    """Shard every parameter of the model (FSDP2) and move it to the device; blocks are gathered when used."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method  # slow to import

    # Gradients are reduced in float32 at every precision: the default differs between versions of torch. Parameters
    # are gathered in float32 too, and inputs are not cast. So autocast rounds what it would round in one process, and
    # decays, which are inputs of the blocks, keep their precision.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    wide = next(model.parameters()).dtype == torch.float64
    mesh = cluster.device_mesh(device.type)
    how: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy() if wide else policy}
    for block in model.blocks:  # one by one, so that a device never holds more than one whole block
        fully_shard(block.to(device), **how)
    fully_shard(model.to(device), **how)
    register_fsdp_forward_method(model, "hidden")  # the method that objectives call
    return model


class _Step(nn.Module):
    """An objective of a model as a module, for DistributedDataParallel."""

    def __init__(self, model: LanguageModel, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any, state: Any) -> tuple[Tensor, int, Any]:
        return self.objective(self.model, batch, state)


def replicated(model: LanguageModel, objective: Objective, cluster: Cluster) -> Objective:
    """Objective whose backward pass averages gradients over the ranks that read different tokens (DDP).

    All ranks must call this: replicas begin with the weights of rank 0.
    """
    replica = DistributedDataParallel(
        _Step(model, objective),
        process_group=cluster.dp_cp.group,
        # a batch without pictures does not use the encoder of pictures
        find_unused_parameters=bool(encoders_of(model)),
    )
    return lambda model, batch, state: replica(batch, state)


def clip_gradients(model: nn.Module, most: float, cluster: Cluster) -> float:
    """Clip the whole gradient to a norm of at most `most`, and return its norm before.

    Uses `nn.utils.clip_grad_norm_` for one process. With several, each part of the gradient counts once.
    """
    if not cluster.sharded:
        return float(nn.utils.clip_grad_norm_(model.parameters(), most))
    gradients = [(name, local(p.grad, cluster)) for name, p in model.named_parameters() if p.grad is not None]
    squares = torch.zeros(2, dtype=torch.float64, device=cluster.device)  # of shared and of divided parameters
    for name, part in gradients:
        squares[int(cluster.tp.size > 1 and split_dim(name) is not None)] += part.double().square().sum()
    if cluster.shard.group is not None:
        dist.all_reduce(squares, group=cluster.shard.group)
    if cluster.tp.group is not None:
        dist.all_reduce(squares[1], group=cluster.tp.group)
    norm = float(squares.sum().sqrt())
    if (scale := most / (norm + 1e-6)) < 1:
        for _, part in gradients:
            part.mul_(scale)
    return norm


def local(x: Any, cluster: Cluster) -> Tensor:
    """This rank's part of a parameter, average or moment, in the same memory."""
    return x.to_local() if cluster.shard.group is not None and x.ndim else x
