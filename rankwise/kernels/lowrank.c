/* The product of an adapted linear layer, forward and backward, with all that the adapters add fused into it.
 *
 *   y = gain ∘ (x·Wᵀ + drop(x)·Aᵀ·(s·B)ᵀ) + bias         W [outputs, inputs], A [rank, inputs], B [outputs, rank]
 *
 * bfloat16 in and out, float32 sums, factors as float32 masters.  W is laid out anew for every call, in panels of 64
 * columns; beside hundreds of rows that costs a few hundredths of the product.  A tile of the result is begun with the
 * low-rank part and goes on with the large one, so an adapter adds no pass over y and none over dx.  Each thread takes a
 * range of rows, in blocks that fit its cache: whatever a block is needed for (shrink, large product, gradients of A and
 * B) is done while it is there.
 *
 * Both functions return 0, or 1 where memory was not to be had.  Sums over rows depend on the number of threads alone.
 */
#if defined(__x86_64__) && defined(__GNUC__)
#include <omp.h>

#include "panel.h"

/* Rows of a block, and bytes of W that are laid out at a time.  Wide words take twice the room in the second cache. */
enum { BLOCK = PAIR == 2 ? 96 : 48, LAID_OUT = PAIR == 2 ? 8 << 20 : 1 << 19 };

/* Rows start … stop-1 go through one adapter, or, with rank 0, through the base alone.  lowrank.py has the same. */
typedef struct {
    i64 start, stop, rank;
    const float *A, *B, *gain; /* [rank, inputs], [outputs, rank], [outputs] or NULL */
    const uint8_t *keep;       /* dropout: [stop - start, inputs] of 0 and 1, or NULL */
    bf16 *shrink;              /* [stop - start, width(rank)]: drop(x)·Aᵀ, written forward, read backward */
    float *grad_A, *grad_B, *grad_gain;
    float scale, rest; /* s, and what dropout multiplies by what it keeps */
} Part;

/* One call, as its threads share it.  Forward, out = y; backward, `grad` is y's gradient and out = dx, or NULL. */
typedef struct {
    Weight weight;
    const Part *parts;
    i64 count, rows, inputs, outputs;
    Rows x, grad;
    const bf16 *y;     /* backward, under gains */
    const float *bias; /* [outputs] or NULL */
    bf16 *out;
    i64 most, at_once;                     /* the largest width of a part; panels laid out at a time */
    uint32_t *thin, *panels, *low_panels;  /* right sides of the shrinks, of the large product, of what is added to it */
    bf16 *slopes;                          /* [rows, most]: gradient of the shrinks */
    float *sums_A, *sums_B, *sums_gain;    /* [threads, count, most, inputs], […, outputs], [threads, count, outputs] */
} Pass;

/* What a thread works in. */
typedef struct {
    float *sums;     /* [BLOCK, most] */
    uint32_t *words; /* [BLOCK / PAIR, most] */
    bf16 *factor;    /* [PANEL, most], a slice of a factor */
    bf16 *decoded;   /* [PANEL, sum], a panel of W out of its codes */
    number *x, *dropped, *grad, *low; /* left sides that do not lie ready: [BLOCK, inputs] twice, [BLOCK, outputs], */
                                      /* [BLOCK, most] */
} Bench;

static i64 greater(i64 a, i64 b) { return a > b ? a : b; }
static i64 width(i64 rank) { return ROUND_UP(rank, LANES); }
static i64 spread(i64 columns) { return ROUND_UP(columns, 2 * LANES); }
static i64 sum_of(const Pass *p) { return p->grad.data ? p->outputs : p->inputs; }
static i64 columns_of(const Pass *p) { return p->grad.data ? p->inputs : p->outputs; }

/* The rows that are thread t's own: every thread's tiles but the last one's are whole. */
static i64 share(i64 rows, i64 t, i64 threads) {
    return t == threads ? rows : rows * t / threads / TILE_ROWS * TILE_ROWS;
}

/* Whether any of a part's rows are thread t's own. */
static int meets(const Pass *p, i64 part, i64 t, i64 threads) {
    return share(p->rows, t, threads) < p->parts[part].stop && share(p->rows, t + 1, threads) > p->parts[part].start;
}

/* ── right sides ──────────────────────────────────────────────────────────────────────────────────────────────── */

/* A[:, from …] `[width, PANEL]`, and s·B[from …, :] `[PANEL, width]`. */
static Rows slice_of_A(const Pass *p, const Part *part, i64 from, i64 some, bf16 *to) {
    return rounded(part->A + from, part->rank, some, p->inputs, part->rest, to, width(part->rank), PANEL);
}

