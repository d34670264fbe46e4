/* linear.c - the linear layer: a product, then bias and activation in one pass over its result.
 *
 * The pass computes the activation and its derivative from one exp, and keeps the derivative, so that
 * backward is one multiplication: cheaper than keeping the activation's input and, on the shapes of a
 * transformer, than having oneDNN apply it (8 to 14 % of the product). Without an activation the bias
 * is oneDNN's; with one it is added here, where it costs nothing.
 */
#include <math.h>

#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"
#include "kernels/scalar.h"
#include "kernels/scratch.h"

#define CHUNK 512 /* elements activated at a time: they stay in the L1 cache */

/* ---- activations: y[i] = act(y[i] + bias[i]), slope[i] = act′ ---- */

DS_FUNC float ds_relu_both_f32(float *slope, float x)
{
    *slope = x > 0 ? 1.0f : 0.0f;
    return ds_relu_f32(x);
}

DS_FUNC double ds_relu_both_f64(double *slope, double x)
{
    *slope = x > 0 ? 1.0 : 0.0;
    return ds_relu_f64(x);
}

#define ACTIVATION(name, real, suffix)                                                             \
    static void name##_both_##suffix(real *restrict y, real *restrict slope,                       \
                                     const real *restrict bias, int64_t n)                         \
    {                                                                                              \
        for (int64_t i = 0; i < n; i++)                                                            \
            y[i] = ds_##name##_both_##suffix(&slope[i], y[i] + bias[i]);                           \
    }                                                                                              \
    static void name##_only_##suffix(real *restrict y, const real *restrict bias, int64_t n)       \
    {                                                                                              \
        for (int64_t i = 0; i < n; i++)                                                            \
            y[i] = ds_##name##_##suffix(y[i] + bias[i]);                                           \
    }

#define ACTIVATIONS(X, real, suffix)                                                               \
    X(gelu, real, suffix)                                                                          \
    X(gelu_tanh, real, suffix)                                                                     \
    X(relu, real, suffix)                                                                          \
    X(silu, real, suffix)

ACTIVATIONS(ACTIVATION, float, f32)
ACTIVATIONS(ACTIVATION, double, f64)

/* A result that is only biased, where the product could not do it (bias of another dtype). */
static void none_only_f32(float *restrict y, const float *restrict bias, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] += bias[i];
}

static void none_only_f64(double *restrict y, const double *restrict bias, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] += bias[i];
}

#define ROW(name, real, suffix) {name##_both_##suffix, name##_only_##suffix},

static const struct {
    void (*both)(float *restrict y, float *restrict slope, const float *restrict bias, int64_t n);
    void (*only)(float *restrict y, const float *restrict bias, int64_t n);
} activations[] = {{NULL, none_only_f32}, ACTIVATIONS(ROW, float, f32)};

static const struct {
    void (*both)(double *restrict y, double *restrict slope, const double *restrict bias, int64_t n);
    void (*only)(double *restrict y, const double *restrict bias, int64_t n);
} activations_f64[] = {{NULL, none_only_f64}, ACTIVATIONS(ROW, double, f64)};

#define ACTIVATION_COUNT ((int)(sizeof activations / sizeof *activations))

/* ---- the pass over y [rows, cols] ---- */

typedef struct pass {
    char *y, *slope; /* slope: dense, or NULL */
    const void *bias; /* [cols] f32 (f64 for f64), or NULL */
    int64_t rows, cols, stride; /* of y */
    int dtype, activation;
} pass;

static void activate_f64(const pass *p, int64_t row, int64_t col, int64_t n)
{
    static const double zeros[CHUNK];
    double *y = (double *)p->y + row * p->stride + col;
    double *slope = (double *)p->slope + (p->slope ? row * p->cols + col : 0);
    const double *bias = p->bias ? (const double *)p->bias + col : zeros;

    if (slope)
        activations_f64[p->activation].both(y, slope, bias, n);
    else
        activations_f64[p->activation].only(y, bias, n);
}

