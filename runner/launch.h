/* launch.h - a job of several ranks on this machine. */
#ifndef DS_LAUNCH_H
#define DS_LAUNCH_H

#include "runner/options.h"

/* Starts options->num_ranks copies of this program with these arguments (argv as main() got it), and
 * returns the job's exit code when it has ended, or a negative code if it could not begin. */
int ds_launch(const ds_options *options, int argc, char **argv);

#endif
