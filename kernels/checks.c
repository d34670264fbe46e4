/* checks.c - what kernels demand of their arguments; checks.h says what that is. */
#include "kernels/checks.h"

#include <math.h>
#include <stdio.h>

#include "kernels/dtype.h"

/* ---- of many kernels */

const char *ds_shape_text(char text[128], const ds_tensor *t)
{
    int at = snprintf(text, 128, "[");

    for (int i = 0; i < t->ndim && at < 100; i++)
        at +=
            snprintf(text + at, 128 - (size_t)at, "%s%lld", i ? " x " : "", (long long)t->shape[i]);
    snprintf(text + at, 128 - (size_t)at, "]");
    return text;
}

int ds_check_dim(const char *name, const ds_tensor *x, int dim)
{
    return dim >= 0 && dim < x->ndim
               ? 0
               : ds_fail(DS_EINVAL, "%s: dimension %d is not in a tensor of %d", name, dim + 1,
                         x->ndim);
}

int ds_check_fits(const char *name, const ds_tensor *a, const ds_tensor *b, int except, int within)
{
    char one[128], other[128];
    int bad = a->ndim != b->ndim;

    for (int i = 0; i < a->ndim && !bad; i++)
        bad = i != except && (within ? a->shape[i] > b->shape[i] : a->shape[i] != b->shape[i]);
    return bad ? ds_fail(DS_EINVAL, "%s: %s does not match %s", name, ds_shape_text(one, a),
                         ds_shape_text(other, b))
               : 0;
}

int ds_check_kinds(const char *name, const char *kinds, int count, const ds_tensor *const *t)
{
    int common = DS_BOOL;

    for (int k = 0; k < count; k++)
        if (kinds[k] == 'x' && t[k])
            common = t[k]->dtype; /* the last of them is an input */
    for (int k = 0; k < count; k++) {
        int want = kinds[k] == 'x' ? common : DS_BOOL;

        if (t[k] && (kinds[k] == 'x' || kinds[k] == 'b') && t[k]->dtype != want)
            return ds_fail(DS_EINVAL, "%s: %s is %s, but it must be %s", name,
                           k ? "an operand" : "the result", ds_name_of(t[k]->dtype),
                           ds_name_of(want));
    }
    return 0;
}

int ds_check_number(const char *name, double value, int dtype)
{
    static const struct {
        double low, end;
    } range[DS_DTYPES] = {[DS_I64] = {-0x1p63, 0x1p63},
                          [DS_I32] = {-0x1p31, 0x1p31},
                          [DS_U8] = {0, 256},
                          [DS_BOOL] = {0, 2}};

    if (!ds_is_float(dtype) &&
        !(value >= range[dtype].low && value < range[dtype].end && value == floor(value)))
        return ds_fail(DS_EINVAL, "%s: %g is not a value of %s; use :float() first", name, value,
                       ds_name_of(dtype));
    return 0;
}

/* ---- elementwise, copying, random numbers */

int ds_check_clamp(double low, double high)
{
    return low <= high ? 0
                       : ds_fail(DS_EINVAL, "clamp: no value lies between %g and %g", low, high);
}

double ds_clamp_bound(double bound, int up, int dtype)
{
    double least = dtype == DS_I64 ? -0x1p63 : dtype == DS_I32 ? -0x1p31 : 0;
    double most = dtype == DS_I64 ? 0x1.fffffffffffffp62 : dtype == DS_I32 ? 0x1p31 - 1 : 255;

    return fmin(fmax(up ? ceil(bound) : floor(bound), least), most);
}

int ds_check_where(const char *name, const ds_tensor *y, const ds_tensor *condition,
                   const ds_tensor *a, const ds_tensor *b)
{
    if (condition->dtype != DS_BOOL)
        return ds_fail(DS_EINVAL, "%s: the condition is %s, but it must be bool", name,
                       ds_name_of(condition->dtype));
    if (a->dtype != b->dtype || y->dtype != a->dtype)
        return ds_fail(DS_EINVAL, "%s: %s and %s cannot be mixed into %s", name,
                       ds_name_of(a->dtype), ds_name_of(b->dtype), ds_name_of(y->dtype));
    return 0;
}

