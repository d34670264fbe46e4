/* attention_few.c - attention of a few queries to many keys, as when a model generates.
 *
 * Bound by reading keys and values, so nothing is packed. Where there are fewer (batch, kv head)
 * units than threads, several threads share a unit's keys; what each found is put together in
 * order.
 */
#include "kernels/cpu/attention.h"

#include "kernels/scratch.h"
#include "kernels/scalar.h"

/* What a thread found in its part of the keys. */
typedef struct found {
    float *m, *l; /* [ATTENTION_FEW]: as in attention.c */
    float *o;     /* [ATTENTION_FEW][wide] */
    float *q;     /* [ATTENTION_FEW][wide] */
    float *s;     /* [STRIP] */
    float *keep;  /* [STRIP] */
} found;

static int64_t carve(found *f, float *memory, const attention *a)
{
    const int64_t sizes[] = {ATTENTION_FEW,           ATTENTION_FEW, ATTENTION_FEW * a->wide,
                             ATTENTION_FEW * a->wide, STRIP,         STRIP};
    float **to[] = {&f->m, &f->l, &f->o, &f->q, &f->s, &f->keep};

    return attention_carve(to, memory, sizes, 6);
}

/* s [n rounded up to vectors] = k q for n keys from `key` on. */
VF_FUNC void scores_as(float *s, const float *q, const rows *k, int64_t key, int64_t n, int64_t D,
                       int dtype)
{
    int64_t whole = D / VF_LANES * VF_LANES;

    for (int64_t j = 0; j < n; j += VF_LANES) {
        vf lane[VF_LANES], sum = {0};

        for (int64_t i = 0; i < VF_LANES; i++) {
            const char *row = row_at(k, key + min64(j + i, n - 1));

            lane[i] = (vf){0};
            for (int64_t d = 0; d < whole; d += VF_LANES)
                lane[i] = vf_fma(vf_load_as(row, d, dtype), vf_load(q + d), lane[i]);
            if (whole < D)
                lane[i] = vf_fma(vf_load_part_as(row, whole, dtype, D - whole), vf_load(q + whole),
                                 lane[i]);
        }
        transpose(lane);
        for (int i = 0; i < VF_LANES; i++)
            sum += lane[i];
        vf_store(s + j, sum);
    }
}

/* o [D] += Σ s v over n keys from `key` on. */
VF_FUNC void weighted_as(float *o, const float *s, const rows *v, int64_t key, int64_t n, int64_t D,
                         int dtype)
{
    int64_t d = 0;

    for (; d + 4 * VF_LANES <= D; d += 4 * VF_LANES) {
        vf sum[4];

        for (int i = 0; i < 4; i++)
            sum[i] = vf_load(o + d + i * VF_LANES);
        for (int64_t j = 0; j < n; j++) {
            const char *row = row_at(v, key + j);

            for (int i = 0; i < 4; i++)
                sum[i] = vf_fma(vf_set(s[j]), vf_load_as(row, d + i * VF_LANES, dtype), sum[i]);
        }
        for (int i = 0; i < 4; i++)
            vf_store(o + d + i * VF_LANES, sum[i]);
    }
    for (; d < D; d += VF_LANES) {
        int64_t left = min64(D - d, VF_LANES);
        vf sum = vf_load(o + d);

        for (int64_t j = 0; j < n; j++)
            sum = vf_fma(vf_set(s[j]), vf_load_part_as(row_at(v, key + j), d, dtype, left), sum);
        vf_store(o + d, sum);
    }
}

static void scores(float *s, const float *q, const rows *k, int64_t key, int64_t n, int64_t D)
{
    if (k->dtype == DS_F32)
        scores_as(s, q, k, key, n, D, DS_F32);
    else if (k->dtype == DS_BF16)
        scores_as(s, q, k, key, n, D, DS_BF16);
    else
        scores_as(s, q, k, key, n, D, DS_F16);
}

static void weighted(float *o, const float *s, const rows *v, int64_t key, int64_t n, int64_t D)
{
    if (v->dtype == DS_F32)
        weighted_as(o, s, v, key, n, D, DS_F32);
    else if (v->dtype == DS_BF16)
        weighted_as(o, s, v, key, n, D, DS_BF16);
    else
        weighted_as(o, s, v, key, n, D, DS_F16);
}

