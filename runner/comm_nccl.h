/* comm_nccl.h - what the files of the NCCL transport share: the library, and links between ranks.
 *
 * A link is one communicator and the stream that it works in. A group has one for its collectives
 * (comm_nccl.c); messages have one for each direction between two ranks (comm_nccl_p2p.c), so that none
 * waits behind another. All are part of the CUDA plugin.
 */
#ifndef DS_COMM_NCCL_H
#define DS_COMM_NCCL_H

#include <nccl.h>

#include "kernels/cuda/device.h"
#include "runner/comm.h"

/* What is used of NCCL, which is opened when it is first wanted. */
#define DS_NCCL_FUNCTIONS(F)                                                                       \
    F(GetVersion)                                                                                  \
    F(GetUniqueId)                                                                                 \
    F(GetErrorString)                                                                              \
    F(GetLastError)                                                                                \
    F(CommInitRankConfig)                                                                          \
    F(CommGetAsyncError)                                                                           \
    F(CommFinalize)                                                                                \
    F(CommDestroy)                                                                                 \
    F(CommAbort)                                                                                   \
    F(RedOpCreatePreMulSum)                                                                        \
    F(RedOpDestroy)                                                                                \
    F(AllReduce)                                                                                   \
    F(ReduceScatter)                                                                               \
    F(Reduce)                                                                                      \
    F(AllGather)                                                                                   \
    F(Broadcast)                                                                                   \
    F(Send)                                                                                        \
    F(Recv)                                                                                        \
    F(MemAlloc)                                                                                    \
    F(MemFree)                                                                                     \
    F(CommRegister)                                                                                \
    F(CommDeregister)                                                                              \
    F(GroupStart)                                                                                  \
    F(GroupEnd)

typedef struct ds_nccl_library {
#define DS_NCCL_SLOT(name) __typeof__(nccl##name) *name;
    DS_NCCL_FUNCTIONS(DS_NCCL_SLOT)
#undef DS_NCCL_SLOT
    int version; /* 22809 is 2.28.9 */
} ds_nccl_library;
extern ds_nccl_library ds_nccl;

typedef struct ds_nccl_link {
    ncclComm_t comm; /* NULL: there is none yet, or it was ended */
    cudaStream_t stream;
    int ready;                 /* its ranks have found each other */
    ncclResult_t code;         /* what ended it */
    struct ds_nccl_link *next; /* in the list of all */
} ds_nccl_link;

/* Opens the library, or says again why it cannot be opened. */
int ds_nccl_open(void);

/* Begins to connect `size` ranks, of which this is number `rank`; all of them call it with one id. `l`
 * is zeroed, and stays where it is until the process ends. */
int ds_nccl_connect(ds_nccl_link *l, const ncclUniqueId *id, int size, int rank);

/* Around calls that use a link's communicator: nobody ends it meanwhile. */
void ds_nccl_lock(void);
void ds_nccl_unlock(void);

/* 1: what was asked of the link is under way, 0: not yet (block 0 only), or a failure. `code`: what the
 * call that asked returned; NCCL's calls may go on in the background. */
int ds_nccl_settle(ds_nccl_link *l, ds_comm *c, int kind, ncclResult_t code, int block);

/* The stream of the link goes on when all has been done that is queued for kernels now. */
int ds_nccl_follow_kernels(ds_nccl_link *l, const char *what);

/* As slots of a transport; and all links end. */
void ds_nccl_abort(ds_comm *c, const char *why);
void ds_nccl_quit(ds_comm *world, int code);
void ds_nccl_close_all(void);

/* What a group is to this transport. */
typedef struct ds_nccl_group {
    ds_nccl_link link;            /* of its collectives */
    struct ds_nccl_lane *lane[2]; /* [size]: to and from each rank; made by the first message */
} ds_nccl_group;
ds_nccl_group *ds_nccl_group_of(ds_comm *c); /* NULL: out of memory */
/* Makes the communicator of its collectives, if there is none; every rank of it is here. */
int ds_nccl_group_connect(ds_comm *c, ds_nccl_group *g, int kind);
/* Every rank's `bytes` to all, over the CPU's transport. */
int ds_nccl_tell(ds_comm *c, void *mine, void *all, int64_t bytes);

