/* comm_rounds.c - the collectives of several ranks, in rounds of chunks over a lane.
 *
 * All of them are made of two stages. Scatter: the input is cut into a part a rank, everyone posts
 * for each peer a chunk of that one's part, and takes the chunks of its own, to join them or to keep
 * them. Gather: everyone posts a chunk of its part, and takes those of the others. An all-reduce is
 * both, the gather of a chunk following its scatter while the next chunk is scattered, so that a
 * chunk is still in the cache: each element is read once from memory and written once.
 *
 * Sums are in order of rank whatever the parts, so they have the same bits on every lane.
 */
#include "runner/comm_lane.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/backend.h"
#include "kernels/dtype.h"
#include "kernels/error.h"

typedef struct plan {
    ds_lane *lane;
    const ds_ops *ops;
    const int64_t *cut; /* [size + 1] elements: where the parts begin */
    const char *in;     /* what is scattered, or NULL */
    char *out;          /* what is gathered, or NULL; of all_to_all: where chunks go */
    char *mine;         /* this rank's part: joined here, and gathered from here */
    int dtype, wire;
    int joins, op; /* joins 0: chunks are kept apart (all_to_all) */
    double scale;
    int64_t chunk; /* elements of a part in one round */
} plan;

/* ---- lanes: what all kinds have */

int ds_lane_init(ds_lane *l, const ds_lane_kind *kind, ds_comm *c, int rank, int size, int64_t slot)
{
    int64_t least = (int64_t)size * DS_LANE_LINE;

    *l = (ds_lane){.kind = kind, .comm = c, .rank = rank, .size = size};
    l->slot = slot > least ? slot : least;
    l->round.send = calloc((size_t)size, sizeof *l->round.send);
    l->round.recv = calloc((size_t)size, sizeof *l->round.recv);
    l->round.from = calloc((size_t)size, sizeof *l->round.from);
    l->cut = calloc((size_t)size + 1, sizeof *l->cut);
    if (l->round.send && l->round.recv && l->round.from && l->cut)
        return 0;
    ds_lane_clear(l);
    return ds_fail(DS_ENOMEM, "out of memory: a group of %d ranks", size);
}

void ds_lane_clear(ds_lane *l)
{
    free(l->round.send);
    free(l->round.recv);
    free(l->round.from);
    free(l->cut);
}

#define SPINS 200 /* turns of a few dozen cycles: a peer that computes the same is close behind */
#define YIELDS 0.002   /* s; longer than a thread of OpenMP spins before it gives its core away */
#define LONGEST 0.001  /* s of one sleep */
#define LAST_WORDS 1.0 /* s for what an ended peer had sent to arrive */

int ds_lane_pause(ds_lane *l, ds_patience *p, int peer)
{
    double now, waited;

    if (p->turns++ < SPINS) {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
        return 0;
    }
    now = ds_seconds();
    p->since = p->since ? p->since : now;
    waited = now - p->since;
    if (ds_comm_aborted(l->comm))
        return ds_comm_fail_aborted(l->comm, DS_COLLECTIVES);
    if (l->idle && l->idle(l, peer)) {
        p->gone = p->gone ? p->gone : now;
        if (now - p->gone > LAST_WORDS)
            return ds_fail(DS_ECOMM,
                           "%s: rank %d has ended, and rank %d waits for it (collective "
                           "%lld)",
                           ds_collective_name(l->comm->running), peer, l->rank,
                           (long long)l->comm->number);
    }
    if (waited < YIELDS) {
        sched_yield();
    } else {
        double sleep = waited / 16 < LONGEST ? waited / 16 : LONGEST;
        nanosleep(&(struct timespec){.tv_nsec = (long)(sleep * 1e9)}, NULL);
    }
    return 0;
}

/* ---- chunks */

/* Elements of part r in round k. */
static int64_t piece(const plan *p, int r, int64_t k)
{
    int64_t n = p->cut[r + 1] - p->cut[r] - k * p->chunk;

    return n < 0 ? 0 : n < p->chunk ? n : p->chunk;
}

static ds_tensor row(const void *data, int dtype, int64_t n)
{
    return (ds_tensor){.data = (void *)data,
                       .numel = n,
                       .shape = {n},
                       .stride = {1},
                       .ndim = 1,
                       .dtype = dtype,
                       .dense = 1};
}

static int copy(const plan *p, void *to, int to_dtype, const void *from, int from_dtype, int64_t n)
{
    ds_tensor y = row(to, to_dtype, n), x = row(from, from_dtype, n);

    return n == 0 || to == from ? 0 : p->ops->copy(&y, &x);
}

/* Where element i of a row of p's dtype lies. */
static int64_t at(const plan *p, int64_t i)
{
    return i * ds_bytes_of(p->dtype);
}

static int64_t part_bytes(const ds_lane *l)
{
    return l->slot / l->size / DS_LANE_LINE * DS_LANE_LINE;
}

