"""A source yields its documents in order and reports what it leaves out; missing sources are reported at once."""

import os
import sys
from pathlib import Path

import pytest

from retentive.data.sources import Document, documents, find_files, source_files


def read(source, **options) -> list[Document]:
    return list(documents(source, **options))


def write(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}", "utf-8")


def test_folder_is_read_in_order_with_relative_names(tmp_path):
    contents = {
        "b.md": "# b",
        "a/z.py": "z = 1\n",
        "a/b/c.rst": "c\r\n",
        "a.txt": "\ufeffa",
        "d.html": "<p>d</p>",
    }
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    write(tmp_path, ".hidden/x.txt", ".x.txt")
    (tmp_path / "empty.txt").touch()
    expected = [
        ("a/b/c.rst", "c\r\n"),
        ("a/z.py", "z = 1\n"),
        ("a.txt", "a"),
        ("b.md", "# b"),
        ("d.html", "d"),
    ]
    assert read(tmp_path) == expected
    assert read(tmp_path / "a" / "z.py") == [("z.py", "z = 1\n")]
    (tmp_path / "e.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read(tmp_path)[5:] == [("e.jsonl:1", "one"), ("e.jsonl:2", "two")]


def test_what_is_left_out_is_said(tmp_path, monkeypatch):
    """Other kinds, links and unreadable files; tests may run as root, who can read anything."""
    notes = tmp_path / "notes"
    write(notes, "a.txt", "b.tex", "c.tex", "d.tar.gz", "GPL", "secret/e.txt", ".git/config", "sub/f.txt")
    write(tmp_path, "elsewhere/g.txt")
    (notes / "linked").symlink_to(tmp_path / "elsewhere")
    (notes / "gone.txt").symlink_to(tmp_path / "nowhere")
    (notes / "h.txt").symlink_to(tmp_path / "elsewhere" / "g.txt")
    scandir = os.scandir

    def denied(path):
        if os.path.basename(path) == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    said = []
    assert [name for name, _ in read(notes, say=said.append)] == ["a.txt", "h.txt", "sub/f.txt"]
    assert said == [
        f"left out of {notes}: 4 files of other kinds (.tex .tar.gz none; `suffix` reads more kinds), "
        "2 links (to a folder, or broken), 1 folder that cannot be read (secret)"
    ]
    with pytest.warns(UserWarning, match=r"left out of .*notes: 4 files"):
        documents(notes)
    assert find_files(notes / "sub").left_out == ""
    with pytest.raises(PermissionError, match=r"^cannot read \S*secret: permission denied$"):
        documents(notes / "secret")


@pytest.mark.parametrize("denied", ["stat", "open"])
def test_a_file_that_may_not_be_read_is_told_in_a_line(tmp_path, monkeypatch, denied, refuses):
    write(tmp_path, "a.txt")

    def no(*_, **__):
        raise PermissionError(13, "Permission denied", "a.txt")

    monkeypatch.setattr(Path, denied, no)
    with refuses(f"cannot read {tmp_path}/a.txt: permission denied", PermissionError):
        read(tmp_path / "a.txt")


def test_other_suffixes_are_read_where_they_are_asked_for(tmp_path, refuses):
    write(tmp_path, "a.txt", "b.tex", "c.LOG", "GPL-3", "package.json")
    (tmp_path / "d.csv").write_text("text,n\nfrom a table,1\n", "utf-8")
    assert list(source_files(tmp_path)) == ["a.txt"]
    assert list(source_files(tmp_path, [".tex", "log", "none"])) == ["GPL-3", "a.txt", "b.tex", "c.LOG"]
    assert list(source_files(tmp_path, ".tex")) == ["a.txt", "b.tex"]
    assert read(tmp_path, suffixes=[".csv"], say=len)[1:] == [("d.csv:1", "from a table")]
    # A file given by name is read whatever its name, unless its suffix indicates another format.
    assert read(tmp_path / "GPL-3") == [("GPL-3", "text of GPL-3")] and len(read(tmp_path / "d.csv")) == 1
    with refuses("; read plain text with `suffix=('.tex',)`"):
        documents(tmp_path / "b.tex")
    assert read(tmp_path / "b.tex", suffixes=[".tex"]) == [("b.tex", "text of b.tex")]


def test_hub(monkeypatch, refuses):
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
    with refuses("cannot read hf:no/such from the Hugging Face hub: cannot reach", OSError):
        read("hf:no/such")
    with refuses("some/name:train:1 has no field 'body'"):
        read("hf:some/name", field="body")
    with refuses("expected hf:NAME"):
        read("hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refuses("retentive[data]", ImportError):
        read("hf:some/name")


def test_bad_text_is_skipped_and_counted(tmp_path, refuses):
    (tmp_path / "a.txt").write_bytes("café".encode("latin1"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\\ud83d"}\n{"text": "fine"}\n{"text": "\xe9"}\n')
    with refuses(f"{tmp_path}/a.txt is not UTF-8 text"):
        read(tmp_path)
    said = []
    assert read(tmp_path, on_bad_text="skip", say=said.append) == [("b.jsonl:2", "fine")]
    assert said == [
        f"{tmp_path}: skipped 3 documents (not UTF-8 text), the first is {tmp_path}/a.txt",
    ]
    (tmp_path / "b.jsonl").unlink()
    with refuses("every document is empty or was skipped"), pytest.warns(UserWarning, match=r"skipped 1"):
        read(tmp_path, on_bad_text="skip")


def test_sources_without_text_are_refused_at_once(tmp_path, refuses):
    with refuses(f"no such file or folder: {tmp_path}/nowhere", FileNotFoundError):
        documents(tmp_path / "nowhere")
    with refuses("write hf:owner/name", FileNotFoundError):
        documents("owner/name")
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", "/dev/null"):
        with refuses(f"{source} is not a regular file, and text is read more than once: save it in one"):
            documents(source)
    (tmp_path / "x.pdf").write_bytes(b"x")
    with refuses(f"no readable text in {tmp_path}: expected files that end in .txt"):
        documents(tmp_path)
    with refuses("; left out: 1 file of other kinds (.pdf; `suffix` reads more kinds)"):
        documents(tmp_path)
    with refuses(f"cannot read {tmp_path}/x.pdf: expected .txt"):
        documents(tmp_path / "x.pdf")
    with refuses("`on_bad_text='ignore'`"):
        documents(tmp_path, on_bad_text="ignore")
    (tmp_path / "empty.txt").touch()
    with refuses("every document is empty"):
        read(tmp_path, say=len)
