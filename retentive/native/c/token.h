/* What is computed for a token alone, in float32: norms, gates, the embedding, rotation, queries and keys, decays. */

#pragma once
#include "model.h"

static void norm_row(const float *x, const float *weight, i64 n, double eps, float *y) {
    float scale = 1 / sqrtf(dot(x, x, n) / n + (float)eps);
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
    const uint16_t *scales = m->scales + id / ROWS * groups * ROWS + id % ROWS;
    for (i64 k = 0; k < m->K; k++) {
        const uint8_t *unit = at + k / columns_of_unit(m->kind) * LINE;
        i64 j = k % columns_of_unit(m->kind);
        float scale = 0;
        uint16_t pair[2];
        if (groups) read_row(2, scales + k / m->group * ROWS, 1, &scale, 1);
        memcpy(pair, unit, 4);
        if (m->kind == FLOAT32) memcpy(to + k, unit, 4);
        else if (m->kind == BFLOAT16) to[k] = from_bf16(pair[j]);
        else if (m->kind == INT8) to[k] = (unit[j] - 128) * scale;
        else to[k] = ((unit[j / 2] >> j % 2 * 4 & 15) - 8) * scale;
    }
}

static void embed(const Model *m, i64 id, float *x) {
    row_of_matrix(&m->embed, id, x);
    for (i64 i = 0; i < m->D; i++) x[i] *= (float)m->embed_scale;
    if (m->embed_norm) norm_row(x, m->embed_norm, m->D, m->eps, x);
}

/* cosines, sines [K / 2] and the scale of q by head [H], for a token at `position`: rotary.phases and decay.row_norm */
static void turn_at(const Model *m, i64 position, float *turn) {
    i64 half_K = m->K / 2;
    for (i64 i = 0; i < half_K; i++) {
        double angle = m->frequency ? position * m->frequency[i] : 0;
        turn[i] = (float)cos(angle), turn[half_K + i] = (float)sin(angle);
    }
    for (i64 h = 0; h < m->H; h++) {
        double scale = 1 / sqrt((double)m->K), n = position + 1.0;
        if (m->row_norm) scale /= sqrt(m->log_decay[h] < 0 ? expm1(n * m->log_decay[h]) / expm1(m->log_decay[h]) : n);
        turn[m->K + h] = (float)scale;
    }
}

/* a query or key of a head: normalised, shifted, turned, scaled */
static void feature(const Model *m, const float *x, const float *norm, const float *bias, const float *turn,
                    float scale, float *to) {
    i64 K = m->K, half_K = K / 2;
    float y[K];
    if (norm) norm_row(x, norm, K, m->eps, y);
    else memcpy(y, x, K * 4);
    for (i64 i = 0; i < K && bias; i++) y[i] += bias[i];
    if (m->halves)
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

/* What head h reads of a token whose products `in` gave y: q, k [K] and v [V] in `dtype`, the decay as float32. */
static void inputs_of_head(const Model *m, const Layer *layer, const float *y, const float *turn, i64 h, i64 dtype,
                           void *q, void *k, void *v, float *log_decay) {
    i64 K = m->K, V = m->V, kv = h / (m->H / m->kv);
    float x[K];
    feature(m, y + h * K, layer->q_norm, layer->q_bias ? layer->q_bias + h * K : NULL, turn, turn[K + h], x);
    write_rows(dtype, x, K, 1, K, q, K);
    feature(m, y + row_of_k(m) + kv * K, layer->k_norm, layer->k_bias ? layer->k_bias + kv * K : NULL, turn, 1, x);
    write_rows(dtype, x, K, 1, K, k, K);
    write_rows(dtype, y + row_of_v(m) + kv * V, V, 1, V, v, V);
    if (m->gated) { /* log sigmoid */
        float z = y[row_of_decay(m) + h] + (layer->decay_bias ? layer->decay_bias[h] : 0);
        *log_decay = -(fmaxf(-z, 0) + log1pf(expf(-fabsf(z)))) / (float)m->decay_scale + z * 0; /* NaN stays */
    } else *log_decay = (float)m->log_decay[h];
}

/* what leaves head h [V]: o in `dtype`, normalised and gated */
static void output_of_head(const Model *m, const Layer *layer, const float *y, i64 h, i64 dtype, const void *o,
                           float *z) {
    i64 V = m->V;
    read_row(dtype, o, V, z, V);
    if (m->normed_heads) norm_row(z, layer->head_norm, V, m->eps, z);
    if (m->gate) activate(m->gate_activation, y + row_of_gate(m) + h * V, z, V, z);
}
