/* safetensors.c - named tensors in one file: 8 bytes of header length, a JSON header, the data.
 *
 * The format is Hugging Face's (github.com/huggingface/safetensors, "Format"), so that other tools
 * open our files. A header is a stranger's text: every number in it is checked before it is used.
 */
#include "runner/file.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEADER_MAX ((size_t)100 << 20) /* bytes; the reference reader's bound, about */

/* The data begins at a multiple of this in the file, so that tensors of usual sizes keep the place
 * in a sector that they have in memory, and O_DIRECT can take them from there. */
#define DATA_ALIGN 4096
#define DATA_ALIGN_SMALL 64
#define DATA_SMALL ((int64_t)1 << 20)

struct ds_tensors {
    json_t *header; /* owns the names */
    ds_entry *entries;
    int n;
};

/* By enum ds_dtype. */
static const char *const words[DS_DTYPES] = {"F32", "BF16", "F16", "F64",
                                             "I64", "I32",  "U8",  "BOOL"};

/* ---- writing */

static json_t *entry_json(const ds_entry *e)
{
    json_t *shape = json_array();

    for (int i = 0; i < e->ndim; i++)
        json_array_append_new(shape, json_integer(e->shape[i]));
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", words[e->dtype], "shape", shape,
                     "data_offsets", (json_int_t)e->offset, (json_int_t)(e->offset + e->bytes));
}

/* Fills bytes and numel; offset is from the start of the data here. */
static int lay_out(ds_entry *entries, int n, const char *path)
{
    int64_t at = 0;

    for (int i = 0; i < n; i++) {
        ds_entry *e = &entries[i];

        if (e->dtype < 0 || e->dtype >= DS_DTYPES || e->ndim < 0 || e->ndim > DS_MAX_DIM)
            return ds_fail(DS_EINVAL, "'%s': tensor '%s' has dtype %d and %d dimensions", path,
                           e->name, e->dtype, e->ndim);
        e->numel = 1;
        for (int d = 0; d < e->ndim; d++)
            if (e->shape[d] < 0 || __builtin_mul_overflow(e->numel, e->shape[d], &e->numel))
                return ds_fail(DS_EINVAL, "'%s': the shape of tensor '%s' makes no sense", path,
                               e->name);
        if (__builtin_mul_overflow(e->numel, ds_dtype_size(e->dtype), &e->bytes))
            return ds_fail(DS_EINVAL, "'%s': tensor '%s' is too large", path, e->name);
        e->offset = at;
        if (__builtin_add_overflow(at, e->bytes, &at))
            return ds_fail(DS_EINVAL, "'%s' would be too large", path);
    }
    return 0;
}

static int header_json(json_t *header, const ds_entry *entries, int n, const char *const *meta,
                       const char *path)
{
    json_t *strings = json_object();

    json_object_set_new(header, "__metadata__", strings);
    for (; *meta; meta += 2)
        if (json_object_set_new(strings, meta[0], json_string(meta[1])) < 0)
            return ds_fail(DS_EINVAL, "'%s': metadata '%s' is not valid UTF-8", path, meta[0]);
    for (int i = 0; i < n; i++) {
        const ds_entry *e = &entries[i];

        if (json_object_get(header, e->name))
            return ds_fail(DS_EINVAL, "'%s': there are two tensors '%s'", path, e->name);
        if (json_object_set_new(header, e->name, entry_json(e)) < 0)
            return ds_fail(DS_EINVAL, "'%s': the name of tensor %d is not valid UTF-8", path,
                           i + 1);
    }
    return 0;
}

/* The header's length and text, padded with spaces so that the data begins at a multiple of align.
 */
static int header_text(char **out, int64_t *bytes, const json_t *header, size_t align,
                       const char *path)
{
    char *text = json_dumps(header, JSON_COMPACT);
    size_t length = text ? strlen(text) : 0;
    size_t padded = (8 + length + align - 1) / align * align - 8;
    char *all = malloc(8 + padded);
    int rc = text && all ? 0 : ds_fail(DS_ENOMEM, "out of host memory");

    if (rc == 0 && padded > HEADER_MAX)
        rc = ds_fail(DS_EINVAL, "'%s': a header of %zu bytes is too large", path, padded);
    if (rc < 0) {
        free(text);
        free(all);
        return rc;
    }
    for (int i = 0; i < 8; i++)
        all[i] = (char)(unsigned char)((uint64_t)padded >> (8 * i));
    memcpy(all + 8, text, length);
    memset(all + 8 + length, ' ', padded - length);
    free(text);
    *out = all;
    *bytes = (int64_t)(8 + padded);
    return 0;
}

