"""Quantises the model of a folder into a new folder.

quantize_folder("runs/novels", "novels-int4", to="int4", text=["books/"])
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from retentive.checkpoint.folder import ModelFolder
from retentive.checkpoint.quantize import BITS, batches_of, check_quantizable, quantize
from retentive.checkpoint.save import save_model
from retentive.data.sources import Document, documents
from retentive.data.tokenizer import Tokenizer
from retentive.files import only_writer, replace_folder
from retentive.options import option


class Quantised(NamedTuple):
    """Result of `quantize_folder`."""

    before: int
    """Bytes of the model that was given; of a GGUF file its size."""
    after: int
    """Bytes of the new model."""
    tokens: int
    """Tokens that it was calibrated on."""


def quantize_folder(
    source: str | Path | ModelFolder,
    out: str | Path,
    *,
    to: str = "int8",
    text: Sequence[str] = (),
    tokens: int = 32768,
    group: int | None = None,
    asymmetric: bool = False,
    tokenizer: str | Tokenizer | None = None,
    progress: Callable[[int, int], object] = lambda done, blocks: None,
    say: Callable[[str], None] = warnings.warn,
) -> Quantised:
    """Writes the folder `out` with 8-bit or 4-bit matrices, as a whole or not at all.

    Args:
        to: "int8" or "int4".
        text: files or folders of text to calibrate on, similar to the model's use; improves 4-bit weights.
        tokens: number of tokens of that text to read.
        group: weights per scale, a multiple of 16 up to 256; by default 128 for int8, 32 for int4 and for GGUF files.
        asymmetric: int4 with a minimum for each group: 5 bits a weight instead of 4.5, and a smaller error.
        tokenizer: tokenizer for a model without one.
        progress: called with the blocks that are done, and all blocks.
        say: called with a line about each file of a folder that is left out.

    Raises:
        FileExistsError: `out` exists.
        ValueError: an invalid option, or a model that cannot be quantised.
    """
    if to not in BITS:
        raise ValueError(f"{option('to', to)}: expected one of {', '.join(BITS)}")
    if tokens < 1:
        raise ValueError(f"{option('tokens', tokens)}: must be at least 1")
    out, batches = Path(out), list[Tensor]()
    with only_writer(out):  # from the start: it takes long, and another process may want the folder
        if out.exists() or out.is_symlink():
            raise FileExistsError(f"{out} exists: choose another folder, nothing is overwritten")
        folder = ModelFolder.open(source)
        own = folder.tokenizer_for_text(tokenizer) if text or tokenizer else folder.tokenizer
        model = folder.model(dtype=None if folder.group is None else "float32")
        check_quantizable(model)
        if text:
            batches = batches_of(_documents(text, say), folder.tokenizer_for_text(own), tokens=tokens)
        made = quantize(
            model, BITS[to], folder.group if group is None else group, batches=batches, asymmetric=asymmetric,
            progress=progress,
        )  # fmt: skip
        replace_folder(out, lambda path: save_model(path, made, own, template=folder.template_source))
    before, after = (sum(x.nbytes for x in m.parameters()) for m in (model, made))
    if folder.gguf:  # the floats exist here only
        before = folder.gguf.path.stat().st_size
    return Quantised(before, after, sum(ids.numel() for ids in batches))


def _documents(sources: Sequence[str], say: Callable[[str], None]) -> Iterator[Document]:
    """Yields all documents of these sources."""
    for source in sources:
        yield from documents(source, say=say)
