/* comm.c - groups of ranks and what they do together: checks and bookkeeping for every transport,
 * and `self`, the transport of a job of one rank.
 */
#include "runner/comm.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/process.h"
#include "runner/rank.h"

static const char *const reductions[DS_REDUCTIONS] = {
    [DS_SUM] = "sum", [DS_MEAN] = "mean", [DS_MAX] = "max", [DS_MIN] = "min"};

/* What each collective takes. Shares: how many parts, one a rank, `in` and `out` are made of; 0: it
 * has no such tensor. EACH: as many as there are ranks. */
enum { EACH = -1 };
static const struct {
    const char *name;
    int in, out;
    int reduces, in_place, has_peer; /* in_place: out may be in */
} kinds[DS_COLLECTIVES] = {
    [DS_ALL_REDUCE] = {"all_reduce", 1, 1, 1, 1, 0},
    [DS_REDUCE_SCATTER] = {"reduce_scatter", EACH, 1, 1, 0, 0},
    [DS_REDUCE_PARTS] = {"reduce_parts", 1, 1, 1, 1, 0},
    [DS_ALL_GATHER] = {"all_gather", 1, EACH, 0, 0, 0},
    [DS_GATHER_PARTS] = {"gather_parts", 1, 1, 0, 1, 0},
    [DS_ALL_TO_ALL] = {"all_to_all", EACH, EACH, 0, 0, 0},
    [DS_BROADCAST] = {"broadcast", 0, 1, 0, 0, 1},
    [DS_SEND] = {"send", 1, 0, 0, 0, 1},
    [DS_RECV] = {"recv", 0, 1, 0, 0, 1},
    [DS_BARRIER] = {"barrier", 0, 0, 0, 0, 0},
    [DS_SPLIT] = {"group", 0, 0, 0, 0, 0},
};

const char *ds_collective_name(int kind)
{
    return kind >= 0 && kind < DS_COLLECTIVES ? kinds[kind].name : "none";
}

const char *ds_reduction_name(int op)
{
    return op >= 0 && op < DS_REDUCTIONS ? reductions[op] : "?";
}

uint64_t ds_comm_hash(const int64_t *words, int n)
{
    uint64_t h = 14695981039346656037u; /* FNV-1a, by words */

    for (int i = 0; i < n; i++)
        h = (h ^ (uint64_t)words[i]) * 1099511628211u;
    return h;
}

/* ---- what is counted, and what a watchdog reads */

/* Of all groups, whether they are still there or not. */
static struct {
    _Atomic int64_t calls, bytes, number;
    _Atomic int running, peer;
    _Atomic int
        device_in; /* the collective that the host's device is in, while the host waits for it */
    _Atomic int64_t device_number;
} all_groups = {.running = DS_COLLECTIVES, .peer = -1, .device_in = DS_AWAKE};

/* What the watchdog reads: this rank is inside a collective, or (DS_COLLECTIVES) inside none. */
static void inside(ds_comm *c, int kind, int64_t number)
{
    if (number)
        c->number = all_groups.number = number;
    all_groups.peer = -1;
    c->running = all_groups.running = kind;
}

/* Only what all ranks of the group take part in is counted, so that they count alike. */
static int64_t count(ds_comm *c, int kind)
{
    if (kind == DS_SEND || kind == DS_RECV)
        return 0;
    all_groups.calls++;
    return ++c->calls;
}

/* Whether ranks compare what they are about to do (DS_CHECK=comm). */
static int checked(const ds_comm *c)
{
    const char *wanted = getenv("DS_CHECK");

    return c->size > 1 && wanted && strstr(wanted, "comm");
}

/* ---- groups */

/* Whether launchers say that this process is one of several. */
static int launched(void)
{
    ds_rank rank;

    ds_rank_find(&rank);
    return rank.size > 1;
}

static ds_comm *new_group(const ds_transport *const *transport)
{
    ds_comm *c = calloc(1, sizeof *c);

    if (!c)
        return NULL;
    memcpy(c->transport, transport, sizeof c->transport);
    c->running = DS_COLLECTIVES;
    return c;
}

