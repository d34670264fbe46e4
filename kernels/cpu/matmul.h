/* matmul.h - matrix products on plain memory, for the kernels that are built on them. */
#ifndef DS_CPU_MATMUL_H
#define DS_CPU_MATMUL_H

#include "kernels/cpu/level.h"

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

#define ds_product_run DS_CPU(product_run)
int ds_product_run(const ds_product *product);

/* A dense row-major matrix, or one that is its transpose. */
static inline ds_matrix ds_matrix_of(const void *data, int64_t row, int64_t col, int dtype)
{
    return (ds_matrix){.data = (char *)data, .row = row, .col = col, .dtype = dtype};
}

#endif
