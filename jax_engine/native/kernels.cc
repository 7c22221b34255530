// Products with few rows, and a whole layer of top-1 experts, for the processors of common/native/vectors.h; called by
// XLA on the CPU through its foreign function interface.
//
// With few rows a product is bound by reading the weights, with many by arithmetic. One micro-kernel serves both: it
// walks a panel of packed weights front to back and adds outer products, the sums of up to six rows staying in
// registers. Where rows fill several tiles it asks for the next panel meanwhile, so that memory is never idle.
//
// Packed layout (native/__init__.py, `pack`): [blocks, K, 64], 64 outputs in a block, zeros behind the last output.
// Each output is one chain of float32 sums over k = 0..K-1, however rows, panels and threads are cut: its bits depend
// on its own row and weights only.
//
// Residuals keep to that. The bits of a sign part lie as the weights do, [blocks, K] words of 64 outputs, and its scales
// are added to the weights, or taken from them, in registers, before any row is multiplied: with many rows that costs
// little, with few it hides behind the reading. Low-rank parts are added after (common/native/residuals.h).
// Letters: T rows of a call, M rows of a tile, K inputs, N outputs, B blocks of outputs, S slots.

#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "residuals.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int64_t kBlock = 64;   // outputs in a block of the packed layout
constexpr int kTile = 6;         // rows whose sums stay in registers
// Inputs of a panel: this one and the next lie in a core's caches, in the first of them where a panel is read in parts.
constexpr int64_t kPanel = VECTOR_REGISTERS >= 16 ? 256 : 64;
constexpr int64_t kChunk = 192;  // rows of a work item: more work for one thread at the end costs more than it saves

int64_t blocks_of(int64_t N) { return (N + kBlock - 1) / kBlock; }

// Vectors of a block's outputs that a tile of `rows` rows sums at once.
constexpr int vectors_of(int rows) { return 4 * rows <= VECTOR_REGISTERS ? 4 : 2 * rows <= VECTOR_REGISTERS ? 2 : 1; }

inline v16 widen(const float *w) { return v_load(w); }
inline v16 widen(const uint16_t *w) { return v_load_bf16(w); }

// Weights that are not there: a sign part alone.
struct Zero {};
inline v16 widen(const Zero *) { return v_zero(); }

// A sign part of a residual: bfloat16 [outputs / size, rounded up], padded to 4 bytes, then uint64 [blocks, K].
struct Sign {
    const uint8_t *data;
    int64_t size, outputs;

    int64_t codes_at() const { return residual_row_bytes((outputs + size - 1) / size, 16); }

    // Of outputs b * 64 .., 0 behind the last.
    void scales_of(int64_t b, float *scale) const {
        int64_t n = b * kBlock, group = n / size, left = (group + 1) * size - n;
        for (int64_t i = 0; i < kBlock; i++, n++) {
            uint16_t half = 0;
            if (n < outputs) std::memcpy(&half, data + 2 * group, 2);
            const uint32_t bits = static_cast<uint32_t>(half) << 16;
            std::memcpy(scale + i, &bits, 4);
            if (--left == 0) group++, left = size;
        }
    }
};

// Cache lines to ask for while a tile is computed: `lines` every four inputs.
struct Ahead {
    const char *at;
    int lines;
};

