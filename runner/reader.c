/* reader.c - one file, read once from its beginning to its end.
 *
 * A thread keeps blocks under way and hashes those that have come, while the caller copies the ones
 * before to where they belong: so neither the disk nor the hash waits. It does not enter OpenMP.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/file.h"
#include "runner/xxh3.h"

#define BLOCK ((int64_t)2 << 20) /* the disk goes on while a large matrix is being used */
#define ROOM (DS_IO_DEPTH * BLOCK)

struct ds_reader {
    char *path;
    int fd;
    int64_t bytes;  /* of the file */
    int64_t blocks; /* in it */
    int64_t at;     /* the caller's: so many bytes were used */
    int64_t asked;  /* the thread's: so many blocks were asked for */
    char *memory;
    ds_queue *queue;
    XXH3_state_t *hash;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t moved;
    int started;
    int64_t ready, used; /* under the lock: blocks that have come and are hashed; that were used */
    int stop, code;
    char message[DS_ERROR_BYTES];
};

static void reader_free(ds_reader *r)
{
    ds_queue_close(r->queue); /* before the memory goes */
    if (r->fd >= 0)
        close(r->fd);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->moved);
    XXH3_freeState(r->hash);
    free(r->memory);
    free(r->path);
    free(r);
}

static int fail(const ds_reader *r, int negative)
{
    if (negative == -ENODATA)
        return ds_fail(DS_ECORRUPT, "'%s' became shorter while it was read", r->path);
    return ds_fail_io(negative, "read", r->path);
}

static int64_t block_bytes(const ds_reader *r, int64_t block)
{
    int64_t left = r->bytes - block * BLOCK;

    return left < BLOCK ? left : BLOCK;
}

static char *block_data(const ds_reader *r, int64_t block)
{
    return r->memory + block % DS_IO_DEPTH * BLOCK;
}

/* ---- the thread */

/* Waits until a block may be read, and asks for it and for those behind it that may be as well. */
static int ask(ds_reader *r, int64_t block)
{
    int64_t end;

    pthread_mutex_lock(&r->lock);
    while (!r->stop && block >= r->used + DS_IO_DEPTH)
        pthread_cond_wait(&r->moved, &r->lock);
    end = r->stop ? 0 : r->used + DS_IO_DEPTH;
    pthread_mutex_unlock(&r->lock);
    for (; r->asked < r->blocks && r->asked < end; r->asked++) {
        int rc;

        ds_queue_prepare_read(r->queue, (int)(r->asked % DS_IO_DEPTH), r->fd,
                              block_data(r, r->asked), block_bytes(r, r->asked), r->asked * BLOCK);
        rc = ds_queue_submit(r->queue);
        if (rc < 0)
            return fail(r, rc);
    }
    return block < r->asked;
}

static void *read_all(void *argument)
{
    ds_reader *r = argument;
    int more = 1;

    for (int64_t block = 0; block < r->blocks && more > 0; block++) {
        more = ask(r, block);
        if (more > 0) {
            int rc = ds_queue_wait(r->queue, (int)(block % DS_IO_DEPTH));

            if (rc < 0)
                more = fail(r, rc);
            else
                XXH3_64bits_update(r->hash, block_data(r, block), (size_t)block_bytes(r, block));
        }
        pthread_mutex_lock(&r->lock);
        if (more > 0)
            r->ready = block + 1;
        if (more < 0) {
            r->code = more;
            snprintf(r->message, sizeof r->message, "%s", ds_error());
        }
        pthread_cond_signal(&r->moved);
        pthread_mutex_unlock(&r->lock);
    }
    return NULL;
}

static int start(ds_reader *r)
{
    sigset_t all, before;
    int rc;

    sigfillset(&all); /* signals are the main thread's */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(&r->thread, NULL, read_all, r);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc)
        return ds_fail(DS_ENOMEM, "cannot start the thread that reads: %s", strerror(rc));
    r->started = 1;
    return 0;
}

