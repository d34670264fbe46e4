/* copy.cu - copying between any strides and dtypes; fill, arange, triangle.
 *
 * Dense to dense is CUDA's own copy; where the source's rows are the output's columns, tiles go
 * through shared memory, so that both sides are read and written along their lines; the rest is a
 * walk (walk.cuh). Real numbers become integers towards zero, saturated, NaN as 0, as on the CPU.
 * f64 is moved, and never converted: the runner does that on the CPU.
 */
#include "kernels/cuda/walk.cuh"

/* ---- any dtype to any other, by way of f64, which holds them all but large i64 */

static __device__ inline double load_any(const char *from, int dtype)
{
    switch (dtype) {
    case DS_F32:
        return *(const float *)from;
    case DS_BF16:
        return to_float(*(const bf16 *)from);
    case DS_F16:
        return to_float(*(const f16 *)from);
    case DS_I64:
        return (double)*(const int64_t *)from;
    case DS_I32:
        return *(const int32_t *)from;
    default:
        return *(const uint8_t *)from;
    }
}

static __device__ inline int64_t saturate(double x, double low, double end, int64_t last)
{
    return x != x ? 0 : x >= end ? last : x < low ? (int64_t)low : (int64_t)x;
}

static __device__ inline void store_any(char *to, int dtype, double x)
{
    switch (dtype) {
    case DS_F32:
        *(float *)to = (float)x;
        return;
    case DS_BF16:
        *(bf16 *)to = from_float<bf16>(to_odd(x));
        return;
    case DS_F16:
        *(f16 *)to = from_float<f16>(to_odd(x));
        return;
    case DS_I64:
        *(int64_t *)to = saturate(x, -0x1p63, 0x1p63, INT64_MAX);
        return;
    case DS_I32:
        *(int32_t *)to = (int32_t)saturate(x, -0x1p31, 0x1p31, INT32_MAX);
        return;
    case DS_U8:
        *(uint8_t *)to = x >= 255 ? 255 : x > 0 ? (uint8_t)x : 0; /* NaN: 0 */
        return;
    default:
        *(uint8_t *)to = x != 0;
    }
}

static __global__ void __launch_bounds__(WALK_THREADS)
    convert_kernel(const __grid_constant__ places p, int to, int to_size, int from, int from_size)
{
    constexpr int U = walk_units<1>;
    uint32_t first = blockIdx.x * (WALK_THREADS * U) + threadIdx.x;
    int64_t at[U][2] = {};
    double x[U] = {};

#pragma unroll
    for (int u = 0; u < U; u++) {
        if (first + u * WALK_THREADS >= p.units)
            continue;
        place(at[u], p, first + u * WALK_THREADS);
        x[u] = load_any(p.op[1].data + at[u][1] * from_size, from);
    }
#pragma unroll
    for (int u = 0; u < U; u++)
        if (first + u * WALK_THREADS < p.units)
            store_any(p.op[0].data + at[u][0] * to_size, to, x[u]);
}

static int convert_any(walk w, int to, int from)
{
    while (w.numel > WALK_MOST) {
        walk half;

        walk_halve(&w, &half);
        DS_TRY(convert_any(half, to, from));
    }
    places p = places_of(&w, 1);
    return launch(w.name, convert_kernel, blocks_for(p.units, WALK_THREADS * walk_units<1>),
                  WALK_THREADS, 0, p, to, (int)w.op[0].size, from, (int)w.op[1].size);
}

/* ---- the conversions that training makes: by packs */

struct to_f32_op {
    static constexpr int inputs = 1;

    template <typename W> __device__ float operator()(W x) const
    {
        return (float)x;
    }
};

