/* test_preflight.c - what is found out about hosts before a job starts. Their dsrun is a script that
 * answers as this program would, or otherwise. */
#include "tests/c/fake_ssh.h"

#include "kernels/error.h"
#include "runner/preflight.h"

static struct {
    ds_preflight_host out[MAX_HOSTS];
    char *report;
    ds_program program;
    int calls; /* of ssh, in the last check */
} t;

static int lines_of(const char *text)
{
    int n = 0;

    for (; *text; text++)
        n += *text == '\n';
    return n;
}

/* names: with blanks between. */
static int check_with(const char *names, const ds_program *program, double seconds)
{
    const ds_hosts hosts = fake_hosts(names);
    char *calls;
    int rc;

    fake_write("calls", "");
    free(t.report);
    rc = ds_preflight(t.out, &t.report, &hosts, program, program, NULL, seconds);
    calls = fake_read("calls");
    t.calls = lines_of(calls);
    free(calls);
    return rc;
}

static int check(const char *names)
{
    return check_with(names, &t.program, 20);
}

static void reported(const char *text)
{
    if (!t.report || !strstr(t.report, text))
        fail_msg("no '%s' in:\n%s", text, t.report ? t.report : "(nothing)");
}

/* dsrun's answer on a host: what it does first, and sed's commands for what it prints. */
static void edit(const char *host, const char *first, const char *commands)
{
    char name[64];

    snprintf(name, sizeof name, "mkdir -p '%s'", host);
    assert_int_equal(fake_sh(name), 0);
    snprintf(name, sizeof name, "%s/first", host);
    fake_write(name, first);
    snprintf(name, sizeof name, "%s/commands", host);
    fake_write(name, commands);
}

static void hosts_that_are_ready(void **state)
{
    (void)state;
    assert_int_equal(check("a user@b localhost c"), 0);
    assert_null(t.report);
    assert_int_equal(t.calls, 3); /* one for each host, none for this machine */
    for (int i = 0; i < 4; i++) {
        assert_true(t.out[i].answered && t.out[i].ready);
        assert_int_equal(t.out[i].cores, sysconf(_SC_NPROCESSORS_ONLN));
        assert_true(*t.out[i].name);
        assert_string_equal(t.out[i].launcher, i == 2 ? "" : "10.9.0.254");
        assert_string_equal(t.out[i].address, i == 2 ? "" : "10.9.0.1");
    }
}

/* A login shell's own files may print what they like. */
static void words_of_the_shell_are_passed_over(void **state)
{
    (void)state;
    fake_write("loud.sh", "echo 'name nonsense'; echo welcome; echo 'mpi mpirun (Open MPI) 9'\n"
                          "echo 'stty: standard input: Inappropriate ioctl for device' >&2\n");
    assert_int_equal(check("loud"), 0);
    assert_string_not_equal(t.out[0].name, "nonsense");
}

static void all_that_fail_are_named(void **state)
{
    (void)state;
    fake_write("denied.sh", "echo \"$host: Permission denied (publickey).\" >&2; exit 255\n");
    fake_write("nobody.sh", "echo 'This account is currently not available.'; exit 1\n");
    assert_int_equal(check("denied a nobody"), DS_ECOMM);
    assert_string_equal(ds_error(), "2 of 3 hosts are not ready");
    assert_string_equal(t.report,
                        "denied: ssh: denied: Permission denied (publickey): set up a key "
                        "without a password: ssh-copy-id denied\n"
                        "nobody: ended with code 1\n");
    assert_false(t.out[0].answered || t.out[0].ready || t.out[2].answered);
    assert_true(t.out[1].ready);
}

/* Its answer came, and then it was cut off. */
static void an_answer_is_not_enough(void **state)
{
    (void)state;
    fake_write("cut.sh", "\"$0\" -- a \"$command\"\n"
                         "echo 'Timeout, server cut not responding.' >&2; exit 255\n");
    assert_int_equal(check("cut"), DS_ECOMM);
    assert_string_equal(t.report, "cut: ssh: Timeout, server cut not responding: is it up, and can "
                                  "it be reached from here? try ssh cut\n");
    assert_false(t.out[0].ready);
}

static void silence(void **state)
{
    (void)state;
    fake_write("silent.sh", "exec sleep 60\n");
    edit("stuck", "sleep 60", "");
    assert_int_equal(check_with("silent a stuck", &t.program, 1.5), DS_ECOMM);
    assert_int_equal(lines_of(t.report), 2);
    reported("silent: no answer within 2 s: is it up? try ssh silent\n"); /* 1.5, rounded */
    reported("stuck: the checks did not end within 2 s: does one of its file systems hang?\n");
    assert_true(t.out[2].answered && !t.out[2].ready && !t.out[0].answered);
}

static void the_working_directory(void **state)
{
    ds_program p = t.program;

    (void)state;
    p.folder = (char *)"/nowhere/it's $HOME";
    p.script = (char *)"train.lua"; /* not looked for where its folder is not */
    assert_int_equal(check_with("a", &p, 20), DS_ECOMM);
    assert_string_equal(t.report,
                        "a: there is no folder /nowhere/it's $HOME, the working directory: "
                        "make it, or mount its file system\n");
}

static void open_mpi(void **state)
{
    (void)state;
    assert_int_equal(fake_sh("mkdir -p tools old/bin && for x in sh uname getconf head sed cat "
                             "sleep; do ln -s $(command -v $x) tools; done; "
                             "cp common/orted old/bin && sed 's/4.1.4/4.1.2/' common/mpirun "
                             ">old/bin/mpirun && chmod +x old/bin/mpirun"),
                     0);
    fake_write("without.sh", "extra=PATH=$fake/tools\n");
    assert_int_equal(check("without old a"), DS_ECOMM);
    assert_int_equal(lines_of(t.report), 2);
    reported("without: Open MPI is missing, or its orted is not on the PATH of a shell that is not "
             "interactive: ");
    reported("old: mpirun (Open MPI) 4.1.2 there, mpirun (Open MPI) 4.1.4 here: ");
    assert_true(t.out[0].answered && t.out[1].answered && t.out[2].ready);
    /* the other daemon is from elsewhere: what is wanted is there */
    assert_int_equal(fake_sh("cp common/orted common/prted"), 0);
    assert_int_equal(check("old"), 0);
}

