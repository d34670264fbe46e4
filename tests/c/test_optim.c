/* test_optim.c - optimizers against their formulas in double, on every CPU level of this
 * machine. */
#include <omp.h>

#include "tests/c/levels.h"
#include "tests/c/numbers.h"

#define MOST 5000
#define STEPS 3

/* Weights, two states, gradients and the low precision copy; and what they should be. */
typedef struct setting {
    int64_t n;
    int dtype, g_dtype, low_dtype; /* low_dtype -1: none */
    double gscale, weight_decay;
    ds_tensor p, a, b, low, g;
    double p_d[MOST], a_d[MOST], b_d[MOST];
} setting;

static ds_tensor vector(int dtype, int64_t n)
{
    ds_tensor t = {.data = malloc((size_t)(n * 8)),
                   .numel = n,
                   .shape = {n},
                   .stride = {1},
                   .ndim = 1,
                   .dtype = dtype,
                   .dense = 1};

    assert_non_null(t.data);
    for (int64_t i = 0; i < n; i++)
        set_at(&t, i, 0);
    return t;
}

static setting *make(int64_t n, int dtype, int g_dtype, int low_dtype, double gscale,
                     double weight_decay)
{
    setting *s = calloc(1, sizeof *s);

    assert_non_null(s);
    *s = (setting){.n = n,
                   .dtype = dtype,
                   .g_dtype = g_dtype,
                   .low_dtype = low_dtype,
                   .gscale = gscale,
                   .weight_decay = weight_decay};
    s->p = vector(dtype, n);
    s->a = vector(dtype, n);
    s->b = vector(dtype, n);
    s->g = vector(g_dtype, n);
    s->low = vector(low_dtype < 0 ? DS_BF16 : low_dtype, n);
    for (int64_t i = 0; i < n; i++) {
        set_at(&s->p, i, uniform(-2, 2));
        s->p_d[i] = get_at(&s->p, i);
    }
    return s;
}

static void drop(setting *s)
{
    ds_tensor *all[] = {&s->p, &s->a, &s->b, &s->g, &s->low};

    for (int i = 0; i < 5; i++)
        free(all[i]->data);
    free(s);
}

static ds_tensor *low_of(setting *s)
{
    return s->low_dtype < 0 ? NULL : &s->low;
}

/* New gradients; a few are 0. */
static void differentiate(setting *s)
{
    for (int64_t i = 0; i < s->n; i++)
        set_at(&s->g, i, i % 7 == 3 ? 0 : uniform(-1, 1) / s->gscale);
}

static void near_all(const ds_tensor *t, const double *want, const char *name, const char *rule)
{
    double tolerance = t->dtype == DS_F64 ? 1e-13 : 2e-6;

    for (int64_t i = 0; i < t->numel; i++)
        if (!(fabs(get_at(t, i) - want[i]) <= tolerance * (1e-2 + fabs(want[i]) + fabs(want[0]))))
            fail_msg("%s: %s[%d] of %d is %.9g, not %.9g", rule, name, (int)i, (int)t->numel,
                     get_at(t, i), want[i]);
}

/* What has the same bits: the copy is the rounded weights. */
static void check(setting *s, const char *rule)
{
    near_all(&s->p, s->p_d, "p", rule);
    near_all(&s->a, s->a_d, "first state", rule);
    near_all(&s->b, s->b_d, "second state", rule);
    for (int64_t i = 0; i < s->n && s->low_dtype >= 0; i++) {
        float p = (float)get_at(&s->p, i);
        uint16_t want = s->low_dtype == DS_BF16 ? ds_f32_to_bf16(p) : ds_f32_to_f16(p);

        assert_int_equal(((uint16_t *)s->low.data)[i], want);
    }
}

static void step_ok(int rc)
{
    if (rc != 0)
        fail_msg("%s", ds_error());
}

/* ---- the rules; formulas as in PyTorch's documentation of torch.optim */

