/* hub.c - the middle of the side channel: connections and what comes over them. */
#include "runner/hub.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/comm.h"
#include "runner/hub_ranks.h"
#include "runner/lines.h"

#define LINE_BYTES 2048
#define FAILURE_BYTES 65536
#define HELLO_SECONDS 10 /* a stranger's time to say who it is */
#define STRANGERS 64     /* connections beyond one a rank that have not said so yet */

enum channel { STRANGER, SIDE, OUTPUT, WATCH };

typedef struct ds_link {
    struct ds_link *next;
    int fd, rank;
    enum channel channel;
    enum ds_stream stream;
    double since;
    int local;
    char line[LINE_BYTES];
    size_t used;
    char *failure; /* the text that is being received */
    size_t failure_bytes, failure_used;
} ds_link;

void ds_hub_say(ds_hub *h, int rank, const char *format, ...)
{
    char text[4096];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    h->config.say(h->config.data, rank, text);
}

void ds_hub_trouble_with(ds_hub *h, enum ds_trouble trouble, int rank, int code, double now)
{
    if (h->trouble != DS_TROUBLE_NONE)
        return;
    h->trouble = trouble;
    h->culprit = rank;
    h->code = code;
    h->since = now;
}

/* ---- opening and closing */

void ds_hub_lively(int fd)
{
    const struct {
        int level, name, value;
    } options[] = {
        {IPPROTO_TCP, TCP_NODELAY, 1},
        {SOL_SOCKET, SO_KEEPALIVE, 1}, /* while nothing is said */
        {IPPROTO_TCP, TCP_KEEPIDLE, 2},
        {IPPROTO_TCP, TCP_KEEPINTVL, 1},
        {IPPROTO_TCP, TCP_KEEPCNT, DS_CUT_OFF_MS / 1000 - 2},
        {IPPROTO_TCP, TCP_USER_TIMEOUT, DS_CUT_OFF_MS}, /* while something is */
    };

    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        setsockopt(fd, options[i].level, options[i].name, &options[i].value, sizeof(int));
}

/* A socket that listens, or -1. Where there is IPv6, its address for all is IPv4's as well. */
static int listen_on(int family, const struct sockaddr *address, socklen_t length)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), no = 0;

    if (family == AF_INET6 && fd >= 0)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
    if (fd >= 0 && (bind(fd, address, length) < 0 || listen(fd, 4096) < 0)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static int listen_here(ds_hub *h)
{
    const struct sockaddr_in6 all6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_ANY_INIT};
    const struct sockaddr_in all4 = {.sin_family = AF_INET};
    const struct sockaddr_in here = {.sin_family = AF_INET,
                                     .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    struct epoll_event event = {.events = EPOLLIN};

    if (h->config.nodes > 1)
        h->listener = listen_on(AF_INET6, (const struct sockaddr *)&all6, sizeof all6);
    if (h->config.nodes > 1 && h->listener < 0)
        h->listener = listen_on(AF_INET, (const struct sockaddr *)&all4, sizeof all4);
    if (h->config.nodes <= 1)
        h->listener = listen_on(AF_INET, (const struct sockaddr *)&here, sizeof here);
    h->events = epoll_create1(EPOLL_CLOEXEC);
    h->reserve = fcntl(h->listener, F_DUPFD_CLOEXEC, 0);
    if (h->listener < 0 || h->events < 0 ||
        getsockname(h->listener, (struct sockaddr *)&address, &length) < 0 ||
        epoll_ctl(h->events, EPOLL_CTL_ADD, h->listener, &event) < 0)
        return ds_fail(DS_ECOMM, "no port for the side channel: %s", strerror(errno));
    h->port = ntohs(address.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&address)->sin6_port
                                                  : ((struct sockaddr_in *)&address)->sin_port);
    return 0;
}

