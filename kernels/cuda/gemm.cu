/* gemm.cu - matrix products: strides and batches are put in order here, cuBLASLt multiplies.
 *
 * Matrices are by rows here and by columns for cuBLASLt: a matrix by rows is the transpose of one by
 * columns in the same memory, so it is asked for yᵀ = bᵀ aᵀ. An operand that lies by rows or by columns
 * is taken where it lies; others are copied first. Batch dimensions that step evenly are merged, one is
 * left to cuBLASLt, and more than that are loops.
 */
#include "kernels/cuda/gemm.h"

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm_plan.h"

#define MOST_BATCHES 65535 /* at once: what every kernel's grid can hold */

static void advance(ds_matrix *x, int64_t elements)
{
    x->data += elements * ds_bytes_of(x->dtype);
}

/* Whether cuBLASLt is to do more than multiply. */
static int has_beside(const gemm *p)
{
    return p->bias || p->aux || p->before || p->sums;
}

/* ---- nothing to multiply: y = beta y + bias */

template <typename S>
static __global__ void scale_kernel(S *y, const S *bias, int64_t rows, int64_t cols, int64_t row,
                                    int64_t col, float beta)
{
    for (int64_t i = global_thread(); i < rows * cols; i += global_threads()) {
        S *to = y + i / cols * row + i % cols * col;
        float v = beta != 0 ? beta * to_float(*to) : 0;

        *to = from_float<S>(bias ? v + to_float(bias[i % cols]) : v);
    }
}

template <typename S> static int scale_matrix(const char *name, const gemm *p)
{
    return launch(name, scale_kernel<S>, grid_for(p->m * p->n, 1024, 8), 256, 0, p->y.data,
                  (const S *)p->bias, p->m, p->n, p->y.row, p->y.col, (float)p->beta);
}

static int without_product(const char *name, const gemm *p)
{
    gemm q = *p;
    int rc = 0;

    if (!p->batches)
        return DS_BY_FLOAT(name, p->y.dtype, S, scale_matrix<S>(name, p));
    ds_product_drop(&q, 0);
    for (int64_t i = 0; i < p->batch[0] && rc == 0; i++) {
        rc = without_product(name, &q);
        advance(&q.y, p->y.batch[0]);
    }
    return rc;
}

/* ---- copies of what cuBLASLt cannot take */

/* x as a tensor [batch.., rows, cols]; a batch that repeats has size 1. */
static ds_tensor tensor_of(const gemm *p, const ds_matrix *x, int64_t rows, int64_t cols)
{
    ds_tensor t = {};

    t.data = x->data;
    t.dtype = x->dtype;
    t.device = DS_CUDA;
    t.ndim = p->batches + 2;
    t.numel = rows * cols;
    for (int d = 0; d < p->batches; d++) {
        t.shape[d] = x->batch[d] ? p->batch[d] : 1;
        t.stride[d] = x->batch[d];
        t.numel *= t.shape[d];
    }
    t.shape[p->batches] = rows, t.stride[p->batches] = x->row;
    t.shape[p->batches + 1] = cols, t.stride[p->batches + 1] = x->col;
    return t;
}

/* The same in memory of its own, by rows without gaps; *x becomes that. */
static int dense_like(ds_tensor *copy, const gemm *p, ds_matrix *x, const ds_tensor *from, int slot)
{
    int64_t step = 1;

    *copy = *from;
    copy->dense = 1;
    copy->data = ds_cuda_scratch(slot, (size_t)(from->numel * ds_bytes_of(from->dtype)));
    if (!copy->data)
        return DS_ENOMEM;
    for (int d = from->ndim - 1; d >= 0; d--) {
        copy->stride[d] = step;
        step *= from->shape[d];
    }
    x->data = (char *)copy->data;
    x->row = copy->stride[p->batches], x->col = 1;
    for (int d = 0; d < p->batches; d++)
        x->batch[d] = x->batch[d] ? copy->stride[d] : 0;
    return 0;
}

static int pack_matrix(const gemm *p, ds_matrix *x, int64_t rows, int64_t cols, int slot)
{
    ds_tensor from = tensor_of(p, x, rows, cols), copy;

    if (ds_by_rows(x, cols) || ds_by_columns(x, rows))
        return 0;
    DS_TRY(dense_like(&copy, p, x, &from, slot));
    return ds_cuda_copy(&copy, &from);
}

static int multiply(const char *name, const gemm *p);

/* y lies neither by rows nor by columns: by way of a copy. */
static int by_copy_of_y(const char *name, const gemm *p)
{
    gemm q = *p;
    ds_tensor y = tensor_of(p, &p->y, p->m, p->n), copy;

    if (has_beside(p))
        return DS_ENOSYS;
    DS_TRY(dense_like(&copy, p, &q.y, &y, DS_CUDA_C));
    if (p->beta != 0)
        DS_TRY(ds_cuda_copy(&copy, &y));
    DS_TRY(multiply(name, &q));
    return ds_cuda_copy(&y, &copy);
}

/* ---- multiplying */

/* The largest power of 2 that the pointer is a multiple of, up to 16. */
static int64_t alignment(const void *p)
{
    uintptr_t at = (uintptr_t)p | 16;

    return (int64_t)(at & (~at + 1));
}

