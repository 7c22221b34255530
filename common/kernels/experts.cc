// Products with whole matrices, and a whole layer of experts in one call.
//
// Letters: T tokens, M rows, K inputs, I inner size, N outputs.

#include <cmath>

#include "layer_residuals.h"
#include "threads.h"

namespace moetel {

namespace {

inline v16 activate(v16 v, int64_t kind) {
    if (kind == MOETEL_RELU) return v_relu(v);
    if (kind == MOETEL_GELU_ERF) {
        float lane[16];
        v_store(lane, v);
        for (float &u : lane) u = 0.5f * u * (1.0f + std::erf(u * 0.70710678f));
        return v_load(lane);
    }
    if (kind == MOETEL_SILU) return v_silu(v);
    // (1 + tanh(u)) / 2 = 1 / (1 + e^(-2u)), so this is v times a sigmoid.
    const v16 cubic = v_fma(v_mul(v, v), v_set1(0.044715f), v_set1(1.0f));
    const v16 u = v_mul(v_mul(v, cubic), v_set1(1.59576912f));
    return v_div(v, v_add(v_set1(1.0f), v_exp(v_sub(v_zero(), u))));
}

template <typename X>
void store_row(X *to, const float *from, int64_t count) {
    for (int64_t n = 0; n < count; n++) to[n] = narrowed<X>(from[n]);
}

// Calls f(zero of x's type, zero of the weights').
template <typename F>
void with_types(int64_t x_type, int64_t w_type, const F &f) {
    if (x_type == MOETEL_BF16)
        f(bf16{}, bf16{});
    else if (w_type == MOETEL_BF16)
        f(float{}, bf16{});
    else
        f(float{}, float{});
}

template <typename X, typename W>
void linears(const moetel_threads &threads, const X *x, int64_t K, int64_t groups, const void *const *w, int64_t N,
             const int64_t *starts, X *y) {
    const int64_t blocks = blocks_of(N);
    std::vector<Group> chunks;  // slot: the matrix
    for (int64_t g = 0; g < groups; g++) {
        const int64_t count = starts[g + 1] - starts[g], chunk = chunk_of(count);
        for (int64_t row = starts[g]; row < starts[g + 1]; row += chunk)
            chunks.push_back({g, 0, row, std::min(chunk, starts[g + 1] - row), 0});
    }
    // The chunks of a matrix meet a block one after the other.
    const int64_t number = static_cast<int64_t>(chunks.size());
    std::vector<int64_t> before(number), of_matrix(number);
    for (int64_t c = 0; c < number; c++) before[c] = c && chunks[c].slot == chunks[c - 1].slot ? before[c - 1] : c;
    for (int64_t c = number; c-- > 0;)
        of_matrix[c] = c + 1 < number && before[c + 1] == before[c] ? of_matrix[c + 1] : c + 1 - before[c];
    run(threads, starts[groups] * K * N, {number * blocks}, [&](int, int64_t item) {
        const int64_t from = before[item / blocks], within = item - from * blocks;
        const int64_t b = within / of_matrix[from];
        const Group &chunk = chunks[from + within % of_matrix[from]];
        const W *block = static_cast<const W *>(w[chunk.slot]) + b * block_size<W>(K);
        const Rows<const X> rows = Rows<const X>{x, K}.from(chunk.first);
        X *to = y + chunk.first * N + b * kBlock;
        if constexpr (std::is_same_v<X, float>) {
            product<X, W>(rows, {to, N}, chunk.count, block, K, N, b);
        } else {
            alignas(64) float sums[kChunk][kBlock];
            product<X, W>(rows, {sums[0], kBlock}, chunk.count, block, K, N, b);
            for (int64_t m = 0; m < chunk.count; m++)
                store_row(to + m * N, sums[m], std::min(kBlock, N - b * kBlock));
        }
    });
}

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
    std::vector<int32_t> row_of;    // of each choice, -1 where it is no expert
    std::vector<int32_t> token_of;  // of each row

