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

/* How a graph is asked for. mask: an sdpa_bias, same for all of a dimension where `one` has its bit: 1
 * batches, 2 heads, 4 rows. */
typedef struct kind {
    int backward, deterministic, causal, f16, mask, one;
} kind;

static const ds_cudnn_library *cudnn;
static cudnnBackendDescriptor_t h200;

static void set_request(sdpa_request *r, const shape *z, const kind *k)
{
    memset(r, 0, sizeof *r);
    r->backward = k->backward;
    r->deterministic = k->deterministic;
    r->causal = k->causal;
    r->f16 = k->f16;
    r->mask = k->mask;
    r->mask_size[0] = k->one & 1 ? 1 : z->B;
    r->mask_size[1] = k->one & 2 ? 1 : z->H;
    r->mask_size[2] = k->one & 4 ? 1 : z->T;
    r->B = z->B, r->H = z->H, r->G = z->G, r->T = z->T, r->S = z->S, r->D = z->D;
    for (int i = SDPA_Q; i < SDPA_HEADS; i++) {
        int is_key = i == SDPA_K || i == SDPA_V || i == SDPA_DK || i == SDPA_DV;
        int is_packed = z->packed && i != SDPA_Y && i != SDPA_DY;
        int64_t row = (is_packed ? z->H + 2 * z->G : is_key ? z->G : z->H) * z->D;

        r->stride[i][0] = row * (is_key ? z->S : z->T);
        r->stride[i][1] = row;
        r->stride[i][2] = z->D;
    }
}

static void report(const shape *z, const kind *k, const char *what)
{
    printf("B %d H %d G %d T %d S %d D %d%s %s%s%s %s mask %d, same for %d: %s\n", (int)z->B,
           (int)z->H, (int)z->G, (int)z->T, (int)z->S, (int)z->D, z->packed ? " packed" : "",
           k->backward ? "backward" : "forward", k->deterministic ? " deterministic" : "",
           k->causal ? " causal" : "", k->f16 ? "f16" : "bf16", k->mask, k->one, what);
}

/* Whether a call is refused, or cuDNN has an engine for its graph and says of its memory what is expected. */
static void ask(const shape *z, kind k, int expected)
{
    sdpa_request request;
    sdpa_form form;
    sdpa_graph g;
    const char *refused;
    int found, fine;

    set_request(&request, z, &k);
    refused = sdpa_form_of(&form, &request);
    found = !refused && sdpa_graph_make(&g, cudnn, &form, NULL, h200) == 0 && g.config_count > 0;
    fine = found == expected;
    /* The deterministic graph keeps dw, the other does not. */
    if (fine && found && k.backward && z->T >= 1024 && z->S >= 1024)
        fine = (sdpa_graph_workspace(&g, 0) >= 2 * form.B * form.H * form.T * form.S) ==
               k.deterministic;
    passed += fine;
    failed += !fine;
    if (!fine)
        report(z, &k, refused ? refused : found ? "an engine" : g.why);
    if (!refused)
        sdpa_graph_free(&g);
}

/* Forward, and backward by both graphs. */
static void ask_three(const shape *z, kind k, int backward)
{
    ask(z, k, 1);
    k.backward = 1;
    ask(z, k, backward);
    k.deterministic = 1;
    ask(z, k, backward);
}

static void ask_all(const shape *z, int backward)
{
    for (int f16 = 0; f16 < 2; f16++) {
        ask_three(z, kind{0, 0, 0, f16, 0, 0}, backward);
        ask_three(z, kind{0, 0, 0, f16, f16 ? SDPA_BIAS_F32 : SDPA_BIAS_BF16, 2}, backward);
    }
}

static void ask_causal(const shape *z)
{
    for (int f16 = 0; f16 < 2; f16++)
        ask_three(z, kind{0, 0, 1, f16, 0, 0}, 1);
}

static void ask_masks(const shape *z, int causal)
{
    static const int same_for[] = {0, 2, 3, 6};

    for (int one : same_for) {
        ask_three(z, kind{0, 0, causal, 0, SDPA_BIAS_BF16, one}, 1);
        ask_three(z, kind{0, 0, causal, 0, SDPA_BIAS_F32, one}, 1);
        ask_three(z, kind{0, 0, causal, 1, SDPA_BIAS_F32, one}, 1);
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

/* Each shape, backward and forward; those of the second list have backward engines that would not hide
 * what is beyond the edges, unless causality does. */
static void ask_shapes(void)
{
    static const shape shapes[] = {
        {16, 12, 12, 1024, 1024, 64, 1},                           /* GPT-2 124M */
        {4, 25, 25, 1024, 1024, 64, 1},                            /* GPT-2 1558M */
        {1, 32, 8, 2048, 2048, 128, 1},                            /* grouped, packed */
        {2, 8, 1, 512, 512, 128, 0},                               /* one key head */
        {2, 4, 4, 100, 500, 64, 0},                                /* T != S */
        {2, 4, 2, 333, 77, 128, 0},      {1, 1, 1, 32, 32, 64, 1}, /* the least rows */
        {3, 5, 5, 1000, 1000, 72, 1},    {1, 4, 4, 128, 384, 80, 0}, {2, 4, 2, 96, 417, 256, 0},
    };
    static const shape edges[] = {
        {2, 4, 4, 576, 576, 64, 1}, {2, 4, 4, 64, 192, 96, 0}, {2, 4, 4, 333, 512, 64, 0}};
    static const shape wrong[] = {{1, 2, 2, 64, 64, 12, 0}, {1, 2, 2, 31, 64, 64, 0}};

    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        ask_all(&shapes[i], 1);
        ask_causal(&shapes[i]);
    }
    for (size_t i = 0; i < sizeof edges / sizeof *edges; i++)
        ask_all(&edges[i], 0);
    ask_causal(&edges[0]);
    ask_causal(&edges[1]);
    ask(&edges[2], kind{1, 1, 1, 0, 0, 0}, 0);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        ask(&wrong[i], kind{}, 0);
}

int main(void)
{
    static const shape masked[] = {
        {2, 4, 4, 256, 256, 64, 1}, {3, 6, 2, 250, 333, 128, 0}, {2, 4, 4, 300, 200, 96, 0}};

    if (!(cudnn = ds_cudnn())) {
        printf("skipped: %s\n0 passed, 0 failed, 1 skipped\n", ds_cudnn_why());
        return 0;
    }
    if (!describe_h200()) {
        printf("cuDNN does not take the description of an H200\n0 passed, 1 failed, 0 skipped\n");
        return 1;
    }
    ask_shapes();
    for (size_t i = 0; i < sizeof masked / sizeof *masked; i++) {
        ask_masks(&masked[i], 0);
        ask_masks(&masked[i], 1);
    }
    for (int64_t D = 8; D <= 256; D += 8) {
        const shape z = {2, 4, 4, 160, 160, D, 1};

        ask_three(&z, kind{0, 0, 1, 0, 0, 0}, 1);
        ask_three(&z, kind{0, 0, 0, 0, SDPA_BIAS_BF16, 6}, 1);
    }
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
