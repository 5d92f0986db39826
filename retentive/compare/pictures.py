"""Plots of a comparison: bits per byte by size, rate or variant; curves of training by tokens and by time; recall."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retentive.bench.lab.plot import grid


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """Writes a PNG of four plots: bits per byte (by size, or by learning rate or variant if there is one size), curves
    of training against tokens and against time, and the loss of recalled tokens.

    Args:
        result: what `Comparison.result` returns.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `plot`).
    """
    rows = [row for row in result["rows"] if row["best_rate"]]
    best = {(row["size"], row["variant"]): row["lr"] for row in rows}
    figure, ((left, right), (by_tokens, by_time)) = grid(title, 2, 2, size=(6.4, 4.6))
    from matplotlib import colormaps  # after `grid`, which names the extra where it is missing

    pairs = colormaps["tab20"]  # ten colours, each followed by a lighter one
    colours = {variant: pairs(n) for variant, n in shades([row["variant"] for row in rows]).items()}
    if len({row["size"] for row in rows}) > 1:
        _by_size(left, rows, result["laws"], colours, "bits_per_byte", "held-out bits per byte")
        _by_size(right, rows, [], colours, "recalled", "loss of recalled tokens (nats)")
    else:
        if len({row["lr"] for row in result["rows"]}) > 1:
            _by_rate(left, result["rows"], colours)
        else:
            _by_variant(left, rows, colours, "bits_per_byte", "held-out bits per byte")
        _by_variant(right, rows, colours, "recalled", "loss of recalled tokens (nats)")
    runs = [r for r in result["runs"] if r["lr"] == best[r["size"], r["variant"]]]
    _curves(by_tokens, runs, colours, None)
    _curves(by_time, runs, colours, {(row["size"], row["variant"]): row["tokens_per_second"] for row in rows})
    figure.savefig(path, dpi=120, format="png")


def shades(names: Sequence[str]) -> dict[str, int]:
    """A number below 20 for each variant: even ones are dark, and the odd one after each is its lighter shade.

    A variant with another optimiser (retnet+muon) is a lighter shade of its model's. Otherwise those come from the
    eleventh variant on only.
    """
    variants = list(dict.fromkeys(names))
    models = list(dict.fromkeys(name.partition("+")[0] for name in variants))
    if len(models) < len(variants) <= 2 * len(models) <= 20:
        return {name: 2 * models.index(name.partition("+")[0]) + ("+" in name) for name in variants}
    return {name: 2 * n % 20 + n // 10 % 2 for n, name in enumerate(variants)}


def _by_size(
    axis: Any, rows: list[dict[str, Any]], laws: list[dict[str, Any]], colours: dict[str, Any], key: str, label: str
) -> None:
    """Points with intervals over the parameters of the blocks, and the fitted law of each variant that has one."""
    for variant, colour in colours.items():
        mine = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["block_parameters"])
        x, y = [row["block_parameters"] / 1e6 for row in mine], [row[key] for row in mine]
        errors = [row["half_width"] or 0 for row in mine] if key == "bits_per_byte" else None
        axis.errorbar(x, y, yerr=errors, color=colour, marker="o", linestyle="none", capsize=3, label=variant)
        for found in laws:
            if found["variant"] == variant:
                fitted = [found["a"] * n ** -found["b"] for n in x]
                axis.plot(
                    x, fitted, color=colour, linewidth=1, label=f"_{variant}, fitted"
                )  # _: no entry in the legend
    axis.set_xscale("log")
    ticks = sorted({row["block_parameters"] / 1e6 for row in rows})
    axis.set_xticks(ticks, [f"{n:.1f}" for n in ticks])
    axis.minorticks_off()
    axis.set_xlabel("parameters in the blocks (millions)")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _by_rate(axis: Any, rows: list[dict[str, Any]], colours: dict[str, Any]) -> None:
    """A line over the learning rates for each variant, of one size."""
    for variant, colour in colours.items():
        mine = sorted((row["lr"], row["bits_per_byte"]) for row in rows if row["variant"] == variant)
        rates, bits = zip(*mine, strict=True)
        axis.plot(rates, bits, color=colour, marker="o", label=variant)
    ticks = sorted({row["lr"] for row in rows})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
    axis.minorticks_off()
    axis.set_xlabel("peak learning rate")
    axis.set_ylabel("held-out bits per byte")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _by_variant(axis: Any, rows: list[dict[str, Any]], colours: dict[str, Any], key: str, label: str) -> None:
    """A point with its interval for each variant, the best on top, of one size."""
    order = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key], reverse=True)
    for n, row in enumerate(order):
        error = row["half_width"] if key == "bits_per_byte" else None
        axis.errorbar(row[key], n, xerr=error, color=colours[row["variant"]], marker="o", capsize=3)
    axis.set_yticks(range(len(order)), [row["variant"] for row in order])
    axis.set_xlabel(label)
    axis.grid(alpha=0.3, axis="x")


def _curves(
    axis: Any, runs: list[dict[str, Any]], colours: dict[str, Any], speeds: dict[tuple[str, str], float] | None
) -> None:
    """Held-out bits per byte in the course of training: a line for each run of the largest size.

    Against tokens, or against the time that they take at the `speeds` of the table's rows, tokens/s of a variant and
    size: a run that had a busy neighbour is not drawn as slower than the others of its variant.
    """
    largest = max(runs, key=lambda r: r["block_parameters"])["size"]
    labels: set[str] = set()
    for r in (r for r in runs if r["size"] == largest):
        tokens, bits = zip(*r["curve"], strict=True)
        label = None if r["variant"] in labels else r["variant"]
        labels.add(r["variant"])
        unit = 1e6 if speeds is None else 60 * speeds[r["size"], r["variant"]]
        axis.plot([t / unit for t in tokens], bits, color=colours[r["variant"]], linewidth=1, label=label)
    axis.set_title(f"{largest}, every seed", fontsize=9)
    axis.set_xlabel(
        "tokens trained on (millions)" if speeds is None else "minutes of training, as fast as in the table"
    )
    axis.set_ylabel("bits per byte (first part of the held-out text)")
    axis.grid(alpha=0.3)
    if speeds is None and len(labels) <= 10:  # more would cover the curves; the plots above name the colours
        axis.legend(fontsize=8)
