/* mma.cuh - instructions of a warp for products of small matrices, and copies that go on by themselves;
 * each with a spelling for the host beside it. Compute capability 8.0 and up.
 *
 * A fragment is a small matrix over the registers of a warp's 32 lanes, as the PTX manual lays it out
 * (section "Matrix Fragments for mma.m16n8k16"): with g = lane / 4 and i = 2 (lane % 4),
 *
 *     a [16 x 16], row by column:   a[0] (g, i), a[1] (g + 8, i), a[2] (g, i + 8), a[3] (g + 8, i + 8)
 *     b [16 x 8]:                   b0 (i, g), b1 (i + 8, g)
 *     c [16 x 8] f32:               c[0], c[1] (g, i), (g, i + 1); c[2], c[3] (g + 8, …)
 *
 * where each of a and b is two 16-bit numbers, the second next along k. So c, rounded, is half of an a:
 * the result of one product can be the left side of the next without leaving the registers.
 */
#ifndef DS_CUDA_MMA_CUH
#define DS_CUDA_MMA_CUH

#include "kernels/cuda/common.cuh"

#ifndef DS_SIMT

static __device__ inline uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8, and gets of each the
 * elements (l / 4, 2 (l % 4)) and the next; transposed: (2 (l % 4), l / 4) and the one below. */
static __device__ inline void load_matrices(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
static __device__ inline void load_transposed(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* c += a b */
template <typename S>
static __device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Two numbers in one register, the first in the lower half. */
template <typename S> static __device__ inline uint32_t two_of(float low, float high);
template <> __device__ inline uint32_t two_of<bf16>(float low, float high)
{
    uint32_t y;

    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <> __device__ inline uint32_t two_of<f16>(float low, float high)
{
    uint32_t y;

    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

/* 16 or 4 bytes from memory to shared memory, or zeros; there after commit and wait. */
static __device__ inline void copy_16(void *to, const void *from, bool zeros)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(zeros ? 0 : 16)
                 : "memory");
}
static __device__ inline void copy_4(void *to, const void *from, bool zeros)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(zeros ? 0 : 4)
                 : "memory");
}
static __device__ inline void copies_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/* Until all committed copies of this thread are done. */
static __device__ inline void copies_wait()
{
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

#else

static inline uint32_t two_at(const uint16_t *p, int apart)
{
    return p[0] | (uint32_t)p[apart] << 16;
}
static inline void load_matrices(uint32_t (&r)[4], const void *row)
{
    uint64_t rows[32];
    int lane = simt::lane();

    simt::gather(0xffffffff, (uint64_t)row, rows);
    for (int i = 0; i < 4; i++)
        r[i] = two_at((const uint16_t *)rows[8 * i + lane / 4] + lane % 4 * 2, 1);
}
static inline void load_transposed(uint32_t (&r)[4], const void *row)
{
    uint64_t rows[32];
    int lane = simt::lane();

    simt::gather(0xffffffff, (uint64_t)row, rows);
    for (int i = 0; i < 4; i++)
        r[i] = ((const uint16_t *)rows[8 * i + lane % 4 * 2])[lane / 4] |
               (uint32_t)((const uint16_t *)rows[8 * i + lane % 4 * 2 + 1])[lane / 4] << 16;
}

template <typename S> static inline float half_of(uint32_t two, int which)
{
    return to_float(S{(uint16_t)(two >> 16 * which)});
}
template <typename S>
static inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    uint64_t lanes[32];
    int g = simt::lane() / 4, i = simt::lane() % 4 * 2;
    float sum[4];

    simt::gather(0xffffffff, (uint64_t)mine, lanes);
    for (int e = 0; e < 4; e++) {
        int row = e / 2, column = i + e % 2;

        sum[e] = c[e];
        for (int k = 0; k < 16; k++) {
            const uint32_t *left = (const uint32_t *)lanes[g * 4 + k % 8 / 2];
            const uint32_t *right = (const uint32_t *)lanes[column * 4 + k % 8 / 2];

            sum[e] +=
                half_of<S>(left[row + k / 8 * 2], k % 2) * half_of<S>(right[4 + k / 8], k % 2);
        }
    }
    __syncwarp(); /* all have read */
    for (int e = 0; e < 4; e++)
        c[e] = sum[e];
}

template <typename S> static inline uint32_t two_of(float low, float high)
{
    return from_float<S>(low).bits | (uint32_t)from_float<S>(high).bits << 16;
}

static inline void copy_16(void *to, const void *from, bool zeros)
{
    simt::async_copy(to, from, 16, zeros ? 0 : 16);
}
static inline void copy_4(void *to, const void *from, bool zeros)
{
    simt::async_copy(to, from, 4, zeros ? 0 : 4);
}
static inline void copies_commit()
{
    simt::async_commit();
}
static inline void copies_wait()
{
    simt::async_wait(0);
}

#endif
#endif
