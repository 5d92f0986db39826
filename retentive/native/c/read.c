/* Tokens of a few sequences through the whole model, in one parallel section: decoding one of each, a few of each as
speculation does, or prompts.

The threads share the panels of every matrix, the tokens, and the heads of every sequence; between phases they meet. The
residual stream x, norms, rotations, sums and states are float32.
*/

#include "attend.h"
#include "convolve.h"
#include "retain.h"

/* ---- inputs of products ---- */

/* Prompts, unlike single tokens, may be multiplied by integers as bfloat16, where the model is no more exact itself. */
static Input input_of(const Block *b, const Self *me, const Input *all, const Matrix *w) {
    return input_for(all, w, me->first_row, b->n, b->c->dtype && !b->c->steps);
}

/* norm(x), or x where there is no weight, as input of w */
static Input normed(Block *b, const Self *me, const float *weight, const Matrix *w) {
    i64 D = b->c->model->D, first, last;
    Input in = input_of(b, me, &b->of_D, w);
    float y[D];
    tokens_of(b, me, &first, &last);
    for (i64 r = first; r < last; r++) {
        if (weight) norm_row(me->x + r * D, weight, D, b->c->model->eps, y);
        ready_row(&in, r, weight ? y : me->x + r * D, D);
    }
    prepared(b);
    return in;
}

static Input mixed_heads(Block *b, const Layer *layer, const Self *me) { /* z */
    const Matrix *w = &layer->out;
    i64 first, last;
    Input in = input_of(b, me, &b->of_HV, w);
    tokens_of(b, me, &first, &last);
    float z[w->K]; /* a copy: each thread may do this for all tokens */
    for (i64 r = first; r < last; r++) {
        memcpy(z, b->z + r * w->K, w->K * 4);
        output_of_heads(layer, b->y + r * b->ld, z);
        ready_row(&in, r, z, w->K);
    }
    prepared(b);
    return in;
}

