/* Tokens of a few sequences through the whole model, in one parallel section: decoding one of each, a few of each as
speculation does, or prompts.

States are rings, into which tokens go one after the other, or plain, for tokens in chunks. The threads share the panels
of every matrix, the tokens, and the heads of every sequence; between phases they meet. The residual stream x, norms,
rotations, sums and states are float32.
*/

#include "forward.c"
#include "step.c"
#include "pool.h"
#include "token.h"
#include <stdatomic.h>

typedef struct { /* of a layer, for N sequences: the tensors of retentive.ops.Ring; a plain state is `state` alone */
    float *state;
    void *k, *v;
    float *decay;
    i64 *written, *folded;
} Rings;

typedef struct {
    i64 N, slots, dtype, threads; /* sequences; of every ring, 0 for plain states; 0 float32, 1 bfloat16: of k and v */
    Pool *pool;
    const Model *model;
    const i64 *ids, *begin, *position; /* of all tokens; [N + 1] first token of each sequence; [N] tokens read before */
    Rings *rings;                      /* [layers] */
    float *x;                          /* [tokens][D], what the head is applied to */
} Reading;

enum { BLOCK_TOKENS = 256 }; /* tokens that go through all layers together */

typedef struct {
    const Reading *c;
    i64 n, first, threads, ld; /* tokens in this block, the first of them, threads at work, the widest product */
    i64 *sequence, *begin;     /* [n] of each token; [N + 1] in this block */
    float *x, *added;          /* [n][D], [n][D, whole panels] */
    float *y, *z, *turn;       /* [n][ld]; [n][H V]; [n][K + H] */
    void *q, *k, *v, *o;       /* [n][H][K], [n][H][V] in `dtype` */
    float *log_decay;          /* [n][H] */
    Input of_D, of_HV, of_F;   /* products' inputs of three widths */
    uint8_t *expanded;         /* [threads][each] */
    i64 each;
    atomic_int failed;
} Block;

typedef struct {
    i64 thread, first_row;
    float *space;
    uint8_t *expanded;
} Self; /* a thread; where its rows of inputs begin */

static void share(i64 all, i64 thread, i64 threads, i64 *first, i64 *last) {
    *first = all * thread / threads, *last = all * (thread + 1) / threads;
}

/* of inputs, AT_ONCE rows of which lie in the same lines of memory: two threads would take them from each other */
static void share_rows(i64 rows, i64 thread, i64 threads, i64 *first, i64 *last) {
    share((rows + AT_ONCE - 1) / AT_ONCE, thread, threads, first, last);
    *first *= AT_ONCE, *last = smaller(*last * AT_ONCE, rows);
}

/* ---- inputs of products: of few tokens every thread prepares all for itself, of more each its share ---- */

static int each_alone(const Block *b) { return b->n <= AT_ONCE; }

static void tokens_of(const Block *b, const Self *me, i64 *first, i64 *last) {
    if (each_alone(b)) *first = 0, *last = b->n;
    else share_rows(b->n, me->thread, b->threads, first, last);
}

static void prepared(const Block *b) {
    if (!each_alone(b)) meet(b->c->pool);
}

/* Prompts, unlike single tokens, may be multiplied by integers as bfloat16, where the model is no more exact itself. */
static Input input_of(const Block *b, const Self *me, const Input *all, const Matrix *w) {
    return input_for(all, w, me->first_row, b->n, b->c->dtype && !b->c->slots);
}

/* norm(x), or x where there is no weight, as input of w */
static Input normed(Block *b, const Self *me, const float *weight, const Matrix *w) {
    i64 D = b->c->model->D, first, last;
    Input in = input_of(b, me, &b->of_D, w);
    float y[D];
    tokens_of(b, me, &first, &last);
    for (i64 r = first; r < last; r++) {
        if (weight) norm_row(b->x + r * D, weight, D, b->c->model->eps, y);
        ready_row(&in, r, weight ? y : b->x + r * D, D);
    }
    prepared(b);
    return in;
}

