/* walk.h - one loop over up to four tensors of different strides and storage dtypes.
 *
 * A walk visits the elements of the output, t[0], in row-major order of its memory; the other tensors
 * broadcast to its shape. Dimensions that lie in memory like one are merged. The loop body is an
 * ordinary function over dense rows: operand k of n elements lies at p[k], as f32 for f32, bf16 and
 * f16, and in its own type otherwise (bool as u8). Where memory looks like that, p[k] points into the
 * tensor; otherwise at a buffer in the L1 cache, filled before and, for the output, stored after.
 * So an operation is written once, and dense, broadcast, scalar and transposed operands all run as
 * vector code. Bodies may be called with p[0] equal to another p[k], never partly overlapping.
 */
#ifndef DS_CPU_WALK_H
#define DS_CPU_WALK_H

#include "kernels/cpu/simd.h"

#define WALK_MAX 4     /* operands */
#define WALK_CHUNK 512 /* elements in a buffer */

/* A storage dtype for bodies that only move bits: 16 bits as they are. The other raw ones are
 * DS_U8, DS_I32 and DS_I64. */
#define WALK_RAW16 DS_DTYPES

typedef void walk_body(int64_t n, void *const *p, const double *scalars);

typedef struct walk {
    const char *name; /* of the operation, for messages */
    int count, ndim;
    int64_t numel, shape[DS_MAX_DIM];
    struct walk_operand {
        char *data;
        int dtype;
        int linear;                 /* its elements follow each other through the whole walk */
        int64_t size;               /* bytes of an element */
        int64_t stride[DS_MAX_DIM]; /* in elements; 0 where it is broadcast */
    } op[WALK_MAX];
} walk;

/* DS_EINVAL where a shape does not broadcast to that of t[0]. */
int DS_CPU(walk_start)(walk *w, const char *name, int count, const ds_tensor *const *t);
/* cost: how much more than a plain arithmetic instruction an element takes. */
void DS_CPU(walk_run)(const walk *w, walk_body *body, const double *scalars, int cost);

/* Sets a walk's operand k to read bits of another dtype of the same size. */
static inline void walk_raw(walk *w, int k)
{
    static const int raw[] = {[1] = DS_U8, [2] = WALK_RAW16, [4] = DS_I32, [8] = DS_I64};

    w->op[k].dtype = raw[ds_bytes_of(w->op[k].dtype)];
}

/* "[2 x 3]", for messages. */
const char *DS_CPU(shape_text)(char text[128], const ds_tensor *t);

#endif
