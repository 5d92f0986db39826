"""Atomic writes: a full disk or a crash in the middle leaves the old content."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from retentive.files import (
    check_place,
    check_places,
    load_tensors,
    make_folder,
    only_writer,
    replace_folder,
    save_tensors,
    write_json,
    write_tensors,
    write_text,
    write_together,
)

PROC = pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    (target / "old").write_text("old", encoding="utf-8")

    def half(folder):
        (folder / "new").write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_folder(target, half)
    assert names(target) == {"old"} and names(tmp_path) == {"run"}
    replace_folder(target, lambda folder: (folder / "new").write_text("new", encoding="utf-8"))
    assert names(target) == {"new"} and names(tmp_path) == {"run"}


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("a.txt/out", OSError, "cannot write {}: file exists ({}/a.txt)"),
        ("a.txt/b/out", OSError, "cannot write {}: not a directory"),
        pytest.param("/proc/out", OSError, "cannot write /proc/out: no such file or directory (/proc", marks=PROC),
        ("", ValueError, "give a folder with a name of its own"),
    ],
)
def test_where_nothing_can_be_written_is_said_before_anything_is(tmp_path, path, error, words, refuses):
    (tmp_path / "a.txt").write_text("mine", encoding="utf-8")
    target = tmp_path / path if path else Path()
    with refuses(words.format(target, tmp_path), error), only_writer(target):
        raise AssertionError("it was written")
    assert names(tmp_path) == {"a.txt"}


@pytest.mark.parametrize("failing", [0, 1])
def test_files_are_written_together_or_not_at_all(failing, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write_text(a, "old\n")
    write_text(b, "old\n")

    def full(path):
        path.write_text("half", encoding="utf-8")
        raise OSError(errno.ENOSPC, "No space left on device")

    writers = [lambda path: path.write_text("new", encoding="utf-8")] * 2
    writers[failing] = full
    with pytest.raises(OSError, match="No space left"):
        write_together(dict(zip((a, b), writers, strict=True)))
    assert a.read_bytes() == b.read_bytes() == b"old\n" and names(tmp_path) == {"a", "b"}


def test_json_that_cannot_be_said_leaves_the_old(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "x": 1\n}\n'


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """Independent of the order of the library's hash of the metadata."""
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, dtype=torch.bfloat16)}
    said = {name: f'{name} "quoted" \n\x01\x7f é 日本 😀' for name in ("weights", "kind", "memory", "window", "digest")}
    for number in range(8):
        write_tensors(tmp_path / str(number), tensors, dict(reversed(said.items())) if number % 2 else said)
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
    found, metadata = load_tensors(tmp_path / "0")
    assert metadata == {"format": "pt", **said} and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_what_safetensors_cannot_write_is_an_os_error_of_one_line(tmp_path, monkeypatch, refuses):
    """The library raises another kind of error, with which a command would end in a traceback."""

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)})
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with refuses(f"cannot write {tmp_path / 'x.safetensors'}: No space left on device", OSError):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)})
    monkeypatch.undo()
    assert load_file(tmp_path / "x.safetensors")["x"].tolist() == [1, 1] and len(names(tmp_path)) == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_tensors_have_the_mode_that_the_umask_gives(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == mode


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("path", "why"),
    [("a.txt/out", ""), pytest.param("/proc/out", "No such file or directory", marks=PROC)],
)
def test_an_error_names_what_was_asked_for_and_no_file_beside_it(folder, path, why, tmp_path, refuses):
    (tmp_path / "a.txt").write_text("mine", encoding="utf-8")
    with refuses(f"cannot write {tmp_path / path}: {why}", OSError):
        if folder:
            replace_folder(tmp_path / path, lambda made: None)
        else:
            write_text(tmp_path / path, "new")
    assert names(tmp_path) == {"a.txt"}


def test_a_place_is_checked_before_hours_of_work(tmp_path, refuses):
    (tmp_path / "a.txt").write_text("mine", encoding="utf-8")
    check_place(tmp_path / "new/folder/a.json")
    assert names(tmp_path) == {"a.txt"}
    check_place(tmp_path / "a.txt")
    with refuses(f"cannot write {tmp_path}/a.txt/b: Not a directory", OSError):
        check_place(tmp_path / "a.txt/b")
    with refuses(f"cannot write {tmp_path}/a.txt: File exists", OSError):
        make_folder(tmp_path / "a.txt")
    assert names(tmp_path) == {"a.txt"} and (tmp_path / "a.txt").read_text(encoding="utf-8") == "mine"


def test_two_files_in_one_place_are_refused(tmp_path, refuses):
    check_places(tmp_path / "a", None, tmp_path / "b", None)
    with refuses(f"two files would be written to {tmp_path}/c/../a: choose another name for one of them"):
        check_places(tmp_path / "a", tmp_path / "c/../a")
    with refuses(f"cannot write {tmp_path}: it is a folder", OSError):
        check_places(tmp_path / "a", tmp_path)


def test_only_files_are_replaced(tmp_path, refuses):
    """A rename would put a file in place of a pipe or, for root, of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, what in (("pipe", "no regular file"), ("folder", "a folder")):
        with refuses(f"cannot write {tmp_path / name}: it is {what}", FileExistsError):
            write_text(tmp_path / name, "new")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and names(tmp_path) == {"pipe", "folder"}
