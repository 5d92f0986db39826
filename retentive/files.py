"""Atomic file writes: a file or folder is written under a temporary name beside its target, then renamed over it.

A rename is atomic, so a full disk, a crash or Ctrl-C leaves the previous content in place. `only_writer` locks a
folder against a second writing process.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def write_together(files: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Writes several files that belong together. Either all of them are replaced or none is.

    Args:
        files: maps each path to the function that writes its content, called with a temporary path beside it.

    Missing parent folders are created.

    Raises:
        OSError: the disk is full or not writable, or a path exists and is not a regular file. Nothing has changed.
    """
    for path in files:
        check_place(path)
    partial = {path: path.with_name(f".{path.name}.partial") for path in files}
    try:
        for path, write in files.items():
            with naming(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                partial[path].unlink(missing_ok=True)
                write(partial[path])
                _flush_to_disk(partial[path])
        # Writing is done before the first rename, so a full disk fails while every target is still intact.
        for path in files:
            with naming(path):
                partial[path].replace(path)
    finally:
        for path in files:
            with suppress(OSError):
                partial[path].unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Raises OSError if `path` does not exist or is not a regular file (a folder, a pipe)."""
    if not path.exists():
        raise FileNotFoundError(f"no file at {path}")
    if not path.is_file():
        raise OSError(f"{path} is no file")


def check_place(path: Path) -> None:
    """Raises OSError if no file can be written at `path`. Creates nothing, so a long job can check before it starts."""
    with naming(path):
        if path.exists() and not path.is_file():  # a rename would replace even a device file
            what = "a folder" if path.is_dir() else "no regular file"
            raise FileExistsError(f"cannot write {path}: it is {what}, choose another")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(above, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_places(*paths: Path | None) -> None:
    """Runs `check_place` on several paths; None is skipped.

    Raises:
        OSError: as in `check_place`.
        ValueError: two paths are the same, so the second file would replace the first.
    """
    wanted = [path for path in paths if path is not None]
    for path in wanted:
        check_place(path)
    if len({path.resolve() for path in wanted}) < len(wanted):
        raise ValueError(f"two files would be written to {wanted[-1]}: choose another name for one of them")


def make_folder(path: Path) -> None:
    """Creates the folder and its missing parents.

    Raises:
        OSError: the folder cannot be created, or a file has its name.
    """
    with naming(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Rewrites system errors to name `path`, the target the user gave, instead of the temporary file beside it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(f"cannot write {path}: {error.strerror or error} (choose another place)") from None


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes `text` in UTF-8 atomically, with its line ends unchanged."""
    write_together({path: lambda partial: partial.write_text(text, encoding="utf-8", newline="\n")})


def write_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Writes one safetensors file atomically, with the default permissions of new files."""
    write_together({path: lambda partial: save_tensors(partial, tensors, metadata)})


def save_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Writes one safetensors file directly to `path`, for use inside `write_together` and `replace_folder`.

    The output is deterministic: equal tensors and metadata give equal bytes.

    Raises:
        OSError: writing failed (safetensors itself raises another kind of error).
    """
    path.touch()
    mode = path.stat().st_mode  # permissions by the umask; safetensors creates files that only their owner can read
    try:
        from safetensors.torch import save_file  # imports torch, which other writers of files do without

        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
        _order_metadata(path)
    except SafetensorError as error:
        if code := re.search(r"\(os error (\d+)\)", str(error)):  # raise it as a system error, for `naming`
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from None
        raise OSError(f"cannot write {path}: {str(error).removeprefix('Error while serializing: ')}") from None
    path.chmod(mode)


def _order_metadata(path: Path) -> None:
    """Sorts the metadata in the header of a safetensors file, which the library writes in random order.

    The format is the header's length in eight bytes, the header in JSON, then the tensor data
    (https://github.com/huggingface/safetensors#format). The sorted header replaces the old one, padded with spaces.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:  # always true as long as both serialisers write compact JSON
            file.seek(8)
            file.write(ordered.ljust(length))


@contextmanager
def opened_tensors(path: Path) -> Iterator[Any]:
    """Opens one safetensors file, whose tensors are views of it while it is open.

    Raises:
        ValueError: the file is truncated or not in safetensors format.
        MemoryError: the tensors do not fit in memory.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        why = str(error).replace("`", "'")  # backticks mark our own options (`retentive.options`)
        raise ValueError(f"{path} is not a complete safetensors file ({why}): copy or save it again") from None
    except RuntimeError as error:  # raised by torch's allocator and by mmap
        raise MemoryError(f"no memory for {path}: {str(error).splitlines()[0]}") from None


def load_tensors(path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Reads one safetensors file and returns (tensors by name, metadata); raises as `opened_tensors`."""
    with opened_tensors(path) as file:
        # Cloned: get_tensor returns views of the mapped file. A view keeps the whole file mapped, and reading one
        # after the file was truncated ends the process (SIGBUS).
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        return tensors, file.metadata() or {}


def replace_folder(path: Path, write: Callable[[Path], T]) -> T:
    """Replaces the folder at `path` by a new one that `write` fills, and returns the result of `write`.

    Args:
        write: called with a temporary folder beside `path`.

    Raises:
        OSError: the disk is full or not writable. The previous folder is in place again.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    old = partial.with_suffix(".old")
    try:
        partial.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        result = write(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        # A folder cannot be renamed over one that holds files. A process killed between the two renames leaves
        # `old`, which the next `only_writer` puts back.
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


def file_sha256(*paths: Path) -> str:
    """Returns the SHA-256 hash of the files' concatenated bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_crc32(path: Path) -> int:
    """Returns the CRC-32 of the file. It detects damage faster than a hash, but is no protection against tampering."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def _flush_to_disk(file: Path) -> None:
    """Calls fsync. Without it a rename may reach the disk before the data, and a power cut leaves an empty file."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Holds a lock file beside `path`, so that no other process writes it during the block.

    Creates the parent folder and cleans up after a killed `replace_folder`.

    Raises:
        BlockingIOError: another process is writing `path`.
        OSError: nothing can be written there.
        ValueError: the path has no final name, as "." or "/".
    """
    if not path.name:
        raise ValueError(f"cannot write {path}: give a folder with a name of its own")
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()  # raises the disk's own error; FileLock would report some as a lock held by another process
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
        # Deleted while still locked: after the release it could already belong to another process.
        with suppress(OSError):  # Windows cannot delete an open file
            lock.unlink()
        held.release()


def _clear_partial(path: Path) -> None:
    """Deletes leftovers of killed `replace_folder` calls beside `path`, or puts back a folder that was only moved."""
    temporary = re.compile(rf"\.{re.escape(path.name)}\.\w{{8}}\.(partial|old)")  # named by mkdtemp
    for entry in [entry for entry in path.parent.iterdir() if temporary.fullmatch(entry.name)]:
        if entry.suffix == ".old" and not path.exists():
            entry.replace(path)
        else:
            shutil.rmtree(entry, ignore_errors=True)
