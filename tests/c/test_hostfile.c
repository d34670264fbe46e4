/* test_hostfile.c - which hosts and slots come out of a hostfile, filters and SLURM's variables, and
 * what each kind of mistake is told.
 *
 * Lists are compared as text, "worker-1:0,1 worker-2:0".
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
#include "runner/hostfile.h"
#include "runner/slurm.h"

/* With its length, as it may have NUL bytes. */
#define TEXT(text) text, sizeof(text) - 1

static char shown[1 << 16];

static const char *show(const ds_hosts *hosts)
{
    size_t used = 0;

    shown[0] = 0;
    for (int i = 0; i < hosts->count; i++) {
        used += (size_t)sprintf(shown + used, "%s%s:", i ? " " : "", hosts->host[i].name);
        for (int s = 0; s < hosts->host[i].slots; s++)
            used += (size_t)sprintf(shown + used, "%s%d", s ? "," : "", hosts->host[i].slot[s]);
    }
    return shown;
}

static void expect(const char *got, const char *want, const char *of)
{
    if (strcmp(got, want) != 0)
        fail_msg("%s\n--- gave\n%s\n--- not\n%s", of, got, want);
}

/* Either the list, or (`code` < 0) the whole message. */
static void parses(const char *text, size_t bytes, int code, const char *want)
{
    char *exact = malloc(bytes); /* so that a byte too far is seen by the sanitizers */
    ds_hosts *hosts = (ds_hosts *)&shown;
    int rc;

    memcpy(exact, text, bytes);
    rc = ds_hosts_parse(&hosts, exact, bytes, "hosts");
    expect(rc < 0 ? ds_error() : show(hosts), want, text);
    assert_int_equal(rc, code);
    assert_true((hosts == NULL) == (rc < 0));
    ds_hosts_free(hosts);
    free(exact);
}

/* ---- the file */

