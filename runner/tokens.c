/* tokens.c - where tokens come from: texts, as ids of their characters, and token files, mapped.
 *
 * Tokens stay in C memory, one, two or four bytes each, and never become Lua tables.
 */
#include "runner/data.h"

#include <errno.h>
#include <glob.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/file.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "token files are little-endian and are mapped as they are"
#endif

/* ---- files */

/* All of a file, which may be a pipe, in memory that the caller frees. */
static int read_file(char **out, int64_t *bytes, const char *path)
{
    int rc = ds_read_whole(out, bytes, path, INT64_MAX);

    if (rc == 0 && *bytes == 0) {
        free(*out);
        *out = NULL;
        rc = ds_fail(DS_ECORRUPT, "%s is empty", path);
    }
    return rc;
}

/* ---- characters */

enum { CODE_POINTS = 0x110000, ASCII = 128 };

struct ds_vocab {
    int32_t bytes; /* 1: ids are the bytes themselves; there is no list */
    int32_t size;
    int32_t ascii[ASCII]; /* the ids of one-byte characters; -1: not in the vocabulary */
    uint32_t code[];      /* ascending */
};

/* The character at s, of which there are `left` > 0 bytes; its length, or 0 if it is not UTF-8. */
static int character(uint32_t *code, const unsigned char *s, int64_t left)
{
    static const uint32_t lowest[] = {0, 0, 0x80, 0x800, 0x10000};
    int n = s[0] < 0x80 ? 1 : s[0] >> 5 == 6 ? 2 : s[0] >> 4 == 14 ? 3 : s[0] >> 3 == 30 ? 4 : 0;
    uint32_t c = n == 1 ? s[0] : s[0] & (0x7fu >> n);

    if (n == 0 || n > left)
        return 0;
    for (int i = 1; i < n; i++) {
        if (s[i] >> 6 != 2)
            return 0;
        c = c << 6 | (s[i] & 0x3f);
    }
    if (c < lowest[n] || c >= CODE_POINTS || (c >= 0xd800 && c < 0xe000))
        return 0;
    *code = c;
    return n;
}

static int not_utf8(const char *name, int64_t at, unsigned char byte)
{
    return ds_fail(DS_ECORRUPT,
                   "%s: byte %lld (0x%02x) is not UTF-8; level = \"byte\" takes any file", name,
                   (long long)at + 1, byte);
}

static int make_vocab(ds_vocab **out, const char *name, const char *text, int64_t bytes)
{
    const unsigned char *s = (const unsigned char *)text;
    unsigned char *seen = calloc(1, CODE_POINTS);
    ds_vocab *v = NULL;
    uint32_t code;
    int32_t size = 0;
    int rc = DS_ENOMEM, n;

    if (!seen)
        goto memory;
    for (int64_t at = 0; at < bytes; at += n) {
        n = character(&code, s + at, bytes - at);
        if (n == 0) {
            rc = not_utf8(name, at, s[at]);
            goto fail;
        }
        size += !seen[code];
        seen[code] = 1;
    }
    v = malloc(sizeof *v + (size_t)size * sizeof *v->code);
    if (!v)
        goto memory;
    *v = (ds_vocab){.size = 0};
    memset(v->ascii, -1, sizeof v->ascii);
    for (code = 0; v->size < size; code++) {
        if (!seen[code])
            continue;
        if (code < ASCII)
            v->ascii[code] = v->size;
        v->code[v->size++] = code;
    }
    free(seen);
    *out = v;
    return 0;

memory:
    ds_fail(rc, "out of memory: the characters of %s", name);
fail:
    free(seen);
    return rc;
}

int ds_vocab_make(ds_vocab **out, const char *text, int64_t bytes)
{
    if (text)
        return make_vocab(out, "the vocabulary", text, bytes);
    *out = calloc(1, sizeof **out);
    if (!*out)
        return ds_fail(DS_ENOMEM, "out of memory: a vocabulary");
    (*out)->bytes = 1;
    (*out)->size = 256;
    return 0;
}

