/* index.c - reading and writing at indices: gather, scatter, select, one_hot, masks.
 *
 * Indices are read and checked first, so that nothing is half written when one is out of range.
 * Work is divided by places in the output, never by indices, and adds in the order of the indices:
 * the result does not depend on the number of threads.
 */
#include "kernels/cpu/index.h"

#include <stdlib.h>

/* ---- indices */

int DS_CPU(indices_load)(ds_tensor *out, const char *name, const ds_tensor *index, int64_t bound)
{
    int64_t *to, step = 1, bad = index->numel;
    int threads = ds_threads(index->numel);
    walk w;

    DS_CPU(walk_start)(&w, name, 1, &index, WALK_ROW_MAJOR);
    *out = *index;
    out->dtype = DS_I64;
    out->dense = 1;
    for (int i = index->ndim - 1; i >= 0; i--) {
        out->stride[i] = step;
        step *= index->shape[i];
    }
    out->data = to = malloc((size_t)(index->numel ? index->numel : 1) * sizeof *to);
    if (!to)
        return ds_fail(DS_ENOMEM, "%s: out of memory for %lld indices", name,
                       (long long)index->numel);
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(min : bad)
    {
        int64_t begin, end, n;
        cursor c;

        ds_part(&begin, &end, index->numel, 64);
        if (begin < end)
            cursor_start(&c, &w, begin);
        for (int64_t i = begin; i < end; i += n) {
            n = cursor_rest(&c, &w) < end - i ? cursor_rest(&c, &w) : end - i;
            ds_row_load_i64(to + i, cursor_at(&c, &w, 0), index->dtype, n,
                            w.op[0].stride[w.ndim - 1]);
            for (int64_t j = i; j < i + n; j++)
                if ((uint64_t)to[j] >= (uint64_t)bound)
                    bad = bad < j ? bad : j;
            cursor_advance(&c, &w, n);
        }
    }
    if (bad == index->numel)
        return 0;
    bad = to[bad];
    free(to);
    return ds_fail(DS_ERANGE, "%s: index %lld is out of range for size %lld (indices count from 0)",
                   name, (long long)bad, (long long)bound);
}

/* ---- reading */

#define SELECT(type)                                                                               \
    {                                                                                              \
        const type *x = from;                                                                      \
        type *y = to;                                                                              \
                                                                                                   \
        for (int64_t i = 0; i < n; i++)                                                            \
            y[i * ys] = x[i * xs + index[i * is] * step];                                          \
        return;                                                                                    \
    }

static void select_row(void *to, int64_t ys, const void *from, int64_t xs, const int64_t *index,
                       int64_t is, int64_t step, int64_t size, int64_t n)
{
    if (is == 0) {
        DS_CPU(row_move)(to, ys, (const char *)from + *index * step * size, xs, size, n);
        return;
    }
    switch (size) {
    case 1:
        SELECT(uint8_t)
    case 2:
        SELECT(uint16_t)
    case 4:
        SELECT(uint32_t)
    default:
        SELECT(uint64_t)
    }
}

int DS_CPU(select_run)(const char *name, ds_tensor *y, const ds_tensor *x, const ds_tensor *index,
                       int64_t step)
{
    int threads = ds_threads(y->numel * 2), rc;
    walk w;

    rc = DS_CPU(walk_start)(&w, name, 3, (const ds_tensor *[]){y, x, index}, WALK_ANY);
    if (rc < 0 || y->numel == 0)
        return rc;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int last = w.ndim - 1;
        int64_t begin, end, n;
        cursor c;

        ds_part(&begin, &end, w.numel, 64);
        cursor_start(&c, &w, begin);
        for (; begin < end; begin += n) {
            n = cursor_rest(&c, &w) < end - begin ? cursor_rest(&c, &w) : end - begin;
            select_row(cursor_at(&c, &w, 0), w.op[0].stride[last], cursor_at(&c, &w, 1),
                       w.op[1].stride[last], (const int64_t *)(void *)cursor_at(&c, &w, 2),
                       w.op[2].stride[last], step, w.op[0].size, n);
            cursor_advance(&c, &w, n);
        }
    }
    return 0;
}

