/* hosts.h - lists of hosts as text, "worker-1:0,1 worker-2:0", and what names are told. */
#ifndef DS_TEST_HOSTS_H
#define DS_TEST_HOSTS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/hostfile.h"

#define PORT                                                                                       \
    "has a colon: a port goes to --ssh_port, or into ssh's config; an IPv6 address in brackets"
#define LETTERS "is no host's name: it has letters, digits, '-', '_' and '.' between them"

/* With its length, as it may have NUL bytes. */
#define TEXT(text) text, sizeof(text) - 1

static char shown[1 << 16];

static inline const char *show(const ds_hosts *hosts)
{
    size_t used = 0;

    shown[0] = 0;
    for (int i = 0; i < hosts->count; i++) {
        used += (size_t)sprintf(shown + used, "%s%s:", i ? " " : "", hosts->host[i].name);
        for (int s = 0; s < hosts->host[i].slots; s++)
            used += (size_t)sprintf(shown + used, "%s%d", s ? "," : "", hosts->host[i].slot[s]);
    }
    return shown;
}

static inline void expect(const char *got, const char *want, const char *of)
{
    if (strcmp(got, want) != 0)
        fail_msg("%s\n--- gave\n%s\n--- not\n%s", of, got, want);
}

#endif
