/* sort.cu - sort and topk along a dimension.
 *
 * Order is decided on keys, as on the CPU: unsigned integers of 8 to 64 bits that order as the
 * values do, NaN the largest, -0 as 0. Equal keys keep their order.
 *
 * Lines of up to TILE elements are sorted in shared memory (tile_kernel) by Batcher's bitonic
 * network (Knuth, volume 3, 5.3.4), on items of a key and an index, so that no two are equal;
 * short lines share a block. The k first of longer lines, for small k, are those of its tiles' k
 * first, again and again. Long lines are sorted by their keys' bytes from the lowest on (radix.cuh).
 * Values are copied from x at the end, by index.
 */
#include "kernels/cuda/radix.cuh"

#define TILE 4096
#define TILE_THREADS 512
#define TOPK_TILES (TILE / 4)      /* the largest k that is found by tiles */
#define BATCH ((int64_t)256 << 20) /* bytes of keys and indices that are sorted at once */

/* Operands: 0 values, 1 indices, 2 x. */
struct job {
    void *values;
    int64_t *indices;
    const void *x;
    int dtype;
    int64_t size; /* of an element in bytes */
    dims lines;
    int64_t count, n, k; /* lines; elements of each, and how many of them are wanted */
    int64_t step[LINES_MAX];
    uint64_t flip; /* the order is turned round */
    const char *name;

    /* tile_kernel: groups of lines, or tiles of one */
    int tile, lines_of_block;
    int64_t total, tiles; /* of a line: items, tiles */
    const void *items_in; /* [count, total]; NULL: x */
    void *items_out;      /* [count, tiles, k]; NULL: values and indices */

    /* long lines: `rows` of them from `first` on */
    int64_t first;
    int pass, passes;
    const void *keys_in; /* [rows, n]; in the first pass x */
    void *keys_out;
    const uint32_t *order_in;
    uint32_t *order_out;
};

/* ---- keys */

template <typename U> static __device__ inline uint64_t key_of_float(U u, U infinity)
{
    const U top = (U)((U)1 << (sizeof(U) * 8 - 1)), magnitude = (U)(u & (U)~top);

    if (magnitude > infinity)
        return (U) ~(U)0;
    return u == top ? top : u & top ? (U)~u : (U)(u | top);
}

/* Of element i of x. */
static __device__ inline uint64_t key_at(const job &j, int64_t i)
{
    uint64_t key;

    switch (j.dtype) {
    case DS_F32:
        key = key_of_float<uint32_t>(((const uint32_t *)j.x)[i], 0x7f800000u);
        break;
    case DS_BF16:
        key = key_of_float<uint16_t>(((const uint16_t *)j.x)[i], 0x7f80);
        break;
    case DS_F16:
        key = key_of_float<uint16_t>(((const uint16_t *)j.x)[i], 0x7c00);
        break;
    case DS_I64:
        key = ((const uint64_t *)j.x)[i] ^ 1ull << 63;
        break;
    case DS_I32:
        key = ((const uint32_t *)j.x)[i] ^ 1u << 31;
        break;
    default:
        key = ((const uint8_t *)j.x)[i];
    }
    return key ^ j.flip;
}

/* A key and an index. */
struct long_item {
    uint64_t key;
    uint32_t index;
};
static __device__ inline bool less(uint64_t a, uint64_t b)
{
    return a < b;
}
static __device__ inline bool less(const long_item &a, const long_item &b)
{
    return a.key < b.key || (a.key == b.key && a.index < b.index);
}
static __device__ inline void make(uint64_t *item, uint64_t key, uint32_t index)
{
    *item = key << 32 | index;
}
static __device__ inline void make(long_item *item, uint64_t key, uint32_t index)
{
    *item = {key, index};
}
static __device__ inline uint32_t index_of(uint64_t item)
{
    return (uint32_t)item;
}
static __device__ inline uint32_t index_of(const long_item &item)
{
    return item.index;
}

/* Element `index` of a line becomes the i-th of the result. */
static __device__ inline void give(const job &j, const int64_t (&at)[3], int64_t i, uint32_t index)
{
    int64_t to = at[0] + i * j.step[0], from = at[2] + index * j.step[2];

    if (j.size == 4)
        ((uint32_t *)j.values)[to] = ((const uint32_t *)j.x)[from];
    else if (j.size == 2)
        ((uint16_t *)j.values)[to] = ((const uint16_t *)j.x)[from];
    else if (j.size == 8)
        ((uint64_t *)j.values)[to] = ((const uint64_t *)j.x)[from];
    else
        ((uint8_t *)j.values)[to] = ((const uint8_t *)j.x)[from];
    j.indices[at[1] + i * j.step[1]] = index;
}

