/* main.c - the program: options, signals, the script, the end.
 *
 * The only file that ends the process; everything else returns a code.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/comm.h"
#include "runner/host.h"
#include "runner/log.h"
#include "runner/options.h"
#include "runner/process.h"
#include "runner/threads.h"
#include "runner/version.h"

#define USAGE 2 /* exit code: the command line makes no sense */

static int complain(int code)
{
    fprintf(stderr, "dsrun: %s\n", ds_error());
    return code;
}

/* ---- signals */

static void on_stop(int signal)
{
    static const char note[] = "dsrun: stopping at the end of this step; once more: at once\n";
    int error = errno;
    ssize_t written = 0;

    if (ds_signal_arrived(signal))
        _exit(128 + signal);
    if (ds_log_shows(DS_LOG_INFO))
        written = write(STDERR_FILENO, note, sizeof note - 1);
    (void)written; /* where it failed there is nobody to tell */
    errno = error;
}

static int watch_signals(ds_host *host)
{
    static const int stops[] = {SIGINT, SIGTERM, SIGUSR1};
    struct sigaction action = {.sa_handler = on_stop, .sa_flags = SA_RESTART};

    /* Even where it was ignored, as SIGINT is in the background jobs of a shell script: who sends
     * it to a training run wants it to save and stop. */
    for (size_t i = 0; i < sizeof stops / sizeof *stops; i++)
        sigaction(stops[i], &action, NULL);
    /* A file that may not grow further is an error of the write, as a full disk is. */
    signal(SIGXFSZ, SIG_IGN);
    return ds_host_watch(host);
}

/* ---- several ranks */

static int refuse_ranks(const ds_options *options)
{
    if (!options->ranks)
        return 0;
    fprintf(stderr, "dsrun: --%s: several ranks are not supported yet (without it: one process)\n",
            options->ranks);
    return USAGE;
}

/* A rank does not outlive the launcher that started it, however that one ends. */
static void die_with_launcher(void)
{
    const char *variable;
    pid_t parent = getppid();

    if (ds_comm_launched(&variable) == 1)
        return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) /* it was gone before that */
        raise(SIGKILL);
}

/* ---- running */

static int run(ds_host *host, const ds_options *options)
{
    const char *help = options->value[DS_OPT_config_help];
    int code = 0, exited = 0;

    if (help)
        return ds_host_call(host, "ds.config", "run", *help ? help : NULL, &exited);
    for (int i = 0; i < options->evals && code == 0 && !exited; i++)
        code = ds_host_eval(host, options->eval[i], &exited);
    if (code != 0 || exited)
        return code;
    if (options->command == DS_RUN_REPL)
        return ds_host_call(host, "ds.repl", "run", NULL, &exited);
    if (options->command == DS_RUN_ENV)
        return ds_host_call(host, "ds.env", "show", NULL, &exited);
    return options->script ? ds_host_script(host, &exited) : 0;
}

static int with_host(const ds_options *options, char **argv)
{
    const ds_host_config config = {
        .program = argv[0],
        .script = options->script,
        .arguments = options->arguments,
        .count = options->count,
        .device = options->value[DS_OPT_device],
        .seed = options->value[DS_OPT_seed],
    };
    ds_host *host;
    int code;

    if (ds_comm_join() < 0 || ds_host_open(&host, &config) < 0)
        return complain(USAGE);
    code = watch_signals(host);
    if (code == 0)
        code = run(host, options);
    if (code < 0)
        code = complain(USAGE);
    ds_run_end_hooks(code);
    ds_host_close(host);
    return code;
}

/* Started without one of the standard streams, the first file opened would take its number, and be
 * printed into. */
static void hold_streams(void)
{
    int fd;

    do
        fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= STDERR_FILENO);
    close(fd);
}

/* Output that did not arrive is an error even where the script did not look. */
static int finish_output(int code)
{
    if (fflush(stdout) == 0 && !ferror(stdout))
        return code;
    fprintf(stderr, "dsrun: could not write all of the standard output: %s\n", strerror(errno));
    return code ? code : 1;
}

int main(int argc, char **argv)
{
    ds_options options;
    int code;

    hold_streams();
    /* lines as they come: a training log is read while it is written */
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
    if (ds_options_parse(&options, argc, argv) < 0) {
        code = complain(USAGE);
    } else if (options.value[DS_OPT_help]) {
        ds_options_help(stdout);
        code = 0;
    } else if (options.value[DS_OPT_version]) {
        printf("dsrun %s (%s)\n", ds_version, ds_commit);
        code = 0;
    } else if ((code = refuse_ranks(&options)) == 0) {
        if (options.script || options.evals || options.command != DS_RUN_SCRIPT ||
            options.value[DS_OPT_config_help]) {
            die_with_launcher();
            ds_threads_init(argv);
            code = with_host(&options, argv);
        } else {
            ds_options_usage(stderr);
            fputs("dsrun --help says more\n", stderr);
            code = USAGE;
        }
    }
    free(options.eval);
    return finish_output(code);
}
