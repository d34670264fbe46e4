/* attention_cudnn.cu - attention by cuDNN: when it applies, and what surrounds its graphs.
 *
 * It takes bf16 and f16 without dropout, heads that are multiples of 8, rows at 16 bytes, as in the packed
 * projection [B, T, 3, H, D]; attention_form.cu says which graph that is. A plan takes a tenth of a
 * second or more to build, so it is kept, by the form of the call; none is built while a graph is being
 * captured.
 *
 * A mask becomes a bias in scratch memory (attention_bias.cu), which has a large negative number where
 * keys are hidden: with -inf, exp(-inf - max) would be NaN where nothing has been seen yet. So rows
 * that see nothing come out as some mean of the values, and are put right afterwards; in the backward
 * pass their lse is a large number, which makes their weights 0.
 *
 * Its fast backward engines add dq by atomics, in any order: the last bits differ from run to run.
 * What is here by default does not: dw goes through memory instead, 2 bytes for each weight. Where
 * that is more than a 24th of the device's memory the own kernels are used, which are deterministic
 * and need none. DS_FAST_ATTENTION=1 takes the fast engines.
 */
#include "kernels/cuda/attention_cudnn.h"

#include <stdlib.h>

#include "kernels/cuda/attention_bias.cuh"
#include "kernels/cuda/attention_plan.h"

/* ---- which calls */

/* NULL, or what in the call is not for cuDNN. */
static const char *unfit(const attention_call *c, int backward)
{
    int aligned = c->q.aligned && c->k.aligned && c->v.aligned && c->y.aligned;

    if (backward)
        aligned = aligned && c->dy.aligned && c->dq.aligned && c->dk.aligned && c->dv.aligned;
    if (c->dtype != DS_BF16 && c->dtype != DS_F16)
        return "it takes bf16 and f16 only";
    if (c->drops)
        return "dropout is for the own kernels";
    if (!aligned)
        return "rows must begin at multiples of 16 bytes";
    if (c->lse_stride[2] != 1 || c->lse_stride[1] != c->T ||
        (c->B > 1 && c->lse_stride[0] != (int64_t)c->H * c->T))
        return "lse must be dense";
    return NULL;
}

/* Dimensions of size 1 have any stride: here one that the others imply. */
static void set_strides(int64_t to[3], const head_tensor *x, const attention_call *c, int n,
                        int heads)
{
    to[2] = heads > 1 ? x->head : c->D;
    to[1] = n > 1 ? x->row : heads * to[2];
    to[0] = c->B > 1 ? x->batch : n * to[1];
}

static void request_of(sdpa_request *r, const attention_call *c, int backward)
{
    const head_tensor *const x[SDPA_HEADS] = {NULL,   &c->q,  &c->k,  &c->v, &c->y,
                                              &c->dy, &c->dq, &c->dk, &c->dv};
    const char *fast = getenv("DS_FAST_ATTENTION");
    int is_short = c->mask_dtype == DS_BOOL || c->mask_dtype == DS_BF16;

    *r = sdpa_request{};
    r->backward = backward;
    r->f16 = c->dtype == DS_F16;
    r->causal = c->causal != 0;
    r->deterministic = backward && !(fast && !strcmp(fast, "1"));
    if (c->mask)
        r->mask = c->dtype == DS_BF16 && is_short ? SDPA_BIAS_BF16 : SDPA_BIAS_F32;
    r->mask_size[0] = c->mask_stride[0] ? c->B : 1;
    r->mask_size[1] = c->mask_stride[1] ? c->H : 1;
    r->mask_size[2] = c->mask_stride[2] ? c->T : 1;
    r->B = c->B;
    r->H = c->H;
    r->G = c->G;
    r->T = c->T;
    r->S = c->S;
    r->D = c->D;
    for (int i = SDPA_Q; i < (backward ? SDPA_HEADS : SDPA_DY); i++) {
        int is_key = i == SDPA_K || i == SDPA_V || i == SDPA_DK || i == SDPA_DV;

        set_strides(r->stride[i], x[i], c, is_key ? c->S : c->T, is_key ? c->G : c->H);
    }
}

/* ---- running */

/* Room that a call needs besides cuDNN's own. NULL: none is needed. */
typedef struct room {
    char *bias;
    int *first; /* attention_bias.cuh */
    float *lse; /* what the graph sees: [B, H, T] of the form */
    float *delta, *sum;
    size_t sum_bytes;
} room;

