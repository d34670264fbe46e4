/* test_host.c - the host's parts that a script cannot see: several states, end hooks, signals, the
 * text for ffi.cdef. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/cdef.h"
#include "runner/host.h"
#include "runner/log.h"
#include "runner/options.h"
#include "runner/process.h"

static ds_host *open_host(char **arguments, int count)
{
    const ds_host_config config = {.program = "dsrun", .arguments = arguments, .count = count};
    ds_host *host = NULL;

    assert_int_equal(ds_host_open(&host, &config), 0);
    return host;
}

static void states_are_apart(void **unused)
{
    char *one[] = {"one"}, *two[] = {"two", "2"};
    ds_host *a = open_host(one, 1), *b = open_host(two, 2);
    int exited;

    (void)unused;
    assert_int_equal(ds_host_eval(a, "assert(arg[1] == 'one' and #arg == 1) _G.x = 1", &exited), 0);
    assert_int_equal(ds_host_eval(b, "assert(arg[1] == 'two' and #arg == 2)", &exited), 0);
    assert_int_equal(ds_host_eval(b, "assert(_G.x == nil)", &exited), 0);
    assert_int_equal(ds_host_eval(a, "os.exit(4)", &exited), 4);
    assert_int_equal(exited, 1);
    ds_host_close(a);
    assert_int_equal(ds_host_eval(b, "os.exit(true)", &exited), 0);
    assert_int_equal(exited, 1);
    ds_host_close(b);
}

static void *run_in_thread(void *number)
{
    const ds_host_config config = {.program = "dsrun"};
    char text[160], expected[40];
    ds_host *host;
    int exited, code;

    if (ds_host_open(&host, &config) < 0) /* cmocka's assertions are for its own thread only */
        return NULL;

    snprintf(text, sizeof text,
             "local s = 0 for i = 1, 1e5 do s = s + i %% 7 end os.exit(%d, pcall(os.time))",
             *(int *)number);
    code = ds_host_eval(host, text, &exited);
    ds_host_close(host);
    snprintf(expected, sizeof expected, "thread %d", *(int *)number);
    ds_fail(DS_EINVAL, "%s", expected);
    if (code != *(int *)number || !exited || strcmp(ds_error(), expected))
        return NULL;
    return number;
}

