/* fuzz_tokens.c - any bytes as a token file and as a text: refused with a message, or read to the
 * last token without leaving the memory that holds them.
 */
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/data.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void need(int condition)
{
    if (!condition)
        abort();
}

/* All windows of a file, through the same code that training uses. */
static void read_windows(const struct ds_shard *shard)
{
    ds_tokens *t = calloc(1, sizeof *t + sizeof *t->shard);
    ds_windows *w = NULL;
    int32_t x[7], y[7];

    need(t != NULL);
    t->refs = 2; /* never freed by release: the shard's memory is the fuzzer's */
    t->n = 1;
    t->count = shard->count;
    t->shard[0] = *shard;
    if (ds_windows_make(&w, t, 0, t->count, 7, 3, 0) == 0) {
        for (int64_t i = 0; i < ds_windows_count(w); i++)
            ds_windows_copy(x, y, w, &i, 1);
        ds_windows_release(w);
    }
    free(t);
}

static void read_text(const uint8_t *data, size_t size)
{
    int32_t *ids = malloc(size * sizeof *ids);
    char *back = malloc(size * 4);
    int64_t n, bytes;
    ds_vocab *v;

    need(ids && back);
    if (ds_vocab_make(&v, (const char *)data, (int64_t)size) == 0) {
        need(ds_vocab_encode(ids, &n, v, (const char *)data, (int64_t)size) == 0);
        need(ds_vocab_decode(back, &bytes, v, ids, n) == 0);
        need(bytes == (int64_t)size && memcmp(back, data, size) == 0);
        ds_vocab_free(v);
    }
    free(ids);
    free(back);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const int widths[] = {0, 2, 4};
    struct ds_shard shard;
    char *aligned = malloc(size ? size : 1); /* exact, so that one byte too far is seen */

    need(aligned != NULL);
    memcpy(aligned, data, size);
    for (int i = 0; i < 3; i++) {
        shard = (struct ds_shard){.name = (char[]){"fuzz"}};
        if (ds_shard_parse(&shard, "fuzz", aligned, size, widths[i]) == 0) {
            need(shard.count > 0 && shard.data >= aligned);
            need(shard.data + shard.count * shard.width == aligned + size);
            shard.name = (char[]){"fuzz"};
            read_windows(&shard);
        } else {
            need(*ds_error() != 0);
        }
    }
    if (size)
        read_text(data, size);
    free(aligned);
    return 0;
}