/* The job is the process's, so there is one world, whatever the number of Lua states. */
static pthread_mutex_t world_lock = PTHREAD_MUTEX_INITIALIZER;
static ds_comm *_Atomic world;

static void close_group(ds_comm *c)
{
    for (int device = DS_META - 1; device >= 0; device--) /* the CPU's waits for the other ranks */
        if (c->transport[device]->close)
            c->transport[device]->close(c);
    free(c);
}

/* In the place of the transport between GPUs until one is wanted. */
static const ds_transport no_cuda = {.name = "CUDA on several ranks"};

static int open_world(ds_comm **out)
{
    static const ds_transport *const alone[DS_META] = {&ds_transport_self, &ds_transport_self};
    static const ds_transport *const many[DS_META] = {&ds_transport_mpi, &no_cuda};
    ds_comm *c = new_group(launched() ? many : alone);
    int rc = 0;

    if (!c)
        return ds_fail(DS_ENOMEM, "out of memory: the group of all ranks");
    for (int device = 0; rc == 0 && device < DS_META; device++)
        if (c->transport[device]->open)
            rc = c->transport[device]->open(c);
    if (rc < 0)
        free(c);
    else
        *out = c;
    return rc;
}

int ds_comm_world(ds_comm **out)
{
    int rc = 0;

    pthread_mutex_lock(&world_lock);
    *out = world;
    if (!*out && (rc = open_world(out)) == 0)
        world = *out;
    pthread_mutex_unlock(&world_lock);
    return rc;
}

void ds_comm_finish(void)
{
    ds_comm *shared;

    pthread_mutex_lock(&world_lock);
    shared = ds_comm_forget_shared();
    if (shared)
        close_group(shared);
    if (world)
        close_group(world);
    world = NULL;
    pthread_mutex_unlock(&world_lock);
}

/* A process that failed ends the job: the others would wait for it. */
static void at_end(void *data, int code)
{
    ds_comm *c = world;

    (void)data;
    if (c && c->aborted && code == 0)
        code = 1;
    for (int device = 0; c && code != 0 && device < DS_META; device++)
        if (c->transport[device]->quit)
            c->transport[device]->quit(c, code);
    ds_comm_finish();
}

int ds_comm_join(void)
{
    ds_comm *c;
    int rc;

    if (!launched())
        return 0;
    rc = ds_comm_world(&c);
    return rc < 0 ? rc : ds_at_end(at_end, NULL);
}

int ds_comm_split(ds_comm **out, ds_comm *parent, int color, int key)
{
    int64_t number;
    ds_comm *c;
    int rc = 0;

    *out = NULL;
    if (ds_comm_aborted(parent))
        return ds_comm_fail_aborted(parent, DS_SPLIT);
    c = new_group(parent->transport);
    if (!c)
        return ds_fail(DS_ENOMEM, "out of memory: a group of ranks");
    if (c->transport[DS_CPU] != &ds_transport_self) /* by its own size */
        c->transport[DS_CUDA] = &no_cuda;
    number = count(parent, DS_SPLIT);
    inside(parent, DS_SPLIT, number);
    if (checked(parent))
        rc = ds_comm_compare(parent, &(ds_call){.kind = DS_SPLIT}, number);
    for (int device = 0; rc == 0 && device < DS_META; device++)
        if (c->transport[device]->split)
            rc = c->transport[device]->split(c, parent, color, key);
    inside(parent, DS_COLLECTIVES, number);
    if (rc < 0 || color < 0)
        free(c);
    else
        *out = c;
    return rc;
}

void ds_comm_close(ds_comm *c)
{
    pthread_mutex_lock(&world_lock);
    if (c && c != world)
        close_group(c);
    pthread_mutex_unlock(&world_lock);
}

int ds_comm_rank(const ds_comm *c)
{
    return c->rank;
}

int ds_comm_size(const ds_comm *c)
{
    return c->size;
}

int ds_comm_local_rank(const ds_comm *c)
{
    return c->local_rank;
}

int ds_comm_local_size(const ds_comm *c)
{
    return c->local_size;
}

/* ---- the end, and counters */

