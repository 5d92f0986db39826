"""File formats: a file in, its texts out. Errors name file and line.

    .txt .md .py .rst   one document a file, as it is
    .html .htm          one document a file, its text without the markup
    .jsonl              one document a line, the string under `field`
    .parquet            one document a row, the column `field`
    .json               one document an object, alone or in a list, the string under `field`
    .csv .tsv           one document a row, the column `field`, named in the first line
    .gz .xz .bz2 .zst   after any of these but .parquet: the same, compressed

Text is UTF-8. A document that is not UTF-8 is refused by name, or skipped and counted.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from retentive.data.html import strip_html
from retentive.options import option

PLAIN = (".txt", ".md", ".py", ".rst")
HTML = (".html", ".htm")
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
READABLE = (*PLAIN, *HTML, ".jsonl", ".parquet")
TABLES = (".json", ".csv", ".tsv")
"""Read only on request: a folder of notes may hold a package.json, which has no field "text"."""

OnBadText = Literal["refuse", "skip"]

# Byte order marks, longest first: the mark of UTF-32 LE begins with that of UTF-16 LE.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def kind_of(path: Path) -> tuple[str, str]:
    """Returns the suffix of a file's format, and its compression's suffix or ""."""
    suffix = path.suffix.lower()
    inner = path.with_suffix("").suffix.lower()
    if suffix not in COMPRESSED:
        return suffix, ""
    return (inner + suffix, "") if inner == ".parquet" else (inner, suffix)  # parquet compresses internally


class TextCheck:
    """`check(name, raw)` returns a document's text, or None if it is bad and skipped; `skipped` collects the names.

    Error messages mention options of `retentive data` if `advise` is set.
    """

    def __init__(self, on_bad_text: OnBadText, *, advise: bool = True):
        if on_bad_text not in ("refuse", "skip"):
            raise ValueError(f"{option('on_bad_text', on_bad_text)}: expected 'refuse' or 'skip'")
        self.skips, self.advise = on_bad_text == "skip", advise
        self.skipped: list[str] = []

    def __call__(self, name: str, raw: bytes | str) -> str | None:
        """Returns the text; None if it is not UTF-8 (a str: half a surrogate pair, as JSON may hold) and skipped."""
        if isinstance(raw, str):
            try:
                raw.encode("utf-8")
            except UnicodeEncodeError:
                self.bad(name, "is not UTF-8 text", "it holds half of a surrogate pair")
                return None
            return raw
        if marked := next((encoding for mark, encoding in _MARKS.items() if raw.startswith(mark)), None):
            self.bad(name, f"is {marked} text", f"convert it (iconv -f {marked} -t UTF-8)")
        elif b"\0" in raw:
            self.bad(name, "is not UTF-8 text (NUL bytes, as in binary files and UTF-16)", "convert it or leave it out")
        else:
            try:
                return raw.decode("utf-8-sig")  # drops the byte order mark that some editors write before UTF-8
            except UnicodeDecodeError as error:
                self.undecodable(name, error)
        return None

    def undecodable(self, name: str, error: UnicodeDecodeError) -> None:
        """Calls `bad` for bytes that are not UTF-8."""
        where = f"({error.reason} at {error.start})"
        self.bad(name, f"is not UTF-8 text {where}", "convert it (iconv -f LATIN1 -t UTF-8)")

    def bad(self, name: str, what: str, cure: str) -> None:
        """Refuses the document, or records it as skipped.

        Raises:
            ValueError: bad text is refused here.
        """
        if not self.skips:
            skip = ", or skip such documents (`on_bad_text='skip'`)"
            raise ValueError(f"{name} {what}: {cure}{skip if self.advise else ''}")
        self.skipped.append(name)


def texts(path: Path, field: str, check: TextCheck) -> Iterator[tuple[str, str]]:
    """Yields (name within the file, text) of each document: "" for a whole file, ":3" for the third line or row.

    Raises:
        ValueError: the file is damaged or does not match its suffix, or a document is not text.
        OSError: the file cannot be read.
    """
    kind, compression = kind_of(path)
    if kind == ".parquet":
        yield from _parquet_rows(path, field, check)
        return
    with _opened(path, compression) as file:
        if kind == ".jsonl":
            yield from _rows(path, _json_lines(path, file, check), field, check)
        elif (text := check(str(path), file.read())) is None:
            return
        elif kind == ".json":
            yield from _rows(path, _json_objects(path, text), field, check)
        elif kind in (".csv", ".tsv"):
            yield from _table_rows(path, text, "\t" if kind == ".tsv" else ",", field, check)
        else:
            yield "", strip_html(text) if kind in HTML else text


def unreadable(path: Path, error: OSError) -> OSError:
    """Returns the system's error as one line that names the file."""
    return type(error)(f"cannot read {path}: {str(error.strerror).lower()}")


