/* host.h - a Lua state with everything a script needs in it.
 *
 * A process may hold several (data workers have their own), each used by one thread at a time.
 */
#ifndef DS_HOST_H
#define DS_HOST_H

typedef struct ds_host ds_host;

/* What Lua is told through require("ds.host"). Strings must outlive the host. */
typedef struct ds_host_config {
    const char *program; /* how dsrun was called: arg[-1] and below */
    const char *script;  /* its path; NULL: none (-e, repl) */
    char **arguments;    /* the script's own */
    int count;
    const char *device;  /* NULL: not given */
    const char *seed;    /* decimal; NULL: not given */
} ds_host_config;

/* On success *out is the caller's to close. DS_ENOENT: the Lua library was not found. */
int ds_host_open(ds_host **out, const ds_host_config *config);
void ds_host_close(ds_host *host);

enum ds_source { DS_SOURCE_FILE, DS_SOURCE_STDIN, DS_SOURCE_TEXT, DS_SOURCE_MODULE };

/* Runs a script file, standard input, a piece of text, or calls the library module `text` with
 * `argument` (NULL: none). Returns the exit code that Lua came to: 0; 1 after an error, which was
 * printed on stderr; what os.exit() was given. *exited: 1 if os.exit() ended it, so that nothing else
 * should run. DS_ENOENT: there is no such script. */
int ds_host_run(ds_host *host, enum ds_source source, const char *text, const char *argument,
                int *exited);

/* Has ds_where() in process.h answer from this state. One host a process can. */
void ds_host_watch(ds_host *host);

#endif
