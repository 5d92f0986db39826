/* One token for each of a few sequences, through the whole model, in one parallel section.

The threads share the panels of every matrix, and the heads of every sequence. Between phases they meet: nine times a
layer. The residual stream x, norms, rotations and sums are float32.
*/

#include "step.c"
#include "model.h"
#include "pool.h"

typedef struct { /* the rings of a layer (retentive.ops.Ring), for B sequences */
    float *state;
    void *k, *v;
    float *decay;
    i64 *written, *folded;
} Rings;

typedef struct {
    const Model *model;
    Pool *pool;
    i64 n, slots, dtype;  /* sequences; of every ring; 0 float32, 1 bfloat16, 2 float16: of k and v in it */
    const i64 *ids, *position;
    Rings *rings;         /* [layers] */
    float *logits;        /* [n][vocab rounded up to panels] */
    /* work space: */
    float *x, *y, *z, *turn; /* [n][D]; [n][widest product]; [n][H V]; [n][2][K / 2] cosines and sines, [n][H] scales */
    void *q, *k, *v, *o;     /* [n][H][K], [n][H][V] in `dtype` */
    float *log_decay;        /* [n][H] */
    Input in_D, in_HV, in_F; /* products' inputs of three widths */
    i64 ld;                  /* of y */
    atomic_int failed;
} Token;

static void share(i64 all, int thread, int threads, i64 *first, i64 *last) {
    *first = all * thread / threads, *last = all * (thread + 1) / threads;
}

static void norm_row(const float *x, const float *weight, i64 n, double eps, float *y) {
    float scale = 1 / sqrtf(dot(x, x, n) / n + (float)eps);
    for (i64 i = 0; i < n; i++) y[i] = x[i] * scale * (weight ? weight[i] : 1);
}

