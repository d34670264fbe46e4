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
        "OMPI_",      "PMIX_",      "PMI_",        "ORTE_",        "PRTE_",
        "DSRUN_SIDE", "DSRUN_CPUS", "DSRUN_PID",   "RANK=",        "WORLD_SIZE=",
        "LOCAL_SIZE", "LOCAL_RANK", "SLURM_STEP_", "SLURM_PROCID", "SLURM_LOCALID",
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

void ds_rank_find(ds_rank *out)
{
    int parent = number("DSRUN_PID", 0);

    *out = (ds_rank){.size = 1, .local_size = 1};
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

/* The local_rank-th of local_size shares of the launcher's cores. */
static int bind(const ds_rank *rank, const char *list)
{
    int cpu[CPU_SETSIZE], n = ds_rank_cpus(cpu, CPU_SETSIZE, list);
    cpu_set_t set;

    if (n < 0)
        return n;
    if (n < rank->local_size)
        return ds_fail(DS_EINVAL, "%d ranks cannot share the cores %s", rank->local_size, list);
    CPU_ZERO(&set);
    for (int i = n * rank->local_rank / rank->local_size;
         i < n * (rank->local_rank + 1) / rank->local_size; i++)
        CPU_SET(cpu[i], &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0)
        return ds_fail(DS_EINVAL, "this process may not run on its share of the cores %s", list);
    return 0;
}

int ds_rank_settle(const ds_rank *rank)
{
    const char *cpus = getenv("DSRUN_CPUS");

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
    return cpus ? bind(rank, cpus) : 0;
}

int ds_rank_colon(const char *argument)
{
    return !strcmp(argument + strspn(argument, "\\"), ":");
}
