/* child.c - processes that the launcher starts.
 *
 * Nothing that dsrun starts outlives it, even where it is killed: its child is killed with it
 * (PR_SET_PDEATHSIG), its ranks with that one. What SIGKILL would leave behind are files, and
 * processes that ranks started: for those there is the cleaner, which notices by the end of a pipe.
 */
#include "runner/child.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/ds.h"

#define MAX_GROUPS 4096 /* as many ranks as there may be */
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

static void close_all_but(int kept)
{
    for (int fd = 0; fd < 1024; fd++) /* it is made before the launcher opens anything */
        if (fd != kept)
            close(fd);
}

static void clean(int pipe, const char *folder, const char *file)
{
    const struct timespec moment = {.tv_nsec = 20000000};
    static int groups[MAX_GROUPS];
    int n = 0, in_order = 0, told;

    while (read(pipe, &told, sizeof told) == sizeof told) {
        in_order |= told == 0;
        if (told > 0 && n < MAX_GROUPS)
            groups[n++] = told;
        for (int i = 0; told < 0 && i < n; i++)
            if (groups[i] == -told)
                groups[i] = groups[--n];
    }
    for (int i = 0; i < n && !in_order; i++)
        kill(-groups[i], SIGKILL);
    if (file)
        unlink(file);
    ds_remove(folder);
    /* who is being killed just now may still make a file */
    for (int i = 0; i < 10 && !in_order; i++) {
        nanosleep(&moment, NULL);
        ds_remove(folder);
    }
}

int ds_child_cleaner(pid_t *pid, int *out, const char *folder, const char *file)
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
        clean(ends[0], folder, file);
        _exit(0);
    }
    close(ends[0]);
    *out = ends[1];
    return 0;
}
