/* Products with the parts of residuals, as common/plan/residual.py lays them out. Included by the CPU kernels of both
 * engines; C11 and C++17; for the processors of vectors.h. Everything is static: no library, no state, no allocation, no threads.
 *
 * A part adds y[m][n] += sum_k x[m][k] R[n][k] in two steps, so that callers can share each of them out among threads:
 *
 *     t = float[rows][stride], stride >= residual_width(part)
 *     residual_first_T(part, x, rows, i0, i1, t, stride)            for all i0..i1 of 0..residual_width(part)
 *     residual_second_T(part, x, t, stride, rows, n0, n1, y)        for all n0..n1 of 0..part->outputs
 *
 * with T the type of x, f32 or bf16 (bits of the upper half of a float32). x: a pointer to each row, [inputs], not
 * padded. y: a pointer to where output n0 of each row is, float32. n0 is a multiple of 16; n1, inputs and outputs are
 * any. `rows` is any, too: what is packed is read once for four rows. t is
 *   - low rank: scale_i * sum_k x[m][k] v[i][k], a value for each component i;
 *   - sign: sum_k x[m][k], one value. y[m][n] += scale[n / size] * (2 * sum over set bits of x[m][k] - t[m][0]).
 * What is packed is expanded in registers. The bits of a result depend on its row and the part only, not on how rows,
 * components and outputs are cut.
 *
 * Letters: M rows of a tile, K inputs, N outputs.
 */

#ifndef MOETEL_RESIDUALS_H
#define MOETEL_RESIDUALS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "vectors.h"

#define RESIDUAL_SIGN 0
#define RESIDUAL_LOW_RANK 1

/* One part of one matrix [outputs, inputs]. All fields have 8 bytes, so that an int64 array [parts, 6] is an array of
 * these. data: where the part begins in its record. bits: 1 for sign; 2, 4, 8, 16 or 32. size: outputs that share a
 * scale (sign), rank (low rank). */
typedef struct residual_part {
    const uint8_t *data;
    int64_t kind, bits, size, outputs, inputs;
} residual_part;

#define RESIDUAL_INLINE static inline __attribute__((always_inline))

RESIDUAL_INLINE int64_t residual_least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Bytes of a row of `count` numbers, padded to a multiple of 4. */
RESIDUAL_INLINE int64_t residual_row_bytes(int64_t count, int64_t bits) { return (count * bits + 31) / 32 * 4; }

/* Values of t that a part has for each row. */
RESIDUAL_INLINE int64_t residual_width(const residual_part *p) { return p->kind == RESIDUAL_SIGN ? 1 : p->size; }

/* x[k..k+15], or, for the last k of a row, what is left of it and zeros. */
RESIDUAL_INLINE v16 residual_load(const int bf16, const void *x, int64_t k) {
    return bf16 ? v_load_bf16((const uint16_t *)x + k) : v_load((const float *)x + k);
}

/* ends[m] = the last inputs of each row from k on, at most 64 bytes, and zeros; in `tail`, 64 bytes a row. */
RESIDUAL_INLINE void residual_tails(const int M, const int bf16, const void *const *x, int64_t k, int64_t K,
                                    uint32_t *tail, const void **ends) {
    const int64_t size = bf16 ? 2 : 4;
    memset(tail, 0, (size_t)M * 64);
    for (int m = 0; m < M; m++) {
        memcpy(tail + m * 16, (const char *)x[m] + k * size, (size_t)((K - k) * size));
        ends[m] = tail + m * 16;
    }
}

/* y[0..count-1] = scale * (doubled ? 2 v - less : v) + y, for up to four outputs. */
RESIDUAL_INLINE void residual_store(float *y, int64_t count, const float *scale, const float *v, const int doubled,
                                    float less) {
    for (int64_t i = 0; i < count; i++) y[i] = fmaf(scale[i], doubled ? fmaf(2.0f, v[i], -less) : v[i], y[i]);
}

/* ---- sign */

/* Whether bfloat16 rows are multiplied by +1 and -1, two inputs at once, instead of summed where bits are set. */
#if defined(__AVX512BF16__) && !defined(MOETEL_NO_BF16)
#define RESIDUAL_PAIRS 1
#else
#define RESIDUAL_PAIRS 0
#endif

