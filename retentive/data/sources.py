"""Documents by name from files, folders and data sets, one at a time; `formats` reads the files.

    a folder   all files with a known suffix, sorted by name; hidden ones and links to folders are skipped
    a file     any format that `formats` knows; a file without a suffix is read as plain text
    hf:NAME    a data set of the Hugging Face hub, streamed: hf:NAME[:SPLIT] or hf:NAME:CONFIG:SPLIT

Files that are left out are reported, never dropped silently.
"""

import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from retentive.data.formats import (
    COMPRESSED,
    READABLE,
    TABLES,
    OnBadText,
    TextCheck,
    kind_of,
    text_of,
    texts,
    unreadable,
)
from retentive.options import option, quoted
from retentive.tables import counted

Say = Callable[[str], None]
"""Called with one line of text for the user."""


class Document(NamedTuple):
    """A text and its name."""

    name: str
    """Origin of the text relative to the source; lines of .jsonl and rows of tables add `:number`."""
    text: str
    """The whole text."""


class Found(NamedTuple):
    """The files of a source."""

    files: dict[str, Path]
    """Name -> path of the files to read, in order."""
    left_out: str
    """Files left out and why, in one line; "" if there are none."""


def documents(
    source: str | Path,
    *,
    on_bad_text: OnBadText = "refuse",
    field: str = "text",
    suffixes: Iterable[str] = (),
    say: Say = warnings.warn,
    advise: bool = True,
) -> Iterator[Document]:
    """Yields the documents of a file, a folder or hf:NAME, without empty ones.

    Args:
        source: a path, or hf:NAME (see the module).
        on_bad_text: "refuse" or "skip" documents that are not UTF-8.
        field: name of the field or column that holds the text, for formats with fields.
        suffixes: further kinds of files to read in folders besides `formats.READABLE`: .json, .csv and .tsv by field,
            others as plain text, "none" for names without a suffix.
        say: called with a line about files left out of a folder, and about skipped documents.
        advise: add options of `retentive data` to error messages.

    Raises:
        OSError: the file or folder is missing or cannot be read. Raised by the call, not by the first document.
        ValueError: there is nothing to read, raised by the call or at the end; or something is not text, with file and
            line.
    """
    # Not a generator, so that a missing source raises here. A data set of the hub is opened at its first document.
    check = TextCheck(on_bad_text, advise=advise)
    if str(source).startswith("hf:"):
        return _nonempty(_hub_rows(str(source), field, check), source, check, say)
    files, left_out = find_files(source, suffixes, advise=advise)
    if left_out:
        say(f"left out of {source}: {left_out}")
    rows = (Document(name + within, text) for name, path in files.items() for within, text in texts(path, field, check))
    return _nonempty(rows, source, check, say)


def source_files(source: str | Path, suffixes: Iterable[str] = (), *, advise: bool = True) -> dict[str, Path]:
    """Returns name -> path of the files that `documents` reads, in its order; raises as `documents`."""
    return find_files(source, suffixes, advise=advise).files


def find_files(source: str | Path, suffixes: Iterable[str] = (), *, advise: bool = True) -> Found:
    """Finds the readable files of `source`, and describes the others.

    Raises:
        OSError: the file or folder is missing or cannot be read.
        ValueError: an unknown kind of file, a device or a pipe, or a folder without readable files.
    """
    path = Path(source)
    wanted = {*READABLE, *_suffixes(suffixes)}
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0  # neither a file nor a folder
    except OSError as error:  # in a folder without permission
        raise unreadable(path, error) from None
    if stat.S_ISREG(mode):
        kind, _ = kind_of(path)
        if kind and kind not in {*wanted, *TABLES}:
            cure = f"; read plain text with {option('suffix', (kind,))}" if advise else ""
            raise ValueError(
                f"cannot read {path}: expected {' '.join(READABLE)}, perhaps with {' '.join(COMPRESSED)}{cure}"
            )
        return Found({path.name: path}, "")
    if mode and not stat.S_ISDIR(mode):
        raise ValueError(f"{source} is not a regular file, and text is read more than once: save it in one")
    if not mode:
        hint = f"; for the Hugging Face data set write hf:{source}" if str(source).count("/") == 1 else ""
        raise FileNotFoundError(f"no such file or folder: {source}{hint}")
    files, left_out = _walk(path, wanted, advise)
    if not files:
        also = f"; left out: {left_out}" if left_out else ""
        raise ValueError(f"no readable text in {path}: expected files that end in {' '.join(READABLE)}{also}")
    return Found({name.as_posix(): path / name for name in sorted(files)}, left_out)


