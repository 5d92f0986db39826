/* Row-wise RMSNorm, rotation, gates, short convolutions, and softmax with its loss, each in one pass over memory. The
   formulas are in rows.py.

Arithmetic is float32. Rows are divided among the threads in order, so the grouping of a sum over rows depends only on
the number of threads.
*/

#include "numbers.h"
#include <stdlib.h>

enum { FEW = 1 << 14 }; /* numbers below which waking further threads costs more than they save */

typedef struct {
    i64 rows, n, dtype, y_dtype, weight_dtype, threads; /* y_dtype: of y and dy; weight_dtype: -1 without weight */
    double eps;
    const void *x, *weight, *dy;
    void *y, *dx;
    float *scale;    /* [rows] */
    double *dweight; /* [threads][n], double since it sums many rows */
} Norm;

typedef struct {
    i64 tokens, T, H, K, dtype, half, phase_rows, scale_rows, stride, threads; /* rows: 1 (0: none), T or tokens */
    double sign;                                                               /* of the angle */
    const void *x;                                                             /* tokens `stride` elements apart */
    const float *cos, *sin, *scale;                                            /* [phase_rows][K/2]; [scale_rows][H] */
    void *y;
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

static int threads_for(i64 threads, i64 numbers) { return numbers < FEW ? 1 : (int)threads; }

/* returns 0, or 1 if memory ran out */
int rms_norm(const Norm *c) {
    int failed = 0;
#pragma omp parallel num_threads(threads_for(c->threads, c->rows * c->n))
    {
        i64 n = c->n, bytes = n * size_of(c->dtype), y_bytes = n * size_of(c->y_dtype);
        float *x = malloc(2 * n * 4), *weight = x + n;
        if (x && c->weight_dtype >= 0) read_row(c->weight_dtype, c->weight, n, weight, n);
        if (!x) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (i64 row = 0; row < c->rows; row++) {
            if (!x) continue;
            read_row(c->dtype, (const char *)c->x + row * bytes, n, x, n);
            float scale = 1 / sqrtf(dot(x, x, n) / n + (float)c->eps);
            if (c->weight_dtype >= 0)
                for (i64 j = 0; j < n; j++) x[j] = x[j] * scale * weight[j];
            else
                for (i64 j = 0; j < n; j++) x[j] *= scale;
            write_rows(c->y_dtype, x, n, 1, n, (char *)c->y + row * y_bytes, n);
            if (c->scale) c->scale[row] = scale;
        }
        free(x);
    }
    return failed;
}

int rms_norm_backward(const Norm *c) {
    int failed = 0;
    i64 n = c->n, bytes = n * size_of(c->dtype), y_bytes = n * size_of(c->y_dtype);
    int threads = threads_for(c->threads, c->rows * n);
    if (c->dweight) memset(c->dweight, 0, c->threads * n * 8);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 part = 0; part < threads; part++) {
        float *y = malloc(3 * n * 4), *dy = y + n, *weight = dy + n;
        double *sum = c->dweight ? c->dweight + part * n : NULL;
        if (!y) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        if (c->weight_dtype >= 0) read_row(c->weight_dtype, c->weight, n, weight, n);
        for (i64 row = c->rows * part / threads; row < c->rows * (part + 1) / threads; row++) {
            float scale = c->scale[row];
            read_row(c->dtype, (const char *)c->x + row * bytes, n, y, n);
            read_row(c->y_dtype, (const char *)c->dy + row * y_bytes, n, dy, n);
            for (i64 j = 0; j < n; j++) y[j] *= scale;
            if (sum)
                for (i64 j = 0; j < n; j++) sum[j] += dy[j] * y[j];
            if (c->weight_dtype >= 0)
                for (i64 j = 0; j < n; j++) dy[j] *= weight[j];
            float along = dot(dy, y, n) / n; /* the gradient's part along x, which only changes its length */
            for (i64 j = 0; j < n; j++) y[j] = (dy[j] - along * y[j]) * scale;
            write_rows(c->dtype, y, n, 1, n, (char *)c->dx + row * bytes, n);
        }
        free(y);
    }
    return failed;
}

INLINE i64 place(i64 rows, i64 token, i64 T) { return rows == 1 ? 0 : rows == T ? token % T : token; }

