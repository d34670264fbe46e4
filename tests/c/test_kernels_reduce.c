/* Reductions, and what goes along one dimension, at every CPU level, against loops in f64. */
#include "tests/c/helpers.h"
#include "tests/c/levels.h"

#define ROUNDS 10

typedef struct shape {
    int ndim;
    int64_t size[DS_MAX_DIM];
} shape;

static shape any_shape(int least, int64_t elements)
{
    shape s = {.ndim = (int)between(least, 5)};

    for (int i = s.ndim - 1; i >= 0; i--) {
        int64_t limit = elements < 600 ? elements : between(0, 2) ? 9 : 600;

        s.size[i] = between(0, 30) == 0 ? 0 : between(1, limit);
        elements /= s.size[i] ? s.size[i] : 1;
    }
    return s;
}

/* s with some dimensions of size 1. */
static shape reduced(shape s)
{
    for (int i = 0; i < s.ndim; i++)
        if (between(0, 1))
            s.size[i] = 1;
    return s;
}

/* Where element i of x goes in y, which has size 1 in some dimensions. */
static int64_t target(const ds_tensor *y, const ds_tensor *x, int64_t i)
{
    int64_t at = 0, step = 1;

    for (int d = x->ndim - 1; d >= 0; d--) {
        at += (y->shape[d] == 1 ? 0 : i % x->shape[d]) * step;
        i /= x->shape[d];
        step *= y->shape[d];
    }
    return at;
}

enum { SUM, PROD, MAX, MIN, ALL, ANY };

static double join(int kind, double a, double b)
{
    switch (kind) {
    case SUM:
        return a + b;
    case PROD:
        return a * b;
    case MAX:
        return isnan(a) || isnan(b) ? NAN : a > b ? a : b;
    case MIN:
        return isnan(a) || isnan(b) ? NAN : a < b ? a : b;
    case ALL:
        return a != 0 && b != 0;
    default:
        return a != 0 || b != 0;
    }
}

/* The reference: results, and in *size the sum of magnitudes that bounds the rounding. */
static double *reference(int kind, const ds_tensor *y, const ds_tensor *x, double **size)
{
    static const double first[] = {0, 1, -INFINITY, INFINITY, 1, 0};
    double *want = malloc((size_t)(y->numel + 1) * sizeof *want);

    *size = calloc((size_t)(y->numel + 1), sizeof **size);
    for (int64_t i = 0; i < y->numel; i++)
        want[i] = first[kind];
    for (int64_t i = 0; i < x->numel; i++) {
        int64_t at = target(y, x, i);

        want[at] = join(kind, want[at], get(x, i));
        (*size)[at] += fabs(get(x, i));
    }
    return want;
}

static void sums(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * DS_DTYPES; round++) {
        int dtype = round % DS_DTYPES, real = ds_is_float(dtype), accumulate = (int)between(0, 1);
        int out = !real ? DS_I64 : dtype == DS_F64 ? DS_F64 : between(0, 1) ? DS_F32 : dtype;
        shape s = any_shape(0, 30000), r = reduced(s);
        ds_tensor x =
            random_tensor(dtype, s.ndim, s.size, dtype >= DS_U8 ? 0 : -2, dtype == DS_BOOL ? 1 : 3);
        ds_tensor y = random_tensor(out, r.ndim, r.size, -5, 5);
        double *size, *want = reference(SUM, &y, &x, &size);
        double per = y.numel ? (double)x.numel / (double)y.numel : 0;

        for (int64_t i = 0; i < y.numel && accumulate; i++)
            want[i] += get(&y, i);
        assert_int_equal(ops->sum(&y, &x, accumulate), 0);
        for (int64_t i = 0; i < y.numel; i++)
            near(get(&y, i), want[i],
                 real ? within(out, want[i], 2) + size[i] * (dtype == DS_F64 ? 1e-14 : 1e-6) : 0,
                 "sum", i);
        if (real) {
            assert_int_equal(ops->mean(&y, &x), 0);
            free(want);
            free(size);
            want = reference(SUM, &y, &x, &size);
            for (int64_t i = 0; i < y.numel; i++)
                near(get(&y, i), want[i] / per,
                     within(out, want[i] / per, 2) + size[i] / per * 1e-6, "mean", i);
        }
        free(want);
        free(size);
        drop(&x);
        drop(&y);
    }
}

typedef int reduce_kernel(ds_tensor *, const ds_tensor *);

