/* comm_nccl_plan.c - which of NCCL's calls, and which kernels, a collective is made of.
 *
 * Elements lie in parts, one a rank: those of the call's borders, or even ones, or (all_reduce) every
 * part is the whole. Where parts are even NCCL has one call; uneven ones are a group of calls, each with
 * its part's owner as root. A reduction may be done in order of rank instead: all parts are sent to their
 * owners, and a kernel joins them.
 *
 * A factor (of a mean, or the call's scale) is NCCL's affair where that rounds no more than it must:
 * in f32 and f64, or where it is a power of two. Else a kernel multiplies the sum, once. It also does
 * where each rank gets a part of a sum out of registered memory, as NCCL does not use that in sums with
 * factors of their own (2.20 to 2.30), and a part is little work; but not in f16, whose range the sum
 * might leave.
 */
#include "runner/comm_nccl.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { OUTPUT = 1, SENT = 2, ROOM = 3 }; /* of a flight's tensors */

/* ---- parts */

static int is_whole(const ds_call *call)
{
    return call->kind == DS_ALL_REDUCE || call->kind == DS_BROADCAST;
}

/* How many elements are cut into parts. */
static int64_t elements(const ds_call *call)
{
    return call->kind == DS_ALL_GATHER || !call->in ? call->out->numel : call->in->numel;
}

static int64_t first(const ds_nccl_plan *p, int r)
{
    if (p->call->borders)
        return p->call->borders[r];
    return is_whole(p->call) ? 0 : elements(p->call) / p->c->size * r;
}

static int64_t count(const ds_nccl_plan *p, int r)
{
    if (p->call->borders)
        return p->call->borders[r + 1] - p->call->borders[r];
    return is_whole(p->call) ? elements(p->call) : elements(p->call) / p->c->size;
}

static int is_even(const ds_nccl_plan *p)
{
    for (int r = 1; r < p->c->size; r++)
        if (count(p, r) != count(p, 0))
            return 0;
    return 1;
}

static const char *part_of(const ds_nccl_plan *p, int r)
{
    return p->in + first(p, r) * p->size;
}

/* ---- before */

static ds_tensor row(void *data, int dtype, int64_t n)
{
    return (ds_tensor){.data = data,
                       .numel = n,
                       .shape = {n},
                       .stride = {1},
                       .ndim = 1,
                       .dtype = dtype,
                       .device = DS_CUDA,
                       .dense = 1};
}

static int reduces(const ds_call *call)
{
    return call->kind == DS_ALL_REDUCE || call->kind == DS_REDUCE_SCATTER ||
           call->kind == DS_REDUCE_PARTS;
}

/* NaN wins in maxima and minima, and NCCL drops it; f64 has no kernel to do better. */
static int wants_order(const ds_call *call)
{
    const char *exact = getenv("DS_NCCL_EXACT");

    if (call->wire > DS_F16)
        return 0;
    return call->op == DS_MAX || call->op == DS_MIN || (exact && !strcmp(exact, "1"));
}

/* What is sent is rounded to another type. */
static int round_input(ds_nccl_plan *p)
{
    const ds_ops *ops = ds_ops_of(DS_CUDA);
    ds_tensor *sent = &p->flight->held[SENT], to, from;
    int64_t n = p->call->in->numel;

    if (!ops || !ops->copy)
        return ds_fail(DS_ENOSYS, "this build has no copy kernel");
    DS_TRY(ds_nccl_empty(sent, p->c, p->type, n));
    to = row(sent->data, p->type, n);
    from = row(p->call->in->data, p->call->in->dtype, n);
    p->in = sent->data;
    return ops->copy(&to, &from);
}

/* n parts, `stride` bytes apart, but for this rank's own, are joined when they are there. */
static int join_later(ds_nccl_plan *p, const char *parts, int64_t stride, int n, int op,
                      double scale)
{
    ds_nccl_flight *f = p->flight;

    f->parts = malloc((size_t)n * sizeof *f->parts);
    if (!f->parts)
        return ds_fail(DS_ENOMEM, "out of memory: parts of %d ranks", n);
    for (int r = 0; r < n; r++)
        f->parts[r] = n > 1 && r == p->c->rank ? part_of(p, r) : parts + r * stride;
    f->n = n;
    f->dtype = p->type;
    f->op = op;
    f->scale = scale;
    f->joined = row(p->out, p->call->out->dtype, count(p, p->c->rank));
    return 0;
}

