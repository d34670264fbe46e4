/* attention_bias.cu - masks of attention as cuDNN's bias, and rows that see nothing.
 *
 * Hidden keys have -2^126: a number that no score reaches, that bf16 has, too, and that stays finite
 * when a score is added or it is multiplied by log2 e. What a mask of floats has below -2^125 counts
 * as hidden. The kernels are bound by memory and read the mask once: a warp has a row of keys.
 */
#include "kernels/cuda/attention_bias.cuh"

#define HIDDEN -0x1p126f
#define HIDES_BELOW -0x1p125f
#define NO_WEIGHTS 0x1p100f /* as lse: exp(s - lse) is 0 for every score */

/* The rows of a bias in memory, by batch, head and query. */
struct bias_rows {
    int batches, heads, queries; /* 1: the same for all */
    int skipped;                 /* the call's query that is the form's first */
    int folded;                  /* causality is in the bias */
};

static bias_rows rows_of(const attention_call *c, const sdpa_form *f)
{
    bias_rows z = {1, 1, 1, (int)(c->T - f->T), c->causal && !f->causal};

    if (f->bias) {
        z.batches = f->bias_stride[0] ? (int)f->B : 1;
        z.heads = f->bias_heads;
        z.queries = f->bias_stride[2] ? (int)f->T : 1;
    }
    return z;
}

int64_t attention_bias_rows(const sdpa_form *f)
{
    return (f->bias_stride[0] ? f->B : 1) * f->bias_heads * (f->bias_stride[2] ? f->T : 1);
}

/* ---- the bias */

/* A mask's element; bool is uint8_t. */
static __device__ inline float bias_of(uint8_t shown)
{
    return shown ? 0 : HIDDEN;
}
template <typename M> static __device__ inline float bias_of(M m)
{
    float x = to_float(m);

    return x < HIDES_BELOW ? HIDDEN : x;
}

/* N keys from s on of a row that causality shows `shown` of; *first falls to the first that is shown. */
template <int N, typename M, typename S>
static __device__ inline void convert(S *to, const M *from, int64_t step, int s, int shown,
                                      int *first)
{
    pack<M, N> in;
    pack<S, N> out;

    if (N > 1)
        in = *(const pack<M, N> *)(from + s);
    else
        in.of[0] = from[s * step];
#pragma unroll
    for (int i = 0; i < N; i++) {
        float x = s + i < shown ? bias_of(in.of[i]) : HIDDEN;

        if (x != HIDDEN && s + i < *first)
            *first = s + i;
        out.of[i] = from_float<S>(x);
    }
    *(pack<S, N> *)(to + s) = out;
}

template <typename M, typename S>
static __global__ void __launch_bounds__(256)
    make_bias(attention_call c, S *bias, int *firsts, bias_rows z, int64_t rows, int wide)
{
    int lane = threadIdx.x % 32;

    for (int64_t r = global_thread() / 32; r < rows; r += global_threads() / 32) {
        int t = z.skipped + (int)(r % z.queries);
        int64_t head = r / z.queries % z.heads, batch = r / z.queries / z.heads;
        const M *from = (const M *)c.mask + batch * c.mask_stride[0] + head * c.mask_stride[1] +
                        t * c.mask_stride[2];
        S *to = bias + r * c.S;
        int shown = z.folded ? attention_seen(c, t) : c.S, first = c.S;

        if (wide)
            for (int s = lane * 8; s < c.S; s += 256)
                convert<8>(to, from, 1, s, shown, &first);
        else
            for (int s = lane; s < c.S; s += 32)
                convert<1>(to, from, c.mask_stride[3], s, shown, &first);
        for (int k = 16; k; k >>= 1) {
            int other = __shfl_xor_sync(0xffffffff, first, k);

            first = other < first ? other : first;
        }
        if (lane == 0)
            firsts[r] = first;
    }
}

