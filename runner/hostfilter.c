/* hostfilter.c - --include, --exclude, --num_nodes and --num_gpus: which hosts and slots are used.
 *
 * DeepSpeed's grammar has '@' between hosts, and users' names have it, too: so 'alice@worker-1' is one
 * host where the list has one of that name, else two.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "kernels/error.h"
#include "runner/faults.h"
#include "runner/hostfile.h"
#include "runner/suggest.h"

#define MOST_ID 999999999 /* of a slot that is asked for */
#define LIST_BYTES 1200   /* what there is, in a message */
#define SLOTS_BYTES 200   /* the slots of one host, there */

/* What the filter says of a host. */
typedef struct choice {
    int named;
    unsigned char *slot; /* [slots] 1: this one; NULL: it was named without slots */
} choice;

typedef struct filter {
    const ds_hosts *hosts;
    choice *choice;     /* [hosts->count] */
    const char *option; /* "include" */
    int rc;             /* DS_ENOMEM */
    ds_faults faults;
} filter;

/* ---- what there is, in words */

/* As "0-3,7". */
static void slots_text(char *out, const ds_host *h)
{
    size_t used = 0;

    for (int i = 0, last; i < h->slots; i = last + 1) {
        for (last = i; last + 1 < h->slots && h->slot[last + 1] == h->slot[last] + 1;)
            last++;
        if (used > SLOTS_BYTES - 32) {
            strcpy(out + used, ",…");
            return;
        }
        used += (size_t)snprintf(out + used, SLOTS_BYTES - used, "%s%d", i ? "," : "", h->slot[i]);
        if (last > i)
            used += (size_t)snprintf(out + used, SLOTS_BYTES - used, "-%d", h->slot[last]);
    }
}

/* As "worker-1 slots 0-3; worker-2 slot 1; and 40 more"; out: LIST_BYTES. */
static const char *list(char *out, const ds_hosts *hosts)
{
    char name[DS_HOST_NAME_BYTES + 2], slots[SLOTS_BYTES];
    size_t used = 0;

    for (int i = 0; i < hosts->count; i++) {
        const ds_host *h = &hosts->host[i];

        if (used > LIST_BYTES - DS_HOST_NAME_BYTES - SLOTS_BYTES - 48) {
            snprintf(out + used, LIST_BYTES - used, "; and %d more", hosts->count - i);
            break;
        }
        slots_text(slots, h);
        used += (size_t)snprintf(out + used, LIST_BYTES - used, "%s%s slot%s %s", i ? "; " : "",
                                 ds_host_shown(name, h->name), h->slots > 1 ? "s" : "", slots);
    }
    return out;
}

/* Whether names differ in their numbers only, as worker-1 and worker-2 do, which is no slip of the
 * finger; worker-01 and worker-1 have the same number. */
static int another_number(const char *a, const char *b)
{
    const char *digits = "0123456789";
    int differ = 0;

    while (*a && *b) {
        size_t n = strspn(a, digits), m = strspn(b, digits);

        if (!n != !m || (!n && *a != *b))
            return 0;
        if (!n) {
            a++, b++;
            continue;
        }
        while (n > 1 && *a == '0')
            a++, n--;
        while (m > 1 && *b == '0')
            b++, m--;
        differ |= n != m || strncmp(a, b, n);
        a += n;
        b += m;
    }
    return !*a && !*b && differ;
}

static void unknown_host(filter *f, const char *text, size_t bytes)
{
    char shown[DS_QUOTE], given[DS_QUOTE], name[DS_HOST_NAME_BYTES + 2], *out = given;
    ds_suggestion near = {.given = given};

    ds_quote(shown, text, bytes);
    for (const char *c = shown; *c; c++) /* as ds_host has names */
        if (*c != '[' && *c != ']')
            *out++ = *c;
    *out = 0;
    for (int i = 0; i < f->hosts->count && !ds_faults_full(&f->faults); i++) {
        const char *candidate = f->hosts->host[i].name;

        if (!strchr(given, '@'))
            candidate = ds_host_bare(candidate);
        if (!another_number(given, candidate))
            ds_suggest(&near, candidate);
    }
    if (bytes == 0)
        ds_fault(&f->faults,
                 "--%s: a host's name is missing before or behind a '@' or before a ':'",
                 f->option);
    else if (near.best)
        ds_fault(&f->faults, "--%s: there is no host '%s' (did you mean %s?)", f->option, shown,
                 ds_host_shown(name, near.best));
    else
        ds_fault(&f->faults, "--%s: there is no host '%s'", f->option, shown);
}

/* ---- reading the filter */

static void trim(const char **text, size_t *bytes)
{
    while (*bytes && (**text == ' ' || **text == '\t'))
        ++*text, --*bytes;
    while (*bytes && ((*text)[*bytes - 1] == ' ' || (*text)[*bytes - 1] == '\t'))
        --*bytes;
}

