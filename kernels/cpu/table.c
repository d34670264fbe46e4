/* table.c - the kernels of this level as a ds_ops, made from ops.def. A kernel that is not linked
 * in is an empty slot, because the references are weak. */
#define DS_CPU_LINKAGE __attribute__((weak))
#include "kernels/cpu/level.h"

const ds_ops DS_CPU(table) = {
#define DS_UNARY(name, saved) .name = DS_CPU(name), .name##_backward = DS_CPU(name##_backward),
#define DS_BINARY(name) .name = DS_CPU(name), .name##_scalar = DS_CPU(name##_scalar),
#define DS_COMPARE(name) .name = DS_CPU(name), .name##_scalar = DS_CPU(name##_scalar),
#define DS_KERNEL(name, signature) .name = DS_CPU(name),
#include "kernels/ops.def"
};
