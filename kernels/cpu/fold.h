/* fold.h - rows of f32, bf16 or f16 to one number, by vectors: sum, sum of squares, max, min. */
#ifndef DS_CPU_FOLD_H
#define DS_CPU_FOLD_H

#include <math.h>

#include "kernels/cpu/simd.h"

enum { FOLD_SUM, FOLD_SQUARES, FOLD_MAX, FOLD_MIN };

VF_FUNC vf fold_step(int fold, vf a, vf v)
{
    switch (fold) {
    case FOLD_SUM:
        return a + v;
    case FOLD_SQUARES:
        return a + v * v;
    default:
        return fold == FOLD_MAX ? vf_max(v, a) : vf_min(v, a);
    }
}

/* NaN, if there is one; else the largest or smallest, which is already known. */
static float fold_special(const void *x, int64_t n, int dtype, float extreme)
{
    for (int64_t i = 0; i < n; i++) {
        float v;

        ds_row_load(&v, (const char *)x + i * ds_bytes_of(dtype), dtype, 1, 1);
        if (v != v)
            return v;
    }
    return extreme;
}

/* n ≥ 1 elements. fold and dtype are constants where this is inlined. Vector max and min pass over
 * NaN; a sum of the elements times 0 tells whether it must be looked for. */
VF_FUNC float fold_typed(const void *x, int64_t n, int fold, int dtype)
{
    int extreme = fold >= FOLD_MAX;
    vf a[4], odd[2] = {vf_set(0.0f), vf_set(0.0f)}, v;
    int64_t i = 0;
    float one;

    for (int k = 0; k < 4; k++)
        a[k] = vf_set(fold == FOLD_MAX ? -INFINITY : fold == FOLD_MIN ? INFINITY : 0.0f);
    for (; i + 4 * VF_LANES <= n; i += 4 * VF_LANES)
        for (int k = 0; k < 4; k++) {
            v = vf_load_as(x, i + k * VF_LANES, dtype);
            a[k] = fold_step(fold, a[k], v);
            odd[k & 1] = extreme ? vf_fma(v, vf_set(0.0f), odd[k & 1]) : odd[k & 1];
        }
    for (; i < n; i += VF_LANES) {
        int64_t part = n - i;

        if (part >= VF_LANES)
            v = vf_load_as(x, i, dtype);
        else if (extreme && n >= VF_LANES)
            v = vf_load_as(x, n - VF_LANES, dtype); /* some twice */
        else
            v = vf_load_part_as(x, i, dtype, part);
        if (extreme && n < VF_LANES) /* the first one instead of 0 */
            for (int64_t k = part; k < VF_LANES; k++)
                v[k] = v[0];
        a[0] = fold_step(fold, a[0], v);
        odd[0] = extreme ? vf_fma(v, vf_set(0.0f), odd[0]) : odd[0];
    }
    if (!extreme)
        return vf_sum((a[0] + a[1]) + (a[2] + a[3]));
    v = fold_step(fold, fold_step(fold, a[0], a[1]), fold_step(fold, a[2], a[3]));
    one = fold == FOLD_MAX ? vf_max_lane(v) : -vf_max_lane(-v);
    return vf_sum(odd[0] + odd[1]) == 0.0f ? one : fold_special(x, n, dtype, one);
}

#define FOLD(name, fold)                                                                           \
    static float name(const void *x, int64_t n, int dtype)                                         \
    {                                                                                              \
        return dtype == DS_F32    ? fold_typed(x, n, fold, DS_F32)                                 \
               : dtype == DS_BF16 ? fold_typed(x, n, fold, DS_BF16)                                \
                                  : fold_typed(x, n, fold, DS_F16);                                \
    }
FOLD(fold_sum, FOLD_SUM)
FOLD(fold_squares, FOLD_SQUARES)
FOLD(fold_max, FOLD_MAX)
FOLD(fold_min, FOLD_MIN)

typedef float fold_fn(const void *x, int64_t n, int dtype);

#endif