/* acc[m][i] += what the codes at rows[i] and inputs k.. of x[m] give. */
RESIDUAL_INLINE void residual_sign_step(const int M, const int P, const int bf16, const void *const *x, int64_t k,
                                        const uint8_t *const *rows, int64_t at, v16 (*acc)[8]) {
#if RESIDUAL_PAIRS
    if (bf16) {
        __m512bh signs[8];
#pragma GCC unroll 8
        for (int i = 0; i < P; i++) {
            uint32_t bits;
            memcpy(&bits, rows[i] + at / 8, 4);
            signs[i] = (__m512bh)_mm512_mask_blend_epi16((__mmask32)bits, _mm512_set1_epi16((short)0xbf80),
                                                         _mm512_set1_epi16(0x3f80));
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const __m512bh v = (__m512bh)_mm512_loadu_si512((const uint16_t *)x[m] + k);
#pragma GCC unroll 8
            for (int i = 0; i < P; i++) acc[m][i] = _mm512_dpbf16_ps(acc[m][i], signs[i], v);
        }
        return;
    }
#endif
    uint16_t bits[8];
#pragma GCC unroll 8
    for (int i = 0; i < P; i++) memcpy(&bits[i], rows[i] + at / 8, 2);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
        const v16 v = residual_load(bf16, x[m], k);
#pragma GCC unroll 8
        for (int i = 0; i < P; i++) acc[m][i] = v_add_where(acc[m][i], bits[i], v);
    }
}

#define RESIDUAL_OUTPUTS (VECTOR_REGISTERS >= 16 ? 8 : 4) /* at a time, of one row or two */

/* M rows, outputs n0..n1, P (4 or 8) of them at a time. */
RESIDUAL_INLINE void residual_sign_tile(const int M, const int P, const int bf16, const residual_part *p,
                                        const void *const *x, const float *t, int64_t stride, int64_t n0, int64_t n1,
                                        float *const *y) {
    const int64_t K = p->inputs, width = residual_row_bytes(K, 1);
    const uint8_t *codes = p->data + residual_row_bytes((p->outputs + p->size - 1) / p->size, 16);
    const int step = RESIDUAL_PAIRS && bf16 ? 32 : 16;
    const int64_t whole = K / step * step;
    uint32_t tail[4 * 16];
    const void *ends[4];
    if (whole < K) residual_tails(M, bf16, x, whole, K, tail, ends);
    int64_t group = n0 / p->size, left = (group + 1) * p->size - n0; /* the scale of n; outputs that still share it */
    for (int64_t n = n0; n < n1; n += P) {
        const int64_t count = residual_least(P, n1 - n);
        const uint8_t *rows[8];
        float scale[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (int i = 0; i < P; i++) {
            rows[i] = codes + (n + residual_least(i, count - 1)) * width;
            if (i >= count) continue;
            uint16_t half;
            memcpy(&half, p->data + 2 * group, 2);
            const uint32_t bits = (uint32_t)half << 16;
            memcpy(&scale[i], &bits, 4);
            if (--left == 0) group++, left = p->size;
        }
        v16 acc[4][8];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int i = 0; i < P; i++) acc[m][i] = v_zero();
        for (int64_t k = 0; k < whole; k += step) residual_sign_step(M, P, bf16, x, k, rows, k, acc);
        if (whole < K) residual_sign_step(M, P, bf16, ends, 0, rows, whole, acc);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
            for (int i = 0; i < P; i += 4)
                if (i < count) {
                    float sums[4];
                    v_sums(acc[m][i], acc[m][i + 1], acc[m][i + 2], acc[m][i + 3], sums);
                    residual_store(y[m] + n - n0 + i, residual_least(4, count - i), scale + i, sums,
                                   !(RESIDUAL_PAIRS && bf16), t[m * stride]);
                }
    }
}

/* t[m][0] = sum_k x[m][k]. */
RESIDUAL_INLINE void residual_sum(const int bf16, const residual_part *p, const void *x, float *t) {
    const int64_t K = p->inputs, whole = K / 16 * 16;
    uint32_t tail[16];
    v16 sum = v_zero();
    for (int64_t k = 0; k < whole; k += 16) sum = v_add(sum, residual_load(bf16, x, k));
    if (whole < K) {
        const void *end;
        residual_tails(1, bf16, &x, whole, K, tail, &end);
        sum = v_add(sum, residual_load(bf16, end, 0));
    }
    *t = v_sum(sum);
}

/* ---- low rank */

/* Sixteen numbers from their codes, which begin at a byte. */
RESIDUAL_INLINE v16 residual_decode(const int bits, const uint8_t *from) {
    switch (bits) {
    case 2: return v_codes2(from);
    case 4: return v_codes4(from);
    case 8: return v_codes8(from);
    case 16: return v_load_f16(from);
    default: return v_load((const float *)from);
    }
}

/* The last numbers of a row of `count`, from number `at` on (a multiple of 16). What follows them is undefined where
 * zero bits stand for another number than 0. */
RESIDUAL_INLINE v16 residual_decode_tail(const int bits, const uint8_t *row, int64_t at, int64_t count) {
    uint8_t buffer[64];
    memset(buffer, 0, sizeof buffer);
    memcpy(buffer, row + at * bits / 8, (size_t)(((count - at) * bits + 7) / 8));
    return residual_decode(bits, buffer);
}

