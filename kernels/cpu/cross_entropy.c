/* cross_entropy.c - the output projection and its mean cross-entropy in one, with gradients.
 *
 * With a vocabulary of 50 000 the logits are the largest tensor of a language model and are needed
 * for a moment only. So rows are taken in chunks: logits into scratch, loss and gradient of each
 * row in one visit (each exp is computed once), then the two products that use the gradient
 * while it is still in the cache.
 *
 * The weight's gradient is a sum over the chunks. In low precision it must not be rounded at each of
 * them, and beside all of it in f32 there would be nothing saved: so until the last chunk the
 * result's 16 bits and as many of `carry` hold the two halves of each f32.
 */
#include <math.h>

#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"
#include "kernels/scratch.h"

/* ---- targets ---- */

static int64_t target_at(const ds_tensor *target, int64_t i)
{
    int64_t at = i * target->stride[0];

    if (target->dtype == DS_I64)
        return ((const int64_t *)target->data)[at];
    if (target->dtype == DS_I32)
        return ((const int32_t *)target->data)[at];
    return ((const uint8_t *)target->data)[at];
}

/* How many rows count. */
static int count_targets(int64_t *count, const ds_tensor *target, int64_t ignore, int64_t classes)
{
    *count = 0;
    for (int64_t i = 0; i < target->shape[0]; i++) {
        int64_t t = target_at(target, i);

        if (t == ignore)
            continue;
        if (t < 0 || t >= classes)
            return ds_fail(
                DS_ERANGE,
                "linear_cross_entropy: target %lld in row %lld is not a class: there are %lld, "
                "and %lld is ignored",
                (long long)t, (long long)i, (long long)classes, (long long)ignore);
        ++*count;
    }
    return 0;
}

/* ---- one row of logits ---- */

VF_FUNC vf row_max(const char *row, int64_t padded, int dtype)
{
    vf a = vf_set(-INFINITY), b = a, c = a, d = a;
    int64_t i = 0;

    /* vf_max keeps its second argument where the first is NaN; the sum brings the NaN out. */
    for (; i + 4 * VF_LANES <= padded; i += 4 * VF_LANES) {
        a = vf_max(vf_load_as(row, i, dtype), a);
        b = vf_max(vf_load_as(row, i + VF_LANES, dtype), b);
        c = vf_max(vf_load_as(row, i + 2 * VF_LANES, dtype), c);
        d = vf_max(vf_load_as(row, i + 3 * VF_LANES, dtype), d);
    }
    for (; i < padded; i += VF_LANES)
        a = vf_max(vf_load_as(row, i, dtype), a);
    return vf_set(vf_max_lane(vf_max(vf_max(a, b), vf_max(c, d))));
}

/* Sum of e^(row - max); [powers]: those, which may be the row itself where it is f32. */
VF_FUNC float row_powers(float *powers, const char *row, vf max, int64_t padded, int dtype)
{
    vf a = vf_set(0), b = a;
    int64_t i = 0;

    for (; i + 2 * VF_LANES <= padded; i += 2 * VF_LANES) {
        vf x = vf_exp(vf_load_as(row, i, dtype) - max);
        vf y = vf_exp(vf_load_as(row, i + VF_LANES, dtype) - max);

        if (powers) {
            vf_store(powers + i, x);
            vf_store(powers + i + VF_LANES, y);
        }
        a += x;
        b += y;
    }
    for (; i < padded; i += VF_LANES) {
        vf x = vf_exp(vf_load_as(row, i, dtype) - max);

        if (powers)
            vf_store(powers + i, x);
        a += x;
    }
    return vf_sum(a + b);
}

/* The loss of a row of logits; [powers] not NULL: the row becomes scale (softmax - one at target).
 * padded is a multiple of 16 and the columns beyond the classes hold -inf. */
