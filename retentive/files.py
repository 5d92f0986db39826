"""Files that appear whole or not at all: written under another name beside the target, then renamed over it.

A rename is atomic, so that a full disk, a crash or a Ctrl-C leaves what was there before. `only_writer` keeps two
processes from writing one folder at once.
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
    """Writes several files that belong together: all are new afterwards, or all are as they were.

    Args:
        files: for each path the function that writes its content, called with a temporary path beside it.

    Folders are made if need be.

    Raises:
        OSError: the disk is full or not writable, or what is there is no file; nothing has changed.
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
        # All that can fail for want of space has been done by now: no file is renamed before the last one is written.
        for path in files:
            with naming(path):
                partial[path].replace(path)
    finally:
        for path in files:
            with suppress(OSError):
                partial[path].unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Raises OSError where nothing is, or something that is no file, as a folder or a pipe."""
    if not path.exists():
        raise FileNotFoundError(f"no file at {path}")
    if not path.is_file():
        raise OSError(f"{path} is no file")


def check_place(path: Path) -> None:
    """Raises OSError where no file can be put at `path`, so that it is known before hours of work; makes nothing."""
    with naming(path):
        if path.exists() and not path.is_file():  # a rename would replace even a device
            what = "a folder" if path.is_dir() else "no regular file"
            raise FileExistsError(f"cannot write {path}: it is {what}, choose another")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(above, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_places(*paths: Path | None) -> None:
    """As `check_place` for each of several files (None for one that is not wanted).

    Raises:
        OSError: as `check_place`.
        ValueError: two of them are the same: the second would replace the first.
    """
    wanted = [path for path in paths if path is not None]
    for path in wanted:
        check_place(path)
    if len({path.resolve() for path in wanted}) < len(wanted):
        raise ValueError(f"two files would be written to {wanted[-1]}: choose another name for one of them")


def make_folder(path: Path) -> None:
    """Makes the folder and those above it, if need be.

    Raises:
        OSError: it cannot be made, or there is a file.
    """
    with naming(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system name `path`, as its user did, and not a file beside it; others stay as they are."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(f"cannot write {path}: {error.strerror or error} (choose another place)") from None


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as an indented JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes `text` in UTF-8, its line ends kept as they are, whole or not at all."""
    write_together({path: lambda partial: partial.write_text(text, encoding="utf-8", newline="\n")})


def write_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Writes one safetensors file, whole or not at all, with the permissions that new files have here."""
    write_together({path: lambda partial: save_tensors(partial, tensors, metadata)})


def save_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """As `write_tensors`, but directly to `path`: for the functions that `write_together` and `replace_folder` call.

    The same tensors and metadata are the same bytes.

    Raises:
        OSError: it could not be written (safetensors itself raises an error of another kind).
    """
    path.touch()
    mode = path.stat().st_mode  # as the umask has it; safetensors makes files that their owner alone may read
    try:
        from safetensors.torch import save_file  # and with it torch, which not all who write files need

        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
        _order_metadata(path)
    except SafetensorError as error:
        if code := re.search(r"\(os error (\d+)\)", str(error)):  # as the system's own errors, which get a place's name
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from None
        raise OSError(f"cannot write {path}: {str(error).removeprefix('Error while serializing: ')}") from None
    path.chmod(mode)


def _order_metadata(path: Path) -> None:
    """Puts the metadata of a safetensors file, which the library writes in an order of chance, into that of its names.

    The file: the header's length in eight bytes, the header in JSON, the numbers
    (https://github.com/huggingface/safetensors#format). The new header takes the place of the old, spaces after it.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:  # always, while both write JSON as short as it can be
            file.seek(8)
            file.write(ordered.ljust(length))


def load_tensors(path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """(tensors by name, metadata) of one safetensors file.

    Raises:
        ValueError: it is cut short, or no safetensors file.
        MemoryError: it does not fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # Copied, since get_tensor gives views of the mapped file: they would keep all of it in memory, and reading
            # one after somebody has cut the file short would end the process (SIGBUS).
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): copy or save it again") from None
    except RuntimeError as error:  # torch's, of its allocator and of mmap
        raise MemoryError(f"no memory for {path}: {str(error).splitlines()[0]}") from None


def replace_folder(path: Path, write: Callable[[Path], T]) -> T:
    """What `write` returns, which fills a new folder; that folder then replaces the one at `path`.

    Args:
        write: called with a temporary folder beside `path`, which it fills.

    Raises:
        OSError: the disk is full or not writable; what was at `path` is there again.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    old = partial.with_suffix(".old")
    try:
        partial.chmod(0o755)  # mkdtemp's folders are for their owner alone
        result = write(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        # A folder cannot be renamed over one that holds files. Killed between the two renames, a process leaves
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
    """The hash of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_crc32(path: Path) -> int:
    """A sum of the file's bytes, to find damage: faster than a hash, and no proof against anybody."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def _flush_to_disk(file: Path) -> None:
    """Else a power cut may leave an empty file under the new name: a rename can reach the disk before the data."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """No other process writes `path` in this block, by a lock file beside it.

    The parent folder is made, and what a killed `replace_folder` has left is cleaned up.

    Raises:
        BlockingIOError: another process is writing it.
        OSError: nothing can be written there.
        ValueError: a path that ends in no name, such as "." or "/".
    """
    if not path.name:
        raise ValueError(f"cannot write {path}: give a folder with a name of its own")
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()  # on some errors of the disk FileLock would say that another process holds it
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
        # Removed while it is held: after the release another process might hold it already, and lose its file.
        with suppress(OSError):  # Windows removes no file that is open
            lock.unlink()
        held.release()


def _clear_partial(path: Path) -> None:
    """Deletes what killed calls of `replace_folder` left beside `path`; puts back a folder that was moved away only."""
    temporary = re.compile(rf"\.{re.escape(path.name)}\.\w{{8}}\.(partial|old)")  # as mkdtemp names them
    for entry in [entry for entry in path.parent.iterdir() if temporary.fullmatch(entry.name)]:
        if entry.suffix == ".old" and not path.exists():
            entry.replace(path)
        else:
            shutil.rmtree(entry, ignore_errors=True)
