/* sort.c - what goes along one dimension, line by line: argmax, argmin, cumsum, sort, topk.
 *
 * Order is decided on keys: 64-bit integers that order as the values do, all dtypes alike. NaN is
 * the largest value, -0 equals 0. Ties go to the lower index, so results are stable.
 */
#include "kernels/cpu/walk.h"

#include <stdlib.h>

#define CHUNK 512
#define INSERTION 16 /* runs up to this length are sorted by insertion */

typedef struct item {
    uint64_t key;
    int64_t index;
} item;

/* ---- lines */

/* Walks over the lines of t[0]… along dim: all are given size 1 there. */
static int lines_start(walk *w, const char *name, int count, const ds_tensor *const *t, int dim)
{
    ds_tensor lines[WALK_MAX];
    const ds_tensor *list[WALK_MAX];

    DS_TRY(ds_check_dim(name, t[0], dim));
    for (int k = 0; k < count; k++) {
        if (t[k]->ndim != t[0]->ndim)
            return ds_fail(DS_EINVAL, "%s: the result has %d dimensions, but it must have %d", name,
                           t[k]->ndim, t[0]->ndim);
        lines[k] = *t[k];
        lines[k].shape[dim] = 1;
        lines[k].numel = 1;
        for (int i = 0; i < t[k]->ndim; i++)
            lines[k].numel *= lines[k].shape[i];
        list[k] = &lines[k];
    }
    return DS_CPU(walk_start)(w, name, count, list, WALK_ANY);
}

/* The keys of n elements; flip: ~0 for the opposite order; nan: the key of NaN. */
static void keys_load(uint64_t *keys, const char *x, int dtype, int64_t n, int64_t stride,
                      uint64_t flip, uint64_t nan)
{
    const uint64_t top = 1ull << 63, infinity = 0x7ffull << 52;

    if (!ds_is_float(dtype)) {
        ds_row_load_i64((int64_t *)keys, x, dtype, n, stride);
        for (int64_t i = 0; i < n; i++)
            keys[i] = (keys[i] ^ top) ^ flip;
        return;
    }
    ds_row_load_f64((double *)keys, x, dtype, n, stride);
    for (int64_t i = 0; i < n; i++) {
        uint64_t u = keys[i], magnitude = u & ~top;
        uint64_t key = u == top ? top : u & top ? ~u : u | top; /* -0: as 0 */

        keys[i] = magnitude > infinity ? nan : key ^ flip;
    }
}

/* ---- argmax, argmin */

static int extreme(const char *name, ds_tensor *y, const ds_tensor *x, int dim, uint64_t flip)
{
    int threads = ds_threads(x->numel);
    walk w;

    DS_TRY(ds_check_argmax(name, y, x, dim));
    DS_TRY(lines_start(&w, name, 2, (const ds_tensor *[]){x, y}, dim));
    if (w.numel == 0)
        return 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint64_t keys[CHUNK];
        int64_t begin, end;
        cursor c;

        ds_part(&begin, &end, w.numel, 1);
        cursor_start(&c, &w, begin);
        for (; begin < end; begin++) {
            uint64_t best = 0;
            int64_t at = 0;

            for (int64_t i = 0; i < x->shape[dim]; i += CHUNK) {
                int64_t n = x->shape[dim] - i < CHUNK ? x->shape[dim] - i : CHUNK;
                uint64_t most = 0;

                keys_load(keys, cursor_at(&c, &w, 0) + i * x->stride[dim] * w.op[0].size, x->dtype,
                          n, x->stride[dim], flip, ~0ull);
                for (int64_t j = 0; j < n; j++)
                    most = most > keys[j] ? most : keys[j];
                if (i > 0 && most <= best)
                    continue;
                best = most;
                for (at = i; keys[at - i] != most;)
                    at++;
            }
            *(int64_t *)(void *)cursor_at(&c, &w, 1) = at;
            cursor_advance(&c, &w, 1);
        }
    }
    return 0;
}

int DS_CPU(argmax)(ds_tensor *y, const ds_tensor *x, int dim)
{
    return extreme("argmax", y, x, dim, 0);
}

/* NaN counts as the extreme here too: it shows, as in min. */
int DS_CPU(argmin)(ds_tensor *y, const ds_tensor *x, int dim)
{
    return extreme("argmin", y, x, dim, ~0ull);
}

/* ---- cumsum: in f64 (i64 for integers) */

typedef union row {
    float f32[CHUNK];
    double f64[CHUNK];
    int64_t i64[CHUNK];
} row;

static void row_load(row *r, const char *x, int dtype, int64_t n, int64_t stride)
{
    if (!ds_is_float(dtype))
        ds_row_load_i64(r->i64, x, dtype, n, stride);
    else if (dtype == DS_F64)
        ds_row_load_f64(r->f64, x, dtype, n, stride);
    else
        ds_row_load(r->f32, x, dtype, n, stride);
}

