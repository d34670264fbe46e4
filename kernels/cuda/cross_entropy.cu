/* cross_entropy.cu - the loss of rows of logits, and its gradient.
 *
 * loss = lse - (1 - smoothing) x[target] - smoothing mean(x), with lse = log Σ exp x (Szegedy et
 * al. 2016, section 7); dx = (exp(x - lse) - (1 - smoothing) [i = target] - smoothing / V) dloss.
 *
 * A row has a warp where it is short, a block otherwise, and is read once in both directions: from
 * its first element on 16 bytes by packs, whatever its own alignment (50,257 classes in bf16 lie
 * on 2 bytes only). Forward, the losses of rows go to scratch, and one block adds them in a fixed
 * order; rows that count nothing are not read. A bad target becomes a fault, and the row counts
 * nothing.
 */
#include "kernels/cuda/softmax.cuh"

#define SHORT 1024 /* elements of a row that a warp reads */

/* A row's loss, and whether it counts. */
struct part {
    float loss;
    int counts;
};

struct job {
    const void *logits, *target, *dloss;
    void *loss, *lse, *dlogits;
    int64_t rows, classes;
    int64_t row, step;     /* of logits: from row to row, from class to class */
    int64_t d_row, d_step; /* of dlogits */
    int64_t target_step, lse_step, loss_step;
    int target_dtype, loss_dtype; /* loss: also dloss */
    int64_t ignore;
    float smoothing;
    int reduction;
    int team;    /* threads of a row: 32, or a block */
    part *parts; /* [rows] */
    int64_t *counted;
    ds_cuda_fault *fault;
    const char *name;
};

static __device__ inline float get(const void *x, int64_t i, int dtype)
{
    if (dtype == DS_F32)
        return ((const float *)x)[i];
    return dtype == DS_BF16 ? to_float(((const bf16 *)x)[i]) : to_float(((const f16 *)x)[i]);
}
static __device__ inline void put(void *y, int64_t i, int dtype, float value)
{
    if (dtype == DS_F32)
        ((float *)y)[i] = value;
    else if (dtype == DS_BF16)
        ((bf16 *)y)[i] = from_float<bf16>(value);
    else
        ((f16 *)y)[i] = from_float<f16>(value);
}

static __device__ inline int64_t target_of(const job &j, int64_t row)
{
    int64_t i = row * j.target_step;

    if (j.target_dtype == DS_I64)
        return ((const int64_t *)j.target)[i];
    return j.target_dtype == DS_I32 ? ((const int32_t *)j.target)[i]
                                    : ((const uint8_t *)j.target)[i];
}
static __device__ inline bool counts(const job &j, int64_t target)
{
    return target != j.ignore && target >= 0 && target < j.classes;
}

/* ---- forward */

struct row_sum {
    exp_sum exps;
    float all; /* Σ x, with smoothing only */
};

template <typename S, int N>
static __device__ inline row_sum add_pack(row_sum s, const pack<S, N> &p, bool smooth)
{
    float x[N];

#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] = to_float(p.of[i]);
    s.exps = exp_add(s.exps, x);
    if (smooth) {
        float all = 0;

#pragma unroll
        for (int i = 0; i < N; i++)
            all += x[i];
        s.all += all;
    }
    return s;
}

static __device__ inline row_sum joined(row_sum a, row_sum b)
{
    return {exp_join(a.exps, b.exps), a.all + b.all};
}