int rotate(const Rotate *c) {
    int failed = 0;
    i64 H = c->H, K = c->K, size = size_of(c->dtype);
#pragma omp parallel num_threads(threads_for(c->threads, c->tokens * H * K))
    {
        float *x = malloc(2 * K * 4), *y = x + K;
        if (!x) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (i64 t = 0; t < c->tokens; t++) {
            if (!x) continue;
            const float *cosine = c->cos + place(c->phase_rows, t, c->T) * (K / 2);
            const float *sine = c->sin + place(c->phase_rows, t, c->T) * (K / 2);
            const float *scale = c->scale_rows ? c->scale + place(c->scale_rows, t, c->T) * H : NULL;
            for (i64 h = 0; h < H; h++) {
                float factor = scale ? scale[h] : 1, turned = factor * (float)c->sign;
                read_row(c->dtype, (const char *)c->x + (t * c->stride + h * K) * size, K, x, K);
                if (c->half)
                    for (i64 i = 0; i < K / 2; i++) {
                        float a = x[i], b = x[i + K / 2], u = factor * cosine[i], w = turned * sine[i];
                        y[i] = a * u - b * w, y[i + K / 2] = b * u + a * w;
                    }
                else
                    for (i64 i = 0; i < K / 2; i++) {
                        float a = x[2 * i], b = x[2 * i + 1], u = factor * cosine[i], w = turned * sine[i];
                        y[2 * i] = a * u - b * w, y[2 * i + 1] = b * u + a * w;
                    }
                write_rows(c->dtype, y, K, 1, K, (char *)c->y + (t * H + h) * K * size, K);
            }
        }
        free(x);
    }
    return failed;
}

/* taps of token t beside its own: 0 for the first of a sequence, then more, up to n - 1 */
INLINE i64 taps_before(const Convolve *c, i64 t) {
    i64 since = c->since ? c->since[t] : t % c->T;
    return since < c->n - 1 ? since : c->n - 1;
}

enum { SLAB = 1024, TOGETHER = 64 }; /* features at a time, whose rows stay in the cache; tokens summed in float32 */

static void weights_of(const Convolve *c, i64 at, i64 D, float *weight) {
    i64 size = size_of(c->weight_dtype);
    for (i64 i = 0; i < c->n; i++)
        read_row(c->weight_dtype, (const char *)c->weight + (i * c->D + at) * size, D, weight + i * D, D);
}

static void convolve_slab(const Convolve *c, i64 at, i64 D, i64 first, i64 last, float *space) {
    i64 n = c->n, size = size_of(c->dtype), bytes = c->D * size, from = at * size;
    float *y = space, *weight = y + D, *x = weight + n * D;
    weights_of(c, at, D, weight);
    for (i64 t = first < n ? 0 : first - n + 1; t < last; t++) { /* token t is row t % n of x */
        float *own = x + t % n * D;
        read_row(c->dtype, (const char *)c->x + t * bytes + from, D, own, D);
        if (t < first) continue;
        for (i64 j = 0; j < D; j++) y[j] = own[j] * weight[(n - 1) * D + j];
        for (i64 i = taps_before(c, t); i > 0; i--) {
            const float *w = weight + (n - 1 - i) * D, *before = x + (t - i) % n * D;
            for (i64 j = 0; j < D; j++) y[j] += w[j] * before[j];
        }
        write_rows(c->dtype, y, D, 1, D, (char *)c->y + t * bytes + from, D);
    }
}

