/* linear_backward.cu - a linear layer's backward: products, and what lies between them: the gradient
 * before the activation, and its sums by columns.
 *
 * cuBLASLt makes both beside the products where it can (gemm.h): the sums that are a bias's gradient
 * with the weight's, and for the tanh form of GELU the slope, with or without sums. It overwrites the sums
 * and rounds them to the dtype of its result: so they are left to it where that is the wanted one and
 * nothing is added to them, or all is f32, and they are added from scratch memory. Else they are a pass:
 *
 * A warp takes a strip of columns, 16 bytes a lane, and a block's 8 warps walk down the rows, each
 * thread summing its columns in f32. The block's sums go to scratch, and a second kernel adds those of
 * all blocks of a strip, in their order. How many rows a block has depends on the shape alone: the same
 * bits on every device. 2000 to 8000 blocks fill any; their sums are a hundredth of the data.
 */
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/linear.h"

#define WARPS 8
#define BLOCKS 4096     /* wanted */
#define LEAST_ROWS 64   /* of a block */
#define MOST_PARTS 1024 /* blocks of one strip */

enum mode { SUMS, SLOPE, ACTIVATION };

template <typename S> struct backward_task {
    S *dh, *a;            /* a: may be NULL */
    const S *dy, *beside; /* slope, or h */
    float *partial;       /* [blocks of a strip, cols], or NULL: no sums */
    int64_t rows, cols;
    int64_t dh_row, a_row, dy_row, beside_row;
    int64_t each; /* rows of a block */
    int activation;
};

/* ---- kernels */

template <typename S, int N> static __device__ inline void to_floats(float *d, const pack<S, N> &v)
{
#pragma unroll
    for (int i = 0; i < N; i++)
        d[i] = to_float(v.of[i]);
}

/* One pack: dh, and a, as the mode says; d, dy in f32, becomes dh in f32. */
template <typename S, int N, int MODE>
static __device__ inline void backward_pack(const backward_task<S> &t, int64_t row, int64_t col,
                                            const pack<S, N> &beside, float *d)
{
    pack<S, N> out;
    activated v[N];
    float x[N];

    to_floats(x, beside);
    if (MODE == ACTIVATION)
        act_all<is_fine<S>, N>(v, x, t.activation);
#pragma unroll
    for (int i = 0; i < N; i++) {
        d[i] *= MODE == ACTIVATION ? v[i].slope : x[i];
        out.of[i] = from_float<S>(d[i]);
    }
    store_pack(t.dh + row * t.dh_row + col, out);
    if (MODE == ACTIVATION && t.a) {
#pragma unroll
        for (int i = 0; i < N; i++)
            out.of[i] = from_float<S>(v[i].y);
        store_pack(t.a + row * t.a_row + col, out);
    }
}

template <typename S, int N, int MODE>
static __global__ void __launch_bounds__(WARPS * 32) backward_kernel(backward_task<S> t)
{
    constexpr int UNROLL = MODE == SUMS ? 4 : 2;
    __shared__ float sums[WARPS][32 * N];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t strip = (int64_t)blockIdx.x * 32 * N, col = strip + lane * N;
    int64_t begin = (int64_t)blockIdx.y * t.each;
    int64_t end = begin + t.each < t.rows ? begin + t.each : t.rows;
    float sum[N] = {};

    for (int64_t row = begin + warp; row < end && col < t.cols; row += WARPS * UNROLL) {
        pack<S, N> dy[UNROLL], beside[UNROLL];
        float d[N];

#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            if (row + u * WARPS < end) {
                dy[u] = load_pack<S, N>(t.dy + (row + u * WARPS) * t.dy_row + col);
                if (MODE != SUMS)
                    beside[u] = load_pack<S, N>(t.beside + (row + u * WARPS) * t.beside_row + col);
            }
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            if (row + u * WARPS < end) {
                to_floats(d, dy[u]);
                if constexpr (MODE != SUMS)
                    backward_pack<S, N, MODE>(t, row + u * WARPS, col, beside[u], d);
#pragma unroll
                for (int i = 0; i < N; i++)
                    sum[i] += d[i];
            }
    }
    if (!t.partial)
        return;
