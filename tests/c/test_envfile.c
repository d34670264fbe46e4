/* test_envfile.c - which variables come out of files of KEY=VALUE and of the launching shell, byte for
 * byte, and what each kind of mistake is told.
 *
 * Lists are compared as text: "NAME=VALUE@FROM|…".
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/envfile.h"
#include "tests/c/folder.h"

/* With its length, as it may have NUL bytes. */
#define TEXT(text) text, sizeof(text) - 1

static char shown[1 << 16];

static const char *show(const ds_variables *v)
{
    size_t used = 0;

    shown[0] = 0;
    for (int i = 0; i < v->count; i++)
        used += (size_t)sprintf(shown + used, "%s%s=%s@%s", i ? "|" : "", v->each[i].name,
                                v->each[i].value, v->each[i].from);
    return shown;
}

static void expect(const char *got, const char *want, const char *of)
{
    if (strcmp(got, want) != 0)
        fail_msg("%s\n--- gave\n%s\n--- not\n%s", of, got, want);
}

/* Either the list, or (`code` < 0) the whole message, and then nothing was added. */
static void parses(const char *text, size_t bytes, int code, const char *want)
{
    char *exact = malloc(bytes); /* so that a byte too far, or before, is seen by the sanitizers */
    ds_variables v = {0};
    int rc;

    memcpy(exact, text, bytes);
    rc = ds_variables_parse(&v, exact, bytes, "f");
    expect(rc < 0 ? ds_error() : show(&v), want, text);
    assert_int_equal(rc, code);
    assert_true(rc == 0 || v.count == 0);
    ds_variables_free(&v);
    free(exact);
}

