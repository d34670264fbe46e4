/* linear_cross_entropy.cu - the output projection and its mean cross-entropy in one, with gradients.
 *
 * Rows are taken in chunks, as many as scratch has: a product makes their logits, one kernel turns these
 * into losses and, in place, into gradients, and two products use them. How many rows count is known
 * on the device only, so the kernels divide by a number that lies there; nobody waits for it.
 *
 * A row of logits is a block's. It is read once: maximum and sum of powers come from one visit (Milakov
 * and Gimelshein 2018, alg. 3), each thread keeping its own of both and correcting the sum when its
 * maximum grows. What was read stays in shared memory for the second visit where two blocks of a
 * multiprocessor have room for that, so that one computes while the other reads: 50304 classes of bf16
 * do. A longer row is read again, from its end, while the L2 cache has it.
 *
 * The weight's gradient is a sum over the chunks, in f32: in dw itself, or in `carry` where dw is of
 * low precision, and rounded once at the end.
 */
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/gemm.h"

#define NAME "linear_cross_entropy"
#define MOST_THREADS 512
#define UNROLL 4

/* What lies in device memory between the kernels: how many rows count, then their losses. */
#define LOSSES_AT 256

typedef struct targets {
    const void *data;
    int64_t stride, ignore, classes;
    int dtype;
} targets;

/* ---- targets */

/* The class of row i; -1: it does not count. */
static __device__ inline int64_t class_at(const targets &t, int64_t i, ds_cuda_fault *f)
{
    int64_t at = i * t.stride;
    int64_t c = t.dtype == DS_I64   ? ((const int64_t *)t.data)[at]
                : t.dtype == DS_I32 ? ((const int32_t *)t.data)[at]
                                    : ((const uint8_t *)t.data)[at];

    if (c == t.ignore)
        return -1;
    if (c >= 0 && c < t.classes)
        return c;
    if (f)
        fault(f, NAME, c, t.classes);
    return -1;
}

/* One block. */
static __global__ void count_kernel(int64_t *count, targets t, int64_t n, ds_cuda_fault *f)
{
    __shared__ int64_t parts[32];
    int64_t mine = 0;

    for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
        mine += class_at(t, i, f) >= 0;
    for (int k = 16; k; k >>= 1)
        mine += __shfl_xor_sync(0xffffffff, mine, k);
    if (threadIdx.x % 32 == 0)
        parts[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x != 0)
        return;
    for (unsigned w = 1; w < blockDim.x / 32; w++)
        mine += parts[w];
    *count = mine;
}

/* One block: the mean of the rows that count, 0 of none. */
static __global__ void mean_kernel(float *loss, const float *losses, const int64_t *count,
                                   int64_t n)
{
    __shared__ double parts[1024];
    double sum = 0;

    for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
        sum += losses[i];
    parts[threadIdx.x] = sum;
    for (unsigned k = blockDim.x / 2; k; k >>= 1) {
        __syncthreads();
        if (threadIdx.x < k)
            parts[threadIdx.x] += parts[threadIdx.x + k];
    }
    if (threadIdx.x == 0)
        *loss = *count ? (float)(parts[0] / (double)*count) : 0.0f;
}

/* ---- a row of logits */

template <typename S> struct rows_task {
    S *logits; /* [rows of the chunk, stride] */
    float *losses;
    const int64_t *count;
    targets target;
    int64_t first, stride; /* first: the chunk's first row */
    float seed;
    int gradient;
};

/* A maximum, and the sum of e^(x - base), where base is that, or 0 as long as it is -inf. */
struct running {
    float max, sum;
};

static __device__ inline float base_of(float max)
{
    return max == -INFINITY ? 0.0f : max;
}

template <typename S, int N>
static __device__ inline void take(running *r, const pack<S, N> &v, int64_t left)
{
    float x[N], most = r->max, base, sum = 0;

#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = i < left ? to_float(v.of[i]) : -INFINITY;
        most = fmaxf(most, x[i]); /* passes over NaN; the sum brings it out */
    }
    base = base_of(most);
#pragma unroll
    for (int i = 0; i < N; i++)
        sum += fast_exp(x[i] - base);
    r->sum = fmaf(r->sum, fast_exp(r->max - base), sum);
    r->max = most;
}

