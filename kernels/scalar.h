/* scalar.h - the arithmetic of every elementwise operation and its derivative, once.
 *
 * The second half of this file, "operations", is written for a type `real` and compiled twice: the
 * file includes itself with real = float and real = double, and R(gelu) becomes ds_gelu_f32 and
 * ds_gelu_f64. That keeps one text which a debugger can step through, where macros holding function
 * bodies would not. Only the first half, "elementary functions", differs between the two: f64 is
 * for gradient checks and calls libm; f32 is for speed: branch-free polynomials, so that a loop
 * over a row becomes vector code, and a CUDA kernel calls the same functions.
 *
 * For an operation `name` there is R(name)(x), and R(name_slope)(s): the derivative as a function
 * of x or of y, as ops.def says under `saved`. To add one: two functions below, one line in
 * ops.def.
 *
 * Polynomials are minimax fits (Remez exchange on the relative error); each states its range and
 * its error. f32 results are within 3 ulp unless a comment says otherwise.
 */
#ifndef DS_SCALAR_H
#define DS_SCALAR_H

#include <math.h>

#include "kernels/dtype.h"

/* a b + c, fused where that is one instruction: levels round differently here and only here. */
#if defined __CUDACC__ || defined __FMA__ || defined __FP_FAST_FMAF
#define DS_FMA(a, b, c) fmaf(a, b, c)
#else
#define DS_FMA(a, b, c) ((a) * (b) + (c))
#endif

/* ---- elementary functions, f64 and those that are one instruction */

#define DS_WRAP(name, f32, f64)                                                                    \
    DS_FUNC float ds_##name##_f32(float x)                                                         \
    {                                                                                              \
        return f32(x);                                                                             \
    }                                                                                              \
    DS_FUNC double ds_##name##_f64(double x)                                                       \
    {                                                                                              \
        return f64(x);                                                                             \
    }
DS_WRAP(abs, fabsf, fabs)
DS_WRAP(sqrt, sqrtf, sqrt)
DS_WRAP(floor, floorf, floor)
DS_WRAP(ceil, ceilf, ceil)
DS_WRAP(round, rintf, rint)
#undef DS_WRAP

#define DS_WRAP(name)                                                                              \
    DS_FUNC double ds_##name##_f64(double x)                                                       \
    {                                                                                              \
        return name(x);                                                                            \
    }
DS_WRAP(exp)
DS_WRAP(log)
DS_WRAP(log1p)
DS_WRAP(tanh)
DS_WRAP(erf)
DS_WRAP(sin)
DS_WRAP(cos)
#undef DS_WRAP

DS_FUNC double ds_pow_f64(double a, double b)
{
    return pow(a, b);
}

/* ---- elementary functions, f32 */

/* x = n ln 2 + r with |r| ≤ ln 2 / 2: e^r (1 + r + r² p(r), relative error 2^-28), and what to
 * shift by 23 bits for 2^n. For x from -104 to 89. */
DS_FUNC float ds_exp_parts_f32(uint32_t *exponent, float x)
{
    const float round = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
    float t = DS_FMA(x, 1.44269504f, round), n = t - round;
    float r = DS_FMA(n, -0x1.7f7d1cp-20f, DS_FMA(n, -0x1.62e4p-1f, x)); /* ln 2 in two parts */
    float p = DS_FMA(r, 0.00139506029742f, 0.00836895350227f);

    p = DS_FMA(p, r, 0.0416662041279f);
    p = DS_FMA(p, r, 0.166665183061f);
    p = DS_FMA(p, r, 0.50000000957f);
    *exponent = ds_bits(t) - 0x4b400000u;
    return DS_FMA(p * r, r, r) + 1.0f;
}

DS_FUNC float ds_exp_f32(float x)
{
    uint32_t exponent;
    float low = x < -104.0f ? -104.0f : x;
    float p = ds_exp_parts_f32(&exponent, low > 89.0f ? 89.0f : low);
    int32_t n = (int32_t)exponent, half = n >> 1;

    /* 2^n in two factors: n reaches 128, and -150 where results are subnormal. */
    return p * ds_float((uint32_t)(half + 127) << 23) * ds_float((uint32_t)(n - half + 127) << 23);
}

/* e^-a for a ≥ 0, in fewer steps. Subnormal results are 0. */
DS_FUNC float ds_exp_minus_f32(float a)
{
    uint32_t exponent;
    float p = ds_exp_parts_f32(&exponent, a > 87.3365f ? -87.3365f : -a);
    float y = ds_float(ds_bits(p) + (exponent << 23));

    return a > 87.3365f ? 0.0f : a == a ? y : a;
}

