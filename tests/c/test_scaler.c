/* test_scaler.c - the loss scale over sequences of steps, against what DeepSpeed's scaler of ZeRO
 * 1 to 3 does with them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/ds.h"

/* steps: x overflow, . fine. scale and hysteresis: after each step; 0 means refused, the last. */
typedef struct trace {
    int power;
    double min_scale;
    int64_t window;
    int hysteresis, consecutive;
    const char *steps;
    double scale[16];
    int left[16];
} trace;

static const trace traces[] = {
    {16,
     1,
     4,
     2,
     0,
     "xxx.x.....x.",
     {65536, 32768, 16384, 16384, 8192, 8192, 8192, 8192, 8192, 16384, 16384, 16384},
     {1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1}},
    {16,
     1,
     4,
     2,
     1,
     "xxx.x.....x.",
     {65536, 32768, 16384, 16384, 16384, 16384, 16384, 16384, 16384, 32768, 32768, 32768},
     {1, 1, 1, 2, 1, 2, 2, 2, 2, 2, 1, 2}},
    {8,
     1,
     2,
     1,
     0,
     "..........", /* growth after window + 1 steps, then after every window */
     {256, 256, 512, 512, 1024, 1024, 2048, 2048, 4096, 4096},
     {1, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {4, 1, 2, 1, 0, "xxxxx", {8, 4, 2, 1, 0}, {1, 1, 1, 1}},
    {3, 2, 2, 1, 0, "xxx", {4, 2, 0}, {1, 1}},
    {5, 3, 2, 1, 0, "xxx.x", {16, 8, 4, 4, 3}, {1, 1, 1, 1, 1}},
    {8, 1, 2, 1, 0, "xx...x", {128, 64, 64, 64, 128, 64}, {1, 1, 1, 1, 1, 1}},
    {4,
     1,
     1,
     3,
     0,
     "....xx.xx.xxx",
     {16, 32, 64, 128, 128, 128, 128, 64, 32, 32, 16, 8, 4},
     {3, 3, 3, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1}},
    {4,
     1,
     3,
     2,
     1,
     "x.x.xx....x.x",
     {16, 16, 16, 16, 16, 8, 8, 8, 8, 16, 16, 16, 16},
     {1, 2, 1, 2, 1, 1, 2, 2, 2, 2, 1, 2, 1}},
    {2, 1, 1000, 2, 0, "xxxx", {4, 2, 1, 0}, {1, 1, 1}},
};

#define TRACES (sizeof traces / sizeof *traces)

static ds_scaler start(const trace *t)
{
    ds_scaler s;

    assert_int_equal(
        ds_scaler_dynamic(&s, t->power, t->min_scale, t->window, t->hysteresis, t->consecutive), 0);
    assert_true(s.cur_scale == ldexp(1, t->power));
    return s;
}

/* Steps first and on. */
static void follow(ds_scaler *s, const trace *t, int first)
{
    int last_overflow = -1;

    for (int i = 0; t->steps[i]; i++) {
        int overflow = t->steps[i] == 'x';

        last_overflow = overflow ? i : last_overflow;
        if (i < first)
            continue;
        if (t->scale[i] == 0) {
            assert_int_equal(ds_scaler_update(s, overflow), DS_ERANGE);
            assert_non_null(strstr(ds_error(), "fp16.min_loss_scale"));
            assert_non_null(strstr(ds_error(), "train in bf16"));
            assert_true(s->cur_scale == t->min_scale);
        } else {
            assert_int_equal(ds_scaler_update(s, overflow), 0);
            if (s->cur_scale != t->scale[i] || s->cur_hysteresis != t->left[i])
                fail_msg("%s, step %d: scale %g, hysteresis %d", t->steps, i, s->cur_scale,
                         (int)s->cur_hysteresis);
        }
        assert_int_equal(s->cur_iter, i + 1);
        assert_int_equal(s->last_overflow_iter, last_overflow);
    }
}

static void traces_are_followed(void **state)
{
    (void)state;
    for (size_t i = 0; i < TRACES; i++) {
        ds_scaler s = start(&traces[i]);

        follow(&s, &traces[i], 0);
    }
}

static void traces_go_on_from_any_saved_state(void **state)
{
    (void)state;
    for (size_t i = 0; i < TRACES; i++)
        for (int half = 0; traces[i].steps[half] && traces[i].scale[half] > 0; half++) {
            ds_scaler s = start(&traces[i]), again = start(&traces[i]);

            for (int step = 0; step < half; step++)
                ds_scaler_update(&s, traces[i].steps[step] == 'x');
            assert_int_equal(ds_scaler_restore(&again, s.cur_scale, s.cur_iter,
                                               s.last_overflow_iter, s.cur_hysteresis),
                             0);
            follow(&again, &traces[i], half);
        }
}

static void a_fixed_scale_stays(void **state)
{
    ds_scaler s;

    (void)state;
    assert_int_equal(ds_scaler_static(&s, 1000), 0);
    for (int i = 0; i < 5000; i++)
        assert_int_equal(ds_scaler_update(&s, i % 3 == 0), 0);
    assert_true(s.cur_scale == 1000 && s.cur_iter == 5000);
    assert_int_equal(ds_scaler_restore(&s, 64, 10, 3, 1), 0);
    assert_true(s.cur_scale == 1000 && s.cur_iter == 10);
}

static void growth_ends_before_f32_does(void **state)
{
    ds_scaler s;

    (void)state;
    assert_int_equal(ds_scaler_dynamic(&s, 120, 1, 1, 2, 0), 0);
    for (int i = 0; i < 100; i++)
        assert_int_equal(ds_scaler_update(&s, 0), 0);
    assert_true(s.cur_scale == 0x1p126);
}

static void a_saved_state_fits_into_other_settings(void **state)
{
    ds_scaler s;

    (void)state;
    assert_int_equal(ds_scaler_dynamic(&s, 16, 8, 100, 2, 0), 0);
    assert_int_equal(ds_scaler_restore(&s, 2, 50, 49, 7), 0);
    assert_true(s.cur_scale == 8 && s.cur_hysteresis == 2 && s.min_scale == 8 && s.window == 100);
}

static void nonsense_is_refused(void **state)
{
    ds_scaler s, before;

    (void)state;
    assert_int_equal(ds_scaler_static(&s, 0), DS_EINVAL);
    assert_int_equal(ds_scaler_static(&s, INFINITY), DS_EINVAL);
    assert_int_equal(ds_scaler_static(&s, NAN), DS_EINVAL);
    assert_int_equal(ds_scaler_dynamic(&s, 127, 1, 1000, 2, 0), DS_EINVAL);
    assert_int_equal(ds_scaler_dynamic(&s, 16, 0, 1000, 2, 0), DS_EINVAL);
    assert_int_equal(ds_scaler_dynamic(&s, 16, 1, 0, 2, 0), DS_EINVAL);
    assert_int_equal(ds_scaler_dynamic(&s, 16, 1, 1000, 0, 0), DS_EINVAL);
    assert_int_equal(ds_scaler_dynamic(&s, 2, 8, 1000, 2, 0), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "2^2 = 4 is below the minimum 8"));
    assert_int_equal(ds_scaler_dynamic(&s, 16, 1, 1000, 2, 0), 0);
    before = s;
    assert_int_equal(ds_scaler_restore(&s, NAN, 5, 1, 1), DS_EINVAL);
    assert_int_equal(ds_scaler_restore(&s, 4, -1, -1, 1), DS_EINVAL);
    assert_int_equal(ds_scaler_restore(&s, 4, 5, 5, 1), DS_EINVAL);
    assert_int_equal(ds_scaler_restore(&s, 4, 5, -2, 1), DS_EINVAL);
    assert_true(s.cur_scale == before.cur_scale && s.cur_iter == before.cur_iter &&
                s.last_overflow_iter == before.last_overflow_iter &&
                s.cur_hysteresis == before.cur_hysteresis);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(traces_are_followed),
        cmocka_unit_test(traces_go_on_from_any_saved_state),
        cmocka_unit_test(a_fixed_scale_stays),
        cmocka_unit_test(growth_ends_before_f32_does),
        cmocka_unit_test(a_saved_state_fits_into_other_settings),
        cmocka_unit_test(nonsense_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