static void good_files(void **state)
{
    static const struct {
        const char *text, *want;
    } cases[] = {
        {"worker-1 slots=2", "worker-1:0,1"},
        {"b slots=1\na slots=3\n", "b:0 a:0,1,2"}, /* the file's order */
        {"\n  # all\n\t \na slots=1 # one\n#b slots=2\nc slots=1#\n", "a:0 c:0"},
        {"a slots=1\r\n\r\nb slots=1 # x\r\nc slots=1", "a:0 b:0 c:0"},
        {"a\tslots =\t2\n  b   slots= 1 \nc slots = 1", "a:0,1 b:0 c:0"},
        {"\xef\xbb\xbf"
         "a slots=1",
         "a:0"},
        {"a slots=2 max_slots=2\nb max-slots=9 slots=1\nc max_slots=1048576 slots=1",
         "a:0,1 b:0 c:0"},
        {"alice@w.example.org slots=1\n10.0.0.1 slots=1\nx_y.z-1. slots=01",
         "alice@w.example.org:0 10.0.0.1:0 x_y.z-1.:0"},
        {"[FE80:0:0::1] slots=1\nbob@[fe80::2%eth0.1] slots=1", "fe80::1:0 bob@fe80::2%eth0.1:0"},
        {"a@x slots=1\na@y slots=1\na slots=1", "a@x:0 a@y:0 a:0"},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        parses(cases[i].text, strlen(cases[i].text), 0, cases[i].want);
}

static void the_largest_host(void **state)
{
    static const char text[] = "a slots=4096";
    ds_hosts *hosts;
    (void)state;

    assert_int_equal(ds_hosts_parse(&hosts, text, strlen(text), "hosts"), 0);
    assert_int_equal(ds_hosts_ranks(hosts), 4096);
    assert_int_equal(hosts->host[0].slot[4095], 4095);
    ds_hosts_free(hosts);
}

#define RANGE "slots wants a whole number from 1 to 4096, not "
#define PORT                                                                                       \
    "has a colon: a port goes to --ssh_port, or into ssh's config; an IPv6 address in brackets"
#define LETTERS "is no host's name: it has letters, digits, '-', '_' and '.' between them"

static void bad_lines(void **state)
{
    static const struct {
        const char *line, *why;
    } cases[] = {
        /* numbers */
        {"a slots=0", RANGE "'0' (a host without ranks is left out, or has a # in front)"},
        {"a slots=-1", RANGE "'-1'"},
        {"a slots=+1", RANGE "'+1'"},
        {"a slots=four", RANGE "'four'"},
        {"a slots=4x", RANGE "'4x'"},
        {"a slots=1.5", RANGE "'1.5'"},
        {"a slots=0x4", RANGE "'0x4'"},
        {"a slots=4097", RANGE "'4097'"},
        {"a slots=18446744073709551617", RANGE "'18446744073709551617'"},
        {"a slots=", RANGE "''"},
        {"a slots==4", RANGE "'=4'"},
        {"a slots=1 max_slots=0",
         "max_slots wants a whole number from 1 to 1048576, not '0' (a host "
         "without ranks is left out, or has a # in front)"},
        {"a slots=4 max_slots=2", "max_slots=2 is less than slots=4"},
        {"a max-slots=2 slots=4", "max_slots=2 is less than slots=4"},
        /* keys */
        {"a", "slots is missing: add slots=N for N ranks on it"},
        {"a max_slots=4", "slots is missing: add slots=N for N ranks on it"},
        {"a slot=4", "unknown key slot (did you mean slots?)"},
        {"a Slots=4", "unknown key Slots (did you mean slots?)"},
        {"a slots=4 maxslots=4", "unknown key maxslots (did you mean max_slots?)"},
        {"a slots=4 gpu_type=h100", "unknown key gpu_type (there are slots and max_slots)"},
        {"a slots=4 slots=4", "slots is given twice"},
        {"a slots=4 max_slots=4 max-slots=4", "max_slots is given twice"},
        {"a 4", "'4' is no KEY=VALUE, as slots=4"},
        {"a slots:4", "'slots:4' is no KEY=VALUE, as slots=4"},
        {"a slots=4 =", "unknown key  (there are slots and max_slots)"},
        {"slots=4", "there is no host's name in front, as in 'worker-1 slots=4'"},
        {"7 slots=4", "'7' is no IPv4 address"}, /* which is what the resolver takes it for */
        {"slots = 4", "there is no host's name in front, as in 'worker-1 slots=4'"},
        /* names */
        {"-oProxyCommand=x slots=4", "there is no host's name in front, as in 'worker-1 slots=4'"},
        {"-a slots=4", "'-a' is no host's name: with a '-' in front it would be an option"},
        {"u@-a slots=4", "'-a' is no host's name: with a '-' in front it would be an option"},
        {"-u@a slots=4",
         "'-u@a' has no user's name before the @: that has letters, digits, '.', '_' "
         "and '-'"},
        {"a,b slots=4", "'a,b' " LETTERS},
        {"a;reboot slots=4", "'a;reboot' " LETTERS},
        {"$(a) slots=4", "'$(a)' " LETTERS},
        {"a\x1b[2J slots=4", "'a\\x1b[2J' " LETTERS},
        {"a\rb slots=4", "'a\\rb' " LETTERS},
        {"w\xc3\xb6rker slots=4", "'w\\xc3\\xb6rker' " LETTERS},
        {"a\\b slots=4", "'a\\b' " LETTERS},
        {"a*b slots=4", "'a*b' " LETTERS},
        {"a@b@c slots=4", "'b@c' " LETTERS},
        {"a$b@c slots=4",
         "'a$b@c' has no user's name before the @: that has letters, digits, '.', '_' "
         "and '-'"},
        {"@a slots=4", "'@a' is no host's name: it is [USER@]NAME"},
        {"a@ slots=4", "'a@' is no host's name: it is [USER@]NAME"},
        {".a slots=4", "'.a' is no host's name: there is nothing before a '.'"},
        {"a..b slots=4", "'a..b' is no host's name: there is nothing before a '.'"},
        {"10.0.0.256 slots=4", "'10.0.0.256' is no IPv4 address"},
        {"10.0.1 slots=4", "'10.0.1' is no IPv4 address"},
        {"host:22 slots=4", "'host:22' " PORT},
        {"u@host:22 slots=4", "'host:22' " PORT},
        {"fe80::1 slots=4", "'fe80::1' is an IPv6 address, which goes in brackets"},
        {"[fe80::1]:22 slots=4",
         "'[fe80::1]:22' has a port, which goes to --ssh_port, or into ssh's config"},
        {"[fe80::1 slots=4", "'[fe80::1' does not end with the bracket's other half"},
        {"[ slots=4", "'[' does not end with the bracket's other half"},
        {"[] slots=4", "'' is no IPv6 address"},
        {"[fe80::g] slots=4", "'fe80::g' is no IPv6 address"},
        {"[10.0.0.1] slots=4", "'10.0.0.1' is no IPv6 address"},
        {"[fe80::1%] slots=4", "'[fe80::1%' has no interface's name behind the %"},
        {"[fe80::1%a;b] slots=4", "'[fe80::1%a;b' has no interface's name behind the %"},
    };
    char text[256], want[1024], quoted[256];
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *line = cases[i].line;
        size_t q = 0;

        for (const char *c = line; *c; c++) /* as messages show them */
            q += (size_t)sprintf(quoted + q,
                                 *c == '\r'            ? "\\r"
                                 : *c < 32 || *c > 126 ? "\\x%02x"
                                                       : "%c",
                                 (unsigned char)*c);
        snprintf(text, sizeof text, "# first\n%s # comment\nz slots=1\n", line);
        snprintf(want, sizeof want, "hosts:2: '%s': %s", quoted, cases[i].why);
        parses(text, strlen(text), DS_ECORRUPT, want);
    }
}

static void all_faults_at_once(void **state)
{
    static const char text[] = "a slots=1\n"
                               "b slots=0 colour=red\n"
                               "-c slots=x # two on one line\n"
                               "A slots=2\n"
                               "eve@a slots=2\n"
                               "d slots 4\n"
                               "e slots=2\n"
                               "[0::1] slots=1\n"
                               "[::1] slots=1\n"
                               "f";
    (void)state;

    parses(
        text, strlen(text), DS_ECORRUPT,
        "hosts:2: 'b slots=0 colour=red': " RANGE
        "'0' (a host without ranks is left out, or has a # in front)\n"
        "hosts:2: 'b slots=0 colour=red': unknown key colour (there are slots and max_slots)\n"
        "hosts:3: '-c slots=x': '-c' is no host's name: with a '-' in front it would be an option\n"
        "hosts:3: '-c slots=x': " RANGE "'x'\n"
        "hosts:4: 'A slots=2': this host has line 1 already: its slots go on one line\n"
        "hosts:5: 'eve@a slots=2': this host has line 1 already: its slots go on one line\n"
        "hosts:6: 'd slots 4': 'slots' is no KEY=VALUE, as slots=4\n"
        "hosts:6: 'd slots 4': '4' is no KEY=VALUE, as slots=4\n"
        "hosts:9: '[::1] slots=1': this host has line 8 already: its slots go on one line\n"
        "hosts:10: 'f': slots is missing: add slots=N for N ranks on it");
}

