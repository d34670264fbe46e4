/* index.cu - reading and writing at indices: gather, scatter, select, one_hot.
 *
 * A wrong index is left in the record of faults, reads as 0 and writes nothing. Writing is made
 * deterministic by sorting the places to be written (order.h), stably: equal places lie behind each
 * other in the order of their indices then, the last one wins (scatter), or they are summed by chunks
 * of fixed length, in f32 or i64, and rounded once. Where each line has one index nothing can meet,
 * and nothing is sorted.
 */
#include "kernels/cuda/order.h"
#include "kernels/cuda/walk.cuh"

/* An index tensor, as kernels read it. */
struct index_of {
    const char *name; /* of the operation */
    ds_cuda_fault *fault;
    int64_t bound;
    int dtype;
};

static index_of index_start(const char *name, const ds_tensor *index, int64_t bound)
{
    return index_of{name, ds_cuda.fault, bound, index->dtype};
}

/* -1: out of range, and told. */
static __device__ inline int64_t index_read(const index_of &index, const char *from, int64_t at)
{
    int64_t i = index.dtype == DS_I64   ? ((const int64_t *)from)[at]
                : index.dtype == DS_I32 ? ((const int32_t *)from)[at]
                                        : ((const uint8_t *)from)[at];

    if ((uint64_t)i < (uint64_t)index.bound)
        return i;
    fault(index.fault, index.name, i, index.bound);
    return -1;
}

/* ---- reading: y = x at the index, along the dimension where x has stride `step` */

/* Operands: y, x without its extent along that dimension, the index. */
template <typename W, int V>
static __global__ void __launch_bounds__(WALK_THREADS)
    gather_kernel(const __grid_constant__ places p, index_of index, int64_t step)
{
    constexpr int U = walk_units<V>;
    uint32_t first = blockIdx.x * (WALK_THREADS * U) + threadIdx.x;
    int64_t at[U][3] = {}, i[U] = {};

#pragma unroll
    for (int u = 0; u < U; u++) {
        if (first + u * WALK_THREADS >= p.units)
            continue;
        place(at[u], p, first + u * WALK_THREADS);
        i[u] = index_read(index, p.op[2].data, at[u][2]);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
        const W *x = (const W *)p.op[1].data + at[u][1] + i[u] * step;
        pack<W, V> part = {};

        if (first + u * WALK_THREADS >= p.units)
            continue;
        if (i[u] >= 0)
            part = load_as_word<pack<W, V>>(x);
        store_as_word((W *)p.op[0].data + at[u][0], part);
    }
}

template <typename W> static int run_gather(walk w, const index_of &index, int64_t step)
{
    constexpr int V = 16 / sizeof(W);
    int last = w.ndim - 1;

    while (w.numel > WALK_MOST) {
        walk half;

        walk_halve(&w, &half);
        DS_TRY(run_gather<W>(half, index, step));
    }
    int packs = walk_packs(&w, V) && w.op[1].stride[last] == 1 && w.op[2].stride[last] == 0 &&
                step % V == 0 && w.numel % V == 0;
    places p = places_of(&w, packs ? V : 1);
    return packs ? launch(w.name, gather_kernel<W, V>,
                          blocks_for(p.units, WALK_THREADS * walk_units<V>), WALK_THREADS, 0, p,
                          index, step)
                 : launch(w.name, gather_kernel<W, 1>,
                          blocks_for(p.units, WALK_THREADS * walk_units<1>), WALK_THREADS, 0, p,
                          index, step);
}

static int select(const char *name, ds_tensor *y, const ds_tensor *x, const ds_tensor *flat,
                  const ds_tensor *index, int dim)
{
    const ds_tensor *t[] = {y, flat, index};
    index_of from = index_start(name, index, x->shape[dim]);
    int64_t step = x->stride[dim];
    walk w;

    DS_TRY(walk_start(&w, name, 3, t, WALK_ANY));
    if (w.numel == 0)
        return 0;
    return DS_BY_BYTES(ds_bytes_of(y->dtype), W, run_gather<W>(w, from, step));
}

