/* attention_graph.cu - builds the graphs of attention, operation by operation.
 *
 * cuDNN finds its fused engines by pattern: the operations and their order are those that it knows
 * (NVIDIA cuDNN documentation, "Fused Flash Attention"; the order is that of the graphs which its
 * engines accept). Forward:
 *
 *     s = q kᵀ scale + bias, -inf where causality hides
 *     lse = max s + log Σ exp(s - max s);  y = softmax(s) v
 *
 * Backward: delta = Σ dy y;  w = exp(s - lse);  dv = wᵀ dy;  ds = w (dy vᵀ - delta) scale;
 * dk = dsᵀ q;  dq = ds k. With SDPA_DQ_SUM the engine adds dq from many blocks by atomics, in any
 * order; without it dw goes through memory, and the order is fixed.
 */
#include "kernels/cuda/attention_graph.h"

#ifdef DS_HAS_CUDNN

#include <stdio.h>
#include <string.h>

typedef cudnnBackendDescriptor_t node;

/* A graph under construction. After a failure all calls do nothing, and nodes are NULL. */
typedef struct builder {
    sdpa_graph *g;
    const sdpa_form *form;
    node ops[40];
    int op_count;
    int64_t next; /* unique number of the next tensor that nobody sees */
} builder;

/* ---- descriptors */

static int fine(sdpa_graph *g, cudnnStatus_t status, const char *what)
{
    char detail[300] = "";

    if (g->failed)
        return 0;
    if (status == CUDNN_STATUS_SUCCESS)
        return 1;
    g->cudnn->GetLastErrorString(detail, sizeof detail);
    g->failed = what;
    snprintf(g->why, sizeof g->why, "%s: %s %.280s", what, g->cudnn->GetErrorString(status),
             detail);
    return 0;
}

static node make(sdpa_graph *g, cudnnBackendDescriptorType_t type)
{
    node d = NULL;

    if (g->failed || g->owned_count == sizeof g->owned / sizeof *g->owned ||
        !fine(g, g->cudnn->BackendCreateDescriptor(type, &d), "descriptor"))
        return NULL;
    return g->owned[g->owned_count++] = d;
}

static void set(sdpa_graph *g, node d, cudnnBackendAttributeName_t name,
                cudnnBackendAttributeType_t type, int64_t count, const void *value)
{
    if (!g->failed)
        fine(g, g->cudnn->BackendSetAttribute(d, name, type, count, value), "attribute");
}

