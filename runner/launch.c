/* launch.c - a job of several ranks on this machine, from dsrun's side.
 *
 * mpirun starts the ranks, so that MPI works in them; all else goes over the side channel (hub.h):
 * their output, signals, exit codes, and what is known of them when they hang. So mpirun's own
 * words matter only when nobody else has any, and are kept back until then.
 *
 * One loop waits for everything: signals, the hub, mpirun, and room on stdout and stderr.
 */
#include "runner/launch.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/child.h"
#include "runner/ds.h"
#include "runner/hub.h"
#include "runner/lines.h"
#include "runner/log.h"
#include "runner/mpirun.h"
#include "runner/rank.h"
#include "runner/side.h"
#include "runner/threads.h"

#define GAVE_UP 124       /* exit code: no progress for --timeout seconds; timeout(1) has it too */
#define LOST_SECONDS 0.15 /* for mpirun to learn how the first rank ended, before the others do */
#define LAST_WORDS 1.0    /* for a rank that failed to end by itself */
#define NOISE_SECONDS 0.3 /* mpirun's words wait, as they may be about a failure we know better */
#define TERM_SECONDS 1.0  /* from ranks' end to SIGTERM for mpirun, and from that to SIGKILL */
#define FULL (1 << 20)    /* bytes that wait to be written, before ranks have to */

typedef struct job {
    const ds_options *options;
    ds_hub *hub;
    ds_lines *lines;
    char token[DS_TOKEN_BYTES];
    char folder[64], pid_file[PATH_MAX];
    pid_t mpirun, cleaner;
    int signals, noise, cleaner_pipe; /* descriptors; -1: none */
    int status;                       /* mpirun's, once it has ended */
    double ended;                     /* when it did; 0: not yet */
    int stop;                         /* the signal that asked the job to stop */
    double grace;                     /* until when it may take to do so */
    double killed, termed;            /* when ranks were, when mpirun was; 0: not */
    int now;          /* 1: all ends now: the user wants that, or the grace is over */
    char said[65536]; /* mpirun's words that are not shown yet */
    size_t said_used;
    double said_at;
} job;

/* ---- preparing */

static void output(void *data, int rank, int stream, const char *text, size_t bytes)
{
    ds_lines_add(((job *)data)->lines, rank, (enum ds_stream)stream, text, bytes);
}

static void say(void *data, int rank, const char *text)
{
    ds_lines_say(((job *)data)->lines, rank, text);
}

static void group(void *data, int id, int on)
{
    int told = on ? id : -id;

    if (write(((job *)data)->cleaner_pipe, &told, sizeof told) < 0)
        return; /* it is gone; nothing here depends on it */
}

static const char *temporary(void)
{
    const char *folder = getenv("TMPDIR");

    return folder && *folder && strlen(folder) < PATH_MAX - 64 ? folder : "/tmp";
}

/* A folder for mpirun's files; in memory where that is possible, and with a short name, as sockets
 * are made in it. */
static int make_folder(job *j)
{
    const char *places[] = {"/dev/shm", temporary(), "/tmp"};

    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        int n =
            snprintf(j->folder, sizeof j->folder, "%s/dsrun-%d-XXXXXX", places[i], (int)getpid());
        if (n < (int)sizeof j->folder && mkdtemp(j->folder))
            return 0;
    }
    return ds_fail(DS_EIO, "cannot make a folder in /dev/shm, %s or /tmp: %s", temporary(),
                   strerror(errno));
}

static int write_pid(job *j)
{
    FILE *f;

    if (!j->options->value[DS_OPT_save_pid])
        return 0;
    snprintf(j->pid_file, sizeof j->pid_file, "%s/%d.ds", temporary(), (int)getpid());
    f = fopen(j->pid_file, "w");
    if (!f)
        return ds_fail(DS_EIO, "--save_pid: cannot write %s: %s", j->pid_file, strerror(errno));
    fprintf(f, "%d", (int)getpid());
    return fclose(f) == 0 ? 0 : ds_fail(DS_EIO, "--save_pid: cannot write %s", j->pid_file);
}

