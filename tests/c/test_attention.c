/* test_attention.c - attention against plain loops in double, on every CPU level of this
 * machine. */

#include "kernels/philox.h"
#include "tests/c/levels.h"
#include "tests/c/numbers.h"

enum layout { PLAIN, PACKED, HEADS_FIRST, LAYOUTS };

typedef struct shape {
    int64_t B, T, S, H, G, D;
    int dtype, causal;
    int mask; /* 0 none, 1 bool, 2 float */
    int layout;
    double scale, p;
} shape;

/* All of a call; d: double copies of what is in the tensors, dense. */
typedef struct call {
    shape z;
    ds_tensor q, k, v, mask, y, lse, dy, dq, dk, dv;
    double *q_d, *k_d, *v_d, *mask_d, *dy_d;  /* inputs */
    double *y_d, *lse_d, *dq_d, *dk_d, *dv_d; /* expected */
    void *memory[32];
    int blocks;
} call;

static double normal(void)
{
    return sqrt(-2 * log(1 - random01())) * cos(6.283185307179586 * random01());
}

static void *take(call *c, size_t bytes)
{
    void *block = malloc(bytes + 1);

    assert_non_null(block);
    memset(block, 0xff, bytes); /* NaN: reading or writing between the elements shows */
    c->memory[c->blocks++] = block;
    return block;
}

static ds_tensor tensor(void *data, int dtype, int ndim, const int64_t *size, const int64_t *stride)
{
    ds_tensor t = {.data = data, .dtype = dtype, .ndim = ndim, .numel = 1};

    for (int i = 0; i < ndim; i++) {
        t.shape[i] = size[i];
        t.stride[i] = stride[i];
        t.numel *= size[i];
    }
    return t;
}

/* [B, n, heads, D] in the call's layout; `pieces` of them interleaved when PACKED. */
static ds_tensor activation(call *c, void *base, int64_t n, int64_t heads, int64_t piece,
                            int64_t pieces)
{
    int64_t D = c->z.D, row = heads * D * pieces;
    const int64_t size[4] = {c->z.B, n, heads, D};
    const int64_t plain[4] = {n * row, row, D, 1}, first[4] = {heads * n * D, D, n * D, 1};
    int64_t skip = piece * (c->z.layout == HEADS_FIRST ? c->z.B * n * heads * D : heads * D);

    return tensor((char *)base + skip * ds_bytes_of(c->z.dtype), c->z.dtype, 4, size,
                  c->z.layout == HEADS_FIRST ? first : plain);
}

static int64_t offset_of(const ds_tensor *t, int64_t b, int64_t s, int64_t h, int64_t d)
{
    return b * t->stride[0] + s * t->stride[1] + h * t->stride[2] + d * t->stride[3];
}

/* Fills with noise; returns what the dtype made of it, dense. */
static double *fill(call *c, ds_tensor *t, double size)
{
    double *copy = take(c, (size_t)t->numel * sizeof *copy), *to = copy;

    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t s = 0; s < t->shape[1]; s++)
            for (int64_t h = 0; h < t->shape[2]; h++)
                for (int64_t d = 0; d < t->shape[3]; d++) {
                    set_at(t, offset_of(t, b, s, h, d), normal() * size);
                    *to++ = get_at(t, offset_of(t, b, s, h, d));
                }
    return copy;
}

