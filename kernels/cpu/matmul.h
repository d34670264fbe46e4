/* matmul.h - matrix products on plain memory, for the kernels that are built on them. */
#ifndef DS_CPU_MATMUL_H
#define DS_CPU_MATMUL_H

#include "kernels/cpu/level.h"
#include "kernels/product.h"

#define ds_product_run DS_CPU(product_run)
int ds_product_run(const ds_product *product);

#endif
