/* Products of few rows with packed weights, and a whole layer of experts in one call; for the processors of vectors.h.
 *
 * With few rows a product is bound by reading the weights. These kernels read each packed matrix once, with all rows at
 * hand, and a layer of experts starts threads once instead of once a product. Norm and decode attention are here
 * because at batch 1 the dozen small operations that they replace cost as much as a tenth of the weights.
 *
 * Packed layout (oneDNN's, checked for each weight, or made by native/__init__.py): blocks of 64 outputs; in a block,
 * for every input (float32) or pair of inputs (bfloat16) in order, the 64 outputs' values side by side; inputs padded
 * with zeros to `stride`.
 * Letters: M rows, K inputs, N outputs, T tokens, H hidden size, I intermediate size.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "residuals.h"
#include "vectors.h"

#define BLOCK 64    /* outputs in a block of the packed layout */
#define MAX_M 6     /* rows of a tile, whose sums stay in registers */
#define MAX_ROWS 96 /* that meet a panel of weights before the next is read */
/* Inputs of a panel, whose weights stay in a core's caches while all rows meet them. */
#define PANEL (VECTOR_REGISTERS >= 16 ? 256 : 64)

/* Vectors of a row's 64 outputs that a tile of M rows sums at once. */
#define VECTORS(M) (4 * (M) <= VECTOR_REGISTERS ? 4 : 2 * (M) <= VECTOR_REGISTERS ? 2 : 1)

/* Whether the processor multiplies pairs of bfloat16. Others widen weights in registers, and rows once a panel. */
#if defined(__AVX512BF16__) && !defined(MOETEL_NO_BF16)
#define BF16_PRODUCTS 1
#else
#define BF16_PRODUCTS 0
#endif

static inline long least(long a, long b) { return a < b ? a : b; }

