/* watch.c - from another host: whether the launcher is still there.
 *
 * A host that is cut off while its ranks start has Open MPI's daemon on it, and no rank yet that
 * would end it. The daemon itself has mostly just sent something, and then its system waits for the
 * answer for a quarter of an hour before it looks at anything else. So the cleaner on that host has a
 * connection of its own, over which nothing is ever said: the system tells within seconds that nobody
 * answers at its other end.
 */
#include "runner/watch.h"

#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "runner/ds.h"
#include "runner/hub.h"

#define WELCOME "welcome\n"
/* To reach the hub. It is more than a rank has for it (side.c), which can say what was wrong. */
#define REACH_SECONDS 8

/* A socket that is being connected to a numeric address, or -1. */
static int dial(const char *host, const char *port)
{
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                                   .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV};
    int fd, whole = sizeof WELCOME - 1;
    struct addrinfo *to;

    if (getaddrinfo(host, port, &hints, &to) != 0)
        return -1;
    fd = socket(to->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0) {
        ds_hub_lively(fd);
        setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &whole, sizeof whole);
        /* how that goes is told by poll() */
        (void)!connect(fd, to->ai_addr, to->ai_addrlen);
    }
    freeaddrinfo(to);
    return fd;
}

/* Calls all of the hub's addresses: which one leads to it is not known here. fds: [n], -1 where there
 * is none; an event is awaited by who is not connected yet, another by who waits for an answer. */
enum { CALLS = POLLOUT, WAITS = POLLIN };
static void dial_all(struct pollfd *fds, int n, const char *hub)
{
    char *words = strdup(hub), *rest = words, *port = words ? strsep(&rest, ",") : NULL;

    for (int i = 0; i < n; i++) {
        const char *host = port ? strsep(&rest, ",") : NULL;

        fds[i] = (struct pollfd){host ? dial(host, port) : -1, CALLS, 0};
    }
    free(words);
}

static void hang_up(struct pollfd *fd)
{
    if (fd->fd >= 0)
        close(fd->fd);
    fd->fd = -1; /* poll() passes it over */
}

/* Something has happened to a call. 1: the hub answers. */
static int is_answer(struct pollfd *fd, const char *folder)
{
    char text[PATH_MAX];

    if (fd->events == CALLS) {
        int n = snprintf(text, sizeof text, "watch %s\n", folder);

        fd->events = WAITS;
        if (send(fd->fd, text, (size_t)n, MSG_NOSIGNAL) != n)
            hang_up(fd);
        return 0;
    }
    if (recv(fd->fd, text, sizeof WELCOME - 1, 0) == sizeof WELCOME - 1 &&
        !memcmp(text, WELCOME, sizeof WELCOME - 1))
        return 1;
    hang_up(fd);
    return 0;
}

/* The number of the first call that the hub answers; -1: `pipe` was closed, or it answers none. */
static int reach(struct pollfd *fds, int n, const char *folder)
{
    double end = ds_seconds() + REACH_SECONDS;

    for (;;) {
        double left = end - ds_seconds();

        /* who is connected is not in a hurry: the system sees to it */
        for (int i = 1; i < n; i++)
            if (fds[i].fd >= 0 && fds[i].events == WAITS)
                left = 3600;
        if (left <= 0)
            return -1;
        poll(fds, (nfds_t)n, (int)(left * 1e3) + 1);
        if (fds[0].revents)
            return -1;
        for (int i = 1; i < n; i++)
            if (fds[i].fd >= 0 && fds[i].revents && is_answer(&fds[i], folder))
                return i;
    }
}

void ds_watch(int pipe, const char *hub, const char *folder)
{
    struct pollfd fds[1 + DS_WATCH_ADDRESSES] = {{pipe, WAITS, 0}};
    const int n = 1 + DS_WATCH_ADDRESSES;
    int reached;

    while (!strchr(hub, ',') && poll(fds, 1, -1) <= 0)
        continue;
    if (fds[0].revents)
        return;
    dial_all(fds + 1, DS_WATCH_ADDRESSES, hub);
    reached = reach(fds, n, folder);
    for (int i = 1; i < n; i++)
        if (i != reached)
            hang_up(&fds[i]);
    while (reached > 0 && poll(fds, (nfds_t)n, -1) <= 0) /* the hub says no more: this is its end */
        continue;
    if (reached > 0)
        hang_up(&fds[reached]);
}
