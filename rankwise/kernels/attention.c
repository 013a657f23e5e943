/* Attention over a packed stream in which every document sees only itself, forward and backward.
 *
 * q [tokens, heads, width], k and v [tokens, groups, width], bfloat16, any strides but the last; heads / groups query
 * heads share one key-value head.  Segment i is tokens bounds[i] … bounds[i+1]-1.  It sees itself and, where
 * after[i] >= 0, the segment that it continues, and so on: what several documents have in common at their beginning
 * stands in the stream once.  Segments that continue one follow it at once.  `causal` lets a token see itself and what
 * stands before it, `window` > 0 of that so many tokens, itself included; else it sees its whole document.  Scores, softmax and all sums are float32; probabilities are kept for no
 * longer than a block and made again in the backward pass from the row's log-sum-exp (FlashAttention-2,
 * arXiv:2307.08691, algorithms 1 and 2, with whole rows in place of the running maximum: documents are short).
 *
 * One task is one head of one segment.  Both functions return 0, or 1 where memory for the blocks was not to be had.
 *
 * Shape letters in comments: L tokens of a segment, T of all that it sees.
 */
#if defined(__x86_64__) && defined(__GNUC__)
#include <omp.h>
#include "product.h"

typedef struct {
    const bf16 *data;
    i64 token, head; /* strides, in elements */
} Heads;

typedef struct {
    const i64 *bounds, *after;
    i64 count, tokens, heads, groups, width;
    float scale;
    i64 window, causal;
} Layout;

typedef struct {
    i64 start, length, before; /* before: tokens of the segments that it continues */
} Segment;

static const bf16 *at(Heads x, i64 token, i64 head) { return x.data + token * x.token + head * x.head; }

/* Block sizes: multiples of the 6-row tile, scores fit the first cache. */
enum { QUERIES = 24, KEYS = 48, COLUMNS = 64 };

static const float LOG2_E = 1.44269504f;

static Segment segment_at(const Layout *l, i64 i) {
    Segment s = {l->bounds[i], l->bounds[i + 1] - l->bounds[i], 0};
    for (i64 a = l->after[i]; a >= 0; a = l->after[a]) s.before += l->bounds[a + 1] - l->bounds[a];
    return s;
}

/* The longest T, and in `borrowed` how many tokens all segments together see outside themselves. */
static i64 longest(const Layout *l, i64 *borrowed) {
    i64 most = 0;
    *borrowed = 0;
    for (i64 i = 0; i < l->count; i++) {
        Segment s = segment_at(l, i);
        if (s.before + s.length > most) most = s.before + s.length;
        *borrowed += s.before;
    }
    return ROUND_UP(most, LANES);
}

/* All that segment i sees of one head, T rows: where they lie, or gathered in `room`. */
static Rows seen_rows(const Layout *l, Heads x, i64 i, Segment own, i64 head, bf16 *room) {
    if (!own.before) return (Rows){at(x, own.start, head), x.token};
    i64 place = own.before + own.length;
    for (i64 a = i; a >= 0; a = l->after[a])
        for (i64 t = l->bounds[a + 1] - 1; t >= l->bounds[a]; t--)
            memcpy(room + --place * l->width, at(x, t, head), 2 * l->width);
    return (Rows){room, l->width};
}

/* Turns the scores of one query into weights exp(scale · (score - max)), zero for the keys outside first … end-1;
 * from … to is the range that is stored.  Gives the row's log-sum-exp and the inverse of the sum, by which the result
 * is divided. */
static void softmax_row(const float *scores, number *weights, i64 from, i64 to, i64 first, i64 end, float scale,
                        float *lse, float *inverse) {
    i64 begin = first / LANES * LANES;
    __m512 high = all(-INFINITY), sum = _mm512_setzero_ps();
    for (i64 j = begin; j < end; j += LANES) {
        __mmask16 seen = lanes_left(j, end) & (j >= first ? 0xffff : (__mmask16)(0xffff << (first - j)));
        high = _mm512_mask_max_ps(high, seen, high, _mm512_loadu_ps(scores + j));
    }
    float most = _mm512_reduce_max_ps(high), turns = scale * LOG2_E;
    for (i64 j = from; j < begin; j += LANES) put_zero(weights + j);
    for (i64 j = begin; j < end; j += LANES) {
        __mmask16 seen = lanes_left(j, end) & (j >= first ? 0xffff : (__mmask16)(0xffff << (first - j)));
        __m512 s = _mm512_fmsub_ps(_mm512_loadu_ps(scores + j), all(turns), all(most * turns));
        s = _mm512_maskz_mov_ps(seen, power_of_two(s));
        sum = _mm512_add_ps(sum, s);
        put(weights + j, s);
    }
    for (i64 j = ROUND_UP(end, LANES); j < to; j += LANES) put_zero(weights + j);
    float total = _mm512_reduce_add_ps(sum);
    *lse = most * scale + logf(total);
    *inverse = 1.0f / total;
}

