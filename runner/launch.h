/* launch.h - a job of several ranks, on this machine or on many. */
#ifndef DS_LAUNCH_H
#define DS_LAUNCH_H

#include "runner/options.h"

/* Starts copies of this program with these arguments (argv as main() got it), one for each slot that
 * the options name, again where they say so, and returns the job's exit code when it has ended, or a
 * negative code if it could not begin. --dry-run: prints what would be done. */
int ds_launch(const ds_options *options, int argc, char **argv);

#endif
