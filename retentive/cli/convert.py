"""`retentive convert`: a model folder in another layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from retentive.checkpoint import ModelFolder, save_model
from retentive.cli.loading import Limits
from retentive.cli.parsing import parse
from retentive.files import replace_folder


@dataclass(frozen=True)
class ConvertCommand(Limits):
    """Read a model in any known layout (detected) and write it in another."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory, model folder, .gguf file, the shipped model novels, hf:owner/name on the hub, or pypi:NAME."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to make."""
    to: Literal["retentive", "torchscale", "syncdoth", "fla", "llama"] = "retentive"
    """Layout of the new folder. Its architecture must be able to represent the model."""
    merge: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """LoRA adapter of the model (a run with --lora) to merge into the new one."""


def main(argv: list[str]) -> None:
    """`retentive convert ARGV`."""
    command = parse(ConvertCommand, "retentive convert", argv)
    # before loading, which is slow; `replace_folder` alone would replace the folder
    if command.out.exists():
        raise FileExistsError(f"{command.out} exists: choose another folder, nothing is overwritten")
    source = command.limited(command.source)
    change = None if command.merge is None else ModelFolder.open(command.merge)
    model, template = source.model(adapter=change), (change or source).template_source
    replace_folder(
        command.out, lambda folder: save_model(folder, model, source.tokenizer, template=template, layout=command.to)
    )
    print(f"{command.source} -> {command.out} ({command.to} layout)")