DS_FUNC double ds_exp_minus_f64(double a)
{
    return exp(-a);
}

/* Horner's scheme over a fused or plain multiply-add F: philox.h needs the latter, for equal bits
 * everywhere. log: (log(1 + f) - f + f²/2) / f³ for 1 + f in [√½, √2), error 2^-30 of the whole;
 * sin: (sin r - r) / r³ and cos: (cos r - 1 + r²/2) / r⁴ as functions of z = r² for |r| ≤ π/4,
 * errors 2^-28 and 2^-33 of the whole. */
#define DS_POLY_LOG(F, f)                                                                          \
    F(F(F(F(F(F(F(F(0.06747724458f, f, -0.1167750954f), f, 0.1188869616f), f, -0.124053411f), f,   \
              0.142194533f),                                                                       \
            f, -0.1666800514f),                                                                    \
          f, 0.2000212344f),                                                                       \
        f, -0.2500000951f),                                                                        \
      f, 0.3333331254f)
#define DS_POLY_SIN(F, z) F(F(-0.0001951697756f, z, 0.008332175847f), z, -0.1666665491f)
#define DS_POLY_COS(F, z) F(F(2.443809102e-5f, z, -0.001388736449f), z, 0.04166664681f)

/* x = 2^e (1 + f) */
DS_FUNC float ds_log_f32(float x)
{
    int subnormal = x < 0x1p-126f;
    uint32_t u = ds_bits(subnormal ? x * 0x1p23f : x), from_half = u - 0x3f3504f3u; /* √½ */
    float f = ds_float((from_half & 0x7fffff) + 0x3f3504f3u) - 1.0f, ff = f * f;
    float e = (float)((int32_t)from_half >> 23) - (subnormal ? 23.0f : 0.0f);
    float y = DS_FMA(e, 0x1.7f7d1cp-20f, f * ff * DS_POLY_LOG(DS_FMA, f)); /* ln 2 in two parts */

    y = DS_FMA(ff, -0.5f, y);
    y = DS_FMA(e, 0x1.62e4p-1f, f + y);
    y = x < INFINITY ? y : x; /* inf, NaN */
    return x > 0.0f || x != x ? y : x == 0.0f ? -INFINITY : NAN;
}

/* log u for the rounded u = 1 + x, and the slope 1 / u times what rounding lost. */
DS_FUNC float ds_log1p_f32(float x)
{
    float u = 1.0f + x, lost = (x - (u - 1.0f)) / u;

    return ds_log_f32(u) + (u > 0.0f && u < INFINITY ? lost : 0.0f);
}

/* (tanh(x) / x - 1) / x² for |x| < 0.55: relative error of the whole 2^-30. */
DS_FUNC float ds_tanh_f32(float x)
{
    float a = fabsf(x), z = x * x, e = ds_exp_minus_f32(2.0f * a), large = (1.0f - e) / (1.0f + e);
    float p = DS_FMA(z, -0.006274239656f, 0.0210716791f);

    p = DS_FMA(p, z, -0.05385230991f);
    p = DS_FMA(p, z, 0.1333258614f);
    p = DS_FMA(p, z, -0.3333331756f);
    return a < 0.55f ? DS_FMA(p * z, x, x) : copysignf(large, x);
}

/* The normal distribution beyond a ≥ 0: Φ(-a) = exp(-a²/2) t p(t) with t = 1 / (1 + 0.26 a).
 * p: relative error 2^-25 up to a = 14, where Φ(-a) leaves f32. */
DS_FUNC float ds_tail_ratio_f32(float a)
{
    float t = 1.0f / DS_FMA(a, 0.26f, 1.0f);
    float p = DS_FMA(t, 0.03050479609f, -0.1528284337f);

    p = DS_FMA(p, t, 0.2514905652f);
    p = DS_FMA(p, t, -0.1509482265f);
    p = DS_FMA(p, t, 0.1609474044f);
    p = DS_FMA(p, t, 0.0510278521f);
    p = DS_FMA(p, t, 0.1030302151f);
    p = DS_FMA(p, t, 0.1030167553f);
    return t * DS_FMA(p, t, 0.1037590596f);
}

