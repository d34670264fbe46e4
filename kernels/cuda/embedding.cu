/* embedding.cu - rows by index, the sums that are their gradient, and rotary positions.
 *
 * The gradient must add rows of dy with equal indices in a fixed order, and read dy once. Tokens are
 * sorted by index (least digit first, stable, so that equal ones stay in order); blocks take tiles of
 * the sorted list, each thread a few columns, and add up runs of equal indices. A run within a tile is
 * a row of dw. Runs that cross tiles leave their parts in scratch memory, for a second kernel that adds
 * these in order: a token that is half of the text does not keep one block busy while others wait.
 */
#include "kernels/cuda/order.h"
#include "kernels/cuda/rows.cuh"

#include <limits.h>

#define TILE 64 /* sorted tokens whose rows a block adds up */

/* ---- indices */

static __device__ inline int64_t index_at(const rows &index, int64_t i)
{
    const char *at = row_at(index, i);

    if (index.dtype == DS_I64)
        return *(const int64_t *)at;
    return index.dtype == DS_I32 ? *(const int32_t *)at : *(const uint8_t *)at;
}

/* ---- embedding: pieces of P bytes, `pieces` a row; a row's threads are those of one threadIdx.y */

template <typename P>
static __global__ void __launch_bounds__(256)
    look_up(rows y, rows w, rows index, int64_t count, int64_t bound, int64_t pieces,
            ds_cuda_fault *faults, const char *name)
{
    for (int64_t r = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; r < count;
         r += (int64_t)gridDim.x * blockDim.y) {
        int64_t at = index_at(index, r);
        bool fine = (uint64_t)at < (uint64_t)bound;
        P *to = (P *)row_at(y, r);
        const P *from = (const P *)row_at(w, fine ? at : 0);

        if (!fine && threadIdx.x == 0)
            fault(faults, name, at, bound);
#pragma unroll 4
        for (int64_t i = threadIdx.x; i < pieces; i += blockDim.x)
            to[i * y.column] = fine ? from[i * w.column] : P{};
    }
}

extern "C" int ds_cuda_embedding(ds_tensor *y, const ds_tensor *w, const ds_tensor *index)
{
    static const char what[] = "embedding"; /* stays: the record of faults points to it */
    int64_t bytes = ds_bytes_of(w->dtype), count = index->numel, bound = w->shape[0];
    const ds_tensor *t[] = {y, w, index};
    rows to, from, at;

    DS_TRY(on_cuda(what, 3, t));
    DS_TRY(ds_check_embedding(y, w, index));
    if (w->dtype == DS_F64)
        return ds_cuda_refuse(what, w->dtype);
    if (y->numel == 0)
        return 0;
    to = rows_of(y, index->ndim);
    from = rows_of(w, 1);
    at = rows_of(index, index->ndim);
    if (rows_plain(to) && rows_plain(from) && w->shape[1] * bytes % 16 == 0)
        return launch(what, look_up<words>, grid_for(count, 8, 16), dim3(32, 8), 0, to, from, at,
                      count, bound, w->shape[1] * bytes / 16, ds_cuda.fault, what);
    return launch(what,
                  bytes == 8   ? look_up<uint64_t>
                  : bytes == 4 ? look_up<uint32_t>
                  : bytes == 2 ? look_up<uint16_t>
                               : look_up<uint8_t>,
                  grid_for(count, 8, 16), dim3(32, 8), 0, to, from, at, count, bound, w->shape[1],
                  ds_cuda.fault, what);
}

/* ---- tokens sorted by index; bad indices become `bound`, and lie at the end */

static __global__ void take_keys(ds_cuda_order to, rows index, int64_t count, int64_t bound,
                                 ds_cuda_fault *faults, const char *name)
{
    for (int64_t i = global_thread(); i < count; i += global_threads()) {
        int64_t at = index_at(index, i);
        bool fine = (uint64_t)at < (uint64_t)bound;

        if (!fine)
            fault(faults, name, at, bound);
        to.keys[i] = (uint64_t)(fine ? at : bound);
        to.at[i] = (uint32_t)i;
    }
}

static int sort_tokens(ds_cuda_order *order, const ds_tensor *index, int64_t bound)
{
    static const char what[] = "embedding_backward";
    ds_cuda_order other;
    int bits = 1;

    while (bound >> bits)
        bits++;
    DS_TRY(ds_cuda_order_room(order, &other, index->numel));
    DS_TRY(launch(what, take_keys, grid_for(index->numel, 256, 8), 256, 0, *order,
                  rows_of(index, index->ndim), index->numel, bound, ds_cuda.fault, what));
    return ds_cuda_order_sort(what, order, &other, index->numel, bits);
}

