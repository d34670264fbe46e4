/* data.h - what data.c, tokens.c and their tests share beyond the FFI surface. */
#ifndef DS_DATA_H
#define DS_DATA_H

#include <stdatomic.h>

#include "runner/ds.h"

/* One stretch of tokens that a window may not leave: a whole file. */
struct ds_shard {
    char *name;       /* the file's path */
    const char *data; /* the first token */
    int64_t count;    /* tokens */
    int width;        /* bytes a token: 1, 2 or 4, little-endian, unsigned */
    void *memory;     /* what data points into: a mapping of map_bytes, or (0) from malloc */
    size_t map_bytes;
};

/* Finds the tokens in the `bytes` bytes of a token file: sets data, count and width. `width` 2 or 4
 * says what a file without a header holds; 0: only a file with a header will do. Reads nothing
 * outside the bytes. DS_ECORRUPT: the file, named in the message, is not what it should be. */
int ds_shard_parse(struct ds_shard *out, const char *name, const void *file, size_t bytes,
                   int width);

/* A stream: shards one after the other. */
struct ds_tokens {
    atomic_int refs;
    int n;         /* shards */
    int64_t count; /* tokens in all of them */
    struct ds_shard shard[];
};

void ds_tokens_retain(ds_tokens *t);

/* Writes n windows of w: x and y get n × length tokens each. DS_ERANGE: no such window, or a token
 * outside the vocabulary. Safe to call from several threads. */
int ds_windows_copy(int32_t *x, int32_t *y, const ds_windows *w, const int64_t *index, int64_t n);

void ds_windows_retain(ds_windows *w);

#endif
