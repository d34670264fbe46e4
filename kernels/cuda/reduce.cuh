/* reduce.cuh - how all reductions go; reduce.cu and extreme.cu say what is reduced to what.
 *
 * A reduction is a job: results, over the dimensions that are kept, each of `count` elements, over
 * those that go. Where the densest dimension of x is reduced ("rows"), neighbouring threads read
 * neighbouring elements of one result: 1 to 32 lanes or a block, as the rows are long. Where it is
 * kept ("columns"), neighbouring threads have neighbouring results, and the rows of a block's
 * threads are joined at the end. Either way memory is read once, 16 bytes at a time where it lies
 * so (integers only by rows), with four such loads of a thread under way. Few results of many
 * elements are cut into pieces, enough to fill the device, which go to scratch; finish_kernel joins
 * them in order.
 * Nothing depends on who comes first: same shapes on the same device, same bits.
 *
 * Sums are in f32: thousands of threads times four accumulators each, so that none adds more than
 * a few thousand numbers. Products are in f64, integers in i64.
 */
#ifndef DS_CUDA_REDUCE_CUH
#define DS_CUDA_REDUCE_CUH

#include "kernels/cuda/lines.cuh"

#define THREADS 256
#define RESIDENT 4 /* blocks that a processor has registers for */

/* ---- storage. Besides the types in memory: `real` and `whole`, whose dtype is known at run time only,
 * for what is too rare to have kernels for each. Real numbers become float, integers int64_t. */

struct real {
    char none;
};
struct whole {
    char none;
};

/* f(x), with x a pointer to the type in memory. */
template <typename S, typename F> static __device__ inline auto in_memory(const S *x, int, F f)
{
    return f(x);
}
template <typename F> static __device__ inline auto in_memory(const real *x, int dtype, F f)
{
    if (dtype == DS_F32)
        return f((const float *)x);
    return dtype == DS_BF16 ? f((const bf16 *)x) : f((const f16 *)x);
}
template <typename F> static __device__ inline auto in_memory(const whole *x, int dtype, F f)
{
    if (dtype == DS_I64)
        return f((const int64_t *)x);
    return dtype == DS_I32 ? f((const int32_t *)x) : f((const uint8_t *)x);
}

/* ---- an operation is a struct with the type `state`, none(), of(x, index, flip) that makes a
 * state of an element, step() that adds an element with a higher index than those in a state, and
 * join() that makes one of two. `flip`: the order is turned round, for min and argmin. in_order: whether
 * packs are taken by step(), and not by of() and join() in pairs, which is more exact, and less to wait
 * for; integers of 64 bits would take too many registers. */

static __device__ inline float flipped(float x, int flip)
{
    return flip ? -x : x;
}
static __device__ inline int64_t flipped(int64_t x, int flip)
{
    return flip ? ~x : x;
}

/* A value and where it was. */
template <typename A> struct found {
    A value;
    int64_t index;
};

template <typename A> static __device__ inline A from_lane(A a, int x)
{
    return __shfl_xor_sync(0xffffffff, a, x);
}
template <typename A> static __device__ inline found<A> from_lane(found<A> a, int x)
{
    return {__shfl_xor_sync(0xffffffff, a.value, x), __shfl_xor_sync(0xffffffff, a.index, x)};
}

/* ---- the job */

struct job {
    const void *x;
    int from;               /* dtype of x */
    dims kept, rest;        /* operand 0: x; of kept, 1: y */
    int64_t outputs, count; /* results, and elements of each */
    int64_t pieces, each;   /* of a result's elements; each: how many */
    int columns, wide;      /* wide: columns that lie on 16 bytes */
    int team;               /* threads of a result (rows), or side by side (columns) */
    int runs;               /* rows: the last of `rest` is dense, and long enough to go along it */
    int flip;
    void *partial; /* states [pieces, outputs] */
    void *y;
    int dtype, accumulate; /* of y; y += */
    float scale;
};

template <typename V> static __device__ inline void put_as(void *y, int64_t i, V value, int add)
{
    V *p = (V *)y + i;

    *p = add ? (V)(*p + value) : value;
}
template <typename S>
static __device__ inline void put_rounded(void *y, int64_t i, float value, int add)
{
    S *p = (S *)y + i;

    *p = from_float<S>(add ? to_float(*p) + value : value);
}

