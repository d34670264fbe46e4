/* device.cu - opens the GPU, gives its memory, waits for it, and tells what went wrong on it. */
#include "kernels/cuda/device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/abi.h"
#include "kernels/cuda/cudnn.h"
#include "kernels/cuda/table.h"

ds_cuda_device ds_cuda;

/* ---- errors */

int ds_cuda_check(cudaError_t code, const char *what)
{
    if (code == cudaSuccess)
        return 0;
    cudaGetLastError(); /* it is told now, and not again */
    if (code == cudaErrorMemoryAllocation)
        return ds_fail(DS_ENOMEM, "out of memory on the GPU");
    return ds_fail(DS_EIO, "%s: CUDA: %s (%s)%s", what, cudaGetErrorString(code),
                   cudaGetErrorName(code),
                   ds_cuda.sync ? ""
                                : "; kernels run later than they are called: DS_SYNC=1 tells which "
                                  "one it was");
}

int ds_cuda_take_fault(void)
{
    volatile ds_cuda_fault *f = ds_cuda.fault;
    const char *name;
    long long value, bound;

    if (!f->set)
        return 0;
    name = f->name;
    value = f->value;
    bound = f->bound;
    f->set = 0;
    return ds_fail(DS_ERANGE, "%s: index %lld is not in 0 to %lld%s", name, value, bound - 1,
                   ds_cuda.sync ? ""
                                : "; it was used before this line: DS_SYNC=1 tells by which one");
}

int ds_cuda_not_captured(const char *what)
{
    return ds_cuda.capturing ? ds_fail(DS_EINVAL,
                                       "%s: it waits for the GPU, or moves memory of the "
                                       "host; a CUDA graph cannot record that",
                                       what)
                             : 0;
}

int ds_cuda_wait(const char *what)
{
    DS_TRY(ds_cuda_not_captured(what));
    ds_cuda.counters.waits++;
    ds_cuda.waiting = 1;
    cudaError_t code = cudaStreamSynchronize(ds_cuda.stream);
    ds_cuda.waiting = 0;
    int rc = ds_cuda_check(code, what);

    if (rc == 0 && ds_cuda.ended)
        rc = ds_fail(DS_ECOMM, "%s: the job was ended while this rank waited for others", what);
    return rc < 0 ? rc : ds_cuda_take_fault();
}

int ds_cuda_launched(const char *name)
{
    ds_cuda.counters.launches++;
    cudaError_t code = cudaGetLastError();

    if (code != cudaSuccess)
        return ds_cuda_check(code, name);
    return ds_cuda.sync && !ds_cuda.capturing ? ds_cuda_wait(name) : 0;
}

/* ---- memory */

static int memory_take(void **out, size_t bytes)
{
    ds_cuda.counters.takes++;
    return ds_cuda_check(cudaMalloc(out, bytes), "memory");
}

/* Kernels that use it may still be queued: cudaFree waits for them. */
static void memory_give(void *data, size_t bytes)
{
    (void)bytes;
    ds_cuda.counters.gives++;
    ds_cuda.waiting = 1;
    cudaFree(data);
    ds_cuda.waiting = 0;
}

static int pinned_take(void **out, size_t bytes)
{
    return ds_cuda_check(cudaHostAlloc(out, bytes, cudaHostAllocDefault), "page-locked memory");
}

static void pinned_give(void *data)
{
    cudaFreeHost(data);
}

/* Graphs were recorded with the addresses of their time: scratch memory that grows leaves the old blocks
 * to them, until the last graph has gone. */
static void scratch_give(void *data, size_t bytes)
{
    static struct old {
        void *data;
        size_t bytes;
        struct old *next;
    } * kept;
    struct old *o;

    if (data && (ds_cuda.graphs || ds_cuda.capturing)) {
        o = (struct old *)malloc(sizeof *o);
        if (!o)
            return; /* the block stays, and nobody has it */
        *o = {data, bytes, kept};
        kept = o;
        return;
    }
    while ((o = kept)) {
        kept = o->next;
        memory_give(o->data, o->bytes);
        free(o);
    }
    if (data)
        memory_give(data, bytes);
}

/* A block is larger than what was ever asked of it: on a simulated device the rest is out of bounds. */
static void *scratch_asked(void *data, size_t bytes)
{
#ifdef DS_SIMT
    simt::limit(data, bytes);
#endif
    (void)bytes;
    return data;
}

void *ds_cuda_scratch(int slot, size_t bytes)
{
    static struct {
        void *data;
        size_t bytes;
    } blocks[DS_CUDA_SLOTS];
    const size_t most = (size_t)256 << 20; /* what a block grows by at a time */
    size_t size = (size_t)1 << 20;

    if (blocks[slot].data && bytes <= blocks[slot].bytes)
        return scratch_asked(blocks[slot].data, bytes);
    while (size < bytes && size < most)
        size *= 2;
    if (size < bytes)
        size = (bytes + most - 1) / most * most;
    scratch_give(blocks[slot].data, blocks[slot].bytes);
    ds_cuda.counters.scratch -= (int64_t)blocks[slot].bytes;
    blocks[slot].data = NULL;
    blocks[slot].bytes = 0;
    if (memory_take(&blocks[slot].data, size) < 0)
        return NULL;
    blocks[slot].bytes = size;
    ds_cuda.counters.scratch += (int64_t)size;
    return scratch_asked(blocks[slot].data, bytes);
}

/* ---- transfers */

/* From memory that is not page-locked CUDA takes a copy before it returns, if need be when all before it
 * is done. */
