/* numbers.h - what the kernels' tests have in common: random numbers, elements of any dtype as
 * double, comparing, messages.
 */
#ifndef DS_TEST_NUMBERS_H
#define DS_TEST_NUMBERS_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/backend.h"
#include "kernels/dtype.h"

static uint64_t random_state = 1;

static inline double random01(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(random_state >> 11) * 0x1p-53;
}

static inline double uniform(double low, double high)
{
    return low + (high - low) * random01();
}

static inline int64_t between(int64_t low, int64_t high)
{
    return low + (int64_t)(random01() * (double)(high - low + 1));
}

/* Half a step of rounding at 1. */
static inline double eps_of(int dtype)
{
    static const double eps[DS_DTYPES] = {0x1p-24, 0x1p-8, 0x1p-11, 0x1p-53};

    return eps[dtype];
}

static inline const ds_ops *kernels(void)
{
    const ds_backend *backend = ds_cpu_backend(NULL);

    assert_non_null(backend);
    return &backend->ops;
}

/* Element `at` of the memory behind a tensor, whatever its strides. */
static inline double get_at(const ds_tensor *t, int64_t at)
{
    switch (t->dtype) {
    case DS_F32:
        return (double)((float *)t->data)[at];
    case DS_F64:
        return ((double *)t->data)[at];
    case DS_BF16:
        return (double)ds_bf16_to_f32(((uint16_t *)t->data)[at]);
    case DS_F16:
        return (double)ds_f16_to_f32(((uint16_t *)t->data)[at]);
    case DS_I64:
        return (double)((int64_t *)t->data)[at];
    case DS_I32:
        return (double)((int32_t *)t->data)[at];
    default:
        return (double)((uint8_t *)t->data)[at];
    }
}

static inline void set_at(ds_tensor *t, int64_t at, double x)
{
    switch (t->dtype) {
    case DS_F32:
        ((float *)t->data)[at] = (float)x;
        break;
    case DS_F64:
        ((double *)t->data)[at] = x;
        break;
    case DS_BF16:
        ((uint16_t *)t->data)[at] = ds_f32_to_bf16((float)x);
        break;
    case DS_F16:
        ((uint16_t *)t->data)[at] = ds_f32_to_f16((float)x);
        break;
    case DS_I64:
        ((int64_t *)t->data)[at] = (int64_t)x;
        break;
    case DS_I32:
        ((int32_t *)t->data)[at] = (int32_t)x;
        break;
    default:
        ((uint8_t *)t->data)[at] = (uint8_t)x;
    }
}

/* Where logical element i lies in memory. */
static inline int64_t place(const ds_tensor *t, int64_t i)
{
    int64_t at = 0;

    for (int d = t->ndim - 1; d >= 0; d--) {
        at += i % t->shape[d] * t->stride[d];
        i /= t->shape[d];
    }
    return at;
}

static inline double get(const ds_tensor *t, int64_t i)
{
    return get_at(t, place(t, i));
}

static inline void set(ds_tensor *t, int64_t i, double x)
{
    set_at(t, place(t, i), x);
}

static inline void near(double got, double want, double tolerance, const char *what, int64_t i)
{
    if (!(fabs(got - want) <= tolerance) && !(isnan(got) && isnan(want)) && got != want)
        fail_msg("%s: element %lld is %.9g, not %.9g (within %.2g)", what, (long long)i, got, want,
                 tolerance);
}

static inline void fails(int rc, int code, const char *part)
{
    assert_int_equal(rc, code);
    if (!strstr(ds_error(), part))
        fail_msg("\"%s\" is not in the message \"%s\"", part, ds_error());
}

#endif
