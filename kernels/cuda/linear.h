/* linear.h - passes over the results of products. */
#ifndef DS_CUDA_LINEAR_H
#define DS_CUDA_LINEAR_H

#include "kernels/cuda/device.h"

/* y = act(h + bias), [slope] = act′. h and y: [rows, cols], `row` elements from one to the next; slope
 * without gaps; [bias]: [cols] f32. y or slope may be h. */
typedef struct activation_pass {
    const void *h, *bias;
    void *y, *slope;
    int64_t rows, cols, row;
    int dtype, activation;
} activation_pass;

int activation_run(const char *name, const activation_pass *pass);

#endif
