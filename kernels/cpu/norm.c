/* norm.c - layer norm and RMS norm over the last dimension, with the residual's sum in the same pass.
 *
 * Rows go through the first-level cache as f32: a row is summed and written down, its variance taken
 * from what was written (in two passes: E[x²] - E[x]² would lose digits), then normalised. Backward
 * takes two rows at a time, to go over the sums for dw and db half as often. Every thread has such sums
 * of its own; they are added up in the threads' order.
 */
#include "kernels/cpu/level.h"

#include <math.h>

#include "kernels/scratch.h"
#include "kernels/cpu/simd.h"

#define AT_ONCE 2 /* rows, backward */

/* One call. Rows are of C elements; what depends on a column is f32 by then. */
typedef struct norm {
    const ds_tensor *x, *delta, *dy, *dsum; /* inputs, some NULL */
    const ds_tensor *y, *sum, *dx;          /* outputs */
    const ds_tensor *mean, *rstd;           /* mean NULL: RMS norm */
    const float *w, *b;                     /* [C]; b may be NULL */
    float *dw, *db;                         /* sums of each thread, `apart` floats from each other */
    int64_t rows, C, apart;
    double eps;
} norm;

/* ---- checking */

static int check_rows(const char *what, const char *name, const ds_tensor *t, const ds_tensor *x)
{
    int last = x->ndim - 1;

    if (!t)
        return 0;
    if (!ds_is_float(t->dtype) || (t->dtype == DS_F64) != (x->dtype == DS_F64))
        return ds_fail(DS_EINVAL, "%s: %s is %s beside an input of %s", what, name,
                       ds_name_of(t->dtype), ds_name_of(x->dtype));
    if (t->ndim != x->ndim || t->numel != x->numel ||
        memcmp(t->shape, x->shape, (size_t)x->ndim * sizeof *x->shape) != 0)
        return ds_fail(DS_EINVAL, "%s: %s has %lld elements in %d dimensions, must have the "
                       "input's shape (%lld in %d)", what, name, (long long)t->numel, t->ndim,
                       (long long)x->numel, x->ndim);
    if (t->stride[last] != 1 && t->shape[last] > 1)
        return ds_fail(DS_EINVAL, "%s: the last dimension of %s is not dense (stride %lld; call "
                       "contiguous() first)", what, name, (long long)t->stride[last]);
    return 0;
}

/* n elements, dense. */
static int check_vector(const char *what, const char *name, const ds_tensor *t, int64_t n,
                        const ds_tensor *x)
{
    if (!t)
        return 0;
    if (t->numel != n || !t->dense)
        return ds_fail(DS_EINVAL, "%s: %s has %lld elements, must have %lld, dense", what, name,
                       (long long)t->numel, (long long)n);
    if (!ds_is_float(t->dtype) || (t->dtype == DS_F64 && x->dtype != DS_F64))
        return ds_fail(DS_EINVAL, "%s: %s is %s beside an input of %s", what, name,
                       ds_name_of(t->dtype), ds_name_of(x->dtype));
    return 0;
}

static int check_statistics(const char *what, const norm *n)
{
    const ds_tensor *both[] = {n->mean, n->rstd};

    if (!n->rstd)
        return ds_fail(DS_EINVAL, "%s: rstd is missing", what);
    for (int i = 0; i < 2; i++) {
        int rc = check_vector(what, i ? "rstd" : "mean", both[i], n->rows, n->x);

        if (rc < 0)
            return rc;
        if (both[i] && (both[i]->dtype == DS_BF16 || both[i]->dtype == DS_F16))
            return ds_fail(DS_EINVAL, "%s: %s is %s, must be f32", what, i ? "rstd" : "mean",
                           ds_name_of(both[i]->dtype));
    }
    return 0;
}

static int set_shape(norm *n, const char *what, const ds_tensor *x)
{
    if (x->ndim < 1)
        return ds_fail(DS_EINVAL, "%s: the input has no dimensions", what);
    n->x = x;
    n->C = x->shape[x->ndim - 1];
    n->rows = n->C ? x->numel / n->C : 0;
    return check_rows(what, "the input", x, x);
}

/* ---- rows */

