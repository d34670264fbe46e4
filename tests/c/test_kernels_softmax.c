/* Softmax, cross-entropy and random numbers at every CPU level. */
#include "tests/c/helpers.h"
#include "tests/c/levels.h"

#include "kernels/philox.h"

#define ROUNDS 24

/* ---- softmax */

static int64_t along(const ds_tensor *x, int dim, int64_t line, int64_t i)
{
    int64_t inner = 1, n = x->shape[dim];

    for (int d = dim + 1; d < x->ndim; d++)
        inner *= x->shape[d];
    return (line / inner * n + i) * inner + line % inner;
}

static void softmaxes(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 4; round++) {
        int dtype = round % FLOATS, dim = (int)between(0, 2);
        int64_t size[3] = {between(0, 5), between(1, 7), between(1, 9)}, n, lines;
        double far = between(0, 1) ? 3 : 80, eps = dtype == DS_F64 ? 1e-14 : 4e-7;
        ds_tensor x, y, log_y, dy, dx, log_dx;

        n = size[dim] = between(1, round % 3 ? 40 : 5000);
        x = random_tensor(dtype, 3, size, -far, far);
        dy = random_tensor(dtype, 3, size, -1, 1);
        y = anyhow(dtype, 3, size);
        dx = anyhow(dtype, 3, size);
        log_y = anyhow(dtype, 3, size);
        log_dx = anyhow(dtype, 3, size);
        lines = x.numel / n;
        for (int64_t line = 0; line < lines && n > 1 && between(0, 1); line++)
            set(&x, along(&x, dim, line, n - 1), -INFINITY);
        assert_int_equal(ops->softmax(&y, &x, dim), 0);
        assert_int_equal(ops->log_softmax(&log_y, &x, dim), 0);
        assert_int_equal(ops->softmax_backward(&dx, &dy, &y, dim), 0);
        assert_int_equal(ops->log_softmax_backward(&log_dx, &dy, &log_y, dim), 0);
        for (int64_t line = 0; line < lines; line++) {
            double most = -INFINITY, sum = 0, dot = 0, total = 0, sizes = 0;

            for (int64_t i = 0; i < n; i++)
                most = fmax(most, get(&x, along(&x, dim, line, i)));
            for (int64_t i = 0; i < n; i++) {
                int64_t at = along(&x, dim, line, i);

                sum += exp(get(&x, at) - most);
                dot += get(&dy, at) * get(&y, at);
                total += get(&dy, at);
                sizes += fabs(get(&dy, at));
            }
            for (int64_t i = 0; i < n; i++) {
                int64_t at = along(&x, dim, line, i);
                double p = exp(get(&x, at) - most) / sum, lp = get(&x, at) - most - log(sum);
                double d = get(&y, at) * (get(&dy, at) - dot);
                double ld = get(&dy, at) - exp(get(&log_y, at)) * total;

                near(get(&y, at), p, within(dtype, p, 12 + 2 * far) + 1e-38, "softmax", at);
                near(get(&log_y, at), lp, within(dtype, lp, 2) + eps * 4, "log_softmax", at);
                near(get(&dx, at), d, within(dtype, d, 2) + eps * 2, "softmax_backward", at);
                near(get(&log_dx, at), ld, within(dtype, ld, 2) + eps * (1 + sizes),
                     "log_softmax_backward", at);
            }
        }
        drop(&x);
        drop(&y);
        drop(&log_y);
        drop(&dy);
        drop(&dx);
        drop(&log_dx);
    }
}

