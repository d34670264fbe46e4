/* test_cudnn.cpp - that cuDNN has engines for every graph of attention that is built here, on an H200.
 *
 * It needs no GPU: cuDNN is told of one by its properties (tests/cuda/h200_device.json), and the
 * toolkit's stub of libcuda stands in for the driver. It is asked for engines, none is run. Prints
 * N passed, N failed, N skipped.
 */
#include <stdio.h>
#include <string.h>

#include "kernels/cuda/attention_graph.h"

static int passed, failed;

#ifdef DS_HAS_CUDNN

typedef struct shape {
    int64_t B, H, G, T, S, D;
    int packed; /* q, k, v and their gradients are parts of [B, T, (H + 2 G) D] */
} shape;

static const ds_cudnn_library *cudnn;
static cudnnBackendDescriptor_t h200;

static void set_form(sdpa_form *f, const shape *z, int backward, int deterministic, int causal,
                     int f16)
{
    memset(f, 0, sizeof *f);
    f->backward = backward;
    f->deterministic = deterministic;
    f->causal = causal;
    f->f16 = f16;
    f->B = z->B, f->H = z->H, f->G = z->G, f->T = z->T, f->S = z->S, f->D = z->D;
    for (int i = SDPA_Q; i < SDPA_HEADS; i++) {
        int is_key = i == SDPA_K || i == SDPA_V || i == SDPA_DK || i == SDPA_DV;
        int is_packed = z->packed && i != SDPA_Y && i != SDPA_DY;
        int64_t row = (is_packed ? z->H + 2 * z->G : is_key ? z->G : z->H) * z->D;

        f->stride[i][0] = row * (is_key ? z->S : z->T);
        f->stride[i][1] = row;
        f->stride[i][2] = z->D;
    }
}

/* Whether cuDNN has an engine; a plain one says of its memory what is expected of it. */
static void ask(const shape *z, int backward, int deterministic, int causal, int f16, int expected)
{
    sdpa_form form;
    sdpa_graph g;
    int found, fine;

    set_form(&form, z, backward, deterministic, causal, f16);
    found = sdpa_graph_make(&g, cudnn, &form, NULL, h200) == 0 && g.config_count > 0;
    fine = found == expected;
    /* The deterministic graph keeps dw, the other does not. */
    if (fine && found && backward && z->T >= 1024)
        fine = (sdpa_graph_workspace(&g, 0) >= 2 * z->B * z->H * z->T * z->S) == deterministic;
    passed += fine;
    failed += !fine;
    if (!fine)
        printf("B %d H %d G %d T %d S %d D %d%s %s%s%s %s: %s, workspace %lld bytes\n", (int)z->B,
               (int)z->H, (int)z->G, (int)z->T, (int)z->S, (int)z->D, z->packed ? " packed" : "",
               backward ? "backward" : "forward", deterministic ? " deterministic" : "",
               causal ? " causal" : "", f16 ? "f16" : "bf16", found ? "an engine" : g.why,
               found ? (long long)sdpa_graph_workspace(&g, 0) : -1);
    sdpa_graph_free(&g);
}

static void ask_all(const shape *z)
{
    for (int f16 = 0; f16 < 2; f16++)
        for (int causal = 0; causal <= (z->T == z->S); causal++) {
            ask(z, 0, 0, causal, f16, 1);
            ask(z, 1, 0, causal, f16, 1);
            ask(z, 1, 1, causal, f16, 1);
        }
}

static int describe_h200(void)
{
    static char json[4096];
    FILE *f = fopen("tests/cuda/h200_device.json", "rb");
    size_t bytes = f ? fread(json, 1, sizeof json, f) : 0;

    if (f)
        fclose(f);
    return bytes && bytes < sizeof json &&
           cudnn->BackendCreateDescriptor(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, &h200) ==
               CUDNN_STATUS_SUCCESS &&
           cudnn->BackendSetAttribute(h200, CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION,
                                      CUDNN_TYPE_CHAR, (int64_t)bytes,
                                      json) == CUDNN_STATUS_SUCCESS &&
           cudnn->BackendFinalize(h200) == CUDNN_STATUS_SUCCESS;
}

int main(void)
{
    static const shape shapes[] = {
        {16, 12, 12, 1024, 1024, 64, 1},                           /* GPT-2 124M */
        {4, 25, 25, 1024, 1024, 64, 1},                            /* GPT-2 1558M */
        {1, 32, 8, 2048, 2048, 128, 1},                            /* grouped, packed */
        {2, 8, 1, 512, 512, 128, 0},                               /* one key head */
        {2, 4, 4, 100, 500, 64, 0},                                /* T != S */
        {2, 4, 2, 333, 77, 128, 0},      {1, 1, 1, 32, 32, 64, 1}, /* the least rows */
        {3, 5, 5, 1000, 1000, 72, 1},
    };
    static const shape wrong = {1, 2, 2, 64, 64, 12, 0};

    if (!(cudnn = ds_cudnn())) {
        printf("skipped: %s\n0 passed, 0 failed, 1 skipped\n", ds_cudnn_why());
        return 0;
    }
    if (!describe_h200()) {
        printf("cuDNN does not take the description of an H200\n0 passed, 1 failed, 0 skipped\n");
        return 1;
    }
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        ask_all(&shapes[i]);
    for (int64_t D = 8; D <= 256; D += 8) {
        const shape z = {2, 4, 4, 160, 160, D, 1};

        ask(&z, 0, 0, 1, 0, 1);
        ask(&z, 1, 1, 1, 0, 1);
        ask(&z, 1, 0, 1, 0, 1);
    }
    ask(&wrong, 0, 0, 0, 0, 0);
    printf("%d passed, %d failed, 0 skipped\n", passed, failed);
    return failed != 0;
}

#else

int main(void)
{
    printf("skipped: there was no cuDNN to build with\n0 passed, 0 failed, 1 skipped\n");
    return passed + failed;
}

#endif