/* acc[m][c] += values[c] * x[m][k..k+15]. */
RESIDUAL_INLINE void residual_add_products(const int M, const int bf16, const void *const *x, int64_t k,
                                           const v16 *values, v16 (*acc)[4]) {
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
        const v16 value = residual_load(bf16, x[m], k);
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) acc[m][c] = v_fma(values[c], value, acc[m][c]);
    }
}

/* t[m][i] for M rows and components i0..i1. */
RESIDUAL_INLINE void residual_first_tile(const int M, const int bf16, const int bits, const residual_part *p,
                                         const void *const *x, int64_t i0, int64_t i1, float *t, int64_t stride) {
    const int64_t K = p->inputs, width = residual_row_bytes(K, bits), whole = K / 16 * 16;
    const uint8_t *v = p->data + 4 * p->size;
    uint32_t tail[4 * 16];
    const void *ends[4];
    if (whole < K) residual_tails(M, bf16, x, whole, K, tail, ends);
    for (int64_t i = i0; i < i1; i += 4) {
        const int64_t count = residual_least(4, i1 - i);
        const uint8_t *rows[4];
        float scale[4] = {0, 0, 0, 0};
        for (int c = 0; c < 4; c++) rows[c] = v + (i + residual_least(c, count - 1)) * width;
        memcpy(scale, p->data + 4 * i, (size_t)count * 4);
        v16 acc[4][4];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) acc[m][c] = v_zero();
        v16 values[4];
        for (int64_t k = 0; k < whole; k += 16) {
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) values[c] = residual_decode(bits, rows[c] + k * bits / 8);
            residual_add_products(M, bf16, x, k, values, acc);
        }
        if (whole < K) {
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) values[c] = residual_decode_tail(bits, rows[c], whole, K);
            residual_add_products(M, bf16, ends, 0, values, acc);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            float sums[4];
            v_sums(acc[m][0], acc[m][1], acc[m][2], acc[m][3], sums);
            for (int64_t c = 0; c < count; c++) t[m * stride + i + c] = scale[c] * sums[c];
        }
    }
}

/* y[m][..] += for M rows and Q * 16 outputs from n on, of which those before n1 are stored. y[m] is where n is.
 * tail: whether rows of u end before n + 16; Q is then 1. */
RESIDUAL_INLINE void residual_second_tile(const int M, const int Q, const int tail, const int bits,
                                          const residual_part *p, const float *t, int64_t stride, int64_t n,
                                          int64_t n1, float *const *y) {
    const int64_t N = p->outputs, width = residual_row_bytes(N, bits);
    const uint8_t *u = p->data + p->size * (4 + residual_row_bytes(p->inputs, bits));
    v16 acc[4][4];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) acc[m][q] = v_zero();
    for (int64_t i = 0; i < p->size; i++) {
        const uint8_t *row = u + i * width;
        v16 values[4];
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++)
            values[q] = tail ? residual_decode_tail(bits, row, n, N)
                             : residual_decode(bits, row + (n + 16 * q) * bits / 8);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const v16 value = v_set1(t[m * stride + i]);
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) acc[m][q] = v_fma(values[q], value, acc[m][q]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) {
            float *to = y[m] + 16 * q;
            v_store_some(to, v_add(v_load_some(to, n1 - n), acc[m][q]), n1 - n); /* Q > 1: all */
        }
}

RESIDUAL_INLINE void residual_second_rows(const int M, const int bits, const residual_part *p, const float *t,
                                          int64_t stride, int64_t n0, int64_t n1, float *const *y) {
    int64_t n = n0;
    float *to[4];
    for (int m = 0; m < M; m++) to[m] = y[m];
    for (; n + 64 <= n1; n += 64) {
        residual_second_tile(M, 4, 0, bits, p, t, stride, n, n1, to);
        for (int m = 0; m < M; m++) to[m] += 64;
    }
    for (; n < n1; n += 16) {
        if (n + 16 <= p->outputs)
            residual_second_tile(M, 1, 0, bits, p, t, stride, n, n1, to);
        else
            residual_second_tile(M, 1, 1, bits, p, t, stride, n, n1, to);
        for (int m = 0; m < M; m++) to[m] += 16;
    }
}

/* ---- what callers use. Rows of a tile and bits are constants inside, so that sums stay in registers. */

#define RESIDUAL_FOUR (VECTOR_REGISTERS >= 16) /* whether there are tiles of four rows */

#define RESIDUAL_ROWS(M, function, ...)           \
    do {                                          \
        if ((M) == 4 && RESIDUAL_FOUR)            \
            function(4, __VA_ARGS__);             \
        else if ((M) == 2)                        \
            function(2, __VA_ARGS__);             \
        else                                      \
            function(1, __VA_ARGS__);             \
    } while (0)