static void softmax_specials(void **state)
{
    const ds_ops *ops = kernels();
    ds_tensor x = dense(DS_F32, SHAPE(3, 40)), empty = dense(DS_F32, SHAPE(0, 4));
    ds_tensor none = dense(DS_F32, SHAPE(3, 0));

    (void)state;
    randomise(&x, -1, 1);
    set(&x, 7, NAN);
    for (int i = 40; i < 80; i++)
        set(&x, i, 3e38);
    assert_int_equal(ops->softmax(&x, &x, 1), 0); /* in place */
    for (int i = 0; i < 40; i++)
        assert_true(isnan(get(&x, i)));
    for (int i = 40; i < 80; i++)
        near(get(&x, i), 1.0 / 40, 1e-8, "equal logits", i);
    assert_int_equal(ops->softmax(&empty, &empty, 1), 0);
    assert_int_equal(ops->softmax(&none, &none, 1), 0);
    fails(ops->softmax(&x, &x, 2), DS_EINVAL, "softmax: dimension 3 is not in a tensor of 2");
    drop(&x);
    drop(&empty);
    drop(&none);
}

/* ---- cross-entropy */

static double loss_of(const ds_tensor *x, int64_t row, int64_t target, double smoothing,
                      double *lse)
{
    double most = -INFINITY, sum = 0, mean = 0;
    int64_t n = x->shape[1];

    for (int64_t i = 0; i < n; i++)
        most = fmax(most, get(x, row * n + i));
    for (int64_t i = 0; i < n; i++) {
        sum += exp(get(x, row * n + i) - most);
        mean += get(x, row * n + i) / (double)n;
    }
    *lse = most + log(sum);
    return *lse - (1 - smoothing) * get(x, row * n + target) - smoothing * mean;
}

static void cross_entropies(void **state)
{
    static const int targets[] = {DS_I64, DS_I32, DS_U8};
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 4; round++) {
        int dtype = round % FLOATS, reduction = (int)between(0, 2);
        int wide = dtype == DS_F64 ? DS_F64 : DS_F32;
        int64_t rows = between(1, 30), classes = between(1, round % 5 ? 100 : 6000), count = 0;
        int64_t ignore = between(0, 1) ? -100 : 1, dims[1] = {rows};
        double smoothing = between(0, 1) ? 0.1 : 0, sum = 0;
        double eps = dtype == DS_F64 ? 1e-13 : 2e-6;
        ds_tensor x = random_tensor(dtype, SHAPE(rows, classes), -5, 5);
        ds_tensor t = random_tensor(targets[round % 3], SHAPE(rows), 0,
                                    (double)(classes < 200 ? classes - 1 : 199));
        ds_tensor lse = dense(wide, SHAPE(rows)), dx = anyhow(dtype, SHAPE(rows, classes));
        ds_tensor loss = dense(wide, reduction == 0 ? 1 : 0, dims), dloss = loss;

        set(&t, 0, 0);
        dloss.data = malloc(8 * (size_t)rows);
        randomise(&dloss, 0.5, 2);
        assert_int_equal(ops->cross_entropy(&loss, &lse, &x, &t, ignore, smoothing, reduction), 0);
        for (int64_t i = 0; i < rows; i++)
            count += get(&t, i) != (double)ignore;
        assert_int_equal(
            ops->cross_entropy_backward(&dx, &dloss, &x, &t, &lse, ignore, smoothing, reduction),
            0);
        for (int64_t i = 0; i < rows; i++) {
            int64_t target = (int64_t)get(&t, i);
            double l, one = loss_of(&x, i, target, smoothing, &l);
            double g = get(&dloss, reduction == 0 ? i : 0) / (double)(reduction == 1 ? count : 1);

            if (target == ignore)
                one = g = 0;
            else
                near(get(&lse, i), l, eps * 2, "lse", i);
            sum += one;
            if (reduction == 0)
                near(get(&loss, i), one, eps * 4, "loss", i);
            for (int64_t j = 0; j < classes; j++) {
                double want = g * (exp(get(&x, i * classes + j) - l) -
                                   (1 - smoothing) * (j == target) - smoothing / (double)classes);

                near(get(&dx, i * classes + j), want, within(dtype, want, 4) + eps * g,
                     "cross_entropy_backward", i * classes + j);
            }
        }
        if (reduction)
            near(get(&loss, 0), sum / (double)(reduction == 1 ? count : 1),
                 eps * 4 * (1 + fabs(sum)), "loss", -1);
        free(dloss.data);
        drop(&x);
        drop(&t);
        drop(&lse);
        drop(&dx);
        drop(&loss);
    }
}

