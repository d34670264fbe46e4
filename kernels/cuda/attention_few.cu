/* attention_few.cu - attention of a few queries to many keys, as when a model generates; forward.
 *
 * Bound by reading keys and values, which the queries of all heads that share them do together: 16 at
 * most, in tiles of 8. The keys are cut in parts, so that there are blocks enough for the device;
 * what each found is put together in order by a second kernel (Dao et al. 2023, "Flash-Decoding"). Where
 * the cuts are depends on the shapes alone: the same bits every time, on every device.
 *
 * A block has 128 keys at a time. `span` threads next to each other have a key, 8 columns each:
 * first for the scores of all rows, then, when these are weights, for what the value adds to their
 * outputs, which stay in registers until the part is done.
 */
#include "kernels/cuda/attention.cuh"

#define MOST_ROWS 16    /* of queries that share keys: T times the heads that share */
#define BLOCKS 1024     /* that fill a device with reads under way */
#define KEYS 128        /* at a time */
#define FEWEST_KEYS 256 /* of a part: less is not worth a block */
#define THREADS 256
#define WARPS (THREADS / 32)

/* How the keys are cut, and where what is found of row (batch, head, t) and a part is. */
struct few_parts {
    int tiles;    /* of rows */
    int parts;    /* of keys */
    int keys;     /* of each part */
    int span;     /* threads for a key: a power of 2 */
    float *found; /* [B H T][parts][2]: highest exponent m, sum of weights relative to 2^m */
    float *o;     /* [B H T][parts][D]: weighted values */
};

/* ---- memory */

/* Columns of thread i of a key's: as many 16 bytes as make 8 elements, `span` threads beside each other. */
template <typename S> static __device__ inline int column_of(int j, int i, int span)
{
    return (j / per_16<S> * span + i) * per_16<S> + j % per_16<S>;
}

template <typename S>
static __device__ inline void load_columns(float (&to)[8], const head_tensor &x, int64_t at, int D,
                                           int i, int span)
{
    const S *row = (const S *)x.data + at;

#pragma unroll
    for (int j = 0; j < 8; j += per_16<S>) {
        int d = column_of<S>(j, i, span);
        pack<S, per_16<S>> values = {};

        if (x.aligned && d + per_16<S> <= D)
            values = *(const pack<S, per_16<S>> *)(row + d);
        else
            for (int e = 0; e < per_16<S> && d + e < D; e++)
                values.of[e] = row[d + e];
#pragma unroll
        for (int e = 0; e < per_16<S>; e++)
            to[j + e] = to_float(values.of[e]);
    }
}

/* ---- the rows in hand: row r of a kv head is query r / ratio of its head r % ratio */

struct few_rows {
    int batch, group, first, n;

    __device__ int head(const attention_call &c, int r) const
    {
        return group * c.ratio + (first + r) % c.ratio;
    }
    __device__ int query(const attention_call &c, int r) const
    {
        return (first + r) / c.ratio;
    }
};

/* Of a block's rows, in shared memory. */
template <int ROWS> struct few_state {
    float q[ROWS][ATTENTION_WIDEST];
    float s[ROWS][KEYS]; /* scores, then weights */
    float m[ROWS], l[ROWS], shrink[ROWS];
    float sum[2048]; /* outputs of all keys in hand, a row */
};

/* Scores of n keys from `key` on. */
template <typename S, int ROWS>
static __device__ inline void scores(few_state<ROWS> &z, const attention_call &c, const few_rows &w,
                                     int key, int n, int span)
{
    int mine = threadIdx.x % span, step = THREADS / span;

    for (int j = threadIdx.x / span; j < KEYS; j += step) {
        float k[8];

        if (j < n)
            load_columns<S>(k, c.k,
                            w.batch * c.k.batch + (int64_t)(key + j) * c.k.row + w.group * c.k.head,
                            c.D, mine, span);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float sum = 0;

            if (r < w.n && j < n)
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    int d = column_of<S>(e, mine, span);

                    sum = d < c.D ? fmaf(z.q[r][d], k[e], sum) : sum;
                }
            for (int i = span / 2; i; i /= 2)
                sum += __shfl_xor_sync(0xffffffff, sum, i);
            if (mine == 0)
                z.s[r][j] = sum;
        }
    }
}

