/* file.h - files and folders, written so that they survive a crash, and read with a check.
 *
 * Three layers: io.c (the one door to the operating system for everything that changes a disk, and
 * a queue of writes), file.c (one file, streamed out or in, hashed on the way),
 * safetensors.c (tensors in such a file). What Lua may call is in ds.h.
 */
#ifndef DS_FILE_H
#define DS_FILE_H

#include <sys/types.h>

#include "runner/ds.h"

#define DS_IO_ALIGN 4096                 /* of addresses, offsets and sizes, for O_DIRECT */
#define DS_IO_BLOCK ((int64_t)512 << 10) /* one write; 16 of them stay in the cache */
#define DS_IO_DEPTH 16                   /* so many under way */

/* How bytes move. DS_IO=plain|direct|uring forces one; each falls back to the one before it where
 * the system refuses (tmpfs has no O_DIRECT, containers often forbid io_uring). */
enum ds_io_mode { DS_IO_PLAIN, DS_IO_DIRECT, DS_IO_URING };

enum ds_io_mode ds_io_mode_wanted(void);

/* A queue of transfers between memory and files, for one thread. In mode uring they run while the
 * caller works; otherwise starting one is doing it. Slots are the caller's: 0 to depth - 1, one
 * transfer each at a time, whose memory stays where it is until it is waited for. */
int ds_queue_open(ds_queue **out, enum ds_io_mode mode, int depth);
void ds_queue_close(ds_queue *q);
int ds_queue_ringed(const ds_queue *q); /* 1: transfers run while the caller works */
/* Starts a write. 0 or -errno; what is wrong with the transfer itself is told by ds_queue_wait. */
int ds_queue_write(ds_queue *q, int slot, int fd, const void *data, int64_t bytes, int64_t at);
/* The same in two parts, so that several transfers start by one call to the system. */
void ds_queue_prepare_write(ds_queue *q, int slot, int fd, const void *data, int64_t bytes,
                            int64_t at);
void ds_queue_prepare_read(ds_queue *q, int slot, int fd, void *data, int64_t bytes, int64_t at);
int ds_queue_submit(ds_queue *q);
/* Waits until the slot's last transfer is over: 0 when all of it was moved, or -errno; -ENODATA: the
 * file ends before. next: until any is; *slot says which, -1 where waiting itself failed. There must
 * be one. */
int ds_queue_wait(ds_queue *q, int slot);
int ds_queue_next(ds_queue *q, int *slot);

/* ds_file_append() of some columns of a matrix, as rows. from: the first element of the first one;
 * `stride` elements lie between two rows. */
int ds_file_append_columns(ds_file *f, const void *from, int64_t rows, int64_t stride,
                           int64_t columns, int64_t size);
/* Returns when the disk has all that was issued: the memory it was issued from may change. */
int ds_file_drain(ds_file *f);

/* ds_fail() with the reason in words for a file operation that gave -errno. */
int ds_fail_io(int negative, const char *what, const char *path);

/* Files that are read as they are (whole.c); the messages name the path. */
struct stat;
/* Opens a file, or a pipe, to read it: the descriptor, or a negative code. */
int ds_read_open(struct stat *out, const char *path);
/* All of it, and a 0 behind, in memory that the caller frees. More than `most` bytes: DS_ECORRUPT. */
int ds_read_whole(char **out, int64_t *bytes, const char *path, int64_t most);

/* The folder that a path is in: "." without a slash. `out` has room for DS_PATH bytes. */
#define DS_PATH 4096
int ds_path_folder(char *out, const char *path);

#endif
