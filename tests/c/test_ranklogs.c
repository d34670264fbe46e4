/* test_ranklogs.c - files for ranks' output, on file systems that are well, full, or do not answer: a
 * FIFO that nobody reads has the calls on it wait for ever, too. */
#include "tests/c/folder.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/ds.h"
#include "runner/ranklogs.h"

#define PATIENCE 0.3

static ds_ranklogs *open_logs(int ranks)
{
    ds_ranklogs *l;

    if (ds_ranklogs_open(&l, path_of("logs"), ranks, PATIENCE) < 0)
        fail_msg("%s", ds_error());
    return l;
}

/* Until all is written or given up. The last news, "" if there was none; more of it is a failure. */
static const char *settle(ds_ranklogs *l)
{
    static char news[512];
    char more[512];
    double end = ds_seconds() + 10;
    int n = 0;
    size_t left;

    news[0] = 0;
    do {
        assert_true(ds_seconds() < end);
        usleep(1000);
        left = ds_ranklogs_waiting(l);
        while (ds_ranklogs_news(l, n ? more : news, sizeof news))
            n++;
    } while (left);
    assert_true(n <= 1);
    return news;
}

static void has(const char *name, const char *text)
{
    char got[256] = "";
    FILE *f = fopen(path_of(name), "r");

    assert_non_null(f);
    got[fread(got, 1, sizeof got - 1, f)] = 0;
    fclose(f);
    assert_string_equal(got, text);
}

static void each_rank_has_its_own(void **state)
{
    ds_ranklogs *l = open_logs(2);

    (void)state;
    for (int i = 0; i < 3; i++) {
        ds_ranklogs_add(l, 1, "one\n", 4);
        ds_ranklogs_add(l, 0, "zero\n", 5);
    }
    assert_string_equal(settle(l), "");
    ds_ranklogs_close(l);
    l = open_logs(2); /* again: it goes on behind */
    ds_ranklogs_add(l, 1, "more", 4);
    settle(l);
    ds_ranklogs_close(l);
    has("logs/rank_0.log", "zero\nzero\nzero\n");
    has("logs/rank_1.log", "one\none\none\nmore");
}

static void a_full_one_ends(void **state)
{
    ds_ranklogs *l;

    (void)state;
    assert_int_equal(mkdir(path_of("logs"), 0700), 0);
    assert_int_equal(symlink("/dev/full", path_of("logs/rank_0.log")), 0);
    l = open_logs(2);
    ds_ranklogs_add(l, 0, "zero", 4);
    ds_ranklogs_add(l, 1, "one", 3);
    assert_string_equal(settle(l), "dsrun: rank_0.log ends here: No space left on device");
    ds_ranklogs_add(l, 0, "zero", 4);
    ds_ranklogs_add(l, 1, "one", 3);
    assert_string_equal(settle(l), "");
    ds_ranklogs_close(l);
    has("logs/rank_1.log", "oneone");
}

static void what_cannot_be_opened_is_an_error(void **state)
{
    char want[256];
    ds_ranklogs *l;

    (void)state;
    write_file("logs", "a file");
    assert_true(ds_ranklogs_open(&l, path_of("logs/x"), 1, PATIENCE) < 0);
    assert_null(l);
    assert_non_null(strstr(ds_error(), path_of("logs")));
    assert_int_equal(unlink(path_of("logs")), 0);
    assert_int_equal(mkdir(path_of("logs"), 0700), 0);
    assert_int_equal(mkfifo(path_of("logs/rank_1.log"), 0600), 0);
    assert_int_equal(ds_ranklogs_open(&l, path_of("logs"), 3, PATIENCE), DS_EIO);
    assert_null(l);
    snprintf(want, sizeof want,
             "%s, the folder for logs, has not answered for 0.3 s: does its file system hang?",
             path_of("logs"));
    assert_string_equal(ds_error(), want);
    close(open(path_of("logs/rank_1.log"), O_RDONLY)); /* and it answers at last */
}

static void one_that_does_not_answer_is_given_up(void **state)
{
    char *much = calloc(1, 1 << 20), want[256];
    double begin;
    ds_ranklogs *l;
    int fifo;

    (void)state;
    assert_int_equal(mkdir(path_of("logs"), 0700), 0);
    assert_int_equal(mkfifo(path_of("logs/rank_0.log"), 0600), 0);
    fifo = open(path_of("logs/rank_0.log"), O_RDWR);
    l = open_logs(2);
    for (int i = 0; i < 4; i++)
        ds_ranklogs_add(l, 0, much, 1 << 20);
    assert_int_equal(ds_ranklogs_waiting(l), 4 << 20);
    snprintf(want, sizeof want,
             "dsrun: the logs end here: %s has not answered for 0.3 s; does its file system hang?",
             path_of("logs"));
    assert_string_equal(settle(l), want);
    ds_ranklogs_add(l, 1, "one", 3);
    assert_string_equal(settle(l), "");
    begin = ds_seconds();
    ds_ranklogs_close(l);
    assert_true(ds_seconds() - begin < PATIENCE);
    close(fifo); /* the thread's call comes back, with an error */
    free(much);
}

static int make(void **state)
{
    (void)state;
    strcpy(folder, "/tmp/dsrun-test-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_it(void **state)
{
    (void)state;
    return ds_remove(folder);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, make, remove_it)
    const struct CMUnitTest tests[] = {
        TEST(each_rank_has_its_own),
        TEST(a_full_one_ends),
        TEST(what_cannot_be_opened_is_an_error),
        TEST(one_that_does_not_answer_is_given_up),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
