/* attention_cudnn.cu - attention by cuDNN: when it applies, and its plans.
 *
 * It takes bf16 and f16 without mask or dropout, heads that are multiples of 8, rows at 16 bytes, as in
 * the packed projection [B, T, 3, H, D]; causal only where T = S. A plan takes a tenth of a second to
 * build, so it is kept, by the form of the call; none is built while a graph is being captured.
 *
 * Its fast backward engines add dq by atomics, in any order: the last bits differ from run to run.
 * What is here by default does not: dw goes through memory instead, 2 bytes for each weight. Where
 * that is more than a 24th of the device's memory the own kernels are used, which are deterministic
 * and need none. DS_FAST_ATTENTION=1 takes the fast engines.
 */
#include "kernels/cuda/attention_cudnn.h"

#ifdef DS_HAS_CUDNN

#include <stdio.h>
#include <stdlib.h>

#define MOST_PLANS 256
#define FEWEST_ROWS                                                                                \
    32 /* below, engines' tiles are mostly empty; plans for each length would pile up */

typedef struct sdpa_plan {
    sdpa_form form;
    sdpa_graph graph;
    cudnnBackendDescriptor_t plan; /* NULL: why says why not */
    int64_t workspace;             /* bytes */
    char why[400];
} sdpa_plan;

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

/* ---- which calls */

/* NULL, or what in the call is not for cuDNN. */
static const char *unfit(const attention_call *c, int backward)
{
    int aligned = c->q.aligned && c->k.aligned && c->v.aligned && c->y.aligned;

    if (backward)
        aligned = aligned && c->dy.aligned && c->dq.aligned && c->dk.aligned && c->dv.aligned;
    if (c->dtype != DS_BF16 && c->dtype != DS_F16)
        return "it takes bf16 and f16 only";
    if (c->mask || c->drops)
        return "masks and dropout are for the own kernels";
    if (c->D % 8)
        return "heads must be multiples of 8 wide";
    if (c->causal && c->T != c->S)
        return "causal takes as many queries as keys";
    if (c->T < FEWEST_ROWS || c->S < 1)
        return "there are too few rows";
    if (!aligned)
        return "rows must begin at multiples of 16 bytes";
    if (c->lse_stride[2] != 1 || c->lse_stride[1] != c->T ||
        (c->B > 1 && c->lse_stride[0] != (int64_t)c->H * c->T))
        return "lse must be dense";
    return NULL;
}

/* Dimensions of size 1 have any stride: here one that the others imply. */
static void set_strides(int64_t to[3], const head_tensor *x, const attention_call *c, int n,
                        int heads)
{
    to[2] = heads > 1 ? x->head : c->D;
    to[1] = n > 1 ? x->row : heads * to[2];
    to[0] = c->B > 1 ? x->batch : n * to[1];
}

static void form_of(sdpa_form *f, const attention_call *c, int backward)
{
    const head_tensor *const x[SDPA_HEADS] = {NULL,   &c->q,  &c->k,  &c->v, &c->y,
                                              &c->dy, &c->dq, &c->dk, &c->dv};
    const char *fast = getenv("DS_FAST_ATTENTION");

    memset(f, 0, sizeof *f);
    f->backward = backward;
    f->f16 = c->dtype == DS_F16;
    f->causal = c->causal != 0;
    f->deterministic = backward && !(fast && !strcmp(fast, "1"));
    f->B = c->B;
    f->H = c->H;
    f->G = c->G;
    f->T = c->T;
    f->S = c->S;
    f->D = c->D;
    for (int i = SDPA_Q; i < (backward ? SDPA_HEADS : SDPA_DY); i++) {
        int is_key = i == SDPA_K || i == SDPA_V || i == SDPA_DK || i == SDPA_DV;

        set_strides(f->stride[i], x[i], c, is_key ? c->S : c->T, is_key ? c->G : c->H);
    }
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

/* NULL: not now, *why says why. */
static const sdpa_plan *plan_for(const sdpa_form *form, const char **why)
{
    sdpa_plan *p;

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

static int execute(const sdpa_plan *p, void *const pointers[SDPA_TENSORS], void *workspace)
{
    int64_t ids[SDPA_TENSORS];
    void *data[SDPA_TENSORS];
    cudnnBackendDescriptor_t pack = NULL;
    int64_t n = 0;
    cudnnStatus_t status;

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

/* Scratch of the backward pass: delta, and dq's sum where the engine adds it up there. */
static int take_scratch(void *pointers[SDPA_TENSORS], const attention_call *c, int with_sum)
{
    size_t rows = (size_t)c->B * c->H * c->T, delta = (rows * 4 + 255) & ~(size_t)255;
    size_t sum = with_sum ? rows * c->D * 4 : 0;
    char *room = (char *)ds_cuda_scratch(DS_CUDA_PARTIAL, delta + sum);

    if (!room)
        return DS_ENOMEM;
    pointers[SDPA_DELTA] = room;
    if (!with_sum)
        return 0;
    pointers[SDPA_DQ_SUM] = room + delta;
    return ds_cuda_check(cudaMemsetAsync(room + delta, 0, sum, ds_cuda.stream), "attention");
}

static int run(const sdpa_plan *p, const attention_call *c)
{
    float scale = c->scale, hidden = -INFINITY, one = 1;
    void *workspace = ds_cuda_scratch(DS_CUDA_WORKSPACE, (size_t)p->workspace);
    void *pointers[SDPA_TENSORS] = {};

    if (!workspace)
        return DS_ENOMEM;
    pointers[SDPA_Q] = c->q.data;
    pointers[SDPA_K] = c->k.data;
    pointers[SDPA_V] = c->v.data;
    pointers[SDPA_Y] = c->y.data;
    pointers[SDPA_LSE] = c->lse;
    pointers[SDPA_SCALE] = &scale;
    if (c->causal)
        pointers[SDPA_HIDDEN] = &hidden;
    if (p->form.backward) {
        pointers[SDPA_DY] = c->dy.data;
        pointers[SDPA_DQ] = c->dq.data;
        pointers[SDPA_DK] = c->dk.data;
        pointers[SDPA_DV] = c->dv.data;
        pointers[SDPA_ONE] = &one;
        DS_TRY(take_scratch(pointers, c, !p->form.deterministic));
    }
    return execute(p, pointers, workspace);
}

int attention_cudnn(const attention_call *c, int backward, const char **why)
{
    sdpa_form form;
    const sdpa_plan *p;
    int rc;

    if ((*why = unfit(c, backward)) || (*why = open_handle()))
        return 0;
    form_of(&form, c, backward);
    if (!(p = plan_for(&form, why)))
        return 0;
    rc = run(p, c);
    if (rc != DS_ENOMEM)
        return rc < 0 ? rc : 1;
    *why = "there is no memory for its workspace";
    return 0;
}

#else

int attention_cudnn(const attention_call *, int, const char **why)
{
    *why = "this build has no cuDNN";
    return 0;
}

#endif
