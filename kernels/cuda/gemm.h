/* gemm.h - matrix products on plain device memory, for the kernels that are built on them. */
#ifndef DS_CUDA_GEMM_H
#define DS_CUDA_GEMM_H

#include "kernels/cuda/device.h"
#include "kernels/product.h"

/* Of f32, bf16 and f16. With [aux], of y's dtype, dense: the sum goes there, and y becomes gelu_tanh of
 * it. That and a bias only without batches. */
struct gemm : ds_product {
    void *aux;
};

/* 0, or a negative code. DS_ENOSYS, without a message, and only with bias or aux: that has to be done
 * in a pass of its own. `name` is the operation's, for messages. */
int gemm_run(const char *name, const gemm *product);

/* x [.., cols] as a matrix of its rows: two dimensions with any strides, else dense. DS_EINVAL, with
 * `name` and `which` in the message: it is neither. */
int gemm_rows_of(ds_matrix *out, int64_t *rows, const ds_tensor *x, const char *name,
                 const char *which);

#endif