static void set_number(const char *name, int value, int replace)
{
    char text[16];

    snprintf(text, sizeof text, "%d", value);
    setenv(name, text, replace);
}

/* The cores that ranks are tied to, as a list for them, or none. */
static int share_cores(const ds_options *options, int *cores)
{
    const char *given = options->value[DS_OPT_bind_core_list];
    int cpu[CPU_SETSIZE], n = 0;
    char list[CPU_SETSIZE * 5];
    size_t used = 0;
    cpu_set_t set;

    unsetenv("DSRUN_CPUS");
    *cores = ds_threads_cores(&set);
    if (!given && !options->value[DS_OPT_bind_cores_to_rank])
        return 0;
    if (given)
        n = ds_rank_cpus(cpu, CPU_SETSIZE, given);
    for (int i = 0; !given && i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &set))
            cpu[n++] = i;
    if (n < 0)
        return n;
    if (n < options->num_ranks)
        return ds_fail(DS_EINVAL, "%d ranks cannot be tied to %d cores, as one has at least one",
                       options->num_ranks, n);
    for (int i = 0; i < n; i++)
        used += (size_t)snprintf(list + used, sizeof list - used, "%s%d", i ? "," : "", cpu[i]);
    setenv("DSRUN_CPUS", list, 1);
    *cores = n;
    return 0;
}

/* What ranks find in their environment; mpirun passes it on. */
static int set_environment(const job *j)
{
    const ds_options *options = j->options;
    const char *address = options->value[DS_OPT_master_addr];
    const char *port = options->value[DS_OPT_master_port];
    const char *given = getenv("OMP_NUM_THREADS");
    char side[32];
    int cores, threads, rc = share_cores(options, &cores);

    if (rc < 0)
        return rc;
    threads = given && atoi(given) > 0 ? atoi(given) : cores / options->num_ranks;
    threads = threads > 0 ? threads : 1;
    set_number("OMP_NUM_THREADS", threads, 1);
    if (threads * options->num_ranks > cores) /* who spins takes the time of who computes */
        setenv("OMP_WAIT_POLICY", "passive", 0);
    snprintf(side, sizeof side, "127.0.0.1:%d", ds_hub_port(j->hub));
    setenv("DSRUN_SIDE", side, 1);
    setenv("DSRUN_JOB", j->token, 1);
    setenv("MASTER_ADDR", address ? address : "127.0.0.1", 1);
    setenv("MASTER_PORT", port ? port : "29500", 1);
    unsetenv("DSRUN_PID");
    return 0;
}

static int open_signals(job *j)
{
    static const int wanted[] = {SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGCHLD};
    sigset_t set;

    sigemptyset(&set);
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        signal(wanted[i], SIG_DFL); /* an ignored one would not come */
        sigaddset(&set, wanted[i]);
    }
    sigprocmask(SIG_BLOCK, &set, NULL);
    j->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return j->signals < 0 ? ds_fail(DS_EIO, "no signalfd: %s", strerror(errno)) : 0;
}

