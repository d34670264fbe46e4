/* elementwise.cu - every elementwise kernel, made from ops.def and scalar.h.
 *
 * An operation is a functor; walk.cuh brings any shapes, strides and low precision to it. Floating
 * operations have a kernel of packs each, whose arithmetic the compiler schedules between the loads;
 * what lies across, integers and comparisons share kernels that ask for the operation per element: a
 * branch that all threads take alike, and a fifth of the code.
 */
#include "kernels/cuda/walk.cuh"

/* ---- beginning a walk; `kinds`: as ds_check_kinds() takes them */

static int begin(walk *w, const char *name, const char *kinds, int count, const ds_tensor *const *t)
{
    DS_TRY(ds_check_kinds(name, kinds, count, t));
    return walk_start(w, name, count, t, WALK_ANY);
}

/* x ∘ value, or value ∘ x; `kinds` of two inputs. */
static int begin_number(walk *w, const char *name, const char *kinds, ds_tensor *y,
                        const ds_tensor *x, double value, int flip)
{
    const ds_tensor *t[] = {y, flip ? NULL : x, flip ? x : NULL};
    uint64_t bits;

    DS_TRY(walk_number(&bits, name, value, x->dtype));
    DS_TRY(begin(w, name, kinds, 3, t));
    w->number = bits;
    return 0;
}

