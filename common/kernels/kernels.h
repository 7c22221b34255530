/* The kernels' plain C interface: products with packed weights, whole layers of experts, norms and decode attention.
 * A type is MOETEL_F32 or MOETEL_BF16 (bits of the upper half of a float32). Nothing here throws or keeps state.
 *
 * Packed weights [N, K] (packed_weights.py): blocks of 64 outputs, zeros behind the last; in a block, for every input (float32)
 * or pair of inputs (bfloat16), the 64 outputs' values side by side. An odd last input is paired with a zero. */

#ifndef MOETEL_KERNELS_H
#define MOETEL_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { MOETEL_F32 = 0, MOETEL_BF16 = 1 };
enum { MOETEL_RELU = 0, MOETEL_GELU_TANH = 1, MOETEL_GELU_ERF = 2, MOETEL_SILU = 3 };

/* The caller's threads. run calls body(state, rank) once for each rank of 0 .. threads - 1. Rank 0 is called before run
 * returns; the others may be called at any time, also after that. Null: everything happens in the calling thread.
 * count: use at most so many. */
typedef struct moetel_threads {
    void (*run)(void *pool, int64_t threads, void (*body)(void *state, int64_t rank), void *state);
    void *pool;
    int64_t count;
} moetel_threads;

/* y[m] = x[m] w[g]^T for rows m = starts[g] .. starts[g + 1] - 1: a matrix [N, K] for each group of rows. y has the type
 * of x. Types: float32 x with either weights, bfloat16 x with bfloat16 weights. */
void moetel_linears(const moetel_threads *threads, int64_t x_type, int64_t w_type, const void *x, int64_t K,
                    int64_t groups, const void *const *w, int64_t N, const int64_t *starts, void *y);

/* A layer of experts: for each token the sum of what its choices give, each weighted by its gate. An expert computes
 * act(x w0^T) w1^T, or (act(x w0^T) * (x w1^T)) w2^T if gated.
 *
 * Choice `chosen[t][i]` is a number v < numbers, or stands for no expert and gives zeros. Number v has the weights of
 * slot v % slots and, if there is a table, the residual in the table's row v. numbers is a multiple of slots. */
typedef struct moetel_experts_call {
    int64_t x_type, w_type, activation, gated;
    int64_t tokens, top_k, inputs, inner, outputs;
    int64_t slots, numbers;
    const void *x;              /* [tokens][inputs] */
    const int32_t *chosen;      /* [tokens][top_k] */
    const float *gates;         /* [tokens][top_k], or null: 1 */
    const void *const *weights; /* [slots][2, or 3 if gated], packed */
    void *y;                    /* [tokens][outputs], of the type of x */
    void *scratch;              /* tokens * top_k * (inner * size of x's type + outputs * 4 bytes) */
    const int32_t *table;       /* [numbers][2 or 3][parts][6]: kind, bits, size, words of it, v, u; or null */
    const uint8_t *records;     /* [words][4 bytes], where the table's words lie */
    int64_t parts, words;
} moetel_experts_call;

/* 0, or 1 if the table names a part that is none or lies outside the records: its six numbers are then in bad. */
int moetel_experts(const moetel_threads *threads, const moetel_experts_call *call, int32_t bad[6]);

/* y = x / sqrt(mean(x^2) + eps), rounded to the type, times the weight: the order of rounding of transformers. Rows
 * starts[g] .. starts[g + 1] - 1 have weights[g] and eps[g]. */
void moetel_rms_norms(const moetel_threads *threads, int64_t type, const void *x, int64_t H, int64_t groups,
                      const void *const *weights, const float *eps, const int64_t *starts, void *y);

/* One query token a row against its cache. q, out: [B][G * group][D], rows of q `q_stride` apart. Row b's position j
 * lies at tables[b][j / block] * block + j % block, in tokens `token_stride` apart, head g at g * D of it. A row sees
 * positions lengths[b] - window .. lengths[b] - 1. */
void moetel_attention(const moetel_threads *threads, int64_t type, const void *q, int64_t q_stride, const void *keys,
                      const void *values, int64_t token_stride, const int64_t *const *tables, int64_t block, int64_t B,
                      int64_t G, int64_t group, int64_t D, const int64_t *lengths, int64_t window, float scale,
                      void *out);

#ifdef __cplusplus
}
#endif

#endif