int DS_CPU(gather)(ds_tensor *y, const ds_tensor *x, const ds_tensor *index, int dim)
{
    ds_tensor indices, flat;
    int rc;

    DS_TRY(ds_check_gather(y, x, index, dim));
    DS_TRY(DS_CPU(indices_load)(&indices, "gather", index, x->shape[dim]));
    flat = ds_flat_along(x, index, dim, index->shape[dim]);
    rc = DS_CPU(select_run)("gather", y, &flat, &indices, x->stride[dim]);
    free(indices.data);
    return rc;
}

int DS_CPU(index_select)(ds_tensor *y, const ds_tensor *x, const ds_tensor *index, int dim)
{
    ds_tensor indices, flat, wide;
    int rc;

    DS_TRY(ds_check_index_select(y, x, index, dim));
    DS_TRY(DS_CPU(indices_load)(&indices, "index_select", index, x->shape[dim]));
    flat = ds_flat_along(x, x, dim, index->numel);
    wide = indices;
    wide.ndim = y->ndim;
    for (int i = 0; i < y->ndim; i++) {
        wide.shape[i] = i == dim ? index->numel : 1;
        wide.stride[i] = 1;
    }
    rc = DS_CPU(select_run)("index_select", y, &flat, &wide, x->stride[dim]);
    free(indices.data);
    return rc;
}

/* ---- writing: lines along dim are independent of each other, and each goes in order */

/* What scatter and scatter_add do with `count` elements of one line; strides in elements. */
typedef void line_fn(void *y, int64_t ys, int64_t y_count, const int64_t *index, int64_t is,
                     const void *x, int64_t xs, int64_t count, double *buffer);

#define LINE(name, type, assign)                                                                   \
    static void name(void *to, int64_t ys, int64_t y_count, const int64_t *index, int64_t is,      \
                     const void *from, int64_t xs, int64_t count, double *buffer)                  \
    {                                                                                              \
        const type *x = from;                                                                      \
        type *y = to;                                                                              \
                                                                                                   \
        (void)y_count, (void)buffer;                                                               \
        for (int64_t i = 0; i < count; i++)                                                        \
            y[index[i * is] * ys] assign x[i * xs];                                                \
    }
LINE(set_1, uint8_t, =)
LINE(set_2, uint16_t, =)
LINE(set_4, uint32_t, =)
LINE(set_8, uint64_t, =)
LINE(add_f32, float, +=)
LINE(add_f64, double, +=)
LINE(add_i64, uint64_t, +=)
LINE(add_i32, uint32_t, +=)
LINE(add_u8, uint8_t, +=)

/* Low precision: the whole line in f32, rounded once. */
#define LINE_HALF(name, dtype, load)                                                               \
    static void name(void *y, int64_t ys, int64_t y_count, const int64_t *index, int64_t is,       \
                     const void *from, int64_t xs, int64_t count, double *buffer)                  \
    {                                                                                              \
        const uint16_t *x = from;                                                                  \
        float *sum = (float *)buffer;                                                              \
                                                                                                   \
        ds_row_load(sum, y, dtype, y_count, ys);                                                   \
        for (int64_t i = 0; i < count; i++)                                                        \
            sum[index[i * is]] += load(x[i * xs]);                                                 \
        ds_row_store(y, sum, dtype, y_count, ys);                                                  \
    }
LINE_HALF(add_bf16, DS_BF16, ds_bf16_to_f32)
LINE_HALF(add_f16, DS_F16, ds_f16_to_f32)

static line_fn *const adds[DS_DTYPES] = {
    [DS_F32] = add_f32, [DS_BF16] = add_bf16, [DS_F16] = add_f16, [DS_F64] = add_f64,
    [DS_I64] = add_i64, [DS_I32] = add_i32,   [DS_U8] = add_u8};

