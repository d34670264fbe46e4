/* levels.h - runs a test program once for every CPU level that this machine has.
 *
 * A process chooses its level once, so each level is a process of its own.
 */
#ifndef DS_TEST_LEVELS_H
#define DS_TEST_LEVELS_H

#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/backend.h"

/* For main(): the exit status of all levels' runs, or -1 in the process that shall run the
 * tests. */
static inline int each_level(char **argv)
{
    const char *const *level = ds_cpu_levels();
    int failed = 0;

    if (getenv("DS_CPU_LEVEL"))
        return -1;
    for (; *level; level++) {
        int status = 0;
        pid_t child;

        fflush(NULL);
        child = fork();
        if (child == 0) {
            setenv("DS_CPU_LEVEL", *level, 1);
            execv("/proc/self/exe", argv);
            _exit(127);
        }
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
            fprintf(stderr, "%s: failed at level %s\n", argv[0], *level);
            failed = 1;
        }
    }
    return failed;
}

#endif