/* This thread's share of a row. */
template <typename S>
static __device__ inline row_sum add_row(const job &j, const S *x, int lane, int team)
{
    constexpr int N = per_16<S>;
    row_sum s = {{-INFINITY, 0}, 0};
    int64_t n = j.classes, head = j.step == 1 ? head_of(x, n) : n;
    int64_t packs = (n - head) / N, i = lane;
    const pack<S, N> *p = (const pack<S, N> *)(x + head);
    bool smooth = j.smoothing != 0;

    for (int64_t k = lane; k < head; k += team)
        s = add_pack(s, pack<S, 1>{{x[k * j.step]}}, smooth);
    for (; i + 3 * team < packs; i += 4 * team) {
        pack<S, N> v[4];

#pragma unroll
        for (int u = 0; u < 4; u++)
            v[u] = p[i + u * team];
#pragma unroll
        for (int u = 0; u < 4; u++)
            s = add_pack(s, v[u], smooth);
    }
    for (; i < packs; i += team)
        s = add_pack(s, p[i], smooth);
    for (int64_t k = head + packs * N + lane; k < n; k += team)
        s = add_pack(s, pack<S, 1>{{x[k]}}, smooth);
    return s;
}

/* Joined over a team; its first thread gets it. */
static __device__ inline row_sum join_team(row_sum s, int team)
{
    __shared__ row_sum shared[32];

    for (int k = 16; k; k /= 2) {
        row_sum t = {{__shfl_xor_sync(0xffffffff, s.exps.most, k),
                      __shfl_xor_sync(0xffffffff, s.exps.sum, k)},
                     __shfl_xor_sync(0xffffffff, s.all, k)};

        s = joined(s, t);
    }
    if (team == 32)
        return s;
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = s;
    __syncthreads();
    for (int k = 1; k < team / 32 && threadIdx.x == 0; k++)
        s = joined(s, shared[k]);
    return s;
}

template <typename S> static __global__ void __launch_bounds__(1024) forward_kernel(job j)
{
    int team = j.team, lane = threadIdx.x % team;
    int64_t row = global_thread() / team, target;
    const S *x = (const S *)j.logits + row * j.row;
    float lse = 0, loss = 0;

    if (row >= j.rows)
        return;
    target = target_of(j, row);
    if (counts(j, target)) {
        row_sum s = join_team(add_row(j, x, lane, team), team);

        lse = s.exps.most + logf(s.exps.sum);
        loss = lse - (1 - j.smoothing) * to_float(x[target * j.step]);
        if (j.smoothing != 0)
            loss -= j.smoothing * (s.all / (float)j.classes);
    }
    if (lane != 0)
        return;
    if (target != j.ignore && !counts(j, target))
        fault(j.fault, j.name, target, j.classes);
    ((float *)j.lse)[row * j.lse_step] = lse;
    if (j.reduction == DS_LOSS_PER_ROW)
        put(j.loss, row * j.loss_step, j.loss_dtype, loss);
    else
        j.parts[row] = {loss, counts(j, target)};
}

/* One block: the losses of all rows to one. */
static __global__ void __launch_bounds__(1024) finish_kernel(job j)
{
    __shared__ float shared[32];
    float sum = 0, rows = 0; /* a thread's rows, and their sum, are exact in f32 up to 2^24 */

#pragma unroll 4
    for (int64_t i = threadIdx.x; i < j.rows; i += blockDim.x) {
        part p = j.parts[i];

        sum += p.loss;
        rows += (float)p.counts;
    }
    sum = block_reduce<add_op>(sum, shared);
    rows = block_reduce<add_op>(rows, shared);
    if (threadIdx.x == 0)
        put(j.loss, 0, j.loss_dtype, j.reduction == DS_LOSS_MEAN ? sum / rows : sum);
}

/* ---- backward */

/* One block: how many rows count. */
static __global__ void __launch_bounds__(1024) count_kernel(job j)
{
    __shared__ float shared[32];
    float rows = 0;

#pragma unroll 4
    for (int64_t i = threadIdx.x; i < j.rows; i += blockDim.x)
        rows += counts(j, target_of(j, i));
    rows = block_reduce<add_op>(rows, shared);
    if (threadIdx.x == 0)
        *j.counted = (int64_t)rows;
}

/* What a row's gradient is made of: dloss (exp(x - lse) - every), and for the target `hit` less. */
struct row_slope {
    float lse, dloss, every, hit;
    int64_t target;
};

