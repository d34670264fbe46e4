/* attention_mma_backward.cu - gradients of attention on tensor cores; see attention_backward.cu for what
 * is computed, and why by two kernels.
 *
 * dq: a warp has 16 MT queries, as in the forward pass. dk and dv: a warp has 16 MT keys and computes
 * scores across, keys by queries; so in both kernels the weights and ds are, in registers, the left side
 * of the products that follow.
 */
#include "kernels/cuda/attention_mma.cuh"

/* ---- dq */

template <typename S, int WIDE_> struct q_tile {
    static constexpr int WIDE = WIDE_, MT = 2, ROWS = 16 * MT * MMA_WARPS, N = 4, KEYS = 8 * N;
    static constexpr int BYTES = (2 * ROWS + 4 * KEYS) * WIDE * (int)sizeof(S);
};

/* Exponents s and dw to ds, which takes the place of dw. */
template <int MT, int N>
static __device__ inline void gradient_q(float (&s)[MT][N][4], float (&dw)[MT][N][4],
                                         const float (&lse)[MT][2], const float (&delta)[MT][2],
                                         const attention_call &c, uint64_t kept)
{
#pragma unroll
    for (int i = 0; i < MT * N * 4; i++) {
        int m = i / 4 / N, n = i / 4 % N, e = i % 4, half = e / 2;
        float w = attention_exp2(s[m][n][e] - lse[m][half]);
        float keep = !c.drops ? 1 : kept >> i & 1 ? c.kept : 0;

        dw[m][n][e] = w * (dw[m][n][e] * keep - delta[m][half]);
    }
}

template <typename S, typename Z>
static __global__ void __launch_bounds__(MMA_THREADS, 2) backward_q(attention_call c, int tiles)
{
    DS_SHARED(S, q);
    S *dy = q + Z::ROWS * Z::WIDE, *kv = dy + Z::ROWS * Z::WIDE;
    attention_place at = attention_rows_of(tiles, c.H, Z::ROWS);
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * Z::MT, first = at.first + row;
    int last = at.first + Z::ROWS < c.T ? at.first + Z::ROWS : c.T, group = at.head / c.ratio;
    int seen = attention_seen(c, last - 1),
        mine = first < c.T ? attention_seen(c, first + 16 * Z::MT - 1) : 0;
    float lse[Z::MT][2], delta[Z::MT][2], scale[Z::MT][2], dq[Z::MT][Z::WIDE / 8][4];
    auto fetch_keys = [&](int key) {
        S *to = kv + key / Z::KEYS % 2 * 2 * Z::KEYS * Z::WIDE;

        fetch<S, Z::WIDE>(to, c, c.k, at.batch, group, key, Z::KEYS, c.S);
        fetch<S, Z::WIDE>(to + Z::KEYS * Z::WIDE, c, c.v, at.batch, group, key, Z::KEYS, c.S);
    };

    clear(dq);
    fetch<S, Z::WIDE>(q, c, c.q, at.batch, at.head, at.first, Z::ROWS, c.T);
    fetch<S, Z::WIDE>(dy, c, c.dy, at.batch, at.head, at.first, Z::ROWS, c.T);
    fetch_keys(0);
    copies_commit();
#pragma unroll
    for (int i = 0; i < 2 * Z::MT; i++) {
        int t = first + 8 * i + lane / 4;
        int64_t r = attention_row(c, at.batch, at.head, t);

        lse[i / 2][i % 2] = t < c.T ? c.lse2[r] : INFINITY;
        delta[i / 2][i % 2] = t < c.T ? c.delta[r] : 0;
        scale[i / 2][i % 2] = c.scale;
    }
    for (int key = 0; key < seen; key += Z::KEYS) {
        S *k = kv + key / Z::KEYS % 2 * 2 * Z::KEYS * Z::WIDE, *v = k + Z::KEYS * Z::WIDE;
        float s[Z::MT][Z::N][4], dw[Z::MT][Z::N][4];
        uint64_t kept = 0;

        copies_wait();
        __syncthreads(); /* this tile is there, the one before is used */
        if (key + Z::KEYS < seen)
            fetch_keys(key + Z::KEYS);
        copies_commit();
        if (key >= mine)
            continue;
        product_rows<S, Z::WIDE>(s, q, row, k, 0);
        product_rows<S, Z::WIDE>(dw, dy, row, v, 0);
        exponents<Z::MT, Z::N, false>(s, c, at.batch, at.head, first, key);
        if (c.drops)
            kept = kept_bits<Z::MT, Z::N, false>(c, at.batch, at.head, first, key);
        gradient_q(s, dw, lse, delta, c, kept);
        product_columns<S, Z::WIDE>(dq, dw, k, 0);
    }
    copies_wait();
    store<S, Z::WIDE, Z::MT>(c, c.dq, at.batch, at.head, first, c.T, dq, scale);
}