static __device__ inline void put(const job &j, int64_t at, float value)
{
    value = flipped(value, j.flip) * j.scale;
    if (j.dtype == DS_F32)
        put_rounded<float>(j.y, at, value, j.accumulate);
    else if (j.dtype == DS_BF16)
        put_rounded<bf16>(j.y, at, value, j.accumulate);
    else
        put_rounded<f16>(j.y, at, value, j.accumulate);
}
static __device__ inline void put(const job &j, int64_t at, double value)
{
    put(j, at, (float)value);
}
static __device__ inline void put(const job &j, int64_t at, uint64_t value)
{
    if (j.dtype == DS_I64)
        put_as<uint64_t>(j.y, at, value, j.accumulate);
    else if (j.dtype == DS_I32)
        put_as<uint32_t>(j.y, at, (uint32_t)value, j.accumulate);
    else
        put_as<uint8_t>(j.y, at, (uint8_t)value, j.accumulate);
}
static __device__ inline void put(const job &j, int64_t at, int64_t value)
{
    put(j, at, (uint64_t)flipped(value, j.flip));
}
template <typename A> static __device__ inline void put(const job &j, int64_t at, found<A> a)
{
    put_as<int64_t>(j.y, at, a.index, 0);
}

template <typename State>
static __device__ inline void give_result(const job &j, int64_t output, State a)
{
    int64_t at[2];

    offsets(at, j.kept, j.kept.n, output);
    put(j, at[1], a);
}

/* A result, or a part of one. */
template <typename State>
static __device__ inline void give(const job &j, int64_t output, int64_t piece, State a)
{
    if (j.pieces > 1)
        ((State *)j.partial)[piece * j.outputs + output] = a;
    else
        give_result(j, output, a);
}

/* ---- rows */

/* a, and N elements from number r on; those of a sum are added in pairs first. */
template <typename Op, typename S, int N>
static __device__ inline typename Op::state fold(typename Op::state a, const pack<S, N> &x,
                                                 int64_t r, int flip)
{
    if constexpr (Op::in_order) {
#pragma unroll
        for (int i = 0; i < N; i++)
            a = Op::step(a, widened(x.of[i]), r + i, flip);
        return a;
    } else {
        typename Op::state s[N];

#pragma unroll
        for (int i = 0; i < N; i++)
            s[i] = Op::of(widened(x.of[i]), r + i, flip);
#pragma unroll
        for (int half = N / 2; half; half /= 2)
#pragma unroll
            for (int i = 0; i < half; i++)
                s[i] = Op::join(s[i], s[i + half]);
        return Op::join(a, s[0]);
    }
}

/* n elements that lie together, the first being number r, by `team` threads. U packs
 * of a thread are under way; one of what becomes 64 bits wide, which leaves no registers for more. */
template <typename Op, typename S>
static __device__ inline void fold_run(typename Op::state (&a)[4], const S *x, int64_t n, int64_t r,
                                       int lane, int team, int flip)
{
    constexpr int N = per_16<S>;
    constexpr int U = sizeof(typename Op::state) == 8 || sizeof(widened(S())) == 8 ? 1 : 4;
    int head = (int)head_of(x, n), packs = (int)((n - head) / N), tail = (int)((n - head) % N);
    const pack<S, N> *p = (const pack<S, N> *)(x + head);

    for (int k = lane; k < head; k += team)
        a[0] = Op::step(a[0], widened(x[k]), r + k, flip);
    for (int i = lane; i < packs; i += U * team) {
        pack<S, N> v[U];

#pragma unroll
        for (int u = 0; u < U; u++)
            if (i + u * team < packs)
                v[u] = p[i + u * team];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (i + u * team < packs)
                a[u] = fold<Op>(a[u], v[u], r + head + (int64_t)(i + u * team) * N, flip);
    }
    for (int k = lane; k < tail; k += team)
        a[2] = Op::step(a[2], widened(x[n - tail + k]), r + n - tail + k, flip);
}

