"""Tensor parallelism: divides the heads and feed-forward columns of every block over the ranks of the axis `tp`.

    x -> [the same on all] -> q, k, v, g of my heads -> retention -> norm, gate -> my columns of Wo -> [sum] -> y

Every head has its own decay, norm and gate, so nothing is exchanged between the two marked places. Source: Shoeybi et
al., Megatron-LM, arXiv 1909.08053; its functions f and g are `_Copied` and `_Summed`.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from retentive.layers import Attention, FeedForward, MultiScaleRetention, RMSNorm
from retentive.models import LanguageModel
from retentive.train.parallel.mesh import Axis

AXES = dict.fromkeys(("q_proj", "k_proj", "v_proj", "g_proj", "decay_proj", "forget_proj", "q_bias", "k_bias"), 0)
AXES |= {"gate_proj": 0, "up_proj": 0, "out_proj": 1, "down_proj": 1}
"""Axis that each parameter of a block is divided along: 0, its outputs, by heads or columns; 1, its inputs."""
SHARED = ("q_norm", "k_norm", "head_norm")
"""Norms with one gain for all heads of a layer."""


def split_dim(name: str) -> int | None:
    """Axis along which tensor parallelism divides the parameter of that name; None for a parameter that all share."""
    if not name.startswith("blocks."):
        return None
    return next((AXES[part] for part in name.split(".") if part in AXES), None)


def tensor_parallel(model: LanguageModel, axis: Axis) -> LanguageModel:
    """Reduce the model in place to this rank's share of the heads and columns of every block.

    Raises:
        ValueError: heads or columns are not divisible by the ranks; the model is unchanged.
    """
    layers = [m for m in model.blocks.modules() if isinstance(m, MultiScaleRetention | Attention | FeedForward)]
    for layer in layers:
        counts = {"ffn_dim": layer.gate_proj.out_features} if isinstance(layer, FeedForward) else heads_of(layer)
        for name, count in counts.items():
            if count % axis.size:
                raise ValueError(f"{name} {count} is not divisible by `tp={axis.size}`: change either (`set`)")
        if isinstance(layer, MultiScaleRetention) and layer.config.head_norm_joint:
            raise ValueError("head_norm_joint normalises over all heads, which `tp` divides: use other axes")
    for name, p in list(model.named_parameters()):
        dim = split_dim(name)
        if dim is not None:
            owner, _, last = name.rpartition(".")
            part = p.detach().chunk(axis.size, dim)[axis.rank].clone(memory_format=torch.contiguous_format)
            setattr(model.get_submodule(owner), last, nn.Parameter(part, p.requires_grad))
    group, configs = axis.group, dict[int, Any]()
    assert group is not None
    for layer in layers:
        if not isinstance(layer, FeedForward):
            _keep_heads(layer, axis, configs)
        layer.register_forward_pre_hook(lambda layer, args: (_Copied.apply(args[0], group), *args[1:]))
        last_layer = layer.down_proj if isinstance(layer, FeedForward) else layer.out_proj
        last_layer.register_forward_hook(lambda layer, args, y: _Summed.apply(y, group))
    return model


def heads_of(layer: Any) -> dict[str, int]:
    """Numbers of a layer's heads, by the names of its config's fields."""
    return {"heads": layer.H, "kv_heads": layer.kv_heads}


def _keep_heads(layer: Any, axis: Axis, configs: dict[int, Any]) -> None:
    """Reduce a layer to this rank's heads, with their own decays.

    Args:
        configs: those made so far, by the id of the config before: layers that share one share the other.
    """
    layer.H, layer.kv_heads = layer.H // axis.size, layer.kv_heads // axis.size
    whole = layer.config
    if id(whole) not in configs:
        shape = {**heads_of(layer), "head_dim": layer.K}
        if isinstance(layer, MultiScaleRetention):
            decay = whole.decay
            if not whole.per_token:  # fixed decays: take those of this rank's heads
                decay = tuple(whole.log_decay()[axis.rank * layer.H : (axis.rank + 1) * layer.H])
            widths = {"key_dim": layer.K * layer.H, "value_dim": layer.V * layer.H}
            shape = {**heads_of(layer), **widths, "decay": decay}
        configs[id(whole)] = replace(whole, **shape)
    layer.config = configs[id(whole)]  # gives fresh states their shape
    for name in SHARED:
        norm = layer._modules.get(name)
        if isinstance(norm, RMSNorm) and norm.weight is not None:
            setattr(layer, name, _SharedNorm(norm, axis.group))


class _SharedNorm(RMSNorm):
    """Norm of this rank's heads with a gain shared by all heads; the gain's gradient is summed over the group."""

    def __init__(self, norm: RMSNorm, group: dist.ProcessGroup | None):
        super().__init__(norm.width, eps=norm.eps, affine=False)
        self.weight, self.group = norm.weight, group

    @property
    def gain(self) -> Tensor:
        return _Copied.apply(self.weight, self.group)


class _Copied(torch.autograd.Function):
    """Identity of x, which all ranks of the group have; the gradient is summed over the group."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Summed(torch.autograd.Function):
    """Sum of x over the ranks of the group; each rank gets the whole gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None
