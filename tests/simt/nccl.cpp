/* nccl.cpp - stands in for NCCL where there is no GPU: ranks are processes of this machine that share a
 * file, through which every pair has a pipe each way. Work is done by the simulated streams, so as late
 * as CUDA allows, and waits there for the other ranks.
 *
 * What NCCL leaves undefined, or forgives, is an error here: a communicator used before its ranks have
 * met, memory of the host, groups that are never ended. Sums are in another order than the ranks', and
 * rounded at every step, as NCCL may do it. DS_SIMT_NCCL_LOG names a file: a line a call is added to it,
 * and the rank's number to its name.
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
#include <memory>
#include <string>
#include <vector>

#include "kernels/dtype.h"

namespace simt
{
void enqueue_steps(cudaStream_t stream, std::function<bool()> step);
bool is_device(const void *data, size_t bytes);
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
    std::atomic<bool> aborted;
    bool finalizing;
    std::vector<factor> factors; /* of operations made: number ncclNumOps + index */
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

[[noreturn]] void wrong(const char *what)
{
    fprintf(stderr, "simt nccl: %s\n", what);
    abort();
}

void note(const ncclComm *c, const char *name, size_t count, int type, int op)
{
    const char *path = getenv("DS_SIMT_NCCL_LOG"), *rank = getenv("RANK");

    if (!path)
        return;
    FILE *f = fopen((std::string(path) + "." + (rank ? rank : "0")).c_str(), "a");
    if (!f)
        return;
    fprintf(f, "%s count=%zu type=%d op=%d ranks=%d group=%d\n", name, count, type, op, c->size,
            depth > 0);
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

/* Steps that give every rank's bytes to every other one, and then call `then`. */
std::function<bool()> share(ncclComm *c, const void *mine, size_t bytes,
                            std::function<void(inputs &)> then)
{
    auto all = std::make_shared<inputs>();
    auto moves = std::make_shared<std::vector<transfer>>();

    return [=] {
        if (all->empty()) {
            all->assign((size_t)c->size, std::vector<char>(bytes));
            memcpy((*all)[(size_t)c->rank].data(), mine, bytes);
            for (int r = 0; r < c->size; r++) {
                if (r == c->rank)
                    continue;
                moves->push_back({r, true, (*all)[(size_t)c->rank].data(), bytes, 0});
                moves->push_back({r, false, (*all)[(size_t)r].data(), bytes, 0});
            }
        }
        if (!exchange(c, *moves))
            return false;
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
    int fd = open(id.internal, O_RDWR);
    ncclComm *c = new ncclComm{};

    if (fd < 0 || size > MOST || config->blocking != 0)
        return ncclInvalidArgument;
    c->memory = (shared *)mmap(NULL, sizeof(shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    c->rank = rank;
    c->size = size;
    if (++c->memory->joined == size)
        unlink(id.internal);
    *out = c;
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
    munmap(c->memory, sizeof(shared));
    delete c;
    return ncclSuccess;
}

/* What waits in a stream ends; the memory is left to the process's end. */
ncclResult_t ncclCommAbort(ncclComm_t c)
{
    c->aborted = true;
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

ncclResult_t ncclAllReduce(const void *in, void *out, size_t n, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t c, cudaStream_t stream)
{
    note(c, "AllReduce", n, type, op);
    check(c, in, n * size_of(type), "AllReduce");
    check(c, out, n * size_of(type), "AllReduce");
    return ask(c, stream, share(c, in, n * size_of(type), [=](inputs &all) {
                   reduce(c, all, out, 0, n, type, op);
               }));
}

ncclResult_t ncclReduceScatter(const void *in, void *out, size_t n, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t c, cudaStream_t stream)
{
    note(c, "ReduceScatter", n, type, op);
    check(c, in, n * (size_t)c->size * size_of(type), "ReduceScatter");
    check(c, out, n * size_of(type), "ReduceScatter");
    return ask(c, stream, share(c, in, n * (size_t)c->size * size_of(type), [=](inputs &all) {
                   reduce(c, all, out, n * (size_t)c->rank, n, type, op);
               }));
}

ncclResult_t ncclReduce(const void *in, void *out, size_t n, ncclDataType_t type, ncclRedOp_t op,
                        int root, ncclComm_t c, cudaStream_t stream)
{
    note(c, "Reduce", n, type, op);
    check(c, in, n * size_of(type), "Reduce");
    if (c->rank == root)
        check(c, out, n * size_of(type), "Reduce");
    return ask(c, stream, share(c, in, n * size_of(type), [=](inputs &all) {
                   if (c->rank == root)
                       reduce(c, all, out, 0, n, type, op);
               }));
}

ncclResult_t ncclAllGather(const void *in, void *out, size_t n, ncclDataType_t type, ncclComm_t c,
                           cudaStream_t stream)
{
    note(c, "AllGather", n, type, 0);
    check(c, in, n * size_of(type), "AllGather");
    check(c, out, n * (size_t)c->size * size_of(type), "AllGather");
    size_t bytes = n * size_of(type);
    return ask(c, stream, share(c, in, bytes, [=](inputs &all) {
                   for (size_t r = 0; r < all.size(); r++)
                       memcpy((char *)out + r * bytes, all[r].data(), bytes);
               }));
}

ncclResult_t ncclBroadcast(const void *in, void *out, size_t n, ncclDataType_t type, int root,
                           ncclComm_t c, cudaStream_t stream)
{
    note(c, "Broadcast", n, type, 0);
    check(c, out, n * size_of(type), "Broadcast");
    size_t bytes = n * size_of(type);
    return ask(c, stream, share(c, c->rank == root ? in : out, bytes, [=](inputs &all) {
                   memcpy(out, all[(size_t)root].data(), bytes);
               }));
}

ncclResult_t ncclSend(const void *in, size_t n, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t stream)
{
    note(c, "Send", n, type, 0);
    check(c, in, n * size_of(type), "Send");
    return message(c, stream, peer, true, (void *)in, n * size_of(type));
}

ncclResult_t ncclRecv(void *out, size_t n, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t stream)
{
    note(c, "Recv", n, type, 0);
    check(c, out, n * size_of(type), "Recv");
    return message(c, stream, peer, false, out, n * size_of(type));
}

} // extern "C"
