/* child.c - processes that the launcher starts.
 *
 * Nothing that dsrun starts outlives it, even where it is killed: its child is killed with it
 * (PR_SET_PDEATHSIG), its ranks with that one. What SIGKILL would leave behind are files, and
 * processes that ranks started: for those there is the cleaner, which notices by the end of a pipe,
 * and knows them by a variable in their environment.
 */
#include "runner/child.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/ds.h"
#include "runner/watch.h"

#define MOST_TEXT (4 << 20) /* bytes of a process that are read */
#define PASSES 50           /* over all processes, as they may start others meanwhile */
#define ANSWER_SECONDS 10

static void no_signals_blocked(void)
{
    sigset_t none;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

int ds_child_spawn(pid_t *pid, char *const *argv, const int *streams)
{
    pid_t parent = getpid();

    *pid = fork();
    if (*pid < 0)
        return ds_fail(DS_EIO, "cannot start %s: %s", argv[0], strerror(errno));
    if (*pid == 0) {
        setpgid(0, 0); /* Ctrl-C is for the launcher alone */
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(1);
        no_signals_blocked();
        for (int i = 0; i < 3; i++) {
            int from = streams[i] >= 0 ? streams[i] : open("/dev/null", i ? O_WRONLY : O_RDONLY);
            if (from < 0 || dup2(from, i) < 0)
                _exit(126);
        }
        execvp(argv[0], argv);
        _exit(127);
    }
    setpgid(*pid, *pid);
    return 0;
}

int ds_child_start(pid_t *pid, int *output, char *const *argv, int input)
{
    int ends[2], rc;

    if (pipe2(ends, O_CLOEXEC) < 0)
        return ds_fail(DS_EIO, "no pipe for %s: %s", argv[0], strerror(errno));
    rc = ds_child_spawn(pid, argv, (int[]){input ? 0 : -1, ends[1], ends[1]});
    close(ends[1]);
    if (rc < 0)
        close(ends[0]);
    *output = rc < 0 ? -1 : ends[0];
    return rc;
}

int ds_child_ask(char *line, size_t bytes, char *const *argv)
{
    double end = ds_seconds() + ANSWER_SECONDS;
    size_t used = 0;
    int output, status;
    pid_t pid;
    int rc = ds_child_start(&pid, &output, argv, 0);

    if (rc < 0)
        return rc;
    while (used < bytes - 1 && !memchr(line, '\n', used)) {
        struct pollfd fd = {output, POLLIN, 0};
        double left = end - ds_seconds();
        ssize_t n = -1;

        if (left > 0 && poll(&fd, 1, (int)(left * 1e3) + 1) == 1)
            n = read(output, line + used, bytes - 1 - used);
        if (n <= 0)
            break;
        used += (size_t)n;
    }
    line[used] = 0;
    line[strcspn(line, "\n")] = 0;
    close(output);
    kill(-pid, SIGKILL);
    waitpid(pid, &status, 0);
    return 0;
}

/* ---- the cleaner */

static struct {
    char *text;
    size_t bytes;
} command_line;

void ds_child_command_line(int argc, char **argv)
{
    command_line.text = argv[0];
    command_line.bytes = (size_t)(argv[argc - 1] - argv[0]) + strlen(argv[argc - 1]);
}

/* Another name for this process, as ps and pkill see it. */
static void call_it(const char *name)
{
    prctl(PR_SET_NAME, name);
    if (command_line.bytes > strlen(name)) {
        memset(command_line.text, 0, command_line.bytes);
        memcpy(command_line.text, name, strlen(name));
    }
}

static void close_all_but(int kept)
{
    for (int fd = 0; fd < 1024; fd++) /* it is made before the launcher opens anything */
        if (fd != kept)
            close(fd);
}

/* How processes of a job are known: by what one of the texts in a file of /proc/PID begins with. A
 * folder's name is as long as any other's, so it is not the beginning of one. */
static const struct {
    const char *file, *text;
} marks[] = {
    {"environ", "DSRUN_FOLDER=%s"}, /* which all inherit */
    {"cmdline", "ssh: %s/"}, /* what ssh calls itself where it keeps a connection open there */
};
enum { OF_JOB, CONNECTIONS };

static int has_mark(const char *pid, int mark, const char *wanted, char *text)
{
    char path[64];
    ssize_t used = 0, n;
    int fd;

    snprintf(path, sizeof path, "/proc/%.20s/%s", pid, marks[mark].file);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    do {
        n = read(fd, text + used, (size_t)(MOST_TEXT - used));
        used += n > 0 ? n : 0;
    } while (n > 0 && used < MOST_TEXT);
    close(fd);
    text[used] = 0;
    for (const char *t = text; t < text + used; t += strlen(t) + 1)
        if (!strncmp(t, wanted, strlen(wanted)))
            return 1;
    return 0;
}

/* Kills all that have it; returns how many there were. */
static int kill_all_with(int mark, const char *wanted, char *text)
{
    DIR *all = opendir("/proc");
    struct dirent *entry;
    int n = 0;

    while (all && (entry = readdir(all))) {
        pid_t pid = (pid_t)atoi(entry->d_name);

        if (pid > 0 && pid != getpid() && has_mark(entry->d_name, mark, wanted, text))
            n += kill(pid, SIGKILL) == 0;
    }
    if (all)
        closedir(all);
    return n;
}

static void end_all(int mark, const char *folder)
{
    const struct timespec moment = {.tv_nsec = 10000000};
    char wanted[PATH_MAX + 16], *text = malloc(MOST_TEXT + 1);

    snprintf(wanted, sizeof wanted, marks[mark].text, folder);
    for (int i = 0; text && i < PASSES && kill_all_with(mark, wanted, text); i++)
        nanosleep(&moment, NULL);
    free(text);
}

void ds_child_end_job(const char *folder)
{
    end_all(OF_JOB, folder);
}

static void clean(int pipe, const char *its_folder, const char *its_file, const char *its_hub)
{
    char *folder = strdup(its_folder), *file = its_file ? strdup(its_file) : NULL;
    char *hub = its_hub ? strdup(its_hub) : NULL, told;
    const struct timespec moment = {.tv_nsec = 20000000};
    int in_order = 0;

    if (!folder)
        return;
    call_it("ds-cleaner"); /* what is asked for by argv is gone now */
    if (hub)
        ds_watch(pipe, hub, folder);
    while (!hub && read(pipe, &told, 1) == 1)
        in_order = 1;
    if (!in_order)
        ds_child_end_job(folder);
    end_all(CONNECTIONS, folder);
    if (file)
        unlink(file);
    ds_remove(folder);
    /* who is being killed just now may still make a file */
    for (int i = 0; i < 10 && !in_order; i++) {
        nanosleep(&moment, NULL);
        ds_remove(folder);
    }
}

int ds_child_cleaner(pid_t *pid, int *out, const char *folder, const char *file, const char *hub)
{
    int ends[2];

    if (pipe2(ends, O_CLOEXEC) < 0)
        return ds_fail(DS_EIO, "no pipe: %s", strerror(errno));
    *pid = fork();
    if (*pid < 0) {
        close(ends[0]);
        close(ends[1]);
        return ds_fail(DS_EIO, "cannot start a process: %s", strerror(errno));
    }
    if (*pid == 0) {
        setsid(); /* a signal to the launcher's group or terminal is not for it */
        signal(SIGINT, SIG_IGN);
        signal(SIGTERM, SIG_IGN);
        signal(SIGHUP, SIG_IGN);
        close_all_but(ends[0]);
        clean(ends[0], folder, file, hub);
        _exit(0);
    }
    close(ends[0]);
    *out = ends[1];
    return 0;
}
