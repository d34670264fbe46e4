/* tensor.c - tensors and views: shapes and strides over a shared storage.
 *
 * A ds_tensor holds one reference on its storage. Views are tensors like others: they alias the
 * storage and hold a reference of their own, so a base may be released while views of it live.
 */
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "runner/alloc.h"

static const struct {
    const char *name;
    int64_t size;
} dtypes[DS_DTYPES] = {
    [DS_F32] = {"f32", 4}, [DS_BF16] = {"bf16", 2}, [DS_F16] = {"f16", 2}, [DS_F64] = {"f64", 8},
    [DS_I64] = {"i64", 8}, [DS_I32] = {"i32", 4},   [DS_U8] = {"u8", 1},   [DS_BOOL] = {"bool", 1},
};

int64_t ds_dtype_size(int dtype)
{
    return dtype >= 0 && dtype < DS_DTYPES ? dtypes[dtype].size : 0;
}

const char *ds_dtype_name(int dtype)
{
    return dtype >= 0 && dtype < DS_DTYPES ? dtypes[dtype].name : "?";
}

/* Sets numel and dense from shape and stride. */
static void finish(ds_tensor *t)
{
    int64_t expected = 1;

    t->numel = 1;
    t->dense = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        t->numel *= t->shape[i];
        if (t->shape[i] != 1 && t->stride[i] != expected)
            t->dense = 0;
        expected *= t->shape[i];
    }
    if (t->numel == 0)
        t->dense = 1;
}

/* Row-major strides for a shape; DS_EINVAL if it is none or its size overflows. */
static int shape_dense(ds_tensor *t, int ndim, const int64_t *shape)
{
    int64_t n = 1;

    if (ndim < 0 || ndim > DS_MAX_DIM)
        return ds_fail(DS_EINVAL, "a tensor has at most %d dimensions, not %d", DS_MAX_DIM, ndim);
    t->ndim = ndim;
    for (int i = ndim - 1; i >= 0; i--) {
        if (shape[i] < 0)
            return ds_fail(DS_EINVAL, "size %lld of dimension %d is negative", (long long)shape[i],
                           i + 1);
        t->shape[i] = shape[i];
        t->stride[i] = n;
        if (shape[i] && n > ((int64_t)1 << 46) / shape[i])
            return ds_fail(DS_ENOMEM, "a tensor of that shape has more than 2^46 elements");
        n *= shape[i] ? shape[i] : 1;
    }
    finish(t);
    return 0;
}

int ds_empty(ds_tensor *out, int dtype, int device, int ndim, const int64_t *shape)
{
    ds_storage *s;
    int rc;

    out->data = NULL;
    out->storage = NULL;
    if (dtype < 0 || dtype >= DS_DTYPES)
        return ds_fail(DS_EINVAL, "there is no dtype %d", dtype);
    out->dtype = dtype;
    out->device = device;
    rc = shape_dense(out, ndim, shape);
    if (rc < 0)
        return rc;
    rc = ds_storage_take(&s, device, out->numel * dtypes[dtype].size);
    if (rc < 0)
        return rc;
    out->storage = s;
    out->data = s->data;
    return 0;
}

int ds_empty4(ds_tensor *out, int dtype, int device, int ndim, int64_t s0, int64_t s1, int64_t s2,
              int64_t s3)
{
    int64_t shape[4] = {s0, s1, s2, s3};

    return ds_empty(out, dtype, device, ndim, shape);
}

void ds_release(ds_tensor *t)
{
    ds_storage *s = t->storage;

    t->data = NULL;
    t->storage = NULL;
    if (s)
        ds_storage_release(s);
}

int ds_references(const ds_tensor *t)
{
    return t->storage ? atomic_load_explicit(&t->storage->refs, memory_order_relaxed) : 0;
}

int64_t ds_reach(const ds_tensor *t)
{
    int64_t last = 0, first;

    if (!t->storage || !t->numel)
        return 0;
    first = t->data ? (char *)t->data - (char *)t->storage->data : 0;
    for (int i = 0; i < t->ndim; i++)
        last += (t->shape[i] - 1) * t->stride[i];
    return first + (last + 1) * dtypes[t->dtype].size;
}

/* ---- views */

int ds_alias(ds_tensor *out, const ds_tensor *x)
{
    *out = *x;
    if (out->storage)
        ds_storage_retain(out->storage);
    return 0;
}

