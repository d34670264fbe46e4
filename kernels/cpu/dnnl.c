/* dnnl.c - cached oneDNN primitives.
 *
 * oneDNN 2.x (Debian 12, Ubuntu 22.04) and 3.x differ in how descriptors are made; the few
 * functions under "versions" hide that. Everything is shared and guarded by one lock, because a
 * primitive's memory handles are set for each call: one product runs at a time, on all threads of
 * the pool.
 */
#include "kernels/cpu/dnnl.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <dnnl.h>

#define BUCKETS 1024 /* a power of two */
#define DEFAULT_LIMIT 512
#define MAX_ARGS 5
#define NO_LIMIT ((dnnl_cpu_isa_t)0) /* called dnnl_cpu_isa_all in 2.x, _default in 3.x */

enum { ARG_A, ARG_B, ARG_C, ARG_SCRATCH, ARG_BIAS };

typedef struct entry {
    ds_dnnl_key key;
    struct entry *next; /* in the bucket */
    uint64_t hash;
    uint64_t used;                  /* tick of the last use */
    dnnl_primitive_t primitive;     /* NULL: there is no fast kernel */
    dnnl_memory_t memory[MAX_ARGS]; /* in the order of args */
    dnnl_exec_arg_t args[MAX_ARGS];
    int nargs;
    dnnl_primitive_t pack; /* brings b to the kernel's own order; NULL: read where it lies */
    dnnl_memory_t plain;   /* b before that */
    size_t packed;         /* bytes of b after it */
    size_t scratch;        /* bytes */
    char name[48];         /* oneDNN's name of the kernel */
} entry;

static struct {
    pthread_mutex_t lock;
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    entry *bucket[BUCKETS];
    entry *last; /* the entry used last: training often repeats one shape */
    uint64_t tick;
    int limit;
    ds_dnnl_counters count;
} cache = {.lock = PTHREAD_MUTEX_INITIALIZER, .limit = DEFAULT_LIMIT};

/* ---- versions ---- */

#if DNNL_VERSION_MAJOR >= 3
typedef dnnl_memory_desc_t desc; /* opaque, destroyed after use */
typedef const_dnnl_memory_desc_t const_desc;
#define REF(d) (d)
#define DESC_NONE NULL
#else
typedef dnnl_memory_desc_t desc; /* a plain struct */
typedef const dnnl_memory_desc_t *const_desc;
#define REF(d) (&(d))
#define DESC_NONE                                                                                  \
    {                                                                                              \
        0                                                                                          \
    }
#endif

static dnnl_status_t desc_make(desc *out, int ndim, const dnnl_dims_t shape, dnnl_data_type_t dtype,
                               const dnnl_dims_t stride)
{
#if DNNL_VERSION_MAJOR >= 3
    return dnnl_memory_desc_create_with_strides(out, ndim, shape, dtype, stride);
#else
    return dnnl_memory_desc_init_by_strides(out, ndim, shape, dtype, stride);
#endif
}

static dnnl_status_t desc_make_any(desc *out, int ndim, const dnnl_dims_t shape,
                                   dnnl_data_type_t dtype)
{
#if DNNL_VERSION_MAJOR >= 3
    return dnnl_memory_desc_create_with_tag(out, ndim, shape, dtype, dnnl_format_tag_any);
#else
    return dnnl_memory_desc_init_by_tag(out, ndim, shape, dtype, dnnl_format_tag_any);
#endif
}

static void desc_free(desc *d)
{
#if DNNL_VERSION_MAJOR >= 3
    if (*d)
        dnnl_memory_desc_destroy(*d);
#else
    (void)d;
#endif
}

static const char *name_of(dnnl_primitive_desc_t pd)
{
    const char *name = "";

    dnnl_primitive_desc_query(pd, dnnl_query_impl_info_str, 0, (void *)&name);
    return name;
}