/* The first reason counts; it is whole before any group is marked. */
static char reason[160];
static pthread_mutex_t reason_lock = PTHREAD_MUTEX_INITIALIZER;

void ds_comm_abort(ds_comm *c, const char *why)
{
    pthread_mutex_lock(&reason_lock);
    if (!*reason)
        snprintf(reason, sizeof reason, "%s", why);
    pthread_mutex_unlock(&reason_lock);
    c->aborted = 1;
    for (int device = 0; device < DS_META; device++)
        if (c->transport[device]->abort)
            c->transport[device]->abort(c, why);
}

int ds_comm_aborted(const ds_comm *c)
{
    const ds_comm *all = world;

    return c->aborted || (all && all->aborted);
}

int ds_comm_fail_aborted(const ds_comm *c, int kind)
{
    return ds_fail(DS_ECOMM, "%s: the job was ended: %s",
                   ds_collective_name(kind == DS_COLLECTIVES ? c->running : kind), reason);
}

void ds_comm_moved(ds_comm *c, int64_t bytes)
{
    c->bytes += bytes;
    all_groups.bytes += bytes;
}

void ds_comm_stats(int64_t *collectives, int64_t *bytes, const ds_comm *c)
{
    *collectives = c ? c->calls : all_groups.calls;
    *bytes = c ? c->bytes : all_groups.bytes;
}

void ds_comm_count_anew(ds_comm *c)
{
    c->calls = c->bytes = c->number = 0;
    all_groups.calls = all_groups.bytes = all_groups.number = 0;
}

void ds_comm_waits_for(int rank)
{
    all_groups.peer = rank;
}

void ds_comm_prepares(ds_comm *c)
{
    c->running = all_groups.running = DS_COLLECTIVES;
}

int ds_comm_is_world(const ds_comm *c)
{
    return c == world;
}

void ds_comm_device_in(int kind, int64_t number)
{
    all_groups.device_number = number;
    all_groups.device_in = kind;
}

void ds_comm_where(ds_comm_place *out)
{
    int device_in = all_groups.device_in;
    int64_t number = device_in == DS_AWAKE ? 0 : (int64_t)all_groups.device_number;

    *out = (ds_comm_place){.kind = device_in == DS_AWAKE ? (int)all_groups.running : device_in,
                           .number = number ? number : (int64_t)all_groups.number,
                           .calls = all_groups.calls,
                           .bytes = all_groups.bytes,
                           .peer = device_in == DS_AWAKE ? (int)all_groups.peer : DS_UNSEEN};
}

/* ---- collectives */

static int check_tensor(const ds_call *call, const ds_tensor *t, const char *which)
{
    const char *name = kinds[call->kind].name;

    if (!t)
        return ds_fail(DS_EINVAL, "%s: there is no %s tensor", name, which);
    if (t->device < 0 || t->device >= DS_META)
        return ds_fail(DS_EINVAL, "%s: the %s tensor is on the meta device: it has no data", name,
                       which);
    if (!t->data && t->numel)
        return ds_fail(DS_EINVAL, "%s: the %s tensor was released", name, which);
    if (!t->dense)
        return ds_fail(DS_EINVAL, "%s: the %s tensor is not dense; use t:contiguous()", name,
                       which);
    return 0;
}

static int check_reduction(const ds_call *call)
{
    static const char floating[DS_DTYPES] = {
        [DS_F32] = 1, [DS_BF16] = 1, [DS_F16] = 1, [DS_F64] = 1};
    const char *name = kinds[call->kind].name;
    int dtype = call->in->dtype;

    if (call->op < 0 || call->op >= DS_REDUCTIONS)
        return ds_fail(DS_EINVAL, "%s: there is no reduction %d", name, call->op);
    if (!floating[dtype] && call->scale != 1)
        return ds_fail(DS_EINVAL, "%s: %s cannot be scaled by %g", name, ds_dtype_name(dtype),
                       call->scale);
    if (call->wire != dtype && (call->wire < 0 || call->wire > DS_F16 || dtype > DS_F16))
        return ds_fail(DS_EINVAL, "%s: %s cannot travel as %s; f32, bf16 and f16 can as each other",
                       name, ds_dtype_name(dtype), ds_dtype_name(call->wire));
    if (call->op == DS_MEAN && !floating[dtype])
        return ds_fail(DS_EINVAL, "%s: a mean of %s is no %s; use sum", name, ds_dtype_name(dtype),
                       ds_dtype_name(dtype));
    if (call->op == DS_SUM && dtype == DS_BOOL)
        return ds_fail(DS_EINVAL, "%s: a sum of bool is no bool; use max (any) or min (all)", name);
    return 0;
}