static inline float from_bf16(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Round to nearest even, as torch does; NaN stays NaN. */
static inline uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* sums[m][16 j ..] += x[m][k] w[k][16 j ..] over the K inputs of a panel, for M rows and J vectors of outputs. With
 * fewer than all 4 vectors a line of each 256 bytes is read, which processors foresee badly: as many lines of `ahead`
 * are asked for meanwhile. Two thirds more rows a second than without, at 4 rows. */
ALWAYS void tile(const int M, const int J, const int bf16, const float *const *x, const void *w, long K, float *sums,
                 const char *ahead) {
    v16 acc[MAX_M][4];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) acc[m][j] = v_load(sums + m * BLOCK + 16 * j);
    for (long k = 0; k < K; k += bf16 ? 2 : 1) {
        if (J < 4)
            for (int j = 0; j < J; j++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 2
        for (int second = 0; second < (bf16 ? 2 : 1); second++) {
            v16 weights[4];
#pragma GCC unroll 4
            for (int j = 0; j < J; j++)
                weights[j] = bf16 ? v_load_pairs((const uint16_t *)w + k * BLOCK + 32 * j, second)
                                  : v_load((const float *)w + k * BLOCK + 16 * j);
#pragma GCC unroll 6
            for (int m = 0; m < M; m++) {
                const v16 value = v_set1(x[m][k + second]);
#pragma GCC unroll 4
                for (int j = 0; j < J; j++) acc[m][j] = v_fma(weights[j], value, acc[m][j]);
            }
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) v_store(sums + m * BLOCK + 16 * j, acc[m][j]);
}

/* A panel's 64 outputs for M rows: as many vectors at once as registers allow. */
ALWAYS void panel(const int M, const int bf16, const float *const *x, const void *w, long K, float *sums) {
    const long steps = bf16 ? (K + 1) / 2 : K;
    for (int j = 0; j < 4; j += VECTORS(M))
        tile(M, VECTORS(M), bf16, x, (const char *)w + j * 64, K, sums + 16 * j,
             (const char *)w + (4 + j) * steps * 64); /* of the panel that follows in memory */
}

/* For each M a function of its own, so that rows are constants inside. */
#define SWITCH_M(function, M, ...)                                                                                     \
    switch (M) {                                                                                                       \
    case 1: function(1, __VA_ARGS__); break;                                                                           \
    case 2: function(2, __VA_ARGS__); break;                                                                           \
    case 3: function(3, __VA_ARGS__); break;                                                                           \
    case 4: function(4, __VA_ARGS__); break;                                                                           \
    case 5: function(5, __VA_ARGS__); break;                                                                           \
    default: function(6, __VA_ARGS__); break;                                                                          \
    }

static void panel_f32(int M, const float *const *x, const float *w, long K, float *sums) {
    SWITCH_M(panel, M, 0, x, w, K, sums)
}

#if BF16_PRODUCTS
ALWAYS void panel_pairs(const int M, const uint16_t *const *x, const uint16_t *w, long K, float *sums) {
    __m512 acc[MAX_M][4];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[m][j] = _mm512_loadu_ps(sums + m * BLOCK + 16 * j);
    for (long k = 0; k < K; k += 2) {
        __m512bh weights[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) weights[j] = (__m512bh)_mm512_loadu_si512(w + k * BLOCK + 32 * j);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            int32_t pair;
            memcpy(&pair, x[m] + k, 4);
            const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) acc[m][j] = _mm512_dpbf16_ps(acc[m][j], weights[j], value);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) _mm512_storeu_ps(sums + m * BLOCK + 16 * j, acc[m][j]);
}
#endif

/* An odd last input is padded here, since what follows it in its row is another row's. */
static void panel_bf16(int M, const uint16_t *const *x, const uint16_t *w, long K, float *sums) {
#if BF16_PRODUCTS
    uint16_t copies[MAX_M][PANEL];
    const uint16_t *rows[MAX_M];
    for (int m = 0; m < M; m++) {
        rows[m] = x[m];
        if (K % 2 == 0) continue;
        memcpy(copies[m], x[m], (size_t)K * 2);
        copies[m][K] = 0;
        rows[m] = copies[m];
    }
    SWITCH_M(panel_pairs, M, rows, w, K, sums)
#else
    float wide[MAX_M][PANEL];
    const float *rows[MAX_M];
    for (int m = 0; m < M; m++) {
        long k = 0;
        for (; k + 16 <= K; k += 16) v_store(wide[m] + k, v_load_bf16(x[m] + k));
        for (; k < K; k++) wide[m][k] = from_bf16(x[m][k]);
        if (K % 2) wide[m][K] = 0.0f;
        rows[m] = wide[m];
    }
    SWITCH_M(panel, M, 1, rows, w, K, sums)
#endif
}

/* sums[m][0..63] of one block, for up to MAX_ROWS rows in tiles of about the same size. */
#define DEFINE_BLOCK(SUFFIX, TYPE)                                                                                     \
    static void block_##SUFFIX(long count, const TYPE *const *x, const TYPE *w, long K, float (*sums)[BLOCK]) {        \
        const long tiles = (count + MAX_M - 1) / MAX_M;                                                                \
        memset(sums, 0, (size_t)count * sizeof *sums);                                                                 \
        for (long k = 0; k < K; k += PANEL)                                                                            \
            for (long t = 0, row = 0; t < tiles; t++) {                                                                \
                const int M = (int)((count - row) / (tiles - t));                                                      \
                const TYPE *from[MAX_M];                                                                               \
                for (int m = 0; m < M; m++) from[m] = x[row + m] + k;                                                  \
                panel_##SUFFIX(M, from, w + k * BLOCK, least(PANEL, K - k), sums[row]);                                \
                row += M;                                                                                              \
            }                                                                                                          \
    }

DEFINE_BLOCK(bf16, uint16_t)
DEFINE_BLOCK(f32, float)

/* The activations of pool.ACTIVATIONS, by number: silu, gelu (erf), gelu (tanh), relu. */
static inline float activate(float v, int kind) {
    switch (kind) {
    case 0: return v / (1.0f + expf(-v));
    case 1: return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    case 2: return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    default: return v > 0.0f ? v : 0.0f;
    }
}

/* gate = activation(gate) * up, for one block. silu, the usual one, is vectorised. */
static void gated(float *gate, const float *up, int kind) {
    if (kind != 0) {
        for (int n = 0; n < BLOCK; n++) gate[n] = activate(gate[n], kind) * up[n];
        return;
    }
    for (int n = 0; n < BLOCK; n += 16) v_store(gate + n, v_mul(v_silu(v_load(gate + n)), v_load(up + n)));
}

