/* test_linear.c - the linear layer with bias and activation, and its backward pass, against plain
 * loops in double, on every CPU level of this machine. */
#include "tests/c/matrices.h"

#include "tests/c/levels.h"

enum activation { NONE, GELU, GELU_TANH, RELU, SILU, ACTIVATIONS };

static double activate(double *slope, double x, int activation)
{
    double u, t, s;

    switch (activation) {
    case GELU:
        s = 0.5 * erfc(-x * 0.70710678118654752);
        *slope = s + x * exp(-0.5 * x * x) * 0.39894228040143268;
        return x * s;
    case GELU_TANH:
        u = 0.79788456080286536 * (x + 0.044715 * x * x * x);
        t = tanh(u);
        *slope = 0.5 * (1 + t) +
                 0.5 * x * (1 - t * t) * 0.79788456080286536 * (1 + 3 * 0.044715 * x * x);
        return 0.5 * x * (1 + t);
    case RELU:
        *slope = x > 0;
        return x > 0 ? x : 0;
    case SILU:
        s = 1 / (1 + exp(-x));
        *slope = s * (1 + x * (1 - s));
        return x * s;
    default:
        *slope = 1;
        return x;
    }
}

static void check_linear(int dtype, int64_t m, int64_t n, int64_t k, int activation, int with_slope,
                         int bias_dtype, int layout)
{
    ds_tensor y = make(dtype, layout == ROW_GAPS ? ROW_GAPS : ROWS, 2, (int64_t[]){m, n});
    ds_tensor slope = make(dtype, ROWS, 2, (int64_t[]){m, n});
    ds_tensor x = make(dtype, layout, 2, (int64_t[]){m, k});
    ds_tensor w = make(dtype, layout, 2, (int64_t[]){n, k});
    ds_tensor b = make(bias_dtype < 0 ? dtype : bias_dtype, ROWS, 1, (int64_t[]){n});
    void *y_before = copy_of(&y), *slope_before = copy_of(&slope);
    double eps = eps_of(dtype), tiny = dtype == DS_F64 ? 1e-14 : 3e-7;

    randomise(&x, 1);
    randomise(&w, 1);
    randomise(&b, 2);
    if (kernels()->linear(&y, with_slope ? &slope : NULL, &x, &w, bias_dtype < 0 ? NULL : &b,
                          activation))
        fail_msg("%s", ds_error());
    for (int64_t i = 0; i < m * n; i++) {
        double h = 0, size = 0, want, want_slope, before, after;

        for (int64_t l = 0; l < k; l++) {
            double term = get(&x, i / n * k + l) * get(&w, i % n * k + l);

            h += term;
            size += fabs(term);
        }
        before = fabs(h);
        h += bias_dtype < 0 ? 0 : get(&b, i % n);
        want = activate(&want_slope, h, activation);
        /* The product is rounded once to the dtype before the activation: the slope is at most
         * 1.13, and changes by at most 0.8 where it is smooth. */
        after = tiny * (size + 1) + (before + fabs(h)) * eps * 1.2;
        near(get(&y, i), want, after + eps * fabs(want) + (dtype == DS_F16 ? 1e-7 : 0), "y", i);
        if (with_slope && (activation != RELU || fabs(h) > after))
            near(get(&slope, i), want_slope, after + eps * fabs(want_slope), "slope", i);
    }
    margins_kept(&y, y_before);
    if (!with_slope)
        assert_memory_equal(slope_before, slope.data, span(&slope));
    free(slope_before);
    drop(&y), drop(&slope), drop(&x), drop(&w), drop(&b);
}

static void random_layers_match(void **state)
{
    (void)state;
    for (int i = 0; i < 240; i++) {
        int dtype = i % 4, activation = i / 4 % ACTIVATIONS;
        int bias = i % 3 == 0 ? -1 : i % 3 == 1 || dtype == DS_F64 ? dtype : DS_F32;

        check_linear(dtype, between(1, 30), i % 7 ? between(1, 60) : between(500, 600),
                     between(1, 30), activation, activation && i % 2, bias,
                     (int)between(0, LAYOUTS - 1));
    }
}

