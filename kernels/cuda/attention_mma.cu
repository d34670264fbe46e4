/* attention_mma.cu - attention on tensor cores, forward.
 *
 * Each warp has 16 MT queries and goes with the other three through the keys, 64 at a time. Scores stay
 * in registers, where they become weights and the left side of the product with the values.
 */
#include "kernels/cuda/attention_mma.cuh"

template <typename S, int WIDE_> struct forward_tile {
    static constexpr int WIDE = WIDE_, MT = 2, ROWS = 16 * MT * MMA_WARPS;
    static constexpr int KEYS = WIDE == 64 ? 64 : 32, N = KEYS / 8;
    static constexpr int BYTES = (ROWS + 4 * KEYS) * WIDE * (int)sizeof(S);
};

/* Of a warp's rows: lane has rows lane / 4 and 8 after it of each 16. */
template <int MT> struct softmax_state {
    float m[MT][2]; /* highest exponent of 2 so far */
    float l[MT][2]; /* this lane's share of the sum of weights, relative to 2^m */
};

/* Exponents to weights; the output so far shrinks to what the new highest exponent makes of it. */
template <int MT, int N, int COLUMNS>
static __device__ inline void soften(float (&s)[MT][N][4], softmax_state<MT> &state,
                                     float (&o)[MT][COLUMNS][4])
{
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = state.m[m][half], base, shrink, sum = 0;

#pragma unroll
            for (int n = 0; n < N; n++)
                top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
            base = top == -INFINITY ? 0 : top; /* nothing seen: weights 0, not NaN */
            shrink = attention_exp2(state.m[m][half] - base);
            state.m[m][half] = top;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    s[m][n][e] = attention_exp2(s[m][n][e] - base);
                    sum += s[m][n][e];
                }
            state.l[m][half] = fmaf(state.l[m][half], shrink, sum);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                o[m][j][2 * half] *= shrink;
                o[m][j][2 * half + 1] *= shrink;
            }
        }
}

template <typename S, typename Z>
static __device__ inline void finish(const attention_call &c, attention_place at, int first,
                                     const float (&o)[Z::MT][Z::WIDE / 8][4],
                                     softmax_state<Z::MT> &state)
{
    int lane = threadIdx.x % 32;
    float factor[Z::MT][2];

#pragma unroll
    for (int m = 0; m < Z::MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int t = first + 16 * m + 8 * half + lane / 4;
            float l = state.l[m][half];

            l += __shfl_xor_sync(0xffffffff, l, 1);
            l += __shfl_xor_sync(0xffffffff, l, 2);
            factor[m][half] = l == 0 ? 0 : 1 / l;
            if (lane % 4 == 0 && t < c.T)
                *attention_lse(c, at.batch, at.head, t) =
                    state.m[m][half] * (float)(1 / LOG2E) + logf(l);
        }
    store<S, Z::WIDE, Z::MT>(c, c.y, at.batch, at.head, first, c.T, o, factor);
}

/* Begins to copy the keys and values from `key` on, to the half of the buffer that is theirs. */
template <typename S, typename Z>
static __device__ inline void fetch_keys(S *kv, const attention_call &c, attention_place at,
                                         int group, int key)
{
    S *to = kv + key / Z::KEYS % 2 * 2 * Z::KEYS * Z::WIDE;

    fetch<S, Z::WIDE>(to, c, c.k, at.batch, group, key, Z::KEYS, c.S);
    fetch<S, Z::WIDE>(to + Z::KEYS * Z::WIDE, c, c.v, at.batch, group, key, Z::KEYS, c.S);
}

template <typename S, typename Z>
static __global__ void __launch_bounds__(MMA_THREADS, 2) forward(attention_call c, int tiles)
{
    DS_SHARED(S, q);
    S *kv = q + Z::ROWS * Z::WIDE;
    attention_place at = attention_rows_of(tiles, c.H, Z::ROWS);
    int row = threadIdx.x / 32 * 16 * Z::MT, first = at.first + row, group = at.head / c.ratio;
    int last = at.first + Z::ROWS < c.T ? at.first + Z::ROWS : c.T;
    int seen = attention_seen(c, last - 1);
    int mine = first < c.T ? attention_seen(c, first + 16 * Z::MT - 1) : 0;
    softmax_state<Z::MT> state;
    float o[Z::MT][Z::WIDE / 8][4];

    clear(o);
#pragma unroll
    for (int m = 0; m < Z::MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            state.m[m][half] = -INFINITY;
            state.l[m][half] = 0;
        }
    fetch<S, Z::WIDE>(q, c, c.q, at.batch, at.head, at.first, Z::ROWS, c.T);
    fetch_keys<S, Z>(kv, c, at, group, 0);
    copies_commit();
    for (int key = 0; key < seen; key += Z::KEYS) {
        S *k = kv + key / Z::KEYS % 2 * 2 * Z::KEYS * Z::WIDE, *v = k + Z::KEYS * Z::WIDE;
        float s[Z::MT][Z::N][4];

        copies_wait();
        __syncthreads(); /* this tile is there, the one before is used */
        if (key + Z::KEYS < seen)
            fetch_keys<S, Z>(kv, c, at, group, key + Z::KEYS);
        copies_commit();
        if (key >= mine)
            continue;
        product_rows<S, Z::WIDE>(s, q, row, k, 0);
        exponents<Z::MT, Z::N, false>(s, c, at.batch, at.head, first, key);
        soften(s, state, o);
        if (c.drops) {
            uint64_t kept = kept_bits<Z::MT, Z::N, false>(c, at.batch, at.head, first, key);

#pragma unroll
            for (int i = 0; i < Z::MT * Z::N * 4; i++)
                s[i / 4 / Z::N][i / 4 % Z::N][i % 4] *= kept >> i & 1 ? c.kept : 0;
        }
        product_columns<S, Z::WIDE>(o, s, v, 0);
    }
    copies_wait();
    finish<S, Z>(c, at, first, o, state);
}

int attention_mma_takes(const attention_call &c, int backward)
{
    int aligned = c.q.aligned && c.k.aligned && c.v.aligned && c.y.aligned;

    if (backward)
        aligned = aligned && c.dy.aligned && c.dq.aligned && c.dk.aligned && c.dv.aligned;
    return (c.dtype == DS_BF16 || c.dtype == DS_F16) && c.D <= 128 && c.D % 8 == 0 && aligned;
}

template <typename S, int WIDE> static int run(const attention_call &c)
{
    using Z = forward_tile<S, WIDE>;
    int tiles = (c.T + Z::ROWS - 1) / Z::ROWS;

    DS_TRY(attention_fits("attention", Z::BYTES));
    return launch("attention", forward<S, Z>, dim3((unsigned)(tiles * c.H * c.B)),
                  dim3(MMA_THREADS), Z::BYTES, c, tiles);
}

int attention_mma(const attention_call &c)
{
    return BY_MMA(c, S, WIDE, run<S, WIDE>(c));
}
