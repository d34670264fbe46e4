/* lines.c - the output of ranks, line by line. */
#include "runner/lines.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/ranklogs.h"

#define LONGEST 65536
#define LOG_SECONDS 10 /* for a call to the file system with the logs */

typedef struct text {
    char *data;
    size_t used, room;
} text;

/* One stream of one rank. */
typedef struct source {
    text line; /* not ended yet */
    int cut;   /* the line began in a piece that was too long to wait for its end */
} source;

struct ds_lines {
    int ranks, tags;
    source *sources;   /* [ranks][DS_STREAMS] */
    ds_ranklogs *logs; /* NULL: none */
    text out[DS_STREAMS];
    int open[DS_STREAMS]; /* the last thing written had no end of line: whose; -1: it had one */
};

static int append(text *t, const char *data, size_t bytes)
{
    if (t->used + bytes > t->room) {
        size_t room = (t->used + bytes) * 2;
        char *grown = realloc(t->data, room);

        if (!grown)
            return -1; /* then this text is lost: there is nobody to tell */
        t->data = grown;
        t->room = room;
    }
    memcpy(t->data + t->used, data, bytes);
    t->used += bytes;
    return 0;
}

static void drop(text *t, size_t bytes)
{
    t->used -= bytes;
    if (t->used) /* and so there is data */
        memmove(t->data, t->data + bytes, t->used);
}

int ds_lines_open(ds_lines **out, int ranks, int tags, const char *folder)
{
    ds_lines *l = calloc(1, sizeof *l);

    *out = l;
    if (!l)
        return ds_fail(DS_ENOMEM, "out of memory");
    l->ranks = ranks;
    l->tags = tags;
    l->sources = calloc((size_t)ranks * DS_STREAMS, sizeof *l->sources);
    l->open[DS_STDOUT] = l->open[DS_STDERR] = -1;
    if (!l->sources)
        return ds_fail(DS_ENOMEM, "out of memory");
    return folder ? ds_ranklogs_open(&l->logs, folder, ranks, LOG_SECONDS) : 0;
}

void ds_lines_close(ds_lines *l)
{
    if (!l)
        return;
    for (int i = 0; l->sources && i < l->ranks * DS_STREAMS; i++)
        free(l->sources[i].line.data);
    ds_ranklogs_close(l->logs);
    free(l->sources);
    free(l->out[DS_STDOUT].data);
    free(l->out[DS_STDERR].data);
    free(l);
}

/* One piece, a whole line or as much as there will be for now, of rank `owner` (-1: the launcher). */
static void put(ds_lines *l, enum ds_stream stream, int owner, int continues, const char *piece,
                size_t bytes)
{
    text *out = &l->out[stream];
    char tag[24];

    if (l->open[stream] >= 0 && (l->open[stream] != owner || !continues))
        append(out, "\n", 1);
    if (l->tags && owner >= 0 && !(continues && l->open[stream] == owner))
        append(out, tag, (size_t)snprintf(tag, sizeof tag, "[%d] ", owner));
    append(out, piece, bytes);
    l->open[stream] = bytes && piece[bytes - 1] == '\n' ? -1 : owner;
}

static void flush_line(ds_lines *l, int rank, enum ds_stream stream, size_t bytes)
{
    source *s = &l->sources[rank * DS_STREAMS + stream];

    put(l, stream, rank, s->cut, s->line.data, bytes);
    s->cut = s->line.data[bytes - 1] != '\n';
    drop(&s->line, bytes);
}

static void log_it(ds_lines *l, int rank, const char *data, size_t bytes)
{
    if (l->logs)
        ds_ranklogs_add(l->logs, rank, data, bytes);
}

/* A full disk must not end a training run: the file ends there, and that is said once. */
static void say_news(ds_lines *l)
{
    char text[PATH_MAX + 160];

    while (l->logs && ds_ranklogs_news(l->logs, text, sizeof text))
        ds_lines_say(l, -1, text);
}

void ds_lines_add(ds_lines *l, int rank, enum ds_stream stream, const char *data, size_t bytes)
{
    source *s = &l->sources[rank * DS_STREAMS + stream];
    const char *end;

    if (bytes == 0) {
        if (s->line.used)
            flush_line(l, rank, stream, s->line.used);
        s->cut = 0;
        return;
    }
    log_it(l, rank, data, bytes);
    if (append(&s->line, data, bytes) < 0)
        return;
    for (;;) { /* line by line where each gets a tag */
        end = l->tags ? memchr(s->line.data, '\n', s->line.used)
                      : memrchr(s->line.data, '\n', s->line.used);
        if (!end)
            break;
        flush_line(l, rank, stream, (size_t)(end - s->line.data) + 1);
    }
    if (s->line.used > LONGEST)
        flush_line(l, rank, stream, s->line.used);
}

void ds_lines_say(ds_lines *l, int rank, const char *said)
{
    size_t bytes = strlen(said);

    if (!bytes)
        return;
    put(l, DS_STDERR, -1, 0, said, bytes);
    if (said[bytes - 1] != '\n')
        append(&l->out[DS_STDERR], "\n", 1);
    l->open[DS_STDERR] = -1;
    if (rank >= 0) {
        log_it(l, rank, said, bytes);
        log_it(l, rank, "\n", 1);
    }
}

size_t ds_lines_unlogged(const ds_lines *l)
{
    return l->logs ? ds_ranklogs_waiting(l->logs) : 0;
}

size_t ds_lines_waiting(const ds_lines *l, enum ds_stream stream)
{
    return l->out[stream].used;
}

/* A pipe that poll() calls writable takes PIPE_BUF bytes without blocking. */
void ds_lines_write(ds_lines *l, enum ds_stream stream)
{
    struct pollfd fd = {stream == DS_STDOUT ? STDOUT_FILENO : STDERR_FILENO, POLLOUT, 0};
    text *out = &l->out[stream];
    size_t written = 0;

    say_news(l);
    while (written < out->used && poll(&fd, 1, 0) == 1) {
        size_t left = out->used - written;
        ssize_t n = write(fd.fd, out->data + written, left < PIPE_BUF ? left : PIPE_BUF);

        if (n < 0 && (errno == EINTR || errno == EAGAIN))
            break;
        if (n < 0) { /* closed, or a full disk: what can't be written is not kept */
            written = out->used;
            break;
        }
        written += (size_t)n;
    }
    drop(out, written);
}
