/* norm.c - layer norm and RMS norm over the last dimension, with the residual's sum in the same
 * pass.
 *
 * A row is read from memory once and stays in the first-level cache for the passes that follow:
 * the variance takes a pass of its own (E[x²] - E[x]² would lose digits), backward reads its two
 * inputs again rather than keep what it made of them. Every thread sums dw and db for itself;
 * the sums are added up in the threads' order.
 */
#include "kernels/cpu/level.h"

#include <math.h>

#include "kernels/scratch.h"
#include "kernels/cpu/simd.h"

/* One call. Rows are of C elements; what depends on a column is f32 by then. */
typedef struct norm {
    const ds_tensor *x, *delta, *dy, *dsum; /* inputs, some NULL */
    const ds_tensor *y, *sum, *dx;          /* outputs */
    const ds_tensor *mean, *rstd;           /* mean NULL: RMS norm */
    const float *w, *b;                     /* [C]; b may be NULL */
    float *dw, *db; /* sums of each thread, `apart` floats from each other */
    int64_t rows, C, apart;
    double eps;
} norm;

static void set_shape(norm *n, const ds_tensor *x)
{
    n->x = x;
    n->C = x->shape[x->ndim - 1];
    n->rows = n->C ? x->numel / n->C : 0;
}

/* ---- rows */

static __attribute__((noinline)) void *strided_row(const ds_tensor *t, int64_t r)
{
    int64_t at = 0;

    for (int d = t->ndim - 2; d >= 0; r /= t->shape[d--])
        at += r % t->shape[d] * t->stride[d];
    return (char *)t->data + at * ds_bytes_of(t->dtype);
}

/* Row r of t, counting through all dimensions but the last. */
static inline void *row_of(const ds_tensor *t, int64_t r)
{
    if (!t->dense)
        return strided_row(t, r);
    return (char *)t->data + r * t->shape[t->ndim - 1] * ds_bytes_of(t->dtype);
}

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

/* ---- forward. x and sum are of one dtype, delta and y of one. */

VF_FUNC vf add_step(const void *x, void *sum, const void *delta, int64_t i, int64_t left,
                    int x_dtype, int y_dtype)
{
    vf v = load(x, i, left, x_dtype);

    if (!delta)
        return v;
    v += load(delta, i, left, y_dtype);
    store(sum, i, left, x_dtype, v);
    return rounded(v, x_dtype);
}

VF_FUNC vf square_step(vf s, const void *x, float mean, int64_t i, int64_t left, int x_dtype)
{
    vf v = inside(load(x, i, left, x_dtype) - mean, left);

    return vf_fma(v, v, s);
}

/* Mean of x, or of sum = x + delta. Four sums, so that an addition need not wait for the last
 * one. */
VF_FUNC float mean_as(const void *x, void *sum, const void *delta, int64_t C, int x_dtype,
                      int y_dtype)
{
    vf s[4] = {{0}};
    int64_t i = 0;

    for (; i + 4 * VF_LANES <= C; i += 4 * VF_LANES)
        for (int k = 0; k < 4; k++)
            s[k] += add_step(x, sum, delta, i + k * VF_LANES, VF_LANES, x_dtype, y_dtype);
    for (; i + VF_LANES <= C; i += VF_LANES)
        s[0] += add_step(x, sum, delta, i, VF_LANES, x_dtype, y_dtype);
    if (i < C)
        s[1] += add_step(x, sum, delta, i, C - i, x_dtype, y_dtype);
    return vf_sum((s[0] + s[1]) + (s[2] + s[3])) * (1 / (float)C);
}

VF_FUNC float variance_as(const void *x, float mean, int64_t C, int x_dtype)
{
    vf s[4] = {{0}};
    int64_t i = 0;

    for (; i + 4 * VF_LANES <= C; i += 4 * VF_LANES)
        for (int k = 0; k < 4; k++)
            s[k] = square_step(s[k], x, mean, i + k * VF_LANES, VF_LANES, x_dtype);
    for (; i + VF_LANES <= C; i += VF_LANES)
        s[0] = square_step(s[0], x, mean, i, VF_LANES, x_dtype);
    if (i < C)
        s[1] = square_step(s[1], x, mean, i, C - i, x_dtype);
    return vf_sum((s[0] + s[1]) + (s[2] + s[3])) * (1 / (float)C);
}

VF_FUNC void normalise_step(void *y, const void *x, const float *w, const float *b, vf mean,
                            vf rstd, int64_t i, int64_t left, int x_dtype, int y_dtype)
{
    vf v = (load(x, i, left, x_dtype) - mean) * rstd, wi = load(w, i, left, DS_F32);

    store(y, i, left, y_dtype, b ? vf_fma(v, wi, load(b, i, left, DS_F32)) : v * wi);
}

VF_FUNC void normalise_as(void *y, const void *x, const float *w, const float *b, float mean,
                          float rstd, int64_t C, int x_dtype, int y_dtype)
{
    vf m = vf_set(mean), r = vf_set(rstd);
    int64_t i = 0;

    for (; i + VF_LANES <= C; i += VF_LANES)
        normalise_step(y, x, w, b, m, r, i, VF_LANES, x_dtype, y_dtype);
    if (i < C)
        normalise_step(y, x, w, b, m, r, i, C - i, x_dtype, y_dtype);
}