static void set_node(sdpa_graph *g, node d, cudnnBackendAttributeName_t name, node value)
{
    set(g, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
}

static node finalize(sdpa_graph *g, node d, const char *what)
{
    if (!g->failed)
        fine(g, g->cudnn->BackendFinalize(d), what);
    return d;
}

/* ---- tensors */

static node tensor(builder *b, cudnnDataType_t type, const int64_t size[4], const int64_t stride[4],
                   bool is_virtual, bool by_value, int64_t id)
{
    sdpa_graph *g = b->g;
    node d = make(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    int64_t alignment = by_value ? 4 : 16;

    set(g, d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
    set(g, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, size);
    set(g, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, stride);
    set(g, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &id);
    set(g, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
    if (is_virtual)
        set(g, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual);
    if (by_value)
        set(g, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &by_value);
    return finalize(g, d, "tensor");
}

static cudnnDataType_t storage(const builder *b)
{
    return b->form->f16 ? CUDNN_DATA_HALF : CUDNN_DATA_BFLOAT16;
}

/* One of q, k, v, … as [B, heads, n, D], or its transpose [B, heads, D, n]. */
static node heads(builder *b, int which, int transposed)
{
    const sdpa_form *f = b->form;
    const int64_t *s = f->stride[which];
    int is_key = which == SDPA_K || which == SDPA_V || which == SDPA_DK || which == SDPA_DV;
    int64_t n = is_key ? f->S : f->T, count = is_key ? f->G : f->H;
    const int64_t size[2][4] = {{f->B, count, n, f->D}, {f->B, count, f->D, n}};
    const int64_t stride[2][4] = {{s[0], s[2], s[1], 1}, {s[0], s[2], 1, s[1]}};

    return tensor(b, storage(b), size[transposed], stride[transposed], false, false, which);
}

/* [B, H, T, n] without memory, dense. */
static node inner(builder *b, cudnnDataType_t type, int64_t n)
{
    const sdpa_form *f = b->form;
    const int64_t size[4] = {f->B, f->H, f->T, n};
    const int64_t stride[4] = {f->H * f->T * n, f->T * n, n, 1};

    return tensor(b, type, size, stride, true, false, b->next++);
}
static node scores(builder *b)
{
    return inner(b, CUDNN_DATA_FLOAT, b->form->S);
}
static node row_values(builder *b)
{
    return inner(b, CUDNN_DATA_FLOAT, 1);
}

/* f32 [B, H, T, n] in memory. */
static node outer(builder *b, int which, int64_t n)
{
    const sdpa_form *f = b->form;
    const int64_t size[4] = {f->B, f->H, f->T, n};
    const int64_t stride[4] = {f->H * f->T * n, f->T * n, n, 1};

    return tensor(b, CUDNN_DATA_FLOAT, size, stride, false, false, which);
}

static node number(builder *b, int which)
{
    const int64_t ones[4] = {1, 1, 1, 1};

    return tensor(b, CUDNN_DATA_FLOAT, ones, ones, false, true, which);
}

static node whole_number(builder *b, int which)
{
    const int64_t ones[4] = {1, 1, 1, 1};

    return tensor(b, CUDNN_DATA_INT32, ones, ones, false, true, which);
}

/* ---- operations */

static node add_op(builder *b, node op)
{
    finalize(b->g, op, "operation");
    if (b->op_count < (int)(sizeof b->ops / sizeof *b->ops))
        b->ops[b->op_count++] = op;
    return op;
}

static node matmul(builder *b, node x, node y, node to)
{
    sdpa_graph *g = b->g;
    cudnnDataType_t f32 = CUDNN_DATA_FLOAT;
    node how = make(g, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
    node op = make(g, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);

    set(g, how, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &f32);
    finalize(g, how, "matmul");
    set_node(g, op, CUDNN_ATTR_OPERATION_MATMUL_ADESC, x);
    set_node(g, op, CUDNN_ATTR_OPERATION_MATMUL_BDESC, y);
    set_node(g, op, CUDNN_ATTR_OPERATION_MATMUL_CDESC, to);
    set_node(g, op, CUDNN_ATTR_OPERATION_MATMUL_DESC, how);
    add_op(b, op);
    return to;
}

/* to = mode(x), mode(x, y), or mode(x, y, t); axis < 0: none. */
static node pointwise_as(builder *b, cudnnPointwiseMode_t mode, cudnnDataType_t type, int64_t axis,
                         node x, node y, node t, node to)
{
    sdpa_graph *g = b->g;
    float one = 1;
    node how = make(g, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    node op = make(g, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);

    set(g, how, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
    set(g, how, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &type);
    if (axis >= 0)
        set(g, how, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &axis);
    finalize(g, how, "pointwise");
    set_node(g, op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, how);
    set_node(g, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
    set_node(g, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, to);
    if (y)
        set_node(g, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, y);
    if (t)
        set_node(g, op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, t);
    set(g, op, CUDNN_ATTR_OPERATION_POINTWISE_ALPHA1, CUDNN_TYPE_FLOAT, 1, &one);
    set(g, op, CUDNN_ATTR_OPERATION_POINTWISE_ALPHA2, CUDNN_TYPE_FLOAT, 1, &one);
    add_op(b, op);
    return to;
}
static node pointwise(builder *b, cudnnPointwiseMode_t mode, node x, node y, node to)
{
    return pointwise_as(b, mode, CUDNN_DATA_FLOAT, -1, x, y, NULL, to);
}

/* Along the last dimension. */
static node reduce(builder *b, cudnnReduceTensorOp_t mode, node x, node to)
{
    sdpa_graph *g = b->g;
    cudnnDataType_t f32 = CUDNN_DATA_FLOAT;
    node how = make(g, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
    node op = make(g, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);

    set(g, how, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &mode);
    set(g, how, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &f32);
    finalize(g, how, "reduction");
    set_node(g, op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x);
    set_node(g, op, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, to);
    set_node(g, op, CUDNN_ATTR_OPERATION_REDUCTION_DESC, how);
    add_op(b, op);
    return to;
}

/* The same memory with other strides: a transpose. */
static node reshape(builder *b, node x, node to)
{
    node op = make(b->g, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);

    set_node(b->g, op, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x);
    set_node(b->g, op, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, to);
    add_op(b, op);
    return to;
}

static node add_bias(builder *b, node s)
{
    const sdpa_form *f = b->form;
    const int64_t size[4] = {f->B, f->bias_heads, f->T, f->S};
    const int64_t stride[4] = {f->bias_stride[0], f->bias_stride[1], f->bias_stride[2], 1};
    cudnnDataType_t type = f->bias == SDPA_BIAS_F32 ? CUDNN_DATA_FLOAT : CUDNN_DATA_BFLOAT16;

    if (!f->bias)
        return s;
    return pointwise(b, CUDNN_POINTWISE_ADD, s,
                     tensor(b, type, size, stride, false, false, SDPA_BIAS), scores(b));
}

/* For each score, the last key that its row sees. */
static node last_seen(builder *b, node s)
{
    const cudnnDataType_t i32 = CUDNN_DATA_INT32;
    int64_t S = b->form->S;
    node row = pointwise_as(b, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_FLOAT, 2, s, NULL, NULL,
                            inner(b, i32, S));

    if (b->form->T == S)
        return row;
    row = pointwise_as(b, CUDNN_POINTWISE_ADD, i32, 3, row, whole_number(b, SDPA_KEYS), NULL,
                       inner(b, i32, S));
    return pointwise_as(b, CUDNN_POINTWISE_SUB, i32, 3, row, whole_number(b, SDPA_ROWS), NULL,
                        inner(b, i32, S));
}

/* s, or -inf where a row does not see a key. */
static node hide(builder *b, node s)
{
    node row, column, shown;

    if (!b->form->causal)
        return s;
    row = last_seen(b, s);
    column = pointwise_as(b, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_FLOAT, 3, s, NULL, NULL,
                          inner(b, CUDNN_DATA_INT32, b->form->S));
    shown = pointwise_as(b, CUDNN_POINTWISE_CMP_GE, CUDNN_DATA_BOOLEAN, -1, row, column, NULL,
                         inner(b, CUDNN_DATA_BOOLEAN, b->form->S));
    return pointwise_as(b, CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT, -1, s,
                        number(b, SDPA_HIDDEN), shown, scores(b));
}

static void forward(builder *b)
{
    node q = heads(b, SDPA_Q, 0), k = heads(b, SDPA_K, 1), v = heads(b, SDPA_V, 0);
    node s = matmul(b, q, k, scores(b));
    node most, e, sum, log;

    s = pointwise(b, CUDNN_POINTWISE_MUL, s, number(b, SDPA_SCALE), scores(b));
    s = add_bias(b, s);
    s = hide(b, s);
    most = reduce(b, CUDNN_REDUCE_TENSOR_MAX, s, row_values(b));
    s = pointwise(b, CUDNN_POINTWISE_SUB, s, most, scores(b));
    e = pointwise(b, CUDNN_POINTWISE_EXP, s, NULL, scores(b));
    sum = reduce(b, CUDNN_REDUCE_TENSOR_ADD, e, row_values(b));
    log = pointwise(b, CUDNN_POINTWISE_LOG, sum, NULL, row_values(b));
    pointwise(b, CUDNN_POINTWISE_ADD, most, log, outer(b, SDPA_LSE, 1));
    e = pointwise(b, CUDNN_POINTWISE_DIV, e, sum, inner(b, storage(b), b->form->S));
    matmul(b, e, v, heads(b, SDPA_Y, 0));
}

/* [B, H, S, T] without memory: the transpose of dense [B, H, T, S]. */
static node flipped(builder *b)
{
    const sdpa_form *f = b->form;
    const int64_t size[4] = {f->B, f->H, f->S, f->T};
    const int64_t stride[4] = {f->H * f->T * f->S, f->T * f->S, 1, f->S};

    return tensor(b, storage(b), size, stride, true, false, b->next++);
}

/* to = xᵀ y, summed over the heads that share a key head. */
static void gather(builder *b, node x, node y, int to)
{
    const sdpa_form *f = b->form;
    const int64_t size[4] = {f->B, f->H, f->S, f->D};
    const int64_t stride[4] = {f->H * f->S * f->D, f->S * f->D, f->D, 1};

    if (f->H == f->G)
        matmul(b, x, y, heads(b, to, 0));
    else
        reduce(b, CUDNN_REDUCE_TENSOR_ADD,
               matmul(b, x, y, tensor(b, storage(b), size, stride, true, false, b->next++)),
               heads(b, to, 0));
}

/* k as [B, G, S, D] again, without memory. */
static node k_upright(builder *b)
{
    const sdpa_form *f = b->form;
    const int64_t *s = f->stride[SDPA_K];
    const int64_t size[4] = {f->B, f->G, f->S, f->D}, stride[4] = {s[0], s[2], s[1], 1};

    return tensor(b, storage(b), size, stride, true, false, b->next++);
}

static void backward(builder *b)
{
    node q = heads(b, SDPA_Q, 0), k = heads(b, SDPA_K, 1), v = heads(b, SDPA_V, 1);
    node y = heads(b, SDPA_Y, 0), dy = heads(b, SDPA_DY, 0), scale = number(b, SDPA_SCALE);
    node delta = outer(b, SDPA_DELTA, 1), product = inner(b, CUDNN_DATA_FLOAT, b->form->D);
    node s, w, dw, ds, sum;

    product = pointwise(b, CUDNN_POINTWISE_MUL, dy, y, product);
    sum = reduce(b, CUDNN_REDUCE_TENSOR_ADD, product, row_values(b));
    pointwise(b, CUDNN_POINTWISE_MUL, sum, number(b, SDPA_ONE), delta);
    s = matmul(b, q, k, scores(b));
    s = pointwise(b, CUDNN_POINTWISE_MUL, s, scale, scores(b));
    s = add_bias(b, s);
    s = pointwise(b, CUDNN_POINTWISE_SUB, s, outer(b, SDPA_LSE, 1), scores(b));
    s = hide(b, s);
    w = pointwise(b, CUDNN_POINTWISE_EXP, s, NULL, scores(b));
    gather(b, reshape(b, w, flipped(b)), dy, SDPA_DV);
    dw = matmul(b, dy, v, scores(b));
    dw = pointwise(b, CUDNN_POINTWISE_SUB, dw, delta, scores(b));
    dw = pointwise(b, CUDNN_POINTWISE_MUL, dw, w, scores(b));
    ds = pointwise(b, CUDNN_POINTWISE_MUL, dw, scale, inner(b, storage(b), b->form->S));
    gather(b, reshape(b, ds, flipped(b)), q, SDPA_DK);
    k = reshape(b, k, k_upright(b));
    if (b->form->deterministic) {
        matmul(b, ds, k, heads(b, SDPA_DQ, 0));
    } else {
        sum = matmul(b, ds, k, outer(b, SDPA_DQ_SUM, b->form->D));
        pointwise(b, CUDNN_POINTWISE_IDENTITY, sum, NULL, heads(b, SDPA_DQ, 0));
    }
}

/* ---- the graph, and what cuDNN has for it */

static void find_configs(sdpa_graph *g, node graph, node properties)
{
    cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
    node heuristics = make(g, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
    int64_t count = 0;

    set_node(g, heuristics, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph);
    set(g, heuristics, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    if (properties)
        set_node(g, heuristics, CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, properties);
    finalize(g, heuristics, "no engine takes the graph");
    for (int i = 0; i < SDPA_MOST_CONFIGS; i++)
        g->configs[i] = make(g, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    if (!g->failed)
        fine(g,
             g->cudnn->BackendGetAttribute(heuristics, CUDNN_ATTR_ENGINEHEUR_RESULTS,
                                           CUDNN_TYPE_BACKEND_DESCRIPTOR, SDPA_MOST_CONFIGS, &count,
                                           g->configs),
             "engines");
    g->config_count = count < SDPA_MOST_CONFIGS ? (int)count : SDPA_MOST_CONFIGS;
    if (!g->failed && !count) {
        g->failed = "engines";
        snprintf(g->why, sizeof g->why, "no engine takes the graph");
    }
}

int sdpa_graph_make(sdpa_graph *g, const ds_cudnn_library *cudnn, const sdpa_form *form,
                    cudnnHandle_t handle, cudnnBackendDescriptor_t properties)
{
    builder b = {g, form, {}, 0, SDPA_TENSORS};
    node graph;

    memset(g, 0, sizeof *g);
    g->cudnn = cudnn;
    if (form->backward)
        backward(&b);
    else
        forward(&b);
    graph = make(g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    set(g, graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, b.op_count, b.ops);
    if (handle)
        set(g, graph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
    finalize(g, graph, "graph");
    find_configs(g, graph, properties);
    return g->failed ? -1 : 0;
}

int64_t sdpa_graph_workspace(const sdpa_graph *g, int i)
{
    int64_t bytes = 0, count = 0;

    g->cudnn->BackendGetAttribute(g->configs[i], CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE,
                                  CUDNN_TYPE_INT64, 1, &count, &bytes);
    return bytes;
}

void sdpa_graph_free(sdpa_graph *g)
{
    while (g->owned_count)
        g->cudnn->BackendDestroyDescriptor(g->owned[--g->owned_count]);
}

#endif
