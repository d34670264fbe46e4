/* rows.cuh - a tensor as rows of its last dimension, and how threads read and write them.
 *
 * Dimensions that lead to a row are merged where their strides allow; for most tensors one is left, and
 * finding a row is one multiplication.
 */
#ifndef DS_CUDA_ROWS_CUH
#define DS_CUDA_ROWS_CUH

#include "kernels/cuda/common.cuh"

struct rows {
    char *data;      /* NULL: there is no such tensor */
    int64_t column;  /* stride of the last dimension, in elements */
    int dtype, ndim; /* ndim: of the dimensions that lead to a row, at least one */
    int64_t size[DS_MAX_DIM], step[DS_MAX_DIM]; /* of those; steps in bytes */
};

/* t's first `lead` dimensions lead to a row: all of them to a single element. */
static inline rows rows_of(const ds_tensor *t, int lead)
{
    rows r = {};

    if (!t)
        return r;
    r.data = (char *)t->data;
    r.dtype = t->dtype;
    r.column = lead < t->ndim ? t->stride[lead] : 1;
    for (int d = 0; d < lead; d++) {
        int64_t step = t->stride[d] * ds_bytes_of(t->dtype);

        if (t->shape[d] == 1)
            continue;
        if (r.ndim && r.step[r.ndim - 1] == step * t->shape[d]) {
            r.size[r.ndim - 1] *= t->shape[d];
            r.step[r.ndim - 1] = step;
        } else {
            r.size[r.ndim] = t->shape[d];
            r.step[r.ndim++] = step;
        }
    }
    if (r.ndim == 0) {
        r.size[0] = 1;
        r.ndim = 1;
    }
    return r;
}

static __device__ inline char *row_at(const rows &t, int64_t r)
{
    int64_t at = 0;

    for (int d = t.ndim - 1; d > 0; d--) {
        at += r % t.size[d] * t.step[d];
        r /= t.size[d];
    }
    return t.data + at + r * t.step[0];
}

/* Where rows are one step apart. */
static __device__ inline char *plain_row_at(const rows &t, int64_t r)
{
    return t.data + r * t.step[0];
}

/* Whether rows are one step apart, and can be moved 16 bytes at a time (if their length can). */
static inline bool rows_plain(const rows &t)
{
    return !t.data || (t.column == 1 && t.ndim == 1 && aligned_16(t.data) && t.step[0] % 16 == 0);
}

/* 16 bytes of a row, as they lie in memory: in registers two numbers of 16 bits to a word. */
struct alignas(16) words {
    uint32_t of[4];
};

template <typename S> static __device__ inline float number_of(const words &w, int j);
template <> __device__ inline float number_of<float>(const words &w, int j)
{
    return ds_float(w.of[j]);
}
template <> __device__ inline float number_of<bf16>(const words &w, int j)
{
    return ds_float(j % 2 ? w.of[j / 2] & 0xffff0000u : w.of[j / 2] << 16);
}
template <> __device__ inline float number_of<f16>(const words &w, int j)
{
    return to_float(f16{(uint16_t)(w.of[j / 2] >> j % 2 * 16)});
}

template <typename S> static __device__ inline words words_of(const float *v)
{
    words w;

#pragma unroll
    for (int j = 0; j < 4; j++)
        w.of[j] = from_float<S>(v[2 * j]).bits | (uint32_t)from_float<S>(v[2 * j + 1]).bits << 16;
    return w;
}
template <> __device__ inline words words_of<float>(const float *v)
{
    return words{{ds_bits(v[0]), ds_bits(v[1]), ds_bits(v[2]), ds_bits(v[3])}};
}

/* Makes the compiler take numbers from the words again, rather than keep what it made of them: they
 * take twice the registers. */
static __device__ inline void take_again(words &w)
{
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(w.of[0]), "+r"(w.of[1]), "+r"(w.of[2]), "+r"(w.of[3]));
#else
    (void)w;
#endif
}

/* Element i of dense memory of a dtype that is only known now; all threads take the same way. */
static __device__ inline float load_as(const void *from, int dtype, int64_t i)
{
    if (dtype == DS_F32)
        return ((const float *)from)[i];
    return dtype == DS_BF16 ? to_float(((const bf16 *)from)[i]) : to_float(((const f16 *)from)[i]);
}

static __device__ inline void store_as(void *to, int dtype, int64_t i, float x)
{
    if (dtype == DS_F32)
        ((float *)to)[i] = x;
    else if (dtype == DS_BF16)
        ((bf16 *)to)[i] = from_float<bf16>(x);
    else
        ((f16 *)to)[i] = from_float<f16>(x);
}

template <typename S, int N>
static __device__ inline void load_packs(float *v, const void *from, int64_t i)
{
    constexpr int M = N < per_16<S> ? N : per_16<S>;

    for (int j = 0; j < N; j += M) {
        pack<S, M> p = *(const pack<S, M> *)((const S *)from + i + j);

        for (int k = 0; k < M; k++)
            v[j + k] = to_float(p.of[k]);
    }
}

/* N of them from element i on, which is a multiple of N; memory is aligned to 16 bytes, or N is 1. */
template <int N>
static __device__ inline void load_many(float *v, const void *from, int dtype, int64_t i)
{
    if (dtype == DS_F32)
        load_packs<float, N>(v, from, i);
    else if (dtype == DS_BF16)
        load_packs<bf16, N>(v, from, i);
    else
        load_packs<f16, N>(v, from, i);
}

template <typename S, int N>
static __device__ inline void store_packs(void *to, int64_t i, const float *v)
{
    constexpr int M = N < per_16<S> ? N : per_16<S>;

    for (int j = 0; j < N; j += M) {
        pack<S, M> p;

        for (int k = 0; k < M; k++)
            p.of[k] = from_float<S>(v[j + k]);
        *(pack<S, M> *)((S *)to + i + j) = p;
    }
}

template <int N>
static __device__ inline void store_many(void *to, int dtype, int64_t i, const float *v)
{
    if (dtype == DS_F32)
        store_packs<float, N>(to, i, v);
    else if (dtype == DS_BF16)
        store_packs<bf16, N>(to, i, v);
    else
        store_packs<f16, N>(to, i, v);
}

#endif
