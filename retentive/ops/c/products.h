/* Products of small matrices that fit in the cache.

Matrices are float32 in rows, padded with zeros to whole vectors. Operands of products consist of 32-bit units along the
summed dimension. A unit is one float, or a pair of bfloat16 (`pair`, if the inputs are bfloat16 and the CPU multiplies
pairs: 1 in vectors, 2 in AMX tiles). Layouts of an operand:
    rows      [m][r]                 unit r of row m: the left operand
    panels    [n / NC][r][n % NC]    the right operand, or the left one transposed
AMX tiles load from the same layouts, so they replace only the products. Sums are float32.
*/

#pragma once
#include "numbers.h"
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TILES
#endif
#ifdef __AVX512BF16__
#define PAIR(c) (c)->pair
#else
#define PAIR(c) 0 /* a constant: the compiler drops all code for pairs */
#endif

#if defined(__AVX512F__)
enum { MR = 8 };
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
enum { MR = 4 }; /* 16 registers */
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
enum { MR = 8 };
#define LOW_HALVES 0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#endif
enum {
    NC = 2 * LANES,                      /* columns of a panel */
    BLOCK = 32,                          /* rows and columns of four tiles: AMX pads everything to it */
    WHOLE = (int)LANES > (int)MR ? (int)LANES : (int)MR,     /* K and V are padded to a multiple of it */
    DEPTH = 256,                         /* units summed at once: a panel this deep stays in the L1 cache */
    MOST_GROUP = 16
};

/* ---- operands ---- */

/* pairs up neighbours of one row: [cols] -> units [cols / 2]; cols is a multiple of LANES */
INLINE void pair_row(const float *x, i64 cols, float *to) {
    write_bf16(x, cols, (uint16_t *)to);
}

/* pairs up two vectors element by element, rounded */
INLINE vf pair_up(vf a, vf b) {
#ifdef __AVX512BF16__
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
    return (vf)(low | _mm512_slli_epi32(high, 16));
#endif
    for (int i = 0; i < LANES; i++) {
        uint32_t unit = to_bf16(a[i]) | (uint32_t)to_bf16(b[i]) << 16;
        memcpy((float *)&a + i, &unit, 4);
    }
    return a;
}

/* the same for numbers that are bfloat16 already */
INLINE vf pair_exact(vf a, vf b) { return (vf)(((vu)a >> 16) | ((vu)b & 0xffff0000u)); }

/* pairs up two rows element by element: 2 x [n] -> units [n] */
INLINE void pair_rows(const float *a, const float *b, i64 n, float *to) {
    i64 whole = n / LANES * LANES;
    for (i64 j = 0; j < whole; j += LANES) store(to + j, pair_up(load(a + j), load(b + j)));
    for (i64 j = whole; j < n; j++) ((uint32_t *)to)[j] = to_bf16(a[j]) | (uint32_t)to_bf16(b[j]) << 16;
}

/* returns the `rows` operand of x [rows][cols]: x itself, or its pairs in `to` */
static const float *as_rows(int pair, const float *x, i64 rows, i64 cols, float *to) {
    if (!pair) return x;
    for (i64 i = 0; i < rows; i++) pair_row(x + i * cols, cols, to + i * cols / 2);
    return to;
}

/* makes the `panels` operand of x [rows][cols], of row stride `ld`, summed over rows */
static void as_panels(int pair, const float *x, i64 ld, i64 rows, i64 cols, float *to) {
    for (i64 c = 0; c < cols; c += NC)
        for (i64 r = 0, n = smaller(NC, cols - c); r < rows; r += pair ? 2 : 1, to += NC) {
            if (pair) pair_rows(x + r * ld + c, x + (r + 1) * ld + c, n, to);
            else if (n == NC) store(to, load(x + r * ld + c)), store(to + LANES, load(x + r * ld + c + LANES));
            else memcpy(to, x + r * ld + c, n * 4);
        }
}

/* transposes LANES rows of x into `to` by perfect shuffles: row i meets row i + LANES / 2, log2(LANES) times */
INLINE void transpose_square(const float *x, i64 ld, float *to, i64 to_ld) {
    vf a[LANES], b[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) a[i] = load(x + i * ld);
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; i++) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + LANES / 2], LOW_HALVES);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + LANES / 2], HIGH_HALVES);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) a[i] = b[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(to + i * to_ld, a[i]);
}

