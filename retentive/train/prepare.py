"""Prepare a model for training: its precision, its blocks, its part on this rank, its optimiser.

All of it is applied from outside, in place: models and layers know nothing of autocast, compilation, recomputation or
ranks.
"""

from dataclasses import replace
from functools import partial

from torch.utils.checkpoint import checkpoint

from retentive.checkpoint.adapter import adapter_of
from retentive.checkpoint.quantize import quantization_of
from retentive.machine import pick_device
from retentive.models import LanguageModel
from retentive.train.config import TrainConfig
from retentive.train.objective import Objective
from retentive.train.parallel import ALONE, Cluster, parallel_objective, parallelize
from retentive.train.speed import agreed_precision
from retentive.train.step import Batches, Training


def prepare(
    model: LanguageModel, batches: Batches, objective: Objective, config: TrainConfig, cluster: Cluster = ALONE
) -> Training:
    """Prepare the model and return it as a Training; all ranks must call this.

    Raises:
        ValueError: options, model and mesh do not fit each other.
    """
    device = cluster.device or pick_device(config.device)
    with cluster.barrier():
        check_options(config, cluster)
        if quantization_of(model) and not adapter_of(model):
            raise ValueError(
                "the model is quantised, and integers cannot be trained: train an adapter (`lora`), or the model that "
                "it was quantised from"
            )
        model = parallelize(model, device, cluster).train()
        wrap_blocks(model, config)
    precision = agreed_precision(config.precision, device, cluster)
    config = replace(config, precision=precision, lr=config.lr or 1 / model.config.dim)
    return Training(model, batches, parallel_objective(model, objective, cluster), config, cluster)


def check_options(config: TrainConfig, cluster: Cluster) -> None:
    """Raise ValueError for options that do not fit the way in which ranks divide the model."""
    if config.compile and cluster.cp.size * cluster.tp.size > 1:
        raise ValueError("`compile` cannot look into what ranks exchange in a block: leave it or `cp`, `tp` out")
    if config.optimizer == "muon" and cluster.tp.size > 1:
        raise ValueError("`optimizer='muon'` needs whole matrices, and `tp` divides them: leave either out")
    if config.qat != "none" and cluster.shard.size * cluster.tp.size > 1:
        raise ValueError("`qat` rounds whole matrices, and `dp_shard` and `tp` divide them: use `dp_replicate` alone")


def wrap_blocks(model: LanguageModel, config: TrainConfig) -> None:
    """Compile the blocks, or recompute them in the backward pass (activation checkpointing), as the config says.

    Raises:
        ValueError: the blocks are another library's.
    """
    if not len(model.blocks) and (config.compile or config.checkpoint_activations):
        raise ValueError("the blocks are another library's here: leave out `compile` and `checkpoint_activations`")
    for block in model.blocks:
        if config.compile:
            block.compile()  # in place, so that parameter names and checkpoints stay the same
        if config.checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