static void adam_steps(setting *s, int decoupled)
{
    const double lr = 1e-2, beta1 = 0.9, beta2 = 0.99, eps = 1e-8, wd = s->weight_decay;

    for (int t = 1; t <= STEPS; t++) {
        double c1 = 1 - pow(beta1, t), c2 = 1 - pow(beta2, t);

        differentiate(s);
        step_ok(kernels()->adam(&s->p, &s->a, &s->b, low_of(s), &s->g, lr, beta1, beta2, eps, wd,
                                c1, c2, s->gscale, decoupled, NULL, NULL));
        for (int64_t i = 0; i < s->n; i++) {
            double g = get_at(&s->g, i) * s->gscale;

            if (decoupled)
                s->p_d[i] -= lr * wd * s->p_d[i];
            else
                g += wd * s->p_d[i];
            s->a_d[i] = beta1 * s->a_d[i] + (1 - beta1) * g;
            s->b_d[i] = beta2 * s->b_d[i] + (1 - beta2) * g * g;
            s->p_d[i] -= lr / c1 * s->a_d[i] / (sqrt(s->b_d[i]) / sqrt(c2) + eps);
        }
    }
    check(s, decoupled ? "adamw" : "adam");
}

static void sgd_steps(setting *s, double momentum, int nesterov)
{
    const double lr = 0.1, damp = nesterov ? 0 : 0.3, wd = s->weight_decay;

    for (int64_t i = 0; i < s->n; i++) /* the first step shall not look at it */
        set_at(&s->a, i, momentum ? NAN : 0);
    for (int t = 0; t < STEPS; t++) {
        differentiate(s);
        step_ok(kernels()->sgd(&s->p, momentum ? &s->a : NULL, low_of(s), &s->g, lr, momentum, damp,
                               wd, nesterov, t == 0, s->gscale, NULL, NULL));
        for (int64_t i = 0; i < s->n; i++) {
            double d = get_at(&s->g, i) * s->gscale + wd * s->p_d[i];

            if (momentum) {
                s->a_d[i] = t == 0 ? d : momentum * s->a_d[i] + (1 - damp) * d;
                d = nesterov ? d + momentum * s->a_d[i] : s->a_d[i];
            }
            s->p_d[i] -= lr * d;
        }
    }
    check(s, "sgd");
}

static void lion_steps(setting *s)
{
    const double lr = 1e-2, beta1 = 0.9, beta2 = 0.99;

    for (int t = 0; t < STEPS; t++) {
        differentiate(s);
        step_ok(kernels()->lion(&s->p, &s->a, low_of(s), &s->g, lr, beta1, beta2, s->weight_decay,
                                s->gscale, NULL, NULL));
        for (int64_t i = 0; i < s->n; i++) {
            double g = get_at(&s->g, i) * s->gscale, c = beta1 * s->a_d[i] + (1 - beta1) * g;

            s->p_d[i] = s->p_d[i] * (1 - lr * s->weight_decay) - lr * ((c > 0) - (c < 0));
            s->a_d[i] = beta2 * s->a_d[i] + (1 - beta2) * g;
        }
    }
    check(s, "lion");
}

static void adagrad_steps(setting *s)
{
    const double lr = 1e-2, eps = 1e-10;

    for (int t = 0; t < STEPS; t++) {
        differentiate(s);
        step_ok(kernels()->adagrad(&s->p, &s->a, low_of(s), &s->g, lr, eps, s->weight_decay,
                                   s->gscale, NULL, NULL));
        for (int64_t i = 0; i < s->n; i++) {
            double d = get_at(&s->g, i) * s->gscale + s->weight_decay * s->p_d[i];

            s->a_d[i] += d * d;
            if (d != 0)
                s->p_d[i] -= lr * d / (sqrt(s->a_d[i]) + eps);
        }
    }
    check(s, "adagrad");
}

