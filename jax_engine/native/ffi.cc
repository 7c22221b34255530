// The kernels as XLA calls them on the CPU, through its foreign function interface, with XLA's own threads.
//
// Letters: T rows of a call, K inputs, N outputs, I inner size, S slots.

#include <string>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using Matrix = ffi::Buffer<ffi::F32, 2>;
using Slots = ffi::Buffer<ffi::S32, 1>;
using Words = ffi::Buffer<ffi::U32, 1>;
using Table = ffi::Buffer<ffi::S32, 4>;

constexpr int64_t kFields = 6;  // of a part in a table

ffi::Error invalid(const std::string &message) { return ffi::Error::InvalidArgument("moetel kernels: " + message); }

template <typename Buffer>
std::string shape_of(const Buffer &buffer) {
    std::string text = "[";
    for (const int64_t size : buffer.dimensions()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

void schedule(void *pool, int64_t threads, void (*body)(void *state, int64_t rank), void *state) {
    auto *workers = static_cast<ffi::ThreadPool *>(pool);
    for (int64_t rank = 1; rank < threads; rank++) workers->Schedule([=] { body(state, rank); });
    body(state, 0);
}

// limit: at most so many, 0 for all that the pool has.
moetel_threads threads_of(ffi::ThreadPool &pool, int64_t limit) {
    return {schedule, &pool, limit > 0 ? limit : static_cast<int64_t>(pool.num_threads())};
}

int64_t kind_of(ffi::DataType type) { return type == ffi::BF16 ? MOETEL_BF16 : MOETEL_F32; }

// Empty, or what is wrong with a packed weight [N, K].
std::string wrong_shape(const ffi::AnyBuffer &weight, ffi::DataType type, int64_t N, int64_t K) {
    const int64_t lanes = type == ffi::BF16 ? 2 : 1, blocks = (N + 63) / 64, steps = (K + lanes - 1) / lanes;
    const auto sizes = weight.dimensions();
    if ((type == ffi::F32 || type == ffi::BF16) && weight.element_type() == type && sizes.size() == 3 &&
        sizes[0] == blocks && sizes[1] == steps && sizes[2] == 64 * lanes && K > 0)
        return "";
    return shape_of(weight) + ", expected [" + std::to_string(blocks) + ", " + std::to_string(steps) + ", " +
           std::to_string(64 * lanes) + "], all float32 or all bfloat16";
}

// y[T][N] = x[T][K] w[N][K]^T
ffi::Error linear(ffi::ThreadPool pool, int64_t limit, Matrix x, ffi::AnyBuffer packed, ffi::Result<Matrix> y) {
    const int64_t T = x.dimensions()[0], K = x.dimensions()[1], N = y->dimensions()[1], starts[2] = {0, T};
    if (y->dimensions()[0] != T) return invalid("x and the result differ in rows");
    const std::string wrong = wrong_shape(packed, packed.element_type(), N, K);
    if (!wrong.empty()) return invalid("packed weight is " + wrong);
    const moetel_threads threads = threads_of(pool, limit);
    const void *weight = packed.untyped_data();
    moetel_linears(&threads, MOETEL_F32, kind_of(packed.element_type()), x.typed_data(), K, 1, &weight, N, starts,
                   y->typed_data());
    return ffi::Error::Success();
}

// y[t] = feed-forward of slot slots[t], zeros where that is no slot. arrays: the packed projections of slot 0, of slot
// 1, ... inner: scratch. words, table: residuals, or null. The table has S rows for each of one or several tenants; then
// slots[t] is a row of it, and stands for slot slots[t] % S.
ffi::Error compute(ffi::ThreadPool &pool, int64_t limit, int64_t activation, bool gated, int64_t I, const Matrix &x,
                   const Slots &slots, const Words *words, const Table *table, const ffi::RemainingArgs &arrays,
                   ffi::Result<Matrix> &y, ffi::Result<Matrix> &inner) {
    const int64_t T = x.dimensions()[0], K = x.dimensions()[1], N = y->dimensions()[1], projections = gated ? 3 : 2;
    const int64_t given = static_cast<int64_t>(arrays.size()), num_slots = given / projections;
    if (slots.dimensions()[0] != T || y->dimensions()[0] != T) return invalid("x, slots and the result differ in rows");
    if (static_cast<int64_t>(inner->element_count()) < T * I)
        return invalid("scratch is too small: " + std::to_string(inner->element_count()) + " numbers");
    if (num_slots == 0 || given % projections != 0)
        return invalid(std::to_string(given) + " arrays in the pool, expected a multiple of " +
                       std::to_string(projections));
    if (activation < MOETEL_RELU || activation > MOETEL_SILU)
        return invalid("no activation " + std::to_string(activation));
    const auto sizes = table ? table->dimensions() : x.dimensions();
    if (table && (sizes[0] < num_slots || sizes[0] % num_slots || sizes[1] != projections || sizes[3] != kFields))
        return invalid("the residuals' table is " + shape_of(*table) + ", expected [a multiple of " +
                       std::to_string(num_slots) + " slots, " + std::to_string(projections) + " projections, parts, " +
                       std::to_string(kFields) + "]");
    ffi::DataType type = ffi::DataType::INVALID;
    std::vector<const void *> weights;
    for (int64_t i = 0; i < given; i++) {
        const auto array = arrays.get<ffi::AnyBuffer>(i);
        if (array.has_error()) return array.error();
        if (i == 0) type = array->element_type();
        const bool last = i % projections == projections - 1;
        const std::string wrong = wrong_shape(*array, type, last ? N : I, last ? I : K);
        if (!wrong.empty())
            return invalid("slot " + std::to_string(i / projections) + ", projection " +
                           std::to_string(i % projections) + " is " + wrong);
        weights.push_back(array->untyped_data());
    }
    moetel_experts_call call = {};
    call.x_type = MOETEL_F32, call.w_type = kind_of(type), call.activation = activation, call.gated = gated;
    call.tokens = T, call.top_k = 1, call.inputs = K, call.inner = I, call.outputs = N;
    call.slots = num_slots, call.numbers = table ? sizes[0] : num_slots;
    call.x = x.typed_data(), call.chosen = slots.typed_data(), call.weights = weights.data();
    call.y = y->typed_data(), call.scratch = inner->typed_data();
    if (table) {
        call.table = table->typed_data(), call.parts = sizes[2];
        call.records = reinterpret_cast<const uint8_t *>(words->typed_data());
        call.words = static_cast<int64_t>(words->element_count());
    }
    const moetel_threads threads = threads_of(pool, limit);
    int32_t bad[kFields];
    if (moetel_experts(&threads, &call, bad) == 0) return ffi::Error::Success();
    std::string text;
    for (const int32_t number : bad) text += (text.empty() ? "[" : ", ") + std::to_string(number);
    return invalid("a residual's table has the part " + text + "], which is none, or lies outside the records");
}

ffi::Error experts(ffi::ThreadPool pool, int64_t limit, int64_t activation, bool gated, int64_t I, Matrix x,
                   Slots slots, ffi::RemainingArgs arrays, ffi::Result<Matrix> y, ffi::Result<Matrix> inner) {
    return compute(pool, limit, activation, gated, I, x, slots, nullptr, nullptr, arrays, y, inner);
}

ffi::Error experts_with_residuals(ffi::ThreadPool pool, int64_t limit, int64_t activation, bool gated, int64_t I,
                                  Matrix x, Slots slots, Words words, Table table, ffi::RemainingArgs arrays,
                                  ffi::Result<Matrix> y, ffi::Result<Matrix> inner) {
    return compute(pool, limit, activation, gated, I, x, slots, &words, &table, arrays, y, inner);
}

auto bound() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("threads"); }

auto bound_to_experts() {
    return bound()
        .Attr<int64_t>("activation")
        .Attr<bool>("gated")
        .Attr<int64_t>("intermediate_size")
        .Arg<Matrix>()
        .Arg<Slots>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(moetel_ffi_linear, linear, bound().Arg<Matrix>().Arg<ffi::AnyBuffer>().Ret<Matrix>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(moetel_ffi_experts, experts,
                              bound_to_experts().RemainingArgs().Ret<Matrix>().Ret<Matrix>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(moetel_ffi_experts_with_residuals, experts_with_residuals,
                              bound_to_experts().Arg<Words>().Arg<Table>().RemainingArgs().Ret<Matrix>().Ret<Matrix>());