int ds_check_arange(const ds_tensor *y)
{
    return y->ndim == 1
               ? 0
               : ds_fail(DS_EINVAL, "arange: the result has %d dimensions, but it must have 1",
                         y->ndim);
}

int ds_check_triangle(const ds_tensor *y, const ds_tensor *x)
{
    char have[128], want[128];

    if (y->ndim < 2 || y->ndim != x->ndim ||
        memcmp(y->shape, x->shape, sizeof(int64_t) * (size_t)y->ndim) != 0)
        return ds_fail(DS_EINVAL, "triangle: %s and %s are not equally shaped matrices",
                       ds_shape_text(have, x), ds_shape_text(want, y));
    if (y->dtype != x->dtype)
        return ds_fail(DS_EINVAL, "triangle: the result is %s, but it must be %s",
                       ds_name_of(y->dtype), ds_name_of(x->dtype));
    return 0;
}

int ds_check_random(const char *name, const ds_tensor *y, double a, double b)
{
    if (!ds_is_float(y->dtype))
        return ds_fail(DS_EINVAL, "%s: not for %s", name, ds_name_of(y->dtype));
    if (a - a != 0 || b - b != 0)
        return ds_fail(DS_EINVAL, "%s: parameters %g and %g must be finite", name, a, b);
    return 0;
}

int ds_check_randint(const ds_tensor *y, int64_t low, int64_t high)
{
    uint64_t range = (uint64_t)high - (uint64_t)low;

    if (ds_is_float(y->dtype))
        return ds_fail(DS_EINVAL, "randint: not for %s, only for integers", ds_name_of(y->dtype));
    if (high <= low || range > 1ull << 32)
        return ds_fail(DS_EINVAL, "randint: from %lld to below %lld is not a range of 1 to 2^32",
                       (long long)low, (long long)high);
    DS_TRY(ds_check_number("randint", (double)low, y->dtype));
    return ds_check_number("randint", (double)(high - 1), y->dtype);
}

int ds_check_dropout(const ds_tensor *y, const ds_tensor *x, double p)
{
    if (!ds_is_float(x->dtype) || y->dtype != x->dtype)
        return ds_fail(DS_EINVAL, "dropout: not from %s to %s", ds_name_of(x->dtype),
                       ds_name_of(y->dtype));
    if (!(p >= 0 && p <= 1))
        return ds_fail(DS_EINVAL, "dropout: p is %g, but it must be between 0 and 1", p);
    return 0;
}

/* ---- at indices */

ds_tensor ds_flat_along(const ds_tensor *t, const ds_tensor *like, int dim, int64_t n)
{
    ds_tensor flat = *t;

    flat.numel = 1;
    for (int i = 0; i < t->ndim; i++) {
        flat.shape[i] = i == dim ? n : like->shape[i];
        flat.stride[i] = i == dim ? 0 : t->stride[i];
        flat.numel *= flat.shape[i];
    }
    return flat;
}

static int is_index(int dtype)
{
    return dtype == DS_I64 || dtype == DS_I32 || dtype == DS_U8;
}

static int check_index(const char *name, const ds_tensor *index)
{
    return is_index(index->dtype)
               ? 0
               : ds_fail(DS_EINVAL, "%s: the index is %s, but it must be i64 or i32", name,
                         ds_name_of(index->dtype));
}

/* What y and x must be to each other; like: has their number of dimensions. */
static int check_pair(const char *name, const ds_tensor *y, const ds_tensor *x,
                      const ds_tensor *like, int dim)
{
    if (y->dtype != x->dtype)
        return ds_fail(DS_EINVAL, "%s: %s cannot be mixed with %s", name, ds_name_of(x->dtype),
                       ds_name_of(y->dtype));
    if (dim < 0 || dim >= x->ndim || like->ndim != x->ndim)
        return ds_fail(DS_EINVAL, "%s: dimension %d is not in a tensor of %d", name, dim + 1,
                       x->ndim);
    return 0;
}

