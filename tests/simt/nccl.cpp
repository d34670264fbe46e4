/* nccl.cpp - stands in for NCCL where there is no GPU: ranks are processes of this machine that share a
 * file, through which every pair has a pipe each way. Work is done by the simulated streams, so as late
 * as CUDA allows, and waits there for the other ranks.
 *
 * What NCCL leaves undefined, or forgives, is an error here: a communicator used before its ranks have
 * met, memory of the host, groups that are never ended; memory that is registered twice, or on one rank
 * of a collective and not on another, or freed while it is registered or used. Sums are in another order
 * than the ranks', and rounded at every step, as NCCL may do it. DS_SIMT_NCCL_LOG names a file: a line a
 * call is added to it, and the rank's number to its name. DS_SIMT_NCCL_REFUSE: "MemAlloc" or
 * "CommRegister" fails, or "handle": there is none of what was registered; with " 1" on rank 1 alone.
 */
#include <nccl.h>

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "kernels/dtype.h"

namespace simt
{
void enqueue_steps(cudaStream_t stream, std::function<bool()> step);
bool is_device(const void *data, size_t bytes);
bool is_idle();
} // namespace simt

namespace
{

const int MOST = 8;              /* ranks */
const uint64_t PIPE = 256 << 10; /* bytes on their way from one rank to another */

struct pipe_ {
    std::atomic<uint64_t> written, taken;
    char data[PIPE];
};
struct shared {
    std::atomic<int> joined, ended;
    pipe_ pipes[MOST][MOST]; /* from, to */
};

struct factor {
    double value;
    bool live;
};

} // namespace

struct ncclComm {
    shared *memory;
    int rank, size;
    int number; /* of those that this process has made, from 1 */
    std::atomic<bool> aborted;
    bool finalizing;
    std::vector<factor> factors; /* of operations made: number ncclNumOps + index */
    std::map<char *, size_t> registered;
};

