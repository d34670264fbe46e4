/* norm.cu - layer norm and RMS norm over the last dimension, with the residual's sum in the same pass.
 *
 * Bound by memory: every element is read once and written once. A row lies in the registers of a group
 * of threads: part of a warp, a warp, or a block, each thread with up to 4 packs of 16 bytes, so that
 * many loads are under way at once. The variance is taken around the mean, from registers.
 *
 * Backward goes through rows with as many blocks as the device holds. A thread keeps its columns' dw
 * and db in registers; blocks write what they have as rows of scratch memory, and a second kernel adds
 * those up, in order: dx costs one reading of dy and x.
 *
 * What does not fit (rows too long for that, columns that are no whole packs, memory not aligned, x and
 * y of different dtypes) goes through plain loops, one block a row; what is read again lies in the cache.
 */
#include "kernels/cuda/rows.cuh"

#include <limits.h>

#define FORWARD 4 /* packs of 16 bytes that a thread has of a row */
#define MOST 512  /* threads for a row: each may have 128 registers */
template <typename S>
constexpr int backward_packs = sizeof(S) == 2 ? 3 : 4; /* that registers hold */

/* One call. mean.data NULL: RMS norm. */
struct norm_job {
    rows x, y, sum, delta; /* backward: y is dy, sum is dx, delta is dsum */
    float *mean, *rstd;
    const void *w, *b; /* may be NULL */
    int w_dtype, b_dtype;
    int64_t count, columns; /* of rows, of elements of one */
    float eps;
    float *partial; /* [blocks, 2, columns]: dw and db; NULL: neither is wanted */
};

/* Sums of V numbers over the threads of one row: blockDim.x of them, a power of 2 below 32, a warp, or
 * several warps, which are the block then. shared: V × 32 floats, not to be used again before the next
 * barrier. */
template <int V> static __device__ inline void group_sum(float (&v)[V], float *shared)
{
    int width = blockDim.x < 32 ? blockDim.x : 32, lane = threadIdx.x % 32;
    int warps = blockDim.x / 32;

    for (int i = 0; i < V; i++)
        for (int k = width / 2; k; k >>= 1)
            v[i] += __shfl_xor_sync(0xffffffff, v[i], k);
    if (warps <= 1)
        return;
    for (int i = 0; i < V; i++)
        if (lane == 0)
            shared[i * 32 + threadIdx.x / 32] = v[i];
    __syncthreads();
    for (int i = 0; i < V; i++)
        v[i] = warp_reduce<add_op>(lane < warps ? shared[i * 32 + lane] : 0);
}

/* Pack i of a row, and a thread's k-th: for all that a thread has. Loops are unrolled, so that what they
 * index are registers. */
#define EACH_PACK(k, i, packs)                                                                     \
    _Pragma("unroll") for (int k = 0, i = threadIdx.x; k < K; k++, i += blockDim.x) if (i < (packs))

template <int K>
static __device__ inline void load_row(words (&x)[K], const rows &t, int64_t r, int packs)
{
    const words *row = (const words *)plain_row_at(t, r);

    EACH_PACK(k, i, packs)
    x[k] = row[i];
}

/* Asks for a row that will be read soon, a line of 128 bytes each 8 packs. */
static __device__ inline void prefetch_row(const rows &t, int64_t r, int packs)
{
    const words *row = (const words *)plain_row_at(t, r);

    for (int i = threadIdx.x * 8; i < packs; i += blockDim.x * 8) {
#ifdef __CUDA_ARCH__
        asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i));
#else
        __ldg(&row[i].of[0]);
#endif
    }
}

/* ---- forward */

/* x += delta, rounded as the sum is in memory. */
template <typename S, int K>
static __device__ inline void add_delta(words (&x)[K], const norm_job &n, int64_t r, int packs)
{
    constexpr int N = per_16<S>;
    words delta[K];

    load_row(delta, n.delta, r, packs);
    EACH_PACK(k, i, packs)
    {
        float v[N];

        for (int j = 0; j < N; j++)
            v[j] = number_of<S>(x[k], j) + number_of<S>(delta[k], j);
        x[k] = words_of<S>(v);
        ((words *)plain_row_at(n.sum, r))[i] = x[k];
    }
}