static void leading_dimensions_are_rows(void **state)
{
    ds_tensor x = make(DS_F32, ROWS, 3, (int64_t[]){2, 3, 5}), flat = x;
    ds_tensor w = make(DS_F32, ROWS, 2, (int64_t[]){4, 5});
    ds_tensor y = make(DS_F32, ROWS, 3, (int64_t[]){2, 3, 4});
    ds_tensor y2 = make(DS_F32, ROWS, 2, (int64_t[]){6, 4});

    (void)state;
    randomise(&x, 1);
    randomise(&w, 1);
    flat.ndim = 2, flat.shape[0] = 6, flat.shape[1] = 5, flat.stride[0] = 5, flat.stride[1] = 1;
    assert_int_equal(kernels()->linear(&y, NULL, &x, &w, NULL, GELU), 0);
    assert_int_equal(kernels()->linear(&y2, NULL, &flat, &w, NULL, GELU), 0);
    assert_memory_equal(y.data, y2.data, 24 * 4);
    drop(&x), drop(&w), drop(&y), drop(&y2);
}

/* x alone decides what the activation sees: w is 1. */
static void activations_hold_at_the_extremes(void **state)
{
    static const double points[] = {0,  -0.0, 1e-30, -1e-30, 0.5, -0.5, 3,   -3,  6,
                                    -6, 12,   -12,   30,     -30, 80,   -80, 1e4, -1e4};
    int n = sizeof points / sizeof *points;

    (void)state;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++)
        for (int activation = GELU; activation < ACTIVATIONS; activation++) {
            ds_tensor x = make(dtype, ROWS, 2, (int64_t[]){n, 1});
            ds_tensor w = make(dtype, ROWS, 2, (int64_t[]){1, 1});
            ds_tensor y = make(dtype, ROWS, 2, (int64_t[]){n, 1});
            ds_tensor slope = make(dtype, ROWS, 2, (int64_t[]){n, 1});

            set(&w, 0, 1);
            for (int i = 0; i < n; i++)
                set(&x, i, points[i]);
            assert_int_equal(kernels()->linear(&y, &slope, &x, &w, NULL, activation), 0);
            for (int i = 0; i < n; i++) {
                double want_slope, want = activate(&want_slope, get(&x, i), activation);

                near(get(&y, i), want, 4 * eps_of(dtype) * fabs(want) + 1e-6, "y", i);
                near(get(&slope, i), want_slope, 4 * eps_of(dtype) + 1e-6, "slope", i);
            }
            set(&x, 3, NAN);
            assert_int_equal(kernels()->linear(&y, &slope, &x, &w, NULL, activation), 0);
            assert_true(isnan(get(&y, 3)));
            drop(&x), drop(&w), drop(&y), drop(&slope);
        }
}

/* The activation as a kernel of its own is that of the layer, also where an output is its input. */
static void activation_alone_matches(void **state)
{
    enum { APART, OVER_Y, OVER_SLOPE, NO_SLOPE_WANTED, WAYS };

    (void)state;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++)
        for (int activation = GELU; activation < ACTIVATIONS; activation++)
            for (int way = APART; way < WAYS; way++) {
                int64_t shape[] = {37, 45};
                ds_tensor h = make(dtype, ROWS, 2, shape), kept = make(dtype, ROWS, 2, shape);
                ds_tensor y = make(dtype, ROWS, 2, shape), slope = make(dtype, ROWS, 2, shape);

                randomise(&h, 3);
                for (int64_t i = 0; i < h.numel; i++)
                    set(&kept, i, get(&h, i));
                assert_int_equal(kernels()->activate(way == OVER_Y ? &h : &y,
                                                     way == NO_SLOPE_WANTED ? NULL
                                                     : way == OVER_SLOPE    ? &h
                                                                            : &slope,
                                                     &h, activation),
                                 0);
                for (int64_t i = 0; i < h.numel; i++) {
                    double s, want = activate(&s, get(&kept, i), activation);
                    double eps = 4 * eps_of(dtype), tiny = dtype == DS_F64 ? 1e-14 : 1e-6;

                    near(get(way == OVER_Y ? &h : &y, i), want, eps * fabs(want) + tiny, "y", i);
                    if (way != NO_SLOPE_WANTED)
                        near(get(way == OVER_SLOPE ? &h : &slope, i), s, eps + tiny, "slope", i);
                }
                assert_int_equal(kernels()->activate(&y, NULL, &h, NONE), DS_EINVAL);
                assert_int_equal(kernels()->activate(&y, NULL, &h, ACTIVATIONS), DS_EINVAL);
                drop(&h), drop(&kept), drop(&y), drop(&slope);
            }
}

