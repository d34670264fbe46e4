/* walk.c - loops over several strided tensors by dense rows; walk.h says how. */
#include "kernels/cpu/walk.h"

#include <stdlib.h>

#define LONG_ROW                                                                                   \
    128 /* rows from this length on are visited one by one, shorter ones are collected */
#define SHORT_ROW 16 /* the same where no operand crosses the rows */

/* bf16 and f16 go through buffers in pieces of this length. In longer ones loading and storing
 * would take turns, and the memory would wait: a vast tensor takes 1.33 ms then, 2.24 in pieces of
 * 512. */
#define HALVES_CHUNK 128

/* ---- making a walk */

/* Bodies work on the storage itself. */
static int is_direct(int dtype)
{
    return dtype != DS_BF16 && dtype != DS_F16;
}

static void swap_dims(walk *w, int i, int j)
{
    int64_t t = w->shape[i];

    w->shape[i] = w->shape[j];
    w->shape[j] = t;
    for (int k = 0; k < w->count; k++) {
        t = w->op[k].stride[i];
        w->op[k].stride[i] = w->op[k].stride[j];
        w->op[k].stride[j] = t;
    }
}

/* Follows the output's memory, if any order will do; dimensions of size 1 go, those that continue
 * each other merge. */
static void simplify(walk *w, enum walk_order order)
{
    int n = 0;

    for (int i = 1; i < w->ndim && order == WALK_ANY; i++)
        for (int j = i; j > 0 && w->op[0].stride[j - 1] < w->op[0].stride[j]; j--)
            swap_dims(w, j - 1, j);
    for (int i = 0; i < w->ndim; i++) {
        int merge = n > 0;

        if (w->shape[i] == 1)
            continue;
        for (int k = 0; k < w->count && merge; k++)
            merge = w->op[k].stride[n - 1] == w->op[k].stride[i] * w->shape[i];
        if (merge) {
            w->shape[n - 1] *= w->shape[i];
            for (int k = 0; k < w->count; k++)
                w->op[k].stride[n - 1] = w->op[k].stride[i];
            continue;
        }
        w->shape[n] = w->shape[i];
        for (int k = 0; k < w->count; k++)
            w->op[k].stride[n] = w->op[k].stride[i];
        n++;
    }
    if (n == 0) {
        w->shape[0] = 1;
        for (int k = 0; k < w->count; k++)
            w->op[k].stride[0] = 0;
        n = 1;
    }
    w->ndim = n;
}

int DS_CPU(walk_start)(walk *w, const char *name, int count, const ds_tensor *const *t,
                       enum walk_order order)
{
    const ds_tensor *y = t[0];
    char want[128], have[128];

    w->name = name;
    w->count = count;
    w->ones = 0;
    w->ndim = y->ndim;
    w->numel = y->numel;
    memcpy(w->shape, y->shape, sizeof w->shape);
    for (int k = 0; k < count; k++) {
        int lead = y->ndim - t[k]->ndim;

        w->op[k].data = t[k]->data;
        w->op[k].dtype = t[k]->dtype;
        w->op[k].size = ds_bytes_of(t[k]->dtype);
        for (int i = 0; i < y->ndim; i++) {
            int64_t size = i < lead ? 1 : t[k]->shape[i - lead];

            if (lead < 0 || (size != y->shape[i] && size != 1))
                return ds_fail(DS_EINVAL, "%s: %s does not broadcast to %s", name,
                               ds_shape_text(have, t[k]), ds_shape_text(want, y));
            w->op[k].stride[i] = size == 1 ? 0 : t[k]->stride[i - lead];
        }
        if (lead < 0)
            return ds_fail(DS_EINVAL, "%s: %s does not broadcast to %s", name,
                           ds_shape_text(have, t[k]), ds_shape_text(want, y));
    }
    simplify(w, order);
    for (int k = 0; k < count; k++) {
        int64_t expected = 1;

        w->op[k].linear = 1;
        for (int i = w->ndim - 1; i >= 0; i--) {
            w->op[k].linear &= w->op[k].stride[i] == expected || w->shape[i] == 1;
            expected *= w->shape[i];
        }
    }
    return 0;
}

