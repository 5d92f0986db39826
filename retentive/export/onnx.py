"""A RetNet as one ONNX graph, for prompts and for single tokens alike; onnxruntime runs it (extra `onnx`).

    input_ids  int64 [B,T]          logits        float32 [B,vocabulary], after the last token
    position   int64 [B]            new_state.i   float32 [B,H,K,V]
    state.i    float32 [B,H,K,V]

`position` says how many tokens a state has read. A state may be bound to its input and its output at once: each is read
before it is written (`onnx_run` makes sure of it).

Retention is one node, `LinearAttention` with the update rule "gated", S = exp(g) S + k v^T, o = q S: onnxruntime's own
(com.microsoft, from 1.32 on) or, with `standard`, that of ONNX's opset 27, which any runtime may have. Integers go in
as they are stored, in blocks of a group: nothing is rounded again.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retentive.export.onnx_run import FORMAT
from retentive.export.retnets import check_plain
from retentive.layers import RetentionConfig
from retentive.layers.quantized import Quantized
from retentive.models import LanguageModel
from retentive.models.presets import flat
from retentive.ops import rotary

MICROSOFT = "com.microsoft"
OPSET, STANDARD_OPSET = 21, 27
LARGEST = 1_900_000_000
"""Bytes of weights that one file takes; protocol buffers end at 2 GiB, and more goes beside it."""
WHOLE_NUMBERS = {8: 0x80, 4: 0x88}
"""By bits, what makes signed integers the unsigned ones of onnxruntime, whose zero is in the middle."""


def export_onnx(model: LanguageModel, path: Path, *, eos: int, standard: bool = False) -> None:
    """Writes the graph to `path`, and beside it `path`.data where the weights are too many for one file.

    Args:
        eos: the id of the end-of-text token.
        standard: standard operators only, of opset 27: any runtime may have them; onnxruntime is slower with them.

    Raises:
        ValueError: no RetNet, one that sees or hears, or groups of integers that are no power of two.
        ImportError: no onnx (extra `onnx`).
    """
    try:
        import onnx
    except ImportError:
        raise ImportError("ONNX graphs are written by onnx: pip install 'retentive[onnx]'") from None
    check_exportable(model)
    graph = Graph(standard)
    _network(graph, model)
    c = model.config
    state = ["B", *c.all_retention("ONNX").head_shape]
    value, float32, int64 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    states = [value(f"state.{i}", float32, state) for i in range(c.layers)]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "retentive",
            [value("input_ids", int64, ["B", "T"]), value("position", int64, ["B"]), *states],
            [value("logits", float32, ["B", c.vocab_size])]
            + [value(f"new_state.{i}", float32, state) for i in range(c.layers)],
            graph.weights,
        ),
        opset_imports=[onnx.helper.make_opsetid("", STANDARD_OPSET if standard else OPSET)]
        + ([] if standard else [onnx.helper.make_opsetid(MICROSOFT, 1)]),
        producer_name="retentive",
        ir_version=10,
    )
    said = {"format": FORMAT, "eos": str(eos), "config": json.dumps(flat(c, "ONNX"))}
    onnx.helper.set_model_props(made, said)
    beside = sum(len(weight.raw_data) for weight in graph.weights) > LARGEST
    where: dict[str, Any] = {"save_as_external_data": True, "location": f"{path.name}.data"} if beside else {}
    onnx.save_model(made, str(path), **where)


def check_exportable(model: LanguageModel) -> None:
    """Raises ValueError for a model that has no such graph."""
    check_plain(model)
    for module in model.modules():
        if isinstance(module, Quantized) and module.group & (module.group - 1):
            raise ValueError(f"a group of {module.group} integers: onnxruntime takes those of 16, 32, 64, 128 and 256")


class Graph:
    """Nodes and weights of a graph, each under a name of its own."""

    def __init__(self, standard: bool):
        self.standard = standard
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.known: dict[Any, str] = {}

    def add(
        self, op: str, *inputs: str, outputs: int = 1, names: Sequence[str] = (), domain: str = "", **how: Any
    ) -> Any:
        """The name of a node's output, or the names of its outputs; those of `names`, if given."""
        import onnx

        names = list(names) or [f"{op}.{len(self.nodes)}.{n}" for n in range(outputs)]
        self.nodes.append(onnx.helper.make_node(op, inputs, names, domain=domain, **how))
        return names[0] if len(names) == 1 else names

    def constant(self, value: Any, *, key: Any = None) -> str:
        """The name of a constant; the same for the same value, or for the same key."""
        import onnx

        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        key = key or (str(array.dtype), array.shape, array.tobytes())
        if key not in self.known:
            self.known[key] = f"weight.{len(self.weights)}"
            self.weights.append(onnx.numpy_helper.from_array(np.asarray(array, order="C"), self.known[key]))
        return self.known[key]

    def norm(self, x: str, gain: Tensor | None, width: int, eps: float) -> str:
        """RMSNorm over the last axis."""
        weight = self.constant(torch.ones(width) if gain is None else gain.float())
        op = "RMSNormalization" if self.standard else "SimplifiedLayerNormalization"
        return self.add(op, x, weight, axis=-1, epsilon=eps, stash_type=1)

    def activation(self, name: str, x: str) -> str:
        if name == "gelu":
            return self.add("Gelu", x)
        if name == "sigmoid":
            return self.add("Sigmoid", x)
        if self.standard:  # not Swish, which opset 24 has: onnxruntime 1.32 does not
            return self.add("Mul", x, self.add("Sigmoid", x))
        return self.add("QuickGelu", x, domain=MICROSOFT, alpha=1.0)

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps an axis."""
        return self.add("Reshape", x, self.constant(np.array(shape, np.int64)))

    def matmul(self, x: str, *layers: Any) -> str:
        """What linear layers make of the same x, side by side; their biases are left to the caller."""
        first = layers[0]
        if not isinstance(first, Quantized):
            return self.add("MatMul", x, self.constant(torch.cat([layer.weight.float() for layer in layers]).T))
        q, scale = integers(layers)
        key = tuple(id(layer.weight) for layer in layers)  # tied matrices are one
        if self.standard:
            floats = self.dequantized(first, q, scale, key)
            return self.add("MatMul", x, self.add("Transpose", floats, perm=[1, 0]))
        rows = self.known.get(("rows", *key))
        if rows and first.columns % first.group == 0:  # the embedding's, which this is tied to
            weight = self.reshape(rows, *q.shape)
        else:
            weight = self.constant(q, key=("q", *key))
        how: dict[str, Any] = {"K": first.columns, "N": len(q), "bits": first.bits, "block_size": first.group}
        scales = self.constant(scale, key=("scale", *key))
        # accuracy_level 4: x is rounded to integers of 8 bits, without which this is twice as slow
        return self.add("MatMulNBits", x, weight, scales, domain=MICROSOFT, accuracy_level=4, **how)

    def dequantized(self, layer: Quantized, q: np.ndarray, scale: np.ndarray, key: tuple[int, ...]) -> str:
        """Integers as floats `[N,K]`, by standard operators: they are of 8 bits in the file, whatever they were."""
        N, groups = scale.shape
        wide = q ^ 0x80 if layer.bits == 8 else np.stack((q & 15, q >> 4), -1).reshape(N, groups, -1) ^ 8
        signed = wide.astype(np.int8) if layer.bits == 8 else (wide.astype(np.int8) ^ 8) - 8
        named = self.constant(signed.reshape(N, -1), key=("int8", *key)), self.constant(scale, key=("scale", *key))
        floats = self.add("DequantizeLinear", *named, axis=1, block_size=layer.group)
        if layer.columns == groups * layer.group:
            return floats
        ends = (self.constant(np.array([n], np.int64)) for n in (0, layer.columns, 1))
        return self.add("Slice", floats, *ends)


def integers(layers: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 `[N, groups, bytes of a group]`, scales float32 `[N, groups]`) of layers one below the other."""
    bits, group = layers[0].bits, layers[0].group
    q = torch.cat([layer.weight.view(torch.uint8) for layer in layers]).cpu().numpy() ^ WHOLE_NUMBERS[bits]
    scale = torch.cat([layer.scale for layer in layers]).float().cpu().numpy()
    wanted = scale.shape[1] * group * bits // 8
    q = np.pad(q, ((0, 0), (0, wanted - q.shape[1])), constant_values=WHOLE_NUMBERS[bits])
    return q.reshape(len(q), scale.shape[1], -1), scale


