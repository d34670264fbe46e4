/* ranklogs.c - a file for each rank's output, on a file system that may be full, or not answer.
 *
 * A thread makes all calls that touch the files: one that never returns, as those for a network file
 * system whose server is gone, then keeps nobody else from working, and not the process from ending.
 */
#include "runner/ranklogs.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/ds.h"

typedef struct piece {
    struct piece *next;
    int rank;
    size_t bytes;
    char text[];
} piece;

struct ds_ranklogs {
    char *folder;
    int ranks;
    int *files;  /* [ranks]; -1: none; the thread's */
    int *faults; /* [ranks]: the error that ended the file, 0: none; negative: it was told */
    double patience;
    pthread_mutex_t lock;         /* of what follows, and of faults */
    pthread_cond_t more, changed; /* for the thread; for the owner */
    piece *first, **last;
    size_t waiting; /* bytes */
    double since;   /* when the thread's call to the file system began; 0: it makes none */
    int opened;     /* 1: all of them are; otherwise what went wrong, and a message */
    char why[DS_ERROR_BYTES];
    int given_up; /* 1: the file system does not answer; 2: that was told */
    int closing;  /* 1: the owner wants no more of it; whoever is last frees it */
    int ended;    /* 1: the thread is about to */
};

static void release(ds_ranklogs *l)
{
    while (l->first) {
        piece *p = l->first;

        l->first = p->next;
        free(p);
    }
    pthread_mutex_destroy(&l->lock);
    pthread_cond_destroy(&l->more);
    pthread_cond_destroy(&l->changed);
    free(l->folder);
    free(l->files);
    free(l->faults);
    free(l);
}

/* ---- the thread */

/* Before each call that may take for ever (since: now), and behind the last one (0). */
static void calls_since(ds_ranklogs *l, double since)
{
    pthread_mutex_lock(&l->lock);
    l->since = since;
    pthread_cond_signal(&l->changed);
    pthread_mutex_unlock(&l->lock);
}

static int open_all(ds_ranklogs *l)
{
    int rc = ds_folder_make(l->folder);

    for (int r = 0; rc == 0 && r < l->ranks; r++) {
        char path[PATH_MAX];

        calls_since(l, ds_seconds());
        snprintf(path, sizeof path, "%s/rank_%d.log", l->folder, r);
        l->files[r] = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
        if (l->files[r] < 0)
            rc = ds_fail(DS_EIO, "cannot write %s: %s", path, strerror(errno));
    }
    return rc;
}

/* 0, or why not all could be written. */
static int write_all(int file, const char *text, size_t bytes)
{
    while (bytes > 0) {
        ssize_t n = write(file, text, bytes);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno;
        text += n;
        bytes -= (size_t)n;
    }
    return 0;
}

/* The next piece, once there is one; NULL: there will be no more. */
static piece *next_piece(ds_ranklogs *l)
{
    piece *p = NULL;

    pthread_mutex_lock(&l->lock);
    while (!l->first && !l->closing)
        pthread_cond_wait(&l->more, &l->lock);
    if (!l->closing) {
        p = l->first;
        l->first = p->next;
        if (!l->first)
            l->last = &l->first;
    }
    pthread_mutex_unlock(&l->lock);
    return p;
}

static void write_piece(ds_ranklogs *l, piece *p)
{
    int error = 0;

    calls_since(l, ds_seconds());
    if (l->files[p->rank] >= 0)
        error = write_all(l->files[p->rank], p->text, p->bytes);
    if (error) {
        close(l->files[p->rank]);
        l->files[p->rank] = -1;
    }
    pthread_mutex_lock(&l->lock);
    l->waiting -= p->bytes;
    if (error)
        l->faults[p->rank] = error;
    pthread_mutex_unlock(&l->lock);
    calls_since(l, 0);
    free(p);
}

static void *work(void *data)
{
    ds_ranklogs *l = data;
    int rc, last;
    piece *p;

    rc = open_all(l);
    pthread_mutex_lock(&l->lock);
    if (rc < 0)
        snprintf(l->why, sizeof l->why, "%s", ds_error());
    l->opened = rc < 0 ? rc : 1;
    pthread_mutex_unlock(&l->lock);
    calls_since(l, 0);
    while (rc == 0 && (p = next_piece(l)))
        write_piece(l, p);
    for (int r = 0; r < l->ranks; r++) {
        calls_since(l, ds_seconds());
        if (l->files[r] >= 0)
            close(l->files[r]);
    }
    pthread_mutex_lock(&l->lock);
    l->ended = 1;
    last = l->closing == 2;
    pthread_cond_signal(&l->changed);
    pthread_mutex_unlock(&l->lock);
    if (last)
        release(l);
    return NULL;
}

/* ---- the owner */

