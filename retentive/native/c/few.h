/* Attention of a few queries, as decoding has them: keys and values come from memory once, in the order in which they
lie, and go by all queries of their kv head.

    score_j = q k_j / sqrt(K) + the log forget gates from j + 1 on      p_j = exp(score_j - m)
    a chunk of positions leaves (m, the sum of p, the sum of its log gates, the sum of p_j v_j) for every query: attend.h

A vector has a number of each of LANES keys, so that no sum crosses vectors but in `folded`. Rows are made of units of 32
bits: a float, or a pair of bfloat16.
*/

#pragma once
#include "cache.h"

enum { FEW_ROWS = 8 }; /* queries of a kv head that go by its keys together */
enum { SOON_BYTES = 24 << 10 }; /* what is read so much later is asked for, into the second cache */
#define NO_SCORE (-1e30f) /* the maximum of no score: finite, since infinity less infinity is NaN */

typedef struct { float most, sum, gates, spare; } Softmaxed; /* before the sums of values of a partial result */

/* numbers of a sum of values: K, or the low and the high halves of pairs, vector by vector */
INLINE i64 sum_floats(i64 dtype, i64 K) { return dtype ? 2 * round_up(K / 2, LANES) : round_up(K, LANES); }
INLINE i64 partial_ld(i64 dtype, i64 K) { return 4 + sum_floats(dtype, K); }

INLINE vf low_halves(vf x) { return (vf)((vi)x << 16); }
INLINE vf high_halves(vf x) { return (vf)((vi)x & -65536); }

INLINE vf add_products(int low, vf a, vf b, vf sum) {
    if (!low || HAVE_PAIRS) return multiply_add(low, a, b, sum);
    return multiply_add(0, high_halves(a), high_halves(b), multiply_add(0, low_halves(a), low_halves(b), sum));
}

/* each of the first `half` vectors and the one `half` further on become one, lane by lane in turn */
INLINE void fold(vf *sum, const int half) {
#pragma GCC unroll 8
    for (int i = 0; i < half; i++)
        sum[i] = __builtin_shufflevector(sum[i], sum[i + half], LOW_HALVES) +
                 __builtin_shufflevector(sum[i], sum[i + half], HIGH_HALVES);
}

/* lane i: the sum of vector i */
INLINE vf folded(vf *sum) {
    if (LANES == 16) fold(sum, 8);
    if (LANES >= 8) fold(sum, 4);
    fold(sum, 2), fold(sum, 1);
    return sum[0];
}

/* Products of a query and LANES keys, each of so many vectors of units. On the way the rows at `soon`, unless NULL, are
   asked for line by line: all at once they would fill the queue of the memory, which then would have nothing to do. */
INLINE vf dots(int low, i64 vectors, const char *k, i64 stride, const float *q, const char *soon) {
    vf sum[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++, k += stride) {
        sum[i] = (vf){0};
#pragma GCC unroll 8
        for (i64 j = 0; j < vectors; j++) {
            if (soon) __builtin_prefetch(soon + i * stride + j * LANES * 4, 0, 2);
            sum[i] = add_products(low, load(q + j * LANES), load((const float *)k + j * LANES), sum[i]);
        }
    }
    return folded(sum);
}