extern "C" int ds_cuda_gather(ds_tensor *y, const ds_tensor *x, const ds_tensor *index, int dim)
{
    DS_TRY(ds_check_gather(y, x, index, dim));
    ds_tensor flat = ds_flat_along(x, index, dim, index->shape[dim]);
    return select("gather", y, x, &flat, index, dim);
}

extern "C" int ds_cuda_index_select(ds_tensor *y, const ds_tensor *x, const ds_tensor *index,
                                    int dim)
{
    DS_TRY(ds_check_index_select(y, x, index, dim));
    ds_tensor flat = ds_flat_along(x, x, dim, index->numel), wide = *index;
    wide.ndim = y->ndim;
    for (int i = 0; i < y->ndim; i++) {
        wide.shape[i] = i == dim ? index->numel : 1;
        wide.stride[i] = i == dim ? index->stride[0] : 0;
    }
    return select("index_select", y, x, &flat, &wide, dim);
}

/* ---- writing: places in order */

#define NOWHERE UINT64_MAX /* the key of a wrong index, all its bits of the sort set */

/* What is written where. Items are indices; each has `columns` elements. scatter: one, items are the
 * index's elements in row-major order, operands index, y, x (both without y's extent along the
 * dimension) and the number of the line; a key is line × bound + index. index_add (rows): a slice of
 * y, operands y and x; a key is the index. */
struct writing {
    places p;
    index_of index;
    int rows;
    uint32_t n; /* items */
    int64_t columns, y_step, x_step;
    int64_t index_step; /* rows: from one index to the next */
    const char *index_data;
    uint64_t none; /* NOWHERE, as far as it was sorted */
};

/* Of item i: its key, and where its y and x are. */
static __device__ inline uint64_t item_key(const writing &w, uint32_t i)
{
    int64_t at[4] = {}, v;

    if (w.rows) {
        v = index_read(w.index, w.index_data, i * w.index_step);
        return v < 0 ? NOWHERE : (uint64_t)v;
    }
    place(at, w.p, i);
    v = index_read(w.index, w.p.op[0].data, at[0]);
    return v < 0 ? NOWHERE : (uint64_t)(at[3] * w.index.bound + v);
}

static __global__ void key_kernel(ds_cuda_order out, const __grid_constant__ writing w)
{
    for (int64_t i = global_thread(); i < w.n; i += global_threads()) {
        out.keys[i] = item_key(w, (uint32_t)i) & w.none;
        out.at[i] = (uint32_t)i;
    }
}

/* Where element `column` of an item is read; *y: where it is written. */
static __device__ inline int64_t item_place(const writing &w, uint32_t item, uint64_t key,
                                            int64_t column, int64_t *y)
{
    if (w.rows) {
        int64_t at[2];

        place(at, w.p, (uint32_t)column);
        *y = at[0] + (int64_t)key * w.y_step;
        return at[1] + item * w.x_step;
    }
    int64_t at[3];
    place(at, w.p, item);
    *y = at[1] + (int64_t)(key % (uint64_t)w.index.bound) * w.y_step;
    return at[2];
}

static __device__ inline char *y_data(const writing &w)
{
    return w.p.op[w.rows ? 0 : 1].data;
}
static __device__ inline const char *x_data(const writing &w)
{
    return w.p.op[w.rows ? 1 : 2].data;
}

/* Of each run of equal keys the last one wins. Unsorted where every key is there once: keys NULL. */
template <typename W>
static __global__ void set_kernel(ds_cuda_order order, const __grid_constant__ writing w)
{
    for (int64_t i = global_thread(); i < w.n; i += global_threads()) {
        uint64_t key = order.keys ? order.keys[i] : item_key(w, (uint32_t)i) & w.none;
        uint32_t item = order.keys ? order.at[i] : (uint32_t)i;
        int64_t y, x;

        if (key == w.none || (order.keys && i + 1 < w.n && order.keys[i + 1] == key))
            continue;
        x = item_place(w, item, key, 0, &y);
        ((W *)y_data(w))[y] = ((const W *)x_data(w))[x];
    }
}

