/* clock.c - time that only goes forward, and whether a person is watching. */
#include <time.h>
#include <unistd.h>

#include "runner/ds.h"

double ds_seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

int ds_terminal(void)
{
    return isatty(STDERR_FILENO);
}
