/* options.h - the command line. */
#ifndef DS_OPTIONS_H
#define DS_OPTIONS_H

#include <stdio.h>

enum ds_option_id {
#define DS_GROUP(title)
#define DS_OPTION(name, letter, argument, action, help) DS_OPT_##name,
#include "runner/options.def"
    DS_OPTIONS
};

enum ds_command {
    DS_RUN_SCRIPT,
    DS_RUN_REPL,
    DS_RUN_ENV,
    DS_RUN_PLAN,
    DS_RUN_INSPECT,
    DS_RUN_CONVERT
};

typedef struct ds_options {
    const char *value[DS_OPTIONS]; /* NULL: not given */
    const char **eval;             /* every -e in order; within argv's lifetime */
    int evals;
    enum ds_command command;
    const char *script; /* NULL: none; "-": standard input */
    char **arguments;   /* what follows the script */
    int count;
    const char *ranks;        /* the first option that asks for several ranks; NULL: one process */
    int num_slots, num_nodes; /* --num_gpus and its like, --num_nodes; 0: all there are */
    const char *slots_option; /* the one that says num_slots: "num_procs"; NULL: none */
    int srun;                 /* 1: srun starts the ranks; 0: mpirun */
    double timeout, grace;    /* seconds */
    int max_restarts, elastic, min_nodes, max_nodes; /* max_nodes 0: all */
    const char *job;  /* the first option that makes sense for a job of ranks only */
    const char *plan; /* the first option that makes sense for a plan only */
} ds_options;

/* Options before the script are dsrun's, those after it the script's. DS_EINVAL: ds_error() says
 * what is wrong. Free options->eval. */
int ds_options_parse(ds_options *options, int argc, char **argv);

void ds_options_usage(FILE *out);
void ds_options_help(FILE *out);
void ds_options_plan_help(FILE *out); /* of `dsrun plan` */

#endif