static void many_faults_are_counted(void **state)
{
    char text[4096], *p = text, *last;
    ds_hosts *hosts;
    int lines = 0;
    (void)state;

    for (int i = 0; i < 120; i++)
        p += sprintf(p, "host-%d slots=none\n", i);
    assert_int_equal(ds_hosts_parse(&hosts, text, (size_t)(p - text), "hosts"), DS_ECORRUPT);
    for (const char *c = ds_error(); *c; c++)
        lines += *c == '\n';
    assert_int_equal(lines, 20);
    last = strrchr(ds_error(), '\n');
    assert_string_equal(last, "\nand 100 more");
    assert_non_null(strstr(ds_error(), "hosts:20: 'host-19 slots=none'"));
    assert_null(strstr(ds_error(), "hosts:21:"));
}

/* Lines and paths of any length end in a message that is whole at its end. */
static void long_texts_are_cut(void **state)
{
    char *text = malloc(20000), *path = malloc(8000);
    ds_hosts *hosts;
    size_t bytes = 0;
    (void)state;

    for (int i = 0; i < 3; i++) {
        memset(text + bytes, 'a', 5000);
        bytes += 5000;
        bytes += (size_t)sprintf(text + bytes, "%d slots=1\n", i);
    }
    assert_int_equal(ds_hosts_parse(&hosts, text, bytes, "hosts"), DS_ECORRUPT);
    assert_true(strlen(ds_error()) < 700);
    assert_non_null(strstr(ds_error(), "\nhosts:2: 'aaaaa"));
    assert_non_null(strstr(ds_error(), "aaa…': a host's name has at most 255 characters"));
    memset(path, 'p', 7999);
    path[2000] = 0;
    assert_int_equal(ds_hosts_parse(&hosts, text, bytes, path), DS_ECORRUPT);
    assert_string_equal(ds_error() + strlen(ds_error()) - 11, "\nand 1 more");
    path[2000] = 'p';
    path[7999] = 0;
    assert_int_equal(ds_hosts_parse(&hosts, text, bytes, path), DS_ECORRUPT);
    assert_string_equal(ds_error() + strlen(ds_error()) - 11, "\nand 2 more");
    free(text);
    free(path);
}

static void files_without_hosts(void **state)
{
    static const char none[] = "hosts: no hosts in it: they are lines as 'worker-1 slots=4'";
    (void)state;

    parses(TEXT(""), DS_ECORRUPT, none);
    parses(TEXT("# a slots=1\n\n  \r\n"), DS_ECORRUPT, none);
    parses(TEXT("a slots=1\nb\0 slots=1\n#\0\n"), DS_ECORRUPT,
           "hosts:2: 'b\\x00 slots=1': NUL byte: a hostfile is plain text\n"
           "hosts:3: '#\\x00': NUL byte: a hostfile is plain text");
}

static void slots_of_all_hosts_have_a_limit(void **state)
{
    char *text = malloc(300 * 20), *p = text;
    ds_hosts *hosts;
    (void)state;

    for (int i = 0; i < 256; i++)
        p += sprintf(p, "h%d slots=4096\n", i);
    assert_int_equal(ds_hosts_parse(&hosts, text, (size_t)(p - text), "hosts"), 0);
    assert_int_equal(ds_hosts_ranks(hosts), 1 << 20);
    ds_hosts_free(hosts);
    p += sprintf(p, "more slots=1\nand slots=1\n");
    parses(text, (size_t)(p - text), DS_ECORRUPT,
           "hosts:257: 'more slots=1': there are more than 1048576 slots in all");
    free(text);
}

static char folder[] = "/tmp/hostfile-XXXXXX";