/* By integer dtype, as DS_BY_FLOAT. */
#define BY_INTEGER(name, dtype_, S, ...)                                                           \
    [&]() -> int {                                                                                 \
        switch (dtype_) {                                                                          \
        case DS_I64: {                                                                             \
            using S = int64_t;                                                                     \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        case DS_I32: {                                                                             \
            using S = int32_t;                                                                     \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        case DS_U8: {                                                                              \
            using S = uint8_t;                                                                     \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        default:                                                                                   \
            return walk_refuse(name, dtype_);                                                      \
        }                                                                                          \
    }()

/* ---- one input, and its backward: dx = dy slope(s) */

enum unary {
#define DS_UNARY(name, saved) UNARY_##name,
#include "kernels/ops.def"
};

#define DS_UNARY(name, saved)                                                                      \
    struct unary_##name {                                                                          \
        static constexpr int inputs = 1;                                                           \
        __device__ float operator()(float x) const                                                 \
        {                                                                                          \
            return ds_##name##_f32(x);                                                             \
        }                                                                                          \
    };                                                                                             \
    struct slope_##name {                                                                          \
        static constexpr int inputs = 2;                                                           \
        __device__ float operator()(float dy, float s) const                                       \
        {                                                                                          \
            return dy * ds_##name##_slope_f32(s);                                                  \
        }                                                                                          \
    };
#include "kernels/ops.def"

struct any_unary {
    static constexpr int inputs = 1;
    int op;

    __device__ float operator()(float x) const
    {
        switch (op) {
#define DS_UNARY(name, saved)                                                                      \
    case UNARY_##name:                                                                             \
        return ds_##name##_f32(x);
#include "kernels/ops.def"
        }
        return x;
    }
};

struct any_slope {
    static constexpr int inputs = 2;
    int op;

    __device__ float operator()(float dy, float s) const
    {
        switch (op) {
#define DS_UNARY(name, saved)                                                                      \
    case UNARY_##name:                                                                             \
        return dy * ds_##name##_slope_f32(s);
#include "kernels/ops.def"
        }
        return dy;
    }
};

/* By the integer's type. */
#define INTEGER_UNARY(type, suffix)                                                                \
    __device__ type operator()(type x) const                                                       \
    {                                                                                              \
        return op == UNARY_neg    ? ds_neg_##suffix(x)                                             \
               : op == UNARY_abs  ? ds_abs_##suffix(x)                                             \
               : op == UNARY_sign ? ds_sign_##suffix(x)                                            \
                                  : ds_square_##suffix(x);                                         \
    }
struct integer_unary {
    static constexpr int inputs = 1;
    int op;

    INTEGER_UNARY(int64_t, i64)
    INTEGER_UNARY(int32_t, i32)
    INTEGER_UNARY(uint8_t, u8)
};

static int run_integer_unary(const char *name, int op, ds_tensor *y, const ds_tensor *x)
{
    const ds_tensor *t[] = {y, x};
    integer_unary f = {op};
    walk w;

    DS_TRY(begin(&w, name, "xx", 2, t));
    if (op != UNARY_neg && op != UNARY_abs && op != UNARY_sign && op != UNARY_square)
        return walk_refuse(name, x->dtype);
    return BY_INTEGER(name, x->dtype, S, walk_run<S, S, uint8_t, uint8_t>(w, f, f));
}

template <typename F>
static int run_unary(const char *name, int op, ds_tensor *y, const ds_tensor *x)
{
    const ds_tensor *t[] = {y, x};
    walk w;

    if (!ds_is_float(x->dtype))
        return run_integer_unary(name, op, y, x);
    DS_TRY(begin(&w, name, "xx", 2, t));
    return DS_BY_FLOAT(name, x->dtype, S, walk_run<S, S, uint8_t, uint8_t>(w, F(), any_unary{op}));
}

/* What has no gradient (`saved` 0) goes through the shared functor. */
template <typename F>
static int run_slope(const char *name, int op, ds_tensor *dx, const ds_tensor *dy,
                     const ds_tensor *s, F f)
{
    const ds_tensor *t[] = {dx, dy, s};
    walk w;

    DS_TRY(begin(&w, name, "xxx", 3, t));
    if (!ds_is_float(s->dtype))
        return walk_refuse(name, s->dtype);
    return DS_BY_FLOAT(name, s->dtype, S, walk_run<S, S, S, uint8_t>(w, f, any_slope{op}));
}

/* The functor of a slope, or any_slope. */
template <bool own, typename F> struct choose {
    static F of(int)
    {
        return F();
    }
};
template <typename F> struct choose<false, F> {
    static any_slope of(int op)
    {
        return any_slope{op};
    }
};

#define DS_UNARY(name, saved)                                                                      \
    extern "C" int ds_cuda_##name(ds_tensor *y, const ds_tensor *x)                                \
    {                                                                                              \
        return run_unary<unary_##name>(#name, UNARY_##name, y, x);                                 \
    }                                                                                              \
    extern "C" int ds_cuda_##name##_backward(ds_tensor *dx, const ds_tensor *dy,                   \
                                             const ds_tensor *s)                                   \
    {                                                                                              \
        return run_slope(#name "_backward", UNARY_##name, dx, dy, s,                               \
                         choose<saved != 0, slope_##name>::of(UNARY_##name));                      \
    }
#include "kernels/ops.def"

/* ---- two inputs */

enum binary {
#define DS_BINARY(name) BINARY_##name,
#include "kernels/ops.def"
};

#define DS_BINARY(name)                                                                            \
    struct binary_##name {                                                                         \
        static constexpr int inputs = 2;                                                           \
        __device__ float operator()(float a, float b) const                                        \
        {                                                                                          \
            return ds_##name##_f32(a, b);                                                          \
        }                                                                                          \
    };
#include "kernels/ops.def"

struct any_binary {
    static constexpr int inputs = 2;
    int op;

    __device__ float operator()(float a, float b) const
    {
        switch (op) {
#define DS_BINARY(name)                                                                            \
    case BINARY_##name:                                                                            \
        return ds_##name##_f32(a, b);
#include "kernels/ops.def"
        }
        return a;
    }
};

