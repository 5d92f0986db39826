/* y = x W^T for the few rows x of a step: each line of a matrix comes from memory once for all of them.

Sums are made in the same order however many rows there are, so that a sequence in a batch gets the bits that it gets
alone. With bfloat16 weights x is rounded to bfloat16 where the CPU multiplies such pairs, as in torch. With integers x
becomes integers of 16 bits, with a scale for each group of columns, or of 8 where that was asked for (`narrow`); their
sums are exact, and so the same everywhere. Where the CPU multiplies bytes by fours (Arm's dot products), an integer of 16
bits is two digits of 8, each with a sign, and a group is gone through twice; where it multiplies blocks of them (Arm's
I8MM), two rows of x at a time. AVX-512 takes integers of 16 bits as they are, and those of 8 by fours.
Only prompts, of 16 bits, are multiplied by panels that were made bfloat16 just before, where pairs are at hand: all
prompts, long and short ones, so that what is read with them makes no difference.
*/

#pragma once
#include "tiles.h"
#ifdef __aarch64__
#include <arm_neon.h>
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#endif

enum { PARTS = ROWS / LANES, AT_ONCE = (int)LANES == 16 ? 8 : 4 }; /* vectors of a line; rows of x in registers */
enum { PANELS = (int)LANES == 16 ? 2 : 1 }; /* at once, of those that many rows of x read again and again */
enum { SUMS = 4, WIDE = SUMS / PARTS > PANELS ? SUMS / PARTS : PANELS }; /* sums in turn, while each waits for its last */
enum { AHEAD_BYTES = 8192 }; /* what is done to a line leaves few later ones in flight, and memory is 400 cycles away */

/* Counts known to the compiler: sums stay in registers only where the loops over them are unrolled whole, which clang
   leaves be in loops of loops unless told. */
#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED
#endif

typedef struct {        /* rows of x, made ready for matrices of one kind and group */
    i64 kind, group, K; /* K padded as the matrix's */
    i64 tiled;          /* for the tiles of AMX */
    i64 narrow, digits; /* as the matrix's; of 8 bits that an integer is made of, 0: it is whole, of 16 */
    i64 width;          /* rows side by side: 1 or AT_ONCE; in tiles 16, or as many as there are */
    int32_t *x;         /* units: a float, a pair of bfloat16 or of whole integers, or four digits;
                           [rows / width][units][width], or [rows / width][units / 16] tiles of [width][16] */
    float *scale;       /* [rows][K / group] */
    int32_t *sum;       /* [rows][K / group], of the integers */
} Input;

#ifdef __AVX512BF16__
enum { HAVE_PAIRS = 1 };
#else
enum { HAVE_PAIRS = 0 }; /* bfloat16 weights become floats, and x stays so */
#endif

#if defined(__ARM_FEATURE_DOTPROD)
enum { WIDE_DIGITS = 2, NARROW_DIGITS = 1, SIGNED = 1 }; /* of integers of 16 bits and of 8, in vectors; of bytes of int8 */
#elif defined(__AVX512VNNI__)
enum { WIDE_DIGITS = 0, NARROW_DIGITS = 1, SIGNED = 0 };
#else
enum { WIDE_DIGITS = 0, NARROW_DIGITS = 0, SIGNED = 0 };
#endif
enum { INT8_IN_TILES = 4, INT4_IN_TILES = 17 }; /* rows from which they are faster */
enum { APART = (int)AT_ONCE > (int)TILE ? (int)AT_ONCE : (int)TILE }; /* rows that each thread has to itself, at least */
enum { MOST = 127 * 256 + 127 }; /* the largest integer both of whose digits have a sign */

/* ---- x ---- */

/* units of a row in vectors */
INLINE i64 units_of(const Input *in) {
    if (in->digits) return in->K / 4 * in->digits;
    return in->kind >= INT8 || (in->kind == BFLOAT16 && HAVE_PAIRS) ? in->K / 2 : in->K;
}

/* units of a row in tiles */
INLINE i64 units_in_tiles(const Input *in) {
    if (!in->group) return TILE * ((in->K + TILE_COLUMNS - 1) / TILE_COLUMNS);
    return TILE * (in->K / in->group * in->digits * tiles_of_group(in->group));
}

