/* mask.cu - masks: the k-th true element in row-major order is the k-th of the other side.
 *
 * Tiles of the mask are counted, the counts summed up, and then every thread knows where its elements
 * go. Only mask_count waits: its result is a number on the host.
 */
#include "kernels/cuda/order.h"
#include "kernels/cuda/walk.cuh"

#define THREADS 256
#define TILE (THREADS * 8)

/* Whether element i is true; *x: where it lies in what is masked, operand 0. */
static __device__ inline int is_set(const places &p, int64_t i, int64_t n, int64_t *x)
{
    int64_t at[2];

    if (i >= n)
        return 0;
    place_of_many(at, p, i, n);
    *x = at[0];
    return ((const uint8_t *)p.op[1].data)[at[1]] != 0;
}

static __global__ void __launch_bounds__(THREADS)
    count_kernel(int64_t *counts, const __grid_constant__ places p, int64_t n)
{
    int64_t first = (int64_t)blockIdx.x * TILE + threadIdx.x, count = 0, x;

    for (int i = 0; i < TILE; i += THREADS)
        count += __syncthreads_count(is_set(p, first + i, n, &x));
    if (threadIdx.x == 0)
        counts[blockIdx.x] = count;
}

static __device__ inline void move(char *to, const char *from, int size)
{
    if (size == 1)
        *to = *from;
    else if (size == 2)
        *(uint16_t *)to = *(const uint16_t *)from;
    else if (size == 4)
        *(uint32_t *)to = *(const uint32_t *)from;
    else
        *(uint64_t *)to = *(const uint64_t *)from;
}

/* Between the true elements and a list of `room`; take: from them to the list. */
static __global__ void __launch_bounds__(THREADS)
    move_kernel(const int64_t *counts, const __grid_constant__ places p, int64_t n, char *list,
                int64_t room, int size, int take, ds_cuda_fault *faults, const char *name)
{
    __shared__ int set[2][THREADS / 32];
    int64_t first = (int64_t)blockIdx.x * TILE + threadIdx.x, rank = counts[blockIdx.x], x = 0;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    for (int i = 0, turn = 0; i < TILE; i += THREADS, turn ^= 1) {
        int here = is_set(p, first + i, n, &x);
        unsigned lanes = __ballot_sync(0xffffffff, here);
        int64_t at = rank + __popc(lanes & ((1u << lane) - 1));

        if (lane == 0)
            set[turn][warp] = __popc(lanes);
        __syncthreads();
        for (int k = 0; k < THREADS / 32; k++) {
            at += k < warp ? set[turn][k] : 0;
            rank += set[turn][k];
        }
        if (!here)
            continue;
        if (at >= room)
            fault(faults, name, at, room);
        else if (take)
            move(list + at * size, p.op[0].data + x * size, size);
        else
            move(p.op[0].data + x * size, list + at * size, size);
    }
}

/* Scratch: how many true elements come before each tile, then how many there are; NULL: no memory. */
static int count_tiles(int64_t **out, const char *name, const places &p, int64_t n)
{
    int64_t tiles = (n + TILE - 1) / TILE;
    int64_t *counts = (int64_t *)ds_cuda_scratch(DS_CUDA_B, (size_t)(tiles + 1) * sizeof *counts);

    if (!counts)
        return DS_ENOMEM;
    *out = counts;
    DS_TRY(launch(name, count_kernel, blocks_for(n, TILE), THREADS, 0, counts, p, n));
    return ds_cuda_scan(name, counts, counts + tiles, tiles, 1);
}

static int masked(const char *name, const ds_tensor *x, const ds_tensor *mask,
                  const ds_tensor *list, int take)
{
    int64_t n = x->numel, *counts;
    const ds_tensor *t[] = {take ? list : x, take ? x : list}, *walked[] = {x, mask};
    walk w;

    DS_TRY(on_cuda(name, 2, t));
    DS_TRY(walk_start(&w, name, 2, walked, WALK_ROW_MAJOR));
    if (n == 0)
        return 0;
    places p = places_of(&w, 1);
    DS_TRY(count_tiles(&counts, name, p, n));
    return launch(name, move_kernel, blocks_for(n, TILE), THREADS, 0, counts, p, n,
                  (char *)list->data, list->numel, (int)w.op[0].size, take, ds_cuda.fault, name);
}

extern "C" int ds_cuda_mask_count(int64_t *count, const ds_tensor *mask)
{
    const ds_tensor *both[] = {mask, mask};
    int64_t n = mask->numel, *counts;
    walk w;

    DS_TRY(ds_check_mask("mask_count", mask));
    DS_TRY(walk_start(&w, "mask_count", 2, both, WALK_ROW_MAJOR));
    *count = 0;
    if (n == 0)
        return 0;
    DS_TRY(count_tiles(&counts, "mask_count", places_of(&w, 1), n));
    ds_cuda.counters.downloads++;
    DS_TRY(ds_cuda_check(cudaMemcpyAsync(count, counts + (n + TILE - 1) / TILE, sizeof *count,
                                         cudaMemcpyDeviceToHost, ds_cuda.stream),
                         "mask_count"));
    return ds_cuda_wait("mask_count");
}

extern "C" int ds_cuda_masked_select(ds_tensor *y, const ds_tensor *x, const ds_tensor *mask)
{
    DS_TRY(ds_check_masked_select(y, x, mask));
    return masked("masked_select", x, mask, y, 1);
}

extern "C" int ds_cuda_masked_scatter(ds_tensor *y, const ds_tensor *mask, const ds_tensor *x)
{
    DS_TRY(ds_check_masked_scatter(y, mask, x));
    return masked("masked_scatter", y, mask, x, 0);
}
