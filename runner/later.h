/* later.h - transfers between ordinary host memory and a device, by way of page-locked pieces. */
#ifndef DS_LATER_H
#define DS_LATER_H

#include "runner/alloc.h"

/* To the device, among its kernels: `from` may change when it returns, and the host waits only if many
 * such transfers are under way. From the device: all is there when it returns. */
int ds_stage_up(const ds_backend *backend, void *to, const void *from, size_t bytes);
int ds_stage_down(const ds_backend *backend, void *to, const void *from, size_t bytes);

#endif
