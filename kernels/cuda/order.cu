/* order.cu - keys sorted with their positions, in one row, and running counts (radix.cuh). */
#include "kernels/cuda/order.h"

#include "kernels/cuda/radix.cuh"

/* A pass goes from one side to the other. */
struct sides {
    ds_cuda_order from, to;
};
struct side_line {
    using source = sides;
    static constexpr int rounds =
        8; /* small tiles: mostly there are few keys for many processors */
    const sides &s;

    __device__ side_line(const sides &all, int64_t) : s(all)
    {
    }
    __device__ uint64_t key(int64_t i) const
    {
        return s.from.keys[i];
    }
    __device__ void move(int64_t i, uint32_t to) const
    {
        s.to.keys[to] = s.from.keys[i];
        s.to.at[to] = s.from.at[i];
    }
};

int ds_cuda_scan(const char *name, int64_t *counts, int64_t *total, int64_t n, int rows)
{
    return launch_scan(name, counts, total, n, rows);
}

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
    radix r = {n, (n + radix_tile<side_line> - 1) / radix_tile<side_line>, 0, NULL, NULL};

    if (r.tiles > 1) {
        r.totals = (uint32_t *)ds_cuda_scratch(DS_CUDA_B, (size_t)((r.tiles + 1) * DIGITS) * 4);
        if (!r.totals)
            return DS_ENOMEM;
        r.counts = r.totals + DIGITS;
    }
    for (; r.shift < bits; r.shift += 8) {
        sides s = {*from, *to};

        DS_TRY(radix_pass<side_line>(name, s, r, 1));
        *from = s.to;
        *to = s.from;
    }
    return 0;
}
