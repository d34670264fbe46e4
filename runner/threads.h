/* threads.h - how many threads the kernels use. */
#ifndef DS_THREADS_H
#define DS_THREADS_H

#include <sched.h>

#include "runner/rank.h"

/* How many cores this process may use, with a quota of time counted like cores. out: one CPU of each
 * core that it may run on. */
int ds_threads_cores(cpu_set_t *out);

/* Sets the number of OpenMP threads, to be called once at the start of main(). May start the
 * program again with `argv` where libgomp has to be told before it is loaded. */
void ds_threads_init(const ds_rank *rank, char **argv);

#endif
