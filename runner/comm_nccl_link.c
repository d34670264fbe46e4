/* comm_nccl_link.c - NCCL's library, communicators and their streams, and how they end.
 *
 * Communicators are not blocking: NCCL's calls return at once, and what they begin is asked for until it
 * is done, so that every wait is a loop of ours, which sees that the job was ended. A wait of CUDA is
 * none: a host that waits for a kernel of NCCL's whose peer is gone would wait for ever. So a thread
 * looks every 50 ms whether the job was ended, or NCCL has noticed that a peer is gone, and then aborts
 * all communicators: their kernels end, and with them the waits, which are told by ds_cuda.ended.
 *
 * Communicators live until the process ends, also those of groups that were closed: to end one, the
 * ranks of a host wait for each other, and garbage is collected at different times on each.
 */
#include "runner/comm_nccl.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "runner/rank.h"

#define OLDEST NCCL_VERSION(2, 20, 0)
#define LOOK_MS 50
#define CONNECT_SECONDS 180 /* for all ranks of a group to find each other */
#define END_SECONDS 5       /* for those of a host to end it together */
#define QUIT_SECONDS 1      /* for NCCL to let go, where this process has failed */

ds_nccl_library ds_nccl;

static struct {
    pthread_mutex_t lock; /* of NCCL's calls, and of what follows */
    pthread_cond_t changed;
    ds_nccl_link *links;
    int watched; /* there is a thread */
    int over;    /* 1: it shall abort all links, and end; 2: it has */
} all = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

void ds_nccl_lock(void)
{
    pthread_mutex_lock(&all.lock);
}

void ds_nccl_unlock(void)
{
    pthread_mutex_unlock(&all.lock);
}

/* ---- the library */

/* Ranks that share a GPU (for tests): NCCL takes them for hosts of their own, that talk over sockets.
 * What the user has set stays. */
static void share_gpu(void)
{
    static const char *const settings[][2] = {
        {"NCCL_SOCKET_IFNAME", "lo"}, {"NCCL_IB_DISABLE", "1"}, {"NCCL_MNNVL_ENABLE", "0"},
        {"NCCL_NVLS_ENABLE", "0"},    {"NCCL_MAX_CTAS", "2"},
    };
    const char *shared = getenv("DS_SHARE_GPU");
    char number[16];
    ds_rank rank;

    if (!shared || strcmp(shared, "1") != 0)
        return;
    ds_rank_find(&rank);
    snprintf(number, sizeof number, "%d", rank.rank);
    setenv("NCCL_HOSTID", number, 0);
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        setenv(settings[i][0], settings[i][1], 0);
}

/* DS_NCCL_LIBRARY, or where the loader finds it: LD_LIBRARY_PATH, the plugin's folder, the folder in
 * which it was at build time, the system's. */