/* The host of that name, with its user or (whole 0) without; -1: there is none. */
static int find(const ds_hosts *hosts, const char *text, size_t bytes, int whole)
{
    char name[DS_HOST_NAME_BYTES], reason[DS_HOST_REASON_BYTES];

    trim(&text, &bytes);
    if (ds_host_name(name, reason, text, bytes) < 0)
        return -1;
    for (int i = 0; i < hosts->count; i++)
        if (!strcmp(name, hosts->host[i].name))
            return i;
    for (int i = 0; i < hosts->count && !whole; i++)
        if (!strcmp(name, ds_host_bare(hosts->host[i].name)))
            return i;
    return -1;
}

static int by_value(const void *a, const void *b)
{
    int x = *(const int *)a, y = *(const int *)b;

    return (x > y) - (x < y);
}

/* Marks slots first to last of a host. */
static void mark(filter *f, int host, int first, int last)
{
    const ds_host *h = &f->hosts->host[host];
    const int *begin = bsearch(&first, h->slot, (size_t)h->slots, sizeof first, by_value);
    int at = begin ? (int)(begin - h->slot) : 0, n = last - first, missing = first;
    char name[DS_HOST_NAME_BYTES + 2], slots[SLOTS_BYTES];
    choice *c = &f->choice[host];

    /* they ascend, so n further on is the last one or a slot in between is missing */
    if (begin && n < h->slots - at && h->slot[at + n] == last) {
        if (c->slot)
            memset(c->slot + at, 1, (size_t)n + 1);
        return;
    }
    while (begin && at < h->slots && h->slot[at] == missing)
        at++, missing++;
    slots_text(slots, h);
    ds_fault(&f->faults, "--%s: host %s has no slot %d (it has %s)", f->option,
             ds_host_shown(name, h->name), missing, slots);
}

/* One number or range. */
static void read_slot(filter *f, int host, const char *text, size_t bytes)
{
    const char *whole = text, *dash = memchr(text, '-', bytes), *second = dash ? dash + 1 : text;
    size_t whole_bytes = bytes, n = dash ? (size_t)(dash - text) : bytes;
    size_t m = dash ? bytes - n - 1 : bytes;
    char shown[DS_QUOTE];
    int first, last;

    trim(&whole, &whole_bytes);
    trim(&text, &n);
    trim(&second, &m);
    first = ds_host_number(text, n, MOST_ID);
    last = ds_host_number(second, m, MOST_ID);
    ds_quote(shown, whole, whole_bytes);
    if (first < 0 || last < 0)
        ds_fault(&f->faults, "--%s: '%s' is no slot: they are numbers and ranges, as 0,2-5%s",
                 f->option, shown,
                 memchr(whole, ':', whole_bytes) ? "; an IPv6 address goes in brackets" : "");
    else if (last < first)
        ds_fault(&f->faults, "--%s: '%s' runs backwards", f->option, shown);
    else if (host >= 0)
        mark(f, host, first, last);
}

/* What is behind a host's ':'; host -1: a host that is not known, only the form is looked at. */
static void read_slots(filter *f, int host, const char *text, const char *end)
{
    choice *c = host < 0 ? NULL : &f->choice[host];

    if (c && !c->slot) {
        c->slot = calloc((size_t)f->hosts->host[host].slots, 1);
        f->rc = c->slot ? f->rc : DS_ENOMEM;
    }
    for (;;) {
        const char *comma = memchr(text, ',', (size_t)(end - text));

        read_slot(f, host, text, (size_t)((comma ? comma : end) - text));
        if (!comma)
            return;
        text = comma + 1;
    }
}

/* The end of a host's name: what separates, outside of brackets. */
static const char *name_end(const char *text)
{
    int inside = 0;

    for (; *text; text++) {
        inside = *text == '[' || (inside && *text != ']' && *text != '@');
        if (!inside && (*text == '@' || *text == ':'))
            break;
    }
    return text;
}

/* One host with its slots; returns its end, at a '@' or the end of all. */
static const char *read_host(filter *f, const char *text)
{
    const char *end = name_end(text), *far = *end == '@' ? name_end(end + 1) : NULL, *slots;
    int host = find(f->hosts, text, (size_t)(end - text), 0), joined = -1;
    char shown[DS_QUOTE];

    if (far)
        joined = find(f->hosts, text, (size_t)(far - text), 1);
    if (joined >= 0 && host >= 0)
        ds_fault(&f->faults, "--%s: '%s' can mean one host or two: leave out the user's name",
                 f->option, ds_quote(shown, text, (size_t)(far - text)));
    if (joined >= 0) {
        host = joined;
        end = far;
    } else if (host < 0) {
        size_t bytes = (size_t)(end - text);

        trim(&text, &bytes);
        unknown_host(f, text, bytes);
    }
    if (host >= 0)
        f->choice[host].named = 1;
    if (*end != ':')
        return end;
    slots = end + 1;
    end = slots + strcspn(slots, "@");
    read_slots(f, host, slots, end);
    return end;
}

