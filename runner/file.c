/* file.c - one file, streamed out or in by large blocks and hashed on the way.
 *
 * Writing: large tensors go from where they lie to the disk, if O_DIRECT takes their address; all
 * else is copied into aligned blocks. What is written is hashed while the disk works on what came
 * before, on one thread (no helper that would compete with OpenMP's). A file appears under its name
 * when it is whole and on the disk, or not at all.
 *
 * Reading: once through for the hash, in a window of memory that is the page cache itself, and then
 * tensor by tensor from that cache. Measured against one pass into memory of our own: touching such
 * memory for the first time costs more than copying out of the cache, and it could fail where a
 * cache only shrinks.
 */
#include "runner/file.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/tile.h"
#include "runner/xxh3.h"

#define SMALL ((int64_t)64 << 10) /* up to that, a queue is not worth its set-up */
#define WINDOW ((int64_t)8 << 20) /* of a file that is hashed */
#define TWO_READERS ((int64_t)2 << 20)
#define IN_PLACE ((int64_t)4 << 20) /* at most this much in one write from a tensor's memory */

struct ds_file {
    char *path;      /* as the caller named it */
    char *temporary; /* written under this name; NULL: under its own */
    int fd;
    int direct;    /* fd has O_DIRECT */
    int64_t align; /* that O_DIRECT wants of addresses */
    int made;      /* there is a file that a failure must remove */
    int failed;    /* writing: the first failure; everything later returns it */
    int64_t bytes; /* whole file */
    int64_t at;    /* writing: where the block that is filling begins */
    int64_t filled;
    int slot;
    char *blocks; /* writing: DS_IO_DEPTH of DS_IO_BLOCK, or SMALL bytes for a small file */
    char *strip;  /* of a matrix that is transposed; kept, as fresh pages cost more than the rest */
    int64_t strip_bytes;
    ds_queue *queue;
    XXH3_state_t *hash;
};

static int64_t round_up(int64_t n, int64_t to)
{
    return (n + to - 1) / to * to;
}

/* The digits that `xxhsum -H3` prints. */
static void hash_text(char out[17], uint64_t hash)
{
    snprintf(out, 17, "%016llx", (unsigned long long)hash);
}

static int file_new(ds_file **out, const char *path, int64_t bytes)
{
    ds_file *f = calloc(1, sizeof *f);

    if (f) {
        f->fd = -1;
        f->bytes = bytes;
        f->path = strdup(path);
        f->hash = XXH3_createState();
    }
    if (!f || !f->path || !f->hash) {
        ds_file_close(f);
        return ds_fail(DS_ENOMEM, "out of host memory");
    }
    XXH3_64bits_reset(f->hash);
    *out = f;
    return 0;
}

void ds_file_close(ds_file *f)
{
    if (!f)
        return;
    ds_queue_close(f->queue);
    if (f->fd >= 0)
        close(f->fd);
    XXH3_freeState(f->hash);
    free(f->blocks);
    free(f->strip);
    free(f->temporary);
    free(f->path);
    free(f);
}

int64_t ds_file_bytes(const ds_file *f)
{
    return f->bytes;
}

const char *ds_file_path(const ds_file *f)
{
    return f->path;
}

/* ---- writing */

/* Says what could not be written and, where the disk is full, how much was wanted. */
static int fail_write(ds_file *f, int negative)
{
    int64_t available = 0;

    if (negative == -ENOSPC || negative == -EDQUOT) {
        ds_disk_free(&available, f->path);
        f->failed = ds_fail(DS_EIO, "cannot write '%s': it needs %lld bytes and %lld are free",
                            f->path, (long long)f->bytes, (long long)available);
    } else {
        f->failed = ds_fail_io(negative, "write", f->path);
    }
    return f->failed;
}

/* Temporaries of runs on this host that died while they wrote into the same folder. */
static void clean_dead(const char *folder)
{
    char path[DS_PATH];
    char *names;
    int64_t bytes = ds_folder_list(&names, folder);

    if (bytes < 0)
        return;
    for (char *name = names; name < names + bytes; name += strlen(name) + 1)
        if (ds_temporary_dead(name) &&
            snprintf(path, sizeof path, "%s/%s", folder, name) < (int)sizeof path &&
            ds_path_kind(path) == DS_PATH_FILE)
            ds_io_now()->unlink(path);
    ds_free(names);
}

