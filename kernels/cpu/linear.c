/* linear.c - the linear layer: a product, then bias and activation in one pass over its result.
 *
 * The pass computes the activation and its derivative from one power, and keeps the derivative, so
 * that backward is one multiplication: cheaper than keeping the activation's input and, on the
 * shapes of a transformer, than having oneDNN apply it (8 to 14 % of the product). Without an
 * activation the bias is oneDNN's; with one it is added here, where it costs nothing. The pass is
 * a kernel of its own too (activate), for layers that keep its input and make both again in
 * backward: one tensor instead of two.
 */
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/simd.h"
#include "kernels/scalar.h"
#include "kernels/scratch.h"

#define CHUNK 512 /* elements activated at a time: they stay in the L1 cache */

/* ---- activations and their derivatives, each from one power
 *
 * Arguments are bounded to where that power is a normal number, which also makes the limits
 * right: an activation of -inf is 0, of inf inf, of NaN NaN. All polynomials are fitted for the
 * least relative error on their range. `fine`, a constant: the digits of f32 (and f16); else
 * those of bf16, whose rounding, 2e-3, hides an error of 2e-4. */

typedef struct both {
    vf y, slope;
} both;

/* 2^x for -126 <= x <= 0: 2^n p(x - n), p of degree 5 or 3 with error 7.5e-8 or 7.5e-5. */
VF_FUNC vf power(vf x, int fine)
{
    vf t = x + 0x1.8p23f; /* leaves the nearest integer in the low bits */
    vf f = x - (t - 0x1.8p23f), p;

    if (fine) {
        p = vf_fma(f, vf_set(0.001327640869f), vf_set(0.009675540835f));
        p = vf_fma(p, f, vf_set(0.05550713469f));
        p = vf_fma(p, f, vf_set(0.2402211974f));
        p = vf_fma(p, f, vf_set(0.6931469669f));
        p = vf_fma(p, f, vf_set(1.000000072f));
    } else {
        p = vf_fma(f, vf_set(0.05517166457f), vf_set(0.2426111219f));
        p = vf_fma(p, f, vf_set(0.6932609863f));
        p = vf_fma(p, f, vf_set(0.9999280736f));
    }
    return (vf)((vi)p + ((vi)t << 23));
}

/* 1 / x of a normal number. */
VF_FUNC vf reciprocal(vf x, int fine)
{
#if VF_LANES == 16
    vf t = _mm512_rcp14_ps(x);

    return fine ? t * vf_fma(-x, t, vf_set(2.0f)) : t; /* a step of Newton: 14 bits become 28 */
#else
    (void)fine;
    return 1.0f / x;
#endif
}

/* 1 / (1 + e^-x), |x| <= 87 */
VF_FUNC vf sigmoid(vf x, int fine)
{
    vf e = power(vf_max(x, -x) * -1.44269504f, fine), d = reciprocal(1.0f + e, fine);

    return vf_select(x < 0.0f, e * d, d);
}

/* Φ(-a) / e^(-a²/2) = t p(t), t = 1 / (1 + c a), for 0 <= a <= 13; error 1.5e-7 or 3.5e-5. */
VF_FUNC vf tail_ratio(vf a, int fine)
{
    vf t = reciprocal(vf_fma(a, vf_set(fine ? 0.3f : 0.37f), vf_set(1.0f)), fine), p;

    if (fine) {
        p = vf_fma(t, vf_set(0.03567486578f), vf_set(-0.1572034429f));
        p = vf_fma(p, t, vf_set(0.2063540859f));
        p = vf_fma(p, t, vf_set(-0.05368413701f));
        p = vf_fma(p, t, vf_set(0.1285618649f));
        p = vf_fma(p, t, vf_set(0.09991342673f));
        p = vf_fma(p, t, vf_set(0.1207539454f));
        p = vf_fma(p, t, vf_set(0.1196292983f));
    } else {
        p = vf_fma(t, vf_set(-0.09035711341f), vf_set(0.2099436636f));
        p = vf_fma(p, t, vf_set(0.07613094822f));
        p = vf_fma(p, t, vf_set(0.157378619f));
        p = vf_fma(p, t, vf_set(0.1469194644f));
    }
    return p * t;
}