/* The indices are i64, in range, and of the shape of what is written, with any strides. */
static int scatter_lines(const char *name, line_fn *line, ds_tensor *y, const ds_tensor *index,
                         const ds_tensor *x, int dim)
{
    ds_tensor lines[3];
    int64_t count, buffer_size = y->shape[dim];
    double *buffers;
    int rc, threads;
    walk w;

    count = index->shape[dim];
    lines[0] = ds_flat_along(y, index, dim, 1);
    lines[1] = ds_flat_along(x, index, dim, 1);
    lines[2] = ds_flat_along(index, index, dim, 1);
    rc = DS_CPU(walk_start)(&w, name, 3, (const ds_tensor *[]){&lines[0], &lines[1], &lines[2]},
                            WALK_ANY);
    threads = ds_threads(index->numel * 4);
    buffer_size = (buffer_size * (int64_t)sizeof(float) + 63) / 64 * 8;
    buffers = malloc((size_t)(buffer_size * threads + 1) * sizeof *buffers);
    if (rc == 0 && !buffers)
        rc = ds_fail(DS_ENOMEM, "%s: out of memory", name);
    if (rc < 0 || index->numel == 0)
        goto out;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;
        cursor c;

        ds_part(&begin, &end, w.numel, 1);
        cursor_start(&c, &w, begin);
        for (; begin < end; begin++) {
            line(cursor_at(&c, &w, 0), y->stride[dim], y->shape[dim],
                 (const int64_t *)(void *)cursor_at(&c, &w, 2), index->stride[dim],
                 cursor_at(&c, &w, 1), x->stride[dim], count,
                 buffers + buffer_size * omp_get_thread_num());
            cursor_advance(&c, &w, 1);
        }
    }
out:
    free(buffers);
    return rc;
}

static int scatter(const char *name, line_fn *line, ds_tensor *y, const ds_tensor *index,
                   const ds_tensor *x, int dim)
{
    ds_tensor indices;
    int rc;

    DS_TRY(ds_check_scatter(name, y, index, x, dim));
    if (!line)
        return ds_fail(DS_EINVAL, "%s: not for %s", name, ds_name_of(y->dtype));
    DS_TRY(DS_CPU(indices_load)(&indices, name, index, y->shape[dim]));
    rc = scatter_lines(name, line, y, &indices, x, dim);
    free(indices.data);
    return rc;
}

int DS_CPU(scatter)(ds_tensor *y, const ds_tensor *index, const ds_tensor *x, int dim)
{
    static line_fn *const by_size[] = {[1] = set_1, [2] = set_2, [4] = set_4, [8] = set_8};

    return scatter("scatter", by_size[ds_bytes_of(y->dtype)], y, index, x, dim);
}

int DS_CPU(scatter_add)(ds_tensor *y, const ds_tensor *index, const ds_tensor *x, int dim)
{
    return scatter("scatter_add", adds[y->dtype], y, index, x, dim);
}

/* Slices of real numbers, summed by groups of equal indices. */
static int add_slices(ds_tensor *y, const ds_tensor *indices, const ds_tensor *x, int dim)
{
    ds_tensor to = ds_flat_along(y, y, dim, 1), from = ds_flat_along(x, x, dim, 1);
    int64_t *offset = malloc((size_t)(indices->numel + 1) * sizeof *offset);
    int rc;

    for (int64_t i = 0; offset && i < indices->numel; i++)
        offset[i] = i * x->stride[dim];
    rc = offset ? DS_CPU(sum_rows)("index_add", &to, y->stride[dim], y->shape[dim], &from, offset,
                                   indices->data, indices->numel, 0)
                : ds_fail(DS_ENOMEM, "index_add: out of memory");
    free(offset);
    return rc;
}

/* Integers wrap around, so they are added as they are: scatter_add with an index that is broadcast. */
static int add_integers(ds_tensor *y, const ds_tensor *indices, const ds_tensor *x, int dim)
{
    ds_tensor index = *x;

    index.data = indices->data;
    index.dtype = DS_I64;
    for (int i = 0; i < x->ndim; i++)
        index.stride[i] = i == dim;
    return scatter_lines("index_add", adds[y->dtype], y, &index, x, dim);
}

int DS_CPU(index_add)(ds_tensor *y, const ds_tensor *index, const ds_tensor *x, int dim)
{
    ds_tensor indices;
    int rc;

    DS_TRY(ds_check_index_add(y, index, x, dim));
    DS_TRY(DS_CPU(indices_load)(&indices, "index_add", index, y->shape[dim]));
    rc = adds[y->dtype] && !ds_is_float(y->dtype) ? add_integers(y, &indices, x, dim)
                                                  : add_slices(y, &indices, x, dim);
    free(indices.data);
    return rc;
}

int DS_CPU(one_hot)(ds_tensor *y, const ds_tensor *index)
{
    int last = y->ndim - 1;
    ds_tensor indices, lines, ones;
    int64_t one = 1;

    DS_TRY(ds_check_one_hot(&lines, y, index));
    DS_TRY(DS_CPU(indices_load)(&indices, "one_hot", index, y->shape[last]));
    free(indices.data);
    ones = lines;
    ones.dtype = DS_I64;
    ones.data = &one;
    memset(ones.stride, 0, sizeof ones.stride);
    DS_TRY(DS_CPU(fill)(y, 0));
    return DS_CPU(scatter)(y, &lines, &ones, last);
}

