/* What is computed for a token alone, in float32: norms, gates, the embedding, rotation, queries and keys, decays. */

#pragma once
#include "model.h"

INLINE float scale_of_norm(const float *x, i64 n, double eps) { return 1 / sqrtf(dot(x, x, n) / n + (float)eps); }

static void norm_row(const float *x, const float *weight, i64 n, double eps, float *y) {
    float scale = scale_of_norm(x, n, eps);
    if (weight)
        for (i64 i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
    else
        for (i64 i = 0; i < n; i++) y[i] = x[i] * scale;
}

INLINE float sigmoid(float x) { /* plain arithmetic, so that loops of it become vectors */
    float e = exp_of(-fabsf(x));
    return (x >= 0 ? 1 : e) / (1 + e) + x * 0; /* exp_of would make NaN a number */
}

/* y = the activation of x, times z where there is one */
static void activate(i64 kind, const float *x, const float *z, i64 n, float *y) {
    if (kind == GELU)
        for (i64 i = 0; i < n; i++) y[i] = 0.5f * x[i] * (1 + erff(x[i] * 0.70710678f)) * (z ? z[i] : 1);
    else if (kind == SIGMOID)
        for (i64 i = 0; i < n; i++) y[i] = sigmoid(x[i]) * (z ? z[i] : 1);
    else
        for (i64 i = 0; i < n; i++) y[i] = sigmoid(x[i]) * x[i] * (z ? z[i] : 1);
}

/* row `id` of a matrix as floats */
static void row_of_matrix(const Matrix *m, i64 id, float *to) {
    i64 lines = lines_of_panel(m), groups = groups_of(m);
    const uint8_t *at = m->lines + id / ROWS * lines * LINE + id % ROWS * 4;
    i64 of_row = id / ROWS * groups * ROWS + id % ROWS;
    for (i64 k = 0; k < m->K; k++) {
        const uint8_t *unit = at + k / columns_of_unit(m->kind) * LINE;
        i64 j = k % columns_of_unit(m->kind);
        float scale = 0, least = 0;
        uint16_t pair[2];
        if (groups) read_row(2, m->scales + of_row + k / m->group * ROWS, 1, &scale, 1);
        if (m->least) read_row(2, m->minimums + of_row + k / m->group * ROWS, 1, &least, 1);
        memcpy(pair, unit, 4);
        if (m->kind == FLOAT32) memcpy(to + k, unit, 4);
        else if (m->kind == BFLOAT16) to[k] = from_bf16(pair[j]);
        else if (m->kind == INT8) to[k] = (unit[j] - 128) * scale;
        else to[k] = ((unit[j / 2] >> j % 2 * 4 & 15) - (m->least ? 0 : 8)) * scale + least;
    }
}

/* the embedding of token `id`, or of a row in its place, as a picture or sound has them; then scaled and normalised */
static void embed(const Model *m, i64 id, const float *row, float *x) {
    if (row) memcpy(x, row, m->D * 4);
    else row_of_matrix(&m->embed, id, x);
    for (i64 i = 0; i < m->D; i++) x[i] *= (float)m->embed_scale;
    if (m->embed_norm) norm_row(x, m->embed_norm, m->D, m->eps, x);
}

/* Numbers of a token at `position` for all layers that share a turn: cosines and sines [K / 2], and the scale of q by head
   [H], as rotary.phases and decay.row_norm have them. */
static void turn_at(const Turn *t, i64 position, float *turn) {
    i64 half_K = t->K / 2;
    for (i64 i = 0; i < half_K; i++) {
        double angle = t->frequency ? position * t->frequency[i] : 0;
        turn[i] = (float)cos(angle), turn[half_K + i] = (float)sin(angle);
    }
    for (i64 h = 0; h < t->H; h++) {
        double scale = 1 / sqrt((double)t->K), n = position + 1.0;
        if (t->row_norm) scale /= sqrt(t->log_decay[h] < 0 ? expm1(n * t->log_decay[h]) / expm1(t->log_decay[h]) : n);
        if (t->position_scale) scale *= log(position + t->position_scale) / log(t->position_scale);
        turn[t->K + h] = (float)scale;
    }
}

/* a query or key of a head: normalised, shifted, rotated, scaled */
static void feature(const Layer *layer, const float *x, const float *norm, const float *bias, const float *turn,
                    float scale, float *to) {
    i64 K = layer->K, half_K = K / 2;
    float y[K];
    if (norm) norm_row(x, norm, K, layer->eps, y);
    else memcpy(y, x, K * 4);
    for (i64 i = 0; i < K && bias; i++) y[i] += bias[i];
    if (layer->turn->halves)
        for (i64 i = 0; i < half_K; i++) {
            to[i] = scale * (y[i] * turn[i] - y[i + half_K] * turn[half_K + i]);
            to[i + half_K] = scale * (y[i + half_K] * turn[i] + y[i] * turn[half_K + i]);
        }
    else
        for (i64 i = 0; i < half_K; i++) {
            to[2 * i] = scale * (y[2 * i] * turn[i] - y[2 * i + 1] * turn[half_K + i]);
            to[2 * i + 1] = scale * (y[2 * i + 1] * turn[i] + y[2 * i] * turn[half_K + i]);
        }
}

/* The query of head h of a token, [K] in `dtype`, from the products `in` of the token, y. */
static void query_of_head(const Layer *layer, const float *y, const float *turn, i64 h, float scale, i64 dtype,
                          void *q) {
    i64 K = layer->K;
    float x[K];
    feature(layer, y + h * K, layer->q_norm, layer->q_bias ? layer->q_bias + h * K : NULL, turn, scale, x);
    write_rows(dtype, x, K, 1, K, q, K);
}

/* The key [K] and value [V] of kv head g of a token. */
static void key_and_value(const Layer *layer, const float *y, const float *turn, i64 g, i64 dtype, void *k, void *v) {
    i64 K = layer->K, V = layer->V;
    float x[K];
    feature(layer, y + row_of_k(layer) + g * K, layer->k_norm, layer->k_bias ? layer->k_bias + g * K : NULL, turn, 1, x);
    write_rows(dtype, x, K, 1, K, k, K);
    write_rows(dtype, y + row_of_v(layer) + g * V, V, 1, V, v, V);
}

/* The logarithm of a token's gate: its decay in retention (`of_tokens` of ops/decay.py), forgetting in attention. */
static float log_gate(const Layer *layer, const float *y, i64 h) {
    float z = y[row_of_decay(layer) + h] + (layer->decay_bias ? layer->decay_bias[h] : 0);
    if (layer->gated == BOUNDED) return -0.60653066f / (1 + expf(-z)); /* exp(-1/2) */
    return -(fmaxf(-z, 0) + log1pf(expf(-fabsf(z)))) / (float)layer->decay_scale + z * 0; /* NaN stays */
}

/* all that head h of retention reads of a token; the decay as float32 */
static void inputs_of_head(const Layer *layer, const float *y, const float *turn, i64 h, i64 dtype, void *q, void *k,
                           void *v, float *log_decay) {
    query_of_head(layer, y, turn, h, turn[layer->K + h], dtype, q);
    key_and_value(layer, y, turn, h / (layer->H / layer->kv), dtype, k, v);
    *log_decay = layer->gated ? log_gate(layer, y, h) : layer->log_decay[h];
}

/* what leaves head h of retention [V]: o in `dtype`, normalised and gated; but for `output_of_heads` */
static void output_of_head(const Layer *layer, const float *y, i64 h, i64 dtype, const void *o, float *z) {
    i64 V = layer->V;
    read_row(dtype, o, V, z, V);
    if (layer->joint) return;
    if (layer->normed_heads) norm_row(z, layer->head_norm, V, layer->eps, z);
    if (layer->gate) activate(layer->gate_activation, y + row_of_gate(layer) + h * V, z, V, z);
}

/* what leaves all heads [H V] of attention, or of retention with a joint norm: normalised and gated, in place */
static void output_of_heads(const Layer *layer, const float *y, float *z) {
    i64 width = layer->H * layer->V;
    if (layer->joint) norm_row(z, layer->head_norm, width, layer->eps, z);
    if (layer->gate && (layer->joint || layer->kind == ATTENTION))
        activate(layer->gate_activation, y + row_of_gate(layer), z, width, z);
}
