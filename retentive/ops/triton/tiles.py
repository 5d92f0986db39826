"""Tile table: the tile size of one program, by GPU and operand width.

Chosen from the compiler's report (tests/ops/triton/compile_report.py) for states of up to 256 x 512: no register
spills, shared memory within the limit, tensor cores in use. Among those the table prefers a wide `read` and a long
chunk: `read` computes the scores once per tile of its output, and T / C states are written and read again. Nothing is
autotuned at run time and no key includes T, so no call waits for a search.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Tile(NamedTuple):
    """Tile that one program holds, with the warps and pipeline stages it is compiled for."""

    rows: int  # of the state tile: K in `scan`, the summed side in `read`
    columns: int  # V in `scan`, the output side in `read`
    warps: int
    stages: int

    def within(self, rows: int, columns: int) -> "Tile":
        """Returns the tile cut down to sides smaller than its own: powers of two, at least 16 for the tensor cores."""
        fit = (max(16, triton.next_power_of_2(side)) for side in (rows, columns))
        r, c = (min(a, b) for a, b in zip(self[:2], fit, strict=True))
        return self._replace(rows=r, columns=c)

    def needed(self, rows: int, columns: int) -> int:
        """Returns the number of tiles that cover a state of these sides."""
        return triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns)


class Tiles(NamedTuple):
    """A row of the table: one tile per kernel. `chunk`, in tokens, is the default and the maximum."""

    chunk: int
    scan: Tile
    read: Tile
    decay: Tile


SMALL = 86
FAMILIES = (80, SMALL, 90, 100)
"""A100, GPUs with 100 KiB of shared memory (sm_86, sm_89, sm_120), Hopper, Blackwell."""

EXACT = Tiles(32, scan=Tile(32, 64, 8, 2), read=Tile(32, 64, 4, 2), decay=Tile(32, 32, 8, 2))
TABLE = {
    (80, "half"): Tiles(64, scan=Tile(64, 64, 4, 3), read=Tile(64, 128, 8, 2), decay=Tile(64, 64, 8, 2)),
    (SMALL, "half"): Tiles(64, scan=Tile(64, 64, 4, 2), read=Tile(64, 64, 4, 2), decay=Tile(64, 64, 8, 2)),
    (90, "half"): Tiles(128, scan=Tile(64, 64, 4, 3), read=Tile(64, 128, 8, 2), decay=Tile(64, 64, 8, 2)),
    (100, "half"): Tiles(64, scan=Tile(64, 64, 4, 3), read=Tile(64, 256, 8, 3), decay=Tile(64, 64, 4, 2)),
    (80, "tf32"): Tiles(64, scan=Tile(32, 64, 4, 2), read=Tile(32, 128, 8, 2), decay=Tile(32, 64, 8, 2)),
    (SMALL, "tf32"): Tiles(64, scan=Tile(32, 64, 4, 2), read=Tile(32, 64, 8, 2), decay=Tile(32, 64, 8, 2)),
    (90, "tf32"): Tiles(64, scan=Tile(64, 64, 4, 2), read=Tile(32, 128, 8, 2), decay=Tile(32, 64, 8, 2)),
    (100, "tf32"): Tiles(64, scan=Tile(64, 64, 8, 2), read=Tile(32, 128, 8, 2), decay=Tile(32, 64, 8, 2)),
    **{(arch, "ieee"): EXACT for arch in FAMILIES},
}  # fmt: skip
"""Tiles by family and kind: bfloat16 and float16 ("half"), float32 multiplied as TF32, or exactly ("ieee")."""

STEP = Tile(64, 32, 4, 1)
"""State tile of the decode step: narrow, so that one row of 8 heads keeps most multiprocessors busy."""
EXACT_ON_BLACKWELL = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
"""True if "ieee" products are exact on Blackwell. Triton below 3.8 multiplied float32 cast from 16 bits as TF32."""


@torch.compiler.assume_constant_result  # Dynamo cannot trace the call; nor `device_family` below
def precision() -> str:
    """Returns how float32 is multiplied: "tf32" if torch's own switch allows it for its products, else "ieee"."""
    # torch.get_float32_matmul_precision() raises if this newer switch was used, and torch 2.9 warns about it
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def family(capability: tuple[int, int]) -> int | None:
    """Returns the family of a compute capability; None if the table has none."""
    major, minor = capability
    if major == 8:
        return 80 if minor in (0, 7) else SMALL
    return {9: 90, 10: 100, 12: SMALL}.get(major)


@torch.compiler.assume_constant_result
def device_family(index: int) -> int | None:
    """Returns the family of the GPU with this index; None if the table has none for it."""
    return family(torch.cuda.get_device_capability(index))


WITHOUT_GPU = 90
"""Family whose tiles CPU tensors use, for Triton's interpreter and for compiling without a GPU."""


def family_of(q: Tensor) -> int | None:
    """Returns the family of the GPU that holds q."""
    return device_family(q.get_device()) if q.is_cuda else WITHOUT_GPU


def tiles_for(q: Tensor, C: int | None = None) -> Tiles:
    """Returns the table's row for tensors like q and chunks of C; without C, the row with the longest chunks.

    Chunks under 64 tokens cannot use the wide tensor cores of Hopper and Blackwell, so they use small tiles on every
    GPU.
    """
    arch = family_of(q)
    kind = "half" if q.element_size() == 2 else precision()
    assert arch is not None, "refuses() lets no such GPU through"
    return TABLE[SMALL if C is not None and C < 64 else arch, kind]


def step_tile(q: Tensor) -> Tile:
    """Returns STEP, or half of its 64 rows where tensor cores that are not exact would take them."""
    return STEP if EXACT_ON_BLACKWELL or family_of(q) != 100 else STEP._replace(rows=32)
