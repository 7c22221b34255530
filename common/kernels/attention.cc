// What a decode step has beside its products. At batch 1 the dozen small operations that these replace cost as much as
// a tenth of the weights.

#include <cmath>

#include "product.h"
#include "threads.h"

namespace moetel {

namespace {

template <typename T>
void rms_norms(const moetel_threads &threads, const T *x, int64_t H, int64_t groups, const void *const *weights,
               const float *eps, const int64_t *starts, T *y) {
    run(threads, starts[groups] * H, {starts[groups]}, [&](int, int64_t m) {
        const int64_t g = std::upper_bound(starts, starts + groups + 1, m) - starts - 1;
        const T *row = x + m * H, *weight = static_cast<const T *>(weights[g]);
        v16 squares = v_zero();
        for (int64_t n = 0; n < H; n += 16) {
            const v16 values = load_some(row + n, H - n);
            squares = v_fma(values, values, squares);
        }
        const float scale = 1.0f / std::sqrt(v_sum(squares) / static_cast<float>(H) + eps[g]);
        for (int64_t n = 0; n < H; n++)
            y[m * H + n] = narrowed<T>(widened(narrowed<T>(widened(row[n]) * scale)) * widened(weight[n]));
    });
}

constexpr int kHeads = 4;                                  // that meet a key or value at once
constexpr int kChunks = VECTOR_REGISTERS >= 16 ? 4 : 1;    // of 16 values, whose sums four heads keep in registers

// Where a row's keys or values of one key-value head lie.
template <typename T>
struct Cached {
    const T *base;
    int64_t token_stride;
    const int64_t *table;
    int64_t block, first, length;

