/* hostname.c - names of hosts: which are safe, how they are written, and the numbers beside them. */
#include "runner/hostfile.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/faults.h"

#define LETTERS "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
#define DIGITS "0123456789"

int ds_host_number(const char *text, size_t bytes, int most)
{
    int n = 0;

    if (bytes == 0)
        return -1;
    for (size_t i = 0; i < bytes; i++) {
        if (text[i] < '0' || text[i] > '9')
            return -1;
        if (n <= most)
            n = n > (most - (text[i] - '0')) / 10 ? most + 1 : 10 * n + text[i] - '0';
    }
    return n;
}

const char *ds_host_bare(const char *name)
{
    const char *at = strchr(name, '@');

    return at ? at + 1 : name;
}

char *ds_host_shown(char *out, const char *name)
{
    const char *bare = ds_host_bare(name);

    if (strchr(bare, ':'))
        snprintf(out, DS_HOST_NAME_BYTES + 2, "%.*s[%s]", (int)(bare - name), name, bare);
    else
        snprintf(out, DS_HOST_NAME_BYTES + 2, "%s", name);
    return out;
}

/* Says that the text is no name, and why. */
static int no(char *reason, const char *text, const char *why)
{
    char shown[DS_QUOTE];

    snprintf(reason, DS_HOST_REASON_BYTES, "'%s' %s", ds_quote(shown, text, strlen(text)), why);
    return DS_EINVAL;
}

/* The address between brackets, [fe80::1] or [fe80::1%eth0], in its usual form. */
static int check_ipv6(char *host, size_t room, char *reason)
{
    char address[INET6_ADDRSTRLEN], zone[64] = "";
    size_t n = strlen(host), length = strcspn(host, "%");
    struct in6_addr in;

    if (host[n - 1] != ']') {
        if (strstr(host, "]:"))
            return no(reason, host, "has a port, which goes to --ssh_port, or into ssh's config");
        return no(reason, host, "does not end with the bracket's other half");
    }
    host[n - 1] = 0;
    if (host[length] == '%') {
        if (strspn(host + length + 1, LETTERS DIGITS "._-") != strlen(host + length + 1) ||
            !host[length + 1] || n - length > sizeof zone)
            return no(reason, host, "has no interface's name behind the %");
        strcpy(zone, host + length);
        host[length] = 0;
    }
    if (inet_pton(AF_INET6, host + 1, &in) != 1)
        return no(reason, host + 1, "is no IPv6 address");
    inet_ntop(AF_INET6, &in, address, sizeof address);
    if (strlen(address) + strlen(zone) >= room) /* 1:1 may become 0.1.0.1 */
        return no(reason, host + 1, "is too long with its user's name");
    strcpy(host, address);
    strcat(host, zone);
    return 0;
}

/* A colon: either a port or an address without its brackets. */
static int refuse_colon(char *reason, const char *host)
{
    struct in6_addr in;

    if (inet_pton(AF_INET6, host, &in) == 1)
        return no(reason, host, "is an IPv6 address, which goes in brackets");
    return no(reason, host,
              "has a colon: a port goes to --ssh_port, or into ssh's config; an IPv6 address in "
              "brackets");
}

/* room: bytes at host. */
static int check_host(char *host, size_t room, char *reason)
{
    struct in_addr in;
    size_t n = strlen(host);

    if (*host == '[')
        return check_ipv6(host, room, reason);
    if (strchr(host, ':'))
        return refuse_colon(reason, host);
    if (strspn(host, LETTERS DIGITS "._-") != n)
        return no(reason, host,
                  "is no host's name: it has letters, digits, '-', '_' and '.' between them");
    if (*host == '-')
        return no(reason, host, "is no host's name: with a '-' in front it would be an option");
    if (*host == '.' || strstr(host, ".."))
        return no(reason, host, "is no host's name: there is nothing before a '.'");
    if (strspn(host, DIGITS ".") == n && inet_pton(AF_INET, host, &in) != 1)
        return no(reason, host, "is no IPv4 address");
    return 0;
}

int ds_host_name(char *name, char *reason, const char *text, size_t bytes)
{
    char *at;

    if (bytes >= DS_HOST_NAME_BYTES) {
        snprintf(reason, DS_HOST_REASON_BYTES, "a host's name has at most %d characters",
                 DS_HOST_NAME_BYTES - 1);
        return DS_EINVAL;
    }
    memcpy(name, text, bytes);
    name[bytes] = 0;
    at = strchr(name, '@');
    if (!bytes || strlen(name) < bytes || at == name || (at && !at[1]))
        return no(reason, name, "is no host's name: it is [USER@]NAME");
    if (!at)
        return check_host(name, DS_HOST_NAME_BYTES, reason);
    if (*name == '-' || (size_t)(at - name) != strspn(name, LETTERS DIGITS "._-"))
        return no(reason, name,
                  "has no user's name before the @: that has letters, digits, '.', '_' and '-'");
    return check_host(at + 1, DS_HOST_NAME_BYTES - (size_t)(at + 1 - name), reason);
}