/* What O_DIRECT wants of an address; a multiple of 4096 is always good. */
static int64_t address_align(int fd)
{
#ifdef STATX_DIOALIGN
    struct statx s;

    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &s) == 0 && s.stx_mask & STATX_DIOALIGN &&
        s.stx_dio_mem_align > 0)
        return s.stx_dio_mem_align;
#endif
    (void)fd;
    return DS_IO_ALIGN;
}

static int open_for_writing(ds_file *f, int replace)
{
    enum ds_io_mode mode = f->bytes <= SMALL ? DS_IO_PLAIN : ds_io_mode_wanted();
    int64_t room = f->bytes <= SMALL ? SMALL : DS_IO_DEPTH * DS_IO_BLOCK;
    int flags = O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC;
    char folder[DS_PATH], name[DS_PATH];
    int rc;

    if (replace) {
        if ((rc = ds_path_folder(folder, f->path)) < 0 ||
            (rc = ds_temporary_name(name, sizeof name, folder)) < 0)
            return rc;
        clean_dead(folder);
        if (!(f->temporary = strdup(name)))
            return ds_fail(DS_ENOMEM, "out of host memory");
    }
    if (posix_memalign((void **)&f->blocks, DS_IO_ALIGN, (size_t)room))
        return ds_fail(DS_ENOMEM, "out of host memory");
    if ((rc = ds_queue_open(&f->queue, mode, DS_IO_DEPTH)) < 0)
        return rc;
    f->direct = mode != DS_IO_PLAIN;
    f->fd = ds_io_now()->open(replace ? name : f->path, flags | (f->direct ? O_DIRECT : 0), 0666);
    if (f->fd == -EINVAL && f->direct) {
        f->direct = 0;
        ds_io_now()->unlink(replace ? name : f->path); /* some make the file before they refuse */
        f->fd = ds_io_now()->open(replace ? name : f->path, flags, 0666);
    }
    if (f->fd < 0)
        return fail_write(f, f->fd);
    f->made = 1;
    f->align = address_align(f->fd);
    rc = ds_io_now()->allocate(f->fd, f->bytes);
    return rc < 0 ? fail_write(f, rc) : 0;
}

int ds_file_create(ds_file **out, const char *path, int64_t bytes, int replace)
{
    ds_file *f;
    int rc = file_new(&f, path, bytes);

    if (rc < 0)
        return rc;
    rc = open_for_writing(f, replace);
    if (rc < 0) {
        ds_file_discard(f);
        return rc;
    }
    *out = f;
    return 0;
}

/* Hashes the next `bytes` of the file and starts writing them, with `padding` zeros behind them
 * that commit cuts off; then waits for the next slot. */
static int issue(ds_file *f, const void *data, int64_t bytes, int64_t padding)
{
    int rc;

    XXH3_64bits_update(f->hash, data, (size_t)bytes);
    rc = ds_io_now()->write(f->queue, f->slot, f->fd, data, bytes + padding, f->at);
    if (rc < 0)
        return fail_write(f, rc);
    f->at += bytes;
    f->slot = (f->slot + 1) % DS_IO_DEPTH;
    rc = ds_queue_wait(f->queue, f->slot);
    return rc < 0 ? fail_write(f, rc) : 0;
}

/* Only the last block of a file may be odd. */
static int flush_block(ds_file *f)
{
    char *block = f->blocks + f->slot * DS_IO_BLOCK;
    int64_t bytes = f->filled;
    int64_t padding = f->direct ? round_up(bytes, DS_IO_ALIGN) - bytes : 0;

    f->filled = 0;
    memset(block + bytes, 0, (size_t)padding);
    return bytes ? issue(f, block, bytes, padding) : 0;
}

/* How much of `from` may be written from where it lies; with something in the block yet, that is
 * flushed first if it ends at a good place. */
static int64_t in_place(const ds_file *f, const char *from, int64_t bytes)
{
    if (!f->direct || f->filled % DS_IO_ALIGN || bytes < DS_IO_BLOCK || (uintptr_t)from % f->align)
        return 0;
    return bytes < IN_PLACE ? bytes / DS_IO_ALIGN * DS_IO_ALIGN : IN_PLACE;
}

