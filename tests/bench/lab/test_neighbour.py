"""The neighbour: busy while the block runs, gone afterwards whatever happened; quiet and beside it in turns."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from retentive import machine
from retentive.bench.lab import neighbour
from retentive.tables import counted

CPU = torch.device("cpu")
TICK = os.sysconf("SC_CLK_TCK") if "SC_CLK_TCK" in os.sysconf_names else 100


def cpu_seconds(pid: int) -> float:
    """Returns the seconds of CPU time that a process has used."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / TICK


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the time of another process is read from /proc")
def test_it_is_busy_in_the_block_and_gone_after_it():
    with pytest.raises(ZeroDivisionError), neighbour.neighbour() as process:
        assert process.poll() is None
        end = time.monotonic() + 30
        while cpu_seconds(process.pid) < 0.1 and time.monotonic() < end:
            continue
        assert cpu_seconds(process.pid) >= 0.1, "it does nothing"
        raise ZeroDivisionError
    assert process.poll() is not None


def test_it_ends_with_whoever_began_it():
    """Here with a process that is killed, and so cannot end it."""
    code = f"import subprocess, sys, time; busy = subprocess.Popen([sys.executable, '-c', {neighbour.BUSY!r}]); "
    code += "time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as between:
        between.stdout.readline()  # the busy process is at work
        between.kill()
        assert between.stdout.read() == b"", "the pipe ends with the last process that writes to it"


def test_quiet_and_beside_are_measured_in_turns(monkeypatch):
    beside, order = [], []

    @contextmanager
    def made_up():
        beside.append(True)
        yield
        beside.pop()

    def clock(device, run):
        run()
        order.append("beside" if beside else "quiet")
        return 4.0 if beside else 1.0

    monkeypatch.setattr(neighbour, "neighbour", made_up)
    monkeypatch.setattr(machine, "clock", clock)
    found = neighbour.speed_kept(lambda: None, CPU, repeats=2)
    assert order == ["quiet"] + ["quiet", "beside"] * 3
    threads = torch.get_num_threads()
    assert found == {"quiet_seconds": 1.0, "beside_seconds": 4.0, "kept": 0.25, "repeats": 2, "threads": threads}
    line = neighbour.note(found, "a step")
    on = counted(threads, "thread")
    assert line == f"- Beside one other busy process, a step keeps 25% of its speed: 4 s instead of 1 s ({on})."


def test_a_short_run_is_repeated_until_it_is_long_enough(monkeypatch):
    """A scheduler lets a process run for milliseconds: what is shorter would meet the neighbour or not."""
    ran = []

    @contextmanager
    def nobody():
        yield

    def clock(device, run):
        before = len(ran)
        run()
        return 0.125 * (len(ran) - before)

    monkeypatch.setattr(neighbour, "neighbour", nobody)
    monkeypatch.setattr(machine, "clock", clock)
    found = neighbour.speed_kept(lambda: ran.append(1), CPU, repeats=1)
    assert len(ran) == 2 + 4 * 4 and found["quiet_seconds"] == found["beside_seconds"] == 0.125
