/* reduce.c - sum, mean, max, min, prod, all, any over any set of dimensions; sum_squares.
 *
 * Every reduction is made of one step, "combine a row of x into a row of accumulators", which is
 * vector code. Where the dimension that lies densest in memory is kept, the accumulators are a
 * block of outputs (columns); where it is reduced, rows are folded to one number, by vectors
 * (fold.h) or by 128 lanes. Both are f32 for at most a few thousand elements and then go into f64,
 * so sums of any length keep f32's accuracy. Few outputs of many elements are cut into pieces by
 * shape, not by thread: the result does not depend on the number of threads.
 */
#include "kernels/cpu/fold.h"
#include "kernels/cpu/walk.h"

#include <math.h>
#include <stdlib.h>

#define LANES 128
#define COLUMNS 1024  /* outputs in one block */
#define BLOCK_ROWS 32 /* rows of columns that are summed in f32 */
#define BLOCK 4096    /* elements of a row that are summed in f32 */
#define PIECE 16384   /* elements that are worth a piece of their own */
#define PIECES 64     /* blocks times pieces, about */

/* ---- the steps: a[i] = a[i] ∘ x[i] */

typedef void combine_fn(void *a, const void *x, int64_t n);

/* What a reduction computes in: a row's type, and that of the states which rows go into. */
typedef struct kind {
    int64_t size; /* of a row's element; a state has 8 bytes */
    void (*load)(void *row, const void *x, int dtype, int64_t n, int64_t stride);
    void (*store)(void *y, const void *states, int dtype, int64_t n, int64_t stride);
    int dtype; /* what rows can be read in place */
} kind;

static void load_f32(void *row, const void *x, int dtype, int64_t n, int64_t stride)
{
    ds_row_load(row, x, dtype, n, stride);
}

static void load_f64(void *row, const void *x, int dtype, int64_t n, int64_t stride)
{
    ds_row_load_f64(row, x, dtype, n, stride);
}

static void load_i64(void *row, const void *x, int dtype, int64_t n, int64_t stride)
{
    ds_row_load_i64(row, x, dtype, n, stride);
}

static void store_f64(void *y, const void *states, int dtype, int64_t n, int64_t stride)
{
    ds_row_store_f64(y, states, dtype, n, stride);
}

static void store_i64(void *y, const void *states, int dtype, int64_t n, int64_t stride)
{
    ds_row_store_i64(y, states, dtype, n, stride);
}

static const kind f32_kind = {4, load_f32, store_f64, DS_F32};
static const kind f64_kind = {8, load_f64, store_f64, DS_F64};
static const kind i64_kind = {8, load_i64, store_i64, DS_I64};

#define COMBINE(name, A, X, expression)                                                            \
    static void name(void *restrict to, const void *restrict from, int64_t n)                      \
    {                                                                                              \
        A *y = to;                                                                                 \
        const X *x = from;                                                                         \
                                                                                                   \
        for (int64_t i = 0; i < n; i++) {                                                          \
            A a = y[i], b = (A)x[i];                                                               \
                                                                                                   \
            y[i] = expression;                                                                     \
        }                                                                                          \
    }

/* NaN in either gives NaN. */
#define MAX ((a > b) | (a != a)) ? a : b
#define MIN ((a < b) | (a != a)) ? a : b

COMBINE(sum_f32, float, float, a + b)
COMBINE(sum_wide, double, float, a + b)
COMBINE(sum_f64, double, double, a + b)
COMBINE(sum_i64, uint64_t, uint64_t, a + b)
COMBINE(prod_f64, double, double, a *b)
COMBINE(prod_i64, uint64_t, uint64_t, a *b)
COMBINE(max_f32, float, float, MAX)
COMBINE(max_wide, double, float, MAX)
COMBINE(max_f64, double, double, MAX)
COMBINE(max_i64, int64_t, int64_t, a > b ? a : b)
COMBINE(min_f32, float, float, MIN)
COMBINE(min_wide, double, float, MIN)
COMBINE(min_f64, double, double, MIN)
COMBINE(min_i64, int64_t, int64_t, a < b ? a : b)
COMBINE(all_i64, int64_t, int64_t, a &b)
COMBINE(any_i64, int64_t, int64_t, a | b)

