/* Where attention finds keys and values: those of older tokens in the slots of a layer's cache, those of this block's
tokens in its work space, from which they are written to their slots when all queries have been answered.

The token at position p lies in slot p. With a window and `sinks` the first `sinks` slots keep the first tokens, and the
rest of the S slots is a ring: position p >= sinks lies in slot sinks + (p - sinks) mod (S - sinks).
*/

#pragma once
#include "block.h"

enum { CHUNK = 128 }; /* positions whose softmax is computed together; chunks begin at multiples of it, so that sums are
                         made in the same order whatever else is read, and however many threads there are */

typedef struct { /* some tokens of a sequence in this block, and what they can see */
    i64 s, token, start;  /* the sequence, its first token in this block and the position of that */
    i64 first, last, end; /* the tokens, counted from there, and the position after them */
    i64 sinks, low;       /* positions before `sinks` and from `low` on are seen, at least by one of them */
} Sight;

typedef struct { /* keys and values of positions one after the other, `stride` bytes apart for each kv head */
    const char *k, *v;
    const float *gate;
    i64 from, count;
} Run;

enum { MOST_RUNS = 8 };

static Sight sight_of(const Block *b, const Layer *layer, i64 s, i64 first, i64 last) {
    const Reading *c = b->c;
    i64 token = b->begin[s], start = c->position[s] + b->first + token - c->begin[s];
    i64 low = layer->window ? start + first - layer->window + 1 : 0, apart = low > layer->sinks;
    return (Sight){s, token, start, first, last, start + last, apart ? layer->sinks : 0, apart ? low : 0};
}

INLINE i64 chunks_of(i64 positions) { return (positions + CHUNK - 1) / CHUNK; }
/* chunks of sinks alone, and all that hold something seen */
INLINE i64 sink_chunks(const Sight *s) { return smaller(chunks_of(s->sinks), s->low / CHUNK); }
INLINE i64 chunks_in(const Sight *s) { return sink_chunks(s) + chunks_of(s->end) - s->low / CHUNK; }
/* the first position of the i-th of them */
INLINE i64 chunk_start(const Sight *s, i64 i) {
    i64 before = sink_chunks(s);
    return CHUNK * (i < before ? i : s->low / CHUNK + i - before);
}

static i64 slot_at(const Layer *layer, const Memory *memory, i64 p) {
    i64 sinks = layer->sinks;
    return !layer->window || p < sinks ? p : sinks + (p - sinks) % (memory->slots - sinks);
}

/* positions from p to before `end` as runs, which come after those at `to`; where they end */
static Run *add_runs(const Block *b, const Layer *layer, const Memory *memory, const Sight *s, i64 p, i64 end, Run *to) {
    i64 row = layer->kv * layer->K * size_of(b->c->dtype);
    for (i64 count; p < end; p += count) {
        i64 at, in_block = p >= s->start;
        if (in_block) at = s->token + p - s->start, count = end - p;
        else {
            at = slot_at(layer, memory, p), count = smaller(end, s->start) - p;
            if (layer->window && p < layer->sinks) count = smaller(count, layer->sinks - p);
            else if (layer->window) count = smaller(count, memory->slots - at);
            at += s->s * memory->slots;
        }
        const char *k = in_block ? b->k : memory->k, *v = in_block ? b->v : memory->v;
        const float *gate = in_block ? b->log_decay : memory->decay;
        *to++ = (Run){k + at * row, v + at * row, gate ? gate + at * layer->H : NULL, p, count};
    }
    return to;
}

/* what is seen of the chunk that begins at position `first`; how many runs */
static int runs_of_chunk(const Block *b, const Layer *layer, const Memory *memory, const Sight *s, i64 first, Run *runs) {
    i64 last = smaller(first + CHUNK, s->end);
    Run *to = add_runs(b, layer, memory, s, first, smaller(last, s->sinks), runs);
    return (int)(add_runs(b, layer, memory, s, larger(first, s->low), last, to) - runs);
}

/* whether the token at position i sees the one at position j */
INLINE int sees(const Layer *layer, i64 i, i64 j) {
    return j <= i && (!layer->window || j > i - layer->window || j < layer->sinks);
}

/* Tokens into their slots, but for those that a later one of the block, which ends at position `end`, would overwrite. */
static void write_to_cache(const Block *b, const Layer *layer, Memory *memory, const Sight *s, i64 end) {
    i64 H = layer->H, row = layer->kv * layer->K * size_of(b->c->dtype), sinks = layer->sinks;
    for (i64 t = s->first; t < s->last; t++) {
        i64 p = s->start + t;
        if (layer->window && p >= sinks && end - p > memory->slots - sinks) continue;
        i64 from = s->token + t, to = s->s * memory->slots + slot_at(layer, memory, p);
        memcpy((char *)memory->k + to * row, (char *)b->k + from * row, row);
        memcpy((char *)memory->v + to * row, (char *)b->v + from * row, row);
        if (layer->gated) memcpy(memory->decay + to * H, b->log_decay + from * H, H * 4);
    }
}
