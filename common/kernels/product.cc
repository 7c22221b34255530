// The micro-kernel. With few rows a product is bound by reading the weights, with many by arithmetic. One kernel serves
// both: it walks a panel of packed weights front to back and adds outer products, the sums of up to six rows staying in
// registers. Where a panel is met more than once it asks for the next one meanwhile, so that memory is never idle.

#include "product.h"

namespace moetel {

namespace {

// Inputs of a panel: this one and the next lie in a core's caches, in the first of them where a panel is read in parts.
constexpr int64_t kPanel = VECTOR_REGISTERS >= 16 ? 256 : 64;

// Vectors of a block's outputs that a tile of `rows` rows sums at once.
constexpr int vectors_of(int rows) { return 4 * rows <= VECTOR_REGISTERS ? 4 : 2 * rows <= VECTOR_REGISTERS ? 2 : 1; }

// Inputs whose weights lie side by side.
template <typename W>
constexpr int lanes = sizeof(W) == 2 ? 2 : 1;

ALWAYS v16 weights_of(const float *w, int) { return v_load(w); }
ALWAYS v16 weights_of(const bf16 *w, int second) { return v_load_pairs(w, second); }
ALWAYS v16 weights_of(const Zero *, int) { return v_zero(); }

// Cache lines to ask for while a tile is computed: `lines` every four inputs.
struct Ahead {
    const char *at;
    int lines;
};

// What a panel of weights is, and what a sign part adds to it: plus scale[64] where a bit of codes[K] is 1, minus it
// where it is 0.
template <typename W>
struct Panel {
    const W *w;
    const uint8_t *codes;
    const float *scale;
    int64_t K, left;  // left: outputs of the block that exist
    int64_t nbytes;  // of the weights, which the next panel follows
    bool first;      // y is to be overwritten
};

// y[m][at .. at + 16 J - 1] (+)= x[m][0..K-1] w[K][64]. bfloat16 x comes in whole pairs.
template <typename X, typename W, int M, int J, bool Signed>
ALWAYS void part(const X *const *x, float *const *y, int64_t at, const Panel<W> &panel, Ahead &ahead) {
    const W *const w = panel.w + lanes<W> * at;
    v16 sum[M][J];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) {
            const int64_t left = panel.left - at - 16 * j;
            sum[m][j] = panel.first || left <= 0 ? v_zero() : v_load_some(y[m] + at + 16 * j, left);
        }
    const auto step = [&](int64_t k, int second) __attribute__((always_inline)) {
#if BF16_PRODUCTS
        if constexpr (std::is_same_v<X, bf16>) {  // both inputs of a pair
            if (second) return;
            __m512bh weights[J];
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) weights[j] = (__m512bh)_mm512_loadu_si512(w + k * kBlock + 32 * j);
#pragma GCC unroll 6
            for (int m = 0; m < M; m++) {
                int32_t pair;
                std::memcpy(&pair, x[m] + k, 4);
                const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int j = 0; j < J; j++) sum[m][j] = _mm512_dpbf16_ps(sum[m][j], weights[j], value);
            }
            return;
        }
#endif
        v16 weights[J];
        const int64_t here = lanes<W> == 2 ? k : k + second;
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) weights[j] = weights_of(w + here * kBlock + lanes<W> * 16 * j, second);
        if (Signed) {
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) {
                uint16_t bits;
                std::memcpy(&bits, panel.codes + 8 * (k + second) + (at / 8 + 2 * j), 2);
                weights[j] = v_add_signed(weights[j], bits, v_load(panel.scale + at + 16 * j));
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) v_keep(weights[j]);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            const v16 value = v_set1(widened(x[m][k + second]));
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) sum[m][j] = v_fma(weights[j], value, sum[m][j]);
        }
    };
    int64_t k = 0;
    if (J == 1) {  // one of four lines is read, so the next panel's same quarter is asked for
        const char *next = reinterpret_cast<const char *>(panel.w) + panel.nbytes + at / 16 * (panel.nbytes / 4);
        for (; k + lanes<W> <= panel.K; k += lanes<W>, next += 64) {
            __builtin_prefetch(next, 0, 2);
            step(k, 0);
            if (lanes<W> == 2) step(k, 1);
        }
    }
    for (; k + 4 <= panel.K; k += 4) {
        for (int line = 0; line < ahead.lines; line++, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
        step(k, 0), step(k, 1), step(k + 2, 0), step(k + 2, 1);
    }
    for (; k < panel.K; k += 2) {
        step(k, 0);
        if (k + 1 < panel.K) step(k, 1);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) {
            const int64_t left = panel.left - at - 16 * j;
            if (left > 0) v_store_some(y[m] + at + 16 * j, sum[m][j], left);
        }
}

// `part` for all 64 outputs of a block.
template <typename X, typename W, int M, bool Signed>
void tile(const X *const *x, float *const *y, const Panel<W> &panel, Ahead ahead) {
    constexpr int J = vectors_of(M);
    for (int64_t n = 0; n < kBlock; n += 16 * J) part<X, W, M, J, Signed>(x, y, n, panel, ahead);
}

