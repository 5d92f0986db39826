/* Chunkwise retention and the decode step for CPUs; the formulas are those of blocked.py and step.py.

Built by cpu.py with the machine's own compiler at first use. One task is one head of one sequence: it goes through its
chunks in order, with its state in the cache, and tasks share nothing, so results do not depend on the threads.

    forward     P  = scale * (q k^T) * D                        D_ij = exp(G_i - G_j), i >= j;  G = running log decay
                o  = scale * exp(G) * (q S) + P v               S  = state before the chunk
                S' = exp(G_C) S + (exp(G_C - G) k)^T v
    backward    dP = scale * (do v^T) * D
                dq = scale * exp(G) * (do S^T) + dP k
                dk = exp(G_C - G) * (v dS'^T) + dP^T q          dS' = gradient of the state after the chunk
                dv = P^T do + (exp(G_C - G) k) dS'
                dS = exp(G_C) dS' + (scale * exp(G) q)^T do

The backward pass goes from the last chunk to the first. It needs S before each of them: forward leaves one state for
every GROUP chunks, and the others of a group are computed again when it is entered.

Matrices are float32 in rows, padded with zeros to whole vectors. Operands of products are made of 32-bit units along
the dimension that is summed: one float, or a pair of bfloat16 (`pair`, where the inputs are bfloat16 and the CPU
multiplies pairs: 1 in vectors, 2 in the tiles of AMX). An operand is laid out as
    rows      [m][r]                 unit r of row m: the left operand
    panels    [n / NC][r][n % NC]    the right operand, or the left one transposed
which is what the tiles are loaded from, too, so that with them nothing but the products changes.
Sums are float32, and so are S, dS, decays and all that is not an operand.
*/

#include "numbers.h"
#include <pthread.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TILES
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
    BLOCK = 32,                          /* rows and columns of four tiles: with them all is padded to it */
    WHOLE = (int)LANES > (int)MR ? (int)LANES : (int)MR,     /* K and V are padded to a multiple of it */
    DEPTH = 256,                         /* units summed at once: a panel of so many stays in the first cache */
    MOST_GROUP = 16
};

/* ---- what Python hands over (struct Call of cpu.py) ---- */

typedef struct {
    i64 N, H, K, V, C, group, dtype, pair, per_token, threads; /* dtype 0 float32, 1 bfloat16, 2 float16 */
    i64 q_stride, k_stride, v_stride, do_stride;               /* elements from token to token */
    double scale;
    const i64 *begin;            /* [N+1] first token of each sequence, of all tokens in a row */
    const i64 *first_checkpoint; /* [N] */
    const void *q, *k, *v, *dout;
    const float *log_decay, *state, *dstate; /* [H] or [tokens,H]; [N,H,K,V] */
    float *checkpoints;                      /* [checkpoints,H,K,V], or NULL */
    void *o, *dq, *dk, *dv;                  /* contiguous */
    float *final, *dlog_decay, *dinitial;
} Call;

/* ---- operands ---- */

/* one row's neighbours in pairs: [cols] -> units [cols / 2]; cols a multiple of LANES */
INLINE void pair_row(const float *x, i64 cols, float *to) {
#ifdef __AVX512BF16__
    for (i64 j = 0; j < cols; j += 16)
        _mm256_storeu_si256((__m256i *)(to + j / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + j)));
#else
    for (i64 j = 0; j < cols; j++) ((uint16_t *)to)[j] = to_bf16(x[j]);
#endif
}

/* two rows element by element in pairs: 2 x [n] -> units [n] */
INLINE void pair_rows(const float *a, const float *b, i64 n, float *to) {
    i64 j = 0;
#ifdef __AVX512BF16__
    for (; j + 16 <= n; j += 16) {
        __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(a + j)));
        __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(b + j)));
        _mm512_storeu_si512(to + j, low | _mm512_slli_epi32(high, 16));
    }
#endif
    for (; j < n; j++) ((uint32_t *)to)[j] = to_bf16(a[j]) | (uint32_t)to_bf16(b[j]) << 16;
}

/* `rows` operand of x [rows][cols]: x itself, or its pairs in `to` */
static const float *as_rows(int pair, const float *x, i64 rows, i64 cols, float *to) {
    if (!pair) return x;
    for (i64 i = 0; i < rows; i++) pair_row(x + i * cols, cols, to + i * cols / 2);
    return to;
}

/* `panels` operand of x [rows][cols], width `ld`, the rows being summed */
static void as_panels(int pair, const float *x, i64 ld, i64 rows, i64 cols, float *to) {
    for (i64 c = 0; c < cols; c += NC)
        for (i64 r = 0, n = smaller(NC, cols - c); r < rows; r += pair ? 2 : 1, to += NC) {
            if (pair) pair_rows(x + r * ld + c, x + (r + 1) * ld + c, n, to);
            else if (n == NC) store(to, load(x + r * ld + c)), store(to + LANES, load(x + r * ld + c + LANES));
            else memcpy(to, x + r * ld + c, n * 4);
        }
}

/* LANES rows of x to the columns of `to`, by perfect shuffles: row i meets row i + LANES / 2, log2(LANES) times */
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

