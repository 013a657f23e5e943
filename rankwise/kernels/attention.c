/* Causal attention over a packed stream in which every document sees only itself, forward and backward.
 *
 * q [tokens, heads, width], k and v [tokens, groups, width], bfloat16, any strides but the last; heads / groups query
 * heads share one key-value head.  Document i is tokens bounds[i] … bounds[i+1]-1.  `window` > 0 lets a token see that
 * many tokens back, itself included; 0 is no limit.  Scores, softmax and all sums are float32; probabilities are kept
 * for no longer than a block and made again in the backward pass from the row's log-sum-exp (FlashAttention-2,
 * arXiv:2307.08691, algorithms 1 and 2, with whole rows in place of the running maximum: documents are short).
 *
 * One task is one head of one document.  Both functions return 0, or 1 where memory for the blocks was not to be had.
 */
#if defined(__x86_64__) && defined(__GNUC__)
#include <omp.h>
#include "product.h"

typedef struct {
    const bf16 *data;
    i64 token, head; /* strides, in elements */
} Heads;

static const bf16 *at(Heads x, i64 token, i64 head) { return x.data + token * x.token + head * x.head; }

enum { QUERIES = 48, KEYS = 96, COLUMNS = 128 }; /* block sizes: multiples of the 6-row tile, scores fit the L2 cache */

/* Turns the scores of one query into weights exp(score - max), zero for the keys outside first … end-1; from … to is
 * the range that is stored.  Gives the row's log-sum-exp and the inverse of the sum, by which the result is divided. */
static void softmax_row(float *scores, bf16 *weights, i64 from, i64 to, i64 first, i64 end, float scale, float *lse,
                        float *inverse) {
    i64 begin = first / LANES * LANES;
    __m512 high = all(-INFINITY);
    for (i64 j = begin; j < end; j += LANES) {
        __mmask16 seen = lanes_left(j, end) & (j >= first ? 0xffff : (__mmask16)(0xffff << (first - j)));
        __m512 s = _mm512_mask_mul_ps(all(-INFINITY), seen, _mm512_loadu_ps(scores + j), all(scale));
        _mm512_storeu_ps(scores + j, s);
        high = _mm512_max_ps(high, s);
    }
    float most = _mm512_reduce_max_ps(high);
    __m512 sum = _mm512_setzero_ps();
    for (i64 j = from; j < begin; j += LANES) store_zero(weights + j);
    for (i64 j = begin; j < end; j += LANES) {
        __m512 s = _mm512_loadu_ps(scores + j);
        __mmask16 seen = _mm512_cmp_ps_mask(s, all(-INFINITY), _CMP_NEQ_UQ);
        s = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(s, all(most))));
        sum = _mm512_add_ps(sum, s);
        store(weights + j, s);
    }
    for (i64 j = ROUND_UP(end, LANES); j < to; j += LANES) store_zero(weights + j);
    float total = _mm512_reduce_add_ps(sum);
    *lse = most + logf(total);
    *inverse = 1.0f / total;
}

static i64 longest(const i64 *bounds, i64 documents) {
    i64 most = 0;
    for (i64 i = 0; i < documents; i++)
        if (bounds[i + 1] - bounds[i] > most) most = bounds[i + 1] - bounds[i];
    return ROUND_UP(most, LANES);
}

static size_t forward_bytes(i64 padded, i64 width) {
    return ROUND_UP(4 * padded * width + 6 * QUERIES * padded + 4 * QUERIES * width, 64);
}

