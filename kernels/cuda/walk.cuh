/* walk.cuh - one kernel over up to four tensors of different strides and storage types.
 *
 * A walk visits the elements of the output, t[0], in the order of its memory; the other tensors
 * broadcast to its shape. The host drops dimensions of size 1, merges those that lie in memory like
 * one, and passes what is left by value (struct places). A thread then handles a few units: packs of
 * up to 16 bytes where every operand follows the innermost dimension or is constant along it and lies
 * aligned, single elements otherwise. Dense tensors have one dimension and no division; for others
 * the unit's number is divided by the sizes, by multiplication (fast_div). Walks are cut in halves
 * until units count in 32 bits; offsets have 64.
 *
 * An operation is a functor on widened values (f32 for f32, bf16 and f16, the type itself otherwise)
 * with `inputs`, 1 to 3. An operand may be a number instead: in its wide type, so not rounded.
 */
#ifndef DS_CUDA_WALK_CUH
#define DS_CUDA_WALK_CUH

#include "kernels/cuda/common.cuh"

#define WALK_MAX 4
#define WALK_THREADS 256
#ifdef DS_SIMT
#define WALK_MOST 4000 /* so that tests cut walks, too */
#else
#define WALK_MOST 0x7fffffff /* elements in one launch */
#endif

/* ---- on the host: shapes and strides */

struct walk {
    const char *name; /* of the operation, for messages */
    int count, ndim;
    int64_t numel, shape[DS_MAX_DIM];
    struct {
        char *data; /* NULL: the number */
        int64_t size;
        int64_t stride[DS_MAX_DIM]; /* in elements; 0 where it is broadcast */
    } op[WALK_MAX];
    uint64_t number; /* its bits, in the wide type */
};

/* By the output's memory; by the shape; the same, with the last two dimensions as they are. */
enum walk_order { WALK_ANY, WALK_ROW_MAJOR, WALK_MATRIX };