static Rows slice_of_B(const Part *part, i64 from, i64 some, bf16 *to) {
    return rounded(part->B + from * part->rank, some, part->rank, part->rank, part->scale, to, PANEL, width(part->rank));
}

static uint32_t *thin_at(const Pass *p, i64 part) { return p->thin + part * p->most * sum_of(p) / PAIR; }

static uint32_t *low_panel_at(const Pass *p, i64 part, i64 place) {
    return p->low_panels + (part * p->at_once + place) * PANEL * p->most / PAIR;
}

/* The right sides of the shrinks: Aᵀ forward, s·B backward, words [sum / PAIR][width]. */
static void lay_thin(const Pass *p, Bench bench) {
    i64 sum = sum_of(p), slices = (sum + PANEL - 1) / PANEL;
#pragma omp for schedule(static)
    for (i64 task = 0; task < p->count * slices; task++) {
        const Part *part = p->parts + task / slices;
        i64 from = task % slices * PANEL, some = lesser(PANEL, sum - from), wide = width(part->rank);
        uint32_t *out = thin_at(p, task / slices) + from / PAIR * wide;
        if (!wide) continue;
        if (p->grad.data) words_of_tokens(slice_of_B(part, from, some, bench.factor).data, wide, some, some, wide, out);
        else words_of_features(slice_of_A(p, part, from, some, bench.factor).data, PANEL, wide, wide, some, out);
    }
}

/* Panels first … first + many - 1 of the large product, and of what each part adds to it. */
static void lay_panels(const Pass *p, Bench bench, i64 first, i64 many) {
    i64 sum = sum_of(p);
#pragma omp for schedule(static)
    for (i64 place = 0; place < many; place++) {
        i64 from = (first + place) * PANEL, some = lesser(PANEL, columns_of(p) - from);
        uint32_t *out = p->panels + place * PANEL * sum / PAIR;
        if (p->weight.across == !p->grad.data)
            panel_of_columns(rectangle(&p->weight, 0, sum, from, some, bench.decoded), some, sum, out);
        else panel_of_rows(rectangle(&p->weight, from, some, 0, sum, bench.decoded), some, sum, out);
        for (i64 i = 0; i < p->count; i++) {
            const Part *part = p->parts + i;
            i64 wide = width(part->rank);
            if (!wide) continue;
            out = low_panel_at(p, i, place);
            if (p->grad.data) panel_of_columns(slice_of_A(p, part, from, some, bench.factor), some, wide, out);
            else panel_of_rows(slice_of_B(part, from, some, bench.factor), some, wide, out);
        }
    }
}

/* ── what a block is needed for beside the large product ──────────────────────────────────────────────────────── */

/* x with the dropped elements zero. */
static Left dropped(Rows x, const uint8_t *keep, i64 rows, i64 columns, number *to) {
    for (i64 n = 0; n < rows; n++)
        for (i64 c = 0; c < columns; c += LANES) {
            __mmask16 some = lanes_left(c, columns);
            __m128i kept = _mm_maskz_loadu_epi8(some, keep + n * columns + c);
            __mmask16 stays = _mm_test_epi8_mask(kept, kept);
            put_some(to + n * columns + c, _mm256_maskz_loadu_epi16(stays, x.data + n * x.step + c), some);
        }
    return (Left){to, columns};
}

/* gain ∘ grad; with `sums`, adds Σ grad ∘ (y - bias) to them. */
static Left gained(const Pass *p, const float *gain, Rows grad, const bf16 *y, i64 rows, float *sums, number *to) {
    for (i64 n = 0; n < rows; n++)
        for (i64 c = 0; c < p->outputs; c += LANES) {
            __mmask16 some = lanes_left(c, p->outputs);
            __m512 g = load_some(grad.data + n * grad.step + c, some);
            put_some(to + n * p->outputs + c, halved(_mm512_mul_ps(g, _mm512_maskz_loadu_ps(some, gain + c))), some);
            if (!sums) continue;
            __m512 value = load_some(y + n * p->outputs + c, some);
            if (p->bias) value = _mm512_sub_ps(value, _mm512_maskz_loadu_ps(some, p->bias + c));
            _mm512_mask_storeu_ps(sums + c, some, _mm512_fmadd_ps(g, value, _mm512_maskz_loadu_ps(some, sums + c)));
        }
    return (Left){to, p->outputs};
}

