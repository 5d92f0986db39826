/* Row-wise RMSNorm, rotation, and softmax with its loss, each in one pass over memory. The formulas are in rows.py.

Arithmetic is float32. Rows are divided among the threads in order, so the grouping of a sum over rows depends only on
the number of threads.
*/

#include "numbers.h"
#include <stdlib.h>

enum { FEW = 1 << 14 }; /* numbers below which waking further threads costs more than they save */

typedef struct {
    i64 rows, n, dtype, weight_dtype, threads; /* weight_dtype: -1 without weight */
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
    i64 rows, n, dtype, ignore, threads;
    const i64 *target; /* [rows] */
    void *x;
    float *loss; /* [rows] */
} Softmax;

static int threads_for(i64 threads, i64 numbers) { return numbers < FEW ? 1 : (int)threads; }

/* returns 0, or 1 if memory ran out */
int rms_norm(const Norm *c) {
    int failed = 0;
#pragma omp parallel num_threads(threads_for(c->threads, c->rows * c->n))
    {
        i64 n = c->n, bytes = n * size_of(c->dtype);
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
            write_rows(c->dtype, x, n, 1, n, (char *)c->y + row * bytes, n);
            if (c->scale) c->scale[row] = scale;
        }
        free(x);
    }
    return failed;
}

int rms_norm_backward(const Norm *c) {
    int failed = 0;
    i64 n = c->n, bytes = n * size_of(c->dtype);
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
            read_row(c->dtype, (const char *)c->dy + row * bytes, n, dy, n);
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