VF_FUNC double visit_row(char *row, float *powers, int64_t target, int64_t padded, float scale,
                         int dtype)
{
    vf max = row_max(row, padded, dtype);
    vf at_target = vf_load_part_as(row, target, dtype, 1);
    float sum = row_powers(powers, row, max, padded, dtype);

    if (powers) {
        vf factor = vf_set(scale / sum);

        powers[target] -= sum;
        for (int64_t i = 0; i < padded; i += VF_LANES)
            vf_store_as(row, i, dtype, vf_load(powers + i) * factor);
    }
    return log((double)sum) + ((double)max[0] - (double)at_target[0]);
}

static double visit_row_any(char *row, float *powers, int64_t target, int64_t padded, float scale,
                            int dtype)
{
    if (dtype == DS_F32)
        return visit_row(row, powers ? (float *)row : NULL, target, padded, scale, DS_F32);
    if (dtype == DS_BF16)
        return visit_row(row, powers, target, padded, scale, DS_BF16);
    return visit_row(row, powers, target, padded, scale, DS_F16);
}

static double visit_row_f64(double *row, int gradient, int64_t target, int64_t classes,
                            double scale)
{
    double max = -INFINITY, sum = 0, at_target = row[target];

    for (int64_t i = 0; i < classes; i++)
        max = row[i] > max ? row[i] : max;
    for (int64_t i = 0; i < classes; i++) {
        double e = exp(row[i] - max);

        sum += e;
        if (gradient)
            row[i] = e;
    }
    for (int64_t i = 0; gradient && i < classes; i++)
        row[i] = (row[i] / sum - (i == target)) * scale;
    return log(sum) + (max - at_target);
}

/* ---- a chunk of rows ---- */

typedef struct task {
    ds_tensor *loss, *dx, *dw; /* dx, dw: may be NULL */
    ds_tensor *carry;          /* NULL: no halves of sums are needed */
    const ds_tensor *x, *w, *target;
    char *logits; /* scratch: [rows, stride], of which `padded` columns are used */
    int64_t rows, stride, padded, classes, width;
    int64_t ignore;
    double scale;   /* of the gradient: seed / rows that count */
    double *losses; /* [N] */
    int gradient, accumulate, dtype;
} task;

static void fill_low(char *row, int64_t n, int dtype)
{
    static const float low[16] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY,
                                  -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY,
                                  -INFINITY, -INFINITY, -INFINITY, -INFINITY};

    ds_row_store(row, low, dtype, n, 1);
}

static double visit(const task *t, int64_t i, char *row, float *powers)
{
    int64_t target = target_at(t->target, i), bytes = ds_bytes_of(t->dtype);

    if (target == t->ignore) {
        memset(row, 0, (size_t)(t->classes * bytes));
        return 0;
    }
    if (t->dtype == DS_F64)
        return visit_row_f64((double *)row, t->gradient, target, t->classes, t->scale);
    if (t->padded > t->classes)
        fill_low(row + t->classes * bytes, t->padded - t->classes, t->dtype);
    return visit_row_any(row, t->gradient ? powers : NULL, target, t->padded, (float)t->scale,
                         t->dtype);
}

static int visit_chunk(const task *t, int64_t first, int64_t rows)
{
    int64_t row_bytes = t->stride * ds_bytes_of(t->dtype);
    int threads = ds_threads(rows * t->classes * 4);
    float *powers = ds_scratch(DS_SCRATCH_ROWS, (size_t)(threads * t->padded) * sizeof *powers);

    if (!powers)
        return DS_ENOMEM;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *mine = powers + t->padded * omp_get_thread_num();
        int64_t begin, end;

        ds_part(&begin, &end, rows, 1);
        for (int64_t i = begin; i < end; i++)
            t->losses[first + i] = visit(t, first + i, t->logits + i * row_bytes, mine);
    }
    return 0;
}

/* Rows `first` and on of x [N, K]. */
static ds_matrix rows_from(const ds_tensor *x, int64_t first)
{
    return ds_matrix_of((char *)x->data + first * x->stride[0] * ds_bytes_of(x->dtype),
                        x->stride[0], x->stride[1], x->dtype);
}