template <typename Y> static int convert_to(const walk &w, int to, int from)
{
    to_f32_op f;

    switch (from) {
    case DS_F32:
        return walk_run<Y, float, uint8_t, uint8_t>(w, f, f);
    case DS_BF16:
        return walk_run<Y, bf16, uint8_t, uint8_t>(w, f, f);
    case DS_F16:
        return walk_run<Y, f16, uint8_t, uint8_t>(w, f, f);
    case DS_U8:
    case DS_BOOL:
        return walk_run<Y, uint8_t, uint8_t, uint8_t>(w, f, f);
    default:
        return convert_any(w, to, from);
    }
}

static int convert(const walk &w, int to, int from)
{
    switch (to) {
    case DS_F32:
        return convert_to<float>(w, to, from);
    case DS_BF16:
        return convert_to<bf16>(w, to, from);
    case DS_F16:
        return convert_to<f16>(w, to, from);
    default:
        return convert_any(w, to, from);
    }
}

/* ---- the same dtype: bits */

struct same_op {
    static constexpr int inputs = 1;

    template <typename W> __device__ W operator()(W x) const
    {
        return x;
    }
};

static int move(const walk &w, int64_t size)
{
    same_op f;

    return DS_BY_BYTES(size, W, walk_run<W, W, uint8_t, uint8_t>(w, f, f));
}

/* ---- tiles: y's rows are x's columns */

#define TILE_THREADS 256
template <typename W> constexpr int tile_side = sizeof(W) == 8 ? 32 : 64;

/* Dimensions of the walk: others, then `down`, along which x is dense, then `across`, along which y
 * is. places count tiles; x_packs and y_packs: that side is aligned for packs of 16 bytes. */
struct tiles {
    places p;
    int64_t rows, columns; /* sizes of `down` and `across` */
    int64_t y_row, x_row;  /* strides: y's of `down`, x's of `across` */
    int x_packs, y_packs;
};

/* Part of the tile in shared memory, V elements at a time: element [r][c] of x's side, which is dense
 * along c and has `limit` of them. */
template <typename W, int V>
static __device__ inline void tile_load(W *tile, const W *x, int64_t row, int rows, int columns)
{
    constexpr int S = tile_side<W>, pitch = S + 4 / (sizeof(W) < 4 ? sizeof(W) : 4);

    for (int i = threadIdx.x; i < S * S / V; i += TILE_THREADS) {
        int r = i / (S / V), c = i % (S / V) * V;

        if (r >= rows || c >= columns)
            continue;
        pack<W, V> part = load_as_word<pack<W, V>>(x + r * row + c);
        for (int k = 0; k < V; k++)
            tile[r * pitch + c + k] = part.of[k];
    }
}

/* The other way, transposed: element [c][r] of the tile becomes y's [r][c]. */
template <typename W, int V>
static __device__ inline void tile_store(W *y, const W *tile, int64_t row, int rows, int columns)
{
    constexpr int S = tile_side<W>, pitch = S + 4 / (sizeof(W) < 4 ? sizeof(W) : 4);

    for (int i = threadIdx.x; i < S * S / V; i += TILE_THREADS) {
        int r = i / (S / V), c = i % (S / V) * V;
        pack<W, V> part;

        if (r >= rows || c >= columns)
            continue;
        for (int k = 0; k < V; k++)
            part.of[k] = tile[(c + k) * pitch + r];
        store_as_word(y + r * row + c, part);
    }
}

template <typename W>
static __global__ void __launch_bounds__(TILE_THREADS) tile_kernel(const __grid_constant__ tiles t)
{
    constexpr int S = tile_side<W>, V = 16 / sizeof(W);
    constexpr int pitch = S + 4 / (sizeof(W) < 4 ? sizeof(W) : 4); /* a row begins a bank further */
    __shared__ W tile[S * pitch];
    uint32_t across = (uint32_t)t.p.size[t.p.ndim - 1].d;
    uint32_t down = (uint32_t)t.p.size[t.p.ndim - 2].d;
    int64_t top = blockIdx.x / across % down * S, left = (int64_t)(blockIdx.x % across) * S;
    int rows = (int)(t.rows - top < S ? t.rows - top : S);
    int columns = (int)(t.columns - left < S ? t.columns - left : S);
    int64_t at[2];

    place(at, t.p, blockIdx.x);
    W *y = (W *)t.p.op[0].data + at[0];
    const W *x = (const W *)t.p.op[1].data + at[1];
    if (t.x_packs)
        tile_load<W, V>(tile, x, t.x_row, columns, rows);
    else
        tile_load<W, 1>(tile, x, t.x_row, columns, rows);
    __syncthreads();
    if (t.y_packs)
        tile_store<W, V>(y, tile, t.y_row, rows, columns);
    else
        tile_store<W, 1>(y, tile, t.y_row, rows, columns);
}

