"""95 % confidence intervals: Wilson's for shares, the percentile bootstrap for ratios over documents, and Student's t
for means of few runs with pooled spread."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Z = 1.959964
"""Quantile of the normal distribution for two-sided 95 %."""

Interval = tuple[float, float] | None
"""(low, high); None if there are too few values."""


def wilson(right: int, of: int) -> Interval:
    """Returns the interval of a share `right` / `of` (Wilson 1927): within [0, 1], and valid for small numbers.

    The normal approximation would have width 0 for 10 right of 10.
    """
    share, width = right / of, Z * Z / of
    middle = (share + width / 2) / (1 + width)
    half = Z / (1 + width) * math.sqrt(share * (1 - share) / of + width / of / 4)
    return middle - half if right else 0.0, middle + half if right < of else 1.0  # 0 and 1 exactly, without rounding


def share(metric: str, hits: Sequence[bool]) -> dict[str, Any]:
    """Returns the row of a share: metric, value, interval."""
    return {"metric": metric, "value": sum(hits) / len(hits), "interval": wilson(sum(hits), len(hits))}


def mean_interval(values: Sequence[float]) -> Interval:
    """Returns the interval of a mean, from its standard error; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - Z * error, mean + Z * error


def ratio_interval(over: Sequence[float], under: Sequence[float], *, draws: int = 2000, seed: int = 0) -> Interval:
    """Returns the interval of sum(over) / sum(under): bootstrap percentiles over documents, `draws` times.

    Documents are drawn, not tokens, since tokens of one document are not independent. The seed makes it reproducible.
    """
    if len(over) < 2:
        return None
    a, b = np.asarray(over, dtype=np.float64), np.asarray(under, dtype=np.float64)
    random = np.random.default_rng(seed)
    ratios = []
    for _ in range(draws):
        rows = random.integers(0, len(a), len(a))
        ratios.append(a[rows].sum() / b[rows].sum())
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom; a table avoids SciPy
T: tuple[float, ...]
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def t95(freedom: int) -> float:
    """Returns Student's t, two-sided 95 %, for `freedom` degrees of freedom; above 30 that of 30, slightly wide."""
    return math.inf if freedom < 1 else T[min(freedom, len(T)) - 1]


def pooled(groups: Iterable[Sequence[float]]) -> tuple[float, int]:
    """Returns (standard deviation within groups, its degrees of freedom), assuming equal spread in all groups."""
    arrays = [np.asarray(g, float) for g in groups]
    freedom = sum(len(g) - 1 for g in arrays)
    squares = sum(float(((g - g.mean()) ** 2).sum()) for g in arrays)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def half_width(deviation: float, freedom: int, n: int) -> float | None:
    """Returns half the width of the 95 % interval of a mean of n values; None without degrees of freedom."""
    return t95(freedom) * deviation / math.sqrt(n) if freedom else None
