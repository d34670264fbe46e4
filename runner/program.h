/* program.h - what ranks run, and whether it is the same on another host. */
#ifndef DS_PROGRAM_H
#define DS_PROGRAM_H

#include <stdio.h>

#include "runner/tree.h"

/* By paths that hold on every host. */
typedef struct ds_program {
    char *file;      /* dsrun itself */
    char *library;   /* for DSRUN_LUA; NULL: it finds its Lua library by itself */
    char *libraries; /* shared libraries, for LD_LIBRARY_PATH; NULL: none but the host's own */
    char *script;    /* absolute, or from `folder` on; NULL: none */
    char *folder;    /* where it runs: the working directory */
} ds_program;

/* What this process is, with this script (NULL or "-": none). *out is to be freed with
 * ds_program_free(), also after an error. */
int ds_program_here(ds_program *out, const char *script);
void ds_program_free(ds_program *p);

/* By which copies on two hosts are compared; texts. "" where there is none. */
typedef struct ds_fingerprint {
    char build[160]; /* for people: "0.1.0 (1a2b3c4)" */
    char binary[DS_TREE_HASH], library[DS_TREE_HASH], script[DS_TREE_HASH]; /* hashes */
} ds_fingerprint;

/* Of this process and this script (NULL: none). A script that is not there has the hash "". */
int ds_program_fingerprint(ds_fingerprint *out, const char *script);

/* What `dsrun --check-host SCRIPT` prints, for the launcher on another host: the fingerprint, as
 * lines "key value". */
int ds_program_print(FILE *to, const char *script);

#endif