/* What one task works in; every array is a slice of the thread's scratch. */
typedef struct {
    uint32_t *keys, *values;   /* words of features [width / PAIR, T], of tokens [T / PAIR, width] */
    float *scores, *sums;      /* [QUERIES, T], [QUERIES, width] */
    number *weights, *queries; /* [QUERIES, T], [QUERIES, width] */
    bf16 *gathered;            /* [T, width] */
} Desk;

static i64 desk_bytes(i64 padded, i64 width) {
    i64 words = 2 / PAIR * padded * width, floats = QUERIES * (padded + width), numbers = floats;
    return ROUND_UP(4 * words + 4 * floats + (i64)sizeof(number) * numbers + 2 * padded * width, 64);
}

static Desk desk_at(char *scratch, i64 padded, i64 width) {
    Desk d;
    d.keys = (uint32_t *)scratch;
    d.values = d.keys + width / PAIR * padded;
    d.scores = (float *)(d.values + padded / PAIR * width);
    d.sums = d.scores + QUERIES * padded;
    d.weights = (number *)(d.sums + QUERIES * width);
    d.queries = d.weights + QUERIES * padded;
    d.gathered = (bf16 *)(d.queries + QUERIES * width);
    return d;
}

static void forward_task(const Layout *l, Desk d, Heads q, Heads k, Heads v, bf16 *out, float *lse, i64 i, i64 head) {
    Segment own = segment_at(l, i);
    i64 whole = own.before + own.length, padded = ROUND_UP(whole, LANES), width = l->width, group = head / (l->heads / l->groups);
    unsigned before = without_denormals();
    Rows keys = seen_rows(l, k, i, own, group, d.gathered);
    words_of_features(keys.data, keys.step, whole, padded, width, d.keys);
    Rows values = seen_rows(l, v, i, own, group, d.gathered);
    words_of_tokens(values.data, values.step, whole, padded, width, d.values);
    for (i64 t = 0; t < own.length; t += QUERIES) {
        i64 rows = own.length - t < QUERIES ? own.length - t : QUERIES, place = own.before + t;
        i64 to = ROUND_UP(l->causal ? place + rows : whole, LANES);
        i64 from = l->window > 0 && place + 1 > l->window ? (place + 1 - l->window) / LANES * LANES : 0;
        float inverse[QUERIES];
        Left queries = left_of((Rows){at(q, own.start + t, head), q.token}, rows, width, d.queries);
        product(queries.data, queries.step, d.keys + from, padded, width / PAIR, d.scores + from, padded, rows, to - from, 0);
        for (i64 r = 0; r < rows; r++) {
            i64 end = l->causal ? place + r + 1 : whole, first = l->window > 0 && end > l->window ? end - l->window : 0;
            softmax_row(d.scores + r * padded, d.weights + r * padded, from, to, first, end, l->scale,
                        lse + head * l->tokens + own.start + t + r, inverse + r);
        }
        product(d.weights + from, padded, d.values + from / PAIR * width, width, (to - from) / PAIR, d.sums, width, rows,
                width, 0);
        for (i64 r = 0; r < rows; r++)
            for (i64 c = 0; c < width; c += LANES)
                store(out + ((own.start + t + r) * l->heads + head) * width + c,
                      _mm512_mul_ps(_mm512_loadu_ps(d.sums + r * width + c), all(inverse[r])));
    }
    _mm_setcsr(before);
}

int WAY(attention_forward)(Heads q, Heads k, Heads v, bf16 *out, float *lse, Layout l) {
    i64 borrowed, padded = longest(&l, &borrowed), size = desk_bytes(padded, l.width);
    char *scratch = aligned_alloc(64, size * omp_get_max_threads());
    if (!scratch) return 1;
#pragma omp parallel for schedule(dynamic)
    for (i64 task = 0; task < l.count * l.heads; task++)
        forward_task(&l, desk_at(scratch + size * omp_get_thread_num(), padded, l.width), q, k, v, out, lse,
                     task / l.heads, task % l.heads);
    free(scratch);
    return 0;
}

