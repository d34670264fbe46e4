/* attention_backward.c - gradients of attention; the weights are made again from lse.
 *
 * With s = scale q kᵀ, w = exp(s - lse), and dw = dy vᵀ:
 *     dv = wᵀ dy,  ds = w (dw - delta),  dq = scale ds k,  dk = scale dsᵀ q
 * where delta is dy y summed over a row (Dao et al. 2022, section B.2). Under dropout, w in dv
 * and dw in ds are multiplied by what was kept. A unit sums its own dk, dv; where there are
 * fewer units than threads, several threads share one, each with sums of its own that are added
 * in order at the end.
 */
#include "kernels/cpu/attention.h"

#include "kernels/checks.h"
#include "kernels/scratch.h"

/* A thread's own memory. */
typedef struct work {
    float *k_columns, *v_columns;  /* [keys / lanes][depth][lanes] */
    float *k_rows;                 /* [wide / lanes][keys in units][lanes] */
    float *dk, *dv;                /* [keys][wide] */
    float *q_columns, *dy_columns; /* [BLOCK / lanes][depth][lanes] */
    float *q_rows, *dy_rows;       /* [wide / lanes][BLOCK in units][lanes] */
    float *s;                      /* [BLOCK][STRIP_LD]: scores, then weights */
    float *ds;                     /* [BLOCK][STRIP_LD]: dw, then ds (bf16, in the pairs form) */
    float *w_pairs, *ds_pairs;     /* [BLOCK / 2][STRIP_LD]: rows two by two, in the pairs form */
    float *dq;                     /* [BLOCK][wide] */
    float *keep;                   /* [2][STRIP] */
    soon soon;
} work;

static int64_t carve(work *w, float *memory, const attention *a)
{
    int64_t in_unit = a->pairs ? 2 : 1, columns = a->keys * a->depth, sums = a->keys * a->wide;
    int64_t pairs = a->pairs ? BLOCK / 2 * STRIP_LD : 0;
    const int64_t sizes[] = {columns,
                             columns,
                             sums / in_unit,
                             sums,
                             sums,
                             BLOCK * a->depth,
                             BLOCK * a->depth,
                             BLOCK * a->wide,
                             BLOCK * a->wide,
                             BLOCK * STRIP_LD,
                             BLOCK * STRIP_LD,
                             pairs,
                             pairs,
                             BLOCK * a->wide,
                             2 * STRIP};
    float **to[] = {&w->k_columns, &w->v_columns,  &w->k_rows,   &w->dk,      &w->dv,
                    &w->q_columns, &w->dy_columns, &w->q_rows,   &w->dy_rows, &w->s,
                    &w->ds,        &w->w_pairs,    &w->ds_pairs, &w->dq,      &w->keep};

    return attention_carve(to, memory, sizes, 15);
}

/* The call, and what belongs to a unit. */
typedef struct gradient {
    const attention *a;
    const ds_tensor *dq, *dk, *dv, *dy, *y;
} gradient;

/* ---- weights and their gradients */

/* The weight w and its gradient ds from score s and dw, one vector. `keep`, or NULL. */
VF_FUNC void weight_gradient(vf *w, vf *ds, vf s, vf dw, float scale, vf lse, vf delta,
                             const float *keep, int pairs)
{
    vf e = exp2_of(vf_fma(s, vf_set(scale), lse), pairs);

    dw = keep ? dw * vf_load(keep) : dw;
    *w = keep ? e * vf_load(keep) : e;
    *ds = e * (dw - delta);
}

/* s, ds of a row: scores and dw to weights and ds, in place. lse: negative, in exponents of 2. */
VF_FUNC void row_gradient(float *s, float *ds, reach n, float scale, float lse, float delta,
                          const float *keep)
{
    vf w, d;
    int64_t j = 0;

    for (; j < n.full; j += VF_LANES) {
        weight_gradient(&w, &d, vf_load(s + j), vf_load(ds + j), scale, vf_set(lse), vf_set(delta),
                        keep ? keep + j : NULL, 0);
        vf_store(s + j, w);
        vf_store(ds + j, d);
    }
    for (; j < n.end; j += VF_LANES) {
        weight_gradient(&w, &d, vf_load(s + j), vf_load(ds + j), scale, vf_set(lse), vf_set(delta),
                        keep ? keep + j : NULL, 0);
        vf_store(s + j, first_lanes(w, n.seen - j, (vf){0}));
        vf_store(ds + j, first_lanes(d, n.seen - j, (vf){0}));
    }
}