/* ---- sums */

template <typename S> struct sum_of {
    using type = int64_t;
};
template <> struct sum_of<float> {
    using type = float;
};
template <> struct sum_of<bf16> {
    using type = float;
};
template <> struct sum_of<f16> {
    using type = float;
};

template <typename S> static __device__ inline void add_to(S *y, typename sum_of<S>::type sum)
{
    *y = narrow<S>::of((typename sum_of<S>::type)widen(*y) + sum);
}

/* Sorted items are cut into chunks of fixed length. Runs of equal keys that lie in one chunk are
 * added to y at once. Of a run over several, `tail` gets what its first chunk has, `lead` what each of
 * the others has: [chunk][column]. */
template <typename S> struct partial {
    typename sum_of<S>::type *lead, *tail;
};

template <typename S>
static __global__ void chunk_kernel(partial<S> out, ds_cuda_order order, int chunk, int64_t threads,
                                    const __grid_constant__ writing w)
{
    S *y = (S *)y_data(w);
    const S *x = (const S *)x_data(w);

    for (int64_t t = global_thread(); t < threads; t += global_threads()) {
        int64_t column = t % w.columns, begin = t / w.columns * chunk, to = 0;
        int64_t end = begin + chunk < w.n ? begin + chunk : w.n;
        int open = begin > 0 && order.keys[begin - 1] == order.keys[begin];
        typename sum_of<S>::type sum = 0;

        for (int64_t i = begin; i < end; i++) {
            uint64_t key = order.keys[i];

            if (key == w.none)
                break;
            sum += widen(x[item_place(w, order.at[i], key, column, &to)]);
            bool done = i + 1 == w.n || order.keys[i + 1] != key;
            if (!done && i + 1 < end)
                continue;
            if (open)
                out.lead[t] = sum;
            else if (done)
                add_to(&y[to], sum);
            else
                out.tail[t] = sum;
            sum = 0;
            open = 0;
        }
    }
}

/* The first of the sorted keys from `i` on that is not `key`. */
static __device__ inline int64_t run_end(const uint64_t *keys, uint64_t key, int64_t i, int64_t n)
{
    while (i < n) {
        int64_t middle = (i + n) / 2;

        if (keys[middle] == key)
            i = middle + 1;
        else
            n = middle;
    }
    return i;
}

/* Runs over several chunks. `lanes` threads, 1 or a warp, share one: its chunks are added lane by
 * lane, and then the lanes, in a fixed order. `threads` is a multiple of that. */
template <typename S>
static __global__ void run_kernel(partial<S> from, ds_cuda_order order, int chunk, int64_t threads,
                                  int lanes, const __grid_constant__ writing w)
{
    int64_t t = global_thread() / lanes, column = t % w.columns, first = t / w.columns, y = 0;
    int64_t begin = first * chunk, next = begin + chunk, end;
    typename sum_of<S>::type sum = 0;
    int lane = threadIdx.x % lanes;

    if (global_thread() >= threads || next >= w.n)
        return;
    uint64_t key = order.keys[next];
    if (key == w.none || order.keys[next - 1] != key || (begin > 0 && order.keys[begin - 1] == key))
        return;
    end = run_end(order.keys, key, next, w.n);
    for (int64_t i = first + 1 + lane; i * chunk < end; i += lanes)
        sum += from.lead[i * w.columns + column];
    for (int k = lanes / 2; k; k /= 2)
        sum += __shfl_xor_sync(0xffffffff, sum, k);
    if (lane == 0) {
        item_place(w, order.at[next], key, column, &y);
        add_to((S *)y_data(w) + y, from.tail[t] + sum);
    }
}

/* Every key is there once. */
template <typename S> static __global__ void add_kernel(const __grid_constant__ writing w)
{
    for (int64_t i = global_thread(); i < w.n; i += global_threads()) {
        uint64_t key = item_key(w, (uint32_t)i) & w.none;
        int64_t y, x;

        if (key == w.none)
            continue;
        x = item_place(w, (uint32_t)i, key, 0, &y);
        add_to((S *)y_data(w) + y, (typename sum_of<S>::type)widen(((const S *)x_data(w))[x]));
    }
}

