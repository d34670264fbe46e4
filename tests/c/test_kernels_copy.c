/* Copying, filling, indexing, masks and embedding at every CPU level, against loops over elements. */
#include "tests/c/helpers.h"
#include "tests/c/levels.h"

#define ROUNDS 16

typedef struct shape {
    int ndim;
    int64_t size[DS_MAX_DIM];
} shape;

static shape any_shape(int least, int most, int64_t elements)
{
    shape s = {.ndim = (int)between(least, most)};

    for (int i = s.ndim - 1; i >= 0; i--) {
        int64_t limit = elements < 90 ? elements : between(0, 2) ? 9 : 90;

        s.size[i] = between(0, 30) == 0 ? 0 : between(1, limit);
        elements /= s.size[i] ? s.size[i] : 1;
    }
    return s;
}

/* Element `i` of a shape as positions. */
static void positions(int64_t *at, const ds_tensor *t, int64_t i)
{
    for (int d = t->ndim - 1; d >= 0; d--) {
        at[d] = i % t->shape[d];
        i /= t->shape[d];
    }
}

static int64_t number_of(const ds_tensor *t, const int64_t *at)
{
    int64_t i = 0;

    for (int d = 0; d < t->ndim; d++)
        i = i * t->shape[d] + at[d];
    return i;
}

/* What a value becomes in a dtype: towards zero for integers, not zero for bool. */
static double converted(int dtype, double x)
{
    if (ds_is_float(dtype))
        return rounded(dtype, x);
    return dtype == DS_BOOL ? x != 0 : dtype == DS_U8 ? fmin(fmax(trunc(x), 0), 255) : trunc(x);
}

static void copies(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int to = 0; to < DS_DTYPES; to++)
        for (int from = 0; from < DS_DTYPES; from++)
            for (int round = 0; round < ROUNDS / 4; round++) {
                shape s = any_shape(0, 5, 3000);
                double low = from == DS_U8 || from == DS_BOOL ? 0 : -9;
                double high = from == DS_BOOL ? 1 : 9;
                ds_tensor x = random_tensor(from, s.ndim, s.size, low, high);
                ds_tensor y = anyhow(to, s.ndim, s.size);

                assert_int_equal(ops->copy(&y, &x), 0);
                for (int64_t i = 0; i < y.numel; i++)
                    near(get(&y, i), converted(to, get(&x, i)), 0, "copy", i);
                drop(&x);
                drop(&y);
            }
}

/* All sides around the size of a tile, and several threads. */
static void transposes(void **state)
{
    static const int64_t sizes[][2] = {{64, 64}, {65, 63}, {16, 200},  {200, 16}, {1, 300},
                                       {300, 1}, {7, 500}, {150, 150}, {33, 31}};
    const ds_ops *ops = kernels();

    (void)state;
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
        for (int dtype = 0; dtype < DS_DTYPES; dtype++) {
            ds_tensor x = dense(dtype, SHAPE(2, sizes[k][0], sizes[k][1])), view, y;

            randomise(&x, 0, 1);
            view = transposed(&x, 1, 2);
            y = dense(dtype, 3, view.shape);
            assert_int_equal(ops->copy(&y, &view), 0);
            for (int64_t i = 0; i < y.numel; i++)
                assert_true(get(&y, i) == get(&view, i));
            drop(&x);
            drop(&y);
        }
}

