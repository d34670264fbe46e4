/* attention.cu - scaled dot-product attention, forward: y = softmax(scale q kᵀ + mask) v.
 *
 * Checks, the choice of an implementation, and the one that takes everything: any dtype and head to
 * 256, computed in f32 by fused multiply-add. A block of 256 threads has a tile of queries, and goes
 * through the keys that the last of them sees.
 */
#include <stdlib.h>

#include "kernels/cuda/attention_cudnn.h"
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/checks.h"

/* ---- checking */

static int on_cuda(const char *what, const ds_tensor *x, const char *name)
{
    return x->device == DS_CUDA ? 0 : ds_fail(DS_EINVAL, "%s: %s is not on cuda", what, name);
}

int attention_same(const char *what, const ds_tensor *x, const char *name, const ds_tensor *like)
{
    DS_TRY(ds_check_attention_like(what, x, name, like));
    return on_cuda(what, x, name);
}

head_tensor attention_heads(const ds_tensor *x)
{
    int64_t n = 16 / ds_bytes_of(x->dtype);

    return head_tensor{(char *)x->data, x->stride[0], x->stride[1], x->stride[2],
                       aligned_16(x->data) && x->stride[0] % n == 0 && x->stride[1] % n == 0 &&
                           x->stride[2] % n == 0};
}

static int check_mask(attention_call *c, const char *what, const ds_tensor *mask,
                      const ds_attention_sizes *z)
{
    DS_TRY(ds_check_attention_mask(c->mask_stride, what, mask, z));
    if (!mask)
        return 0;
    if (mask->dtype == DS_F64)
        return ds_fail(DS_EINVAL, "%s: the mask is f64, must be bool, f32, bf16 or f16 on cuda",
                       what);
    c->mask = (const char *)mask->data;
    c->mask_dtype = mask->dtype;
    return on_cuda(what, mask, "the mask");
}

/* Sizes as the kernels count, which is by int. */
static int set_sizes(attention_call *c, const char *what, const ds_attention_sizes *z)
{
    const int64_t most = 1 << 30;

    if (z->T > most || z->S > most || z->B > most || z->H > most ||
        (z->T + z->S) / 16 * z->H > most / (z->B + 1))
        return ds_fail(DS_EINVAL,
                       "%s: [%lld x %lld x %lld] queries and %lld keys are more than "
                       "a grid of blocks holds",
                       what, (long long)z->B, (long long)z->T, (long long)z->H, (long long)z->S);
    c->B = (int)z->B;
    c->T = (int)z->T;
    c->H = (int)z->H;
    c->D = (int)z->D;
    c->S = (int)z->S;
    c->G = (int)z->G;
    c->ratio = c->H / c->G;
    return 0;
}

int attention_check(attention_call *c, const char *what, const ds_tensor *q, const ds_tensor *k,
                    const ds_tensor *v, const ds_tensor *lse, const ds_tensor *mask, int causal,
                    double scale, double p, uint64_t seed, uint64_t offset)
{
    ds_attention_sizes z;

    *c = attention_call{};
    if (q->dtype != DS_F32 && q->dtype != DS_BF16 && q->dtype != DS_F16)
        return ds_cuda_refuse(what, q->dtype);
    DS_TRY(ds_check_attention(&z, what, q, k, v, lse, p, ATTENTION_WIDEST, " on cuda"));
    DS_TRY(on_cuda(what, q, "the query"));
    DS_TRY(on_cuda(what, k, "the key"));
    DS_TRY(on_cuda(what, v, "the value"));
    DS_TRY(on_cuda(what, lse, "lse"));
    DS_TRY(set_sizes(c, what, &z));
    c->q = attention_heads(q);
    c->k = attention_heads(k);
    c->v = attention_heads(v);
    c->lse = (float *)lse->data;
    for (int i = 0; i < 3; i++)
        c->lse_stride[i] = lse->stride[i];
    c->dtype = q->dtype;
    c->causal = causal;
    c->scale = (float)scale;
    c->scale2 = (float)(scale * LOG2E);
    c->drops = p > 0;
    c->least = (int32_t)ceil(p * 0x1p24); /* as random.c of the CPU's kernels */
    c->kept = (float)(1 / (1 - p));
    c->seed = seed;
    c->offset = offset;
    return check_mask(c, what, mask, &z);
}

int attention_fits(const char *what, size_t shared)
{
    if (shared <= (size_t)ds_cuda.shared_most)
        return 0;
    return ds_fail(DS_ENOSYS,
                   "%s: heads this wide take %zu KiB of shared memory, and this GPU has %d KiB a "
                   "block; use narrower heads, or bf16 to 128",
                   what, shared >> 10, ds_cuda.shared_most >> 10);
}

/* ---- choosing */

int attention_choose(const attention_call *c, const char *what, int backward)
{
    const char *asked = getenv("DS_ATTENTION"), *why = NULL;
    int rc = 0;

    asked = asked && *asked ? asked : "any";
    if (!strcmp(asked, "fma"))
        return ATTENTION_FMA;
    if (!strcmp(asked, "own"))
        return ATTENTION_MMA;
    if (strcmp(asked, "any") && strcmp(asked, "cudnn"))
        return ds_fail(DS_EINVAL, "%s: DS_ATTENTION is %s, must be own, fma or cudnn", what, asked);
    rc = attention_cudnn(c, backward, &why);
    if (rc < 0)
        return rc;
    if (!rc && !strcmp(asked, "cudnn"))
        return ds_fail(DS_ENOSYS, "%s: DS_ATTENTION=cudnn, and it cannot: %s", what, why);
    return rc ? ATTENTION_DONE : ATTENTION_MMA;
}

