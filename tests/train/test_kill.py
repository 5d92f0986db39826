"""`retentive train` in a process of its own, stopped by SIGTERM and by SIGKILL, against the run that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from retentive.cli import main
from retentive.train.checkpoints import folders
from tests.train.soak import soak

STEPS = 60


def arguments(data: Path, out: Path) -> list[str]:
    small = ["--size", "1m", "--set", "dim=32", "layers=2", "heads=2", "dropout=0.1", "--batch", "4", "--length", "32"]
    how = ["--mode", "carry", "--accumulate", "2", "--steps", str(STEPS), "--warmup", "5", "--precision", "fp32"]
    # a checkpoint a step, so that many a moment falls into the writing of one
    saving = ["--save-every", "1", "--eval-every", "9", "--sample-every", "0", "--device", "cpu"]
    return ["train", "--data", str(data), "--out", str(out), *small, *how, *saving]


@pytest.fixture(scope="module")
def whole(packed, tmp_path_factory) -> Path:
    """The run that nothing stops."""
    out, threads = tmp_path_factory.mktemp("whole") / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    main(arguments(packed, out))
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def stopped(packed):
    """`stopped(out, number, steps)`: (exit code, stderr) of a process that gets signal `number` after those steps."""
    processes = []

    def run(out: Path, number: int, steps: int, wait: float = 0, more: tuple[str, ...] = ()) -> tuple[int, str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in the tests' own process
        command = [sys.executable, "-W", "error", "-m", "retentive", *arguments(packed, out), *more]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        log, deadline = out / "metrics.jsonl", time.monotonic() + 60
        while process.poll() is None and not (log.is_file() and log.read_bytes().count(b'"loss"') >= steps):
            assert time.monotonic() < deadline, "no training within a minute"
            time.sleep(0.002)
        time.sleep(wait)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["term", "usr1"])
def test_a_signal_saves_and_exits_well(number, packed, whole, tmp_path, stopped, same_end, capfd):
    out = tmp_path / "run"
    code, errors = stopped(out, number, 7)
    assert code == 0, errors
    done = int(folders(out)[-1].name.removeprefix("step-"))
    assert 7 <= done < STEPS
    assert errors.splitlines()[-1] == f"stopped at step {done} of {STEPS}, saved; go on with --resume"
    main([*arguments(packed, out), "--resume"])
    same_end(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--async-save",)], ids=["at-once", "async"])
def test_sigkill_at_any_moment_loses_nothing_but_time(more, packed, whole, tmp_path, stopped, same_end, capfd):
    """A moment drawn anew every time: it must not matter."""
    out, steps, wait = tmp_path / "run", random.randrange(STEPS // 2), random.uniform(0, 0.05)
    code, errors = stopped(out, signal.SIGKILL, steps, wait, more)
    assert code == -signal.SIGKILL, errors
    main([*arguments(packed, out), "--resume"])
    print(f"killed {wait:.4f} s after step {steps}")  # shown where the test fails
    same_end(out, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_starts_killed_processes_again(tmp_path):
    """Twice, of two that have shards; `python -m tests.train.soak` does it more often."""
    result = soak(tmp_path, 2, random.Random())
    assert result["exit_code"] == 0 and result["kills"] == 2
    assert result["largest_difference_of_losses"] < 1e-6  # two processes round otherwise than one