/* Scores to weights, a warp a row; the row's m and l. */
template <int ROWS>
static __device__ inline void soften(few_state<ROWS> &z, const attention_call &c, const few_rows &w,
                                     int key, int n)
{
    int lane = threadIdx.x % 32;

    for (int r = threadIdx.x / 32; r < w.n; r += WARPS) {
        int head = w.head(c, r), t = w.query(c, r), seen = attention_seen(c, t);
        float x[KEYS / 32], top = z.m[r], base, sum = 0, shrink;

#pragma unroll
        for (int i = 0; i < KEYS / 32; i++) {
            int j = lane + 32 * i, s = key + j;
            bool shown = j < n && s < seen;

            x[i] = shown ? z.s[r][j] * c.scale2 : -INFINITY;
            if (c.mask && shown)
                x[i] += attention_mask(c, w.batch, head, t, s);
            top = fmaxf(top, x[i]);
        }
        for (int k = 16; k; k >>= 1)
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, k));
        base = top == -INFINITY ? 0 : top; /* nothing seen: weights 0, not NaN */
        shrink = attention_exp2(z.m[r] - base);
#pragma unroll
        for (int i = 0; i < KEYS / 32; i++) {
            float e = attention_exp2(x[i] - base), keep[1] = {1};

            sum += e;
            if (c.drops)
                attention_keep(keep, c, w.batch, head, t, key + lane + 32 * i);
            z.s[r][lane + 32 * i] = e * keep[0];
        }
        sum = warp_reduce<add_op>(sum);
        if (lane == 0) {
            z.m[r] = top;
            z.l[r] = fmaf(z.l[r], shrink, sum);
            z.shrink[r] = shrink;
        }
    }
}

/* o: this thread's columns of what its keys add to each row. */
template <typename S, int ROWS>
static __device__ inline void add_values(float (&o)[ROWS][8], const few_state<ROWS> &z,
                                         const attention_call &c, const few_rows &w, int key, int n,
                                         int span)
{
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int e = 0; e < 8; e++)
            o[r][e] *= r < w.n ? z.shrink[r] : 0;
    for (int j = threadIdx.x / span; j < n; j += THREADS / span) {
        float v[8];

        load_columns<S>(v, c.v,
                        w.batch * c.v.batch + (int64_t)(key + j) * c.v.row + w.group * c.v.head,
                        c.D, threadIdx.x % span, span);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float weight = r < w.n ? z.s[r][j] : 0;

#pragma unroll
            for (int e = 0; e < 8; e++)
                o[r][e] = r < w.n ? fmaf(weight, v[e], o[r][e]) : 0;
        }
    }
}

/* The block's sum over its threads of each row, in order, and m and l. */
template <typename S, int ROWS>
static __device__ inline void tell(few_state<ROWS> &z, const float (&o)[ROWS][8],
                                   const attention_call &c, const few_rows &w, const few_parts &p,
                                   int part)
{
    int groups = THREADS / p.span;

#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int64_t at;

        if (r >= w.n)
            break;
        at = attention_row(c, w.batch, w.head(c, r), w.query(c, r)) * p.parts + part;
        __syncthreads(); /* the row before is told */
#pragma unroll
        for (int e = 0; e < 8; e++) {
            int d = column_of<S>(e, threadIdx.x % p.span, p.span);

            if (d < c.D)
                z.sum[threadIdx.x / p.span * c.D + d] = o[r][e];
        }
        __syncthreads();
        for (int d = threadIdx.x; d < c.D; d += THREADS) {
            float sum = 0;

            for (int i = 0; i < groups; i++)
                sum += z.sum[i * c.D + d];
            p.o[at * c.D + d] = sum;
        }
        if (threadIdx.x == 0) {
            p.found[2 * at] = z.m[r];
            p.found[2 * at + 1] = z.l[r];
        }
    }
}