    // The rows of each number that is chosen, in the order of slots: number v stands for slot v % S.
    explicit Work(const moetel_experts_call &call) : row_of(call.tokens * call.top_k, -1) {
        const int64_t S = call.slots, V = call.numbers, choices = call.tokens * call.top_k;
        const auto place_of = [&](int64_t v) { return v % S * (V / S) + v / S; };
        const auto is_number = [&](int64_t c) { return call.chosen[c] >= 0 && call.chosen[c] < V; };
        std::vector<int32_t> starts(V + 1, 0);
        for (int64_t c = 0; c < choices; c++)
            if (is_number(c)) starts[place_of(call.chosen[c]) + 1]++;
        for (int64_t place = 0; place < V; place++) {
            const int64_t count = starts[place + 1], slot = place / (V / S);
            if (count > 0) {
                const int64_t chunk = chunk_of(count), group = static_cast<int64_t>(groups.size());
                if (hits.empty() || hits.back().slot != slot)
                    hits.push_back({slot, 0, static_cast<int64_t>(chunks.size())});
                groups.push_back({slot, place % (V / S) * S + slot, starts[place], count, chunk});
                for (int64_t offset = 0; offset < count; offset += chunk, hits.back().chunks++)
                    chunks.push_back({group, starts[place] + offset, std::min(chunk, count - offset)});
            }
            starts[place + 1] += starts[place];
        }
        token_of.resize(starts[V]);
        for (int64_t c = 0; c < choices; c++) {
            if (!is_number(c)) continue;
            row_of[c] = starts[place_of(call.chosen[c])]++;
            token_of[row_of[c]] = static_cast<int32_t>(c / call.top_k);
        }
    }