static void others(void **state)
{
    const ds_ops *ops = kernels();
    const struct {
        int kind;
        const char *name;
        reduce_kernel *kernel;
    } list[] = {{PROD, "prod", ops->prod},
                {MAX, "max", ops->max},
                {MIN, "min", ops->min},
                {ALL, "all", ops->all},
                {ANY, "any", ops->any}};

    (void)state;
    for (int round = 0; round < ROUNDS * 16; round++) {
        int k = round % 5, kind = list[k].kind;
        int dtype = kind >= ALL ? DS_BOOL : round / 5 % DS_BOOL;
        int out = kind == PROD && !ds_is_float(dtype) ? DS_I64 : dtype;
        double low = kind == PROD ? ds_is_float(dtype) ? 0.7 : 1 : dtype >= DS_U8 ? 0 : -9;
        double high = kind == PROD ? ds_is_float(dtype) ? 1.4 : 1 : dtype == DS_BOOL ? 1 : 9;
        shape s = any_shape(0, kind == PROD ? 300 : 20000), r = reduced(s);
        ds_tensor x = random_tensor(dtype, s.ndim, s.size, low, high);
        ds_tensor y = anyhow(out, r.ndim, r.size);
        double *size, *want;

        for (int i = 0; i < 3 && x.numel && kind == PROD && !ds_is_float(dtype); i++)
            set(&x, between(0, x.numel - 1), 3);
        if (kind == ALL)
            for (int64_t i = 0; i < x.numel; i++)
                set(&x, i, between(0, 400) != 0);
        if (ds_is_float(dtype) && kind != PROD && x.numel && between(0, 1))
            set(&x, between(0, x.numel - 1), NAN);
        want = reference(kind, &y, &x, &size);
        if (x.numel == 0 && y.numel > 0 && (kind == MAX || kind == MIN)) {
            fails(list[k].kernel(&y, &x), DS_EINVAL, "no elements");
        } else {
            assert_int_equal(list[k].kernel(&y, &x), 0);
            for (int64_t i = 0; i < y.numel; i++)
                near(get(&y, i), rounded(out, want[i]),
                     kind == PROD && ds_is_float(dtype) ? fabs(want[i]) * (2 * eps_of(out) + 1e-13)
                                                        : 0,
                     list[k].name, i);
        }
        free(want);
        free(size);
        drop(&x);
        drop(&y);
    }
}

/* Long sums: as accurate as one rounding, and the same bits for every thread count. */
static void long_sums(void **state)
{
    static const int64_t shapes[][2] = {{1, 1 << 17}, {1 << 12, 64}, {64, 1 << 12}, {150, 1500}};
    const ds_ops *ops = kernels();
    int most = omp_get_max_threads();

    (void)state;
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
        for (int dim = 0; dim < 3; dim++) {
            int64_t size[2] = {dim == 1 ? shapes[k][0] : 1, dim == 0 ? shapes[k][1] : 1};
            ds_tensor x = dense(DS_F32, 2, shapes[k]), y = dense(DS_F32, 2, size);
            ds_tensor z = dense(DS_F32, 2, size);
            double *sizes, *want;

            for (int64_t i = 0; i < x.numel; i++)
                ((float *)x.data)[i] = 1 + (float)random01() * 0.01f;
            want = reference(SUM, &y, &x, &sizes);
            assert_int_equal(ops->sum(&y, &x, 0), 0);
            for (int64_t i = 0; i < y.numel; i++)
                near(get(&y, i), want[i], want[i] * 3e-7, "long sum", i);
            omp_set_num_threads(1);
            assert_int_equal(ops->sum(&z, &x, 0), 0);
            omp_set_num_threads(most);
            assert_memory_equal(y.data, z.data, (size_t)y.numel * 4);
            free(want);
            free(sizes);
            drop(&x);
            drop(&y);
            drop(&z);
        }
}