static void cross_entropy_errors(void **state)
{
    const ds_ops *ops = kernels();
    ds_tensor x = dense(DS_F32, SHAPE(3, 5)), t = dense(DS_I64, SHAPE(3)),
              r = dense(DS_F32, SHAPE(3));
    ds_tensor loss = scalar(DS_F32, 7), lse = dense(DS_F32, SHAPE(3)),
              all = dense(DS_I64, SHAPE(3));

    (void)state;
    randomise(&x, -1, 1);
    assert_int_equal(ops->fill(&t, 2), 0);
    assert_int_equal(ops->fill(&all, -100), 0);
    set(&t, 1, 5);
    fails(ops->cross_entropy(&loss, &lse, &x, &t, -100, 0, 1), DS_ERANGE,
          "cross_entropy: target 5 of row 1 is out of range for 5 classes");
    assert_true(get(&loss, 0) == 7);
    fails(ops->cross_entropy(&loss, &lse, &x, &r, -100, 0, 1), DS_EINVAL, "the target is f32");
    fails(ops->cross_entropy(&r, &lse, &x, &t, -100, 0, 1), DS_EINVAL, "logits [3 x 5]");
    assert_int_equal(ops->cross_entropy(&loss, &lse, &x, &all, -100, 0, 1), 0);
    assert_true(isnan(get(&loss, 0))); /* the mean of nothing */
    assert_int_equal(ops->cross_entropy_backward(&x, &loss, &x, &all, &lse, -100, 0, 1), 0);
    for (int i = 0; i < 15; i++)
        assert_true(get(&x, i) == 0);
    drop(&x);
    drop(&t);
    drop(&r);
    drop(&loss);
    drop(&lse);
    drop(&all);
}

/* ---- random numbers */

/* Element i is a function of seed, offset and i, whatever the strides: and that of philox.h. */
static void by_counter(void **state)
{
    const ds_ops *ops = kernels();
    const uint64_t seed = 0x123456789abcdef, offset = 0xfffffffe;

    (void)state;
    for (int round = 0; round < ROUNDS; round++) {
        int dtype = round % FLOATS;
        int64_t size[3] = {between(0, 5), between(1, 30), between(1, 200)};
        ds_tensor u = anyhow(dtype, 3, size), z = anyhow(dtype, 3, size);
        ds_tensor k = anyhow(round & 1 ? DS_I64 : DS_I32, 3, size);

        assert_int_equal(ops->uniform(&u, -1, 3, seed, offset), 0);
        assert_int_equal(ops->normal(&z, 0.5, 2, seed, offset), 0);
        assert_int_equal(ops->randint(&k, -3, 8, seed, offset), 0);
        for (int64_t i = 0; i < u.numel; i++) {
            ds_philox_block b = ds_philox(seed, offset + (uint64_t)i / 4);
            uint32_t word = b.lane[i % 4];
            float pair[2];

            ds_normal_pair(&pair[0], &pair[1], b.lane[i % 4 & 2], b.lane[i % 4 | 1]);
            if (dtype != DS_F64) {
                assert_true(get(&u, i) == rounded(dtype, (double)(-1 + 4 * ds_uniform_f32(word))));
                assert_true(get(&z, i) == rounded(dtype, (double)(0.5f + 2 * pair[i & 1])));
            } else {
                near(get(&u, i), -1 + 4 * ((double)word / 0x1p32), 0, "uniform", i);
                near(get(&z, i), 0.5 + 2 * (double)pair[i & 1], 2e-3, "normal", i);
            }
            assert_int_equal(get(&k, i), -3 + (int64_t)((uint64_t)word * 11 >> 32));
        }
        drop(&u);
        drop(&z);
        drop(&k);
    }
}

