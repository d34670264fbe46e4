/* lines.h - the output of ranks, line by line.
 *
 * What ranks write arrives in pieces; it leaves in whole lines, with a rank's tag if that is asked
 * for, and in a file for each rank as well. A line that has no end yet waits for it, up to 64 KiB.
 */
#ifndef DS_LINES_H
#define DS_LINES_H

#include <stddef.h>

enum ds_stream { DS_STDOUT, DS_STDERR, DS_STREAMS };

typedef struct ds_lines ds_lines;

/* folder: where rank_N.log are appended to, until one cannot be written, which is said; NULL: nowhere. tags 1: lines
 * begin with "[rank] ". To be closed also where this fails. */
int ds_lines_open(ds_lines **out, int ranks, int tags, const char *folder);
void ds_lines_close(ds_lines *l);

/* bytes 0: the rank has closed this stream. */
void ds_lines_add(ds_lines *l, int rank, enum ds_stream stream, const char *text, size_t bytes);

/* Lines of the launcher's own on stderr; rank: whose file has them too, -1: nobody's. */
void ds_lines_say(ds_lines *l, int rank, const char *text);

/* What waits to be written to a stream, bytes; write as much as goes without waiting. */
size_t ds_lines_waiting(const ds_lines *l, enum ds_stream stream);
void ds_lines_write(ds_lines *l, enum ds_stream stream);

/* What waits to be written to the files, bytes: that goes on by itself. */
size_t ds_lines_unlogged(const ds_lines *l);

#endif
