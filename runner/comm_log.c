/* comm_log.c - how long collectives take: one entry a kind, size and group size, with every call's
 * time.
 *
 * Off it costs one test a collective. All times are kept, 4 bytes a call, as a trimmed mean and the
 * comparison of ranks call by call want them all. The main thread's alone, as collectives are.
 */
#include "runner/comm.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/log.h"
#include "runner/process.h"

enum { CALLER_BYTES = 32 };

/* `factor`: how often the bytes count, as they are reduced and then spread; `spread`: a rank keeps
 * its own share, so that (ranks - 1) / ranks of them travel; `share`: the message is one rank's share
 * of the bytes. Without a name: not logged. */
static const struct {
    const char *name;
    int factor, spread, share;
} kinds[DS_COLLECTIVES] = {
    [DS_ALL_REDUCE] = {"all_reduce", 2, 1, 0},
    [DS_REDUCE_SCATTER] = {"reduce_scatter", 1, 1, 0},
    [DS_REDUCE_PARTS] = {"reduce_scatter", 1, 1, 0},
    [DS_ALL_GATHER] = {"all_gather", 1, 1, 1},
    [DS_GATHER_PARTS] = {"all_gather", 1, 1, 1},
    [DS_ALL_TO_ALL] = {"all_to_all", 1, 1, 0},
    [DS_BROADCAST] = {"broadcast", 1, 0, 0},
    [DS_SEND] = {"send", 1, 0, 0},
    [DS_RECV] = {"recv", 1, 0, 0},
    [DS_BARRIER] = {"barrier", 1, 0, 0},
};

typedef struct entry {
    ds_comm_entry seen; /* what Lua reads */
    int kind;           /* the first of those with its name */
    float *ms;
    int64_t room;
    char caller[CALLER_BYTES];
} entry;

static struct {
    int on[DS_COLLECTIVES], any;
    int verbose, callers;
    entry *entries;
    int count, room;
} logged;

/* ---- settings */

/* The next word of a list with blanks between; NULL at its end. */
static const char *next_word(const char **list, size_t *length)
{
    const char *word = *list + strspn(*list, " ");

    *length = strcspn(word, " ");
    *list = word + *length;
    return *length ? word : NULL;
}

int ds_comm_log(const char *ops, int verbose, int callers)
{
    int on[DS_COLLECTIVES] = {0}, any = 0;
    const char *word;
    size_t length;

    while (ops && (word = next_word(&ops, &length))) {
        int all = length == 3 && !strncmp(word, "all", 3), known = all;

        for (int kind = 0; kind < DS_COLLECTIVES; kind++) {
            const char *name = kinds[kind].name;

            if (!name || !(all || (strlen(name) == length && !strncmp(name, word, length))))
                continue;
            on[kind] = any = known = 1;
        }
        if (!known)
            return ds_fail(DS_EINVAL,
                           "there is no collective '%.*s' to log; there are all_reduce, "
                           "reduce_scatter, all_gather, all_to_all, broadcast, send, recv, barrier",
                           (int)length, word);
    }
    memcpy(logged.on, on, sizeof on);
    logged.any = any;
    logged.verbose = verbose;
    logged.callers = callers;
    return 0;
}

/* ---- entries */

/* "engine:step() number 7" -> "engine:step()", so that steps are one entry. */
static void caller_now(char *out)
{
    const char *doing = logged.callers ? ds_site_doing() : "", *end = strstr(doing, "()");
    size_t length = end ? (size_t)(end - doing) + 2 : strlen(doing);

    if (length >= CALLER_BYTES)
        length = CALLER_BYTES - 1;
    memset(out, 0, CALLER_BYTES);
    memcpy(out, doing, length);
    if (logged.callers && length == 0)
        memcpy(out, "script", sizeof "script");
}

