/* embedding.c - rows by index, the sums that are their gradient, and rotary positions. */
#include "kernels/cpu/index.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/scalar.h"

#define RUN 512 /* elements summed at a time: buffers stay in the L1 cache */

/* ---- embedding */

int DS_CPU(embedding)(ds_tensor *y, const ds_tensor *w, const ds_tensor *index)
{
    ds_tensor indices, row = *w;
    int last = index->ndim, rc;

    DS_TRY(ds_check_embedding(y, w, index));
    DS_TRY(DS_CPU(indices_load)(&indices, "embedding", index, w->shape[0]));
    row.ndim = y->ndim;
    indices.ndim = y->ndim;
    indices.shape[last] = 1;
    for (int i = 0; i <= last; i++) {
        row.shape[i] = i == last ? w->shape[1] : 1;
        row.stride[i] = i == last ? w->stride[1] : 0;
    }
    rc = DS_CPU(select_run)("embedding", y, &row, &indices, w->stride[0]);
    free(indices.data);
    return rc;
}

/* ---- sums of rows by index */

/* Rows grouped by index, in order within each group: those of v are at x + order[start[v]] and so
 * on to start[v + 1], in elements. */
typedef struct groups {
    int64_t *start; /* [values + 1] */
    int64_t *order; /* [n] */
    int64_t values, n, largest;
} groups;

static int groups_start(groups *g, const char *name, const int64_t *index, const int64_t *offset,
                        int64_t n, int64_t values)
{
    g->start = calloc((size_t)(values + n + 2), sizeof *g->start);
    if (!g->start)
        return ds_fail(DS_ENOMEM, "%s: out of memory for %lld indices", name, (long long)n);
    g->order = g->start + values + 2;
    g->values = values;
    g->n = n;
    g->largest = 0;
    for (int64_t i = 0; i < n; i++)
        g->start[index[i] + 2]++;
    for (int64_t v = 0; v < values; v++) {
        g->largest = g->start[v + 2] > g->largest ? g->start[v + 2] : g->largest;
        g->start[v + 2] += g->start[v + 1];
    }
    for (int64_t i = 0; i < n; i++) /* start[v + 1] moves from the group's start to its end */
        g->order[g->start[index[i] + 1]++] = offset[i];
    return 0;
}

