"""AdamW and Muon for RetNet and its twin, at equal tokens, each at its best of five learning rates.

    retentive compare --recipe recipes/compare_optimizers.py        (on the data of recipes/compare_sizes.py)

4.1 M tokens per run at 1m; learning rates are chosen by the first of three seeds. Muon's steps are scaled to the size
of AdamW's, so the same learning rates suit both, but each counts at its own best. A step of Muon costs more, relatively
less for larger batches. The table's tokens/s show the cost here.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.compare import Comparison


def recipe() -> Comparison:
    sizes = runpy.run_path(str(Path(__file__).with_name("compare_sizes.py")))["recipe"]()
    two = replace(sizes, out=Path("runs/compare-optimizers"), variants=("retnet", "transformer"), sizes=("1m",))
    lrs = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    return replace(two, optimizers=("adamw", "muon"), seeds=(0, 1, 2), lrs=lrs, tune=True)