/* Rows of the next tile: 4, 2 or 1. */
RESIDUAL_INLINE int residual_tile(int64_t rows) { return rows >= 4 && RESIDUAL_FOUR ? 4 : rows >= 2 ? 2 : 1; }

static inline void residual_second_low_rank(const residual_part *p, const float *t, int64_t stride, int M, int64_t n0,
                                            int64_t n1, float *const *y) {
    switch (p->bits) {
    case 2: RESIDUAL_ROWS(M, residual_second_rows, 2, p, t, stride, n0, n1, y); break;
    case 4: RESIDUAL_ROWS(M, residual_second_rows, 4, p, t, stride, n0, n1, y); break;
    case 8: RESIDUAL_ROWS(M, residual_second_rows, 8, p, t, stride, n0, n1, y); break;
    case 16: RESIDUAL_ROWS(M, residual_second_rows, 16, p, t, stride, n0, n1, y); break;
    default: RESIDUAL_ROWS(M, residual_second_rows, 32, p, t, stride, n0, n1, y); break;
    }
}

/* One source for both types of x. */
#define RESIDUAL_DEFINE(SUFFIX, TYPE, BF16)                                                                            \
    static inline void residual_first_tile_##SUFFIX(const residual_part *p, const void *const *x, int M, int64_t i0,   \
                                                    int64_t i1, float *t, int64_t stride) {                            \
        switch (p->bits) {                                                                                             \
        case 2: RESIDUAL_ROWS(M, residual_first_tile, BF16, 2, p, x, i0, i1, t, stride); break;                        \
        case 4: RESIDUAL_ROWS(M, residual_first_tile, BF16, 4, p, x, i0, i1, t, stride); break;                        \
        case 8: RESIDUAL_ROWS(M, residual_first_tile, BF16, 8, p, x, i0, i1, t, stride); break;                        \
        case 16: RESIDUAL_ROWS(M, residual_first_tile, BF16, 16, p, x, i0, i1, t, stride); break;                      \
        default: RESIDUAL_ROWS(M, residual_first_tile, BF16, 32, p, x, i0, i1, t, stride); break;                      \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static inline void residual_sign_##SUFFIX(const residual_part *p, const void *const *x, const float *t,            \
                                              int64_t stride, int M, int64_t n0, int64_t n1, float *const *y) {        \
        if (M == 4 && RESIDUAL_FOUR)                                                                                   \
            residual_sign_tile(4, 4, BF16, p, x, t, stride, n0, n1, y);                                                \
        else if (M == 2)                                                                                               \
            residual_sign_tile(2, RESIDUAL_OUTPUTS, BF16, p, x, t, stride, n0, n1, y);                                                \
        else                                                                                                           \
            residual_sign_tile(1, RESIDUAL_OUTPUTS, BF16, p, x, t, stride, n0, n1, y);                                                \
    }                                                                                                                  \
                                                                                                                       \
    static inline void residual_first_##SUFFIX(const residual_part *p, const TYPE *const *x, int64_t rows, int64_t i0, \
                                               int64_t i1, float *t, int64_t stride) {                                 \
        if (i0 >= i1) return;                                                                                          \
        int M;                                                                                                         \
        for (int64_t row = 0; row < rows; row += M) {                                                                  \
            M = residual_tile(rows - row);                                                                             \
            const void *tile[4];                                                                                       \
            for (int m = 0; m < M; m++) tile[m] = x[row + m];                                                          \
            if (p->kind != RESIDUAL_SIGN)                                                                              \
                residual_first_tile_##SUFFIX(p, tile, M, i0, i1, t + row * stride, stride);                            \
            else                                                                                                       \
                for (int m = 0; m < M; m++) residual_sum(BF16, p, tile[m], t + (row + m) * stride);                    \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static inline void residual_second_##SUFFIX(const residual_part *p, const TYPE *const *x, const float *t,          \
                                                int64_t stride, int64_t rows, int64_t n0, int64_t n1,                  \
                                                float *const *y) {                                                     \
        int M;                                                                                                         \
        for (int64_t row = 0; row < rows; row += M) {                                                                  \
            M = residual_tile(rows - row);                                                                             \
            const void *tile[4];                                                                                       \
            for (int m = 0; m < M; m++) tile[m] = x[row + m];                                                          \
            if (p->kind != RESIDUAL_SIGN)                                                                              \
                residual_second_low_rank(p, t + row * stride, stride, M, n0, n1, y + row);                             \
            else                                                                                                       \
                residual_sign_##SUFFIX(p, tile, t + row * stride, stride, M, n0, n1, y + row);                         \
        }                                                                                                              \
    }

RESIDUAL_DEFINE(f32, float, 0)
RESIDUAL_DEFINE(bf16, uint16_t, 1)

#endif