/* ---- forward, by fused multiply-add */

/* Scores s of this thread to weights; the state m, l of its rows and what the sum so far shrinks by. */
template <typename Z>
static __device__ inline void soften(float (&s)[Z::RPT][Z::KPT], float (&m)[Z::RPT],
                                     float (&l)[Z::RPT], float (&shrink)[Z::RPT])
{
#pragma unroll
    for (int i = 0; i < Z::RPT; i++) {
        float top = m[i], base, sum = 0;

#pragma unroll
        for (int j = 0; j < Z::KPT; j++)
            top = fmaxf(top, s[i][j]);
#pragma unroll
        for (int k = 8; k; k >>= 1)
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, k));
        base = top == -INFINITY ? 0 : top; /* nothing seen: weights 0, not NaN */
        shrink[i] = attention_exp2(m[i] - base);
        m[i] = top;
#pragma unroll
        for (int j = 0; j < Z::KPT; j++) {
            s[i][j] = attention_exp2(s[i][j] - base);
            sum += s[i][j];
        }
#pragma unroll
        for (int k = 8; k; k >>= 1)
            sum += __shfl_xor_sync(0xffffffff, sum, k);
        l[i] = fmaf(l[i], shrink[i], sum);
    }
}

template <typename Z>
static __device__ inline void finish(const attention_call &c, attention_place at, int ty, int tx,
                                     float (&o)[Z::RPT][Z::CPT], const float (&m)[Z::RPT],
                                     const float (&l)[Z::RPT])
{
#pragma unroll
    for (int i = 0; i < Z::RPT; i++) {
        int t = at.first + ty * Z::RPT + i;

        if (t >= c.T)
            continue;
        store_columns<Z>(c, c.y, at.batch, at.head, t, tx, o[i], l[i] == 0 ? 0 : 1 / l[i]);
        if (tx == 0)
            *attention_lse(c, at.batch, at.head, t) = m[i] * (float)(1 / LOG2E) + logf(l[i]);
    }
}

template <typename Z>
static __global__ void __launch_bounds__(Z::THREADS) forward(attention_call c, int tiles)
{
    DS_SHARED(float, q);
    float *kv = q + Z::ROWS * Z::LD, *w = kv + Z::KEYS * Z::LD;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    attention_place at = attention_rows_of(tiles, c.H, Z::ROWS);
    int last = at.first + Z::ROWS < c.T ? at.first + Z::ROWS : c.T;
    int group = at.head / c.ratio, seen = attention_seen(c, last - 1);
    float m[Z::RPT], l[Z::RPT], shrink[Z::RPT], o[Z::RPT][Z::CPT];

#pragma unroll
    for (int i = 0; i < Z::RPT; i++) {
        m[i] = -INFINITY;
        l[i] = 0;
#pragma unroll
        for (int d = 0; d < Z::CPT; d++)
            o[i][d] = 0;
    }
    load_rows<Z>(q, c, c.q, at.batch, at.head, at.first);
    for (int key = 0; key < seen; key += Z::KEYS) {
        float s[Z::RPT][Z::KPT];

        __syncthreads(); /* the values of the tile before are used */
        load_keys<Z>(kv, c, c.k, at.batch, group, key);
        __syncthreads();
        product_scores<Z>(s, q, kv, c.D, ty, tx);
        exponents<Z>(s, c, at.batch, at.head, at.first, key, ty, tx);
        soften<Z>(s, m, l, shrink);
#pragma unroll
        for (int i = 0; i < Z::RPT; i++) {
            float keep[Z::KPT];

            if (c.drops) {
                attention_keep(keep, c, at.batch, at.head, at.first + ty * Z::RPT + i,
                               key + tx * Z::KPT);
#pragma unroll
                for (int j = 0; j < Z::KPT; j++)
                    s[i][j] *= keep[j];
            }
#pragma unroll
            for (int d = 0; d < Z::CPT; d++)
                o[i][d] *= shrink[i];
        }
        store_scores<Z>(w, s, ty, tx);
        __syncthreads(); /* the keys are used */
        load_keys<Z>(kv, c, c.v, at.batch, group, key);
        __syncthreads();
        product_weighted<Z>(o, w, kv, ty, tx);
    }
    finish<Z>(c, at, ty, tx, o, m, l);
}

template <typename Z> static int run(const attention_call &c)
{
    int tiles = (c.T + Z::ROWS - 1) / Z::ROWS;
    size_t floats = (Z::ROWS + Z::KEYS) * Z::LD + Z::ROWS * Z::LDS;

    DS_TRY(attention_fits("attention", floats * 4));
    return launch("attention", forward<Z>, dim3((unsigned)(tiles * c.H * c.B)), dim3(Z::THREADS),
                  floats * 4, c, tiles);
}

int ds_cuda_attention(ds_tensor *y, ds_tensor *lse, const ds_tensor *q, const ds_tensor *k,
                      const ds_tensor *v, const ds_tensor *mask, int causal, double scale, double p,
                      uint64_t seed, uint64_t offset)
{
    attention_call c;
    int left;

    DS_TRY(attention_check(&c, "attention", q, k, v, lse, mask, causal, scale, p, seed, offset));
    DS_TRY(attention_same("attention", y, "the output", q));
    c.y = attention_heads(y);
    if (q->numel == 0)
        return 0;
    left = attention_choose(&c, "attention", 0);
    if (left < 0 || left == ATTENTION_DONE)
        return left;
    if (left == ATTENTION_MMA && attention_few_takes(c))
        return attention_few(c);
    if (left == ATTENTION_MMA && attention_mma_takes(c, 0))
        return attention_mma(c);
    return BY_WIDTH(c.D, Z, run<Z>(c));
}
