/* A block of tokens on its way through the layers: what Python hands over, the work space, and how threads share it. */

#pragma once
#include "forward.c"
#include "step.c"
#include "pool.h"
#include "token.h"
#include <stdatomic.h>

typedef struct { /* what a layer remembers of N sequences: a ring or a plain state of retention, a cache of attention, or
                    the last tokens of a convolution */
    float *state;   /* [N][H][K][V]; a plain state is this alone; of a convolution [N][slots][D], the newest last */
    void *k, *v;    /* of a ring [N][H][slots][K] and [V], of a cache [N][slots][kv][K] each */
    float *decay;   /* of a ring [N][H][slots]; of a cache log forget gates [N][slots][H], or NULL */
    i64 *written, *folded;
    i64 slots;       /* 0 of a plain state */
    i64 state_dtype; /* of a ring, as in step.c; all others are float32 */
} Memory;

typedef struct {
    i64 N, steps, dtype, threads; /* sequences; 1: tokens go through rings one by one, 0: in chunks through plain states;
                                     of k and v: 0 float32, 1 bfloat16 */
    Pool *pool;
    const Model *model;
    const i64 *ids, *begin, *position; /* of all tokens, where ~r stands for row r of `rows`; [N + 1] first token of each
                                          sequence; [N] tokens read before */
    const float *rows;                 /* [][D], in place of embeddings */
    Memory *memory;                    /* [layers] */
    float *x;                          /* [tokens][D], what the head is applied to */
} Reading;

enum { BLOCK_TOKENS = 256 }; /* tokens that go through all layers together */

typedef struct {
    const Reading *c;
    i64 n, first, threads;     /* tokens in this block, the first of them, threads at work */
    i64 ld, turn_ld;           /* numbers of a token: in y, the widest product; in `turn` */
    i64 *sequence, *begin;     /* [n] of each token; [N + 1] in this block */
    float *x, *added;          /* [n][D], [n][D, whole panels] */
    float *y, *z, *turn;       /* [n][ld]; [n][H V]; [n][turn_ld] */
    float *other, *scale;      /* [n][D], what x is after a convolution, [n] of the norm; of models that have some */
    void *q, *k, *v, *o;       /* [n][H][K], [n][H][V] in `dtype`; o of attention: queries for moving sinks */
    float *log_decay;          /* [n][H] */
    float *partial;            /* attention's partial results: attend.h */
    Input of_D, of_HV, of_F;   /* products' inputs of three widths */
    uint8_t *expanded;         /* [threads][each] */
    i64 each;
    atomic_int failed;
} Block;

typedef struct {
    i64 thread, first_row;
    float *space;
    uint8_t *expanded;
    float *x, *other; /* the Block's, or the other way round: every convolution swaps them */
} Self; /* a thread; where its rows of inputs begin */

static void share(i64 all, i64 thread, i64 threads, i64 *first, i64 *last) {
    *first = all * thread / threads, *last = all * (thread + 1) / threads;
}

/* of inputs, AT_ONCE rows of which lie in the same lines of memory: two threads would take them from each other */
static void share_rows(i64 rows, i64 thread, i64 threads, i64 *first, i64 *last) {
    share((rows + AT_ONCE - 1) / AT_ONCE, thread, threads, first, last);
    *first *= AT_ONCE, *last = smaller(*last * AT_ONCE, rows);
}

static i64 tokens_in(const Block *b, i64 s) { return b->begin[s + 1] - b->begin[s]; }

/* ---- what is prepared: of few tokens by every thread for itself, of more by each its share ---- */

static int each_alone(const Block *b) { return b->n <= AT_ONCE; }

static void tokens_of(const Block *b, const Self *me, i64 *first, i64 *last) {
    if (each_alone(b)) *first = 0, *last = b->n;
    else share_rows(b->n, me->thread, b->threads, first, last);
}

static void prepared(const Block *b) {
    if (!each_alone(b)) meet(b->c->pool);
}

/* What this thread will read first of w: memory has something to do while threads meet. */
static void ask(const Block *b, const Matrix *w, i64 together, const Self *me) {
    i64 first, last, bytes = lines_of_panel(w) * LINE * together;
    share(panels_of(w) / together, me->thread, b->threads, &first, &last);
    for (i64 at = 0; at < smaller(AHEAD_BYTES, (last - first) * bytes); at += LINE)
        __builtin_prefetch(w->lines + first * bytes + at);
}

/* element i of q, k, v or o */
INLINE void *at_element(const Block *b, void *p, i64 i) { return (char *)p + i * size_of(b->c->dtype); }
