/* test_slurm.c - which hosts and slots come out of SLURM's variables, and what is told of senseless
 * ones. */
#include "tests/c/hosts.h"

#include "runner/slurm.h"

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(allocations),
        cmocka_unit_test(bad_allocations),
        cmocka_unit_test(long_names),
        cmocka_unit_test(numbers_of_nodes),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
