/* Decode step for one token. The formulas are those of ring.py. Needs no other .c file. */

#include "memory.h"
#include "products.h"

/* struct Step of cpu.py */
typedef struct {
    i64 B, H, K, V, slots, dtype, state_dtype, threads, decay_stride; /* decay_stride: 0, or H for a decay per row */
    double scale;
    const void *q, *k, *v; /* [B,H,K], [B,H,V], contiguous */
    const float *log_decay;
    void *state;              /* [B,H,K,V] in state_dtype */
    void *ring_k, *ring_v, *o; /* [B,H,slots,K], [B,H,slots,V], [B,H,V] */
    float *ring_decay;        /* [B,H,slots] */
    i64 *written, *folded;    /* [B] */
} Step;

typedef struct { /* the part of a full ring that is folded into the state: S = kept * S + sum over `tokens` of k v^T */
    i64 tokens;
    float *k, *v_panels; /* [tokens][K], weighted; operand for the V columns */
    float kept[8];       /* one number, repeated */
} Fold;

/* Returns 1 if a step that only reads should prefetch the state, two blocks of eight rows ahead. Intel's hardware
   prefetcher restarts at every 4 kB page; AMD's follows by itself and does better without help (docs/LOG.md). */
static int asks_ahead(void) {
#if defined(__x86_64__)
    return __builtin_cpu_is("intel");
#else
    return 0;
#endif
}

/* o += q S, eight rows of S at a time, folding into them while they are in the cache. `ahead` is a constant, `ld` the
   stride of the folded k. */
INLINE void through_rows(float *restrict S, i64 K, i64 V, i64 ld, const float *q, float *restrict o, const Fold *fold,
                         const int ahead) {
    i64 whole = V / LANES * LANES;
    /* hardware prefetchers do not follow during a fold, so prefetch the block 8 kB ahead, or the next one */
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
                    if (whole - j > LANES) tile(0, 2, fold->tokens, fold->k + k + i, 1, ld, v, to, fold->kept, to, V);
                    else tile(0, 1, fold->tokens, fold->k + k + i, 1, ld, v, to, fold->kept, to, V);
                }
        for (i64 i = 0; i < rows; i++)
            for (i64 j = rows == 8 ? whole : 0; j < V; j++) {
                float x = S[i * V + j] * fold->kept[0];
                const float *v = fold->v_panels + j / NC * NC * fold->tokens + j % NC;
                for (i64 t = 0; t < fold->tokens; t++) x += fold->k[t * ld + k + i] * v[t * NC];
                S[i * V + j] = x;
            }
    }
}

/* the same without asking ahead; one copy of the code for all who do not, since a page downloads its engine */
__attribute__((noinline)) static void through_state(float *S, i64 K, i64 V, i64 ld, const float *q, float *o,
                                                    const Fold *fold) {
    through_rows(S, K, V, ld, q, o, fold, 0);
}

/* The same for a state of 16 bits: eight rows at a time become floats in `rows` [8][V], and 16 bits again after a fold.
   A step moves half of the bytes, and rounds each number once a fold. */
static void through_narrow_state(i64 dtype, void *S, i64 K, i64 V, const float *q, float *o, const Fold *fold, float *rows) {
    for (i64 k = 0, n; k < K; k += n) {
        void *at = (void *)element(S, dtype, k * V);
        Fold part = *fold;
        n = smaller(8, K - k), part.k = fold->k + k;
        read_row(dtype, at, n * V, rows, n * V);
        through_state(rows, n, V, K, q + k, o, &part);
        if (fold->tokens) write_rows(dtype, rows, n * V, 1, n * V, at, n * V);
    }
}

typedef struct { /* tokens in the ring of a head, oldest first; token j is in slot_of(held, j) */
    i64 slots, first, tokens;
    const float *k, *v, *decay; /* indexed by slot */
} Held;

INLINE i64 slot_of(const Held *held, i64 j) {
    i64 slot = held->first + j;
    return slot < held->slots ? slot : slot - held->slots;
}

/* Prefetches a head's ring rows. They are few and scattered, so the step would wait for each of them. */
static void ask_ring(const Step *c, i64 bh) {
    i64 b = bh / c->H, R = c->slots, size = size_of(c->dtype), k_bytes = c->K * size, v_bytes = c->V * size;
    __builtin_prefetch(c->ring_decay + bh * R);
    for (i64 t = c->folded[b]; t < c->written[b]; t++) {
        i64 at = bh * R + t % R;
        for (i64 n = 0; n < k_bytes; n += 64) __builtin_prefetch((const char *)c->ring_k + at * k_bytes + n);
        for (i64 n = 0; n < v_bytes; n += 64) __builtin_prefetch((const char *)c->ring_v + at * v_bytes + n);
    }
}

