/* comm_mpi.c - several ranks: MPI starts and ends the job, and carries messages between any two.
 *
 * MPI is used for little: no communicators, no collectives after the start. A group is a list of
 * ranks and a tag, and its collectives go in rounds (comm_rounds.c) over shared memory where its
 * ranks have that, over the lane of messages below where they do not: the same bits. So every wait
 * is a loop of ours, which sees an abort and a peer that has ended. DS_COMM=p2p or shm forces one.
 *
 * The only file that includes MPI's header.
 */
#include "runner/comm_lane.h"

#include <mpi.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/error.h"
#include "runner/rank.h"

#define SLOT (1 << 20)            /* bytes of a lane's slot: what a round sends */
#define PIECE ((int64_t)16 << 20) /* bytes of a message at most; as each is through, it counts */
#define END_TAG 0                 /* "I send nothing more" */
#define WORLD_TAG 2               /* of the group of all; tag + 1 is for send and recv */

/* What a group is to this transport. */
typedef struct group {
    int tag;
    int *ranks; /* [size] in the group of all */
    ds_lane *lane;
} group;

/* MPI's state is the process's. */
static struct {
    enum { CLOSED, OPEN, FAILED, FINISHED } state;
    int rank, size;
    int next_tag;
    int *node;     /* [size] the same for ranks on the same host */
    char *ended;   /* [size] who sent END_TAG */
    ds_lane *lane; /* of the group of all */
} job;

static int mpi_failed(const ds_comm *c, int code)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int length;

    MPI_Error_string(code, text, &length);
    return ds_fail(DS_ECOMM,
                   "%s: %s; did all ranks call the same, with the same sizes? DS_CHECK=comm tells",
                   ds_collective_name(c->running), text);
}

/* ---- waiting */

/* Takes what ranks say last. */
static void take_ends(void)
{
    MPI_Status status;
    int some = 1;

    while (some && MPI_Iprobe(MPI_ANY_SOURCE, END_TAG, MPI_COMM_WORLD, &some, &status) == 0)
        if (some && MPI_Recv(NULL, 0, MPI_BYTE, status.MPI_SOURCE, END_TAG, MPI_COMM_WORLD,
                             MPI_STATUS_IGNORE) == 0)
            job.ended[status.MPI_SOURCE] = 1;
}

static int idle(ds_lane *l, int peer)
{
    const group *g = l->comm->state[DS_CPU];

    ds_comm_waits_for(g->ranks[peer]);
    take_ends();
    if (job.lane && job.lane->kind->warned && job.lane->kind->warned(job.lane))
        ds_comm_abort(l->comm, "another rank ended it");
    return job.ended[g->ranks[peer]];
}

/* Until a message to or from `peer` is through; bytes: how long it must be, -1: it is sent. */
static int settle(ds_lane *l, MPI_Request *request, int peer, int64_t bytes)
{
    ds_patience wait = {0};
    MPI_Status status;
    int done = 0, rc = 0, got;

    if (*request == MPI_REQUEST_NULL)
        return 0;
    while (rc == 0 && !done) {
        int code = MPI_Test(request, &done, &status);

        if (code != MPI_SUCCESS)
            return mpi_failed(l->comm, code);
        if (!done)
            rc = ds_lane_pause(l, &wait, peer);
    }
    if (rc < 0 || bytes < 0)
        return rc;
    MPI_Get_count(&status, MPI_BYTE, &got);
    if (got == bytes)
        return 0;
    return ds_fail(DS_ECOMM, "%s: rank %d sent %d bytes, and rank %d expects %lld",
                   ds_collective_name(l->comm->running), peer, got, l->rank, (long long)bytes);
}

/* ---- a lane of messages: slots are this rank's own, and so is memory to receive in */

typedef struct messages {
    ds_lane lane;
    const group *group;
    char *memory; /* [2][DS_LANE_DEPTH][slot]: to send, received; made by the first round */
    MPI_Request *requests; /* [2][DS_LANE_DEPTH][size] */
} messages;

enum { OUT, IN };

static char *memory_of(const messages *m, int which, int64_t round)
{
    return m->memory + (which * DS_LANE_DEPTH + round % DS_LANE_DEPTH) * m->lane.slot;
}

static MPI_Request *requests_of(const messages *m, int which, int64_t round)
{
    return m->requests + (which * DS_LANE_DEPTH + round % DS_LANE_DEPTH) * m->lane.size;
}