void ds_vocab_free(ds_vocab *v)
{
    free(v);
}

int64_t ds_vocab_size(const ds_vocab *v)
{
    return v->size;
}

/* The id of a character, -1 if there is none. */
static int32_t id_of(const ds_vocab *v, uint32_t code)
{
    int32_t low = 0, high = v->size;

    if (code < ASCII)
        return v->ascii[code];
    while (low < high) {
        int32_t middle = low + (high - low) / 2;

        if (v->code[middle] < code)
            low = middle + 1;
        else
            high = middle;
    }
    return low < v->size && v->code[low] == code ? low : -1;
}

int ds_vocab_encode(int32_t *ids, int64_t *n, const ds_vocab *v, const char *text, int64_t bytes)
{
    const unsigned char *s = (const unsigned char *)text;
    uint32_t code;
    int64_t count = 0;
    int length;

    for (int64_t at = 0; at < bytes; at += length) {
        length = v->bytes ? 1 : character(&code, s + at, bytes - at);
        if (length == 0)
            return not_utf8("encode", at, s[at]);
        ids[count] = v->bytes ? s[at] : id_of(v, code);
        if (ids[count++] < 0)
            return ds_fail(DS_EINVAL,
                           "encode: \"%.*s\" (U+%04X) at byte %lld is none of the vocabulary's %d "
                           "characters",
                           length, text + at, (unsigned)code, (long long)at + 1, (int)v->size);
    }
    *n = count;
    return 0;
}

int ds_vocab_decode(char *text, int64_t *bytes, const ds_vocab *v, const int32_t *ids, int64_t n)
{
    char *out = text;

    for (int64_t i = 0; i < n; i++) {
        uint32_t c;

        if (ids[i] < 0 || ids[i] >= v->size)
            return ds_fail(DS_ERANGE,
                           "decode: id %d at position %lld is outside the vocabulary of %d",
                           (int)ids[i], (long long)i + 1, (int)v->size);
        c = v->bytes ? (uint32_t)ids[i] : v->code[ids[i]];
        if (v->bytes || c < 0x80) {
            *out++ = (char)c;
        } else if (c < 0x800) {
            *out++ = (char)(0xc0 | c >> 6);
            *out++ = (char)(0x80 | (c & 0x3f));
        } else if (c < 0x10000) {
            *out++ = (char)(0xe0 | c >> 12);
            *out++ = (char)(0x80 | (c >> 6 & 0x3f));
            *out++ = (char)(0x80 | (c & 0x3f));
        } else {
            *out++ = (char)(0xf0 | c >> 18);
            *out++ = (char)(0x80 | (c >> 12 & 0x3f));
            *out++ = (char)(0x80 | (c >> 6 & 0x3f));
            *out++ = (char)(0x80 | (c & 0x3f));
        }
    }
    *bytes = out - text;
    return 0;
}

/* ---- streams of tokens */

static void free_shard(struct ds_shard *s)
{
    if (s->map_bytes)
        munmap(s->memory, s->map_bytes);
    else
        free(s->memory);
    free(s->name);
}

void ds_tokens_retain(ds_tokens *t)
{
    atomic_fetch_add(&t->refs, 1);
}

void ds_tokens_release(ds_tokens *t)
{
    if (!t || atomic_fetch_sub(&t->refs, 1) != 1)
        return;
    for (int i = 0; i < t->n; i++)
        free_shard(&t->shard[i]);
    free(t);
}

int64_t ds_tokens_count(const ds_tokens *t)
{
    return t->count;
}

/* Room for n shards, none there yet. */
static int new_tokens(ds_tokens **out, size_t n)
{
    ds_tokens *t = calloc(1, sizeof *t + n * sizeof *t->shard);

    if (!t)
        return ds_fail(DS_ENOMEM, "out of memory: a stream of %zu token files", n);
    t->refs = 1;
    *out = t;
    return 0;
}