/* every panel of y, or every second one */
static Input activated(Block *b, const Self *me, const Matrix *w, i64 together) {
    i64 first, last;
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

/* ---- a layer ---- */

typedef struct { const Matrix *matrix; i64 together; } Next; /* what is multiplied next, and its panels that belong together */

static Next up_of(const Layer *layer) { return (Next){&layer->up, together(layer)}; }

/* the first matrix from layer l on: a convolution has none of its own */
static Next next_from(const Model *m, i64 l) {
    for (; l < m->layers; l++)
        if (m->layer[l].kind != CONVOLUTION) return (Next){&m->layer[l].in, 1};
        else if (m->layer[l].F) return up_of(m->layer + l);
    return (Next){&m->head, 1};
}

/* x += w input, the panels of this thread */
static void add_product(Block *b, const Matrix *w, const Input *in, Next next, const Self *me) {
    i64 first, last, ld = whole(w->N);
    share(panels_of(w), me->thread, b->threads, &first, &last);
    product(w, in, b->n, first, last, b->added, ld, me->expanded); /* y may still be read by another thread */
    for (i64 r = 0; r < b->n; r++)
        for (i64 i = first * ROWS; i < smaller(last * ROWS, w->N); i++) me->x[r * w->N + i] += b->added[r * ld + i];
    ask(b, next.matrix, next.together, me);
    meet(b->c->pool);
}

/* y += biases of q, k and v, in the panels of this thread */
static void add_bias(Block *b, const Layer *layer, i64 first, i64 last) {
    i64 end = smaller(last * ROWS, row_of_gate(layer));
    for (i64 r = 0; r < b->n && layer->in_bias; r++)
        for (i64 i = first * ROWS; i < end; i++) b->y[r * b->ld + i] += layer->in_bias[i];
}

/* x += feed-forward layer */
static void feed_forward(Block *b, const Layer *layer, Next next, const Self *me) {
    i64 first, last, each = together(layer);
    Input in = normed(b, me, layer->ffn_norm, &layer->up);
    share(panels_of(&layer->up) / each, me->thread, b->threads, &first, &last);
    product(&layer->up, &in, b->n, first * each, last * each, b->y, b->ld, me->expanded);
    for (i64 r = 0; r < b->n; r++)
        for (i64 panel = first; panel < last; panel++) { /* over the gates, where nobody else reads */
            float *y = b->y + r * b->ld + panel * each * ROWS;
            activate(layer->activation, y, layer->ffn_gate ? y + ROWS : NULL, ROWS, y);
        }
    ask(b, &layer->down, 1, me);
    meet(b->c->pool);
    in = activated(b, me, &layer->down, each);
    add_product(b, &layer->down, &in, next, me);
}

/* x += retention or attention; `next` is what follows the layer's own */
static void mix_heads(Block *b, const Layer *layer, Memory *memory, Next next, const Self *me) {
    i64 first, last;
    Input in = normed(b, me, layer->mixer_norm, &layer->in);
    share(panels_of(&layer->in), me->thread, b->threads, &first, &last);
    product(&layer->in, &in, b->n, first, last, b->y, b->ld, me->expanded);
    add_bias(b, layer, first, last);
    meet(b->c->pool);
    if (layer->kind == ATTENTION) attend(b, layer, memory, me);
    else if (b->c->steps) by_steps(b, layer, memory, me);
    else by_chunks(b, layer, memory, me);
    in = mixed_heads(b, layer, me);
    add_product(b, &layer->out, &in, layer->F ? up_of(layer) : next, me);
}

static void through_layer(Block *b, i64 l, Self *me) {
    const Model *m = b->c->model;
    const Layer *layer = m->layer + l;
    Next next = next_from(m, l + 1);
    if (layer->kind == CONVOLUTION) convolve(b, layer, b->c->memory + l, me);
    else mix_heads(b, layer, b->c->memory + l, next, me);
    if (layer->F) feed_forward(b, layer, next, me);
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

static void through_block(Block *b, Self *me) {
    const Reading *c = b->c;
    const Model *m = c->model;
    i64 first, last;
    share(b->n, me->thread, b->threads, &first, &last);
    for (i64 t = first; t < last; t++) {
        i64 all = b->first + t, s = b->sequence[t], id = c->ids[all], position = c->position[s] + all - c->begin[s];
        embed(m, id, id < 0 ? c->rows + ~id * m->D : NULL, me->x + t * m->D);
        for (i64 i = 0; i < m->turns; i++) turn_at(m->turn + i, position, b->turn + t * b->turn_ld + m->turn[i].at);
    }
    meet(c->pool);
    for (i64 l = 0; l < m->layers; l++) through_layer(b, l, me);
    for (i64 t = first; t < last; t++) {
        float *x = me->x + t * m->D, *to = c->x + (b->first + t) * m->D;
        if (m->final_norm) norm_row(x, m->final_norm, m->D, m->eps, to);
        else memcpy(to, x, m->D * 4);
    }
}

/* bytes of work space that a thread needs for layer l */
static i64 space_for_layer(const Block *b, i64 l) {
    const Layer *layer = b->c->model->layer + l;
    if (layer->kind == CONVOLUTION) return 0;
    return layer->kind == ATTENTION ? attention_space(b, layer) : retention_space(b, layer, b->c->memory + l);
}

static void through_model(void *what, int thread) {
    Block *b = what;
    const Reading *c = b->c;
    i64 bytes = 1;
    for (i64 l = 0; l < c->model->layers; l++) bytes = larger(bytes, space_for_layer(b, l));
    Self me = {thread, each_alone(b) ? thread * APART : 0, space_of_thread_with(bytes),
               b->expanded + thread * b->each, b->x, b->other};
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

typedef struct { i64 HK, HV, H, F, y, convolved; } Widths; /* the widest of all layers; convolved: D or 0 */

static Widths widths_of(const Model *m) {
    Widths w = {0};
    for (const Layer *l = m->layer; l < m->layer + m->layers; l++) {
        w.HK = larger(w.HK, l->H * l->K), w.HV = larger(w.HV, l->H * l->V), w.H = larger(w.H, l->H);
        w.F = larger(w.F, l->F), w.y = larger(w.y, larger(rows_in(l), rows_up(l)));
        if (l->kind == CONVOLUTION) w.convolved = m->D, w.y = larger(w.y, m->D);
    }
    return w;
}

/* lays out the work space of so many tokens from `at` on; returns its end */
static char *arrange_block(Block *b, i64 n, char *at) {
    const Model *m = b->c->model;
    Widths w = widths_of(m);
    i64 D = m->D, rows = larger(n, APART * b->threads); /* the last block may be of few */
    b->ld = w.y, b->turn_ld = turn_floats(m);
    b->sequence = (i64 *)take(&at, 2 * n), b->begin = (i64 *)take(&at, 2 * (b->c->N + 1));
    b->x = take(&at, n * D), b->added = take(&at, n * whole(D));
    b->other = take(&at, n * w.convolved), b->scale = take(&at, w.convolved ? n : 0);
    b->y = take(&at, n * b->ld), b->z = take(&at, n * w.HV);
    b->turn = take(&at, n * b->turn_ld), b->log_decay = take(&at, n * w.H);
    b->q = take(&at, n * w.HK), b->k = take(&at, n * w.HK);
    b->v = take(&at, n * w.HV), b->o = take(&at, n * w.HV);
    b->partial = take(&at, partial_floats(b));
    b->of_D = input_at(&at, rows, D), b->of_HV = input_at(&at, rows, w.HV), b->of_F = input_at(&at, rows, w.F);
    b->each = expanded_bytes(larger(D, larger(w.HV, w.F)));
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
_Static_assert(sizeof(void *) < 8 || sizeof(Heading) == 7 * 8 + 88, "library.py leaves as much room");

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
