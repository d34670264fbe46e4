/* test_remote.c - commands on many hosts, over an ssh that only seems to be one (fake_ssh.h). */
#include "tests/c/fake_ssh.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/ds.h"
#include "runner/remote.h"

#define MANY 100

static int run_on(ds_remote *each, int n, const char *command, double seconds)
{
    return ds_remote_run(each, n, NULL, command, seconds);
}

static void answers_arrive_as_they_are(void **state)
{
    ds_remote r[] = {{.host = "a"}, {.host = "user@b"}, {.host = "localhost"}};

    (void)state;
    assert_int_equal(
        run_on(r, 3, "echo \"it's $((6*7))\"; echo \"$HOME\" >&2; printf '\\377'; exit 3", 20), 0);
    for (int i = 0; i < 3; i++) {
        assert_string_equal(r[i].output, "it's 42\n\377");
        assert_int_equal(r[i].code, 3);
    }
    assert_true(strstr(r[0].errors, "/a\n") != NULL);
    assert_true(strstr(r[1].errors, "/user@b\n") != NULL);
    assert_true(strstr(r[2].errors, fake) == NULL); /* this machine: no ssh */
    ds_remote_free(r, 3);
}

/* In quotes and out of them, as often as there are shells on the way. */
static void words_are_quoted(void **state)
{
    static const char word[] = "it's \\'\\\\ $HOME `x` \"!\" \\n\t*";
    char text[256], *shell = NULL;
    FILE *f = fmemopen(text, sizeof text, "w");
    ds_remote r[] = {{.host = "a"}, {.host = "localhost"}};

    (void)state;
    ds_remote_quote(f, word);
    fclose(f);
    assert_null(strstr(text, "\\'\\")); /* what fish would take for a quote in quotes */
    assert_true(asprintf(&shell, "printf %%s %s", text) > 0);
    assert_int_equal(run_on(r, 2, shell, 20), 0);
    assert_string_equal(r[0].output, word);
    assert_string_equal(r[1].output, word);
    ds_remote_free(r, 2);
    free(shell);
}

static void ssh_is_told_not_to_ask(void **state)
{
    static const char *const wanted[] = {"-o BatchMode=yes ", "-o ConnectTimeout=8 ", "-p 2222 ",
                                         "-- fe80::1 sh -c 'true'"};
    ds_remote r = {.host = "fe80::1"};
    const ds_ssh ssh = {.port = 2222};
    char *calls;

    (void)state;
    assert_int_equal(ds_remote_run(&r, 1, &ssh, "true", 10), 0);
    assert_int_equal(r.code, 0);
    ds_remote_free(&r, 1);
    calls = fake_read("calls");
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        assert_non_null(strstr(calls, wanted[i]));
    assert_null(strstr(calls, "StrictHostKeyChecking"));
    free(calls);
}

static void input_is_fed(void **state)
{
    size_t bytes = 5 << 20;
    char *input = malloc(bytes);
    ds_remote r[] = {{.host = "a", .input = input, .input_bytes = bytes},
                     {.host = "b", .input = input, .input_bytes = 7},
                     {.host = "c"},
                     {.host = "deaf", .input = input, .input_bytes = bytes}};

    (void)state;
    memset(input, 'x', bytes);
    fake_write("deaf.sh", "exit 9\n"); /* ends without having read: no SIGPIPE for us */
    assert_int_equal(run_on(r, 4, "tr -dc x | wc -c", 20), 0);
    assert_int_equal(atoi(r[0].output), 5 << 20);
    assert_int_equal(atoi(r[1].output), 7);
    assert_int_equal(atoi(r[2].output), 0);
    assert_int_equal(r[3].code, 9);
    ds_remote_free(r, 4);
    free(input);
}

/* 1: there is no such process, or only what its parent has not asked for. */
static int is_gone(pid_t pid)
{
    char path[64], state = 'Z';
    FILE *f;

    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    f = fopen(path, "r");
    if (f && fscanf(f, "%*d (%*[^)]) %c", &state) != 1)
        state = 'Z';
    if (f)
        fclose(f);
    return state == 'Z' || state == 'X';
}

static void gone(pid_t pid)
{
    for (int i = 0; i < 1000 && !is_gone(pid); i++)
        usleep(5000);
    assert_true(is_gone(pid));
}