/* Four rows at once, `step` elements apart and added in pairs: the accumulators are read and
 * written a quarter as often. */
VF_FUNC void sum_four_typed(float *sum, const void *x, int64_t step, int64_t n, int dtype)
{
    int64_t i = 0, b = step, c = 2 * step, d = 3 * step;

    for (; i + VF_LANES <= n; i += VF_LANES)
        vf_store(sum + i,
                 vf_load(sum + i) + ((vf_load_as(x, i, dtype) + vf_load_as(x, b + i, dtype)) +
                                     (vf_load_as(x, c + i, dtype) + vf_load_as(x, d + i, dtype))));
    if (i < n) {
        int64_t m = n - i;

        vf_store_part(
            sum + i,
            vf_load_part(sum + i, m) +
                ((vf_load_part_as(x, i, dtype, m) + vf_load_part_as(x, b + i, dtype, m)) +
                 (vf_load_part_as(x, c + i, dtype, m) + vf_load_part_as(x, d + i, dtype, m))),
            m);
    }
}

static void sum_four(float *sum, const void *x, int64_t step, int64_t n, int dtype)
{
    if (dtype == DS_F32)
        sum_four_typed(sum, x, step, n, DS_F32);
    else if (dtype == DS_BF16)
        sum_four_typed(sum, x, step, n, DS_BF16);
    else
        sum_four_typed(sum, x, step, n, DS_F16);
}

typedef struct reducer {
    const char *name;
    const kind *real, *integer;      /* NULL: not for these */
    combine_fn *row, *wide, *states; /* real: rows, a row into states, states */
    combine_fn *integers;
    double empty;  /* of no elements; NaN: there is no such value */
    fold_fn *fold; /* rows of f32_kind to one number */
} reducer;

static const reducer sum_reducer = {"sum",   &f32_kind, &i64_kind, sum_f32, sum_wide,
                                    sum_f64, sum_i64,   0,         fold_sum};
static const reducer mean_reducer = {"mean",  &f32_kind, NULL, sum_f32, sum_wide,
                                     sum_f64, NULL,      0,    fold_sum};
static const reducer max_reducer = {"max",   &f32_kind, &i64_kind, max_f32, max_wide,
                                    max_f64, max_i64,   NAN,       fold_max};
static const reducer min_reducer = {"min",   &f32_kind, &i64_kind, min_f32, min_wide,
                                    min_f64, min_i64,   NAN,       fold_min};
static const reducer prod_reducer = {"prod",   &f64_kind, &i64_kind, prod_f64, prod_f64,
                                     prod_f64, prod_i64,  1,         NULL};
static const reducer all_reducer = {"all", NULL, &i64_kind, NULL, NULL, NULL, all_i64, 1, NULL};
static const reducer any_reducer = {"any", NULL, &i64_kind, NULL, NULL, NULL, any_i64, 0, NULL};

/* ---- the plan */

typedef struct plan {
    const kind *kind;
    combine_fn *row, *wide, *states;
    fold_fn *fold;   /* NULL: by p->row */
    walk kept;       /* x and y over the dimensions that stay */
    walk rest;       /* x over those that go */
    int columns;     /* the densest dimension of x stays: outputs in blocks along it */
    int64_t outputs; /* kept.numel */
    int64_t count;   /* rest.numel */
    int64_t inner;   /* outputs along that dimension, 1 if not columns */
    int64_t width;   /* outputs of a block, but for the last along inner */
    int64_t blocks, pieces;
    int accumulate;
    double scale;
} plan;

typedef union state {
    double real;
    int64_t integer;
} state;