/* `panels` operand of the transpose of x, given in `rows` units [n][units], width `ld`; its panels are `depth` deep */
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

/* MR rows and nv vectors of `to` = from * beta + A B, with A's unit (i, r) at a[i * am + r * ar] */
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

typedef enum { FULL, LOWER, UP_TO_ROW, FROM_ROW } Shape; /* what of a product is not zero */
typedef struct { const float *p; i64 depth; } Operand;   /* depth: units of a row, or of a panel */
typedef struct { float *p; i64 ld, panel; } Result;      /* floats from row to row, from panel to panel of columns */

INLINE void products(int pair, int transposed, Shape shape, i64 M, i64 N, i64 units, Operand A, Operand B,
                     const float *from, const float *beta, Result to) {
    static const float one[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    for (i64 begin = 0; begin < units; begin += DEPTH)
        for (i64 n = 0; n < N; n += NC)
            for (i64 m = 0; m < M; m += MR) {
                if (shape == LOWER && n >= m + MR) continue;
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

/* to [M][N] = beta (row by row, 1 if NULL) * from (0 if NULL) + A B; without what `shape` says is zero:
   LOWER columns past the rows, UP_TO_ROW and FROM_ROW units past and before them */
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
/* The same of pairs by AMX, for M and N of whole blocks and units of whole tiles, 16: a block of `to` stays in four tiles
   while two of A and two of B go by. A tile is 16 rows of 64 bytes: of A 16 units of 16 rows, of B 16 columns of 16. */
static void tiles(int transposed, Shape shape, i64 M, i64 N, i64 units, Operand A, Operand B, const float *from,
                  const float *beta, Result to) {
    float block[BLOCK * 256] __attribute__((aligned(64))); /* rows of A^T; what is summed then are tokens, 512 at most */
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
            if (shape == LOWER && n >= m + BLOCK) continue;
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

/* All eight tiles in full size, for this thread; `before` is how the code around us has them. */
static void open_tiles(TileConfig *before) {
    TileConfig full = {1, 0, {0}, {0}, {0}};
    for (int i = 0; i < 8; i++) full.bytes[i] = 64, full.rows[i] = 16;
    _tile_storeconfig(before);
    _tile_loadconfig(&full);
}

static void close_tiles(const TileConfig *before) {
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

/* The system gives the registers to a process that asks for them. */
static int tiles_are_allowed(void) {
    static int allowed = -1;
    enum { ASK = 0x1023, TILE_DATA = 18 };
    if (allowed < 0) allowed = !syscall(SYS_arch_prctl, ASK, TILE_DATA);
    return allowed;
}
#endif

/* ---- decays ---- */

INLINE float bounded(float log_decay) { return log_decay < -100 ? -100 : log_decay; } /* blocked.FORGOTTEN; NaN stays */

INLINE float exp_of(float x) { /* for x <= 0, to 1 ulp; plain arithmetic, so that loops of it become vectors */
    float y = x < -87.0f ? -87.0f : x;
    float n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

typedef struct {
    float *start, *end, *total, *lag, *since; /* [C] scale * exp(G); [C] exp(G_C - G); [wide] exp(G_C), repeated */
    i64 wide, count;                          /* [2C] scale * gamma^(C-1-x), then zeros; [C] G; tokens it is for */
} Decays;

/* for `count` tokens of head h from token t on */
static void set_decays(const Call *c, Decays *d, i64 t, i64 h, i64 count) {
    if (!c->per_token && d->count == count) return; /* the same in every full chunk */
    double G = 0, since[c->C];
    for (i64 i = 0; i < c->C; i++) {
        if (i < count) G += bounded(c->log_decay[c->per_token ? (t + i) * c->H + h : h]);
        since[i] = G, d->since[i] = (float)G;
    }
    for (i64 i = 0; i < c->C; i++) {
        d->start[i] = i < count ? (float)(c->scale * exp(d->since[i])) : 0;
        d->end[i] = i < count ? (float)exp(G - since[i]) : 0;
    }
    for (i64 i = 0; i < d->wide; i++) d->total[i] = (float)exp(G);
    if (!c->per_token && d->count == 0)
        for (i64 x = 0; x < c->C; x++) {
            double lag = (c->C - 1 - x) * bounded(c->log_decay[h]);
            d->lag[x] = (float)(c->scale * exp(lag)), d->lag[c->C + x] = 0;
        }
    d->count = count;
}

/* scores [rows][C] times scale * D, zero after the diagonal: chosen, not multiplied, since a score there may be NaN */
static void decay_scores(const Call *c, const Decays *d, i64 rows, float *score) {
    for (i64 i = 0; i < rows; i++, score += c->C) {
        i64 width = round_up(i / MR * MR + MR, NC);
        const float *lag = d->lag + c->C - 1 - i, since = d->since[i], scale = (float)c->scale;
        if (c->per_token)
            for (i64 j = 0; j < width; j++) {
                float D = exp_of(j <= i ? since - d->since[j] : 0) * scale;
                score[j] = j <= i ? score[j] * D : 0;
            }
        else
            for (i64 j = 0; j < width; j++) score[j] = j <= i ? score[j] * lag[j] : 0;
    }
}

static void scale_rows(float *x, i64 rows, i64 width, const float *factor) {
    for (i64 i = 0; i < rows; i++, x += width)
        for (i64 j = 0; j < width; j++) x[j] *= factor[i];
}

/* ---- the work space of a thread ---- */

typedef struct {
    i64 K, V; /* padded */
    Decays decays;
    float *q, *k, *v, *dout, *out, *score, *dscore;                        /* rows */
    float *q_rows, *k_rows, *v_rows, *dout_rows, *score_rows, *dscore_rows; /* operands */
    float *q_panels, *k_panels, *v_panels, *dout_panels, *score_panels, *dscore_panels, *kT_panels, *vT_panels;
    float *kend_rows, *kend_panels, *qstart_panels, *S_panels, *dS_panels, *dST_panels;
    float *S, *dS, *dST, *dG;                      /* S, dS: panels of [K][V]; dST: of [V][K] */
    float *ST[MOST_GROUP], *ST_panels[MOST_GROUP]; /* before each chunk of a group, panels of [V][K] */
} Space;

static float *take(char **at, i64 floats) {
    float *p = (float *)*at;
    *at += round_up(floats * 4, 64) + 64; /* the gap keeps arrays of 2^n floats from falling on the same cache lines */
    return p;
}

/* lays out a space from `at` on, returns its end */
static char *arrange(const Call *c, int backward, Space *s, char *at) {
    i64 C = c->C, whole = c->pair == 2 ? BLOCK : WHOLE;
    i64 K = s->K = round_up(c->K, whole), V = s->V = round_up(c->V, whole), wide = K > V ? K : V;
    i64 CK = C * round_up(K, NC), CV = C * round_up(V, NC), CC = C * C, KV = round_up(K, NC) * round_up(V, NC);
    Decays *d = &s->decays;
    d->wide = wide, d->count = 0;
    d->start = take(&at, C), d->end = take(&at, C), d->since = take(&at, C);
    d->total = take(&at, wide), d->lag = take(&at, 2 * C);
    s->q = take(&at, CK), s->q_rows = take(&at, CK);
    s->k = take(&at, CK), s->k_rows = take(&at, CK), s->kT_panels = take(&at, CK), s->kend_panels = take(&at, CK);
    s->v = take(&at, CV), s->v_panels = take(&at, CV), s->out = take(&at, CK > CV ? CK : CV);
    s->score = take(&at, CC), s->score_rows = take(&at, CC);
    s->S = take(&at, KV), s->S_panels = c->pair ? take(&at, KV / 2) : s->S;
    if (!backward) return at;
    s->q_panels = take(&at, CK), s->qstart_panels = take(&at, CK);
    s->k_panels = take(&at, CK), s->kend_rows = take(&at, CK);
    s->v_rows = take(&at, CV), s->vT_panels = take(&at, CV);
    s->dout = take(&at, CV), s->dout_rows = take(&at, CV), s->dout_panels = take(&at, CV);
    s->score_panels = take(&at, CC), s->dscore = take(&at, CC);
    s->dscore_rows = take(&at, CC), s->dscore_panels = take(&at, CC), s->dG = take(&at, C);
    s->dS = take(&at, KV), s->dS_panels = c->pair ? take(&at, KV / 2) : s->dS;
    s->dST = c->pair && !c->per_token ? NULL : take(&at, KV), s->dST_panels = c->pair ? take(&at, KV / 2) : s->dST;
    for (i64 g = 0; g < c->group; g++)
        s->ST[g] = take(&at, KV), s->ST_panels[g] = c->pair ? take(&at, KV / 2) : s->ST[g];
    return at;
}

/* kept from call to call, since fresh pages cost more than the work of a short call, and freed with its thread */
static pthread_key_t space_key;
static int have_key;
__attribute__((constructor)) static void make_space_key(void) { have_key = !pthread_key_create(&space_key, free); }

static void *space_of_thread_with(i64 bytes) {
    static _Thread_local void *space;
    static _Thread_local i64 size;
    if (bytes > size) {
        free(space);
        space = aligned_alloc(64, round_up(bytes, 64));
        size = space ? bytes : 0;
        if (have_key) pthread_setspecific(space_key, space);
    }
    return space;
}

static int get_space(const Call *c, int backward, Space *s) {
    char *at = space_of_thread_with((intptr_t)arrange(c, backward, s, NULL)); /* from 0 on, it ends at its size */
    if (at) arrange(c, backward, s, at);
    return at != NULL;
}

/* ---- states ---- */

static void read_state(const Call *c, const Space *s, const float *from, float *panels) { /* [K][V] -> panels */
    memset(panels, 0, round_up(s->V, NC) * s->K * 4);
    for (i64 n = 0; n < c->V; n += NC)
        for (i64 k = 0; k < c->K; k++)
            memcpy(panels + n * s->K + k * NC, from + k * c->V + n, smaller(NC, c->V - n) * 4);
}

static void write_state(const Call *c, const Space *s, const float *panels, float *to) {
    for (i64 n = 0; n < c->V; n += NC)
        for (i64 k = 0; k < c->K; k++)
            memcpy(to + k * c->V + n, panels + n * s->K + k * NC, smaller(NC, c->V - n) * 4);
}

/* pairs of rows of float panels [cols / NC][rows][NC] */
static void pair_panels(const float *from, i64 rows, i64 cols, float *to) {
    for (i64 n = 0; n < cols; n += NC) as_panels(1, from + n * rows, NC, rows, NC, to + n * rows / 2);
}

/* rows that `count` tokens take in the work space, zeros after the last */
INLINE i64 padded(const Call *c, i64 count) { return round_up(count, c->pair == 2 ? BLOCK : MR); }

INLINE void multiply(const Call *c, Shape shape, i64 M, i64 N, i64 units, Operand A, Operand B, const float *from,
                     const float *beta, Result to) {
#ifdef TILES
    if (c->pair == 2) {
        tiles(0, shape, M, N, units, A, B, from, beta, to);
        return;
    }
#endif
    (c->pair ? product_pairs : product_floats)(shape, M, N, units, A, B, from, beta, to);
}

INLINE void multiply_transposed(const Call *c, Shape shape, i64 M, i64 N, i64 units, Operand A, Operand B,
                                const float *from, const float *beta, Result to) {
#ifdef TILES
    if (c->pair == 2) {
        tiles(1, shape, M, N, units, A, B, from, beta, to);
        return;
    }
#endif
    (c->pair ? product_pairs_transposed : product_floats_transposed)(shape, M, N, units, A, B, from, beta, to);
}

/* head h of an input as padded rows from token t on; the same back to a result, which is contiguous [tokens,H,n] */
#define READ(x, stride, t, count, n, to, width, rows)                                                          \
    read_rows(c->dtype, element(c->x, c->dtype, (t) * c->stride + h * (n)), c->stride, count, n, to, width, rows)
#define WRITE(x, from, width, t, count, n) \
    write_rows(c->dtype, from, width, count, n, (void *)element(c->x, c->dtype, ((t) * c->H + h) * (n)), c->H * (n))

static void forward_head(const Call *c, Space *s, i64 n, i64 h) {
    i64 C = c->C, K = s->K, V = s->V, begin = c->begin[n], end = c->begin[n + 1], Ku = c->pair ? K / 2 : K;
    i64 KV = c->K * c->V;
    s->decays.count = 0;
    read_state(c, s, c->state + (n * c->H + h) * KV, s->S);
    if (c->pair) pair_panels(s->S, K, V, s->S_panels);
    for (i64 t = begin, chunk = 0; t < end; t += C, chunk++) {
        i64 count = smaller(C, end - t), rows = padded(c, count), units = c->pair ? rows / 2 : rows;
        if (c->checkpoints && chunk % c->group == 0)
            write_state(c, s, s->S, c->checkpoints + ((c->first_checkpoint[n] + chunk / c->group) * c->H + h) * KV);
        set_decays(c, &s->decays, t, h, count);
        READ(q, q_stride, t, count, c->K, s->q, K, rows);
        READ(k, k_stride, t, count, c->K, s->k, K, rows);
        READ(v, v_stride, t, count, c->V, s->v, V, rows);
        Operand q_rows = {as_rows(c->pair, s->q, rows, K, s->q_rows), Ku};
        as_panels_of_transpose(as_rows(c->pair, s->k, rows, K, s->k_rows), Ku, rows, Ku, s->kT_panels, Ku);
        as_panels(c->pair, s->v, V, rows, V, s->v_panels);
        Operand v_panels = {s->v_panels, units};

        multiply(c, LOWER, rows, rows, Ku, q_rows, (Operand){s->kT_panels, Ku}, NULL, NULL, (Result){s->score, C, NC});
        decay_scores(c, &s->decays, rows, s->score);
        Operand score_rows = {as_rows(c->pair, s->score, rows, C, s->score_rows), c->pair ? C / 2 : C};
        Result o = {s->out, V, NC};
        multiply(c, FULL, rows, V, Ku, q_rows, (Operand){s->S_panels, Ku}, NULL, NULL, o);
        multiply(c, UP_TO_ROW, rows, V, units, score_rows, v_panels, s->out, s->decays.start, o);
        WRITE(o, s->out, V, t, count, c->V);

        scale_rows(s->k, rows, K, s->decays.end);
        as_panels(c->pair, s->k, K, rows, K, s->kend_panels);
        multiply_transposed(c, FULL, K, V, units, (Operand){s->kend_panels, units}, v_panels, s->S, s->decays.total,
                            (Result){s->S, NC, K * NC});
        if (c->pair) pair_panels(s->S, K, V, s->S_panels);
    }
    write_state(c, s, s->S, c->final + (n * c->H + h) * KV);
}

/* S^T before each of the chunks of a group that begins at token t */
static void states_of_group(const Call *c, Space *s, i64 h, i64 t, i64 end, i64 checkpoint) {
    i64 K = s->K, V = s->V, C = c->C;
    memset(s->ST[0], 0, round_up(K, NC) * V * 4);
    as_panels_of_transpose(c->checkpoints + (checkpoint * c->H + h) * c->K * c->V, c->V, c->K, c->V, s->ST[0], V);
    for (i64 g = 0; g < c->group && t < end; g++, t += C) {
        if (c->pair) pair_panels(s->ST[g], V, K, s->ST_panels[g]);
        if (g + 1 == c->group || t + C >= end) break;
        set_decays(c, &s->decays, t, h, C);
        READ(k, k_stride, t, C, c->K, s->k, K, C);
        READ(v, v_stride, t, C, c->V, s->v, V, C);
        scale_rows(s->k, C, K, s->decays.end);
        as_panels(c->pair, s->k, K, C, K, s->kend_panels);
        as_panels(c->pair, s->v, V, C, V, s->v_panels);
        i64 units = c->pair ? C / 2 : C;
        Operand v_panels = {s->v_panels, units}, kend_panels = {s->kend_panels, units};
        multiply_transposed(c, FULL, V, K, units, v_panels, kend_panels, s->ST[g], s->decays.total,
                            (Result){s->ST[g + 1], NC, V * NC});
    }
}

/* the operands that are made of dS: its panels, and those of its transpose */
static void operands_of_dS(const Call *c, Space *s) {
    i64 K = s->K, V = s->V;
    if (!c->pair || c->per_token)
        for (i64 n = 0; n < V; n += NC)
            as_panels_of_transpose(s->dS + n * K, NC, K, smaller(NC, V - n), s->dST + n * NC, V);
    if (!c->pair) return;
    pair_panels(s->dS, K, V, s->dS_panels);
    for (i64 n = 0; n < V; n += NC) {
        const float *rows = as_rows(1, s->dS + n * K, K, NC, s->out);
        as_panels_of_transpose(rows, NC / 2, K, smaller(NC, V - n) / 2, s->dST_panels + n / 2 * NC, V / 2);
    }
}

static void backward_chunk(const Call *c, Space *s, i64 h, i64 t, i64 count, i64 g) {
    i64 C = c->C, K = s->K, V = s->V, rows = padded(c, count), units = c->pair ? rows / 2 : rows;
    i64 Ku = c->pair ? K / 2 : K, Vu = c->pair ? V / 2 : V, Cu = c->pair ? C / 2 : C;
    const Decays *d = &s->decays;
    set_decays(c, &s->decays, t, h, count);
    READ(q, q_stride, t, count, c->K, s->q, K, rows);
    READ(k, k_stride, t, count, c->K, s->k, K, rows);
    READ(v, v_stride, t, count, c->V, s->v, V, rows);
    READ(dout, do_stride, t, count, c->V, s->dout, V, rows);
    Operand q_rows = {as_rows(c->pair, s->q, rows, K, s->q_rows), Ku};
    Operand v_rows = {as_rows(c->pair, s->v, rows, V, s->v_rows), Vu};
    Operand dout_rows = {as_rows(c->pair, s->dout, rows, V, s->dout_rows), Vu};
    as_panels_of_transpose(as_rows(c->pair, s->k, rows, K, s->k_rows), Ku, rows, Ku, s->kT_panels, Ku);
    as_panels_of_transpose(v_rows.p, Vu, rows, Vu, s->vT_panels, Vu);
    as_panels(c->pair, s->q, K, rows, K, s->q_panels);
    as_panels(c->pair, s->k, K, rows, K, s->k_panels);
    as_panels(c->pair, s->dout, V, rows, V, s->dout_panels);
    Operand q_panels = {s->q_panels, units}, k_panels = {s->k_panels, units}, dout_panels = {s->dout_panels, units};

    multiply(c, LOWER, rows, rows, Ku, q_rows, (Operand){s->kT_panels, Ku}, NULL, NULL, (Result){s->score, C, NC});
    multiply(c, LOWER, rows, rows, Vu, dout_rows, (Operand){s->vT_panels, Vu}, NULL, NULL, (Result){s->dscore, C, NC});
    decay_scores(c, d, rows, s->score);
    if (c->per_token) { /* score_ij dscore_ij has exp(G_i - G_j) in it: + for G_i, - for G_j */
        memset(s->dG, 0, C * 4);
        for (i64 i = 0; i < count; i++)
            for (i64 j = 0; j <= i; j++) {
                float x = s->score[i * C + j] * s->dscore[i * C + j];
                s->dG[i] += x, s->dG[j] -= x;
            }
    }
    decay_scores(c, d, rows, s->dscore);
    as_panels(c->pair, s->score, C, rows, rows, s->score_panels);
    as_panels(c->pair, s->dscore, C, rows, rows, s->dscore_panels);
    Operand dscore_rows = {as_rows(c->pair, s->dscore, rows, C, s->dscore_rows), Cu};

    Result dq = {s->out, K, NC}, dk = dq, dv = {s->out, V, NC};
    multiply(c, FULL, rows, K, Vu, dout_rows, (Operand){s->ST_panels[g], Vu}, NULL, NULL, dq);
    if (c->per_token)
        for (i64 i = 0; i < count; i++) s->dG[i] += d->start[i] * dot(s->q + i * K, s->out + i * K, K);
    multiply(c, UP_TO_ROW, rows, K, units, dscore_rows, k_panels, s->out, d->start, dq);
    WRITE(dq, s->out, K, t, count, c->K);

    multiply(c, FULL, rows, K, Vu, v_rows, (Operand){s->dST_panels, Vu}, NULL, NULL, dk);
    if (c->per_token) {
        double kept = 0; /* the sum of all products of S and dS */
        for (i64 i = 0; i < count; i++) {
            float x = d->end[i] * dot(s->k + i * K, s->out + i * K, K);
            s->dG[i] -= x, kept += x;
        }
        for (i64 n = 0; n < K; n += NC) /* the last panel may be half full */
            for (i64 r = 0; r < V; r++) {
                i64 at = n * V + r * NC;
                kept += d->total[0] * dot(s->ST[g] + at, s->dST + at, smaller(NC, K - n));
            }
        s->dG[count - 1] += (float)kept;
        float sum = 0;
        for (i64 i = count - 1; i >= 0; i--) c->dlog_decay[(t + i) * c->H + h] = sum += s->dG[i];
    }
    multiply_transposed(c, FROM_ROW, rows, K, units, (Operand){s->dscore_panels, units}, q_panels, s->out, d->end, dk);
    WRITE(dk, s->out, K, t, count, c->K);

    scale_rows(s->k, rows, K, d->end);
    Operand kend_rows = {as_rows(c->pair, s->k, rows, K, s->kend_rows), Ku};
    multiply(c, FULL, rows, V, Ku, kend_rows, (Operand){s->dS_panels, Ku}, NULL, NULL, dv);
    multiply_transposed(c, FROM_ROW, rows, V, units, (Operand){s->score_panels, units}, dout_panels, s->out, NULL, dv);
    WRITE(dv, s->out, V, t, count, c->V);

    scale_rows(s->q, rows, K, d->start);
    as_panels(c->pair, s->q, K, rows, K, s->qstart_panels);
    multiply_transposed(c, FULL, K, V, units, (Operand){s->qstart_panels, units}, dout_panels, s->dS, d->total,
                        (Result){s->dS, NC, K * NC});
    operands_of_dS(c, s);
}

static void backward_head(const Call *c, Space *s, i64 n, i64 h) {
    i64 begin = c->begin[n], end = c->begin[n + 1], C = c->C, span = C * c->group;
    s->decays.count = 0;
    read_state(c, s, c->dstate + (n * c->H + h) * c->K * c->V, s->dS);
    operands_of_dS(c, s);
    for (i64 group = (end - begin - 1) / span; group >= 0; group--) {
        i64 first = begin + group * span, chunks = smaller(c->group, (end - first + C - 1) / C);
        states_of_group(c, s, h, first, end, c->first_checkpoint[n] + group);
        for (i64 g = chunks - 1; g >= 0; g--)
            backward_chunk(c, s, h, first + g * C, smaller(C, end - first - g * C), g);
    }
    write_state(c, s, s->dS, c->dinitial + (n * c->H + h) * c->K * c->V);
}

/* Large results are fresh memory, which the kernel hands out page by page as it is first written to; with pages of 4 KB
   that took as long as the arithmetic (docs/LOG.md). Advice: no harm where it is not taken. */
static void in_large_pages(const void *p, i64 bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    uintptr_t page = 1 << 21, first = round_up((uintptr_t)p, page), end = ((uintptr_t)p + bytes) / page * page;
    if (p && end > first) madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

/* 0, or 1 when there was no memory */
static int for_each_head(const Call *c, int backward) {
    int failed = 0;
    i64 elements = c->begin[c->N] * c->H, size = size_of(c->dtype), span = c->C * c->group, last = c->N - 1;
    i64 checkpoints = c->first_checkpoint[last] + (c->begin[c->N] - c->begin[last] + span - 1) / span;
    in_large_pages(c->o, elements * c->V * size), in_large_pages(c->dv, elements * c->V * size);
    in_large_pages(c->dq, elements * c->K * size), in_large_pages(c->dk, elements * c->K * size);
    if (!backward) in_large_pages(c->checkpoints, checkpoints * c->H * c->K * c->V * 4);
#pragma omp parallel for schedule(dynamic, 1) num_threads(c->threads)
    for (i64 task = 0; task < c->N * c->H; task++) {
        Space s;
        if (!get_space(c, backward, &s)) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
#ifdef TILES
        TileConfig before;
        if (c->pair == 2) open_tiles(&before);
#endif
        (backward ? backward_head : forward_head)(c, &s, task / c->H, task % c->H);
#ifdef TILES
        if (c->pair == 2) close_tiles(&before);
#endif
    }
    return failed;
}

int retention_forward(const Call *c) { return for_each_head(c, 0); }
int retention_backward(const Call *c) { return for_each_head(c, 1); }

/* ---- one token (step.py) ---- */

typedef struct {
    i64 B, H, K, V, slots, dtype, threads, decay_stride; /* decay_stride: 0, or H for a decay per row */
    double scale;
    const void *q, *k, *v; /* [B,H,K], [B,H,V], contiguous */
    const float *log_decay;
    float *state;             /* [B,H,K,V] */
    void *ring_k, *ring_v, *o; /* [B,H,slots,K], [B,H,slots,V], [B,H,V] */
    float *ring_decay;        /* [B,H,slots] */
    i64 *written, *folded;    /* [B] */
} Step;

typedef struct { /* what a full ring folds into the state: S = kept * S + sum over `tokens` of k v^T */
    i64 tokens;
    float *k, *v_panels; /* [tokens][K], weighted; operand of the V columns */
    float kept[8];       /* the same number */
} Fold;

/* Whether reading alone asks for the state ahead of its use, two blocks of eight rows. Intel's prefetcher begins anew
   on every page of 4 kB, AMD's follows by itself and is better left alone (docs/LOG.md). */
static int asks_ahead(void) {
#if defined(__x86_64__)
    return __builtin_cpu_is("intel");
#else
    return 0;
#endif
}

/* o += q S, eight rows of S at once, which are folded into while they are in the cache; `ahead` a constant */
INLINE void through_state(float *restrict S, i64 K, i64 V, const float *q, float *restrict o, const Fold *fold,
                          const int ahead) {
    i64 whole = V / LANES * LANES;
    /* no prefetcher follows while a fold computes: it asks for the block that comes 8 kB later, or the next one */
    i64 fold_ahead = round_up(8192, 8 * V * 4) / 4;
    for (i64 k = 0, rows; k < K; k += rows, S += rows * V) {
        rows = K - k < 8 ? 1 : 8;
        if (rows == 8)
            for (i64 j = 0; j < whole; j += LANES) {
                vf x = load(o + j);
                if (ahead)
                    for (int i = 0; i < 8; i++) __builtin_prefetch(S + (ahead * 8 + i) * V + j);
                for (int i = 0; i < 8; i++) x += splat(q[k + i]) * load(S + i * V + j);
                store(o + j, x);
            }
        for (i64 i = 0; i < rows; i++)
            for (i64 j = rows == 8 ? whole : 0; j < V; j++) o[j] += q[k + i] * S[i * V + j];
        if (!fold->tokens) continue;
        if (rows == 8)
            for (i64 j = 0; j < whole; j += NC)
                for (int i = 0; i < 8; i += MR) {
                    float *to = S + i * V + j;
                    const float *v = fold->v_panels + j * fold->tokens;
                    for (int n = 0; n < MR && !ahead; n++)
                        for (int line = 0; line < NC; line += 16) __builtin_prefetch(to + n * V + fold_ahead + line);
                    if (whole - j > LANES) tile(0, 2, fold->tokens, fold->k + k + i, 1, K, v, to, fold->kept, to, V);
                    else tile(0, 1, fold->tokens, fold->k + k + i, 1, K, v, to, fold->kept, to, V);
                }
        for (i64 i = 0; i < rows; i++)
            for (i64 j = rows == 8 ? whole : 0; j < V; j++) {
                float x = S[i * V + j] * fold->kept[0];
                const float *v = fold->v_panels + j / NC * NC * fold->tokens + j % NC;
                for (i64 t = 0; t < fold->tokens; t++) x += fold->k[t * K + k + i] * v[t * NC];
                S[i * V + j] = x;
            }
    }
}

typedef struct { /* the tokens that wait in the ring of a head, token j in slot_of(held, j), the oldest first */
    i64 slots, first, tokens;
    const float *k, *v, *decay; /* by slots */
} Held;

INLINE i64 slot_of(const Held *held, i64 j) {
    i64 slot = held->first + j;
    return slot < held->slots ? slot : slot - held->slots;
}

/* Asks for the rows in the ring of a head: few, and in another place for each head, they are waited for otherwise. */
static void ask_ring(const Step *c, i64 bh) {
    i64 b = bh / c->H, R = c->slots, size = size_of(c->dtype), k_bytes = c->K * size, v_bytes = c->V * size;
    __builtin_prefetch(c->ring_decay + bh * R);
    for (i64 t = c->folded[b]; t < c->written[b]; t++) {
        i64 at = bh * R + t % R;
        for (i64 n = 0; n < k_bytes; n += 64) __builtin_prefetch((const char *)c->ring_k + at * k_bytes + n);
        for (i64 n = 0; n < v_bytes; n += 64) __builtin_prefetch((const char *)c->ring_v + at * v_bytes + n);
    }
}

/* the new token into the ring; all that are in it as float32, in `space` if they are not so there */
static Held put(const Step *c, i64 bh, float *space) {
    i64 K = c->K, V = c->V, R = c->slots, size = size_of(c->dtype), b = bh / c->H, slot = c->written[b] % R;
    char *k = (char *)c->ring_k + bh * R * K * size, *v = (char *)c->ring_v + bh * R * V * size;
    float *decay = c->ring_decay + bh * R;
    memcpy(k + slot * K * size, element(c->k, c->dtype, bh * K), K * size);
    memcpy(v + slot * V * size, element(c->v, c->dtype, bh * V), V * size);
    decay[slot] = bounded(c->log_decay[b * c->decay_stride + bh % c->H]);

    Held held = {R, c->folded[b] % R, c->written[b] - c->folded[b] + 1, (float *)k, (float *)v, decay};
    if (c->dtype == 0) return held;
    held.k = space, held.v = space + R * K;
    for (i64 j = 0, run; j < held.tokens; j += run) { /* to the end of the ring, and on from its begin */
        i64 at = slot_of(&held, j);
        run = smaller(held.tokens - j, R - at);
        read_row(c->dtype, k + at * K * size, run * K, space + at * K, run * K);
        read_row(c->dtype, v + at * V * size, run * V, space + R * K + at * V, run * V);
    }
    return held;
}

/* o = scale * sum of exp(G - G_j) (q k_j) v_j; scale * exp(G) comes back. A kB of the state S is asked for with every
   token: memory would have nothing to do otherwise. */
static float through_ring(const Step *c, const Held *held, const float *q, float *o, float *weights, const float *S) {
    i64 K = c->K, V = c->V, whole = V / LANES * LANES;
    float since = 0, scale = (float)c->scale;
    for (i64 j = held->tokens - 1; j >= 0; j--) weights[j] = since, since += held->decay[slot_of(held, j)];
    for (i64 j = 0; j < held->tokens; j++) weights[j] = scale * exp_of(weights[j]);
    for (i64 j = 0; j < held->tokens; j++) {
        for (int line = 0; line < 16; line++) __builtin_prefetch(S + (j * 16 + line) * 16);
        weights[j] *= dot(q, held->k + slot_of(held, j) * K, K);
    }
    for (i64 n = 0; n < whole; n += LANES) {
        vf sum = {0};
        for (i64 j = 0; j < held->tokens; j++) sum += splat(weights[j]) * load(held->v + slot_of(held, j) * V + n);
        store(o + n, sum);
    }
    for (i64 n = whole; n < V; n++) {
        o[n] = 0;
        for (i64 j = 0; j < held->tokens; j++) o[n] += weights[j] * held->v[slot_of(held, j) * V + n];
    }
    return scale * exp_of(since);
}

/* the older half of a full ring, of any other nothing */
static Fold ripe(const Step *c, const Held *held, float *space) {
    i64 K = c->K, V = c->V, tokens = held->tokens == held->slots ? held->slots / 2 : 0;
    Fold fold = {tokens, space, space + tokens * K, {0}};
    float since = 0; /* log decay from token j to the newest of them */
    for (i64 j = tokens - 1; j >= 0; j--) {
        i64 at = slot_of(held, j);
        float weight = exp_of(since);
        for (i64 n = 0; n < K; n++) fold.k[j * K + n] = weight * held->k[at * K + n];
        for (i64 n = 0; n < V; n += NC)
            read_row(0, held->v + at * V + n, smaller(NC, V - n), fold.v_panels + n * tokens + j * NC, NC);
        since += held->decay[at];
    }
    float kept = exp_of(since);
    for (int i = 0; i < 8; i++) fold.kept[i] = kept;
    return fold;
}

static i64 step_space(const Step *c) { /* floats: q and o, weights, the ring, what is folded */
    return c->K + c->V + c->slots + c->slots * (c->K + c->V) + c->slots / 2 * (c->K + round_up(c->V, NC));
}

static void step_head(const Step *c, i64 bh, i64 end, float *space) {
    i64 K = c->K, V = c->V;
    float *q = space, *o = q + K, *weights = o + V, *ring = weights + c->slots, *half = ring + c->slots * (K + V);
    float *S = c->state + bh * K * V;
    Held held = put(c, bh, ring);
    read_row(c->dtype, element(c->q, c->dtype, bh * K), K, q, K);
    float remains = through_ring(c, &held, q, o, weights, S);
    for (i64 n = 0; n < K; n++) q[n] *= remains;
    Fold fold = ripe(c, &held, half);
    if (bh + 1 < end) ask_ring(c, bh + 1);
    if (asks_ahead()) through_state(S, K, V, q, o, &fold, 2);
    else through_state(S, K, V, q, o, &fold, 0);
    write_rows(c->dtype, o, V, 1, V, (char *)c->o + bh * V * size_of(c->dtype), V);
}

/* 0; 1 when there was no memory; 2 for a log decay above 0 or NaN, and then nothing was written */
int retention_step(const Step *c) {
    i64 heads = c->B * c->H;
    int failed = 0;
    for (i64 i = 0; i < (c->decay_stride ? heads : c->H); i++)
        if (!(c->log_decay[i] <= 0)) return 2;
#pragma omp parallel for schedule(static) num_threads(c->threads)
    for (i64 part = 0; part < c->threads; part++) {
        i64 begin = heads * part / c->threads, end = heads * (part + 1) / c->threads;
        float *space = space_of_thread_with(step_space(c) * 4);
        if (!space) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        if (begin < end) { /* where the state begins is known at once, what the ring holds is not */
            for (int line = 0; line < 32; line++) __builtin_prefetch(c->state + begin * c->K * c->V + line * 16);
            ask_ring(c, begin);
        }
        for (i64 bh = begin; bh < end; bh++) step_head(c, bh, end, space);
    }
    for (i64 b = 0; b < c->B && !failed; b++) {
        c->written[b]++;
        if (c->written[b] - c->folded[b] == c->slots) c->folded[b] += c->slots / 2;
    }
    return failed;
}

int has_half(void) {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}

/* 0 no, 1 in vectors, 2 in tiles */
int can_multiply_pairs(void) {
#ifdef TILES
    if (tiles_are_allowed()) return 2;
#endif
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