/* Every level and machine gives these bits. */
static void same_bits_everywhere(void **state)
{
    const ds_ops *ops = kernels();
    ds_tensor z = dense(DS_F32, SHAPE(4096));
    uint64_t hash = 14695981039346656037u;

    (void)state;
    assert_int_equal(ops->normal(&z, 0, 1, 42, 0), 0);
    for (int i = 0; i < 4096; i++)
        hash = (hash ^ ds_bits(((float *)z.data)[i])) * 1099511628211u;
    assert_true(hash == 0x2845b91ada0c86ef);
    drop(&z);
}

static void moments(void **state)
{
    const ds_ops *ops = kernels();
    const int n = 200000;
    ds_tensor u = dense(DS_F32, SHAPE(n)), z = dense(DS_F32, SHAPE(n));
    double mean = 0, square = 0, fourth = 0, flat = 0;

    (void)state;
    assert_int_equal(ops->uniform(&u, 0, 1, 1, 0), 0);
    assert_int_equal(ops->normal(&z, 0, 1, 2, 0), 0);
    for (int i = 0; i < n; i++) {
        double x = get(&z, i), v = get(&u, i);

        assert_true(v >= 0 && v < 1);
        flat += v / n;
        mean += x / n;
        square += x * x / n;
        fourth += x * x * x * x / n;
    }
    near(flat, 0.5, 0.004, "mean of uniform", 0);
    near(mean, 0, 0.01, "mean", 0);
    near(square, 1, 0.02, "variance", 0);
    near(fourth, 3, 0.1, "fourth moment", 0);
    drop(&u);
    drop(&z);
}

static void dropouts(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS; round++) {
        static const double ps[] = {0, 0.1, 0.5, 0.9, 1};
        int dtype = round % FLOATS, kept = 0;
        double p = ps[round % 5];
        int64_t size[2] = {between(1, 40), between(1, 900)};
        ds_tensor x = random_tensor(dtype, 2, size, 1, 2), y = anyhow(dtype, 2, size);

        assert_int_equal(ops->dropout(&y, &x, p, 9, 100), 0);
        for (int64_t i = 0; i < x.numel; i++) {
            uint32_t word = ds_philox(9, 100 + (uint64_t)i / 4).lane[i % 4];
            int keep = (double)ds_uniform_f32(word) >= p;
            double want = keep ? get(&x, i) / (1 - p) : 0;

            kept += keep;
            near(get(&y, i), want, within(dtype, want, 2), "dropout", i);
        }
        near((double)kept, (1 - p) * (double)x.numel, 5 * sqrt((double)x.numel), "kept", 0);
        drop(&x);
        drop(&y);
    }
}

static void random_errors(void **state)
{
    const ds_ops *ops = kernels();
    ds_tensor f = dense(DS_F32, SHAPE(3)), i = dense(DS_I64, SHAPE(3)), u = dense(DS_U8, SHAPE(3));

    (void)state;
    fails(ops->uniform(&i, 0, 1, 0, 0), DS_EINVAL, "uniform: not for i64");
    fails(ops->randint(&f, 0, 9, 0, 0), DS_EINVAL, "randint: not for f32");
    fails(ops->randint(&i, 5, 5, 0, 0), DS_EINVAL, "randint: from 5 to below 5");
    fails(ops->randint(&u, 0, 300, 0, 0), DS_EINVAL, "randint: 299 is not a value of u8");
    fails(ops->dropout(&f, &f, 1.5, 0, 0), DS_EINVAL, "dropout: p is 1.5");
    drop(&f);
    drop(&i);
    drop(&u);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(softmaxes),       cmocka_unit_test(softmax_specials),
        cmocka_unit_test(cross_entropies), cmocka_unit_test(cross_entropy_errors),
        cmocka_unit_test(by_counter),      cmocka_unit_test(same_bits_everywhere),
        cmocka_unit_test(moments),         cmocka_unit_test(dropouts),
        cmocka_unit_test(random_errors),
    };
    int done = each_level(argv);

    (void)argc;
    return done >= 0 ? done : cmocka_run_group_tests_name("softmax", tests, NULL, NULL);
}