static const char *path_of(const char *name)
{
    static char path[128];

    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void write_file(const char *name, const char *text)
{
    FILE *f = fopen(path_of(name), "w");

    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static void files(void **state)
{
    ds_hosts *hosts;
    char want[256];
    FILE *pipe;
    (void)state;

    write_file("hosts", "a slots=2\n");
    assert_int_equal(ds_hosts_read(&hosts, path_of("hosts")), 0);
    expect(show(hosts), "a:0,1", "a file");
    ds_hosts_free(hosts);

    assert_int_equal(ds_hosts_read(&hosts, path_of("none")), DS_ENOENT);
    snprintf(want, sizeof want, "there is no hostfile %s: it has lines as 'worker-1 slots=4'",
             path_of("none"));
    expect(ds_error(), want, "a missing file");
    assert_null(hosts);
    assert_int_equal(ds_hosts_read(&hosts, path_of("hosts/x")), DS_ENOENT);
    assert_int_equal(ds_hosts_read(&hosts, folder), DS_EIO);
    snprintf(want, sizeof want, "%s is a directory, not a file", folder);
    expect(ds_error(), want, "a folder");

    write_file("bad", "a\n");
    assert_int_equal(ds_hosts_read(&hosts, path_of("bad")), DS_ECORRUPT);
    snprintf(want, sizeof want, "%s:1: 'a': slots is missing: add slots=N for N ranks on it",
             path_of("bad"));
    expect(ds_error(), want, "a bad file");

    assert_int_equal(ds_hosts_read(&hosts, "/dev/zero"), DS_ECORRUPT); /* without an end */
    expect(ds_error(), "/dev/zero has more than 16777216 bytes: that is another kind of file", "");

    pipe = popen("printf 'p slots=1\\n'; sleep 0.05; echo 'q slots=1'", "r");
    assert_non_null(pipe);
    snprintf(want, sizeof want, "/proc/self/fd/%d", fileno(pipe));
    assert_int_equal(ds_hosts_read(&hosts, want), 0);
    expect(show(hosts), "p:0 q:0", "a pipe");
    ds_hosts_free(hosts);
    pclose(pipe);
}

static void this_machine(void **state)
{
    ds_hosts *hosts;
    (void)state;

    assert_int_equal(ds_hosts_local(&hosts, 3), 0);
    expect(show(hosts), "localhost:0,1,2", "3");
    assert_int_equal(ds_hosts_ranks(hosts), 3);
    ds_hosts_free(hosts);
    assert_int_equal(ds_hosts_local(&hosts, 0), DS_EINVAL);
    assert_null(hosts);
    assert_int_equal(ds_hosts_local(&hosts, 4097), DS_EINVAL);
    expect(ds_error(), "a host has 1 to 4096 slots, not 4097", "4097");
    ds_hosts_free(NULL);
}

/* ---- filters */

static const char cluster[] = "worker-1 slots=4\n"
                              "worker-2 slots=4\n"
                              "alice@worker-3 slots=2\n"
                              "[fe80::1] slots=2\n";

#define ALL "worker-1:0,1,2,3 worker-2:0,1,2,3 alice@worker-3:0,1 fe80::1:0,1"
#define THERE                                                                                      \
    "worker-1 slots 0-3; worker-2 slots 0-3; alice@worker-3 slots 0-1; [fe80::1] slots 0-1"

static ds_hosts *hosts_of(const char *text)
{
    ds_hosts *hosts;

    if (ds_hosts_parse(&hosts, text, strlen(text), "hosts") < 0)
        fail_msg("%s", ds_error());
    return hosts;
}

/* The list that is left, or the message, and then the list is as it was. */
static void filters(const char *text, const char *include, const char *exclude, int nodes,
                    int slots, int code, const char *want)
{
    ds_hosts *hosts = hosts_of(text);
    char *before = strdup(show(hosts)), of[256];
    int rc = ds_hosts_filter(hosts, include, exclude, nodes, slots);

    snprintf(of, sizeof of, "include '%s' exclude '%s' %d %d", include ? include : "",
             exclude ? exclude : "", nodes, slots);
    if (rc < 0) {
        expect(ds_error(), want, of);
        expect(show(hosts), before, of);
    } else {
        expect(show(hosts), want, of);
    }
    assert_int_equal(rc, code);
    ds_hosts_free(hosts);
    free(before);
}

static void includes_and_excludes(void **state)
{
    static const struct {
        const char *text, *included, *excluded;
    } cases[] = {
        {"worker-2", "worker-2:0,1,2,3", "worker-1:0,1,2,3 alice@worker-3:0,1 fe80::1:0,1"},
        {"worker-2:0,1@worker-1:3", "worker-1:3 worker-2:0,1", /* the file's order */
         "worker-1:0,1,2 worker-2:2,3 alice@worker-3:0,1 fe80::1:0,1"},
        {"worker-1:1-3", "worker-1:1,2,3",
         "worker-1:0 worker-2:0,1,2,3 alice@worker-3:0,1 fe80::1:0,1"},
        {"worker-1:3,0-1,1,0", "worker-1:0,1,3",
         "worker-1:2 worker-2:0,1,2,3 alice@worker-3:0,1 fe80::1:0,1"},
        {" worker-1 : 0 , 2 - 3 @ worker-2 :\t1 ", "worker-1:0,2,3 worker-2:1",
         "worker-1:1 worker-2:0,2,3 alice@worker-3:0,1 fe80::1:0,1"},
        {"worker-1:0@worker-2@worker-1:2", "worker-1:0,2 worker-2:0,1,2,3", /* they add up */
         "worker-1:1,3 alice@worker-3:0,1 fe80::1:0,1"},
        {"worker-1@worker-1:1@worker-2:0-3@worker-2", /* slots count more than none */
         "worker-1:1 worker-2:0,1,2,3", "worker-1:0,2,3 alice@worker-3:0,1 fe80::1:0,1"},
        {"worker-3:1", "alice@worker-3:1",
         "worker-1:0,1,2,3 worker-2:0,1,2,3 alice@worker-3:0 fe80::1:0,1"},
        {"alice@worker-3:0@worker-1:0", "worker-1:0 alice@worker-3:0",
         "worker-1:1,2,3 worker-2:0,1,2,3 alice@worker-3:1 fe80::1:0,1"},
        {"worker-1@alice@worker-3", "worker-1:0,1,2,3 alice@worker-3:0,1",
         "worker-2:0,1,2,3 fe80::1:0,1"},
        {"[fe80::1]:1", "fe80::1:1",
         "worker-1:0,1,2,3 worker-2:0,1,2,3 alice@worker-3:0,1 fe80::1:0"},
        {"worker-1:0@[FE80:0::1]", "worker-1:0 fe80::1:0,1",
         "worker-1:1,2,3 worker-2:0,1,2,3 alice@worker-3:0,1"},
        {"worker-1@worker-2@worker-3", "worker-1:0,1,2,3 worker-2:0,1,2,3 alice@worker-3:0,1",
         "fe80::1:0,1"},
        {"worker-1:0,1,2,3", "worker-1:0,1,2,3", /* all slots of a host: it is gone */
         "worker-2:0,1,2,3 alice@worker-3:0,1 fe80::1:0,1"},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        filters(cluster, cases[i].text, NULL, 0, 0, 0, cases[i].included);
        filters(cluster, NULL, cases[i].text, 0, 0, 0, cases[i].excluded);
    }
    filters(cluster, "", NULL, 0, 0, 0, ALL);
    filters(cluster, NULL, "", 0, 0, 0, ALL);
}

static void bad_filters(void **state)
{
    static const struct {
        const char *text, *message; /* behind "--include: " */
    } cases[] = {
        {"wroker-1", "there is no host 'wroker-1' (did you mean worker-1?)"},
        {"WORKER-2:0", "there is no host 'WORKER-2' (did you mean worker-2?)"},
        {"worker-01", "there is no host 'worker-01' (did you mean worker-1?)"},
        {"worker-7", "there is no host 'worker-7'"}, /* another number is no slip */
        {"login", "there is no host 'login'"},
        {"worker-1;x", "there is no host 'worker-1;x' (did you mean worker-1?)"},
        {"[fe80::2]", "there is no host '[fe80::2]'"},
        {"worker-1:4", "host worker-1 has no slot 4 (it has 0-3)"},
        {"worker-1:0,2-9", "host worker-1 has no slot 4 (it has 0-3)"},
        {"worker-1:7-9", "host worker-1 has no slot 7 (it has 0-3)"},
        {"worker-1:0-99999999999999999999", "host worker-1 has no slot 4 (it has 0-3)"},
        {"alice@worker-3:2", "host alice@worker-3 has no slot 2 (it has 0-1)"},
        {"[fe80::1]:2", "host [fe80::1] has no slot 2 (it has 0-1)"},
        {"worker-1:", "'' is no slot: they are numbers and ranges, as 0,2-5"},
        {"worker-1:0,", "'' is no slot: they are numbers and ranges, as 0,2-5"},
        {"worker-1:,0", "'' is no slot: they are numbers and ranges, as 0,2-5"},
        {"worker-1:-1", "'-1' is no slot: they are numbers and ranges, as 0,2-5"},
        {"worker-1:1-", "'1-' is no slot: they are numbers and ranges, as 0,2-5"},
        {"worker-1:1-2-3", "'1-2-3' is no slot: they are numbers and ranges, as 0,2-5"},
        {"worker-1:1 2", "'1 2' is no slot: they are numbers and ranges, as 0,2-5"},
        {"worker-1:gpu", "'gpu' is no slot: they are numbers and ranges, as 0,2-5"},
        {"worker-1:0:1", "'0:1' is no slot: they are numbers and ranges, as 0,2-5; an IPv6 address "
                         "goes in brackets"},
        {"worker-1:2-1", "'2-1' runs backwards"},
        {"@worker-1", "a host's name is missing before or behind a '@' or before a ':'"},
        {"worker-1@", "a host's name is missing before or behind a '@' or before a ':'"},
        {"worker-1@@worker-2", "a host's name is missing before or behind a '@' or before a ':'"},
        {":0", "a host's name is missing before or behind a '@' or before a ':'"},
        {" ", "a host's name is missing before or behind a '@' or before a ':'"},
    };
    char want[2048];
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(want, sizeof want, "--include: %s\nthere is " THERE, cases[i].message);
        filters(cluster, cases[i].text, NULL, 0, 0, DS_EINVAL, want);
        snprintf(want, sizeof want, "--exclude: %s\nthere is " THERE, cases[i].message);
        filters(cluster, NULL, cases[i].text, 0, 0, DS_EINVAL, want);
    }
    filters(cluster, "alcie@worker-3", NULL, 0, 0, DS_EINVAL,
            "--include: there is no host 'alcie'\nthere is " THERE);
    filters(cluster, "x@worker-1:9@worker-2:b", NULL, 0, 0, DS_EINVAL, /* all at once */
            "--include: there is no host 'x'\n"
            "--include: host worker-1 has no slot 9 (it has 0-3)\n"
            "--include: 'b' is no slot: they are numbers and ranges, as 0,2-5\n"
            "there is " THERE);
}

/* A user's name that is a host's as well. */
static void one_host_or_two(void **state)
{
    static const char text[] = "a slots=1\na@b slots=1\nc slots=1";
    (void)state;

    filters(text, "a@b", NULL, 0, 0, DS_EINVAL,
            "--include: 'a@b' can mean one host or two: leave out the user's name\n"
            "there is a slot 0; a@b slot 0; c slot 0");
    filters(text, "b", NULL, 0, 0, 0, "a@b:0");
    filters(text, "b@a", NULL, 0, 0, 0, "a:0 a@b:0");
    filters(text, "a@c", NULL, 0, 0, 0, "a:0 c:0");
}

static void nothing_left(void **state)
{
    (void)state;
    filters(cluster, NULL, "worker-1@worker-2:0-3@worker-3@[fe80::1]", 0, 0, DS_EINVAL,
            "--exclude 'worker-1@worker-2:0-3@worker-3@[fe80::1]' leaves nothing to run on; there "
            "is " THERE);
}

static void counts(void **state)
{
    (void)state;
    filters(cluster, NULL, NULL, 0, 0, 0, ALL);
    filters(cluster, NULL, NULL, 2, 0, 0, "worker-1:0,1,2,3 worker-2:0,1,2,3");
    filters(cluster, NULL, NULL, 0, 2, 0,
            "worker-1:0,1 worker-2:0,1 alice@worker-3:0,1 fe80::1:0,1");
    filters(cluster, NULL, NULL, 2, 3, 0, "worker-1:0,1,2 worker-2:0,1,2");
    filters(cluster, NULL, NULL, 4, 1, 0, "worker-1:0 worker-2:0 alice@worker-3:0 fe80::1:0");
    filters(cluster, NULL, NULL, 5, 0, DS_EINVAL, "--num_nodes 5, but there are only 4: " THERE);
    filters("a slots=2", NULL, NULL, 2, 0, DS_EINVAL,
            "--num_nodes 2, but there is only 1: a slots 0-1");
    filters(cluster, NULL, NULL, 0, 3, DS_EINVAL,
            "--num_gpus wants 3 slots of each host; there is alice@worker-3 slots 0-1; [fe80::1] "
            "slots 0-1");
    filters(cluster, NULL, NULL, 1, 5, DS_EINVAL,
            "--num_gpus wants 5 slots of each host; there is worker-1 slots 0-3");
    filters(cluster, NULL, NULL, -1, 0, DS_EINVAL, "--num_nodes and --num_gpus are not negative");
    filters(cluster, NULL, NULL, 0, -1, DS_EINVAL, "--num_nodes and --num_gpus are not negative");
}

static void what_excludes_each_other(void **state)
{
    static const char with[] = "cannot specify num_nodes/gpus with include/exclude";
    (void)state;

    filters(cluster, "worker-1", "worker-2", 0, 0, DS_EINVAL,
            "include and exclude are mutually exclusive: give one of them");
    filters(cluster, "worker-1", NULL, 1, 0, DS_EINVAL, with);
    filters(cluster, NULL, "worker-1", 0, 1, DS_EINVAL, with);
}

/* Slots that are left keep their ids for a second filter. */
static void a_filter_on_a_filter(void **state)
{
    ds_hosts *hosts = hosts_of("a slots=9\nb slots=2");
    (void)state;

    assert_int_equal(ds_hosts_filter(hosts, NULL, "a:1,4-5@b", 0, 0), 0);
    expect(show(hosts), "a:0,2,3,6,7,8", "exclude");
    assert_int_equal(ds_hosts_ranks(hosts), 6);
    assert_int_equal(ds_hosts_filter(hosts, "a:2-6", NULL, 0, 0), DS_EINVAL);
    expect(ds_error(),
           "--include: host a has no slot 4 (it has 0,2-3,6-8)\nthere is a slots 0,2-3,6-8",
           "a:2-6");
    assert_int_equal(ds_hosts_filter(hosts, "a:2-3,7", NULL, 0, 0), 0);
    expect(show(hosts), "a:2,3,7", "include");
    assert_int_equal(ds_hosts_filter(hosts, NULL, NULL, 1, 2), 0);
    expect(show(hosts), "a:2,3", "count");
    ds_hosts_free(hosts);
}

static void long_lists_are_cut(void **state)
{
    char text[8192], *p = text;
    ds_hosts *hosts;
    (void)state;

    for (int i = 0; i < 300; i++)
        p += sprintf(p, "node-%03d slots=2\n", i);
    hosts = hosts_of(text);
    assert_int_equal(ds_hosts_filter(hosts, "nodes-001", NULL, 0, 0), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "(did you mean node-001?)\nthere is node-000 slots 0-1; "));
    assert_true(strlen(ds_error()) < 1400);
    p = strrchr(ds_error(), ';');
    assert_int_equal(strncmp(p, "; and 2", 7), 0);
    assert_string_equal(p + 9, " more");
    ds_hosts_free(hosts);

    hosts = hosts_of("a slots=4096");
    for (int i = 0; i < 2048; i++)
        hosts->host[0].slot[i] = 2 * i;
    hosts->host[0].slots = 2048;
    assert_int_equal(ds_hosts_filter(hosts, "a:1", NULL, 0, 0), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "host a has no slot 1 (it has 0,2,4,6,8,"));
    assert_true(strlen(ds_error()) < 600);
    ds_hosts_free(hosts);
}

