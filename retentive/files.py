"""Files that appear whole or not at all: written beside their place, then moved there (an atomic rename).

A full disk, a crash or a Ctrl-C leaves what was there before as it was. Two processes at once on one folder are kept
apart by `only_writer`.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

T = TypeVar("T")


def write_together(files: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Call each function with a path beside its own, then move all files there: all are new, or all as they were.

    Folders are made if need be.

    Raises:
        OSError: the disk is full or not writable, or what is there is no file; nothing has changed.
    """
    for path in files:
        check_place(path)
    partial = {path: path.with_name(f".{path.name}.partial") for path in files}
    try:
        for path, write in files.items():
            with _naming(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                partial[path].unlink(missing_ok=True)
                write(partial[path])
                with open(partial[path], "rb") as file:
                    os.fsync(file.fileno())
        for path in files:
            with _naming(path):
                partial[path].replace(path)
    finally:
        for path in files:
            with suppress(OSError):
                partial[path].unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raises OSError where no file can be put at `path`, so that it is known before hours of work; makes nothing."""
    with _naming(path):
        if path.exists() and not path.is_file():  # a rename would replace even a device
            what = "a folder" if path.is_dir() else "no regular file"
            raise FileExistsError(f"cannot write {path}: it is {what}, choose another")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(above, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def make_folder(path: Path) -> None:
    """Makes the folder and those above it, if need be.

    Raises:
        OSError: it cannot be made, or there is a file.
    """
    with _naming(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the system name `path`, as its user did, and not a file beside it; others stay as they are."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(f"cannot write {path}: {error.strerror or error} (choose another place)") from None


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


def replace_folder(path: Path, write: Callable[[Path], T]) -> T:
    """What `write` returns, called with a folder beside `path`, which is then moved there in place of what was.

    Raises:
        OSError: the disk is full or not writable; what was at `path` is there again.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    old = partial.with_suffix(".old")
    try:
        partial.chmod(0o755)
        result = write(partial)
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
        return result
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Holds the lock beside `path`, its folder made and what a killed `replace_folder` left there cleaned up.

    Raises:
        BlockingIOError: another process holds it.
        OSError: nothing can be written there.
    """
    if not path.name:
        raise ValueError(f"cannot write {path}: give a folder with a name of its own")
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()  # FileLock takes some errors of the disk for another process
        held = FileLock(lock, timeout=0)
        held.acquire()
    except Timeout:
        raise BlockingIOError(f"{path} is being written by another process: wait for it, or choose another") from None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise type(error)(f"cannot write {path}: {why} ({error.filename or path.parent}), choose another") from None
    try:
        _clear_partial(path)
        yield
    finally:
        with suppress(OSError):  # Windows keeps files that are open
            lock.unlink()
        held.release()


def _clear_partial(path: Path) -> None:
    """Deletes unfinished folders of `path`; one killed between its two moves gets back what was there."""
    made = re.compile(rf"\.{re.escape(path.name)}\.\w{{8}}\.(partial|old)")
    for left in [entry for entry in path.parent.iterdir() if made.fullmatch(entry.name)]:
        if left.suffix == ".old" and not path.exists():
            left.replace(path)
        else:
            shutil.rmtree(left, ignore_errors=True)
