"""The queue of a comparison: each run in a process of its own (`worker.py`), some of them at a time.

In a process of its own a run's peak memory is its own, whatever ran before. A worker locks its run, so that the same
comparison may be started twice; and it saves and ends on SIGTERM, or when the process that started it has ended. The
next start goes on from there.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from retentive.checkpoint import ModelFolder
from retentive.compare.records import RECORD, Run, check_done, check_model, read_record
from retentive.files import make_folder
from retentive.models import Config
from retentive.tables import counted, duration
from retentive.threads import bounded_spin
from retentive.train import Interrupted
from retentive.train.signals import stop_signals

STOPPED, TAKEN = 130, 75
"""Exit codes of a worker: a signal has come and the run is saved; another process has locked the run. A worker that is
signalled while it loads or scores has nothing to save, and ends by the signal."""


class Task(NamedTuple):
    """A run to do."""

    run: Run
    folder: Path
    """Its run directory."""
    about: dict[str, Any]
    """All that its result depends on, beside the model."""
    config: Config
    """The model's, but for the vocabulary."""
    argument: str
    """The worker's command-line argument, JSON: see `worker.main`."""

    @property
    def done(self) -> bool:
        """Whether its record is there.

        Raises:
            ValueError: the record, or the model that is there, is of another comparison.
        """
        if (self.folder / RECORD).is_file():
            check_done(self.folder / RECORD, self.about, self.config)
            return True
        if (self.folder / "config.json").is_file():  # it is under way
            check_model(self.folder, ModelFolder.open(self.folder).config.written(), self.config)
        return False

    @property
    def lock(self) -> FileLock:
        """Held by the process that trains or scores it."""
        return lock_of(self.folder)


def lock_of(folder: Path) -> FileLock:
    """The lock of a run; beside its directory, which has a lock of its own while it is trained."""
    return FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)


@dataclass
class Job:
    """A task with the worker that does it."""

    task: Task
    process: subprocess.Popen
    began: float = field(default_factory=time.monotonic)

    def progress(self) -> str:
        """A line on how far it is, by the last line of its metrics."""
        try:
            last = (self.task.folder / "metrics.jsonl").read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
            steps = json.loads(last)["step"]
        except (OSError, ValueError, KeyError):  # nothing is written yet, or half a line
            return f"{self.task.run.name}: begins"
        of = self.task.about["train"]["steps"]
        if steps >= of:
            return f"{self.task.run.name}: scoring"
        left = (time.monotonic() - self.began) * (of - steps) / max(steps, 1)
        return f"{self.task.run.name}: step {steps}/{of}, {duration(left)} left"


def work(tasks: Sequence[Task], *, jobs: int, say: Callable[[str], None], progress: Callable[[str], None]) -> None:
    """Trains and scores each run that is neither done nor locked by another process, `jobs` of them at a time.

    A run whose loss is no longer finite is done as well: its record says so.

    Args:
        say: called with a line when a run is done.
        progress: called some times a second with a line on the runs under way.

    Raises:
        Interrupted: a signal came; the runs that were under way are saved.
        ChildProcessError: a worker failed for another reason, which it has printed; the other runs are saved.
    """
    waiting = [task for task in tasks if not task.done]
    active: list[Job] = []
    failed = ""
    # Not insistent: a second Ctrl-C must not stop the wait for the workers, which are saving.
    with stop_signals(insistent=False) as stop:
        while active or (waiting and not stop.signal and not failed):
            while waiting and len(active) < jobs and not stop.signal and not failed:
                if not locked_or_done(task := waiting.pop(0)):
                    active.append(start(task))
                elif not task.done:
                    say(f"{task.run.name}: another process is at it: when that has ended, give the same command again")
            time.sleep(0.1)
            for job in [job for job in active if job.process.poll() is not None]:
                active.remove(job)
                code = job.process.returncode
                if code == 0:
                    say(f"{outcome(job)} ({sum(task.done for task in tasks)} of {len(tasks)})")
                elif code not in (STOPPED, TAKEN, -signal.SIGTERM):
                    failed = f"{job.task.run.name} {ending(code)}"
            if stop.signal or failed:
                for job in active:  # in every round, which does no harm: a worker takes a note of it, or has ended
                    job.process.terminate()
            elif active:
                progress("   ".join(job.progress() for job in active))
    if failed:
        raise ChildProcessError(failed)
    if stop.signal:
        done = sum(task.done for task in tasks)
        raise Interrupted(f"stopped with {done} of {counted(len(tasks), 'run')} done, all else saved", stop.signal)


def locked_or_done(task: Task) -> bool:
    """Whether another process is doing the task, or has done it since it was put on the list.

    The worker locks it again: another process may be faster, and then the worker ends with TAKEN.
    """
    make_folder(task.folder.parent)
    try:
        with task.lock:
            return task.done
    except Timeout:
        return True


def start(task: Task) -> Job:
    """A worker that does the task.

    It has a session of its own, so that a Ctrl-C in the terminal reaches this process alone, which then stops it.
    """
    command = [sys.executable, "-m", "retentive.compare.worker", str(os.getpid()), task.argument]
    environment = os.environ | bounded_spin()
    return Job(task, subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True))


def outcome(job: Job) -> str:
    """The result of a job that is done, in a line."""
    record = read_record(job.task.folder / RECORD)
    result = record.get("failed") or f"{record['bits_per_byte']:.4f} bits per byte"
    return f"{job.task.run.name}: {result}, {duration(time.monotonic() - job.began)}"


def ending(code: int) -> str:
    """How a worker has ended that did not do its task."""
    if code < 0:  # Popen's way to say that a signal ended it
        hint = ", as when memory runs out" if code == -signal.SIGKILL else ""
        return f"was ended by signal {-code}{hint}"
    return f"ended with exit code {code}, it says why above"
