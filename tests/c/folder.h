/* folder.h - a temporary folder for a test's files: mkdtemp(folder) makes it, the test removes it. */
#ifndef DS_TEST_FOLDER_H
#define DS_TEST_FOLDER_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

static char folder[] = "/tmp/dsrun-test-XXXXXX";

static inline const char *path_of(const char *name)
{
    static char path[128];

    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static inline void write_file(const char *name, const char *text)
{
    FILE *f = fopen(path_of(name), "w");

    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

#endif
