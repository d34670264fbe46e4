/* preflight.h - whether a job can start on its hosts: checked before it does, on all at once. */
#ifndef DS_PREFLIGHT_H
#define DS_PREFLIGHT_H

#include "runner/hostfile.h"
#include "runner/program.h"
#include "runner/remote.h"

#define DS_PREFLIGHT_SECONDS 10.0 /* for each host */

/* What is known of a host afterwards; texts are "" where nothing is. */
typedef struct ds_preflight_host {
    int answered;   /* 1: a command ran there; 0: it can't be reached */
    int ready;      /* 1: ranks can start there */
    int cores;      /* of the whole host; 0: not known */
    int fabric;     /* 1: it has a network beside Ethernet, as InfiniBand */
    char name[256]; /* what it calls itself */
    char launcher
        [64]; /* this machine's address, as the host's sshd sees it (behind a jump host: that
                          one's); "" for this machine */
    char address[64]; /* the host's own, as ssh reached it; "" for this machine */
} ds_preflight_host;

/* Checks each host: ssh without a password, the working directory, Open MPI's daemon on PATH and of
 * this machine's version, and that `there` is on the host and starts, and is what `here` is: program,
 * library, script; for so many seconds each. out: [hosts->count]. here and there are the same unless something was pushed
 * (push.h); both may be NULL: then only what does not concern the program is checked.
 *
 * 0: all are ready. DS_ECOMM: some are not; *report has a line for each fault, with the host's name
 * first, and what to do; it is to be freed. Other codes: the check itself failed; *report is NULL. */
int ds_preflight(ds_preflight_host *out, char **report, const ds_hosts *hosts,
                 const ds_program *here, const ds_program *there, const ds_ssh *ssh,
                 double seconds);

#endif
