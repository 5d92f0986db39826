"""Picture of a comparison: bits per byte and loss of recalled tokens, and training curves by tokens and by time.

A panel has a curve for each variant, the mean of its seeds. If there are too many variants to tell apart, only the
baseline and the best have curves. Rankings name all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from retentive.bench.lab.plot import GREY, MOST, grid, legend, rank
from retentive.tables import millions

Rows = list[dict[str, Any]]
Looks = Mapping[str, Mapping[str, Any]]
BITS = ("bits_per_byte", "held-out bits per byte")
RECALLED = ("recalled", "loss of recalled tokens (nats)")
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8")  # C7 is the grey of variants without a curve
STROKES = ("-", "--", ":", "-.")
"""Line styles of a model's optimisers."""


def title_of(result: dict[str, Any]) -> str:
    """Title of the picture: the tokens of a run, and the machines."""
    return f"{millions(result['rows'][0]['tokens'])} tokens a run, {' and '.join(machines(result))}"


def machines(result: dict[str, Any]) -> list[str]:
    """Processors that trained the runs."""
    return list(dict.fromkeys(each["cpu"] for each in result.get("machines", [result["hardware"]])))


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """Writes a PNG: bits per byte (by size, or by learning rate or variant if there is one size), the loss of recalled
    tokens, and training curves against tokens and against time. A panel with one point is left out, and so is time if
    the runs are from different processors.

    Args:
        result: the result of `Comparison.result`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `plot`).
    """
    rows = [row for row in result["rows"] if row["best_rate"]]
    look = looks(shown(rows, result["baseline"]))
    panels: list[Callable[[Any], None]] = []
    if len({row["size"] for row in rows}) > 1:
        panels += [partial(_by_size, rows, result["laws"], look, BITS), partial(_by_size, rows, [], look, RECALLED)]
    else:
        if len({row["lr"] for row in result["rows"]}) > 1:
            panels.append(partial(_by_rate, result["rows"], look))
        elif len(rows) > 1:
            panels.append(partial(_by_variant, rows, look, BITS))
        if sum(row["recalled"] is not None for row in rows) > 1:
            panels.append(partial(_by_variant, rows, look, RECALLED))
    best = {(row["size"], row["variant"]): row["lr"] for row in rows}
    runs = [run for run in result["runs"] if run["lr"] == best[run["size"], run["variant"]]]
    speeds = {(row["size"], row["variant"]): row["tokens_per_second"] for row in rows}
    panels.append(partial(_curves, runs, look, None))
    if len(machines(result)) == 1:
        panels.append(partial(_curves, runs, look, speeds))
    figure, axes = grid(title, -(-len(panels) // 2), 2, size=(6.4, 4.6))
    for axis, draw in zip(axes.flat, panels, strict=False):
        draw(axis)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    legend(figure, axes)
    figure.savefig(path, dpi=120, format="png")


def shown(rows: Rows, baseline: str) -> list[str]:
    """Returns the variants with curves: all, or the baseline and the best others if there are more than `MOST`."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    best = sorted(rows, key=lambda row: (row["variant"] != baseline, row["bits_per_byte"]))
    kept = list(dict.fromkeys(row["variant"] for row in best))[:MOST]
    return sorted((name for name in variants if name in kept), key=lambda name: name != baseline)


def looks(variants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns colour and line style of each variant; variants of one model differ in optimiser and line style."""
    models = list(dict.fromkeys(name.partition("+")[0] for name in variants))
    found: dict[str, dict[str, Any]] = {}
    for name in variants:
        model = name.partition("+")[0]
        before = sum(other.partition("+")[0] == model for other in found)
        found[name] = {"color": COLOURS[models.index(model)], "linestyle": STROKES[before % len(STROKES)]}
    return found


def _by_size(rows: Rows, laws: Rows, looks: Looks, what: tuple[str, str], axis: Any) -> None:
    """Draws points with intervals over the parameters of the blocks, and the fitted scaling law of each variant."""
    key, label = what
    for variant, look in looks.items():
        mine = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["block_parameters"])
        mine = [row for row in mine if row[key] is not None]
        x, y = [row["block_parameters"] / 1e6 for row in mine], [row[key] for row in mine]
        errors = [row["half_width"] or 0 for row in mine] if what == BITS else None
        axis.errorbar(x, y, yerr=errors, color=look["color"], marker="o", linestyle="none", capsize=3)
        for found in laws:
            if found["variant"] == variant:
                axis.plot(x, [found["a"] * n ** -found["b"] for n in x], linewidth=1, label=variant, **look)
    axis.set_xscale("log")
    ticks = sorted({row["block_parameters"] / 1e6 for row in rows})
    axis.set_xticks(ticks, [f"{n:.1f}" for n in ticks])
    _labelled(axis, "parameters in the blocks (millions)", label)


def _by_rate(rows: Rows, looks: Looks, axis: Any) -> None:
    """Draws a line over the learning rates for each variant of one size."""
    for variant, look in looks.items():
        mine = sorted((row["lr"], row["bits_per_byte"]) for row in rows if row["variant"] == variant)
        axis.plot(*zip(*mine, strict=True), marker="o", label=variant, **look)
    ticks = sorted({row["lr"] for row in rows})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
    _labelled(axis, "peak learning rate", BITS[1])


def _by_variant(rows: Rows, looks: Looks, what: tuple[str, str], axis: Any) -> None:
    """Draws a point with its interval for each variant of one size, the best on top."""
    key, label = what
    colours = {row["variant"]: {"color": looks.get(row["variant"], GREY)["color"]} for row in rows}
    half = {row["variant"]: row["half_width"] if what == BITS else None for row in rows}
    found = [(row["variant"], row[key]) for row in rows if row[key] is not None]
    rank(axis, [(name, value, half[name], colours[name]) for name, value in found], label)


def _curves(runs: Rows, looks: Looks, speeds: dict[tuple[str, str], float] | None, axis: Any) -> None:
    """Draws held-out bits per byte during training: the mean of each variant's seeds, for the largest size.

    The horizontal axis is tokens. With `speeds` (tokens/s of a variant and size, as in the table) it is time, so that a
    run beside a busy process is not drawn as slower than the others of its variant.
    """
    largest = max(runs, key=lambda run: run["block_parameters"])["size"]
    for variant, look in looks.items():
        mine = [dict(run["curve"]) for run in runs if (run["size"], run["variant"]) == (largest, variant)]
        if not mine:
            continue
        unit = 1e6 if speeds is None else 60 * speeds[largest, variant]
        tokens = [t for t in mine[0] if all(t in curve for curve in mine)]
        means = [sum(curve[t] for curve in mine) / len(mine) for t in tokens]
        axis.plot([t / unit for t in tokens], means, label=variant, **look)
    variants = len({run["variant"] for run in runs})
    which = "" if variants == len(looks) else f", the baseline and the best {len(looks) - 1} of {variants} variants"
    axis.set_title(f"{largest}, mean of the seeds{which}", fontsize=9)
    along = "tokens trained on (millions)" if speeds is None else "minutes of training, as fast as in the table"
    _labelled(axis, along, "bits per byte (first part of the held-out text)")


def _labelled(axis: Any, along: str, label: str) -> None:
    axis.minorticks_off()
    axis.set_xlabel(along)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