namespace
{

/* One message, or one collective, of a group that is being collected. */
struct request {
    ncclComm *comm;
    cudaStream_t stream;
    int peer; /* of messages; -1: a collective */
    bool sends;
    char *data;
    size_t bytes;
    std::function<bool()> work; /* of collectives: a step */
};
int depth;
std::vector<request> group;
std::map<char *, size_t> allocated; /* by ncclMemAlloc */
std::set<ncclComm *> comms;

[[noreturn]] void wrong(const char *what)
{
    fprintf(stderr, "simt nccl: %s\n", what);
    abort();
}

/* What holds a stretch of memory; NULL: nothing does. */
const std::pair<char *const, size_t> *holder(const std::map<char *, size_t> &all, const void *data,
                                             size_t bytes)
{
    auto next = all.upper_bound((char *)data);

    if (next == all.begin())
        return NULL;
    --next;
    return (const char *)data + bytes <= next->first + next->second ? &*next : NULL;
}

bool is_registered(const ncclComm *c, const void *data, size_t bytes)
{
    return holder(c->registered, data, bytes) != NULL;
}

bool refuses(const char *what)
{
    const char *asked = getenv("DS_SIMT_NCCL_REFUSE"), *rank = getenv("RANK");
    size_t n = strlen(what);

    if (!asked || strncmp(asked, what, n) != 0)
        return false;
    return !asked[n] || !strcmp(asked + n + 1, rank ? rank : "0");
}

/* `in` and `out`: whether they are registered; -1: there are none. */
void note(const ncclComm *c, const char *name, size_t count, int type, int op, int in = -1,
          int out = -1)
{
    const char *path = getenv("DS_SIMT_NCCL_LOG"), *rank = getenv("RANK");

    if (!path)
        return;
    FILE *f = fopen((std::string(path) + "." + (rank ? rank : "0")).c_str(), "a");
    if (!f)
        return;
    fprintf(f, "%s count=%zu type=%d op=%d comm=%d ranks=%d in=%d out=%d group=%d\n", name, count,
            type, op, c->number, c->size, in, out, depth > 0);
    fclose(f);
}

/* ---- pipes */

size_t size_of(ncclDataType_t type)
{
    switch (type) {
    case ncclInt8:
    case ncclUint8:
        return 1;
    case ncclFloat16:
    case ncclBfloat16:
        return 2;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
        return 8;
    default:
        return 4;
    }
}

struct transfer {
    int peer;
    bool sends;
    char *data;
    size_t bytes, done;
};

/* As much as fits now; whether that was anything. */
bool move_some(ncclComm *c, transfer *t)
{
    pipe_ *p = t->sends ? &c->memory->pipes[c->rank][t->peer] : &c->memory->pipes[t->peer][c->rank];
    uint64_t written = p->written, taken = p->taken;
    uint64_t n = t->sends ? PIPE - (written - taken) : written - taken;
    uint64_t at = (t->sends ? written : taken) % PIPE;

    n = n < t->bytes - t->done ? n : t->bytes - t->done;
    n = n < PIPE - at ? n : PIPE - at;
    if (!n)
        return false;
    if (t->sends)
        memcpy(p->data + at, t->data + t->done, n);
    else
        memcpy(t->data + t->done, p->data + at, n);
    t->done += n;
    if (t->sends)
        p->written = written + n;
    else
        p->taken = taken + n;
    return true;
}

/* A step of all of them at once; those of a pair in one direction are in their order. */
bool exchange(ncclComm *c, std::vector<transfer> &all)
{
    bool busy[2][MOST] = {}, done = true;

    for (transfer &t : all) {
        if (t.done == t.bytes || busy[t.sends][t.peer])
            continue;
        while (move_some(c, &t))
            continue;
        busy[t.sends][t.peer] = t.done < t.bytes;
        done &= t.done == t.bytes;
    }
    return done || c->aborted;
}

/* What every rank gave: [size] of them. */
typedef std::vector<std::vector<char>> inputs;

/* Steps that give every rank's bytes to every other one, and then call `then`. Behind the bytes goes
 * whether this rank's memory is registered. */
std::function<bool()> share(ncclComm *c, const void *mine, size_t n, bool registered,
                            std::function<void(inputs &)> then)
{
    size_t bytes = n + 1;

    auto all = std::make_shared<inputs>();
    auto moves = std::make_shared<std::vector<transfer>>();

    return [=] {
        if (all->empty()) {
            all->assign((size_t)c->size, std::vector<char>(bytes));
            memcpy((*all)[(size_t)c->rank].data(), mine, n);
            (*all)[(size_t)c->rank][n] = registered;
            for (int r = 0; r < c->size; r++) {
                if (r == c->rank)
                    continue;
                moves->push_back({r, true, (*all)[(size_t)c->rank].data(), bytes, 0});
                moves->push_back({r, false, (*all)[(size_t)r].data(), bytes, 0});
            }
        }
        if (!exchange(c, *moves))
            return false;
        for (auto &x : *all)
            if (!c->aborted && x[n] != (char)registered)
                wrong("memory that is registered on some ranks and not on others");
        if (!c->aborted)
            then(*all);
        return true;
    };
}

/* ---- sums */

double load(const char *at, ncclDataType_t type)
{
    uint16_t half;
    float f;
    double d;

    switch (type) {
    case ncclFloat16:
        memcpy(&half, at, 2);
        return ds_f16_to_f32(half);
    case ncclBfloat16:
        memcpy(&half, at, 2);
        return ds_bf16_to_f32(half);
    case ncclFloat32:
        memcpy(&f, at, 4);
        return f;
    default:
        memcpy(&d, at, 8);
        return d;
    }
}

void store(char *at, double x, ncclDataType_t type)
{
    uint16_t half;
    float f = (float)x;

    switch (type) {
    case ncclFloat16:
        half = ds_f32_to_f16(f);
        memcpy(at, &half, 2);
        return;
    case ncclBfloat16:
        half = ds_f32_to_bf16(f);
        memcpy(at, &half, 2);
        return;
    case ncclFloat32:
        memcpy(at, &f, 4);
        return;
    default:
        memcpy(at, &x, 8);
    }
}

/* What NCCL does with NaN is not what the CPU's kernels do: it is lost. */
template <typename V> V join(V a, V b, int op)
{
    return op == ncclMax ? (b > a ? b : a) : op == ncclMin ? (b < a ? b : a) : (V)(a + b);
}

template <typename V> void join_integers(char *out, const char *x, size_t n, int op)
{
    for (size_t i = 0; i < n; i++)
        ((V *)out)[i] = join(((V *)out)[i], ((const V *)x)[i], op);
}

/* out becomes out and x together. */
void add(char *out, const char *x, size_t n, ncclDataType_t type, int op)
{
    size_t size = size_of(type);

    if (type == ncclUint8)
        return join_integers<uint8_t>(out, x, n, op);
    if (type == ncclInt32) /* sums wrap around, as in uint32_t */
        return op == ncclSum ? join_integers<uint32_t>(out, x, n, op)
                             : join_integers<int32_t>(out, x, n, op);
    if (type == ncclInt64)
        return op == ncclSum ? join_integers<uint64_t>(out, x, n, op)
                             : join_integers<int64_t>(out, x, n, op);
    for (size_t i = 0; i < n; i++)
        store(out + i * size, join(load(out + i * size, type), load(x + i * size, type), op), type);
}

/* The reduction of elements from to from + n, in the order 1, 2, … 0. */
void reduce(ncclComm *c, inputs &all, void *result, size_t from, size_t n, ncclDataType_t type,
            int op)
{
    size_t size = size_of(type);
    char *out = (char *)result;
    double factor = op >= ncclNumOps ? c->factors[(size_t)op - ncclNumOps].value
                    : op == ncclAvg  ? 1.0 / c->size
                                     : 1;

    if (factor != 1)
        for (auto &x : all)
            for (size_t i = from; i < from + n; i++)
                store(&x[i * size], load(&x[i * size], type) * factor, type);
    if (op == ncclAvg || op >= ncclNumOps)
        op = ncclSum;
    for (int k = 1; k <= c->size; k++) {
        const char *x = all[(size_t)(k % c->size)].data() + from * size;

        if (k == 1)
            memmove(out, x, n * size);
        else
            add(out, x, n, type, op);
    }
}

/* ---- groups */

/* Messages of one group go all at once, collectives one after the other. */
void run_group()
{
    std::vector<request> now;
    std::vector<transfer> moves;

    now.swap(group);
    for (request &r : now)
        if (r.peer >= 0)
            moves.push_back({r.peer, r.sends, r.data, r.bytes, 0});
    if (!moves.empty()) {
        ncclComm *c = now[0].comm;

        simt::enqueue_steps(now[0].stream, [=]() mutable { return exchange(c, moves); });
    }
    for (request &r : now)
        if (r.peer < 0)
            simt::enqueue_steps(r.stream, r.work);
}

bool met(ncclComm *c)
{
    return c->memory->joined >= c->size;
}

ncclResult_t check(ncclComm *c, const void *data, size_t bytes, const char *name)
{
    if (!c || c->finalizing)
        wrong("a communicator that has ended");
    if (!met(c))
        wrong("a communicator whose ranks have not met yet");
    if (bytes && data && !simt::is_device(data, bytes)) {
        fprintf(stderr, "simt nccl: %s: %zu bytes at %p\n", name, bytes, data);
        wrong("this is no memory of the device");
    }
    return ncclSuccess;
}

ncclResult_t ask(ncclComm *c, cudaStream_t stream, std::function<bool()> work)
{
    group.push_back({c, stream, -1, false, NULL, 0, work});
    if (!depth)
        run_group();
    return ncclSuccess;
}

ncclResult_t message(ncclComm *c, cudaStream_t stream, int peer, bool sends, void *data,
                     size_t bytes)
{
    if (peer < 0 || peer >= c->size)
        return ncclInvalidArgument;
    group.push_back({c, stream, peer, sends, (char *)data, bytes, {}});
    if (!depth)
        run_group();
    return ncclSuccess;
}

} // namespace

