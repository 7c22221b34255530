/* Sixteen float32 at a time: one register of AVX-512, or two of AVX2 with FMA and F16C. A kernel written with these
 * functions compiles for either. Another processor needs its own section here and nothing else.
 *
 * VECTOR_REGISTERS: values of type v16 that fit into registers, a few left for operands.
 * BF16_PRODUCTS: whether the processor multiplies pairs of bfloat16.
 */

#ifndef MOETEL_VECTORS_H
#define MOETEL_VECTORS_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512BF16__) && !defined(MOETEL_NO_BF16)
#define BF16_PRODUCTS 1
#else
#define BF16_PRODUCTS 0
#endif

#define ALWAYS static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__)

#define VECTOR_REGISTERS 24
typedef __m512 v16;

ALWAYS v16 v_zero(void) { return _mm512_setzero_ps(); }
ALWAYS v16 v_set1(float f) { return _mm512_set1_ps(f); }
ALWAYS v16 v_load(const float *from) { return _mm512_loadu_ps(from); }
ALWAYS void v_store(float *to, v16 v) { _mm512_storeu_ps(to, v); }
ALWAYS v16 v_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
ALWAYS v16 v_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
ALWAYS v16 v_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
ALWAYS v16 v_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
ALWAYS v16 v_min(v16 a, v16 b) { return _mm512_min_ps(a, b); }
ALWAYS v16 v_max(v16 a, v16 b) { return _mm512_max_ps(a, b); }
/* a * b + c, and c - a * b, rounded once. */
ALWAYS v16 v_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS v16 v_fnma(v16 a, v16 b, v16 c) { return _mm512_fnmadd_ps(a, b, c); }
ALWAYS v16 v_round(v16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
/* a * 2^n for whole n from -126 to 127. */
ALWAYS v16 v_scale(v16 a, v16 n) { return _mm512_scalef_ps(a, n); }
/* a, and 0 where a < 0; NaN stays. */
ALWAYS v16 v_relu(v16 a) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, v_zero(), _CMP_LT_OQ), a, v_zero());
}

/* The first `count` of 1 to 16 values, zeros behind. */
ALWAYS __mmask16 v_mask(int64_t count) { return count >= 16 ? (__mmask16)0xffff : (__mmask16)((1 << count) - 1); }
ALWAYS v16 v_load_some(const float *from, int64_t count) { return _mm512_maskz_loadu_ps(v_mask(count), from); }
ALWAYS void v_store_some(float *to, v16 v, int64_t count) { _mm512_mask_storeu_ps(to, v_mask(count), v); }

/* a + size where a bit is set, a - size elsewhere. */
ALWAYS v16 v_add_signed(v16 a, uint16_t bits, v16 size) {
    return _mm512_mask_add_ps(_mm512_sub_ps(a, size), (__mmask16)bits, a, size);
}

/* bfloat16 is the upper half of a float32. */
ALWAYS v16 v_load_bf16(const uint16_t *from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
/* The first or the second of each of 16 pairs of bfloat16. */
ALWAYS v16 v_load_pairs(const uint16_t *from, const int second) {
    const __m512i pairs = _mm512_loadu_si512(from);
    return _mm512_castsi512_ps(second ? _mm512_and_si512(pairs, _mm512_set1_epi32((int32_t)0xffff0000))
                                      : _mm512_slli_epi32(pairs, 16));
}

/* Sixteen numbers from codes of 2, 4 or 8 bits: a code less half of the largest one; and from float16. */
ALWAYS v16 v_codes2(const uint8_t *from) {
    uint32_t bits;
    memcpy(&bits, from, 4);
    /* Only the low 4 bits of a lane choose among 16 numbers; for 2-bit codes these repeat every 4. */
    const __m512i all = _mm512_srlv_epi32(_mm512_set1_epi32((int)bits), _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16,
                                                                                      14, 12, 10, 8, 6, 4, 2, 0));
    return _mm512_permutexvar_ps(all, _mm512_set_ps(1.5f, 0.5f, -0.5f, -1.5f, 1.5f, 0.5f, -0.5f, -1.5f, 1.5f, 0.5f,
                                                    -0.5f, -1.5f, 1.5f, 0.5f, -0.5f, -1.5f));
}
ALWAYS v16 v_codes4(const uint8_t *from) {
    uint32_t low, high;
    memcpy(&low, from, 4);
    memcpy(&high, from + 4, 4);
    __m512i all = _mm512_mask_set1_epi32(_mm512_set1_epi32((int)low), 0xff00, (int)high);
    all = _mm512_srlv_epi32(all, _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0));
    return _mm512_permutexvar_ps(all, _mm512_set_ps(7.5f, 6.5f, 5.5f, 4.5f, 3.5f, 2.5f, 1.5f, 0.5f, -0.5f, -1.5f,
                                                    -2.5f, -3.5f, -4.5f, -5.5f, -6.5f, -7.5f));
}
ALWAYS v16 v_codes8(const uint8_t *from) {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm512_sub_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(127.5f));
}
ALWAYS v16 v_load_f16(const uint8_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }

ALWAYS __m256 v_halves(v16 v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define VECTOR_REGISTERS 6
typedef struct {
    __m256 a, b; /* lanes 0 to 7, and 8 to 15 */
} v16;

ALWAYS v16 v_of(__m256 a, __m256 b) {
    v16 v;
    v.a = a, v.b = b;
    return v;
}
ALWAYS v16 v_zero(void) { return v_of(_mm256_setzero_ps(), _mm256_setzero_ps()); }
ALWAYS v16 v_set1(float f) { return v_of(_mm256_set1_ps(f), _mm256_set1_ps(f)); }
ALWAYS v16 v_load(const float *from) { return v_of(_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)); }
ALWAYS void v_store(float *to, v16 v) { _mm256_storeu_ps(to, v.a), _mm256_storeu_ps(to + 8, v.b); }
ALWAYS v16 v_add(v16 x, v16 y) { return v_of(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
ALWAYS v16 v_sub(v16 x, v16 y) { return v_of(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
ALWAYS v16 v_mul(v16 x, v16 y) { return v_of(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
ALWAYS v16 v_div(v16 x, v16 y) { return v_of(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
ALWAYS v16 v_min(v16 x, v16 y) { return v_of(_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
ALWAYS v16 v_max(v16 x, v16 y) { return v_of(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
ALWAYS v16 v_fma(v16 x, v16 y, v16 z) { return v_of(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)); }
ALWAYS v16 v_fnma(v16 x, v16 y, v16 z) {
    return v_of(_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b));
}
ALWAYS v16 v_round(v16 x) {
    return v_of(_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
ALWAYS __m256 v_power(__m256 n) { /* of two: n is put where a float32 keeps its exponent */
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
ALWAYS v16 v_scale(v16 x, v16 n) { return v_mul(x, v_of(v_power(n.a), v_power(n.b))); }
ALWAYS v16 v_relu(v16 x) {
    const __m256 zero = _mm256_setzero_ps();
    return v_of(_mm256_andnot_ps(_mm256_cmp_ps(x.a, zero, _CMP_LT_OQ), x.a),
                _mm256_andnot_ps(_mm256_cmp_ps(x.b, zero, _CMP_LT_OQ), x.b));
}

ALWAYS __m256i v_mask8(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
ALWAYS v16 v_load_some(const float *from, int64_t count) {
    if (count >= 16) return v_load(from);
    const __m256 low = _mm256_maskload_ps(from, v_mask8(count));
    return v_of(low, count > 8 ? _mm256_maskload_ps(from + 8, v_mask8(count - 8)) : _mm256_setzero_ps());
}
ALWAYS void v_store_some(float *to, v16 v, int64_t count) {
    if (count >= 16) {
        v_store(to, v);
        return;
    }
    _mm256_maskstore_ps(to, v_mask8(count), v.a);
    if (count > 8) _mm256_maskstore_ps(to + 8, v_mask8(count - 8), v.b);
}

/* All ones in the lanes whose bit is set, of 8. */
ALWAYS __m256 v_lanes(uint16_t bits) {
    const __m256i each = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), each), each));
}
ALWAYS v16 v_add_signed(v16 x, uint16_t bits, v16 size) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return v_add(x, v_of(_mm256_xor_ps(size.a, _mm256_andnot_ps(v_lanes(bits), sign)),
                         _mm256_xor_ps(size.b, _mm256_andnot_ps(v_lanes(bits >> 8), sign))));
}

ALWAYS __m256 v_widen8(const uint16_t *from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
ALWAYS v16 v_load_bf16(const uint16_t *from) { return v_of(v_widen8(from), v_widen8(from + 8)); }
ALWAYS __m256 v_pairs8(const uint16_t *from, const int second) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)from);
    return _mm256_castsi256_ps(second ? _mm256_and_si256(pairs, _mm256_set1_epi32((int32_t)0xffff0000))
                                      : _mm256_slli_epi32(pairs, 16));
}
ALWAYS v16 v_load_pairs(const uint16_t *from, const int second) {
    return v_of(v_pairs8(from, second), v_pairs8(from + 16, second));
}

ALWAYS v16 v_less(__m256i a, __m256i b, float less) {
    return v_sub(v_of(_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)), v_set1(less));
}
ALWAYS v16 v_codes2(const uint8_t *from) {
    uint32_t bits;
    memcpy(&bits, from, 4);
    const __m256i all = _mm256_set1_epi32((int)bits), three = _mm256_set1_epi32(3);
    const __m256i low = _mm256_srlv_epi32(all, _mm256_set_epi32(14, 12, 10, 8, 6, 4, 2, 0));
    const __m256i high = _mm256_srlv_epi32(all, _mm256_set_epi32(30, 28, 26, 24, 22, 20, 18, 16));
    return v_less(_mm256_and_si256(low, three), _mm256_and_si256(high, three), 1.5f);
}
ALWAYS v16 v_codes4(const uint8_t *from) {
    uint32_t low, high;
    memcpy(&low, from, 4);
    memcpy(&high, from + 4, 4);
    const __m256i shifts = _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0), fifteen = _mm256_set1_epi32(15);
    return v_less(_mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)low), shifts), fifteen),
                  _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)high), shifts), fifteen), 7.5f);
}
ALWAYS v16 v_codes8(const uint8_t *from) {
    return v_less(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)),
                  _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8))), 127.5f);
}
ALWAYS v16 v_load_f16(const uint8_t *from) {
    return v_of(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 16))));
}

