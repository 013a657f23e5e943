/* What a step of serving computes, for one number format: included by serving.c for bfloat16 and for float32.
 *
 * Few rows meet large matrices here, so a weight is read once, as it lies in memory, and taken through all rows while it
 * is in the cache: sixteen sums at a time, along the sum, added up across the lanes at the end.
 *
 * NUM: the format.  WIDE: numbers in a vector.  PAIR: numbers in a word.
 */

INLINE NVEC NAME(some_of)(const NUM *p, i64 left) {
    return left >= WIDE ? LOAD_WHOLE(p) : LOAD_PART(p, left);
}

/* Sums out[i] = left[i / R]·right[i % R] over `size` numbers, for L rows of the left and R of the right, 16 at most. */
#define DOTS(L, R)                                                                                                     \
    static __attribute__((noinline)) void NAME(dots_##L##_##R)(const NUM *left, i64 left_step, const NUM *right,       \
                                                               i64 right_step, i64 size, float *out) {                 \
        __m512 sum[16];                                                                                                \
        UNROLL for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();                                              \
        i64 k = 0;                                                                                                     \
        for (; k + WIDE <= size; k += WIDE) {                                                                          \
            NVEC b[R];                                                                                                 \
            UNROLL for (int j = 0; j < R; j++) b[j] = LOAD_WHOLE(right + j * right_step + k);                          \
            UNROLL for (int i = 0; i < L; i++) {                                                                       \
                NVEC a = LOAD_WHOLE(left + i * left_step + k);                                                         \
                UNROLL for (int j = 0; j < R; j++) sum[i * R + j] = DOT(sum[i * R + j], a, b[j]);                      \
            }                                                                                                          \
        }                                                                                                              \
        if (k < size) {                                                                                                \
            NVEC b[R];                                                                                                 \
            UNROLL for (int j = 0; j < R; j++) b[j] = LOAD_PART(right + j * right_step + k, size - k);                 \
            UNROLL for (int i = 0; i < L; i++) {                                                                       \
                NVEC a = LOAD_PART(left + i * left_step + k, size - k);                                                \
                UNROLL for (int j = 0; j < R; j++) sum[i * R + j] = DOT(sum[i * R + j], a, b[j]);                      \
            }                                                                                                          \
        }                                                                                                              \
        _mm512_storeu_ps(out, across(sum));                                                                            \
    }
DOTS(16, 1) DOTS(4, 1) DOTS(4, 2) DOTS(4, 3) DOTS(4, 4)
#undef DOTS

/* sums[row][0 … 15] = x[row]·W of R rows; W goes by in one stream, which is as fast as memory is. */
#define STREAM(R)                                                                                                      \
    static __attribute__((noinline)) void NAME(stream_##R)(const NUM *W, const NUM *x, i64 size, float *sums) {        \
        __m512 sum[R][16];                                                                                             \
        for (int c = 0; c < LANES; c++, W += size) {                                                                   \
            __m512 even[R], odd[R];                                                                                    \
            UNROLL for (int j = 0; j < R; j++) even[j] = odd[j] = _mm512_setzero_ps();                                 \
            i64 k = 0;                                                                                                 \
            for (; k + 2 * WIDE <= size; k += 2 * WIDE) {                                                              \
                NVEC a = LOAD_WHOLE(W + k), b = LOAD_WHOLE(W + k + WIDE);                                              \
                UNROLL for (int j = 0; j < R; j++) {                                                                   \
                    even[j] = DOT(even[j], a, LOAD_WHOLE(x + j * size + k));                                           \
                    odd[j] = DOT(odd[j], b, LOAD_WHOLE(x + j * size + k + WIDE));                                      \
                }                                                                                                      \
            }                                                                                                          \
            for (; k < size; k += WIDE) {                                                                              \
                NVEC a = NAME(some_of)(W + k, size - k);                                                               \
                UNROLL for (int j = 0; j < R; j++) even[j] = DOT(even[j], a, NAME(some_of)(x + j * size + k, size - k)); \
            }                                                                                                          \
            UNROLL for (int j = 0; j < R; j++) sum[j][c] = _mm512_add_ps(even[j], odd[j]);                             \
        }                                                                                                              \
        UNROLL for (int j = 0; j < R; j++) _mm512_storeu_ps(sums + j * LANES, across(sum[j]));                         \
    }