/* Classes at a time. oneDNN packs operands of bf16, which takes as much memory again: so a block
 * of them, never all. */
#define BLOCK 4096

/* Classes `first` and on of w [V, K], dw, or (as columns) logits. */
static ds_matrix classes_from(ds_matrix m, int64_t first, int64_t step)
{
    m.data += first * step * ds_bytes_of(m.dtype);
    return m;
}

/* dx of a chunk is a sum over the blocks, in f32: it lies in scratch where dx is bf16 or f16. */
static int start_sums(ds_matrix *sums, const task *t, int64_t first, int64_t rows)
{
    *sums = rows_from(t->dx, first);
    if (t->dtype == DS_F32 || t->dtype == DS_F64)
        return 0;
    *sums = ds_matrix_of(ds_scratch(DS_SCRATCH_SUMS, (size_t)(rows * t->width) * sizeof(float)),
                         t->width, 1, DS_F32);
    return sums->data ? 0 : DS_ENOMEM;
}

static void store_dx(const task *t, ds_matrix sums, int64_t first, int64_t rows)
{
    ds_matrix dx = rows_from(t->dx, first);

    for (int64_t i = 0; i < rows && sums.data != dx.data; i++)
        ds_row_store(dx.data + i * dx.row * ds_bytes_of(dx.dtype),
                     (float *)sums.data + i * t->width, dx.dtype, t->width, dx.col);
}

/* ---- dw in low precision, summed over several chunks ---- */

static void join(float *sums, const uint16_t *high, const uint16_t *low, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)high[i] << 16 | low[i];

        memcpy(sums + i, &bits, sizeof bits);
    }
}

static void split(uint16_t *high, uint16_t *low, const float *sums, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;

        memcpy(&bits, sums + i, sizeof bits);
        high[i] = (uint16_t)(bits >> 16), low[i] = (uint16_t)bits;
    }
}

/* Adds n sums of a chunk to elements `from` and on of dw: it begins as what dw holds or as 0, and
 * ends rounded. sums is overwritten. */
static void fold(const task *t, float *sums, int64_t from, int64_t n, int first, int last)
{
    float had[256];
    uint16_t *high = (uint16_t *)t->dw->data + from, *low = (uint16_t *)t->carry->data + from;

    for (int64_t i = 0; i < n; i += 256) {
        int64_t part = n - i < 256 ? n - i : 256;

        if (!first)
            join(had, high + i, low + i, part);
        else if (t->accumulate)
            ds_row_load(had, high + i, t->dw->dtype, part, 1);
        for (int64_t k = 0; k < part && (!first || t->accumulate); k++)
            sums[i + k] += had[k];
        if (last)
            ds_row_store(high + i, sums + i, t->dw->dtype, part, 1);
        else
            split(high + i, low + i, sums + i, part);
    }
}

/* dw += dᵀ x for `classes` classes from `at` on, by blocks that stay in the cache. */
static int carry_dw(const task *t, ds_matrix d, ds_matrix x, int64_t at, int64_t classes,
                    int64_t first, int64_t rows)
{
    int64_t block = ((int64_t)1 << 20) / t->width > 64 ? ((int64_t)1 << 20) / t->width : 64;
    float *sums;
    int rc = 0;

    block = block < classes ? block : classes;
    sums = ds_scratch(DS_SCRATCH_BLOCK, (size_t)(block * t->width) * sizeof *sums);
    if (!sums)
        return DS_ENOMEM;
    for (int64_t c = 0; c < classes && rc == 0; c += block) {
        int64_t m = classes - c < block ? classes - c : block, numel = m * t->width;
        ds_product p = {.b = x, .alpha = 1, .m = m, .n = t->width, .k = rows};
        int threads = ds_threads(numel);

        p.y = ds_matrix_of(sums, t->width, 1, DS_F32);
        p.a = classes_from(d, c, 1), p.a.row = 1, p.a.col = t->stride;
        rc = ds_product_run(&p);
#pragma omp parallel num_threads(threads) if (threads > 1 && rc == 0)
        if (rc == 0) {
            int64_t begin, end;

            ds_part(&begin, &end, numel, 64);
            fold(t, sums + begin, (at + c) * t->width + begin, end - begin, first == 0,
                 first + rows == t->x->shape[0]);
        }
    }
    return rc;
}