/* Moves the dimensions of `all` (x, y) that are reduced, or that are not, to `part`. */
static void take_dims(walk *part, const walk *all, int reduced)
{
    *part = *all;
    part->ndim = 0;
    part->numel = 1;
    for (int i = 0; i < all->ndim; i++) {
        if ((all->op[1].stride[i] == 0) != reduced)
            continue;
        part->shape[part->ndim] = all->shape[i];
        part->op[0].stride[part->ndim] = all->op[0].stride[i];
        part->op[1].stride[part->ndim] = all->op[1].stride[i];
        part->numel *= all->shape[i];
        part->ndim++;
    }
    if (part->ndim == 0) {
        part->ndim = 1;
        part->shape[0] = 1;
        part->op[0].stride[0] = part->op[1].stride[0] = 0;
    }
}

static int plan_start(plan *p, const reducer *r, const ds_tensor *y, const ds_tensor *x)
{
    int real = ds_is_float(x->dtype), wide = x->dtype == DS_F64, rc;
    int64_t parts;
    walk all;

    if (!(real ? r->real : r->integer))
        return ds_fail(DS_EINVAL, "%s: not for %s%s", r->name, ds_name_of(x->dtype),
                       r->real && !real ? "; use :float() first" : "");
    if (real != ds_is_float(y->dtype) || y->ndim != x->ndim)
        return ds_fail(DS_EINVAL, "%s: %s of %d dimensions cannot hold the result from %s of %d",
                       r->name, ds_name_of(y->dtype), y->ndim, ds_name_of(x->dtype), x->ndim);
    rc = DS_CPU(walk_start)(&all, r->name, 2, (const ds_tensor *[]){x, y}, WALK_ANY);
    if (rc < 0)
        return rc;
    p->kind = !real ? r->integer : wide ? &f64_kind : r->real;
    p->row = !real ? r->integers : wide ? r->states : r->row;
    p->wide = !real ? r->integers : wide ? r->states : r->wide;
    p->states = !real ? r->integers : r->states;
    p->fold = p->kind == &f32_kind ? r->fold : NULL;
    take_dims(&p->kept, &all, 0);
    take_dims(&p->rest, &all, 1);
    p->columns = all.op[1].stride[all.ndim - 1] != 0;
    p->outputs = p->kept.numel;
    p->count = p->rest.numel;
    p->inner = p->columns ? p->kept.shape[p->kept.ndim - 1] : 1;
    parts = (p->inner + COLUMNS - 1) / COLUMNS;
    if (p->outputs == 0)
        return 0;
    p->width = (p->inner + parts - 1) / parts;
    p->blocks = p->outputs / p->inner * parts;
    p->pieces = p->count * p->width / PIECE;
    p->pieces = p->pieces < PIECES / p->blocks ? p->pieces : PIECES / p->blocks;
    p->pieces = p->pieces < 1 ? 1 : p->pieces;
    return 0;
}

/* ---- running it */

/* Up to BLOCK elements of the reduced ones, where they lie or in the buffer; *dtype: as what. */
static const void *fetch(const plan *p, const char *x, cursor *c, char *buffer, int64_t *n,
                         int *dtype)
{
    const struct walk_operand *op = &p->rest.op[0];
    int64_t stride = op->stride[p->rest.ndim - 1], rest = cursor_rest(c, &p->rest), filled = 0;

    if ((op->dtype == p->kind->dtype || p->fold) && stride == 1 &&
        (rest >= LANES || p->rest.ndim == 1)) {
        *dtype = op->dtype;
        *n = *n < rest ? *n : rest;
        *n = *n < BLOCK ? *n : BLOCK;
        x += c->offset[0] * op->size;
        cursor_advance(c, &p->rest, *n);
        return x;
    }
    *dtype = p->kind->dtype;
    *n = *n < COLUMNS ? *n : COLUMNS;
    while (filled < *n) {
        int64_t run = *n - filled < rest ? *n - filled : rest;

        p->kind->load(buffer + filled * p->kind->size, x + c->offset[0] * op->size, op->dtype, run,
                      stride);
        filled += run;
        cursor_advance(c, &p->rest, run);
        rest = cursor_rest(c, &p->rest);
    }
    return buffer;
}