/* Clamps that bind on some sizes: the ratio of these tensors is about sqrt(n) / sqrt(n) × 1. */
static void lamb_steps(setting *s, double least, double most)
{
    const double lr = 1e-2, beta1 = 0.9, beta2 = 0.99, eps = 1e-6, wd = s->weight_decay;
    double *update = malloc((size_t)(s->n + 1) * sizeof *update);

    assert_non_null(update);
    for (int t = 1; t <= STEPS; t++) {
        double c1 = 1 - pow(beta1, t), c2 = 1 - pow(beta2, t), ww = 0, uu = 0, ratio;

        differentiate(s);
        step_ok(kernels()->lamb(&s->p, &s->a, &s->b, low_of(s), &s->g, lr, beta1, beta2, eps, wd,
                                c1, c2, least, most, s->gscale, NULL, NULL));
        for (int64_t i = 0; i < s->n; i++) {
            double g = get_at(&s->g, i) * s->gscale;

            s->a_d[i] = beta1 * s->a_d[i] + (1 - beta1) * g;
            s->b_d[i] = beta2 * s->b_d[i] + (1 - beta2) * g * g;
            update[i] = s->a_d[i] / c1 / (sqrt(s->b_d[i] / c2) + eps) + wd * s->p_d[i];
            ww += s->p_d[i] * s->p_d[i];
            uu += update[i] * update[i];
        }
        ratio = ww == 0 || uu == 0 ? 1 : fmin(fmax(sqrt(ww / uu), least), most);
        for (int64_t i = 0; i < s->n; i++)
            s->p_d[i] -= lr * ratio * update[i];
    }
    check(s, "lamb");
    free(update);
}

/* ---- tests */

static void rules_match_their_formulas(void **unused)
{
    static const int64_t sizes[] = {1, 5, 511, 513, MOST};

    (void)unused;
    for (int rule = 0; rule < 10; rule++)
        for (int size = 0; size < 5; size++)
            for (int kind = 0; kind < 4; kind++) {
                int g_dtype = kind == 3 ? DS_F64 : kind; /* f32, bf16, f16 */
                int low = kind == 3 ? -1 : kind == 0 ? DS_BF16 : kind == 1 ? DS_F16 : -1;
                setting *s = make(sizes[size], kind == 3 ? DS_F64 : DS_F32, g_dtype, low,
                                  kind % 2 ? 1 : 0.125, size % 2 ? 0.1 : 0);

                if (rule < 2)
                    adam_steps(s, rule);
                else if (rule < 5)
                    sgd_steps(s, rule == 2 ? 0 : 0.9, rule == 4);
                else if (rule == 5)
                    lion_steps(s);
                else if (rule == 6)
                    adagrad_steps(s);
                else
                    lamb_steps(s, rule == 8 ? 3 : 0.01, rule == 9 ? 0.1 : 10);
                drop(s);
            }
}

/* Weights of 0 have no norm to keep in proportion to: they move as by Adam. */
static void lamb_moves_zero_weights(void **unused)
{
    setting *s = make(700, DS_F32, DS_F32, -1, 1, 0.1);

    (void)unused;
    for (int64_t i = 0; i < s->n; i++)
        set_at(&s->p, i, s->p_d[i] = 0);
    lamb_steps(s, 0.01, 10);
    assert_true(get_at(&s->p, 0) != 0);
    drop(s);
}

/* The same bits on any number of threads: norms are added by pieces in order. */
static void lamb_does_not_depend_on_threads(void **unused)
{
    const int64_t n = 400000;
    float *first = malloc((size_t)n * sizeof *first);
    ds_tensor p = vector(DS_F32, n), m = vector(DS_F32, n), v = vector(DS_F32, n),
              g = vector(DS_F32, n);

    (void)unused;
    assert_non_null(first);
    for (int threads = 1; threads <= 3; threads++) {
        omp_set_num_threads(threads);
        random_state = 7;
        for (int64_t i = 0; i < n; i++) {
            set_at(&p, i, uniform(-1, 1));
            set_at(&g, i, uniform(-1, 1));
            set_at(&m, i, 0);
            set_at(&v, i, 0);
        }
        step_ok(kernels()->lamb(&p, &m, &v, NULL, &g, 0.1, 0.9, 0.99, 1e-6, 0.1, 0.1, 0.01, 0.01,
                                10, 1, NULL, NULL));
        if (threads == 1)
            memcpy(first, p.data, (size_t)n * sizeof *first);
        assert_memory_equal(first, p.data, (size_t)n * sizeof *first);
    }
    free(first);
    free(p.data);
    free(m.data);
    free(v.data);
    free(g.data);
}