/* ---- SLURM */

static const char *const slurm[] = {
    "SLURM_JOB_NODELIST",  "SLURM_TASKS_PER_NODE", "SLURM_NTASKS",
    "SLURM_NPROCS",        "SLURM_GPUS_ON_NODE",   "SLURM_JOB_CPUS_PER_NODE",
    "SLURM_CPUS_PER_TASK", "SLURM_GPUS_PER_NODE",  "SLURM_NTASKS_PER_NODE",
};

/* "NAME=VALUE NAME=VALUE" without the SLURM_; then the list or the message. */
static void allocation(const char *variables, int code, const char *want)
{
    char *copy = strdup(variables), *rest = copy, *word, name[64];
    ds_hosts *hosts = (ds_hosts *)&shown;
    int rc;

    for (size_t i = 0; i < sizeof slurm / sizeof *slurm; i++)
        unsetenv(slurm[i]);
    while ((word = strsep(&rest, " "))) {
        char *value = strchr(word, '=');
        if (!value)
            continue;
        snprintf(name, sizeof name, "SLURM_%.*s", (int)(value - word), word);
        setenv(name, value + 1, 1);
    }
    rc = ds_hosts_slurm(&hosts);
    expect(rc < 0 ? ds_error() : show(hosts), want, variables);
    assert_int_equal(rc, code);
    assert_true((hosts == NULL) == (rc < 0));
    ds_hosts_free(hosts);
    free(copy);
}

