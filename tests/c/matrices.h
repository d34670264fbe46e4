/* matrices.h - tensors for the tests of linear algebra: any dtype and layout, read and written as
 * double, with a margin around every element that a kernel must leave alone. */
#ifndef DS_TEST_MATRICES_H
#define DS_TEST_MATRICES_H

#include "tests/c/numbers.h"

#define MARGIN 0xa5

/* How the last two dimensions lie. */
enum layout { ROWS, COLUMNS, ROW_GAPS, COLUMN_GAPS, SCATTERED, LAYOUTS };

/* Bytes of the block behind a tensor made here. */
static inline size_t span(const ds_tensor *t)
{
    int64_t last = 0;

    for (int d = 0; d < t->ndim; d++)
        last += (t->shape[d] - (t->shape[d] > 0)) * t->stride[d];
    return (size_t)((last + 8) * ds_bytes_of(t->dtype));
}

/* A tensor of that shape full of margin; release with drop(). */
static inline ds_tensor make(int dtype, int layout, int ndim, const int64_t *shape)
{
    ds_tensor t = {.dtype = dtype, .ndim = ndim, .numel = 1, .dense = layout == ROWS};
    int64_t step = 1, gap = layout == ROW_GAPS || layout == COLUMN_GAPS ? 3 : 0;
    int swapped = layout == COLUMNS || layout == COLUMN_GAPS;

    if (layout == SCATTERED)
        step = 2;
    for (int i = ndim - 1; i >= 0; i--) {
        int d = swapped && ndim >= 2 && i >= ndim - 2 ? 2 * ndim - 3 - i : i;

        t.shape[d] = shape[d];
        t.stride[d] = step;
        step *= shape[d] ? shape[d] : 1;
        if (i == ndim - 1)
            step += gap;
        t.numel *= shape[d];
    }
    t.data = malloc(span(&t));
    memset(t.data, MARGIN, span(&t));
    return t;
}

static inline void drop(ds_tensor *t)
{
    free(t->data);
    t->data = NULL;
}

static inline void randomise(ds_tensor *t, double scale)
{
    for (int64_t i = 0; i < t->numel; i++)
        set(t, i, (2 * random01() - 1) * scale);
}

/* A block of the same bytes, for comparing later. */
static inline void *copy_of(const ds_tensor *t)
{
    void *copy = malloc(span(t));

    memcpy(copy, t->data, span(t));
    return copy;
}

/* Fails if anything but the elements of t differs from `before`, which is freed. */
static inline void margins_kept(const ds_tensor *t, void *before)
{
    int64_t bytes = ds_bytes_of(t->dtype);

    for (int64_t i = 0; i < t->numel; i++)
        memcpy((char *)before + place(t, i) * bytes, (char *)t->data + place(t, i) * bytes,
               (size_t)bytes);
    assert_memory_equal(before, t->data, span(t));
    free(before);
}

#endif
