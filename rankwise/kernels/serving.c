/* A step of serving: a few rows, each through an adapter of its own, through one base.
 *
 *   y[n] = gain ∘ (x[n]·Wᵀ + (x[n]·Aᵀ)·(s·B)ᵀ) + bias        A, s·B, gain: of the adapter of row n, or none
 *
 * serving.h and decoder.h have the parts; here they are made for bfloat16 and float32 and put together: one product, the
 * products of adapters alone, attention through the cache, and all layers of a decoder in one call.
 *
 * bfloat16 in and out with float32 sums, or float32 throughout.  A row's numbers do not depend on the rows beside it.
 */
#if defined(__x86_64__) && defined(__GNUC__)
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>

#include "vector.h"

enum {
    ROWS = 64,     /* rows through a tile of W at a time */
    SOME = 6,      /* tiles of a task at most: the tile that is sent for ahead is its next one, but behind its last */
    TOGETHER = 32, /* rows of a task that adds to a product at most */
    PHASES = 10    /* of a layer */
};

/* What threads do between two waits, in tasks: each thread takes the next one that nobody has taken.  A thread that does
 * not come, because another process has its processor, is not waited for unless it has a task in hand; at a barrier of
 * OpenMP's everybody would wait for it, hundreds of times a step. */
typedef struct {
    _Alignas(64) _Atomic i64 next;
    _Alignas(64) _Atomic i64 done;
} Phase;

#define EACH(phase, tasks)                                                                                             \
    for (i64 task; (task = atomic_fetch_add(&(phase)->next, 1)) < (tasks); atomic_fetch_add(&(phase)->done, 1))

static void await(Phase *phase, i64 tasks) {
    for (i64 turns = 0; atomic_load_explicit(&phase->done, memory_order_acquire) < tasks; turns++) {
        _mm_pause();
        if (turns > 4096) sched_yield();
    }
}

static i64 least(i64 a, i64 b) { return a < b ? a : b; }

static i64 pieces(i64 all, i64 each) { return (all + each - 1) / each; }

/* How much of `all` a task takes, `most` at most: there are two tasks for each thread at least, where it can be. */
static i64 share(i64 all, i64 most) {
    i64 half = all / (2 * omp_get_num_threads());
    return half < 1 ? 1 : least(half, most);
}

/* One adapter's at one layer, each in the order in which it is read: A by sixteen of its rows and at the end by eight,
 * [inputs / WIDE][16 or 8][WIDE] with zeros behind; s·B by sixteen outputs, words [rank / PAIR][16].  The rank is a
 * multiple of 8, 0 for none.  grouped.py has the same. */
typedef struct {
    const void *A, *B;
    const float *gain; /* [outputs] or NULL */
    i64 rank;
} Factors;

/* The same before they are laid out: A [rank, inputs], B [outputs, rank], s, and where to. */
typedef struct {
    const float *A, *B;
    void *to_A, *to_B;
    i64 rank, inputs, outputs;
    float scale;
} Plain;

typedef struct {
    const void *weight; /* [outputs, inputs] */
    const float *bias;
    i64 inputs, outputs;
    const Factors *factors; /* of adapters 0 … count - 1; those behind have nothing here */
    i64 count;
} Site;

/* Whose A come next, over so many tiles, of which `done` are before this product's own. */
typedef struct {
    const Site *sites[3];
    i64 count, done, tiles;
} Coming;

/* Token n of a step sees the first `seen[n]` tokens of its request, itself the last of them; token i of these lies in slot
 * tables[begins[n] + i / block] · block + i % block. */
typedef struct {
    const i64 *seen, *begins;
    const int32_t *tables;
    i64 block, heads, groups, width, window;
    float scale, softcap;
} Past;

typedef struct {
    const void *norm1, *norm2, *q_norm, *k_norm;
    Site q, k, v, o, gate, up, down;
    void *keys, *values;
    i64 window;
} Layer;

typedef struct {
    const Layer *layers;
    i64 count, hidden, activation;
    float eps, offset;
} Decoder;

typedef struct {
    void *x, *q, *k, *v, *out, *wide, *shrinks;
    float *scores;
    i64 step; /* of a shrink */
} Room;

/* So many bytes are on their way into the second cache. */
INLINE void fetch(const void *from, i64 bytes) {
    const char *line = from, *end = line + bytes;
    for (; line + 512 <= end; line += 512) UNROLL for (int i = 0; i < 8; i++) _mm_prefetch(line + 64 * i, _MM_HINT_T1);
    for (; line < end; line += 64) _mm_prefetch(line, _MM_HINT_T1);
}