/* A row of n ≥ 1 elements to one: into the state, or as its first. */
static void reduce_row(const plan *p, state *s, const char *row, int64_t n, int dtype, int first)
{
    int64_t size = p->kind->size, lanes = n < LANES ? n : LANES;
    char lane[LANES * 8];

    if (p->fold) {
        float one = p->fold(row, n, dtype);

        if (first)
            s->real = (double)one;
        else
            p->wide(s, &one, 1);
        return;
    }
    memcpy(lane, row, (size_t)(lanes * size));
    for (int64_t i = lanes; i < n; i += LANES)
        p->row(lane, row + i * size, n - i < LANES ? n - i : LANES);
    while (lanes > 1) {
        int64_t half = (lanes + 1) / 2;

        p->row(lane, lane + half * size, lanes - half);
        lanes = half;
    }
    if (first)
        memcpy(s, lane, sizeof *s); /* without fold, rows are as wide as states */
    else
        p->wide(s, lane, 1);
}

/* The elements [from, to) of one output. */
static void reduce_one(const plan *p, const char *x, int64_t from, int64_t to, state *s)
{
    _Alignas(64) char buffer[COLUMNS * 8];
    cursor c;

    cursor_start(&c, &p->rest, from);
    for (int64_t at = from, n; at < to; at += n) {
        const char *row;
        int dtype;

        n = to - at;
        row = fetch(p, x, &c, buffer, &n, &dtype);
        reduce_row(p, s, row, n, dtype, at == from);
    }
}

/* The same for `width` outputs side by side, `step` elements apart in x. */
static void reduce_columns(const plan *p, const char *x, int64_t step, int64_t width, int64_t from,
                           int64_t to, state *s)
{
    _Alignas(64) char sum[COLUMNS * 8], buffer[COLUMNS * 8];
    const struct walk_operand *op = &p->rest.op[0];
    int direct = op->dtype == p->kind->dtype && step == 1, four = step == 1 && p->row == sum_f32;
    int rows = 0;
    cursor c;

    cursor_start(&c, &p->rest, from);
    for (int64_t at = from, n; at < to; at += n) {
        const char *row = x + c.offset[0] * op->size;

        n = 1;
        if (four && rows % 4 == 0 && to - at >= 4 && cursor_rest(&c, &p->rest) >= 4) {
            n = 4;
            if (rows == 0)
                memset(sum, 0, (size_t)width * sizeof(float));
            sum_four((float *)(void *)sum, row, op->stride[p->rest.ndim - 1], width, op->dtype);
        } else if (rows == 0) {
            p->kind->load(sum, row, op->dtype, width, step);
        } else {
            if (!direct)
                p->kind->load(buffer, row, op->dtype, width, step);
            p->row(sum, direct ? row : buffer, width);
        }
        cursor_advance(&c, &p->rest, n);
        rows += (int)n;
        if (rows < BLOCK_ROWS && at + n < to)
            continue;
        rows = 0;
        if (at + n - from > BLOCK_ROWS)
            p->wide(s, sum, width);
        else if (p->kind->size == 8)
            memcpy(s, sum, (size_t)width * sizeof *s);
        else
            for (int64_t i = 0; i < width; i++)
                s[i].real = (double)((float *)(void *)sum)[i];
    }
}

/* States to outputs, n of them `stride` apart in y. */
static void finish(const plan *p, char *y, int64_t stride, state *s, int64_t n)
{
    int dtype = p->kept.op[1].dtype;
    state old[COLUMNS];

    for (int64_t i = 0; i < n && p->scale != 1; i++)
        s[i].real *= p->scale;
    if (p->accumulate) {
        p->kind->store == store_i64 ? load_i64(old, y, dtype, n, stride)
                                    : load_f64(old, y, dtype, n, stride);
        p->kind->store == store_i64 ? sum_i64(s, old, n) : sum_f64(s, old, n);
    }
    p->kind->store(y, s, dtype, n, stride);
}

