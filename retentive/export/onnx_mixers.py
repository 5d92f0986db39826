"""Mixers as nodes of an ONNX graph: retention, attention, convolutions, and the values that depend on positions alone.

**Retention** is one node, `LinearAttention` with the update rule "gated", S = exp(g) S + k v^T, o = q S: onnxruntime's
own (com.microsoft, from 1.32 on) or that of ONNX's opset 27.

**Attention** first writes keys and values into their caches, the token at position p into slot p mod S
(`TensorScatter`). Then each token attends to the slots that its mask allows (`Attention`). No node reads the old cache,
so that it may be written in place. With a window W the T new tokens overwrite slots, and none that the first of them
sees: S is W + T - 1 at least. Both operators are ONNX's own, of opset 24.

**Convolutions** are one node, `CausalConvWithState`, which has features before tokens: onnxruntime's own or that of
opset 27.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retentive.export.onnx_graph import MICROSOFT, Graph
from retentive.layers import AttentionConfig, ConvolutionConfig, RetentionConfig
from retentive.models.config import Mixer
from retentive.ops import decay as decays
from retentive.ops import rotary


def memories(mixer: Mixer, i: int) -> dict[str, list[Any]]:
    """Shapes of the tensors that block i remembers, by the names of their inputs; outputs have "new_" before these."""
    if mixer.kind == "retention":
        return {f"state.{i}": ["B", *mixer.head_shape]}
    if mixer.kind == "convolution":
        return {f"rows.{i}": ["B", mixer.dim, mixer.taps - 1]}
    slots = f"S{mixer.window or ''}"
    cache = ["B", mixer.kv_heads, slots, mixer.head_dim]
    gates: dict[str, list[Any]] = {f"gates.{i}": ["B", mixer.heads, slots]} if mixer.forget_gate else {}
    return {f"keys.{i}": cache, f"values.{i}": cache, **gates}


class Positions(NamedTuple):
    """Names of the values that all mixers need."""

    shape: str
    """[B,T] as a tensor."""
    tokens: str
    """T."""
    of_token: str
    """`[B,T]`."""


def positions_of(graph: Graph) -> Positions:
    """Positions of the tokens in input_ids."""
    shape, one = graph.add("Shape", "input_ids"), graph.numbers(1)
    T = graph.add("Squeeze", graph.add("Slice", shape, one, graph.numbers(2)))
    steps = graph.add("Range", graph.number(0), T, graph.number(1))
    return Positions(shape, T, graph.add("Add", graph.add("Unsqueeze", "position", one), steps))


def shared(graph: Graph, mixer: Any, at: Positions, i: int) -> dict[str, str]:
    """Values that depend on positions alone, for all blocks of this mixer; i is the first of them."""
    if mixer.kind == "convolution":
        return {}
    if mixer.kind == "retention":
        return _phases(graph, mixer, mixer.head_shape[1], at) | _decays(graph, mixer, at)
    return _phases(graph, mixer, mixer.head_dim, at) | _slots(graph, mixer, at, f"keys.{i}")


def _phases(graph: Graph, c: Mixer, K: int, at: Positions) -> dict[str, str]:
    """cos and sin `[B T, K/2]` of the rotation, and their `rows` `[B,T]`."""
    if c.rotary == "none":
        return {}
    # float64 products, of which whole turns are taken away: at position 10^6 a float32 one would be off by 0.06
    turned = graph.add("Cast", graph.add("Reshape", at.of_token, graph.numbers(-1, 1)), to=11)
    frequency = rotary.frequencies(K, c.rotary, base=c.rotary_base, scaling=c.rotary_scaling)
    angle = graph.add("Mul", turned, graph.constant(frequency[None]))
    angle = graph.add("Cast", graph.add("Mod", angle, graph.constant(np.float64(2 * np.pi)), fmod=1), to=1)
    count = graph.add("Squeeze", graph.add("Size", "input_ids"))
    rows = graph.add("Range", graph.number(0), count, graph.number(1))
    return {
        "cos": graph.add("Cos", angle),
        "sin": graph.add("Sin", angle),
        "rows": graph.add("Reshape", rows, at.shape),
    }


def _decays(graph: Graph, c: RetentionConfig, at: Positions) -> dict[str, str]:
    """Log decays `[B,T,H]` and scales of q `[B,T,H,1]`, where they are no function of the token."""
    if c.per_token:
        return {}
    log_decay = torch.tensor(c.log_decay(), dtype=torch.float64)
    heads = graph.add("Concat", at.shape, graph.numbers(c.heads), axis=0)
    scale = {"q_scale": _row_norm(graph, log_decay, at.of_token)} if c.score_norm else {}
    return {"decay": graph.add("Expand", graph.constant(log_decay.float()), heads), **scale}


def _slots(graph: Graph, c: AttentionConfig, at: Positions, cache: str) -> dict[str, str]:
    """Slot of the first new token `[B]`, the mask `[B,1,T,S]`, and for gates the slots in the order of positions."""
    S = graph.add("Gather", graph.add("Shape", cache), graph.number(2))
    slot = graph.add("Range", graph.number(0), S, graph.number(1))
    end = graph.add("Unsqueeze", graph.add("Add", "position", at.tokens), graph.numbers(1))
    last = graph.add("Sub", end, graph.number(1))
    # the position of the token in each slot; below 0: none yet
    held = graph.add("Sub", last, graph.add("Mod", graph.add("Sub", last, slot), S))
    held, own = graph.add("Unsqueeze", held, graph.numbers(1)), graph.add("Unsqueeze", at.of_token, graph.numbers(2))
    before = graph.number(-1)  # all that is seen comes after it
    if c.window:
        before = graph.add("Max", before, graph.add("Sub", own, graph.number(c.window)))
    seen = graph.add("And", graph.add("Greater", held, before), graph.add("LessOrEqual", held, own))
    mask = graph.add("Where", seen, graph.constant(np.float32(0)), graph.constant(np.float32(-np.inf)))
    found = {"slot": graph.add("Mod", "position", S), "mask": graph.add("Unsqueeze", mask, graph.numbers(1))}
    if c.forget_gate:
        for name, op in (("oldest_first", "Add"), ("back", "Sub")):
            order = graph.add("Mod", graph.add(op, slot, end), S)
            found[name] = graph.add("Unsqueeze", order, graph.numbers(1))
    return found


def _row_norm(graph: Graph, log_decay: Tensor, position: str) -> str:
    """`ops.decay.row_norm` of the positions, `[B,T,H,1]`; in float64 the series may be summed as it is written."""
    n = graph.add("Add", graph.add("Cast", position, to=11), graph.constant(np.float64(1)))
    n = graph.add("Unsqueeze", n, graph.numbers(2))
    forgets = log_decay < 0
    safe = torch.where(forgets, log_decay, -1.0)
    power = graph.add("Exp", graph.add("Mul", n, graph.constant(safe)))
    series = graph.add(
        "Div", graph.add("Sub", graph.constant(np.float64(1)), power), graph.constant(-torch.expm1(safe))
    )
    total = graph.add("Where", graph.constant(forgets), series, n)
    scale = graph.add("Cast", graph.add("Reciprocal", graph.add("Sqrt", total)), to=1)
    return graph.add("Unsqueeze", scale, graph.numbers(3))


def retention(graph: Graph, layer: Any, h: str, i: int, tables: dict[str, str]) -> str:
    """Gated multi-scale retention of h `[B,T,D]`, from state.i to new_state.i."""
    c, H, K, V = layer.config, layer.H, layer.K, layer.V
    layers = [x for x in (layer.q_proj, layer.k_proj, layer.v_proj, layer.g_proj, layer.decay_proj) if x is not None]
    widths = [c.key_dim, K * c.kv_heads, V * c.kv_heads, c.value_dim if c.gate else 0, H if layer.decay_proj else 0]
    widths = [width for width in widths if width]
    q, k, v, *rest = graph.add("Split", graph.matmul(h, *layers), graph.numbers(*widths), outputs=len(widths), axis=-1)
    q = _feature(graph, q, layer.q_norm, layer.q_bias, H, K, c.norm_eps, tables.get("q_scale"))
    k = _feature(graph, k, layer.k_norm, layer.k_bias, c.kv_heads, K, c.norm_eps)
    q, k = _rotated(graph, q, c.rotary, H, K, tables), _rotated(graph, k, c.rotary, c.kv_heads, K, tables)
    if c.kv_heads != H:  # kv head j serves the query heads j * groups … (j + 1) * groups - 1
        k, v = (_repeated(graph, x, c.kv_heads, H // c.kv_heads, width) for x, width in ((k, K), (v, V)))
    decay = tables.get("decay") or _decay(graph, layer, rest[-1])
    o, _ = graph.add(
        "LinearAttention", q, k, v, f"state.{i}", decay, domain="" if graph.standard else MICROSOFT,
        names=[f"retention.{i}", f"new_state.{i}"], q_num_heads=H, kv_num_heads=H, update_rule="gated", scale=K**-0.5,
    )  # fmt: skip
    if c.head_norm:
        gain = layer.head_norm.weight
        o = graph.reshape(graph.norm(graph.reshape(o, 0, 0, H, V), gain, V, c.norm_eps), 0, 0, H * V)
    if c.gate:
        o = graph.add("Mul", graph.activation(c.gate_activation, rest[0]), o)
    return graph.matmul(o, layer.out_proj)


def _feature(
    graph: Graph, x: str, norm: Any, bias: Tensor | None, H: int, K: int, eps: float, scale: str | None = None
) -> str:
    """q or k `[B,T,H K]` before its rotation: normalised, shifted and scaled."""
    if norm is not None or scale is not None:
        x = graph.reshape(x, 0, 0, H, K)
        x = graph.norm(x, norm.weight, K, eps) if norm is not None else x
        # a scale of a whole head commutes with the rotation, and with a bias only after it
        x = graph.add("Add", x, graph.constant(bias.float().unflatten(0, (H, K)))) if bias is not None else x
        x = graph.add("Mul", x, scale) if scale is not None else x
        return graph.reshape(x, 0, 0, H * K)
    return x if bias is None else graph.add("Add", x, graph.constant(bias.float()))


def _rotated(graph: Graph, x: str, variant: str, H: int, K: int, tables: dict[str, str]) -> str:
    if variant == "none":
        return x
    how: dict[str, Any] = {"num_heads": H, "rotary_embedding_dim": K, "interleaved": int(variant == "interleaved")}
    if graph.standard:
        return graph.add("RotaryEmbedding", x, tables["cos"], tables["sin"], tables["rows"], **how)
    return graph.add("RotaryEmbedding", x, tables["rows"], tables["cos"], tables["sin"], domain=MICROSOFT, **how)


def _repeated(graph: Graph, x: str, heads: int, times: int, width: int) -> str:
    """`[B,T,heads width]` -> `[B,T,heads times width]`, each head `times` times."""
    x = graph.reshape(x, 0, 0, heads, 1, width)
    x = graph.add("Expand", x, graph.numbers(1, 1, 1, times, 1))
    return graph.reshape(x, 0, 0, heads * times * width)


def _decay(graph: Graph, layer: Any, d: str) -> str:
    """log(gamma) from the projection d: `of_tokens` of ops/decay.py."""
    if layer.decay_proj.bias is not None:
        d = graph.add("Add", d, graph.constant(layer.decay_proj.bias.float()))
    if layer.config.decay == "sigmoid":
        return graph.add("Mul", graph.add("Sigmoid", d), graph.constant(np.float32(-decays.FASTEST)))
    return graph.add("Mul", _log_sigmoid(graph, d), graph.constant(np.float32(1 / layer.config.decay_scale)))


def _log_sigmoid(graph: Graph, x: str) -> str:
    """log sigmoid(x), as -softplus(-x)."""
    return graph.add("Neg", graph.add("Softplus", graph.add("Neg", x)))


def attention(graph: Graph, layer: Any, h: str, i: int, tables: dict[str, str]) -> str:
    """Softmax attention of h `[B,T,D]` over the slots of keys.i and values.i after the new tokens are written there."""
    c, H, K = layer.config, layer.H, layer.K
    layers = [x for x in (layer.q_proj, layer.k_proj, layer.v_proj, layer.forget_proj) if x is not None]
    widths = [H * K, c.kv_heads * K, c.kv_heads * K, *([H] if c.forget_gate else [])]
    y = graph.matmul(h, *layers)
    if c.qkv_bias:  # and none yet for the gate
        biases = [x.bias.float() for x in layers[:3]]
        y = graph.add("Add", y, graph.constant(torch.cat([*biases, torch.zeros(sum(widths[3:]))])))
    q, k, v, *gate = graph.add("Split", y, graph.numbers(*widths), outputs=len(widths), axis=-1)
    q = _rotated(graph, _feature(graph, q, layer.q_norm, None, H, K, c.norm_eps), c.rotary, H, K, tables)
    k = _feature(graph, k, layer.k_norm, None, c.kv_heads, K, c.norm_eps)
    k = _rotated(graph, k, c.rotary, c.kv_heads, K, tables)
    q, k, v = (
        graph.add("Transpose", graph.reshape(x, 0, 0, heads, K), perm=[0, 2, 1, 3])
        for x, heads in ((q, H), (k, c.kv_heads), (v, c.kv_heads))
    )
    keys, values = _written(graph, f"keys.{i}", k, tables), _written(graph, f"values.{i}", v, tables)
    mask = tables["mask"]
    if gate:
        log = graph.add("Add", gate[0], graph.constant(layer.forget_proj.bias.float()))
        log = graph.add("Transpose", _log_sigmoid(graph, log), perm=[0, 2, 1])
        fade = _after(graph, _written(graph, f"gates.{i}", log, tables), tables)
        mask = graph.add("Add", mask, graph.add("Unsqueeze", fade, graph.numbers(2)))
    o = graph.add("Attention", q, keys, values, mask, scale=K**-0.5)
    o = graph.reshape(graph.add("Transpose", o, perm=[0, 2, 1, 3]), 0, 0, H * K)
    return graph.matmul(o, layer.out_proj)


def _written(graph: Graph, cache: str, new: str, tables: dict[str, str]) -> str:
    """A cache with the new tokens in their slots, its third axis."""
    return graph.add("TensorScatter", cache, new, tables["slot"], names=[f"new_{cache}"], axis=2, mode="circular")


def _after(graph: Graph, gates: str, tables: dict[str, str]) -> str:
    """Sums `[B,H,S]` of the log gates of all tokens after each slot's, from the last token backwards.

    All queries get the same sums: the sum between the last token and a query is one number in all of its scores, which
    the softmax does not see.
    """
    shape = graph.add("Shape", gates)
    oldest_first, back = (graph.add("Expand", tables[name], shape) for name in ("oldest_first", "back"))
    ordered = graph.add("GatherElements", gates, oldest_first, axis=2)
    sums = graph.add("CumSum", ordered, graph.number(2), exclusive=1, reverse=1)
    return graph.add("GatherElements", sums, back, axis=2)


def convolution(graph: Graph, layer: Any, h: str, i: int, tables: dict[str, str]) -> str:
    """Short convolution of h `[B,T,D]`, from the last tokens in rows.i to those in new_rows.i."""
    x, weight = graph.add("Transpose", h, perm=[0, 2, 1]), graph.constant(layer.weight.float().mT[:, None])
    y, _ = graph.add(
        "CausalConvWithState", x, weight, "", f"rows.{i}", domain="" if graph.standard else MICROSOFT,
        names=[f"convolution.{i}", f"new_rows.{i}"],
    )  # fmt: skip
    return graph.add("Transpose", y, perm=[0, 2, 1])


MIXERS = {RetentionConfig.kind: retention, AttentionConfig.kind: attention, ConvolutionConfig.kind: convolution}
"""Nodes of each kind of mixer."""