/* erf(x) / x for |x| < 1: relative error 2^-29; beyond: 1 - 2 Φ(-√2 x). */
DS_FUNC float ds_erf_f32(float x)
{
    float a = fabsf(x), z = x * x;
    float large = 1.0f - 2.0f * ds_exp_minus_f32(z) * ds_tail_ratio_f32(1.41421356f * a);
    float p = DS_FMA(z, 7.853861089e-5f, -0.0008010193534f);

    p = DS_FMA(p, z, 0.005188327674f);
    p = DS_FMA(p, z, -0.02685381193f);
    p = DS_FMA(p, z, 0.1128358515f);
    p = DS_FMA(p, z, -0.3761262582f);
    p = DS_FMA(p, z, 1.128379166f);
    return a < 1.0f ? p * x : copysignf(large, x);
}

/* sin(x + quarters π/2). The reduction to |r| ≤ π/4 is in f64, with π/2 in two parts, the first of
 * 33 bits: n times it is exact up to |x| = 2^20; beyond, the absolute error grows as |x| 2^-53, and
 * above 2^50 only the range [-1, 1] is right. */
DS_FUNC float ds_sin_quarter_f32(double x, uint32_t quarters)
{
    const double round = 0x1.8p52;
    double t = x * 0.63661977236758134308 + round, n = t - round;
    double rest = x - n * 0x1.921fb544p0 - n * 0x1.0b4611a626331p-34;
    double above = rest < -0.8 ? -0.8 : rest;
    float r = (float)(above > 0.8 ? 0.8 : above), z = r * r, s, c;
    uint64_t u;
    uint32_t q;

    memcpy(&u, &t, 8);
    q = (uint32_t)u + quarters;
    s = DS_FMA(DS_POLY_SIN(DS_FMA, z) * z, r, r);
    c = DS_FMA(DS_POLY_COS(DS_FMA, z) * z, z, DS_FMA(z, -0.5f, 1.0f));
    return ds_float(ds_bits(q & 1 ? c : s) ^ (q & 2) << 30);
}

DS_FUNC float ds_sin_f32(float x)
{
    return ds_sin_quarter_f32((double)x, 0);
}

DS_FUNC float ds_cos_f32(float x)
{
    return ds_sin_quarter_f32((double)x, 1);
}

/* |a|^b = exp(b log |a|) in f64: the log's error is multiplied by up to 104. With a = 2^e m, m in
 * [√½, √2) and s = (m - 1) / (m + 1): log m = 2 s + s³ p(s²), error 2^-44; e^r as above, 2^-40. */
DS_FUNC double ds_pow_abs_f32(double a, double b)
{
    const double round = 0x1.8p52;
    uint64_t u, from_half;
    double m, e, s, z, p, x, t, r;

    memcpy(&u, &a, 8);
    from_half = u - 0x3fe6a09e667f3bcdu;
    u = (from_half & 0xfffffffffffffu) + 0x3fe6a09e667f3bcdu;
    memcpy(&m, &u, 8);
    e = (double)((int32_t)(from_half >> 32) >> 20);
    s = (m - 1) / (m + 1);
    z = s * s;
    p = ((((0.195855279990040531 * z + 0.22176099132291875) * z + 0.285721111470109975) * z +
          0.399999956046457927) *
             z +
         0.66666666675846458) *
        z;
    x = e * 0.69314718055994530942 + (p * s + 2 * s);
    x = a == 0 ? -INFINITY : a < INFINITY ? x : a;
    x *= b;
    x = x < -110 ? -110 : x;
    x = x > 90 ? 90 : x;
    t = x * 1.44269504088896340736 + round;
    r = x - (t - round) * 0.69314718055994530942;
    p = (((((0.0000248877720746022927 * r + 0.000199093689918231638) * r + 0.00138887960774218329) *
               r +
           0.00833328107897414498) *
              r +
          0.0416666670563694649) *
             r +
         0.166666667872921934) *
            r +
        0.499999999995159602;
    p = p * r * r + r + 1;
    memcpy(&u, &t, 8);
    u = (u + 1023) << 52;
    memcpy(&m, &u, 8);
    return p * m;
}

DS_FUNC float ds_pow_f32(float a, float b)
{
    float half = b * 0.5f, y = (float)ds_pow_abs_f32((double)fabsf(a), (double)b);
    int whole = b == floorf(b), odd = whole & (half != floorf(half));

    y = fabsf(a) == 1.0f && b == b ? 1.0f : y;
    y = a < 0.0f && a > -INFINITY && !whole ? NAN : y;
    y = odd ? copysignf(y, a) : y;
    return b == 0.0f || a == 1.0f ? 1.0f : y;
}