static int64_t up_to_line(int64_t bytes)
{
    return (bytes + DS_LANE_LINE - 1) / DS_LANE_LINE * DS_LANE_LINE;
}

/* The messages that this rank sent in a round have left its memory. */
static int sent(messages *m, int64_t round)
{
    int rc = 0;

    for (int r = 0; rc == 0 && r < m->lane.size; r++)
        rc = settle(&m->lane, &requests_of(m, OUT, round)[r], r, -1);
    return rc;
}

static int take_memory(messages *m)
{
    size_t count = 2 * DS_LANE_DEPTH * (size_t)m->lane.size;

    m->memory = malloc(2 * DS_LANE_DEPTH * (size_t)m->lane.slot);
    m->requests = malloc(count * sizeof *m->requests);
    if (!m->memory || !m->requests)
        return ds_fail(DS_ENOMEM, "out of memory: messages between %d ranks", m->lane.size);
    for (size_t i = 0; i < count; i++)
        m->requests[i] = MPI_REQUEST_NULL;
    return 0;
}

static int messages_begin(ds_lane *l, char **slot)
{
    messages *m = (messages *)l;
    int rc = m->memory ? sent(m, l->posted) : take_memory(m);

    if (rc == 0)
        *slot = memory_of(m, OUT, l->posted);
    return rc;
}

static int messages_post(ds_lane *l, const ds_round *round)
{
    messages *m = (messages *)l;
    MPI_Request *out = requests_of(m, OUT, l->posted), *in = requests_of(m, IN, l->posted);
    char *to = memory_of(m, IN, l->posted), *from = memory_of(m, OUT, l->posted);
    int code = MPI_SUCCESS;

    for (int r = 0; code == MPI_SUCCESS && r < l->size; r++) {
        int peer = m->group->ranks[r];

        if (r == l->rank)
            continue;
        if (round->recv[r] || round->meet)
            code = MPI_Irecv(to, (int)round->recv[r], MPI_BYTE, peer, m->group->tag, MPI_COMM_WORLD,
                             &in[r]);
        if (code == MPI_SUCCESS && (round->send[r] || round->meet))
            code = MPI_Isend(from + r * round->part, (int)round->send[r], MPI_BYTE, peer,
                             m->group->tag, MPI_COMM_WORLD, &out[r]);
        to += up_to_line(round->recv[r]);
        ds_comm_moved(l->comm, round->send[r]);
    }
    l->posted++;
    return code == MPI_SUCCESS ? 0 : mpi_failed(l->comm, code);
}

static int messages_take(ds_lane *l, const ds_round *round)
{
    messages *m = (messages *)l;
    char *at = memory_of(m, IN, l->dropped);
    int rc = 0;

    for (int r = 0; rc == 0 && r < l->size; r++) {
        round->from[r] = at;
        rc = settle(l, &requests_of(m, IN, l->dropped)[r], r, round->recv[r]);
        at += up_to_line(round->recv[r]);
    }
    round->from[l->rank] = memory_of(m, OUT, l->dropped) + l->rank * round->part;
    return rc;
}

static void messages_drop(ds_lane *l)
{
    l->dropped++;
}

/* A rank that returns may not look at its messages for long. */
static int messages_flush(ds_lane *l)
{
    messages *m = (messages *)l;
    int rc = 0;

    for (int64_t round = 0; m->memory && rc == 0 && round < DS_LANE_DEPTH; round++)
        rc = sent(m, round);
    return rc;
}

static void messages_close(ds_lane *l)
{
    messages *m = (messages *)l;

    if (!l->broken) { /* else MPI may still write there */
        free(m->memory);
        free(m->requests);
    }
    ds_lane_clear(l);
    free(m);
}

static const ds_lane_kind message_kind = {
    .name = "p2p",
    .begin = messages_begin,
    .post = messages_post,
    .take = messages_take,
    .drop = messages_drop,
    .flush = messages_flush,
    .close = messages_close,
};

static int messages_open(ds_lane **out, ds_comm *c, const group *g)
{
    messages *m = calloc(1, sizeof *m);
    int rc;

    if (!m)
        return ds_fail(DS_ENOMEM, "out of memory: a group of %d ranks", c->size);
    rc = ds_lane_init(&m->lane, &message_kind, c, c->rank, c->size, SLOT);
    if (rc < 0) {
        free(m);
        return rc;
    }
    m->lane.idle = idle;
    m->group = g;
    *out = &m->lane;
    return 0;
}