static int64_t own_part(const ds_comm *c, const ds_call *call)
{
    return call->borders[c->rank + 1] - call->borders[c->rank];
}

/* Dtype, device, sizes and places of the two tensors against each other. */
static int check_pair(const ds_comm *c, const ds_call *call)
{
    const ds_tensor *in = call->in, *out = call->out;
    const char *name = kinds[call->kind].name;
    int64_t parts_in = kinds[call->kind].in == EACH ? c->size : 1;
    int64_t parts_out = kinds[call->kind].out == EACH ? c->size : 1;
    int64_t bytes = ds_dtype_size(in->dtype);
    const char *a = in->data, *b = out->data;

    if (in->dtype != out->dtype || in->device != out->device)
        return ds_fail(DS_EINVAL, "%s: %s in and %s out; both have one dtype and one device", name,
                       ds_dtype_name(in->dtype), ds_dtype_name(out->dtype));
    if (call->kind == DS_REDUCE_PARTS && out != in
            ? out->numel != own_part(c, call)
            : in->numel % parts_in || in->numel / parts_in * parts_out != out->numel)
        return ds_fail(DS_EINVAL, "%s: %lld elements in and %lld out don't fit %d ranks", name,
                       (long long)in->numel, (long long)out->numel, c->size);
    if (kinds[call->kind].in_place && a == b)
        return 0;
    if (a < b + out->numel * bytes && b < a + in->numel * bytes)
        return ds_fail(DS_EINVAL, "%s: in and out overlap", name);
    return 0;
}

static int check_borders(const ds_comm *c, const ds_call *call)
{
    const int64_t *b = call->borders;

    for (int r = 0; r <= c->size; r++)
        if (b[r] < (r ? b[r - 1] : 0) || b[r] > call->in->numel)
            return ds_fail(DS_ERANGE, "%s: border %d is %lld in a buffer of %lld; they ascend",
                           kinds[call->kind].name, r, (long long)b[r], (long long)call->in->numel);
    return 0;
}

static int check_call(const ds_comm *c, const ds_call *call)
{
    const char *name = kinds[call->kind].name;
    int rc = 0;

    if (ds_comm_aborted(c))
        return ds_comm_fail_aborted(c, call->kind);
    if (kinds[call->kind].has_peer && (call->peer < 0 || call->peer >= c->size))
        return ds_fail(DS_ERANGE, "%s: rank %d of a group of %d; ranks count from 0", name,
                       call->peer, c->size);
    if ((call->kind == DS_SEND || call->kind == DS_RECV) && call->peer == c->rank)
        return ds_fail(DS_EINVAL, "%s: rank %d is this one", name, call->peer);
    if (kinds[call->kind].in)
        rc = check_tensor(call, call->in, "input");
    if (rc == 0 && kinds[call->kind].out)
        rc = check_tensor(call, call->out, "output");
    if (rc == 0 && kinds[call->kind].reduces)
        rc = check_reduction(call);
    if (rc == 0 && call->borders)
        rc = check_borders(c, call);
    if (rc == 0 && kinds[call->kind].in && kinds[call->kind].out)
        rc = check_pair(c, call);
    return rc;
}

static void log_if_done(const ds_work *work)
{
    if (work->entry && work->done && work->code == 0)
        ds_comm_log_end(work->entry, ds_seconds() - work->begun);
}

const ds_transport *ds_comm_transport(ds_comm *c, int device)
{
    if (c->transport[device] == &no_cuda) {
        const ds_transport *found = c->size == 1 ? &ds_transport_self : ds_cuda_transport();

        if (!found)
            return NULL;
        c->transport[device] = found;
    }
    return c->transport[device];
}

