/* gemm.h - matrix products on plain device memory, for the kernels that are built on them. */
#ifndef DS_CUDA_GEMM_H
#define DS_CUDA_GEMM_H

#include "kernels/cuda/device.h"
#include "kernels/product.h"

/* Of f32, bf16 and f16. What cuBLASLt does beside the product, all of it only without batches; vectors
 * and matrices are dense, of y's dtype:
 *   [bias]    is added
 *   [aux]     gets what would be y, and y becomes gelu_tanh of it
 *   [before]  y is multiplied by gelu_tanh′(before)
 *   [sums]    gets y's sums by columns with `before`, a's by rows without; f32 sums, rounded once */
struct gemm : ds_product {
    void *aux;
    const void *before;
    void *sums;
};

/* 0, or a negative code. DS_ENOSYS, without a message, and only with one of those: nothing was done, as
 * that has to be a pass of its own. `name` is the operation's, for messages. */
int gemm_run(const char *name, const gemm *product);

/* x [.., cols] as a matrix of its rows: two dimensions with any strides, else dense. DS_EINVAL, with
 * `name` and `which` in the message: it is neither. */
int gemm_rows_of(ds_matrix *out, int64_t *rows, const ds_tensor *x, const char *name,
                 const char *which);

#endif