static void empty_buffers_are_fine(void **unused)
{
    setting *s = make(0, DS_F32, DS_F32, DS_BF16, 1, 0);

    (void)unused;
    adam_steps(s, 1);
    lion_steps(s);
    lamb_steps(s, 0.01, 10);
    drop(s);
}

/* A gradient that overflowed must not leave finite weights behind. */
static void nan_gradients_show(void **unused)
{
    (void)unused;
    for (int rule = 0; rule < 4; rule++) {
        setting *s = make(20, DS_F32, DS_F32, -1, 1, 0);

        set_at(&s->g, 13, NAN);
        if (rule == 0)
            kernels()->adam(&s->p, &s->a, &s->b, NULL, &s->g, 0.1, 0.9, 0.99, 1e-8, 0, 0.1, 0.01, 1,
                            1, NULL, NULL);
        else if (rule == 1)
            kernels()->sgd(&s->p, NULL, NULL, &s->g, 0.1, 0, 0, 0, 0, 1, 1, NULL, NULL);
        else if (rule == 2)
            kernels()->lion(&s->p, &s->a, NULL, &s->g, 0.1, 0.9, 0.99, 0, 1, NULL, NULL);
        else
            kernels()->adagrad(&s->p, &s->a, NULL, &s->g, 0.1, 1e-10, 0, 1, NULL, NULL);
        assert_true(isnan(get_at(&s->p, 13)));
        assert_false(isnan(get_at(&s->p, 12)));
        drop(s);
    }
}

static void wrong_calls_are_refused(void **unused)
{
    setting *s = make(20, DS_F32, DS_F32, DS_BF16, 1, 0);

    (void)unused;
    s->a.numel = 19;
    fails(kernels()->lion(&s->p, &s->a, NULL, &s->g, 0.1, 0.9, 0.99, 0, 1, NULL, NULL), DS_EINVAL,
          "19 elements");
    s->a.numel = 20;
    s->g.dense = 0;
    fails(kernels()->lion(&s->p, &s->a, NULL, &s->g, 0.1, 0.9, 0.99, 0, 1, NULL, NULL), DS_EINVAL,
          "not dense");
    s->g.dense = 1;
    s->p.dtype = DS_BF16;
    fails(kernels()->lion(&s->p, &s->a, NULL, &s->g, 0.1, 0.9, 0.99, 0, 1, NULL, NULL), DS_EINVAL,
          "bf16");
    s->p.dtype = DS_F32;
    s->low.dtype = DS_F32;
    fails(kernels()->lion(&s->p, &s->a, &s->low, &s->g, 0.1, 0.9, 0.99, 0, 1, NULL, NULL),
          DS_EINVAL, "f32 copy");
    s->low.dtype = DS_BF16;
    s->a.dtype = DS_BF16;
    fails(kernels()->lamb(&s->p, &s->a, &s->b, NULL, &s->g, 0.1, 0.9, 0.99, 0, 0, 1, 1, 0.01, 10, 1,
                          NULL, NULL),
          DS_EINVAL, "state is bf16");
    s->a.dtype = DS_F32;
    fails(kernels()->sgd(&s->p, NULL, NULL, &s->g, 0.1, 0.9, 0, 0, 0, 1, 1, NULL, NULL), DS_EINVAL,
          "momentum buffer");
    drop(s);
}

/* ---- numbers on the device */

/* One step of a rule: lr, c1, c2 and gscale as scalars, factor and rates as tensors or NULL. */
static int one_step(int rule, setting *s, double lr, double c1, double c2, double gscale,
                    const ds_tensor *factor, const ds_tensor *rates)
{
    ds_tensor *low = low_of(s);

    switch (rule) {
    case 0:
        return kernels()->adam(&s->p, &s->a, &s->b, low, &s->g, lr, 0.9, 0.99, 1e-8, 0.1, c1, c2,
                               gscale, 1, factor, rates);
    case 1:
        return kernels()->sgd(&s->p, &s->a, low, &s->g, lr, 0.9, 0, 0.1, 0, 0, gscale, factor,
                              rates);
    case 2:
        return kernels()->lion(&s->p, &s->a, low, &s->g, lr, 0.9, 0.99, 0.1, gscale, factor, rates);
    case 3:
        return kernels()->adagrad(&s->p, &s->a, low, &s->g, lr, 1e-10, 0.1, gscale, factor, rates);
    default:
        return kernels()->lamb(&s->p, &s->a, &s->b, low, &s->g, lr, 0.9, 0.99, 1e-8, 0.1, c1, c2,
                               0.01, 10, gscale, factor, rates);
    }
}