static void an_empty_sum_leaves_the_bias(void **state)
{
    (void)state;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++)
        for (int activation = NONE; activation <= RELU; activation += RELU) {
            ds_tensor x = make(dtype, ROWS, 2, (int64_t[]){3, 0});
            ds_tensor w = make(dtype, ROWS, 2, (int64_t[]){4, 0});
            ds_tensor b = make(dtype, ROWS, 1, (int64_t[]){4});
            ds_tensor y = make(dtype, ROWS, 2, (int64_t[]){3, 4});

            for (int i = 0; i < 4; i++)
                set(&b, i, i);
            assert_int_equal(kernels()->linear(&y, NULL, &x, &w, &b, activation), 0);
            for (int i = 0; i < 12; i++)
                assert_true(get(&y, i) == i % 4);
            drop(&x), drop(&w), drop(&b), drop(&y);
        }
}

enum alias { APART, IS_DY, IS_SLOPE, NO_SLOPE, ALIASES };

static void check_backward(int dtype, int db_dtype, int64_t m, int64_t n, int alias, int accumulate)
{
    ds_tensor dy = make(dtype, ROW_GAPS, 2, (int64_t[]){m, n});
    ds_tensor slope = make(dtype, ROWS, 2, (int64_t[]){m, n});
    ds_tensor apart = make(dtype, ROW_GAPS, 2, (int64_t[]){m, n});
    ds_tensor db = make(db_dtype, ROWS, 1, (int64_t[]){n});
    ds_tensor *dh = alias == IS_DY      ? &dy
                    : alias == IS_SLOPE ? &slope
                    : alias == APART    ? &apart
                                        : NULL;
    double *want = malloc((size_t)(m * n) * sizeof *want), eps = eps_of(dtype);
    double *sum = calloc((size_t)n, sizeof *sum), *size = calloc((size_t)n, sizeof *size);
    void *margins;

    randomise(&dy, 1);
    randomise(&slope, 1);
    randomise(&db, 1);
    for (int64_t i = 0; i < m * n; i++)
        want[i] = get(&dy, i) * (alias == NO_SLOPE ? 1 : get(&slope, i));
    margins = dh ? copy_of(dh) : NULL;
    for (int64_t j = 0; j < n; j++)
        sum[j] = accumulate ? get(&db, j) : 0;
    for (int64_t i = 0; i < m * n; i++) {
        sum[i % n] += want[i];
        size[i % n] += fabs(want[i]);
    }
    if (kernels()->linear_backward_bias(dh, &db, &dy, alias == NO_SLOPE ? NULL : &slope,
                                        accumulate))
        fail_msg("%s", ds_error());
    for (int64_t j = 0; j < n; j++)
        near(get(&db, j), sum[j],
             eps_of(db_dtype) * (fabs(sum[j]) + 1) +
                 (dtype == DS_F64 ? 1e-14 : 1e-6) * (1 + size[j]),
             "db", j);
    for (int64_t i = 0; dh && i < m * n; i++)
        near(get(dh, i), want[i], 1.01 * eps * fabs(want[i]) + (dtype == DS_F16 ? 1e-7 : 1e-30),
             "dh", i);
    if (dh)
        margins_kept(dh, margins);
    free(want), free(sum), free(size);
    drop(&dy), drop(&slope), drop(&apart), drop(&db);
}