/* One piece of one block of outputs: to y, or (pieces > 1) to partial states. */
static void run_task(const plan *p, int64_t block, int64_t piece, state *partial)
{
    int last = p->kept.ndim - 1;
    int64_t parts = (p->inner + COLUMNS - 1) / COLUMNS, column = block % parts * p->width;
    int64_t first = block / parts * p->inner + column;
    int64_t width = p->width < p->inner - column ? p->width : p->inner - column;
    int64_t from = p->count * piece / p->pieces, to = p->count * (piece + 1) / p->pieces;
    state own[COLUMNS], *s = p->pieces > 1 ? partial + piece * p->outputs + first : own;
    cursor c;

    cursor_start(&c, &p->kept, first);
    if (p->columns)
        reduce_columns(p, cursor_at(&c, &p->kept, 0), p->kept.op[0].stride[last], width, from, to,
                       s);
    else
        reduce_one(p, cursor_at(&c, &p->kept, 0), from, to, s);
    if (p->pieces == 1)
        finish(p, cursor_at(&c, &p->kept, 1), p->columns ? p->kept.op[1].stride[last] : 1, s,
               width);
}

/* Outputs [begin, end) of rows in one piece, a run of them at a time. */
static void run_rows(const plan *p, int64_t begin, int64_t end)
{
    int last = p->kept.ndim - 1;
    int64_t step = p->kept.op[0].stride[last] * p->kept.op[0].size, n;
    int at_once = p->fold && p->rest.ndim == 1 && p->rest.op[0].stride[0] == 1 && p->count <= BLOCK;
    state s[64];
    cursor c;

    cursor_start(&c, &p->kept, begin);
    for (; begin < end; begin += n) {
        const char *x = cursor_at(&c, &p->kept, 0);

        n = cursor_rest(&c, &p->kept) < end - begin ? cursor_rest(&c, &p->kept) : end - begin;
        n = n < 64 ? n : 64;
        for (int64_t i = 0; i < n; i++, x += step)
            if (at_once)
                s[i].real = (double)p->fold(x, p->count, p->rest.op[0].dtype);
            else
                reduce_one(p, x, 0, p->count, &s[i]);
        finish(p, cursor_at(&c, &p->kept, 1), p->kept.op[1].stride[last], s, n);
        cursor_advance(&c, &p->kept, n);
    }
}

/* Combines the pieces of each output, in order. */
static void join_pieces(const plan *p, state *partial)
{
    cursor c;

    for (int64_t i = 1; i < p->pieces; i++)
        p->states(partial, partial + i * p->outputs, p->outputs);
    cursor_start(&c, &p->kept, 0);
    for (int64_t i = 0; i < p->outputs; i++) {
        finish(p, cursor_at(&c, &p->kept, 1), 1, partial + i, 1);
        cursor_advance(&c, &p->kept, 1);
    }
}

static int reduce(const reducer *r, ds_tensor *y, const ds_tensor *x, int accumulate, double scale)
{
    plan p = {.accumulate = accumulate, .scale = scale};
    state *partial = NULL;
    int rc = plan_start(&p, r, y, x), threads = ds_threads(x->numel);

    if (rc < 0 || y->numel == 0)
        return rc;
    if (x->numel == 0 && r->empty != r->empty)
        return ds_fail(DS_EINVAL, "%s: no elements", r->name);
    if (x->numel == 0)
        return accumulate ? 0 : DS_CPU(fill)(y, scale == 1 ? r->empty : NAN);
    if (p.pieces > 1) {
        partial = malloc((size_t)(p.pieces * p.outputs) * sizeof *partial);
        if (!partial)
            return ds_fail(DS_ENOMEM, "%s: out of memory", r->name);
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;

        ds_part(&begin, &end, p.blocks * p.pieces, 1);
        if (!p.columns && p.pieces == 1)
            run_rows(&p, begin, end);
        else
            for (int64_t i = begin; i < end; i++)
                run_task(&p, i / p.pieces, i % p.pieces, partial);
    }
    if (p.pieces > 1)
        join_pieces(&p, partial);
    free(partial);
    return 0;
}