static void values(void **state)
{
    static const struct {
        const char *text, *want;
    } cases[] = {
        {"", ""},
        {"\n \t\n# A=1\n  #\n\r\n", ""},
        {"A=1", "A=1@f:1"},
        {"A=1\nB=2\n", "A=1@f:1|B=2@f:2"},
        {"A=1\r\n\r\nB=\r\nC='x'\r\n", "A=1@f:1|B=@f:3|C=x@f:4"},
        {"\xef\xbb\xbf"
         "A=1",
         "A=1@f:1"},
        {"export A=1\n  export\t B=2\nexport=3\nexport =4\nexported=5",
         "A=1@f:1|B=2@f:2|export=4@f:4|exported=5@f:5"},
        {"_a9=1\nLD_LIBRARY_PATH=/a:/b\nPATH=/bin",
         "_a9=1@f:1|LD_LIBRARY_PATH=/a:/b@f:2|PATH=/bin@f:3"},
        /* unquoted */
        {"A = a b \t\nB =2", "A=a b@f:1|B=2@f:2"},
        {"A=x=y==", "A=x=y==@f:1"},
        {"A=/lua/?.lua;; $HOME `id` \\n \\", "A=/lua/?.lua;; $HOME `id` \\n \\@f:1"},
        {"A=it's\nB=a\"b\"", "A=it's@f:1|B=a\"b\"@f:2"},
        {"A=64(x2)\nB=gr\xc3\xbc\xff\x01", "A=64(x2)@f:1|B=gr\xc3\xbc\xff\x01@f:2"},
        {"A=a#b\nB=a #b\nC=a\t# b\nD=#b\nE= #b\nF=#a #b",
         "A=a#b@f:1|B=a@f:2|C=a@f:3|D=#b@f:4|E=@f:5|F=#a@f:6"},
        {"A=\nB=  ", "A=@f:1|B=@f:2"},
        {"A=a\rb\r\r\nB=1", "A=a\rb\r@f:1|B=1@f:2"}, /* one \r is the line's */
        /* quoted */
        {"A=''\nB=\"\"", "A=@f:1|B=@f:2"},
        {"A=' a  '\nB = \" b \" # c\nC='x'\t#\nD='y'  ", "A= a  @f:1|B= b @f:2|C=x@f:3|D=y@f:4"},
        {"A='a\"#\\n$x\\'", "A=a\"#\\n$x\\@f:1"},
        {"A=\"it's \\\"a\\\" \\\\n \\n\\$x\"", "A=it's \"a\" \\n \n$x@f:1"},
        {"A=\"$HOME \\t \\' \\` \\a # b\"", "A=$HOME \\t \\' \\` \\a # b@f:1"},
        {"A=\"\\\\\"\nB=\"\\\\\\\"\"", "A=\\@f:1|B=\\\"@f:2"},
        {"A=\"one\n two # x\n\nB=3\" # c\nC='\n'\nD=1",
         "A=one\n two # x\n\nB=3@f:1|C=\n@f:5|D=1@f:7"},
        {"A='a\r\nb'\r\nB=1", "A=a\r\nb@f:1|B=1@f:3"},
        /* again: the later value, in the first one's place */
        {"A=1\nB=2\nA=3", "A=3@f:3|B=2@f:2"},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        parses(cases[i].text, strlen(cases[i].text), 0, cases[i].want);
}

/* All bytes but NUL, in single quotes (without one) and in double ones. */
static void every_byte(void **state)
{
    char text[1024], *p = text, want[256], *w = want;
    ds_variables v = {0};
    (void)state;

    for (int c = 1; c < 256; c++)
        *w++ = (char)c;
    *w = 0;
    p += sprintf(p, "D=\"");
    for (int c = 1; c < 256; c++)
        p += sprintf(p, c == '"' || c == '\\' ? "\\%c" : "%c", c);
    p += sprintf(p, "\"\nS='");
    for (int c = 1; c < 256; c++)
        if (c != '\'')
            *p++ = (char)c;
    *p++ = '\'';
    assert_int_equal(ds_variables_parse(&v, text, (size_t)(p - text), "f"), 0);
    assert_string_equal(ds_variables_find(&v, "D")->value, want);
    w = strchr(want, '\'');
    memmove(w, w + 1, strlen(w));
    assert_string_equal(ds_variables_find(&v, "S")->value, want);
    assert_null(ds_variables_find(&v, "d"));
    ds_variables_free(&v);
    ds_variables_free(&v);
    assert_true(v.count == 0 && !v.each);
}

#define NAME " before the '=' is no name: it has letters, digits and '_'"

static void bad_lines(void **state)
{
    static const struct {
        const char *line, *why;
    } cases[] = {
        {"A", "A has no '=': a line is KEY=VALUE"},
        {"export A # B=1", "'A # B'" NAME},
        {"export A", "A has no '=': a line is KEY=VALUE"},
        {"secret words", "no '=': a line is KEY=VALUE"},
        {"=1", "''" NAME},
        {"1A=1", "'1A'" NAME},
        {"A-B=1", "'A-B'" NAME},
        {"A.B=1", "'A.B'" NAME},
        {"A B=1", "'A B'" NAME},
        {"export export A=1", "'export A'" NAME},
        {"\xc3\x84=1", "'\\xc3\\x84'" NAME},
        {"A\x1b=1", "'A\\x1b'" NAME},
        {"this is a long secret without its quote=", "'this is a long secret wi'…" NAME},
        {"A='x' y",
         "text behind the closing quote of line 2 (write \\\" for a quote inside of double ones)"},
        {"A='x'y",
         "text behind the closing quote of line 2 (write \\\" for a quote inside of double ones)"},
        {"A='x'#y",
         "text behind the closing quote of line 2 (write \\\" for a quote inside of double ones)"},
        {"A='x''y'",
         "text behind the closing quote of line 2 (write \\\" for a quote inside of double ones)"},
        {"A=\"x\"y\"",
         "text behind the closing quote of line 2 (write \\\" for a quote inside of double ones)"},
        {"RANK=0", "RANK is not for this file: dsrun sets it for each rank"},
        {"export WORLD_SIZE = 4", "WORLD_SIZE is not for this file: dsrun sets it: hosts and slots "
                                  "say how many ranks there are"},
        {"LOCAL_RANK=0", "LOCAL_RANK is not for this file: dsrun sets it for each rank"},
        {"LOCAL_SIZE=0", "LOCAL_SIZE is not for this file: dsrun sets it for each host"},
        {"NODE_RANK=0", "NODE_RANK is not for this file: dsrun sets it for each host"},
        {"MASTER_ADDR=x", "MASTER_ADDR is not for this file: dsrun sets it: use --master_addr"},
        {"MASTER_PORT=x", "MASTER_PORT is not for this file: dsrun sets it: use --master_port"},
        {"CUDA_VISIBLE_DEVICES=1",
         "CUDA_VISIBLE_DEVICES is not for this file: dsrun sets it for each "
         "host: choose slots, as --include host:0,2"},
        {"DSRUN_SIDE=x", "DSRUN_SIDE is not for this file: it is dsrun's own"},
        {"DSRUN_JOB='x'", "DSRUN_JOB is not for this file: it is dsrun's own"},
        {"OMPI_COMM_WORLD_RANK=1",
         "OMPI_COMM_WORLD_RANK is not for this file: Open MPI sets it for each rank"},
        {"SLURM_PROCID=1", "SLURM_PROCID is not for this file: SLURM sets it for each rank"},
    };
    char text[256], want[512];
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(text, sizeof text, "Z=1\n%s\nY=2\n", cases[i].line);
        snprintf(want, sizeof want, "f:2: %s", cases[i].why);
        parses(text, strlen(text), DS_ECORRUPT, want);
    }
    parses(TEXT("A=1\nexport \t"), DS_ECORRUPT, "f:2: no '=': a line is KEY=VALUE");
    /* what only looks like them is the user's */
    parses(TEXT("RANKS=1\nXRANK=1\nDSRUN_LUA=x\nOMPI_MCA_btl=y\nDS_CHECK=nan"), 0,
           "RANKS=1@f:1|XRANK=1@f:2|DSRUN_LUA=x@f:3|OMPI_MCA_btl=y@f:4|DS_CHECK=nan@f:5");
}

