/* test_push.c - copies to hosts that are folders (fake_ssh.h), and what is copied. The shared
 * libraries are what an ldd of the test's own says. */
#include "tests/c/fake_ssh.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/wait.h>

#include "kernels/error.h"
#include "runner/log.h"
#include "runner/push.h"

static struct {
    ds_program here, there;
    char *report;
    int calls, sent; /* of ssh in the last push; those that sent something */
    char script[160], folder[128], file[128];
} t;

static int count(const char *text, const char *piece)
{
    int n = 0;

    for (; (text = strstr(text, piece)); text += strlen(piece))
        n++;
    return n;
}

/* names: with blanks between. */
static int push(const char *names)
{
    const ds_hosts hosts = fake_hosts(names);
    char *calls;
    int rc;

    fake_write("calls", "");
    free(t.report);
    ds_program_free(&t.there);
    rc = ds_push(&t.there, &t.report, &hosts, &t.here, NULL);
    calls = fake_read("calls");
    t.calls = count(calls, "\n");
    t.sent = count(calls, "tar -x");
    free(calls);
    return rc;
}

static void reported(const char *text)
{
    if (!t.report || !strstr(t.report, text))
        fail_msg("no '%s' in:\n%s", text, t.report ? t.report : "(nothing)");
}

static void said(const char *text)
{
    if (!strstr(ds_error(), text))
        fail_msg("no '%s' in:\n%s", text, ds_error());
}

/* What the shell prints, in the copy of the script's folder. */
static void holds_there(const char *command, const char *expected)
{
    char line[600], *out;
    int folder = (int)(strrchr(t.there.script, '/') - t.there.script);

    snprintf(line, sizeof line, "(cd '%.*s' && %s) >out 2>&1", folder, t.there.script, command);
    fake_sh(line);
    out = fake_read("out");
    assert_string_equal(out, expected);
    free(out);
}

static int exists(const char *path)
{
    return access(path, F_OK) == 0;
}

static void edit_script(const char *text)
{
    fake_write("it's a project/train me.lua", text);
}

/* ---- */

static void all_of_it_arrives(void **state)
{
    char path[PATH_MAX], cache[128];

    (void)state;
    snprintf(cache, sizeof cache, "%s/a/.cache/dsrun/", fake);
    edit_script("print 'first'\n");
    assert_int_equal(push("a"), 0);
    assert_null(t.report);
    assert_int_equal(t.sent, 2);
    assert_non_null(strstr(t.there.file, cache));
    assert_non_null(strstr(t.there.script, cache));
    assert_string_equal(strrchr(t.there.script, '/'), "/train me.lua");
    assert_null(t.there.libraries);
    holds_there("cat 'train me.lua'", "print 'first'\n");
    holds_there("find . ! -type d -print0 | LC_ALL=C sort -z | tr '\\0\\n' ' ?'",
                "./data/a\tb ./data/two ?lines ./dead link ./link ./rebuild/x ./run.sh ./train "
                "me.lua ");
    holds_there("readlink link 'dead link'", "data/two \nlines\n/nowhere\n");
    holds_there("./run.sh", "runs\n");
    snprintf(path, sizeof path,
             "cmp dsrun '%s' && ls '%s/ds/boot.lua' '%s/../models/gpt/train.lua' "
             "'%s/../libds_test.so' >out",
             t.there.file, t.there.library, t.there.library, t.there.library);
    assert_int_equal(fake_sh(path), 0);
    assert_int_equal(access(t.there.file, X_OK), 0);
    holds_there("stat -c %a . ../../dsrun", "700\n700\n"); /* nobody else's to read */
}

static void once_is_enough(void **state)
{
    char *file;

    (void)state;
    edit_script("print 'once'\n");
    assert_int_equal(push("a"), 0);
    file = strdup(t.there.file);
    assert_int_equal(push("a"), 0);
    assert_int_equal(t.calls, 1);
    assert_int_equal(t.sent, 0);
    edit_script("print 'twice'\n"); /* the program stays where it is */
    assert_int_equal(push("a"), 0);
    assert_int_equal(t.sent, 1);
    assert_string_equal(t.there.file, file);
    holds_there("cat 'train me.lua'", "print 'twice'\n");
    free(file);
}

