/* fuzz_hostfile.c - any bytes as a hostfile and as filters: a message that names the place, or a list
 * that hangs together.
 *
 * The input is FILE|INCLUDE|EXCLUDE|NODES|SLOTS, as many of them as there are. Checked: names are safe,
 * slots ascend; a filter takes away and changes nothing else, or nothing at all when it fails; what a
 * filter includes and what it excludes are all there is, together.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/hostfile.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void require(int holds)
{
    if (!holds)
        abort();
}

/* The next piece, up to a '|', with a 0 behind. */
static char *piece(size_t *length, const uint8_t **data, size_t *bytes)
{
    const uint8_t *bar = memchr(*data, '|', *bytes);
    size_t n = bar ? (size_t)(bar - *data) : *bytes, used = bar ? n + 1 : n;
    char *text = malloc(n + 1);

    require(text != NULL);
    memcpy(text, *data, n);
    text[n] = 0;
    *data += used;
    *bytes -= used;
    *length = n;
    return text;
}

static void check(const ds_hosts *hosts)
{
    char name[DS_HOST_NAME_BYTES], written[DS_HOST_NAME_BYTES + 2], reason[DS_HOST_REASON_BYTES];
    int ranks = 0;

    require(hosts->count > 0);
    for (int i = 0; i < hosts->count; i++) {
        const ds_host *h = &hosts->host[i];

        require(*h->name && *h->name != '-' && strlen(h->name) < DS_HOST_NAME_BYTES);
        for (const char *c = h->name; *c; c++)
            require(*c > 32 && *c < 127 && !strchr("|&;<>()$`\\\"'*?[]#~=!{},/^", *c));
        ds_host_shown(written, h->name);
        require(ds_host_name(name, reason, written, strlen(written)) == 0);
        require(!strcmp(name, h->name));
        require(h->slots > 0 && h->slots <= DS_MAX_SLOTS && h->slot[0] >= 0);
        for (int s = 1; s < h->slots; s++)
            require(h->slot[s] > h->slot[s - 1]);
        ranks += h->slots;
    }
    require(ranks == ds_hosts_ranks(hosts) && ranks <= DS_ALL_SLOTS);
}

/* Whether `some` is `all` less hosts and slots. */
static void require_part(const ds_hosts *some, const ds_hosts *all)
{
    int i = 0;

    for (int k = 0; k < some->count; k++, i++) {
        int at = 0;

        while (i < all->count && strcmp(all->host[i].name, some->host[k].name) != 0)
            i++;
        require(i < all->count);
        for (int s = 0; s < some->host[k].slots; s++, at++) {
            while (at < all->host[i].slots && all->host[i].slot[at] != some->host[k].slot[s])
                at++;
            require(at < all->host[i].slots);
        }
    }
}

/* How many ranks the filter leaves of the file's; 0: it fails. */
static int filtered(const ds_hosts *all, const char *file, size_t bytes, const char *include,
                    const char *exclude, int nodes, int slots)
{
    ds_hosts *hosts;
    int ranks = 0;

    require(ds_hosts_parse(&hosts, file, bytes, "fuzz") == 0);
    if (ds_hosts_filter(hosts, include, exclude, nodes, slots, NULL) == 0) {
        check(hosts);
        require_part(hosts, all);
        ranks = ds_hosts_ranks(hosts);
        require(nodes == 0 || hosts->count == nodes);
        require(slots == 0 || ranks == hosts->count * slots);
    } else {
        require(*ds_error() != 0);
        require_part(all, hosts);
        require(ds_hosts_ranks(hosts) == ds_hosts_ranks(all));
    }
    ds_hosts_free(hosts);
    return ranks;
}

/* A filter that can be read, by the one way or the other, does the opposite in the other. */
static void try_filter(const ds_hosts *all, const char *file, size_t bytes, const char *text)
{
    int in = filtered(all, file, bytes, text, NULL, 0, 0);
    int out = filtered(all, file, bytes, NULL, text, 0, 0);

    if (*text)
        require((!in && !out) || in + out == ds_hosts_ranks(all));
    else
        require(in == out && out == ds_hosts_ranks(all));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    char *text[5];
    size_t n[5];
    ds_hosts *hosts;

    for (int i = 0; i < 5; i++)
        text[i] = piece(&n[i], &data, &bytes);
    if (ds_hosts_parse(&hosts, text[0], n[0], "fuzz") == 0) {
        check(hosts);
        try_filter(hosts, text[0], n[0], text[1]);
        try_filter(hosts, text[0], n[0], text[2]);
        filtered(hosts, text[0], n[0], text[1], text[2], atoi(text[3]), atoi(text[4]));
        filtered(hosts, text[0], n[0], NULL, NULL, atoi(text[3]), atoi(text[4]));
        ds_hosts_free(hosts);
    } else {
        require(hosts == NULL && strncmp(ds_error(), "fuzz:", 5) == 0);
    }
    for (int i = 0; i < 5; i++)
        free(text[i]);
    return 0;
}
