/* softmax.cu - softmax and log_softmax along a dimension, forward and backward.
 *
 * Lines that are dense and lie on 16 bytes (rows_kernel): a line has a team of 1 to 32 lanes, or a
 * block; each thread keeps four times 16 bytes of every operand in registers, so that lines of up
 * to 16,384 elements of f32 and 32,768 of bf16 are read once. What is longer is read again. All
 * other lines (lines_kernel): a block has `wide` lines side by side and `high` threads for each,
 * numbered so that neighbouring threads are neighbours in memory; the second reading comes from
 * the cache.
 */
#include "kernels/cuda/softmax.cuh"

#define THREADS 256
#define KEPT 4 /* packs of a thread that stay in registers */

enum { SOFTMAX, LOG_SOFTMAX, SOFTMAX_BACKWARD, LOG_SOFTMAX_BACKWARD };

/* Operands: 0 the result; 1 x, or dy; 2 nothing, or y. */
struct job {
    void *out;
    const void *a, *b;
    dims lines;
    int64_t count, n; /* of lines; elements of each */
    int64_t step[3];  /* from one to the next, of every operand */
    int team;         /* rows_kernel: threads of a line */
    int wide, across; /* lines_kernel; across: lines lie denser than elements */
};

/* What a line is brought to: forward, a sum of exponentials; backward, `sum` alone. */
template <int kind> constexpr bool forward = kind == SOFTMAX || kind == LOG_SOFTMAX;

template <int kind, int N>
static __device__ inline exp_sum add(exp_sum s, const float (&a)[N], const float (&b)[N])
{
    if constexpr (forward<kind>) {
        return exp_add(s, a);
    } else {
        float sum = 0;

#pragma unroll
        for (int i = 0; i < N; i++)
            sum += kind == SOFTMAX_BACKWARD ? a[i] * b[i] : a[i];
        s.sum += sum;
        return s;
    }
}

template <int kind> static __device__ inline exp_sum join(exp_sum s, exp_sum t)
{
    if constexpr (forward<kind>)
        return exp_join(s, t);
    return {0, s.sum + t.sum};
}

/* What an element needs of the whole line's state: most and 1 / Σ, most and log Σ, or Σ. */
template <int kind> static __device__ inline exp_sum whole(exp_sum s)
{
    if constexpr (forward<kind>)
        return {shift_of(s.most), kind == SOFTMAX ? 1 / s.sum : logf(s.sum)};
    return s;
}

/* softmax: dx = y (dy - Σ dy y); log_softmax: dx = dy - exp(y) Σ dy */
template <int kind> static __device__ inline float result(exp_sum s, float a, float b)
{
    if constexpr (kind == SOFTMAX)
        return exp_fast(a - s.most) * s.sum;
    if constexpr (kind == LOG_SOFTMAX)
        return (a - s.most) - s.sum;
    if constexpr (kind == SOFTMAX_BACKWARD)
        return b * (a - s.sum);
    return a - exp_fast(b) * s.sum;
}

/* ---- dense lines */

template <typename S> using pack16 = pack<S, per_16<S>>;

template <typename S>
static __device__ inline void widen(float (&to)[per_16<S>], const pack16<S> &from)
{
#pragma unroll
    for (int i = 0; i < per_16<S>; i++)
        to[i] = to_float(from.of[i]);
}

/* The compiler shall not keep what it made of x so far, only x: floats take twice the registers. */
template <typename S> static __device__ inline void forget(pack16<S> &x)
{
#ifdef __CUDA_ARCH__
    uint4 &v = (uint4 &)x;

    asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
#else
    (void)x;
#endif
}

template <int kind, typename S>
static __device__ inline exp_sum add_pack(exp_sum s, const pack16<S> &a, const pack16<S> &b)
{
    float x[per_16<S>], y[per_16<S>];

    widen<S>(x, a);
    widen<S>(y, b);
    return add<kind>(s, x, y);
}

template <int kind, typename S>
static __device__ inline pack16<S> result_pack(exp_sum s, const pack16<S> &a, const pack16<S> &b)
{
    pack16<S> out;

#pragma unroll
    for (int i = 0; i < per_16<S>; i++)
        out.of[i] = from_float<S>(result<kind>(s, to_float(a.of[i]), to_float(b.of[i])));
    return out;
}

