"""Summary of a comparison: a table with confidence intervals and scaling laws, and both as Markdown.

Each variant counts at its best learning rate, by the seeds with which all rates were tried. The uncertainty is that of
the seeds, which set the initialisation and the order of the text.

A cell is one variant, size and rate. With `OWN` seeds or more it has its own standard deviation. With fewer, it is
pooled over all cells of the table, whose noise is nearly the same, and the pool gives the degrees of freedom.

Differences to the baseline compare best rate with best rate. They are paired seed by seed: half of the noise is the
order of the text, which both share.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.filesize import decimal

from retentive.evals.stats import half_width, pooled, t95
from retentive.tables import counted, markdown

OWN = 5
"""Least seeds for a cell's own spread: t then has 4 degrees of freedom and is 2.8, against 2 for a pool."""


def summary(found: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Returns a row for each size, learning rate and variant: means over the seeds, with 95 % intervals.

    A row at the variant's best rate also has the difference to the baseline at the baseline's best rate.
    """
    # (size, lr, variant) -> seed -> record
    cells: dict[tuple[str, float, str], dict[int, dict[str, Any]]] = {}
    for r in found:
        cells.setdefault((r["size"], r["lr"], r["variant"]), {})[r["seed"]] = r
    bits = {key: [r["bits_per_byte"] for r in cell.values()] for key, cell in cells.items()}
    best = best_rates(found)
    # same key -> differences to the baseline, one for each shared seed; none for the baseline itself
    differences: dict[tuple[str, float, str], list[float]] = {}
    for (size, variant), lr in best.items():
        base, mine = cells.get((size, best.get((size, baseline), lr), baseline), {}), cells[size, lr, variant]
        shared = [seed for seed in mine if seed in base and variant != baseline]
        differences[size, lr, variant] = [mine[s]["bits_per_byte"] - base[s]["bits_per_byte"] for s in shared]
    spread, paired_spread = pooled(bits.values()), pooled(d for d in differences.values() if d)
    rows = []
    for key, cell in cells.items():
        runs, difference = list(cell.values()), differences.get(key)
        row = {"size": key[0], "lr": key[1], "variant": key[2], "seeds": sorted(cell)}
        row["best_rate"] = best[key[0], key[2]] == key[1]
        row |= {name: runs[0][name] for name in ("parameters", "block_parameters", "tokens")}
        row["bits_per_byte"] = float(np.mean(bits[key]))
        row["half_width"] = _half_width(bits[key], spread)
        if difference:
            row["difference"] = float(np.mean(difference))
            row["difference_half_width"] = _half_width(difference, paired_spread)
        for part in ("recalled", "others"):  # tokens that the context can recall, and all others (`evals.heldout`)
            losses = [r[part]["loss"] for r in runs if r[part]["loss"] is not None]
            row[part] = float(np.mean(losses)) if losses else None
        row["tokens_per_second"] = float(np.median([r["tokens_per_second"] for r in runs]))
        row["memory"] = max((r["memory"] for r in runs if r.get("memory")), default=None)
        rows.append(row)
    return rows


def _half_width(values: Sequence[float], shared: tuple[float, int]) -> float | None:
    """Returns half the 95 % interval of the mean: by the values' own spread from `OWN` on, else by the `shared` one."""
    spread, freedom = pooled([values]) if len(values) >= OWN else shared
    return half_width(spread, freedom, len(values))


def best_rates(found: Iterable[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Returns (size, variant) -> best learning rate, by mean bits per byte over the seeds that all rates share."""
    tried: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
    for r in found:
        tried.setdefault((r["size"], r["variant"]), {}).setdefault(r["lr"], {})[r["seed"]] = r["bits_per_byte"]

    def best(rates: dict[float, dict[int, float]]) -> float:
        shared = set.intersection(*map(set, rates.values()))  # if none, each rate counts with all its seeds
        return min(rates, key=lambda lr: np.mean([rates[lr][seed] for seed in shared or rates[lr]]))

    return {key: best(rates) for key, rates in tried.items()}


def report(found: Sequence[dict[str, Any]], baseline: str) -> dict[str, Any]:
    """Returns the rows of all runs, and the scaling laws of variants with enough sizes, each at its best rate.

    Names the runs that diverged (`"failed"` in their record says why). If a variant diverged at a rate for any seed, it
    has no row at that rate, since the mean of the other seeds would flatter it.
    """
    failed = {(r["size"], r["lr"], r["variant"]) for r in found if "failed" in r}
    trained = [r for r in found if (r["size"], r["lr"], r["variant"]) not in failed]
    rows = summary(trained, baseline)
    best = best_rates(trained)
    at_best = [r for r in trained if r["lr"] == best[r["size"], r["variant"]]]
    laws = [law(at_best, variant) for variant in dict.fromkeys(r["variant"] for r in trained)]
    named = {r["name"]: r["failed"] for r in found if "failed" in r}
    return {"baseline": baseline, "rows": rows, "laws": [x for x in laws if x], "failed": named, "runs": trained}


def law(found: Sequence[dict[str, Any]], variant: str) -> dict[str, Any] | None:
    """Fits bits per byte = a * (parameters of the blocks / 10^6)^-b to the runs of a variant; None below three sizes.

    Least squares of the logarithms. The interval of b is that of the slope. Runs off the line widen it, whether by
    their seed or because the law does not hold.
    """
    mine = [r for r in found if r["variant"] == variant]
    if len({r["size"] for r in mine}) < 3:
        return None
    x = np.log([r["block_parameters"] / 1e6 for r in mine])
    y = np.log([r["bits_per_byte"] for r in mine])
    slope, intercept = np.polyfit(x, y, 1)
    freedom = len(x) - 2  # two fitted numbers
    squares = float(((y - slope * x - intercept) ** 2).sum())
    error = math.sqrt(squares / freedom / float(((x - x.mean()) ** 2).sum()))
    fitted = {"a": math.exp(intercept), "b": -float(slope), "b_half_width": t95(freedom) * error}
    return {"variant": variant, **fitted, "runs": len(x)}


def table(result: dict[str, Any]) -> str:
    """Returns rows, laws and failures of a `report` as Markdown."""
    heads = ["size", "variant", "parameters", "seeds", "bits per byte", "± ", f"against {result['baseline']}", "±"]
    heads += ["recalled", "others", "tokens/s"]
    measured = any(row["memory"] is not None for row in result["rows"])  # missing in old results
    heads += ["memory"] * measured
    lines = []
    several = len({row["lr"] for row in result["rows"]}) > 1
    # By size, to a tenth of a million: variants of one size differ in the last parameters. The best of each first.
    for row in sorted(result["rows"], key=lambda row: (row["block_parameters"] // 10**5, row["bits_per_byte"])):
        name = f"{row['variant']}, lr {row['lr']:g}" + " *" * row["best_rate"] if several else row["variant"]
        cells = [row["size"], name, f"{row['parameters'] / 1e6:.2f} M", str(len(row["seeds"]))]
        cells += [f"{row['bits_per_byte']:.4f}", _number(row["half_width"]), _number(row.get("difference"), "+.4f")]
        cells += [
            _number(row.get("difference_half_width")),
            _number(row["recalled"], ".3f"),
            _number(row["others"], ".3f"),
        ]
        memory = "–" if row["memory"] is None else decimal(row["memory"])
        cells += [f"{row['tokens_per_second']:,.0f}", *[memory] * measured]
        lines.append(cells)
    notes = ["* The best learning rate of each variant. Differences compare these."] if several else []
    if any("+" in row["variant"] for row in result["rows"]):
        notes.append("+: trained with the named optimiser, at its own best of the same learning rates.")
    notes += [
        f"{found['variant']}: bits per byte = {found['a']:.3f} (N / 10^6)^-b, b = {found['b']:.4f} ± "
        f"{found['b_half_width']:.4f}, N parameters in the blocks, {counted(found['runs'], 'run')}"
        for found in result["laws"]
    ]
    notes += [f"{name} did not train: {why}" for name, why in result["failed"].items()]
    return "\n\n".join([markdown(heads, lines), *notes])


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)
