/* ds.h - the FFI surface: all of the runner that Lua may call.
 *
 * C reads this header as it is; Lua reads the same text: the lines between the two marker comments
 * (after those of kernels/tensor.h, before the ds_ops struct that ops.def makes) go verbatim to
 * ffi.cdef. So between the markers: plain declarations, no preprocessor, no includes.
 *
 * Functions return 0 or a negative code from error.h unless they say otherwise; ds_error() has the
 * message. Sizes are bytes or elements, as named; dimensions and indices are 0-based.
 */
#ifndef DS_DS_H
#define DS_DS_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/backend.h"
#include "kernels/tensor.h"

/* ds.h: begin ffi */

/* ---- errors (kernels/error.c) */
const char *ds_error(void);

/* ---- tensors and memory (tensor.c, alloc.c, devices.c) */

/* A new dense tensor, contents undefined. *out is overwritten, what it held is not released. On the
 * meta device there is a shape and a storage without data, whose bytes are counted as if there were.
 * ds_empty4: up to four dimensions without an array. */
int ds_empty(ds_tensor *out, int dtype, int device, int ndim, const int64_t *shape);
int ds_empty4(ds_tensor *out, int dtype, int device, int ndim, int64_t s0, int64_t s1, int64_t s2,
              int64_t s3);

/* Drops the reference that t holds; t->data and t->storage become NULL. Twice is harmless. */
void ds_release(ds_tensor *t);

/* Views: *out takes a reference of its own on x's storage. */
int ds_alias(ds_tensor *out, const ds_tensor *x);
int ds_transpose(ds_tensor *out, const ds_tensor *x, int d0, int d1);
int ds_permute(ds_tensor *out, const ds_tensor *x, const int32_t *order);
int ds_narrow(ds_tensor *out, const ds_tensor *x, int dim, int64_t start, int64_t length);
int ds_select(ds_tensor *out, const ds_tensor *x, int dim, int64_t index);
/* 1: not possible without a copy, *out is untouched. */
int ds_reshape(ds_tensor *out, const ds_tensor *x, int ndim, const int64_t *shape);
int ds_expand(ds_tensor *out, const ds_tensor *x, int ndim, const int64_t *shape);
/* n elements of x's storage from element `offset` of x on, as a dense tensor of that shape. */
int ds_slice_flat(ds_tensor *out, const ds_tensor *x, int64_t offset, int ndim,
                  const int64_t *shape);

/* The first `bytes` of the memory that t lies in, also what is not t's, as u8. */
int ds_whole(ds_tensor *out, const ds_tensor *t, int64_t bytes);
/* t, which was released, again: with the shape and strides that it still has, on x's storage from byte
 * `offset` of x on. It takes a reference of its own. */
int ds_revive(ds_tensor *t, const ds_tensor *x, int64_t offset);

/* Borrowed views, for the length of a kernel call: no reference is taken, never release them.
 * x must be dense but for the first two. rows: [numel / last, last]; columns: its transpose;
 * heads: dims 3 of [B, T, n·width] seen as heads of `width`, `count` of them from `first` on. */
void ds_rows(ds_tensor *out, const ds_tensor *x);
void ds_columns(ds_tensor *out, const ds_tensor *x);
void ds_swapped(ds_tensor *out, const ds_tensor *x); /* last two dimensions swapped */
void ds_heads(ds_tensor *out, const ds_tensor *x, int64_t first, int64_t count, int64_t width);

int ds_references(const ds_tensor *t); /* how many tensors hold t's storage */
int64_t ds_reach(const ds_tensor *t);  /* bytes of the storage up to t's last; 0: t is released */
int64_t ds_dtype_size(int dtype);      /* bytes */
const char *ds_dtype_name(int dtype);

/* Memory counters of a device, bytes. */
typedef struct ds_memory {
    int64_t live;   /* in tensors that hold a reference */
    int64_t peak;   /* highest live */
    int64_t cached; /* kept for reuse */
    int64_t loose;  /* live bytes allocated while no scope was open: the collector's job */
    int64_t takes;  /* allocations that went to the system */
    int64_t calls;  /* allocations asked for */
    int32_t tag;    /* set by Lua before an allocation: the op it is for */
    int32_t scoped; /* set by Lua: 1 while a scope is open */
} ds_memory;        /* tag and scoped: the CPU's count for all devices */
ds_memory *ds_memory_of(int device);
/* Live bytes by tag: fills at most n, returns how many tags there are. */
int ds_memory_by_tag(int device, int64_t *bytes, int n);
void ds_memory_flush(int device); /* gives cached blocks back to the system */
/* Memory in sets: what was taken from one is handed out again within it only. From now on memory comes from
 * `set`, 0 to DS_MEMORY_SETS - 1 (0: at the start); returns the set before. DS_MEMORY_SHARED is one more, of
 * CUDA and once ds_comm_shared() has a group: what ranks exchange lies there. flush looks at 0 and at that one,
 * flush_set gives back what nothing of a set uses. */