static int prepare_in_order(ds_nccl_plan *p)
{
    int64_t own = count(p, p->c->rank), n = own * p->c->size;
    ds_tensor *room = &p->flight->held[ROOM];

    p->in_order = 1;
    DS_TRY(ds_nccl_empty(room, p->c, p->type, n));
    return join_later(p, room->data, own * p->size, p->c->size, p->call->op, p->call->scale);
}

static int is_power_of_two(double x)
{
    int exponent;

    return frexp(x, &exponent) == 0.5;
}

static int prepare_reduction(ds_nccl_plan *p)
{
    static const ncclRedOp_t ops[DS_REDUCTIONS] = {
        [DS_SUM] = ncclSum, [DS_MEAN] = ncclSum, [DS_MAX] = ncclMax, [DS_MIN] = ncclMin};
    const ds_call *call = p->call;
    double factor = call->op == DS_MEAN ? call->scale / p->c->size : call->scale;
    int later = p->c->shared && call->kind != DS_ALL_REDUCE &&
                (call->wire == DS_F32 || call->wire == DS_BF16);
    int before =
        factor == 1 ||
        (!later && (call->wire == DS_F32 || call->wire == DS_F64 || is_power_of_two(factor)));
    int64_t own = first(p, p->c->rank);

    p->type = call->wire;
    p->size = ds_bytes_of(p->type);
    if (call->kind == DS_REDUCE_PARTS && call->out == call->in)
        p->out += own * ds_bytes_of(call->out->dtype);
    if (p->type != call->in->dtype)
        DS_TRY(round_input(p));
    if (wants_order(call))
        return prepare_in_order(p);
    p->op = ops[call->op];
    p->factor = before ? factor : 1;
    if (before && p->type == call->out->dtype)
        return 0;
    if (p->type != call->out->dtype) { /* where it was rounded NCCL reduces in place */
        char *sum = (char *)p->in + own * p->size;

        DS_TRY(join_later(p, sum, 0, 1, DS_SUM, before ? 1 : factor));
        p->out = sum;
        return 0;
    }
    return join_later(p, p->out, 0, 1, DS_SUM, factor);
}

int ds_nccl_prepare(ds_nccl_plan *p, ds_nccl_flight *f, ds_comm *c, const ds_call *call)
{
    const ds_tensor *t = call->out;

    *p = (ds_nccl_plan){.c = c,
                        .call = call,
                        .flight = f,
                        .in = call->in ? call->in->data : t->data,
                        .out = t->data,
                        .type = t->dtype,
                        .size = ds_bytes_of(t->dtype),
                        .factor = 1};
    return reduces(call) ? prepare_reduction(p) : 0;
}

/* ---- NCCL's calls */

static int goes_on(ncclResult_t code)
{
    return code == ncclSuccess || code == ncclInProgress;
}

/* Calls inside a group do nothing until its end, which every group needs. */
static ncclResult_t end_group(ncclResult_t code)
{
    ncclResult_t end = ds_nccl.GroupEnd();

    return goes_on(code) ? end : code;
}

static ncclResult_t reduce_parts(const ds_nccl_plan *p, ncclComm_t comm, cudaStream_t stream)
{
    ncclDataType_t type = ds_nccl_type(p->type);
    ncclResult_t code;

    if (is_even(p))
        return ds_nccl.ReduceScatter(part_of(p, 0), p->out, (size_t)count(p, 0), type, p->op, comm,
                                     stream);
    code = ds_nccl.GroupStart();
    for (int r = 0; r < p->c->size && goes_on(code); r++)
        if (count(p, r))
            code = ds_nccl.Reduce(part_of(p, r), r == p->c->rank ? p->out : NULL,
                                  (size_t)count(p, r), type, p->op, r, comm, stream);
    return end_group(code);
}

static ncclResult_t gather_parts(const ds_nccl_plan *p, ncclComm_t comm, cudaStream_t stream)
{
    ncclDataType_t type = ds_nccl_type(p->type);
    ncclResult_t code;

    if (is_even(p))
        return ds_nccl.AllGather(part_of(p, p->c->rank), (void *)part_of(p, 0), (size_t)count(p, 0),
                                 type, comm, stream);
    code = ds_nccl.GroupStart();
    for (int r = 0; r < p->c->size && goes_on(code); r++)
        if (count(p, r))
            code = ds_nccl.Broadcast(part_of(p, r), (void *)part_of(p, r), (size_t)count(p, r),
                                     type, r, comm, stream);
    return end_group(code);
}

