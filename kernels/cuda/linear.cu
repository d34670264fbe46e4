/* linear.cu - the linear layer: a product to which cuBLASLt adds the bias, and an activation.
 *
 * Of activations cuBLASLt knows the tanh form of GELU, and writes its argument beside it (linear_aux);
 * the others are a pass over the result. Where cuBLASLt does not do it (bias of another dtype, shapes or
 * addresses that it refuses), the pass adds the bias, too.
 */
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/linear.h"

static int check(const char *name, const ds_tensor *y, const ds_tensor *beside, const ds_tensor *x,
                 const ds_tensor *w, const ds_tensor *b)
{
    int64_t n = w->shape[0], k = w->shape[1];

    if (w->ndim != 2 || x->ndim < 1 || y->ndim < 1 || x->shape[x->ndim - 1] != k ||
        y->shape[y->ndim - 1] != n || (b && b->numel != n))
        return ds_fail(DS_EINVAL,
                       "%s wants x [.. x %lld], y [.. x %lld] and b [%lld] for w [%lld x %lld]",
                       name, (long long)k, (long long)n, (long long)n, (long long)n, (long long)k);
    if (x->dtype == DS_F64)
        return ds_cuda_refuse(name, x->dtype);
    if (!ds_is_float(x->dtype) || w->dtype != x->dtype || y->dtype != x->dtype ||
        (b && (!ds_is_float(b->dtype) || b->dtype == DS_F64)))
        return ds_fail(DS_EINVAL, "%s cannot make %s of %s and %s%s%s", name, ds_name_of(y->dtype),
                       ds_name_of(x->dtype), ds_name_of(w->dtype), b ? " and " : "",
                       b ? ds_name_of(b->dtype) : "");
    if (y->stride[y->ndim - 1] != 1 && y->numel > 1 && n > 1)
        return ds_fail(DS_EINVAL, "%s writes rows without gaps, not a stride of %lld", name,
                       (long long)y->stride[y->ndim - 1]);
    if (beside && (!beside->dense || beside->numel != y->numel || beside->dtype != y->dtype))
        return ds_fail(DS_EINVAL, "%s wants %s dense, %s, with %lld elements", name,
                       name[6] ? "h" : "slope", ds_name_of(y->dtype), (long long)y->numel);
    return 0;
}

/* x wᵀ into y. */
static int product_of(gemm *p, const char *name, const ds_tensor *y, const ds_tensor *x,
                      const ds_tensor *w)
{
    int64_t m;

    DS_TRY(gemm_rows_of(&p->a, &p->m, x, name, "x"));
    DS_TRY(gemm_rows_of(&p->y, &m, y, name, "y"));
    if (m != p->m)
        return ds_fail(DS_EINVAL, "%s cannot write %lld rows into %lld", name, (long long)p->m,
                       (long long)m);
    p->n = w->shape[0], p->k = w->shape[1];
    p->b = ds_matrix_of(w->data, w->stride[1], w->stride[0], w->dtype);
    p->alpha = 1;
    return 0;
}

/* The bias as f32, dense; NULL: out of memory. */
static const void *bias_in_f32(const ds_tensor *b)
{
    ds_tensor f = *b;

    if (b->dtype == DS_F32 && b->dense)
        return b->data;
    f.data = ds_cuda_scratch(DS_CUDA_PARTIAL, (size_t)b->numel * sizeof(float));
    f.dtype = DS_F32;
    f.ndim = 1, f.shape[0] = b->numel, f.stride[0] = 1, f.dense = 1;
    if (!f.data)
        return NULL;
    ds_tensor from = f;
    from.data = b->data, from.dtype = b->dtype, from.dense = b->dense;
    from.stride[0] = b->ndim ? b->stride[b->ndim - 1] : 1;
    return ds_cuda_copy(&f, &from) < 0 ? NULL : f.data;
}

/* The product with its bias where cuBLASLt can; *rest: what is left to add, or NULL. */
static int biased_product(const char *name, gemm *p, const ds_tensor *b, const ds_tensor **rest)
{
    int rc;

    *rest = b;
    if (b && b->dtype == p->y.dtype && b->dense)
        p->bias = b->data;
    rc = gemm_run(name, p);
    if (rc == 0 && p->bias)
        *rest = NULL;
    if (rc != DS_ENOSYS || !p->bias)
        return rc;
    p->bias = NULL;
    return gemm_run(name, p);
}

extern "C" int ds_cuda_linear(ds_tensor *y, ds_tensor *slope, const ds_tensor *x,
                              const ds_tensor *w, const ds_tensor *b, int activation)
{
    gemm p = {};
    activation_pass q = {};
    const ds_tensor *rest;

    DS_TRY(check("linear", y, slope, x, w, b));
    if (activation < ACT_NONE || activation >= ACT_COUNT || (slope && !activation))
        return ds_fail(DS_EINVAL, "linear has no %s %d",
                       slope ? "slope with activation" : "activation", activation);
    DS_TRY(product_of(&p, "linear", y, x, w));
    DS_TRY(biased_product("linear", &p, b, &rest));
    if ((!rest && !activation) || p.m == 0 || p.n == 0)
        return 0;
    if (rest && !(q.bias = bias_in_f32(rest)))
        return DS_ENOMEM;
    q.h = q.y = y->data, q.slope = slope ? slope->data : NULL;
    q.rows = p.m, q.cols = p.n, q.row = p.y.row;
    q.dtype = y->dtype, q.activation = activation;
    return activation_run("linear", &q);
}

extern "C" int ds_cuda_linear_aux(ds_tensor *y, ds_tensor *h, const ds_tensor *x,
                                  const ds_tensor *w, const ds_tensor *b, int activation)
{
    gemm p = {};

    DS_TRY(check("linear_aux", y, h, x, w, b));
    if (activation <= ACT_NONE || activation >= ACT_COUNT || !y->dense)
        return ds_fail(DS_EINVAL, "linear_aux wants y dense and an activation of 1 to %d, not %d",
                       ACT_COUNT - 1, activation);
    DS_TRY(product_of(&p, "linear_aux", y, x, w));
    if (activation == ACT_GELU_TANH && (!b || (b->dtype == y->dtype && b->dense))) {
        p.bias = b ? b->data : NULL;
        p.aux = h->data;
        int rc = gemm_run("linear_aux", &p);
        if (rc != DS_ENOSYS)
            return rc;
    }
    DS_TRY(ds_cuda_linear(h, NULL, x, w, b, ACT_NONE));
    return ds_cuda_activate(y, NULL, h, activation);
}
