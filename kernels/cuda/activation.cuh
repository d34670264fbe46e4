/* activation.cuh - activations and their derivatives, each from one power.
 *
 * A pass over memory that reads and writes 2 bytes an element leaves an H200 some 27 instructions for it,
 * three of them of the special units: so the power and the reciprocal are the instructions for them,
 * with an error of 2 ulp, and for bf16, whose rounding hides an error of 2e-4, the polynomials are short.
 * They are those of the CPU's kernels (kernels/cpu/linear.c), fitted for the least relative error.
 * Arguments are bounded so that limits are right: an activation of -inf is 0, of inf inf, of NaN NaN.
 */
#ifndef DS_CUDA_ACTIVATION_CUH
#define DS_CUDA_ACTIVATION_CUH

#include "kernels/cuda/common.cuh"

enum activation { ACT_NONE, ACT_GELU, ACT_GELU_TANH, ACT_RELU, ACT_SILU, ACT_COUNT }; /* ops.def */

struct activated {
    float y, slope;
};

/* 2^x; e^x; subnormal results are 0. */
static __device__ inline float fast_exp2(float x)
{
#ifdef __CUDA_ARCH__
    float y;

    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}
static __device__ inline float fast_exp(float x)
{
    return fast_exp2(x * 1.44269504f);
}

static __device__ inline float fast_reciprocal(float x)
{
#ifdef __CUDA_ARCH__
    float y;

    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

/* The larger, NaN where one of them is: unlike fmaxf(). */
static __device__ inline float larger(float a, float b)
{
    return b > a ? b : a != a ? a : b != b ? b : a;
}

/* 1 / (1 + e^-x) */
static __device__ inline float sigmoid(float x)
{
    float e = fast_exp(-fabsf(x)), d = fast_reciprocal(1.0f + e);

    return x < 0 ? e * d : d;
}

/* Φ(-a) / e^(-a²/2) = t p(t), t = 1 / (1 + c a), for 0 <= a <= 13; error 1.5e-7 or 3.5e-5. */
template <bool FINE> static __device__ inline float tail_ratio(float a)
{
    float t = fast_reciprocal(fmaf(a, FINE ? 0.3f : 0.37f, 1.0f)), p;

    if (FINE) {
        p = fmaf(t, 0.03567486578f, -0.1572034429f);
        p = fmaf(p, t, 0.2063540859f);
        p = fmaf(p, t, -0.05368413701f);
        p = fmaf(p, t, 0.1285618649f);
        p = fmaf(p, t, 0.09991342673f);
        p = fmaf(p, t, 0.1207539454f);
        p = fmaf(p, t, 0.1196292983f);
    } else {
        p = fmaf(t, -0.09035711341f, 0.2099436636f);
        p = fmaf(p, t, 0.07613094822f);
        p = fmaf(p, t, 0.157378619f);
        p = fmaf(p, t, 0.1469194644f);
    }
    return p * t;
}

/* x Φ(x). `up` keeps a NaN: a comparison with one is false. */
template <bool FINE> static __device__ inline activated act_gelu(float x)
{
    float up = x < -13.0f ? -13.0f : x, c = up > 13.0f ? 13.0f : up;
    float e = fast_exp2(c * c * -0.72134752f); /* e^(-c²/2) */
    float tail = e * tail_ratio<FINE>(fabsf(c));
    float below = c < 0 ? tail : 1.0f - tail;

    return activated{up * below, fmaf(c * 0.398942280f, e, below)};
}

/* ½ x (1 + tanh u) = x σ(2u), u = √(2/π) (x + 0.044715 x³) */
static __device__ inline activated act_gelu_tanh(float x)
{
    const float twice = 1.5957691216f, cubic = 0.044715f;
    float up = x < -9.9f ? -9.9f : x, c = up > 9.9f ? 9.9f : up, z = cubic * c * c;
    float s = sigmoid(twice * c * (1.0f + z));

    return activated{up * s, fmaf(c * s * (1.0f - s) * twice, fmaf(z, 3.0f, 1.0f), s)};
}

static __device__ inline activated act_relu(float x)
{
    return activated{x < 0 ? 0.0f : x, x > 0 ? 1.0f : 0.0f};
}

static __device__ inline activated act_silu(float x)
{
    float up = x < -87.0f ? -87.0f : x, c = up > 87.0f ? 87.0f : up, s = sigmoid(c);

    return activated{up * s, s * fmaf(c, 1.0f - s, 1.0f)};
}

/* N values at once: one decision for all of them. */
template <bool FINE, int N>
static __device__ inline void act_all(activated *out, const float *x, int activation)
{
    switch (activation) {
    case ACT_GELU:
#pragma unroll
        for (int i = 0; i < N; i++)
            out[i] = act_gelu<FINE>(x[i]);
        break;
    case ACT_GELU_TANH:
#pragma unroll
        for (int i = 0; i < N; i++)
            out[i] = act_gelu_tanh(x[i]);
        break;
    case ACT_RELU:
#pragma unroll
        for (int i = 0; i < N; i++)
            out[i] = act_relu(x[i]);
        break;
    case ACT_SILU:
#pragma unroll
        for (int i = 0; i < N; i++)
            out[i] = act_silu(x[i]);
        break;
    default:
#pragma unroll
        for (int i = 0; i < N; i++)
            out[i] = activated{x[i], 1.0f};
    }
}

/* Whether the storage type wants the long polynomials. */
template <typename S> constexpr bool is_fine = true;
template <> constexpr bool is_fine<bf16> = false;

/* ---- packs as one transfer of their size, up to 16 bytes; read once, written for others to read */

template <typename S, int N> static __device__ inline pack<S, N> load_pack(const S *p)
{
    pack<S, N> v;

    if constexpr (sizeof v == 16) {
        uint4 raw = __ldcs((const uint4 *)p);

        memcpy(&v, &raw, 16);
    } else {
        v = *(const pack<S, N> *)p;
    }
    return v;
}

template <typename S, int N> static __device__ inline void store_pack(S *p, const pack<S, N> &v)
{
    if constexpr (sizeof v == 16) {
        uint4 raw;

        memcpy(&raw, &v, 16);
        __stcg((uint4 *)p, raw); /* a plain store may be taken apart */
    } else {
        *(pack<S, N> *)p = v;
    }
}

#endif
