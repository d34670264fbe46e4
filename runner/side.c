/* side.c - a rank's end of the side channel: the watchdog, and rank 0's hub where no dsrun has one.
 *
 * What the main thread says (its error, its end) it says itself, and waits for "heard": so the cause
 * of a failure is known before the failure has consequences in other ranks. There is a second for
 * that, as everything that waits has an end.
 */
#include "runner/side.h"

#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/comm.h"
#include "runner/hub.h"
#include "runner/log.h"
#include "runner/process.h"

#define REPORT_MS 1000
#define CONNECT_SECONDS 6  /* which the launcher's system does, however busy it is */
#define WELCOME_SECONDS 30 /* which it does itself */
#define HEARD_MS 1000

static struct {
    int fd; /* -1: there is no hub */
    int rank, size;
    enum ds_launched launched;
    pid_t parent; /* mpirun, or its daemon on this machine, where dsrun launched this rank */
    ds_side_kill *die;
    pthread_mutex_t lock; /* of sending, and of what follows */
    pthread_cond_t answered;
    int heard;          /* answers so far */
    _Atomic int over;   /* nobody listens any more */
    _Atomic int ending; /* the hub knows that this process ends, and may go before it does */
} side = {.fd = -1, .lock = PTHREAD_MUTEX_INITIALIZER};

static struct {
    _Atomic int64_t step, count, busy_us;
} progress;

void ds_side_step(int64_t step, double seconds)
{
    progress.step = step;
    progress.count++;
    progress.busy_us += (int64_t)(seconds * 1e6);
}

/* ---- sending */

static int send_all(int fd, const char *text, size_t bytes)
{
    while (bytes > 0) {
        ssize_t n = send(fd, text, bytes, MSG_NOSIGNAL);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        text += n;
        bytes -= (size_t)n;
    }
    return 0;
}

static int say(const char *text, size_t bytes)
{
    int rc;

    pthread_mutex_lock(&side.lock);
    rc = side.over ? -1 : send_all(side.fd, text, bytes);
    pthread_mutex_unlock(&side.lock);
    return rc;
}

/* Says it and waits until it is heard. 0: it was. */
static int say_and_wait(const char *text, size_t bytes)
{
    struct timespec end;
    int before, rc = -1;

    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += HEARD_MS / 1000;
    pthread_mutex_lock(&side.lock);
    before = side.heard;
    if (!side.over && send_all(side.fd, text, bytes) == 0) {
        rc = 0;
        while (rc == 0 && side.heard == before && !side.over)
            rc = pthread_cond_timedwait(&side.answered, &side.lock, &end);
        rc = side.heard == before ? -1 : 0;
    }
    pthread_mutex_unlock(&side.lock);
    return rc;
}

/* "state …" or "here …": what hub.h says. */
static void report(const char *word)
{
    char text[1024], site[DS_SITE_BYTES], doing[DS_SITE_BYTES];
    ds_comm_place place;
    int n;

    ds_comm_where(&place);
    ds_site_describe(site, doing, sizeof site);
    n = snprintf(text, sizeof text, "%s %d %lld %d %lld %lld %lld %lld %.6f\t%s\t%s\n", word,
                 place.kind, (long long)place.number, place.peer, (long long)place.calls,
                 (long long)place.bytes, (long long)progress.step, (long long)progress.count,
                 (double)progress.busy_us * 1e-6, site, doing);
    say(text, (size_t)n);
}

/* ---- the watchdog */

static void notify(void)
{
    pthread_mutex_lock(&side.lock);
    side.heard++;
    pthread_cond_broadcast(&side.answered);
    pthread_mutex_unlock(&side.lock);
}

static void leave(void)
{
    pthread_mutex_lock(&side.lock);
    side.over = 1;
    pthread_cond_broadcast(&side.answered);
    pthread_mutex_unlock(&side.lock);
}

/* Whoever watches over this job is cut off from this machine. The daemon that started this rank may
 * not notice for long, as it waits for an answer: it ends as well. */
static void end_daemon(void)
{
    if (side.parent > 1 && getppid() == side.parent)
        kill(side.parent, SIGKILL);
}

static void give_up(void)
{
    end_daemon();
    side.die(1);
}