template <typename S, int ROWS>
static __global__ void __launch_bounds__(THREADS) find(attention_call c, few_parts p)
{
    __shared__ few_state<ROWS> z;
    int part = (int)(blockIdx.x % p.parts), tile = (int)(blockIdx.x / p.parts % p.tiles);
    int unit = (int)(blockIdx.x / p.parts / p.tiles), left = c.T * c.ratio - tile * ROWS;
    few_rows w = {unit / c.G, unit % c.G, tile * ROWS, left < ROWS ? left : ROWS};
    int seen = attention_seen(c, w.query(c, w.n - 1)), end = (part + 1) * p.keys;
    float o[ROWS][8] = {};

    for (int i = threadIdx.x; i < w.n * c.D; i += THREADS) {
        int r = i / c.D, d = i % c.D;
        int64_t at = w.batch * c.q.batch + w.query(c, r) * c.q.row + w.head(c, r) * c.q.head + d;

        z.q[r][d] = to_float(((const S *)c.q.data)[at]);
    }
    if (threadIdx.x < ROWS) {
        z.m[threadIdx.x] = -INFINITY;
        z.l[threadIdx.x] = 0;
    }
    end = end < seen ? end : seen;
    for (int key = part * p.keys; key < end; key += KEYS) {
        int n = end - key < KEYS ? end - key : KEYS;

        __syncthreads(); /* the weights before are used */
        scores<S>(z, c, w, key, n, p.span);
        __syncthreads();
        soften(z, c, w, key, n);
        __syncthreads();
        add_values<S>(o, z, c, w, key, n, p.span);
    }
    __syncthreads();
    tell<S>(z, o, c, w, p, part);
}

/* ---- what the parts found, put together: a warp a row */

template <typename S>
static __global__ void __launch_bounds__(THREADS) unite(attention_call c, few_parts p, int64_t rows)
{
    int lane = threadIdx.x % 32;

    for (int64_t r = global_thread() / 32; r < rows; r += global_threads() / 32) {
        int t = (int)(r % c.T), head = (int)(r / c.T % c.H), batch = (int)(r / c.T / c.H);
        S *y = (S *)c.y.data + batch * c.y.batch + t * c.y.row + head * c.y.head;
        const float *found = p.found + 2 * r * p.parts;
        float m = -INFINITY, base, l = 0;

        for (int i = 0; i < p.parts; i++)
            m = fmaxf(m, found[2 * i]);
        base = m == -INFINITY ? 0 : m;
        for (int i = 0; i < p.parts; i++)
            l = fmaf(found[2 * i + 1], attention_exp2(found[2 * i] - base), l);
        for (int d = lane; d < c.D; d += 32) {
            float sum = 0;

            for (int i = 0; i < p.parts; i++)
                sum = fmaf(p.o[(r * p.parts + i) * c.D + d], attention_exp2(found[2 * i] - base),
                           sum);
            y[d] = from_float<S>(l == 0 ? 0 : sum / l);
        }
        if (lane == 0)
            *attention_lse(c, batch, head, t) = m * (float)(1 / LOG2E) + logf(l);
    }
}

/* ---- launching */

int attention_few_takes(const attention_call &c)
{
    return c.T * c.ratio <= MOST_ROWS;
}

template <typename S> static int run(const attention_call &c, few_parts p, int64_t rows)
{
    static const char what[] = "attention";
    dim3 grid((unsigned)(p.parts * p.tiles * c.B * c.G));

    if (p.tiles == 1 && c.T * c.ratio == 1)
        DS_TRY(launch(what, find<S, 1>, grid, dim3(THREADS), 0, c, p));
    else
        DS_TRY(launch(what, find<S, 8>, grid, dim3(THREADS), 0, c, p));
    return launch(what, unite<S>, grid_for(rows, WARPS, 8), dim3(THREADS), 0, c, p, rows);
}

int attention_few(const attention_call &c)
{
    int64_t rows = (int64_t)c.B * c.H * c.T, units, wanted;
    few_parts p = {};

    p.tiles = (c.T * c.ratio + 7) / 8;
    units = (int64_t)c.B * c.G * p.tiles;
    wanted = (BLOCKS + units - 1) / units;
    p.parts = (c.S + FEWEST_KEYS - 1) / FEWEST_KEYS;
    p.parts = p.parts < 1 ? 1 : p.parts > wanted ? (int)wanted : p.parts;
    p.keys = ((c.S + p.parts - 1) / p.parts + KEYS - 1) / KEYS * KEYS;
    p.parts = c.S ? (c.S + p.keys - 1) / p.keys : 1;
    for (p.span = 1; p.span * 8 < c.D;)
        p.span *= 2;
    p.found = (float *)ds_cuda_scratch(DS_CUDA_PARTIAL, rows * p.parts * (c.D + 2) * sizeof(float));
    if (!p.found)
        return DS_ENOMEM;
    p.o = p.found + 2 * rows * p.parts;
    return DS_BY_FLOAT("attention", c.dtype, S, run<S>(c, p, rows));
}
