/* Causal softmax attention to the last W tokens, or all, with an optional forget gate, forward and backward, as one
   compilation unit. Built and called by windows.py.

    s_ij = scale * q_i k_j + log f_{j+1} + … + log f_i      i - W < j <= i
    P    = softmax of each row of s                         o = P v
    dP   = do v^T                                           ds = P * (dP - rows' sums of P dP)
    dq   = scale * ds k      dk = scale * ds^T q            dv = P^T do
    dlog f_t = sum of ds_ij over j < t <= i

One task is one sequence and one head of keys, with all heads of queries that share it. A block of C queries meets the
chunks of C keys that its windows reach. A ring keeps these chunks as operands of products, and the sums of their
gradients, until the last window has passed. So a row of scores is complete at once, and linear in the window. Tasks
share nothing, so results do not depend on the threads.
*/

#include "memory.h"
#include "products.h"
#include "pages.h"

/* struct Call of windows.py */
typedef struct {
    i64 N, H, G, K, W, C, dtype, pair, threads;  /* sequences, heads of keys, heads of queries for each; pair: as in cpu.c */
    i64 q_stride, k_stride, v_stride, do_stride; /* elements from token to token */
    double scale;
    const i64 *begin; /* [N+1] first token of each sequence, among the tokens of all rows */
    const void *q, *k, *v, *dout;
    const float *log_f; /* [H G,tokens], or NULL */
    float *lse;         /* [H G,tokens] log of each row's sum of exp(s) */
    void *o, *dq, *dk, *dv;
    float *dlog_f;
} Call;

/* work space of a thread; a ring has R slots, each for the operand of a chunk */
typedef struct {
    i64 K, R, wide, slot; /* K padded; chunks that the windows of a block reach; R C; floats of a slot */
    double *since;        /* [wide] running sums of log f */
    float *far, *lost;    /* [wide] for `fade_row`; sums of ds over rows */
    float *read, *rows, *out;
    float *q, *q_panels, *dout, *dout_panels;     /* operands of a block */
    float *score, *dscore, *score_rows, *panels;  /* [C][wide], and operands */
    float *kT, *v, *k, *vT, *dk, *dv;             /* rings */
} Space;

static char *arrange(const Call *c, int backward, Space *s, char *at) {
    i64 C = c->C, ring;
    s->K = round_up(c->K, PAIR(c) == 2 ? BLOCK : WHOLE), s->slot = C * round_up(s->K, NC);
    s->R = (c->W - 1 + C - 1) / C + 1, s->wide = s->R * C, ring = s->R * s->slot;
    s->since = (double *)take(&at, 2 * s->wide), s->far = take(&at, s->wide);
    s->read = take(&at, s->slot), s->rows = take(&at, s->slot), s->out = take(&at, s->slot), s->q = take(&at, s->slot);
    s->score = take(&at, C * s->wide), s->score_rows = take(&at, C * s->wide);
    s->kT = take(&at, ring);
    if (!backward) {
        s->v = take(&at, ring);
        return at;
    }
    s->lost = take(&at, s->wide), s->dscore = take(&at, C * s->wide), s->panels = take(&at, C * C);
    s->q_panels = take(&at, s->slot), s->dout = take(&at, s->slot), s->dout_panels = take(&at, s->slot);
    s->k = take(&at, ring), s->vT = take(&at, ring), s->dk = take(&at, ring), s->dv = take(&at, ring);
    return at;
}

/* Queries from token t on, `count` of them, padded to `rows`. Columns of their scores are tokens from `origin` on; the
   first of a chunk that exists is `first`. */
typedef struct { i64 t, count, rows, begin, origin, first; } Block;

static float *slot_of(const Space *s, const Block *b, i64 C, float *ring, i64 column) {
    return ring + (b->origin + column - b->begin) / C % s->R * s->slot;
}

/* ---- products of a block ---- */

INLINE void multiply(const Call *c, int transposed, Shape shape, i64 M, i64 N, i64 units, Operand A, Operand B,
                     const float *from, Result to) {
#ifdef TILES
    if (PAIR(c) == 2) {
        tiles(transposed, shape, M, N, units, A, B, from, NULL, to);
        return;
    }
#endif
    if (transposed)
        (PAIR(c) ? product_pairs_transposed : product_floats_transposed)(shape, M, N, units, A, B, from, NULL, to);
    else (PAIR(c) ? product_pairs : product_floats)(shape, M, N, units, A, B, from, NULL, to);
}

/* Shape of a product with the chunk at column j: `causal` for the block's own, `passing` for the oldest, of which a row
   sees only later columns than its own number, and FULL for the others. */
