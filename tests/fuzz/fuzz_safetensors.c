/* fuzz_safetensors.c - whatever bytes a file has, opening it says what is in it or what is wrong.
 *
 * What passes as good is also read from end to end: an entry that reached outside the file or the
 * memory for it would be found by the sanitizers. Bytes are tried as they are, and again behind the
 * length of the header that they seem to hold, which a fuzzer would hardly ever guess.
 */
#include "runner/file.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void read_all(ds_file *f, const ds_tensors *t)
{
    for (int i = 0; i < ds_tensors_count(t); i++) {
        const ds_entry *e = ds_tensors_entry(t, i);
        char *to;

        if (e->numel * ds_dtype_size(e->dtype) != e->bytes || e->bytes > ds_file_bytes(f))
            abort();
        to = malloc((size_t)e->bytes + 1);
        if (ds_tensors_read(f, e, to, 0, e->numel) < 0)
            abort();
        free(to);
    }
}

static void try_file(const uint8_t *length, const uint8_t *data, size_t size)
{
    static int fd = -1;
    size_t before = length ? 8 : 0;
    char path[64];
    ds_tensors *t;
    ds_file *f;

    if (fd < 0)
        fd = memfd_create("fuzz", 0);
    if (ftruncate(fd, 0) < 0 || pwrite(fd, length, before, 0) != (ssize_t)before ||
        pwrite(fd, data, size, (off_t)before) != (ssize_t)size)
        abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (ds_file_open(&f, path) < 0)
        abort();
    if (ds_tensors_parse(&t, f) >= 0) {
        read_all(f, t);
        ds_tensors_meta(t, "format");
        ds_tensors_free(t);
    } else if (!strstr(ds_error(), path)) {
        abort(); /* every refusal names the file */
    }
    ds_file_close(f);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *end = size ? memrchr(data, '}', size) : NULL;
    uint8_t length[8];

    try_file(NULL, data, size);
    for (int i = 0; i < 8 && end; i++)
        length[i] = (uint8_t)((uint64_t)(end + 1 - data) >> (8 * i));
    if (end)
        try_file(length, data, size);
    return 0;
}
