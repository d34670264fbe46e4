/* rank.c - which rank of a job this process is.
 *
 * Launchers say so in the environment, each in variables of its own. All children inherit them, also
 * those that are no ranks: a script may start another dsrun. So a rank leaves its process number
 * there, and who finds another one's is a child of a rank.
 */
#include "runner/rank.h"

#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/log.h"
#include "runner/slurm.h"
#include "runner/threads.h"

extern char **environ;

static const struct {
    const char *size, *rank, *local_size, *local_rank;
} launchers[] = {
    {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
     "OMPI_COMM_WORLD_LOCAL_RANK"},
    {"PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"},
    /* set in a step; SLURM_NTASKS is there in a batch script as well, where nothing was launched */
    {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID", NULL, "SLURM_LOCALID"},
};

static int number(const char *name, int otherwise)
{
    const char *text = name ? getenv(name) : NULL;

    return text && *text ? atoi(text) : otherwise;
}

/* Tasks on this node. */
static int slurm_local_size(int otherwise)
{
    ds_slurm_numbers tasks = {.text = getenv("SLURM_STEP_TASKS_PER_NODE")};
    int node = number("SLURM_NODEID", 0), n;

    do
        n = ds_slurm_number(&tasks);
    while (n >= 0 && node-- > 0);
    return n > 0 ? n : otherwise;
}

/* A setting of the user's for Open MPI (OMPI_MCA_…) goes as well, as it can't be told from mpirun's
 * own. */
void ds_rank_forget(void)
{
    static const char *const prefixes[] = {
        "OMPI_",      "PMIX_",       "PMI_",         "ORTE_",         "PRTE_",
        "DSRUN_SIDE", "DSRUN_CPUS",  "DSRUN_PID",    "DSRUN_HOSTS",   "DSRUN_DEVICES",
        "DSRUN_JOB",  "RANK=",       "WORLD_SIZE=",  "LOCAL_SIZE",    "LOCAL_RANK",
        "NODE_RANK",  "SLURM_STEP_", "SLURM_PROCID", "SLURM_LOCALID",
    };
    char name[256];
    int i = 0;

    while (environ[i]) {
        size_t length = strcspn(environ[i], "=");
        int ours = 0;

        for (size_t p = 0; p < sizeof prefixes / sizeof *prefixes; p++)
            ours |= !strncmp(environ[i], prefixes[p], strlen(prefixes[p]));
        if (!ours || length >= sizeof name) {
            i++;
            continue;
        }
        snprintf(name, sizeof name, "%.*s", (int)length, environ[i]);
        unsetenv(name); /* what follows moves to i */
    }
}

int ds_rank_hosts(const char *hosts, int rank)
{
    int node = 0, slots = 0;

    for (const char *c = strchr(hosts, ' '); c; c = strchr(c, ' '), node++) {
        slots++;
        for (c++; *c && *c != ';'; c++)
            slots += *c == ',';
        if (rank >= 0 && rank < slots)
            return node;
    }
    return rank < 0 ? node : -1;
}

/* The slots of host number `node`, as "0,1", into out. */
static void slots_of(char *out, size_t bytes, const char *hosts, int node)
{
    const char *c = strchr(hosts, ' ');

    for (; c && node > 0; node--)
        c = strchr(c + 1, ' ');
    snprintf(out, bytes, "%.*s", c ? (int)strcspn(c + 1, ";") : 0, c ? c + 1 : "");
}

void ds_rank_find(ds_rank *out)
{
    const char *hosts = getenv("DSRUN_HOSTS");
    int parent = number("DSRUN_PID", 0);

    *out = (ds_rank){.size = 1, .local_size = 1, .nodes = 1};
    if (parent && parent != (int)getpid()) {
        ds_rank_forget();
        unsetenv("OMP_NUM_THREADS"); /* the rank's share */
        unsetenv("OMP_WAIT_POLICY");
        return;
    }
    for (size_t i = 0; i < sizeof launchers / sizeof *launchers; i++) {
        int size = number(launchers[i].size, 0);

        if (size < 1)
            continue;
        out->launched = getenv("DSRUN_SIDE") ? DS_BY_DSRUN : DS_BY_ANOTHER;
        out->size = size;
        out->rank = number(launchers[i].rank, 0);
        out->local_size = launchers[i].local_size ? number(launchers[i].local_size, size)
                                                  : slurm_local_size(size);
        out->local_rank = number(launchers[i].local_rank, out->rank);
        if (hosts) {
            out->nodes = ds_rank_hosts(hosts, -1);
            out->node = ds_rank_hosts(hosts, out->rank);
        }
        return;
    }
}

static void set_number(const char *name, int value)
{
    char text[16];

    snprintf(text, sizeof text, "%d", value);
    setenv(name, text, 1);
}

int ds_rank_cpus(int *out, int most, const char *list)
{
    const char *text = list;
    int n = 0;

    for (;;) {
        char *end;
        long first = strtol(text, &end, 10), last = first;

        if (end == text || *text < '0' || *text > '9')
            break;
        if (*end == '-') {
            text = end + 1;
            last = strtol(text, &end, 10);
            if (end == text || *text < '0' || *text > '9')
                break;
        }
        if (last < first || last >= CPU_SETSIZE || (n && first <= out[n - 1]) ||
            n + last - first >= most)
            break;
        while (first <= last)
            out[n++] = (int)first++;
        if (!*end)
            return n;
        if (*end != ',')
            break;
        text = end + 1;
    }
    return ds_fail(DS_EINVAL,
                   "--bind_core_list: '%.80s' is no ascending list of cores below %d, as 0,2-5",
                   list, CPU_SETSIZE);
}

/* Ties this process to the local_rank-th of local_size shares of the cores in the list, or ("all") of
 * those it may use. */
static int bind(const ds_rank *rank, const char *list)
{
    int cpu[CPU_SETSIZE], n = 0;
    cpu_set_t set;

    if (strcmp(list, "all")) {
        n = ds_rank_cpus(cpu, CPU_SETSIZE, list);
    } else {
        ds_threads_cores(&set);
        for (int i = 0; i < CPU_SETSIZE; i++)
            if (CPU_ISSET(i, &set))
                cpu[n++] = i;
    }
    if (n < 0)
        return n;
    if (n < rank->local_size)
        return ds_fail(DS_EINVAL, "%d ranks cannot be tied to %d cores, as one has at least one",
                       rank->local_size, n);
    CPU_ZERO(&set);
    for (int i = n * rank->local_rank / rank->local_size;
         i < n * (rank->local_rank + 1) / rank->local_size; i++)
        CPU_SET(cpu[i], &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0)
        return ds_fail(DS_EINVAL, "this process may not run on its share of the cores %s", list);
    return 0;
}

int ds_rank_settle(ds_rank *rank)
{
    const char *cpus = getenv("DSRUN_CPUS"), *hosts = getenv("DSRUN_HOSTS");
    char slots[8192];
    int rc;

    ds_log_rank(rank->rank);
    if (rank->launched == DS_ALONE)
        return 0;
    /* A launcher that was gone before this is noticed when its side channel is not there. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    set_number("DSRUN_PID", (int)getpid());
    set_number("RANK", rank->rank);
    set_number("WORLD_SIZE", rank->size);
    set_number("LOCAL_RANK", rank->local_rank);
    set_number("LOCAL_SIZE", rank->local_size);
    if (rank->launched == DS_BY_DSRUN && hosts) {
        set_number("NODE_RANK", rank->node);
        set_number("CROSS_RANK", rank->node); /* DeepSpeed's names for the same */
        set_number("CROSS_SIZE", rank->nodes);
        slots_of(slots, sizeof slots, hosts, rank->node);
        if (getenv("DSRUN_DEVICES")) /* the slots are numbers of GPUs */
            setenv("CUDA_VISIBLE_DEVICES", slots, 1);
    }
    if (!cpus)
        return 0;
    rc = bind(rank, cpus);
    rank->tied = rc == 0;
    unsetenv("DSRUN_CPUS"); /* it is done, also where this process starts itself anew */
    return rc;
}

int ds_rank_colon(const char *argument)
{
    return !strcmp(argument + strspn(argument, "\\"), ":");
}