/* n ≤ CHUNK elements of one row. f32 is activated where it lies, the others in a copy. */
static void activate(const pass *p, int64_t row, int64_t col, int64_t n)
{
    static const float zeros[CHUNK];
    const float *bias = p->bias ? (const float *)p->bias + col : zeros;
    float chunk[CHUNK], slopes[CHUNK], *x = chunk, *s = p->slope ? slopes : NULL;
    int64_t bytes = ds_bytes_of(p->dtype);
    char *y = p->y + (row * p->stride + col) * bytes;
    char *slope = p->slope ? p->slope + (row * p->cols + col) * bytes : NULL;

    if (p->dtype == DS_F32)
        x = (float *)y, s = (float *)slope;
    else
        ds_row_load(x, y, p->dtype, n, 1);
    if (s)
        activations[p->activation].both(x, s, bias, n);
    else
        activations[p->activation].only(x, bias, n);
    if (p->dtype == DS_F32)
        return;
    ds_row_store(y, x, p->dtype, n, 1);
    if (s)
        ds_row_store(slope, s, p->dtype, n, 1);
}

static void run_pass(pass p)
{
    int threads;

    if (!p.bias && p.stride == p.cols) { /* one long row: short ones would waste vectors */
        p.cols *= p.rows;
        p.rows = 1;
    }
    threads = ds_threads(p.rows * p.cols * 4);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end, each = (p.cols + CHUNK - 1) / CHUNK;

        ds_part(&begin, &end, p.rows * each, 1);
        for (int64_t i = begin; i < end; i++) {
            int64_t col = i % each * CHUNK, n = p.cols - col < CHUNK ? p.cols - col : CHUNK;

            (p.dtype == DS_F64 ? activate_f64 : activate)(&p, i / each, col, n);
        }
    }
}

/* ---- forward ---- */

/* x [.., cols] as a matrix [rows, cols]: two dimensions with any strides, else dense. */
static int flatten(ds_matrix *out, int64_t *rows, const ds_tensor *x, const char *name)
{
    int last = x->ndim - 1;

    if (x->ndim < 1 || (x->ndim != 2 && !x->dense))
        return ds_fail(DS_EINVAL, "linear wants %s dense or with two dimensions, not %d", name,
                       x->ndim);
    *rows = 1;
    for (int d = 0; d < last; d++)
        *rows *= x->shape[d];
    *out = ds_matrix_of(x->data, x->ndim == 2 ? x->stride[0] : x->shape[last], x->stride[last],
                        x->dtype);
    return 0;
}

static int check_linear(const ds_tensor *y, const ds_tensor *slope, const ds_tensor *x,
                        const ds_tensor *w, const ds_tensor *b, int activation)
{
    int64_t n = w->shape[0], k = w->shape[1];

    if (w->ndim != 2 || x->ndim < 1 || y->ndim < 1 || x->shape[x->ndim - 1] != k ||
        y->shape[y->ndim - 1] != n || (b && b->numel != n))
        return ds_fail(DS_EINVAL, "linear wants x [.. x %lld], y [.. x %lld] and b [%lld] for w [%lld x %lld]",
                       (long long)k, (long long)n, (long long)n, (long long)n, (long long)k);
    if (!ds_is_float(x->dtype) || w->dtype != x->dtype || y->dtype != x->dtype)
        return ds_fail(DS_EINVAL, "linear cannot make %s of %s and %s", ds_name_of(y->dtype),
                       ds_name_of(x->dtype), ds_name_of(w->dtype));
    if (activation < 0 || activation >= ACTIVATION_COUNT || (slope && !activation))
        return ds_fail(DS_EINVAL, "linear has no %s %d", slope ? "slope with activation" : "activation",
                       activation);
    if (y->stride[y->ndim - 1] != 1 && y->numel > 1 && n > 1)
        return ds_fail(DS_EINVAL, "linear writes rows without gaps, not a stride of %lld",
                       (long long)y->stride[y->ndim - 1]);
    if (slope && (!slope->dense || slope->numel != y->numel || slope->dtype != y->dtype))
        return ds_fail(DS_EINVAL, "linear wants slope dense, %s, with %lld elements",
                       ds_name_of(y->dtype), (long long)y->numel);
    return 0;
}