/* The first kernel that oneDNN offers, or with `kind` the first whose name begins so. */
static dnnl_status_t matmul_describe(dnnl_primitive_desc_t *out, desc *a, desc *b, desc *bias,
                                     desc *c, dnnl_primitive_attr_t attr, const char *kind)
{
    size_t length = kind ? strlen(kind) : 0;
    dnnl_status_t status;
#if DNNL_VERSION_MAJOR >= 3
    *out = NULL;
    status =
        dnnl_matmul_primitive_desc_create(out, cache.engine, *a, *b, bias ? *bias : NULL, *c, attr);
    while (!status && kind && strncmp(name_of(*out), kind, length) != 0)
        status = dnnl_primitive_desc_next_impl(*out);
#else
    dnnl_primitive_desc_iterator_t offers = NULL;
    dnnl_matmul_desc_t op;

    *out = NULL;
    status = dnnl_matmul_desc_init(&op, a, b, bias, c);
    if (!status)
        status = dnnl_primitive_desc_iterator_create(&offers, &op, attr, cache.engine, NULL);
    while (!status) {
        *out = dnnl_primitive_desc_iterator_fetch(offers);
        if (!kind || strncmp(name_of(*out), kind, length) == 0)
            break;
        dnnl_primitive_desc_destroy(*out);
        *out = NULL;
        status = dnnl_primitive_desc_iterator_next(offers);
    }
    if (offers)
        dnnl_primitive_desc_iterator_destroy(offers);
#endif
    if (status && *out) {
        dnnl_primitive_desc_destroy(*out);
        *out = NULL;
    }
    return status;
}

/* dst = alpha product, then += beta old. */
static dnnl_status_t append_scales(dnnl_post_ops_t ops, float alpha, float beta)
{
    dnnl_status_t status = dnnl_success;

#if DNNL_VERSION_MAJOR >= 3
    if (alpha != 1)
        status = dnnl_post_ops_append_eltwise(ops, dnnl_eltwise_linear, alpha, 0);
    if (!status && beta != 0)
        status = dnnl_post_ops_append_sum(ops, beta, 0, dnnl_data_type_undef);
#else
    if (alpha != 1)
        status = dnnl_post_ops_append_eltwise(ops, 1, dnnl_eltwise_linear, alpha, 0);
    if (!status && beta != 0)
        status = dnnl_post_ops_append_sum(ops, beta);
#endif
    return status;
}

const char *ds_dnnl_version(void)
{
    static char text[32];
    const dnnl_version_t *v = dnnl_version();

    snprintf(text, sizeof text, "%d.%d.%d", v->major, v->minor, v->patch);
    return text;
}

/* ---- making a primitive ---- */

static int has_isa(unsigned isa)
{
#if defined(__x86_64__)
    return ((unsigned)dnnl_get_effective_cpu_isa() & isa) == isa;
#else
    return (void)isa, 0;
#endif
}

static int has_amx(void)
{
    return has_isa(dnnl_cpu_isa_avx512_core_amx);
}

static const uint8_t dtypes[DS_DTYPES] = {[DS_F32] = dnnl_f32, [DS_BF16] = dnnl_bf16};

/* One operand's descriptor: batch dimensions first. A repeated batch has size 1 for oneDNN. */
static dnnl_status_t operand(desc *out, const ds_dnnl_key *key, int dtype,
                             const int64_t *batch_stride, int64_t rows, int64_t cols, int64_t row,
                             int64_t col)
{
    dnnl_dims_t shape = {0}, stride = {0};
    int n = key->batches;

    for (int i = 0; i < n; i++) {
        int repeated = batch_stride[i] == 0 && key->batch[i] != 1;

        shape[i] = repeated ? 1 : key->batch[i];
        stride[i] = batch_stride[i];
        if (shape[i] == 1) /* its stride means nothing, but oneDNN looks at it: make it regular */
            stride[i] = (row > col ? row * rows : col * cols);
    }
    shape[n] = rows, shape[n + 1] = cols;
    stride[n] = row, stride[n + 1] = col;
    return desc_make(out, n + 2, shape, dtypes[dtype], stride);
}

