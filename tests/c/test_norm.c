/* test_norm.c - layer norm and RMS norm against plain loops in double, on every CPU level. */

#include "tests/c/levels.h"
#include "tests/c/numbers.h"

#define EPS 1e-5

/* [A, R, C] in memory, or views of something larger. */
typedef struct setting {
    int64_t A, R, C;
    int x_dtype, y_dtype, w_dtype, dw_dtype;
    int centred, residual, has_w, has_b, accumulate, dense;
} setting;

typedef struct call {
    setting z;
    ds_tensor x, delta, sum, y, dy, dsum, dx, w, b, dw, db, mean, rstd;
    double *y_d, *sum_d, *dx_d, *dw_d, *db_d;
    void *memory[24];
    int blocks;
} call;

static void *take(call *c, size_t bytes)
{
    void *block = malloc(bytes + 1);

    assert_non_null(block);
    memset(block, 0xff, bytes);
    c->memory[c->blocks++] = block;
    return block;
}

/* Filled with noise around `middle`. */
static ds_tensor rows(call *c, int dtype, double middle)
{
    const setting *z = &c->z;
    int64_t extra = z->dense ? 0 : 3;
    ds_tensor t = {.numel = z->A * z->R * z->C,
                   .shape = {z->A, z->R, z->C},
                   .ndim = 3,
                   .dtype = dtype,
                   .dense = z->dense};

    t.stride[2] = 1;
    t.stride[1] = z->C + extra; /* strided: a transposed view of [R, A, C + 3] */
    t.stride[0] = z->dense ? z->R * z->C : z->C + extra;
    t.stride[1] = z->dense ? z->C : z->A * (z->C + extra);
    t.data = take(c, (size_t)(z->A * z->R * (z->C + extra) * ds_bytes_of(dtype)));
    for (int64_t a = 0; a < z->A; a++)
        for (int64_t r = 0; r < z->R; r++)
            for (int64_t i = 0; i < z->C; i++)
                set_at(&t, a * t.stride[0] + r * t.stride[1] + i, middle + uniform(-2, 2));
    return t;
}

static ds_tensor vector(call *c, int dtype, int64_t n)
{
    ds_tensor t = {.numel = n, .shape = {n}, .stride = {1}, .ndim = 1, .dtype = dtype, .dense = 1};

    t.data = take(c, (size_t)(n * ds_bytes_of(dtype)));
    for (int64_t i = 0; i < n; i++)
        set_at(&t, i, uniform(-2, 2));
    return t;
}

static int64_t row_at(const ds_tensor *t, int64_t r)
{
    return r / t->shape[1] * t->stride[0] + r % t->shape[1] * t->stride[1];
}

static void make(call *c, const setting *z)
{
    int f64 = z->x_dtype == DS_F64;
    int64_t n = z->A * z->R;

    memset(c, 0, sizeof *c);
    c->z = *z;
    c->x = rows(c, z->x_dtype, 0.7);
    c->delta = rows(c, z->y_dtype, 0);
    c->sum = rows(c, z->x_dtype, 0);
    c->y = rows(c, z->y_dtype, 0);
    c->dy = rows(c, z->y_dtype, 0.1);
    c->dsum = rows(c, z->x_dtype, 0);
    c->dx = rows(c, z->x_dtype, 0);
    c->w = vector(c, z->w_dtype, z->C);
    c->b = vector(c, z->w_dtype, z->C);
    c->dw = vector(c, z->dw_dtype, z->C);
    c->db = vector(c, z->dw_dtype, z->C);
    c->mean = vector(c, f64 ? DS_F64 : DS_F32, n);
    c->rstd = vector(c, f64 ? DS_F64 : DS_F32, n);
    c->y_d = take(c, (size_t)c->x.numel * 8);
    c->sum_d = take(c, (size_t)c->x.numel * 8);
    c->dx_d = take(c, (size_t)c->x.numel * 8);
    c->dw_d = take(c, (size_t)z->C * 8);
    c->db_d = take(c, (size_t)z->C * 8);
    for (int64_t i = 0; i < z->C; i++) {
        c->dw_d[i] = z->accumulate ? get_at(&c->dw, i) : 0;
        c->db_d[i] = z->accumulate ? get_at(&c->db, i) : 0;
    }
}

