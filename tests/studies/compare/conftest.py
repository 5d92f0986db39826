"""One thread, the fastest for models this small; and a look at the lines of a plot."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def lines(monkeypatch) -> dict[str, list[tuple[list, list]]]:
    """What matplotlib draws during the test: the (x, y) of every line, by its label."""
    axes = pytest.importorskip("matplotlib.axes")
    drawn, plot = {}, axes.Axes.plot

    def watched(axis, x, y, **how):
        drawn.setdefault(how["label"], []).append((list(x), list(y)))
        return plot(axis, x, y, **how)

    monkeypatch.setattr(axes.Axes, "plot", watched)
    return drawn
