/* runtime.cpp - the part of CUDA's runtime that the backend calls, on a machine without a GPU: all work
 * is done at once, in the order of the calls, unless a stream is being captured.
 *
 * A stream with a priority (the one that ranks reduce in) does its work as late as CUDA allows: when
 * another stream or the host waits for an event behind it. So who reads a result without waiting reads
 * what was there before, and who writes to what is still being sent, sends that. DS_SIMT_LATE=kernels:
 * the streams without a priority are late instead, so that what works beside them must wait for them;
 * =copies: all but the first stream, which is the kernels'; =all: all streams are (a rank that waits for
 * another on the CPU then does nothing). Work is done by the thread that made the streams; others only
 * see how far it is.
 *
 * Device memory is host memory, filled with bytes that are NaN, so that what nobody wrote shows.
 * DS_SIMT_DEVICES: how many devices there are (1). DS_SIMT_MEMORY: bytes that each has (8 GiB).
 */
#include "simt.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <sanitizer/asan_interface.h> /* nothing unless the sanitizer is on */

#include <atomic>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace simt
{

void launch_now(const char *name, dim3 grid, dim3 block, size_t shared, std::function<void()> body);

static std::vector<std::function<void()>> *capturing;
static cudaStreamCaptureMode capture_mode;
static cudaError_t last = cudaSuccess;
struct block {
    size_t bytes, limit; /* limit 0: none */
};
static std::map<void *, block> blocks, pinned;
static size_t taken;

/* ---- streams */

struct stream {
    bool late;
    std::deque<std::function<bool()>> work; /* of a late one, in order; true: it is done */
    uint64_t queued;
    std::atomic<uint64_t> done;
};
struct event {
    double ms;
    stream *in; /* NULL, or a late one, up to whose work number it reaches */
    uint64_t number;
};
static std::set<stream *> late_streams;
static pthread_t worker; /* the thread that does the work */

static bool advance(stream *s)
{
    if (s->work.empty() || !s->work.front()())
        return false;
    s->work.pop_front();
    s->done++;
    return true;
}

/* Where that has to wait for another process the other streams go on. */
static void run_until(stream *s, uint64_t number)
{
    while (s && s->done < number) {
        bool some = advance(s);

        for (stream *other : late_streams)
            if (!some && other != s)
                some = advance(other);
        if (!some)
            sched_yield();
    }
}

static void run_all()
{
    for (stream *s : late_streams)
        run_until(s, s->queued);
}

/* Now, when the graph is launched, or when somebody waits for it. */
void enqueue(cudaStream_t in, std::function<void()> work)
{
    stream *s = (stream *)in;

    if (capturing) {
        capturing->push_back(work);
    } else if (s && s->late) {
        s->work.push_back([=] {
            work();
            return true;
        });
        s->queued++;
    } else {
        work();
    }
}

void enqueue_steps(cudaStream_t in, std::function<bool()> step)
{
    stream *s = (stream *)in;

    if (s && s->late) {
        s->work.push_back(step);
        s->queued++;
    } else {
        while (!step())
            sched_yield();
    }
}

void launch(cudaStream_t in, const char *name, dim3 grid, dim3 block, size_t shared,
            std::function<void()> body)
{
    enqueue(in, [=] { launch_now(name, grid, block, shared, body); });
}

/* Whether nothing is queued. */
bool is_idle()
{
    for (stream *s : late_streams)
        if (s->done < s->queued)
            return false;
    return true;
}

static bool lies_in(const std::map<void *, block> &all, const void *data, size_t bytes)
{
    auto next = all.upper_bound((void *)data);

    if (next == all.begin())
        return false;
    --next;
    return (const char *)data + bytes <= (char *)next->first + next->second.bytes;
}

bool at_once()
{
    return !getenv("DS_SIMT_LATE");
}

void limit(void *data, size_t bytes)
{
    block *of = &blocks[data];

    if (bytes <= of->limit)
        return;
    of->limit = bytes;
    ASAN_UNPOISON_MEMORY_REGION(data, bytes);
    ASAN_POISON_MEMORY_REGION((char *)data + bytes, of->bytes - bytes);
}

bool is_device(const void *data, size_t bytes)
{
    return lies_in(blocks, data, bytes);
}

static double now_ms()
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
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
    if (capturing && capture_mode != cudaStreamCaptureModeRelaxed)
        return fails(cudaErrorStreamCaptureUnsupported);
    if (taken + bytes > (size_t)number("DS_SIMT_MEMORY", (int64_t)8 << 30) ||
        posix_memalign(out, 512, bytes ? bytes : 1) != 0)
        return fails(cudaErrorMemoryAllocation);
    memset(*out, 0xff, bytes);
    blocks[*out] = {bytes, 0};
    taken += bytes;
    return cudaSuccess;
}
cudaError_t cudaFree(void *p)
{
    if (p) {
        run_all();
        taken -= blocks[p].bytes;
        blocks.erase(p);
        free(p);
    }
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned)
{
    if (posix_memalign(out, 4096, bytes ? bytes : 1) != 0)
        return fails(cudaErrorMemoryAllocation);
    pinned[*out] = {bytes, 0};
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void **out, size_t bytes)
{
    return cudaHostAlloc(out, bytes, 0);
}
cudaError_t cudaFreeHost(void *p)
{
    pinned.erase(p);
    free(p);
    return cudaSuccess;
}
/* What comes from the host is taken at once where it is not page-locked, as CUDA does. */
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t s)
{
    if (kind == cudaMemcpyHostToDevice && s && ((stream *)s)->late && !capturing &&
        !lies_in(pinned, from, bytes)) {
        std::string taken((const char *)from, bytes);

        enqueue(s, [=] { memcpy(to, taken.data(), bytes); });
    } else {
        enqueue(s, [=] { memmove(to, from, bytes); });
    }
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t tp, const void *from, size_t fp, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t s)
{
    enqueue(s, [=] {
        for (size_t i = 0; i < height; i++)
            memmove((char *)to + i * tp, (const char *)from + i * fp, width);
    });
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s)
{
    enqueue(s, [=] { memset(p, value, bytes); });
    return cudaSuccess;
}

