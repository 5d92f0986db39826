/* Basics for all files here: vectors of the machine's width, conversion of three types to and from float32, exp. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { AHEAD = 16 };

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int64_t i64;
#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE void store(float *p, vf x) { *(vf *)p = x; }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf splat_unit(const float *p) { return (vf)(*(const int32_t *)p + (vi){0}); } /* bits, not a number */
INLINE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 larger(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 round_up(i64 a, i64 b) { return (a + b - 1) / b * b; }

/* dtype: 0 float32, 1 bfloat16, 2 float16 */
enum { BYTES = 3 }; /* a dtype of states */

INLINE float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE uint16_t to_bf16(float x) { /* rounds to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x != x ? 0x7fc0 : (uint16_t)rounded;
}

#ifdef __FLT16_MAX__
typedef _Float16 half;
#else /* a compiler without _Float16: cpu.py offers no float16 then */
typedef uint16_t half;
#endif

INLINE float from_half(half x) {
#ifdef __FLT16_MAX__
    return (float)x;
#else
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7fff, bits;
    float y;
    if (rest >= 0x7c00) bits = (rest << 13) + 0x70000000;                        /* infinity, NaN */
    else if (rest >= 0x400) bits = (rest << 13) + 0x38000000;
    else return (sign ? -1 : 1) * (float)rest * 5.9604644775390625e-8f;          /* 2^-24: subnormal */
    bits |= sign;
    memcpy(&y, &bits, 4);
    return y;
#endif
}

/* converts `n` float32 to bfloat16 */
INLINE void write_bf16(const float *from, i64 n, uint16_t *to) {
    i64 j = 0;
#ifdef __AVX512BF16__ /* takes what is below the least normal number for 0, and is else to_bf16 in one instruction */
    for (; j + 16 <= n; j += 16)
        _mm256_storeu_si256((__m256i *)(to + j), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + j)));
#endif
    for (; j < n; j++) to[j] = to_bf16(from[j]);
}

INLINE i64 size_of(i64 dtype) { return dtype == 0 ? 4 : 2; }
INLINE const void *element(const void *p, i64 dtype, i64 i) { return (const char *)p + i * size_of(dtype); }

/* converts a row of `n` elements to float32, with zeros up to `width` */
INLINE void read_row(i64 dtype, const void *from, i64 n, float *to, i64 width) {
    if (dtype == 0) memcpy(to, from, n * 4);
    else if (dtype == 1) {
        const uint16_t *x = from;
        for (i64 j = 0; j < n; j++) to[j] = from_bf16(x[j]);
    } else {
        const half *x = from;
        for (i64 j = 0; j < n; j++) to[j] = from_half(x[j]);
    }
    for (i64 j = n; j < width; j++) to[j] = 0;
}

/* Converts rows of `n` elements, `stride` apart, to float32 rows of `width`, with zeros after the last element and row.
   The rows are too far apart for the hardware prefetcher, so AHEAD rows are prefetched here. */
static inline void read_rows(i64 dtype, const void *from, i64 stride, i64 rows, i64 n, float *to, i64 width, i64 all_rows) {
    for (i64 i = 0; i < rows; i++, to += width) {
        for (i64 j = 0; j < n; j += dtype == 0 ? 16 : 32)
            __builtin_prefetch(element(from, dtype, (i + AHEAD) * stride + j));
        read_row(dtype, element(from, dtype, i * stride), n, to, width);
    }
    memset(to, 0, (all_rows - rows) * width * 4);
}

static inline void write_rows(i64 dtype, const float *from, i64 width, i64 rows, i64 n, void *to, i64 stride) {
    for (i64 i = 0; i < rows; i++, from += width) {
        if (dtype == 0) memcpy((float *)to + i * stride, from, n * 4);
        else if (dtype == 1) write_bf16(from, n, (uint16_t *)to + i * stride);
        else {
            half *y = (half *)to + i * stride;
            for (i64 j = 0; j < n; j++) y[j] = (half)from[j];
        }
    }
}

