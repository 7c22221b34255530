// The residuals of a layer's experts, looked up in the table that says where their parts lie.

#ifndef MOETEL_LAYER_RESIDUALS_H
#define MOETEL_LAYER_RESIDUALS_H

#include <array>
#include <memory>
#include <vector>

#include "kernels.h"
#include "low_rank.h"

namespace moetel {

// Rows first .. first + count in the order of slots: those of one number.
struct Group {
    int64_t slot, number, first, count;
    int64_t chunk;  // rows of a work item
};

// What the groups' rows get beside their slots' weights, each at a side: 0 before the activation, 1 after the last
// product.
class LayerResiduals {
   public:
    static constexpr int64_t kFields = 6;  // packed_weights.py has the same

    // Of one matrix of one group. at: in each row's values of the first step, where a low-rank part's begin.
    struct Matrix {
        std::vector<Sign> signs;
        std::vector<LowRank> low_ranks;
        std::vector<int64_t> at;
    };
    // Some components of a low-rank part for some rows: a work item of the first step.
    struct Piece {
        LowRank part;
        int64_t at, begin, end, first, count;
    };

    // Looks up the parts of the groups. False if the table names one that is none or lies outside the records: it is
    // then in bad.
    bool find(const moetel_experts_call &call, const std::vector<Group> &groups, int32_t bad[6]) {
        if (!call.table) return true;
        const int64_t matrices = call.gated ? 3 : 2, bytes = 4 * call.words;
        int64_t rows = 0;
        for (const Group &group : groups) {
            auto &mine = matrices_.emplace_back();
            int64_t width[2] = {0, 0};
            for (int64_t p = 0; p < matrices; p++) {
                const int side = p == matrices - 1;
                const int64_t outputs = side ? call.outputs : call.inner, inputs = side ? call.inner : call.inputs;
                const int32_t *field = call.table + (group.number * matrices + p) * call.parts * kFields;
                for (int64_t i = 0; i < call.parts && field[0] != kNone; i++, field += kFields) {
                    const int64_t kind = field[0], bits = field[1], size = field[2], start = 4 * int64_t{field[3]};
                    std::memcpy(bad, field, kFields * sizeof *field);
                    if (size < 1 || start < 0 || start > bytes) return false;
                    const uint8_t *data = call.records + start;
                    if (kind == kSign && bits == 1) {
                        const Sign sign = {data, size, outputs};
                        if (sign.codes_at() + 8 * blocks_of(outputs) * inputs > bytes - start) return false;
                        mine[p].signs.push_back(sign);
                        multiplications += group.count * outputs * inputs;
                        continue;
                    }
                    if (kind != kLowRank || (bits != 2 && bits != 4 && bits != 8 && bits != 16 && bits != 32))
                        return false;
                    const int64_t v = 4 * int64_t{field[4]}, u = 4 * int64_t{field[5]};
                    const LowRank part = {data, call.records + v, call.records + u, bits, size, outputs, inputs};
                    if (v < 0 || u < 0 || 4 * size > bytes - start || size * row_bytes(inputs, bits) > bytes - v ||
                        size * row_bytes(outputs, bits) > bytes - u)
                        return false;
                    mine[p].low_ranks.push_back(part);
                    mine[p].at.push_back(width[side]);
                    for (int64_t begin = 0; begin < size; begin += kComponents)
                        for (int64_t offset = 0; offset < group.count; offset += group.chunk)
                            pieces[side].push_back({part, width[side], begin, std::min(size, begin + kComponents),
                                                    group.first + offset, std::min(group.chunk, group.count - offset)});
                    width[side] += size;
                    multiplications += group.count * size * (outputs + inputs);
                }
            }
            rows = group.first + group.count;
            for (int side = 0; side < 2; side++) stride_[side] = std::max(stride_[side], width[side]);
        }
        for (int side = 0; side < 2; side++) values_[side].reset(new float[rows * stride_[side]]);
        return true;
    }

    // A work item of a side's first step. x: of all rows.
    template <typename X>
    void first(int side, const Piece &piece, Rows<const X> x) const {
        float *t = values_[side].get() + piece.first * stride_[side] + piece.at;
        first_step(piece.part, x.from(piece.first), piece.count, piece.begin, piece.end, t, stride_[side]);
    }

    // y = x (w + R)^T for rows first .. of a group and outputs b * 64 .. of N: `product` with what a residual adds.
    template <typename X, typename W>
    void product_with(size_t group, int64_t p, int side, Rows<const X> x, Rows<float> y, int64_t first, int64_t count,
                      const W *block, int64_t K, int64_t N, int64_t b) const {
        const Matrix *more = matrices_.empty() ? nullptr : &matrices_[group][p];
        product<X, W>(x, y, count, block, K, N, b, more && !more->signs.empty() ? &more->signs[0] : nullptr);
        if (!more) return;
        for (size_t i = 1; i < more->signs.size(); i++)
            product<X, Zero>(x, y, count, nullptr, K, N, b, &more->signs[i], true);
        for (size_t i = 0; i < more->low_ranks.size(); i++)
            second_step(more->low_ranks[i], values_[side].get() + first * stride_[side] + more->at[i], stride_[side],
                        count, b * kBlock, std::min((b + 1) * kBlock, N), y);
    }

    std::vector<Piece> pieces[2];
    int64_t multiplications = 0;

   private:
    static constexpr int64_t kNone = 0, kSign = 1, kLowRank = 2;               // packed_weights.py has the same
    static constexpr int64_t kComponents = 16;                                 // of a work item of the first step

    std::vector<std::array<Matrix, 3>> matrices_;  // of each group
    int64_t stride_[2] = {0, 0};
    std::unique_ptr<float[]> values_[2];  // of the first step, of each row
};

}  // namespace moetel

#endif
