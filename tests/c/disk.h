/* disk.h - for tests of what writes and reads files: a fresh folder, and the calls to the system as
 * they were, after each test. */
#ifndef DS_TEST_DISK_H
#define DS_TEST_DISK_H

#include "runner/file.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

static char folder[256]; /* of this test, fresh */
static ds_io system_io;

/* A path in the test's folder; two may be in use at once. */
static inline const char *in(const char *name)
{
    static char paths[2][DS_PATH];
    static int turn;

    turn ^= 1;
    snprintf(paths[turn], DS_PATH, "%s/%s", folder, name);
    return paths[turn];
}

static inline int setup(void **state)
{
    const char *base = getenv("TMPDIR");

    (void)state;
    snprintf(folder, sizeof folder, "%s/dsrun-test-XXXXXX", base ? base : "/tmp");
    system_io = *ds_io_now();
    return mkdtemp(folder) ? 0 : -1;
}

static inline int teardown(void **state)
{
    (void)state;
    *ds_io_now() = system_io;
    unsetenv("DS_IO");
    return ds_remove(folder);
}

#endif