extern "C" {

ncclResult_t ncclGetVersion(int *version)
{
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    static int made;

    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/dev/shm/simt-nccl-%d-%d", (int)getpid(), made++);
    int fd = open(id->internal, O_RDWR | O_CREAT | O_EXCL, 0600);
    if (fd < 0 || ftruncate(fd, sizeof(shared)) < 0)
        return ncclSystemError;
    close(fd);
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t code)
{
    return code == ncclRemoteError ? "remote process exited or there was a network error"
                                   : "an error of the simulated NCCL";
}

const char *ncclGetLastError(ncclComm_t)
{
    return "";
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t *config)
{
    static int made;
    int fd = open(id.internal, O_RDWR);
    ncclComm *c = new ncclComm{};

    if (fd < 0 || size > MOST || config->blocking != 0)
        return ncclInvalidArgument;
    c->memory = (shared *)mmap(NULL, sizeof(shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    c->rank = rank;
    c->size = size;
    c->number = ++made;
    if (++c->memory->joined == size)
        unlink(id.internal);
    *out = c;
    comms.insert(c);
    note(c, "CommInitRank", 0, 0, 0);
    return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *state)
{
    const char *fail = getenv("DS_SIMT_NCCL_FAIL"); /* a file: once it is there a link has broken */

    *state = fail && access(fail, F_OK) == 0 ? ncclRemoteError
             : c->finalizing ? (c->memory->ended < c->size ? ncclInProgress : ncclSuccess)
             : met(c)        ? ncclSuccess
                             : ncclInProgress;
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t c)
{
    c->finalizing = true;
    c->memory->ended++;
    note(c, "CommFinalize", 0, 0, 0);
    return ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t c)
{
    if (!c->registered.empty())
        wrong("a communicator ends with memory that is registered");
    comms.erase(c);
    munmap(c->memory, sizeof(shared));
    delete c;
    return ncclSuccess;
}

/* What waits in a stream ends; the memory is left to the process's end. */
ncclResult_t ncclCommAbort(ncclComm_t c)
{
    c->aborted = true;
    comms.erase(c); /* nothing of it is registered any more */
    note(c, "CommAbort", 0, 0, 0);
    return ncclSuccess;
}

ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t *op, void *scalar, ncclDataType_t type,
                                      ncclScalarResidence_t, ncclComm_t c)
{
    c->factors.push_back({load((const char *)scalar, type), true});
    *op = (ncclRedOp_t)(ncclNumOps + c->factors.size() - 1);
    return ncclSuccess;
}

ncclResult_t ncclRedOpDestroy(ncclRedOp_t op, ncclComm_t c)
{
    factor *f = &c->factors.at((size_t)op - ncclNumOps);

    if (!f->live)
        return ncclInvalidArgument;
    f->live = false;
    return ncclSuccess;
}

/* ---- memory */

ncclResult_t ncclMemAlloc(void **out, size_t bytes)
{
    if (refuses("MemAlloc"))
        return ncclUnhandledCudaError;
    if (cudaMalloc(out, bytes) != cudaSuccess)
        return ncclUnhandledCudaError;
    allocated[(char *)*out] = bytes;
    return ncclSuccess;
}

/* NCCL unmaps it at once, whoever uses it. */
ncclResult_t ncclMemFree(void *data)
{
    if (!allocated.erase((char *)data))
        wrong("memory is freed that it did not give");
    for (ncclComm *c : comms)
        if (is_registered(c, data, 1))
            wrong("memory is freed that is registered");
    if (!simt::is_idle())
        wrong("memory is freed while work is queued");
    cudaFree(data);
    return ncclSuccess;
}

/* Whole blocks, once each. */
ncclResult_t ncclCommRegister(ncclComm_t c, void *data, size_t bytes, void **handle)
{
    auto block = allocated.find((char *)data);

    if (!comms.count(c) || c->finalizing || !met(c))
        wrong("memory is registered with a communicator that has ended, or has not met");
    if (block == allocated.end() || block->second != bytes)
        wrong("memory is registered that is no block of its own");
    if (c->registered.count((char *)data))
        wrong("memory is registered twice");
    *handle = NULL;
    if (refuses("CommRegister"))
        return ncclInternalError;
    if (refuses("handle"))
        return ncclSuccess;
    c->registered[(char *)data] = bytes;
    note(c, "CommRegister", bytes, 0, 0);
    *handle = data;
    return ncclSuccess;
}

ncclResult_t ncclCommDeregister(ncclComm_t c, void *handle)
{
    if (!comms.count(c) || c->finalizing || !c->registered.erase((char *)handle))
        wrong("memory is deregistered that is not registered");
    note(c, "CommDeregister", 0, 0, 0);
    return ncclSuccess;
}

ncclResult_t ncclGroupStart()
{
    depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd()
{
    if (--depth < 0)
        wrong("a group that was never begun");
    if (depth == 0)
        run_group();
    return ncclSuccess;
}

/* Checks and notes a collective, with `given` bytes from `in` and `got` to `out`. Whether all that it uses is
 * registered. */
static bool begins(ncclComm *c, const char *name, const void *in, size_t given, const void *out,
                   size_t got, size_t n, ncclDataType_t type, int op = 0)
{
    int in_is = in && given ? is_registered(c, in, given) : -1;
    int out_is = out && got ? is_registered(c, out, got) : -1;

    note(c, name, n, type, op, in_is, out_is);
    check(c, in, given, name);
    check(c, out, got, name);
    if (in_is >= 0 && out_is >= 0 && in_is != out_is)
        wrong("a collective from registered memory to memory that is not, or the other way");
    return in_is == 1 || out_is == 1;
}

ncclResult_t ncclAllReduce(const void *in, void *out, size_t n, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t c, cudaStream_t stream)
{
    size_t bytes = n * size_of(type);
    bool registered = begins(c, "AllReduce", in, bytes, out, bytes, n, type, op);

    return ask(c, stream, share(c, in, bytes, registered, [=](inputs &all) {
                   reduce(c, all, out, 0, n, type, op);
               }));
}

ncclResult_t ncclReduceScatter(const void *in, void *out, size_t n, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t c, cudaStream_t stream)
{
    size_t bytes = n * size_of(type), all_bytes = bytes * (size_t)c->size;
    bool registered = begins(c, "ReduceScatter", in, all_bytes, out, bytes, n, type, op);

    return ask(c, stream, share(c, in, all_bytes, registered, [=](inputs &all) {
                   reduce(c, all, out, n * (size_t)c->rank, n, type, op);
               }));
}

ncclResult_t ncclReduce(const void *in, void *out, size_t n, ncclDataType_t type, ncclRedOp_t op,
                        int root, ncclComm_t c, cudaStream_t stream)
{
    size_t bytes = n * size_of(type), got = c->rank == root ? bytes : 0;
    bool registered = begins(c, "Reduce", in, bytes, out, got, n, type, op);

    return ask(c, stream, share(c, in, bytes, registered, [=](inputs &all) {
                   if (c->rank == root)
                       reduce(c, all, out, 0, n, type, op);
               }));
}

ncclResult_t ncclAllGather(const void *in, void *out, size_t n, ncclDataType_t type, ncclComm_t c,
                           cudaStream_t stream)
{
    size_t bytes = n * size_of(type);
    bool registered = begins(c, "AllGather", in, bytes, out, bytes * (size_t)c->size, n, type);

    return ask(c, stream, share(c, in, bytes, registered, [=](inputs &all) {
                   for (size_t r = 0; r < all.size(); r++)
                       memcpy((char *)out + r * bytes, all[r].data(), bytes);
               }));
}

ncclResult_t ncclBroadcast(const void *in, void *out, size_t n, ncclDataType_t type, int root,
                           ncclComm_t c, cudaStream_t stream)
{
    size_t bytes = n * size_of(type);
    bool registered = begins(c, "Broadcast", NULL, 0, out, bytes, n, type);

    return ask(c, stream, share(c, c->rank == root ? in : out, bytes, registered, [=](inputs &all) {
                   memcpy(out, all[(size_t)root].data(), bytes);
               }));
}

ncclResult_t ncclSend(const void *in, size_t n, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t stream)
{
    begins(c, "Send", in, n * size_of(type), NULL, 0, n, type);
    return message(c, stream, peer, true, (void *)in, n * size_of(type));
}

ncclResult_t ncclRecv(void *out, size_t n, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t stream)
{
    begins(c, "Recv", NULL, 0, out, n * size_of(type), n, type);
    return message(c, stream, peer, false, out, n * size_of(type));
}

} // extern "C"