/* puts the new token into the ring; returns all its tokens as float32, converted into `space` if they are 16-bit */
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
    for (i64 j = 0, run; j < held.tokens; j += run) { /* up to the end of the ring, then from its start */
        i64 at = slot_of(&held, j);
        run = smaller(held.tokens - j, R - at);
        read_row(c->dtype, k + at * K * size, run * K, space + at * K, run * K);
        read_row(c->dtype, v + at * V * size, run * V, space + R * K + at * V, run * V);
    }
    return held;
}

/* o = scale * sum of exp(G - G_j) (q k_j) v_j; returns scale * exp(G). Prefetches one kB of the state S per token,
   since memory is otherwise idle here. */
static float through_ring(const Step *c, const Held *held, const float *q, float *o, float *weights, const char *S) {
    i64 K = c->K, V = c->V, whole = V / LANES * LANES;
    float since = 0, scale = (float)c->scale;
    for (i64 j = held->tokens - 1; j >= 0; j--) weights[j] = since, since += held->decay[slot_of(held, j)];
    for (i64 j = 0; j < held->tokens; j++) weights[j] = scale * exp_of(weights[j]);
    for (i64 j = 0; j < held->tokens; j++) {
        for (int line = 0; line < 16; line++) __builtin_prefetch(S + (j * 16 + line) * 64);
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

/* returns the older half of a full ring, weighted; no tokens if the ring is not full */
static Fold ripe(const Step *c, const Held *held, float *space) {
    i64 K = c->K, V = c->V, tokens = held->tokens == held->slots ? held->slots / 2 : 0;
    Fold fold = {tokens, space, space + tokens * K, {0}};
    float since = 0; /* log decay from token j to the newest folded token */
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

static i64 step_space(const Step *c) { /* in floats: q and o, weights, the ring, the folded tokens, rows of the state */
    i64 rows = c->state_dtype ? 8 * c->V : 0;
    return c->K + c->V + c->slots + c->slots * (c->K + c->V) + c->slots / 2 * (c->K + round_up(c->V, NC)) + rows;
}

static void step_head(const Step *c, i64 bh, i64 end, float *space) {
    i64 K = c->K, V = c->V;
    float *q = space, *o = q + K, *weights = o + V, *ring = weights + c->slots, *half = ring + c->slots * (K + V);
    void *S = (void *)element(c->state, c->state_dtype, bh * K * V);
    Held held = put(c, bh, ring);
    read_row(c->dtype, element(c->q, c->dtype, bh * K), K, q, K);
    float remains = through_ring(c, &held, q, o, weights, S);
    for (i64 n = 0; n < K; n++) q[n] *= remains;
    Fold fold = ripe(c, &held, half);
    if (bh + 1 < end) ask_ring(c, bh + 1);
    float *rows = half + c->slots / 2 * (K + round_up(V, NC));
    if (c->state_dtype) through_narrow_state(c->state_dtype, S, K, V, q, o, &fold, rows);
    else if (asks_ahead()) through_rows(S, K, V, K, q, o, &fold, 2);
    else through_state(S, K, V, K, q, o, &fold);
    write_rows(c->dtype, o, V, 1, V, (char *)c->o + bh * V * size_of(c->dtype), V);
}

/* Returns 0; 1 if memory ran out; 2, with nothing written, if a log decay is above 0 or a head's is NaN. A token's NaN
 * passes: see decay.check_values */
int retention_step(const Step *c) {
    i64 heads = c->B * c->H;
    int failed = 0;
    for (i64 i = 0; i < (c->decay_stride ? heads : c->H); i++)
        if (c->decay_stride ? c->log_decay[i] > 0 : !(c->log_decay[i] <= 0)) return 2;
#pragma omp parallel for schedule(static) num_threads(c->threads)
    for (i64 part = 0; part < c->threads; part++) {
        i64 begin = heads * part / c->threads, end = heads * (part + 1) / c->threads;
        float *space = space_of_thread_with(step_space(c) * 4);
        if (!space) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        if (begin < end) { /* the state first: its address is known, that of the ring's rows must be read */
            const char *state = element(c->state, c->state_dtype, begin * c->K * c->V);
            for (int line = 0; line < 32; line++) __builtin_prefetch(state + line * 64);
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
