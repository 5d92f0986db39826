/* y = x W^T for the few rows x of a step: each line of a matrix comes from memory once for all of them.

Sums are made in the same order however many rows there are, so that a sequence in a batch gets the bits that it gets
alone. With bfloat16 weights x is rounded to bfloat16 where the CPU multiplies such pairs, as in torch. With integers x
becomes integers of 16 bits, with a scale for each group of columns; their sums are exact, and so the same everywhere.
*/

#pragma once
#include "weights.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { PARTS = ROWS / LANES, SUMS = 2, AT_ONCE = (int)LANES == 16 ? 8 : 2 }; /* vectors of a line; rows of x in registers */
enum { AHEAD_BYTES = 2048 }; /* with one row the hardware's prefetcher keeps up by itself */

typedef struct {      /* rows of x, made ready for matrices of one kind and group */
    i64 kind, group, K; /* K padded as the matrix's */
    float *x;         /* [rows][K], or pairs of bfloat16 [rows][K / 2] */
    int16_t *q;       /* [rows][K], in the order of `paired` */
    float *scale;     /* [rows][K / group] */
    int32_t *sum;     /* [rows][K / group], of the integers */
} Input;

/* ---- x ---- */

/* Where column k of a unit's columns lies in q: products take pairs whose integers are 16 bits apart in the unit. */
INLINE i64 paired(i64 kind, i64 k) {
    i64 half = columns_of_unit(kind) / 2, unit = k & -2 * half;
    return unit + (k - unit) % half * 2 + (k - unit) / half;
}

/* a row of x [K] as row `r`; what is padded is 0 */
static void ready_row(Input *in, i64 r, const float *x, i64 K) {
    i64 wide = in->K, groups = in->group ? wide / in->group : 0;
#ifdef __AVX512BF16__
    if (in->kind == BFLOAT16) {
        uint16_t *to = (uint16_t *)(in->x + r * wide / 2);
        for (i64 k = 0; k < wide; k++) to[k] = k < K ? to_bf16(x[k]) : 0;
        return;
    }
#endif
    if (!groups) memcpy(in->x + r * wide, x, K * 4), memset(in->x + r * wide + K, 0, (wide - K) * 4);
    for (i64 g = 0; g < groups; g++) {
        const float *part = x + g * in->group;
        i64 n = smaller(in->group, K - g * in->group);
        float most = 0, spoilt = 0;
        for (i64 k = 0; k < n; k++) most = fabsf(part[k]) > most ? fabsf(part[k]) : most, spoilt += part[k] * 0;
        float inverse = most > 1e-30f && spoilt == 0 ? 32767 / most : 0; /* what is not finite spoils its row */
        int32_t sum = 0;
        for (i64 k = 0; k < in->group; k++) {
            int32_t q = k < n && inverse ? (int32_t)lrintf(part[k] * inverse) : 0;
            in->q[r * wide + g * in->group + paired(in->kind, k)] = (int16_t)q, sum += q;
        }
        in->scale[r * groups + g] = most / 32767 + spoilt, in->sum[r * groups + g] = sum;
    }
}

/* ---- a line, times the columns that it is of ---- */

INLINE vf times_floats(int pairs, const uint8_t *line, const float *x, vf sum) {
    if (!pairs) return load((const float *)line) * splat(*x) + sum;
#ifdef __AVX512BF16__
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)splat_unit(x), (__m512bh)load((const float *)line));
#else
    vi units = (vi)load((const float *)line);
    return (vf)(units << 16) * splat(x[0]) + ((vf)(units & -65536) * splat(x[1]) + sum);
#endif
}

/* sum + low half of w * low half of x + high half of w * high half of x, in every lane; w at most 255 */
INLINE vi times_halves(vi w, const int16_t *x, vi sum) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, (__m512i)splat_unit((const float *)x));
#elif defined(__AVX512BW__)
    return sum + (vi)_mm512_madd_epi16((__m512i)w, (__m512i)splat_unit((const float *)x));
#elif defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)w, (__m256i)splat_unit((const float *)x));
#elif defined(__SSE2__) && !defined(__AVX__)
    return sum + (vi)_mm_madd_epi16((__m128i)w, (__m128i)splat_unit((const float *)x));
#else
    return sum + (w & 65535) * x[0] + (w >> 16) * x[1];
#endif
}

/* scales of 16 rows as floats */
INLINE vf scales_at(const uint16_t *scales) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scales));
#elif defined(__F16C__) && defined(__AVX__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scales));
#else
    float x[LANES];
    read_row(2, scales, LANES, x, LANES);
    return load(x);