template <typename S, int K>
static __device__ inline void write_row(const words (&x)[K], const norm_job &n, int64_t r,
                                        int packs, float mean, float rstd)
{
    constexpr int N = per_16<S>;

    EACH_PACK(k, i, packs)
    {
        float v[N], w[N], b[N];

        if (n.w)
            load_many<N>(w, n.w, n.w_dtype, (int64_t)i * N);
        if (n.b)
            load_many<N>(b, n.b, n.b_dtype, (int64_t)i * N);
        for (int j = 0; j < N; j++) {
            float xh = (number_of<S>(x[k], j) - mean) * rstd;

            v[j] = DS_FMA(xh, n.w ? w[j] : 1, n.b ? b[j] : 0);
        }
        ((words *)plain_row_at(n.y, r))[i] = words_of<S>(v);
    }
}

template <typename S> static __global__ void __launch_bounds__(MOST) norm_rows(norm_job n)
{
    constexpr int N = per_16<S>, K = FORWARD;
    __shared__ float shared[2][32];
    int64_t r = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    int packs = r < n.count ? (int)(n.columns / N) : 0; /* 0: a thread without a row */
    float total[1] = {0}, square[1] = {0}, mean = 0, rstd, of_c = 1 / (float)n.columns;
    words x[K];

    r = packs ? r : 0;
    load_row(x, n.x, r, packs);
    if (n.delta.data)
        add_delta<S>(x, n, r, packs);
    if (n.mean) {
        EACH_PACK(k, i, packs)
        for (int j = 0; j < N; j++)
            total[0] += number_of<S>(x[k], j);
        group_sum(total, shared[0]);
        mean = total[0] * of_c;
    }
    EACH_PACK(k, i, packs)
    for (int j = 0; j < N; j++) {
        float v = number_of<S>(x[k], j) - mean;

        square[0] = DS_FMA(v, v, square[0]);
    }
    group_sum(square, shared[1]);
    rstd = rsqrtf(square[0] * of_c + n.eps);
    write_row<S>(x, n, r, packs, mean, rstd);
    if (threadIdx.x == 0 && packs) {
        n.rstd[r] = rstd;
        if (n.mean)
            n.mean[r] = mean;
    }
}

/* Any row: a block each, three passes. */
static __global__ void __launch_bounds__(256) norm_any(norm_job n)
{
    __shared__ float shared[32];
    int64_t r = blockIdx.x;
    char *x = row_at(n.x, r), *y = row_at(n.y, r);
    float total = 0, square = 0, mean, rstd, of_c = 1 / (float)n.columns;
    int dtype = n.x.dtype;

    if (n.delta.data) {
        char *sum = row_at(n.sum, r), *delta = row_at(n.delta, r);

        for (int64_t i = threadIdx.x; i < n.columns; i += blockDim.x)
            store_as(sum, dtype, i, load_as(x, dtype, i) + load_as(delta, n.delta.dtype, i));
        x = sum;
    }
    for (int64_t i = threadIdx.x; i < n.columns && n.mean; i += blockDim.x)
        total += load_as(x, dtype, i);
    mean = block_reduce<add_op>(total, shared) * of_c;
    for (int64_t i = threadIdx.x; i < n.columns; i += blockDim.x) {
        float v = load_as(x, dtype, i) - mean;

        square = DS_FMA(v, v, square);
    }
    rstd = rsqrtf(block_reduce<add_op>(square, shared) * of_c + n.eps);
    for (int64_t i = threadIdx.x; i < n.columns; i += blockDim.x) {
        float v = (load_as(x, dtype, i) - mean) * rstd, w = n.w ? load_as(n.w, n.w_dtype, i) : 1;

        store_as(y, n.y.dtype, i, DS_FMA(v, w, n.b ? load_as(n.b, n.b_dtype, i) : 0));
    }
    if (threadIdx.x == 0) {
        n.rstd[r] = rstd;
        if (n.mean)
            n.mean[r] = mean;
    }
}

/* ---- backward: with xh = (x - mean) rstd and g = dy w,
 * dx = rstd (g - mean(g) - xh mean(g xh)) + dsum, dw = Σ dy xh, db = Σ dy */

/* Adds up what a block's groups have, group by group, and writes it to the block's row. Blocks of one
 * group write it as it is. all: 2 × columns floats. */
template <int K, int N>
static __device__ inline void write_partial(const norm_job &n, float (&dw)[K][N], float (&db)[K][N],
                                            float *all)
{
    int groups = blockDim.y, columns = (int)n.columns;
    float *to = n.partial + (int64_t)blockIdx.x * 2 * columns, *at = groups > 1 ? all : to;

    for (int y = 0; y < groups; y++) {
        EACH_PACK(k, i, (int)threadIdx.y == y ? columns / N : 0)
        for (int j = 0; j < N; j++) {
            float *w = at + i * N + j, *b = w + columns;

            *w = (y ? *w : 0) + dw[k][j];
            *b = (y ? *b : 0) + db[k][j];
        }
        if (groups > 1)
            __syncthreads();
    }
    for (int i = threadIdx.x + threadIdx.y * blockDim.x; groups > 1 && i < 2 * columns;
         i += blockDim.x * groups)
        to[i] = all[i];
}

