/* dnnl.h - the one door to oneDNN: matrix products by cached primitives.
 *
 * oneDNN compiles a primitive for a shape, its strides and dtypes; that takes 0.4 ms, so primitives
 * are kept and found again by their key. Nothing else in the project includes oneDNN's headers.
 */
#ifndef DS_CPU_DNNL_H
#define DS_CPU_DNNL_H

#include <stdint.h>

#include "kernels/error.h"
#include "kernels/scratch.h"
#include "kernels/tensor.h"

#define DS_DNNL_BATCH 2 /* batch dimensions that one primitive can have */

/* What a primitive is compiled for: c = alpha a b + beta c (+ bias) with a [batch.., m, k],
 * b [batch.., k, n], c [batch.., m, n] whose columns lie next to each other. Strides in elements. A
 * batch stride of 0 repeats the matrix. Keys are compared as bytes: start from a zeroed one. */
typedef struct ds_dnnl_key {
    int64_t m, n, k;
    int64_t a_row, a_col, b_row, b_col, c_row;
    int64_t batch[DS_DNNL_BATCH];
    int64_t a_batch[DS_DNNL_BATCH], b_batch[DS_DNNL_BATCH], c_batch[DS_DNNL_BATCH];
    float alpha, beta;
    uint8_t a_dtype, b_dtype, c_dtype; /* DS_F32, DS_BF16 */
    uint8_t batches;                   /* how many of batch[] are used */
    uint8_t bias;                      /* 1: + bias [n] in c's dtype */
    uint8_t reserved[3];
} ds_dnnl_key;

/* Runs the product. DS_ENOSYS, without a message: oneDNN has no fast kernel for this key (none, or
 * one that is slower than going through f32); nothing was written, take another way. */
int ds_dnnl_matmul(void *c, const void *a, const void *b, const void *bias, const ds_dnnl_key *key);

/* Whether this processor (as limited) multiplies bf16 without going through f32. */
int ds_dnnl_has_bf16(void);

/* oneDNN's name of the kernel behind a key ("brg:avx512_core"), NULL where there is no fast one. */
const char *ds_dnnl_kernel(const ds_dnnl_key *key);

/* Keeps oneDNN to the instructions of a level of this project: "v2", "v3", "v4", "v4bf16"
 * ("x86-64-v4" and so on will do). Only before the first product; DS_EINVAL later, and for an
 * unknown name. */
int ds_dnnl_limit(const char *level);

/* Primitives kept: when there are more, the one used longest ago goes. Counters for tests. */
typedef struct ds_dnnl_counters {
    int64_t created, evicted, kept;
} ds_dnnl_counters;
void ds_dnnl_cache_limit(int entries); /* at least 1 */
ds_dnnl_counters ds_dnnl_count(void);

/* The library's version, "2.6.3", for `dsrun env`. */
const char *ds_dnnl_version(void);

#endif