#endif
}

/* ---- a panel ---- */

INLINE void panel_of_floats(int rows, int pairs, i64 lines, const uint8_t *at, const float *x, i64 stride, float *y, i64 ld) {
    vf sum[8][SUMS][PARTS] = {{{{0}}}};
#ifdef __AVX512BF16__
    const int step = 1;
#else
    const int step = pairs ? 2 : 1;
#endif
    for (i64 line = 0; line < lines; line += SUMS)
        for (int s = 0; s < SUMS; s++, at += LINE) {
            if (rows > 1) __builtin_prefetch(at + AHEAD_BYTES);
            for (int p = 0; p < PARTS; p++)
                for (int r = 0; r < rows; r++)
                    sum[r][s][p] = times_floats(pairs, at + p * 4 * LANES, x + r * stride + (line + s) * step, sum[r][s][p]);
        }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < PARTS; p++) store(y + r * ld + p * LANES, sum[r][0][p] + sum[r][1][p]);
}

INLINE void panel_of_integers(int rows, int four, i64 groups, i64 group, const uint8_t *at, const uint16_t *scales,
                              const int16_t *q, i64 stride, const float *scale, const int32_t *sums, float *y, i64 ld) {
    vf total[8][PARTS] = {{{0}}};
    const int unit = four ? 8 : 4, shift = four ? 4 : 8, mask = four ? 0x000f000f : 0x00ff00ff;
    for (i64 g = 0; g < groups; g++, scales += ROWS) {
        vi sum[8][PARTS] = {{{0}}};
        for (i64 k = g * group; k < (g + 1) * group; k += unit, at += LINE) {
            if (rows > 1) __builtin_prefetch(at + AHEAD_BYTES);
            for (int p = 0; p < PARTS; p++) {
                vi units = (vi)load((const float *)(at + p * 4 * LANES));
                for (int j = 0; j < unit; j += 2) {
                    vi w = units >> j / 2 * shift & mask; /* signs come down, but not into the mask */
                    for (int r = 0; r < rows; r++) sum[r][p] = times_halves(w, q + r * stride + k + j, sum[r][p]);
                }
            }
        }
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < PARTS; p++) {
                vi exact = sum[r][p] - (four ? 8 : 128) * sums[r * groups + g];
                total[r][p] += __builtin_convertvector(exact, vf) * (scales_at(scales + p * LANES) * splat(scale[r * groups + g]));
            }
    }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < PARTS; p++) store(y + r * ld + p * LANES, total[r][p]);
}

/* ---- a part of a product ---- */

INLINE void rows_of_panel(int rows, const Matrix *m, const Input *in, i64 r, i64 panel, float *y, i64 ld) {
    i64 lines = lines_of_panel(m), groups = groups_of(m), wide = in->K;
    const uint8_t *at = m->lines + panel * lines * LINE;
#ifdef __AVX512BF16__
    i64 stride = m->kind == BFLOAT16 ? wide / 2 : wide;
#else
    i64 stride = wide;
#endif
    if (m->kind == FLOAT32) panel_of_floats(rows, 0, lines, at, in->x + r * stride, stride, y, ld);
    else if (m->kind == BFLOAT16) panel_of_floats(rows, 1, lines, at, in->x + r * stride, stride, y, ld);
    else {
        const uint16_t *scales = m->scales + panel * groups * ROWS;
        const int16_t *q = in->q + r * wide;
        const float *scale = in->scale + r * groups;
        const int32_t *sum = in->sum + r * groups;
        if (m->kind == INT8) panel_of_integers(rows, 0, groups, m->group, at, scales, q, wide, scale, sum, y, ld);
        else panel_of_integers(rows, 1, groups, m->group, at, scales, q, wide, scale, sum, y, ld);
    }
}

/* y [rows][ld], columns of the panels from `first` to before `last`; ld covers whole panels */
static void product(const Matrix *m, const Input *in, i64 rows, i64 first, i64 last, float *y, i64 ld) {
    for (i64 panel = first; panel < last; panel++)
        for (i64 r = 0, n; r < rows; r += n) {
            float *to = y + r * ld + panel * ROWS;
            n = smaller(AT_ONCE, rows - r);
            if (n >= 8) n = 8, rows_of_panel(8, m, in, r, panel, to, ld);
            else if (n >= 4) n = 4, rows_of_panel(4, m, in, r, panel, to, ld);
            else if (n >= 2) n = 2, rows_of_panel(2, m, in, r, panel, to, ld);
            else rows_of_panel(1, m, in, r, panel, to, ld);
        }
}
