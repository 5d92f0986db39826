"""Pictures of measurements; matplotlib comes with the extra `plot`."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

STYLES = {"fp32": "-", "bf16": "--", "fp16": ":"}
"""The line style of each dtype, in all pictures."""


def grid(title: str, rows: int, columns: int, *, size: tuple[float, float] = (5, 4)) -> tuple[Any, Any]:
    """(figure, axes `[rows, columns]`), each of `size` inches, to draw on and then `figure.savefig(path, dpi=120)`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a screen and keeps every figure
    except ImportError:
        raise ModuleNotFoundError("plots need an extra: pip install 'retentive[plot]'") from None
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    figure.suptitle(fill(title, round(10 * size[0] * columns)))  # some ten characters an inch
    return figure, figure.subplots(rows, columns, squeeze=False)


def tokens(n: int) -> str:
    """A number of tokens in short: 8192 is 8k, 1000 is 1000."""
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def curves(
    axis: Any, points: Sequence[tuple[int, Mapping[str, Any]]], names: Mapping[str, str], key: str, *, unit: float = 1
) -> None:
    """Draws `key` / `unit` of each model in `names` (model: its label), against the x of `points`.

    Args:
        points: (x, what was measured there of each model). A model that was skipped there has no `key`, and no point.
    """
    for n, (name, label) in enumerate(names.items()):
        # colours go by the name's place, also where a model has no curve: it looks the same in all pictures
        found = [(x, of[name][key] / unit) for x, of in points if key in of[name]]
        if found:
            axis.plot(*zip(*found, strict=True), color=f"C{n}", marker="osv^DPX*hd"[n], label=label)


def dress(axis: Any, ticks: Sequence[int], label: str, along: str = "") -> None:
    """Makes both axes logarithmic, with these ticks along x and round numbers along y; call it after plotting."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    # lengths and batches double from one to the next
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [tokens(n) for n in ticks])
    axis.set_yscale("log")
    low, high = axis.get_ylim()  # of what is plotted so far: over few decades 1, 2 and 5 get ticks, over many 1 alone
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}" if y < 100 else f"{y:,.0f}"))
    for part in (axis.xaxis, axis.yaxis):
        part.set_minor_locator(NullLocator())
    axis.set_ylabel(label)
    axis.set_xlabel(along)
    axis.grid(alpha=0.3)


def linear(axis: Any) -> None:
    """Makes the y axis one of percentages, from 0, with a line at 100%."""
    from matplotlib.ticker import AutoLocator, PercentFormatter

    axis.set_yscale("linear")
    axis.yaxis.set_major_locator(AutoLocator())
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.axhline(1, color="0.6", linewidth=1)
    axis.set_ylim(bottom=0)


def legend(figure: Any, axes: Any) -> None:
    """One legend below all panels, each label once."""
    handles = {
        name: handle for axis in axes.flat for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    # a row for each dtype where there is room
    dtypes = [dtype for dtype in STYLES if any(name.endswith(dtype) for name in handles)]
    order = sorted(handles, key=lambda name: [name.endswith(dtype) for dtype in dtypes], reverse=True)
    columns = max(len(handles) // max(len(dtypes), 1), 1)
    columns = min(columns, max(int(figure.get_figwidth() // 1.7), 1))  # inches of an entry
    figure.legend(
        [handles[name] for name in _by_columns(order, columns)], _by_columns(order, columns),
        loc="outside lower center", ncols=columns, fontsize=9,
    )  # fmt: skip


def _by_columns(names: list[str], columns: int) -> list[str]:
    """The names reordered so that they read row by row: matplotlib fills a legend column by column."""
    return [name for n in range(columns) for name in names[n::columns]]
