/* attention_backward.cu - gradients of attention; the weights are made again from lse.
 *
 * With s = scale q kᵀ + mask, w = exp(s - lse), and dw = dy vᵀ:
 *     dv = wᵀ dy,  ds = w (dw - delta),  dq = scale ds k,  dk = scale dsᵀ q
 * where delta is dy y summed over a row (Dao et al. 2022, section B.2). Under dropout, w in dv and dw
 * in ds are multiplied by what was kept.
 *
 * dq is a sum over keys, dk and dv are sums over rows: each has a kernel of its own, whose blocks own
 * what they write and add in order. So s and dw are computed twice, and the same bits come out every
 * time; one kernel for both would have to add dq from many blocks.
 */
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_tile.cuh"

/* ---- what the other kernels need of each row */

template <typename S>
static __global__ void __launch_bounds__(256) row_products(attention_call c, int64_t rows)
{
    int lane = threadIdx.x % 32;

    for (int64_t r = global_thread() / 32; r < rows; r += global_threads() / 32) {
        int t = (int)(r % c.T), head = (int)(r / c.T % c.H), batch = (int)(r / c.T / c.H);
        const S *y = (const S *)c.y.data + batch * c.y.batch + t * c.y.row + head * c.y.head;
        const S *dy = (const S *)c.dy.data + batch * c.dy.batch + t * c.dy.row + head * c.dy.head;
        float sum = 0;

        if (c.y.aligned && c.dy.aligned && c.D % per_16<S> == 0) {
            for (int d = lane * per_16<S>; d < c.D; d += 32 * per_16<S>) {
                pack<S, per_16<S>> a = *(const pack<S, per_16<S>> *)(y + d);
                pack<S, per_16<S>> b = *(const pack<S, per_16<S>> *)(dy + d);

#pragma unroll
                for (int i = 0; i < per_16<S>; i++)
                    sum = fmaf(to_float(a.of[i]), to_float(b.of[i]), sum);
            }
        } else {
            for (int d = lane; d < c.D; d += 32)
                sum = fmaf(to_float(y[d]), to_float(dy[d]), sum);
        }
        sum = warp_reduce<add_op>(sum);
        if (lane == 0) {
            float lse = *attention_lse(c, batch, head, t);

            c.delta[r] = sum;
            c.lse2[r] = lse == -INFINITY ? INFINITY : lse * (float)LOG2E;
        }
    }
}

/* ---- weights and their gradients */

/* Exponents s and dw of this thread, to the weights that dv takes and to ds, in place. */
template <typename Z>
static __device__ inline void
weight_gradient(float (&s)[Z::RPT][Z::KPT], float (&dw)[Z::RPT][Z::KPT], const attention_call &c,
                int batch, int head, int first, int key, int ty, int tx)
{
#pragma unroll
    for (int i = 0; i < Z::RPT; i++) {
        int t = first + ty * Z::RPT + i;
        int64_t row = attention_row(c, batch, head, t);
        float lse = t < c.T ? c.lse2[row] : INFINITY, delta = t < c.T ? c.delta[row] : 0;
        float keep[Z::KPT];

        if (c.drops)
            attention_keep(keep, c, batch, head, t, key + tx * Z::KPT);
#pragma unroll
        for (int j = 0; j < Z::KPT; j++) {
            float kept = c.drops ? keep[j] : 1, w = attention_exp2(s[i][j] - lse);

            dw[i][j] = w * (dw[i][j] * kept - delta);
            s[i][j] = w * kept;
        }
    }
}

/* ---- dq: a block has a tile of queries */

template <typename Z>
static __global__ void __launch_bounds__(Z::THREADS) backward_q(attention_call c, int tiles)
{
    DS_SHARED(float, q);
    float *dy = q + Z::ROWS * Z::LD, *k = dy + Z::ROWS * Z::LD, *v = k + Z::KEYS * Z::LD;
    float *ds = v + Z::KEYS * Z::LD;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    attention_place at = attention_rows_of(tiles, c.H, Z::ROWS);
    int last = at.first + Z::ROWS < c.T ? at.first + Z::ROWS : c.T;
    int group = at.head / c.ratio, seen = attention_seen(c, last - 1);
    float dq[Z::RPT][Z::CPT];

#pragma unroll
    for (int i = 0; i < Z::RPT; i++)
#pragma unroll
        for (int d = 0; d < Z::CPT; d++)
            dq[i][d] = 0;
    load_rows<Z>(q, c, c.q, at.batch, at.head, at.first);
    load_rows<Z>(dy, c, c.dy, at.batch, at.head, at.first);
    for (int key = 0; key < seen; key += Z::KEYS) {
        float s[Z::RPT][Z::KPT], dw[Z::RPT][Z::KPT];

        __syncthreads(); /* the tile before is used */
        load_keys<Z>(k, c, c.k, at.batch, group, key);
        load_keys<Z>(v, c, c.v, at.batch, group, key);
        __syncthreads();
        product_scores<Z>(s, q, k, c.D, ty, tx);
        product_scores<Z>(dw, dy, v, c.D, ty, tx);
        exponents<Z>(s, c, at.batch, at.head, at.first, key, ty, tx);
        weight_gradient<Z>(s, dw, c, at.batch, at.head, at.first, key, ty, tx);
        store_scores<Z>(ds, dw, ty, tx);
        __syncthreads();
        product_weighted<Z>(dq, ds, k, ty, tx);
    }
#pragma unroll
    for (int i = 0; i < Z::RPT; i++)
        if (at.first + ty * Z::RPT + i < c.T)
            store_columns<Z>(c, c.dq, at.batch, at.head, at.first + ty * Z::RPT + i, tx, dq[i],
                             c.scale);
}

