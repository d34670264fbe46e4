/* comm_nccl_share.c - memory that is registered with NCCL, and the group whose collectives use it.
 *
 * From registered memory GPUs read and write in each other's place (over NVLink and in its switches by
 * multicast, by RDMA over a network), without a copy through NCCL's own buffers and with fewer of a GPU's
 * processors. NCCL wants it to be memory of ncclMemAlloc, at the same offset on every rank; and in a
 * collective either all ranks' buffers are registered or none, else ranks wait for each other. It finds
 * out by address. So no address may ever be registered on one rank and not on another:
 *
 * - Whether there is registered memory at all is agreed upon by all ranks, after each has tried. Any
 *   that cannot, or may not (DS_NCCL_REGISTER=0), and all go on without.
 * - It is registered with the communicator of one group alone, in which nothing else is exchanged. What
 *   else lies in such memory, as a view of it that a script reduces, goes by other communicators, which
 *   know of none.
 * - Each segment of the allocator's set is registered as it is taken, and for as long as it lives.
 *
 * Registering a segment is a note of it; NCCL maps it when a collective first uses it. Windows
 * (ncclCommWindowRegister) would do more for small messages, but are made by all ranks at once, and a
 * cache of memory grows on each rank when it must.
 */
#include "runner/comm_nccl.h"

#include <stdlib.h>
#include <string.h>

#include "runner/log.h"

#define TRIED ((size_t)2 << 20) /* bytes, to see whether it works */

typedef struct segment {
    char *data;
    size_t bytes;
    void *handle; /* NCCL's; NULL: it is registered no more */
    struct segment *next;
} segment;

/* All under ds_nccl_lock(). */
static ds_nccl_link *link_; /* of the group; NULL: there is no such memory */
static segment *segments;

/* ---- memory */

/* NCCL's refusal of memory is mostly a lack of it; the allocator then gives back what it keeps. */
static int allocate(void **out, size_t bytes)
{
    if (ds_nccl.MemAlloc(out, bytes) == ncclSuccess)
        return 0;
    cudaGetLastError();
    return ds_fail(DS_ENOMEM, "out of memory on the GPU");
}

static ncclResult_t note(segment *s)
{
    ncclResult_t code = ncclRemoteError;

    ds_nccl_lock();
    if (link_ && link_->comm)
        code = ds_nccl.CommRegister(link_->comm, s->data, s->bytes, &s->handle);
    if (code == ncclSuccess && !s->handle)
        code = ncclInvalidUsage; /* NCCL_LOCAL_REGISTER=0 */
    if (code == ncclSuccess) {
        s->next = segments;
        segments = s;
    }
    ds_nccl_unlock();
    return code;
}

int ds_nccl_memory_take(void **out, size_t bytes)
{
    segment *s = calloc(1, sizeof *s);
    ncclResult_t code;
    void *data;
    int rc = s ? allocate(&data, bytes) : ds_fail(DS_ENOMEM, "out of host memory");

    if (rc < 0) {
        free(s);
        return rc;
    }
    s->data = data;
    s->bytes = bytes;
    code = note(s);
    if (code != ncclSuccess) {
        free(s);
        ds_nccl.MemFree(data);
        return ds_fail(DS_ECOMM, "memory that ranks exchange: NCCL does not register it: %s",
                       ds_nccl.GetErrorString(code));
    }
    ds_cuda.counters.takes++;
    ds_cuda.counters.registered += (int64_t)bytes;
    *out = data;
    return 0;
}

static segment *unlink_segment(const void *data)
{
    segment **at = &segments, *s;

    while (*at && (*at)->data != data)
        at = &(*at)->next;
    s = *at;
    if (s)
        *at = s->next;
    return s;
}

/* Under the lock. */
static int forget(segment *s)
{
    void *handle = s->handle;

    s->handle = NULL;
    return !handle || !link_ || !link_->comm ||
           ds_nccl.CommDeregister(link_->comm, handle) == ncclSuccess;
}

/* Unlike cudaFree() NCCL waits for nobody who uses it. Where the job was ended others may still write
 * there: the process, which ends next, keeps it. */
void ds_nccl_memory_give(void *data)
{
    segment *s;
    int forgotten;

    ds_cuda.waiting = 1;
    cudaDeviceSynchronize();
    ds_cuda.waiting = 0;
    ds_nccl_lock();
    s = unlink_segment(data);
    forgotten = s && forget(s);
    ds_nccl_unlock();
    if (forgotten && !ds_cuda.ended)
        ds_nccl.MemFree(data);
    ds_cuda.counters.gives++;
    ds_cuda.counters.registered -= s ? (int64_t)s->bytes : 0;
    free(s);
}

void ds_nccl_forget_all(void)
{
    for (segment *s = segments; s; s = s->next)
        forget(s);
    link_ = NULL;
}

static int lies_in(const segment *s, const ds_tensor *t)
{
    const char *data = t->data;

    return data >= s->data && data + t->numel * ds_bytes_of(t->dtype) <= s->data + s->bytes;
}

int ds_nccl_is_shared(const ds_tensor *t)
{
    const segment *s;

    if (!t || !t->numel)
        return 1;
    ds_nccl_lock();
    for (s = segments; s && !lies_in(s, t);)
        s = s->next;
    ds_nccl_unlock();
    return s != NULL;
}

int ds_nccl_empty(ds_tensor *out, const ds_comm *c, int dtype, int64_t n)
{
    int before = ds_memory_set(DS_CUDA, c->shared ? DS_MEMORY_SHARED : -1);
    int rc = ds_empty(out, dtype, DS_CUDA, 1, &n);

    ds_memory_set(DS_CUDA, before);
    return rc;
}

/* ---- whether there is any */

static int wanted(void)
{
    const char *off = getenv("DS_NCCL_REGISTER");

    return (!off || strcmp(off, "0") != 0) && ds_nccl_open() == 0;
}

/* 1: what `mine` says is so on every rank; 0: not on all, as on rank *who. */
static int agree(int *who, ds_comm *c, int mine)
{
    unsigned char own = (unsigned char)mine, *all = calloc((size_t)c->size, 1);
    int rc;

    if (!all)
        return ds_fail(DS_ENOMEM, "out of memory: a group of %d ranks", c->size);
    rc = ds_nccl_tell(c, &own, all, 1);
    for (*who = 0; *who < c->size && rc == 0 && all[*who];)
        ++*who;
    free(all);
    return rc < 0 ? rc : *who == c->size;
}

static int try_it(void)
{
    void *data;

    if (ds_nccl_memory_take(&data, TRIED) < 0)
        return 0;
    ds_nccl_memory_give(data);
    return 1;
}

int ds_nccl_share(ds_comm *c)
{
    ds_nccl_group *g = ds_nccl_group_of(c);
    int who, rc = g ? agree(&who, c, wanted()) : DS_ENOMEM;

    if (rc <= 0)
        return rc;
    DS_TRY(ds_nccl_group_connect(c, g, DS_ALL_GATHER));
    ds_nccl_lock();
    link_ = &g->link;
    ds_nccl_unlock();
    rc = agree(&who, c, try_it());
    if (rc > 0)
        return rc;
    if (rc == 0)
        ds_logf(DS_LOG_INFO, "NCCL registers no memory on rank %d: all go on without", who);
    ds_nccl_lock();
    link_ = NULL;
    ds_nccl_unlock();
    return rc;
}
