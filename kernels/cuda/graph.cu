/* graph.cu - records what is asked of the kernels' stream, and does all of it again with one launch.
 *
 * While a graph is recorded nothing is done on the device. The mode is the relaxed one: memory may still
 * be taken, and other streams and threads are left alone. What a graph reads and writes lies where it
 * lay when it was recorded: who records has to see to that (alloc.c's sets, device.cu's scratch memory).
 */
#include "kernels/cuda/device.h"

static int graph_begin(void)
{
    if (ds_cuda.capturing)
        return ds_fail(DS_EINVAL, "graph: one is being recorded already");
    DS_TRY(ds_cuda_check(cudaStreamBeginCapture(ds_cuda.stream, cudaStreamCaptureModeRelaxed),
                         "graph"));
    ds_cuda.capturing = 1;
    return 0;
}

static int graph_end(void **out)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t made = NULL;
    cudaError_t code = cudaStreamEndCapture(ds_cuda.stream, &graph);

    ds_cuda.capturing = 0;
    if (!out) { /* whatever went wrong in it, it is over */
        cudaGetLastError();
        if (graph)
            cudaGraphDestroy(graph);
        return 0;
    }
    DS_TRY(ds_cuda_check(code, "graph"));
    code = cudaGraphInstantiate(&made, graph, 0);
    cudaGraphDestroy(graph);
    DS_TRY(ds_cuda_check(code, "graph"));
    ds_cuda.graphs++;
    ds_cuda.counters.captures++;
    *out = made;
    return 0;
}

static int graph_run(void *graph)
{
    ds_cuda.counters.replays++;
    DS_TRY(ds_cuda_check(cudaGraphLaunch((cudaGraphExec_t)graph, ds_cuda.stream), "graph"));
    return ds_cuda.sync ? ds_cuda_wait("graph") : 0;
}

/* Where it runs still, CUDA frees it afterwards. */
static void graph_free(void *graph)
{
    cudaGraphExecDestroy((cudaGraphExec_t)graph);
    ds_cuda.graphs--;
}

void ds_cuda_fill_graphs(ds_backend *backend)
{
    backend->graph_begin = graph_begin;
    backend->graph_end = graph_end;
    backend->graph_run = graph_run;
    backend->graph_free = graph_free;
}