static ds_tensor numbers(int dtype, int64_t n, double a, double b, double c)
{
    ds_tensor t = vector(dtype, n);
    double all[] = {a, b, c};

    for (int64_t i = 0; i < n; i++)
        set_at(&t, i, all[i]);
    return t;
}

static setting *started(uint64_t seed)
{
    setting *s;

    random_state = seed;
    s = make(1000, DS_F32, DS_BF16, DS_BF16, 1, 0);
    differentiate(s);
    step_ok(one_step(4, s, 1, 1, 1, 1, NULL, NULL));
    return s;
}

static void same_bits(const setting *one, const setting *other)
{
    assert_memory_equal(one->p.data, other->p.data, (size_t)one->n * 4);
    assert_memory_equal(one->a.data, other->a.data, (size_t)one->n * 4);
    assert_memory_equal(one->b.data, other->b.data, (size_t)one->n * 4);
    assert_memory_equal(one->low.data, other->low.data, (size_t)one->n * 2);
}

/* Tensors say the same as scalars. */
static void numbers_on_the_device_count(void **unused)
{
    ds_tensor factor = numbers(DS_F32, 1, 0.5, 0, 0), rates = numbers(DS_F64, 3, 0.3, 0.7, 0.1);

    (void)unused;
    for (int rule = 0; rule < 5; rule++)
        for (int kind = 1; kind < 4; kind++) {
            setting *one = started(7), *other = started(7);
            int f = kind & 1, r = kind & 2;

            step_ok(one_step(rule, one, 0.3, 0.7, 0.1, 2, NULL, NULL));
            step_ok(one_step(rule, other, r ? NAN : 0.3, r ? NAN : 0.7, r ? NAN : 0.1, f ? 4 : 2,
                             f ? &factor : NULL, r ? &rates : NULL));
            same_bits(one, other);
            drop(one);
            drop(other);
        }
    free(factor.data);
    free(rates.data);
}

/* A factor that is no number: the step is left out, and no buffer changes. */
static void steps_are_skipped_on_the_device(void **unused)
{
    static const double bad[] = {NAN, INFINITY, -INFINITY};

    (void)unused;
    for (int rule = 0; rule < 5; rule++)
        for (int i = 0; i < 3; i++) {
            setting *one = started(3), *other = started(3);
            ds_tensor factor = numbers(DS_F32, 1, bad[i], 0, 0);

            step_ok(one_step(rule, other, 0.25, 0.75, 0.5, 1, &factor, NULL));
            same_bits(one, other);
            drop(one);
            drop(other);
            free(factor.data);
        }
}

static void wrong_numbers_are_refused(void **unused)
{
    setting *s = started(5);
    ds_tensor two = numbers(DS_F32, 2, 1, 1, 0), half = vector(DS_BF16, 1);

    (void)unused;
    for (int rule = 0; rule < 5; rule++) {
        fails(one_step(rule, s, 1, 1, 1, 1, &two, NULL), DS_EINVAL, "factor is 2 numbers in f32");
        fails(one_step(rule, s, 1, 1, 1, 1, &half, NULL), DS_EINVAL, "must be 1 in f32");
        fails(one_step(rule, s, 1, 1, 1, 1, NULL, &two), DS_EINVAL, "rates is 2 numbers");
    }
    half.device = DS_CUDA;
    fails(one_step(0, s, 1, 1, 1, 1, &half, NULL), DS_EINVAL, "on the weights' device");
    fails(kernels()->square_sum(&two, &s->g, 0), DS_EINVAL, "2 numbers");
    fails(kernels()->square_sum(&half, &s->g, 0), DS_EINVAL, "bf16");
    half.dtype = DS_I32;
    two.numel = 1;
    fails(kernels()->square_sum(&two, &half, 0), DS_EINVAL, "not for i32");
    s->g.dense = 0;
    fails(kernels()->square_sum(&two, &s->g, 0), DS_EINVAL, "not dense");
    fails(kernels()->clip_factor(&two, &half, &two, 1, 1, 0), DS_EINVAL, "norm is");
    fails(kernels()->clip_factor(&half, &two, &two, 1, 1, 0), DS_EINVAL, "factor is");
    fails(kernels()->clip_factor(&two, &two, &half, 1, 1, 0), DS_EINVAL, "sum of squares is");
    drop(s);
    free(two.data);
    free(half.data);
}