/* Row i and a strip of keys. */
static void strip(found *f, const rows *k, const rows *v, const attention *a, const block *b,
                  int64_t i, int64_t key)
{
    int64_t seen = seen_from(b->seen[i], key);
    reach n = {seen, seen / VF_LANES * VF_LANES, round_up(seen, VF_LANES)};
    float scale = exponent_scale(a), now, base, shrink, *o = f->o + i * a->wide;

    if (seen == 0)
        return;
    scores(f->s, f->q + i * a->wide, k, key, seen, a->D);
    if (is_prepared(a))
        attention_prepare(f->s, a, b, i, key, seen);
    now = vf_max_lane(highest(f->s, n)) * scale;
    now = now > f->m[i] ? now : f->m[i];
    base = now == -INFINITY ? 0 : now;
    shrink = exp2_of(vf_set(f->m[i] - base), 0)[0];
    f->m[i] = now;
    if (a->p > 0)
        block_keep(f->keep, a, b, i, key, seen);
    f->l[i] = f->l[i] * shrink + vf_sum(weigh(f->s, n, scale, base, a->p > 0 ? f->keep : NULL, 0));
    for (int64_t d = 0; d < a->wide; d += VF_LANES)
        vf_store(o + d, vf_load(o + d) * shrink);
    weighted(o, f->s, v, key, seen, a->D);
}

/* Strips part, part + parts, … of a unit. */
static void find(found *f, const attention *a, int64_t unit, int64_t part, int64_t parts)
{
    int64_t batch = unit / a->G, group = unit % a->G;
    rows k = rows_of(a->k, batch, group, 1), v = rows_of(a->v, batch, group, 1);
    rows q = rows_of(a->q, batch, group, a->ratio);
    block b;

    block_set(&b, a, batch, group, 0);
    memset(f->q, 0, (size_t)(ATTENTION_FEW * a->wide) * sizeof(float));
    memset(f->o, 0, (size_t)(ATTENTION_FEW * a->wide) * sizeof(float));
    for (int64_t i = 0; i < b.n; i++) {
        f->m[i] = -INFINITY;
        f->l[i] = 0;
        ds_row_load(f->q + i * a->wide, row_at(&q, i), q.dtype, a->D, 1);
    }
    for (int64_t key = part * STRIP; key < a->S; key += parts * STRIP)
        for (int64_t i = 0; i < b.n; i++)
            strip(f, &k, &v, a, &b, i, key);
}

/* Puts together what `parts` threads found, `apart` floats from each other. */
static void unite(const ds_tensor *y, float *memory, const attention *a, int64_t unit,
                  int64_t parts, int64_t apart)
{
    rows out = rows_of(y, unit / a->G, unit % a->G, a->ratio);
    found first, next;
    block b;

    block_set(&b, a, unit / a->G, unit % a->G, 0);
    carve(&first, memory, a);
    for (int64_t i = 0; i < b.n; i++) {
        float m = first.m[i], l = 0, *o = first.o + i * a->wide;

        for (int64_t p = 1; p < parts; p++) {
            carve(&next, memory + p * apart, a);
            m = next.m[i] > m ? next.m[i] : m;
        }
        for (int64_t p = 0; p < parts; p++) {
            float factor;

            carve(&next, memory + p * apart, a);
            factor = next.m[i] == -INFINITY ? 0 : exp2f(next.m[i] - m);
            l += next.l[i] * factor;
            for (int64_t d = 0; d < a->D; d++)
                o[d] = (p ? o[d] : 0) + next.o[i * a->wide + d] * factor;
        }
        store_row(row_at(&out, i), o, a->D, y->dtype, l == 0 ? 0 : 1 / l);
        *lse_at(a, &b, i) = m * (float)(1 / LOG2E) + ds_log_f32(l);
    }
}

int attention_few(ds_tensor *y, const attention *a)
{
    int64_t units = a->batches * a->G, strips = (a->S + STRIP - 1) / STRIP;
    int threads = ds_threads(units * a->row_count * a->S * a->D / 4);
    int64_t parts =
        units >= threads || strips < 2 ? 1 : min64(strips, (threads + units - 1) / units);
    found none;
    int64_t floats = carve(&none, NULL, a);
    float *memory = ds_scratch(DS_SCRATCH_A, (size_t)(units * parts * floats) * sizeof(float));

    if (!memory)
        return DS_ENOMEM;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < units * parts; i++) {
            found f;

            carve(&f, memory + i * floats, a);
            find(&f, a, i / parts, i % parts, parts);
        }
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < units; unit++)
            unite(y, memory + unit * parts * floats, a, unit, parts, floats);
    }
    return 0;
}