int ds_hub_open(ds_hub **out, const ds_hub_config *config, double now)
{
    ds_hub *h = calloc(1, sizeof *h);
    int rc;

    if (!h)
        return ds_fail(DS_ENOMEM, "out of memory");
    h->config = *config;
    if (config->timeout <= 0)
        h->config.timeout = 1e12;
    h->listener = h->events = h->reserve = h->culprit = h->code = -1;
    h->opened = h->served = h->heard = h->moved = h->window = now;
    h->ranks = calloc((size_t)config->ranks, sizeof *h->ranks);
    rc = h->ranks ? listen_here(h) : ds_fail(DS_ENOMEM, "out of memory");
    for (int r = 0; rc == 0 && r < config->ranks; r++) {
        h->ranks[r].side = -1;
        h->ranks[r].kind = DS_COLLECTIVES;
        h->ranks[r].peer = -1;
    }
    if (rc < 0) {
        ds_hub_close(h);
        h = NULL;
    }
    *out = h;
    return rc;
}

static void tell(int fd, const char *text)
{
    /* a message of a few bytes always finds room; who does not read them is as good as gone */
    if (fd >= 0 && send(fd, text, strlen(text), MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        return;
}

static void tell_all(ds_hub *h, const char *text)
{
    for (int r = 0; r < h->config.ranks; r++)
        tell(h->ranks[r].side, text);
}

static void free_link(ds_link *k)
{
    close(k->fd);
    free(k->failure);
    free(k);
}

void ds_hub_close(ds_hub *h)
{
    if (!h)
        return;
    tell_all(h, "done\n");
    while (h->links) {
        ds_link *k = h->links;
        h->links = k->next;
        free_link(k);
    }
    if (h->listener >= 0)
        close(h->listener);
    if (h->events >= 0)
        close(h->events);
    if (h->reserve >= 0)
        close(h->reserve);
    free(h->ranks);
    free(h);
}

int ds_hub_port(const ds_hub *h)
{
    return h->port;
}

int ds_hub_fd(const ds_hub *h)
{
    return h->events;
}

/* ---- messages */

/* "watch FOLDER". That is no secret, and so gives nothing but this connection. */
static int greet_host(ds_hub *h, ds_link *k)
{
    if (!h->config.folder || strcmp(k->line + 6, h->config.folder) != 0)
        return 0;
    k->channel = WATCH;
    tell(k->fd, "welcome\n");
    return 1;
}

/* "hello TOKEN RANK CHANNEL PID GROUP". 0: this is no rank of this job. */
static int greet(ds_hub *h, ds_link *k, double now)
{
    char token[64], channel[8], welcome[32] = "welcome\n";
    int rank, pid, group;
    ds_seen *r;

    if (!strncmp(k->line, "watch ", 6))
        return greet_host(h, k);
    if (sscanf(k->line, "hello %63s %d %7s %d %d", token, &rank, channel, &pid, &group) != 5 ||
        strcmp(token, h->config.token) || rank < 0 || rank >= h->config.ranks)
        return 0;
    r = &h->ranks[rank];
    k->rank = rank;
    if (strcmp(channel, "side")) {
        if (r->presence != DS_PRESENT || !h->config.output)
            return 0;
        tell(k->fd, welcome);
        k->channel = OUTPUT;
        k->stream = strcmp(channel, "err") ? DS_STDOUT : DS_STDERR;
        r->streams++;
        return 1;
    }
    if (r->presence != DS_ABSENT)
        return 0;
    k->channel = SIDE;
    r->presence = DS_PRESENT;
    r->side = k->fd;
    r->heard = r->since = now;
    if (k->local) {
        r->pid = pid;
        r->group = group == pid ? group : 0;
    }
    tell(k->fd, welcome);
    if (h->stopping) {
        snprintf(welcome, sizeof welcome, "stop %d\n", h->stopping);
        tell(k->fd, welcome);
    }
    return 1;
}

static void take_state(ds_hub *h, int rank, const char *text, double now)
{
    ds_seen *r = &h->ranks[rank];
    long long number, calls, bytes, step, steps;
    const char *site = strchr(text, '\t'), *doing = site ? strchr(site + 1, '\t') : NULL;
    int kind, peer;

    if (r->presence != DS_PRESENT || !doing ||
        sscanf(text, "%d %lld %d %lld %lld %lld %lld %lf", &kind, &number, &peer, &calls, &bytes,
               &step, &steps, &r->busy) != 8)
        return;
    if (kind != r->kind || number != r->number || calls != r->calls)
        r->since = now;
    r->kind = kind >= 0 && kind < DS_COLLECTIVES ? kind : DS_COLLECTIVES;
    r->number = number;
    r->peer = peer == DS_UNSEEN || (peer >= 0 && peer < h->config.ranks) ? peer : -1;
    r->calls = calls;
    r->bytes = bytes;
    r->step = step;
    r->steps = steps;
    snprintf(r->site, sizeof r->site, "%.*s", (int)(doing - site - 1), site + 1);
    snprintf(r->doing, sizeof r->doing, "%s", doing + 1);
}

/* The signal that an exit code stands for, if it is one that asks a job to stop; or 0. */
static int stop_of(int code)
{
    int signal = code - 128;

    return signal == SIGINT || signal == SIGTERM || signal == SIGUSR1 ? signal : 0;
}

static void take_end(ds_hub *h, int rank, int code, double now)
{
    ds_seen *r = &h->ranks[rank];

    r->presence = DS_ENDING;
    r->code = code;
    r->since = now;
    if (stop_of(code))
        h->ended_by = stop_of(code); /* the others do the same, each in its time */
    else if (code != 0)
        ds_hub_trouble_with(h, DS_TROUBLE_FAILED, rank, code, now);
    if (code != 0 && h->trouble == DS_TROUBLE_FAILED && h->culprit == rank)
        h->code = code;
}

/* After a time in which no rank ran, or the hub did not (stopped with all the others, or by a full
 * pipe), what it did not hear then is no sign of anything. */
static void forgive(ds_hub *h, double seconds)
{
    for (int r = 0; r < h->config.ranks; r++) {
        h->ranks[r].heard += seconds;
        h->ranks[r].since += seconds;
    }
    h->moved += seconds;
    h->heard += seconds;
    h->opened += seconds;
    h->asked += seconds;
}

/* One line from a rank. 0: it makes no sense. */
static int take_line(ds_hub *h, ds_link *k, double now)
{
    ds_seen *r = &h->ranks[k->rank];
    const char *line = k->line;

    if (now - h->heard >
        ds_hub_patience(h)) /* all were stopped; this one is only the first again */
        forgive(h, now - h->heard);
    r->heard = h->heard = now;
    if (!strncmp(line, "state ", 6)) {
        take_state(h, k->rank, line + 6, now);
    } else if (!strncmp(line, "here ", 5)) {
        take_state(h, k->rank, line + 5, now);
        if (h->answers > 0 && --h->answers == 0)
            ds_hub_report(h, now);
    } else if (!strncmp(line, "failed ", 7)) {
        k->failure_bytes = strtoul(line + 7, NULL, 10);
        k->failure_used = 0;
        if (k->failure || k->failure_bytes > FAILURE_BYTES)
            return 0;
        k->failure = malloc(k->failure_bytes + 1);
        return k->failure != NULL;
    } else if (!strncmp(line, "end ", 4)) {
        take_end(h, k->rank, atoi(line + 4), now);
        tell(k->fd, "heard\n");
    } else {
        return 0;
    }
    return 1;
}

static void read_outputs(ds_hub *h, int rank);

/* The first failure is the cause; what fails after it fails because of it, mostly. */
static void take_failure(ds_hub *h, ds_link *k, double now)
{
    char name[DS_NAME_BYTES];

    k->failure[k->failure_used] = 0;
    if (h->trouble == DS_TROUBLE_NONE) {
        ds_hub_trouble_with(h, DS_TROUBLE_FAILED, k->rank, -1, now);
        read_outputs(h, k->rank); /* what it wrote before stands before */
        if (h->config.ranks == 1)
            h->config.say(h->config.data, k->rank, k->failure);
        else
            ds_hub_say(h, k->rank, "%s: %s", ds_hub_name(name, h, k->rank), k->failure);
    }
    free(k->failure);
    k->failure = NULL;
    tell(k->fd, "heard\n");
}

/* Bytes on a side connection, or on one that has yet to say what it is. 0: close it. */
static int take_bytes(ds_hub *h, ds_link *k, const char *data, size_t bytes, double now)
{
    while (bytes > 0) {
        if (k->channel == WATCH)
            return 0; /* it has no more to say */
        if (k->channel == OUTPUT) {
            h->config.output(h->config.data, k->rank, k->stream, data, bytes);
            return 1;
        }
        if (k->failure) {
            size_t want = k->failure_bytes - k->failure_used, n = bytes < want ? bytes : want;
            memcpy(k->failure + k->failure_used, data, n);
            k->failure_used += n;
            data += n;
            bytes -= n;
        } else {
            char c = *data++;
            bytes--;
            k->line[k->used++] = c;
            if (c == '\n') {
                k->line[k->used - 1] = 0;
                k->used = 0;
                if (k->channel == STRANGER ? !greet(h, k, now) : !take_line(h, k, now))
                    return 0;
            } else if (k->used == LINE_BYTES) {
                return 0;
            }
        }
        if (k->failure && k->failure_used == k->failure_bytes)
            take_failure(h, k, now);
    }
    return 1;
}

/* ---- connections */

static void drop_link(ds_hub *h, ds_link *k, double now)
{
    ds_seen *r = k->channel == STRANGER ? NULL : &h->ranks[k->rank];

    for (ds_link **p = &h->links; *p; p = &(*p)->next) {
        if (*p == k) {
            *p = k->next;
            break;
        }
    }
    if (k->channel == OUTPUT) {
        r->streams--;
        h->config.output(h->config.data, k->rank, k->stream, NULL, 0);
    } else if (k->channel == SIDE) {
        r->lost = r->presence == DS_PRESENT;
        if (r->lost && (h->stopping || !h->ended_by))
            ds_hub_trouble_with(h, h->stopping ? DS_TROUBLE_STOPPED : DS_TROUBLE_LOST, k->rank, -1,
                                now);
        r->presence = DS_GONE;
        r->side = -1;
    }
    free_link(k);
}

/* Reads all that is there. 0: it is closed, or should be. */
static int read_link(ds_hub *h, ds_link *k, double now)
{
    char data[65536];

    for (int i = 0; i < 16; i++) { /* then it is another's turn */
        ssize_t n = recv(k->fd, data, sizeof data, MSG_DONTWAIT);

        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return 1;
        if (n < 0 && k->channel == SIDE)
            h->ranks[k->rank].cut_off =
                errno == ETIMEDOUT || errno == EHOSTUNREACH || errno == ENETUNREACH;
        if (n <= 0 || !take_bytes(h, k, data, (size_t)n, now))
            return 0;
        if ((size_t)n < sizeof data)
            return 1;
    }
    return 1;
}

static void read_outputs(ds_hub *h, int rank)
{
    for (ds_link *k = h->links; k; k = k->next)
        if (k->channel == OUTPUT && k->rank == rank)
            read_link(h, k, h->served);
}

static int strangers(const ds_hub *h)
{
    int n = 0;

    for (const ds_link *k = h->links; k; k = k->next)
        n += k->channel == STRANGER;
    return n;
}

/* The ranks of this machine call from there: they were told that address. */
static int is_loopback(const struct sockaddr_storage *peer)
{
    const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)peer;
    const struct sockaddr_in *four = (const struct sockaddr_in *)peer;

    if (peer->ss_family == AF_INET)
        return four->sin_addr.s_addr == htonl(INADDR_LOOPBACK);
    return IN6_IS_ADDR_LOOPBACK(&six->sin6_addr) ||
           (IN6_IS_ADDR_V4MAPPED(&six->sin6_addr) && six->sin6_addr.s6_addr[12] == 127);
}

/* A new connection, or -1. Where there is no descriptor for it, one that is held in reserve serves to
 * hang up: a caller that waits in line would be announced for ever. */
static int take_call(ds_hub *h, struct sockaddr_storage *peer, socklen_t *length)
{
    int fd = accept4(h->listener, (struct sockaddr *)peer, length, SOCK_CLOEXEC | SOCK_NONBLOCK);

    if (fd < 0 && (errno == EMFILE || errno == ENFILE) && h->reserve >= 0) {
        close(h->reserve);
        close(accept4(h->listener, NULL, NULL, SOCK_CLOEXEC));
        h->reserve = fcntl(h->listener, F_DUPFD_CLOEXEC, 0);
    }
    return fd;
}

static void accept_links(ds_hub *h, double now)
{
    struct sockaddr_storage peer;
    socklen_t length = sizeof peer;
    int fd;

    while ((fd = take_call(h, &peer, &length)) >= 0) {
        ds_link *k = strangers(h) < STRANGERS + h->config.ranks ? calloc(1, sizeof *k) : NULL;
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = k};

        if (!k || epoll_ctl(h->events, EPOLL_CTL_ADD, fd, &event) < 0) {
            free(k);
            close(fd);
            continue;
        }
        ds_hub_lively(fd);
        k->fd = fd;
        k->since = now;
        k->local = is_loopback(&peer);
        k->next = h->links;
        h->links = k;
        length = sizeof peer;
    }
}

