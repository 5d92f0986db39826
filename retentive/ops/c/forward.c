/* Forward pass of one head of one sequence, chunk by chunk, with its state in the cache.

    P  = scale * (q k^T) * D                        D_ij = exp(G_i - G_j), i >= j;  G = running log decay
    o  = scale * exp(G) * (q S) + P v               S  = state before the chunk
    S' = exp(G_C) S + (exp(G_C - G) k)^T v

The backward pass needs S before each chunk, so one state per `group` chunks is kept as a checkpoint.
*/

#include "chunks.h"

static void forward_head(const Call *c, Space *s, i64 n, i64 h) {
    i64 C = c->C, K = s->K, V = s->V, begin = c->begin[n], end = c->begin[n + 1], Ku = PAIR(c) ? K / 2 : K;
    i64 KV = c->K * c->V;
    s->decays.count = 0;
    read_state(c, s, c->state + (n * c->H + h) * KV, s->S);
    if (PAIR(c)) pair_panels(s->S, K, V, s->S_panels);
    for (i64 t = begin, chunk = 0; t < end; t += C, chunk++) {
        i64 count = smaller(C, end - t), rows = padded(c, count), units = PAIR(c) ? rows / 2 : rows;
        if (c->checkpoints && chunk % c->group == 0)
            write_state(c, s, s->S, c->checkpoints + ((c->first_checkpoint[n] + chunk / c->group) * c->H + h) * KV);
        set_decays(c, &s->decays, t, h, count);
        Given q = GIVEN(q, q_stride, t, count, c->K), k = GIVEN(k, k_stride, t, count, c->K);
        Given v = GIVEN(v, v_stride, t, count, c->V);
        Operand q_rows = {given_rows(c, q, NULL, rows, K, s->q_rows), Ku};
        as_panels_of_transpose(given_rows(c, k, NULL, rows, K, s->k_rows), Ku, rows, Ku, s->kT_panels, Ku);
        Operand v_panels = {given_panels(c, v, NULL, rows, V, s->v_panels), units};
        Operand kend_panels = {given_panels(c, k, s->decays.end, rows, K, s->kend_panels), units};

        multiply(c, LOWER, rows, rows, Ku, q_rows, (Operand){s->kT_panels, Ku}, NULL, NULL, (Result){s->score, C, NC});
        decay_scores(c, &s->decays, rows, s->score);
        Operand score_rows = {as_rows(PAIR(c), s->score, rows, C, s->score_rows), PAIR(c) ? C / 2 : C};
        Result o = {s->out, V, NC};
        multiply(c, FULL, rows, V, Ku, q_rows, (Operand){s->S_panels, Ku}, NULL, NULL, o);
        multiply(c, UP_TO_ROW, rows, V, units, score_rows, v_panels, s->out, s->decays.start, o);
        WRITE(o, s->out, V, t, count, c->V);

        multiply_transposed(c, FULL, K, V, units, kend_panels, v_panels, s->S, s->decays.total,
                            (Result){s->S, NC, K * NC});
        if (PAIR(c)) pair_panels(s->S, K, V, s->S_panels);
    }
    write_state(c, s, s->S, c->final + (n * c->H + h) * KV);
}
