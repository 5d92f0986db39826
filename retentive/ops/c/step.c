/* Decode step for one token. The formulas are those of ring.py. Needs no other .c file. */

#include "memory.h"
#include "products.h"

/* struct Step of cpu.py */
typedef struct {
    i64 B, H, K, V, slots, dtype, state_dtype, threads, decay_stride; /* decay_stride: 0, or H for a decay per row */
    double scale;
    const void *q, *k, *v; /* [B,H,K], [B,H,V], contiguous */
    const float *log_decay;
    void *state;              /* [B,H,K,V] in state_dtype; BYTES: [B,H,K,V + 4], integers and their scale */
    void *ring_k, *ring_v, *o; /* [B,H,slots,K], [B,H,slots,V], [B,H,V] */
    float *ring_decay;        /* [B,H,slots] */
    i64 *written, *folded;    /* [B] */
} Step;

#ifdef __wasm__
enum { MAY_BE_NARROW = 0 }; /* states of fewer bits: a page downloads its engine, whose states are float32 */
#else
enum { MAY_BE_NARROW = 1 };
#endif

/* bytes of a row of a state, V numbers */
INLINE i64 row_bytes(i64 state_dtype, i64 V) { return state_dtype == BYTES ? V + 4 : V * size_of(state_dtype); }

/* the state of head `bh` */
INLINE char *state_of(void *state, i64 state_dtype, i64 bh, i64 K, i64 V) {
    return (char *)state + bh * K * row_bytes(state_dtype, V);
}

typedef struct { /* the part of a full ring that is folded into the state: S = kept * S + sum over `tokens` of k v^T */
    i64 tokens;
    float *k, *v_panels; /* [tokens][K], weighted; operand for the V columns */
    float kept[8];       /* one number, repeated */
} Fold;

/* Returns 1 if a step that only reads should prefetch a float32 state, two blocks of eight rows ahead. Intel's hardware
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

/* the nearest integers, whose size is below 128, as bytes */
INLINE void write_bytes(vf x, int8_t *to) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)x)));
#elif defined(__AVX2__)
    __m256i whole = _mm256_cvtps_epi32((__m256)x);
    __m128i y = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packs_epi16(y, y));
#elif defined(__SSE2__) && !defined(__AVX__)
    __m128i y = _mm_cvtps_epi32((__m128)x);
    y = _mm_packs_epi32(y, y);
    int32_t four = _mm_cvtsi128_si32(_mm_packs_epi16(y, y));
    memcpy(to, &four, 4);
#else
    for (int n = 0; n < LANES; n++) to[n] = (int8_t)(int32_t)rintf(x[n]);
#endif
}

/* Rounds n rows of at most 8, floats [wide, whole panels] with zeros after V, to rows of a state of few bits. What is not
   finite spoils its row by the scale. */
INLINE void write_narrow(const int dtype, const int n, const float *rows, i64 V, i64 wide, char *S) {
    i64 width = row_bytes(dtype, V);
    if (dtype != BYTES) {
        for (int i = 0; i < n; i++) write_rows(dtype, rows + i * wide, V, 1, V, S + i * width, V);
        return;
    }
    int32_t bits[8] = {0}; /* of the largest size: such a maximum is one of vectors, unlike that of floats */
    float largest[8], inverse[8];
    vi most[8] = {{0}};
    for (i64 j = 0; j < wide; j += LANES)
        for (int i = 0; i < n; i++) {
            vi size = (vi)load(rows + i * wide + j) & INT32_MAX, more = size > most[i];
            most[i] = (size & more) | (most[i] & ~more);
        }
    for (int i = 0; i < n; i++)
        for (int lane = 0; lane < LANES; lane++) bits[i] = most[i][lane] > bits[i] ? most[i][lane] : bits[i];
    memcpy(largest, bits, sizeof bits);
    for (int i = 0; i < 8; i++) inverse[i] = 127 / largest[i];
    for (int i = 0; i < n; i++, rows += wide, S += width) {
        float scale = largest[i] / 127;
        memcpy(S + V, &scale, 4);
        if (!(largest[i] > 1e-30f && largest[i] * 0 == 0)) {
            memset(S, 0, V);
            continue;
        }
        int8_t last[LANES];
        i64 j = 0;
        for (; j + LANES <= V; j += LANES) write_bytes(load(rows + j) * splat(inverse[i]), (int8_t *)S + j);
        if (j < V) write_bytes(load(rows + j) * splat(inverse[i]), last), memcpy(S + j, last, V - j);
    }
}

/* o += q S for n rows of a state of few bits and one vector of columns, `lanes` of which exist; factor is q times scale.
   If `rows` is not NULL, they become floats [n][wide] there. */
