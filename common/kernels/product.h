// Products of some rows with one block of 64 packed outputs, and with the sign part of a residual beside it.

#ifndef MOETEL_PRODUCT_H
#define MOETEL_PRODUCT_H

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace moetel {

using bf16 = uint16_t;  // the upper half of a float32

constexpr int64_t kBlock = 64;   // outputs in a block of the packed layout
// Rows of a work item: more work for one thread at the end costs more than it saves, and AVX2 reads rows most often.
constexpr int64_t kChunk = VECTOR_REGISTERS >= 16 ? 192 : 96;
constexpr int kTile = 6;         // rows whose sums stay in registers

inline int64_t blocks_of(int64_t N) { return (N + kBlock - 1) / kBlock; }

// Numbers of a block of packed weights.
template <typename W>
int64_t block_size(int64_t K) {
    return (sizeof(W) == 2 ? (K + 1) / 2 * 2 : K) * kBlock;
}

// Rows of a work item when `count` rows are shared out: whole tiles, items of about the same size.
inline int64_t chunk_of(int64_t count) {
    if (count == 0) return kTile;
    const int64_t chunks = (count + kChunk - 1) / kChunk, tiles = (count + kTile * chunks - 1) / (kTile * chunks);
    return tiles * kTile;
}

// Rows of a matrix, taken through an index where they are not adjacent.
template <typename T>
struct Rows {
    T *base;
    int64_t stride;
    const int32_t *index = nullptr;

    T *operator[](int64_t row) const { return base + (index ? index[row] : row) * stride; }
    // The rows from one on, and of each what is behind its first `skipped` numbers.
    Rows from(int64_t row, int64_t skipped = 0) const {
        return index ? Rows{base + skipped, stride, index + row} : Rows{base + row * stride + skipped, stride};
    }
};

// A sign part of a residual: bfloat16 [outputs / size, rounded up], padded to 4 bytes, then uint64 [blocks, K].
struct Sign {
    const uint8_t *data;
    int64_t size, outputs;

    int64_t codes_at() const { return ((outputs + size - 1) / size * 16 + 31) / 32 * 4; }
};

// Weights that are not there: a sign part alone.
struct Zero {};

// y[m][0..63] = x[m][0..K-1] w^T for `count` rows and one block of packed weights, outputs b * 64 .. of N. y: where the
// block's first output is in each row. sign: added to the weights. adding: y += that.
// An output is one chain of float32 sums over k = 0 .. K-1, however rows and threads are cut: its bits depend on its own
// row and weights only. Types: <float, float>, <float, bf16>, <bf16, bf16>, and Zero weights for either x.
template <typename X, typename W>
void product(Rows<const X> x, Rows<float> y, int64_t count, const W *block, int64_t K, int64_t N, int64_t b,
             const Sign *sign = nullptr, bool adding = false);

inline float widened(float v) { return v; }
inline float widened(bf16 v) {
    const uint32_t bits = static_cast<uint32_t>(v) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// Rounded to nearest even, as torch does; NaN stays NaN.
template <typename T>
inline T narrowed(float f) {
    if constexpr (std::is_same_v<T, float>) return f;
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<T>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

ALWAYS v16 load16(const float *from) { return v_load(from); }
ALWAYS v16 load16(const bf16 *from) { return v_load_bf16(from); }

// Up to 16 values, zeros behind.
ALWAYS v16 load_some(const float *from, int64_t count) { return v_load_some(from, count); }
ALWAYS v16 load_some(const bf16 *from, int64_t count) {
    if (count >= 16) return load16(from);
    bf16 part[16] = {0};
    std::memcpy(part, from, static_cast<size_t>(count) * sizeof(bf16));
    return load16(part);
}

}  // namespace moetel

#endif
