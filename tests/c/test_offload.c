/* test_offload.c - memory on a disk: what is written is what is read in every mode, many at once and
 * in order; requests as they were asked for; what goes wrong is told; nothing is left behind. */
#include "runner/file.h"

#include "tests/c/folder.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PAGE = 4096, SLOTS = 5 };
#define MB ((int64_t)1 << 20)

static const ds_aio usual = {
    .block_size = 64 << 10, .queue_depth = 4, .threads = 1, .overlap_events = 1};
static const char *const modes[] = {"plain", "direct", "uring"};

static int setup(void **state)
{
    (void)state;
    strcpy(folder + strlen(folder) - 6, "XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int teardown(void **state)
{
    char *names;
    int64_t bytes = ds_folder_list(&names, folder);

    (void)state;
    ds_free(names);
    unsetenv("DS_IO");
    return bytes == 0 ? ds_remove(folder) : -1; /* each test leaves the folder empty */
}

static ds_offload *open_file(int64_t bytes, const ds_aio *aio)
{
    ds_offload *f = NULL;

    assert_int_equal(ds_offload_open(&f, folder, bytes, SLOTS, aio), 0);
    assert_non_null(strstr(ds_offload_path(f), folder));
    return f;
}

/* `pages` of bytes at an address that is a multiple of the page's size, each with a value that tells
 * where it belongs; free(room) when nothing uses it. */
static ds_tensor pages_of(int pages, int value)
{
    int64_t room = (int64_t)(pages + 1) * PAGE, bytes = (int64_t)pages * PAGE;
    ds_tensor whole, t;

    assert_int_equal(ds_empty(&whole, DS_U8, DS_CPU, 1, &room), 0);
    assert_int_equal(
        ds_slice_flat(&t, &whole, (PAGE - (intptr_t)whole.data % PAGE) % PAGE, 1, &bytes), 0);
    ds_release(&whole);
    for (int i = 0; i < pages; i++)
        memset((char *)t.data + (size_t)i * PAGE, value + i, PAGE);
    return t;
}

static void assert_pages(const ds_tensor *t, int value)
{
    const unsigned char *data = t->data;

    for (int64_t i = 0; i < t->numel; i++)
        if (data[i] != (unsigned char)(value + i / PAGE))
            fail_msg("byte %lld is %d", (long long)i, data[i]);
}

/* Reads `pages` from page `at` on and compares. */
static void assert_holds(ds_offload *f, int pages, int64_t at, int value)
{
    ds_tensor t = pages_of(pages, 77);

    assert_int_equal(ds_offload_read(f, 0, &t, at * PAGE), 0);
    assert_int_equal(ds_offload_wait(f, 0), 0);
    assert_pages(&t, value);
    ds_release(&t);
}

static ds_offload_counters count(ds_offload *f)
{
    ds_offload_counters c;

    ds_offload_count(&c, f);
    return c;
}

/* ---- what is written is what is read */

static void test_every_mode(void **state)
{
    (void)state;
    for (int m = 0; m < 3; m++)
        for (int threads = 1; threads <= 3; threads += 2) {
            ds_aio aio = usual;
            ds_tensor t[SLOTS];
            ds_offload *f;

            aio.threads = threads;
            setenv("DS_IO", modes[m], 1);
            f = open_file(SLOTS * MB, &aio);
            for (int round = 0; round < 3; round++) {
                for (int i = 0; i < SLOTS; i++) { /* 17 pages: more than one request */
                    t[i] = pages_of(17 + i, 50 * i + round);
                    assert_int_equal(ds_offload_write(f, i, &t[i], i * MB), 0);
                    ds_release(&t[i]); /* the transfer keeps what it needs */
                }
                for (int i = 0; i < SLOTS; i++)
                    assert_int_equal(ds_offload_wait(f, i), 0);
                for (int i = 0; i < SLOTS; i++) { /* all under way at once */
                    t[i] = pages_of(17 + i, 0);
                    assert_int_equal(ds_offload_read(f, i, &t[i], i * MB), 0);
                }
                for (int i = SLOTS - 1; i >= 0; i--) {
                    assert_int_equal(ds_offload_wait(f, i), 0);
                    assert_int_equal(ds_offload_wait(f, i), 0); /* there is none: fine */
                    assert_pages(&t[i], 50 * i + round);
                    ds_release(&t[i]);
                }
            }
            assert_holds(f, 1, 16, 18); /* page 16 of the first */
            ds_offload_close(f);
        }
}

static void test_what_was_never_written_is_zero(void **state)
{
    ds_tensor t = pages_of(3, 9);
    ds_offload *f = open_file(MB, &usual);

    (void)state;
    assert_int_equal(ds_offload_read(f, 1, &t, MB - 3 * PAGE), 0);
    assert_int_equal(ds_offload_wait(f, 1), 0);
    for (int64_t i = 0; i < t.numel; i++)
        assert_int_equal(((char *)t.data)[i], 0);
    ds_release(&t);
    ds_offload_close(f);
}

/* ---- requests */

static void test_requests_are_as_asked_for(void **state)
{
    ds_tensor t = pages_of(64, 1); /* 256 KB: four requests of 64 KB, of 100 KB three */
    ds_aio aio = usual;
    ds_offload *f = open_file(MB, &aio);
    ds_offload_counters c;

    (void)state;
    assert_int_equal(ds_offload_write(f, 0, &t, 0), 0);
    assert_int_equal(ds_offload_wait(f, 0), 0);
    assert_int_equal(ds_offload_read(f, 0, &t, 0), 0);
    assert_int_equal(ds_offload_wait(f, 0), 0);
    c = count(f);
    assert_int_equal(c.writes, 4);
    assert_int_equal(c.reads, 4);
    assert_int_equal(c.bytes_written, 256 << 10);
    assert_int_equal(c.bytes_read, 256 << 10);
    assert_true(c.most_under_way >= 1 && c.most_under_way <= 4);
    ds_offload_close(f);

    aio.block_size = 100 << 10;
    f = open_file(MB, &aio);
    assert_int_equal(ds_offload_write(f, 0, &t, 0), 0);
    assert_int_equal(ds_offload_wait(f, 0), 0);
    assert_int_equal(count(f).writes, 3);
    ds_offload_close(f);
    ds_release(&t);
}

static void test_depth_and_threads(void **state)
{
    ds_tensor t = pages_of(256, 1); /* 16 requests */

    (void)state;
    for (int m = 0; m < 3; m++)
        for (int depth = 1; depth <= 8; depth += 7)
            for (int single = 0; single <= 1; single++) {
                ds_aio aio = usual;
                ds_offload_counters c;
                ds_offload *f;

                aio.queue_depth = depth;
                aio.single_submit = single;
                aio.overlap_events = single;
                setenv("DS_IO", modes[m], 1);
                f = open_file(MB, &aio);
                assert_int_equal(ds_offload_write(f, 0, &t, 0), 0);
                assert_int_equal(ds_offload_wait(f, 0), 0);
                c = count(f);
                assert_int_equal(c.writes, 16);
                assert_true(c.most_under_way <= depth);
                assert_int_equal(c.threads, c.ringed ? 1 : depth);
                if (c.ringed && depth == 8) {
                    assert_int_equal(c.most_under_way, 8);
                    assert_int_equal(c.submits, single ? 16 : 2);
                    assert_true(single ? c.refills > 0 : c.refills == 0);
                }
                assert_true(m == 2 || !c.ringed);
                assert_true(m > 0 || !c.direct);
                ds_offload_close(f);
            }
    ds_release(&t);
}

/* ---- what goes wrong */

static void test_nonsense_is_refused(void **state)
{
    ds_offload *f = open_file(MB, &usual);
    ds_tensor t = pages_of(4, 1), odd;
    int64_t bytes = PAGE;
    ds_aio aio = usual;
    ds_offload *other;

    (void)state;
    assert_int_equal(ds_slice_flat(&odd, &t, 512, 1, &bytes), 0);
    assert_int_equal(ds_offload_write(f, 0, &odd, 0), DS_EINVAL);
    assert_int_equal(ds_offload_write(f, 0, &t, 512), DS_EINVAL);
    assert_int_equal(ds_offload_write(f, 0, &t, MB - PAGE), DS_EINVAL);
    assert_int_equal(ds_offload_write(f, 0, &t, -PAGE), DS_EINVAL);
    assert_int_equal(ds_offload_write(f, SLOTS, &t, 0), DS_EINVAL);
    assert_int_equal(ds_offload_wait(f, -1), DS_EINVAL);
    assert_int_equal(ds_offload_write(f, 0, &t, 0), 0);
    assert_int_equal(ds_offload_write(f, 0, &t, 0), DS_EINVAL); /* one at a time */
    assert_int_equal(ds_offload_wait(f, 0), 0);
    ds_release(&odd);
    ds_release(&t);
    ds_offload_close(f);
    aio.block_size = 5000;
    assert_int_equal(ds_offload_open(&other, folder, MB, 1, &aio), DS_EINVAL);
    aio = usual;
    aio.queue_depth = 0;
    assert_int_equal(ds_offload_open(&other, folder, MB, 1, &aio), DS_EINVAL);
    ds_offload_close(NULL);
}

static void test_a_folder_that_will_not_do(void **state)
{
    ds_offload *f;

    (void)state;
    assert_int_equal(ds_offload_open(&f, path_of("none"), MB, 1, &usual), DS_ENOENT);
    assert_non_null(strstr(ds_error(), "none': no such file or folder"));
    write_file("file", "");
    assert_int_equal(ds_offload_open(&f, path_of("file"), MB, 1, &usual), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "it is no folder"));
    unlink(path_of("file"));
    assert_true(ds_offload_open(&f, "/proc/self", MB, 1, &usual) < 0); /* root is refused, too */
    assert_non_null(strstr(ds_error(), "cannot keep state in '/proc/self'"));
    assert_int_equal(ds_offload_open(&f, folder, (int64_t)1 << 60, 1, &usual), DS_EIO);
    assert_non_null(strstr(ds_error(), "the disk is full: 1152921504606846976 bytes are wanted"));
}

/* The descriptor of the file, which has no name any more. */
static int descriptor_of(const ds_offload *f)
{
    char link[64], target[DS_PATH + 1];

    for (int fd = 3; fd < 1000; fd++) {
        ssize_t n;

        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        n = readlink(link, target, sizeof target - 1);
        target[n > 0 ? n : 0] = 0;
        if (strstr(target, ds_offload_path(f)))
            return fd;
    }
    fail_msg("no descriptor of %s", ds_offload_path(f));
    return -1;
}

static void test_a_failing_disk(void **state)
{
    (void)state;
    for (int m = 0; m < 3; m++) {
        ds_tensor t = pages_of(40, 1);
        ds_offload *f;
        int fd;

        setenv("DS_IO", modes[m], 1);
        f = open_file(MB, &usual);
        fd = descriptor_of(f);
        assert_int_equal(ftruncate(fd, 20 * PAGE), 0);
        assert_int_equal(ds_offload_read(f, 0, &t, 0), 0);
        assert_int_equal(ds_offload_wait(f, 0), DS_ECORRUPT);
        assert_non_null(strstr(ds_error(), "it has become shorter"));
        assert_int_equal(ds_offload_wait(f, 0), 0); /* it was told */
        assert_true(dup2(open("/dev/full", O_RDWR | O_CLOEXEC), fd) == fd);
        assert_int_equal(ds_offload_write(f, 1, &t, 0), 0);
        assert_int_equal(ds_offload_wait(f, 1), DS_EIO);
        assert_non_null(strstr(ds_error(), "cannot write '"));
        assert_non_null(strstr(ds_error(), "the disk is full"));
        ds_release(&t);
        ds_offload_close(f);
    }
}

static int refused(const char *path)
{
    (void)path;
    return -EPERM;
}

/* Where a file that is open cannot lose its name, that goes in the end. */
static void test_a_name_that_stays_goes_with_close(void **state)
{
    ds_io *io = ds_io_now(), before = *io;
    ds_offload *f;

    (void)state;
    io->unlink = refused;
    f = open_file(MB, &usual);
    *io = before;
    assert_int_equal(ds_path_kind(ds_offload_path(f)), DS_PATH_FILE);
    ds_offload_close(f); /* the teardown finds an empty folder */
}

static void test_closed_while_transfers_run(void **state)
{
    (void)state;
    for (int m = 0; m < 3; m++) {
        ds_offload *f;

        setenv("DS_IO", modes[m], 1);
        f = open_file(SLOTS * MB, &usual);
        for (int i = 0; i < SLOTS; i++) {
            ds_tensor t = pages_of(200, i);

            assert_int_equal(
                (i % 2 ? ds_offload_read(f, i, &t, i * MB) : ds_offload_write(f, i, &t, i * MB)),
                0);
            ds_release(&t);
        }
        ds_offload_close(f);
    }
    assert_int_equal(ds_memory_of(DS_CPU)->live, 0);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_every_mode),
        TEST(test_what_was_never_written_is_zero),
        TEST(test_requests_are_as_asked_for),
        TEST(test_depth_and_threads),
        TEST(test_nonsense_is_refused),
        TEST(test_a_folder_that_will_not_do),
        TEST(test_a_failing_disk),
        TEST(test_a_name_that_stays_goes_with_close),
        TEST(test_closed_while_transfers_run),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