template <typename S> static int run_sums(const writing &w, const ds_cuda_order *order)
{
    const char *name = w.index.name;
    int chunk = w.columns < 32 ? 128 : 32, lanes = w.columns < 32 ? 32 : 1;
    int64_t chunks = (w.n + chunk - 1) / chunk, threads = chunks * w.columns;
    partial<S> part;

    if (!order)
        return launch(name, add_kernel<S>, grid_for(w.n, 256, 16), 256, 0, w);
    part.lead = (typename sum_of<S>::type *)ds_cuda_scratch(DS_CUDA_PARTIAL, (size_t)(2 * threads) *
                                                                                 sizeof *part.lead);
    if (!part.lead)
        return DS_ENOMEM;
    part.tail = part.lead + threads;
    DS_TRY(launch(name, chunk_kernel<S>, blocks_for(threads, 128), 128, 0, part, *order, chunk,
                  threads, w));
    if (chunks == 1)
        return 0;
    return launch(name, run_kernel<S>, blocks_for(threads * lanes, 128), 128, 0, part, *order,
                  chunk, threads * lanes, lanes, w);
}

static int run_set(const writing &w, const ds_cuda_order *order, int64_t size)
{
    ds_cuda_order none = {NULL, NULL}, items = order ? *order : none;
    const char *name = w.index.name;
    dim3 grid = grid_for(w.n, 256, 16);

    return DS_BY_BYTES(size, W, launch(name, set_kernel<W>, grid, 256, 0, items, w));
}

static int run_add(const writing &w, const ds_cuda_order *order, int dtype)
{
    switch (dtype) {
    case DS_I64:
        return run_sums<int64_t>(w, order);
    case DS_I32:
        return run_sums<int32_t>(w, order);
    case DS_U8:
        return run_sums<uint8_t>(w, order);
    default:
        return DS_BY_FLOAT(w.index.name, dtype, S, run_sums<S>(w, order));
    }
}

/* Sorts the items by where they go, of `places` places, if two may go to the same. */
static int write_at(writing *w, const ds_tensor *y, int64_t places, int unique, int add)
{
    ds_cuda_order order, other;
    int bits = 1;

    while (bits < 64 && (uint64_t)places >> bits)
        bits++; /* so that `none` is above all keys */
    w->none = bits < 64 ? ((uint64_t)1 << bits) - 1 : NOWHERE;
    if (!unique) {
        DS_TRY(ds_cuda_order_room(&order, &other, w->n));
        DS_TRY(launch(w->index.name, key_kernel, grid_for(w->n, 256, 16), 256, 0, order, *w));
        DS_TRY(ds_cuda_order_sort(w->index.name, &order, &other, w->n, bits));
    }
    return add ? run_add(*w, unique ? NULL : &order, y->dtype)
               : run_set(*w, unique ? NULL : &order, ds_bytes_of(y->dtype));
}

static int too_many(const char *name, int64_t n)
{
    return ds_fail(DS_EINVAL, "%s: %lld indices are more than 2^31; go by parts", name,
                   (long long)n);
}

static int scatter(const char *name, ds_tensor *y, const ds_tensor *index, const ds_tensor *x,
                   int dim, int add)
{
    DS_TRY(ds_check_scatter(name, y, index, x, dim));
    if (add && (y->dtype == DS_F64 || y->dtype == DS_BOOL))
        return ds_cuda_refuse(name, y->dtype);
    if (index->numel > INT32_MAX)
        return too_many(name, index->numel);
    ds_tensor to = ds_flat_along(y, index, dim, index->shape[dim]), from = *x, line = *index;
    const ds_tensor *t[] = {index, &to, &from, &line};
    int64_t lines = 1;
    for (int i = index->ndim - 1; i >= 0; i--) {
        from.shape[i] = index->shape[i];
        line.stride[i] = i == dim ? 0 : lines;
        lines *= i == dim ? 1 : index->shape[i];
    }
    writing job = {};
    walk w;
    DS_TRY(walk_start(&w, name, 4, t, WALK_ROW_MAJOR));
    if (index->numel == 0)
        return 0;
    job.p = places_of(&w, 1);
    job.index = index_start(name, index, y->shape[dim]);
    job.n = (uint32_t)index->numel;
    job.columns = 1;
    job.y_step = y->stride[dim];
    return write_at(&job, y, lines * y->shape[dim], index->shape[dim] == 1, add);
}