/* makes the `panels` operand of x's transpose; x is `rows` units [n][units] of stride `ld`, panels are `depth` deep */
static void as_panels_of_transpose(const float *x, i64 ld, i64 n, i64 units, float *to, i64 depth) {
    for (i64 c = 0; c < n; c += LANES) {
        float *y = to + c / NC * NC * depth + c % NC;
        i64 r = 0, width = smaller(LANES, n - c);
        if (width == LANES)
            for (; r + LANES <= units; r += LANES) transpose_square(x + c * ld + r, ld, y + r * NC, NC);
        for (; r < units; r++)
            for (i64 j = 0; j < width; j++) y[r * NC + j] = x[(c + j) * ld + r];
    }
}

/* ---- products ---- */

INLINE vf multiply_add(int pair, vf a, vf b, vf c) {
#ifdef __AVX512BF16__
    if (pair) return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
    (void)pair;
    return a * b + c;
}

/* computes MR rows and nv vectors of `to` = from * beta + A B, with A's unit (i, r) at a[i * am + r * ar] */
INLINE void tile(int pair, int nv, i64 units, const float *a, i64 am, i64 ar, const float *b, const float *from,
                 const float *beta, float *to, i64 ld) {
    vf sum[MR][2];
    for (int i = 0; i < MR; i++)
        for (int n = 0; n < nv; n++)
            sum[i][n] = from ? load(from + i * ld + n * LANES) * splat(beta[i]) : (vf){0};
    for (i64 r = 0; r < units; r++) {
        vf b0 = load(b + r * NC), b1 = nv == 2 ? load(b + r * NC + LANES) : b0;
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
            vf x = splat_unit(a + i * am + r * ar);
            sum[i][0] = multiply_add(pair, x, b0, sum[i][0]);
            if (nv == 2) sum[i][1] = multiply_add(pair, x, b1, sum[i][1]);
        }
    }
    for (int i = 0; i < MR; i++)
        for (int n = 0; n < nv; n++) store(to + i * ld + n * LANES, sum[i][n]);
}

typedef enum { FULL, LOWER, UPPER, UP_TO_ROW, FROM_ROW } Shape; /* the part of a product that is not zero */
typedef struct { const float *p; i64 depth; } Operand;   /* depth: units per row, or per panel */
typedef struct { float *p; i64 ld, panel; } Result;      /* stride of rows, stride of column panels, in floats */