/* Elements k to k + N of a row. The target is in one pack of it. */
template <typename S, int N>
static __device__ inline pack<S, N> slope_pack(const row_slope &r, const pack<S, N> &x, int64_t k)
{
    bool here = r.target >= k && r.target < k + N;
    pack<S, N> out;

#pragma unroll
    for (int i = 0; i < N; i++) {
        float d = exp_fast(to_float(x.of[i]) - r.lse) * r.dloss - r.every;

        if (here && r.target == k + i)
            d -= r.hit;
        out.of[i] = from_float<S>(d);
    }
    return out;
}

template <typename S>
static __device__ inline void slope_row(const job &j, const row_slope &r, S *out, const S *x,
                                        int lane, int team)
{
    constexpr int N = per_16<S>;
    bool packed = j.step == 1 && j.d_step == 1 && (((uintptr_t)x ^ (uintptr_t)out) & 15) == 0;
    int64_t n = j.classes, head = packed ? head_of(x, n) : n, packs = (n - head) / N, i = lane;
    const pack<S, N> *p = (const pack<S, N> *)(x + head);
    pack<S, N> *q = (pack<S, N> *)(out + head);

    for (int64_t k = lane; k < head; k += team)
        out[k * j.d_step] = slope_pack(r, pack<S, 1>{{x[k * j.step]}}, k).of[0];
    for (; i + 3 * team < packs; i += 4 * team) {
        pack<S, N> v[4];

#pragma unroll
        for (int u = 0; u < 4; u++)
            v[u] = p[i + u * team];
#pragma unroll
        for (int u = 0; u < 4; u++)
            q[i + u * team] = slope_pack(r, v[u], head + (i + u * team) * N);
    }
    for (; i < packs; i += team)
        q[i] = slope_pack(r, p[i], head + i * N);
    for (int64_t k = head + packs * N + lane; k < n; k += team)
        out[k] = slope_pack(r, pack<S, 1>{{x[k]}}, k).of[0];
}

template <typename S>
static __device__ inline void clear_row(const job &j, S *out, int lane, int team)
{
    constexpr int N = per_16<S>;
    int64_t n = j.classes, head = j.d_step == 1 ? head_of(out, n) : n, packs = (n - head) / N;

    for (int64_t k = lane; k < head; k += team)
        out[k * j.d_step] = S();
    for (int64_t i = lane; i < packs; i += team)
        ((pack<S, N> *)(out + head))[i] = pack<S, N>();
    for (int64_t k = head + packs * N + lane; k < n; k += team)
        out[k] = S();
}

template <typename S> static __global__ void __launch_bounds__(1024) backward_kernel(job j)
{
    int team = j.team, lane = threadIdx.x % team;
    int64_t row = global_thread() / team;
    const S *x = (const S *)j.logits + row * j.row;
    S *out = (S *)j.dlogits + row * j.d_row;
    row_slope r;

    if (row >= j.rows)
        return;
    r.target = target_of(j, row);
    if (!counts(j, r.target)) {
        if (r.target != j.ignore && lane == 0)
            fault(j.fault, j.name, r.target, j.classes);
        clear_row(j, out, lane, team);
        return;
    }
    r.lse = ((const float *)j.lse)[row * j.lse_step];
    r.dloss = get(j.dloss, j.reduction == DS_LOSS_PER_ROW ? row * j.loss_step : 0, j.loss_dtype);
    if (j.reduction == DS_LOSS_MEAN)
        r.dloss /= (float)*j.counted;
    r.every = r.dloss * j.smoothing / (float)j.classes;
    r.hit = (1 - j.smoothing) * r.dloss;
    slope_row(j, r, out, x, lane, team);
}

/* ---- launching */

