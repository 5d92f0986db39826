/* Shared by both passes over chunks: arguments from Python, decays, work space, states, input and output rows. */

#pragma once
#include "memory.h"
#include "products.h"

/* ---- arguments from Python (struct Call of cpu.py) ---- */

typedef struct {
    i64 N, H, K, V, C, group, dtype, pair, per_token, threads; /* dtype 0 float32, 1 bfloat16, 2 float16 */
    i64 q_stride, k_stride, v_stride, do_stride;               /* elements from token to token */
    double scale;
    const i64 *begin;            /* [N+1] first token of each sequence, among the tokens of all rows */
    const i64 *first_checkpoint; /* [N] */
    const void *q, *k, *v, *dout;
    const float *log_decay, *state, *dstate; /* [H] or [tokens,H]; [N,H,K,V] */
    float *checkpoints;                      /* [checkpoints,H,K,V], or NULL */
    void *o, *dq, *dk, *dv;                  /* contiguous */
    float *final, *dlog_decay, *dinitial;
} Call;

/* ---- decays ---- */

typedef struct {
    float *start, *end, *total, *lag, *since; /* [C] scale * exp(G); [C] exp(G_C - G); [wide] exp(G_C), repeated */
    i64 wide, count;                          /* [2C] scale * gamma^(C-1-x), then zeros; [C] G; tokens covered */
} Decays;

