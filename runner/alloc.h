/* alloc.h - storage: memory of a device with a reference count, from a caching allocator. */
#ifndef DS_ALLOC_H
#define DS_ALLOC_H

#include <stdatomic.h>

#include "runner/ds.h"

/* One piece of a segment; `data` is 64-byte aligned. Free pieces are storages as well, with refs 0.
 * On the meta device there are no segments, and `data` is NULL. */
struct ds_storage {
    void *data;
    int64_t bytes; /* of the piece, at least what was asked for */
    atomic_int refs;
    int32_t device;
    int32_t tag;        /* ds_memory.tag at the time: the op it was made for */
    int32_t loose;      /* made while no scope was open */
    int32_t pool;       /* whose memory it is: a device, or DS_PINNED */
    int32_t list;       /* of the pool's lists: 2 × set, + 1 in a segment for small pieces */
    ds_storage *before; /* neighbours in the segment, by address */
    ds_storage *after;
    ds_storage *next_free; /* in its size class's list; NULL ends it */
    ds_storage *last_free;
};

/* Page-locked memory of the host, from which a GPU reads and to which it writes beside all else: a pool
 * like a device's, whose storages are on the CPU. */
enum { DS_PINNED = DS_META + 1 };

/* On success *out holds one reference; drop it with ds_storage_release(). Contents undefined.
 * DS_ENOMEM: neither cached pieces nor the system had that much. */
int ds_storage_take(ds_storage **out, int pool, int64_t bytes);
void ds_storage_retain(ds_storage *s);
void ds_storage_release(ds_storage *s);

/* Of segments of the GPU's set DS_MEMORY_SHARED (devices.c): the transport between GPUs has them. */
int ds_shared_take(void **out, size_t bytes);
void ds_shared_give(void *data);

/* The backend of a device, or NULL with ds_error() saying why there is none. */
const ds_backend *ds_backend_of(int device);

#endif
