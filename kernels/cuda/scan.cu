/* scan.cu - cumsum along a dimension, forwards or backwards.
 *
 * Real numbers are added in f64 and integers in i64, as on the CPU. Where lines are dense or few
 * (along_kernel), a block takes 2048 elements of one at a time through shared memory: every thread
 * adds eight, the block scans the threads' sums, and a carry goes on. Where lines lie side by side
 * (across_kernel), a thread has one. Few long lines are cut into pieces, whose sums totals_kernel
 * finds first; a piece begins with the sum of those before it.
 */
#include "kernels/cuda/lines.cuh"

#define THREADS 256
#define EACH 8
#define CHUNK (THREADS * EACH)
#define AHEAD 4 /* elements that a thread loads together */
#define PIECES_ACROSS 64

/* Operands: 0 y, 1 x. */
struct job {
    const void *x;
    void *y;
    int from, to; /* dtypes */
    dims lines;
    int64_t count, n; /* of lines; elements of each */
    int64_t x_step, y_step;
    int64_t pieces, each;
    int reverse, across;
    void *totals; /* [pieces, count] */
};

static __device__ inline double load(const job &j, int64_t i, double)
{
    if (j.from == DS_F32)
        return ((const float *)j.x)[i];
    return j.from == DS_BF16 ? to_float(((const bf16 *)j.x)[i]) : to_float(((const f16 *)j.x)[i]);
}
static __device__ inline uint64_t load(const job &j, int64_t i, uint64_t)
{
    if (j.from == DS_I64)
        return ((const uint64_t *)j.x)[i];
    return j.from == DS_I32 ? (uint64_t)((const int32_t *)j.x)[i] : ((const uint8_t *)j.x)[i];
}
static __device__ inline void store(const job &j, int64_t i, double value)
{
    if (j.to == DS_F32)
        ((float *)j.y)[i] = (float)value;
    else if (j.to == DS_BF16)
        ((bf16 *)j.y)[i] = from_float<bf16>((float)value);
    else
        ((f16 *)j.y)[i] = from_float<f16>((float)value);
}
static __device__ inline void store(const job &j, int64_t i, uint64_t value)
{
    if (j.to == DS_I64)
        ((uint64_t *)j.y)[i] = value;
    else if (j.to == DS_I32)
        ((uint32_t *)j.y)[i] = (uint32_t)value;
    else
        ((uint8_t *)j.y)[i] = (uint8_t)value;
}

/* Which element of a line is the i-th to be added. */
static __device__ inline int64_t nth(const job &j, int64_t i)
{
    return j.reverse ? j.n - 1 - i : i;
}

/* This block's or thread's line and piece, and where they begin. */
struct place {
    int64_t line, piece, begin, end, x, y;
};
static __device__ inline place place_of(const job &j, int64_t line, int64_t piece)
{
    int64_t at[2], begin = piece * j.each, end = begin + j.each;

    offsets(at, j.lines, j.lines.n, line);
    return {line, piece, begin, end < j.n ? end : j.n, at[1], at[0]};
}

/* ---- a block a line */

/* Where element i of a chunk lies: rows of EACH are one apart, so that threads use different
 * banks. */
static __device__ inline int padded(int i)
{
    return i + i / EACH;
}

template <typename A> static __global__ void __launch_bounds__(THREADS) along_kernel(job j)
{
    __shared__ A shared[CHUNK + THREADS];
    int64_t piece, line = divide(blockIdx.x, j.pieces, &piece);
    place p = place_of(j, line, piece);
    A carry = 0;

    for (int64_t k = threadIdx.x; k < piece; k += THREADS)
        carry += ((const A *)j.totals)[k * j.count + line];
    if (piece > 0)
        carry = block_sum(carry, shared);
    for (int64_t begin = p.begin; begin < p.end; begin += CHUNK) {
        A sum = 0, all, before;

        for (int i = threadIdx.x; i < CHUNK; i += THREADS)
            shared[padded(i)] =
                begin + i < p.end ? load(j, p.x + nth(j, begin + i) * j.x_step, A()) : 0;
        __syncthreads();
        for (int i = 0; i < EACH; i++)
            sum += shared[padded(threadIdx.x * EACH + i)];
        before = carry + block_before(sum, &all);
        for (int i = 0; i < EACH; i++)
            shared[padded(threadIdx.x * EACH + i)] = before +=
                shared[padded(threadIdx.x * EACH + i)];
        __syncthreads();
        for (int i = threadIdx.x; i < CHUNK && begin + i < p.end; i += THREADS)
            store(j, p.y + nth(j, begin + i) * j.y_step, shared[padded(i)]);
        carry += all;
        __syncthreads();
    }
}

