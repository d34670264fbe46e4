/* remote.h - a command on many hosts at once, over ssh.
 *
 * The command runs under `sh -c` whatever the user's login shell is, so it is to be one line. Hosts
 * that are this machine run it without ssh, as mpirun does.
 */
#ifndef DS_REMOTE_H
#define DS_REMOTE_H

#include <stddef.h>
#include <stdio.h>

#define DS_REMOTE_OUTPUT ((size_t)1 << 20) /* bytes that are kept of what a command writes */
#define DS_REMOTE_ERRORS ((size_t)1 << 14)

typedef struct ds_ssh {
    const char
        *control; /* a path with %C in it, for a connection that stays some seconds for others
                          * to use it; NULL: none does */
    int port;     /* 0: as the user's configuration of ssh has it */
    int cancel;   /* a descriptor that can be read from when all is to be given up; 0: none */
} ds_ssh;

typedef struct ds_remote {
    /* in; the caller's, and unchanged */
    const char *host;   /* as ssh takes it */
    const char *input;  /* what the command reads, or NULL */
    size_t input_bytes; /* of the input */

    /* out; freed by ds_remote_free() */
    char *output, *errors; /* what it wrote, up to a limit, ended with a 0; "" if nothing */
    int code;              /* its exit code; 255: ssh's own failure; -1: no answer in time */
    double seconds;        /* how long it took */
} ds_remote;

/* 1: the name, with or without user@, is this machine's: localhost, the host's own name (with or
 * without a domain), or the address of one of its interfaces. Names are not looked up. */
int ds_remote_is_here(const char *host);

/* Runs the command on the n hosts, 64 at a time, each for so long at most; then it is killed. Never
 * asks for a password. `ssh` NULL: its defaults. 0 if all were tried, whatever came of it; otherwise
 * DS_ENOMEM, or DS_ECOMM after `cancel`: then code is -1 where the end was not reached. */
int ds_remote_run(ds_remote *each, int n, const ds_ssh *ssh, const char *command, double seconds);
void ds_remote_free(ds_remote *each, int n);

/* Why the command did not run, for a host whose code is not 0, in one line with what to do about it:
 * "ssh: Permission denied (publickey): set up a key …". Its last line of errors is quoted. */
void ds_remote_why(FILE *to, const ds_remote *r);

/* The last line of a text that is not blank, without its end: where it begins, and its length. */
const char *ds_remote_last_line(size_t *bytes, const char *text);

/* Writes a word of a shell's command line: in quotes, so that it arrives as it is. */
void ds_remote_quote(FILE *to, const char *word);

#endif