int ds_check_gather(const ds_tensor *y, const ds_tensor *x, const ds_tensor *index, int dim)
{
    DS_TRY(check_pair("gather", y, x, index, dim));
    DS_TRY(ds_check_fits("gather", y, index, -1, 0));
    DS_TRY(ds_check_fits("gather", index, x, dim, 1));
    return check_index("gather", index);
}

int ds_check_index_select(const ds_tensor *y, const ds_tensor *x, const ds_tensor *index, int dim)
{
    DS_TRY(check_pair("index_select", y, x, y, dim));
    DS_TRY(ds_check_fits("index_select", y, x, dim, 0));
    if (index->ndim != 1 || index->numel != y->shape[dim])
        return ds_fail(DS_EINVAL, "index_select: %lld indices cannot fill size %lld",
                       (long long)index->numel, (long long)y->shape[dim]);
    return check_index("index_select", index);
}

int ds_check_scatter(const char *name, const ds_tensor *y, const ds_tensor *index,
                     const ds_tensor *x, int dim)
{
    DS_TRY(check_pair(name, y, x, index, dim));
    DS_TRY(ds_check_fits(name, index, x, -1, 1));
    DS_TRY(ds_check_fits(name, index, y, dim, 1));
    return check_index(name, index);
}

int ds_check_index_add(const ds_tensor *y, const ds_tensor *index, const ds_tensor *x, int dim)
{
    DS_TRY(check_pair("index_add", y, x, y, dim));
    DS_TRY(ds_check_fits("index_add", x, y, dim, 0));
    if (index->ndim != 1 || index->numel != x->shape[dim])
        return ds_fail(DS_EINVAL, "index_add: %lld indices do not match size %lld",
                       (long long)index->numel, (long long)x->shape[dim]);
    return check_index("index_add", index);
}

int ds_check_one_hot(ds_tensor *lines, const ds_tensor *y, const ds_tensor *index)
{
    int last = y->ndim - 1;

    if (y->dtype != DS_I64 || last != index->ndim)
        return ds_fail(DS_EINVAL, "one_hot: the result must be i64 with one dimension more");
    *lines = *index;
    lines->ndim = y->ndim;
    lines->shape[last] = 1;
    lines->stride[last] = 0;
    DS_TRY(ds_check_fits("one_hot", y, lines, last, 0));
    return check_index("one_hot", index);
}

int ds_check_mask(const char *name, const ds_tensor *mask)
{
    return mask->dtype == DS_BOOL ? 0
                                  : ds_fail(DS_EINVAL, "%s: the mask is %s, but it must be bool",
                                            name, ds_name_of(mask->dtype));
}

int ds_check_masked_select(const ds_tensor *y, const ds_tensor *x, const ds_tensor *mask)
{
    if (y->dtype != x->dtype || !y->dense)
        return ds_fail(DS_EINVAL, "masked_select: the result must be dense and %s",
                       ds_name_of(x->dtype));
    return ds_check_mask("masked_select", mask);
}

int ds_check_masked_scatter(const ds_tensor *y, const ds_tensor *mask, const ds_tensor *x)
{
    if (y->dtype != x->dtype || !x->dense)
        return ds_fail(DS_EINVAL, "masked_scatter: the source must be dense and %s",
                       ds_name_of(y->dtype));
    return ds_check_mask("masked_scatter", mask);
}

/* rows […, C], w [V, C], index […] */
static int check_rows_of(const char *name, const ds_tensor *rows, const ds_tensor *w,
                         const ds_tensor *index)
{
    char one[128], other[128];
    int bad =
        w->ndim != 2 || rows->ndim != index->ndim + 1 || rows->shape[rows->ndim - 1] != w->shape[1];

    for (int i = 0; i < index->ndim && !bad; i++)
        bad = rows->shape[i] != index->shape[i];
    if (bad)
        return ds_fail(DS_EINVAL, "%s: rows %s do not fit weight %s", name,
                       ds_shape_text(one, rows), ds_shape_text(other, w));
    return check_index(name, index);
}

