/* job.h - one start of a job's ranks, to the end of all of them. */
#ifndef DS_JOB_H
#define DS_JOB_H

#include "runner/lines.h"
#include "runner/mpirun.h"
#include "runner/plan.h"

/* What outlasts a start. */
typedef struct ds_job_streams {
    ds_lines *lines; /* the output of ranks */
    int signals;     /* a signalfd of SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGCHLD; -1: none */
    int stops;       /* of those of them that end a job; -1: none */
} ds_job_streams;

/* Starts the ranks and returns the exit code when all have ended, or a negative one if they could not
 * be started. start: all but its plan's variables and its version are set. restarts: how often the
 * job was started before. *failed: it did not end as asked, and may be started again. */
int ds_job_run(int *failed, ds_plan *plan, ds_start *start, ds_job_streams *streams, int restarts);

#endif