static void copy_limits(void **state)
{
    const ds_ops *ops = kernels();
    ds_tensor x = dense(DS_F64, SHAPE(6)), y = dense(DS_I32, SHAPE(6)), z = dense(DS_F16, SHAPE(6));
    ds_tensor wide = dense(DS_I64, SHAPE(2)), b = dense(DS_BOOL, SHAPE(6)), row = scalar(DS_F32, 3);
    static const double values[] = {1e300, -1e300, NAN, 65519.99, 0x1.002p0 + 0x1p-40, -0.0};
    static const double i32[] = {INT32_MAX, INT32_MIN, 0, 65519, 1, 0};
    static const double f16[] = {INFINITY, -INFINITY, NAN, 65504, 0x1.004p0, -0.0};

    (void)state;
    for (int i = 0; i < 6; i++)
        set(&x, i, values[i]);
    assert_int_equal(ops->copy(&y, &x), 0);
    assert_int_equal(ops->copy(&z, &x),
                     0); /* rounded once: not through f32 to the even neighbour */
    assert_int_equal(ops->copy(&b, &x), 0);
    for (int i = 0; i < 6; i++) {
        near(get(&y, i), i32[i], 0, "to i32", i);
        near(get(&z, i), f16[i], 0, "to f16", i);
        near(get(&b, i), values[i] != 0, 0, "to bool", i);
    }
    ((int64_t *)wide.data)[0] = INT64_MAX - 1;
    ((int64_t *)wide.data)[1] = -5;
    {
        ds_tensor same = dense(DS_I64, SHAPE(2));

        assert_int_equal(ops->copy(&same, &wide), 0);
        assert_true(((int64_t *)same.data)[0] == INT64_MAX - 1);
        drop(&same);
    }
    assert_int_equal(ops->copy(&x, &row), 0); /* broadcasts */
    assert_true(get(&x, 5) == 3);
    fails(ops->copy(&wide, &x), DS_EINVAL, "copy: [6] does not broadcast to [2]");
    drop(&x);
    drop(&y);
    drop(&z);
    drop(&wide);
    drop(&b);
    drop(&row);
}

static void fills(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 4; round++) {
        int dtype = round % DS_DTYPES;
        shape s = any_shape(0, 4, 3000), one = {.ndim = 1, .size = {between(0, 1500)}};
        ds_tensor y = anyhow(dtype, s.ndim, s.size), r = anyhow(dtype, one.ndim, one.size);

        assert_int_equal(ops->fill(&y, 1), 0);
        for (int64_t i = 0; i < y.numel; i++)
            assert_true(get(&y, i) == 1);
        if (dtype != DS_BOOL && dtype != DS_U8) {
            assert_int_equal(ops->arange(&r, -7, 0.5), 0);
            for (int64_t i = 0; i < r.numel; i++)
                assert_true(get(&r, i) == converted(dtype, -7 + 0.5 * (double)i));
        }
        drop(&y);
        drop(&r);
    }
    {
        ds_tensor i = dense(DS_I32, SHAPE(2)), m = dense(DS_I32, SHAPE(2, 2));

        fails(ops->fill(&i, 0.5), DS_EINVAL, "fill: 0.5 is not a value of i32");
        fails(ops->arange(&m, 0, 1), DS_EINVAL, "arange: the result has 2 dimensions");
        drop(&i);
        drop(&m);
    }
}

static void triangles(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 4; round++) {
        int dtype = round % DS_DTYPES, upper = (int)between(0, 1), diagonal = (int)between(-4, 4);
        shape s = any_shape(2, 4, 2000);
        ds_tensor x = random_tensor(dtype, s.ndim, s.size, 0, 1), y = anyhow(dtype, s.ndim, s.size);

        for (int in_place = 0; in_place < 2; in_place++) {
            ds_tensor *out = in_place ? &x : &y;

            assert_int_equal(ops->triangle(out, &x, diagonal, upper), 0);
            for (int64_t i = 0; i < y.numel; i++) {
                int64_t at[DS_MAX_DIM];

                positions(at, &y, i);
                at[0] = at[s.ndim - 1] - at[s.ndim - 2];
                near(get(out, i), (upper ? at[0] >= diagonal : at[0] <= diagonal) ? get(&x, i) : 0,
                     0, "triangle", i);
            }
        }
        drop(&x);
        drop(&y);
    }
}

/* ---- indices */