template <typename A> static __global__ void __launch_bounds__(THREADS) along_totals(job j)
{
    __shared__ A shared[THREADS];
    int64_t piece, line = divide(blockIdx.x, j.pieces, &piece);
    place p = place_of(j, line, piece);
    A sum = 0;

#pragma unroll 4
    for (int64_t i = p.begin + threadIdx.x; i < p.end; i += THREADS)
        sum += load(j, p.x + nth(j, i) * j.x_step, A());
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0)
        ((A *)j.totals)[piece * j.count + line] = sum;
}

/* ---- a thread a line; blockIdx.y is the piece */

template <typename A> static __global__ void __launch_bounds__(THREADS) across_kernel(job j)
{
    if (global_thread() >= j.count)
        return;

    place p = place_of(j, global_thread(), blockIdx.y);
    A sum = 0;

    for (int64_t k = 0; k < p.piece; k++)
        sum += ((const A *)j.totals)[k * j.count + p.line];
    for (int64_t i = p.begin; i < p.end; i += AHEAD) {
        A v[AHEAD]; /* y may be x: all loads stand before the stores, to be under way together */

#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            v[u] = i + u < p.end ? load(j, p.x + nth(j, i + u) * j.x_step, A()) : 0;
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            if (i + u < p.end)
                store(j, p.y + nth(j, i + u) * j.y_step, sum += v[u]);
    }
}

template <typename A> static __global__ void __launch_bounds__(THREADS) across_totals(job j)
{
    if (global_thread() >= j.count)
        return;

    place p = place_of(j, global_thread(), blockIdx.y);
    A sum = 0;

#pragma unroll 8
    for (int64_t i = p.begin; i < p.end; i++)
        sum += load(j, p.x + nth(j, i) * j.x_step, A());
    ((A *)j.totals)[p.piece * j.count + p.line] = sum;
}

/* ---- launching */

static void plan(job *j)
{
    int last = j->lines.n - 1;
    int64_t wanted = (int64_t)ds_cuda.processors * 8, most;

    j->across = last >= 0 && j->lines.stride[0][last] < j->y_step && j->lines.size[last] >= 32;
    if (j->across) {
        wanted /= (j->count + THREADS - 1) / THREADS;
        most = j->n / 64 < PIECES_ACROSS ? j->n / 64 : PIECES_ACROSS;
    } else {
        wanted /= j->count;
        most = j->n / (2 * CHUNK);
    }
    wanted = wanted < most ? wanted : most;
    j->each = wanted > 1 ? (j->n + wanted - 1) / wanted : j->n;
    if (!j->across)
        j->each = (j->each + CHUNK - 1) / CHUNK * CHUNK;
    j->pieces = (j->n + j->each - 1) / j->each;
}

template <typename A> static int run(job *j)
{
    dim3 grid;

    plan(j);
    grid = j->across ? blocks_for(j->count, THREADS) : blocks_for(j->count * j->pieces, 1);
    if (j->across)
        grid.y = (unsigned)j->pieces;
    if (j->pieces > 1) {
        j->totals = ds_cuda_scratch(DS_CUDA_PARTIAL, (size_t)(j->pieces * j->count) * sizeof(A));
        if (!j->totals)
            return DS_ENOMEM;
        DS_TRY(
            launch("cumsum", j->across ? across_totals<A> : along_totals<A>, grid, THREADS, 0, *j));
    }
    return launch("cumsum", j->across ? across_kernel<A> : along_kernel<A>, grid, THREADS, 0, *j);
}

extern "C" int ds_cuda_cumsum(ds_tensor *y, const ds_tensor *x, int dim, int reverse)
{
    const ds_tensor *t[] = {y, x};
    job j = job();

    if (x->dtype == DS_F64)
        return ds_cuda_refuse("cumsum", x->dtype);
    DS_TRY(ds_check_cumsum(y, x, dim));
    DS_TRY(lines_start(&j.lines, &j.count, "cumsum", dim, 2, t));
    if (x->numel == 0)
        return 0;
    j.x = x->data;
    j.y = y->data;
    j.from = x->dtype;
    j.to = y->dtype;
    j.n = x->shape[dim];
    j.x_step = x->stride[dim];
    j.y_step = y->stride[dim];
    j.reverse = reverse;
    return ds_is_float(x->dtype) ? run<double>(&j) : run<uint64_t>(&j);
}