static void nothing_is_left(const char *host)
{
    char command[128];

    snprintf(command, sizeof command, "[ -z \"$(ls -d %s/.cache/dsrun/.tmp* 2>/dev/null)\" ]",
             host);
    assert_int_equal(fake_sh(command), 0);
}

static void two_at_once_do_no_harm(void **state)
{
    pid_t other[3];
    int status;

    (void)state;
    edit_script("print 'at once'\n");
    /* a tar that takes its time, so that none is there when the others begin */
    assert_int_equal(fake_sh("mkdir -p both/bin; cd both/bin; printf '#!/bin/sh\n"
                             "/usr/bin/env -i PATH=/usr/bin:/bin tar \"$@\"; sleep 0.5\n' >tar; "
                             "chmod +x tar"),
                     0);
    for (int i = 0; i < 3; i++) {
        other[i] = fork();
        if (other[i] == 0) {
            ds_host host = {.name = (char *)"both"};
            ds_hosts hosts = {&host, 1};
            ds_program there;
            char *report;
            _exit(ds_push(&there, &report, &hosts, &t.here, NULL) == 0 ? 0 : 1);
        }
    }
    for (int i = 0; i < 3; i++) {
        assert_int_equal(waitpid(other[i], &status, 0), other[i]);
        assert_int_equal(status, 0);
    }
    assert_int_equal(push("both"), 0);
    assert_int_equal(t.sent, 0);
    holds_there("cat 'train me.lua'", "print 'at once'\n");
    holds_there("ls -a ..| grep -c made", "2\n");
    holds_there("ls -a | grep tmp", "");
    nothing_is_left("both");
}

/* Connections that end early: in a file, and between two. */
static void cut_off(void **state)
{
    (void)state;
    fake_write("cut.sh",
               "case $command in *tar*) head -c 9000 >\"$fake/part\"; exec <\"$fake/part\";; "
               "esac\n");
    assert_int_equal(push("cut"), DS_ECOMM);
    assert_string_equal(ds_error(), "--push failed for some hosts");
    reported("cut: --push: ended with code 1: tar: ");
    nothing_is_left("cut");
    fake_write("cut.sh", "case $command in *tar*) tar -cf \"$fake/part\" -T /dev/null; exec "
                         "<\"$fake/part\";; esac\n");
    assert_int_equal(push("cut"), DS_ECOMM);
    reported("cut: --push: ended with code 1: only 0 of ");
    nothing_is_left("cut");
    fake_write("cut.sh", "");
    assert_int_equal(push("cut"), 0);
    assert_int_equal(t.sent, 2);
}

static void hosts_that_fail(void **state)
{
    (void)state;
    fake_write("denied.sh", "echo \"$host: Permission denied (publickey).\" >&2; exit 255\n");
    assert_int_equal(push("denied a"), DS_ECOMM);
    assert_string_equal(t.report,
                        "denied: ssh: denied: Permission denied (publickey): set up a key "
                        "without a password: ssh-copy-id denied\n");
    assert_non_null(t.there.file); /* the others can go on */
    assert_true(exists(t.there.file));
    assert_int_equal(push("denied"), DS_ECOMM);
    assert_null(t.there.file);
    assert_int_equal(push("a b"), DS_ECOMM); /* each has a home of its own */
    reported("b: its cache folder is ");
    reported("set XDG_CACHE_HOME here");
    assert_int_equal(t.sent, 0);
}

static void a_cache_for_all(void **state)
{
    char cache[128];

    (void)state;
    snprintf(cache, sizeof cache, "%s/all of them", fake);
    setenv("XDG_CACHE_HOME", cache, 1);
    assert_int_equal(push("a b localhost"), 0);
    unsetenv("XDG_CACHE_HOME");
    assert_int_equal(t.calls, 6); /* each sends, as they all were asked before; and this machine */
    assert_memory_equal(t.there.file, cache, strlen(cache));
    assert_true(exists(t.there.file));
}

