/* softmax.c - softmax, log_softmax and cross-entropy, forward and backward.
 *
 * All of them work on lines along one dimension: a line is brought to dense f32 (f64 for f64)
 * unless it is that already, one function computes it, and it is stored. One pass takes the
 * exponentials, shifted by the line's maximum; sums are in f32 lanes for at most BLOCK elements,
 * then in f64.
 */
#include "kernels/cpu/walk.h"

#include <math.h>
#include <stdlib.h>

#define BLOCK 4096

/* ---- on dense rows: f32 by vectors, f64 by libm */

/* The largest element that is not NaN: the sum of exponentials brings NaN out. */
static float max_f32(const float *x, int64_t n)
{
    vf m = vf_set(-INFINITY);
    float most;
    int64_t i = 0;

    for (; i + VF_LANES <= n; i += VF_LANES)
        m = vf_max(vf_load(x + i), m);
    for (most = vf_max_lane(m); i < n; i++)
        most = x[i] > most ? x[i] : most;
    return most;
}

static double max_f64(const double *x, int64_t n)
{
    double most = -INFINITY;

    for (int64_t i = 0; i < n; i++)
        most = x[i] > most ? x[i] : most;
    return most;
}

/* y = exp(x - shift), and its sum. y NULL: only the sum. */
static double exp_sum_f32(float *y, const float *x, int64_t n, float shift)
{
    double sum = 0;

    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t end = begin + BLOCK < n ? begin + BLOCK : n, i = begin;
        vf a = vf_set(0.0f), b = a, s = vf_set(shift);

        for (; i + 2 * VF_LANES <= end; i += 2 * VF_LANES) {
            vf u = vf_exp(vf_load(x + i) - s), v = vf_exp(vf_load(x + i + VF_LANES) - s);

            a += u;
            b += v;
            if (y) {
                vf_store(y + i, u);
                vf_store(y + i + VF_LANES, v);
            }
        }
        sum += (double)vf_sum(a + b);
        for (; i < end; i += VF_LANES) {
            int64_t rest = end - i < VF_LANES ? end - i : VF_LANES;
            float lane[VF_LANES];

            vf_store(lane,
                     vf_exp((rest < VF_LANES ? vf_load_part(x + i, rest) : vf_load(x + i)) - s));
            for (int64_t j = 0; j < rest; j++)
                sum += (double)lane[j];
            for (int64_t j = 0; j < rest && y; j++)
                y[i + j] = lane[j];
        }
    }
    return sum;
}

static double exp_sum_f64(double *y, const double *x, int64_t n, double shift)
{
    double sum = 0;

    for (int64_t i = 0; i < n; i++) {
        double e = exp(x[i] - shift);

        sum += e;
        if (y)
            y[i] = e;
    }
    return sum;
}

/* Σ a b; b NULL: Σ a. */
static double dot_f32(const float *a, const float *b, int64_t n)
{
    double sum = 0;

    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t end = begin + BLOCK < n ? begin + BLOCK : n, i = begin;
        vf s = vf_set(0.0f), t = s;

        for (; i + 2 * VF_LANES <= end; i += 2 * VF_LANES) {
            s += vf_load(a + i) * (b ? vf_load(b + i) : vf_set(1.0f));
            t += vf_load(a + i + VF_LANES) * (b ? vf_load(b + i + VF_LANES) : vf_set(1.0f));
        }
        sum += (double)vf_sum(s + t);
        for (; i < end; i++)
            sum += (double)(a[i] * (b ? b[i] : 1.0f));
    }
    return sum;
}

static double dot_f64(const double *a, const double *b, int64_t n)
{
    double sum = 0;

    for (int64_t i = 0; i < n; i++)
        sum += a[i] * (b ? b[i] : 1);
    return sum;
}

/* y = exp(x - shift) scale */
static void exp_scaled_f32(float *y, const float *x, int64_t n, float shift, float scale)
{
    int64_t i = 0;

    for (; i + VF_LANES <= n; i += VF_LANES)
        vf_store(y + i, vf_exp(vf_load(x + i) - shift) * scale);
    if (i < n)
        vf_store_part(y + i, vf_exp(vf_load_part(x + i, n - i) - shift) * scale, n - i);
}

static void exp_scaled_f64(double *y, const double *x, int64_t n, double shift, double scale)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = exp(x[i] - shift) * scale;
}

/* ---- lines, for both types: out may be a or b */

typedef void line_fn(void *out, const void *a, const void *b, int64_t n);

