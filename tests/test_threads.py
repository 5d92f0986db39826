"""Threads: spinning is bounded before torch is imported unless the user set it; their number depends on the work."""

import os
import subprocess
import sys

import pytest
import torch

from retentive.threads import SPIN, WAITING, Neighbours, threads_for

SAYS = """
import os, sys
from retentive.threads import bound_spinning
{before}
print(bound_spinning(), os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("before", "user", "told"),
    [
        ("", {}, f"True {SPIN}"),
        ("sys.modules['torch'] = None", {}, "False None"),  # too late
        ("", {"OMP_WAIT_POLICY": "PASSIVE"}, "False None"),
        ("", {"GOMP_SPINCOUNT": "7"}, "False 7"),
    ],
    ids=["free", "after-torch", "the-users-policy", "the-users-spin"],
)
def test_the_spin_is_bounded_before_torch_and_never_against_the_user(before, user, told):
    env = {name: value for name, value in os.environ.items() if name not in WAITING} | user
    done = subprocess.run(
        [sys.executable, "-c", SAYS.format(before=before)], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == told


def test_the_command_line_bounds_it_before_torch_is_imported():
    script = (
        "import os, sys\nfrom retentive.cli import main\nassert 'torch' not in sys.modules\n"
        "try:\n    main(['info', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(os.environ['GOMP_SPINCOUNT'], file=sys.stderr)"
    )
    env = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stderr.split()[-1] == SPIN


@pytest.mark.parametrize(("work", "want"), [(0, 1), (19_999_999, 1), (20_000_000, 2), (39_999_999, 3), (10**12, 4)])
def test_threads_go_with_the_work_and_come_back(work, want):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with threads_for(work) as threads:
            assert threads == torch.get_num_threads() == want
        assert torch.get_num_threads() == 4
        with pytest.raises(KeyError), threads_for(work):
            raise KeyError
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_cores_are_left_to_neighbours_for_a_while(monkeypatch):
    now = 0.0
    monkeypatch.setattr("retentive.threads.time.monotonic", lambda: now)
    neighbours = Neighbours()
    neighbours.look(4, 0.001)  # a high rate, but only a few
    neighbours.look(29, 0.1)
    assert neighbours.cores() == 0
    neighbours.look(31, 0.1)
    assert neighbours.cores() == 1
    neighbours.look(31, 0.1)  # another neighbour
    assert neighbours.cores() == 2
    now = 0.9
    assert neighbours.cores() == 2
    now = 1.0
    assert neighbours.cores() == 0


def test_beside_a_neighbour_a_thread_less_is_taken(monkeypatch):
    counts = iter([0, 1000, 1000, 1000, 1000])
    monkeypatch.setattr("retentive.threads.preemptions", lambda: next(counts))
    monkeypatch.setattr("retentive.threads._neighbours", Neighbours())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for(10**9) as first:
            pass
        with threads_for(10**9) as second:
            pass
        assert (first, second) == (2, 1) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
