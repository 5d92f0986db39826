/* Row-wise RMSNorm, rotation, gates, short convolutions, and softmax with its loss, each in one pass over memory. The
   formulas are in rows.py.

Arithmetic is float32. Rows are divided among the threads in order, so the grouping of a sum over rows depends only on
the number of threads.
*/

#include "numbers.h"
#include <stdlib.h>

enum { FEW = 1 << 14 }; /* numbers below which waking further threads costs more than they save */

typedef struct {
    i64 rows, n, dtype, y_dtype, weight_dtype, threads; /* y_dtype: of y and `more`; weight_dtype: -1 without weight */
    double eps;
    const void *x, *more, *weight, *dsum, *dy; /* backward: x is the sum */
    void *sum, *y, *dx, *dmore;                /* with `more`: sum = x + more is normalised */
    float *scale;    /* [rows] */
    double *dweight; /* [threads][n], double since it sums many rows */
} Norm;

typedef struct {
    i64 tokens, T, H, K, dtype, half, phase_rows, scale_rows, stride; /* rows: 1 (0: none), T or tokens */
    i64 gain_dtype, threads;        /* -1: a norm without gain, -2: no norm */
    double sign, eps;               /* sign: of the angle */
    const void *x, *dy, *gain;      /* tokens of x `stride` elements apart; dy, of a result: only with a norm */
    const float *cos, *sin, *scale; /* [phase_rows][K/2]; [scale_rows][H] */
    void *y;
    float *norm;   /* [tokens][H] 1 / root mean square */
    double *dgain; /* [threads][K] */
} Rotate;

typedef struct {
    i64 numbers, dtype, swish, threads; /* swish: activation(g) = g sigmoid(g), else sigmoid(g) */
    const void *g, *x, *dy;
    void *y, *dg, *dx;
} Gated;

typedef struct {
    i64 rows, n, dtype, ignore, threads;
    const i64 *target; /* [rows] */
    void *x;
    float *loss; /* [rows] */
} Softmax;

typedef struct {
    i64 tokens, T, n, D, dtype, weight_dtype, threads; /* tokens in rows of T; taps */
    const int *since;                                  /* [tokens] before each in its sequence; NULL: all of the row */
    const void *x, *weight, *dy;                       /* weight [n][D], the last of the token itself */
    void *y, *dx;
    double *dweight; /* [threads][n][D], double since it sums many rows */
} Convolve;

typedef struct { /* as in Convolve, with the norm before it */
    i64 tokens, T, n, D, h_dtype, gain_dtype, weight_dtype, threads; /* h: the norm; gain_dtype: -1 without gain */
    double eps;
    const int *since;
    const float *x, *dy;
    const void *gain, *weight;
    float *y, *dx, *scale;   /* [tokens] of the norm */
    double *dgain, *dweight; /* [threads][D], [threads][n][D] */
} AddConvolved;

static int threads_for(i64 threads, i64 numbers) { return numbers < FEW ? 1 : (int)threads; }

enum { TOGETHER = 8 }; /* tokens whose gradients of a weight are summed in float32 */

static void move_sums(float *few, i64 n, double *sum) {
    for (i64 j = 0; j < n; j++) sum[j] += few[j], few[j] = 0;
}

INLINE void norm_row(const int dtype, const int y_dtype, const Norm *c, const float *weight, i64 row) {
    i64 n = c->n;
    const void *x = element(c->x, dtype, row * n);
    void *y = (void *)element(c->y, y_dtype, row * n);
    vf squares = {0};
    if (c->more) {
        const void *more = element(c->more, y_dtype, row * n);
        void *sum = (void *)element(c->sum, dtype, row * n);
        for (i64 j = 0; j < n; j += LANES)
            write_at(dtype, read_at(dtype, x, j, n) + read_at(y_dtype, more, j, n), sum, j, n);
        x = sum; /* as it was rounded */
    }
    for (i64 j = 0; j < n; j += LANES) {
        vf part = read_at(dtype, x, j, n);
        squares += part * part;
    }
    float scale = 1 / sqrtf(sum_of(squares) / n + (float)c->eps);
    for (i64 j = 0; j < n; j += LANES)
        write_at(y_dtype, read_at(dtype, x, j, n) * splat(scale) * load(weight + j), y, j, n);
    if (c->scale) c->scale[row] = scale;
}