/* Bytes of what all ranks' shares come to, in the type in which they travel. */
static int64_t bytes_of(const ds_call *call)
{
    int64_t in = call->in ? call->in->numel : 0, out = call->out ? call->out->numel : 0;
    const ds_tensor *t = call->in ? call->in : call->out;
    int reduces = call->kind == DS_ALL_REDUCE || call->kind == DS_REDUCE_SCATTER ||
                  call->kind == DS_REDUCE_PARTS;

    if (!t)
        return 0;
    return (in > out ? in : out) * ds_dtype_size(reduces ? call->wire : t->dtype);
}

static int grow(void)
{
    int room = logged.room ? 2 * logged.room : 32;
    entry *more = realloc(logged.entries, (size_t)room * sizeof *more);

    if (!more)
        return -1;
    logged.entries = more;
    logged.room = room;
    return 0;
}

/* A measurement does not end what it measures. */
static int give_up(void)
{
    logged.any = 0;
    ds_logf(DS_LOG_WARNING, "comms_logger: out of memory; from here on nothing is logged");
    return 0;
}

int ds_comm_log_begin(const ds_comm *c, const ds_call *call)
{
    const char *name = kinds[call->kind].name;
    char caller[CALLER_BYTES];
    int64_t bytes;
    entry *e;

    if (!logged.any || !logged.on[call->kind])
        return 0;
    bytes = bytes_of(call);
    caller_now(caller);
    for (int i = 0; i < logged.count; i++) {
        e = &logged.entries[i];
        if (e->seen.bytes == bytes && e->seen.ranks == c->size && !strcmp(e->seen.name, name) &&
            !strcmp(e->caller, caller))
            return i + 1;
    }
    if (logged.count == logged.room && grow() < 0)
        return give_up();
    e = &logged.entries[logged.count++];
    *e = (entry){.kind = call->kind};
    memcpy(e->caller, caller, sizeof caller);
    e->seen = (ds_comm_entry){.name = name, .ranks = c->size, .bytes = bytes};
    e->seen.message = (double)bytes / (kinds[call->kind].share ? c->size : 1);
    return logged.count;
}

static void bandwidth(double *tput, double *busbw, const entry *e, double ms)
{
    double n = e->seen.ranks, gbps = ms > 0 ? (double)e->seen.bytes * 8 / ms * 1e-6 : 0;

    *tput = gbps * kinds[e->kind].factor;
    *busbw = kinds[e->kind].spread ? *tput * (n - 1) / n : *tput;
}

void ds_comm_log_end(int number, double seconds)
{
    entry *e = &logged.entries[number - 1];
    double ms = seconds * 1e3, tput, busbw;

    if (e->seen.count == e->room) {
        int64_t room = e->room ? 2 * e->room : 64;
        float *more = realloc(e->ms, (size_t)room * sizeof *more);

        if (!more) {
            give_up();
            return;
        }
        e->ms = more;
        e->room = room;
    }
    e->ms[e->seen.count++] = (float)ms;
    if (!logged.verbose)
        return;
    bandwidth(&tput, &busbw, e, ms);
    ds_logf(DS_LOG_INFO,
            "comm op: %s%s%s%s | time (ms): %.3f | msg size: %.15g B | algbw (Gbps): %.2f | "
            "busbw (Gbps): %.2f",
            e->seen.name, *e->caller ? " | [Caller Func: " : "", e->caller, *e->caller ? "]" : "",
            ms, e->seen.message, tput, busbw);
}

int ds_comm_logged(ds_comm_entry *out, int i)
{
    if (i >= 0 && i < logged.count) {
        *out = logged.entries[i].seen;
        out->caller = logged.entries[i].caller;
        out->ms = logged.entries[i].ms;
    }
    return logged.count;
}

int ds_comm_bandwidth(double *tput, double *busbw, int i, double ms)
{
    if (i < 0 || i >= logged.count)
        return ds_fail(DS_ERANGE, "entry %d of a log of %d collectives", i, logged.count);
    bandwidth(tput, busbw, &logged.entries[i], ms);
    return 0;
}
