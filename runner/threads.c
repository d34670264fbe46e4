/* threads.c - how many threads the kernels use.
 *
 * One for every core that this process may use: hyper-threads share the units that matter, and a
 * container's quota of time counts like cores (threads that spin while they wait would burn it).
 * OMP_NUM_THREADS wins.
 *
 * libgomp's own defaults are right for a process that nobody launched: threads spin for some 3 ms
 * between regions (so Lua's time between two kernels costs no wake-up: measured 0.6 µs for an empty
 * region after gaps up to 2 ms, 30 µs after 20 ms, when they sleep), and not at all when there are
 * more threads than cores. Only under Open MPI, which ties a rank to one core before libgomp looks,
 * must it look again: there the process takes its share of the host's cores and starts itself anew.
 */
#include "runner/threads.h"

#include <omp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runner/ds.h"

/* The first number in a file, or -1. */
static double read_number(const char *path)
{
    FILE *f = fopen(path, "r");
    double x = -1;

    if (f) {
        if (fscanf(f, "%lf", &x) != 1)
            x = -1;
        fclose(f);
    }
    return x;
}

/* Cores that hold at least one CPU of the set: a CPU counts when no lower one of its core is in it.
 */
static int count_cores(const cpu_set_t *set)
{
    int cores = 0;

    if (read_number("/sys/devices/system/cpu/smt/active") <= 0)
        return CPU_COUNT(set);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        char path[96];
        int first;

        if (!CPU_ISSET(cpu, set))
            continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list",
                 cpu);
        first = (int)read_number(path);
        cores += first < 0 || first == cpu || !CPU_ISSET(first, set);
    }
    return cores;
}

/* Cores' worth of time in the control group at `path` (version 2), or 0: no limit. */
static double group_quota(const char *path)
{
    char file[1200];
    double quota = 0, period = 0;
    FILE *f;

    snprintf(file, sizeof file, "/sys/fs/cgroup%s/cpu.max", path);
    f = fopen(file, "r");
    if (!f)
        return 0;
    if (fscanf(f, "%lf %lf", &quota, &period) != 2 || period <= 0) /* "max 100000" */
        quota = 0;
    fclose(f);
    return quota > 0 ? quota / period : 0;
}

/* The tightest quota of this process's control group and those above it; 0: none. */
static double time_quota(void)
{
    char line[1024], *path = NULL, *slash;
    double tightest = 0;
    FILE *f = fopen("/proc/self/cgroup", "r");

    if (!f)
        return 0;
    while (!path && fgets(line, sizeof line, f))
        path = strncmp(line, "0::", 3) ? NULL : line + 3;
    fclose(f);
    if (!path) {
        double quota = read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
        double period = read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
        return quota > 0 && period > 0 ? quota / period : 0;
    }
    path[strcspn(path, "\n")] = 0;
    for (;;) {
        double quota = group_quota(strcmp(path, "/") ? path : "");
        if (quota > 0 && (tightest == 0 || quota < tightest))
            tightest = quota;
        slash = strrchr(path, '/');
        if (!slash || !path[0])
            return tightest;
        *slash = 0;
    }
}

static int env_number(const char *name, int otherwise)
{
    const char *text = getenv(name);

    return text && *text ? atoi(text) : otherwise;
}

/* A rank of Open MPI that was tied to part of its host: ties it to its share of all of it instead.
 * 1: done. */
static int take_share(const cpu_set_t *mine)
{
    int ranks = env_number("OMPI_COMM_WORLD_LOCAL_SIZE", 0);
    int rank = env_number("OMPI_COMM_WORLD_LOCAL_RANK", 0);
    int cpus = (int)sysconf(_SC_NPROCESSORS_ONLN), share;
    cpu_set_t set;

    share = ranks > 0 ? cpus / ranks : 0;
    if (share <= CPU_COUNT(mine) || rank < 0 || rank >= ranks)
        return 0;
    CPU_ZERO(&set);
    for (int i = 0; i < share; i++)
        CPU_SET(rank * share + i, &set);
    return sched_setaffinity(0, sizeof set, &set) == 0;
}

void ds_threads_init(char **argv)
{
    cpu_set_t set;
    double quota;
    int threads;

    if (env_number("OMP_NUM_THREADS", 0) > 0 || sched_getaffinity(0, sizeof set, &set) < 0)
        return;
    if (take_share(&set)) {
        char text[16];
        sched_getaffinity(0, sizeof set, &set);
        snprintf(text, sizeof text, "%d", count_cores(&set));
        setenv("OMP_NUM_THREADS", text, 1);
        execv("/proc/self/exe", argv); /* if it fails, go on with libgomp as it is */
    }
    threads = count_cores(&set);
    quota = time_quota();
    if (quota > 0 && quota < threads)
        threads = quota < 1 ? 1 : (int)quota;
    omp_set_num_threads(threads > 0 ? threads : 1);
}

int ds_threads(void)
{
    return omp_get_max_threads();
}