static void make_mask(call *c)
{
    const shape *z = &c->z;
    int64_t size[4] = {z->B, z->H, z->T, z->S}, stride[4], step = 1;
    int dtype = z->mask == 1 ? DS_BOOL : between(0, 1) ? DS_F32 : z->dtype;

    for (int i = 0; i < 4; i++) /* some dimensions of 1, to be broadcast; or of stride 0 */
        size[i] = i < 3 && between(0, 1) ? 1 : size[i];
    for (int i = 3; i >= 0; i--) {
        stride[i] = i < 3 && between(0, 3) == 0 ? 0 : step;
        step *= stride[i] ? size[i] : 1;
    }
    c->mask = tensor(take(c, (size_t)(step * ds_bytes_of(dtype))), dtype, 4, size, stride);
    for (int64_t i = 0; i < step; i++)
        set_at(&c->mask, i,
               dtype == DS_BOOL ? between(0, 2) > 0
               : between(0, 9)  ? normal()
                                : -INFINITY);
    c->mask_d = take(c, (size_t)(z->B * z->H * z->T * z->S) * sizeof(double));
    for (int64_t i = 0; i < z->B * z->H * z->T * z->S; i++) {
        int64_t s = i % z->S, t = i / z->S % z->T, h = i / z->S / z->T % z->H;
        int64_t b = i / z->S / z->T / z->H;
        double m =
            get_at(&c->mask, (size[0] > 1) * b * stride[0] + (size[1] > 1) * h * stride[1] +
                                 (size[2] > 1) * t * stride[2] + (size[3] > 1) * s * stride[3]);

        c->mask_d[i] = dtype == DS_BOOL ? (m != 0 ? 0 : -INFINITY) : m;
    }
}

static void make(call *c, const shape *z)
{
    int64_t B = z->B, T = z->T, S = z->S, H = z->H, G = z->G, D = z->D;
    int64_t most = B * (T > S ? T : S) * H * D * 3;
    int packed = z->layout == PACKED && T == S && H == G;
    size_t bytes = (size_t)(most * ds_bytes_of(z->dtype));
    const int64_t lse_size[3] = {B, H, T}, lse_stride[3] = {H * T, T, 1};
    void *in, *out;

    memset(c, 0, sizeof *c);
    c->z = *z;
    in = take(c, bytes);
    out = take(c, bytes);
    c->q = activation(c, in, T, H, 0, packed ? 3 : 1);
    c->k = activation(c, packed ? in : take(c, bytes), S, G, packed, packed ? 3 : 1);
    c->v = activation(c, packed ? in : take(c, bytes), S, G, 2 * packed, packed ? 3 : 1);
    c->dq = activation(c, out, T, H, 0, packed ? 3 : 1);
    c->dk = activation(c, packed ? out : take(c, bytes), S, G, packed, packed ? 3 : 1);
    c->dv = activation(c, packed ? out : take(c, bytes), S, G, 2 * packed, packed ? 3 : 1);
    c->y = activation(c, take(c, bytes), T, H, 0, 1);
    c->dy = activation(c, take(c, bytes), T, H, 0, 1);
    c->lse = tensor(take(c, (size_t)(B * H * T) * 4), DS_F32, 3, lse_size, lse_stride);
    c->q_d = fill(c, &c->q, 1);
    c->k_d = fill(c, &c->k, 1);
    c->v_d = fill(c, &c->v, 1);
    c->dy_d = fill(c, &c->dy, 1);
}

static void drop(call *c)
{
    while (c->blocks)
        free(c->memory[--c->blocks]);
}

/* ---- expected */

#define SEED 77
#define OFFSET 12345

static double kept(const shape *z, int64_t b, int64_t h, int64_t t, int64_t s)
{
    uint64_t element = (uint64_t)(((b * z->H + h) * z->T + t) * z->S + s);
    ds_philox_block block;

    if (z->p == 0)
        return 1;
    block = ds_philox(SEED, OFFSET + element / 4);
    return ds_uniform_f32(block.lane[element % 4]) >= z->p ? 1 / (1 - z->p) : 0;
}

