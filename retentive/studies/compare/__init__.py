"""A fair comparison: which models, the runs of a plan, and what comes out of them, with its uncertainty.

All runs of a seed see the same tokens in the same order, and all variants of a size have the same number of parameters
(Mamba's nearly): what a variant takes away, its feed-forward layer gets, as the twin's does.

Each variant counts at the best of the learning rates that all were given. Uncertainty is that of seeds: initialisation
and order of the text. A cell has few of them, so that their standard deviation is pooled over all cells of the table
(it is one noise, nearly), which gives the interval its degrees of freedom. Differences to the baseline, best against
best, are taken seed by seed, since half of the noise is the order that both share.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retentive.bench.lab.plot import grid
from retentive.bench.lab.tables import known, markdown
from retentive.models import Config, HybridConfig, RetNetConfig, cost, peer, twin
from retentive.studies import prompting

RECORD = "compared.json"
"""In a run's directory, what came out of it."""
MACHINE = ("cpu", "threads", "gpu")
"""What of the hardware must be the same in one table."""


class Variant(NamedTuple):
    model: str
    """As `retentive train --model` takes it."""
    changes: Callable[[RetNetConfig], dict[str, Any]]
    """Of the RetNet's config; the feed-forward width is then fitted to the parameters."""
    about: str
    """What it is, for people."""


def same(config: RetNetConfig) -> dict[str, Any]:
    """No change."""
    return {}


VARIANTS = {
    "retnet": Variant("retnet", same, "RetNet, decays of the paper's language models"),
    "transformer": Variant("transformer", same, "Transformer twin: rotary positions, SwiGLU, RMSNorm, SDPA"),
    "no-gate": Variant("retnet", lambda c: dict(gate=False), "without the swish gate"),
    "no-head-norm": Variant("retnet", lambda c: dict(head_norm=False), "without the norm of each head's output"),
    "no-decay": Variant("retnet", lambda c: dict(decay="none"), "without decay: linear attention"),
    "one-decay": Variant(
        "retnet", lambda c: dict(decay=(math.log(127 / 128),) * c.heads), "one decay for all heads, 127/128"
    ),
    "small-heads": Variant(
        "retnet",
        lambda c: dict(heads=4 * c.heads, kv_heads=0, value_dim=c.value_dim),
        "four times as many heads, a quarter as wide",
    ),
    "paper-decay": Variant("retnet", lambda c: dict(decay="paper"), "decays of the paper's equation 8"),
    "no-score-norm": Variant("retnet", lambda c: dict(score_norm=False), "without the norm of the decay mask's rows"),
    "short-head": Variant(
        "retnet",
        lambda c: dict(decay=prompting.decays(c.heads)),
        "the first head forgets at once and sees the token before",
    ),
    "gated": Variant(
        "retnet", lambda c: dict(decay="gated", score_norm=False), "a decay for each token: gated retention"
    ),
    "hybrid": Variant("hybrid", same, "one block of four attends"),
    "llama": Variant("llama", same, "Llama of the transformers library"),
    "mamba": Variant("mamba", same, "Mamba of the transformers library"),
    "mamba2": Variant("mamba2", same, "Mamba-2 of the transformers library"),
    "rwkv": Variant("rwkv", same, "RWKV-4 of the transformers library"),
}


def changes(variant: str, config: RetNetConfig) -> dict[str, Any]:
    """What `--set` must change of a size's config for the variant, its feed-forward layer fitted to the parameters."""
    changed = VARIANTS[variant].changes(config)
    if not changed:
        return {}
    bare = replace(config, **changed)
    spare = cost.block_parameters(config) - cost.block_parameters(bare)
    unit = config.layers * config.dim * (3 if config.ffn_gate else 2)
    return changed | {"ffn_dim": config.ffn_dim + round(spare / unit)} if round(spare / unit) else changed


def config_of(variant: str, config: RetNetConfig) -> Config:
    """The config of a variant of a RetNet."""
    changed = replace(config, **changes(variant, config))
    match VARIANTS[variant].model:
        case "retnet":
            return changed
        case "transformer":
            return twin(config)
        case "hybrid":
            shared = {f.name: getattr(changed, f.name) for f in fields(changed)}
            return HybridConfig(**shared, attention_every=min(4, config.layers))
        case kind:
            return peer(config, kind)