/* The first value of thread `me` of `team`, so that all have about as many rows to add and write. */
static int64_t groups_share(const groups *g, int me, int team, int clear)
{
    int64_t total = g->n + (clear ? g->values : 0), want = total / team * me, low = 0;
    int64_t high = g->values;

    if (me == team)
        return g->values;
    while (low < high) {
        int64_t middle = (low + high) / 2;

        if (g->start[middle] + (clear ? middle : 0) < want)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

typedef struct sum_job {
    const groups *g;
    const walk *w; /* over one slice: y, x */
    int64_t y_step;
    int clear, wide; /* wide: in f64 */
} sum_job;

static void add_row(const sum_job *job, double *sum, const char *x, int64_t n)
{
    const struct walk_operand *in = &job->w->op[1];
    int64_t stride = in->stride[job->w->ndim - 1];
    float *sum32 = (float *)sum;
    double row[RUN];
    const float *x32 = (const float *)row;

    if (job->wide) {
        ds_row_load_f64(row, x, in->dtype, n, stride);
        for (int64_t i = 0; i < n; i++)
            sum[i] += row[i];
        return;
    }
    if (in->dtype == DS_F32 && stride == 1)
        x32 = (const float *)(const void *)x;
    else
        ds_row_load((float *)row, x, in->dtype, n, stride);
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        sum32[i] += x32[i];
}

/* Row v of the output, n elements from a place of the slice on. */
static void sum_row(const sum_job *job, int64_t v, const cursor *c, int64_t n)
{
    const struct walk_operand *out = &job->w->op[0], *in = &job->w->op[1];
    int64_t begin = job->g->start[v], end = job->g->start[v + 1];
    int64_t stride = out->stride[job->w->ndim - 1];
    char *y = cursor_at(c, job->w, 0) + v * job->y_step * out->size;
    const char *x = cursor_at(c, job->w, 1);
    double sum[RUN];

    if (begin == end && !job->clear)
        return;
    if (job->clear)
        memset(sum, 0, (size_t)n * (job->wide ? sizeof(double) : sizeof(float)));
    else if (job->wide)
        ds_row_load_f64(sum, y, out->dtype, n, stride);
    else
        ds_row_load((float *)sum, y, out->dtype, n, stride);
    for (int64_t i = begin; i < end; i++)
        add_row(job, sum, x + job->g->order[i] * in->size, n);
    if (job->wide)
        ds_row_store_f64(y, sum, out->dtype, n, stride);
    else
        ds_row_store(y, (float *)sum, out->dtype, n, stride);
}

/* Rows [first, last) in elements [begin, end) of the slice. */
static void sum_part(const sum_job *job, int64_t first, int64_t last, int64_t begin, int64_t end)
{
    for (int64_t v = first; v < last; v++) {
        int64_t n;
        cursor c;

        if (job->g->start[v] == job->g->start[v + 1] && !job->clear)
            continue;
        cursor_start(&c, job->w, begin);
        for (int64_t at = begin; at < end; at += n) {
            n = cursor_rest(&c, job->w) < end - at ? cursor_rest(&c, job->w) : end - at;
            n = n < RUN ? n : RUN;
            sum_row(job, v, &c, n);
            cursor_advance(&c, job->w, n);
        }
    }
}

int DS_CPU(sum_rows)(const char *name, ds_tensor *y, int64_t y_step, int64_t y_size,
                     const ds_tensor *x, const int64_t *offset, const int64_t *index, int64_t n,
                     int clear)
{
    int threads = ds_threads(y->numel * (n + (clear ? y_size : 0))), by_rows;
    sum_job job = {.y_step = y_step, .clear = clear};
    groups g;
    walk w;
    int rc = DS_CPU(walk_start)(&w, name, 2, (const ds_tensor *[]){y, x}, WALK_ANY);

    if (rc < 0 || y->numel == 0)
        return rc;
    rc = groups_start(&g, name, index, offset, n, y_size);
    if (rc < 0)
        return rc;
    job.g = &g;
    job.w = &w;
    job.wide = y->dtype >= DS_F64 || x->dtype >= DS_F64;
    /* One frequent index would leave all work to one thread: then columns are divided. */
    by_rows = g.largest * threads * 2 <= n || w.numel < 64 * threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int me = omp_get_thread_num(), team = omp_get_num_threads();
        int64_t begin, end;

        ds_part(&begin, &end, w.numel, 16);
        if (by_rows)
            sum_part(&job, groups_share(&g, me, team, clear), groups_share(&g, me + 1, team, clear),
                     0, w.numel);
        else
            sum_part(&job, 0, y_size, begin, end);
    }
    free(g.start);
    return 0;
}

/* Where each row of dy begins, in elements: [numel / C]. NULL: out of memory. */
static int64_t *row_offsets(const ds_tensor *dy)
{
    ds_tensor rows = *dy;
    const ds_tensor *t = &rows;
    int64_t *offset;
    cursor c;
    walk w;

    rows.shape[dy->ndim - 1] = 1;
    rows.numel = 1;
    for (int i = 0; i < dy->ndim - 1; i++)
        rows.numel *= dy->shape[i];
    offset = malloc((size_t)(rows.numel + 1) * sizeof *offset);
    if (!offset || rows.numel == 0)
        return offset;
    DS_CPU(walk_start)(&w, "embedding_backward", 1, &t, WALK_ROW_MAJOR);
    cursor_start(&c, &w, 0);
    for (int64_t i = 0; i < rows.numel; i++) {
        offset[i] = c.offset[0];
        cursor_advance(&c, &w, 1);
    }
    return offset;
}

int DS_CPU(embedding_backward)(ds_tensor *dw, const ds_tensor *dy, const ds_tensor *index,
                               int accumulate)
{
    ds_tensor indices, to = *dw, from = *dy;
    int64_t *offset;
    int rc;

    DS_TRY(ds_check_embedding_backward(dw, dy, index));
    DS_TRY(DS_CPU(indices_load)(&indices, "embedding_backward", index, dw->shape[0]));
    to.ndim = from.ndim = 1;
    to.numel = to.shape[0] = from.numel = from.shape[0] = dw->shape[1];
    to.stride[0] = dw->stride[1];
    from.stride[0] = dy->stride[dy->ndim - 1];
    offset = row_offsets(dy);
    rc = offset ? DS_CPU(sum_rows)("embedding_backward", &to, dw->stride[0], dw->shape[0], &from,
                                   offset, indices.data, indices.numel, !accumulate)
                : ds_fail(DS_ENOMEM, "embedding_backward: out of memory");
    free(offset);
    free(indices.data);
    return rc;
}

/* ---- rotary (Su et al. 2021, "RoFormer"): pairs of a head's elements turned by an angle that
 * grows with the position */

/* What a thread needs for one position and one head of D elements. */
typedef struct rotation {
    double *frequency;     /* [D/2] radians a position */
    double *cosine, *sine; /* [D/2], as f32 unless x is f64 */
    double *row;           /* [D], as f32 unless x is f64 */
} rotation;

static void turn_f32(const rotation *r, double position, int64_t half, int inverse)
{
    float *c = (float *)r->cosine, *s = (float *)r->sine;

    for (int64_t i = 0; i < half; i++) {
        double angle = position * r->frequency[i];
        float sine = ds_sin_quarter_f32(angle, 0);

        c[i] = ds_sin_quarter_f32(angle, 1);
        s[i] = inverse ? -sine : sine;
    }
}

static void turn_f64(const rotation *r, double position, int64_t half, int inverse)
{
    for (int64_t i = 0; i < half; i++) {
        double angle = position * r->frequency[i];

        r->cosine[i] = cos(angle);
        r->sine[i] = inverse ? -sin(angle) : sin(angle);
    }
}

/* One head: row of 2 half elements, whose pairs are `pair` apart and begin `step` apart. */
#define ROTATE(real)                                                                               \
    static void rotate_##real(real *row, const rotation *r, int64_t half, int interleaved)         \
    {                                                                                              \
        const real *c = (const real *)r->cosine, *s = (const real *)r->sine;                       \
        int64_t pair = interleaved ? 1 : half, step = interleaved ? 2 : 1;                         \
                                                                                                   \
        for (int64_t i = 0; i < half; i++) {                                                       \
            real a = row[i * step], b = row[i * step + pair];                                      \
                                                                                                   \
            row[i * step] = a * c[i] - b * s[i];                                                   \
            row[i * step + pair] = a * s[i] + b * c[i];                                            \
        }                                                                                          \
    }
ROTATE(float)
ROTATE(double)

static void rotate_heads(ds_tensor *y, const ds_tensor *x, int64_t b, int64_t t, const rotation *r,
                         int interleaved)
{
    int64_t size = ds_bytes_of(x->dtype), d = x->shape[3];
    const char *from = (const char *)x->data + (b * x->stride[0] + t * x->stride[1]) * size;
    char *to = (char *)y->data + (b * y->stride[0] + t * y->stride[1]) * size;

    for (int64_t h = 0; h < x->shape[2]; h++) {
        const char *source = from + h * x->stride[2] * size;
        char *target = to + h * y->stride[2] * size;

        if (x->dtype == DS_F64) {
            ds_row_load_f64(r->row, source, DS_F64, d, x->stride[3]);
            rotate_double(r->row, r, d / 2, interleaved);
            ds_row_store_f64(target, r->row, DS_F64, d, y->stride[3]);
        } else {
            ds_row_load((float *)r->row, source, x->dtype, d, x->stride[3]);
            rotate_float((float *)r->row, r, d / 2, interleaved);
            ds_row_store(target, (float *)r->row, x->dtype, d, y->stride[3]);
        }
    }
}

int DS_CPU(rotary)(ds_tensor *y, const ds_tensor *x, int64_t offset, double base, int interleaved,
                   int inverse)
{
    int threads = ds_threads(x->numel * 4);
    int64_t half = x->ndim == 4 ? x->shape[3] / 2 : 0, batch = x->shape[0];
    double *scratch;

    DS_TRY(ds_check_rotary(y, x));
    if (x->numel == 0)
        return 0;
    scratch = malloc((size_t)threads * (size_t)half * 5 * sizeof *scratch);
    if (!scratch)
        return ds_fail(DS_ENOMEM, "rotary: out of memory");
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        double *mine = scratch + omp_get_thread_num() * half * 5;
        rotation r = {mine, mine + half, mine + 2 * half, mine + 3 * half};
        int64_t begin, end;

        for (int64_t i = 0; i < half; i++)
            r.frequency[i] = pow(base, -(double)i / (double)half);
        ds_part(&begin, &end, x->shape[1] * batch, 1);
        for (int64_t i = begin; i < end; i++) { /* all batches of a position, then the next */
            if (i == begin || i % batch == 0)
                (x->dtype == DS_F64 ? turn_f64 : turn_f32)(&r, (double)(offset + i / batch), half,
                                                           inverse);
            rotate_heads(y, x, i % batch, i / batch, &r, interleaved);
        }
    }
    free(scratch);
    return 0;
}