/* ---- groups */

static void mpi_close(ds_comm *c);

static int choose_lane(ds_comm *c, group *g)
{
    const char *forced = getenv("DS_COMM");
    ds_lane *shared = NULL;
    int any = !forced || !*forced, rc;

    if (!any && strcmp(forced, "shm") != 0 && strcmp(forced, "p2p") != 0)
        return ds_fail(DS_EINVAL, "DS_COMM=%s: there are shm and p2p", forced);
    rc = messages_open(&g->lane, c, g);
    if (rc < 0 || c->size == 1)
        return rc;
    if (c->local_size < c->size) /* all ranks see that alike */
        return !any && !strcmp(forced, "shm")
                   ? ds_fail(DS_ECOMM, "DS_COMM=shm: the %d ranks are not on one machine", c->size)
                   : 0;
    rc = ds_shm_open(&shared, g->lane, any || !strcmp(forced, "shm"));
    if (rc < 0)
        return rc;
    if (shared) {
        g->lane->kind->close(g->lane);
        g->lane = shared;
    } else if (!any && !strcmp(forced, "shm")) {
        return ds_fail(DS_ECOMM,
                       "DS_COMM=shm: the %d ranks cannot open each other's memory; "
                       "without it they send messages",
                       c->size);
    }
    return 0;
}

/* The group of these ranks, of which this one is number c->rank; takes `ranks`. */
static int make_group(ds_comm *c, int *ranks, int tag)
{
    group *g = calloc(1, sizeof *g);
    int rc;

    if (!g) {
        free(ranks);
        return ds_fail(DS_ENOMEM, "out of memory: a group of %d ranks", c->size);
    }
    *g = (group){.tag = tag, .ranks = ranks};
    c->state[DS_CPU] = g;
    for (int r = 0; r < c->size; r++) {
        int here = job.node[ranks[r]] == job.node[job.rank];

        c->local_size += here;
        c->local_rank += here && r < c->rank;
    }
    rc = choose_lane(c, g);
    if (rc < 0 && tag != WORLD_TAG)
        mpi_close(c);
    return rc;
}

/* What dsrun launched knows it from dsrun; so in such a job every message is under the watchdog's
 * eye. */
static int know_hosts(void)
{
    const char *hosts = getenv("DSRUN_SIDE") ? getenv("DSRUN_HOSTS") : NULL;
    int lowest = job.rank;
    MPI_Comm host;

    job.node = malloc((size_t)job.size * sizeof *job.node);
    job.ended = calloc((size_t)job.size, 1);
    if (!job.node || !job.ended)
        return ds_fail(DS_ENOMEM, "out of memory: %d ranks", job.size);
    for (int r = 0; hosts && r < job.size; r++)
        job.node[r] = ds_rank_hosts(hosts, r);
    if (hosts)
        return 0;
    if (MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host) ||
        MPI_Bcast(&lowest, 1, MPI_INT, 0, host) || MPI_Comm_free(&host) ||
        MPI_Allgather(&lowest, 1, MPI_INT, job.node, 1, MPI_INT, MPI_COMM_WORLD))
        return ds_fail(DS_ECOMM, "MPI could not tell which ranks are on which host");
    return 0;
}

static void let_it_fail(int signal)
{
    (void)signal;
}

/* A peer that has ended is an error of the write, and known by other means; at the job's end it is
 * not even that. A handler, unlike SIG_IGN, is not left to programs that the script starts. */
static void survive_closed_pipes(void)
{
    struct sigaction action = {.sa_handler = let_it_fail, .sa_flags = SA_RESTART | SA_ONSTACK};

    sigaction(SIGPIPE, &action, NULL);
}

/* Ranks of one machine need no network: the libraries of those that Open MPI would try take 0.1 s
 * each to load. All ranks decide alike. */
static void leave_networks_out(void)
{
    ds_rank rank;

    ds_rank_find(&rank);
    if (rank.local_size == rank.size)
        setenv("OMPI_MCA_pml", "ob1", 0);
}