enum { DS_MEMORY_SETS = 8, DS_MEMORY_SHARED = DS_MEMORY_SETS };
int ds_memory_set(int device, int set);
void ds_memory_flush_set(int device, int set);
void ds_memory_reset_peak(int device); /* to what is live */
int64_t ds_memory_rss(void);           /* resident bytes of this process now; -1 unknown */
int64_t ds_page_faults(void);          /* minor + major faults of this process */

/* The kernels of a device; NULL if there is no such backend (ds_error() says why). `copy` also goes from
 * one device to another. */
const struct ds_ops *ds_ops_of(int device);
/* Waits for all that was asked of a device; what went wrong there is the error. */
int ds_device_synchronize(int device);
/* The stream of a device's kernels, a cudaStream_t: what a library of your own queues there runs in
 * order with them. NULL for the CPU. */
void *ds_device_stream(int device);
/* "NVIDIA H200, 140 GiB, …"; "" for the CPU. DS_ENOSYS: there is no such device, ds_error() says why. */
int ds_device_describe(char *text, int64_t bytes, int device);
ds_device_counters ds_device_count(int device);
/* Which algorithms were chosen where several would do, as text for a checkpoint, or NULL; and taking a
 * checkpoint's: 1 if that changes what was done before, 0 if not. */
const char *ds_device_choices(int device);
int ds_device_choose(int device, const char *text);
const char *ds_cpu_level(void);
const char *const *ds_cpu_levels(void);

/* ---- what a device does beside the host (later.c) */

/* A new dense tensor on the CPU, in page-locked memory, contents undefined: what transfers go through
 * while host and device do something else. DS_ENOSYS where there is no GPU. */
int ds_empty_pinned(ds_tensor *out, int dtype, int ndim, const int64_t *shape);
int ds_is_pinned(const ds_tensor *t); /* 1 or 0 */

/* A moment on a device; until it is found done (by done, wait, or the next record) an event keeps the
 * memory of its transfer alive. record: after all that was asked of the device's kernels so far. done: 1,
 * 0 not yet, negative: something failed there. follow: the kernels that are asked for from now on wait for
 * it, the host does not. */
typedef struct ds_event ds_event;
int ds_event_make(ds_event **out, int device);
void ds_event_free(ds_event *e); /* waits for its transfer, if there is one */
int ds_event_record(ds_event *e);
int ds_event_done(ds_event *e);
int ds_event_wait(ds_event *e);
int ds_event_follow(ds_event *e);

/* Transfers between page-locked memory and a device, both dense, of one dtype and size. upload: beside the
 * kernels, after those that were asked for before; use `follow` before a kernel reads `to`. download: among
 * the kernels, in their order. The host's side must stay as it is until e is done. */
int ds_upload_later(ds_event *e, ds_tensor *to, const ds_tensor *from);
int ds_download_later(ds_event *e, ds_tensor *to, const ds_tensor *from);
/* A download beside the kernels, after those that were asked for before: they must leave `from` as it is.
 * hand_over: the kernels that are asked for from now on wait for the transfer, as by `follow`, so its memory
 * on the device may be anybody's: e keeps the host's side only. */
int ds_download_beside(ds_event *e, ds_tensor *to, const ds_tensor *from);
int ds_event_hand_over(ds_event *e);

/* From begin to end what is asked of the device's kernels is recorded and not done; whatever would make
 * the host wait fails. end: out NULL drops the record. run does it all again, with the same addresses. */
typedef struct ds_graph ds_graph;
int ds_graph_begin(int device);
int ds_graph_end(ds_graph **out, int device);
int ds_graph_run(ds_graph *g);
void ds_graph_free(ds_graph *g);

/* ---- time and terminal (clock.c) */

double ds_seconds(void); /* since some fixed moment; never goes back */
int ds_terminal(void);   /* 1: stderr is a terminal */

