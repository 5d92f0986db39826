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

enum { BYTES = 3 }; /* a state_dtype */
#ifdef __wasm__
enum { MAY_BE_NARROW = 0 }; /* states of fewer bits: a page downloads its engine, whose states are float32 */
#else
enum { MAY_BE_NARROW = 1 };
#endif
#ifdef __AVX2__
enum { READS_NARROW = 1 }; /* an instruction makes a vector of them floats */
#else
enum { READS_NARROW = 0 };
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

/* a row of a state of few bits as floats [wide], zeros after V; integers have their scale behind them */
static void read_narrow(i64 dtype, const char *restrict at, i64 V, float *restrict row, i64 wide) {
    float scale;
    if (dtype != BYTES) {
        read_row(dtype, at, V, row, wide);
        return;
    }
    memcpy(&scale, at + V, 4);
    for (i64 j = 0; j < V; j++) row[j] = ((const int8_t *)at)[j] * scale;
    for (i64 j = V; j < wide; j++) row[j] = 0;
}

/* and back, from a row [wide, of whole panels] with zeros after V; what is not finite spoils its row by the scale */
static void write_narrow(i64 dtype, const float *restrict row, i64 V, i64 wide, char *restrict at) {
    int32_t bits = 0; /* of the largest size: such a maximum is one of vectors, unlike that of floats */
    if (dtype != BYTES) {
        write_rows(dtype, row, V, 1, V, at, V);
        return;
    }
    for (i64 j = 0; j < wide; j++) {
        int32_t size;
        memcpy(&size, row + j, 4), size &= INT32_MAX;
        bits = size > bits ? size : bits;
    }
    float most, scale;
    memcpy(&most, &bits, 4), scale = most / 127;
    if (most > 1e-30f && most * 0 == 0) {
        float inverse = 127 / most;
        char bytes[wide];
        for (i64 j = 0; j < wide; j += LANES) /* a number of steps that the compiler knows, so that all are vectors */
            for (int n = 0; n < LANES; n++) bytes[j + n] = (char)(int32_t)rintf(row[j + n] * inverse);
        memcpy(at, bytes, V);
    } else memset(at, 0, V);
    memcpy(at + V, &scale, 4);
}

/* n integers of 8 bits, or numbers of bfloat16, as floats; n is at most what a vector has lanes for, zeros follow */
INLINE vf some_narrow(const int bytes, const char *p, i64 n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    __mmask16 there = (__mmask16)((1u << n) - 1);
    if (bytes) return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, p)));
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, p)), 16);
#endif
    float x[LANES] = {0};
    if (bytes)
        for (i64 i = 0; i < n; i++) x[i] = ((const int8_t *)p)[i];
    else read_row(1, p, n, x, n);
    return load(x);
}

INLINE vf narrow_at(const int bytes, const char *p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if (bytes) return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#endif
    return some_narrow(bytes, p, LANES);
}

/* o += q S of a state of bytes or bfloat16, `rows` of it from row k on; `ahead`: eight rows ask for those two blocks on */
INLINE void some_narrow_rows(const int bytes, const int rows, const int ahead, const char *S, i64 V, const float *q,
                             float *o) {
    i64 width = row_bytes(bytes ? BYTES : 1, V), size = bytes ? 1 : 2, j = 0;
    float factor[8];
    for (int i = 0; i < rows; i++) {
        float scale = 1;
        if (bytes) memcpy(&scale, S + i * width + V, 4);
        factor[i] = q[i] * scale;
    }
    for (; j + LANES <= V; j += LANES) {
        vf x = load(o + j);
        const char *soon = S + 16 * width + 8 * j * size;
        for (int at = 0; ahead && at < 8 * LANES * size; at += 64) __builtin_prefetch(soon + at, 0, 2);
        for (int i = 0; i < rows; i++) x += splat(factor[i]) * narrow_at(bytes, S + i * width + j * size);
        store(o + j, x);
    }
    if (j == V) return;
    vf x = {0};
    for (int i = 0; i < rows; i++) x += splat(factor[i]) * some_narrow(bytes, S + i * width + j * size, V - j);
    for (i64 n = 0; j + n < V; n++) o[j + n] += x[n];
}