static void threads_have_states_and_errors_of_their_own(void **unused)
{
    pthread_t threads[4];
    int numbers[4];

    (void)unused;
    ds_fail(DS_EINVAL, "mine");
    for (int i = 0; i < 4; i++) {
        numbers[i] = 10 + i;
        assert_int_equal(pthread_create(&threads[i], NULL, run_in_thread, &numbers[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        void *result;
        pthread_join(threads[i], &result);
        assert_ptr_equal(result, &numbers[i]);
    }
    assert_string_equal(ds_error(), "mine");
}

static void a_missing_library_is_named(void **unused)
{
    const ds_host_config config = {.program = "dsrun"};
    ds_host *host;

    (void)unused;
    setenv("DSRUN_LUA", "/nowhere", 1);
    assert_int_equal(ds_host_open(&host, &config), DS_ENOENT);
    assert_non_null(strstr(ds_error(), "DSRUN_LUA is /nowhere"));
    setenv("DSRUN_LUA", "lua", 1);
}

static char order[32];

static void remember(void *data, int code)
{
    size_t used = strlen(order);

    snprintf(order + used, sizeof order - used, "%s%d ", (const char *)data, code);
}

static void end_hooks_run_once_backwards(void **unused)
{
    (void)unused;
    assert_int_equal(ds_at_end(remember, "a"), 0);
    assert_int_equal(ds_at_end(remember, "b"), 0);
    ds_run_end_hooks(3);
    ds_run_end_hooks(4);
    assert_string_equal(order, "b3 a3 ");
    for (int i = 0; i < 16; i++)
        assert_int_equal(ds_at_end(remember, ""), 0);
    assert_int_equal(ds_at_end(remember, ""), DS_ENOMEM);
    ds_run_end_hooks(0);
}

static void the_first_signal_is_left_to_an_engine(void **unused)
{
    (void)unused;
    assert_int_equal(ds_signal_arrived(SIGINT), 1);
    assert_int_equal(ds_signal_pending(), 0);
    ds_signal_claim(1);
    ds_signal_claim(1);
    ds_signal_claim(0);
    assert_int_equal(ds_signal_arrived(SIGTERM), 0);
    assert_int_equal(ds_signal_pending(), SIGTERM);
    assert_int_equal(ds_signal_arrived(SIGINT), 1);
    assert_int_equal(ds_signal_pending(), SIGTERM);
    ds_signal_claim(0);
}

static void cdef_has_headers_and_every_kernel(void **unused)
{
    size_t bytes;
    char *text = ds_cdef(&bytes);
    int kernels = 0;

    (void)unused;
    assert_non_null(text);
    assert_int_equal(strlen(text), bytes);
    assert_non_null(strstr(text, "typedef struct ds_tensor {"));
    assert_non_null(strstr(text, "int ds_signal_pending(void);"));
    assert_null(strstr(text, "#"));
    assert_null(strstr(text, "_backward)(T"));
    assert_non_null(strstr(text, "int (*gelu_backward)(ds_tensor * dx, const ds_tensor * dy"));
    assert_non_null(strstr(text, "int (*add_scalar)("));
    for (const ds_kernel_entry *k = ds_kernel_list; k->name; k++, kernels++) {
        char field[64];
        snprintf(field, sizeof field, "(*%s)(", k->name);
        if (!strstr(text, field))
            fail_msg("%s is missing", field);
    }
    assert_true(kernels > 80);
    free(text);
}

/* What ds_log wrote, from a file that stands in for stderr. */
static void logged(char *text, size_t room, int rank, int level)
{
    char path[] = "/tmp/dsrun-log-XXXXXX";
    int file = mkstemp(path), kept = dup(STDERR_FILENO);
    ssize_t n;

    fflush(stderr);
    dup2(file, STDERR_FILENO);
    ds_log_rank(rank);
    ds_logf(level, "%d words", 2);
    fflush(stderr);
    dup2(kept, STDERR_FILENO);
    n = pread(file, text, room - 1, 0);
    text[n > 0 ? n : 0] = 0;
    close(file);
    close(kept);
    unlink(path);
    ds_log_rank(0);
}

static void logs_have_time_rank_and_level(void **unused)
{
    char text[128];
    int h, m, s, end = 0;

    (void)unused;
    logged(text, sizeof text, 0, DS_LOG_INFO);
    assert_int_equal(sscanf(text, "%2d:%2d:%2d [rank 0] info: 2 words%n", &h, &m, &s, &end), 3);
    assert_true(end > 0);
    logged(text, sizeof text, 1, DS_LOG_INFO);
    assert_string_equal(text, "");
    logged(text, sizeof text, 1, DS_LOG_WARNING);
    assert_non_null(strstr(text, "[rank 1] warning: 2 words\n"));
    logged(text, sizeof text, 0, DS_LOG_DEBUG);
    assert_string_equal(text, "");
    assert_int_equal(ds_log_level("error"), 0);
    logged(text, sizeof text, 0, DS_LOG_WARNING);
    assert_string_equal(text, "");
    assert_int_equal(ds_log_level("loud"), DS_EINVAL);
    assert_int_equal(ds_log_level("info"), 0);
}

static int parse(ds_options *options, int count, char **arguments)
{
    int rc = ds_options_parse(options, count, arguments);

    free(options->eval);
    return rc;
}

static void options_end_at_the_script(void **unused)
{
    char *plain[] = {"dsrun", "--seed", "3", "-q", "x.lua", "--seed", "4"};
    char *dashes[] = {"dsrun", "--", "-x.lua", "a"};
    char *stdin_script[] = {"dsrun", "-", "a"};
    char *command[] = {"dsrun", "repl"};
    char *empty[] = {"dsrun", "--seed", ""};
    char longest[300];
    char *too_long[] = {"dsrun", longest};
    ds_options o;

    (void)unused;
    assert_int_equal(parse(&o, 7, plain), 0);
    assert_string_equal(o.value[DS_OPT_seed], "3");
    assert_string_equal(o.script, "x.lua");
    assert_int_equal(o.count, 2);
    assert_int_equal(parse(&o, 4, dashes), 0);
    assert_string_equal(o.script, "-x.lua");
    assert_int_equal(parse(&o, 3, stdin_script), 0);
    assert_string_equal(o.script, "-");
    assert_int_equal(parse(&o, 2, command), 0);
    assert_int_equal(o.command, DS_RUN_REPL);
    assert_null(o.script);
    assert_int_equal(parse(&o, 3, empty), DS_EINVAL);
    memset(longest, '-', sizeof longest);
    longest[sizeof longest - 1] = 0;
    assert_int_equal(parse(&o, 2, too_long), DS_EINVAL);
    ds_log_level("info");
}

int main(void)
{
    const struct CMUnitTest all[] = {
        cmocka_unit_test(states_are_apart),
        cmocka_unit_test(threads_have_states_and_errors_of_their_own),
        cmocka_unit_test(a_missing_library_is_named),
        cmocka_unit_test(end_hooks_run_once_backwards),
        cmocka_unit_test(the_first_signal_is_left_to_an_engine),
        cmocka_unit_test(cdef_has_headers_and_every_kernel),
        cmocka_unit_test(logs_have_time_rank_and_level),
        cmocka_unit_test(options_end_at_the_script),
    };

    setenv("DSRUN_LUA", "lua", 1); /* tests run from the top of the checkout */
    return cmocka_run_group_tests(all, NULL, NULL);
}
