/* Short causal convolution of a block of tokens, each channel by itself, with y = norm(x):

    x_t += sum_i weight[taps - 1 - i] * y_{t-i}       i = 0 ... taps - 1; y before the block is in the rows of the memory

Threads share channels, so that each reads and writes the rows of its own channels alone. But the norm reads all channels
of x: the sums go into the other residual stream, which then takes the place of x. So the threads meet once, at the end.
*/

#pragma once
#include "block.h"

typedef struct { /* the channels of a thread, from `first` on */
    const float *norm, *weight; /* [D], [taps][D] from there on */
    const float *scale;         /* [n] of the norm, by token */
    i64 first, count;
} Channels;

/* y of a token in these channels */
INLINE void normed_channels(const Block *b, const Channels *c, const Self *me, i64 token, float *restrict y) {
    const float *x = me->x + token * b->c->model->D + c->first;
    for (i64 i = 0; i < c->count; i++) y[i] = x[i] * c->scale[token] * c->norm[i];
}

INLINE void add_times(const float *restrict w, const float *restrict y, i64 n, float *restrict to) {
    for (i64 i = 0; i < n; i++) to[i] += w[i] * y[i];
}

/* The tokens of sequence s, which then go into its rows. The y of as many as there are taps lie in those of the block,
   token t in t mod taps: they stay in the cache. */
static void convolve_sequence(const Block *b, i64 taps, const Memory *memory, i64 s, const Channels *c, const Self *me) {
    i64 D = b->c->model->D, S = memory->slots, n = tokens_in(b, s), begin = b->begin[s];
    const float *newest = c->weight + (taps - 1) * D;
    float *rows = memory->state + s * S * D + c->first, *y = b->y + c->first;
    for (i64 t = 0; t < n; t++) {
        i64 at = (begin + t) * D + c->first;
        float *own = y + t % taps * b->ld, *to = me->other + at;
        normed_channels(b, c, me, begin + t, own);
        for (i64 i = 0; i < c->count; i++) to[i] = newest[i] * own[i];
        for (i64 i = 1; i < taps; i++)
            add_times(newest - i * D, i <= t ? y + (t - i) % taps * b->ld : rows + (S + t - i) * D, c->count, to);
        for (i64 i = 0; i < c->count; i++) to[i] += me->x[at + i];
    }
    for (i64 j = 0; j < S && n; j++) /* the last S of the rows and these tokens */
        if (j + n < S) memcpy(rows + j * D, rows + (j + n) * D, c->count * 4);
        else normed_channels(b, c, me, begin + j + n - S, rows + j * D);
}

static void convolve(Block *b, const Layer *layer, const Memory *memory, Self *me) {
    const Model *m = b->c->model;
    i64 D = m->D, first, last;
    float own[AT_ONCE], *scale = each_alone(b) ? own : b->scale, *x = me->x;
    tokens_of(b, me, &first, &last);
    for (i64 t = first; t < last; t++) scale[t] = scale_of_norm(x + t * D, D, m->eps);
    prepared(b);
    share(whole(D) / ROWS, me->thread, b->threads, &first, &last);
    first *= ROWS, last = smaller(last * ROWS, D);
    Channels channels = {layer->mixer_norm + first, layer->convolution + first, scale, first, last - first};
    for (i64 s = 0; s < b->c->N; s++) convolve_sequence(b, layer->taps, memory, s, &channels, me);
    me->x = me->other, me->other = x;
    meet(b->c->pool);
}