int DS_CPU(number_start)(number *s, const char *name, double value, int dtype, int exact)
{
    DS_TRY(ds_check_number(name, value, dtype));
    memset(s, 0, sizeof *s);
    s->t.dtype = !exact && (dtype == DS_BF16 || dtype == DS_F16) ? DS_F32 : dtype;
    s->t.data = &s->value;
    s->t.numel = 1;
    s->t.dense = 1;
    ds_row_store_f64(&s->value, &value, s->t.dtype, 1, 1);
    return 0;
}

/* ---- moving rows between tensors and buffers */

#define MOVE(type)                                                                                 \
    {                                                                                              \
        const type *s = src;                                                                       \
        type *d = dst;                                                                             \
                                                                                                   \
        if (from == 0 && to == 1)                                                                  \
            for (int64_t i = 0; i < n; i++)                                                        \
                d[i] = s[0];                                                                       \
        else if (to == 1)                                                                          \
            for (int64_t i = 0; i < n; i++)                                                        \
                d[i] = s[i * from];                                                                \
        else                                                                                       \
            for (int64_t i = 0; i < n; i++)                                                        \
                d[i * to] = s[i * from];                                                           \
        return;                                                                                    \
    }

void DS_CPU(row_move)(void *restrict dst, int64_t to, const void *restrict src, int64_t from,
                      int64_t size, int64_t n)
{
    if (to == 1 && from == 1) {
        memcpy(dst, src, (size_t)(n * size));
        return;
    }
    switch (size) {
    case 1:
        MOVE(uint8_t)
    case 2:
        MOVE(uint16_t)
    case 4:
        MOVE(uint32_t)
    default:
        MOVE(uint64_t)
    }
}

/* Between memory of op's dtype and a dense buffer of what bodies work on. */
static void convert(const struct walk_operand *op, int out, void *buffer, char *memory,
                    int64_t stride, int64_t n)
{
    if (is_direct(op->dtype) && out)
        DS_CPU(row_move)(memory, stride, buffer, 1, op->size, n);
    else if (is_direct(op->dtype))
        DS_CPU(row_move)(buffer, 1, memory, stride, op->size, n);
    else if (out)
        ds_row_store(memory, buffer, op->dtype, n, stride);
    else
        ds_row_load(buffer, memory, op->dtype, n, stride);
}

/* The same for n elements from `index` on, over several rows. */
static void convert_rows(const walk *w, int k, void *buffer, const int64_t *index, int64_t n)
{
    const struct walk_operand *op = &w->op[k];
    int last = w->ndim - 1;
    int64_t at[DS_MAX_DIM], width = is_direct(op->dtype) ? op->size : 4, offset = 0;
    char *to = buffer;

    for (int i = 0; i <= last; i++) {
        at[i] = index[i];
        offset += at[i] * op->stride[i];
    }
    for (;;) {
        int64_t run = w->shape[last] - at[last] < n ? w->shape[last] - at[last] : n;
        int d = last;

        convert(op, k == 0, to, op->data + offset * op->size, op->stride[last], run);
        to += run * width;
        n -= run;
        if (n == 0)
            return;
        offset -= at[last] * op->stride[last];
        for (at[d--] = 0; ++at[d] == w->shape[d]; d--) {
            offset -= (w->shape[d] - 1) * op->stride[d];
            at[d] = 0;
        }
        offset += op->stride[d];
    }
}

/* ---- running */

typedef struct part {
    cursor at;
    char *filled[WALK_MAX]; /* the constant that a buffer is full of */
    int64_t limit;          /* elements in one go */
    int64_t row;            /* elements that follow each other in every operand */
    int by_rows;            /* one row is visited after the other */
} part;

typedef struct buffers {
    char data[WALK_MAX][WALK_CHUNK * 8];
} buffers;

static void part_start(part *p, const walk *w, int64_t begin)
{
    cursor_start(&p->at, w, begin);
    p->limit = INT64_MAX;
    p->row = w->shape[w->ndim - 1];
    p->by_rows = 0;
    for (int k = 0; k < w->count; k++) {
        const struct walk_operand *op = &w->op[k];

        p->filled[k] = NULL;
        p->by_rows |= !op->linear && w->ndim > 1;
        if (!is_direct(op->dtype) || op->stride[w->ndim - 1] != 1)
            p->limit = WALK_CHUNK;
    }
    if (p->by_rows && p->row < LONG_ROW) {
        p->limit = WALK_CHUNK;
        p->by_rows = 0;
    }
}

