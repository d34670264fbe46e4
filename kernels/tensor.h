/* tensor.h - the tensor as kernels see it: memory with a shape, strides and a dtype.
 *
 * Kernels read and write `data`; who owns the memory (`storage`) is the runner's affair.
 */
#ifndef DS_TENSOR_H
#define DS_TENSOR_H

#include <stdint.h>

#include "headers.h"

#define DS_MAX_DIM 8

/* ds.h: begin ffi */
enum ds_dtype { DS_F32, DS_BF16, DS_F16, DS_F64, DS_I64, DS_I32, DS_U8, DS_BOOL, DS_DTYPES };
enum ds_device { DS_CPU, DS_CUDA, DS_META };
enum ds_reduction { DS_SUM, DS_MEAN, DS_MAX, DS_MIN, DS_REDUCTIONS }; /* of several ranks */

typedef struct ds_storage ds_storage;

typedef struct ds_tensor {
    void *data;          /* first element; NULL: released, on the meta device, or sharded away */
    ds_storage *storage; /* one reference is held; NULL when released */
    int64_t numel;
    int64_t shape[8];  /* DS_MAX_DIM */
    int64_t stride[8]; /* in elements; 0 for an expanded dimension */
    int32_t ndim;
    int32_t dtype;  /* enum ds_dtype */
    int32_t device; /* enum ds_device */
    int32_t dense;  /* 1: row-major without gaps */
} ds_tensor;

/* What a device with memory of its own was asked for since the start; all 0 on the CPU. */
typedef struct ds_device_counters {
    int64_t launches;     /* kernels, of ours and of libraries */
    int64_t waits;        /* times that the host waited for all that was asked of the device */
    int64_t event_waits;  /* for an event that the device had not reached yet */
    int64_t takes, gives; /* of memory, from and to the system */
    int64_t uploads, downloads; /* transfers from and to the host */
    int64_t scratch;            /* bytes that kernels keep for themselves now */
    int64_t captures, replays;  /* graphs of launches that were recorded, and done again */
    int64_t registered;         /* bytes that other ranks' GPUs may read and write now */
    int64_t exchanges;          /* collectives in such memory */
} ds_device_counters;
/* ds.h: end ffi */

#endif
