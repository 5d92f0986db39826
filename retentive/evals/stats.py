"""95 % confidence intervals: Wilson's for shares, percentiles of the bootstrap for ratios over documents."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
"""Of the normal distribution, two-sided 95 %."""

Interval = tuple[float, float] | None
"""None where there is too little to say."""


def wilson(right: int, of: int) -> Interval:
    """Of a share (Wilson 1927): within [0, 1] and sound for small numbers, unlike the normal one."""
    share, width = right / of, Z * Z / of
    middle = (share + width / 2) / (1 + width)
    half = Z / (1 + width) * math.sqrt(share * (1 - share) / of + width / of / 4)
    return middle - half if right else 0.0, middle + half if right < of else 1.0  # both exact but for rounding


def mean_interval(values: Sequence[float]) -> Interval:
    """Of a mean, by its standard error."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - Z * error, mean + Z * error


def ratio_interval(over: Sequence[float], under: Sequence[float], *, draws: int = 2000, seed: int = 0) -> Interval:
    """Of sum(over) / sum(under), documents drawn anew `draws` times."""
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
