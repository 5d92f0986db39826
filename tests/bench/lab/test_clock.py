"""Turns: everything once a turn, the first turn not counted, rates of reading between any two runs."""

import pytest
import torch

from retentive import machine
from retentive.bench.lab import clock

CPU = torch.device("cpu")


def test_everything_runs_once_a_turn_and_the_first_turn_warms_up():
    order = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert list(clock.turns(runs, 2)) == [{"a": 3, "b": 4}, {"a": 5, "b": 6}]
    assert order == ["a", "b"] * 3


def test_the_first_turn_counts_only_where_patience_ends(monkeypatch):
    seconds = iter([9.0, 70.0, 1.0, 2.0])
    monkeypatch.setattr(machine, "clock", lambda device, run: run() or next(seconds))
    taken = []
    runs = {"quick": lambda: taken.append("quick"), "slow": lambda: taken.append("slow")}
    times = clock.interleaved(runs, CPU, repeats=2, patience=60)
    assert times == {"quick": [1.0, 2.0], "slow": [70.0]} and taken == ["quick", "slow", "quick", "quick"]


def test_the_rate_of_products_is_the_best_of_all_turns(monkeypatch):
    rates, seconds = iter([5.0, 9.0, 7.0]), iter([8.0, 0.1, 2.0, 0.1, 1.0, 0.1])
    monkeypatch.setattr(machine, "gemm_rate", lambda device, dtype: next(rates))
    monkeypatch.setattr(machine, "clock", lambda device, run: run() or next(seconds))
    done = []
    found = clock.beside_products({"a": lambda: done.append("a")}, CPU, torch.float32, repeats=2, patience=60)
    assert found == ({"a": [2.0, 1.0]}, 9.0) and done == ["a"] * 3


def test_the_rate_of_a_run_is_the_mean_of_before_and_after(monkeypatch):
    rates, seconds = iter([1.0, 3.0, 5.0, 7.0, 9.0]), iter([1.0, 2.0, 0.5, 0.25])
    monkeypatch.setattr(machine, "read_rate", lambda numbers: next(rates))
    monkeypatch.setattr(machine, "clock", lambda device, run: run() or next(seconds))
    done = []
    runs = {"a": lambda: done.append("a"), "b": lambda: done.append("b")}
    found, all_rates = clock.beside_reading(runs, torch.ones(1), repeats=1)
    assert found == {"a": [(0.5, 6.0)], "b": [(0.25, 8.0)]} and all_rates == [1.0, 3.0, 5.0, 7.0, 9.0]
    assert done == ["a", "b", "a", "b"]


def test_numbers_of_several_measurements():
    assert clock.spread([4.0, 1.0, 2.0]) == {"least": 1.0, "median": 2.0, "most": 4.0}
    assert clock.best([4.0, 1.0, 2.0]) == {"seconds": 1.0, "median_seconds": 2.0, "repeats": 3}


def test_ratios_are_of_neighbours_in_time():
    found = [{"a": 1.0, "b": 2.0}, {"a": 30.0, "b": 20.0}, {"a": 4.0, "b": 4.0}]
    assert clock.median_ratio(found, "a", "b") == 1.0


def test_rates_are_of_this_machine():
    rates = machine.bandwidth(CPU, size=1 << 20)
    assert set(rates) == {"read", "copy"} and all(1e8 < rate < 1e13 for rate in rates.values())
    assert machine.clock(CPU, lambda: sum(range(10_000))) > 1e-5


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_turn_is_given_out_as_soon_as_it_is_done(repeats):
    """So that a bench can say how far it is."""
    done = []
    for turn in clock.turns({"a": lambda: done.append("run")}, repeats):
        done.append(turn)
    assert done == ["run"] + ["run", {"a": None}] * repeats
