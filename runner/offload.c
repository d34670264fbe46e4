/* offload.c - memory that lies on a disk: one file without a name, whose blocks come and go while
 * the main thread computes.
 *
 * A transfer moves a whole tensor. Threads cut it into requests and keep several under way: with
 * io_uring a thread has queue_depth of them going; without it, there are as many threads as there
 * would be requests, each waiting for one. They sleep nearly all the time. O_DIRECT where the file
 * system has it, as the page cache would take the memory that this is to save.
 *
 * The file is of no use to another process, so its name goes as soon as it is open, and nothing is
 * left behind whatever happens. Nothing in it is to survive a crash: no sync, and of what a recorder
 * at ds_io_now() wants to see, only the name's coming and going.
 */
#include "runner/file.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define STACK ((size_t)256 << 10) /* of a thread, which only calls the system */
#define BLOCKING_THREADS 16       /* without io_uring, unless more are asked for */
#define MOST_BYTES ((int64_t)1 << 30)
#define MOST_DEPTH 4096

struct transfer {
    ds_tensor memory; /* a reference of its own: the memory outlives whoever forgets to wait */
    int64_t at;
    int64_t taken, over; /* bytes of it that threads have begun with, and are done with */
    int writes, running;
    int result; /* 0 or the first -errno */
};

struct request {
    struct transfer *transfer; /* NULL: none in this place */
    char *data;
    int64_t bytes, at;
    int fresh; /* not handed to the queue yet */
};

struct worker {
    ds_offload *file;
    ds_queue *queue;
    struct request *requests; /* [depth]: under way, by slot of the queue */
    int depth, n_requests;
    int started;
    pthread_t thread;
};

struct ds_offload {
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t work, done;
    struct transfer *transfers; /* [slots] */
    int *waiting; /* [slots], a ring: transfers that are not all begun, oldest first */
    int first, n_waiting, under_way, stop;
    ds_offload_counters counters;

    int fd, named, slots, n_workers; /* these stay as they were opened */
    int64_t bytes;
    ds_aio aio;
    struct worker *workers;
    char path[DS_PATH];
};

static int64_t bytes_of(const ds_tensor *t)
{
    return t->numel * ds_dtype_size(t->dtype);
}

/* ---- a thread */

/* Begins the oldest transfer's next request, in a free place of the worker's. */
static void take(struct worker *w)
{
    ds_offload *f = w->file;
    struct transfer *t = &f->transfers[f->waiting[f->first]];
    int64_t left = bytes_of(&t->memory) - t->taken;
    struct request *r = w->requests;

    while (r->transfer)
        r++;
    *r = (struct request){.transfer = t,
                          .data = (char *)t->memory.data + t->taken,
                          .bytes = left < f->aio.block_size ? left : f->aio.block_size,
                          .at = t->at + t->taken,
                          .fresh = 1};
    w->n_requests++;
    t->taken += r->bytes;
    if (left == r->bytes) {
        f->first = (f->first + 1) % f->slots;
        f->n_waiting--;
    }
    *(t->writes ? &f->counters.writes : &f->counters.reads) += 1;
    *(t->writes ? &f->counters.bytes_written : &f->counters.bytes_read) += r->bytes;
    if (++f->under_way > f->counters.most_under_way)
        f->counters.most_under_way = f->under_way;
}

/* Takes as many requests as there is room for; without overlap_events only when all that were under
 * way are over. The lock is held. */
static void fill(struct worker *w)
{
    ds_offload *f = w->file;
    int before = w->n_requests;

    if (before && !f->aio.overlap_events)
        return;
    while (f->n_waiting && w->n_requests < w->depth)
        take(w);
    f->counters.refills += before && w->n_requests > before;
}

/* Starts what is fresh. Returns how many calls that took, or -errno. */
static int start(struct worker *w)
{
    int single = w->file->aio.single_submit, calls = 0, rc = 0;

    for (int i = 0; i < w->depth && rc >= 0; i++) {
        struct request *r = &w->requests[i];

        if (!r->transfer || !r->fresh)
            continue;
        r->fresh = 0;
        if (r->transfer->writes)
            ds_queue_prepare_write(w->queue, i, w->file->fd, r->data, r->bytes, r->at);
        else
            ds_queue_prepare_read(w->queue, i, w->file->fd, r->data, r->bytes, r->at);
        if (single || !calls)
            calls++;
        if (single)
            rc = ds_queue_submit(w->queue);
    }
    rc = rc < 0 ? rc : ds_queue_submit(w->queue);
    return rc < 0 ? rc : calls;
}

/* A request is over. The lock is held. */
static void close_request(struct worker *w, int i, int result)
{
    struct request *r = &w->requests[i];
    struct transfer *t = r->transfer;

    if (result < 0 && t->result == 0)
        t->result = result;
    t->over += r->bytes;
    if (t->over == bytes_of(&t->memory))
        pthread_cond_broadcast(&w->file->done);
    r->transfer = NULL;
    w->n_requests--;
    w->file->under_way--;
}