/* One query: its softmax in w, then its share of everything. */
static void expect_query(call *c, int64_t b, int64_t h, int64_t t, double *w, double *dw)
{
    const shape *z = &c->z;
    int64_t D = z->D, g = h / (z->H / z->G), at = ((b * z->T + t) * z->H + h) * D;
    double most = -INFINITY, sum = 0, delta = 0;

    for (int64_t s = 0; s < z->S; s++) {
        const double *k = c->k_d + ((b * z->S + s) * z->G + g) * D;
        double dot = 0;

        for (int64_t d = 0; d < D; d++)
            dot += c->q_d[at + d] * k[d];
        w[s] = dot * z->scale;
        if (z->mask)
            w[s] += c->mask_d[((b * z->H + h) * z->T + t) * z->S + s];
        if (z->causal && s > t + z->S - z->T)
            w[s] = -INFINITY;
        most = fmax(most, w[s]);
    }
    for (int64_t s = 0; s < z->S; s++)
        sum += w[s] = most == -INFINITY ? 0 : exp(w[s] - most);
    c->lse_d[(b * z->H + h) * z->T + t] = sum > 0 ? most + log(sum) : -INFINITY;
    for (int64_t s = 0; s < z->S; s++) {
        const double *v = c->v_d + ((b * z->S + s) * z->G + g) * D;

        w[s] = sum > 0 ? w[s] / sum : 0;
        dw[s] = 0;
        for (int64_t d = 0; d < D; d++) {
            c->y_d[at + d] += w[s] * kept(z, b, h, t, s) * v[d];
            dw[s] += c->dy_d[at + d] * v[d] * kept(z, b, h, t, s);
        }
        delta += w[s] * dw[s];
    }
    for (int64_t s = 0; s < z->S; s++) {
        int64_t row = ((b * z->S + s) * z->G + g) * D;
        double ds = w[s] * (dw[s] - delta) * z->scale;

        for (int64_t d = 0; d < D; d++) {
            c->dq_d[at + d] += ds * c->k_d[row + d];
            c->dk_d[row + d] += ds * c->q_d[at + d];
            c->dv_d[row + d] += w[s] * kept(z, b, h, t, s) * c->dy_d[at + d];
        }
    }
}

static double *zeros(call *c, int64_t n)
{
    double *x = take(c, (size_t)n * sizeof *x);

    memset(x, 0, (size_t)n * sizeof *x);
    return x;
}

static void expect(call *c)
{
    const shape *z = &c->z;
    double *w = malloc((size_t)(2 * z->S + 1) * sizeof *w);

    c->y_d = zeros(c, c->q.numel);
    c->lse_d = zeros(c, c->lse.numel);
    c->dq_d = zeros(c, c->q.numel);
    c->dk_d = zeros(c, c->k.numel);
    c->dv_d = zeros(c, c->k.numel);
    for (int64_t b = 0; b < z->B; b++)
        for (int64_t h = 0; h < z->H; h++)
            for (int64_t t = 0; t < z->T; t++)
                expect_query(c, b, h, t, w, w + z->S);
    free(w);
}

/* ---- running */

static int forward(call *c)
{
    return kernels()->attention(&c->y, &c->lse, &c->q, &c->k, &c->v, c->z.mask ? &c->mask : NULL,
                                c->z.causal, c->z.scale, c->z.p, SEED, OFFSET);
}

static int backward(call *c)
{
    return kernels()->attention_backward(&c->dq, &c->dk, &c->dv, &c->dy, &c->y, &c->lse, &c->q,
                                         &c->k, &c->v, c->z.mask ? &c->mask : NULL, c->z.causal,
                                         c->z.scale, c->z.p, SEED, OFFSET);
}

static void run(call *c)
{
    if (forward(c) != 0 || backward(c) != 0)
        fail_msg("%s", ds_error());
}

/* Largest difference, relative to the largest expected magnitude (of what is all but 0: to 1/2);
 * NaN counts as infinite. */
static double difference(const ds_tensor *t, const double *want)
{
    double most = 0.5, off = 0;
    int64_t i = 0;

    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t s = 0; s < t->shape[1]; s++)
            for (int64_t h = 0; h < t->shape[2]; h++)
                for (int64_t d = 0; d < (t->ndim > 3 ? t->shape[3] : 1); d++, i++) {
                    double have = get_at(t, offset_of(t, b, s, h, d));
                    double error = have == want[i] ? 0 : fabs(have - want[i]);

                    off = error <= off ? off : isnan(error) ? INFINITY : error;
                    if (isfinite(want[i]))
                        most = fmax(most, fabs(want[i]));
                }
    return off / most;
}

