/* fake_ssh.h - hosts for tests: an `ssh` first on PATH that runs commands in folders of a temporary
 * one, which are the hosts' home folders.
 *
 * FOLDER/HOST.sh, if there is one, is read by it first: a host that fails or sleeps. Every call's
 * arguments go to FOLDER/calls.
 */
#ifndef DS_TEST_FAKE_SSH_H
#define DS_TEST_FAKE_SSH_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runner/hostfile.h"

static char fake[64]; /* the folder */

static const char fake_ssh[] =
    "#!/bin/sh\n"
    "fake=${0%/bin/ssh}\n"
    "printf '%s' \"$*\" | tr '\\n' ' ' | cut -c 1- >>\"$fake/calls\"\n"
    "while [ \"$1\" != -- ]; do shift; done\n"
    "host=$2 command=$3\n"
    "[ ! -f \"$fake/$host.sh\" ] || . \"$fake/$host.sh\"\n"
    "mkdir -p \"$fake/$host\" && cd \"$fake/$host\" || exit 255\n"
    "exec env -i HOME=\"$PWD\" PATH=\"$PWD/bin:$fake/common:/usr/bin:/bin\" $extra \\\n"
    "  SSH_CONNECTION='10.9.0.254 40000 10.9.0.1 22' sh -c \"$command\"\n";

static inline void fake_write(const char *name, const char *text)
{
    char path[256];
    FILE *f;

    snprintf(path, sizeof path, "%s/%s", fake, name);
    f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* The caller frees it. "" if there is no such file. */
static inline char *fake_read(const char *name)
{
    char path[256], *text = calloc(1, 1 << 20);
    FILE *f;

    snprintf(path, sizeof path, "%s/%s", fake, name);
    f = fopen(path, "r");
    if (f) {
        text[fread(text, 1, (1 << 20) - 1, f)] = 0;
        fclose(f);
    }
    return text;
}

/* Runs a command of the shell's in the folder. Returns its exit code. */
static inline int fake_sh(const char *command)
{
    char *text = NULL;
    int status;

    assert_true(asprintf(&text, "cd '%s' && %s", fake, command) > 0);
    status = system(text);
    free(text);
    return status;
}

#define MAX_HOSTS 8

/* A list of hosts with these names, which have blanks between them; good until the next call. */
static inline ds_hosts fake_hosts(const char *names)
{
    static ds_host host[MAX_HOSTS];
    static char list[256];
    ds_hosts hosts = {host, 0};
    char *rest;

    snprintf(list, sizeof list, "%s", names);
    for (char *name = strtok_r(list, " ", &rest); name; name = strtok_r(NULL, " ", &rest)) {
        assert_true(hosts.count < MAX_HOSTS);
        host[hosts.count++] = (ds_host){.name = name};
    }
    return hosts;
}

static inline int fake_open(void **state)
{
    static char path[8192];
    const char *old = getenv("PATH");

    (void)state;
    snprintf(fake, sizeof fake, "/tmp/dsrun-test-XXXXXX");
    assert_non_null(mkdtemp(fake));
    assert_int_equal(fake_sh("mkdir bin"), 0);
    fake_write("bin/ssh", fake_ssh);
    assert_int_equal(fake_sh("chmod +x bin/ssh"), 0);
    snprintf(path, sizeof path, "%s/bin:%s", fake, old);
    assert_int_equal(setenv("PATH", path, 1), 0);
    return 0;
}

static inline int fake_close(void **state)
{
    (void)state;
    return getenv("KEEP") ? 0 : fake_sh("rm -rf \"$PWD\"");
}

#endif