static void row_store(const row *r, char *y, int dtype, int from, int64_t n, int64_t stride)
{
    if (!ds_is_float(from))
        ds_row_store_i64(y, r->i64, dtype, n, stride);
    else if (from == DS_F64)
        ds_row_store_f64(y, r->f64, dtype, n, stride);
    else
        ds_row_store(y, r->f32, dtype, n, stride);
}

/* row[k] = sum += row[k], forwards or backwards. */
#define ACCUMULATE(name, type, wide)                                                               \
    static void name(type *row, wide *sum, int64_t n, int reverse)                                 \
    {                                                                                              \
        wide total = *sum;                                                                         \
                                                                                                   \
        for (int64_t i = 0; i < n && !reverse; i++)                                                \
            row[i] = (type)(total += (wide)row[i]);                                                \
        for (int64_t i = n - 1; i >= 0 && reverse; i--)                                            \
            row[i] = (type)(total += (wide)row[i]);                                                \
        *sum = total;                                                                              \
    }                                                                                              \
    static void name##_lines(type *row, wide *sums, int64_t n)                                     \
    {                                                                                              \
        for (int64_t i = 0; i < n; i++)                                                            \
            row[i] = (type)(sums[i] += (wide)row[i]);                                              \
    }
ACCUMULATE(accumulate_f32, float, double)
ACCUMULATE(accumulate_f64, double, double)
ACCUMULATE(accumulate_i64, int64_t, uint64_t)

/* `width` lines side by side. */
static void cumsum_lines(const walk *w, const cursor *c, int64_t width, int64_t count,
                         int64_t y_step, int64_t x_step, int reverse)
{
    int last = w->ndim - 1, dtype = w->op[1].dtype;
    row sum, r;

    memset(&sum, 0, sizeof sum);
    for (int64_t i = 0; i < count; i++) {
        int64_t at = reverse ? count - 1 - i : i;

        row_load(&r, cursor_at(c, w, 1) + at * x_step * w->op[1].size, dtype, width,
                 w->op[1].stride[last]);
        if (!ds_is_float(dtype))
            accumulate_i64_lines(r.i64, (uint64_t *)sum.i64, width);
        else if (dtype == DS_F64)
            accumulate_f64_lines(r.f64, sum.f64, width);
        else
            accumulate_f32_lines(r.f32, sum.f64, width);
        row_store(&r, cursor_at(c, w, 0) + at * y_step * w->op[0].size, w->op[0].dtype, dtype,
                  width, w->op[0].stride[last]);
    }
}

/* One line at a time, where elements follow each other in it. */
static void cumsum_line(const walk *w, const cursor *c, int64_t count, int64_t y_step,
                        int64_t x_step, int reverse)
{
    int dtype = w->op[1].dtype;
    uint64_t total = 0;
    double sum = 0;
    row r;

    for (int64_t i = 0, n; i < count; i += n) {
        int64_t at;

        n = count - i < CHUNK ? count - i : CHUNK;
        at = reverse ? count - i - n : i;
        row_load(&r, cursor_at(c, w, 1) + at * x_step * w->op[1].size, dtype, n, x_step);
        if (!ds_is_float(dtype))
            accumulate_i64(r.i64, &total, n, reverse);
        else if (dtype == DS_F64)
            accumulate_f64(r.f64, &sum, n, reverse);
        else
            accumulate_f32(r.f32, &sum, n, reverse);
        row_store(&r, cursor_at(c, w, 0) + at * y_step * w->op[0].size, w->op[0].dtype, dtype, n,
                  y_step);
    }
}

int DS_CPU(cumsum)(ds_tensor *y, const ds_tensor *x, int dim, int reverse)
{
    int threads = ds_threads(x->numel * 2);
    walk w;

    DS_TRY(ds_check_cumsum(y, x, dim));
    DS_TRY(lines_start(&w, "cumsum", 2, (const ds_tensor *[]){y, x}, dim));
    if (x->numel == 0)
        return 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end, n;
        cursor c;

        ds_part(&begin, &end, w.numel, 1);
        cursor_start(&c, &w, begin);
        for (; begin < end; begin += n) {
            n = cursor_rest(&c, &w) < end - begin ? cursor_rest(&c, &w) : end - begin;
            n = n < CHUNK ? n : CHUNK;
            if (x->stride[dim] == 1 || n == 1) {
                n = 1;
                cumsum_line(&w, &c, x->shape[dim], y->stride[dim], x->stride[dim], reverse);
            } else {
                cumsum_lines(&w, &c, n, x->shape[dim], y->stride[dim], x->stride[dim], reverse);
            }
            cursor_advance(&c, &w, n);
        }
    }
    return 0;
}

/* ---- sorting items */

static int before(const item *a, const item *b)
{
    return a->key < b->key || (a->key == b->key && a->index < b->index);
}

static void insertion_sort(item *a, int64_t n)
{
    for (int64_t i = 1; i < n; i++) {
        item moved = a[i];
        int64_t j = i;

        for (; j > 0 && before(&moved, &a[j - 1]); j--)
            a[j] = a[j - 1];
        a[j] = moved;
    }
}

