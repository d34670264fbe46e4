/* comm.h - what a transport fills in so that ranks can talk: the second of the two vtables.
 *
 * comm.c checks arguments, counts collectives and says which is running, once for all transports;
 * a transport moves bytes. A group has one transport a device: shared memory and MPI for tensors on
 * the CPU, NCCL for those on GPUs, which is looked for when the first of those comes. With one rank
 * both are `self`, and MPI is never initialised.
 *
 * To add a transport: a file comm_<name>.c with a ds_transport, one line in comm.c's list.
 */
#ifndef DS_COMM_H
#define DS_COMM_H

#include <stdatomic.h>

#include "runner/ds.h"

enum ds_collective {
    DS_ALL_REDUCE,
    DS_REDUCE_SCATTER,
    DS_REDUCE_PARTS,
    DS_ALL_GATHER,
    DS_GATHER_PARTS,
    DS_ALL_TO_ALL,
    DS_BROADCAST,
    DS_SEND,
    DS_RECV,
    DS_BARRIER,
    DS_SPLIT, /* has a slot of its own in ds_transport */
    DS_COLLECTIVES
};

/* One collective as a rank asks for it, checked: tensors are dense, on one device, of one dtype and
 * of sizes that fit; they stay where they are until the work is done. */
typedef struct ds_call {
    int kind;
    int op;              /* enum ds_reduction; of what reduces */
    int peer;            /* root, receiver or sender; of broadcast, send, recv */
    ds_tensor *out;      /* NULL for send and barrier */
    const ds_tensor *in; /* NULL for broadcast, recv and barrier */
    const int64_t
        *borders; /* [size + 1]; of reduce_parts and gather_parts. Of reduce_parts `out` is
                             * `in`, or this rank's part alone */
    double scale; /* of what reduces */
    int wire;     /* a dtype, of what reduces: addends are rounded to it */
} ds_call;

typedef struct ds_transport {
    const char *name;

    /* This process's place in the job, written to the world's rank, size, local_rank, local_size,
     * and the state of the group of all ranks. */
    int (*open)(ds_comm *world); /* (optional, as are split and close) */
    /* Collective. `out` has its transport set; as open, for the ranks of `parent` with this colour.
     * A negative colour takes part and leaves out->size 0. */
    int (*split)(ds_comm *out, ds_comm *parent, int color, int key);
    void (*close)(ds_comm *c);

    /* Starts a collective. Either it is done when this returns: work->done is set, work->code and
     * the return value are what it came to; or work->state says how to go on. Deterministic: sums
     * are in order of rank. A slot may be empty: "mpi has no all_to_all". */
    int (*start[DS_COLLECTIVES])(ds_comm *c, const ds_call *call, ds_work *work);
    /* Goes on with a work that isn't done; sets done and code. block 0: returns at once. (optional:
     * a transport whose collectives are always done when start returns) */
    int (*progress)(ds_work *work, int block);

    /* Memory of its device that goes from rank to rank without copies in between. share: collective;
     * 1: from now on there is some, and all tensors of this group's collectives lie in it; 0: some rank
     * has none; negative: a failure. (optional, all three) */
    int (*share)(ds_comm *c);
    int (*memory_take)(void **out, size_t bytes);
    void (*memory_give)(void *data);

    /* Wakes whoever waits here and tells the peers; any thread may call it. (optional) */
    void (*abort)(ds_comm *c, const char *why);
    /* This process failed and is about to end with this code: the others shall not wait for it, nor
     * closing for them. (optional) */
    void (*quit)(ds_comm *world, int code);
} ds_transport;

struct ds_comm {
    const ds_transport *transport[DS_META]; /* by device; meta has none */
    void *state[DS_META];                   /* the transport's own, as communicator and buffers */
    int rank, size;
    int local_rank, local_size;
    int shared;    /* its tensors on CUDA lie in the set DS_MEMORY_SHARED */
    int64_t about; /* what the next collective is about; 0: nothing in particular */