static int load(void)
{
    const char *given = getenv("DS_NCCL_LIBRARY");
    void *library = dlopen(given && *given ? given : "libnccl.so.2", RTLD_NOW | RTLD_LOCAL);

    if (!library)
        return ds_fail(DS_ENOENT,
                       "several ranks on GPUs need NCCL: %s; DS_NCCL_LIBRARY names its file",
                       dlerror());
#define DS_NCCL_FIND(name)                                                                         \
    {                                                                                              \
        void *symbol = dlsym(library, "nccl" #name);                                               \
        if (!symbol)                                                                               \
            return ds_fail(DS_ENOENT, "NCCL has no nccl" #name "; it must be 2.20 or newer");      \
        memcpy(&ds_nccl.name, &symbol, sizeof symbol);                                             \
    }
    DS_NCCL_FUNCTIONS(DS_NCCL_FIND)
#undef DS_NCCL_FIND
    if (ds_nccl.GetVersion(&ds_nccl.version) != ncclSuccess || ds_nccl.version < OLDEST)
        return ds_fail(DS_ENOENT, "NCCL is version %d, and must be 2.20 or newer", ds_nccl.version);
    return 0;
}

int ds_nccl_open(void)
{
    static char why_not[320];
    static int code = 1;

    if (code <= 0)
        return code < 0 ? ds_fail(code, "%s", why_not) : 0;
    share_gpu();
    code = load();
    if (code < 0)
        snprintf(why_not, sizeof why_not, "%s", ds_error());
    return code;
}

ncclDataType_t ds_nccl_type(int dtype)
{
    static const ncclDataType_t types[DS_DTYPES] = {
        [DS_F32] = ncclFloat32, [DS_BF16] = ncclBfloat16, [DS_F16] = ncclFloat16,
        [DS_F64] = ncclFloat64, [DS_I64] = ncclInt64,     [DS_I32] = ncclInt32,
        [DS_U8] = ncclUint8,    [DS_BOOL] = ncclUint8,
    };

    return types[dtype];
}

/* ---- links that end */

/* Under the lock, which is given up for as long as NCCL takes: it may wait for ranks of this host. */
static void abort_all(ncclResult_t code)
{
    ds_cuda.ended = 1; /* for hosts that wait, and now go on */
    for (ds_nccl_link *l = all.links; l; l = l->next) {
        ncclComm_t comm = l->comm;

        l->comm = NULL;
        l->code = l->code == ncclSuccess ? code : l->code;
        if (!comm)
            continue;
        pthread_mutex_unlock(&all.lock);
        ds_nccl.CommAbort(comm);
        pthread_mutex_lock(&all.lock);
    }
}

/* Under the lock: whether NCCL has noticed that something is wrong. */
static ncclResult_t look(void)
{
    for (ds_nccl_link *l = all.links; l; l = l->next) {
        ncclResult_t state = ncclSuccess;

        if (l->comm && ds_nccl.CommGetAsyncError(l->comm, &state) != ncclSuccess)
            state = ncclInternalError;
        if (state != ncclSuccess && state != ncclInProgress)
            return l->code = state;
    }
    return ncclSuccess;
}

static void *watch(void *world)
{
    ncclResult_t code = ncclSuccess;
    char why[96];

    cudaSetDevice(ds_cuda.index);
    pthread_mutex_lock(&all.lock);
    while (!all.over && code == ncclSuccess && !ds_comm_aborted(world)) {
        struct timespec end;

        clock_gettime(CLOCK_REALTIME, &end);
        end.tv_nsec += LOOK_MS * 1000000L;
        end.tv_sec += end.tv_nsec / 1000000000L;
        end.tv_nsec %= 1000000000L;
        pthread_cond_timedwait(&all.changed, &all.lock, &end);
        code = look();
        ds_nccl_look_for_device();
    }
    if (code != ncclSuccess) {
        snprintf(why, sizeof why, "NCCL: %s", ds_nccl.GetErrorString(code));
        pthread_mutex_unlock(&all.lock);
        ds_comm_abort(world, why); /* it calls this transport */
        pthread_mutex_lock(&all.lock);
    }
    if (all.over != 2)
        abort_all(code == ncclSuccess ? ncclRemoteError : code);
    all.over = 2;
    pthread_cond_broadcast(&all.changed);
    pthread_mutex_unlock(&all.lock);
    return NULL;
}

/* Under the lock. */
static int start_watching(void)
{
    pthread_t thread;
    sigset_t every, before;
    ds_comm *world;
    int rc = ds_comm_world(&world);

    if (rc < 0 || all.watched)
        return rc;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before); /* signals are the main thread's */
    rc = pthread_create(&thread, NULL, watch, world);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc != 0)
        return ds_fail(DS_ECOMM, "no thread to watch over NCCL: %s", strerror(rc));
    pthread_detach(thread);
    all.watched = 1;
    return 0;
}

/* ---- links that begin */

static int failed(int kind, ncclResult_t code)
{
    const char *more = ds_nccl.GetLastError(NULL);

    return ds_fail(DS_ECOMM, "%s: NCCL: %s%s%s", ds_collective_name(kind),
                   ds_nccl.GetErrorString(code), more && *more ? ": " : "", more ? more : "");
}

int ds_nccl_connect(ds_nccl_link *l, const ncclUniqueId *id, int size, int rank)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    int least, greatest;
    ncclResult_t code;

    DS_TRY(ds_cuda_check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "NCCL's stream"));
    DS_TRY(ds_cuda_check(cudaStreamCreateWithPriority(&l->stream, cudaStreamNonBlocking, greatest),
                         "NCCL's stream"));
    config.blocking = 0;
    ds_nccl_lock();
    if (start_watching() < 0) {
        ds_nccl_unlock();
        return DS_ECOMM;
    }
    code = ds_nccl.CommInitRankConfig(&l->comm, size, *id, rank, &config);
    l->next = all.links;
    all.links = l;
    ds_nccl_unlock();
    return code == ncclSuccess || code == ncclInProgress ? 0 : failed(DS_ALL_REDUCE, code);
}

static int patience_ends(double begun, int kind)
{
    if (ds_seconds() - begun < CONNECT_SECONDS)
        return 0;
    return ds_fail(
        DS_ECOMM,
        "%s: NCCL has not connected the ranks within %d s; NCCL_DEBUG=INFO tells what it "
        "does",
        ds_collective_name(kind), CONNECT_SECONDS);
}

