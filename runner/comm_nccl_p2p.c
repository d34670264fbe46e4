/* comm_nccl_p2p.c - messages between two ranks with a GPU each.
 *
 * NCCL does what is asked of a communicator in order, and a message that is sent waits until it is
 * received. So that none waits for another that goes the other way, or to another rank, each direction
 * between two ranks is a lane: a communicator of two ranks in a stream of its own, in which messages
 * arrive in the order in which they were sent. It is made by its first message, for which the sender
 * tells the receiver NCCL's name of it over the CPU's transport. That takes both; so the first messages
 * of a lane are queued, and go on while this rank is in some call about messages.
 */
#include "runner/comm_nccl.h"

#include <sched.h>
#include <stdlib.h>
#include <time.h>

enum { SEND, RECV };

/* A message that is under way. */
typedef struct message {
    struct ds_nccl_lane *lane;
    ds_nccl_flight *flight;
    ds_tensor tensor; /* a copy of the handle; the flight holds the memory */
    int started;      /* it is in the stream */
    int code;
    struct message *next;
} message;

typedef struct ds_nccl_lane {
    enum { NEW, NAMING, CONNECTING, READY, BROKEN } state;
    int direction, peer;
    ds_comm *c;
    ds_nccl_link link;
    ncclUniqueId id;
    ds_tensor name; /* its bytes */
    ds_work naming; /* the message that tells it */
    message *first, *last;
    int code; /* of what broke it */
    struct ds_nccl_lane *next;
} lane;

static lane *unready; /* with messages that wait for their lane */

/* ---- lanes */

static int begin_naming(lane *l)
{
    const ds_call call = {.kind = l->direction == SEND ? DS_SEND : DS_RECV,
                          .peer = l->peer,
                          .in = l->direction == SEND ? &l->name : NULL,
                          .out = l->direction == SEND ? NULL : &l->name};

    DS_TRY(ds_nccl_open());
    if (l->direction == SEND && ds_nccl.GetUniqueId(&l->id) != ncclSuccess)
        return ds_fail(DS_ECOMM, "NCCL finds no network: %s", ds_nccl.GetLastError(NULL));
    l->name = (ds_tensor){.data = &l->id,
                          .numel = sizeof l->id,
                          .shape = {sizeof l->id},
                          .stride = {1},
                          .ndim = 1,
                          .dtype = DS_U8,
                          .device = DS_CPU,
                          .dense = 1};
    l->naming = (ds_work){.comm = l->c, .kind = call.kind, .device = DS_CPU};
    return l->c->transport[DS_CPU]->start[call.kind](l->c, &call, &l->naming);
}

/* As far as it goes without waiting. */
static int advance(lane *l)
{
    int kind = l->direction == SEND ? DS_SEND : DS_RECV, rc;

    if (l->state == NEW) {
        DS_TRY(begin_naming(l));
        l->state = NAMING;
    }
    if (l->state == NAMING) {
        if (!l->naming.done)
            DS_TRY(l->c->transport[DS_CPU]->progress(&l->naming, 0));
        if (!l->naming.done)
            return 0;
        DS_TRY(ds_nccl_connect(&l->link, &l->id, 2, l->direction));
        l->state = CONNECTING;
    }
    if (l->state == CONNECTING) {
        rc = ds_nccl_settle(&l->link, l->c, kind, ncclInProgress, 0);
        if (rc <= 0)
            return rc;
        l->state = READY;
    }
    return 0;
}

/* ---- messages */

static int put(message *m)
{
    ds_nccl_link *l = &m->lane->link;
    int sends = m->lane->direction == SEND, kind = sends ? DS_SEND : DS_RECV, rc;
    const ds_tensor *t = &m->tensor;
    ncclResult_t code = ncclRemoteError;

    DS_TRY(ds_nccl_follow_kernels(l, ds_collective_name(kind)));
    DS_TRY(ds_nccl_begins(l, kind));
    ds_nccl_lock();
    if (l->comm && sends)
        code =
            ds_nccl.Send(t->data, (size_t)t->numel, ds_nccl_type(t->dtype), 1, l->comm, l->stream);
    else if (l->comm)
        code =
            ds_nccl.Recv(t->data, (size_t)t->numel, ds_nccl_type(t->dtype), 0, l->comm, l->stream);
    ds_nccl_unlock();
    rc = ds_nccl_settle(l, m->lane->c, kind, code, 1);
    if (rc < 0)
        return rc;
    DS_TRY(ds_nccl_ends(l, kind, 0));
    if (sends)
        ds_comm_moved(m->lane->c, t->numel * ds_bytes_of(t->dtype));
    return ds_cuda_check(cudaEventRecord(m->flight->done, l->stream), ds_collective_name(kind));
}

