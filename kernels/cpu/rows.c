/* rows.c - brings n elements of any dtype and stride to a dense row of f32 or f64, and back.
 *
 * Kernels compute on rows short enough for the L1 cache, so low precision costs one conversion here
 * and no second version of each kernel.
 */
#include "kernels/cpu/simd.h"

#include <math.h>

/* bf16 and f16 side by side: whole vectors, then the rest. */
#define ROW_LOAD_HALF(name, scalar)                                                                \
    static void load_##name(float *dst, const uint16_t *src, int64_t n)                            \
    {                                                                                              \
        int64_t i = 0;                                                                             \
                                                                                                   \
        for (; i + VF_LANES <= n; i += VF_LANES)                                                   \
            vf_store(dst + i, vf_load_##name(src + i));                                            \
        for (; i < n; i++)                                                                         \
            dst[i] = scalar(src[i]);                                                               \
    }
ROW_LOAD_HALF(bf16, ds_bf16_to_f32)
ROW_LOAD_HALF(f16, ds_f16_to_f32)

/* The rest goes through a vector too: the bf16 instruction treats subnormals in its own way, and an
 * element must not depend on its place. */
#define ROW_STORE_HALF(name)                                                                       \
    static void store_##name(uint16_t *dst, const float *src, int64_t n)                           \
    {                                                                                              \
        int64_t i = 0;                                                                             \
                                                                                                   \
        for (; i + VF_LANES <= n; i += VF_LANES)                                                   \
            vf_store_##name(dst + i, vf_load(src + i));                                            \
        if (i < n)                                                                                 \
            vh_store_part(dst + i, vf_to_##name(vf_load_part(src + i, n - i)), n - i);             \
    }
ROW_STORE_HALF(bf16)
ROW_STORE_HALF(f16)

static uint16_t to_bf16(float x)
{
    return vf_to_bf16(vf_set(x))[0];
}

static uint16_t to_f16(float x)
{
    return vf_to_f16(vf_set(x))[0];
}

/* Real to integer: towards zero, saturated, NaN is 0. */

static int64_t to_i64(double x)
{
    if (x != x)
        return 0;
    return x >= 0x1p63 ? INT64_MAX : x < -0x1p63 ? INT64_MIN : (int64_t)x;
}

static int32_t to_i32(double x)
{
    if (x != x)
        return 0;
    return x >= 0x1p31 ? INT32_MAX : x < -0x1p31 ? INT32_MIN : (int32_t)x;
}

static uint8_t to_u8(double x)
{
    return x >= 255 ? 255 : x > 0 ? (uint8_t)x : 0; /* NaN: 0 */
}

static uint8_t to_bool(double x)
{
    return x != 0;
}

#define SAME(x) (x)

#define LOAD(type, convert)                                                                        \
    {                                                                                              \
        const type *s = src;                                                                       \
                                                                                                   \
        if (stride == 1)                                                                           \
            for (int64_t i = 0; i < n; i++)                                                        \
                dst[i] = convert(s[i]);                                                            \
        else                                                                                       \
            for (int64_t i = 0; i < n; i++)                                                        \
                dst[i] = convert(s[i * stride]);                                                   \
        return;                                                                                    \
    }

#define STORE(type, convert)                                                                       \
    {                                                                                              \
        type *d = dst;                                                                             \
                                                                                                   \
        if (stride == 1)                                                                           \
            for (int64_t i = 0; i < n; i++)                                                        \
                d[i] = convert(src[i]);                                                            \
        else                                                                                       \
            for (int64_t i = 0; i < n; i++)                                                        \
                d[i * stride] = convert(src[i]);                                                   \
        return;                                                                                    \
    }

void ds_row_load(float *restrict dst, const void *restrict src, int dtype, int64_t n,
                 int64_t stride)
{
    switch (dtype) {
    case DS_F32:
        LOAD(float, SAME)
    case DS_BF16:
        if (stride == 1) {
            load_bf16(dst, src, n);
            return;
        }
        LOAD(uint16_t, ds_bf16_to_f32)
    case DS_F16:
        if (stride == 1) {
            load_f16(dst, src, n);
            return;
        }
        LOAD(uint16_t, ds_f16_to_f32)
    case DS_F64:
        LOAD(double, (float))
    case DS_I64:
        LOAD(int64_t, (float))
    case DS_I32:
        LOAD(int32_t, (float))
    case DS_U8:
        LOAD(uint8_t, (float))
    case DS_BOOL:
        LOAD(uint8_t, (float))
    }
}

void ds_row_store(void *restrict dst, const float *restrict src, int dtype, int64_t n,
                  int64_t stride)
{
    switch (dtype) {
    case DS_F32:
        STORE(float, SAME)
    case DS_BF16:
        if (stride == 1) {
            store_bf16(dst, src, n);
            return;
        }
        STORE(uint16_t, to_bf16)
    case DS_F16:
        if (stride == 1) {
            store_f16(dst, src, n);
            return;
        }
        STORE(uint16_t, to_f16)
    case DS_F64:
        STORE(double, (double))
    case DS_I64:
        STORE(int64_t, to_i64)
    case DS_I32:
        STORE(int32_t, to_i32)
    case DS_U8:
        STORE(uint8_t, to_u8)
    case DS_BOOL:
        STORE(uint8_t, to_bool)
    }
}

static double bf16_to_f64(uint16_t h)
{
    return (double)ds_bf16_to_f32(h);
}

static double f16_to_f64(uint16_t h)
{
    return (double)ds_f16_to_f32(h);
}

/* Through f32 it would be rounded twice: f32 keeps the place, odd marks what was cut off. */
static float to_odd(double x)
{
    float f = (float)x;
    uint32_t u = ds_bits(f);

    if ((double)f == x || x != x || u << 1 == 0xff000000u)
        return f;
    if (fabs((double)f) > fabs(x))
        u--;
    return ds_float(u | 1);
}

static uint16_t f64_to_bf16(double x)
{
    return to_bf16(to_odd(x));
}

static uint16_t f64_to_f16(double x)
{
    return to_f16(to_odd(x));
}

void ds_row_load_f64(double *restrict dst, const void *restrict src, int dtype, int64_t n,
                     int64_t stride)
{
    switch (dtype) {
    case DS_F32:
        LOAD(float, (double))
    case DS_BF16:
        LOAD(uint16_t, bf16_to_f64)
    case DS_F16:
        LOAD(uint16_t, f16_to_f64)
    case DS_F64:
        LOAD(double, SAME)
    case DS_I64:
        LOAD(int64_t, (double))
    case DS_I32:
        LOAD(int32_t, (double))
    case DS_U8:
        LOAD(uint8_t, (double))
    case DS_BOOL:
        LOAD(uint8_t, (double))
    }
}

void ds_row_store_f64(void *restrict dst, const double *restrict src, int dtype, int64_t n,
                      int64_t stride)
{
    switch (dtype) {
    case DS_F32:
        STORE(float, (float))
    case DS_BF16:
        STORE(uint16_t, f64_to_bf16)
    case DS_F16:
        STORE(uint16_t, f64_to_f16)
    case DS_F64:
        STORE(double, SAME)
    case DS_I64:
        STORE(int64_t, to_i64)
    case DS_I32:
        STORE(int32_t, to_i32)
    case DS_U8:
        STORE(uint8_t, to_u8)
    case DS_BOOL:
        STORE(uint8_t, to_bool)
    }
}

void ds_row_load_i64(int64_t *restrict dst, const void *restrict src, int dtype, int64_t n,
                     int64_t stride)
{
    switch (dtype) {
    case DS_I64:
        LOAD(int64_t, SAME)
    case DS_I32:
        LOAD(int32_t, SAME)
    default:
        LOAD(uint8_t, SAME)
    }
}

void ds_row_store_i64(void *restrict dst, const int64_t *restrict src, int dtype, int64_t n,
                      int64_t stride)
{
    switch (dtype) {
    case DS_I64:
        STORE(int64_t, SAME)
    case DS_I32:
        STORE(int32_t, (int32_t))
    default:
        STORE(uint8_t, (uint8_t))
    }
}
