/* elementwise.c - every elementwise kernel: loops over rows, made from ops.def and scalar.h.
 *
 * A body is a loop over dense rows of one type, which the compiler vectorises; walk.c brings any
 * shapes, strides and low precision to it. A kernel is then a table of bodies by dtype.
 */
#include "kernels/cpu/walk.h"

#include <math.h>

#include "kernels/scalar.h"

/* What a body is like: an addition or so; one that takes numbers for operands (BODY2); a
 * polynomial, which takes about eight times as long. */
enum cost { CHEAP, BROADCASTS, COSTLY };

/* By the common dtype of the operands; NULL: not for this one. */
typedef walk_body *bodies[DS_DTYPES];

#define FLOATS(name)                                                                               \
    [DS_F32] = name##_f32, [DS_BF16] = name##_f32, [DS_F16] = name##_f32, [DS_F64] = name##_f64
#define INTEGERS(name) [DS_I64] = name##_i64, [DS_I32] = name##_i32, [DS_U8] = name##_u8

#ifdef __clang__
#pragma clang diagnostic ignored "-Wpass-failed" /* f64 bodies call libm and stay scalar */
#endif

/* A body: y[i] = expression of a[i], b[i] and the scalars s0, s1. */
#define BODY(name, Y, A, B, expression)                                                            \
    static void name(int64_t n, void *const *p, const double *s, unsigned ones)                    \
    {                                                                                              \
        Y *y = p[0];                                                                               \
        const A *a = p[1];                                                                         \
        const B *b = p[2];                                                                         \
        const double s0 = s[0], s1 = s[1];                                                         \
                                                                                                   \
        (void)b, (void)s0, (void)s1, (void)ones;                                                   \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = expression;                     \
    }

/* y[i] = f(a[i], b[i]), where either may be one number for all. */
#define BODY2(name, Y, X, f)                                                                       \
    static void name(int64_t n, void *const *p, const double *s, unsigned ones)                    \
    {                                                                                              \
        Y *y = p[0];                                                                               \
        const X *a = p[1], *b = p[2], a0 = *a, b0 = *b;                                            \
                                                                                                   \
        (void)s;                                                                                   \
        if ((ones & 6) == 6) {                                                                     \
            for (int64_t i = 0; i < n; i++)                                                        \
                y[i] = f(a0, b0);                                                                  \
        } else if (ones & 4) {                                                                     \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = f(a[i], b0);                \
        } else if (ones & 2) {                                                                     \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = f(a0, b[i]);                \
        } else {                                                                                   \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = f(a[i], b[i]);              \
        }                                                                                          \
    }

/* ---- running a table of bodies */

/* `kinds`: as ds_check_kinds() takes them. */
static int elementwise(const char *name, const bodies by_dtype, const char *kinds, int count,
                       const ds_tensor *const *t, const double *scalars, enum cost cost)
{
    const char *first = strrchr(kinds, 'x'); /* the last of them is an input */
    int dtype = first ? t[first - kinds]->dtype : DS_BOOL;
    walk w;

    DS_TRY(ds_check_kinds(name, kinds, count, t));
    if (!by_dtype[dtype])
        return ds_fail(DS_EINVAL, "%s: not for %s%s", name, ds_name_of(dtype),
                       ds_is_float(dtype) ? "" : "; use :float() first");
    DS_TRY(DS_CPU(walk_start)(&w, name, count, t, WALK_ANY));
    w.ones = cost == BROADCASTS;
    DS_CPU(walk_run)(&w, by_dtype[dtype], scalars, cost == COSTLY ? 8 : 1);
    return 0;
}

/* y = x ∘ value, or value ∘ x; `result` is the letter of y. */
static int with_number(const char *name, const bodies by_dtype, char result, ds_tensor *y,
                       const ds_tensor *x, double value, int flip)
{
    number s;
    int rc = DS_CPU(number_start)(&s, name, value, x->dtype, 0);
    const ds_tensor *t[] = {y, flip ? &s.t : x, flip ? x : &s.t};
    const char kinds[] = {result, flip ? '.' : 'x', flip ? 'x' : '.', 0};

    return rc < 0 ? rc : elementwise(name, by_dtype, kinds, 3, t, NULL, BROADCASTS);
}

/* ---- one input, and its backward: dx = dy slope(s) */