/* The rows of a strip. lse, delta [BLOCK]. */
VF_FUNC void strip_gradient(work *w, const float *lse, const float *delta, const attention *a,
                            const block *b, int64_t key)
{
    float scale = exponent_scale(a);

    for (int64_t i = 0; i < b->tiles * TILE_ROWS; i++) {
        float *s = w->s + i * STRIP_LD, *ds = w->ds + i * STRIP_LD;
        reach n = reach_of(b, i, key);

        if (key == 0)
            soon_fetch(&w->soon, b->first + i);
        if (is_prepared(a) && i < b->n)
            attention_prepare(s, a, b, i, key, n.seen);
        if (a->p > 0 && i < b->n) {
            block_keep(w->keep, a, b, i, key, n.seen);
            row_gradient(s, ds, n, scale, lse[i], delta[i], w->keep);
        } else {
            row_gradient(s, ds, n, scale, lse[i], delta[i], NULL);
        }
    }
}

#if ATTENTION_PAIRS
/* Two bf16 rows, element by element next to each other. */
VF_FUNC vf interleave(vh low, vh high)
{
    return (vf)(__builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16);
}

/* Vector j of rows i and i + 1, as products over rows want them in pairs. */
VF_FUNC void two_rows_gradient(work *w, int64_t i, int64_t j, const reach n[2], float scale,
                               const float lse[2], const float delta[2], int hides, int dropout)
{
    vh wh[2], dh[2];

    for (int e = 0; e < 2; e++) {
        float *s = w->s + (i + e) * STRIP_LD, *ds = w->ds + (i + e) * STRIP_LD;
        vf wf, df;

        weight_gradient(&wf, &df, vf_load(s + j), vf_load(ds + j), scale, vf_set(lse[e]),
                        vf_set(delta[e]), dropout ? w->keep + e * STRIP + j : NULL, 1);
        wh[e] = vf_to_bf16(hides ? first_lanes(wf, n[e].seen - j, (vf){0}) : wf);
        dh[e] = vf_to_bf16(hides ? first_lanes(df, n[e].seen - j, (vf){0}) : df);
        vh_store((uint16_t *)ds + j, dh[e]);
    }
    vf_store(w->w_pairs + i / 2 * STRIP_LD + j, interleave(wh[0], wh[1]));
    vf_store(w->ds_pairs + i / 2 * STRIP_LD + j, interleave(dh[0], dh[1]));
}

VF_FUNC void strip_gradient_pairs(work *w, const float *lse, const float *delta, const attention *a,
                                  const block *b, int64_t key)
{
    float scale = exponent_scale(a);

    for (int64_t i = 0; i < b->tiles * TILE_ROWS; i += 2) {
        reach n[2] = {reach_of(b, i, key), reach_of(b, i + 1, key)};
        int64_t j = 0;

        for (int64_t e = 0; e < 2 && i + e < b->n; e++) {
            if (key == 0)
                soon_fetch(&w->soon, b->first + i + e);
            if (is_prepared(a))
                attention_prepare(w->s + (i + e) * STRIP_LD, a, b, i + e, key, n[e].seen);
            if (a->p > 0)
                block_keep(w->keep + e * STRIP, a, b, i + e, key, n[e].seen);
        }
        for (; j < n[0].full && a->p == 0; j += VF_LANES)
            two_rows_gradient(w, i, j, n, scale, lse + i, delta + i, 0, 0);
        for (; j < n[0].end && a->p == 0; j += VF_LANES)
            two_rows_gradient(w, i, j, n, scale, lse + i, delta + i, 1, 0);
        for (; j < n[0].end; j += VF_LANES)
            two_rows_gradient(w, i, j, n, scale, lse + i, delta + i, 1, 1);
    }
}
#endif

/* ---- a block of rows */

VF_FUNC float dot_as(const void *x, const void *y, int64_t D, int dtype)
{
    vf sum = {0};
    int64_t d = 0;

    for (; d + VF_LANES <= D; d += VF_LANES)
        sum = vf_fma(vf_load_as(x, d, dtype), vf_load_as(y, d, dtype), sum);
    if (d < D)
        sum = vf_fma(vf_load_part_as(x, d, dtype, D - d), vf_load_part_as(y, d, dtype, D - d), sum);
    return vf_sum(sum);
}

static float dot(const void *x, const void *y, int64_t D, int dtype)
{
    if (dtype == DS_F32)
        return dot_as(x, y, D, DS_F32);
    return dtype == DS_BF16 ? dot_as(x, y, D, DS_BF16) : dot_as(x, y, D, DS_F16);
}