/* A row's sums of g and g xh; adds to dw and db. */
template <typename S, int K, int N>
static __device__ inline void add_columns(float (&sums)[2], float (&dw)[K][N], float (&db)[K][N],
                                          const words (&x)[K], const words (&dy)[K],
                                          const norm_job &n, int packs, float mean, float rstd)
{
    EACH_PACK(k, i, packs)
    {
        float w[N];

        if (n.w)
            load_many<N>(w, n.w, n.w_dtype, (int64_t)i * N);
        for (int j = 0; j < N; j++) {
            float d = number_of<S>(dy[k], j), xh = (number_of<S>(x[k], j) - mean) * rstd;
            float g = n.w ? d * w[j] : d;

            sums[0] += g;
            sums[1] = DS_FMA(g, xh, sums[1]);
            dw[k][j] = DS_FMA(d, xh, dw[k][j]);
            db[k][j] += d;
        }
    }
}

/* dx, from the means of g and g xh. */
template <typename S, int K>
static __device__ inline void write_dx(const float (&means)[2], words (&x)[K], words (&dy)[K],
                                       const words (&dsum)[K], const norm_job &n, int64_t r,
                                       int packs, float mean, float rstd)
{
    constexpr int N = per_16<S>;

    EACH_PACK(k, i, packs)
    {
        float v[N], w[N];

        take_again(x[k]);
        take_again(dy[k]);
        if (n.w)
            load_many<N>(w, n.w, n.w_dtype, (int64_t)i * N);
        for (int j = 0; j < N; j++) {
            float d = number_of<S>(dy[k], j), xh = (number_of<S>(x[k], j) - mean) * rstd;

            v[j] = rstd * ((n.w ? d * w[j] : d) - DS_FMA(xh, means[1], means[0]));
            v[j] += n.delta.data ? number_of<S>(dsum[k], j) : 0;
        }
        ((words *)plain_row_at(n.sum, r))[i] = words_of<S>(v);
    }
}

template <typename S> static __global__ void __launch_bounds__(MOST) norm_backward_rows(norm_job n)
{
    constexpr int N = per_16<S>, K = backward_packs<S>;
    __shared__ float shared[2][2 * 32]; /* by turns, so that a row needs one barrier */
    DS_SHARED(float, all);
    float dw[K][N] = {}, db[K][N] = {}, of_c = 1 / (float)n.columns;
    int turn = 0;

    for (int64_t r0 = (int64_t)blockIdx.x * blockDim.y; r0 < n.count;
         r0 += (int64_t)gridDim.x * blockDim.y, turn ^= 1) {
        int64_t next = r0 + gridDim.x; /* of blocks with one row at a time */
        bool live = r0 + threadIdx.y < n.count;
        int64_t r = live ? r0 + threadIdx.y : r0;
        int packs = live ? (int)(n.columns / N) : 0;
        float sums[2] = {0, 0}, mean = n.mean ? n.mean[r] : 0, rstd = n.rstd[r];
        words x[K], dy[K], dsum[K];

        load_row(x, n.x, r, packs);
        load_row(dy, n.y, r, packs);
        if (n.delta.data)
            load_row(dsum, n.delta, r, packs);
        if (blockDim.x > 32 &&
            next < n.count) { /* too few such blocks to hide each other's waiting */
            prefetch_row(n.x, next, packs);
            prefetch_row(n.y, next, packs);
            if (n.delta.data)
                prefetch_row(n.delta, next, packs);
        }
        add_columns<S>(sums, dw, db, x, dy, n, packs, mean, rstd);
        group_sum(sums, shared[turn]);
        sums[0] = n.mean ? sums[0] * of_c : 0;
        sums[1] *= of_c;
        write_dx<S>(sums, x, dy, dsum, n, r, packs, mean, rstd);
    }
    if (n.partial)
        write_partial(n, dw, db, all);
}

