/* test_matmul.c - products against plain loops in double, on every CPU level of this machine. */
#include "tests/c/matrices.h"

#include "kernels/cpu/dnnl.h"
#include "tests/c/levels.h"

/* One element of the product of dense views, and the sum of its terms' sizes. */
static double element(double *size, const ds_tensor *a, const ds_tensor *b, int64_t a0, int64_t b0,
                      int64_t i, int64_t j)
{
    int64_t k = a->shape[a->ndim - 1], n = b->shape[b->ndim - 1];
    double sum = 0;

    *size = 0;
    for (int64_t l = 0; l < k; l++) {
        double term = get(a, a0 + i * k + l) * get(b, b0 + l * n + j);

        sum += term;
        *size += fabs(term);
    }
    return sum;
}

/* Where the batch that holds y's batch `index` begins in x, in logical elements. */
static int64_t batch_of(const ds_tensor *x, const ds_tensor *y, int64_t index)
{
    int64_t at = 0, step = x->shape[x->ndim - 1] * x->shape[x->ndim - 2];

    for (int d = y->ndim - 3, e = x->ndim - 3; d >= 0 && e >= 0; d--, e--) {
        if (x->shape[e] != 1)
            at += index % y->shape[d] * step;
        index /= y->shape[d];
        step *= x->shape[e];
    }
    return at;
}

/* Runs y = alpha a b + beta y and compares all of it, or `samples` elements if there are more. */
static void multiply(ds_tensor *y, const ds_tensor *a, const ds_tensor *b, double alpha,
                     double beta, int64_t samples)
{
    int64_t m = y->shape[y->ndim - 2], n = y->shape[y->ndim - 1];
    double eps = eps_of(y->dtype), inner = y->dtype == DS_F64 ? 0x1p-50 : 0x1p-22;
    double *old = malloc((size_t)(y->numel + 1) * sizeof *old);
    void *before = copy_of(y);

    for (int64_t i = 0; i < y->numel; i++)
        old[i] = beta != 0 ? beta * get(y, i) : 0;
    if (kernels()->matmul(y, a, b, alpha, beta) < 0)
        fail_msg("%s", ds_error());
    for (int64_t s = 0; s < (samples < y->numel ? samples : y->numel); s++) {
        int64_t i = samples < y->numel ? between(0, y->numel - 1) : s;
        double size, want = element(&size, a, b, batch_of(a, y, i / (m * n)),
                                    batch_of(b, y, i / (m * n)), i / n % m, i % n);

        want = (alpha != 0 ? alpha * want : 0) + old[i];
        near(get(y, i), want,
             eps * fabs(want) + inner * (fabs(alpha) * size + fabs(old[i])) +
                 (y->dtype == DS_F16 ? 0x1p-24 : 0),
             "matmul", i);
    }
    margins_kept(y, before);
    free(old);
}

static double pick(const double *of, int n)
{
    return of[between(0, n - 1)];
}

static int64_t odd_size(int64_t limit)
{
    return random01() < 0.2 ? 1 : between(1, limit);
}

static void random_product(int dtype, int batches, int64_t limit)
{
    static const double alphas[] = {1, 1, 1, 0.5, -2, 0}, betas[] = {0, 0, 1, 0.5};
    int64_t m = odd_size(limit), n = odd_size(limit), k = odd_size(limit);
    int64_t ys[DS_MAX_DIM], as[DS_MAX_DIM], bs[DS_MAX_DIM];
    int a_skips = batches && random01() < 0.3, b_skips = batches && random01() < 0.4;
    int y_dtype = random01() < 0.3 && dtype != DS_F64 ? DS_F32 : dtype;
    ds_tensor y, a, b;

    for (int d = 0; d < batches; d++) {
        ys[d] = between(1, 3);
        as[d] = random01() < 0.25 ? 1 : ys[d];
        bs[d] = random01() < 0.25 ? 1 : ys[d];
    }
    ys[batches] = as[batches] = m, ys[batches + 1] = bs[batches + 1] = n;
    as[batches + 1] = bs[batches] = k;
    a_skips = a_skips ? batches : 0, b_skips = b_skips ? batches : 0;
    y = make(y_dtype, (int)between(0, LAYOUTS - 1), batches + 2, ys);
    a = make(dtype, (int)between(0, LAYOUTS - 1), batches + 2 - a_skips, as + a_skips);
    b = make(dtype, (int)between(0, LAYOUTS - 1), batches + 2 - b_skips, bs + b_skips);
    randomise(&y, 1);
    randomise(&a, 1);
    randomise(&b, 1);
    multiply(&y, &a, &b, pick(alphas, 6), pick(betas, 4), y.numel);
    drop(&y), drop(&a), drop(&b);
}