static void backward_matches(void **state)
{
    (void)state;
    for (int i = 0; i < 128; i++) {
        int dtype = i % 4, alias = i / 4 % ALIASES;

        check_backward(dtype, i % 3 || dtype == DS_F64 ? dtype : DS_F32, between(1, 200),
                       i % 5 ? between(1, 70) : 512, alias, i / 16 % 2);
    }
}

/* dh, db and a of linear_backward_act: dy [m, n], w [n, k], h [m, k]. */
static void check_fused(int dtype, int db_dtype, int64_t m, int64_t n, int64_t k, int activation,
                        int with_a, int accumulate)
{
    ds_tensor dy = make(dtype, ROWS, 2, (int64_t[]){m, n}),
              w = make(dtype, ROWS, 2, (int64_t[]){n, k});
    ds_tensor h = make(dtype, ROWS, 2, (int64_t[]){m, k}), dh = make(dtype, ROW_GAPS, 2, h.shape),
              a = make(dtype, ROW_GAPS, 2, h.shape);
    ds_tensor db = make(db_dtype, ROWS, 1, (int64_t[]){k});
    double eps = eps_of(dtype), tiny = dtype == DS_F64 ? 1e-13 : 1e-6;
    double *sum = calloc((size_t)k, sizeof *sum), *off = calloc((size_t)k, sizeof *off);
    void *dh_before = copy_of(&dh), *a_before = copy_of(&a);

    randomise(&dy, 1), randomise(&w, 1), randomise(&h, 3), randomise(&db, 1);
    for (int64_t j = 0; j < k; j++)
        sum[j] = accumulate ? get(&db, j) : 0;
    if (kernels()->linear_backward_act(&dh, with_a ? &a : NULL, &db, &dy, &w, &h, activation,
                                       accumulate))
        fail_msg("%s", ds_error());
    for (int64_t i = 0; i < m * k; i++) {
        double slope, y = activate(&slope, get(&h, i), activation), d = 0, size = 0, near_by;

        for (int64_t l = 0; l < n; l++) {
            double term = get(&dy, i / k * n + l) * get(&w, l * k + i % k);

            d += term, size += fabs(term);
        }
        /* rounded as a product, and again times the slope */
        near_by =
            tiny * (size + 1) + 2.2 * eps * fabs(d) * 1.2 + (dtype < DS_F64 ? 3e-4 * size : 0);
        near(get(&dh, i), d * slope, near_by, "dh", i);
        if (with_a)
            near(get(&a, i), y, tiny + eps * fabs(y) * 1.01 + (dtype == DS_BF16 ? 3e-4 : 0), "a",
                 i);
        sum[i % k] += d * slope, off[i % k] += near_by;
    }
    for (int64_t j = 0; j < k; j++)
        near(get(&db, j), sum[j], off[j] + eps_of(db_dtype) * (fabs(sum[j]) + 1), "db", j);
    margins_kept(&dh, dh_before);
    if (with_a)
        margins_kept(&a, a_before);
    else
        assert_memory_equal(a_before, a.data, span(&a)), free(a_before);
    free(sum), free(off);
    drop(&dy), drop(&w), drop(&h), drop(&dh), drop(&a), drop(&db);
}

static void backward_through_an_activation_matches(void **state)
{
    (void)state;
    for (int i = 0; i < 128; i++) {
        int dtype = i % 4, activation = 1 + i / 4 % (ACTIVATIONS - 1);

        check_fused(dtype, i % 3 || dtype == DS_F64 ? dtype : DS_F32, between(1, 100),
                    between(1, 40), i % 5 ? between(1, 70) : 512, activation, i % 7 > 0,
                    i / 16 % 2);
    }
}

