/* reduce_ranks.c - what several ranks have of the same elements becomes one: sum, mean, max, min.
 *
 * Contributions are joined element by element in the order given, so the result depends neither on
 * the pieces in which they came nor on where they lie. Low precision is joined in f32 and rounded
 * once, after the scale.
 */
#include "kernels/cpu/level.h"

#include <string.h>

#include "kernels/cpu/simd.h"

#define UNROLL 4   /* vectors of one rank that are read together: their additions overlap */
#define BLOCK 1024 /* elements of a block that stays in the first-level cache */

typedef struct job {
    void *y;
    const void *const *parts;
    int from, to; /* dtypes of the parts and of y */
    int n, op;
    int divide; /* by n */
    double scale;
} job;

/* NaN wins, as in max and min over a dimension. */
VF_FUNC vf join(vf a, vf x, int op)
{
    if (op == DS_MAX)
        return vf_select((a > x) | (a != a), a, x);
    if (op == DS_MIN)
        return vf_select((a < x) | (a != a), a, x);
    return a + x;
}

VF_FUNC vf finished(vf a, const job *j)
{
    if (j->divide)
        a = a / vf_set((float)j->n);
    return j->scale == 1 ? a : a * vf_set((float)j->scale);
}

VF_FUNC void join_vectors(const job *j, int64_t begin, int64_t end, int from, int op)
{
    int64_t i = begin;

    for (; i + UNROLL * VF_LANES <= end; i += UNROLL * VF_LANES) {
        vf a[UNROLL];

        for (int u = 0; u < UNROLL; u++)
            a[u] = vf_load_as(j->parts[0], i + u * VF_LANES, from);
        for (int r = 1; r < j->n; r++)
            for (int u = 0; u < UNROLL; u++)
                a[u] = join(a[u], vf_load_as(j->parts[r], i + u * VF_LANES, from), op);
        for (int u = 0; u < UNROLL; u++)
            vf_store_as(j->y, i + u * VF_LANES, j->to, finished(a[u], j));
    }
    for (; i < end; i += VF_LANES) {
        int64_t n = end - i < VF_LANES ? end - i : VF_LANES;
        vf a = vf_load_part_as(j->parts[0], i, from, n);

        for (int r = 1; r < j->n; r++)
            a = join(a, vf_load_part_as(j->parts[r], i, from, n), op);
        vf_store_part_as(j->y, i, j->to, finished(a, j), n);
    }
}

/* A constant dtype and operation each, so that the loops have no branches. */
VF_FUNC void join_as(const job *j, int64_t begin, int64_t end, int from)
{
    if (j->op == DS_MAX)
        join_vectors(j, begin, end, from, DS_MAX);
    else if (j->op == DS_MIN)
        join_vectors(j, begin, end, from, DS_MIN);
    else
        join_vectors(j, begin, end, from, DS_SUM);
}

static void join_f32(const job *j, int64_t begin, int64_t end)
{
    join_as(j, begin, end, DS_F32);
}

static void join_bf16(const job *j, int64_t begin, int64_t end)
{
    join_as(j, begin, end, DS_BF16);
}

static void join_f16(const job *j, int64_t begin, int64_t end)
{
    join_as(j, begin, end, DS_F16);
}

/* The other types, in blocks: y may be one of the parts. `sums` is the type in which sums wrap
 * around. */
#define JOIN_BLOCKS(name, type, sums, finish)                                                      \
    static void name(const job *j, int64_t begin, int64_t end)                                     \
    {                                                                                              \
        type a[BLOCK];                                                                             \
                                                                                                   \
        for (int64_t i = begin; i < end; i += BLOCK) {                                             \
            int64_t n = end - i < BLOCK ? end - i : BLOCK;                                         \
                                                                                                   \
            memcpy(a, (const type *)j->parts[0] + i, (size_t)n * sizeof *a);                       \
            for (int r = 1; r < j->n; r++) {                                                       \
                const type *x = (const type *)j->parts[r] + i;                                     \
                                                                                                   \
                if (j->op == DS_MAX)                                                               \
                    for (int64_t k = 0; k < n; k++)                                                \
                        a[k] = a[k] > x[k] || a[k] != a[k] ? a[k] : x[k];                          \
                else if (j->op == DS_MIN)                                                          \
                    for (int64_t k = 0; k < n; k++)                                                \
                        a[k] = a[k] < x[k] || a[k] != a[k] ? a[k] : x[k];                          \
                else                                                                               \
                    for (int64_t k = 0; k < n; k++)                                                \
                        a[k] = (type)((sums)a[k] + (sums)x[k]);                                    \
            }                                                                                      \
            finish(j, a, n);                                                                       \
            memcpy((type *)j->y + i, a, (size_t)n * sizeof *a);                                    \
        }                                                                                          \
    }

#define AS_IT_IS(j, a, n)

static void finish_f64(const job *j, double *a, int64_t n)
{
    if (j->divide)
        for (int64_t k = 0; k < n; k++)
            a[k] /= j->n;
    if (j->scale != 1)
        for (int64_t k = 0; k < n; k++)
            a[k] *= j->scale;
}

JOIN_BLOCKS(join_f64, double, double, finish_f64)
JOIN_BLOCKS(join_i64, int64_t, uint64_t, AS_IT_IS)
JOIN_BLOCKS(join_i32, int32_t, uint32_t, AS_IT_IS)
JOIN_BLOCKS(join_u8, uint8_t, uint32_t, AS_IT_IS) /* and bool: all is min, any is max */

int DS_CPU(reduce_ranks)(ds_tensor *y, const void *const *parts, int dtype, int n, int op,
                         double scale)
{
    static void (*const loops[DS_DTYPES])(const job *, int64_t, int64_t) = {
        [DS_F32] = join_f32, [DS_BF16] = join_bf16, [DS_F16] = join_f16, [DS_F64] = join_f64,
        [DS_I64] = join_i64, [DS_I32] = join_i32,   [DS_U8] = join_u8,   [DS_BOOL] = join_u8};
    int threads = ds_threads(y->numel);
    job j = {y->data, parts, dtype, y->dtype, n, op, 0, scale};

    DS_TRY(ds_check_reduce_ranks(y, dtype, n, op, scale));
    if (op == DS_MEAN && (n & (n - 1)) == 0)
        j.scale /= n; /* a power of two: the same bits as dividing, and faster */
    else
        j.divide = op == DS_MEAN;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;

        ds_part(&begin, &end, y->numel, 64);
        loops[dtype](&j, begin, end);
    }
    return 0;
}