int ds_check_embedding(const ds_tensor *y, const ds_tensor *w, const ds_tensor *index)
{
    DS_TRY(check_rows_of("embedding", y, w, index));
    if (y->dtype != w->dtype)
        return ds_fail(DS_EINVAL, "embedding: the result is %s, but it must be %s",
                       ds_name_of(y->dtype), ds_name_of(w->dtype));
    return 0;
}

int ds_check_embedding_backward(const ds_tensor *dw, const ds_tensor *dy, const ds_tensor *index)
{
    DS_TRY(check_rows_of("embedding_backward", dy, dw, index));
    if (!ds_is_float(dw->dtype) || !ds_is_float(dy->dtype))
        return ds_fail(DS_EINVAL, "embedding_backward: gradients are %s and %s, not real numbers",
                       ds_name_of(dw->dtype), ds_name_of(dy->dtype));
    return 0;
}

int ds_check_rotary(const ds_tensor *y, const ds_tensor *x)
{
    if (x->ndim != 4 || y->ndim != 4 || memcmp(x->shape, y->shape, 4 * sizeof *x->shape) != 0 ||
        x->shape[3] % 2 || !ds_is_float(x->dtype) || x->dtype != y->dtype)
        return ds_fail(DS_EINVAL, "rotary: [B x T x H x D] of real numbers with D even is needed");
    return 0;
}

/* ---- along dimensions, over ranks */

int ds_check_argmax(const char *name, const ds_tensor *y, const ds_tensor *x, int dim)
{
    DS_TRY(ds_check_dim(name, x, dim));
    if (y->dtype != DS_I64 || y->ndim != x->ndim || y->shape[dim] != 1)
        return ds_fail(DS_EINVAL, "%s: the result must be i64 of size 1 in dimension %d", name,
                       dim + 1);
    if (x->shape[dim] == 0)
        return ds_fail(DS_EINVAL, "%s: no elements in dimension %d", name, dim + 1);
    return 0;
}

int ds_check_cumsum(const ds_tensor *y, const ds_tensor *x, int dim)
{
    DS_TRY(ds_check_dim("cumsum", y, dim));
    if (y->ndim != x->ndim || y->shape[dim] != x->shape[dim] || y->numel != x->numel ||
        ds_is_float(y->dtype) != ds_is_float(x->dtype))
        return ds_fail(DS_EINVAL, "cumsum: the result's shape or dtype (%s) does not fit %s",
                       ds_name_of(y->dtype), ds_name_of(x->dtype));
    return 0;
}

int ds_check_ordered(const char *name, const ds_tensor *values, const ds_tensor *indices,
                     const ds_tensor *x, int dim)
{
    int64_t n = x->shape[dim], k = values->shape[dim];

    if (values->dtype != x->dtype || indices->dtype != DS_I64 || indices->shape[dim] != k || k > n)
        return ds_fail(DS_EINVAL, "%s: cannot take %lld of %lld values into %s and %s", name,
                       (long long)k, (long long)n, ds_name_of(values->dtype),
                       ds_name_of(indices->dtype));
    return 0;
}

int ds_check_softmax(const char *name, int count, const ds_tensor *const *t, int dim)
{
    DS_TRY(ds_check_dim(name, t[0], dim));
    for (int k = 0; k < count; k++) {
        if (!ds_is_float(t[0]->dtype) || t[k]->dtype != t[0]->dtype)
            return ds_fail(DS_EINVAL, "%s: not from %s to %s", name, ds_name_of(t[k]->dtype),
                           ds_name_of(t[0]->dtype));
        if (t[k]->ndim != t[0]->ndim || t[k]->shape[dim] != t[0]->shape[dim])
            return ds_fail(DS_EINVAL, "%s: shapes of inputs and result differ", name);
    }
    return 0;
}

