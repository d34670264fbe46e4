/* checks.h - what kernels demand of their arguments, the same on every device.
 *
 * A function here has the kernel's name and its tensors in the kernel's order; 0, or DS_EINVAL with the
 * message. Nothing is read or written: what lies in a tensor (indices that are out of range, targets) and
 * what a device cannot do (f64, sizes) is left to its kernels.
 */
#ifndef DS_CHECKS_H
#define DS_CHECKS_H

#include "kernels/error.h"
#include "kernels/tensor.h"

/* ---- of many kernels */

/* "[2 x 3]", for messages. */
const char *ds_shape_text(char text[128], const ds_tensor *t);

/* x has a dimension `dim`, counted from 0. */
int ds_check_dim(const char *name, const ds_tensor *x, int dim);

/* a is of b's shape (or, if `within`, no larger) but for dimension `except`; -1: for none. */
int ds_check_fits(const char *name, const ds_tensor *a, const ds_tensor *b, int except, int within);

/* Operands by a letter each: x the common dtype, b bool, anything else is right already, as is NULL. */
int ds_check_kinds(const char *name, const char *kinds, int count, const ds_tensor *const *t);

/* A number that is to become one of an integer dtype is one; real dtypes take any. */
int ds_check_number(const char *name, double value, int dtype);

/* ---- elementwise, copying, random numbers */

int ds_check_clamp(double low, double high);
/* The first (up) or last whole number within a bound, in the range of an integer dtype, where doubles
 * have no 2^63 - 1. */
double ds_clamp_bound(double bound, int up, int dtype);
int ds_check_where(const char *name, const ds_tensor *y, const ds_tensor *condition,
                   const ds_tensor *a, const ds_tensor *b);
int ds_check_arange(const ds_tensor *y);
int ds_check_triangle(const ds_tensor *y, const ds_tensor *x);
int ds_check_random(const char *name, const ds_tensor *y, double a, double b);
int ds_check_randint(const ds_tensor *y, int64_t low, int64_t high);
int ds_check_dropout(const ds_tensor *y, const ds_tensor *x, double p);

/* ---- at indices */

/* t cut down to the shape of `like`, without its extent along dim: size n there, stride 0. */
ds_tensor ds_flat_along(const ds_tensor *t, const ds_tensor *like, int dim, int64_t n);

int ds_check_gather(const ds_tensor *y, const ds_tensor *x, const ds_tensor *index, int dim);
int ds_check_index_select(const ds_tensor *y, const ds_tensor *x, const ds_tensor *index, int dim);
int ds_check_scatter(const char *name, const ds_tensor *y, const ds_tensor *index,
                     const ds_tensor *x, int dim);
int ds_check_index_add(const ds_tensor *y, const ds_tensor *index, const ds_tensor *x, int dim);
/* lines: the index with a last dimension of size 1 more, over which the classes go. */
int ds_check_one_hot(ds_tensor *lines, const ds_tensor *y, const ds_tensor *index);
int ds_check_mask(const char *name, const ds_tensor *mask);
int ds_check_masked_select(const ds_tensor *y, const ds_tensor *x, const ds_tensor *mask);
int ds_check_masked_scatter(const ds_tensor *y, const ds_tensor *mask, const ds_tensor *x);
int ds_check_embedding(const ds_tensor *y, const ds_tensor *w, const ds_tensor *index);
int ds_check_embedding_backward(const ds_tensor *dw, const ds_tensor *dy, const ds_tensor *index);
int ds_check_rotary(const ds_tensor *y, const ds_tensor *x);

/* ---- along dimensions, over ranks */

int ds_check_argmax(const char *name, const ds_tensor *y, const ds_tensor *x, int dim);
int ds_check_cumsum(const ds_tensor *y, const ds_tensor *x, int dim);
/* sort and topk, whose dimension was checked; a sort's values are as many as x has. */
int ds_check_ordered(const char *name, const ds_tensor *values, const ds_tensor *indices,
                     const ds_tensor *x, int dim);
/* The result, and one or two inputs. */
int ds_check_softmax(const char *name, int count, const ds_tensor *const *t, int dim);
int ds_check_reduce_ranks(const ds_tensor *y, int dtype, int n, int op, double scale);

/* What cross_entropy gives; loss: dloss on the way back. */
enum { DS_LOSS_PER_ROW, DS_LOSS_MEAN, DS_LOSS_SUM };
int ds_check_cross_entropy(const char *name, const ds_tensor *logits, const ds_tensor *target,
                           const ds_tensor *lse, const ds_tensor *loss, int reduction);
int ds_check_cross_entropy_backward(const ds_tensor *dlogits, const ds_tensor *dloss,
                                    const ds_tensor *logits, const ds_tensor *target,
                                    const ds_tensor *lse, int reduction);

/* ---- norms and optimizers; what may be NULL for the kernel may be so here */

int ds_check_norm(const ds_tensor *y, const ds_tensor *sum, const ds_tensor *mean,
                  const ds_tensor *rstd, const ds_tensor *x, const ds_tensor *delta,
                  const ds_tensor *w, const ds_tensor *b);
int ds_check_norm_backward(const ds_tensor *dx, const ds_tensor *dw, const ds_tensor *db,
                           const ds_tensor *dy, const ds_tensor *x, const ds_tensor *w,
                           const ds_tensor *mean, const ds_tensor *rstd, const ds_tensor *dsum);
/* Weights, their state, a copy in low precision, gradients, and numbers that lie beside them. */
int ds_check_optimizer(const char *name, const ds_tensor *p, const ds_tensor *a, const ds_tensor *b,
                       const ds_tensor *low, const ds_tensor *g, const ds_tensor *factor,
                       const ds_tensor *rates);
int ds_check_square_sum(const ds_tensor *y, const ds_tensor *x);
int ds_check_clip_factor(const ds_tensor *factor, const ds_tensor *norm, const ds_tensor *squares);

/* ---- attention: q [B, T, H, D], k and v [B, S, G, D] with H a multiple of G, the last dimension dense;
 * `what` begins messages */

typedef struct ds_attention_sizes {
    int64_t B, T, S, H, G, D;
} ds_attention_sizes;

/* That x is a tensor like `like`: 4-d, of its dtype and shape, the last dimension dense. */
int ds_check_attention_like(const char *what, const ds_tensor *x, const char *name,
                            const ds_tensor *like);
/* The sizes, and that all but the mask fit. Heads are at most `widest` on `device`, a message's end. */
int ds_check_attention(ds_attention_sizes *z, const char *what, const ds_tensor *q,
                       const ds_tensor *k, const ds_tensor *v, const ds_tensor *lse, double p,
                       int widest, const char *device);
/* Strides of a mask over B, H, T, S: 0 where it is the same for all. Untouched where there is none. */
int ds_check_attention_mask(int64_t stride[4], const char *what, const ds_tensor *mask,
                            const ds_attention_sizes *z);

#endif
