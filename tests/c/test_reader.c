/* test_reader.c - a file read once: every byte arrives, in every mode, and the hash is that of the file. */
#include "tests/c/disk.h"

#include "runner/file.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/error.h"

/* Some pieces are taken, some passed over. */
static void check(const char *data, int64_t bytes, int64_t step, const char *want)
{
    char *out = malloc((size_t)step + 1), hash[17];
    ds_reader *r;
    int turn = 0;

    assert_int_equal(ds_reader_open(&r, in("file")), 0);
    for (int64_t at = 0, n; at < bytes; at += n, turn++) {
        n = bytes - at < step ? bytes - at : step;
        if (turn == 7)
            break; /* the end reads the rest */
        assert_int_equal(ds_reader_read(r, turn % 3 == 1 ? NULL : out, n), 0);
        if (turn % 3 != 1)
            assert_memory_equal(out, data + at, (size_t)n);
    }
    assert_int_equal(ds_reader_end(r, hash), 0);
    assert_string_equal(hash, want);
    free(out);
}

static void test_all_of_it_arrives(void **state)
{
    static const char *const modes[] = {"plain", "direct", "uring"};
    const int64_t sizes[] = {0,
                             1,
                             4095,
                             4096,
                             DS_IO_BLOCK - 1,
                             DS_IO_BLOCK,
                             DS_IO_BLOCK + 1,
                             DS_IO_DEPTH * DS_IO_BLOCK,
                             DS_IO_DEPTH * DS_IO_BLOCK + 5,
                             3 * DS_IO_DEPTH * DS_IO_BLOCK + 12345};

    (void)state;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char *data = malloc((size_t)sizes[i] + 1), hash[17];

        for (int64_t k = 0; k < sizes[i]; k++)
            data[k] = (char)(k * 2654435761u >> 13);
        assert_int_equal(ds_file_put(in("file"), data, sizes[i], 1, hash), 0);
        for (int m = 0; m < 3; m++) {
            setenv("DS_IO", modes[m], 1);
            check(data, sizes[i], 100003, hash);
            check(data, sizes[i], DS_IO_BLOCK, hash);
            check(data, sizes[i], 5 * DS_IO_BLOCK + 1, hash);
        }
        free(data);
    }
}

static void test_too_much_and_too_short_are_errors(void **state)
{
    static char data[100000];
    static const int64_t bytes = DS_IO_DEPTH * DS_IO_BLOCK * 2;
    char *all = calloc(1, (size_t)bytes), hash[17];
    ds_reader *r;

    (void)state;
    assert_int_equal(ds_reader_open(&r, in("file")), DS_ENOENT);
    assert_int_equal(ds_reader_open(&r, folder), DS_ECORRUPT);
    assert_int_equal(ds_file_put(in("file"), data, sizeof data, 1, NULL), 0);
    assert_int_equal(ds_reader_open(&r, in("file")), 0);
    assert_int_equal(ds_reader_read(r, data, 50000), 0);
    assert_int_equal(ds_reader_read(r, data, 50001), DS_ERANGE);
    assert_int_equal(ds_reader_read(r, data, -1), DS_ERANGE);
    assert_int_equal(ds_reader_end(r, NULL), 0); /* half-read */
    assert_int_equal(ds_file_put(in("file"), all, bytes, 1, NULL), 0);
    assert_int_equal(ds_reader_open(&r, in("file")), 0);
    assert_int_equal(truncate(in("file"), 4096), 0);
    assert_int_equal(ds_reader_end(r, hash), DS_ECORRUPT);
    assert_non_null(strstr(ds_error(), "became shorter"));
    free(all);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_all_of_it_arrives, setup, teardown),
        cmocka_unit_test_setup_teardown(test_too_much_and_too_short_are_errors, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
