/* What happens between the products, one pass over memory each: RMS norm, gated activation, rotary
 * embedding, softmax cross-entropy.
 *
 * bfloat16 in and out, float32 inside, so each result is rounded once.
 */
#if defined(__x86_64__) && defined(__GNUC__)
#include <omp.h>

#include "vector.h"

/* y = x / rms(x) · (offset + weight) over rows of `width`; `inverse` [rows] keeps 1/rms for the backward pass. */
void norm_forward(const bf16 *x, const bf16 *weight, bf16 *y, float *inverse, i64 rows, i64 width, float eps,
                  float offset) {
#pragma omp parallel for
    for (i64 t = 0; t < rows; t++) {
        const bf16 *row = x + t * width;
        __m512 squares = _mm512_setzero_ps();
        for (i64 d = 0; d < width; d += LANES) {
            __m512 v = load_some(row + d, lanes_left(d, width));
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        inverse[t] = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / width + eps);
        for (i64 d = 0; d < width; d += LANES) {
            __mmask16 some = lanes_left(d, width);
            __m512 gain = _mm512_add_ps(load_some(weight + d, some), all(offset));
            store_some(y + t * width + d, _mm512_mul_ps(_mm512_mul_ps(load_some(row + d, some), all(inverse[t])), gain),
                       some);
        }
    }
}

/* dx = (g∘gain - x · inverse² · mean(g∘gain∘x)) · inverse; the weight is frozen and gets no gradient. */
void norm_backward(const bf16 *grad, const bf16 *x, const bf16 *weight, const float *inverse, bf16 *grad_x, i64 rows,
                   i64 width, float offset) {
#pragma omp parallel for
    for (i64 t = 0; t < rows; t++) {
        const bf16 *row = x + t * width, *g = grad + t * width;
        __m512 dot = _mm512_setzero_ps();
        for (i64 d = 0; d < width; d += LANES) {
            __mmask16 some = lanes_left(d, width);
            __m512 gain = _mm512_add_ps(load_some(weight + d, some), all(offset));
            dot = _mm512_fmadd_ps(_mm512_mul_ps(load_some(g + d, some), gain), load_some(row + d, some), dot);
        }
        float r = inverse[t], along = _mm512_reduce_add_ps(dot) * r * r * r / width;
        for (i64 d = 0; d < width; d += LANES) {
            __mmask16 some = lanes_left(d, width);
            __m512 gain = _mm512_add_ps(load_some(weight + d, some), all(offset));
            __m512 across = _mm512_mul_ps(_mm512_mul_ps(load_some(g + d, some), gain), all(r));
            store_some(grad_x + t * width + d, _mm512_fnmadd_ps(load_some(row + d, some), all(along), across), some);
        }
    }
}

/* y = gain ∘ y + offset over rows of `width`, in place; `offset` may be NULL. */
void gain_forward(bf16 *y, const float *gain, const float *offset, i64 rows, i64 width) {
#pragma omp parallel for
    for (i64 t = 0; t < rows; t++)
        for (i64 d = 0; d < width; d += LANES) {
            __mmask16 some = lanes_left(d, width);
            __m512 more = offset ? _mm512_maskz_loadu_ps(some, offset + d) : _mm512_setzero_ps();
            bf16 *at = y + t * width + d;
            store_some(at, _mm512_fmadd_ps(load_some(at, some), _mm512_maskz_loadu_ps(some, gain + d), more), some);
        }
}

/* dz = gain ∘ g, and `sums` [width] = Σ g∘y over the rows, each thread its own and then added in their order.
 * Returns 0 if there is no memory. */
int gain_backward(const bf16 *g, const bf16 *y, const float *gain, bf16 *dz, float *sums, i64 rows, i64 width) {
    i64 threads = omp_get_max_threads(), padded = ROUND_UP(width, LANES);
    float *own = aligned_alloc(64, 4 * threads * padded);
    if (!own) return 0;
    memset(own, 0, 4 * threads * padded);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 t = 0; t < rows; t++) {
        float *sum = own + omp_get_thread_num() * padded;
        for (i64 d = 0; d < width; d += LANES) {
            __mmask16 some = lanes_left(d, width);
            __m512 slope = load_some(g + t * width + d, some), value = load_some(y + t * width + d, some);
            _mm512_storeu_ps(sum + d, _mm512_fmadd_ps(slope, value, _mm512_loadu_ps(sum + d)));
            store_some(dz + t * width + d, _mm512_mul_ps(slope, _mm512_maskz_loadu_ps(some, gain + d)), some);
        }
    }
    for (i64 d = 0; d < width; d++) {
        sums[d] = 0;
        for (i64 t = 0; t < threads; t++) sums[d] += own[t * padded + d];
    }
    free(own);
    return 1;
}

/* Activations and their slopes.  SiLU: x·σ(x).  GELU by tanh: x·σ(2u), u = √(2/π)(x + 0.044715 x³). */
enum { SILU = 0, GELU_TANH = 1 };

INLINE __m512 activation(__m512 x, i64 kind, __m512 *slope) {
    __m512 one = all(1.0f), inner = x, turn = one;
    if (kind == GELU_TANH) {
        __m512 near = _mm512_min_ps(all(30.0f), _mm512_max_ps(all(-30.0f), x)); /* saturated beyond; x³ stays finite */
        __m512 square = _mm512_mul_ps(near, near);
        inner = _mm512_mul_ps(_mm512_mul_ps(near, all(1.5957691216f)), _mm512_fmadd_ps(square, all(0.044715f), one));
        turn = _mm512_mul_ps(all(1.5957691216f), _mm512_fmadd_ps(square, all(0.134145f), one));
    }
    __m512 s = sigmoid(inner), value = _mm512_mul_ps(x, s);
    *slope = _mm512_fmadd_ps(_mm512_mul_ps(value, turn), _mm512_sub_ps(one, s), s);
    return value;
}