/* ---- registered memory (comm_nccl_share.c) */

/* As slots of a transport. */
int ds_nccl_share(ds_comm *c);
int ds_nccl_memory_take(void **out, size_t bytes);
void ds_nccl_memory_give(void *data);
/* Under the lock, before communicators end. */
void ds_nccl_forget_all(void);
/* Whether all of a tensor lies there; NULL and no elements lie anywhere. */
int ds_nccl_is_shared(const ds_tensor *t);
/* [n] on the GPU, from that memory where the group's collectives need it. */
int ds_nccl_empty(ds_tensor *out, const ds_comm *c, int dtype, int64_t n);

/* ---- where the GPU is (comm_nccl_place.c) */

/* Around what is put into a link's stream. number: of the collective in its group, 0: a message. */
int ds_nccl_begins(ds_nccl_link *l, int kind);
int ds_nccl_ends(ds_nccl_link *l, int kind, int64_t number);
/* Under the lock, every now and then: tells who may ask. */
void ds_nccl_look_for_device(void);

/* ---- a collective or message that is under way */

typedef struct ds_nccl_flight {
    ds_nccl_link *link;
    cudaEvent_t done; /* of the link's stream */
    /* References of its own, so that the memory stays until kernels wait for `done`: on the call's
     * tensors, on what is sent instead of them, and on room for what comes. */
    ds_tensor held[4];
    /* What kernels do then: `joined` becomes the reduction of n parts of type `dtype`; n 0: nothing. */
    ds_tensor joined;
    const void **parts;
    int n, dtype, op;
    double scale;
    struct ds_nccl_flight *next; /* of the spare ones */
} ds_nccl_flight;

/* Takes a spare one, with references to the call's tensors. */
int ds_nccl_take_off(ds_nccl_flight **out, ds_nccl_link *l, const ds_call *call);
/* Nothing uses its memory any more. */
void ds_nccl_land(ds_nccl_flight *f);
/* As a transport's progress: kernels wait for it, the host does not. */
int ds_nccl_arrive(ds_nccl_flight *f, ds_work *work, int block);

/* ---- what a collective is made of (comm_nccl_plan.c) */

typedef struct ds_nccl_plan {
    ds_comm *c;
    const ds_call *call;
    ds_nccl_flight *flight;
    const char *in; /* what this rank gives, of dtype `type` */
    char *out;      /* where its result goes; of a reduction by parts: that of its own part */
    int type;       /* in which it travels */
    int64_t size;   /* bytes of an element */
    int in_order;   /* of rank: parts are sent to their owners, and kernels sum them up */
    ncclRedOp_t op;
    double factor; /* by which NCCL multiplies addends; 1: it does not */
} ds_nccl_plan;

/* Decides how, takes memory, and calls the kernels that come first. */
int ds_nccl_prepare(ds_nccl_plan *p, ds_nccl_flight *f, ds_comm *c, const ds_call *call);
/* Puts it into the link's stream. */
int ds_nccl_run(ds_nccl_plan *p);
/* Bytes that this rank sends, if every part takes the shortest way. */
int64_t ds_nccl_sends(const ds_nccl_plan *p);

/* ---- smaller things */

/* NCCL's name of a dtype. */
ncclDataType_t ds_nccl_type(int dtype);

/* Messages (comm_nccl_p2p.c): as slots of a transport. */
int ds_nccl_send(ds_comm *c, const ds_call *call, ds_work *work);
int ds_nccl_recv(ds_comm *c, const ds_call *call, ds_work *work);
int ds_nccl_message_progress(ds_work *work, int block);

#endif