static int upload(void *to, const void *from, size_t bytes)
{
    DS_TRY(ds_cuda_not_captured("to the GPU"));
    ds_cuda.counters.uploads++;
    ds_cuda.waiting = 1;
    cudaError_t code = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, ds_cuda.stream);
    ds_cuda.waiting = 0;
    return ds_cuda_check(code, "to the GPU");
}

static int download(void *to, const void *from, size_t bytes)
{
    DS_TRY(ds_cuda_not_captured("from the GPU"));
    ds_cuda.counters.downloads++;
    ds_cuda.waiting = 1;
    cudaError_t code = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, ds_cuda.stream);
    ds_cuda.waiting = 0;
    DS_TRY(ds_cuda_check(code, "from the GPU"));
    return ds_cuda_wait("from the GPU");
}

static int synchronize(void)
{
    DS_TRY(ds_cuda_wait("synchronize"));
    ds_cuda.waiting = 1;
    cudaError_t code = cudaDeviceSynchronize();
    ds_cuda.waiting = 0;
    return ds_cuda_check(code, "synchronize");
}

/* ---- opening */

static void *stream(void)
{
    return ds_cuda.stream;
}

static void describe(char *text, size_t bytes)
{
    cudaDeviceProp p;
    char cudnn[256];

    ds_cudnn_describe(cudnn, sizeof cudnn);
    if (cudaGetDeviceProperties(&p, ds_cuda.index) != cudaSuccess) {
        snprintf(text, bytes, "CUDA device %d; %s", ds_cuda.index, cudnn);
        return;
    }
    snprintf(text, bytes, "%s, %.0f GiB, %d processors, compute capability %d.%d; %s", p.name,
             (double)p.totalGlobalMem / (1 << 30), p.multiProcessorCount, p.major, p.minor, cudnn);
}

/* Which of the devices that CUDA shows is this rank's. */
static int choose(int *index, int local_rank, int local_size)
{
    const char *share = getenv("DS_SHARE_GPU"), *visible = getenv("CUDA_VISIBLE_DEVICES");
    int count = 0, driver = 0;
    cudaError_t code = cudaGetDeviceCount(&count);

    if (code == cudaErrorInsufficientDriver) {
        cudaDriverGetVersion(&driver);
        if (driver == 0)
            return ds_fail(DS_ENOENT, "there is no NVIDIA driver here (libcuda.so.1)");
        return ds_fail(
            DS_ENOENT, "the NVIDIA driver is for CUDA up to %d.%d, and this build needs %d.%d",
            driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    }
    if (code == cudaErrorNoDevice || (code == cudaSuccess && count == 0))
        return ds_fail(DS_ENOENT, "CUDA sees no GPU%s%s%s",
                       visible ? " (CUDA_VISIBLE_DEVICES is \"" : "", visible ? visible : "",
                       visible ? "\")" : "");
    DS_TRY(ds_cuda_check(code, "opening the GPU"));
    if (local_size > count && !(share && !strcmp(share, "1")))
        return ds_fail(DS_EINVAL,
                       "this host runs %d ranks and CUDA sees %d GPU%s: each rank needs one of its "
                       "own (DS_SHARE_GPU=1 lets ranks share, for tests)",
                       local_size, count, count == 1 ? "" : "s");
    *index = local_rank % count;
    return 0;
}

static ds_backend backend;

static int open_device(int local_rank, int local_size)
{
    const char *sync = getenv("DS_SYNC");

    DS_TRY(choose(&ds_cuda.index, local_rank, local_size));
    DS_TRY(ds_cuda_check(cudaSetDevice(ds_cuda.index), "opening the GPU"));
    DS_TRY(ds_cuda_check(
        cudaDeviceGetAttribute(&ds_cuda.processors, cudaDevAttrMultiProcessorCount, ds_cuda.index),
        "opening the GPU"));
    DS_TRY(ds_cuda_check(cudaDeviceGetAttribute(&ds_cuda.shared_most,
                                                cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                                ds_cuda.index),
                         "opening the GPU"));
    DS_TRY(ds_cuda_check(cudaStreamCreateWithFlags(&ds_cuda.stream, cudaStreamNonBlocking),
                         "opening the GPU"));
    DS_TRY(ds_cuda_check(cudaStreamCreateWithFlags(&ds_cuda.copies, cudaStreamNonBlocking),
                         "opening the GPU"));
    DS_TRY(ds_cuda_check(cudaHostAlloc((void **)&ds_cuda.fault, sizeof *ds_cuda.fault,
                                       cudaHostAllocMapped | cudaHostAllocPortable),
                         "opening the GPU"));
    memset(ds_cuda.fault, 0, sizeof *ds_cuda.fault);
    ds_cuda.sync = sync && *sync && strcmp(sync, "0");
    backend.name = "cuda";
#ifdef DS_SIMT
    backend.at_once = simt::at_once();
#endif
    ds_cuda_fill_table(&backend.ops);
    backend.memory_take = memory_take;
    backend.memory_give = memory_give;
    backend.synchronize = synchronize;
    backend.upload = upload;
    backend.download = download;
    backend.pinned_take = pinned_take;
    backend.pinned_give = pinned_give;
    ds_cuda_fill_events(&backend);
    ds_cuda_fill_graphs(&backend);
    backend.stream = stream;
    backend.describe = describe;
    backend.choices = ds_cuda_choices;
    backend.choose = ds_cuda_choose;
    backend.counters = &ds_cuda.counters;
    return 0;
}

extern "C" const ds_backend *ds_cuda_backend(uint64_t abi, int local_rank, int local_size)
{
    if (abi != ds_backend_abi()) {
        ds_fail(DS_EINVAL, "the CUDA backend (libds_cuda.so) is of another build than dsrun; build "
                           "or install both together");
        return NULL;
    }
    return open_device(local_rank, local_size) == 0 ? &backend : NULL;
}