/* x Φ(x) */
VF_FUNC both gelu(vf x, int fine)
{
    vf up = vf_max(vf_set(-13.0f), x), c = vf_min(vf_set(13.0f), up);
    vf e = power(c * c * -0.72134752f, fine); /* e^(-c²/2) */
    vf tail = e * tail_ratio(vf_max(c, -c), fine);
    vf below = vf_select(c < 0.0f, tail, 1.0f - tail);

    return (both){up * below, vf_fma(c * 0.398942280f, e, below)};
}

/* ½ x (1 + tanh u) = x σ(2u), u = √(2/π) (x + 0.044715 x³) */
VF_FUNC both gelu_tanh(vf x, int fine)
{
    const float twice = 1.5957691216f, cubic = 0.044715f;
    vf up = vf_max(vf_set(-9.9f), x), c = vf_min(vf_set(9.9f), up), z = cubic * c * c;
    vf s = sigmoid(twice * c * (1.0f + z), fine);

    return (both){up * s,
                  vf_fma(c * s * (1.0f - s) * twice, vf_fma(z, vf_set(3.0f), vf_set(1.0f)), s)};
}

VF_FUNC both relu(vf x, int fine)
{
    (void)fine;
    return (both){vf_max(vf_set(0.0f), x), vf_select(x > 0.0f, vf_set(1.0f), vf_set(0.0f))};
}

VF_FUNC both silu(vf x, int fine)
{
    vf up = vf_max(vf_set(-87.0f), x), c = vf_min(vf_set(87.0f), up), s = sigmoid(c, fine);

    return (both){up * s, s * vf_fma(c, 1.0f - s, vf_set(1.0f))};
}

/* A result that is only biased, where the product could not do it (bias of another dtype). */
VF_FUNC both none(vf x, int fine)
{
    (void)fine;
    return (both){x, vf_set(1.0f)};
}

/* ---- n elements of one row: y[i] = act(x[i] + bias[i]), slope[i] = act′; dtype is a constant.
 * y or slope may be x: each vector is read before they are written */

#define ACTIVATE(name)                                                                             \
    VF_FUNC void row_##name(const void *x, void *y, void *slope, const float *bias, int64_t n,     \
                            int dtype)                                                             \
    {                                                                                              \
        int64_t i = 0;                                                                             \
                                                                                                   \
        for (; i + VF_LANES <= n; i += VF_LANES) {                                                 \
            both v = name(vf_load_as(x, i, dtype) + vf_load(bias + i), dtype != DS_BF16);          \
                                                                                                   \
            vf_store_as(y, i, dtype, v.y);                                                         \
            if (slope)                                                                             \
                vf_store_as(slope, i, dtype, v.slope);                                             \
        }                                                                                          \
        if (i < n) {                                                                               \
            both v = name(vf_load_part_as(x, i, dtype, n - i) + vf_load_part(bias + i, n - i),     \
                          dtype != DS_BF16);                                                       \
                                                                                                   \
            vf_store_part_as(y, i, dtype, v.y, n - i);                                             \
            if (slope)                                                                             \
                vf_store_part_as(slope, i, dtype, v.slope, n - i);                                 \
        }                                                                                          \
    }                                                                                              \
    static void name##_f32(const void *x, void *y, void *slope, const float *bias, int64_t n)      \
    {                                                                                              \
        row_##name(x, y, slope, bias, n, DS_F32);                                                  \
    }                                                                                              \
    static void name##_bf16(const void *x, void *y, void *slope, const float *bias, int64_t n)     \
    {                                                                                              \
        row_##name(x, y, slope, bias, n, DS_BF16);                                                 \
    }                                                                                              \
    static void name##_f16(const void *x, void *y, void *slope, const float *bias, int64_t n)      \
    {                                                                                              \
        row_##name(x, y, slope, bias, n, DS_F16);                                                  \
    }                                                                                              \
    static void name##_f64(const void *x, void *y, void *slope, const double *bias, int64_t n)     \
    {                                                                                              \
        for (int64_t i = 0; i < n; i++) {                                                          \
            double s, v = ((const double *)x)[i] + bias[i];                                        \
                                                                                                   \
            ((double *)y)[i] = ds_##name##_both_f64(&s, v);                                        \
            if (slope)                                                                             \
                ((double *)slope)[i] = s;                                                          \
        }                                                                                          \
    }

static double ds_relu_both_f64(double *slope, double x)
{
    *slope = x > 0 ? 1.0 : 0.0;
    return ds_relu_f64(x);
}

