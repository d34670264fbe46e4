/* io.c - the door to the disk: a table of the calls that change it, a queue, and folders.
 *
 * Everything that writes goes through ds_io_now(), so a test can put a recorder there and then ask
 * what a disk would hold after a crash at any moment. The calls return -errno rather than set it.
 *
 * The queue is io_uring with O_DIRECT where the system allows both: blocks under way keep a disk
 * busy while this thread copies and hashes the next one, and the page cache stays out of it.
 */
#include "runner/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#ifndef RENAME_EXCHANGE
#define RENAME_EXCHANGE (1 << 1)
#endif

/* ---- the seam */

static int plain(int rc)
{
    return rc < 0 ? -errno : rc;
}

static int sys_open(const char *path, int flags, int mode)
{
    return plain(open(path, flags, mode));
}

static int sys_close(int fd)
{
    return plain(close(fd));
}

/* Not posix_fallocate: where the file system can't, that writes zeros, twice the work. */
static int sys_allocate(int fd, int64_t bytes)
{
    int rc = plain(fallocate(fd, 0, 0, bytes));

    return rc == -EOPNOTSUPP || rc == -ENOSYS || rc == -EINVAL ? 0 : rc;
}

static int sys_truncate(int fd, int64_t bytes)
{
    return plain(ftruncate(fd, bytes));
}

static int sys_sync(int fd)
{
    return plain(fsync(fd));
}

static int sys_rename(const char *from, const char *to)
{
    return plain(rename(from, to));
}

static int sys_exchange(const char *a, const char *b)
{
    return plain(renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE));
}

static int sys_mkdir(const char *path)
{
    return plain(mkdir(path, 0777));
}

static int sys_unlink(const char *path)
{
    return plain(unlink(path));
}

static int sys_rmdir(const char *path)
{
    return plain(rmdir(path));
}

static ds_io io = {
    .open = sys_open,
    .close = sys_close,
    .allocate = sys_allocate,
    .write = ds_queue_write,
    .truncate = sys_truncate,
    .sync = sys_sync,
    .rename = sys_rename,
    .exchange = sys_exchange,
    .mkdir = sys_mkdir,
    .unlink = sys_unlink,
    .rmdir = sys_rmdir,
};

ds_io *ds_io_now(void)
{
    return &io;
}

enum ds_io_mode ds_io_mode_wanted(void)
{
    static const char *const names[] = {"plain", "direct", "uring"};
    const char *asked = getenv("DS_IO");

    for (int i = 0; asked && i < 3; i++)
        if (!strcmp(asked, names[i]))
            return (enum ds_io_mode)i;
    return DS_IO_URING;
}

/* ---- the queue */

enum state { FREE, UNDER_WAY, OVER }; /* OVER: not yet waited for */

struct transfer {
    char *data;
    int64_t bytes, at;
    int fd, writes;
    enum state state;
    int result; /* once over: 0 or -errno */
};

struct ds_queue {
    struct io_uring ring;
    int ringed, depth;
    struct transfer slots[]; /* [depth] */
};

int ds_queue_open(ds_queue **out, enum ds_io_mode mode, int depth)
{
    ds_queue *q = calloc(1, sizeof *q + (size_t)depth * sizeof q->slots[0]);

    if (!q)
        return ds_fail(DS_ENOMEM, "out of host memory");
    q->depth = depth;
    if (mode == DS_IO_URING)
        q->ringed = io_uring_queue_init((unsigned)depth, &q->ring, 0) == 0;
    *out = q;
    return 0;
}

void ds_queue_close(ds_queue *q)
{
    if (!q)
        return;
    for (int i = 0; i < q->depth; i++)
        ds_queue_wait(q, i); /* the kernel must not touch memory that is freed next */
    if (q->ringed)
        io_uring_queue_exit(&q->ring);
    free(q);
}

int ds_queue_ringed(const ds_queue *q)
{
    return q->ringed;
}

/* O_DIRECT was accepted at open and is refused by the transfer: go on through the page cache. */
static int drop_direct(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    return flags >= 0 && (flags & O_DIRECT) && fcntl(fd, F_SETFL, flags & ~O_DIRECT) == 0;
}

/* Moves what is left after the first `done` bytes, here and now: all of it without a ring, else
 * what the ring refused or cut short; a real error shows itself again. */
