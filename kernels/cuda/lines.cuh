/* lines.cuh - tensors as a few dimensions, for kernels that go along some of them and keep the
 * others: reductions, sorting, softmax.
 *
 * Dimensions that lie in memory like one are merged, and stand in the order of operand 0's memory,
 * the densest last; those along which it does not move (stride 0) stand first.
 */
#ifndef DS_CUDA_LINES_CUH
#define DS_CUDA_LINES_CUH

#include "kernels/cuda/common.cuh"

#define LINES_MAX 3 /* operands */

struct dims {
    int n;
    int64_t size[DS_MAX_DIM];
    double inverse[DS_MAX_DIM];            /* 1 / size */
    int64_t stride[LINES_MAX][DS_MAX_DIM]; /* of each operand, in elements */
};

/* Dimension i of all tensors becomes one of d's. */
static inline void dims_add(dims *d, int i, int count, const ds_tensor *const *t)
{
    if (t[0]->shape[i] == 1)
        return;
    d->size[d->n] = t[0]->shape[i];
    for (int k = 0; k < LINES_MAX; k++)
        d->stride[k][d->n] = k < count && t[k]->shape[i] != 1 ? t[k]->stride[i] : 0;
    d->n++;
}

static inline void dims_swap(dims *d, int a, int b)
{
    int64_t size = d->size[a];

    d->size[a] = d->size[b];
    d->size[b] = size;
    for (int k = 0; k < LINES_MAX; k++) {
        int64_t stride = d->stride[k][a];

        d->stride[k][a] = d->stride[k][b];
        d->stride[k][b] = stride;
    }
}

/* Sorts and merges. */
static inline void dims_simplify(dims *d)
{
    int n = 0;

    for (int i = 1; i < d->n; i++)
        for (int k = i; k > 0; k--) {
            int64_t above = d->stride[0][k - 1], below = d->stride[0][k];

            if (above == 0 || (below != 0 && above >= below))
                break;
            dims_swap(d, k - 1, k);
        }
    for (int i = 0; i < d->n; i++) {
        int merge = n > 0;

        for (int k = 0; k < LINES_MAX; k++)
            merge = merge && d->stride[k][n - 1] == d->stride[k][i] * d->size[i];
        if (!merge)
            n++;
        d->size[n - 1] = merge ? d->size[n - 1] * d->size[i] : d->size[i];
        for (int k = 0; k < LINES_MAX; k++)
            d->stride[k][n - 1] = d->stride[k][i];
        d->inverse[n - 1] = d->size[n - 1] ? 1.0 / (double)d->size[n - 1] : 0;
    }
    d->n = n;
}

/* The lines of t[0], t[1], … along `dim`: all of their other dimensions, and how many lines there
 * are. DS_EINVAL where those differ, or there is no such dimension. */
static inline int lines_start(dims *d, int64_t *lines, const char *name, int dim, int count,
                              const ds_tensor *const *t)
{
    char one[128], other[128];

    DS_TRY(ds_check_dim(name, t[0], dim));
    *d = dims();
    *lines = 1;
    for (int i = 0; i < t[0]->ndim; i++) {
        for (int k = 1; k < count; k++)
            if (t[k]->ndim != t[0]->ndim || (i != dim && t[k]->shape[i] != t[0]->shape[i]))
                return ds_fail(DS_EINVAL, "%s: %s does not fit %s", name, ds_shape_text(one, t[k]),
                               ds_shape_text(other, t[0]));
        if (i == dim)
            continue;
        *lines *= t[0]->shape[i];
        dims_add(d, i, count, t);
    }
    dims_simplify(d);
    return 0;
}

/* i divided by the size of dimension k, and the rest. No index needs more than the 53 bits of a
 * double. */
static __device__ inline int64_t divide(const dims &d, int k, int64_t i, int64_t *rest)
{
    int64_t q = (int64_t)((double)i * d.inverse[k]), r = i - q * d.size[k];

    if (r < 0) { /* the inverse is rounded: q may be one off */
        q--;
        r += d.size[k];
    } else if (r >= d.size[k]) {
        q++;
        r -= d.size[k];
    }
    *rest = r;
    return q;
}

/* The same for numbers of blocks. */
static __device__ inline int64_t divide(unsigned i, int64_t n, int64_t *rest)
{
    unsigned q = i / (unsigned)n;

    *rest = i - q * (unsigned)n;
    return q;
}

/* Where element i of the first n dimensions lies in operands 0 to K - 1. */
template <int K>
static __device__ inline void offsets(int64_t (&at)[K], const dims &d, int n, int64_t i)
{
    for (int k = 0; k < K; k++)
        at[k] = 0;
    for (int j = n - 1; j >= 0; j--) {
        int64_t rest = i;

        if (j > 0)
            i = divide(d, j, i, &rest);
        for (int k = 0; k < K; k++)
            at[k] += rest * d.stride[k][j];
    }
}
static __device__ inline int64_t offset(const dims &d, int n, int64_t i)
{
    int64_t at[1];

    offsets(at, d, n, i);
    return at[0];
}

static inline int power_of_two(int64_t least, int most)
{
    int p = 1;

    while (p < least && p < most)
        p *= 2;
    return p;
}

/* ---- sums over a block, of numbers of any type */

/* The sum of what all threads have, a power of 2 of them; every one gets it. shared: as many numbers. */
template <typename A> static __device__ inline A block_sum(A mine, A *shared)
{
    shared[threadIdx.x] = mine;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half; half /= 2) {
        if (threadIdx.x < half)
            shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    mine = shared[0];
    __syncthreads();
    return mine;
}

/* The sum of what the threads before this one have, of whole warps; *all: of all. */
template <typename A> static __device__ inline A block_before(A mine, A *all)
{
    __shared__ A shared[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    A sum = mine, before = 0;

    for (int k = 1; k < 32; k *= 2) {
        A below = __shfl_up_sync(0xffffffff, sum, k);

        if (lane >= k)
            sum += below;
    }
    if (lane == 31)
        shared[warp] = sum;
    __syncthreads();
    *all = 0;
    for (int w = 0; w < (int)blockDim.x / 32; w++) {
        if (w == warp)
            before = *all;
        *all += shared[w];
    }
    __syncthreads();
    A first = __shfl_up_sync(0xffffffff, sum, 1);

    return lane == 0 ? before : before + first;
}

/* Elements before the first that lies on 16 bytes, at most n. */
template <typename S> static __device__ inline int64_t head_of(const S *x, int64_t n)
{
    int64_t head = (int64_t)((16 - ((uintptr_t)x & 15)) & 15) / (int64_t)sizeof(S);

    return head < n ? head : n;
}

#endif