static void quotes_over_lines(void **state)
{
    static const char open[] = "A=1\n"
                               "B='one\n"
                               "C=3\n"
                               "two words\n";
    static const char behind[] = "A=\"one\n"
                                 "two\n"
                                 "three\" x\n"
                                 "B\n";
    static const char bad_name[] = "A-=\"one\n" /* its lines are no lines of their own */
                                   "two\"\n"
                                   "RANK='\n"
                                   "x'\n"
                                   "B=2";
    (void)state;

    parses(open, strlen(open), DS_ECORRUPT,
           "f:2: the quote ' that begins here does not end\n"
           "f:4: no '=': a line is KEY=VALUE");
    parses(TEXT("A=\"\\\""), DS_ECORRUPT, "f:1: the quote \" that begins here does not end");
    parses(TEXT("A=\""), DS_ECORRUPT, "f:1: the quote \" that begins here does not end");
    parses(TEXT("A=\"\\"), DS_ECORRUPT, "f:1: the quote \" that begins here does not end");
    parses(behind, strlen(behind), DS_ECORRUPT,
           "f:3: text behind the closing quote of line 1 (write \\\" for a quote inside of double "
           "ones)\n"
           "f:4: B has no '=': a line is KEY=VALUE");
    parses(bad_name, strlen(bad_name), DS_ECORRUPT,
           "f:1: 'A-'" NAME "\nf:3: RANK is not for this file: dsrun sets it for each rank");
}

static void nul_bytes(void **state)
{
    (void)state;
    parses(TEXT("A=1\0\nB=2\n\0C=3\nD='x\n\0'\n# \0\nE=\"\\\0\"\nF=1"), DS_ECORRUPT,
           "f:1: NUL byte: this is no text\n"
           "f:3: NUL byte: this is no text\n"
           "f:4: NUL byte between the quotes\n"
           "f:7: NUL byte: this is no text");
}

static void many_faults_are_counted(void **state)
{
    char text[2048], *p = text;
    ds_variables v = {0};
    int lines = 0;
    (void)state;

    for (int i = 0; i < 100; i++)
        p += sprintf(p, "RANK=%d\n", i);
    assert_int_equal(ds_variables_parse(&v, text, (size_t)(p - text), "f"), DS_ECORRUPT);
    for (const char *c = ds_error(); *c; c++)
        lines += *c == '\n';
    assert_int_equal(lines, 20);
    assert_string_equal(strrchr(ds_error(), '\n'), "\nand 80 more");
}

/* A failure leaves what was there before. */
static void several_texts(void **state)
{
    ds_variables v = {0};
    (void)state;

    assert_int_equal(ds_variables_parse(&v, TEXT("A=1\nB=2"), "one"), 0);
    assert_int_equal(ds_variables_parse(&v, TEXT("C=3\nA=4\n"), "two"), 0);
    assert_int_equal(ds_variables_parse(&v, TEXT("B=5\nD=6\nE\n"), "three"), DS_ECORRUPT);
    expect(show(&v), "A=4@two:2|B=2@one:2|C=3@two:1", "two texts");
    ds_variables_free(&v);
}

