"""Adapters: models of which a low-rank change alone is trained and saved; merged into the model that they change.

with_adapter(model, adapter)           the model to train: LoRA in place of the targets, all else frozen
merged(tensors, changes, adapter)      the weights of a plain model, which runs as fast as any
"""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from retentive.layers.lora import Adapter, LoRA, LoRAEmbedding, LoRALinear

Model = TypeVar("Model", bound=nn.Module)


def matrices(model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """The layers of a model that a change is known for, by name: linear ones, and the embedding.

    An output matrix that is the embedding is changed with it, and has no name of its own.
    """
    tied = embedding_is_head(model)
    return {
        name: m
        for name, m in model.named_modules()
        if (isinstance(m, nn.Linear) and not (tied and name == "head"))
        or (isinstance(m, nn.Embedding) and name == "embed")
    }


def embedding_is_head(model: nn.Module) -> bool:
    """Whether the output matrix of a model of ours is its embedding."""
    layers = dict(model.named_children())
    embed, head = layers.get("embed"), layers.get("head")
    return isinstance(embed, nn.Embedding) and isinstance(head, nn.Linear) and head.weight is embed.weight


def targets_of(model: nn.Module, names: str, rank: int) -> tuple[str, ...]:
    """The layers that an adapter of such a rank changes: those named, or "all" that are larger than it.

    Raises:
        ValueError: there is no such layer.
    """
    layers = matrices(model)
    large = {name.rpartition(".")[2] for name, layer in layers.items() if min(layer.weight.shape) > rank}
    chosen = sorted(large) if names == "all" else [name.strip() for name in names.split(",")]
    known = sorted({name.rpartition(".")[2] for name in layers})
    if not set(chosen) <= set(known):
        raise ValueError(f"an adapter's targets must be all or among {', '.join(known)}, got {names}")
    if not chosen or not set(chosen) <= large:
        raise ValueError(f"a change of rank {rank} is as large as what it changes ({names}): take a smaller rank")
    return tuple(chosen)


def with_adapter(model: Model, adapter: Adapter) -> Model:
    """`model`, changed in place: its targets have low-rank changes, which alone are trained."""
    model.requires_grad_(False)
    tied, head = embedding_is_head(model), model.get_submodule("head")
    for name, layer in matrices(model).items():
        parent, _, own = name.rpartition(".")
        if own in adapter.targets:
            made = LoRALinear(layer, adapter) if isinstance(layer, nn.Linear) else LoRAEmbedding(layer, adapter)
            setattr(model.get_submodule(parent), own, made)
            if own == "embed" and tied and isinstance(head, nn.Linear):  # one matrix of two names, and one change
                of_head = LoRALinear(head, adapter)
                of_head.lora_a, of_head.lora_b = made.lora_a, made.lora_b
                model.register_module("head", of_head)
    return model


def adapter_of(model: nn.Module) -> Adapter | None:
    """What is trained of the model; None where that is all of it."""
    return next((m.adapter for m in model.modules() if isinstance(m, LoRA)), None)


def merged(tensors: Mapping[str, Tensor], changes: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The weights of the model with the changes in them, in its own dtypes.

    Raises:
        ValueError: changes that do not fit the weights.
    """
    out = dict(tensors)
    for name in sorted({name.rpartition(".")[0] for name in changes}):
        a, b, weight = (
            found.get(f"{name}.{own}") for found, own in ((changes, "lora_a"), (changes, "lora_b"), (out, "weight"))
        )
        if a is None or b is None or weight is None or (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise ValueError(f"the adapter is of another model: {name} does not fit")
        out[f"{name}.weight"] = (weight.float() + adapter.scale * b.float() @ a.float()).to(weight.dtype)
    return out
