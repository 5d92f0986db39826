"""Other architectures on the same tokens (extra `peers`): Llama, Mamba-2 and RWKV-4 of transformers, on novels.

    retentive compare --recipe recipes/compare_peers.py        (after recipes/compare_sizes.py, on the same data)

On a CPU their recurrences run in plain PyTorch, many times slower than ours: their tokens/s are the library's on this
machine, not the architecture's.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from retentive.cli.compare import CompareCommand


def recipe() -> CompareCommand:
    sizes = runpy.run_path(str(Path(__file__).with_name("compare_sizes.py")))["recipe"]
    variants = ("retnet", "transformer", "llama", "mamba2", "rwkv")
    return replace(sizes(), out=Path("runs/compare-peers"), variants=variants, sizes=("1m",), seeds=(0,))