#define LINES(real, suffix)                                                                        \
    static void softmax_##suffix(void *out, const void *a, const void *b, int64_t n)               \
    {                                                                                              \
        real *y = out, scale = (real)(1 / exp_sum_##suffix(y, a, n, max_##suffix(a, n)));          \
                                                                                                   \
        (void)b;                                                                                   \
        for (int64_t i = 0; i < n; i++)                                                            \
            y[i] *= scale;                                                                         \
    }                                                                                              \
    static void log_softmax_##suffix(void *out, const void *a, const void *b, int64_t n)           \
    {                                                                                              \
        const real *x = a;                                                                         \
        real *y = out, most = max_##suffix(x, n);                                                  \
        real rest = (real)log(exp_sum_##suffix(NULL, x, n, most));                                 \
                                                                                                   \
        (void)b;                                                                                   \
        for (int64_t i = 0; i < n; i++)                                                            \
            y[i] = (x[i] - most) - rest;                                                           \
    }                                                                                              \
    /* dx = y (dy - Σ dy y) */                                                                    \
    static void softmax_backward_##suffix(void *out, const void *a, const void *b, int64_t n)      \
    {                                                                                              \
        const real *dy = a, *y = b;                                                                \
        real *dx = out, sum = (real)dot_##suffix(dy, y, n);                                        \
                                                                                                   \
        for (int64_t i = 0; i < n; i++)                                                            \
            dx[i] = y[i] * (dy[i] - sum);                                                          \
    }                                                                                              \
    /* dx = dy - exp(y) Σ dy, by blocks, because out may be dy */                                 \
    static void log_softmax_backward_##suffix(void *out, const void *a, const void *b, int64_t n)  \
    {                                                                                              \
        const real *dy = a, *y = b;                                                                \
        real *dx = out, sum = (real)dot_##suffix(dy, NULL, n), p[256];                             \
                                                                                                   \
        for (int64_t i = 0; i < n; i += 256) {                                                     \
            int64_t m = n - i < 256 ? n - i : 256;                                                 \
                                                                                                   \
            exp_scaled_##suffix(p, y + i, m, 0, sum);                                              \
            for (int64_t j = 0; j < m; j++)                                                        \
                dx[i + j] = dy[i + j] - p[j];                                                      \
        }                                                                                          \
    }
LINES(float, f32)
LINES(double, f64)

/* ---- running over lines */

static void *room(size_t bytes, const char *name)
{
    void *p = aligned_alloc(64, (bytes + 64) / 64 * 64);

    if (!p)
        ds_fail(DS_ENOMEM, "%s: out of memory: wanted %zu bytes", name, bytes);
    return p;
}

/* n elements as a dense row of the computing type: where they lie, or in `row`. */
static void *row_of(char *memory, int dtype, int64_t n, int64_t stride, void *row, int fill)
{
    if ((dtype == DS_F32 || dtype == DS_F64) && (stride == 1 || n == 1))
        return memory;
    if (fill && dtype == DS_F64)
        ds_row_load_f64(row, memory, dtype, n, stride);
    else if (fill)
        ds_row_load(row, memory, dtype, n, stride);
    return row;
}

static void row_back(char *memory, int dtype, int64_t n, int64_t stride, const void *row)
{
    if (row == memory)
        return;
    if (dtype == DS_F64)
        ds_row_store_f64(memory, row, dtype, n, stride);
    else
        ds_row_store(memory, row, dtype, n, stride);
}

/* t: the output, and one or two inputs. */
static int lines(const char *name, line_fn *const fn[2], int count, const ds_tensor *const *t,
                 int dim)
{
    int threads = ds_threads(t[0]->numel * 4), rc;
    const ds_tensor *list[3];
    ds_tensor flat[3];
    int64_t n, row;
    char *rows;
    walk w;

    DS_TRY(ds_check_softmax(name, count, t, dim));
    for (int k = 0; k < count; k++) {
        flat[k] = *t[k];
        flat[k].shape[dim] = 1;
        flat[k].numel = t[k]->shape[dim] ? t[k]->numel / t[k]->shape[dim] : 0;
        list[k] = &flat[k];
    }
    rc = DS_CPU(walk_start)(&w, name, count, list, WALK_ANY);
    if (rc < 0 || w.numel == 0)
        return rc;
    n = t[0]->shape[dim];
    row = (n * 8 + 63) / 64 * 64;
    rows = room((size_t)(threads * 3 * row), name);
    if (!rows)
        return DS_ENOMEM;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *mine = rows + omp_get_thread_num() * 3 * row;
        int dtype = t[0]->dtype;
        void *at[3] = {NULL};
        int64_t begin, end;
        cursor c;

        ds_part(&begin, &end, w.numel, 1);
        cursor_start(&c, &w, begin);
        for (; begin < end; begin++) {
            for (int k = 0; k < count; k++)
                at[k] =
                    row_of(cursor_at(&c, &w, k), dtype, n, t[k]->stride[dim], mine + k * row, k);
            fn[dtype == DS_F64](at[0], at[1], at[2], n);
            row_back(cursor_at(&c, &w, 0), dtype, n, t[0]->stride[dim], at[0]);
            cursor_advance(&c, &w, 1);
        }
    }
    free(rows);
    return 0;
}

int DS_CPU(softmax)(ds_tensor *y, const ds_tensor *x, int dim)
{
    static line_fn *const fn[] = {softmax_f32, softmax_f64};

    return lines("softmax", fn, 2, (const ds_tensor *[]){y, x}, dim);
}

int DS_CPU(softmax_backward)(ds_tensor *dx, const ds_tensor *dy, const ds_tensor *y, int dim)
{
    static line_fn *const fn[] = {softmax_backward_f32, softmax_backward_f64};

    return lines("softmax_backward", fn, 3, (const ds_tensor *[]){dx, dy, y}, dim);
}

int DS_CPU(log_softmax)(ds_tensor *y, const ds_tensor *x, int dim)
{
    static line_fn *const fn[] = {log_softmax_f32, log_softmax_f64};

    return lines("log_softmax", fn, 2, (const ds_tensor *[]){y, x}, dim);
}

int DS_CPU(log_softmax_backward)(ds_tensor *dx, const ds_tensor *dy, const ds_tensor *y, int dim)
{
    static line_fn *const fn[] = {log_softmax_backward_f32, log_softmax_backward_f64};

    return lines("log_softmax_backward", fn, 3, (const ds_tensor *[]){dx, dy, y}, dim);
}

/* ---- cross-entropy
 *
 * loss = lse - (1 - smoothing) x[target] - smoothing mean(x), with lse = log Σ exp x (Szegedy et
 * al. 2016, section 7); dx = (exp(x - lse) - (1 - smoothing) [i = target] - smoothing / V) dloss. */

static int64_t target_at(const ds_tensor *target, int64_t i)
{
    int64_t t;

    ds_row_load_i64(&t,
                    (const char *)target->data + i * target->stride[0] * ds_bytes_of(target->dtype),
                    target->dtype, 1, 1);
    return t;
}

/* The targets themselves; *count is the rows that count. */
static int check_targets(const char *name, const ds_tensor *logits, const ds_tensor *target,
                         int64_t ignore, int64_t *count)
{
    int64_t rows = logits->shape[0], classes = logits->shape[1];

    *count = 0;
    for (int64_t i = 0; i < rows; i++) {
        int64_t t = target_at(target, i);

        if (t != ignore && (t < 0 || t >= classes))
            return ds_fail(DS_ERANGE,
                           "%s: target %lld of row %lld is out of range for %lld classes", name,
                           (long long)t, (long long)i, (long long)classes);
        *count += t != ignore;
    }
    return 0;
}

/* One element of a vector of f32 or f64 and the like. */
static double get(const ds_tensor *t, int64_t i)
{
    double x;

    ds_row_load_f64(
        &x, (const char *)t->data + (t->ndim ? i * t->stride[0] : 0) * ds_bytes_of(t->dtype),
        t->dtype, 1, 1);
    return x;
}

static void put(ds_tensor *t, int64_t i, double x)
{
    ds_row_store_f64((char *)t->data + (t->ndim ? i * t->stride[0] : 0) * ds_bytes_of(t->dtype), &x,
                     t->dtype, 1, 1);
}

/* The loss of one row of logits, dense f32 or f64, and its log-sum-exp. */
static double row_loss(double *lse, const void *row, int wide, int64_t n, int64_t target,
                       double smoothing)
{
    double x, mean = 0, most;

    if (wide) {
        most = max_f64(row, n);
        *lse = most + log(exp_sum_f64(NULL, row, n, most));
        x = ((const double *)row)[target];
        mean = smoothing ? dot_f64(row, NULL, n) / (double)n : 0;
    } else {
        most = (double)max_f32(row, n);
        *lse = most + log(exp_sum_f32(NULL, row, n, (float)most));
        x = (double)((const float *)row)[target];
        mean = smoothing ? dot_f32(row, NULL, n) / (double)n : 0;
    }
    return *lse - (1 - smoothing) * x - smoothing * mean;
}

int DS_CPU(cross_entropy)(ds_tensor *loss, ds_tensor *lse, const ds_tensor *logits,
                          const ds_tensor *target, int64_t ignore, double smoothing, int reduction)
{
    int threads = ds_threads(logits->numel * 4), dtype = logits->dtype;
    int64_t count = 0, n = logits->shape[1], rows = logits->shape[0], row = (n * 8 + 63) / 64 * 64;
    double *losses, sum = 0;
    char *buffers;

    DS_TRY(ds_check_cross_entropy("cross_entropy", logits, target, lse, loss, reduction));
    DS_TRY(check_targets("cross_entropy", logits, target, ignore, &count));
    losses = room((size_t)(rows * 8 + threads * row + 64), "cross_entropy");
    if (!losses)
        return DS_ENOMEM;
    buffers = (char *)(losses + (rows + 7) / 8 * 8);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;

        ds_part(&begin, &end, rows, 1);
        for (int64_t i = begin; i < end; i++) {
            int64_t t = target_at(target, i);
            double total = 0;
            char *x = (char *)logits->data + i * logits->stride[0] * ds_bytes_of(dtype);

            losses[i] = t == ignore ? 0
                                    : row_loss(&total,
                                               row_of(x, dtype, n, logits->stride[1],
                                                      buffers + omp_get_thread_num() * row, 1),
                                               dtype == DS_F64, n, t, smoothing);
            put(lse, i, total);
        }
    }
    for (int64_t i = 0; i < rows; i++) {
        sum += losses[i];
        if (reduction == DS_LOSS_PER_ROW)
            put(loss, i, losses[i]);
    }
    if (reduction != DS_LOSS_PER_ROW)
        put(loss, 0, reduction == DS_LOSS_MEAN ? sum / (double)count : sum);
    free(losses);
    return 0;
}