static void squares(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int dtype = 0; dtype < FLOATS; dtype++)
        for (int64_t n = 0; n < 200000; n = n * 3 + 1) {
            ds_tensor x = dense(dtype, SHAPE(n)), part = x;
            double sum = -1, want = 0, first, second;
            int64_t half = 65536;

            randomise(&x, -1, 1);
            for (int64_t i = 0; i < n; i++)
                want += get(&x, i) * get(&x, i);
            assert_int_equal(ops->sum_squares(&sum, &x), 0);
            near(sum, want, want * 1e-6, "sum_squares", n);
            if (n > half) { /* ranges of whole blocks add up to the same bits */
                part.numel = part.shape[0] = half;
                assert_int_equal(ops->sum_squares(&first, &part), 0);
                part.data = (char *)x.data + half * ds_bytes_of(dtype);
                part.numel = part.shape[0] = n - half;
                if (n <= 2 * half) {
                    assert_int_equal(ops->sum_squares(&second, &part), 0);
                    assert_true(first + second == sum);
                }
            }
            if (n) {
                set(&x, n / 2, INFINITY);
                assert_int_equal(ops->sum_squares(&sum, &x), 0);
                assert_true(isinf(sum));
                set(&x, n / 3, NAN);
                assert_int_equal(ops->sum_squares(&sum, &x), 0);
                assert_true(isnan(sum));
            }
            drop(&x);
        }
}

/* ---- along a dimension */

/* Before in the order of sort: NaN is the largest; -0 equals 0. */
static int less(double a, double b)
{
    return isnan(b) ? !isnan(a) : a < b;
}

static int64_t along(const ds_tensor *x, int dim, int64_t line, int64_t i)
{
    int64_t inner = 1, n = x->shape[dim];

    for (int d = dim + 1; d < x->ndim; d++)
        inner *= x->shape[d];
    return (line / inner * n + i) * inner + line % inner;
}

static void check_order(const ds_tensor *values, const ds_tensor *indices, const ds_tensor *x,
                        int dim, int descending)
{
    int64_t n = x->shape[dim], k = values->shape[dim], lines = n ? x->numel / n : 0;
    char *seen = malloc((size_t)n + 1);

    for (int64_t line = 0; line < lines; line++) {
        double last = 0;
        int64_t last_index = -1, outside = 0;

        memset(seen, 0, (size_t)n + 1);
        for (int64_t i = 0; i < k; i++) {
            double v = get(values, along(values, dim, line, i));
            int64_t index = (int64_t)get(indices, along(indices, dim, line, i));

            assert_true(index >= 0 && index < n && !seen[index]++);
            near(v, get(x, along(x, dim, line, index)), 0, "value at its index", i);
            if (i > 0) {
                assert_false(descending ? less(last, v) : less(v, last));
                if (!less(last, v) && !less(v, last))
                    assert_true(last_index < index);
            }
            last = v;
            last_index = index;
        }
        for (int64_t i = 0; i < n && k > 0; i++) { /* nothing better was left out */
            double v = get(x, along(x, dim, line, i));

            outside += !seen[i];
            if (!seen[i]) {
                assert_false(descending ? less(last, v) : less(v, last));
                if (!less(last, v) && !less(v, last))
                    assert_true(i > last_index);
            }
        }
        assert_int_equal(outside, k ? n - k : 0);
    }
    free(seen);
}

static void orders(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 16; round++) {
        int dtype = round % DS_DTYPES, flag = (int)between(0, 1);
        shape s = any_shape(1, 3000), sk = s;
        int dim = (int)between(0, s.ndim - 1);
        double spread = between(0, 1) ? 3 : 100;
        ds_tensor x, v, i, kv, ki;

        x = random_tensor(dtype, s.ndim, s.size, dtype >= DS_U8 ? 0 : -spread,
                          dtype == DS_BOOL ? 1 : spread);
        for (int64_t j = 0; j < x.numel && ds_is_float(dtype); j++)
            set(&x, j, between(0, 30) == 0 ? NAN : between(0, 9) == 0 ? -0.0 : rint(get(&x, j)));
        v = anyhow(dtype, s.ndim, s.size);
        i = anyhow(DS_I64, s.ndim, s.size);
        assert_int_equal(ops->sort(&v, &i, &x, dim, flag), 0);
        check_order(&v, &i, &x, dim, flag);
        sk.size[dim] = between(0, s.size[dim]);
        kv = anyhow(dtype, sk.ndim, sk.size);
        ki = anyhow(DS_I64, sk.ndim, sk.size);
        assert_int_equal(ops->topk(&kv, &ki, &x, dim, flag), 0);
        check_order(&kv, &ki, &x, dim, flag);
        drop(&x);
        drop(&v);
        drop(&i);
        drop(&kv);
        drop(&ki);
    }
}