/* left·thin → bfloat16 [rows, wide]. */
static void thin_product(Left left, const uint32_t *thin, i64 sum, i64 rows, i64 wide, float *sums, bf16 *out) {
    product(left.data, left.step, thin, wide, sum / PAIR, sums, wide, rows, wide, 0);
    for (i64 i = 0; i < rows * wide; i += LANES) store(out + i, _mm512_loadu_ps(sums + i));
}

/* C[wide, columns] += lowᵀ·x over the rows, low as words [rows / PAIR][wide].  The columns of C stand as `words_across`
 * leaves them, rows spread(columns) apart. */
static void outer(const uint32_t *words, i64 wide, Left x, i64 rows, i64 columns, float *C) {
    i64 step = spread(columns);
    for (i64 c = 0; c < columns; c += 2 * LANES) {
        for (i64 q = 0; q < wide; q += 8) {
            __m512 sum[8][2];
            float *at_ = C + q * step + c;
            UNROLL for (int i = 0; i < 8; i++) UNROLL for (int j = 0; j < 2; j++) sum[i][j] =
                _mm512_loadu_ps(at_ + i * step + LANES * j);
            for (i64 n = 0; n < rows; n += PAIR) {
                __m512i right[2];
                words_across((Left){x.data + n * x.step + c, x.step}, rows - n, columns - c, right);
                UNROLL for (int i = 0; i < 8; i++) UNROLL for (int j = 0; j < 2; j++) sum[i][j] =
                    multiply_add(sum[i][j], right[j], words + n / PAIR * wide + q + i);
            }
            UNROLL for (int i = 0; i < 8; i++) UNROLL for (int j = 0; j < 2; j++)
                _mm512_storeu_ps(at_ + i * step + LANES * j, sum[i][j]);
        }
    }
}

static float *sums_at(const Pass *p, float *sums, i64 thread, i64 part, i64 each) {
    return sums + (thread * p->count + part) * each;
}

static Rows from_row(Rows x, i64 n) { return (Rows){x.data + n * x.step, x.step}; }

/* The shrink of a block, for the result and for the backward pass. */
static void shrink_block(const Pass *p, Bench bench, Left x, i64 i, i64 n, i64 rows) {
    const Part *part = p->parts + i;
    i64 at_ = n - part->start, wide = width(part->rank);
    if (part->keep) x = dropped(from_row(p->x, n), part->keep + at_ * p->inputs, rows, p->inputs, bench.dropped);
    thin_product(x, thin_at(p, i), p->inputs, rows, wide, bench.sums, part->shrink + at_ * wide);
}

/* The shrink's gradient, and what the block adds to the gradients of A and B; `grad` is after the gain. */
static void learn_block(const Pass *p, Bench bench, Left grad, i64 i, i64 n, i64 rows) {
    const Part *part = p->parts + i;
    i64 at_ = n - part->start, wide = width(part->rank), t = omp_get_thread_num();
    bf16 *slopes = p->slopes + n * p->most;
    thin_product(grad, thin_at(p, i), p->outputs, rows, wide, bench.sums, slopes);
    if (part->grad_B) {
        words_of_tokens(part->shrink + at_ * wide, wide, rows, rows, wide, bench.words);
        outer(bench.words, wide, grad, rows, p->outputs, sums_at(p, p->sums_B, t, i, p->most * spread(p->outputs)));
    }
    if (part->grad_A) {
        const uint8_t *keep = part->keep ? part->keep + at_ * p->inputs : 0;
        Left x = keep ? dropped(from_row(p->x, n), keep, rows, p->inputs, bench.dropped)
                      : left_of(from_row(p->x, n), rows, p->inputs, bench.x);
        words_of_tokens(slopes, wide, rows, rows, wide, bench.words);
        outer(bench.words, wide, x, rows, p->inputs, sums_at(p, p->sums_A, t, i, p->most * spread(p->inputs)));
    }
}