class Run(NamedTuple):
    """One training run of a plan."""

    variant: str
    size: str
    seed: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.variant}_{self.size}_lr{self.lr:g}_seed{self.seed}"


def plan(variants: Sequence[str], sizes: Sequence[str], seeds: Sequence[int], lrs: Sequence[float]) -> list[Run]:
    """All runs, a seed after the other, so that what an interruption leaves is of use.

    Raises:
        ValueError: an unknown variant, or nothing to run.
    """
    known(variants, VARIANTS, "variant")
    for what, values in (("variant", variants), ("size", sizes), ("seed", seeds), ("lr", lrs)):
        if not values:
            raise ValueError(f"no {what} given: nothing to compare")
        if len(set(values)) < len(values):
            raise ValueError(f"a {what} is given twice: {', '.join(map(str, values))}")
    return [Run(v, size, seed, lr) for seed, size, lr, v in product(seeds, sizes, lrs, variants)]


def read_record(file: Path) -> dict[str, Any]:
    """What came out of a run.

    Raises:
        ValueError: it is damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        _ = found["name"], found["about"]["train"], [found["hardware"][key] for key in MACHINE]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}): delete it, and the run is scored again"
        ) from None
    return found


def records(out: Path, runs: Iterable[Run]) -> list[dict[str, Any]]:
    """What came out of the runs that are done."""
    files = [out / run.name / RECORD for run in runs]
    return [read_record(file) for file in files if file.is_file()]


def machines(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By what sets kinds of machine apart, of each kind one of the results."""
    return {", ".join(f"{key} {r['hardware'][key]}" for key in MACHINE): r for r in results}


def check_hardware(results: Sequence[dict[str, Any]], *, mixed: bool = False) -> None:
    """Raises ValueError where results of unlike machines would stand in one table, unless that is wanted (`mixed`)."""
    kinds = machines(results)
    if len(kinds) > 1 and not mixed:
        places = "; ".join(f"{r['name']} on {kind}" for kind, r in kinds.items())
        raise ValueError(f"results of {len(kinds)} kinds of machine in one table ({places}): --mixed allows it")


# two-sided 95 % of Student's t for 1, 2, … degrees of freedom
T: tuple[float, ...]
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def t95(freedom: int) -> float:
    """Student's t, two-sided 95 %; infinite where nothing is known of the spread."""
    return math.inf if freedom < 1 else T[min(freedom, len(T)) - 1]


def pooled(groups: Iterable[Sequence[float]]) -> tuple[float, int]:
    """(standard deviation within groups, its degrees of freedom)."""
    arrays = [np.asarray(g, float) for g in groups]
    freedom = sum(len(g) - 1 for g in arrays)
    squares = sum(float(((g - g.mean()) ** 2).sum()) for g in arrays)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def half_width(deviation: float, freedom: int, n: int) -> float | None:
    """Of the 95 % interval of a mean of n; None where nothing is known of the spread."""
    return t95(freedom) * deviation / math.sqrt(n) if freedom else None


