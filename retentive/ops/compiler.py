"""Compiles C sources at first use for this machine's CPU, and keeps the libraries in the user's cache.

Uses the machine's own compiler, or the package ziglang (extra `compiler`) if it has none. The environment variable
RETENTIVE_ISA forces an instruction set, CC a compiler.
"""

import contextlib
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# No -ffast-math, which assumes there are no NaNs. -fno-trapping-math changes no number; without it GCC vectorises no
# loop over exponentials, unless the processor has masks (AVX-512).
FLAGS = ("-O3", "-fPIC", "-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11")
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
"""Instruction sets by name, with the compiler flag that enables each."""
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
"""ziglang's names for these flags."""
NEEDED = {
    "avx2": "avx2 fma f16c",
    "avx512": "avx512f avx512bw avx512dq avx512vl",
    "avx512bf16": "avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16",
    "amx": "amx_tile amx_int8 amx_bf16 avx512_bf16 avx512_fp16 avx512_vbmi2 avx_vnni",
    "dotprod": "asimddp",
    "i8mm": "asimddp i8mm",
}
"""Flags of /proc/cpuinfo that each set needs; without them it would end the process (SIGILL)."""
PATIENCE = 300
"""Timeout of the compiler in seconds."""


class NotBuilt(Exception):
    """Reason why there is no compiled library, in one line."""


@dataclass(frozen=True)
class Source:
    """Sources of one library."""

    name: str
    """Name for messages; the files in the cache start with it."""
    units: tuple[Path, ...]
    """Source files, each compiled as one unit."""
    folders: tuple[Path, ...]
    """Folders that hold the units and all headers they include."""
    flags: tuple[str, ...] = FLAGS
    """Compiler flags, without those for the instruction set."""


def _cpu() -> str:
    """Describes the CPU that `-march=native` compiles for: unlike machines may share a cache in a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.platform() + platform.processor()


def instruction_flag(compiler: list[str] | None = None) -> str:
    """Returns the compiler flag for the instruction set in RETENTIVE_ISA, or for this CPU's own.

    Raises:
        ValueError: the set is unknown, or this CPU does not support it.
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
    """Returns a C compiler with its fixed arguments; None if there is none.

    CC may name one, with arguments. Otherwise the first of gcc, clang and cc is used, then ziglang's.

    Raises:
        NotBuilt: CC cannot be parsed.
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
    """Returns the library from `folder`, compiling it with `compiler` (a program and its fixed arguments) if missing.

    The file's name holds one hash of its sources and one of its own bytes. Running a truncated file would end the
    process (SIGBUS), so a file that does not match its hash is deleted and built again.

    Raises:
        NotBuilt: the compiler failed (with its first line about an error), or it timed out.
    """
    flags = (instruction_flag(compiler), *source.flags)  # the source's flags come last, so they win
    texts = [file.read_bytes() for part in source.folders for file in sorted(part.glob("*.[ch]"))]
    key = short_hash(repr((texts, compiler, flags, _cpu())).encode())
    if library := _kept(source.name, key, folder):
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # holds code that is run: writable by its owner only
    with _alone(folder):
        return _kept(source.name, key, folder) or _compile(source, key, compiler, flags, folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits while another process compiles into `folder`: processes that start together then compile once."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: each compiles for itself
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _kept(name: str, key: str, folder: Path) -> Path | None:
    """Returns the whole library of this key, after deleting broken ones, or None."""
    for library in sorted(folder.glob(f"{name}-{key}-*.so")):
        if library.stem.endswith(short_hash(library.read_bytes())):
            return library
        library.unlink(missing_ok=True)  # another process may have deleted it first
    return None


def _compile(source: Source, key: str, compiler: list[str], flags: tuple[str, ...], folder: Path) -> Path:
    logging.getLogger(__name__).info("compiling its %s kernels for this CPU, once (some seconds)", source.name)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # same file system, so that the rename is atomic
        # Compiled with OpenMP, but linked without: calls go to the one runtime that PyTorch has loaded. Threads of a
        # second runtime would spin against those of the first.
        built = Path(scratch) / "built.so"
        units = {file: str(Path(scratch) / f"{file.name}.o") for file in source.units}
        compiling = [[*flags, "-c", str(file), "-o", unit] for file, unit in units.items()]
        for command in (*compiling, ["-shared", *units.values(), "-o", str(built), *LINK]):
            run(compiler, command)
        if not built.is_file():
            raise NotBuilt(f"{shlex.join(compiler)} makes no library: CC must name a C compiler")
        library = folder / f"{source.name}-{key}-{short_hash(built.read_bytes())}.so"
        built.replace(library)  # atomic: another process may be looking for it
    return library


def cache_folder() -> Path:
    """Returns this package's folder in the user's cache, for compiled files and downloaded models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retentive"


def short_hash(data: bytes) -> str:
    """Returns 16 hexadecimal digits of the SHA-256 hash, to tell contents apart in file names."""
    return hashlib.sha256(data).hexdigest()[:16]


def run(compiler: list[str], arguments: list[str]) -> None:
    """Calls a compiler. Raises NotBuilt with its first line about an error, or if it times out."""
    # in its own session, so that killpg below also ends the cc1, as and ld that gcc starts
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
    """Returns the compiled library, or the reason why there is none.

    Raises:
        ValueError: RETENTIVE_ISA names an unknown or unsupported instruction set.
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
        except OSError:  # an empty file, left by a power cut
            built.unlink()
            return ctypes.CDLL(str(build(source, compiler, cache)))
    except OSError as error:
        if error.errno is None:  # from the dynamic linker, whose message is complete
            return NotBuilt(str(error))
        return NotBuilt(f"no compiled library can be kept in {cache} ({error.strerror}): XDG_CACHE_HOME names another")
    except (NotBuilt, RuntimeError, ValueError) as error:
        return NotBuilt(str(error))
