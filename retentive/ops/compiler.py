"""C sources compiled by the machine's own compiler at first use, and kept in the user's cache."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# no -ffast-math, which assumes that there are no NaNs
FLAGS = ("-O3", "-fPIC", "-fno-strict-aliasing", "-fno-math-errno", "-std=gnu11")
NATIVE = "-march=native"
LINK = ("-lm", "-pthread")
PATIENCE = 300
"""Seconds after which a compiler is killed."""


class NotBuilt(Exception):
    """The reason why there is no compiled library, in one line."""


@dataclass(frozen=True)
class Source:
    """What a library is made from."""

    name: str
    """How its files in the cache begin."""
    units: tuple[Path, ...]
    """The files that the compiler is given."""
    folders: tuple[Path, ...]
    """Where these and all headers are that they include."""
    flags: tuple[str, ...] = (*FLAGS, NATIVE)


def _cpu() -> str:
    """What `-march=native` depends on: a cache in a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.platform() + platform.processor()


def build(source: Source, compiler: list[str], folder: Path) -> Path:
    """The library compiled by `compiler`, a program and what it is always given, from `folder` or built into it.

    A file's name holds a hash of what it was made from, and one of its own bytes: code from a file that was cut short
    would end the process (SIGBUS), so such a file is deleted and built anew.

    Raises:
        NotBuilt: the compiler failed, with its first line that tells of an error; or it took too long.
    """
    texts = [file.read_bytes() for part in source.folders for file in sorted(part.glob("*.[ch]"))]
    key = _hash(repr((texts, compiler, list(source.flags), _cpu())).encode())
    for library in sorted(folder.glob(f"{source.name}-{key}-*.so")):
        if library.stem.endswith(_hash(library.read_bytes())):
            return library
        library.unlink(missing_ok=True)  # another process may have deleted it first
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what lies in it is run: nobody else may write there
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # in the same file system, or the rename would be a copy
        # what is compiled with OpenMP is linked without: its calls go to the one runtime that PyTorch has loaded, since
        # the threads of a second one would spin against those of the first
        built = Path(scratch) / "built.so"
        units = {file: str(Path(scratch) / f"{file.name}.o") for file in source.units}
        compiling = [[*source.flags, "-c", str(file), "-o", unit] for file, unit in units.items()]
        for command in (*compiling, ["-shared", *units.values(), "-o", str(built), *LINK]):
            _compile(compiler, command)
        library = folder / f"{source.name}-{key}-{_hash(built.read_bytes())}.so"
        built.replace(library)  # whole or not at all: another process may be looking
    return library


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _compile(compiler: list[str], arguments: list[str]) -> None:
    # in a session of its own: gcc starts cc1, as and ld, and killpg below must end them too
    process = subprocess.Popen(
        [*compiler, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=PATIENCE)
    except BaseException as error:  # Ctrl-C as well as the timeout
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise NotBuilt(f"{shlex.join(compiler)} took more than {PATIENCE} s to compile the kernels") from None
        raise
    if process.returncode:
        lines = said.strip().splitlines() or [f"exit code {process.returncode}"]
        complaint = next((line for line in lines if "error" in line), lines[0])
        raise NotBuilt(f"{shlex.join(compiler)} could not compile the kernels: {complaint}")


def load(source: Source) -> ctypes.CDLL | NotBuilt:
    """The compiled library, or why there is none."""
    try:
        names = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else [["gcc"], ["clang"], ["cc"]]
        compiler = next(([path, *more] for name, *more in names if (path := shutil.which(name))), None)
        if compiler is None:
            return NotBuilt(f"no C compiler found (looked for {', '.join(name for name, *_ in names)})")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retentive"
        built = build(source, compiler, cache)
        try:
            return ctypes.CDLL(str(built))
        except OSError:  # an empty file, as a power cut leaves behind
            built.unlink()
            return ctypes.CDLL(str(build(source, compiler, cache)))
    except (NotBuilt, OSError, RuntimeError, ValueError) as error:
        return NotBuilt(str(error))
