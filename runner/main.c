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
#include <unistd.h>

#include "kernels/error.h"
#include "runner/child.h"
#include "runner/comm.h"
#include "runner/host.h"
#include "runner/launch.h"
#include "runner/mpirun.h"
#include "runner/options.h"
#include "runner/plan.h"
#include "runner/process.h"
#include "runner/program.h"
#include "runner/rank.h"
#include "runner/side.h"
#include "runner/survey.h"
#include "runner/threads.h"
#include "runner/version.h"

#define USAGE 2 /* exit code: the command line makes no sense */

static int complain(int code)
{
    char text[DS_ERROR_BYTES + 16];

    snprintf(text, sizeof text, "dsrun: %s", ds_error());
    ds_side_failed(text);
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
    struct sigaction action = {.sa_handler = on_stop, .sa_flags = SA_RESTART | SA_ONSTACK};

    if (ds_signal_stack() < 0)
        return DS_EIO;
    /* Even where it was ignored, as SIGINT is in the background jobs of a shell script: who sends
     * it to a training run wants it to save and stop. */
    for (size_t i = 0; i < sizeof stops / sizeof *stops; i++)
        sigaction(stops[i], &action, NULL);
    /* A file that may not grow further is an error of the write, as a full disk is. */
    signal(SIGXFSZ, SIG_IGN);
    return ds_host_watch(host);
}

/* ---- several ranks */

static int refuse(const ds_options *options, const ds_rank *rank)
{
    if (options->command == DS_RUN_PLAN && rank->size > 1) {
        fputs("dsrun: a plan is made by one process: start it without mpirun or srun\n", stderr);
        return USAGE;
    }
    if (!options->ranks || rank->launched != DS_BY_ANOTHER || rank->size == 1)
        return 0;
    fprintf(stderr,
            "dsrun: this is one of %d ranks already, as mpirun or srun started them; leave out "
            "--%s, or start dsrun without them\n",
            rank->size, options->ranks);
    return USAGE;
}

/* The watchdog's way out: whoever it watches over may be stuck anywhere. */
static void end_now(int code)
{
    _exit(code);
}

/* What the launcher put before an argument that mpirun would take for its own. */
static void restore(const ds_options *options)
{
    for (int i = 0; i < options->count; i++)
        if (options->arguments[i][0] == '\\' && ds_rank_colon(options->arguments[i]))
            options->arguments[i]++;
}

/* ---- running */

/* `dsrun --hostfile FILE env` asks all hosts; without, it is about this machine. */
static int show_env(ds_host *host, const ds_options *options)
{
    const char *port = options->value[DS_OPT_ssh_port];
    const ds_ssh ssh = {.port = port ? atoi(port) : 0};
    char *answers = NULL;
    int code, exited;
    ds_plan plan;

    if (!options->value[DS_OPT_hostfile])
        return ds_host_call(host, "ds.env", "show", NULL, &exited);
    code = ds_plan_open(&plan, options);
    if (code == 0)
        code = ds_survey(&answers, plan.all, &ssh);
    ds_plan_close(&plan);
    if (code == 0)
        code = ds_host_call(host, "ds.env_hosts", "show", answers, &exited);
    free(answers);
    return code;
}

/* How many ranks, and on how many machines, a plan is for. */
static int count_ranks(long long *ranks, int *machines, const ds_options *options)
{
    const int of_hosts = options->value[DS_OPT_hostfile] || options->value[DS_OPT_include] ||
                         options->value[DS_OPT_exclude];
    ds_plan plan;
    int rc;

    *machines = options->num_nodes ? options->num_nodes : 1;
    *ranks = (long long)*machines * (options->num_slots ? options->num_slots : 1);
    if (!of_hosts)
        return 0;
    rc = ds_plan_open(&plan, options);
    if (rc == 0) {
        *ranks = plan.ranks;
        *machines = plan.hosts.count;
    }
    ds_plan_close(&plan);
    return rc;
}