static void finish(struct transfer *t, int64_t done)
{
    t->result = 0;
    t->state = OVER;
    while (done < t->bytes) {
        char *data = t->data + done;
        size_t left = (size_t)(t->bytes - done);
        ssize_t n = t->writes ? pwrite(t->fd, data, left, t->at + done)
                              : pread(t->fd, data, left, t->at + done);

        if (n > 0) {
            done += n;
        } else if (n == 0 || (errno != EINTR && !(errno == EINVAL && drop_direct(t->fd)))) {
            t->result = n < 0 ? -errno : t->writes ? -EIO : -ENODATA;
            return;
        }
    }
}

/* data is only read where it is to be written. */
static void prepare(ds_queue *q, int slot, int fd, const void *data, int64_t bytes, int64_t at,
                    int writes)
{
    struct io_uring_sqe *sqe = q->ringed ? io_uring_get_sqe(&q->ring) : NULL;
    struct transfer *t = &q->slots[slot];

    *t = (struct transfer){
        .data = (char *)data, .bytes = bytes, .at = at, .fd = fd, .writes = writes};
    if (!sqe) {
        finish(t, 0);
        return;
    }
    t->state = UNDER_WAY;
    if (writes)
        io_uring_prep_write(sqe, fd, data, (unsigned)bytes, (uint64_t)at);
    else
        io_uring_prep_read(sqe, fd, t->data, (unsigned)bytes, (uint64_t)at);
    io_uring_sqe_set_data64(sqe, (uint64_t)slot);
}

void ds_queue_prepare_write(ds_queue *q, int slot, int fd, const void *data, int64_t bytes,
                            int64_t at)
{
    prepare(q, slot, fd, data, bytes, at, 1);
}

void ds_queue_prepare_read(ds_queue *q, int slot, int fd, void *data, int64_t bytes, int64_t at)
{
    prepare(q, slot, fd, data, bytes, at, 0);
}

int ds_queue_submit(ds_queue *q)
{
    while (q->ringed && io_uring_sq_ready(&q->ring)) {
        int rc = io_uring_submit(&q->ring);

        if (rc < 0 && rc != -EINTR && rc != -EAGAIN && rc != -EBUSY)
            return rc;
    }
    return 0;
}

int ds_queue_write(ds_queue *q, int slot, int fd, const void *data, int64_t bytes, int64_t at)
{
    int rc;

    prepare(q, slot, fd, data, bytes, at, 1);
    rc = ds_queue_submit(q);
    if (rc < 0)
        q->slots[slot].state = FREE;
    return rc;
}

/* Waits until the ring has done one more transfer. */
static int reap(ds_queue *q)
{
    struct io_uring_cqe *cqe;
    struct transfer *t;
    int moved, rc;

    do
        rc = io_uring_wait_cqe(&q->ring, &cqe);
    while (rc == -EINTR);
    if (rc < 0)
        return rc;
    t = &q->slots[io_uring_cqe_get_data64(cqe)];
    moved = cqe->res;
    t->state = OVER;
    io_uring_cqe_seen(&q->ring, cqe);
    if (moved < t->bytes) {
        drop_direct(t->fd); /* an odd rest is not aligned any more */
        finish(t, moved > 0 ? moved : 0);
    }
    return 0;
}

int ds_queue_wait(ds_queue *q, int slot)
{
    struct transfer *t = &q->slots[slot];
    int rc = 0;

    while (t->state == UNDER_WAY && rc >= 0)
        rc = reap(q);
    t->state = FREE;
    return rc < 0 ? rc : t->result;
}

int ds_queue_next(ds_queue *q, int *slot)
{
    int rc = 0;

    while (rc >= 0) {
        for (int i = 0; i < q->depth; i++)
            if (q->slots[i].state == OVER) {
                *slot = i;
                return ds_queue_wait(q, i);
            }
        rc = reap(q);
    }
    *slot = -1;
    return rc;
}

/* ---- reasons */

int ds_fail_io(int negative, const char *what, const char *path)
{
    int64_t available = 0;

    switch (-negative) {
    case ENOENT:
        return ds_fail(DS_ENOENT, "cannot %s '%s': no such file or folder", what, path);
    case ENOSPC:
    case EDQUOT:
        ds_disk_free(&available, path);
        return ds_fail(DS_EIO, "cannot %s '%s': the disk is full (%lld bytes are free)", what, path,
                       (long long)available);
    default:
        return ds_fail(DS_EIO, "cannot %s '%s': %s", what, path, strerror(-negative));
    }
}