int ds_tensors_create(ds_file **out, const char *path, ds_entry *entries, int n,
                      const char *const *meta, int replace)
{
    static const char *const none[] = {NULL};
    json_t *header = json_object();
    int64_t bytes = 0, data = 0;
    ds_file *f = NULL;
    char *text = NULL;
    int rc = lay_out(entries, n, path);

    if (rc >= 0 && n > 0)
        data = entries[n - 1].offset + entries[n - 1].bytes;
    if (rc >= 0)
        rc = header_json(header, entries, n, meta ? meta : none, path);
    if (rc >= 0)
        rc = header_text(&text, &bytes, header, data < DATA_SMALL ? DATA_ALIGN_SMALL : DATA_ALIGN,
                         path);
    json_decref(header);
    if (rc < 0)
        return rc;
    for (int i = 0; i < n; i++)
        entries[i].offset += bytes;
    rc = ds_file_create(&f, path, bytes + data, replace);
    if (rc >= 0)
        rc = ds_file_append(f, text, bytes, 0);
    free(text);
    if (rc < 0) {
        ds_file_discard(f);
        return rc;
    }
    *out = f;
    return 0;
}

/* ---- reading */

static int bad(const ds_file *f, const char *name, const char *what)
{
    return ds_fail(DS_ECORRUPT, "'%s' is damaged: tensor '%.200s': %s", ds_file_path(f), name,
                   what);
}

/* A whole number from 0 on. */
static int whole(int64_t *out, const json_t *v)
{
    *out = json_integer_value(v);
    return json_is_integer(v) && *out >= 0;
}

/* offset counts from the start of the data here. */
static int parse_entry(ds_entry *e, const ds_file *f, const char *name, const json_t *v)
{
    const json_t *shape = json_object_get(v, "shape"), *span = json_object_get(v, "data_offsets");
    const char *dtype = json_string_value(json_object_get(v, "dtype"));
    int64_t end, bytes;

    if (!dtype || !json_is_array(shape) || json_array_size(span) != 2 || json_object_size(v) != 3)
        return bad(f, name, "it must have dtype, shape and data_offsets, and no more");
    for (e->dtype = 0; e->dtype < DS_DTYPES && strcmp(words[e->dtype], dtype);)
        e->dtype++;
    if (e->dtype == DS_DTYPES)
        return ds_fail(DS_ECORRUPT,
                       "'%s': tensor '%.200s' has dtype %.20s; there are F32 BF16 F16 F64 I64 I32 "
                       "U8 BOOL",
                       ds_file_path(f), name, dtype);
    if (json_array_size(shape) > DS_MAX_DIM)
        return bad(f, name, "it has more than 8 dimensions");
    e->name = name;
    e->ndim = (int32_t)json_array_size(shape);
    e->numel = 1;
    for (int d = 0; d < e->ndim; d++)
        if (!whole(&e->shape[d], json_array_get(shape, (size_t)d)) ||
            __builtin_mul_overflow(e->numel, e->shape[d], &e->numel))
            return bad(f, name, "its shape makes no sense");
    if (!whole(&e->offset, json_array_get(span, 0)) || !whole(&end, json_array_get(span, 1)) ||
        end < e->offset)
        return bad(f, name, "its data_offsets make no sense");
    e->bytes = end - e->offset;
    if (__builtin_mul_overflow(e->numel, ds_dtype_size(e->dtype), &bytes) || bytes != e->bytes)
        return bad(f, name, "its data_offsets do not match its shape and dtype");
    return 0;
}

static int by_offset(const void *a, const void *b)
{
    const ds_entry *x = a, *y = b;

    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes; /* empty ones first */
}

static int parse_entries(ds_tensors *t, const ds_file *f, int64_t data)
{
    int64_t at = 0;
    const char *name;
    json_t *v;
    int rc;

    t->entries = calloc(json_object_size(t->header) + 1, sizeof *t->entries);
    if (!t->entries)
        return ds_fail(DS_ENOMEM, "out of host memory");
    json_object_foreach(t->header, name, v)
    {
        if (!strcmp(name, "__metadata__"))
            continue;
        rc = parse_entry(&t->entries[t->n++], f, name, v);
        if (rc < 0)
            return rc;
    }
    qsort(t->entries, (size_t)t->n, sizeof *t->entries, by_offset);
    for (int i = 0; i < t->n; i++) {
        ds_entry *e = &t->entries[i];

        if (e->offset != at)
            return bad(f, e->name,
                       e->offset < at ? "it overlaps another one" : "there is a gap before it");
        at += e->bytes; /* no overflow: both ends fit, and e->offset is at */
        e->offset += ds_file_bytes(f) - data;
    }
    if (at != data)
        return ds_fail(DS_ECORRUPT, "'%s' is damaged: its tensors take %lld bytes, it has %lld",
                       ds_file_path(f), (long long)at, (long long)data);
    return 0;
}

