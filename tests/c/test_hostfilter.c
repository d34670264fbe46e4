/* test_hostfilter.c - which hosts and slots --include, --exclude, --num_nodes and --num_gpus leave, and
 * what each kind of mistake is told. */
#include "tests/c/hosts.h"

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
static void filters_by(const char *slots_option, const char *text, const char *include,
                       const char *exclude, int nodes, int slots, int code, const char *want)
{
    ds_hosts *hosts = hosts_of(text);
    char *before = strdup(show(hosts)), of[256];
    int rc = ds_hosts_filter(hosts, include, exclude, nodes, slots, slots_option);

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

static void filters(const char *text, const char *include, const char *exclude, int nodes,
                    int slots, int code, const char *want)
{
    filters_by(NULL, text, include, exclude, nodes, slots, code, want);
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
        {"worker-1:5000", "host worker-1 has no slot 5000 (it has 0-3)"},
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
    filters_by("num_procs", cluster, NULL, NULL, 1, 5, DS_EINVAL,
               "--num_procs wants 5 slots of each host; there is worker-1 slots 0-3");
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

    assert_int_equal(ds_hosts_filter(hosts, NULL, "a:1,4-5@b", 0, 0, NULL), 0);
    expect(show(hosts), "a:0,2,3,6,7,8", "exclude");
    assert_int_equal(ds_hosts_ranks(hosts), 6);
    assert_int_equal(ds_hosts_filter(hosts, "a:2-6", NULL, 0, 0, NULL), DS_EINVAL);
    expect(ds_error(),
           "--include: host a has no slot 4 (it has 0,2-3,6-8)\nthere is a slots 0,2-3,6-8",
           "a:2-6");
    assert_int_equal(ds_hosts_filter(hosts, "a:2-3,7", NULL, 0, 0, NULL), 0);
    expect(show(hosts), "a:2,3,7", "include");
    assert_int_equal(ds_hosts_filter(hosts, NULL, NULL, 1, 2, NULL), 0);
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
    assert_int_equal(ds_hosts_filter(hosts, "nodes-001", NULL, 0, 0, NULL), DS_EINVAL);
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
    assert_int_equal(ds_hosts_filter(hosts, "a:1", NULL, 0, 0, NULL), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "host a has no slot 1 (it has 0,2,4,6,8,"));
    assert_true(strlen(ds_error()) < 600);
    ds_hosts_free(hosts);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(includes_and_excludes),
        cmocka_unit_test(bad_filters),
        cmocka_unit_test(one_host_or_two),
        cmocka_unit_test(nothing_left),
        cmocka_unit_test(counts),
        cmocka_unit_test(what_excludes_each_other),
        cmocka_unit_test(a_filter_on_a_filter),
        cmocka_unit_test(long_lists_are_cut),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
