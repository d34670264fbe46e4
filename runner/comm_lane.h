/* comm_lane.h - how the ranks of a group hand each other chunks of memory.
 *
 * Collectives (comm_rounds.c) go in rounds: a rank begins one, which gives it a slot to fill, posts
 * it, takes what the peers posted in the same round, and drops it when it has been read. Every rank
 * does the same rounds in the same order, with up to DS_LANE_DEPTH - 1 begun and not yet dropped, so
 * that copying and waiting overlap. What a round waits for was done by the peers earlier in that
 * order: nothing can wait in a circle.
 *
 * There are two kinds of lane: shared memory (comm_shm.c) and messages of MPI (comm_mpi.c).
 */
#ifndef DS_COMM_LANE_H
#define DS_COMM_LANE_H

#include "runner/comm.h"

#define DS_LANE_DEPTH 4 /* slots of a rank */
#define DS_LANE_LINE 64 /* bytes; parts of a slot begin at multiples of it */

typedef struct ds_round {
    int64_t *send; /* [size] bytes for each peer */
    int64_t *recv; /* [size] bytes from each peer, as that one sends them */
    int64_t part;  /* bytes from one peer's part of the slot to the next's; 0: all take the same */
    uint64_t sign; /* of the call: the same where ranks call the same */
    int meet;      /* 1: waits for every peer, even one that sends nothing */
    const char **from; /* [size], out of take: what each sent; [rank]: its own slot's part */
} ds_round;

typedef struct ds_lane ds_lane;

typedef struct ds_lane_kind {
    const char *name;
    int (*begin)(ds_lane *l, char **slot); /* waits until the next slot is free */
    int (*post)(ds_lane *l, const ds_round *round);
    int (*take)(ds_lane *l, const ds_round *round); /* waits for the oldest round not yet dropped */
    void (*drop)(ds_lane *l);
    int (*flush)(ds_lane *l);  /* waits until all is on its way (optional) */
    void (*warn)(ds_lane *l);  /* tells the peers of an abort (optional) */
    int (*warned)(ds_lane *l); /* whether a peer told so (optional) */
    void (*close)(ds_lane *l);
} ds_lane_kind;

struct ds_lane {
    const ds_lane_kind *kind;
    ds_comm *comm;
    int rank, size;
    int64_t slot;            /* bytes; a round sends and receives at most that many */
    int64_t posted, dropped; /* rounds so far */
    int broken;              /* a wait failed: ranks are no longer at the same round */
    ds_round round;          /* memory for the one being made */
    int64_t *cut;            /* [size + 1] likewise */
    /* Keeps messages moving; whether this peer's process has come to its end. (optional) */
    int (*idle)(ds_lane *l, int peer);
};

/* The fields that all kinds have. DS_ENOMEM. */
int ds_lane_init(ds_lane *l, const ds_lane_kind *kind, ds_comm *c, int rank, int size,
                 int64_t slot);
void ds_lane_clear(ds_lane *l);

/* Shared memory between the ranks of a host, agreed on over another lane; collective. *out stays
 * NULL where the ranks do not share any. wanted 0: takes part and says no, so nobody does. */
int ds_shm_open(ds_lane **out, ds_lane *over, int wanted);

/* A collective (all but send and recv), as a transport's start. */
int ds_lane_run(ds_lane *l, const ds_call *call);

/* Every rank's `bytes` bytes, in order of rank, to each. */
int ds_lane_share(ds_lane *l, const void *mine, void *all, int64_t bytes);

/* ---- waiting: while (!there) if ((rc = ds_lane_pause(l, &wait, peer)) < 0) … */

typedef struct ds_patience {
    int turns;
    double since; /* first turn that was more than a pause of the processor */
    double gone;  /* when the peer was seen to have ended */
} ds_patience;

/* DS_ECOMM when there is nothing left to wait for. Spins first, then lets others run, then sleeps
 * for a part of the time waited so far. */
int ds_lane_pause(ds_lane *l, ds_patience *p, int peer);

#endif