INLINE void narrow_columns(const int dtype, const int n, i64 lanes, const char *S, i64 width, const float *factor,
                           const float *scale, float *o, float *rows, i64 wide) {
    vf x = load(o);
    for (int i = 0; i < n; i++) {
        vf y = lanes == LANES ? all_of(dtype, S + i * width) : some_of(dtype, S + i * width, lanes);
        x += splat(factor[i]) * y;
        if (rows) store(rows + i * wide, dtype == BYTES ? y * splat(scale[i]) : y);
    }
    store(o, x);
}

/* The same for all columns, with zeros after V in `rows`. A block of eight rows prefetches the one two blocks ahead, on all
   processors: unlike with float32 states, this is faster on AMD, too (docs/LOG.md). */
INLINE void narrow_block(const int dtype, const int n, const char *S, i64 V, const float *q, float *o, float *rows, i64 wide) {
    i64 width = row_bytes(dtype, V), size = dtype == BYTES ? 1 : 2, j = 0;
    float scale[8], factor[8];
    for (int i = 0; i < n; i++) {
        scale[i] = 1;
        if (dtype == BYTES) memcpy(scale + i, S + i * width + V, 4);
        factor[i] = q[i] * scale[i];
    }
    for (; j + LANES <= V; j += LANES) {
        const char *soon = S + 16 * width + 8 * j * size;
        for (int at = 0; n == 8 && at < 8 * LANES * size; at += 64) __builtin_prefetch(soon + at, 0, 2);
        narrow_columns(dtype, n, LANES, S + j * size, width, factor, scale, o + j, rows ? rows + j : NULL, wide);
    }
    if (j < V) {
        narrow_columns(dtype, n, V - j, S + j * size, width, factor, scale, o + j, rows ? rows + j : NULL, wide);
        j += LANES;
    }
    for (; rows && j < wide; j += LANES)
        for (int i = 0; i < n; i++) store(rows + i * wide + j, (vf){0});
}

/* through_rows for n rows of a state of few bits, from row k on; o has room for whole panels. Rows that are folded into
   become floats in `rows` [8][V, whole panels], and are rounded again. */
INLINE void through_narrow_rows(const int dtype, const int n, char *S, i64 k, i64 K, i64 V, const float *q, float *o,
                                const Fold *fold, float *rows) {
    i64 wide = round_up(V, NC);
    S += k * row_bytes(dtype, V);
    if (!fold->tokens) {
        narrow_block(dtype, n, S, V, q + k, o, NULL, wide);
        return;
    }
    narrow_block(dtype, n, S, V, q + k, o, rows, wide);
    for (i64 j = 0; j < wide; j += NC)
        for (int i = 0; i < n; i += MR) { /* a tile has MR rows; those after the n-th are of no account */
            float *to = rows + i * wide + j;
            tile(0, 2, fold->tokens, fold->k + k + i, 1, K, fold->v_panels + j * fold->tokens, to, fold->kept, to, wide);
        }
    write_narrow(dtype, n, rows, V, wide, S);
}

INLINE void through_narrow(const int dtype, char *S, i64 K, i64 V, const float *q, float *o, const Fold *fold, float *rows) {
    i64 k = 0;
    for (; k + 8 <= K; k += 8) through_narrow_rows(dtype, 8, S, k, K, V, q, o, fold, rows);
    for (; k < K; k++) through_narrow_rows(dtype, 1, S, k, K, V, q, o, fold, rows);
}

static void through_narrow_state(i64 dtype, char *S, i64 K, i64 V, const float *q, float *o, const Fold *fold,
                                 float *rows) {
    if (dtype == BYTES) through_narrow(BYTES, S, K, V, q, o, fold, rows);
    else if (dtype == 1) through_narrow(1, S, K, V, q, o, fold, rows);
    else through_narrow(2, S, K, V, q, o, fold, rows);
}