/* The targets are looked at on the device. loss: dloss on the way back. */
static int job_start(job *j, const char *name, const ds_tensor *logits, const ds_tensor *target,
                     const ds_tensor *lse, const ds_tensor *loss, int64_t ignore, double smoothing,
                     int reduction)
{
    *j = job();
    if (logits->dtype == DS_F64 || loss->dtype == DS_F64 || lse->dtype == DS_F64)
        return ds_cuda_refuse(name, DS_F64);
    j->logits = logits->data;
    j->target = target->data;
    j->lse = lse->data;
    j->rows = logits->shape[0];
    j->classes = logits->shape[1];
    j->row = logits->stride[0];
    j->step = j->classes == 1 ? 1 : logits->stride[1];
    j->target_step = target->stride[0];
    j->lse_step = lse->stride[0];
    j->loss_step = loss->ndim ? loss->stride[0] : 0;
    j->target_dtype = target->dtype;
    j->loss_dtype = loss->dtype;
    j->ignore = ignore;
    j->smoothing = (float)smoothing;
    j->reduction = reduction;
    j->fault = ds_cuda.fault;
    j->name = name;
    j->team = j->classes <= SHORT ? 32 : j->rows < ds_cuda.processors * 4 ? 1024 : 256;
    return 0;
}

/* Threads of a block, in which there are one or several rows. */
static int threads_of(const job *j)
{
    return j->team == 32 ? 256 : j->team;
}

template <typename S> static int forward(const job *j)
{
    return launch(j->name, forward_kernel<S>, blocks_for(j->rows * j->team, threads_of(j)),
                  threads_of(j), 0, *j);
}

extern "C" int ds_cuda_cross_entropy(ds_tensor *loss, ds_tensor *lse, const ds_tensor *logits,
                                     const ds_tensor *target, int64_t ignore, double smoothing,
                                     int reduction)
{
    job j;

    DS_TRY(ds_check_cross_entropy("cross_entropy", logits, target, lse, loss, reduction));
    DS_TRY(job_start(&j, "cross_entropy", logits, target, lse, loss, ignore, smoothing, reduction));
    j.loss = loss->data;
    if (reduction != DS_LOSS_PER_ROW) {
        j.parts = (part *)ds_cuda_scratch(DS_CUDA_PARTIAL, (size_t)j.rows * sizeof(part));
        if (!j.parts)
            return DS_ENOMEM;
    }
    if (j.rows > 0)
        DS_TRY(DS_BY_FLOAT(j.name, logits->dtype, S, forward<S>(&j)));
    if (reduction == DS_LOSS_PER_ROW)
        return 0;
    return launch(j.name, finish_kernel, dim3(1), j.rows > 256 ? 1024 : 64, 0, j);
}

template <typename S> static int backward(const job *j)
{
    return launch(j->name, backward_kernel<S>, blocks_for(j->rows * j->team, threads_of(j)),
                  threads_of(j), 0, *j);
}

extern "C" int ds_cuda_cross_entropy_backward(ds_tensor *dlogits, const ds_tensor *dloss,
                                              const ds_tensor *logits, const ds_tensor *target,
                                              const ds_tensor *lse, int64_t ignore,
                                              double smoothing, int reduction)
{
    job j;

    DS_TRY(ds_check_cross_entropy_backward(dlogits, dloss, logits, target, lse, reduction));
    DS_TRY(job_start(&j, "cross_entropy_backward", logits, target, lse, dloss, ignore, smoothing,
                     reduction));
    if (dlogits->numel == 0)
        return 0;
    j.dloss = dloss->data;
    j.dlogits = dlogits->data;
    j.d_row = dlogits->stride[0];
    j.d_step = j.classes == 1 ? 1 : dlogits->stride[1];
    if (reduction == DS_LOSS_MEAN) {
        j.counted = (int64_t *)ds_cuda_scratch(DS_CUDA_PARTIAL, sizeof *j.counted);
        if (!j.counted)
            return DS_ENOMEM;
        DS_TRY(launch(j.name, count_kernel, dim3(1), j.rows > 256 ? 1024 : 64, 0, j));
    }
    return DS_BY_FLOAT(j.name, logits->dtype, S, backward<S>(&j));
}
