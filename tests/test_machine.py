"""Facts about the machine, also if the system omits some."""

import torch

from retentive import machine

CPU = torch.device("cpu")


def test_memory_is_read_from_the_lines_of_proc(tmp_path, monkeypatch):
    status, memory = tmp_path / "status", tmp_path / "meminfo"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n", encoding="ascii")
    memory.write_text("MemTotal:  4096 kB\nMemAvailable:  3072 kB\n", encoding="ascii")
    monkeypatch.setattr(machine, "STATUS", status)
    monkeypatch.setattr(machine, "MEMORY", memory)
    assert machine.held_memory() == 1024 * 1024 and machine.held_memory("VmHWM") == 2048 * 1024
    assert machine.free_memory(CPU) == 3072 * 1024


def test_lines_that_are_left_out_stop_nothing(tmp_path, monkeypatch):
    """A sandbox such as gVisor has the files without these lines; a run must not end because of that."""
    status, memory = tmp_path / "status", tmp_path / "meminfo"
    status.write_text("Name:\tpython\n", encoding="ascii")
    memory.write_text("MemTotal:  4096 kB\n", encoding="ascii")
    monkeypatch.setattr(machine, "STATUS", status)
    monkeypatch.setattr(machine, "MEMORY", memory)
    assert machine.held_memory("VmHWM") > 50 << 20  # bytes: a process with torch holds more
    assert machine.free_memory(CPU) == machine.UNBOUNDED
