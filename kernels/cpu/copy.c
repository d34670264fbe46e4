/* copy.c - copying between any strides and dtypes; fill, arange, triangle, one_hot.
 *
 * Three ways to copy: runs of one row where both sides go along it, tiles where the source's rows
 * are the output's columns, and rows through a buffer where dtypes differ and strides fit nothing
 * else.
 */
#include "kernels/cpu/walk.h"
#include "kernels/tile.h"

/* ---- one run of a row: n elements from one stride and dtype to another */

#define BUFFER 512 /* elements */

/* What an f32 buffer holds exactly. */
static int fits_f32(int dtype)
{
    return dtype <= DS_F16 || dtype >= DS_U8;
}

static void convert_run(const walk *w, char *y, int64_t to, const char *x, int64_t from, int64_t n)
{
    const struct walk_operand *out = &w->op[0], *in = &w->op[1];
    double buffer[BUFFER];
    int single = fits_f32(in->dtype) && fits_f32(out->dtype);

    if (out->dtype == DS_F32 && to == 1) {
        ds_row_load((float *)(void *)y, x, in->dtype, n, from);
        return;
    }
    if (in->dtype == DS_F32 && from == 1) {
        ds_row_store(y, (const float *)(const void *)x, out->dtype, n, to);
        return;
    }
    for (int64_t i = 0; i < n; i += BUFFER) {
        int64_t m = n - i < BUFFER ? n - i : BUFFER;
        const char *source = x + i * from * in->size;
        char *target = y + i * to * out->size;

        if (single) {
            ds_row_load((float *)buffer, source, in->dtype, m, from);
            ds_row_store(target, (const float *)buffer, out->dtype, m, to);
        } else {
            ds_row_load_f64(buffer, source, in->dtype, m, from);
            ds_row_store_f64(target, buffer, out->dtype, m, to);
        }
    }
}

/* `rows` rows of n elements. A call of memcpy for each would cost as much as a short row. */
static void copy_rows(const walk *w, char *y, const char *x, int64_t rows, int64_t n)
{
    int last = w->ndim - 1, above = last > 0 ? last - 1 : 0;
    int64_t size = w->op[0].size, to = w->op[0].stride[last], from = w->op[1].stride[last];
    int64_t down = w->op[0].stride[above] * size, along = w->op[1].stride[above] * w->op[1].size;
    int same = w->op[0].dtype == w->op[1].dtype;
    int64_t bytes = same && to == 1 && from == 1 ? n * size : 0;

    for (int64_t r = 0; r < rows; r++, y += down, x += along) {
        if (bytes > 0 && bytes <= 1024 && bytes % 64 == 0)
            for (int64_t i = 0; i < bytes; i += 64)
                memcpy(y + i, x + i, 64);
        else if (same)
            DS_CPU(row_move)(y, to, x, from, size, n);
        else
            convert_run(w, y, to, x, from, n);
    }
}

static void copy_part(const walk *w, int64_t begin, int64_t end)
{
    int last = w->ndim - 1;
    int64_t row = w->shape[last];
    cursor c;

    cursor_start(&c, w, begin);
    while (begin < end) {
        int64_t n = cursor_rest(&c, w) < end - begin ? cursor_rest(&c, w) : end - begin;
        int64_t rows = n < row || last == 0 ? 1 : (end - begin) / row;
        int64_t left = last == 0 ? 1 : w->shape[last - 1] - c.index[last - 1];

        rows = rows < left ? rows : left;
        copy_rows(w, cursor_at(&c, w, 0), cursor_at(&c, w, 1), rows, n);
        begin += rows * n;
        cursor_advance(&c, w, rows * n);
    }
}

/* ---- tiles: y's rows are x's columns */

/* The dimension along which x is contiguous while y's last one is not; -1: there is none such. */
static int column_dim(const walk *w)
{
    int last = w->ndim - 1;
    int64_t side = DS_TILE_BYTES / w->op[0].size;

    if (w->op[0].dtype != w->op[1].dtype || w->op[0].stride[last] != 1 ||
        w->op[1].stride[last] == 1 || w->shape[last] < side)
        return -1;
    for (int i = 0; i < last; i++)
        if (w->op[1].stride[i] == 1 && w->shape[i] >= side)
            return i;
    return -1;
}

/* Tiles over dimensions `dim` (rows of y) and the last, for all positions in the other ones. They
 * come in groups of GROUP down the rows: so a row of x is read on over a few lines. */
#define GROUP 16