/* ---- process, signals, where the script is (process.c, threads.c, log.c) */

/* The signal that asks this process to stop (SIGINT, SIGTERM, SIGUSR1 by number), or 0. */
int ds_signal_pending(void);
/* 1: one more engine lives that looks at ds_signal_pending() at its step boundaries, so the first
 * signal is left to it (a second one ends the process at once); 0: one fewer. With none, a signal
 * ends the process at once, with 128 + its number. */
void ds_signal_claim(int on);
/* What is being done, copied, for whoever asks by SIGUSR2: "backward". "" when it is done. */
void ds_breadcrumb(const char *text);
int ds_threads(void); /* that kernels use */
/* Step `step` took this rank so long, without the time in which it waited for others: ranks that are
 * slower than the others are named. */
void ds_side_step(int64_t step, double seconds);

enum ds_log_level { DS_LOG_ERROR, DS_LOG_WARNING, DS_LOG_INFO, DS_LOG_DEBUG };
/* A line on stderr with time and rank, if this level is shown: information on rank 0 only. */
void ds_log(int level, const char *text);
int ds_log_shows(int level); /* 1 or 0: whether ds_log() would write it */

/* One line typed by the user, without its end, with editing and history on a terminal; valid until
 * the next call; NULL: the end of input. */
const char *ds_read_line(const char *prompt);
int ds_is_terminal(void); /* 1: input and output are a terminal */
const char *ds_dnnl_version(void);

/* ---- facts of this machine (machine.c) */

/* Addresses of its network interfaces, a line each: "eth0 10.77.0.1/24". To be freed with ds_free();
 * NULL: out of memory. */
char *ds_interfaces(void);
/* Opens a shared library and asks it: cudaRuntimeGetVersion, cudnnGetVersion or ncclGetVersion. As it
 * answers, 13000 or 91900 or 22809; -1: it can't be opened, or does not answer. */
int ds_library_version(const char *file, const char *function);

/* ---- JSON (json.c) */

enum {
    DS_JSON_NULL,
    DS_JSON_FALSE,
    DS_JSON_TRUE,
    DS_JSON_NUMBER,
    DS_JSON_STRING,
    DS_JSON_ARRAY,
    DS_JSON_OBJECT,
    DS_JSON_DEPTH = 256 /* arrays and objects inside each other */
};

/* One value. The values inside an array or object follow it in the order of the text, each with all
 * that is inside it. key and text belong to the document. */
typedef struct ds_json_node {
    const char *key;  /* NULL outside objects; no NUL byte inside */
    const char *text; /* a string's bytes, UTF-8 */
    int64_t size;     /* bytes of text, or values directly inside the array or object */
    double number;
    int32_t type;
    int32_t line;     /* where the value begins, from 1 */
    int32_t key_line; /* where its key stands; outside objects as `line` */
} ds_json_node;

typedef struct ds_json {
    int64_t n;
    ds_json_node *nodes;
    void *root;
} ds_json;

/* Parses `bytes` of text (comments and trailing commas allowed); *out is overwritten and must be
 * freed. Messages begin with "name:line: ". */
int ds_json_parse(ds_json *out, const char *text, int64_t bytes, const char *name);
void ds_json_free(ds_json *doc);                   /* twice is harmless */
int ds_json_utf8(const char *text, int64_t bytes); /* 1: valid UTF-8; 0: not */

/* ---- files (io.c, file.c, safetensors.c) */

/* Everything that changes a disk goes through this table; a test may replace its entries. They return
 * 0 (open: the descriptor) or -errno, and do what the calls do that they are named after. write starts
 * a transfer in one of the queue's slots; exchange swaps two names at once. */
typedef struct ds_queue ds_queue;
typedef struct ds_io {
    int (*open)(const char *path, int flags, int mode);
    int (*close)(int fd);
    int (*allocate)(int fd, int64_t bytes);
    int (*write)(ds_queue *q, int slot, int fd, const void *data, int64_t bytes, int64_t at);
    int (*truncate)(int fd, int64_t bytes);
    int (*sync)(int fd);
    int (*rename)(const char *from, const char *to);
    int (*exchange)(const char *a, const char *b);
    int (*mkdir)(const char *path);
    int (*unlink)(const char *path);
    int (*rmdir)(const char *path);
} ds_io;
ds_io *ds_io_now(void);

