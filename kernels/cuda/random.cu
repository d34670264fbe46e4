/* random.cu - uniform, normal, integer random numbers and dropout, from Philox (philox.h): the CPU's
 * bits.
 *
 * Element i of a tensor, counted in row-major order whatever its strides, is lane i % 4 of the block
 * at counter offset + i / 4. So a thread makes four elements at a time, and stores 16 bytes where the
 * tensor is dense. Products and sums are not fused.
 */
#include "kernels/cuda/walk.cuh"
#include "kernels/philox.h"

/* ---- distributions: four elements from the words of a block; v holds x in dropout */

struct uniform_make {
    using value = float;
    float low, width;

    __device__ void operator()(float *v, const ds_philox_block &block) const
    {
        for (int i = 0; i < 4; i++)
            v[i] = DS_PLAIN_FMA(width, ds_uniform_f32(block.lane[i]), low);
    }
};

struct normal_make {
    using value = float;
    float mean, std;

    __device__ void operator()(float *v, const ds_philox_block &block) const
    {
        for (int i = 0; i < 4; i += 2) {
            float z0, z1;

            ds_normal_pair(&z0, &z1, block.lane[i], block.lane[i + 1]);
            v[i] = DS_PLAIN_FMA(std, z0, mean);
            v[i + 1] = DS_PLAIN_FMA(std, z1, mean);
        }
    }
};

/* Keeps an element when its uniform number, a multiple of 2^-24, is p or more. */
struct dropout_make {
    using value = float;
    float scale;
    uint32_t least; /* ceil(2^24 p) */

    __device__ void operator()(float *v, const ds_philox_block &block) const
    {
        for (int i = 0; i < 4; i++)
            v[i] = block.lane[i] >> 8 >= least ? v[i] * scale : 0.0f;
    }
};

struct integer_make {
    using value = int64_t;
    int64_t low;
    uint64_t range;

    __device__ void operator()(int64_t *v, const ds_philox_block &block) const
    {
        for (int i = 0; i < 4; i++)
            v[i] = low + (int64_t)((uint64_t)block.lane[i] * range >> 32);
    }
};

/* ---- dense: a thread makes packs of 16 bytes */

#define PACKS 2 /* of a thread */

/* x NULL: there is none. n: a multiple of nothing; the last pack may be cut. */
template <typename Make, typename S>
static __global__ void __launch_bounds__(256)
    dense_kernel(S *y, const S *x, Make make, uint64_t seed, uint64_t offset, int64_t n)
{
    constexpr int V = per_16<S>;
    int64_t first = (int64_t)blockIdx.x * (256 * PACKS) + threadIdx.x;
    pack<S, V> part[PACKS] = {};

#pragma unroll
    for (int u = 0; u < PACKS; u++) {
        int64_t i = (first + u * 256) * V;

        if (x && i + V <= n)
            part[u] = load_as_word<pack<S, V>>(x + i);
        for (int k = 0; x && i + V > n && i + k < n; k++)
            part[u].of[k] = x[i + k];
    }
#pragma unroll
    for (int u = 0; u < PACKS; u++) {
        int64_t i = (first + u * 256) * V;
        float v[V];

#pragma unroll
        for (int k = 0; k < V; k++)
            v[k] = to_float(part[u].of[k]);
#pragma unroll
        for (int k = 0; k < V; k += 4)
            make(v + k, ds_philox(seed, offset + (uint64_t)(i + k) / 4));
#pragma unroll
        for (int k = 0; k < V; k++)
            part[u].of[k] = from_float<S>(v[k]);
        if (i + V <= n)
            store_as_word(y + i, part[u]);
        for (int k = 0; i + V > n && i + k < n; k++)
            y[i + k] = part[u].of[k];
    }
}

/* ---- any strides, and integers */

static __device__ inline void load(float *v, const char *from, int dtype, int64_t at)
{
    *v = dtype == DS_F32    ? ((const float *)from)[at]
         : dtype == DS_BF16 ? to_float(((const bf16 *)from)[at])
                            : to_float(((const f16 *)from)[at]);
}
static __device__ inline void store(char *to, int dtype, int64_t at, float v)
{
    if (dtype == DS_F32)
        ((float *)to)[at] = v;
    else if (dtype == DS_BF16)
        ((bf16 *)to)[at] = from_float<bf16>(v);
    else
        ((f16 *)to)[at] = from_float<f16>(v);
}