// y[m][0..16J-1] = (first ? 0 : y[m][0..16J-1]) + x[m][0..K-1] w[K][64], where `left` outputs exist. Signed: each weight
// plus scale[64] where its bit of codes[K] is 1, minus it where it is 0.
template <typename W, int M, int J, bool Signed>
ALWAYS void part(const float *const *x, float *const *y, int64_t at, const W *w, const uint8_t *codes,
                 const float *scale, int64_t K, int64_t left, bool first, Ahead &ahead) {
    v16 sum[M][J];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++)
            sum[m][j] = first || left <= 16 * j ? v_zero() : v_load_some(y[m] + at + 16 * j, left - 16 * j);
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
        v16 weights[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) weights[j] = widen(w + k * kBlock + 16 * j);
        if (Signed) {
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) {
                uint16_t bits;
                std::memcpy(&bits, codes + 8 * k + 2 * j, 2);
                weights[j] = v_add_signed(weights[j], bits, v_load(scale + 16 * j));
            }
        }
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            const v16 value = v_set1(x[m][k]);
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) sum[m][j] = v_fma(weights[j], value, sum[m][j]);
        }
    };
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) {
        for (int line = 0; line < ahead.lines; line++, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
        step(k), step(k + 1), step(k + 2), step(k + 3);
    }
    for (; k < K; k++) step(k);
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++)
            if (left > 16 * j) v_store_some(y[m] + at + 16 * j, sum[m][j], left - 16 * j);
}

// `part` for all 64 outputs of a block.
template <typename W, int M, bool Signed>
void tile(const float *const *x, float *const *y, const W *w, const uint8_t *codes, const float *scale, int64_t K,
          int64_t left, bool first, Ahead ahead) {
    constexpr int J = vectors_of(M);
    for (int64_t n = 0; n < kBlock; n += 16 * J)
        part<W, M, J, Signed>(x, y, n, w + n, Signed ? codes + n / 8 : nullptr, scale + n, K, left - n, first, ahead);
}

template <typename W, bool Signed>
void tile_of(int M, const float *const *x, float *const *y, const W *w, const uint8_t *codes, const float *scale,
             int64_t K, int64_t left, bool first, Ahead ahead) {
    switch (M) {
        case 1: return tile<W, 1, Signed>(x, y, w, codes, scale, K, left, first, ahead);
        case 2: return tile<W, 2, Signed>(x, y, w, codes, scale, K, left, first, ahead);
        case 3: return tile<W, 3, Signed>(x, y, w, codes, scale, K, left, first, ahead);
        case 4: return tile<W, 4, Signed>(x, y, w, codes, scale, K, left, first, ahead);
        case 5: return tile<W, 5, Signed>(x, y, w, codes, scale, K, left, first, ahead);
        default: return tile<W, 6, Signed>(x, y, w, codes, scale, K, left, first, ahead);
    }
}

// Rows of a work item when `count` rows are shared out: whole tiles, items of about the same size.
int64_t chunk_of(int64_t count) {
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
};

// Outputs b * 64 .. of rows first .. first + count: y = x w^T for one block of packed weights, and of a sign part beside
// them if Signed. adding: y += that.
template <typename W, bool Signed = false>
void product(Rows<const float> x, Rows<float> y, int64_t first, int64_t count, const W *packed, int64_t K, int64_t N,
             int64_t b, const Sign *sign = nullptr, bool adding = false) {
    alignas(64) float scale[kBlock];
    const uint8_t *codes = nullptr;
    if (Signed) {
        sign->scales_of(b, scale);
        codes = sign->data + sign->codes_at() + 8 * b * K;
    }
    const int64_t tiles = (count + kTile - 1) / kTile;
    for (int64_t k = 0; k < K; k += kPanel) {
        const int64_t length = std::min(kPanel, K - k);
        const W *panel = packed + (b * K + k) * kBlock;
        // The panel that follows in memory is what this thread reads next, in this block or the next. One tile alone
        // that takes all outputs at once reads as the processor's own prefetcher likes it.
        const char *next = reinterpret_cast<const char *>(panel + length * kBlock);
        const char *end = next + length * kBlock * sizeof(W);
        for (int64_t t = 0, row = first; t < tiles; t++) {
            const int M = static_cast<int>((first + count - row) / (tiles - t));
            const float *from[kTile];
            float *to[kTile];
            for (int m = 0; m < M; m++, row++) {
                from[m] = x[row] + k;
                to[m] = y[row] + b * kBlock;
            }
            const int64_t parts = 4 / vectors_of(M), shares = tiles * parts;
            const bool reading = shares > 1 && next < end && !std::is_same_v<W, Zero>;
            const Ahead ahead = {next, reading ? static_cast<int>((4 * sizeof(W) + shares - 1) / shares) : 0};
            next += length / 4 * ahead.lines * parts * 64;
            tile_of<W, Signed>(M, from, to, panel, codes + (Signed ? 8 * k : 0), scale, length, N - b * kBlock,
                               k == 0 && !adding, ahead);
        }
    }
}

