/* devices.c - the backends of this process, and copies between them.
 *
 * The CPU's is part of the program. CUDA's is a plugin, libds_cuda.so beside the program (or where
 * DS_CUDA_LIBRARY says), opened when a tensor is first wanted there: the same program runs with it and
 * without. The kernels that Lua sees are the backend's own but for `copy`, which also goes from one
 * device to another: by way of dense host memory.
 */
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/abi.h"
#include "runner/alloc.h"
#include "runner/comm.h"
#include "runner/later.h"
#include "runner/rank.h"

static pthread_once_t opened_cuda = PTHREAD_ONCE_INIT;
static const ds_backend *cuda; /* NULL: why_not says why */
static void *library;          /* the plugin */
static char why_not[512];

/* Where the plugin may lie, from the program's folder: a build's, an installation's. */
static const char *const plugin_places[] = {"libds_cuda.so", "../lib/dsrun/libds_cuda.so"};

/* The first place that has it; the first of all where none has. */
static void plugin_path(char *path, size_t bytes)
{
    const char *given = getenv("DS_CUDA_LIBRARY");
    char file[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", file, sizeof file - 1);
    size_t places = sizeof plugin_places / sizeof *plugin_places;
    char *slash;

    file[length > 0 ? length : 0] = 0;
    slash = strrchr(file, '/');
    if (given && *given) {
        snprintf(path, bytes, "%s", given);
        return;
    }
    for (size_t i = 0; i < places; i++) {
        snprintf(path, bytes, "%.*s/%s", slash ? (int)(slash - file) : 0, file, plugin_places[i]);
        if (access(path, F_OK) == 0)
            return;
    }
    snprintf(path, bytes, "%.*s/%s", slash ? (int)(slash - file) : 0, file, plugin_places[0]);
}

static void open_cuda(void)
{
    char path[PATH_MAX + 32];
    ds_backend_open *open_backend;
    ds_rank rank;
    void *symbol;

    plugin_path(path, sizeof path);
    if (access(path, F_OK) != 0) {
        snprintf(why_not, sizeof why_not, "this build has no CUDA backend (there is no %.300s)",
                 path);
        return;
    }
    library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    symbol = library ? dlsym(library, DS_CUDA_OPEN) : NULL;
    if (!symbol) {
        snprintf(why_not, sizeof why_not, "the CUDA backend cannot be opened: %.400s", dlerror());
        return;
    }
    memcpy(&open_backend, &symbol, sizeof symbol);
    ds_rank_find(&rank);
    cuda =
        open_backend(ds_backend_abi(), rank.local_rank, rank.local_size > 0 ? rank.local_size : 1);
    if (!cuda)
        snprintf(why_not, sizeof why_not, "%.500s", ds_error());
}

const ds_backend *ds_backend_of(int device)
{
    if (device == DS_CPU)
        return ds_cpu_backend(NULL);
    if (device == DS_CUDA) {
        pthread_once(&opened_cuda, open_cuda);
        if (cuda)
            return cuda;
        ds_fail(DS_ENOSYS, "%s; use device \"cpu\"", why_not);
        return NULL;
    }
    ds_fail(DS_ENOSYS, "there is no device %d", device);
    return NULL;
}

const ds_transport *ds_cuda_transport(void)
{
    const ds_transport *found = ds_backend_of(DS_CUDA) ? dlsym(library, DS_CUDA_TRANSPORT) : NULL;

    if (!found && cuda)
        ds_fail(DS_ENOSYS, "this build has no NCCL, by which ranks with GPUs talk");
    return found;
}

int ds_shared_take(void **out, size_t bytes)
{
    const ds_transport *t = ds_cuda_transport();

    return t ? t->memory_take(out, bytes) : DS_ENOSYS;
}

void ds_shared_give(void *data)
{
    ds_cuda_transport()->memory_give(data);
}

/* ---- copies */

/* Room in host memory for all of x, dense. */
static int host_like(ds_tensor *out, const ds_tensor *x)
{
    return ds_empty(out, x->dtype, DS_CPU, x->ndim, x->shape);
}

static int download(ds_tensor *y, const ds_tensor *x)
{
    const ds_backend *cpu = ds_backend_of(DS_CPU);
    ds_tensor dense = {0}, host = {0};
    int direct = y->dense && y->dtype == x->dtype && y->numel == x->numel, rc = 0;

    if (!x->dense) {
        rc = ds_empty(&dense, x->dtype, DS_CUDA, x->ndim, x->shape);
        if (rc == 0)
            rc = cuda->ops.copy(&dense, x);
        x = &dense;
    }
    if (rc == 0 && !direct)
        rc = host_like(&host, x);
    if (rc == 0 && x->numel)
        rc = ds_stage_down(cuda, direct ? y->data : host.data, x->data,
                           (size_t)(x->numel * ds_dtype_size(x->dtype)));
    if (rc == 0 && !direct)
        rc = cpu->ops.copy(y, &host);
    ds_release(&host);
    ds_release(&dense);
    return rc;
}

static int upload(ds_tensor *y, const ds_tensor *x)
{
    const ds_backend *cpu = ds_backend_of(DS_CPU);
    ds_tensor host = {0}, there = {0};
    int direct = x->dense && y->dense && y->dtype == x->dtype && y->numel == x->numel, rc = 0;
    /* f64 has no kernels there: it changes its type here. */
    int dtype = x->dtype == DS_F64 || y->dtype == DS_F64 ? y->dtype : x->dtype;

    if (!direct && (!x->dense || dtype != x->dtype)) {
        rc = ds_empty(&host, dtype, DS_CPU, x->ndim, x->shape);
        if (rc == 0)
            rc = cpu->ops.copy(&host, x);
        x = &host;
    }
    if (rc == 0 && !direct)
        rc = ds_empty(&there, x->dtype, DS_CUDA, x->ndim, x->shape);
    if (rc == 0 && x->numel)
        rc = ds_stage_up(cuda, direct ? y->data : there.data, x->data,
                         (size_t)(x->numel * ds_dtype_size(x->dtype)));
    if (rc == 0 && !direct)
        rc = cuda->ops.copy(y, &there);
    ds_release(&host);
    ds_release(&there);
    return rc;
}

static int copy(ds_tensor *y, const ds_tensor *x)
{
    const ds_backend *to = ds_backend_of(y->device), *from = ds_backend_of(x->device);

    if (!to || !from)
        return DS_ENOSYS;
    if (to == from)
        return to->ops.copy(y, x);
    return y->device == DS_CPU ? download(y, x) : upload(y, x);
}

const ds_ops *ds_ops_of(int device)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static ds_ops tables[DS_META];
    static int made[DS_META];
    const ds_backend *backend = ds_backend_of(device);

    if (!backend)
        return NULL;
    pthread_mutex_lock(&lock);
    if (!made[device]) {
        tables[device] = backend->ops;
        tables[device].copy = copy;
        made[device] = 1;
    }
    pthread_mutex_unlock(&lock);
    return &tables[device];
}

/* ---- what Lua asks */

int ds_device_synchronize(int device)
{
    const ds_backend *backend = ds_backend_of(device);

    return !backend ? DS_ENOSYS : backend->synchronize ? backend->synchronize() : 0;
}

void *ds_device_stream(int device)
{
    const ds_backend *backend = ds_backend_of(device);

    return backend && backend->stream ? backend->stream() : NULL;
}

int ds_device_describe(char *text, int64_t bytes, int device)
{
    const ds_backend *backend = ds_backend_of(device);

    if (!backend)
        return DS_ENOSYS;
    *text = 0;
    if (backend->describe)
        backend->describe(text, (size_t)bytes);
    return 0;
}

const char *ds_device_choices(int device)
{
    const ds_backend *backend = ds_backend_of(device);

    return backend && backend->choices ? backend->choices() : NULL;
}

int ds_device_choose(int device, const char *text)
{
    const ds_backend *backend = ds_backend_of(device);

    return !backend ? DS_ENOSYS : backend->choose ? backend->choose(text) : 0;
}

ds_device_counters ds_device_count(int device)
{
    /* Asking opens nothing. */
    return device == DS_CUDA && cuda ? *cuda->counters : (ds_device_counters){0};
}
