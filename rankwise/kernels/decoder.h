/* One layer of a decoder, for one number format: included behind serving.h, whose parts it puts together. */

/* ── what happens between the products ────────────────────────────────────────────────────────────────────────── */

/* y = x / rms(x) · (offset + weight) of one row. */
static void NAME(norm_row)(const NUM *x, const NUM *weight, NUM *y, i64 width, float eps, float offset) {
    __m512 squares = _mm512_setzero_ps();
    for (i64 d = 0; d < width; d += LANES) {
        __m512 v = READ(x + d, lanes_left(d, width));
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    float inverse = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / width + eps);
    for (i64 d = 0; d < width; d += LANES) {
        __mmask16 some = lanes_left(d, width);
        __m512 gain = _mm512_add_ps(READ(weight + d, some), all(offset));
        STORE(y + d, _mm512_mul_ps(_mm512_mul_ps(READ(x + d, some), all(inverse)), gain), some);
    }
}

/* One head turned in place by its token's angles, after its norm where it has one. */
static void NAME(turn)(NUM *x, const NUM *cosines, const NUM *sines, const NUM *weight, i64 width, float eps,
                       float offset) {
    if (weight) NAME(norm_row)(x, weight, x, width, eps, offset);
    i64 half = width / 2;
    for (i64 d = 0; d < half; d += LANES) {
        __mmask16 some = lanes_left(d, half);
        __m512 a = READ(x + d, some), b = READ(x + half + d, some);
        __m512 ca = READ(cosines + d, some), cb = READ(cosines + half + d, some);
        __m512 sa = READ(sines + d, some), sb = READ(sines + half + d, some);
        STORE(x + d, _mm512_fnmadd_ps(b, sa, _mm512_mul_ps(a, ca)), some);
        STORE(x + half + d, _mm512_fmadd_ps(a, sb, _mm512_mul_ps(b, cb)), some);
    }
}

/* Tiles from … to - 1 of act(gate) ∘ up; both products have been shrunk. */
static void NAME(gated)(const Layer *layer, const i64 *adapters, const NUM *x, i64 rows, const NUM *gates,
                        const NUM *ups, i64 step, i64 kind, NUM *y, i64 from, i64 to) {
    float sums[2][ROWS * LANES];
    i64 outputs = layer->gate.outputs;
    Coming coming = {{&layer->down}, 1, 0, tiles_of(&layer->gate)};
    for (i64 first = from * LANES; first < to * LANES; first += LANES) {
        __mmask16 some = lanes_left(first, outputs);
        for (i64 begin = 0; begin < rows; begin += ROWS) {
            i64 many = rows - begin < ROWS ? rows - begin : ROWS, at_ = begin * layer->gate.inputs;
            NAME(tile)(&layer->gate, adapters + begin, x + at_, many, gates + begin * step, step, first, &coming, sums[0]);
            NAME(tile)(&layer->up, adapters + begin, x + at_, many, ups + begin * step, step, first, 0, sums[1]);
            for (i64 n = 0; n < many; n++) {
                __m512 gate = ROUNDED(_mm512_loadu_ps(sums[0] + n * LANES)), up = _mm512_loadu_ps(sums[1] + n * LANES);
                STORE(y + (begin + n) * outputs + first, _mm512_mul_ps(activated(gate, kind), ROUNDED(up)), some);
            }
        }
    }
}

/* ── a whole step ─────────────────────────────────────────────────────────────────────────────────────────────── */