static i64 tiles_of(const Site *site) { return pieces(site->outputs, LANES); }

/* Sixteen sums across the lanes of as many vectors. */
INLINE __m512 across(__m512 v[16]) {
    UNROLL for (int i = 0; i < 8; i++)
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    UNROLL for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
        v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    UNROLL for (int i = 0; i < 2; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}

/* SiLU, or GELU by tanh, as rowwise.c has them. */
INLINE __m512 activated(__m512 x, i64 kind) {
    __m512 inner = x;
    if (kind) {
        __m512 near = _mm512_min_ps(all(30.0f), _mm512_max_ps(all(-30.0f), x));
        __m512 square = _mm512_mul_ps(near, near);
        inner = _mm512_mul_ps(_mm512_mul_ps(near, all(1.5957691216f)), _mm512_fmadd_ps(square, all(0.044715f), all(1)));
    }
    return _mm512_mul_ps(x, sigmoid(inner));
}

INLINE __mmask32 numbers_left(i64 left) { return left >= 32 ? 0xffffffffu : (1u << left) - 1; }

/* To the nearest, ties to even, as torch rounds; the processor's own instruction has no denormals. */
INLINE bf16 rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#define NUM bf16
#define NVEC __m512bh
#define WIDE 32
#define PAIR 2
#define NAME(name) name##_b
#define LOAD_WHOLE(p) ((__m512bh)_mm512_loadu_si512(p))
#define LOAD_PART(p, left) ((__m512bh)_mm512_maskz_loadu_epi16(numbers_left(left), p))
#define DOT(sum, a, b) _mm512_dpbf16_ps(sum, a, b)
#define EXPAND(sum, words, word) _mm512_dpbf16_ps(sum, (__m512bh)(words), (__m512bh)(word))
#define READ(p, some) load_some(p, some)
#define STORE(p, v, some) store_some(p, v, some)
#define OF(x) rounded(x)
#define ROUNDED(v) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)), 16))
#include "serving.h"
#include "decoder.h"
#undef NUM
#undef NVEC
#undef WIDE
#undef PAIR
#undef NAME
#undef LOAD_WHOLE
#undef LOAD_PART
#undef DOT
#undef EXPAND
#undef READ
#undef STORE
#undef OF
#undef ROUNDED

#define NUM float
#define NVEC __m512
#define WIDE 16
#define PAIR 1
#define NAME(name) name##_f
#define LOAD_WHOLE(p) _mm512_loadu_ps(p)
#define LOAD_PART(p, left) _mm512_maskz_loadu_ps(lanes_left(0, left), p)
#define DOT(sum, a, b) _mm512_fmadd_ps(a, b, sum)
#define EXPAND(sum, words, word) _mm512_fmadd_ps(_mm512_castsi512_ps(words), _mm512_castsi512_ps(word), sum)
#define READ(p, some) _mm512_maskz_loadu_ps(some, p)
#define STORE(p, v, some) _mm512_mask_storeu_ps(p, some, v)
#define OF(x) (x)
#define ROUNDED(v) (v)
#include "serving.h"
#include "decoder.h"

/* ── one call ─────────────────────────────────────────────────────────────────────────────────────────────────── */

/* The greatest rank that a row meets; 0 where no row has an adapter here. */
static i64 greatest_rank(const Site *site, const i64 *adapters, i64 rows) {
    i64 most = 0;
    for (i64 n = 0; n < rows; n++)
        if (adapters[n] >= 0 && adapters[n] < site->count && site->factors[adapters[n]].rank > most) most = site->factors[adapters[n]].rank;
    return most;
}

/* y [rows, outputs] of x [rows, inputs]; with `weight` NULL the adapters' part is added to what y holds.  1 if there is
 * no memory. */
int grouped_product(const Site *site, const i64 *adapters, const void *x, void *y, i64 rows, int wide) {
    i64 step = greatest_rank(site, adapters, rows), each = wide ? 4 : 2;
    if (!step && !site->weight) return 0;
    void *shrinks = step ? aligned_alloc(64, ROUND_UP(rows * step * each, 64)) : 0;
    if (step && !shrinks) return 1;
    Phase phases[2] = {0};
#pragma omp parallel
    {
        if (wide) product_f(site, adapters, x, y, rows, shrinks, step, phases);
        else product_b(site, adapters, x, y, rows, shrinks, step, phases);
    }
    free(shrinks);
    return 0;
}

/* An adapter's factors at all its layers; all numbers are finite. */
void lay_out(const Plain *parts, i64 count, int wide) {
#pragma omp parallel for schedule(dynamic)
    for (i64 i = 0; i < count; i++) {
        if (wide) lay_out_f(parts + i);
        else lay_out_b(parts + i);
    }
}

/* Where the heads of the tokens of a step lie: strides in elements. */
typedef struct {
    const void *data;
    i64 token, head;
} Heads;

#define ATTEND(S, NUM)                                                                                                 \
    _Pragma("omp for schedule(static)") for (i64 n = 0; n < tokens; n++) keep_##S(                                     \
        past, n, (Heads__##S){(const NUM *)k.data + n * k.token, k.head},                                             \
        (Heads__##S){(const NUM *)v.data + n * v.token, v.head}, keys, values);                                       \
    _Pragma("omp for schedule(dynamic)") for (i64 task = 0; task < (last - first) * past->groups; task++) {            \
        i64 n = first + task / past->groups;                                                                           \
        attend_##S(past, n, task % past->groups, (Heads__##S){(const NUM *)q.data + n * q.token, q.head}, keys,       \
                   values, (NUM *)out + n * past->heads * past->width, past->width, scores + omp_get_thread_num() * most); \
    }

/* Keeps k and v of all tokens of a step; tokens first … last - 1 then attend, out [tokens, heads, width].  1 if there is no
 * memory. */
int cached_attention(const Past *past, Heads q, Heads k, Heads v, void *keys, void *values, void *out, i64 tokens,
                     i64 first, i64 last, int wide) {
    i64 most = 0;
    for (i64 n = first; n < last; n++)
        if (past->seen[n] > most) most = past->seen[n];
    most = ROUND_UP(most, LANES) + 2 * LANES;
    float *scores = aligned_alloc(64, 4 * most * omp_get_max_threads());
    if (!scores) return 1;
#pragma omp parallel
    {
        if (wide) {
            ATTEND(f, float)
        } else {
            ATTEND(b, bf16)
        }
    }
    free(scores);
    return 0;
}

/* All layers of a decoder, in place: h [rows, hidden], cosines and sines [rows, width].  1 if there is no memory. */
int decoder_step(const Decoder *decoder, const Past *past, const i64 *adapters, i64 rows, void *h, const void *cosines,
                 const void *sines, int wide) {
    i64 step = 0, most = 0, each = wide ? 4 : 2, threads = omp_get_max_threads();
    for (i64 i = 0; i < decoder->count; i++) {
        const Layer *layer = decoder->layers + i;
        const Site *sites[7] = {&layer->q, &layer->k, &layer->v, &layer->o, &layer->gate, &layer->up, &layer->down};
        for (int j = 0; j < 7; j++) {
            i64 rank = greatest_rank(sites[j], adapters, rows);
            if (rank > step) step = rank;
        }
    }
    for (i64 n = 0; n < rows; n++)
        if (past->seen[n] > most) most = past->seen[n];
    most = ROUND_UP(most, LANES) + 2 * LANES;
    i64 heads = past->heads * past->width, groups = past->groups * past->width, outputs = decoder->layers[0].gate.outputs;
    i64 sizes[7] = {decoder->hidden, heads, groups, groups, heads, outputs, 3 * step}, whole = 4 * most * threads;
    for (int i = 0; i < 7; i++) whole += ROUND_UP(rows * sizes[i] * each, 64);
    i64 waits = sizeof(Phase) * PHASES * decoder->count;
    char *memory = aligned_alloc(64, ROUND_UP(whole + waits, 64));
    if (!memory) return 1;
    memset(memory, 0, waits);
    void *places[7];
    char *next = memory + waits;
    for (int i = 0; i < 7; i++) places[i] = next, next += ROUND_UP(rows * sizes[i] * each, 64);
    Room room = {places[0], places[1], places[2], places[3], places[4], places[5], places[6], (float *)next, step};
#pragma omp parallel
    {
        float *scores = room.scores + omp_get_thread_num() * most;
        for (i64 i = 0; i < decoder->count; i++) {
            Phase *phases = (Phase *)memory + i * PHASES;
            const Layer *layer = decoder->layers + i, *next = decoder->layers + (i + 1) % decoder->count;
            if (wide) layer_f(decoder, layer, next, past, adapters, rows, &room, h, cosines, sines, scores, phases);
            else layer_b(decoder, layer, next, past, adapters, rows, &room, h, cosines, sines, scores, phases);
        }
    }
    free(memory);
    return 0;
}
#endif