/* ---- a chunk ---- */

static int run_chunk(const task *t, int64_t first, int64_t rows)
{
    ds_matrix logits = ds_matrix_of(t->logits, t->stride, 1, t->dtype), sums = {0};
    ds_matrix x = rows_from(t->x, first), w = rows_from(t->w, 0);
    ds_matrix dw = t->dw ? rows_from(t->dw, 0) : x;
    int rc = t->dx ? start_sums(&sums, t, first, rows) : 0;

    for (int64_t at = 0; at < t->classes && rc == 0; at += BLOCK) { /* logits = x wᵀ */
        ds_product p = {.y = classes_from(logits, at, 1), .a = x, .alpha = 1};

        p.b = classes_from(w, at, w.row), p.b.row = w.col, p.b.col = w.row;
        p.m = rows, p.n = t->classes - at < BLOCK ? t->classes - at : BLOCK, p.k = t->width;
        rc = ds_product_run(&p);
    }
    if (rc == 0)
        rc = visit_chunk(t, first, rows);
    for (int64_t at = 0; at < t->classes && rc == 0; at += BLOCK) {
        int64_t classes = t->classes - at < BLOCK ? t->classes - at : BLOCK;
        ds_matrix d = classes_from(logits, at, 1);

        if (t->dx) { /* dx += dlogits w */
            ds_product p = {.y = sums, .a = d, .alpha = 1, .beta = at > 0};

            p.b = classes_from(w, at, w.row);
            p.m = rows, p.n = t->width, p.k = classes;
            rc = ds_product_run(&p);
        }
        if (t->carry && rc == 0) {
            rc = carry_dw(t, d, x, at, classes, first, rows);
        } else if (t->dw && rc == 0) { /* dw += dlogitsᵀ x */
            ds_product p = {.y = classes_from(dw, at, dw.row), .a = d, .b = x, .alpha = 1};

            p.a.row = 1, p.a.col = t->stride;
            p.m = classes, p.n = t->width, p.k = rows, p.beta = t->accumulate || first > 0;
            rc = ds_product_run(&p);
        }
    }
    if (rc == 0 && t->dx)
        store_dx(t, sums, first, rows);
    return rc;
}

/* ---- the kernel ---- */

static int check(const task *t, const ds_tensor *scratch)
{
    const ds_tensor *x = t->x, *w = t->w, *target = t->target;

    if (x->ndim != 2 || w->ndim != 2 || x->shape[1] != w->shape[1] || target->ndim != 1 ||
        target->shape[0] != x->shape[0])
        return ds_fail(DS_EINVAL, "linear_cross_entropy wants x [N x K], w [V x K] and target [N]");
    if (!ds_is_float(x->dtype) || w->dtype != x->dtype || scratch->dtype != x->dtype ||
        t->loss->dtype != (x->dtype == DS_F64 ? DS_F64 : DS_F32) || t->loss->numel != 1)
        return ds_fail(DS_EINVAL,
                       "linear_cross_entropy wants w and scratch in the dtype of x, %s, and "
                       "one loss in f32 (f64 for f64)",
                       ds_name_of(x->dtype));
    if (target->dtype != DS_I64 && target->dtype != DS_I32 && target->dtype != DS_U8)
        return ds_fail(DS_EINVAL, "linear_cross_entropy wants targets of i64, i32 or u8, not %s",
                       ds_name_of(target->dtype));
    if (scratch->ndim != 2 || !scratch->dense || scratch->shape[0] < 1 ||
        scratch->shape[1] % 16 != 0 || scratch->shape[1] < w->shape[0] || w->shape[0] < 1)
        return ds_fail(DS_EINVAL, "linear_cross_entropy wants scratch [rows x %lld], dense",
                       (long long)((w->shape[0] + 15) / 16 * 16));
    if ((t->dx && (t->dx->ndim != 2 || t->dx->shape[0] != x->shape[0] ||
                   t->dx->shape[1] != x->shape[1] || t->dx->dtype != x->dtype)) ||
        (t->dw &&
         (t->dw->ndim != 2 || t->dw->shape[0] != w->shape[0] || t->dw->shape[1] != w->shape[1] ||
          (t->dw->dtype != w->dtype && (t->dw->dtype != DS_F32 || w->dtype == DS_F64)))))
        return ds_fail(DS_EINVAL, "linear_cross_entropy wants dx like x and dw like w, in f32 or "
                                  "the dtype of w");
    return 0;
}

