/* level.h - what every CPU kernel file includes first: its level's names, and the parallel loop.
 *
 * Each .c file here (but level.c and dnnl.c) is compiled once per CPU level, with -DDS_LEVEL=v2,
 * v3, v4, v4bf16 or portable and the flags of that level. DS_CPU(gelu) is the name of the level's
 * own copy: ds_cpu_gelu_v4. level.c chooses a level's table (table.c) once, at start-up.
 */
#ifndef DS_CPU_LEVEL_H
#define DS_CPU_LEVEL_H

#include <omp.h>
#include <stdint.h>

#include "kernels/backend.h"
#include "kernels/checks.h"
#include "kernels/dtype.h"
#include "kernels/error.h"
#include "kernels/tensor.h"

#ifndef DS_LEVEL
#define DS_LEVEL portable
#endif

#define DS_CPU_PASTE(name, level) name##_##level
#define DS_CPU_JOIN(name, level) DS_CPU_PASTE(name, level)
#define DS_CPU(name) DS_CPU_JOIN(ds_cpu_##name, DS_LEVEL)

/* table.c says `weak` here: a kernel that nobody wrote is an empty slot. */
#ifndef DS_CPU_LINKAGE
#define DS_CPU_LINKAGE
#endif

#define C const ds_tensor *
#define T ds_tensor *
#define DS_UNARY(name, saved)                                                                      \
    DS_CPU_LINKAGE int DS_CPU(name)(T y, C x);                                                     \
    DS_CPU_LINKAGE int DS_CPU(name##_backward)(T dx, C dy, C s);
#define DS_BINARY(name)                                                                            \
    DS_CPU_LINKAGE int DS_CPU(name)(T y, C a, C b);                                                \
    DS_CPU_LINKAGE int DS_CPU(name##_scalar)(T y, C x, double s, int flip);
#define DS_COMPARE(name)                                                                           \
    DS_CPU_LINKAGE int DS_CPU(name)(T y, C a, C b);                                                \
    DS_CPU_LINKAGE int DS_CPU(name##_scalar)(T y, C x, double s, int flip);
#define DS_KERNEL(name, signature) DS_CPU_LINKAGE int DS_CPU(name) signature;
#include "kernels/ops.def"
#undef C
#undef T

extern const ds_ops DS_CPU(table);

/* ---- parallel loops
 *
 * A loop over n items is cut into contiguous parts, one a thread, by n and the thread count alone:
 *
 *     int threads = ds_threads(rows * columns);
 *
 *     #pragma omp parallel num_threads(threads) if (threads > 1)
 *     {
 *         int64_t begin, end;
 *
 *         ds_part(&begin, &end, rows, 1);
 *         for (int64_t r = begin; r < end; r++)
 *             …
 *     }
 *
 * Only OpenMP makes threads, only the main thread of a process comes here. A region costs 0.6 µs
 * while its threads still spin, so small work stays on one. The team is one or all: changing its
 * size would make libgomp build a new one.
 */

#define DS_PARALLEL_WORK 16384 /* about 2 µs of simple vector arithmetic */

/* Threads for `work`: elements, times a factor where an element costs more than a few cycles. */
static inline int ds_threads(int64_t work)
{
    return work < DS_PARALLEL_WORK ? 1 : omp_get_max_threads();
}

/* This thread's part [begin, end) of n items; begin is a multiple of `grain`. */
static inline void ds_part(int64_t *begin, int64_t *end, int64_t n, int64_t grain)
{
    int64_t grains = (n + grain - 1) / grain, team = omp_get_num_threads();
    int64_t each = grains / team, extra = grains % team, me = omp_get_thread_num();

    *begin = (each * me + (me < extra ? me : extra)) * grain;
    *end = *begin + (each + (me < extra)) * grain;
    *begin = *begin < n ? *begin : n;
    *end = *end < n ? *end : n;
}

#endif
