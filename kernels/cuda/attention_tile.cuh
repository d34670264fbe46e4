/* attention_tile.cuh - tiles of f32 in shared memory and their products, by fused multiply-add.
 *
 * 256 threads, as 16 x 16. Of the scores of ROWS queries and KEYS keys, thread (ty, tx) has the rows
 * ty RPT … and the keys tx KPT …; of a sum with D columns, the columns 4 tx … of each 64. Rows
 * of a tile lie LD floats apart, and key s lies in slot(s), so that threads next to each other read
 * from different banks. What is beyond the last row, key or column is 0.
 */
#ifndef DS_CUDA_ATTENTION_TILE_CUH
#define DS_CUDA_ATTENTION_TILE_CUH

#include "kernels/cuda/attention.cuh"

template <int WIDE_, int ROWS_, int KEYS_> struct tile {
    static constexpr int WIDE = WIDE_, ROWS = ROWS_, KEYS = KEYS_;
    static constexpr int RPT = ROWS / 16, KPT = KEYS / 16, CPT = WIDE / 16; /* a thread's share */
    static constexpr int LD = WIDE + 4;  /* floats from row to row of a tile */
    static constexpr int LDS = KEYS + 4; /* of scores */
    static constexpr int THREADS = 256;

    static __device__ constexpr int slot(int key)
    {
        return key % KPT * 16 + key / KPT;
    }
    static __device__ constexpr int column(int tx, int i)
    {
        return (i / 4 * 16 + tx) * 4 + i % 4;
    }
};

/* Heads to 64, 128 and 256 wide. */
using tile_64 = tile<64, 64, 64>;
using tile_128 = tile<128, 64, 64>;
using tile_256 = tile<256, 32, 32>;