/* Where the body finds operand k; fills the buffer if there must be one. */
static void *operand(const walk *w, part *p, int k, char *buffer, int64_t n, int one_row)
{
    const struct walk_operand *op = &w->op[k];
    int64_t inner = op->stride[w->ndim - 1];
    char *memory = cursor_at(&p->at, w, k);
    int contiguous = op->linear || (one_row && inner == 1);

    if (contiguous && is_direct(op->dtype))
        return memory;
    if (k == 0)
        return buffer;
    if (contiguous) {
        ds_row_load((float *)(void *)buffer, memory, op->dtype, n, 1);
    } else if (one_row && inner == 0) {
        if (p->filled[k] != memory)
            convert(op, 0, buffer, memory, 0, p->limit < p->row ? p->limit : p->row);
        p->filled[k] = memory;
    } else if (one_row) {
        convert(op, 0, buffer, memory, inner, n);
    } else {
        convert_rows(w, k, buffer, p->at.index, n);
        p->filled[k] = NULL;
    }
    return buffer;
}

static void run_part(const walk *w, walk_body *body, const double *scalars, int64_t begin,
                     int64_t end)
{
    _Alignas(64) buffers buffer;
    void *at[WALK_MAX] = {NULL};
    int last = w->ndim - 1;
    int64_t n;
    part p;

    part_start(&p, w, begin);
    for (; begin < end; begin += n) {
        int64_t rest = cursor_rest(&p.at, w);
        int one_row;

        n = end - begin < p.limit ? end - begin : p.limit;
        if (p.by_rows)
            n = n < rest ? n : rest;
        one_row = n <= rest;
        for (int k = 0; k < w->count; k++)
            at[k] = operand(w, &p, k, buffer.data[k], n, one_row);
        body(n, at, scalars, 0);
        if (at[0] == (void *)buffer.data[0] && (w->op[0].linear || one_row))
            convert(&w->op[0], 1, at[0], cursor_at(&p.at, w, 0), w->op[0].stride[last], n);
        else if (at[0] == (void *)buffer.data[0])
            convert_rows(w, 0, at[0], p.at.index, n);
        cursor_advance(&p.at, w, n);
    }
}

/* Whether every operand lies along the rows or is constant there: the usual case, and worth a loop
 * without the care of run_part(). */
static int is_plain(const walk *w)
{
    int last = w->ndim - 1;

    for (int k = 0; k < w->count; k++)
        if (!(w->op[k].stride[last] == 1 || (k > 0 && w->op[k].stride[last] == 0)))
            return 0;
    return w->ndim == 1 || w->shape[last] >= SHORT_ROW;
}

/* How a plain walk brings an operand to the body. */
enum { MEMORY, CONSTANT, HALVES };

typedef struct feed {
    int kind, dtype;
    int64_t size, down; /* bytes: of an element, to the next row */
    char *row;          /* the current row */
    char *buffer;
} feed;

static void halves_load(float *buffer, const char *memory, int dtype, int64_t n)
{
    if (dtype == DS_BF16 && n == HALVES_CHUNK)
        for (int i = 0; i < HALVES_CHUNK; i += VF_LANES)
            vf_store(buffer + i, vf_load_bf16((const uint16_t *)(const void *)memory + i));
    else
        ds_row_load(buffer, memory, dtype, n, 1);
}

static void halves_store(char *memory, const float *buffer, int dtype, int64_t n)
{
    if (dtype == DS_BF16 && n == HALVES_CHUNK)
        for (int i = 0; i < HALVES_CHUNK; i += VF_LANES)
            vf_store_bf16((uint16_t *)(void *)memory + i, vf_load(buffer + i));
    else
        ds_row_store(memory, buffer, dtype, n, 1);
}

/* A constant: once in the buffer if the body takes it so, else as many times as a piece has
 * elements. */