/* Row r of t, counting through all dimensions but the last. */
static void *row_of(const ds_tensor *t, int64_t r)
{
    int64_t at = 0;

    if (t->dense)
        return (char *)t->data + r * t->shape[t->ndim - 1] * ds_bytes_of(t->dtype);
    for (int d = t->ndim - 2; d >= 0; r /= t->shape[d--])
        at += r % t->shape[d] * t->stride[d];
    return (char *)t->data + at * ds_bytes_of(t->dtype);
}

/* Calls `function` with the dtype as a constant, so that inlining leaves no branch in its loop. */
#define BY_DTYPE(dtype, function, ...)                                                             \
    ((dtype) == DS_F32    ? function(__VA_ARGS__, DS_F32)                                          \
     : (dtype) == DS_BF16 ? function(__VA_ARGS__, DS_BF16)                                         \
                          : function(__VA_ARGS__, DS_F16))

/* Loops take whole vectors, and what is left of a row in one step more: `left` is the constant
 * VF_LANES in all but that one. */
VF_FUNC vf load(const void *x, int64_t i, int64_t left, int dtype)
{
    return left == VF_LANES ? vf_load_as(x, i, dtype) : vf_load_part_as(x, i, dtype, left);
}

VF_FUNC void store(void *y, int64_t i, int64_t left, int dtype, vf v)
{
    if (left == VF_LANES)
        vf_store_as(y, i, dtype, v);
    else
        vf_store_part_as(y, i, dtype, v, left);
}

#define WHOLE(n) ((n) / VF_LANES * VF_LANES)

/* v as a tensor of that dtype would hold it. */
VF_FUNC vf rounded(vf v, int dtype)
{
    if (dtype == DS_F32)
        return v;
    return dtype == DS_BF16 ? vf_from_bf16(vf_to_bf16(v)) : vf_from_f16(vf_to_f16(v));
}

/* Lanes beyond the row's end are 0 in what is loaded; v, made of it, must have 0 there, too. */
VF_FUNC vf inside(vf v, int64_t left)
{
    float lanes[VF_LANES] = {0};

    if (left == VF_LANES)
        return v;
    vf_store_part(lanes, v, left);
    return vf_load(lanes);
}

/* ---- forward */

VF_FUNC void add_step(float *row, void *sum, const void *x, const void *delta, int64_t i,
                      int64_t left, int x_dtype, int delta_dtype)
{
    vf v = load(x, i, left, x_dtype) + load(delta, i, left, delta_dtype);

    store(sum, i, left, x_dtype, v);
    vf_store(row + i, rounded(v, x_dtype));
}

/* row = x + delta, rounded as `sum` holds it. */
VF_FUNC void add_as(float *row, void *sum, const void *x, const void *delta, int64_t n, int x_dtype,
                    int delta_dtype)
{
    int64_t i = 0;

    for (; i < WHOLE(n); i += VF_LANES)
        add_step(row, sum, x, delta, i, VF_LANES, x_dtype, delta_dtype);
    if (i < n)
        add_step(row, sum, x, delta, i, n - i, x_dtype, delta_dtype);
}

static void add_f32(float *row, void *sum, const void *x, const void *delta, int64_t n, int dtype)
{
    BY_DTYPE(dtype, add_as, row, sum, x, delta, n, DS_F32);
}

static void add_bf16(float *row, void *sum, const void *x, const void *delta, int64_t n, int dtype)
{
    BY_DTYPE(dtype, add_as, row, sum, x, delta, n, DS_BF16);
}

static void add_f16(float *row, void *sum, const void *x, const void *delta, int64_t n, int dtype)
{
    BY_DTYPE(dtype, add_as, row, sum, x, delta, n, DS_F16);
}

VF_FUNC float sum_of(const float *row, int64_t n)
{
    vf s[4] = {{0}};
    int64_t i = 0;

    for (; i + 4 * VF_LANES <= n; i += 4 * VF_LANES)
        for (int k = 0; k < 4; k++)
            s[k] += vf_load(row + i + k * VF_LANES);
    for (; i < WHOLE(n); i += VF_LANES)
        s[0] += vf_load(row + i);
    if (i < n)
        s[1] += vf_load_part(row + i, n - i);
    return vf_sum((s[0] + s[1]) + (s[2] + s[3]));
}