// ---- activations

// The numbers are those of ACTIVATIONS in native/__init__.py.
enum Activation : int64_t { kRelu = 0, kGeluTanh = 1, kGeluErf = 2, kSilu = 3 };

inline v16 activate(v16 v, int64_t kind) {
    if (kind == kRelu) return v_relu(v);
    if (kind == kGeluErf) {
        float lane[16];
        v_store(lane, v);
        for (float &u : lane) u = 0.5f * u * (1.0f + erff(u * 0.70710678f));
        return v_load(lane);
    }
    if (kind == kSilu) return v_silu(v);
    // (1 + tanh(u)) / 2 = 1 / (1 + e^(-2u)), so this is v times a sigmoid.
    const v16 cubic = v_fma(v_mul(v, v), v_set1(0.044715f), v_set1(1.0f));
    const v16 u = v_mul(v_mul(v, cubic), v_set1(1.59576912f));
    return v_div(v, v_add(v_set1(1.0f), v_exp(v_sub(v_zero(), u))));
}

// ---- threads

// Work items 0..items-1, a range for each thread to begin with: neighbours in memory are read by one thread. A thread
// whose range is done goes on with the others', so the caller alone can finish if the pool is busy.
class Phase {
   public:
    Phase(int64_t items, int64_t threads) : ranges_(threads), left_(items) {
        for (int64_t t = 0; t < threads; t++) {
            ranges_[t].next = items * t / threads;
            ranges_[t].end = items * (t + 1) / threads;
        }
    }