/* ---- dk, dv: a block has a tile of keys, and goes through the rows of all heads that share them */

template <typename Z>
static __global__ void __launch_bounds__(Z::THREADS) backward_kv(attention_call c, int tiles)
{
    DS_SHARED(float, k);
    float *v = k + Z::KEYS * Z::LD, *q = v + Z::KEYS * Z::LD, *dy = q + Z::ROWS * Z::LD;
    float *w = dy + Z::ROWS * Z::LD;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    attention_place at = attention_keys_of(tiles, c.G, Z::KEYS);
    int begin = attention_first_row(c, at.first) / Z::ROWS * Z::ROWS;
    float dk[Z::KPT][Z::CPT], dv[Z::KPT][Z::CPT];

#pragma unroll
    for (int j = 0; j < Z::KPT; j++)
#pragma unroll
        for (int d = 0; d < Z::CPT; d++)
            dk[j][d] = dv[j][d] = 0;
    load_keys<Z>(k, c, c.k, at.batch, at.head, at.first);
    load_keys<Z>(v, c, c.v, at.batch, at.head, at.first);
    for (int head = at.head * c.ratio; head < (at.head + 1) * c.ratio; head++)
        for (int first = begin; first < c.T; first += Z::ROWS) {
            float s[Z::RPT][Z::KPT], dw[Z::RPT][Z::KPT];

            __syncthreads(); /* the tile before is used */
            load_rows<Z>(q, c, c.q, at.batch, head, first);
            load_rows<Z>(dy, c, c.dy, at.batch, head, first);
            __syncthreads();
            product_scores<Z>(s, q, k, c.D, ty, tx);
            product_scores<Z>(dw, dy, v, c.D, ty, tx);
            exponents<Z>(s, c, at.batch, head, first, at.first, ty, tx);
            weight_gradient<Z>(s, dw, c, at.batch, head, first, at.first, ty, tx);
            store_scores<Z>(w, s, ty, tx);
            __syncthreads();
            product_gathered<Z>(dv, w, dy, ty, tx);
            __syncthreads(); /* the weights are used: ds takes their place */
            store_scores<Z>(w, dw, ty, tx);
            __syncthreads();
            product_gathered<Z>(dk, w, q, ty, tx);
        }
#pragma unroll
    for (int j = 0; j < Z::KPT; j++) {
        int s = at.first + ty * Z::KPT + j;

        if (s >= c.S)
            continue;
        store_columns<Z>(c, c.dk, at.batch, at.head, s, tx, dk[j], c.scale);
        store_columns<Z>(c, c.dv, at.batch, at.head, s, tx, dv[j], 1);
    }
}

/* ---- launching */

static int row_products_of(const attention_call &c)
{
    static const char what[] = "attention_backward";
    int64_t rows = (int64_t)c.B * c.H * c.T;

    return DS_BY_FLOAT(what, c.dtype, S,
                       launch(what, row_products<S>, grid_for(rows, 8, 8), dim3(256), 0, c, rows));
}

template <typename Z> static int run(const attention_call &c)
{
    static const char what[] = "attention_backward";
    int rows = (c.T + Z::ROWS - 1) / Z::ROWS, keys = (c.S + Z::KEYS - 1) / Z::KEYS;
    size_t bytes = (2 * (Z::ROWS + Z::KEYS) * Z::LD + Z::ROWS * Z::LDS) * sizeof(float);

    DS_TRY(attention_fits(what, bytes));
    if (c.T > 0)
        DS_TRY(launch(what, backward_q<Z>, dim3((unsigned)(rows * c.H * c.B)), dim3(Z::THREADS),
                      bytes, c, rows));
    if (c.S > 0)
        DS_TRY(launch(what, backward_kv<Z>, dim3((unsigned)(keys * c.G * c.B)), dim3(Z::THREADS),
                      bytes, c, keys));
    return 0;
}

int ds_cuda_attention_backward(ds_tensor *dq, ds_tensor *dk, ds_tensor *dv, const ds_tensor *dy,
                               const ds_tensor *y, const ds_tensor *lse, const ds_tensor *q,
                               const ds_tensor *k, const ds_tensor *v, const ds_tensor *mask,
                               int causal, double scale, double p, uint64_t seed, uint64_t offset)
{
    static const char what[] = "attention_backward";
    attention_call c;
    size_t rows;
    int left;

    DS_TRY(attention_check(&c, what, q, k, v, lse, mask, causal, scale, p, seed, offset));
    DS_TRY(attention_same(what, dq, "dq", q));
    DS_TRY(attention_same(what, dk, "dk", k));
    DS_TRY(attention_same(what, dv, "dv", v));
    DS_TRY(attention_same(what, dy, "dy", q));
    DS_TRY(attention_same(what, y, "y", q));
    c.y = attention_heads(y);
    c.dy = attention_heads(dy);
    c.dq = attention_heads(dq);
    c.dk = attention_heads(dk);
    c.dv = attention_heads(dv);
    if (q->numel == 0 && k->numel == 0)
        return 0;
    left = attention_choose(&c, what, 1);
    if (left < 0 || left == ATTENTION_DONE)
        return left;
    rows = (size_t)c.B * c.H * c.T;
    c.delta = (float *)ds_cuda_scratch(DS_CUDA_PARTIAL, 2 * rows * sizeof(float));
    c.lse2 = c.delta + rows;
    if (!c.delta)
        return DS_ENOMEM;
    if (c.T > 0)
        DS_TRY(row_products_of(c));
    if (left == ATTENTION_MMA && attention_mma_takes(c, 1))
        return attention_mma_backward(c);
    return BY_WIDTH(c.D, Z, run<Z>(c));
}