static __device__ inline void load(int64_t *, const char *, int, int64_t)
{
}
static __device__ inline void store(char *to, int dtype, int64_t at, int64_t v)
{
    if (dtype == DS_I64)
        ((int64_t *)to)[at] = v;
    else if (dtype == DS_I32)
        ((int32_t *)to)[at] = (int32_t)v;
    else
        ((uint8_t *)to)[at] = (uint8_t)v;
}

template <typename Make>
static __global__ void strided_kernel(const __grid_constant__ places p, Make make, int dtype,
                                      uint64_t seed, uint64_t offset, int64_t n)
{
    for (int64_t i = global_thread() * 4; i < n; i += global_threads() * 4) {
        typename Make::value v[4] = {};
        int64_t at[4][2];

        for (int k = 0; k < 4 && i + k < n; k++) {
            place_of_many(at[k], p, i + k, n);
            if (p.op[1].data)
                load(&v[k], p.op[1].data, dtype, at[k][1]);
        }
        make(v, ds_philox(seed, offset + (uint64_t)i / 4));
        for (int k = 0; k < 4 && i + k < n; k++)
            store(p.op[0].data, dtype, at[k][0], v[k]);
    }
}

template <typename Make>
static int run_strided(const walk &w, int dtype, Make make, uint64_t seed, uint64_t offset)
{
    places p = places_of(&w, 1);

    return launch(w.name, strided_kernel<Make>, grid_for(w.numel, 1024, 16), 256, 0, p, make, dtype,
                  seed, offset, w.numel);
}

/* x NULL: there is none. */
template <typename Make>
static int run(const char *name, ds_tensor *y, const ds_tensor *x, Make make, uint64_t seed,
               uint64_t offset)
{
    const ds_tensor *t[] = {y, x};
    int dense = 1;
    walk w;

    if (y->dtype == DS_F64)
        return ds_cuda_refuse(name, DS_F64);
    DS_TRY(walk_start(&w, name, 2, t, WALK_ROW_MAJOR));
    if (w.numel == 0)
        return 0;
    for (int k = 0; k < 2; k++)
        dense &= !w.op[k].data || (w.op[k].stride[0] == 1 && aligned_16(w.op[k].data));
    if (w.ndim > 1 || !dense)
        return run_strided(w, y->dtype, make, seed, offset);
    return DS_BY_FLOAT(name, y->dtype, S,
                       launch(name, dense_kernel<Make, S>,
                              blocks_for(w.numel, 256 * PACKS * per_16<S>), 256, 0, (S *)y->data,
                              x ? (const S *)x->data : (const S *)NULL, make, seed, offset,
                              w.numel));
}

extern "C" int ds_cuda_uniform(ds_tensor *y, double low, double high, uint64_t seed,
                               uint64_t offset)
{
    DS_TRY(ds_check_random("uniform", y, low, high));
    return run("uniform", y, NULL, uniform_make{(float)low, (float)(high - low)}, seed, offset);
}

extern "C" int ds_cuda_normal(ds_tensor *y, double mean, double std, uint64_t seed, uint64_t offset)
{
    DS_TRY(ds_check_random("normal", y, mean, std));
    return run("normal", y, NULL, normal_make{(float)mean, (float)std}, seed, offset);
}

extern "C" int ds_cuda_randint(ds_tensor *y, int64_t low, int64_t high, uint64_t seed,
                               uint64_t offset)
{
    const ds_tensor *t[] = {y};
    uint64_t range = (uint64_t)high - (uint64_t)low;
    walk w;

    DS_TRY(ds_check_randint(y, low, high));
    DS_TRY(walk_start(&w, "randint", 1, t, WALK_ROW_MAJOR));
    return w.numel == 0 ? 0 : run_strided(w, y->dtype, integer_make{low, range}, seed, offset);
}

extern "C" int ds_cuda_dropout(ds_tensor *y, const ds_tensor *x, double p, uint64_t seed,
                               uint64_t offset)
{
    DS_TRY(ds_check_dropout(y, x, p));
    return run("dropout", y, x, dropout_make{(float)(1 / (1 - p)), (uint32_t)ceil(p * 0x1p24)},
               seed, offset);
}
