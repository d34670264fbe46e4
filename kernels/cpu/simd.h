/* simd.h - vectors of f32 of the level's width, for kernels that a compiler does not vectorise
 * well.
 *
 * Made of the vector extension of gcc and clang, so +, -, *, / and comparisons are plain C;
 * intrinsics stand only where the extension has no word. Loads and stores need no alignment. Low
 * precision is widened to f32 when loaded and rounded when stored. Most loops need none of this:
 * the functions of scalar.h are branch-free and `#pragma omp simd` over a row of f32 makes vectors
 * of them.
 *
 * Last in the file: rows, which bring any dtype and stride to a dense row of f32 or f64 and back.
 */
#ifndef DS_CPU_SIMD_H
#define DS_CPU_SIMD_H

#include "kernels/cpu/level.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined __AVX512F__
#define VF_LANES 16
#elif defined __AVX2__
#define VF_LANES 8
#else
#define VF_LANES 4
#endif

typedef float vf __attribute__((vector_size(4 * VF_LANES)));
typedef int32_t vi
    __attribute__((vector_size(4 * VF_LANES))); /* also what comparing vf gives: 0, -1 */
typedef uint32_t vu __attribute__((vector_size(4 * VF_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * VF_LANES))); /* bf16 or f16 */

#define VF_FUNC static inline __attribute__((always_inline))

VF_FUNC vf vf_set(float x)
{
    return x - (vf){0};
}

VF_FUNC vf vf_load(const float *p)
{
    vf v;

    memcpy(&v, p, sizeof v);
    return v;
}

VF_FUNC void vf_store(float *p, vf v)
{
    memcpy(p, &v, sizeof v);
}

/* The first n < VF_LANES elements; the other lanes are 0. */
VF_FUNC vf vf_load_part(const float *p, int64_t n)
{
#if VF_LANES == 16
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    float lanes[VF_LANES] = {0};

    for (int64_t i = 0; i < n; i++)
        lanes[i] = p[i];
    return vf_load(lanes);
#endif
}

VF_FUNC void vf_store_part(float *p, vf v, int64_t n)
{
#if VF_LANES == 16
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v);
#else
    float lanes[VF_LANES];

    vf_store(lanes, v);
    for (int64_t i = 0; i < n; i++)
        p[i] = lanes[i];
#endif
}

/* ---- low precision */

VF_FUNC vf vf_from_bf16(vh h)
{
#if VF_LANES == 16
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

/* The bf16 instruction flushes subnormals to 0, arithmetic here keeps them: the one difference
 * between levels. */
VF_FUNC vh vf_to_bf16(vf v)
{
#ifdef __AVX512BF16__
    return (vh)_mm512_cvtneps_pbh(v);
#else
    vu u = (vu)v;
    vu nan = (vu)(v != v);
    vu rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;

    return __builtin_convertvector((nan & (u >> 16 | 0x40)) | (~nan & rounded), vh);
#endif
}

VF_FUNC vf vf_from_f16(vh h)
{
#if VF_LANES == 16
    return _mm512_cvtph_ps((__m256i)h);
#elif VF_LANES == 8
    return _mm256_cvtph_ps((__m128i)h);
#else
    vf v;

    for (int i = 0; i < VF_LANES; i++)
        v[i] = ds_f16_to_f32(h[i]);
    return v;
#endif
}

VF_FUNC vh vf_to_f16(vf v)
{
#if VF_LANES == 16
    return (vh)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif VF_LANES == 8
    return (vh)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
    vh h;

    for (int i = 0; i < VF_LANES; i++)
        h[i] = ds_f32_to_f16(v[i]);
    return h;
#endif
}

VF_FUNC vh vh_load(const uint16_t *p)
{
    vh h;

    memcpy(&h, p, sizeof h);
    return h;
}

VF_FUNC vh vh_load_part(const uint16_t *p, int64_t n)
{
#if VF_LANES == 16
    return (vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
#else
    uint16_t lanes[VF_LANES] = {0};

    for (int64_t i = 0; i < n; i++)
        lanes[i] = p[i];
    return vh_load(lanes);
#endif
}

VF_FUNC void vh_store(uint16_t *p, vh h)
{
    memcpy(p, &h, sizeof h);
}

VF_FUNC void vh_store_part(uint16_t *p, vh h, int64_t n)
{
#if VF_LANES == 16
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)h);
#else
    uint16_t lanes[VF_LANES];

    vh_store(lanes, h);
    for (int64_t i = 0; i < n; i++)
        p[i] = lanes[i];
#endif
}

VF_FUNC vf vf_load_bf16(const uint16_t *p)
{
    return vf_from_bf16(vh_load(p));
}

VF_FUNC void vf_store_bf16(uint16_t *p, vf v)
{
    vh_store(p, vf_to_bf16(v));
}

VF_FUNC vf vf_load_f16(const uint16_t *p)
{
    return vf_from_f16(vh_load(p));
}

VF_FUNC void vf_store_f16(uint16_t *p, vf v)
{
    vh_store(p, vf_to_f16(v));
}

/* Any of f32, bf16, f16: the element i of `p`. A constant dtype, after inlining, leaves no branch. */
VF_FUNC vf vf_load_as(const void *p, int64_t i, int dtype)
{
    if (dtype == DS_F32)
        return vf_load((const float *)p + i);
    return dtype == DS_BF16 ? vf_load_bf16((const uint16_t *)p + i)
                            : vf_load_f16((const uint16_t *)p + i);
}

VF_FUNC void vf_store_as(void *p, int64_t i, int dtype, vf v)
{
    if (dtype == DS_F32)
        vf_store((float *)p + i, v);
    else if (dtype == DS_BF16)
        vf_store_bf16((uint16_t *)p + i, v);
    else
        vf_store_f16((uint16_t *)p + i, v);
}