int ds_check_reduce_ranks(const ds_tensor *y, int dtype, int n, int op, double scale)
{
    int narrow = dtype >= 0 && dtype <= DS_F16 && y->dtype <= DS_F16;

    if (n < 1 || op < 0 || op >= DS_REDUCTIONS)
        return ds_fail(DS_EINVAL, "reduce_ranks: %d parts by reduction %d", n, op);
    if (!y->dense)
        return ds_fail(DS_EINVAL, "reduce_ranks: the result is not dense");
    if (dtype != y->dtype && !narrow)
        return ds_fail(DS_EINVAL, "reduce_ranks: parts are %s and the result is %s",
                       ds_name_of(dtype), ds_name_of(y->dtype));
    if (!ds_is_float(dtype) && (op == DS_MEAN || scale != 1))
        return ds_fail(DS_EINVAL, "reduce_ranks: %s has no mean and no scale", ds_name_of(dtype));
    return 0;
}

int ds_check_cross_entropy(const char *name, const ds_tensor *logits, const ds_tensor *target,
                           const ds_tensor *lse, const ds_tensor *loss, int reduction)
{
    int64_t rows = logits->shape[0];
    char one[128], other[128];

    if (logits->ndim != 2 || target->ndim != 1 || target->shape[0] != rows || lse->ndim != 1 ||
        lse->shape[0] != rows || loss->ndim > 1 ||
        loss->numel != (reduction == DS_LOSS_PER_ROW ? rows : 1))
        return ds_fail(DS_EINVAL, "%s: logits %s do not fit target %s or the outputs", name,
                       ds_shape_text(one, logits), ds_shape_text(other, target));
    if (!ds_is_float(logits->dtype) || (lse->dtype != DS_F32 && lse->dtype != DS_F64) ||
        !ds_is_float(loss->dtype))
        return ds_fail(DS_EINVAL, "%s: not from %s to %s with lse in %s", name,
                       ds_name_of(logits->dtype), ds_name_of(loss->dtype), ds_name_of(lse->dtype));
    if (!is_index(target->dtype))
        return ds_fail(DS_EINVAL, "%s: the target is %s, but it must be i64, i32 or u8", name,
                       ds_name_of(target->dtype));
    return 0;
}

int ds_check_cross_entropy_backward(const ds_tensor *dlogits, const ds_tensor *dloss,
                                    const ds_tensor *logits, const ds_tensor *target,
                                    const ds_tensor *lse, int reduction)
{
    DS_TRY(ds_check_cross_entropy("cross_entropy_backward", logits, target, lse, dloss, reduction));
    if (dlogits->dtype != logits->dtype || dlogits->ndim != 2 ||
        dlogits->shape[0] != logits->shape[0] || dlogits->shape[1] != logits->shape[1])
        return ds_fail(DS_EINVAL, "cross_entropy_backward: dlogits must be as logits");
    return 0;
}

/* ---- norms: rows of the last dimension, which is dense; a parameter for each of its elements, a
 * statistic for each row */

static int check_row_tensor(const char *name, const char *part, const ds_tensor *t,
                            const ds_tensor *x)
{
    int last = x->ndim - 1;

    if (!t)
        return 0;
    if (!ds_is_float(t->dtype) || (t->dtype == DS_F64) != (x->dtype == DS_F64))
        return ds_fail(DS_EINVAL, "%s: %s is %s beside an input of %s", name, part,
                       ds_name_of(t->dtype), ds_name_of(x->dtype));
    if (t->ndim != x->ndim || t->numel != x->numel ||
        memcmp(t->shape, x->shape, (size_t)x->ndim * sizeof *x->shape) != 0)
        return ds_fail(DS_EINVAL,
                       "%s: %s has %lld elements in %d dimensions, must have the input's shape "
                       "(%lld in %d)",
                       name, part, (long long)t->numel, t->ndim, (long long)x->numel, x->ndim);
    if (t->stride[last] != 1 && t->shape[last] > 1)
        return ds_fail(DS_EINVAL,
                       "%s: the last dimension of %s is not dense (stride %lld; call contiguous() "
                       "first)",
                       name, part, (long long)t->stride[last]);
    return 0;
}

