/* comm_nccl.c - several ranks with a GPU each: collectives by NCCL, as part of the CUDA plugin.
 *
 * A group's communicator is made by its first collective on GPUs; how the ranks find each other is told
 * over the group's transport for the CPU. Collectives work in a stream of their own, which waits for
 * the kernels that were called before, and for which kernels wait from ds_wait() on. The host waits for
 * neither, but while collectives are logged: else there were no times to log.
 *
 * What differs from the CPU's: sums are in NCCL's order, which depends on the number of ranks, the sizes
 * and the machine, and is the same every time; bf16 and f16 are rounded as they go from rank to rank.
 * DS_NCCL_EXACT=1 has parts sent to their owner and summed there in order of rank in f32, as the CPU
 * does it, to the bit: with the same bytes on a switch (reduce_scatter, reduce_parts), with n/2 times as
 * many where everybody sums everything (all_reduce). Maxima and minima of floats are always made so, as
 * NaN wins there, and NCCL drops it.
 */
#include "runner/comm_nccl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- groups */

/* What ranks tell each other before they connect. */
typedef struct greeting {
    ncclUniqueId id; /* of rank 0 */
    int version;     /* of NCCL; 0: it could not be opened */
    char why[200];
} greeting;

static ds_tensor bytes_of(void *data, int64_t n)
{
    return (ds_tensor){.data = data,
                       .numel = n,
                       .shape = {n},
                       .stride = {1},
                       .ndim = 1,
                       .dtype = DS_U8,
                       .device = DS_CPU,
                       .dense = 1};
}

int ds_nccl_tell(ds_comm *c, void *mine, void *all, int64_t bytes)
{
    ds_tensor in = bytes_of(mine, bytes), out = bytes_of(all, c->size * bytes);
    const ds_call call = {.kind = DS_ALL_GATHER, .out = &out, .in = &in};
    ds_work work = {.comm = c};

    return c->transport[DS_CPU]->start[DS_ALL_GATHER](c, &call, &work);
}

static int judge(const ds_comm *c, const greeting *all)
{
    for (int r = 0; r < c->size; r++)
        if (!all[r].version)
            return r == c->rank ? ds_fail(DS_ECOMM, "%s", all[r].why)
                                : ds_fail(DS_ECOMM, "rank %d: %s", r, all[r].why);
    for (int r = 1; r < c->size; r++)
        if (all[r].version != all[0].version)
            return ds_fail(DS_ECOMM,
                           "rank 0 has NCCL version %d and rank %d version %d: they do not "
                           "understand each other",
                           all[0].version, r, all[r].version);
    return 0;
}

ds_nccl_group *ds_nccl_group_of(ds_comm *c)
{
    if (!c->state[DS_CUDA])
        c->state[DS_CUDA] = calloc(1, sizeof(ds_nccl_group));
    if (!c->state[DS_CUDA])
        ds_fail(DS_ENOMEM, "out of memory: a group of %d ranks", c->size);
    return c->state[DS_CUDA];
}

int ds_nccl_group_connect(ds_comm *c, ds_nccl_group *g, int kind)
{
    greeting mine = {.version = 0}, *all;
    int rc;

    if (g->link.ready)
        return 0;
    all = calloc((size_t)c->size, sizeof *all);
    if (!all)
        return ds_fail(DS_ENOMEM, "out of memory: a group of %d ranks", c->size);
    rc = ds_nccl_open();
    if (rc == 0 && c->rank == 0 && ds_nccl.GetUniqueId(&mine.id) != ncclSuccess)
        rc = ds_fail(DS_ECOMM, "NCCL finds no network: %s", ds_nccl.GetLastError(NULL));
    mine.version = rc == 0 ? ds_nccl.version : 0;
    if (rc < 0)
        snprintf(mine.why, sizeof mine.why, "%s", ds_error());
    rc = ds_nccl_tell(c, &mine, all, sizeof mine);
    if (rc == 0)
        rc = judge(c, all);
    ds_comm_prepares(c); /* for longer than ranks that wait for each other may do nothing */
    if (rc == 0)
        rc = ds_nccl_connect(&g->link, &all[0].id, c->size, c->rank);
    if (rc == 0)
        rc = ds_nccl_settle(&g->link, c, kind, ncclInProgress, 1);
    free(all);
    return rc < 0 ? rc : 0;
}

/* What the group was stays: its links are in a list. */
static void nccl_close(ds_comm *c)
{
    if (ds_comm_is_world(c))
        ds_nccl_close_all();
    c->state[DS_CUDA] = NULL;
}

/* ---- what is under way */

static ds_nccl_flight *spare;

static int new_flight(ds_nccl_flight **out)
{
    ds_nccl_flight *f = calloc(1, sizeof *f);
    int rc;

    if (!f)
        return ds_fail(DS_ENOMEM, "out of memory: a collective");
    rc = ds_cuda_check(cudaEventCreateWithFlags(&f->done, cudaEventDisableTiming), "an event");
    if (rc < 0)
        free(f);
    else
        *out = f;
    return rc;
}