static void drop_strangers(ds_hub *h, double now)
{
    for (ds_link *k = h->links, *next; k; k = next) {
        next = k->next;
        if (k->channel == STRANGER && now - k->since > HELLO_SECONDS)
            drop_link(h, k, now);
    }
}

void ds_hub_serve(ds_hub *h, double now)
{
    struct epoll_event events[64]; /* the listener's has no link */
    int n = epoll_wait(h->events, events, 64, 0);

    if (now - h->served > 2)
        forgive(h, now - h->served);
    h->served = now;
    for (int outputs = 1; outputs >= 0; outputs--) { /* they were written before what is said now */
        for (int i = 0; i < n; i++) {
            ds_link *k = events[i].data.ptr;

            if (!k || (k->channel == OUTPUT) != outputs)
                continue;
            events[i].data.ptr = NULL;
            if (!read_link(h, k, now))
                drop_link(h, k, now);
        }
    }
    accept_links(h, now);
    drop_strangers(h, now);
    ds_hub_judge(h, now);
}

/* ---- what its owner asks and has done */

enum ds_trouble ds_hub_trouble(const ds_hub *h)
{
    return h->trouble;
}

int ds_hub_culprit(const ds_hub *h)
{
    return h->culprit;
}

int ds_hub_code(const ds_hub *h)
{
    return h->code;
}