static int start_mpirun(job *j, int major, int argc, char **argv)
{
    char program[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    const ds_mpirun what = {j->options->num_ranks, j->folder, program, argc - 1, argv + 1};
    char **command = NULL;
    int rc;

    if (length <= 0)
        return ds_fail(DS_ENOENT, "cannot read /proc/self/exe");
    program[length] = 0;
    rc = ds_mpirun_command(&command, &what, major);
    if (rc == 0)
        /* Rank 0 reads what is piped in; a terminal stays with the shell's own group. */
        rc = ds_child_start(&j->mpirun, &j->noise, command, !isatty(STDIN_FILENO));
    ds_mpirun_free(command);
    return rc;
}

static int prepare(job *j, int argc, char **argv)
{
    const ds_options *o = j->options;
    const ds_hub_config config = {.ranks = o->num_ranks,
                                  .token = j->token,
                                  .timeout = o->timeout,
                                  .data = j,
                                  .output = output,
                                  .say = say,
                                  .group = group};
    struct rlimit files;
    int major, rc;

    if (getrlimit(RLIMIT_NOFILE, &files) == 0) { /* three connections a rank */
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    ds_side_token(j->token);
    rc = ds_mpirun_version(&major);
    if (rc == 0)
        rc = make_folder(j);
    if (rc == 0)
        rc = write_pid(j);
    if (rc == 0)
        rc = ds_child_cleaner(&j->cleaner, &j->cleaner_pipe, j->folder,
                              *j->pid_file ? j->pid_file : NULL);
    if (rc == 0)
        rc = ds_lines_open(&j->lines, o->num_ranks, o->value[DS_OPT_tag_output] != NULL,
                           o->value[DS_OPT_enable_each_rank_log]);
    if (rc == 0)
        rc = ds_hub_open(&j->hub, &config, ds_seconds());
    if (rc == 0)
        rc = set_environment(j);
    if (rc == 0)
        rc = open_signals(j);
    return rc < 0 ? rc : start_mpirun(j, major, argc, argv);
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
    j->grace = ds_seconds() + j->options->grace;
    snprintf(text, sizeof text,
             "dsrun: %s: ranks save and end at their next step (once more: they end now)",
             strsignal(signal));
    say(j, -1, text);
    ds_hub_stop(j->hub, signal);
}

static void read_signals(job *j)
{
    struct signalfd_siginfo info;

    while (read(j->signals, &info, sizeof info) == sizeof info) {
        if (info.ssi_signo == SIGUSR2)
            ds_hub_ask(j->hub, ds_seconds());
        else if (info.ssi_signo != SIGCHLD)
            on_stop(j, (int)info.ssi_signo);
    }
    if (!j->ended && waitpid(j->mpirun, &j->status, WNOHANG) == j->mpirun)
        j->ended = ds_seconds();
}

static void show_noise(job *j)
{
    if (j->said_used) {
        j->said[j->said_used] = 0;
        say(j, -1, j->said);
    }
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

/* Whether the ranks must be ended by force now. */
static int must_end(const job *j, double now)
{
    int culprit = ds_hub_culprit(j->hub);
    double since = now - ds_hub_since(j->hub);

    if (j->now)
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
        return j->ended && !ds_hub_all_gone(j->hub) && now - j->ended > LOST_SECONDS;
    }
}

/* From what is known, step by step, to the end of all. */
static void go_on(job *j, double now)
{
    int signal = ds_hub_signal(j->hub);

    if (signal && !j->stop) { /* somebody told a rank, and the ranks have agreed */
        j->stop = signal;
        j->grace = now + j->options->grace;
    }
    if (j->stop && now > j->grace && !j->ended)
        j->now = 1;
    if (!j->killed && must_end(j, now)) {
        ds_hub_kill(j->hub, 1);
        j->killed = now;
    }
    if (!j->ended && j->killed && now - j->killed > TERM_SECONDS) {
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
    if (j->said_used && now - j->said_at > NOISE_SECONDS && !j->killed && !j->stop && !j->ended &&
        ds_hub_trouble(j->hub) == DS_TROUBLE_NONE)
        show_noise(j);
}

static int over(const job *j, double now)
{
    return j->ended && (ds_hub_all_gone(j->hub) || now - j->ended > TERM_SECONDS ||
                        (ds_hub_started(j->hub) == 0 && now - j->ended > LOST_SECONDS));
}

static void turn(job *j, int wait_ms)
{
    size_t out = ds_lines_waiting(j->lines, DS_STDOUT), err = ds_lines_waiting(j->lines, DS_STDERR);
    struct pollfd fds[] = {
        {j->signals, POLLIN, 0},
        {out > FULL || err > FULL ? -1 : ds_hub_fd(j->hub), POLLIN, 0},
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
    ds_lines_write(j->lines, DS_STDOUT);
    ds_lines_write(j->lines, DS_STDERR);
}

/* ---- the end */

/* How mpirun says that a process ended: 128 + signal, or its code. */
static int mpirun_code(const job *j)
{
    if (WIFEXITED(j->status))
        return WEXITSTATUS(j->status);
    return WIFSIGNALED(j->status) ? 128 + WTERMSIG(j->status) : 1;
}

/* A rank that was gone without a word. */
static int explain_loss(job *j)
{
    int rank = ds_hub_culprit(j->hub), code = mpirun_code(j), signal = code - 128;
    const char *site = ds_hub_last_seen(j->hub, rank);
    char text[512], how[96];

    if (signal > 0 && signal < 65)
        snprintf(how, sizeof how, "was killed by signal %d (%s)", signal, strsignal(signal));
    else
        snprintf(how, sizeof how, "ended with code %d", code ? code : 1);
    snprintf(text, sizeof text, "dsrun: rank %d %s%s%s", rank, how, *site ? ", " : "", site);
    say(j, rank, text);
    return code ? code : 1;
}

static int conclude(job *j)
{
    enum ds_trouble trouble = ds_hub_trouble(j->hub);
    int rank = ds_hub_culprit(j->hub), code = ds_hub_code(j->hub);
    char text[160];

    if (j->now || trouble == DS_TROUBLE_STOPPED)
        return 128 + j->stop;
    if (trouble == DS_TROUBLE_FAILED) {
        code = code > 0 ? code : 1;
        snprintf(text, sizeof text, "dsrun: rank %d ended with code %d", rank, code);
        say(j, rank, text);
        return code;
    }
    if (trouble == DS_TROUBLE_LOST)
        return explain_loss(j);
    if (trouble == DS_TROUBLE_STUCK)
        return GAVE_UP;
    if (ds_hub_signal(j->hub))
        return 128 + ds_hub_signal(j->hub);
    if (ds_hub_started(j->hub) == j->options->num_ranks)
        return 0;
    if (j->stop)
        return 128 + j->stop;
    show_noise(j);
    code = mpirun_code(j);
    snprintf(text, sizeof text, "dsrun: mpirun ended with code %d before all ranks had started",
             code);
    say(j, -1, text);
    return code ? code : 1;
}

static void flush(job *j)
{
    double end = ds_seconds() + (j->now ? 1 : 3600);

    for (;;) {
        size_t out = ds_lines_waiting(j->lines, DS_STDOUT);
        size_t err = ds_lines_waiting(j->lines, DS_STDERR);

        if (!(out || err) || j->now || ds_seconds() > end)
            return;
        turn(j, 100);
    }
}

static void clean_up(job *j)
{
    int in_order = 0, status;

    if (j->noise >= 0)
        close(j->noise);
    ds_hub_close(j->hub);
    ds_lines_close(j->lines);
    if (j->signals >= 0)
        close(j->signals);
    if (j->cleaner > 0) {
        if (write(j->cleaner_pipe, &in_order, sizeof in_order) < 0)
            in_order = 1; /* it is gone */
        close(j->cleaner_pipe);
        waitpid(j->cleaner, &status, 0);
    }
}

int ds_launch(const ds_options *options, int argc, char **argv)
{
    job j = {.options = options, .signals = -1, .noise = -1, .cleaner_pipe = -1};
    int code;

    if (options->script && !strcmp(options->script, "-"))
        return ds_fail(DS_EINVAL, "several ranks cannot read one script from standard input; give "
                                  "its file");
    if (options->script && access(options->script, R_OK) < 0)
        return ds_fail(DS_ENOENT, "cannot read the script %s: %s", options->script,
                       strerror(errno));
    code = prepare(&j, argc, argv);
    if (code == 0) {
        while (!over(&j, ds_seconds())) {
            turn(&j, 100);
            go_on(&j, ds_seconds());
        }
        ds_hub_serve(j.hub, ds_seconds());
        code = conclude(&j);
        flush(&j);
    }
    clean_up(&j);
    return code;
}