VF_FUNC float squares_of(const float *row, int64_t n, float mean)
{
    vf s[4] = {{0}}, v;
    int64_t i = 0;

    for (; i + 4 * VF_LANES <= n; i += 4 * VF_LANES)
        for (int k = 0; k < 4; k++) {
            v = vf_load(row + i + k * VF_LANES) - mean;
            s[k] = vf_fma(v, v, s[k]);
        }
    for (; i < WHOLE(n); i += VF_LANES) {
        v = vf_load(row + i) - mean;
        s[0] = vf_fma(v, v, s[0]);
    }
    if (i < n) {
        v = inside(vf_load_part(row + i, n - i) - mean, n - i);
        s[1] = vf_fma(v, v, s[1]);
    }
    return vf_sum((s[0] + s[1]) + (s[2] + s[3]));
}

VF_FUNC void normalise_step(void *y, const float *row, const norm *n, vf mean, vf rstd, int64_t i,
                            int64_t left, int has_b, int dtype)
{
    vf v = (load(row, i, left, DS_F32) - mean) * rstd, w = load(n->w, i, left, DS_F32);

    store(y, i, left, dtype, has_b ? vf_fma(v, w, load(n->b, i, left, DS_F32)) : v * w);
}

VF_FUNC void normalise_as(void *y, const float *row, const norm *n, float mean, float rstd,
                          int dtype)
{
    vf m = vf_set(mean), r = vf_set(rstd);
    int64_t i = 0;

    for (; i < WHOLE(n->C) && n->b; i += VF_LANES)
        normalise_step(y, row, n, m, r, i, VF_LANES, 1, dtype);
    for (; i < WHOLE(n->C); i += VF_LANES)
        normalise_step(y, row, n, m, r, i, VF_LANES, 0, dtype);
    if (i < n->C)
        normalise_step(y, row, n, m, r, i, n->C - i, n->b != NULL, dtype);
}

/* buffer [C, rounded up to vectors] */
static void forward_row(const norm *n, int64_t r, float *buffer)
{
    const void *x = row_of(n->x, r);
    void *y = row_of(n->y, r);
    const float *row = buffer;
    float mean = 0, rstd;

    if (n->delta)
        (n->x->dtype == DS_F32    ? add_f32
         : n->x->dtype == DS_BF16 ? add_bf16
                                  : add_f16)(buffer, row_of(n->sum, r), x, row_of(n->delta, r), n->C,
                                             n->delta->dtype);
    else if (n->x->dtype == DS_F32)
        row = x;
    else
        ds_row_load(buffer, x, n->x->dtype, n->C, 1);
    if (n->mean)
        ((float *)n->mean->data)[r] = mean = sum_of(row, n->C) / (float)n->C;
    rstd = 1 / sqrtf(squares_of(row, n->C, mean) / (float)n->C + (float)n->eps);
    ((float *)n->rstd->data)[r] = rstd;
    BY_DTYPE(n->y->dtype, normalise_as, y, row, n, mean, rstd);
}

/* ---- backward */

/* The rows in hand, and what is gathered of each: Σ g and Σ g xh, lane by lane. */
typedef struct hand {
    const void *x[AT_ONCE], *dy[AT_ONCE];
    vf mean[AT_ONCE], rstd[AT_ONCE], sum[AT_ONCE], dot[AT_ONCE];
} hand;

VF_FUNC void gather_step(hand *of, float *xh, float *g, const norm *n, float *dw, float *db,
                         int64_t i, int64_t left, int count, int x_dtype, int dy_dtype)
{
    vf w = load(n->w, i, left, DS_F32), dwi = vf_load(dw + i), dbi = vf_load(db + i);

    for (int k = 0; k < count; k++) {
        vf x = load(of->x[k], i, left, x_dtype), d = load(of->dy[k], i, left, dy_dtype);
        vf h = inside((x - of->mean[k]) * of->rstd[k], left);

        dwi = vf_fma(d, h, dwi);
        dbi += d;
        d *= w;
        of->sum[k] += d;
        of->dot[k] = vf_fma(d, h, of->dot[k]);
        vf_store(xh + k * n->apart + i, h);
        vf_store(g + k * n->apart + i, d);
    }
    vf_store(dw + i, dwi);
    vf_store(db + i, dbi);
}

/* Of `count` rows: xh = (x - mean) rstd and g = dy w go to buffers [count], `apart` from each other, their
 * sums to dw, db; s, q: Σ g and Σ g xh of each row. */
