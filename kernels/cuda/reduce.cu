/* reduce.cu - sum, mean, prod, all, any, sum_squares. */
#include "kernels/cuda/reduce.cuh"

/* A: float, or uint64_t, which wraps around. */
template <typename A> struct sum_of {
    typedef A state;
    static constexpr bool in_order = sizeof(A) == 8;
    static __device__ A none()
    {
        return 0;
    }
    template <typename N> static __device__ A of(N x, int64_t, int)
    {
        return (A)x;
    }
    template <typename N> static __device__ A step(A a, N x, int64_t, int)
    {
        return a + (A)x;
    }
    static __device__ A join(A a, A b)
    {
        return a + b;
    }
};

struct squares_of : sum_of<float> {
    static __device__ float of(float x, int64_t, int)
    {
        return x * x;
    }
    static __device__ float step(float a, float x, int64_t, int)
    {
        return a + x * x;
    }
};

/* A: double or uint64_t */
template <typename A> struct product_of {
    typedef A state;
    static constexpr bool in_order = true;
    static __device__ A none()
    {
        return 1;
    }
    template <typename N> static __device__ A step(A a, N x, int64_t, int)
    {
        return a * (A)x;
    }
    static __device__ A join(A a, A b)
    {
        return a * b;
    }
};

extern "C" int ds_cuda_sum(ds_tensor *y, const ds_tensor *x, int accumulate)
{
    job j;
    int rc = reduction_start(&j, "sum", y, x);

    if (rc != 0 || (accumulate && x->numel == 0))
        return rc < 0 ? rc : 0;
    j.accumulate = accumulate;
    if (!ds_is_float(x->dtype))
        return run_as<sum_of<uint64_t>, whole, 1>("sum", &j);
    return by_real<sum_of<float>>("sum", &j);
}

extern "C" int ds_cuda_mean(ds_tensor *y, const ds_tensor *x)
{
    job j;
    int rc = reduction_start(&j, "mean", y, x);

    if (rc == 0 && !ds_is_float(x->dtype))
        return ds_fail(DS_EINVAL, "mean: not for %s; use :float() first", ds_name_of(x->dtype));
    if (rc != 0)
        return rc < 0 ? rc : 0;
    j.scale = (float)((double)y->numel / (double)x->numel);
    return by_real<sum_of<float>>("mean", &j);
}

extern "C" int ds_cuda_prod(ds_tensor *y, const ds_tensor *x)
{
    job j;
    int rc = reduction_start(&j, "prod", y, x);

    if (rc != 0)
        return rc < 0 ? rc : 0;
    if (ds_is_float(x->dtype))
        return run_as<product_of<double>, real, 1>("prod", &j);
    return run_as<product_of<uint64_t>, whole, 1>("prod", &j);
}

/* bool is 0 or 1: all is the product. */
struct any_of {
    typedef uint64_t state;
    static constexpr bool in_order = true;
    static __device__ uint64_t none()
    {
        return 0;
    }
    static __device__ uint64_t step(uint64_t a, int64_t x, int64_t, int)
    {
        return a | (uint64_t)x;
    }
    static __device__ uint64_t join(uint64_t a, uint64_t b)
    {
        return a | b;
    }
};

template <typename Op> static int truth(const char *name, ds_tensor *y, const ds_tensor *x)
{
    job j;
    int rc;

    if (x->dtype != DS_BOOL || y->dtype != DS_BOOL)
        return ds_fail(DS_EINVAL, "%s: not for %s, only for bool", name,
                       ds_name_of(x->dtype != DS_BOOL ? x->dtype : y->dtype));
    rc = reduction_start(&j, name, y, x);
    if (rc != 0)
        return rc < 0 ? rc : 0;
    return run_as<Op, whole, 1>(name, &j);
}

extern "C" int ds_cuda_all(ds_tensor *y, const ds_tensor *x)
{
    return truth<product_of<uint64_t>>("all", y, x);
}

extern "C" int ds_cuda_any(ds_tensor *y, const ds_tensor *x)
{
    return truth<any_of>("any", y, x);
}

/* ---- sum of squares, for the host: blocks of SQUARES elements in f32, their sums in f64 */

#define SQUARES 65536

static __global__ void __launch_bounds__(THREADS)
    add_squares(double *sum, const float *part, int64_t n)
{
    __shared__ double shared[THREADS];
    double mine = 0;

    for (int64_t i = threadIdx.x; i < n; i += THREADS)
        mine += (double)part[i];
    mine = block_sum(mine, shared);
    if (threadIdx.x == 0)
        *sum = mine;
}

template <typename S> static int squares(job *j, const ds_tensor *x)
{
    double *sum;

    j->count = x->numel;
    j->each = SQUARES;
    j->pieces = (x->numel + SQUARES - 1) / SQUARES;
    j->team = THREADS;
    j->runs = j->rest.n > 0 && j->rest.stride[0][j->rest.n - 1] == 1;
    sum = (double *)ds_cuda_scratch(DS_CUDA_PARTIAL, 8 + (size_t)j->pieces * sizeof(float));
    if (!sum)
        return DS_ENOMEM;
    j->partial = j->y = sum + 1;
    DS_TRY(launch("sum_squares", rows_kernel<squares_of, S>, blocks_for(j->pieces, 1), THREADS, 0,
                  *j));
    return launch("sum_squares", add_squares, dim3(1), THREADS, 0, sum, (const float *)j->partial,
                  j->pieces);
}

extern "C" int ds_cuda_sum_squares(double *sum, const ds_tensor *x)
{
    job j = job();

    if (!ds_is_float(x->dtype))
        return ds_fail(DS_EINVAL, "sum_squares: not for %s", ds_name_of(x->dtype));
    *sum = 0;
    if (x->numel == 0)
        return 0;
    j.x = x->data;
    j.from = x->dtype;
    j.outputs = 1;
    j.scale = 1;
    j.dtype = DS_F32;
    for (int i = 0; i < x->ndim; i++)
        dims_add(&j.rest, i, 1, &x);
    dims_simplify(&j.rest);
    DS_TRY(DS_BY_FLOAT("sum_squares", x->dtype, S, squares<S>(&j, x)));
    DS_TRY(ds_cuda_check(cudaMemcpyAsync(sum, ds_cuda_scratch(DS_CUDA_PARTIAL, 8), sizeof *sum,
                                         cudaMemcpyDeviceToHost, ds_cuda.stream),
                         "sum_squares"));
    return ds_cuda_wait("sum_squares");
}