/* What a tenant adds to rows start..stop of a layer's call, which are the tenant's rows of one expert. parts: of gate,
 * then of up, then of down. Their first steps' values begin at scratch[t], `stride` a row; those of down replace the
 * others. An int64 array [residuals, 8] is an array of these. */
typedef struct {
    long start, stop;
    const residual_part *parts;
    long num_gate, num_up, num_down, t, stride;
} row_residual;

enum { GATE, UP, DOWN };

#define COMPONENTS 8 /* of the first step, a task */

/* Tasks of the longest first step of gate and up, or of down. */
static long first_step_tasks(const row_residual *residuals, long count, int down) {
    long most = 0;
    for (long r = 0; r < count; r++) {
        const long middle = residuals[r].num_gate + residuals[r].num_up;
        const long end = down ? middle + residuals[r].num_down : middle;
        long width = 0;
        for (long i = down ? middle : 0; i < end; i++) width += residual_width(residuals[r].parts + i);
        if (width > most) most = width;
    }
    return (most + COMPONENTS - 1) / COMPONENTS;
}

/* One source for both types: SUFFIX, TYPE, block function, conversion to and from float. */
#define DEFINE(SUFFIX, TYPE, BLOCK_FUNCTION, STORE)                                                                    \
    /* y[m][N] = x[m][K] w[g][N][K]^T for rows m = starts[g] .. starts[g + 1] - 1: one matrix for each group of rows. */ \
    void moetel_linears_##SUFFIX(const TYPE *x, long K, long groups, const TYPE *const *w, long stride, long N,        \
                                 const long *starts, TYPE *y, int threads) {                                           \
        const long blocks = (N + BLOCK - 1) / BLOCK;                                                                   \
        _Pragma("omp parallel for schedule(dynamic, 2) num_threads(threads)")                                          \
        for (long task = 0; task < groups * blocks; task++) {                                                          \
            const long g = task / blocks, b = task % blocks, width = least(BLOCK, N - b * BLOCK);                      \
            float sums[MAX_ROWS][BLOCK];                                                                               \
            const TYPE *rows[MAX_ROWS];                                                                                \
            for (long first = starts[g]; first < starts[g + 1]; first += MAX_ROWS) {                                   \
                const int count = (int)least(MAX_ROWS, starts[g + 1] - first);                                         \
                for (int m = 0; m < count; m++) rows[m] = x + (first + m) * K;                                         \
                BLOCK_FUNCTION(count, rows, w[g] + b * BLOCK * stride, K, sums);                                       \
                for (int m = 0; m < count; m++)                                                                        \
                    for (long n = 0; n < width; n++) y[(first + m) * N + b * BLOCK + n] = STORE(sums[m][n]);           \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Components first.. of the first steps of parts, COMPONENTS in all, for rows of x [M][K] through an index or     \
     * none. */                                                                                                        \
    static void residual_components_##SUFFIX(const residual_part *parts, long num_parts, const TYPE *x, long K,        \
                                             const long *index, long M, long first, float *t, long stride) {           \
        for (long i = 0; i < num_parts; first -= residual_width(parts + i), t += residual_width(parts + i), i++) {     \
            const long from = first > 0 ? first : 0, to = least(first + COMPONENTS, residual_width(parts + i));        \
            if (from >= to) continue;                                                                                  \
            const TYPE *rows[4];                                                                                       \
            for (long row = 0; row < M; row += 4) {                                                                    \
                const int count = (int)least(4, M - row);                                                              \
                for (int m = 0; m < count; m++) rows[m] = x + (index ? index[row + m] : row + m) * K;                  \
                residual_first_##SUFFIX(parts + i, rows, count, from, to, t + row * stride, stride);                   \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* sums[m] += block b of the residuals of one expert, for those of a tile's rows that have one. `first` is the     \
     * number of the tile's first row. */                                                                              \
    static void residual_block_##SUFFIX(const row_residual *residuals, long count, int what, const TYPE *const *rows,  \
                                        long first, int M, const float *scratch, long b, float (*sums)[BLOCK]) {       \
        for (const row_residual *r = residuals; r < residuals + count; r++) {                                          \
            const long from = r->start > first ? r->start : first, to = least(r->stop, first + M);                     \
            if (from >= to) continue;                                                                                  \
            float *y[MAX_ROWS];                                                                                        \
            for (long m = from; m < to; m++) y[m - from] = sums[m - first];                                            \
            const long begin = what == GATE ? 0 : what == UP ? r->num_gate : r->num_gate + r->num_up;                  \
            const long end = begin + (what == GATE ? r->num_gate : what == UP ? r->num_up : r->num_down);              \
            const float *t = scratch + r->t + (from - r->start) * r->stride;                                           \
            for (long i = what == DOWN ? begin : 0; i < end; t += residual_width(r->parts + i), i++)                   \
                if (i >= begin)                                                                                        \
                    residual_second_##SUFFIX(r->parts + i, rows + (from - first), t, r->stride, to - from, b * BLOCK,  \
                                             least((b + 1) * BLOCK, r->parts[i].outputs), y);                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* y[M][N] += x[M][K] R^T, R the sum of the parts of one matrix. Scratch: t [M][stride]. */                        \
    void moetel_residual_##SUFFIX(const residual_part *parts, long num_parts, const TYPE *x, long M, float *t,         \
                                  long stride, float *y, int threads) {                                                \
        const row_residual all = {0, M, parts, num_parts, 0, 0, 0, stride};                                            \
        const long K = parts->inputs, N = parts->outputs, blocks = (N + BLOCK - 1) / BLOCK;                            \
        const long tasks = first_step_tasks(&all, 1, 0);                                                               \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            _Pragma("omp for schedule(dynamic, 1)") for (long task = 0; task < tasks; task++)                          \
                residual_components_##SUFFIX(parts, num_parts, x, K, NULL, M, task * COMPONENTS, t, stride);           \
            _Pragma("omp for schedule(dynamic, 4)") for (long b = 0; b < blocks; b++) {                                \
                const long n1 = least((b + 1) * BLOCK, N);                                                             \
                const TYPE *rows[4];                                                                                   \
                float *to[4];                                                                                          \
                for (long row = 0; row < M; row += 4) {                                                                \
                    const int count = (int)least(4, M - row);                                                          \
                    for (int m = 0; m < count; m++)                                                                    \
                        rows[m] = x + (row + m) * K, to[m] = y + (row + m) * N + b * BLOCK;                            \
                    const float *from = t + row * stride;                                                              \
                    for (long i = 0; i < num_parts; from += residual_width(parts + i), i++)                            \
                        residual_second_##SUFFIX(parts + i, rows, from, stride, count, b * BLOCK, n1, to);             \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* out[T][H] = for each token the weighted sum of its experts.                                                     \
     * Rows are (token, choice) pairs sorted by expert: group g is rows starts[g]..starts[g+1], with its matrices      \
     * gate_up[g] [2I, H] and down[g] [H, I]; tokens[row]; places[token * top_k + i] is a row of that token and        \
     * gates[token * top_k + i] its weight. residuals: what tenants add, sorted by row, those of group g from          \
     * first_residual[g] to first_residual[g + 1]; num_residuals may be 0. Scratch: inner [rows][I], partial           \
     * [rows][H], t as the residuals say. I is a multiple of BLOCK. */                                                 \
    void moetel_experts_##SUFFIX(const TYPE *x, long T, long H, long I, long top_k, long groups,                       \
                                 const TYPE *const *gate_up, long stride_h, const TYPE *const *down, long stride_i,    \
                                 const long *starts, const long *tokens, const long *places, const float *gates,       \
                                 int activation, TYPE *inner, float *partial, TYPE *out, int threads,                  \
                                 const row_residual *residuals, long num_residuals, const long *first_residual,        \
                                 float *t) {                                                                           \
        const long up_blocks = I / BLOCK, down_blocks = (H + BLOCK - 1) / BLOCK;                                       \
        const long up_tasks = first_step_tasks(residuals, num_residuals, 0);                                           \
        const long down_tasks = first_step_tasks(residuals, num_residuals, 1);                                         \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            float gate[MAX_ROWS][BLOCK], up[MAX_ROWS][BLOCK];                                                          \
            const TYPE *rows[MAX_ROWS];                                                                                \
            if (up_tasks) {                                                                                            \
                _Pragma("omp for schedule(dynamic, 1)") for (long task = 0; task < num_residuals * up_tasks; task++) { \
                    const row_residual *r = residuals + task / up_tasks;                                               \
                    residual_components_##SUFFIX(r->parts, r->num_gate + r->num_up, x, H, tokens + r->start,           \
                                                 r->stop - r->start, task % up_tasks * COMPONENTS, t + r->t,           \
                                                 r->stride);                                                           \
                }                                                                                                      \
            }                                                                                                          \
            _Pragma("omp for schedule(dynamic, 4)") for (long task = 0; task < groups * up_blocks; task++) {           \
                const long g = task / up_blocks, b = task % up_blocks;                                                 \
                for (long first = starts[g]; first < starts[g + 1]; first += MAX_ROWS) {                               \
                    const int count = (int)least(MAX_ROWS, starts[g + 1] - first);                                     \
                    for (int m = 0; m < count; m++) rows[m] = x + tokens[first + m] * H;                               \
                    BLOCK_FUNCTION(count, rows, gate_up[g] + b * BLOCK * stride_h, H, gate);                           \
                    BLOCK_FUNCTION(count, rows, gate_up[g] + (up_blocks + b) * BLOCK * stride_h, H, up);               \
                    if (num_residuals) {                                                                               \
                        const row_residual *mine = residuals + first_residual[g];                                      \
                        const long number = first_residual[g + 1] - first_residual[g];                                 \
                        residual_block_##SUFFIX(mine, number, GATE, rows, first, count, t, b, gate);                   \
                        residual_block_##SUFFIX(mine, number, UP, rows, first, count, t, b, up);                       \
                    }                                                                                                  \
                    for (int m = 0; m < count; m++) {                                                                  \
                        gated(gate[m], up[m], activation);                                                             \
                        for (long n = 0; n < BLOCK; n++) inner[(first + m) * I + b * BLOCK + n] = STORE(gate[m][n]);   \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            if (down_tasks) {                                                                                          \
                _Pragma("omp for schedule(dynamic, 1)") for (long task = 0; task < num_residuals * down_tasks; task++) { \
                    const row_residual *r = residuals + task / down_tasks;                                             \
                    residual_components_##SUFFIX(r->parts + r->num_gate + r->num_up, r->num_down,                      \
                                                 inner + r->start * I, I, NULL, r->stop - r->start,                    \
                                                 task % down_tasks * COMPONENTS, t + r->t, r->stride);                 \
                }                                                                                                      \
            }                                                                                                          \
            _Pragma("omp for schedule(dynamic, 2)") for (long task = 0; task < groups * down_blocks; task++) {         \
                const long g = task / down_blocks, b = task % down_blocks;                                             \
                const long width = least(BLOCK, H - b * BLOCK);                                                        \
                for (long first = starts[g]; first < starts[g + 1]; first += MAX_ROWS) {                               \
                    const int count = (int)least(MAX_ROWS, starts[g + 1] - first);                                     \
                    for (int m = 0; m < count; m++) rows[m] = inner + (first + m) * I;                                 \
                    BLOCK_FUNCTION(count, rows, down[g] + b * BLOCK * stride_i, I, gate);                              \
                    if (num_residuals)                                                                                 \
                        residual_block_##SUFFIX(residuals + first_residual[g],                                         \
                                                first_residual[g + 1] - first_residual[g], DOWN, rows, first, count,   \
                                                t, b, gate);                                                           \
                    for (int m = 0; m < count; m++)                                                                    \
                        memcpy(partial + (first + m) * H + b * BLOCK, gate[m], width * sizeof(float));                 \
                }                                                                                                      \
            }                                                                                                          \
            _Pragma("omp for schedule(static)") for (long t = 0; t < T; t++) for (long n = 0; n < H; n++) {            \
                float sum = 0.0f;                                                                                      \
                for (long i = 0; i < top_k; i++)                                                                       \
                    sum += gates[t * top_k + i] * partial[places[t * top_k + i] * H + n];                              \
                out[t * H + n] = STORE(sum);                                                                           \
            }                                                                                                          \
        }                                                                                                              \
    }

#define SAME(v) (v)
DEFINE(bf16, uint16_t, block_bf16, to_bf16)
DEFINE(f32, float, block_f32, SAME)

#define CHUNKS (VECTOR_REGISTERS >= 16 ? 4 : 1) /* of 16 values, of four heads at once */

#define DEFINE_SMALL(SUFFIX, TYPE, LOAD, LOAD16, STORE)                                                                \
    /* y = x / sqrt(mean(x^2) + eps), rounded to TYPE, times the weight: the order of rounding of transformers. Rows   \
     * starts[g] .. starts[g + 1] - 1 have weights[g] and eps[g]. */                                                   \
    void moetel_rms_norm_##SUFFIX(const TYPE *x, long H, long groups, const TYPE *const *weights, const float *eps,    \
                                  const long *starts, TYPE *y) {                                                       \
        for (long g = 0; g < groups; g++) {                                                                            \
            const TYPE *weight = weights[g];                                                                           \
            for (long m = starts[g]; m < starts[g + 1]; m++) {                                                         \
                const TYPE *row = x + m * H;                                                                           \
                float squares = 0.0f;                                                                                  \
                _Pragma("omp simd reduction(+ : squares)")                                                             \
                for (long n = 0; n < H; n++) squares += LOAD(row[n]) * LOAD(row[n]);                                   \
                const float scale = 1.0f / sqrtf(squares / (float)H + eps[g]);                                         \
                for (long n = 0; n < H; n++) y[m * H + n] = STORE(LOAD(STORE(LOAD(row[n]) * scale)) * LOAD(weight[n])); \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Up to 16 values as floats, the rest zero. */                                                                    \
    ALWAYS v16 some_##SUFFIX(const TYPE *from, long count) {                                                           \
        if (count >= 16) return LOAD16(from);                                                                          \
        TYPE part[16] = {0};                                                                                           \
        memcpy(part, from, count * sizeof(TYPE));                                                                      \
        return LOAD16(part);                                                                                           \
    }                                                                                                                  \
                                                                                                                       \
    /* scores[h * longest + j - first] = q_h k_j for positions first .. length - 1 of one row and key-value head.      \
     * queries: [group][chunks * 16], zeros behind D. */                                                               \
    static void attention_scores_##SUFFIX(const float *queries, const TYPE *keys, long token_stride,                   \
                                          const long *table, long block, long first, long length, long group, long D,  \
                                          float *scores, long longest) {                                               \
        const long chunks = (D + 15) / 16;                                                                             \
        v16 key[chunks];                                                                                               \
        for (long j = first; j < length;) {                                                                            \
            const TYPE *k = keys + (table[j / block] * block + j % block) * token_stride;                              \
            const long end = least(length, (j / block + 1) * block);                                                   \
            for (; j < end; j++, k += token_stride) {                                                                  \
                for (long c = 0; c < chunks; c++) key[c] = some_##SUFFIX(k + 16 * c, D - 16 * c);                      \
                for (long h = 0; h < group; h++) {                                                                     \
                    const float *query = queries + h * chunks * 16;                                                    \
                    v16 dot = v_mul(v_load(query), key[0]);                                                            \
                    for (long c = 1; c < chunks; c++)                                                                  \
                        dot = v_fma(v_load(query + 16 * c), key[c], dot);                                              \
                    scores[h * longest + j - first] = v_sum(dot);                                                      \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* sums[h][n] = sum_j p_hj v_j[n] for H <= 4 heads and C <= 4 chunks of 16 values. */                              \
    ALWAYS void attention_values_##SUFFIX(const int H, const int C, const float *p, long longest, const TYPE *values,  \
                                          long token_stride, const long *table, long block, long first, long length,   \
                                          long D, float (*sums)[4][16]) {                                              \
        v16 acc[4][4];                                                                                                 \
        _Pragma("GCC unroll 4") for (int h = 0; h < H; h++)                                                            \
            _Pragma("GCC unroll 4") for (int c = 0; c < C; c++) acc[h][c] = v_zero();                                  \
        for (long j = first; j < length;) {                                                                            \
            const TYPE *v = values + (table[j / block] * block + j % block) * token_stride;                            \
            const long end = least(length, (j / block + 1) * block);                                                   \
            for (; j < end; j++, v += token_stride) {                                                                  \
                v16 value[4];                                                                                          \
                _Pragma("GCC unroll 4") for (int c = 0; c < C; c++) value[c] = some_##SUFFIX(v + 16 * c, D - 16 * c);  \
                _Pragma("GCC unroll 4") for (int h = 0; h < H; h++) {                                                  \
                    const v16 weight = v_set1(p[h * longest + j - first]);                                             \
                    _Pragma("GCC unroll 4") for (int c = 0; c < C; c++)                                                \
                        acc[h][c] = v_fma(weight, value[c], acc[h][c]);                                                \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 4") for (int h = 0; h < H; h++)                                                            \
            _Pragma("GCC unroll 4") for (int c = 0; c < C; c++) v_store(sums[h][c], acc[h][c]);                        \
    }                                                                                                                  \
                                                                                                                       \
    /* One query token a row against its cache. q, out: [B][G * group][D], rows of q `q_stride` apart. Row b's position \
     * j lies at tables[b][j / block] * block + j % block, in tokens `token_stride` apart, head g at g * D of it. A row \
     * sees positions lengths[b] - window .. lengths[b] - 1. scores: scratch [B * G][group][longest]. */               \
    void moetel_attention_##SUFFIX(const TYPE *q, long q_stride, const TYPE *keys, const TYPE *values,                 \
                                   long token_stride, const long *const *tables, long block, long B, long G,           \
                                   long group, long D, const long *lengths, long longest, long window, float scale,    \
                                   float *scores, TYPE *out, int threads) {                                            \
        const long chunks = (D + 15) / 16;                                                                             \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (B * G * longest * D > 65536)")             \
        for (long task = 0; task < B * G; task++) {                                                                    \
            const long b = task / G, g = task % G, length = lengths[b];                                                \
            const long first = length > window ? length - window : 0, count = length - first;                          \
            float queries[group][chunks * 16], largest, inverse[group], sums[4][4][16];                                \
            float *mine = scores + task * group * longest;                                                             \
            for (long h = 0; h < group; h++) {                                                                         \
                const TYPE *from = q + b * q_stride + (g * group + h) * D;                                             \
                for (long d = 0; d < chunks * 16; d++) queries[h][d] = d < D ? LOAD(from[d]) * scale : 0.0f;           \
            }                                                                                                          \
            attention_scores_##SUFFIX(queries[0], keys + g * D, token_stride, tables[b], block, first, length, group,  \
                                      D, mine, longest);                                                               \
            for (long h = 0; h < group; h++) {                                                                         \
                float *row = mine + h * longest, total = 0.0f;                                                         \
                largest = -INFINITY;                                                                                   \
                for (long j = 0; j < count; j++) largest = row[j] > largest ? row[j] : largest;                        \
                long j = 0;                                                                                            \
                for (v16 top = v_set1(largest); j + 16 <= count; j += 16) {                                            \
                    const v16 p = v_exp(v_sub(v_load(row + j), top));                                                  \
                    v_store(row + j, p);                                                                               \
                    total += v_sum(p);                                                                                 \
                }                                                                                                      \
                for (; j < count; j++) total += row[j] = expf(row[j] - largest);                                       \
                inverse[h] = 1.0f / total;                                                                             \
            }                                                                                                          \
            for (long h = 0; h < group; h += 4) for (long c = 0; c < chunks; c += CHUNKS) {                            \
                const int heads = (int)least(4, group - h), wide = (int)least(CHUNKS, chunks - c);                     \
                const TYPE *from = values + g * D + 16 * c;                                                            \
                if (heads == 4 && wide == CHUNKS)                                                                      \
                    attention_values_##SUFFIX(4, CHUNKS, mine + h * longest, longest, from, token_stride, tables[b], block, \
                                              first, length, D - 16 * c, sums);                                        \
                else                                                                                                   \
                    for (int n = 0; n < heads; n++) for (int w = 0; w < wide; w++)                                     \
                        attention_values_##SUFFIX(1, 1, mine + (h + n) * longest, longest, from + 16 * w, token_stride, \
                                                  tables[b], block, first, length, D - 16 * (c + w),                   \
                                                  (float(*)[4][16])sums[n][w]);                                        \
                for (int n = 0; n < heads; n++) {                                                                      \
                    TYPE *to = out + (b * G * group + g * group + h + n) * D;                                          \
                    for (long d = 16 * c; d < least(D, 16 * (c + wide)); d++)                                          \
                        to[d] = STORE(sums[n][(d - 16 * c) / 16][d % 16] * inverse[h + n]);                            \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE_SMALL(bf16, uint16_t, from_bf16, v_load_bf16, to_bf16)
DEFINE_SMALL(f32, float, SAME, v_load, SAME)