/* Φ(-a) and the density φ(a) for a ≥ 0, from one exp. Rounding a² makes an error of a²/2 ulp. */
DS_FUNC float ds_tail_f32(float *density, float a)
{
    float e = ds_exp_minus_f32(0.5f * a * a);

    *density = 0.398942280f * e;
    return e * ds_tail_ratio_f32(a);
}

DS_FUNC double ds_tail_f64(double *density, double a)
{
    *density = 0.39894228040143267794 * exp(-0.5 * a * a);
    return 0.5 * erfc(a * 0.70710678118654752440);
}

#define real float
#define R(name) ds_##name##_f32
#include "kernels/scalar.h"
#undef real
#undef R
#define real double
#define R(name) ds_##name##_f64
#include "kernels/scalar.h"
#undef real
#undef R

/* ---- comparisons, of any type */

#define ds_eq(a, b) ((a) == (b))
#define ds_ne(a, b) ((a) != (b))
#define ds_lt(a, b) ((a) < (b))
#define ds_le(a, b) ((a) <= (b))
#define ds_gt(a, b) ((a) > (b))
#define ds_ge(a, b) ((a) >= (b))

/* ---- operations on integers: they wrap around */

#define DS_INTEGER(type, wide, suffix)                                                             \
    DS_FUNC type ds_add_##suffix(type a, type b)                                                   \
    {                                                                                              \
        return (type)((wide)a + (wide)b);                                                          \
    }                                                                                              \
    DS_FUNC type ds_sub_##suffix(type a, type b)                                                   \
    {                                                                                              \
        return (type)((wide)a - (wide)b);                                                          \
    }                                                                                              \
    DS_FUNC type ds_mul_##suffix(type a, type b)                                                   \
    {                                                                                              \
        return (type)((wide)a * (wide)b);                                                          \
    }                                                                                              \
    DS_FUNC type ds_maximum_##suffix(type a, type b)                                               \
    {                                                                                              \
        return a > b ? a : b;                                                                      \
    }                                                                                              \
    DS_FUNC type ds_minimum_##suffix(type a, type b)                                               \
    {                                                                                              \
        return a < b ? a : b;                                                                      \
    }                                                                                              \
    DS_FUNC type ds_neg_##suffix(type a)                                                           \
    {                                                                                              \
        return (type)(0 - (wide)a);                                                                \
    }                                                                                              \
    DS_FUNC type ds_abs_##suffix(type a)                                                           \
    {                                                                                              \
        return a > 0 ? a : (type)(0 - (wide)a);                                                    \
    }                                                                                              \
    DS_FUNC type ds_sign_##suffix(type a)                                                          \
    {                                                                                              \
        return (type)(a == 0 ? 0 : a > 0 ? 1 : -1);                                                \
    }                                                                                              \
    DS_FUNC type ds_square_##suffix(type a)                                                        \
    {                                                                                              \
        return (type)((wide)a * (wide)a);                                                          \
    }
DS_INTEGER(int64_t, uint64_t, i64)
DS_INTEGER(int32_t, uint32_t, i32)
DS_INTEGER(uint8_t, uint32_t, u8)
#undef DS_INTEGER

#endif

/* ==== operations: compiled for real = float and real = double ==== */
#ifdef real

/* ---- two inputs */

DS_FUNC real R(add)(real a, real b)
{
    return a + b;
}

DS_FUNC real R(sub)(real a, real b)
{
    return a - b;
}

DS_FUNC real R(mul)(real a, real b)
{
    return a * b;
}

DS_FUNC real R(div)(real a, real b)
{
    return a / b;
}

/* NaN in either gives NaN. */
DS_FUNC real R(maximum)(real a, real b)
{
    return ((a > b) | (a != a)) ? a : b;
}

DS_FUNC real R(minimum)(real a, real b)
{
    return ((a < b) | (a != a)) ? a : b;
}

/* ---- one input: the value, and the slope as a function of x or y */

DS_FUNC real R(neg)(real x)
{
    return -x;
}

DS_FUNC real R(neg_slope)(real x)
{
    (void)x;
    return -1;
}

DS_FUNC real R(sign)(real x)
{
    real s = x > 0 ? (real)1 : (real)-1;

    return ((x == 0) | (x != x)) ? x : s;
}

DS_FUNC real R(abs_slope)(real x)
{
    return R(sign)(x);
}