/* The dimension along which x is dense while y's last one is not; -1: there is none worth it. */
static int column_dim(const walk *w)
{
    int last = w->ndim - 1;

    if (w->op[0].stride[last] != 1 || w->op[1].stride[last] == 1 || w->op[1].stride[last] == 0 ||
        w->shape[last] < 8)
        return -1;
    for (int i = 0; i < last; i++)
        if (w->op[1].stride[i] == 1 && w->shape[i] >= 8)
            return i;
    return -1;
}

/* Whether operand k, dense along dimension `along`, can be moved by packs of 16 bytes. */
static int side_packs(const walk *w, int k, int along)
{
    int64_t v = 16 / w->op[k].size;
    int fits = aligned_16(w->op[k].data) && w->shape[along] % v == 0;

    for (int i = 0; i < w->ndim; i++)
        fits &= i == along || w->op[k].stride[i] % v == 0;
    return fits;
}

template <typename W> static int run_tiles(walk w, int dim)
{
    constexpr int S = tile_side<W>;
    int last = w.ndim - 1;
    tiles t;

    for (int i = dim; i < last - 1; i++) /* `down` comes before the last */
        walk_swap(&w, i, i + 1);
    t.rows = w.shape[last - 1];
    t.columns = w.shape[last];
    t.y_row = w.op[0].stride[last - 1];
    t.x_row = w.op[1].stride[last];
    t.x_packs = side_packs(&w, 1, last - 1);
    t.y_packs = side_packs(&w, 0, last);
    w.numel = w.numel / t.rows / t.columns;
    for (int i = last - 1; i <= last; i++) {
        w.shape[i] = (w.shape[i] + S - 1) / S;
        w.numel *= w.shape[i];
        for (int k = 0; k < 2; k++)
            w.op[k].stride[i] *= S;
    }
    t.p = places_of(&w, 1);
    return launch("copy", tile_kernel<W>, blocks_for(w.numel, 1), TILE_THREADS, 0, t);
}

static int transpose(const walk &w, int dim)
{
    return DS_BY_BYTES(w.op[0].size, W, run_tiles<W>(w, dim));
}

/* ---- kernels */

extern "C" int ds_cuda_copy(ds_tensor *y, const ds_tensor *x)
{
    const ds_tensor *t[] = {y, x};
    int64_t size = ds_bytes_of(y->dtype);
    walk w;
    int dim;

    DS_TRY(walk_start(&w, "copy", 2, t, WALK_ANY));
    if (w.numel == 0)
        return 0;
    if (y->dtype != x->dtype && (y->dtype == DS_F64 || x->dtype == DS_F64))
        return ds_cuda_refuse("copy", DS_F64);
    if (y->dtype != x->dtype)
        return convert(w, y->dtype, x->dtype);
    if (w.ndim == 1 && w.op[0].stride[0] == 1 && w.op[1].stride[0] == 1)
        return y->data == x->data
                   ? 0
                   : ds_cuda_check(cudaMemcpyAsync(y->data, x->data, (size_t)(w.numel * size),
                                                   cudaMemcpyDeviceToDevice, ds_cuda.stream),
                                   "copy");
    dim = column_dim(&w);
    return dim < 0 ? move(w, size) : transpose(w, dim);
}