int ds_file_append(ds_file *f, const void *data, int64_t bytes, int stays)
{
    int64_t block = f->bytes <= SMALL ? SMALL : DS_IO_BLOCK;
    const char *from = data;

    if (f->failed)
        return f->failed;
    if (bytes < 0 || bytes > f->bytes - f->at - f->filled)
        return f->failed = ds_fail(DS_EINVAL, "'%s' was to have %lld bytes, more were appended",
                                   f->path, (long long)f->bytes);
    while (bytes > 0) {
        int64_t gap = round_up(f->filled, DS_IO_ALIGN) - f->filled; /* to where it could begin */
        int64_t n = block - f->filled < bytes ? block - f->filled : bytes;
        int64_t straight = stays ? in_place(f, from, bytes) : 0;

        if (straight) {
            if (flush_block(f) < 0 || issue(f, from, straight, 0) < 0)
                return f->failed;
            from += straight;
            bytes -= straight;
            continue;
        }
        if (stays && gap && bytes > DS_IO_BLOCK + gap && !((uintptr_t)(from + gap) % f->align))
            n = gap;
        memcpy(f->blocks + f->slot * DS_IO_BLOCK + f->filled, from, (size_t)n);
        f->filled += n;
        from += n;
        bytes -= n;
        if (f->filled == block && flush_block(f) < 0)
            return f->failed;
    }
    return 0;
}

/* ---- a matrix, transposed on its way into the file by strips of columns */

#define STRIP 512 /* bytes of a row that are read at once */
#define AHEAD 32  /* rows: they lie too far apart for the processor to see them coming */

static void transpose(char *out, const char *from, int64_t rows, int64_t stride, int64_t columns,
                      int64_t size)
{
    int64_t side = DS_TILE_BYTES / size;

    for (int64_t r = 0; r < rows; r += side) {
        for (int64_t x = r + AHEAD; x < r + AHEAD + side && x < rows; x++)
            for (int64_t c = 0; c < columns; c += side)
                __builtin_prefetch(from + (x * stride + c) * size);
        for (int64_t c = 0; c < columns; c += side)
            ds_tiles[size](out + (c * rows + r) * size, rows, from + (r * stride + c) * size,
                           stride, columns - c < side ? columns - c : side,
                           rows - r < side ? rows - r : side);
    }
}

int ds_file_append_columns(ds_file *f, const void *from, int64_t rows, int64_t stride,
                           int64_t columns, int64_t size)
{
    int64_t most = STRIP / size < columns ? STRIP / size : columns, need = most * rows * size;

    if (!f->failed && need > f->strip_bytes) {
        free(f->strip);
        f->strip_bytes = need;
        if (!(f->strip = malloc((size_t)need)))
            return f->failed = ds_fail(DS_ENOMEM, "out of host memory");
    }
    for (int64_t c = 0; c < columns && !f->failed; c += most) {
        int64_t n = columns - c < most ? columns - c : most;

        transpose(f->strip, (const char *)from + c * size, rows, stride, n, size);
        ds_file_append(f, f->strip, n * rows * size, 0);
    }
    return f->failed;
}

int ds_file_append_transposed(ds_file *f, const void *data, int64_t rows, int64_t columns,
                              int64_t size)
{
    return ds_file_append_columns(f, data, rows, columns, columns, size);
}

int ds_file_drain(ds_file *f)
{
    for (int i = 0; i < DS_IO_DEPTH && !f->failed; i++) {
        int rc = ds_queue_wait(f->queue, i);

        if (rc < 0)
            fail_write(f, rc);
    }
    return f->failed;
}

/* All blocks on the disk, the file as long as it should be, closed. */
static int settle(ds_file *f)
{
    ds_io *io = ds_io_now();
    int fd = f->fd, rc;

    if (f->at + f->filled != f->bytes)
        return f->failed = ds_fail(DS_EINVAL, "'%s' was to have %lld bytes, %lld were appended",
                                   f->path, (long long)f->bytes, (long long)(f->at + f->filled));
    if (flush_block(f) < 0 || ds_file_drain(f) < 0)
        return f->failed;
    if (f->direct && f->bytes % DS_IO_ALIGN && (rc = io->truncate(fd, f->bytes)) < 0)
        return fail_write(f, rc);
    if ((rc = io->sync(fd)) < 0)
        return fail_write(f, rc);
    f->fd = -1;
    if ((rc = io->close(fd)) < 0)
        return fail_write(f, rc);
    return 0;
}