template <typename X, typename W, bool Signed>
void tile_of(int M, const X *const *x, float *const *y, const Panel<W> &panel, Ahead ahead) {
    switch (M) {
        case 1: return tile<X, W, 1, Signed>(x, y, panel, ahead);
        case 2: return tile<X, W, 2, Signed>(x, y, panel, ahead);
        case 3: return tile<X, W, 3, Signed>(x, y, panel, ahead);
        case 4: return tile<X, W, 4, Signed>(x, y, panel, ahead);
        case 5: return tile<X, W, 5, Signed>(x, y, panel, ahead);
        default: return tile<X, W, 6, Signed>(x, y, panel, ahead);
    }
}

void widen(float *to, const bf16 *from, int64_t count) {
    int64_t k = 0;
    for (; k + 16 <= count; k += 16) v_store(to + k, v_load_bf16(from + k));
    for (; k < count; k++) to[k] = widened(from[k]);
}

template <typename X, typename W, bool Signed>
void panels(Rows<const X> x, Rows<float> y, int64_t count, const W *block, int64_t K, int64_t left,
            const uint8_t *codes, const float *scale, bool adding) {
    // Processors that do not multiply bfloat16 widen weights in registers, and rows once a panel. So do all beside signs.
    constexpr bool widens = std::is_same_v<X, bf16> && (Signed || !BF16_PRODUCTS);
    using In = std::conditional_t<widens, float, X>;
    alignas(64) In copies[kTile][kPanel];
    // AVX2 meets float32 weights sooner with two rows one after the other than with both.
    const bool apart = VECTOR_REGISTERS < 16 && sizeof(W) == 4 && count == 2;
    const int64_t tiles = apart ? 2 : (count + kTile - 1) / kTile;
    // Rows that lie a power of two apart push one another out of a cache; with many tiles copies cost more than that.
    const bool copying = count > 1 && (tiles < 4 || VECTOR_REGISTERS < 16);
    for (int64_t k = 0; k < K; k += kPanel) {
        const int64_t length = std::min(kPanel, K - k);
        const bool odd = sizeof(In) == 2 && length % 2;  // what follows a row's last input is another row's
        const W *w = std::is_same_v<W, Zero> ? nullptr : block + k * kBlock;
        const int64_t nbytes = length * kBlock * static_cast<int64_t>(sizeof(W));
        const Panel<W> panel = {w, codes + (Signed ? 8 * k : 0), scale, length + odd, left, nbytes, k == 0 && !adding};
        // The panel that follows in memory is what this thread reads next, in this block or the next. One tile alone
        // that takes all outputs at once reads as the processor's own prefetcher likes it.
        const char *next = reinterpret_cast<const char *>(w) + nbytes;
        const char *end = next + nbytes;
        for (int64_t t = 0, row = 0; t < tiles; t++) {
            const int M = static_cast<int>((count - row) / (tiles - t));
            const In *from[kTile];
            float *to[kTile];
            for (int m = 0; m < M; m++, row++) {
                to[m] = y[row];
                from[m] = copies[m];
                if constexpr (widens)
                    widen(copies[m], x[row] + k, length);
                else if (copying || odd)
                    std::memcpy(copies[m], x[row] + k, static_cast<size_t>(length) * sizeof(In));
                else
                    from[m] = x[row] + k;
                if (odd) copies[m][length] = 0;
            }
            const int64_t parts = 4 / vectors_of(M), shares = tiles * parts;
            const bool reading = shares > 1 && next < end && !std::is_same_v<W, Zero>;
            const Ahead ahead = {next, reading ? static_cast<int>((4 * sizeof(W) + shares - 1) / shares) : 0};
            next += length / 4 * ahead.lines * parts * 64;
            tile_of<In, W, Signed>(M, from, to, panel, ahead);
        }
    }
}

}  // namespace

template <typename X, typename W>
void product(Rows<const X> x, Rows<float> y, int64_t count, const W *block, int64_t K, int64_t N, int64_t b,
             const Sign *sign, bool adding) {
    const int64_t left = N - b * kBlock;
    if (!sign) {
        if constexpr (!std::is_same_v<W, Zero>) panels<X, W, false>(x, y, count, block, K, left, nullptr, nullptr, adding);
        return;
    }
    alignas(64) float scale[kBlock];  // of each output, 0 behind the last
    int64_t n = b * kBlock, group = n / sign->size, same = (group + 1) * sign->size - n;
    for (int64_t i = 0; i < kBlock; i++, n++) {
        bf16 half = 0;
        if (n < sign->outputs) std::memcpy(&half, sign->data + 2 * group, 2);
        scale[i] = widened(half);
        if (--same == 0) group++, same = sign->size;
    }
    panels<X, W, true>(x, y, count, block, K, left, sign->data + sign->codes_at() + 8 * b * K, scale, adding);
}

#define INSTANTIATE(X, W)                                                                                         \
    template void product<X, W>(Rows<const X>, Rows<float>, int64_t, const W *, int64_t, int64_t, int64_t, const Sign *, \
                                bool);
INSTANTIATE(float, float)
INSTANTIATE(float, bf16)
INSTANTIATE(float, Zero)
INSTANTIATE(bf16, bf16)
INSTANTIATE(bf16, Zero)

}  // namespace moetel