static int read_filter(filter *f, const char *text)
{
    char there[LIST_BYTES], end[LIST_BYTES + 16];

    for (;; text++) {
        text = read_host(f, text);
        if (f->rc < 0)
            return ds_fail(f->rc, "out of memory");
        if (!*text)
            break;
    }
    snprintf(end, sizeof end, "there is %s", list(there, f->hosts));
    return ds_faults_fail(&f->faults, DS_EINVAL, end);
}

/* ---- taking away */

/* Whether a slot stays. */
static int stays(const choice *c, int slot, int excluding)
{
    int chosen = c->named && (!c->slot || c->slot[slot]);

    return excluding ? !chosen : chosen;
}

/* Drops hosts without slots. */
static void close_up(ds_hosts *hosts)
{
    int kept = 0;

    for (int i = 0; i < hosts->count; i++) {
        ds_host *h = &hosts->host[i];

        if (h->slots) {
            hosts->host[kept++] = *h;
        } else {
            free(h->name);
            free(h->slot);
        }
    }
    hosts->count = kept;
}

static int apply(ds_hosts *hosts, const choice *choices, int excluding, const char *text)
{
    char there[LIST_BYTES], shown[DS_QUOTE];
    int left = 0;

    for (int i = 0; i < hosts->count; i++)
        for (int s = 0; s < hosts->host[i].slots; s++)
            left += stays(&choices[i], s, excluding);
    if (!left)
        return ds_fail(DS_EINVAL, "--%s '%s' leaves nothing to run on; there is %s",
                       excluding ? "exclude" : "include", ds_quote(shown, text, strlen(text)),
                       list(there, hosts));
    for (int i = 0; i < hosts->count; i++) {
        ds_host *h = &hosts->host[i];
        int kept = 0;

        for (int s = 0; s < h->slots; s++)
            if (stays(&choices[i], s, excluding))
                h->slot[kept++] = h->slot[s];
        h->slots = kept;
    }
    close_up(hosts);
    return 0;
}

static int choose(ds_hosts *hosts, const char *text, int excluding)
{
    filter f = {.hosts = hosts, .option = excluding ? "exclude" : "include"};
    int rc, n = hosts->count;

    f.choice = calloc((size_t)n, sizeof *f.choice);
    if (!f.choice)
        return ds_fail(DS_ENOMEM, "out of memory");
    rc = read_filter(&f, text);
    if (rc == 0)
        rc = apply(hosts, f.choice, excluding, text);
    for (int i = 0; i < n; i++)
        free(f.choice[i].slot);
    free(f.choice);
    return rc;
}

/* ---- counts */

/* The hosts among the first `nodes` with fewer slots, in a message. */
static int too_few_slots(const ds_hosts *hosts, int nodes, int slots, const char *option)
{
    char there[LIST_BYTES];
    ds_hosts fewer = {calloc((size_t)nodes, sizeof(ds_host)), 0};
    int rc;

    if (!fewer.host)
        return ds_fail(DS_ENOMEM, "out of memory");
    for (int i = 0; i < nodes; i++)
        if (hosts->host[i].slots < slots)
            fewer.host[fewer.count++] = hosts->host[i];
    rc = !fewer.count ? 0
                      : ds_fail(DS_EINVAL, "--%s wants %d slots of each host; there is %s", option,
                                slots, list(there, &fewer));
    free(fewer.host);
    return rc;
}

static int count(ds_hosts *hosts, int nodes, int slots, const char *option)
{
    char there[LIST_BYTES];
    int rc;

    if (nodes < 0 || slots < 0)
        return ds_fail(DS_EINVAL, "--num_nodes and --%s are not negative", option);
    if (nodes > hosts->count)
        return ds_fail(DS_EINVAL, "--num_nodes %d, but there %s only %d: %s", nodes,
                       hosts->count > 1 ? "are" : "is", hosts->count, list(there, hosts));
    nodes = nodes ? nodes : hosts->count;
    rc = slots ? too_few_slots(hosts, nodes, slots, option) : 0;
    if (rc < 0)
        return rc;
    for (int i = 0; i < hosts->count; i++)
        if (i >= nodes)
            hosts->host[i].slots = 0;
        else if (slots)
            hosts->host[i].slots = slots;
    close_up(hosts);
    return 0;
}

int ds_hosts_filter(ds_hosts *hosts, const char *include, const char *exclude, int num_nodes,
                    int num_slots, const char *slots_option)
{
    int included = include && *include, excluded = exclude && *exclude;

    if (included && excluded)
        return ds_fail(DS_EINVAL, "include and exclude are mutually exclusive: give one of them");
    if ((included || excluded) && (num_nodes || num_slots))
        return ds_fail(DS_EINVAL, "cannot specify num_nodes/gpus with include/exclude");
    if (included || excluded)
        return choose(hosts, included ? include : exclude, excluded);
    return count(hosts, num_nodes, num_slots, slots_option ? slots_option : "num_gpus");
}