/* Writing: `bytes` is how long the file will be; space for it is taken at once. append takes any
 * pieces in order; stays 1: they stay as they are until commit, so they need not be copied;
 * append_transposed: a dense matrix [rows x columns] of elements of `size` bytes, as its transpose. commit
 * puts all on the disk, closes and frees f, also when it fails, and then nothing is left of the file;
 * so does discard. replace 1: written under a temporary name and renamed
 * when whole, over what was there, the folder synced; 0: a new file under its own name, the folder is
 * the caller's to sync. hash: XXH3-64 of the whole file in hexadecimal, 17 bytes, or NULL. */
typedef struct ds_file ds_file;
int ds_file_create(ds_file **out, const char *path, int64_t bytes, int replace);
int ds_file_append(ds_file *f, const void *data, int64_t bytes, int stays);
int ds_file_append_transposed(ds_file *f, const void *data, int64_t rows, int64_t columns,
                              int64_t size);
int ds_file_commit(ds_file *f, char *hash);
void ds_file_discard(ds_file *f);
int ds_file_put(const char *path, const void *data, int64_t bytes, int replace, char *hash);

/* Files that a thread writes while the caller computes. append takes parts in their order, as
 * ds_file_append, and looks at nothing; from start on they are read from where they lie, and files
 * that commit named belong to the writer (it returns their number, from 0). release: when it returns,
 * the memory of all parts may change: what was not written yet has been copied, at most `most` bytes
 * and a matrix; for the rest it waited. state: 1 while it writes, 0 when all files are on the disk,
 * or the failure's code; then nothing is left of the files that were not. wait: the same, when it is
 * over. hash: of a file, as ds_file_commit gives it; NULL before. close stops what is not done. */
typedef struct ds_writer ds_writer;
typedef struct ds_writer_stats {
    int64_t bytes, copied; /* written, of them from a copy */
    double seconds;        /* from start to the last file on the disk */
    double cpu_seconds;    /* of the thread */
    double held_seconds;   /* that release took */
} ds_writer_stats;
int ds_writer_open(ds_writer **out);
int ds_writer_append(ds_writer *w, ds_file *f, const void *data, int64_t bytes);
int ds_writer_append_transposed(ds_writer *w, ds_file *f, const void *data, int64_t rows,
                                int64_t columns, int64_t size);
int ds_writer_commit(ds_writer *w, ds_file *f);
int ds_writer_start(ds_writer *w);
int ds_writer_release(ds_writer *w, int64_t most);
int ds_writer_state(ds_writer *w);
int ds_writer_wait(ds_writer *w);
const char *ds_writer_hash(const ds_writer *w, int file);
ds_writer_stats ds_writer_statistics(const ds_writer *w);
void ds_writer_close(ds_writer *w);

/* Reading. hash: reads the whole file once, and leaves it in the page cache for what follows. */
int ds_file_open(ds_file **out, const char *path);
void ds_file_close(ds_file *f);
int64_t ds_file_bytes(const ds_file *f);
const char *ds_file_path(const ds_file *f);
int ds_file_hash(ds_file *f, char *hash);
int ds_file_read(ds_file *f, void *data, int64_t bytes, int64_t at);
void ds_hash(char *out, const void *data, int64_t bytes);

/* A file read once, from its beginning to its end, past the page cache where the disk allows it; all
 * of it is hashed. data NULL: these bytes are passed over. end: reads the rest, gives the hash, and
 * frees s, also when it fails; hash NULL: nothing more is read. */
typedef struct ds_reader ds_reader;
int ds_reader_open(ds_reader **out, const char *path);
int ds_reader_read(ds_reader *s, void *data, int64_t bytes);
int ds_reader_end(ds_reader *s, char *hash);

/* A tensor in a safetensors file. offset: of its first byte in the file. */
typedef struct ds_entry {
    const char *name;
    int64_t offset, bytes, numel;
    int64_t shape[8];
    int32_t ndim;
    int32_t dtype;
} ds_entry;

/* Starts a safetensors file: lays the entries (name, dtype, ndim, shape) out in their order, fills in
 * the rest of each, writes the header. The caller appends their bytes in that order and commits.
 * Wider dtypes must come first, so that all are aligned. meta: key, value, key, value …, NULL. */
int ds_tensors_create(ds_file **out, const char *path, ds_entry *entries, int n,
                      const char *const *meta, int replace);

/* The header of a safetensors file, checked: entries in the order in which they lie, without gaps or
 * overlaps, that together fill the file. They live as long as the ds_tensors. meta: NULL if there is
 * no such key. read: n elements from element `first` on. */