/* First visit: all of the row once; `held` receives it. */
template <typename S, int N, bool HELD>
static __device__ inline running first_visit(pack<S, N> *held, const S *row, int64_t packs,
                                             int64_t classes)
{
    running r = {-INFINITY, 0};
    pack<S, N> v[UNROLL];

    for (int64_t p = threadIdx.x; p < packs; p += UNROLL * blockDim.x) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int64_t at = p + u * blockDim.x;

            if (at >= packs)
                break;
            if (HELD)
                v[u] = load_pack<S, N>(row + at * N);
            else
                v[u] = *(const pack<S, N> *)(row + at * N);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int64_t at = p + u * blockDim.x;

            if (at >= packs)
                break;
            if (HELD)
                held[at] = v[u];
            take<S, N>(&r, v[u], classes - at * N);
        }
    }
    return r;
}

/* Second visit: each thread has what it took in the first. */
template <typename S, int N, bool HELD>
static __device__ inline void second_visit(S *row, const pack<S, N> *held, int64_t packs,
                                           int64_t classes, int64_t target, float base, float sum,
                                           float scale)
{
    int64_t last = (packs - 1 - threadIdx.x) / blockDim.x;
    float factor = scale / sum;

    if (threadIdx.x >= packs)
        return;
    for (int64_t p = threadIdx.x + last * blockDim.x; p >= 0; p -= blockDim.x) {
        pack<S, N> v = HELD ? held[p] : *(const pack<S, N> *)(row + p * N);

#pragma unroll
        for (int i = 0; i < N; i++) {
            float e = fast_exp(to_float(v.of[i]) - base);

            e = p * N + i == target ? e - sum : e;
            v.of[i] = from_float<S>(p * N + i < classes ? e * factor : 0.0f);
        }
        store_pack(row + p * N, v);
    }
}

template <typename S, bool HELD>
static __global__ void __launch_bounds__(MOST_THREADS) rows_kernel(rows_task<S> t)
{
    constexpr int N = per_16<S>;
    typedef pack<S, N> row_pack;
    __shared__ float shared[32];
    DS_SHARED(row_pack, held);
    S *row = t.logits + blockIdx.x * t.stride;
    int64_t i = t.first + blockIdx.x, target = class_at(t.target, i, NULL);
    int64_t classes = t.target.classes, packs = (classes + N - 1) / N;
    running r;

    if (target < 0) {
        pack<S, N> none = {};

        if (threadIdx.x == 0)
            t.losses[i] = 0;
        for (int64_t p = threadIdx.x; p < packs && t.gradient; p += blockDim.x)
            store_pack(row + p * N, none);
        return;
    }
    float at_target = threadIdx.x == 0 ? to_float(row[target]) : 0;
    r = first_visit<S, N, HELD>(held, row, packs, classes);
    float base = base_of(block_reduce<max_op>(r.max, shared));
    float sum = block_reduce<add_op>(r.sum * fast_exp(base_of(r.max) - base), shared);

    if (threadIdx.x == 0)
        t.losses[i] = logf(sum) + (base - at_target);
    if (t.gradient)
        second_visit<S, N, HELD>(row, held, packs, classes, target, base, sum,
                                 t.seed / (float)*t.count);
}

template <typename S> static int visit_rows(const rows_task<S> *t, int64_t rows)
{
    int64_t packs = (t->target.classes + per_16<S> - 1) / per_16<S>;
    int64_t threads = (packs / UNROLL + 31) / 32 * 32, bytes = packs * 16;
    dim3 block((unsigned)(threads < 32 ? 32 : threads > MOST_THREADS ? MOST_THREADS : threads));

    if (t->gradient && bytes <= ds_cuda.shared_most / 2 - 2048)
        return launch(NAME, rows_kernel<S, true>, dim3((unsigned)rows), block, (size_t)bytes, *t);
    return launch(NAME, rows_kernel<S, false>, dim3((unsigned)rows), block, 0, *t);
}

/* ---- the end of a sum: dw = carry, or dw + carry */

