/* Backward pass of one head of one sequence, from the last chunk to the first.

    dP = scale * (do v^T) * D                       P, D, G, S: as in forward.c
    dq = scale * exp(G) * (do S^T) + dP k
    dk = exp(G_C - G) * (v dS'^T) + dP^T q          dS' = gradient of the state after the chunk
    dv = P^T do + (exp(G_C - G) k) dS'
    dS = exp(G_C) dS' + (scale * exp(G) q)^T do

Entering a group recomputes the states before its chunks, from the checkpoint that the forward pass kept.
*/

#include "chunks.h"

/* computes S^T before each chunk of a group that begins at token t */
static void states_of_group(const Call *c, Space *s, i64 h, i64 t, i64 end, i64 checkpoint) {
    i64 K = s->K, V = s->V, C = c->C;
    memset(s->ST[0], 0, round_up(K, NC) * V * 4);
    as_panels_of_transpose(c->checkpoints + (checkpoint * c->H + h) * c->K * c->V, c->V, c->K, c->V, s->ST[0], V);
    for (i64 g = 0; g < c->group && t < end; g++, t += C) {
        if (PAIR(c)) pair_panels(s->ST[g], V, K, s->ST_panels[g]);
        if (g + 1 == c->group || t + C >= end) break;
        set_decays(c, &s->decays, t, h, C);
        i64 units = PAIR(c) ? C / 2 : C;
        Given k = GIVEN(k, k_stride, t, C, c->K), v = GIVEN(v, v_stride, t, C, c->V);
        Operand v_panels = {given_panels(c, v, NULL, C, V, s->v_panels), units};
        Operand kend_panels = {given_panels(c, k, s->decays.end, C, K, s->kend_panels), units};
        multiply_transposed(c, FULL, V, K, units, v_panels, kend_panels, s->ST[g], s->decays.total,
                            (Result){s->ST[g + 1], NC, V * NC});
    }
}

/* operands made from dS: its panels, and those of its transpose */
static void operands_of_dS(const Call *c, Space *s) {
    i64 K = s->K, V = s->V;
    if (!PAIR(c) || c->per_token)
        for (i64 n = 0; n < V; n += NC)
            as_panels_of_transpose(s->dS + n * K, NC, K, smaller(NC, V - n), s->dST + n * NC, V);
    if (!PAIR(c)) return;
    pair_panels(s->dS, K, V, s->dS_panels);
    for (i64 n = 0; n < V; n += NC) {
        const float *rows = as_rows(1, s->dS + n * K, K, NC, s->out);
        as_panels_of_transpose(rows, NC / 2, K, smaller(NC, V - n) / 2, s->dST_panels + n / 2 * NC, V / 2);
    }
}

/* With a decay per token: multiplies both scores by scale * D, and collects dL/dG. score_ij dscore_ij contains
   exp(G_i - G_j): it adds to G_i and subtracts from G_j. Vectors stop at the diagonal: a score past it may be NaN. */
static void decay_both(const Call *c, const Decays *d, i64 rows, i64 count, float *score, float *dscore, float *dG) {
    float far[c->C], row[c->C];
    memset(dG, 0, c->C * 4);
    for (int i = 0; i < rows; i++, score += c->C, dscore += c->C) {
        int width = (int)round_up(i / MR * MR + MR, NC);
        set_row(d, i, width, (float)c->scale, far, row);
        for (int j = i + 1; j < width; j++) score[j] = dscore[j] = 0;
        vf sum = {0};
        for (int j = 0; j <= i; j += LANES) { /* the rest of a vector is zeros */
            vf D = load(row + j), P = load(score + j) * D, dD = load(dscore + j), x = P * dD;
            store(score + j, P), store(dscore + j, dD * D);
            if (i < count) sum += x, store(dG + j, load(dG + j) - x);
        }
        if (i < count) dG[i] += sum_of(sum);
    }
}

/* row i of a `rows` operand of `width` numbers, times y */
static float row_dot(const Call *c, Operand rows, i64 i, const float *y, i64 width) {
    const float *row = rows.p + i * rows.depth;
    vf sum = {0};
    for (i64 j = 0; j < width; j += LANES)
        sum += (PAIR(c) ? all_of(1, (const uint16_t *)row + j) : load(row + j)) * load(y + j);
    return sum_of(sum);
}

