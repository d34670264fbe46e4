/* simt.h - CUDA kernels as host code: included before each .cu file when it is compiled by the host
 * compiler, in place of nvcc.
 *
 * A block's threads are fibers of one thread of the host, run in turn until each waits at a barrier or
 * is done. What a GPU leaves undefined is an error here: a barrier that some threads never reach, a
 * warp operation with lanes that are gone. Blocks run one after the other, in order. It is slow, and
 * there for tests: the whole CUDA backend runs with it where there is no GPU.
 */
#ifndef DS_SIMT_H
#define DS_SIMT_H

#include <cuda_runtime.h>
#include <math.h>

#include <stdint.h>
#include <string.h>

#include <functional>

#undef __shared__
#define __shared__ static /* one block runs at a time */
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __constant__
#define __constant__

namespace simt
{

/* Of the running thread. */
struct place {
    uint3 thread, block;
    dim3 threads, blocks;
};
extern place now;

void launch(cudaStream_t stream, const char *name, dim3 grid, dim3 block, size_t shared,
            std::function<void()> body);
/* Work of a library that stands in for one of NVIDIA's. Steps are called until one returns true: what
 * waits for another process returns false meanwhile. */
void enqueue(cudaStream_t stream, std::function<void()> work);
void enqueue_steps(cudaStream_t stream, std::function<bool()> step);
/* Whether these bytes lie in one block of the simulated device's memory. */
bool is_device(const void *data, size_t bytes);
/* Whether kernels are done when the call returns that asks for them: not so with DS_SIMT_LATE. */
bool at_once();
/* Of the block of memory that begins there no more than this was asked for, or what was said before: the
 * address sanitizer, if it is on, lets nobody beyond. */
void limit(void *data, size_t bytes);
void *dynamic_shared();
void must_align(const void *p, size_t bytes);
void block_barrier();
int block_vote(int kind, int predicate); /* 0 or, 1 and, 2 count */
/* Every lane of the mask gives 8 bytes and gets those of lane `from`. */
uint64_t exchange(unsigned mask, uint64_t value, int from);
/* All of the mask's lanes get what each gave. */
void gather(unsigned mask, uint64_t value, uint64_t all[32]);
/* cp.async: done when the thread that asked for it waits until no more than `pending` groups are under
 * way, and no sooner. bytes 0 of `whole`: zeros. */
void async_copy(void *to, const void *from, int whole, int bytes);
void async_commit();
void async_wait(int pending);
void warp_barrier(unsigned mask);
unsigned ballot(unsigned mask, int predicate);

template <typename V> static inline V shuffle(unsigned mask, V value, int from)
{
    uint64_t bits = 0;

    static_assert(sizeof value <= 8, "a shuffle moves 8 bytes");
    memcpy(&bits, &value, sizeof value);
    bits = exchange(mask, bits, from);
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline int lane()
{
    return (int)((now.thread.x + now.threads.x * (now.thread.y + now.threads.y * now.thread.z)) %
                 32);
}

} // namespace simt

#define threadIdx simt::now.thread
#define blockIdx simt::now.block
#define blockDim simt::now.threads
#define gridDim simt::now.blocks
#define warpSize 32

static inline void __syncthreads()
{
    simt::block_barrier();
}
static inline int __syncthreads_or(int p)
{
    return simt::block_vote(0, p);
}
static inline int __syncthreads_and(int p)
{
    return simt::block_vote(1, p);
}
static inline int __syncthreads_count(int p)
{
    return simt::block_vote(2, p);
}
static inline void __syncwarp(unsigned mask = 0xffffffffu)
{
    simt::warp_barrier(mask);
}
template <typename V> static inline V __shfl_sync(unsigned mask, V v, int from, int width = 32)
{
    int l = simt::lane();
    return simt::shuffle(mask, v, l / width * width + (from & (width - 1)));
}
template <typename V> static inline V __shfl_xor_sync(unsigned mask, V v, int x, int width = 32)
{
    int l = simt::lane(), to = l ^ x;
    return simt::shuffle(mask, v, to / width > l / width ? l : to);
}
template <typename V> static inline V __shfl_up_sync(unsigned mask, V v, unsigned d, int width = 32)
{
    int l = simt::lane();
    return simt::shuffle(mask, v, l % width >= (int)d ? l - (int)d : l);
}
template <typename V>
static inline V __shfl_down_sync(unsigned mask, V v, unsigned d, int width = 32)
{
    int l = simt::lane();
    return simt::shuffle(mask, v, l % width + (int)d < width ? l + (int)d : l);
}
static inline unsigned __ballot_sync(unsigned mask, int p)
{
    return simt::ballot(mask, p);
}
static inline int __any_sync(unsigned mask, int p)
{
    return simt::ballot(mask, p) != 0;
}
static inline int __all_sync(unsigned mask, int p)
{
    return simt::ballot(mask, !p) == 0;
}
static inline void __threadfence()
{
}
static inline void __threadfence_block()
{
}
static inline void __threadfence_system()
{
}

template <typename V> static inline V atomicAdd(V *p, V v)
{
    V old = *p;
    *p = old + v;
    return old;
}
template <typename V> static inline V atomicMax(V *p, V v)
{
    V old = *p;
    *p = old > v ? old : v;
    return old;
}
template <typename V> static inline V atomicMin(V *p, V v)
{
    V old = *p;
    *p = old < v ? old : v;
    return old;
}
template <typename V> static inline V atomicExch(V *p, V v)
{
    V old = *p;
    *p = v;
    return old;
}
template <typename V> static inline V atomicCAS(V *p, V expected, V v)
{
    V old = *p;
    if (old == expected)
        *p = v;
    return old;
}
template <typename V> static inline V atomicOr(V *p, V v)
{
    V old = *p;
    *p = old | v;
    return old;
}

/* Loads and stores with hints, and instructions with a host spelling. */
template <typename V> static inline V __ldg(const V *p)
{
    return *p;
}
template <typename V> static inline V __ldcs(const V *p)
{
    return *p;
}
template <typename V> static inline V __ldcg(const V *p)
{
    return *p;
}
template <typename V> static inline void __stcs(V *p, V v)
{
    *p = v;
}
template <typename V> static inline void __stcg(V *p, V v)
{
    *p = v;
}
static inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}
static inline int __ffs(int x)
{
    return __builtin_ffs(x);
}
static inline int __clz(int x)
{
    return x ? __builtin_clz((unsigned)x) : 32;
}
static inline unsigned __umulhi(unsigned a, unsigned b)
{
    return (unsigned)((uint64_t)a * b >> 32);
}
static inline uint64_t __umul64hi(uint64_t a, uint64_t b)
{
    return (uint64_t)((unsigned __int128)a * b >> 64);
}
static inline float __fadd_rn(float a, float b)
{
    return a + b;
}
static inline float __fmul_rn(float a, float b)
{
    return a * b;
}
static inline float __fsqrt_rn(float a)
{
    return sqrtf(a);
}
static inline float __frcp_rn(float a)
{
    return 1.0f / a;
}
static inline float rsqrtf(float a)
{
    return 1.0f / sqrtf(a);
}

#endif
