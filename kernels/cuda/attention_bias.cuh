/* attention_bias.cuh - what surrounds cuDNN's graphs of attention: masks before, hidden rows after. */
#ifndef DS_CUDA_ATTENTION_BIAS_CUH
#define DS_CUDA_ATTENTION_BIAS_CUH

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_graph.h"

/* Rows of keys that a form's bias has in memory. */
int64_t attention_bias_rows(const sdpa_form *f);

/* The mask of c as the form's bias, dense. Of each row the first key that it shows, S where there is none:
 * first [attention_bias_rows]. */
int attention_bias(const attention_call *c, const sdpa_form *f, void *bias, int *first);

/* After the forward pass: lse [B, H, T] of the form to that of c, and rows that see nothing to y = 0 and
 * lse = -inf. first as above, NULL where there is no mask. */
int attention_put_right(const attention_call *c, const sdpa_form *f, const int *first,
                        const float *lse);

/* Before the backward pass: lse of c to [B, H, T] of the form, where rows that see nothing have one that
 * makes their weights 0; dq of rows that the form leaves out to 0. */
int attention_finite_lse(const attention_call *c, const sdpa_form *f, float *lse);

#endif