/* Steps: flat wherever they have a slope. */
DS_FUNC real R(sign_slope)(real x)
{
    (void)x;
    return 0;
}

DS_FUNC real R(floor_slope)(real x)
{
    (void)x;
    return 0;
}

DS_FUNC real R(ceil_slope)(real x)
{
    (void)x;
    return 0;
}

DS_FUNC real R(round_slope)(real x)
{
    (void)x;
    return 0;
}

DS_FUNC real R(square)(real x)
{
    return x * x;
}

DS_FUNC real R(square_slope)(real x)
{
    return 2 * x;
}

DS_FUNC real R(sqrt_slope)(real y)
{
    return (real)0.5 / y;
}

DS_FUNC real R(rsqrt)(real x)
{
    return 1 / R(sqrt)(x);
}

DS_FUNC real R(rsqrt_slope)(real y)
{
    return (real)-0.5 * y * y * y;
}

DS_FUNC real R(reciprocal)(real x)
{
    return 1 / x;
}

DS_FUNC real R(reciprocal_slope)(real y)
{
    return -y * y;
}

DS_FUNC real R(exp_slope)(real y)
{
    return y;
}

DS_FUNC real R(log_slope)(real x)
{
    return 1 / x;
}

DS_FUNC real R(log1p_slope)(real x)
{
    return 1 / (1 + x);
}

DS_FUNC real R(sin_slope)(real x)
{
    return R(cos)(x);
}

DS_FUNC real R(cos_slope)(real x)
{
    return -R(sin)(x);
}

DS_FUNC real R(tanh_slope)(real y)
{
    return 1 - y * y;
}

/* By e^-|x|, which cannot overflow; small results keep their digits. */
DS_FUNC real R(sigmoid)(real x)
{
    real e = R(exp_minus)(R(abs)(x)), d = 1 / (1 + e);

    return x < 0 ? e * d : d;
}

DS_FUNC real R(sigmoid_slope)(real y)
{
    return y * (1 - y);
}

DS_FUNC real R(relu)(real x)
{
    return x < 0 ? 0 : x;
}

DS_FUNC real R(relu_slope)(real y)
{
    return y > 0 ? (real)1 : (real)0;
}

/* x Φ(x) and its derivative Φ(x) + x φ(x), from one exp. */
DS_FUNC real R(gelu_both)(real *slope, real x)
{
    real density, tail = R(tail)(&density, R(abs)(x));
    real below = x < 0 ? tail : 1 - tail;

    *slope = below + x * density;
    return x * below;
}

DS_FUNC real R(gelu)(real x)
{
    real slope;

    return R(gelu_both)(&slope, x);
}

DS_FUNC real R(gelu_slope)(real x)
{
    real slope;

    R(gelu_both)(&slope, x);
    return slope;
}

/* ½ x (1 + tanh u) = x σ(2u) with u = √(2/π) (x + 0.044715 x³); the derivative is σ + x σ (1 - σ)
 * 2u'. */
DS_FUNC real R(gelu_tanh_both)(real *slope, real x)
{
    const real twice = (real)1.59576912160573071176, cubic = (real)0.044715;
    real z = cubic * x * x;
    real s = R(sigmoid)(twice * x * (1 + z));

    *slope = s + x * s * (1 - s) * twice * (1 + 3 * z);
    return x * s;
}

DS_FUNC real R(gelu_tanh)(real x)
{
    real slope;

    return R(gelu_tanh_both)(&slope, x);
}

DS_FUNC real R(gelu_tanh_slope)(real x)
{
    real slope;

    R(gelu_tanh_both)(&slope, x);
    return slope;
}

DS_FUNC real R(silu_both)(real *slope, real x)
{
    real s = R(sigmoid)(x);

    *slope = s * (1 + x * (1 - s));
    return x * s;
}

DS_FUNC real R(silu)(real x)
{
    real slope;

    return R(silu_both)(&slope, x);
}

DS_FUNC real R(silu_slope)(real x)
{
    real slope;

    R(silu_both)(&slope, x);
    return slope;
}

/* log(1 + e^x) */
DS_FUNC real R(softplus)(real x)
{
    return R(relu)(x) + R(log1p)(R(exp_minus)(R(abs)(x)));
}

DS_FUNC real R(softplus_slope)(real x)
{
    return R(sigmoid)(x);
}

DS_FUNC real R(erf_slope)(real x)
{
    return (real)1.12837916709551257390 * R(exp_minus)(x * x);
}

#endif