static void gathers(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 8; round++) {
        int dtype = round % DS_DTYPES;
        shape s = any_shape(1, 4, 2000), si = s;
        int dim = (int)between(0, s.ndim - 1);
        ds_tensor x, index, y;

        s.size[dim] += s.size[dim] == 0;
        si.size[dim] = between(0, 20);
        for (int d = 0; d < s.ndim; d++)
            if (d != dim && si.size[d] > 1)
                si.size[d] -= between(0, 1);
        x = random_tensor(dtype, s.ndim, s.size, 0, 1);
        y = anyhow(dtype, si.ndim, si.size);
        index = random_tensor(round & 1 ? DS_I64 : DS_I32, si.ndim, si.size, 0,
                              (double)(s.size[dim] - 1));
        assert_int_equal(ops->gather(&y, &x, &index, dim), 0);
        for (int64_t i = 0; i < y.numel; i++) {
            int64_t at[DS_MAX_DIM];

            positions(at, &y, i);
            at[dim] = (int64_t)get(&index, i);
            assert_true(get(&y, i) == get(&x, number_of(&x, at)));
        }
        drop(&x);
        drop(&y);
        drop(&index);
    }
}

static void scatters(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 8; round++) {
        int dtype = round % (DS_DTYPES - 1);
        shape s = any_shape(1, 3, 600), si = s;
        int dim = (int)between(0, s.ndim - 1);
        ds_tensor x, index, y, z;
        double *sum, *last;

        s.size[dim] += s.size[dim] == 0;
        si.size[dim] = between(0, 30);
        x = random_tensor(dtype, si.ndim, si.size, 0, 3);
        y = random_tensor(dtype, s.ndim, s.size, 0, 3);
        z = dense(dtype, s.ndim, s.size);
        index = random_tensor(DS_I64, si.ndim, si.size, 0, (double)(s.size[dim] - 1));
        sum = malloc((size_t)(y.numel + 1) * sizeof *sum);
        last = malloc((size_t)(y.numel + 1) * sizeof *last);
        for (int64_t i = 0; i < y.numel; i++) {
            sum[i] = last[i] = get(&y, i);
            set(&z, i, get(&y, i));
        }
        for (int64_t i = 0; i < x.numel; i++) {
            int64_t at[DS_MAX_DIM];

            positions(at, &x, i);
            at[dim] = (int64_t)get(&index, i);
            sum[number_of(&y, at)] += get(&x, i);
            last[number_of(&y, at)] = get(&x, i);
        }
        assert_int_equal(ops->scatter(&z, &index, &x, dim), 0);
        assert_int_equal(ops->scatter_add(&y, &index, &x, dim), 0);
        for (int64_t i = 0; i < y.numel; i++) {
            assert_true(get(&z, i) == last[i]);
            near(get(&y, i), sum[i], ds_is_float(dtype) ? within(dtype, sum[i], 16) : 0,
                 "scatter_add", i);
        }
        free(sum);
        free(last);
        drop(&x);
        drop(&y);
        drop(&z);
        drop(&index);
    }
}

static void selections(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 8; round++) {
        int dtype = round % (DS_DTYPES - 1);
        shape s = any_shape(1, 4, 2000), si = s;
        int dim = (int)between(0, s.ndim - 1);
        int64_t n = between(0, 40);
        ds_tensor x, index, y, z;

        s.size[dim] += s.size[dim] == 0;
        si.size[dim] = n;
        x = random_tensor(dtype, s.ndim, s.size, 0, 3);
        y = random_tensor(dtype, si.ndim, si.size, 0, 3);
        z = dense(DS_F64, s.ndim, s.size);
        index = random_tensor(DS_I64, SHAPE(n), 0, (double)(s.size[dim] - 1));
        for (int64_t i = 0; i < x.numel; i++)
            set(&z, i, get(&x, i));
        for (int64_t i = 0; i < y.numel; i++) {
            int64_t at[DS_MAX_DIM];

            positions(at, &y, i);
            at[dim] = (int64_t)get(&index, at[dim]);
            set(&z, number_of(&x, at), get(&z, number_of(&x, at)) + get(&y, i));
        }
        assert_int_equal(ops->index_add(&x, &index, &y, dim), 0);
        for (int64_t i = 0; i < x.numel; i++)
            near(get(&x, i), get(&z, i), ds_is_float(dtype) ? within(dtype, get(&z, i), 16) : 0,
                 "index_add", i);
        assert_int_equal(ops->index_select(&y, &x, &index, dim), 0);
        for (int64_t i = 0; i < y.numel; i++) {
            int64_t at[DS_MAX_DIM];

            positions(at, &y, i);
            at[dim] = (int64_t)get(&index, at[dim]);
            assert_true(get(&y, i) == get(&x, number_of(&x, at)));
        }
        drop(&x);
        drop(&y);
        drop(&z);
        drop(&index);
    }
}