static void copy_tiles(const walk *whole, int dim, int threads)
{
    int last = whole->ndim - 1;
    int64_t side = DS_TILE_BYTES / whole->op[0].size, size = whole->op[0].size;
    int64_t rows = whole->shape[dim], columns = whole->shape[last];
    int64_t down = (rows + GROUP * side - 1) / (GROUP * side), across = (columns + side - 1) / side;
    int64_t ys = whole->op[0].stride[dim], xs = whole->op[1].stride[last];
    walk w = *whole;

    w.shape[dim] = 1;
    w.shape[last] = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;
        cursor c;

        ds_part(&begin, &end, whole->numel / (rows * columns) * down * across, 1);
        for (int64_t t = begin; t < end; t++) {
            int64_t top = t / across % down * side * GROUP, j = t % across * side;

            if (t == begin || t % (down * across) == 0)
                cursor_start(&c, &w, t / (down * across));
            for (int64_t i = top; i < rows && i < top + GROUP * side; i += side)
                ds_tiles[size](cursor_at(&c, &w, 0) + (i * ys + j) * size, ys,
                               cursor_at(&c, &w, 1) + (i + j * xs) * size, xs,
                               rows - i < side ? rows - i : side,
                               columns - j < side ? columns - j : side);
        }
    }
}

/* ---- kernels */

int DS_CPU(copy)(ds_tensor *y, const ds_tensor *x)
{
    int threads = ds_threads(y->numel), dim;
    walk w;
    int rc = DS_CPU(walk_start)(&w, "copy", 2, (const ds_tensor *[]){y, x}, WALK_ANY);

    if (rc < 0 || y->numel == 0)
        return rc;
    dim = column_dim(&w);
    if (dim >= 0) {
        copy_tiles(&w, dim, threads);
        return 0;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;

        ds_part(&begin, &end, w.numel, 64);
        copy_part(&w, begin, end);
    }
    return 0;
}

int DS_CPU(fill)(ds_tensor *y, double value)
{
    number s;
    int rc = DS_CPU(number_start)(&s, "fill", value, y->dtype, 1);

    return rc < 0 ? rc : DS_CPU(copy)(y, &s.t);
}

int DS_CPU(arange)(ds_tensor *y, double start, double step)
{
    double row[BUFFER];

    DS_TRY(ds_check_arange(y));
    for (int64_t i = 0; i < y->numel; i += BUFFER) {
        int64_t n = y->numel - i < BUFFER ? y->numel - i : BUFFER;

        for (int64_t j = 0; j < n; j++)
            row[j] = start + (double)(i + j) * step;
        ds_row_store_f64((char *)y->data + i * y->stride[0] * ds_bytes_of(y->dtype), row, y->dtype,
                         n, y->stride[0]);
    }
    return 0;
}

/* Row r of a matrix keeps its columns [low, high); the rest becomes 0, which is all bits 0. */
static void triangle_row(char *y, int64_t ys, const char *x, int64_t xs, int64_t size, int64_t n,
                         int64_t low, int64_t high)
{
    static const uint64_t zero;

    low = low < 0 ? 0 : low > n ? n : low;
    high = high < low ? low : high > n ? n : high;
    DS_CPU(row_move)(y, ys, &zero, 0, size, low);
    if (y != x || ys != xs)
        DS_CPU(row_move)(y + low * ys * size, ys, x + low * xs * size, xs, size, high - low);
    DS_CPU(row_move)(y + high * ys * size, ys, &zero, 0, size, n - high);
}

int DS_CPU(triangle)(ds_tensor *y, const ds_tensor *x, int diagonal, int upper)
{
    int threads = ds_threads(y->numel), last = y->ndim - 1;
    ds_tensor rows[2] = {*y, *x};
    int64_t columns;
    walk w;

    DS_TRY(ds_check_triangle(y, x));
    if (y->numel == 0)
        return 0;
    columns = y->shape[last];
    rows[0].shape[last] = rows[1].shape[last] = 1;
    rows[0].numel = rows[1].numel = y->numel / columns;
    DS_TRY(DS_CPU(walk_start)(&w, "triangle", 2, (const ds_tensor *[]){&rows[0], &rows[1]},
                              WALK_ROW_MAJOR));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;
        cursor c;

        ds_part(&begin, &end, w.numel, 1);
        cursor_start(&c, &w, begin);
        for (int64_t i = begin; i < end; i++) {
            int64_t bound = i % y->shape[last - 1] + diagonal;

            triangle_row(cursor_at(&c, &w, 0), y->stride[last], cursor_at(&c, &w, 1),
                         x->stride[last], w.op[0].size, columns, upper ? bound : 0,
                         upper ? columns : bound + 1);
            cursor_advance(&c, &w, 1);
        }
    }
    return 0;
}
