/* remote.c - a command on many hosts at once, over ssh.
 *
 * One ssh each, one loop for all of them. A command is over when its output is closed and its
 * process has ended: the errors are not waited for, as an ssh that stays behind to share its
 * connection (ControlPersist) may hold them open.
 */
#include "runner/remote.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/child.h"
#include "runner/ds.h"
#include "runner/machine.h"

#define MOST 64         /* at a time */
#define MOMENT 0.005    /* between looks whether a process that is about to end has ended */
#define CONNECT_MOST 10 /* seconds for a connection, of which the rest is for the command */

/* A child and what goes in and out. Descriptors: -1 when closed. */
typedef struct job {
    ds_remote *r;
    pid_t pid;
    int in, out, err;
    size_t sent, output_bytes, errors_bytes;
    double began;
} job;

/* ---- this machine or another */

static int same_label(const char *a, const char *b)
{
    size_t n = strcspn(a, "."), m = strcspn(b, ".");

    /* worker-1 is worker-1.cluster; worker-1.a is not worker-1.b */
    return n == m && !strncasecmp(a, b, n) && (!a[n] || !b[m] || !strcasecmp(a, b));
}

int ds_remote_is_here(const char *host)
{
    const char *at = strrchr(host, '@'), *name = at ? at + 1 : host;
    char own[HOST_NAME_MAX + 1] = "";
    unsigned char address[16];

    if (inet_pton(AF_INET, name, address) == 1)
        return address[0] == 127 || ds_machine_has(AF_INET, address);
    if (inet_pton(AF_INET6, name, address) == 1)
        return ds_machine_has(AF_INET6, address);
    gethostname(own, sizeof own - 1);
    return !strcasecmp(name, "localhost") || (*name && same_label(name, own));
}

/* ---- the command line */

/* Backslashes stand outside of the quotes, too: inside them fish has a meaning for them. */
void ds_remote_quote(FILE *to, const char *word)
{
    fputc('\'', to);
    for (const char *c = word; *c; c++)
        if (*c == '\'' || *c == '\\')
            fprintf(to, "'\\%c'", *c);
        else
            fputc(*c, to);
    fputc('\'', to);
}

/* What a login shell, which may be any, makes `sh -c command` of. The caller frees it. */
static char *for_login_shell(const char *command)
{
    char *text = NULL;
    size_t bytes;
    FILE *f = open_memstream(&text, &bytes);

    if (!f)
        return NULL;
    fputs("sh -c ", f);
    ds_remote_quote(f, command);
    return fclose(f) == 0 ? text : NULL;
}

/* What ssh is told; the user's configuration has the rest. */
static const char *const ssh_options[] = {
    "BatchMode=yes", /* never asks */
    /* for a host that is cut off while much is sent to it */
    "ServerAliveInterval=2",
    "ServerAliveCountMax=3",
    /* what is configured for sessions in which the user types */
    "ClearAllForwardings=yes",
    "RemoteCommand=none",
};

#define OPTIONS ((int)(sizeof ssh_options / sizeof *ssh_options))

/* What a command line needs memory for. */
typedef struct words {
    const char *argv[2 * OPTIONS + 16];
    char connect[40], port[40], control[160];
} words;

static void ssh_command(words *w, const ds_ssh *ssh, const char *host, const char *quoted,
                        double seconds)
{
    double wait = seconds * 0.8 > CONNECT_MOST ? CONNECT_MOST : seconds * 0.8;
    int n = 0;

    const char **argv = w->argv;

    snprintf(w->connect, sizeof w->connect, "ConnectTimeout=%d", wait > 1 ? (int)wait : 1);
    argv[n++] = "ssh";
    argv[n++] = "-T";
    for (int i = 0; i <= OPTIONS; i++) {
        argv[n++] = "-o";
        argv[n++] = i < OPTIONS ? ssh_options[i] : w->connect;
    }
    if (ssh->port) {
        snprintf(w->port, sizeof w->port, "%d", ssh->port);
        argv[n++] = "-p";
        argv[n++] = w->port;
    }
    if (ssh->control) {
        snprintf(w->control, sizeof w->control, "ControlPath=%s", ssh->control);
        argv[n++] = "-oControlMaster=auto";
        argv[n++] = "-oControlPersist=10";
        argv[n++] = "-o";
        argv[n++] = w->control;
    }
    argv[n++] = "--";
    argv[n++] = host;
    argv[n++] = quoted;
    argv[n] = NULL;
}