/* ---- streams and events */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned, int priority)
{
    const char *late = getenv("DS_SIMT_LATE");
    bool kernels = late && !strcmp(late, "kernels"), copies = late && !strcmp(late, "copies");
    bool all = late && !strcmp(late, "all");
    static int count;
    stream *s = new stream{};

    s->late = all || (kernels ? !priority : copies ? count > 0 : priority != 0);
    count++;
    worker = pthread_self();
    if (s->late)
        late_streams.insert(s);
    *out = (cudaStream_t)s;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags)
{
    return cudaStreamCreateWithPriority(out, flags, 0);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0, *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    run_until((stream *)s, ((stream *)s)->queued);
    late_streams.erase((stream *)s);
    delete (stream *)s;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    if (capturing)
        return fails(cudaErrorStreamCaptureUnsupported);
    if (s)
        run_until((stream *)s, ((stream *)s)->queued);
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t s)
{
    return cudaStreamSynchronize(s);
}
cudaError_t cudaDeviceSynchronize()
{
    if (capturing)
        return fails(cudaErrorStreamCaptureUnsupported);
    run_all();
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned)
{
    event before = *(event *)e;

    if (s && ((stream *)s)->late)
        enqueue_steps(s, [=] { return !before.in || before.in->done >= before.number; });
    else
        enqueue(s, [=] { run_until(before.in, before.number); });
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned)
{
    *out = (cudaEvent_t) new event{};
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    delete (event *)e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t in)
{
    stream *s = (stream *)in;
    event *at = (event *)e;

    at->in = s && s->late ? s : NULL;
    at->number = at->in ? s->queued : 0;
    at->ms = now_ms();
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t e)
{
    event *at = (event *)e;

    if (!pthread_equal(pthread_self(), worker))
        return !at->in || at->in->done >= at->number ? cudaSuccess : cudaErrorNotReady;
    run_until(at->in, at->number);
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e)
{
    return capturing ? fails(cudaErrorStreamCaptureUnsupported) : cudaEventQuery(e);
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b)
{
    *ms = (float)(((event *)b)->ms - ((event *)a)->ms);
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

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode mode)
{
    if (capturing)
        return fails(cudaErrorIllegalState);
    capture_mode = mode;
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
cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t s)
{
    std::vector<std::function<void()>> all = *(std::vector<std::function<void()>> *)g;

    enqueue(s, [=] {
        for (auto &work : all)
            work();
    });
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
