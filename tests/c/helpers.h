/* helpers.h - tensors for the kernels' tests: any dtype and strides, read and written as double.
 *
 * Elements are counted in row-major order of the shape. Around and between the elements of a tensor
 * lies a margin which a kernel must leave alone; drop() looks.
 */
#ifndef DS_TEST_HELPERS_H
#define DS_TEST_HELPERS_H

#include <omp.h>

#include "tests/c/numbers.h"

#define MARGIN 0xa5
#define FLOATS 4 /* the first dtypes: f32 bf16 f16 f64 */

#define SHAPE(...)                                                                                 \
    (int)(sizeof((int64_t[]){__VA_ARGS__}) / 8), (const int64_t[])                                 \
    {                                                                                              \
        __VA_ARGS__                                                                                \
    }

/* x as a dtype stores it. */
static inline double rounded(int dtype, double x)
{
    if (dtype == DS_F32)
        return (double)(float)x;
    if (dtype == DS_BF16)
        return (double)ds_bf16_to_f32(ds_f32_to_bf16((float)x));
    return dtype == DS_F16 ? (double)ds_f16_to_f32(ds_f32_to_f16((float)x)) : x;
}

/* ---- tensors */

/* Elements of memory from the first to behind the last. */
static inline int64_t span(const ds_tensor *t)
{
    int64_t last = 1;

    for (int d = 0; d < t->ndim; d++)
        last += (t->shape[d] - 1) * t->stride[d];
    return t->numel ? last : 0;
}

/* A tensor with its dimensions in memory in the given order (NULL: row-major), `gap` elements
 * between rows of each. */
static inline ds_tensor laid_out(int dtype, int ndim, const int64_t *shape, const int *order,
                                 int64_t gap)
{
    ds_tensor t = {.dtype = dtype, .ndim = ndim, .numel = 1};
    int64_t step = gap && order ? 2 : 1, expected = 1;
    char *block;

    for (int i = ndim - 1; i >= 0; i--) {
        int d = order ? order[i] : i;

        t.shape[d] = shape[d];
        t.stride[d] = step;
        step = step * (shape[d] ? shape[d] : 1) + gap;
        t.numel *= shape[d];
    }
    t.dense = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        t.dense &= t.shape[i] == 1 || t.stride[i] == expected;
        expected *= t.shape[i];
    }
    t.dense |= t.numel == 0;
    block = malloc((size_t)(span(&t) * ds_bytes_of(dtype) + 128));
    memset(block, MARGIN, (size_t)(span(&t) * ds_bytes_of(dtype) + 128));
    t.data = block + 64;
    return t;
}

static inline ds_tensor dense(int dtype, int ndim, const int64_t *shape)
{
    return laid_out(dtype, ndim, shape, NULL, 0);
}

/* Dense, with gaps, or with permuted dimensions and gaps: by chance. */
static inline ds_tensor anyhow(int dtype, int ndim, const int64_t *shape)
{
    int order[DS_MAX_DIM], kind = (int)between(0, 3);

    for (int i = 0; i < ndim; i++)
        order[i] = i;
    for (int i = ndim - 1; i > 0; i--) {
        int j = (int)between(0, i), t = order[i];

        order[i] = order[j];
        order[j] = t;
    }
    return laid_out(dtype, ndim, shape, kind >= 2 ? order : NULL, kind & 1 ? between(1, 3) : 0);
}

static inline ds_tensor scalar(int dtype, double x)
{
    ds_tensor t = dense(dtype, 0, NULL);

    set(&t, 0, x);
    return t;
}

static inline ds_tensor transposed(const ds_tensor *x, int a, int b)
{
    ds_tensor t = *x;

    t.shape[a] = x->shape[b];
    t.shape[b] = x->shape[a];
    t.stride[a] = x->stride[b];
    t.stride[b] = x->stride[a];
    t.dense = 0;
    return t;
}

/* Fails where bytes that belong to no element were written. */
static inline void drop(ds_tensor *t)
{
    size_t bytes = (size_t)ds_bytes_of(t->dtype), total = (size_t)span(t) * bytes + 128;
    char *mine = calloc(total, 1), *block = (char *)t->data - 64;

    for (int64_t i = 0; i < t->numel; i++)
        memset(mine + 64 + (size_t)place(t, i) * bytes, 1, bytes);
    for (size_t i = 0; i < total; i++)
        if (!mine[i] && (unsigned char)block[i] != MARGIN)
            fail_msg("byte %zu of %zu lies outside the tensor and was written", i, total);
    free(mine);
    free(block);
    t->data = NULL;
}

/* Random values from low to high; whole numbers for integer dtypes. */
static inline void randomise(ds_tensor *t, double low, double high)
{
    for (int64_t i = 0; i < t->numel; i++)
        set(t, i,
            ds_is_float(t->dtype) ? low + (high - low) * random01()
                                  : (double)between((int64_t)low, (int64_t)high));
}

static inline ds_tensor random_tensor(int dtype, int ndim, const int64_t *shape, double low,
                                      double high)
{
    ds_tensor t = anyhow(dtype, ndim, shape);

    randomise(&t, low, high);
    return t;
}

/* ---- comparing */

/* What a float kernel may miss `want` by: its dtype's rounding and `ulps` of f32's (f64's) own. */
static inline double within(int dtype, double want, double ulps)
{
    double own = dtype == DS_F64 ? 0x1p-53 : 0x1p-24;
    double tiny = dtype == DS_F16 ? 0x1p-25 : dtype == DS_F64 ? 0 : 0x1p-126;

    return fabs(want) * (eps_of(dtype) * 1.001 + 2 * ulps * own) + tiny;
}

#endif