template <typename S>
static __global__ void round_kernel(S *dw, const float *carry, int64_t n, int accumulate)
{
    for (int64_t i = global_thread() * 4; i < n; i += global_threads() * 4) {
        if (n - i >= 4 && ((uintptr_t)dw & 7) == 0) {
            pack<float, 4> sum = load_pack<float, 4>(carry + i);
            pack<S, 4> out;

            if (accumulate)
                out = *(const pack<S, 4> *)(dw + i);
#pragma unroll
            for (int k = 0; k < 4; k++)
                out.of[k] = from_float<S>(accumulate ? to_float(out.of[k]) + sum.of[k] : sum.of[k]);
            *(pack<S, 4> *)(dw + i) = out;
            continue;
        }
        for (int64_t k = i; k < n && k < i + 4; k++)
            dw[k] = from_float<S>(accumulate ? to_float(dw[k]) + carry[k] : carry[k]);
    }
}

template <typename S> static int round_sums(ds_tensor *dw, const ds_tensor *carry, int accumulate)
{
    return launch(NAME, round_kernel<S>, grid_for(dw->numel, 1024, 16), 256, 0, dw->data,
                  carry->data, dw->numel, accumulate);
}

/* ---- all chunks */

typedef struct task {
    ds_tensor *dx, *dw, *carry, *scratch; /* carry: NULL where it is not wanted */
    const ds_tensor *x, *w;
    targets target;
    int64_t *count;
    float *losses;
    float seed;
    int accumulate;
} task;

static ds_matrix rows_from(const ds_tensor *x, int64_t first)
{
    return ds_matrix_of((char *)x->data + first * x->stride[0] * ds_bytes_of(x->dtype),
                        x->stride[0], x->stride[1], x->dtype);
}

/* dw, or where its sums are kept, = a b + beta itself */
static int add_to_dw(const task *t, ds_matrix a, ds_matrix b, int64_t rows, int more)
{
    gemm p = {};

    p.y = rows_from(t->carry ? t->carry : t->dw, 0);
    if (t->carry)
        p.y.row = t->w->shape[1], p.y.col = 1;
    p.a = a, p.b = b;
    p.m = t->w->shape[0], p.n = t->w->shape[1], p.k = rows;
    p.alpha = 1, p.beta = more;
    return gemm_run(NAME, &p);
}

template <typename S> static int visit_as(const task *t, int64_t first, int64_t rows)
{
    rows_task<S> r = {(S *)t->scratch->data, t->losses, t->count,      t->target, first,
                      t->scratch->shape[1],  t->seed,   t->dx || t->dw};

    return visit_rows<S>(&r, rows);
}

static int run_chunk(const task *t, int64_t first, int64_t rows)
{
    int64_t classes = t->w->shape[0], width = t->w->shape[1];
    ds_matrix logits = rows_from(t->scratch, 0), across = logits;
    gemm p = {};

    p.y = logits, p.a = rows_from(t->x, first), p.b = rows_from(t->w, 0);
    p.b.row = t->w->stride[1], p.b.col = t->w->stride[0];
    p.m = rows, p.n = classes, p.k = width, p.alpha = 1;
    DS_TRY(gemm_run(NAME, &p));
    DS_TRY(DS_BY_FLOAT(NAME, t->x->dtype, S, visit_as<S>(t, first, rows)));
    if (t->dx) {
        p.y = rows_from(t->dx, first), p.a = logits, p.b = rows_from(t->w, 0);
        p.n = width, p.k = classes;
        DS_TRY(gemm_run(NAME, &p));
    }
    if (!t->dw)
        return 0;
    across.row = 1, across.col = logits.row;
    return add_to_dw(t, across, rows_from(t->x, first), rows,
                     first > 0 || (t->accumulate && !t->carry));
}

static int run(const task *t, ds_tensor *loss)
{
    int64_t n = t->x->shape[0], each = t->scratch->shape[0];

    DS_TRY(launch(NAME, count_kernel, 1, 1024, 0, t->count, t->target, n, ds_cuda.fault));
    for (int64_t first = 0; first < n; first += each)
        DS_TRY(run_chunk(t, first, n - first < each ? n - first : each));
    if (n == 0 && t->dw)
        DS_TRY(add_to_dw(t, rows_from(t->w, 0), rows_from(t->w, 0), 0, t->accumulate));
    if (t->carry)
        DS_TRY(DS_BY_FLOAT(NAME, t->dw->dtype, S, round_sums<S>(t->dw, t->carry, t->accumulate)));
    return launch(NAME, mean_kernel, 1, 1024, 0, loss->data, t->losses, t->count, n);
}

