/* later.c - what a device does beside the host: events, transfers through page-locked memory, and graphs
 * of launches.
 *
 * An event holds a reference on the memory of its transfer, both sides, until it is found done: so neither
 * the allocator nor the collector can hand it to somebody else meanwhile.
 */
#include "runner/later.h"

#include <stdlib.h>
#include <string.h>

struct ds_event {
    const ds_backend *backend;
    void *handle;
    int device, recorded; /* 1: since it was last found done */
    ds_storage *held[2];
};

struct ds_graph {
    const ds_backend *backend;
    void *handle;
};

/* The backend of a device that does things later; NULL with a message for others. */
static const ds_backend *later_backend(int device)
{
    const ds_backend *backend = ds_backend_of(device);

    if (backend && !backend->event_make) {
        ds_fail(DS_ENOSYS, "%s does nothing later: it has no events", backend->name);
        return NULL;
    }
    return backend;
}

int ds_empty_pinned(ds_tensor *out, int dtype, int ndim, const int64_t *shape)
{
    ds_storage *s;
    int rc = ds_empty(out, dtype, DS_META, ndim, shape);

    if (rc < 0)
        return rc;
    ds_release(out);
    rc = ds_storage_take(&s, DS_PINNED, out->numel * ds_dtype_size(dtype));
    if (rc < 0)
        return rc;
    out->device = DS_CPU;
    out->storage = s;
    out->data = s->data;
    return 0;
}

int ds_is_pinned(const ds_tensor *t)
{
    return t->storage && t->storage->pool == DS_PINNED;
}

/* ---- events */

int ds_event_make(ds_event **out, int device)
{
    const ds_backend *backend = later_backend(device);
    ds_event *e;
    int rc;

    if (!backend)
        return DS_ENOSYS;
    e = calloc(1, sizeof *e);
    if (!e)
        return ds_fail(DS_ENOMEM, "out of host memory");
    e->backend = backend;
    e->device = device;
    rc = backend->event_make(&e->handle);
    if (rc < 0) {
        free(e);
        return rc;
    }
    *out = e;
    return 0;
}

static void let_go(ds_event *e)
{
    for (int i = 0; i < 2; i++) {
        if (e->held[i])
            ds_storage_release(e->held[i]);
        e->held[i] = NULL;
    }
    e->recorded = 0;
}

void ds_event_free(ds_event *e)
{
    if (!e)
        return;
    if (e->recorded && (e->held[0] || e->held[1]))
        e->backend->event_wait(e->handle);
    let_go(e);
    e->backend->event_free(e->handle);
    free(e);
}

static int record(ds_event *e, int stream)
{
    int rc = e->backend->event_record(e->handle, stream);

    e->recorded = rc == 0;
    return rc;
}

int ds_event_record(ds_event *e)
{
    int rc = ds_event_wait(e);

    return rc < 0 ? rc : record(e, DS_STREAM_KERNELS);
}

int ds_event_done(ds_event *e)
{
    int rc = e->recorded ? e->backend->event_done(e->handle) : 1;

    if (rc != 0)
        let_go(e);
    return rc;
}

int ds_event_wait(ds_event *e)
{
    int rc = e->recorded ? e->backend->event_wait(e->handle) : 0;

    let_go(e);
    return rc;
}

int ds_event_follow(ds_event *e)
{
    return e->recorded ? e->backend->event_before(e->handle, DS_STREAM_KERNELS) : 0;
}

/* ---- transfers */

static int check_transfer(const char *name, const ds_event *e, const ds_tensor *there,
                          const ds_tensor *pinned)
{
    if (there->device != e->device || !ds_is_pinned(pinned))
        return ds_fail(DS_EINVAL, "%s: between page-locked memory and the event's device only",
                       name);
    if (!there->dense || !pinned->dense || there->dtype != pinned->dtype ||
        there->numel != pinned->numel)
        return ds_fail(DS_EINVAL, "%s: %lld %s and %lld %s; both are dense, of one dtype and size",
                       name, (long long)pinned->numel, ds_dtype_name(pinned->dtype),
                       (long long)there->numel, ds_dtype_name(there->dtype));
    return 0;
}

static int transfer(ds_event *e, ds_tensor *to, const ds_tensor *from, int up, int stream)
{
    int rc = 0;

    if (to->numel)
        rc = e->backend->copy_later(to->data, from->data,
                                    (size_t)(to->numel * ds_dtype_size(to->dtype)), up, stream);
    if (rc == 0)
        rc = record(e, stream);
    if (rc < 0)
        return rc;
    e->held[0] = to->storage;
    e->held[1] = from->storage;
    ds_storage_retain(to->storage);
    ds_storage_retain(from->storage);
    return 0;
}

/* The memory of `to` may have been a tensor's that kernels still read: the transfer follows them. */
int ds_upload_later(ds_event *e, ds_tensor *to, const ds_tensor *from)
{
    int rc = check_transfer("upload", e, to, from);

    if (rc == 0)
        rc = ds_event_record(e);
    if (rc == 0)
        rc = e->backend->event_before(e->handle, DS_STREAM_COPIES);
    return rc < 0 ? rc : transfer(e, to, from, 1, DS_STREAM_COPIES);
}