/* ---- the caller */

static int open_file(ds_reader *r, enum ds_io_mode mode)
{
    struct stat now;

    r->fd = open(r->path, O_RDONLY | O_CLOEXEC | (mode != DS_IO_PLAIN ? O_DIRECT : 0));
    if (r->fd < 0 && errno == EINVAL && mode != DS_IO_PLAIN)
        r->fd = open(r->path, O_RDONLY | O_CLOEXEC);
    if (r->fd < 0 || fstat(r->fd, &now) < 0)
        return fail(r, -errno);
    if (!S_ISREG(now.st_mode))
        return ds_fail(DS_ECORRUPT, "'%s' is not a file", r->path);
    r->bytes = now.st_size;
    r->blocks = (r->bytes + BLOCK - 1) / BLOCK;
    return ds_queue_open(&r->queue, mode, DS_IO_DEPTH);
}

int ds_reader_open(ds_reader **out, const char *path)
{
    ds_reader *r = calloc(1, sizeof *r);
    int rc;

    if (!r)
        return ds_fail(DS_ENOMEM, "out of host memory");
    r->fd = -1;
    r->path = strdup(path);
    r->hash = XXH3_createState();
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->moved, NULL);
    if (!r->path || !r->hash || posix_memalign((void **)&r->memory, BLOCK, ROOM)) {
        reader_free(r);
        return ds_fail(DS_ENOMEM, "out of host memory");
    }
    madvise(r->memory, ROOM, MADV_HUGEPAGE); /* where that fails, pages are small */
    XXH3_64bits_reset(r->hash);
    rc = open_file(r, ds_io_mode_wanted());
    if (rc >= 0)
        rc = start(r);
    if (rc < 0) {
        reader_free(r);
        return rc;
    }
    *out = r;
    return 0;
}

/* Returns when a block is there. */
static int await(ds_reader *r, int64_t block)
{
    int rc = 0;

    pthread_mutex_lock(&r->lock);
    while (r->ready <= block && r->code == 0)
        pthread_cond_wait(&r->moved, &r->lock);
    if (r->ready <= block)
        rc = ds_fail(r->code, "%s", r->message);
    pthread_mutex_unlock(&r->lock);
    return rc;
}

static void note_used(ds_reader *r, int64_t blocks)
{
    pthread_mutex_lock(&r->lock);
    r->used = blocks;
    pthread_cond_signal(&r->moved);
    pthread_mutex_unlock(&r->lock);
}

int ds_reader_read(ds_reader *r, void *data, int64_t bytes)
{
    char *to = data;

    if (bytes < 0 || bytes > r->bytes - r->at)
        return ds_fail(DS_ERANGE, "'%s' has %lld bytes, not %lld from byte %lld on", r->path,
                       (long long)r->bytes, (long long)bytes, (long long)r->at);
    while (bytes > 0) {
        int64_t block = r->at / BLOCK, within = r->at % BLOCK, n = block_bytes(r, block) - within;
        int rc = await(r, block);

        if (rc < 0)
            return rc;
        n = n < bytes ? n : bytes;
        if (to) {
            memcpy(to, block_data(r, block) + within, (size_t)n);
            to += n;
        }
        r->at += n;
        bytes -= n;
        if (r->at % BLOCK == 0)
            note_used(r, r->at / BLOCK);
    }
    return 0;
}

int ds_reader_end(ds_reader *r, char *hash)
{
    int rc = hash ? ds_reader_read(r, NULL, r->bytes - r->at) : 0;

    if (r->started) {
        pthread_mutex_lock(&r->lock);
        r->stop = 1;
        pthread_cond_signal(&r->moved);
        pthread_mutex_unlock(&r->lock);
        pthread_join(r->thread, NULL);
    }
    if (rc >= 0 && hash)
        snprintf(hash, 17, "%016llx", (unsigned long long)XXH3_64bits_digest(r->hash));
    reader_free(r);
    return rc;
}