#define DS_UNARY(name, saved)                                                                      \
    BODY(name##_f32, float, float, float, ds_##name##_f32(a[i]))                                   \
    BODY(name##_f64, double, double, double, ds_##name##_f64(a[i]))                                \
    BODY(name##_backward_f32, float, float, float, a[i] * ds_##name##_slope_f32(b[i]))             \
    BODY(name##_backward_f64, double, double, double, a[i] * ds_##name##_slope_f64(b[i]))
#include "kernels/ops.def"

#define INTEGER(name)                                                                              \
    BODY(name##_i64, int64_t, int64_t, int64_t, ds_##name##_i64(a[i]))                             \
    BODY(name##_i32, int32_t, int32_t, int32_t, ds_##name##_i32(a[i]))                             \
    BODY(name##_u8, uint8_t, uint8_t, uint8_t, ds_##name##_u8(a[i]))
INTEGER(neg)
INTEGER(abs)
INTEGER(sign)
INTEGER(square)
#undef INTEGER

/* The few operations that integers have, unary here, binary below. */
static const struct integer {
    const char *name;
    bodies by_dtype;
} integer_unary[] = {{"neg", {INTEGERS(neg)}},
                     {"abs", {INTEGERS(abs)}},
                     {"sign", {INTEGERS(sign)}},
                     {"square", {INTEGERS(square)}},
                     {NULL, {NULL}}};

/* What serves `dtype`: the integers' bodies if it is one and they exist, else those of floats. */
static walk_body *const *choose(const struct integer *integers, const char *name,
                                const bodies floats, int dtype)
{
    for (int i = 0; !ds_is_float(dtype) && integers[i].name; i++)
        if (strcmp(integers[i].name, name) == 0)
            return integers[i].by_dtype;
    return floats;
}

#define DS_UNARY(name, saved)                                                                      \
    int DS_CPU(name)(ds_tensor * y, const ds_tensor *x)                                            \
    {                                                                                              \
        static const bodies floats = {FLOATS(name)};                                               \
                                                                                                   \
        return elementwise(#name, choose(integer_unary, #name, floats, x->dtype), "xx", 2,         \
                           (const ds_tensor *[]){y, x}, NULL, COSTLY);                             \
    }                                                                                              \
    int DS_CPU(name##_backward)(ds_tensor * dx, const ds_tensor *dy, const ds_tensor *s)           \
    {                                                                                              \
        static const bodies floats = {FLOATS(name##_backward)};                                    \
                                                                                                   \
        return elementwise(#name "_backward", floats, "xxx", 3, (const ds_tensor *[]){dx, dy, s},  \
                           NULL, COSTLY);                                                          \
    }
#include "kernels/ops.def"

/* ---- two inputs */

#define DS_BINARY(name)                                                                            \
    BODY2(name##_f32, float, float, ds_##name##_f32)                                               \
    BODY2(name##_f64, double, double, ds_##name##_f64)
#include "kernels/ops.def"

#define INTEGER(name)                                                                              \
    BODY2(name##_i64, int64_t, int64_t, ds_##name##_i64)                                           \
    BODY2(name##_i32, int32_t, int32_t, ds_##name##_i32)                                           \
    BODY2(name##_u8, uint8_t, uint8_t, ds_##name##_u8)
INTEGER(add)
INTEGER(sub)
INTEGER(mul)
INTEGER(maximum)
INTEGER(minimum)
#undef INTEGER

static const struct integer integer_binary[] = {
    {"add", {INTEGERS(add)}},         {"sub", {INTEGERS(sub)}},         {"mul", {INTEGERS(mul)}},
    {"maximum", {INTEGERS(maximum)}}, {"minimum", {INTEGERS(minimum)}}, {NULL, {NULL}}};

/* Powers that are something simpler. */
static int easy_power(ds_tensor *y, const ds_tensor *x, double s, int flip)
{
    static const struct {
        double power;
        int (*kernel)(ds_tensor *, const ds_tensor *);
    } easy[] = {
        {2, DS_CPU(square)}, {0.5, DS_CPU(sqrt)}, {-0.5, DS_CPU(rsqrt)}, {-1, DS_CPU(reciprocal)}};

    for (size_t i = 0; !flip && ds_is_float(x->dtype) && i < sizeof easy / sizeof *easy; i++)
        if (easy[i].power == s)
            return easy[i].kernel(y, x);
    return 1;
}

#define DS_BINARY(name)                                                                            \
    int DS_CPU(name)(ds_tensor * y, const ds_tensor *a, const ds_tensor *b)                        \
    {                                                                                              \
        static const bodies floats = {FLOATS(name)};                                               \
                                                                                                   \
        return elementwise(#name, choose(integer_binary, #name, floats, a->dtype), "xxx", 3,       \
                           (const ds_tensor *[]){y, a, b}, NULL, BROADCASTS);                      \
    }                                                                                              \
    int DS_CPU(name##_scalar)(ds_tensor * y, const ds_tensor *x, double s, int flip)               \
    {                                                                                              \
        static const bodies floats = {FLOATS(name)};                                               \
        int rc = strcmp(#name, "pow") == 0 ? easy_power(y, x, s, flip) : 1;                        \
                                                                                                   \
        return rc <= 0 ? rc                                                                        \
                       : with_number(#name, choose(integer_binary, #name, floats, x->dtype), 'x',  \
                                     y, x, s, flip);                                               \
    }
#include "kernels/ops.def"

/* ---- comparisons: bool from any dtype */

#define DS_COMPARE(name)                                                                           \
    BODY2(name##_f32, uint8_t, float, ds_##name)                                                   \
    BODY2(name##_f64, uint8_t, double, ds_##name)                                                  \
    BODY2(name##_i64, uint8_t, int64_t, ds_##name)                                                 \
    BODY2(name##_i32, uint8_t, int32_t, ds_##name)                                                 \
    BODY2(name##_u8, uint8_t, uint8_t, ds_##name)                                                  \
    static const bodies name##_bodies = {FLOATS(name), INTEGERS(name), [DS_BOOL] = name##_u8};     \
                                                                                                   \
    int DS_CPU(name)(ds_tensor * y, const ds_tensor *a, const ds_tensor *b)                        \
    {                                                                                              \
        return elementwise(#name, name##_bodies, "bxx", 3, (const ds_tensor *[]){y, a, b}, NULL,   \
                           BROADCASTS);                                                            \
    }                                                                                              \
    int DS_CPU(name##_scalar)(ds_tensor * y, const ds_tensor *x, double s, int flip)               \
    {                                                                                              \
        return with_number(#name, name##_bodies, 'b', y, x, s, flip);                              \
    }
#include "kernels/ops.def"

/* ---- the rest */

BODY(add_scaled_f32, float, float, float, a[i] + (float)s0 * b[i])
BODY(add_scaled_f64, double, double, double, a[i] + s0 * b[i])

int DS_CPU(add_scaled)(ds_tensor *y, const ds_tensor *a, const ds_tensor *b, double alpha)
{
    static const bodies by_dtype = {FLOATS(add_scaled)};

    if (!ds_is_float(a->dtype) && alpha == 1)
        return DS_CPU(add)(y, a, b);
    if (!ds_is_float(a->dtype) && alpha == -1)
        return DS_CPU(sub)(y, a, b);
    return elementwise("add_scaled", by_dtype, "xxx", 3, (const ds_tensor *[]){y, a, b},
                       (double[]){alpha, 0}, CHEAP);
}

/* Bounds are doubles; an integer is replaced only by one that fits (clamp sees to that). */
#define CLAMP(type, low, high) (a[i] < (low) ? (type)(low) : a[i] > (high) ? (type)(high) : a[i])

BODY(clamp_f32, float, float, float, CLAMP(float, (float)s0, (float)s1))
BODY(clamp_f64, double, double, double, CLAMP(double, s0, s1))
BODY(clamp_i64, int64_t, int64_t, int64_t, CLAMP(int64_t, (int64_t)s0, (int64_t)s1))
BODY(clamp_i32, int32_t, int32_t, int32_t, CLAMP(int32_t, (int32_t)s0, (int32_t)s1))
BODY(clamp_u8, uint8_t, uint8_t, uint8_t, CLAMP(uint8_t, (uint8_t)s0, (uint8_t)s1))
BODY(clamp_backward_f32, float, float, float,
     ((b[i] >= (float)s0) & (b[i] <= (float)s1)) ? a[i] : 0.0f)
BODY(clamp_backward_f64, double, double, double, ((b[i] >= s0) & (b[i] <= s1)) ? a[i] : 0.0)

int DS_CPU(clamp)(ds_tensor *y, const ds_tensor *x, double low, double high)
{
    static const bodies by_dtype = {FLOATS(clamp), INTEGERS(clamp)};
    double bounds[] = {low, high};

    DS_TRY(ds_check_clamp(low, high));
    for (int i = 0; i < 2 && !ds_is_float(x->dtype); i++)
        bounds[i] = ds_clamp_bound(bounds[i], i == 0, x->dtype);
    return elementwise("clamp", by_dtype, "xx", 2, (const ds_tensor *[]){y, x}, bounds, CHEAP);
}

int DS_CPU(clamp_backward)(ds_tensor *dx, const ds_tensor *dy, const ds_tensor *x, double low,
                           double high)
{
    static const bodies by_dtype = {FLOATS(clamp_backward)};

    return elementwise("clamp_backward", by_dtype, "xxx", 3, (const ds_tensor *[]){dx, dy, x},
                       (double[]){low, high}, CHEAP);
}

/* where moves bits: one body a size. */
#define WHERE(type)                                                                                \
    static void where_##type(int64_t n, void *const *p, const double *s, unsigned ones)            \
    {                                                                                              \
        type *y = p[0];                                                                            \
        const uint8_t *condition = p[1];                                                           \
        const type *a = p[2], *b = p[3];                                                           \
                                                                                                   \
        (void)s, (void)ones;                                                                       \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = condition[i] ? a[i] : b[i];     \
    }
WHERE(uint8_t)
WHERE(uint16_t)
WHERE(uint32_t)
WHERE(uint64_t)
#undef WHERE

static int where(const char *name, ds_tensor *y, const ds_tensor *condition, const ds_tensor *a,
                 const ds_tensor *b)
{
    static walk_body *const by_size[] = {
        [1] = where_uint8_t, [2] = where_uint16_t, [4] = where_uint32_t, [8] = where_uint64_t};
    walk w;

    DS_TRY(ds_check_where(name, y, condition, a, b));
    DS_TRY(DS_CPU(walk_start)(&w, name, 4, (const ds_tensor *[]){y, condition, a, b}, WALK_ANY));
    walk_raw(&w, 0);
    walk_raw(&w, 2);
    walk_raw(&w, 3);
    DS_CPU(walk_run)(&w, by_size[ds_bytes_of(y->dtype)], NULL, 1);
    return 0;
}

int DS_CPU(where)(ds_tensor *y, const ds_tensor *condition, const ds_tensor *a, const ds_tensor *b)
{
    return where("where", y, condition, a, b);
}

int DS_CPU(masked_fill)(ds_tensor *y, const ds_tensor *x, const ds_tensor *mask, double value)
{
    number s;
    int rc = DS_CPU(number_start)(&s, "masked_fill", value, x->dtype, 1);

    return rc < 0 ? rc : where("masked_fill", y, mask, &s.t, x);
}

BODY(logical_and_u8, uint8_t, uint8_t, uint8_t, a[i] & b[i])
BODY(logical_or_u8, uint8_t, uint8_t, uint8_t, a[i] | b[i])
BODY(logical_not_u8, uint8_t, uint8_t, uint8_t, !a[i])

int DS_CPU(logical_and)(ds_tensor *y, const ds_tensor *a, const ds_tensor *b)
{
    static const bodies by_dtype = {[DS_BOOL] = logical_and_u8};

    return elementwise("logical_and", by_dtype, "bbb", 3, (const ds_tensor *[]){y, a, b}, NULL,
                       CHEAP);
}

int DS_CPU(logical_or)(ds_tensor *y, const ds_tensor *a, const ds_tensor *b)
{
    static const bodies by_dtype = {[DS_BOOL] = logical_or_u8};

    return elementwise("logical_or", by_dtype, "bbb", 3, (const ds_tensor *[]){y, a, b}, NULL,
                       CHEAP);
}

int DS_CPU(logical_not)(ds_tensor *y, const ds_tensor *x)
{
    static const bodies by_dtype = {[DS_BOOL] = logical_not_u8};

    return elementwise("logical_not", by_dtype, "bb", 2, (const ds_tensor *[]){y, x}, NULL, CHEAP);
}

BODY(isfinite_f32, uint8_t, float, float, (ds_bits(a[i]) & 0x7fffffff) < 0x7f800000)
BODY(isfinite_f64, uint8_t, double, double, fabs(a[i]) < INFINITY)

int DS_CPU(isfinite)(ds_tensor *y, const ds_tensor *x)
{
    static const bodies by_dtype = {FLOATS(isfinite)};

    return elementwise("isfinite", by_dtype, "bx", 2, (const ds_tensor *[]){y, x}, NULL, CHEAP);
}

int DS_CPU(scale_by)(ds_tensor *y, const ds_tensor *x, const ds_tensor *factor, double s)
{
    if (factor->numel != 1 || (factor->dtype != DS_F32 && factor->dtype != DS_F64))
        return ds_fail(DS_EINVAL, "scale_by wants one factor in f32, not %lld %s",
                       (long long)factor->numel, ds_name_of(factor->dtype));
    s *= factor->dtype == DS_F32 ? (double)*(const float *)factor->data
                                 : *(const double *)factor->data;
    return DS_CPU(mul_scalar)(y, x, s, 0);
}
