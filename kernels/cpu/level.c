/* level.c - chooses the CPU kernels once, at start-up, and provides the CPU's memory.
 *
 * Kernels are compiled once a level of the x86-64 instruction set (System V psABI, "x86-64-v2" and
 * so on), so one program runs everywhere and uses what there is. All ranks must use the same level:
 * levels differ in rounding.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "kernels/backend.h"
#include "kernels/cpu/dnnl.h"

#define MAX_LEVELS 8
#define HUGE ((size_t)2 << 20)

/* ---- which levels there are */

#ifdef __x86_64__
extern const ds_ops ds_cpu_table_v2, ds_cpu_table_v3, ds_cpu_table_v4, ds_cpu_table_v4bf16;

static int has_v2(void)
{
    return __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.2") &&
           __builtin_cpu_supports("popcnt");
}

static int has_v3(void)
{
    unsigned a, b, c = 0, d;

    /* clang 14 has no name for f16c, bit 29 of leaf 1. */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
           __get_cpuid(1, &a, &b, &c, &d) && c & 1u << 29;
}

static int has_v4(void)
{
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

static int has_v4bf16(void)
{
    unsigned a = 0, b, c, d;

    /* bit 5 of leaf 7, subleaf 1 */
    return has_v4() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 5;
}

static const struct level {
    const char *name;
    const char *suffix; /* DS_LEVEL; also accepted as the name */
    const ds_ops *table;
    int (*has)(void);
} known[] = {
    {"x86-64-v2", "v2", &ds_cpu_table_v2, has_v2},
    {"x86-64-v3", "v3", &ds_cpu_table_v3, has_v3},
    {"x86-64-v4", "v4", &ds_cpu_table_v4, has_v4},
    {"x86-64-v4-bf16", "v4bf16", &ds_cpu_table_v4bf16, has_v4bf16},
};
#else
extern const ds_ops ds_cpu_table_portable;

static int has_portable(void)
{
    return 1;
}

static const struct level {
    const char *name;
    const char *suffix;
    const ds_ops *table;
    int (*has)(void);
} known[] = {{"portable", "portable", &ds_cpu_table_portable, has_portable}};
#endif

#define KNOWN (int)(sizeof known / sizeof *known)

/* ---- memory */

/* Large blocks start on a huge page's boundary and ask for huge pages: first touch of 256 MB takes
 * 12 ms then, 64 without. */
static int memory_take(void **out, size_t bytes)
{
    size_t rounded = (bytes + HUGE - 1) / HUGE * HUGE;
    char *block, *aligned;

    if (bytes < HUGE) {
        *out = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64 * !bytes);
        return *out ? 0 : ds_fail(DS_ENOMEM, "out of memory: wanted %zu bytes", bytes);
    }
    block = mmap(NULL, rounded + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED)
        return ds_fail(DS_ENOMEM, "out of memory: wanted %.1f MiB", (double)bytes / (1 << 20));
    aligned = block + (HUGE - (uintptr_t)block % HUGE) % HUGE;
    if (aligned > block)
        munmap(block, (size_t)(aligned - block));
    munmap(aligned + rounded, (size_t)(block + HUGE - aligned));
    madvise(aligned, rounded, MADV_HUGEPAGE); /* only a wish */
    *out = aligned;
    return 0;
}

static void memory_give(void *data, size_t bytes)
{
    if (bytes < HUGE)
        free(data);
    else if (data)
        munmap(data, (bytes + HUGE - 1) / HUGE * HUGE);
}

static int synchronize(void)
{
    return 0;
}

/* ---- choosing */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static ds_backend backend = {.name = "cpu",
                             .memory_take = memory_take,
                             .memory_give = memory_give,
                             .synchronize = synchronize};
static const struct level *chosen;
static const char *available[MAX_LEVELS + 1];

const char *const *ds_cpu_levels(void)
{
    pthread_mutex_lock(&lock);
    if (!available[0])
        for (int i = 0, n = 0; i < KNOWN; i++)
            if (known[i].has())
                available[n++] = known[i].name;
    pthread_mutex_unlock(&lock);
    return available;
}

/* The level of that name, or the highest; NULL and a message if this processor has none such. */
static const struct level *find(const char *name)
{
    const struct level *best = NULL;
    char list[128] = "";

    for (int i = 0; i < KNOWN; i++) {
        if (!known[i].has())
            continue;
        if (!name || !strcmp(name, known[i].name) || !strcmp(name, known[i].suffix))
            best = &known[i];
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", *list ? ", " : "",
                 known[i].name);
    }
    if (!best && !name)
        ds_fail(DS_ENOSYS, "this processor is older than x86-64-v2, the oldest supported");
    else if (!best)
        ds_fail(DS_EINVAL, "this processor has no level \"%s\" (there are: %s)", name, list);
    return best;
}

const ds_backend *ds_cpu_backend(const char *level)
{
    const struct level *best;

    pthread_mutex_lock(&lock);
    if (!chosen) {
        if (!level)
            level = getenv("DS_CPU_LEVEL");
        best = find(level && *level ? level : NULL);
        /* The highest level leaves oneDNN free: it knows instructions (AMX) that have none here. */
        if (best && (best == find(NULL) || ds_dnnl_limit(best->suffix) == 0)) {
            backend.ops = *best->table;
            chosen = best;
        }
    }
    pthread_mutex_unlock(&lock);
    return chosen ? &backend : NULL;
}

const char *ds_cpu_level(void)
{
    return ds_cpu_backend(NULL) ? chosen->name : NULL;
}