/* What a row needs of the forward pass; rows beyond b->n, whose q and dy are 0, add nothing. */
static void row_constants(float *lse, float *delta, const gradient *g, const rows *dy,
                          const rows *y, const block *b)
{
    for (int64_t i = 0; i < b->tiles * TILE_ROWS; i++) {
        lse[i] = delta[i] = 0;
        if (i >= b->n)
            continue;
        /* A row that saw nothing has lse -inf; its weights shall be 0. */
        lse[i] = *lse_at(g->a, b, i);
        lse[i] = lse[i] == -INFINITY ? -INFINITY : -lse[i] * (float)LOG2E;
        delta[i] = dot(row_at(dy, b->first + i), row_at(y, b->first + i), g->a->D, y->dtype);
    }
}

VF_FUNC void backward_block(work *w, const gradient *g, const rows *q, const rows *dq,
                            const rows *dy, const rows *y, const block *b, int pairs)
{
    const attention *a = g->a;
    int64_t most = b->seen[b->n - 1], height = a->keys / (pairs ? 2 : 1);
    const float *w_units = pairs ? w->w_pairs : w->s, *ds_units = pairs ? w->ds_pairs : w->ds;
    float lse[BLOCK], delta[BLOCK];

    row_constants(lse, delta, g, dy, y, b);
    pack_columns(w->q_columns, q, b->first, b->n, a->D, pairs);
    pack_columns(w->dy_columns, dy, b->first, b->n, a->D, pairs);
    pack_rows(w->q_rows, q, b->first, b->n, a->D, pairs);
    pack_rows(w->dy_rows, dy, b->first, b->n, a->D, pairs);
    if (most == 0)
        memset(w->dq, 0, (size_t)(BLOCK * a->wide) * sizeof(float));
    for (int64_t key = 0; key < most; key += STRIP) {
        product_scores(w->s, w->q_columns, w->k_columns, b, key, a->depth, pairs);
        product_scores(w->ds, w->dy_columns, w->v_columns, b, key, a->depth, pairs);
#if ATTENTION_PAIRS
        if (pairs)
            strip_gradient_pairs(w, lse, delta, a, b, key);
        else
#endif
            strip_gradient(w, lse, delta, a, b, key);
        product_gathered(w->dv, w_units, w->dy_rows, b, key, a->wide, pairs);
        product_gathered(w->dk, ds_units, w->q_rows, b, key, a->wide, pairs);
        product_weighted(w->dq, w->ds, w->k_rows, b, key, a->wide, height, pairs);
    }
    for (int64_t i = 0; i < b->n; i++)
        store_row(row_at(dq, b->first + i), w->dq + i * a->wide, a->D, dq->dtype, (float)a->scale);
}

/* ---- units */

/* Keys begin .. end of a unit, dk and dv added up over `parts` sums `apart` floats from each
 * other. */
static void store_unit(const gradient *g, float *dk, float *dv, int64_t unit, int64_t begin,
                       int64_t end, int64_t parts, int64_t apart)
{
    const attention *a = g->a;
    rows to_k = rows_of(g->dk, unit / a->G, unit % a->G, 1);
    rows to_v = rows_of(g->dv, unit / a->G, unit % a->G, 1);

    for (int64_t p = 1; p < parts; p++)
        for (int64_t i = begin * a->wide; i < end * a->wide; i++) {
            dk[i] += dk[p * apart + i];
            dv[i] += dv[p * apart + i];
        }
    for (int64_t s = begin; s < end; s++) {
        store_row(row_at(&to_k, s), dk + s * a->wide, a->D, to_k.dtype, (float)a->scale);
        store_row(row_at(&to_v, s), dv + s * a->wide, a->D, to_v.dtype, 1);
    }
}

