"""One thread, the fastest for models this small; a tiny size; a made-up machine; a look at the lines of a plot."""

import gc

import pytest
import torch

from retentive import machine
from retentive.models import PRESETS
from retentive.models.presets import Size
from tests.threads import one_thread as one_thread


@pytest.fixture
def sizes(monkeypatch):
    """Sizes for `Options(size=…)`: "tiny", and "dropped", the same with the dropout that the paper's sizes have."""
    monkeypatch.setitem(PRESETS, "tiny", Size(dict(dim=32, layers=2, heads=4)))
    monkeypatch.setitem(PRESETS, "dropped", Size(dict(dim=32, layers=2, heads=4, dropout=0.1)))


@pytest.fixture
def rates(monkeypatch) -> dict[str, float]:
    """The machine's rates, made up: they take seconds to measure, and half a GB; nor is garbage looked for."""
    made_up = {"gemm": 1e12, "read": 1e10, "copy": 1e10}
    monkeypatch.setattr(machine, "gemm_rate", lambda *_, **__: made_up["gemm"])
    monkeypatch.setattr(machine, "read_rate", lambda *_: made_up["read"])
    monkeypatch.setattr(machine, "numbers", lambda device, *_: torch.ones(64, 4096, device=device))
    monkeypatch.setattr(machine, "rates", lambda *_: dict(made_up))
    monkeypatch.setattr(gc, "collect", lambda: 0)
    return made_up


@pytest.fixture
def never_timed(monkeypatch):
    """Fails where anything is timed."""
    monkeypatch.setattr(machine, "clock", lambda *_: pytest.fail("timed"))


@pytest.fixture
def lines(monkeypatch) -> dict[str, list[tuple[list, list]]]:
    """Collects the lines that matplotlib draws during the test: (x, y) by label."""
    axes = pytest.importorskip("matplotlib.axes")
    drawn, plot = {}, axes.Axes.plot

    def watched(axis, x, y, **how):
        drawn.setdefault(how["label"], []).append((list(x), list(y)))
        return plot(axis, x, y, **how)

    monkeypatch.setattr(axes.Axes, "plot", watched)
    return drawn
