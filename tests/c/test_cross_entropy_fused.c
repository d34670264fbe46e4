/* test_cross_entropy_fused.c - linear_cross_entropy against plain loops in double, on every CPU
 * level of this machine. */
#include "tests/c/matrices.h"

#include "tests/c/levels.h"

typedef struct call {
    int64_t n, v, k, ignore;
    int64_t count; /* rows that are not ignored */
    int dtype, accumulate;
    double seed;
    ds_tensor loss, dx, dw, scratch, carry, x, w, target;
} call;

static call start(int dtype, int64_t n, int64_t v, int64_t k, int64_t chunk, int layout)
{
    call c = {.n = n, .v = v, .k = k, .ignore = -100, .dtype = dtype, .seed = 1};
    int wide = dtype == DS_F64 ? DS_F64 : DS_F32;

    c.loss = make(wide, ROWS, 0, NULL);
    c.dx = make(dtype, layout, 2, (int64_t[]){n, k});
    c.dw = make(wide, ROWS, 2, (int64_t[]){v, k});
    c.scratch = make(dtype, ROWS, 2, (int64_t[]){chunk, (v + 15) / 16 * 16});
    c.x = make(dtype, layout, 2, (int64_t[]){n, k});
    c.w = make(dtype, layout, 2, (int64_t[]){v, k});
    c.target = make(DS_I64, ROWS, 1, (int64_t[]){n});
    randomise(&c.x, 1);
    randomise(&c.w, 1);
    for (int64_t i = 0; i < c.scratch.numel; i++)
        set(&c.scratch, i, NAN); /* what is in the padding must not matter */
    for (int64_t i = 0; i < n; i++)
        set(&c.target, i, (double)(random01() < 0.2 ? c.ignore : between(0, v - 1)));
    return c;
}

static void end(call *c)
{
    drop(&c->loss), drop(&c->dx), drop(&c->dw), drop(&c->scratch);
    drop(&c->x), drop(&c->w), drop(&c->target);
    if (c->carry.data)
        drop(&c->carry);
}

static int run(call *c, int with_dx, int with_dw)
{
    return kernels()->linear_cross_entropy(&c->loss, with_dx ? &c->dx : NULL,
                                           with_dw ? &c->dw : NULL, &c->scratch,
                                           c->carry.data ? &c->carry : NULL, &c->x, &c->w,
                                           &c->target, c->ignore, c->seed, c->accumulate);
}

/* How far the gradient of logit (i, j) can be off, in units of slack: at the target it is
 * softmax - 1, where digits cancel. */
static double weight(const call *c, const double *dlogits, int64_t i, int64_t j)
{
    double unit = (int64_t)get(&c->target, i) == j ? 0.2 * c->seed / (double)c->count : 0;

    return fabs(dlogits[i * c->v + j]) + unit;
}

/* loss, and the gradient of the logits [n, v]; *largest: of the logits that count. */
static double expected(double *dlogits, double *largest, call *c)
{
    double loss = 0;

    *largest = 0;
    c->count = 0;
    for (int64_t i = 0; i < c->n; i++)
        c->count += get(&c->target, i) != (double)c->ignore;
    for (int64_t i = 0; i < c->n; i++) {
        double *row = dlogits + i * c->v, max = -INFINITY, sum = 0;
        int64_t t = (int64_t)get(&c->target, i);

        for (int64_t j = 0; j < c->v; j++) {
            row[j] = 0;
            for (int64_t l = 0; l < c->k; l++)
                row[j] += get(&c->x, i * c->k + l) * get(&c->w, j * c->k + l);
            max = row[j] > max ? row[j] : max;
            *largest = fabs(row[j]) > *largest ? fabs(row[j]) : *largest;
        }
        for (int64_t j = 0; j < c->v; j++)
            sum += exp(row[j] - max);
        if (t != c->ignore)
            loss += log(sum) + max - row[t];
        for (int64_t j = 0; j < c->v; j++) {
            row[j] = t == c->ignore ? 0 : (exp(row[j] - max) / sum - (j == t));
            row[j] *= c->seed / (double)c->count;
        }
    }
    return c->count ? loss / (double)c->count : 0;
}

