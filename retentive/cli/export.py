"""`retentive export`: a model for another runtime, in a folder of its own, held against the model it came from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from retentive.checkpoint.io import find, load_with_tokenizer
from retentive.checkpoint.quantize import BITS, quantization_of, quantize
from retentive.cli.info import megabytes
from retentive.cli.progress import say
from retentive.data.templates import TEMPLATE, template_of
from retentive.export.onnx import check_exportable, export_onnx
from retentive.export.onnx_run import OnnxModel
from retentive.files import only_writer, replace_folder, write_text
from retentive.models import LanguageModel

GRAPH = "model.onnx"
CHECKED = 64
"""Tokens that are read to see that the graph gives what the model does."""
FAR, FAR_OF_INTEGERS = 1e-3, 0.1
"""The largest difference of logits, of the logits' own size, that is no mistake. Where weights are integers,
onnxruntime rounds what they are multiplied with to 8 bits too."""


@dataclass(frozen=True)
class ExportCommand:
    """Write a model for another runtime: a graph, its tokenizer and its chat template, in a folder."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory or model folder, of floats or as `retentive quantize` makes it, or hf:owner/name on the hub."""
    to: Literal["onnx"]
    """onnx: one graph, for onnxruntime."""
    out: Path
    """Folder to make."""
    weights: Literal["stored", "int8", "int4"] = "stored"
    """Quantise before; `retentive quantize --text` makes better integers of 4 bits."""
    standard: bool = False
    """Standard operators only (opset 27), which any runtime may have: slower in onnxruntime than its own."""
    tokenizer: str | None = None
    """A tokenizer (bytes, or a tokenizer.json) for models that come without one."""


def main(argv: list[str]) -> None:
    run(tyro.cli(ExportCommand, prog="retentive export", args=argv))


def run(command: ExportCommand) -> None:
    """Load, write, compare, and say how large it is."""
    with only_writer(command.out):
        if command.out.exists() or command.out.is_symlink():
            raise FileExistsError(f"{command.out} exists: choose another folder, nothing is overwritten")
        model, tokenizer = load_with_tokenizer(command.source, command.tokenizer)
        check_exportable(model)
        if command.weights != "stored":
            model = quantize(model, BITS[command.weights])
        model = model.float().eval()
        template = template_of(find(command.source))
        far: list[float] = []

        def write(folder: Path) -> None:
            export_onnx(model, folder / GRAPH, eos=tokenizer.eos_id, standard=command.standard)
            tokenizer.save(folder)
            if template is not None:
                write_text(folder / TEMPLATE, template)
            far.append(difference(model, folder / GRAPH))

        replace_folder(command.out, write)
    size = sum(file.stat().st_size for file in command.out.iterdir() if file.name.startswith(GRAPH))
    say(f"{command.out / GRAPH}: {megabytes(size)}; the next token's logits differ from the model's by {far[0]:.1e}")
    say(f"next: retentive generate {command.out / GRAPH} --prompt …")


def difference(model: LanguageModel, graph: Path) -> float:
    """The largest difference of logits between the graph and the model, over the size of these; forms are mixed.

    Raises:
        ValueError: it is too large: another version of onnxruntime, perhaps.
    """
    ids = [int(n) for n in np.random.default_rng(0).integers(0, model.config.vocab_size, CHECKED)]
    exported, state, worst = OnnxModel(graph), None, 0.0
    with torch.no_grad():
        for begin, end in ((0, CHECKED // 2), *((n, n + 1) for n in range(CHECKED // 2, CHECKED))):
            logits, state = model(torch.tensor([ids[begin:end]]), state)
            wanted: Any = logits[0, -1].numpy()
            worst = max(worst, float(np.abs(exported.read(ids[begin:end]) - wanted).max() / np.abs(wanted).max()))
    if not worst <= (FAR_OF_INTEGERS if quantization_of(model) else FAR):  # NaN fails too
        raise ValueError(f"the graph's logits differ from the model's by {worst:.1e} of their size: nothing is written")
    return worst