def summary(found: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """A row for each variant, size and learning rate: means over the seeds; where the rate is the variant's best, the
    difference to the baseline at its own."""
    cells: dict[tuple[str, float, str], dict[int, dict[str, Any]]] = {}
    for r in found:
        cells.setdefault((r["size"], r["lr"], r["variant"]), {})[r["seed"]] = r
    bits = {key: [r["bits_per_byte"] for r in cell.values()] for key, cell in cells.items()}
    best = best_rates({"size": s, "lr": r, "variant": v, "bits_per_byte": np.mean(b)} for (s, r, v), b in bits.items())
    pairs: dict[tuple[str, float, str], list[float]] = {}
    for (size, variant), lr in best.items():
        base, mine = cells.get((size, best.get((size, baseline), lr), baseline), {}), cells[size, lr, variant]
        shared = [seed for seed in mine if seed in base and variant != baseline]
        pairs[size, lr, variant] = [mine[seed]["bits_per_byte"] - base[seed]["bits_per_byte"] for seed in shared]
    spread, freedom = pooled(bits.values())
    of_pairs, pairs_freedom = pooled(d for d in pairs.values() if d)
    rows = []
    for key, cell in cells.items():
        runs, difference = list(cell.values()), pairs.get(key)
        row = {"size": key[0], "lr": key[1], "variant": key[2], "seeds": sorted(cell)}
        row["best_rate"] = best[key[0], key[2]] == key[1]
        row |= {name: runs[0][name] for name in ("parameters", "block_parameters", "tokens")}
        row["bits_per_byte"] = float(np.mean(bits[key]))
        row["half_width"] = half_width(spread, freedom, len(runs))
        if difference:
            row["difference"] = float(np.mean(difference))
            row["difference_half_width"] = half_width(of_pairs, pairs_freedom, len(difference))
        for part in ("recalled", "others"):
            losses = [r[part]["loss"] for r in runs if r[part]["loss"] is not None]
            row[part] = float(np.mean(losses)) if losses else None
        row["tokens_per_second"] = float(np.median([r["tokens_per_second"] for r in runs]))
        row["memory"] = max((r["memory"] for r in runs if r.get("memory")), default=None)
        rows.append(row)
    return rows


def best_rates(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Of each size and variant the learning rate that did best."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["size"], row["variant"])
        if key not in best or row["bits_per_byte"] < best[key]["bits_per_byte"]:
            best[key] = row
    return {key: row["lr"] for key, row in best.items()}


def report(found: Sequence[dict[str, Any]], baseline: str) -> dict[str, Any]:
    """Rows of all runs, and the laws of those variants that have sizes enough, at the best learning rate of each.

    Runs that did not train (`"failed"` in their record says why) are named, and whoever has one at a rate has no row
    there.
    """
    failed = {(r["size"], r["lr"], r["variant"]) for r in found if "failed" in r}
    trained = [r for r in found if (r["size"], r["lr"], r["variant"]) not in failed]
    rows = summary(trained, baseline)
    best = best_rates(rows)
    at_best = [r for r in trained if r["lr"] == best[r["size"], r["variant"]]]
    laws = [law(at_best, variant) for variant in dict.fromkeys(r["variant"] for r in trained)]
    named = {r["name"]: r["failed"] for r in found if "failed" in r}
    return {"baseline": baseline, "rows": rows, "laws": [x for x in laws if x], "failed": named, "runs": trained}


def law(found: Sequence[dict[str, Any]], variant: str) -> dict[str, Any] | None:
    """bits per byte = a * (parameters of the blocks / 10^6)^-b over the runs of a variant; None below three sizes.

    Least squares of logarithms. The interval of b is that of the line's slope: what the runs lie off it, for their seed
    or because the law does not hold, widens it.
    """
    mine = [r for r in found if r["variant"] == variant]
    if len({r["size"] for r in mine}) < 3:
        return None
    x = np.log([r["block_parameters"] / 1e6 for r in mine])
    y = np.log([r["bits_per_byte"] for r in mine])
    slope, intercept = np.polyfit(x, y, 1)
    freedom = len(x) - 2
    squares = float(((y - slope * x - intercept) ** 2).sum())
    error = math.sqrt(squares / freedom / float(((x - x.mean()) ** 2).sum()))
    fitted = {"a": math.exp(intercept), "b": -float(slope), "b_half_width": t95(freedom) * error}
    return {"variant": variant, **fitted, "runs": len(x)}


def table(result: dict[str, Any]) -> str:
    """Rows and laws in Markdown."""
    heads = ["size", "variant", "parameters", "seeds", "bits per byte", "± ", f"against {result['baseline']}", "±"]
    heads += ["recalled", "others", "tokens/s", "memory"]
    lines = []
    several = len({row["lr"] for row in result["rows"]}) > 1
    for row in sorted(result["rows"], key=lambda row: (row["block_parameters"] // 10**5, row["bits_per_byte"])):
        name = f"{row['variant']}, lr {row['lr']:g}" + " *" * row["best_rate"] if several else row["variant"]
        cells = [row["size"], name, f"{row['parameters'] / 1e6:.2f} M", str(len(row["seeds"]))]
        cells += [f"{row['bits_per_byte']:.4f}", _number(row["half_width"]), _number(row.get("difference"), "+.4f")]
        cells += [
            _number(row.get("difference_half_width")),
            _number(row["recalled"], ".3f"),
            _number(row["others"], ".3f"),
        ]
        memory = "–" if row["memory"] is None else f"{row['memory'] / 1e9:.2f} GB"
        cells += [f"{row['tokens_per_second']:,.0f}", memory]
        lines.append(cells)
    notes = ["* The best rate of each; differences are taken between these."] if several else []
    notes += [
        f"{found['variant']}: bits per byte = {found['a']:.3f} (N / 10^6)^-b, b = {found['b']:.4f} ± "
        f"{found['b_half_width']:.4f}, N parameters in the blocks, {found['runs']} runs"
        for found in result["laws"]
    ]
    notes += [f"{name} did not train: {why}" for name, why in result["failed"].items()]
    return "\n\n".join([markdown(heads, lines), *notes])


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """A PNG: bits per byte by size (of one size, by learning rate or by variant), curves, loss of recalled tokens.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `plot`).
    """
    best = best_rates(result["rows"])
    rows = [row for row in result["rows"] if row["lr"] == best[row["size"], row["variant"]]]
    figure, ((left, middle, right),) = grid(title, 1, 3, size=(5.2, 4.6))
    from matplotlib import colormaps  # grid says it where there is none

    pairs = colormaps["tab20"]  # the ten usual colours, each followed by a lighter one
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    colours = {variant: pairs(2 * n % 20 + n // 10 % 2) for n, variant in enumerate(variants)}
    if len({row["size"] for row in rows}) > 1:
        _by_size(left, rows, result["laws"], colours, "bits_per_byte", "held-out bits per byte")
        _by_size(right, rows, [], colours, "recalled", "loss of recalled tokens (nats)")
    else:
        if len({row["lr"] for row in result["rows"]}) > 1:
            _by_rate(left, result["rows"], colours)
        else:
            _by_variant(left, rows, colours, "bits_per_byte", "held-out bits per byte")
        _by_variant(right, rows, colours, "recalled", "loss of recalled tokens (nats)")
    _curves(middle, [r for r in result["runs"] if r["lr"] == best[r["size"], r["variant"]]], colours)
    figure.savefig(path, dpi=120, format="png")


def _by_size(
    axis: Any, rows: list[dict[str, Any]], laws: list[dict[str, Any]], colours: dict[str, Any], key: str, label: str
) -> None:
    for variant, colour in colours.items():
        mine = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["block_parameters"])
        x, y = [row["block_parameters"] / 1e6 for row in mine], [row[key] for row in mine]
        errors = [row["half_width"] or 0 for row in mine] if key == "bits_per_byte" else None
        axis.errorbar(x, y, yerr=errors, color=colour, marker="o", linestyle="none", capsize=3, label=variant)
        for found in laws:
            if found["variant"] == variant:
                fitted = [found["a"] * n ** -found["b"] for n in x]
                axis.plot(x, fitted, color=colour, linewidth=1, label=f"_{variant}, fitted")
    axis.set_xscale("log")
    ticks = sorted({row["block_parameters"] / 1e6 for row in rows})
    axis.set_xticks(ticks, [f"{n:.1f}" for n in ticks])
    axis.minorticks_off()
    axis.set_xlabel("parameters in the blocks (millions)")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _by_rate(axis: Any, rows: list[dict[str, Any]], colours: dict[str, Any]) -> None:
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
    order = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key], reverse=True)
    for n, row in enumerate(order):
        error = row["half_width"] if key == "bits_per_byte" else None
        axis.errorbar(row[key], n, xerr=error, color=colours[row["variant"]], marker="o", capsize=3)
    axis.set_yticks(range(len(order)), [row["variant"] for row in order])
    axis.set_xlabel(label)
    axis.grid(alpha=0.3, axis="x")


def _curves(axis: Any, runs: list[dict[str, Any]], colours: dict[str, Any]) -> None:
    """Held-out bits per byte while training, of the largest size."""
    largest = max(runs, key=lambda r: r["block_parameters"])["size"]
    labels: set[str] = set()
    for r in (r for r in runs if r["size"] == largest):
        tokens, bits = zip(*r["curve"], strict=True)
        label = None if r["variant"] in labels else r["variant"]
        labels.add(r["variant"])
        axis.plot([t / 1e6 for t in tokens], bits, color=colours[r["variant"]], linewidth=1, label=label)
    axis.set_title(f"{largest}, every seed", fontsize=9)
    axis.set_xlabel("tokens trained on (millions)")
    axis.set_ylabel("held-out bits per byte (the first stretch)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
