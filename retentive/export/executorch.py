"""A RetNet's decoding step as an ExecuTorch program, for phones: one XNNPACK delegate (extra `executorch`).

    forward(token int64 [1], position int64 [1], state.0 … float32 [H,K,V]) -> (logits [1,vocabulary], state.0 … )

The methods of no arguments, "eos", "vocabulary" and "layers", and "heads", "key" and "value" of the states, are what a
program must know. Prompts are read token by token.

What a delegate takes is narrow, and the step is written so: sums by products with a row of ones, matrices that read the
same side by side in one, no strides. Pairs that a rotation turns are moved to be half a head apart, with the rows of
the matrices: scores do not see in which order features stand, but states are not those of the model.
"""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retentive.checkpoint.quantize import quantization_of
from retentive.export.retnets import check_plain
from retentive.layers import RetentionConfig
from retentive.layers.config import GATES
from retentive.models import LanguageModel
from retentive.ops import decay as decays
from retentive.ops import rotary

TURNS, LEVELS = 256, 4
"""Phases are looked up for each of four digits of a position, in base 256, and added: float32 has no more than seven
digits of an angle, and the position 10^6 would leave two."""
GROUP = 32
"""Weights of 4 bits that share a scale."""


def export_executorch(model: LanguageModel, path: Path, *, eos: int, bits: int | None = None) -> "Step":
    """Writes the program to `path`; the step that it was made from, with its matrices as they are there.

    It is one delegate, but with score_norm, whose series is not taken by any.

    Args:
        eos: the id of the end-of-text token.
        bits: 8 or 4, for matrices of integers (8-bit activations); None for floats.

    Raises:
        ValueError: no RetNet of floats, or one that sees or hears; with 4 bits a width that is no multiple of GROUP.
        ImportError: no executorch (extra `executorch`).
    """
    check_exportable(model)
    if bits == 4 and model.config.dim % GROUP:
        raise ValueError(f"4 bits share scales in groups of {GROUP}, which dim {model.config.dim} is no multiple of")
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    except ImportError:
        raise ImportError("programs for ExecuTorch are made by it: pip install 'retentive[executorch]'") from None
    c = model.config.all_retention("ExecuTorch")
    step: Any = Step(copy.deepcopy(model).float().eval(), GROUP if bits == 4 else 1)
    if bits:
        _quantise(step, bits)
    shape = c.heads, c.key_dim // c.heads, step.V
    given = torch.tensor([1]), torch.tensor([1]), *step.blank()
    facts = {"eos": eos, "vocabulary": model.config.vocab_size, "layers": model.config.layers}
    facts |= dict(zip(("heads", "key", "value"), shape, strict=True))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it calls in torch
        edge = to_edge_transform_and_lower(
            torch.export.export(step, given, strict=True),
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=facts,
        )
        program = edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True))
    with open(path, "wb") as file:
        program.write_to_file(file)
    return step


def check_exportable(model: LanguageModel) -> None:
    """Raises ValueError for a model that has no such program."""
    check_plain(model)
    if quantization_of(model):
        raise ValueError("ExecuTorch rounds by itself: export the model of floats, with --weights")


def _quantise(step: nn.Module, bits: int) -> None:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    integer = getattr(torch, f"int{bits}")  # mypy knows no int4
    how = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=integer, weight_granularity=PerGroup(GROUP) if bits == 4 else PerAxis(0)
    )
    # the sums of squares stay floats: they are products with ones
    quantize_(step, how, filter_fn=lambda module, name: isinstance(module, nn.Linear))


