"""Distillation: objectives with which a student learns from a teacher, of the same tokens.

    predictions   Kullback-Leibler divergence of the student's next tokens from the teacher's (arXiv 1503.02531)
    mixers        squared error of the outputs of each layer's mixers, in the teacher's own hidden states: all layers at
                  once, each by itself

A layer is the blocks up to a feed-forward layer: one for most models, two where a window is followed by retention.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from retentive.layers.quantized import matrix
from retentive.models import LanguageModel
from retentive.models.model import Block
from retentive.ops.distillation import kl_divergence
from retentive.train.objective import Objective
from retentive.train.parallel import Cluster

Learns = Literal["predictions", "mixers"]


def distillation(teacher: LanguageModel, learns: Learns) -> Objective:
    """The objective that compares a model with its teacher.

    Raises:
        ValueError: an unknown name.
    """
    if learns not in get_args(Learns):
        raise ValueError(f"`learns` is {learns!r}, expected one of {', '.join(get_args(Learns))}")
    teacher.requires_grad_(False).eval()

    def predictions(model: Any, batch: Any, state: Any) -> tuple[Tensor, int, Any]:
        """Summed divergence in nats, and the number of tokens."""
        with torch.no_grad():
            y, _ = teacher.hidden(batch.ids, cu_seqlens=batch.cu_seqlens)
        x, _ = model.hidden(batch.ids, cu_seqlens=batch.cu_seqlens)
        return kl_divergence(x, matrix(model.head), y, matrix(teacher.head)), batch.ids.numel(), None

    def mixers(model: Any, batch: Any, state: Any) -> tuple[Tensor, int, Any]:
        """Summed relative error of the tokens, the mean over the layers, and the number of tokens."""
        errors = [relative_error(have, want).sum() for have, want in compared(model, teacher, batch)]
        return torch.stack(errors).mean(), batch.ids.numel(), None

    return predictions if learns == "predictions" else mixers


def check_whole(cluster: Cluster, learns: Learns) -> None:
    """Raise ValueError if the mesh divides the rows, or the layers, that student and teacher compare."""
    if cluster.cp.size > 1 or (learns == "mixers" and cluster.sharded):
        divided = "rows" if cluster.cp.size > 1 else "layers"
        raise ValueError(f"`teacher` compares whole {divided}, which this mesh divides: use `dp_replicate` alone")


def relative_error(have: Tensor, want: Tensor) -> Tensor:
    """Squared error of each token, relative to the square of `want`: `[B,T]`, float32 or float64."""
    dtype = torch.promote_types(want.dtype, torch.float32)
    have, want = have.to(dtype), want.to(dtype)
    return (have - want).square().sum(-1) / want.square().sum(-1).clamp(min=torch.finfo(dtype).tiny)


def compared(model: Any, teacher: LanguageModel, batch: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs of each layer's mixers for the teacher's hidden states, as (student's, teacher's) `[B,T,D]`.

    Raises:
        ValueError: student and teacher have another number of layers.
    """
    students = layers(model.blocks)
    if len(students) != len(teacher.blocks):
        raise ValueError(f"the model has {len(students)} layers, its teacher {len(teacher.blocks)}: compare equal ones")
    with torch.no_grad():
        x, positions = teacher.begin(batch.ids, cu_seqlens=batch.cu_seqlens)
    for student, block in zip(students, teacher.blocks, strict=True):
        with torch.no_grad():
            after = x + mixed(block, x, positions)
        z = x
        for each in student:
            z = z + mixed(each, z, positions)
        yield z - x, after - x
        with torch.no_grad():
            x = after + block.ffn(block.ffn_norm(after))


def mixed(block: Any, x: Tensor, positions: Any) -> Tensor:
    """Output of a block's mixer for x, from an empty memory."""
    return block.mixer(block.mixer_norm(x), None, positions, block.phases(positions, x.dtype))[0]


def layers(blocks: Sequence[Block] | nn.ModuleList) -> list[list[Any]]:
    """Blocks by layer: each ends with the block that has a feed-forward layer."""
    found: list[list[Any]] = [[]]
    for block in blocks:
        found[-1].append(block)
        if block.ffn is not None:
            found.append([])
    return found if found[-1] else found[:-1]
