"""Parts of the hybrid: one changed at a time, at 1m, on two texts, at the hybrid's best learning rate.

    retentive compare --recipe recipes/compare_hybrid_parts.py        (novels: the data of recipes/compare_sizes.py)
    retentive demo --minutes 0.1                                      (which packs the source of Python's own library)
    retentive compare --recipe recipes/compare_hybrid_parts.py --data runs/demo-data --out runs/hybrid-parts-library

2 M tokens per run, two seeds. Ignore differences below the interval.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.compare import Comparison

VARIANTS = ("hybrid", "hybrid-64", "hybrid-128", "hybrid-512", "hybrid-third", "hybrid-fourth", "hybrid-no-forget")
VARIANTS += ("hybrid-no-rotation", "hybrid-retention-no-rotation", "hybrid-small-heads", "hybrid-wide-heads")
PLACES = {"hybrid-first": (0,), "hybrid-last": (4,), "hybrid-all-but-first": (1, 2, 3, 4)}  # of the five blocks of 1m


def recipe() -> Comparison:
    whole = runpy.run_path(str(Path(__file__).with_name("compare_hybrid.py")))["recipe"]()
    own = {name: {"model": "hybrid", "attention": places} for name, places in PLACES.items()}
    own["hybrid-wide-values"] = {"model": "hybrid", "value_dim": 320}
    one = replace(whole, variants=VARIANTS, set=own, seeds=(0, 1), lrs=(1.6e-2,), tune=False)
    return replace(one, out=Path("runs/hybrid-parts"), train=replace(whole.train, steps=250))
