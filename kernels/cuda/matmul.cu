/* matmul.cu - the matrix product of tensors. */
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm.h"

static int check(const ds_tensor *y, const ds_tensor *a, const ds_tensor *b)
{
    int n = y->ndim;

    if (a->ndim < 2 || b->ndim < 2 || n < 2 || a->ndim > n || b->ndim > n)
        return ds_fail(DS_EINVAL, "matmul wants matrices, not %d and %d dimensions into %d",
                       a->ndim, b->ndim, n);
    if (a->dtype == DS_F64 || !ds_is_float(a->dtype))
        return ds_cuda_refuse("matmul", a->dtype);
    if (a->dtype != b->dtype || (y->dtype != a->dtype && y->dtype != DS_F32))
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
static int as_matrix(gemm_matrix *out, const ds_tensor *x, const ds_tensor *y)
{
    int first = y->ndim - x->ndim;

    *out = gemm_matrix_of(x->data, x->stride[x->ndim - 2], x->stride[x->ndim - 1], x->dtype);
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

extern "C" int ds_cuda_matmul(ds_tensor *y, const ds_tensor *a, const ds_tensor *b, double alpha,
                              double beta)
{
    int n = y->ndim;
    gemm p = {};

    DS_TRY(check(y, a, b));
    DS_TRY(as_matrix(&p.y, y, y));
    DS_TRY(as_matrix(&p.a, a, y));
    DS_TRY(as_matrix(&p.b, b, y));
    p.m = y->shape[n - 2], p.n = y->shape[n - 1], p.k = a->shape[a->ndim - 1];
    p.batches = n - 2;
    for (int d = 0; d < n - 2; d++)
        p.batch[d] = y->shape[d];
    p.alpha = alpha, p.beta = beta;
    return gemm_run("matmul", &p);
}
