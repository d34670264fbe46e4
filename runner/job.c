/* job.c - one start of a job's ranks, from dsrun's side, to the end of all of them.
 *
 * mpirun starts the ranks, so that MPI works in them; all else goes over the side channel (hub.h):
 * their output, signals, exit codes, and what is known of them when they hang. So mpirun's own
 * words matter only when nobody else has any, and are kept back until then.
 *
 * One loop waits for everything: signals, the hub, mpirun, and room on stdout and stderr.
 */
#include "runner/job.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/child.h"
#include "runner/ds.h"
#include "runner/hub.h"
#include "runner/lines.h"
#include "runner/log.h"
#include "runner/remote.h"
#include "runner/side.h"

#define GAVE_UP 124       /* exit code: no progress, or no answer; timeout(1) has it too */
#define LOST_SECONDS 0.4  /* for mpirun to learn how the first rank ended, before the others do */
#define LAST_WORDS 1.0    /* for a rank that failed to end by itself */
#define NOISE_SECONDS 0.3 /* mpirun's words wait, as they may be about a failure we know better */
#define TERM_SECONDS 1.0  /* from ranks' end to SIGTERM for mpirun, and from that to SIGKILL */
#define FAR_SECONDS 2.0   /* between what two programs learn of another machine */
#define DAEMON_LOST 205   /* mpirun's exit code, when its daemon on a host is gone */
#define START_SECONDS 4.0 /* for ranks to start, before hosts are looked at again */
#define ANSWER_SECONDS 3.0
#define FULL (1 << 20) /* bytes that wait to be written, before ranks have to */
#define LOGS_FULL (16 << 20)

typedef struct job {
    const ds_plan *plan;
    ds_job_streams *streams;
    const ds_ssh *ssh;
    ds_hub *hub;
    char token[DS_TOKEN_BYTES];
    pid_t mpirun;
    int noise;             /* what mpirun says; -1: nothing any more */
    int status;            /* mpirun's, once it has ended */
    double ended;          /* when it did; 0: not yet */
    int stop;              /* the signal that asked the job to stop */
    double grace;          /* until when it may take to do so */
    double killed, termed; /* when ranks were, when mpirun was; 0: not */
    int orphaned;          /* 1: mpirun was killed, and not by us, while all was well */
    int now;               /* 1: all ends now: the user wants that, or the grace is over */
    double looked;         /* when hosts were last looked at, or the job began */
    int looks;             /* 1: they may be */
    int lost_host;         /* 1: one did not answer then */
    char said[65536];      /* mpirun's words that are not shown yet */
    size_t said_used;
    double said_at;
} job;

static void output(void *data, int rank, int stream, const char *text, size_t bytes)
{
    ds_lines_add(((job *)data)->streams->lines, rank, (enum ds_stream)stream, text, bytes);
}

static void say(void *data, int rank, const char *text)
{
    ds_lines_say(((job *)data)->streams->lines, rank, text);
}

/* ---- while it runs */

static void on_stop(job *j, int signal)
{
    char text[160];

    if (j->stop) {
        j->now = 1;
        return;
    }
    j->stop = signal;
    j->grace = ds_seconds() + j->plan->options->grace;
    snprintf(text, sizeof text,
             "dsrun: %s: ranks save and end at their next step (once more: they end now)",
             strsignal(signal));
    say(j, -1, text);
    ds_hub_stop(j->hub, signal);
}

static void read_signals(job *j)
{
    struct signalfd_siginfo info;

    while (read(j->streams->signals, &info, sizeof info) == sizeof info) {
        if (info.ssi_signo == SIGUSR2)
            ds_hub_ask(j->hub, ds_seconds());
        else if (info.ssi_signo != SIGCHLD)
            on_stop(j, (int)info.ssi_signo);
    }
    if (!j->ended && waitpid(j->mpirun, &j->status, WNOHANG) == j->mpirun) {
        j->ended = ds_seconds();
        j->orphaned = WIFSIGNALED(j->status) && !j->stop && !j->killed && !j->termed &&
                      ds_hub_trouble(j->hub) == DS_TROUBLE_NONE;
    }
}

/* A line of mpirun's that is said of starts that go well, as it loses a race against ssh. */
static int means_nothing(const char *line)
{
    return strstr(line, "plm:rsh: Warning: setpgid(") != NULL;
}

