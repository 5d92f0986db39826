"""Starting several processes on this machine, by what torchrun itself is made of.

A module of its own, which is imported where it is needed: its parts of torch take longer to import than torch.
"""

import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import subprocess_handler
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SAVING = "600"
"""Seconds that processes have to save once they were told to stop; torchrun's own 30 are short for a large model."""


def launch(processes: int, argv: Sequence[str]) -> None:
    """Runs `python -m retentive ARGV` in so many processes on this machine, as torchrun does, and waits for them.

    Raises:
        SystemExit: one of them has failed, with its exit code; what it said is on stderr already. Or all were told to
            stop: 0 if they have saved.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVING)  # which torch knows from 2.13 on
    # each would take all cores, and wait for its threads more than it computes
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # of a failure the first process has said all
    processes_of_run = list[subprocess.Popen]()

    class Kept(subprocess.Popen):
        """A process whose exit code can still be asked for when torchrun is stopped by a signal: it does not tell."""

        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            processes_of_run.append(self)

    subprocess_handler.subprocess_handler.Popen = Kept  # type: ignore[misc]
    try:
        elastic_launch(config, sys.executable)("-m", "retentive", *argv)
    except ChildFailedError as error:
        sys.exit(as_shells_have_it(error.get_first_failure()[1].exitcode))
    except SignalException as stopped:
        codes = [as_shells_have_it(process.wait()) for process in processes_of_run]
        sys.exit(max(codes, default=128 + stopped.sigval))


def as_shells_have_it(code: int) -> int:
    """The exit code of a process, that of one which a signal ended as a positive number."""
    return code if code >= 0 else 128 - code