static void check(call *c)
{
    static const double tolerance[] = {
        [DS_F32] = 1e-5, [DS_BF16] = 2.5e-2, [DS_F16] = 4e-3, [DS_F64] = 1e-12};
    const struct {
        const char *name;
        const ds_tensor *have;
        const double *want;
    } all[] = {{"y", &c->y, c->y_d},
               {"lse", &c->lse, c->lse_d},
               {"dq", &c->dq, c->dq_d},
               {"dk", &c->dk, c->dk_d},
               {"dv", &c->dv, c->dv_d}};

    for (int i = 0; i < 5; i++) {
        double off = difference(all[i].have, all[i].want);

        if (!(off <= fmax(tolerance[c->z.dtype], i == 1 ? 1e-6 : 0)))
            fail_msg("%s is off by %g: %s B%d T%d S%d H%d G%d D%d causal %d mask %d layout %d "
                     "dropout %g scale %g",
                     all[i].name, off, ds_name_of(c->z.dtype), (int)c->z.B, (int)c->z.T,
                     (int)c->z.S, (int)c->z.H, (int)c->z.G, (int)c->z.D, c->z.causal, c->z.mask,
                     c->z.layout, c->z.p, c->z.scale);
    }
}

static void compare(const shape *z)
{
    call c;

    make(&c, z);
    if (z->mask)
        make_mask(&c);
    expect(&c);
    run(&c);
    check(&c);
    drop(&c);
}

static void random_calls_match(void **unused)
{
    (void)unused;
    for (int i = 0; i < 80; i++) {
        shape z = {.B = between(1, 2),
                   .T = between(1, 75),
                   .G = between(1, 2),
                   .dtype = (int)between(DS_F32, DS_F64),
                   .causal = (int)between(0, 1),
                   .layout = (int)between(0, LAYOUTS - 1)};

        z.H = z.G * (between(0, 2) ? 1 : between(2, 3));
        z.S = between(0, 1) ? z.T : between(1, 150);
        z.D = between(0, 1) ? 16 * between(1, 4) : between(1, 70);
        z.mask = between(0, 1) ? 0 : (int)between(1, 2);
        z.p = between(0, 2) ? 0 : 0.25;
        z.scale = between(0, 5) ? 1 / sqrt((double)z.D) : normal() / sqrt((double)z.D);
        compare(&z);
    }
}

/* More keys than are worked on at a time: the softmax goes on from what it had. */
static void long_rows_match(void **unused)
{
    (void)unused;
    for (int dtype = DS_F32; dtype <= DS_F16; dtype++) {
        shape z = {.B = 1,
                   .T = 70,
                   .S = 600,
                   .H = 1,
                   .G = 1,
                   .D = 40,
                   .dtype = dtype,
                   .causal = 1,
                   .scale = 0.5};

        compare(&z);
        z.T = 330;
        z.S = 300;
        z.mask = 2;
        z.p = 0.2;
        compare(&z);
    }
}

static void training_shapes_match(void **unused)
{
    (void)unused;
    for (int dtype = DS_F32; dtype <= DS_F16; dtype++)
        for (int packed = 0; packed < 2; packed++) {
            shape nano = {.B = 2,
                          .T = 64,
                          .S = 64,
                          .H = 2,
                          .G = 2,
                          .D = 32,
                          .dtype = dtype,
                          .causal = 1,
                          .layout = packed,
                          .scale = 0.177};
            shape large = {.B = 1,
                           .T = 256,
                           .S = 256,
                           .H = 2,
                           .G = 1,
                           .D = 64,
                           .dtype = dtype,
                           .causal = 1,
                           .layout = packed,
                           .scale = 0.125};
            shape widest = {.B = 1,
                            .T = 20,
                            .S = 33,
                            .H = 1,
                            .G = 1,
                            .D = 512,
                            .dtype = dtype,
                            .layout = packed,
                            .scale = 0.04};

            compare(&nano);
            compare(&large);
            compare(&widest);
        }
}

static void decoding_matches(void **unused)
{
    (void)unused;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++)
        for (int64_t T = 1; T < 5; T++) {
            shape z = {.B = 1,
                       .T = T,
                       .S = 1500 + T,
                       .H = T == 1 ? 4 : 1,
                       .G = 1,
                       .D = 48 + T,
                       .dtype = dtype,
                       .causal = 1,
                       .mask = T == 3,
                       .layout = HEADS_FIRST,
                       .scale = 0.15,
                       .p = T == 4 ? 0.1 : 0};

            compare(&z);
        }
}