/* `few` [n] gets what the row adds to the gradient of the weight, unless it is NULL */
INLINE void norm_row_backward(const int dtype, const int y_dtype, const Norm *c, const float *weight, i64 row,
                              float *few) {
    i64 n = c->n;
    const void *x = element(c->x, dtype, row * n), *dy = element(c->dy, y_dtype, row * n);
    const void *dsum = c->dsum ? element(c->dsum, dtype, row * n) : NULL;
    void *dx = (void *)element(c->dx, dtype, row * n);
    void *dmore = c->dmore ? (void *)element(c->dmore, y_dtype, row * n) : NULL;
    vf scale = splat(c->scale[row]), sum = {0};
    for (i64 j = 0; j < n; j += LANES) {
        vf part = read_at(dtype, x, j, n) * scale * read_at(y_dtype, dy, j, n);
        sum += part * load(weight + j);
        if (few) store(few + j, load(few + j) + part);
    }
    vf along = splat(sum_of(sum) / n); /* the gradient's part along x, which only changes its length */
    for (i64 j = 0; j < n; j += LANES) {
        vf y = read_at(dtype, x, j, n) * scale, d = read_at(y_dtype, dy, j, n) * load(weight + j);
        d = (d - along * y) * scale;
        if (dsum) d += read_at(dtype, dsum, j, n);
        write_at(dtype, d, dx, j, n);
        if (dmore) write_at(y_dtype, d, dmore, j, n);
    }
}

/* returns the weight, or ones, and then zeros for `few`, [n] each and padded with zeros; NULL if memory ran out */
static float *norm_space(const Norm *c) {
    i64 n = round_up(c->n, LANES);
    float *weight = calloc(2 * n, 4);
    for (i64 j = 0; weight && c->weight_dtype < 0 && j < c->n; j++) weight[j] = 1;
    if (weight && c->weight_dtype >= 0) read_row(c->weight_dtype, c->weight, c->n, weight, c->n);
    return weight;
}

INLINE void norm_rows(const int dtype, const int y_dtype, const Norm *c, int backward, const float *weight, i64 row,
                      i64 last, float *few) {
    for (; row < last; row++) {
        if (backward) norm_row_backward(dtype, y_dtype, c, weight, row, few);
        else norm_row(dtype, y_dtype, c, weight, row);
    }
}

static int norm(const Norm *c, int backward) {
    int failed = 0, threads = threads_for(c->threads, c->rows * c->n);
    if (c->dweight) memset(c->dweight, 0, c->threads * c->n * 8);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 part = 0; part < threads; part++) {
        float *weight = norm_space(c);
        double *sum = c->dweight ? c->dweight + part * c->n : NULL;
        if (!weight) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        float *few = weight + round_up(c->n, LANES);
        i64 end = c->rows * (part + 1) / threads;
        for (i64 row = c->rows * part / threads, last; row < end; row = last) {
            last = smaller(row + TOGETHER, end);
            float *add = sum ? few : NULL;
            if (c->dtype == 0 && c->y_dtype == 0) norm_rows(0, 0, c, backward, weight, row, last, add);
            else if (c->dtype == 0 && c->y_dtype == 1) norm_rows(0, 1, c, backward, weight, row, last, add);
            else if (c->dtype == 1 && c->y_dtype == 1) norm_rows(1, 1, c, backward, weight, row, last, add);
            else norm_rows((int)c->dtype, (int)c->y_dtype, c, backward, weight, row, last, add);
            if (sum) move_sums(few, c->n, sum);
        }
        free(weight);
    }
    return failed;
}