static size_t whole(size_t bytes)
{
    return (bytes + 255) & ~(size_t)255;
}

static int take_room(room *m, const attention_call *c, const sdpa_form *f)
{
    size_t rows = whole((size_t)f->B * f->H * f->T * 4);
    size_t first = f->bias ? whole((size_t)attention_bias_rows(f) * sizeof(int)) : 0;
    size_t values = (size_t)attention_bias_rows(f) * f->S * (f->bias == SDPA_BIAS_F32 ? 4 : 2);

    *m = room{};
    if (f->bias && !(m->bias = (char *)ds_cuda_scratch(DS_CUDA_A, values)))
        return DS_ENOMEM;
    if (f->bias || f->T != c->T) {
        char *b = (char *)ds_cuda_scratch(DS_CUDA_B, first + rows);

        if (!b)
            return DS_ENOMEM;
        m->first = f->bias ? (int *)b : NULL;
        m->lse = (float *)(b + first);
    }
    if (!f->backward)
        return 0;
    m->sum_bytes = f->deterministic ? 0 : (size_t)f->B * f->H * f->T * f->D * 4;
    m->delta = (float *)ds_cuda_scratch(DS_CUDA_PARTIAL, rows + m->sum_bytes);
    if (!m->delta)
        return DS_ENOMEM;
    m->sum = m->sum_bytes ? m->delta + rows / 4 : NULL;
    return 0;
}

/* Row `skipped` of a tensor of queries. */
static char *from_row(const head_tensor *x, int64_t skipped)
{
    return x->data + skipped * x->row * 2;
}

static int run(const sdpa_plan *p, const sdpa_form *f, const attention_call *c)
{
    float scale = c->scale, hidden = -INFINITY, one = 1;
    int32_t T = (int32_t)f->T, S = (int32_t)f->S;
    int64_t skipped = c->T - f->T;
    void *pointers[SDPA_TENSORS] = {};
    room m;

    DS_TRY(take_room(&m, c, f));
    pointers[SDPA_Q] = from_row(&c->q, skipped);
    pointers[SDPA_K] = c->k.data;
    pointers[SDPA_V] = c->v.data;
    pointers[SDPA_Y] = from_row(&c->y, skipped);
    pointers[SDPA_LSE] = m.lse ? m.lse : c->lse;
    pointers[SDPA_BIAS] = m.bias;
    pointers[SDPA_SCALE] = &scale;
    if (f->causal)
        pointers[SDPA_HIDDEN] = &hidden;
    if (f->causal && T != S) {
        pointers[SDPA_ROWS] = &T;
        pointers[SDPA_KEYS] = &S;
    }
    if (m.bias)
        DS_TRY(attention_bias(c, f, m.bias, m.first));
    if (!f->backward) {
        DS_TRY(sdpa_plan_run(p, pointers));
        return m.lse ? attention_put_right(c, f, m.first, m.lse) : 0;
    }
    pointers[SDPA_DY] = from_row(&c->dy, skipped);
    pointers[SDPA_DQ] = from_row(&c->dq, skipped);
    pointers[SDPA_DK] = c->dk.data;
    pointers[SDPA_DV] = c->dv.data;
    pointers[SDPA_ONE] = &one;
    pointers[SDPA_DELTA] = m.delta;
    pointers[SDPA_DQ_SUM] = m.sum;
    if (m.sum)
        DS_TRY(ds_cuda_check(cudaMemsetAsync(m.sum, 0, m.sum_bytes, ds_cuda.stream), "attention"));
    if (m.lse)
        DS_TRY(attention_finite_lse(c, f, m.lse));
    return sdpa_plan_run(p, pointers);
}

int attention_cudnn(const attention_call *c, int backward, const char **why)
{
    sdpa_request request;
    sdpa_form form;
    const sdpa_plan *p;
    int rc;

    if ((*why = unfit(c, backward)))
        return 0;
    request_of(&request, c, backward);
    if ((*why = sdpa_form_of(&form, &request)) || !(p = sdpa_plan_for(&form, why)))
        return 0;
    rc = run(p, &form, c);
    if (rc != DS_ENOMEM)
        return rc < 0 ? rc : 1;
    *why = "there is no memory for its workspace";
    return 0;
}
