/* attention_plan.h - cuDNN's plans for graphs of attention. */
#ifndef DS_CUDA_ATTENTION_PLAN_H
#define DS_CUDA_ATTENTION_PLAN_H

#include "kernels/cuda/attention_graph.h"
#include "kernels/cuda/device.h"

typedef struct sdpa_plan sdpa_plan;

/* How a form is run; it is kept. NULL: not, or not now, and *why says why. */
const sdpa_plan *sdpa_plan_for(const sdpa_form *form, const char **why);

/* Queues it. pointers: what enum sdpa_tensor says, NULL for what the graph does not have. DS_ENOMEM: there
 * is no memory for its workspace, and nothing was done. */
int sdpa_plan_run(const sdpa_plan *p, void *const pointers[SDPA_TENSORS]);

#endif