/* ---- in shared memory */

/* n items as lines of `line`, a power of two. */
template <typename Item> static __device__ inline void bitonic_sort(Item *items, int n, int line)
{
    for (int size = 2; size <= line; size *= 2)
        for (int half = size / 2; half; half /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
                int low = 2 * i - (i & (half - 1)), up = (low & (line - 1) & size) == 0;
                Item a = items[low], b = items[low + half];

                if (less(b, a) == (bool)up) {
                    items[low] = b;
                    items[low + half] = a;
                }
            }
        }
    __syncthreads();
}

template <typename Item> static __global__ void __launch_bounds__(TILE_THREADS) tile_kernel(job j)
{
    DS_SHARED(Item, items);
    int64_t tile, first = divide(blockIdx.x, j.tiles, &tile) * j.lines_of_block;
    int n = j.tile * j.lines_of_block;

    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        int64_t line = first + i / j.tile, place = tile * j.tile + i % j.tile, at[3];

        make(&items[i], ~0ull, ~0u); /* behind all others */
        if (line >= j.count || place >= j.total)
            continue;
        if (j.items_in) {
            items[i] = ((const Item *)j.items_in)[line * j.total + place];
        } else {
            offsets(at, j.lines, j.lines.n, line);
            make(&items[i], key_at(j, at[2] + place * j.step[2]), (uint32_t)place);
        }
    }
    bitonic_sort(items, n, j.tile);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        int64_t line = first + i / j.tile, place = i % j.tile, at[3];

        if (line >= j.count || place >= j.k)
            continue;
        if (j.items_out) {
            ((Item *)j.items_out)[(line * j.tiles + tile) * j.k + place] = items[i];
        } else {
            offsets(at, j.lines, j.lines.n, line);
            give(j, at, place, index_of(items[i]));
        }
    }
}

template <typename Item> static int launch_tiles(job *j)
{
    int64_t n;
    int threads;

    j->tile = power_of_two(j->total, TILE);
    j->tiles = (j->total + j->tile - 1) / j->tile;
    j->lines_of_block = j->tile < 1024 ? 1024 / j->tile : 1;
    while (j->lines_of_block > 1 && j->lines_of_block / 2 >= j->count)
        j->lines_of_block /= 2;
    n = (int64_t)j->tile * j->lines_of_block;
    threads = (int)(n / 2 < 32 ? 32 : n / 2 < TILE_THREADS ? n / 2 : TILE_THREADS);
    return launch(j->name, tile_kernel<Item>,
                  blocks_for((j->count + j->lines_of_block - 1) / j->lines_of_block * j->tiles, 1),
                  threads, (size_t)n * sizeof(Item), *j);
}

/* The k first of every line; k ≤ TOPK_TILES if there are several tiles: each round leaves a
 * quarter of the items at most. */
template <typename Item> static int by_tiles(job *j)
{
    int slot = DS_CUDA_A;

    j->total = j->n;
    while (j->total > TILE) {
        int64_t tiles = (j->total + TILE - 1) / TILE;

        j->items_out = ds_cuda_scratch(slot, (size_t)(j->count * tiles * j->k) * sizeof(Item));
        if (!j->items_out)
            return DS_ENOMEM;
        DS_TRY(launch_tiles<Item>(j));
        j->items_in = j->items_out;
        j->items_out = NULL;
        j->total = tiles * j->k;
        slot = slot == DS_CUDA_A ? DS_CUDA_B : DS_CUDA_A;
    }
    return launch_tiles<Item>(j);
}

/* ---- long lines, byte by byte */

template <typename Key> struct byte_line {
    using source = job;
    static constexpr int rounds = 16;
    const job &j;
    int64_t row, at[3];

    __device__ byte_line(const job &all, int64_t r) : j(all), row(r)
    {
        offsets(at, j.lines, j.lines.n, j.first + row);
    }
    __device__ uint64_t key(int64_t i) const
    {
        return j.pass == 0 ? key_at(j, at[2] + i * j.step[2])
                           : (uint64_t)((const Key *)j.keys_in)[row * j.n + i];
    }
    __device__ void move(int64_t i, uint32_t to) const
    {
        uint32_t index = j.pass == 0 ? (uint32_t)i : j.order_in[row * j.n + i];

        if (j.pass < j.passes - 1) {
            ((Key *)j.keys_out)[row * j.n + to] = (Key)key(i);
            j.order_out[row * j.n + to] = index;
        } else if (to < j.k) {
            give(j, at, to, index);
        }
    }
};