template <typename M, typename S>
static int bias_as(const attention_call *c, const sdpa_form *f, void *bias, int *first)
{
    int64_t rows = attention_bias_rows(f);
    int wide = c->S % 8 == 0 && c->mask_stride[3] == 1 && (uintptr_t)c->mask % (8 * sizeof(M)) == 0;

    for (int i = 0; i < 3; i++)
        wide = wide && c->mask_stride[i] % 8 == 0;
    return launch("attention", make_bias<M, S>, grid_for(rows, 8, 8), dim3(256), 0, *c, (S *)bias,
                  first, rows_of(c, f), rows, wide);
}

int attention_bias(const attention_call *c, const sdpa_form *f, void *bias, int *first)
{
    if (f->bias == SDPA_BIAS_BF16)
        return c->mask_dtype == DS_BOOL ? bias_as<uint8_t, bf16>(c, f, bias, first)
                                        : bias_as<bf16, bf16>(c, f, bias, first);
    if (c->mask_dtype == DS_BOOL)
        return bias_as<uint8_t, float>(c, f, bias, first);
    return DS_BY_FLOAT("attention", c->mask_dtype, M, bias_as<M, float>(c, f, bias, first));
}

/* ---- rows that see nothing */

/* A warp has 32 rows at a time: each lane settles the lse of one, then all clear those that are to be 0.
 * inner: lse of the form, which has the queries from z.skipped on. x: y, or dq. */
template <bool FORWARD>
static __global__ void __launch_bounds__(256)
    settle_rows(attention_call c, head_tensor x, const int *first, float *inner, bias_rows z)
{
    int64_t rows = (int64_t)c.B * c.H * c.T;
    int lane = threadIdx.x % 32;

    for (int64_t base = global_thread() / 32 * 32; base < rows; base += global_threads()) {
        int64_t r = base + lane;
        bool clear = false;
        unsigned all;

        if (r < rows) {
            int t = (int)(r % c.T), head = (int)(r / c.T % c.H), batch = (int)(r / c.T / c.H);
            float *lse = attention_lse(c, batch, head, t);
            float *mine = inner + r / c.T * (c.T - z.skipped) + t - z.skipped;

            clear = t < z.skipped;
            if (FORWARD && !clear && first) {
                int64_t at = z.batches > 1 ? batch : 0;

                at = at * z.heads + (z.heads > 1 ? head : 0);
                at = at * z.queries + (z.queries > 1 ? t - z.skipped : 0);
                clear = first[at] >= attention_seen(c, t);
            }
            if (FORWARD)
                *lse = clear ? -INFINITY : *mine;
            else if (!clear)
                *mine = *lse == -INFINITY ? NO_WEIGHTS : *lse;
        }
        all = __ballot_sync(0xffffffff, clear);
        for (int i = 0; i < 32 && all >> i; i++) {
            int64_t row = base + i;
            char *to = x.data + 2 * (row / c.T / c.H * x.batch + row % c.T * x.row +
                                     row / c.T % c.H * x.head);

            for (int d = lane * 8; (all >> i & 1) && d < c.D; d += 256)
                *(pack<uint32_t, 4> *)(to + 2 * d) = pack<uint32_t, 4>{};
        }
    }
}

template <bool FORWARD>
static int settle(const attention_call *c, const sdpa_form *f, const head_tensor &x,
                  const int *first, float *inner)
{
    int64_t rows = (int64_t)c->B * c->H * c->T;

    return launch("attention", settle_rows<FORWARD>, grid_for(rows, 256, 8), dim3(256), 0, *c, x,
                  first, inner, rows_of(c, f));
}

int attention_put_right(const attention_call *c, const sdpa_form *f, const int *first,
                        const float *lse)
{
    return settle<true>(c, f, c->y, first, (float *)lse);
}

int attention_finite_lse(const attention_call *c, const sdpa_form *f, float *lse)
{
    return settle<false>(c, f, c->dq, NULL, lse);
}