static void constant_load(const feed *f, int64_t n)
{
    float one;

    if (is_direct(f->dtype)) {
        DS_CPU(row_move)(f->buffer, 1, f->row, 0, f->size, n);
    } else {
        ds_row_load(&one, f->row, f->dtype, 1, 1);
        DS_CPU(row_move)(f->buffer, 1, &one, 0, sizeof one, n);
    }
}

/* One row of n elements, in pieces of `limit`. */
static void run_row(const walk *w, const feed *feeds, walk_body *body, const double *scalars,
                    unsigned ones, int64_t n, int64_t limit)
{
    void *at[WALK_MAX] = {NULL};

    for (int64_t i = 0; i < n; i += limit) {
        int64_t m = n - i < limit ? n - i : limit;

        for (int k = 0; k < w->count; k++) {
            const feed *f = &feeds[k];

            at[k] = f->kind == MEMORY ? f->row + i * f->size : f->buffer;
            if (f->kind == HALVES && k > 0)
                halves_load(at[k], f->row + i * 2, f->dtype, m);
        }
        body(m, at, scalars, ones);
        if (feeds[0].kind == HALVES)
            halves_store(feeds[0].row + i * 2, at[0], feeds[0].dtype, m);
    }
}

static void run_plain(const walk *w, walk_body *body, const double *scalars, int64_t begin,
                      int64_t end)
{
    _Alignas(64) buffers buffer;
    int last = w->ndim - 1, above = last > 0 ? last - 1 : 0;
    int64_t row = w->shape[last], limit = row;
    unsigned ones = 0;
    feed feeds[WALK_MAX];
    cursor c;

    for (int k = 0; k < w->count; k++) {
        const struct walk_operand *op = &w->op[k];

        feeds[k] = (feed){.dtype = op->dtype, .size = op->size, .buffer = buffer.data[k]};
        feeds[k].down = op->stride[above] * op->size;
        feeds[k].kind = k > 0 && op->stride[last] == 0 ? CONSTANT
                        : is_direct(op->dtype)         ? MEMORY
                                                       : HALVES;
        if (feeds[k].kind == CONSTANT && w->ones)
            ones |= 1u << k;
        else if (feeds[k].kind == CONSTANT)
            limit = limit < WALK_CHUNK ? limit : WALK_CHUNK;
        else if (feeds[k].kind == HALVES)
            limit = limit < HALVES_CHUNK ? limit : HALVES_CHUNK;
    }
    cursor_start(&c, w, begin);
    while (begin < end) {
        int64_t n = cursor_rest(&c, w) < end - begin ? cursor_rest(&c, w) : end - begin;
        int64_t rows = n < row || last == 0 ? 1 : (end - begin) / row;
        int64_t left = last == 0 ? 1 : w->shape[above] - c.index[above];

        rows = rows < left ? rows : left;
        for (int k = 0; k < w->count; k++)
            feeds[k].row = cursor_at(&c, w, k);
        for (int64_t r = 0; r < rows; r++) {
            for (int k = 1; k < w->count; k++)
                if (feeds[k].kind == CONSTANT && (r == 0 || feeds[k].down != 0))
                    constant_load(&feeds[k], ones >> k & 1 ? 1 : limit);
            run_row(w, feeds, body, scalars, ones, n, limit);
            for (int k = 0; k < w->count; k++)
                feeds[k].row += feeds[k].down;
        }
        begin += rows * n;
        cursor_advance(&c, w, rows * n);
    }
}

/* ---- operands that lie across: contiguous in another dimension than the rows
 *
 * Reading one element by element would touch a cache line for each. So the walk is cut into blocks
 * of two dimensions, and the operand's part is transposed into a buffer first. */

#define ACROSS 64     /* rows of a block */
#define ALONG 1024    /* elements of its rows */
#define WORTHWHILE 16 /* shorter sides are not transposed */

typedef void part_fn(const walk *, walk_body *, const double *, int64_t, int64_t);

/* Bit k: operand k is contiguous in *dim, where *dim is not the rows'. */
static unsigned find_crossed(const walk *w, int *dim)
{
    int last = w->ndim - 1;
    unsigned found = 0;

    *dim = -1;
    for (int k = 1; k < w->count && w->shape[last] >= WORTHWHILE; k++)
        for (int i = 0; i < last; i++)
            if (w->op[k].stride[i] == 1 && w->op[k].stride[last] > 1 && w->op[k].size <= 8 &&
                w->shape[i] >= WORTHWHILE && (*dim < 0 || *dim == i)) {
                *dim = i;
                found |= 1u << k;
            }
    return found;
}