static Input gated_heads(Block *b, const Self *me, const Matrix *w) { /* z */
    i64 first, last;
    Input in = input_of(b, me, &b->of_HV, w);
    tokens_of(b, me, &first, &last);
    for (i64 r = first; r < last; r++) ready_row(&in, r, b->z + r * w->K, w->K);
    prepared(b);
    return in;
}

static Input activated(Block *b, const Self *me, const Matrix *w) { /* every second panel of y, or every one */
    i64 first, last, together = b->c->model->ffn_gate ? 2 : 1;
    Input in = input_of(b, me, &b->of_F, w);
    float f[whole(w->K)];
    tokens_of(b, me, &first, &last);
    for (i64 r = first; r < last; r++) {
        for (i64 i = 0; i < w->K; i += ROWS) memcpy(f + i, b->y + r * b->ld + i * together, ROWS * 4);
        ready_row(&in, r, f, w->K);
    }
    prepared(b);
    return in;
}

/* What this thread will read first of w: memory has something to do while threads meet. */
static void ask(const Block *b, const Matrix *w, i64 together, const Self *me) {
    i64 first, last, bytes = lines_of_panel(w) * LINE * together;
    share(panels_of(w) / together, me->thread, b->threads, &first, &last);
    for (i64 at = 0; at < smaller(AHEAD_BYTES, (last - first) * bytes); at += LINE)
        __builtin_prefetch(w->lines + first * bytes + at);
}

/* ---- retention ---- */

/* the tokens of a sequence through the ring of a head, one after the other; the next head's is asked for before `last` */
static void step_through(Block *b, const Layer *layer, const Rings *rings, i64 s, i64 h, i64 last, float *space) {
    const Reading *c = b->c;
    const Model *m = c->model;
    i64 H = m->H, K = m->K, V = m->V, R = c->slots, size = size_of(c->dtype), sH = s * H;
    i64 written = rings->written[s], folded = rings->folded[s]; /* all heads count: the ring's own move at the end */
    Step step = {1, H, K, V, R, c->dtype, 1, H, 1, NULL, NULL, NULL, NULL, rings->state + sH * K * V,
                 (char *)rings->k + sH * R * K * size, (char *)rings->v + sH * R * V * size, NULL,
                 rings->decay + sH * R, &written, &folded};
    for (i64 t = b->begin[s]; t < b->begin[s + 1]; t++) {
        const float *y = b->y + t * b->ld;
        char *q = (char *)b->q + t * H * K * size, *k = (char *)b->k + t * H * K * size;
        char *v = (char *)b->v + t * H * V * size, *o = (char *)b->o + t * H * V * size;
        inputs_of_head(m, layer, y, b->turn + t * (K + H), h, c->dtype, q + h * K * size, k + h * K * size,
                       v + h * V * size, b->log_decay + t * H + h);
        step.q = q, step.k = k, step.v = v, step.o = o, step.log_decay = b->log_decay + t * H;
        step_head(&step, h, last, space);
        if (++written - folded == R) folded += R / 2;
        output_of_head(m, layer, y, h, c->dtype, o + h * V * size, b->z + (t * H + h) * V);
    }
}

static void by_steps(Block *b, const Layer *layer, Rings *rings, const Self *me) {
    const Reading *c = b->c;
    i64 H = c->model->H, first, last;
    share(c->N * H, me->thread, b->threads, &first, &last);
    for (i64 sh = first; sh < last; sh++)
        step_through(b, layer, rings, sh / H, sh % H, smaller(H, last - sh / H * H), me->space);
    ask(b, &layer->out, 1, me);
    meet(c->pool);
    for (i64 s = me->thread; s < c->N; s += b->threads)
        for (i64 t = b->begin[s]; t < b->begin[s + 1]; t++)
            if (++rings->written[s] - rings->folded[s] == c->slots) rings->folded[s] += c->slots / 2;
}