/* `rows` lines from j->first on; both of keys and orders have room for two. */
template <typename Key>
static int sort_rows(job *j, radix r, int64_t rows, Key *keys, uint32_t *order)
{
    for (j->pass = 0; j->pass < j->passes; j->pass++) {
        int64_t here = j->pass % 2 * rows * j->n, there = (j->pass + 1) % 2 * rows * j->n;

        j->keys_in = keys + here;
        j->order_in = order + here;
        j->keys_out = keys + there;
        j->order_out = order + there;
        r.shift = 8 * j->pass;
        DS_TRY(radix_pass<byte_line<Key>>(j->name, *j, r, rows));
    }
    return 0;
}

template <typename Key> static int by_bytes(job *j)
{
    constexpr int64_t tile = radix_tile<byte_line<Key>>;
    int64_t row = j->n * 2 * (int64_t)(sizeof(Key) + 4), rows = BATCH / row;
    radix r = {j->n, (j->n + tile - 1) / tile, 0, NULL, NULL};
    Key *keys;
    uint32_t *order;

    rows = rows < 1 ? 1 : rows < j->count ? rows : j->count;
    j->passes = (int)j->size;
    keys = (Key *)ds_cuda_scratch(DS_CUDA_A, (size_t)(rows * j->n * 2) * sizeof(Key));
    order = (uint32_t *)ds_cuda_scratch(DS_CUDA_B, (size_t)(rows * j->n * 2) * 4);
    r.totals = (uint32_t *)ds_cuda_scratch(DS_CUDA_C, (size_t)(rows * DIGITS * (r.tiles + 1)) * 4);
    if (!keys || !order || !r.totals)
        return DS_ENOMEM;
    r.counts = r.totals + rows * DIGITS;
    for (j->first = 0; j->first < j->count; j->first += rows)
        DS_TRY(
            sort_rows(j, r, j->count - j->first < rows ? j->count - j->first : rows, keys, order));
    return 0;
}

/* ---- sort and topk: the k first in order of every line */

static int ordered(const char *name, ds_tensor *values, ds_tensor *indices, const ds_tensor *x,
                   int dim, int backwards)
{
    const ds_tensor *t[] = {values, indices, x};
    job j = job();

    if (x->dtype == DS_F64)
        return ds_cuda_refuse(name, x->dtype);
    DS_TRY(lines_start(&j.lines, &j.count, name, dim, 3, t));
    DS_TRY(ds_check_ordered(name, values, indices, x, dim));
    j.n = x->shape[dim];
    j.k = values->shape[dim];
    if (j.n >= 1ll << 32)
        return ds_fail(DS_EINVAL, "%s: %lld values in a line; on cuda there may be 2^32 - 1", name,
                       (long long)j.n);
    if (j.count == 0 || j.k == 0)
        return 0;
    j.values = values->data;
    j.indices = (int64_t *)indices->data;
    j.x = x->data;
    j.dtype = x->dtype;
    j.size = ds_bytes_of(x->dtype);
    j.flip = backwards ? ~0ull >> (64 - 8 * j.size) : 0;
    j.name = name;
    for (int k = 0; k < 3; k++)
        j.step[k] = t[k]->stride[dim];
    if (j.n <= TILE || j.k <= TOPK_TILES)
        return j.size == 8 ? by_tiles<long_item>(&j) : by_tiles<uint64_t>(&j);
    return j.size == 8 ? by_bytes<uint64_t>(&j) : by_bytes<uint32_t>(&j);
}

extern "C" int ds_cuda_sort(ds_tensor *values, ds_tensor *indices, const ds_tensor *x, int dim,
                            int descending)
{
    if (dim >= 0 && dim < x->ndim && values->ndim == x->ndim && values->shape[dim] != x->shape[dim])
        return ds_fail(DS_EINVAL, "sort: %lld values do not fit %lld", (long long)x->shape[dim],
                       (long long)values->shape[dim]);
    return ordered("sort", values, indices, x, dim, descending);
}

extern "C" int ds_cuda_topk(ds_tensor *values, ds_tensor *indices, const ds_tensor *x, int dim,
                            int largest)
{
    return ordered("topk", values, indices, x, dim, largest);
}
