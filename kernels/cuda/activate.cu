/* activate.cu - activations: one pass over dense memory, 32 bytes of each thread under way at once; or,
 * element by element, over rows with gaps and with a bias, for what a product could not do itself. */
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/linear.h"

#define THREADS 256
#define UNROLL 2

/* ---- kernels */

/* `full` packs of N, a block's together; the last n % N elements are the last thread's. */
template <typename S, int N>
static __global__ void __launch_bounds__(THREADS)
    activate_dense(S *y, S *slope, const S *h, int64_t n, int activation)
{
    int64_t full = n / N, first = (int64_t)blockIdx.x * THREADS * UNROLL + threadIdx.x;
    pack<S, N> in[UNROLL], out;
    activated v[N];
    float x[N];

#pragma unroll
    for (int u = 0; u < UNROLL; u++)
        if (first + u * THREADS < full)
            in[u] = load_pack<S, N>(h + (first + u * THREADS) * N);
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        int64_t at = (first + u * THREADS) * N;

        if (first + u * THREADS >= full)
            break;
#pragma unroll
        for (int i = 0; i < N; i++)
            x[i] = to_float(in[u].of[i]);
        act_all<is_fine<S>, N>(v, x, activation);
#pragma unroll
        for (int i = 0; i < N; i++)
            out.of[i] = from_float<S>(v[i].y);
        store_pack(y + at, out);
        if (!slope)
            continue;
#pragma unroll
        for (int i = 0; i < N; i++)
            out.of[i] = from_float<S>(v[i].slope);
        store_pack(slope + at, out);
    }
    if (blockIdx.x == gridDim.x - 1 && threadIdx.x == THREADS - 1)
        for (int64_t i = full * N; i < n; i++) {
            x[0] = to_float(h[i]);
            act_all<is_fine<S>, 1>(v, x, activation);
            y[i] = from_float<S>(v[0].y);
            if (slope)
                slope[i] = from_float<S>(v[0].slope);
        }
}

template <typename S>
static __global__ void activate_rows(S *y, S *slope, const S *h, const float *bias, int64_t rows,
                                     int64_t cols, int64_t row, int activation)
{
    for (int64_t i = global_thread(); i < rows * cols; i += global_threads()) {
        int64_t at = i / cols * row + i % cols;
        float x = to_float(h[at]) + (bias ? bias[i % cols] : 0.0f);
        activated v;

        act_all<is_fine<S>, 1>(&v, &x, activation);
        y[at] = from_float<S>(v.y);
        if (slope)
            slope[i] = from_float<S>(v.slope);
    }
}

/* ---- launchers */

template <typename S> static int run_as(const char *name, const activation_pass *p)
{
    int64_t n = p->rows * p->cols;
    int together = !p->bias && (p->row == p->cols || p->rows == 1);

    if (together && aligned_16(p->h) && aligned_16(p->y) && aligned_16(p->slope))
        return launch(name, activate_dense<S, per_16<S>>,
                      blocks_for(n, THREADS * UNROLL * per_16<S>), THREADS, 0, p->y, p->slope, p->h,
                      n, p->activation);
    return launch(name, activate_rows<S>, grid_for(n, THREADS * 4, 8), THREADS, 0, p->y, p->slope,
                  p->h, p->bias, p->rows, p->cols, p->row, p->activation);
}

int activation_run(const char *name, const activation_pass *p)
{
    if (p->rows == 0 || p->cols == 0)
        return 0;
    return DS_BY_FLOAT(name, p->dtype, S, run_as<S>(name, p));
}

extern "C" int ds_cuda_activate(ds_tensor *y, ds_tensor *slope, const ds_tensor *h, int activation)
{
    activation_pass p = {h->data,  NULL,     y->data,   slope ? slope->data : NULL, 1, h->numel,
                         h->numel, h->dtype, activation};

    if (activation <= ACT_NONE || activation >= ACT_COUNT)
        return ds_fail(DS_EINVAL, "activate has no activation %d", activation);
    if (!ds_is_float(h->dtype) || y->dtype != h->dtype || y->numel != h->numel || !y->dense ||
        !h->dense ||
        (slope && (!slope->dense || slope->numel != h->numel || slope->dtype != h->dtype)))
        return ds_fail(DS_EINVAL, "activate wants y and slope dense and like h, %lld %s",
                       (long long)h->numel, ds_name_of(h->dtype));
    return activation_run("activate", &p);
}
