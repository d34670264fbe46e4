/* comm_nccl_place.c - in which collective the GPU is, for those who ask where a rank is.
 *
 * The host waits for no collective: it queues them, and later waits for its GPU. What a rank waits for
 * then is what its GPU has reached and not finished: a collective lies between two events of its
 * stream, and the thread that watches over NCCL looks for the first one that is past one of them and not
 * the other. A GPU that still computes is in none, and neither is a rank whose host does something else.
 */
#include "runner/comm_nccl.h"

#define MOST 512 /* more than are ever queued at once; of others it is not known where they are */

static struct queued {
    cudaEvent_t before, done;
    int kind;
    int64_t number;
} ring[MOST];

/* Of all that were queued: how many, and how many of those are done. Under ds_nccl_lock(). */
static int64_t last, first;
static int told; /* that the host waits */

/* Where the next one goes; NULL: the ring is full. Of the thread that queues, as its events are until then. */
static struct queued *next;

static int is_past(cudaEvent_t event)
{
    return cudaEventQuery(event) != cudaErrorNotReady;
}

static void pass_done(void)
{
    while (first < last && is_past(ring[first % MOST].done))
        first++;
}

static int make(cudaEvent_t *event, const char *what)
{
    return *event ? 0
                  : ds_cuda_check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), what);
}

int ds_nccl_begins(ds_nccl_link *l, int kind)
{
    const char *what = ds_collective_name(kind);

    ds_nccl_lock();
    if (last - first == MOST)
        pass_done();
    next = last - first < MOST ? &ring[last % MOST] : NULL;
    ds_nccl_unlock();
    if (!next)
        return 0;
    DS_TRY(make(&next->before, what));
    DS_TRY(make(&next->done, what));
    return ds_cuda_check(cudaEventRecord(next->before, l->stream), what);
}

int ds_nccl_ends(ds_nccl_link *l, int kind, int64_t number)
{
    if (!next)
        return 0;
    DS_TRY(ds_cuda_check(cudaEventRecord(next->done, l->stream), ds_collective_name(kind)));
    next->kind = kind;
    next->number = number;
    ds_nccl_lock();
    last++;
    ds_nccl_unlock();
    return 0;
}

void ds_nccl_look_for_device(void)
{
    int64_t i;

    if (!ds_cuda.waiting) {
        if (told)
            ds_comm_device_in(DS_AWAKE, 0);
        told = 0;
        return;
    }
    pass_done();
    for (i = first; i < last; i++)
        if (is_past(ring[i % MOST].before) && !is_past(ring[i % MOST].done))
            break;
    told = 1;
    if (i < last)
        ds_comm_device_in(ring[i % MOST].kind, ring[i % MOST].number);
    else
        ds_comm_device_in(DS_COLLECTIVES, 0);
}
