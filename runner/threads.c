/* threads.c - how many threads the kernels use.
 *
 * One for every core that this process may use: hyper-threads share the units that matter, and a
 * container's quota of time counts like cores (threads that spin while they wait would burn it).
 * OMP_NUM_THREADS wins.
 *
 * libgomp's own defaults are right for a process that nobody launched: threads spin for some 3 ms
 * between regions (so Lua's time between two kernels costs no wake-up: measured 0.6 µs for an empty
 * region after gaps up to 2 ms, 30 µs after 20 ms, when they sleep), and not at all when there are
 * more threads than cores. dsrun tells the ranks that it launches on its own machine what they need.
 * Those on other machines, and those of another launcher, must be told before libgomp looks: Open MPI
 * ties a rank to one core, or leaves it all cores that the others use as well. There the process
 * takes its share and starts itself anew.
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

/* Leaves one CPU of each core in the set: the lowest. */
static void keep_cores(cpu_set_t *set)
{
    if (read_number("/sys/devices/system/cpu/smt/active") <= 0)
        return;
    for (int cpu = CPU_SETSIZE - 1; cpu >= 0; cpu--) {
        char path[96];
        int first;

        if (!CPU_ISSET(cpu, set))
            continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list",
                 cpu);
        first = (int)read_number(path);
        if (first >= 0 && first != cpu && CPU_ISSET(first, set))
            CPU_CLR(cpu, set);
    }
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

int ds_threads_cores(cpu_set_t *out)
{
    double quota = time_quota();
    int cores;

    if (sched_getaffinity(0, sizeof *out, out) < 0) {
        CPU_ZERO(out);
        CPU_SET(0, out);
    }
    keep_cores(out);
    cores = CPU_COUNT(out);
    if (quota > 0 && quota < cores)
        cores = quota < 1 ? 1 : (int)quota;
    return cores;
}

/* A rank that was tied to part of its host: ties it to its share of all of it instead. */
static void take_share(const ds_rank *rank)
{
    int cpus = (int)sysconf(_SC_NPROCESSORS_ONLN), share = cpus / rank->local_size;
    cpu_set_t set;

    if (sched_getaffinity(0, sizeof set, &set) < 0 || share <= CPU_COUNT(&set) ||
        rank->local_rank >= rank->local_size)
        return;
    CPU_ZERO(&set);
    for (int i = 0; i < share; i++)
        CPU_SET(rank->local_rank * share + i, &set);
    sched_setaffinity(0, sizeof set, &set);
}

/* Of `cores` that this rank may use: all, if it is tied to them; else its share. */
static int threads_of(const ds_rank *rank, int cores)
{
    int cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
    cpu_set_t set;

    if (rank->tied || (rank->launched == DS_BY_ANOTHER &&
                       sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) < cpus))
        return cores;
    return cores / rank->local_size > 0 ? cores / rank->local_size : 1;
}

void ds_threads_init(const ds_rank *rank, char **argv)
{
    int cores, threads;
    cpu_set_t set;
    char text[16];

    if (env_number("OMP_NUM_THREADS", 0) > 0)
        return;
    if (rank->launched == DS_BY_ANOTHER)
        take_share(rank);
    threads = cores = ds_threads_cores(&set);
    if (rank->launched != DS_ALONE) {
        threads = threads_of(rank, cores);
        snprintf(text, sizeof text, "%d", threads);
        setenv("OMP_NUM_THREADS", text, 1);
        if (threads * rank->local_size > (int)sysconf(_SC_NPROCESSORS_ONLN))
            setenv("OMP_WAIT_POLICY", "passive", 0);
        execv("/proc/self/exe", argv); /* if it fails, go on with libgomp as it is */
    }
    omp_set_num_threads(threads);
}

int ds_threads(void)
{
    return omp_get_max_threads();
}