/* Any row: sums of columns go through the block's row of scratch memory, which lies in the cache. */
static __global__ void __launch_bounds__(256) norm_backward_any(norm_job n)
{
    __shared__ float shared[32];
    float *dw = n.partial + (int64_t)blockIdx.x * 2 * n.columns, *db = dw + n.columns;
    float of_c = 1 / (float)n.columns;

    for (int64_t r = blockIdx.x; r < n.count; r += gridDim.x) {
        const char *x = row_at(n.x, r), *dy = row_at(n.y, r);
        char *dx = row_at(n.sum, r), *dsum = row_at(n.delta, n.delta.data ? r : 0);
        float mean = n.mean ? n.mean[r] : 0, rstd = n.rstd[r], sum = 0, dot = 0;

        for (int64_t i = threadIdx.x; i < n.columns; i += blockDim.x) {
            float d = load_as(dy, n.y.dtype, i), xh = (load_as(x, n.x.dtype, i) - mean) * rstd;
            float g = n.w ? d * load_as(n.w, n.w_dtype, i) : d;

            sum += g;
            dot = DS_FMA(g, xh, dot);
            if (n.partial) {
                dw[i] = (r == blockIdx.x ? 0 : dw[i]) + d * xh;
                db[i] = (r == blockIdx.x ? 0 : db[i]) + d;
            }
        }
        sum = n.mean ? block_reduce<add_op>(sum, shared) * of_c : 0;
        dot = block_reduce<add_op>(dot, shared) * of_c;
        for (int64_t i = threadIdx.x; i < n.columns; i += blockDim.x) {
            float d = load_as(dy, n.y.dtype, i), xh = (load_as(x, n.x.dtype, i) - mean) * rstd;
            float g = n.w ? d * load_as(n.w, n.w_dtype, i) : d;
            float v = rstd * (g - DS_FMA(xh, dot, sum));

            store_as(dx, n.x.dtype, i, n.delta.data ? v + load_as(dsum, n.x.dtype, i) : v);
        }
    }
}

/* dw and db (blockIdx.y), 32 columns a block: the rows of `partial`, 8 at a time, then those 8. */
static __global__ void norm_columns(const float *partial, int64_t count, int64_t columns, void *dw,
                                    int dw_dtype, void *db, int db_dtype, int accumulate)
{
    __shared__ float shared[8][33];
    int64_t c = (int64_t)blockIdx.x * 32 + threadIdx.x;
    void *to = blockIdx.y ? db : dw;
    int dtype = blockIdx.y ? db_dtype : dw_dtype;
    float s = 0;

    if (!to)
        return;
    for (int64_t p = threadIdx.y; p < count && c < columns; p += 8)
        s += partial[(2 * p + blockIdx.y) * columns + c];
    shared[threadIdx.y][threadIdx.x] = s;
    __syncthreads();
    if (threadIdx.y || c >= columns)
        return;
    s = accumulate ? load_as(to, dtype, c) : 0;
    for (int i = 0; i < 8; i++)
        s += shared[i][threadIdx.x];
    store_as(to, dtype, c, s);
}

/* Everything that both kernels have; y is dy, sum dx and delta dsum in backward. */
static int prepare(norm_job *n, const char *name, const ds_tensor *x, const ds_tensor *y,
                   const ds_tensor *sum, const ds_tensor *delta, const ds_tensor *mean,
                   const ds_tensor *rstd, const ds_tensor *w, const ds_tensor *b)
{
    int lead = x->ndim - 1;

    if (x->dtype == DS_F64)
        return ds_cuda_refuse(name, DS_F64);
    n->columns = x->shape[lead];
    n->count = n->columns ? x->numel / n->columns : 0;
    if (n->count > INT_MAX)
        return ds_fail(DS_EINVAL, "%s: %lld rows; on cuda there may be 2^31 - 1", name,
                       (long long)n->count);
    n->x = rows_of(x, lead);
    n->y = rows_of(y, lead);
    n->sum = rows_of(sum, lead);
    n->delta = rows_of(delta, lead);
    n->mean = mean ? (float *)mean->data : NULL;
    n->rstd = (float *)rstd->data;
    n->w = w ? w->data : NULL;
    n->b = b ? b->data : NULL;
    n->w_dtype = w ? w->dtype : DS_F32;
    n->b_dtype = b ? b->dtype : DS_F32;
    return 0;
}

/* ---- launching */