/* An input of so many rows for matrices of at most K columns, of any kind, in memory from *at on, which moves on. */
static Input input_at(char **at, i64 rows, i64 K) {
    i64 wide = round_up(K, MOST_GROUP_COLUMNS), groups = wide / 16;
    Input in = {0};
    in.x = (int32_t *)take(at, round_up(rows, APART) * wide);
    in.scale = take(at, rows * groups), in.sum = (int32_t *)take(at, rows * groups);
    return in;
}

/* Whether tiles multiply such a matrix. Pairs are always multiplied by them where there are some, since they add in
   another order; of integers, whose bits are the same, so many rows that it pays. */
INLINE int in_tiles(i64 kind, i64 group, i64 rows) {
#ifdef TILES
    if (!tiles_are_allowed()) return 0;
    return kind == BFLOAT16 || (kind == INT8 && group % LINE == 0 && rows >= INT8_IN_TILES) ||
           (kind == INT4 && group % 32 == 0 && rows >= INT4_IN_TILES);
#endif
    (void)kind, (void)group, (void)rows;
    return 0;
}

/* The same memory from row `first` on, which APART divides, for `rows` rows that this matrix is to multiply; `prompt`:
   those of a prompt, for which integers become bfloat16 where that is faster. */
static Input input_for(const Input *all, const Matrix *m, i64 first, i64 rows, i64 prompt) {
    i64 most = round_up(m->K, MOST_GROUP_COLUMNS), at = first * (most / 16);
    int expanded = HAVE_PAIRS && prompt && m->kind >= INT8 && !m->narrow;
    i64 kind = expanded ? BFLOAT16 : m->kind, group = expanded ? 0 : m->group, tiled = in_tiles(kind, group, rows);
    i64 width = tiled ? smaller(rows, TILE) : rows == 1 ? 1 : AT_ONCE;
    i64 digits = !group ? 0 : tiled ? 2 - m->narrow : m->narrow ? NARROW_DIGITS : WIDE_DIGITS;
    return (Input){.kind = kind, .group = group, .K = padded_columns(m), .tiled = tiled, .narrow = m->narrow,
                   .digits = digits, .width = width, .x = all->x + first * most, .scale = all->scale + at,
                   .sum = all->sum + at};
}

/* The n integers of a group, in the order in which products take them: what is in one unit are columns of which the
   weights have the same place in halves of 16 bits, or in bytes; high digits are `apart` from low ones. */
INLINE void put_ordered(i64 kind, int digits, const int16_t *from, i64 n, i64 apart, int16_t *to) {
    const int half = kind == INT4 ? 4 : 2;
    int8_t *high = (int8_t *)to, *low = high + apart;
    for (i64 k = 0; k < n; k += 2 * half)
        UNROLLED for (int place = 0; place < 2 * half; place++) {
            int16_t x = from[k + place], least = (int16_t)((x + 128 & 255) - 128);
            i64 at = k + (!digits ? place % half * 2 + place / half : kind == INT4 ? place % 2 * 4 + place / 2 : place);
            if (!digits) to[at] = x;
            else if (digits == 1) high[at] = (int8_t)x;
            else high[at] = (int8_t)((x - least) >> 8), low[at] = (int8_t)least;
        }
}

/* A group's numbers as integers, their scale and their sum; n of them are there. */
static void ready_group(const Input *in, const float *x, i64 n, int16_t *to, float *scale, int32_t *sum) {
    int16_t q[MOST_GROUP_COLUMNS] = {0};
    int32_t all = 0, bits = 0; /* of the largest; such a maximum is one of vectors, unlike that of floats */
    const float largest = in->narrow ? 127 : MOST;
    for (i64 k = 0; k < n; k++) {
        int32_t size;
        memcpy(&size, x + k, 4), size &= INT32_MAX;
        bits = size > bits ? size : bits;
    }
    float most;
    memcpy(&most, &bits, 4);
    float spoilt = most * 0; /* what is not finite spoils its row */
    if (most > 1e-30f && spoilt == 0) {
        float inverse = largest / most;
        for (i64 k = 0; k < n; k++) {
            int32_t rounded = (int32_t)rintf(x[k] * inverse);
            q[k] = (int16_t)rounded, all += rounded;
        }
    }
    i64 group = in->group, apart = in->tiled ? tiles_of_group(group) * LINE : group;
    if (apart > group) memset(to, 0, in->digits * apart);
#define PUT(kind)                                                                                                          \
    if (in->digits == 2) put_ordered(kind, 2, q, group, apart, to);                                                        \
    else if (in->digits == 1) put_ordered(kind, 1, q, group, apart, to);                                                   \
    else put_ordered(kind, 0, q, group, apart, to)
    if (in->kind == INT4) {
        PUT(INT4);
    } else {
        PUT(INT8);
    }
#undef PUT
    *scale = most / largest + spoilt, *sum = all;
}