VF_FUNC void forward_as(const norm *n, int64_t r, int x_dtype, int y_dtype)
{
    void *x = row_of(n->x, r), *y = row_of(n->y, r), *delta = n->delta ? row_of(n->delta, r) : NULL;
    float mean = 0, rstd;

    if (delta) {
        void *sum = row_of(n->sum, r);

        mean = mean_as(x, sum, delta, n->C, x_dtype, y_dtype);
        x = sum;
    } else if (n->mean) {
        mean = mean_as(x, NULL, NULL, n->C, x_dtype, y_dtype);
    }
    if (n->mean)
        ((float *)n->mean->data)[r] = mean;
    else
        mean = 0;
    rstd = 1 / sqrtf(variance_as(x, mean, n->C, x_dtype) + (float)n->eps);
    ((float *)n->rstd->data)[r] = rstd;
    if (n->b)
        normalise_as(y, x, n->w, n->b, mean, rstd, n->C, x_dtype, y_dtype);
    else
        normalise_as(y, x, n->w, NULL, mean, rstd, n->C, x_dtype, y_dtype);
}

/* ---- backward. x, dx and dsum are of one dtype, dy may be of another. */

/* One row's constants, and what is summed over it. */
typedef struct row {
    const void *x, *dy, *dsum;
    void *dx;
    vf mean, rstd, sum, dot; /* sum: of g, dot: of g xh, lane by lane; then their means */
} row;

/* xh = (x - mean) rstd and g = dy w, also without w. */
VF_FUNC void row_step(vf *xh, vf *g, vf *dy, const row *of, const float *w, int64_t i, int64_t left,
                      int x_dtype, int dy_dtype)
{
    *dy = load(of->dy, i, left, dy_dtype);
    *xh = (load(of->x, i, left, x_dtype) - of->mean) * of->rstd;
    *g = *dy * load(w, i, left, DS_F32);
}

VF_FUNC void gather_step(row *of, const float *w, float *dw, float *db, int64_t i, int64_t left,
                         int x_dtype, int dy_dtype)
{
    vf xh, g, dy;

    row_step(&xh, &g, &dy, of, w, i, left, x_dtype, dy_dtype);
    of->sum += g;
    of->dot = vf_fma(g, xh, of->dot); /* beyond the row's end g and dy are 0 */
    vf_store(dw + i, vf_fma(dy, xh, vf_load(dw + i)));
    if (db)
        vf_store(db + i, vf_load(db + i) + dy);
}

/* dx = rstd (g - mean(g) - xh mean(g xh)) + dsum */
VF_FUNC void scatter_step(const row *of, const float *w, int64_t i, int64_t left, int x_dtype,
                          int dy_dtype)
{
    vf xh, g, dy, dx;

    row_step(&xh, &g, &dy, of, w, i, left, x_dtype, dy_dtype);
    dx = of->rstd * (g - vf_fma(xh, of->dot, of->sum));
    store(of->dx, i, left, x_dtype, of->dsum ? dx + load(of->dsum, i, left, x_dtype) : dx);
}

VF_FUNC void backward_row(row *of, const float *w, float *dw, float *db, int64_t C, int centred,
                          int x_dtype, int dy_dtype)
{
    row now = *of; /* a copy that is nobody else's stays in registers */
    int64_t i = 0;

    now.sum = now.dot = (vf){0};
    for (; i + VF_LANES <= C; i += VF_LANES)
        gather_step(&now, w, dw, db, i, VF_LANES, x_dtype, dy_dtype);
    if (i < C)
        gather_step(&now, w, dw, db, i, C - i, x_dtype, dy_dtype);
    now.sum = vf_set(centred ? vf_sum(now.sum) * (1 / (float)C) : 0);
    now.dot = vf_set(vf_sum(now.dot) * (1 / (float)C));
    for (i = 0; i + VF_LANES <= C; i += VF_LANES)
        scatter_step(&now, w, i, VF_LANES, x_dtype, dy_dtype);
    if (i < C)
        scatter_step(&now, w, i, C - i, x_dtype, dy_dtype);
}

/* dw, db: this thread's. */
VF_FUNC void backward_as(const norm *n, float *dw, float *db, int64_t r, int x_dtype, int dy_dtype)
{
    row of = {.x = row_of(n->x, r),
              .dy = row_of(n->dy, r),
              .dx = row_of(n->dx, r),
              .dsum = n->dsum ? row_of(n->dsum, r) : NULL,
              .mean = vf_set(n->mean ? ((float *)n->mean->data)[r] : 0),
              .rstd = vf_set(((float *)n->rstd->data)[r])};

    if (db)
        backward_row(&of, n->w, dw, db, n->C, n->mean != NULL, x_dtype, dy_dtype);
    else
        backward_row(&of, n->w, dw, NULL, n->C, n->mean != NULL, x_dtype, dy_dtype);
}