/* Joined over the lanes of a team, or over the block; all of them get it. */
template <int kind> static __device__ inline exp_sum join_team(exp_sum s, int team)
{
    __shared__ exp_sum shared[32];
    int lanes = team < 32 ? team : 32;

    for (int k = lanes / 2; k; k /= 2) {
        exp_sum t = {__shfl_xor_sync(0xffffffff, s.most, k), __shfl_xor_sync(0xffffffff, s.sum, k)};

        s = join<kind>(s, t);
    }
    if (team <= 32)
        return s;
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = s;
    __syncthreads();
    s = shared[0];
    for (int k = 1; k < team / 32; k++)
        s = join<kind>(s, shared[k]);
    return s;
}

template <int kind, typename S> static __global__ void __launch_bounds__(1024) rows_kernel(job j)
{
    int team = j.team, lane = threadIdx.x % team;
    int64_t line = global_thread() / team, packs = j.n / per_16<S>, at[3];
    exp_sum s = {-INFINITY, 0};
    pack16<S> ra[KEPT] = {}, rb[KEPT] = {};

    offsets(at, j.lines, j.lines.n, line < j.count ? line : 0);
    if (line >= j.count)
        packs = 0;

    const pack16<S> *a = (const pack16<S> *)((const S *)j.a + at[1]);
    const pack16<S> *b = (const pack16<S> *)((const S *)j.b + at[2]);
    pack16<S> *out = (pack16<S> *)((S *)j.out + at[0]);

#pragma unroll
    for (int u = 0; u < KEPT; u++)
        if (lane + u * team < packs) {
            ra[u] = a[lane + u * team];
            if (!forward<kind>)
                rb[u] = b[lane + u * team];
        }
#pragma unroll
    for (int u = 0; u < KEPT; u++)
        if (lane + u * team < packs)
            s = add_pack<kind, S>(s, ra[u], rb[u]);
#pragma unroll 4
    for (int64_t i = lane + KEPT * team; i < packs; i += team)
        s = add_pack<kind, S>(s, a[i], forward<kind> ? a[i] : b[i]);
    s = whole<kind>(join_team<kind>(s, team));
#pragma unroll
    for (int u = 0; u < KEPT; u++) {
        forget<S>(ra[u]);
        forget<S>(rb[u]);
    }
#pragma unroll
    for (int u = 0; u < KEPT; u++)
        if (lane + u * team < packs)
            out[lane + u * team] = result_pack<kind, S>(s, ra[u], rb[u]);
    for (int64_t i = lane + KEPT * team; i < packs; i += KEPT * team) {
        /* The result may be an input: loads stand before the stores, to be under way together. */
#pragma unroll
        for (int u = 0; u < KEPT; u++)
            if (i + u * team < packs) {
                ra[u] = a[i + u * team];
                rb[u] = forward<kind> ? ra[u] : b[i + u * team];
            }
#pragma unroll
        for (int u = 0; u < KEPT; u++)
            if (i + u * team < packs)
                out[i + u * team] = result_pack<kind, S>(s, ra[u], rb[u]);
    }
}

/* ---- all other lines */

template <int kind, typename S>
static __global__ void __launch_bounds__(THREADS) lines_kernel(job j)
{
    __shared__ exp_sum shared[THREADS];
    int wide = j.wide, high = THREADS / wide, me = threadIdx.x;
    int x = j.across ? me % wide : me / high, y = j.across ? me / wide : me % high;
    int64_t line = (int64_t)blockIdx.x * wide + x, n = line < j.count ? j.n : 0, at[3];
    exp_sum s = {-INFINITY, 0};

    offsets(at, j.lines, j.lines.n, line < j.count ? line : 0);

    const S *a = (const S *)j.a + at[1], *b = forward<kind> ? a : (const S *)j.b + at[2];
    S *out = (S *)j.out + at[0];
    int64_t a_step = j.step[1], b_step = forward<kind> ? a_step : j.step[2];

#pragma unroll 4
    for (int64_t i = y; i < n; i += high) {
        float p[1] = {to_float(a[i * a_step])}, q[1] = {to_float(b[i * b_step])};

        s = add<kind>(s, p, q);
    }
    shared[y * wide + x] = s;
    __syncthreads();
    for (int half = high / 2; half; half /= 2) {
        if (y < half)
            shared[y * wide + x] = join<kind>(shared[y * wide + x], shared[(y + half) * wide + x]);
        __syncthreads();
    }
    s = whole<kind>(shared[x]);
    for (int64_t i = y; i < n; i += KEPT * high) {
        S p[KEPT], q[KEPT];

#pragma unroll
        for (int u = 0; u < KEPT; u++)
            if (i + u * high < n) {
                p[u] = a[(i + u * high) * a_step];
                q[u] = b[(i + u * high) * b_step];
            }
#pragma unroll
        for (int u = 0; u < KEPT; u++)
            if (i + u * high < n)
                out[(i + u * high) * j.step[0]] =
                    from_float<S>(result<kind>(s, to_float(p[u]), to_float(q[u])));
    }
}

