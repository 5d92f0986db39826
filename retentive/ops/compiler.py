"""C sources compiled at first use, for the CPU that is here, and kept in the user's cache.

The compiler is the machine's own, or where there is none that of the package ziglang (the extra `compiler`). The
environment variable RETENTIVE_ISA forces a set of instructions, CC a compiler.
"""

import ctypes
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# no -ffast-math, which assumes that there are no NaNs
FLAGS = ("-O3", "-fPIC", "-fno-strict-aliasing", "-fno-math-errno", "-std=gnu11")
LINK = ("-lm", "-pthread")
ARM = platform.machine().lower() in ("aarch64", "arm64")
SETS = (
    {
        "native": "-mcpu=native",
        "neon": "-march=armv8-a",
        "dotprod": "-march=armv8.2-a+dotprod",
        "i8mm": "-march=armv8.2-a+dotprod+i8mm",
    }
    if ARM
    else {
        "native": "-march=native",
        "sse2": "-march=x86-64",
        "avx2": "-march=x86-64-v3",
        "avx512": "-march=x86-64-v4",
        "avx512bf16": "-march=cooperlake",
        "amx": "-march=sapphirerapids",
    }
)
"""Instruction sets by name, and the flag that has a compiler use them."""
ZIG = {
    "-march=x86-64": "-mcpu=x86_64",
    "-march=x86-64-v3": "-mcpu=x86_64_v3",
    "-march=x86-64-v4": "-mcpu=x86_64_v4",
    "-march=cooperlake": "-mcpu=cooperlake",
    "-march=sapphirerapids": "-mcpu=sapphirerapids",
    "-march=armv8-a": "-mcpu=generic",
    "-march=armv8.2-a+dotprod": "-mcpu=generic+v8_2a+dotprod",
    "-march=armv8.2-a+dotprod+i8mm": "-mcpu=generic+v8_2a+dotprod+i8mm",
}
"""What ziglang calls them."""
NEEDED = {
    "avx2": "avx2 fma f16c",
    "avx512": "avx512f avx512bw avx512dq avx512vl",
    "avx512bf16": "avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16",
    "amx": "amx_tile amx_int8 amx_bf16 avx512_bf16 avx512_fp16 avx512_vbmi2 avx_vnni",
    "dotprod": "asimddp",
    "i8mm": "asimddp i8mm",
}
"""Flags of /proc/cpuinfo without which they would end the process (SIGILL)."""
PATIENCE = 300
"""Seconds after which a compiler is killed."""


class NotBuilt(Exception):
    """The reason why there is no compiled library, in one line."""


@dataclass(frozen=True)
class Source:
    """What a library is made from."""

    name: str
    """How its files in the cache begin, and what a waiting user is told."""
    units: tuple[Path, ...]
    """The files that the compiler is given."""
    folders: tuple[Path, ...]
    """Where these and all headers are that they include."""
    flags: tuple[str, ...] = FLAGS
    """The compiler's, those for the instruction set left out."""