static void random_products_match(void **state)
{
    (void)state;
    for (int i = 0; i < 320; i++)
        random_product(i % 4, i / 4 % 4, i % 16 == 0 ? 130 : 40);
}

/* A dimension with stride 0, as expand() makes, cannot go to oneDNN as it is. */
static void expanded_operands_match(void **state)
{
    (void)state;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++) {
        ds_tensor y = make(dtype, ROWS, 3, (int64_t[]){3, 20, 30});
        ds_tensor a = make(dtype, ROWS, 3, (int64_t[]){3, 20, 10});
        ds_tensor b = make(dtype, ROWS, 2, (int64_t[]){10, 30});

        randomise(&a, 1);
        randomise(&b, 1);
        a.stride[0] = a.stride[1] = 0; /* one row, seen 60 times */
        multiply(&y, &a, &b, 1, 0, y.numel);
        a.stride[1] = 4; /* rows that overlap, as windows do */
        multiply(&y, &a, &b, 1, 0, y.numel);
        b.stride[1] = 0;
        multiply(&y, &a, &b, 1, 0, y.numel);
        drop(&y), drop(&a), drop(&b);
    }
}

static void one_large_product(int dtype, int y_dtype, int a_layout, int b_layout, int64_t m,
                              int64_t n, int64_t k, double beta)
{
    ds_tensor y = make(y_dtype, ROWS, 2, (int64_t[]){m, n});
    ds_tensor a = make(dtype, a_layout, 2, (int64_t[]){m, k});
    ds_tensor b = make(dtype, b_layout, 2, (int64_t[]){k, n});

    randomise(&y, 1);
    randomise(&a, 1);
    randomise(&b, 1);
    multiply(&y, &a, &b, 1, beta, k > 10000 ? 5 : 200);
    drop(&y), drop(&a), drop(&b);
}

/* Larger than what is packed at once: every way of splitting. */
static void products_taken_apart_match(void **state)
{
    (void)state;
    one_large_product(DS_F16, DS_F16, ROWS, ROWS, 5000, 8, 1000, 0);
    one_large_product(DS_F16, DS_F32, COLUMNS, ROWS, 8, 5000, 1000, 0.5);
    one_large_product(DS_BF16, DS_F32, SCATTERED, SCATTERED, 9, 7, 600001, 1);
    one_large_product(DS_BF16, DS_BF16, SCATTERED, SCATTERED, 9, 7, 600001, 1);
    one_large_product(DS_F16, DS_F16, ROWS, COLUMNS, 2100, 2100, 5, 0);
}

/* Sizes at which other kernels are chosen than for small ones. */
static void training_shapes_match(void **state)
{
    (void)state;
    for (int dtype = DS_F32; dtype <= DS_BF16; dtype++) {
        one_large_product(dtype, dtype, ROWS, COLUMNS, 384, 512, 128, 0);  /* forward */
        one_large_product(dtype, dtype, ROWS, ROWS, 384, 512, 128, 0);     /* gradient of x */
        one_large_product(dtype, DS_F32, COLUMNS, ROWS, 512, 128, 768, 1); /* gradient of w */
        one_large_product(dtype, dtype, ROWS, COLUMNS, 2100, 300, 257, 0);
        one_large_product(dtype, dtype, ROWS, ROWS, 2100, 300, 257, 0.5);
        one_large_product(dtype, dtype, ROWS, COLUMNS, 300, 1500, 800, 0);
        one_large_product(dtype, DS_F32, COLUMNS, ROWS, 1500, 1200, 64, 1);
        one_large_product(dtype, dtype, ROWS, COLUMNS, 768, 65, 128, 0);
    }
}

