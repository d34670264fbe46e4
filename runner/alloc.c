/* alloc.c - caching allocator: freed memory is kept, split, merged and handed out again.
 *
 * A training step makes and drops some hundreds of tensors of a few dozen sizes. Asking the system
 * each time costs page faults on a CPU (64 ms for 256 MB) and a device synchronisation on a GPU. So
 * memory comes in segments of at least 32 MB, or of 8 MB for pieces below 1 MB, so that a loss which
 * lives on does not keep the room of a large tensor; a segment is a chain of pieces, used or free; free ones
 * wait in lists by size class, two levels of them (Masmano et al. 2004, "TLSF": power of two, then
 * sixteenths), so that finding one that fits is a look at two bitmaps, and the smallest class that
 * fits is taken. A freed piece merges with its free neighbours at once, which keeps the peak near
 * what is live. Segments belong to a set, and pieces go from hand to hand within one: what a recorded
 * graph uses is a set of its own, which nothing else may have while the graph lives; and what ranks
 * exchange is one whose segments are registered with NCCL (comm_nccl_share.c). The bookkeeping
 * lies in host memory beside the pieces: the same code serves devices whose memory the host cannot
 * write.
 */
#include "runner/alloc.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h> /* nothing unless the sanitizer is on */
#else
#define ASAN_POISON_MEMORY_REGION(data, bytes) ((void)(data), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(data, bytes) ((void)(data), (void)(bytes))
#endif

#define ALIGN 64
#define DEVICE_ALIGN 256 /* what libraries on a GPU take for granted */
#define SEGMENT_MIN ((int64_t)32 << 20)
#define SMALL ((int64_t)1 << 20) /* pieces below it have segments of their own */
#define SMALL_SEGMENT ((int64_t)8 << 20)
#define SEGMENT_STEP ((int64_t)2 << 20) /* huge pages */
#define SPLIT_MIN 512                   /* a smaller rest stays with its piece */
#define FIRST_BITS 48
#define SECOND 16
#define TAGS 512
#define TRIES 8 /* pieces looked at in the class that holds the wanted size itself */

/* Neighbouring tensors whose sizes are multiples of 4 KB would all start at the same cache set;
 * three lines between them spread them. */
#define COLOUR 192

/* Free pieces by size class, and which classes have any. */
struct lists {
    uint64_t first_map;
    uint32_t second_map[FIRST_BITS];
    ds_storage *of[FIRST_BITS][SECOND];
};

struct pool {
    pthread_mutex_t lock;
    struct lists lists[2 * (DS_MEMORY_SHARED + 1)]; /* of each set's large and small segments */
    int set;                                        /* from which memory is taken now */
    int64_t by_tag[TAGS];
    ds_memory memory;
};

static struct pool pools[] = {
    [DS_CPU] = {.lock = PTHREAD_MUTEX_INITIALIZER},
    [DS_CUDA] = {.lock = PTHREAD_MUTEX_INITIALIZER},
    [DS_META] = {.lock = PTHREAD_MUTEX_INITIALIZER}, /* counters only: its storages have no data */
    [DS_PINNED] = {.lock = PTHREAD_MUTEX_INITIALIZER},
};

#define POOLS ((int)(sizeof pools / sizeof *pools))

/* What an allocation is for: Lua says it there, whatever the device. */
static const ds_memory *const asked = &pools[DS_CPU].memory;

/* Page-locked memory is the GPU backend's to take and to give. */
static const ds_backend *backend_of(int pool)
{
    return ds_backend_of(pool == DS_PINNED ? DS_CUDA : pool);
}

/* ---- for the address sanitizer: what no tensor has is out of bounds, also on a GPU that is simulated,
 * but for the memory of recorded graphs, which use it again when they run */

static int guarded(const ds_storage *s)
{
    return s->device == DS_CPU ||
           (s->device == DS_CUDA && s->list < 2 && backend_of(DS_CUDA)->at_once);
}