int ds_file_commit(ds_file *f, char *hash)
{
    char folder[DS_PATH];
    int rc = f->failed ? f->failed : settle(f);

    if (rc >= 0 && f->temporary) {
        rc = ds_io_now()->rename(f->temporary, f->path);
        rc = rc < 0 ? fail_write(f, rc) : ds_path_folder(folder, f->path);
        f->made = f->failed != 0; /* from here on it is the user's file */
        if (rc >= 0)
            rc = ds_folder_sync(folder);
    }
    if (rc < 0) {
        ds_file_discard(f);
        return rc;
    }
    if (hash)
        hash_text(hash, XXH3_64bits_digest(f->hash));
    ds_file_close(f);
    return 0;
}

void ds_file_discard(ds_file *f)
{
    if (!f)
        return;
    ds_queue_close(f->queue); /* before the blocks go */
    f->queue = NULL;
    if (f->fd >= 0)
        ds_io_now()->close(f->fd);
    f->fd = -1;
    if (f->made)
        ds_io_now()->unlink(f->temporary ? f->temporary : f->path);
    ds_file_close(f);
}

int ds_file_put(const char *path, const void *data, int64_t bytes, int replace, char *hash)
{
    ds_file *f;
    int rc = ds_file_create(&f, path, bytes, replace);

    if (rc < 0)
        return rc;
    ds_file_append(f, data, bytes, 1);
    return ds_file_commit(f, hash);
}

/* ---- reading */

int ds_file_open(ds_file **out, const char *path)
{
    struct stat s;
    ds_file *f;
    int rc = file_new(&f, path, 0);

    if (rc < 0)
        return rc;
    f->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (f->fd < 0 || fstat(f->fd, &s) < 0) {
        rc = ds_fail_io(-errno, "read", path);
        goto fail;
    }
    if (!S_ISREG(s.st_mode)) {
        rc = ds_fail(DS_ECORRUPT, "'%s' is not a file", path);
        goto fail;
    }
    f->bytes = s.st_size;
    *out = f;
    return 0;

fail:
    ds_file_close(f);
    return rc;
}

/* Windows of a file, mapped and brought in from the disk by one thread while another hashes the one
 * before: so neither the disk nor the hash waits, and nothing is copied. */
#define WINDOWS 4

struct ahead {
    pthread_mutex_t lock;
    pthread_cond_t moved;
    struct ds_file *file;
    int64_t filled, emptied; /* windows so far; filled - emptied lie in `data` */
    int stop;
    void *data[WINDOWS]; /* NULL: could not be mapped and read, which read() will explain */
};

static int64_t window_bytes(const ds_file *f, int64_t i)
{
    return f->bytes - i * WINDOW < WINDOW ? f->bytes - i * WINDOW : WINDOW;
}

/* Populating turns what would be a fatal signal, a page that can't be read, into an error. */
static void *map_window(const ds_file *f, int64_t i)
{
#ifdef MADV_POPULATE_READ
    size_t bytes = (size_t)window_bytes(f, i);
    void *p = mmap(NULL, bytes, PROT_READ, MAP_SHARED, f->fd, i * WINDOW);

    if (p == MAP_FAILED)
        return NULL;
    if (madvise(p, bytes, MADV_POPULATE_READ) == 0)
        return p;
    munmap(p, bytes);
#else
    (void)f, (void)i;
#endif
    return NULL;
}

static void *read_ahead(void *argument)
{
    struct ahead *a = argument;

    pthread_mutex_lock(&a->lock);
    while (!a->stop && a->filled * WINDOW < a->file->bytes) {
        void *p;

        if (a->filled - a->emptied == WINDOWS) {
            pthread_cond_wait(&a->moved, &a->lock);
            continue;
        }
        pthread_mutex_unlock(&a->lock);
        p = map_window(a->file, a->filled); /* only this thread changes `filled` */
        pthread_mutex_lock(&a->lock);
        a->data[a->filled++ % WINDOWS] = p;
        pthread_cond_signal(&a->moved);
    }
    pthread_mutex_unlock(&a->lock);
    return NULL;
}

static void *next_window(struct ahead *a)
{
    void *p;

    pthread_mutex_lock(&a->lock);
    while (a->filled == a->emptied)
        pthread_cond_wait(&a->moved, &a->lock);
    p = a->data[a->emptied % WINDOWS];
    pthread_mutex_unlock(&a->lock);
    return p;
}

