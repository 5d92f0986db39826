"""Every format returns the texts that were written, and errors name file and line."""

import bz2
import gzip
import json
import lzma
import sys

import pytest

from retentive.data.formats import TextCheck, texts

LINES = b'{"text": "one"}\n\n{"text": "two\\nlines", "id": 2}\n'


def read(path, field="text") -> list[tuple[str, str]]:
    return list(texts(path, field, TextCheck("refuse")))


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed(tmp_path, suffix, compress, refuses):
    lines, text = tmp_path / f"lines.jsonl{suffix}", tmp_path / f"text.txt{suffix}"
    lines.write_bytes(compress(LINES))
    text.write_bytes(compress("猫".encode()))
    assert read(lines) == [(":1", "one"), (":3", "two\nlines")] and read(text) == [("", "猫")]
    for damaged in (compress(LINES * 500)[:-9], b"never compressed"):
        lines.write_bytes(damaged)
        with refuses(f"cannot decompress {lines}"):
            read(lines)


def test_zstandard(tmp_path, refuses):
    pyarrow = pytest.importorskip("pyarrow")
    file = tmp_path / "lines.jsonl.zst"
    with pyarrow.output_stream(str(file), compression="zstd") as out:
        out.write(LINES)
    assert [text for _, text in read(file)] == ["one", "two\nlines"]
    file.write_bytes(file.read_bytes()[:-5])
    with refuses("cannot decompress"):
        read(file)


def test_parquet(tmp_path, refuses):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", "", "two"], "n": [1, 2, 3]}), file)
    assert read(file, field="body") == [(":1", "one"), (":2", ""), (":3", "two")]
    with refuses("rows.parquet has no column 'text': its columns are: body, n"):
        read(file)
    with refuses("rows.parquet:1 has int in field 'n'"):
        read(file, field="n")
    file.write_bytes(file.read_bytes()[:-20])
    with refuses("as parquet"):
        read(file)


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, name, refuses):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / name).write_bytes(b"x")
    with refuses("pip install 'retentive[data]'", ImportError):
        read(tmp_path / name)


def test_jsonl_errors_name_the_line(tmp_path, refuses):
    file = tmp_path / "x.jsonl"
    for line, expected in (
        (b'{"body": "x"}', "x.jsonl:3 has no field 'text': expected a string; its fields are: body"),
        (b'{"text": null}', "x.jsonl:3 has NoneType in field 'text'"),
        (b'{"text": "cut off', "x.jsonl:3 is not JSON"),
        (b'["text"]', "x.jsonl:3 is a list"),
        (b'{"text": "\xe9"}', "x.jsonl:3 is not UTF-8 text"),
        (b'{"text": "\\ud83d"}', "x.jsonl:3 is not UTF-8 text"),
    ):
        file.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
        with refuses(f"{tmp_path}/{expected}"):
            read(file)


def test_json_lines_of_the_standard_library_come_back(tmp_path):
    written = ["a\u2028b", "\x85", "猫🙂", "tab\t", "\\", '"']
    lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in written)
    (tmp_path / "x.jsonl").write_text(lines, "utf-8")
    assert [text for _, text in read(tmp_path / "x.jsonl")] == written


def test_json_is_an_object_or_a_list_of_them(tmp_path, refuses):
    file = tmp_path / "x.json"
    for value, expected in (
        ([{"text": "one"}, {"text": "two"}], [(":1", "one"), (":2", "two")]),
        ({"text": "alone"}, [(":1", "alone")]),
        ([], []),
    ):
        file.write_text(json.dumps(value, indent=1), "utf-8")
        assert read(file) == expected
    for text, message in ((LINES, "x.json is not JSON"), (b'["a"]', "x.json:1 is a str: expected an object")):
        file.write_bytes(text)
        with refuses(message):
            read(file)


@pytest.mark.parametrize("suffix, comma", [(".csv", ","), (".tsv", "\t")])
def test_tables_have_their_columns_named_in_the_first_line(tmp_path, suffix, comma, refuses):
    file = tmp_path / f"x{suffix}"
    long = "x" * 200_000  # above the csv module's default limit
    file.write_text(
        f'n{comma}text\r\n1{comma}one\r\n2{comma}"two\n""lines"""\r\n3{comma}{long}\r\n', "utf-8", newline=""
    )
    assert read(file) == [(":1", "one"), (":2", 'two\n"lines"'), (":3", long)]
    with refuses(f"x{suffix} has no column 'body': its columns are: n, text; `field` names another"):
        read(file, field="body")
    file.write_text(f"n{comma}text\n1{comma}one\n2\n", "utf-8")
    with refuses(f"x{suffix}:2 has NoneType in field 'text'"):
        read(file)
    file.write_text(f'n{comma}text\n1{comma}"never closed\n', "utf-8")
    with refuses(f"x{suffix} is no table after line 1 (unexpected end of data)"):
        read(file)
    file.write_text(f'n{comma}"never closed\n', "utf-8")
    with refuses(f"x{suffix} is no table after line 0 (unexpected end of data)"):
        read(file)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_named_where_a_mark_says_so(tmp_path, encoding, refuses):
    """Read as Latin-1, the usual advice, they would turn into garbage."""
    name = encoding[:6].upper()
    (tmp_path / "x.txt").write_bytes("\ufeffcafé\n".encode(encoding))
    with refuses(f"x.txt is {name} text: convert it (iconv -f {name} -t UTF-8)"):
        read(tmp_path / "x.txt")
    (tmp_path / "x.txt").write_bytes("no mark\n".encode(encoding))
    with refuses("x.txt is not UTF-8 text (NUL bytes, as in binary files and UTF-16): convert it or leave it out"):
        read(tmp_path / "x.txt")


def test_bad_documents_are_refused_or_remembered(tmp_path, refuses):
    files = {"a.txt": "café".encode("latin1"), "b.txt": b"\x7fELF\0\0", "c.jsonl": b'{"text": "\\ud83d"}\n'}
    check = TextCheck("skip")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert list(texts(tmp_path / name, "text", check)) == []
        with refuses("or skip such documents (`on_bad_text='skip'`)"):
            read(tmp_path / name)
    with refuses("b.txt is not UTF-8 text (NUL bytes"):  # does not advise converting it from Latin-1
        read(tmp_path / "b.txt")
    assert check.skipped == [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt", f"{tmp_path}/c.jsonl:1"]
    with refuses("a.txt is not UTF-8 text (unexpected end of data at 3): convert it (iconv -f LATIN1 -t UTF-8)"):
        read(tmp_path / "a.txt")
    with refuses("`on_bad_text='ignore'`: expected 'refuse' or 'skip'"):
        TextCheck("ignore")
