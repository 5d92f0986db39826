"""`python -m benchmarks quantization`: quality loss from quantisation of a trained model in the native engine.

Compared with the model in float32 by torch: bits per byte of held-out text, and tokens until greedy texts differ. The
loss of a context's first tokens is reported separately, since rounding shows first in states that have read little. The
drift of states over a long text is relative to float64 with the same weights, in the model's own precision and the
engine's.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro
from rich.filesize import decimal
from torch import Tensor

from retentive import machine
from retentive.bench.lab.options import Say, silent
from retentive.checkpoint import load
from retentive.checkpoint.quantize import BITS, batches_of, check_quantizable, quantize
from retentive.data.packed import Packed
from retentive.data.sources import documents
from retentive.evals.heldout import summed, token_losses
from retentive.infer.generate import generate
from retentive.models import LanguageModel
from retentive.native import with_engine
from retentive.options import at_least_one
from retentive.sampling import SamplingParams
from retentive.tables import markdown

PICTURE = None
FIRST = 16
"""First tokens of a context, whose loss is reported separately."""
CHUNK = 1024
"""Tokens of a long text read at a time."""


@dataclass(frozen=True)
class Options:
    """Weights of 16, 8 and 4 bits beside float32: held-out loss, greedy texts, and states after a long text."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory or model folder of a RetNet that is not quantised."""
    data: Path
    """Packed data with held-out text."""
    text: tuple[str, ...] = ()
    """Files or folders of text to calibrate int4 on; without any, the calibrated row is left out."""
    calibration: int = 16384
    """Tokens of calibration text."""
    tokens: int = 65536
    """Tokens of held-out text."""
    length: int = 1024
    """Tokens of a window."""
    prompts: int = 16
    """Prompts, from beginnings of windows, that the model continues greedily."""
    written: int = 128
    """Tokens of each greedy continuation."""
    long: int = 100_000
    """Tokens of the long text: held-out text, repeated from its beginning."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """A row per kind of weights, and the distances of states.

    Raises:
        ValueError: the model is no RetNet or is quantised, there is no native engine or held-out text, the data have
            other tokens than the model, or a number is below 1.
    """
    at_least_one(options, "calibration", "tokens", "length", "prompts", "written", "long")
    data = Packed(options.data)
    model, tokenizer = load(options.run)
    check_quantizable(model)
    model.config.all_retention("this benchmark")  # it compares their states
    if tokenizer and tokenizer.sha256 != data.tokenizer.sha256:
        raise ValueError(
            f"{options.data} was packed with another tokenizer than the model's: pack it with {options.run}'s"
        )
    model = model.float().eval()
    with_engine(model, "native")  # refused before anything is measured
    rows: list[dict[str, Any]] = []
    beginnings = begun(data, options)
    exact: list[list[int]] = []
    for name, made, activations in forms(model, options, data):
        engine = made if made is model else with_engine(made, "native", activations)
        texts = [greedy(engine, ids, options.written) for ids in beginnings]
        exact = exact or texts
        same = [agreed(text, other) for text, other in zip(exact, texts, strict=True)]
        row = {"weights": name, "bytes": sum(x.nbytes for x in made.parameters()), **losses(engine, data, options)}
        rows.append(row | {"same_tokens": median(same), "same_texts": sum(n == options.written for n in same)})
        say(f"{name}: {row['bits_per_byte']:.4f} bits per byte")
    return {
        "what": "quantization",
        "hardware": machine.describe(),
        "run": Path(options.run).name,
        "held_out_tokens": min(options.tokens, data.meta.splits["valid"].tokens),
        "calibration": options.calibration if options.text else 0,
        "prompts": len(beginnings),
        "written": options.written,
        "rows": rows,
        "long": options.long,
        "states": distances(model, long_text(data, options.long), say),
    }


def forms(model: LanguageModel, options: Options, data: Packed) -> Iterator[tuple[str, LanguageModel, str]]:
    """Yield (name, model, activations) of each kind of weights, made on demand; the first is the model, for torch."""
    yield "float32", model, "int16"
    yield "bf16", copy.deepcopy(model).bfloat16(), "int16"
    for name, bits in BITS.items():
        quantized = quantize(model, bits)
        yield name, quantized, "int16"
        yield f"{name}, activations int8", quantized, "int8"
    if options.text:
        texts = (document for source in options.text for document in documents(source))
        batches = batches_of(texts, data.tokenizer, tokens=options.calibration)
        yield "int4, calibrated", quantize(model, BITS["int4"], batches=batches), "int16"


def losses(model: LanguageModel, data: Packed, options: Options) -> dict[str, float]:
    """Bits per byte of the held-out text, and nats a token of a context's first FIRST tokens and of the others."""
    tokens = token_losses(model, data, length=options.length, tokens=options.tokens)
    first = tokens.position < FIRST  # the first token of a context is read, not predicted
    return {
        "bits_per_byte": summed(tokens, data.held_out_bytes(options.tokens)).bits_per_byte,
        "first": float(tokens.losses[first].mean()),
        "others": float(tokens.losses[~first].mean()),
    }


