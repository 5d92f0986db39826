/* Matrices of weights as the products read them: each byte once, in order, and no sum across a vector.

A matrix [N][K] lies in panels of 16 rows. A panel is a run of lines of 64 bytes, each a unit of 4 bytes of every row:

    float32   1 column
    bfloat16  2 columns, which is also what an AMX tile is loaded from
    int8      4 columns, as w + 128
    int4      8 columns, as w + 8, the first in the low half of the first byte

Integers have a scale for each row and group of columns, float16, [N / 16][K / group][16]. A matrix of int4 may have as
many minimums: its weights are (w + 8) scale + minimum, not w scale. N is padded to whole panels, K to 16 columns or to
whole groups; the weights there are 0, or meet an x of 0.
*/

#pragma once
#include "numbers.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

enum { ROWS = 16, LINE = 64, MOST_GROUP_COLUMNS = 256 };
enum { FLOAT32, BFLOAT16, INT8, INT4 };

typedef struct {
    i64 N, K, kind, group; /* group: columns with one scale, a multiple of 16; 0 for floats */
    i64 least, narrow;     /* whether there are minimums; whether x becomes integers of 8 bits beside these, not of 16 */
    const uint8_t *lines;
    const uint16_t *scales, *minimums; /* NULL: none */
} Matrix;

INLINE i64 columns_of_unit(i64 kind) { return (i64)1 << kind; }
INLINE i64 padded_columns(const Matrix *m) { return round_up(m->K, m->group ? m->group : 16); }
INLINE i64 lines_of_panel(const Matrix *m) { return padded_columns(m) / columns_of_unit(m->kind); }
INLINE i64 panels_of(const Matrix *m) { return (m->N + ROWS - 1) / ROWS; }
INLINE i64 groups_of(const Matrix *m) { return m->group ? padded_columns(m) / m->group : 0; }

/* bytes that it takes: scales and minimums, where there are any, after the lines */
i64 packed_bytes(const Matrix *m) {
    return panels_of(m) * (lines_of_panel(m) * LINE + groups_of(m) * ROWS * (m->least ? 4 : 2));
}

/* it lies at `to`, which is aligned to a line */
void place(Matrix *m, uint8_t *to) {
    m->lines = to, m->scales = (uint16_t *)(to + panels_of(m) * lines_of_panel(m) * LINE);
    m->minimums = m->least ? m->scales + panels_of(m) * groups_of(m) * ROWS : NULL;
}

/* -8 times a scale of float16: the minimum of a group that has none */
INLINE uint16_t least_of(uint16_t scale) {
    uint16_t size = scale & 0x7fff;
    for (int i = 0; i < 3; i++) size = size < 0x400 ? 2 * size : size + 0x400; /* numbers without an exponent, others */
    return size | (~scale & 0x8000);
}

/* N rows into every `step`-th panel of m from `first` on, filled up with zeros. They lie at `rows` as in a file (int4:
   two's complement, two columns a byte, the first in the low half), with scales [N][groups] and minimums alike, or NULL
   where the rows have none. */
void pack(const Matrix *m, i64 N, i64 first, i64 step, const uint8_t *rows, const uint16_t *scales,
          const uint16_t *minimums) {
    i64 lines = lines_of_panel(m), groups = groups_of(m);
    i64 stride = (m->K * 4 + columns_of_unit(m->kind) - 1) / columns_of_unit(m->kind); /* bytes of a row */
    uint8_t zero = m->kind == INT8 ? 0x80 : m->kind == INT4 ? 0x88 : 0;                /* also what turns the signs */
    for (i64 n = 0; n < round_up(N, ROWS); n++) {
        i64 have = n < N ? stride : 0, panel = first + n / ROWS * step;
        const uint8_t *row = rows + n * stride;
        uint8_t *at = (uint8_t *)m->lines + panel * lines * LINE + n % ROWS * 4;
        for (i64 b = 0; b < lines * 4; b++) at[b / 4 * LINE + b % 4] = (b < have ? row[b] : 0) ^ zero;
        if (m->kind == INT4 && have && m->K % 2) { /* the half of a byte that is no column */
            i64 b = stride - 1;
            at[b / 4 * LINE + b % 4] = (at[b / 4 * LINE + b % 4] & 15) | 0x80;
        }
        for (i64 g = 0; g < groups; g++) {
            i64 to = (panel * groups + g) * ROWS + n % ROWS, from = n * groups + g;
            ((uint16_t *)m->scales)[to] = n < N ? scales[from] : 0;
            if (m->least)
                ((uint16_t *)m->minimums)[to] = n >= N ? 0 : minimums ? minimums[from] : least_of(scales[from]);
        }
    }
}

/* scales of as many rows as a vector has lanes, as floats */
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