/* Starts the messages of a lane, in order, if it is ready. */
static void start_messages(lane *l)
{
    while (l->first && (l->state == READY || l->state == BROKEN)) {
        message *m = l->first;

        m->code = l->state == READY ? put(m) : l->code;
        m->started = 1;
        l->first = m->next;
    }
}

static void advance_all(void)
{
    lane **at = &unready;

    while (*at) {
        lane *l = *at;
        int rc = advance(l);

        if (rc < 0) {
            l->code = rc;
            l->state = BROKEN;
        }
        start_messages(l);
        if (l->first)
            at = &l->next;
        else
            *at = l->next;
    }
}

static lane *lane_of(ds_comm *c, int direction, int peer)
{
    ds_nccl_group *g = ds_nccl_group_of(c);
    lane *lanes;

    if (g && !g->lane[direction]) {
        lanes = calloc((size_t)c->size, sizeof *lanes);
        for (int r = 0; lanes && r < c->size; r++) {
            lanes[r].direction = direction;
            lanes[r].peer = r;
            lanes[r].c = c;
        }
        g->lane[direction] = lanes;
    }
    if (!g || !g->lane[direction]) {
        ds_fail(DS_ENOMEM, "out of memory: messages between %d ranks", c->size);
        return NULL;
    }
    return &g->lane[direction][peer];
}

static int begin(ds_comm *c, const ds_call *call, ds_work *work, int direction)
{
    const ds_tensor *t = direction == SEND ? call->in : call->out;
    lane *l = lane_of(c, direction, call->peer);
    message *m = l ? calloc(1, sizeof *m) : NULL;

    if (!l)
        return DS_ENOMEM;
    if (!m)
        return ds_fail(DS_ENOMEM, "out of memory: a message");
    *m = (message){.lane = l, .tensor = *t};
    work->code = ds_nccl_take_off(&m->flight, &l->link, call);
    if (work->code < 0) {
        free(m);
        return work->code;
    }
    if (l->first) {
        l->last->next = m;
    } else {
        l->first = m;
        if (l->state != READY) {
            l->next = unready;
            unready = l;
        }
    }
    l->last = m;
    work->state = m;
    advance_all();
    start_messages(l);
    return 0;
}

int ds_nccl_message_progress(ds_work *work, int block)
{
    message *m = work->state;
    ds_nccl_flight *f = m->flight;

    advance_all();
    for (int turns = 0; block && !m->started; turns++) {
        const struct timespec moment = {.tv_nsec = 50000};

        if (turns < 1000)
            sched_yield();
        else
            nanosleep(&moment, NULL);
        if (m->lane->state == CONNECTING)
            ds_comm_prepares(work->comm);
        advance_all();
        if (ds_comm_aborted(work->comm))
            m->code = ds_comm_fail_aborted(work->comm, work->kind);
        m->started = m->started || m->code < 0;
    }
    if (!m->started)
        return 0;
    if (m->code < 0) { /* NCCL may still use the memory */
        work->done = 1;
        return work->code = m->code;
    }
    if (!block && cudaEventQuery(f->done) == cudaErrorNotReady && !ds_comm_aborted(work->comm))
        return 0;
    free(m);
    return ds_nccl_arrive(f, work, 1);
}

static int start(ds_comm *c, const ds_call *call, ds_work *work, int direction)
{
    int rc = begin(c, call, work, direction);

    work->done = rc < 0;
    return work->code = rc;
}

int ds_nccl_send(ds_comm *c, const ds_call *call, ds_work *work)
{
    return start(c, call, work, SEND);
}

int ds_nccl_recv(ds_comm *c, const ds_call *call, ds_work *work)
{
    return start(c, call, work, RECV);
}