static double ds_none_both_f64(double *slope, double x)
{
    *slope = 1.0;
    return x;
}

#define ACTIVATIONS(X) X(none) X(gelu) X(gelu_tanh) X(relu) X(silu) /* in the order of ops.def */

ACTIVATIONS(ACTIVATE)

#define ROW(name) {{name##_f32, name##_bf16, name##_f16}, name##_f64},

static const struct {
    void (*low[3])(const void *x, void *y, void *slope, const float *bias, int64_t n);
    void (*f64)(const void *x, void *y, void *slope, const double *bias, int64_t n);
} activations[] = {ACTIVATIONS(ROW)};

#define ACTIVATION_COUNT ((int)(sizeof activations / sizeof *activations))

/* ---- the pass over [rows, cols] ---- */

typedef struct pass {
    const char *x;
    char *y, *slope;            /* may be x; slope: dense, or NULL */
    const void *bias;           /* [cols] f32 (f64 for f64), or NULL */
    int64_t rows, cols, stride; /* of x and y */
    int dtype, activation;
} pass;

/* n <= CHUNK elements of one row. */
static void activate(const pass *p, int64_t row, int64_t col, int64_t n)
{
    static const double zeros[CHUNK];
    int64_t bytes = ds_bytes_of(p->dtype), at = (row * p->stride + col) * bytes;
    const char *x = p->x + at;
    char *y = p->y + at;
    char *slope = p->slope ? p->slope + (row * p->cols + col) * bytes : NULL;

    if (p->dtype == DS_F64)
        activations[p->activation].f64(x, y, slope, p->bias ? (const double *)p->bias + col : zeros,
                                       n);
    else
        activations[p->activation].low[p->dtype](
            x, y, slope, p->bias ? (const float *)p->bias + col : (const float *)zeros, n);
}

static void run_pass(pass p)
{
    int threads;

    if (!p.bias && p.stride == p.cols) { /* one long row: short ones would waste vectors */
        p.cols *= p.rows;
        p.rows = 1;
    }
    threads = ds_threads(p.rows * p.cols * 4);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end, each = (p.cols + CHUNK - 1) / CHUNK;

        ds_part(&begin, &end, p.rows * each, 1);
        for (int64_t i = begin; i < end; i++) {
            int64_t col = i % each * CHUNK, n = p.cols - col < CHUNK ? p.cols - col : CHUNK;

            activate(&p, i / each, col, n);
        }
    }
}

/* ---- forward ---- */

/* x [.., cols] as a matrix [rows, cols]: two dimensions with any strides, else dense. */
static int flatten(ds_matrix *out, int64_t *rows, const ds_tensor *x, const char *name)
{
    int last = x->ndim - 1;

    if (x->ndim < 1 || (x->ndim != 2 && !x->dense))
        return ds_fail(DS_EINVAL, "linear wants %s dense or with two dimensions, not %d", name,
                       x->ndim);
    *rows = 1;
    for (int d = 0; d < last; d++)
        *rows *= x->shape[d];
    *out = ds_matrix_of(x->data, x->ndim == 2 ? x->stride[0] : x->shape[last], x->stride[last],
                        x->dtype);
    return 0;
}

static int check_linear(const ds_tensor *y, const ds_tensor *slope, const ds_tensor *x,
                        const ds_tensor *w, const ds_tensor *b, int activation)
{
    int64_t n = w->shape[0], k = w->shape[1];

    if (w->ndim != 2 || x->ndim < 1 || y->ndim < 1 || x->shape[x->ndim - 1] != k ||
        y->shape[y->ndim - 1] != n || (b && b->numel != n))
        return ds_fail(DS_EINVAL,
                       "linear wants x [.. x %lld], y [.. x %lld] and b [%lld] for w [%lld x %lld]",
                       (long long)k, (long long)n, (long long)n, (long long)n, (long long)k);
    if (!ds_is_float(x->dtype) || w->dtype != x->dtype || y->dtype != x->dtype)
        return ds_fail(DS_EINVAL, "linear cannot make %s of %s and %s", ds_name_of(y->dtype),
                       ds_name_of(x->dtype), ds_name_of(w->dtype));
    if (activation < 0 || activation >= ACTIVATION_COUNT || (slope && !activation))
        return ds_fail(DS_EINVAL, "linear has no %s %d",
                       slope ? "slope with activation" : "activation", activation);
    if (y->stride[y->ndim - 1] != 1 && y->numel > 1 && n > 1)
        return ds_fail(DS_EINVAL, "linear writes rows without gaps, not a stride of %lld",
                       (long long)y->stride[y->ndim - 1]);
    if (slope && (!slope->dense || slope->numel != y->numel || slope->dtype != y->dtype))
        return ds_fail(DS_EINVAL, "linear wants slope dense, %s, with %lld elements",
                       ds_name_of(y->dtype), (long long)y->numel);
    return 0;
}

