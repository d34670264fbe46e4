/* product.h - matrix products as all backends see them: how one is described, which tensors make one,
 * and how its strides and batches are put in order before a library multiplies.
 */
#ifndef DS_PRODUCT_H
#define DS_PRODUCT_H

#include "kernels/dtype.h"
#include "kernels/error.h"

#define DS_PRODUCT_BATCH (DS_MAX_DIM - 2)

typedef struct ds_matrix {
    char *data;
    int64_t row, col; /* elements from one row, one column to the next */
    int64_t batch[DS_PRODUCT_BATCH];
    int dtype;
} ds_matrix;

/* y = alpha a b + bias + beta y: y [batch.., m, n], a [batch.., m, k], b [batch.., k, n]; bias [n],
 * dense, in y's dtype, or NULL. Any strides; a batch stride of 0 repeats a or b. a and b have one
 * dtype, y the same or f32. Where beta is 0, what y held is not read. */
typedef struct ds_product {
    ds_matrix y, a, b;
    int64_t m, n, k;
    int64_t batch[DS_PRODUCT_BATCH];
    int batches;
    double alpha, beta;
    const void *bias;
} ds_product;

static inline ds_matrix ds_matrix_of(const void *data, int64_t row, int64_t col, int dtype)
{
    ds_matrix m = {(char *)data, row, col, {0}, dtype};

    return m;
}

/* ---- in order */

static inline int ds_by_rows(const ds_matrix *x, int64_t cols)
{
    return x->col == 1 && x->row >= cols;
}

static inline int ds_by_columns(const ds_matrix *x, int64_t rows)
{
    return x->row == 1 && x->col >= rows;
}

static inline int64_t ds_product_batches(const ds_product *p)
{
    int64_t n = 1;

    for (int i = 0; i < p->batches; i++)
        n *= p->batch[i];
    return n;
}

static inline void ds_product_drop(ds_product *p, int d)
{
    p->batches--;
    for (int i = d; i < p->batches; i++) {
        p->batch[i] = p->batch[i + 1];
        p->y.batch[i] = p->y.batch[i + 1];
        p->a.batch[i] = p->a.batch[i + 1];
        p->b.batch[i] = p->b.batch[i + 1];
    }
}

static inline int ds_matrix_steps_on(const ds_matrix *x, int d, int64_t size)
{
    return x->batch[d] == x->batch[d + 1] * size;
}

/* Fewest batch dimensions: those of size 1 go, neighbours that step evenly become one, and a batch
 * that repeats b becomes more rows. */
static inline void ds_product_tidy_batches(ds_product *p)
{
    for (int d = p->batches - 1; d >= 0; d--)
        if (p->batch[d] == 1)
            ds_product_drop(p, d);
    for (int d = p->batches - 2; d >= 0; d--) {
        int64_t inner = p->batch[d + 1];

        if (!ds_matrix_steps_on(&p->y, d, inner) || !ds_matrix_steps_on(&p->a, d, inner) ||
            !ds_matrix_steps_on(&p->b, d, inner))
            continue;
        p->batch[d + 1] *= p->batch[d];
        ds_product_drop(p, d);
    }
    while (p->batches) {
        int d = p->batches - 1;

        if (p->b.batch[d] != 0 || p->a.batch[d] != p->a.row * p->m ||
            p->y.batch[d] != p->y.row * p->m)
            break;
        p->m *= p->batch[d];
        ds_product_drop(p, d);
    }
}

/* A stride along a dimension of size 1 means nothing: give it the value that makes the matrix dense,
 * so that libraries see a layout they know and equal shapes make equal keys. */
static inline void ds_matrix_tidy(ds_matrix *x, int64_t rows, int64_t cols)
{
    if (rows == 1 && cols == 1)
        x->row = x->col = 1;
    else if (rows == 1 && x->col == 1)
        x->row = cols;
    else if (rows == 1)
        x->row = 1;
    else if (cols == 1)
        x->col = 1;
}

static inline void ds_matrix_transpose(ds_matrix *x)
{
    int64_t row = x->row;

    x->row = x->col;
    x->col = row;
}