class Step(nn.Module):
    """One token of a RetNet, of which each linear layer is `nn.Linear`.

    Args:
        multiple: what the widths of values and of the feed-forward layer are filled up to a multiple of, with zeros.
    """

    cosines: Tensor
    sines: Tensor
    log_decay: Tensor

    def __init__(self, model: Any, multiple: int = 1):
        super().__init__()
        whole = model.config
        self.config = c = whole.all_retention("ExecuTorch")
        self.embed_scale, K = whole.dim**0.5 if whole.embed_scale else None, c.key_dim // c.heads
        self.embed, self.head = model.embed, _linear(model.head.weight)
        self.embed_norm = Norm(c.dim, model.embed_norm.weight, whole.norm_eps) if whole.embed_norm else nn.Identity()
        self.norm = Norm(c.dim, model.norm.weight, whole.norm_eps) if whole.final_norm else nn.Identity()
        self.blocks = nn.ModuleList(StepBlock(block, c, multiple) for block in model.blocks)
        self.V: int = self.blocks[0].V  # type: ignore[assignment]
        turn = torch.arange(TURNS, dtype=torch.float64)[:, None] * rotary.frequencies(K, c.rotary)
        angles = [turn * TURNS**level for level in range(LEVELS)]
        self.register_buffer("cosines", torch.stack([x.cos() for x in angles]).float(), persistent=False)
        self.register_buffer("sines", torch.stack([x.sin() for x in angles]).float(), persistent=False)
        if c.score_norm:
            log_decay = torch.tensor(c.log_decay(), dtype=torch.float32)
            self.register_buffer("log_decay", log_decay, persistent=False)

    def forward(self, token: Tensor, position: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        c, x = self.config, self.embed(token)
        if self.embed_scale:
            x = x * self.embed_scale
        x, after = self.embed_norm(x), []
        cos, sin = self.phases(position)
        scale = torch.full((c.heads, 1), (c.key_dim // c.heads) ** -0.5)
        if c.score_norm:
            scale = scale * decays.row_norm(self.log_decay, position + 1).reshape(c.heads, 1)
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block(x, state, cos, sin, scale)
            after.append(state)
        return self.head(self.norm(x)), *after

    def phases(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[1, K/2]`, of the digits of the position one after the other."""
        cos, sin = self.cosines[0][position % TURNS], self.sines[0][position % TURNS]
        for level in range(1, LEVELS):
            digit = torch.div(position, TURNS**level, rounding_mode="floor") % TURNS
            a, b = self.cosines[level][digit], self.sines[level][digit]
            cos, sin = cos * a - sin * b, sin * a + cos * b
        return cos, sin

    def blank(self) -> list[Tensor]:
        """The states before the first token."""
        c = self.config
        return [torch.zeros(c.heads, c.key_dim // c.heads, self.V) for _ in self.blocks]


class StepBlock(nn.Module):
    """A block, for one token x `[1,D]`."""

    decay: Tensor

    def __init__(self, block: Any, c: RetentionConfig, multiple: int):
        super().__init__()
        layer, H = block.retention, c.heads
        self.c, self.ffn, self.H, self.K = c, block.ffn.config, H, layer.K
        self.V = _filled(layer.V, multiple // math.gcd(multiple, H))  # of a head
        self.F = _filled(block.ffn.config.width, multiple)
        more = (0, 0, 0, self.V - layer.V)
        order = _halves(self.K) if c.rotary == "interleaved" else torch.arange(self.K)
        q = _heads(layer.q_proj.weight, self.H, self.H)[:, order].flatten(0, 1)
        k = _heads(layer.k_proj.weight, c.kv_heads, self.H)[:, order].flatten(0, 1)
        v = F.pad(_heads(layer.v_proj.weight, c.kv_heads, H), more).flatten(0, 1)
        rest = [F.pad(_heads(layer.g_proj.weight, H, H), more).flatten(0, 1)] if c.gate else []
        rest += [layer.decay_proj.weight] if c.decay == "gated" else []
        self.reads = _linear(torch.cat([q, k, v, *rest]))
        self.retention_norm = Norm(c.dim, block.retention_norm.weight, c.norm_eps)
        self.ffn_norm = Norm(c.dim, block.ffn_norm.weight, c.norm_eps)
        self.q_norm = self.k_norm = self.head_norm = None
        if c.qk_norm:
            self.q_norm, self.k_norm = (Norm(self.K, x.weight[order], c.norm_eps) for x in (layer.q_norm, layer.k_norm))
        if c.head_norm:
            self.head_norm = Norm(layer.V, layer.head_norm.weight, c.norm_eps, self.V)
        if c.qk_bias:
            self.q_bias = nn.Parameter(_heads(layer.q_bias, self.H, self.H)[:, order])
            self.k_bias = nn.Parameter(_heads(layer.k_bias, c.kv_heads, self.H)[:, order])
        if c.decay == "gated":
            bias = layer.decay_proj.bias
            self.decay_bias = nn.Parameter(bias.detach().clone()) if bias is not None else None
        else:
            decay = torch.tensor(c.log_decay(), dtype=torch.float64).exp().float()
            self.register_buffer("decay", decay[:, None, None], persistent=False)
        self.out = _linear(F.pad(layer.out_proj.weight.unflatten(1, (H, -1)), (0, self.V - layer.V)).flatten(1))
        ffn, more = block.ffn, (0, 0, 0, self.F - self.ffn.width)
        enters = [ffn.gate_proj, *([ffn.up_proj] if self.ffn.gate else [])]
        self.enters = _linear(torch.cat([F.pad(x.weight, more) for x in enters]))
        self.down = _linear(F.pad(ffn.down_proj.weight, (0, self.F - self.ffn.width)))

    def forward(self, x: Tensor, state: Tensor, cos: Tensor, sin: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        c, H, K, V = self.c, self.H, self.K, self.V
        z = self.reads(self.retention_norm(x))
        q, k, v = z[:, : H * K], z[:, H * K : 2 * H * K], z[:, 2 * H * K : H * (2 * K + V)]
        q, k = self.feature(q, "q", cos, sin) * scale, self.feature(k, "k", cos, sin)
        g, d = z[:, H * (2 * K + V) : H * 2 * (K + V)], z[:, z.shape[1] - H :]
        state = state * self.gamma(d) + k.reshape(H, K, 1) * v.reshape(H, 1, V)
        o = torch.bmm(q.reshape(H, 1, K), state).reshape(H, V)
        o = (o if self.head_norm is None else self.head_norm(o)).reshape(1, H * V)
        x = x + self.out(GATES[c.gate_activation](g) * o if c.gate else o)
        z = self.enters(self.ffn_norm(x))
        act = F.gelu if self.ffn.activation == "gelu" else F.silu
        y = act(z[:, : self.F]) * z[:, self.F :] if self.ffn.gate else act(z)
        return x + self.down(y), state

    def feature(self, x: Tensor, which: str, cos: Tensor, sin: Tensor) -> Tensor:
        """q or k `[H,K]`: normalised, shifted, rotated."""
        x = x.reshape(self.H, self.K)
        norm = self.q_norm if which == "q" else self.k_norm
        x = x if norm is None else norm(x)
        if self.c.qk_bias:
            x = x + (self.q_bias if which == "q" else self.k_bias)
        if self.c.rotary == "none":
            return x
        a, b = x[:, : self.K // 2], x[:, self.K // 2 :]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def gamma(self, d: Tensor) -> Tensor:
        """The decay of each head, `[H,1,1]`."""
        if self.c.decay != "gated":
            return self.decay
        d = d if self.decay_bias is None else d + self.decay_bias
        return torch.exp(torch.log(torch.sigmoid(d)) * (1 / self.c.decay_scale)).reshape(self.H, 1, 1)


class Norm(nn.Module):
    """RMSNorm over the last axis, which may be filled up with zeros."""

    mean: Tensor

    def __init__(self, width: int, weight: Tensor | None, eps: float, filled: int = 0):
        super().__init__()
        self.eps, more = eps, (0, max(filled - width, 0))
        self.weight = None if weight is None else nn.Parameter(F.pad(weight.detach().clone(), more))
        self.register_buffer("mean", torch.full((1, width + more[1]), 1 / width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(F.linear(x * x, self.mean) + self.eps)
        return x if self.weight is None else x * self.weight


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach().clone())
    return layer


def _heads(rows: Tensor, heads: int, wanted: int) -> Tensor:
    """`[wanted, rows of a head, …]` of the rows of all heads, each head as often as query heads share it."""
    return rows.detach().unflatten(0, (heads, -1)).repeat_interleave(wanted // heads, 0)


def _filled(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def _halves(K: int) -> Tensor:
    """The order in which features 0, 2, 4 … come before 1, 3, 5 …"""
    return torch.cat([torch.arange(0, K, 2), torch.arange(1, K, 2)])
