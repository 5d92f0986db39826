"""Packed matrices and their products, by each instruction set, against float64."""

import ctypes
import functools
import subprocess

import pytest
import torch

from retentive.native.library import FOLDER, KINDS, OPS, Matrix
from retentive.ops import compiler, cpu
from retentive.ops.compiler import FLAGS, LINK

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

HARNESS = """
#include <stdlib.h>
#include "memory.h"
#include "token.h"
enum { BEYOND = 1 << 15 };
static char *room(i64 bytes) {
    char *made = aligned_alloc(64, round_up(bytes, 64) + BEYOND);
    memset(made + round_up(bytes, 64), 77, BEYOND);
    return made;
}
static int left(char *room, i64 bytes) { /* whether what is beyond was written to */
    int found = 0;
    for (i64 i = 0; i < BEYOND; i++) found |= room[round_up(bytes, 64) + i] != 77;
    free(room);
    return found;
}
int go(const Matrix *m, const float *x, i64 rows, float *y) {
    char *at = NULL;
    input_at(&at, rows, m->K);
    i64 bytes = (i64)(intptr_t)at, more = expanded_bytes(m->K);
    char *space = at = room(bytes), *expanded = room(more);
    Input all = input_at(&at, rows, m->K), in = input_for(&all, m, 0, rows, rows > 32);
    for (i64 r = 0; r < rows; r++) ready_row(&in, r, x + r * m->K, m->K);
    product(m, &in, rows, 0, panels_of(m), y, panels_of(m) * ROWS, (uint8_t *)expanded);
    return left(space, bytes) | left(expanded, more);
}
void row(const Matrix *m, i64 id, float *to) { row_of_matrix(m, id, to); }
int pairs(void) {
#ifdef __AVX512BF16__
    return 1;
#endif
    return 0;
}
int tiles(void) {
#ifdef TILES
    return tiles_are_allowed();
#endif
    return 0;
}
"""
SHAPES = [(16, 16, 16), (33, 70, 32), (100, 129, 64), (7, 300, 128), (5, 5, 256)]
UNEVEN = [(33, 224, 96), (40, 256, 240), (17, 250, 48), (16, 512, 144)]
"""Shapes (N, K, group) whose groups do not divide 256."""