/* What no process could be given. */
static void limits(void **state)
{
    enum { LONGEST = 131070 };
    char *text = malloc(1 << 18), *p = text, want[128];
    ds_variables v = {0};
    (void)state;

    memcpy(text, "KEY=", 4);
    memset(text + 4, 'x', LONGEST + 1);
    assert_int_equal(ds_variables_parse(&v, text, 4 + LONGEST - 3, "f"), 0);
    assert_int_equal(strlen(v.each[0].value), LONGEST - 3);
    assert_int_equal(ds_variables_parse(&v, text, 4 + LONGEST - 2, "f"), DS_ECORRUPT);
    snprintf(want, sizeof want, "f:1: the value of KEY has %d bytes; there is room for %d",
             LONGEST - 2, LONGEST - 3);
    expect(ds_error(), want, "a long value");
    ds_variables_free(&v);
    for (int i = 0; i < 4096; i++)
        p += sprintf(p, "V%d=%d\n", i, i);
    assert_int_equal(ds_variables_parse(&v, text, (size_t)(p - text), "f"), 0);
    assert_int_equal(v.count, 4096);
    assert_string_equal(ds_variables_find(&v, "V4095")->from, "f:4096");
    ds_variables_free(&v);
    p += sprintf(p, "MORE=1\nAND=2");
    assert_int_equal(ds_variables_parse(&v, text, (size_t)(p - text), "f"), DS_ECORRUPT);
    expect(ds_error(), "f:4097: these are more than 4096 variables", "many");
    free(text);
}

/* ---- files: a home folder and another one to be in, with names in a folder for the test */

static const char *const names[] = {"home/.deepspeed_env", "home/.dsrun_env", "here/.deepspeed_env",
                                    "here/.dsrun_env", "other"};

static void remove_files(void)
{
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        unlink(path_of(names[i]));
        rmdir(path_of(names[i]));
    }
}

/* The folder's name in the text is left out. */
static void reads(int code, const char *want)
{
    ds_variables v = {0};
    char got[4096];
    int rc = ds_variables_read(&v);
    size_t n = 0;

    snprintf(got, sizeof got, "%s", rc < 0 ? ds_error() : show(&v));
    for (char *c = got; *c;) {
        if (!strncmp(c, folder, strlen(folder)))
            c += strlen(folder);
        else
            got[n++] = *c++;
    }
    got[n] = 0;
    expect(got, want, "files");
    assert_int_equal(rc, code);
    ds_variables_free(&v);
}

static void files_in_their_order(void **state)
{
    (void)state;
    reads(0, "");
    write_file(names[3], "A=4\nB=4\n");
    reads(0, "A=4@.dsrun_env:1|B=4@.dsrun_env:2");
    write_file(names[2], "\nA=3\nC=3");
    write_file(names[1], "A=2\nD=2");
    write_file(names[0], "A=1\nE=1\nD=1");
    reads(0, "A=4@.dsrun_env:1|E=1@/home/.deepspeed_env:2|D=2@/home/.dsrun_env:2|"
             "C=3@.deepspeed_env:3|B=4@.dsrun_env:2");
    setenv("HOME", path_of("here"), 1);
    reads(0, "A=4@.dsrun_env:1|C=3@.deepspeed_env:3|B=4@.dsrun_env:2");
    setenv("HOME", "/dev/null", 1);
    reads(0, "A=4@.dsrun_env:1|C=3@.deepspeed_env:3|B=4@.dsrun_env:2");
    unsetenv("HOME");
    reads(0, "A=4@.dsrun_env:1|C=3@.deepspeed_env:3|B=4@.dsrun_env:2");
}

static void one_file_that_is_named(void **state)
{
    (void)state;
    write_file(names[3], "A=4\n");
    write_file("other", "B=5\n");
    setenv("DS_ENV_FILE", path_of("other"), 1);
    reads(0, "B=5@/other:1");
    setenv("DS_ENV_FILE", "../other", 1);
    reads(0, "B=5@../other:1");
    setenv("DS_ENV_FILE", path_of("none"), 1);
    reads(DS_ENOENT, "DS_ENV_FILE names /none, and there is no such file");
    setenv("DS_ENV_FILE", "/dev/null", 1);
    reads(0, "");
    setenv("DS_ENV_FILE", "", 1);
    reads(0, "A=4@.dsrun_env:1");
}

