/* host.h - a Lua state with everything a script needs in it.
 *
 * A process may hold several (data workers have their own), each used by one thread at a time.
 */
#ifndef DS_HOST_H
#define DS_HOST_H

typedef struct ds_host ds_host;

/* What Lua is told through require("ds.host"). Strings must outlive the host. */
typedef struct ds_host_config {
    const char *program; /* how dsrun was called: arg[-1] */
    const char *script;  /* its path, "-": standard input; NULL: none (-e, repl) */
    char **arguments;    /* the script's own */
    int count;
    const char *device; /* NULL: not given */
    const char *seed;   /* decimal; NULL: not given */
} ds_host_config;

/* Where this program is, and the folder that holds its Lua library ds/. executable, root: [PATH_MAX].
 * DS_ENOENT: the library was not found. */
int ds_host_find(char *executable, char *root);

/* On success *out is the caller's to close. DS_ENOENT: the Lua library was not found. */
int ds_host_open(ds_host **out, const ds_host_config *config);
void ds_host_close(ds_host *host);

/* These run something and return the exit code it came to: 0; 1 after an error, which was printed
 * on stderr; what os.exit() was given, with *exited set to 1: nothing else should run. */

/* The script of the config, with its arguments. DS_ENOENT: it cannot be read. */
int ds_host_script(ds_host *host, int *exited);
/* Text from the command line. */
int ds_host_eval(ds_host *host, const char *text, int *exited);
/* require(module)[function](argument); argument NULL: none. */
int ds_host_call(ds_host *host, const char *module, const char *function, const char *argument,
                 int *exited);
/* What Lua wants done once the script has ended with `code`, which becomes 1 if that raises. */
int ds_host_end(ds_host *host, int code);

/* Has this state answer SIGUSR2 (process.h). One a process, from the thread that runs it. */
int ds_host_watch(ds_host *host);

#endif