static dnnl_status_t attributes(dnnl_primitive_attr_t *out, const ds_dnnl_key *key)
{
    dnnl_post_ops_t ops = NULL;
    dnnl_status_t status = dnnl_primitive_attr_create(out);

    if (!status)
        status = dnnl_primitive_attr_set_scratchpad_mode(*out, dnnl_scratchpad_mode_user);
    if (!status)
        status = dnnl_post_ops_create(&ops);
    if (!status)
        status = append_scales(ops, key->alpha, key->beta);
    if (!status)
        status = dnnl_primitive_attr_set_post_ops(*out, ops);
    if (ops)
        dnnl_post_ops_destroy(ops);
    return status;
}

/* Reference kernels are a hundred times slower; bf16 without instructions for it is emulated, and
 * slower than f32. Neither is used. */
static int is_fast(const entry *e)
{
    if (strncmp(e->name, "ref", 3) == 0)
        return 0;
    return e->key.a_dtype != DS_BF16 || ds_dnnl_has_bf16();
}

static dnnl_status_t bind(entry *e, int arg, dnnl_primitive_desc_t pd, dnnl_query_t what, int index,
                          int dnnl_arg)
{
    dnnl_status_t status = dnnl_memory_create(
        &e->memory[arg], dnnl_primitive_desc_query_md(pd, what, index), cache.engine, NULL);

    e->args[arg] = (dnnl_exec_arg_t){dnnl_arg, e->memory[arg]};
    e->nargs = arg + 1;
    return status;
}

static dnnl_status_t compile(entry *e, dnnl_primitive_desc_t pd)
{
    dnnl_status_t status;

    snprintf(e->name, sizeof e->name, "%s", name_of(pd));
    if (!is_fast(e))
        return dnnl_unimplemented;
    e->scratch =
        dnnl_memory_desc_get_size(dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0));
    status = bind(e, ARG_A, pd, dnnl_query_src_md, 0, DNNL_ARG_SRC);
    if (!status)
        status = bind(e, ARG_B, pd, dnnl_query_weights_md, 0, DNNL_ARG_WEIGHTS);
    if (!status)
        status = bind(e, ARG_C, pd, dnnl_query_dst_md, 0, DNNL_ARG_DST);
    if (!status)
        status = bind(e, ARG_SCRATCH, pd, dnnl_query_scratchpad_md, 0, DNNL_ARG_SCRATCHPAD);
    if (!status && e->key.bias)
        status = bind(e, ARG_BIAS, pd, dnnl_query_weights_md, 1, DNNL_ARG_BIAS);
    return status ? status : dnnl_primitive_create(&e->primitive, pd);
}

/* How to multiply, among what oneDNN offers. Measured on Zen 4 with 2.6 and 3.2, at the shapes of
 * three GPTs, operands outside the L2 cache:
 * - of a transposed a (gradients of weights) the older kernel, "gemm", is 4 to 14 % faster than
 *   "brg", which comes first; but for large results in f32 and tiny ones in bf16;
 * - in f32 it is also 2 to 8 % faster where b lies by rows (backward), or is small and wider than
 *   deep;
 * - in bf16, with many rows, brg gains 3 to 9 % from a b that is packed for it before, even when
 *   that is done in every call.
 * With AMX none of this has been measured: oneDNN's choice stands. */
enum way { FIRST, GEMM, PACKED };

static enum way way_of(const ds_dnnl_key *key)
{
    int64_t m = key->m, n = key->n, k = key->k;

    if (key->batches || m < 32 || m * n * k < 1 << 20)
        return FIRST;
    if (key->a_dtype == DS_F32) {
        if (key->a_col != 1)
            return m * n < 3 << 19 ? GEMM : FIRST;
        return key->b_col == 1 || (k < n && n * k < 1 << 20) ? GEMM : FIRST;
    }
    if (has_amx())
        return FIRST;
    if (key->a_col != 1)
        return m * n >= 1 << 15 ? GEMM : FIRST;
    if (m >= 2048 && n * k >= 1 << 16)
        return PACKED;
    if (DNNL_VERSION_MAJOR < 3 && key->b_row == 1 && k < n && n * k >= 1 << 20)
        return GEMM;
    return FIRST;
}