STREAM(1) STREAM(2) STREAM(3) STREAM(4)
#undef STREAM

static const Factors *NAME(factors)(const Site *site, i64 adapter) {
    const Factors *own = adapter < 0 || adapter >= site->count ? 0 : site->factors + adapter;
    return own && own->rank ? own : 0;
}

static const uint32_t *NAME(tile_of_B)(const Factors *own, i64 first) {
    return (const uint32_t *)own->B + first * (own->rank / PAIR);
}

/* What one row adds to a tile of y is on its way into the cache. */
INLINE void NAME(fetch_B)(const Site *site, i64 adapter, i64 first) {
    const Factors *own = NAME(factors)(site, adapter);
    if (own) fetch(NAME(tile_of_B)(own, first), LANES * own->rank * sizeof(NUM));
}

/* And its part of what comes next: of A, the share of one tile of several. */
INLINE void NAME(fetch_A)(const Coming *coming, i64 adapter, i64 tile) {
    for (i64 i = 0; i < coming->count; i++) {
        const Factors *own = NAME(factors)(coming->sites[i], adapter);
        if (!own) continue;
        i64 lines = ROUND_UP(coming->sites[i]->inputs, WIDE) * own->rank * (i64)sizeof(NUM) / 64;
        i64 from = lines * tile / coming->tiles, to = lines * (tile + 1) / coming->tiles;
        fetch((const char *)own->A + 64 * from, 64 * (to - from));
    }
}

/* sums[row][0 … 15] = x[row]·W[first … first + 15]; columns that are not there are what they happen to be. */
static void NAME(base_tile)(const Site *site, const i64 *adapters, const NUM *x, i64 rows, i64 first,
                            const Coming *coming, float *sums) {
    i64 size = site->inputs, columns = least(LANES, site->outputs - first), n = 0;
    const NUM *W = (const NUM *)site->weight + first * size;
    float out[16];
    if (columns < LANES) { /* the last, ragged tile */
        for (; n < rows; n++)
            for (i64 c = 0; c < columns; c++) {
                NAME(dots_4_1)(W + c * size, 0, x + n * size, 0, size, out);
                sums[n * LANES + c] = out[0];
            }
        return;
    }
    if (rows <= 4) {
        for (i64 i = 0; i < rows; i++) NAME(fetch_B)(site, adapters[i], first);
        static void (*const streams[])(const NUM *, const NUM *, i64, float *) = {NAME(stream_1), NAME(stream_2),
                                                                                  NAME(stream_3), NAME(stream_4)};
        streams[rows - 1](W, x, size, sums);
        return;
    }
    /* To multiply a tile by many rows takes longer than to read it: meanwhile what is needed next comes. */
    const char *next = (const char *)(W + LANES * size);
    i64 each = LANES * size * (i64)sizeof(NUM) / (rows / 4 * 4);
    for (; n + 4 <= rows; n += 4)
        for (i64 c = 0; c < LANES; c += 4, next += each) {
            fetch(next, each);
            NAME(fetch_B)(site, adapters[n + c / 4], first);
            if (coming) NAME(fetch_A)(coming, adapters[n + c / 4], coming->done + first / LANES);
            NAME(dots_4_4)(x + n * size, size, W + c * size, size, size, out);
            UNROLL for (int j = 0; j < 4; j++) _mm_storeu_ps(sums + (n + j) * LANES + c, _mm_loadu_ps(out + 4 * j));
        }
    static void (*const few[])(const NUM *, i64, const NUM *, i64, i64, float *) = {NAME(dots_4_1), NAME(dots_4_2),
                                                                                   NAME(dots_4_3)};
    i64 rest = rows - n;
    for (i64 c = 0; rest && c < LANES; c += 4) {
        few[rest - 1](W + c * size, size, x + n * size, size, size, out);
        for (i64 i = 0; i < 4; i++)
            for (i64 j = 0; j < rest; j++) sums[(n + j) * LANES + c + i] = out[rest * i + j];
    }
}