static void show_noise(job *j)
{
    char *rest = j->said, *line;

    j->said[j->said_used] = 0;
    if (j->said_used && j->said[j->said_used - 1] == '\n')
        j->said[j->said_used - 1] = 0;
    while (j->said_used && (line = strsep(&rest, "\n")))
        if (!means_nothing(line))
            say(j, -1, line);
    j->said_used = 0;
}

static void read_noise(job *j)
{
    size_t room = sizeof j->said - 1 - j->said_used;
    ssize_t n = read(j->noise, j->said + j->said_used, room);

    if (n <= 0) {
        close(j->noise);
        j->noise = -1;
        return;
    }
    if (j->said_used == 0)
        j->said_at = ds_seconds();
    j->said_used += (size_t)n;
    if (j->said_used == sizeof j->said - 1)
        show_noise(j);
}

/* Open MPI notices that a host is gone at about the same time as the side channel does. */
static double patience(const job *j, double seconds)
{
    return j->plan->network ? seconds + FAR_SECONDS : seconds;
}

static void say_host(job *j, const ds_remote *host)
{
    char *text = NULL;
    size_t bytes;
    FILE *f = open_memstream(&text, &bytes);

    if (!f)
        return;
    fprintf(f, "dsrun: %s: ", host->host);
    ds_remote_why(f, host);
    fputs(" (its ranks have not started)", f);
    if (fclose(f) == 0)
        say(j, -1, text);
    free(text);
}

/* While ranks are awaited, a host that has gone is noticed by nobody: mpirun waits for its daemon as
 * long as it takes. So hosts are asked again now and then; and where mpirun gave up, which does not
 * always say for which host it did. */
static void look_at_hosts(job *j)
{
    const ds_ssh ssh = {.port = j->ssh->port, .cancel = j->ssh->cancel}; /* connections anew */
    const ds_hosts *hosts = &j->plan->hosts;
    ds_remote *each = calloc((size_t)hosts->count, sizeof *each);

    for (int h = 0; each && h < hosts->count; h++)
        each[h].host = hosts->host[h].name;
    if (each && ds_remote_run(each, hosts->count, &ssh, "true", ANSWER_SECONDS) == 0) {
        for (int h = 0; h < hosts->count; h++) {
            if (each[h].code == 0)
                continue;
            say_host(j, &each[h]);
            j->lost_host = 1;
        }
    }
    if (each)
        ds_remote_free(each, hosts->count);
    free(each);
    j->looked = ds_seconds();
}

/* A rank whose host does not answer, or -1. Others may have gone because of it, and before. */
static int cut_off(const job *j)
{
    for (int r = 0; r < j->plan->ranks; r++)
        if (ds_hub_cut_off(j->hub, r))
            return r;
    return -1;
}

/* How long mpirun may take to end by itself, once its ranks are gone: it tells how the first one ended.
 * Where a host is cut off there is nothing to wait for. */
static double mpirun_time(const job *j)
{
    if (j->lost_host)
        return 0;
    return cut_off(j) >= 0 ? TERM_SECONDS : patience(j, TERM_SECONDS);
}

/* Whether the ranks must be ended by force now. */
static int must_end(const job *j, double now)
{
    int culprit = ds_hub_culprit(j->hub);
    double since = now - ds_hub_since(j->hub);

    if (j->now || j->lost_host)
        return 1;
    switch (ds_hub_trouble(j->hub)) {
    case DS_TROUBLE_STOPPED: /* the others can't go on without it */
        return since > LAST_WORDS;
    case DS_TROUBLE_FAILED:
        return since > LAST_WORDS || (culprit >= 0 && ds_hub_gone(j->hub, culprit));
    case DS_TROUBLE_LOST:
        return since > LOST_SECONDS;
    case DS_TROUBLE_STUCK:
        return 1;
    default:
        return j->ended && !ds_hub_all_gone(j->hub) && now - j->ended > patience(j, LOST_SECONDS);
    }
}