static void *work(void *argument)
{
    struct worker *w = argument;
    ds_offload *f = w->file;

    pthread_mutex_lock(&f->lock);
    for (;;) {
        int calls, rc, slot = -1;

        while (!w->n_requests && !f->n_waiting && !f->stop)
            pthread_cond_wait(&f->work, &f->lock);
        fill(w);
        if (!w->n_requests)
            break;
        pthread_mutex_unlock(&f->lock);
        rc = calls = start(w);
        if (rc >= 0)
            rc = ds_queue_next(w->queue, &slot);
        pthread_mutex_lock(&f->lock);
        f->counters.submits += calls > 0 ? calls : 0;
        for (int i = 0; i < w->depth; i++) /* all of them, where the queue itself has failed */
            if (w->requests[i].transfer && (slot < 0 || i == slot))
                close_request(w, i, rc);
    }
    pthread_mutex_unlock(&f->lock);
    return NULL;
}

/* ---- the file */

static int open_file(ds_offload *f, const char *folder)
{
    int flags = O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC;
    int direct = ds_io_mode_wanted() != DS_IO_PLAIN;
    ds_io *io = ds_io_now();
    int64_t available;
    struct stat s;
    int rc;

    if (stat(folder, &s) < 0)
        return ds_fail_io(-errno, "keep state in", folder);
    if (!S_ISDIR(s.st_mode))
        return ds_fail(DS_EINVAL, "cannot keep state in '%s': it is no folder", folder);
    if ((rc = ds_temporary_name(f->path, sizeof f->path, folder)) < 0 ||
        (rc = ds_disk_free(&available, folder)) < 0)
        return rc;
    if (available < f->bytes)
        return ds_fail(DS_EIO, "the disk is full: %lld bytes are wanted in '%s' and %lld are free",
                       (long long)f->bytes, folder, (long long)available);
    f->fd = io->open(f->path, flags | (direct ? O_DIRECT : 0), 0600);
    if (f->fd == -EINVAL && direct) {
        direct = 0;
        io->unlink(f->path); /* some make the file before they refuse */
        f->fd = io->open(f->path, flags, 0600);
    }
    if (f->fd < 0)
        return ds_fail_io(f->fd, "keep state in", folder);
    f->counters.direct = direct;
    f->named = io->unlink(f->path) < 0;
    /* What was never written reads as zeros. */
    if ((rc = io->allocate(f->fd, f->bytes)) < 0 || (rc = io->truncate(f->fd, f->bytes)) < 0)
        return ds_fail_io(rc, "take room in", folder);
    return 0;
}

static int start_worker(ds_offload *f, int depth)
{
    struct worker *w = &f->workers[f->n_workers];
    sigset_t all, before;
    pthread_attr_t attributes;
    int rc = ds_queue_open(&w->queue, ds_io_mode_wanted(), depth);

    if (rc < 0)
        return rc;
    f->n_workers++;
    w->file = f;
    w->depth = ds_queue_ringed(w->queue) ? depth : 1;
    if (!(w->requests = calloc((size_t)w->depth, sizeof *w->requests)))
        return ds_fail(DS_ENOMEM, "out of host memory");
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    sigfillset(&all); /* signals are the main thread's */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(&w->thread, &attributes, work, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    w->started = rc == 0;
    return rc ? ds_fail(DS_ENOMEM, "cannot start a thread for offloading: %s", strerror(rc)) : 0;
}

static int start_workers(ds_offload *f)
{
    int wanted = f->aio.threads, blocking = f->aio.threads * f->aio.queue_depth, rc = 0;

    if (blocking > BLOCKING_THREADS)
        blocking = BLOCKING_THREADS > wanted ? BLOCKING_THREADS : wanted;
    f->workers = calloc((size_t)blocking, sizeof *f->workers);
    if (!f->workers)
        return ds_fail(DS_ENOMEM, "out of host memory");
    while (f->n_workers < wanted && rc >= 0) {
        rc = start_worker(f, f->aio.queue_depth);
        if (rc >= 0 && !ds_queue_ringed(f->workers[0].queue))
            wanted = blocking;
    }
    f->counters.threads = f->n_workers;
    f->counters.ringed = rc >= 0 && ds_queue_ringed(f->workers[0].queue);
    return rc;
}

int ds_offload_open(ds_offload **out, const char *folder, int64_t bytes, int slots,
                    const ds_aio *aio)
{
    ds_offload *f;
    int rc;

    if (bytes < 1 || slots < 1 || aio->block_size < DS_IO_ALIGN || aio->block_size % DS_IO_ALIGN ||
        aio->block_size > MOST_BYTES || aio->queue_depth < 1 || aio->queue_depth > MOST_DEPTH ||
        aio->threads < 1)
        return ds_fail(
            DS_EINVAL,
            "offloading %lld bytes by %d slots, with requests of %lld bytes, %d under way by %d "
            "threads",
            (long long)bytes, slots, (long long)aio->block_size, aio->queue_depth, aio->threads);
    f = calloc(1, sizeof *f);
    if (!f)
        return ds_fail(DS_ENOMEM, "out of host memory");
    *f = (ds_offload){.fd = -1, .slots = slots, .bytes = bytes, .aio = *aio};
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->work, NULL);
    pthread_cond_init(&f->done, NULL);
    f->transfers = calloc((size_t)slots, sizeof *f->transfers);
    f->waiting = calloc((size_t)slots, sizeof *f->waiting);
    rc = f->transfers && f->waiting ? 0 : ds_fail(DS_ENOMEM, "out of host memory");
    if (rc >= 0)
        rc = open_file(f, folder);
    if (rc >= 0)
        rc = start_workers(f);
    if (rc < 0) {
        ds_offload_close(f);
        return rc;
    }
    *out = f;
    return 0;
}