    // f(number counted from the first, where it lies) for all positions that are seen.
    template <typename F>
    void each(const F &f) const {
        for (int64_t j = first; j < length;) {
            const T *at = base + (table[j / block] * block + j % block) * token_stride;
            const int64_t end = std::min(length, (j / block + 1) * block);
            for (; j < end; j++, at += token_stride) f(j - first, at);
        }
    }
};

// scores[h][j] = q_h k_j. queries: [H][chunks * 16], zeros behind D.
template <typename T, int H>
void scores_of(const float *queries, const Cached<T> &keys, int64_t D, float *scores, int64_t stride) {
    const int64_t chunks = (D + 15) / 16;
    keys.each([&](int64_t j, const T *key) {
        v16 dots[kHeads];
        for (int h = 0; h < kHeads; h++) dots[h] = v_zero();
        for (int64_t c = 0; c < chunks; c++) {
            const v16 part = load_some(key + 16 * c, D - 16 * c);
#pragma GCC unroll 4
            for (int h = 0; h < H; h++) dots[h] = v_fma(v_load(queries + (h * chunks + c) * 16), part, dots[h]);
        }
        float sums[kHeads];
        if (H == 1)
            sums[0] = v_sum(dots[0]);
        else
            v_sums(dots[0], dots[1], dots[2], dots[3], sums);
        for (int h = 0; h < H; h++) scores[h * stride + j] = sums[h];
    });
}

// to[h][n] = scale_h sum_j p_hj v_j[n] for H heads and C chunks of 16 values, of which D are left.
template <typename T, int H, int C>
void values_of(const float *p, int64_t stride, const Cached<T> &values, int64_t D, const float *scale, T *to,
               int64_t head_stride) {
    v16 acc[H][C];
#pragma GCC unroll 4
    for (int h = 0; h < H; h++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) acc[h][c] = v_zero();
    values.each([&](int64_t j, const T *value) {
        v16 part[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) part[c] = load_some(value + 16 * c, D - 16 * c);
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) {
            const v16 weight = v_set1(p[h * stride + j]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) acc[h][c] = v_fma(weight, part[c], acc[h][c]);
        }
    });
    for (int h = 0; h < H; h++)
        for (int c = 0; c < C; c++) {
            float sums[16];
            v_store(sums, v_mul(acc[h][c], v_set1(scale[h])));
            for (int64_t n = 0; n < std::min<int64_t>(16, D - 16 * c); n++)
                to[h * head_stride + 16 * c + n] = narrowed<T>(sums[n]);
        }
}

// row = e^(row - max); returns what the row sums up to.
float exponentials(float *row, int64_t count) {
    float largest = -INFINITY, total = 0.0f;
    for (int64_t j = 0; j < count; j++) largest = std::max(row[j], largest);
    int64_t j = 0;
    for (const v16 top = v_set1(largest); j + 16 <= count; j += 16) {
        const v16 p = v_exp(v_sub(v_load(row + j), top));
        v_store(row + j, p);
        total += v_sum(p);
    }
    for (; j < count; j++) total += row[j] = std::exp(row[j] - largest);
    return total;
}

template <typename T>
void attention(const moetel_threads &threads, const T *q, int64_t q_stride, const T *keys, const T *values,
               int64_t token_stride, const int64_t *const *tables, int64_t block, int64_t B, int64_t G, int64_t group,
               int64_t D, const int64_t *lengths, int64_t window, float scale, T *out) {
    const int64_t chunks = (D + 15) / 16, seen = std::min(window, *std::max_element(lengths, lengths + B));
    run(threads, 2 * B * G * group * D * seen, {B * G}, [&](int, int64_t task) {
        const int64_t b = task / G, g = task % G, first = std::max<int64_t>(0, lengths[b] - window);
        const int64_t count = lengths[b] - first;
        const auto cached = [&](const T *base) {
            return Cached<T>{base + g * D, token_stride, tables[b], block, first, lengths[b]};
        };
        std::vector<float> queries(group * chunks * 16), scores(group * count), inverse(group);
        for (int64_t h = 0; h < group; h++)
            for (int64_t d = 0; d < D; d++)
                queries[h * chunks * 16 + d] = widened(q[b * q_stride + (g * group + h) * D + d]) * scale;
        for (int64_t h = 0; h < group;) {
            const float *from = queries.data() + h * chunks * 16;
            float *to = scores.data() + h * count;
            if (h + kHeads <= group)
                scores_of<T, kHeads>(from, cached(keys), D, to, count), h += kHeads;
            else
                scores_of<T, 1>(from, cached(keys), D, to, count), h++;
        }
        for (int64_t h = 0; h < group; h++) inverse[h] = 1.0f / exponentials(scores.data() + h * count, count);
        for (int64_t h = 0; h < group;) {
            const bool four = h + kHeads <= group;
            T *to = out + ((b * G + g) * group + h) * D;
            for (int64_t c = 0; c < chunks;) {
                const int64_t left = D - 16 * c;
                const bool wide = c + kChunks <= chunks;
                const auto call = [&](auto function) {
                    function(scores.data() + h * count, count, cached(values + 16 * c), left, inverse.data() + h,
                             to + 16 * c, D);
                };
                if (four && wide)
                    call(values_of<T, kHeads, kChunks>);
                else if (four)
                    call(values_of<T, kHeads, 1>);
                else if (wide)
                    call(values_of<T, 1, kChunks>);
                else
                    call(values_of<T, 1, 1>);
                c += wide ? kChunks : 1;
            }
            h += four ? kHeads : 1;
        }
    });
}

}  // namespace

}  // namespace moetel

using namespace moetel;

extern "C" void moetel_rms_norms(const moetel_threads *threads, int64_t type, const void *x, int64_t H, int64_t groups,
                                 const void *const *weights, const float *eps, const int64_t *starts, void *y) {
    if (type == MOETEL_BF16)
        rms_norms(*threads, static_cast<const bf16 *>(x), H, groups, weights, eps, starts, static_cast<bf16 *>(y));
    else
        rms_norms(*threads, static_cast<const float *>(x), H, groups, weights, eps, starts, static_cast<float *>(y));
}

extern "C" void moetel_attention(const moetel_threads *threads, int64_t type, const void *q, int64_t q_stride,
                                 const void *keys, const void *values, int64_t token_stride,
                                 const int64_t *const *tables, int64_t block, int64_t B, int64_t G, int64_t group,
                                 int64_t D, const int64_t *lengths, int64_t window, float scale, void *out) {
    const auto call = [&](auto zero) {
        using T = decltype(zero);
        attention(*threads, static_cast<const T *>(q), q_stride, static_cast<const T *>(keys),
                  static_cast<const T *>(values), token_stride, tables, block, B, G, group, D, lengths, window, scale,
                  static_cast<T *>(out));
    };
    if (type == MOETEL_BF16)
        call(bf16{});
    else
        call(float{});
}