/* Every part to its owner: `to` has room for as many elements of each rank as this one's part has. */
static ncclResult_t exchange(const ds_nccl_plan *p, char *to, ncclComm_t comm, cudaStream_t stream)
{
    ncclDataType_t type = ds_nccl_type(p->type);
    int64_t own = count(p, p->c->rank);
    ncclResult_t code = ds_nccl.GroupStart();

    for (int r = 0; r < p->c->size && goes_on(code); r++) {
        if (r == p->c->rank)
            continue;
        if (count(p, r))
            code = ds_nccl.Send(part_of(p, r), (size_t)count(p, r), type, r, comm, stream);
        if (own && goes_on(code))
            code = ds_nccl.Recv(to + r * own * p->size, (size_t)own, type, r, comm, stream);
    }
    return end_group(code);
}

static ncclResult_t all_to_all(const ds_nccl_plan *p, ncclComm_t comm, cudaStream_t stream)
{
    int me = p->c->rank;

    if (cudaMemcpyAsync(p->out + first(p, me) * p->size, part_of(p, me),
                        (size_t)(count(p, me) * p->size), cudaMemcpyDeviceToDevice,
                        stream) != cudaSuccess)
        return ncclUnhandledCudaError;
    return exchange(p, p->out, comm, stream);
}

static ncclResult_t call_nccl(const ds_nccl_plan *p, ncclComm_t comm, cudaStream_t stream)
{
    ncclDataType_t type = ds_nccl_type(p->type);

    if (p->in_order)
        return exchange(p, p->flight->held[ROOM].data, comm, stream);
    switch (p->call->kind) {
    case DS_ALL_REDUCE:
        return ds_nccl.AllReduce(p->in, p->out, (size_t)elements(p->call), type, p->op, comm,
                                 stream);
    case DS_REDUCE_SCATTER:
    case DS_REDUCE_PARTS:
        return reduce_parts(p, comm, stream);
    case DS_ALL_GATHER:
        return ds_nccl.AllGather(p->in, p->out, (size_t)p->call->in->numel, type, comm, stream);
    case DS_GATHER_PARTS:
        return gather_parts(p, comm, stream);
    case DS_ALL_TO_ALL:
        return all_to_all(p, comm, stream);
    default:
        return ds_nccl.Broadcast(p->in, p->out, (size_t)elements(p->call), type, p->call->peer,
                                 comm, stream);
    }
}

/* The factor as a number of the type that travels. */
static ncclResult_t make_op(ds_nccl_plan *p, ncclComm_t comm)
{
    float f32 = (float)p->factor;
    uint16_t bf16 = ds_f32_to_bf16(f32), f16 = ds_f32_to_f16(f32);
    void *const scalars[] = {
        [DS_F32] = &f32, [DS_BF16] = &bf16, [DS_F16] = &f16, [DS_F64] = &p->factor};

    return ds_nccl.RedOpCreatePreMulSum(&p->op, scalars[p->type], ds_nccl_type(p->type),
                                        ncclScalarHostImmediate, comm);
}

int ds_nccl_run(ds_nccl_plan *p)
{
    ds_nccl_link *l = p->flight->link;
    ncclResult_t code = ncclRemoteError;
    int rc;

    ds_nccl_lock();
    if (l->comm)
        code = p->factor == 1 ? ncclSuccess : make_op(p, l->comm);
    if (code == ncclSuccess)
        code = call_nccl(p, l->comm, l->stream);
    ds_nccl_unlock();
    rc = ds_nccl_settle(l, p->c, p->call->kind, code, 1);
    ds_nccl_lock();
    if (p->factor != 1 && l->comm && rc > 0)
        ds_nccl.RedOpDestroy(p->op, l->comm);
    ds_nccl_unlock();
    return rc < 0 ? rc : 0;
}

int64_t ds_nccl_sends(const ds_nccl_plan *p)
{
    int64_t others = p->c->size - 1, own = count(p, p->c->rank), all = 0;

    for (int r = 0; r < p->c->size; r++)
        all += count(p, r);
    switch (p->call->kind) {
    case DS_ALL_REDUCE:
        return p->in_order ? own * others * p->size : 2 * own * p->size / p->c->size * others;
    case DS_ALL_GATHER:
    case DS_GATHER_PARTS:
        return own * others * p->size;
    case DS_BROADCAST:
        return p->c->rank == p->call->peer ? own * others * p->size : 0;
    default:
        return (all - own) * p->size;
    }
}
