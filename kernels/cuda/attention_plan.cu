/* attention_plan.cu - cuDNN's plans for graphs of attention: built, kept and run. */
#include "kernels/cuda/attention_plan.h"

#ifdef DS_HAS_CUDNN

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_PLANS 256

struct sdpa_plan {
    sdpa_form form;
    sdpa_graph graph;
    cudnnBackendDescriptor_t plan; /* NULL: why says why not */
    int64_t workspace;             /* bytes */
    char why[400];
};

static const ds_cudnn_library *cudnn;
static cudnnHandle_t handle;
static int64_t most_workspace;
static sdpa_plan *plans[MOST_PLANS];
static int plan_count;

static int capturing(void)
{
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;

    return cudaStreamIsCapturing(ds_cuda.stream, &status) != cudaSuccess ||
           status != cudaStreamCaptureStatusNone;
}

/* ---- opening */

static const char *open_handle(void)
{
    static const char *why;
    size_t free_bytes = 0, total = 0;

    if (handle || why)
        return why;
    if (capturing())
        return "it was not used before a graph was captured";
    if (!(cudnn = ds_cudnn()))
        return why = ds_cudnn_why();
    if (cudnn->Create(&handle) != CUDNN_STATUS_SUCCESS ||
        cudnn->SetStream(handle, ds_cuda.stream) != CUDNN_STATUS_SUCCESS ||
        cudaMemGetInfo(&free_bytes, &total) != cudaSuccess) {
        handle = NULL;
        return why = "cuDNN cannot be set up on this GPU";
    }
    most_workspace = (int64_t)(total / 24);
    return NULL;
}

/* ---- plans */

/* The first configuration that can be run in the memory there is. */
static void build(sdpa_plan *p)
{
    const cudnnBackendAttributeType_t node = CUDNN_TYPE_BACKEND_DESCRIPTOR;

    if (sdpa_graph_make(&p->graph, cudnn, &p->form, handle, NULL) < 0) {
        snprintf(p->why, sizeof p->why, "%s", p->graph.why);
        return;
    }
    snprintf(p->why, sizeof p->why, "its engines want more memory than a 24th of the GPU's");
    for (int i = 0; i < p->graph.config_count; i++) {
        cudnnBackendDescriptor_t plan;
        int64_t count;

        if (sdpa_graph_workspace(&p->graph, i) > most_workspace ||
            cudnn->BackendCreateDescriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &plan) !=
                CUDNN_STATUS_SUCCESS)
            continue;
        if (cudnn->BackendSetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1,
                                       &handle) == CUDNN_STATUS_SUCCESS &&
            cudnn->BackendSetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, node, 1,
                                       &p->graph.configs[i]) == CUDNN_STATUS_SUCCESS &&
            cudnn->BackendFinalize(plan) == CUDNN_STATUS_SUCCESS &&
            cudnn->BackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE,
                                       CUDNN_TYPE_INT64, 1, &count,
                                       &p->workspace) == CUDNN_STATUS_SUCCESS &&
            p->workspace <= most_workspace) {
            p->plan = plan;
            return;
        }
        cudnn->GetLastErrorString(p->why, sizeof p->why);
        cudnn->BackendDestroyDescriptor(plan);
    }
}

static void drop(sdpa_plan *p)
{
    if (p->plan)
        cudnn->BackendDestroyDescriptor(p->plan);
    sdpa_graph_free(&p->graph);
    free(p);
}

const sdpa_plan *sdpa_plan_for(const sdpa_form *form, const char **why)
{
    sdpa_plan *p;

    if ((*why = open_handle()))
        return NULL;
    for (int i = 0; i < plan_count && i < MOST_PLANS; i++)
        if (!memcmp(&plans[i]->form, form, sizeof *form)) {
            *why = plans[i]->why;
            return plans[i]->plan ? plans[i] : NULL;
        }
    *why = "no plan can be built while a graph is captured";
    if (capturing())
        return NULL;
    *why = "out of host memory";
    if (!(p = (sdpa_plan *)calloc(1, sizeof *p)))
        return NULL;
    p->form = *form;
    build(p);
    if (plan_count >= MOST_PLANS)
        drop(plans[plan_count % MOST_PLANS]);
    plans[plan_count++ % MOST_PLANS] = p;
    *why = p->why;
    return p->plan ? p : NULL;
}

/* ---- running */

int sdpa_plan_run(const sdpa_plan *p, void *const pointers[SDPA_TENSORS])
{
    void *workspace = ds_cuda_scratch(DS_CUDA_WORKSPACE, (size_t)p->workspace);
    int64_t ids[SDPA_TENSORS];
    void *data[SDPA_TENSORS];
    cudnnBackendDescriptor_t pack = NULL;
    int64_t n = 0;
    cudnnStatus_t status;

    if (!workspace)
        return DS_ENOMEM;
    for (int i = 1; i < SDPA_TENSORS; i++)
        if (pointers[i]) {
            ids[n] = i;
            data[n++] = pointers[i];
        }
    status = cudnn->BackendCreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack);
    if (status == CUDNN_STATUS_SUCCESS)
        status = cudnn->BackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS,
                                            CUDNN_TYPE_INT64, n, ids);
    if (status == CUDNN_STATUS_SUCCESS)
        status = cudnn->BackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS,
                                            CUDNN_TYPE_VOID_PTR, n, data);
    if (status == CUDNN_STATUS_SUCCESS)
        status = cudnn->BackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE,
                                            CUDNN_TYPE_VOID_PTR, 1, &workspace);
    if (status == CUDNN_STATUS_SUCCESS)
        status = cudnn->BackendFinalize(pack);
    if (status == CUDNN_STATUS_SUCCESS)
        status = cudnn->BackendExecute(handle, p->plan, pack);
    if (pack)
        cudnn->BackendDestroyDescriptor(pack);
    if (status != CUDNN_STATUS_SUCCESS)
        return ds_fail(DS_EIO, "attention: cuDNN: %s; DS_ATTENTION=own goes without",
                       cudnn->GetErrorString(status));
    return ds_cuda_launched("attention");
}

#elif !defined DS_SIMT /* where threads are simulated, tests/simt has the plans */

const sdpa_plan *sdpa_plan_for(const sdpa_form *, const char **why)
{
    *why = "this build has no cuDNN";
    return NULL;
}

int sdpa_plan_run(const sdpa_plan *, void *const[SDPA_TENSORS])
{
    return DS_ENOSYS;
}

#endif