static void rows_that_see_nothing_are_zero(void **unused)
{
    (void)unused;
    for (int dtype = DS_F32; dtype <= DS_F64; dtype++) {
        /* causality shows the first 40 of 70 queries none of the 30 keys */
        shape z = {.B = 1,
                   .T = 70,
                   .S = 30,
                   .H = 2,
                   .G = 1,
                   .D = 24,
                   .dtype = dtype,
                   .causal = 1,
                   .scale = 0.2};
        call c;

        make(&c, &z);
        expect(&c);
        run(&c);
        check(&c);
        for (int64_t i = 0; i < 40 * 2 * 24; i++) {
            assert_true(get_at(&c.y, i) == 0);
            assert_true(get_at(&c.dq, i) == 0);
        }
        assert_true(((float *)c.lse.data)[0] == -INFINITY);
        drop(&c);
        z.mask = 1;
        z.causal = 0;
        make(&c, &z);
        make_mask(&c);
        for (int i = 0; i < 3; i++)
            c.mask.stride[i] = 0;
        memset(c.mask.data, 0, 30);
        run(&c);
        for (int64_t i = 0; i < c.y.numel; i++)
            assert_true(get_at(&c.y, i) == 0 && get_at(&c.dq, i) == 0);
        for (int64_t i = 0; i < c.dk.numel; i++)
            assert_true(get_at(&c.dk, i) == 0 && get_at(&c.dv, i) == 0);
        drop(&c);
    }
}

static void no_keys_give_zero(void **unused)
{
    shape z = {.B = 1, .T = 3, .S = 0, .H = 1, .G = 1, .D = 8, .dtype = DS_F32, .scale = 1};
    call c;

    (void)unused;
    make(&c, &z);
    run(&c);
    for (int i = 0; i < 24; i++) {
        assert_true(get_at(&c.y, i) == 0);
        assert_true(get_at(&c.dq, i) == 0);
    }
    drop(&c);
}

static void large_scores_do_not_overflow(void **unused)
{
    shape z = {.B = 1, .T = 40, .S = 40, .H = 1, .G = 1, .D = 16, .dtype = DS_F32, .scale = 300};

    (void)unused;
    compare(
        &(shape){.B = 1, .T = 9, .S = 200, .H = 1, .G = 1, .D = 16, .dtype = DS_F64, .scale = 300});
    call c;
    make(&c, &z);
    expect(&c);
    run(&c);
    assert_true(difference(&c.y, c.y_d) < 1e-3); /* scores of 1000 have an error of 1e-4 */
    drop(&c);
}

static void nan_in_gives_nan_out(void **unused)
{
    (void)unused;
    for (int dtype = DS_F32; dtype <= DS_F16; dtype++) {
        shape z = {.B = 1,
                   .T = 40,
                   .S = 40,
                   .H = 1,
                   .G = 1,
                   .D = 16,
                   .dtype = dtype,
                   .causal = 1,
                   .scale = 0.25};
        call c;

        make(&c, &z);
        set_at(&c.q, 20 * 16 + 3, NAN);
        run(&c);
        assert_true(isnan(get_at(&c.y, 20 * 16)));
        assert_false(isnan(get_at(&c.y, 19 * 16)));
        assert_true(isnan(get_at(&c.dq, 20 * 16)));
        assert_true(isnan(get_at(&c.dk, 0)));
        drop(&c);
    }
}