def text_of(name: str, row: dict[str, Any], field: str, check: TextCheck) -> str | None:
    """Returns the string under `field` of a row; None if it is bad text and skipped.

    Raises:
        ValueError: the field is missing or not a string.
    """
    if not isinstance(row.get(field), str):
        got = f"{type(row[field]).__name__} in" if field in row else "no"
        fields = ", ".join(row) or "none"
        raise ValueError(f"{name} has {got} field {field!r}: expected a string; its fields are: {fields}{_flag(check)}")
    return check(name, row[field])


def _rows(path: Path, rows: Iterator[tuple[int, Any]], field: str, check: TextCheck) -> Iterator[tuple[str, str]]:
    """Yields as `texts` does, from (number, object or row) of each document."""
    for number, row in rows:
        name = f"{path}:{number}"
        if not isinstance(row, dict):
            raise ValueError(f"{name} is a {type(row).__name__}: expected an object with the field {field!r}")
        if (text := text_of(name, row, field, check)) is not None:
            yield f":{number}", text


def objects(path: Path, check: TextCheck) -> Iterator[tuple[str, Any]]:
    """Yields (name within the file, value) of each line of a .jsonl, entry of a .json or row of a .parquet file.

    Raises:
        ValueError: the file has another format, is damaged, or does not match its suffix.
        OSError: the file cannot be read.
    """
    kind, compression = kind_of(path)
    found: Iterator[tuple[int, Any]] = iter(())
    if kind == ".parquet":
        with _parquet(path) as table:
            rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from ((f":{number}", row) for number, row in enumerate(rows, 1))
        return
    if kind not in (".jsonl", ".json"):
        raise ValueError(f"cannot read objects from {path}: expected .jsonl, .json or .parquet")
    with _opened(path, compression) as file:
        if kind == ".jsonl":
            found = _json_lines(path, file, check)
        elif (text := check(str(path), file.read())) is not None:
            found = _json_objects(path, text)
        yield from ((f":{number}", value) for number, value in found)


def _json_lines(path: Path, file: BinaryIO, check: TextCheck) -> Iterator[tuple[int, Any]]:
    for number, raw in enumerate(file, 1):
        line = check(f"{path}:{number}", raw)
        if line is None or not line.strip():
            continue
        try:
            yield number, json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{path}:{number} is not JSON ({what}): expected one object a line") from None


def _json_objects(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}): expected an object or a list of them; .jsonl has lines"
        ) from None
    return enumerate(value if isinstance(value, list) else [value], 1)


def _table_rows(path: Path, text: str, separator: str, field: str, check: TextCheck) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells above 128 kB
    # newline="" keeps line ends within cells; strict makes an unclosed quote an error
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        _check_column(path, field, reader.fieldnames or [], check)  # reads the first line
        yield from _rows(path, enumerate(({field: row[field]} for row in reader), 1), field, check)
    except csv.Error as error:
        raise ValueError(f"{path} is no table after line {reader.line_num} ({error})") from None


def _parquet_rows(path: Path, field: str, check: TextCheck) -> Iterator[tuple[str, str]]:
    def values(table: Any) -> Iterator[tuple[int, Any]]:
        # Only this column, a batch at a time: the file may be larger than memory.
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0):
                number += 1
                try:
                    yield number, {field: value.as_py()}
                except UnicodeDecodeError as error:
                    check.undecodable(f"{path}:{number}", error)

    with _parquet(path) as table:
        _check_column(path, field, table.schema_arrow.names, check)
        yield from _rows(path, values(table), field, check)


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Opens the file; raises errors as one line each."""
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            yield table
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the system; pyarrow's own have no number
            raise unreadable(path, error) from None
        raise ValueError(f"cannot read {path} as parquet: {str(error).splitlines()[0]}") from None


def _check_column(path: Path, field: str, columns: Any, check: TextCheck) -> None:
    if field not in columns:
        raise ValueError(f"{path} has no column {field!r}: its columns are: {', '.join(columns)}{_flag(check)}")


def _flag(check: TextCheck) -> str:
    """Returns the hint at the end of an error about a missing field."""
    return "; `field` names another" if check.advise else ""


@contextmanager
def _opened(path: Path, compression: str) -> Iterator[BinaryIO]:
    """Opens the file, decompressing while reading; raises errors of both as one line each."""
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
        # Errors of the system (no permission, a failing disk) have a number, those of the formats have none.
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from None
        raise ValueError(
            f"cannot decompress {path}: {error}; the file is damaged, incomplete or no {compression}"
        ) from None


def _open_zstd(path: Path) -> BinaryIO:
    # pyarrow instead of zstandard, whose reader accepts a truncated file as complete.
    return io.BufferedReader(_pyarrow(path).input_stream(str(path), compression="zstd"))


def _pyarrow(path: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"reading {path} needs pyarrow: pip install 'retentive[data]'") from None
    return pyarrow