static void forbid(const ds_storage *s, int64_t from)
{
    if (guarded(s))
        ASAN_POISON_MEMORY_REGION((char *)s->data + from, (size_t)(s->bytes - from));
}

static void allow(const ds_storage *s)
{
    if (guarded(s))
        ASAN_UNPOISON_MEMORY_REGION(s->data, (size_t)s->bytes);
}

/* ---- size classes */

static void class_of(int64_t bytes, int *first, int *second)
{
    int top = 63 - __builtin_clzll((uint64_t)bytes); /* bytes ≥ 64: top ≥ 6 */

    *first = top;
    *second = (int)(bytes >> (top - 4)) & (SECOND - 1);
}

static void list_add(struct pool *p, ds_storage *s)
{
    struct lists *l = &p->lists[s->list];
    int i, j;

    class_of(s->bytes, &i, &j);
    s->last_free = NULL;
    s->next_free = l->of[i][j];
    if (s->next_free)
        s->next_free->last_free = s;
    l->of[i][j] = s;
    l->first_map |= 1ull << i;
    l->second_map[i] |= 1u << j;
    p->memory.cached += s->bytes;
    forbid(s, 0);
}

static void list_drop(struct pool *p, ds_storage *s)
{
    struct lists *l = &p->lists[s->list];
    int i, j;

    class_of(s->bytes, &i, &j);
    if (s->last_free)
        s->last_free->next_free = s->next_free;
    else
        l->of[i][j] = s->next_free;
    if (s->next_free)
        s->next_free->last_free = s->last_free;
    if (!l->of[i][j]) {
        l->second_map[i] &= ~(1u << j);
        if (!l->second_map[i])
            l->first_map &= ~(1ull << i);
    }
    p->memory.cached -= s->bytes;
    allow(s);
}

/* A free piece of at least `bytes`, off its list; NULL if there is none. */
static ds_storage *list_find(struct pool *p, int64_t bytes)
{
    const struct lists *l = &p->lists[2 * p->set + (bytes < SMALL)];
    int i, j, tries = TRIES;
    uint32_t second;
    uint64_t first;
    ds_storage *s = NULL;

    class_of(bytes, &i, &j);
    for (s = l->of[i][j]; s && tries--; s = s->next_free)
        if (s->bytes >= bytes)
            goto found;
    second = l->second_map[i] & (uint32_t)(~0ull << (j + 1));
    if (!second) {
        first = i + 1 < 64 ? l->first_map & (~0ull << (i + 1)) : 0;
        if (!first)
            return NULL;
        i = __builtin_ctzll(first);
        second = l->second_map[i];
    }
    s = l->of[i][__builtin_ctz(second)];
found:
    list_drop(p, s);
    return s;
}

/* ---- segments */

static int memory_take(void **out, int pool, int set, size_t bytes)
{
    if (pool == DS_PINNED)
        return backend_of(pool)->pinned_take(out, bytes);
    if (pool == DS_CUDA && set == DS_MEMORY_SHARED)
        return ds_shared_take(out, bytes);
    return backend_of(pool)->memory_take(out, bytes);
}

static void memory_give(void *data, int pool, int set, size_t bytes)
{
    if (pool == DS_PINNED)
        backend_of(pool)->pinned_give(data);
    else if (pool == DS_CUDA && set == DS_MEMORY_SHARED)
        ds_shared_give(data);
    else
        backend_of(pool)->memory_give(data, bytes);
}

