/* optim.cu - optimizers: one pass over flat buffers of weights, state and gradients; Lamb, which needs
 * norms of whole tensors, makes two. And the norm of all gradients, and the factor that clips it.
 *
 * Bound by memory: four elements a thread at a time, 16 bytes from each buffer of f32, and whatever can
 * ride along does, the copy in low precision too. The arithmetic is in optim_rules.h. Numbers that only
 * the device knows (factor, rates) are read by the kernel: the host waits for nothing.
 */
#include "kernels/cuda/common.cuh"

#include "kernels/optim_rules.h"

#define REAL float
#define SQRT sqrtf
#define FMA DS_FMA
#define NAME(rule) rule##_f32
#include "kernels/optim_rules.h"

#define WAVES 8 /* blocks a processor has in turn: what is left of the last one is little */

/* One call. Elements before `head` and beyond its packs of 4 go one by one; packs is 0 where memory is
 * not aligned alike. */
struct pass {
    float *p, *a, *b; /* weights; state, may be NULL */
    uint16_t *low;    /* may be NULL */
    const void *g;
    const float *factor; /* may be NULL, as rates */
    const double *rates;
    float *sums; /* Lamb: [blocks, 2] of weights² and update² */
    int64_t n, head, packs;
    int low_dtype, blocks;
    ds_hyper h;
};

/* The rules, with the states they have. */
struct adam_rule {
    static constexpr bool a = true, b = true;
    static __device__ void go(float *p, float *m, float *v, float g, const constants_f32 *k)
    {
        adam_f32(p, m, v, g, k);
    }
};
struct sgd_plain_rule {
    static constexpr bool a = false, b = false;
    static __device__ void go(float *p, float *, float *, float g, const constants_f32 *k)
    {
        sgd_plain_f32(p, g, k);
    }
};
struct sgd_rule {
    static constexpr bool a = true, b = false;
    static __device__ void go(float *p, float *m, float *, float g, const constants_f32 *k)
    {
        sgd_f32(p, m, g, k);
    }
};
struct lion_rule {
    static constexpr bool a = true, b = false;
    static __device__ void go(float *p, float *m, float *, float g, const constants_f32 *k)
    {
        lion_f32(p, m, g, k);
    }
};
struct adagrad_rule {
    static constexpr bool a = true, b = false;
    static __device__ void go(float *p, float *s, float *, float g, const constants_f32 *k)
    {
        adagrad_f32(p, s, g, k);
    }
};

/* ---- one pass */

/* Every block makes the constants for itself. false: the step is to be left out. */
static __device__ inline bool start(constants_f32 *k, const pass &t)
{
    __shared__ int go_on;

    if (threadIdx.x == 0) {
        ds_hyper h = t.h;

        go_on = ds_hyper_read(&h, t.factor, t.rates);
        *k = constants_of_f32(&h);
    }
    __syncthreads();
    return go_on;
}

static __device__ inline uint16_t low_of(float p, int dtype)
{
    return dtype == DS_BF16 ? from_float<bf16>(p).bits : from_float<f16>(p).bits;
}

/* N elements from i on. */
template <typename Rule, typename S, int N>
static __device__ inline void step(const pass &t, int64_t i, const constants_f32 *k)
{
    pack<float, N> p = *(pack<float, N> *)(t.p + i), a, b;
    pack<S, N> g = *(const pack<S, N> *)((const S *)t.g + i);
    pack<uint16_t, N> low;

    if (Rule::a)
        a = *(pack<float, N> *)(t.a + i);
    if (Rule::b)
        b = *(pack<float, N> *)(t.b + i);
    for (int j = 0; j < N; j++) {
        Rule::go(&p.of[j], &a.of[j], &b.of[j], to_float(g.of[j]), k);
        low.of[j] = low_of(p.of[j], t.low_dtype);
    }
    *(pack<float, N> *)(t.p + i) = p;
    if (Rule::a)
        *(pack<float, N> *)(t.a + i) = a;
    if (Rule::b)
        *(pack<float, N> *)(t.b + i) = b;
    if (t.low)
        *(pack<uint16_t, N> *)(t.low + i) = low;
}

/* The i-th of the elements that are in no pack. */
static __device__ inline int64_t single(const pass &t, int64_t i)
{
    return i < t.head ? i : i + 4 * t.packs;
}

template <typename Rule, typename S> static __global__ void __launch_bounds__(256) go(pass t)
{
    __shared__ constants_f32 k;

    if (!start(&k, t))
        return;
    for (int64_t i = global_thread(); i < t.packs; i += global_threads())
        step<Rule, S, 4>(t, t.head + 4 * i, &k);
    for (int64_t i = global_thread(); i < t.n - 4 * t.packs; i += global_threads())
        step<Rule, S, 1>(t, single(t, i), &k);
}