#define INTEGER_BINARY(type, suffix)                                                               \
    __device__ type operator()(type a, type b) const                                               \
    {                                                                                              \
        return op == BINARY_add       ? ds_add_##suffix(a, b)                                      \
               : op == BINARY_sub     ? ds_sub_##suffix(a, b)                                      \
               : op == BINARY_mul     ? ds_mul_##suffix(a, b)                                      \
               : op == BINARY_maximum ? ds_maximum_##suffix(a, b)                                  \
                                      : ds_minimum_##suffix(a, b);                                 \
    }
struct integer_binary {
    static constexpr int inputs = 2;
    int op;

    INTEGER_BINARY(int64_t, i64)
    INTEGER_BINARY(int32_t, i32)
    INTEGER_BINARY(uint8_t, u8)
};

/* Either input may be the walk's number. */
template <typename F> static int run_binary(const walk &w, int op, int dtype)
{
    integer_binary f = {op};

    if (ds_is_float(dtype))
        return DS_BY_FLOAT(w.name, dtype, S, walk_run<S, S, S, uint8_t>(w, F(), any_binary{op}));
    if (op == BINARY_div || op == BINARY_pow)
        return walk_refuse(w.name, dtype);
    return BY_INTEGER(w.name, dtype, S, walk_run<S, S, S, uint8_t>(w, f, f));
}

/* Powers that are something simpler; 1: this one is not. */
static int easy_power(ds_tensor *y, const ds_tensor *x, double s, int flip)
{
    static const struct {
        double power;
        int (*kernel)(ds_tensor *, const ds_tensor *);
    } easy[] = {
        {2, ds_cuda_square}, {0.5, ds_cuda_sqrt}, {-0.5, ds_cuda_rsqrt}, {-1, ds_cuda_reciprocal}};

    for (size_t i = 0; !flip && ds_is_float(x->dtype) && i < sizeof easy / sizeof *easy; i++)
        if (easy[i].power == s)
            return easy[i].kernel(y, x);
    return 1;
}

