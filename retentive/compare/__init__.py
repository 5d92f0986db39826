"""A fair comparison: several models trained on the same tokens in the same order with the same budget, and the results.

Comparison(data=…, out=…, variants=("retnet", "transformer"), sizes=("1m", "5m"), seeds=(0, 1)).run()

comparison  the options, and the training runs they define
variants    the models that can be compared
queue       runs each training run in its own process, `worker`
records     result of each run on disk
summary     all records as a table with intervals, and scaling laws; `pictures` plots them
"""

from retentive.compare.comparison import Comparison
from retentive.compare.pictures import plot, title_of
from retentive.compare.records import Run
from retentive.compare.summary import table
from retentive.compare.variants import VARIANTS, Variant, config_of_variant

__all__ = ["VARIANTS", "Comparison", "Run", "Variant", "config_of_variant", "plot", "table", "title_of"]