/* `dsrun plan`: the script, after lua/ds/plan.lua has taken the place of what would cost something. */
static int make_plan(ds_host *host, const ds_options *options)
{
    static const enum ds_option_id sizes[] = {DS_OPT_memory, DS_OPT_flops, DS_OPT_bandwidth,
                                              DS_OPT_disk};
    static const char *const names[] = {"memory", "flops", "bandwidth", "disk"};
    int code, exited, machines;
    size_t bytes;
    long long ranks;
    char *text = NULL;
    FILE *f;

    code = count_ranks(&ranks, &machines, options);
    if (code < 0)
        return code;
    f = open_memstream(&text, &bytes);
    if (!f)
        return ds_fail(DS_ENOMEM, "out of memory");
    fprintf(f, "ranks=%lld\nmachines=%d\n", ranks, machines);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (options->value[sizes[i]])
            fprintf(f, "%s=%s\n", names[i], options->value[sizes[i]]);
    if (options->value[DS_OPT_json])
        fputs("json=1\n", f);
    fclose(f);
    code = ds_host_call(host, "ds.plan", "begin", text, &exited);
    if (code == 0 && !exited)
        code = ds_host_script(host, &exited);
    if (code == 0 && !exited)
        code = ds_host_call(host, "ds.plan", "finish", NULL, &exited);
    free(text);
    return code;
}

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
        return show_env(host, options);
    if (options->command == DS_RUN_PLAN)
        return make_plan(host, options);
    if (options->command == DS_RUN_INSPECT)
        return ds_host_call(host, "ds.inspect", "run", NULL, &exited);
    if (options->command == DS_RUN_CONVERT)
        return ds_host_call(host, "ds.convert", "run", NULL, &exited);
    return options->script ? ds_host_script(host, &exited) : 0;
}

static int with_host(const ds_options *options, const ds_rank *rank, char **argv)
{
    const ds_host_config config = {
        .program = argv[0],
        .script = options->script,
        .arguments = options->arguments,
        .count = options->count,
        .device = options->value[DS_OPT_device],
        .seed = options->value[DS_OPT_seed],
    };
    ds_host *host = NULL;
    int code, told;

    ds_threads_init(rank, argv); /* it may begin anew here */
    if (rank->launched == DS_BY_DSRUN)
        restore(options);
    code = ds_side_join(rank, end_now);
    if (code == 0)
        code = ds_comm_join();
    if (code == 0)
        code = ds_side_meet(rank, end_now);
    if (code == 0)
        code = ds_host_open(&host, &config);
    if (code == 0)
        code = watch_signals(host);
    if (code == 0)
        code = run(host, options);
    if (host && code >= 0)
        code = ds_host_end(host, code);
    if (code < 0)
        code = complain(USAGE);
    told = ds_side_end(code);
    /* to save and end because of a signal is no failure: all ranks do it */
    ds_run_end_hooks(code && code == 128 + ds_signal_pending() ? 0 : code);
    ds_host_close(host);
    return told;
}

static int process(const ds_options *options, int argc, char **argv)
{
    ds_rank rank;
    int code;

    ds_rank_find(&rank);
    code = refuse(options, &rank);
    if (code != 0)
        return code;
    if (!options->script && !options->evals && options->command == DS_RUN_SCRIPT &&
        !options->value[DS_OPT_config_help]) {
        ds_options_usage(stderr);
        fputs("dsrun --help says more\n", stderr);
        return USAGE;
    }
    if (options->ranks && rank.launched != DS_BY_DSRUN && options->command == DS_RUN_SCRIPT) {
        if (rank.launched != DS_ALONE)
            ds_rank_forget(); /* a step of SLURM's, say, of one task */
        code = ds_launch(options, argc, argv);
        return code < 0 ? complain(USAGE) : code;
    }
    if (ds_rank_settle(&rank) < 0)
        return complain(USAGE);
    return with_host(options, &rank, argv);
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

/* Words of a launcher's, with which this program becomes another one. */
static const struct {
    const char *word;
    int (*other)(int argc, char **argv);
} become[] = {{"--agent", ds_agent}, {"--ssh", ds_ssh_alias}};

int main(int argc, char **argv)
{
    ds_options options;
    int code;

    hold_streams();
    if (argc > 0)
        ds_child_command_line(argc, argv);
    for (size_t i = 0; argc > 1 && i < sizeof become / sizeof *become; i++)
        if (!strcmp(argv[1], become[i].word) && become[i].other(argc, argv) < 0)
            return complain(USAGE);
    /* lines as they come: a training log is read while it is written */
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
    if (argc > 1 && !strcmp(argv[1], "--check-host")) /* from another host's dsrun, over ssh */
        return ds_program_print(stdout, argv[2]) < 0 ? complain(USAGE) : finish_output(0);
    if (ds_options_parse(&options, argc, argv) < 0) {
        code = complain(USAGE);
    } else if (options.value[DS_OPT_help]) {
        (options.command == DS_RUN_PLAN ? ds_options_plan_help : ds_options_help)(stdout);
        code = 0;
    } else if (options.value[DS_OPT_version]) {
        printf("dsrun %s (%s)\n", ds_version, ds_commit);
        code = 0;
    } else {
        code = process(&options, argc, argv);
    }
    free(options.eval);
    return finish_output(code);
}
