"""Named documents out of files, folders and data sets, one at a time: the only place that knows file formats.

    .txt .md .py .rst   one document a file, as it is
    .html .htm          one document a file, its text without the markup
    .jsonl              one document a line, the string under `field`
    .parquet            one document a row, the column `field`
    .gz .xz .bz2 .zst   after any of the first three rows: the same, compressed
    hf:NAME             a data set of the Hugging Face hub, streamed: hf:NAME[:SPLIT] or hf:NAME:CONFIG:SPLIT

Text is UTF-8; a document that is not is refused by name, or skipped and counted.
"""

import bz2
import gzip
import io
import json
import lzma
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

PLAIN = (".txt", ".md", ".py", ".rst")
HTML = (".html", ".htm")
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
READABLE = (*PLAIN, *HTML, ".jsonl", ".parquet")

OnBadText = Literal["refuse", "skip"]


class Document(NamedTuple):
    name: str
    """Where the text is from, relative to the source; lines of .jsonl and rows of tables add `:number`."""
    text: str


def documents(source: str | Path, *, on_bad_text: OnBadText = "refuse", field: str = "text") -> Iterator[Document]:
    """The documents of a file, of a folder (all in it, by name, hidden ones apart) or of hf:NAME.

    Empty documents are left out; a source with nothing else is a ValueError. A missing source is an error at
    once, what is wrong inside a file when it is read: ValueError with the file and line.
    """
    if on_bad_text not in ("refuse", "skip"):
        raise ValueError(f'on_bad_text is {on_bad_text!r}: expected "refuse" or "skip"')
    check = _TextCheck(on_bad_text)
    if str(source).startswith("hf:"):
        return _nonempty(_hub_rows(str(source), field, check), source, check)
    files = source_files(source)
    return _nonempty(_file_rows(files, field, check), source, check)


def source_files(source: str | Path) -> dict[str, Path]:
    """Name -> path of the files that `documents` reads, in its order."""
    path = Path(source)
    if path.is_file():
        if _kind(path)[0] not in READABLE:
            raise ValueError(f"cannot read {path}: expected {' '.join(READABLE)}, perhaps with {' '.join(COMPRESSED)}")
        return {path.name: path}
    if not path.is_dir():
        hint = f"; for the Hugging Face data set write hf:{source}" if str(source).count("/") == 1 else ""
        raise FileNotFoundError(f"no such file or folder: {source}{hint}")
    found = {file.relative_to(path): file for file in path.rglob("*") if _kind(file)[0] in READABLE and file.is_file()}
    shown = {name.as_posix(): found[name] for name in sorted(found) if not any(part[0] == "." for part in name.parts)}
    if not shown:
        raise ValueError(f"no readable text in {path}: expected files that end in {' '.join(READABLE)}")
    return shown


def _kind(path: Path) -> tuple[str, str]:
    """The suffix that says what the file holds, and that of its compression or ""."""
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return suffix, ""
    inner = path.with_suffix("").suffix.lower()
    return ("" if inner == ".parquet" else inner), suffix


class _TextCheck:
    """Tells good text from bad, and remembers what it skipped."""

    def __init__(self, on_bad_text: OnBadText):
        self.skips = on_bad_text == "skip"
        self.skipped: list[str] = []

    def __call__(self, name: str, raw: bytes | str) -> str | None:
        """The text, or None where it is not UTF-8 (a str: holds half a surrogate pair) and may be skipped."""
        try:
            if isinstance(raw, bytes):
                return raw.decode("utf-8-sig")
            raw.encode("utf-8")
            return raw
        except UnicodeError as error:
            self.bad(name, error)
            return None

    def bad(self, name: str, error: UnicodeError) -> None:
        if not self.skips:
            place = f" ({error.reason} at {error.start})" if isinstance(error, UnicodeDecodeError) else ""
            raise ValueError(
                f"{name} is not UTF-8 text{place}: convert it (iconv -f LATIN1 -t UTF-8), "
                f'or skip such documents with on_bad_text="skip" (--on-bad-text skip)'
            )
        self.skipped.append(name)


def _nonempty(rows: Iterator[Document], source: str | Path, check: _TextCheck) -> Iterator[Document]:
    empty = True
    for document in rows:
        if document.text:
            empty = False
            yield document
    if check.skipped:
        count, first = len(check.skipped), check.skipped[0]
        warnings.warn(f"{source}: skipped {count} documents that are not UTF-8, the first is {first}", stacklevel=2)
    if empty:
        raise ValueError(f"no text in {source}: every document is empty{' or was skipped' if check.skipped else ''}")


