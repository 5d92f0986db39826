"""Repeats recipes/compare_twins.py on other text, the source of Python's own library, with fresh seeds.

    retentive demo --minutes 0.1                                   (which packs runs/demo-data)
    retentive compare --recipe recipes/compare_library.py

4.1 M tokens per run at 1m, four seeds, all at the learning rate that was the best of three for each of them on novels.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.compare import Comparison

VARIANTS = ("retnet", "retnet-paper", "transformer", "transformer-qk-norm")


def recipe() -> Comparison:
    twins = runpy.run_path(str(Path(__file__).with_name("compare_twins.py")))["recipe"]()
    data, out = Path("runs/demo-data"), Path("runs/compare-library")
    return replace(twins, data=data, out=out, variants=VARIANTS, seeds=(10, 11, 12, 13), lrs=(8e-3,), tune=False)