static int mpi_open(ds_comm *world)
{
    ds_rank launched;
    int provided, rc, *all;

    ds_rank_find(&launched);
    if (job.state != CLOSED)
        return ds_fail(DS_ECOMM, "the job of several ranks was ended; it begins once a process");
    leave_networks_out();
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS)
        return ds_fail(DS_ECOMM, "MPI could not start");
    job.state = OPEN;
    survive_closed_pipes();
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &job.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &job.size);
    if (job.size != launched.size)
        return ds_fail(DS_ECOMM,
                       "the environment says that %d ranks were started (OMPI_COMM_WORLD_SIZE, "
                       "PMI_SIZE or SLURM_STEP_NUM_TASKS), but MPI knows of %d; with srun: "
                       "--mpi=pmix",
                       launched.size, job.size);
    rc = know_hosts();
    if (rc < 0)
        return rc;
    all = malloc((size_t)job.size * sizeof *all);
    if (!all)
        return ds_fail(DS_ENOMEM, "out of memory: %d ranks", job.size);
    for (int r = 0; r < job.size; r++)
        all[r] = r;
    world->rank = job.rank;
    world->size = job.size;
    job.next_tag = WORLD_TAG + 2;
    rc = make_group(world, all, WORLD_TAG);
    if (rc == 0)
        job.lane = ((group *)world->state[DS_CPU])->lane;
    return rc;
}

typedef struct choice {
    int color, key, tag;
} choice;

/* Ranks of the same colour by key, then by rank; returns how many. */
static int pick(int *picked, const choice *all, int size, int color)
{
    int n = 0;

    for (int r = 0; r < size; r++) {
        int i = n;

        if (all[r].color != color)
            continue;
        for (; i > 0 && all[picked[i - 1]].key > all[r].key; i--)
            picked[i] = picked[i - 1];
        picked[i] = r;
        n++;
    }
    return n;
}

/* A tag that no member uses: two ranks that are together in several groups tell messages apart. */
static int mpi_split(ds_comm *out, ds_comm *parent, int color, int key)
{
    const group *from = parent->state[DS_CPU];
    choice mine = {color, key, job.next_tag}, *all = calloc((size_t)parent->size, sizeof *all);
    int *ranks = calloc((size_t)parent->size, sizeof *ranks);
    int rc = all && ranks ? ds_lane_share(from->lane, &mine, all, sizeof mine)
                          : ds_fail(DS_ENOMEM, "out of memory: a group of ranks");

    if (rc == 0 && color >= 0) {
        out->size = pick(ranks, all, parent->size, color);
        for (int i = 0; i < out->size; i++) {
            mine.tag = all[ranks[i]].tag > mine.tag ? all[ranks[i]].tag : mine.tag;
            if (ranks[i] == parent->rank)
                out->rank = i;
            ranks[i] = from->ranks[ranks[i]];
        }
        job.next_tag = mine.tag + 2;
        rc = make_group(out, ranks, mine.tag);
        ranks = NULL;
    }
    free(all);
    free(ranks);
    return rc;
}

static int all_ended(void)
{
    for (int r = 0; r < job.size; r++)
        if (r != job.rank && !job.ended[r])
            return 0;
    return 1;
}

/* Tells all others that this rank waits for nobody any more, and waits until they have said the same
 * (MPI's own end would wait for them, too, but not for messages that are under way: their sender
 * would abort). */
static void finish(void)
{
    const struct timespec moment = {.tv_nsec = 200000};

    for (int r = 0; r < job.size; r++) {
        MPI_Request request;

        if (r != job.rank &&
            MPI_Isend(NULL, 0, MPI_BYTE, r, END_TAG, MPI_COMM_WORLD, &request) == 0)
            MPI_Request_free(&request);
    }
    for (take_ends(); !all_ended(); take_ends())
        nanosleep(&moment, NULL);
    MPI_Finalize();
    free(job.node);
    free(job.ended);
    job.state = FINISHED;
}

static void mpi_close(ds_comm *c)
{
    group *g = c->state[DS_CPU];
    int world;

    if (!g)
        return;
    world = g->tag == WORLD_TAG;
    if (world)
        job.lane = NULL;
    if (g->lane)
        g->lane->kind->close(g->lane);
    free(g->ranks);
    free(g);
    c->state[DS_CPU] = NULL;
    if (world && job.state == OPEN)
        finish();
}

static void mpi_abort(ds_comm *c, const char *why)
{
    const group *g = c->state[DS_CPU];

    (void)why;
    if (g && g->lane->kind->warn)
        g->lane->kind->warn(g->lane);
}

/* Ending with a code, and without MPI_Finalize, is how mpirun and srun are told that the job failed;
 * they end the others. MPI_Abort does the same and prints a text, on whose way the PMIx inside mpirun
 * 4.1 can lock itself up for ever. */
