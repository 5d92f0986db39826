"""Isolated runs: the memory of a pass in a process of its own, and processes that fail."""

from subprocess import CompletedProcess

import pytest

from benchmarks.lab import isolated
from benchmarks.lab.roofline import Work

WORK = Work(1, 2, 16, 32, 64)


@pytest.mark.slow
def test_memory_of_a_process_of_its_own():
    """Outputs and gradients must fit into it, and ours needs hardly more."""
    work = Work(1, 4, 64, 128, 4096)
    result = isolated.in_own_process("retentive", work)
    assert 0 < result["forward_seconds"] < result["seconds"]
    assert 0.95 * work.qkvo_bytes < result["peak_bytes"] < 5 * work.qkvo_bytes


@pytest.mark.slow
def test_a_pass_that_needs_more_than_there_is_says_so():
    """2 TB of inputs."""
    assert isolated.in_own_process("sdpa", Work(1, 8, 64, 128, 1 << 30)) == {"skipped": isolated.NO_MEMORY}


@pytest.mark.parametrize("code", [1, -9])
def test_a_process_that_fails_is_told_in_a_line(code, monkeypatch, refuses):
    """-9: killed by the system, which had no memory left."""
    done = CompletedProcess([], code, stdout="", stderr="Traceback …\nValueError: what went wrong\n")
    monkeypatch.setattr(isolated.subprocess, "run", lambda *_, **__: done)
    if code == -9:
        assert isolated.in_own_process("sdpa", WORK) == {"skipped": isolated.NO_MEMORY}
    else:
        with refuses("sdpa failed at T=64: ValueError: what went wrong", ChildProcessError):
            isolated.in_own_process("sdpa", WORK)
