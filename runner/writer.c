/* writer.c - files that a thread writes, from where their data lie, while the caller computes.
 *
 * The thread takes one piece of a part at a time, and no lock while it writes it. When the caller is
 * about to change the memory it asks for a stop (ds_writer_release): once no more is left than may be
 * copied and nothing is under way, the thread stands still until the caller has copied that. The
 * thread enters neither OpenMP nor Lua.
 */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "kernels/error.h"
#include "runner/file.h"

#define PIECE ((int64_t)4 << 20) /* bytes that are appended at a time */
#define HUGE ((size_t)2 << 20)

/* Bytes, or columns of a matrix, for a file; or, without data, that it is to be committed. */
typedef struct part {
    ds_file *file;
    const char *data; /* what is left */
    int64_t bytes;
    int64_t rows, columns, size; /* columns: elements between two rows; 0: no matrix */
    int commit;                  /* which file it is, from 1; 0: this is data */
} part;

enum leaving { STAYS, ASKED, STANDS, LEFT };

struct ds_writer {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t moved;
    part *parts;
    int count, room, next, files;
    char (*hashes)[17];
    int64_t left, most; /* bytes to write; how many may be copied */
    enum leaving leaving;
    int quiet; /* only the disk works, on a file whose data it has */
    int started, stop, over, code;
    char *copy;
    char message[DS_ERROR_BYTES];
    ds_writer_stats stats;
};

static double seconds(clockid_t clock)
{
    struct timespec t;

    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int ds_writer_open(ds_writer **out)
{
    ds_writer *w = calloc(1, sizeof *w);

    if (!w)
        return ds_fail(DS_ENOMEM, "out of host memory");
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->moved, NULL);
    *out = w;
    return 0;
}

static int add(ds_writer *w, part p)
{
    if (w->count == w->room) {
        part *more = realloc(w->parts, sizeof *more * (size_t)(w->room * 2 + 64));

        if (!more)
            return ds_fail(DS_ENOMEM, "out of host memory");
        w->parts = more;
        w->room = w->room * 2 + 64;
    }
    w->parts[w->count++] = p;
    w->left += p.bytes;
    return 0;
}

int ds_writer_append(ds_writer *w, ds_file *f, const void *data, int64_t bytes)
{
    return add(w, (part){.file = f, .data = data, .bytes = bytes});
}

int ds_writer_append_transposed(ds_writer *w, ds_file *f, const void *data, int64_t rows,
                                int64_t columns, int64_t size)
{
    return add(w, (part){.file = f,
                         .data = data,
                         .bytes = rows * columns * size,
                         .rows = rows,
                         .columns = columns,
                         .size = size});
}

int ds_writer_commit(ds_writer *w, ds_file *f)
{
    char(*more)[17] = realloc(w->hashes, sizeof *more * (size_t)(w->files + 1));
    int rc;

    if (!more)
        return ds_fail(DS_ENOMEM, "out of host memory");
    w->hashes = more;
    rc = add(w, (part){.file = f, .commit = w->files + 1});
    return rc < 0 ? rc : w->files++;
}

/* ---- the thread */

/* One piece of a part, or all that ends a file. What was written is taken off the part. */
static int write_piece(ds_writer *w, part *p)
{
    int64_t n = p->bytes < PIECE ? p->bytes : PIECE;
    int rc;

    if (p->commit)
        return ds_file_commit(p->file, w->hashes[p->commit - 1]);
    if (p->columns) {
        int64_t column = p->rows * p->size, left = column ? p->bytes / column : 0;
        int64_t some = column < PIECE && column ? PIECE / column : 1;

        some = some < left ? some : left;
        n = some * column;
        rc = ds_file_append_columns(p->file, p->data, p->rows, p->columns, some, p->size);
        p->data += some * p->size;
    } else {
        rc = ds_file_append(p->file, p->data, n, 1);
        p->data += n;
    }
    p->bytes -= n;
    w->stats.bytes += n;
    return rc;
}

/* Nothing is left of the files that are not committed. */
static void discard_from(ds_writer *w, int first)
{
    for (int i = first; i < w->count; i++)
        if (w->parts[i].commit)
            ds_file_discard(w->parts[i].file);
    w->next = w->count;
}

/* Whether the caller, who asks for it, may copy what is left once nothing is under way. */
static int may_copy(const ds_writer *w)
{
    return w->leaving == ASKED && w->left <= w->most;
}

/* The lock is held. Nothing of the file is under way afterwards. */
static int drain(ds_writer *w, ds_file *f)
{
    int rc;

    pthread_mutex_unlock(&w->lock);
    rc = ds_file_drain(f);
    pthread_mutex_lock(&w->lock);
    return rc;
}

/* The lock is held. Stands still while the caller copies what is left. */
static int stand(ds_writer *w, const part *p)
{
    int rc;

    if (!may_copy(w))
        return 0;
    rc = drain(w, p->file);
    w->leaving = STANDS;
    pthread_cond_broadcast(&w->moved);
    while (w->leaving == STANDS)
        pthread_cond_wait(&w->moved, &w->lock);
    return rc;
}