/* yᵀ = bᵀ aᵀ. */
static inline void ds_product_transpose(ds_product *p)
{
    ds_matrix a = p->a;
    int64_t m = p->m;

    p->a = p->b;
    p->b = a;
    p->m = p->n;
    p->n = m;
    ds_matrix_transpose(&p->y);
    ds_matrix_transpose(&p->a);
    ds_matrix_transpose(&p->b);
}

/* Puts all of it in order. Where y lies by columns it becomes yᵀ, by rows, which is what libraries
 * write; not with `fixed`: something else depends on what are rows. */
static inline void ds_product_tidy(ds_product *p, int fixed)
{
    ds_product_tidy_batches(p); /* first: it looks at the strides as they were given */
    ds_matrix_tidy(&p->y, p->m, p->n);
    ds_matrix_tidy(&p->a, p->m, p->k);
    ds_matrix_tidy(&p->b, p->k, p->n);
    if (!fixed && !p->bias && !ds_by_rows(&p->y, p->n) && ds_by_columns(&p->y, p->m))
        ds_product_transpose(p);
}

/* ---- of tensors */

static inline int ds_product_check(const ds_tensor *y, const ds_tensor *a, const ds_tensor *b)
{
    int n = y->ndim;

    if (a->ndim < 2 || b->ndim < 2 || n < 2 || a->ndim > n || b->ndim > n)
        return ds_fail(DS_EINVAL, "matmul wants matrices, not %d and %d dimensions into %d",
                       a->ndim, b->ndim, n);
    if (a->dtype != b->dtype || !ds_is_float(a->dtype) ||
        (y->dtype != a->dtype && (y->dtype != DS_F32 || a->dtype == DS_F64)))
        return ds_fail(DS_EINVAL, "matmul cannot make %s of %s and %s", ds_name_of(y->dtype),
                       ds_name_of(a->dtype), ds_name_of(b->dtype));
    if (a->shape[a->ndim - 1] != b->shape[b->ndim - 2] ||
        y->shape[n - 2] != a->shape[a->ndim - 2] || y->shape[n - 1] != b->shape[b->ndim - 1])
        return ds_fail(DS_EINVAL,
                       "matmul cannot make [%lld x %lld] of [%lld x %lld] and [%lld x %lld]",
                       (long long)y->shape[n - 2], (long long)y->shape[n - 1],
                       (long long)a->shape[a->ndim - 2], (long long)a->shape[a->ndim - 1],
                       (long long)b->shape[b->ndim - 2], (long long)b->shape[b->ndim - 1]);
    return 0;
}

/* The matrix that x is, its batch dimensions lined up with those of y. */
static inline int ds_product_operand(ds_matrix *out, const ds_tensor *x, const ds_tensor *y)
{
    int first = y->ndim - x->ndim;

    *out = ds_matrix_of(x->data, x->stride[x->ndim - 2], x->stride[x->ndim - 1], x->dtype);
    for (int d = first; d < y->ndim - 2; d++) {
        int64_t size = x->shape[d - first];

        if (size != y->shape[d] && size != 1)
            return ds_fail(DS_EINVAL,
                           "matmul cannot broadcast batch dimension %d from %lld to %lld", d,
                           (long long)size, (long long)y->shape[d]);
        out->batch[d] = size == 1 ? 0 : x->stride[d - first];
    }
    return 0;
}

/* The product that the kernel matmul is asked for; all but alpha, beta and bias. */
static inline int ds_product_of(ds_product *p, const ds_tensor *y, const ds_tensor *a,
                                const ds_tensor *b)
{
    int n = y->ndim;

    if (ds_product_check(y, a, b) < 0 || ds_product_operand(&p->y, y, y) < 0 ||
        ds_product_operand(&p->a, a, y) < 0 || ds_product_operand(&p->b, b, y) < 0)
        return DS_EINVAL;
    p->m = y->shape[n - 2], p->n = y->shape[n - 1], p->k = a->shape[a->ndim - 1];
    p->batches = n - 2;
    for (int d = 0; d < n - 2; d++)
        p->batch[d] = y->shape[d];
    return 0;
}

#endif