INLINE Shape shape_of(const Call *c, const Space *s, i64 j, Shape causal, Shape passing) {
    return j + c->C == s->wide ? causal : j ? FULL : passing;
}

/* to [rows][wide] = x, an operand of the block, times the transposed chunks of `ring` */
static void scores(const Call *c, const Space *s, const Block *b, const float *x, float *ring, float *to) {
    i64 C = c->C, Ku = PAIR(c) ? s->K / 2 : s->K;
    for (i64 j = b->first; j < s->wide; j += C)
        multiply(c, 0, shape_of(c, s, j, LOWER, UPPER), b->rows, C, Ku, (Operand){x, Ku},
                 (Operand){slot_of(s, b, C, ring, j), Ku}, NULL, (Result){to + j, s->wide, NC});
}

/* out [rows][K] = x [rows][wide] times the chunks of `ring` */
static void mix(const Call *c, Space *s, const Block *b, const float *x, float *ring) {
    i64 C = c->C, units = PAIR(c) ? C / 2 : C, depth = PAIR(c) ? s->wide / 2 : s->wide;
    x = as_rows(PAIR(c), x, b->rows, s->wide, s->score_rows);
    for (i64 j = b->first; j < s->wide; j += C)
        multiply(c, 0, shape_of(c, s, j, UP_TO_ROW, FROM_ROW), b->rows, s->K, units,
                 (Operand){x + (PAIR(c) ? j / 2 : j), depth}, (Operand){slot_of(s, b, C, ring, j), units},
                 j > b->first ? s->out : NULL, (Result){s->out, s->K, NC});
}

/* adds to each chunk of `ring` its columns of x [rows][wide], transposed, times y, panels of the block */
static void collect(const Call *c, Space *s, const Block *b, const float *x, const float *y, float *ring) {
    i64 C = c->C, units = PAIR(c) ? b->rows / 2 : b->rows;
    for (i64 j = b->first; j < s->wide; j += C) {
        float *sum = slot_of(s, b, C, ring, j);
        as_panels(PAIR(c), x + j, s->wide, b->rows, C, s->panels);
        multiply(c, 1, shape_of(c, s, j, FROM_ROW, UP_TO_ROW), C, s->K, units, (Operand){s->panels, units},
                 (Operand){y, units}, sum, (Result){sum, s->K, NC});
    }
}

/* ---- a row of scores ---- */

/* columns that row i sees, and whole vectors around them */
typedef struct { i64 first, last, begin, end; } Seen;

INLINE Seen seen_by(const Call *c, const Space *s, const Block *b, i64 i) {
    i64 last = s->wide - c->C + i, first = larger(last - c->W + 1, b->first);
    return (Seen){first, last, first / LANES * LANES, last / LANES * LANES + LANES};
}

/* sets the running sums of log f over the block's columns */
static void sum_gates(const Call *c, Space *s, const Block *b, const float *log_f) {
    double sum = 0;
    for (i64 j = b->first; j < s->wide - c->C + b->count; j++) {
        float x = log_f[b->origin + j];
        s->since[j] = sum += x < -1e6f ? -1e6f : x; /* an infinity would be subtracted from itself */
    }
}

/* Adds log f_{j+1} + … + log f_i to row i. For columns before m, where the vector of i begins, it is the sum of a column's
   and a row's part, both at most 0. One subtraction in double per element would take longer. */
INLINE void fade_row(const Space *s, i64 i, Seen at, float *x) {
    const double *since = s->since;
    float *far = s->far;
    i64 m = at.end - LANES;
    if (i % LANES == 0)
        for (i64 j = at.begin; j < m; j++) far[j] = (float)(since[m] - since[j]);
    float near = (float)(since[at.last] - since[m]);
    for (i64 j = at.begin; j < m; j++) x[j] += far[j] + near;
    for (i64 j = m; j < at.end; j++) x[j] += (float)(since[at.last] - since[j]); /* past the last: any number */
}

/* completes the scores of row i: scaled, faded, -infinity for tokens that it does not see */
INLINE void finish_row(const Call *c, const Space *s, i64 i, Seen at, float *x) {
    vf scale = splat((float)c->scale), none = splat(-INFINITY);
    for (i64 j = at.begin; c->scale != 1 && j < at.end; j += LANES) store(x + j, load(x + j) * scale);
    if (c->log_f) fade_row(s, i, at, x);
    for (i64 j = at.begin; j < at.first; j++) x[j] = none[0];
    for (i64 j = at.last + 1; j < at.end; j++) x[j] = none[0];
}

