/* A token drawn from logits: temperature, top-k, top-p and min-p, in this order, as infer/sample.py has them. */

#ifndef RETENTIVE_SAMPLE_H
#define RETENTIVE_SAMPLE_H
#include "retentive.h"
#include <math.h>
#include <stdlib.h>

typedef struct {
    const float *logits;
    int64_t best; /* the likeliest token */
    double temperature;
} Distribution;

/* weight of a token, 1 for the likeliest */
static double weight(const Distribution *d, int64_t id) {
    return exp(((double)d->logits[id] - d->logits[d->best]) / d->temperature);
}

/* the order of the filters: likelier tokens first, equal ones by their ids */
static int is_before(const float *logits, int64_t a, int64_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
}

static void swap(int64_t *a, int64_t *b) {
    int64_t moved = *a;
    *a = *b, *b = moved;
}

/* The token with which the sum of weights (of ones, if `counted`) in the order of the filters reaches the goal:
   quickselect, which needs no sorted vocabulary. Tokens up to this one are moved to the front of `ids`. */
static int64_t crossing(const Distribution *d, int64_t *ids, int64_t count, double goal, int counted) {
    double before = 0;
    for (int64_t low = 0, high = count;;) {
        int64_t middle = low;
        double sum = before;
        swap(&ids[low + (high - low) / 2], &ids[high - 1]);
        int64_t pivot = ids[high - 1];
        for (int64_t i = low; i < high - 1; i++)
            if (is_before(d->logits, ids[i], pivot)) {
                sum += counted ? 1 : weight(d, ids[i]);
                swap(&ids[i], &ids[middle++]);
            }
        swap(&ids[middle], &ids[high - 1]);
        double with = sum + (counted ? 1 : weight(d, pivot));
        if (sum >= goal && middle > low) high = middle;
        else if (with >= goal || middle + 1 == high) return pivot;
        else before = with, low = middle + 1;
    }
}

/* the last token of the order that top-k and top-p keep; -1 if they keep all, -2 without memory */
static int64_t last_kept(const Distribution *d, int64_t count, const RetentiveSampling *how) {
    int top_k = how->top_k > 0 && how->top_k < count, top_p = how->top_p > 0 && how->top_p < 1;
    if (!top_k && !top_p) return -1;
    int64_t *ids = malloc(count * sizeof *ids), last = -1;
    if (!ids) return -2;
    for (int64_t i = 0; i < count; i++) ids[i] = i;
    if (top_k) last = crossing(d, ids, count, (double)how->top_k, 1), count = how->top_k;
    if (top_p) { /* a part of what top-k keeps */
        double all = 0;
        for (int64_t i = 0; i < count; i++) all += weight(d, ids[i]);
        last = crossing(d, ids, count, how->top_p * all, 0);
    }
    return free(ids), last;
}

/* the next number of the generator, in [0, 1): SplitMix64 (Steele, Lea and Flood, 2014), for which any seed is good */
static double uniform(uint64_t *random) {
    uint64_t x = *random += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return (double)((x ^ x >> 31) >> 11) * 0x1p-53;
}

int64_t retentive_sample(const float *logits, int64_t vocabulary, const RetentiveSampling *how, uint64_t *random) {
    Distribution d = {logits, 0, fmin(fmax(how->temperature, 1e-6), 1e30)};
    for (int64_t i = 0; i < vocabulary; i++) {
        if (isnan(logits[i])) return -1;
        if (logits[i] > logits[d.best]) d.best = i;
    }
    if (vocabulary < 1 || !isfinite(logits[d.best])) return -1;
    if (how->temperature == 0) return d.best;
    int64_t last = last_kept(&d, vocabulary, how), found = d.best;
    if (last < -1) return -1;
    double sum = 0;
    for (int pass = 0; pass < 2; pass++) { /* all that is kept, then the token in which a part of it ends */
        double goal = pass ? uniform(random) * sum : INFINITY;
        sum = 0;
        for (int64_t i = 0; i < vocabulary; i++) {
            if (last >= 0 && i != last && !is_before(logits, i, last)) continue;
            double w = weight(&d, i);
            if (w < how->min_p || w == 0) continue;
            found = i;
            if ((sum += w) > goal) break;
        }
    }
    return found;
}
#endif
