"""`LivePlot`: the picture of a run in its directory and in a notebook, redrawn now and then."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

import retentive
from retentive.report import LivePlot, live

FEW = dict(size="1m", set={"dim": 16, "layers": 1, "heads": 2}, batch=2, length=32, steps=4, eval_every=2)
FEW |= dict(sample_every=0, precision="fp32", device="cpu")
PNG = b"\x89PNG"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(4):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{n}.txt").write_text("Once upon a time a fox lived in a wood.\n" * 100)
    return tmp_path


@pytest.fixture
def notebook(monkeypatch):
    """A notebook's shell: the pictures shown in it, as (call, bytes)."""
    shown = []
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    handle = SimpleNamespace(update=lambda picture: shown.append(("update", picture)))

    def display(picture, display_id):
        shown.append(("display", picture))
        return handle

    package, parts = ModuleType("IPython"), ModuleType("IPython.display")
    package.get_ipython, package.version_info = lambda: shell, (9, 0)  # pyplot reads both when it is first imported
    parts.Image, parts.display = bytes, display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", parts)
    return shown


def lines_of(plot) -> dict[str, list]:
    return {line.get_label(): list(line.get_xdata()) for line in plot.figure.axes[0].get_lines()}


def test_outside_a_notebook_it_is_a_file_of_the_run(place):
    plot = LivePlot()
    run = retentive.train("texts", "run", callbacks=[plot], **FEW)
    assert (run / "curve.png").read_bytes().startswith(PNG)
    rows = retentive.history(run)
    drawn = lines_of(plot)
    assert drawn["training"] == [row["tokens"] for row in rows if "loss" in row] == [64, 128, 192, 256]
    assert drawn["held out"] == [row["tokens"] for row in rows if "bits_per_byte" in row] == [128, 256]
    axis = plot.figure.axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("tokens trained on", "loss (nats per token)")
    assert axis.get_title().startswith("run: step 4, held out ")


def test_in_a_notebook_one_picture_is_replaced(place, notebook, monkeypatch):
    monkeypatch.setattr(live, "EVERY", 0.0)
    monkeypatch.setattr(live.time, "monotonic", lambda: 0.0)  # no step takes any time
    run = retentive.train("texts", "run", callbacks=[LivePlot()], **FEW)
    assert [call for call, _ in notebook] == ["display", "update", "update", "update"]
    assert all(picture.startswith(PNG) for _, picture in notebook) and not (run / "curve.png").exists()


def test_it_is_drawn_once_a_second_and_at_the_end(tmp_path, notebook, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    plot, drawn = LivePlot(), []
    monkeypatch.setattr(plot, "draw", lambda run: drawn.append(training.step))
    training = SimpleNamespace(run=tmp_path, step=0, config=SimpleNamespace(steps=40))
    while training.step < 40:
        training.step += 1
        plot(training, {})
        now[0] += 0.125
    assert drawn == [1, 9, 17, 25, 33, 40]


def test_slow_drawings_take_a_tenth_of_the_time(tmp_path, notebook, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    plot, drawn = LivePlot(), []

    def draw(run):
        now[0] += 2.0
        drawn.append(now[0])

    monkeypatch.setattr(plot, "draw", draw)
    training = SimpleNamespace(run=tmp_path, step=0, config=SimpleNamespace(steps=1000))
    for training.step in range(1, 100):
        plot(training, {})
        now[0] += 1.0
    assert drawn == [102.0, 122.0, 142.0, 162.0, 182.0, 202.0]


def test_a_loop_without_a_run_is_drawn_by_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n')
    plot = LivePlot()
    plot.draw(tmp_path)
    assert lines_of(plot) == {"training": [1, 2]} and plot.figure.axes[0].get_xlabel() == "step"


@pytest.mark.parametrize(("n", "short"), [(0, "0"), (512, "512"), (20_000, "20k"), (1.5e6, "1.5M"), (2e9, "2G")])
def test_tokens_are_short(n, short):
    assert live._short(n) == short


def test_without_matplotlib_the_extra_is_named_before_the_run(monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with refuses("plots need an extra: pip install 'retentive[plot]'", ModuleNotFoundError):
        LivePlot()