/* What one backward task works in. */
typedef struct {
    uint32_t *query_features, *grad_features, *query_tokens, *grad_tokens, *score_words;
    float *grad_query, *scores, *grad_weights, *row_dot, *grad_keys, *grad_values;
    number *weights, *grad_scores, *keys_across, *keys, *values; /* the last two: a block's, widened */
    bf16 *gathered_keys, *gathered_values;
} Room;

static i64 room_bytes(i64 padded, i64 width) {
    i64 words = 4 / PAIR * padded * width + KEYS / PAIR * COLUMNS;
    i64 floats = width * padded + 2 * KEYS * COLUMNS + padded + 2 * KEYS * width;
    i64 numbers = 2 * KEYS * COLUMNS + width * ROUND_UP(padded, KEYS) + 2 * KEYS * width;
    return ROUND_UP(4 * words + 4 * floats + (i64)sizeof(number) * numbers + 4 * padded * width, 64);
}

static Room room_at(char *scratch, i64 padded, i64 width) {
    Room r;
    r.query_features = (uint32_t *)scratch;
    r.grad_features = r.query_features + width / PAIR * padded;
    r.query_tokens = r.grad_features + width / PAIR * padded;
    r.grad_tokens = r.query_tokens + padded / PAIR * width;
    r.score_words = r.grad_tokens + padded / PAIR * width;
    r.grad_query = (float *)(r.score_words + KEYS / PAIR * COLUMNS);
    r.scores = r.grad_query + width * padded;
    r.grad_weights = r.scores + KEYS * COLUMNS;
    r.row_dot = r.grad_weights + KEYS * COLUMNS;
    r.grad_keys = r.row_dot + padded;
    r.grad_values = r.grad_keys + KEYS * width;
    r.weights = (number *)(r.grad_values + KEYS * width);
    r.grad_scores = r.weights + KEYS * COLUMNS;
    r.keys_across = r.grad_scores + KEYS * COLUMNS;
    r.keys = r.keys_across + width * ROUND_UP(padded, KEYS);
    r.values = r.keys + KEYS * width;
    r.gathered_keys = (bf16 *)(r.values + KEYS * width);
    r.gathered_values = r.gathered_keys + padded * width;
    return r;
}

/* Kᵀ[width, T], rows ROUND_UP(padded, KEYS) apart and zero past the last key: the left side of dQᵀ = Kᵀ · dSᵀ. */
static void lay_keys_across(Room r, Rows k, i64 whole, i64 padded, i64 width) {
    i64 row = ROUND_UP(padded, KEYS);
#ifdef WIDE
    words_of_features(k.data, k.step, whole, row, width, (uint32_t *)r.keys_across);
#else
    uint32_t *words = (uint32_t *)r.grad_query; /* free until the sums begin */
    words_of_features(k.data, k.step, whole, padded, width, words);
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
#endif
}

/* Scores and their gradient of one block, keys down and queries across: Pᵀ and dSᵀ = Pᵀ ∘ (dPᵀ - row_dot) · scale.
 * Keys are counted over all that is seen, queries within the segment. */
static void grad_block(const Layout *l, Room r, Segment own, i64 key, i64 keys, i64 query, i64 columns, const float *lse) {
    for (i64 i = 0; i < keys; i++) {
        i64 first = l->causal ? key + i - own.before : 0, end = own.length;
        if (l->window > 0 && first + l->window < end) end = first + l->window;
        for (i64 j = 0; j < columns; j += LANES) {
            i64 t = query + j, at_ = i * COLUMNS + j;
            __mmask16 seen = t >= end ? 0 : lanes_left(t, end);
            if (t < first) seen &= first - t >= LANES ? 0 : (__mmask16)(0xffff << (first - t));
            if (!seen) {
                put_zero(r.weights + at_);
                put_zero(r.grad_scores + at_);
                continue;
            }
            __m512 offset = _mm512_mul_ps(_mm512_maskz_loadu_ps(seen, lse + t), all(LOG2_E));
            __m512 s = _mm512_fmsub_ps(_mm512_loadu_ps(r.scores + at_), all(l->scale * LOG2_E), offset);
            __m512 p = _mm512_maskz_mov_ps(seen, power_of_two(s));
            __m512 d = _mm512_sub_ps(_mm512_loadu_ps(r.grad_weights + at_), _mm512_loadu_ps(r.row_dot + t));
            put(r.weights + at_, p);
            put(r.grad_scores + at_, _mm512_maskz_mul_ps(seen, _mm512_mul_ps(p, d), all(l->scale)));
        }
    }
    words_of_left(r.grad_scores, keys, COLUMNS, r.score_words);
}

