/* elementwise.c - every elementwise kernel: loops over rows, made from ops.def and scalar.h.
 *
 * A body is a loop over dense rows of one type, which the compiler vectorises; walk.c brings any
 * shapes, strides and low precision to it. A kernel is then a table of bodies by dtype.
 */
#include "kernels/cpu/walk.h"

#include <math.h>

#include "kernels/scalar.h"

#define CHEAP 1
#define COSTLY 8 /* about what a polynomial takes more than an addition */

typedef walk_body *bodies[DS_DTYPES]; /* by the inputs' dtype; NULL: not for this one */

/* ---- bodies */

#define BODY(name, Y, X, expression)                                                               \
    static void name(int64_t n, void *const *p, const double *scalars)                             \
    {                                                                                              \
        Y *y = p[0];                                                                               \
        const X *a = p[1];                                                                         \
                                                                                                   \
        (void)scalars;                                                                             \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = expression;                     \
    }

#define BODY2(name, Y, X, expression)                                                              \
    static void name(int64_t n, void *const *p, const double *scalars)                             \
    {                                                                                              \
        Y *y = p[0];                                                                               \
        const X *a = p[1], *b = p[2];                                                              \
                                                                                                   \
        (void)scalars;                                                                             \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = expression;                     \
    }

/* ---- checks */

static int bad_dtype(const char *name, int dtype, const char *hint)
{
    return ds_fail(DS_EINVAL, "%s is not for %s%s", name, ds_name_of(dtype), hint);
}

/* Runs bodies[dtype of t[1] or whatever `kinds` marks 'x' first]. kinds has a letter an operand: x
 * the common dtype, b bool, anything else: already right. */
static int elementwise(const char *name, const bodies by_dtype, const char *kinds, int count,
                       const ds_tensor *const *t, const double *scalars, int cost)
{
    int dtype = -1, rc;
    walk w;

    for (int k = count - 1; k >= 0; k--)
        if (kinds[k] == 'x')
            dtype = t[k]->dtype;
    for (int k = 0; k < count; k++) {
        int want = kinds[k] == 'x' ? dtype : kinds[k] == 'b' ? DS_BOOL : t[k]->dtype;

        if (t[k]->dtype != want)
            return ds_fail(DS_EINVAL, "%s: %s is %s but must be %s", name,
                           k == 0 ? "the result" : k == 1 ? "the first operand" : "an operand",
                           ds_name_of(t[k]->dtype), ds_name_of(want));
    }
    if (!by_dtype[dtype])
        return bad_dtype(name, dtype, ds_is_float(dtype) ? "" : "; use :float() first");
    rc = DS_CPU(walk_start)(&w, name, count, t);
    if (rc == 0)
        DS_CPU(walk_run)(&w, by_dtype[dtype], scalars, cost);
    return rc;
}

/* A number as an operand that broadcasts: in f32 for low precision, so that it is not rounded. */
typedef struct number {
    union {
        float f32;
        double f64;
        int64_t i64;
        int32_t i32;
        uint8_t u8;
    } value;
    ds_tensor t;
} number;

static int number_start(number *s, const char *name, double value, int dtype)
{
    static const double low[] = {[DS_I64] = -0x1p63, [DS_I32] = -0x1p31, [DS_U8] = 0};
    static const double high[] = {[DS_I64] = 0x1p63, [DS_I32] = 0x1p31, [DS_U8] = 256, [DS_BOOL] = 2};

    memset(s, 0, sizeof *s);
    s->t.dtype = dtype == DS_BF16 || dtype == DS_F16 ? DS_F32 : dtype;
    s->t.data = &s->value;
    s->t.numel = 1;
    s->t.dense = 1;
    if (s->t.dtype == DS_F32)
        s->value.f32 = (float)value;
    else if (s->t.dtype == DS_F64)
        s->value.f64 = value;
    else if (!(value >= (dtype == DS_BOOL ? 0 : low[dtype]) && value < high[dtype]) ||
             value != floor(value))
        return ds_fail(DS_EINVAL, "%s: %g is not a value of %s; use :float() first", name, value,
                       ds_name_of(dtype));
    else if (dtype == DS_I64)
        s->value.i64 = (int64_t)value;
    else if (dtype == DS_I32)
        s->value.i32 = (int32_t)value;
    else
        s->value.u8 = (uint8_t)value;
    return 0;
}

/* y = x ∘ value, or value ∘ x. */
static int with_number(const char *name, const bodies by_dtype, const char *kinds, ds_tensor *y,
                       const ds_tensor *x, double value, int flip, int cost)
{
    number s;
    int rc = number_start(&s, name, value, x->dtype);
    const ds_tensor *t[] = {y, flip ? &s.t : x, flip ? x : &s.t};
    char chosen[4] = {kinds[0], flip ? '.' : 'x', flip ? 'x' : '.', 0};

    return rc < 0 ? rc : elementwise(name, by_dtype, chosen, 3, t, NULL, cost);
}

#define FLOATS(name)                                                                               \
    {                                                                                              \
        [DS_F32] = name##_f32, [DS_BF16] = name##_f32, [DS_F16] = name##_f32, [DS_F64] = name##_f64 \
    }
#define NUMBERS(name)                                                                              \
    {                                                                                              \
        [DS_F32] = name##_f32, [DS_BF16] = name##_f32, [DS_F16] = name##_f32,                      \
        [DS_F64] = name##_f64, [DS_I64] = name##_i64, [DS_I32] = name##_i32, [DS_U8] = name##_u8   \
    }

/* ---- one input; backward: dx = dy slope(s) */

#define INTEGER(name)                                                                              \
    BODY(name##_i64, int64_t, int64_t, ds_##name##_i64(a[i]))                                      \
    BODY(name##_i32, int32_t, int32_t, ds_##name##_i32(a[i]))                                      \
    BODY(name##_u8, uint8_t, uint8_t, ds_##name##_u8(a[i]))                                        \
    static const bodies name##_integer = {                                                         \
        [DS_I64] = name##_i64, [DS_I32] = name##_i32, [DS_U8] = name##_u8};
INTEGER(neg)
INTEGER(abs)
INTEGER(sign)
INTEGER(square)
#undef INTEGER

static const struct {
    const char *name;
    const walk_body *const *by_dtype;
} x;
