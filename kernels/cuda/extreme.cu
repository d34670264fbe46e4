/* extreme.cu - max, min, argmax, argmin. */
#include "kernels/cuda/reduce.cuh"

static __device__ inline float least(float)
{
    return -INFINITY;
}
static __device__ inline int64_t least(int64_t)
{
    return INT64_MIN;
}

/* NaN wins. A: float or int64_t */
template <typename A> struct extreme_of {
    typedef A state;
    static constexpr bool in_order = sizeof(A) == 8;
    static __device__ A none()
    {
        return least(A());
    }
    static __device__ A of(A x, int64_t, int flip)
    {
        return flipped(x, flip);
    }
    static __device__ A join(A a, A b)
    {
        return ((a > b) | (a != a)) ? a : b;
    }
    static __device__ A step(A a, A x, int64_t, int flip)
    {
        return join(a, flipped(x, flip));
    }
};

/* The first one wins, and NaN before all. */
template <typename A> struct place_of {
    typedef found<A> state;
    static constexpr bool in_order = true;
    static __device__ state none()
    {
        return {least(A()), INT64_MAX};
    }
    static __device__ bool beats(A a, A b)
    {
        return (a > b) | ((a != a) & (b == b));
    }
    static __device__ state step(state a, A x, int64_t index, int flip)
    {
        A value = flipped(x, flip);

        return beats(value, a.value) || a.index == INT64_MAX ? state{value, index} : a;
    }
    static __device__ state join(state a, state b)
    {
        if (beats(a.value, b.value))
            return a;
        if (beats(b.value, a.value) || b.index < a.index)
            return b;
        return a;
    }
};

static int extreme(const char *name, ds_tensor *y, const ds_tensor *x, int flip)
{
    job j;
    int rc = reduction_start(&j, name, y, x);

    if (rc != 0)
        return rc < 0 ? rc : 0;
    if (x->numel == 0)
        return ds_fail(DS_EINVAL, "%s: no elements", name);
    j.flip = flip;
    if (!ds_is_float(x->dtype))
        return run_as<extreme_of<int64_t>, whole, 1>(name, &j);
    return by_real<extreme_of<float>>(name, &j);
}

extern "C" int ds_cuda_max(ds_tensor *y, const ds_tensor *x)
{
    return extreme("max", y, x, 0);
}

extern "C" int ds_cuda_min(ds_tensor *y, const ds_tensor *x)
{
    return extreme("min", y, x, 1);
}

static int place(const char *name, ds_tensor *y, const ds_tensor *x, int dim, int flip)
{
    job j;

    DS_TRY(ds_check_argmax(name, y, x, dim));
    DS_TRY(job_start(&j, name, y, x));
    if (y->numel == 0)
        return 0;
    if (j.count != x->shape[dim])
        return ds_fail(DS_EINVAL, "%s: the result is reduced in more than dimension %d", name,
                       dim + 1);
    j.flip = flip;
    if (!ds_is_float(x->dtype))
        return run_as<place_of<int64_t>, whole, 1>(name, &j);
    return DS_BY_FLOAT(name, x->dtype, S, run_as<place_of<float>, S, 1>(name, &j));
}

extern "C" int ds_cuda_argmax(ds_tensor *y, const ds_tensor *x, int dim)
{
    return place("argmax", y, x, dim, 0);
}

extern "C" int ds_cuda_argmin(ds_tensor *y, const ds_tensor *x, int dim)
{
    return place("argmin", y, x, dim, 1);
}
