// Products with the low-rank part of a residual, which stays packed and is expanded in registers.
//
// A part adds y[m][n] += sum_i t[m][i] u[i][n], t[m][i] = scale_i sum_k v[i][k] x[m][k], in two steps, so that callers
// can share each of them out among threads. Layout: float32 scale[rank]; v [rank][inputs]; u [rank][outputs], rows padded
// to 4 bytes. Parts of two matrices may have one v. The bits of a result depend on its row and the part only, not on how rows, components and
// outputs are cut.
//
// Letters: M rows of a tile, K inputs, N outputs.

#ifndef MOETEL_LOW_RANK_H
#define MOETEL_LOW_RANK_H

#include "product.h"

namespace moetel {

// Bytes of a row of `count` numbers, padded to a multiple of 4.
inline int64_t row_bytes(int64_t count, int64_t bits) { return (count * bits + 31) / 32 * 4; }

// bits: 2, 4, 8, 16 or 32.
struct LowRank {
    const uint8_t *scales, *v, *u;
    int64_t bits, rank, outputs, inputs;
};

// Sixteen numbers from their codes, which begin at a byte.
template <int bits>
ALWAYS v16 decode(const uint8_t *from) {
    if constexpr (bits == 2) return v_codes2(from);
    if constexpr (bits == 4) return v_codes4(from);
    if constexpr (bits == 8) return v_codes8(from);
    if constexpr (bits == 16) return v_load_f16(from);
    return v_load(reinterpret_cast<const float *>(from));
}

// The last numbers of a row of `count`, from number `at` on (a multiple of 16). What follows them is undefined where
// zero bits stand for another number than 0.
template <int bits>
ALWAYS v16 decode_tail(const uint8_t *row, int64_t at, int64_t count) {
    uint8_t buffer[64] = {0};
    std::memcpy(buffer, row + at * bits / 8, static_cast<size_t>(((count - at) * bits + 7) / 8));
    return decode<bits>(buffer);
}

// t[m][i] for M rows and components begin .. end.
template <typename X, int M, int bits>
void first_step_tile(const LowRank &p, const X *const *x, int64_t begin, int64_t end, float *t, int64_t stride) {
    const int64_t K = p.inputs, width = row_bytes(K, bits), whole = K / 16 * 16;
    for (int64_t i = begin; i < end; i += 4) {
        const int64_t count = std::min<int64_t>(4, end - i);
        const uint8_t *rows[4];
        float scale[4] = {0, 0, 0, 0};
        for (int c = 0; c < 4; c++) rows[c] = p.v + (i + std::min<int64_t>(c, count - 1)) * width;
        std::memcpy(scale, p.scales + 4 * i, static_cast<size_t>(count) * 4);
        v16 acc[M][4], values[4];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) acc[m][c] = v_zero();
        for (int64_t k = 0; k < whole; k += 16) {
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) values[c] = decode<bits>(rows[c] + k * bits / 8);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                const v16 value = load16(x[m] + k);
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) acc[m][c] = v_fma(values[c], value, acc[m][c]);
            }
        }
        if (whole < K) {
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) values[c] = decode_tail<bits>(rows[c], whole, K);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                const v16 value = load_some(x[m] + whole, K - whole);
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) acc[m][c] = v_fma(values[c], value, acc[m][c]);
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            float sums[4];
            v_sums(acc[m][0], acc[m][1], acc[m][2], acc[m][3], sums);
            for (int64_t c = 0; c < count; c++) t[m * stride + i + c] = scale[c] * sums[c];
        }
    }
}

// y[m][..] += for M rows and Q * 16 outputs from n on, of which those before n1 are stored. y[m] is where n is.
// tail: whether rows of u end before n + 16; Q is then 1.
template <int M, int Q, bool tail, int bits>
ALWAYS void second_step_tile(const LowRank &p, const float *t, int64_t stride, int64_t n, int64_t n1, float *const *y) {
    const int64_t width = row_bytes(p.outputs, bits);
    v16 acc[M][Q];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) acc[m][q] = v_zero();
    for (int64_t i = 0; i < p.rank; i++) {
        const uint8_t *row = p.u + i * width;
        v16 values[Q];
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++)
            values[q] = tail ? decode_tail<bits>(row, n, p.outputs) : decode<bits>(row + (n + 16 * q) * bits / 8);
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
            v_store_some(to, v_add(v_load_some(to, n1 - n), acc[m][q]), n1 - n);  // Q > 1: all
        }
}

template <int M, int bits>
void second_step_rows(const LowRank &p, const float *t, int64_t stride, int64_t n0, int64_t n1, float *const *y) {
    float *to[M];
    for (int m = 0; m < M; m++) to[m] = y[m];
    int64_t n = n0;
    for (; n + 64 <= n1; n += 64) {
        second_step_tile<M, 4, false, bits>(p, t, stride, n, n1, to);
        for (int m = 0; m < M; m++) to[m] += 64;
    }
    for (; n < n1; n += 16) {
        if (n + 16 <= p.outputs)
            second_step_tile<M, 1, false, bits>(p, t, stride, n, n1, to);
        else
            second_step_tile<M, 1, true, bits>(p, t, stride, n, n1, to);
        for (int m = 0; m < M; m++) to[m] += 16;
    }
}

// f(rows of a tile, bits, first row): both are constants inside, so that sums stay in registers.
template <typename F>
void for_tiles(int64_t count, int64_t bits, const F &f) {
    constexpr int most = VECTOR_REGISTERS >= 16 ? 4 : 2;
    const auto tile = [&](auto b, int64_t row) {
        const int64_t left = count - row;
        if (left >= most) return f(std::integral_constant<int, most>(), b, row), most;
        if (left >= 2) return f(std::integral_constant<int, 2>(), b, row), 2;
        return f(std::integral_constant<int, 1>(), b, row), 1;
    };
    for (int64_t row = 0; row < count;) switch (bits) {
            case 2: row += tile(std::integral_constant<int, 2>(), row); break;
            case 4: row += tile(std::integral_constant<int, 4>(), row); break;
            case 8: row += tile(std::integral_constant<int, 8>(), row); break;
            case 16: row += tile(std::integral_constant<int, 16>(), row); break;
            default: row += tile(std::integral_constant<int, 32>(), row); break;
        }
}

// t[m][begin .. end - 1] for `count` rows of x; t: [count][stride].
template <typename X>
void first_step(const LowRank &p, Rows<const X> x, int64_t count, int64_t begin, int64_t end, float *t, int64_t stride) {
    for_tiles(count, p.bits, [&](auto M, auto bits, int64_t row) {
        const X *tile[M];
        for (int m = 0; m < M; m++) tile[m] = x[row + m];
        first_step_tile<X, M, bits>(p, tile, begin, end, t + row * stride, stride);
    });
}

// Adds outputs n0 .. n1 - 1, n0 a multiple of 16, to `count` rows; y is where output n0 of each is.
inline void second_step(const LowRank &p, const float *t, int64_t stride, int64_t count, int64_t n0, int64_t n1,
                        Rows<float> y) {
    for_tiles(count, p.bits, [&](auto M, auto bits, int64_t row) {
        float *tile[M];
        for (int m = 0; m < M; m++) tile[m] = y[row + m];
        second_step_rows<M, bits>(p, t + row * stride, stride, n0, n1, tile);
    });
}

}  // namespace moetel

#endif
