/* The memories of several sequences: rings of retention and the last tokens of convolutions, which stay as they are, and
caches of attention, which grow with the longest sequence, up to the window. */

#pragma once
#include "folder.h"
#include "block.h"

struct RetentiveStates {
    Retentive *model;
    i64 count, dtype, bytes; /* sequences; of k and v; all memory */
    Memory *memory;          /* [layers], of `count` sequences */
    char **held;             /* [layers] what they lie in */
    i64 *position;           /* [count] */
};

static const Model *model_of(const RetentiveStates *s) { return &s->model->folder.model; }

/* Slots of a layer before the first token: those of a ring for which the fewest bytes move, as in ops/ring.py, or as many
   as a convolution reaches back. */
static i64 slots_for(const Layer *l) {
    if (l->kind == ATTENTION) return 0;
    if (l->kind == CONVOLUTION) return l->taps - 1;
    double ideal = sqrt(l->K * l->V / (1.5 * (l->K + l->V)));
    i64 half = (i64)exp2(rint(log2(ideal)));
    return 2 * (half < 2 ? 2 : half);
}

/* lays out a layer's memory with so many slots from `at` on, returns its end */
static char *arrange_memory(const RetentiveStates *s, const Layer *l, i64 slots, char *at, Memory *m) {
    i64 N = s->count, H = l->H, cached = N * slots * l->kv * l->K;
    *m = (Memory){.slots = slots};
    if (l->kind == CONVOLUTION) return m->state = take(&at, N * slots * model_of(s)->D), at;
    if (l->kind == ATTENTION) {
        m->k = take(&at, cached), m->v = take(&at, cached), m->decay = l->gated ? take(&at, N * slots * H) : NULL;
        return at;
    }
    m->state = take(&at, N * H * l->K * l->V);
    m->k = take(&at, N * H * slots * l->K), m->v = take(&at, N * H * slots * l->V), m->decay = take(&at, N * H * slots);
    m->written = (i64 *)take(&at, 2 * N), m->folded = (i64 *)take(&at, 2 * N);
    return at;
}

/* the memory of a layer from a sequence on */
static Memory memory_from(const RetentiveStates *s, i64 layer, i64 n) {
    const Layer *l = model_of(s)->layer + layer;
    const Memory *m = s->memory + layer;
    i64 H = l->H, size = size_of(s->dtype), slots = n * m->slots;
    if (l->kind == CONVOLUTION) return (Memory){.state = m->state + slots * model_of(s)->D, .slots = m->slots};
    if (l->kind == ATTENTION) {
        i64 row = l->kv * l->K * size;
        return (Memory){NULL, (char *)m->k + slots * row, (char *)m->v + slots * row,
                        m->decay ? m->decay + slots * H : NULL, NULL, NULL, m->slots};
    }
    return (Memory){m->state + n * H * l->K * l->V,
                    (char *)m->k + slots * H * l->K * size,
                    (char *)m->v + slots * H * l->V * size,
                    m->decay + slots * H,
                    m->written + n,
                    m->folded + n,
                    m->slots};
}

/* tokens that a layer's cache keeps at most; 0: all, or it has no cache */
static i64 most_cached(const Layer *l) { return l->window ? l->sinks + l->window : 0; }

/* tokens of a sequence that a layer's cache holds */
static i64 cached_tokens(const Layer *l, i64 position) {
    return l->window ? smaller(position, most_cached(l)) : position;
}

/* the first `tokens` slots of a cache to another one, of the same layer */
static void copy_slots(const RetentiveStates *s, const Layer *l, const Memory *from, const Memory *to, i64 tokens) {
    i64 row = l->kv * l->K * size_of(s->dtype);
    memmove(to->k, from->k, tokens * row), memmove(to->v, from->v, tokens * row);
    if (l->gated) memmove(to->decay, from->decay, tokens * l->H * 4);
}

