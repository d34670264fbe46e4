/* softmax.cuh - sums of exponentials that grow as elements come: for softmax and cross-entropy.
 *
 * A sum is kept relative to the largest element so far (Milakov & Gimelshein 2018, alg. 3): one
 * pass over the elements, in any number of threads, whose sums are joined in a fixed order.
 */
#ifndef DS_CUDA_SOFTMAX_CUH
#define DS_CUDA_SOFTMAX_CUH

#include "kernels/cuda/lines.cuh"

/* e^x in two instructions, within 2 ulp for x from -87 to 0; below it is 0. */
static __device__ inline float exp_fast(float x)
{
#ifdef __CUDA_ARCH__
    float y;

    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
#else
    return exp2f(x * 1.44269504f);
#endif
}

/* most: the largest element that is not NaN; sum: of exp(x - most), or, as long as most is -inf,
 * of what is 0 or NaN. */
struct exp_sum {
    float most, sum;
};

static __device__ inline float shift_of(float most)
{
    return most == -INFINITY ? 0 : most;
}

template <int N> static __device__ inline exp_sum exp_add(exp_sum s, const float (&x)[N])
{
    float most = x[0], sum = 0;

#pragma unroll
    for (int i = 1; i < N; i++)
        most = fmaxf(most, x[i]);
    if (most > s.most) {
        s.sum *= exp_fast(s.most - most);
        s.most = most;
    }
    most = shift_of(s.most);
#pragma unroll
    for (int i = 0; i < N; i++)
        sum += exp_fast(x[i] - most);
    s.sum += sum;
    return s;
}

static __device__ inline exp_sum exp_join(exp_sum a, exp_sum b)
{
    float most = fmaxf(a.most, b.most), shift = shift_of(most);

    return {most, a.sum * exp_fast(a.most - shift) + b.sum * exp_fast(b.most - shift)};
}

#endif