VF_FUNC void gather_as(float *xh, float *g, float *s, float *q, const norm *n, float *dw, float *db,
                       int64_t r, int count, int x_dtype, int dy_dtype)
{
    hand of;
    int64_t i = 0;

    for (int k = 0; k < count; k++) {
        of.x[k] = row_of(n->x, r + k);
        of.dy[k] = row_of(n->dy, r + k);
        of.mean[k] = vf_set(n->mean ? ((float *)n->mean->data)[r + k] : 0);
        of.rstd[k] = vf_set(((float *)n->rstd->data)[r + k]);
        of.sum[k] = of.dot[k] = (vf){0};
    }
    for (; i < WHOLE(n->C); i += VF_LANES)
        gather_step(&of, xh, g, n, dw, db, i, VF_LANES, count, x_dtype, dy_dtype);
    if (i < n->C)
        gather_step(&of, xh, g, n, dw, db, i, n->C - i, count, x_dtype, dy_dtype);
    for (int k = 0; k < count; k++) {
        s[k] = vf_sum(of.sum[k]);
        q[k] = vf_sum(of.dot[k]);
    }
}

/* The two numbers of rows that occur, as constants. */
VF_FUNC void gather_rows(float *xh, float *g, float *s, float *q, const norm *n, float *dw,
                         float *db, int64_t r, int count, int x_dtype, int dy_dtype)
{
    if (count == AT_ONCE)
        gather_as(xh, g, s, q, n, dw, db, r, AT_ONCE, x_dtype, dy_dtype);
    else
        gather_as(xh, g, s, q, n, dw, db, r, 1, x_dtype, dy_dtype);
}

#define GATHER(name, x_dtype)                                                                      \
    static void name(float *xh, float *g, float *s, float *q, const norm *n, float *dw, float *db, \
                     int64_t r, int count)                                                         \
    {                                                                                              \
        BY_DTYPE(n->dy->dtype, gather_rows, xh, g, s, q, n, dw, db, r, count, x_dtype);            \
    }
GATHER(gather_f32, DS_F32)
GATHER(gather_bf16, DS_BF16)
GATHER(gather_f16, DS_F16)

/* dx = rstd (g - mean(g) - xh mean(g xh)) + dsum */
VF_FUNC void input_gradient_as(void *dx, const float *xh, const float *g, const void *dsum,
                               int64_t n, float rstd, float mean_g, float mean_dot, int dtype)
{
    vf scale = vf_set(-rstd * mean_dot), shift = vf_set(-rstd * mean_g), r = vf_set(rstd), v;
    int64_t i = 0;

    for (; i < WHOLE(n); i += VF_LANES) {
        v = vf_fma(vf_load(xh + i), scale, vf_fma(vf_load(g + i), r, shift));
        vf_store_as(dx, i, dtype, dsum ? v + vf_load_as(dsum, i, dtype) : v);
    }
    if (i < n) {
        v = vf_fma(vf_load(xh + i), scale, vf_fma(vf_load(g + i), r, shift));
        vf_store_part_as(dx, i, dtype, dsum ? v + vf_load_part_as(dsum, i, dtype, n - i) : v, n - i);
    }
}

static void backward_rows(const norm *n, float *buffer, float *dw, float *db, int64_t r, int count)
{
    int64_t stride = n->apart;
    float *xh = buffer, *g = buffer + AT_ONCE * stride, s[AT_ONCE], q[AT_ONCE];

    (n->x->dtype == DS_F32    ? gather_f32
     : n->x->dtype == DS_BF16 ? gather_bf16
                              : gather_f16)(xh, g, s, q, n, dw, db, r, count);
    for (int k = 0; k < count; k++) {
        float rstd = ((float *)n->rstd->data)[r + k], mean_g = n->mean ? s[k] / (float)n->C : 0;
        const void *dsum = n->dsum ? row_of(n->dsum, r + k) : NULL;

        BY_DTYPE(n->dx->dtype, input_gradient_as, row_of(n->dx, r + k), xh + k * stride,
                 g + k * stride, dsum, n->C, rstd, mean_g, q[k] / (float)n->C);
    }
}