static void drop(call *c)
{
    while (c->blocks)
        free(c->memory[--c->blocks]);
}

static int forward(call *c)
{
    const setting *z = &c->z;

    return kernels()->norm(&c->y, z->residual ? &c->sum : NULL, z->centred ? &c->mean : NULL,
                           &c->rstd, &c->x, z->residual ? &c->delta : NULL, z->has_w ? &c->w : NULL,
                           z->has_b ? &c->b : NULL, EPS);
}

static int backward(call *c)
{
    const setting *z = &c->z;

    return kernels()->norm_backward(&c->dx, z->has_w ? &c->dw : NULL, z->has_b ? &c->db : NULL,
                                    &c->dy, z->residual ? &c->sum : &c->x, z->has_w ? &c->w : NULL,
                                    z->centred ? &c->mean : NULL, &c->rstd,
                                    z->residual ? &c->dsum : NULL, z->accumulate);
}

/* Of what the forward pass normalised: `sum` as it was rounded. */
static void expect_row(call *c, int64_t r)
{
    const setting *z = &c->z;
    ds_tensor one = {.data = (double[]){0}, .dtype = z->x_dtype};
    double *y = c->y_d + r * z->C, *x = c->sum_d + r * z->C, *dx = c->dx_d + r * z->C;
    double mean = 0, square = 0, rstd, s = 0, q = 0;

    for (int64_t i = 0; i < z->C; i++) {
        x[i] = get_at(&c->x, row_at(&c->x, r) + i);
        if (z->residual) {
            set_at(&one, 0, x[i] + get_at(&c->delta, row_at(&c->delta, r) + i));
            x[i] = get_at(&one, 0);
        }
        mean += z->centred ? x[i] / (double)z->C : 0;
    }
    for (int64_t i = 0; i < z->C; i++)
        square += (x[i] - mean) * (x[i] - mean) / (double)z->C;
    rstd = 1 / sqrt(square + EPS);
    for (int64_t i = 0; i < z->C; i++) {
        double h = (x[i] - mean) * rstd, dy = get_at(&c->dy, row_at(&c->dy, r) + i);
        double w = z->has_w ? get_at(&c->w, i) : 1;

        y[i] = h * w + (z->has_b ? get_at(&c->b, i) : 0);
        c->dw_d[i] += dy * h;
        c->db_d[i] += dy;
        s += z->centred ? dy * w / (double)z->C : 0;
        q += dy * w * h / (double)z->C;
    }
    for (int64_t i = 0; i < z->C; i++)
        dx[i] = rstd * (get_at(&c->dy, row_at(&c->dy, r) + i) * (z->has_w ? get_at(&c->w, i) : 1) -
                        s - (x[i] - mean) * rstd * q) +
                (z->residual ? get_at(&c->dsum, row_at(&c->dsum, r) + i) : 0);
}

static double precision(int dtype)
{
    static const double of[] = {
        [DS_F32] = 3e-6, [DS_BF16] = 8e-3, [DS_F16] = 1e-3, [DS_F64] = 1e-12};

    return of[dtype];
}

static void close_to(const call *c, const char *name, double have, double want, double tolerance)
{
    const setting *z = &c->z;

    if (!(fabs(have - want) <= tolerance))
        fail_msg("%s is %.9g, not %.9g: [%d x %d x %d] x %s y %s w %s dw %s centred %d residual %d "
                 "w %d b %d",
                 name, have, want, (int)z->A, (int)z->R, (int)z->C, ds_name_of(z->x_dtype),
                 ds_name_of(z->y_dtype), ds_name_of(z->w_dtype), ds_name_of(z->dw_dtype),
                 z->centred, z->residual, z->has_w, z->has_b);
}

