/* Retention of a block of tokens, after the product `in`: through rings step by step, or in chunks through plain states. */

#pragma once
#include "block.h"

/* the tokens of a sequence through the ring of a head, one after the other; the next head's is asked for before `last` */
static void step_through(Block *b, const Layer *layer, const Memory *ring, i64 s, i64 h, i64 last, float *space) {
    const Reading *c = b->c;
    i64 H = layer->H, K = layer->K, V = layer->V, R = ring->slots, size = size_of(c->dtype), sH = s * H;
    i64 written = ring->written[s], folded = ring->folded[s]; /* all heads count: the ring's own move at the end */
    Step step = {1, H, K, V, R, c->dtype, ring->state_dtype, 1, H, 1, NULL, NULL, NULL, NULL,
                 state_of(ring->state, ring->state_dtype, sH, K, V),
                 (char *)ring->k + sH * R * K * size, (char *)ring->v + sH * R * V * size, NULL,
                 ring->decay + sH * R, &written, &folded};
    for (i64 t = b->begin[s]; t < b->begin[s + 1]; t++) {
        const float *y = b->y + t * b->ld;
        char *q = at_element(b, b->q, t * H * K), *k = at_element(b, b->k, t * H * K);
        char *v = at_element(b, b->v, t * H * V), *o = at_element(b, b->o, t * H * V);
        inputs_of_head(layer, y, b->turn + t * b->turn_ld + layer->turn->at, h, c->dtype, q + h * K * size,
                       k + h * K * size, v + h * V * size, b->log_decay + t * H + h);
        step.q = q, step.k = k, step.v = v, step.o = o, step.log_decay = b->log_decay + t * H;
        step_head(&step, h, last, space);
        if (++written - folded == R) folded += R / 2;
        output_of_head(layer, y, h, c->dtype, o + h * V * size, b->z + (t * H + h) * V);
    }
}

static void by_steps(Block *b, const Layer *layer, Memory *ring, const Self *me) {
    const Reading *c = b->c;
    i64 H = layer->H, first, last;
    share(c->N * H, me->thread, b->threads, &first, &last);
    for (i64 sh = first; sh < last; sh++)
        step_through(b, layer, ring, sh / H, sh % H, smaller(H, last - sh / H * H), me->space);
    ask(b, &layer->out, 1, me);
    meet(c->pool);
    for (i64 s = me->thread; s < c->N; s += b->threads)
        for (i64 t = b->begin[s]; t < b->begin[s + 1]; t++)
            if (++ring->written[s] - ring->folded[s] == ring->slots) ring->folded[s] += ring->slots / 2;
}

static Call call_of(const Block *b, const Layer *layer, const Memory *memory) { /* the operator's */
    i64 H = layer->H, K = layer->K, V = layer->V;
    i64 C = K <= 64 ? 64 : 128; /* as ops/backends.py has it; a divisor of BLOCK_TOKENS */
    Call call = {b->c->N, H, K, V, C, 1, b->c->dtype, pairs_of(b->c->dtype), layer->gated != 0, 1};
    call.q_stride = call.k_stride = H * K, call.v_stride = H * V;
    call.scale = 1, call.begin = b->begin, call.q = b->q, call.k = b->k, call.v = b->v, call.o = b->o;
    call.log_decay = layer->gated ? b->log_decay : layer->log_decay;
    call.state = call.final = memory ? memory->state : NULL;
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

static void by_chunks(Block *b, const Layer *layer, const Memory *memory, const Self *me) {
    const Reading *c = b->c;
    i64 H = layer->H, K = layer->K, V = layer->V, first, last;
    share(b->n, me->thread, b->threads, &first, &last);
    for (i64 th = first * H; th < last * H; th++)
        inputs_of_head(layer, b->y + th / H * b->ld, b->turn + th / H * b->turn_ld + layer->turn->at, th % H, c->dtype,
                       at_element(b, b->q, th * K), at_element(b, b->k, th * K), at_element(b, b->v, th * V),
                       b->log_decay + th);
    meet(c->pool);
    Call call = call_of(b, layer, memory);
    for (i64 sh = me->thread; sh < c->N * H; sh += b->threads)
        if (b->begin[sh / H] < b->begin[sh / H + 1]) chunks_of_head(&call, sh / H, sh % H);
    meet(c->pool);
    for (i64 th = first * H; th < last * H; th++)
        output_of_head(layer, b->y + th / H * b->ld, th % H, c->dtype, at_element(b, b->o, th * V), b->z + th * V);
    meet(c->pool);
}

/* bytes of work space that a thread needs for a layer */
static i64 retention_space(const Block *b, const Layer *layer, const Memory *memory) {
    Space space;
    Call call = call_of(b, layer, NULL);
    if (!b->c->steps) return (i64)(intptr_t)arrange(&call, 0, &space, NULL);
    Step step = {.H = layer->H, .K = layer->K, .V = layer->V, .slots = memory->slots};
    step.state_dtype = memory->state_dtype;
    return step_space(&step) * 4;
}
