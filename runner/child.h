/* child.h - processes that the launcher starts: commands, and one that cleans up. */
#ifndef DS_CHILD_H
#define DS_CHILD_H

#include <sys/types.h>

/* Starts a command in a process group of its own that does not outlive this process. streams: [3]
 * what it has as stdin, stdout and stderr, above 2 (or 0 for stdin); -1: nothing. It ends with 127
 * where there is no such command. The caller waits for it. */
int ds_child_spawn(pid_t *pid, char *const *argv, const int *streams);

/* The same. *output: what it writes to stdout and stderr. input 1: it has this process's stdin; 0:
 * an empty one. */
int ds_child_start(pid_t *pid, int *output, char *const *argv, int input);

/* The first line that a command prints, within a few seconds; "" if it prints none. */
int ds_child_ask(char *line, size_t bytes, char *const *argv);

/* Where main() has its command line: the cleaner writes another over it, so that who kills what has
 * "dsrun" or "orted" in it does not kill the cleaner. */
void ds_child_command_line(int argc, char **argv);

/* Ends the processes of a job on this machine: those that were started with DSRUN_FOLDER=folder in
 * their environment. */
void ds_child_end_job(const char *folder);

/* A process that outlives this one to remove `folder` and, if it is not NULL, `file`, and to end every
 * process of the job: those with DSRUN_FOLDER=folder in their environment, and connections that ssh
 * keeps open there (ds_ssh.control). It does so when *pipe is closed, which the kernel does
 * when this process is killed. A DS_IN_ORDER written before says that only connections are to be
 * ended. On another host than the launcher's, `hub` says where the launcher is (ds_watch()): then it
 * does so as well when that one has ended or is cut off; NULL: it is on this host. */
#define DS_IN_ORDER "."
int ds_child_cleaner(pid_t *pid, int *pipe, const char *folder, const char *file, const char *hub);

#endif
