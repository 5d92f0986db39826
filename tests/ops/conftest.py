"""Libraries in C for other CPUs, as the compiler makes them."""

import ctypes
import functools
from dataclasses import replace

import pytest

from retentive.ops import compiler, cpu


@pytest.fixture(scope="session")
def compiled(root):
    """`compiled(flags)` returns the library built with `flags` instead of -march=native, once for all workers."""
    folder = root / "cpu"

    @functools.cache
    def build(*flags: str) -> ctypes.CDLL:
        source = replace(cpu.SOURCE, flags=(*cpu.SOURCE.flags, *flags))
        return ctypes.CDLL(str(compiler.build(source, ["gcc"], folder)))

    return build