static int check_vector(const char *name, const char *part, const ds_tensor *t, int64_t n,
                        const ds_tensor *x)
{
    if (!t)
        return 0;
    if (t->numel != n || !t->dense)
        return ds_fail(DS_EINVAL, "%s: %s has %lld elements, must have %lld, dense", name, part,
                       (long long)t->numel, (long long)n);
    if (!ds_is_float(t->dtype) || (t->dtype == DS_F64 && x->dtype != DS_F64))
        return ds_fail(DS_EINVAL, "%s: %s is %s beside an input of %s", name, part,
                       ds_name_of(t->dtype), ds_name_of(x->dtype));
    return 0;
}

/* The input, and its rows' statistics. */
static int check_normed(const char *name, const ds_tensor *x, const ds_tensor *mean,
                        const ds_tensor *rstd)
{
    const ds_tensor *both[] = {mean, rstd};
    int64_t columns;

    if (x->ndim < 1)
        return ds_fail(DS_EINVAL, "%s: the input has no dimensions", name);
    DS_TRY(check_row_tensor(name, "the input", x, x));
    if (!rstd)
        return ds_fail(DS_EINVAL, "%s: rstd is missing", name);
    columns = x->shape[x->ndim - 1];
    for (int i = 0; i < 2; i++) {
        const char *part = i ? "rstd" : "mean";

        DS_TRY(check_vector(name, part, both[i], columns ? x->numel / columns : 0, x));
        if (both[i] && (both[i]->dtype == DS_BF16 || both[i]->dtype == DS_F16))
            return ds_fail(DS_EINVAL, "%s: %s is %s, must be f32", name, part,
                           ds_name_of(both[i]->dtype));
    }
    return 0;
}

int ds_check_norm(const ds_tensor *y, const ds_tensor *sum, const ds_tensor *mean,
                  const ds_tensor *rstd, const ds_tensor *x, const ds_tensor *delta,
                  const ds_tensor *w, const ds_tensor *b)
{
    static const char name[] = "norm";

    DS_TRY(check_normed(name, x, mean, rstd));
    DS_TRY(check_row_tensor(name, "the output", y, x));
    DS_TRY(check_row_tensor(name, "sum", sum, x));
    DS_TRY(check_row_tensor(name, "delta", delta, x));
    DS_TRY(check_vector(name, "w", w, x->shape[x->ndim - 1], x));
    DS_TRY(check_vector(name, "b", b, x->shape[x->ndim - 1], x));
    if (!delta != !sum || (sum && (sum->dtype != x->dtype || delta->dtype != y->dtype)))
        return ds_fail(DS_EINVAL,
                       "%s: sum and delta belong together; sum is of the input's dtype, delta of "
                       "the output's",
                       name);
    return 0;
}

int ds_check_norm_backward(const ds_tensor *dx, const ds_tensor *dw, const ds_tensor *db,
                           const ds_tensor *dy, const ds_tensor *x, const ds_tensor *w,
                           const ds_tensor *mean, const ds_tensor *rstd, const ds_tensor *dsum)
{
    static const char name[] = "norm_backward";

    DS_TRY(check_normed(name, x, mean, rstd));
    DS_TRY(check_row_tensor(name, "dx", dx, x));
    DS_TRY(check_row_tensor(name, "dy", dy, x));
    DS_TRY(check_row_tensor(name, "dsum", dsum, x));
    DS_TRY(check_vector(name, "w", w, x->shape[x->ndim - 1], x));
    DS_TRY(check_vector(name, "dw", dw, x->shape[x->ndim - 1], x));
    DS_TRY(check_vector(name, "db", db, x->shape[x->ndim - 1], x));
    if (dx->dtype != x->dtype || (dsum && dsum->dtype != x->dtype))
        return ds_fail(DS_EINVAL, "%s: dx is %s and dsum %s, must be %s as the input", name,
                       ds_name_of(dx->dtype), dsum ? ds_name_of(dsum->dtype) : "none",
                       ds_name_of(x->dtype));
    return 0;
}

/* ---- optimizers */

