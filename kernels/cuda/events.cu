/* events.cu - moments in the device's streams, and transfers that go on beside the host.
 *
 * Two streams: the kernels' and one for transfers. What one of them must not do before the other is said
 * by events; the host waits for an event only when it wants what lies behind it. An event is asked first
 * and waited for only if the device is not there yet, so that event_waits counts real ones.
 */
#include "kernels/cuda/device.h"

static cudaStream_t stream_of(int stream)
{
    return stream == DS_STREAM_COPIES ? ds_cuda.copies : ds_cuda.stream;
}

static int event_make(void **out)
{
    return ds_cuda_check(cudaEventCreateWithFlags((cudaEvent_t *)out, cudaEventDisableTiming),
                         "an event");
}

static void event_free(void *event)
{
    cudaEventDestroy((cudaEvent_t)event);
}

static int event_record(void *event, int stream)
{
    DS_TRY(ds_cuda_not_captured("an event"));
    return ds_cuda_check(cudaEventRecord((cudaEvent_t)event, stream_of(stream)), "an event");
}

/* Faults that kernels left are told here as well: this may be the only place that looks for long. */
static int event_done(void *event)
{
    cudaError_t code = cudaEventQuery((cudaEvent_t)event);

    if (code == cudaErrorNotReady) {
        cudaGetLastError();
        return 0;
    }
    DS_TRY(ds_cuda_check(code, "an event"));
    DS_TRY(ds_cuda_take_fault());
    return 1;
}

static int event_wait(void *event)
{
    int rc = event_done(event);

    if (rc != 0)
        return rc < 0 ? rc : 0;
    DS_TRY(ds_cuda_not_captured("an event"));
    ds_cuda.counters.event_waits++;
    ds_cuda.waiting = 1;
    cudaError_t code = cudaEventSynchronize((cudaEvent_t)event);
    ds_cuda.waiting = 0;
    DS_TRY(ds_cuda_check(code, "an event"));
    if (ds_cuda.ended)
        return ds_fail(DS_ECOMM, "the job was ended while this rank waited for others");
    return ds_cuda_take_fault();
}

static int event_before(void *event, int stream)
{
    return ds_cuda_check(cudaStreamWaitEvent(stream_of(stream), (cudaEvent_t)event, 0), "an event");
}

static int copy_later(void *to, const void *from, size_t bytes, int up, int stream)
{
    DS_TRY(ds_cuda_not_captured(up ? "to the GPU" : "from the GPU"));
    if (up)
        ds_cuda.counters.uploads++;
    else
        ds_cuda.counters.downloads++;
    return ds_cuda_check(cudaMemcpyAsync(to, from, bytes,
                                         up ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost,
                                         stream_of(stream)),
                         up ? "to the GPU" : "from the GPU");
}

void ds_cuda_fill_events(ds_backend *backend)
{
    backend->event_make = event_make;
    backend->event_free = event_free;
    backend->event_record = event_record;
    backend->event_done = event_done;
    backend->event_wait = event_wait;
    backend->event_before = event_before;
    backend->copy_later = copy_later;
}