/* Other memory for a layer, of so many slots, with what was in the caches before; 0 where there was none. */
static int resize_memory(RetentiveStates *s, i64 layer, i64 slots) {
    const Layer *l = model_of(s)->layer + layer;
    Memory before = s->memory[layer], after;
    char *held = s->held[layer];
    i64 bytes = (intptr_t)arrange_memory(s, l, slots, NULL, &after);
    char *memory = aligned_alloc(64, round_up(bytes ? bytes : 64, 64));
    if (!memory) return 0;
    memset(memory, 0, bytes);
    arrange_memory(s, l, slots, memory, &after);
    for (i64 n = 0; n < s->count && held; n++) {
        Memory from = memory_from(s, layer, n);
        s->memory[layer] = after;
        Memory to = memory_from(s, layer, n);
        copy_slots(s, l, &from, &to, cached_tokens(l, s->position[n]));
        s->memory[layer] = before;
    }
    Memory unused;
    s->bytes += bytes - (held ? (intptr_t)arrange_memory(s, l, before.slots, NULL, &unused) : 0);
    s->memory[layer] = after, s->held[layer] = memory;
    free(held);
    return 1;
}

/* Room for so many tokens a sequence. Caches grow by half at least, so that tokens one by one are seldom copied. */
static int reserve(RetentiveStates *s, i64 tokens) {
    const Model *m = model_of(s);
    for (i64 i = 0; i < m->layers; i++) {
        const Layer *l = m->layer + i;
        i64 have = s->memory[i].slots, wanted = cached_tokens(l, tokens);
        if (l->kind == ATTENTION && have < wanted &&
            !resize_memory(s, i, cached_tokens(l, larger(wanted, have * 3 / 2))))
            return 0;
    }
    return 1;
}

static void free_states(RetentiveStates *s) {
    for (i64 i = 0; s && s->held && i < model_of(s)->layers; i++) free(s->held[i]);
    if (s) free(s->held), free(s->memory), free(s->position);
    free(s);
}

static RetentiveStates *new_states(Retentive *model, i64 count) {
    const Model *m = &model->folder.model;
    RetentiveStates *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->model = model, s->count = count, s->dtype = model->folder.dtype;
    s->memory = calloc(m->layers, sizeof *s->memory), s->held = calloc(m->layers, sizeof *s->held);
    s->position = calloc(count, sizeof *s->position), s->bytes = count * 8;
    for (i64 i = 0; s->memory && s->held && s->position && i < m->layers; i++) {
        if (!resize_memory(s, i, slots_for(m->layer + i))) break;
        if (i + 1 == m->layers) return s;
    }
    return free_states(s), NULL;
}

/* the tokens in a ring go into its state: S = exp(G) S + sum of exp(G - G_j) k_j v_j^T */
static void settle_layer(const RetentiveStates *s, const Layer *l, const Memory *r) {
    i64 K = l->K, V = l->V, R = r->slots, size = size_of(s->dtype), held = *r->written - *r->folded;
    float k[K], v[V];
    for (i64 h = 0; h < l->H && held; h++) {
        float *S = r->state + h * K * V, weight[R];
        double since = 0;
        for (i64 j = held - 1; j >= 0; j--)
            weight[j] = (float)exp(since), since += r->decay[h * R + (*r->folded + j) % R];
        for (i64 i = 0; i < K * V; i++) S[i] *= (float)exp(since);
        for (i64 j = 0; j < held; j++) {
            i64 slot = h * R + (*r->folded + j) % R;
            read_row(s->dtype, (char *)r->k + slot * K * size, K, k, K),
                read_row(s->dtype, (char *)r->v + slot * V * size, V, v, V);
            for (i64 a = 0; a < K; a++)
                for (i64 b = 0; b < V; b++) S[a * V + b] += weight[j] * k[a] * v[b];
        }
    }
    *r->written = *r->folded = 0;
}

static void settle(RetentiveStates *s, i64 n) {
    const Model *m = model_of(s);
    for (i64 i = 0; i < m->layers; i++) {
        Memory r = memory_from(s, i, n);
        if (m->layer[i].kind == RETENTION) settle_layer(s, m->layer + i, &r);
    }
}

/* sequence `from` over sequence `to` */
static void copy_sequence(RetentiveStates *s, i64 to, i64 from) {
    const Model *m = model_of(s);
    settle(s, from);
    for (i64 i = 0; i < m->layers; i++) {
        const Layer *l = m->layer + i;
        Memory a = memory_from(s, i, from), b = memory_from(s, i, to);
        if (l->kind == ATTENTION) copy_slots(s, l, &a, &b, cached_tokens(l, s->position[from]));
        else if (l->kind == CONVOLUTION) memmove(b.state, a.state, a.slots * m->D * 4);
        else memmove(b.state, a.state, l->H * l->K * l->V * 4), *b.written = *b.folded = 0;
    }
    s->position[to] = s->position[from];
}
