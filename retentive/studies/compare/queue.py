"""The queue of a comparison: each run in a process of its own (`worker.py`), some of them at a time.

A process of its own, so that a run's memory is its own, whatever ran before. It locks the run while it is at it, so
that the same command may be started twice; and it saves and ends when it is told to, or when whoever started it is
gone. Whoever comes next goes on from there.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from retentive.bench.lab.tables import duration
from retentive.files import make_folder
from retentive.studies.compare.records import RECORD, Run, check_done, read_record
from retentive.threads import bounded_spin
from retentive.train import Interrupted

STOPPED, TAKEN = 130, 75
"""Exit codes of a worker: it was told to stop and has saved; another process is at this run. One that is told while it
loads or scores has nothing to save, and ends by the signal."""


class Task(NamedTuple):
    """A run to do."""

    run: Run
    folder: Path
    about: dict[str, Any]
    """All that decides what comes out of it."""
    order: str
    """What the worker is told, JSON."""

    @property
    def done(self) -> bool:
        """Whether its record is there; ValueError where that is of another comparison."""
        if not (self.folder / RECORD).is_file():
            return False
        check_done(self.folder / RECORD, self.about)
        return True

    @property
    def lock(self) -> FileLock:
        """Held by whoever is at it."""
        return FileLock(self.folder.with_name(f".{self.folder.name}.lock"), timeout=0)


@dataclass
class Job:
    """A worker that is at a task."""

    task: Task
    process: subprocess.Popen
    began: float = field(default_factory=time.monotonic)

    def progress(self) -> str:
        """How far it is, by the last line of its metrics."""
        try:
            last = (self.task.folder / "metrics.jsonl").read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
            steps = json.loads(last)["step"]
        except (OSError, ValueError, KeyError):  # it has not begun, or is just writing
            return f"{self.task.run.name}: begins"
        of = self.task.about["train"]["steps"]
        left = (time.monotonic() - self.began) * (of - steps) / max(steps, 1)
        return f"{self.task.run.name}: step {steps}/{of}, {duration(left)} left"


def work(tasks: Sequence[Task], *, jobs: int, say: Callable[[str], None], progress: Callable[[str], None]) -> None:
    """Train and score each run that is not done and that no other process is at, `jobs` at a time.

    A run whose loss is not a number is done as well: its record says so.

    Raises:
        Interrupted: a signal came; the runs that were under way are saved.
        ChildProcessError: a run failed for another reason, which it has told; the others are saved.
    """
    waiting = [task for task in tasks if not task.done]
    active: list[Job] = []
    failed = ""
    with stop_signals() as came:
        while active or (waiting and not came and not failed):
            while waiting and len(active) < jobs and not came and not failed:
                if not taken(task := waiting.pop(0)):
                    active.append(start(task))
                elif not task.done:
                    say(f"{task.run.name}: another process is at it, the same command goes on when that has ended")
            time.sleep(0.1)
            for job in [job for job in active if job.process.poll() is not None]:
                active.remove(job)
                code = job.process.returncode
                if code == 0:
                    say(f"{told(job)} ({sum(task.done for task in tasks)} of {len(tasks)})")
                elif code not in (STOPPED, TAKEN, -signal.SIGTERM):
                    failed = f"{job.task.run.name} ended with exit code {code}, it says why above"
            if came or failed:
                for job in active:
                    job.process.terminate()
            elif active:
                progress("   ".join(job.progress() for job in active))
    if failed:
        raise ChildProcessError(failed)
    if came:
        done = sum(task.done for task in tasks)
        raise Interrupted(f"stopped with {done} of {len(tasks)} runs done, all else saved", came[0])


def taken(task: Task) -> bool:
    """Whether another process is at it, or has just done it."""
    make_folder(task.folder.parent)
    try:
        with task.lock:
            return task.done
    except Timeout:
        return True


def start(task: Task) -> Job:
    """A worker for the task, in a session of its own: a Ctrl-C in the terminal reaches us, and we tell it."""
    command = [sys.executable, "-m", "retentive.studies.compare.worker", str(os.getpid()), task.order]
    environment = os.environ | bounded_spin()
    return Job(task, subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True))


def told(job: Job) -> str:
    """What came of it, in a line."""
    record = read_record(job.task.folder / RECORD)
    what = record.get("failed") or f"{record['bits_per_byte']:.4f} bits per byte"
    return f"{job.task.run.name}: {what}, {duration(time.monotonic() - job.began)}"


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The numbers of SIGTERM and SIGINT that have come, at any time. Only the main thread can listen."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {s: signal.signal(s, lambda number, _: came.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, old in before.items():
            signal.signal(number, old)
