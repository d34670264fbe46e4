/* gemm_plan.cu - cuBLASLt: descriptors and algorithms, made once for every kind of product.
 *
 * A plan is kept for each key: descriptors, and the algorithm. cuBLASLt offers several, the best by its
 * own estimate first, and that order depends on nothing but key, GPU and version of the library. They
 * are timed when a key is first met by anyone who shares the file of choices (gemm_choices.cu), on the
 * operands given, into memory of its own where the result is added to; never while a stream is
 * captured. What could not be timed is the first, and no choice is kept.
 *
 * Left out are algorithms that split k and add the parts in the result's own precision.
 */
#include "kernels/cuda/gemm_plan.h"

#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

#define CANDIDATES 8
#define WORKSPACE ((size_t)32 << 20) /* what cuBLAS takes for itself on Hopper */
#define PLANS 4096                   /* more than that: all begin anew */
#define BUCKETS 1024                 /* a power of 2 */

typedef struct plan {
    gemm_key key;
    cublasLtMatmulDescOpaque_t operation;
    cublasLtMatrixLayoutOpaque_t a, b, d;
    cublasLtMatmulAlgo_t algorithm;
    int possible; /* 0: cuBLASLt has nothing for this key */
    struct plan *next;
} plan;

static struct {
    cublasLtHandle_t handle;
    plan *bucket[BUCKETS];
    plan *last; /* the one used before: often the same again */
    int kept;
} cache;

/* For tests: plans made, products run, candidates timed, products with something beside. */
extern "C" {
typedef struct ds_cuda_gemm_counters {
    int64_t plans, products, timed, beside;
} ds_cuda_gemm_counters;
ds_cuda_gemm_counters ds_cuda_gemm_count;
}

static int check(cublasStatus_t status, const char *name)
{
    if (status == CUBLAS_STATUS_SUCCESS)
        return 0;
    if (status == CUBLAS_STATUS_ALLOC_FAILED)
        return ds_fail(DS_ENOMEM, "%s: cuBLASLt is out of memory", name);
    return ds_fail(DS_EIO, "%s: cuBLASLt: %s", name, cublasLtGetStatusString(status));
}

#define TRY(call) DS_TRY(check(call, name))

/* ---- descriptors */

static cudaDataType type_of(int64_t dtype)
{
    return dtype == DS_F32 ? CUDA_R_32F : dtype == DS_BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

/* DS_TF32=1: products of f32 with 10 bits of mantissa, as fast as half of bf16's. */
static cublasComputeType_t compute_type(int64_t dtype)
{
    const char *tf32 = getenv("DS_TF32");

    return dtype == DS_F32 && tf32 && !strcmp(tf32, "1") ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                         : CUBLAS_COMPUTE_32F;
}

static cublasStatus_t set(plan *p, cublasLtMatmulDescAttributes_t what, const void *value,
                          size_t bytes)
{
    return cublasLtMatmulDescSetAttribute(&p->operation, what, value, bytes);
}

/* [rows, cols] by columns as it lies in memory. */
static int layout(const char *name, cublasLtMatrixLayoutOpaque_t *out, int64_t dtype, int64_t rows,
                  int64_t cols, int64_t ld, int64_t batch, int64_t step)
{
    int32_t count = (int32_t)batch;

    TRY(cublasLtMatrixLayoutInit(out, type_of(dtype), (uint64_t)rows, (uint64_t)cols, ld));
    if (batch == 1)
        return 0;
    TRY(cublasLtMatrixLayoutSetAttribute(out, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                         sizeof count));
    TRY(cublasLtMatrixLayoutSetAttribute(out, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &step,
                                         sizeof step));
    return 0;
}

/* cuBLASLt's epilogue for what is wanted beside the product. Matrices are its own here, by columns: a
 * bias's gradient is sums of d's rows where the activation's slope is applied to d (DGELU_BGRAD), and
 * of the columns of b, over k, where b is what the weight's gradient is made of (BGRADB). All of them
 * give the same bits in every run, as the products do: cuBLAS's manual, "Results reproducibility",
 * says so of all routines for one version, GPU and stream, and this caller owns the workspace. */
static cublasLtEpilogue_t epilogue_of(const gemm_key *k)
{
    if (k->aux == GEMM_BACKWARD)
        return k->bias ? CUBLASLT_EPILOGUE_DGELU_BGRAD : CUBLASLT_EPILOGUE_DGELU;
    if (k->aux)
        return k->bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    return k->bias == GEMM_BACKWARD ? CUBLASLT_EPILOGUE_BGRADB
           : k->bias                ? CUBLASLT_EPILOGUE_BIAS
                                    : CUBLASLT_EPILOGUE_DEFAULT;
}

/* DS_EPILOGUES=0: passes of their own instead, to measure what it saves; =forward: in backward. */
static int is_unwanted(const gemm_key *k)
{
    const char *want = getenv("DS_EPILOGUES");
    int backward = k->aux == GEMM_BACKWARD || k->bias == GEMM_BACKWARD;

    return want && (k->aux || k->bias) &&
           (!strcmp(want, "0") || (backward && !strcmp(want, "forward")));
}

/* Where bias and aux lie changes from call to call. */
static int point(const char *name, plan *p, const gemm_operands *o)
{
    if (p->key.bias)
        TRY(set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &o->bias, sizeof o->bias));
    if (p->key.aux)
        TRY(set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &o->aux, sizeof o->aux));
    return 0;
}