typedef struct descs {
    desc a, b, any, c, bias; /* any: b in whatever order the kernel likes best */
} descs;

static dnnl_status_t describe_operands(descs *d, const ds_dnnl_key *key)
{
    dnnl_dims_t shape = {1, 1, 1, 1}, stride = {key->n, key->n, key->n, key->n};
    int last = key->batches + 1;
    dnnl_status_t status;

    status =
        operand(&d->a, key, key->a_dtype, key->a_batch, key->m, key->k, key->a_row, key->a_col);
    if (!status)
        status =
            operand(&d->b, key, key->b_dtype, key->b_batch, key->k, key->n, key->b_row, key->b_col);
    if (!status)
        status = operand(&d->c, key, key->c_dtype, key->c_batch, key->m, key->n, key->c_row, 1);
    if (!status)
        status = desc_make_any(&d->any, 2, (dnnl_dims_t){key->k, key->n}, dtypes[key->b_dtype]);
    shape[last] = key->n, stride[last] = 1;
    if (!status)
        status = desc_make(&d->bias, last + 1, shape, dtypes[key->c_dtype], stride);
    return status;
}

/* b from its place to the order that the kernel behind pd wants. */
static dnnl_status_t add_packing(entry *e, dnnl_primitive_desc_t pd, desc *b)
{
    const_desc packed = dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0);
    dnnl_primitive_desc_t reorder = NULL;
    dnnl_status_t status;

    if (dnnl_memory_desc_equal(packed, REF(*b)))
        return dnnl_success;
    e->packed = dnnl_memory_desc_get_size(packed);
    status = dnnl_memory_create(&e->plain, REF(*b), cache.engine, NULL);
    if (!status)
        status = dnnl_reorder_primitive_desc_create(&reorder, REF(*b), cache.engine, packed,
                                                    cache.engine, NULL);
    if (!status)
        status = dnnl_primitive_create(&e->pack, reorder);
    if (reorder)
        dnnl_primitive_desc_destroy(reorder);
    return status;
}

static dnnl_status_t make_primitive(entry *e)
{
    const ds_dnnl_key *key = &e->key;
    descs d = {DESC_NONE, DESC_NONE, DESC_NONE, DESC_NONE, DESC_NONE};
    desc *bias = key->bias ? &d.bias : NULL;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_primitive_desc_t pd = NULL;
    enum way way = way_of(key);
    dnnl_status_t status = describe_operands(&d, key);

    if (!status)
        status = attributes(&attr, key);
    if (!status && way != FIRST)
        matmul_describe(&pd, &d.a, way == PACKED ? &d.any : &d.b, bias, &d.c, attr,
                        way == PACKED ? "brg" : "gemm");
    if (!status && pd && way == PACKED)
        status = add_packing(e, pd, &d.b);
    if (!status && !pd)
        status = matmul_describe(&pd, &d.a, &d.b, bias, &d.c, attr, NULL);
    if (!status)
        status = compile(e, pd);
    if (pd)
        dnnl_primitive_desc_destroy(pd);
    if (attr)
        dnnl_primitive_attr_destroy(attr);
    desc_free(&d.a), desc_free(&d.b), desc_free(&d.any), desc_free(&d.c), desc_free(&d.bias);
    return status;
}

/* ---- the cache ---- */

