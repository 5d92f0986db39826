/* A model as C has it: a list of layers, each with shapes and a kind of its own. Python or a loader fills in these
   structs (library.py has the same ones). */

#pragma once
#include "product.h"

enum { SWISH, GELU, SIGMOID };
enum { RETENTION, ATTENTION, CONVOLUTION };

typedef struct {                    /* how queries and keys are turned and scaled: one for all layers that agree in it */
    i64 K, H, halves, row_norm, at; /* halves: element i turns with i + K / 2, not 2 i with 2 i + 1; at: where its K + H
                                       numbers lie in those of a token */
    double position_scale;          /* a of log(position + a) / log(a), which scales queries; 0: nothing does */
    const double *frequency;        /* [K / 2] radians a token; NULL for none */
    const double *log_decay;        /* [H] for row_norm; NULL where it is a function of the token */
} Turn;

enum { BOUNDED = 2 }; /* `gated` of a decay "sigmoid" */

typedef struct {
    i64 kind, H, kv, K, V, F;                   /* V is K where the layer attends; F: 0 for no feed-forward layer. A
                                                   convolution has no heads */
    i64 gate, gate_activation, gated, normed_heads; /* gate, ffn_gate: whether there is one; gated: a decay, or a forget
                                                   gate, of each token */
    i64 joint;                                  /* the head norm is of all heads together */
    i64 activation, ffn_gate, window, sinks;    /* tokens attended to, 0 for all; first tokens, attended to always */
    i64 taps;                                   /* of a convolution */
    double eps, decay_scale;                    /* eps: of the norms over heads */
    const Turn *turn;
    const float *log_decay;                                      /* [H]; NULL where it is a function of the token */
    const float *mixer_norm, *ffn_norm;                          /* [D] */
    const float *q_norm, *k_norm, *q_bias, *k_bias, *decay_bias; /* [K], [K], [H K], [kv K], [H]; or NULL */
    const float *in_bias;   /* of q, k and v, laid out as the rows of `in`; or NULL */
    const float *head_norm; /* [V], joint [H V]; or NULL */
    const float *convolution; /* [taps][D], the token's own last */
    const float *far_turn;  /* [K] turn of queries for moving sinks, far from them; NULL: as for all other keys */
    Matrix in;   /* q, k, v, gate, decay: the rows of each rounded up to panels */
    Matrix out;  /* [D][H V] */
    Matrix up;   /* panels of the gate and of `up` in turn, or of the gate alone */
    Matrix down; /* [D][F] */
} Layer;

typedef struct {
    i64 D, layers, vocab, turns;
    double eps, embed_scale;
    const Turn *turn;
    const Layer *layer;
    const float *embed_norm, *final_norm; /* [D], or NULL */
    Matrix embed, head;
} Model;

INLINE i64 whole(i64 rows) { return round_up(rows, ROWS); }
/* rows of `in` before k, v, the gate, the decay; and all */
INLINE i64 row_of_k(const Layer *l) { return whole(l->H * l->K); }
INLINE i64 row_of_v(const Layer *l) { return row_of_k(l) + whole(l->kv * l->K); }
INLINE i64 row_of_gate(const Layer *l) { return row_of_v(l) + whole(l->kv * l->V); }
INLINE i64 row_of_decay(const Layer *l) { return row_of_gate(l) + (l->gate ? whole(l->H * l->V) : 0); }
INLINE i64 rows_in(const Layer *l) { return row_of_decay(l) + (l->gated ? whole(l->H) : 0); }
INLINE i64 rows_up(const Layer *l) { return whole(l->F) * (l->ffn_gate ? 2 : 1); }
INLINE i64 together(const Layer *l) { return l->ffn_gate ? 2 : 1; } /* panels of `up` that make one of F */

/* numbers of a token's turns */
INLINE i64 turn_floats(const Model *m) {
    i64 all = 0;
    for (i64 i = 0; i < m->turns; i++) all += m->turn[i].K + m->turn[i].H;
    return all;
}