static void compare(const call *c, const double *dlogits, double slack, const double *old_dw,
                    int dx, int dw)
{
    for (int64_t i = 0; dx && i < c->n * c->k; i++) {
        double want = 0, size = 0;

        for (int64_t j = 0; j < c->v; j++) {
            want += dlogits[i / c->k * c->v + j] * get(&c->w, j * c->k + i % c->k);
            size += weight(c, dlogits, i / c->k, j) * fabs(get(&c->w, j * c->k + i % c->k));
        }
        near(get(&c->dx, i), want, slack * size + (c->dtype == DS_F16 ? 1e-6 : 1e-12), "dx", i);
    }
    for (int64_t i = 0; dw && i < c->v * c->k; i++) {
        double want = old_dw[i], size = fabs(want);

        for (int64_t r = 0; r < c->n; r++) {
            want += dlogits[r * c->v + i / c->k] * get(&c->x, r * c->k + i % c->k);
            size += weight(c, dlogits, r, i / c->k) * fabs(get(&c->x, r * c->k + i % c->k));
        }
        near(get(&c->dw, i), want, slack * size + (c->dtype == DS_F16 ? 1e-6 : 1e-12), "dw", i);
    }
}

static void check_call(call *c, int dx, int dw)
{
    double *dlogits = malloc((size_t)(c->n * c->v) * sizeof *dlogits);
    double *old = calloc((size_t)(c->v * c->k), sizeof *old);
    double largest, want = expected(dlogits, &largest, c), slack;
    void *dx_before = copy_of(&c->dx), *dw_before;

    if (c->accumulate)
        for (int64_t i = 0; i < c->v * c->k; i++) {
            set(&c->dw, i, random01());
            old[i] = get(&c->dw, i);
        }
    dw_before = copy_of(&c->dw);
    if (run(c, dx, dw) < 0)
        fail_msg("%s", ds_error());
    /* Rounded logits are off by eps times their size, and so are the powers' exponents. */
    slack = (c->dtype == DS_F64 ? 1e-13 : 2e-6) + (4 + 3 * largest) * eps_of(c->dtype);
    near(get(&c->loss, 0), want, slack * (1 + fabs(want)), "loss", 0);
    compare(c, dlogits, slack, old, dx, dw);
    if (!dw)
        assert_memory_equal(dw_before, c->dw.data, span(&c->dw));
    free(dw_before);
    if (dx)
        margins_kept(&c->dx, dx_before);
    else
        free(dx_before);
    free(dlogits);
    free(old);
}

static void random_calls_match(void **state)
{
    static const int64_t classes[] = {1, 2, 15, 16, 17, 65, 131};

    (void)state;
    for (int i = 0; i < 84; i++) {
        call c = start(i % 4, between(1, 40), classes[i % 7], between(1, 40), between(1, 45),
                       (int)between(0, LAYOUTS - 1));

        set(&c.target, 0, (double)(c.v - 1)); /* at least one that counts */
        c.seed = i % 3 ? 1 : 128;
        c.accumulate = i % 2;
        check_call(&c, i % 5 != 1, i % 5 != 2);
        end(&c);
    }
}

static void a_vocabulary_matches(void **state)
{
    (void)state;
    for (int dtype = DS_F32; dtype <= DS_BF16; dtype++) {
        call c = start(dtype, 50, 2011, 64, 32, ROWS);

        set(&c.target, 0, 0);
        check_call(&c, 1, 1);
        end(&c);
    }
}

