/* index.h - what index.c shares: indices read and checked, and sums of rows by index. */
#ifndef DS_CPU_INDEX_H
#define DS_CPU_INDEX_H

#include "kernels/cpu/walk.h"

/* *out: the indices of a tensor, whose dtype was checked, as a dense one of i64 in row-major order, each checked to be in
 * [0, bound). free(out->data) afterwards. DS_ERANGE names the first one that is not. */
int DS_CPU(indices_load)(ds_tensor *out, const char *name, const ds_tensor *index, int64_t bound);

/* y = x at `index` (dense i64, checked) along the dimension where x has stride `step`; x is given
 * with size 1 and stride 0 there; the index broadcasts to y. */
int DS_CPU(select_run)(const char *name, ds_tensor *y, const ds_tensor *x, const ds_tensor *index,
                       int64_t step);

/* y[…, v, …] += the sum of all x[…, i, …] with index[i] = v, in order of i, in f32 (in f64 for f64
 * and integers) and rounded once. y and x are given as slices at position 0, equally shaped; y_step
 * leads to y's next one, offset[i] to x's i-th, in elements. clear: y is set, rows without an index
 * to 0. */
int DS_CPU(sum_rows)(const char *name, ds_tensor *y, int64_t y_step, int64_t y_size,
                     const ds_tensor *x, const int64_t *offset, const int64_t *index, int64_t n,
                     int clear);

#endif