/* a row of x [K] as row `r`; what is padded is 0 */
static void ready_row(Input *in, i64 r, const float *x, i64 K) {
    i64 wide = in->K, groups = in->group ? wide / in->group : 0, tiled = in->tiled;
    i64 units = tiled ? units_in_tiles(in) : units_of(in);
    int32_t row[units], *to = in->x + r / in->width * in->width * units + r % in->width * (tiled ? TILE : 1);
    if (!groups && in->kind == BFLOAT16 && HAVE_PAIRS) {
        i64 whole = K / 16 * 16;
        pair_row(x, whole, (float *)row);
        for (i64 k = whole; k < 2 * units; k++) ((uint16_t *)row)[k] = k < K ? to_bf16(x[k]) : 0;
    } else if (!groups) memcpy(row, x, K * 4), memset(row + K, 0, (wide - K) * 4);
    for (i64 g = 0, at; at = g * in->group, g < groups; g++)
        ready_group(in, x + at, smaller(in->group, K - at), (int16_t *)(row + units / groups * g),
                    in->scale + r * groups + g, in->sum + r * groups + g);
    if (tiled)
        for (i64 u = 0; u < units; u += TILE) memcpy(to + u * in->width, row + u, LINE);
    else if (in->width == 1) memcpy(to, row, units * 4);
    else
        for (i64 u = 0; u < units; u++) to[u * AT_ONCE] = row[u];
}

/* ---- a line, times the columns that it is of ---- */

INLINE vf times_floats(int pairs, vf w, const int32_t *x, vf sum) {
#ifdef __AVX512BF16__
    if (pairs) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)splat_unit((const float *)x), (__m512bh)w);
#endif
    (void)pairs;
    vf y = splat_unit((const float *)x); /* said, since a compiler that chooses may choose otherwise for more rows */
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)w, (__m512)y, (__m512)sum);
#elif defined(__FMA__) && defined(__AVX__)
    return (vf)_mm256_fmadd_ps((__m256)w, (__m256)y, (__m256)sum);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)sum, (float32x4_t)w, (float32x4_t)y);
#else
    return w * y + sum;
#endif
}

/* the weights of a unit that the j-th unit of x is multiplied by: bytes for digits, else halves of 16 bits */
INLINE vi weights_at(int four, int digits, vi units, int j) {
    if (digits) return four ? units >> j * 4 & 0x0f0f0f0f : SIGNED ? units ^ (int32_t)0x80808080 : units;
    return units >> j * (four ? 4 : 8) & (four ? 0x000f000f : 0x00ff00ff); /* signs come down, but not into the mask */
}

/* sum + the products of the halves, or bytes for digits, of w and x, in every lane; w at most 255 */
INLINE vi times_integers(int digits, vi w, const int32_t *x, vi sum) {
    (void)digits;
#if defined(__ARM_FEATURE_DOTPROD)
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)splat_unit((const float *)x));
#elif defined(__AVX512VNNI__)
    __m512i y = (__m512i)splat_unit((const float *)x);
    if (digits) return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, y);
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, y);
#elif defined(__AVX512BW__)
    return sum + (vi)_mm512_madd_epi16((__m512i)w, (__m512i)splat_unit((const float *)x));
#elif defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)w, (__m256i)splat_unit((const float *)x));
#elif defined(__SSE2__) && !defined(__AVX__)
    return sum + (vi)_mm_madd_epi16((__m128i)w, (__m128i)splat_unit((const float *)x));