int DS_CPU(sum)(ds_tensor *y, const ds_tensor *x, int accumulate)
{
    return reduce(&sum_reducer, y, x, accumulate, 1);
}

int DS_CPU(mean)(ds_tensor *y, const ds_tensor *x)
{
    return reduce(&mean_reducer, y, x, 0, (double)y->numel / (double)x->numel);
}

int DS_CPU(max)(ds_tensor *y, const ds_tensor *x)
{
    return reduce(&max_reducer, y, x, 0, 1);
}

int DS_CPU(min)(ds_tensor *y, const ds_tensor *x)
{
    return reduce(&min_reducer, y, x, 0, 1);
}

int DS_CPU(prod)(ds_tensor *y, const ds_tensor *x)
{
    return reduce(&prod_reducer, y, x, 0, 1);
}

int DS_CPU(all)(ds_tensor *y, const ds_tensor *x)
{
    if (x->dtype != DS_BOOL)
        return ds_fail(DS_EINVAL, "all: not for %s, only for bool", ds_name_of(x->dtype));
    return reduce(&all_reducer, y, x, 0, 1);
}

int DS_CPU(any)(ds_tensor *y, const ds_tensor *x)
{
    if (x->dtype != DS_BOOL)
        return ds_fail(DS_EINVAL, "any: not for %s, only for bool", ds_name_of(x->dtype));
    return reduce(&any_reducer, y, x, 0, 1);
}

/* ---- sum of squares: blocks of fixed length, so that any division of a long vector into ranges of
 * whole blocks gives the same sum */

#define SQUARES 65536

static double squares_f32(const walk *w, int64_t begin, int64_t end)
{
    float buffer[COLUMNS];
    int last = w->ndim - 1, dtype = w->op[0].dtype, direct = w->op[0].stride[last] == 1;
    double sum = 0;
    cursor c;

    cursor_start(&c, w, begin);
    for (int64_t at = begin, n; at < end; at += n) {
        n = cursor_rest(&c, w) < end - at ? cursor_rest(&c, w) : end - at;
        if (direct) {
            n = n < BLOCK ? n : BLOCK;
            sum += (double)fold_squares(cursor_at(&c, w, 0), n, dtype);
        } else {
            n = n < COLUMNS ? n : COLUMNS;
            ds_row_load(buffer, cursor_at(&c, w, 0), dtype, n, w->op[0].stride[last]);
            sum += (double)fold_squares(buffer, n, DS_F32);
        }
        cursor_advance(&c, w, n);
    }
    return sum;
}

static double squares_f64(const walk *w, int64_t begin, int64_t end)
{
    double sum = 0, x;
    cursor c;

    cursor_start(&c, w, begin);
    for (; begin < end; begin++) {
        x = *(const double *)(const void *)cursor_at(&c, w, 0);
        sum += x * x;
        cursor_advance(&c, w, 1);
    }
    return sum;
}

int DS_CPU(sum_squares)(double *sum, const ds_tensor *x)
{
    int64_t blocks = (x->numel + SQUARES - 1) / SQUARES;
    int threads = ds_threads(x->numel);
    double *partial;
    walk w;
    int rc;

    if (!ds_is_float(x->dtype))
        return ds_fail(DS_EINVAL, "sum_squares: not for %s", ds_name_of(x->dtype));
    rc = DS_CPU(walk_start)(&w, "sum_squares", 1, &x, WALK_ROW_MAJOR);
    if (rc < 0)
        return rc;
    partial = malloc((size_t)(blocks + 1) * sizeof *partial);
    if (!partial)
        return ds_fail(DS_ENOMEM, "sum_squares: out of memory");
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < blocks; b++) {
        int64_t end = (b + 1) * SQUARES < x->numel ? (b + 1) * SQUARES : x->numel;

        partial[b] = (x->dtype == DS_F64 ? squares_f64 : squares_f32)(&w, b * SQUARES, end);
    }
    *sum = 0;
    for (int64_t b = 0; b < blocks; b++)
        *sum += partial[b];
    free(partial);
    return 0;
}