/* ---- Lamb */

/* The first pass moves the averages and adds up squares of weights and update. */
template <typename S, int N>
static __device__ inline void moments(float (&sums)[2], const pass &t, int64_t i,
                                      const constants_f32 *k)
{
    pack<float, N> p = *(pack<float, N> *)(t.p + i), m = *(pack<float, N> *)(t.a + i),
                   v = *(pack<float, N> *)(t.b + i);
    pack<S, N> g = *(const pack<S, N> *)((const S *)t.g + i);

    for (int j = 0; j < N; j++) {
        float update = lamb_moments_f32(p.of[j], &m.of[j], &v.of[j], to_float(g.of[j]), k);

        sums[0] = DS_FMA(p.of[j], p.of[j], sums[0]);
        sums[1] = DS_FMA(update, update, sums[1]);
    }
    *(pack<float, N> *)(t.a + i) = m;
    *(pack<float, N> *)(t.b + i) = v;
}

template <typename S> static __global__ void __launch_bounds__(256) lamb_first(pass t)
{
    __shared__ constants_f32 k;
    __shared__ float shared[32];
    float sums[2] = {0, 0};

    if (!start(&k, t))
        return;
    for (int64_t i = global_thread(); i < t.packs; i += global_threads())
        moments<S, 4>(sums, t, t.head + 4 * i, &k);
    for (int64_t i = global_thread(); i < t.n - 4 * t.packs; i += global_threads())
        moments<S, 1>(sums, t, single(t, i), &k);
    for (int i = 0; i < 2; i++) {
        float sum = block_reduce<add_op>(sums[i], shared);

        if (threadIdx.x == 0)
            t.sums[2 * blockIdx.x + i] = sum;
    }
}

/* The sum of count numbers, `apart` from each other: each of 32 lanes its own, then lane by lane. Of
 * one thread's use: all threads of a warp. */
static __device__ inline double sum_of(const float *x, int count, int apart)
{
    double sum = 0;

    for (int i = threadIdx.x % 32; i < count; i += 32)
        sum += (double)x[(int64_t)i * apart];
    for (int k = 16; k; k >>= 1)
        sum += __shfl_xor_sync(0xffffffff, sum, k);
    return sum;
}

template <int N>
static __device__ inline void apply(const pass &t, int64_t i, const constants_f32 *k)
{
    pack<float, N> p = *(pack<float, N> *)(t.p + i), m = *(pack<float, N> *)(t.a + i),
                   v = *(pack<float, N> *)(t.b + i);
    pack<uint16_t, N> low;

    for (int j = 0; j < N; j++) {
        lamb_apply_f32(&p.of[j], m.of[j], v.of[j], k);
        low.of[j] = low_of(p.of[j], t.low_dtype);
    }
    *(pack<float, N> *)(t.p + i) = p;
    if (t.low)
        *(pack<uint16_t, N> *)(t.low + i) = low;
}

/* Every block adds up the first pass's sums, in the same order, and knows the trust ratio. */
static __global__ void __launch_bounds__(256) lamb_second(pass t)
{
    __shared__ constants_f32 k;
    __shared__ int go_on;

    if (threadIdx.x < 32) {
        double weights = sum_of(t.sums, t.blocks, 2), updates = sum_of(t.sums + 1, t.blocks, 2);
        ds_hyper h = t.h;
        int fine = ds_hyper_read(&h, t.factor, t.rates);

        h.lr *= ds_lamb_trust(&h, weights, updates);
        if (threadIdx.x == 0) {
            go_on = fine;
            k = constants_of_f32(&h);
        }
    }
    __syncthreads();
    if (!go_on)
        return;
    for (int64_t i = global_thread(); i < t.packs; i += global_threads())
        apply<4>(t, t.head + 4 * i, &k);
    for (int64_t i = global_thread(); i < t.n - 4 * t.packs; i += global_threads())
        apply<1>(t, single(t, i), &k);
}

/* ---- preparing a pass */

/* How many elements come before all buffers are aligned for packs of 4; -1: they never are. */
static int64_t head_of(const pass *t, int g_bytes)
{
    int64_t head = (16 - (int64_t)((uintptr_t)t->p & 15)) % 16 / 4;
    uintptr_t a = (uintptr_t)(t->a + head), b = (uintptr_t)(t->b + head);
    uintptr_t g = (uintptr_t)t->g + (uintptr_t)(head * g_bytes), low = (uintptr_t)(t->low + head);
    bool fine = (uintptr_t)t->p % 4 == 0 && (!t->a || a % 16 == 0) && (!t->b || b % 16 == 0) &&
                g % (uintptr_t)(4 * g_bytes) == 0 && (!t->low || low % 8 == 0);

    return fine ? head : -1;
}

