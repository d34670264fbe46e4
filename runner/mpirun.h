/* mpirun.h - the commands that start ranks: Open MPI's mpirun, versions 4 and 5, and SLURM's srun. */
#ifndef DS_MPIRUN_H
#define DS_MPIRUN_H

#include "runner/plan.h"

/* What to start and how. */
typedef struct ds_start {
    const ds_plan *plan;
    int version;        /* Open MPI's major one */
    const char *folder; /* for its files, on every host; ours as well */
    ds_ssh ssh;
    int count; /* the arguments of each rank */
    char **arguments;
} ds_start;

/* Asks mpirun for its version. DS_ENOENT: there is none, or it is not Open MPI's. */
int ds_mpirun_version(int *major);

/* The command of the plan's launcher. *argv is to be freed with ds_mpirun_free(). */
int ds_mpirun_command(char ***argv, const ds_start *start);
void ds_mpirun_free(char **argv);

/* Writes the file of hosts that the command names, into start->folder. */
int ds_mpirun_hosts(const ds_start *start);

/* On another host, in place of Open MPI's daemon: `argv` is "dsrun --agent FOLDER HUB DAEMON …",
 * with the job's folder, and where its hub is (ds_plan.hub). Makes the folder, leaves a process that
 * removes it when the daemon has ended, and with it what is left of the job on this host; so it does,
 * daemon included, when the hub has gone or is cut off. Then becomes the daemon. Returns only with an
 * error. */
int ds_agent(int argc, char **argv);

/* In place of ssh, for hosts that mpirun knows by an alias: `argv` is "dsrun --ssh …", and becomes
 * "ssh …" with their names. Returns only with an error. */
int ds_ssh_alias(int argc, char **argv);

#endif