typedef struct ds_tensors ds_tensors;
int ds_tensors_parse(ds_tensors **out, ds_file *f);
void ds_tensors_free(ds_tensors *t);
int ds_tensors_count(const ds_tensors *t);
const ds_entry *ds_tensors_entry(const ds_tensors *t, int i);
const char *ds_tensors_meta(const ds_tensors *t, const char *key);
int ds_tensors_read(ds_file *f, const ds_entry *e, void *data, int64_t first, int64_t n);

/* Folders. list: names without . and .., sorted, each ended by a zero byte, in memory to be given to
 * ds_free; returns their bytes. make: with the folders above it, all synced. remove: a file or a
 * folder with all in it, links not followed; nothing there is fine. exchange: 1 done, 0 the file
 * system can't. lock: a descriptor for unlock; DS_FOLDER_NO_LOCK, no message: it can't. Names of
 * temporaries end with this host and process; dead: of a process of this host that is gone. */
enum ds_path_kind { DS_PATH_NONE, DS_PATH_FILE, DS_PATH_FOLDER, DS_PATH_OTHER };
enum { DS_FOLDER_NO_LOCK = -100 };
int ds_path_kind(const char *path);
int64_t ds_folder_list(char **out, const char *path);
void ds_free(void *memory);
int ds_folder_make(const char *path);
int ds_folder_sync(const char *path);
int ds_folder_lock(const char *path, int32_t timeout_ms);
void ds_folder_unlock(int fd);
int ds_rename(const char *from, const char *to);
int ds_exchange(const char *a, const char *b);
int ds_remove(const char *path);
int ds_disk_free(int64_t *bytes, const char *path);
int ds_temporary_name(char *out, int64_t bytes, const char *folder);
int ds_temporary_dead(const char *name);

/* ---- memory on a disk (offload.c) */

/* How bytes move: DeepSpeed's `aio`. Without io_uring (or with DS_IO=plain or direct) there are
 * threads * queue_depth threads, at most 16 unless `threads` is more, with one request each. */
typedef struct ds_aio {
    int64_t block_size;  /* bytes of a request, a multiple of 4096, at most 1 GiB */
    int32_t queue_depth; /* requests that a thread has under way, at most 4096 */
    int32_t threads;
    int32_t single_submit;  /* 1: a call to the system for each request */
    int32_t overlap_events; /* 0: new ones start when all that a thread has under way are over */
} ds_aio;
typedef struct ds_offload_counters {
    int64_t reads, writes; /* requests */
    int64_t bytes_read, bytes_written;
    int64_t submits; /* calls that started requests */
    int64_t refills; /* times that requests were started while others were under way */
    int32_t most_under_way;
    int32_t threads;
    int32_t ringed; /* 1: io_uring */
    int32_t direct; /* 1: past the page cache */
} ds_offload_counters;

/* A file of `bytes` in an existing folder, zeros at first; its room is taken at once (DS_EIO: the disk
 * is full), its name goes at once where the file system allows it, else with close. close waits for
 * what is under way. */
typedef struct ds_offload ds_offload;
int ds_offload_open(ds_offload **out, const char *folder, int64_t bytes, int slots,
                    const ds_aio *aio);
void ds_offload_close(ds_offload *f);
const char *ds_offload_path(const ds_offload *f); /* as it was named; lives as long as f */
void ds_offload_count(ds_offload_counters *out, ds_offload *f);
/* Starts a transfer of all of t, dense on the CPU, from or to byte `at`; address, size and `at` are
 * multiples of 4096. One at a time in each of the `slots`, in the order in which they are started, but
 * several run at once. t's memory is kept alive; it must not be touched before the wait. */
int ds_offload_read(ds_offload *f, int slot, ds_tensor *t, int64_t at);
int ds_offload_write(ds_offload *f, int slot, const ds_tensor *t, int64_t at);
/* Waits for the slot's transfer, and tells how it ended; 0 if there is none. */
int ds_offload_wait(ds_offload *f, int slot);

/* ---- data (tokens.c, data.c) */

/* Characters and their ids: the distinct characters of a UTF-8 text by code point, from 0 on. text
 * NULL: the 256 bytes. encode: `ids` has room for `bytes` ids; decode: `text` for 4 n bytes. */