/* n numbers as floats, zeros after them; n is at most what a vector has lanes for, and `dtype` a constant */
INLINE vf some_of(const int dtype, const void *p, i64 n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    __mmask16 there = (__mmask16)((1u << n) - 1);
    if (dtype == BYTES) return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, p)));
    if (dtype == 2) return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, p));
    if (dtype == 1) return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, p)), 16);
    return (vf)_mm512_maskz_loadu_ps(there, p);
#endif
    float x[LANES] = {0};
    if (dtype == BYTES)
        for (i64 i = 0; i < n; i++) x[i] = ((const int8_t *)p)[i];
    else read_row(dtype, p, n, x, n);
    return load(x);
}

/* as many as there are lanes */
INLINE vf all_of(const int dtype, const void *p) {
    if (dtype == 0) return load((const float *)p);
#if defined(__AVX2__) && !defined(__AVX512F__)
    if (dtype == BYTES) return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
    if (dtype == 1) return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#elif defined(__SSE2__) && !defined(__AVX__)
    if (dtype == BYTES) {
        int32_t four;
        memcpy(&four, p, 4);
        __m128i x = _mm_cvtsi32_si128(four), twice = _mm_unpacklo_epi8(x, x);
        return (vf)_mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24));
    }
    if (dtype == 1) return (vf)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)p));
#endif
    return some_of(dtype, p, LANES);
}

/* writes n numbers, at most what a vector has lanes for */
INLINE void set_some(const int dtype, vf x, void *p, i64 n) {
    float row[LANES];
    store(row, x);
    write_rows(dtype, row, LANES, 1, n, p, n);
}

INLINE void set_all(const int dtype, vf x, void *p) {
    if (dtype == 0) store((float *)p, x);
#ifdef __AVX512BF16__
    else if (dtype == 1) _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#endif
    else set_some(dtype, x, p, LANES);
}

/* elements of a row of n, from j on */
INLINE vf read_at(const int dtype, const void *row, i64 j, i64 n) {
    const void *p = element(row, dtype, j);
    return j + LANES <= n ? all_of(dtype, p) : some_of(dtype, p, n - j);
}

INLINE void write_at(const int dtype, vf x, void *row, i64 j, i64 n) {
    void *p = (void *)element(row, dtype, j);
    if (j + LANES <= n) set_all(dtype, x, p);
    else set_some(dtype, x, p, n - j);
}

/* the sum of a vector's lanes, by halves */
INLINE float sum_of(vf x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#endif
    float all[LANES];
    store(all, x);
#pragma GCC unroll 4
    for (int width = LANES / 2; width; width /= 2)
#pragma GCC unroll 8
        for (int n = 0; n < width; n++) all[n] += all[n + width];
    return all[0];
}

static inline float dot(const float *a, const float *b, i64 n) {
    vf sum = {0};
    i64 j = 0;
    for (; j + LANES <= n; j += LANES) sum += load(a + j) * load(b + j);
    float all = sum_of(sum);
    for (; j < n; j++) all += a[j] * b[j];
    return all;
}

INLINE float bounded(float log_decay) { return log_decay < -100 ? -100 : log_decay; } /* blocked.FORGOTTEN; NaN stays */

/* exp(y) = p 2^n for -87 <= y <= 0, n whole; of a number or a vector */
#define EXP_PARTS(type, y, n, p)                                               \
    type n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;                    \
    type rest = (y - n * 0.693359375f) - n * -2.12194440e-4f;                  \
    type p = rest * 1.9875691500e-4f + 1.3981999507e-3f;                       \
    p = p * rest + 8.3334519073e-3f;                                           \
    p = p * rest + 4.1665795894e-2f;                                           \
    p = p * rest + 1.6666665459e-1f;                                           \
    p = p * rest + 5.0000001201e-1f;                                           \
    p = p * rest * rest + rest + 1.0f;

INLINE float exp_of(float x) { /* for x <= 0, to 1 ulp; plain arithmetic, so that loops over it vectorise */
    float y = x < -87.0f ? -87.0f : x;
    EXP_PARTS(float, y, n, p)
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

INLINE vf exps_of(vf x) { /* exp_of each lane */
    vf least = splat(-87.0f);
    vi below = x < least;
    vf y = (vf)(((vi)x & ~below) | ((vi)least & below));
    EXP_PARTS(vf, y, n, p)
    vf power = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return (vf)((vi)(p * power) & ~below);
}
