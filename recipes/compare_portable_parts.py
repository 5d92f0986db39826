"""Cost of each part of the RetNet that llama.cpp can run: one part changed at a time, at 1m, four seeds.

    retentive compare --recipe recipes/compare_portable_parts.py      (on the data of recipes/compare_sizes.py)

2 M tokens per run. The first seed tries all learning rates, the others take its best.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.compare import Comparison

VARIANTS = ("retnet-portable", "portable-slow", "portable-gated", "portable-swish", "portable-rotation")
VARIANTS += ("portable-qk-norm", "retnet")


def recipe() -> Comparison:
    whole = runpy.run_path(str(Path(__file__).with_name("compare_portable.py")))["recipe"]()
    return replace(whole, out=Path("runs/compare-parts"), variants=VARIANTS, train=replace(whole.train, steps=250))