int ds_comm_start(ds_comm *c, const ds_call *call, ds_work *work)
{
    const ds_tensor *t = call->in ? call->in : call->out;
    const ds_transport *transport;
    ds_work own;
    int rc = check_call(c, call), device = t ? t->device : DS_CPU;

    if (!work)
        work = &own;
    *work = (ds_work){.comm = c, .kind = call->kind, .device = device, .done = 1, .code = rc};
    if (rc < 0)
        return rc;
    transport = ds_comm_transport(c, device);
    if (!transport)
        return work->code = DS_ENOSYS; /* ds_error() says why */
    if (!transport->start[call->kind])
        return work->code =
                   ds_fail(DS_ENOSYS, "%s has no %s", transport->name, kinds[call->kind].name);
    work->number = count(c, call->kind);
    inside(c, call->kind, work->number);
    if (work->number && checked(c))
        work->code = rc = ds_comm_compare(c, call, work->number);
    if (rc == 0) {
        work->done = 0;
        work->entry = ds_comm_log_begin(c, call);
        work->begun = work->entry ? ds_seconds() : 0;
        rc = transport->start[call->kind](c, call, work);
        log_if_done(work);
    }
    inside(c, DS_COLLECTIVES, work->number);
    return work == &own ? ds_wait(work) : rc;
}

static int go_on(ds_work *work, int block)
{
    ds_comm *c = work->comm;
    int rc;

    if (work->done)
        return work->code;
    inside(c, work->kind, work->number);
    rc = c->transport[work->device]->progress(work, block);
    log_if_done(work);
    inside(c, DS_COLLECTIVES, work->number);
    return rc;
}

int ds_wait(ds_work *work)
{
    return go_on(work, 1);
}

int ds_test(ds_work *work)
{
    int rc = go_on(work, 0);

    return rc < 0 ? rc : work->done;
}

static int reduce(int kind, ds_tensor *out, const ds_tensor *in, const int64_t *borders, int op,
                  double scale, int wire, ds_comm *c, ds_work *work)
{
    int own = in ? in->dtype : DS_F32;

    if (wire < 0 || (wire == DS_F32 && (own == DS_BF16 || own == DS_F16)))
        wire = own; /* rounding to more digits changes nothing */
    return ds_comm_start(c, &(ds_call){kind, op, 0, out, in, borders, scale, wire}, work);
}

int ds_all_reduce(ds_tensor *out, const ds_tensor *in, int op, ds_comm *c, ds_work *work)
{
    return reduce(DS_ALL_REDUCE, out, in, NULL, op, 1, -1, c, work);
}

int ds_all_reduce_scaled(ds_tensor *out, const ds_tensor *in, int op, double scale, int wire,
                         ds_comm *c, ds_work *work)
{
    return reduce(DS_ALL_REDUCE, out, in, NULL, op, scale, wire, c, work);
}

int ds_reduce_scatter(ds_tensor *out, const ds_tensor *in, int op, ds_comm *c, ds_work *work)
{
    return reduce(DS_REDUCE_SCATTER, out, in, NULL, op, 1, -1, c, work);
}

int ds_reduce_parts(ds_tensor *buffer, const int64_t *borders, int op, double scale, int wire,
                    ds_comm *c, ds_work *work)
{
    return reduce(DS_REDUCE_PARTS, buffer, buffer, borders, op, scale, wire, c, work);
}

int ds_reduce_part(ds_tensor *out, const ds_tensor *in, const int64_t *borders, int op,
                   double scale, int wire, ds_comm *c, ds_work *work)
{
    return reduce(DS_REDUCE_PARTS, out, in, borders, op, scale, wire, c, work);
}

int ds_all_gather(ds_tensor *out, const ds_tensor *in, ds_comm *c, ds_work *work)
{
    return ds_comm_start(c, &(ds_call){.kind = DS_ALL_GATHER, .out = out, .in = in}, work);
}

int ds_gather_parts(ds_tensor *buffer, const int64_t *borders, ds_comm *c, ds_work *work)
{
    const ds_call call = {.kind = DS_GATHER_PARTS, .out = buffer, .in = buffer, .borders = borders};

    return ds_comm_start(c, &call, work);
}