ALWAYS __m256 v_halves(v16 v) { return _mm256_add_ps(v.a, v.b); }

#else
#error "the kernels need AVX-512F and BW, or AVX2 with FMA and F16C"
#endif

/* The sums of four vectors. Each is summed in the same order wherever it stands. */
ALWAYS void v_sums(v16 a, v16 b, v16 c, v16 d, float sums[4]) {
    const __m256 p = v_halves(a), q = v_halves(b), r = v_halves(c), s = v_halves(d);
    const __m256 pq = _mm256_add_ps(_mm256_unpacklo_ps(p, q), _mm256_unpackhi_ps(p, q));
    const __m256 rs = _mm256_add_ps(_mm256_unpacklo_ps(r, s), _mm256_unpackhi_ps(r, s));
    const __m256 low = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(pq), _mm256_castps_pd(rs)));
    const __m256 high = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(pq), _mm256_castps_pd(rs)));
    const __m256 four = _mm256_add_ps(low, high);
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
}

/* The sum of one. */
ALWAYS float v_sum(v16 v) {
    const __m256 eight = v_halves(v);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* Keeps a value in a register: gcc would read it from memory again for each use, which takes an AVX2 product half of its
 * rate. */
#if VECTOR_REGISTERS >= 16
ALWAYS void v_keep(v16 &v) { asm("" : "+v"(v)); }
#else
ALWAYS void v_keep(v16 &v) { asm("" : "+x"(v.a), "+x"(v.b)); }
#endif

/* e^x to about one unit in the last place: 2^n times a Taylor polynomial on |r| <= ln(2) / 2. */
ALWAYS v16 v_exp(v16 x) {
    x = v_min(v_max(x, v_set1(-87.3f)), v_set1(88.3f)); /* so that 2^n is a float32 */
    const v16 n = v_round(v_mul(x, v_set1(1.44269504f)));
    v16 r = v_fnma(n, v_set1(0.693359375f), x); /* ln(2) in two parts: the first is exact */
    r = v_fnma(n, v_set1(-2.12194440e-4f), r);
    v16 p = v_fma(v_set1(1.0f / 5040.0f), r, v_set1(1.0f / 720.0f));
    p = v_fma(p, r, v_set1(1.0f / 120.0f));
    p = v_fma(p, r, v_set1(1.0f / 24.0f));
    p = v_fma(p, r, v_set1(1.0f / 6.0f));
    p = v_fma(p, r, v_set1(0.5f));
    p = v_fma(p, r, v_set1(1.0f));
    p = v_fma(p, r, v_set1(1.0f));
    return v_scale(p, n);
}

/* x / (1 + e^-x) */
ALWAYS v16 v_silu(v16 x) { return v_div(x, v_add(v_set1(1.0f), v_exp(v_sub(v_zero(), x)))); }

#endif
