/* hostfile.c - lists of hosts, and the file that they come from.
 *
 * Names go into the command lines of ssh and mpirun, so that only those pass that mean nothing to a
 * shell, are no options, and have no comma or colon, which separate hosts there.
 *
 * A line with a fault is told of and left out, and reading goes on, so that all are told of at once.
 */
#include "runner/hostfile.h"

#include <search.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "kernels/error.h"
#include "runner/faults.h"
#include "runner/file.h"
#include "runner/suggest.h"

#define MOST_BYTES (16 << 20) /* of a file; more is none of hosts */

/* ---- lists */

ds_hosts *ds_hosts_new(void)
{
    return calloc(1, sizeof(ds_hosts));
}

void ds_hosts_free(ds_hosts *hosts)
{
    if (!hosts)
        return;
    for (int i = 0; i < hosts->count; i++) {
        free(hosts->host[i].name);
        free(hosts->host[i].slot);
    }
    free(hosts->host);
    free(hosts);
}

int ds_hosts_add(ds_hosts *hosts, const char *name, int slots)
{
    size_t n = (size_t)hosts->count;
    ds_host *h, *more = hosts->host;

    if ((n & (n - 1)) == 0) /* its room is always a power of two */
        more = realloc(more, (n ? 2 * n : 1) * sizeof *more);
    if (!more)
        return ds_fail(DS_ENOMEM, "out of memory");
    hosts->host = more;
    h = &more[n];
    *h = (ds_host){strdup(name), malloc((size_t)slots * sizeof *h->slot), slots};
    if (!h->name || !h->slot) {
        free(h->name);
        free(h->slot);
        return ds_fail(DS_ENOMEM, "out of memory");
    }
    for (int i = 0; i < slots; i++)
        h->slot[i] = i;
    hosts->count++;
    return 0;
}

int ds_hosts_local(ds_hosts **out, int slots)
{
    ds_hosts *hosts;
    int rc;

    *out = NULL;
    if (slots < 1 || slots > DS_MAX_SLOTS)
        return ds_fail(DS_EINVAL, "a host has 1 to %d slots, not %d", DS_MAX_SLOTS, slots);
    hosts = ds_hosts_new();
    rc = hosts ? ds_hosts_add(hosts, "localhost", slots) : ds_fail(DS_ENOMEM, "out of memory");
    if (rc < 0)
        ds_hosts_free(hosts);
    else
        *out = hosts;
    return rc;
}

int ds_hosts_ranks(const ds_hosts *hosts)
{
    int ranks = 0;

    for (int i = 0; i < hosts->count; i++)
        ranks += hosts->host[i].slots;
    return ranks;
}

/* ---- reading a line */

typedef struct parser {
    ds_hosts *hosts;
    void *seen; /* tree of struct seen, by name without user */
    int slots;  /* of all hosts so far */
    const char *path;
    int line;
    const char *text; /* the line, without its comment */
    size_t bytes;
    size_t at; /* what is read of it */
    int rc;    /* DS_ENOMEM: no memory; 1: no use to go on */
    ds_faults faults;
} parser;

struct seen {
    const char *bare; /* within the host's name */
    int line;
};

enum { SLOTS, MAX_SLOTS, KEYS };

static const struct {
    const char *name;
    int most;
} keys[KEYS] = {{"slots", DS_MAX_SLOTS}, {"max_slots", DS_ALL_SLOTS}};

