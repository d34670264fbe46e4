/* Elementwise kernels against libm in f64, at every CPU level: dtypes, strides, broadcasts, special
 * values, errors. Kernels and their derivatives are found through ops.def, so a new one without a
 * reference here fails. */
#include "tests/c/helpers.h"
#include "tests/c/levels.h"

#define ROUNDS 20 /* random shapes for each kernel */

/* ---- references */

static double neg(double x)
{
    return -x;
}

static double sign(double x)
{
    return x > 0 ? 1 : x < 0 ? -1 : x;
}

static double square(double x)
{
    return x * x;
}

static double rsqrt(double x)
{
    return 1 / sqrt(x);
}

static double reciprocal(double x)
{
    return 1 / x;
}

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static double relu(double x)
{
    return x > 0 ? x : 0;
}

static double gelu(double x)
{
    return 0.5 * x * erfc(-x / sqrt(2));
}

static double gelu_tanh(double x)
{
    return x / (1 + exp(-2 * sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

static double silu(double x)
{
    return x / (1 + exp(-x));
}

static double softplus(double x)
{
    return log1p(exp(x));
}

/* ulps: of f32 in the value and, times four, in the slope; [low, high]: where it is tried; steps:
 * the slope is 0. */
static const struct unary {
    const char *name;
    double (*f)(double);
    double low, high, ulps;
    int steps;
} unaries[] = {
    {"neg", neg, -3, 3, 0, 0},         {"abs", fabs, -3, 3, 0, 0},
    {"sign", sign, -3, 3, 0, 1},       {"floor", floor, -5, 5, 0, 1},
    {"ceil", ceil, -5, 5, 0, 1},       {"round", rint, -5, 5, 0, 1},
    {"square", square, -3, 3, 1, 0},   {"sqrt", sqrt, 0.1, 9, 1, 0},
    {"rsqrt", rsqrt, 0.1, 9, 2, 0},    {"reciprocal", reciprocal, 0.2, 9, 1, 0},
    {"exp", exp, -9, 9, 2, 0},         {"log", log, 0.1, 9, 2, 0},
    {"log1p", log1p, -0.9, 9, 2, 0},   {"sin", sin, -9, 9, 2, 0},
    {"cos", cos, -9, 9, 2, 0},         {"tanh", tanh, -4, 4, 2, 0},
    {"sigmoid", sigmoid, -9, 9, 3, 0}, {"relu", relu, -3, 3, 0, 0},
    {"gelu", gelu, -3, 5, 16, 0},      {"gelu_tanh", gelu_tanh, -3, 5, 8, 0},
    {"silu", silu, -9, 9, 4, 0},       {"softplus", softplus, -9, 9, 3, 0},
    {"erf", erf, -3, 3, 3, 0},
};

static const struct unary *unary_of(const char *name)
{
    for (size_t i = 0; i < sizeof unaries / sizeof *unaries; i++)
        if (strcmp(unaries[i].name, name) == 0)
            return &unaries[i];
    fail_msg("%s has no reference in this test", name);
    return NULL;
}

static double maximum(double a, double b)
{
    return isnan(a) ? a : isnan(b) ? b : a > b ? a : b;
}

static double minimum(double a, double b)
{
    return isnan(a) ? a : isnan(b) ? b : a < b ? a : b;
}

static double binary(const char *name, double a, double b)
{
    switch (name[0] == 'm' ? name[1] + name[2] : name[0]) {
    case 'a':
        return a + b;
    case 's':
        return a - b;
    case 'u' + 'l':
        return a * b;
    case 'd':
        return a / b;
    case 'p':
        return pow(a, b);
    case 'a' + 'x':
        return maximum(a, b);
    case 'i' + 'n':
        return minimum(a, b);
    }
    fail_msg("%s has no reference in this test", name);
    return 0;
}

static double compare(const char *name, double a, double b)
{
    const char *names[] = {"eq", "ne", "lt", "le", "gt", "ge"};
    int values[] = {a == b, a != b, a<b, a <= b, a> b, a >= b};

    for (int i = 0; i < 6; i++)
        if (strcmp(name, names[i]) == 0)
            return values[i];
    fail_msg("%s has no reference in this test", name);
    return 0;
}

/* ---- random shapes */

typedef struct shape {
    int ndim;
    int64_t size[DS_MAX_DIM];
} shape;

/* Up to 5 dimensions; rows both short and long enough to be visited one by one; sometimes empty. */
static shape any_shape(void)
{
    shape s = {.ndim = (int)between(0, 5)};
    int64_t left = 1500;

    for (int i = s.ndim - 1; i >= 0; i--) {
        int64_t most = left < 700 ? left : between(0, 2) ? 9 : 700;

        s.size[i] = between(0, 40) == 0 ? 0 : between(1, most);
        left /= s.size[i] ? s.size[i] : 1;
    }
    return s;
}

/* One that broadcasts to s. */
static shape narrower(shape s)
{
    int drop = s.ndim && between(0, 2) == 0 ? (int)between(1, s.ndim) : 0;
    shape r = {.ndim = s.ndim - drop};

    for (int i = 0; i < r.ndim; i++)
        r.size[i] = between(0, 2) == 0 ? 1 : s.size[i + drop];
    return r;
}

/* The element of x that meets element i of y. */
static double met(const ds_tensor *x, const ds_tensor *y, int64_t i)
{
    int64_t at = 0, step = 1, lead = y->ndim - x->ndim;

    for (int d = y->ndim - 1; d >= 0; d--) {
        int64_t index = i % y->shape[d];

        i /= y->shape[d];
        if (d < lead)
            continue;
        at += (x->shape[d - lead] == 1 ? 0 : index) * step;
        step *= x->shape[d - lead];
    }
    return get(x, at);
}

/* ---- one input */

typedef int unary_kernel(ds_tensor *, const ds_tensor *);
typedef int unary_backward_kernel(ds_tensor *, const ds_tensor *, const ds_tensor *);

static void check_unary(const char *name, unary_kernel *kernel, int dtype)
{
    const struct unary *u = unary_of(name);
    shape s = any_shape();
    ds_tensor x = random_tensor(dtype, s.ndim, s.size, u->low, u->high);
    ds_tensor y = anyhow(dtype, s.ndim, s.size);

    assert_int_equal(kernel(&y, &x), 0);
    for (int64_t i = 0; i < y.numel; i++) {
        double want = u->f(get(&x, i));

        near(get(&y, i), want, within(dtype, want, u->ulps), name, i);
    }
    if (ds_is_float(dtype)) { /* in place */
        assert_int_equal(kernel(&x, &x), 0);
        for (int64_t i = 0; i < y.numel; i++)
            assert_true(get(&x, i) == get(&y, i));
    }
    drop(&x);
    drop(&y);
}

static void check_slope(const char *name, char saved, unary_backward_kernel *kernel, int dtype)
{
    const struct unary *u = unary_of(name);
    shape s = any_shape();
    ds_tensor x = random_tensor(dtype, s.ndim, s.size, u->low, u->high);
    ds_tensor dy = random_tensor(dtype, s.ndim, s.size, -2, 2),
              kept = anyhow(dtype, s.ndim, s.size);
    ds_tensor dx = anyhow(dtype, s.ndim, s.size);

    for (int64_t i = 0; i < x.numel; i++) {
        if (fabs(get(&x, i)) < 0.01) /* away from corners */
            set(&x, i, u->low > 0 ? u->low : 0.5);
        set(&kept, i, saved == 'x' ? get(&x, i) : u->f(get(&x, i)));
    }
    assert_int_equal(kernel(&dx, &dy, &kept), 0);
    for (int64_t i = 0; i < x.numel; i++) {
        double at = get(&x, i), h = 1e-5, g = get(&dy, i), slope, spread;

        if (u->steps)
            slope = 0;
        else
            slope = (u->f(at + h) - u->f(at - h)) / (2 * h);
        /* saved is rounded to dtype: so much does that move the slope */
        spread = fabs((u->f(at + 2 * h) - 2 * u->f(at) + u->f(at - 2 * h)) / (4 * h * h)) * 4 *
                     eps_of(dtype) * (1 + fabs(at)) +
                 (saved == 'y' ? 8 * eps_of(dtype) * (1 + fabs(slope) + fabs(u->f(at))) : 0);
        near(get(&dx, i), g * slope,
             within(dtype, g * slope, 4 * u->ulps) + fabs(g) * (spread + 1e-5), name, i);
    }
    drop(&x);
    drop(&dy);
    drop(&dx);
    drop(&kept);
}

static void one_input(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int dtype = 0; dtype < FLOATS; dtype++)
        for (int round = 0; round < ROUNDS / 4; round++) {
#define DS_UNARY(name, saved)                                                                      \
    check_unary(#name, ops->name, dtype);                                                          \
    check_slope(#name, saved, ops->name##_backward, dtype);
#include "kernels/ops.def"
        }
    for (int dtype = DS_I64; dtype <= DS_I32; dtype++)
        for (int round = 0; round < ROUNDS / 4; round++) {
            check_unary("neg", ops->neg, dtype);
            check_unary("abs", ops->abs, dtype);
            check_unary("sign", ops->sign, dtype);
            check_unary("square", ops->square, dtype);
        }
}

/* Left out: infinity, where the products of closed forms are NaN, as PyTorch's are, and sines of
 * vast arguments, beyond f32's accuracy. */
static void special_values(void **state)
{
    static const double x[] = {0.0,   -0.0,   1,        -1,  INFINITY, -INFINITY, NAN,
                               1e-40, -1e-40, 0.5,      1.5, 2.5,      -0.5,      -2.5,
                               88,    -88,    3.389e38, 100, -100,     1e10};
    const ds_ops *ops = kernels();
    int n = sizeof x / sizeof *x;

    (void)state;
    for (int dtype = 0; dtype < FLOATS; dtype++) {
        ds_tensor in = dense(dtype, SHAPE(n)), out = dense(dtype, SHAPE(n));

        for (int i = 0; i < n; i++)
            set(&in, i, x[i]);
#define DS_UNARY(name, saved)                                                                      \
    {                                                                                              \
        const struct unary *u = unary_of(#name);                                                   \
                                                                                                   \
        assert_int_equal(ops->name(&out, &in), 0);                                                 \
        for (int i = 0; i < n; i++) {                                                              \
            double want = u->f(get(&in, i));                                                       \
                                                                                                   \
            if ((isinf(x[i]) && (u->f == gelu || u->f == gelu_tanh || u->f == silu)) ||            \
                (fabs(x[i]) > 1e6 && (u->f == sin || u->f == cos)) ||                              \
                (x[i] == 88 && u->f == exp && dtype == DS_F16))                                    \
                continue;                                                                          \
            if (isnan(x[i]))                                                                       \
                want = NAN;                                                                        \
            if (u->f == softplus && x[i] > 700)                                                    \
                want = get(&in, i);                                                                \
            near(get(&out, i), rounded(dtype, want),                                               \
                 within(dtype, rounded(dtype, want), u->ulps + 20) + 1e-36, #name, i);             \
        }                                                                                          \
    }
#include "kernels/ops.def"
        drop(&in);
        drop(&out);
    }
}

/* ---- two inputs */

typedef int binary_kernel(ds_tensor *, const ds_tensor *, const ds_tensor *);
typedef int scalar_kernel(ds_tensor *, const ds_tensor *, double, int);

static double low_of(const char *name, int dtype)
{
    return strcmp(name, "pow") == 0 || dtype >= DS_U8 ? 0 : -3;
}

static void check_binary(const char *name, binary_kernel *kernel, int dtype, int compares)
{
    shape s = any_shape(), sa = narrower(s), sb = narrower(s);
    double low = low_of(name, dtype), high = dtype == DS_BOOL ? 1 : 6;
    ds_tensor a = random_tensor(dtype, sa.ndim, sa.size, low, high);
    ds_tensor b = random_tensor(dtype, sb.ndim, sb.size, low, high);
    ds_tensor y = anyhow(compares ? DS_BOOL : dtype, s.ndim, s.size);

    assert_int_equal(kernel(&y, &a, &b), 0);
    for (int64_t i = 0; i < y.numel; i++) {
        double u = met(&a, &y, i), v = met(&b, &y, i);
        double want = compares ? compare(name, u, v) : binary(name, u, v);

        if (dtype == DS_U8 && !compares)
            want = (double)(uint8_t)(int)want;
        if (ds_is_float(y.dtype))
            want = rounded(dtype, want);
        near(get(&y, i), want, ds_is_float(y.dtype) ? 2 * within(dtype, want, 1) : 0, name, i);
    }
    drop(&a);
    drop(&b);
    drop(&y);
}

static void check_scalar(const char *name, scalar_kernel *kernel, int dtype, int compares)
{
    static const double numbers[] = {2, 0.5, -0.5, -1, 3, 1.7, 0, 1};
    shape s = any_shape();
    double low = low_of(name, dtype), high = dtype == DS_BOOL ? 1 : 6;
    double number = numbers[between(0, 7)];
    int flip = (int)between(0, 1);
    ds_tensor x = random_tensor(dtype, s.ndim, s.size, low, high);
    ds_tensor y = anyhow(compares ? DS_BOOL : dtype, s.ndim, s.size);

    if (!ds_is_float(dtype))
        number = (double)between((int64_t)low, (int64_t)high);
    if (dtype == DS_BF16 || dtype == DS_F16 || dtype == DS_F32)
        number = (double)(float)number;
    assert_int_equal(kernel(&y, &x, number, flip), 0);
    for (int64_t i = 0; i < y.numel; i++) {
        double u = flip ? number : get(&x, i), v = flip ? get(&x, i) : number;
        double want = compares ? compare(name, u, v) : binary(name, u, v);

        if (dtype == DS_U8 && !compares)
            want = (double)(uint8_t)(int)want;
        if (ds_is_float(y.dtype))
            want = rounded(dtype, want);
        near(get(&y, i), want, ds_is_float(y.dtype) ? 2 * within(dtype, want, 2) : 0, name, i);
    }
    drop(&x);
    drop(&y);
}

static void two_inputs(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int dtype = 0; dtype < DS_DTYPES; dtype++)
        for (int round = 0; round < ROUNDS / 2; round++) {
#define DS_BINARY(name)                                                                            \
    if (ds_is_float(dtype) ||                                                                      \
        (dtype != DS_BOOL && strcmp(#name, "div") != 0 && strcmp(#name, "pow") != 0)) {            \
        check_binary(#name, ops->name, dtype, 0);                                                  \
        check_scalar(#name, ops->name##_scalar, dtype, 0);                                         \
    }
#define DS_COMPARE(name)                                                                           \
    check_binary(#name, ops->name, dtype, 1);                                                      \
    check_scalar(#name, ops->name##_scalar, dtype, 1);
#include "kernels/ops.def"
        }
}

static void not_a_number(void **state)
{
    const ds_ops *ops = kernels();
    ds_tensor a = dense(DS_F32, SHAPE(40)), y = dense(DS_F32, SHAPE(40));
    ds_tensor t = dense(DS_BOOL, SHAPE(40));

    (void)state;
    for (int i = 0; i < 40; i++)
        set(&a, i, i % 3 ? i : NAN);
    assert_int_equal(ops->maximum_scalar(&y, &a, 5, 0), 0);
    for (int i = 0; i < 40; i++)
        near(get(&y, i), maximum(get(&a, i), 5), 0, "maximum", i);
    assert_int_equal(ops->minimum_scalar(&y, &a, 5, 1), 0);
    for (int i = 0; i < 40; i++)
        near(get(&y, i), minimum(get(&a, i), 5), 0, "minimum", i);
    assert_int_equal(ops->ne(&t, &a, &a), 0);
    for (int i = 0; i < 40; i++)
        assert_int_equal(get(&t, i), i % 3 == 0);
    assert_int_equal(ops->clamp(&y, &a, 3, 7), 0);
    for (int i = 0; i < 40; i++)
        near(get(&y, i), i % 3 ? fmin(fmax(i, 3), 7) : NAN, 0, "clamp", i);
    drop(&a);
    drop(&y);
    drop(&t);
}

/* Rows of the sizes that training has, on several threads. */
static void large(void **state)
{
    static const int64_t shapes[][2] = {{60, 768}, {500, 65}, {70, 3}, {1, 40000}, {1000, 17}};
    const ds_ops *ops = kernels();

    (void)state;
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
        for (int dtype = 0; dtype < FLOATS; dtype++) {
            int64_t rows = shapes[k][0], columns = shapes[k][1];
            ds_tensor a = dense(dtype, 2, shapes[k]), y = dense(dtype, 2, shapes[k]);
            ds_tensor bias = dense(dtype, SHAPE(columns)), side = dense(dtype, SHAPE(rows, 1));

            randomise(&a, -2, 2);
            randomise(&bias, -2, 2);
            randomise(&side, -2, 2);
            assert_int_equal(ops->add(&y, &a, &bias), 0);
            for (int64_t i = 0; i < y.numel; i++)
                near(get(&y, i), get(&a, i) + get(&bias, i % columns), within(dtype, get(&y, i), 1),
                     "add", i);
            assert_int_equal(ops->mul(&y, &a, &side), 0);
            for (int64_t i = 0; i < y.numel; i++)
                near(get(&y, i), get(&a, i) * get(&side, i / columns), within(dtype, get(&y, i), 1),
                     "mul", i);
            drop(&a);
            drop(&y);
            drop(&bias);
            drop(&side);
        }
}

/* Operands whose rows are the output's columns, around the sizes of blocks and tiles. */
static void transposed_operands(void **state)
{
    static const int64_t shapes[][3] = {{1, 130, 70}, {2, 65, 1030}, {3, 16, 16}, {1, 17, 2100}};
    const ds_ops *ops = kernels();

    (void)state;
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
        for (int dtype = 0; dtype < DS_DTYPES - 1; dtype++) {
            int64_t n = shapes[k][0], rows = shapes[k][1], columns = shapes[k][2];
            ds_tensor a = dense(dtype, SHAPE(n, columns, rows)), b = dense(dtype, 3, shapes[k]);
            ds_tensor c = dense(DS_BOOL, SHAPE(n, columns, rows)), y = dense(dtype, 3, shapes[k]);
            ds_tensor at = transposed(&a, 1, 2), ct = transposed(&c, 1, 2);

            randomise(&a, 0, 5);
            randomise(&b, 0, 5);
            randomise(&c, 0, 1);
            assert_int_equal(ops->add(&y, &at, &b), 0);
            for (int64_t i = 0; i < y.numel; i++)
                near(get(&y, i), rounded(dtype, get(&at, i) + get(&b, i)),
                     ds_is_float(dtype) ? within(dtype, get(&y, i), 1) : 0, "add", i);
            assert_int_equal(ops->where(&y, &ct, &at, &b), 0);
            for (int64_t i = 0; i < y.numel; i++)
                assert_true(get(&y, i) == get(get(&ct, i) != 0 ? &at : &b, i));
            drop(&a);
            drop(&b);
            drop(&c);
            drop(&y);
        }
}

/* ---- the rest */

static void add_scaled_and_clamp(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 2; round++) {
        int dtype = round % 4;
        shape s = any_shape(), sb = narrower(s);
        ds_tensor a = random_tensor(dtype, s.ndim, s.size, -3, 3);
        ds_tensor b = random_tensor(dtype, sb.ndim, sb.size, -3, 3);
        ds_tensor y = anyhow(dtype, s.ndim, s.size);

        assert_int_equal(ops->add_scaled(&y, &a, &b, -0.375), 0);
        for (int64_t i = 0; i < y.numel; i++)
            near(get(&y, i), get(&a, i) - 0.375 * met(&b, &y, i),
                 within(dtype, get(&y, i), 2) + 1e-6, "add_scaled", i);
        assert_int_equal(ops->clamp(&y, &a, -0.5, INFINITY), 0);
        for (int64_t i = 0; i < y.numel; i++)
            near(get(&y, i), fmax(get(&a, i), -0.5), 0, "clamp", i);
        assert_int_equal(ops->clamp_backward(&y, &a, &a, -0.5, 1), 0);
        for (int64_t i = 0; i < y.numel; i++)
            near(get(&y, i), get(&a, i) >= -0.5 && get(&a, i) <= 1 ? get(&a, i) : 0, 0,
                 "clamp_backward", i);
        drop(&a);
        drop(&b);
        drop(&y);
    }
    for (int dtype = DS_I64; dtype <= DS_U8; dtype++) {
        ds_tensor a = random_tensor(dtype, SHAPE(90), 0, 20), y = anyhow(dtype, SHAPE(90));

        assert_int_equal(ops->clamp(&y, &a, -INFINITY, 7.5), 0);
        for (int64_t i = 0; i < 90; i++)
            near(get(&y, i), fmin(get(&a, i), 7), 0, "clamp", i);
        assert_int_equal(ops->clamp(&y, &a, 3, 1e30), 0);
        for (int64_t i = 0; i < 90; i++)
            near(get(&y, i), fmax(get(&a, i), 3), 0, "clamp", i);
        drop(&a);
        drop(&y);
    }
}

static void scaled_by_a_tensor(void **state)
{
    const ds_ops *ops = kernels();
    ds_tensor factor = dense(DS_F32, SHAPE(1)), two = dense(DS_F32, SHAPE(2));

    (void)state;
    set(&factor, 0, 3);
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++) {
        ds_tensor x = random_tensor(dtype, SHAPE(90), -3, 3), y = dense(dtype, SHAPE(90));

        assert_int_equal(ops->scale_by(&y, &x, &factor, 0.25), 0);
        for (int64_t i = 0; i < 90; i++)
            near(get(&y, i), get(&x, i) * 0.75, within(dtype, get(&y, i), 1), "scale_by", i);
        fails(ops->scale_by(&y, &x, &two, 1), DS_EINVAL, "scale_by wants one factor in f32, not 2");
        drop(&x);
        drop(&y);
    }
    drop(&factor);
    drop(&two);
}

static void where_and_masks(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 4; round++) {
        int dtype = round % DS_DTYPES;
        shape s = any_shape(), sa = narrower(s), sb = narrower(s), sc = narrower(s);
        ds_tensor a = random_tensor(dtype, sa.ndim, sa.size, 0, 1);
        ds_tensor b = random_tensor(dtype, sb.ndim, sb.size, 0, 1);
        ds_tensor c = random_tensor(DS_BOOL, sc.ndim, sc.size, 0, 1);
        ds_tensor y = anyhow(dtype, s.ndim, s.size);

        assert_int_equal(ops->where(&y, &c, &a, &b), 0);
        for (int64_t i = 0; i < y.numel; i++)
            near(get(&y, i), met(&c, &y, i) ? met(&a, &y, i) : met(&b, &y, i), 0, "where", i);
        assert_int_equal(ops->masked_fill(&y, &a, &c, 1), 0);
        for (int64_t i = 0; i < y.numel; i++)
            near(get(&y, i), met(&c, &y, i) ? 1 : met(&a, &y, i), 0, "masked_fill", i);
        drop(&a);
        drop(&b);
        drop(&c);
        drop(&y);
    }
}

static void logic(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS; round++) {
        shape s = any_shape(), sb = narrower(s);
        ds_tensor a = random_tensor(DS_BOOL, s.ndim, s.size, 0, 1);
        ds_tensor b = random_tensor(DS_BOOL, sb.ndim, sb.size, 0, 1);
        ds_tensor y = anyhow(DS_BOOL, s.ndim, s.size);

        assert_int_equal(ops->logical_and(&y, &a, &b), 0);
        for (int64_t i = 0; i < y.numel; i++)
            assert_int_equal(get(&y, i), get(&a, i) != 0 && met(&b, &y, i) != 0);
        assert_int_equal(ops->logical_or(&y, &a, &b), 0);
        for (int64_t i = 0; i < y.numel; i++)
            assert_int_equal(get(&y, i), get(&a, i) != 0 || met(&b, &y, i) != 0);
        assert_int_equal(ops->logical_not(&y, &a), 0);
        for (int64_t i = 0; i < y.numel; i++)
            assert_int_equal(get(&y, i), !get(&a, i));
        drop(&a);
        drop(&b);
        drop(&y);
    }
    for (int dtype = 0; dtype < FLOATS; dtype++) {
        ds_tensor x = random_tensor(dtype, SHAPE(70), -1, 1), y = anyhow(DS_BOOL, SHAPE(70));

        set(&x, 3, INFINITY);
        set(&x, 40, -INFINITY);
        set(&x, 69, NAN);
        assert_int_equal((ops->isfinite)(&y, &x), 0); /* not the macro of math.h */
        for (int64_t i = 0; i < 70; i++)
            assert_int_equal(get(&y, i), isfinite(get(&x, i)));
        drop(&x);
        drop(&y);
    }
}

static void errors(void **state)
{
    const ds_ops *ops = kernels();
    ds_tensor f = dense(DS_F32, SHAPE(2, 3)), g = dense(DS_BF16, SHAPE(2, 3));
    ds_tensor i = dense(DS_I64, SHAPE(2, 3)), odd = dense(DS_F32, SHAPE(4, 3));
    ds_tensor t = dense(DS_BOOL, SHAPE(2, 3)), u = dense(DS_U8, SHAPE(2, 3));

    (void)state;
    randomise(&i, 0, 5);
    fails(ops->add(&f, &f, &g), DS_EINVAL, "add: the result is f32, but it must be bf16");
    fails(ops->add(&f, &g, &f), DS_EINVAL, "add: an operand is bf16, but it must be f32");
    fails(ops->add(&f, &f, &odd), DS_EINVAL, "add: [4 x 3] does not broadcast to [2 x 3]");
    fails(ops->div(&i, &i, &i), DS_EINVAL, "div: not for i64; use :float() first");
    fails(ops->exp(&i, &i), DS_EINVAL, "exp: not for i64; use :float() first");
    fails(ops->add_scalar(&i, &i, 0.5, 0), DS_EINVAL, "add: 0.5 is not a value of i64");
    fails(ops->mul_scalar(&u, &u, -1, 0), DS_EINVAL, "mul: -1 is not a value of u8");
    fails(ops->where(&f, &f, &f, &f), DS_EINVAL, "where: the condition is f32");
    fails(ops->where(&f, &t, &f, &i), DS_EINVAL, "where: f32 and i64 cannot be mixed");
    fails(ops->logical_and(&t, &t, &f), DS_EINVAL, "logical_and: an operand is f32");
    fails(ops->eq(&f, &f, &f), DS_EINVAL, "eq: the result is f32, but it must be bool");
    fails(ops->clamp(&f, &f, 2, 1), DS_EINVAL, "clamp: no value lies between 2 and 1");
    drop(&f);
    drop(&g);
    drop(&i);
    drop(&odd);
    drop(&t);
    drop(&u);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_input),
        cmocka_unit_test(special_values),
        cmocka_unit_test(two_inputs),
        cmocka_unit_test(not_a_number),
        cmocka_unit_test(large),
        cmocka_unit_test(add_scaled_and_clamp),
        cmocka_unit_test(scaled_by_a_tensor),
        cmocka_unit_test(where_and_masks),
        cmocka_unit_test(logic),
        cmocka_unit_test(transposed_operands),
        cmocka_unit_test(errors),
    };
    int done = each_level(argv);

    (void)argc;

    return done >= 0 ? done : cmocka_run_group_tests_name("elementwise", tests, NULL, NULL);
}