int ds_path_folder(char *out, const char *path)
{
    const char *slash = strrchr(path, '/');
    int bytes = slash == path ? 1 : slash ? (int)(slash - path) : 0;
    int n = snprintf(out, DS_PATH, "%.*s", bytes ? bytes : 1, bytes ? path : ".");

    return n < DS_PATH ? 0 : ds_fail(DS_EINVAL, "a path of %d bytes is too long", n);
}

/* ---- names of temporaries: ".tmp-HOST-PID-N", so that the next run can tell which are dead */

static int host_name(char out[33])
{
    char name[256] = "";
    int n = 0;

    gethostname(name, sizeof name - 1);
    for (const char *c = name; *c && n < 32; c++)
        out[n++] = *c == '/' || *c == '-' ? '_' : *c;
    out[n] = 0;
    return n;
}

int ds_temporary_name(char *out, int64_t bytes, const char *folder)
{
    static int64_t counter;
    char host[33];
    int n;

    host_name(host);
    n = snprintf(out, (size_t)bytes, "%s/.tmp-%s-%ld-%lld", folder, host, (long)getpid(),
                 (long long)__atomic_add_fetch(&counter, 1, __ATOMIC_RELAXED));
    return n < bytes ? 0 : ds_fail(DS_EINVAL, "the path '%.200s…' is too long", folder);
}

int ds_temporary_dead(const char *name)
{
    char host[33], theirs[33];
    long pid;
    int end = 0;

    if (sscanf(name, ".tmp-%32[^-]-%ld-%*d%n", theirs, &pid, &end) != 2 || name[end] || pid <= 0)
        return 0;
    host_name(host);
    return !strcmp(host, theirs) && pid != (long)getpid() && kill((pid_t)pid, 0) < 0 &&
           errno == ESRCH;
}

/* ---- folders */

int ds_path_kind(const char *path)
{
    struct stat s;

    if (lstat(path, &s) < 0)
        return errno == ENOENT || errno == ENOTDIR ? DS_PATH_NONE
                                                   : ds_fail_io(-errno, "look at", path);
    return S_ISDIR(s.st_mode) ? DS_PATH_FOLDER : S_ISREG(s.st_mode) ? DS_PATH_FILE : DS_PATH_OTHER;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

int64_t ds_folder_list(char **out, const char *path)
{
    DIR *d = opendir(path);
    char **names = NULL, *text = NULL;
    int64_t n = 0, room = 0, bytes = 0, rc = DS_ENOMEM;
    struct dirent *e;

    if (!d)
        return ds_fail_io(-errno, "list", path);
    while (errno = 0, (e = readdir(d))) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        if (n == room) {
            char **more = realloc(names, sizeof *names * (size_t)(room = room * 2 + 16));

            if (!more)
                goto out;
            names = more;
        }
        if (!(names[n] = strdup(e->d_name)))
            goto out;
        bytes += (int64_t)strlen(names[n++]) + 1;
    }
    if (errno) {
        rc = ds_fail_io(-errno, "list", path);
        goto out;
    }
    if (!(text = malloc((size_t)bytes + 1)))
        goto out;
    if (n)
        qsort(names, (size_t)n, sizeof *names, compare_names);
    rc = 0;
    for (int64_t i = 0; i < n; i++) {
        size_t length = strlen(names[i]) + 1;

        memcpy(text + rc, names[i], length);
        rc += (int64_t)length;
    }
    *out = text;
out:
    if (rc == DS_ENOMEM)
        ds_fail(DS_ENOMEM, "out of host memory");
    while (n--)
        free(names[n]);
    free(names);
    closedir(d);
    return rc;
}

void ds_free(void *memory)
{
    free(memory);
}

int ds_folder_sync(const char *path)
{
    int fd = io.open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    int rc = fd;

    if (fd >= 0) {
        rc = io.sync(fd);
        io.close(fd);
    }
    /* Some network file systems have no fsync of a folder. */
    return rc >= 0 || rc == -EINVAL ? 0 : ds_fail_io(rc, "sync", path);
}