typedef struct ds_vocab ds_vocab;
int ds_vocab_make(ds_vocab **out, const char *text, int64_t bytes);
void ds_vocab_free(ds_vocab *v);
int64_t ds_vocab_size(const ds_vocab *v);
int ds_vocab_encode(int32_t *ids, int64_t *n, const ds_vocab *v, const char *text, int64_t bytes);
int ds_vocab_decode(char *text, int64_t *bytes, const ds_vocab *v, const int32_t *ids, int64_t n);

/* A stream of tokens: a text file as characters or (bytes 1) bytes, with its vocabulary; or token
 * files, mapped. A path may be a pattern (* ? [ ]). width: bytes a token in files without llm.c's
 * header, 2 or 4; 0: all must have it. A mapped file that shrinks kills the process (SIGBUS). */
typedef struct ds_tokens ds_tokens;
int ds_tokens_text(ds_tokens **out, ds_vocab **vocab, const char *path, int bytes);
int ds_tokens_open(ds_tokens **out, const char *const *paths, int n, int width);
void ds_tokens_release(ds_tokens *t);
int64_t ds_tokens_count(const ds_tokens *t);

/* Windows over `count` tokens of a stream from token `start` on: `length` tokens and the same
 * shifted by one, beginning every `stride` tokens, none across the end of a file. Tokens from
 * vocab_size on are an error when they are met (0: unknown, up to 2^31 - 1). Keeps the stream alive.
 * gather: x and y are dense i32 [n, length]. */
typedef struct ds_windows ds_windows;
int ds_windows_make(ds_windows **out, ds_tokens *t, int64_t start, int64_t count, int64_t length,
                    int64_t stride, int64_t vocab_size);
void ds_windows_release(ds_windows *w);
int64_t ds_windows_count(const ds_windows *w);
int ds_windows_gather(ds_tensor *x, ds_tensor *y, const ds_windows *w, const int64_t *index,
                      int64_t n);

/* A thread that gathers ahead: push says what the next batch is made of (at most `batch` windows, at
 * most `depth` batches not yet taken), take waits for the oldest and copies it to x and y, or returns
 * what went wrong with it. flush forgets all that was pushed. */
typedef struct ds_feed ds_feed;
int ds_feed_open(ds_feed **out, ds_windows *w, int64_t batch, int depth);
void ds_feed_close(ds_feed *f);
int ds_feed_push(ds_feed *f, const int64_t *index, int64_t n);
int ds_feed_take(ds_tensor *x, ds_tensor *y, ds_feed *f);
void ds_feed_flush(ds_feed *f);

/* out[i] = which of `size` samples is at position first + i of epoch `epoch` (positions wrap). The
 * order is a permutation computed from (seed, epoch), or 0, 1, 2, … */
int ds_order(int64_t *out, int64_t first, int64_t n, int64_t size, int shuffle, int64_t seed,
             int64_t epoch);

/* ---- communication (comm.h, comm.c) */

/* Ranks that work together. Every rank calls the same functions in the same order, from one thread. */
typedef struct ds_comm ds_comm;

/* A collective that is under way. It is the caller's, who keeps it and its tensors until ds_wait(). */
typedef struct ds_work {
    ds_comm *comm;
    void *state;    /* the transport's own */
    int64_t number; /* which collective of its group this is, from 1; of send and recv: 0 */
    int32_t kind;
    int32_t device;
    int32_t done;
    int32_t code;  /* when done: 0 or why it failed */
    int32_t entry; /* of the log of collectives; 0: not logged */
    double begun;  /* then: ds_seconds() */
} ds_work;

/* All ranks of the job; made by the first call, the same ever after. Not the caller's to close. */
int ds_comm_world(ds_comm **out);
void ds_comm_finish(void); /* closes the world, before the process ends; again is harmless */

/* The ranks of a group that name the same colour, ordered by key, then by rank. A negative colour is
 * in none: *out is NULL. All ranks of the group call it. */
int ds_comm_split(ds_comm **out, ds_comm *parent, int color, int key);
void ds_comm_close(ds_comm *c);

/* All ranks once more, for collectives on memory that their GPUs read and write in each other's place: on
 * each rank all tensors of its collectives come from the set DS_MEMORY_SHARED, on CPUs it is like any
 * group. *out is NULL where there is no such memory, on one rank or on all (runner/comm_nccl_share.c);
 * all ranks call it, and get the same one every time. Not the caller's to close. */