#elif defined(__wasm_simd128__)
    return sum + (vi)wasm_i32x4_dot_i16x8((v128_t)w, (v128_t)splat_unit((const float *)x));
#else
    return sum + (w & 65535) * (int32_t)(int16_t)*x + (w >> 16) * (*x >> 16);
#endif
}

#if defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_DOTPROD)
#define BLOCKS
/* ---- blocks: two rows of weights, eight columns of each, times two rows of x, an instruction ---- */

/* sum [rows][PARTS] = the sums of a group; where its x ends comes back. rows are even. */
INLINE const int32_t *add_blocks(int rows, int four, int digits, i64 ahead, i64 group, const uint8_t *at,
                                 const int32_t *x, i64 width, vi (*sum)[PARTS]) {
    int32x4_t block[AT_ONCE / 2][PARTS][2]; /* of each pair of rows and vector of weights: rows 0 and 1, 2 and 3 */
    memset(block, 0, sizeof block);
    for (int digit = 0; digit < digits; digit++) {
        const uint8_t *line = at;
        for (int i = 0; digit && i < AT_ONCE / 2 * PARTS * 2; i++) ((vi *)block)[i] <<= 8;
        for (i64 k = 0; k < group; k += 8, line += four ? LINE : 2 * LINE, x += 2 * width) {
            int32x4_t two[AT_ONCE / 2]; /* rows of x: eight digits of one, then of the other */
            UNROLLED for (int r = 0; r < rows; r += 2) {
                int32x2_t first = vld1_s32(x + r), then = vld1_s32(x + width + r);
                two[r / 2] = vcombine_s32(vzip1_s32(first, then), vzip2_s32(first, then));
            }
            UNROLLED for (int p = 0; p < PARTS; p++) {
                const uint8_t *from = line + p * 4 * LANES;
                if (ahead && !p && !digit) __builtin_prefetch(from + ahead);
                vi units = (vi)load((const float *)from), more = four ? units : (vi)load((const float *)(from + LINE));
                int32x4_t first = (int32x4_t)weights_at(four, 1, units, 0);
                int32x4_t then = (int32x4_t)weights_at(four, 1, more, four ? 1 : 0);
                int8x16_t low = (int8x16_t)vzip1q_s32(first, then), high = (int8x16_t)vzip2q_s32(first, then);
                UNROLLED for (int r = 0; r < rows / 2; r++) {
                    block[r][p][0] = vmmlaq_s32(block[r][p][0], low, (int8x16_t)two[r]);
                    block[r][p][1] = vmmlaq_s32(block[r][p][1], high, (int8x16_t)two[r]);
                }
            }
        }
    }
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int p = 0; p < PARTS; p++) {
            int32x4_t low = block[r / 2][p][0], high = block[r / 2][p][1];
            sum[r][p] = (vi)(r % 2 ? vuzp2q_s32(low, high) : vuzp1q_s32(low, high));
        }
    return x;
}
#endif

/* ---- panels: y [rows][16 a panel], of panels `bytes` apart ---- */

INLINE void panels_of_floats(int panels, int rows, int kind, i64 ahead, i64 lines, const uint8_t *at, i64 bytes,
                             const int32_t *x, i64 width, float *y, i64 ld) {
    vf sum[WIDE][AT_ONCE][PARTS] = {{{{0}}}};
    const int pairs = kind == BFLOAT16 && HAVE_PAIRS, columns = kind == BFLOAT16 && !HAVE_PAIRS ? 2 : 1;
    for (i64 line = 0; line < lines; line++, at += LINE)
        UNROLLED for (int c = 0; c < columns; c++, x += width)
            UNROLLED for (int p = 0; p < PARTS; p++)
                UNROLLED for (int n = 0; n < panels; n++) {
                    const uint8_t *from = at + n * bytes;
                    if (ahead && !c && !p) __builtin_prefetch(from + ahead);
                    vf w = load((const float *)(from + p * 4 * LANES));
                    if (columns == 2) w = (vf)(c ? (vi)w & -65536 : (vi)w << 16);
                    UNROLLED for (int r = 0; r < rows; r++) sum[n][r][p] = times_floats(pairs, w, x + r, sum[n][r][p]);
                }
    UNROLLED for (int n = 0; n < panels; n++)
        UNROLLED for (int r = 0; r < rows; r++)
            UNROLLED for (int p = 0; p < PARTS; p++) store(y + r * ld + n * ROWS + p * LANES, sum[n][r][p]);
}