def _file_rows(files: dict[str, Path], field: str, check: _TextCheck) -> Iterator[Document]:
    for name, path in files.items():
        kind, compression = _kind(path)
        if kind == ".parquet":
            yield from _parquet_rows(name, path, field, check)
            continue
        with _opened(path, compression) as file:
            if kind == ".jsonl":
                yield from _json_lines(name, file, field, check)
            elif (text := check(name, file.read())) is not None:
                yield Document(name, strip_html(text) if kind in HTML else text)


@contextmanager
def _opened(path: Path, compression: str) -> Iterator[BinaryIO]:
    openers: dict[str, Callable[..., Any]] = {
        "": lambda path: path.open("rb"),
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zst": _open_zstd,
    }
    try:
        with openers[compression](path) as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        # The system's own errors (no permission, a failing disk) have a number; the formats' have none.
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(
            f"cannot decompress {path}: {error}; the file is damaged, incomplete or no {compression}"
        ) from None


def _open_zstd(path: Path) -> BinaryIO:
    # pyarrow and not zstandard, whose reader takes a truncated file for a complete one.
    return io.BufferedReader(_pyarrow(path).input_stream(str(path), compression="zstd"))


def _pyarrow(path: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"reading {path} needs pyarrow: pip install 'retentive[data]'") from None
    return pyarrow


def _json_lines(name: str, file: BinaryIO, field: str, check: _TextCheck) -> Iterator[Document]:
    for number, raw in enumerate(file, 1):
        line = check(f"{name}:{number}", raw)
        if line is None or not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}:{number} is not JSON ({error}): expected one object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{name}:{number} is a {type(row).__name__}: expected an object with the field {field!r}")
        yield from _row(f"{name}:{number}", row, field, check)


def _row(name: str, row: dict, field: str, check: _TextCheck) -> Iterator[Document]:
    if not isinstance(row.get(field), str):
        got = f"{type(row[field]).__name__} in" if field in row else "no"
        fields = ", ".join(row) or "none"
        raise ValueError(f"{name} has {got} field {field!r}: expected a string; its fields are: {fields} (--field)")
    if (text := check(name, row[field])) is not None:
        yield Document(name, text)


def _parquet_rows(name: str, path: Path, field: str, check: _TextCheck) -> Iterator[Document]:
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if field not in columns:
                raise ValueError(f"{name} has no column {field!r}: its columns are: {', '.join(columns)} (--field)")
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    try:
                        row = {field: value.as_py()}
                    except UnicodeDecodeError as error:
                        check.bad(f"{name}:{number}", error)
                        continue
                    yield from _row(f"{name}:{number}", row, field, check)
    except (pyarrow.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"cannot read {path} as parquet: {str(error).splitlines()[0]}") from None


def _hub_rows(source: str, field: str, check: _TextCheck) -> Iterator[Document]:
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
            yield from _row(f"{name}:{split}:{number}", row, field, check)
    except OSError as error:  # no such data set, no network
        raise OSError(
            f"cannot read {source} from the Hugging Face hub: {str(error).strip().split(chr(10))[0]}"
        ) from None


# Elements that end a line of text, and those whose content is no text.
_BLOCKS = re.compile(
    "address|article|aside|blockquote|br|d[dlt]|div|fig(caption|ure)|footer|form|h[1-6r]|header|li|main|nav|ol|p|pre|"
    "section|table|t[dhr]|title|ul"
)
_SILENT = frozenset(("script", "style", "template", "noscript"))


class _HTMLText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.silent += tag in _SILENT
        self.verbatim += tag == "pre"
        if _BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(0, self.silent - (tag in _SILENT))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        if _BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.silent:
            return
        if not self.verbatim:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith((" ", "\n")):
                data = data.lstrip()
        if data:
            self.parts.append(data)


def strip_html(page: str) -> str:
    """The text of an HTML page, without scripts and styles: a line for every block, single blank lines."""
    parser = _HTMLText()
    parser.feed(page)
    parser.close()
    lines: list[str] = []
    for line in "".join(parser.parts).split("\n"):
        line = line.rstrip()
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines).strip("\n")