static int prepare(pass *t, const char *what, ds_tensor *p, ds_tensor *a, ds_tensor *b,
                   ds_tensor *low, const ds_tensor *g, const ds_tensor *factor,
                   const ds_tensor *rates)
{
    const ds_tensor *const buffers[] = {p, a, b, low, g};
    int64_t head;

    DS_TRY(on_cuda(what, 5, buffers));
    DS_TRY(ds_check_optimizer(what, p, a, b, low, g, factor, rates));
    if (p->dtype == DS_F64)
        return ds_cuda_refuse(what, DS_F64);
    t->p = (float *)p->data;
    t->a = a ? (float *)a->data : NULL;
    t->b = b ? (float *)b->data : NULL;
    t->low = low ? (uint16_t *)low->data : NULL;
    t->low_dtype = low ? low->dtype : DS_BF16;
    t->g = g->data;
    t->factor = factor ? (const float *)factor->data : NULL;
    t->rates = rates ? (const double *)rates->data : NULL;
    t->n = p->numel;
    head = head_of(t, (int)ds_bytes_of(g->dtype));
    t->head = head > t->n ? t->n : head < 0 ? 0 : head;
    t->packs = head < 0 ? 0 : (t->n - t->head) / 4;
    return 0;
}

/* ---- the kernels */

static dim3 grid_of(const pass *t)
{
    return grid_for(t->packs ? t->packs + 1 : t->n, 256, WAVES);
}

template <typename Rule> static int run(const char *what, const pass *t, int g_dtype)
{
    if (t->n == 0)
        return 0;
    return DS_BY_FLOAT(what, g_dtype, S, launch(what, go<Rule, S>, grid_of(t), 256, 0, *t));
}

extern "C" int ds_cuda_adam(ds_tensor *p, ds_tensor *m, ds_tensor *v, ds_tensor *low,
                            const ds_tensor *g, double lr, double beta1, double beta2, double eps,
                            double weight_decay, double c1, double c2, double gscale, int decoupled,
                            const ds_tensor *factor, const ds_tensor *rates)
{
    pass t = {};

    DS_TRY(prepare(&t, "adam", p, m, v, low, g, factor, rates));
    t.h = ds_hyper_adam(lr, beta1, beta2, eps, weight_decay, c1, c2, gscale, decoupled);
    return run<adam_rule>("adam", &t, g->dtype);
}

extern "C" int ds_cuda_sgd(ds_tensor *p, ds_tensor *momentum_buffer, ds_tensor *low,
                           const ds_tensor *g, double lr, double momentum, double dampening,
                           double weight_decay, int nesterov, int first, double gscale,
                           const ds_tensor *factor, const ds_tensor *rates)
{
    pass t = {};

    if (!momentum_buffer && momentum != 0)
        return ds_fail(DS_EINVAL, "sgd: momentum %g needs a momentum buffer", momentum);
    DS_TRY(prepare(&t, "sgd", p, momentum_buffer, NULL, low, g, factor, rates));
    t.h = ds_hyper_sgd(lr, momentum, dampening, weight_decay, nesterov, first, gscale);
    return momentum_buffer ? run<sgd_rule>("sgd", &t, g->dtype)
                           : run<sgd_plain_rule>("sgd", &t, g->dtype);
}

extern "C" int ds_cuda_lion(ds_tensor *p, ds_tensor *m, ds_tensor *low, const ds_tensor *g,
                            double lr, double beta1, double beta2, double weight_decay,
                            double gscale, const ds_tensor *factor, const ds_tensor *rates)
{
    pass t = {};

    DS_TRY(prepare(&t, "lion", p, m, NULL, low, g, factor, rates));
    t.h = ds_hyper_lion(lr, beta1, beta2, weight_decay, gscale);
    return run<lion_rule>("lion", &t, g->dtype);
}

extern "C" int ds_cuda_adagrad(ds_tensor *p, ds_tensor *sum, ds_tensor *low, const ds_tensor *g,
                               double lr, double eps, double weight_decay, double gscale,
                               const ds_tensor *factor, const ds_tensor *rates)
{
    pass t = {};

    DS_TRY(prepare(&t, "adagrad", p, sum, NULL, low, g, factor, rates));
    t.h = ds_hyper_adagrad(lr, eps, weight_decay, gscale);
    return run<adagrad_rule>("adagrad", &t, g->dtype);
}