/* Waits until the thread has done something; 0: it has not within the time. To be called with the lock. */
static int wait_for_change(ds_ranklogs *l, double seconds)
{
    struct timespec end;

    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += (time_t)seconds;
    end.tv_nsec += (long)((seconds - (double)(time_t)seconds) * 1e9);
    if (end.tv_nsec >= 1000000000) {
        end.tv_sec++;
        end.tv_nsec -= 1000000000;
    }
    return pthread_cond_timedwait(&l->changed, &l->lock, &end) == 0;
}

static int start_thread(ds_ranklogs *l)
{
    sigset_t all, before;
    pthread_t thread;
    int rc;

    l->since = ds_seconds();
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the main thread's */
    rc = pthread_create(&thread, NULL, work, l);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc != 0) {
        l->ended = 1;
        return ds_fail(DS_EIO, "no thread for the logs: %s", strerror(rc));
    }
    pthread_detach(thread);
    return 0;
}

static int wait_for_files(ds_ranklogs *l)
{
    int opened;

    pthread_mutex_lock(&l->lock);
    while (!l->opened && wait_for_change(l, l->patience))
        ;
    opened = l->opened;
    pthread_mutex_unlock(&l->lock);
    if (opened < 0)
        return ds_fail(opened, "%s", l->why);
    return opened ? 0
                  : ds_fail(DS_EIO,
                            "%s, the folder for logs, has not answered for %g s: does its file "
                            "system hang?",
                            l->folder, l->patience);
}

int ds_ranklogs_open(ds_ranklogs **out, const char *folder, int ranks, double patience)
{
    ds_ranklogs *l = calloc(1, sizeof *l);
    int rc;

    *out = NULL;
    if (!l)
        return ds_fail(DS_ENOMEM, "out of memory");
    l->folder = strdup(folder);
    l->ranks = ranks;
    l->files = malloc((size_t)ranks * sizeof *l->files);
    l->faults = calloc((size_t)ranks, sizeof *l->faults);
    l->patience = patience;
    l->last = &l->first;
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->more, NULL);
    pthread_cond_init(&l->changed, NULL);
    if (!l->folder || !l->files || !l->faults) {
        release(l);
        return ds_fail(DS_ENOMEM, "out of memory");
    }
    for (int r = 0; r < ranks; r++)
        l->files[r] = -1;
    rc = start_thread(l);
    if (rc == 0)
        rc = wait_for_files(l);
    if (rc < 0)
        ds_ranklogs_close(l);
    else
        *out = l;
    return rc;
}

void ds_ranklogs_close(ds_ranklogs *l)
{
    int last;

    if (!l)
        return;
    pthread_mutex_lock(&l->lock);
    l->closing = 1;
    pthread_cond_signal(&l->more);
    while (!l->ended && !l->given_up && l->opened && wait_for_change(l, l->patience))
        ;
    last = l->ended;
    l->closing = 2;
    pthread_mutex_unlock(&l->lock);
    if (last)
        release(l);
}

void ds_ranklogs_add(ds_ranklogs *l, int rank, const char *text, size_t bytes)
{
    piece *p = malloc(sizeof *p + bytes);

    pthread_mutex_lock(&l->lock);
    if (p && !l->given_up && !l->faults[rank]) {
        p->next = NULL;
        p->rank = rank;
        p->bytes = bytes;
        memcpy(p->text, text, bytes);
        *l->last = p;
        l->last = &p->next;
        l->waiting += bytes;
        pthread_cond_signal(&l->more);
        p = NULL;
    }
    pthread_mutex_unlock(&l->lock);
    free(p);
}

size_t ds_ranklogs_waiting(ds_ranklogs *l)
{
    size_t bytes;

    pthread_mutex_lock(&l->lock);
    bytes = l->given_up ? 0 : l->waiting;
    pthread_mutex_unlock(&l->lock);
    return bytes;
}

int ds_ranklogs_news(ds_ranklogs *l, char *text, size_t bytes)
{
    int some = 0;

    pthread_mutex_lock(&l->lock);
    if (l->since > 0 && ds_seconds() - l->since > l->patience && !l->given_up)
        l->given_up = 1;
    if (l->given_up == 1) {
        l->given_up = 2;
        some = 1;
        snprintf(text, bytes,
                 "dsrun: the logs end here: %s has not answered for %g s; does its file system "
                 "hang?",
                 l->folder, l->patience);
    }
    for (int r = 0; r < l->ranks && !some; r++) {
        if (l->faults[r] <= 0)
            continue;
        snprintf(text, bytes, "dsrun: rank_%d.log ends here: %s", r, strerror(l->faults[r]));
        l->faults[r] = -1;
        some = 1;
    }
    pthread_mutex_unlock(&l->lock);
    return some;
}
