/* What several ranks have becomes one: the bits that adding in the order of the ranks gives. */
#include "tests/c/helpers.h"
#include "tests/c/levels.h"

#define MOST 5

static double joined(double a, double x, int op)
{
    if (op == DS_MAX)
        return isnan(a) || a > x ? a : x;
    if (op == DS_MIN)
        return isnan(a) || a < x ? a : x;
    return a + x;
}

/* Element i, rounded where the kernel rounds. */
static double expected(const ds_tensor *parts, int n, int64_t i, int op, double scale, int dtype)
{
    int wide = parts[0].dtype == DS_F64 || parts[0].dtype > DS_F64 ? DS_F64 : DS_F32;
    double a = get(&parts[0], i);

    for (int r = 1; r < n; r++)
        a = rounded(wide, joined(a, get(&parts[r], i), op));
    if (op == DS_MEAN)
        a = rounded(wide, a / n);
    return rounded(dtype, rounded(wide, a * rounded(wide, scale)));
}

static double value_of(int dtype)
{
    if (dtype == DS_BOOL)
        return (double)between(0, 1);
    if (dtype == DS_U8)
        return (double)between(0, 40);
    return dtype < DS_I64 ? random01() * 16 - 8 : (double)between(-1000, 1000);
}

static void one_case(int from, int to, int n, int op, int64_t numel, double scale)
{
    const void *data[MOST];
    ds_tensor parts[MOST], y = dense(to, SHAPE(numel));

    for (int r = 0; r < n; r++) {
        parts[r] = dense(from, SHAPE(numel));
        for (int64_t i = 0; i < numel; i++)
            set(&parts[r], i, value_of(from));
        data[r] = parts[r].data;
    }
    if (numel > 2 && from < DS_I64)
        set(&parts[n - 1], 2, NAN);
    assert_int_equal(kernels()->reduce_ranks(&y, data, from, n, op, scale), 0);
    for (int64_t i = 0; i < numel; i++) {
        double want = expected(parts, n, i, op, scale, to), got = get(&y, i);

        if (got != want && !(isnan(got) && isnan(want)))
            fail_msg("%s from %s, %d parts, op %d, scale %g: [%lld of %lld] is %.9g, not %.9g",
                     ds_name_of(to), ds_name_of(from), n, op, scale, (long long)i, (long long)numel,
                     got, want);
    }
    for (int r = 0; r < n; r++)
        drop(&parts[r]);
    drop(&y);
}

static int has(int dtype, int op)
{
    return dtype <= DS_F64 || (op != DS_MEAN && !(dtype == DS_BOOL && op == DS_SUM));
}

static void every_dtype_and_reduction(void **state)
{
    static const int64_t sizes[] = {0, 1, 3, 16, 17, 64, 67, 1031, 20011};

    (void)state;
    for (int dtype = 0; dtype < DS_DTYPES; dtype++)
        for (int op = 0; op < DS_REDUCTIONS; op++)
            for (int n = 1; has(dtype, op) && n <= MOST; n++)
                for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
                    if (sizes[s] < 10000 || n == 3) /* the last: several threads */
                        one_case(dtype, dtype, n, op, sizes[s], 1);
}

static void scales_before_it_rounds(void **state)
{
    (void)state;
    for (int dtype = 0; dtype < FLOATS; dtype++)
        for (int op = 0; op < DS_REDUCTIONS; op++)
            for (int n = 1; n <= 4; n++)
                one_case(dtype, dtype, n, op, 1031, 0.3);
}

static void parts_may_be_narrower(void **state)
{
    (void)state;
    for (int from = 0; from <= DS_F16; from++)
        for (int to = 0; to <= DS_F16; to++)
            for (int n = 1; n <= 3; n++)
                one_case(from, to, n, DS_MEAN, 1031, 2);
}

static void the_result_may_be_a_part(void **state)
{
    (void)state;
    for (int dtype = 0; dtype < DS_BOOL; dtype++) {
        ds_tensor a = dense(dtype, SHAPE(5003)), b = dense(dtype, SHAPE(5003));
        const void *data[] = {a.data, b.data, a.data};

        for (int64_t i = 0; i < 5003; i++) {
            set(&a, i, (double)(i % 7));
            set(&b, i, (double)(i % 5));
        }
        assert_int_equal(kernels()->reduce_ranks(&a, data, dtype, 3, DS_SUM, 1), 0);
        for (int64_t i = 0; i < 5003; i++)
            assert_true(get(&a, i) == (double)(i % 7 * 2 + i % 5));
        drop(&a);
        drop(&b);
    }
}

static void sums_of_integers_wrap_around(void **state)
{
    int32_t a = INT32_MAX, b = 2, sum;
    const void *data[] = {&a, &b};
    ds_tensor y = {.data = &sum, .numel = 1, .dtype = DS_I32, .dense = 1};

    (void)state;
    assert_int_equal(kernels()->reduce_ranks(&y, data, DS_I32, 2, DS_SUM, 1), 0);
    assert_int_equal(sum, INT32_MIN + 1);
}

static void nonsense_is_refused(void **state)
{
    ds_tensor y = dense(DS_I32, SHAPE(3)), x = dense(DS_F32, SHAPE(3));
    const void *data[] = {y.data};

    (void)state;
    assert_int_equal(kernels()->reduce_ranks(&y, data, DS_I32, 1, DS_MEAN, 1), DS_EINVAL);
    assert_int_equal(kernels()->reduce_ranks(&y, data, DS_I32, 1, DS_SUM, 2), DS_EINVAL);
    assert_int_equal(kernels()->reduce_ranks(&y, data, DS_F32, 1, DS_SUM, 1), DS_EINVAL);
    assert_int_equal(kernels()->reduce_ranks(&x, data, DS_F64, 1, DS_SUM, 1), DS_EINVAL);
    assert_int_equal(kernels()->reduce_ranks(&x, data, DS_F32, 0, DS_SUM, 1), DS_EINVAL);
    assert_int_equal(kernels()->reduce_ranks(&x, data, DS_F32, 1, 9, 1), DS_EINVAL);
    drop(&x);
    drop(&y);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_dtype_and_reduction),    cmocka_unit_test(scales_before_it_rounds),
        cmocka_unit_test(parts_may_be_narrower),        cmocka_unit_test(the_result_may_be_a_part),
        cmocka_unit_test(sums_of_integers_wrap_around), cmocka_unit_test(nonsense_is_refused),
    };
    int done = each_level(argv);

    (void)argc;
    return done >= 0 ? done : cmocka_run_group_tests_name("ranks", tests, NULL, NULL);
}