/* both return 0, or 1 if memory ran out */
int rms_norm(const Norm *c) { return norm(c, 0); }
int rms_norm_backward(const Norm *c) { return norm(c, 1); }

INLINE i64 place(i64 rows, i64 token, i64 T) { return rows == 1 ? 0 : rows == T ? token % T : token; }

/* y = x, turned and scaled */
INLINE void turn_row(const Rotate *c, const float *restrict cosine, const float *restrict sine, float factor,
                     const float *restrict x, float *restrict y) {
    i64 half = c->K / 2;
    float turned = factor * (float)c->sign;
    if (c->half)
        for (i64 i = 0; i < half; i++) {
            float a = x[i], b = x[i + half], u = factor * cosine[i], w = turned * sine[i];
            y[i] = a * u - b * w, y[i + half] = b * u + a * w;
        }
    else
        for (i64 i = 0; i < half; i++) {
            float a = x[2 * i], b = x[2 * i + 1], u = factor * cosine[i], w = turned * sine[i];
            y[2 * i] = a * u - b * w, y[2 * i + 1] = b * u + a * w;
        }
}

/* work space of a thread: rows of K, padded with zeros to whole vectors */
typedef struct { float *x, *y, *gain, *few; } Turn;

INLINE void turn_token(const int dtype, const Rotate *c, const Turn *s, i64 t) {
    i64 H = c->H, K = c->K;
    const float *cosine = c->cos + place(c->phase_rows, t, c->T) * (K / 2);
    const float *sine = c->sin + place(c->phase_rows, t, c->T) * (K / 2);
    const float *scale = c->scale_rows ? c->scale + place(c->scale_rows, t, c->T) * H : NULL;
    float *x = s->x, *y = s->y, *few = s->few;
    const float *gain = s->gain;
    for (i64 h = 0; h < H; h++) {
        const void *given = element(c->x, dtype, t * c->stride + h * K);
        void *made = (void *)element(c->y, dtype, (t * H + h) * K);
        float factor = scale ? scale[h] : 1;
        if (!c->dy) {
            vf squares = {0};
            for (i64 j = 0; j < K; j += LANES) {
                vf part = read_at(dtype, given, j, K);
                store(x + j, part), squares += part * part;
            }
            if (c->gain_dtype > -2) {
                float norm = 1 / sqrtf(sum_of(squares) / K + (float)c->eps);
                for (i64 j = 0; j < K; j += LANES) store(x + j, load(x + j) * splat(norm) * load(gain + j));
                if (c->norm) c->norm[t * H + h] = norm;
            }
            turn_row(c, cosine, sine, factor, x, y);
            for (i64 j = 0; j < K; j += LANES) write_at(dtype, load(y + j), made, j, K);
            continue;
        }
        const void *dy = element(c->dy, dtype, (t * H + h) * K);
        for (i64 j = 0; j < K; j += LANES) store(x + j, read_at(dtype, dy, j, K));
        turn_row(c, cosine, sine, factor, x, y); /* by the opposite angle: of what was normalised */
        vf norm = splat(c->norm[t * H + h]), sum = {0};
        for (i64 j = 0; j < K; j += LANES) {
            vf part = read_at(dtype, given, j, K) * norm;
            store(x + j, part);
            part *= load(y + j);
            store(few + j, load(few + j) + part), sum += part * load(gain + j);
        }
        vf along = splat(sum_of(sum) / K);
        for (i64 j = 0; j < K; j += LANES)
            write_at(dtype, (load(y + j) * load(gain + j) - along * load(x + j)) * norm, made, j, K);
    }
}

