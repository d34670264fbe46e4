/* random.c - uniform, normal, integer random numbers and dropout, from Philox (philox.h).
 *
 * Element i of a tensor, counted in row-major order whatever its strides, is lane i % 4 of the
 * block at counter offset + i / 4.
 */
#include "kernels/cpu/walk.h"

#include <math.h>

#include "kernels/philox.h"

#define CHUNK 512 /* elements; a multiple of 4 */

/* What a kernel makes of the words of up to CHUNK elements: `row` is f32 for f32, bf16 and f16,
 * else f64 or i64. In dropout it holds x and becomes y. */
typedef struct job {
    const char *name;
    uint64_t seed, offset;
    double a, b; /* the distribution's two parameters */
    int64_t low; /* randint */
    uint64_t range;
    void (*make)(void *row, const uint32_t *words, int64_t n, const struct job *job);
    const ds_tensor *x; /* dropout; else NULL */
} job;

/* All words of a chunk that begins with element 4 (counter - offset). */
static void words_make(uint32_t *words, uint64_t seed, uint64_t counter)
{
#pragma omp simd
    for (int64_t i = 0; i < CHUNK / 4; i++) {
        ds_philox_block block = ds_philox(seed, counter + (uint64_t)i);

        words[4 * i] = block.lane[0];
        words[4 * i + 1] = block.lane[1];
        words[4 * i + 2] = block.lane[2];
        words[4 * i + 3] = block.lane[3];
    }
}

/* ---- distributions */

static void uniform_f32(void *row, const uint32_t *words, int64_t n, const job *job)
{
    float *y = row, low = (float)job->a, width = (float)(job->b - job->a);

    (void)n;
#pragma omp simd
    for (int64_t i = 0; i < CHUNK; i++)
        y[i] = low + width * ds_uniform_f32(words[i]);
}

static void uniform_f64(void *row, const uint32_t *words, int64_t n, const job *job)
{
    double *y = row;

    for (int64_t i = 0; i < n; i++)
        y[i] = job->a + (job->b - job->a) * ds_uniform_f64(words[i]);
}

static void normal_f32(void *row, const uint32_t *words, int64_t n, const job *job)
{
    float *y = row, mean = (float)job->a, std = (float)job->b;

    (void)n;
#pragma omp simd
    for (int64_t i = 0; i < CHUNK / 2; i++) {
        float z0, z1;

        ds_normal_pair(&z0, &z1, words[2 * i], words[2 * i + 1]);
        y[2 * i] = mean + std * z0;
        y[2 * i + 1] = mean + std * z1;
    }
}

static void normal_f64(void *row, const uint32_t *words, int64_t n, const job *job)
{
    double *y = row;

    for (int64_t i = 0; i < n; i++) {
        double u = ((double)words[i & ~1] + 1) * 0x1p-32, angle = 0x1p-32 * words[i | 1];
        double radius = sqrt(-2 * log(u)), turn = 6.28318530717958647693 * angle;

        y[i] = job->a + job->b * radius * (i & 1 ? sin(turn) : cos(turn));
    }
}

/* The upper half of word × range: uneven by at most range / 2^32, and ranges beyond 2^32 are
 * refused. */
static void integers(void *row, const uint32_t *words, int64_t n, const job *job)
{
    int64_t *y = row;

    for (int64_t i = 0; i < n; i++)
        y[i] = job->low + (int64_t)((uint64_t)words[i] * job->range >> 32);
}

/* Keeps an element when its uniform number, a multiple of 2^-24, is p or more. */
#define DROPOUT(real)                                                                              \
    static void dropout_##real(void *row, const uint32_t *words, int64_t n, const job *job)        \
    {                                                                                              \
        real *y = row, scale = (real)(1 / (1 - job->a));                                           \
        int32_t least = (int32_t)ceil(job->a * 0x1p24);                                            \
                                                                                                   \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] =                                 \
            (int32_t)(words[i] >> 8) >= least ? y[i] * scale : 0;                                  \
    }