static ds_round *scatter_round(const plan *p, int64_t k)
{
    ds_round *round = &p->lane->round;
    int me = p->lane->rank;

    round->part = part_bytes(p->lane);
    for (int r = 0; r < p->lane->size; r++) {
        round->send[r] = r == me ? 0 : piece(p, r, k) * ds_bytes_of(p->wire);
        round->recv[r] = r == me ? 0 : piece(p, me, k) * ds_bytes_of(p->wire);
    }
    return round;
}

static int scatter_post(const plan *p, int64_t k)
{
    ds_lane *l = p->lane;
    ds_round *round = scatter_round(p, k);
    char *slot;
    int rc = l->kind->begin(l, &slot);

    for (int r = 0; rc == 0 && r < l->size; r++)
        if (r != l->rank || p->wire != p->dtype) /* one's own is rounded like the others' */
            rc = copy(p, slot + r * round->part, p->wire, p->in + at(p, p->cut[r] + k * p->chunk),
                      p->dtype, piece(p, r, k));
    return rc < 0 ? rc : l->kind->post(l, round);
}

/* What the peers sent goes to its places in the result. (all_to_all: all parts are equally long.) */
static int keep(const plan *p, const ds_round *round, int64_t k)
{
    int rc = 0;

    for (int r = 0; rc == 0 && r < p->lane->size; r++)
        if (r != p->lane->rank)
            rc = copy(p, p->out + at(p, p->cut[r] + k * p->chunk), p->dtype, round->from[r],
                      p->dtype, piece(p, r, k));
    return rc;
}

static int scatter_take(const plan *p, int64_t k)
{
    ds_lane *l = p->lane;
    ds_round *round = scatter_round(p, k);
    int64_t n = piece(p, l->rank, k);
    ds_tensor y = row(p->mine + at(p, k * p->chunk), p->dtype, n);
    int rc = l->kind->take(l, round);

    if (rc < 0)
        return rc;
    if (p->joins && n) {
        if (p->wire == p->dtype)
            round->from[l->rank] = p->in + at(p, p->cut[l->rank] + k * p->chunk);
        rc = p->ops->reduce_ranks(&y, (const void *const *)round->from, p->wire, l->size, p->op,
                                  p->scale);
    }
    if (rc == 0 && !p->joins)
        rc = keep(p, round, k);
    l->kind->drop(l);
    return rc;
}

static ds_round *gather_round(const plan *p, int64_t k)
{
    ds_round *round = &p->lane->round;
    int me = p->lane->rank;

    round->part = 0;
    for (int r = 0; r < p->lane->size; r++) {
        round->send[r] = r == me ? 0 : at(p, piece(p, me, k));
        round->recv[r] = r == me ? 0 : at(p, piece(p, r, k));
    }
    return round;
}

static int gather_post(const plan *p, int64_t k)
{
    ds_lane *l = p->lane;
    ds_round *round = gather_round(p, k);
    char *slot;
    int rc = l->kind->begin(l, &slot);

    if (rc == 0)
        rc = copy(p, slot, p->dtype, p->mine + at(p, k * p->chunk), p->dtype, piece(p, l->rank, k));
    return rc < 0 ? rc : l->kind->post(l, round);
}

static int gather_take(const plan *p, int64_t k)
{
    ds_lane *l = p->lane;
    ds_round *round = gather_round(p, k);
    int rc = l->kind->take(l, round);

    if (rc < 0)
        return rc;
    rc = keep(p, round, k);
    l->kind->drop(l);
    return rc;
}

/* ---- stages */

/* Each stage takes a round behind what it posts, and the gather follows the scatter by one. */
static int run(const plan *p, int64_t rounds)
{
    int scatters = p->in != NULL, gathers = p->out && (p->joins || !scatters);
    int rc = 0;

    for (int64_t k = 0; rc == 0 && k <= rounds + (scatters && gathers); k++) {
        int64_t g = scatters ? k - 1 : k;

        if (scatters && k < rounds)
            rc = scatter_post(p, k);
        if (rc == 0 && scatters && k > 0 && k <= rounds)
            rc = scatter_take(p, k - 1);
        if (rc == 0 && gathers && g >= 0 && g < rounds)
            rc = gather_post(p, g);
        if (rc == 0 && gathers && g > 0)
            rc = gather_take(p, g - 1);
    }
    if (rc == 0 && p->lane->kind->flush)
        rc = p->lane->kind->flush(p->lane);
    return rc;
}

static int meet(ds_lane *l)
{
    ds_round *round = &l->round;
    char *slot;
    int rc = l->kind->begin(l, &slot);

    round->part = 0;
    memset(round->send, 0, (size_t)l->size * sizeof *round->send);
    memset(round->recv, 0, (size_t)l->size * sizeof *round->recv);
    round->meet = 1;
    if (rc == 0)
        rc = l->kind->post(l, round);
    if (rc == 0)
        rc = l->kind->take(l, round);
    round->meet = 0;
    if (rc == 0)
        l->kind->drop(l);
    return rc == 0 && l->kind->flush ? l->kind->flush(l) : rc;
}