static Call call_of(const Block *b, const Rings *rings) { /* the operator's */
    const Model *m = b->c->model;
    i64 bf16 = b->c->dtype == 1, pair = 0;
#ifdef __AVX512BF16__
    pair = bf16;
#endif
#ifdef TILES
    if (bf16 && tiles_are_allowed()) pair = 2;
#endif
    i64 C = m->K <= 64 ? 64 : 128; /* as ops/backends.py has it; a divisor of BLOCK_TOKENS */
    Call call = {b->c->N, m->H, m->K, m->V, C, 1, b->c->dtype, pair, m->gated, 1};
    call.q_stride = call.k_stride = m->H * m->K, call.v_stride = m->H * m->V;
    call.scale = 1, call.begin = b->begin, call.q = b->q, call.k = b->k, call.v = b->v, call.o = b->o;
    call.log_decay = m->gated ? b->log_decay : m->log_decay_f;
    call.state = call.final = rings ? rings->state : NULL;
    return call;
}

static void chunks_of_head(const Call *call, i64 s, i64 h) {
    Space space;
    get_space(call, 0, &space); /* there is memory: through_model has asked for it */
#ifdef TILES
    TileConfig before;
    if (call->pair == 2) open_tiles(&before, 16);
#endif
    forward_head(call, &space, s, h);
#ifdef TILES
    if (call->pair == 2) close_tiles(&before);
#endif
}

static void by_chunks(Block *b, const Layer *layer, const Rings *rings, const Self *me) {
    const Reading *c = b->c;
    const Model *m = c->model;
    i64 H = m->H, K = m->K, V = m->V, size = size_of(c->dtype), first, last;
    share(b->n, me->thread, b->threads, &first, &last);
    for (i64 th = first * H; th < last * H; th++)
        inputs_of_head(m, layer, b->y + th / H * b->ld, b->turn + th / H * (K + H), th % H, c->dtype,
                       (char *)b->q + th * K * size, (char *)b->k + th * K * size, (char *)b->v + th * V * size,
                       b->log_decay + th);
    meet(c->pool);
    Call call = call_of(b, rings);
    for (i64 sh = me->thread; sh < c->N * H; sh += b->threads)
        if (b->begin[sh / H] < b->begin[sh / H + 1]) chunks_of_head(&call, sh / H, sh % H);
    meet(c->pool);
    for (i64 th = first * H; th < last * H; th++)
        output_of_head(m, layer, b->y + th / H * b->ld, th % H, c->dtype, (char *)b->o + th * V * size, b->z + th * V);
    meet(c->pool);
}

/* ---- a layer ---- */

/* x += w input, the panels of this thread */
static void add_product(Block *b, const Matrix *w, const Input *in, const Matrix *next, i64 together, const Self *me) {
    i64 first, last, ld = whole(w->N);
    share(panels_of(w), me->thread, b->threads, &first, &last);
    product(w, in, b->n, first, last, b->added, ld, me->expanded); /* y may still be read by another thread */
    for (i64 r = 0; r < b->n; r++)
        for (i64 i = first * ROWS; i < smaller(last * ROWS, w->N); i++) b->x[r * w->N + i] += b->added[r * ld + i];
    ask(b, next, together, me);
    meet(b->c->pool);
}

static void through_layer(Block *b, i64 l, const Self *me) {
    const Model *m = b->c->model;
    const Layer *layer = m->layer + l;
    i64 first, last, together = m->ffn_gate ? 2 : 1;
    Input in = normed(b, me, layer->retention_norm, &layer->in);
    share(panels_of(&layer->in), me->thread, b->threads, &first, &last);
    product(&layer->in, &in, b->n, first, last, b->y, b->ld, me->expanded);
    meet(b->c->pool);
    if (b->c->slots) by_steps(b, layer, b->c->rings + l, me);
    else by_chunks(b, layer, b->c->rings + l, me);
    in = gated_heads(b, me, &layer->out);
    add_product(b, &layer->out, &in, &layer->up, together, me);

    in = normed(b, me, layer->ffn_norm, &layer->up);
    share(panels_of(&layer->up) / together, me->thread, b->threads, &first, &last);
    product(&layer->up, &in, b->n, first * together, last * together, b->y, b->ld, me->expanded);
    for (i64 r = 0; r < b->n; r++)
        for (i64 panel = first; panel < last; panel++) { /* over the gates, where nobody else reads */
            float *y = b->y + r * b->ld + panel * together * ROWS;
            activate(m->activation, y, m->ffn_gate ? y + ROWS : NULL, ROWS, y);
        }
    ask(b, &layer->down, 1, me);
    meet(b->c->pool);
    in = activated(b, me, &layer->down);
    add_product(b, &layer->down, &in, l + 1 < m->layers ? &m->layer[l + 1].in : &m->head, 1, me);
}

