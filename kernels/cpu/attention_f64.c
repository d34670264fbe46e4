/* attention_f64.c - attention in f64: plain loops, there for gradient checks.
 *
 * Backward makes the softmax again from the scores, so that an lse in f32 costs no digits.
 */
#include "kernels/cpu/attention.h"

#include "kernels/scratch.h"

/* One query: its keys' weights after the softmax, what dropout kept, and their gradients. [S]
 * each */
typedef struct query {
    int64_t batch, head, t, seen;
    double *weight, *grad, *mask, *keep;
    float *kept;
    double lse;
} query;

static double *at(const ds_tensor *x, int64_t batch, int64_t t, int64_t head)
{
    return (double *)x->data + batch * x->stride[0] + t * x->stride[1] + head * x->stride[2];
}

static double dot(const double *x, const double *y, int64_t n)
{
    double sum = 0;

    for (int64_t i = 0; i < n; i++)
        sum += x[i] * y[i];
    return sum;
}

static void add_scaled(double *y, double s, const double *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] += s * x[i];
}

static void load_mask(query *u, const attention *a)
{
    int64_t stride = a->mask_stride[3];
    const char *m = mask_at(a, u->batch, u->head, u->t, 0);

    if (a->mask->dtype == DS_BOOL)
        for (int64_t s = 0; s < u->seen; s++)
            u->mask[s] = m[s * stride] ? 0 : -INFINITY;
    else
        ds_row_load_f64(u->mask, m, a->mask->dtype, u->seen, stride);
}

static void find_weights(query *u, const attention *a)
{
    const double *q = at(a->q, u->batch, u->t, u->head);
    double most = -INFINITY, sum = 0;

    u->seen = a->causal ? u->t + 1 + a->S - a->T : a->S;
    u->seen = u->seen < 0 ? 0 : min64(u->seen, a->S);
    if (a->mask)
        load_mask(u, a);
    for (int64_t s = 0; s < u->seen; s++) {
        u->weight[s] = a->scale * dot(q, at(a->k, u->batch, s, u->head / a->ratio), a->D) +
                       (a->mask ? u->mask[s] : 0);
        most = fmax(most, u->weight[s]);
    }
    if (most == -INFINITY)
        u->seen = 0;
    for (int64_t s = 0; s < u->seen; s++) {
        u->weight[s] = exp(u->weight[s] - most);
        sum += u->weight[s];
    }
    for (int64_t s = 0; s < u->seen; s++) {
        u->weight[s] /= sum;
        u->keep[s] = 1;
    }
    u->lse = u->seen ? most + log(sum) : -INFINITY;
    if (a->p > 0)
        attention_keep(u->kept, a, u->batch, u->head, u->t, 0, u->seen);
    for (int64_t s = 0; s < u->seen && a->p > 0; s++)
        u->keep[s] = u->kept[s] > 0 ? 1 / (1 - a->p) : 0;
}

static void forward_query(ds_tensor *y, query *u, const attention *a)
{
    double *out = at(y, u->batch, u->t, u->head);
    int64_t at_lse =
        u->batch * a->lse->stride[0] + u->head * a->lse->stride[1] + u->t * a->lse->stride[2];

    find_weights(u, a);
    memset(out, 0, (size_t)a->D * sizeof *out);
    for (int64_t s = 0; s < u->seen; s++)
        add_scaled(out, u->weight[s] * u->keep[s], at(a->v, u->batch, s, u->head / a->ratio), a->D);
    if (a->lse->dtype == DS_F64)
        ((double *)a->lse->data)[at_lse] = u->lse;
    else
        ((float *)a->lse->data)[at_lse] = (float)u->lse;
}

static void backward_query(ds_tensor *dq, ds_tensor *dk, ds_tensor *dv, const ds_tensor *dy,
                           query *u, const attention *a)
{
    int64_t batch = u->batch, t = u->t, head = u->head, group = head / a->ratio;
    const double *q = at(a->q, batch, t, head), *g = at(dy, batch, t, head);
    double *to = at(dq, batch, t, head), delta = 0;

    find_weights(u, a);
    memset(to, 0, (size_t)a->D * sizeof *to);
    for (int64_t s = 0; s < u->seen; s++) {
        u->grad[s] = dot(g, at(a->v, batch, s, group), a->D) * u->keep[s];
        delta += u->grad[s] * u->weight[s];
    }
    for (int64_t s = 0; s < u->seen; s++) {
        double ds = u->weight[s] * (u->grad[s] - delta) * a->scale;

        add_scaled(to, ds, at(a->k, batch, s, group), a->D);
        add_scaled(at(dk, batch, s, group), ds, q, a->D);
        add_scaled(at(dv, batch, s, group), u->weight[s] * u->keep[s], g, a->D);
    }
}

/* The thread's piece of the scratch memory. */
static int64_t query_memory(query *u, double *memory, const attention *a)
{
    int64_t each = 5 * a->S;

    if (memory)
        *u = (query){.weight = memory,
                     .grad = memory + a->S,
                     .mask = memory + 2 * a->S,
                     .keep = memory + 3 * a->S,
                     .kept = (float *)(memory + 4 * a->S)};
    return each;
}

/* A unit is a (batch, kv head): dk and dv of it are its own. y, or dq and the others. */
static void unit_f64(ds_tensor *y, ds_tensor *dq, ds_tensor *dk, ds_tensor *dv, const ds_tensor *dy,
                     query *u, const attention *a, int64_t unit)
{
    int64_t group = unit % a->G;

    u->batch = unit / a->G;
    for (int64_t s = 0; !y && s < a->S; s++) {
        memset(at(dk, u->batch, s, group), 0, (size_t)a->D * sizeof(double));
        memset(at(dv, u->batch, s, group), 0, (size_t)a->D * sizeof(double));
    }
    for (u->head = group * a->ratio; u->head < (group + 1) * a->ratio; u->head++) {
        for (u->t = 0; u->t < a->T; u->t++) {
            if (y)
                forward_query(y, u, a);
            else
                backward_query(dq, dk, dv, dy, u, a);
        }
    }
}

static int run(ds_tensor *y, ds_tensor *dq, ds_tensor *dk, ds_tensor *dv, const ds_tensor *dy,
               const attention *a)
{
    int threads = ds_threads(a->batches * a->H * a->T * a->S * a->D);
    int64_t each = query_memory(NULL, NULL, a), units = a->batches * a->G;
    double *memory = ds_scratch(DS_SCRATCH_A, (size_t)(threads * each + 1) * sizeof(double));

    if (!memory)
        return DS_ENOMEM;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        query u;

        query_memory(&u, memory + omp_get_thread_num() * each, a);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < units; unit++)
            unit_f64(y, dq, dk, dv, dy, &u, a, unit);
    }
    return 0;
}

int attention_f64(ds_tensor *y, const attention *a)
{
    return run(y, NULL, NULL, NULL, NULL, a);
}

int attention_backward_f64(ds_tensor *dq, ds_tensor *dk, ds_tensor *dv, const ds_tensor *dy,
                           const attention *a)
{
    return run(NULL, dq, dk, dv, dy, a);
}