/* One layer in ten phases. */
static void NAME(layer)(const Decoder *d, const Layer *layer, const Layer *following, const Past *shared, const i64 *adapters, i64 rows,
                        const Room *room, NUM *h, const NUM *cosines, const NUM *sines, float *scores, Phase *phases) {
    Past own = *shared, *past = &own;
    own.window = layer->window;
    i64 width = past->width, heads = past->heads, groups = past->groups, size = d->hidden, step = room->step;
    NUM *x = room->x, *to[3] = {room->q, room->k, room->v}, *out = room->out, *wide = room->wide, *shrinks[3];
    const Site *three[3] = {&layer->q, &layer->k, &layer->v};
    for (int i = 0; i < 3; i++) shrinks[i] = (NUM *)room->shrinks + i * rows * step;

    EACH(phases, rows) {
        NUM *row = x + task * size;
        NAME(norm_row)(h + task * size, layer->norm1, row, size, d->eps, d->offset);
        for (int i = 0; i < 3; i++) NAME(shrink)(three[i], adapters[task], row, shrinks[i] + task * step);
    }
    await(phases++, rows);

    i64 parts[4] = {0}, before[4] = {0}, chunks[3];
    for (int i = 0; i < 3; i++) {
        i64 tiles = tiles_of(three[i]);
        chunks[i] = share(tiles, SOME);
        before[i + 1] = before[i] + tiles;
        parts[i + 1] = parts[i] + pieces(tiles, chunks[i]);
    }
    EACH(phases, parts[3]) {
        int i = task >= parts[2] ? 2 : task >= parts[1];
        i64 from = (task - parts[i]) * chunks[i];
        Coming coming = {{&layer->o}, 1, before[i], before[3]};
        NAME(outputs)(three[i], adapters, x, rows, shrinks[i], step, to[i], 0, from, least(tiles_of(three[i]), from + chunks[i]),
                      &coming);
    }
    await(phases++, parts[3]);

    EACH(phases, rows) {
        NUM *q = to[0] + task * heads * width, *k = to[1] + task * groups * width, *v = to[2] + task * groups * width;
        const NUM *c = cosines + task * width, *s = sines + task * width;
        for (i64 i = 0; i < heads; i++) NAME(turn)(q + i * width, c, s, layer->q_norm, width, d->eps, d->offset);
        for (i64 i = 0; i < groups; i++) NAME(turn)(k + i * width, c, s, layer->k_norm, width, d->eps, d->offset);
        NAME(keep)(past, task, (NAME(Heads_)){k, width}, (NAME(Heads_)){v, width}, layer->keys, layer->values);
    }
    await(phases++, rows);

    EACH(phases, rows * groups) {
        i64 n = task / groups * heads * width;
        NAME(attend)(past, task / groups, task % groups, (NAME(Heads_)){to[0] + n, width}, layer->keys, layer->values,
                     out + n, width, scores);
    }
    await(phases++, rows * groups);

    if (step) {
        EACH(phases, rows) NAME(shrink)(&layer->o, adapters[task], out + task * heads * width, shrinks[0] + task * step);
        await(phases++, rows);
    }
    i64 tiles = tiles_of(&layer->o), each = share(tiles, SOME), tasks = pieces(tiles, each);
    Coming two = {{&layer->gate, &layer->up}, 2, 0, tiles};
    EACH(phases, tasks)
        NAME(outputs)(&layer->o, adapters, out, rows, shrinks[0], step, h, 1, task * each, least(tiles, (task + 1) * each),
                      &two);
    await(phases++, tasks);

    EACH(phases, rows) {
        NUM *row = x + task * size;
        NAME(norm_row)(h + task * size, layer->norm2, row, size, d->eps, d->offset);
        NAME(shrink)(&layer->gate, adapters[task], row, shrinks[0] + task * step);
        NAME(shrink)(&layer->up, adapters[task], row, shrinks[1] + task * step);
    }
    await(phases++, rows);

    tiles = tiles_of(&layer->gate), each = share(tiles, SOME), tasks = pieces(tiles, each);
    EACH(phases, tasks)
        NAME(gated)(layer, adapters, x, rows, shrinks[0], shrinks[1], step, d->activation, wide, task * each,
                    least(tiles, (task + 1) * each));
    await(phases++, tasks);

    if (step) {
        i64 inputs = layer->down.inputs;
        EACH(phases, rows) NAME(shrink)(&layer->down, adapters[task], wide + task * inputs, shrinks[0] + task * step);
        await(phases++, rows);
    }
    tiles = tiles_of(&layer->down), each = share(tiles, SOME), tasks = pieces(tiles, each);
    Coming next = {{&following->q, &following->k, &following->v}, 3, 0, tiles};
    EACH(phases, tasks)
        NAME(outputs)(&layer->down, adapters, wide, rows, shrinks[0], step, h, 1, task * each,
                      least(tiles, (task + 1) * each), &next);
    await(phases, tasks);
}