/* rotates, after a norm of each head if there is one; the gradient of both if there is `dy`; 1 without memory */
int rotate(const Rotate *c) {
    int failed = 0, threads = threads_for(c->threads, c->tokens * c->H * c->K);
    i64 K = c->K, wide = round_up(K, LANES);
    if (c->dgain) memset(c->dgain, 0, c->threads * K * 8);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 part = 0; part < threads; part++) {
        float *space = calloc(4 * wide, 4);
        Turn s = {space, space + wide, space + 2 * wide, space + 3 * wide};
        if (!space) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        for (i64 j = 0; j < K; j++) s.gain[j] = 1;
        if (c->gain_dtype >= 0) read_row(c->gain_dtype, c->gain, K, s.gain, K);
        for (i64 t = c->tokens * part / threads; t < c->tokens * (part + 1) / threads; t++) {
            if (c->dtype == 0) turn_token(0, c, &s, t);
            else if (c->dtype == 1) turn_token(1, c, &s, t);
            else turn_token(2, c, &s, t);
            if (c->dgain) move_sums(s.few, K, c->dgain + part * K);
        }
        free(space);
    }
    return failed;
}

/* Tokens of a convolution: in rows of T, or in sequences (`since`, see Convolve). */
typedef struct { const int *since; i64 tokens, T, n; } Order;

/* taps of token t beside its own: 0 for the first of a sequence, then more, up to n - 1 */
INLINE i64 taps_before(Order o, i64 t) { return smaller(o.since ? o.since[t] : t % o.T, o.n - 1); }

/* later tokens that t is a tap of */
INLINE i64 taps_after(Order o, i64 t) {
    i64 after = 0;
    while (after + 1 < o.n && t + after + 1 < o.tokens && taps_before(o, t + after + 1) > after) after++;
    return after;
}

#define ORDER(c) (Order){(c)->since, (c)->tokens, (c)->T, (c)->n}

INLINE void convolve_token(const int dtype, const Convolve *c, i64 t, const float *weight, i64 wide) {
    i64 n = c->n, D = c->D, taps = taps_before(ORDER(c), t);
    for (i64 j = 0; j < D; j += LANES) {
        vf y = read_at(dtype, element(c->x, dtype, t * D), j, D) * load(weight + (n - 1) * wide + j);
        for (i64 i = taps; i > 0; i--)
            y += load(weight + (n - 1 - i) * wide + j) * read_at(dtype, element(c->x, dtype, (t - i) * D), j, D);
        write_at(dtype, y, (void *)element(c->y, dtype, t * D), j, D);
    }
}

/* `few` [n][wide] gets what the token adds to the gradient of the weight */
INLINE void convolve_token_backward(const int dtype, const Convolve *c, i64 t, const float *weight, i64 wide,
                                    float *few) {
    i64 n = c->n, D = c->D, taps = taps_before(ORDER(c), t), after = taps_after(ORDER(c), t);
    for (i64 j = 0; j < D; j += LANES) {
        vf dy = read_at(dtype, element(c->dy, dtype, t * D), j, D), dx = dy * load(weight + (n - 1) * wide + j);
        for (i64 i = 1; i <= after; i++)
            dx += load(weight + (n - 1 - i) * wide + j) * read_at(dtype, element(c->dy, dtype, (t + i) * D), j, D);
        write_at(dtype, dx, (void *)element(c->dx, dtype, t * D), j, D);
        for (i64 i = 0; i <= taps; i++) {
            float *sum = few + (n - 1 - i) * wide + j;
            store(sum, load(sum) + dy * read_at(dtype, element(c->x, dtype, (t - i) * D), j, D));
        }
    }
}

INLINE void convolve_tokens(const int dtype, const Convolve *c, i64 t, i64 last, const float *weight, i64 wide,
                            float *few) {
    for (; t < last; t++)
        if (c->dweight) convolve_token_backward(dtype, c, t, weight, wide, few);
        else convolve_token(dtype, c, t, weight, wide);
}