    /* What a watchdog thread may read at any time. */
    _Atomic int64_t calls;  /* collectives begun so far */
    _Atomic int running;    /* kind of the one that this rank is inside; DS_COLLECTIVES: none */
    _Atomic int64_t number; /* and its number, as in ds_work */
    _Atomic int64_t bytes;  /* moved so far by this rank; a transport adds to it as it goes */
    _Atomic int aborted;
};

extern const ds_transport ds_transport_self, ds_transport_mpi;

/* Between GPUs: the CUDA plugin's (devices.c). NULL: it has none, ds_error() says why. */
#define DS_CUDA_TRANSPORT "ds_transport_nccl"
const ds_transport *ds_cuda_transport(void);

const char *ds_collective_name(int kind);
const char *ds_reduction_name(int op);

/* Of what a rank calls, to see whether others call the same. */
uint64_t ds_comm_hash(const int64_t *words, int n);

/* Whether the job was ended, through this group or the group of all ranks, and a failure that says
 * so: "all_reduce: the job was ended: rank 2 is lost" (kind DS_COLLECTIVES: the running one). */
int ds_comm_aborted(const ds_comm *c);
int ds_comm_fail_aborted(const ds_comm *c, int kind);

/* Where this process is, for a watchdog; any thread may ask. */
typedef struct ds_comm_place {
    int kind;       /* DS_COLLECTIVES: in none */
    int64_t number; /* of the last collective begun, in its group */
    int64_t calls;  /* collectives of all groups */
    int64_t bytes;  /* sent by this rank, in all groups; goes up while a collective runs */
    int peer; /* the rank, of all, that it last waited for there; -1: for none, or DS_UNSEEN */
} ds_comm_place;
void ds_comm_where(ds_comm_place *out);

/* A peer: it waits for what its device does with others, and how far that is nobody sees. */
enum { DS_UNSEEN = -2 };

/* While the host waits for its device: the collective that the device is in (number 0: some message),
 * which is where this process is then. DS_COLLECTIVES: the device is in none; DS_AWAKE: the host does not
 * wait for it. Any thread may say so. */
enum { DS_AWAKE = -1 };
void ds_comm_device_in(int kind, int64_t number);

/* What a transport says while it waits for that rank; and that it is busy, for longer than a rank may
 * wait while nothing moves. */
void ds_comm_waits_for(int rank);
void ds_comm_prepares(ds_comm *c);

/* What carries its tensors of a device; NULL: nothing does, ds_error() says why. */
const ds_transport *ds_comm_transport(ds_comm *c, int device);

/* ds_comm_shared()'s group, which is the caller's to close now; NULL: there is none. */
ds_comm *ds_comm_forget_shared(void);

/* Whether it is the group of all ranks. */
int ds_comm_is_world(const ds_comm *c);

/* What a transport adds as it sends. */
void ds_comm_moved(ds_comm *c, int64_t bytes);

/* Counts from 0 again: what went before was dsrun's own, and not the script's. */
void ds_comm_count_anew(ds_comm *c);

/* DS_CHECK=comm (comm_check.c): compares what every rank of the group is about to do, so that a
 * difference is an error that names it, on every rank, and not a hang. */
int ds_comm_compare(ds_comm *c, const ds_call *call, int64_t number);

/* The log (comm_log.c). begin: number of the entry that this call goes into; 0: it is not logged. end:
 * it was done after so long. */
int ds_comm_log_begin(const ds_comm *c, const ds_call *call);
void ds_comm_log_end(int number, double seconds);

/* Checks a call and starts it, as the public functions do; for C that keeps calls of its own. */
int ds_comm_start(ds_comm *c, const ds_call *call, ds_work *work);

/* For main(): in a process that is one of several, opens the world and sees to its end, with the
 * job's if the exit code is not 0. Elsewhere does nothing. */
int ds_comm_join(void);

#endif
