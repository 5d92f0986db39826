"""Pictures of measurements; matplotlib comes with the extra `plot`.

A panel has several points along its x axis, and at most `MOST` curves. Measurements at a single x are a ranking, a row
for each model.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill
from typing import Any

MOST = 8
"""Maximum curves of a panel; more cannot be told apart."""
LOOKS = tuple(
    {"color": f"C{n % 10}", "linestyle": "-" if n < 10 else "--", "marker": marker, "markersize": 5}
    for n, marker in enumerate("osv^DPX*hd<>p8H|x+1")
)
"""Colour and marker of the first, second, … model."""
GREY = {"color": "0.6", "linewidth": 1}
"""Look of a bound, which is no measurement of a model."""


def grid(title: str, rows: int, columns: int, *, size: tuple[float, float] = (5, 4)) -> tuple[Any, Any]:
    """Returns (figure, axes `[rows, columns]`), each of `size` inches; save with `figure.savefig(path, dpi=120)`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which needs a screen and keeps every figure
    except ImportError:
        raise ModuleNotFoundError("plots need an extra: pip install 'retentive[plot]'") from None
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    # No line ends within brackets, where the family and model of a processor are. Some ten characters an inch.
    whole = re.sub(r"\(.*?\)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), title)
    figure.suptitle(fill(whole, round(10 * size[0] * columns)))
    return figure, figure.subplots(rows, columns, squeeze=False)


def tokens(n: int) -> str:
    """Returns a number of tokens in short: 8192 is 8k, 1000 is 1000."""
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def at_most(names: Sequence[str], last: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the first name and the fastest others, `MOST` in all, in the order of `names`.

    Args:
        last: results by name at the longest context or the largest batch; those without `seconds` go first.
    """
    speed = sorted(names[1:], key=lambda name: last[name].get("seconds", float("inf")))
    kept = {*names[:1], *speed[: MOST - 1]}
    return [name for name in names if name in kept]


def panel(
    axis: Any,
    points: Sequence[tuple[int, Mapping[str, Any]]],
    names: Mapping[str, str],
    key: str,
    label: str,
    along: str,
    *,
    unit: float = 1,
    percent: bool = False,
    looks: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Draws a curve for each model, or a ranking if there is only one x.

    Args:
        points: (x, results by model). A model without `key` at an x has no point there.
        names: label of each model.
        key: result that is drawn, divided by `unit`.
        label: name of that result.
        along: name of x.
        percent: draw fractions as percentages from 0, with a line at 100 %. By default values are logarithmic.
        looks: colour, marker and line style of each model; by default those of `LOOKS`, in the order of `names`.
    """
    looks = looks or dict(zip(names, LOOKS, strict=False))
    points = sorted(points, key=lambda point: point[0])
    found = {name: [(x, of[name][key] / unit) for x, of in points if key in of.get(name, {})] for name in names}
    xs = sorted({x for x, _ in points})
    if len(xs) == 1:
        rank(axis, [(names[n], at[0][1], None, looks[n]) for n, at in found.items() if at], f"{label}, {along} {xs[0]}")
        return
    for name, at in found.items():
        if at:
            axis.plot(*zip(*at, strict=True), label=names[name], **looks[name])
    dress(axis, xs, label, along)
    if percent:
        _percent(axis)


def rank(axis: Any, rows: Iterable[tuple[str, float, float | None, Mapping[str, Any]]], label: str) -> None:
    """Draws a row for each (name, value, half an interval, look), the least value on top."""
    order = sorted(rows, key=lambda row: row[1], reverse=True)
    for n, (_, value, error, look) in enumerate(order):
        axis.errorbar(value, n, xerr=error, **{"marker": "o", "capsize": 3} | look)
    axis.set_yticks(range(len(order)), [name for name, *_ in order])
    axis.set_ylim(-0.5, len(order) - 0.5)
    axis.set_xlabel(label)
    axis.grid(alpha=0.3, axis="x")


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


def _percent(axis: Any) -> None:
    """Makes the y axis one of percentages, from 0, with a line at 100 %."""
    from matplotlib.ticker import AutoLocator, PercentFormatter

    axis.set_yscale("linear")
    axis.yaxis.set_major_locator(AutoLocator())
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.axhline(1, **GREY)
    axis.set_ylim(bottom=0)


def legend(figure: Any, axes: Any) -> None:
    """One legend below all panels, each label once."""
    handles = {
        name: handle for axis in axes.flat for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        inches = 0.6 + 0.075 * max(map(len, handles))  # of the widest entry
        columns = min(len(handles), max(int(figure.get_figwidth() // inches), 1))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=9)
