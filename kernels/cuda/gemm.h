/* gemm.h - matrix products on plain device memory, for the kernels that are built on them. */
#ifndef DS_CUDA_GEMM_H
#define DS_CUDA_GEMM_H

#include "kernels/cuda/device.h"

#define GEMM_BATCH (DS_MAX_DIM - 2)

typedef struct gemm_matrix {
    char *data;
    int64_t row, col; /* elements from one row, one column to the next */
    int64_t batch[GEMM_BATCH];
    int dtype;
} gemm_matrix;

/* y = alpha a b + beta y: y [batch.., m, n], a [batch.., m, k], b [batch.., k, n]. Any strides; a batch
 * stride of 0 repeats a or b. a and b have one dtype of f32, bf16 and f16, y the same or f32. Where beta
 * is 0, what y held is not read.
 * [bias] [n], dense, in y's dtype, is added. With [aux], of y's dtype, dense: the sum goes there, and
 * y becomes gelu_tanh of it. Both only without batches. */
typedef struct gemm {
    gemm_matrix y, a, b;
    int64_t m, n, k;
    int64_t batch[GEMM_BATCH];
    int batches;
    double alpha, beta;
    const void *bias;
    void *aux;
} gemm;

/* 0, or a negative code. DS_ENOSYS, without a message, and only with bias or aux: that has to be done
 * in a pass of its own. `name` is the operation's, for messages. */
int gemm_run(const char *name, const gemm *product);

static inline gemm_matrix gemm_matrix_of(const void *data, int64_t row, int64_t col, int dtype)
{
    gemm_matrix m = {(char *)data, row, col, {0}, dtype};

    return m;
}

/* x [.., cols] as a matrix of its rows: two dimensions with any strides, else dense. DS_EINVAL, with
 * `name` and `which` in the message: it is neither. */
int gemm_rows_of(gemm_matrix *out, int64_t *rows, const ds_tensor *x, const char *name,
                 const char *which);

#endif