extern "C" int ds_cuda_scatter(ds_tensor *y, const ds_tensor *index, const ds_tensor *x, int dim)
{
    return scatter("scatter", y, index, x, dim, 0);
}

extern "C" int ds_cuda_scatter_add(ds_tensor *y, const ds_tensor *index, const ds_tensor *x,
                                   int dim)
{
    return scatter("scatter_add", y, index, x, dim, 1);
}

extern "C" int ds_cuda_index_add(ds_tensor *y, const ds_tensor *index, const ds_tensor *x, int dim)
{
    DS_TRY(ds_check_index_add(y, index, x, dim));
    if (y->dtype == DS_F64 || y->dtype == DS_BOOL)
        return ds_cuda_refuse("index_add", y->dtype);
    ds_tensor to = ds_flat_along(y, y, dim, 1), from = ds_flat_along(x, x, dim, 1);
    const ds_tensor *t[] = {&to, &from}, *where = index;
    writing job = {};
    walk w;
    DS_TRY(on_cuda("index_add", 1, &where));
    DS_TRY(walk_start(&w, "index_add", 2, t, WALK_ANY));
    if (x->numel == 0)
        return 0;
    if (index->numel > INT32_MAX || w.numel > INT32_MAX)
        return too_many("index_add", index->numel > w.numel ? index->numel : w.numel);
    job.p = places_of(&w, 1);
    job.index = index_start("index_add", index, y->shape[dim]);
    job.rows = 1;
    job.n = (uint32_t)index->numel;
    job.columns = w.numel;
    job.y_step = y->stride[dim];
    job.x_step = x->stride[dim];
    job.index_data = (const char *)index->data;
    job.index_step = index->stride[0];
    return write_at(&job, y, y->shape[dim], 0, 1);
}

/* ---- one_hot: y [… classes] is the index compared with the class */

/* Operand 2 is where y lies, as if it had one line: how far from its start is the class. */
static __global__ void one_hot_kernel(const __grid_constant__ places p, index_of index,
                                      const char *start)
{
    for (int64_t unit = global_thread(); unit < p.units; unit += global_threads()) {
        int64_t at[3];

        place(at, p, (uint32_t)unit);
        int64_t number = (p.op[2].data - start) / (int64_t)sizeof(int64_t) + at[2];
        ((int64_t *)p.op[0].data)[at[0]] = index_read(index, p.op[1].data, at[1]) == number;
    }
}

static int run_one_hot(walk w, const index_of &index, const char *start)
{
    while (w.numel > WALK_MOST) {
        walk half;

        walk_halve(&w, &half);
        DS_TRY(run_one_hot(half, index, start));
    }
    places p = places_of(&w, 1);
    return launch("one_hot", one_hot_kernel, grid_for(p.units, 512, 32), 256, 0, p, index, start);
}

extern "C" int ds_cuda_one_hot(ds_tensor *y, const ds_tensor *index)
{
    int last = y->ndim - 1;

    ds_tensor line, number = *y;
    const ds_tensor *t[] = {y, &line, &number};

    DS_TRY(ds_check_one_hot(&line, y, index));
    for (int i = 0; i <= last; i++)
        number.stride[i] = i == last; /* its offset is the class */
    walk w;
    DS_TRY(walk_start(&w, "one_hot", 3, t, WALK_ANY));
    if (w.numel == 0)
        return 0;
    return run_one_hot(w, index_start("one_hot", index, y->shape[last]), w.op[2].data);
}