/* Integers wrap around, one by one or by rows. */
static void integer_sums_wrap(void **state)
{
    static const struct {
        int dtype;
        double most, least; /* most + 1 is least */
    } kinds[] = {{DS_U8, 255, 0}, {DS_I32, INT32_MAX, INT32_MIN}};
    const ds_ops *ops = kernels();

    (void)state;
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        ds_tensor y = dense(kinds[k].dtype, SHAPE(2, 3)), x = dense(kinds[k].dtype, SHAPE(4, 3));
        ds_tensor rows = dense(DS_I64, SHAPE(4)), index = dense(DS_I64, SHAPE(4, 3));

        for (int i = 0; i < 2; i++) {
            assert_int_equal(ops->fill(&y, kinds[k].most), 0);
            assert_int_equal(ops->fill(&x, 1), 0);
            assert_int_equal(ops->fill(&rows, 1), 0);
            assert_int_equal(ops->fill(&index, 1), 0);
            assert_int_equal(
                i ? ops->index_add(&y, &rows, &x, 0) : ops->scatter_add(&y, &index, &x, 0), 0);
            for (int at = 0; at < 6; at++)
                assert_true(get(&y, at) == (at < 3 ? kinds[k].most : kinds[k].least + 3));
        }
        drop(&y);
        drop(&x);
        drop(&rows);
        drop(&index);
    }
}

/* Low precision adds in f32 and rounds once: 1 + 300 × 2^-9 in bf16 is not 1. */
static void sums_are_wide(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int dtype = DS_BF16; dtype <= DS_F16; dtype++) {
        ds_tensor y = dense(dtype, SHAPE(2)), z = dense(dtype, SHAPE(2));
        ds_tensor x = dense(dtype, SHAPE(300)), index = dense(DS_I64, SHAPE(300));

        assert_int_equal(ops->fill(&y, 1), 0);
        assert_int_equal(ops->fill(&z, 1), 0);
        assert_int_equal(ops->fill(&x, 0x1p-9), 0);
        assert_int_equal(ops->fill(&index, 1), 0);
        assert_int_equal(ops->index_add(&y, &index, &x, 0), 0);
        assert_int_equal(ops->scatter_add(&z, &index, &x, 0), 0);
        assert_true(get(&y, 0) == 1 && get(&y, 1) == rounded(dtype, 1 + 300 * 0x1p-9));
        assert_true(get(&z, 0) == 1 && get(&z, 1) == get(&y, 1));
        drop(&x);
        drop(&y);
        drop(&z);
        drop(&index);
    }
}

