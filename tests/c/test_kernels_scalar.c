/* The arithmetic that all kernels share: scalar.h, dtype.h, philox.h, and the vectors of simd.h as
 * compiled here, against libm in f64. */
#include "tests/c/helpers.h"

#include "kernels/philox.h"
#include "kernels/scalar.h"

static double ulps(float got, double want)
{
    int e;

    frexp(want, &e);
    return fabs((double)got - want) / ldexp(1, (e < -125 ? -125 : e) - 24);
}

/* Many f32 from low to high. flush: subnormal results may be 0. */
static void accurate(const char *name, float (*f)(float), double (*exact)(double), double low,
                     double high, double most)
{
    int flush = f == ds_sigmoid_f32 || f == ds_softplus_f32;

    for (uint64_t u = 0; u < 0x100000000; u += 40009) {
        float x = ds_float((uint32_t)u), y;
        double want;

        if (!((double)x >= low && (double)x <= high))
            continue;
        y = f(x);
        want = exact((double)x);
        if (fabs(want) > 3.4028235677973366e38)
            want = copysign(INFINITY, want);
        if ((double)y != want && !(ulps(y, want) <= most) && !(flush && fabs(want) < 0x1p-126))
            fail_msg("%s(%.9g) is %.9g, not %.9g: %.2f ulp", name, (double)x, (double)y, want,
                     ulps(y, want));
    }
}

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static double gelu(double x)
{
    return 0.5 * x * erfc(-x / sqrt(2));
}

static double gelu_tanh(double x)
{
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

static double softplus(double x)
{
    return x > 40 ? x : log1p(exp(x));
}

static void elementary_functions(void **state)
{
    (void)state;
    accurate("exp", ds_exp_f32, exp, -INFINITY, INFINITY, 1.1);
    accurate("log", ds_log_f32, log, 0, INFINITY, 1);
    accurate("log1p", ds_log1p_f32, log1p, -1, INFINITY, 2);
    accurate("tanh", ds_tanh_f32, tanh, -INFINITY, INFINITY, 2);
    accurate("erf", ds_erf_f32, erf, -INFINITY, INFINITY, 3);
    accurate("sin", ds_sin_f32, sin, -1e6, 1e6, 2);
    accurate("cos", ds_cos_f32, cos, -1e6, 1e6, 2);
    accurate("sigmoid", ds_sigmoid_f32, sigmoid, -INFINITY, INFINITY, 3);
    accurate("softplus", ds_softplus_f32, softplus, -INFINITY, INFINITY, 3);
    accurate("gelu", ds_gelu_f32, gelu, -4, INFINITY, 10);
    accurate("gelu_tanh", ds_gelu_tanh_f32, gelu_tanh, -2, 1e12, 10);
    for (float x = -1e30f; x < 1e31f; x += 0.7e29f)
        assert_true(fabsf(ds_sin_f32(x)) <= 1 && fabsf(ds_cos_f32(x)) <= 1);
}

static void powers(void **state)
{
    static const float special[] = {0,    -0.0f, 1,        -1,        2,   -2,     3,     -3,
                                    0.5f, -0.5f, INFINITY, -INFINITY, NAN, 1e-40f, -1e38f};
    int n = sizeof special / sizeof *special;

    (void)state;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            float got = ds_pow_f32(special[i], special[j]), want = powf(special[i], special[j]);

            if (!(got == want && signbit(got) == signbit(want)) && !(isnan(got) && isnan(want)) &&
                !(fabsf(got - want) < 2e-7f * fabsf(want)))
                fail_msg("pow(%g, %g) is %g, not %g", (double)special[i], (double)special[j],
                         (double)got, (double)want);
        }
    for (int i = 0; i < 100000; i++) {
        float a = (float)(random01() * 30), b = (float)(random01() * 40 - 20);

        assert_true(ulps(ds_pow_f32(a, b), pow((double)a, (double)b)) < 0.6 ||
                    pow((double)a, (double)b) > 3e38);
    }
}

static void halves(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x10000; h++) {
        float f = ds_f16_to_f32((uint16_t)h), b = ds_bf16_to_f32((uint16_t)h);
        int e = (int)(h >> 10 & 31), m = (int)(h & 1023);

        if (e < 31)
            assert_true((double)f ==
                        (h & 0x8000 ? -1 : 1) * ldexp(e ? 1024 + m : m, (e ? e : 1) - 25));
        else
            assert_true(m ? isnan(f) : f == (h & 0x8000 ? -INFINITY : INFINITY));
        if (!isnan(f))
            assert_int_equal(ds_f32_to_f16(f), h);
        if (!isnan(b))
            assert_int_equal(ds_f32_to_bf16(b), h);
    }
    /* ties to even; overflow; the smallest subnormal; NaN stays */
    assert_int_equal(ds_f32_to_bf16(0x1.01p0f), 0x3f80);
    assert_int_equal(ds_f32_to_bf16(0x1.03p0f), 0x3f82);
    assert_int_equal(ds_f32_to_bf16(3.4e38f), 0x7f80);
    assert_int_equal(ds_f32_to_f16(0x1.002p0f), 0x3c00);
    assert_int_equal(ds_f32_to_f16(0x1.006p0f), 0x3c02);
    assert_int_equal(ds_f32_to_f16(65519), 0x7bff);
    assert_int_equal(ds_f32_to_f16(65520), 0x7c00);
    assert_int_equal(ds_f32_to_f16(0x1p-24f), 1);
    assert_int_equal(ds_f32_to_f16(0x1p-25f), 0);
    assert_true(isnan(ds_f16_to_f32(ds_f32_to_f16(NAN))));
    assert_true(isnan(ds_bf16_to_f32(ds_f32_to_bf16(ds_float(0x7f800001)))));
}

/* The known answers that come with Random123 (kat_vectors: philox4x32 10). */
static void philox(void **state)
{
    ds_philox_block b = ds_philox(0, 0);

    (void)state;
    assert_int_equal(b.lane[0], 0x6627e8d5);
    assert_int_equal(b.lane[1], 0xe169c58d);
    assert_int_equal(b.lane[2], 0xbc57ac4c);
    assert_int_equal(b.lane[3], 0x9b00dbd8);
    for (int i = 0; i < 20000; i++) {
        float z0, z1, x;
        double radius, angle;

        b = ds_philox(3, (uint64_t)i);
        ds_normal_pair(&z0, &z1, b.lane[0], b.lane[1]);
        x = (float)(int32_t)(b.lane[0] >> 1) * 0x1p-31f + 0x1p-32f;
        radius = sqrt(-2 * log((double)x));
        angle = 2 * M_PI * b.lane[1] / 0x1p32;
        near((double)z0, radius * cos(angle), 2e-6, "normal", 2 * i);
        near((double)z1, radius * sin(angle), 2e-6, "normal", 2 * i + 1);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(elementary_functions),
        cmocka_unit_test(powers),
        cmocka_unit_test(halves),
        cmocka_unit_test(philox),
    };

    return cmocka_run_group_tests_name("scalar", tests, NULL, NULL);
}
