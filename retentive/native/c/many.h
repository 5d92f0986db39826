/* Attention of many queries, as prompts have them: products of small matrices in the cache of the processor, a chunk of
keys and a tile of queries at a time, with the softmax kept up to date on the way (online softmax, arXiv 1805.02867).

    S = scale Q K^T + fades       m' = max(m, S)       P = exp(S - m')       O = exp(m - m') O + P V

From the newest chunk to the oldest, so that the log forget gates between a query and a chunk are a running sum.
*/

#pragma once
#include "few.h"

enum { TILE_ROWS = 64, MOST_ROWS = 256 }; /* queries whose scores are computed together; of a task, unless heads are more */

typedef struct { /* of a thread */
    i64 rows, K, pair;                  /* padded; how products are made: pairs_of */
    float *q, *k, *v, *score, *out;     /* units [rows][K]; [CHUNK][K] twice; [TILE_ROWS][CHUNK]; [rows][K] */
    float *k_rows, *kT_panels, *v_panels, *score_rows;
    float *most, *sum, *since;          /* [rows]: so far, and the gates from the chunk to the token */
    float *kept, *fades;                /* [TILE_ROWS] exp(m - m'); [CHUNK] the gates from a key to the last */
    i64 *position, n, keys, window;     /* [CHUNK] of the keys; how many, padded; the first of them that is no sink */
    float gates;                        /* all of the chunk */
} Tiles;

static i64 padded_rows(i64 pair, i64 rows) { return round_up(rows, pair == 2 ? BLOCK : MR); }

/* lays out a space for so many queries from `at` on, returns its end */
static char *arrange_tiles(Tiles *t, i64 dtype, i64 width, i64 queries, char *at) {
    i64 pair = t->pair = pairs_of(dtype), K = t->K = round_up(width, pair == 2 ? BLOCK : WHOLE);
    i64 rows = t->rows = padded_rows(pair, queries), wide = round_up(K, NC);
    t->q = take(&at, rows * K), t->out = take(&at, rows * K);
    t->k = take(&at, CHUNK * K), t->v = take(&at, CHUNK * K), t->k_rows = take(&at, CHUNK * K);
    t->kT_panels = take(&at, CHUNK * K), t->v_panels = take(&at, CHUNK * wide);
    t->score = take(&at, TILE_ROWS * CHUNK), t->score_rows = take(&at, TILE_ROWS * CHUNK);
    t->most = take(&at, rows), t->sum = take(&at, rows), t->since = take(&at, rows);
    t->kept = take(&at, TILE_ROWS), t->fades = take(&at, CHUNK), t->position = (i64 *)take(&at, 2 * CHUNK);
    return at;
}

/* queries of some tokens that share kv head g, as rows: all of a token's, then the next token's */
static void read_queries(Tiles *t, const Block *b, const Layer *layer, const Sight *s, i64 g) {
    i64 H = layer->H, K = layer->K, G = H / layer->kv, rows = (s->last - s->first) * G;
    float *to = t->pair ? t->out : t->q; /* out is not needed yet */
    for (i64 r = 0; r < rows; r++) {
        i64 token = s->token + s->first + r / G;
        read_row(b->c->dtype, at_element(b, b->q, (token * H + g * G + r % G) * K), K, to + r * t->K, t->K);
        t->most[r] = NO_SCORE, t->sum[r] = 0, t->since[r] = 0;
    }
    memset(to + rows * t->K, 0, (t->rows - rows) * t->K * 4);
    if (t->pair) as_rows(1, t->out, t->rows, t->K, t->q);
}

/* the keys and values of kv head g as operands */
static void read_chunk(Tiles *t, const Layer *layer, i64 dtype, const Run *runs, int count, i64 g) {
    i64 K = layer->K, stride = layer->kv * K, offset = g * K * size_of(dtype), n = 0;
    t->window = INT64_MAX;
    for (int r = 0; r < count; n += runs[r++].count) {
        read_rows(dtype, runs[r].k + offset, stride, runs[r].count, K, t->k + n * t->K, t->K, runs[r].count);
        read_rows(dtype, runs[r].v + offset, stride, runs[r].count, K, t->v + n * t->K, t->K, runs[r].count);
        for (i64 j = 0; j < runs[r].count; j++) t->position[n + j] = runs[r].from + j;
        i64 past = larger(runs[r].from, layer->sinks);
        if (past < runs[r].from + runs[r].count) t->window = smaller(t->window, past);
    }
    i64 keys = t->keys = round_up(n, t->pair == 2 ? BLOCK : WHOLE), Ku = t->pair ? t->K / 2 : t->K;
    t->n = n;
    memset(t->k + n * t->K, 0, (keys - n) * t->K * 4), memset(t->v + n * t->K, 0, (keys - n) * t->K * 4);
    as_panels_of_transpose(as_rows(!!t->pair, t->k, keys, t->K, t->k_rows), Ku, keys, Ku, t->kT_panels, Ku);
    as_panels(!!t->pair, t->v, t->K, keys, t->K, t->v_panels);
    t->gates = 0;
    for (int r = count - 1; r >= 0 && layer->gated; r--)
        for (i64 j = runs[r].count - 1; j >= 0; j--) t->fades[--n] = t->gates, t->gates += runs[r].gate[j * layer->H + g];
}

