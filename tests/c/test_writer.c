/* test_writer.c - files that a thread writes while memory stays, and after it was released. */
#include "tests/c/disk.h"

#include "runner/file.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/error.h"

#define MB ((int64_t)1 << 20)

static void fill(char *p, int64_t bytes, unsigned seed)
{
    for (int64_t i = 0; i < bytes; i++)
        p[i] = (char)((seed = seed * 1664525u + 1013904223u) >> 24);
}

static char *pattern(int64_t bytes, unsigned seed)
{
    char *p = NULL;

    assert_int_equal(posix_memalign((void **)&p, 4096, (size_t)bytes + 1), 0);
    fill(p, bytes, seed);
    return p;
}

static void assert_holds(const char *path, const char *data, int64_t bytes, const char *hash)
{
    char *back = malloc((size_t)bytes + 1), found[17];
    ds_file *f;

    assert_int_equal(ds_file_open(&f, path), 0);
    assert_int_equal(ds_file_bytes(f), bytes);
    assert_int_equal(ds_file_read(f, back, bytes, 0), 0);
    assert_memory_equal(back, data, (size_t)bytes);
    assert_int_equal(ds_file_hash(f, found), 0);
    assert_string_equal(found, hash);
    ds_file_close(f);
    free(back);
}

/* A disk that is slow: every write takes some milliseconds. */
static int slow_write(ds_queue *q, int slot, int fd, const void *data, int64_t bytes, int64_t at)
{
    const struct timespec pause = {.tv_nsec = 3 * 1000 * 1000};

    nanosleep(&pause, NULL);
    return system_io.write(q, slot, fd, data, bytes, at);
}

static int writes_left;

static int full_write(ds_queue *q, int slot, int fd, const void *data, int64_t bytes, int64_t at)
{
    return writes_left-- > 0 ? system_io.write(q, slot, fd, data, bytes, at) : -ENOSPC;
}

/* Two files out of one memory: all of it, and 300 x 700 elements of it transposed behind 100 bytes. */
enum { ROWS = 300, COLUMNS = 700, HEAD = 100 };

static void transposed(char *out, const char *data, int64_t size)
{
    memcpy(out, data, HEAD);
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t c = 0; c < COLUMNS; c++)
            memcpy(out + HEAD + (c * ROWS + r) * size, data + (r * COLUMNS + c) * size,
                   (size_t)size);
}

static void begin(ds_writer **w, const char *data, int64_t bytes, int64_t size)
{
    int64_t matrix = ROWS * COLUMNS * size;
    ds_file *f;

    assert_int_equal(ds_writer_open(w), 0);
    assert_int_equal(ds_file_create(&f, in("all"), bytes, 0), 0);
    for (int64_t at = 0, n; at < bytes; at += n) {
        n = bytes - at < 5 * MB + 4096 ? bytes - at : 5 * MB + 4096;
        assert_int_equal(ds_writer_append(*w, f, data + at, n), 0);
    }
    assert_int_equal(ds_writer_commit(*w, f), 0);
    assert_int_equal(ds_file_create(&f, in("matrix"), HEAD + matrix, 0), 0);
    assert_int_equal(ds_writer_append(*w, f, data, HEAD), 0);
    assert_int_equal(ds_writer_append(*w, f, data, 0), 0);
    assert_int_equal(ds_writer_append_transposed(*w, f, data, ROWS, COLUMNS, size), 0);
    assert_int_equal(ds_writer_commit(*w, f), 1);
    assert_null(ds_writer_hash(*w, 0));
}

static void check_files(ds_writer *w, const char *data, int64_t bytes, int64_t size)
{
    int64_t matrix = HEAD + ROWS * COLUMNS * size;
    char *want = malloc((size_t)matrix);

    transposed(want, data, size);
    assert_holds(in("all"), data, bytes, ds_writer_hash(w, 0));
    assert_holds(in("matrix"), want, matrix, ds_writer_hash(w, 1));
    assert_null(ds_writer_hash(w, 2));
    free(want);
}