/* Σ over the features of grad ∘ out, for each query: what the softmax takes off every score's gradient. */
static void lay_row_dots(Room r, const bf16 *upper, i64 step, const bf16 *lower, i64 row, i64 length, i64 width) {
    for (i64 t = 0; t < ROUND_UP(length, LANES); t++) {
        __m512 dot = _mm512_setzero_ps();
        for (i64 d = 0; t < length && d < width; d += LANES)
            dot = _mm512_fmadd_ps(load(upper + t * step + d), load(lower + t * row + d), dot);
        r.row_dot[t] = _mm512_reduce_add_ps(dot);
    }
}

/* dQᵀ [width, L] in grad_query, as rows of grad_q. */
static void give_grad_query(const Layout *l, Room r, Segment own, i64 padded, i64 head, bf16 *grad_q) {
    for (i64 t = 0; t < own.length; t += LANES)
        for (i64 d = 0; d < l->width; d += LANES) {
            __m512i x[LANES];
            UNROLL for (int j = 0; j < LANES; j++) x[j] = _mm512_loadu_si512(r.grad_query + (d + j) * padded + t);
            transpose_words(x);
            for (i64 j = 0; j < LANES && t + j < own.length; j++)
                store(grad_q + ((own.start + t + j) * l->heads + head) * l->width + d, _mm512_castsi512_ps(x[j]));
        }
}

/* Gradients of keys and values by query head: float32 [tokens + borrowed, heads, width].  A segment's own tokens come
 * first; what it adds to those that it borrowed stands behind, for the sum at the end. */
typedef struct {
    float *k, *v;
} Sums;

/* Keys t … t+keys-1 of all that the segment sees, against every query that sees them. */
static void backward_keys(const Layout *l, Room r, Segment own, Left key, Left value, i64 t, i64 keys, i64 padded,
                          const float *lse) {
    i64 width = l->width, across = ROUND_UP(ROUND_UP(own.before + own.length, LANES), KEYS), last = own.length;
    i64 columns_padded = padded, first = l->causal && t > own.before ? (t - own.before) / LANES * LANES : 0;
    if (l->window > 0 && t + keys - 1 + l->window - own.before < last) last = t + keys - 1 + l->window - own.before;
    memset(r.grad_keys, 0, 4 * KEYS * width);
    memset(r.grad_values, 0, 4 * KEYS * width);
    for (i64 c = first; c < last; c += COLUMNS) {
        i64 columns = ROUND_UP(last - c < COLUMNS ? last - c : COLUMNS, LANES);
        product(key.data, key.step, r.query_features + c, columns_padded, width / PAIR, r.scores, COLUMNS, keys, columns, 0);
        product(value.data, value.step, r.grad_features + c, columns_padded, width / PAIR, r.grad_weights, COLUMNS, keys,
                columns, 0);
        grad_block(l, r, own, t, keys, c, columns, lse);
        product(r.weights, COLUMNS, r.grad_tokens + c / PAIR * width, width, columns / PAIR, r.grad_values, width, keys,
                width, 1);
        product(r.grad_scores, COLUMNS, r.query_tokens + c / PAIR * width, width, columns / PAIR, r.grad_keys, width, keys,
                width, 1);
        product(r.keys_across + t, across, r.score_words, COLUMNS, (keys + PAIR - 1) / PAIR, r.grad_query + c, columns_padded,
                width, columns, 1);
    }
}