/* both directions: the backward one if there are sums of the weights' gradients */
int convolve(const Convolve *c) {
    int failed = 0, threads = threads_for(c->threads, c->tokens * c->D);
    i64 n = c->n, D = c->D, wide = round_up(D, LANES);
    if (c->dweight) memset(c->dweight, 0, c->threads * n * D * 8);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 part = 0; part < threads; part++) {
        i64 end = c->tokens * (part + 1) / threads;
        double *sum = c->dweight ? c->dweight + part * n * D : NULL;
        float *weight = calloc(2 * n * wide, 4);
        if (!weight) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        float *few = weight + n * wide;
        for (i64 i = 0; i < n; i++)
            read_row(c->weight_dtype, element(c->weight, c->weight_dtype, i * D), D, weight + i * wide, wide);
        for (i64 t = c->tokens * part / threads, last; t < end; t = last) {
            last = smaller(t + TOGETHER, end);
            if (c->dtype == 0) convolve_tokens(0, c, t, last, weight, wide, few);
            else if (c->dtype == 1) convolve_tokens(1, c, t, last, weight, wide, few);
            else convolve_tokens(2, c, t, last, weight, wide, few);
            for (i64 i = 0; sum && i < n; i++) move_sums(few + i * wide, D, sum + i * D);
        }
        free(weight);
    }
    return failed;
}

/* ---- x + convolve(norm(x)) ---- */

typedef struct { /* of a thread, padded to whole vectors */
    i64 wide;
    float *gain, *weight, *h; /* [D]; [n][D]; [n][D]: token t's norm is in row t % n, its gradient in row 0 */
    float *few_gain, *few;    /* what few tokens add to the gradients of both */
} Taps;

static int get_taps(const AddConvolved *c, Taps *s) {
    i64 n = c->n, D = c->D, wide = s->wide = round_up(D, LANES);
    float *at = s->gain = calloc((3 * n + 2) * wide, 4);
    if (!at) return 0;
    s->weight = at + wide, s->h = s->weight + n * wide, s->few_gain = s->h + n * wide, s->few = s->few_gain + wide;
    for (i64 j = 0; c->gain_dtype < 0 && j < D; j++) s->gain[j] = 1;
    if (c->gain_dtype >= 0) read_row(c->gain_dtype, c->gain, D, s->gain, D);
    for (i64 i = 0; i < n; i++)
        read_row(c->weight_dtype, element(c->weight, c->weight_dtype, i * D), D, s->weight + i * wide, D);
    return 1;
}

/* as a number of the dtype holds it */
INLINE vf rounded(const int dtype, vf x) {
    float held[LANES];
    if (dtype == 0) return x;
    set_all(dtype, x, held);
    return all_of(dtype, held);
}

INLINE void normalise_token(const int h_dtype, const AddConvolved *c, const Taps *s, i64 t) {
    i64 D = c->D;
    const float *x = c->x + t * D;
    float *h = s->h + t % c->n * s->wide;
    vf squares = {0};
    for (i64 j = 0; j < D; j += LANES) {
        vf part = read_at(0, x, j, D);
        squares += part * part;
    }
    float scale = 1 / sqrtf(sum_of(squares) / D + (float)c->eps);
    for (i64 j = 0; j < D; j += LANES)
        store(h + j, rounded(h_dtype, read_at(0, x, j, D) * splat(scale) * load(s->gain + j)));
    if (c->scale) c->scale[t] = scale;
}

INLINE void add_convolved_token(const int h_dtype, const AddConvolved *c, const Taps *s, i64 t) {
    i64 n = c->n, D = c->D, wide = s->wide, taps = taps_before(ORDER(c), t);
    const float *last = s->weight + (n - 1) * wide, *h[n];
    normalise_token(h_dtype, c, s, t);
    for (i64 i = 0; i <= taps; i++) h[i] = s->h + (t - i) % n * wide;
    for (i64 j = 0; j < D; j += LANES) {
        vf y = load(h[0] + j) * load(last + j);
        for (i64 i = taps; i > 0; i--) y += load(last - i * wide + j) * load(h[i] + j);
        write_at(0, read_at(0, c->x + t * D, j, D) + rounded(h_dtype, y), c->y + t * D, j, D);
    }
}