static void the_working_directory(void **state)
{
    ds_program here = t.here;
    char path[300];

    (void)state;
    assert_int_equal(push("a"), 0);
    assert_string_equal(t.there.folder, fake); /* it is there, too */
    t.here.folder = t.folder;
    assert_int_equal(push("a"), 0);
    snprintf(path, sizeof path, "%s/train me.lua", t.there.folder);
    assert_string_equal(path, t.there.script);
    snprintf(path, sizeof path, "%s/data", t.folder);
    t.here.folder = path;
    assert_int_equal(push("a"), 0);
    assert_string_equal(strrchr(t.there.folder, '/'), "/data");
    snprintf(path, sizeof path, "%s/out", t.folder); /* is left behind */
    assert_int_equal(push("a"), 0);
    assert_memory_equal(t.there.folder, t.there.script, strlen(t.there.folder));
    t.here.folder = (char *)"/nowhere at all";
    assert_int_equal(push("a"), 0);
    assert_memory_equal(t.there.folder, t.there.script, strlen(t.there.folder));
    t.here = here;
    t.here.script = NULL; /* dsrun -e */
    assert_int_equal(push("a"), 0);
    assert_null(t.there.script);
    t.here = here;
}

static void too_much(void **state)
{
    char *home = strdup(getenv("HOME"));

    (void)state;
    assert_int_equal(fake_sh("cd it*; mkdir -p ckpt/x; truncate -s 1500M ckpt/x/old; "
                             "truncate -s 1000000 notes"),
                     0);
    assert_int_equal(push("a"), DS_EINVAL);
    said("holds 1.5 GiB (ckpt 1.5 GiB, notes 977 KiB, ");
    assert_null(t.report);
    assert_int_equal(t.calls, 0);
    assert_int_equal(fake_sh("cd it*; rm -r ckpt notes"), 0);
    setenv("HOME", t.folder, 1);
    assert_int_equal(push("a"), DS_EINVAL);
    said("move it into a folder of its own");
    setenv("HOME", home, 1);
    free(home);
}

static void libraries_that_are_missing(void **state)
{
    char command[300];

    (void)state;
    fake_write("poor/.ldd",
               "\tlibbig.so.2 => not found\n\tlibhere.so.1 => /lib/libhere.so.1 (0x1)\n");
    assert_int_equal(push("poor"), 0);
    assert_int_equal(t.sent, 3);
    snprintf(command, sizeof command, "ls '%s' | tr '\\n' ' ' >out", t.there.libraries);
    fake_sh(command);
    {
        char *out = fake_read("out");
        assert_string_equal(out, "libbig.so.2 libdeep.so.3 ");
        free(out);
    }
    assert_int_equal(push("poor"), 0);
    assert_int_equal(t.sent, 0);
    assert_non_null(t.there.libraries);
    fake_write("poor/.ldd", "\tlibother.so.2 => not found\n");
    assert_int_equal(push("poor"), DS_ENOENT);
    said("not all of the shared libraries that hosts lack (libother.so.2, …) are on this machine");
    fake_write("poor/.ldd",
               "dsrun: /lib/libc.so.6: version `GLIBC_2.99' not found (required by dsrun)\n");
    assert_int_equal(push("poor"), DS_ECOMM);
    reported(
        "poor: its system is older than the one that dsrun was built on, GLIBC_2.99 is missing");
}

/* Ten old copies beside the new ones: of those, the ones last used stay. */
static void old_copies_go(void **state)
{
    (void)state;
    assert_int_equal(
        fake_sh("mkdir -p old/.cache/dsrun; cd old/.cache/dsrun; "
                "for i in 0 1 2 3 4 5 6 7 8 9; do mkdir d$i; echo x >d$i/file; done; sleep 0.05; "
                "for i in 0 1 2 3 4 5 6 7 8 9; do touch d$i.made; "
                "touch -d \"$((i + 2)) days ago\" d$i.used; done; sleep 0.05; "
                "mkdir d9/out; touch -d '1 year ago' d9/out/checkpoint; "
                "touch d8.used; " /* an hour ago, say */
                "mkdir .tmp.abandoned; touch -d '2 days ago' .tmp.abandoned; mkdir .tmp.busy"),
        0);
    assert_int_equal(push("old"), 0);
    assert_int_equal(t.sent, 2);
    assert_int_equal(fake_sh("cd old/.cache/dsrun; ls -d d? d?.used d?.made .tmp* | tr '\\n' ' ' "
                             ">../../../out"),
                     0);
    {
        char *out = fake_read("out");
        /* with the two new ones and d8, d0 to d4 are the last eight; d9 has a rank's file */
        assert_string_equal(out,
                            ".tmp.busy d0 d0.made d0.used d1 d1.made d1.used d2 d2.made d2.used "
                            "d3 d3.made d3.used d4 d4.made d4.used d8 d8.made d8.used d9 "
                            "d9.made d9.used ");
        free(out);
    }
}

