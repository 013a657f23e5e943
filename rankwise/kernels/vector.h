/* Sixteen lanes at a time: bfloat16 in memory, float32 in registers.
 *
 * Everything here needs AVX-512 with BF16; `rankwise_supported` (rowwise.c) asks the processor before any of it runs.
 * NaN must come through: x86 `max` and `min` return their SECOND operand when either is NaN, so the data always stands second.
 */
#ifndef RANKWISE_VECTOR_H
#define RANKWISE_VECTOR_H

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef int64_t i64;

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define LANES 16
#define ROUND_UP(x, m) (((x) + (m) - 1) / (m) * (m))

INLINE __m512 load(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

INLINE void store(bf16 *p, __m512 v) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v)); }

INLINE void store_zero(bf16 *p) { _mm256_storeu_si256((__m256i *)p, _mm256_setzero_si256()); }

INLINE __m512 all(float x) { return _mm512_set1_ps(x); }

/* The lanes of a row of n elements that exist from element i on, for the last, ragged vector. */
INLINE __mmask16 lanes_left(i64 i, i64 n) { return n - i >= LANES ? 0xffff : (__mmask16)((1u << (n - i)) - 1); }

INLINE __m512 load_some(const bf16 *p, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}

INLINE void store_some(bf16 *p, __m512 v, __mmask16 lanes) {
    _mm256_mask_storeu_epi16(p, lanes, (__m256i)_mm512_cvtneps_pbh(v));
}

/* e^x to two units in the last place, for -87 <= x <= 88.5 (clamped): x = n ln 2 + r with |r| <= ln 2 / 2, a degree-7 polynomial in r, then 2^n. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_min_ps(all(88.5f), _mm512_max_ps(all(-87.0f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, all(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, all(-2.12194440e-4f), r);
    __m512 p = all(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, all(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, all(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, all(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, all(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, all(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, all(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* 2^x to 3e-6, for what is rounded to bfloat16 at once: x = n + r with |r| <= 1/2, a degree-4 polynomial in r (fitted to the
 * least largest error, exact at 0), then 2^n.  Underflows to 0. */
INLINE __m512 power_of_two(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_fmadd_ps(all(9.5828297e-3f), r, all(5.5906400e-2f));
    p = _mm512_fmadd_ps(p, r, all(2.4024099e-1f));
    p = _mm512_fmadd_ps(p, r, all(6.9312418e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, all(1.0f)), n);
}

INLINE __m512 sigmoid(__m512 x) {
    return _mm512_div_ps(all(1.0f), _mm512_add_ps(all(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

#endif