/* the scores of a row, whose token is at position i, become p; what it had before is to be multiplied by `kept` */
static void softmax_row(Tiles *t, const Layer *layer, float *score, i64 i, i64 row, float *kept) {
    float scale = 1 / sqrtf((float)layer->K), before = t->most[row];
    i64 n = t->n, first = t->position[0], last = t->position[n - 1];
    for (i64 j = 0; j < n; j++) score[j] *= scale;
    if (layer->gated && i >= first) {
        if (i <= last) t->since[row] = -t->fades[i - first]; /* positions follow each other where there are gates */
        for (i64 j = 0; j < n; j++) score[j] += t->fades[j] + t->since[row];
        t->since[row] += t->gates;
    }
    if (last > i || (layer->window && t->window <= i - layer->window))
        for (i64 j = 0; j < n; j++)
            if (!sees(layer, i, t->position[j])) score[j] = -INFINITY;
    Softmaxed of;
    softmaxed(score, n, t->keys, before, &of);
    *kept = exp_of(before - of.most);
    t->most[row] = of.most, t->sum[row] = t->sum[row] * *kept + of.sum;
}

/* The scores, not scaled yet, of a head's query with the moving sinks of the chunk, which see another query. */
static void sink_scores(const Tiles *t, const Block *b, const Layer *layer, i64 token, i64 h, float *score) {
    i64 K = layer->K;
    float q[K];
    if (t->position[0] >= layer->sinks) return;
    read_row(b->c->dtype, at_element(b, b->o, (token * layer->H + h) * K), K, q, K);
    for (i64 j = 0; j < t->n && t->position[j] < layer->sinks; j++) score[j] = dot(q, t->k + j * t->K, K);
}

/* whether no token from position i to j sees a key of the chunk */
static int unseen(const Tiles *t, const Layer *layer, i64 i, i64 j) {
    i64 last = t->position[t->n - 1];
    return t->position[0] > j || (layer->window && t->position[0] >= layer->sinks && last <= i - layer->window);
}

/* z of some tokens of a sequence, for all queries of kv head g */
static void many_queries(const Block *b, const Layer *layer, const Memory *memory, const Sight *s, i64 g, float *space) {
    i64 H = layer->H, K = layer->K, G = H / layer->kv, rows = (s->last - s->first) * G, begin = s->start + s->first;
    Tiles t;
    Run runs[MOST_RUNS];
    arrange_tiles(&t, b->c->dtype, K, rows, (char *)space);
    Call how = {.pair = t.pair};
    i64 Ku = t.pair ? t.K / 2 : t.K;
    read_queries(&t, b, layer, s, g);
    memset(t.out, 0, t.rows * t.K * 4);
#ifdef TILES
    TileConfig before;
    if (t.pair == 2) open_tiles(&before, 16);
#endif
    for (i64 chunk = chunks_in(s) - 1; chunk >= 0; chunk--) {
        read_chunk(&t, layer, b->c->dtype, runs, runs_of_chunk(b, layer, memory, s, chunk_start(s, chunk), runs), g);
        for (i64 r = 0; r < rows; r += TILE_ROWS) {
            i64 some = smaller(TILE_ROWS, rows - r), all = padded_rows(t.pair, some);
            if (unseen(&t, layer, begin + r / G, begin + (r + some - 1) / G)) continue;
            multiply(&how, FULL, all, t.keys, Ku, (Operand){t.q + r * Ku, Ku}, (Operand){t.kT_panels, Ku}, NULL, NULL,
                     (Result){t.score, CHUNK, NC});
            for (i64 i = 0; i < some && layer->far_turn; i++) {
                i64 row = r + i, token = s->token + s->first + row / G;
                sink_scores(&t, b, layer, token, g * G + row % G, t.score + i * CHUNK);
            }
            for (i64 i = 0; i < some; i++)
                softmax_row(&t, layer, t.score + i * CHUNK, begin + (r + i) / G, r + i, t.kept + i);
            Operand p = {as_rows(!!t.pair, t.score, all, CHUNK, t.score_rows), t.pair ? CHUNK / 2 : CHUNK};
            i64 units = t.pair ? t.keys / 2 : t.keys;
            float *out = t.out + r * t.K;
            multiply(&how, FULL, all, t.K, units, p, (Operand){t.v_panels, units}, out, t.kept, (Result){out, t.K, NC});
        }
    }
#ifdef TILES
    if (t.pair == 2) close_tiles(&before);
#endif
    for (i64 r = 0; r < rows; r++) {
        float *z = b->z + ((s->token + s->first + r / G) * H + g * G + r % G) * K;
        for (i64 k = 0; k < K; k++) z[k] = t.out[r * t.K + k] / t.sum[r];
    }
}
