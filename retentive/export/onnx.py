"""Model as one ONNX graph, for prompts and for single tokens. onnxruntime runs it (extra `onnx`).

    input_ids  int64 [B,T]              logits        float32 [B,vocabulary], after the last token
    position   int64 [B]
    state.i    float32 [B,H,K,V]        new_state.i   of each block of retention
    keys.i     float32 [B,kv_heads,S,K] new_keys.i    of each block of attention; values.i, and gates.i [B,H,S] if it
                                                      has a forget gate, likewise
    rows.i     float32 [B,D,n-1]        new_rows.i    of each convolution over n tokens

`position` is the number of tokens that each sequence has read. A memory may be bound to its input and its output at
once, if the runtime reads it before it writes (`onnx_run` checks that). The caller chooses the slots S of a cache, the
same for all blocks of one window W: at least the tokens of the text, or W + T - 1. `onnx_mixers.py` has the details.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from retentive.export.models import check_model
from retentive.export.onnx_graph import MICROSOFT, Graph, groups_of_columns, integers, shift
from retentive.export.onnx_mixers import MIXERS, memories, positions_of, shared
from retentive.export.onnx_run import FORMAT
from retentive.layers.quantized import Quantized
from retentive.models import LanguageModel

OPSET, STANDARD_OPSET = 24, 27
LARGEST = 1_900_000_000
"""Maximum bytes of weights in one file. Protocol buffers end at 2 GiB; more goes into a file beside it."""


def export_onnx(model: LanguageModel, path: Path, *, eos: int, standard: bool = False) -> None:
    """Writes the graph to `path`, with `path`.data beside it if one file is too small for the weights.

    Args:
        eos: id of the end-of-text token.
        standard: only standard operators of opset 27, for any runtime. onnxruntime is slower with them.

    Raises:
        ValueError: the model is of another library, sees or hears, or has groups that are not a power of 2.
        ImportError: onnx is missing (extra `onnx`).
    """
    try:
        import onnx
    except ImportError:
        raise ImportError("ONNX graphs are written by onnx: pip install 'retentive[onnx]'") from None
    check_exportable(model)
    graph = Graph(standard)
    _network(graph, model)
    c = model.config
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    kept = {name: shape for i, mixer in enumerate(c.mixers) for name, shape in memories(mixer, i).items()}
    value = onnx.helper.make_tensor_value_info
    inputs = [value("input_ids", int64, ["B", "T"]), value("position", int64, ["B"])]
    inputs += [value(name, float32, shape) for name, shape in kept.items()]
    outputs = [value("logits", float32, ["B", c.vocab_size])]
    outputs += [value(f"new_{name}", float32, shape) for name, shape in kept.items()]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, "retentive", inputs, outputs, graph.weights),
        opset_imports=[onnx.helper.make_opsetid("", STANDARD_OPSET if standard else OPSET)]
        + ([] if standard else [onnx.helper.make_opsetid(MICROSOFT, 1)]),
        producer_name="retentive",
        ir_version=10,
    )
    said = {"format": FORMAT, "eos": str(eos), "config": json.dumps(c.written()), "windows": json.dumps(c.windows)}
    onnx.helper.set_model_props(made, said)
    beside = sum(len(weight.raw_data) for weight in graph.weights) > LARGEST
    where: dict[str, Any] = {"save_as_external_data": True, "location": f"{path.name}.data"} if beside else {}
    onnx.save_model(made, str(path), **where)


def check_exportable(model: LanguageModel) -> None:
    """Raises ValueError for a model that has no ONNX graph."""
    check_model(model)
    unknown = ("head_norm_joint", "output_gate", "position_scale")
    if found := [name for name in unknown if any(getattr(m, name, False) for m in model.config.mixers)]:
        raise ValueError(f"a model with {', '.join(found)} has no ONNX graph: export it to native, browser or hf")
    if any(model.config.sinks):
        raise ValueError("a model with attention sinks has no ONNX graph: export it to native or browser")
    for module in model.modules():
        if isinstance(module, Quantized) and module.group & (module.group - 1):
            raise ValueError(f"a group of {module.group} integers: onnxruntime takes those of 16, 32, 64, 128 and 256")


def _network(graph: Graph, model: Any) -> None:
    """Adds the whole model, from ids to logits and states."""
    c, at, tables = model.config, positions_of(graph), dict[Any, dict[str, str]]()
    x = _embedded(graph, model)
    for i, block in enumerate(model.blocks):
        layer = block.mixer
        if layer.config not in tables:  # shared by blocks of an equal mixer
            tables[layer.config] = shared(graph, layer.config, at, i)
        h = graph.norm(x, block.mixer_norm.weight, c.dim, c.norm_eps)
        x = graph.add("Add", x, MIXERS[block.kind](graph, layer, h, i, tables[layer.config]))
        if block.ffn is not None:
            h = graph.norm(x, block.ffn_norm.weight, c.dim, c.norm_eps)
            x = graph.add("Add", x, _feed_forward(graph, block.ffn, h))
    x = graph.add("Gather", x, graph.number(-1), axis=1)  # only the last token
    if c.final_norm:
        x = graph.norm(x, model.norm.weight, c.dim, c.norm_eps)
    if isinstance(model.head, Quantized):
        logits = graph.matmul(x, model.head)
        graph.add("Identity", logits, names=["logits"])
    else:  # laid out as the embedding, so that tied weights are one
        weight = graph.constant(model.head.weight.float(), key=("rows", id(model.head.weight)))
        graph.add("Gemm", x, weight, names=["logits"], transB=1)


def _embedded(graph: Graph, model: Any) -> str:
    """Adds the embedding and returns x `[B,T,D]` of input_ids."""
    c, embed = model.config, model.embed
    if not isinstance(embed, Quantized):
        weight = graph.constant(embed.weight.float(), key=("rows", id(embed.weight)))
        x = graph.add("Gather", weight, "input_ids", axis=0)
    else:
        q, scale = integers([embed])
        if graph.standard:
            x = graph.add("Gather", graph.dequantized(embed, q, scale, (id(embed.weight),)), "input_ids", axis=0)
        else:
            # whole rows, not groups; the last group of a row may be short
            rows = q.reshape(len(q), -1)[:, : embed.columns * embed.bits // 8]
            key = id(embed.weight)
            named = graph.constant(rows, key=("rows", key)), graph.constant(scale, key=("scale", key))
            how: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": embed.group, "bits": embed.bits}
            x = graph.add("GatherBlockQuantized", named[0], "input_ids", named[1], domain=MICROSOFT, **how)
        if embed.minimum is not None:
            shifts = graph.add("Gather", graph.constant(shift(embed)), "input_ids", axis=0)
            x = graph.add("Add", x, graph.add("MatMul", shifts, graph.constant(groups_of_columns(embed).T)))
    if c.embed_scale:
        x = graph.add("Mul", x, graph.constant(np.float32(c.dim**0.5)))
    return graph.norm(x, model.embed_norm.weight, c.dim, c.norm_eps) if c.embed_norm else x


def _feed_forward(graph: Graph, ffn: Any, h: str) -> str:
    c = ffn.config
    if ffn.up_proj is None:
        return graph.matmul(graph.activation(c.activation, graph.matmul(h, ffn.gate_proj)), ffn.down_proj)
    sizes = graph.numbers(c.width, c.width)
    gate, up = graph.add("Split", graph.matmul(h, ffn.gate_proj, ffn.up_proj), sizes, outputs=2, axis=-1)
    return graph.matmul(graph.add("Mul", graph.activation(c.activation, gate), up), ffn.down_proj)