static void convolve_slab_backward(const Convolve *c, i64 at, i64 D, i64 first, i64 last, double *sums, float *space) {
    i64 n = c->n, size = size_of(c->dtype), bytes = c->D * size, from = at * size;
    float *dx = space, *weight = dx + D, *x = weight + n * D, *dy = x + n * D, *few = dy + n * D;
    memset(few, 0, n * D * 4);
    weights_of(c, at, D, weight);
    for (i64 t = first < n ? 0 : first - n + 1; t < first; t++)
        read_row(c->dtype, (const char *)c->x + t * bytes + from, D, x + t % n * D, D);
    for (i64 t = first; t < first + n - 1 && t < c->tokens; t++)
        read_row(c->dtype, (const char *)c->dy + t * bytes + from, D, dy + t % n * D, D);
    for (i64 t = first; t < last; t++) { /* x holds the n rows up to t, dy those from t on */
        i64 ahead = t + n - 1, taps = taps_before(c, t);
        const float *own = dy + t % n * D;
        read_row(c->dtype, (const char *)c->x + t * bytes + from, D, x + t % n * D, D);
        if (ahead < c->tokens) read_row(c->dtype, (const char *)c->dy + ahead * bytes + from, D, dy + ahead % n * D, D);
        for (i64 j = 0; j < D; j++) dx[j] = own[j] * weight[(n - 1) * D + j];
        for (i64 i = 1; i < n && t + i < c->tokens && taps_before(c, t + i) >= i; i++) {
            const float *w = weight + (n - 1 - i) * D, *after = dy + (t + i) % n * D;
            for (i64 j = 0; j < D; j++) dx[j] += w[j] * after[j];
        }
        write_rows(c->dtype, dx, D, 1, D, (char *)c->dx + t * bytes + from, D);
        for (i64 i = 0; i <= taps; i++) {
            float *sum = few + (n - 1 - i) * D;
            const float *before = x + (t - i) % n * D;
            for (i64 j = 0; j < D; j++) sum[j] += own[j] * before[j];
        }
        if (t + 1 < last && (t + 1 - first) % TOGETHER) continue;
        for (i64 i = 0; i < n; i++)
            for (i64 j = 0; j < D; j++) sums[i * c->D + at + j] += few[i * D + j];
        memset(few, 0, n * D * 4);
    }
}

/* both directions: the backward one if there are sums of the weights' gradients */
int convolve(const Convolve *c) {
    int failed = 0, threads = threads_for(c->threads, c->tokens * c->D);
    if (c->dweight) memset(c->dweight, 0, c->threads * c->n * c->D * 8);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 part = 0; part < threads; part++) {
        i64 first = c->tokens * part / threads, last = c->tokens * (part + 1) / threads;
        float *space = malloc((4 * c->n + 1) * SLAB * 4);
        if (!space) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
        for (i64 at = 0; at < c->D; at += SLAB) {
            i64 D = c->D - at < SLAB ? c->D - at : SLAB;
            if (c->dweight) convolve_slab_backward(c, at, D, first, last, c->dweight + part * c->n * c->D, space);
            else convolve_slab(c, at, D, first, last, space);
        }
        free(space);
    }
    return failed;
}

INLINE float sigmoid_of(float x) {
    float e = exp_of(-fabsf(x)), own = 1 / (1 + e), other = e * own; /* of |x|, of -|x| */
    return x < 0 ? other : own;
}

/* both directions: the backward one if there is a gradient */
void gated(const Gated *c) {
    enum { PART = 512 }; /* numbers at a time. Those of the next part arrive while this one is computed */
    i64 size = size_of(c->dtype);
    int swish = c->swish != 0;
#pragma omp parallel for schedule(static) num_threads(threads_for(c->threads, c->numbers))
    for (i64 at = 0; at < c->numbers; at += PART) {
        float g[PART], x[PART], dy[PART];
        i64 n = smaller(PART, c->numbers - at), begin = at * size, next = begin + PART * size;
        for (i64 j = 0; j < PART * size; j += 64) {
            __builtin_prefetch((const char *)c->g + next + j);
            __builtin_prefetch((const char *)c->x + next + j);
            if (c->dy) __builtin_prefetch((const char *)c->dy + next + j);
        }
        read_row(c->dtype, (const char *)c->g + begin, n, g, n);
        read_row(c->dtype, (const char *)c->x + begin, n, x, n);
        if (!c->dy) {
            for (i64 j = 0; j < n; j++) x[j] *= sigmoid_of(g[j]);
            for (i64 j = 0; swish && j < n; j++) x[j] *= g[j];
            write_rows(c->dtype, x, n, 1, n, (char *)c->y + begin, n);
            continue;
        }
        read_row(c->dtype, (const char *)c->dy + begin, n, dy, n);
        for (i64 j = 0; j < n; j++) {
            float s = sigmoid_of(g[j]), slope = s * (1 - s), d = dy[j] * x[j];
            x[j] = dy[j] * (swish ? g[j] * s : s);
            g[j] = d * (swish ? s + g[j] * slope : slope);
        }
        write_rows(c->dtype, g, n, 1, n, (char *)c->dg + begin, n);
        write_rows(c->dtype, x, n, 1, n, (char *)c->dx + begin, n);
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