/* [t]: n numbers of a dtype on a device. */
static int check_numbers(const char *name, const char *part, const ds_tensor *t, int dtype,
                         int64_t n, int device)
{
    if (t && (t->dtype != dtype || t->numel != n || !t->dense || t->device != device))
        return ds_fail(DS_EINVAL, "%s: %s is %lld numbers in %s, must be %lld in %s, dense%s", name,
                       part, (long long)t->numel, ds_name_of(t->dtype), (long long)n,
                       ds_name_of(dtype), t->device == device ? "" : ", on the weights' device");
    return 0;
}

int ds_check_optimizer(const char *name, const ds_tensor *p, const ds_tensor *a, const ds_tensor *b,
                       const ds_tensor *low, const ds_tensor *g, const ds_tensor *factor,
                       const ds_tensor *rates)
{
    const ds_tensor *all[] = {a, b, p, low, g};

    if (p->dtype != DS_F32 && p->dtype != DS_F64)
        return ds_fail(DS_EINVAL, "%s: weights are %s, must be f32%s", name, ds_name_of(p->dtype),
                       p->device == DS_CPU ? " or f64" : "");
    for (int i = 0; i < 5; i++) {
        if (!all[i])
            continue;
        if (all[i]->numel != p->numel)
            return ds_fail(DS_EINVAL, "%s: %lld elements beside %lld weights", name,
                           (long long)all[i]->numel, (long long)p->numel);
        if (!all[i]->dense)
            return ds_fail(DS_EINVAL, "%s: a buffer is not dense (call contiguous() first)", name);
        if (i < 2 && all[i]->dtype != p->dtype)
            return ds_fail(DS_EINVAL, "%s: state is %s beside %s weights", name,
                           ds_name_of(all[i]->dtype), ds_name_of(p->dtype));
    }
    if (!ds_is_float(g->dtype) || (p->dtype == DS_F64) != (g->dtype == DS_F64))
        return ds_fail(DS_EINVAL, "%s: gradients are %s beside %s weights", name,
                       ds_name_of(g->dtype), ds_name_of(p->dtype));
    if (low && (p->dtype != DS_F32 || (low->dtype != DS_BF16 && low->dtype != DS_F16)))
        return ds_fail(DS_EINVAL, "%s: a %s copy of %s weights, must be bf16 or f16 of f32", name,
                       ds_name_of(low->dtype), ds_name_of(p->dtype));
    DS_TRY(check_numbers(name, "factor", factor, DS_F32, 1, p->device));
    return check_numbers(name, "rates", rates, DS_F64, 3, p->device);
}

int ds_check_square_sum(const ds_tensor *y, const ds_tensor *x)
{
    if (y->numel != 1 || (y->dtype != DS_F32 && !(y->dtype == DS_F64 && x->dtype == DS_F64)))
        return ds_fail(DS_EINVAL, "square_sum: the result is %lld numbers in %s, must be 1 in f32",
                       (long long)y->numel, ds_name_of(y->dtype));
    if (!ds_is_float(x->dtype))
        return ds_fail(DS_EINVAL, "square_sum: not for %s", ds_name_of(x->dtype));
    if (!x->dense)
        return ds_fail(DS_EINVAL, "square_sum: the input is not dense (call contiguous() first)");
    return 0;
}

int ds_check_clip_factor(const ds_tensor *factor, const ds_tensor *norm, const ds_tensor *squares)
{
    static const char name[] = "clip_factor";

    DS_TRY(check_numbers(name, "factor", factor, DS_F32, 1, factor->device));
    DS_TRY(check_numbers(name, "norm", norm, DS_F32, 1, factor->device));
    return check_numbers(name, "the sum of squares", squares, DS_F32, 1, factor->device);
}

/* ---- attention */

int ds_check_attention_like(const char *what, const ds_tensor *x, const char *name,
                            const ds_tensor *like)
{
    if (x->ndim != 4 || x->dtype != like->dtype)
        return ds_fail(DS_EINVAL, "%s: %s is %d-d %s, must be 4-d %s", what, name, x->ndim,
                       ds_name_of(x->dtype), ds_name_of(like->dtype));
    for (int i = 0; i < 4; i++)
        if (x->shape[i] != like->shape[i])
            return ds_fail(DS_EINVAL, "%s: size %lld of %s's dimension %d, must be %lld", what,
                           (long long)x->shape[i], name, i + 1, (long long)like->shape[i]);
    if (x->stride[3] != 1 && x->shape[3] > 1)
        return ds_fail(DS_EINVAL, "%s: the last dimension of %s is not dense (stride %lld)", what,
                       name, (long long)x->stride[3]);
    return 0;
}

