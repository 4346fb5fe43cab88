/* The vocabulary of the kernels: one vector of floats as wide as the machine's registers, and bfloat16 beside it.
 *
 * Everything is written with the vector extensions of gcc and clang; intrinsics appear only where the extensions
 * cannot say it: fused multiply-add, sums across lanes, and AVX512-BF16. Nothing is contracted by the compiler
 * (-ffp-contract=off), so that equal expressions give equal bits wherever they are inlined.
 */
#ifndef MOESERVE_SIMD_H
#define MOESERVE_SIMD_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LANES 16
#define USE_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define USE_AVX2 1
#else
#define LANES 4
#endif
#if defined(USE_AVX512) && defined(__AVX512BF16__)
#define USE_AVX512_BF16 1
#endif

#define INLINE static inline __attribute__((always_inline, unused))

typedef uint16_t bf16;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

INLINE long min_long(long a, long b) { return a < b ? a : b; }
INLINE long max_long(long a, long b) { return a > b ? a : b; }
INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

INLINE vf max_vf(vf a, vf b) { return choose(a > b, a, b); }

/* a * b + c, rounded once where the machine can. */
INLINE vf fma_vf(vf a, vf b, vf c) {
#if defined(USE_AVX512)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(USE_AVX2)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* Sums of the lanes of four vectors. The order of the additions is fixed, here and in sum_lanes_16: every dot product
 * ends in one of the two. */
#if defined(USE_AVX512)
/* Four vectors into one whose every quarter holds a part of (a, b, c, d): lanes 0 + 2, then with 1 + 3. */
INLINE __m512 sum_quarters(const vf v[4]) {
    __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    return _mm512_add_ps((__m512)low, (__m512)high);
}

INLINE void sum_lanes_4(const vf v[4], float out[4]) {
    __m512 quarters = sum_quarters(v);
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

/* Four rows of four at once: half the shuffles. */
INLINE void sum_lanes_16(const vf v[4][4], float *out, long stride) {
    __m512 a = sum_quarters(v[0]), b = sum_quarters(v[1]), c = sum_quarters(v[2]), d = sum_quarters(v[3]);
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    _mm_storeu_ps(out, _mm512_castps512_ps128(all));
    _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(all, 1));
    _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(all, 2));
    _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(all, 3));
}
#else
INLINE void sum_lanes_4(const vf v[4], float out[4]) {
#if defined(USE_AVX2)
    __m256 ab = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]), cd = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
    __m256 pairs = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    for (int i = 0; i < 4; i++) out[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
#endif
}

INLINE void sum_lanes_16(const vf v[4][4], float *out, long stride) {
    for (int r = 0; r < 4; r++) sum_lanes_4(v[r], out + r * stride);
}
#endif

INLINE float sum_lanes(vf v) {
    vf four[4] = {v};
    float out[4];
    sum_lanes_4(four, out);
    return out[0];
}

INLINE float max_lanes(vf v) {
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
}

/* exp to about one unit in the last place (Cephes' polynomial); exactly 0 below the smallest normal float, infinite
 * above the largest. */
INLINE vf exp_vf(vf x) {
    const vf lowest = splat(-87.3365f), highest = splat(88.3762626f), magic = splat(12582912.0f);
    vi tiny = x < lowest, huge = x > highest;
    x = choose(huge, highest, choose(tiny, lowest, x));
    vf n = fma_vf(x, splat(1.44269504088896341f), magic) - magic;  /* adding 1.5 * 2^23 rounds to an integer */
    vf r = fma_vf(n, splat(-0.693359375f), x);
    r = fma_vf(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma_vf(p, r, splat(1.3981999507e-3f));
    p = fma_vf(p, r, splat(8.3334519073e-3f));
    p = fma_vf(p, r, splat(4.1665795894e-2f));
    p = fma_vf(p, r, splat(1.6666665459e-1f));
    p = fma_vf(p, r, splat(5.0000001201e-1f));
    p = fma_vf(p, r * r, r) + 1.0f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    return choose(tiny, splat(0), choose(huge, splat(__builtin_inff()), p * (vf)power));
}

INLINE vf silu_vf(vf x) { return x / (1.0f + exp_vf(-x)); }

/* Loads and stores of LANES elements, or of the first n of them (the rest read as zero, and are not written). */

INLINE vf load_f32(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_f32(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf widen_bf16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

INLINE vf load_bf16(const bf16 *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return widen_bf16(h);
}

INLINE vh narrow_bf16(vf v) {
#if defined(USE_AVX512_BF16)
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  /* to nearest, ties to even */
    vi is_nan = v != v;
    return __builtin_convertvector((rounded & ~(vu)is_nan) | ((vu)is_nan & 0x7fc0), vh);
#endif
}

INLINE void store_bf16(bf16 *p, vf v) {
    vh h = narrow_bf16(v);
    memcpy(p, &h, sizeof h);
}

INLINE vf load_n_f32(const float *p, long n) {
    if (n >= LANES) return load_f32(p);
    vf v = {0};
    memcpy(&v, p, (size_t)n * sizeof *p);
    return v;
}

INLINE void store_n_f32(float *p, vf v, long n) {
    if (n >= LANES)
        store_f32(p, v);
    else
        memcpy(p, &v, (size_t)n * sizeof *p);
}

INLINE vf load_n_bf16(const bf16 *p, long n) {
    if (n >= LANES) return load_bf16(p);
    vh h = {0};
    memcpy(&h, p, (size_t)n * sizeof *p);
    return widen_bf16(h);
}

INLINE void store_n_bf16(bf16 *p, vf v, long n) {
    vh h = narrow_bf16(v);
    if (n >= LANES)
        memcpy(p, &h, sizeof h);
    else
        memcpy(p, &h, (size_t)n * sizeof *p);
}

/* The value that v has once stored in the type: identity, or rounding to bfloat16. */
INLINE vf round_f32(vf v) { return v; }
INLINE vf round_bf16(vf v) { return widen_bf16(narrow_bf16(v)); }

#endif
