/* table.h - the kernels of the CUDA backend as a ds_ops. */
#ifndef DS_CUDA_TABLE_H
#define DS_CUDA_TABLE_H

extern "C" {
#include "kernels/backend.h"
}

/* Sets every slot of *ops; NULL where this build has no kernel. */
void ds_cuda_fill_table(ds_ops *ops);

#endif