@pytest.fixture(scope="module")
def built(once):
    """`built(name)`: the harness for an instruction set, compiled once for all workers; other sets are skipped."""

    @functools.cache
    def build(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RETENTIVE_ISA", name)
            try:
                flag = compiler.instruction_flag()
            except ValueError as error:
                pytest.skip(str(error))

        def make(folder):
            folder.mkdir()
            (folder / "harness.c").write_text(HARNESS, encoding="utf-8")
            includes = [f"-I{FOLDER}", f"-I{OPS}"]
            made = ["gcc", *FLAGS, flag, *includes, "-shared", "harness.c", "-o", "harness.so", *LINK]
            subprocess.run(made, cwd=folder, check=True)

        loaded = ctypes.CDLL(str(once(f"product-{name}", make) / "harness.so"))
        loaded.packed_bytes.restype = ctypes.c_int64
        if name == "amx" and not loaded.tiles():
            pytest.skip("RETENTIVE_ISA=amx: the system does not give this process tiles")
        return loaded

    return build


SLOW = ("avx2", "avx512")
"""Each is compiled for seconds, and most of their code is in the sets above and below them."""


@pytest.fixture(
    scope="module", params=[pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in compiler.SETS]
)
def library(request, built):
    return built(request.param)


def quantised(w, group, top):
    """(integers `[N,K]`, scales `[N,groups]` float16, what they stand for `[N,K]`), rounded to nearest."""
    K = w.shape[1]
    parts = torch.nn.functional.pad(w, (0, -K % group)).unflatten(1, (-1, group))
    scale = (parts.abs().amax(-1) / top).half()
    q = (parts / scale.float()[..., None]).round().clamp(-top - 1, top)
    return q.flatten(1)[:, :K].to(torch.int8), scale, (q * scale.float()[..., None]).flatten(1)[:, :K]


NARROW = [f"{kind}, x of 8 bits" for kind in ("int8", "int4", "minimums")]
"""Kinds of integers, multiplied by integers of 8 bits instead of 16."""


def of_8_bits(x, group):
    """Rounds x `[rows,K]` to 127 steps each way in every group of columns."""
    K = x.shape[1]
    parts = torch.nn.functional.pad(x, (0, -K % group)).unflatten(1, (-1, group))
    most = parts.abs().amax(-1, keepdim=True)
    return ((parts * (127 / most)).round() * (most / 127)).flatten(1)[:, :K]


class Packed:
    """A random matrix of a kind, packed; `exact` is what it stands for."""

    def __init__(self, library, kind, N, K, group):
        kind, narrow = kind.removesuffix(", x of 8 bits"), kind in NARROW
        self.library, w, scales, self.minimums = library, torch.randn(N, K), None, None
        self.exact, rows = w.double(), w
        if kind == "bfloat16":
            rows = w.bfloat16()
            self.exact = rows.double()
        elif kind != "float32":
            rows, scales, stands = quantised(w, group, 127 if kind == "int8" else 7)
            self.exact = stands.double()
            if kind == "minimums":
                scales = scales.abs()
                self.minimums = torch.randn(scales.shape).half()
                columns = torch.arange(K) // group
                self.exact = ((rows.float() + 8) * scales[:, columns] + self.minimums[:, columns]).double()
            if kind != "int8":
                nibbles = torch.nn.functional.pad(rows, (0, K % 2), value=5).to(torch.uint8) & 15  # 5 must not count
                rows = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        self.rows, self.scales = rows.contiguous(), scales
        number = KINDS.index("int4" if kind == "minimums" else kind)
        self.matrix = Matrix(N, K, number, group if scales is not None else 0, kind == "minimums", narrow)
        size = library.packed_bytes(ctypes.byref(self.matrix))
        self.blob = torch.full((size + 128,), 77, dtype=torch.uint8)
        at = -self.blob.data_ptr() % 64
        library.place(ctypes.byref(self.matrix), ctypes.c_void_p(self.blob.data_ptr() + at))
        self.pack()
        outside = torch.cat([self.blob[:at], self.blob[at + size :]])
        assert (outside == 77).all(), "written past its room"

    def pack(self):
        pointers = [None if x is None else x.data_ptr() for x in (self.rows, self.scales, self.minimums)]
        where = map(ctypes.c_int64, (self.matrix.N, 0, 1))
        self.library.pack(ctypes.byref(self.matrix), *where, *map(ctypes.c_void_p, pointers))

    def __call__(self, x):
        """`x W^T` with the columns that are padding."""
        N = self.matrix.N
        y = torch.full((len(x), -(-N // 16) * 16), torch.nan)
        pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)), ctypes.c_void_p(y.data_ptr()))
        assert not self.library.go(ctypes.byref(self.matrix), *pointers), "written past the work space"
        return y


@pytest.mark.slow
@pytest.mark.parametrize(("N", "K", "group"), [*SHAPES, *UNEVEN], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "minimums", *NARROW])
def test_products_are_those_of_float64_however_many_rows(kind, N, K, group, library, same):
    packed = Packed(library, kind, N, K, group)
    x = torch.randn(13, K)
    read = x.bfloat16() if kind == "bfloat16" and library.pairs() else of_8_bits(x, group) if kind in NARROW else x
    # float32 sums; with integers x has 16 bits in each group, 2e-5 of its largest number
    close = 4e-6 if kind in ("float32", "bfloat16", *NARROW) else 1e-4
    for rows in (1, 2, 3, 7, 8, 13):
        y = packed(x[:rows])
        same(y[:, :N].double(), read[:rows].double() @ packed.exact.T, close)
        assert not y[:, N:].any()
        same(y[-1:], packed(x[rows - 1 : rows].clone()), 0)  # the bits that the row gets alone