static void the_program(void **state)
{
    (void)state;
    edit("dead", "echo 'dsrun: error while loading shared libraries: libdnnl.so.2' >&2; exit 127",
         "");
    edit("other", "", "s/^binary .*/binary x/; s/^build .*/build 0.0.9/");
    edit("same", "", "s/^binary .*/binary x/");
    edit("lua", "", "s/^library .*/library x/");
    assert_int_equal(check("dead other same lua a"), DS_ECOMM);
    reported("dead: ");
    reported("does not run there (dsrun: error while loading shared libraries: libdnnl.so.2): ");
    reported("other: ");
    reported("is another build: 0.0.9 there, ");
    reported("same: ");
    reported(" here (and yet the files differ); install");
    reported("lua: dsrun's Lua library there differs");
    assert_int_equal(lines_of(t.report), 4);
    assert_true(t.out[4].ready);
}

static void no_program(void **state)
{
    ds_program p = t.program;

    (void)state;
    p.file = (char *)"/nowhere/dsrun";
    assert_int_equal(check_with("a", &p, 20), DS_ECOMM);
    assert_string_equal(t.report,
                        "a: there is no program /nowhere/dsrun: install dsrun at the same "
                        "path, or add --push\n");
    assert_int_equal(check_with("a", NULL, 20), 0); /* nothing asked of it */
}

static void the_script(void **state)
{
    ds_program p = t.program;

    (void)state;
    edit("gone", "", "s/^script .*/script /");
    edit("edited", "", "s/^script .*/script x/");
    assert_int_equal(check("gone edited"), DS_ECOMM);
    assert_int_equal(lines_of(t.report), 2);
    reported("gone: there is no script ");
    reported("edited: the script ");
    p.script = NULL;
    assert_int_equal(check_with("gone edited", &p, 20), 0);
}

/* The program's place and what it needs reach it whatever characters they have. */
static void paths_arrive(void **state)
{
    ds_program p = t.program;
    char file[200], library[200], *seen;

    (void)state;
    assert_int_equal(fake_sh("mkdir \"it's \\$a 'b'\"; cp dsrun \"it's \\$a 'b'\"; "
                             "ln -s \"$DSRUN_LUA\" \"lua \\\"; x\""),
                     0);
    snprintf(file, sizeof file, "%s/it's $a 'b'/dsrun", fake);
    snprintf(library, sizeof library, "%s/lua \"; x", fake);
    p.file = file;
    p.library = library;
    p.libraries = (char *)"/lib one";
    assert_int_equal(check_with("a", &p, 20), 0);
    seen = fake_read("a/seen");
    assert_non_null(strstr(seen, library));
    assert_non_null(strstr(seen, "LD_LIBRARY_PATH=/lib one\n"));
    assert_non_null(strstr(seen, "script=train it's.lua\n"));
    free(seen);
}

static int open_all(void **state)
{
    char path[128], text[600], *lua = realpath("lua", NULL);
    FILE *f;

    fake_open(state);
    assert_non_null(lua);
    setenv("SSH_CONNECTION", "10.1.1.1 1 10.1.1.2 22", 1); /* of whoever runs the test */
    setenv("DSRUN_LUA", lua, 1); /* this program lies elsewhere than dsrun does */
    free(lua);
    snprintf(text, sizeof text,
             "#!/bin/sh\n"
             "env >~/seen; echo \"script=$2\" >>~/seen\n"
             "[ -f ~/commands ] || exec cat '%s/answer'\n"
             ". ~/first\n"
             "exec sed -f ~/commands '%s/answer'\n",
             fake, fake);
    fake_write("dsrun", text);
    fake_write("train it's.lua", "print 'hello'\n");
    fake_write("bin/orted", "#!/bin/sh\n");
    fake_write("bin/mpirun",
               "#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'; echo 'Report bugs to …'\n");
    assert_int_equal(fake_sh("chmod +x dsrun bin/*; mkdir common; cp bin/orted bin/mpirun common"),
                     0);
    assert_int_equal(ds_program_here(&t.program, "train it's.lua"), 0);
    free(t.program.file);
    free(t.program.folder);
    snprintf(path, sizeof path, "%s/dsrun", fake);
    t.program.file = strdup(path);
    t.program.folder = strdup(fake);
    assert_int_equal(chdir(fake), 0);
    snprintf(path, sizeof path, "%s/answer", fake);
    f = fopen(path, "w");
    assert_int_equal(ds_program_print(f, "train it's.lua"), 0);
    fclose(f);
    return 0;
}

static int close_all(void **state)
{
    ds_program_free(&t.program);
    free(t.report);
    return fake_close(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hosts_that_are_ready),
        cmocka_unit_test(words_of_the_shell_are_passed_over),
        cmocka_unit_test(all_that_fail_are_named),
        cmocka_unit_test(an_answer_is_not_enough),
        cmocka_unit_test(silence),
        cmocka_unit_test(the_working_directory),
        cmocka_unit_test(open_mpi),
        cmocka_unit_test(the_program),
        cmocka_unit_test(no_program),
        cmocka_unit_test(the_script),
        cmocka_unit_test(paths_arrive),
    };

    return cmocka_run_group_tests(tests, open_all, close_all);
}
