"""Choice of the backend on this machine, and how `describe` reports it."""

import pytest
import torch

from retentive.ops import backends
from retentive.ops import cpu as cpu_module


def test_the_fastest_is_named_alone():
    if cpu_module.unavailable():
        pytest.skip(cpu_module.unavailable())
    for dtype in cpu_module.DTYPES:
        assert backends.describe("cpu", dtype) == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_slower_one_is_named_with_the_reason(dtype, monkeypatch):
    missing = cpu_module.NotBuilt("no C compiler found (looked for gcc, clang, cc)")
    monkeypatch.setattr(cpu_module, "library", lambda: missing)
    assert backends.describe("cpu", dtype) == f"blocked (cpu, which is faster: {missing})"


def test_what_is_said_is_what_is_taken(monkeypatch):
    """In float64, which no compiled kernel computes, and on a device that no backend was written for."""
    assert backends.describe("cpu", torch.float64).startswith("blocked (cpu, which is faster: it computes in float32")
    assert backends.describe("meta") == "blocked"
