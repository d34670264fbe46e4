/* attention.c - scaled dot-product attention, forward: y = softmax(scale q kᵀ + mask) v.
 *
 * See attention.h for how the work is cut. Each (batch, kv head) packs its keys and values once.
 */
#include "kernels/cpu/attention.h"

#include "kernels/checks.h"
#include "kernels/scratch.h"
#include "kernels/philox.h"
#include "kernels/scalar.h"

/* ---- checking */

int attention_check(attention *a, const char *what, const ds_tensor *q, const ds_tensor *k,
                    const ds_tensor *v, const ds_tensor *lse, const ds_tensor *mask, int causal,
                    double scale, double p, uint64_t seed, uint64_t offset)
{
    ds_attention_sizes z;
    int rc;

    *a = (attention){.q = q,
                     .k = k,
                     .v = v,
                     .mask = mask,
                     .lse = lse,
                     .causal = causal,
                     .scale = scale,
                     .p = p,
                     .seed = seed,
                     .offset = offset};
    if (!ds_is_float(q->dtype))
        return ds_fail(DS_EINVAL, "%s: the query is %s, must be f32, bf16, f16 or f64", what,
                       ds_name_of(q->dtype));
    if ((rc = ds_check_attention(&z, what, q, k, v, lse, p, ATTENTION_MAX_D, "")) < 0)
        return rc;
    a->batches = z.B;
    a->T = z.T;
    a->H = z.H;
    a->D = z.D;
    a->S = z.S;
    a->G = z.G;
    a->ratio = a->H / a->G;
    a->row_count = a->T * a->ratio;
    a->pairs = ATTENTION_PAIRS && q->dtype == DS_BF16;
    a->depth = a->pairs ? (a->D + 1) / 2 : a->D;
    a->wide = round_up(a->D, VF_LANES);
    a->keys = round_up(a->S, VF_LANES);
    return ds_check_attention_mask(a->mask_stride, what, mask, &z);
}

/* ---- masks, dropout */

void attention_prepare(float *s, const attention *a, const block *b, int64_t i, int64_t key,
                       int64_t seen)
{
    int64_t head, t, stride = a->mask_stride[3];
    float scale = (float)a->scale, added[STRIP] = {0};

    if (a->mask) {
        const char *m;

        block_place(&head, &t, a, b, i);
        m = mask_at(a, b->batch, head, t, key);
        if (a->mask->dtype == DS_BOOL)
            for (int64_t j = 0; j < seen; j++)
                added[j] = m[j * stride] ? 0 : -INFINITY;
        else
            ds_row_load(added, m, a->mask->dtype, seen, stride);
    }
    for (int64_t j = 0; j < seen; j++)
        s[j] = s[j] * scale + added[j];
}

/* n <= STRIP. Whole Philox blocks are made; by lane, so that the compiler's vectors hold one
 * lane each of several blocks. */
static void keep_strip(float *keep, const attention *a, uint64_t element, int64_t n)
{
    uint32_t lane[4][STRIP / 4 + 1];
    uint64_t begin = element / 4;
    int blocks = (int)((element + (uint64_t)n + 3) / 4 - begin);
    int32_t least = (int32_t)ceil(a->p * 0x1p24); /* as in random.c */
    float kept = (float)(1 / (1 - a->p));

#pragma omp simd
    for (int i = 0; i < blocks; i++) {
        ds_philox_block x = ds_philox(a->seed, a->offset + begin + (uint64_t)i);

        lane[0][i] = x.lane[0];
        lane[1][i] = x.lane[1];
        lane[2][i] = x.lane[2];
        lane[3][i] = x.lane[3];
    }
    for (int64_t j = 0; j < n; j++) {
        uint64_t e = element % 4 + (uint64_t)j;

        keep[j] = (int32_t)(lane[e % 4][e / 4] >> 8) >= least ? kept : 0;
    }
}

void attention_keep(float *keep, const attention *a, int64_t batch, int64_t head, int64_t t,
                    int64_t key, int64_t n)
{
    int64_t element = ((batch * a->H + head) * a->T + t) * a->S + key;

    for (int64_t j = 0; j < n; j += STRIP)
        keep_strip(keep + j, a, (uint64_t)(element + j), min64(STRIP, n - j));
}

/* ---- softmax, of as many rows at once as a vector has lanes: their sums and maxima are found by
 * transposing, row by row the processor would wait for each. */

