/* device.h - the GPU of this process: its streams, scratch memory, and how errors come back.
 *
 * All kernels run in one stream, in the order of the calls: so memory that a tensor gives back may be
 * handed to the next one at once, and no kernel waits for another by itself. A kernel returns when it
 * is queued. What goes wrong on the device is found later: a wrong index is written to a record in host
 * memory and told by the next call that waits for the device; DS_SYNC=1 waits after every kernel, so
 * that the message comes from the line at fault.
 */
#ifndef DS_CUDA_DEVICE_H
#define DS_CUDA_DEVICE_H

#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#include "kernels/backend.h"
#include "kernels/checks.h"
#include "kernels/error.h"
#ifdef __cplusplus
}
#endif
#include "kernels/dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a kernel found wrong with its data; the first one counts. Host memory that the device sees. */
typedef struct ds_cuda_fault {
    int set;                /* 1: somebody writes the rest; 2: it is written */
    const char *name;       /* of the kernel, in host memory */
    long long value, bound; /* an index, and how many there are */
} ds_cuda_fault;

typedef struct ds_cuda_device {
    int index;           /* CUDA's number of the device */
    int sync;            /* DS_SYNC=1: wait after every kernel */
    int processors;      /* streaming multiprocessors */
    int shared_most;     /* bytes of shared memory that a block may have */
    cudaStream_t stream; /* of all kernels */
    cudaStream_t copies; /* of transfers that overlap with them */
    int capturing;       /* a graph is being recorded: nothing is done, and nobody may wait */
    int graphs;          /* that live: they keep the addresses of scratch memory */
    ds_cuda_fault *fault;
    volatile int
        ended; /* the job: what ranks exchange is not what it should be (comm_nccl_link.c) */
    volatile int waiting; /* the host, for the device: it is where that is (comm_nccl_place.c) */
    ds_device_counters counters;
} ds_cuda_device;

extern ds_cuda_device ds_cuda;

/* 0, or DS_ENOMEM or DS_EIO with what CUDA says: "matmul: CUDA: an illegal memory access". */
int ds_cuda_check(cudaError_t code, const char *what);

/* After every launch: counts it, and with DS_SYNC=1 waits for it. */
int ds_cuda_launched(const char *name);

/* Waits for the stream; counted. A fault that a kernel left becomes the error. */
int ds_cuda_wait(const char *what);

/* 0; while a graph is recorded DS_EINVAL, which says that `what` cannot be part of one. */
int ds_cuda_not_captured(const char *what);

/* What a kernel left in the record of faults, as an error; it is empty again afterwards. */
int ds_cuda_take_fault(void);

/* The backend's parts: events and transfers (events.cu), graphs (graph.cu). */
void ds_cuda_fill_events(ds_backend *backend);
void ds_cuda_fill_graphs(ds_backend *backend);

/* backend.h's choices and choose (gemm_choices.cu). */
const char *ds_cuda_choices(void);
int ds_cuda_choose(const char *text);

/* Device memory for a kernel's own use, until the next kernel of this stream that asks for the same
 * slot; at least `bytes`, aligned to 256, contents undefined. It only grows. NULL: out of memory. */
enum ds_cuda_slot {
    DS_CUDA_PARTIAL,   /* partial results of blocks */
    DS_CUDA_WORKSPACE, /* of cuBLASLt and cuDNN */
    DS_CUDA_A,         /* operands in another dtype or order, and results */
    DS_CUDA_B,
    DS_CUDA_C,
    DS_CUDA_SLOTS
};
void *ds_cuda_scratch(int slot, size_t bytes);

#ifdef __cplusplus
}
#endif

#endif