static void allocations(void **state)
{
    static const struct {
        const char *variables, *want;
    } cases[] = {
        {"JOB_NODELIST=a JOB_CPUS_PER_NODE=2", "a:0,1"},
        {"JOB_NODELIST=node[01-03,07],gpu-[1-2]x,login JOB_CPUS_PER_NODE=1(x7)",
         "node01:0 node02:0 node03:0 node07:0 gpu-1x:0 gpu-2x:0 login:0"},
        {"JOB_NODELIST=r[1-2]n[08-10] JOB_CPUS_PER_NODE=1(x6)",
         "r1n08:0 r1n09:0 r1n10:0 r2n08:0 r2n09:0 r2n10:0"},
        {"JOB_NODELIST=n[9-11]-ib.x,[3]d JOB_CPUS_PER_NODE=1(x4)",
         "n9-ib.x:0 n10-ib.x:0 n11-ib.x:0 3d:0"},
        {"JOB_NODELIST=b,a JOB_CPUS_PER_NODE=2,1", "b:0,1 a:0"},
        /* tasks where they were asked for */
        {"JOB_NODELIST=n[1-4] TASKS_PER_NODE=2(x3),1 NTASKS=7 JOB_CPUS_PER_NODE=8(x4) "
         "GPUS_ON_NODE=3",
         "n1:0,1 n2:0,1 n3:0,1 n4:0"},
        {"JOB_NODELIST=n1 TASKS_PER_NODE=3 NTASKS_PER_NODE=3 JOB_CPUS_PER_NODE=8", "n1:0,1,2"},
        {"JOB_NODELIST=n1 TASKS_PER_NODE=3 NPROCS=3 JOB_CPUS_PER_NODE=8", "n1:0,1,2"},
        /* else GPUs, else CPUs */
        {"JOB_NODELIST=n[1-2] TASKS_PER_NODE=1(x2) JOB_CPUS_PER_NODE=8(x2) GPUS_ON_NODE=2",
         "n1:0,1 n2:0,1"},
        {"JOB_NODELIST=n1 JOB_CPUS_PER_NODE=8 GPUS_PER_NODE=a100:2,gpu:h200:1", "n1:0,1,2"},
        {"JOB_NODELIST=n1 JOB_CPUS_PER_NODE=2 GPUS_ON_NODE=0", "n1:0,1"},
        {"JOB_NODELIST=n[1-3] TASKS_PER_NODE=1(x3) JOB_CPUS_PER_NODE=4(x2),7 CPUS_PER_TASK=2",
         "n1:0,1 n2:0,1 n3:0,1,2"},
        {"JOB_NODELIST=n[1-2] TASKS_PER_NODE=2,1", "n1:0,1 n2:0"},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        allocation(cases[i].variables, 0, cases[i].want);
}

static void bad_allocations(void **state)
{
    static const struct {
        const char *list, *message; /* behind the variable's name and text */
    } lists[] = {
        {"n[1-2", "a bracket is not closed"},
        {"n[]", "brackets hold numbers and ascending ranges"},
        {"n[1,]", "brackets hold numbers and ascending ranges"},
        {"n[2-1]", "brackets hold numbers and ascending ranges"},
        {"n[a-b]", "brackets hold numbers and ascending ranges"},
        {"n[1-2-3]", "brackets hold numbers and ascending ranges"},
        {"n[[1]]", "brackets hold numbers and ascending ranges"},
        {"n[0000000001]", "brackets hold numbers and ascending ranges"},
        {"n[1-100000]", "these are more than 65536 nodes"},
        {"n[1-99999]m[1-99999]", "these are more than 65536 nodes"},
        {"a,,b", "'' is no host's name: it is [USER@]NAME"},
        {"a,", "'' is no host's name: it is [USER@]NAME"},
        {"n1]", "'n1]' " LETTERS},
        {"-n[1-2]", "'-n1' is no host's name: with a '-' in front it would be an option"},
        {"$(x)", "'$(x)' " LETTERS},
        {"n:22", "'n:22' " PORT},
    };
    static const struct {
        const char *variables, *message;
    } slots[] = {
        {"JOB_NODELIST=n[1-2]", "SLURM does not say how many ranks a node has: neither "
                                "SLURM_TASKS_PER_NODE nor SLURM_JOB_CPUS_PER_NODE is set"},
        {"JOB_NODELIST=n1,n[1-2] JOB_CPUS_PER_NODE=1(x3)", "SLURM_JOB_NODELIST names n1 twice"},
        {"JOB_NODELIST=n[1-2] JOB_CPUS_PER_NODE=4",
         "SLURM_JOB_CPUS_PER_NODE='4' is for 1 nodes, and SLURM_JOB_NODELIST='n[1-2]' has 2"},
        {"JOB_NODELIST=n[1-2] NTASKS=3 TASKS_PER_NODE=1(x3)",
         "SLURM_TASKS_PER_NODE='1(x3)' is for 3 nodes, and SLURM_JOB_NODELIST='n[1-2]' has 2"},
        {"JOB_NODELIST=n1 NTASKS=3 TASKS_PER_NODE=x",
         "SLURM_TASKS_PER_NODE='x' is not one number a node, as 2(x3),1"},
        {"JOB_NODELIST=n1 NTASKS=3 TASKS_PER_NODE=0",
         "SLURM_TASKS_PER_NODE='0': that makes 0 slots of 0, and a host has 1 to 4096"},
        {"JOB_NODELIST=n1 JOB_CPUS_PER_NODE=5000",
         "SLURM_JOB_CPUS_PER_NODE='5000': that makes 5000 slots of 5000, and a host has 1 to 4096"},
        {"JOB_NODELIST=n1 JOB_CPUS_PER_NODE=2 CPUS_PER_TASK=4",
         "SLURM_JOB_CPUS_PER_NODE='2' with SLURM_CPUS_PER_TASK=4: that makes 0 slots of 2, and a "
         "host "
         "has 1 to 4096"},
        {"JOB_NODELIST=n1 JOB_CPUS_PER_NODE=2 CPUS_PER_TASK=0",
         "SLURM_CPUS_PER_TASK='0' is no number of CPUs"},
        {"JOB_NODELIST=n1 JOB_CPUS_PER_NODE=2 GPUS_ON_NODE=two",
         "SLURM_GPUS_ON_NODE='two' is no number of GPUs from 0 to 4096"},
        {"JOB_NODELIST=n1 JOB_CPUS_PER_NODE=2 GPUS_PER_NODE=a100:",
         "SLURM_GPUS_PER_NODE='a100:' is no number of GPUs from 0 to 4096"},
        {"JOB_NODELIST=n[1-300] JOB_CPUS_PER_NODE=4000(x300)",
         "SLURM's variables make more than 1048576 slots in all"},
    };
    char variables[256], want[512];
    (void)state;

    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        snprintf(variables, sizeof variables, "JOB_NODELIST=%s JOB_CPUS_PER_NODE=1", lists[i].list);
        snprintf(want, sizeof want, "SLURM_JOB_NODELIST='%s': %s", lists[i].list, lists[i].message);
        allocation(variables, DS_EINVAL, want);
    }
    for (size_t i = 0; i < sizeof slots / sizeof *slots; i++)
        allocation(slots[i].variables, DS_EINVAL, slots[i].message);
    allocation("", DS_ENOENT, "this is no SLURM allocation: SLURM_JOB_NODELIST is not set");
    allocation("JOB_NODELIST=", DS_ENOENT,
               "this is no SLURM allocation: SLURM_JOB_NODELIST is not set");
}