static int describe(const char *name, plan *p, const gemm_operands *o)
{
    const gemm_key *k = &p->key;
    cublasOperation_t a = k->a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t b = k->b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = epilogue_of(k);

    TRY(cublasLtMatmulDescInit(&p->operation, compute_type(k->dtype), CUDA_R_32F));
    TRY(set(p, CUBLASLT_MATMUL_DESC_TRANSA, &a, sizeof a));
    TRY(set(p, CUBLASLT_MATMUL_DESC_TRANSB, &b, sizeof b));
    TRY(set(p, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    if (k->aux)
        TRY(set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &k->m, sizeof k->m));
    DS_TRY(point(name, p, o));
    DS_TRY(layout(name, &p->a, k->dtype, k->a_transposed ? k->k : k->m,
                  k->a_transposed ? k->m : k->k, k->a_ld, k->batch, k->a_step));
    DS_TRY(layout(name, &p->b, k->dtype, k->b_transposed ? k->n : k->k,
                  k->b_transposed ? k->k : k->n, k->b_ld, k->batch, k->b_step));
    return layout(name, &p->d, k->d_dtype, k->m, k->n, k->d_ld, k->batch, k->d_step);
}

/* ---- algorithms */

/* DS_ENOSYS: the heuristic offered what cuBLASLt then has not, with something beside the product. */
static int run(const char *name, plan *p, const gemm_operands *o)
{
    void *workspace = ds_cuda_scratch(DS_CUDA_WORKSPACE, WORKSPACE);
    cublasStatus_t status;

    if (!workspace)
        return DS_ENOMEM;
    status = cublasLtMatmul(cache.handle, &p->operation, &o->alpha, o->a, &p->a, o->b, &p->b,
                            &o->beta, o->d, &p->d, o->d, &p->d, &p->algorithm, workspace, WORKSPACE,
                            ds_cuda.stream);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED && (p->key.bias || p->key.aux))
        return DS_ENOSYS;
    TRY(status);
    return ds_cuda_launched(name);
}

/* The candidates in cuBLASLt's order; *found: how many. */
static int ask(const char *name, plan *p, cublasLtMatmulHeuristicResult_t *results, int *found)
{
    cublasLtMatmulPreferenceOpaque_t wish;
    uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    uint32_t align[4] = {(uint32_t)p->key.a_align, (uint32_t)p->key.b_align,
                         (uint32_t)p->key.d_align, (uint32_t)p->key.d_align};
    const cublasLtMatmulPreferenceAttributes_t whose[4] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    size_t workspace = WORKSPACE;
    cublasStatus_t status;

    TRY(cublasLtMatmulPreferenceInit(&wish));
    TRY(cublasLtMatmulPreferenceSetAttribute(&wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &workspace, sizeof workspace));
    TRY(cublasLtMatmulPreferenceSetAttribute(&wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                             &schemes, sizeof schemes));
    for (int i = 0; i < 4; i++)
        TRY(cublasLtMatmulPreferenceSetAttribute(&wish, whose[i], &align[i], sizeof align[i]));
    status = cublasLtMatmulAlgoGetHeuristic(cache.handle, &p->operation, &p->a, &p->b, &p->d, &p->d,
                                            &wish, CANDIDATES, results, found);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE)
        *found = 0;
    else
        TRY(status);
    int good = 0;
    for (int i = 0; i < *found; i++)
        if (results[i].state == CUBLAS_STATUS_SUCCESS)
            results[good++] = results[i];
    *found = good;
    return 0;
}

/* Milliseconds of one run of a plan's algorithm; negative: it failed. */
static float time_one(const char *name, plan *p, const gemm_operands *o, const cudaEvent_t *events)
{
    const int rounds = 4;
    float ms = -1;

    if (run(name, p, o) < 0) /* once without a clock: it may have to be loaded first */
        return -1;
    cudaEventRecord(events[0], ds_cuda.stream);
    for (int i = 0; i < rounds; i++)
        if (run(name, p, o) < 0)
            return -1;
    cudaEventRecord(events[1], ds_cuda.stream);
    ds_cuda.counters.waits++;
    if (cudaEventSynchronize(events[1]) != cudaSuccess ||
        cudaEventElapsedTime(&ms, events[0], events[1]) != cudaSuccess)
        return -1;
    return ms / (float)rounds;
}