/* out = R rows of A, as they are laid out, times x. */
#define SHRINK(R)                                                                                                      \
    static void NAME(shrink_##R)(const NUM *A, const NUM *x, i64 size, NUM *out) {                                     \
        __m512 sum[16];                                                                                                \
        UNROLL for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();                                              \
        for (i64 k = 0; k < size; k += WIDE, A += R * WIDE) {                                                          \
            NVEC b = NAME(some_of)(x + k, size - k);                                                                   \
            UNROLL for (int i = 0; i < R; i++) sum[i] = DOT(sum[i], LOAD_WHOLE(A + i * WIDE), b);                      \
        }                                                                                                              \
        STORE(out, across(sum), (1 << R) - 1);                                                                         \
    }
SHRINK(16) SHRINK(8)
#undef SHRINK

/* shrink = A·x. */
static void NAME(shrink)(const Site *site, i64 adapter, const NUM *x, NUM *shrink) {
    const Factors *own = NAME(factors)(site, adapter);
    i64 r = 0, rank = own ? own->rank : 0, row = ROUND_UP(site->inputs, WIDE);
    for (; r + 16 <= rank; r += 16) NAME(shrink_16)((const NUM *)own->A + r * row, x, site->inputs, shrink + r);
    if (r < rank) NAME(shrink_8)((const NUM *)own->A + r * row, x, site->inputs, shrink + r);
}

/* gain ∘ (sum + s·B·shrink) + bias for sixteen columns from `first` on, of `count` rows through one adapter or none, a
 * number that the compiler knows. */
INLINE void NAME(finish)(const Site *site, const Factors *own, __m512 *sum, int count, const NUM *shrinks, i64 step,
                         i64 first, __mmask16 some) {
    if (own) {
        const uint32_t *B = NAME(tile_of_B)(own, first);
        for (i64 k = 0; k < own->rank; k += PAIR, B += LANES) {
            __m512i words = _mm512_loadu_si512(B);
            UNROLL for (int j = 0; j < count; j++) {
                int word;
                memcpy(&word, shrinks + j * step + k, 4);
                sum[j] = EXPAND(sum[j], words, _mm512_set1_epi32(word));
            }
        }
        if (own->gain) UNROLL for (int j = 0; j < count; j++)
            sum[j] = _mm512_mul_ps(sum[j], _mm512_maskz_loadu_ps(some, own->gain + first));
    }
    if (site->bias) UNROLL for (int j = 0; j < count; j++)
        sum[j] = _mm512_add_ps(sum[j], _mm512_maskz_loadu_ps(some, site->bias + first));
}

/* Sixteen columns of y from `first` on, of `rows` ≤ ROWS rows, as float32 [rows, 16]. */
static void NAME(tile)(const Site *site, const i64 *adapters, const NUM *x, i64 rows, const NUM *shrinks, i64 step,
                       i64 first, const Coming *coming, float *sums) {
    __mmask16 some = lanes_left(first, site->outputs);
    NAME(base_tile)(site, adapters, x, rows, first, coming, sums);
    for (i64 n = 0; n < rows; n++) {
        const Factors *own = NAME(factors)(site, adapters[n]);
        if (!own && !site->bias) continue;
        __m512 sum = _mm512_loadu_ps(sums + n * LANES);
        NAME(finish)(site, own, &sum, 1, shrinks + n * step, step, first, some);
        _mm512_storeu_ps(sums + n * LANES, sum);
    }
}

/* Tiles from … to - 1 of y = x·Wᵀ and what the adapters add; with `onto`, is added to y and rounded once more. */
static void NAME(outputs)(const Site *site, const i64 *adapters, const NUM *x, i64 rows, const NUM *shrinks, i64 step,
                          NUM *y, int onto, i64 from, i64 to, const Coming *coming) {
    float sums[ROWS * LANES];
    for (i64 first = from * LANES; first < to * LANES; first += LANES) {
        __mmask16 some = lanes_left(first, site->outputs);
        for (i64 begin = 0; begin < rows; begin += ROWS) {
            i64 many = rows - begin < ROWS ? rows - begin : ROWS;
            NAME(tile)(site, adapters + begin, x + begin * site->inputs, many, shrinks + begin * step, step, first, coming,
                       sums);
            for (i64 n = 0; n < many; n++) {
                NUM *at_ = y + (begin + n) * site->outputs + first;
                __m512 v = _mm512_loadu_ps(sums + n * LANES);
                if (onto) v = _mm512_add_ps(ROUNDED(v), READ(at_, some));
                STORE(at_, v, some);
            }
        }
    }
}