/* By the size of an element, as DS_BY_FLOAT by dtype, with W an unsigned integer of as many bytes: for what moves bits. */
#define DS_BY_BYTES(size, W, ...)                                                                  \
    [&]() -> int {                                                                                 \
        switch (size) {                                                                            \
        case 1: {                                                                                  \
            using W = uint8_t;                                                                     \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        case 2: {                                                                                  \
            using W = uint16_t;                                                                    \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        case 4: {                                                                                  \
            using W = uint32_t;                                                                    \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        default: {                                                                                 \
            using W = uint64_t;                                                                    \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        }                                                                                          \
    }()

/* The message for a dtype that a kernel has not. */
static inline int walk_refuse(const char *name, int dtype)
{
    if (ds_is_float(dtype))
        return ds_cuda_refuse(name, dtype);
    return ds_fail(DS_EINVAL, "%s: not for %s; use :float() first", name, ds_name_of(dtype));
}

static inline void walk_swap(walk *w, int i, int j)
{
    int64_t t = w->shape[i];

    w->shape[i] = w->shape[j];
    w->shape[j] = t;
    for (int k = 0; k < w->count; k++) {
        t = w->op[k].stride[i];
        w->op[k].stride[i] = w->op[k].stride[j];
        w->op[k].stride[j] = t;
    }
}

static inline void walk_simplify(walk *w, enum walk_order order)
{
    int n = 0, kept = order == WALK_MATRIX ? w->ndim - 2 : w->ndim;

    for (int i = 1; i < w->ndim && order == WALK_ANY; i++)
        for (int j = i; j > 0 && w->op[0].stride[j - 1] < w->op[0].stride[j]; j--)
            walk_swap(w, j - 1, j);
    for (int i = 0; i < w->ndim; i++) {
        int merge = n > 0 && i < kept;

        if (w->shape[i] == 1 && i < kept)
            continue;
        for (int k = 0; k < w->count && merge; k++)
            merge = w->op[k].stride[n - 1] == w->op[k].stride[i] * w->shape[i];
        n -= merge;
        w->shape[n] = merge ? w->shape[n] * w->shape[i] : w->shape[i];
        for (int k = 0; k < w->count; k++)
            w->op[k].stride[n] = w->op[k].stride[i];
        n++;
    }
    if (n == 0) {
        w->shape[n++] = 1;
        for (int k = 0; k < w->count; k++)
            w->op[k].stride[0] = 0;
    }
    w->ndim = n;
}

/* t[k] NULL: the number. DS_EINVAL where a shape does not broadcast to that of t[0], or a tensor is
 * on another device. */
static inline int walk_start(walk *w, const char *name, int count, const ds_tensor *const *t,
                             enum walk_order order)
{
    const ds_tensor *y = t[0];
    char want[128], have[128];

    DS_TRY(on_cuda(name, count, t));
    w->name = name;
    w->count = count;
    w->ndim = y->ndim;
    w->numel = y->numel;
    w->number = 0;
    memcpy(w->shape, y->shape, sizeof w->shape);
    for (int k = 0; k < count; k++) {
        int lead = t[k] ? y->ndim - t[k]->ndim : 0;
        int bad = lead < 0;

        memset(w->op[k].stride, 0, sizeof w->op[k].stride);
        w->op[k].data = t[k] ? (char *)t[k]->data : NULL;
        w->op[k].size = t[k] ? ds_bytes_of(t[k]->dtype) : 0;
        for (int i = 0; i < y->ndim && t[k] && !bad; i++) {
            int64_t size = i < lead ? 1 : t[k]->shape[i - lead];

            bad = size != y->shape[i] && size != 1;
            w->op[k].stride[i] = size == 1 ? 0 : t[k]->stride[i - lead];
        }
        if (bad)
            return ds_fail(DS_EINVAL, "%s: %s does not broadcast to %s", name,
                           ds_shape_text(have, t[k]), ds_shape_text(want, y));
    }
    walk_simplify(w, order);
    return 0;
}

/* A walk too large for one launch: *first keeps one half of its largest dimension, *second gets the
 * other. */
static inline void walk_halve(walk *first, walk *second)
{
    int d = 0;

    for (int i = 1; i < first->ndim; i++)
        d = first->shape[i] > first->shape[d] ? i : d;
    int64_t half = first->shape[d] / 2, rest = first->numel / first->shape[d];

    half -= half > 16 ? half % 16 : 0; /* packs stay aligned */

    *second = *first;
    first->shape[d] = half;
    first->numel = rest * half;
    second->shape[d] -= half;
    second->numel -= first->numel;
    for (int k = 0; k < first->count; k++)
        if (second->op[k].data)
            second->op[k].data += half * first->op[k].stride[d] * first->op[k].size;
}

/* Whether units of `v` elements do: every operand constant along the innermost dimension, or dense
 * there and aligned. With several dimensions its rows are whole units. */
static inline int walk_packs(const walk *w, int v)
{
    int last = w->ndim - 1;

    if (v == 1 || w->op[0].stride[last] != 1 || (last > 0 && w->shape[last] % v))
        return 0;
    for (int k = 0; k < w->count; k++) {
        if (w->op[k].stride[last] == 0 || !w->op[k].data)
            continue;
        if (w->op[k].stride[last] != 1 || (uintptr_t)w->op[k].data % (v * w->op[k].size))
            return 0;
        for (int i = 0; i < last; i++)
            if (w->op[k].stride[i] % v)
                return 0;
    }
    return 1;
}

/* An f32 that rounds to bf16 and f16 as x does: f32 keeps the place, odd marks what was cut off. */
static __host__ __device__ inline float to_odd(double x)
{
    float f = (float)x;
    uint32_t u = ds_bits(f);

    if ((double)f == x || x != x || u << 1 == 0xff000000u)
        return f;
    if (fabs((double)f) > fabs(x))
        u--;
    return ds_float(u | 1);
}

/* A number of `dtype` in its wide type. DS_EINVAL where an integer dtype has no such value. */
static inline int walk_number(uint64_t *bits, const char *name, double value, int dtype)
{
    float single = (float)value;
    int64_t whole;

    *bits = 0;
    if (ds_is_float(dtype)) {
        memcpy(bits, &single, sizeof single);
        return 0;
    }
    DS_TRY(ds_check_number(name, value, dtype));
    whole = (int64_t)value;
    memcpy(bits, &whole, sizeof whole); /* little-endian: the lower bytes are the narrower type */
    return 0;
}

/* The same in the dtype's own bits, rounded once. */
static inline int walk_bits(uint64_t *bits, const char *name, double value, int dtype)
{
    if (dtype == DS_F64) {
        memcpy(bits, &value, sizeof value);
        return 0;
    }
    DS_TRY(walk_number(bits, name, value, dtype));
    if (dtype == DS_BF16)
        *bits = ds_f32_to_bf16(to_odd(value));
    if (dtype == DS_F16)
        *bits = ds_f32_to_f16(to_odd(value));
    return 0;
}

/* ---- on the device: from a unit's number to offsets */

/* Division of n < 2^31 by a constant (Granlund & Montgomery 1994, figure 4.1): with l = ceil(log2 d)
 * and m = floor(2^32 (2^l - d) / d) + 1, n / d = (high(n m) + n) >> l. */
struct fast_div {
    int64_t d; /* more than 2^31 only where place_of_many() divides */
    uint32_t m, l;
};

static inline fast_div fast_div_of(int64_t d)
{
    fast_div f = {d, 0, 0};

    if (d > 0x7fffffff)
        return f;
    while ((uint64_t)1 << f.l < (uint64_t)d)
        f.l++;
    f.m = (uint32_t)(((((uint64_t)1 << f.l) - (uint64_t)d) << 32) / (uint64_t)d + 1);
    return f;
}

static __device__ inline uint32_t divide(uint32_t n, fast_div f)
{
    return (__umulhi(n, f.m) + n) >> f.l;
}

struct places {
    int ndim;
    uint32_t units, rest; /* rest: elements after the last unit, of a walk of one dimension */
    uint64_t number;
    fast_div size[DS_MAX_DIM]; /* in units */
    struct {
        char *data;
        int64_t
            inner; /* elements from one of a unit to the next: 0 or 1 where a unit has several */
        int64_t stride[DS_MAX_DIM]; /* elements from unit to unit */
    } op[WALK_MAX];
};

static inline places places_of(const walk *w, int v)
{
    int last = w->ndim - 1;
    places p;

    memset(&p, 0, sizeof p);
    p.ndim = w->ndim;
    p.number = w->number;
    p.units = (uint32_t)(w->numel / v);
    p.rest = (uint32_t)(w->numel % v);
    for (int i = 0; i <= last; i++)
        p.size[i] = fast_div_of(i == last ? (w->shape[i] + v - 1) / v : w->shape[i]);
    for (int k = 0; k < w->count; k++) {
        p.op[k].data = w->op[k].data;
        p.op[k].inner = w->op[k].stride[last];
        for (int i = 0; i <= last; i++)
            p.op[k].stride[i] = w->op[k].stride[i] * (i == last ? v : 1);
    }
    return p;
}

/* Offsets of a unit in N operands, in elements. */
template <int N>
static __device__ inline void place(int64_t (&at)[N], const places &p, uint32_t unit)
{
#pragma unroll
    for (int k = 0; k < N; k++)
        at[k] = 0;
#pragma unroll 1
    for (int d = p.ndim - 1; d > 0; d--) {
        uint32_t above = divide(unit, p.size[d]);
        int64_t i = unit - above * (uint32_t)p.size[d].d;

        unit = above;
#pragma unroll
        for (int k = 0; k < N; k++)
            at[k] += i * p.op[k].stride[d];
    }
#pragma unroll
    for (int k = 0; k < N; k++)
        at[k] += (int64_t)unit * p.op[k].stride[0];
}

/* The same among n units of any number: for what counts its elements, and so is not cut. */
template <int N>
static __device__ inline void place_of_many(int64_t (&at)[N], const places &p, int64_t unit,
                                            int64_t n)
{
    if (n <= WALK_MOST) {
        place(at, p, (uint32_t)unit);
        return;
    }
#pragma unroll
    for (int k = 0; k < N; k++)
        at[k] = 0;
#pragma unroll 1
    for (int d = p.ndim - 1; d >= 0; d--) {
        int64_t above = d ? unit / p.size[d].d : 0, i = unit - above * p.size[d].d;

        unit = above;
#pragma unroll
        for (int k = 0; k < N; k++)
            at[k] += i * p.op[k].stride[d];
    }
}

/* ---- loads, stores, widening */

template <int bytes> struct word_of;
template <> struct word_of<1> {
    using type = uint8_t;
};
template <> struct word_of<2> {
    using type = uint16_t;
};
template <> struct word_of<4> {
    using type = uint32_t;
};
template <> struct word_of<8> {
    using type = uint2;
};
template <> struct word_of<16> {
    using type = uint4;
};

/* As one word, whatever the compiler makes of a struct of small integers. It must be aligned, which
 * only GPUs and their simulation mind. */
#ifdef DS_SIMT
#define MUST_ALIGN(p, bytes) simt::must_align(p, bytes)
#else
#define MUST_ALIGN(p, bytes) (void)0
#endif
template <typename P> static __device__ inline P load_as_word(const void *from)
{
    MUST_ALIGN(from, sizeof(P));
    typename word_of<sizeof(P)>::type word = *(const typename word_of<sizeof(P)>::type *)from;
    P pack;

    memcpy(&pack, &word, sizeof pack);
    return pack;
}
template <typename P> static __device__ inline void store_as_word(void *to, const P &pack)
{
    typename word_of<sizeof(P)>::type word;

    MUST_ALIGN(to, sizeof(P));
    memcpy(&word, &pack, sizeof pack);
    *(typename word_of<sizeof(P)>::type *)to = word;
}

template <typename S> static __device__ inline S widen(S x)
{
    return x;
}
static __device__ inline float widen(bf16 x)
{
    return to_float(x);
}
static __device__ inline float widen(f16 x)
{
    return to_float(x);
}

template <typename Y> struct narrow {
    template <typename W> static __device__ Y of(W x)
    {
        return (Y)x;
    }
};
template <> struct narrow<bf16> {
    static __device__ bf16 of(float x)
    {
        return from_float<bf16>(x);
    }
};
template <> struct narrow<f16> {
    static __device__ f16 of(float x)
    {
        return from_float<f16>(x);
    }
};

template <typename S, int V>
static __device__ inline pack<S, V> operand_load(const places &p, int k, int64_t at)
{
    const S *from = (const S *)p.op[k].data + at;
    pack<S, V> x;

    if (!p.op[k].data)
        return pack<S, V>();
    if constexpr (V == 1) {
        x.of[0] = *from;
    } else if (p.op[k].inner) {
        x = load_as_word<pack<S, V>>(from);
    } else {
        S one = *from;

        for (int i = 0; i < V; i++)
            x.of[i] = one;
    }
    return x;
}

/* An element as the functor sees it. */
template <typename S> static __device__ inline auto operand_value(const places &p, int k, S x)
{
    auto value = widen(x), number = value;

    memcpy(&number, &p.number, sizeof number);
    return p.op[k].data ? value : number;
}

template <typename F, typename Y, typename A, typename B, typename D>
static __device__ inline Y apply(const F &f, const places &p, A a, B b, D d)
{
    if constexpr (F::inputs == 1)
        return narrow<Y>::of(f(operand_value(p, 1, a)));
    else if constexpr (F::inputs == 2)
        return narrow<Y>::of(f(operand_value(p, 1, a), operand_value(p, 2, b)));
    else
        return narrow<Y>::of(
            f(operand_value(p, 1, a), operand_value(p, 2, b), operand_value(p, 3, d)));
}

/* ---- the kernel */

/* Units per thread: all loads of a thread come before its first store. */
template <int V> constexpr int walk_units = V == 1 ? 4 : 2;

/* What is left over after the last unit of a dense walk. */
template <typename F, typename Y, typename A, typename B, typename D>
static __device__ inline void walk_rest(const places &p, const F &f, int64_t i)
{
    A a = operand_load<A, 1>(p, 1, i * p.op[1].inner).of[0];
    B b = B();
    D d = D();

    if constexpr (F::inputs > 1)
        b = operand_load<B, 1>(p, 2, i * p.op[2].inner).of[0];
    if constexpr (F::inputs > 2)
        d = operand_load<D, 1>(p, 3, i * p.op[3].inner).of[0];
    ((Y *)p.op[0].data)[i] = apply<F, Y>(f, p, a, b, d);
}

template <int V, typename F, typename Y, typename A, typename B, typename D>
static __global__ void __launch_bounds__(WALK_THREADS)
    walk_kernel(const __grid_constant__ places p, F f)
{
    constexpr int U = walk_units<V>;
    uint32_t first = blockIdx.x * (WALK_THREADS * U) + threadIdx.x;
    int64_t at[U][F::inputs + 1] = {};
    pack<A, V> a[U] = {};
    pack<B, V> b[U] = {};
    pack<D, V> d[U] = {};

#pragma unroll
    for (int u = 0; u < U; u++) {
        uint32_t unit = first + u * WALK_THREADS;

        if (unit >= p.units)
            continue;
        place(at[u], p, unit);
        a[u] = operand_load<A, V>(p, 1, at[u][1]);
        if constexpr (F::inputs > 1)
            b[u] = operand_load<B, V>(p, 2, at[u][2]);
        if constexpr (F::inputs > 2)
            d[u] = operand_load<D, V>(p, 3, at[u][3]);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
        pack<Y, V> y;

        if (first + u * WALK_THREADS >= p.units)
            continue;
#pragma unroll
        for (int i = 0; i < V; i++)
            y.of[i] = apply<F, Y>(f, p, a[u].of[i], b[u].of[i], d[u].of[i]);
        store_as_word((Y *)p.op[0].data + at[u][0], y);
    }
    if (V > 1 && blockIdx.x == 0 && threadIdx.x < p.rest)
        walk_rest<F, Y, A, B, D>(p, f, (int64_t)p.units * V + threadIdx.x);
}

template <int V, typename F, typename Y, typename A, typename B, typename D>
static inline int walk_launch(const walk *w, const F &f)
{
    places p = places_of(w, V);

    return launch(w->name, walk_kernel<V, F, Y, A, B, D>,
                  blocks_for(p.units, WALK_THREADS * walk_units<V>), WALK_THREADS, 0, p, f);
}

template <typename S> constexpr int walk_size = (int)sizeof(S);
template <typename Y, typename A, typename B, typename D> constexpr int walk_widest()
{
    int ab = walk_size<A> > walk_size<B> ? walk_size<A> : walk_size<B>;
    int yd = walk_size<Y> > walk_size<D> ? walk_size<Y> : walk_size<D>;

    return ab > yd ? ab : yd;
}

/* y = f(a…): storage types of the output and of the inputs; those that f has not are uint8_t. `any` is
 * the same function for single elements: one functor for many operations keeps that kernel's code
 * small, where `f` is one for each. */
template <typename Y, typename A, typename B, typename D, typename F, typename G>
static inline int walk_run(walk w, const F &f, const G &any)
{
    constexpr int V = 16 / walk_widest<Y, A, B, D>();

    if (w.numel == 0)
        return 0;
    while (w.numel > WALK_MOST) {
        walk half;

        walk_halve(&w, &half);
        DS_TRY((walk_run<Y, A, B, D>(half, f, any)));
    }
    if (walk_packs(&w, V))
        return walk_launch<V, F, Y, A, B, D>(&w, f);
    return walk_launch<1, G, Y, A, B, D>(&w, any);
}

#endif