def _network(graph: Graph, model: Any) -> None:
    """The whole model, from ids to logits and states."""
    c = model.config
    tables = _tables(graph, c.all_retention("ONNX"))
    x = _embedded(graph, model)
    for i, block in enumerate(model.blocks):
        h = graph.norm(x, block.retention_norm.weight, c.dim, c.norm_eps)
        x = graph.add("Add", x, _retention(graph, block.retention, h, i, tables))
        h = graph.norm(x, block.ffn_norm.weight, c.dim, c.norm_eps)
        x = graph.add("Add", x, _feed_forward(graph, block.ffn, h))
    x = graph.add("Gather", x, graph.constant(np.int64(-1)), axis=1)  # of the last token alone
    if c.final_norm:
        x = graph.norm(x, model.norm.weight, c.dim, c.norm_eps)
    if isinstance(model.head, Quantized):
        logits = graph.matmul(x, model.head)
        graph.add("Identity", logits, names=["logits"])
    else:  # as the embedding has it, so that tied they are one
        weight = graph.constant(model.head.weight.float(), key=("rows", id(model.head.weight)))
        graph.add("Gemm", x, weight, names=["logits"], transB=1)


def _embedded(graph: Graph, model: Any) -> str:
    """x `[B,T,D]` of input_ids."""
    c, embed = model.config, model.embed
    if not isinstance(embed, Quantized):
        weight = graph.constant(embed.weight.float(), key=("rows", id(embed.weight)))
        x = graph.add("Gather", weight, "input_ids", axis=0)
    else:
        q, scale = integers([embed])
        if graph.standard:
            x = graph.add("Gather", graph.dequantized(embed, q, scale, (id(embed.weight),)), "input_ids", axis=0)
        else:
            # rows as they are, and not in groups; the last group of a row may be short
            rows = q.reshape(len(q), -1)[:, : embed.columns * embed.bits // 8]
            key = id(embed.weight)
            named = graph.constant(rows, key=("rows", key)), graph.constant(scale, key=("scale", key))
            how: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": embed.group, "bits": embed.bits}
            x = graph.add("GatherBlockQuantized", named[0], "input_ids", named[1], domain=MICROSOFT, **how)
    if c.embed_scale:
        x = graph.add("Mul", x, graph.constant(np.float32(c.dim**0.5)))
    return graph.norm(x, model.embed_norm.weight, c.dim, c.norm_eps) if c.embed_norm else x


def _tables(graph: Graph, c: RetentionConfig) -> dict[str, str]:
    """What depends on positions alone: phases `[B T, K/2]` and their rows, decays `[B,T,H]`, scales of q."""
    K, found = c.key_dim // c.heads, dict[str, str]()
    shape = graph.add("Shape", "input_ids")
    one = graph.constant(np.array([1], np.int64))
    T = graph.add("Squeeze", graph.add("Slice", shape, one, graph.constant(np.array([2], np.int64))))
    steps = graph.add("Range", graph.constant(np.int64(0)), T, graph.constant(np.int64(1)))
    position = graph.add("Add", graph.add("Unsqueeze", "position", one), steps)  # [B,T]
    if c.rotary != "none":
        # float64 products, of which whole turns are taken away: at position 10^6 a float32 one would be off by 0.06
        turned = graph.add("Reshape", position, graph.constant(np.array([-1, 1], np.int64)))
        turned = graph.add("Cast", turned, to=11)
        angle = graph.add("Mul", turned, graph.constant(rotary.frequencies(K, c.rotary, base=c.rotary_base)[None]))
        angle = graph.add("Cast", graph.add("Mod", angle, graph.constant(np.float64(2 * np.pi)), fmod=1), to=1)
        found["cos"], found["sin"] = graph.add("Cos", angle), graph.add("Sin", angle)
        count = graph.add("Squeeze", graph.add("Size", "input_ids"))
        rows = graph.add("Range", graph.constant(np.int64(0)), count, graph.constant(np.int64(1)))
        found["rows"] = graph.add("Reshape", rows, shape)
    if c.decay != "gated":
        log_decay = torch.tensor(c.log_decay(), dtype=torch.float64)
        heads = graph.add("Concat", shape, graph.constant(np.array([c.heads], np.int64)), axis=0)
        found["decay"] = graph.add("Expand", graph.constant(log_decay.float()), heads)
        if c.score_norm:
            found["q_scale"] = _row_norm(graph, log_decay, position)
    return found


def _row_norm(graph: Graph, log_decay: Tensor, position: str) -> str:
    """`ops.decay.row_norm` of the positions, `[B,T,H,1]`; in float64 the series may be summed as it is written."""
    n = graph.add("Add", graph.add("Cast", position, to=11), graph.constant(np.float64(1)))
    n = graph.add("Unsqueeze", n, graph.constant(np.array([2], np.int64)))
    forgets = log_decay < 0
    safe = torch.where(forgets, log_decay, -1.0)
    power = graph.add("Exp", graph.add("Mul", n, graph.constant(safe)))
    series = graph.add(
        "Div", graph.add("Sub", graph.constant(np.float64(1)), power), graph.constant(-torch.expm1(safe))
    )
    total = graph.add("Where", graph.constant(forgets), series, n)
    scale = graph.add("Cast", graph.add("Reciprocal", graph.add("Sqrt", total)), to=1)
    return graph.add("Unsqueeze", scale, graph.constant(np.array([3], np.int64)))


def _retention(graph: Graph, layer: Any, h: str, i: int, tables: dict[str, str]) -> str:
    """Gated multi-scale retention of h `[B,T,D]`, from state.i to new_state.i."""
    c, H, K, V = layer.config, layer.H, layer.K, layer.V
    layers = [x for x in (layer.q_proj, layer.k_proj, layer.v_proj, layer.g_proj, layer.decay_proj) if x is not None]
    widths = [c.key_dim, K * c.kv_heads, V * c.kv_heads, c.value_dim if c.gate else 0, H if layer.decay_proj else 0]
    widths = [width for width in widths if width]
    sizes = graph.constant(np.array(widths, np.int64))
    q, k, v, *rest = graph.add("Split", graph.matmul(h, *layers), sizes, outputs=len(widths), axis=-1)
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
    x = graph.add("Expand", x, graph.constant(np.array([1, 1, 1, times, 1], np.int64)))
    return graph.reshape(x, 0, 0, heads * times * width)


def _decay(graph: Graph, layer: Any, d: str) -> str:
    """log sigmoid(d) / scale, as -softplus(-d) / scale."""
    if layer.decay_proj.bias is not None:
        d = graph.add("Add", d, graph.constant(layer.decay_proj.bias.float()))
    soft = graph.add("Softplus", graph.add("Neg", d))
    return graph.add("Mul", soft, graph.constant(np.float32(-1 / layer.config.decay_scale)))


def _feed_forward(graph: Graph, ffn: Any, h: str) -> str:
    c = ffn.config
    if ffn.up_proj is None:
        return graph.matmul(graph.activation(c.activation, graph.matmul(h, ffn.gate_proj)), ffn.down_proj)
    sizes = graph.constant(np.array([c.width] * 2, np.int64))
    gate, up = graph.add("Split", graph.matmul(h, ffn.gate_proj, ffn.up_proj), sizes, outputs=2, axis=-1)
    return graph.matmul(graph.add("Mul", graph.activation(c.activation, gate), up), ffn.down_proj)