static void bad_indices(void **state)
{
    const ds_ops *ops = kernels();
    ds_tensor x = dense(DS_F32, SHAPE(5, 2)), y = dense(DS_F32, SHAPE(5, 2));
    ds_tensor two = dense(DS_I64, SHAPE(5, 2)), one = dense(DS_I32, SHAPE(5));
    ds_tensor real = dense(DS_F32, SHAPE(5)), hot = dense(DS_I64, SHAPE(5, 4));

    (void)state;
    randomise(&x, 1, 2);
    assert_int_equal(ops->fill(&y, 7), 0);
    assert_int_equal(ops->fill(&two, 1), 0);
    assert_int_equal(ops->fill(&one, 1), 0);
    set(&two, 7, 5);
    set(&one, 4, -1);
    fails(ops->gather(&y, &x, &two, 0), DS_ERANGE, "gather: index 5 is out of range for size 5");
    fails(ops->scatter(&y, &two, &x, 0), DS_ERANGE, "scatter: index 5 is out of range");
    fails(ops->scatter_add(&y, &two, &x, 0), DS_ERANGE, "scatter_add: index 5");
    fails(ops->index_select(&y, &x, &one, 0), DS_ERANGE, "index_select: index -1");
    fails(ops->index_add(&y, &one, &x, 0), DS_ERANGE, "index_add: index -1");
    fails(ops->embedding(&y, &x, &one), DS_ERANGE, "embedding: index -1");
    fails(ops->embedding_backward(&y, &x, &one, 0), DS_ERANGE, "embedding_backward: index -1");
    fails(ops->one_hot(&hot, &one), DS_ERANGE, "one_hot: index -1");
    fails(ops->index_select(&y, &x, &real, 0), DS_EINVAL, "index_select: the index is f32");
    fails(ops->gather(&y, &x, &two, 2), DS_EINVAL, "gather: dimension 3 is not in a tensor of 2");
    for (int64_t i = 0; i < y.numel; i++) /* nothing was half written */
        assert_true(get(&y, i) == 7);
    drop(&x);
    drop(&y);
    drop(&two);
    drop(&one);
    drop(&real);
    drop(&hot);
}

static void one_hots(void **state)
{
    const ds_ops *ops = kernels();
    ds_tensor index = random_tensor(DS_I64, SHAPE(4, 5), 0, 6), y = anyhow(DS_I64, SHAPE(4, 5, 7));

    (void)state;
    assert_int_equal(ops->one_hot(&y, &index), 0);
    for (int64_t i = 0; i < y.numel; i++)
        assert_int_equal(get(&y, i), get(&index, i / 7) == (double)(i % 7));
    drop(&y);
    drop(&index);
}

static void masks(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 4; round++) {
        int dtype = round % DS_DTYPES;
        shape s = any_shape(0, 4, 40000);
        ds_tensor x = random_tensor(dtype, s.ndim, s.size, 0, 1);
        ds_tensor mask = random_tensor(DS_BOOL, s.ndim, s.size, 0, 1), y, z;
        int64_t count = -1, seen = 0;

        assert_int_equal(ops->mask_count(&count, &mask), 0);
        for (int64_t i = 0; i < mask.numel; i++)
            seen += get(&mask, i) != 0;
        assert_int_equal(count, seen);
        y = dense(dtype, SHAPE(count));
        assert_int_equal(ops->masked_select(&y, &x, &mask), 0);
        seen = 0;
        for (int64_t i = 0; i < x.numel; i++)
            if (get(&mask, i) != 0)
                assert_true(get(&y, seen++) == get(&x, i));
        z = anyhow(dtype, s.ndim, s.size);
        assert_int_equal(ops->fill(&z, 0), 0);
        assert_int_equal(ops->masked_scatter(&z, &mask, &y), 0);
        for (int64_t i = 0; i < x.numel; i++)
            assert_true(get(&z, i) == (get(&mask, i) != 0 ? get(&x, i) : 0));
        if (count > 0) {
            y.numel = y.shape[0] = count - 1;
            fails(ops->masked_select(&y, &x, &mask), DS_EINVAL, "true elements");
            fails(ops->masked_scatter(&z, &mask, &y), DS_EINVAL, "true elements");
            y.numel = y.shape[0] = count;
        }
        drop(&x);
        drop(&y);
        drop(&z);
        drop(&mask);
    }
}

/* ---- embedding */

