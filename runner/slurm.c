/* slurm.c - the hosts of a SLURM allocation, from its environment.
 *
 * `scontrol show hostnames` expands a node list as well, but is not to be had in every container.
 */
#include "runner/slurm.h"

#include <search.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/faults.h"
#include "runner/hostfile.h"

#define LIST "SLURM_JOB_NODELIST"
#define MOST_NODES 65536
#define MOST_NUMBER (1 << 20)
#define DIGITS "0123456789"

/* ---- a number for each node */

int ds_slurm_number(ds_slurm_numbers *numbers)
{
    const char *text = numbers->text;
    size_t n;

    if (numbers->left > 0) {
        numbers->left--;
        return numbers->number;
    }
    if (!text || !*text)
        return -1;
    n = strspn(text, DIGITS);
    numbers->number = ds_host_number(text, n, MOST_NUMBER);
    text += n;
    if (!strncmp(text, "(x", 2)) {
        n = strspn(text + 2, DIGITS);
        numbers->left = ds_host_number(text + 2, n, MOST_NODES) - 1;
        text += 2 + n;
        if (*text++ != ')' || numbers->left < 0)
            return -2;
    }
    if (numbers->number < 0 || numbers->number > MOST_NUMBER || (*text && *text != ',') ||
        (*text && !text[1]))
        return -2;
    numbers->text = *text ? text + 1 : text;
    return numbers->number;
}

/* ---- the list of nodes */

/* "node[01-03,07],gpu-[1-2]x,login": brackets hold numbers and ranges, with as many digits as they are
 * written with; a name may have several. */
typedef struct nodes {
    ds_hosts *hosts;
    const char *text;
    char name[DS_HOST_NAME_BYTES]; /* as far as it is put together */
} nodes;

static int bad_list(const nodes *n, const char *what)
{
    char shown[DS_QUOTE];

    return ds_fail(DS_EINVAL, LIST "='%s': %s", ds_quote(shown, n->text, strlen(n->text)), what);
}

static int add_node(nodes *n, size_t used)
{
    char name[DS_HOST_NAME_BYTES], reason[DS_HOST_REASON_BYTES];

    if (ds_host_name(name, reason, n->name, used) < 0)
        return bad_list(n, reason);
    if (n->hosts->count == MOST_NODES)
        return bad_list(n, "these are more than 65536 nodes");
    return ds_hosts_add(n->hosts, name, 1);
}

static int expand(nodes *n, size_t used, const char *text, const char *end);

/* All names that begin with what there is, go on with a number of the piece "01-03", and with what
 * follows the bracket. */
static int expand_range(nodes *n, size_t used, const char *piece, size_t bytes, const char *after,
                        const char *end)
{
    const char *dash = memchr(piece, '-', bytes);
    size_t digits = dash ? (size_t)(dash - piece) : bytes;
    int first = ds_host_number(piece, digits, 999999999);
    int last = dash ? ds_host_number(dash + 1, bytes - digits - 1, 999999999) : first;
    int rc = 0;

    if (first < 0 || last < first || digits > 9)
        return bad_list(n, "brackets hold numbers and ascending ranges");
    for (int i = first; i <= last && rc == 0; i++) {
        size_t room = sizeof n->name - used;
        int wrote = snprintf(n->name + used, room, "%0*d", (int)digits, i);

        if ((size_t)wrote >= room)
            return bad_list(n, "a name is too long");
        rc = expand(n, used + (size_t)wrote, after, end);
    }
    return rc;
}

/* All names that begin with n->name[used] and go on with the text, up to end. */
static int expand(nodes *n, size_t used, const char *text, const char *end)
{
    const char *open = memchr(text, '[', (size_t)(end - text)), *close;
    size_t plain = (size_t)((open ? open : end) - text);
    int rc = 0;

    if (used + plain >= sizeof n->name)
        return bad_list(n, "a name is too long");
    memcpy(n->name + used, text, plain);
    used += plain;
    if (!open)
        return add_node(n, used);
    close = memchr(open, ']', (size_t)(end - open));
    if (!close)
        return bad_list(n, "a bracket is not closed");
    for (text = open + 1; rc == 0 && text <= close; text++) {
        const char *comma = memchr(text, ',', (size_t)(close - text));
        const char *stop = comma ? comma : close;

        rc = expand_range(n, used, text, (size_t)(stop - text), close + 1, end);
        text = stop;
    }
    return rc;
}

static int same_names(const void *a, const void *b)
{
    return strcmp(a, b);
}

static void keep(void *name)
{
    (void)name; /* the list's */
}

static int no_duplicates(const nodes *n)
{
    void *tree = NULL;
    int rc = 0;

    for (int i = 0; i < n->hosts->count && rc == 0; i++) {
        char *name = n->hosts->host[i].name, **node = tsearch(name, &tree, same_names);

        if (!node)
            rc = ds_fail(DS_ENOMEM, "out of memory");
        else if (*node != name)
            rc = ds_fail(DS_EINVAL, LIST " names %s twice", name);
    }
    tdestroy(tree, keep);
    return rc;
}

static int read_nodes(nodes *n)
{
    const char *text = n->text;
    int rc;

    for (;; text++) {
        const char *end = text;

        for (int inside = 0; *end && (inside || *end != ','); end++)
            inside = *end == '[' || (inside && *end != ']');
        rc = expand(n, 0, text, end);
        text = end;
        if (rc < 0 || !*end)
            break;
    }
    return rc < 0 ? rc : no_duplicates(n);
}

/* ---- slots */

static const char *variable(const char *name)
{
    const char *text = getenv(name);

    return text && *text ? text : NULL;
}