/* sum += p_j v_j of n values, for `vectors` of their units; the low halves of pairs come before the high ones */
INLINE void add_some(int low, i64 vectors, const char *v, i64 stride, i64 n, const float *p, const char *soon, float *sum) {
    vf even[4], odd[4];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++) {
        even[i] = load(sum + (low ? 2 * i : i) * LANES);
        odd[i] = low ? load(sum + (2 * i + 1) * LANES) : even[i];
    }
    for (i64 j = 0; j < n; j++, v += stride) {
        vf factor = splat(p[j]);
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            vf x = load((const float *)v + i * LANES);
            if (soon) __builtin_prefetch(soon + j * stride + i * LANES * 4, 0, 2);
            even[i] = multiply_add(0, factor, low ? low_halves(x) : x, even[i]);
            if (low) odd[i] = multiply_add(0, factor, high_halves(x), odd[i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++) {
        store(sum + (low ? 2 * i : i) * LANES, even[i]);
        if (low) store(sum + (2 * i + 1) * LANES, odd[i]);
    }
}

INLINE void add_values(int low, i64 vectors, const char *v, i64 stride, i64 n, const float *p, const char *soon, float *sum) {
    for (; vectors >= 4; vectors -= 4, v += 4 * LANES * 4, sum += (low ? 8 : 4) * LANES) {
        add_some(low, 4, v, stride, n, p, soon, sum);
        if (soon) soon += 4 * LANES * 4;
    }
    for (; vectors; vectors--, v += LANES * 4, sum += (low ? 2 : 1) * LANES) {
        add_some(low, 1, v, stride, n, p, soon, sum);
        if (soon) soon += LANES * 4;
    }
}

/* scores of a row of positions: what it does not see is -infinity, what it sees fades by the gates up to its own */
static void fade(const Layer *layer, const Run *runs, int count, i64 i, i64 h, float *score, Softmaxed *to) {
    float since = 0;
    i64 at = 0;
    for (int r = 0; r < count; r++) at += runs[r].count;
    for (int r = count - 1; r >= 0; r--)
        for (i64 j = runs[r].count - 1; j >= 0; j--) {
            i64 position = runs[r].from + j;
            float *x = score + --at;
            if (!sees(layer, i, position)) *x = -INFINITY;
            else if (layer->gated) *x += since, since += runs[r].gate[j * layer->H + h];
        }
    to->gates = since;
}

/* p in place of n scores, and zeros up to `wide`, whole vectors; `before` is a maximum that there is already */
static void softmaxed(float *score, i64 n, i64 wide, float before, Softmaxed *to) {
    vf most = splat(before), sum = {0};
    for (i64 j = n; j < wide; j++) score[j] = -INFINITY;
    for (i64 j = 0; j < wide; j += LANES) {
        vf x = load(score + j);
        vi more = x > most;
        most = (vf)(((vi)x & more) | ((vi)most & ~more));
    }
    to->most = before, to->sum = 0;
    for (int l = 0; l < LANES; l++) to->most = most[l] > to->most ? most[l] : to->most;
    for (i64 j = 0; j < wide; j++) score[j] = exp_of(score[j] - to->most);
    for (i64 j = 0; j < wide; j += LANES) sum += load(score + j);
    for (int l = 0; l < LANES; l++) to->sum += sum[l];
}

typedef struct { /* LANES rows of a head's keys or values */
    const char *at;
    i64 stride;
} Rows;

/* n rows as they lie; or, where they are too few or no whole vectors, their copies with zeros at `copy` */
INLINE Rows rows_at(const char *at, i64 stride, i64 n, i64 bytes, i64 padded, char *copy) {
    if (n == LANES && bytes == padded) return (Rows){at, stride};
    memset(copy, 0, LANES * padded);
    for (i64 i = 0; i < n; i++) memcpy(copy + i * padded, at + i * stride, bytes);
    return (Rows){copy, padded};
}

typedef struct { /* one chunk for the kv heads from g to before `last`, and room for it */
    const Block *b;
    const Layer *layer;
    const Sight *s;
    const Run *runs;
    int count;
    i64 g, last, rows, vectors;      /* rows: queries of a kv head; vectors: of a row's units */
    float *copy, *q, *score;         /* [LANES][padded]; [heads][rows][padded]; [heads][rows][CHUNK + LANES] */
    float *to;                       /* partial results of the sequence's tokens and heads */
} Few;

/* The rows that are read SOON_BYTES after those of head g from key j on, or `later` from value j on: the heads in turn, the
   values after the keys, then the next chunk's keys. */
INLINE const char *read_soon(const Few *f, int r, int later, i64 j, i64 g, i64 stride, i64 bytes) {
    const Run *run = f->runs + r;
    for (g += larger(1, SOON_BYTES / (LANES * bytes)); g >= f->last; g -= f->last - f->g) j += LANES;
    i64 past = j - run->count;
    const char *row = past < 0 ? (later ? run->v : run->k) + j * stride : later ? run->k + j * stride : run->v + past * stride;
    return row + g * bytes;
}

INLINE void scores_of_few(int low, i64 vectors, const Few *f) {
    i64 K = f->layer->K, bytes = low ? 2 * K : 4 * K, stride = f->layer->kv * bytes, wide = vectors * LANES, at = 0;
    vf scale = splat(1 / sqrtf((float)K));
    for (int r = 0; r < f->count; at += f->runs[r++].count)
        for (i64 j = 0; j < f->runs[r].count; j += LANES)
            for (i64 g = f->g; g < f->last; g++) {
                const char *from = f->runs[r].k + j * stride + g * bytes;
                Rows k = rows_at(from, stride, smaller(LANES, f->runs[r].count - j), bytes, wide * 4, (char *)f->copy);
                i64 row = (g - f->g) * f->rows, end = row + f->rows;
                float *to = f->score + row * (CHUNK + LANES) + at + j;
                const char *soon = read_soon(f, r, 0, j, g, stride, bytes);
                store(to, dots(low, vectors, k.at, k.stride, f->q + row * wide, soon) * scale);
                while (++row < end)
                    store(to += CHUNK + LANES, dots(low, vectors, k.at, k.stride, f->q + row * wide, NULL) * scale);
            }
}

INLINE void values_of_few(int low, i64 vectors, const Few *f) {
    i64 K = f->layer->K, bytes = low ? 2 * K : 4 * K, stride = f->layer->kv * bytes, at = 0, ld = partial_ld(low, K);
    i64 G = f->layer->H / f->layer->kv;
    for (int r = 0; r < f->count; at += f->runs[r++].count)
        for (i64 j = 0; j < f->runs[r].count; j += LANES)
            for (i64 g = f->g; g < f->last; g++) {
                const char *from = f->runs[r].v + j * stride + g * bytes;
                i64 n = smaller(LANES, f->runs[r].count - j);
                Rows v = rows_at(from, stride, n, bytes, vectors * LANES * 4, (char *)f->copy);
                const char *soon = read_soon(f, r, 1, j, g, stride, bytes);
                const float *p = f->score + (g - f->g) * f->rows * (CHUNK + LANES) + at + j;
                add_values(low, vectors, v.at, v.stride, n, p, soon, f->to + g * G * ld + 4);
                for (i64 row = 1; row < f->rows; row++)
                    add_values(low, vectors, v.at, v.stride, n, p += CHUNK + LANES, NULL,
                               f->to + (row / G * f->layer->H + g * G + row % G) * ld + 4);
            }
}

/* Numbers of vectors that heads have as a rule are known to the compiler, which then keeps a query in registers. */
#define OF_FEW(name, part)                                                                                                 \
    static void name(i64 dtype, const Few *f) {                                                                            \
        if (dtype && f->vectors == 2) part(1, 2, f);                                                                       \
        else if (dtype && f->vectors == 4) part(1, 4, f);                                                                  \
        else if (dtype && f->vectors == 8) part(1, 8, f);                                                                  \
        else if (dtype) part(1, f->vectors, f);                                                                            \
        else part(0, f->vectors, f);                                                                                       \
    }
OF_FEW(scores_of, scores_of_few)
OF_FEW(add_values_of, values_of_few)

/* The score of a head's query with a key, both in `dtype`, of a moving sink, which sees another query. */
static float score_of_sink(const Block *b, const Layer *layer, i64 token, i64 h, const char *key) {
    i64 K = layer->K, dtype = b->c->dtype;
    float q[K], k[K];
    read_row(dtype, at_element(b, b->o, (token * layer->H + h) * K), K, q, K);
    read_row(dtype, key, K, k, K);
    return dot(q, k, K) / sqrtf((float)K);
}

/* the partial results of one chunk for the kv heads from g to before `last`; those of the first token's head 0 at `to` */
static void chunk_of_few(const Block *b, const Layer *layer, const Sight *s, const Run *runs, int count, i64 g, i64 last,
                         float *space, float *to) {
    i64 dtype = b->c->dtype, H = layer->H, K = layer->K, G = H / layer->kv, rows = (s->last - s->first) * G, n = 0;
    i64 wide = round_up(dtype ? K / 2 : K, LANES), ld = partial_ld(dtype, K);
    float *q = space + LANES * wide, *score = q + (last - g) * rows * wide;
    Few few = {b, layer, s, runs, count, g, last, rows, wide / LANES, space, q, score, to};
    for (int r = 0; r < count; r++) n += runs[r].count;
    memset(q, 0, (last - g) * rows * wide * 4);
    for (i64 row = 0; row < (last - g) * rows; row++) {
        i64 token = s->token + row % rows / G, h = (g + row / rows) * G + row % G;
        memcpy(q + row * wide, at_element(b, b->q, (token * H + h) * K), K * size_of(dtype));
    }
    scores_of(dtype, &few);
    for (i64 row = 0; row < (last - g) * rows; row++) {
        i64 token = row % rows / G, h = (g + row / rows) * G + row % G;
        float *own = score + row * (CHUNK + LANES), *partial = to + (token * H + h) * ld;
        Softmaxed *of = (Softmaxed *)partial;
        memset(partial, 0, ld * 4);
        for (int r = 0, at = 0; r < count && layer->far_turn; at += runs[r++].count)
            for (i64 j = 0; j < runs[r].count && runs[r].from + j < layer->sinks; j++) {
                const char *key = runs[r].k + (j * layer->kv + h / G) * K * size_of(dtype);
                own[at + j] = score_of_sink(b, layer, s->token + token, h, key);
            }
        if (layer->gated || s->last - s->first > 1) fade(layer, runs, count, s->start + token, h, own, of);
        softmaxed(own, n, round_up(n, LANES), NO_SCORE, of);
    }
    add_values_of(dtype, &few);
}

/* The softmax over all `chunks` of a query, whose partial results lie `step` apart, the oldest first: z [K]. A chunk's
   scores lack the gates of those after it. */
static void merge(i64 dtype, i64 K, const float *partial, i64 chunks, i64 step, float *z) {
    i64 wide = sum_floats(dtype, K);
    float most = NO_SCORE, since = 0, all = 0, sum[wide];
    memset(sum, 0, wide * 4);
    for (i64 c = chunks - 1; c >= 0; c--) {
        const Softmaxed *of = (const Softmaxed *)(partial + c * step);
        most = of->most + since > most ? of->most + since : most, since += of->gates;
    }
    since = 0;
    for (i64 c = chunks - 1; c >= 0; c--) {
        const Softmaxed *of = (const Softmaxed *)(partial + c * step);
        float weight = exp_of(of->most + since - most);
        since += of->gates, all += weight * of->sum;
        for (i64 i = 0; i < wide; i += LANES)
            store(sum + i, load(sum + i) + splat(weight) * load(partial + c * step + 4 + i));
    }
    all = 1 / all;
    for (i64 i = 0; i < K && !dtype; i++) z[i] = sum[i] * all;
    for (i64 u = 0; u < K / 2 && dtype; u++) {
        const float *at = sum + u / LANES * 2 * LANES + u % LANES;
        z[2 * u] = at[0] * all, z[2 * u + 1] = at[LANES] * all;
    }
}
