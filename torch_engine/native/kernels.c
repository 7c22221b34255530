/* Products of few rows with weights that oneDNN has packed, and a whole layer of experts in one call, for x86-64 with AVX-512.
 *
 * With few rows a product is bound by reading the weights. These kernels read each packed matrix once, from front to back,
 * with all rows at hand (the processor's own prefetcher keeps up; software prefetches made it slower), and a layer of
 * experts starts threads once instead of once a product. Norm and decode attention are here because at batch 1 the dozen
 * small operations that they replace cost as much as a tenth of the weights.
 *
 * Packed layout (checked for each weight, see native/__init__.py): blocks of 64 outputs; in a block, for every input
 * (float32) or pair of inputs (bfloat16) in order, the 64 outputs' values side by side; inputs padded with zeros to
 * `stride`.
 * Letters: M rows, K inputs, N outputs, T tokens, H hidden size, I intermediate size.
 */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 64 /* outputs in a block of the packed layout */
#define MAX_M 6  /* rows whose sums stay in registers: 6 x 4 of 32 */

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

#define ALWAYS static inline __attribute__((always_inline))

/* sums[m][0..63] of one block, for M rows of pairs. */
ALWAYS void block_bf16_m(const int M, const uint16_t *const *x, const uint16_t *w, long K, float (*sums)[BLOCK]) {
    __m512 acc[MAX_M][4];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[m][j] = _mm512_setzero_ps();
    const long pairs = K / 2;
    for (long k = 0; k < pairs; k++) {
        const uint16_t *row = w + k * 2 * BLOCK;
        __m512bh weights[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) weights[j] = (__m512bh)_mm512_loadu_si512(row + j * 32);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            int32_t pair;
            memcpy(&pair, x[m] + 2 * k, 4);
            const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) acc[m][j] = _mm512_dpbf16_ps(acc[m][j], weights[j], value);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) _mm512_storeu_ps(sums[m] + 16 * j, acc[m][j]);
}

ALWAYS void block_f32_m(const int M, const float *const *x, const float *w, long K, float (*sums)[BLOCK]) {
    __m512 acc[MAX_M][4];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[m][j] = _mm512_setzero_ps();
    for (long k = 0; k < K; k++) {
        const float *row = w + k * BLOCK;
        __m512 weights[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) weights[j] = _mm512_loadu_ps(row + j * 16);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            const __m512 value = _mm512_set1_ps(x[m][k]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) acc[m][j] = _mm512_fmadd_ps(weights[j], value, acc[m][j]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) _mm512_storeu_ps(sums[m] + 16 * j, acc[m][j]);
}

#define SWITCH_M(function, M, ...)                                                                                     \
    switch (M) {                                                                                                       \
    case 1: function(1, __VA_ARGS__); break;                                                                           \
    case 2: function(2, __VA_ARGS__); break;                                                                           \
    case 3: function(3, __VA_ARGS__); break;                                                                           \
    case 4: function(4, __VA_ARGS__); break;                                                                           \
    case 5: function(5, __VA_ARGS__); break;                                                                           \
    default: function(6, __VA_ARGS__); break;                                                                          \
    }

static void block_bf16(int M, const uint16_t *const *x, const uint16_t *w, long K, float (*sums)[BLOCK]) {
    SWITCH_M(block_bf16_m, M, x, w, K, sums)
}

static void block_f32(int M, const float *const *x, const float *w, long K, float (*sums)[BLOCK]) {
    SWITCH_M(block_f32_m, M, x, w, K, sums)
}

/* The activations of pool.ACTIVATIONS, by number: silu, gelu (erf), gelu (tanh), relu. */
static inline float activate(float v, int kind) {
    switch (kind) {
    case 0: return v / (1.0f + expf(-v));
    case 1: return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    case 2: return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    default: return v > 0.0f ? v : 0.0f;
    }
}

/* e^x to about one unit in the last place: 2^n times a Taylor polynomial on |r| <= ln(2) / 2. */
static inline __m512 exp_ps(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.7f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x); /* ln(2) in two parts: the first is exact */
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040.0f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* gate = activation(gate) * up, for one block. silu, the usual one, is vectorised. */
static void gated(float *gate, const float *up, int kind) {
    if (kind != 0) {
        for (int n = 0; n < BLOCK; n++) gate[n] = activate(gate[n], kind) * up[n];
        return;
    }
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int n = 0; n < BLOCK; n += 16) {
        const __m512 v = _mm512_loadu_ps(gate + n);
        const __m512 silu = _mm512_div_ps(v, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), v))));
        _mm512_storeu_ps(gate + n, _mm512_mul_ps(silu, _mm512_loadu_ps(up + n)));
    }
}