/* ---- the model ---- */

/* the next tokens, at most BLOCK_TOKENS */
static void next_block(Block *b) {
    const Reading *c = b->c;
    b->first += b->n;
    b->n = smaller(c->begin[c->N] - b->first, BLOCK_TOKENS);
    for (i64 s = 0; s <= c->N; s++) {
        i64 at = c->begin[s] - b->first;
        b->begin[s] = at < 0 ? 0 : smaller(at, b->n);
    }
    for (i64 s = 0; s < c->N; s++)
        for (i64 t = b->begin[s]; t < b->begin[s + 1]; t++) b->sequence[t] = s;
}

static void through_block(Block *b, const Self *me) {
    const Reading *c = b->c;
    const Model *m = c->model;
    i64 first, last;
    share(b->n, me->thread, b->threads, &first, &last);
    for (i64 t = first; t < last; t++) {
        i64 all = b->first + t, s = b->sequence[t];
        embed(m, c->ids[all], b->x + t * m->D);
        turn_at(m, c->position[s] + all - c->begin[s], b->turn + t * (m->K + m->H));
    }
    meet(c->pool);
    for (i64 l = 0; l < m->layers; l++) through_layer(b, l, me);
    for (i64 t = first; t < last; t++) {
        float *x = b->x + t * m->D, *to = c->x + (b->first + t) * m->D;
        if (m->final_norm) norm_row(x, m->final_norm, m->D, m->eps, to);
        else memcpy(to, x, m->D * 4);
    }
}

static void through_model(void *what, int thread) {
    Block *b = what;
    const Reading *c = b->c;
    const Model *m = c->model;
    Call call = call_of(b, NULL);
    Space space;
    i64 bytes = c->slots ? step_space(&(Step){c->N, m->H, m->K, m->V, c->slots}) * 4
                         : (i64)(intptr_t)arrange(&call, 0, &space, NULL);
    Self me = {thread, each_alone(b) ? thread * APART : 0, space_of_thread_with(bytes),
               b->expanded + thread * b->each};
    if (!me.space) atomic_store(&b->failed, 1);
    meet(c->pool);
    if (atomic_load(&b->failed)) return; /* all threads see it, and nothing is written yet */
    while (b->n) {
        through_block(b, &me);
        meet(c->pool);
        if (!thread) next_block(b);
        meet(c->pool);
        me.first_row = each_alone(b) ? thread * APART : 0;
    }
}

/* lays out the work space of so many tokens from `at` on; returns its end */
static char *arrange_block(Block *b, i64 n, char *at) {
    const Model *m = b->c->model;
    i64 up = rows_up(m), in = rows_in(m), HV = m->H * m->V;
    i64 each = APART * b->threads; /* the last block may be of few */
    i64 rows = n > each ? n : each;
    b->ld = in > up ? in : up;
    b->sequence = (i64 *)take(&at, 2 * n), b->begin = (i64 *)take(&at, 2 * (b->c->N + 1));
    b->x = take(&at, n * m->D), b->added = take(&at, n * whole(m->D));
    b->y = take(&at, n * b->ld), b->z = take(&at, n * HV);
    b->turn = take(&at, n * (m->K + m->H)), b->log_decay = take(&at, n * m->H);
    b->q = take(&at, n * m->H * m->K), b->k = take(&at, n * m->H * m->K);
    b->v = take(&at, n * HV), b->o = take(&at, n * HV);
    b->of_D = input_at(&at, rows, m->D), b->of_HV = input_at(&at, rows, HV), b->of_F = input_at(&at, rows, m->F);
    i64 wide = HV > m->F ? HV : m->F;
    b->each = expanded_bytes(wide > m->D ? wide : m->D);
    b->expanded = (uint8_t *)take(&at, b->threads * b->each / 4);
    return at;
}