int ds_hub_signal(const ds_hub *h)
{
    return h->ended_by;
}

double ds_hub_since(const ds_hub *h)
{
    return h->since;
}

int ds_hub_gone(const ds_hub *h, int rank)
{
    return h->ranks[rank].presence == DS_GONE && h->ranks[rank].streams == 0;
}

int ds_hub_cut_off(const ds_hub *h, int rank)
{
    return h->ranks[rank].cut_off;
}

int ds_hub_all_gone(const ds_hub *h)
{
    for (int r = 0; r < h->config.ranks; r++)
        if (!ds_hub_gone(h, r))
            return 0;
    return 1;
}

int ds_hub_started(const ds_hub *h)
{
    int n = 0;

    for (int r = 0; r < h->config.ranks; r++)
        n += h->ranks[r].presence != DS_ABSENT;
    return n;
}

void ds_hub_stop(ds_hub *h, int signal)
{
    char text[24];

    h->stopping = signal;
    snprintf(text, sizeof text, "stop %d\n", signal);
    tell_all(h, text);
}

void ds_hub_ask(ds_hub *h, double now)
{
    h->answers = 0;
    for (int r = 0; r < h->config.ranks; r++)
        h->answers += h->ranks[r].side >= 0;
    h->asked = now;
    tell_all(h, "where\n");
    if (h->answers == 0)
        ds_hub_report(h, now);
}

/* A group outlives its first process where that one's children go on; so those of ranks that were
 * killed are ended as well. Nothing is said to who may be cut off: the system would wait for the
 * answer, and with that anew for the sign that there is none. Such a rank ends by itself. */
void ds_hub_kill(ds_hub *h, int code, double now)
{
    char text[24];

    snprintf(text, sizeof text, "die %d\n", code);
    for (int r = 0; r < h->config.ranks; r++)
        if (ds_hub_hears(h, r, now))
            tell(h->ranks[r].side, text);
    for (int r = 0; r < h->config.ranks; r++) {
        const ds_seen *s = &h->ranks[r];

        if (!h->config.output) /* rank 0 is no launcher: its own ends the others */
            break;
        if (s->group && (s->side >= 0 || s->lost))
            kill(-s->group, SIGKILL);
        if (s->pid && s->side >= 0)
            kill(s->pid, SIGKILL);
    }
}