static void faults_of_all_files(void **state)
{
    (void)state;
    write_file(names[0], "A\n");
    write_file(names[1], "A=1\n");
    write_file(names[3], "B=1\nRANK=3\n");
    reads(DS_ECORRUPT, "/home/.deepspeed_env:1: A has no '=': a line is KEY=VALUE\n"
                       ".dsrun_env:2: RANK is not for this file: dsrun sets it for each rank");
    setenv("HOME", path_of("here"), 1); /* no file is read twice */
    reads(DS_ECORRUPT, ".dsrun_env:2: RANK is not for this file: dsrun sets it for each rank");
    remove_files();
    assert_int_equal(mkdir(path_of(names[2]), 0777), 0);
    reads(DS_EIO, ".deepspeed_env is a directory, not a file");
    setenv("DS_ENV_FILE", "/dev/zero", 1);
    reads(DS_ECORRUPT, "/dev/zero has more than 1048576 bytes: that is another kind of file");
}

/* ---- the launching shell */

static void what_is_inherited(void **state)
{
    char *environment[] = {"HOME=/root",
                           "NCCL_DEBUG=INFO",
                           "NCCL=1",
                           "UCX_TLS=",
                           "OMP_NUM_THREADS=2",
                           "DS_CHECK=nan\nx=y",
                           "DSRUN_LUA=/x",
                           "DSRUN_SIDE=1.2.3.4:5",
                           "DSRUN_JOB=token",
                           "LUA_PATH=?.lua;;",
                           "OMPI_MCA_btl=tcp",
                           "OMPI_COMM_WORLD_RANK=0",
                           "CUDA_LAUNCH_BLOCKING=1",
                           "CUDA_VISIBLE_DEVICES=0",
                           "FI_PROVIDER=efa",
                           "NCCL_A-B=1",
                           "DS_ENV_FILE=x",
                           "RANK=3",
                           "DS_NO_VALUE",
                           "NCCL_DEBUG=again",
                           "=C:",
                           "",
                           NULL};
    char *nothing[] = {NULL};
    ds_variables v = {0};
    (void)state;

    assert_int_equal(ds_variables_parse(&v, TEXT("A=1\nOMP_NUM_THREADS=7\n"), "f"), 0);
    assert_int_equal(ds_variables_inherit(&v, environment), 0);
    expect(show(&v),
           "A=1@f:1|OMP_NUM_THREADS=7@f:2|NCCL_DEBUG=INFO@environment|UCX_TLS=@environment|"
           "DS_CHECK=nan\nx=y@environment|DSRUN_LUA=/x@environment|LUA_PATH=?.lua;;@environment|"
           "OMPI_MCA_btl=tcp@environment|CUDA_LAUNCH_BLOCKING=1@environment|"
           "FI_PROVIDER=efa@environment",
           "an environment");
    assert_int_equal(ds_variables_inherit(&v, nothing), 0);
    assert_int_equal(v.count, 10);
    ds_variables_free(&v);
}

static int make_folder(void **state)
{
    (void)state;
    return mkdtemp(folder) && mkdir(path_of("home"), 0777) == 0 &&
                   mkdir(path_of("here"), 0777) == 0 && chdir(path_of("here")) == 0
               ? 0
               : -1;
}

static int start_clean(void **state)
{
    (void)state;
    remove_files();
    unsetenv("DS_ENV_FILE");
    return setenv("HOME", path_of("home"), 1);
}

static int remove_folder(void **state)
{
    (void)state;
    remove_files();
    rmdir(path_of("home"));
    rmdir(path_of("here"));
    return rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values),
        cmocka_unit_test(every_byte),
        cmocka_unit_test(bad_lines),
        cmocka_unit_test(quotes_over_lines),
        cmocka_unit_test(nul_bytes),
        cmocka_unit_test(many_faults_are_counted),
        cmocka_unit_test(several_texts),
        cmocka_unit_test(limits),
        cmocka_unit_test_setup(files_in_their_order, start_clean),
        cmocka_unit_test_setup(one_file_that_is_named, start_clean),
        cmocka_unit_test_setup(faults_of_all_files, start_clean),
        cmocka_unit_test(what_is_inherited),
    };

    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