static int parse_meta(const ds_tensors *t, const ds_file *f)
{
    json_t *meta = json_object_get(t->header, "__metadata__"), *v;
    const char *key;

    if (meta && !json_is_object(meta))
        return ds_fail(DS_ECORRUPT, "'%s' is damaged: __metadata__ is not an object",
                       ds_file_path(f));
    json_object_foreach(meta, key, v) if (!json_is_string(v)) return ds_fail(
        DS_ECORRUPT, "'%s' is damaged: metadata '%.200s' is not a string", ds_file_path(f), key);
    return 0;
}

static int parse_header(ds_tensors *t, const ds_file *f, const char *text, int64_t bytes)
{
    json_error_t error;
    int rc;

    t->header = json_loadb(text, (size_t)bytes, JSON_REJECT_DUPLICATES, &error);
    if (!t->header)
        return ds_fail(DS_ECORRUPT, "'%s' is damaged: its header is not JSON (%s)", ds_file_path(f),
                       error.text);
    if (text[0] != '{' || !json_is_object(t->header))
        return ds_fail(DS_ECORRUPT, "'%s' is damaged: its header is not a JSON object",
                       ds_file_path(f));
    rc = parse_meta(t, f);
    return rc < 0 ? rc : parse_entries(t, f, ds_file_bytes(f) - 8 - bytes);
}

int ds_tensors_parse(ds_tensors **out, ds_file *f)
{
    unsigned char length[8];
    uint64_t bytes = 0;
    char *text = NULL;
    ds_tensors *t;
    int rc;

    if (ds_file_bytes(f) < 8)
        return ds_fail(DS_ECORRUPT, "'%s' is no safetensors file: it has %lld bytes",
                       ds_file_path(f), (long long)ds_file_bytes(f));
    rc = ds_file_read(f, length, 8, 0);
    if (rc < 0)
        return rc;
    for (int i = 0; i < 8; i++)
        bytes |= (uint64_t)length[i] << (8 * i);
    if (bytes < 2 || bytes > HEADER_MAX || (int64_t)bytes > ds_file_bytes(f) - 8)
        return ds_fail(DS_ECORRUPT,
                       "'%s' is no safetensors file, or cut off: it has %lld bytes and announces a "
                       "header of %llu",
                       ds_file_path(f), (long long)ds_file_bytes(f), (unsigned long long)bytes);
    t = calloc(1, sizeof *t);
    text = malloc((size_t)bytes);
    rc = t && text ? ds_file_read(f, text, (int64_t)bytes, 8)
                   : ds_fail(DS_ENOMEM, "out of host memory");
    if (rc >= 0)
        rc = parse_header(t, f, text, (int64_t)bytes);
    free(text);
    if (rc < 0) {
        ds_tensors_free(t);
        return rc;
    }
    *out = t;
    return 0;
}

void ds_tensors_free(ds_tensors *t)
{
    if (!t)
        return;
    json_decref(t->header);
    free(t->entries);
    free(t);
}

int ds_tensors_count(const ds_tensors *t)
{
    return t->n;
}

const ds_entry *ds_tensors_entry(const ds_tensors *t, int i)
{
    return i >= 0 && i < t->n ? &t->entries[i] : NULL;
}

const char *ds_tensors_meta(const ds_tensors *t, const char *key)
{
    return json_string_value(json_object_get(json_object_get(t->header, "__metadata__"), key));
}

int ds_tensors_read(ds_file *f, const ds_entry *e, void *data, int64_t first, int64_t n)
{
    int64_t size = ds_dtype_size(e->dtype);

    if (first < 0 || n < 0 || first > e->numel || n > e->numel - first)
        return ds_fail(
            DS_ERANGE, "tensor '%s' in '%s' has %lld elements, not %lld from element %lld on",
            e->name, ds_file_path(f), (long long)e->numel, (long long)n, (long long)first);
    return ds_file_read(f, data, n * size, e->offset + first * size);
}