void ds_offload_close(ds_offload *f)
{
    if (!f)
        return;
    pthread_mutex_lock(&f->lock);
    f->stop = 1;
    pthread_cond_broadcast(&f->work);
    pthread_mutex_unlock(&f->lock);
    for (int i = 0; i < f->n_workers; i++) { /* they end what was begun */
        if (f->workers[i].started)
            pthread_join(f->workers[i].thread, NULL);
        ds_queue_close(f->workers[i].queue);
        free(f->workers[i].requests);
    }
    for (int i = 0; f->transfers && i < f->slots; i++)
        if (f->transfers[i].running)
            ds_release(&f->transfers[i].memory);
    if (f->fd >= 0)
        ds_io_now()->close(f->fd);
    if (f->named)
        ds_io_now()->unlink(f->path);
    pthread_cond_destroy(&f->work);
    pthread_cond_destroy(&f->done);
    pthread_mutex_destroy(&f->lock);
    free(f->workers);
    free(f->transfers);
    free(f->waiting);
    free(f);
}

const char *ds_offload_path(const ds_offload *f)
{
    return f->path;
}

void ds_offload_count(ds_offload_counters *out, ds_offload *f)
{
    pthread_mutex_lock(&f->lock);
    *out = f->counters;
    pthread_mutex_unlock(&f->lock);
}

/* ---- transfers */

static int begin(ds_offload *f, int slot, const ds_tensor *t, int64_t at, int writes)
{
    struct transfer *own = slot >= 0 && slot < f->slots ? &f->transfers[slot] : NULL;
    int64_t bytes = bytes_of(t);
    int rc;

    if (!own || own->running || t->device != DS_CPU || !t->dense || !t->data || bytes < 1 ||
        at < 0 || bytes > f->bytes - at || (uintptr_t)t->data % DS_IO_ALIGN ||
        bytes % DS_IO_ALIGN || at % DS_IO_ALIGN)
        return ds_fail(
            DS_EINVAL,
            "offload: %lld bytes at %p cannot be moved by slot %d from or to byte %lld of "
            "%lld: they must be dense and in this host's memory, the slot free, and all numbers "
            "multiples of %d",
            (long long)bytes, t->data, slot, (long long)at, (long long)f->bytes, DS_IO_ALIGN);
    *own = (struct transfer){.at = at, .writes = writes};
    if ((rc = ds_alias(&own->memory, t)) < 0)
        return rc;
    pthread_mutex_lock(&f->lock);
    own->running = 1;
    f->waiting[(f->first + f->n_waiting++) % f->slots] = slot;
    pthread_cond_broadcast(&f->work);
    pthread_mutex_unlock(&f->lock);
    return 0;
}

int ds_offload_read(ds_offload *f, int slot, ds_tensor *t, int64_t at)
{
    return begin(f, slot, t, at, 0);
}

int ds_offload_write(ds_offload *f, int slot, const ds_tensor *t, int64_t at)
{
    return begin(f, slot, t, at, 1);
}

int ds_offload_wait(ds_offload *f, int slot)
{
    struct transfer *t;
    int result;

    if (slot < 0 || slot >= f->slots)
        return ds_fail(DS_EINVAL, "offload: there is no slot %d of %d", slot, f->slots);
    t = &f->transfers[slot];
    if (!t->running)
        return 0;
    pthread_mutex_lock(&f->lock);
    while (t->over < bytes_of(&t->memory))
        pthread_cond_wait(&f->done, &f->lock);
    t->running = 0;
    result = t->result;
    pthread_mutex_unlock(&f->lock);
    ds_release(&t->memory);
    if (result == -ENODATA)
        return ds_fail(DS_ECORRUPT, "cannot read '%s': it has become shorter", f->path);
    return result < 0 ? ds_fail_io(result, t->writes ? "write" : "read", f->path) : 0;
}
