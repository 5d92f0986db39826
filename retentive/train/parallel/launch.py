"""Start the ranks of a run on this machine, as `torchrun --nproc-per-node N` does, and report a lost rank."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch.distributed as dist

from retentive import machine
from retentive.train.parallel.rendezvous import LAUNCHED, stop_without
from retentive.train.signals import stop_signals

SAVING = 600.0
"""Seconds for ranks to save after they were told to stop."""
HEARD = 3.0
"""Seconds after a Ctrl-C before ranks are told: in a terminal they received it too, and may be ending already."""
ENDING = 30.0
"""Seconds for ranks to end after another rank failed, which breaks their connections to it."""


def launch(work: Callable[[], object], nproc: int) -> None:
    """Call `work`, such as `TrainRun(…).run`, in `nproc` processes on this machine; returns when all have ended.

    The processes are spawned: `work` must be picklable, and a script needs `if __name__ == "__main__":`.

    Raises:
        ChildProcessError: a rank was killed, for example when memory ran out, or did not end after another had failed.
        SystemExit: a rank failed and reported why, or all were told to stop (exit code 0 if all have saved).
        KeyboardInterrupt: Ctrl-C before the ranks could save.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(work, n, nproc, store.port, os.getpid())) for n in range(nproc)]
    # not insistent: the ranks receive a second Ctrl-C themselves, and this process waits for them
    with stop_signals(insistent=False) as stop:
        try:
            _start(ranks)
            while (alive := _alive(ranks)) and not stop.signal and not _failed(ranks):
                wait([rank.sentinel for rank in alive], timeout=0.2)
            if stop.signal == signal.SIGINT:
                _join(ranks, HEARD)
            if stop.signal:
                for rank in _alive(ranks):
                    rank.terminate()
            _join(ranks, SAVING if stop.signal else ENDING)
        finally:
            stuck = _alive(ranks)
            for rank in stuck:
                rank.kill()
                rank.join()
    codes = [rank.exitcode or 0 for rank in ranks]
    if stop.signal == signal.SIGINT and -signal.SIGTERM in codes:
        raise KeyboardInterrupt
    if stop.signal:
        sys.exit(128 + stop.signal if stop.signal == signal.SIGINT else max(map(as_shells_have_it, codes)))
    for number, rank in enumerate(ranks):
        if codes[number] < 0:
            how = "did not end after another rank had failed" if rank in stuck else ended_by(-codes[number])
            raise ChildProcessError(f"rank {number} {how}: go on with `resume=True`")
    if any(codes):  # the failed rank has reported its error
        sys.exit(next(code for code in codes if code))


def _start(ranks: Sequence[BaseProcess]) -> None:
    """Start the processes with this environment, and with Ctrl-C ignored until the training loop handles it.

    Otherwise an early Ctrl-C would print a traceback of each process.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        # by default each process would use all cores, and wait for its threads more than it computes
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(ranks))))
        for rank in ranks:
            rank.start()
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        if main:
            signal.signal(signal.SIGINT, before)


def _rank(work: Callable[[], object], rank: int, nproc: int, port: int, launcher: int) -> None:
    """Work of each process."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{nproc}", LAUNCHED: "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    stop_without(launcher)
    machine.keep_freed_memory()
    try:
        work()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending, with the exit code that says how


def _join(ranks: Sequence[BaseProcess], seconds: float) -> None:
    end = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))


def _alive(ranks: Sequence[BaseProcess]) -> list[BaseProcess]:
    return [rank for rank in ranks if rank.is_alive()]


def _failed(ranks: Sequence[BaseProcess]) -> bool:
    return any(rank.exitcode for rank in ranks)


def ended_by(number: int) -> str:
    """Text about a process that a signal ended, such as "was ended by SIGKILL, as when memory runs out"."""
    hint = ", as when memory runs out" if number == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(number).name}{hint}"


def as_shells_have_it(code: int) -> int:
    """Exit code as shells report it: 128 plus the signal's number for a process that a signal ended."""
    return code if code >= 0 else 128 - code
