"""Texts as training data: packed into a folder beside the run, once; and rows that little text can fill.

packed([Path("my.txt")], Path("runs/mine"), tokenizer="train")       runs/mine-data-5d41402a
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from retentive.data.prepare import Progress, prepare
from retentive.data.sources import source_files
from retentive.data.tokenizer import load_tokenizer
from retentive.files import file_sha256
from retentive.train.log import say

Shown = Callable[[], AbstractContextManager[Progress | None]]


def is_text(path: Path) -> bool:
    """True for a file or folder that `retentive data` has not packed; False for one that does not exist."""
    packed_once = (path / "meta.json").is_file() or any(path.glob("train-*.bin"))  # or what is left of it
    return path.exists() and not packed_once


def packed(sources: Sequence[Path], out: Path, *, tokenizer: str, shown: Shown, quiet: bool = False) -> Path:
    """Returns the folder OUT-data-HASH with the packed text of files and folders; packs it if it is not there.

    Args:
        tokenizer: as `DataConfig.tokenizer`.
        shown: makes a context that shows the progress of packing; it gives the progress callback.

    Raises:
        ValueError, OSError: as `prepare`.
    """
    files = [(name, file_sha256(path)) for source in sources for name, path in source_files(source).items()]
    words = tokenizer if tokenizer == "train" else load_tokenizer(tokenizer).sha256
    digest = hashlib.sha256(repr((words, files)).encode()).hexdigest()[:8]
    folder = out.with_name(f"{out.name}-data-{digest}")
    if not (folder / "meta.json").is_file():
        say(f"packing {', '.join(map(str, sources))} into {folder}", quiet=quiet)
        with shown() as progress:
            how: dict[str, Any] = {"tokenizer": tokenizer, "progress": progress, "advise": False}
            prepare(list(sources), folder, say=lambda line: say(line, quiet=quiet), **how)
    return folder


def filled(batch: int, length: int, tokens: int, fixed: Collection[str], *, carry: bool) -> tuple[int, int]:
    """Returns (batch, length), smaller if the text has too few tokens for one batch (`loader.Batches`).

    Args:
        fixed: names of the two that stay as they are.
        carry: each row continues the one before, so that a batch needs as many different rows.
    """
    rows = batch if carry else 1
    if tokens > rows * length or tokens < 2:
        return batch, length
    if carry and "batch" not in fixed:
        batch = rows = max(1, (tokens - 1) // length)
    if "length" not in fixed:
        length = min(length, max(1, (tokens - 1) // rows))
    return batch, length