int ds_comm_shared(ds_comm **out);
int ds_comm_rank(const ds_comm *c);
int ds_comm_size(const ds_comm *c);
int ds_comm_local_rank(const ds_comm *c); /* among those of this group on this host */
int ds_comm_local_size(const ds_comm *c);

/* Ends the job: ranks that wait in a collective return DS_ECOMM, as does every later call. Any
 * thread may call it. */
void ds_comm_abort(ds_comm *c, const char *why);

/* Collectives, on dense tensors of one dtype and device. The first dimensions don't matter, elements
 * do: N ranks, `in` of all_gather is a share, `out` N of them in order of rank; reduce_scatter the
 * other way round; all_to_all sends share i to rank i. all_reduce may have out == in; nothing else
 * may overlap. Sums are in order of rank, in f32 (f64 for f64), and rounded once. `op` is an enum
 * ds_reduction, mean is for floating dtypes. work NULL: returns when it is done here; else when it
 * is begun, and on a CPU only send and recv leave anything to wait for. On CUDA (comm_nccl.c) it is
 * done for kernels that are called afterwards, the host waits for nothing, and sums are in NCCL's
 * order. */
int ds_all_reduce(ds_tensor *out, const ds_tensor *in, int op, ds_comm *c, ds_work *work);
int ds_reduce_scatter(ds_tensor *out, const ds_tensor *in, int op, ds_comm *c, ds_work *work);
int ds_all_gather(ds_tensor *out, const ds_tensor *in, ds_comm *c, ds_work *work);
int ds_all_to_all(ds_tensor *out, const ds_tensor *in, ds_comm *c, ds_work *work);
int ds_broadcast(ds_tensor *t, int root, ds_comm *c, ds_work *work);
int ds_send(const ds_tensor *in, int to, ds_comm *c, ds_work *work);
int ds_recv(ds_tensor *out, int from, ds_comm *c, ds_work *work);
int ds_barrier(ds_comm *c, ds_work *work);

/* The same, in place, on parts: elements borders[r] to borders[r + 1] (size + 1 borders, ascending)
 * are rank r's. reduce_parts leaves rank r its part reduced, and the other parts undefined;
 * gather_parts gives every rank part r of rank r. One after the other they are an all_reduce, bit
 * for bit. The result is multiplied by `scale` before it is rounded (1 for integers); a `wire` of
 * lower precision than the buffer has the addends rounded to it, and so travel (-1: as they are). */
int ds_reduce_parts(ds_tensor *buffer, const int64_t *borders, int op, double scale, int wire,
                    ds_comm *c, ds_work *work);
/* reduce_parts, but rank r's part goes to `out`, of its size, and `in` stays as it is. */
int ds_reduce_part(ds_tensor *out, const ds_tensor *in, const int64_t *borders, int op,
                   double scale, int wire, ds_comm *c, ds_work *work);
int ds_gather_parts(ds_tensor *buffer, const int64_t *borders, ds_comm *c, ds_work *work);
int ds_all_reduce_scaled(ds_tensor *out, const ds_tensor *in, int op, double scale, int wire,
                         ds_comm *c, ds_work *work);

/* What the group's next collective is about, any number: where ranks name different ones it fails
 * rather than mix them. */
void ds_comm_about(ds_comm *c, int64_t about);

/* Collectives begun and bytes sent by this rank so far; c NULL: in all groups. */
void ds_comm_stats(int64_t *collectives, int64_t *bytes, const ds_comm *c);

/* What the collective returned; again is harmless. On CUDA kernels wait, the host does not. */
int ds_wait(ds_work *work);
int ds_test(ds_work *work); /* 1 done, 0 not yet, negative: it failed */

/* ---- a log of collectives (comm_log.c) */

/* From now on logs the collectives named in `ops`, with blanks between, or "all"; NULL or "": none.
 * verbose: a line each at the level of information; callers: what the program is doing (the
 * breadcrumb) tells entries apart, too. What is logged already stays. DS_EINVAL: no such name. */
int ds_comm_log(const char *ops, int verbose, int callers);

/* All calls of one kind, size and size of group. A part of a larger buffer counts as its kind:
 * reduce_parts is a reduce_scatter, gather_parts an all_gather. */
typedef struct ds_comm_entry {
    const char *name;   /* "all_reduce" */
    const char *caller; /* "engine:step()"; "" where callers are not told apart */
    int64_t bytes;      /* of what all ranks' shares come to; 0: a barrier */
    double message;     /* bytes that a rank gives: of all_gather its share, on average; else all */
    int64_t count;
    const float *ms; /* [count]: from its begin until it was found done, on this rank, in order */
    int32_t ranks;   /* of the group */
} ds_comm_entry;
/* How many entries there are; *out becomes number i (from 0) if there is one, valid until the next
 * collective. */
