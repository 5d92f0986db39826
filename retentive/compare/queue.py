"""Queue of a comparison: each run in its own process (`worker.py`), several at a time.

A process of its own makes a run's peak memory independent of earlier runs. A worker locks its run, so that the same
comparison may be started twice. It saves and ends on SIGTERM, or when its parent process has ended. The next start
resumes from there.
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
"""Exit codes of a worker: a signal came and the run is saved; another process has locked the run. A worker has nothing
to save while it loads or scores, and then ends by the signal itself."""


class Task(NamedTuple):
    """Task of a worker: one run."""

    run: Run
    folder: Path
    """Run directory."""
    about: dict[str, Any]
    """Everything that the result depends on, except the model."""
    config: Config
    """Config of the model, except the vocabulary size."""
    argument: str
    """Command-line argument of the worker, JSON: see `worker.main`."""

    @property
    def done(self) -> bool:
        """True if the record exists.

        Raises:
            ValueError: the record, or the model in the folder, belongs to another comparison.
        """
        if (self.folder / RECORD).is_file():
            check_done(self.folder / RECORD, self.about, self.config)
            return True
        if (self.folder / "config.json").is_file():  # the run has begun
            check_model(self.folder, ModelFolder.open(self.folder).config.written(), self.config)
        return False

    @property
    def lock(self) -> FileLock:
        """Lock of the process that trains or scores the run."""
        return lock_of(self.folder)


def lock_of(folder: Path) -> FileLock:
    """Returns the lock of a run, beside its directory, which training locks separately."""
    return FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)


@dataclass
class Job:
    """Task with its worker."""

    task: Task
    process: subprocess.Popen
    began: float = field(default_factory=time.monotonic)
    resumed: int = field(init=False)
    """Step that the run continues from; 0 for a new one."""

    def __post_init__(self) -> None:
        self.resumed = self.steps()

    def steps(self) -> int:
        """Returns the steps that the run has, by the last line of its metrics."""
        try:
            last = (self.task.folder / "metrics.jsonl").read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
            return json.loads(last)["step"]
        except (OSError, ValueError, KeyError):  # nothing or half a line is written yet
            return 0

    def progress(self) -> str:
        """Returns a line on the progress. The time left is by the steps of this process, not by those it continues."""
        name, steps, of = self.task.run.name, self.steps(), self.task.about["train"]["steps"]
        if steps >= of:
            return f"{name}: scoring"
        done = steps - self.resumed
        if done <= 0:
            return f"{name}: continues at step {steps}/{of}" if steps else f"{name}: begins"
        return f"{name}: step {steps}/{of}, {duration((time.monotonic() - self.began) * (of - steps) / done)} left"


def work(tasks: Sequence[Task], *, jobs: int, say: Callable[[str], None], progress: Callable[[str], None]) -> None:
    """Trains and scores each run that is neither done nor locked by another process, `jobs` at a time.

    A run whose loss is not finite counts as done; its record says so.

    Args:
        say: called with a line when a run is done.
        progress: called several times a second with a line on the current runs.

    Raises:
        Interrupted: a signal came; the current runs are saved.
        ChildProcessError: a worker failed for a reason that it has printed; the other runs are saved.
    """
    waiting = [task for task in tasks if not task.done]
    active: list[Job] = []
    failed = ""
    # Not insistent: a second Ctrl-C must not end the wait for the workers, which are saving.
    with stop_signals(insistent=False) as stop:
        while active or (waiting and not stop.signal and not failed):
            while waiting and len(active) < jobs and not stop.signal and not failed:
                if not locked_or_done(task := waiting.pop(0)):
                    active.append(start(task))
                elif not task.done:
                    say(taken(task))
            time.sleep(0.1)
            for job in [job for job in active if job.process.poll() is not None]:
                active.remove(job)
                code = job.process.returncode
                if code == 0:
                    say(f"{outcome(job)} ({sum(task.done for task in tasks)} of {len(tasks)})")
                elif code == TAKEN and not job.task.done:
                    say(taken(job.task))
                elif code not in (STOPPED, TAKEN, -signal.SIGTERM):
                    failed = f"{job.task.run.name} {ending(code)}"
            if stop.signal or failed:
                for job in active:  # in every round: harmless, since a worker only notes it, or has ended
                    job.process.terminate()
            elif active:
                progress("   ".join(job.progress() for job in active))
    if failed:
        raise ChildProcessError(failed)
    if stop.signal:
        done = sum(task.done for task in tasks)
        raise Interrupted(f"stopped with {done} of {counted(len(tasks), 'run')} done, all else saved", stop.signal)


def locked_or_done(task: Task) -> bool:
    """True if another process does the task, or has finished it meanwhile.

    The worker locks the run again. If another process was faster, the worker ends with TAKEN.
    """
    make_folder(task.folder.parent)
    try:
        with task.lock:
            return task.done
    except Timeout:
        return True


def start(task: Task) -> Job:
    """Starts a worker for the task.

    The worker has its own session: Ctrl-C in the terminal reaches only this process, which then stops the worker.
    """
    command = [sys.executable, "-m", "retentive.compare.worker", str(os.getpid()), task.argument]
    environment = os.environ | bounded_spin()
    return Job(task, subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True))


def taken(task: Task) -> str:
    """Returns a line on a run that another process has locked."""
    return f"{task.run.name}: another process trains it; repeat the command when that has ended"


def outcome(job: Job) -> str:
    """Returns the result of a finished job in a line."""
    record = read_record(job.task.folder / RECORD)
    result = record.get("failed") or f"{record['bits_per_byte']:.4f} bits per byte"
    return f"{job.task.run.name}: {result}, {duration(time.monotonic() - job.began)}"


def ending(code: int) -> str:
    """Describes the end of a worker that did not finish its task."""
    if code < 0:  # a signal ended it
        hint = ", as when memory runs out" if code == -signal.SIGKILL else ""
        return f"was ended by signal {-code}{hint}"
    return f"ended with exit code {code}, it says why above"
