/* process.h - signals, what runs at the end, and where the script is, for the whole process.
 *
 * Lua's part (ds_signal_pending, ds_signal_claim, ds_breadcrumb) is declared in ds.h.
 */
#ifndef DS_PROCESS_H
#define DS_PROCESS_H

#include <stddef.h>

#include "runner/ds.h"

/* What must happen before the process ends, last one in first; `code` is the exit code that is
 * about to be returned, so that a communicator can tell a failure from an end. DS_ENOMEM: no room
 * left. */
int ds_at_end(void (*hook)(void *data, int code), void *data);
void ds_run_end_hooks(int code);

/* A stack for this thread's signal handlers. oneDNN's generated products use the stack pointer as an
 * address of data: a handler that ran below it would write into the heap. So every handler has
 * SA_ONSTACK; off_stack() adds it to one that somebody else installed. */
int ds_signal_stack(void);
void ds_signal_off_stack(int signal);

/* Told by main()'s handler that SIGINT, SIGTERM or SIGUSR1 came; 1: end at once. */
int ds_signal_arrived(int signal);

/* Has SIGUSR2 answered on stderr. `ask` makes the Lua state call ds_site_answer() soon, with the
 * place where the script is; it is called from the signal handler. */
int ds_site_watch(void (*ask)(void));

/* Where the script is, by the Lua state: when it was asked, or (note) by itself. */
void ds_site_answer(const char *where);
void ds_site_note(const char *where);

/* For a watchdog thread: has Lua look where it is, if it runs; a thorough one gives it half a second
 * to say so. Then describe: "at train.lua:3", "last seen at …"; doing: the breadcrumb. */
void ds_site_sample(int thorough);
void ds_site_describe(char *where, char *doing, size_t bytes);

/* The breadcrumb, for the main thread. */
const char *ds_site_doing(void);

/* The loop that Lua compiled last: inside of one that calls nothing, Lua cannot answer. */
void ds_site_loop(const char *where);

#endif