/* Chunks as large as the slot allows, and how many the largest part takes. */
static int64_t set_chunk(plan *p)
{
    int64_t size = ds_bytes_of(p->dtype), wire = ds_bytes_of(p->wire), largest = 0, some = 0;
    ds_lane *l = p->lane;

    for (int r = 0; r < l->size; r++) {
        int64_t n = p->cut[r + 1] - p->cut[r];

        largest = n > largest ? n : largest;
        some += n > 0;
    }
    if (p->in)
        p->chunk = part_bytes(l) / (size > wire ? size : wire);
    else
        p->chunk = l->slot / (some ? some : 1) / DS_LANE_LINE * DS_LANE_LINE / size;
    return (largest + p->chunk - 1) / p->chunk;
}

/* N equal parts of `numel` elements, as far as they go. */
static void cut_evenly(ds_lane *l, int64_t numel)
{
    int64_t each = numel / l->size, rest = numel % l->size;

    for (int r = 0; r <= l->size; r++)
        l->cut[r] = r * each + (r < rest ? r : rest);
}

static void cut_for(ds_lane *l, const ds_call *call)
{
    if (call->borders)
        memcpy(l->cut, call->borders, ((size_t)l->size + 1) * sizeof *l->cut);
    else if (call->kind == DS_BROADCAST)
        for (int r = 0; r <= l->size; r++)
            l->cut[r] = r <= call->peer ? 0 : call->out->numel;
    else
        cut_evenly(l, call->kind == DS_ALL_GATHER ? call->out->numel : call->in->numel);
}

/* What goes where. A part that stays with its rank is put there first. */
static int make_plan(plan *p, ds_lane *l, const ds_call *call)
{
    const ds_tensor *t = call->out;
    int me = l->rank;
    char *out = t->data;

    cut_for(l, call);
    *p = (plan){.lane = l, .cut = l->cut, .dtype = t->dtype, .wire = t->dtype, .mine = out};
    p->ops = ds_ops_of(DS_CPU);
    if (!p->ops)
        return DS_ENOSYS;
    if (call->kind != DS_REDUCE_SCATTER &&
        !(call->kind == DS_REDUCE_PARTS && call->out != call->in))
        p->mine += at(p, l->cut[me]);
    switch (call->kind) {
    case DS_ALL_REDUCE:
    case DS_REDUCE_SCATTER:
    case DS_REDUCE_PARTS:
        p->in = call->in->data;
        p->out = call->kind == DS_ALL_REDUCE ? out : NULL;
        p->wire = call->wire;
        p->joins = 1;
        p->op = call->op;
        p->scale = call->scale;
        return 0;
    case DS_ALL_TO_ALL:
        p->in = call->in->data;
        p->out = out;
        return copy(p, p->mine, t->dtype, p->in + at(p, l->cut[me]), t->dtype,
                    l->cut[me + 1] - l->cut[me]);
    case DS_ALL_GATHER:
        p->out = out;
        return copy(p, p->mine, t->dtype, call->in->data, t->dtype, call->in->numel);
    default: /* broadcast, gather_parts */
        p->out = out;
        return 0;
    }
}

static uint64_t sign_of(const ds_lane *l, const ds_call *call)
{
    const ds_tensor *t = call->in ? call->in : call->out;
    const int64_t words[] = {
        call->kind,
        call->op,
        call->peer,
        call->wire,
        t ? t->dtype : -1,
        t ? t->numel : 0,
        call->borders ? (int64_t)ds_comm_hash(call->borders, l->size + 1) : 0,
        l->comm->about,
    };

    return ds_comm_hash(words, sizeof words / sizeof *words);
}

int ds_lane_run(ds_lane *l, const ds_call *call)
{
    plan p;
    int rc;

    l->round.sign = sign_of(l, call);
    l->comm->about = 0;
    if (l->broken)
        return ds_fail(DS_ECOMM, "%s: an earlier collective of this group failed",
                       ds_collective_name(call->kind));
    if (call->kind == DS_BARRIER) {
        rc = meet(l);
    } else {
        rc = make_plan(&p, l, call);
        if (rc == 0)
            rc = run(&p, set_chunk(&p));
    }
    l->broken = rc < 0;
    return rc;
}

int ds_lane_share(ds_lane *l, const void *mine, void *all, int64_t bytes)
{
    ds_tensor in = row(mine, DS_U8, bytes), out = row(all, DS_U8, bytes * l->size);

    return ds_lane_run(l, &(ds_call){.kind = DS_ALL_GATHER, .out = &out, .in = &in});
}