static pid_t number_in(const char *name)
{
    pid_t pid = 0;

    for (int i = 0; i < 1000 && !pid; i++) { /* until somebody has written it */
        char *text = fake_read(name);
        pid = strchr(text, '\n') ? atoi(text) : 0;
        free(text);
        usleep(5000);
    }
    assert_true(pid > 1);
    return pid;
}

static void silence_ends_at_the_limit(void **state)
{
    ds_remote r[] = {{.host = "silent"}, {.host = "a"}};
    double begun = ds_seconds(), took;

    (void)state;
    fake_write("silent.sh", "sleep 60 & echo $! >\"$fake/pid\"; wait\n");
    assert_int_equal(run_on(r, 2, "echo yes", 0.5), 0);
    took = ds_seconds() - begun;
    assert_true(took >= 0.5 && took < 5);
    assert_int_equal(r[0].code, -1);
    assert_int_equal(r[1].code, 0);
    assert_true(r[1].seconds < 0.5);
    assert_string_equal(r[1].output, "yes\n");
    gone(number_in("pid")); /* what ssh itself had started is killed with it */
    ds_remote_free(r, 2);
}

/* As an ssh does that keeps its connection for others. */
static void who_stays_behind_is_not_waited_for(void **state)
{
    ds_remote r = {.host = "shared"};
    double begun = ds_seconds();

    (void)state;
    fake_write("shared.sh", "(exec sleep 60) >/dev/null & echo $! >\"$fake/pid\"\n");
    assert_int_equal(run_on(&r, 1, "echo yes; echo no >&2", 30), 0);
    assert_true(ds_seconds() - begun < 10);
    assert_string_equal(r.output, "yes\n");
    assert_string_equal(r.errors, "no\n");
    assert_int_equal(r.code, 0);
    ds_remote_free(&r, 1);
    kill(number_in("pid"), SIGKILL);
}

static void nothing_outlives_the_launcher(void **state)
{
    pid_t launcher = fork();
    int status;

    (void)state;
    if (launcher == 0) {
        ds_remote r = {.host = "sleeper"};
        run_on(&r, 1, "true", 60);
        _exit(0);
    }
    fake_write("sleeper.sh", "echo $$ >\"$fake/ssh.pid\"; exec sleep 60\n");
    number_in("ssh.pid");
    kill(launcher, SIGKILL);
    waitpid(launcher, &status, 0);
    gone(number_in("ssh.pid"));
}

static void many_hosts_take_turns(void **state)
{
    static ds_remote r[MANY];
    static char names[MANY][16];
    int most = 0;

    (void)state;
    assert_int_equal(fake_sh("mkdir busy"), 0);
    for (int i = 0; i < MANY; i++) {
        snprintf(names[i], sizeof *names, "h%d", i);
        r[i].host = names[i];
    }
    assert_int_equal(
        run_on(r, MANY, "mkdir ../busy/$$; sleep 0.2; ls ../busy | wc -l; rmdir ../busy/$$", 30),
        0);
    for (int i = 0; i < MANY; i++) {
        int busy = atoi(r[i].output);
        assert_int_equal(r[i].code, 0);
        most = busy > most ? busy : most;
    }
    assert_true(most > 1 && most <= 64);
    ds_remote_free(r, MANY);
}

static void floods_are_cut(void **state)
{
    ds_remote r = {.host = "a"};

    (void)state;
    assert_int_equal(run_on(&r, 1,
                            "head -c 3000000 /dev/zero | tr '\\0' y; "
                            "head -c 300000 /dev/zero | tr '\\0' z >&2",
                            30),
                     0);
    assert_int_equal(r.code, 0);
    assert_int_equal(strlen(r.output), DS_REMOTE_OUTPUT);
    assert_int_equal(strlen(r.errors), DS_REMOTE_ERRORS);
    ds_remote_free(&r, 1);
    assert_int_equal(run_on(&r, 1, "exec yes", 0.3), 0); /* who never stops is stopped, too */
    assert_int_equal(r.code, -1);
    ds_remote_free(&r, 1);
}

