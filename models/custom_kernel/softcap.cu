/* softcap.cu - the same kernel as softcap.c for a GPU.
 *
 * It is queued in the stream of dsrun's own kernels, so it runs after those that made x and before
 * those that read y; nothing waits.
 */
#include <cuda_runtime.h>

extern "C" {
#include "kernels/dtype.h"
#include "kernels/error.h"
#include "runner/ds.h"

extern const char ds_cdef[];
const char ds_cdef[] =
    "int softcap(ds_tensor *y, const ds_tensor *x, double cap);"
    "int softcap_backward(ds_tensor *dx, const ds_tensor *dy, const ds_tensor *y,"
    "                     double cap);";
}

/* Element i, of the dtypes that fits() lets through. */
static __device__ float get(const void *data, int dtype, int64_t i)
{
    if (dtype == DS_F32)
        return ((const float *)data)[i];
    uint16_t bits = ((const uint16_t *)data)[i];
    return dtype == DS_BF16 ? ds_bf16_to_f32(bits) : ds_f16_to_f32(bits);
}

static __device__ void set(void *data, int dtype, int64_t i, float value)
{
    if (dtype == DS_F32)
        ((float *)data)[i] = value;
    else
        ((uint16_t *)data)[i] = dtype == DS_BF16 ? ds_f32_to_bf16(value) : ds_f32_to_f16(value);
}

static __global__ void forward(void *y, const void *x, int dtype, int64_t n, float cap)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;

    if (i < n)
        set(y, dtype, i, cap * tanhf(get(x, dtype, i) / cap));
}

static __global__ void backward(void *dx, const void *dy, const void *y, int dtype, int64_t n,
                                float cap)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;

    if (i < n) {
        float t = get(y, dtype, i) / cap;

        set(dx, dtype, i, get(dy, dtype, i) * (1 - t * t));
    }
}

static int fits(const char *name, const ds_tensor *a, const ds_tensor *b)
{
    if (a->dtype != b->dtype || a->dtype > DS_F16)
        return ds_fail(DS_EINVAL, "%s: takes f32, bf16 or f16, not %s and %s", name,
                       ds_name_of(a->dtype), ds_name_of(b->dtype));
    if (!a->dense || !b->dense || a->numel != b->numel)
        return ds_fail(DS_EINVAL, "%s: takes dense tensors of one size; x:contiguous() makes one",
                       name);
    return 0;
}

static int launched(const char *name)
{
    cudaError_t code = cudaGetLastError();

    return code == cudaSuccess ? 0
                               : ds_fail(DS_EIO, "%s: CUDA: %s", name, cudaGetErrorString(code));
}

extern "C" int softcap(ds_tensor *y, const ds_tensor *x, double cap)
{
    int rc = fits("softcap", y, x);
    cudaStream_t stream = (cudaStream_t)ds_device_stream(DS_CUDA);

    if (rc < 0 || x->numel == 0) /* an empty grid would be an error */
        return rc;
    if (!(cap > 0))
        return ds_fail(DS_EINVAL, "softcap: cap must be above 0, not %g", cap);
    forward<<<(unsigned)((x->numel + 255) / 256), 256, 0, stream>>>(y->data, x->data, x->dtype,
                                                                    x->numel, (float)cap);
    return launched("softcap");
}

extern "C" int softcap_backward(ds_tensor *dx, const ds_tensor *dy, const ds_tensor *y, double cap)
{
    int rc = fits("softcap_backward", dx, dy);
    cudaStream_t stream = (cudaStream_t)ds_device_stream(DS_CUDA);

    if (rc == 0)
        rc = fits("softcap_backward", dx, y);
    if (rc < 0 || dx->numel == 0)
        return rc;
    backward<<<(unsigned)((dx->numel + 255) / 256), 256, 0, stream>>>(
        dx->data, dy->data, y->data, dx->dtype, dx->numel, (float)cap);
    return launched("softcap_backward");
}