typedef struct { /* tokens in the ring of a head, oldest first; token j is in slot_of(held, j) */
    i64 slots, first, tokens;
    const char *k, *v; /* [slots][K], [slots][V], in the step's dtype */
    const float *decay;
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

/* puts the new token into the ring */
static Held put(const Step *c, i64 bh) {
    i64 K = c->K, V = c->V, R = c->slots, size = size_of(c->dtype), b = bh / c->H, slot = c->written[b] % R;
    char *k = (char *)c->ring_k + bh * R * K * size, *v = (char *)c->ring_v + bh * R * V * size;
    float *decay = c->ring_decay + bh * R;
    memcpy(k + slot * K * size, element(c->k, c->dtype, bh * K), K * size);
    memcpy(v + slot * V * size, element(c->v, c->dtype, bh * V), V * size);
    decay[slot] = bounded(c->log_decay[b * c->decay_stride + bh % c->H]);
    return (Held){R, c->folded[b] % R, c->written[b] - c->folded[b] + 1, k, v, decay};
}

/* weights[j] *= q k_j, o = sum of weights[j] v_j; o has room for a vector more. Prefetches one kB of the state S per token,
   since memory is otherwise idle here. */
INLINE void through_tokens(const int dtype, i64 K, i64 V, const Held *held, const float *q, float *o, float *weights,
                           const char *S) {
    i64 size = size_of(dtype), whole = K / LANES * LANES, rest = K - whole;
    for (i64 j = 0; j < held->tokens; j++) {
        const char *k = held->k + slot_of(held, j) * K * size;
        for (int line = 0; line < 16; line++) __builtin_prefetch(S + (j * 16 + line) * 64);
        vf sum = {0};
        for (i64 n = 0; n < whole; n += LANES) sum += load(q + n) * all_of(dtype, k + n * size);
        if (rest) sum += some_of(0, (const char *)(q + whole), rest) * some_of(dtype, k + whole * size, rest);
        weights[j] *= sum_of(sum);
    }
    for (i64 n = 0; n < V; n += LANES) { /* the last vector makes some numbers of the one before again */
        i64 at = larger(0, smaller(n, V - LANES)), lanes = smaller(V, LANES);
        vf sum = {0};
        for (i64 j = 0; j < held->tokens; j++) {
            const char *v = held->v + (slot_of(held, j) * V + at) * size;
            sum += splat(weights[j]) * (lanes == LANES ? all_of(dtype, v) : some_of(dtype, v, lanes));
        }
        store(o + at, sum);
    }
}

/* o = scale * sum of exp(G - G_j) (q k_j) v_j; returns scale * exp(G) */
static float through_ring(const Step *c, const Held *held, const float *q, float *o, float *weights, const char *S) {
    float since = 0, scale = (float)c->scale;
    for (i64 j = held->tokens - 1; j >= 0; j--) weights[j] = since, since += held->decay[slot_of(held, j)];
    for (i64 j = 0; j < held->tokens; j++) weights[j] = scale * exp_of(weights[j]);
    if (c->dtype == 0) through_tokens(0, c->K, c->V, held, q, o, weights, S);
    else if (c->dtype == 1) through_tokens(1, c->K, c->V, held, q, o, weights, S);
    else through_tokens(2, c->K, c->V, held, q, o, weights, S);
    return scale * exp_of(since);
}

/* returns the older half of a full ring, weighted; no tokens if the ring is not full */
static Fold ripe(const Step *c, const Held *held, float *space) {
    i64 K = c->K, V = c->V, size = size_of(c->dtype), tokens = held->tokens == held->slots ? held->slots / 2 : 0;
    Fold fold = {tokens, space, space + tokens * K, {0}};
    float since = 0; /* log decay from token j to the newest folded token */
    for (i64 j = tokens - 1; j >= 0; j--) {
        i64 at = slot_of(held, j);
        float weight = exp_of(since), *k = fold.k + j * K;
        read_row(c->dtype, held->k + at * K * size, K, k, K);
        for (i64 n = 0; n < K; n++) k[n] *= weight;
        for (i64 n = 0; n < V; n += NC)
            read_row(c->dtype, held->v + (at * V + n) * size, smaller(NC, V - n), fold.v_panels + n * tokens + j * NC, NC);
        since += held->decay[at];
    }
    float kept = exp_of(since);
    for (int i = 0; i < 8; i++) fold.kept[i] = kept;
    return fold;
}

static i64 step_space(const Step *c) { /* in floats: q and o, weights, the folded tokens, rows of the state */
    i64 wide = round_up(c->V, NC), rows = c->state_dtype ? 8 * wide : 0;
    return c->K + wide + c->slots + c->slots / 2 * (c->K + wide) + rows;
}

static void step_head(const Step *c, i64 bh, i64 end, float *space) {
    i64 K = c->K, V = c->V;
    float *q = space, *o = q + K, *weights = o + round_up(V, NC), *half = weights + c->slots;
    char *S = state_of(c->state, c->state_dtype, bh, K, V);
    Held held = put(c, bh);
    read_row(c->dtype, element(c->q, c->dtype, bh * K), K, q, K);
    float remains = through_ring(c, &held, q, o, weights, S);
    for (i64 n = 0; n < K; n++) q[n] *= remains;
    Fold fold = ripe(c, &held, half);
    if (bh + 1 < end) ask_ring(c, bh + 1);
    float *rows = half + c->slots / 2 * (K + round_up(V, NC));
    if (MAY_BE_NARROW && c->state_dtype) through_narrow_state(c->state_dtype, S, K, V, q, o, &fold, rows);
    else if (asks_ahead()) through_rows((float *)S, K, V, K, q, o, &fold, 2);
    else through_state((float *)S, K, V, K, q, o, &fold);
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
            const char *state = state_of(c->state, c->state_dtype, begin, c->K, c->V);
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