/* ---- a function for each pair of dtypes: of x and y, of x and dy */

typedef void forward_rows(const norm *n, int64_t begin, int64_t end);
typedef void backward_rows(const norm *n, float *dw, float *db, int64_t begin, int64_t end);

#define PAIR(x, y)                                                                                 \
    static void forward_##x##_##y(const norm *n, int64_t begin, int64_t end)                       \
    {                                                                                              \
        for (int64_t r = begin; r < end; r++)                                                      \
            forward_as(n, r, DS_##x, DS_##y);                                                      \
    }                                                                                              \
    static void backward_##x##_##y(const norm *n, float *dw, float *db, int64_t begin,             \
                                   int64_t end)                                                    \
    {                                                                                              \
        for (int64_t r = begin; r < end; r++)                                                      \
            backward_as(n, dw, db, r, DS_##x, DS_##y);                                             \
    }
PAIR(F32, F32)
PAIR(F32, BF16)
PAIR(F32, F16)
PAIR(BF16, F32)
PAIR(BF16, BF16)
PAIR(BF16, F16)
PAIR(F16, F32)
PAIR(F16, BF16)
PAIR(F16, F16)

static forward_rows *const forward_of[3][3] = {
    [DS_F32] = {forward_F32_F32, forward_F32_BF16, forward_F32_F16},
    [DS_BF16] = {forward_BF16_F32, forward_BF16_BF16, forward_BF16_F16},
    [DS_F16] = {forward_F16_F32, forward_F16_BF16, forward_F16_F16},
};
static backward_rows *const backward_of[3][3] = {
    [DS_F32] = {backward_F32_F32, backward_F32_BF16, backward_F32_F16},
    [DS_BF16] = {backward_BF16_F32, backward_BF16_BF16, backward_BF16_F16},
    [DS_F16] = {backward_F16_F32, backward_F16_BF16, backward_F16_F16},
};

/* Columns begin .. end of dw or db: the threads' sums in order; added to what is there, or not. */
static void store_sums(const ds_tensor *to, float *sums, const norm *n, int64_t begin, int64_t end,
                       int threads, int accumulate)
{
    char *at = (char *)to->data + begin * ds_bytes_of(to->dtype);

    for (int t = 1; t < threads; t++)
        for (int64_t i = begin; i < end; i++)
            sums[i] += sums[t * 2 * n->apart + i];
    if (accumulate) {
        float *had = n->dw + 2 * threads * n->apart;

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
    norm n = {.y = y, .sum = sum, .mean = mean, .rstd = rstd, .delta = delta, .eps = eps};
    int threads = ds_threads(x->numel);
    float *memory;

    DS_TRY(ds_check_norm(y, sum, mean, rstd, x, delta, w, b));
    set_shape(&n, x);
    if (x->dtype == DS_F64) {
        forward_f64(&n, w, b);
        return 0;
    }
    n.apart = (n.C + VF_LANES - 1) / VF_LANES * VF_LANES + 16;
    memory = ds_scratch(DS_SCRATCH_SUMS, (size_t)(2 * n.apart) * sizeof(float));
    if (!memory)
        return DS_ENOMEM;
    n.w = column(w, memory, n.C, 1);
    n.b = b ? column(b, memory + n.apart, n.C, 0) : NULL;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;

        ds_part(&begin, &end, n.rows, 1);
        forward_of[x->dtype][y->dtype](&n, begin, end);
    }
    return 0;
}

/* Scratch memory: w, then dw and db of each thread, then a row. */
static void backward_part(const norm *n, const ds_tensor *dw, const ds_tensor *db, int threads,
                          int accumulate)
{
    float *mine = n->dw + 2 * omp_get_thread_num() * n->apart;
    int64_t begin, end;

    memset(mine, 0, (size_t)(2 * n->apart) * sizeof(float));
    ds_part(&begin, &end, n->rows, 1);
    backward_of[n->x->dtype][n->dy->dtype](n, mine, db ? mine + n->apart : NULL, begin, end);
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
    norm n = {.dx = dx, .dy = dy, .dsum = dsum, .mean = mean, .rstd = rstd};
    int threads = ds_threads(x->numel);
    float *memory;

    DS_TRY(ds_check_norm_backward(dx, dw, db, dy, x, w, mean, rstd, dsum));
    set_shape(&n, x);
    if (x->dtype == DS_F64) {
        backward_f64(&n, w, dw, db, accumulate);
        return 0;
    }
    n.apart = (n.C + VF_LANES - 1) / VF_LANES * VF_LANES + 16;
    memory = ds_scratch(DS_SCRATCH_SUMS, (size_t)((2 + 2 * threads) * n.apart) * sizeof(float));
    if (!memory)
        return DS_ENOMEM;
    n.w = column(w, memory, n.C, 1);
    n.dw = memory + n.apart;
    n.db = n.dw + n.apart;
#pragma omp parallel num_threads(threads) if (threads > 1)
    backward_part(&n, dw, db, threads, accumulate);
    return 0;
}