static int start(job *j, const ds_ssh *ssh, const char *command, const char *quoted, double seconds)
{
    words w = {.argv = {"sh", "-c", command, NULL}};
    int in[2], out[2] = {-1, -1}, err[2] = {-1, -1}, rc = -1;

    if (!ds_remote_is_here(j->r->host))
        ssh_command(&w, ssh, j->r->host, quoted, seconds);
    /* a socket, as writing to one whose reader has gone need not raise SIGPIPE */
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, in) < 0)
        return ds_fail(DS_EIO, "no socket: %s", strerror(errno));
    if (pipe2(out, O_CLOEXEC | O_NONBLOCK) == 0 && pipe2(err, O_CLOEXEC | O_NONBLOCK) == 0) {
        fcntl(out[1], F_SETFL, 0);
        fcntl(err[1], F_SETFL, 0);
        rc = ds_child_spawn(&j->pid, (char *const *)w.argv, (int[]){in[1], out[1], err[1]});
    } else {
        ds_fail(DS_EIO, "no pipe: %s", strerror(errno));
    }
    close(in[1]);
    close(out[1]);
    close(err[1]);
    if (rc < 0) {
        close(in[0]);
        close(out[0]);
        close(err[0]);
        j->pid = 0;
        return DS_EIO;
    }
    j->in = in[0];
    j->out = out[0];
    j->err = err[0];
    return 0;
}

/* ---- what goes in and out */