static int open_all(void **state)
{
    char *lua = realpath("lua", NULL), text[1200];

    fake_open(state);
    assert_non_null(lua);
    setenv("DSRUN_LUA", lua, 1);
    free(lua);
    unsetenv("XDG_CACHE_HOME");
    ds_log_level("error");
    assert_int_equal(
        fake_sh("mkdir -p common libs poor \"it's a project/data\" && cd it* && "
                "mkdir -p .git build build-clang out sub/out .venv empty rebuild && "
                "for f in .git/x build/x build-clang/x out/x sub/out/x .venv/x .env rebuild/x "
                "'data/a\tb' 'data/two \nlines'; do echo \"$f\" >\"$f\"; done && "
                "ln -s 'data/two \nlines' link && ln -s /nowhere 'dead link' && mkfifo pipe && "
                "printf '#!/bin/sh\\necho runs\\n' >run.sh && chmod +x run.sh"),
        0);
    fake_write("dsrun", "#!/bin/sh\necho a program\n");
    fake_write("libds_test.so", "a plugin");
    fake_write("libs/libbig.so.2", "big");
    fake_write("libs/libdeep.so.3", "deep");
    fake_write("libs/libhere.so.1", "here");
    snprintf(text, sizeof text,
             "#!/bin/sh\n"
             "[ \"$#\" = 1 ] || exit 9\n"
             "case $1 in\n"
             "  */dsrun) echo '\tlibbig.so.2 => %s/libs/libbig.so.2 (0x1)';;\n"
             "  *big*) echo '\tlibdeep.so.3 => %s/libs/libdeep.so.3 (0x1)';;\n"
             "esac\n"
             "echo '\tlinux-vdso.so.1 (0x1)'\n"
             "echo '\tlibc.so.6 => /lib/libc.so.6 (0x1)'\n"
             "echo '\tlibhere.so.1 => %s/libs/libhere.so.1 (0x1)'\n"
             "echo '\t/lib64/ld-linux-x86-64.so.2 (0x1)'\n",
             fake, fake, fake);
    fake_write("bin/ldd", text);
    fake_write("common/ldd", "#!/bin/sh\n[ ! -f ~/.ldd ] || cat ~/.ldd\n");
    assert_int_equal(fake_sh("chmod +x dsrun bin/ldd common/ldd"), 0);
    snprintf(t.folder, sizeof t.folder, "%s/it's a project", fake);
    snprintf(t.script, sizeof t.script, "%s/train me.lua", t.folder);
    snprintf(t.file, sizeof t.file, "%s/dsrun", fake);
    t.here = (ds_program){.file = t.file, .script = t.script, .folder = fake};
    return 0;
}

static int close_all(void **state)
{
    free(t.report);
    ds_program_free(&t.there);
    return fake_close(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_of_it_arrives),
        cmocka_unit_test(once_is_enough),
        cmocka_unit_test(two_at_once_do_no_harm),
        cmocka_unit_test(cut_off),
        cmocka_unit_test(hosts_that_fail),
        cmocka_unit_test(a_cache_for_all),
        cmocka_unit_test(the_working_directory),
        cmocka_unit_test(too_much),
        cmocka_unit_test(libraries_that_are_missing),
        cmocka_unit_test(old_copies_go),
    };

    return cmocka_run_group_tests(tests, open_all, close_all);
}
