"""Files that appear whole or not at all: written beside their place, then moved there (an atomic rename).

A full disk, a crash or a Ctrl-C leaves what was there before as it was.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_together(files: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Call each function with a path beside its own, then move all files there: all are new, or all as they were.

    Raises:
        OSError: the disk is full or not writable; nothing has changed.
    """
    partial = {path: path.with_name(f".{path.name}.partial") for path in files}
    try:
        for path, write in files.items():
            partial[path].unlink(missing_ok=True)
            write(partial[path])
            with open(partial[path], "rb") as file:
                os.fsync(file.fileno())
        for path in files:
            partial[path].replace(path)
    finally:
        for path in files:
            partial[path].unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as an indented JSON file."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8, line ends as they are."""
    write_together({path: lambda partial: partial.write_text(text, encoding="utf-8", newline="\n")})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, readable by whoever may read other new files."""
    write_together({path: lambda partial: save_tensors(partial, tensors, metadata)})


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """As `write_tensors`, but right at `path`: for the functions that `write_together` and `replace_folder` call.

    Raises:
        OSError: it could not be written (the library's own error is none).
    """
    path.touch()
    mode = path.stat().st_mode  # what the umask gives; safetensors' own files are for their owner alone
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(f"cannot write {path.name}: {str(error).removeprefix('Error while serializing: ')}") from None
    path.chmod(mode)


def replace_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` into a folder beside `path`, then move it there in place of what was.

    Raises:
        OSError: the disk is full or not writable; what was at `path` is there again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    old = partial.with_name(partial.name + ".old")
    try:
        partial.chmod(0o755)
        write(partial)
        for file in partial.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if path.exists():
            path.replace(old)
        try:
            partial.replace(path)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