def begun(data: Packed, options: Options) -> list[list[int]]:
    """The first half of each of the first windows of held-out text."""
    windows = data.held_out(length=options.length, tokens=options.prompts * options.length)
    return [window.ids[0, : (options.length + 1) // 2].tolist() for window in windows]


def greedy(model: LanguageModel, ids: list[int], count: int) -> list[int]:
    """Continue `ids` greedily with `count` tokens."""
    return [token.id for token in generate(model, ids, SamplingParams(temperature=0), max_tokens=count)]


def agreed(text: list[int], other: list[int]) -> int:
    """Number of tokens before the first difference."""
    return next((n for n, (a, b) in enumerate(zip(text, other, strict=True)) if a != b), len(text))


def long_text(data: Packed, count: int) -> Tensor:
    """Ids `[1,count]` of held-out text."""
    ids = torch.from_numpy(data.first_tokens("valid", count))
    return ids.repeat(-(-count // len(ids)))[None, :count]


@torch.no_grad()
def distances(model: LanguageModel, ids: Tensor, say: Say = silent) -> list[dict[str, Any]]:
    """Distance of the state after `ids` from float64's with the same weights, per dtype of weights and engine.

    It is the norm of the difference over the norm of float64's state, in the layer where that is largest.
    """
    found = []
    for name, dtype in {"float32": torch.float32, "bf16": torch.bfloat16}.items():
        rounded = copy.deepcopy(model).to(dtype)
        exact = after(copy.deepcopy(rounded).double(), ids)
        row: dict[str, Any] = {"weights": name}
        for engine in ("torch", "native"):
            state = after(with_engine(rounded, engine), ids)
            gaps = [float((x - y).norm() / y.norm()) for x, y in zip(state, exact, strict=True)]
            row[engine] = max(gaps)
        found.append(row)
        say(f"{name}: states {row['torch']:.1e} (torch) and {row['native']:.1e} (native) from float64's")
    return found


def after(model: LanguageModel, ids: Tensor) -> list[Tensor]:
    """The state of each layer after `ids`, float64."""
    state = None
    for part in ids.split(CHUNK, 1):
        _, state = model.hidden(part, state)
    return [x.double() for x in state.tensors()]


def table(result: dict[str, Any]) -> str:
    """A row per kind of weights, and below it the distances of states."""
    heads = ["weights", "bytes", "bits per byte", "", f"first {FIRST} tokens", "others", "likeliest tokens the same"]
    base = result["rows"][0]
    lines = []
    for row in result["rows"]:
        change = "" if row is base else f"{row['bits_per_byte'] / base['bits_per_byte'] - 1:+.3%}"
        same = "" if row is base else f"{row['same_tokens']:g} of {result['written']}"
        nats = [f"{row[key]:.4f}" for key in ("first", "others")]
        lines.append([row["weights"], decimal(row["bytes"]), f"{row['bits_per_byte']:.4f}", change, *nats, same])
    states = "; ".join(
        f"{row['weights']} {row['torch']:.1e} (torch), {row['native']:.1e} (native)" for row in result["states"]
    )
    return f"{markdown(heads, lines)}\n\nStates after {result['long']:,} tokens, from float64's: {states}"