static void obey(const char *line)
{
    if (!strcmp(line, "heard")) {
        notify();
    } else if (!strcmp(line, "where")) {
        ds_site_sample(1);
        report("here");
    } else if (!strncmp(line, "stop ", 5)) {
        kill(getpid(), atoi(line + 5));
    } else if (!strncmp(line, "die ", 4)) {
        side.die(atoi(line + 4));
    } else if (!strcmp(line, "done")) {
        leave();
    }
}

/* Reads what has come. 0: the connection was closed. */
static int listen_to(char *line, size_t *used, size_t room)
{
    char data[256];
    ssize_t n = recv(side.fd, data, sizeof data, MSG_DONTWAIT);

    if (n < 0)
        return errno == EAGAIN || errno == EINTR;
    for (ssize_t i = 0; i < n; i++) {
        if (data[i] != '\n' && *used < room - 1) {
            line[(*used)++] = data[i];
            continue;
        }
        line[*used] = 0;
        *used = 0;
        obey(line);
    }
    return n > 0;
}

static void *watch(void *unused)
{
    struct pollfd fd = {side.fd, POLLIN, 0};
    double next = ds_seconds();
    char line[128];
    size_t used = 0;

    (void)unused;
    while (!side.over) {
        double left = next - ds_seconds();

        if (left <= 0) {
            ds_site_sample(0);
            report("state");
            next += REPORT_MS / 1e3;
            if (next < ds_seconds()) /* the process was stopped for a while */
                next = ds_seconds() + REPORT_MS / 1e3;
            continue;
        }
        if (poll(&fd, 1, (int)(left * 1e3) + 1) == 1 && !listen_to(line, &used, sizeof line) &&
            !side.over) {
            leave();
            if (!side.ending)
                give_up();
        }
    }
    return NULL;
}

/* ---- joining */

/* A connection to a numeric address, or -1. */
static int connect_to(const char *host, const char *port)
{
    const struct timeval patience = {.tv_sec = CONNECT_SECONDS}, more = {.tv_sec = WELCOME_SECONDS};
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                                   .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV};
    struct addrinfo *to;
    int fd, one = 1;

    if (getaddrinfo(host, port, &hints, &to) != 0)
        return -1;
    fd = socket(to->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0) {
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &more, sizeof more);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (connect(fd, to->ai_addr, to->ai_addrlen) < 0) {
            close(fd);
            fd = -1;
        }
    }
    freeaddrinfo(to);
    return fd;
}