/* ---- dk, dv */

template <typename S, int WIDE_> struct kv_tile {
    static constexpr int WIDE = WIDE_, MT = WIDE == 64 ? 2 : 1, KEYS = 16 * MT * MMA_WARPS;
    static constexpr int N = 8 / MT, ROWS = 8 * N; /* of queries that meet it */
    static constexpr int STAGE = 2 * ROWS * (WIDE * (int)sizeof(S) + 4); /* bytes */
    static constexpr int BYTES = 2 * KEYS * WIDE * (int)sizeof(S) + 2 * STAGE;
};

/* Rows of queries on their way: q and dy [ROWS][WIDE], and of each row lse and delta. */
template <typename S, typename Z> struct stage {
    S *q, *dy;
    float *lse, *delta;

    __device__ stage(S *room, int i)
    {
        q = (S *)((char *)room + i % 2 * Z::STAGE);
        dy = q + Z::ROWS * Z::WIDE;
        lse = (float *)(dy + Z::ROWS * Z::WIDE);
        delta = lse + Z::ROWS;
    }

    __device__ void bring(const attention_call &c, int batch, int head, int first)
    {
        int64_t row = attention_row(c, batch, head, first);

        fetch<S, Z::WIDE>(q, c, c.q, batch, head, first, Z::ROWS, c.T);
        fetch<S, Z::WIDE>(dy, c, c.dy, batch, head, first, Z::ROWS, c.T);
        for (int i = threadIdx.x; i < Z::ROWS; i += MMA_THREADS) {
            bool there = first + i < c.T;

            copy_4(lse + i, there ? c.lse2 + row + i : c.lse2, !there);
            copy_4(delta + i, there ? c.delta + row + i : c.delta, !there);
        }
    }
};

/* Exponents s and dw, across, to what dv takes and to ds, in place. Rows of queries beyond the last have
 * q, dy, lse and delta 0, and add nothing. */
template <int MT, int N>
static __device__ inline void gradient_kv(float (&s)[MT][N][4], float (&dw)[MT][N][4],
                                          const float *lse, const float *delta,
                                          const attention_call &c, uint64_t kept)
{
    int column = threadIdx.x % 4 * 2;

#pragma unroll
    for (int n = 0; n < N; n++) {
        pack<float, 2> l = *(const pack<float, 2> *)(lse + 8 * n + column);
        pack<float, 2> d = *(const pack<float, 2> *)(delta + 8 * n + column);

#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float w = attention_exp2(s[m][n][e] - l.of[e % 2]);
                float keep = !c.drops ? 1 : kept >> (4 * (m * N + n) + e) & 1 ? c.kept : 0;

                dw[m][n][e] = w * (dw[m][n][e] * keep - d.of[e % 2]);
                s[m][n][e] = w * keep;
            }
    }
}