/* dw in low precision is what dw in f32 rounds to, over any number of chunks. */
static void low_dw_is_rounded_once(void **state)
{
    (void)state;
    for (int i = 0; i < 24; i++) {
        int dtype = i % 2 ? DS_BF16 : DS_F16;
        int64_t n = between(30, 70), v = i % 3 ? between(1, 200) : 4500, k = between(1, 300);
        call c = start(dtype, n, v, k, i % 4 ? between(1, n) : n, ROWS);
        ds_tensor low = make(dtype, ROWS, 2, (int64_t[]){v, k}), wide = c.dw;

        c.carry = make(dtype, ROWS, 2, (int64_t[]){v, k});
        set(&c.target, 0, (double)(v - 1));
        c.accumulate = i % 5 == 1;
        for (int64_t e = 0; e < low.numel; e++)
            set(&low, e, c.accumulate ? random01() - 0.5 : NAN), set(&wide, e, get(&low, e));
        assert_int_equal(run(&c, 1, 1), 0);
        c.dw = low;
        assert_int_equal(run(&c, 1, 1), 0);
        for (int64_t e = 0; e < low.numel; e++)
            set(&c.carry, e, get(&wide, e));
        assert_memory_equal(c.carry.data, low.data, span(&low));
        c.dw = wide;
        drop(&low);
        end(&c);
    }
}

static void loss_alone_equals_loss_with_gradients(void **state)
{
    (void)state;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++) {
        call c = start(dtype, 30, 65, 16, 8, ROWS);
        double with;

        set(&c.target, 0, 3);
        assert_int_equal(run(&c, 1, 1), 0);
        with = get(&c.loss, 0);
        assert_int_equal(run(&c, 0, 0), 0);
        assert_true(get(&c.loss, 0) == with);
        end(&c);
    }
}

static void narrow_targets_count_the_same(void **state)
{
    call c = start(DS_F32, 20, 65, 16, 8, ROWS);
    int32_t four[40];
    uint8_t one[20];
    double want;

    (void)state;
    c.ignore = 7;
    for (int i = 0; i < 20; i++) {
        four[2 * i] = one[i] = (uint8_t)between(0, 64);
        set(&c.target, i, one[i]);
    }
    assert_int_equal(run(&c, 1, 1), 0);
    want = get(&c.loss, 0);
    for (int narrow = 0; narrow < 2; narrow++) {
        ds_tensor target = c.target;

        target.data = narrow ? (void *)one : (void *)four;
        target.dtype = narrow ? DS_U8 : DS_I32;
        target.stride[0] = narrow ? 1 : 2;
        assert_int_equal(kernels()->linear_cross_entropy(&c.loss, &c.dx, &c.dw, &c.scratch, NULL,
                                                         &c.x, &c.w, &target, c.ignore, 1, 0),
                         0);
        assert_true(get(&c.loss, 0) == want);
    }
    end(&c);
}

static void nothing_counts_when_all_is_ignored(void **state)
{
    (void)state;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++) {
        call c = start(dtype, 12, 33, 8, 5, ROW_GAPS);

        for (int64_t i = 0; i < c.n; i++)
            set(&c.target, i, (double)c.ignore);
        set(&c.w, 3, INFINITY);
        assert_int_equal(run(&c, 1, 1), 0);
        assert_true(get(&c.loss, 0) == 0);
        for (int64_t i = 0; i < c.dx.numel; i++)
            assert_true(get(&c.dx, i) == 0);
        for (int64_t i = 0; i < c.dw.numel; i++)
            assert_true(get(&c.dw, i) == 0);
        set(&c.dw, 5, 2.5);
        c.accumulate = 1;
        assert_int_equal(run(&c, 1, 1), 0);
        assert_true(get(&c.dw, 5) == 2.5);
        end(&c);
    }
}

static void large_logits_do_not_overflow(void **state)
{
    (void)state;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++) {
        call c = start(dtype, 6, 40, 4, 4, ROWS);

        for (int64_t i = 0; i < c.n; i++)
            set(&c.target, i, 0);
        randomise(&c.w, dtype == DS_F16 ? 200 : 1e4);
        randomise(&c.x, dtype == DS_F16 ? 20 : 100);
        assert_int_equal(run(&c, 1, 1), 0);
        assert_true(isfinite(get(&c.loss, 0)) && get(&c.loss, 0) >= 0);
        for (int64_t i = 0; i < c.dx.numel; i++)
            assert_true(isfinite(get(&c.dx, i)));
        end(&c);
    }
}