static void all_can_be_given_up(void **state)
{
    ds_remote r[] = {{.host = "silent"}, {.host = "silent"}};
    ds_ssh ssh = {0};
    int ends[2];
    double begun = ds_seconds();

    (void)state;
    fake_write("silent.sh", "exec sleep 60\n");
    assert_int_equal(pipe(ends), 0);
    assert_int_equal(write(ends[1], "x", 1), 1);
    ssh.cancel = ends[0];
    assert_int_equal(ds_remote_run(r, 2, &ssh, "true", 30), DS_ECOMM);
    assert_true(ds_seconds() - begun < 5);
    assert_int_equal(r[0].code, -1);
    ds_remote_free(r, 2);
    close(ends[0]);
    close(ends[1]);
}

static void names_of_this_machine(void **state)
{
    static const char *const others[] = {"worker-1",     "192.0.2.1", "2001:db8::1", "localhost1",
                                         "me@192.0.2.1", "",          "me@"};
    static const char *const here[] = {"localhost", "LOCALHOST",    "127.0.0.1", "127.1.2.3",
                                       "::1",       "me@localhost", "me@::1"};
    char own[256], other[300];

    (void)state;
    for (size_t i = 0; i < sizeof here / sizeof *here; i++)
        assert_true(ds_remote_is_here(here[i]));
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        assert_false(ds_remote_is_here(others[i]));
    gethostname(own, sizeof own);
    assert_true(ds_remote_is_here(own));
    own[strcspn(own, ".")] = 0;
    assert_true(ds_remote_is_here(own));
    snprintf(other, sizeof other, "%sx", own);
    assert_false(ds_remote_is_here(other));
}

static char *why(const ds_remote *r)
{
    static char text[1000];
    FILE *f = fmemopen(text, sizeof text, "w");

    ds_remote_why(f, r);
    fclose(f);
    return text;
}

static void faults_are_explained(void **state)
{
    ds_remote r = {.host = "w3", .code = 255, .output = (char *)""};

    (void)state;
    r.errors = (char *)"Welcome!\n\nme@w3: Permission denied (publickey).\r\n";
    assert_string_equal(why(&r), "ssh: me@w3: Permission denied (publickey): set up a key without "
                                 "a password: ssh-copy-id w3");
    r.errors = (char *)"ssh: connect to host w3 port 22: Connection refused\n";
    assert_string_equal(why(&r), "ssh: connect to host w3 port 22: Connection refused: does sshd "
                                 "run there, at this port (--ssh_port)? try ssh w3");
    r.errors = (char *)"";
    assert_string_equal(why(&r), "ssh ended without a word: try ssh w3");
    r.code = -1;
    r.seconds = 10.002;
    assert_string_equal(why(&r), "no answer within 10 s: is it up? try ssh w3");
    r.code = 127;
    assert_string_equal(why(&r), "there is no ssh on this machine: install openssh-client");
    r.code = 2;
    r.errors = (char *)"sh: 1: tar: not found\n";
    assert_string_equal(why(&r), "ended with code 2: sh: 1: tar: not found");
}

static void without_ssh(void **state)
{
    ds_remote r = {.host = "w3"};
    char *path = strdup(getenv("PATH"));

    (void)state;
    setenv("PATH", "/nowhere", 1);
    assert_int_equal(run_on(&r, 1, "true", 5), 0);
    setenv("PATH", path, 1);
    free(path);
    assert_string_equal(why(&r), "there is no ssh on this machine: install openssh-client");
    ds_remote_free(&r, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(answers_arrive_as_they_are),
        cmocka_unit_test(words_are_quoted),
        cmocka_unit_test(ssh_is_told_not_to_ask),
        cmocka_unit_test(input_is_fed),
        cmocka_unit_test(silence_ends_at_the_limit),
        cmocka_unit_test(who_stays_behind_is_not_waited_for),
        cmocka_unit_test(nothing_outlives_the_launcher),
        cmocka_unit_test(many_hosts_take_turns),
        cmocka_unit_test(floods_are_cut),
        cmocka_unit_test(all_can_be_given_up),
        cmocka_unit_test(names_of_this_machine),
        cmocka_unit_test(faults_are_explained),
        cmocka_unit_test(without_ssh),
    };

    return cmocka_run_group_tests(tests, fake_open, fake_close);
}
