/* plan.h - a job before it starts: which rank runs where, with which variables, by which command. */
#ifndef DS_PLAN_H
#define DS_PLAN_H

#include <limits.h>
#include <stdio.h>

#include "runner/envfile.h"
#include "runner/hostfile.h"
#include "runner/options.h"
#include "runner/preflight.h"

#define DS_ADDRESS_BYTES 64

/* What is known of a host beside its name and slots. */
typedef struct ds_place {
    int here;                        /* it is this machine */
    char address[DS_ADDRESS_BYTES];  /* its own, as this machine sees it; "": unknown */
    char launcher[DS_ADDRESS_BYTES]; /* this machine's, as it sees that */
} ds_place;

typedef struct ds_plan {
    const ds_options *options;
    const ds_program *there; /* what ranks run, and where; set by the plan's owner */
    ds_hosts *all;           /* that the options name */
    ds_hosts hosts;   /* of them, those in use: the same names and slots, in an array of its own */
    ds_place *places; /* [hosts.count] */
    int ranks;
    int network;        /* 1: over the network; 0: on this machine alone */
    int slurm;          /* 1: hosts are those of a SLURM allocation */
    int fabric;         /* 1: some host has a network beside Ethernet, or may have one */
    int devices;        /* 1: slots are numbers of GPUs, of a hostfile or a filter */
    char **where;       /* [ranks] "worker-2, slot 1", or NULL on this machine alone */
    ds_variables env;   /* of the ranks */
    char interface[64]; /* the network that reaches all hosts, as 10.0.0.0/24; "": unknown */
    char hub[512];      /* where other hosts reach the hub, as ds_watch() reads it */
} ds_plan;

/* Hosts and slots from the options, and from what they leave open: /job/hostfile, an allocation of
 * SLURM's, this machine. Close it also after an error. */
int ds_plan_open(ds_plan *p, const ds_options *options);
void ds_plan_close(ds_plan *p);

/* Uses the hosts that were found ready, at most `most` (0: all of them); found: [all->count], NULL:
 * every one. DS_ECOMM: there is none. */
int ds_plan_use(ds_plan *p, const ds_preflight_host *found, int most);

/* Addresses, as far as they are not known yet, and the variables of the ranks. port: the hub's, 0: the
 * plan is only to be shown; token: the job's; folder: the job's folder on every host; restarts: starts
 * before this one. */
int ds_plan_finish(ds_plan *p, int port, const char *token, const char *folder, int restarts);

/* The variables, put into this process's environment: mpirun takes them from there. */
int ds_plan_apply(const ds_plan *p);

/* What --dry-run prints: the ranks, the variables, the command; as text or as JSON. */
int ds_plan_show(const ds_plan *p, char *const *command, int json, FILE *out);

#endif