int ds_whole(ds_tensor *out, const ds_tensor *t, int64_t bytes)
{
    if (!t->storage || bytes > t->storage->bytes)
        return ds_fail(DS_EINVAL, "%lld bytes of a tensor's memory, which has %lld",
                       (long long)bytes, (long long)(t->storage ? t->storage->bytes : 0));
    *out = (ds_tensor){
        .data = t->storage->data, .storage = t->storage, .dtype = DS_U8, .device = t->device};
    shape_dense(out, 1, &bytes);
    ds_storage_retain(out->storage);
    return 0;
}

int ds_revive(ds_tensor *t, const ds_tensor *x, int64_t offset)
{
    if (!x->storage)
        return ds_fail(DS_EINVAL, "a view of a tensor that is released");
    t->storage = x->storage;
    t->data = x->data ? (char *)x->data + offset : NULL; /* meta: NULL */
    ds_storage_retain(t->storage);
    return 0;
}

static void advance(ds_tensor *t, int64_t elements)
{
    if (t->data)
        t->data = (char *)t->data + elements * dtypes[t->dtype].size;
}

static int bad_dim(const ds_tensor *x, int dim)
{
    return ds_fail(DS_EINVAL, "dimension %d is not in a tensor of %d", dim + 1, x->ndim);
}

int ds_transpose(ds_tensor *out, const ds_tensor *x, int d0, int d1)
{
    int32_t order[DS_MAX_DIM];

    if (d0 < 0 || d0 >= x->ndim)
        return bad_dim(x, d0);
    if (d1 < 0 || d1 >= x->ndim)
        return bad_dim(x, d1);
    for (int i = 0; i < x->ndim; i++)
        order[i] = i == d0 ? d1 : i == d1 ? d0 : i;
    return ds_permute(out, x, order);
}

int ds_permute(ds_tensor *out, const ds_tensor *x, const int32_t *order)
{
    unsigned seen = 0;

    for (int i = 0; i < x->ndim; i++) {
        if (order[i] < 0 || order[i] >= x->ndim || seen & 1u << order[i])
            return ds_fail(DS_EINVAL, "the order names dimension %d twice or does not exist",
                           order[i] + 1);
        seen |= 1u << order[i];
    }
    ds_alias(out, x);
    for (int i = 0; i < x->ndim; i++) {
        out->shape[i] = x->shape[order[i]];
        out->stride[i] = x->stride[order[i]];
    }
    finish(out);
    return 0;
}

int ds_narrow(ds_tensor *out, const ds_tensor *x, int dim, int64_t start, int64_t length)
{
    if (dim < 0 || dim >= x->ndim)
        return bad_dim(x, dim);
    if (start < 0 || length < 0 || start + length > x->shape[dim])
        return ds_fail(DS_ERANGE, "positions %lld to %lld are not in dimension %d of size %lld",
                       (long long)start + 1, (long long)(start + length), dim + 1,
                       (long long)x->shape[dim]);
    ds_alias(out, x);
    out->shape[dim] = length;
    advance(out, start * x->stride[dim]);
    finish(out);
    return 0;
}

int ds_select(ds_tensor *out, const ds_tensor *x, int dim, int64_t index)
{
    int rc = ds_narrow(out, x, dim, index, 1);

    if (rc < 0)
        return rc;
    out->ndim--;
    for (int i = dim; i < out->ndim; i++) {
        out->shape[i] = out->shape[i + 1];
        out->stride[i] = out->stride[i + 1];
    }
    finish(out);
    return 0;
}