/* From what is known, step by step, to the end of all. */
static void go_on(job *j, double now)
{
    int signal = ds_hub_signal(j->hub);

    if (signal && !j->stop) { /* somebody told a rank, and the ranks have agreed */
        j->stop = signal;
        j->grace = now + j->plan->options->grace;
    }
    if (j->stop && now > j->grace && !j->ended)
        j->now = 1;
    if (j->looks && !j->killed && ds_hub_started(j->hub) < j->plan->ranks &&
        now - j->looked > START_SECONDS)
        look_at_hosts(j);
    if (!j->killed && must_end(j, now)) {
        ds_hub_kill(j->hub, 1, now);
        j->killed = now;
    }
    if (!j->ended && j->killed && now - j->killed >= mpirun_time(j)) {
        if (!j->termed) {
            kill(j->mpirun, SIGTERM);
            j->termed = now;
        } else if (now - j->termed > TERM_SECONDS) {
            kill(-j->mpirun, SIGKILL);
        }
    }
    if (!j->ended && !j->killed && !j->termed && ds_hub_all_gone(j->hub)) {
        j->killed = now; /* nothing is left but mpirun */
    }
    if (j->said_used && now - j->said_at > patience(j, NOISE_SECONDS) && !j->killed && !j->stop &&
        !j->ended && ds_hub_trouble(j->hub) == DS_TROUBLE_NONE)
        show_noise(j);
}

static int over(const job *j, double now)
{
    return j->ended && (ds_hub_all_gone(j->hub) || now - j->ended > patience(j, TERM_SECONDS) ||
                        (ds_hub_started(j->hub) == 0 && now - j->ended > LOST_SECONDS));
}

static void turn(job *j, int wait_ms)
{
    size_t out = ds_lines_waiting(j->streams->lines, DS_STDOUT),
           err = ds_lines_waiting(j->streams->lines, DS_STDERR);
    struct pollfd fds[] = {
        {j->streams->signals, POLLIN, 0},
        {out > FULL || err > FULL || ds_lines_unlogged(j->streams->lines) > LOGS_FULL
             ? -1
             : ds_hub_fd(j->hub),
         POLLIN, 0},
        {j->noise, POLLIN, 0},
        {out ? STDOUT_FILENO : -1, POLLOUT, 0},
        {err ? STDERR_FILENO : -1, POLLOUT, 0},
    };

    poll(fds, sizeof fds / sizeof *fds, wait_ms);
    if (fds[0].revents)
        read_signals(j);
    if (fds[2].revents)
        read_noise(j);
    if (fds[1].fd >= 0)
        ds_hub_serve(j->hub, ds_seconds());
    ds_lines_write(j->streams->lines, DS_STDOUT);
    ds_lines_write(j->streams->lines, DS_STDERR);
}

/* ---- the end */

/* How mpirun says that a process ended: 128 + signal, or its code. Where it was killed itself (it may
 * crash when it is asked to end while it does), the rank was as well, for all that is known. */
static int mpirun_code(const job *j)
{
    return WIFEXITED(j->status) ? WEXITSTATUS(j->status) : 128 + SIGKILL;
}

/* A rank that was gone without a word. */
static int explain_loss(job *j)
{
    int far = cut_off(j), rank = far >= 0 ? far : ds_hub_culprit(j->hub);
    int code = mpirun_code(j), signal = code - 128;
    const char *site = ds_hub_last_seen(j->hub, rank), *why = "";
    char text[1024], how[160], name[DS_NAME_BYTES];

    if (far >= 0) {
        code = GAVE_UP;
        snprintf(how, sizeof how, "is cut off: its machine has not answered for %d s",
                 DS_CUT_OFF_MS / 1000);
    } else if (code == DAEMON_LOST) {
        code = 128 + SIGKILL;
        snprintf(how, sizeof how, "has gone with Open MPI's daemon on its machine");
    } else if (signal > 0 && signal < 65) {
        snprintf(how, sizeof how, "was killed by signal %d (%s)", signal, strsignal(signal));
        if (signal == SIGKILL)
            why = "; the system does that when memory runs out, and then dmesg there says so";
    } else {
        code = code ? code : 1;
        snprintf(how, sizeof how, "ended with code %d", code);
    }
    snprintf(text, sizeof text, "dsrun: %s %s%s%s%s", ds_hub_name(name, j->hub, rank), how,
             *site ? ", " : "", site, why);
    say(j, rank, text);
    return code;
}