static void backward_task(const Layout *l, Room r, Heads q, Heads k, Heads v, const bf16 *out, const float *lse,
                          Heads grad, bf16 *grad_q, Sums sums, i64 i, i64 borrowed, i64 head) {
    Segment own = segment_at(l, i);
    i64 whole = own.before + own.length, padded = ROUND_UP(own.length, LANES), row = l->heads * l->width, width = l->width;
    i64 group = head / (l->heads / l->groups);
    unsigned before = without_denormals();
    const bf16 *query = at(q, own.start, head), *upper = at(grad, own.start, head);
    Rows key = seen_rows(l, k, i, own, group, r.gathered_keys), value = seen_rows(l, v, i, own, group, r.gathered_values);
    words_of_features(query, q.token, own.length, padded, width, r.query_features);
    words_of_features(upper, grad.token, own.length, padded, width, r.grad_features);
    words_of_tokens(query, q.token, own.length, padded, width, r.query_tokens);
    words_of_tokens(upper, grad.token, own.length, padded, width, r.grad_tokens);
    lay_keys_across(r, key, whole, ROUND_UP(whole, LANES), width);
    lay_row_dots(r, upper, grad.token, out + own.start * row + head * width, row, own.length, width);
    memset(r.grad_query, 0, 4 * width * padded);
    for (i64 t = 0; t < whole; t += KEYS) {
        i64 keys = whole - t < KEYS ? whole - t : KEYS;
        Left some_keys = left_of((Rows){key.data + t * key.step, key.step}, keys, width, r.keys);
        Left some_values = left_of((Rows){value.data + t * value.step, value.step}, keys, width, r.values);
        backward_keys(l, r, own, some_keys, some_values, t, keys, padded, lse + head * l->tokens + own.start);
        for (i64 j = 0; j < keys; j++) {
            i64 place = t + j < own.before ? l->tokens + borrowed + t + j : own.start + t + j - own.before;
            memcpy(sums.k + place * row + head * width, r.grad_keys + j * width, 4 * width);
            memcpy(sums.v + place * row + head * width, r.grad_values + j * width, 4 * width);
        }
    }
    give_grad_query(l, r, own, padded, head, grad_q);
    _mm_setcsr(before);
}

/* The gradient of one token's keys and values: over the query heads of each group, and over the segments that borrowed
 * it, which are those right behind its own that begin with it. */
static void add_up_token(const Layout *l, Sums sums, const i64 *borrowed, i64 i, i64 t, bf16 *grad_k, bf16 *grad_v) {
    i64 row = l->heads * l->width, shared = l->heads / l->groups;
    Segment own = segment_at(l, i);
    for (i64 at_ = 0; at_ < l->groups * l->width; at_ += LANES) {
        i64 from = at_ / l->width * shared * l->width + at_ % l->width;
        __m512 sum_k = _mm512_setzero_ps(), sum_v = sum_k;
        for (i64 d = i, place = t; d < l->count; d++) {
            if (d > i) {
                if (segment_at(l, d).before <= own.before) break;
                place = l->tokens + borrowed[d] + own.before + t - own.start;
            }
            for (i64 h = 0; h < shared; h++) {
                sum_k = _mm512_add_ps(sum_k, _mm512_loadu_ps(sums.k + place * row + from + h * l->width));
                sum_v = _mm512_add_ps(sum_v, _mm512_loadu_ps(sums.v + place * row + from + h * l->width));
            }
        }
        store(grad_k + t * l->groups * l->width + at_, sum_k);
        store(grad_v + t * l->groups * l->width + at_, sum_v);
    }
}

/* grad_q, grad_k, grad_v are dense, [tokens, heads | groups, width]. */
int WAY(attention_backward)(Heads q, Heads k, Heads v, const bf16 *out, const float *lse, Heads grad, bf16 *grad_q,
                       bf16 *grad_k, bf16 *grad_v, Layout l) {
    i64 more, padded = longest(&l, &more), size = room_bytes(padded, l.width);
    size_t each = (size_t)4 * (l.tokens + more) * l.heads * l.width;
    char *scratch = aligned_alloc(64, size * omp_get_max_threads());
    float *of_heads = malloc(2 * each);
    i64 *borrowed = malloc(8 * (l.count + 1));
    int failed = !scratch || !of_heads || !borrowed;
    if (!failed) {
        Sums sums = {of_heads, of_heads + each / 4};
        borrowed[0] = 0;
        for (i64 i = 0; i < l.count; i++) borrowed[i + 1] = borrowed[i] + segment_at(&l, i).before;
#pragma omp parallel for schedule(dynamic)
        for (i64 task = 0; task < l.count * l.heads; task++)
            backward_task(&l, room_at(scratch + size * omp_get_thread_num(), padded, l.width), q, k, v, out, lse, grad,
                          grad_q, sums, task / l.heads, borrowed[task / l.heads], task % l.heads);
#pragma omp parallel
        for (i64 i = 0; i < l.count; i++)
#pragma omp for nowait
            for (i64 t = l.bounds[i]; t < l.bounds[i + 1]; t++) add_up_token(&l, sums, borrowed, i, t, grad_k, grad_v);
    }
    free(scratch), free(of_heads), free(borrowed);
    return failed;
}
#endif
