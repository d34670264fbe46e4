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
    SDPA_BIAS,             /* added to the scores: [B, 1 or H, T, S] */
    SDPA_SCALE,            /* f32 numbers in host memory */
    SDPA_HIDDEN,           /* -inf */
    SDPA_ONE,
    SDPA_ROWS, /* int32 numbers in host memory, T and S: where causal and they differ */
    SDPA_KEYS,
    SDPA_TENSORS
};

enum sdpa_bias { SDPA_NO_BIAS, SDPA_BIAS_BF16, SDPA_BIAS_F32 };

/* All that a graph depends on; compared as bytes, so fill it with 0 first. */
typedef struct sdpa_form {
    int32_t backward, f16; /* f16: or bf16 */
    int32_t causal; /* row t sees s ≤ t + S - T; T ≤ S, and T = S where there is a bias */
    int32_t deterministic;
    int32_t bias;       /* an sdpa_bias */
    int32_t bias_heads; /* 1 or H */
    int64_t B, H, G, T, S, D;
    int64_t stride[SDPA_HEADS][3]; /* over batch, row, head; in elements */
    int64_t bias_stride[3];        /* over batch, head, row; 0: all have the same */
} sdpa_form;

/* A call of attention. */
typedef struct sdpa_request {
    int backward, f16, causal, deterministic;
    int mask;             /* an sdpa_bias: the least that holds the mask's numbers */
    int64_t mask_size[3]; /* over B, H, T: 1, or all */
    int64_t B, H, G, T, S, D;
    int64_t stride[SDPA_HEADS][3];
} sdpa_request;

/* attention_form.cu: the form of a call, or why cuDNN cannot do it. Causal rows that come before the
 * first key see nothing and are left out: the form's T is smaller then, and its row 0 is the call's row
 * T - S. Causality that the graph does not have, but the call has, belongs in the bias. */
const char *sdpa_form_of(sdpa_form *f, const sdpa_request *r);

#ifdef DS_HAS_CUDNN

#define SDPA_MOST_CONFIGS 16

/* A graph, and cuDNN's ways to run it, best first. */
typedef struct sdpa_graph {
    const ds_cudnn_library *cudnn;
    cudnnBackendDescriptor_t owned[200]; /* all that was made, in order */
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