int ds_folder_make(const char *path)
{
    char parent[DS_PATH];
    struct stat s;
    int rc;

    if (ds_path_kind(path) == DS_PATH_FOLDER)
        return 0;
    if ((rc = ds_path_folder(parent, path)) < 0)
        return rc;
    rc = io.mkdir(path);
    if (rc == -ENOENT && strcmp(parent, path)) {
        if ((rc = ds_folder_make(parent)) < 0)
            return rc;
        rc = io.mkdir(path);
    }
    if (rc ==
        -EEXIST) /* another rank was first, or a link to a folder; else a file is in the way */
        rc = stat(path, &s) < 0 ? -errno : S_ISDIR(s.st_mode) ? 0 : -ENOTDIR;
    if (rc < 0)
        return ds_fail_io(rc, "make the folder", path);
    return ds_folder_sync(parent);
}

int ds_rename(const char *from, const char *to)
{
    int rc = io.rename(from, to);

    return rc < 0 ? ds_fail_io(rc, "rename to", to) : 0;
}

int ds_exchange(const char *a, const char *b)
{
    int rc = io.exchange(a, b);

    if (rc == -EINVAL || rc == -ENOSYS || rc == -EOPNOTSUPP)
        return 0;
    return rc < 0 ? ds_fail_io(rc, "exchange", b) : 1;
}

/* `path` holds the name of the tree and has room for the names in it. */
static int remove_tree(char *path)
{
    size_t length = strlen(path);
    int kind = ds_path_kind(path), rc = 0;
    char *names = NULL;
    int64_t bytes;

    if (kind == DS_PATH_NONE || kind < 0)
        return kind;
    if (kind != DS_PATH_FOLDER) {
        rc = io.unlink(path);
        return rc < 0 && rc != -ENOENT ? ds_fail_io(rc, "remove", path) : 0;
    }
    bytes = ds_folder_list(&names, path);
    if (bytes < 0)
        return (int)bytes;
    for (int64_t at = 0; at < bytes && rc >= 0; at += (int64_t)strlen(names + at) + 1) {
        if (snprintf(path + length, DS_PATH - length, "/%s", names + at) >= (int)(DS_PATH - length))
            rc = ds_fail(DS_EINVAL, "a path in '%.200s…' is too long", path);
        else
            rc = remove_tree(path);
        path[length] = 0;
    }
    free(names);
    if (rc < 0)
        return rc;
    rc = io.rmdir(path);
    return rc < 0 && rc != -ENOENT ? ds_fail_io(rc, "remove", path) : 0;
}

int ds_remove(const char *path)
{
    char buffer[DS_PATH];

    if (snprintf(buffer, sizeof buffer, "%s", path) >= (int)sizeof buffer)
        return ds_fail(DS_EINVAL, "the path '%.200s…' is too long", path);
    return remove_tree(buffer);
}

int ds_disk_free(int64_t *bytes, const char *path)
{
    struct statvfs s;
    char folder[DS_PATH];

    if (statvfs(path, &s) < 0 && (ds_path_folder(folder, path) < 0 || statvfs(folder, &s) < 0))
        return ds_fail_io(-errno, "look at", path);
    /* a file system that doesn't count its blocks is not full */
    *bytes = s.f_blocks ? (int64_t)s.f_bavail * (int64_t)s.f_frsize : INT64_MAX;
    return 0;
}

int ds_folder_lock(const char *path, int32_t timeout_ms)
{
    const struct timespec pause = {.tv_nsec = 20 * 1000 * 1000};
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    if (fd < 0)
        return ds_fail_io(-errno, "lock", path);
    for (int waited = 0; flock(fd, LOCK_EX | LOCK_NB) < 0; waited += 20) {
        int e = errno;

        if ((e == EWOULDBLOCK || e == EINTR) && waited < timeout_ms) {
            nanosleep(&pause, NULL);
            continue;
        }
        close(fd);
        if (e == EWOULDBLOCK)
            return ds_fail(DS_EIO,
                           "another process has been saving into '%s' for %d s; give each "
                           "run a folder of its own",
                           path, timeout_ms / 1000);
        return DS_FOLDER_NO_LOCK;
    }
    return fd;
}

void ds_folder_unlock(int fd)
{
    close(fd);
}