/* Connects, and says who this is. A descriptor, or -1. */
static int call(const char *address, const char *token, const char *channel)
{
    const char *colon = strrchr(address, ':');
    char host[64], hello[160];
    int fd, n;

    if (!colon)
        return -1;
    snprintf(host, sizeof host, "%.*s", (int)(colon - address), address);
    fd = connect_to(host, colon + 1);
    if (fd < 0)
        return -1;
    if (!strcmp(channel, "side")) /* output may wait for a reader as long as it takes */
        ds_hub_lively(fd);
    n = snprintf(hello, sizeof hello, "hello %s %d %s %d %d\n", token, side.rank, channel,
                 (int)getpid(), (int)getpgrp());
    if (send_all(fd, hello, (size_t)n) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static int welcomed(int fd)
{
    char text[8];

    return recv(fd, text, sizeof text, MSG_WAITALL) == sizeof text && !memcmp(text, "welcome\n", 8);
}

/* stdout or stderr becomes a connection to the hub. What it was stays open: where mpirun sees both
 * closed it takes the rank for ended, and gives it no more of standard input. */
static int redirect(int fd, const char *address, const char *token, const char *channel)
{
    const struct timeval forever = {0};
    int other = call(address, token, channel), rc = -1;

    if (other < 0)
        return -1;
    fcntl(fd, F_DUPFD_CLOEXEC, 100);
    setsockopt(other, SOL_SOCKET, SO_SNDTIMEO, &forever, sizeof forever);
    if (welcomed(other)) /* else the hub might hear of this rank's end before of its output */
        rc = dup2(other, fd);
    close(other);
    return rc;
}

static int start_thread(void *(*run)(void *), void *data)
{
    pthread_t thread;
    sigset_t all, before;
    int rc;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the main thread's */
    rc = pthread_create(&thread, NULL, run, data);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc != 0)
        return ds_fail(DS_ECOMM, "no thread for the side channel: %s", strerror(rc));
    pthread_detach(thread);
    return 0;
}

static int join(const ds_rank *rank, const char *address, const char *token, ds_side_kill *die)
{
    int fd, rc;

    side.rank = rank->rank;
    side.size = rank->size;
    side.launched = rank->launched;
    side.parent = rank->launched == DS_BY_DSRUN && rank->nodes > 1 ? getppid() : 0;
    side.die = die;
    fd = call(address, token, "side");
    if (fd < 0 || !welcomed(fd)) {
        static const int no_answer[] = {EINPROGRESS, ETIMEDOUT, EHOSTUNREACH, ENETUNREACH};
        int error = errno;

        if (fd >= 0)
            close(fd);
        for (size_t i = 0; i < sizeof no_answer / sizeof *no_answer; i++)
            if (error == no_answer[i])
                end_daemon();
        errno = error;
        return ds_fail(DS_ECOMM, "rank %d: the launcher does not answer at %s: %s", rank->rank,
                       address, errno ? strerror(errno) : "it knows no such rank");
    }
    side.fd = fd;
    rc = start_thread(watch, NULL); /* first, as what follows may be cut off, too */
    if (rc == 0 && rank->launched == DS_BY_DSRUN &&
        (redirect(STDOUT_FILENO, address, token, "out") < 0 ||
         redirect(STDERR_FILENO, address, token, "err") < 0))
        rc = ds_fail(DS_ECOMM, "rank %d: the launcher takes no output at %s", rank->rank, address);
    return rc;
}

/* The launcher's address for machine number `node`: DSRUN_SIDE is "PORT ADDRESS;ADDRESS…", one for
 * each. 0: there is none. */
static int address_for(char *out, size_t bytes, const char *all, int node)
{
    size_t port = strcspn(all, " ");
    const char *at = all[port] ? all + port + 1 : NULL;

    for (; at && node > 0; node--) {
        at = strchr(at, ';');
        at += at ? 1 : 0;
    }
    if (!at || node < 0)
        return 0;
    return snprintf(out, bytes, "%.*s:%.*s", (int)strcspn(at, ";"), at, (int)port, all) <
           (int)bytes;
}

int ds_side_join(const ds_rank *rank, ds_side_kill *die)
{
    const char *all = getenv("DSRUN_SIDE"), *token = getenv("DSRUN_JOB");
    char address[96];

    side.rank = rank->rank;
    side.size = rank->size;
    if (rank->launched != DS_BY_DSRUN)
        return 0;
    if (!token || !address_for(address, sizeof address, all, rank->node))
        return ds_fail(DS_ECOMM,
                       "DSRUN_SIDE is set ('%.80s'), and is not for a rank of this job: start "
                       "dsrun with --num_gpus or --hostfile, or unset DSRUN_SIDE",
                       all);
    return join(rank, address, token, die);
}

/* ---- rank 0's hub */

void ds_side_token(char *out)
{
    unsigned char bytes[(DS_TOKEN_BYTES - 1) / 2];

    if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes)
        for (size_t i = 0; i < sizeof bytes; i++) /* a kernel without it: only not to be empty */
            bytes[i] = (unsigned char)((uint64_t)(ds_seconds() * 1e9) >> i % 8);
    for (size_t i = 0; i < sizeof bytes; i++)
        snprintf(out + 2 * i, 3, "%02x", bytes[i]);
}

static void say_here(void *data, int rank, const char *text)
{
    (void)data;
    (void)rank;
    fprintf(stderr, "%s\n", text);
}

static void *serve(void *data)
{
    ds_hub *h = data;
    struct pollfd fd = {ds_hub_fd(h), POLLIN, 0};
    const struct timespec patience = {.tv_sec = 1, .tv_nsec = 500000000};

    while (!side.over && ds_hub_trouble(h) == DS_TROUBLE_NONE) {
        poll(&fd, 1, 500);
        ds_hub_serve(h, ds_seconds());
    }
    if (ds_hub_trouble(h) == DS_TROUBLE_LOST || ds_hub_trouble(h) == DS_TROUBLE_STUCK) {
        if (ds_hub_trouble(h) == DS_TROUBLE_LOST)
            fprintf(stderr, "dsrun: rank %d is gone, %s\n", ds_hub_culprit(h),
                    ds_hub_last_seen(h, ds_hub_culprit(h)));
        nanosleep(&patience, NULL); /* a launcher that sees it too knows the right exit code */
        ds_hub_kill(h, 1, ds_seconds());
        side.die(1);
    }
    ds_hub_close(h);
    return NULL;
}

