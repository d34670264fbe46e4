/* attention_graph.h - attention as cuDNN's graphs. Includes nothing of the device, so that a test can
 * ask cuDNN about the same graphs where there is no GPU. */
#ifndef DS_CUDA_ATTENTION_GRAPH_H
#define DS_CUDA_ATTENTION_GRAPH_H

#include <stdint.h>

#include "kernels/cuda/cudnn.h"

enum sdpa_tensor {
    SDPA_Q = 1,
    SDPA_K,
    SDPA_V,
    SDPA_Y,
    SDPA_DY,
    SDPA_DQ,
    SDPA_DK,
    SDPA_DV,
    SDPA_HEADS,            /* up to here [B, n, heads, D] in the form's dtype */
    SDPA_LSE = SDPA_HEADS, /* f32 [B, H, T] dense */
    SDPA_DELTA,            /* f32 [B, H, T] dense: room */
    SDPA_DQ_SUM,           /* f32 [B, H, T, D] dense: room, all 0; unless deterministic */
    SDPA_SCALE,            /* f32 numbers in host memory */
    SDPA_HIDDEN,           /* -inf */
    SDPA_ONE,
    SDPA_TENSORS
};

/* All that a graph depends on; compared as bytes, so fill it with 0 first. */
typedef struct sdpa_form {
    int32_t backward, f16; /* f16: or bf16 */
    int32_t causal;        /* only where T = S */
    int32_t deterministic;
    int64_t B, H, G, T, S, D;
    int64_t stride[SDPA_HEADS][3]; /* over batch, row, head; in elements */
} sdpa_form;

#ifdef DS_HAS_CUDNN

#define SDPA_MOST_CONFIGS 16

/* A graph, and cuDNN's ways to run it, best first. */
typedef struct sdpa_graph {
    const ds_cudnn_library *cudnn;
    cudnnBackendDescriptor_t owned[160]; /* all that was made, in order */
    int owned_count;
    cudnnBackendDescriptor_t configs[SDPA_MOST_CONFIGS]; /* engine configurations; owned */
    int config_count;
    const char *failed; /* NULL: fine */
    char why[400];
} sdpa_graph;

/* For a handle's device, or for a device that only `properties` describe. 0, or -1 and g->why; in both
 * cases sdpa_graph_free() is to follow. */
int sdpa_graph_make(sdpa_graph *g, const ds_cudnn_library *cudnn, const sdpa_form *form,
                    cudnnHandle_t handle, cudnnBackendDescriptor_t properties);
/* The workspace in bytes that configuration i says it needs. */
int64_t sdpa_graph_workspace(const sdpa_graph *g, int i);
void sdpa_graph_free(sdpa_graph *g);

#endif
#endif