INLINE void products(int pair, int transposed, Shape shape, i64 M, i64 N, i64 units, Operand A, Operand B,
                     const float *from, const float *beta, Result to) {
    static const float one[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    for (i64 begin = 0; begin < units; begin += DEPTH)
        for (i64 n = 0; n < N; n += NC)
            for (i64 m = 0; m < M; m += MR) {
                if ((shape == LOWER && n >= m + MR) || (shape == UPPER && n + NC <= m)) continue;
                i64 row = pair ? m / 2 : m, row_end = pair ? (m + MR) / 2 : m + MR;
                i64 first = begin, last = smaller(begin + DEPTH, units), at = n / NC * to.panel + m * to.ld;
                if (shape == UP_TO_ROW) last = smaller(last, row_end);
                if (shape == FROM_ROW && first < row) first = row;
                if (last < first) last = first;
                const float *a = A.p + (transposed ? m / NC * NC * A.depth + m % NC + first * NC : m * A.depth + first);
                const float *b = B.p + n * B.depth + first * NC;
                const float *init = begin ? to.p + at : from ? from + at : NULL;
                const float *factor = begin || !beta ? one : beta + m;
                i64 am = transposed ? 1 : A.depth, ar = transposed ? NC : 1;
                if (N - n > LANES) tile(pair, 2, last - first, a, am, ar, b, init, factor, to.p + at, to.ld);
                else tile(pair, 1, last - first, a, am, ar, b, init, factor, to.p + at, to.ld);
            }
}

/* to [M][N] = beta (per row, 1 if NULL) * from (0 if NULL) + A B. Skips what `shape` says is zero: for LOWER and UPPER
   columns past and before the row, for UP_TO_ROW and FROM_ROW units past and before the row. */
#define PRODUCT(name, pair, transposed)                                                                             \
    static void name(Shape shape, i64 M, i64 N, i64 units, Operand A, Operand B, const float *from,                 \
                     const float *beta, Result to) {                                                                \
        products(pair, transposed, shape, M, N, units, A, B, from, beta, to);                                       \
    }
PRODUCT(product_floats, 0, 0)
PRODUCT(product_floats_transposed, 0, 1)
PRODUCT(product_pairs, 1, 0)
PRODUCT(product_pairs_transposed, 1, 1)

#ifdef TILES
/* The same for pairs, by AMX. M and N are multiples of BLOCK, units of 16. A block of `to` stays in four tiles while
   two of A and two of B pass. A tile is 16 rows of 64 bytes: 16 units of 16 rows of A, or 16 columns of 16 of B. */
static void tiles(int transposed, Shape shape, i64 M, i64 N, i64 units, Operand A, Operand B, const float *from,
                  const float *beta, Result to) {
    float block[BLOCK * 256] __attribute__((aligned(64))); /* rows of A^T, whose units are tokens, 512 at most */
    for (i64 m = 0; m < M; m += BLOCK) {
        i64 first = shape == FROM_ROW ? m / 2 : 0, last = shape == UP_TO_ROW ? smaller(units, (m + BLOCK) / 2) : units;
        const float *a = A.p + m * A.depth + first;
        i64 ld = A.depth;
        if (transposed) {
            const float *panel = A.p + m * A.depth + first * NC;
            a = block, ld = last - first;
            for (i64 r = 0; r < ld; r += LANES)
                for (i64 i = 0; i < BLOCK; i += LANES) transpose_square(panel + r * NC + i, NC, block + i * ld + r, ld);
        }
        for (i64 n = 0; n < N; n += BLOCK) {
            if ((shape == LOWER && n >= m + BLOCK) || (shape == UPPER && n + BLOCK <= m)) continue;
            float *at = to.p + n / NC * to.panel + m * to.ld;
            const float *b = B.p + n * B.depth + first * NC;
            if (from) {
                const float *x = from + (at - to.p);
                for (i64 i = 0; i < BLOCK && (beta || x != at); i++)
                    for (i64 j = 0; j < BLOCK; j += LANES)
                        store(at + i * to.ld + j, load(x + i * to.ld + j) * splat(beta ? beta[m + i] : 1));
                _tile_loadd(0, at, to.ld * 4);
                _tile_loadd(1, at + 16, to.ld * 4);
                _tile_loadd(2, at + 16 * to.ld, to.ld * 4);
                _tile_loadd(3, at + 16 * to.ld + 16, to.ld * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (i64 r = 0; r < last - first; r += 16) {
                _tile_loadd(4, a + r, ld * 4);
                _tile_loadd(5, a + 16 * ld + r, ld * 4);
                _tile_loadd(6, b + r * NC, NC * 4);
                _tile_loadd(7, b + r * NC + 16, NC * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, at, to.ld * 4);
            _tile_stored(1, at + 16, to.ld * 4);
            _tile_stored(2, at + 16 * to.ld, to.ld * 4);
            _tile_stored(3, at + 16 * to.ld + 16, to.ld * 4);
        }
    }
}

typedef struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } TileConfig;

/* Configures all eight tiles of this thread, 64 bytes wide. Tiles 0 to 5 (results, left operand) have `rows` rows, and
   tiles 6 and 7 (right operand) 16. The caller's configuration is saved in `before`. */
static void open_tiles(TileConfig *before, int rows) {
    TileConfig ours = {1, 0, {0}, {0}, {0}};
    for (int i = 0; i < 8; i++) ours.bytes[i] = 64, ours.rows[i] = i < 6 ? rows : 16;
    _tile_storeconfig(before);
    _tile_loadconfig(&ours);
}

static void close_tiles(const TileConfig *before) {
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

/* Linux gives the AMX registers only to a process that asks for them. */
static int tiles_are_allowed(void) {
    static int allowed = -1;
    enum { ASK = 0x1023, TILE_DATA = 18 };
    if (allowed < 0) allowed = !syscall(SYS_arch_prctl, ASK, TILE_DATA);
    return allowed;
}
#endif

/* How products of a dtype are made: 0 of float32; of pairs of bfloat16, 1 in vectors, 2 in tiles. */
static i64 pairs_of(i64 dtype) {
#ifdef TILES
    if (dtype == 1 && tiles_are_allowed()) return 2;
#endif
#ifdef __AVX512BF16__
    return dtype == 1;
#endif
    (void)dtype;
    return 0;
}