/* Writes the ids of a text, `width` bytes each; v was made from it, so all characters are known. */
static void encode_narrow(char *out, int width, const ds_vocab *v, const char *text, int64_t bytes)
{
    const unsigned char *s = (const unsigned char *)text;
    uint32_t code = 0;
    int64_t i = 0;
    int length;

    for (int64_t at = 0; at < bytes; at += length, i++) {
        uint32_t id;

        length = character(&code, s + at, bytes - at);
        id = (uint32_t)id_of(v, code);
        memcpy(out + i * width, &id, (size_t)width); /* little-endian: the low bytes come first */
    }
}

int ds_tokens_text(ds_tokens **out, ds_vocab **vocab, const char *path, int bytes)
{
    ds_tokens *t = NULL;
    ds_vocab *v = NULL;
    char *text = NULL, *ids;
    int64_t n = 0, count = 0;
    int rc = read_file(&text, &n, path), width;

    if (rc == 0)
        rc = bytes ? ds_vocab_make(&v, NULL, 0) : make_vocab(&v, path, text, n);
    if (rc == 0)
        rc = new_tokens(&t, 1);
    if (rc < 0)
        goto fail;
    width = v->size <= 1 << 8 ? 1 : v->size <= 1 << 16 ? 2 : 4;
    if (bytes) {
        ids = text;
        text = NULL;
        count = n;
    } else {
        for (int64_t i = 0; i < n; i++) /* a character has one byte that does not continue it */
            count += (text[i] & 0xc0) != 0x80;
        ids = malloc((size_t)count * (size_t)width);
        if (ids)
            encode_narrow(ids, width, v, text, n);
    }
    t->n = 1;
    t->count = count;
    t->shard[0] = (struct ds_shard){
        .name = strdup(path), .data = ids, .count = count, .width = width, .memory = ids};
    if (!t->shard[0].name || !ids) {
        rc = ds_fail(DS_ENOMEM, "out of memory: the tokens of %s", path);
        goto fail;
    }
    free(text);
    *out = t;
    *vocab = v;
    return 0;

fail:
    ds_tokens_release(t);
    ds_vocab_free(v);
    free(text);
    return rc;
}

/* The shard files of llm.c (its dev/data/data_common.py): 256 int32, of which the first three are
 * the magic number, the version and the count of tokens, then the tokens. */
static const struct {
    int32_t magic, version;
    int width;
} formats[] = {{20240520, 1, 2}, {20240801, 7, 4}};

enum { HEADER = 256 * 4 };

int ds_shard_parse(struct ds_shard *out, const char *name, const void *file, size_t bytes,
                   int width)
{
    int32_t head[3] = {0};
    size_t k = 0, known = sizeof formats / sizeof formats[0];

    memcpy(head, file, bytes < sizeof head ? bytes : sizeof head);
    while (k < known && head[0] != formats[k].magic)
        k++;
    *out = (struct ds_shard){.width = width};
    if (k < known) {
        if (bytes < HEADER)
            return ds_fail(DS_ECORRUPT, "%s: cut off within its header (%zu of %d bytes)", name,
                           bytes, HEADER);
        if (head[1] != formats[k].version)
            return ds_fail(DS_ECORRUPT, "%s: token file of version %d, not %d", name, (int)head[1],
                           (int)formats[k].version);
        if (width && width != formats[k].width)
            return ds_fail(DS_EINVAL, "%s: its header says %d bytes a token, dtype says %d", name,
                           formats[k].width, width);
        out->width = formats[k].width;
        if (head[2] < 0 || (size_t)head[2] * (size_t)out->width != bytes - HEADER)
            return ds_fail(DS_ECORRUPT,
                           "%s: its header counts %d tokens, which is %lld bytes with the header; "
                           "the file has %zu",
                           name, (int)head[2], (long long)head[2] * out->width + HEADER, bytes);
    } else if (width == 0) {
        return ds_fail(DS_ECORRUPT,
                       "%s: no token file with a header (it begins with %d, not %d); for raw "
                       "tokens say dtype = \"uint16\" or \"int32\"",
                       name, (int)head[0], (int)formats[0].magic);
    } else if (bytes % (size_t)width) {
        return ds_fail(DS_ECORRUPT, "%s: %zu bytes are no whole number of %d-byte tokens", name,
                       bytes, width);
    }
    out->data = (const char *)file + (k < known ? HEADER : 0);
    out->count = (int64_t)(bytes - (k < known ? HEADER : 0)) / out->width;
    if (out->count == 0)
        return ds_fail(DS_ECORRUPT, "%s: no tokens in it", name);
    return 0;
}