static void empty_sizes_work(void **state)
{
    (void)state;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++)
        for (int empty = 0; empty < 4; empty++) {
            int64_t B = empty != 3 ? 2 : 0, m = empty ? 3 : 0, n = empty != 1 ? 4 : 0;
            int64_t k = empty != 2 ? 5 : 0;
            ds_tensor y = make(dtype, ROWS, 3, (int64_t[]){B, m, n});
            ds_tensor a = make(dtype, ROWS, 3, (int64_t[]){B, m, k});
            ds_tensor b = make(dtype, ROWS, 3, (int64_t[]){B, k, n});

            randomise(&y, 1);
            randomise(&a, 1);
            randomise(&b, 1);
            multiply(&y, &a, &b, 1, 0.5, y.numel);
            multiply(&y, &a, &b, 1, 0, y.numel);
            for (int64_t i = 0; empty == 2 && i < y.numel; i++)
                assert_true(get(&y, i) == 0);
            drop(&y), drop(&a), drop(&b);
        }
}

static void non_finite_values_go_where_they_belong(void **state)
{
    (void)state;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++)
        for (int layout = ROWS; layout < LAYOUTS; layout++) {
            ds_tensor y = make(dtype, ROWS, 2, (int64_t[]){33, 17});
            ds_tensor a = make(dtype, layout, 2, (int64_t[]){33, 40});
            ds_tensor b = make(dtype, layout, 2, (int64_t[]){40, 17});

            for (int64_t i = 0; i < y.numel; i++)
                set(&y, i, NAN);
            for (int64_t i = 0; i < a.numel; i++)
                set(&a, i, 1);
            for (int64_t i = 0; i < b.numel; i++)
                set(&b, i, 1);
            assert_int_equal(kernels()->matmul(&y, &a, &b, 1, 0), 0);
            for (int64_t i = 0; i < y.numel; i++)
                assert_true(get(&y, i) == 40); /* what y held is not read */
            set(&a, 5 * 40 + 39, NAN);
            set(&a, 7 * 40 + 1, INFINITY);
            set(&b, 2 * 17 + 16, -INFINITY);
            assert_int_equal(kernels()->matmul(&y, &a, &b, 1, 0), 0);
            for (int64_t i = 0; i < y.numel; i++) {
                int64_t row = i / 17, col = i % 17;
                double want = row == 5 || (row == 7 && col == 16) ? NAN
                              : row == 7                          ? INFINITY
                              : col == 16                         ? -INFINITY
                                                                  : 40;

                near(get(&y, i), want, 0, "non-finite", i);
            }
            assert_int_equal(kernels()->matmul(&y, &a, &b, 1, 1), 0);
            assert_true(isnan(get(&y, 5 * 17)));
            drop(&y), drop(&a), drop(&b);
        }
}

static void same_bits_every_time(void **state)
{
    static const int64_t shapes[][3] = {{100, 96, 200}, {7, 300, 64}, {256, 64, 1000}};

    (void)state;
    for (int i = 0; i < 12; i++) {
        const int64_t *s = shapes[i / 4];
        ds_tensor y = make(i % 4, ROWS, 2, (int64_t[]){s[0], s[1]});
        ds_tensor a = make(i % 4, COLUMNS, 2, (int64_t[]){s[0], s[2]});
        ds_tensor b = make(i % 4, ROWS, 2, (int64_t[]){s[2], s[1]});
        void *first;

        randomise(&a, 1);
        randomise(&b, 1);
        assert_int_equal(kernels()->matmul(&y, &a, &b, 1, 0), 0);
        first = copy_of(&y);
        for (int again = 0; again < 3; again++) {
            memset(y.data, 0x55, span(&y));
            assert_int_equal(kernels()->matmul(&y, &a, &b, 1, 0), 0);
            assert_memory_equal(first, y.data, (size_t)(y.numel * ds_bytes_of(y.dtype)));
        }
        free(first);
        drop(&y), drop(&a), drop(&b);
    }
}