int ds_download_later(ds_event *e, ds_tensor *to, const ds_tensor *from)
{
    int rc = check_transfer("download", e, from, to);

    if (rc == 0)
        rc = ds_event_wait(e);
    return rc < 0 ? rc : transfer(e, to, from, 0, DS_STREAM_KERNELS);
}

int ds_download_beside(ds_event *e, ds_tensor *to, const ds_tensor *from)
{
    int rc = check_transfer("download", e, from, to);

    if (rc == 0)
        rc = ds_event_record(e);
    if (rc == 0)
        rc = e->backend->event_before(e->handle, DS_STREAM_COPIES);
    return rc < 0 ? rc : transfer(e, to, from, 0, DS_STREAM_COPIES);
}

/* Whoever takes the memory next writes to it by kernels, or by transfers that follow those. */
int ds_event_hand_over(ds_event *e)
{
    int rc = ds_event_follow(e);

    for (int i = 0; rc == 0 && i < 2; i++)
        if (e->held[i] && e->held[i]->device == e->device) {
            ds_storage_release(e->held[i]);
            e->held[i] = NULL;
        }
    return rc;
}

/* ---- ordinary memory. A transfer from it would wait until the device is idle: CUDA reads it by pieces
 * of its own. Here they are ours, and the host goes on. */

enum { PIECE = 4 << 20, WAYS = 16 };

static struct way {
    ds_event *event; /* of its last transfer */
} ways[WAYS];

/* A page-locked piece and an event that nothing uses now. */
static int way_take(struct way **out, ds_tensor *piece, size_t bytes)
{
    static int turn;
    struct way *w = &ways[turn = (turn + 1) % WAYS];
    int64_t n = (int64_t)bytes;
    int rc = w->event ? ds_event_wait(w->event) : ds_event_make(&w->event, DS_CUDA);

    *out = w;
    return rc < 0 ? rc : ds_empty_pinned(piece, DS_U8, 1, &n);
}

static int way_start(struct way *w, void *to, const void *from, size_t bytes, int up,
                     ds_storage *piece)
{
    int rc = w->event->backend->copy_later(to, from, bytes, up, DS_STREAM_KERNELS);

    if (rc == 0)
        rc = record(w->event, DS_STREAM_KERNELS);
    if (rc == 0) {
        w->event->held[0] = piece;
        ds_storage_retain(piece);
    }
    return rc;
}

int ds_stage_up(const ds_backend *backend, void *to, const void *from, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += PIECE) {
        size_t n = bytes - at < PIECE ? bytes - at : PIECE;
        ds_tensor piece = {0};
        struct way *w;
        int rc = way_take(&w, &piece, n);

        if (rc == DS_ENOMEM) /* the system lets us lock no more */
            return backend->upload((char *)to + at, (const char *)from + at, bytes - at);
        if (rc == 0) {
            memcpy(piece.data, (const char *)from + at, n);
            rc = way_start(w, (char *)to + at, piece.data, n, 1, piece.storage);
        }
        ds_release(&piece);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* What a way has brought, to where it belongs. */
static int way_finish(struct way *w, ds_tensor *piece, char *to)
{
    int rc = ds_event_wait(w->event);

    if (rc == 0)
        memcpy(to, piece->data, (size_t)piece->numel);
    ds_release(piece);
    return rc;
}

/* Two pieces: one comes while the other is copied on. */
int ds_stage_down(const ds_backend *backend, void *to, const void *from, size_t bytes)
{
    ds_tensor piece[2] = {{0}, {0}};
    struct way *w[2];
    size_t last = 0;
    int k = 0, rc = 0;

    if (bytes <= PIECE)
        return backend->download(to, from, bytes);
    for (size_t at = 0; rc == 0 && at < bytes; at += PIECE, k = !k) {
        size_t n = bytes - at < PIECE ? bytes - at : PIECE;

        rc = way_take(&w[k], &piece[k], n);
        if (rc == 0)
            rc = way_start(w[k], piece[k].data, (const char *)from + at, n, 0, piece[k].storage);
        if (rc == 0 && at)
            rc = way_finish(w[!k], &piece[!k], (char *)to + last);
        last = at;
    }
    if (rc == 0)
        rc = way_finish(w[!k], &piece[!k], (char *)to + last);
    ds_release(&piece[0]);
    ds_release(&piece[1]);
    return rc;
}

/* ---- graphs */

int ds_graph_begin(int device)
{
    const ds_backend *backend = later_backend(device);

    return backend ? backend->graph_begin() : DS_ENOSYS;
}

int ds_graph_end(ds_graph **out, int device)
{
    const ds_backend *backend = later_backend(device);
    ds_graph *g;
    int rc;

    if (!backend)
        return DS_ENOSYS;
    g = out ? calloc(1, sizeof *g) : NULL;
    if (!g) {
        rc = backend->graph_end(NULL);
        return out ? ds_fail(DS_ENOMEM, "out of host memory") : rc;
    }
    g->backend = backend;
    rc = backend->graph_end(&g->handle);
    if (rc < 0) {
        free(g);
        return rc;
    }
    *out = g;
    return 0;
}

int ds_graph_run(ds_graph *g)
{
    return g->backend->graph_run(g->handle);
}

void ds_graph_free(ds_graph *g)
{
    if (!g)
        return;
    g->backend->graph_free(g->handle);
    free(g);
}