@pytest.mark.parametrize(("N", "K", "group"), [*SHAPES, *UNEVEN], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "minimums", *NARROW])
def test_products_of_the_many_rows_of_a_prompt(kind, N, K, group, library, same):
    """Integers become bfloat16 there, where the CPU multiplies it: as x is, to 2^-9; beside x of 8 bits not."""
    packed = Packed(library, kind, N, K, group)
    x = torch.randn(45, K)
    y = packed(x)
    rounds = library.pairs() and kind != "float32"
    read, close = (of_8_bits(x, group), 4e-6) if kind in NARROW else (x, 5e-3 if rounds else 1e-4)
    same(y[:, :N].double(), read.double() @ packed.exact.T, close)
    assert not y[:, N:].any()
    same(y[33:], packed(x[:45].flip(0))[:12].flip(0), 0)  # wherever in the prompt a row is


@pytest.mark.parametrize(("N", "K", "group"), [*SHAPES, *UNEVEN, (40, 1100, 64), (16, 640, 128)], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "minimums", *NARROW])
def test_integers_have_the_same_bits_in_tiles_as_in_vectors(kind, N, K, group, built, same):
    """The sums are exact, and what is done with them is done in the same order."""
    tiles, vectors = (Packed(built(name), kind, N, K, group) for name in ("amx", "avx512bf16"))
    vectors.rows, vectors.scales, vectors.minimums = tiles.rows, tiles.scales, tiles.minimums
    vectors.pack()
    for rows in (1, 4, 7, 16, 17, 32) if kind not in NARROW else (1, 4, 7, 16, 17, 32, 33, 61):
        x = torch.randn(rows, K)
        same(tiles(x), vectors(x), 0)


@pytest.mark.parametrize("kind", [*KINDS, "minimums"])
def test_a_row_can_be_read_alone(kind, library, same):
    packed, row = Packed(library, kind, 21, 70, 32), torch.full((71,), 7.0)
    for n in (0, 16, 20):
        library.row(ctypes.byref(packed.matrix), ctypes.c_int64(n), ctypes.c_void_p(row.data_ptr()))
        same(row[:70].double(), packed.exact[n], 1e-7)
    assert row[70] == 7


@pytest.mark.parametrize("kind", [*KINDS, "minimums", *NARROW])
def test_what_is_not_finite_spoils_its_row_only(kind, library, same):
    packed = Packed(library, kind, 20, 96, 32)
    x = torch.randn(3, 96)
    want = packed(x)
    for bad in (torch.nan, torch.inf):
        spoilt = x.clone()
        spoilt[1, 50] = bad
        y = packed(spoilt)
        assert not y[1, :20].isfinite().any()
        same(y[::2], want[::2], 0)


def test_integers_at_their_ends_do_not_overflow(library, same):
    """-128 and -8 are integers too, and a group of 256 of the largest is the largest sum."""
    for kind, low in (("int8", -128), ("int4", -8), (NARROW[0], -128), (NARROW[1], -8)):
        packed = Packed(library, kind, 16, 256, 256)
        rows = torch.full((16, 256), low, dtype=torch.int8)
        if low == -8:
            rows = (rows[:, ::2].to(torch.uint8) & 15) * 17
        packed.rows, packed.scales = rows.contiguous(), torch.ones(16, 1, dtype=torch.half)
        packed.pack()
        for x in (torch.ones(1, 256), -torch.ones(1, 256)):
            same(packed(x), (x.sum() * low).expand(1, 16), 1e-6)


def test_zeros_and_the_smallest_numbers_are_no_division_by_zero(library):
    packed = Packed(library, "int8", 16, 64, 32)
    x = torch.zeros(2, 64)
    x[1, :32] = 1e-39
    assert packed(x).isfinite().all()
