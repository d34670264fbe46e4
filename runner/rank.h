/* rank.h - which rank of a job this process is, as its launcher says, and its share of the machine.
 */
#ifndef DS_RANK_H
#define DS_RANK_H

enum ds_launched {
    DS_ALONE,      /* nobody launched it: one process */
    DS_BY_DSRUN,   /* mpirun did, for a dsrun that watches over the job */
    DS_BY_ANOTHER, /* mpirun or srun, called by hand */
};

typedef struct ds_rank {
    enum ds_launched launched;
    int rank, size;
    int local_rank, local_size; /* among those on this machine */
    int node, nodes;            /* this machine's number, and how many there are, as dsrun says */
    int tied;                   /* it was tied to cores of its own */
} ds_rank;

/* Reads what launchers leave in the environment. A program that a rank starts is not a rank: what
 * it inherited of that is removed. */
void ds_rank_find(ds_rank *out);

/* Removes from the environment what launchers and MPI left there for this process. */
void ds_rank_forget(void);

/* Makes this process that rank: ends when its launcher does, sets RANK, WORLD_SIZE, LOCAL_RANK,
 * LOCAL_SIZE and, where dsrun launched it, NODE_RANK for the script and CUDA_VISIBLE_DEVICES, takes
 * the cores that the launcher gave it, tags log lines. DS_EINVAL: the launcher's cores do not
 * suffice. */
int ds_rank_settle(ds_rank *rank);

/* An argument that is a lone ':' would end the command for mpirun, so the launcher puts a backslash
 * before it, and before one with backslashes alone in front; the rank takes it off again. */
int ds_rank_colon(const char *argument);

/* The launcher's list of hosts and the slots in use on each, one rank a slot, in order of rank, is
 * "worker-1 0,1;worker-2 3" (DSRUN_HOSTS). The hosts in it, or (rank >= 0) the number of the one on
 * which that rank is; -1: it is on none. */
int ds_rank_hosts(const char *hosts, int rank);

/* Reads a list of CPUs, as "0,2-5", ascending; out: [most]. Returns how many, or DS_EINVAL. */
int ds_rank_cpus(int *out, int most, const char *list);

#endif