INLINE void panels_of_integers(int panels, int rows, int kind, int least, int digits, i64 ahead, i64 groups, i64 group,
                               const uint8_t *at, i64 bytes, const uint16_t *scales, const uint16_t *minimums,
                               const int32_t *x, i64 width, const float *scale, const int32_t *sums, float *y, i64 ld) {
    vf total[WIDE][AT_ONCE][PARTS] = {{{{0}}}};
    const int four = kind == INT4, unit = four ? 8 : 4, units = unit / (digits ? 4 : 2);
    const int zero = least ? 0 : four ? 8 : SIGNED ? 0 : 128;
    for (i64 g = 0; g < groups; g++) {
        vi sum[WIDE][AT_ONCE][PARTS] = {{{{0}}}};
        int digit = 0;
#ifdef BLOCKS
        if (rows > 1) x = add_blocks(rows, four, digits, ahead, group, at, x, width, sum[0]), digit = digits;
#endif
        for (; digit < (digits ? digits : 1); digit++) {
            const uint8_t *line = at;
            for (int i = 0; digit && i < WIDE * AT_ONCE * PARTS; i++) ((vi *)sum)[i] <<= 8;
            for (i64 k = 0; k < group; k += unit, line += LINE, x += units * width)
                UNROLLED for (int p = 0; p < PARTS; p++)
                    UNROLLED for (int n = 0; n < panels; n++) {
                        const uint8_t *from = line + n * bytes;
                        if (ahead && !p && !digit) __builtin_prefetch(from + ahead);
                        vi w = (vi)load((const float *)(from + p * 4 * LANES));
                        UNROLLED for (int j = 0; j < units; j++)
                            UNROLLED for (int r = 0; r < rows; r++)
                                sum[n][r][p] =
                                    times_integers(digits, weights_at(four, digits, w, j), x + j * width + r, sum[n][r][p]);
                    }
        }
        at += group / unit * LINE;
        UNROLLED for (int n = 0; n < panels; n++)
            UNROLLED for (int p = 0; p < PARTS; p++) {
                i64 of_group = (n * groups + g) * ROWS + p * LANES;
                vf of_rows = scales_at(scales + of_group), lowest = least ? scales_at(minimums + of_group) : of_rows;
                UNROLLED for (int r = 0; r < rows; r++) {
                    vi exact = sum[n][r][p] - zero * sums[r * groups + g];
                    total[n][r][p] += __builtin_convertvector(exact, vf) * (of_rows * splat(scale[r * groups + g]));
                    if (least) total[n][r][p] += lowest * splat(sums[r * groups + g] * scale[r * groups + g]);
                }
            }
    }
    UNROLLED for (int n = 0; n < panels; n++)
        UNROLLED for (int r = 0; r < rows; r++)
            UNROLLED for (int p = 0; p < PARTS; p++) store(y + r * ld + n * ROWS + p * LANES, total[n][r][p]);
}

/* ---- a part of a product ---- */

