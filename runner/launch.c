/* launch.c - a job of several ranks, from the options to its exit code: what it needs on this machine,
 * what is checked before, starting it, starting it again.
 */
#include "runner/launch.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/child.h"
#include "runner/ds.h"
#include "runner/job.h"
#include "runner/plan.h"
#include "runner/preflight.h"
#include "runner/push.h"

#define MOST_PAUSE 30 /* seconds between two starts at most */

typedef struct launch {
    const ds_options *options;
    ds_plan plan;
    int reaches;             /* 1: the job, as it was asked for, is on other hosts as well */
    ds_program here, pushed; /* pushed.file NULL: nothing is */
    ds_start start;
    ds_job_streams streams;
    char folder[64], control[80], pid_file[PATH_MAX];
    pid_t cleaner;
    int cleaner_pipe; /* -1: none */
} launch;

/* ---- what a job needs on this machine */

static const char *temporary(void)
{
    const char *folder = getenv("TMPDIR");

    return folder && *folder && strlen(folder) < PATH_MAX - 64 ? folder : "/tmp";
}

/* A folder for mpirun's files; in memory where that is possible, and with a short name, as sockets
 * are made in it. Other hosts have one of the same name. */
static int make_folder(launch *l)
{
    const char *places[] = {"/dev/shm", temporary(), "/tmp"};

    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        int n =
            snprintf(l->folder, sizeof l->folder, "%s/dsrun-%d-XXXXXX", places[i], (int)getpid());
        if (n < (int)sizeof l->folder && mkdtemp(l->folder))
            return 0;
    }
    return ds_fail(DS_EIO, "cannot make a folder in /dev/shm, %s or /tmp: %s", temporary(),
                   strerror(errno));
}

static int write_pid(launch *l)
{
    FILE *f;

    if (!l->options->value[DS_OPT_save_pid])
        return 0;
    snprintf(l->pid_file, sizeof l->pid_file, "%s/%d.ds", temporary(), (int)getpid());
    f = fopen(l->pid_file, "w");
    if (!f)
        return ds_fail(DS_EIO, "--save_pid: cannot write %s: %s", l->pid_file, strerror(errno));
    fprintf(f, "%d", (int)getpid());
    return fclose(f) == 0 ? 0 : ds_fail(DS_EIO, "--save_pid: cannot write %s", l->pid_file);
}

static const int stops[] = {SIGINT, SIGTERM, SIGUSR1};

/* Signals are read from descriptors: all that matter, and those that end the job alone. */
static int open_signals(launch *l)
{
    sigset_t set;

    sigemptyset(&set);
    for (size_t i = 0; i < sizeof stops / sizeof *stops; i++) {
        signal(stops[i], SIG_DFL); /* an ignored one would not come */
        sigaddset(&set, stops[i]);
    }
    l->start.ssh.cancel = l->streams.stops = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    signal(SIGCHLD, SIG_DFL);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGUSR2);
    sigprocmask(SIG_BLOCK, &set, NULL);
    l->streams.signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return l->streams.stops < 0 || l->streams.signals < 0
               ? ds_fail(DS_EIO, "no signalfd: %s", strerror(errno))
               : 0;
}

/* The exit code for a signal that has come, 0 for none. */
static int stopped(launch *l)
{
    struct signalfd_siginfo info;

    return read(l->streams.stops, &info, sizeof info) == sizeof info ? 128 + (int)info.ssi_signo
                                                                     : 0;
}