static inline long least(long a, long b) { return a < b ? a : b; }

/* One source for both types: SUFFIX, TYPE, block function, conversion to and from float. */
#define DEFINE(SUFFIX, TYPE, BLOCK_FUNCTION, STORE)                                                                    \
    /* y[M][N] = x[M][K] w[N][K]^T */                                                                                  \
    void moetel_linear_##SUFFIX(const TYPE *x, long M, long K, const TYPE *w, long stride, long N, TYPE *y,            \
                                int threads) {                                                                         \
        const long blocks = (N + BLOCK - 1) / BLOCK;                                                                   \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") for (long b = 0; b < blocks; b++) {          \
            float sums[MAX_M][BLOCK];                                                                                  \
            const TYPE *rows[MAX_M];                                                                                   \
            const long width = least(BLOCK, N - b * BLOCK);                                                            \
            for (long first = 0; first < M; first += MAX_M) {                                                          \
                const int count = (int)least(MAX_M, M - first);                                                        \
                for (int m = 0; m < count; m++) rows[m] = x + (first + m) * K;                                         \
                BLOCK_FUNCTION(count, rows, w + b * BLOCK * stride, K, sums);                                          \
                for (int m = 0; m < count; m++)                                                                        \
                    for (long n = 0; n < width; n++) y[(first + m) * N + b * BLOCK + n] = STORE(sums[m][n]);           \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* out[T][H] = for each token the weighted sum of its experts.                                                     \
     * Rows are (token, choice) pairs sorted by expert: group g is rows starts[g]..starts[g+1], with its matrices      \
     * gate_up[g] [2I, H] and down[g] [H, I]; tokens[row]; places[token * top_k + i] is a row of that token and        \
     * gates[token * top_k + i] its weight. Scratch: inner [rows][I], partial [rows][H]. I is a multiple of BLOCK. */  \
    void moetel_experts_##SUFFIX(const TYPE *x, long T, long H, long I, long top_k, long groups,                       \
                                 const TYPE *const *gate_up, long stride_h, const TYPE *const *down, long stride_i,    \
                                 const long *starts, const long *tokens, const long *places, const float *gates,       \
                                 int activation, TYPE *inner, float *partial, TYPE *out, int threads) {                \
        const long up_blocks = I / BLOCK, down_blocks = (H + BLOCK - 1) / BLOCK;                                       \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            float gate[MAX_M][BLOCK], up[MAX_M][BLOCK];                                                                \
            const TYPE *rows[MAX_M];                                                                                   \
            _Pragma("omp for schedule(dynamic, 4)") for (long task = 0; task < groups * up_blocks; task++) {           \
                const long g = task / up_blocks, b = task % up_blocks;                                                 \
                for (long first = starts[g]; first < starts[g + 1]; first += MAX_M) {                                  \
                    const int count = (int)least(MAX_M, starts[g + 1] - first);                                        \
                    for (int m = 0; m < count; m++) rows[m] = x + tokens[first + m] * H;                               \
                    BLOCK_FUNCTION(count, rows, gate_up[g] + b * BLOCK * stride_h, H, gate);                           \
                    BLOCK_FUNCTION(count, rows, gate_up[g] + (up_blocks + b) * BLOCK * stride_h, H, up);               \
                    for (int m = 0; m < count; m++) {                                                                  \
                        gated(gate[m], up[m], activation);                                                             \
                        for (long n = 0; n < BLOCK; n++) inner[(first + m) * I + b * BLOCK + n] = STORE(gate[m][n]);   \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            _Pragma("omp for schedule(dynamic, 2)") for (long task = 0; task < groups * down_blocks; task++) {         \
                const long g = task / down_blocks, b = task % down_blocks;                                             \
                const long width = least(BLOCK, H - b * BLOCK);                                                        \
                for (long first = starts[g]; first < starts[g + 1]; first += MAX_M) {                                  \
                    const int count = (int)least(MAX_M, starts[g + 1] - first);                                        \
                    for (int m = 0; m < count; m++) rows[m] = inner + (first + m) * I;                                 \
                    BLOCK_FUNCTION(count, rows, down[g] + b * BLOCK * stride_i, I, gate);                              \
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

#define DEFINE_SMALL(SUFFIX, TYPE, LOAD, STORE)                                                                        \
    /* y = x / sqrt(mean(x^2) + eps), rounded to TYPE, times the weight: the order of rounding of transformers. */     \
    void moetel_rms_norm_##SUFFIX(const TYPE *x, long M, long H, const TYPE *weight, float eps, TYPE *y) {             \
        for (long m = 0; m < M; m++) {                                                                                 \
            const TYPE *row = x + m * H;                                                                               \
            float squares = 0.0f;                                                                                      \
            _Pragma("omp simd reduction(+ : squares)") for (long n = 0; n < H; n++) squares += LOAD(row[n]) * LOAD(row[n]); \
            const float scale = 1.0f / sqrtf(squares / (float)H + eps);                                                \
            for (long n = 0; n < H; n++) y[m * H + n] = STORE(LOAD(STORE(LOAD(row[n]) * scale)) * LOAD(weight[n]));    \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* One query token a row against its cache. q, out: [B][G * group][D], rows of q `q_stride` apart; keys, values:   \
     * row b and head g at b * row_stride + g * head_stride, then [position][D]; a row sees positions                  \
     * lengths[b] - window .. lengths[b] - 1. scores: scratch [B * G][group][longest]. */                              \
    void moetel_attention_##SUFFIX(const TYPE *q, long q_stride, const TYPE *keys, const TYPE *values,                 \
                                   long row_stride, long head_stride, long B, long G, long group, long D,              \
                                   const long *lengths, long longest, long window, float scale, float *scores,         \
                                   TYPE *out, int threads) {                                                           \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (B * G * longest * D > 65536)")             \
        for (long task = 0; task < B * G; task++) {                                                                    \
            const long b = task / G, g = task % G;                                                                     \
            const long first = lengths[b] > window ? lengths[b] - window : 0, count = lengths[b] - first;              \
            const TYPE *k = keys + b * row_stride + g * head_stride + first * D;                                       \
            const TYPE *v = values + b * row_stride + g * head_stride + first * D;                                     \
            float query[D], sum[D];                                                                                    \
            for (long h = 0; h < group; h++) {                                                                         \
                float *score = scores + (task * group + h) * longest, largest = -INFINITY, total = 0.0f;               \
                const TYPE *from = q + b * q_stride + (g * group + h) * D;                                             \
                for (long d = 0; d < D; d++) query[d] = LOAD(from[d]) * scale;                                         \
                for (long j = 0; j < count; j++) {                                                                     \
                    float dot = 0.0f;                                                                                  \
                    _Pragma("omp simd reduction(+ : dot)") for (long d = 0; d < D; d++) dot += query[d] * LOAD(k[j * D + d]); \
                    score[j] = dot;                                                                                    \
                    if (dot > largest) largest = dot;                                                                  \
                }                                                                                                      \
                for (long d = 0; d < D; d++) sum[d] = 0.0f;                                                            \
                for (long j = 0; j < count; j++) {                                                                     \
                    const float p = expf(score[j] - largest);                                                          \
                    total += p;                                                                                        \
                    _Pragma("omp simd") for (long d = 0; d < D; d++) sum[d] += p * LOAD(v[j * D + d]);                 \
                }                                                                                                      \
                TYPE *to = out + (b * G * group + g * group + h) * D;                                                  \
                for (long d = 0; d < D; d++) to[d] = STORE(sum[d] / total);                                            \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE_SMALL(bf16, uint16_t, from_bf16, to_bf16)
DEFINE_SMALL(f32, float, SAME, SAME)