static void nan_in_gives_nan_out(void **state)
{
    (void)state;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++) {
        call c = start(dtype, 9, 50, 8, 4, ROWS);

        for (int64_t i = 0; i < c.n; i++)
            set(&c.target, i, 1);
        set(&c.x, 4 * 8 + 2, NAN);
        assert_int_equal(run(&c, 1, 1), 0);
        assert_true(isnan(get(&c.loss, 0)));
        assert_true(isnan(get(&c.dx, 4 * 8)));
        assert_false(isnan(get(&c.dx, 3 * 8)));
        assert_true(isnan(get(&c.dw, 0)));
        end(&c);
    }
}

static void a_bad_target_is_named_and_nothing_written(void **state)
{
    static const int64_t bad[] = {65, -1, 1 << 30};

    (void)state;
    for (int i = 0; i < 3; i++) {
        call c = start(DS_F32, 20, 65, 8, 4, ROWS);
        void *loss = copy_of(&c.loss), *dx = copy_of(&c.dx), *dw = copy_of(&c.dw);
        char value[32];

        set(&c.target, 17, (double)bad[i]);
        assert_int_equal(run(&c, 1, 1), DS_ERANGE);
        snprintf(value, sizeof value, "target %lld", (long long)bad[i]);
        assert_non_null(strstr(ds_error(), value));
        assert_non_null(strstr(ds_error(), "row 17"));
        assert_non_null(strstr(ds_error(), "65"));
        assert_memory_equal(loss, c.loss.data, span(&c.loss));
        assert_memory_equal(dx, c.dx.data, span(&c.dx));
        assert_memory_equal(dw, c.dw.data, span(&c.dw));
        free(loss), free(dx), free(dw);
        end(&c);
    }
}

static void same_bits_every_time(void **state)
{
    (void)state;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++) {
        call c = start(dtype, 70, 300, 48, 32, ROWS);
        void *dx, *dw;
        double loss;

        assert_int_equal(run(&c, 1, 1), 0);
        loss = get(&c.loss, 0);
        dx = copy_of(&c.dx), dw = copy_of(&c.dw);
        for (int again = 0; again < 3; again++) {
            assert_int_equal(run(&c, 1, 1), 0);
            assert_true(get(&c.loss, 0) == loss);
            assert_memory_equal(dx, c.dx.data, span(&c.dx));
            assert_memory_equal(dw, c.dw.data, span(&c.dw));
        }
        free(dx), free(dw);
        end(&c);
    }
}

static void refused(call *c, const char *why)
{
    fails(run(c, 1, 1), DS_EINVAL, why);
}

static void wrong_calls_are_refused(void **state)
{
    call c = start(DS_F32, 8, 20, 4, 4, ROWS), good = c;

    (void)state;
    c.w.shape[1] = 3;
    refused(&c, "x [N x K]");
    c = good, c.target.shape[0] = 7;
    refused(&c, "target [N]");
    c = good, c.w.dtype = DS_BF16;
    refused(&c, "dtype of x");
    c = good, c.target.dtype = DS_F32;
    refused(&c, "not f32");
    c = good, c.scratch.shape[1] = 20;
    refused(&c, "rows x 32");
    c = good, c.dx.shape[0] = 7;
    refused(&c, "dx like x");
    c = good, c.dw.dtype = DS_BF16;
    refused(&c, "dtype of w");
    c = good, c.x.dtype = c.w.dtype = c.dx.dtype = c.dw.dtype = c.scratch.dtype = DS_BF16;
    refused(&c, "2 chunks dense and a carry");
    end(&good);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_calls_match),
        cmocka_unit_test(a_vocabulary_matches),
        cmocka_unit_test(low_dw_is_rounded_once),
        cmocka_unit_test(loss_alone_equals_loss_with_gradients),
        cmocka_unit_test(narrow_targets_count_the_same),
        cmocka_unit_test(nothing_counts_when_all_is_ignored),
        cmocka_unit_test(large_logits_do_not_overflow),
        cmocka_unit_test(nan_in_gives_nan_out),
        cmocka_unit_test(a_bad_target_is_named_and_nothing_written),
        cmocka_unit_test(same_bits_every_time),
        cmocka_unit_test(wrong_calls_are_refused),
    };
    int done = each_level(argv);

    (void)argc;
    return done >= 0 ? done : cmocka_run_group_tests(tests, NULL, NULL);
}