/* Sixteen columns of y = gain ∘ (y - bias + s·B·shrink) + bias of `count` ≤ 4 rows, a number that the compiler
 * knows. */
INLINE void NAME(add)(const Site *site, const Factors *own, NUM *y, int count, const NUM *shrinks, i64 step, i64 first) {
    __mmask16 some = lanes_left(first, site->outputs);
    __m512 sum[4];
    UNROLL for (int j = 0; j < count; j++) {
        sum[j] = READ(y + j * site->outputs, some);
        if (site->bias) sum[j] = _mm512_sub_ps(sum[j], _mm512_maskz_loadu_ps(some, site->bias + first));
    }
    NAME(finish)(site, own, sum, count, shrinks, step, first, some);
    UNROLL for (int j = 0; j < count; j++) STORE(y + j * site->outputs, sum[j], some);
}

/* Adds what adapters add to some rows of y = x·Wᵀ + bias; neighbours through one adapter share what is read of it. */
static void NAME(additions)(const Site *site, const i64 *adapters, const NUM *x, NUM *y, i64 rows, NUM *shrinks, i64 step) {
    Site bare = *site;
    for (i64 begin = 0, end; begin < rows; begin = end) {
        const Factors *own = NAME(factors)(site, adapters[begin]);
        for (end = begin + 1; end < rows && adapters[end] == adapters[begin];) end++;
        if (!own) continue;
        for (i64 n = begin; n < end; n++) NAME(shrink)(site, adapters[n], x + n * site->inputs, shrinks + n * step);
        bare.bias = own->gain ? site->bias : 0; /* under a gain it is taken off first and put back */
        for (i64 c = 0; c < site->outputs; c += LANES) {
            i64 n = begin;
            for (; n + 4 <= end; n += 4) NAME(add)(&bare, own, y + n * site->outputs + c, 4, shrinks + n * step, step, c);
            for (; n < end; n++) NAME(add)(&bare, own, y + n * site->outputs + c, 1, shrinks + n * step, step, c);
        }
    }
}

static void NAME(product)(const Site *site, const i64 *adapters, const NUM *x, NUM *y, i64 rows, NUM *shrinks, i64 step,
                          Phase *phases) {
    if (!site->weight) {
        i64 many = share(rows, TOGETHER);
        EACH(phases, pieces(rows, many)) {
            i64 n = task * many;
            NAME(additions)(site, adapters + n, x + n * site->inputs, y + n * site->outputs, least(many, rows - n),
                            shrinks + n * step, step);
        }
        return;
    }
    if (step) {
        EACH(phases, rows) NAME(shrink)(site, adapters[task], x + task * site->inputs, shrinks + task * step);
        await(phases, rows);
    }
    i64 tiles = tiles_of(site), each = share(tiles, SOME), tasks = pieces(tiles, each);
    EACH(phases + 1, tasks)
        NAME(outputs)(site, adapters, x, rows, shrinks, step, y, 0, task * each, least(tiles, (task + 1) * each), 0);
}

typedef struct {
    const NUM *data;
    i64 step; /* from head to head */
} NAME(Heads_);

/* ── attention through the cache ──────────────────────────────────────────────────────────────────────────────── */

static i64 NAME(slot)(const Past *past, i64 n, i64 i) {
    return (i64)past->tables[past->begins[n] + i / past->block] * past->block + i % past->block;
}

/* The keys and values of token n are kept. */
static void NAME(keep)(const Past *past, i64 n, NAME(Heads_) k, NAME(Heads_) v, NUM *keys, NUM *values) {
    i64 slot = NAME(slot)(past, n, past->seen[n] - 1);
    for (i64 g = 0; g < past->groups; g++) {
        memcpy(keys + (slot * past->groups + g) * past->width, k.data + g * k.step, sizeof(NUM) * past->width);
        memcpy(values + (slot * past->groups + g) * past->width, v.data + g * v.step, sizeof(NUM) * past->width);
    }
}

