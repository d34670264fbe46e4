/* side.h - a rank's end of the side channel (hub.h has the middle, and the messages).
 *
 * A watchdog thread keeps the connection: it works while the main thread computes, or sits in a
 * collective that never ends.
 */
#ifndef DS_SIDE_H
#define DS_SIDE_H

#include "runner/rank.h"

#define DS_TOKEN_BYTES 33

/* A random name for a job, that nobody guesses. out: [DS_TOKEN_BYTES]. */
void ds_side_token(char *out);

/* Called by the watchdog to end the process at once. */
typedef void ds_side_kill(int code);

/* Joins the hub of the dsrun that launched this rank, and sends this process's output there. Does
 * nothing for a process that no dsrun launched. DS_ECOMM: there is no such hub. */
int ds_side_join(const ds_rank *rank, ds_side_kill *die);

/* For a job that another launcher started, once its ranks can talk: rank 0 gets the hub, in a
 * thread, and all join it. Nothing for other processes. Every rank calls it. */
int ds_side_meet(const ds_rank *rank, ds_side_kill *die);

/* The error that ends this process: printed by the hub, for the first rank that has one, or here. */
void ds_side_failed(const char *message);

/* The process is about to end with this code. Returns the one to give to whoever started it: 0
 * where a dsrun now knows the right one, as mpirun would kill the others when it saw it. */
int ds_side_end(int code);

#endif