int attention_forward(Heads q, Heads k, Heads v, bf16 *out, float *lse, const i64 *bounds, i64 documents, i64 tokens,
                      i64 heads, i64 groups, i64 width, float scale, i64 window) {
    size_t size = forward_bytes(longest(bounds, documents), width);
    char *scratch = aligned_alloc(64, size * omp_get_max_threads());
    if (!scratch) return 1;
#pragma omp parallel for schedule(dynamic)
    for (i64 task = 0; task < documents * heads; task++) {
        i64 start = bounds[task / heads], length = bounds[task / heads + 1] - start, padded = ROUND_UP(length, LANES);
        i64 head = task % heads, group = head / (heads / groups);
        uint32_t *keys = (uint32_t *)(scratch + size * omp_get_thread_num()), *values = keys + width / 2 * padded;
        float *scores = (float *)(values + padded / 2 * width), *sums = scores + QUERIES * padded;
        bf16 *weights = (bf16 *)(sums + QUERIES * width);
        pairs_of_features(at(k, start, group), k.token, length, padded, width, keys);
        pairs_of_tokens(at(v, start, group), v.token, length, padded, width, values);
        for (i64 t = 0; t < length; t += QUERIES) {
            i64 rows = length - t < QUERIES ? length - t : QUERIES, to = ROUND_UP(t + rows, LANES);
            i64 from = window > 0 && t + 1 > window ? (t + 1 - window) / LANES * LANES : 0;
            float inverse[QUERIES];
            product(at(q, start + t, head), q.token, keys + from, padded, width / 2, scores + from, padded, rows,
                    to - from, 0);
            for (i64 i = 0; i < rows; i++) {
                i64 end = t + i + 1, first = window > 0 && end > window ? end - window : 0;
                softmax_row(scores + i * padded, weights + i * padded, from, to, first, end, scale,
                            lse + head * tokens + start + t + i, inverse + i);
            }
            product(weights + from, padded, values + from / 2 * width, width, (to - from) / 2, sums, width, rows, width,
                    0);
            for (i64 i = 0; i < rows; i++)
                for (i64 d = 0; d < width; d += LANES)
                    store(out + ((start + t + i) * heads + head) * width + d,
                          _mm512_mul_ps(_mm512_loadu_ps(sums + i * width + d), all(inverse[i])));
        }
    }
    free(scratch);
    return 0;
}

/* What one backward task works in; every array is a slice of the thread's scratch. */
typedef struct {
    uint32_t *query_features, *grad_features, *query_tokens, *grad_tokens, *score_pairs;
    float *grad_query, *scores, *grad_weights, *row_dot, *grad_keys, *grad_values;
    bf16 *weights, *grad_scores, *keys_across;
} Room;

static size_t backward_bytes(i64 padded, i64 width) {
    i64 words = 2 * padded * width + KEYS / 2 * COLUMNS;
    i64 floats = width * padded + 2 * KEYS * COLUMNS + padded + 2 * KEYS * width;
    i64 halves = 2 * KEYS * COLUMNS + width * ROUND_UP(padded, KEYS);
    return ROUND_UP(4 * words + 4 * floats + 2 * halves, 64);
}

static Room furnish(char *scratch, i64 padded, i64 width) {
    Room r;
    r.query_features = (uint32_t *)scratch;
    r.grad_features = r.query_features + width / 2 * padded;
    r.query_tokens = r.grad_features + width / 2 * padded;
    r.grad_tokens = r.query_tokens + padded / 2 * width;
    r.score_pairs = r.grad_tokens + padded / 2 * width;
    r.grad_query = (float *)(r.score_pairs + KEYS / 2 * COLUMNS);
    r.scores = r.grad_query + width * padded;
    r.grad_weights = r.scores + KEYS * COLUMNS;
    r.row_dot = r.grad_weights + KEYS * COLUMNS;
    r.grad_keys = r.row_dot + padded;
    r.grad_values = r.grad_keys + KEYS * width;
    r.weights = (bf16 *)(r.grad_values + KEYS * width);
    r.grad_scores = r.weights + KEYS * COLUMNS;
    r.keys_across = r.grad_scores + KEYS * COLUMNS;
    return r;
}