/* ---- sums of rows by index */

struct summing {
    const uint64_t *key; /* sorted */
    const uint32_t *place;
    rows dw, dy;
    float
        *partial; /* [tiles, 2, columns]: of the run that comes from the tile before, and of the one
                       that begins here and goes on */
    int64_t count, columns;
    uint64_t bound; /* of keys */
    int accumulate;
};

template <int N>
static __device__ inline void write_sum(const summing &s, uint64_t key, int64_t c, float *sum)
{
    void *to = row_at(s.dw, key);
    float had[N];

    if (N == 1)
        c *= s.dw.column;
    if (s.accumulate)
        load_many<N>(had, to, s.dw.dtype, c);
    for (int j = 0; j < N; j++)
        sum[j] += s.accumulate ? had[j] : 0;
    store_many<N>(to, s.dw.dtype, c, sum);
}

/* blockIdx.x: the tile; a thread has N columns. */
template <typename S, int N> static __global__ void __launch_bounds__(128) add_tiles(summing s)
{
    const int ahead = 4;               /* rows that are read before the first is used */
    __shared__ uint64_t key[TILE + 2]; /* with the ones before and after */
    __shared__ uint32_t place[TILE];
    int64_t begin = (int64_t)blockIdx.x * TILE;
    int64_t c = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * N;
    int n = s.count - begin < TILE ? (int)(s.count - begin) : TILE, first = 0;
    float *partial = s.partial + 2 * blockIdx.x * s.columns + c, sum[N] = {};

    for (int i = threadIdx.x; i < n + 2; i += blockDim.x) {
        int64_t at = begin + i - 1;

        key[i] = at < 0 || at >= s.count ? UINT64_MAX : s.key[at];
        if (i < n)
            place[i] = s.place[begin + i];
    }
    __syncthreads();
    if (c >= s.columns)
        return;
    for (int i0 = 0; i0 < n; i0 += ahead) {
        float row[ahead][N];

#pragma unroll
        for (int q = 0; q < ahead; q++)
            if (i0 + q < n)
                load_packs<S, N>(row[q], row_at(s.dy, place[i0 + q]), N == 1 ? c * s.dy.column : c);
#pragma unroll
        for (int q = 0; q < ahead; q++) {
            int i = i0 + q;
            bool from_before = first == 0 && key[0] == key[1];

            if (i >= n || key[i + 1] >= s.bound)
                continue;
            for (int j = 0; j < N; j++)
                sum[j] += row[q][j];
            if (i + 1 < n && key[i + 1] == key[i + 2])
                continue;
            if (from_before || key[i + 1] == key[i + 2])
                store_many<N>(partial + (from_before ? 0 : s.columns), DS_F32, 0, sum);
            else
                write_sum<N>(s, key[i + 1], c, sum);
            first = i + 1;
            for (int j = 0; j < N; j++)
                sum[j] = 0;
        }
    }
}

/* Where in the sorted list `key` would begin: how many are less. */
static __device__ inline int64_t lower_bound(const uint64_t *keys, int64_t n, uint64_t key)
{
    int64_t low = 0;

    while (low < n) {
        int64_t middle = (low + n) / 2;

        if (keys[middle] < key)
            low = middle + 1;
        else
            n = middle;
    }
    return low;
}

/* blockIdx.x: a tile; what begins in it and goes on beyond is added up. */
template <int N> static __global__ void __launch_bounds__(128) add_across(summing s)
{
    int64_t begin = (int64_t)blockIdx.x * TILE, end = begin + TILE, last;
    int64_t c = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * N;
    uint64_t key = end < s.count ? s.key[end] : UINT64_MAX;
    const float *partial = s.partial + 2 * blockIdx.x * s.columns + c;
    float sum[N];

    if (key >= s.bound || s.key[end - 1] != key || c >= s.columns ||
        (begin > 0 && s.key[begin - 1] == key))
        return;
    last = (lower_bound(s.key, s.count, key + 1) - 1) / TILE;
    load_packs<float, N>(sum, partial + s.columns, 0);
#pragma unroll 4
    for (int64_t t = blockIdx.x + 1; t <= last; t++) {
        float more[N];

        load_packs<float, N>(more, s.partial + 2 * t * s.columns + c, 0);
        for (int j = 0; j < N; j++)
            sum[j] += more[j];
    }
    write_sum<N>(s, key, c, sum);
}