INLINE void some(int panels, int rows, const Matrix *m, const Input *in, i64 r, i64 panel, float *y, i64 ld) {
    i64 lines = lines_of_panel(m), groups = groups_of(m), bytes = lines * LINE;
    const uint8_t *at = m->lines + panel * bytes;
    const uint16_t *scales = m->scales + panel * groups * ROWS;
    const uint16_t *minimums = m->least ? m->minimums + panel * groups * ROWS : NULL;
    const int32_t *x = in->x + r / in->width * in->width * units_of(in) + r % in->width;
    i64 width = rows > 1 ? AT_ONCE : in->width;
    const float *scale = in->scale + r * groups;
    const int32_t *sum = in->sum + r * groups;
    /* the first rows bring the panels from memory, the others find them in the cache; what a row of several panels reads
       the hardware fetches best by itself */
    i64 ahead = r || (rows == 1 && panels > 1) ? 0 : panels == 1 ? AHEAD_BYTES : panels * bytes;
    y += r * ld + panel * ROWS;
    if (m->kind == FLOAT32) panels_of_floats(panels, rows, FLOAT32, ahead, lines, at, bytes, x, width, y, ld);
    else if (m->kind == BFLOAT16) panels_of_floats(panels, rows, BFLOAT16, ahead, lines, at, bytes, x, width, y, ld);
#define INTEGERS(kind, least, digits)                                                                                      \
    panels_of_integers(panels, rows, kind, least, digits, ahead, groups, m->group, at, bytes, scales, minimums, x, width,  \
                       scale, sum, y, ld)
#define EITHER(kind, least)                                                                                                \
    if ((int)NARROW_DIGITS != (int)WIDE_DIGITS && in->narrow) INTEGERS(kind, least, NARROW_DIGITS);                        \
    else INTEGERS(kind, least, WIDE_DIGITS)
    else if (m->kind == INT8) {
        EITHER(INT8, 0);
    } else if (m->least) {
        EITHER(INT4, 1);
    } else {
        EITHER(INT4, 0);
    }
#undef EITHER
#undef INTEGERS
}

INLINE void strips(int panels, const Matrix *m, const Input *in, i64 rows, i64 panel, float *y, i64 ld) {
    i64 r = 0;
    for (; r + AT_ONCE <= rows; r += AT_ONCE) some(panels, AT_ONCE, m, in, r, panel, y, ld);
    if (AT_ONCE > 4 && r + 4 <= rows) some(panels, 4, m, in, r, panel, y, ld), r += 4;
    if (r + 2 <= rows) some(panels, 2, m, in, r, panel, y, ld), r += 2;
    if (r < rows) some(panels, 1, m, in, r, panel, y, ld);
}

