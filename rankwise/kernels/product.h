/* Small bfloat16 matrix products with float32 sums, for attention: blocks that live in the cache, called a million times.
 *
 * C[R, N] (+)= A[R, K] · B[K, N].  A is a left side, row-major, B a right side (words.h).  The two packings below make
 * such a B from a matrix X[T, D] of tokens:
 *   words_of_features  word [d / PAIR][t]: B = Xᵀ, products that sum over the features
 *   words_of_tokens    word [t / PAIR][d]: B = X,  products that sum over the tokens
 */
#ifndef RANKWISE_PRODUCT_H
#define RANKWISE_PRODUCT_H
#include "words.h"

/* One register tile, R rows by V vectors: 6 x 4 = 24 sums, 4 of B and a broadcast of A fill the 32 registers. */
#define TILE(R, V)                                                                                                     \
    static __attribute__((noinline)) void tile_##R##_##V(const number *A, i64 lda, const uint32_t *B, i64 ldb, i64 words, \
                                                         float *C, i64 ldc, int add) {                                 \
        __m512 c[R][V];                                                                                                \
        UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < V; j++) c[i][j] =                                \
            add ? _mm512_loadu_ps(C + i * ldc + LANES * j) : _mm512_setzero_ps();                                      \
        for (i64 k = 0; k < words; k++) {                                                                              \
            __m512i b[V];                                                                                              \
            UNROLL for (int j = 0; j < V; j++) b[j] = _mm512_loadu_si512(B + k * ldb + LANES * j);                     \
            UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < V; j++) c[i][j] =                            \
                multiply_add(c[i][j], b[j], A + i * lda + PAIR * k);                                                   \
        }                                                                                                              \
        UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < V; j++)                                          \
            _mm512_storeu_ps(C + i * ldc + LANES * j, c[i][j]);                                                        \
    }
#define TILES(R) TILE(R, 1) TILE(R, 2) TILE(R, 3) TILE(R, 4)
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)

typedef void (*tile_fn)(const number *, i64, const uint32_t *, i64, i64, float *, i64, int);
#define TILE_ROW(R) {tile_##R##_1, tile_##R##_2, tile_##R##_3, tile_##R##_4}
static const tile_fn tiles[6][4] = {TILE_ROW(1), TILE_ROW(2), TILE_ROW(3), TILE_ROW(4), TILE_ROW(5), TILE_ROW(6)};

/* columns is a multiple of 16; `words` = K / PAIR; `add` keeps what C holds. */
static void product(const number *A, i64 lda, const uint32_t *B, i64 ldb, i64 words, float *C, i64 ldc, i64 rows,
                    i64 columns, int add) {
    for (i64 j = 0; j < columns; j += 4 * LANES) {
        i64 vectors = (columns - j) / LANES < 4 ? (columns - j) / LANES : 4;
        for (i64 i = 0; i < rows; i += 6) {
            i64 r = rows - i < 6 ? rows - i : 6;
            tiles[r - 1][vectors - 1](A + i * lda, lda, B + j, ldb, words, C + i * ldc + j, ldc, add);
        }
    }
}

/* Transposes sixteen vectors of sixteen words in place: pairs, quadruples, then 128-bit quarters. */
INLINE void transpose_words(__m512i r[LANES]) {
    __m512i t[LANES];
    UNROLL for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* X[tokens, width] with rows `step` apart → word [d / PAIR][t]; tokens from `tokens` up to `padded` become zero. */
static void words_of_features(const bf16 *X, i64 step, i64 tokens, i64 padded, i64 width, uint32_t *out) {
    i64 pairs = width / 2;
    for (i64 t = 0; t < padded; t += LANES)
        for (i64 d = 0; d < pairs; d += LANES) {
            __mmask16 lanes = lanes_left(d, pairs);
            __m512i r[LANES];
            UNROLL for (int j = 0; j < LANES; j++) r[j] =
                t + j < tokens ? _mm512_maskz_loadu_epi32(lanes, X + (t + j) * step + 2 * d) : _mm512_setzero_si512();
            transpose_words(r);
            for (i64 i = 0; i < LANES && d + i < pairs; i++) put_pairs(out + (d + i) * 2 / PAIR * padded + t, padded, r[i]);
        }
}

/* X[tokens, width] with rows `step` apart → word [t / PAIR][d]; tokens from `tokens` up to `padded` become zero. */
static void words_of_tokens(const bf16 *X, i64 step, i64 tokens, i64 padded, i64 width, uint32_t *out) {
    for (i64 t = 0; t < padded; t += 2, out += 2 / PAIR * width)
        for (i64 d = 0; d < width; d += LANES) {
            const bf16 *even = X + t * step + d, *odd = even + step;
            __m512i low = t < tokens ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)even)) : _mm512_setzero_si512();
            __m512i high = t + 1 < tokens ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)odd)) : _mm512_setzero_si512();
            put_pairs(out + d, width, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

/* A left side of `tokens` dense rows, as words of tokens. */
static void words_of_left(const number *X, i64 tokens, i64 width, uint32_t *out) {
#ifdef WIDE
    memcpy(out, X, 4 * tokens * width);
#else
    words_of_tokens(X, width, tokens, tokens, width, out);
#endif
}

#endif
