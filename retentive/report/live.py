"""Training curve that is drawn while a model trains: below a notebook's cell, or as a picture in the run directory.

retentive.train("data/mine", "runs/mine", callbacks=[LivePlot()])
"""

import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

from retentive.bench.lab.plot import grid
from retentive.files import write_together
from retentive.train.log import history
from retentive.train.step import Training

EVERY = 1.0
"""Minimum seconds between two drawings."""
CURVES = {
    "loss": {"label": "training", "color": "C0", "linewidth": 1, "alpha": 0.6},
    "held_out_loss": {"label": "held out", "color": "C1", "marker": "o", "markersize": 4},
}
"""Columns of `retentive.history` that are drawn, both in nats per token, and their looks."""


class LivePlot:
    """Callback that draws the training loss and the held-out loss by tokens. Make a new one for each run.

    In a notebook the picture is shown below the cell and replaced in place. Anywhere else it is the file
    RUN/curve.png. It is drawn at most once a second, in at most a tenth of the time, and after the last step.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `plot`).
    """

    def __init__(self) -> None:
        self.figure, axes = grid("", 1, 1, size=(6.4, 3.6))
        self._axis, self._next, self._shown = axes[0, 0], 0.0, None

    def __call__(self, training: Training, metrics: dict[str, Any]) -> None:
        """Draws the run of `training` if it is time to.

        Raises:
            OSError: outside a notebook, the picture cannot be written.
        """
        began, last = time.monotonic(), training.step == training.config.steps
        if training.run is None or (began < self._next and not last):
            return
        self.draw(training.run)
        self._show(training.run)
        self._next = time.monotonic() + max(EVERY, 9 * (time.monotonic() - began))

    def draw(self, run: str | Path) -> None:
        """Draws a run's curves into `figure`, such as that of a run in another process; errors as `history`."""
        rows = history(run)
        # the last evaluation reads more text than the others: not the same loss
        rows = [row for row in rows if "final_bits_per_byte" not in row]
        along = "tokens" if all("tokens" in row for row in rows) else "step"
        self._axis.clear()
        for name, look in CURVES.items():
            if points := [(row[along], row[name]) for row in rows if name in row]:
                self._axis.plot(*zip(*points, strict=True), **look)
        self._axis.set_title(_title(Path(run).name, rows), fontsize=10)
        self._axis.set_xlabel("tokens trained on" if along == "tokens" else "step")
        self._axis.set_ylabel("loss (nats per token)")
        self._axis.xaxis.set_major_formatter(lambda x, _: _short(x))
        self._axis.grid(alpha=0.3)
        self._axis.legend()

    def _show(self, run: Path) -> None:
        """Shows the figure below the cell, or writes it to RUN/curve.png."""
        if not in_notebook():
            write_together({run / "curve.png": lambda path: self.figure.savefig(path, dpi=120, format="png")})
            return
        from IPython.display import Image, display

        png = BytesIO()
        self.figure.savefig(png, dpi=100, format="png")
        if self._shown is None:
            self._shown = display(Image(png.getvalue()), display_id=True)
        else:
            self._shown.update(Image(png.getvalue()))


def in_notebook() -> bool:
    """True in a kernel of IPython, whose cells show pictures; False in a script and in IPython's terminal."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


def _title(name: str, rows: list[dict[str, Any]]) -> str:
    """Returns the run's name, its step, and its last held-out bits per byte."""
    held_out = [f"held out {row['bits_per_byte']:.3f} bits per byte" for row in rows if "bits_per_byte" in row]
    return ", ".join([f"{name}: step {rows[-1]['step']:,}" if rows else name, *held_out[-1:]])


def _short(n: float) -> str:
    """Returns a number in short: 20k, 1.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:g}{name}"
    return f"{n:g}"
