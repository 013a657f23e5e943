/* What the products of training are made of: right sides in words of 32 bits, left sides as they lie, float32 sums.
 *
 * There are two kinds of words, and what includes this file is compiled once for each:
 *   pairs  the numbers k and k+1 of the sum in bfloat16, as `vdpbf16ps` wants them
 *   wide   one number, widened to float32, for `vfmadd`; left sides are widened block by block
 * In the time of a `vfmadd`'s work `vdpbf16ps` does twice as much on AMD's processors, and half as much on Intel's
 * (docs/decisions/0014).
 *
 * Either way a right side of K by N is word [k / PAIR][n], and a left side's row is K numbers, PAIR to a word.  What is
 * rounded to bfloat16 is rounded on both.
 */
#ifndef RANKWISE_WORDS_H
#define RANKWISE_WORDS_H
#include "vector.h"

#ifdef WIDE
typedef float number;
#define WAY(name) name##_wide
#else
typedef bf16 number;
#define WAY(name) name##_pairs
#endif
enum { PAIR = 4 / sizeof(number) };

/* sums + right ∘ left, where left is one word at `at_`. */
INLINE __m512 multiply_add(__m512 sums, __m512i right, const void *at_) {
    int word;
    memcpy(&word, at_, 4);
    __m512i left = _mm512_set1_epi32(word);
#ifdef WIDE
    return _mm512_fmadd_ps(_mm512_castsi512_ps(right), _mm512_castsi512_ps(left), sums);
#else
    return _mm512_dpbf16_ps(sums, (__m512bh)right, (__m512bh)left);
#endif
}

/* Has denormal numbers counted as zeros, as `vdpbf16ps` has them of itself; `vfmadd` takes hundreds of cycles over one.
 * Returns what `_mm_setcsr` undoes it with. */
INLINE unsigned without_denormals(void) {
    unsigned before = _mm_getcsr();
#ifdef WIDE
    _mm_setcsr(before | _MM_FLUSH_ZERO_ON | 0x40 /* denormals are zeros */);
#endif
    return before;
}

/* Sixteen pairs (k, k+1), the second in the upper half, into rows of words that lie `step` apart. */
INLINE void put_pairs(uint32_t *out, i64 step, __m512i pairs) {
#ifdef WIDE
    _mm512_storeu_si512(out, _mm512_slli_epi32(pairs, 16));
    _mm512_storeu_si512(out + step, _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
#else
    (void)step;
    _mm512_storeu_si512(out, pairs);
#endif
}

/* Rounded to bfloat16. */
INLINE __m256i halved(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

/* Sixteen bfloat16 numbers into a left side. */
INLINE void put_some(number *to, __m256i x, __mmask16 some) {
#ifdef WIDE
    _mm512_mask_storeu_epi32(to, some, _mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
#else
    _mm256_mask_storeu_epi16(to, some, x);
#endif
}

/* And sixteen sums, rounded; or zeros. */
INLINE void put(number *to, __m512 x) { put_some(to, halved(x), 0xffff); }
INLINE void put_zero(number *to) { put_some(to, _mm256_setzero_si256(), 0xffff); }

/* A matrix whose rows may lie apart, and one that is a left side. */
typedef struct {
    const bf16 *data;
    i64 step; /* elements between rows */
} Rows;

typedef struct {
    const number *data;
    i64 step;
} Left;

/* Rows as a left side: where they lie, or widened to `room` [rows, columns]. */
static Left left_of(Rows x, i64 rows, i64 columns, number *room) {
#ifdef WIDE
    for (i64 n = 0; n < rows; n++)
        for (i64 c = 0; c < columns; c += LANES) {
            __mmask16 some = lanes_left(c, columns);
            put_some(room + n * columns + c, _mm256_maskz_loadu_epi16(some, x.data + n * x.step + c), some);
        }
    return (Left){room, columns};
#else
    (void)rows, (void)columns, (void)room;
    return (Left){x.data, x.step};
#endif
}

/* The next 2·LANES columns of the words of a left side's rows, as two right sides; `rows` are left, and so many columns.
 * Pairs are interleaved by quarters of a vector: first columns 0-3, 8-11, 16-19, 24-27, then those between. */
INLINE void words_across(Left x, i64 rows, i64 columns, __m512i right[2]) {
    __mmask32 some = columns >= 2 * LANES ? 0xffffffffu : (1u << columns) - 1;
#ifdef WIDE
    (void)rows;
    UNROLL for (int j = 0; j < 2; j++)
        right[j] = _mm512_maskz_loadu_epi32((__mmask16)(some >> LANES * j), x.data + LANES * j);
#else
    __m512i even = _mm512_maskz_loadu_epi16(some, x.data);
    __m512i odd = rows > 1 ? _mm512_maskz_loadu_epi16(some, x.data + x.step) : _mm512_setzero_si512();
    right[0] = _mm512_unpacklo_epi16(even, odd), right[1] = _mm512_unpackhi_epi16(even, odd);
#endif
}

/* Sums in the order in which `words_across` took their columns, back in their own. */
INLINE void put_straight(__m512 first, __m512 second, float *out) {
#ifdef WIDE
    _mm512_storeu_ps(out, first), _mm512_storeu_ps(out + LANES, second);
#else
    __m512i near = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    __m512i far = _mm512_add_epi32(near, _mm512_set1_epi32(8));
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(first, near, second));
    _mm512_storeu_ps(out + LANES, _mm512_permutex2var_ps(first, far, second));
#endif
}

#endif