#ifdef __AVX512BF16__
/* a panel of integers as one of bfloat16 */
INLINE void expand_lines(int kind, const Matrix *m, i64 panel, uint8_t *to) {
    const int bits = kind == INT8 ? 8 : 4, zero = kind == INT8 ? 128 : 8, unit = kind == INT8 ? 4 : 8;
    const uint16_t *minimums = m->least ? m->minimums + panel * groups_of(m) * ROWS : NULL;
    i64 lines = lines_of_panel(m), groups = groups_of(m), of_group = m->group / unit;
    const uint8_t *at = m->lines + panel * lines * LINE;
    const uint16_t *scales = m->scales + panel * groups * ROWS;
    const __m512i in_turn = (__m512i)(__v32hi){0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    for (i64 g = 0; g < groups; g++) {
        vf scale = scales_at(scales + g * ROWS), less = minimums ? scales_at(minimums + g * ROWS) : scale * splat(-zero);
        for (i64 line = 0; line < of_group; line++, at += LINE) {
            vi units = (vi)load((const float *)at);
            for (int j = 0; j < unit; j += 2, to += LINE) { /* products of 8 and 11 bits are exact */
                vf low = __builtin_convertvector(units >> j * bits & (1 << bits) - 1, vf) * scale + less;
                vf high = __builtin_convertvector(units >> (j + 1) * bits & (1 << bits) - 1, vf) * scale + less;
                __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
                _mm512_storeu_si512(to, _mm512_permutexvar_epi16(in_turn, both));
            }
        }
    }
}

static void expand(const Matrix *m, i64 panel, uint8_t *to) {
    if (m->kind == INT8) expand_lines(INT8, m, panel, to);
    else expand_lines(INT4, m, panel, to);
}
#endif

#ifdef TILES
/* a panel of int4 with a byte for each: the even columns of a unit, then the odd ones */
static void unpack_bytes(const Matrix *m, i64 panel, uint8_t *to) {
    i64 lines = lines_of_panel(m);
    const uint8_t *at = m->lines + panel * lines * LINE;
    for (i64 line = 0; line < lines; line++, at += LINE, to += 2 * LINE) {
        vi units = (vi)load((const float *)at);
        store((float *)to, (vf)(units & 0x0f0f0f0f)), store((float *)(to + LINE), (vf)(units >> 4 & 0x0f0f0f0f));
    }
}

static void product_in_tiles(const Matrix *m, const Input *in, i64 rows, i64 first, i64 last, float *y, i64 ld,
                             uint8_t *space) {
    i64 pairs = in->kind == BFLOAT16, lines = padded_columns(m) / (pairs ? 2 : 4), bytes = lines * LINE;
    i64 groups = groups_of(m), as_they_lie = m->kind == BFLOAT16 || (m->kind == INT8 && !pairs);
    /* few rows take one panel after the other, as it comes from memory; many ask for the next two with the first rows */
    i64 together = rows > TILE ? 2 : 1, ahead = !as_they_lie ? 0 : together == 1 ? AHEAD_BYTES : 2 * bytes;
    Tiled x = {(const uint8_t *)in->x, rows, in->width, in->width * units_in_tiles(in) * 4};
    TileConfig before;
    open_tiles(&before, (int)in->width);
    for (i64 n; first < last; first += n) {
        n = smaller(together, last - first);
        const uint8_t *at = as_they_lie ? m->lines + first * bytes : space;
        for (i64 p = 0; p < n && !as_they_lie; p++) (pairs ? expand : unpack_bytes)(m, first + p, space + p * bytes);
        Stands s = {groups, m->kind == INT8 ? 128 : m->least ? 0 : 8, m->scales + first * groups * ROWS,
                    m->least ? m->minimums + first * groups * ROWS : NULL, in->scale, in->sum};
        float *to = y + first * ROWS;
        if (pairs && n == 2) pairs_in_tiles(2, lines, at, bytes, ahead, x, to, ld);
        else if (pairs) pairs_in_tiles(1, lines, at, bytes, ahead, x, to, ld);
        else if (n == 2 && in->narrow) digits_in_tiles(2, 1, m->group / 4, at, bytes, ahead, s, x, to, ld);
        else if (n == 2) digits_in_tiles(2, 2, m->group / 4, at, bytes, ahead, s, x, to, ld);
        else if (in->narrow) digits_in_tiles(1, 1, m->group / 4, at, bytes, ahead, s, x, to, ld);
        else digits_in_tiles(1, 2, m->group / 4, at, bytes, ahead, s, x, to, ld);
    }
    close_tiles(&before);
}
#endif

/* y [rows][ld], columns of the panels from `first` to before `last`; ld covers whole panels; `space`: expanded_bytes */
static void product(const Matrix *m, const Input *in, i64 rows, i64 first, i64 last, float *y, i64 ld, uint8_t *space) {
#ifdef TILES
    if (in->tiled) {
        product_in_tiles(m, in, rows, first, last, y, ld, space);
        return;
    }
#endif
#ifdef __AVX512BF16__
    for (i64 n; m->kind != in->kind && first < last; first += n) {
        Matrix made = {.K = padded_columns(m), .kind = BFLOAT16, .lines = space};
        n = smaller(PANELS, last - first);
        for (i64 p = 0; p < n; p++) expand(m, first + p, space + p * lines_of_panel(&made) * LINE);
        if (n == PANELS) strips(PANELS, &made, in, rows, 0, y + first * ROWS, ld);
        else strips(1, &made, in, rows, 0, y + first * ROWS, ld);
    }
#endif
    (void)space;
    /* a row of floats waits for additions, and its next lines with it; integers take longer to unpack than to add */
    int wide = WIDE > PANELS && rows == 1 && m->kind < INT8;
    for (; wide && first + WIDE <= last; first += WIDE) some(WIDE, 1, m, in, 0, first, y, ld);
    /* what integers of 16 bits take leaves no register for a second panel */
    i64 few = m->kind < INT8 || in->digits == 1 ? AT_ONCE : 2 * AT_ONCE;
    for (; PANELS == 2 && rows > few && first + 2 <= last; first += 2) strips(2, m, in, rows, first, y, ld);
    for (; first < last; first++) strips(1, m, in, rows, first, y, ld);
}

/* two panels of bfloat16, or of bytes: of K columns whole groups, of any size, and whole tiles */
INLINE i64 expanded_bytes(i64 K) { return 2 * round_up(K + MOST_GROUP_COLUMNS - 1, 32) / 2 * LINE; }