/* Blocks part, part + parts, … of a unit: dq, and their share of dk, dv into w. */
VF_FUNC void backward_unit(work *w, const gradient *g, int64_t unit, int64_t part, int64_t parts,
                           int pairs)
{
    const attention *a = g->a;
    int64_t batch = unit / a->G, group = unit % a->G;
    rows k = rows_of(a->k, batch, group, 1), v = rows_of(a->v, batch, group, 1);
    rows q = rows_of(a->q, batch, group, a->ratio), y = rows_of(g->y, batch, group, a->ratio);
    rows dq = rows_of(g->dq, batch, group, a->ratio), dy = rows_of(g->dy, batch, group, a->ratio);

    pack_columns(w->k_columns, &k, 0, a->S, a->D, pairs);
    pack_columns(w->v_columns, &v, 0, a->S, a->D, pairs);
    pack_rows(w->k_rows, &k, 0, a->S, a->D, pairs);
    memset(w->dk, 0, (size_t)(a->keys * a->wide) * sizeof(float));
    memset(w->dv, 0, (size_t)(a->keys * a->wide) * sizeof(float));
    memset(w->keep, 0, 2 * STRIP * sizeof(float)); /* read for rows beyond the last, too */
    for (int64_t first = part * BLOCK; first < a->row_count; first += parts * BLOCK) {
        block b;

        block_set(&b, a, batch, group, first);
        backward_block(w, g, &q, &dq, &dy, &y, &b, pairs);
    }
}

static __attribute__((noinline)) void unit_f32(work *w, const gradient *g, int64_t unit,
                                               int64_t part, int64_t parts)
{
    backward_unit(w, g, unit, part, parts, 0);
}

static __attribute__((noinline)) void unit_pairs(work *w, const gradient *g, int64_t unit,
                                                 int64_t part, int64_t parts)
{
    backward_unit(w, g, unit, part, parts, ATTENTION_PAIRS);
}

static int run(const gradient *g)
{
    const attention *a = g->a;
    const ds_tensor *const wanted[] = {a->k, a->v, a->q, g->dy, g->y};
    int64_t units = a->batches * a->G, blocks = (a->row_count + BLOCK - 1) / BLOCK;
    int threads = ds_threads(units * a->row_count * (a->S + 1) * a->D / 16);
    int64_t chunk = units_at_once(units, threads);
    int64_t parts = units >= threads || blocks < 2 ? 1 : min64(blocks, threads / units);
    work none;
    int64_t floats = carve(&none, NULL, a);
    float *memory = ds_scratch(DS_SCRATCH_A, (size_t)(threads * floats) * sizeof(float));

    if (!memory)
        return DS_ENOMEM;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        work w;

        if (parts == 1) {
            carve(&w, memory + omp_get_thread_num() * floats, a);
#pragma omp for schedule(dynamic, chunk)
            for (int64_t unit = 0; unit < units; unit++) {
                soon_set(&w.soon, a, unit + (chunk > 1 ? 1 : threads), wanted, 5);
                (a->pairs ? unit_pairs : unit_f32)(&w, g, unit, 0, 1);
                store_unit(g, w.dk, w.dv, unit, 0, a->S, 1, 0);
            }
        } else { /* units parts <= threads: one for each thread, and the sums stay where they are */
            int64_t me = omp_get_thread_num();

            if (me < units * parts) {
                carve(&w, memory + me * floats, a);
                w.soon.n = 0;
                (a->pairs ? unit_pairs : unit_f32)(&w, g, me / parts, me % parts, parts);
            }
#pragma omp barrier
            for (int64_t unit = 0; unit < units; unit++) {
                int64_t begin, end;

                carve(&w, memory + unit * parts * floats, a);
                ds_part(&begin, &end, a->S, 1);
                store_unit(g, w.dk, w.dv, unit, begin, end, parts, floats);
            }
        }
    }
    return 0;
}

int DS_CPU(attention_backward)(ds_tensor *dq, ds_tensor *dk, ds_tensor *dv, const ds_tensor *dy,
                               const ds_tensor *y, const ds_tensor *lse, const ds_tensor *q,
                               const ds_tensor *k, const ds_tensor *v, const ds_tensor *mask,
                               int causal, double scale, double p, uint64_t seed, uint64_t offset)
{
    static const char what[] = "attention_backward";
    attention a;
    gradient g = {&a, dq, dk, dv, dy, y};
    int rc = attention_check(&a, what, q, k, v, lse, mask, causal, scale, p, seed, offset);

    if (rc < 0 || (rc = ds_check_attention_like(what, dq, "dq", q)) < 0 ||
        (rc = ds_check_attention_like(what, dk, "dk", k)) < 0 ||
        (rc = ds_check_attention_like(what, dv, "dv", v)) < 0 ||
        (rc = ds_check_attention_like(what, dy, "dy", q)) < 0 ||
        (rc = ds_check_attention_like(what, y, "y", q)) < 0)
        return rc;
    if (q->dtype == DS_F64)
        return attention_backward_f64(dq, dk, dv, dy, &a);
    if (a.batches * a.G == 0)
        return 0;
    return run(&g);
}
