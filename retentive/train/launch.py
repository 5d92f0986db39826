"""Starting several processes on this machine, by what torchrun itself is made of.

A module of its own, which is imported where it is needed: its parts of torch take longer to import than torch.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(processes: int, argv: Sequence[str]) -> None:
    """Runs `python -m retentive ARGV` in so many processes on this machine, as torchrun does, and waits for them.

    Raises:
        SystemExit: one of them has failed, with its exit code; what it said is on stderr already.
    """
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
    try:
        elastic_launch(config, sys.executable)("-m", "retentive", *argv)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)  # of a signal, as shells have it
    except SignalException as stopped:
        sys.exit(0 if stopped.sigval == signal.SIGTERM else 128 + stopped.sigval)
