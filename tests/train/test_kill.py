"""`retentive train` in a process of its own, stopped by SIGTERM and SIGKILL, against an undisturbed run."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from retentive.cli import main
from retentive.train.checkpoints import folders
from tests.train.soak import soak, steps_of, workers_of

STEPS = 60


def arguments(data: Path, out: Path) -> list[str]:
    small = ["--size", "1m", "--set", "dim=32", "layers=2", "heads=2", "dropout=0.1", "--batch", "4", "--length", "32"]
    how = ["--mode", "carry", "--accumulate", "2", "--steps", str(STEPS), "--warmup", "5", "--precision", "fp32"]
    # a checkpoint a step, so that many kills hit the writing of one
    saving = ["--save-every", "1", "--eval-every", "9", "--sample-every", "0", "--device", "cpu"]
    return ["train", "--data", str(data), "--out", str(out), *small, *how, *saving]


@pytest.fixture(scope="module")
def whole(packed, tmp_path_factory) -> Path:
    """The undisturbed run."""
    out, threads = tmp_path_factory.mktemp("whole") / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    main(arguments(packed, out))
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def stopped(packed):
    """`stopped(out, number, steps)`: (exit code, stderr) of a process that gets signal `number` after `steps` steps."""
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


@pytest.mark.slow
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
    """The moment is random in every run of the test."""
    out, steps, wait = tmp_path / "run", random.randrange(STEPS // 2), random.uniform(0, 0.05)
    code, errors = stopped(out, signal.SIGKILL, steps, wait, more)
    assert code == -signal.SIGKILL, errors
    main([*arguments(packed, out), "--resume"])
    print(f"killed {wait:.4f} s after step {steps}")  # shown where the test fails
    same_end(out, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_starts_killed_processes_again(tmp_path):
    """Two kills, of two processes with shards; `python -m tests.train.soak` does more."""
    result = soak(tmp_path, 2, random.Random())
    assert result["exit_code"] == 0 and result["kills"] == 2
    assert result["largest_difference_of_losses"] < 1e-6  # two processes round differently than one


def arguments_of_many(data: Path, out: Path, steps: int, *, save_every: int = 10) -> list[str]:
    small = ["--size", "1m", "--set", "dim=32", "layers=2", "heads=2", "--batch", "4", "--length", "32"]
    how = ["--steps", str(steps), "--precision", "fp32", "--device", "cpu", "--resume"]
    how += ["--save-every", str(save_every)]
    return ["train", "--data", str(data), "--out", str(out), *small, *how, "--eval-every", "0", "--sample-every", "0"]


@pytest.fixture
def launched(tmp_path):
    """`launched(command)`: a process with output to a file; after the test all are ended, with their children."""
    processes, environment = [], {**os.environ, "OMP_NUM_THREADS": "1"}

    def launch(*command: str) -> subprocess.Popen:
        with (tmp_path / f"output.{len(processes)}").open("w") as file:
            processes.append(subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, env=environment))
        return processes[-1]

    yield launch
    for process in processes:
        process.terminate()
        process.wait(timeout=60)
        print((tmp_path / f"output.{processes.index(process)}").read_text())  # shown where the test fails


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_processes_of_two_machines_start_again(victim, packed, tmp_path, launched):
    """The processes meet although one of torchrun's two agents counts a restart and the other may not."""
    out, port = tmp_path / "run", free_port()
    where = ["--rdzv-backend", "c10d", "--rdzv-id", str(port), "--rdzv-endpoint", f"localhost:{port}"]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", *where]
    train = ["-m", "retentive", *arguments_of_many(packed, out, 60), "--patience", "60", "--dp-shard", "2"]
    agents = [launched(*torchrun, *train) for _ in range(2)]
    until(lambda: steps_of(out) > 12)
    os.kill(workers_of(agents[victim].pid)[0], signal.SIGKILL)
    for agent in agents:
        assert agent.wait(timeout=120) == 0
    assert steps_of(out) == 60


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["told", "killed"])
def test_processes_save_and_end_with_the_one_that_started_them(number, packed, tmp_path, launched):
    out = tmp_path / "run"
    launcher = launched("-m", "retentive", *arguments_of_many(packed, out, 100_000, save_every=100_000), "--nproc", "2")
    until(lambda: steps_of(out) > 3)
    workers = workers_of(launcher.pid)
    assert len(workers) == 2
    launcher.send_signal(number)
    assert launcher.wait(timeout=60) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    done = int(folders(out)[-1].name.removeprefix("step-"))
    assert done > 3 and steps_of(out) == done  # saved where they stopped: no other save was due


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_rank_that_was_killed_is_named(victim, packed, tmp_path, launched):
    """In one line, without a traceback: the other one ends as its connections break."""
    out = tmp_path / "run"
    launcher = launched("-m", "retentive", *arguments_of_many(packed, out, 100_000), "--nproc", "2", "--dp-shard", "2")
    until(lambda: steps_of(out) > 12)
    ranks = workers_of(launcher.pid)
    os.kill(ranks[victim], signal.SIGKILL)
    assert launcher.wait(timeout=60) == 2
    said = (tmp_path / "output.0").read_text().splitlines()
    killed = f"retentive: rank {victim} was ended by SIGKILL, as when memory runs out: go on with --resume"
    assert said[-1] == killed and sum(line.startswith("retentive:") for line in said) == 1
    until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))


@pytest.mark.slow
@pytest.mark.parametrize("begun", [True, False], ids=["training", "starting"])
def test_ctrl_c_in_a_terminal_reaches_all_and_is_answered_once(begun, packed, tmp_path):
    """The launcher and its ranks are one process group, all of which the terminal interrupts."""
    out, environment = tmp_path / "run", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "retentive", *arguments_of_many(packed, out, 100_000), "--nproc", "2"]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        until(lambda: steps_of(out) > 3 if begun else len(workers_of(launcher.pid)) == 2)
        os.killpg(launcher.pid, signal.SIGINT)
        errors = launcher.communicate(timeout=60)[1].splitlines()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 130 and "Traceback" not in errors
    if begun:
        assert errors[-1].startswith("stopped at step ") and errors[-1].endswith("saved; go on with --resume")
    else:
        assert errors[-2:] == ["", "stopped: nothing was saved yet"]
