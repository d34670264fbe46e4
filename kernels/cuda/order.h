/* order.h - positions sorted by key, and running counts: what indexing is made deterministic with. */
#ifndef DS_CUDA_ORDER_H
#define DS_CUDA_ORDER_H

#include <stdint.h>

/* Room for n < 2^31 keys and positions, twice, in the scratch slot DS_CUDA_A. The caller writes the
 * keys, and at[i] = i, into `from`. */
struct ds_cuda_order {
    uint64_t *keys;
    uint32_t *at;
};
int ds_cuda_order_room(ds_cuda_order *from, ds_cuda_order *to, int64_t n);

/* Sorts by the lowest `bits` bits of the keys; equal ones stay in order. The result is in *from. Uses
 * DS_CUDA_B. */
int ds_cuda_order_sort(const char *name, ds_cuda_order *from, ds_cuda_order *to, int64_t n,
                       int bits);

/* Each of `rows` rows of `n` counts becomes the sums of those before it; total[row] the sum of all. */
int ds_cuda_scan(const char *name, int64_t *counts, int64_t *total, int64_t n, int rows);

#endif