/* Rows of dw that no token has become 0: 64 a block of 256 threads. */
template <int N> static __global__ void __launch_bounds__(256) clear_rest(summing s)
{
    __shared__ int has[64];
    int64_t first = (int64_t)blockIdx.x * 64;
    float zero[N] = {};

    if (threadIdx.x < 64) {
        uint64_t key = (uint64_t)first + threadIdx.x;
        int64_t at = lower_bound(s.key, s.count, key);

        has[threadIdx.x] = at < s.count && s.key[at] == key;
    }
    __syncthreads();
    for (int i = threadIdx.x / 32; i < 64 && (uint64_t)first + i < s.bound; i += 8)
        for (int64_t c = threadIdx.x % 32 * N; c < s.columns && !has[i]; c += 32 * N)
            store_many<N>(row_at(s.dw, first + i), s.dw.dtype, N == 1 ? c * s.dw.column : c, zero);
}

template <typename S, int N> static int add_rows(const summing *s)
{
    static const char what[] = "embedding_backward";
    int64_t tiles = (s->count + TILE - 1) / TILE, packs = s->columns / N;
    int threads = packs < 128 ? (int)(packs + 31) / 32 * 32 : 128;
    dim3 grid((unsigned)tiles, (unsigned)((packs + threads - 1) / threads));

    if (!s->accumulate)
        DS_TRY(launch(what, clear_rest<N>, blocks_for((int64_t)s->bound, 64), 256, 0, *s));
    if (tiles == 0)
        return 0;
    DS_TRY(launch(what, add_tiles<S, N>, grid, threads, 0, *s));
    return tiles > 1 ? launch(what, add_across<N>, grid, threads, 0, *s) : 0;
}

template <typename S> static int by_width(summing *s)
{
    constexpr int N = per_16<S>;

    if (rows_plain(s->dw) && rows_plain(s->dy) && s->columns % N == 0)
        return add_rows<S, N>(s);
    return add_rows<S, 1>(s);
}

extern "C" int ds_cuda_embedding_backward(ds_tensor *dw, const ds_tensor *dy,
                                          const ds_tensor *index, int accumulate)
{
    static const char what[] = "embedding_backward";
    int64_t tiles = (index->numel + TILE - 1) / TILE;
    const ds_tensor *t[] = {dw, dy, index};
    summing s = {};
    ds_cuda_order order = {};

    DS_TRY(on_cuda(what, 3, t));
    DS_TRY(ds_check_embedding_backward(dw, dy, index));
    if (dw->dtype > DS_F16)
        return ds_cuda_refuse(what, dw->dtype);
    if (dy->dtype > DS_F16)
        return ds_cuda_refuse(what, dy->dtype);
    if (index->numel > INT_MAX || dw->shape[1] > INT_MAX)
        return ds_fail(DS_EINVAL, "%s: %lld indices of %lld columns; on cuda there may be 2^31 - 1",
                       what, (long long)index->numel, (long long)dw->shape[1]);
    if (dw->numel == 0)
        return 0;
    if (index->numel)
        DS_TRY(sort_tokens(&order, index, dw->shape[0]));
    s.key = order.keys;
    s.place = order.at;
    s.dw = rows_of(dw, 1);
    s.dy = rows_of(dy, index->ndim);
    s.count = index->numel;
    s.columns = dw->shape[1];
    s.bound = (uint64_t)dw->shape[0];
    s.accumulate = accumulate;
    s.partial =
        (float *)ds_cuda_scratch(DS_CUDA_PARTIAL, (size_t)(2 * tiles * s.columns) * sizeof(float));
    if (!s.partial)
        return DS_ENOMEM;
    return DS_BY_FLOAT(what, dy->dtype, S, by_width<S>(&s));
}

/* ---- rotary (Su et al. 2021, "RoFormer"): pairs of a head's elements turned by an angle that grows
 * with the position. Angles are in f64; a table of their cosines and sines serves all heads. */

struct rotation {
    const char *x;
    char *y;
    int64_t x_step[4], y_step[4]; /* in elements */
    int64_t batches, positions, heads, half;
    float *cosine, *sine; /* [positions, half] */
    int interleaved;
};

static __global__ void __launch_bounds__(256)
    turn_table(rotation r, int64_t offset, double base, int inverse)
{
    for (int64_t i = global_thread(); i < r.positions * r.half; i += global_threads()) {
        double frequency = pow(base, -(double)(i % r.half) / (double)r.half);
        double angle = (double)(offset + i / r.half) * frequency;
        float sine = ds_sin_quarter_f32(angle, 0);

        r.cosine[i] = ds_sin_quarter_f32(angle, 1);
        r.sine[i] = inverse ? -sine : sine;
    }
}