int ds_nccl_take_off(ds_nccl_flight **out, ds_nccl_link *l, const ds_call *call)
{
    ds_nccl_flight *f = spare;
    int rc = 0;

    if (f)
        spare = f->next;
    else
        DS_TRY(new_flight(&f));
    *f = (ds_nccl_flight){.link = l, .done = f->done};
    if (call->in && call->in->storage)
        rc = ds_alias(&f->held[0], call->in);
    if (rc == 0 && call->out && call->out != call->in && call->out->storage)
        rc = ds_alias(&f->held[1], call->out);
    if (rc < 0)
        ds_nccl_land(f);
    else
        *out = f;
    return rc;
}

void ds_nccl_land(ds_nccl_flight *f)
{
    for (size_t i = 0; i < sizeof f->held / sizeof *f->held; i++)
        if (f->held[i].storage)
            ds_release(&f->held[i]);
    free(f->parts);
    f->next = spare;
    spare = f;
}

/* What kernels do, where NCCL has done its part. */
static int join(ds_nccl_flight *f)
{
    const ds_ops *ops = ds_ops_of(DS_CUDA);

    if (!f->n || !f->joined.numel)
        return 0;
    if (!ops || !ops->reduce_ranks)
        return ds_fail(DS_ENOSYS, "this build has no kernel to reduce what ranks send");
    return ops->reduce_ranks(&f->joined, f->parts, f->dtype, f->n, f->op, f->scale);
}

int ds_nccl_arrive(ds_nccl_flight *f, ds_work *work, int block)
{
    const char *what = ds_collective_name(work->kind);
    int rc = 0;

    if (!block) {
        cudaError_t code = cudaEventQuery(f->done);

        if (code == cudaErrorNotReady && !ds_comm_aborted(work->comm))
            return 0;
        rc = code == cudaErrorNotReady ? 0 : ds_cuda_check(code, what);
    }
    if (rc == 0)
        rc = ds_cuda_check(cudaStreamWaitEvent(ds_cuda.stream, f->done, 0), what);
    if (rc == 0)
        rc = join(f);
    if (rc == 0 && (work->entry || ds_cuda.sync))
        rc = ds_cuda_wait(what);
    if (rc == 0 && ds_comm_aborted(work->comm))
        rc = ds_comm_fail_aborted(work->comm, work->kind);
    ds_nccl_land(f);
    work->state = NULL;
    work->done = 1;
    return work->code = rc;
}

static int nccl_progress(ds_work *work, int block)
{
    if (work->kind == DS_SEND || work->kind == DS_RECV)
        return ds_nccl_message_progress(work, block);
    return ds_nccl_arrive(work->state, work, block);
}

/* ---- collectives */

/* What failed before NCCL was asked can be taken back; afterwards it may still use the memory. */
static int start(ds_comm *c, ds_nccl_group *g, const ds_call *call, ds_work *work)
{
    const char *what = ds_collective_name(call->kind);
    ds_nccl_flight *f;
    ds_nccl_plan plan;
    int rc;

    if (c->shared && !(ds_nccl_is_shared(call->in) && ds_nccl_is_shared(call->out)))
        return ds_fail(DS_EINVAL, "%s: a tensor is not in memory that is shared between GPUs",
                       what);

    if (work->entry) { /* what kernels still have to do is no part of the collective's time */
        DS_TRY(ds_cuda_wait(what));
        work->begun = ds_seconds();
    }
    DS_TRY(ds_nccl_take_off(&f, &g->link, call));
    rc = ds_nccl_prepare(&plan, f, c, call);
    if (rc == 0)
        rc = ds_nccl_follow_kernels(&g->link, what);
    if (rc == 0)
        rc = ds_nccl_begins(&g->link, call->kind);
    if (rc < 0) {
        ds_nccl_land(f);
        return rc;
    }
    DS_TRY(ds_nccl_run(&plan));
    DS_TRY(ds_nccl_ends(&g->link, call->kind, work->number));
    DS_TRY(ds_cuda_check(cudaEventRecord(f->done, g->link.stream), what));
    ds_cuda.counters.exchanges += c->shared;
    ds_comm_moved(c, ds_nccl_sends(&plan));
    work->state = f;
    return 0;
}

static int nccl_start(ds_comm *c, const ds_call *call, ds_work *work)
{
    const ds_tensor *in = call->in, *out = call->out;
    ds_nccl_group *g = ds_nccl_group_of(c);
    int rc = g ? 0 : DS_ENOMEM;

    if (rc == 0)
        rc = ds_nccl_group_connect(c, g, call->kind);
    if (rc == 0 && ((in && in->numel) || (out && out->numel)))
        rc = start(c, g, call, work);
    work->done = !work->state;
    return work->code = rc;
}

const ds_transport ds_transport_nccl = {
    .name = "nccl",
    .close = nccl_close,
    /* a barrier has no tensor: it is the CPU's */
    .start = {[DS_ALL_REDUCE] = nccl_start,
              [DS_REDUCE_SCATTER] = nccl_start,
              [DS_REDUCE_PARTS] = nccl_start,
              [DS_ALL_GATHER] = nccl_start,
              [DS_GATHER_PARTS] = nccl_start,
              [DS_ALL_TO_ALL] = nccl_start,
              [DS_BROADCAST] = nccl_start,
              [DS_SEND] = ds_nccl_send,
              [DS_RECV] = ds_nccl_recv},
    .progress = nccl_progress,
    .share = ds_nccl_share,
    .memory_take = ds_nccl_memory_take,
    .memory_give = ds_nccl_memory_give,
    .abort = ds_nccl_abort,
    .quit = ds_nccl_quit,
};