/* A block of w: `rows` × `columns` elements in dimensions `dim` and the last from the cursor on,
 * with the crossed operands transposed into `buffer`. */
static void block_start(walk *sub, const walk *w, const cursor *c, int dim, unsigned crossed,
                        int64_t rows, int64_t columns, char *buffer)
{
    int last = w->ndim - 1;

    *sub = *w;
    sub->ndim = 2;
    sub->shape[0] = rows;
    sub->shape[1] = columns;
    sub->numel = rows * columns;
    for (int k = 0; k < w->count; k++) {
        struct walk_operand *op = &sub->op[k];
        ds_tensor from = {.ndim = 2, .dtype = op->dtype, .numel = sub->numel}, to = from;

        op->data = cursor_at(c, w, k);
        op->stride[0] = from.stride[0] = w->op[k].stride[dim];
        op->stride[1] = from.stride[1] = w->op[k].stride[last];
        op->linear = 0;
        if (!(crossed >> k & 1))
            continue;
        from.data = op->data;
        from.dtype = to.dtype = op->dtype == WALK_RAW16 ? DS_BF16 : op->dtype;
        from.shape[0] = to.shape[0] = rows;
        from.shape[1] = to.shape[1] = columns;
        op->data = to.data = buffer;
        op->stride[0] = to.stride[0] = columns;
        op->stride[1] = to.stride[1] = 1;
        DS_CPU(copy)(&to, &from);
        buffer += ACROSS * ALONG * op->size;
    }
}

/* Runs the whole walk by blocks; 0: there is no memory for that, nothing was done. */
static int run_crossed(const walk *w, walk_body *body, const double *scalars, int dim,
                       unsigned crossed, int threads)
{
    int last = w->ndim - 1;
    int64_t rows = w->shape[dim], columns = w->shape[last];
    int64_t down = (rows + ACROSS - 1) / ACROSS, across = (columns + ALONG - 1) / ALONG;
    int64_t bytes = ACROSS * ALONG * 8 * (w->count - 1);
    char *buffers = malloc((size_t)(bytes * threads));
    walk outer = *w;

    if (!buffers)
        return 0;
    outer.shape[dim] = down; /* steps of blocks, where the cursor below counts elements */
    outer.shape[last] = across;
    for (int k = 0; k < w->count; k++) {
        outer.op[k].stride[dim] *= ACROSS;
        outer.op[k].stride[last] *= ALONG;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;
        cursor c;
        walk sub;

        ds_part(&begin, &end, w->numel / (rows * columns) * down * across, 1);
        for (; begin < end; begin++) {
            int64_t top, left;

            cursor_start(&c, &outer, begin);
            top = c.index[dim] * ACROSS;
            left = c.index[last] * ALONG;
            block_start(&sub, w, &c, dim, crossed, rows - top < ACROSS ? rows - top : ACROSS,
                        columns - left < ALONG ? columns - left : ALONG,
                        buffers + bytes * omp_get_thread_num());
            (is_plain(&sub) ? run_plain : run_part)(&sub, body, scalars, 0, sub.numel);
        }
    }
    free(buffers);
    return 1;
}

void DS_CPU(walk_run)(const walk *w, walk_body *body, const double *scalars, int cost)
{
    static const double none[2];
    part_fn *part = is_plain(w) ? run_plain : run_part;
    int threads = ds_threads(w->numel * cost), dim;
    unsigned crossed;

    if (w->numel == 0)
        return;
    if (!scalars)
        scalars = none;
    crossed = part == run_part ? find_crossed(w, &dim) : 0;
    if (crossed && run_crossed(w, body, scalars, dim, crossed, threads))
        return;
    if (threads == 1) {
        part(w, body, scalars, 0, w->numel);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        int64_t begin, end;

        ds_part(&begin, &end, w->numel, WALK_CHUNK);
        part(w, body, scalars, begin, end);
    }
}