/* A thread's own memory. */
typedef struct work {
    float *k;    /* columns [keys / lanes][depth][lanes] */
    float *v;    /* rows [wide / lanes][keys in units][lanes] */
    float *q;    /* columns [BLOCK / lanes][depth][lanes] */
    float *s;    /* [BLOCK][STRIP_LD]: scores, then weights (bf16, in the pairs form) */
    float *o;    /* [BLOCK][wide] */
    float *keep; /* [STRIP] */
    float *m;    /* [BLOCK]: highest exponent of 2 so far */
    float *l;    /* [BLOCK]: sum of weights so far, relative to 2^m */
    soon soon;
} work;

/* Fills *w from `memory`, returns how many floats that takes. */
static int64_t carve(work *w, float *memory, const attention *a)
{
    int64_t in_unit = a->pairs ? 2 : 1;
    const int64_t sizes[] = {a->keys * a->depth,
                             a->wide * a->keys / in_unit,
                             BLOCK * a->depth,
                             BLOCK * STRIP_LD,
                             BLOCK * a->wide,
                             STRIP,
                             BLOCK,
                             BLOCK};
    float **to[] = {&w->k, &w->v, &w->q, &w->s, &w->o, &w->keep, &w->m, &w->l};

    return attention_carve(to, memory, sizes, 8);
}

/* Rows first .. first + lanes of a strip: scores to weights in place, states m and l, and what the
 * earlier output shrinks by. */
VF_FUNC void weigh_rows(float shrink[VF_LANES], work *w, const attention *a, const block *b,
                        int64_t first, int64_t key, int pairs)
{
    float scale = exponent_scale(a), shift[VF_LANES];
    vf lane[VF_LANES], before = vf_load(w->m + first), now, base, sum = {0};

    for (int64_t i = 0; i < VF_LANES; i++) {
        int64_t r = first + i;
        reach n = reach_of(b, r, key);

        if (key == 0)
            soon_fetch(&w->soon, b->first + r);
        if (is_prepared(a) && r < b->n)
            attention_prepare(w->s + r * STRIP_LD, a, b, r, key, n.seen);
        lane[i] = highest(w->s + r * STRIP_LD, n);
    }
    transpose(lane);
    now = lane[0];
    for (int i = 1; i < VF_LANES; i++)
        now = vf_max(lane[i], now);
    now = vf_max(now * scale, before);
    base = vf_select(now == -INFINITY, (vf){0}, now); /* nothing seen: weights 0, not NaN */
    vf_store(w->m + first, now);
    vf_store(shift, base);
    before = exp2_of(before - base, 0);
    vf_store(shrink, before);
    for (int64_t i = 0; i < VF_LANES; i++) {
        float *s = w->s + (first + i) * STRIP_LD;
        reach n = reach_of(b, first + i, key);

        if (a->p > 0) {
            if (first + i < b->n)
                block_keep(w->keep, a, b, first + i, key, n.seen);
            lane[i] = weigh(s, n, scale, shift[i], w->keep, pairs);
        } else {
            lane[i] = weigh(s, n, scale, shift[i], NULL, pairs);
        }
    }
    transpose(lane);
    for (int i = 0; i < VF_LANES; i++)
        sum += lane[i];
    vf_store(w->l + first, vf_fma(vf_load(w->l + first), before, sum));
}

/* ---- a block of rows */

VF_FUNC void weigh_strip(work *w, const attention *a, const block *b, int64_t key, int pairs)
{
    for (int64_t first = 0; first < b->n; first += VF_LANES) {
        float shrink[VF_LANES];

        weigh_rows(shrink, w, a, b, first, key, pairs);
        for (int64_t i = 0; key > 0 && i < VF_LANES; i++) {
            float *o = w->o + (first + i) * a->wide;

            for (int64_t d = 0; d < a->wide && shrink[i] != 1; d += VF_LANES)
                vf_store(o + d, vf_load(o + d) * shrink[i]);
        }
    }
}

/* Output and lse of the block's rows. */
static void finish(const rows *y, work *w, const attention *a, const block *b)
{
    float lse[BLOCK];

#pragma omp simd
    for (int64_t i = 0; i < BLOCK; i++) {
        lse[i] = w->m[i] * (float)(1 / LOG2E) + ds_log_f32(w->l[i]);
        w->l[i] = w->l[i] == 0 ? 0 : 1 / w->l[i];
    }
    for (int64_t i = 0; i < b->n; i++) {
        if (w->l[i] == 0) /* a row that sees nothing: what lies in o may be anything */
            memset(w->o + i * a->wide, 0, (size_t)a->D * sizeof(float));
        store_row(row_at(y, b->first + i), w->o + i * a->wide, a->D, y->dtype, w->l[i]);
        *lse_at(a, b, i) = lse[i];
    }
}