template <typename S, typename Z>
static __global__ void __launch_bounds__(MMA_THREADS, 2) backward_kv(attention_call c, int tiles)
{
    DS_SHARED(S, k);
    S *v = k + Z::KEYS * Z::WIDE, *room = v + Z::KEYS * Z::WIDE;
    attention_place at = attention_keys_of(tiles, c.G, Z::KEYS);
    int row = threadIdx.x / 32 * 16 * Z::MT, key = at.first + row;
    /* Steps: tiles of queries, of one head after the other. */
    int begin = attention_first_row(c, at.first) / Z::ROWS * Z::ROWS;
    int each = begin < c.T ? (c.T - begin + Z::ROWS - 1) / Z::ROWS : 0, steps = each * c.ratio;
    float dk[Z::MT][Z::WIDE / 8][4], dv[Z::MT][Z::WIDE / 8][4], scale[Z::MT][2], one[Z::MT][2];
    auto bring = [&](int i) {
        stage<S, Z>(room, i).bring(c, at.batch, at.head * c.ratio + i / each,
                                   begin + i % each * Z::ROWS);
    };

    clear(dk);
    clear(dv);
#pragma unroll
    for (int i = 0; i < 2 * Z::MT; i++) {
        scale[i / 2][i % 2] = c.scale;
        one[i / 2][i % 2] = 1;
    }
    fetch<S, Z::WIDE>(k, c, c.k, at.batch, at.head, at.first, Z::KEYS, c.S);
    fetch<S, Z::WIDE>(v, c, c.v, at.batch, at.head, at.first, Z::KEYS, c.S);
    if (steps)
        bring(0);
    copies_commit();
    for (int i = 0; i < steps; i++) {
        stage<S, Z> now(room, i);
        int head = at.head * c.ratio + i / each, first = begin + i % each * Z::ROWS;
        float s[Z::MT][Z::N][4], dw[Z::MT][Z::N][4];
        uint64_t kept = 0;

        copies_wait();
        __syncthreads(); /* this stage is there, the one before is used */
        if (i + 1 < steps)
            bring(i + 1);
        copies_commit();
        if (key >= attention_seen(c, first + Z::ROWS - 1))
            continue;
        product_rows<S, Z::WIDE>(s, k, row, now.q, 0);
        product_rows<S, Z::WIDE>(dw, v, row, now.dy, 0);
        exponents<Z::MT, Z::N, true>(s, c, at.batch, head, first, key);
        if (c.drops)
            kept = kept_bits<Z::MT, Z::N, true>(c, at.batch, head, first, key);
        gradient_kv(s, dw, now.lse, now.delta, c, kept);
        product_columns<S, Z::WIDE>(dv, s, now.dy, 0);
        product_columns<S, Z::WIDE>(dk, dw, now.q, 0);
    }
    copies_wait();
    store<S, Z::WIDE, Z::MT>(c, c.dk, at.batch, at.head, key, c.S, dk, scale);
    store<S, Z::WIDE, Z::MT>(c, c.dv, at.batch, at.head, key, c.S, dv, one);
}

/* ---- launching */

template <typename S, int WIDE> static int run(const attention_call &c)
{
    static const char what[] = "attention_backward";
    using Q = q_tile<S, WIDE>;
    using KV = kv_tile<S, WIDE>;
    int rows = (c.T + Q::ROWS - 1) / Q::ROWS, keys = (c.S + KV::KEYS - 1) / KV::KEYS;

    DS_TRY(attention_fits(what, Q::BYTES > KV::BYTES ? Q::BYTES : KV::BYTES));
    if (c.T > 0)
        DS_TRY(launch(what, backward_q<S, Q>, dim3((unsigned)(rows * c.H * c.B)), dim3(MMA_THREADS),
                      Q::BYTES, c, rows));
    if (c.S > 0)
        DS_TRY(launch(what, backward_kv<S, KV>, dim3((unsigned)(keys * c.G * c.B)),
                      dim3(MMA_THREADS), KV::BYTES, c, keys));
    return 0;
}

int attention_mma_backward(const attention_call &c)
{
    return BY_MMA(c, S, WIDE, run<S, WIDE>(c));
}