/* b [n] dense, in f32 (f64 for f64). */
static const void *load_bias(const ds_tensor *b, int dtype)
{
    int64_t n = b->numel, stride = b->ndim ? b->stride[b->ndim - 1] : 1;
    void *row;

    if (b->dtype == (dtype == DS_F64 ? DS_F64 : DS_F32) && (stride == 1 || n == 1))
        return b->data;
    row = ds_scratch(DS_SCRATCH_SUMS, (size_t)n * sizeof(double));
    if (row && dtype == DS_F64)
        ds_row_load_f64(row, b->data, b->dtype, n, stride);
    else if (row)
        ds_row_load(row, b->data, b->dtype, n, stride);
    return row;
}

int DS_CPU(linear)(ds_tensor *y, ds_tensor *slope, const ds_tensor *x, const ds_tensor *w,
                   const ds_tensor *b, int activation)
{
    ds_product p = {.alpha = 1};
    pass q = {0};
    int64_t m = 0;
    int rc = check_linear(y, slope, x, w, b, activation);

    if (rc < 0 || (rc = flatten(&p.a, &p.m, x, "x")) < 0 || (rc = flatten(&p.y, &m, y, "y")) < 0)
        return rc;
    if (m != p.m)
        return ds_fail(DS_EINVAL, "linear cannot write %lld rows into %lld", (long long)p.m,
                       (long long)m);
    p.n = w->shape[0], p.k = w->shape[1];
    p.b = ds_matrix_of(w->data, w->stride[1], w->stride[0], w->dtype);
    if (b && activation == 0 && b->dtype == y->dtype && b->dense) {
        p.bias = b->data;
        b = NULL;
    }
    rc = ds_product_run(&p);
    if (rc < 0 || (activation == 0 && !b) || m == 0 || p.n == 0)
        return rc;
    if (b && !(q.bias = load_bias(b, y->dtype)))
        return DS_ENOMEM;
    q.x = q.y = y->data, q.slope = slope ? slope->data : NULL;
    q.rows = m, q.cols = p.n, q.stride = p.y.row;
    q.dtype = y->dtype, q.activation = activation;
    run_pass(q);
    return 0;
}

int DS_CPU(activate)(ds_tensor *y, ds_tensor *slope, const ds_tensor *h, int activation)
{
    pass q = {.x = h->data, .y = y->data, .slope = slope ? slope->data : NULL, .rows = 1};

    if (activation < 1 || activation >= ACTIVATION_COUNT)
        return ds_fail(DS_EINVAL, "activate has no activation %d", activation);
    if (!ds_is_float(h->dtype) || y->dtype != h->dtype || y->numel != h->numel || !y->dense ||
        !h->dense ||
        (slope && (!slope->dense || slope->numel != h->numel || slope->dtype != h->dtype)))
        return ds_fail(DS_EINVAL, "activate wants y and slope dense and like h, %lld %s",
                       (long long)h->numel, ds_name_of(h->dtype));
    q.cols = q.stride = h->numel;
    q.dtype = h->dtype, q.activation = activation;
    run_pass(q);
    return 0;
}

int DS_CPU(linear_aux)(ds_tensor *y, ds_tensor *h, const ds_tensor *x, const ds_tensor *w,
                       const ds_tensor *b, int activation)
{
    int rc = DS_CPU(linear)(h, NULL, x, w, b, 0);

    return rc < 0 ? rc : DS_CPU(activate)(y, NULL, h, activation);
}

/* ---- backward of activation and bias ---- */

#define FLUSH 64 /* rows summed before their sum is added to the total: keeps the sums' digits */

