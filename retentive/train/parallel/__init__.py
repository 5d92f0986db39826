"""Parallel training by several processes (ranks): functions that take a model and return it parallel.

    mesh, cluster          the ranks along four axes; their agreement and their errors
    rendezvous, launch     join the ranks; start them on one machine
    data, tensor, context  the three kinds of parallelism
    checkpoint             files that each rank writes its part of

Models and layers know nothing of ranks: all changes are made from outside. Losses and gradients equal those of one
process, on every mesh.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from retentive.checkpoint.adapter import adapter_of
from retentive.models import LanguageModel
from retentive.models.encoders import encoders_of
from retentive.train.objective import Objective
from retentive.train.parallel.cluster import ALONE, Cluster, RankFailed
from retentive.train.parallel.context import context_parallel, on_part, whole_sequences
from retentive.train.parallel.data import clip_gradients, replicated, shard_parameters
from retentive.train.parallel.mesh import Parallel
from retentive.train.parallel.tensor import tensor_parallel

__all__ = [
    "ALONE",
    "Cluster",
    "Parallel",
    "RankFailed",
    "checksum",
    "clip_gradients",
    "parallel_objective",
    "parallelize",
    "reading",
]


def parallelize(model: LanguageModel, device: torch.device, cluster: Cluster) -> LanguageModel:
    """Divide the model in place for this rank: its heads (tp), its parameters (dp_shard), on its device.

    Replicas (dp_replicate) are handled by `parallel_objective`, which averages their gradients.

    Raises:
        ValueError: the model cannot be divided on this mesh.
    """
    check_divisible(model, cluster)
    if cluster.tp.size > 1:
        model = tensor_parallel(model, cluster.tp)
    if cluster.cp.size > 1:
        model = context_parallel(model, cluster.cp)
    return shard_parameters(model, device, cluster) if cluster.shard.size > 1 else model.to(device)


def parallel_objective(model: LanguageModel, objective: Objective, cluster: Cluster) -> Objective:
    """The objective on this rank's part of a batch, with gradients averaged over the ranks; all must call this."""
    if cluster.cp.size > 1:
        objective = on_part(model, objective)
    if cluster.dp_cp.size == 1 or cluster.shard.size > 1:  # FSDP2 averages them itself
        return objective
    return replicated(model, objective, cluster)


@contextmanager
def reading(model: LanguageModel, cluster: Cluster) -> Iterator[None]:
    """Let all ranks that divide a model call it in this block, without gradients, on the same whole sequences.

    They use the divided model itself; no whole copy of it is made.
    """
    try:
        with whole_sequences(model) if cluster.cp.size > 1 else nullcontext():
            yield
    finally:
        if cluster.shard.size > 1:
            model.reshard()  # the outermost weights stay gathered after a forward pass


def check_divisible(model: LanguageModel, cluster: Cluster) -> None:
    """Raise ValueError for a model that cannot be trained on this mesh."""
    if not cluster.sharded:
        return
    if model.config.library:
        raise ValueError(f"the blocks of {model.config.kind} are another library's: train it with `dp_replicate` alone")
    if adapter_of(model):
        raise ValueError("`lora` trains too little to divide: use `dp_replicate` alone")
    if encoders_of(model):
        raise ValueError("a model with encoders of pictures or sound is trained with `dp_replicate` alone")


def checksum(model: nn.Module) -> int:
    """CRC-32 of a model's weights: before ranks divide a model, its weights must be the same on all of them."""
    found = 0
    for p in model.parameters():
        found = zlib.crc32(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, found)
    return found