static int prepare(launch *l)
{
    const ds_options *o = l->options;
    struct rlimit files;
    int rc;

    if (getrlimit(RLIMIT_NOFILE, &files) == 0) { /* three connections a rank */
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    rc = make_folder(l);
    if (rc == 0)
        rc = write_pid(l);
    if (rc == 0)
        rc = ds_child_cleaner(&l->cleaner, &l->cleaner_pipe, l->folder,
                              *l->pid_file ? l->pid_file : NULL, NULL);
    if (rc == 0)
        rc = ds_lines_open(&l->streams.lines, l->plan.ranks, o->value[DS_OPT_tag_output] != NULL,
                           o->value[DS_OPT_enable_each_rank_log]);
    return rc < 0 ? rc : open_signals(l);
}

static void clean_up(launch *l)
{
    int status;

    ds_lines_close(l->streams.lines);
    if (l->streams.signals >= 0)
        close(l->streams.signals);
    if (l->streams.stops >= 0)
        close(l->streams.stops);
    if (l->cleaner > 0) {
        if (write(l->cleaner_pipe, DS_IN_ORDER, 1) < 0)
            status = 0; /* it is gone */
        close(l->cleaner_pipe);
        waitpid(l->cleaner, &status, 0);
    } else if (*l->folder) {
        ds_remove(l->folder);
    }
    ds_plan_close(&l->plan);
    ds_program_free(&l->here);
    ds_program_free(&l->pushed);
}

/* ---- what is seen to on other hosts */

static void say(launch *l, const char *text)
{
    ds_lines_say(l->streams.lines, -1, text);
    ds_lines_write(l->streams.lines, DS_STDERR);
}

/* A report's lines, each with "dsrun: " before it. */
static void say_report(launch *l, char *report)
{
    char *rest = report, *line;

    while (report && (line = strsep(&rest, "\n"))) {
        char text[2048];

        if (!*line)
            continue;
        snprintf(text, sizeof text, "dsrun: %s", line);
        say(l, text);
    }
    free(report);
}

/* Whether hosts are looked at before a start: those of an allocation are SLURM's care. */
static int checks(const launch *l)
{
    return l->reaches && !l->plan.slurm && !l->options->value[DS_OPT_no_ssh_check];
}

/* Copies what the hosts lack, before each start, as one may be back without it; ranks run the copy. A
 * host that could not be pushed to is not ready, which is for look_at_hosts() to judge. */
static int push(launch *l)
{
    int rc, script = (int)(l->options->arguments - l->start.arguments) - 1;
    ds_program pushed;
    char *report = NULL;

    if (!l->reaches || !l->options->value[DS_OPT_push])
        return 0;
    rc = ds_push(&pushed, &report, l->plan.all, &l->here, &l->start.ssh);
    say_report(l, report);
    if (rc < 0 && !(rc == DS_ECOMM && pushed.file && l->options->elastic)) {
        ds_program_free(&pushed);
        return rc;
    }
    ds_program_free(&l->pushed);
    l->pushed = pushed;
    l->plan.there = &l->pushed;
    if (l->options->script && pushed.script)
        l->start.arguments[script] = l->pushed.script;
    return 0;
}

/* Uses the hosts that are ready: all of them, or, in an elastic job, at least as many as it wants. */
static int look_at_hosts(launch *l)
{
    int n = l->plan.all->count, ready = 0, rc;
    ds_preflight_host *found;
    char *report = NULL;

    if (!checks(l))
        return 0;
    found = calloc((size_t)n, sizeof *found);
    if (!found)
        return ds_fail(DS_ENOMEM, "out of memory");
    rc = ds_preflight(found, &report, l->plan.all, &l->here, l->plan.there, &l->start.ssh,
                      DS_PREFLIGHT_SECONDS);
    say_report(l, report);
    for (int h = 0; h < n; h++)
        ready += found[h].ready;
    if (rc == DS_ECOMM && report) {
        if (!l->options->elastic)
            rc = ds_fail(DS_ECOMM, "%d of %d hosts cannot take part, and nothing was started",
                         n - ready, n);
        else if (ready < l->options->min_nodes)
            rc = ds_fail(DS_ECOMM, "%d of %d hosts are ready, and --min_elastic_nodes wants %d",
                         ready, n, l->options->min_nodes);
        else
            rc = 0;
    }
    if (rc == 0)
        rc = ds_plan_use(&l->plan, found, l->options->max_nodes);
    free(found);
    return rc;
}

/* ---- starting it, and again */

/* Waits before the next start: longer each time, as what failed may take a while to be mended. */
static int pause_before(launch *l, int restart)
{
    struct pollfd fd = {l->streams.stops, POLLIN, 0};
    int seconds = restart < 5 ? 1 << (restart - 1) : MOST_PAUSE;

    poll(&fd, 1, seconds * 1000);
    return stopped(l);
}

static void say_restart(launch *l, int restart, const char *why)
{
    char text[DS_ERROR_BYTES + 160];

    snprintf(text, sizeof text, "dsrun: %s; start %d of %d follows", why, restart + 1,
             l->options->max_restarts + 1);
    say(l, text);
}

/* Connections of ssh's stay open from the check to mpirun's own use of them; each start has new ones,
 * as a host may have been away. */
static void name_connections(launch *l, int restart)
{
    snprintf(l->control, sizeof l->control, "%s/%d-%%C", l->folder, restart);
    l->start.ssh.control = checks(l) ? l->control : NULL;
}

/* One start. Negative: it could not be made; *failed: another may go better. */
static int start_once(launch *l, int *failed, int restart)
{
    int code;

    name_connections(l, restart);
    code = push(l);
    if (code == 0)
        code = look_at_hosts(l);
    if (code == 0)
        return ds_job_run(failed, &l->plan, &l->start, &l->streams, restart);
    *failed = code == DS_ECOMM && (restart > 0 || l->options->elastic);
    return code;
}

static int run(launch *l)
{
    int failed = 0, code = 0;
    char why[DS_ERROR_BYTES];

    for (int restart = 0; restart <= l->options->max_restarts; restart++) {
        int stop = stopped(l);

        if (restart > 0 && !stop) {
            say_restart(l, restart, why);
            stop = pause_before(l, restart);
        }
        if (stop)
            return stop;
        failed = 0;
        code = start_once(l, &failed, restart);
        stop = code < 0 ? stopped(l) : 0; /* what was under way was given up for it */
        if (stop)
            return stop;
        if (!failed)
            break;
        if (code < 0)
            snprintf(why, sizeof why, "%s", ds_error());
        else
            snprintf(why, sizeof why, "the job ended with code %d", code);
    }
    return code;
}

static int show(launch *l)
{
    char **command = NULL;
    int rc = ds_plan_finish(&l->plan, 0, "", l->start.folder, 0);

    if (rc == 0)
        rc = ds_mpirun_command(&command, &l->start);
    if (rc == 0)
        rc = ds_plan_show(&l->plan, command, l->options->value[DS_OPT_json] != NULL, stdout);
    ds_mpirun_free(command);
    return rc;
}

static int check_script(const char *script)
{
    if (script && !strcmp(script, "-"))
        return ds_fail(DS_EINVAL, "several ranks cannot read one script from standard input; give "
                                  "its file");
    if (script && access(script, R_OK) < 0)
        return ds_fail(DS_ENOENT, "cannot read the script %s: %s", script, strerror(errno));
    return 0;
}

int ds_launch(const ds_options *options, int argc, char **argv)
{
    launch l = {.options = options, .streams = {.signals = -1, .stops = -1}, .cleaner_pipe = -1};
    int code = check_script(options->script);

    if (code == 0)
        code = ds_program_here(&l.here, options->script);
    if (code == 0)
        code = ds_plan_open(&l.plan, options);
    l.start = (ds_start){
        .plan = &l.plan, .folder = "/dev/shm/dsrun", .count = argc - 1, .arguments = argv + 1};
    if (options->value[DS_OPT_ssh_port])
        l.start.ssh.port = atoi(options->value[DS_OPT_ssh_port]);
    l.plan.there = &l.here;
    l.reaches = l.plan.network; /* an elastic job may come down to this machine, and grow again */
    if (code == 0 && !options->srun)
        code = ds_mpirun_version(&l.start.version);
    if (code == 0 && options->value[DS_OPT_dry_run]) {
        code = show(&l);
    } else if (code == 0) {
        code = prepare(&l);
        l.start.folder = l.folder;
        if (code == 0)
            code = run(&l);
    }
    clean_up(&l);
    return code;
}