/* dh = dy slope, and sum += dh; one row. slope NULL: dh is dy and not written. */
VF_FUNC void backward_row(char *dh, const char *dy, const char *slope, float *sum, int64_t cols,
                          int dtype)
{
    int64_t i = 0;

    for (; i + VF_LANES <= cols; i += VF_LANES) {
        vf d = vf_load_as(dy, i, dtype);

        if (slope) {
            d *= vf_load_as(slope, i, dtype);
            vf_store_as(dh, i, dtype, d);
        }
        vf_store(sum + i, vf_load(sum + i) + d);
    }
    if (i < cols) {
        int64_t n = cols - i;
        vf d = vf_load_part_as(dy, i, dtype, n);

        if (slope) {
            d *= vf_load_part_as(slope, i, dtype, n);
            vf_store_part_as(dh, i, dtype, d, n);
        }
        vf_store_part(sum + i, vf_load_part(sum + i, n) + d, n);
    }
}

#define BACKWARD(name, dtype)                                                                      \
    static void name(char *dh, const char *dy, const char *slope, float *sum, int64_t cols)        \
    {                                                                                              \
        backward_row(dh, dy, slope, sum, cols, dtype);                                             \
    }
BACKWARD(backward_f32, DS_F32)
BACKWARD(backward_bf16, DS_BF16)
BACKWARD(backward_f16, DS_F16)

static void (*const backward[3])(char *dh, const char *dy, const char *slope, float *sum,
                                 int64_t cols) = {backward_f32, backward_bf16, backward_f16};

/* d = dh act′(h), dh = d and sum += d, [a] = act(h); one row. */
#define FUSED(name)                                                                                \
    VF_FUNC void fused_row_##name(char *dh, char *a, const char *h, float *sum, int64_t cols,      \
                                  int dtype)                                                       \
    {                                                                                              \
        int64_t i = 0;                                                                             \
                                                                                                   \
        for (; i + VF_LANES <= cols; i += VF_LANES) {                                              \
            both v = name(vf_load_as(h, i, dtype), dtype != DS_BF16);                              \
            vf d = vf_load_as(dh, i, dtype) * v.slope;                                             \
                                                                                                   \
            vf_store_as(dh, i, dtype, d);                                                          \
            if (a)                                                                                 \
                vf_store_as(a, i, dtype, v.y);                                                     \
            vf_store(sum + i, vf_load(sum + i) + d);                                               \
        }                                                                                          \
        if (i < cols) {                                                                            \
            int64_t n = cols - i;                                                                  \
            both v = name(vf_load_part_as(h, i, dtype, n), dtype != DS_BF16);                      \
            vf d = vf_load_part_as(dh, i, dtype, n) * v.slope;                                     \
                                                                                                   \
            vf_store_part_as(dh, i, dtype, d, n);                                                  \
            if (a)                                                                                 \
                vf_store_part_as(a, i, dtype, v.y, n);                                             \
            vf_store_part(sum + i, vf_load_part(sum + i, n) + d, n);                               \
        }                                                                                          \
    }                                                                                              \
    static void fused_##name##_f32(char *dh, char *a, const char *h, float *sum, int64_t cols)     \
    {                                                                                              \
        fused_row_##name(dh, a, h, sum, cols, DS_F32);                                             \
    }                                                                                              \
    static void fused_##name##_bf16(char *dh, char *a, const char *h, float *sum, int64_t cols)    \
    {                                                                                              \
        fused_row_##name(dh, a, h, sum, cols, DS_BF16);                                            \
    }                                                                                              \
    static void fused_##name##_f16(char *dh, char *a, const char *h, float *sum, int64_t cols)     \
    {                                                                                              \
        fused_row_##name(dh, a, h, sum, cols, DS_F16);                                             \
    }
FUSED(gelu)
FUSED(gelu_tanh)
FUSED(relu)
FUSED(silu)

#define FUSED_ROW(name) {fused_##name##_f32, fused_##name##_bf16, fused_##name##_f16},

static void (*const fused[][3])(char *dh, char *a, const char *h, float *sum, int64_t cols) = {
    {NULL, NULL, NULL}, FUSED_ROW(gelu) FUSED_ROW(gelu_tanh) FUSED_ROW(relu) FUSED_ROW(silu)};

static void add_and_clear(float *restrict total, float *restrict sum, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        total[i] += sum[i];
        sum[i] = 0;
    }
}

/* What a pass backwards reads and writes; data NULL: is not there. With an activation `beside` is h, and
 * dy is dh; else it is slope. */
