/* attention_form.cu - which calls of attention cuDNN can do, and as which graph.
 *
 * A mask becomes a bias that is added to the scores. cuDNN's engines take causality with T = S, and
 * with T < S where there is no bias (cudnn-frontend's own checks refuse the rest, though engines are
 * offered for it); so T > S leaves out the rows that see nothing, and what remains has T = S, and a
 * mask with T < S takes causality into the bias.
 */
#include "kernels/cuda/attention_graph.h"

#include <string.h>

#define FEWEST_ROWS                                                                                \
    32 /* below, engines' tiles are mostly empty; plans for each length would pile up */

/* Whether a backward engine hides what lies beyond the last row and key. Those for Hopper (to cuDNN 9.26
 * at least) decide that by whether S is a multiple of 64, but take 128 keys at a time: with
 * S mod 128 = 64 keys that are not there have score 0, and where lse < -88 their exp(0 - lse) is
 * inf, and dq NaN; with rows, whose tiles are 64, it is the same (cudnn-frontend, pull
 * request 628). Causality hides keys that are not there, and with T = S rows as well. */
static int edges_hidden(const sdpa_form *f)
{
    if ((f->causal && f->T == f->S) || f->S % 64)
        return 1;
    return f->T % 64 == 0 && (f->causal || f->S % 128 == 0);
}

/* [B, 1 or H, T, S] of which only what differs is in memory. */
static void set_bias(sdpa_form *f, const sdpa_request *r)
{
    int by_row = r->mask_size[2] > 1 || (r->causal && !f->causal);
    int64_t rows = by_row ? f->T : 1;

    f->bias = r->mask;
    f->bias_heads = r->mask_size[1] > 1 ? (int32_t)f->H : 1;
    f->bias_stride[2] = by_row ? f->S : 0;
    f->bias_stride[1] = rows * f->S;
    f->bias_stride[0] = r->mask_size[0] > 1 ? f->bias_heads * rows * f->S : 0;
}

const char *sdpa_form_of(sdpa_form *f, const sdpa_request *r)
{
    memset(f, 0, sizeof *f);
    f->backward = r->backward;
    f->f16 = r->f16;
    f->deterministic = r->deterministic;
    f->B = r->B;
    f->H = r->H;
    f->G = r->G;
    f->T = r->causal && r->T > r->S ? r->S : r->T;
    f->S = r->S;
    f->D = r->D;
    f->causal = r->causal && (!r->mask || f->T == f->S);
    memcpy(f->stride, r->stride, sizeof f->stride);
    if (r->mask)
        set_bias(f, r);
    if (f->D % 8)
        return "heads must be multiples of 8 wide";
    if (f->T < FEWEST_ROWS || f->S < 1)
        return "there are too few rows";
    if (f->backward && !edges_hidden(f))
        return "its backward engines would not hide what is beyond these many rows and keys";
    return NULL;
}