#pragma unroll
    for (int i = 0; i < N; i++)
        sums[warp][lane * N + i] = sum[i];
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * N && strip + i < t.cols; i += WARPS * 32) {
        float total = 0;

        for (int w = 0; w < WARPS; w++)
            total += sums[w][i];
        t.partial[blockIdx.y * t.cols + strip + i] = total;
    }
}

/* 32 columns a block; each warp adds every eighth of the parts. */
template <typename D>
static __global__ void sum_parts(D *db, const float *partial, int parts, int64_t cols,
                                 int accumulate)
{
    __shared__ float sums[WARPS][32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t col = (int64_t)blockIdx.x * 32 + lane;
    float sum = 0;

    if (col < cols) {
#pragma unroll 8
        for (int p = warp; p < parts; p += WARPS)
            sum += partial[p * cols + col];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || col >= cols)
        return;
    sum = accumulate ? to_float(db[col]) : 0;
    for (int w = 0; w < WARPS; w++)
        sum += sums[w][lane];
    db[col] = from_float<D>(sum);
}

/* ---- launchers */

template <typename D>
static int finish(const char *name, ds_tensor *db, const float *partial, int parts, int64_t cols,
                  int accumulate)
{
    return launch(name, sum_parts<D>, blocks_for(cols, 32), WARPS * 32, 0, db->data, partial, parts,
                  cols, accumulate);
}

template <typename S, int N>
static int run_packs(const char *name, backward_task<S> t, int mode, ds_tensor *db, int accumulate)
{
    int64_t strips = (t.cols + 32 * N - 1) / (32 * N);
    int64_t parts = (BLOCKS + strips - 1) / strips;

    parts = parts > MOST_PARTS ? MOST_PARTS : parts;
    t.each = (t.rows + parts - 1) / parts;
    t.each = t.each < LEAST_ROWS ? LEAST_ROWS : (t.each + 31) / 32 * 32;
    parts = (t.rows + t.each - 1) / t.each;
    if (db) {
        t.partial =
            (float *)ds_cuda_scratch(DS_CUDA_PARTIAL, (size_t)(parts * t.cols) * sizeof(float));
        if (!t.partial)
            return DS_ENOMEM;
    }
    if (t.rows) {
        dim3 grid((unsigned)strips, (unsigned)parts);

        DS_TRY(mode == SUMS ? launch(name, backward_kernel<S, N, SUMS>, grid, WARPS * 32, 0, t)
               : mode == SLOPE
                   ? launch(name, backward_kernel<S, N, SLOPE>, grid, WARPS * 32, 0, t)
                   : launch(name, backward_kernel<S, N, ACTIVATION>, grid, WARPS * 32, 0, t));
    }
    if (!db)
        return 0;
    return DS_BY_FLOAT(name, db->dtype, D,
                       finish<D>(name, db, t.partial, (int)parts, t.cols, accumulate));
}

typedef struct backward_operands {
    ds_matrix dh, a, dy, beside; /* data NULL: is not there */
    int64_t rows, cols;
    int mode, activation;
} backward_operands;

/* Whether all rows of x begin at multiples of 16 bytes. */
static int whole_packs(const ds_matrix *x)
{
    return aligned_16(x->data) && x->row * ds_bytes_of(x->dtype) % 16 == 0;
}

template <typename S>
static int run_as(const char *name, const backward_operands *o, ds_tensor *db, int accumulate)
{
    backward_task<S> t = {(S *)o->dh.data,
                          (S *)o->a.data,
                          (const S *)o->dy.data,
                          (const S *)o->beside.data,
                          NULL,
                          o->rows,
                          o->cols,
                          o->dh.row,
                          o->a.row,
                          o->dy.row,
                          o->beside.row,
                          0,
                          o->activation};

    if (o->cols % per_16<S> == 0 && whole_packs(&o->dh) && whole_packs(&o->a) &&
        whole_packs(&o->dy) && whole_packs(&o->beside))
        return run_packs<S, per_16<S>>(name, t, o->mode, db, accumulate);
    return run_packs<S, 1>(name, t, o->mode, db, accumulate);
}

static int run(const char *name, const backward_operands *o, ds_tensor *db, int accumulate)
{
    if (o->cols == 0 || (o->mode == SUMS && !db))
        return 0;
    return DS_BY_FLOAT(name, o->dy.dtype, S, run_as<S>(name, o, db, accumulate));
}

/* ---- sums by cuBLASLt */

/* Where it may write what becomes db, given the result's dtype; NULL: it may not, or there is no db.
 * DS_ENOMEM. */
static int sums_of(void **out, const ds_tensor *db, int dtype, int accumulate)
{
    *out = NULL;
    if (!db || db->dtype != dtype || (accumulate && dtype != DS_F32))
        return 0;
    *out =
        accumulate ? ds_cuda_scratch(DS_CUDA_PARTIAL, (size_t)db->numel * sizeof(float)) : db->data;
    return *out ? 0 : DS_ENOMEM;
}

/* db is what was written there, or the sum of both. */
static int take_sums(const char *name, ds_tensor *db, const void *sums, int accumulate)
{
    return accumulate ? finish<float>(name, db, (const float *)sums, 1, db->numel, 1) : 0;
}

/* ---- the kernels of ops.def */

/* x, where there is one, as a matrix like dy: its dtype, rows x cols, rows without gaps. */
static int like(ds_matrix *out, const ds_tensor *x, const ds_tensor *dy, const char *name,
                const char *which)
{
    int64_t rows;

    if (!x)
        return 0;
    if (x->dtype != dy->dtype)
        return ds_fail(DS_EINVAL, "%s wants %s in the dtype of dy, %s", name, which,
                       ds_name_of(dy->dtype));
    DS_TRY(gemm_rows_of(out, &rows, x, name, which));
    if (x->numel != dy->numel || x->shape[x->ndim - 1] != dy->shape[dy->ndim - 1])
        return ds_fail(DS_EINVAL, "%s got %lld elements in dy and %lld in %s", name,
                       (long long)dy->numel, (long long)x->numel, which);
    if (x->shape[x->ndim - 1] > 1 && out->col != 1)
        return ds_fail(DS_EINVAL, "%s wants rows without gaps", name);
    return 0;
}

static int check_db(const ds_tensor *db, int64_t cols, const char *name)
{
    if (db && (db->numel != cols || !db->dense || !ds_is_float(db->dtype) || db->dtype == DS_F64))
        return ds_fail(DS_EINVAL, "%s wants db dense with %lld elements, not %lld %s", name,
                       (long long)cols, (long long)db->numel, ds_name_of(db->dtype));
    return 0;
}

extern "C" int ds_cuda_linear_backward_bias(ds_tensor *dh, ds_tensor *db, const ds_tensor *dy,
                                            const ds_tensor *slope, int accumulate)
{
    const char *name = "linear_backward_bias";
    backward_operands o = {};

    if (dy->dtype == DS_F64 || !ds_is_float(dy->dtype))
        return ds_cuda_refuse(name, dy->dtype);
    if (slope && !dh)
        return ds_fail(DS_EINVAL, "%s wants dh with slope", name);
    DS_TRY(gemm_rows_of(&o.dy, &o.rows, dy, name, "dy"));
    DS_TRY(like(&o.dy, dy, dy, name, "dy"));
    o.cols = dy->shape[dy->ndim - 1];
    DS_TRY(check_db(db, o.cols, name));
    if (slope) {
        DS_TRY(like(&o.dh, dh, dy, name, "dh"));
        DS_TRY(like(&o.beside, slope, dy, name, "slope"));
        o.mode = SLOPE;
    }
    return run(name, &o, db, accumulate);
}

extern "C" int ds_cuda_linear_backward_weight(ds_tensor *dw, ds_tensor *db, const ds_tensor *dy,
                                              const ds_tensor *x, int accumulate, int accumulate_db)
{
    const char *name = "linear_backward_weight";
    ds_tensor across = *dy;
    gemm p = {};
    int rc = DS_ENOSYS;

    if (dy->dtype == DS_F64 || !ds_is_float(dy->dtype))
        return ds_cuda_refuse(name, dy->dtype);
    if (dy->ndim != 2)
        return ds_fail(DS_EINVAL, "%s wants dy [M x N], not %d dimensions", name, dy->ndim);
    across.shape[0] = dy->shape[1], across.shape[1] = dy->shape[0];
    across.stride[0] = dy->stride[1], across.stride[1] = dy->stride[0];
    DS_TRY(ds_product_of(&p, dw, &across, x));
    DS_TRY(check_db(db, dy->shape[1], name));
    p.alpha = 1, p.beta = accumulate != 0;
    DS_TRY(sums_of(&p.sums, db, dw->dtype, accumulate_db));
    if (p.sums) {
        rc = gemm_run(name, &p);
        if (rc == 0)
            return take_sums(name, db, p.sums, accumulate_db);
        p.sums = NULL;
    }
    if (rc != DS_ENOSYS)
        return rc;
    if (db)
        DS_TRY(ds_cuda_linear_backward_bias(NULL, db, dy, NULL, accumulate_db));
    return gemm_run(name, &p);
}

/* linear_backward_act where cuBLASLt knows the slope: the product p, with the sums if it makes them, and
 * what is left in passes. DS_ENOSYS, nothing is done: it cannot. */
static int act_beside(const char *name, const gemm *given, backward_operands *o, ds_tensor *db,
                      int accumulate)
{
    activation_pass a = {o->beside.data, NULL,    o->a.data,   NULL,         o->rows,
                         o->cols,        o->cols, o->dy.dtype, o->activation};
    gemm p = *given;
    int rc;

    p.before = o->beside.data;
    DS_TRY(sums_of(&p.sums, db, p.y.dtype, accumulate));
    rc = gemm_run(name, &p);
    if (rc == DS_ENOSYS && p.sums) {
        p.sums = NULL;
        rc = gemm_run(name, &p);
    }
    if (rc == 0 && a.y)
        rc = activation_run(name, &a);
    if (rc < 0 || !db)
        return rc;
    o->mode = SUMS;
    return p.sums ? take_sums(name, db, p.sums, accumulate) : run(name, o, db, accumulate);
}

extern "C" int ds_cuda_linear_backward_act(ds_tensor *dh, ds_tensor *a, ds_tensor *db,
                                           const ds_tensor *dy, const ds_tensor *w,
                                           const ds_tensor *h, int activation, int accumulate)
{
    const char *name = "linear_backward_act";
    backward_operands o = {};
    gemm p = {};
    int64_t m;

    if (h->dtype == DS_F64 || !ds_is_float(h->dtype))
        return ds_cuda_refuse(name, h->dtype);
    DS_TRY(gemm_rows_of(&o.beside, &o.rows, h, name, "h"));
    DS_TRY(like(&o.beside, h, h, name, "h"));
    DS_TRY(like(&o.dh, dh, h, name, "dh"));
    DS_TRY(like(&o.a, a, h, name, "a"));
    DS_TRY(gemm_rows_of(&p.a, &m, dy, name, "dy"));
    o.cols = h->shape[h->ndim - 1];
    DS_TRY(check_db(db, o.cols, name));
    if (activation <= ACT_NONE || activation >= ACT_COUNT)
        return ds_fail(DS_EINVAL, "%s has no activation %d", name, activation);
    if (w->ndim != 2 || w->shape[1] != o.cols || w->shape[0] != dy->shape[dy->ndim - 1] ||
        m != o.rows || w->dtype != h->dtype || dy->dtype != h->dtype)
        return ds_fail(DS_EINVAL, "%s wants dy [%lld x N] and w [N x %lld] in the dtype of h, %s",
                       name, (long long)o.rows, (long long)o.cols, ds_name_of(h->dtype));
    p.y = o.dh;
    p.b = ds_matrix_of(w->data, w->stride[0], w->stride[1], w->dtype);
    p.m = m, p.n = o.cols, p.k = w->shape[0], p.alpha = 1;
    o.dy = o.dh;
    o.mode = ACTIVATION, o.activation = activation;
    if (activation == ACT_GELU_TANH && h->dense && (!a || a->dense)) {
        int rc = act_beside(name, &p, &o, db, accumulate);
        if (rc != DS_ENOSYS)
            return rc;
    }
    DS_TRY(gemm_run(name, &p));
    return run(name, &o, db, accumulate);
}