/* Columns begin .. end of dw or db: the threads' sums in order; added to what is there, or not. */
static void store_sums(const ds_tensor *to, float *sums, const norm *n, int64_t begin, int64_t end,
                       int threads, int accumulate)
{
    char *at = (char *)to->data + begin * ds_bytes_of(to->dtype);

    for (int t = 1; t < threads; t++)
        for (int64_t i = begin; i < end; i++)
            sums[i] += sums[t * 2 * n->apart + i];
    if (accumulate) {
        float *had = sums + 2 * threads * n->apart; /* the first thread's buffer is free by now */

        ds_row_load(had + begin, at, to->dtype, end - begin, 1);
        for (int64_t i = begin; i < end; i++)
            sums[i] += had[i];
    }
    ds_row_store(at, sums + begin, to->dtype, end - begin, 1);
}

/* ---- f64: plain loops, for gradient checks */

static double at(const ds_tensor *t, int64_t i)
{
    if (!t)
        return 0;
    return t->dtype == DS_F64 ? ((double *)t->data)[i] : ((float *)t->data)[i];
}

static void put(const ds_tensor *t, int64_t i, double v)
{
    if (t && t->dtype == DS_F64)
        ((double *)t->data)[i] = v;
    else if (t)
        ((float *)t->data)[i] = (float)v;
}

static void forward_f64(const norm *n, const ds_tensor *w, const ds_tensor *b)
{
    for (int64_t r = 0; r < n->rows; r++) {
        const double *x = row_of(n->x, r), *delta = n->delta ? row_of(n->delta, r) : NULL;
        double *y = row_of(n->y, r), *sum = n->sum ? row_of(n->sum, r) : y;
        double mean = 0, square = 0, rstd;

        for (int64_t i = 0; i < n->C; i++) {
            sum[i] = x[i] + (delta ? delta[i] : 0);
            mean += n->mean ? sum[i] / (double)n->C : 0;
        }
        for (int64_t i = 0; i < n->C; i++)
            square += (sum[i] - mean) * (sum[i] - mean);
        rstd = 1 / sqrt(square / (double)n->C + n->eps);
        for (int64_t i = 0; i < n->C; i++)
            y[i] = (sum[i] - mean) * rstd * (w ? at(w, i) : 1) + at(b, i);
        put(n->mean, r, mean);
        put(n->rstd, r, rstd);
    }
}

static void backward_f64(const norm *n, const ds_tensor *w, const ds_tensor *dw,
                         const ds_tensor *db, int accumulate)
{
    for (int64_t i = 0; i < n->C && !accumulate; i++) {
        put(dw, i, 0);
        put(db, i, 0);
    }
    for (int64_t r = 0; r < n->rows; r++) {
        const double *x = row_of(n->x, r), *dy = row_of(n->dy, r);
        const double *dsum = n->dsum ? row_of(n->dsum, r) : NULL;
        double *dx = row_of(n->dx, r), mean = at(n->mean, r), rstd = at(n->rstd, r), s = 0, q = 0;

        for (int64_t i = 0; i < n->C; i++) {
            double h = (x[i] - mean) * rstd, g = dy[i] * (w ? at(w, i) : 1);

            s += n->mean ? g / (double)n->C : 0;
            q += g * h / (double)n->C;
            put(dw, i, at(dw, i) + dy[i] * h);
            put(db, i, at(db, i) + dy[i]);
        }
        for (int64_t i = 0; i < n->C; i++)
            dx[i] = rstd * (dy[i] * (w ? at(w, i) : 1) - s - (x[i] - mean) * rstd * q) +
                    (dsum ? dsum[i] : 0);
    }
}

/* ---- the kernels */

/* t as f32, in `buffer` unless it is so already; NULL: `otherwise`. */
static const float *column(const ds_tensor *t, float *buffer, int64_t n, float otherwise)
{
    if (t && t->dtype == DS_F32)
        return t->data;
    if (t)
        ds_row_load(buffer, t->data, t->dtype, n, 1);
    for (int64_t i = 0; !t && i < n; i++)
        buffer[i] = otherwise;
    return buffer;
}