static void square_sum_adds_squares(void **unused)
{
    static const int64_t sizes[] = {0, 1, 5, 1000, MOST};

    (void)unused;
    for (int size = 0; size < 5; size++)
        for (int dtype = DS_F32; dtype <= DS_F64; dtype++)
            for (int accumulate = 0; accumulate < 2; accumulate++) {
                ds_tensor x = vector(dtype, sizes[size]),
                          y = vector(dtype == DS_F64 ? dtype : 0, 1);
                double want = accumulate ? 3 : 0;

                set_at(&y, 0, accumulate ? 3 : NAN);
                for (int64_t i = 0; i < sizes[size]; i++) {
                    set_at(&x, i, uniform(-1, 1));
                    want += get_at(&x, i) * get_at(&x, i);
                }
                assert_int_equal(kernels()->square_sum(&y, &x, accumulate), 0);
                near(get_at(&y, 0), want, want * (dtype == DS_F64 ? 1e-13 : 1e-6), "square_sum",
                     sizes[size]);
                free(x.data);
                free(y.data);
            }
}

static void clip_factor_bounds_the_norm(void **unused)
{
    static const struct {
        double squares, max_norm, scale;
        int skip;
        double norm, factor;
    } cases[] = {
        {16, 0, 1, 0, 4, 1},
        {16, 0, 8, 1, 0.5, 0.125},
        {16, 8, 1, 0, 4, 1},
        {16, 2, 1, 0, 4, 2 / (4 + 1e-6)},
        {256, 2, 4, 1, 4, 0.25 * 2 / (4 + 1e-6)},
        {0, 2, 4, 1, 0, 0.25},
        {INFINITY, 0, 4, 1, INFINITY, NAN},
        {NAN, 2, 4, 1, NAN, NAN},
        {NAN, 2, 4, 0, NAN, 0.25},
        {INFINITY, 2, 4, 0, INFINITY, 0},
    };

    (void)unused;
    for (int i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        ds_tensor squares = numbers(DS_F32, 1, cases[i].squares, 0, 0),
                  norm = numbers(DS_F32, 1, -1, 0, 0), factor = numbers(DS_F32, 1, -1, 0, 0);

        assert_int_equal(kernels()->clip_factor(&factor, &norm, &squares, cases[i].max_norm,
                                                cases[i].scale, cases[i].skip),
                         0);
        near(get_at(&norm, 0), cases[i].norm, 1e-6, "norm", i);
        near(get_at(&factor, 0), cases[i].factor, 1e-7, "factor", i);
        free(squares.data);
        free(norm.data);
        free(factor.data);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rules_match_their_formulas),
        cmocka_unit_test(lamb_moves_zero_weights),
        cmocka_unit_test(lamb_does_not_depend_on_threads),
        cmocka_unit_test(empty_buffers_are_fine),
        cmocka_unit_test(nan_gradients_show),
        cmocka_unit_test(wrong_calls_are_refused),
        cmocka_unit_test(numbers_on_the_device_count),
        cmocka_unit_test(steps_are_skipped_on_the_device),
        cmocka_unit_test(wrong_numbers_are_refused),
        cmocka_unit_test(square_sum_adds_squares),
        cmocka_unit_test(clip_factor_bounds_the_norm),
    };
    int done = each_level(argv);

    (void)argc;
    return done >= 0 ? done : cmocka_run_group_tests(tests, NULL, NULL);
}