/* One block of one part, through the panels that are laid out. */
static void block(const Pass *p, Bench bench, i64 i, i64 n, i64 rows, i64 first, i64 many) {
    const Part *part = p->parts + i;
    i64 wide = width(part->rank), columns = columns_of(p), at_ = n - part->start, forward = !p->grad.data;
    Left left, low = {0};
    if (forward) left = left_of(from_row(p->x, n), rows, p->inputs, bench.x);
    else if (part->gain) {
        float *sums = first ? 0 : sums_at(p, p->sums_gain, omp_get_thread_num(), i, spread(p->outputs));
        left = gained(p, part->gain, from_row(p->grad, n), p->y + n * p->outputs, rows, sums, bench.grad);
    } else left = left_of(from_row(p->grad, n), rows, p->outputs, bench.grad);
    if (!first && wide && forward) shrink_block(p, bench, left, i, n, rows);
    if (!first && wide && !forward) learn_block(p, bench, left, i, n, rows);
    const bf16 *lower = forward ? part->shrink + at_ * wide : p->slopes + n * p->most;
    if (wide) low = left_of((Rows){lower, wide}, rows, wide, bench.low);
    for (i64 place = 0; place < many && p->out; place++) {
        i64 from = (first + place) * PANEL;
        Tile tile = {.x = left, .low = low, .words = sum_of(p) / PAIR, .panel = p->panels + place * PANEL * sum_of(p) / PAIR,
                     .low_words = wide / PAIR, .low_panel = low_panel_at(p, i, place), .columns = lesser(PANEL, columns - from),
                     .out = p->out + n * columns + from, .out_step = columns};
        if (forward) tile.gain = part->gain ? part->gain + from : 0, tile.bias = p->bias ? p->bias + from : 0;
        else if (part->keep) tile.keep = part->keep + at_ * columns + from, tile.keep_step = columns;
        strip(tile, rows);
    }
}

/* ── a call ───────────────────────────────────────────────────────────────────────────────────────────────────── */

static void run(const Pass *p, Bench bench) {
    i64 panels = p->out ? (columns_of(p) + PANEL - 1) / PANEL : 1;
    i64 t = omp_get_thread_num(), threads = omp_get_num_threads();
    i64 begin = share(p->rows, t, threads), end = share(p->rows, t + 1, threads);
    lay_thin(p, bench);
    for (i64 i = 0; p->grad.data && i < p->count; i++) {
        if (!meets(p, i, t, threads)) continue;
        memset(sums_at(p, p->sums_A, t, i, p->most * spread(p->inputs)), 0, 4 * p->most * spread(p->inputs));
        memset(sums_at(p, p->sums_B, t, i, p->most * spread(p->outputs)), 0, 4 * p->most * spread(p->outputs));
        memset(sums_at(p, p->sums_gain, t, i, spread(p->outputs)), 0, 4 * spread(p->outputs));
    }
    for (i64 first = 0; first < panels; first += p->at_once) {
        i64 many = lesser(p->at_once, panels - first);
        if (p->out) lay_panels(p, bench, first, many);
        for (i64 i = 0; i < p->count; i++) {
            i64 last = lesser(end, p->parts[i].stop);
            for (i64 n = greater(begin, p->parts[i].start); n < last; n += BLOCK)
                block(p, bench, i, n, lesser(BLOCK, last - n), first, many);
        }
#pragma omp barrier
    }
}

/* 2·LANES sums of `outer`, over the threads that met the part, put straight. */
static void straight(const Pass *p, const float *sums, i64 part, i64 each, i64 at_, float factor, float *out) {
    i64 threads = omp_get_num_threads();
    __m512 low = _mm512_setzero_ps(), high = low;
    for (i64 t = 0; t < threads; t++) {
        if (!meets(p, part, t, threads)) continue;
        const float *own = sums + (t * p->count + part) * each + at_;
        low = _mm512_add_ps(low, _mm512_loadu_ps(own));
        high = _mm512_add_ps(high, _mm512_loadu_ps(own + LANES));
    }
    put_straight(_mm512_mul_ps(low, all(factor)), _mm512_mul_ps(high, all(factor)), out);
}

static void add_up(const Pass *p) {
    for (i64 i = 0; i < p->count; i++) {
        const Part *part = p->parts + i;
        i64 each_A = p->most * spread(p->inputs), each_B = p->most * spread(p->outputs);
        float some[2 * LANES];
#pragma omp for schedule(static) nowait
        for (i64 c = 0; c < p->inputs; c += 2 * LANES)
            for (i64 r = 0; part->grad_A && r < part->rank; r++) {
                straight(p, p->sums_A, i, each_A, r * spread(p->inputs) + c, part->rest, some);
                memcpy(part->grad_A + r * p->inputs + c, some, 4 * lesser(2 * LANES, p->inputs - c));
            }
#pragma omp for schedule(static) nowait
        for (i64 c = 0; c < p->outputs; c += 2 * LANES)
            for (i64 r = 0; part->grad_B && r < part->rank; r++) {
                straight(p, p->sums_B, i, each_B, r * spread(p->outputs) + c, part->scale, some);
                for (i64 o = c; o < lesser(c + 2 * LANES, p->outputs); o++) part->grad_B[o * part->rank + r] = some[o - c];
            }
#pragma omp for schedule(static) nowait
        for (i64 c = 0; c < p->outputs; c++) {
            if (!part->gain) continue;
            part->grad_gain[c] = 0;
            for (i64 t = 0, threads = omp_get_num_threads(); t < threads; t++)
                if (meets(p, i, t, threads)) part->grad_gain[c] += sums_at(p, p->sums_gain, t, i, spread(p->outputs))[c];
        }
    }
}

