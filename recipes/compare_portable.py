"""The RetNet that llama.cpp can run, beside ours and the Transformer twin: four seeds.

    retentive compare --recipe recipes/compare_portable.py      (on the data of recipes/compare_sizes.py)
    retentive compare --recipe recipes/compare_portable.py --sizes 5m --lrs 4e-3 8e-3

4.1 M tokens per run. The first seed tries all learning rates, the others take its best.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.compare import Comparison

VARIANTS = ("retnet", "retnet-portable", "transformer")


def recipe() -> Comparison:
    sizes = runpy.run_path(str(Path(__file__).with_name("compare_sizes.py")))["recipe"]()
    out, lrs = Path("runs/compare-portable"), (4e-3, 8e-3, 1.6e-2)
    return replace(sizes, out=out, variants=VARIANTS, sizes=("1m",), seeds=(0, 1, 2, 3), lrs=lrs)
