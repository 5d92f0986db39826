"""A fair comparison: several models on the same tokens, in the same order, with the same budget, and what comes of it.

    Comparison(data=…, out=…, variants=("retnet", "transformer"), sizes=("1m", "5m"), seeds=(0, 1)).run()

`comparison.py` says which runs there are, `queue.py` has workers do them, `summary.py` makes numbers of their records.
"""

from retentive.studies.compare.comparison import Comparison
from retentive.studies.compare.pictures import plot
from retentive.studies.compare.records import Run
from retentive.studies.compare.summary import table
from retentive.studies.compare.variants import VARIANTS, Variant, config_of

__all__ = ["VARIANTS", "Comparison", "Run", "Variant", "config_of", "plot", "table"]