/* ---- the kernel */

static int check(const ds_tensor *loss, const ds_tensor *scratch, const ds_tensor *x,
                 const ds_tensor *w, const ds_tensor *target)
{
    if (x->dtype == DS_F64 || !ds_is_float(x->dtype))
        return ds_cuda_refuse(NAME, x->dtype);
    if (x->ndim != 2 || w->ndim != 2 || x->shape[1] != w->shape[1] || target->ndim != 1 ||
        target->shape[0] != x->shape[0])
        return ds_fail(DS_EINVAL, NAME " wants x [N x K], w [V x K] and target [N]");
    if (w->dtype != x->dtype || scratch->dtype != x->dtype || loss->dtype != DS_F32 ||
        loss->numel != 1)
        return ds_fail(DS_EINVAL,
                       NAME " wants w and scratch in the dtype of x, %s, and one loss in f32",
                       ds_name_of(x->dtype));
    if (target->dtype != DS_I64 && target->dtype != DS_I32 && target->dtype != DS_U8)
        return ds_fail(DS_EINVAL, NAME " wants targets of i64, i32 or u8, not %s",
                       ds_name_of(target->dtype));
    if (scratch->ndim != 2 || !scratch->dense || scratch->shape[1] % 16 != 0 ||
        scratch->shape[1] < w->shape[0] || w->shape[0] < 1 || !aligned_16(scratch->data) ||
        (scratch->shape[0] < 1 && x->shape[0] > 0) || scratch->shape[0] > 0x7fffffff)
        return ds_fail(DS_EINVAL, NAME " wants scratch [rows x %lld], dense, from 16 bytes on",
                       (long long)((w->shape[0] + 15) / 16 * 16));
    return 0;
}

static int check_gradients(const task *t)
{
    const ds_tensor *x = t->x, *w = t->w, *dx = t->dx, *dw = t->dw, *carry = t->carry;

    if ((dx && (dx->ndim != 2 || dx->shape[0] != x->shape[0] || dx->shape[1] != x->shape[1] ||
                dx->dtype != x->dtype)) ||
        (dw && (dw->ndim != 2 || dw->shape[0] != w->shape[0] || dw->shape[1] != w->shape[1] ||
                (dw->dtype != w->dtype && dw->dtype != DS_F32))))
        return ds_fail(DS_EINVAL, NAME " wants dx like x and dw like w, in f32 or the dtype of w");
    if (dw && dw->dtype != DS_F32 && x->shape[0] > t->scratch->shape[0] &&
        (!carry || carry->dtype != DS_F32 || carry->numel != dw->numel || !carry->dense ||
         !dw->dense))
        return ds_fail(DS_EINVAL,
                       NAME " wants dw of %s over several chunks dense, and a carry of as many f32",
                       ds_name_of(dw->dtype));
    return 0;
}

extern "C" int ds_cuda_linear_cross_entropy(ds_tensor *loss, ds_tensor *dx, ds_tensor *dw,
                                            ds_tensor *scratch, ds_tensor *carry,
                                            const ds_tensor *x, const ds_tensor *w,
                                            const ds_tensor *target, int64_t ignore, double seed,
                                            int accumulate)
{
    task t = {dx, dw, carry, scratch, x, w, {}, NULL, NULL, (float)seed, accumulate};
    char *kept;

    DS_TRY(check(loss, scratch, x, w, target));
    DS_TRY(check_gradients(&t));
    if (!dw || dw->dtype == DS_F32 || x->shape[0] <= scratch->shape[0])
        t.carry = NULL;
    t.target.data = target->data, t.target.stride = target->stride[0];
    t.target.dtype = target->dtype;
    t.target.ignore = ignore, t.target.classes = w->shape[0];
    kept =
        (char *)ds_cuda_scratch(DS_CUDA_PARTIAL, LOSSES_AT + (size_t)x->shape[0] * sizeof(float));
    if (!kept)
        return DS_ENOMEM;
    t.count = (int64_t *)kept;
    t.losses = (float *)(kept + LOSSES_AT);
    return run(&t, loss);
}