/* ---- what Python calls ---- */

/* All tokens of the sequences, whose states have then read them; positions are the caller's. 1: no memory. */
int native_read(const Reading *c) {
    i64 tokens = c->begin[c->N];
    Block b = {c};
    b.threads = smaller(c->threads, c->pool->threads);
    char *at = space_of_pool(c->pool, (i64)(intptr_t)arrange_block(&b, smaller(tokens, BLOCK_TOKENS), NULL));
    if (!at) return 1;
    arrange_block(&b, smaller(tokens, BLOCK_TOKENS), at);
    next_block(&b);
    run(c->pool, (int)b.threads, through_model, &b);
    return atomic_load(&b.failed);
}

typedef struct {
    i64 n, dtype, threads; /* dtype as of a Reading */
    Pool *pool;
    const Matrix *head;
    const float *x; /* [n][D] */
    float *logits;  /* [n][vocab, whole panels] */
    Input in;
    uint8_t *expanded;
} Heading;
_Static_assert(sizeof(void *) < 8 || sizeof(Heading) == 7 * 8 + 72, "library.py leaves as much room");

enum { HEAD_ROWS = 256, MANY = 64 }; /* at a time: their inputs stay in the cache; more than are decoded together */

static void through_head(void *what, int thread) {
    Heading *c = what;
    const Matrix *head = c->head;
    i64 first, last, wide = whole(head->N);
    for (i64 at = 0, n; at < c->n; at += n) {
        n = smaller(HEAD_ROWS, c->n - at);
        Input in = input_for(&c->in, head, 0, n, c->dtype && c->n > MANY);
        share_rows(n, thread, c->threads, &first, &last);
        for (i64 r = first; r < last; r++) ready_row(&in, r, c->x + (at + r) * head->K, head->K);
        meet(c->pool);
        share(panels_of(head), thread, c->threads, &first, &last);
        product(head, &in, n, first, last, c->logits + at * wide, wide, c->expanded + thread * expanded_bytes(head->K));
        meet(c->pool);
    }
}

/* logits = head x. 1: no memory. */
int native_head(Heading *c) {
    i64 rows = smaller(c->n, HEAD_ROWS), room = c->threads * expanded_bytes(c->head->K);
    char *at = NULL;
    c->threads = smaller(c->threads, c->pool->threads);
    for (int pass = 0; pass < 2; pass++) { /* first its size */
        c->in = input_at(&at, rows, c->head->K), c->expanded = (uint8_t *)take(&at, room / 4);
        if (!pass && !(at = space_of_pool(c->pool, (i64)(intptr_t)at))) return 1;
    }
    run(c->pool, (int)c->threads, through_head, c);
    return 0;
}

/* what the compiler was allowed to use, of what the code has a path for */
const char *native_instructions(void) {
    return ""
#if defined(__AVX512F__)
           "AVX-512"
#elif defined(__AVX2__) && defined(__FMA__)
           "AVX2"
#elif defined(__AVX__)
           "AVX"
#elif defined(__SSE2__)
           "SSE2"
#elif defined(__ARM_NEON)
           "NEON"
#elif defined(__wasm_simd128__)
           "WASM SIMD"
#else
           "plain C"
#endif
#ifdef __AVX512VNNI__
           " VNNI"
#endif
#ifdef __AVX512BF16__
           " BF16"
#endif
#ifdef TILES
           " AMX"
#endif
#ifdef __ARM_FEATURE_DOTPROD
           " DOTPROD"
#endif
#ifdef __ARM_FEATURE_MATMUL_INT8
           " I8MM"
#endif
        ;
}

/* whether the system gives this process the tiles of AMX, and the compiler knew them */
int native_has_tiles(void) {
#ifdef TILES
    return tiles_are_allowed();
#else
    return 0;
#endif
}

Pool *native_open(i64 threads) { return open_pool((int)threads); }
void native_close(Pool *pool) { close_pool(pool); }