extern "C" int ds_cuda_fill(ds_tensor *y, double value)
{
    const ds_tensor *t[] = {y, NULL};
    uint64_t bits;
    walk w;

    if (y->dtype == DS_F64)
        return ds_cuda_refuse("fill", y->dtype);
    DS_TRY(walk_bits(&bits, "fill", value, y->dtype));
    DS_TRY(walk_start(&w, "fill", 2, t, WALK_ANY));
    w.number = bits;
    return move(w, ds_bytes_of(y->dtype));
}

/* Not fused: the CPU's bits. */
static __device__ inline double step_of(double start, double step, int64_t i)
{
#ifdef __CUDA_ARCH__
    return __dadd_rn(start, __dmul_rn((double)i, step));
#else
    return start + (double)i * step;
#endif
}

static __global__ void arange_kernel(char *y, int64_t bytes, int dtype, int64_t n, double start,
                                     double step)
{
    for (int64_t i = global_thread(); i < n; i += global_threads())
        store_any(y + i * bytes, dtype, step_of(start, step, i));
}

extern "C" int ds_cuda_arange(ds_tensor *y, double start, double step)
{
    const ds_tensor *t[] = {y};

    DS_TRY(on_cuda("arange", 1, t));
    DS_TRY(ds_check_arange(y));
    if (y->dtype == DS_F64)
        return ds_cuda_refuse("arange", y->dtype);
    if (y->numel == 0)
        return 0;
    return launch("arange", arange_kernel, grid_for(y->numel, 1024, 16), 256, 0, (char *)y->data,
                  y->stride[0] * ds_bytes_of(y->dtype), y->dtype, y->numel, start, step);
}

/* ---- triangle: a warp takes a row of a matrix, and keeps its columns [low, high); 0 is all bits 0 */

#define TRIANGLE_ROWS 8 /* of a block */

template <typename W>
static __global__ void triangle_kernel(const __grid_constant__ places p, int64_t lines,
                                       int64_t rows, int64_t columns, int64_t diagonal, int upper)
{
    int last = p.ndim - 1;
    int64_t ys = p.op[0].inner, xs = p.op[1].inner;

    for (int64_t line = (int64_t)blockIdx.x * TRIANGLE_ROWS + threadIdx.y; line < lines;
         line += (int64_t)gridDim.x * TRIANGLE_ROWS) {
        int64_t bound = line % rows + diagonal, low = upper ? bound : 0;
        int64_t high = upper ? columns : bound + 1, rest = line;
        W *y = (W *)p.op[0].data;
        const W *x = (const W *)p.op[1].data;

        for (int d = last - 1; d >= 0; d--) {
            int64_t i = d ? rest % p.size[d].d : rest;

            y += i * p.op[0].stride[d];
            x += i * p.op[1].stride[d];
            rest /= p.size[d].d;
        }
        for (int64_t j = threadIdx.x; j < columns; j += 32)
            y[j * ys] = j >= low && j < high ? x[j * xs] : (W)0;
    }
}

template <typename W>
static int run_triangle(const walk &w, int64_t rows, int64_t columns, int diagonal, int upper)
{
    places p = places_of(&w, 1);
    int64_t lines = w.numel / columns;

    return launch("triangle", triangle_kernel<W>, grid_for(lines, TRIANGLE_ROWS, 16),
                  dim3(32, TRIANGLE_ROWS), 0, p, lines, rows, columns, (int64_t)diagonal, upper);
}

extern "C" int ds_cuda_triangle(ds_tensor *y, const ds_tensor *x, int diagonal, int upper)
{
    const ds_tensor *t[] = {y, x};
    int64_t rows, columns;
    walk w;

    DS_TRY(ds_check_triangle(y, x));
    DS_TRY(walk_start(&w, "triangle", 2, t, WALK_MATRIX));
    if (y->numel == 0)
        return 0;
    rows = y->shape[y->ndim - 2];
    columns = y->shape[y->ndim - 1];
    return DS_BY_BYTES(ds_bytes_of(y->dtype), W,
                       run_triangle<W>(w, rows, columns, diagonal, upper));
}