static int fastest(const char *name, plan *p, const gemm_operands *o,
                   const cublasLtMatmulHeuristicResult_t *results, int found)
{
    cudaEvent_t events[2] = {NULL, NULL};
    float least = 0;
    int best = -1;

    if (cudaEventCreateWithFlags(&events[0], cudaEventDefault) == cudaSuccess &&
        cudaEventCreateWithFlags(&events[1], cudaEventDefault) == cudaSuccess)
        for (int i = 0; i < found; i++) {
            p->algorithm = results[i].algo;
            float ms = time_one(name, p, o, events);

            ds_cuda_gemm_count.timed++;
            if (ms > 0 && (least == 0 || ms < least)) {
                least = ms;
                best = i;
            }
        }
    for (int i = 0; i < 2; i++)
        if (events[i])
            cudaEventDestroy(events[i]);
    cudaGetLastError();
    return best;
}

/* Times the candidates; where the result is added to what is there, into other memory, which goes
 * again. The fastest; -1: they could not be timed. */
static int tune(const char *name, plan *p, const gemm_operands *given,
                const cublasLtMatmulHeuristicResult_t *results, int found)
{
    const gemm_key *k = &p->key;
    size_t bytes = (size_t)(((k->batch - 1) * k->d_step + (k->n - 1) * k->d_ld + k->m) *
                            ds_bytes_of((int)k->d_dtype));
    gemm_operands o = *given;
    void *instead = NULL;
    int best;

    if (o.beta != 0) {
        if (cudaMalloc(&instead, bytes) != cudaSuccess) {
            cudaGetLastError();
            return -1;
        }
        ds_cuda.counters.takes++, ds_cuda.counters.gives++;
        o.d = instead;
    }
    best = fastest(name, p, &o, results, found);
    if (instead)
        cudaFree(instead);
    return best;
}

static int choose(const char *name, plan *p, const gemm_operands *o)
{
    cublasLtMatmulHeuristicResult_t results[CANDIDATES];
    cudaStreamCaptureStatus captured = cudaStreamCaptureStatusNone;
    int found = 0, choice = -1;

    if (!is_unwanted(&p->key))
        DS_TRY(ask(name, p, results, &found));
    p->possible = found > 0;
    if (!found)
        return 0;
    p->algorithm = results[0].algo;
    if (found == 1)
        return 0;
    choice = gemm_choice_find(&p->key);
    if (choice < 0 && gemm_choices_wanted()) {
        cudaStreamIsCapturing(ds_cuda.stream, &captured);
        if (captured == cudaStreamCaptureStatusNone)
            choice = tune(name, p, o, results, found);
        if (choice >= 0)
            choice = gemm_choice_keep(&p->key, choice);
    }
    choice = choice > 0 && choice < found ? choice : 0;
    gemm_choice_use(&p->key, choice);
    p->algorithm = results[choice].algo;
    return 0;
}

/* ---- the cache */

uint64_t gemm_key_hash(const gemm_key *key)
{
    uint64_t word[sizeof *key / 8], x = 0x9e3779b97f4a7c15u;

    memcpy(word, key, sizeof word);
    for (size_t i = 0; i < sizeof word / 8; i++) {
        x = (x ^ word[i]) * 0xff51afd7ed558ccdu;
        x ^= x >> 32;
    }
    return x;
}

void gemm_plans_drop(void)
{
    for (int i = 0; i < BUCKETS; i++)
        while (cache.bucket[i]) {
            plan *p = cache.bucket[i];

            cache.bucket[i] = p->next;
            free(p);
        }
    cache.kept = 0;
    cache.last = NULL;
}

static int add(const char *name, plan **out, const gemm_key *key, const gemm_operands *o)
{
    plan *p;
    int rc;

    if (!cache.handle)
        TRY(cublasLtCreate(&cache.handle));
    if (cache.kept == PLANS)
        gemm_plans_drop();
    p = (plan *)calloc(1, sizeof *p);
    if (!p)
        return ds_fail(DS_ENOMEM, "out of host memory");
    p->key = *key;
    rc = describe(name, p, o);
    if (rc == 0)
        rc = choose(name, p, o);
    if (rc < 0) {
        free(p);
        return rc;
    }
    plan **bucket = &cache.bucket[gemm_key_hash(key) % BUCKETS];
    p->next = *bucket;
    *bucket = p;
    cache.kept++;
    ds_cuda_gemm_count.plans++;
    *out = p;
    return 0;
}

static plan *find(const gemm_key *key)
{
    plan *p = cache.last;

    if (p && memcmp(&p->key, key, sizeof *key) == 0)
        return p;
    for (p = cache.bucket[gemm_key_hash(key) % BUCKETS]; p; p = p->next)
        if (memcmp(&p->key, key, sizeof *key) == 0)
            return p;
    return NULL;
}

int gemm_multiply(const char *name, const gemm_key *key, const gemm_operands *operands)
{
    plan *p = find(key);
    int rc;

    if (!p)
        DS_TRY(add(name, &p, key, operands));
    cache.last = p;
    if (!p->possible)
        return DS_ENOSYS;
    DS_TRY(point(name, p, operands));
    rc = run(name, p, operands);
    p->possible = rc != DS_ENOSYS;
    ds_cuda_gemm_count.products += p->possible;
    ds_cuda_gemm_count.beside += p->possible && (key->bias || key->aux);
    return rc;
}
