r"""The hybrid beside RetNets and the best Transformer twins, at 1m, four seeds, on three texts.

    retentive compare --recipe recipes/compare_hybrid.py           (novels: the data of recipes/compare_sizes.py)
    retentive demo --minutes 0.1                                   (which packs the source of Python's own library)
    retentive compare --recipe recipes/compare_hybrid.py --data runs/demo-data --out runs/compare-hybrid-library
    paste -d '\n' train.en train.ja > pairs/train.txt               (sentence pairs of recipes/translate.py)
    paste -d '\n' valid.en valid.ja > pairs/valid.txt
    retentive data pairs/train.txt --valid pairs/valid.txt --out data/pairs
    retentive compare --recipe recipes/compare_hybrid.py --data data/pairs --steps 250 --out runs/compare-hybrid-pairs

4.1 M tokens per run; the pairs are few, so `--steps 250` makes it 2 M there. The first seed tries all learning rates,
the others take its best. --earlier takes finished runs of other results: recipes/compare_twins.py has the RetNet and
most twins on novels (seeds 0 to 2), recipes/compare_library.py on source (seeds 10 to 13).
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.compare import Comparison

VARIANTS = ("hybrid", "retnet", "retnet-convolution", "transformer", "transformer-qk-norm")
VARIANTS += ("transformer-qk-norm-forget", "transformer-qk-norm-forget-convolution")


def recipe() -> Comparison:
    sizes = runpy.run_path(str(Path(__file__).with_name("compare_sizes.py")))["recipe"]()
    out, lrs = Path("runs/compare-hybrid"), (4e-3, 8e-3, 1.6e-2)
    return replace(sizes, out=out, variants=VARIANTS, sizes=("1m",), seeds=(0, 1, 2, 3), lrs=lrs)