static void both_results_are_those_of_two_kernels(void **state)
{
    (void)state;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++) {
        ds_tensor x = make(dtype, ROWS, 2, (int64_t[]){7, 20}),
                  w = make(dtype, ROWS, 2, (int64_t[]){33, 20});
        ds_tensor b = make(dtype, ROWS, 1, w.shape), y = make(dtype, ROWS, 2, (int64_t[]){7, 33});
        ds_tensor h = make(dtype, ROWS, 2, y.shape), y2 = make(dtype, ROWS, 2, y.shape),
                  h2 = make(dtype, ROWS, 2, y.shape);

        randomise(&x, 1), randomise(&w, 1), randomise(&b, 1);
        assert_int_equal(kernels()->linear_aux(&y, &h, &x, &w, &b, SILU), 0);
        assert_int_equal(kernels()->linear(&h2, NULL, &x, &w, &b, NONE), 0);
        assert_int_equal(kernels()->activate(&y2, NULL, &h2, SILU), 0);
        for (int i = 0; i < 7 * 33; i++)
            assert_true(get(&y, i) == get(&y2, i) && get(&h, i) == get(&h2, i));
        drop(&x), drop(&w), drop(&b), drop(&y), drop(&h), drop(&y2), drop(&h2);
    }
}

static void backward_without_db_writes_dh(void **state)
{
    ds_tensor dy = make(DS_F32, ROWS, 2, (int64_t[]){5, 7}),
              slope = make(DS_F32, ROWS, 2, dy.shape);

    (void)state;
    randomise(&dy, 1);
    for (int i = 0; i < 35; i++)
        set(&slope, i, 2);
    assert_int_equal(kernels()->linear_backward_bias(&slope, NULL, &dy, &slope, 0), 0);
    for (int i = 0; i < 35; i++)
        assert_true(get(&slope, i) == 2 * get(&dy, i));
    drop(&dy), drop(&slope);
}

/* dw and db as matmul and linear_backward_bias make them, to the bit. */
static void check_weight(int dtype, int low, int64_t m, int64_t n, int64_t k, int accumulate,
                         int accumulate_db, int with_db)
{
    int dw_dtype = low || dtype == DS_F64 ? dtype : DS_F32;
    ds_tensor dy = make(dtype, ROW_GAPS, 2, (int64_t[]){m, n}), across = dy;
    ds_tensor x = make(dtype, ROWS, 2, (int64_t[]){m, k});
    ds_tensor dw = make(dw_dtype, ROWS, 2, (int64_t[]){n, k}),
              dw2 = make(dw_dtype, ROWS, 2, dw.shape);
    ds_tensor db = make(dw_dtype, ROWS, 1, &n), db2 = make(dw_dtype, ROWS, 1, &n);

    randomise(&dy, 1), randomise(&x, 1), randomise(&dw, 1), randomise(&db, 1);
    memcpy(dw2.data, dw.data, (size_t)span(&dw)), memcpy(db2.data, db.data, (size_t)span(&db));
    across.shape[0] = n, across.shape[1] = m;
    across.stride[0] = dy.stride[1], across.stride[1] = dy.stride[0];
    across.dense = 0;
    if (kernels()->linear_backward_weight(&dw, with_db ? &db : NULL, &dy, &x, accumulate,
                                          accumulate_db))
        fail_msg("%s", ds_error());
    if (with_db)
        assert_int_equal(kernels()->linear_backward_bias(NULL, &db2, &dy, NULL, accumulate_db), 0);
    assert_int_equal(kernels()->matmul(&dw2, &across, &x, 1, accumulate), 0);
    assert_memory_equal(dw.data, dw2.data, span(&dw));
    assert_memory_equal(db.data, db2.data, span(&db));
    drop(&dy), drop(&x), drop(&dw), drop(&dw2), drop(&db), drop(&db2);
}

static void weight_and_bias_are_those_of_two_kernels(void **state)
{
    (void)state;
    for (int i = 0; i < 48; i++)
        check_weight(i % 4, i / 4 % 2, between(1, 60), between(1, 60), between(1, 60), i / 8 % 2,
                     i / 16 % 2, i % 5 != 0);
}