/* Multiply and fold, 8 bytes at a time in two chains: the key is 22 words, 10 ns. */
static uint64_t hash_of(const ds_dnnl_key *key)
{
    uint64_t word[sizeof *key / 8], x = 0x9e3779b97f4a7c15u, y = 0xd1b54a32d192ed03u;

    _Static_assert(sizeof *key % 16 == 0, "the key is hashed by pairs of words");
    memcpy(word, key, sizeof word);
    for (size_t i = 0; i < sizeof word / 8; i += 2) {
        x = (x ^ word[i]) * 0xff51afd7ed558ccdu;
        y = (y ^ word[i + 1]) * 0xc4ceb9fe1a85ec53u;
        x ^= x >> 32;
        y ^= y >> 29;
    }
    x ^= y * 0x9e3779b97f4a7c15u;
    return x ^ x >> 32;
}

static void destroy(entry *e)
{
    for (int i = 0; i < e->nargs; i++)
        if (e->memory[i])
            dnnl_memory_destroy(e->memory[i]);
    if (e->primitive)
        dnnl_primitive_destroy(e->primitive);
    if (e->pack)
        dnnl_primitive_destroy(e->pack);
    if (e->plain)
        dnnl_memory_destroy(e->plain);
    free(e);
}

static void evict_oldest(void)
{
    entry **oldest = NULL, *e;

    for (int i = 0; i < BUCKETS; i++)
        for (entry **p = &cache.bucket[i]; *p; p = &(*p)->next)
            if (!oldest || (*p)->used < (*oldest)->used)
                oldest = p;
    if (!oldest)
        return;
    e = *oldest;
    *oldest = e->next;
    if (cache.last == e)
        cache.last = NULL;
    destroy(e);
    cache.count.kept--;
    cache.count.evicted++;
}

static int start(void)
{
    dnnl_status_t status = dnnl_engine_create(&cache.engine, dnnl_cpu, 0);

    if (!status)
        status = dnnl_stream_create(&cache.stream, cache.engine, dnnl_stream_default_flags);
    if (status)
        return ds_fail(DS_ENOSYS, "oneDNN %s has no engine for this processor (status %d)",
                       ds_dnnl_version(), (int)status);
    dnnl_set_primitive_cache_capacity(0); /* it would keep what we evict */
    return 0;
}

static int add(entry **out, const ds_dnnl_key *key, uint64_t hash)
{
    entry *e;
    dnnl_status_t status;

    if (!cache.stream && start() < 0)
        return DS_ENOSYS;
    e = calloc(1, sizeof *e);
    if (!e)
        return ds_fail(DS_ENOMEM, "out of host memory");
    e->key = *key;
    e->hash = hash;
    status = make_primitive(e);
    if (status == dnnl_out_of_memory) {
        destroy(e);
        return ds_fail(DS_ENOMEM, "oneDNN is out of memory");
    }
    while (cache.count.kept >= cache.limit)
        evict_oldest();
    e->next = cache.bucket[hash % BUCKETS];
    cache.bucket[hash % BUCKETS] = e;
    cache.count.created++;
    cache.count.kept++;
    *out = e;
    return 0;
}

static int find(entry **out, const ds_dnnl_key *key)
{
    entry *e = cache.last;
    uint64_t hash;

    if (!e || memcmp(&e->key, key, sizeof *key) != 0) {
        hash = hash_of(key);
        e = cache.bucket[hash % BUCKETS];
        while (e && (e->hash != hash || memcmp(&e->key, key, sizeof *key) != 0))
            e = e->next;
        if (!e) {
            int rc = add(&e, key, hash);

            if (rc < 0)
                return rc;
        }
        cache.last = e;
    }
    e->used = ++cache.tick;
    *out = e;
    return 0;
}

/* ---- the interface ---- */

