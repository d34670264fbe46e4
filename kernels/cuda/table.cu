/* table.cu - the kernels of this backend as a ds_ops, made from ops.def. A kernel that is not linked
 * in is an empty slot, because the references are weak. */
#define DS_CUDA_LINKAGE __attribute__((weak))
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/table.h"

void ds_cuda_fill_table(ds_ops *ops)
{
#define DS_UNARY(name, saved)                                                                      \
    ops->name = DS_CUDA(name);                                                                     \
    ops->name##_backward = DS_CUDA(name##_backward);
#define DS_BINARY(name)                                                                            \
    ops->name = DS_CUDA(name);                                                                     \
    ops->name##_scalar = DS_CUDA(name##_scalar);
#define DS_COMPARE(name) DS_BINARY(name)
#define DS_KERNEL(name, signature) ops->name = DS_CUDA(name);
#include "kernels/ops.def"
}
