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

#define MOST_PAUSE 30 /* seconds between two starts at most */

typedef struct launch {
    const ds_options *options;
    ds_plan plan;
    ds_start start;
    ds_job_streams streams;
    char folder[64], pid_file[PATH_MAX];
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

static int open_signals(launch *l)
{
    static const int wanted[] = {SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGCHLD};
    sigset_t set;

    sigemptyset(&set);
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        signal(wanted[i], SIG_DFL); /* an ignored one would not come */
        sigaddset(&set, wanted[i]);
    }
    sigprocmask(SIG_BLOCK, &set, NULL);
    l->streams.signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return l->streams.signals < 0 ? ds_fail(DS_EIO, "no signalfd: %s", strerror(errno)) : 0;
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
                              *l->pid_file ? l->pid_file : NULL);
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
    if (l->cleaner > 0) {
        if (write(l->cleaner_pipe, "", 1) < 0)
            status = 0; /* it is gone */
        close(l->cleaner_pipe);
        waitpid(l->cleaner, &status, 0);
    } else if (*l->folder) {
        ds_remove(l->folder);
    }
    ds_plan_close(&l->plan);
}

/* ---- starting it, and again */

/* Waits before the next start: longer each time, as what failed may take a while to be mended. */
static int pause_before(launch *l, int restart)
{
    struct pollfd fd = {l->streams.signals, POLLIN, 0};
    struct signalfd_siginfo info;
    int left = (restart < 5 ? 1 << (restart - 1) : MOST_PAUSE) * 1000;

    while (left > 0) {
        poll(&fd, 1, left < 100 ? left : 100);
        left -= 100;
        while (read(l->streams.signals, &info, sizeof info) == sizeof info)
            if (info.ssi_signo == SIGINT || info.ssi_signo == SIGTERM || info.ssi_signo == SIGUSR1)
                return 128 + (int)info.ssi_signo;
    }
    return 0;
}

static void say_restart(launch *l, int restart, int code)
{
    char text[160];

    snprintf(text, sizeof text, "dsrun: the job ended with code %d; start %d of %d follows", code,
             restart + 1, l->options->max_restarts + 1);
    ds_lines_say(l->streams.lines, -1, text);
    ds_lines_write(l->streams.lines, DS_STDERR);
}

static int run(launch *l)
{
    int failed = 0, code = 0;

    for (int restart = 0; restart <= l->options->max_restarts; restart++) {
        if (restart > 0) {
            int stopped;

            say_restart(l, restart, code);
            stopped = pause_before(l, restart);
            if (stopped)
                return stopped;
        }
        code = ds_job_run(&failed, &l->plan, &l->start, &l->streams, restart);
        if (!failed)
            break;
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
    launch l = {.options = options, .streams.signals = -1, .cleaner_pipe = -1};
    int code = check_script(options->script);

    if (code < 0)
        return code;
    code = ds_plan_open(&l.plan, options);
    l.start = (ds_start){.plan = &l.plan,
                         .folder = "/dev/shm/dsrun",
                         .program = l.plan.program,
                         .count = argc - 1,
                         .arguments = argv + 1};
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