    template <typename F>
    void work(int64_t rank, const F &item_of) {
        const int64_t threads = static_cast<int64_t>(ranges_.size());
        for (int64_t i = 0; i < threads; i++) {
            Range &range = ranges_[(rank + i) % threads];
            for (int64_t item; (item = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
                item_of(item);
                left_.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    // Only after `work`: what is left has been begun by a running thread.
    void wait() const {
        for (int spins = 0; left_.load(std::memory_order_acquire) > 0; spins++) {
            if (spins < 2000)
                _mm_pause();
            else
                sched_yield();
        }
    }

   private:
    struct alignas(64) Range {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };
    std::vector<Range> ranges_;
    alignas(64) std::atomic<int64_t> left_;
};

// f(phase, item) for the items of one phase, then of the next. threads: at most so many, 0 for all that the pool has.
// multiplications: of the whole call; waking a thread costs as much time as some ten thousands of them.
template <typename F>
void run(ffi::ThreadPool &pool, int64_t threads, int64_t multiplications, const std::vector<int64_t> &items,
         const F &f) {
    if (threads <= 0) threads = pool.num_threads();
    threads = std::min({threads, multiplications >> 16, *std::max_element(items.begin(), items.end())});
    threads = std::max<int64_t>(threads, 1);
    // Tasks may start after this call has returned: they own what they look at then. f lives as long as items are left.
    auto phases = std::make_shared<std::deque<Phase>>();
    for (const int64_t count : items) phases->emplace_back(count, threads);
    const auto work = [phases, &f](int64_t rank) {
        for (size_t p = 0; p < phases->size(); p++) {
            (*phases)[p].work(rank, [&](int64_t item) { f(p, item); });
            (*phases)[p].wait();
        }
    };
    for (int64_t rank = 1; rank < threads; rank++) pool.Schedule([work, rank] { work(rank); });
    work(0);
}

// ---- handlers

ffi::Error invalid(const std::string &message) { return ffi::Error::InvalidArgument("moetel kernels: " + message); }

template <typename Buffer>
std::string shape_of(const Buffer &buffer) {
    std::string text = "[";
    for (const int64_t size : buffer.dimensions()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

bool is_packed(const ffi::AnyBuffer &weight, ffi::DataType type, int64_t N, int64_t K) {
    const auto sizes = weight.dimensions();
    return (type == ffi::F32 || type == ffi::BF16) && weight.element_type() == type && sizes.size() == 3 &&
           sizes[0] == blocks_of(N) && sizes[1] == K && sizes[2] == kBlock && K > 0;
}

std::string expected(int64_t N, int64_t K) {
    return "expected [" + std::to_string(blocks_of(N)) + ", " + std::to_string(K) +
           ", 64], all float32 or all bfloat16";
}

using Matrix = ffi::Buffer<ffi::F32, 2>;
using Slots = ffi::Buffer<ffi::S32, 1>;
using Scratch = ffi::Buffer<ffi::F32, 3>;

template <typename W>
void linear_of(ffi::ThreadPool &pool, int64_t threads, const Matrix &x, const W *packed, Matrix &y) {
    const int64_t T = x.dimensions()[0], K = x.dimensions()[1], N = y.dimensions()[1];
    const int64_t chunk = chunk_of(T), chunks = (T + chunk - 1) / chunk, blocks = blocks_of(N);
    run(pool, threads, T * K * N, {blocks * chunks}, [&](size_t, int64_t item) {
        const int64_t b = item / chunks, first = item % chunks * chunk;
        product<W>({x.typed_data(), K}, {y.typed_data(), N}, first, std::min(chunk, T - first), packed, K, N, b);
    });
}

// y[T][N] = x[T][K] w[N][K]^T
ffi::Error linear(ffi::ThreadPool pool, int64_t threads, Matrix x, ffi::AnyBuffer packed, ffi::Result<Matrix> y) {
    const int64_t K = x.dimensions()[1], N = y->dimensions()[1];
    const ffi::DataType type = packed.element_type();
    if (y->dimensions()[0] != x.dimensions()[0]) return invalid("x and the result differ in rows");
    if (!is_packed(packed, type, N, K))
        return invalid("packed weight is " + shape_of(packed) + ", " + expected(N, K));
    if (y->element_count() == 0) return ffi::Error::Success();
    if (type == ffi::F32)
        linear_of<float>(pool, threads, x, packed.typed_data<float>(), *y);
    else
        linear_of<uint16_t>(pool, threads, x, packed.reinterpret_data<uint16_t>(), *y);
    return ffi::Error::Success();
}

// Rows first .. first + count in the order of slots: those of one slot, and of one tenant where residuals tell them
// apart. number: their row of the residuals' table, that of the slot itself without residuals.
struct Group {
    int64_t slot, number, first, count;
    int64_t chunk;  // rows of a work item
};

// Some rows of a group: with a block of outputs, a work item.
struct Chunk {
    int64_t group, first, count;
};

// A slot that is hit: its chunks lie together, so that one after the other meets a block of weights in a cache.
struct Hit {
    int64_t slot, chunks, chunks_before;
};

struct Work {
    std::vector<Group> groups;
    std::vector<Chunk> chunks;
    std::vector<Hit> hits;
    std::vector<int32_t> order;  // of the rows; those of no slot are left out
};

// The rows of each number that is named, in the order of slots: number v stands for slot v % S.
Work share_out(const int32_t *numbers, int64_t T, int64_t S, int64_t V) {
    const auto place_of = [&](int64_t v) { return v % S * (V / S) + v / S; };
    std::vector<int64_t> starts(V + 1, 0);
    const auto is_number = [&](int64_t t) { return numbers[t] >= 0 && numbers[t] < V; };
    for (int64_t t = 0; t < T; t++)
        if (is_number(t)) starts[place_of(numbers[t]) + 1]++;
    Work work;
    for (int64_t place = 0; place < V; place++) {
        const int64_t count = starts[place + 1], slot = place / (V / S);
        if (count > 0) {
            const int64_t chunk = chunk_of(count), group = static_cast<int64_t>(work.groups.size());
            if (work.hits.empty() || work.hits.back().slot != slot)
                work.hits.push_back({slot, 0, static_cast<int64_t>(work.chunks.size())});
            work.groups.push_back({slot, place % (V / S) * S + slot, starts[place], count, chunk});
            for (int64_t offset = 0; offset < count; offset += chunk, work.hits.back().chunks++)
                work.chunks.push_back({group, starts[place] + offset, std::min(chunk, count - offset)});
        }
        starts[place + 1] += starts[place];
    }
    work.order.resize(starts[V]);
    for (int64_t t = 0; t < T; t++)
        if (is_number(t)) work.order[starts[place_of(numbers[t])]++] = static_cast<int32_t>(t);
    return work;
}

// ---- residuals

using Words = ffi::Buffer<ffi::U32, 1>;
using Table = ffi::Buffer<ffi::S32, 4>;

// A low-rank part. Of each row, values t[at .. at + rank] are its first step's, t as residuals.h has it.
struct LowRank {
    residual_part part;
    int64_t at;
};

// What the groups' rows get beside their slots' weights, each at a side: 0 before the activation, 1 after the last product.
struct Residuals {
    // Of one projection of one slot.
    struct Matrix {
        std::vector<Sign> signs;
        std::vector<LowRank> low_ranks;
    };
    // Some components of a low-rank part for some rows: a work item of the first step.
    struct Piece {
        LowRank low_rank;
        int64_t begin, end, first, count;
    };

    std::vector<std::array<Matrix, 3>> matrices;  // of each group
    std::vector<Piece> pieces[2];
    int64_t stride[2] = {0, 0};  // of t
    std::unique_ptr<float[]> t[2];
    int64_t multiplications = 0;
};

// As `product`, with what a residual adds: y += or = x (w + R)^T.
template <typename W>
void product_with(const Residuals &all, int side, const Residuals::Matrix &matrix, Rows<const float> x, Rows<float> y,
                  int64_t first, int64_t count, const W *packed, int64_t K, int64_t N, int64_t b) {
    if (matrix.signs.empty())
        product<W>(x, y, first, count, packed, K, N, b);
    else
        product<W, true>(x, y, first, count, packed, K, N, b, &matrix.signs[0]);
    for (size_t i = 1; i < matrix.signs.size(); i++)
        product<Zero, true>(x, y, first, count, nullptr, K, N, b, &matrix.signs[i], true);
    if (matrix.low_ranks.empty()) return;
    const float *from[kChunk];
    float *to[kChunk];
    for (int64_t i = 0; i < count; i++) {
        from[i] = x[first + i];
        to[i] = y[first + i] + b * kBlock;
    }
    const int64_t stride = all.stride[side];
    for (const LowRank &low_rank : matrix.low_ranks)
        residual_second_f32(&low_rank.part, from, all.t[side].get() + first * stride + low_rank.at, stride, count,
                            b * kBlock, std::min((b + 1) * kBlock, low_rank.part.outputs), to);
}

constexpr int64_t kFields = 4, kNone = 0, kSign = 1, kLowRank = 2;  // jax_engine/residuals.py has the same
constexpr int64_t kComponents = 16;                                 // of a work item of the first step

std::string bad_part(const int32_t *field) {
    std::string text = "a residual's table has the part [";
    for (int64_t i = 0; i < kFields; i++) text += (i ? ", " : "") + std::to_string(field[i]);
    return text + "], which is none, or lies outside the records";
}

// Looks up the parts of the groups. Empty, or what is wrong with the table.
std::string find_residuals(const Words &words, const Table &table, const std::vector<Group> &groups, int64_t T,
                           int64_t K, int64_t I, int64_t N, int64_t projections, Residuals &found) {
    const int64_t parts = table.dimensions()[2], bytes = 4 * static_cast<int64_t>(words.element_count());
    for (const Group &group : groups) {
        std::array<Residuals::Matrix, 3> matrices;
        int64_t width[2] = {0, 0};
        for (int64_t p = 0; p < projections; p++) {
            const int side = p == projections - 1;
            const int64_t outputs = side ? N : I, inputs = side ? I : K;
            const int32_t *field = table.typed_data() + (group.number * projections + p) * parts * kFields;
            for (int64_t i = 0; i < parts && field[0] != kNone; i++, field += kFields) {
                const int64_t kind = field[0], bits = field[1], size = field[2], start = 4 * int64_t{field[3]};
                if (size < 1 || start < 0 || start > bytes) return bad_part(field);
                const auto *data = reinterpret_cast<const uint8_t *>(words.typed_data()) + start;
                if (kind == kSign && bits == 1) {
                    const Sign sign = {data, size, outputs};
                    if (sign.codes_at() + 8 * blocks_of(outputs) * inputs > bytes - start) return bad_part(field);
                    matrices[p].signs.push_back(sign);
                    found.multiplications += group.count * outputs * inputs;
                    continue;
                }
                if (kind != kLowRank || (bits != 2 && bits != 4 && bits != 8 && bits != 16 && bits != 32) ||
                    size * (4 + residual_row_bytes(inputs, bits) + residual_row_bytes(outputs, bits)) > bytes - start)
                    return bad_part(field);
                const LowRank low_rank = {{data, RESIDUAL_LOW_RANK, bits, size, outputs, inputs}, width[side]};
                matrices[p].low_ranks.push_back(low_rank);
                for (int64_t begin = 0; begin < size; begin += kComponents)
                    for (int64_t offset = 0; offset < group.count; offset += group.chunk)
                        found.pieces[side].push_back({low_rank, begin, std::min(size, begin + kComponents),
                                                      group.first + offset,
                                                      std::min(group.chunk, group.count - offset)});
                width[side] += size;
                found.multiplications += group.count * size * (outputs + inputs);
            }
        }
        for (int side = 0; side < 2; side++) found.stride[side] = std::max(found.stride[side], width[side]);
        found.matrices.push_back(std::move(matrices));
    }
    for (int side = 0; side < 2; side++) found.t[side].reset(new float[T * found.stride[side]]);
    return "";
}

template <typename W>
void experts_of(ffi::ThreadPool &pool, int64_t threads, int64_t activation, bool gated, const Matrix &x,
                const Work &work, const std::vector<const W *> &weights, int64_t I, Matrix &y, float *inner,
                const Residuals *residuals) {
    const int64_t K = x.dimensions()[1], N = y.dimensions()[1], T = x.dimensions()[0];
    const int64_t projections = gated ? 3 : 2, blocks[2] = {blocks_of(I), blocks_of(N)};
    const int64_t width = blocks[0] * kBlock, chunks = static_cast<int64_t>(work.chunks.size());
    const Rows<const float> in = {x.typed_data(), K, work.order.data()};
    const Rows<float> out = {y.typed_data(), N, work.order.data()}, gate = {inner, width}, up = {inner + T * width, width};
    const Rows<const float> hidden = {inner, width};
    const Residuals none;
    const std::array<Residuals::Matrix, 3> nothing;
    int64_t multiplications = static_cast<int64_t>(work.order.size()) * I * (K * (projections - 1) + N);
    std::vector<int64_t> items = {chunks * blocks[0], chunks * blocks[1]};
    if (residuals) {  // the first step of a side's parts comes before its products
        multiplications += residuals->multiplications;
        items = {static_cast<int64_t>(residuals->pieces[0].size()), items[0],
                 static_cast<int64_t>(residuals->pieces[1].size()), items[1]};
    }
    run(pool, threads, multiplications, items, [&](size_t phase, int64_t item) {
        if (residuals) {
            const size_t side = phase / 2;
            if (phase % 2 == 0) {
                const Residuals::Piece &piece = residuals->pieces[side][item];
                const float *from[kChunk];
                for (int64_t i = 0; i < piece.count; i++)
                    from[i] = side ? hidden[piece.first + i] : in[piece.first + i];
                const int64_t stride = residuals->stride[side];
                float *t = residuals->t[side].get() + piece.first * stride + piece.low_rank.at;
                residual_first_f32(&piece.low_rank.part, from, piece.count, piece.begin, piece.end, t, stride);
                return;
            }
            phase = side;
        }
        const auto after = std::upper_bound(work.hits.begin(), work.hits.end(), item, [&](int64_t value, const Hit &hit) {
            return value < hit.chunks_before * blocks[phase];
        });
        const Hit &hit = *(after - 1);
        item -= hit.chunks_before * blocks[phase];
        const int64_t b = item / hit.chunks;
        const Chunk &chunk = work.chunks[hit.chunks_before + item % hit.chunks];
        const int64_t first = chunk.first, count = chunk.count;
        const W *const *packed = &weights[hit.slot * projections];
        const auto &more = residuals ? residuals->matrices[chunk.group] : nothing;
        const auto whole = [&](int side, int64_t p, Rows<const float> x, Rows<float> y, int64_t K, int64_t N) {
            product_with<W>(residuals ? *residuals : none, side, more[p], x, y, first, count, packed[p], K, N, b);
        };
        if (phase == 1) return whole(1, projections - 1, hidden, out, I, N);
        // The padding of the last block is computed too: zeros, which no one reads.
        whole(0, 0, in, gate, K, width);
        if (gated) whole(0, 1, in, up, K, width);
        for (int64_t row = first; row < first + count; row++)
            for (int64_t n = b * kBlock; n < (b + 1) * kBlock; n += 16) {
                v16 value = activate(v_load(gate[row] + n), activation);
                if (gated) value = v_mul(value, v_load(up[row] + n));
                v_store(gate[row] + n, value);
            }
    });
}

// y[t] = feed-forward of slot slots[t], zeros where that is no slot. arrays: the packed projections of slot 0, of slot
// 1, ... inner: scratch [projections - 1, T, I up to a whole block]. words, table: residuals, or null. The table has S
// rows for each of one or several tenants; then slots[t] is a row of it, and stands for slot slots[t] % S.
ffi::Error compute(ffi::ThreadPool &pool, int64_t threads, int64_t activation, bool gated, int64_t I, const Matrix &x,
                   const Slots &slots, const Words *words, const Table *table, const ffi::RemainingArgs &arrays,
                   ffi::Result<Matrix> &y, ffi::Result<Scratch> &inner) {
    const int64_t T = x.dimensions()[0], K = x.dimensions()[1], N = y->dimensions()[1], projections = gated ? 3 : 2;
    const int64_t num_slots = static_cast<int64_t>(arrays.size()) / projections;
    if (slots.dimensions()[0] != T || y->dimensions()[0] != T) return invalid("x, slots and the result differ in rows");
    if (static_cast<int64_t>(inner->element_count()) < (projections - 1) * T * blocks_of(I) * kBlock)
        return invalid("scratch is too small: " + std::to_string(inner->element_count()) + " numbers");
    if (num_slots == 0 || static_cast<int64_t>(arrays.size()) % projections != 0)
        return invalid(std::to_string(arrays.size()) + " arrays in the pool, expected a multiple of " +
                       std::to_string(projections));
    if (activation < kRelu || activation > kSilu) return invalid("no activation " + std::to_string(activation));
    if (table && (table->dimensions()[0] < num_slots || table->dimensions()[0] % num_slots != 0 || table->dimensions()[1] != projections ||
                  table->dimensions()[3] != kFields))
        return invalid("the residuals' table is " + shape_of(*table) + ", expected [a multiple of " +
                       std::to_string(num_slots) + " slots, " + std::to_string(projections) + " projections, parts, " + std::to_string(kFields) +
                       "]");
    ffi::DataType type = ffi::DataType::INVALID;
    std::vector<const float *> singles;
    std::vector<const uint16_t *> halves;
    for (int64_t i = 0; i < num_slots * projections; i++) {
        const auto array = arrays.get<ffi::AnyBuffer>(i);
        if (array.has_error()) return array.error();
        if (i == 0) type = array->element_type();
        const bool last = i % projections == projections - 1;
        if (!is_packed(*array, type, last ? N : I, last ? I : K))
            return invalid("slot " + std::to_string(i / projections) + ", projection " +
                           std::to_string(i % projections) + " is " + shape_of(*array) + ", " +
                           expected(last ? N : I, last ? I : K));
        if (type == ffi::F32)
            singles.push_back(array->typed_data<float>());
        else
            halves.push_back(array->reinterpret_data<uint16_t>());
    }
    const Work work = share_out(slots.typed_data(), T, num_slots, table ? table->dimensions()[0] : num_slots);
    if (static_cast<int64_t>(work.order.size()) < T) std::memset(y->typed_data(), 0, y->size_bytes());
    if (work.groups.empty() || N == 0) return ffi::Error::Success();
    Residuals found;
    if (table) {
        const std::string wrong = find_residuals(*words, *table, work.groups, T, K, I, N, projections, found);
        if (!wrong.empty()) return invalid(wrong);
    }
    const Residuals *residuals = table ? &found : nullptr;
    float *scratch = inner->typed_data();
    if (type == ffi::F32)
        experts_of<float>(pool, threads, activation, gated, x, work, singles, I, *y, scratch, residuals);
    else
        experts_of<uint16_t>(pool, threads, activation, gated, x, work, halves, I, *y, scratch, residuals);
    return ffi::Error::Success();
}

ffi::Error experts(ffi::ThreadPool pool, int64_t threads, int64_t activation, bool gated, int64_t I, Matrix x,
                   Slots slots, ffi::RemainingArgs arrays, ffi::Result<Matrix> y, ffi::Result<Scratch> inner) {
    return compute(pool, threads, activation, gated, I, x, slots, nullptr, nullptr, arrays, y, inner);
}

ffi::Error experts_with_residuals(ffi::ThreadPool pool, int64_t threads, int64_t activation, bool gated, int64_t I,
                                  Matrix x, Slots slots, Words words, Table table, ffi::RemainingArgs arrays,
                                  ffi::Result<Matrix> y, ffi::Result<Scratch> inner) {
    return compute(pool, threads, activation, gated, I, x, slots, &words, &table, arrays, y, inner);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(moetel_linear, linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Arg<Matrix>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<Matrix>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(moetel_experts, experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Attr<int64_t>("activation")
                                  .Attr<bool>("gated")
                                  .Attr<int64_t>("intermediate_size")
                                  .Arg<Matrix>()
                                  .Arg<Slots>()
                                  .RemainingArgs()
                                  .Ret<Matrix>()
                                  .Ret<Scratch>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(moetel_experts_with_residuals, experts_with_residuals,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Attr<int64_t>("activation")
                                  .Attr<bool>("gated")
                                  .Attr<int64_t>("intermediate_size")
                                  .Arg<Matrix>()
                                  .Arg<Slots>()
                                  .Arg<Words>()
                                  .Arg<Table>()
                                  .RemainingArgs()
                                  .Ret<Matrix>()
                                  .Ret<Scratch>());