INLINE void through_narrow_rows(const int bytes, const int ahead, const char *S, i64 K, i64 V, const float *q, float *o) {
    i64 width = row_bytes(bytes ? BYTES : 1, V), k = 0;
    for (; k + 8 <= K; k += 8) some_narrow_rows(bytes, 8, ahead, S + k * width, V, q + k, o);
    for (; k < K; k++) some_narrow_rows(bytes, 1, 0, S + k * width, V, q + k, o);
}

/* The same for a state of fewer bits. Where it folds, or the CPU does not read vectors of such numbers, eight rows at a
   time become floats in `rows` [8][V, whole panels], and are rounded after a fold; o has as much room. */
static void through_narrow_state(i64 dtype, char *S, i64 K, i64 V, const float *q, float *o, const Fold *fold, float *rows) {
    i64 wide = round_up(V, NC), width = row_bytes(dtype, V);
    if (READS_NARROW && !fold->tokens && dtype == BYTES && asks_ahead()) through_narrow_rows(1, 1, S, K, V, q, o);
    else if (READS_NARROW && !fold->tokens && dtype == BYTES) through_narrow_rows(1, 0, S, K, V, q, o);
    else if (READS_NARROW && !fold->tokens && dtype == 1 && asks_ahead()) through_narrow_rows(0, 1, S, K, V, q, o);
    else if (READS_NARROW && !fold->tokens && dtype == 1) through_narrow_rows(0, 0, S, K, V, q, o);
    else
        for (i64 k = 0, n; k < K; k += n, S += n * width) {
            Fold part = *fold;
            n = smaller(8, K - k), part.k = fold->k + k;
            for (i64 i = 0; i < n; i++) read_narrow(dtype, S + i * width, V, rows + i * wide, wide);
            through_state(rows, n, wide, K, q + k, o, &part);
            for (i64 i = 0; i < n && fold->tokens; i++) write_narrow(dtype, rows + i * wide, V, wide, S + i * width);
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
    i64 K = c->K, V = c->V;
    float since = 0, scale = (float)c->scale;
    for (i64 j = held->tokens - 1; j >= 0; j--) weights[j] = since, since += held->decay[slot_of(held, j)];
    for (i64 j = 0; j < held->tokens; j++) weights[j] = scale * exp_of(weights[j]);
    for (i64 j = 0; j < held->tokens; j++) {
        for (int line = 0; line < 16; line++) __builtin_prefetch(S + (j * 16 + line) * 64);
        weights[j] *= dot(q, held->k + slot_of(held, j) * K, K);
    }
    for (i64 n = 0; n < V && V >= LANES; n += LANES) { /* the last vector makes some numbers of the one before again */
        i64 at = smaller(n, V - LANES);
        vf sum = {0};
        for (i64 j = 0; j < held->tokens; j++) sum += splat(weights[j]) * load(held->v + slot_of(held, j) * V + at);
        store(o + at, sum);
    }
    for (i64 n = 0; n < V && V < LANES; n++) {
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
    i64 wide = round_up(c->V, NC), rows = c->state_dtype ? 8 * wide : 0;
    return c->K + wide + c->slots + c->slots * (c->K + c->V) + c->slots / 2 * (c->K + wide) + rows;
}

static void step_head(const Step *c, i64 bh, i64 end, float *space) {
    i64 K = c->K, V = c->V;
    float *q = space, *o = q + K, *weights = o + round_up(V, NC), *ring = weights + c->slots, *half = ring + c->slots * (K + V);
    char *S = state_of(c->state, c->state_dtype, bh, K, V);
    Held held = put(c, bh, ring);
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