typedef struct backward_pass {
    ds_matrix dh, a, dy, beside;
    int64_t rows, cols;
    int activation;
} backward_pass;

static char *row_of(const ds_matrix *x, int64_t r)
{
    return x->data ? x->data + r * x->row * ds_bytes_of(x->dtype) : NULL;
}

/* One thread's part. total [cols], sum [cols]. */
static void backward_part(const backward_pass *p, int64_t begin, int64_t end, float *total,
                          float *sum)
{
    int64_t cols = p->cols;

    memset(total, 0, (size_t)cols * sizeof *total);
    memset(sum, 0, (size_t)cols * sizeof *sum);
    for (int64_t r = begin; r < end; r++) {
        if (p->activation)
            fused[p->activation][p->dy.dtype](row_of(&p->dh, r), row_of(&p->a, r),
                                              row_of(&p->beside, r), sum, cols);
        else
            backward[p->dy.dtype](p->beside.data ? row_of(&p->dh, r) : NULL, row_of(&p->dy, r),
                                  row_of(&p->beside, r), sum, cols);
        if ((r - begin) % FLUSH == FLUSH - 1)
            add_and_clear(total, sum, cols);
    }
    add_and_clear(total, sum, cols);
}

/* Sums of one column in f64; plain, for gradient checks. */
static void backward_f64(ds_tensor *db, const backward_pass *p, int accumulate)
{
    for (int64_t j = 0; j < p->cols; j++) {
        double sum = 0, old;

        for (int64_t r = 0; r < p->rows; r++) {
            double d = ((double *)row_of(&p->dy, r))[j], y, slope;

            if (p->activation) {
                activations[p->activation].f64((double *)row_of(&p->beside, r) + j, &y, &slope,
                                               (const double[]){0}, 1);
                if (p->a.data)
                    ((double *)row_of(&p->a, r))[j] = y;
            } else {
                slope = p->beside.data ? ((double *)row_of(&p->beside, r))[j] : 1;
            }
            d *= slope;
            if (p->beside.data)
                ((double *)row_of(&p->dh, r))[j] = d;
            sum += d;
        }
        if (!db)
            continue;
        old = accumulate ? ((double *)db->data)[j] : 0;
        ((double *)db->data)[j] = old + sum;
    }
}

static int run_backward(ds_tensor *db, const backward_pass *p, int accumulate)
{
    int64_t cols = p->cols;
    float *sums, *row;
    int threads;

    if (p->dy.dtype == DS_F64) {
        backward_f64(db, p, accumulate);
        return 0;
    }
    threads = ds_threads(p->rows * cols * (p->activation ? 4 : 1));
    sums = ds_scratch(DS_SCRATCH_SUMS, (size_t)((2 * threads + 1) * cols) * sizeof *sums);
    if (!sums)
        return DS_ENOMEM;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *mine = sums + 2 * cols * omp_get_thread_num();
        int64_t begin, end;

        ds_part(&begin, &end, p->rows, 1);
        backward_part(p, begin, end, mine, mine + cols);
    }
    if (!db)
        return 0;
    for (int t = 1; t < threads; t++)
        add_and_clear(sums, sums + 2 * cols * t, cols);
    row = sums + 2 * cols * threads;
    if (accumulate) {
        ds_row_load(row, db->data, db->dtype, cols, 1);
        add_and_clear(sums, row, cols);
    }
    ds_row_store(db->data, sums, db->dtype, cols, 1);
    return 0;
}

static int check_backward(const ds_tensor *dh, const ds_tensor *db, const ds_tensor *dy,
                          const ds_tensor *slope, int64_t cols)
{
    if (!ds_is_float(dy->dtype) ||
        (slope && (!dh || dh->dtype != dy->dtype || slope->dtype != dy->dtype)))
        return ds_fail(DS_EINVAL, "linear_backward_bias wants dh and slope in the dtype of dy, %s",
                       ds_name_of(dy->dtype));
    if (slope && (dh->numel != dy->numel || slope->numel != dy->numel))
        return ds_fail(DS_EINVAL,
                       "linear_backward_bias got %lld, %lld and %lld elements in dh, dy, slope",
                       (long long)dh->numel, (long long)dy->numel, (long long)slope->numel);
    if (db && (db->numel != cols || !db->dense || !ds_is_float(db->dtype) ||
               (dy->dtype == DS_F64) != (db->dtype == DS_F64)))
        return ds_fail(DS_EINVAL,
                       "linear_backward_bias wants db dense with %lld elements, not %lld %s",
                       (long long)cols, (long long)db->numel, ds_name_of(db->dtype));
    if ((dy->shape[dy->ndim - 1] > 1 && dy->stride[dy->ndim - 1] != 1) ||
        (slope && cols > 1 &&
         (dh->stride[dh->ndim - 1] != 1 || slope->stride[slope->ndim - 1] != 1)))
        return ds_fail(DS_EINVAL, "linear_backward_bias wants rows without gaps");
    return 0;
}