/* A thread turns N pairs of one head, in every batch that is its block's (blockIdx.y). */
template <typename S, int N> static __global__ void __launch_bounds__(256) rotate(rotation r)
{
    int64_t packs = r.half / N, id = global_thread();
    int64_t i = id % packs * N, h = id / packs % r.heads, t = id / (packs * r.heads);
    int64_t first = r.interleaved ? 2 * i : i, second = r.interleaved ? first + N : i + r.half;
    float c[N], s[N];

    if (t >= r.positions)
        return;
    load_packs<float, N>(c, r.cosine, t * r.half + i);
    load_packs<float, N>(s, r.sine, t * r.half + i);
    for (int64_t b = blockIdx.y; b < r.batches; b += gridDim.y) {
        const S *x = (const S *)r.x + b * r.x_step[0] + t * r.x_step[1] + h * r.x_step[2];
        S *y = (S *)r.y + b * r.y_step[0] + t * r.y_step[1] + h * r.y_step[2];
        float v[2 * N], turned[2 * N];

        load_packs<S, N>(v, x, first * r.x_step[3]);
        load_packs<S, N>(v + N, x, second * r.x_step[3]);
        if (r.interleaved)
            for (int j = 0; j < N; j++) {
                turned[2 * j] = v[2 * j] * c[j] - v[2 * j + 1] * s[j];
                turned[2 * j + 1] = v[2 * j] * s[j] + v[2 * j + 1] * c[j];
            }
        else
            for (int j = 0; j < N; j++) {
                turned[j] = v[j] * c[j] - v[j + N] * s[j];
                turned[j + N] = v[j] * s[j] + v[j + N] * c[j];
            }
        store_packs<S, N>(y, first * r.y_step[3], turned);
        store_packs<S, N>(y, second * r.y_step[3], turned + N);
    }
}

template <typename S> static int turn(const rotation *r)
{
    constexpr int N = per_16<S>;
    int64_t pairs = r->positions * r->heads * r->half, blocks;
    bool packed = r->half % N == 0 && r->x_step[3] == 1 && r->y_step[3] == 1 && aligned_16(r->x) &&
                  aligned_16(r->y);
    unsigned batches;

    for (int d = 0; d < 3; d++)
        packed = packed && r->x_step[d] % N == 0 && r->y_step[d] % N == 0;
    blocks = (pairs / (packed ? N : 1) + 255) / 256;
    /* Batches share the table's lines: as many to a thread as leave the device full. */
    batches = (unsigned)(ds_cuda.processors * 16 / blocks + 1);
    if (batches > r->batches)
        batches = (unsigned)r->batches;
    return launch("rotary", packed ? rotate<S, N> : rotate<S, 1>, dim3((unsigned)blocks, batches),
                  256, 0, *r);
}

extern "C" int ds_cuda_rotary(ds_tensor *y, const ds_tensor *x, int64_t offset, double base,
                              int interleaved, int inverse)
{
    static const char what[] = "rotary";
    const ds_tensor *t[] = {y, x};
    rotation r = {};
    int64_t entries;

    DS_TRY(on_cuda(what, 2, t));
    DS_TRY(ds_check_rotary(y, x));
    if (x->dtype == DS_F64)
        return ds_cuda_refuse(what, DS_F64);
    if (x->numel == 0)
        return 0;
    r.x = (const char *)x->data;
    r.y = (char *)y->data;
    memcpy(r.x_step, x->stride, sizeof r.x_step);
    memcpy(r.y_step, y->stride, sizeof r.y_step);
    r.batches = x->shape[0];
    r.positions = x->shape[1];
    r.heads = x->shape[2];
    r.half = x->shape[3] / 2;
    r.interleaved = interleaved;
    entries = r.positions * r.half;
    r.cosine = (float *)ds_cuda_scratch(DS_CUDA_A, (size_t)entries * 2 * sizeof(float) + 16);
    if (!r.cosine)
        return DS_ENOMEM;
    r.sine = r.cosine + (entries + 3) / 4 * 4;
    DS_TRY(launch(what, turn_table, grid_for(entries, 256, 8), 256, 0, r, offset, base, inverse));
    return DS_BY_FLOAT(what, x->dtype, S, turn<S>(&r));
}
