"""Libraries in C for other CPUs, as the compiler makes them."""

import ctypes
import functools
from dataclasses import replace

import pytest

from retentive.ops import compiler, cpu


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """`compiled(flags)` returns the library built once with `flags` instead of -march=native."""
    folder = tmp_path_factory.mktemp("cpu")

    @functools.cache
    def build(*flags: str) -> ctypes.CDLL:
        source = replace(cpu.SOURCE, flags=(*cpu.SOURCE.flags, *flags))
        return ctypes.CDLL(str(compiler.build(source, ["gcc"], folder)))

    return build
