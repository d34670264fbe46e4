/* attention.cuh - a call of attention, checked, and what its kernels share: places, masks, dropout.
 *
 * No T x S matrix is ever in memory: a block of threads has some rows (queries of one head) in shared
 * memory and meets a tile of keys at a time, keeping the softmax online (Dao 2023, FlashAttention-2;
 * Milakov & Gimelshein 2018). Implementations, chosen in attention.cu:
 *
 *     attention_cudnn.cu                       cuDNN's graphs; bf16 and f16
 *     attention_mma.cu, _mma_backward.cu       tensor cores; bf16 and f16, heads to 128, aligned rows
 *     attention_few.cu                         few queries to many keys, forward; everything
 *     attention.cu, attention_backward.cu      fused multiply-add; everything
 *
 * All keep the same lse, so that a forward pass of one and a backward pass of another fit.
 */
#ifndef DS_CUDA_ATTENTION_CUH
#define DS_CUDA_ATTENTION_CUH

#include "kernels/cuda/common.cuh"
#include "kernels/philox.h"

#define ATTENTION_WIDEST 256 /* head */
#define LOG2E 1.4426950408889634

/* A tensor [B, n, heads, D] whose last dimension is dense; strides in elements. */
struct head_tensor {
    char *data;
    int64_t batch, row, head;
    int aligned; /* every row begins at 16 bytes */
};

/* By value to every kernel. */
struct attention_call {
    head_tensor q, k, v, y, dy, dq, dk, dv;
    const char *mask; /* NULL: none */
    int64_t mask_stride[4];
    float *lse; /* over B, H, T; natural logarithm; -inf: the row sees nothing */
    int64_t lse_stride[3];
    /* of the backward pass, [B, H, T] dense: dy y summed over a row, and lse in exponents of 2, inf where
     * the row sees nothing, so that its weights are 0 */
    float *delta, *lse2;
    int dtype, mask_dtype;
    int B, T, S, H, G, D;
    int ratio; /* H / G */
    int causal;
    float scale, scale2; /* scale2 = scale log2 e: exponents are of 2 */
    /* dropout of the weights */
    int drops;
    int32_t least; /* a random number below it is dropped */
    float kept;    /* 1 / (1 - p) */
    uint64_t seed, offset;
};

/* 0 and *c, or a negative code. `what` begins messages. */
int attention_check(attention_call *c, const char *what, const ds_tensor *q, const ds_tensor *k,
                    const ds_tensor *v, const ds_tensor *lse, const ds_tensor *mask, int causal,
                    double scale, double p, uint64_t seed, uint64_t offset);
int attention_same(const char *what, const ds_tensor *x, const char *name, const ds_tensor *like);
head_tensor attention_heads(const ds_tensor *x);
/* A launch that needs more shared memory than the device has is refused by name. */
int attention_fits(const char *what, size_t shared);

/* Does a call by cuDNN where that is right, and says what is left to do. DS_ATTENTION in the environment:
 * `own` (no cuDNN), `fma` (no tensor cores either), `cudnn` (an error where it cannot); without it cuDNN
 * where it applies. */
enum attention_left { ATTENTION_DONE, ATTENTION_MMA, ATTENTION_FMA };
int attention_choose(const attention_call *c, const char *what, int backward);

/* attention_few.cu: few queries to each key, forward; any dtype and head. */
int attention_few_takes(const attention_call &c);
int attention_few(const attention_call &c);

/* ---- places */

/* The query rows `first` … of a head, or the keys of a kv head, that a block of threads has in hand. */
struct attention_place {
    int batch, head, first;
};

/* Blocks of a head are next to each other, so that those which run at once share keys in the cache;
 * the last rows, which causality lets see the most, come first. */
static __device__ inline attention_place attention_rows_of(int tiles, int heads, int rows)
{
    int at = (int)(blockIdx.x / tiles), tile = tiles - 1 - (int)(blockIdx.x % tiles);

    return attention_place{at / heads, at % heads, tile * rows};
}

/* Keys: the first are seen by most rows. */
static __device__ inline attention_place attention_keys_of(int tiles, int heads, int keys)
{
    int at = (int)(blockIdx.x / tiles), tile = (int)(blockIdx.x % tiles);

    return attention_place{at / heads, at % heads, tile * keys};
}

/* How many keys row t sees. */
static __device__ inline int attention_seen(const attention_call &c, int t)
{
    int seen = c.causal ? t + 1 + c.S - c.T : c.S;

    return seen < 0 ? 0 : seen > c.S ? c.S : seen;
}

/* The first row that sees a key. */
static __device__ inline int attention_first_row(const attention_call &c, int key)
{
    int t = c.causal ? key - (c.S - c.T) : 0;

    return t < 0 ? 0 : t;
}

static __device__ inline float *attention_lse(const attention_call &c, int batch, int head, int t)
{
    return c.lse + batch * c.lse_stride[0] + head * c.lse_stride[1] + t * c.lse_stride[2];
}

static __device__ inline int64_t attention_row(const attention_call &c, int batch, int head, int t)
{
    return ((int64_t)batch * c.H + head) * c.T + t;
}

/* ---- masks and dropout */

/* 2^x, within 2 ulp; results below 2^-126 are 0. */
static __device__ inline float attention_exp2(float x)
{
#ifdef __CUDA_ARCH__
    float y;

    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

static __device__ inline float attention_load(const char *data, int dtype, int64_t i)
{
    return dtype == DS_F32    ? ((const float *)data)[i]
           : dtype == DS_BF16 ? to_float(((const bf16 *)data)[i])
                              : to_float(((const f16 *)data)[i]);
}

/* What a mask adds to the exponent (of 2) of row t and key s. */
static __device__ inline float attention_mask(const attention_call &c, int batch, int head, int t,
                                              int s)
{
    int64_t at = batch * c.mask_stride[0] + head * c.mask_stride[1] + t * c.mask_stride[2] +
                 s * c.mask_stride[3];

    if (c.mask_dtype == DS_BOOL)
        return c.mask[at] ? 0 : -INFINITY;
    return attention_load(c.mask, c.mask_dtype, at) * (float)LOG2E;
}

/* What dropout makes of the weights of one row and the keys s … s + N - 1: 0 or 1 / (1 - p). They are
 * elements of a [B, H, T, S] tensor of random numbers, as philox.h says; N ≤ 4. */
template <int N>
static __device__ inline void attention_keep(float (&keep)[N], const attention_call &c, int batch,
                                             int head, int t, int s)
{
    uint64_t element = (uint64_t)attention_row(c, batch, head, t) * (uint64_t)c.S + (uint64_t)s;
    int skip = (int)(element % 4);
    ds_philox_block low = ds_philox(c.seed, c.offset + element / 4), high = low;

    if (skip + N > 4)
        high = ds_philox(c.seed, c.offset + element / 4 + 1);
    const uint32_t word[8] = {low.lane[0],  low.lane[1],  low.lane[2],  low.lane[3],
                              high.lane[0], high.lane[1], high.lane[2], high.lane[3]};
#pragma unroll
    for (int i = 0; i < N; i++) {
        uint32_t mine = skip == 0   ? word[i]
                        : skip == 1 ? word[i + 1]
                        : skip == 2 ? word[i + 2]
                                    : word[i + 3];

        keep[i] = (int32_t)(mine >> 8) >= c.least ? c.kept : 0;
    }
}

#endif