static void compare(const setting *z)
{
    double rows_of_all = (double)(z->A * z->R);
    call c;

    make(&c, z);
    if (forward(&c) != 0 || backward(&c) != 0)
        fail_msg("%s", ds_error());
    for (int64_t r = 0; r < z->A * z->R; r++) {
        expect_row(&c, r);
        for (int64_t i = 0; i < z->C; i++) {
            double y = c.y_d[r * z->C + i], dx = c.dx_d[r * z->C + i];

            if (z->residual)
                close_to(&c, "sum", get_at(&c.sum, row_at(&c.sum, r) + i), c.sum_d[r * z->C + i],
                         0);
            close_to(&c, "y", get_at(&c.y, row_at(&c.y, r) + i), y,
                     precision(z->y_dtype) * (1 + fabs(y)));
            close_to(&c, "dx", get_at(&c.dx, row_at(&c.dx, r) + i), dx,
                     precision(z->x_dtype) * (5 + fabs(dx)) / (z->C == 1 ? EPS : 1));
        }
    }
    for (int64_t i = 0; i < z->C; i++) {
        double off =
            precision(z->dw_dtype) * (1 + fabs(c.dw_d[i]) + fabs(c.db_d[i]) + sqrt(rows_of_all));

        if (z->has_w)
            close_to(&c, "dw", get_at(&c.dw, i), c.dw_d[i], off);
        if (z->has_b)
            close_to(&c, "db", get_at(&c.db, i), c.db_d[i], off);
    }
    drop(&c);
}

static void random_calls_match(void **unused)
{
    (void)unused;
    for (int i = 0; i < 300; i++) {
        int f64 = between(0, 6) == 0;
        setting z = {.A = between(1, 3),
                     .R = between(1, 40),
                     .C = between(2, 200),
                     .x_dtype = f64 ? DS_F64 : (int)between(DS_F32, DS_F16),
                     .y_dtype = f64 ? DS_F64 : (int)between(DS_F32, DS_F16),
                     .centred = (int)between(0, 1),
                     .residual = (int)between(0, 1),
                     .has_w = between(0, 3) > 0,
                     .has_b = (int)between(0, 1),
                     .accumulate = (int)between(0, 1),
                     .dense = (int)between(0, 1)};

        z.w_dtype = f64 ? DS_F64 : (int)between(DS_F32, DS_F16);
        z.dw_dtype = f64 ? DS_F64 : between(0, 1) ? DS_F32 : z.w_dtype;
        compare(&z);
    }
}

static void many_wide_rows_match(void **unused)
{
    setting z = {.A = 2,
                 .R = 300,
                 .C = 768,
                 .x_dtype = DS_F32,
                 .y_dtype = DS_BF16,
                 .centred = 1,
                 .residual = 1,
                 .has_w = 1,
                 .has_b = 1,
                 .dense = 1};

    (void)unused;
    compare(&z);
    z.x_dtype = DS_BF16;
    compare(&z);
    z.C = 4097;
    z.R = 11;
    z.centred = 0;
    compare(&z);
}

/* In place: the residual's sum over x, the gradient over dsum, as a training step does it. */
static void works_in_place(void **unused)
{
    setting z = {.A = 1, .R = 30, .C = 70, .centred = 1, .residual = 1, .has_w = 1, .dense = 1};
    call apart, in_place;

    (void)unused;
    random_state = 5;
    make(&apart, &z);
    random_state = 5;
    make(&in_place, &z);
    in_place.sum.data = in_place.x.data;
    in_place.dx.data = in_place.dsum.data;
    assert_int_equal(forward(&apart), 0);
    assert_int_equal(backward(&apart), 0);
    assert_int_equal(forward(&in_place), 0);
    assert_int_equal(backward(&in_place), 0);
    assert_memory_equal(apart.y.data, in_place.y.data, 30 * 70 * 4);
    assert_memory_equal(apart.dx.data, in_place.dx.data, 30 * 70 * 4);
    drop(&apart);
    drop(&in_place);
}

/* The variance of numbers far from 0 keeps its digits. */
static void a_large_mean_costs_nothing(void **unused)
{
    setting z = {.A = 1, .R = 4, .C = 512, .centred = 1, .dense = 1};
    call c;

    (void)unused;
    make(&c, &z);
    for (int64_t i = 0; i < c.x.numel; i++)
        set_at(&c.x, i, 4096 + (double)(i % 2)); /* variance 1/4, exact in f32 */
    assert_int_equal(forward(&c), 0);
    for (int64_t i = 0; i < c.x.numel; i++)
        assert_true(fabs(get_at(&c.y, i) - (i % 2 ? 1 : -1)) < 1e-4);
    drop(&c);
}