static void fault(parser *p, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void fault(parser *p, const char *format, ...)
{
    char why[512], shown[DS_QUOTE];
    va_list args;

    va_start(args, format);
    vsnprintf(why, sizeof why, format, args);
    va_end(args);
    ds_fault(&p->faults, "%s:%d: '%s': %s", p->path, p->line, ds_quote(shown, p->text, p->bytes),
             why);
}

static int is_blank(char c)
{
    return c == ' ' || c == '\t';
}

static void skip_blanks(parser *p)
{
    while (p->at < p->bytes && is_blank(p->text[p->at]))
        p->at++;
}

/* What stands next: up to a blank or, for the name of a key, a '='. */
static const char *word(size_t *bytes, parser *p, int key)
{
    size_t begin;

    skip_blanks(p);
    begin = p->at;
    while (p->at < p->bytes && !is_blank(p->text[p->at]) && !(key && p->text[p->at] == '='))
        p->at++;
    *bytes = p->at - begin;
    return p->text + begin;
}

static int unknown_key(parser *p, const char *key)
{
    ds_suggestion near = {.given = key};

    for (int i = 0; i < KEYS; i++)
        ds_suggest(&near, keys[i].name);
    if (near.best)
        fault(p, "unknown key %s (did you mean %s?)", key, near.best);
    else
        fault(p, "unknown key %s (there are slots and max_slots)", key);
    return -1;
}

/* One of keys[], -1 with a fault: none. */
static int find_key(parser *p, const char *text, size_t bytes)
{
    char key[DS_QUOTE];

    ds_quote(key, text, bytes);
    for (char *c = key; *c; c++)
        if (*c == '-')
            *c = '_';
    for (int i = 0; i < KEYS; i++)
        if (!strcmp(key, keys[i].name))
            return i;
    return unknown_key(p, key);
}

/* KEY=VALUE into value[KEYS], where 0 means not given. */
static void read_pair(parser *p, int *value)
{
    size_t key_bytes, bytes;
    const char *key = word(&key_bytes, p, 1), *text;
    char shown[DS_QUOTE];
    int id, n;

    skip_blanks(p);
    if (p->at == p->bytes || p->text[p->at] != '=') {
        fault(p, "'%s' is no KEY=VALUE, as slots=4", ds_quote(shown, key, key_bytes));
        return;
    }
    p->at++;
    text = word(&bytes, p, 0);
    id = find_key(p, key, key_bytes);
    if (id < 0)
        return;
    n = ds_host_number(text, bytes, keys[id].most);
    if (value[id])
        fault(p, "%s is given twice", keys[id].name);
    else if (n < 1 || n > keys[id].most)
        fault(p, "%s wants a whole number from 1 to %d, not '%s'%s", keys[id].name, keys[id].most,
              ds_quote(shown, text, bytes),
              n == 0 ? " (a host without ranks is left out, or has a # in front)" : "");
    else
        value[id] = n;
}

/* ---- reading all lines */

static int by_name(const void *a, const void *b)
{
    return strcasecmp(((const struct seen *)a)->bare, ((const struct seen *)b)->bare);
}

/* The line that named the host before; 0: none did; DS_ENOMEM. Names differ by more than case and
 * user: the same machine twice would be two hosts for MPI, and share its devices. */
static int seen_before(parser *p, const char *bare)
{
    size_t bytes = strlen(bare) + 1;
    struct seen *new = malloc(sizeof *new + bytes), **node;

    if (!new)
        return DS_ENOMEM;
    *new = (struct seen){memcpy(new + 1, bare, bytes), p->line};
    node = tsearch(new, &p->seen, by_name);
    if (node && *node == new)
        return 0;
    free(new);
    return node ? (*node)->line : DS_ENOMEM;
}

static void add_host(parser *p, const char *name, int slots)
{
    p->slots += slots;
    if (p->slots > DS_ALL_SLOTS) {
        fault(p, "there are more than %d slots in all", DS_ALL_SLOTS);
        p->rc = 1;
    } else {
        p->rc = ds_hosts_add(p->hosts, name, slots);
    }
}

static void read_line(parser *p)
{
    char name[DS_HOST_NAME_BYTES], reason[DS_HOST_REASON_BYTES];
    int value[KEYS] = {0}, faults = p->faults.count, before;
    size_t bytes;
    const char *text = word(&bytes, p, 0);

    if (bytes == 0)
        return;
    skip_blanks(p);
    if (memchr(text, '=', bytes) || (p->at < p->bytes && p->text[p->at] == '=')) {
        fault(p, "there is no host's name in front, as in 'worker-1 slots=4'");
        return;
    }
    if (ds_host_name(name, reason, text, bytes) < 0) {
        fault(p, "%s", reason);
    } else {
        before = seen_before(p, ds_host_bare(name));
        if (before > 0)
            fault(p, "duplicate host: line %d has it already, and its slots go on one line",
                  before);
        else
            p->rc = before;
    }
    while (skip_blanks(p), p->at < p->bytes)
        read_pair(p, value);
    if (value[MAX_SLOTS] && value[MAX_SLOTS] < value[SLOTS])
        fault(p, "max_slots=%d is less than slots=%d", value[MAX_SLOTS], value[SLOTS]);
    if (p->faults.count > faults || p->rc)
        return;
    if (value[SLOTS])
        add_host(p, name, value[SLOTS]);
    else
        fault(p, "slots is missing: add slots=N for N ranks on it");
}

/* One line, without its end: takes the comment and blanks off. */
static void take_line(parser *p, const char *text, size_t bytes)
{
    const char *comment = memchr(text, '#', bytes);

    p->line++;
    p->text = text;
    p->at = 0;
    if (memchr(text, 0, bytes)) {
        p->bytes = bytes;
        fault(p, "NUL byte: a hostfile is plain text");
        return;
    }
    if (comment)
        bytes = (size_t)(comment - text);
    else if (bytes && text[bytes - 1] == '\r')
        bytes--;
    while (bytes && is_blank(text[bytes - 1]))
        bytes--;
    p->bytes = bytes;
    skip_blanks(p);
    p->text += p->at;
    p->bytes -= p->at;
    p->at = 0;
    read_line(p);
}

static void take_lines(parser *p, const char *text, size_t bytes)
{
    const char *end = text + bytes;

    if (bytes >= 3 && !memcmp(text, "\xef\xbb\xbf", 3)) /* what some editors put before UTF-8 */
        text += 3;
    while (text < end && p->rc == 0) {
        const char *newline = memchr(text, '\n', (size_t)(end - text));
        size_t length = (size_t)((newline ? newline : end) - text);

        take_line(p, text, length);
        text += length + 1;
    }
}

int ds_hosts_parse(ds_hosts **out, const char *text, size_t bytes, const char *path)
{
    parser p = {.hosts = ds_hosts_new(), .path = path};
    int rc;

    *out = NULL;
    p.rc = p.hosts ? 0 : DS_ENOMEM;
    if (p.hosts)
        take_lines(&p, text, bytes);
    tdestroy(p.seen, free);
    if (p.hosts && !p.hosts->count && !p.faults.count)
        ds_fault(&p.faults, "%s: no hosts in it: they are lines as 'worker-1 slots=4'", path);
    rc = p.rc < 0 ? ds_fail(p.rc, "out of memory: reading %s", path)
                  : ds_faults_fail(&p.faults, DS_ECORRUPT, NULL);
    if (rc < 0)
        ds_hosts_free(p.hosts);
    else
        *out = p.hosts;
    return rc;
}

int ds_hosts_read(ds_hosts **out, const char *path)
{
    char *text;
    int64_t bytes;
    int rc = ds_read_whole(&text, &bytes, path, MOST_BYTES);

    *out = NULL;
    if (rc == DS_ENOENT)
        return ds_fail(rc, "there is no hostfile %s: it has lines as 'worker-1 slots=4'", path);
    if (rc < 0)
        return rc;
    rc = ds_hosts_parse(out, text, (size_t)bytes, path);
    free(text);
    return rc;
}