static void extremes(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 16; round++) {
        int dtype = round % DS_DTYPES, largest = (int)between(0, 1);
        shape s = any_shape(1, 6000), one = s;
        int dim = (int)between(0, s.ndim - 1);
        int64_t lines;
        ds_tensor x, y;

        one.size[dim] = 1;
        x = random_tensor(dtype, s.ndim, s.size, dtype >= DS_U8 ? 0 : -50,
                          dtype == DS_BOOL ? 1 : 50);
        for (int64_t j = 0; j < x.numel && ds_is_float(dtype); j++)
            set(&x, j, between(0, 900) == 0 ? NAN : rint(get(&x, j)));
        y = anyhow(DS_I64, one.ndim, one.size);
        if (s.size[dim] == 0) {
            fails((largest ? ops->argmax : ops->argmin)(&y, &x, dim), DS_EINVAL, "no elements");
            lines = 0;
        } else {
            assert_int_equal((largest ? ops->argmax : ops->argmin)(&y, &x, dim), 0);
            lines = y.numel;
        }
        for (int64_t line = 0; line < lines; line++) {
            int64_t best = 0;

            for (int64_t i = 1; i < s.size[dim]; i++) {
                double v = get(&x, along(&x, dim, line, i)),
                       b = get(&x, along(&x, dim, line, best));

                if (!isnan(b) && (isnan(v) || (largest ? v > b : v < b)))
                    best = i;
            }
            assert_int_equal(get(&y, along(&y, dim, line, 0)), best);
        }
        drop(&x);
        drop(&y);
    }
}

static void running_sums(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 16; round++) {
        int dtype = round % DS_DTYPES, reverse = (int)between(0, 1);
        int out = ds_is_float(dtype) ? dtype : DS_I64;
        shape s = any_shape(1, 6000);
        int dim = (int)between(0, s.ndim - 1);
        ds_tensor x =
            random_tensor(dtype, s.ndim, s.size, dtype >= DS_U8 ? 0 : -3, dtype == DS_BOOL ? 1 : 3);
        ds_tensor y = anyhow(out, s.ndim, s.size);
        int64_t n = s.size[dim], lines = n ? x.numel / n : 0;

        assert_int_equal(ops->cumsum(&y, &x, dim, reverse), 0);
        for (int64_t line = 0; line < lines; line++) {
            double sum = 0;

            for (int64_t i = 0; i < n; i++) {
                int64_t at = along(&x, dim, line, reverse ? n - 1 - i : i);

                sum += get(&x, at);
                near(get(&y, at), sum, ds_is_float(out) ? within(out, sum, 1) + 1e-12 : 0, "cumsum",
                     at);
            }
        }
        drop(&x);
        drop(&y);
    }
}

static void errors(void **state)
{
    const ds_ops *ops = kernels();
    ds_tensor f = dense(DS_F32, SHAPE(4, 3)), i = dense(DS_I64, SHAPE(4, 3));
    ds_tensor one = dense(DS_F32, SHAPE(1, 3)), b = dense(DS_BOOL, SHAPE(1, 3));
    ds_tensor odd = dense(DS_F32, SHAPE(2, 3)), w = dense(DS_I64, SHAPE(1, 3));

    (void)state;
    randomise(&f, 0, 1);
    fails(ops->mean(&w, &i), DS_EINVAL, "mean: not for i64; use :float() first");
    fails(ops->sum(&one, &i, 0), DS_EINVAL, "sum: f32 of 2 dimensions cannot hold");
    fails(ops->sum(&odd, &f, 0), DS_EINVAL, "sum: [2 x 3] does not broadcast to [4 x 3]");
    fails(ops->all(&b, &f), DS_EINVAL, "all: not for f32, only for bool");
    fails(ops->argmax(&one, &f, 0), DS_EINVAL, "argmax: the result must be i64");
    fails(ops->argmax(&w, &f, 5), DS_EINVAL, "argmax: dimension 6 is not in a tensor of 2");
    fails(ops->topk(&f, &i, &one, 0, 1), DS_EINVAL, "topk: cannot take 4 of 1");
    drop(&f);
    drop(&i);
    drop(&one);
    drop(&b);
    drop(&odd);
    drop(&w);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sums),         cmocka_unit_test(others), cmocka_unit_test(long_sums),
        cmocka_unit_test(squares),      cmocka_unit_test(orders), cmocka_unit_test(extremes),
        cmocka_unit_test(running_sums), cmocka_unit_test(errors),
    };
    int done = each_level(argv);

    (void)argc;
    return done >= 0 ? done : cmocka_run_group_tests_name("reduce", tests, NULL, NULL);
}