/* The elements [begin, end) of one result, of which x is the first, by `team` threads. */
template <typename Op, typename S>
static __device__ inline typename Op::state fold_range(const S *x, const job &j, int64_t begin,
                                                       int64_t end, int lane, int team)
{
    typename Op::state a[4] = {Op::none(), Op::none(), Op::none(), Op::none()};
    int last = j.rest.n - 1;

    if (!j.runs) {
        for (int64_t r = begin + lane; r < end; r += team)
            a[0] = Op::step(a[0], widened(x[offset(j.rest, last + 1, r)]), r, j.flip);
        return a[0];
    }
    while (begin < end) {
        int64_t in, n, size = j.rest.size[last], line = divide(j.rest, last, begin, &in);

        n = size - in < end - begin ? size - in : end - begin;
        fold_run<Op>(a, x + offset(j.rest, last, line) + in, n, begin, lane, team, j.flip);
        begin += n;
    }
    return Op::join(Op::join(a[0], a[1]), Op::join(a[2], a[3]));
}

/* Joined over a team of lanes, or over the block; its first thread gets it. */
template <typename Op>
static __device__ inline typename Op::state join_team(typename Op::state a, int team)
{
    __shared__ typename Op::state shared[THREADS / 32];

    for (int k = (team < 32 ? team : 32) / 2; k; k /= 2)
        a = Op::join(a, from_lane(a, k));
    if (team <= 32)
        return a;
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = a;
    __syncthreads();
    for (int k = 1; k < THREADS / 32 && threadIdx.x == 0; k++)
        a = Op::join(a, shared[k]);
    __syncthreads();
    return a;
}

/* Every team has a result, or a piece of one, and then the next; whole warps go round together. */
template <typename Op, typename S>
static __global__ void __launch_bounds__(THREADS, RESIDENT) rows_kernel(job j)
{
    int team = j.team, lane = threadIdx.x % team;
    int64_t step = global_threads() / team, first = (global_thread() & ~31) / team;

    for (; first < j.outputs * j.pieces; first += step) {
        int64_t output = first + (team < 32 ? threadIdx.x % 32 / team : 0), piece = 0, begin, end;
        typename Op::state a = Op::none();

        if (j.pieces > 1)
            output = divide((unsigned)output, j.pieces, &piece);
        begin = piece * j.each;
        end = j.count - begin < j.each ? j.count : begin + j.each;
        if (output < j.outputs)
            a = in_memory((const S *)j.x, j.from, [&](const auto *x) {
                return fold_range<Op>(x + offset(j.kept, j.kept.n, output), j, begin, end, lane,
                                      team);
            });
        a = join_team<Op>(a, team);
        if (output < j.outputs && lane == 0)
            give(j, output, piece, a);
    }
}

/* ---- columns: a block is `width` threads wide, and as high as it has threads */

/* Joins what the threads of a column have; those of the first row get it. */
template <typename Op, int N>
static __device__ inline void join_down(typename Op::state (&a)[N], int width)
{
    __shared__ typename Op::state shared[N * THREADS];
    int me = threadIdx.x;

#pragma unroll
    for (int i = 0; i < N; i++)
        shared[i * THREADS + me] = a[i];
    __syncthreads();
    for (int half = THREADS / 2; half >= width; half /= 2) {
#pragma unroll
        for (int i = 0; i < N && me < half; i++)
            shared[i * THREADS + me] =
                Op::join(shared[i * THREADS + me], shared[i * THREADS + me + half]);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        a[i] = shared[i * THREADS + me];
}

/* Rows r, r + high, … below `end` of N columns, the first of which begins at x. */
template <typename Op, typename S, int N>
static __device__ inline void fold_columns(typename Op::state (&a)[N], const S *x, const job &j,
                                           int64_t r, int64_t end, int high)
{
    constexpr int U = N == 1 ? 8 : 4; /* small loads: more of them under way */
    int64_t step = j.rest.n == 1 ? j.rest.stride[0][0] : 0;

    for (; j.rest.n == 1 && r + (U - 1) * high < end; r += U * high) {
        pack<S, N> v[U];

#pragma unroll
        for (int u = 0; u < U; u++)
            v[u] = *(const pack<S, N> *)(x + (r + u * high) * step);
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int u = 0; u < U; u++)
                a[i] = Op::step(a[i], widened(v[u].of[i]), r + u * high, j.flip);
    }
    for (; r < end; r += high) {
        pack<S, N> v = *(const pack<S, N> *)(x + offset(j.rest, j.rest.n, r));

#pragma unroll
        for (int i = 0; i < N; i++)
            a[i] = Op::step(a[i], widened(v.of[i]), r, j.flip);
    }
}