/* ---- launching */

/* Whether all lines of all operands are dense and lie on 16 bytes. */
static int is_dense(const job *j, int count, int64_t each)
{
    const void *const data[] = {j->out, j->a, j->b};

    for (int k = 0; k < count; k++) {
        if (j->step[k] != 1 || !aligned_16(data[k]))
            return 0;
        for (int i = 0; i < j->lines.n; i++)
            if (j->lines.stride[k][i] % each != 0)
                return 0;
    }
    return j->n % each == 0;
}

template <int kind, typename S> static int run(const char *name, job *j)
{
    int64_t each = per_16<S>, packs = j->n / each;
    int last = j->lines.n - 1;

    if (is_dense(j, forward<kind> ? 2 : 3, each)) {
        int threads = THREADS;

        j->team = power_of_two(packs, 32);
        if (packs > 32 * KEPT)
            threads = j->team = power_of_two((packs + KEPT - 1) / KEPT, 1024);
        return launch(name, rows_kernel<kind, S>, blocks_for(j->count * j->team, threads), threads,
                      0, *j);
    }
    j->across = last >= 0 && j->step[0] > j->lines.stride[0][last];
    j->wide =
        j->across ? power_of_two(j->lines.size[last], 32) : THREADS / power_of_two(j->n, THREADS);
    return launch(name, lines_kernel<kind, S>, blocks_for(j->count, j->wide), THREADS, 0, *j);
}

/* t: the result, and one or two inputs. */
template <int kind>
static int along(const char *name, int count, const ds_tensor *const *t, int dim)
{
    job j = job();

    DS_TRY(ds_check_softmax(name, count, t, dim));
    DS_TRY(lines_start(&j.lines, &j.count, name, dim, count, t));
    for (int k = 0; k < count; k++)
        j.step[k] = t[k]->shape[dim] == 1 ? 1 : t[k]->stride[dim];
    j.out = t[0]->data;
    j.a = t[1]->data;
    j.b = t[count - 1]->data;
    j.n = t[0]->shape[dim];
    if (j.count == 0 || j.n == 0)
        return t[0]->dtype == DS_F64 ? ds_cuda_refuse(name, DS_F64) : 0;
    return DS_BY_FLOAT(name, t[0]->dtype, S, run<kind, S>(name, &j));
}

extern "C" int ds_cuda_softmax(ds_tensor *y, const ds_tensor *x, int dim)
{
    const ds_tensor *t[] = {y, x};

    return along<SOFTMAX>("softmax", 2, t, dim);
}

extern "C" int ds_cuda_softmax_backward(ds_tensor *dx, const ds_tensor *dy, const ds_tensor *y,
                                        int dim)
{
    const ds_tensor *t[] = {dx, dy, y};

    return along<SOFTMAX_BACKWARD>("softmax_backward", 3, t, dim);
}

extern "C" int ds_cuda_log_softmax(ds_tensor *y, const ds_tensor *x, int dim)
{
    const ds_tensor *t[] = {y, x};

    return along<LOG_SOFTMAX>("log_softmax", 2, t, dim);
}

extern "C" int ds_cuda_log_softmax_backward(ds_tensor *dx, const ds_tensor *dy, const ds_tensor *y,
                                            int dim)
{
    const ds_tensor *t[] = {dx, dy, y};

    return along<LOG_SOFTMAX_BACKWARD>("log_softmax_backward", 3, t, dim);
}