VF_FUNC void forward_block(const rows *y, const rows *q, work *w, const attention *a,
                           const block *b, int pairs)
{
    for (int64_t i = 0; i < BLOCK; i++) {
        w->m[i] = -INFINITY;
        w->l[i] = 0;
    }
    pack_columns(w->q, q, b->first, b->n, a->D, pairs);
    for (int64_t key = 0; key < b->seen[b->n - 1]; key += STRIP) {
        product_scores(w->s, w->q, w->k, b, key, a->depth, pairs);
        weigh_strip(w, a, b, key, pairs);
        product_weighted(w->o, w->s, w->v, b, key, a->wide, a->keys / (pairs ? 2 : 1), pairs);
    }
    finish(y, w, a, b);
}

/* Blocks part, part + parts, …: even where causality makes later ones dearer. */
VF_FUNC void forward_unit(const ds_tensor *y, work *w, const attention *a, int64_t unit,
                          int64_t part, int64_t parts, int pairs)
{
    int64_t batch = unit / a->G, group = unit % a->G;
    rows k = rows_of(a->k, batch, group, 1), v = rows_of(a->v, batch, group, 1);
    rows q = rows_of(a->q, batch, group, a->ratio), out = rows_of(y, batch, group, a->ratio);

    pack_columns(w->k, &k, 0, a->S, a->D, pairs);
    pack_rows(w->v, &v, 0, a->S, a->D, pairs);
    for (int64_t first = part * BLOCK; first < a->row_count; first += parts * BLOCK) {
        block b;

        block_set(&b, a, batch, group, first);
        forward_block(&out, &q, w, a, &b, pairs);
    }
}

static __attribute__((noinline)) void unit_f32(const ds_tensor *y, work *w, const attention *a,
                                               int64_t unit, int64_t part, int64_t parts)
{
    forward_unit(y, w, a, unit, part, parts, 0);
}

static __attribute__((noinline)) void unit_pairs(const ds_tensor *y, work *w, const attention *a,
                                                 int64_t unit, int64_t part, int64_t parts)
{
    forward_unit(y, w, a, unit, part, parts, ATTENTION_PAIRS);
}

int DS_CPU(attention)(ds_tensor *y, ds_tensor *lse, const ds_tensor *q, const ds_tensor *k,
                      const ds_tensor *v, const ds_tensor *mask, int causal, double scale, double p,
                      uint64_t seed, uint64_t offset)
{
    attention a;
    work none;
    int rc = attention_check(&a, "attention", q, k, v, lse, mask, causal, scale, p, seed, offset);
    const ds_tensor *const wanted[] = {k, v, q};
    int64_t units, parts, blocks, floats, chunk;
    float *memory;
    int threads;

    if (rc < 0 || (rc = ds_check_attention_like("attention", y, "the output", q)) < 0)
        return rc;
    if (q->dtype == DS_F64)
        return attention_f64(y, &a);
    units = a.batches * a.G;
    if (units == 0 || a.row_count == 0)
        return 0;
    if (a.row_count <= (a.pairs ? ATTENTION_FEW / 2 : ATTENTION_FEW))
        return attention_few(y, &a);
    threads = ds_threads(units * a.row_count * (a.S + 1) * a.D / 16);
    blocks = (a.row_count + BLOCK - 1) / BLOCK;
    parts = units >= UNITS_AHEAD * threads
                ? 1
                : min64((blocks + 1) / 2, (UNITS_AHEAD * threads + units - 1) / units);
    chunk = units_at_once(units * parts, threads);
    floats = carve(&none, NULL, &a);
    memory = ds_scratch(DS_SCRATCH_A, (size_t)(threads * floats) * sizeof(float));
    if (!memory)
        return DS_ENOMEM;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        work w;

        carve(&w, memory + omp_get_thread_num() * floats, &a);
#pragma omp for schedule(dynamic, chunk)
        for (int64_t i = 0; i < units * parts; i++) {
            soon_set(&w.soon, &a, (i + (chunk > 1 ? 1 : threads)) / parts, wanted, 3);
            (a.pairs ? unit_pairs : unit_f32)(y, &w, &a, i / parts, i % parts, parts);
        }
    }
    return 0;
}
