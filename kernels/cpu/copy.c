/* copy.c - copying between any strides and dtypes; fill, arange, triangle, one_hot.
 *
 * Three ways to copy: runs of one row where both sides go along it, tiles where the source's rows
 * are the output's columns, and rows through a buffer where dtypes differ and strides fit nothing
 * else.
 */
#include "kernels/cpu/walk.h"

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

/* ---- tiles: y's rows are x's columns
 *
 * A tile is 64 bytes square in memory and goes through a small buffer, so that every cache line of
 * x and y is touched once. Going down a column element by element would touch as many lines as
 * there are rows, which at strides of a power of two all share a few sets of the cache. */

#define TILE_BYTES 64

typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));

VF_FUNC u16x8 load_u16x8(const uint16_t *p)
{
    u16x8 v;

    memcpy(&v, p, sizeof v);
    return v;
}

VF_FUNC u32x4 load_u32x4(const uint32_t *p)
{
    u32x4 v;

    memcpy(&v, p, sizeof v);
    return v;
}

/* Interleave the first and the second halves of a pair of rows. */
#define LOW8(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH8(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define LOW4(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH4(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)

/* Rows i and i + 4 become rows 2 i and 2 i + 1: three times that, and 8 × 8 is transposed. Named
 * variables, because compilers keep arrays of vectors in memory. */
#define ROUND8(b, a)                                                                               \
    u16x8 b##0 = LOW8(a##0, a##4), b##1 = HIGH8(a##0, a##4), b##2 = LOW8(a##1, a##5),              \
          b##3 = HIGH8(a##1, a##5), b##4 = LOW8(a##2, a##6), b##5 = HIGH8(a##2, a##6),             \
          b##6 = LOW8(a##3, a##7), b##7 = HIGH8(a##3, a##7)
#define ROUND4(b, a)                                                                               \
    u32x4 b##0 = LOW4(a##0, a##2), b##1 = HIGH4(a##0, a##2), b##2 = LOW4(a##1, a##3),              \
          b##3 = HIGH4(a##1, a##3)

/* y[j][i] = x[i][j] */
VF_FUNC void transpose_8x8(uint16_t *y, int64_t ys, const uint16_t *x, int64_t xs)
{
    u16x8 a0 = load_u16x8(x), a1 = load_u16x8(x + xs), a2 = load_u16x8(x + 2 * xs);
    u16x8 a3 = load_u16x8(x + 3 * xs), a4 = load_u16x8(x + 4 * xs), a5 = load_u16x8(x + 5 * xs);
    u16x8 a6 = load_u16x8(x + 6 * xs), a7 = load_u16x8(x + 7 * xs);
    ROUND8(b, a);
    ROUND8(c, b);
    ROUND8(d, c);

    memcpy(y, &d0, 16);
    memcpy(y + ys, &d1, 16);
    memcpy(y + 2 * ys, &d2, 16);
    memcpy(y + 3 * ys, &d3, 16);
    memcpy(y + 4 * ys, &d4, 16);
    memcpy(y + 5 * ys, &d5, 16);
    memcpy(y + 6 * ys, &d6, 16);
    memcpy(y + 7 * ys, &d7, 16);
}

VF_FUNC void transpose_4x4(uint32_t *y, int64_t ys, const uint32_t *x, int64_t xs)
{
    u32x4 a0 = load_u32x4(x), a1 = load_u32x4(x + xs), a2 = load_u32x4(x + 2 * xs);
    u32x4 a3 = load_u32x4(x + 3 * xs);
    ROUND4(b, a);
    ROUND4(c, b);

    memcpy(y, &c0, 16);
    memcpy(y + ys, &c1, 16);
    memcpy(y + 2 * ys, &c2, 16);
    memcpy(y + 3 * ys, &c3, 16);
}

/* One tile: `rows` rows of y, each `columns` elements long; rows of y are `ys` elements apart,
 * columns of y (rows of x) `xs`. Lines of x are read whole, then lines of y are written, a few rows
 * at a time. */
#define TILE(type, side, block, transpose_block)                                                   \
    static void tile_##type(void *out, int64_t ys, const void *in, int64_t xs, int64_t rows,       \
                            int64_t columns)                                                       \
    {                                                                                              \
        _Alignas(64) type a[side][side];                                                           \
        type *y = out;                                                                             \
        const type *x = in;                                                                        \
                                                                                                   \
        if (rows < side || columns < side) {                                                       \
            for (int64_t i = 0; i < rows; i++)                                                     \
                for (int64_t j = 0; j < columns; j++)                                              \
                    y[i * ys + j] = x[j * xs + i];                                                 \
            return;                                                                                \
        }                                                                                          \
        for (int64_t j = 0; j < side; j++)                                                         \
            memcpy(a[j], x + j * xs, sizeof a[j]);                                                 \
        for (int64_t i = 0; i < side; i += block)                                                  \
            for (int64_t j = 0; j < side; j += block)                                              \
                transpose_block(y + i * ys + j, ys, &a[j][i], side);                               \
    }

static void transpose_u8(uint8_t *y, int64_t ys, const uint8_t *x, int64_t xs)
{
    (void)ys, (void)xs;
    *y = *x;
}

static void transpose_u64(uint64_t *y, int64_t ys, const uint64_t *x, int64_t xs)
{
    (void)ys, (void)xs;
    *y = *x;
}

TILE(uint8_t, 64, 1, transpose_u8)
TILE(uint16_t, 32, 8, transpose_8x8)
TILE(uint32_t, 16, 4, transpose_4x4)
TILE(uint64_t, 8, 1, transpose_u64)

/* The dimension along which x is contiguous while y's last one is not; -1: there is none such. */
static int column_dim(const walk *w)
{
    int last = w->ndim - 1;
    int64_t side = TILE_BYTES / w->op[0].size;

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
    static void (*const tile[])(void *, int64_t, const void *, int64_t, int64_t, int64_t) = {
        [1] = tile_uint8_t, [2] = tile_uint16_t, [4] = tile_uint32_t, [8] = tile_uint64_t};
    int last = whole->ndim - 1;
    int64_t side = TILE_BYTES / whole->op[0].size, size = whole->op[0].size;
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
                tile[size](cursor_at(&c, &w, 0) + (i * ys + j) * size, ys,
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

    if (y->ndim != 1)
        return ds_fail(DS_EINVAL, "arange: the result has %d dimensions, but it must have 1",
                       y->ndim);
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
    char have[128], want[128];
    int64_t columns;
    walk w;
    int rc;

    if (y->ndim < 2 || y->ndim != x->ndim ||
        memcmp(y->shape, x->shape, sizeof(int64_t) * (size_t)y->ndim))
        return ds_fail(DS_EINVAL, "triangle: %s and %s are not equally shaped matrices",
                       DS_CPU(shape_text)(have, x), DS_CPU(shape_text)(want, y));
    if (y->dtype != x->dtype)
        return ds_fail(DS_EINVAL, "triangle: the result is %s, but it must be %s",
                       ds_name_of(y->dtype), ds_name_of(x->dtype));
    if (y->numel == 0)
        return 0;
    columns = y->shape[last];
    rows[0].shape[last] = rows[1].shape[last] = 1;
    rows[0].numel = rows[1].numel = y->numel / columns;
    rc = DS_CPU(walk_start)(&w, "triangle", 2, (const ds_tensor *[]){&rows[0], &rows[1]},
                            WALK_ROW_MAJOR);
    if (rc < 0)
        return rc;
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
