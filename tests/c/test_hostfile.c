/* test_hostfile.c - which hosts and slots come out of a hostfile, and what each kind of mistake is
 * told. */
#include "tests/c/hosts.h"
#include "tests/c/folder.h"

#include <sys/stat.h>
#include <unistd.h>

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

/* [::1:1] becomes ::0.1.0.1, which is longer. */
static void an_address_that_grows(void **state)
{
    char name[DS_HOST_NAME_BYTES], reason[DS_HOST_REASON_BYTES], text[300];
    (void)state;

    memset(text, 'u', 300);
    strcpy(text + 245, "@[::1:1]");
    assert_int_equal(ds_host_name(name, reason, text, strlen(text)), 0);
    assert_string_equal(name + 245, "@::0.1.0.1");
    assert_int_equal(strlen(name), DS_HOST_NAME_BYTES - 1);
    text[245] = 'u';
    strcpy(text + 246, "@[::1:1]");
    assert_int_equal(ds_host_name(name, reason, text, strlen(text)), DS_EINVAL);
    assert_string_equal(reason, "'::1:1' is too long with its user's name");
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
        "hosts:4: 'A slots=2': duplicate host: line 1 has it already, and its slots go on one "
        "line\n"
        "hosts:5: 'eve@a slots=2': duplicate host: line 1 has it already, and its slots go on one "
        "line\n"
        "hosts:6: 'd slots 4': 'slots' is no KEY=VALUE, as slots=4\n"
        "hosts:6: 'd slots 4': '4' is no KEY=VALUE, as slots=4\n"
        "hosts:9: '[::1] slots=1': duplicate host: line 8 has it already, and its slots go on one "
        "line\n"
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
        cmocka_unit_test(an_address_that_grows),
        cmocka_unit_test(all_faults_at_once),
        cmocka_unit_test(many_faults_are_counted),
        cmocka_unit_test(long_texts_are_cut),
        cmocka_unit_test(files_without_hosts),
        cmocka_unit_test(slots_of_all_hosts_have_a_limit),
        cmocka_unit_test(files),
        cmocka_unit_test(this_machine),
    };

    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
