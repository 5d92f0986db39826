"""A folder for onnxruntime-genai: programs in C, C++, C#, Java and Python with tokenizer, sampling and streaming.

It is the graph of `onnx.py` under that library's names. The library knows states that are replaced whole with each call
(`recurrent_state`), each beside one of a convolution, for which a number stands here that nothing reads. It copies what
`OnnxModel` leaves in place, and goes back to no earlier token but the first.
"""

import json
from pathlib import Path
from typing import Any

from retentive.data.tokenizer import BPETokenizer, Tokenizer
from retentive.export.onnx_run import GENAI_FORMAT
from retentive.files import write_json

CONTEXT = 1 << 20
"""Tokens of a text at most, which the library wants to know: it keeps all ids."""


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises ValueError for a tokenizer that the library cannot read."""
    if not isinstance(tokenizer, BPETokenizer):
        kind = type(tokenizer).__name__
        raise ValueError(f"onnxruntime-genai reads a tokenizer.json of the tokenizers package, this model has a {kind}")


def rename(graph: Path) -> None:
    """Gives a graph of `export_onnx` the inputs and outputs that the library asks for."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    g, float32 = model.graph, onnx.TensorProto.FLOAT
    layers = sum(value.name.startswith("state.") for value in g.input)
    names = {f"state.{i}": f"past_key_values.{i}.recurrent_state" for i in range(layers)}
    names |= {f"new_state.{i}": f"present.{i}.recurrent_state" for i in range(layers)}
    names["logits"] = "last_logits"  # [B,vocabulary]; the library wants [B,1,vocabulary]
    for node in g.node:
        for edge in (node.input, node.output):
            edge[:] = [names.get(name, name) for name in edge]
    for value in (*g.input, *g.output):
        value.name = names.get(value.name, value.name)
    position = next(value for value in g.input if value.name == "position")
    logits = next(value for value in g.output if value.name == "last_logits")
    vocabulary = logits.type.tensor_type.shape.dim[-1].dim_value
    g.input.remove(position), g.output.remove(logits)
    make = onnx.helper
    g.input.append(make.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ["B", "T"]))
    g.output.append(make.make_tensor_value_info("logits", float32, ["B", 1, vocabulary]))
    for name, shape, value in (("first", [], 0), ("token_axis", [1], 1)):
        g.initializer.append(make.make_tensor(name, onnx.TensorProto.INT64, shape, [value]))
    g.node.insert(0, make.make_node("Gather", ["position_ids", "first"], ["position"], axis=1))
    g.node.append(make.make_node("Unsqueeze", ["last_logits", "token_axis"], ["logits"]))
    next(p for p in model.metadata_props if p.key == "format").value = GENAI_FORMAT  # `OnnxModel` does not run it
    for i in range(layers):
        past, present = f"past_key_values.{i}.conv_state", f"present.{i}.conv_state"
        g.input.append(make.make_tensor_value_info(past, float32, ["B", 1, 1]))
        g.output.append(make.make_tensor_value_info(present, float32, ["B", 1, 1]))
        g.node.append(make.make_node("Identity", [past], [present]))
    onnx.save_model(model, str(graph))


def write_beside(graph: Path, tokenizer: Tokenizer) -> None:
    """Writes what the library reads beside a renamed graph: genai_config.json and tokenizer_config.json."""
    assert isinstance(tokenizer, BPETokenizer)
    import onnx

    said = {p.key: p.value for p in onnx.load(str(graph), load_external_data=False).metadata_props}
    assert said["format"] == GENAI_FORMAT
    config, eos = json.loads(said["config"]), int(said["eos"])
    heads = config["heads"]
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph.name,
        "head_size": config["key_dim"] // heads,
        "hidden_size": config["dim"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": config["layers"],
        "inputs": {
            "input_ids": "input_ids",
            "position_ids": "position_ids",
            "past_recurrent_names": "past_key_values.%d.recurrent_state",
            "past_conv_names": "past_key_values.%d.conv_state",
        },
        "outputs": {
            "logits": "logits",
            "present_recurrent_names": "present.%d.recurrent_state",
            "present_conv_names": "present.%d.conv_state",
        },
    }
    model = {
        "type": "llama",  # of the types that it knows, one with nothing of its own
        "bos_token_id": eos,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "context_length": CONTEXT,
        "vocab_size": config["vocab_size"],
        "decoder": decoder,
    }
    search = {"do_sample": False, "max_length": CONTEXT, "past_present_share_buffer": False}
    write_json(graph.with_name("genai_config.json"), {"model": model, "search": search})
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizer.eos)
    write_json(graph.with_name("tokenizer_config.json"), {"tokenizer_class": "GPT2Tokenizer", **names})
