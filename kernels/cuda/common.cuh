/* common.cuh - what every CUDA kernel file includes first: names, storage types, launches, and sums
 * over warps and blocks.
 *
 * The files are plain CUDA C++ that a host compiler can read as well: launches go through launch(),
 * shared memory of variable size through DS_SHARED. tests/simt runs them so, thread by thread.
 */
#ifndef DS_CUDA_COMMON_CUH
#define DS_CUDA_COMMON_CUH

#include "kernels/cuda/device.h"
#include "kernels/scalar.h"

#define DS_CUDA(name) ds_cuda_##name

/* table.cu says `weak` here: a kernel that nobody wrote is an empty slot. */
#ifndef DS_CUDA_LINKAGE
#define DS_CUDA_LINKAGE
#endif

extern "C" {
#define C const ds_tensor *
#define T ds_tensor *
#define DS_UNARY(name, saved)                                                                      \
    DS_CUDA_LINKAGE int DS_CUDA(name)(T y, C x);                                                   \
    DS_CUDA_LINKAGE int DS_CUDA(name##_backward)(T dx, C dy, C s);
#define DS_BINARY(name)                                                                            \
    DS_CUDA_LINKAGE int DS_CUDA(name)(T y, C a, C b);                                              \
    DS_CUDA_LINKAGE int DS_CUDA(name##_scalar)(T y, C x, double s, int flip);
#define DS_COMPARE(name) DS_BINARY(name)
#define DS_KERNEL(name, signature) DS_CUDA_LINKAGE int DS_CUDA(name) signature;
#include "kernels/ops.def"
#undef C
#undef T
}

/* ---- storage types. f32 is float; the others are bits with a type of their own. */

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

static __device__ inline float to_float(float x)
{
    return x;
}
static __device__ inline float to_float(bf16 x)
{
    return ds_bf16_to_f32(x.bits);
}
static __device__ inline float to_float(f16 x)
{
#ifdef __CUDA_ARCH__
    float y;

    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    return ds_f16_to_f32(x.bits);
#endif
}

/* In what sums are: f32 for real numbers, 64 bits for integers. */
template <typename S> static __device__ inline float widened(S x)
{
    return to_float(x);
}
static __device__ inline int64_t widened(int64_t x)
{
    return x;
}
static __device__ inline int64_t widened(int32_t x)
{
    return x;
}
static __device__ inline int64_t widened(uint8_t x)
{
    return x;
}

/* Rounded to nearest, ties to even, as the CPU's. */
template <typename S> static __device__ inline S from_float(float x);
template <> __device__ inline float from_float<float>(float x)
{
    return x;
}
template <> __device__ inline bf16 from_float<bf16>(float x)
{
#ifdef __CUDA_ARCH__
    uint16_t y;

    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return bf16{y};
#else
    return bf16{ds_f32_to_bf16(x)};
#endif
}
template <> __device__ inline f16 from_float<f16>(float x)
{
#ifdef __CUDA_ARCH__
    uint16_t y;

    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return f16{y};
#else
    return f16{ds_f32_to_f16(x)};
#endif
}

/* N values that lie together, moved as one: 16 bytes are what memory likes best. */
template <typename S, int N> struct alignas(sizeof(S) * N) pack {
    S of[N];
};

/* How many of them make 16 bytes. */
template <typename S> constexpr int per_16 = 16 / (int)sizeof(S);

static inline bool aligned_16(const void *p)
{
    return ((uintptr_t)p & 15) == 0;
}

/* ---- by dtype: DS_BY_FLOAT(x->dtype, S, f<S>(…)) runs the expression with S the storage type, and is
 * its value; DS_EINVAL for any other dtype. */
#define DS_BY_FLOAT(name, dtype_, S, ...)                                                          \
    [&]() -> int {                                                                                 \
        switch (dtype_) {                                                                          \
        case DS_F32: {                                                                             \
            using S = float;                                                                       \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        case DS_BF16: {                                                                            \
            using S = bf16;                                                                        \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        case DS_F16: {                                                                             \
            using S = f16;                                                                         \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        default:                                                                                   \
            return ds_cuda_refuse(name, dtype_);                                                   \
        }                                                                                          \
    }()

static inline int ds_cuda_refuse(const char *name, int dtype)
{
    return ds_fail(DS_EINVAL, "%s: not for %s on cuda%s", name, ds_name_of(dtype),
                   dtype == DS_F64 ? "; f64 is the CPU's" : "");
}

/* t[0] is the result; NULL: there is none. */
static inline int on_cuda(const char *name, int count, const ds_tensor *const *t)
{
    for (int k = 0; k < count; k++)
        if (t[k] && t[k]->device != DS_CUDA)
            return ds_fail(DS_EINVAL, "%s: %s is not on cuda; use :to(\"cuda\")", name,
                           k ? "an operand" : "the result");
    return 0;
}

/* ---- launches */

#ifdef DS_SIMT
#define DS_SHARED(type, name) type *name = (type *)simt::dynamic_shared()
#else
#define DS_SHARED(type, name)                                                                      \
    extern __shared__ char ds_shared_bytes[];                                                      \
    type *name = (type *)ds_shared_bytes
#endif

/* Queues a kernel: blocks and threads of at least one each, `shared` bytes of dynamic shared memory.
 * `name` is the operation's, for messages. */
template <typename... P, typename... A>
static inline int launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block,
                         size_t shared, A... args)
{
    if (shared > 48 << 10)
        DS_TRY(ds_cuda_check(cudaFuncSetAttribute((const void *)kernel,
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  (int)shared),
                             name));
#ifdef DS_SIMT
    simt::launch(ds_cuda.stream, name, grid, block, shared, [=] { kernel((P)args...); });
#else
    kernel<<<grid, block, shared, ds_cuda.stream>>>((P)args...);
#endif
    return ds_cuda_launched(name);
}

/* Blocks for n items at `each` a block; at least one, at most what a grid holds. */
static inline dim3 blocks_for(int64_t n, int64_t each)
{
    int64_t blocks = (n + each - 1) / each;

    return dim3((unsigned)(blocks < 1 ? 1 : blocks > 0x7fffffff ? 0x7fffffff : blocks));
}

/* Blocks for a loop over n items that goes on by whole grids: enough to fill the device `waves` times. */
static inline dim3 grid_for(int64_t n, int64_t each, int waves)
{
    int64_t blocks = (n + each - 1) / each, most = (int64_t)ds_cuda.processors * waves;

    return dim3((unsigned)(blocks < 1 ? 1 : blocks > most ? most : blocks));
}

/* This thread among all of a one-dimensional grid, and how many there are. */
static __device__ inline int64_t global_thread()
{
    return (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
}
static __device__ inline int64_t global_threads()
{
    return (int64_t)gridDim.x * blockDim.x;
}

/* ---- faults: an index that is out of range. The kernel goes on with something harmless. */

static __device__ inline void fault(ds_cuda_fault *f, const char *name, int64_t value,
                                    int64_t bound)
{
    if (atomicCAS(&f->set, 0, 1) != 0)
        return;
    f->name = name;
    f->value = value;
    f->bound = bound;
    __threadfence_system();
    f->set = 2;
}

/* ---- sums and extremes over a warp or a block; all of its threads take part, all get the result.
 * The order is fixed: the same bits every time. */

struct add_op {
    static __device__ float of(float a, float b)
    {
        return a + b;
    }
    static __device__ float none()
    {
        return 0;
    }
};
struct max_op { /* NaN wins */
    static __device__ float of(float a, float b)
    {
        return ds_maximum_f32(a, b);
    }
    static __device__ float none()
    {
        return -INFINITY;
    }
};

template <typename Op> static __device__ inline float warp_reduce(float x)
{
    for (int k = 16; k; k >>= 1)
        x = Op::of(x, __shfl_xor_sync(0xffffffff, x, k));
    return x;
}

/* shared: 32 floats; it may be used again after the call without a barrier. Blocks of whole warps. */
template <typename Op> static __device__ inline float block_reduce(float x, float *shared)
{
    int warps = blockDim.x / 32;

    x = warp_reduce<Op>(x);
    if (warps == 1)
        return x;
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = (int)(threadIdx.x % 32) < warps ? shared[threadIdx.x % 32] : Op::none();
    x = warp_reduce<Op>(x);
    __syncthreads();
    return x;
}

#endif