/* The shares of one piece of memory, each on a line of the cache of its own. */
static void *carved(char **rest, i64 bytes) {
    void *own = *rest;
    *rest += ROUND_UP(bytes, 64);
    return own;
}

static char *furnish(Pass *p, Bench *bench, i64 threads, char *rest) {
    i64 sum = sum_of(p), backward = p->grad.data != 0, each = threads * p->count;
    i64 size = sizeof(number), widened = PAIR == 1 ? size : 0;
    p->thin = carved(&rest, 4 * p->count * p->most * sum / PAIR);
    p->panels = carved(&rest, 4 * p->at_once * PANEL * sum / PAIR);
    p->low_panels = carved(&rest, 4 * p->count * p->at_once * PANEL * p->most / PAIR);
    p->slopes = carved(&rest, backward ? 2 * p->rows * p->most : 0);
    p->sums_A = carved(&rest, backward ? 4 * each * p->most * spread(p->inputs) : 0);
    p->sums_B = carved(&rest, backward ? 4 * each * p->most * spread(p->outputs) : 0);
    p->sums_gain = carved(&rest, backward ? 4 * each * spread(p->outputs) : 0);
    for (i64 t = 0; t < threads; t++) {
        bench[t].sums = carved(&rest, 4 * BLOCK * p->most);
        bench[t].words = carved(&rest, 4 * BLOCK / PAIR * p->most);
        bench[t].factor = carved(&rest, 2 * PANEL * p->most);
        bench[t].x = carved(&rest, widened * BLOCK * p->inputs);
        bench[t].dropped = carved(&rest, size * BLOCK * p->inputs);
        bench[t].grad = carved(&rest, backward ? size * BLOCK * p->outputs : 0);
        bench[t].low = carved(&rest, widened * BLOCK * p->most);
        bench[t].decoded = carved(&rest, p->weight.code == DENSE ? 0 : 2 * PANEL * sum);
    }
    return rest;
}

static int call(Pass p) {
    i64 threads = omp_get_max_threads();
    for (i64 i = 0; i < p.count; i++) p.most = greater(p.most, width(p.parts[i].rank));
    i64 panels = (columns_of(&p) + PANEL - 1) / PANEL, each = sizeof(number) * PANEL * (sum_of(&p) + p.count * p.most);
    p.at_once = greater(1, lesser(panels, LAID_OUT / each));
    Bench bench[threads];
    char *memory = aligned_alloc(64, ROUND_UP((i64)furnish(&p, bench, threads, 0), 64) + 64);
    if (!memory) return 1;
    furnish(&p, bench, threads, memory);
#pragma omp parallel num_threads(threads)
    {
        unsigned before = without_denormals();
        run(&p, bench[omp_get_thread_num()]);
        if (p.grad.data) add_up(&p);
        _mm_setcsr(before);
    }
    free(memory);
    return 0;
}

int WAY(lowrank_forward)(Rows x, Weight weight, const float *bias, const Part *parts, i64 count, bf16 *y, i64 rows, i64 inputs,
                    i64 outputs) {
    return call((Pass){.weight = weight, .parts = parts, .count = count, .rows = rows, .inputs = inputs,
                       .outputs = outputs, .x = x, .bias = bias, .out = y});
}

/* `y` is what forward gave, and is read under gains; `dx` [rows, inputs] may be NULL, and so may each grad_A and grad_B. */
int WAY(lowrank_backward)(Rows grad, Rows x, const bf16 *y, Weight weight, const float *bias, const Part *parts, i64 count,
                     bf16 *dx, i64 rows, i64 inputs, i64 outputs) {
    return call((Pass){.weight = weight, .parts = parts, .count = count, .rows = rows, .inputs = inputs,
                       .outputs = outputs, .x = x, .grad = grad, .y = y, .bias = bias, .out = dx});
}
#endif