static void same_bits_every_time(void **state)
{
    (void)state;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++) {
        ds_tensor dy = make(dtype, ROWS, 2, (int64_t[]){300, 256}),
                  db = make(dtype, ROWS, 1, dy.shape + 1);
        void *first;

        randomise(&dy, 1);
        assert_int_equal(kernels()->linear_backward_bias(NULL, &db, &dy, NULL, 0), 0);
        first = copy_of(&db);
        for (int again = 0; again < 3; again++) {
            assert_int_equal(kernels()->linear_backward_bias(NULL, &db, &dy, NULL, 0), 0);
            assert_memory_equal(first, db.data, span(&db));
        }
        free(first);
        drop(&dy), drop(&db);
    }
}

static void wrong_calls_are_refused(void **state)
{
    ds_tensor x = make(DS_F32, ROWS, 2, (int64_t[]){3, 5}),
              w = make(DS_F32, ROWS, 2, (int64_t[]){4, 5});
    ds_tensor y = make(DS_F32, ROWS, 2, (int64_t[]){3, 4}),
              b = make(DS_F32, ROWS, 1, (int64_t[]){3});
    ds_tensor other = w;

    (void)state;
    assert_int_equal(kernels()->linear(&y, NULL, &x, &w, &b, 0), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "b [4] for w [4 x 5]"));
    assert_int_equal(kernels()->linear(&y, &y, &x, &w, NULL, NONE), DS_EINVAL);
    assert_int_equal(kernels()->linear(&y, NULL, &x, &w, NULL, ACTIVATIONS), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "activation 5"));
    other.dtype = DS_BF16;
    assert_int_equal(kernels()->linear(&y, NULL, &x, &other, NULL, 0), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "f32 of f32 and bf16"));
    other = y, other.shape[0] = 2, other.numel = 8;
    assert_int_equal(kernels()->linear(&other, NULL, &x, &w, NULL, 0), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "3 rows into 2"));
    assert_int_equal(kernels()->linear_backward_bias(NULL, &b, &y, NULL, 0), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "4 elements"));
    assert_int_equal(kernels()->linear_backward_act(&y, NULL, NULL, &x, &w, &y, GELU, 0),
                     DS_EINVAL);
    assert_non_null(strstr(ds_error(), "dy [3 x N] and w [N x 4]"));
    assert_int_equal(kernels()->linear_backward_act(&x, NULL, NULL, &y, &w, &x, NONE, 0),
                     DS_EINVAL);
    assert_int_equal(kernels()->linear_backward_act(&y, NULL, NULL, &y, &w, &x, GELU, 0),
                     DS_EINVAL);
    assert_int_equal(kernels()->linear_backward_weight(&w, &b, &y, &x, 0, 0), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "db dense with 4 elements"));
    assert_int_equal(kernels()->linear_backward_weight(&y, NULL, &y, &x, 0, 0), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "[3 x 4] of [4 x 3] and [3 x 5]"));
    assert_int_equal(kernels()->linear_backward_weight(&w, NULL, &b, &x, 0, 0), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "not 1 dimensions"));
    drop(&x), drop(&w), drop(&y), drop(&b);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_layers_match),
        cmocka_unit_test(leading_dimensions_are_rows),
        cmocka_unit_test(activations_hold_at_the_extremes),
        cmocka_unit_test(activation_alone_matches),
        cmocka_unit_test(an_empty_sum_leaves_the_bias),
        cmocka_unit_test(backward_matches),
        cmocka_unit_test(backward_through_an_activation_matches),
        cmocka_unit_test(both_results_are_those_of_two_kernels),
        cmocka_unit_test(backward_without_db_writes_dh),
        cmocka_unit_test(weight_and_bias_are_those_of_two_kernels),
        cmocka_unit_test(same_bits_every_time),
        cmocka_unit_test(wrong_calls_are_refused),
    };
    int done = each_level(argv);

    (void)argc;
    return done >= 0 ? done : cmocka_run_group_tests(tests, NULL, NULL);
}
