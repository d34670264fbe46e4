/* scale.cu - a tensor times a number that lies on the device. */
#include "kernels/cuda/activation.cuh"

template <typename S, int N>
static __global__ void scale_kernel(S *y, const S *x, const float *factor, float s, int64_t n)
{
    float by = *factor * s;

    for (int64_t i = global_thread() * N; i < n; i += global_threads() * N) {
        if (n - i < N) {
            for (int64_t k = i; k < n; k++)
                y[k] = from_float<S>(to_float(x[k]) * by);
            continue;
        }
        pack<S, N> v = load_pack<S, N>(x + i);
#pragma unroll
        for (int k = 0; k < N; k++)
            v.of[k] = from_float<S>(to_float(v.of[k]) * by);
        store_pack(y + i, v);
    }
}

template <typename S>
static int run_as(ds_tensor *y, const ds_tensor *x, const ds_tensor *factor, double s)
{
    if (aligned_16(x->data) && aligned_16(y->data))
        return launch("scale_by", scale_kernel<S, per_16<S>>,
                      grid_for(x->numel, 256 * per_16<S>, 16), 256, 0, y->data, x->data,
                      factor->data, (float)s, x->numel);
    return launch("scale_by", scale_kernel<S, 1>, grid_for(x->numel, 1024, 16), 256, 0, y->data,
                  x->data, factor->data, (float)s, x->numel);
}

extern "C" int ds_cuda_scale_by(ds_tensor *y, const ds_tensor *x, const ds_tensor *factor, double s)
{
    if (y->dtype != x->dtype || y->numel != x->numel || !y->dense || !x->dense ||
        factor->dtype != DS_F32 || factor->numel != 1)
        return ds_fail(DS_EINVAL,
                       "scale_by wants y dense and like x, %lld %s, and one factor in f32",
                       (long long)x->numel, ds_name_of(x->dtype));
    return x->numel == 0 ? 0 : DS_BY_FLOAT("scale_by", x->dtype, S, run_as<S>(y, x, factor, s));
}