def _cpu() -> str:
    """What `-march=native` depends on: a cache in a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.platform() + platform.processor()


def instruction_flag(compiler: list[str] | None = None) -> str:
    """The compiler's flag for the instruction set that RETENTIVE_ISA forces, or else for this CPU's own.

    Raises:
        ValueError: an unknown set, or one that this CPU does not have.
    """
    name = os.environ.get("RETENTIVE_ISA") or "native"
    if name not in SETS:
        raise ValueError(f"RETENTIVE_ISA={name} is unknown here, expected one of {', '.join(SETS)}")
    has = set(_cpu().split())
    missing = [flag for flag in NEEDED.get(name, "").split() if has and flag not in has]
    if missing:
        raise ValueError(f"RETENTIVE_ISA={name}: this CPU has no {', '.join(missing)}")
    return ZIG.get(SETS[name], SETS[name]) if "ziglang" in (compiler or ()) else SETS[name]


def find_compiler() -> list[str] | None:
    """A C compiler and what it is always given; None where there is none.

    CC may name one, also with flags of its own; else the first of gcc, clang and cc, and then ziglang's.
    """
    if os.environ.get("CC"):
        try:
            name, *more = shlex.split(os.environ["CC"])
        except ValueError as error:
            raise NotBuilt(f"CC={os.environ['CC']} names no compiler: {error}") from None
        return [path, *more] if (path := shutil.which(name)) else None
    path = next((path for name in ("gcc", "clang", "cc") if (path := shutil.which(name))), None)
    if path:
        return [path]
    return [sys.executable, "-m", "ziglang", "cc"] if importlib.util.find_spec("ziglang") else None


def build(source: Source, compiler: list[str], folder: Path) -> Path:
    """The library compiled by `compiler`, a program and what it is always given, from `folder` or built into it.

    A file's name holds a hash of what it was made from, and one of its own bytes: code from a file that was cut short
    would end the process (SIGBUS), so such a file is deleted and built anew.

    Raises:
        NotBuilt: the compiler failed, with its first line that tells of an error; or it took too long.
    """
    flags = (instruction_flag(compiler), *source.flags)  # what a source says comes later, and wins
    texts = [file.read_bytes() for part in source.folders for file in sorted(part.glob("*.[ch]"))]
    key = short_hash(repr((texts, compiler, flags, _cpu())).encode())
    for library in sorted(folder.glob(f"{source.name}-{key}-*.so")):
        if library.stem.endswith(short_hash(library.read_bytes())):
            return library
        library.unlink(missing_ok=True)  # another process may have deleted it first
    logging.getLogger(__name__).info("compiling its %s kernels for this CPU, once (some seconds)", source.name)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what lies in it is run: nobody else may write there
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # in the same file system, or the rename would be a copy
        # what is compiled with OpenMP is linked without: its calls go to the one runtime that PyTorch has loaded, since
        # the threads of a second one would spin against those of the first
        built = Path(scratch) / "built.so"
        units = {file: str(Path(scratch) / f"{file.name}.o") for file in source.units}
        compiling = [[*flags, "-c", str(file), "-o", unit] for file, unit in units.items()]
        for command in (*compiling, ["-shared", *units.values(), "-o", str(built), *LINK]):
            run(compiler, command)
        if not built.is_file():
            raise NotBuilt(f"{shlex.join(compiler)} makes no library: CC must name a C compiler")
        library = folder / f"{source.name}-{key}-{short_hash(built.read_bytes())}.so"
        built.replace(library)  # whole or not at all: another process may be looking
    return library


def cache_folder() -> Path:
    """Where compiled files are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retentive"


def short_hash(data: bytes) -> str:
    """16 hexadecimal digits that tell contents apart, in names of files."""
    return hashlib.sha256(data).hexdigest()[:16]


def run(compiler: list[str], arguments: list[str]) -> None:
    """Calls a compiler; raises NotBuilt with its first line that tells of an error, or if it takes too long."""
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
    """The compiled library, or why there is none.

    Raises:
        ValueError: RETENTIVE_ISA forces what cannot be.
    """
    instruction_flag()
    cache = cache_folder()
    try:
        compiler = find_compiler()
        if compiler is None:
            looked = os.environ.get("CC") or "gcc, clang, cc"
            return NotBuilt(f"no C compiler found (looked for {looked}); pip install 'retentive[compiler]' brings one")
        built = build(source, compiler, cache)
        try:
            return ctypes.CDLL(str(built))
        except OSError:  # an empty file, as a power cut leaves behind
            built.unlink()
            return ctypes.CDLL(str(build(source, compiler, cache)))
    except OSError as error:
        if error.errno is None:  # the linker's, whose words say all
            return NotBuilt(str(error))
        return NotBuilt(f"no compiled library can be kept in {cache} ({error.strerror}): XDG_CACHE_HOME names another")
    except (NotBuilt, RuntimeError, ValueError) as error:
        return NotBuilt(str(error))