static int execute(void *c, const void *a, const void *b, const void *bias, entry *e)
{
    void *work = e->scratch ? ds_scratch(DS_SCRATCH_DNNL, e->scratch) : NULL;
    void *packed = e->pack ? ds_scratch(DS_SCRATCH_PACKED, e->packed) : NULL;
    dnnl_status_t status = dnnl_success;

    if ((e->scratch && !work) || (e->pack && !packed))
        return DS_ENOMEM;
    if (e->pack) {
        dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, e->plain}, {DNNL_ARG_TO, e->memory[ARG_B]}};

        dnnl_memory_set_data_handle(e->plain, (void *)b);
        dnnl_memory_set_data_handle(e->memory[ARG_B], packed);
        status = dnnl_primitive_execute(e->pack, cache.stream, 2, args);
        b = packed;
    }
    dnnl_memory_set_data_handle(e->memory[ARG_A], (void *)a);
    dnnl_memory_set_data_handle(e->memory[ARG_B], (void *)b);
    dnnl_memory_set_data_handle(e->memory[ARG_C], c);
    dnnl_memory_set_data_handle(e->memory[ARG_SCRATCH], work);
    if (e->key.bias)
        dnnl_memory_set_data_handle(e->memory[ARG_BIAS], (void *)bias);
    if (!status)
        status = dnnl_primitive_execute(e->primitive, cache.stream, e->nargs, e->args);
    if (status)
        return ds_fail(DS_EINVAL,
                       "oneDNN's %s failed with status %d on [%lld x %lld] x [%lld x %lld]",
                       e->name, (int)status, (long long)e->key.m, (long long)e->key.k,
                       (long long)e->key.k, (long long)e->key.n);
    return 0;
}

int ds_dnnl_matmul(void *c, const void *a, const void *b, const void *bias, const ds_dnnl_key *key)
{
    entry *e;
    int rc;

    pthread_mutex_lock(&cache.lock);
    rc = find(&e, key);
    if (rc == 0)
        rc = e->primitive ? execute(c, a, b, bias, e) : DS_ENOSYS;
    pthread_mutex_unlock(&cache.lock);
    return rc;
}

const char *ds_dnnl_kernel(const ds_dnnl_key *key)
{
    static char name[sizeof((entry *)0)->name];
    const char *answer = NULL;
    entry *e;

    pthread_mutex_lock(&cache.lock);
    if (find(&e, key) == 0 && e->primitive)
        answer = memcpy(name, e->name, sizeof name);
    pthread_mutex_unlock(&cache.lock);
    return answer;
}

int ds_dnnl_has_bf16(void)
{
    static int known = -1;

    if (known < 0)
        known = has_isa(dnnl_cpu_isa_avx512_core_bf16);
    return known;
}

int ds_dnnl_limit(const char *level)
{
    static const struct {
        const char *level;
        dnnl_cpu_isa_t isa;
    } limits[] = {
        {"v2", dnnl_cpu_isa_sse41},
        {"v3", dnnl_cpu_isa_avx2},
        {"v4", dnnl_cpu_isa_avx512_core_vnni},
        {"v4bf16", NO_LIMIT}, /* and what comes after it: AMX */
        {"portable", NO_LIMIT},
    };
    int rc = DS_EINVAL;

    if (strncmp(level, "x86-64-", 7) == 0)
        level += 7;
    if (strcmp(level, "v4-bf16") == 0)
        level = "v4bf16";
    pthread_mutex_lock(&cache.lock);
    for (size_t i = 0; i < sizeof limits / sizeof *limits && rc < 0; i++) {
        if (strcmp(level, limits[i].level) != 0)
            continue;
        if (cache.stream || dnnl_set_max_cpu_isa(limits[i].isa) == dnnl_invalid_arguments)
            rc = ds_fail(DS_EINVAL, "oneDNN runs already: limit it to %s before the first product",
                         level);
        else
            rc = 0; /* or dnnl_unimplemented: a build without limits, and nothing to be done */
        break;
    }
    pthread_mutex_unlock(&cache.lock);
    return rc;
}

void ds_dnnl_cache_limit(int entries)
{
    pthread_mutex_lock(&cache.lock);
    cache.limit = entries < 1 ? 1 : entries;
    while (cache.count.kept > cache.limit)
        evict_oldest();
    pthread_mutex_unlock(&cache.lock);
}

ds_dnnl_counters ds_dnnl_count(void)
{
    return cache.count;
}