#define DS_BINARY(name)                                                                            \
    extern "C" int ds_cuda_##name(ds_tensor *y, const ds_tensor *a, const ds_tensor *b)            \
    {                                                                                              \
        const ds_tensor *t[] = {y, a, b};                                                          \
        walk w;                                                                                    \
                                                                                                   \
        DS_TRY(begin(&w, #name, "xxx", 3, t));                                                     \
        return run_binary<binary_##name>(w, BINARY_##name, a->dtype);                              \
    }                                                                                              \
    extern "C" int ds_cuda_##name##_scalar(ds_tensor *y, const ds_tensor *x, double s, int flip)   \
    {                                                                                              \
        int rc = BINARY_##name == BINARY_pow ? easy_power(y, x, s, flip) : 1;                      \
        walk w;                                                                                    \
                                                                                                   \
        if (rc <= 0)                                                                               \
            return rc;                                                                             \
        DS_TRY(begin_number(&w, #name, "xxx", y, x, s, flip));                                     \
        return run_binary<binary_##name>(w, BINARY_##name, x->dtype);                              \
    }
#include "kernels/ops.def"

/* ---- comparisons: bool from any dtype */

/* Which of a < b, a == b, a > b make it true; all the other way round if `not` is set (ne, so that NaN
 * differs from everything). */
struct compare_op {
    static constexpr int inputs = 2;
    int less, equal, greater, invert;

    template <typename W> __device__ uint8_t operator()(W a, W b) const
    {
        int is = (less & (a < b)) | (equal & (a == b)) | (greater & (a > b));

        return (uint8_t)(is ^ invert);
    }
};
static const compare_op compare_eq = {0, 1, 0, 0}, compare_ne = {0, 1, 0, 1},
                        compare_lt = {1, 0, 0, 0}, compare_le = {1, 1, 0, 0},
                        compare_gt = {0, 0, 1, 0}, compare_ge = {0, 1, 1, 0};

static int run_compare(const walk &w, compare_op f, int dtype)
{
    if (ds_is_float(dtype))
        return DS_BY_FLOAT(w.name, dtype, S, walk_run<uint8_t, S, S, uint8_t>(w, f, f));
    return BY_INTEGER(w.name, dtype == DS_BOOL ? DS_U8 : dtype, S,
                      walk_run<uint8_t, S, S, uint8_t>(w, f, f));
}

#define DS_COMPARE(name)                                                                           \
    extern "C" int ds_cuda_##name(ds_tensor *y, const ds_tensor *a, const ds_tensor *b)            \
    {                                                                                              \
        const ds_tensor *t[] = {y, a, b};                                                          \
        walk w;                                                                                    \
                                                                                                   \
        DS_TRY(begin(&w, #name, "bxx", 3, t));                                                     \
        return run_compare(w, compare_##name, a->dtype);                                           \
    }                                                                                              \
    extern "C" int ds_cuda_##name##_scalar(ds_tensor *y, const ds_tensor *x, double s, int flip)   \
    {                                                                                              \
        walk w;                                                                                    \
                                                                                                   \
        DS_TRY(begin_number(&w, #name, "bxx", y, x, s, flip));                                     \
        return run_compare(w, compare_##name, x->dtype);                                           \
    }
#include "kernels/ops.def"

/* ---- the rest */

struct add_scaled_op {
    static constexpr int inputs = 2;
    float alpha;

    __device__ float operator()(float a, float b) const
    {
        return a + alpha * b;
    }
};

extern "C" int ds_cuda_add_scaled(ds_tensor *y, const ds_tensor *a, const ds_tensor *b,
                                  double alpha)
{
    const ds_tensor *t[] = {y, a, b};
    add_scaled_op f = {(float)alpha};
    walk w;

    if (!ds_is_float(a->dtype) && alpha == 1)
        return ds_cuda_add(y, a, b);
    if (!ds_is_float(a->dtype) && alpha == -1)
        return ds_cuda_sub(y, a, b);
    DS_TRY(begin(&w, "add_scaled", "xxx", 3, t));
    if (!ds_is_float(a->dtype))
        return walk_refuse("add_scaled", a->dtype);
    return DS_BY_FLOAT("add_scaled", a->dtype, S, walk_run<S, S, S, uint8_t>(w, f, f));
}

template <typename W> struct clamp_op {
    static constexpr int inputs = 1;
    W low, high;

    __device__ W operator()(W x) const
    {
        return x < low ? low : x > high ? high : x;
    }
};

struct clamp_slope_op {
    static constexpr int inputs = 2;
    float low, high;

    __device__ float operator()(float dy, float x) const
    {
        return (x >= low) & (x <= high) ? dy : 0.0f;
    }
};

extern "C" int ds_cuda_clamp(ds_tensor *y, const ds_tensor *x, double low, double high)
{
    const ds_tensor *t[] = {y, x};
    clamp_op<float> f = {(float)low, (float)high};
    walk w;

    DS_TRY(ds_check_clamp(low, high));
    DS_TRY(begin(&w, "clamp", "xx", 2, t));
    if (ds_is_float(x->dtype))
        return DS_BY_FLOAT("clamp", x->dtype, S, walk_run<S, S, uint8_t, uint8_t>(w, f, f));
    int64_t least = (int64_t)ds_clamp_bound(low, 1, x->dtype);
    int64_t most = (int64_t)ds_clamp_bound(high, 0, x->dtype);
    return BY_INTEGER("clamp", x->dtype, S,
                      walk_run<S, S, uint8_t, uint8_t>(w, clamp_op<S>{(S)least, (S)most},
                                                       clamp_op<S>{(S)least, (S)most}));
}

extern "C" int ds_cuda_clamp_backward(ds_tensor *dx, const ds_tensor *dy, const ds_tensor *x,
                                      double low, double high)
{
    const ds_tensor *t[] = {dx, dy, x};
    clamp_slope_op f = {(float)low, (float)high};
    walk w;

    DS_TRY(begin(&w, "clamp_backward", "xxx", 3, t));
    if (!ds_is_float(x->dtype))
        return walk_refuse("clamp_backward", x->dtype);
    return DS_BY_FLOAT("clamp_backward", x->dtype, S, walk_run<S, S, S, uint8_t>(w, f, f));
}

/* where moves bits: one kernel a size. */
struct where_op {
    static constexpr int inputs = 3;

    template <typename W> __device__ W operator()(uint8_t condition, W a, W b) const
    {
        return condition ? a : b;
    }
};

static int run_where(const walk &w, int64_t size)
{
    where_op f;

    return DS_BY_BYTES(size, W, walk_run<W, uint8_t, W, W>(w, f, f));
}

extern "C" int ds_cuda_where(ds_tensor *y, const ds_tensor *condition, const ds_tensor *a,
                             const ds_tensor *b)
{
    const ds_tensor *t[] = {y, condition, a, b};
    walk w;

    DS_TRY(ds_check_where("where", y, condition, a, b));
    DS_TRY(walk_start(&w, "where", 4, t, WALK_ANY));
    return run_where(w, ds_bytes_of(y->dtype));
}

extern "C" int ds_cuda_masked_fill(ds_tensor *y, const ds_tensor *x, const ds_tensor *mask,
                                   double value)
{
    const ds_tensor *t[] = {y, mask, NULL, x};
    uint64_t bits;
    walk w;

    DS_TRY(walk_bits(&bits, "masked_fill", value, x->dtype));
    DS_TRY(ds_check_where("masked_fill", y, mask, x, x));
    DS_TRY(walk_start(&w, "masked_fill", 4, t, WALK_ANY));
    w.number = bits;
    return run_where(w, ds_bytes_of(y->dtype));
}

enum { LOGICAL_AND, LOGICAL_OR, LOGICAL_XOR };
struct logical_op {
    static constexpr int inputs = 2;
    int op;

    __device__ uint8_t operator()(uint8_t a, uint8_t b) const
    {
        return op == LOGICAL_AND ? a & b : op == LOGICAL_OR ? a | b : a ^ b;
    }
};

static int run_logical(const char *name, int op, ds_tensor *y, const ds_tensor *a,
                       const ds_tensor *b)
{
    const ds_tensor *t[] = {y, a, b};
    logical_op f = {op};
    walk w;

    DS_TRY(begin(&w, name, "bbb", 3, t));
    w.number = 1;
    return walk_run<uint8_t, uint8_t, uint8_t, uint8_t>(w, f, f);
}

extern "C" int ds_cuda_logical_and(ds_tensor *y, const ds_tensor *a, const ds_tensor *b)
{
    return run_logical("logical_and", LOGICAL_AND, y, a, b);
}

extern "C" int ds_cuda_logical_or(ds_tensor *y, const ds_tensor *a, const ds_tensor *b)
{
    return run_logical("logical_or", LOGICAL_OR, y, a, b);
}

/* x xor 1 */
extern "C" int ds_cuda_logical_not(ds_tensor *y, const ds_tensor *x)
{
    return run_logical("logical_not", LOGICAL_XOR, y, x, NULL);
}

struct isfinite_op {
    static constexpr int inputs = 1;

    __device__ uint8_t operator()(float x) const
    {
        return (ds_bits(x) & 0x7fffffff) < 0x7f800000;
    }
};

extern "C" int ds_cuda_isfinite(ds_tensor *y, const ds_tensor *x)
{
    const ds_tensor *t[] = {y, x};
    walk w;

    DS_TRY(begin(&w, "isfinite", "bx", 2, t));
    if (!ds_is_float(x->dtype))
        return walk_refuse("isfinite", x->dtype);
    return DS_BY_FLOAT("isfinite", x->dtype, S,
                       walk_run<uint8_t, S, uint8_t, uint8_t>(w, isfinite_op(), isfinite_op()));
}