def _suffixes(wanted: Iterable[str]) -> set[str]:
    """Returns suffixes as `kind_of` returns them: .tex for "tex", "" for "none"."""
    words = [wanted] if isinstance(wanted, str) else wanted
    return {"" if word == "none" else f".{word.lstrip('.')}".lower() for word in words}


def _walk(top: Path, wanted: set[str], advise: bool) -> tuple[list[Path], str]:
    """Returns the files below `top` of a wanted kind, relative to it; and a line about those left out."""
    found: list[Path] = []
    kinds: Counter[str] = Counter()
    links = 0
    locked: list[str] = []

    def skip(error: OSError) -> None:
        if Path(error.filename) == top:
            raise unreadable(top, error)
        locked.append(Path(error.filename).relative_to(top).as_posix())

    for folder, folders, names in os.walk(top, onerror=skip):
        folders[:] = [name for name in folders if name[0] != "."]  # in place, since os.walk enters what remains
        links += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        for file in (Path(folder, name) for name in names if name[0] != "."):
            kind, compression = kind_of(file)
            if not file.is_file():  # a broken link, or a device, a pipe or a socket
                links += file.is_symlink()
            elif kind in wanted:
                found.append(file.relative_to(top))
            else:
                kinds[kind + compression or "none"] += 1
    return found, _left_out(kinds, links, locked, "; `suffix` reads more kinds" if advise else "")


def _left_out(kinds: Counter[str], links: int, locked: list[str], advice: str) -> str:
    """Describes in one line what a folder walk left out: files by kind, links, folders without permission."""
    parts = []
    if kinds:
        named = " ".join(kind for kind, _ in kinds.most_common(8)) + " …" * (len(kinds) > 8)
        parts.append(f"{counted(kinds.total(), 'file')} of other kinds ({named}{advice})")
    if links:
        parts.append(f"{counted(links, 'link')} (to a folder, or broken)")
    if locked:
        named = " ".join(locked[:4]) + " …" * (len(locked) > 4)
        parts.append(f"{counted(len(locked), 'folder')} that cannot be read ({named})")
    return ", ".join(parts)


def _nonempty(rows: Iterator[Document], source: str | Path, check: TextCheck, say: Say) -> Iterator[Document]:
    """Yields documents with text; at the end reports skipped ones, and raises ValueError if there was no text."""
    empty = True
    for document in rows:
        if document.text:
            empty = False
            yield document
    if check.skipped:
        count = counted(len(check.skipped), "document")
        say(f"{source}: skipped {count} (not UTF-8 text), the first is {check.skipped[0]}")
    if empty:
        raise ValueError(f"no text in {source}: every document is empty{' or was skipped' if check.skipped else ''}")


def _hub_rows(source: str, field: str, check: TextCheck) -> Iterator[Document]:
    """Yields the documents of hf:NAME, downloading them as they are read."""
    name, *rest = source.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise ValueError(f"cannot read {source!r}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    try:
        import datasets
    except ImportError:
        raise ImportError(f"reading {source} needs datasets: pip install 'retentive[data]'") from None
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            text = text_of(f"{name}:{split}:{number}", row, field, check)
            if text is not None:
                yield Document(f"{name}:{split}:{number}", text)
    except OSError as error:  # no such data set, no network
        raise OSError(
            f"cannot read {source} from the Hugging Face hub: {quoted(str(error).strip().split(chr(10))[0])}"
        ) from None