INLINE void add_convolved_token_backward(const int h_dtype, const AddConvolved *c, const Taps *s, i64 t) {
    i64 n = c->n, D = c->D, wide = s->wide, after = taps_after(ORDER(c), t);
    const float *x = c->x + t * D, *dy = c->dy + t * D, *last = s->weight + (n - 1) * wide;
    float *dh = s->h;
    vf scale = splat(c->scale[t]), sum = {0};
    for (i64 j = 0; j < D; j += LANES) {
        vf y = read_at(0, x, j, D) * scale, gain = load(s->gain + j), h = rounded(h_dtype, y * gain), d = {0};
        for (i64 i = 0; i <= after; i++) {
            vf later = read_at(0, dy + i * D, j, D);
            float *few = s->few + (n - 1 - i) * wide + j;
            store(few, load(few) + later * h);
            d += later * load(last - i * wide + j);
        }
        store(dh + j, d);
        store(s->few_gain + j, load(s->few_gain + j) + y * d);
        sum += y * d * gain;
    }
    vf along = splat(sum_of(sum) / D);
    for (i64 j = 0; j < D; j += LANES) {
        vf y = read_at(0, x, j, D) * scale, d = load(dh + j) * load(s->gain + j);
        write_at(0, read_at(0, dy, j, D) + (d - along * y) * scale, c->dx + t * D, j, D);
    }
}

INLINE void add_convolved_tokens(const int h_dtype, const AddConvolved *c, const Taps *s, i64 t, i64 last) {
    for (; t < last; t++)
        if (c->dy) add_convolved_token_backward(h_dtype, c, s, t);
        else add_convolved_token(h_dtype, c, s, t);
}

/* both directions: the backward one if there is a gradient; returns 0, or 1 if memory ran out */
int add_convolved(const AddConvolved *c) {
    int failed = 0, threads = threads_for(c->threads, c->tokens * c->D);
    i64 n = c->n, D = c->D;
    if (c->dy) memset(c->dgain, 0, c->threads * D * 8), memset(c->dweight, 0, c->threads * n * D * 8);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 part = 0; part < threads; part++) {
        i64 first = c->tokens * part / threads, end = c->tokens * (part + 1) / threads;
        Taps s;
        if (!get_taps(c, &s)) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        if (!c->dy && first < end) /* the tokens before its own, which the thread of those has too */
            for (i64 i = taps_before(ORDER(c), first); i > 0; i--) normalise_token((int)c->h_dtype, c, &s, first - i);
        for (i64 t = first, last; t < end; t = last) {
            last = smaller(t + TOGETHER, end);
            if (c->h_dtype == 0) add_convolved_tokens(0, c, &s, t, last);
            else if (c->h_dtype == 1) add_convolved_tokens(1, c, &s, t, last);
            else add_convolved_tokens(2, c, &s, t, last);
            if (c->dy) {
                move_sums(s.few_gain, D, c->dgain + part * D);
                for (i64 i = 0; i < n; i++) move_sums(s.few + i * s.wide, D, c->dweight + (part * n + i) * D);
            }
        }
        free(s.gain);
    }
    return failed;
}

INLINE vf sigmoids_of(vf x) {
    vi sign = (int32_t)0x80000000 + (vi){0}, negative = (vi)x >> 31;
    vf e = exps_of((vf)((vi)x | sign)), own = splat(1.0f) / (splat(1.0f) + e), other = e * own; /* of |x|, of -|x| */
    return (vf)(((vi)other & negative) | ((vi)own & ~negative));
}