/* Threads for a row: all that a thread's packs leave. 0: not with packs of N, or too many. */
static int group_of(const norm_job *n, int N, int K)
{
    int64_t packs = n->columns / N, threads = 1;

    if (n->columns % N || packs > MOST * K || n->x.dtype != n->y.dtype || !rows_plain(n->x) ||
        !rows_plain(n->y) || !rows_plain(n->sum) || !rows_plain(n->delta) || !aligned_16(n->w) ||
        !aligned_16(n->b))
        return 0;
    if (packs > 32 * K)
        return (int)((packs + K - 1) / K + 31) / 32 * 32;
    while (threads < packs && threads < 32)
        threads *= 2;
    return (int)threads;
}

template <typename S> static int forward(const norm_job *n)
{
    int threads = group_of(n, per_16<S>, FORWARD);
    int groups = threads && threads <= 32 ? 128 / threads : 1;

    if (!threads)
        return launch("norm", norm_any, blocks_for(n->count, 1), 256, 0, *n);
    return launch("norm", norm_rows<S>, blocks_for(n->count, groups), dim3(threads, groups), 0, *n);
}

extern "C" int ds_cuda_norm(ds_tensor *y, ds_tensor *sum, ds_tensor *mean, ds_tensor *rstd,
                            const ds_tensor *x, const ds_tensor *delta, const ds_tensor *w,
                            const ds_tensor *b, double eps)
{
    static const char what[] = "norm";
    const ds_tensor *t[] = {y, sum, mean, rstd, x, delta, w, b};
    norm_job n = {};

    DS_TRY(on_cuda(what, 8, t));
    DS_TRY(ds_check_norm(y, sum, mean, rstd, x, delta, w, b));
    DS_TRY(prepare(&n, what, x, y, sum, delta, mean, rstd, w, b));
    if (x->numel == 0)
        return 0;
    n.eps = (float)eps;
    return DS_BY_FLOAT(what, x->dtype, S, forward<S>(&n));
}

/* How many blocks of how many threads go through the rows. */
template <typename S> static int backward(norm_job *n, int64_t *blocks)
{
    int threads = group_of(n, per_16<S>, backward_packs<S>);
    int groups = threads && threads <= 32 ? MOST / 32 * (32 / threads) : 1;
    int resident = threads > 32 ? MOST / threads : threads ? 1 : 4;
    size_t bytes;

    while (groups > 1 && (n->count + groups - 1) / groups < ds_cuda.processors)
        groups /= 2; /* few rows: rather on all processors */
    while (threads * groups % 32)
        groups *= 2;
    *blocks = (n->count + groups - 1) / groups;
    if (*blocks > (int64_t)ds_cuda.processors * resident)
        *blocks = (int64_t)ds_cuda.processors * resident;
    bytes = (size_t)*blocks * 2 * (size_t)n->columns * sizeof(float);
    if (n->partial && !(n->partial = (float *)ds_cuda_scratch(DS_CUDA_PARTIAL, bytes)))
        return DS_ENOMEM;
    if (!threads)
        return launch("norm_backward", norm_backward_any, dim3((unsigned)*blocks), 256, 0, *n);
    bytes = groups > 1 ? 2 * (size_t)n->columns * sizeof(float) : 0;
    return launch("norm_backward", norm_backward_rows<S>, dim3((unsigned)*blocks),
                  dim3(threads, groups), bytes, *n);
}

extern "C" int ds_cuda_norm_backward(ds_tensor *dx, ds_tensor *dw, ds_tensor *db,
                                     const ds_tensor *dy, const ds_tensor *x, const ds_tensor *w,
                                     const ds_tensor *mean, const ds_tensor *rstd,
                                     const ds_tensor *dsum, int accumulate)
{
    static const char what[] = "norm_backward";
    const ds_tensor *t[] = {dx, dw, db, dy, x, w, mean, rstd, dsum};
    norm_job n = {};
    int64_t blocks = 0;

    DS_TRY(on_cuda(what, 9, t));
    DS_TRY(ds_check_norm_backward(dx, dw, db, dy, x, w, mean, rstd, dsum));
    DS_TRY(prepare(&n, what, x, dy, dx, dsum, mean, rstd, w, NULL));
    if (n.columns == 0)
        return 0;
    n.partial = dw || db ? (float *)dx->data : NULL; /* not yet where it will be */
    if (n.count)
        DS_TRY(DS_BY_FLOAT(what, x->dtype, S, backward<S>(&n, &blocks)));
    if (!dw && !db)
        return 0;
    return launch(what, norm_columns, dim3((unsigned)((n.columns + 31) / 32), 2), dim3(32, 8), 0,
                  n.partial, blocks, n.columns, dw ? dw->data : NULL, dw ? dw->dtype : 0,
                  db ? db->data : NULL, db ? db->dtype : 0, accumulate);
}