template <typename Op, typename S, int N>
static __global__ void __launch_bounds__(THREADS, RESIDENT) columns_kernel(job j)
{
    int last = j.kept.n - 1, width = j.team, x = threadIdx.x % width, y = threadIdx.x / width;
    int64_t inner = j.kept.size[last], parts = (inner + N * width - 1) / (N * width);
    int64_t piece, part,
        line = divide((unsigned)divide(blockIdx.x, j.pieces, &piece), parts, &part);
    int64_t column = (part * width + x) * N, begin = piece * j.each, end = begin + j.each;
    typename Op::state a[N];

#pragma unroll
    for (int i = 0; i < N; i++)
        a[i] = Op::none();
    if (column < inner)
        in_memory((const S *)j.x, j.from, [&](const auto *from) {
            from += offset(j.kept, last, line) + column * j.kept.stride[0][last];
            fold_columns<Op>(a, from, j, begin + y, end < j.count ? end : j.count, THREADS / width);
        });
    join_down<Op, N>(a, width);
#pragma unroll
    for (int i = 0; i < N; i++)
        if (y == 0 && column < inner)
            give(j, line * inner + column + i, piece, a[i]);
}

/* ---- the second pass: the pieces of every result, in order. None at all: what a reduction of no
 * elements gives. */

template <typename Op> static __global__ void __launch_bounds__(THREADS) finish_kernel(job j)
{
    int width = j.team;
    int64_t output = (int64_t)blockIdx.x * width + threadIdx.x % width, pieces = j.pieces;
    typename Op::state a[1] = {Op::none()};

    if (output < j.outputs)
        for (int64_t p = threadIdx.x / width; p < pieces; p += THREADS / width)
            a[0] = Op::join(a[0], ((const typename Op::state *)j.partial)[p * j.outputs + output]);
    join_down<Op, 1>(a, width);
    if ((int)threadIdx.x < width && output < j.outputs)
        give_result(j, output, a[0]);
}

/* ---- the plan */

/* How a job is divided, for the blocks that a processor runs at a time: the more pieces, the
 * better the device is filled, until they are short. A piece is a multiple of `grain` elements. */
static inline void cut(job *j, int64_t blocks, int64_t shortest, int64_t grain)
{
    int64_t pieces = (int64_t)ds_cuda.processors * RESIDENT / blocks, most = j->count / shortest;

    pieces = pieces < most ? pieces : most;
    j->each = pieces > 1 ? (j->count + pieces - 1) / pieces : j->count;
    j->each = (j->each + grain - 1) / grain * grain;
    j->pieces = (j->count + j->each - 1) / j->each;
}

/* Whether columns of x lie on 16 bytes, all of them. */
static inline int is_wide(const job *j, int64_t bytes)
{
    int last = j->kept.n - 1, n = (int)(16 / bytes);
    int64_t odd = (int64_t)((uintptr_t)j->x & 15) | j->kept.size[last] % n;

    for (int i = 0; i < last; i++)
        odd |= j->kept.stride[0][i] % n;
    for (int i = 0; i < j->rest.n; i++)
        odd |= j->rest.stride[0][i] % n;
    return !odd && j->kept.stride[0][last] == 1;
}

/* vectors: there is a kernel for columns of 16 bytes. */
static inline void plan(job *j, int vectors)
{
    int last = j->rest.n - 1;
    int64_t bytes = ds_bytes_of(j->from), n = 16 / bytes, packs = (j->count + n - 1) / n;

    if (j->kept.n > 0 && last >= 0) {
        int64_t kept = j->kept.stride[0][j->kept.n - 1], rest = j->rest.stride[0][last];

        j->columns = kept != 0 && (rest == 0 || kept < rest);
    } else {
        j->columns = j->kept.n > 0;
    }
    if (j->columns) {
        int64_t inner = j->kept.size[j->kept.n - 1], wide;

        j->wide = vectors && is_wide(j, bytes);
        wide = j->wide ? n : 1;
        j->team = power_of_two(inner / wide, 32);
        cut(j, j->outputs / inner * ((inner + wide * j->team - 1) / (wide * j->team)),
            THREADS / j->team * 8, THREADS / j->team);
        return;
    }
    j->runs = last >= 0 && j->rest.stride[0][last] == 1 &&
              (last == 0 || j->rest.size[last] * bytes >= 256);
    j->team = packs <= 256 ? power_of_two(packs, 32) : THREADS;
    j->each = j->count;
    j->pieces = 1;
    if (j->team > 32)
        cut(j, j->outputs, THREADS * 4 * n, THREADS);
}