VF_FUNC vf vf_load_part_as(const void *p, int64_t i, int dtype, int64_t n)
{
    vh h;

    if (dtype == DS_F32)
        return vf_load_part((const float *)p + i, n);
    h = vh_load_part((const uint16_t *)p + i, n);
    return dtype == DS_BF16 ? vf_from_bf16(h) : vf_from_f16(h);
}

VF_FUNC void vf_store_part_as(void *p, int64_t i, int dtype, vf v, int64_t n)
{
    if (dtype == DS_F32)
        vf_store_part((float *)p + i, v, n);
    else
        vh_store_part((uint16_t *)p + i, dtype == DS_BF16 ? vf_to_bf16(v) : vf_to_f16(v), n);
}

/* ---- arithmetic */

/* a b + c, fused where the level has it. */
VF_FUNC vf vf_fma(vf a, vf b, vf c)
{
#if VF_LANES == 16
    return _mm512_fmadd_ps(a, b, c);
#elif VF_LANES == 8
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

/* a where the lane of mask is -1, b where it is 0. */
VF_FUNC vf vf_select(vi mask, vf a, vf b)
{
    return (vf)((mask & (vi)a) | (~mask & (vi)b));
}

/* Where a is NaN: b. */
VF_FUNC vf vf_max(vf a, vf b)
{
#if VF_LANES == 16
    return _mm512_max_ps(a, b);
#elif VF_LANES == 8
    return _mm256_max_ps(a, b);
#elif defined __SSE__
    return _mm_max_ps(a, b);
#else
    return vf_select(a > b, a, b);
#endif
}

VF_FUNC vf vf_min(vf a, vf b)
{
#if VF_LANES == 16
    return _mm512_min_ps(a, b);
#elif VF_LANES == 8
    return _mm256_min_ps(a, b);
#elif defined __SSE__
    return _mm_min_ps(a, b);
#else
    return vf_select(a < b, a, b);
#endif
}

VF_FUNC vf vf_sqrt(vf a)
{
#if VF_LANES == 16
    return _mm512_sqrt_ps(a);
#elif VF_LANES == 8
    return _mm256_sqrt_ps(a);
#else
    for (int i = 0; i < VF_LANES; i++)
        a[i] = __builtin_sqrtf(a[i]);
    return a;
#endif
}

/* Over the lanes, by halves: always in the same order. */
VF_FUNC float vf_sum(vf v)
{
    typedef float quarter __attribute__((vector_size(16)));
    quarter q[VF_LANES / 4];

    memcpy(q, &v, sizeof v);
#if VF_LANES == 16
    q[0] = (q[0] + q[2]) + (q[1] + q[3]);
#elif VF_LANES == 8
    q[0] = q[0] + q[1];
#endif
    return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

VF_FUNC float vf_max_lane(vf v)
{
#if VF_LANES == 16
    return _mm512_reduce_max_ps(v);
#else
    float m = v[0];

    for (int i = 1; i < VF_LANES; i++)
        m = m > v[i] ? m : v[i];
    return m;
#endif
}

/* e^x to 1 ulp, as ds_exp_f32 in scalar.h, but subnormal results are 0. 0 for -inf, inf above
 * 88.72, NaN for NaN. */
VF_FUNC vf vf_exp(vf x)
{
    const float round = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
    vf bounded = vf_min(vf_set(89.0f), vf_max(vf_set(-88.0f), x));
    vf t = vf_fma(bounded, vf_set(1.44269504f), vf_set(round));
    vf n = t - round;
    vf r = vf_fma(n, vf_set(-0x1.62e4p-1f), bounded);
    vf p, y;
    vi scaled;

    r = vf_fma(n, vf_set(-0x1.7f7d1cp-20f), r);
    p = vf_fma(r, vf_set(0.00139506029742f), vf_set(0.00836895350227f));
    p = vf_fma(p, r, vf_set(0.0416662041279f));
    p = vf_fma(p, r, vf_set(0.166665183061f));
    p = vf_fma(p, r, vf_set(0.50000000957f));
    y = vf_fma(p * r, r, r) + 1.0f;
    scaled = (vi)y + ((vi)t << 23); /* y 2^n, by its exponent's bits */
    scaled &= x > vf_set(-87.33654f);
    return vf_select(x <= vf_set(88.72283f), (vf)scaled, x + vf_set(__builtin_inff()));
}

/* ---- rows (rows.c): n elements of `dtype`, `stride` elements apart, to a dense row and back. f32
 * rows take any dtype but i64, i32 and f64 lose digits in them; f64 rows lose none of i64 below
 * 2^53. Rounding to integers is towards zero. */

#define ds_row_load DS_CPU(row_load)
#define ds_row_store DS_CPU(row_store)
#define ds_row_load_f64 DS_CPU(row_load_f64)
#define ds_row_store_f64 DS_CPU(row_store_f64)
#define ds_row_load_i64 DS_CPU(row_load_i64)
#define ds_row_store_i64 DS_CPU(row_store_i64)

void ds_row_load(float *dst, const void *src, int dtype, int64_t n, int64_t stride);
void ds_row_store(void *dst, const float *src, int dtype, int64_t n, int64_t stride);
void ds_row_load_f64(double *dst, const void *src, int dtype, int64_t n, int64_t stride);
void ds_row_store_f64(void *dst, const double *src, int dtype, int64_t n, int64_t stride);

/* i64 rows, for integer dtypes and bool; storing wraps around. */
void ds_row_load_i64(int64_t *dst, const void *src, int dtype, int64_t n, int64_t stride);
void ds_row_store_i64(void *dst, const int64_t *src, int dtype, int64_t n, int64_t stride);

#endif