static void window_done(struct ahead *a, void *p, int stop)
{
    pthread_mutex_lock(&a->lock);
    if (p)
        munmap(p, (size_t)window_bytes(a->file, a->emptied));
    a->emptied++;
    a->stop = stop;
    pthread_cond_signal(&a->moved);
    pthread_mutex_unlock(&a->lock);
}

/* The window by plain reads, where it could not be mapped. */
static int hash_read(ds_file *f, char **buffer, int64_t i)
{
    int64_t bytes = window_bytes(f, i);
    int rc;

    if (!*buffer && !(*buffer = malloc((size_t)(f->bytes < WINDOW ? f->bytes : WINDOW))))
        return ds_fail(DS_ENOMEM, "out of host memory");
    rc = ds_file_read(f, *buffer, bytes, i * WINDOW);
    if (rc >= 0)
        XXH3_64bits_update(f->hash, *buffer, (size_t)bytes);
    return rc;
}

int ds_file_hash(ds_file *f, char *hash)
{
    struct ahead a = {
        .lock = PTHREAD_MUTEX_INITIALIZER, .moved = PTHREAD_COND_INITIALIZER, .file = f};
    int64_t windows = (f->bytes + WINDOW - 1) / WINDOW;
    char *buffer = NULL;
    pthread_t helper;
    int rc = 0, helped;

    XXH3_64bits_reset(f->hash);
    helped = f->bytes > SMALL && pthread_create(&helper, NULL, read_ahead, &a) == 0;
    for (int64_t i = 0; i < windows && rc >= 0; i++) {
        void *p = helped ? next_window(&a) : NULL;

        if (p)
            XXH3_64bits_update(f->hash, p, (size_t)window_bytes(f, i));
        else
            rc = hash_read(f, &buffer, i);
        if (helped)
            window_done(&a, p, rc < 0);
    }
    if (helped) {
        pthread_join(helper, NULL);
        for (; a.emptied < a.filled; a.emptied++) /* after an error */
            if (a.data[a.emptied % WINDOWS])
                munmap(a.data[a.emptied % WINDOWS], (size_t)window_bytes(f, a.emptied));
    }
    free(buffer);
    if (rc >= 0)
        hash_text(hash, XXH3_64bits_digest(f->hash));
    return rc;
}

struct piece {
    char *data;
    int64_t bytes, at;
    int fd;
    int rc; /* 0, -errno, or -ENODATA where the file has become shorter */
};

static void *read_piece(void *argument)
{
    struct piece *p = argument;

    for (int64_t moved = 0; moved < p->bytes && !p->rc;) {
        ssize_t n = pread(p->fd, p->data + moved, (size_t)(p->bytes - moved), p->at + moved);

        if (n > 0)
            moved += n;
        else if (n == 0 || errno != EINTR)
            p->rc = n == 0 ? -ENODATA : -errno;
    }
    return NULL;
}

int ds_file_read(ds_file *f, void *data, int64_t bytes, int64_t at)
{
    struct piece all = {.data = data, .bytes = bytes, .at = at, .fd = f->fd}, rest = all;
    pthread_t helper;
    int helped = 0;

    if (bytes < 0 || at < 0 || at > f->bytes || bytes > f->bytes - at)
        return ds_fail(DS_ERANGE, "'%s' has %lld bytes, not %lld from byte %lld on", f->path,
                       (long long)f->bytes, (long long)bytes, (long long)at);
    /* Copying out of the page cache keeps a core busy: a second one takes half of it. */
    if (bytes >= TWO_READERS) {
        int64_t half = bytes / 2 / DS_IO_ALIGN * DS_IO_ALIGN;

        rest = (struct piece){
            .data = all.data + half, .bytes = bytes - half, .at = at + half, .fd = f->fd};
        helped = pthread_create(&helper, NULL, read_piece, &rest) == 0;
        all.bytes = helped ? half : bytes;
    }
    read_piece(&all);
    if (helped) {
        pthread_join(helper, NULL);
        all.rc = all.rc ? all.rc : rest.rc;
    }
    if (all.rc == -ENODATA)
        return ds_fail(DS_ECORRUPT, "'%s' became shorter while it was read", f->path);
    return all.rc < 0 ? ds_fail_io(all.rc, "read", f->path) : 0;
}

void ds_hash(char *out, const void *data, int64_t bytes)
{
    hash_text(out, XXH3_64bits(data, (size_t)bytes));
}