/* Kᵀ[width, tokens], rows ROUND_UP(padded, KEYS) apart and zero past the document: the left side of dQᵀ = Kᵀ · dSᵀ. */
static void lay_keys_across(Room r, const bf16 *k, i64 step, i64 length, i64 padded, i64 width) {
    i64 row = ROUND_UP(padded, KEYS);
    uint32_t *words = (uint32_t *)r.grad_query; /* free until the sums begin */
    pairs_of_features(k, step, length, padded, width, words);
    for (i64 d = 0; d < width; d += 2) {
        bf16 *even = r.keys_across + d * row, *odd = even + row;
        for (i64 t = 0; t < padded; t += LANES) {
            __m512i x = _mm512_loadu_si512(words + d / 2 * padded + t);
            _mm256_storeu_si256((__m256i *)(even + t), _mm512_cvtepi32_epi16(x));
            _mm256_storeu_si256((__m256i *)(odd + t), _mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
        }
        memset(even + padded, 0, 2 * (row - padded));
        memset(odd + padded, 0, 2 * (row - padded));
    }
}

/* Scores and their gradient of one block, keys down and queries across: Pᵀ and dSᵀ = Pᵀ ∘ (dPᵀ - row_dot) · scale. */
static void grad_block(Room r, i64 key, i64 keys, i64 query, i64 columns, i64 length, i64 window, float scale,
                       const float *lse) {
    for (i64 i = 0; i < keys; i++) {
        i64 first = key + i, end = window > 0 && first + window < length ? first + window : length;
        for (i64 j = 0; j < columns; j += LANES) {
            i64 t = query + j, at_ = i * COLUMNS + j;
            __mmask16 seen = t >= end ? 0 : lanes_left(t, end);
            if (t < first) seen &= first - t >= LANES ? 0 : (__mmask16)(0xffff << (first - t));
            if (!seen) {
                store_zero(r.weights + at_);
                store_zero(r.grad_scores + at_);
                continue;
            }
            __m512 s = _mm512_fmsub_ps(_mm512_loadu_ps(r.scores + at_), all(scale), _mm512_maskz_loadu_ps(seen, lse + t));
            __m512 p = _mm512_maskz_mov_ps(seen, exponential(s));
            __m512 d = _mm512_sub_ps(_mm512_loadu_ps(r.grad_weights + at_), _mm512_loadu_ps(r.row_dot + t));
            store(r.weights + at_, p);
            store(r.grad_scores + at_, _mm512_maskz_mul_ps(seen, _mm512_mul_ps(p, d), all(scale)));
        }
    }
    if (keys % 2) { /* products go by pairs of keys: the row past the last is zero */
        memset(r.weights + keys * COLUMNS, 0, 2 * COLUMNS);
        memset(r.grad_scores + keys * COLUMNS, 0, 2 * COLUMNS);
    }
    pairs_of_tokens(r.grad_scores, COLUMNS, ROUND_UP(keys, 2), ROUND_UP(keys, 2), COLUMNS, r.score_pairs);
}

/* One head of one document.  grad_k and grad_v: float32 [tokens, heads, width], this head's own. */
static void backward_task(Room r, Heads q, Heads k, Heads v, const bf16 *out, const float *lse, Heads grad, bf16 *grad_q,
                          float *grad_k, float *grad_v, i64 start, i64 length, i64 head, i64 heads, i64 group, i64 width,
                          float scale, i64 window) {
    i64 padded = ROUND_UP(length, LANES), across = ROUND_UP(padded, KEYS), row = heads * width;
    const bf16 *query = at(q, start, head), *key = at(k, start, group), *value = at(v, start, group);
    const bf16 *upper = at(grad, start, head), *lower = out + start * row + head * width;
    pairs_of_features(query, q.token, length, padded, width, r.query_features);
    pairs_of_features(upper, grad.token, length, padded, width, r.grad_features);
    pairs_of_tokens(query, q.token, length, padded, width, r.query_tokens);
    pairs_of_tokens(upper, grad.token, length, padded, width, r.grad_tokens);
    lay_keys_across(r, key, k.token, length, padded, width);
    memset(r.grad_query, 0, 4 * width * padded);
    for (i64 t = 0; t < padded; t++) {
        __m512 dot = _mm512_setzero_ps();
        for (i64 d = 0; t < length && d < width; d += LANES)
            dot = _mm512_fmadd_ps(load(upper + t * grad.token + d), load(lower + t * row + d), dot);
        r.row_dot[t] = _mm512_reduce_add_ps(dot);
    }
    for (i64 t = 0; t < length; t += KEYS) {
        i64 keys = length - t < KEYS ? length - t : KEYS;
        i64 last = window > 0 && t + keys - 1 + window < length ? t + keys - 1 + window : length;
        memset(r.grad_keys, 0, 4 * KEYS * width);
        memset(r.grad_values, 0, 4 * KEYS * width);
        for (i64 c = t / LANES * LANES; c < last; c += COLUMNS) {
            i64 columns = ROUND_UP(last - c < COLUMNS ? last - c : COLUMNS, LANES);
            product(key + t * k.token, k.token, r.query_features + c, padded, width / 2, r.scores, COLUMNS, keys,
                    columns, 0);
            product(value + t * v.token, v.token, r.grad_features + c, padded, width / 2, r.grad_weights, COLUMNS, keys,
                    columns, 0);
            grad_block(r, t, keys, c, columns, length, window, scale, lse);
            product(r.weights, COLUMNS, r.grad_tokens + c / 2 * width, width, columns / 2, r.grad_values, width, keys,
                    width, 1);
            product(r.grad_scores, COLUMNS, r.query_tokens + c / 2 * width, width, columns / 2, r.grad_keys, width,
                    keys, width, 1);
            product(r.keys_across + t, across, r.score_pairs, COLUMNS, (keys + 1) / 2, r.grad_query + c, padded, width,
                    columns, 1);
        }
        for (i64 i = 0; i < keys; i++) {
            memcpy(grad_k + (start + t + i) * row + head * width, r.grad_keys + i * width, 4 * width);
            memcpy(grad_v + (start + t + i) * row + head * width, r.grad_values + i * width, 4 * width);
        }
    }
    for (i64 t = 0; t < padded; t += LANES)
        for (i64 d = 0; d < width; d += LANES) {
            __m512i x[LANES];
            UNROLL for (int j = 0; j < LANES; j++) x[j] = _mm512_loadu_si512(r.grad_query + (d + j) * padded + t);
            transpose_words(x);
            for (i64 j = 0; j < LANES && t + j < length; j++)
                store(grad_q + (start + t + j) * row + head * width + d, _mm512_castsi512_ps(x[j]));
        }
}

/* grad_q, grad_k, grad_v are dense, [tokens, heads | groups, width]. */
int attention_backward(Heads q, Heads k, Heads v, const bf16 *out, const float *lse, Heads grad, bf16 *grad_q,
                       bf16 *grad_k, bf16 *grad_v, const i64 *bounds, i64 documents, i64 tokens, i64 heads, i64 groups,
                       i64 width, float scale, i64 window) {
    i64 padded = longest(bounds, documents), shared = heads / groups;
    size_t size = backward_bytes(padded, width), each = (size_t)4 * tokens * heads * width;
    char *scratch = aligned_alloc(64, size * omp_get_max_threads());
    float *per_head = malloc(2 * each);
    if (!scratch || !per_head) {
        free(scratch);
        free(per_head);
        return 1;
    }
    float *head_k = per_head, *head_v = per_head + tokens * heads * width;
#pragma omp parallel for schedule(dynamic)
    for (i64 task = 0; task < documents * heads; task++) {
        i64 start = bounds[task / heads], length = bounds[task / heads + 1] - start, head = task % heads;
        Room room = furnish(scratch + size * omp_get_thread_num(), ROUND_UP(length, LANES), width);
        backward_task(room, q, k, v, out, lse + head * tokens + start, grad, grad_q, head_k, head_v, start, length, head,
                      heads, head / shared, width, scale, window);
    }
#pragma omp parallel for
    for (i64 t = 0; t < tokens; t++)
        for (i64 g = 0; g < groups; g++)
            for (i64 d = 0; d < width; d += LANES) {
                __m512 sum_k = _mm512_setzero_ps(), sum_v = _mm512_setzero_ps();
                for (i64 h = g * shared; h < (g + 1) * shared; h++) {
                    sum_k = _mm512_add_ps(sum_k, _mm512_loadu_ps(head_k + (t * heads + h) * width + d));
                    sum_v = _mm512_add_ps(sum_v, _mm512_loadu_ps(head_v + (t * heads + h) * width + d));
                }
                store(grad_k + (t * groups + g) * width + d, sum_k);
                store(grad_v + (t * groups + g) * width + d, sum_v);
            }
    free(scratch);
    free(per_head);
    return 0;
}
#endif