int ds_reshape(ds_tensor *out, const ds_tensor *x, int ndim, const int64_t *shape)
{
    ds_tensor t = *x;
    int rc = shape_dense(&t, ndim, shape), from = 0, to = 0;

    if (rc < 0)
        return rc;
    if (t.numel != x->numel)
        return ds_fail(DS_EINVAL, "%lld elements do not fit a shape of %lld", (long long)x->numel,
                       (long long)t.numel);
    /* Dimensions fall into groups with equal products on both sides; a group can be viewed anew if
     * its old dimensions lie in memory like one. */
    while (!x->dense && to < ndim) {
        int64_t have, want = shape[to];
        int last = to + 1, first = from;

        while (first < x->ndim && x->shape[first] == 1)
            first++;
        if (shape[to] == 1) {
            t.stride[to++] = 1;
            continue;
        }
        have = x->shape[first];
        for (from = first + 1; have != want;) {
            if (have < want) {
                if (x->shape[from] != 1 && x->stride[from] * x->shape[from] != x->stride[first])
                    return 1;
                have *= x->shape[from];
                if (x->shape[from] != 1)
                    first = from;
                from++;
            } else {
                want *= shape[last++];
            }
        }
        for (int64_t step = x->stride[first]; last > to; last--) {
            t.stride[last - 1] = step;
            step *= shape[last - 1];
        }
        while (to < ndim && want > 1)
            want /= shape[to++];
    }
    t.data = x->data;
    t.storage = x->storage;
    if (t.storage)
        ds_storage_retain(t.storage);
    finish(&t);
    *out = t;
    return 0;
}

int ds_expand(ds_tensor *out, const ds_tensor *x, int ndim, const int64_t *shape)
{
    int lead = ndim - x->ndim;
    ds_tensor t = *x;

    if (lead < 0 || ndim > DS_MAX_DIM)
        return ds_fail(DS_EINVAL, "cannot expand %d dimensions to %d", x->ndim, ndim);
    t.ndim = ndim;
    for (int i = 0; i < ndim; i++) {
        int64_t have = i < lead ? 1 : x->shape[i - lead];

        if (have != shape[i] && have != 1)
            return ds_fail(DS_EINVAL, "cannot expand size %lld of dimension %d to %lld",
                           (long long)have, i + 1, (long long)shape[i]);
        t.shape[i] = shape[i];
        t.stride[i] = i < lead || have != shape[i] ? 0 : x->stride[i - lead];
    }
    finish(&t);
    if (t.storage)
        ds_storage_retain(t.storage);
    *out = t;
    return 0;
}

int ds_slice_flat(ds_tensor *out, const ds_tensor *x, int64_t offset, int ndim,
                  const int64_t *shape)
{
    ds_tensor t = *x;
    int rc = shape_dense(&t, ndim, shape);

    if (rc < 0)
        return rc;
    if (!x->dense || offset < 0 || offset + t.numel > x->numel)
        return ds_fail(DS_ERANGE, "elements %lld to %lld are not in a dense tensor of %lld",
                       (long long)offset, (long long)(offset + t.numel), (long long)x->numel);
    advance(&t, offset);
    if (t.storage)
        ds_storage_retain(t.storage);
    *out = t;
    return 0;
}

/* ---- borrowed views */

void ds_rows(ds_tensor *out, const ds_tensor *x)
{
    int64_t last = x->ndim ? x->shape[x->ndim - 1] : 1;

    *out = *x;
    out->ndim = 2;
    out->shape[0] = last ? x->numel / last : 0;
    out->shape[1] = last;
    out->stride[0] = last;
    out->stride[1] = 1;
    out->dense = 1;
}

void ds_columns(ds_tensor *out, const ds_tensor *x)
{
    ds_rows(out, x);
    ds_swapped(out, out);
}

void ds_swapped(ds_tensor *out, const ds_tensor *x)
{
    ds_tensor t = *x;
    int a = x->ndim - 2, b = x->ndim - 1;

    t.shape[a] = x->shape[b];
    t.shape[b] = x->shape[a];
    t.stride[a] = x->stride[b];
    t.stride[b] = x->stride[a];
    finish(&t);
    *out = t;
}

void ds_heads(ds_tensor *out, const ds_tensor *x, int64_t first, int64_t count, int64_t width)
{
    ds_tensor t = *x;

    t.ndim = 4;
    t.shape[2] = count;
    t.stride[2] = width;
    t.shape[3] = width;
    t.stride[3] = 1;
    advance(&t, first * width);
    finish(&t);
    *out = t;
}

/* ---- this process's memory */

int64_t ds_memory_rss(void)
{
    long long total, resident;
    FILE *f = fopen("/proc/self/statm", "r");
    int n;

    if (!f)
        return -1;
    n = fscanf(f, "%lld %lld", &total, &resident);
    fclose(f);
    return n == 2 ? resident * sysconf(_SC_PAGESIZE) : -1;
}

int64_t ds_page_faults(void)
{
    struct rusage usage;

    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_minflt + usage.ru_majflt;
}