static void shut(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void feed(job *j)
{
    size_t left = j->r->input ? j->r->input_bytes - j->sent : 0;
    ssize_t n = left ? send(j->in, j->r->input + j->sent, left, MSG_NOSIGNAL | MSG_DONTWAIT) : 0;

    if (n > 0)
        j->sent += (size_t)n;
    if ((n < 0 && errno != EAGAIN && errno != EINTR) || !left || j->sent == j->r->input_bytes)
        shut(&j->in);
}

/* Reads what there is into *text, a text of *bytes bytes that grows to `most`; more is dropped.
 * Closes the descriptor at the end. */
static int drain(int *fd, char **text, size_t *bytes, size_t most)
{
    char block[16384];

    for (int i = 0; i < 64 && *fd >= 0; i++) { /* who writes without end is left at times, too */
        ssize_t n = read(*fd, block, sizeof block);
        size_t kept;
        char *grown;

        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return 0;
        if (n <= 0) {
            shut(fd);
            return 0;
        }
        kept = (size_t)n < most - *bytes ? (size_t)n : most - *bytes;
        if (!kept)
            continue;
        grown = realloc(*text, *bytes + kept + 1);
        if (!grown)
            return ds_fail(DS_ENOMEM, "out of memory");
        memcpy(grown + *bytes, block, kept);
        *bytes += kept;
        grown[*bytes] = 0;
        *text = grown;
    }
    return 0;
}

static int drain_both(job *j)
{
    int rc = drain(&j->out, &j->r->output, &j->output_bytes, DS_REMOTE_OUTPUT);

    return rc < 0 ? rc : drain(&j->err, &j->r->errors, &j->errors_bytes, DS_REMOTE_ERRORS);
}

static int settle(job *j, int code)
{
    int rc = drain_both(j);

    shut(&j->in);
    shut(&j->out);
    shut(&j->err);
    j->r->code = code;
    j->r->seconds = ds_seconds() - j->began;
    j->pid = 0;
    return rc;
}

static int end(job *j)
{
    int status;

    kill(-j->pid, SIGKILL);
    while (waitpid(j->pid, &status, 0) < 0 && errno == EINTR)
        ;
    return settle(j, -1);
}

/* ---- the loop */

typedef struct run {
    const ds_ssh *ssh;
    const char *command;
    char *quoted;
    double seconds;
    job jobs[MOST]; /* pid 0: free */
    struct pollfd fds[3 * MOST + 1];
} run;

static int begin(run *run, ds_remote *r)
{
    job *j = run->jobs;

    while (j->pid)
        j++;
    *j = (job){.r = r, .in = -1, .out = -1, .err = -1, .began = ds_seconds()};
    return start(j, run->ssh, run->command, run->quoted, run->seconds);
}

/* Waits until something can be done. 1: all is to be given up. */
static int wait_for_any(run *run)
{
    double now = ds_seconds(), wait = run->seconds;
    int n = 0;

    for (int i = 0; i < MOST; i++) {
        job *j = &run->jobs[i];
        double left = j->began + run->seconds - now;

        if (!j->pid)
            continue;
        run->fds[n++] = (struct pollfd){j->in, POLLOUT, 0};
        run->fds[n++] = (struct pollfd){j->out, POLLIN, 0};
        run->fds[n++] = (struct pollfd){j->err, POLLIN, 0};
        left = j->out < 0 && left > MOMENT ? MOMENT : left;
        wait = left < wait ? left : wait;
    }
    run->fds[n++] = (struct pollfd){run->ssh->cancel ? run->ssh->cancel : -1, POLLIN, 0};
    if (poll(run->fds, (nfds_t)n, wait > 0 ? (int)(wait * 1e3) + 1 : 0) < 0)
        return 0; /* a signal; look again */
    return run->fds[n - 1].revents != 0;
}

/* 1: it is over. */
static int serve(job *j, double seconds)
{
    int status, rc = drain_both(j);

    if (rc < 0)
        return rc;
    if (j->in >= 0)
        feed(j);
    if (j->out < 0 && waitpid(j->pid, &status, WNOHANG) == j->pid) {
        rc = settle(j, WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
        return rc < 0 ? rc : 1;
    }
    if (ds_seconds() - j->began < seconds)
        return 0;
    rc = end(j);
    return rc < 0 ? rc : 1;
}

static int run_all(run *run, ds_remote *each, int n)
{
    int next = 0, busy = 0, rc = 0;

    while (next < n || busy) {
        while (next < n && busy < MOST) {
            rc = begin(run, &each[next++]);
            if (rc < 0)
                return rc;
            busy++;
        }
        if (wait_for_any(run))
            return ds_fail(DS_ECOMM, "given up before all hosts had answered");
        for (int i = 0; i < MOST; i++) {
            if (!run->jobs[i].pid)
                continue;
            rc = serve(&run->jobs[i], run->seconds);
            if (rc < 0)
                return rc;
            busy -= rc;
        }
    }
    return 0;
}

int ds_remote_run(ds_remote *each, int n, const ds_ssh *ssh, const char *command, double seconds)
{
    static const ds_ssh defaults;
    run *all = calloc(1, sizeof *all);
    int rc = 0;

    for (int i = 0; i < n; i++) {
        each[i].code = -1;
        each[i].output = strdup("");
        each[i].errors = strdup("");
        if (!each[i].output || !each[i].errors)
            rc = DS_ENOMEM;
    }
    if (all)
        all->quoted = for_login_shell(command);
    if (!all || !all->quoted)
        rc = DS_ENOMEM;
    if (rc == 0) {
        all->ssh = ssh ? ssh : &defaults;
        all->command = command;
        all->seconds = seconds;
        rc = run_all(all, each, n);
        for (int i = 0; i < MOST; i++)
            if (all->jobs[i].pid)
                end(&all->jobs[i]);
    } else {
        ds_fail(rc, "out of memory");
    }
    if (all)
        free(all->quoted);
    free(all);
    return rc;
}

void ds_remote_free(ds_remote *each, int n)
{
    for (int i = 0; each && i < n; i++) {
        free(each[i].output);
        free(each[i].errors);
        each[i].output = each[i].errors = NULL;
    }
}

/* ---- what went wrong */

const char *ds_remote_last_line(size_t *bytes, const char *text)
{
    const char *end = text + strlen(text), *begin;

    while (end > text && strchr(" \t\r\n", end[-1]))
        end--;
    for (begin = end; begin > text && begin[-1] != '\n'; begin--)
        ;
    *bytes = (size_t)(end - begin);
    return begin;
}

/* By what ssh says; the host's name follows. */
static const struct {
    const char *says, *advice;
} advices[] = {
    {"Permission denied", "set up a key without a password: ssh-copy-id"},
    {"Host key verification failed", "its key is not known, or has changed: compare it in ssh"},
    {"Could not resolve", "no such name: is it right in the hostfile? try ssh"},
    {"Connection refused", "does sshd run there, at this port (--ssh_port)? try ssh"},
    {"not responding", "is it up, and can it be reached from here? try ssh"},
    {"timed out", "is it up, and can it be reached from here? try ssh"},
    {"No route to host", "is it up, and can it be reached from here? try ssh"},
    {"unreachable", "is it up, and can it be reached from here? try ssh"},
    {"", "try ssh"},
};

static const char *advice_for(const char *line, size_t bytes)
{
    int i = 0;

    while (!memmem(line, bytes, advices[i].says, strlen(advices[i].says)))
        i++;
    return advices[i].advice;
}

void ds_remote_why(FILE *to, const ds_remote *r)
{
    size_t bytes;
    const char *line = ds_remote_last_line(&bytes, r->errors);

    if (bytes && line[bytes - 1] == '.')
        bytes--;
    if (r->code == 127 && !bytes && !*r->output && !ds_remote_is_here(r->host))
        fputs("there is no ssh on this machine: install openssh-client", to);
    else if (r->code == -1)
        fprintf(to, "no answer within %.0f s: is it up? try ssh %s", r->seconds, r->host);
    else if (r->code == 255 && !bytes)
        fprintf(to, "ssh ended without a word: try ssh %s", r->host);
    else if (r->code == 255)
        fprintf(to, "%s%.*s: %s %s", strncmp(line, "ssh: ", 5) ? "ssh: " : "", (int)bytes, line,
                advice_for(line, bytes), r->host);
    else
        fprintf(to, "ended with code %d%s%.*s", r->code, bytes ? ": " : "", (int)bytes, line);
}