/* Where the hub may be reached, and the job's token, as rank 0 tells all others. */
typedef struct invitation {
    char address[8][72], token[DS_TOKEN_BYTES];
} invitation;

/* The addresses of this machine, its own for itself first. */
static int list_addresses(invitation *out, int port)
{
    struct ifaddrs *all, *a;
    int n = 0;

    snprintf(out->address[n++], sizeof *out->address, "127.0.0.1:%d", port);
    if (getifaddrs(&all) < 0)
        return n;
    for (a = all; a && n < 8; a = a->ifa_next) {
        char host[64];
        int family = a->ifa_addr ? a->ifa_addr->sa_family : 0;
        socklen_t length =
            family == AF_INET ? sizeof(struct sockaddr_in) : (socklen_t)sizeof(struct sockaddr_in6);

        if ((family == AF_INET || family == AF_INET6) && !(a->ifa_flags & IFF_LOOPBACK) &&
            (a->ifa_flags & IFF_UP) &&
            getnameinfo(a->ifa_addr, length, host, sizeof host, NULL, 0, NI_NUMERICHOST) == 0 &&
            !strchr(host, '%')) /* such an address has a meaning on this machine only */
            snprintf(out->address[n++], sizeof *out->address, "%.60s:%d", host, port);
    }
    freeifaddrs(all);
    return n;
}

static int invite(invitation *out, const ds_rank *rank)
{
    ds_hub_config config = {.ranks = rank->size, .timeout = 600, .say = say_here};
    static char token[DS_TOKEN_BYTES];
    ds_hub *h;
    int rc;

    ds_side_token(token);
    config.token = token;
    config.nodes = rank->local_size < rank->size ? 2 : 1; /* or more */
    rc = ds_hub_open(&h, &config, ds_seconds());
    if (rc < 0)
        return rc;
    list_addresses(out, ds_hub_port(h));
    memcpy(out->token, token, sizeof token);
    return start_thread(serve, h);
}

int ds_side_meet(const ds_rank *rank, ds_side_kill *die)
{
    invitation all = {.token = ""};
    ds_tensor t = {.data = &all,
                   .numel = sizeof all,
                   .shape = {sizeof all},
                   .stride = {1},
                   .ndim = 1,
                   .dtype = DS_U8,
                   .dense = 1};
    ds_comm *world;
    int rc;

    if (rank->launched != DS_BY_ANOTHER || rank->size == 1)
        return 0;
    rc = ds_comm_world(&world);
    if (rc == 0 && rank->rank == 0)
        rc = invite(&all, rank);
    if (rc == 0)
        rc = ds_broadcast(&t, 0, world, NULL);
    if (rc == 0)
        ds_comm_count_anew(world);
    if (rc < 0)
        return rc;
    rc = DS_ECOMM;
    for (int i = 0; i < 8 && *all.address[i] && rc < 0; i++)
        rc = join(rank, all.address[i], all.token, die);
    return rc;
}

/* ---- the end */

void ds_side_failed(const char *message)
{
    size_t room = strlen(message) + 32;
    char *text = malloc(room);
    int told = 0;

    fflush(stdout);
    if (side.fd >= 0 && text) {
        int n = snprintf(text, room, "failed %zu\n%s", strlen(message), message);
        told = say_and_wait(text, (size_t)n) == 0;
    }
    if (!told && side.size > 1)
        fprintf(stderr, "rank %d: %s\n", side.rank, message);
    else if (!told)
        fprintf(stderr, "%s\n", message);
    free(text);
}

int ds_side_end(int code)
{
    char text[24];
    int n = snprintf(text, sizeof text, "end %d\n", code), told;

    if (side.fd < 0)
        return code;
    fflush(NULL);
    told = say_and_wait(text, (size_t)n) == 0;
    side.ending = 1;
    return told && side.launched == DS_BY_DSRUN ? 0 : code;
}