int ds_comm_logged(ds_comm_entry *out, int i);
/* What a call of entry i that takes so long comes to, in 10^9 bits a second: by its bytes (those of an
 * all_reduce twice), and by what a link between ranks must then carry at the least. */
int ds_comm_bandwidth(double *tput, double *busbw, int i, double ms);

/* ---- the partitioned optimizer's layout (zero.h, zero.c) */

/* Parameters in flat buffers, one a group, cut into buckets, each in as many parts as there are ranks:
 * part r is rank r's. numel, group and small: [n_params], groups ascending; small: those of one kind
 * are in buckets of their own (NULL: all are of one kind); whole: [n_groups], 1: parts end where
 * parameters do, balanced over the group, or (round_robin 1) a bucket is one rank's, in turn; 0: a
 * bucket's parts are even. Buckets hold at most bucket_numel elements, or one parameter. The caller
 * frees *out. DS_EINVAL: no such groups. */
typedef struct ds_zero ds_zero;
typedef struct ds_zero_bucket {
    int32_t group, first, last; /* parameters first to last, 0-based, both included */
    int64_t start, numel;       /* elements of the group's buffer */
    const int64_t
        *borders; /* [world + 1] from 0 to numel, elements of the bucket: multiples of 16 */
} ds_zero_bucket;
int ds_zero_make(ds_zero **out, int n_params, const int64_t *numel, const int32_t *group,
                 const int32_t *small, const int32_t *whole, int n_groups, int world,
                 int64_t bucket_numel, int round_robin);
void ds_zero_free(ds_zero *z);
int64_t ds_zero_group_numel(const ds_zero *z, int group); /* with padding, a multiple of 16 */
int64_t ds_zero_offset(const ds_zero *z, int param);      /* in its group's buffer */
int ds_zero_owner(const ds_zero *z, int group, int64_t element); /* a rank; -1: no such element */
/* In the order in which backward completes them; returns how many, *out belongs to z. */
int ds_zero_buckets(const ds_zero_bucket **out, const ds_zero *z);

/* What must happen on all ranks at the same step: each field becomes the maximum over the ranks. */
typedef struct ds_control {
    int32_t overflow; /* a gradient is not finite: skip the step */
    int32_t stop;     /* a signal number: save and end */
    int32_t save;     /* a checkpoint is asked for */
    int32_t version;  /* of settings changed while running */
    int32_t attach;   /* somebody wants to look */
    int32_t writing;  /* a checkpoint in the background: 1 it is being written, 2 that failed */
} ds_control;
/* In one exchange: agrees on the word, and each of the n <= 8 sums becomes the sum over the ranks, in
 * their order, so that all have the same bits. */
int ds_control_agree(ds_control *word, double *sums, int n, ds_comm *comm);

/* ---- the loss scale of fp16 (scaler.c) */

/* State and settings, plain values: a checkpoint keeps the first four. */
typedef struct ds_scaler {
    double cur_scale;           /* what the loss is multiplied by */
    int64_t cur_iter;           /* updates so far, overflows among them */
    int64_t last_overflow_iter; /* counted from 0; -1: none yet */
    int64_t cur_hysteresis;     /* at 1 the next overflow lowers the scale */
    int64_t window;             /* steps without overflow before the scale doubles */
    int64_t hysteresis;
    double min_scale;
    int dynamic; /* 0: the scale never changes */
    int consecutive;
} ds_scaler;
int ds_scaler_static(ds_scaler *s, double scale);
/* Begins with 2^initial_power; consecutive: any step without overflow restores the hysteresis. */
int ds_scaler_dynamic(ds_scaler *s, int initial_power, double min_scale, int64_t window,
                      int64_t hysteresis, int consecutive);
/* Once a step, after its gradients were divided by cur_scale. DS_ERANGE: an overflow at min_scale. */
int ds_scaler_update(ds_scaler *s, int overflow);
/* Takes a saved state, within the settings of s; a scaler that is not dynamic keeps its scale. */
int ds_scaler_restore(ds_scaler *s, double cur_scale, int64_t cur_iter, int64_t last_overflow_iter,
                      int64_t cur_hysteresis);

/* ds.h: end ffi */

#endif
