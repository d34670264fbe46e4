/* backend.h - what a device offers: memory and kernels.
 *
 * One struct of function pointers a backend, made from ops.def. A kernel that a backend lacks is an
 * empty slot: Lua says "rmsnorm has no cuda kernel", the linker says nothing.
 */
#ifndef DS_BACKEND_H
#define DS_BACKEND_H

#include <stddef.h>

#include "error.h"
#include "tensor.h"

typedef struct ds_ops {
#define C const ds_tensor *
#define T ds_tensor *
#define DS_UNARY(name, saved)                                                                      \
    int (*name)(T y, C x);                                                                         \
    int (*name##_backward)(T dx, C dy, C s);
#define DS_BINARY(name)                                                                            \
    int (*name)(T y, C a, C b);                                                                    \
    int (*name##_scalar)(T y, C x, double s, int flip);
#define DS_COMPARE(name)                                                                           \
    int (*name)(T y, C a, C b);                                                                    \
    int (*name##_scalar)(T y, C x, double s, int flip);
#define DS_KERNEL(name, signature) int(*name) signature;
#include "ops.def"
#undef C
#undef T
} ds_ops;

enum { DS_STREAM_KERNELS, DS_STREAM_COPIES };

typedef struct ds_backend {
    const char *name; /* "cpu", "cuda" */
    int at_once; /* 1: its memory is the host's, and what is asked for is done when the call returns */
    ds_ops ops;
    /* Memory of this device, not zeroed; the caching allocator above calls it rarely. */
    int (*memory_take)(void **out, size_t bytes);
    void (*memory_give)(void *data, size_t bytes);
    /* Waits for all that was asked of the device. */
    int (*synchronize)(void);
    /* Of a device with memory of its own; NULL on the CPU. upload: `from` may change when it returns,
     * the bytes are there for all kernels that are called later. download: after all kernels called
     * before; they are there when it returns. */
    int (*upload)(void *to, const void *from, size_t bytes);
    int (*download)(void *to, const void *from, size_t bytes);
    /* Page-locked host memory, from which transfers are fastest. */
    int (*pinned_take)(void **out, size_t bytes);
    void (*pinned_give)(void *data);
    /* Events: moments in one of the device's streams, DS_STREAM_KERNELS or DS_STREAM_COPIES. record sets
     * one to after all that was asked of the stream so far; done: 1 if the device has got there, 0 if
     * not yet; wait: the host waits for it; before: what is asked of the stream from now on waits. */
    int (*event_make)(void **out);
    void (*event_free)(void *event);
    int (*event_record)(void *event, int stream);
    int (*event_done)(void *event);
    int (*event_wait)(void *event);
    int (*event_before)(void *event, int stream);
    /* From (up 0) or to (up 1) the device, in a stream; the host's memory is page-locked and stays as it
     * is until an event that is recorded later. */
    int (*copy_later)(void *to, const void *from, size_t bytes, int up, int stream);
    /* From begin to end what is asked of the kernels' stream is recorded instead of done; what would
     * make the host wait is an error then. end: *out is the record (out NULL: it is dropped). run does all
     * of it again. */
    int (*graph_begin)(void);
    int (*graph_end)(void **out);
    int (*graph_run)(void *graph);
    void (*graph_free)(void *graph);
    void *(*stream)(void); /* of all kernels, a cudaStream_t; NULL on the CPU */
    void (*describe)(char *text, size_t bytes); /* "NVIDIA H200, 140 GiB, …" */
    /* Choices between algorithms whose sums differ by rounding, where they depend on more than a
     * kernel's arguments; NULL on the CPU. choices: those of this process as text, valid until the next
     * call; NULL: out of host memory. choose: such a text's are taken from now on, where they are of this
     * device and its libraries; 1 if that changes what was done before, 0 if not. */
    const char *(*choices)(void);
    int (*choose)(const char *text);
    const ds_device_counters *counters;
} ds_backend;

/* What a plugin (libds_cuda.so) offers under this name: the backend of this rank's device; NULL, with
 * ds_error(), where there is no driver or no device for it, or where the program's number (abi.h) is not
 * its own. local_rank of local_size: among the ranks of this host. */
typedef const ds_backend *ds_backend_open(uint64_t abi, int local_rank, int local_size);
#define DS_CUDA_OPEN "ds_cuda_backend"

/* The CPU backend at the chosen level. Levels: "x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16",
 * or "portable" elsewhere. `level` NULL: the highest that this processor has, or a lower one that
 * DS_CPU_LEVEL names. NULL on a level that the processor lacks or does not exist (ds_error() says which
 * there are). The first call decides, later calls return the same. */
const ds_backend *ds_cpu_backend(const char *level);

/* The level chosen, for `dsrun env`; levels this machine has, lowest first, NULL at the end. */
const char *ds_cpu_level(void);
const char *const *ds_cpu_levels(void);

#endif