/* sets the decays of `count` tokens of head h from token t on */
static void set_decays(const Call *c, Decays *d, i64 t, i64 h, i64 count) {
    if (!c->per_token && d->count == count) return; /* equal for all full chunks */
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

/* Row i of scale * D up to `width`, with a decay per token. For columns before m, where the vector of i begins, it is a
   product of a row's and a column's factor, exp(G_i - G_m) exp(G_m - G_j), both at most 1. One exp per element would
   take as long as a matrix product. `far` keeps the columns' factors from row to row. */
static void set_row(const Decays *d, int i, int width, float scale, float *far, float *row) {
    const float *G = d->since;
    int m = i / LANES * LANES;
    float Gi = G[i], Gm = G[m], near = exp_of(Gi - Gm) * scale;
    if (i == m)
        for (int j = 0; j < m; j++) far[j] = exp_of(Gm - G[j]);
    for (int j = 0; j < m; j++) row[j] = far[j] * near;
    for (int j = m; j < m + LANES; j++) row[j] = exp_of(j <= i ? Gi - G[j] : 0) * scale;
    for (int j = m + LANES; j < width; j++) row[j] = 0;
}

/* multiplies scores [rows][C] by scale * D; selects zero past the diagonal, since a NaN there times 0 is NaN */
static void decay_scores(const Call *c, const Decays *d, i64 rows, float *score) {
    float far[c->C], row[c->C];
    for (int i = 0; i < rows; i++, score += c->C) {
        int width = (int)round_up(i / MR * MR + MR, NC);
        const float *D = c->per_token ? row : d->lag + c->C - 1 - i;
        if (c->per_token) set_row(d, i, width, (float)c->scale, far, row);
        for (int j = 0; j < width; j++) score[j] = j <= i ? score[j] * D[j] : 0;
    }
}

/* ---- work space of a thread ---- */

typedef struct {
    i64 K, V; /* padded */
    Decays decays;
    float *out, *score, *dscore;                                            /* rows */
    float *q_rows, *k_rows, *v_rows, *dout_rows, *score_rows, *dscore_rows; /* operands */
    float *q_panels, *k_panels, *v_panels, *dout_panels, *score_panels, *dscore_panels, *kT_panels, *vT_panels;
    float *kend_rows, *kend_panels, *qstart_panels, *S_panels, *dS_panels, *dST_panels;
    float *S, *dS, *dST, *dG;                      /* S, dS: panels of [K][V]; dST: of [V][K] */
    float *ST[MOST_GROUP], *ST_panels[MOST_GROUP]; /* before each chunk of a group, panels of [V][K] */
} Space;

/* lays out a work space starting at `at`, returns its end */
static char *arrange(const Call *c, int backward, Space *s, char *at) {
    i64 C = c->C, whole = PAIR(c) == 2 ? BLOCK : WHOLE;
    i64 K = s->K = round_up(c->K, whole), V = s->V = round_up(c->V, whole), wide = K > V ? K : V;
    i64 CK = C * round_up(K, NC), CV = C * round_up(V, NC), CC = C * C, KV = round_up(K, NC) * round_up(V, NC);
    Decays *d = &s->decays;
    d->wide = wide, d->count = 0;
    d->start = take(&at, C), d->end = take(&at, C), d->since = take(&at, C);
    d->total = take(&at, wide), d->lag = take(&at, 2 * C);
    s->q_rows = take(&at, CK), s->k_rows = take(&at, CK), s->kT_panels = take(&at, CK);
    s->kend_panels = take(&at, CK), s->v_panels = take(&at, CV), s->out = take(&at, CK > CV ? CK : CV);
    s->score = take(&at, CC), s->score_rows = take(&at, CC);
    s->S = take(&at, KV), s->S_panels = PAIR(c) ? take(&at, KV / 2) : s->S;
    if (!backward) return at;
    s->q_panels = take(&at, CK), s->qstart_panels = take(&at, CK);
    s->k_panels = take(&at, CK), s->kend_rows = take(&at, CK);
    s->v_rows = take(&at, CV), s->vT_panels = take(&at, CV);
    s->dout_rows = take(&at, CV), s->dout_panels = take(&at, CV);
    s->score_panels = take(&at, CC), s->dscore = take(&at, CC);
    s->dscore_rows = take(&at, CC), s->dscore_panels = take(&at, CC), s->dG = take(&at, C);
    s->dS = take(&at, KV), s->dS_panels = PAIR(c) ? take(&at, KV / 2) : s->dS;
    s->dST = PAIR(c) && !c->per_token ? NULL : take(&at, KV), s->dST_panels = PAIR(c) ? take(&at, KV / 2) : s->dST;
    for (i64 g = 0; g < c->group; g++)
        s->ST[g] = take(&at, KV), s->ST_panels[g] = PAIR(c) ? take(&at, KV / 2) : s->ST[g];
    return at;
}

static int get_space(const Call *c, int backward, Space *s) {
    char *at = space_of_thread_with((intptr_t)arrange(c, backward, s, NULL)); /* laid out from 0, the end is the size */
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

/* makes pairs of rows from float panels [cols / NC][rows][NC] */
static void pair_panels(const float *from, i64 rows, i64 cols, float *to) {
    for (i64 n = 0; n < cols; n += NC) as_panels(1, from + n * rows, NC, rows, NC, to + n * rows / 2);
}

/* rows of work space for `count` tokens; those past the last token are zeros */
INLINE i64 padded(const Call *c, i64 count) { return round_up(count, PAIR(c) == 2 ? BLOCK : MR); }

INLINE void multiply(const Call *c, Shape shape, i64 M, i64 N, i64 units, Operand A, Operand B, const float *from,
                     const float *beta, Result to) {
#ifdef TILES
    if (PAIR(c) == 2) {
        tiles(0, shape, M, N, units, A, B, from, beta, to);
        return;
    }
#endif
    (PAIR(c) ? product_pairs : product_floats)(shape, M, N, units, A, B, from, beta, to);
}

INLINE void multiply_transposed(const Call *c, Shape shape, i64 M, i64 N, i64 units, Operand A, Operand B,
                                const float *from, const float *beta, Result to) {
#ifdef TILES
    if (PAIR(c) == 2) {
        tiles(1, shape, M, N, units, A, B, from, beta, to);
        return;
    }
#endif
    (PAIR(c) ? product_pairs_transposed : product_floats_transposed)(shape, M, N, units, A, B, from, beta, to);
}

/* ---- operands of inputs ---- */

typedef struct { const void *at; i64 stride, count, n; } Given; /* `count` rows of n elements, `stride` apart */

/* head h of an input, from token t on */
#define GIVEN(x, stride, t, count, n) (Given){element(c->x, c->dtype, (t) * c->stride + h * (n)), c->stride, count, n}

/* a vector of row i from element j on, times the row's factor unless there are none; all of it lies inside */
INLINE vf given_whole(const int dtype, Given x, i64 i, i64 j, const float *factor) {
    vf y = all_of(dtype, element(x.at, dtype, i * x.stride + j));
    return factor ? y * splat(factor[i]) : y;
}

/* the same where a row or the rows end: zeros outside */
static vf given_edge(int dtype, Given x, i64 i, i64 j, const float *factor) {
    float y[LANES];
    if (i >= x.count || j >= x.n) return (vf){0};
    read_row(dtype, element(x.at, dtype, i * x.stride + j), smaller(LANES, x.n - j), y, LANES);
    return factor ? load(y) * splat(factor[i]) : load(y);
}

/* bfloat16 as it is */
static void copied_rows(Given x, i64 rows, i64 width, uint16_t *to) {
    for (i64 i = 0; i < rows; i++, to += width) {
        i64 n = i < x.count ? x.n : 0;
        if (n) memcpy(to, (const uint16_t *)x.at + i * x.stride, n * 2);
        memset(to + n, 0, (width - n) * 2);
    }
}

INLINE void rows_from(int pair, const int dtype, Given x, const float *factor, i64 rows, i64 width, float *to) {
    const int stored = pair ? 1 : 0; /* dtype */
    for (i64 i = 0; i < rows; i++, to += pair ? width / 2 : width) {
        i64 j = 0;
        for (; i < x.count && j + LANES <= x.n; j += LANES)
            set_all(stored, given_whole(dtype, x, i, j, factor), (void *)element(to, stored, j));
        for (; j < width; j += LANES)
            set_all(stored, given_edge(dtype, x, i, j, factor), (void *)element(to, stored, j));
    }
}

INLINE vf pair_given(vf a, vf b, const float *factor) { return factor ? pair_up(a, b) : pair_exact(a, b); }

INLINE void panels_from(int pair, const int dtype, Given x, const float *factor, i64 rows, i64 width, float *to) {
    const i64 step = pair ? 2 : 1;
    for (i64 j = 0; j < width; j += LANES) {
        float *at = to + j / NC * NC * (rows / step) + j % NC;
        i64 i = 0, whole = j + LANES <= x.n ? x.count : 0;
        for (; i + step <= whole; i += step, at += NC) {
            vf y = given_whole(dtype, x, i, j, factor);
            store(at, pair ? pair_given(y, given_whole(dtype, x, i + 1, j, factor), factor) : y);
        }
        for (; i < rows; i += step, at += NC) {
            vf y = given_edge(dtype, x, i, j, factor);
            store(at, pair ? pair_given(y, given_edge(dtype, x, i + 1, j, factor), factor) : y);
        }
    }
}

/* makes the `rows` operand of an input, [rows][width], with zeros where it ends */
static const float *given_rows(const Call *c, Given x, const float *factor, i64 rows, i64 width, float *to) {
    if (PAIR(c) && factor) rows_from(1, 1, x, factor, rows, width, to);
    else if (PAIR(c)) copied_rows(x, rows, width, (uint16_t *)to);
    else if (c->dtype == 0) rows_from(0, 0, x, factor, rows, width, to);
    else if (c->dtype == 1) rows_from(0, 1, x, factor, rows, width, to);
    else rows_from(0, 2, x, factor, rows, width, to);
    return to;
}

/* makes its `panels` operand, summed over rows */
static const float *given_panels(const Call *c, Given x, const float *factor, i64 rows, i64 width, float *to) {
    if (PAIR(c) && factor) panels_from(1, 1, x, factor, rows, width, to);
    else if (PAIR(c)) panels_from(1, 1, x, NULL, rows, width, to);
    else if (c->dtype == 0) panels_from(0, 0, x, factor, rows, width, to);
    else if (c->dtype == 1) panels_from(0, 1, x, factor, rows, width, to);
    else panels_from(0, 2, x, factor, rows, width, to);
    return to;
}

/* writes a head's rows from token t on, to a contiguous result [tokens,H,n] */
#define WRITE(x, from, width, t, count, n) \
    write_rows(c->dtype, from, width, count, n, (void *)element(c->x, c->dtype, ((t) * c->H + h) * (n)), c->H * (n))