/* x = exp(x - less) in the columns seen, 0 in all others; returns their sum */
INLINE float exp_row(const Space *s, const Block *b, Seen at, float less, float *x) {
    vf sum = {0};
    for (i64 j = at.begin; j < at.end; j += LANES) {
        vf y = exps_of(load(x + j) - splat(less));
        store(x + j, y), sum += y;
    }
    memset(x + b->first, 0, (at.begin - b->first) * 4), memset(x + at.end, 0, (s->wide - at.end) * 4);
    return sum_of(sum);
}

INLINE float largest(Seen at, const float *x) {
    vf most = splat(-INFINITY);
    float top = -INFINITY;
    for (i64 j = at.begin; j < at.end; j += LANES) {
        vf y = load(x + j);
        vi more = y > most;
        most = (vf)(((vi)y & more) | ((vi)most & ~more));
    }
    for (int l = 0; l < LANES; l++) top = most[l] > top ? most[l] : top;
    return top;
}

static void clear_padding(const Space *s, const Block *b, float *x) { /* rows after the last query */
    memset(x + b->count * s->wide, 0, (b->rows - b->count) * s->wide * 4);
}

/* ---- blocks ---- */

static void read_head(const Call *c, Space *s, const void *x, i64 stride, i64 h, i64 t, i64 count, i64 rows) {
    read_rows(c->dtype, element(x, c->dtype, t * stride + h * c->K), stride, count, c->K, s->read, s->K, rows);
}

static void write_head(const Call *c, const Space *s, const float *from, i64 heads, i64 h, i64 t, i64 count, void *to) {
    write_rows(c->dtype, from, s->K, count, c->K, (void *)element(to, c->dtype, (t * heads + h) * c->K), heads * c->K);
}

/* puts the keys and values of the chunk at token t into a slot of the rings */
static void put_chunk(const Call *c, Space *s, i64 h, i64 t, i64 count, i64 slot, int backward) {
    i64 C = c->C, K = s->K, Ku = PAIR(c) ? K / 2 : K, at = slot * s->slot;
    read_head(c, s, c->k, c->k_stride, h, t, count, C);
    as_panels_of_transpose(as_rows(PAIR(c), s->read, C, K, s->rows), Ku, C, Ku, s->kT + at, Ku);
    if (backward) as_panels(PAIR(c), s->read, K, C, K, s->k + at);
    read_head(c, s, c->v, c->v_stride, h, t, count, C);
    if (!backward) {
        as_panels(PAIR(c), s->read, K, C, K, s->v + at);
        return;
    }
    as_panels_of_transpose(as_rows(PAIR(c), s->read, C, K, s->rows), Ku, C, Ku, s->vT + at, Ku);
    memset(s->dk + at, 0, s->slot * 4), memset(s->dv + at, 0, s->slot * 4);
}

static void block_forward(const Call *c, Space *s, const Block *b, i64 head) {
    i64 heads = c->H * c->G, tokens = c->begin[c->N];
    float inverse[c->C];
    read_head(c, s, c->q, c->q_stride, head, b->t, b->count, b->rows);
    scores(c, s, b, as_rows(PAIR(c), s->read, b->rows, s->K, s->q), s->kT, s->score);
    if (c->log_f) sum_gates(c, s, b, c->log_f + head * tokens);
    for (i64 i = 0; i < b->count; i++) {
        Seen at = seen_by(c, s, b, i);
        float *x = s->score + i * s->wide;
        finish_row(c, s, i, at, x);
        float top = largest(at, x), all = exp_row(s, b, at, top, x);
        inverse[i] = 1 / all;
        if (c->lse) c->lse[head * tokens + b->t + i] = top + logf(all);
    }
    clear_padding(s, b, s->score);
    mix(c, s, b, s->score, s->v);
    for (i64 i = 0; i < b->count; i++)
        for (i64 j = 0; j < s->K; j++) s->out[i * s->K + j] *= inverse[i];
    write_head(c, s, s->out, heads, head, b->t, b->count, c->o);
}

