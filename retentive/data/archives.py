"""Members of archives and rows of arrays, named like files: one file on disk instead of very many.

    pics.zip/1.png       a member of a .zip or of a plain .tar
    digits.npy[5]        a picture: row 5 of an array, counted from 0
    clips.npy[5]@8000    a sound: row 5, and its sampling rate in Hz, which an array does not hold

Members are read where they lie: nothing is unpacked. Arrays of Python objects, which need pickle, are refused. A file
that has such a name itself is that file.
"""

import mmap
import os
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from retentive.data.formats import COMPRESSED, unreadable
from retentive.options import quoted

KEPT = 8
"""Number of archives and arrays that stay open."""
ARCHIVES = (".zip", ".tar")
SQUEEZED = (*COMPRESSED, ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
"""Suffixes of compressed tars, which can be read from the beginning only."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Accepted compression of a .zip's members: zipfile unpacks others without a limit, whatever size the member states."""
MAGIC = b"\x93NUMPY"
ROW = re.compile(r"\[([0-9]{1,18})\](?:@([0-9]{1,9}))?")


class Row(NamedTuple):
    """A row of an array: a picture or a sound."""

    values: np.ndarray
    """`[...]`, mapped from the file and read when used."""
    rate: int | None
    """Sampling rate in Hz as named; None if none is."""


Get = Callable[[str, Path, int], bytes | Row]
"""(name within the file, whole path for errors, maximum bytes) -> what is there."""


def split(path: Path) -> tuple[Path, str]:
    """Returns the file on disk, and the name within it: `1.png` or `[5]`; "" for a path that names a whole file."""
    if path.is_file():
        return path, ""
    name, inside, row = path.name.rpartition(".npy[")
    if inside and (array := path.with_name(f"{name}.npy")).is_file():
        return array, f"[{row}"
    for above in path.parents:
        if above.suffix.lower() in (*ARCHIVES, *SQUEEZED) and above.is_file():
            return above, path.relative_to(above).as_posix()
    return path, ""


class Archives:
    """Archives and arrays, each opened once; the KEPT last used stay open, so a file must not change meanwhile.

    May be used by several threads, and after a fork.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, Get | str] = OrderedDict()  # a str is the error of a file that cannot be read
        self._lock, self._process = Lock(), os.getpid()

    def read(self, path: Path, most: int) -> bytes | Row | None:
        """Returns the bytes of a member, or a row of an array; None for a path that names a whole file.

        Args:
            most: maximum bytes of a member; checked before it is read.

        Raises:
            OSError: the archive cannot be read.
            ValueError: it is damaged, compressed as a whole or no archive; it has no such member or row; or the member
                is too large, encrypted or no regular file.
        """
        file, name = split(path)
        if not name and file.suffix.lower() != ".npy":
            return None
        if ".." in name.split("/"):
            raise ValueError(f"{path}: '..' leads out of the archive; name a member of it")
        return self._opened(file)(name, path, most)

    def _opened(self, file: Path) -> Get:
        with self._lock:
            if self._process != os.getpid():  # a fork shares the files' positions with its parent
                self._open.clear()
                self._process = os.getpid()
            if file not in self._open:
                try:
                    self._open[file] = _get(file)
                except ValueError as error:  # kept too: the next member would take as long to fail
                    self._open[file] = str(error)
            self._open.move_to_end(file)
            if len(self._open) > KEPT:
                self._open.popitem(last=False)  # closed when no thread reads it any more
            get = self._open[file]
        if isinstance(get, str):
            raise ValueError(get)
        return get


def _get(file: Path) -> Get:
    """Opens an archive or an array, and returns the function that reads from it."""
    suffix = file.suffix.lower()
    if suffix in SQUEEZED:
        raise ValueError(f"{file}: compressed as a whole, so members cannot be found; use .zip, or .tar by itself")
    kind, cure, get = {
        ".zip": ("zip", "zip the files again", _zip),
        ".tar": ("plain tar", "make it again, without compression", _tar),
        ".npy": ("array of numbers", "write it by np.save", _npy),
    }[suffix]
    try:
        return get(file)
    except Exception as error:  # readers may raise anything for arbitrary bytes
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(file, error) from None
        raise ValueError(f"{file}: no {kind}, or damaged ({quoted(error)}); {cure}") from None


def _zip(file: Path) -> Get:
    archive = zipfile.ZipFile(file)  # the garbage collector closes it

    def get(name: str, path: Path, most: int) -> bytes:
        try:
            member = archive.getinfo(name)
        except KeyError:
            raise _missing(path, len(archive.filelist), next(iter(archive.NameToInfo), "")) from None
        if member.flag_bits & 1:
            raise ValueError(f"{path}: encrypted; zip it without a password")
        if member.compress_type not in METHODS:
            raise ValueError(f"{path}: compressed by method {member.compress_type}; zip it by deflate, or store it")
        _check_size(path, member.file_size, most)
        try:
            with archive.open(member) as part:
                raw = part.read(member.file_size)  # also checks its checksum
        except Exception as error:
            raise ValueError(f"{path}: damaged ({quoted(error)}); zip the files again") from None
        if len(raw) < member.file_size:
            raise ValueError(f"{path}: has {len(raw):,} of {member.file_size:,} bytes; zip the files again")
        return raw

    return get


def _tar(file: Path) -> Get:
    places: dict[str, tuple[int, int] | None] = {}  # offset and bytes; None for a link, a folder or a sparse file
    with open(file, "rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # has no position that threads would share
        with tarfile.open(fileobj=opened, mode="r:") as archive:
            for member in archive:
                plain = member.isreg() and not member.issparse()
                places[member.name.removeprefix("./")] = (member.offset_data, member.size) if plain else None
                archive.members.clear()  # type: ignore[attr-defined]  # a kilobyte for each
            end = archive.offset
    if any(data[end : end + tarfile.BLOCKSIZE]):  # tarfile takes a damaged header for the end
        raise ValueError(f"no header at byte {end:,}")

    def get(name: str, path: Path, most: int) -> bytes:
        if name not in places:
            raise _missing(path, len(places), next(iter(places), ""))
        if (place := places[name]) is None:
            raise ValueError(f"{path}: a link, a folder or a sparse file; name a regular file of the archive")
        start, size = place
        _check_size(path, size, most)
        return data[start : start + size]

    return get


def _npy(file: Path) -> Get:
    with open(file, "rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:  # np.load would say that it is a pickle
            raise ValueError("it does not begin as one")
    array = np.load(file, mmap_mode="r", allow_pickle=False)

    def get(name: str, path: Path, most: int) -> Row:
        if not (found := ROW.fullmatch(name)):
            raise ValueError(f"{path}: names no row of the array; write its number, as {file}[0], from 0")
        number, rate = int(found[1]), found[2]
        count = len(array) if array.ndim else 0
        if not count:
            raise ValueError(f"{path}: the array has no rows; give one of pictures or of sounds")
        if number >= count:
            raise ValueError(f"{path}: the array has {count:,} rows; name one from 0 to {count - 1:,}")
        return Row(array[number], None if rate is None else int(rate))

    return get


def _missing(path: Path, count: int, first: str) -> ValueError:
    """Returns the error for a member that does not exist."""
    members = f"{count:,} members, as {quoted(first)!r}" if count else "no members"
    return ValueError(f"{path}: not in the archive, which has {members}; name one of its files")


def _check_size(path: Path, size: int, most: int) -> None:
    """Raises ValueError for a member of more than `most` bytes."""
    if size > most:
        raise ValueError(f"{path}: has {size:,} bytes, more than {most:,}; give it as a file beside the archive")