/* One row: out may be the logits themselves. */
static void row_gradient(void *out, const void *row, int wide, int64_t n, int64_t target,
                         double lse, double smoothing, double dloss)
{
    double every = dloss * smoothing / (double)n;

    if (wide) {
        exp_scaled_f64(out, row, n, lse, dloss);
        for (int64_t i = 0; i < n && every != 0; i++)
            ((double *)out)[i] -= every;
        ((double *)out)[target] -= (1 - smoothing) * dloss;
    } else {
        exp_scaled_f32(out, row, n, (float)lse, (float)dloss);
        for (int64_t i = 0; i < n && every != 0; i++)
            ((float *)out)[i] -= (float)every;
        ((float *)out)[target] -= (float)((1 - smoothing) * dloss);
    }
}

int DS_CPU(cross_entropy_backward)(ds_tensor *dlogits, const ds_tensor *dloss,
                                   const ds_tensor *logits, const ds_tensor *target,
                                   const ds_tensor *lse, int64_t ignore, double smoothing,
                                   int reduction)
{
    int threads = ds_threads(logits->numel * 4), dtype = logits->dtype;
    int64_t count = 0, n = logits->shape[1], rows = logits->shape[0], row = (n * 8 + 63) / 64 * 64;
    char *buffers;

    DS_TRY(ds_check_cross_entropy_backward(dlogits, dloss, logits, target, lse, reduction));
    DS_TRY(check_targets("cross_entropy_backward", logits, target, ignore, &count));
    buffers = room((size_t)(2 * threads * row), "cross_entropy_backward");
    if (!buffers)
        return DS_ENOMEM;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *mine = buffers + omp_get_thread_num() * 2 * row;
        int64_t begin, end;

        ds_part(&begin, &end, rows, 1);
        for (int64_t i = begin; i < end; i++) {
            int64_t t = target_at(target, i), size = ds_bytes_of(dtype);
            double g = get(dloss, reduction == DS_LOSS_PER_ROW ? i : 0) /
                       (double)(reduction == DS_LOSS_MEAN ? count : 1);
            char *x = (char *)logits->data + i * logits->stride[0] * size;
            char *y = (char *)dlogits->data + i * dlogits->stride[0] * size;
            void *out = row_of(y, dtype, n, dlogits->stride[1], mine, 0);

            if (t == ignore)
                memset(out, 0, (size_t)(n * (dtype == DS_F64 ? 8 : 4)));
            else
                row_gradient(out, row_of(x, dtype, n, logits->stride[1], mine + row, 1),
                             dtype == DS_F64, n, t, get(lse, i), smoothing, g);
            row_back(y, dtype, n, dlogits->stride[1], out);
        }
    }
    free(buffers);
    return 0;
}