static int heads_fit(const char *what, const ds_tensor *q, const ds_tensor *k)
{
    if (k->dtype != q->dtype || k->shape[0] != q->shape[0] || k->shape[3] != q->shape[3])
        return ds_fail(DS_EINVAL,
                       "%s: key %s [%lld x %lld x %lld x %lld] does not match query %s "
                       "[%lld x %lld x %lld x %lld]",
                       what, ds_name_of(k->dtype), (long long)k->shape[0], (long long)k->shape[1],
                       (long long)k->shape[2], (long long)k->shape[3], ds_name_of(q->dtype),
                       (long long)q->shape[0], (long long)q->shape[1], (long long)q->shape[2],
                       (long long)q->shape[3]);
    if (k->stride[3] != 1 && k->shape[3] > 1)
        return ds_fail(DS_EINVAL, "%s: the last dimension of the key is not dense (stride %lld)",
                       what, (long long)k->stride[3]);
    if (k->shape[2] < 1 || q->shape[2] % k->shape[2])
        return ds_fail(DS_EINVAL, "%s: %lld query heads are not a multiple of %lld key heads", what,
                       (long long)q->shape[2], (long long)k->shape[2]);
    return 0;
}

int ds_check_attention(ds_attention_sizes *z, const char *what, const ds_tensor *q,
                       const ds_tensor *k, const ds_tensor *v, const ds_tensor *lse, double p,
                       int widest, const char *device)
{
    DS_TRY(ds_check_attention_like(what, q, "the query", q));
    DS_TRY(ds_check_attention_like(what, v, "the value", k));
    DS_TRY(heads_fit(what, q, k));
    z->B = q->shape[0];
    z->T = q->shape[1];
    z->H = q->shape[2];
    z->D = q->shape[3];
    z->S = k->shape[1];
    z->G = k->shape[2];
    if (z->D < 1 || z->D > widest)
        return ds_fail(DS_EINVAL, "%s: heads of %lld, must be 1 to %d wide%s", what,
                       (long long)z->D, widest, device);
    if (p < 0 || p >= 1)
        return ds_fail(DS_EINVAL, "%s: dropout %g, must be in [0, 1)", what, p);
    if ((lse->dtype != DS_F32 && (lse->dtype != DS_F64 || q->dtype != DS_F64)) || lse->ndim != 3 ||
        lse->shape[0] != z->B || lse->shape[1] != z->H || lse->shape[2] != z->T)
        return ds_fail(DS_EINVAL, "%s: lse must be f32 [%lld x %lld x %lld]", what, (long long)z->B,
                       (long long)z->H, (long long)z->T);
    return 0;
}

int ds_check_attention_mask(int64_t stride[4], const char *what, const ds_tensor *mask,
                            const ds_attention_sizes *z)
{
    const int64_t full[4] = {z->B, z->H, z->T, z->S};

    if (!mask)
        return 0;
    if (mask->ndim > 4 || (mask->dtype != DS_BOOL && !ds_is_float(mask->dtype)))
        return ds_fail(DS_EINVAL, "%s: the mask is %d-d %s, must be bool or float, at most 4-d",
                       what, mask->ndim, ds_name_of(mask->dtype));
    for (int i = 4 - mask->ndim; i < 4; i++) {
        int64_t size = mask->shape[i - 4 + mask->ndim];

        if (size != 1 && size != full[i])
            return ds_fail(DS_EINVAL,
                           "%s: the mask has %lld where [batch x heads x queries x keys] is "
                           "[%lld x %lld x %lld x %lld]",
                           what, (long long)size, (long long)full[0], (long long)full[1],
                           (long long)full[2], (long long)full[3]);
        stride[i] = size == 1 ? 0 : mask->stride[i - 4 + mask->ndim];
    }
    return 0;
}