void ds_comm_about(ds_comm *c, int64_t about)
{
    c->about = about;
}

int ds_all_to_all(ds_tensor *out, const ds_tensor *in, ds_comm *c, ds_work *work)
{
    return ds_comm_start(c, &(ds_call){.kind = DS_ALL_TO_ALL, .out = out, .in = in}, work);
}

int ds_broadcast(ds_tensor *t, int root, ds_comm *c, ds_work *work)
{
    return ds_comm_start(c, &(ds_call){.kind = DS_BROADCAST, .peer = root, .out = t}, work);
}

int ds_send(const ds_tensor *in, int to, ds_comm *c, ds_work *work)
{
    return ds_comm_start(c, &(ds_call){.kind = DS_SEND, .peer = to, .in = in}, work);
}

int ds_recv(ds_tensor *out, int from, ds_comm *c, ds_work *work)
{
    return ds_comm_start(c, &(ds_call){.kind = DS_RECV, .peer = from, .out = out}, work);
}

int ds_barrier(ds_comm *c, ds_work *work)
{
    return ds_comm_start(c, &(ds_call){.kind = DS_BARRIER}, work);
}

/* ---- self: one rank, whose share is the whole */

static int self_open(ds_comm *c)
{
    c->rank = c->local_rank = 0;
    c->size = c->local_size = 1;
    return 0;
}

static int self_split(ds_comm *out, ds_comm *parent, int color, int key)
{
    (void)parent, (void)key;
    return color < 0 ? 0 : self_open(out);
}

static void self_close(ds_comm *c)
{
    (void)c;
}

/* What this rank's part begins with: of reduce_part, which has borders and two tensors, some of `in`. */
static void *self_part(const ds_call *call)
{
    int64_t skipped = call->borders && call->out != call->in ? call->borders[0] : 0;

    return (char *)call->in->data + skipped * ds_dtype_size(call->in->dtype);
}

static int self_scale(const ds_call *call, const ds_ops *ops)
{
    const void *const parts[] = {self_part(call)};

    if (!ops->reduce_ranks)
        return ds_fail(DS_ENOSYS, "this device has no kernel to scale what ranks reduce");
    return ops->reduce_ranks(call->out, parts, call->in->dtype, 1, call->op, call->scale);
}

/* As many elements in as out, for there is one share: copied, if they are not in place already. */
static int self_copy(ds_comm *c, const ds_call *call, ds_work *work)
{
    ds_tensor out, in;
    const ds_ops *ops;
    int scaled = kinds[call->kind].reduces && call->scale != 1;

    (void)c;
    work->done = 1;
    if (!call->in || !call->out || (call->in->data == call->out->data && !scaled))
        return 0;
    ops = ds_ops_of(call->in->device);
    if (!ops)
        return work->code = DS_ENOSYS; /* ds_error() says why */
    if (scaled)
        return work->code = self_scale(call, ops);
    if (!ops->copy)
        return work->code = ds_fail(DS_ENOSYS, "this device has no copy kernel");
    out = *call->out; /* dense, so shapes may be flattened: kernels compare them */
    in = *call->in;
    in.data = self_part(call);
    in.numel = out.numel;
    out.ndim = in.ndim = 1;
    out.shape[0] = in.shape[0] = in.numel;
    out.stride[0] = in.stride[0] = 1;
    return work->code = ops->copy(&out, &in);
}

const ds_transport ds_transport_self = {
    .name = "self",
    .open = self_open,
    .split = self_split,
    .close = self_close,
    /* send and receive stay empty: there is nobody else, and check_call() says so */
    .start = {[DS_ALL_REDUCE] = self_copy,
              [DS_REDUCE_SCATTER] = self_copy,
              [DS_REDUCE_PARTS] = self_copy,
              [DS_ALL_GATHER] = self_copy,
              [DS_GATHER_PARTS] = self_copy,
              [DS_ALL_TO_ALL] = self_copy,
              [DS_BROADCAST] = self_copy,
              [DS_BARRIER] = self_copy},
};
