"""The tile table: how large a tile one program takes, by GPU and width of the operands.

Chosen by what the compiler reports (tests/ops/triton/compile_report.py) for states of up to 256 x 512: no register
spills, shared memory within the limit, tensor cores in use. Among those, a wide `read` and a long chunk: `read`
computes the scores once per tile of its output, and the states written and read again are T / C. Nothing is timed when
it runs and T is in no key, so that no call waits for a search.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Tile(NamedTuple):
    """What one program holds at a time, and the warps and pipeline stages that it is compiled for."""

    rows: int  # of the state tile: K in `scan`, the side summed over in `read`
    columns: int  # V in `scan`, the side that comes out in `read`
    warps: int
    stages: int

    def within(self, rows: int, columns: int) -> "Tile":
        """The tile for sides smaller than its own: powers of two, at least 16, which tensor cores need."""
        fit = (max(16, triton.next_power_of_2(side)) for side in (rows, columns))
        r, c = (min(a, b) for a, b in zip(self[:2], fit, strict=True))
        return self._replace(rows=r, columns=c)

    def needed(self, rows: int, columns: int) -> int:
        """How many tiles a state of these sides has."""
        return triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns)


class Tiles(NamedTuple):
    """A row of the table: a tile for each kernel. `chunk`, in tokens, is the default and the longest."""

    chunk: int
    scan: Tile
    read: Tile
    decay: Tile


SMALL = 86
FAMILIES = (80, SMALL, 90, 100)
"""A100, the GPUs with 100 KiB of shared memory (sm_86, sm_89, sm_120), Hopper, Blackwell."""

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
"""By family and kind: bfloat16 and float16 ("half"), float32 multiplied as TF32, and exactly ("ieee")."""

STEP = Tile(64, 32, 4, 1)
"""Of the state in the decode step: narrow, so that one row of 8 heads keeps most multiprocessors busy."""
EXACT_ON_BLACKWELL = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
"""Whether a product in "ieee" is exact there: before, float32 made of 16-bit numbers was multiplied as TF32."""


@torch.compiler.assume_constant_result  # Dynamo cannot trace the call; the same for the GPU's family below
def precision() -> str:
    """How float32 is multiplied: exactly, or as TF32 where torch's own switch allows that for its products."""
    # torch.get_float32_matmul_precision() raises where this newer switch was used, and torch 2.9 warns of it
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def family(capability: tuple[int, int]) -> int | None:
    """The family of a compute capability, None where there is none."""
    major, minor = capability
    if major == 8:
        return 80 if minor in (0, 7) else SMALL
    return {9: 90, 10: 100, 12: SMALL}.get(major)


@torch.compiler.assume_constant_result
def device_family(index: int) -> int | None:
    """The family of the GPU with this index, None where the table has none for it."""
    return family(torch.cuda.get_device_capability(index))


WITHOUT_GPU = 90
"""The family whose tiles tensors on the CPU get: those that Triton interprets, or is only to compile for."""


def family_of(q: Tensor) -> int | None:
    """The family of the GPU that works on q."""
    return device_family(q.get_device()) if q.is_cuda else WITHOUT_GPU


def tiles_for(q: Tensor, C: int | None = None) -> Tiles:
    """The row for tensors like q and chunks of C; without C, that of the longest chunks.

    Chunks under 64 tokens are no work for the wide tensor cores of Hopper and Blackwell, and take small tiles on any
    GPU.
    """
    arch = family_of(q)
    kind = "half" if q.element_size() == 2 else precision()
    assert arch is not None, "refuses() lets no such GPU through"
    return TABLE[SMALL if C is not None and C < 64 else arch, kind]


def step_tile(q: Tensor) -> Tile:
    """STEP, or half of it where its 64 rows would be taken by tensor cores that are not exact."""
    return STEP if EXACT_ON_BLACKWELL or family_of(q) != 100 else STEP._replace(rows=32)