INLINE void gate_part(const int dtype, const int swish, const Gated *c, i64 at, i64 n) {
    const void *G = element(c->g, dtype, at), *X = element(c->x, dtype, at);
    for (i64 j = 0; j < n; j += LANES) {
        vf g = read_at(dtype, G, j, n), x = read_at(dtype, X, j, n), s = sigmoids_of(g);
        if (!c->dy) {
            write_at(dtype, swish ? x * s * g : x * s, (void *)element(c->y, dtype, at), j, n);
            continue;
        }
        vf dy = read_at(dtype, element(c->dy, dtype, at), j, n), slope = s * (splat(1.0f) - s), d = dy * x;
        write_at(dtype, dy * (swish ? g * s : s), (void *)element(c->dx, dtype, at), j, n);
        write_at(dtype, d * (swish ? s + g * slope : slope), (void *)element(c->dg, dtype, at), j, n);
    }
}

/* both directions: the backward one if there is a gradient */
void gated(const Gated *c) {
    enum { PART = 512 }; /* numbers at a time. Those of the next part arrive while this one is computed */
    i64 size = size_of(c->dtype);
#pragma omp parallel for schedule(static) num_threads(threads_for(c->threads, c->numbers))
    for (i64 at = 0; at < c->numbers; at += PART) {
        i64 n = smaller(PART, c->numbers - at), next = (at + PART) * size;
        for (i64 j = 0; j < PART * size; j += 64) {
            __builtin_prefetch((const char *)c->g + next + j);
            __builtin_prefetch((const char *)c->x + next + j);
            if (c->dy) __builtin_prefetch((const char *)c->dy + next + j);
        }
        if (c->dtype == 1 && c->swish) gate_part(1, 1, c, at, n);
        else if (c->dtype == 1) gate_part(1, 0, c, at, n);
        else gate_part((int)c->dtype, c->swish != 0, c, at, n);
    }
}

/* Computes the loss of each row of logits, and overwrites them with its gradient. Returns 1 if memory ran out, 2 if a
   target is no column (all other rows are done). */
int softmax_loss(const Softmax *c) {
    enum { WIDE = 4 * LANES }; /* lanes of a sum or maximum, reduced at the end */
    int failed = 0;
#pragma omp parallel num_threads(threads_for(c->threads, c->rows * c->n))
    {
        i64 n = c->n, wide = round_up(n, WIDE), bytes = n * size_of(c->dtype);
        float *x = malloc(wide * 4);
        if (!x) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (i64 row = 0; row < c->rows; row++) {
            i64 target = c->target[row];
            char *at = (char *)c->x + row * bytes;
            if (!x || target < 0 || target >= n) {
                memset(at, 0, bytes), c->loss[row] = 0;
                if (x && target != c->ignore) {
#pragma omp atomic write
                    failed = 2;
                }
                continue;
            }
            read_row(c->dtype, at, n, x, n);
            for (i64 j = n; j < wide; j++) x[j] = -INFINITY;
            float own = x[target], most[WIDE], sum[WIDE] = {0}, top = -INFINITY, all = 0;
            for (int l = 0; l < WIDE; l++) most[l] = -INFINITY;
            for (i64 j = 0; j < wide; j += WIDE)
                for (int l = 0; l < WIDE; l++) most[l] = x[j + l] > most[l] ? x[j + l] : most[l];
            for (int l = 0; l < WIDE; l++) top = most[l] > top ? most[l] : top;
            for (i64 j = 0; j < wide; j += WIDE)
                for (int l = 0; l < WIDE; l++) sum[l] += x[j + l] = exp_of(x[j + l] - top); /* keeps NaN */
            for (int l = 0; l < WIDE; l++) all += sum[l];
            c->loss[row] = logf(all) + top - own;
            all = 1 / all;
            for (i64 j = 0; j < n; j++) x[j] *= all;
            x[target] -= 1;
            write_rows(c->dtype, x, n, 1, n, at, n);
        }
        free(x);
    }
    return failed;
}
