/* The large product: panels of a frozen weight, which may be stored in codes, and rows that go through them in tiles.
 *
 * A panel is a right side of 64 columns, word [k / PAIR][column] (words.h).
 */
#ifndef RANKWISE_PANEL_H
#define RANKWISE_PANEL_H
#include "product.h"

enum { PANEL = 4 * LANES, TILE_ROWS = 6 };

/* W, or, `across`, its transpose, as it is stored: [rows, columns], in bfloat16 or in the codes of codes.py. */
enum { DENSE, INT8, NF4 };

typedef struct {
    const void *data;
    i64 rows, columns, across, code;
    const void *scales; /* a block of 64 weights: float32 for INT8; for NF4 numbers of `scale_values` */
    const float *groups, *offset, *scale_values, *values; /* NF4: of 256 scales, and the tables */
} Weight;

static i64 lesser(i64 a, i64 b) { return a < b ? a : b; }

/* A panel, of columns that lie along the rows of what is stored. */
static void panel_of_rows(Rows x, i64 columns, i64 sum, uint32_t *out) {
    words_of_features(x.data, x.step, columns, PANEL, sum, out);
}

/* And of columns that lie along its columns. */
static void panel_of_columns(Rows x, i64 columns, i64 sum, uint32_t *out) {
    for (i64 k = 0; k < sum; k += 2, out += 2 / PAIR * PANEL)
        for (i64 c = 0; c < PANEL; c += LANES) {
            __mmask16 some = c < columns ? lanes_left(c, columns) : 0;
            const bf16 *even = x.data + k * x.step + c;
            __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, even));
            __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, even + x.step));
            put_pairs(out + c, PANEL, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

/* One block's scale. */
static float scale_of(const Weight *w, i64 at_) {
    if (w->code == INT8) return ((const float *)w->scales)[at_];
    return fmaf(w->scale_values[((const uint8_t *)w->scales)[at_]], w->groups[at_ / 256], *w->offset);
}

/* Weights first … first+many-1 of one block, counted from the beginning of W, with its scale. */
static void decode_some(const Weight *w, float scale, i64 first, i64 many, bf16 *to) {
    if (w->code == INT8) {
        const int8_t *codes = (const int8_t *)w->data + first;
        for (i64 i = 0; i < many; i += LANES) {
            __mmask16 some = lanes_left(i, many);
            __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, codes + i)));
            store_some(to + i, _mm512_mul_ps(v, all(scale / 127)), some);
        }
        return;
    }
    /* The sixteen values, scaled and rounded once; a byte's two codes make a word's two numbers. */
    __m256i row = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(w->values), all(scale)));
    __m512i table = _mm512_broadcast_i64x4(row), low = _mm512_set1_epi32(15);
    const uint8_t *codes = (const uint8_t *)w->data + first / 2;
    for (i64 i = 0; i < many; i += 2 * LANES) {
        __mmask16 some = lanes_left(i / 2, many / 2);
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, codes + i / 2));
        __m512i both = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(_mm512_and_si512(bytes, low), 16));
        _mm512_mask_storeu_epi32(to + i, some, _mm512_permutexvar_epi16(both, table));
    }
}

/* A rectangle of what is stored: where it lies, or decoded to `room`.  Columns come in even numbers. */
static Rows rectangle(const Weight *w, i64 row, i64 rows, i64 column, i64 columns, bf16 *room) {
    if (w->code == DENSE) return (Rows){(const bf16 *)w->data + row * w->columns + column, w->columns};
    for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < columns;) {
            i64 first = (row + r) * w->columns + column + c, many = lesser(64 - first % 64, columns - c);
            decode_some(w, scale_of(w, first / 64), first, many, room + r * columns + c);
            c += many;
        }
    return (Rows){room, columns};
}

/* float32 [rows, columns] times a factor, rounded into [padded rows, step] with zeros around. */
static Rows rounded(const float *from, i64 rows, i64 columns, i64 from_step, float factor, bf16 *to, i64 padded_rows,
                    i64 step) {
    memset(to, 0, 2 * padded_rows * step);
    for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < columns; c += LANES) {
            __mmask16 some = lanes_left(c, columns);
            __m512 v = _mm512_maskz_loadu_ps(some, from + r * from_step + c);
            store_some(to + r * step + c, _mm512_mul_ps(v, all(factor)), some);
        }
    return (Rows){to, step};
}

/* A tile: six rows by one panel.  The low-rank part comes first, so that dropout can take away from it alone. */
typedef struct {
    Left x, low;
    const uint32_t *panel, *low_panel;  /* right sides */
    const uint8_t *keep;                /* which of the low-rank part's elements count, or NULL for all */
    const float *gain, *bias;           /* by column, or NULL */
    bf16 *out;
    i64 words, low_words, keep_step, out_step, columns;
} Tile;

#define TILE_SUM(R, left, right, words)                                                                                \
    for (i64 k = 0; k < (words); k++) {                                                                                \
        __m512i b[4];                                                                                                  \
        UNROLL for (int j = 0; j < 4; j++) b[j] = _mm512_loadu_si512((right) + k * PANEL + LANES * j);                 \
        UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < 4; j++) c[i][j] =                                \
            multiply_add(c[i][j], b[j], (left).data + i * (left).step + PAIR * k);                                     \
    }

#define FUSED(R)                                                                                                       \
    static __attribute__((noinline)) void fused_##R(const Tile *tile) {                                                \
        const Tile t = *tile;                                                                                          \
        __m512 c[R][4];                                                                                                \
        UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < 4; j++) c[i][j] = _mm512_setzero_ps();           \
        TILE_SUM(R, t.low, t.low_panel, t.low_words)                                                                   \
        if (t.keep) UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < 4; j++) {                            \
            __mmask16 some = LANES * j < t.columns ? lanes_left(LANES * j, t.columns) : 0;                             \
            __m128i kept = _mm_maskz_loadu_epi8(some, t.keep + i * t.keep_step + LANES * j);                           \
            c[i][j] = _mm512_maskz_mov_ps(_mm_test_epi8_mask(kept, kept), c[i][j]);                                    \
        }                                                                                                              \
        TILE_SUM(R, t.x, t.panel, t.words)                                                                             \
        UNROLL for (int j = 0; j < 4; j++) if (LANES * j < t.columns) {                                                \
            __mmask16 some = lanes_left(LANES * j, t.columns);                                                         \
            __m512 factor = t.gain ? _mm512_maskz_loadu_ps(some, t.gain + LANES * j) : all(1.0f);                      \
            __m512 offset = t.bias ? _mm512_maskz_loadu_ps(some, t.bias + LANES * j) : _mm512_setzero_ps();            \
            UNROLL for (int i = 0; i < R; i++)                                                                         \
                store_some(t.out + i * t.out_step + LANES * j, _mm512_fmadd_ps(c[i][j], factor, offset), some);        \
        }                                                                                                              \
    }
FUSED(1) FUSED(2) FUSED(3) FUSED(4) FUSED(5) FUSED(6)
static void (*const fused[TILE_ROWS])(const Tile *) = {fused_1, fused_2, fused_3, fused_4, fused_5, fused_6};

/* Some rows by one panel. */
static void strip(Tile tile, i64 rows) {
    for (i64 n = 0; n < rows; n += TILE_ROWS) {
        i64 some = lesser(rows - n, TILE_ROWS);
        fused[some - 1](&tile);
        tile.x.data += some * tile.x.step, tile.out += some * tile.out_step;
        if (tile.low_words) tile.low.data += some * tile.low.step;
        if (tile.keep) tile.keep += some * tile.keep_step;
    }
}

#endif