static void same_bits_every_time(void **unused)
{
    setting z = {.A = 1, .R = 500, .C = 130, .centred = 1, .has_w = 1, .has_b = 1, .dense = 1};
    float dw[130], db[130];
    call c;

    (void)unused;
    make(&c, &z);
    assert_int_equal(forward(&c), 0);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(backward(&c), 0);
        if (i > 0) {
            assert_memory_equal(dw, c.dw.data, sizeof dw);
            assert_memory_equal(db, c.db.data, sizeof db);
        }
        memcpy(dw, c.dw.data, sizeof dw);
        memcpy(db, c.db.data, sizeof db);
    }
    drop(&c);
}

/* The sum of y dy, for differences. */
static double weighted(call *c)
{
    double sum = 0;

    assert_int_equal(forward(c), 0);
    for (int64_t i = 0; i < c->y.numel; i++)
        sum += get_at(&c->y, i) * get_at(&c->dy, i);
    return sum;
}

static void f64_gradients_match_differences(void **unused)
{
    (void)unused;
    for (int centred = 0; centred < 2; centred++) {
        setting z = {.A = 1,
                     .R = 3,
                     .C = 5,
                     .x_dtype = DS_F64,
                     .y_dtype = DS_F64,
                     .w_dtype = DS_F64,
                     .dw_dtype = DS_F64,
                     .centred = centred,
                     .has_w = 1,
                     .has_b = 1,
                     .dense = 1};
        call c;
        ds_tensor *in[3], *grad[3];

        make(&c, &z);
        assert_int_equal(forward(&c), 0);
        assert_int_equal(backward(&c), 0);
        in[0] = &c.x, in[1] = &c.w, in[2] = &c.b;
        grad[0] = &c.dx, grad[1] = &c.dw, grad[2] = &c.db;
        for (int which = 0; which < 3; which++)
            for (int64_t i = 0; i < in[which]->numel; i++) {
                double *x = (double *)in[which]->data + i, was = *x, h = 1e-6, side[2];

                *x = was + h;
                side[1] = weighted(&c);
                *x = was - h;
                side[0] = weighted(&c);
                *x = was;
                assert_true(fabs((side[1] - side[0]) / (2 * h) - get_at(grad[which], i)) < 1e-7);
            }
        drop(&c);
    }
}

static void wrong_calls_are_refused(void **unused)
{
    setting z = {.A = 1, .R = 3, .C = 5, .centred = 1, .residual = 1, .has_w = 1, .dense = 1};
    call c;

    (void)unused;
    make(&c, &z);
    c.w.numel = 4;
    fails(forward(&c), DS_EINVAL, "4 elements");
    c.w.numel = 5;
    c.y.dtype = DS_F64;
    fails(forward(&c), DS_EINVAL, "f64");
    c.y.dtype = DS_F32;
    c.x.stride[2] = 2;
    fails(forward(&c), DS_EINVAL, "contiguous()");
    c.x.stride[2] = 1;
    c.rstd.numel = 2;
    fails(forward(&c), DS_EINVAL, "rstd");
    c.rstd.numel = 3;
    c.dsum.dtype = DS_BF16;
    fails(backward(&c), DS_EINVAL, "dsum");
    c.dsum.dtype = DS_F32;
    assert_int_equal(forward(&c), 0);
    assert_int_equal(backward(&c), 0);
    drop(&c);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_calls_match),
        cmocka_unit_test(many_wide_rows_match),
        cmocka_unit_test(works_in_place),
        cmocka_unit_test(a_large_mean_costs_nothing),
        cmocka_unit_test(same_bits_every_time),
        cmocka_unit_test(f64_gradients_match_differences),
        cmocka_unit_test(wrong_calls_are_refused),
    };
    int done = each_level(argv);

    (void)argc;
    return done >= 0 ? done : cmocka_run_group_tests(tests, NULL, NULL);
}