/* Merges runs of doubling length, from a to b and back. The result is in a. */
static void merge_sort(item *a, item *b, int64_t n)
{
    item *home = a;

    for (int64_t i = 0; i < n; i += INSERTION)
        insertion_sort(a + i, n - i < INSERTION ? n - i : INSERTION);
    for (int64_t run = INSERTION; run < n; run *= 2) {
        for (int64_t i = 0; i < n; i += 2 * run) {
            int64_t middle = i + run < n ? i + run : n, end = i + 2 * run < n ? i + 2 * run : n;
            int64_t left = i, right = middle;

            for (int64_t k = i; k < end; k++) {
                int take_right = left == middle || (right < end && before(&a[right], &a[left]));

                b[k] = take_right ? a[right++] : a[left++];
            }
        }
        item *swap = a;

        a = b;
        b = swap;
    }
    if (a != home)
        memcpy(home, a, (size_t)n * sizeof *a);
}

/* Sinks element i of a heap whose root is the last in order. */
static void sink(item *heap, int64_t i, int64_t n)
{
    item moved = heap[i];
    int64_t child;

    while ((child = 2 * i + 1) < n) {
        if (child + 1 < n && before(&heap[child], &heap[child + 1]))
            child++;
        if (!before(&moved, &heap[child]))
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = moved;
}

/* Brings the first k in order of n items to the front, in order. A heap holds the best k so far;
 * most items fail one comparison with its root. */
static void select_first(item *items, item *other, int64_t n, int64_t k)
{
    if (k < n && k > 0) {
        for (int64_t i = k / 2; i-- > 0;)
            sink(items, i, k);
        for (int64_t i = k; i < n; i++) {
            if (!before(&items[i], &items[0]))
                continue;
            items[0] = items[i];
            sink(items, 0, k);
        }
    }
    merge_sort(items, other, k);
}

static void items_load(item *items, const char *x, int dtype, int64_t n, int64_t stride,
                       uint64_t flip)
{
    uint64_t keys[CHUNK];

    for (int64_t i = 0; i < n; i += CHUNK) {
        int64_t m = n - i < CHUNK ? n - i : CHUNK;

        keys_load(keys, x + i * stride * ds_bytes_of(dtype), dtype, m, stride, flip, ~flip);
        for (int64_t j = 0; j < m; j++)
            items[i + j] = (item){keys[j], i + j};
    }
}

/* sort and topk: the k first in order of every line. Values are copied as they are. */
static int ordered(const char *name, ds_tensor *values, ds_tensor *indices, const ds_tensor *x,
                   int dim, uint64_t flip)
{
    int64_t n, k, size = ds_bytes_of(x->dtype);
    int threads = ds_threads(x->numel * 16);
    item *scratch;
    walk w;

    DS_TRY(lines_start(&w, name, 3, (const ds_tensor *[]){values, indices, x}, dim));
    DS_TRY(ds_check_ordered(name, values, indices, x, dim));
    n = x->shape[dim];
    k = values->shape[dim];
    if (w.numel == 0 || k == 0)
        return 0;
    scratch = malloc((size_t)(2 * n * threads) * sizeof *scratch);
    if (!scratch)
        return ds_fail(DS_ENOMEM, "%s: out of memory", name);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        item *items = scratch + 2 * n * omp_get_thread_num();
        int64_t begin, end;
        cursor c;

        ds_part(&begin, &end, w.numel, 1);
        cursor_start(&c, &w, begin);
        for (; begin < end; begin++) {
            const char *from = cursor_at(&c, &w, 2);
            char *value = cursor_at(&c, &w, 0);
            int64_t *index = (int64_t *)(void *)cursor_at(&c, &w, 1);

            items_load(items, from, x->dtype, n, x->stride[dim], flip);
            select_first(items, items + n, n, k);
            for (int64_t i = 0; i < k; i++) {
                memcpy(value + i * values->stride[dim] * size,
                       from + items[i].index * x->stride[dim] * size, (size_t)size);
                index[i * indices->stride[dim]] = items[i].index;
            }
            cursor_advance(&c, &w, 1);
        }
    }
    free(scratch);
    return 0;
}

int DS_CPU(sort)(ds_tensor *values, ds_tensor *indices, const ds_tensor *x, int dim, int descending)
{
    if (dim >= 0 && dim < x->ndim && values->ndim == x->ndim && values->shape[dim] != x->shape[dim])
        return ds_fail(DS_EINVAL, "sort: %lld values do not fit %lld", (long long)x->shape[dim],
                       (long long)values->shape[dim]);
    return ordered("sort", values, indices, x, dim, descending ? ~0ull : 0);
}

int DS_CPU(topk)(ds_tensor *values, ds_tensor *indices, const ds_tensor *x, int dim, int largest)
{
    return ordered("topk", values, indices, x, dim, largest ? ~0ull : 0);
}