int DS_CPU(linear_backward_bias)(ds_tensor *dh, ds_tensor *db, const ds_tensor *dy,
                                 const ds_tensor *slope, int accumulate)
{
    backward_pass p = {.cols = dy->ndim ? dy->shape[dy->ndim - 1] : 1};
    int64_t same;
    int rc = check_backward(dh, db, dy, slope, p.cols);

    if (rc < 0 || (rc = flatten(&p.dy, &p.rows, dy, "dy")) < 0 ||
        (slope && (rc = flatten(&p.dh, &same, dh, "dh")) < 0) ||
        (slope && (rc = flatten(&p.beside, &same, slope, "slope")) < 0))
        return rc;
    return run_backward(db, &p, accumulate);
}

int DS_CPU(linear_backward_weight)(ds_tensor *dw, ds_tensor *db, const ds_tensor *dy,
                                   const ds_tensor *x, int accumulate, int accumulate_db)
{
    ds_product p = {.alpha = 1, .beta = accumulate != 0};
    ds_tensor across = *dy;
    int rc;

    if (dy->ndim != 2)
        return ds_fail(DS_EINVAL, "linear_backward_weight wants dy [M x N], not %d dimensions",
                       dy->ndim);
    across.shape[0] = dy->shape[1], across.shape[1] = dy->shape[0];
    across.stride[0] = dy->stride[1], across.stride[1] = dy->stride[0];
    if ((rc = ds_product_of(&p, dw, &across, x)) < 0 ||
        (db && (rc = DS_CPU(linear_backward_bias)(NULL, db, dy, NULL, accumulate_db)) < 0))
        return rc;
    return ds_product_run(&p);
}

int DS_CPU(linear_backward_act)(ds_tensor *dh, ds_tensor *a, ds_tensor *db, const ds_tensor *dy,
                                const ds_tensor *w, const ds_tensor *h, int activation,
                                int accumulate)
{
    backward_pass p = {.cols = h->ndim ? h->shape[h->ndim - 1] : 1, .activation = activation};
    ds_product q = {.alpha = 1};
    int64_t same;
    int rc;

    if (activation < 1 || activation >= ACTIVATION_COUNT)
        return ds_fail(DS_EINVAL, "linear_backward_act has no activation %d", activation);
    if ((rc = check_backward(dh, db, h, h, p.cols)) < 0 ||
        (a && (rc = check_backward(a, NULL, h, h, p.cols)) < 0) ||
        (rc = flatten(&p.dh, &p.rows, dh, "dh")) < 0 ||
        (rc = flatten(&p.beside, &same, h, "h")) < 0 ||
        (a && (rc = flatten(&p.a, &same, a, "a"))) || (rc = flatten(&q.a, &q.m, dy, "dy")) < 0)
        return rc;
    if (w->ndim != 2 || w->shape[1] != p.cols || w->shape[0] != dy->shape[dy->ndim - 1] ||
        q.m != p.rows || dh->shape[dh->ndim - 1] != p.cols || w->dtype != h->dtype ||
        dy->dtype != h->dtype)
        return ds_fail(
            DS_EINVAL,
            "linear_backward_act wants dy [%lld x N] and w [N x %lld] in the dtype of h, "
            "%s",
            (long long)p.rows, (long long)p.cols, ds_name_of(h->dtype));
    q.y = p.dh;
    q.b = ds_matrix_of(w->data, w->stride[0], w->stride[1], w->dtype);
    q.n = p.cols, q.k = w->shape[0];
    rc = ds_product_run(&q);
    if (rc < 0)
        return rc;
    p.dy = p.dh;
    return run_backward(db, &p, accumulate);
}
