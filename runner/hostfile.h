/* hostfile.h - which machines a job runs on, and which slots of each.
 *
 * A list of hosts comes from a hostfile (hostfile.c), from a SLURM allocation (slurm.c), or is this
 * machine alone; filters (hostfilter.c) then take hosts and slots away.
 *
 * A hostfile has a line for each host, in the order in which ranks are numbered:
 *
 *     # comments, at the end of a line as well; blank lines, tabs, CRLF are fine
 *     worker-1 slots=4
 *     alice@worker-2 slots = 2 max_slots=8
 *     10.0.0.3 slots=1
 *     [fe80::1] slots=1
 *
 * slots: how many ranks run there, 1 to DS_MAX_SLOTS. max_slots (or max-slots), as Open MPI has it,
 * is at least that, and changes nothing. Names are those of ssh, and safe to hand to it and to mpirun.
 */
#ifndef DS_HOSTFILE_H
#define DS_HOSTFILE_H

#include <stddef.h>

#define DS_MAX_SLOTS 4096        /* of a host */
#define DS_ALL_SLOTS (1 << 20)   /* of all hosts of a list, before filters */
#define DS_HOST_NAME_BYTES 256   /* a name with its final 0 */
#define DS_HOST_REASON_BYTES 256 /* why something is no name */

typedef struct ds_host {
    char *name; /* as ssh takes it: worker-1, user@worker-1, 10.0.0.1, fe80::1 (without brackets) */
    int *slot;  /* [slots] ids of the slots in use, ascending; a rank runs on each, in this order */
    int slots;
} ds_host;

typedef struct ds_hosts {
    ds_host *host; /* [count] in the order of the file; ranks are numbered host by host */
    int count;
} ds_hosts;

/* All that make a list: *out is to be freed with ds_hosts_free(), has at least one host, and each host
 * at least one slot, numbered from 0. On an error *out is NULL, and the message has a line for every
 * fault, the first 20 of them: "FILE:LINE: 'the text': what is wrong". */

/* A file, or a pipe. DS_ENOENT: there is none; DS_ECORRUPT: it has faults; DS_EIO: it can't be read. */
int ds_hosts_read(ds_hosts **out, const char *path);
/* The same of a text; `path` is for messages. */
int ds_hosts_parse(ds_hosts **out, const char *text, size_t bytes, const char *path);
/* This machine alone, named "localhost". DS_EINVAL: slots is not from 1 to DS_MAX_SLOTS. */
int ds_hosts_local(ds_hosts **out, int slots);
/* Those of the SLURM allocation that this process runs in: SLURM_JOB_NODELIST, and as slots the first of
 *   - SLURM_TASKS_PER_NODE, where the user asked for tasks (-n, --ntasks-per-node; SLURM_NTASKS is set),
 *   - GPUs on a node: SLURM_GPUS_ON_NODE, SLURM_GPUS_PER_NODE,
 *   - SLURM_JOB_CPUS_PER_NODE divided by SLURM_CPUS_PER_TASK (default 1).
 * DS_ENOENT: there is no allocation; DS_EINVAL: a variable makes no sense. */
int ds_hosts_slurm(ds_hosts **out);
void ds_hosts_free(ds_hosts *hosts); /* NULL is fine */

/* Takes away, in place, what is not wanted; the order stays.
 *
 * include, exclude: DeepSpeed's NODE[:SLOTS][@NODE[:SLOTS]…], or NULL or "" for none of that. SLOTS are
 * numbers and ranges, as 0,2-5, blanks around them allowed; a host named without any means all of it. A
 * host may be named again: slots add up, and where a host has been named with slots and without, the
 * slots count. [fe80::1] needs its brackets. user@ may be left out.
 * num_nodes: the first so many hosts; num_slots: of each host the first so many slots; 0: all.
 * slots_option: the option that says num_slots, for messages ("num_procs"); NULL: num_gpus.
 * include, exclude, and counts exclude each other.
 *
 * DS_EINVAL: what is asked for does not exist, or nothing is left; the message lists what there is, and
 * hosts are as they were. */
int ds_hosts_filter(ds_hosts *hosts, const char *include, const char *exclude, int num_nodes,
                    int num_slots, const char *slots_option);

int ds_hosts_ranks(const ds_hosts *hosts); /* the sum of slots */

/* ---- for those that make lists */

/* An empty list, or NULL. */
ds_hosts *ds_hosts_new(void);
/* Appends a host with slots 0 to slots - 1. The name is copied, and not looked at. */
int ds_hosts_add(ds_hosts *hosts, const char *name, int slots);

/* Checks a host's name as users write it, [USER@]NAME or [USER@][IPv6], and writes it to name
 * (DS_HOST_NAME_BYTES) as ds_host has it, IPv6 addresses in their usual form. 0, or DS_EINVAL with
 * why not in reason (DS_HOST_REASON_BYTES); ds_fail() is the caller's. */
int ds_host_name(char *name, char *reason, const char *text, size_t bytes);
/* Without its user. */
const char *ds_host_bare(const char *name);
/* As users write it: with brackets around an IPv6 address. Returns out: DS_HOST_NAME_BYTES + 2. */
char *ds_host_shown(char *out, const char *name);
/* Digits alone as a number; -1: something else, or nothing; above `most`: most + 1. */
int ds_host_number(const char *text, size_t bytes, int most);

#endif
