/* dtype.h - sizes and names of dtypes, and the bits of bf16 and f16.
 *
 * Conversions round to nearest, ties to even; NaN stays NaN (made quiet, the upper payload bits
 * kept), as the processors' own instructions do. They are branch-free, so that loops over them
 * vectorise, and written for C and CUDA alike.
 */
#ifndef DS_DTYPE_H
#define DS_DTYPE_H

#include <stdint.h>
#include <string.h>

#include "kernels/tensor.h"

#ifdef __CUDACC__
#define DS_FUNC static inline __host__ __device__
#else
#define DS_FUNC static inline __attribute__((always_inline))
#endif

static inline int64_t ds_bytes_of(int dtype)
{
    static const int8_t bytes[DS_DTYPES] = {4, 2, 2, 8, 8, 4, 1, 1};

    return bytes[dtype];
}

static inline const char *ds_name_of(int dtype)
{
    static const char *const names[DS_DTYPES] = {"f32", "bf16", "f16", "f64",
                                                 "i64", "i32",  "u8",  "bool"};

    return dtype >= 0 && dtype < DS_DTYPES ? names[dtype] : "?";
}

static inline int ds_is_float(int dtype)
{
    return dtype <= DS_F64;
}

DS_FUNC uint32_t ds_bits(float x)
{
    uint32_t u;

    memcpy(&u, &x, 4);
    return u;
}

DS_FUNC float ds_float(uint32_t u)
{
    float x;

    memcpy(&x, &u, 4);
    return x;
}

/* bf16: the upper half of an f32. */

DS_FUNC float ds_bf16_to_f32(uint16_t h)
{
    return ds_float((uint32_t)h << 16);
}

DS_FUNC uint16_t ds_f32_to_bf16(float x)
{
    uint32_t u = ds_bits(x);
    uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    uint32_t nan = u >> 16 | 0x40;

    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

/* f16: 1 sign, 5 exponent (bias 15), 10 mantissa bits. */

DS_FUNC float ds_f16_to_f32(uint16_t h)
{
    uint32_t rest = (uint32_t)(h & 0x7fff) << 13;
    /* 2^(127-15) shifts the exponent's bias, and makes subnormals normal. */
    uint32_t finite = ds_bits(ds_float(rest) * 0x1p112f);
    uint32_t special = rest | 0x7f800000 | (rest & 0x7fffff ? 0x400000 : 0);

    return ds_float((uint32_t)(h & 0x8000) << 16 | (rest >= 0x0f800000 ? special : finite));
}

DS_FUNC uint16_t ds_f32_to_f16(float x)
{
    uint32_t u = ds_bits(x), a = u & 0x7fffffff;
    uint32_t normal = (a + 0xc8000fff + (a >> 13 & 1)) >> 13; /* 0xc8000000: bias 127 to 15 */
    /* Below 2^-14 one f16 step is 2^-24, which is the step of an f32 at 0.5: the sum rounds. */
    uint32_t small = ds_bits(ds_float(a) + 0.5f) - 0x3f000000;
    uint32_t large = a > 0x7f800000 ? 0x7e00 | (a >> 13 & 0x3ff) : 0x7c00;
    uint32_t magnitude = a < 0x38800000 ? small : a < 0x47800000 ? normal : large;

    return (uint16_t)(u >> 16 & 0x8000) | (uint16_t)magnitude;
}

#endif