/* b [n] dense, in f32 (f64 for f64). */
static const void *load_bias(const ds_tensor *b, int dtype)
{
    int64_t n = b->numel, stride = b->ndim ? b->stride[b->ndim - 1] : 1;
    void *row;

    if (b->dtype == (dtype == DS_F64 ? DS_F64 : DS_F32) && (stride == 1 || n == 1))
        return b->data;
    row = ds_scratch(DS_SCRATCH_SUMS, (size_t)n * sizeof(double));
    if (row && dtype == DS_F64)
        ds_row_load_f64(row, b->data, b->dtype, n, stride);
    else if (row)
        ds_row_load(row, b->data, b->dtype, n, stride);
    return row;
}

int DS_CPU(linear)(ds_tensor *y, ds_tensor *slope, const ds_tensor *x, const ds_tensor *w,
                   const ds_tensor *b, int activation)
{
    ds_product p = {.alpha = 1};
    pass q = {0};
    int64_t rows;
    int rc = check_linear(y, slope, x, w, b, activation);

    if (rc < 0 || (rc = flatten(&p.a, &p.m, x, "x")) < 0 || (rc = flatten(&p.y, &rows, y, "y")) < 0)
        return rc;
    if (rows != p.m)
        return ds_fail(DS_EINVAL, "linear cannot write %lld rows into %lld", (long long)p.m,
                       (long long)rows);
    p.n = w->shape[0], p.k = w->shape[1];
    p.b = ds_matrix_of(w->data, w->stride[1], w->stride[0], w->dtype);
    if (b && activation == 0 && b->dtype == y->dtype && b->dense) {
        p.bias = b->data;
        b = NULL;
    }
    rc = ds_product_run(&p);
    if (rc < 0 || (activation == 0 && !b) || rows == 0 || p.n == 0)
        return rc;
    if (b && !(q.bias = load_bias(b, y->dtype)))
        return DS_ENOMEM;
    q.y = y->data, q.slope = slope ? slope->data : NULL;
    q.rows = rows, q.cols = p.n, q.stride = p.y.row;
    q.dtype = y->dtype, q.activation = activation;
    run_pass(q);
    return 0;
}

/* ---- backward of activation and bias ---- */

#define FLUSH 64 /* rows summed before their sum is added to the total: keeps the sums' digits */

/* dh = dy slope, and sum += dh; cols elements. */
VF_FUNC void backward_row(char *dh, const char *dy, const char *slope, float *sum, int64_t cols,
                          int dtype)
{
    int64_t i = 0;

    for (; i + VF_LANES <= cols; i += VF_LANES) {
        vf d = vf_load_as(dy, i, dtype);

        if (slope) {
            d *= vf_load_as(slope, i, dtype);
            vf_store_as(dh, i, dtype, d);
        }
        vf_store(sum + i, vf_load(sum + i) + d);
    }
    if (i < cols) {
        int64_t n = cols - i;
        vf d = vf_load_part_as(dy, i, dtype, n);

        if (slope) {
            d *= vf_load_part_as(slope, i, dtype, n);
            vf_store_part_as(dh, i, dtype, d, n);
        }
        vf_store_part(sum + i, vf_load_part(sum + i, n) + d, n);
    }
}

static void backward_row_any(char *dh, const char *dy, const char *slope, float *sum, int64_t cols,
                             int dtype)
{
    if (dtype == DS_F32)
        backward_row(dh, dy, slope, sum, cols, DS_F32);
    else if (dtype == DS_BF16)
        backward_row(dh, dy, slope, sum, cols, DS_BF16);
    else
        backward_row(dh, dy, slope, sum, cols, DS_F16);
}

static void add_and_clear(float *restrict total, float *restrict sum, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        total[i] += sum[i];
        sum[i] = 0;
    }
}

/* One thread's rows. total [cols], sum [cols]. */
static void backward_rows(ds_matrix dh, ds_matrix dy, ds_matrix slope, int64_t begin, int64_t end,
                          int64_t cols, float *total, float *sum)
{
    int64_t bytes = ds_bytes_of(dy.dtype);

    memset(total, 0, (size_t)cols * sizeof *total);
    memset(sum, 0, (size_t)cols * sizeof *sum);
    for (int64_t r = begin; r < end; r++) {
        backward_row_any(slope.data ? dh.data + r * dh.row * bytes : NULL, dy.data + r * dy.row * bytes,
                         slope.data ? slope.data + r * slope.row * bytes : NULL, sum, cols, dy.dtype);
        if ((r - begin) % FLUSH == FLUSH - 1)
            add_and_clear(total, sum, cols);
    }
    add_and_clear(total, sum, cols);
}