static void block_backward(const Call *c, Space *s, const Block *b, i64 head) {
    i64 K = s->K, wide = s->wide, heads = c->H * c->G, tokens = c->begin[c->N];
    float *dlog_f = c->dlog_f ? c->dlog_f + head * tokens : NULL, *lost = s->lost;
    read_head(c, s, c->q, c->q_stride, head, b->t, b->count, b->rows);
    as_panels(PAIR(c), s->read, K, b->rows, K, s->q_panels);
    scores(c, s, b, as_rows(PAIR(c), s->read, b->rows, K, s->q), s->kT, s->score);
    read_head(c, s, c->dout, c->do_stride, head, b->t, b->count, b->rows);
    as_panels(PAIR(c), s->read, K, b->rows, K, s->dout_panels);
    scores(c, s, b, as_rows(PAIR(c), s->read, b->rows, K, s->dout), s->vT, s->dscore);
    if (c->log_f) sum_gates(c, s, b, c->log_f + head * tokens);
    memset(lost, 0, wide * 4);
    for (i64 i = 0; i < b->count; i++) {
        Seen at = seen_by(c, s, b, i);
        float *P = s->score + i * wide, *dP = s->dscore + i * wide, along;
        finish_row(c, s, i, at, P);
        exp_row(s, b, at, c->lse[head * tokens + b->t + i], P);
        for (i64 j = at.last + 1; j < at.end; j++) dP[j] = 0; /* was not computed: may be NaN, and 0 times NaN is NaN */
        vf sum = {0}, scale = splat((float)c->scale);
        for (i64 j = at.begin; j < at.end; j += LANES) sum += load(P + j) * load(dP + j);
        along = sum_of(sum), sum = (vf){0};
        for (i64 j = at.begin; j < at.end; j += LANES) {
            vf ds = load(P + j) * (load(dP + j) - splat(along));
            sum += ds;
            store(lost + j, load(lost + j) + ds);
            store(dP + j, ds * scale);
        }
        if (dlog_f) dlog_f[b->t + i] += sum_of(sum);
        memset(dP + b->first, 0, (at.begin - b->first) * 4), memset(dP + at.end, 0, (wide - at.end) * 4);
    }
    if (dlog_f)
        for (i64 j = b->first; j < wide - c->C + b->count; j++) dlog_f[b->origin + j] -= lost[j];
    clear_padding(s, b, s->score), clear_padding(s, b, s->dscore);
    collect(c, s, b, s->score, s->dout_panels, s->dv);
    collect(c, s, b, s->dscore, s->q_panels, s->dk);
    mix(c, s, b, s->dscore, s->k);
    write_head(c, s, s->out, heads, head, b->t, b->count, c->dq);
}

/* ---- sequences ---- */

static void sequence(const Call *c, Space *s, i64 n, i64 h, int backward) {
    i64 begin = c->begin[n], end = c->begin[n + 1], C = c->C, chunks = (end - begin + C - 1) / C;
    for (i64 i = 0; i < chunks + s->R; i++) {
        i64 t = begin + i * C, slot = i % s->R, gone = t - s->R * C; /* the chunk that no window sees any more */
        if (backward && gone >= begin && gone < end) {
            i64 count = smaller(C, end - gone);
            write_head(c, s, s->dk + slot * s->slot, c->H, h, gone, count, c->dk);
            write_head(c, s, s->dv + slot * s->slot, c->H, h, gone, count, c->dv);
        }
        if (i >= chunks) continue;
        i64 count = smaller(C, end - t), rows = round_up(count, PAIR(c) == 2 ? BLOCK : MR);
        Block b = {t, count, rows, begin, t - (s->R - 1) * C, larger(s->R - 1 - i, 0) * C};
        put_chunk(c, s, h, t, count, slot, backward);
        for (i64 g = 0; g < c->G; g++) (backward ? block_backward : block_forward)(c, s, &b, h * c->G + g);
    }
    for (i64 g = 0; c->dlog_f && g < c->G; g++) {
        float *dlog_f = c->dlog_f + (h * c->G + g) * c->begin[c->N];
        double sum = 0;
        for (i64 t = end - 1; t >= begin; t--) dlog_f[t] = (float)(sum += dlog_f[t]);
    }
}

/* both directions: the backward one if there is a gradient; returns 0, or 1 if memory ran out */
int windows(const Call *c) {
    int failed = 0, backward = c->dout != NULL;
    i64 bytes = c->begin[c->N] * c->H * c->K * size_of(c->dtype);
    in_large_pages(c->o, bytes * c->G), in_large_pages(c->dq, bytes * c->G);
    in_large_pages(c->dk, bytes), in_large_pages(c->dv, bytes);
#pragma omp parallel for schedule(dynamic, 1) num_threads(c->threads)
    for (i64 task = 0; task < c->N * c->H; task++) {
        Space s;
        char *at = space_of_thread_with((intptr_t)arrange(c, backward, &s, NULL));
        if (!at) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        arrange(c, backward, &s, at);
#ifdef TILES
        TileConfig before;
        if (PAIR(c) == 2) open_tiles(&before, 16);
#endif
        sequence(c, &s, task / c->H, task % c->H, backward);
#ifdef TILES
        if (PAIR(c) == 2) close_tiles(&before);
#endif
    }
    return failed;
}
