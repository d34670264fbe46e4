/* attention_mma.cuh - attention's tiles for tensor cores, and the two products that all passes are
 * made of.
 *
 * bf16 and f16, heads to 64 or 128 wide, rows at 16 bytes. A block has four warps, each with 16 MT rows
 * of one tile, that meet tiles of the other side, brought by copies that run ahead by one tile. Rows of
 * a tile lie WIDE numbers apart without gaps; chunk j of 16 bytes of row r is at j ^ (r % 8), so that
 * the eight rows which a matrix load reads lie in different banks. What is beyond the last row or
 * column is 0.
 */
#ifndef DS_CUDA_ATTENTION_MMA_CUH
#define DS_CUDA_ATTENTION_MMA_CUH

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/mma.cuh"

#define MMA_WARPS 4
#define MMA_THREADS (32 * MMA_WARPS)
#define MMA_CHUNK 32 /* of the other side, at a time, in the backward pass */

/* attention_mma.cu, attention_mma_backward.cu. Whether tensor cores take a call, and the call. */
int attention_mma_takes(const attention_call &c, int backward);
int attention_mma(const attention_call &c);
int attention_mma_backward(const attention_call &c);

/* f<S, WIDE>(…) by the call's dtype and width. */
#define BY_MMA(c, S, WIDE, ...)                                                                    \
    [&]() -> int {                                                                                 \
        if ((c).dtype == DS_BF16) {                                                                \
            using S = bf16;                                                                        \
            if ((c).D <= 64) {                                                                     \
                constexpr int WIDE = 64;                                                           \
                return __VA_ARGS__;                                                                \
            }                                                                                      \
            constexpr int WIDE = 128;                                                              \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        using S = f16;                                                                             \
        if ((c).D <= 64) {                                                                         \
            constexpr int WIDE = 64;                                                               \
            return __VA_ARGS__;                                                                    \
        }                                                                                          \
        constexpr int WIDE = 128;                                                                  \
        return __VA_ARGS__;                                                                        \
    }()

/* ---- tiles */

/* Chunk j of row r. */
template <typename S, int WIDE> static __device__ inline S *chunk_at(S *tile, int r, int j)
{
    return tile + r * WIDE + (j ^ (r & 7)) * 8;
}

/* Begins to copy rows first … first + rows of a head, of which there are `count`. */
template <typename S, int WIDE>
static __device__ inline void fetch(S *tile, const attention_call &c, const head_tensor &x,
                                    int batch, int head, int first, int rows, int count)
{
    const S *from = (const S *)x.data + batch * x.batch + (int64_t)first * x.row + head * x.head;

    for (int i = threadIdx.x; i < rows * (WIDE / 8); i += MMA_THREADS) {
        int r = i / (WIDE / 8), j = i % (WIDE / 8);
        bool there = first + r < count && j * 8 < c.D;

        copy_16(chunk_at<S, WIDE>(tile, r, j), there ? from + r * x.row + j * 8 : (const S *)x.data,
                !there);
    }
}

/* ---- fragments; see mma.cuh. lane % 8 is the row of a matrix, lane / 8 the matrix. */

/* a: rows row … + 15, columns 16 k … + 15. */
template <typename S, int WIDE>
static __device__ inline void left_of(uint32_t (&a)[4], S *tile, int row, int k)
{
    int lane = threadIdx.x % 32;

    load_matrices(a, chunk_at<S, WIDE>(tile, row + lane % 16, 2 * k + lane / 16));
}

/* b of the tile's transpose, twice: rows row … + 7 and the eight after them. */
template <typename S, int WIDE>
static __device__ inline void right_of_transpose(uint32_t (&b)[4], S *tile, int row, int k)
{
    int lane = threadIdx.x % 32, m = lane / 8;

    load_matrices(b, chunk_at<S, WIDE>(tile, row + m / 2 * 8 + lane % 8, 2 * k + m % 2));
}

/* b of the tile itself, twice: rows row … + 15, columns 8 j … + 7 and the eight after them. */
template <typename S, int WIDE>
static __device__ inline void right_of(uint32_t (&b)[4], S *tile, int row, int j)
{
    int lane = threadIdx.x % 32, m = lane / 8;

    load_transposed(b, chunk_at<S, WIDE>(tile, row + m % 2 * 8 + lane % 8, j + m / 2));
}

/* ---- products */

/* c [16 MT x 8 N] = x yᵀ: x from row `x_row`, y from row `y_row` on. */
template <typename S, int WIDE, int MT, int N>
static __device__ inline void product_rows(float (&c)[MT][N][4], S *x, int x_row, S *y, int y_row)
{
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                c[m][n][e] = 0;
#pragma unroll
    for (int k = 0; k < WIDE / 16; k++) {
        uint32_t a[MT][4];

#pragma unroll
        for (int m = 0; m < MT; m++)
            left_of<S, WIDE>(a[m], x, x_row + 16 * m, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[4];

            right_of_transpose<S, WIDE>(b, y, y_row + 8 * n, k);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma<S>(c[m][n], a[m], b[0], b[1]);
                mma<S>(c[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/* o [16 MT x WIDE] += w y: w [16 MT x 8 N] in registers, y from row `row` on. */
template <typename S, int WIDE, int MT, int N>
static __device__ inline void product_columns(float (&o)[MT][WIDE / 8][4],
                                              const float (&w)[MT][N][4], S *y, int row)
{
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        uint32_t a[MT][4];

#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                a[m][e] =
                    two_of<S>(w[m][2 * k + e / 2][e % 2 * 2], w[m][2 * k + e / 2][e % 2 * 2 + 1]);
#pragma unroll
        for (int j = 0; j < WIDE / 8; j += 2) {
            uint32_t b[4];

            right_of<S, WIDE>(b, y, row + 16 * k, j);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma<S>(o[m][j], a[m], b[0], b[1]);
                mma<S>(o[m][j + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/* ---- scores. ACROSS: their rows are keys, and their columns queries. Element (m, n, e) of a lane is in
 * row 16 m + 8 (e / 2) + lane / 4 and column 8 n + 2 (lane % 4) + e % 2. */

/* Scores to exponents of 2: scaled, masked, -inf where hidden. first: the query of the first row (or
 * column), key: that of the first column (or row). */
template <int MT, int N, bool ACROSS>
static __device__ inline void exponents(float (&s)[MT][N][4], const attention_call &c, int batch,
                                        int head, int first, int key)
{
    const int keys = ACROSS ? 16 * MT : 8 * N;
    int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
    bool all_seen = !c.mask && key + keys <= attention_seen(c, first);

#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[m][n][e] *= c.scale2;
    if (all_seen)
        return;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int r = 16 * m + 8 * (e / 2) + row, j = 8 * n + column + e % 2;
                int t = first + (ACROSS ? j : r), at = key + (ACROSS ? r : j);
                bool shown = at < attention_seen(c, t);

                if (c.mask && t < c.T && shown)
                    s[m][n][e] += attention_mask(c, batch, head, t, at);
                s[m][n][e] = shown ? s[m][n][e] : -INFINITY;
            }
}

/* What dropout keeps of four keys next to each other, as bits. */
static __device__ inline unsigned four_kept(const attention_call &c, int batch, int head, int t,
                                            int key)
{
    float keep[4];

    attention_keep(keep, c, batch, head, t, key);
    return (keep[0] > 0) | (keep[1] > 0) << 1 | (keep[2] > 0) << 2 | (keep[3] > 0) << 3;
}

/* Bit 4 (m N + n) + e: whether dropout keeps the weight (m, n, e); MT N ≤ 16. Random numbers come in
 * blocks of four keys, which lie with two lanes, or across with four: each makes the block of another
 * (n, e), and they tell each other. */
template <int MT, int N, bool ACROSS>
static __device__ inline uint64_t kept_bits(const attention_call &c, int batch, int head, int first,
                                            int key)
{
    int lane = threadIdx.x % 32;
    uint64_t bits = 0;

#pragma unroll 1
    for (int i = 0; i < MT * N; i++) {
        int m = i / N, n = i % N / 2 * 2, half = i % 2;
        unsigned four, low, high;

        if (ACROSS) {
            int w = lane / 4 % 4;

            four = four_kept(c, batch, head, first + 8 * (n + w / 2) + lane % 4 * 2 + w % 2,
                             key + 16 * m + 8 * half + lane / 16 * 4)
                   << 4 * w;
            four |= __shfl_xor_sync(0xffffffff, four, 4);
            four |= __shfl_xor_sync(0xffffffff, four, 8);
            four >>= w; /* now bits 0, 4, 8, 12 are this lane's */
            low = (four & 1) | (four >> 3 & 2);
            high = (four >> 8 & 1) | (four >> 11 & 2);
        } else {
            four = four_kept(c, batch, head, first + 16 * m + 8 * half + lane / 4,
                             key + 8 * (n + lane % 2) + lane % 4 / 2 * 4)
                   << 4 * (lane % 2);
            four |= __shfl_xor_sync(0xffffffff, four, 1);
            four >>= 2 * (lane % 2); /* now bits 0, 1, 4, 5 are this lane's */
            low = four & 3;
            high = four >> 4 & 3;
        }
        bits |= (uint64_t)(low | high << 4) << (4 * (m * N + n) + 2 * half);
    }
    return bits;
}

/* ---- results */

template <int MT, int N> static __device__ inline void clear(float (&o)[MT][N][4])
{
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[m][j][e] = 0;
}

/* Row r of 16 MT rows that begin at row `first` of x; factor of each of this lane's two rows. */
template <typename S, int WIDE, int MT>
static __device__ inline void store(const attention_call &c, const head_tensor &x, int batch,
                                    int head, int first, int count,
                                    const float (&o)[MT][WIDE / 8][4], const float (&factor)[MT][2])
{
    int lane = threadIdx.x % 32;

#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = first + 16 * m + 8 * half + lane / 4;
            S *to = (S *)x.data + batch * x.batch + (int64_t)r * x.row + head * x.head;

            if (r >= count)
                continue;
#pragma unroll
            for (int j = 0; j < WIDE / 8; j++)
                if (8 * j < c.D)
                    *(uint32_t *)(to + 8 * j + lane % 4 * 2) =
                        two_of<S>(o[m][j][2 * half] * factor[m][half],
                                  o[m][j][2 * half + 1] * factor[m][half]);
        }
}

#endif