static void product_of_size(int64_t m)
{
    ds_tensor y = make(DS_F32, ROWS, 2, (int64_t[]){m, 8});
    ds_tensor a = make(DS_F32, ROWS, 2, (int64_t[]){m, 12});
    ds_tensor b = make(DS_F32, ROWS, 2, (int64_t[]){12, 8});

    randomise(&a, 1);
    randomise(&b, 1);
    multiply(&y, &a, &b, 1, 0, y.numel);
    drop(&y), drop(&a), drop(&b);
}

static void changing_shapes_do_not_leak(void **state)
{
    ds_dnnl_counters before, after;

    (void)state;
    product_of_size(5);
    before = ds_dnnl_count();
    product_of_size(5);
    assert_int_equal(ds_dnnl_count().created, before.created); /* found again */
    ds_dnnl_cache_limit(4);
    for (int round = 0; round < 3; round++)
        for (int64_t m = 1; m <= 10; m++) {
            product_of_size(m);
            assert_true(ds_dnnl_count().kept <= 4);
        }
    before = ds_dnnl_count();
    for (int64_t m = 7; m <= 10; m++)
        product_of_size(m); /* the four used last are still there */
    after = ds_dnnl_count();
    assert_int_equal(after.created, before.created);
    product_of_size(7); /* used again, so 8 is the oldest now */
    product_of_size(100);
    before = ds_dnnl_count();
    product_of_size(7);
    assert_int_equal(ds_dnnl_count().created, before.created);
    product_of_size(8);
    assert_int_equal(ds_dnnl_count().created, before.created + 1);
    ds_dnnl_cache_limit(512);
    for (int64_t m = 1; m <= 700; m++)
        product_of_size(m);
    assert_int_equal(ds_dnnl_count().kept, 512);
}

static void refused(const ds_tensor *y, const ds_tensor *a, const ds_tensor *b, const char *why)
{
    ds_tensor out = *y;

    fails(kernels()->matmul(&out, a, b, 1, 0), DS_EINVAL, why);
}

static void wrong_calls_are_refused(void **state)
{
    ds_tensor y = make(DS_F32, ROWS, 3, (int64_t[]){2, 3, 4}), other = y;
    ds_tensor a = make(DS_F32, ROWS, 3, (int64_t[]){2, 3, 5});
    ds_tensor b = make(DS_F32, ROWS, 2, (int64_t[]){5, 4});

    (void)state;
    refused(&y, &a, &a, "[3 x 4] of [3 x 5] and [3 x 5]");
    other.ndim = 1;
    refused(&y, &a, &other, "dimensions");
    other = y;
    other.dtype = DS_BF16;
    refused(&other, &a, &b, "bf16 of f32 and f32");
    other = b;
    other.dtype = DS_F16;
    refused(&y, &a, &other, "f32 and f16");
    other = y;
    other.shape[0] = 6;
    refused(&other, &a, &b, "broadcast batch dimension 0 from 2 to 6");
    drop(&y), drop(&a), drop(&b);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_products_match),
        cmocka_unit_test(expanded_operands_match),
        cmocka_unit_test(products_taken_apart_match),
        cmocka_unit_test(training_shapes_match),
        cmocka_unit_test(empty_sizes_work),
        cmocka_unit_test(non_finite_values_go_where_they_belong),
        cmocka_unit_test(same_bits_every_time),
        cmocka_unit_test(changing_shapes_do_not_leak),
        cmocka_unit_test(wrong_calls_are_refused),
    };
    int done = each_level(argv);

    (void)argc;
    return done >= 0 ? done : cmocka_run_group_tests(tests, NULL, NULL);
}