static void test_files_are_what_memory_was(void **state)
{
    static const char *const modes[] = {"plain", "direct", "uring"};
    const int64_t bytes = 21 * MB + 5;
    char *data = pattern(bytes, 1);

    (void)state;
    for (int i = 0; i < 3; i++)
        for (int64_t size = 1; size <= 8; size *= 2) {
            ds_writer *w;

            setenv("DS_IO", modes[i], 1);
            begin(&w, data, bytes, size);
            assert_int_equal(ds_writer_start(w), 0);
            assert_int_equal(ds_writer_wait(w), 0);
            assert_int_equal(ds_writer_state(w), 0);
            check_files(w, data, bytes, size);
            assert_int_equal(ds_writer_statistics(w).bytes, bytes + HEAD + ROWS * COLUMNS * size);
            ds_writer_close(w);
            assert_int_equal(ds_remove(in("all")), 0);
            assert_int_equal(ds_remove(in("matrix")), 0);
        }
    free(data);
}

/* `wait_ms` after the start the memory is released, and overwritten at once. */
static void release_after(int wait_ms, int64_t most)
{
    const struct timespec pause = {.tv_nsec = wait_ms * 1000 * 1000};
    const int64_t bytes = 24 * MB + 4096 + 5;
    char *data = pattern(bytes, 2), *copy = pattern(bytes, 2);
    ds_writer_stats stats;
    ds_writer *w;

    begin(&w, data, bytes, 4);
    assert_int_equal(ds_writer_start(w), 0);
    nanosleep(&pause, NULL);
    assert_int_equal(ds_writer_release(w, most), 0);
    memset(data, 0, (size_t)bytes);
    assert_int_equal(ds_writer_release(w, most), 0); /* again is harmless */
    assert_int_equal(ds_writer_wait(w), 0);
    stats = ds_writer_statistics(w);
    assert_true(stats.copied <= most + ROWS * COLUMNS * 4);
    check_files(w, copy, bytes, 4);
    ds_writer_close(w);
    assert_int_equal(ds_remove(in("all")), 0);
    assert_int_equal(ds_remove(in("matrix")), 0);
    free(data);
    free(copy);
}

static void test_released_memory_may_change(void **state)
{
    (void)state;
    ds_io_now()->write = slow_write;
    for (int wait = 0; wait < 40; wait += 7)
        for (int64_t most = 0; most <= 64 * MB; most = most ? most * 64 : MB / 64)
            release_after(wait, most);
}

static void test_a_full_disk_is_told_and_leaves_nothing(void **state)
{
    const int64_t bytes = 9 * MB;
    char *data = pattern(bytes, 3);
    int failures = 0;

    (void)state;
    ds_io_now()->write = full_write;
    for (int good = 0; good < 8; good++) {
        ds_writer *w;

        writes_left = good;
        begin(&w, data, bytes, 4);
        assert_int_equal(ds_writer_start(w), 0);
        if (good % 2)
            assert_int_equal(ds_writer_release(w, MB), 0);
        if (ds_writer_wait(w) == 0) {
            assert_true(good > 3);
            ds_writer_close(w);
            assert_int_equal(ds_remove(in("all")), 0);
            assert_int_equal(ds_remove(in("matrix")), 0);
            continue;
        }
        failures++;
        assert_int_equal(ds_writer_state(w), DS_EIO);
        assert_non_null(strstr(ds_error(), folder));
        assert_non_null(strstr(ds_error(), "bytes and"));
        assert_null(ds_writer_hash(w, 0));
        ds_writer_close(w);
        assert_int_equal(ds_path_kind(in("matrix")), DS_PATH_NONE);
        ds_remove(in("all")); /* there, if it was the second one that failed */
    }
    assert_true(failures >= 4 && failures < 8);
    free(data);
}

static void test_closing_early_leaves_no_half_file(void **state)
{
    const int64_t bytes = 30 * MB;
    char *data = pattern(bytes, 4);
    ds_writer *w;

    (void)state;
    begin(&w, data, bytes, 4); /* never started */
    ds_writer_close(w);
    assert_int_equal(ds_path_kind(in("all")), DS_PATH_NONE);
    ds_io_now()->write = slow_write;
    begin(&w, data, bytes, 4);
    assert_int_equal(ds_writer_start(w), 0);
    ds_writer_close(w);
    assert_int_equal(ds_path_kind(in("all")), DS_PATH_NONE);
    assert_int_equal(ds_path_kind(in("matrix")), DS_PATH_NONE);
    free(data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_files_are_what_memory_was, setup, teardown),
        cmocka_unit_test_setup_teardown(test_released_memory_may_change, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_full_disk_is_told_and_leaves_nothing, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_closing_early_leaves_no_half_file, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
