/* radix.cuh - a pass of a stable radix sort by eight bits of the keys (Satish, Harris & Garland 2009,
 * "Designing efficient sorting algorithms for manycore GPUs"), and running counts.
 *
 * Keys come in rows of n, each sorted by itself. A block has a tile of a row, its warps shares that follow
 * each other. A pass counts the digits of each tile (radix_count), sums the counts up, for each digit
 * over the tiles (scan_rows), and moves every element behind those with a smaller digit, those of earlier
 * tiles, and those before it in its tile (radix_move). All counts are whole numbers, and no atomic
 * operation decides a place: the order is the same every time.
 *
 * Where keys come from and what is moved is the user's: a Line is made of its `source` and the number of
 * a row; key(i) is element i's key, move(i, to) puts it where it goes; `rounds`: how often a warp takes
 * 32 elements.
 */
#ifndef DS_CUDA_RADIX_CUH
#define DS_CUDA_RADIX_CUH

#include "kernels/cuda/lines.cuh"

#define RADIX_THREADS 256
#define RADIX_WARPS (RADIX_THREADS / 32)
#define DIGITS 256 /* as many as threads: each counts one */

/* Elements of a tile, of which a warp takes 32 at a time. */
template <typename Line> constexpr int64_t radix_tile = RADIX_THREADS *Line::rounds;

struct radix {
    int64_t n, tiles; /* of a row: elements, tiles */
    int shift;        /* of the digit in the key */
    uint32_t *counts; /* [rows, DIGITS, tiles], and */
    uint32_t *totals; /* [rows, DIGITS]; not used where there is one tile */
};

/* ---- running counts */

/* A block for each row of n counts, which become the sums of those before; total[row]: of all. */
template <typename T>
static __global__ void __launch_bounds__(RADIX_THREADS) scan_rows(T *counts, T *total, int64_t n)
{
    T *row = counts + blockIdx.x * n, carry = 0;

    for (int64_t first = 0; first < n; first += blockDim.x) {
        int64_t i = first + threadIdx.x;
        T all, before = block_before<T>(i < n ? row[i] : 0, &all);

        if (i < n)
            row[i] = carry + before;
        carry += all;
    }
    if (threadIdx.x == 0)
        total[blockIdx.x] = carry;
}

template <typename T>
static int launch_scan(const char *name, T *counts, T *total, int64_t n, int64_t rows)
{
    int threads = n < RADIX_THREADS ? (int)(n + 31) / 32 * 32 : RADIX_THREADS;

    return launch(name, scan_rows<T>, blocks_for(rows, 1), threads, 0, counts, total, n);
}

/* ---- a pass */

template <typename Line>
static __global__ void __launch_bounds__(RADIX_THREADS)
    radix_count(typename Line::source from, radix r)
{
    __shared__ uint32_t here[DIGITS];
    int64_t tile, row = divide(blockIdx.x, r.tiles, &tile), begin = tile * radix_tile<Line>;
    int64_t end = begin + radix_tile<Line> < r.n ? begin + radix_tile<Line> : r.n;
    Line line(from, row);

    here[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = begin + threadIdx.x; i < end; i += RADIX_THREADS)
        atomicAdd(&here[line.key(i) >> r.shift & (DIGITS - 1)], 1u);
    __syncthreads();
    r.counts[(row * DIGITS + threadIdx.x) * r.tiles + tile] = here[threadIdx.x];
}

/* The lanes that have the same digit as this one, and are valid. */
static __device__ inline unsigned same_digit(unsigned digit, bool valid)
{
    unsigned lanes = __ballot_sync(0xffffffff, valid);

    for (int b = 0; b < 8; b++) {
        unsigned set = __ballot_sync(0xffffffff, digit >> b & 1);

        lanes &= digit >> b & 1 ? set : ~set;
    }
    return lanes;
}

/* Ranks the elements of a warp's share, from `begin` on: how many with the same digit come before in it.
 * Each rank stands above its digit. Counts the digits of the share. */
template <typename Line>
static __device__ inline void rank_share(const Line &line, const radix &r, int64_t begin,
                                         uint32_t (&ranks)[Line::rounds], uint32_t *counts)
{
    int lane = threadIdx.x % 32;

#pragma unroll
    for (int k = 0; k < Line::rounds; k++) {
        int64_t i = begin + k * 32 + lane;
        bool valid = i < r.n;
        unsigned digit = valid ? line.key(i) >> r.shift & (DIGITS - 1) : 0;
        unsigned same = same_digit(digit, valid);
        uint32_t before = counts[digit];

        __syncwarp();
        if (valid && (same >> lane) == 1) /* the last of them */
            counts[digit] = before + __popc(same);
        __syncwarp();
        ranks[k] = (before + __popc(same & ((1u << lane) - 1))) << 8 | digit;
    }
}

template <typename Line>
static __global__ void __launch_bounds__(RADIX_THREADS)
    radix_move(typename Line::source from, radix r)
{
    __shared__ uint32_t places[RADIX_WARPS][DIGITS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, me = threadIdx.x;
    int64_t tile, row = divide(blockIdx.x, r.tiles, &tile);
    int64_t begin = tile * radix_tile<Line> + warp * 32 * Line::rounds;
    uint32_t ranks[Line::rounds], all, place = 0;
    Line line(from, row);

    for (int w = 0; w < RADIX_WARPS; w++)
        places[w][me] = 0;
    __syncthreads();
    rank_share<Line>(line, r, begin, ranks, places[warp]);
    __syncthreads();
    for (int w = 0; w < RADIX_WARPS && r.tiles == 1; w++)
        place += places[w][me];
    place = block_before<uint32_t>(r.tiles > 1 ? r.totals[row * DIGITS + me] : place, &all);
    place += r.tiles > 1 ? r.counts[(row * DIGITS + me) * r.tiles + tile] : 0;
    for (int w = 0; w < RADIX_WARPS; w++) {
        uint32_t here = places[w][me];

        places[w][me] = place;
        place += here;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < Line::rounds; k++) {
        int64_t i = begin + k * 32 + lane;

        if (i < r.n)
            line.move(i, places[warp][ranks[k] & (DIGITS - 1)] + (ranks[k] >> 8));
    }
}

template <typename Line>
static int radix_pass(const char *name, const typename Line::source &from, const radix &r,
                      int64_t rows)
{
    dim3 grid = blocks_for(rows * r.tiles, 1);

    if (r.tiles > 1) {
        DS_TRY(launch(name, radix_count<Line>, grid, RADIX_THREADS, 0, from, r));
        DS_TRY(launch_scan(name, r.counts, r.totals, r.tiles, rows * DIGITS));
    }
    return launch(name, radix_move<Line>, grid, RADIX_THREADS, 0, from, r);
}

#endif
