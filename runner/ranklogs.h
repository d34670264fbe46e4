/* ranklogs.h - a file for each rank's output. */
#ifndef DS_RANKLOGS_H
#define DS_RANKLOGS_H

#include <stddef.h>

typedef struct ds_ranklogs ds_ranklogs;

/* Opens folder/rank_N.log, to be appended to, for each rank; the folder is made if it is not there.
 * patience: seconds that the file system may take for a call, here and later. DS_EIO and ds_fail()'s
 * other codes: it cannot be written, or does not answer. */
int ds_ranklogs_open(ds_ranklogs **out, const char *folder, int ranks, double patience);

/* What waits to be written is dropped. NULL is fine. */
void ds_ranklogs_close(ds_ranklogs *l);

/* Has a copy of the text written, and does not wait for it. Nothing where that rank's file has ended. */
void ds_ranklogs_add(ds_ranklogs *l, int rank, const char *text, size_t bytes);

/* What waits to be written, bytes. */
size_t ds_ranklogs_waiting(ds_ranklogs *l);

/* What the user should know, once: that a file has ended, or all of them, and why. 0: nothing. To be
 * called now and then: it is also what notices that the file system does not answer any more. */
int ds_ranklogs_news(ds_ranklogs *l, char *text, size_t bytes);

#endif