/* A moment in which others may go on. Ranks that connect are busy; those that are connected may wait in
 * NCCL for one that comes later, as long as it takes. */
static void pass_time(const ds_nccl_link *l, ds_comm *c, int kind, int turns)
{
    const struct timespec moment = {.tv_nsec = 50000};

    if (turns < 1000) {
        sched_yield();
        return;
    }
    if (l->ready)
        ds_comm_device_in(kind, c->number);
    else
        ds_comm_prepares(c);
    nanosleep(&moment, NULL);
}

static int settle(ds_nccl_link *l, ds_comm *c, int kind, ncclResult_t code, int block)
{
    double begun = ds_seconds();

    for (int turns = 0; code == ncclSuccess || code == ncclInProgress; turns++) {
        ncclResult_t state = ncclRemoteError;

        if (ds_comm_aborted(c))
            return ds_comm_fail_aborted(c, kind);
        if (code == ncclSuccess && l->ready)
            return 1;
        ds_nccl_lock();
        if (l->comm && ds_nccl.CommGetAsyncError(l->comm, &state) != ncclSuccess)
            state = ncclInternalError;
        ds_nccl_unlock();
        code = state;
        if (code == ncclSuccess)
            l->ready = 1;
        if (code != ncclInProgress)
            continue;
        if (!block)
            return 0;
        if (!l->ready)
            DS_TRY(patience_ends(begun, kind));
        pass_time(l, c, kind, turns);
    }
    if (ds_comm_aborted(c))
        return ds_comm_fail_aborted(c, kind);
    return failed(kind, l->code == ncclSuccess ? code : l->code);
}

int ds_nccl_settle(ds_nccl_link *l, ds_comm *c, int kind, ncclResult_t code, int block)
{
    int rc = settle(l, c, kind, code, block);

    ds_comm_device_in(DS_AWAKE, 0);
    return rc;
}

int ds_nccl_follow_kernels(ds_nccl_link *l, const char *what)
{
    static cudaEvent_t here;

    if (!here)
        DS_TRY(ds_cuda_check(cudaEventCreateWithFlags(&here, cudaEventDisableTiming), what));
    DS_TRY(ds_cuda_check(cudaEventRecord(here, ds_cuda.stream), what));
    return ds_cuda_check(cudaStreamWaitEvent(l->stream, here, 0), what);
}

/* ---- the end */

void ds_nccl_abort(ds_comm *c, const char *why)
{
    (void)c, (void)why;
    pthread_cond_broadcast(&all.changed); /* without the lock, as this may be the holder's thread */
}

/* Waits until the thread has let go of all links, but not for long: for some of that NCCL waits for
 * other ranks. */
void ds_nccl_quit(ds_comm *world, int code)
{
    struct timespec end;

    (void)world, (void)code;
    if (!all.watched)
        return;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += QUIT_SECONDS;
    if (pthread_mutex_timedlock(&all.lock, &end) != 0)
        return;
    all.over = all.over ? all.over : 1;
    pthread_cond_broadcast(&all.changed);
    while (all.over != 2 && pthread_cond_timedwait(&all.changed, &all.lock, &end) == 0)
        continue;
    pthread_mutex_unlock(&all.lock);
}

/* Whether all ranks of the link are at its end. */
static int is_over(ds_nccl_link *l)
{
    ncclResult_t state;

    return ds_nccl.CommGetAsyncError(l->comm, &state) != ncclSuccess || state != ncclInProgress;
}

/* With the group of all ranks; those of other groups stay until then. All links begin to end before any
 * is waited for, as ranks have them in different orders. What does not end in time is left to the end
 * of the process, which comes next. */
void ds_nccl_close_all(void)
{
    const struct timespec moment = {.tv_nsec = 200000};
    double until = ds_seconds() + END_SECONDS;

    for (ds_nccl_link *l = all.links; l && all.over == 0; l = l->next)
        cudaStreamSynchronize(l->stream);
    ds_nccl_lock();
    ds_nccl_forget_all();
    for (ds_nccl_link *l = all.over == 0 ? all.links : NULL; l; l = l->next)
        if (l->comm && l->ready)
            ds_nccl.CommFinalize(l->comm);
    for (ds_nccl_link *l = all.over == 0 ? all.links : NULL; l; l = l->next) {
        while (l->comm && l->ready && !is_over(l) && ds_seconds() < until)
            nanosleep(&moment, NULL);
        if (l->comm && l->ready && is_over(l))
            ds_nccl.CommDestroy(l->comm);
        l->comm = NULL;
    }
    all.over = 2;
    pthread_cond_broadcast(&all.changed);
    ds_nccl_unlock();
}