#define BY_WIDTH(D, Z, ...)                                                                        \
    [&]() -> int {                                                                                 \
        if ((D) <= 64) {                                                                           \
            using Z = tile_64;                                                                     \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        if ((D) <= 128) {                                                                          \
            using Z = tile_128;                                                                    \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        using Z = tile_256;                                                                        \
        return __VA_ARGS__;                                                                        \
    }()

/* ---- memory to tiles and back */

template <typename S, int WIDE, int LD, typename Place>
static __device__ inline void tile_load_as(float *to, const head_tensor &x, const char *base,
                                           int rows, int have, int D, Place place)
{
    constexpr int N = per_16<S>;
    const S *from = (const S *)base;

    for (int i = threadIdx.x; i < rows * (WIDE / N); i += blockDim.x) {
        int r = i / (WIDE / N), d = i % (WIDE / N) * N;
        const S *p = from + r * x.row + d;
        pack<S, N> values;

        if (r < have && x.aligned && d + N <= D) {
            values = *(const pack<S, N> *)p;
        } else {
#pragma unroll
            for (int j = 0; j < N; j++)
                values.of[j] = r < have && d + j < D ? p[j] : from_float<S>(0);
        }
#pragma unroll
        for (int j = 0; j < N; j += 4) {
            pack<float, 4> four;

#pragma unroll
            for (int e = 0; e < 4; e++)
                four.of[e] = to_float(values.of[j + e]);
            *(pack<float, 4> *)(to + place(r) * LD + d + j) = four;
        }
    }
}

template <int WIDE, int LD, typename Place>
static __device__ inline void tile_load(float *to, const attention_call &c, const head_tensor &x,
                                        int batch, int head, int first, int rows, int count,
                                        Place place)
{
    int64_t at = batch * x.batch + (int64_t)first * x.row + head * x.head;
    int have = count - first < rows ? count - first : rows;

    if (c.dtype == DS_F32)
        tile_load_as<float, WIDE, LD>(to, x, x.data + at * 4, rows, have, c.D, place);
    else if (c.dtype == DS_BF16)
        tile_load_as<bf16, WIDE, LD>(to, x, x.data + at * 2, rows, have, c.D, place);
    else
        tile_load_as<f16, WIDE, LD>(to, x, x.data + at * 2, rows, have, c.D, place);
}

/* Queries first … of a head: row r at r LD. */
template <typename Z>
static __device__ inline void load_rows(float *to, const attention_call &c, const head_tensor &x,
                                        int batch, int head, int first)
{
    tile_load<Z::WIDE, Z::LD>(to, c, x, batch, head, first, Z::ROWS, c.T, [](int r) { return r; });
}

/* Keys or values first … of a kv head: key s at slot(s) LD. */
template <typename Z>
static __device__ inline void load_keys(float *to, const attention_call &c, const head_tensor &x,
                                        int batch, int head, int first)
{
    tile_load<Z::WIDE, Z::LD>(to, c, x, batch, head, first, Z::KEYS, c.S,
                              [](int r) { return Z::slot(r); });
}

/* A thread's columns of row t of x, times `factor`. */
template <typename Z>
static __device__ inline void store_columns(const attention_call &c, const head_tensor &x,
                                            int batch, int head, int t, int tx,
                                            const float (&o)[Z::CPT], float factor)
{
    int64_t at = batch * x.batch + (int64_t)t * x.row + head * x.head;

#pragma unroll
    for (int i = 0; i < Z::CPT; i++) {
        int d = Z::column(tx, i);
        float value = o[i] * factor;

        if (d >= c.D)
            continue;
        if (c.dtype == DS_F32)
            ((float *)x.data)[at + d] = value;
        else if (c.dtype == DS_BF16)
            ((bf16 *)x.data)[at + d] = from_float<bf16>(value);
        else
            ((f16 *)x.data)[at + d] = from_float<f16>(value);
    }
}

/* ---- products */

/* s = q kᵀ of this thread's rows and keys. */
template <typename Z>
static __device__ inline void product_scores(float (&s)[Z::RPT][Z::KPT], const float *q,
                                             const float *k, int D, int ty, int tx)
{
#pragma unroll
    for (int i = 0; i < Z::RPT; i++)
#pragma unroll
        for (int j = 0; j < Z::KPT; j++)
            s[i][j] = 0;
    for (int d = 0; d < D; d += 4) {
        pack<float, 4> a[Z::RPT], b[Z::KPT];

#pragma unroll
        for (int i = 0; i < Z::RPT; i++)
            a[i] = *(const pack<float, 4> *)(q + (ty * Z::RPT + i) * Z::LD + d);
#pragma unroll
        for (int j = 0; j < Z::KPT; j++)
            b[j] = *(const pack<float, 4> *)(k + (j * 16 + tx) * Z::LD + d);
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
            for (int i = 0; i < Z::RPT; i++)
#pragma unroll
                for (int j = 0; j < Z::KPT; j++)
                    s[i][j] = fmaf(a[i].of[e], b[j].of[e], s[i][j]);
    }
}

/* This thread's columns of a tile's row. */
template <typename Z>
static __device__ inline void columns_of(float (&x)[Z::CPT], const float *row, int tx)
{
#pragma unroll
    for (int i = 0; i < Z::CPT; i += 4) {
        pack<float, 4> part = *(const pack<float, 4> *)(row + Z::column(tx, i));

#pragma unroll
        for (int j = 0; j < 4; j++)
            x[i + j] = part.of[j];
    }
}

/* o [this thread's rows, columns] += p v: p [ROWS][LDS], v by slots. */
template <typename Z>
static __device__ inline void product_weighted(float (&o)[Z::RPT][Z::CPT], const float *p,
                                               const float *v, int ty, int tx)
{
#pragma unroll 2
    for (int m = 0; m < Z::KEYS / Z::KPT; m++) {
        pack<float, Z::KPT> w[Z::RPT];

#pragma unroll
        for (int i = 0; i < Z::RPT; i++)
            w[i] = *(const pack<float, Z::KPT> *)(p + (ty * Z::RPT + i) * Z::LDS + m * Z::KPT);
#pragma unroll
        for (int j = 0; j < Z::KPT; j++) {
            float x[Z::CPT];

            columns_of<Z>(x, v + (j * 16 + m) * Z::LD, tx);
#pragma unroll
            for (int i = 0; i < Z::RPT; i++)
#pragma unroll
                for (int d = 0; d < Z::CPT; d++)
                    o[i][d] = fmaf(w[i].of[j], x[d], o[i][d]);
        }
    }
}

/* o [keys ty KPT …, columns] += pᵀ x: p [ROWS][LDS], x [ROWS][LD]. */
template <typename Z>
static __device__ inline void product_gathered(float (&o)[Z::KPT][Z::CPT], const float *p,
                                               const float *x, int ty, int tx)
{
#pragma unroll 4
    for (int r = 0; r < Z::ROWS; r++) {
        pack<float, Z::KPT> w = *(const pack<float, Z::KPT> *)(p + r * Z::LDS + ty * Z::KPT);
        float y[Z::CPT];

        columns_of<Z>(y, x + r * Z::LD, tx);
#pragma unroll
        for (int j = 0; j < Z::KPT; j++)
#pragma unroll
            for (int d = 0; d < Z::CPT; d++)
                o[j][d] = fmaf(w.of[j], y[d], o[j][d]);
    }
}

/* This thread's scores or weights to shared memory. */
template <typename Z>
static __device__ inline void store_scores(float *p, const float (&s)[Z::RPT][Z::KPT], int ty,
                                           int tx)
{
#pragma unroll
    for (int i = 0; i < Z::RPT; i++) {
        pack<float, Z::KPT> w;

#pragma unroll
        for (int j = 0; j < Z::KPT; j++)
            w.of[j] = s[i][j];
        *(pack<float, Z::KPT> *)(p + (ty * Z::RPT + i) * Z::LDS + tx * Z::KPT) = w;
    }
}

/* Scores to exponents of 2: scaled, masked, -inf where row t does not see the key. */
template <typename Z>
static __device__ inline void exponents(float (&s)[Z::RPT][Z::KPT], const attention_call &c,
                                        int batch, int head, int first, int key, int ty, int tx)
{
#pragma unroll
    for (int i = 0; i < Z::RPT; i++) {
        int t = first + ty * Z::RPT + i, seen = attention_seen(c, t);

#pragma unroll
        for (int j = 0; j < Z::KPT; j++) {
            int at = key + tx * Z::KPT + j;

            s[i][j] *= c.scale2;
            if (c.mask && t < c.T && at < seen)
                s[i][j] += attention_mask(c, batch, head, t, at);
            s[i][j] = at < seen ? s[i][j] : -INFINITY;
        }
    }
}

#endif