    // The hit, block of outputs and chunk of a work item, when each chunk meets `blocks` blocks.
    struct Item {
        const Hit &hit;
        int64_t b;
        const Chunk &chunk;
    };
    Item item(int64_t number, int64_t blocks) const {
        const auto after = std::upper_bound(hits.begin(), hits.end(), number, [&](int64_t value, const Hit &hit) {
            return value < hit.chunks_before * blocks;
        });
        const Hit &hit = *(after - 1);
        number -= hit.chunks_before * blocks;
        return {hit, number / hit.chunks, chunks[hit.chunks_before + number % hit.chunks]};
    }
};

// y[t] = the sum of its rows, each times its gate, for one token.
template <typename X>
void combine(const moetel_experts_call &call, const Work &work, const float *partial, int64_t t) {
    X *to = static_cast<X *>(call.y) + t * call.outputs;
    for (int64_t n = 0; n < call.outputs; n += 16) {
        const int64_t count = std::min<int64_t>(16, call.outputs - n);
        v16 sum = v_zero();
        for (int64_t c = t * call.top_k; c < (t + 1) * call.top_k; c++) {
            if (work.row_of[c] < 0) continue;
            const v16 found = v_load_some(partial + work.row_of[c] * call.outputs + n, count);
            sum = v_fma(v_set1(call.gates ? call.gates[c] : 1.0f), found, sum);
        }
        float values[16];
        v_store(values, sum);
        store_row(to + n, values, count);
    }
}

template <typename X, typename W>
int experts(const moetel_threads &threads, const moetel_experts_call &call, int32_t bad[6]) {
    const int64_t K = call.inputs, I = call.inner, N = call.outputs, matrices = call.gated ? 3 : 2;
    const Work work(call);
    LayerResiduals residuals;
    if (!residuals.find(call, work.groups, bad)) return 1;
    const int64_t num_rows = static_cast<int64_t>(work.token_of.size());
    const int64_t chunks = static_cast<int64_t>(work.chunks.size()), blocks[2] = {blocks_of(I), blocks_of(N)};
    X *inner = static_cast<X *>(call.scratch);
    float *partial = reinterpret_cast<float *>(inner + call.tokens * call.top_k * I);
    const Rows<const X> in = {static_cast<const X *>(call.x), K, work.token_of.data()}, hidden = {inner, I};
    Rows<float> out = {partial, N};
    bool combines = true;
    if constexpr (std::is_same_v<X, float>)
        if (call.top_k == 1 && !call.gates) {  // each row is its token's answer
            out = {static_cast<float *>(call.y), N, work.token_of.data()};
            combines = false;
            if (num_rows < call.tokens) std::memset(call.y, 0, static_cast<size_t>(call.tokens * N) * sizeof(float));
        }
    const int64_t multiplications = num_rows * I * (K * (matrices - 1) + N) + residuals.multiplications;
    const auto block_of = [&](const Hit &hit, int64_t p, int64_t b, int64_t inputs) {
        return static_cast<const W *>(call.weights[hit.slot * matrices + p]) + b * block_size<W>(inputs);
    };
    const auto up_side = [&](int64_t number) {
        const Work::Item item = work.item(number, blocks[0]);
        const Chunk &chunk = item.chunk;
        const int64_t left = std::min(kBlock, I - item.b * kBlock);
        alignas(64) float sums[2][kChunk][kBlock];
        for (int64_t p = 0; p < matrices - 1; p++)
            residuals.product_with<X, W>(chunk.group, p, 0, in.from(chunk.first), {sums[p][0], kBlock}, chunk.first,
                                         chunk.count, block_of(item.hit, p, item.b, K), K, I, item.b);
        for (int64_t m = 0; m < chunk.count; m++) {
            for (int64_t n = 0; n < left; n += 16) {
                v16 value = activate(v_load_some(sums[0][m] + n, left - n), call.activation);
                if (call.gated) value = v_mul(value, v_load_some(sums[1][m] + n, left - n));
                v_store(sums[0][m] + n, value);
            }
            store_row(inner + (chunk.first + m) * I + item.b * kBlock, sums[0][m], left);
        }
    };
    const auto down_side = [&](int64_t number) {
        const Work::Item item = work.item(number, blocks[1]);
        const Chunk &chunk = item.chunk;
        residuals.product_with<X, W>(chunk.group, matrices - 1, 1, hidden.from(chunk.first),
                                     out.from(chunk.first, item.b * kBlock), chunk.first, chunk.count,
                                     block_of(item.hit, matrices - 1, item.b, I), I, N, item.b);
    };
    // The first step of a side's residuals comes before its products.
    run(threads, multiplications,
        {static_cast<int64_t>(residuals.pieces[0].size()), chunks * blocks[0],
         static_cast<int64_t>(residuals.pieces[1].size()), chunks * blocks[1], combines ? call.tokens : 0},
        [&](int phase, int64_t item) {
            switch (phase) {
                case 0: return residuals.first(0, residuals.pieces[0][item], in);
                case 1: return up_side(item);
                case 2: return residuals.first(1, residuals.pieces[1][item], hidden);
                case 3: return down_side(item);
                default: return combine<X>(call, work, partial, item);
            }
        });
    return 0;
}

}  // namespace

}  // namespace moetel

using namespace moetel;

extern "C" void moetel_linears(const moetel_threads *threads, int64_t x_type, int64_t w_type, const void *x, int64_t K,
                               int64_t groups, const void *const *w, int64_t N, const int64_t *starts, void *y) {
    with_types(x_type, w_type, [&](auto x_zero, auto w_zero) {
        using X = decltype(x_zero);
        linears<X, decltype(w_zero)>(*threads, static_cast<const X *>(x), K, groups, w, N, starts, static_cast<X *>(y));
    });
}

extern "C" int moetel_experts(const moetel_threads *threads, const moetel_experts_call *call, int32_t bad[6]) {
    int found = 0;
    with_types(call->x_type, call->w_type, [&](auto x, auto w) {
        found = experts<decltype(x), decltype(w)>(*threads, *call, bad);
    });
    return found;
}