/* ---- masks: the k-th true element in row-major order is the k-th of the other side */

/* Calls `row` for each run of the walk's operand 0 (what is masked) and 1 (the mask), in parts that
 * start at known counts. */
typedef int64_t mask_fn(char *x, int64_t xs, const uint8_t *mask, int64_t ms, char *list,
                        int64_t size, int64_t n);

static int64_t count_row(char *x, int64_t xs, const uint8_t *mask, int64_t ms, char *list,
                         int64_t size, int64_t n)
{
    int64_t count = 0;

    (void)x, (void)xs, (void)list, (void)size;
    for (int64_t i = 0; i < n; i++)
        count += mask[i * ms];
    return count;
}

static int64_t take_row(char *x, int64_t xs, const uint8_t *mask, int64_t ms, char *list,
                        int64_t size, int64_t n)
{
    int64_t count = 0;

    for (int64_t i = 0; i < n; i++)
        if (mask[i * ms])
            memcpy(list + count++ * size, x + i * xs * size, (size_t)size);
    return count;
}

static int64_t give_row(char *x, int64_t xs, const uint8_t *mask, int64_t ms, char *list,
                        int64_t size, int64_t n)
{
    int64_t count = 0;

    for (int64_t i = 0; i < n; i++)
        if (mask[i * ms])
            memcpy(x + i * xs * size, list + count++ * size, (size_t)size);
    return count;
}

static int64_t mask_part(const walk *w, mask_fn *row, char *list, int64_t begin, int64_t end)
{
    int64_t count = 0, size = w->op[0].size, n;
    int last = w->ndim - 1;
    cursor c;

    if (begin < end)
        cursor_start(&c, w, begin);
    for (; begin < end; begin += n) {
        n = cursor_rest(&c, w) < end - begin ? cursor_rest(&c, w) : end - begin;
        count +=
            row(cursor_at(&c, w, 0), w->op[0].stride[last], (const uint8_t *)cursor_at(&c, w, 1),
                w->op[1].stride[last], list + count * size, size, n);
        cursor_advance(&c, w, n);
    }
    return count;
}

/* `list` holds `room` elements; row NULL: only counts. DS_EINVAL before anything is written if
 * there are more, or (exact) fewer. */
static int masked(const char *name, mask_fn *row, const ds_tensor *x, const ds_tensor *mask,
                  char *list, int64_t room, int exact, int64_t *count)
{
    int threads = ds_threads(x->numel);
    int64_t start[threads + 1];
    walk w;

    DS_TRY(DS_CPU(walk_start)(&w, name, 2, (const ds_tensor *[]){x, mask}, WALK_ROW_MAJOR));
    memset(start, 0, sizeof start);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;

        ds_part(&begin, &end, w.numel, 64);
        start[omp_get_thread_num() + 1] = mask_part(&w, count_row, list, begin, end);
    }
    for (int i = 0; i < threads; i++)
        start[i + 1] += start[i];
    *count = start[threads];
    if (!row)
        return 0;
    if (*count > room || (exact && *count < room))
        return ds_fail(DS_EINVAL, "%s: the mask has %lld true elements, the other side has %lld",
                       name, (long long)*count, (long long)room);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;

        ds_part(&begin, &end, w.numel, 64);
        mask_part(&w, row, list + start[omp_get_thread_num()] * w.op[0].size, begin, end);
    }
    return 0;
}

int DS_CPU(mask_count)(int64_t *count, const ds_tensor *mask)
{
    DS_TRY(ds_check_mask("mask_count", mask));
    return masked("mask_count", NULL, mask, mask, NULL, 0, 0, count);
}

int DS_CPU(masked_select)(ds_tensor *y, const ds_tensor *x, const ds_tensor *mask)
{
    int64_t count;

    DS_TRY(ds_check_masked_select(y, x, mask));
    return masked("masked_select", take_row, x, mask, y->data, y->numel, 1, &count);
}

int DS_CPU(masked_scatter)(ds_tensor *y, const ds_tensor *mask, const ds_tensor *x)
{
    int64_t count;

    DS_TRY(ds_check_masked_scatter(y, mask, x));
    return masked("masked_scatter", give_row, y, mask, x->data, x->numel, 0, &count);
}