static int conclude(job *j)
{
    enum ds_trouble trouble = ds_hub_trouble(j->hub);
    int rank = ds_hub_culprit(j->hub), code = ds_hub_code(j->hub);
    char text[512], name[DS_NAME_BYTES];

    if (j->now || trouble == DS_TROUBLE_STOPPED)
        return 128 + j->stop;
    if (j->orphaned) {
        snprintf(text, sizeof text,
                 "dsrun: mpirun was killed by signal %d (%s), and the ranks with it",
                 WTERMSIG(j->status), strsignal(WTERMSIG(j->status)));
        say(j, -1, text);
        return 128 + WTERMSIG(j->status);
    }
    if (trouble == DS_TROUBLE_FAILED) {
        code = code > 0 ? code : 1;
        snprintf(text, sizeof text, "dsrun: %s ended with code %d", ds_hub_name(name, j->hub, rank),
                 code);
        say(j, rank, text);
        return code;
    }
    if (j->lost_host) /* which was said; others' ranks were ended for it */
        return GAVE_UP;
    if (trouble == DS_TROUBLE_LOST || cut_off(j) >= 0)
        return explain_loss(j);
    if (trouble == DS_TROUBLE_STUCK)
        return GAVE_UP;
    if (ds_hub_signal(j->hub))
        return 128 + ds_hub_signal(j->hub);
    if (ds_hub_started(j->hub) == j->plan->ranks && mpirun_code(j) == 0)
        return 0;
    if (j->stop)
        return 128 + j->stop;
    show_noise(j);
    if (j->plan->network && !j->plan->slurm && !j->plan->options->srun &&
        ds_hub_started(j->hub) < j->plan->ranks)
        look_at_hosts(j);
    code = mpirun_code(j);
    snprintf(text, sizeof text, "dsrun: %s ended with code %d before all ranks had %s",
             j->plan->options->srun ? "srun" : "mpirun", code,
             ds_hub_started(j->hub) < j->plan->ranks ? "started" : "ended");
    say(j, -1, text);
    return code ? code : 1;
}

static void flush(job *j)
{
    double end = ds_seconds() + (j->now ? 1 : 3600);

    for (;;) {
        size_t logs = ds_lines_unlogged(j->streams->lines), out, err;

        ds_lines_write(j->streams->lines, DS_STDERR); /* with what is to be said of those */
        out = ds_lines_waiting(j->streams->lines, DS_STDOUT);
        err = ds_lines_waiting(j->streams->lines, DS_STDERR);
        if (!(out || err || logs) || j->now || ds_seconds() > end)
            return;
        turn(j, out || err ? 100 : 5);
    }
}

/* ---- the start */

static int start_ranks(job *j, ds_start *start)
{
    char **command = NULL;
    int rc = ds_mpirun_command(&command, start);

    if (rc == 0)
        rc = ds_mpirun_hosts(start);
    if (rc == 0)
        rc = ds_plan_apply(j->plan);
    if (rc == 0)
        /* Rank 0 reads what is piped in; a terminal stays with the shell's own group. */
        rc = ds_child_start(&j->mpirun, &j->noise, command, !isatty(STDIN_FILENO));
    ds_mpirun_free(command);
    return rc;
}

int ds_job_run(int *failed, ds_plan *plan, ds_start *start, ds_job_streams *streams, int restarts)
{
    job *j = calloc(1, sizeof *j);
    ds_hub_config config = {.ranks = plan->ranks,
                            .nodes = plan->network ? plan->hosts.count + 1 : 1,
                            .where = (const char *const *)plan->where,
                            .timeout = plan->options->timeout,
                            .data = j,
                            .output = output,
                            .say = say};
    int code;

    *failed = 0;
    if (!j)
        return ds_fail(DS_ENOMEM, "out of memory");
    *j = (job){.plan = plan, .streams = streams, .noise = -1};
    j->ssh = &start->ssh;
    j->looked = ds_seconds();
    j->looks = plan->network && !plan->slurm && !plan->options->value[DS_OPT_no_ssh_check];
    ds_side_token(j->token);
    config.token = j->token;
    config.folder = start->folder;
    code = ds_hub_open(&j->hub, &config, ds_seconds());
    if (code == 0)
        code = ds_plan_finish(plan, ds_hub_port(j->hub), j->token, start->folder, restarts);
    if (code == 0)
        code = start_ranks(j, start);
    if (code == 0) {
        while (!over(j, ds_seconds())) {
            turn(j, 100);
            go_on(j, ds_seconds());
        }
        ds_hub_serve(j->hub, ds_seconds());
        code = conclude(j);
        if (ds_log_shows(DS_LOG_DEBUG))
            show_noise(j);
        if (code != 0 && plan->network) /* ssh may still be waiting for a host, for mpirun */
            ds_child_end_job(start->folder);
        *failed = code > 0 && (j->orphaned || (!j->stop && !ds_hub_signal(j->hub)));
        flush(j);
    }
    if (j->noise >= 0)
        close(j->noise);
    ds_hub_close(j->hub);
    free(j);
    return code;
}