static int is_low(int dtype)
{
    return dtype == DS_BF16 || dtype == DS_F16;
}

static int check_carry(task *t, ds_tensor *carry)
{
    if (!t->dw || !is_low(t->dw->dtype) || t->x->shape[0] <= t->rows)
        return 0;
    if (!carry || carry->dtype != t->dw->dtype || carry->numel != t->dw->numel || !carry->dense ||
        !t->dw->dense)
        return ds_fail(DS_EINVAL,
                       "linear_cross_entropy wants dw of %s over %lld chunks dense and a carry "
                       "like it",
                       ds_name_of(t->dw->dtype),
                       (long long)((t->x->shape[0] + t->rows - 1) / t->rows));
    t->carry = carry;
    return 0;
}

/* No row counts: gradients of 0. */
static int clear(const task *t)
{
    ds_product none = {.alpha = 1}; /* k = 0 */
    int rc = 0;

    if (t->dx) {
        none.y = rows_from(t->dx, 0), none.m = t->dx->shape[0], none.n = t->width;
        rc = ds_product_run(&none);
    }
    if (rc == 0 && t->dw && !t->accumulate) {
        none.y = rows_from(t->dw, 0), none.m = t->classes, none.n = t->width;
        rc = ds_product_run(&none);
    }
    return rc;
}

static void set_loss(ds_tensor *loss, double value)
{
    if (loss->dtype == DS_F64)
        *(double *)loss->data = value;
    else
        *(float *)loss->data = (float)value;
}

int DS_CPU(linear_cross_entropy)(ds_tensor *loss, ds_tensor *dx, ds_tensor *dw, ds_tensor *scratch,
                                 ds_tensor *carry, const ds_tensor *x, const ds_tensor *w,
                                 const ds_tensor *target, int64_t ignore, double seed,
                                 int accumulate)
{
    task t = {.loss = loss, .dx = dx, .dw = dw, .x = x, .w = w, .target = target, .ignore = ignore};
    int64_t n = x->shape[0], count;
    double sum = 0;
    int rc = check(&t, scratch);

    if (rc < 0 || (rc = count_targets(&count, target, ignore, w->shape[0])) < 0)
        return rc;
    t.logits = scratch->data;
    t.rows = scratch->shape[0], t.stride = scratch->shape[1];
    t.classes = w->shape[0], t.width = w->shape[1];
    t.padded = (t.classes + 15) / 16 * 16;
    t.gradient = dx || dw, t.accumulate = accumulate, t.dtype = x->dtype;
    if ((rc = check_carry(&t, carry)) < 0)
        return rc;
    set_loss(loss, 0);
    if (count == 0)
        return clear(&t);
    t.scale = seed / (double)count;
    t.losses = ds_scratch(DS_SCRATCH_LOSSES, (size_t)n * sizeof *t.losses);
    if (!t.losses)
        return DS_ENOMEM;
    for (int64_t first = 0; first < n && rc == 0; first += t.rows)
        rc = run_chunk(&t, first, n - first < t.rows ? n - first : t.rows);
    if (rc < 0)
        return rc;
    for (int64_t i = 0; i < n; i++)
        sum += t.losses[i];
    set_loss(loss, sum / (double)count);
    return 0;
}