static void *write_all(void *argument)
{
    ds_writer *w = argument;
    double begun = seconds(CLOCK_MONOTONIC);
    int rc = 0;

    pthread_mutex_lock(&w->lock);
    while (w->next < w->count && !w->stop && rc >= 0) {
        part *p = &w->parts[w->next];
        int64_t before = p->bytes;

        rc = stand(w, p);
        if (rc >= 0 && p->commit) {
            rc = drain(w, p->file);
            w->quiet = 1;
            pthread_cond_broadcast(&w->moved);
        }
        if (rc < 0)
            break;
        pthread_mutex_unlock(&w->lock);
        rc = write_piece(w, p);
        pthread_mutex_lock(&w->lock);
        w->quiet = 0;
        w->left -= before - p->bytes;
        if (p->bytes == 0)
            w->next++; /* a commit takes the file away also when it fails */
    }
    if (rc < 0) {
        w->code = rc;
        snprintf(w->message, sizeof w->message, "%s", ds_error());
    }
    discard_from(w, w->next);
    w->stats.seconds = seconds(CLOCK_MONOTONIC) - begun;
    w->stats.cpu_seconds = seconds(CLOCK_THREAD_CPUTIME_ID);
    w->over = 1;
    pthread_cond_broadcast(&w->moved);
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

int ds_writer_start(ds_writer *w)
{
    sigset_t all, before;
    int rc;

    sigfillset(&all); /* signals are the main thread's */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(&w->thread, NULL, write_all, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc)
        return ds_fail(DS_ENOMEM, "cannot start the thread that writes: %s", strerror(rc));
    w->started = 1;
    return 0;
}

/* ---- the caller */

static int result(const ds_writer *w)
{
    return w->code < 0 ? ds_fail(w->code, "%s", w->message) : 0;
}

int ds_writer_state(ds_writer *w)
{
    int over;

    pthread_mutex_lock(&w->lock);
    over = w->over;
    pthread_mutex_unlock(&w->lock);
    return over ? result(w) : 1;
}

int ds_writer_wait(ds_writer *w)
{
    pthread_mutex_lock(&w->lock);
    while (!w->over)
        pthread_cond_wait(&w->moved, &w->lock);
    pthread_mutex_unlock(&w->lock);
    return result(w);
}

/* Of a matrix whose first columns are written the copy has all that lies behind them in memory. */
static int64_t span_of(const part *p)
{
    int64_t left = p->columns && p->rows ? p->bytes / p->rows : 0; /* bytes of a row */

    return p->columns && p->bytes ? (p->rows - 1) * p->columns * p->size + left : p->bytes;
}

/* The thread stands still; the lock is held. */
static int copy_rest(ds_writer *w)
{
    int64_t bytes = 0;
    char *to;

    for (int i = w->next; i < w->count; i++)
        bytes += (span_of(&w->parts[i]) + DS_IO_ALIGN - 1) / DS_IO_ALIGN * DS_IO_ALIGN;
    if (bytes == 0)
        return 0;
    if (posix_memalign((void **)&w->copy, HUGE, (size_t)bytes))
        return ds_fail(DS_ENOMEM, "out of host memory: %lld bytes for a copy", (long long)bytes);
    madvise(w->copy, (size_t)bytes, MADV_HUGEPAGE); /* where that fails, pages are small */
    to = w->copy;
    for (int i = w->next; i < w->count; i++) {
        part *p = &w->parts[i];
        int64_t span = span_of(p);

        if (span == 0)
            continue;
        memcpy(to, p->data, (size_t)span);
        p->data = to;
        to += (span + DS_IO_ALIGN - 1) / DS_IO_ALIGN * DS_IO_ALIGN;
        w->stats.copied += span;
    }
    return 0;
}

int ds_writer_release(ds_writer *w, int64_t most)
{
    double begun = seconds(CLOCK_MONOTONIC);
    int rc = 0;

    pthread_mutex_lock(&w->lock);
    if (w->started && !w->over && w->leaving == STAYS) {
        w->most = most;
        w->leaving = ASKED;
        while (!w->over && w->leaving != STANDS && !(w->quiet && may_copy(w)))
            pthread_cond_wait(&w->moved, &w->lock);
        if (!w->over)
            rc = copy_rest(w);
        w->stop = rc < 0;
        w->leaving = LEFT;
        pthread_cond_broadcast(&w->moved);
        w->stats.held_seconds = seconds(CLOCK_MONOTONIC) - begun;
    }
    pthread_mutex_unlock(&w->lock);
    return rc;
}

const char *ds_writer_hash(const ds_writer *w, int file)
{
    return w->over && w->code >= 0 && file >= 0 && file < w->files ? w->hashes[file] : NULL;
}

ds_writer_stats ds_writer_statistics(const ds_writer *w)
{
    return w->stats;
}

void ds_writer_close(ds_writer *w)
{
    if (!w)
        return;
    if (w->started) {
        pthread_mutex_lock(&w->lock);
        w->stop = 1;
        pthread_mutex_unlock(&w->lock);
        pthread_join(w->thread, NULL);
    } else {
        discard_from(w, 0);
    }
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->moved);
    free(w->parts);
    free(w->hashes);
    free(w->copy);
    free(w);
}