static void backward_chunk(const Call *c, Space *s, i64 h, i64 t, i64 count, i64 g) {
    i64 C = c->C, K = s->K, V = s->V, rows = padded(c, count), units = PAIR(c) ? rows / 2 : rows;
    i64 Ku = PAIR(c) ? K / 2 : K, Vu = PAIR(c) ? V / 2 : V, Cu = PAIR(c) ? C / 2 : C;
    const Decays *d = &s->decays;
    set_decays(c, &s->decays, t, h, count);
    Given q = GIVEN(q, q_stride, t, count, c->K), k = GIVEN(k, k_stride, t, count, c->K);
    Given v = GIVEN(v, v_stride, t, count, c->V), dout = GIVEN(dout, do_stride, t, count, c->V);
    Operand q_rows = {given_rows(c, q, NULL, rows, K, s->q_rows), Ku};
    Operand k_rows = {given_rows(c, k, NULL, rows, K, s->k_rows), Ku};
    Operand v_rows = {given_rows(c, v, NULL, rows, V, s->v_rows), Vu};
    Operand dout_rows = {given_rows(c, dout, NULL, rows, V, s->dout_rows), Vu};
    as_panels_of_transpose(k_rows.p, Ku, rows, Ku, s->kT_panels, Ku);
    as_panels_of_transpose(v_rows.p, Vu, rows, Vu, s->vT_panels, Vu);
    Operand q_panels = {given_panels(c, q, NULL, rows, K, s->q_panels), units};
    Operand k_panels = {given_panels(c, k, NULL, rows, K, s->k_panels), units};
    Operand dout_panels = {given_panels(c, dout, NULL, rows, V, s->dout_panels), units};

    multiply(c, LOWER, rows, rows, Ku, q_rows, (Operand){s->kT_panels, Ku}, NULL, NULL, (Result){s->score, C, NC});
    multiply(c, LOWER, rows, rows, Vu, dout_rows, (Operand){s->vT_panels, Vu}, NULL, NULL, (Result){s->dscore, C, NC});
    if (c->per_token) decay_both(c, d, rows, count, s->score, s->dscore, s->dG);
    else decay_scores(c, d, rows, s->score), decay_scores(c, d, rows, s->dscore);
    as_panels(PAIR(c), s->score, C, rows, rows, s->score_panels);
    as_panels(PAIR(c), s->dscore, C, rows, rows, s->dscore_panels);
    Operand dscore_rows = {as_rows(PAIR(c), s->dscore, rows, C, s->dscore_rows), Cu};

    Result dq = {s->out, K, NC}, dk = dq, dv = {s->out, V, NC};
    multiply(c, FULL, rows, K, Vu, dout_rows, (Operand){s->ST_panels[g], Vu}, NULL, NULL, dq);
    if (c->per_token)
        for (i64 i = 0; i < count; i++) s->dG[i] += d->start[i] * row_dot(c, q_rows, i, s->out + i * K, K);
    multiply(c, UP_TO_ROW, rows, K, units, dscore_rows, k_panels, s->out, d->start, dq);
    WRITE(dq, s->out, K, t, count, c->K);

    multiply(c, FULL, rows, K, Vu, v_rows, (Operand){s->dST_panels, Vu}, NULL, NULL, dk);
    if (c->per_token) {
        double kept = 0; /* <S, dS>, the sum of elementwise products */
        for (i64 i = 0; i < count; i++) {
            float x = d->end[i] * row_dot(c, k_rows, i, s->out + i * K, K);
            s->dG[i] -= x, kept += x;
        }
        double all[LANES] = {0};
        for (i64 r = 0; r < V; r++) { /* row by row: one sum over all would add K V numbers in float32 */
            vf row = {0};
            for (i64 j = 0; j < K; j += LANES) {
                i64 at = j / NC * NC * V + r * NC + j % NC;
                row += load(s->ST[g] + at) * load(s->dST + at);
            }
            for (int l = 0; l < LANES; l++) all[l] += row[l];
        }
        for (int l = 0; l < LANES; l++) kept += d->total[0] * all[l];
        s->dG[count - 1] += (float)kept;
        float sum = 0;
        for (i64 i = count - 1; i >= 0; i--) c->dlog_decay[(t + i) * c->H + h] = sum += s->dG[i];
    }
    multiply_transposed(c, FROM_ROW, rows, K, units, (Operand){s->dscore_panels, units}, q_panels, s->out, d->end, dk);
    WRITE(dk, s->out, K, t, count, c->K);

    Operand kend_rows = {given_rows(c, k, d->end, rows, K, s->kend_rows), Ku};
    multiply(c, FULL, rows, V, Ku, kend_rows, (Operand){s->dS_panels, Ku}, NULL, NULL, dv);
    multiply_transposed(c, FROM_ROW, rows, V, units, (Operand){s->score_panels, units}, dout_panels, s->out, NULL, dv);
    WRITE(dv, s->out, V, t, count, c->V);

    Operand qstart_panels = {given_panels(c, q, d->start, rows, K, s->qstart_panels), units};
    multiply_transposed(c, FULL, K, V, units, qstart_panels, dout_panels, s->dS, d->total,
                        (Result){s->dS, NC, K * NC});
    operands_of_dS(c, s);
}

static void backward_head(const Call *c, Space *s, i64 n, i64 h) {
    i64 begin = c->begin[n], end = c->begin[n + 1], C = c->C, span = C * c->group;
    s->decays.count = 0;
    read_state(c, s, c->dstate + (n * c->H + h) * c->K * c->V, s->dS);
    operands_of_dS(c, s);
    for (i64 group = (end - begin - 1) / span; group >= 0; group--) {
        i64 first = begin + group * span, chunks = smaller(c->group, (end - first + C - 1) / C);
        states_of_group(c, s, h, first, end, c->first_checkpoint[n] + group);
        for (i64 g = chunks - 1; g >= 0; g--)
            backward_chunk(c, s, h, first + g * C, smaller(C, end - first - g * C), g);
    }
    write_state(c, s, s->dS, c->dinitial + (n * c->H + h) * c->K * c->V);
}