/* A new segment as one piece, on no list. */
static int segment_take(ds_storage **out, int pool, int64_t bytes)
{
    struct pool *p = &pools[pool];
    int64_t least = bytes < SMALL ? SMALL_SEGMENT : SEGMENT_MIN;
    int64_t total = bytes < least ? least : bytes;
    ds_storage *s = NULL;
    int rc;

    if (!backend_of(pool))
        return DS_ENOSYS;
    total = (total + SEGMENT_STEP - 1) / SEGMENT_STEP * SEGMENT_STEP;
    s = calloc(1, sizeof *s);
    if (!s)
        return ds_fail(DS_ENOMEM, "out of host memory");
    rc = memory_take(&s->data, pool, p->set, (size_t)total);
    if (rc < 0) {
        free(s);
        return rc;
    }
    s->bytes = total;
    s->device = pool == DS_PINNED ? DS_CPU : pool;
    s->pool = pool;
    s->list = 2 * p->set + (bytes < SMALL);
    p->memory.takes++;
    *out = s;
    return 0;
}

/* Gives every wholly free segment of a set back to the system. */
static void flush_locked(int pool, int set)
{
    struct pool *p = &pools[pool];
    ds_storage *s, *next;

    for (int k = 0; k < 2 * FIRST_BITS * SECOND; k++)
        for (s = p->lists[2 * set + k % 2].of[k / 2 / SECOND][k / 2 % SECOND]; s; s = next) {
            next = s->next_free;
            if (s->before || s->after)
                continue;
            list_drop(p, s);
            memory_give(s->data, pool, set, (size_t)s->bytes);
            free(s);
        }
}

/* Cuts s down to `bytes`; the rest becomes a free piece. Without host memory s stays as it is. */
static void split(struct pool *p, ds_storage *s, int64_t bytes)
{
    ds_storage *rest;

    if (s->bytes - bytes < SPLIT_MIN)
        return;
    rest = calloc(1, sizeof *rest);
    if (!rest)
        return;
    rest->data = (char *)s->data + bytes;
    rest->bytes = s->bytes - bytes;
    rest->device = s->device;
    rest->pool = s->pool;
    rest->list = s->list;
    rest->before = s;
    rest->after = s->after;
    if (rest->after)
        rest->after->before = rest;
    s->after = rest;
    s->bytes = bytes;
    list_add(p, rest);
}

/* Appends `next`, which follows s in memory and is on no list, to s. */
static void absorb(ds_storage *s, ds_storage *next)
{
    s->bytes += next->bytes;
    s->after = next->after;
    if (s->after)
        s->after->before = s;
    free(next);
}

/* ---- storage */

/* A piece of `bytes` that is on no list. */
static int piece_take(ds_storage **out, int pool, int64_t bytes)
{
    struct pool *p = &pools[pool];
    ds_storage *s = list_find(p, bytes);
    int rc;

    if (!s) {
        /* Segments that are free but too small would only wait beside the larger one. */
        int flush = bytes >= SEGMENT_MIN && p->set == 0;

        if (flush)
            flush_locked(pool, 0);
        rc = segment_take(&s, pool, bytes);
        if (rc == DS_ENOMEM && (!flush || pool == DS_CUDA)) {
            flush_locked(pool, 0);
            if (p->set == 0 || p->set == DS_MEMORY_SHARED) /* no graph is being recorded */
                flush_locked(pool, DS_MEMORY_SHARED);
            rc = segment_take(&s, pool, bytes);
        }
        if (rc < 0)
            return rc;
    }
    split(p, s, bytes);
    *out = s;
    return 0;
}

/* On the meta device: as many bytes are counted as a piece would have, and none are taken. */
static int count_take(ds_storage **out, int64_t bytes)
{
    ds_storage *s = calloc(1, sizeof *s);

    if (!s)
        return ds_fail(DS_ENOMEM, "out of host memory");
    s->device = s->pool = DS_META;
    s->bytes = bytes;
    *out = s;
    return 0;
}

/* What a piece takes that holds so many bytes. */
static int64_t room_for(int pool, int64_t bytes)
{
    int64_t align = pool == DS_CUDA ? DEVICE_ALIGN : ALIGN;

    bytes += bytes >= 4096 && pool != DS_CUDA ? COLOUR : 0;
    return bytes ? (bytes + align - 1) / align * align : align;
}