template <typename Op, typename S, int N> static int run_as(const char *name, job *j)
{
    typedef typename Op::state state;

    if (j->count == 0) {
        j->team = power_of_two(j->outputs, 32);
        return launch(name, finish_kernel<Op>, blocks_for(j->outputs, j->team), THREADS, 0, *j);
    }
    plan(j, N > 1);
    if (j->pieces > 1) {
        j->partial =
            ds_cuda_scratch(DS_CUDA_PARTIAL, (size_t)(j->pieces * j->outputs) * sizeof(state));
        if (!j->partial)
            return DS_ENOMEM;
    }
    if (!j->columns) {
        dim3 grid = j->team > 32 ? blocks_for(j->outputs * j->pieces, 1)
                                 : grid_for(j->outputs * j->team, THREADS, 32);

        DS_TRY(launch(name, rows_kernel<Op, S>, grid, THREADS, 0, *j));
    } else {
        int64_t inner = j->kept.size[j->kept.n - 1], width = j->team * (j->wide ? N : 1);
        int64_t blocks = j->outputs / inner * ((inner + width - 1) / width) * j->pieces;

        if (blocks > 0x7fffffff)
            return ds_fail(DS_EINVAL, "%s: %lld results are more than cuda can make at once", name,
                           (long long)j->outputs);
        if (j->wide)
            DS_TRY(launch(name, columns_kernel<Op, S, N>, blocks_for(blocks, 1), THREADS, 0, *j));
        else
            DS_TRY(launch(name, columns_kernel<Op, S, 1>, blocks_for(blocks, 1), THREADS, 0, *j));
    }
    if (j->pieces == 1)
        return 0;
    j->team = power_of_two(j->outputs, 32);
    return launch(name, finish_kernel<Op>, blocks_for(j->outputs, j->team), THREADS, 0, *j);
}

/* x reduced to y, which has its dimensions, with size 1 where they go. */
static inline int job_start(job *j, const char *name, const ds_tensor *y, const ds_tensor *x)
{
    const ds_tensor *both[] = {x, y};
    char one[128], other[128];

    *j = job();
    j->x = x->data;
    j->from = x->dtype;
    j->y = y->data;
    j->dtype = y->dtype;
    j->scale = 1;
    j->outputs = j->count = 1;
    for (int i = 0; i < x->ndim; i++) {
        int kept = y->ndim == x->ndim && y->shape[i] == x->shape[i];

        if (y->ndim != x->ndim || (!kept && y->shape[i] != 1))
            return ds_fail(DS_EINVAL, "%s: %s cannot hold the result from %s", name,
                           ds_shape_text(one, y), ds_shape_text(other, x));
        *(kept ? &j->outputs : &j->count) *= x->shape[i];
        dims_add(kept ? &j->kept : &j->rest, i, 2, both);
    }
    dims_simplify(&j->kept);
    dims_simplify(&j->rest);
    return 0;
}

/* Operations on real numbers: by storage type, and with columns of 16 bytes. */
template <typename Op> static int by_real(const char *name, job *j)
{
    return DS_BY_FLOAT(name, j->from, S, run_as<Op, S, per_16<S>>(name, j));
}

/* The same for operations that make real numbers of real ones and integers of integers; 1: there is
 * nothing to do. */
static inline int reduction_start(job *j, const char *name, const ds_tensor *y, const ds_tensor *x)
{
    if (x->dtype == DS_F64)
        return ds_cuda_refuse(name, x->dtype);
    if (ds_is_float(y->dtype) != ds_is_float(x->dtype))
        return ds_fail(DS_EINVAL, "%s: %s cannot hold the result from %s", name,
                       ds_name_of(y->dtype), ds_name_of(x->dtype));
    DS_TRY(job_start(j, name, y, x));
    return y->numel == 0;
}

#endif