/* A name may have 255 characters. */
static void long_names(void **state)
{
    char variables[400], want[512], *list = variables + strlen("JOB_NODELIST=");
    (void)state;

    strcpy(variables, "JOB_NODELIST=");
    memset(list, 'n', 260);
    strcpy(list + 251, "[1]m[9] GPUS_ON_NODE=1");
    snprintf(want, sizeof want, "%.251s1m9:0", list);
    allocation(variables, 0, want);
    snprintf(want, sizeof want, "SLURM_JOB_NODELIST='%.76s…': a name is too long", list);
    strcpy(list + 251, "[1]m[98-100] GPUS_ON_NODE=1");
    allocation(variables, DS_EINVAL, want);
    memset(list + 251, 'n', 9);
    list[260] = 0;
    allocation(variables, DS_EINVAL, want);
}

static void numbers_of_nodes(void **state)
{
    static const struct {
        const char *text;
        int want[8];
    } cases[] = {
        {"2(x3),1", {2, 2, 2, 1, -1, -1}},
        {"7", {7, -1}},
        {"", {-1}},
        {NULL, {-1}},
        {"1,2", {1, 2, -1}},
        {"1,", {-2}},
        {",1", {-2}},
        {"1(x0)", {-2}},
        {"1(x2", {-2}},
        {"1(2)", {-2}},
        {"x", {-2}},
        {"1,x", {1, -2}},
        {"9999999", {-2}},
        {"1(x)", {-2}},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ds_slurm_numbers n = {.text = cases[i].text};
        int k = 0, got;

        do {
            got = ds_slurm_number(&n);
            if (got != cases[i].want[k])
                fail_msg("'%s': number %d is %d, not %d", cases[i].text, k, got, cases[i].want[k]);
            k++;
        } while (got >= 0);
    }
}

static int make_folder(void **state)
{
    (void)state;
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    unlink(path_of("hosts"));
    unlink(path_of("bad"));
    return rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(good_files),
        cmocka_unit_test(the_largest_host),
        cmocka_unit_test(bad_lines),
        cmocka_unit_test(all_faults_at_once),
        cmocka_unit_test(many_faults_are_counted),
        cmocka_unit_test(long_texts_are_cut),
        cmocka_unit_test(files_without_hosts),
        cmocka_unit_test(slots_of_all_hosts_have_a_limit),
        cmocka_unit_test(files),
        cmocka_unit_test(this_machine),
        cmocka_unit_test(includes_and_excludes),
        cmocka_unit_test(bad_filters),
        cmocka_unit_test(one_host_or_two),
        cmocka_unit_test(nothing_left),
        cmocka_unit_test(counts),
        cmocka_unit_test(what_excludes_each_other),
        cmocka_unit_test(a_filter_on_a_filter),
        cmocka_unit_test(long_lists_are_cut),
        cmocka_unit_test(allocations),
        cmocka_unit_test(bad_allocations),
        cmocka_unit_test(long_names),
        cmocka_unit_test(numbers_of_nodes),
    };

    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
