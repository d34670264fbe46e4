/* philox.h - random numbers by counter: Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011, "Parallel
 * random numbers: as easy as 1, 2, 3").
 *
 * Element i of a tensor, in row-major order, is lane i % 4 of the block at counter offset + i / 4
 * under the key `seed`. So it depends on neither threads, nor vectors, nor the device; a kernel
 * uses (numel + 3) / 4 counters, and whoever keeps the stream advances its offset by that. The
 * counter's upper 64 bits are 0.
 *
 * From a word to a number only multiplications, additions and square roots that every device rounds
 * alike are used, none of them fused: normal() too gives the same bits at every CPU level and in
 * CUDA.
 */
#ifndef DS_PHILOX_H
#define DS_PHILOX_H

#include "kernels/scalar.h"

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF /* gcc does not fuse under -std=c11 */
#endif

#ifdef __CUDA_ARCH__
#define DS_PLAIN_ADD(a, b) __fadd_rn(a, b)
#define DS_PLAIN_MUL(a, b) __fmul_rn(a, b)
#else
#define DS_PLAIN_ADD(a, b) ((a) + (b))
#define DS_PLAIN_MUL(a, b) ((a) * (b))
#endif
#define DS_PLAIN_FMA(a, b, c) DS_PLAIN_ADD(DS_PLAIN_MUL(a, b), c)

typedef struct ds_philox_block {
    uint32_t lane[4];
} ds_philox_block;

DS_FUNC ds_philox_block ds_philox(uint64_t seed, uint64_t counter)
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint32_t x0 = (uint32_t)counter, x1 = (uint32_t)(counter >> 32), x2 = 0, x3 = 0;

    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xd2511f53u * x0, p1 = (uint64_t)0xcd9e8d57u * x2;

        x0 = (uint32_t)(p1 >> 32) ^ x1 ^ k0;
        x1 = (uint32_t)p1;
        x2 = (uint32_t)(p0 >> 32) ^ x3 ^ k1;
        x3 = (uint32_t)p0;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return (ds_philox_block){{x0, x1, x2, x3}};
}

/* In [0, 1): multiples of 2^-24, and of 2^-32. */
DS_FUNC float ds_uniform_f32(uint32_t word)
{
    return (float)(int32_t)(word >> 8) * 0x1p-24f;
}

DS_FUNC double ds_uniform_f64(uint32_t word)
{
    return (double)word * 0x1p-32;
}

/* Two independent standard normal numbers from two words (Box & Muller 1958): lanes 0 and 1 of a
 * block make one pair, 2 and 3 the other. The largest magnitude is 6.6. */
DS_FUNC void ds_normal_pair(float *z0, float *z1, uint32_t word0, uint32_t word1)
{
    /* x in (0, 1] and its logarithm as in ds_log_f32, x being neither subnormal nor special. */
    float x = (float)(int32_t)(word0 >> 1) * 0x1p-31f + 0x1p-32f;
    uint32_t from_half = ds_bits(x) - 0x3f3504f3u;
    float f = ds_float((from_half & 0x7fffff) + 0x3f3504f3u) - 1.0f, ff = DS_PLAIN_MUL(f, f);
    float e = (float)((int32_t)from_half >> 23);
    float p =
        DS_PLAIN_FMA(DS_PLAIN_MUL(f, ff), DS_POLY_LOG(DS_PLAIN_FMA, f), DS_PLAIN_MUL(ff, -0.5f));
    float log = DS_PLAIN_FMA(e, 0.693147181f, DS_PLAIN_ADD(f, p));
    float radius = sqrtf(DS_PLAIN_MUL(-2.0f, log < 0.0f ? log : -0.0f));
    /* The angle 2π word1 / 2^32 as a quarter and |r| ≤ π/4. */
    uint32_t turned = word1 + 0x20000000u, quarter = turned >> 30;
    float r = DS_PLAIN_MUL((float)((int32_t)(turned & 0x3fffffffu) - 0x20000000),
                           1.46291808e-9f /* π/2 2^-30 */);
    float z = DS_PLAIN_MUL(r, r);
    float s = DS_PLAIN_FMA(DS_PLAIN_MUL(DS_POLY_SIN(DS_PLAIN_FMA, z), z), r, r);
    float c = DS_PLAIN_FMA(DS_PLAIN_MUL(DS_POLY_COS(DS_PLAIN_FMA, z), z), z,
                           DS_PLAIN_FMA(z, -0.5f, 1.0f));
    float sine = ds_float(ds_bits(quarter & 1 ? c : s) ^ (quarter & 2) << 30);
    float cosine = ds_float(ds_bits(quarter & 1 ? s : c) ^ ((quarter + 1) & 2) << 30);

    *z0 = DS_PLAIN_MUL(radius, cosine);
    *z1 = DS_PLAIN_MUL(radius, sine);
}

#endif
