"""Adapters (LoRA): only a low-rank change of a model is trained and saved, and can be merged into the model.

with_adapter(model, adapter)           the model to train: LoRA in place of its targets, everything else frozen
merged(tensors, changes, adapter)      the weights of a plain model, without overhead at run time
"""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from retentive.layers.lora import Adapter, LoRA, LoRAEmbedding, LoRALinear
from retentive.layers.quantized import QuantizedEmbedding, QuantizedLinear, shape

Model = TypeVar("Model", bound=nn.Module)
LINEAR, EMBEDDING = (nn.Linear, QuantizedLinear), (nn.Embedding, QuantizedEmbedding)


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that can be changed, by name: linear layers and the embedding.

    An output matrix tied to the embedding changes with it, and has no name of its own.
    """
    tied = embedding_is_head(model)
    return {
        name: m
        for name, m in model.named_modules()
        if (isinstance(m, LINEAR) and not (tied and name == "head")) or (isinstance(m, EMBEDDING) and name == "embed")
    }


def embedding_is_head(model: nn.Module) -> bool:
    """True if the output matrix of one of our models is its embedding."""
    layers = dict(model.named_children())
    embed, head = layers.get("embed"), layers.get("head")
    return isinstance(embed, EMBEDDING) and isinstance(head, LINEAR) and head.weight is embed.weight


def targets_of(model: nn.Module, names: str, rank: int) -> tuple[str, ...]:
    """Returns the layers that an adapter of this rank changes: those named, or for "all" those larger than the change.

    Raises:
        ValueError: a layer does not exist, or is not larger.
    """
    layers = matrices(model)
    large = {name.rpartition(".")[2] for name, layer in layers.items() if min(shape(layer)) > rank}
    chosen = sorted(large) if names == "all" else [name.strip() for name in names.split(",")]
    known = sorted({name.rpartition(".")[2] for name in layers})
    if not set(chosen) <= set(known):
        raise ValueError(f"an adapter's targets must be all or among {', '.join(known)}, got {names}")
    if not chosen or not set(chosen) <= large:
        raise ValueError(f"a change of rank {rank} is as large as what it changes ({names}): take a smaller rank")
    return tuple(chosen)


def with_adapter(model: Model, adapter: Adapter) -> Model:
    """Replaces the targets in `model` by layers with low-rank changes, which alone are trained; in place."""
    model.requires_grad_(False)
    tied, head = embedding_is_head(model), model.get_submodule("head")
    for name, layer in matrices(model).items():
        parent, _, own = name.rpartition(".")
        if own in adapter.targets:
            made = LoRALinear(layer, adapter) if isinstance(layer, LINEAR) else LoRAEmbedding(layer, adapter)
            setattr(model.get_submodule(parent), own, made)
            if own == "embed" and tied and isinstance(head, LINEAR):  # one matrix with two names has one change
                of_head = LoRALinear(head, adapter)
                of_head.lora_a, of_head.lora_b = made.lora_a, made.lora_b
                model.register_module("head", of_head)
    return model


def adapter_of(model: nn.Module) -> Adapter | None:
    """Returns the adapter that is trained; None if the whole model is."""
    return next((m.adapter for m in model.modules() if isinstance(m, LoRA)), None)


def merged(tensors: Mapping[str, Tensor], changes: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Returns the model's weights including the changes, in their own dtypes.

    Raises:
        ValueError: the changes do not fit the weights.
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
