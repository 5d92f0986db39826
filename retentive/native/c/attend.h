/* Attention of a block of tokens, after the product `in`: each token sees those before it in its sequence, as far as the
window reaches, and the first ones (sinks).

Threads share heads and chunks of positions. Tokens go into the cache after all have attended, so that in a ring none
takes the slot of one that is still seen.
*/

#pragma once
#include "many.h"

/* whether so many tokens of a sequence go by the keys as `few` */
INLINE int are_few(const Layer *layer, i64 tokens) { return tokens == 1 || tokens * (layer->H / layer->kv) <= FEW_ROWS; }

/* floats of the partial results of a sequence's tokens, which are few */
static i64 partials_of(const Block *b, const Layer *layer, const Sight *s) {
    return chunks_in(s) * (s->last - s->first) * layer->H * partial_ld(b->c->dtype, layer->K);
}

/* room for those of any layer, at most */
static i64 partial_floats(const Block *b) {
    const Reading *c = b->c;
    i64 most = 0;
    for (const Layer *l = c->model->layer; l < c->model->layer + c->model->layers; l++) {
        i64 all = 0;
        for (i64 s = 0; s < c->N && l->kind == ATTENTION; s++) {
            i64 n = c->begin[s + 1] - c->begin[s], chunks = chunks_of(c->position[s] + n);
            if (l->window) chunks = smaller(chunks, chunks_of(l->sinks) + chunks_of(l->window + n) + 1);
            all += smaller(n, larger(1, FEW_ROWS / (l->H / l->kv))) * chunks * l->H * partial_ld(c->dtype, l->K);
        }
        most = larger(most, all);
    }
    return most;
}

/* bytes of work space that a thread needs for a layer */
static i64 attention_space(const Block *b, const Layer *layer) {
    Tiles tiles;
    i64 G = layer->H / layer->kv, most = layer->kv * larger(FEW_ROWS, G), wide = round_up(layer->K, LANES);
    i64 few = (LANES * wide + most * (wide + CHUNK + LANES)) * 4;
    return larger(few, (i64)(intptr_t)arrange_tiles(&tiles, b->c->dtype, layer->K, larger(MOST_ROWS, G), NULL));
}

/* queries, keys, values and log forget gates of this thread's share */
static void attention_inputs(Block *b, const Layer *layer, const Self *me) {
    i64 H = layer->H, K = layer->K, kv = layer->kv, G = H / kv, dtype = b->c->dtype, first, last;
    share(b->n * H, me->thread, b->threads, &first, &last);
    for (i64 th = first; th < last; th++) {
        i64 t = th / H, h = th % H, g = t * kv + h / G;
        const float *y = b->y + t * b->ld, *turn = b->turn + t * b->turn_ld + layer->turn->at;
        float scale = layer->turn->position_scale ? turn[K + h] * sqrtf((float)K) : 1; /* scores are divided later */
        query_of_head(layer, y, turn, h, scale, dtype, at_element(b, b->q, th * K));
        if (layer->far_turn) {
            i64 s = b->sequence[t], position = b->c->position[s] + b->first + t - b->c->begin[s];
            const float *own = position < layer->sinks + layer->window ? turn : layer->far_turn;
            query_of_head(layer, y, own, h, scale, dtype, at_element(b, b->o, th * K));
        }
        if (h % G == 0)
            key_and_value(layer, y, turn, h / G, dtype, at_element(b, b->k, g * K), at_element(b, b->v, g * K));
        if (layer->gated) b->log_decay[th] = log_gate(layer, y, h);
    }
}

/* Chunks and kv heads of all sequences with few tokens, divided evenly; the chunks of a sequence one after the other, as
   they lie in memory, the heads of each together. */
static void few_tasks(Block *b, const Layer *layer, const Memory *memory, const Self *me) {
    i64 kv = layer->kv, all = 0, at = 0, first, last;
    float *partial = b->partial;
    for (i64 s = 0; s < b->c->N; s++) {
        Sight sight = sight_of(b, layer, s, 0, tokens_in(b, s));
        if (sight.last && are_few(layer, sight.last)) all += chunks_in(&sight) * kv;
    }
    share(all, me->thread, b->threads, &first, &last);
    for (i64 s = 0; s < b->c->N; s++) {
        Sight sight = sight_of(b, layer, s, 0, tokens_in(b, s));
        if (!sight.last || !are_few(layer, sight.last)) continue;
        i64 chunks = chunks_in(&sight), floats = partials_of(b, layer, &sight) / chunks;
        for (i64 i = 0; i < chunks; i++, at += kv, partial += floats) {
            Run runs[MOST_RUNS];
            i64 g = larger(first - at, 0), end = smaller(last - at, kv);
            if (g >= end) continue;
            int count = runs_of_chunk(b, layer, memory, &sight, chunk_start(&sight, i), runs);
            chunk_of_few(b, layer, &sight, runs, count, g, end, me->space, partial);
        }
    }
}

/* Sequences with many tokens, in parts of about MOST_ROWS queries; smaller ones where threads would have none. */
static void many_tasks(Block *b, const Layer *layer, const Memory *memory, const Self *me) {
    i64 kv = layer->kv, G = layer->H / kv, some = larger(1, MOST_ROWS / G), task = 0;
    while (some * G > TILE_ROWS && (b->n + some - 1) / some * kv < 2 * b->threads) some = (some + 1) / 2;
    for (i64 s = 0; s < b->c->N; s++)
        for (i64 t = 0, n = tokens_in(b, s); t < n && !are_few(layer, n); t += some) {
            Sight sight = sight_of(b, layer, s, t, smaller(t + some, n));
            for (i64 g = 0; g < kv; g++)
                if (task++ % b->threads == me->thread) many_queries(b, layer, memory, &sight, g, me->space);
        }
}

/* What is left for this thread's share of tokens: partial results become z, and the tokens go into the cache. */
static void finish_attention(Block *b, const Layer *layer, Memory *memory, const Self *me) {
    i64 H = layer->H, K = layer->K, dtype = b->c->dtype, at = 0, first, last;
    const float *partial = b->partial;
    share(b->n * H, me->thread, b->threads, &first, &last);
    for (i64 s = 0; s < b->c->N; s++) {
        i64 n = tokens_in(b, s), few = n && are_few(layer, n);
        Sight sight = sight_of(b, layer, s, 0, n);
        i64 chunks = few ? chunks_in(&sight) : 0, step = n * H * partial_ld(dtype, K);
        for (i64 th = larger(first - at, 0); few && th < smaller(last - at, n * H); th++)
            merge(dtype, K, partial + th * partial_ld(dtype, K), chunks, step, b->z + (sight.token * H + th) * K);
        partial += chunks * step, at += n * H;
        Sight own = sight;
        share(n, me->thread, b->threads, &own.first, &own.last);
        write_to_cache(b, layer, memory, &own, sight.end);
    }
}

static void attend(Block *b, const Layer *layer, Memory *memory, const Self *me) {
    attention_inputs(b, layer, me);
    meet(b->c->pool);
    few_tasks(b, layer, memory, me);
    many_tasks(b, layer, memory, me);
    meet(b->c->pool);
    finish_attention(b, layer, memory, me);
    ask(b, &layer->out, 1, me);
    meet(b->c->pool);
}