/* Fewer units than threads: several share one and add up. */
static void same_bits_every_time(void **unused)
{
    (void)unused;
    for (int dtype = DS_F32; dtype <= DS_BF16; dtype++) {
        shape z = {.B = 1,
                   .T = 300,
                   .S = 300,
                   .H = 2,
                   .G = 1,
                   .D = 32,
                   .dtype = dtype,
                   .causal = 1,
                   .scale = 0.177,
                   .p = 0.1};
        int64_t n = 300 * 32, bytes = n * ds_bytes_of(dtype);
        char first[3][2 * 300 * 32 * 4];
        call c;

        make(&c, &z);
        for (int i = 0; i < 4; i++) {
            run(&c);
            if (i > 0) {
                assert_memory_equal(first[0], c.y.data, (size_t)(2 * bytes));
                assert_memory_equal(first[1], c.dk.data, (size_t)bytes);
                assert_memory_equal(first[2], c.dv.data, (size_t)bytes);
            }
            memcpy(first[0], c.y.data, (size_t)(2 * bytes));
            memcpy(first[1], c.dk.data, (size_t)bytes);
            memcpy(first[2], c.dv.data, (size_t)bytes);
        }
        drop(&c);
    }
}

/* The analytic gradient, f64, against central differences of sum(y dy). */
static void f64_gradients_match_differences(void **unused)
{
    shape z = {.B = 1,
               .T = 4,
               .S = 6,
               .H = 2,
               .G = 1,
               .D = 3,
               .dtype = DS_F64,
               .causal = 1,
               .mask = 2,
               .scale = 0.6,
               .p = 0.3};
    call c;
    ds_tensor *in[3], *grad[3];

    (void)unused;
    make(&c, &z);
    make_mask(&c);
    run(&c);
    in[0] = &c.q, in[1] = &c.k, in[2] = &c.v;
    grad[0] = &c.dq, grad[1] = &c.dk, grad[2] = &c.dv;
    for (int which = 0; which < 3; which++)
        for (int64_t i = 0; i < in[which]->numel; i++) {
            double *x = (double *)in[which]->data + i, was = *x, sum[2], h = 1e-5;

            for (int side = 0; side < 2; side++) {
                *x = was + (side ? h : -h);
                assert_int_equal(forward(&c), 0);
                sum[side] = 0;
                for (int64_t j = 0; j < c.y.numel; j++)
                    sum[side] += get_at(&c.y, j) * get_at(&c.dy, j);
            }
            *x = was;
            assert_true(fabs((sum[1] - sum[0]) / (2 * h) - get_at(grad[which], i)) < 1e-8);
        }
    drop(&c);
}

static void refused(call *c, const char *words)
{
    fails(forward(c), DS_EINVAL, words);
}

static void wrong_calls_are_refused(void **unused)
{
    shape z = {.B = 1, .T = 4, .S = 6, .H = 2, .G = 2, .D = 8, .dtype = DS_F32, .scale = 1};
    call c;
    ds_tensor good;

    (void)unused;
    make(&c, &z);
    good = c.k;
    c.k.dtype = DS_BF16;
    refused(&c, "bf16");
    c.k = good;
    c.k.shape[3] = 7;
    refused(&c, "7");
    c.k = good;
    c.k.stride[3] = 2;
    refused(&c, "not dense");
    c.k = good;
    c.k.shape[2] = c.v.shape[2] = 3;
    refused(&c, "multiple of 3");
    c.k = good;
    c.v.shape[2] = 2;
    c.z.p = 1;
    refused(&c, "dropout 1");
    c.z.p = 0;
    c.lse.shape[2] = 5;
    refused(&c, "lse");
    c.lse.shape[2] = 4;
    assert_int_equal(forward(&c), 0);
    drop(&c);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_calls_match),
        cmocka_unit_test(long_rows_match),
        cmocka_unit_test(training_shapes_match),
        cmocka_unit_test(decoding_matches),
        cmocka_unit_test(rows_that_see_nothing_are_zero),
        cmocka_unit_test(no_keys_give_zero),
        cmocka_unit_test(large_scores_do_not_overflow),
        cmocka_unit_test(nan_in_gives_nan_out),
        cmocka_unit_test(same_bits_every_time),
        cmocka_unit_test(f64_gradients_match_differences),
        cmocka_unit_test(wrong_calls_are_refused),
    };
    int done = each_level(argv);

    (void)argc;
    return done >= 0 ? done : cmocka_run_group_tests(tests, NULL, NULL);
}
