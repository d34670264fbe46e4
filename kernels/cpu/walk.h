/* walk.h - one loop over up to four tensors of different strides and storage dtypes.
 *
 * A walk visits the elements of the output, t[0], in row-major order of its memory; the other
 * tensors broadcast to its shape. Dimensions that lie in memory like one are merged. The loop body
 * is an ordinary function over dense rows: operand k of n elements lies at p[k], as f32 for f32,
 * bf16 and f16, and in its own type otherwise (bool as u8). Where memory looks like that, p[k]
 * points into the tensor; otherwise at a buffer in the L1 cache, filled before and, for the output,
 * stored after. So an operation is written once, and dense, broadcast, scalar and transposed
 * operands all run as vector code. Bodies may be called with p[0] equal to another p[k], never
 * partly overlapping.
 */
#ifndef DS_CPU_WALK_H
#define DS_CPU_WALK_H

#include "kernels/cpu/simd.h"

#define WALK_MAX 4     /* operands */
#define WALK_CHUNK 512 /* elements in a buffer */

/* A storage dtype for bodies that only move bits: 16 bits as they are. The other raw ones are
 * DS_U8, DS_I32 and DS_I64. */
#define WALK_RAW16 DS_DTYPES

/* `ones`: bit k is set where operand k is the same for all n and lies at p[k] once; 0 unless the
 * walk allows it. */
typedef void walk_body(int64_t n, void *const *p, const double *scalars, unsigned ones);

typedef struct walk {
    const char *name; /* of the operation, for messages */
    int count, ndim;
    int ones; /* set after walk_start(): the body knows what to do with `ones` */
    int64_t numel, shape[DS_MAX_DIM];
    struct walk_operand {
        char *data;
        int dtype;
        int linear;                 /* its elements follow each other through the whole walk */
        int64_t size;               /* bytes of an element */
        int64_t stride[DS_MAX_DIM]; /* in elements; 0 where it is broadcast */
    } op[WALK_MAX];
} walk;

/* How a walk goes: in the order of the output's memory, or of the shape (for outputs whose place is
 * counted). */
enum walk_order { WALK_ANY, WALK_ROW_MAJOR };

/* DS_EINVAL where a shape does not broadcast to that of t[0]. */
int DS_CPU(walk_start)(walk *w, const char *name, int count, const ds_tensor *const *t,
                       enum walk_order order);
/* scalars: two, or NULL; cost: how much more than a plain arithmetic instruction an element takes. */
void DS_CPU(walk_run)(const walk *w, walk_body *body, const double *scalars, int cost);

/* Sets a walk's operand k to read bits of another dtype of the same size. */
static inline void walk_raw(walk *w, int k)
{
    static const int raw[] = {[1] = DS_U8, [2] = WALK_RAW16, [4] = DS_I32, [8] = DS_I64};

    w->op[k].dtype = raw[ds_bytes_of(w->op[k].dtype)];
}

/* ---- for kernels that loop themselves: a place in a walk */

typedef struct cursor {
    int64_t index[DS_MAX_DIM];
    int64_t offset[WALK_MAX]; /* elements from each operand's first */
} cursor;

static inline void cursor_start(cursor *c, const walk *w, int64_t element)
{
    for (int i = w->ndim - 1; i >= 0; i--) {
        c->index[i] = element % w->shape[i];
        element /= w->shape[i];
    }
    for (int k = 0; k < w->count && k < WALK_MAX; k++) {
        c->offset[k] = 0;
        for (int i = 0; i < w->ndim; i++)
            c->offset[k] += c->index[i] * w->op[k].stride[i];
    }
}

/* Elements left in this row. */
static inline int64_t cursor_rest(const cursor *c, const walk *w)
{
    return w->shape[w->ndim - 1] - c->index[w->ndim - 1];
}

/* Goes on by n elements, over the ends of rows if need be. */
static inline void cursor_advance(cursor *c, const walk *w, int64_t n)
{
    int d = w->ndim - 1;

    c->index[d] += n;
    for (int k = 0; k < w->count; k++)
        c->offset[k] += n * w->op[k].stride[d];
    for (; d > 0 && c->index[d] >= w->shape[d]; d--) {
        int64_t carry = c->index[d] == w->shape[d] ? 1 : c->index[d] / w->shape[d];

        c->index[d] -= carry * w->shape[d];
        c->index[d - 1] += carry;
        for (int k = 0; k < w->count; k++)
            c->offset[k] += carry * (w->op[k].stride[d - 1] - w->shape[d] * w->op[k].stride[d]);
    }
}

/* The memory of operand k there. */
static inline char *cursor_at(const cursor *c, const walk *w, int k)
{
    return w->op[k].data + c->offset[k] * w->op[k].size;
}

/* Copies n elements of `size` bytes; strides in elements, a `from` of 0 repeats the first. */
void DS_CPU(row_move)(void *dst, int64_t to, const void *src, int64_t from, int64_t size,
                      int64_t n);

/* A number as a tensor that broadcasts. exact: in `dtype`; otherwise in f32 for low precision, not
 * rounded to that. DS_EINVAL where an integer dtype has no such value. */
typedef struct number {
    ds_tensor t;
    double value; /* storage of any dtype */
} number;
int DS_CPU(number_start)(number *s, const char *name, double value, int dtype, int exact);
#endif