int ds_storage_take(ds_storage **out, int pool, int64_t bytes)
{
    struct pool *p = &pools[pool];
    const int64_t wanted = bytes;
    ds_storage *s = NULL;
    int rc;

    if (bytes < 0 || bytes > (int64_t)1 << 46)
        return ds_fail(DS_ENOMEM, "a tensor of %lld bytes is more than any machine has",
                       (long long)bytes);
    bytes = room_for(pool, bytes);
    pthread_mutex_lock(&p->lock);
    rc = pool == DS_META ? count_take(&s, bytes) : piece_take(&s, pool, bytes);
    if (rc < 0)
        goto out;
    forbid(s, wanted);
    s->tag = asked->tag >= 0 && asked->tag < TAGS ? asked->tag : 0;
    s->loose = !asked->scoped;
    atomic_init(&s->refs, 1);
    p->by_tag[s->tag] += s->bytes;
    p->memory.live += s->bytes;
    p->memory.loose += s->loose ? s->bytes : 0;
    p->memory.calls++;
    if (p->memory.live > p->memory.peak)
        p->memory.peak = p->memory.live;
    *out = s;
out:
    pthread_mutex_unlock(&p->lock);
    return rc;
}

void ds_storage_retain(ds_storage *s)
{
    atomic_fetch_add_explicit(&s->refs, 1, memory_order_relaxed);
}

void ds_storage_release(ds_storage *s)
{
    struct pool *p = &pools[s->pool];
    ds_storage *other;

    if (atomic_fetch_sub_explicit(&s->refs, 1, memory_order_acq_rel) != 1)
        return;
    pthread_mutex_lock(&p->lock);
    p->by_tag[s->tag] -= s->bytes;
    p->memory.live -= s->bytes;
    p->memory.loose -= s->loose ? s->bytes : 0;
    if (s->device == DS_META) {
        free(s);
        goto out;
    }
    other = s->after;
    if (other && atomic_load_explicit(&other->refs, memory_order_relaxed) == 0) {
        list_drop(p, other);
        absorb(s, other);
    }
    other = s->before;
    if (other && atomic_load_explicit(&other->refs, memory_order_relaxed) == 0) {
        list_drop(p, other);
        absorb(other, s);
        s = other;
    }
    list_add(p, s);
out:
    pthread_mutex_unlock(&p->lock);
}

/* ---- counters */

static int is_device(int device)
{
    return device >= 0 && device < POOLS;
}

ds_memory *ds_memory_of(int device)
{
    return is_device(device) ? &pools[device].memory : NULL;
}

int ds_memory_by_tag(int device, int64_t *bytes, int n)
{
    if (!is_device(device))
        return 0;
    memcpy(bytes, pools[device].by_tag, sizeof *bytes * (size_t)(n < TAGS ? n : TAGS));
    return TAGS;
}

static void flush_set(int pool, int set)
{
    if (pool != DS_CPU && pool != DS_CUDA && pool != DS_PINNED)
        return; /* nothing is cached */
    pthread_mutex_lock(&pools[pool].lock);
    flush_locked(pool, set);
    pthread_mutex_unlock(&pools[pool].lock);
}

void ds_memory_flush(int device)
{
    flush_set(device, 0);
    if (device == DS_CUDA) {
        flush_set(DS_CUDA, DS_MEMORY_SHARED);
        flush_set(DS_PINNED, 0);
    }
}

int ds_memory_set(int device, int set)
{
    struct pool *p = &pools[is_device(device) ? device : DS_CPU];
    int before;

    pthread_mutex_lock(&p->lock);
    before = p->set;
    if (set >= 0 && set <= DS_MEMORY_SHARED)
        p->set = set;
    pthread_mutex_unlock(&p->lock);
    return before;
}

void ds_memory_flush_set(int device, int set)
{
    if (set >= 0 && set <= DS_MEMORY_SHARED)
        flush_set(device, set);
}

void ds_memory_reset_peak(int device)
{
    if (is_device(device))
        pools[device].memory.peak = pools[device].memory.live;
}
