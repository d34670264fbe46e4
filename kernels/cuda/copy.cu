/* copy.cu - filling. */
#include "kernels/cuda/common.cuh"

template <typename V> static __global__ void fill_dense(V *y, V value, int64_t n)
{
    for (int64_t i = global_thread(); i < n; i += global_threads())
        y[i] = value;
}
extern "C" int ds_cuda_fill(ds_tensor *y, double value)
{
    if (y->dtype != DS_F32)
        return ds_cuda_refuse("fill", y->dtype);
    return launch("fill", fill_dense<float>, grid_for(y->numel, 1024, 8), 256, 0, (float *)y->data,
                  (float)value, y->numel);
}
