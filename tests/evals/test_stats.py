"""Coverage of the intervals."""

import numpy as np

from retentive.evals.stats import half_width, pooled


def test_intervals_hold_what_they_promise():
    """In 2000 experiments of pure noise, the interval of a mean of two covers the truth 95 % of the time."""
    random, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        noise = random.normal(size=(5, 2))
        deviation, freedom = pooled(noise)
        inside += abs(noise[0].mean()) <= half_width(deviation, freedom, 2)
    assert 0.93 < inside / 2000 < 0.97  # the binomial's standard deviation is 0.5 %