/* y = act(gate) ∘ up over n elements. */
void gate_forward(const bf16 *gate, const bf16 *up, bf16 *y, i64 n, i64 kind) {
#pragma omp parallel for
    for (i64 i = 0; i < n; i += LANES) {
        __mmask16 some = lanes_left(i, n);
        __m512 slope;
        store_some(y + i, _mm512_mul_ps(activation(load_some(gate + i, some), kind, &slope), load_some(up + i, some)),
                   some);
    }
}

void gate_backward(const bf16 *grad, const bf16 *gate, const bf16 *up, bf16 *grad_gate, bf16 *grad_up, i64 n, i64 kind) {
#pragma omp parallel for
    for (i64 i = 0; i < n; i += LANES) {
        __mmask16 some = lanes_left(i, n);
        __m512 g = load_some(grad + i, some), slope, value = activation(load_some(gate + i, some), kind, &slope);
        store_some(grad_up + i, _mm512_mul_ps(g, value), some);
        store_some(grad_gate + i, _mm512_mul_ps(_mm512_mul_ps(g, load_some(up + i, some)), slope), some);
    }
}

/* y1 = x1∘cos1 - x2∘sin1 and y2 = x2∘cos2 + x1∘sin2 for the halves 1, 2 of each row of x and y [batch, heads, tokens,
 * width], with strides of the first three; cos and sin [batch, tokens, width], whose own batch stride is 0 where all
 * share them.  Backward is the transposed turn: sin1 and sin2 change places and signs. */
void rotary(const bf16 *x, bf16 *y, const bf16 *cosine, const bf16 *sine, const i64 *x_strides, const i64 *y_strides,
            i64 angle_stride, i64 batch, i64 heads, i64 tokens, i64 width, i64 backward) {
    i64 half = width / 2;
#pragma omp parallel for
    for (i64 row = 0; row < batch * tokens; row++) {
        i64 b = row / tokens, t = row % tokens, angles = b * angle_stride + t * width;
        const bf16 *from = x + b * x_strides[0] + t * x_strides[2];
        bf16 *to = y + b * y_strides[0] + t * y_strides[2];
        for (i64 d = 0; d < half; d += LANES) {
            __mmask16 some = lanes_left(d, half);
            const bf16 *c = cosine + angles + d, *s = sine + angles + d;
            __m512 c1 = load_some(c, some), c2 = load_some(c + half, some);
            __m512 s1 = load_some(backward ? s + half : s, some), s2 = load_some(backward ? s : s + half, some);
            if (backward) s1 = _mm512_sub_ps(_mm512_setzero_ps(), s1), s2 = _mm512_sub_ps(_mm512_setzero_ps(), s2);
            for (i64 h = 0; h < heads; h++) {
                const bf16 *in = from + h * x_strides[1] + d;
                bf16 *out = to + h * y_strides[1] + d;
                __m512 x1 = load_some(in, some), x2 = load_some(in + half, some);
                store_some(out, _mm512_fnmadd_ps(x2, s1, _mm512_mul_ps(x1, c1)), some);
                store_some(out + half, _mm512_fmadd_ps(x1, s2, _mm512_mul_ps(x2, c2)), some);
            }
        }
    }
}

/* loss[t] = logsumexp(logits[t]) - logits[t, target[t]].  With `grad`, logits[t] becomes weight[t]·(softmax - onehot). */
void cross_entropy(bf16 *logits, const i64 *target, const float *weight, float *loss, i64 rows, i64 classes, i64 grad) {
#pragma omp parallel for
    for (i64 t = 0; t < rows; t++) {
        bf16 *row = logits + t * classes;
        __m512 high = all(-INFINITY), sum = _mm512_setzero_ps();
        for (i64 j = 0; j < classes; j += LANES) {
            __mmask16 some = lanes_left(j, classes);
            high = _mm512_mask_max_ps(high, some, high, load_some(row + j, some));
        }
        float most = _mm512_reduce_max_ps(high);
        for (i64 j = 0; j < classes; j += LANES) {
            __mmask16 some = lanes_left(j, classes);
            sum = _mm512_mask_add_ps(sum, some, sum, exponential(_mm512_sub_ps(load_some(row + j, some), all(most))));
        }
        uint32_t bits = (uint32_t)row[target[t]] << 16;
        float whole = most + logf(_mm512_reduce_add_ps(sum)), right;
        memcpy(&right, &bits, 4);
        loss[t] = whole - right;
        if (!grad) continue;
        for (i64 j = 0; j < classes; j += LANES) {
            __mmask16 some = lanes_left(j, classes);
            __m512 p = exponential(_mm512_sub_ps(load_some(row + j, some), all(whole)));
            store_some(row + j, _mm512_mul_ps(p, all(weight[t])), some);
        }
        store_some(row + target[t], all((expf(right - whole) - 1.0f) * weight[t]), 1);
    }
}

int rankwise_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
}

/* Whether the products of training are faster in wide words than in pairs (words.h).  The maker decides: what a model's
 * instructions cost is not to be asked, and a measurement could turn out differently when a run is resumed. */
int rankwise_widens(void) { return __builtin_cpu_is("intel") != 0; }
#else
int rankwise_supported(void) { return 0; }
int rankwise_widens(void) { return 0; }
#endif
