/* machine.c - facts of this machine: its addresses, versions of libraries that dsrun is not linked
 * with. */
#include "runner/machine.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <ifaddrs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runner/ds.h"

/* The bytes of an address, and how many; NULL: of another kind. */
static const unsigned char *bytes_of(int *n, const struct sockaddr *a)
{
    if (a && a->sa_family == AF_INET) {
        *n = 4;
        return (const unsigned char *)&((const struct sockaddr_in *)a)->sin_addr;
    }
    if (a && a->sa_family == AF_INET6) {
        *n = 16;
        return (const unsigned char *)&((const struct sockaddr_in6 *)a)->sin6_addr;
    }
    return NULL;
}

int ds_machine_has(int family, const void *address)
{
    struct ifaddrs *all, *i;
    int found = 0, n;

    if (getifaddrs(&all) < 0)
        return 0;
    for (i = all; i && !found; i = i->ifa_next) {
        const unsigned char *own = bytes_of(&n, i->ifa_addr);
        found = own && i->ifa_addr->sa_family == family && !memcmp(own, address, (size_t)n);
    }
    freeifaddrs(all);
    return found;
}

static int prefix_of(const struct sockaddr *mask)
{
    int bits = 0, n;
    const unsigned char *bytes = bytes_of(&n, mask);

    for (int i = 0; bytes && i < n; i++)
        bits += __builtin_popcount(bytes[i]);
    return bits;
}

char *ds_interfaces(void)
{
    struct ifaddrs *all, *i;
    char *text = NULL, address[INET6_ADDRSTRLEN];
    size_t bytes;
    FILE *f = open_memstream(&text, &bytes);
    int n;

    if (f && getifaddrs(&all) == 0) {
        for (i = all; i; i = i->ifa_next) {
            const unsigned char *own = bytes_of(&n, i->ifa_addr);
            if (own && inet_ntop(i->ifa_addr->sa_family, own, address, sizeof address))
                fprintf(f, "%s %s/%d\n", i->ifa_name, address, prefix_of(i->ifa_netmask));
        }
        freeifaddrs(all);
    }
    if (f)
        fclose(f);
    return text;
}

int ds_library_version(const char *file, const char *function)
{
    void *library = dlopen(file, RTLD_LAZY | RTLD_LOCAL); /* stays open: some do not bear closing */
    void *symbol = library ? dlsym(library, function) : NULL;
    int version = 0;
    int (*ask)(int *);
    size_t (*tell)(void);

    if (!symbol)
        return -1;
    if (!strncmp(function, "cudnn", 5)) {
        memcpy(&tell, &symbol, sizeof tell);
        return (int)tell();
    }
    memcpy(&ask, &symbol, sizeof ask);
    return ask(&version) == 0 ? version : -1;
}
