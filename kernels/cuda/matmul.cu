/* matmul.cu - the matrix product of tensors. */
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm.h"

extern "C" int ds_cuda_matmul(ds_tensor *y, const ds_tensor *a, const ds_tensor *b, double alpha,
                              double beta)
{
    gemm p = {};

    if (a->dtype == DS_F64 || !ds_is_float(a->dtype))
        return ds_cuda_refuse("matmul", a->dtype);
    DS_TRY(ds_product_of(&p, y, a, b));
    p.alpha = alpha, p.beta = beta;
    return gemm_run("matmul", &p);
}