int DS_CPU(norm)(ds_tensor *y, ds_tensor *sum, ds_tensor *mean, ds_tensor *rstd, const ds_tensor *x,
                 const ds_tensor *delta, const ds_tensor *w, const ds_tensor *b, double eps)
{
    static const char what[] = "norm";
    norm n = {.y = y, .sum = sum, .mean = mean, .rstd = rstd, .delta = delta, .eps = eps};
    int threads = ds_threads(x->numel), rc = set_shape(&n, what, x);
    float *memory;

    if (rc < 0 || (rc = check_rows(what, "the output", y, x)) < 0 ||
        (rc = check_rows(what, "sum", sum, x)) < 0 || (rc = check_rows(what, "delta", delta, x)) < 0 ||
        (rc = check_statistics(what, &n)) < 0 || (rc = check_vector(what, "w", w, n.C, x)) < 0 ||
        (rc = check_vector(what, "b", b, n.C, x)) < 0)
        return rc;
    if (!delta != !sum || (sum && sum->dtype != x->dtype))
        return ds_fail(DS_EINVAL, "%s: sum and delta belong together, and sum is of the input's dtype",
                       what);
    if (x->dtype == DS_F64) {
        forward_f64(&n, w, b);
        return 0;
    }
    n.apart = (n.C + VF_LANES - 1) / VF_LANES * VF_LANES + 16;
    memory = ds_scratch(DS_SCRATCH_SUMS, (size_t)((threads + 2) * n.apart) * sizeof(float));
    if (!memory)
        return DS_ENOMEM;
    n.w = column(w, memory, n.C, 1);
    n.b = b ? column(b, memory + n.apart, n.C, 0) : NULL;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;

        ds_part(&begin, &end, n.rows, 1);
        for (int64_t r = begin; r < end; r++)
            forward_row(&n, r, memory + (2 + omp_get_thread_num()) * n.apart);
    }
    return 0;
}

/* Scratch memory: w, then dw and db of each thread, then each thread's rows. */
static void backward_part(const norm *n, const ds_tensor *dw, const ds_tensor *db, int threads,
                          int accumulate)
{
    int me = omp_get_thread_num();
    float *mine = n->dw + 2 * me * n->apart, *rows = n->dw + 2 * threads * n->apart;
    int64_t begin, end;

    memset(mine, 0, (size_t)(2 * n->apart) * sizeof(float));
    ds_part(&begin, &end, n->rows, 1);
    for (int64_t r = begin; r < end; r += AT_ONCE)
        backward_rows(n, rows + me * 2 * AT_ONCE * n->apart, mine, mine + n->apart, r,
                      end - r < AT_ONCE ? 1 : AT_ONCE);
#pragma omp barrier
    ds_part(&begin, &end, n->C, 16);
    if (dw)
        store_sums(dw, n->dw, n, begin, end, threads, accumulate);
    if (db)
        store_sums(db, n->db, n, begin, end, threads, accumulate);
}

int DS_CPU(norm_backward)(ds_tensor *dx, ds_tensor *dw, ds_tensor *db, const ds_tensor *dy,
                          const ds_tensor *x, const ds_tensor *w, const ds_tensor *mean,
                          const ds_tensor *rstd, const ds_tensor *dsum, int accumulate)
{
    static const char what[] = "norm_backward";
    norm n = {.dx = dx, .dy = dy, .dsum = dsum, .mean = mean, .rstd = rstd};
    int threads = ds_threads(x->numel), rc = set_shape(&n, what, x);
    float *memory;

    if (rc < 0 || (rc = check_rows(what, "dx", dx, x)) < 0 || (rc = check_rows(what, "dy", dy, x)) < 0 ||
        (rc = check_rows(what, "dsum", dsum, x)) < 0 || (rc = check_statistics(what, &n)) < 0 ||
        (rc = check_vector(what, "w", w, n.C, x)) < 0 ||
        (rc = check_vector(what, "dw", dw, n.C, x)) < 0 ||
        (rc = check_vector(what, "db", db, n.C, x)) < 0)
        return rc;
    if (dsum && dsum->dtype != dx->dtype)
        return ds_fail(DS_EINVAL, "%s: dsum is %s, dx %s", what, ds_name_of(dsum->dtype),
                       ds_name_of(dx->dtype));
    if (x->dtype == DS_F64) {
        backward_f64(&n, w, dw, db, accumulate);
        return 0;
    }
    n.apart = (n.C + VF_LANES - 1) / VF_LANES * VF_LANES + 16;
    memory = ds_scratch(DS_SCRATCH_SUMS,
                        (size_t)((1 + threads * (2 + 2 * AT_ONCE)) * n.apart) * sizeof(float));
    if (!memory)
        return DS_ENOMEM;
    n.w = column(w, memory, n.C, 1);
    n.dw = memory + n.apart;
    n.db = n.dw + n.apart;
#pragma omp parallel num_threads(threads) if (threads > 1)
    backward_part(&n, dw, db, threads, accumulate);
    return 0;
}