/* *total: of the hosts so far. */
static int set_slots(ds_host *h, int slots, int *total)
{
    int *more;

    *total += slots;
    if (*total > DS_ALL_SLOTS)
        return ds_fail(DS_EINVAL, "SLURM's variables make more than %d slots in all", DS_ALL_SLOTS);
    more = realloc(h->slot, (size_t)slots * sizeof *more);
    if (!more)
        return ds_fail(DS_ENOMEM, "out of memory");
    h->slot = more;
    h->slots = slots;
    for (int i = 0; i < slots; i++)
        more[i] = i;
    return 0;
}

/* From a variable with one number a node, of which `by` (what: says so) make a slot. */
static int slots_from_list(ds_hosts *hosts, const char *name, int by, const char *what)
{
    ds_slurm_numbers numbers = {.text = variable(name)};
    char shown[DS_QUOTE];
    int n, i, total = 0, rc = 0;

    ds_quote(shown, numbers.text, strlen(numbers.text));
    for (i = 0; rc == 0 && (n = ds_slurm_number(&numbers)) >= 0; i++) {
        if (n / by < 1 || n / by > DS_MAX_SLOTS)
            return ds_fail(DS_EINVAL,
                           "%s='%s'%s: that makes %d slots of %d, and a host has 1 to %d", name,
                           shown, what, n / by, n, DS_MAX_SLOTS);
        if (i < hosts->count)
            rc = set_slots(&hosts->host[i], n / by, &total);
    }
    if (rc < 0)
        return rc;
    if (n == -2)
        return ds_fail(DS_EINVAL, "%s='%s' is not one number a node, as 2(x3),1", name, shown);
    if (i != hosts->count)
        return ds_fail(DS_EINVAL, "%s='%s' is for %d nodes, and " LIST "='%.80s' has %d", name,
                       shown, i, variable(LIST), hosts->count);
    return 0;
}

/* "4", or by type, "a100:2,h200:2". -1: neither. */
static int gpus(const char *text)
{
    int sum = 0;

    for (;; text++) {
        size_t length = strcspn(text, ",");
        const char *colon = memrchr(text, ':', length), *digits = colon ? colon + 1 : text;
        int n = ds_host_number(digits, length - (size_t)(digits - text), DS_MAX_SLOTS);

        if (n < 0 || sum + n > DS_MAX_SLOTS)
            return -1;
        sum += n;
        text += length;
        if (!*text)
            return sum;
    }
}

/* From GPUs, of which SLURM tells one number for all nodes; 1: there are none. */
static int slots_from_gpus(ds_hosts *hosts)
{
    static const char *const names[] = {"SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"};
    char shown[DS_QUOTE];
    int n = 0, total = 0, rc = 0;

    for (size_t i = 0; i < sizeof names / sizeof *names && n == 0; i++) {
        const char *text = variable(names[i]);

        n = text ? gpus(text) : 0;
        if (n < 0)
            return ds_fail(DS_EINVAL, "%s='%s' is no number of GPUs from 0 to %d", names[i],
                           ds_quote(shown, text, strlen(text)), DS_MAX_SLOTS);
    }
    for (int i = 0; i < hosts->count && n && rc == 0; i++)
        rc = set_slots(&hosts->host[i], n, &total);
    return n ? rc : 1;
}

static int slots_from_cpus(ds_hosts *hosts)
{
    const char *each = variable("SLURM_CPUS_PER_TASK");
    int by = each ? ds_host_number(each, strlen(each), MOST_NUMBER) : 1;
    char shown[DS_QUOTE], what[64] = "";

    if (by < 1)
        return ds_fail(DS_EINVAL, "SLURM_CPUS_PER_TASK='%s' is no number of CPUs",
                       ds_quote(shown, each, strlen(each)));
    if (each)
        snprintf(what, sizeof what, " with SLURM_CPUS_PER_TASK=%d", by);
    return slots_from_list(hosts, "SLURM_JOB_CPUS_PER_NODE", by, what);
}

static int find_slots(ds_hosts *hosts)
{
    /* SLURM sets SLURM_TASKS_PER_NODE always, to 1 where nobody said; these tell whether somebody did */
    static const char *const asked[] = {"SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE"};
    const char *tasks = variable("SLURM_TASKS_PER_NODE");
    int rc;

    for (size_t i = 0; i < sizeof asked / sizeof *asked; i++)
        if (tasks && variable(asked[i]))
            return slots_from_list(hosts, "SLURM_TASKS_PER_NODE", 1, "");
    rc = slots_from_gpus(hosts);
    if (rc <= 0)
        return rc;
    if (variable("SLURM_JOB_CPUS_PER_NODE"))
        return slots_from_cpus(hosts);
    if (tasks)
        return slots_from_list(hosts, "SLURM_TASKS_PER_NODE", 1, "");
    return ds_fail(DS_EINVAL, "SLURM does not say how many ranks a node has: neither "
                              "SLURM_TASKS_PER_NODE nor SLURM_JOB_CPUS_PER_NODE is set");
}

int ds_hosts_slurm(ds_hosts **out)
{
    nodes n = {.text = variable(LIST)};
    int rc;

    *out = NULL;
    if (!n.text)
        return ds_fail(DS_ENOENT, "this is no SLURM allocation: " LIST " is not set");
    n.hosts = ds_hosts_new();
    rc = n.hosts ? read_nodes(&n) : ds_fail(DS_ENOMEM, "out of memory");
    if (rc == 0)
        rc = find_slots(n.hosts);
    if (rc < 0)
        ds_hosts_free(n.hosts);
    else
        *out = n.hosts;
    return rc;
}
