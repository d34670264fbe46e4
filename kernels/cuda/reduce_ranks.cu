/* reduce_ranks.cu - what several ranks have of the same elements becomes one: sum, mean, max, min.
 *
 * As on the CPU, to the bit: contributions are joined element by element in the order given; low
 * precision is joined in f32 and rounded once, after the scale. A thread has 16 bytes of every
 * part, of which four are read at a time.
 */
#include "kernels/cuda/common.cuh"

#define THREADS 256
#define PARTS 256 /* that fit a kernel's parameters */
#define AHEAD 4   /* parts that are read together */

struct job {
    void *y;
    int to; /* dtype of y */
    int n, op;
    int divide; /* by n */
    float scale;
    int64_t numel;
    const void *parts[PARTS];
};

/* NaN wins, as in max and min over a dimension; integers wrap around. */
static __device__ inline float plus(float a, float b)
{
    return a + b;
}
static __device__ inline int64_t plus(int64_t a, int64_t b)
{
    return (int64_t)((uint64_t)a + (uint64_t)b);
}
template <typename A> static __device__ inline A joined(A a, A x, int op)
{
    if (op == DS_MAX)
        return ((a > x) | (a != a)) ? a : x;
    if (op == DS_MIN)
        return ((a < x) | (a != a)) ? a : x;
    return plus(a, x);
}

template <typename S, int N>
static __device__ inline void put(const job &j, int64_t i, const float (&a)[N])
{
    pack<S, N> out;

#pragma unroll
    for (int k = 0; k < N; k++) {
        float v = j.divide ? a[k] / (float)j.n : a[k];

        out.of[k] = from_float<S>(j.scale == 1 ? v : v * j.scale);
    }
    *(pack<S, N> *)((S *)j.y + i) = out;
}
template <typename S, int N>
static __device__ inline void put(const job &j, int64_t i, const int64_t (&a)[N])
{
    pack<S, N> out;

#pragma unroll
    for (int k = 0; k < N; k++)
        out.of[k] = (S)a[k];
    *(pack<S, N> *)((S *)j.y + i) = out;
}

template <typename S, int N>
static __device__ inline void finish(const job &j, int64_t i, const float (&a)[N])
{
    if (j.to == DS_F32)
        put<float, N>(j, i, a);
    else if (j.to == DS_BF16)
        put<bf16, N>(j, i, a);
    else
        put<f16, N>(j, i, a);
}
template <typename S, int N>
static __device__ inline void finish(const job &j, int64_t i, const int64_t (&a)[N])
{
    put<S, N>(j, i, a);
}

/* N elements a thread; numel is a multiple of N. */
template <typename S, int N>
static __global__ void __launch_bounds__(THREADS) join_kernel(const __grid_constant__ job j)
{
    for (int64_t i = global_thread() * N; i < j.numel; i += global_threads() * N) {
        decltype(widened(S())) a[N] = {};

        for (int r = 0; r < j.n; r += AHEAD) {
            pack<S, N> x[AHEAD];

#pragma unroll
            for (int u = 0; u < AHEAD; u++)
                if (r + u < j.n)
                    x[u] = *(const pack<S, N> *)((const S *)j.parts[r + u] + i);
#pragma unroll
            for (int u = 0; u < AHEAD; u++)
                if (r + u < j.n)
#pragma unroll
                    for (int k = 0; k < N; k++)
                        a[k] = r + u == 0 ? widened(x[u].of[k])
                                          : joined(a[k], widened(x[u].of[k]), j.op);
        }
        finish<S, N>(j, i, a);
    }
}

/* By 16 bytes of a part, where all of them and y lie so; the rest one by one. */
template <typename S> static int join(job *j)
{
    constexpr int N = per_16<S>;
    int64_t bytes = ds_bytes_of(j->to), whole = j->numel / N * N, rest = j->numel - whole;
    int fits = ((uintptr_t)j->y & (uintptr_t)(N * bytes - 1)) == 0;

    for (int r = 0; r < j->n; r++)
        fits &= aligned_16(j->parts[r]);
    if (!fits)
        whole = 0, rest = j->numel;
    j->numel = whole;
    if (whole)
        DS_TRY(launch("reduce_ranks", join_kernel<S, N>, grid_for(whole / N, THREADS, 16), THREADS,
                      0, *j));
    j->numel = rest;
    j->y = (char *)j->y + whole * bytes;
    for (int r = 0; r < j->n; r++)
        j->parts[r] = (const S *)j->parts[r] + whole;
    if (rest)
        return launch("reduce_ranks", join_kernel<S, 1>, grid_for(rest, THREADS, 16), THREADS, 0,
                      *j);
    return 0;
}

extern "C" int ds_cuda_reduce_ranks(ds_tensor *y, const void *const *parts, int dtype, int n,
                                    int op, double scale)
{
    job j = job();

    DS_TRY(ds_check_reduce_ranks(y, dtype, n, op, scale));
    if (n > PARTS)
        return ds_fail(DS_EINVAL, "reduce_ranks: %d parts; on cuda there may be %d", n, PARTS);
    if (y->numel == 0)
        return 0;
    /* A power of two: the same bits as dividing. */
    j.divide = op == DS_MEAN && (n & (n - 1)) != 0;
    j.scale = (float)(op == DS_MEAN && !j.divide ? scale / n : scale);
    j.y = y->data;
    j.to = y->dtype;
    j.n = n;
    j.op = op;
    j.numel = y->numel;
    memcpy(j.parts, parts, (size_t)n * sizeof *parts);
    switch (dtype) {
    case DS_I64:
        return join<int64_t>(&j);
    case DS_I32:
        return join<int32_t>(&j);
    case DS_U8:
    case DS_BOOL:
        return join<uint8_t>(&j);
    default:
        return DS_BY_FLOAT("reduce_ranks", dtype, S, join<S>(&j));
    }
}