/* Sums of one column in f64; plain, for gradient checks. */
static void backward_f64(ds_tensor *db, ds_matrix dh, ds_matrix dy, ds_matrix slope, int64_t rows,
                         int64_t cols, int accumulate)
{
    for (int64_t j = 0; j < cols; j++) {
        double sum = 0, old;

        for (int64_t r = 0; r < rows; r++) {
            double d = ((double *)dy.data)[r * dy.row + j];

            if (slope.data) {
                d *= ((double *)slope.data)[r * slope.row + j];
                ((double *)dh.data)[r * dh.row + j] = d;
            }
            sum += d;
        }
        if (!db)
            continue;
        old = accumulate ? ((double *)db->data)[j] : 0;
        ((double *)db->data)[j] = old + sum;
    }
}

static int check_backward(const ds_tensor *dh, const ds_tensor *db, const ds_tensor *dy,
                          const ds_tensor *slope, int64_t cols)
{
    if (!ds_is_float(dy->dtype) || (slope && (!dh || dh->dtype != dy->dtype || slope->dtype != dy->dtype)))
        return ds_fail(DS_EINVAL, "linear_backward_bias wants dh and slope in the dtype of dy, %s",
                       ds_name_of(dy->dtype));
    if (slope && (dh->numel != dy->numel || slope->numel != dy->numel))
        return ds_fail(DS_EINVAL, "linear_backward_bias got %lld, %lld and %lld elements in dh, dy, slope",
                       (long long)dh->numel, (long long)dy->numel, (long long)slope->numel);
    if (db && (db->numel != cols || !db->dense || !ds_is_float(db->dtype) ||
               (dy->dtype == DS_F64) != (db->dtype == DS_F64)))
        return ds_fail(DS_EINVAL, "linear_backward_bias wants db dense with %lld elements, not %lld %s",
                       (long long)cols, (long long)db->numel, ds_name_of(db->dtype));
    if ((dy->shape[dy->ndim - 1] > 1 && dy->stride[dy->ndim - 1] != 1) ||
        (slope && cols > 1 &&
         (dh->stride[dh->ndim - 1] != 1 || slope->stride[slope->ndim - 1] != 1)))
        return ds_fail(DS_EINVAL, "linear_backward_bias wants rows without gaps");
    return 0;
}

int DS_CPU(linear_backward_bias)(ds_tensor *dh, ds_tensor *db, const ds_tensor *dy,
                                 const ds_tensor *slope, int accumulate)
{
    int64_t cols = dy->ndim ? dy->shape[dy->ndim - 1] : 1, rows, same;
    ds_matrix to = {0}, from, factor = {0};
    float *sums, *row;
    int threads, rc = check_backward(dh, db, dy, slope, cols);

    if (rc < 0 || (rc = flatten(&from, &rows, dy, "dy")) < 0 ||
        (slope && (rc = flatten(&to, &same, dh, "dh")) < 0) ||
        (slope && (rc = flatten(&factor, &same, slope, "slope")) < 0))
        return rc;
    if (dy->dtype == DS_F64) {
        backward_f64(db, to, from, factor, rows, cols, accumulate);
        return 0;
    }
    threads = ds_threads(rows * cols);
    sums = ds_scratch(DS_SCRATCH_SUMS, (size_t)((2 * threads + 1) * cols) * sizeof *sums);
    if (!sums)
        return DS_ENOMEM;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *mine = sums + 2 * cols * omp_get_thread_num();
        int64_t begin, end;

        ds_part(&begin, &end, rows, 1);
        backward_rows(to, from, factor, begin, end, cols, mine, mine + cols);
    }
    if (!db)
        return 0;
    for (int t = 1; t < threads; t++)
        add_and_clear(sums, sums + 2 * cols * t, cols);
    row = sums + 2 * cols * threads;
    if (accumulate) {
        ds_row_load(row, db->data, db->dtype, cols, 1);
        add_and_clear(sums, row, cols);
    }
    ds_row_store(db->data, sums, db->dtype, cols, 1);
    return 0;
}
