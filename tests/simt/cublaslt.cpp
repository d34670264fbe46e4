/* cublaslt.cpp - the part of cuBLASLt that the backend calls, by plain loops in f32.
 *
 * It checks what cuBLASLt would: leading dimensions, alignments that were promised, an algorithm that
 * was made for this product. It offers two algorithms, the second of them faster; and has none for an
 * epilogue whose operands are not aligned to 16 bytes, or finds out late that it has none (k of 1000),
 * so that the ways around are tried as well.
 */
#include "simt.h"

#include <cublasLt.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <vector>

#include "kernels/scalar.h"

namespace
{

struct operation {
    cublasComputeType_t compute;
    cublasOperation_t a, b;
    uint32_t epilogue;
    void *bias;
    void *aux;
    int64_t aux_ld;
};

struct layout {
    cudaDataType type;
    int32_t batch;
    int64_t rows, cols, ld, step;
};

struct preference {
    size_t workspace;
    uint32_t schemes, align[4];
};

static_assert(sizeof(operation) <= sizeof(cublasLtMatmulDescOpaque_t), "room for an operation");
static_assert(sizeof(layout) <= sizeof(cublasLtMatrixLayoutOpaque_t), "room for a layout");
static_assert(sizeof(preference) <= sizeof(cublasLtMatmulPreferenceOpaque_t), "room for a wish");

const uint64_t MADE = 0x616c676f; /* in every algorithm that was offered */

int64_t size_of(cudaDataType type)
{
    return type == CUDA_R_32F ? 4 : 2;
}

float load(const void *p, int64_t i, cudaDataType type)
{
    return type == CUDA_R_32F    ? ((const float *)p)[i]
           : type == CUDA_R_16BF ? ds_bf16_to_f32(((const uint16_t *)p)[i])
                                 : ds_f16_to_f32(((const uint16_t *)p)[i]);
}

void store(void *p, int64_t i, cudaDataType type, float v)
{
    if (type == CUDA_R_32F)
        ((float *)p)[i] = v;
    else if (type == CUDA_R_16BF)
        ((uint16_t *)p)[i] = ds_f32_to_bf16(v);
    else
        ((uint16_t *)p)[i] = ds_f32_to_f16(v);
}

[[noreturn]] void wrong(const char *what)
{
    fprintf(stderr, "simt: cublasLtMatmul: %s\n", what);
    abort();
}

/* Whether a, b and d are matrices that make a product. */
bool fits(const operation &o, const layout &a, const layout &b, const layout &d)
{
    bool ta = o.a == CUBLAS_OP_T, tb = o.b == CUBLAS_OP_T;
    int64_t k = ta ? a.rows : a.cols;

    return a.ld >= a.rows && b.ld >= b.rows && d.ld >= d.rows && d.rows > 0 && d.cols > 0 &&
           k > 0 && (ta ? a.cols : a.rows) == d.rows && (tb ? b.rows : b.cols) == d.cols &&
           (tb ? b.cols : b.rows) == k && a.batch == d.batch && b.batch == d.batch &&
           a.type == b.type && (d.type == a.type || d.type == CUDA_R_32F) && d.batch > 0 &&
           d.batch <= 65535 && (d.batch == 1 || d.step != 0);
}

/* What an epilogue does: cublasLt.h at cublasLtEpilogue_t. */
struct beside {
    bool known, bias, gelu, aux, slope, sum_d, sum_a, sum_b;
};

beside beside_of(uint32_t epilogue)
{
    beside b = {true, false, false, false, false, false, false, false};

    switch (epilogue) {
    case CUBLASLT_EPILOGUE_DEFAULT:
        break;
    case CUBLASLT_EPILOGUE_BIAS:
        b.bias = true;
        break;
    case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
        b.bias = b.gelu = b.aux = true;
        break;
    case CUBLASLT_EPILOGUE_GELU_AUX:
        b.gelu = b.aux = true;
        break;
    case CUBLASLT_EPILOGUE_DGELU_BGRAD:
        b.slope = b.aux = b.sum_d = true;
        break;
    case CUBLASLT_EPILOGUE_DGELU:
        b.slope = b.aux = true;
        break;
    case CUBLASLT_EPILOGUE_BGRADA:
        b.sum_a = true;
        break;
    case CUBLASLT_EPILOGUE_BGRADB:
        b.sum_b = true;
        break;
    default:
        b.known = false;
    }
    return b;
}

/* As documented: aux's ld no less than d's rows and divisible by 8; vectors without gaps, of d's type.
 * With batches their strides would have to be told. */
bool epilogue_fits(const operation &o, const layout &d)
{
    beside b = beside_of(o.epilogue);
    bool vector = b.bias || b.sum_d || b.sum_a || b.sum_b;

    if (!b.known || ((b.aux || vector) && d.batch != 1))
        return false;
    if (b.aux && (!o.aux || (uintptr_t)o.aux % 16 || o.aux_ld < d.rows || o.aux_ld % 8))
        return false;
    return !vector || (o.bias && (uintptr_t)o.bias % 16 == 0);
}

void multiply_one(const operation &o, float alpha, const char *a, const layout &la, const char *b,
                  const layout &lb, float beta, char *d, const layout &ld)
{
    bool ta = o.a == CUBLAS_OP_T, tb = o.b == CUBLAS_OP_T;
    int64_t k = ta ? la.rows : la.cols;
    beside e = beside_of(o.epilogue);
    std::vector<float> sums((size_t)ld.rows);

    for (int64_t j = 0; j < ld.cols; j++)
        for (int64_t i = 0; i < ld.rows; i++) {
            float sum = 0, v;

            for (int64_t l = 0; l < k; l++)
                sum += load(a, ta ? i * la.ld + l : l * la.ld + i, la.type) *
                       load(b, tb ? l * lb.ld + j : j * lb.ld + l, lb.type);
            v = alpha * sum;
            if (beta != 0)
                v += beta * load(d, j * ld.ld + i, ld.type);
            if (e.bias)
                v += load(o.bias, i, ld.type);
            if (e.gelu) {
                store(o.aux, j * o.aux_ld + i, ld.type, v);
                v = ds_gelu_tanh_f32(v);
            }
            if (e.slope)
                v *= ds_gelu_tanh_slope_f32(load(o.aux, j * o.aux_ld + i, ld.type));
            sums[i] += v;
            store(d, j * ld.ld + i, ld.type, v);
        }
    for (int64_t i = 0; e.sum_d && i < ld.rows; i++)
        store(o.bias, i, ld.type, sums[i]);
}

/* The sums of x over k, for each of n rows or columns; `across`: k steps by ld. */
void sum_operand(const operation &o, const char *x, const layout &l, int64_t n, int64_t k,
                 bool across, cudaDataType type)
{
    for (int64_t i = 0; i < n; i++) {
        float sum = 0;

        for (int64_t j = 0; j < k; j++)
            sum += load(x, across ? j * l.ld + i : i * l.ld + j, l.type);
        store(o.bias, i, type, sum);
    }
}

/* What BGRADA and BGRADB want beside the product. */
void sum_operands(const operation &o, const char *a, const layout &la, const char *b,
                  const layout &lb, const layout &ld)
{
    beside e = beside_of(o.epilogue);
    int64_t k = o.a == CUBLAS_OP_T ? la.rows : la.cols;

    if (e.sum_a)
        sum_operand(o, a, la, ld.rows, k, o.a != CUBLAS_OP_T, ld.type);
    if (e.sum_b)
        sum_operand(o, b, lb, ld.cols, k, o.b == CUBLAS_OP_T, ld.type);
}

template <typename V> cublasStatus_t take(V *to, const void *from, size_t bytes)
{
    if (bytes != sizeof *to)
        return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to, from, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

bool aligned(const void *p, const preference &w, int which)
{
    return (uintptr_t)p % w.align[which] == 0;
}

} // namespace

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t *out)
{
    *out = (cublasLtHandle_t)malloc(1);
    return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion(void)
{
    return 130000;
}
const char *cublasLtGetStatusString(cublasStatus_t)
{
    return "an error of the simulated cuBLASLt";
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t d, size_t,
                                               cublasComputeType_t compute, cudaDataType_t)
{
    operation o = {compute, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, NULL, NULL, 0};

    memcpy(d, &o, sizeof o);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                              cublasLtMatmulDescAttributes_t what, const void *from,
                                              size_t bytes)
{
    operation *o = (operation *)d;

    return what == CUBLASLT_MATMUL_DESC_TRANSA                 ? take(&o->a, from, bytes)
           : what == CUBLASLT_MATMUL_DESC_TRANSB               ? take(&o->b, from, bytes)
           : what == CUBLASLT_MATMUL_DESC_EPILOGUE             ? take(&o->epilogue, from, bytes)
           : what == CUBLASLT_MATMUL_DESC_BIAS_POINTER         ? take(&o->bias, from, bytes)
           : what == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER ? take(&o->aux, from, bytes)
           : what == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD      ? take(&o->aux_ld, from, bytes)
                                                               : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t l, size_t,
                                                 cudaDataType type, uint64_t rows, uint64_t cols,
                                                 int64_t ld)
{
    layout x = {type, 1, (int64_t)rows, (int64_t)cols, ld, 0};

    memcpy(l, &x, sizeof x);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l,
                                                cublasLtMatrixLayoutAttribute_t what,
                                                const void *from, size_t bytes)
{
    layout *x = (layout *)l;

    return what == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT            ? take(&x->batch, from, bytes)
           : what == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET ? take(&x->step, from, bytes)
                                                                 : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t p, size_t)
{
    preference w = {0, CUBLASLT_REDUCTION_SCHEME_MASK, {256, 256, 256, 256}};

    memcpy(p, &w, sizeof w);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                    cublasLtMatmulPreferenceAttributes_t what,
                                                    const void *from, size_t bytes)
{
    preference *w = (preference *)p;

    return what == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES     ? take(&w->workspace, from, bytes)
           : what == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK ? take(&w->schemes, from, bytes)
           : what == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES ? take(&w->align[0], from, bytes)
           : what == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES ? take(&w->align[1], from, bytes)
           : what == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES ? take(&w->align[2], from, bytes)
           : what == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES ? take(&w->align[3], from, bytes)
                                                                : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d,
                                              cublasLtMatrixLayout_t la, cublasLtMatrixLayout_t lb,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t ld,
                                              cublasLtMatmulPreference_t p, int most,
                                              cublasLtMatmulHeuristicResult_t *results, int *found)
{
    const operation &o = *(operation *)d;
    const preference &w = *(preference *)p;

    *found = 0;
    if (!fits(o, *(layout *)la, *(layout *)lb, *(layout *)ld))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (!epilogue_fits(o, *(layout *)ld))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    for (int i = 0; i < 2 && i < most; i++) {
        memset(&results[i], 0, sizeof results[i]);
        results[i].algo.data[0] = MADE;
        results[i].algo.data[1] = (uint64_t)i;
        memcpy(&results[i].algo.data[2], &w, sizeof w);
        results[i].state = CUBLAS_STATUS_SUCCESS;
        ++*found;
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t la, const void *b,
                              cublasLtMatrixLayout_t lb, const void *beta, const void *c,
                              cublasLtMatrixLayout_t, void *d, cublasLtMatrixLayout_t ld,
                              const cublasLtMatmulAlgo_t *algo, void *workspace, size_t bytes,
                              cudaStream_t stream)
{
    operation o = *(operation *)desc;
    layout x = *(layout *)la, y = *(layout *)lb, z = *(layout *)ld;
    float s = *(const float *)alpha, t = *(const float *)beta;
    preference w;

    memcpy(&w, &algo->data[2], sizeof w);
    if (algo->data[0] != MADE || !fits(o, x, y, z) || !epilogue_fits(o, z))
        wrong("an algorithm that was not made for this");
    if (!aligned(a, w, 0) || !aligned(b, w, 1) || !aligned(d, w, 3) || c != d)
        wrong("an operand is not aligned as was promised");
    if (bytes < w.workspace || !workspace)
        wrong("there is less workspace than was promised");
    if (o.epilogue != CUBLASLT_EPILOGUE_DEFAULT && o.a == CUBLAS_OP_N && x.cols == 1000)
        return CUBLAS_STATUS_NOT_SUPPORTED; /* as if the heuristic had been wrong */
    if (algo->data[1] == 0) {               /* the first is slower, where that can matter */
        struct timespec pause = {0, 200000};
        const char *tune = getenv("DS_TUNE");

        if (!tune || strcmp(tune, "0"))
            nanosleep(&pause, NULL);
    }
    simt::enqueue(stream, [=] {
        sum_operands(o, (const char *)a, x, (const char *)b, y, z);
        for (int64_t i = 0; i < z.batch; i++)
            multiply_one(o, s, (const char *)a + i * x.step * size_of(x.type), x,
                         (const char *)b + i * y.step * size_of(y.type), y, t,
                         (char *)d + i * z.step * size_of(z.type), z);
    });
    return CUBLAS_STATUS_SUCCESS;
}

} // extern "C"
