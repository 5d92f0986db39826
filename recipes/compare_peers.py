"""Other architectures on the same tokens (extra `peers`): Llama, Mamba-2 and RWKV-4 from transformers, 2 M tokens.

retentive compare --recipe recipes/compare_peers.py        (after recipes/compare_ablations.py, whose runs it shares)

On a CPU their recurrences run in plain PyTorch, many times slower than ours. Their tokens/s measure the library on this
machine, not the architecture.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.compare import Comparison


def recipe() -> Comparison:
    ablations = runpy.run_path(str(Path(__file__).with_name("compare_ablations.py")))["recipe"]
    return replace(ablations(), variants=("retnet-paper", "transformer", "llama", "mamba2", "rwkv"), seeds=(0,))