static void mpi_quit(ds_comm *world, int code)
{
    (void)world, (void)code;
    job.state = FAILED;
}

/* ---- collectives, and messages between two */

static int collective(ds_comm *c, const ds_call *call, ds_work *work)
{
    const group *g = c->state[DS_CPU];

    work->done = 1;
    return work->code = ds_lane_run(g->lane, call);
}

/* A tensor that is under way, in pieces that MPI can count. */
typedef struct parcel {
    ds_tensor tensor; /* a reference of its own: the memory stays until the work is done */
    int64_t bytes;
    int peer, receives, count;
    MPI_Request requests[];
} parcel;

static int64_t piece_of(const parcel *p, int i)
{
    int64_t rest = p->bytes - i * PIECE;

    return rest < PIECE ? rest : PIECE;
}

static int start_parcel(ds_comm *c, const ds_tensor *t, int peer, int receives, ds_work *work)
{
    const group *g = c->state[DS_CPU];
    int64_t bytes = t->numel * ds_dtype_size(t->dtype);
    int count = bytes ? (int)((bytes + PIECE - 1) / PIECE) : 1, code = MPI_SUCCESS;
    parcel *p = calloc(1, sizeof *p + (size_t)count * sizeof *p->requests);

    work->done = 1;
    if (!p)
        return work->code = ds_fail(DS_ENOMEM, "out of memory: a message");
    *p = (parcel){.bytes = bytes, .peer = peer, .receives = receives, .count = count};
    if (t->storage && (work->code = ds_alias(&p->tensor, t)) < 0) {
        free(p);
        return work->code;
    }
    for (int i = 0; code == MPI_SUCCESS && i < count; i++) {
        char *at = (char *)t->data + i * PIECE;
        int n = (int)piece_of(p, i), to = g->ranks[peer], tag = g->tag + 1;

        code = receives ? MPI_Irecv(at, n, MPI_BYTE, to, tag, MPI_COMM_WORLD, &p->requests[i])
                        : MPI_Isend(at, n, MPI_BYTE, to, tag, MPI_COMM_WORLD, &p->requests[i]);
    }
    if (code != MPI_SUCCESS)
        return work->code = mpi_failed(c, code);
    work->state = p;
    work->done = 0;
    return 0;
}

static int mpi_send(ds_comm *c, const ds_call *call, ds_work *work)
{
    return start_parcel(c, call->in, call->peer, 0, work);
}

static int mpi_recv(ds_comm *c, const ds_call *call, ds_work *work)
{
    return start_parcel(c, call->out, call->peer, 1, work);
}

static int mpi_progress(ds_work *work, int block)
{
    const group *g = work->comm->state[DS_CPU];
    parcel *p = work->state;
    int ready = 1;

    for (int i = 0; i < p->count && !block && ready; i++)
        if (MPI_Request_get_status(p->requests[i], &ready, MPI_STATUS_IGNORE) != MPI_SUCCESS)
            ready = 1; /* settle() says what is wrong */
    if (!ready)
        return ds_comm_aborted(work->comm) ? ds_comm_fail_aborted(work->comm, work->kind) : 0;
    for (int i = 0; i < p->count && work->code == 0; i++) {
        work->code = settle(g->lane, &p->requests[i], p->peer, p->receives ? piece_of(p, i) : -1);
        if (!p->receives && work->code == 0)
            ds_comm_moved(work->comm, piece_of(p, i));
    }
    work->done = 1;
    if (work->code == 0) { /* else MPI may still use that memory */
        if (p->tensor.storage)
            ds_release(&p->tensor);
        free(p);
    }
    return work->code;
}

const ds_transport ds_transport_mpi = {
    .name = "mpi",
    .open = mpi_open,
    .split = mpi_split,
    .close = mpi_close,
    .start = {[DS_ALL_REDUCE] = collective,
              [DS_REDUCE_SCATTER] = collective,
              [DS_REDUCE_PARTS] = collective,
              [DS_ALL_GATHER] = collective,
              [DS_GATHER_PARTS] = collective,
              [DS_ALL_TO_ALL] = collective,
              [DS_BROADCAST] = collective,
              [DS_BARRIER] = collective,
              [DS_SEND] = mpi_send,
              [DS_RECV] = mpi_recv},
    .progress = mpi_progress,
    .abort = mpi_abort,
    .quit = mpi_quit,
};