DROPOUT(float)
DROPOUT(double)

/* ---- running */

/* n elements from the cursor on, operand k: from or to a dense row. */
static void transfer(const walk *w, int k, cursor c, void *row, int64_t n)
{
    int last = w->ndim - 1, dtype = w->op[k].dtype;
    int64_t stride = w->op[k].stride[last], run;

    for (int64_t i = 0; i < n; i += run) {
        char *memory = cursor_at(&c, w, k);

        run = cursor_rest(&c, w) < n - i ? cursor_rest(&c, w) : n - i;
        if (dtype == DS_F64 && k == 0)
            ds_row_store_f64(memory, (double *)row + i, dtype, run, stride);
        else if (dtype == DS_F64)
            ds_row_load_f64((double *)row + i, memory, dtype, run, stride);
        else if (!ds_is_float(dtype))
            ds_row_store_i64(memory, (int64_t *)row + i, dtype, run, stride);
        else if (k == 0)
            ds_row_store(memory, (float *)row + i, dtype, run, stride);
        else
            ds_row_load((float *)row + i, memory, dtype, run, stride);
        cursor_advance(&c, w, run);
    }
}

static int run(const job *job, ds_tensor *y)
{
    int threads = ds_threads(y->numel * 4), rc;
    walk w;

    rc = DS_CPU(walk_start)(&w, job->name, job->x ? 2 : 1, (const ds_tensor *[]){y, job->x},
                            WALK_ROW_MAJOR);
    if (rc < 0 || y->numel == 0)
        return rc;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        _Alignas(64) uint32_t words[CHUNK];
        _Alignas(64) double row[CHUNK];
        int64_t begin, end;
        cursor c;

        ds_part(&begin, &end, w.numel, CHUNK);
        cursor_start(&c, &w, begin);
        for (; begin < end; begin += CHUNK) {
            int64_t n = end - begin < CHUNK ? end - begin : CHUNK;

            words_make(words, job->seed, job->offset + (uint64_t)begin / 4);
            if (job->x)
                transfer(&w, 1, c, row, n);
            job->make(row, words, n, job);
            transfer(&w, 0, c, row, n);
            cursor_advance(&c, &w, n);
        }
    }
    return 0;
}

int DS_CPU(uniform)(ds_tensor *y, double low, double high, uint64_t seed, uint64_t offset)
{
    job job = {.name = "uniform", .seed = seed, .offset = offset, .a = low, .b = high};

    DS_TRY(ds_check_random("uniform", y, low, high));
    job.make = y->dtype == DS_F64 ? uniform_f64 : uniform_f32;
    return run(&job, y);
}

int DS_CPU(normal)(ds_tensor *y, double mean, double std, uint64_t seed, uint64_t offset)
{
    job job = {.name = "normal", .seed = seed, .offset = offset, .a = mean, .b = std};

    DS_TRY(ds_check_random("normal", y, mean, std));
    job.make = y->dtype == DS_F64 ? normal_f64 : normal_f32;
    return run(&job, y);
}

int DS_CPU(randint)(ds_tensor *y, int64_t low, int64_t high, uint64_t seed, uint64_t offset)
{
    job job = {.name = "randint", .seed = seed, .offset = offset, .low = low, .make = integers};

    DS_TRY(ds_check_randint(y, low, high));
    job.range = (uint64_t)high - (uint64_t)low;
    return run(&job, y);
}

int DS_CPU(dropout)(ds_tensor *y, const ds_tensor *x, double p, uint64_t seed, uint64_t offset)
{
    job job = {.name = "dropout", .seed = seed, .offset = offset, .a = p, .x = x};

    DS_TRY(ds_check_dropout(y, x, p));
    job.make = x->dtype == DS_F64 ? dropout_double : dropout_float;
    return run(&job, y);
}
