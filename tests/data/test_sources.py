"""Every format gives the documents that were written, and whatever is wrong is named by file and line."""

import bz2
import gzip
import json
import lzma
import sys

import pytest

from retentive.data.sources import Document, documents, strip_html

LINES = b'{"text": "one"}\n\n{"text": "two\\nlines", "id": 2}\n'


def read(source, **options) -> list[Document]:
    return list(documents(source, **options))


def message_of(error, source, **options) -> str:
    with pytest.raises(error) as caught:
        read(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_folder_is_read_in_order_with_relative_names(tmp_path):
    texts = {
        "b.md": "# b",
        "a/z.py": "z = 1\n",
        "a/b/c.rst": "c\r\n",
        "a.txt": "\ufeffa",
        "d.html": "<p>d</p>",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / ".hidden").mkdir()
    for ignored in (".hidden/x.txt", ".x.txt", "image.png", "empty.txt"):
        (tmp_path / ignored).write_bytes(b"" if ignored == "empty.txt" else b"\xff ignored")
    expected = [
        ("a/b/c.rst", "c\r\n"),
        ("a/z.py", "z = 1\n"),
        ("a.txt", "a"),
        ("b.md", "# b"),
        ("d.html", "d"),
    ]
    assert read(tmp_path) == expected
    assert read(tmp_path / "a" / "z.py") == [("z.py", "z = 1\n")]


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed(tmp_path, suffix, compress):
    (tmp_path / f"lines.jsonl{suffix}").write_bytes(compress(LINES))
    (tmp_path / f"text.txt{suffix}").write_bytes(compress("猫".encode()))
    name = f"lines.jsonl{suffix}"
    assert read(tmp_path) == [(f"{name}:1", "one"), (f"{name}:3", "two\nlines"), (f"text.txt{suffix}", "猫")]
    for damaged in (compress(LINES * 500)[:-9], b"never compressed"):
        (tmp_path / name).write_bytes(damaged)
        assert f"cannot decompress {tmp_path / name}" in message_of(ValueError, tmp_path)


def test_zstandard(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    file = tmp_path / "lines.jsonl.zst"
    with pyarrow.output_stream(str(file), compression="zstd") as out:
        out.write(LINES)
    assert [text for _, text in read(file)] == ["one", "two\nlines"]
    file.write_bytes(file.read_bytes()[:-5])
    assert "cannot decompress" in message_of(ValueError, file)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", "", "two"], "n": [1, 2, 3]}), file)
    assert read(file, field="body") == [("rows.parquet:1", "one"), ("rows.parquet:3", "two")]
    assert "no column 'text': its columns are: body, n" in message_of(ValueError, file)
    assert "rows.parquet:1 has int in field 'n'" in message_of(ValueError, file, field="n")
    file.write_bytes(file.read_bytes()[:-20])
    assert "as parquet" in message_of(ValueError, file)


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / name).write_bytes(b"x")
    assert "pip install 'retentive[data]'" in message_of(ImportError, tmp_path)


def test_hub(monkeypatch):
    calls = []

    class Fake:
        @staticmethod
        def load_dataset(*arguments, **options):
            calls.append((arguments, options["split"], options["streaming"]))
            if arguments[0] == "no/such":
                raise ConnectionError("cannot reach\nthe hub")
            return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert read("hf:some/name") == [("some/name:train:1", "one"), ("some/name:train:2", "two")]
    read("hf:name:valid")
    read("hf:name:config:valid")
    assert calls == [
        (("some/name", None), "train", True),
        (("name", None), "valid", True),
        (("name", "config"), "valid", True),
    ]
    assert "cannot read hf:no/such from the Hugging Face hub: cannot reach" in message_of(OSError, "hf:no/such")
    assert "expected hf:NAME" in message_of(ValueError, "hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "retentive[data]" in message_of(ImportError, "hf:some/name")


def test_jsonl_errors_name_the_line(tmp_path):
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
        assert expected in message_of(ValueError, tmp_path)


def test_bad_text_is_skipped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin1"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\\ud83d"}\n{"text": "fine"}\n{"text": "\xe9"}\n')
    message = message_of(ValueError, tmp_path)
    assert (
        message.startswith("a.txt is not UTF-8 text (unexpected end of data at 3)") and "--on-bad-text skip" in message
    )
    with pytest.warns(UserWarning, match=r"skipped 3 documents that are not UTF-8, the first is a.txt"):
        assert read(tmp_path, on_bad_text="skip") == [("b.jsonl:2", "fine")]
    (tmp_path / "b.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"skipped 1"):
        assert "every document is empty or was skipped" in message_of(ValueError, tmp_path, on_bad_text="skip")


def test_sources_without_text_are_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
        documents(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"write hf:owner/name"):
        documents("owner/name")
    with pytest.raises(ValueError, match=r"no readable text in .*: expected files that end in .txt"):
        documents(tmp_path)
    (tmp_path / "x.pdf").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cannot read .*x.pdf: expected .txt"):
        documents(tmp_path / "x.pdf")
    with pytest.raises(ValueError, match=r'on_bad_text is "?.ignore'):
        documents(tmp_path, on_bad_text="ignore")
    (tmp_path / "empty.txt").touch()
    assert "every document is empty" in message_of(ValueError, tmp_path)


def test_html_keeps_the_text_only():
    page = (
        "<!DOCTYPE html><html><head><title>T &amp; U</title><style>p {}</style>"
        "<script>if (a < b) x()</script></head><body>\n  <h1>Head\n line</h1>\n<p>Some <b>bold</b>, and\n  "
        "wrapped.<br>New</p><pre>  a\n    b</pre><!-- no --><ul><li>1<li>2</ul></body>"
    )
    assert strip_html(page) == "T & U\n\nHead line\n\nSome bold, and wrapped.\nNew\n\n  a\n    b\n\n1\n2"


def test_json_lines_of_the_standard_library_come_back(tmp_path):
    texts = ["a\u2028b", "\x85", "猫🙂", "tab\t", "\\", '"']
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8"
    )
    assert [text for _, text in read(tmp_path)] == texts