static int map_shard(struct ds_shard *out, const char *path, int width)
{
    struct stat st;
    int fd = ds_read_open(&st, path), rc;
    void *map;

    if (fd < 0)
        return fd;
    if (!S_ISREG(st.st_mode) || st.st_size == 0) {
        close(fd);
        return ds_fail(DS_ECORRUPT, "%s is %s", path,
                       S_ISREG(st.st_mode) ? "empty" : "no regular file, so it can't be mapped");
    }
    map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    rc = map == MAP_FAILED ? ds_fail(DS_EIO, "cannot map %s: %s", path, strerror(errno)) : 0;
    close(fd);
    if (rc < 0)
        return rc;
    rc = ds_shard_parse(out, path, map, (size_t)st.st_size, width);
    if (rc == 0 && !(out->name = strdup(path)))
        rc = ds_fail(DS_ENOMEM, "out of memory: the name of %s", path);
    if (rc < 0) {
        munmap(map, (size_t)st.st_size);
        return rc;
    }
    out->memory = map;
    out->map_bytes = (size_t)st.st_size;
    return 0;
}

struct names {
    char **path;
    size_t n;
};

static int add_name(struct names *names, const char *path)
{
    char **more = realloc(names->path, (names->n + 1) * sizeof *more);

    if (more)
        names->path = more;
    if (!more || !(more[names->n] = strdup(path)))
        return ds_fail(DS_ENOMEM, "out of memory: the name of %s", path);
    names->n++;
    return 0;
}

static int by_bytes(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Appends the files that a path or pattern means. A file of exactly that name is no pattern. */
static int add_files(struct names *names, const char *path)
{
    glob_t found = {0};
    int rc = 0;

    if (!strpbrk(path, "*?[") || access(path, F_OK) == 0)
        return add_name(names, path);
    rc = glob(path, GLOB_NOSORT, NULL, &found);
    if (rc)
        return rc == GLOB_NOMATCH ? ds_fail(DS_ENOENT, "no file matches %s", path)
                                  : ds_fail(DS_EIO, "cannot list the files of %s", path);
    /* by bytes, since the order of a locale could differ between ranks */
    qsort(found.gl_pathv, found.gl_pathc, sizeof *found.gl_pathv, by_bytes);
    for (size_t i = 0; rc == 0 && i < found.gl_pathc; i++)
        rc = add_name(names, found.gl_pathv[i]);
    globfree(&found);
    return rc;
}

int ds_tokens_open(ds_tokens **out, const char *const *paths, int n, int width)
{
    struct names names = {0};
    ds_tokens *t = NULL;
    int rc = n < 1 ? ds_fail(DS_EINVAL, "no token file is given") : 0;

    if (width != 0 && width != 2 && width != 4)
        rc = ds_fail(DS_EINVAL, "a token has 2 or 4 bytes, not %d", width);
    for (int i = 0; rc == 0 && i < n; i++)
        rc = add_files(&names, paths[i]);
    if (rc == 0)
        rc = new_tokens(&t, names.n);
    for (size_t i = 0; rc == 0 && i < names.n; i++) {
        rc = map_shard(&t->shard[i], names.path[i], width);
        if (rc == 0) {
            t->count += t->shard[i].count;
            t->n++;
        }
    }
    for (size_t i = 0; i < names.n; i++)
        free(names.path[i]);
    free(names.path);
    if (rc < 0)
        ds_tokens_release(t);
    else
        *out = t;
    return rc;
}
