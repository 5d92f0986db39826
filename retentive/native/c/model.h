/* A RetNet as C has it: what Python or a loader fills in (struct Model and struct Layer of library.py). */

#pragma once
#include "product.h"

enum { SWISH, GELU, SIGMOID };

typedef struct {
    Matrix in;   /* q, k, v, gate, decay: the rows of each rounded up to panels */
    Matrix out;  /* [D][H V] */
    Matrix up;   /* panels of the gate and of `up` in turn, or of the gate alone */
    Matrix down; /* [D][F] */
    const float *retention_norm, *ffn_norm;                      /* [D] */
    const float *q_norm, *k_norm, *q_bias, *k_bias, *decay_bias; /* [K], [K], [H K], [kv K], [H]; or NULL */
    const float *head_norm;                                      /* [V], or NULL */
} Layer;

typedef struct {
    i64 D, layers, H, kv, K, V, F, vocab;
    i64 halves, gate, gate_activation, activation, ffn_gate; /* halves: element i turns with i + K / 2, not
                                                             2 i with 2 i + 1; gate, ffn_gate: whether there is one */
    i64 gated, row_norm, normed_heads;
    double eps, decay_scale, embed_scale;
    const double *frequency;  /* [K / 2] of the rotation, radians a token; NULL for none */
    const double *log_decay;  /* [H], where they are no function of the token, */
    const float *log_decay_f; /* and again for the operator */
    const Layer *layer;
    Matrix embed, head;
    const float *embed_norm, *final_norm; /* [D], or NULL */
} Model;

INLINE i64 whole(i64 rows) { return round_up(rows, ROWS); }
/* rows of `in` before k, v, the gate, the decay; and all */
INLINE i64 row_of_k(const Model *m) { return whole(m->H * m->K); }
INLINE i64 row_of_v(const Model *m) { return row_of_k(m) + whole(m->kv * m->K); }
INLINE i64 row_of_gate(const Model *m) { return row_of_v(m) + whole(m->kv * m->V); }
INLINE i64 row_of_decay(const Model *m) { return row_of_gate(m) + (m->gate ? whole(m->H * m->V) : 0); }
INLINE i64 rows_in(const Model *m) { return row_of_decay(m) + (m->gated ? whole(m->H) : 0); }
INLINE i64 rows_up(const Model *m) { return whole(m->F) * (m->ffn_gate ? 2 : 1); }