/* Operands that can be taken where they lie, at most one batch dimension. */
static int call(const char *name, const gemm *p)
{
    int a_by_rows = ds_by_rows(&p->a, p->k), b_by_rows = ds_by_rows(&p->b, p->n);
    int64_t batch = p->batches ? p->batch[0] : 1;
    int64_t align = alignment(p->y.data);
    gemm_key key = {};
    gemm_operands o = {p->b.data,
                       p->a.data,
                       p->y.data,
                       p->bias ? p->bias : p->sums,
                       p->aux ? p->aux : (void *)p->before,
                       (float)p->alpha,
                       (float)p->beta};

    align = o.bias && alignment(o.bias) < align ? alignment(o.bias) : align;
    align = o.aux && alignment(o.aux) < align ? alignment(o.aux) : align;
    key.m = p->n, key.n = p->m, key.k = p->k;
    key.a_transposed = !b_by_rows, key.b_transposed = !a_by_rows;
    key.a_ld = b_by_rows ? p->b.row : p->b.col;
    key.b_ld = a_by_rows ? p->a.row : p->a.col;
    key.d_ld = p->y.row;
    key.dtype = p->a.dtype, key.d_dtype = p->y.dtype;
    key.batch = batch;
    if (batch > 1)
        key.a_step = p->b.batch[0], key.b_step = p->a.batch[0], key.d_step = p->y.batch[0];
    key.bias = p->bias ? GEMM_FORWARD : p->sums ? GEMM_BACKWARD : GEMM_NONE;
    key.aux = p->aux ? GEMM_FORWARD : p->before ? GEMM_BACKWARD : GEMM_NONE;
    key.a_align = alignment(o.a), key.b_align = alignment(o.b), key.d_align = align;
    return gemm_multiply(name, &key, &o);
}

/* All of a batch dimension in pieces that a grid can hold. */
static int in_pieces(const char *name, const gemm *p)
{
    gemm q = *p;
    int rc = 0;

    for (int64_t i = 0; i < p->batch[0] && rc == 0; i += MOST_BATCHES) {
        q.batch[0] = p->batch[0] - i < MOST_BATCHES ? p->batch[0] - i : MOST_BATCHES;
        rc = call(name, &q);
        advance(&q.y, MOST_BATCHES * p->y.batch[0]);
        advance(&q.a, MOST_BATCHES * p->a.batch[0]);
        advance(&q.b, MOST_BATCHES * p->b.batch[0]);
    }
    return rc;
}

/* The largest batch dimension is cuBLASLt's, the others are loops. */
static int multiply(const char *name, const gemm *p)
{
    gemm q = *p;
    int largest = 0, walked, rc = 0;

    if (p->batches == 0)
        return call(name, p);
    if (p->batches == 1)
        return in_pieces(name, p);
    for (int d = 1; d < p->batches; d++)
        if (p->batch[d] > p->batch[largest])
            largest = d;
    walked = largest == 0 ? 1 : 0;
    ds_product_drop(&q, walked);
    for (int64_t i = 0; i < p->batch[walked] && rc == 0; i++) {
        rc = multiply(name, &q);
        advance(&q.y, p->y.batch[walked]);
        advance(&q.a, p->a.batch[walked]);
        advance(&q.b, p->b.batch[walked]);
    }
    return rc;
}

int gemm_run(const char *name, const gemm *given)
{
    gemm p = *given;
    int rc;

    if (p.m == 0 || p.n == 0 || ds_product_batches(&p) == 0)
        return p.sums ? DS_ENOSYS : 0;
    if (p.k == 0 || p.alpha == 0)
        return p.aux || p.before || p.sums ? DS_ENOSYS : without_product(name, &p);
    ds_product_tidy(&p, has_beside(&p));
    DS_TRY(pack_matrix(&p, &p.a, p.m, p.k, DS_CUDA_A));
    DS_TRY(pack_matrix(&p, &p.b, p.k, p.n, DS_CUDA_B));
    rc = ds_by_rows(&p.y, p.n) ? multiply(name, &p) : by_copy_of_y(name, &p);
    if (rc == DS_ENOSYS && !has_beside(&p))
        return ds_fail(DS_ENOSYS,
                       "%s: cuBLASLt cannot make [%lld x %lld] of %s, %lld products each", name,
                       (long long)p.m, (long long)p.n, ds_name_of(p.a.dtype), (long long)p.k);
    return rc;
}

int gemm_rows_of(ds_matrix *out, int64_t *rows, const ds_tensor *x, const char *name,
                 const char *which)
{
    int last = x->ndim - 1;

    if (x->ndim < 1 || (x->ndim != 2 && !x->dense))
        return ds_fail(DS_EINVAL, "%s wants %s dense or with two dimensions, not %d", name, which,
                       x->ndim);
    *rows = 1;
    for (int d = 0; d < last; d++)
        *rows *= x->shape[d];
    *out = ds_matrix_of(x->data, x->ndim == 2 ? x->stride[0] : x->shape[last], x->stride[last],
                        x->dtype);
    return 0;
}
