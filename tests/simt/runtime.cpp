/* runtime.cpp - the part of CUDA's runtime that the backend calls, on a machine without a GPU: all work
 * is done at once, in the order of the calls, unless a stream is being captured.
 *
 * Device memory is host memory, filled with bytes that are NaN, so that what nobody wrote shows.
 * DS_SIMT_DEVICES: how many devices there are (1). DS_SIMT_MEMORY: bytes that each has (8 GiB).
 */
#include "simt.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <map>
#include <vector>

namespace simt
{

void launch_now(const char *name, dim3 grid, dim3 block, size_t shared, std::function<void()> body);

static std::vector<std::function<void()>> *capturing;
static cudaError_t last = cudaSuccess;
static std::map<void *, size_t> blocks;
static size_t taken;

/* Now, or when the graph is launched. */
static void run(std::function<void()> work)
{
    if (capturing)
        capturing->push_back(work);
    else
        work();
}

/* For libraries that stand in for NVIDIA's. */
void enqueue(std::function<void()> work)
{
    run(work);
}

void launch(const char *name, dim3 grid, dim3 block, size_t shared, std::function<void()> body)
{
    run([=] { launch_now(name, grid, block, shared, body); });
}

static cudaError_t fails(cudaError_t code)
{
    last = code;
    return code;
}

static int64_t number(const char *name, int64_t otherwise)
{
    const char *text = getenv(name);
    return text ? atoll(text) : otherwise;
}

} // namespace simt

using namespace simt;

extern "C" {

cudaError_t cudaGetDeviceCount(int *n)
{
    *n = (int)number("DS_SIMT_DEVICES", 1);
    return *n ? cudaSuccess : fails(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int)
{
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *d)
{
    *d = 0;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *v)
{
    *v = 13000;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *v)
{
    *v = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int)
{
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "simulated GPU");
    p->totalGlobalMem = (size_t)number("DS_SIMT_MEMORY", (int64_t)8 << 30);
    p->multiProcessorCount = 4;
    p->major = 9;
    p->minor = 0;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->l2CacheSize = 1 << 20;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int)
{
    *value = what == cudaDevAttrMultiProcessorCount                ? 4
             : what == cudaDevAttrMaxSharedMemoryPerBlockOptin     ? 227 << 10
             : what == cudaDevAttrComputeCapabilityMajor           ? 9
             : what == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? 228 << 10
                                                                   : 0;
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    *total = (size_t)number("DS_SIMT_MEMORY", (int64_t)8 << 30);
    *free_bytes = *total > taken ? *total - taken : 0;
    return cudaSuccess;
}
cudaError_t cudaGetLastError()
{
    cudaError_t code = last;
    last = cudaSuccess;
    return code;
}
cudaError_t cudaPeekAtLastError()
{
    return last;
}
const char *cudaGetErrorString(cudaError_t code)
{
    return code == cudaErrorMemoryAllocation ? "out of memory"
                                             : "an error of the simulated runtime";
}
const char *cudaGetErrorName(cudaError_t code)
{
    return code == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}

/* ---- memory */

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    if (capturing)
        return fails(cudaErrorStreamCaptureUnsupported);
    if (taken + bytes > (size_t)number("DS_SIMT_MEMORY", (int64_t)8 << 30) ||
        posix_memalign(out, 512, bytes ? bytes : 1) != 0)
        return fails(cudaErrorMemoryAllocation);
    memset(*out, 0xff, bytes);
    blocks[*out] = bytes;
    taken += bytes;
    return cudaSuccess;
}
cudaError_t cudaFree(void *p)
{
    if (p) {
        taken -= blocks[p];
        blocks.erase(p);
        free(p);
    }
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned)
{
    return posix_memalign(out, 4096, bytes ? bytes : 1) == 0 ? cudaSuccess
                                                             : fails(cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocHost(void **out, size_t bytes)
{
    return cudaHostAlloc(out, bytes, 0);
}
cudaError_t cudaFreeHost(void *p)
{
    free(p);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t)
{
    run([=] { memmove(to, from, bytes); });
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t tp, const void *from, size_t fp, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t)
{
    run([=] {
        for (size_t i = 0; i < height; i++)
            memmove((char *)to + i * tp, (const char *)from + i * fp, width);
    });
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t)
{
    run([=] { memset(p, value, bytes); });
    return cudaSuccess;
}

/* ---- streams and events */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned)
{
    *out = (cudaStream_t)malloc(1);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int)
{
    return cudaStreamCreateWithFlags(out, flags);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0, *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    free(s);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    return capturing ? fails(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t)
{
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize()
{
    return capturing ? fails(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned)
{
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned)
{
    *out = (cudaEvent_t)calloc(1, sizeof(double));
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    free(e);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    *(double *)e = (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t)
{
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t)
{
    return capturing ? fails(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b)
{
    *ms = (float)(*(double *)b - *(double *)a);
    return cudaSuccess;
}

/* ---- kernels */

cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int)
{
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *, int,
                                                                   size_t, unsigned)
{
    *n = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *, int, size_t)
{
    *n = 2;
    return cudaSuccess;
}

/* ---- graphs: a list of what was asked for while a stream was captured */

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode)
{
    if (capturing)
        return fails(cudaErrorIllegalState);
    capturing = new std::vector<std::function<void()>>;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *out)
{
    if (!capturing)
        return fails(cudaErrorIllegalState);
    *out = (cudaGraph_t)capturing;
    capturing = NULL;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *out)
{
    *out = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t g, unsigned long long)
{
    *out = (cudaGraphExec_t) new std::vector<std::function<void()>>(
        *(std::vector<std::function<void()>> *)g);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t)
{
    for (auto &work : *(std::vector<std::function<void()>> *)g)
        work();
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g)
{
    delete (std::vector<std::function<void()>> *)g;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g)
{
    delete (std::vector<std::function<void()>> *)g;
    return cudaSuccess;
}

} // extern "C"
