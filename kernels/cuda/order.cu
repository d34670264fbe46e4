/* order.cu - a stable radix sort of keys with their positions, eight bits at a time (Satish, Harris &
 * Garland 2009, "Designing efficient sorting algorithms for manycore GPUs").
 *
 * A pass counts the digits of each tile of keys, sums the counts up (for each digit over the tiles),
 * and moves every key behind those with a smaller digit, those of earlier tiles, and those before it
 * in its tile. All counts are whole numbers: the order is the same every time.
 */
#include "kernels/cuda/order.h"

#include "kernels/cuda/common.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
#define DIGITS 256
#define ROUNDS 8 /* of 32 keys for each warp */
#define TILE (THREADS * ROUNDS)

/* ---- running counts */

/* The sum of x over the threads before this one, of whole warps; *total: over all. shared: WARPS. */
static __device__ inline int64_t block_scan(int64_t x, int64_t *shared, int64_t *total)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t sum = x, before = 0;

    for (int k = 1; k < 32; k *= 2) {
        int64_t left = __shfl_up_sync(0xffffffff, sum, k);

        sum += lane >= k ? left : 0;
    }
    __syncthreads();
    if (lane == 31)
        shared[warp] = sum;
    __syncthreads();
    *total = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++) {
        before += i < warp ? shared[i] : 0;
        *total += shared[i];
    }
    return before + sum - x;
}

static __global__ void scan_kernel(int64_t *counts, int64_t *total, int64_t n)
{
    __shared__ int64_t sums[WARPS];
    int64_t *row = counts + blockIdx.x * n, carry = 0;

    for (int64_t first = 0; first < n; first += blockDim.x) {
        int64_t i = first + threadIdx.x, all;
        int64_t before = block_scan(i < n ? row[i] : 0, sums, &all);

        if (i < n)
            row[i] = carry + before;
        carry += all;
    }
    if (threadIdx.x == 0)
        total[blockIdx.x] = carry;
}

int ds_cuda_scan(const char *name, int64_t *counts, int64_t *total, int64_t n, int rows)
{
    int threads = n < THREADS ? (int)(n + 31) / 32 * 32 : THREADS;

    return launch(name, scan_kernel, dim3(rows), threads, 0, counts, total, n);
}

/* ---- a pass */

/* counts[digit][tile] */
static __global__ void count_kernel(int64_t *counts, const uint64_t *keys, int64_t n, int shift)
{
    __shared__ unsigned here[DIGITS];
    int64_t first = (int64_t)blockIdx.x * TILE;

    here[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = first + threadIdx.x; i < first + TILE && i < n; i += THREADS)
        atomicAdd(&here[keys[i] >> shift & (DIGITS - 1)], 1u);
    __syncthreads();
    counts[(int64_t)threadIdx.x * gridDim.x + blockIdx.x] = here[threadIdx.x];
}

/* The lanes whose digit is this lane's. */
static __device__ inline unsigned alike(unsigned digit, unsigned valid)
{
    unsigned lanes = valid;

    for (int bit = 0; bit < 8; bit++) {
        unsigned set = __ballot_sync(0xffffffff, digit >> bit & 1);

        lanes &= digit >> bit & 1 ? set : ~set;
    }
    return lanes;
}

/* counts NULL: this tile is the only one. A warp has ROUNDS × 32 keys that follow each other: it counts them first, so that each warp knows
 * where its keys of a digit begin, and moves them then. */
static __global__ void move_kernel(ds_cuda_order to, ds_cuda_order from, const int64_t *counts,
                                   const int64_t *total, int64_t n, int shift)
{
    __shared__ int64_t sums[WARPS], begin[DIGITS];
    __shared__ unsigned before[WARPS][DIGITS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t first = (int64_t)blockIdx.x * TILE + warp * 32 * ROUNDS + lane, all;
    uint64_t key[ROUNDS];
    unsigned run = 0;

    for (int i = 0; i < WARPS; i++)
        before[i][threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        int64_t i = first + r * 32;

        key[r] = i < n ? from.keys[i] : 0;
        if (i < n)
            atomicAdd(&before[warp][key[r] >> shift & (DIGITS - 1)], 1u);
    }
    __syncthreads();
    for (int i = 0; i < WARPS; i++) {
        unsigned count = before[i][threadIdx.x];

        before[i][threadIdx.x] = run;
        run += count;
    }
    begin[threadIdx.x] = block_scan(counts ? total[threadIdx.x] : run, sums, &all) +
                         (counts ? counts[(int64_t)threadIdx.x * gridDim.x + blockIdx.x] : 0);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        int64_t i = first + r * 32;
        unsigned digit = key[r] >> shift & (DIGITS - 1);
        unsigned same = alike(digit, __ballot_sync(0xffffffff, i < n));
        unsigned rank = __popc(same & ((1u << lane) - 1)), here = before[warp][digit];

        __syncwarp();
        if (i < n) {
            int64_t place = begin[digit] + here + rank;

            to.keys[place] = key[r];
            to.at[place] = from.at[i];
            if (rank == 0)
                before[warp][digit] = here + __popc(same);
        }
        __syncwarp();
    }
}

/* ---- the whole */

int ds_cuda_order_room(ds_cuda_order *from, ds_cuda_order *to, int64_t n)
{
    int64_t keys = (n * 8 + 255) / 256 * 256, places = (n * 4 + 255) / 256 * 256;
    char *room = (char *)ds_cuda_scratch(DS_CUDA_A, (size_t)(2 * (keys + places)));

    if (!room)
        return DS_ENOMEM;
    from->keys = (uint64_t *)room;
    to->keys = (uint64_t *)(room + keys);
    from->at = (uint32_t *)(room + 2 * keys);
    to->at = (uint32_t *)(room + 2 * keys + places);
    return 0;
}

int ds_cuda_order_sort(const char *name, ds_cuda_order *from, ds_cuda_order *to, int64_t n,
                       int bits)
{
    int64_t tiles = (n + TILE - 1) / TILE, *counts = NULL, *total = NULL;

    if (tiles > 1) {
        counts = (int64_t *)ds_cuda_scratch(DS_CUDA_B, (size_t)((tiles + 1) * DIGITS) * 8);
        if (!counts)
            return DS_ENOMEM;
        total = counts + tiles * DIGITS;
    }
    for (int shift = 0; shift < bits; shift += 8) {
        ds_cuda_order sorted = *to;

        if (tiles > 1) {
            DS_TRY(launch(name, count_kernel, dim3((unsigned)tiles), THREADS, 0, counts, from->keys,
                          n, shift));
            DS_TRY(ds_cuda_scan(name, counts, total, tiles, DIGITS));
        }
        DS_TRY(launch(name, move_kernel, dim3((unsigned)tiles), THREADS, 0, *to, *from, counts,
                      total, n, shift));
        *to = *from;
        *from = sorted;
    }
    return 0;
}