/* Token n's query heads of one group; `scores` has room for `seen` rounded up to a block, and a block more. */
static void NAME(attend)(const Past *past, i64 n, i64 g, NAME(Heads_) q, const NUM *keys, const NUM *values, NUM *out,
                         i64 out_step, float *scores) {
    i64 seen = past->seen[n], width = past->width, step = past->groups * width;
    i64 from = past->window && seen > past->window ? seen - past->window : 0, begin = from / past->block * past->block;
    for (i64 h = g * (past->heads / past->groups); h < (g + 1) * (past->heads / past->groups); h++) {
        __m512 top = all(-INFINITY), sum = _mm512_setzero_ps();
        for (i64 i = begin; i < seen; i += LANES) { /* a block has a multiple of sixteen slots */
            i64 at_ = (NAME(slot)(past, n, i) * past->groups + g) * width;
            NAME(dots_16_1)(keys + at_, step, q.data + h * q.step, width, width, scores + i - begin);
            __m512 s = _mm512_mul_ps(_mm512_loadu_ps(scores + i - begin), all(past->scale));
            if (past->softcap > 0) {
                __m512 e = exponential(_mm512_mul_ps(s, all(2 / past->softcap)));
                __m512 turn = _mm512_sub_ps(all(1), _mm512_div_ps(all(2), _mm512_add_ps(e, all(1))));
                s = _mm512_mul_ps(turn, all(past->softcap));
            }
            __mmask16 here = lanes_left(i, seen);
            if (i < from) here &= 0xffff << (from - i);
            s = _mm512_mask_mov_ps(all(-INFINITY), here, s);
            top = _mm512_max_ps(top, s);
            _mm512_storeu_ps(scores + i - begin, s);
        }
        __m512 most = all(_mm512_reduce_max_ps(top));
        for (i64 i = begin; i < seen; i += LANES) {
            __m512 s = _mm512_loadu_ps(scores + i - begin);
            __mmask16 here = _mm512_cmp_ps_mask(s, all(-INFINITY), _CMP_NEQ_UQ); /* NaN takes part */
            __m512 p = _mm512_maskz_mov_ps(here, exponential(_mm512_sub_ps(s, most)));
            sum = _mm512_add_ps(sum, p);
            _mm512_storeu_ps(scores + i - begin, p);
        }
        float whole = 1 / _mm512_reduce_add_ps(sum);
        for (i64 d = 0; d < width; d += 4 * LANES) {
            __m512 v[4];
            __mmask16 some[4];
            UNROLL for (int j = 0; j < 4; j++) v[j] = _mm512_setzero_ps(),
                some[j] = d + LANES * j < width ? lanes_left(d + LANES * j, width) : 0;
            for (i64 i = from; i < seen; i++) {
                const NUM *row = values + (NAME(slot)(past, n, i) * past->groups + g) * width + d;
                __m512 p = all(scores[i - begin]);
                UNROLL for (int j = 0; j < 4; j++) v[j] = _mm512_fmadd_ps(p, READ(row + LANES * j, some[j]), v[j]);
            }
            UNROLL for (int j = 0; j < 4; j++)
                if (some[j]) STORE(out + h * out_step + d + LANES * j, _mm512_mul_ps(v[j], all(whole)), some[j]);
        }
    }
}

/* ── laying out ───────────────────────────────────────────────────────────────────────────────────────────────── */

/* A by sixteen or eight of its rows, s·B by sixteen outputs, as `Factors` has them, zeros behind. */
static void NAME(lay_out)(const Plain *own) {
    NUM *A = own->to_A;
    i64 step = ROUND_UP(own->rank, 8), many;
    for (i64 r = 0; r < step; r += many) {
        many = r + 16 <= step ? 16 : 8;
        for (i64 i = 0; i < own->inputs; i += WIDE)
            for (i64 j = r; j < r + many; j++, A += WIDE) {
                i64 some = j < own->rank ? least(WIDE, own->inputs - i) : 0;
                for (i64 k = 0; k < some; k++) A[k] = OF(own->A[j * own->inputs + i + k]);
                for (i64 k = some; k < WIDE; k++) A[k] = 0;
            }
    }
    NUM *B = own->to_B;
    memset(B, 0, ROUND_UP(own->outputs, LANES) * step * sizeof(NUM));
    for (i64 o = 0; o < own->outputs; o++) {
        NUM *tile = B + o / LANES * LANES * step + o % LANES * PAIR;
        for (i64 k = 0; k < own->rank; k++)
            tile[k / PAIR * LANES * PAIR + k % PAIR] = OF(own->B[o * own->rank + k] * own->scale);
    }
}