static void embeddings(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS * 2; round++) {
        int dtype = round % FLOATS, accumulate = (int)between(0, 1);
        int sum_dtype = dtype == DS_F64 ? DS_F64 : between(0, 1) ? DS_F32 : dtype;
        int64_t rows = between(1, 40), columns = between(1, 700), b = between(0, 5),
                t = between(1, 9);
        ds_tensor w = random_tensor(dtype, SHAPE(rows, columns), -1, 1);
        ds_tensor index = random_tensor(round & 1 ? DS_I64 : DS_I32, SHAPE(b, t), 0,
                                        (double)(between(0, 3) ? rows - 1 : 0));
        ds_tensor y = anyhow(dtype, SHAPE(b, t, columns));
        ds_tensor dw = random_tensor(sum_dtype, SHAPE(rows, columns), -1, 1);
        double *sum = calloc((size_t)(rows * columns), sizeof *sum);

        assert_int_equal(ops->embedding(&y, &w, &index), 0);
        for (int64_t i = 0; i < dw.numel && accumulate; i++)
            sum[i] = get(&dw, i);
        for (int64_t i = 0; i < y.numel; i++) {
            int64_t at = (int64_t)get(&index, i / columns) * columns + i % columns;

            assert_true(get(&y, i) == get(&w, at));
            sum[at] += get(&y, i);
        }
        assert_int_equal(ops->embedding_backward(&dw, &y, &index, accumulate), 0);
        for (int64_t i = 0; i < dw.numel; i++)
            near(get(&dw, i), sum[i],
                 within(sum_dtype, sum[i], 16) + (sum_dtype == DS_F64 ? 1e-14 : 4e-6),
                 "embedding_backward", i);
        free(sum);
        drop(&w);
        drop(&index);
        drop(&y);
        drop(&dw);
    }
}

static void rotaries(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
    for (int round = 0; round < ROUNDS; round++) {
        int dtype = round % FLOATS, interleaved = (int)between(0, 1);
        int64_t b = between(1, 3), t = between(1, 9), h = between(1, 4), half = between(1, 40);
        int64_t offset = between(0, 2) ? between(0, 100000) : 0, d = 2 * half;
        ds_tensor x = random_tensor(dtype, SHAPE(b, t, h, d), -1, 1);
        ds_tensor y = anyhow(dtype, SHAPE(b, t, h, d)), z = anyhow(dtype, SHAPE(b, t, h, d));

        assert_int_equal(ops->rotary(&y, &x, offset, 10000, interleaved, 0), 0);
        assert_int_equal(ops->rotary(&z, &y, offset, 10000, interleaved, 1), 0);
        for (int64_t i = 0; i < y.numel; i++) {
            int64_t at[4], pair = interleaved ? 1 : half, first;
            double angle, u, v;
            int second;

            positions(at, &x, i);
            second = interleaved ? at[3] % 2 == 1 : at[3] >= half;
            first = i - (second ? pair : 0);
            angle = (double)(offset + at[1]) *
                    pow(10000, -2.0 * (double)(interleaved ? at[3] / 2 : at[3] % half) / (double)d);
            u = get(&x, first);
            v = get(&x, first + pair);
            near(get(&y, i),
                 second ? u * sin(angle) + v * cos(angle) : u * cos(angle) - v * sin(angle),
                 eps_of(dtype) * 2 + (dtype == DS_F64 ? 1e-12 : 4e-7), "rotary", i);
            near(get(&z, i), get(&x, i), eps_of(dtype) * 4 + (dtype == DS_F64 ? 0 : 4e-7),
                 "rotary and back", i);
        }
        drop(&x);
        drop(&y);
        drop(&z);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(copies),        cmocka_unit_test(transposes),
        cmocka_unit_test(copy_limits),   cmocka_unit_test(fills),
        cmocka_unit_test(triangles),     cmocka_unit_test(gathers),
        cmocka_unit_test(scatters),      cmocka_unit_test(selections),
        cmocka_unit_test(sums_are_wide), cmocka_unit_test(integer_sums_wrap),
        cmocka_unit_test(bad_indices),   cmocka_unit_test(one_hots),
        cmocka_unit_test(masks),         cmocka_unit_test(embeddings),
        cmocka_unit_test(rotaries),
    };
    int done = each_level(argv);

    (void)argc;
    return done >= 0 ? done : cmocka_run_group_tests_name("copy", tests, NULL, NULL);
}