static float activated(i64 kind, float x) {
    if (kind == GELU) return 0.5f * x * (1 + erff(x * 0.70710678f));
    float gate = 1 / (1 + expf(-x));
    return kind == SIGMOID ? gate : x * gate;
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

/* cosines, sines and the scale of q by head, for a sequence at `position`: rotary.phases and decay.row_norm */
static void turn_of(const Model *m, i64 position, float *turn) {
    i64 half_K = m->K / 2;
    for (i64 i = 0; i < half_K; i++) {
        double power = m->rotary == HALVES ? (double)i / half_K : half_K > 1 ? (double)i / (half_K - 1) : 0;
        double angle = m->rotary == UNROTATED ? 0 : position * pow(10000, -power);
        turn[i] = (float)cos(angle), turn[half_K + i] = (float)sin(angle);
    }
    for (i64 h = 0; h < m->H; h++) {
        double scale = 1 / sqrt((double)m->K), n = position + 1.0;
        if (m->row_norm) scale /= sqrt(m->log_decay[h] < 0 ? expm1(n * m->log_decay[h]) / expm1(m->log_decay[h]) : n);
        turn[m->K + h] = (float)scale;
    }
}

/* q or k of a head: normalised, shifted, turned, scaled, into `to` */
static void feature(const Model *m, const float *x, const float *norm, const float *bias, const float *turn, float scale,
                    float *to) {
    i64 K = m->K, half_K = K / 2;
    float y[K];
    if (norm) norm_row(x, norm, K, m->eps, y);
    else memcpy(y, x, K * 4);
    for (i64 i = 0; i < K && bias; i++) y[i] += bias[i];
    for (i64 i = 0; i < half_K; i++) {
        i64 a = m->rotary == HALVES ? i : 2 * i, b = m->rotary == HALVES ? i + half_K : 2 * i + 1;
        to[a] = scale * (y[a] * turn[i] - y[b] * turn[half_K + i]);
        to[b] = scale * (y[b] * turn[i] + y[a] * turn[half_K + i]);
    }
}

static void one_head(Token *t, const Layer *layer, const Step *step, i64 r, i64 h, float *space) {
    const Model *m = t->model;
    i64 K = m->K, V = m->V, kv = h / (m->H / m->kv), bh = r * m->H + h, size = size_of(t->dtype);
    const float *y = t->y + r * t->ld, *turn = t->turn + r * (K + m->H);
    float q[K], k[K], o[V], *to = t->z + bh * V;
    feature(m, y + h * K, layer->q_norm, layer->q_bias ? layer->q_bias + h * K : NULL, turn, turn[K + h], q);
    feature(m, y + row_of_k(m) + kv * K, layer->k_norm, layer->k_bias ? layer->k_bias + kv * K : NULL, turn, 1, k);
    if (m->gated) {
        float x = y[row_of_decay(m) + h] + (layer->decay_bias ? layer->decay_bias[h] : 0);
        t->log_decay[bh] = -(fmaxf(-x, 0) + log1pf(expf(-fabsf(x)))) / (float)m->decay_scale + x * 0; /* NaN stays */
    } else t->log_decay[bh] = (float)m->log_decay[h];
    write_rows(t->dtype, q, K, 1, K, (char *)t->q + bh * K * size, K);
    write_rows(t->dtype, k, K, 1, K, (char *)t->k + bh * K * size, K);
    write_rows(t->dtype, y + row_of_v(m) + kv * V, V, 1, V, (char *)t->v + bh * V * size, V);
    step_head(step, bh, bh + 1, space);
    read_row(t->dtype, (const char *)t->o + bh * V * size, V, o, V);
    if (m->normed_heads) norm_row(o, layer->head_norm, V, m->eps, o);
    for (i64 i = 0; i < V; i++)
        to[i] = m->gate ? activated(m->gate_activation, y[row_of_gate(m) + h * V + i]) * o[i] : o[i];
}

/* x += W input, the panels of this thread */
static void add_product(Token *t, const Matrix *w, const Input *in, int thread) {
    i64 first, last;
    share(panels_of(w), thread, t->pool->threads, &first, &last);
    product(w, in, t->n, first, last, t->y, t->ld);
    for (i64 r = 0; r < t->n; r++)
        for (i64 i = first * ROWS; i < smaller(last * ROWS, w->N); i++) t->x[r * w->N + i] += t->y[r * t->ld + i];
}

/* rows r of this thread: norm(x), or x where there is no weight, ready for a product */
static void ready_norms(Token *t, const float *weight, int thread) {
    i64 D = t->model->D;
    float y[D];
    for (i64 r = thread; r < t->n; r += t->pool->threads) {
        if (weight) norm_row(t->x + r * D, weight, D, t->model->eps, y);
        ready_row(&t->in_D, r, weight ? y : t->x + r * D, D);
    }
}

static void through_layer(Token *t, i64 l, int thread, float *space) {
    const Model *m = t->model;
    const Layer *layer = m->layer + l;
    Rings *rings = t->rings + l;
    int threads = t->pool->threads;
    i64 first, last;
    Step step = {t->n, m->H, m->K, m->V, t->slots, t->dtype, 1, m->H, 1, t->q, t->k, t->v, t->log_decay, rings->state,
                 rings->k, rings->v, t->o, rings->decay, rings->written, rings->folded};
    ready_norms(t, layer->retention_norm, thread);
    meet(t->pool);
    share(panels_of(&layer->in), thread, threads, &first, &last);
    product(&layer->in, &t->in_D, t->n, first, last, t->y, t->ld);
    meet(t->pool);
    share(t->n * m->H, thread, threads, &first, &last);
    for (i64 bh = first; bh < last; bh++) one_head(t, layer, &step, bh / m->H, bh % m->H, space);
    meet(t->pool);
    for (i64 r = thread; r < t->n; r += threads) {
        ready_row(&t->in_HV, r, t->z + r * m->H * m->V, m->H * m->V);
        rings->written[r]++;
        if (rings->written[r] - rings->folded[r] == t->slots) rings->folded[r] += t->slots / 2;
    }
    meet(t->pool);
    add_product(t, &layer->out, &t->in_HV, thread);
    meet(t->pool);
    ready_norms(t, layer->ffn_norm, thread);
    meet(t->pool);
    i64 together = m->ffn_gate ? 2 : 1, F = whole(m->F);
    share(panels_of(&layer->up) / together, thread, threads, &first, &last);
    product(&layer->up, &t->in_D, t->n, first * together, last * together, t->y, t->ld);
    for (i64 r = 0; r < t->n; r++)
        for (i64 panel = first; panel < last; panel++) { /* over the gates, where nobody else reads */
            float *y = t->y + r * t->ld + panel * together * ROWS;
            for (int i = 0; i < ROWS; i++) y[i] = activated(m->activation, y[i]) * (m->ffn_gate ? y[ROWS + i] : 1);
        }
    meet(t->pool);
    for (i64 r = thread; r < t->n; r += threads) {
        float f[F];
        for (i64 i = 0; i < F; i++) f[i] = t->y[r * t->ld + i / ROWS * together * ROWS + i % ROWS];
        ready_row(&t->in_F, r, f, m->F);
    }
    meet(t->pool);
    add_product(t, &layer->down, &t->in_F, thread);
    meet(t->pool);
}

static void through_model(void *what, int thread) {
    Token *t = what;
    const Model *m = t->model;
    float *space = space_of_thread_with(step_space(&(Step){t->n, m->H, m->K, m->V, t->slots}) * 4);
    if (!space) atomic_store(&t->failed, 1);
    for (i64 r = thread; r < t->n; r += t->pool->threads) {
        float *x = t->x + r * m->D;
        row_of_matrix(&m->embed, t->ids[r], x);
        for (i64 i = 0; i < m->D; i++) x[i] *= (float)m->embed_scale;
        if (m->embed_norm) norm_row(x, m->embed_norm, m->D, m->eps, x);
        turn_of(m, t->position[r], t->turn + r * (m->K + m->H));
    }
    meet(t->pool);
    if (atomic_load(&t->failed)) return; /* all threads see it, and nothing is written yet */
    for (i64 l = 0; l < m->layers; l++) through_layer(t, l, thread, space);
    ready_norms(t, m->final_norm, thread);
    meet(t->pool);
    i64 first, last;
    share(panels_of(&m->head), thread, t->pool->threads, &first, &last);
    product(&m->head, &t->in_D, t->n, first, last, t->logits, whole(m->vocab));
}

/* ---- the work space, and what Python calls ---- */

static char *room(char **at, i64 bytes) {
    char *p = *at;
    *at += round_up(bytes, 64) + 64;
    return p;
}

static void input_room(char **at, Input *in, const Matrix *w, i64 n) {
    i64 K = padded_columns(w), groups = groups_of(w);
    in->kind = w->kind, in->group = w->group, in->K = K;
    in->x = (float *)room(at, groups ? 0 : n * K * 4), in->q = (int16_t *)room(at, groups ? n * K * 2 : 0);
    in->scale = (float *)room(at, n * groups * 4), in->sum = (int32_t *)room(at, n * groups * 4);
}

/* lays out the work space of n sequences from `at` on; returns its end */
static char *token_room(Token *t, char *at) {
    const Model *m = t->model;
    i64 n = t->n, up = rows_up(m), in = rows_in(m), wide = in > up ? in : up;
    t->ld = wide > whole(m->D) ? wide : whole(m->D);
    t->x = (float *)room(&at, n * m->D * 4), t->y = (float *)room(&at, n * t->ld * 4);
    t->z = (float *)room(&at, n * m->H * m->V * 4), t->turn = (float *)room(&at, n * (m->K + m->H) * 4);
    t->q = room(&at, n * m->H * m->K * 4), t->k = room(&at, n * m->H * m->K * 4);
    t->v = room(&at, n * m->H * m->V * 4), t->o = room(&at, n * m->H * m->V * 4);
    t->log_decay = (float *)room(&at, n * m->H * 4);
    input_room(&at, &t->in_D, &m->layer->in, n), input_room(&at, &t->in_HV, &m->layer->out, n);
    input_room(&at, &t->in_F, &m->layer->down, n);
    return at;
}

typedef struct { i64 n, slots, dtype; Pool *pool; const Model *model; const i64 *ids, *position; Rings *rings; float *logits; } Call;

/* Logits after ids, one for each of n sequences, whose rings then hold it; positions are the caller's. 1: no memory. */
int native_decode(const Call *c) {
    Token t = {c->model, c->pool, c->n, c->slots, c->dtype, c->ids, c->position, c->rings, c->logits};
    i64 bytes = (i64)(intptr_t)token_room(&t, NULL);
    char *all = aligned_alloc(64, round_up(bytes, 64));
    if (!all) return 1;
    token_room(&t, all);
    run(c->pool, through_model, &t);
    free(all);
    return atomic_load(&t.failed);
}

Pool *native_open(i64 threads) { return open_pool((int)threads); }
void native_close(Pool *pool) { close_pool(pool); }