extern "C" int ds_cuda_lamb(ds_tensor *p, ds_tensor *m, ds_tensor *v, ds_tensor *low,
                            const ds_tensor *g, double lr, double beta1, double beta2, double eps,
                            double weight_decay, double c1, double c2, double min_coeff,
                            double max_coeff, double gscale, const ds_tensor *factor,
                            const ds_tensor *rates)
{
    pass t = {};
    dim3 grid;

    DS_TRY(prepare(&t, "lamb", p, m, v, low, g, factor, rates));
    if (t.n == 0)
        return 0;
    t.h = ds_hyper_lamb(lr, beta1, beta2, eps, weight_decay, c1, c2, min_coeff, max_coeff, gscale);
    grid = grid_of(&t);
    t.blocks = (int)grid.x;
    t.sums = (float *)ds_cuda_scratch(DS_CUDA_PARTIAL, (size_t)t.blocks * 2 * sizeof(float));
    if (!t.sums)
        return DS_ENOMEM;
    DS_TRY(DS_BY_FLOAT("lamb", g->dtype, S, launch("lamb", lamb_first<S>, grid, 256, 0, t)));
    return launch("lamb", lamb_second, grid, 256, 0, t);
}

/* ---- the norm of all gradients */

template <typename S>
static __global__ void __launch_bounds__(256)
    squares(float *sums, const S *x, int64_t n, int64_t head)
{
    constexpr int N = per_16<S>;
    __shared__ float shared[32];
    int64_t packs = (n - head) / N;
    float sum = 0;

#pragma unroll 4
    for (int64_t i = global_thread(); i < packs; i += global_threads()) {
        pack<S, N> p = ((const pack<S, N> *)(x + head))[i];

        for (int j = 0; j < N; j++)
            sum = DS_FMA(to_float(p.of[j]), to_float(p.of[j]), sum);
    }
    for (int64_t i = global_thread(); i < n - N * packs; i += global_threads()) {
        float v = to_float(x[i < head ? i : i + N * packs]);

        sum = DS_FMA(v, v, sum);
    }
    sum = block_reduce<add_op>(sum, shared);
    if (threadIdx.x == 0)
        sums[blockIdx.x] = sum;
}

static __global__ void add_squares(float *y, const float *sums, int count, int accumulate)
{
    double sum = sum_of(sums, count, 1);

    if (threadIdx.x == 0)
        *y = (float)sum + (accumulate ? *y : 0);
}

template <typename S>
static int square_sum(float *y, const float *sums, const ds_tensor *x, dim3 grid, int accumulate)
{
    int64_t head = (int64_t)(16 - ((uintptr_t)x->data & 15)) % 16 / (int64_t)sizeof(S);

    DS_TRY(launch("square_sum", squares<S>, grid, 256, 0, (float *)sums, (const S *)x->data,
                  x->numel, head < x->numel ? head : x->numel));
    return launch("square_sum", add_squares, 1, 32, 0, y, sums, (int)grid.x, accumulate);
}

extern "C" int ds_cuda_square_sum(ds_tensor *y, const ds_tensor *x, int accumulate)
{
    const ds_tensor *t[] = {y, x};
    dim3 grid = grid_for(x->numel, 2048, WAVES);
    float *sums;

    DS_TRY(on_cuda("square_sum", 2, t));
    DS_TRY(ds_check_square_sum(y, x));
    if (x->dtype == DS_F64)
        return ds_cuda_refuse("square_sum", DS_F64);
    sums = (float *)ds_cuda_scratch(DS_CUDA_PARTIAL, grid.x * sizeof *sums);
    if (!sums)
        return DS_ENOMEM;
    return DS_BY_FLOAT("square_sum", x->dtype, S,
                       square_sum<S>((float *)y->data, sums, x, grid, accumulate));
}

static __global__ void clip(float *factor, float *norm, const float *squares, double max_norm,
                            double scale, int skip)
{
    double length = ds_clip_norm((double)*squares, scale);

    *norm = (float)length;
    *factor = (float)ds_clip_factor(length, max_norm, scale, skip);
}

extern "C" int ds_cuda_clip_factor(ds_tensor *factor, ds_tensor *norm, const ds_tensor *squares,
                                   double max_norm, double scale, int skip)
{
    static const char what[] = "clip_factor";
    const ds_tensor *t[] = {factor, norm, squares};

    DS_TRY(on_cuda(what, 3, t));
    DS_TRY(ds_check_clip_factor(factor, norm, squares));
    return launch(what, clip, 1, 1, 0, (float *)factor->data, (float *)norm->data,
                  (const float *)squares->data, max_norm, scale, skip);
}
