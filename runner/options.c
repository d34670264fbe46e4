/* options.c - the command line: one table from options.def; reading, suggestions, help. */
#include "runner/options.h"

#include <ctype.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "kernels/error.h"
#include "runner/log.h"
#include "runner/suggest.h"

enum action { DS_USE, DS_RANKS, DS_JOB, DS_PLAN, DS_NOTE, DS_REFUSE, GROUP };

typedef struct option {
    const char *name;
    char letter;
    const char *argument; /* "[X]": may be left out */
    enum action action;
    const char *help;
    int id;
} option;

static const option table[] = {
#define DS_GROUP(title) {title, 0, NULL, GROUP, NULL, -1},
#define DS_OPTION(name, letter, argument, action, help)                                            \
    {#name, letter, argument, action, help, DS_OPT_##name},
#include "runner/options.def"
};

#define ROWS ((int)(sizeof table / sizeof *table))
#define MAX_NAME 48

static const struct {
    const char *name;
    enum ds_command command;
    const char *help;
} commands[] = {
    {"repl", DS_RUN_REPL, "read Lua line by line, print what it gives"},
    {"env", DS_RUN_ENV, "what this machine and this dsrun offer"},
    {"plan", DS_RUN_PLAN, "what a script would take on so many ranks, without training"},
    {"inspect", DS_RUN_INSPECT, "what a folder of checkpoints holds, and whether it is whole"},
    {"convert", DS_RUN_CONVERT, "a checkpoint's weights as plain safetensors, for other tools"},
};

#define COMMANDS ((int)(sizeof commands / sizeof *commands))

/* ---- finding an option */

static const char *closest(const char *name)
{
    ds_suggestion near = {.given = name};

    for (int i = 0; i < ROWS; i++)
        if (table[i].action != GROUP)
            ds_suggest(&near, table[i].name);
    return near.best;
}

static const option *find_name(const char *name)
{
    for (int i = 0; i < ROWS; i++)
        if (table[i].action != GROUP && !strcmp(name, table[i].name))
            return &table[i];
    return NULL;
}

static const option *find_letter(char letter)
{
    for (int i = 0; i < ROWS; i++)
        if (table[i].letter && table[i].letter == letter)
            return &table[i];
    return NULL;
}

static int unknown(const char *given, const char *name)
{
    const char *meant = name ? closest(name) : NULL;

    if (meant)
        return ds_fail(DS_EINVAL, "unknown option %s (did you mean --%s?)", given, meant);
    return ds_fail(DS_EINVAL,
                   "unknown option %s (dsrun --help lists them; options of the script "
                   "follow its name)",
                   given);
}

/* ---- reading */

typedef struct reader {
    int argc, next;
    char **argv;
} reader;

static int keep(ds_options *options, const option *o, const char *value)
{
    switch (o->action) {
    case DS_RANKS:
        if (!options->ranks)
            options->ranks = o->name;
        break;
    case DS_JOB:
        if (!options->job)
            options->job = o->name;
        break;
    case DS_PLAN:
        if (!options->plan)
            options->plan = o->name;
        break;
    case DS_REFUSE:
        return ds_fail(DS_EINVAL, "--%s is not for dsrun: %s", o->name, o->help);
    default:
        if (o->id == DS_OPT_eval)
            options->eval[options->evals++] = value;
        break;
    }
    options->value[o->id] = value;
    return 0;
}

/* `attached`: what stood after '=' or the letter; NULL: nothing. */
static int read_value(ds_options *options, reader *in, const option *o, const char *attached)
{
    const char *value = "";

    if (!o->argument) {
        if (attached)
            return ds_fail(DS_EINVAL, "--%s takes no value, but was given '%s'", o->name, attached);
    } else if (attached) {
        value = attached;
    } else if (in->next < in->argc && (o->argument[0] != '[' || in->argv[in->next][0] != '-')) {
        value = in->argv[in->next++];
    } else if (o->argument[0] != '[') {
        return ds_fail(DS_EINVAL, "--%s wants a value: --%s %s", o->name, o->name, o->argument);
    }
    return keep(options, o, value);
}

static int read_long(ds_options *options, reader *in, const char *text)
{
    size_t length = strcspn(text + 2, "=");
    const char *attached = text[2 + length] ? text + 2 + length + 1 : NULL;
    char name[MAX_NAME + 1];
    const option *o;

    if (length > MAX_NAME)
        return unknown(text, NULL);
    for (size_t i = 0; i < length; i++)
        name[i] = text[2 + i] == '-' ? '_' : text[2 + i];
    name[length] = 0;
    o = find_name(name);
    return o ? read_value(options, in, o, attached) : unknown(text, name);
}

static int read_letters(ds_options *options, reader *in, const char *text)
{
    for (const char *c = text + 1; *c; c++) {
        const option *o = find_letter(*c);
        if (!o)
            return unknown(text, text + 1);
        if (o->argument)
            return read_value(options, in, o, c[1] ? c + 1 : NULL);
        if (read_value(options, in, o, NULL) < 0)
            return DS_EINVAL;
    }
    return 0;
}

/* DeepSpeed's -e names hosts to leave out. Text of these characters only is no Lua that does
 * anything, which needs a blank, a bracket, a quote or a '='. */
static int names_hosts(const char *text)
{
    return *text && text[strspn(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                      "0123456789-_.,:@")] == 0;
}

/* Options whose value is a number: a whole one where the target is an int. */
static const struct {
    enum ds_option_id id;
    const char *name;
    double least, most;
    size_t whole, real; /* where it goes in ds_options; 0: nowhere */
} numbers[] = {
#define INT(name, field, least, most)                                                              \
    {DS_OPT_##name, #name, least, most, offsetof(ds_options, field), 0},
#define REAL(name, field, least, most)                                                             \
    {DS_OPT_##name, #name, least, most, 0, offsetof(ds_options, field)},
#define PORT(name) {DS_OPT_##name, #name, 1, 65535, 0, 0},
    INT(num_gpus, num_slots, 1, 4096) INT(num_accelerators, num_slots, 1, 4096)
        INT(num_procs, num_slots, 1, 4096) INT(num_nodes, num_nodes, 1, 65536)
            INT(max_restarts, max_restarts, 0, 1000000) INT(min_elastic_nodes, min_nodes, 1, 65536)
                INT(max_elastic_nodes, max_nodes, 1, 65536) REAL(timeout, timeout, 0, 1e7)
                    REAL(grace, grace, 0, 1e7) PORT(master_port) PORT(ssh_port)};

/* Two options for one number may not differ: `given` has the fields that were set so far. */
static int read_number(ds_options *options, ds_options *given, size_t i)
{
    const char *text = options->value[numbers[i].id];
    int *to = numbers[i].whole ? (int *)((char *)options + numbers[i].whole) : NULL;
    int *before = numbers[i].whole ? (int *)((char *)given + numbers[i].whole) : NULL;
    char *end;
    double x;

    if (!text)
        return 0;
    x = strtod(text, &end);
    if (end == text || *end || !(x >= numbers[i].least && x <= numbers[i].most))
        return ds_fail(DS_EINVAL, "--%s wants a number from %g to %g, not '%s'", numbers[i].name,
                       numbers[i].least, numbers[i].most, text);
    if (numbers[i].real) {
        *(double *)((char *)options + numbers[i].real) = x;
        return 0;
    }
    if (x != (int)x)
        return ds_fail(DS_EINVAL, "--%s wants a whole number, not '%s'", numbers[i].name, text);
    if (!to)
        return 0;
    if (*before && *before != (int)x)
        return ds_fail(DS_EINVAL, "--%s %s: another option says %d", numbers[i].name, text,
                       *before);
    *to = *before = (int)x;
    if (to == &options->num_slots)
        options->slots_option = numbers[i].name;
    return 0;
}

static int check_launcher(ds_options *options)
{
    static const struct {
        const char *name;
        int srun;
    } launchers[] = {{"openmpi", 0}, {"slurm", 1}};
    const char *name = options->value[DS_OPT_launcher];

    for (size_t i = 0; name && i < sizeof launchers / sizeof *launchers; i++) {
        if (!strcasecmp(name, launchers[i].name)) {
            options->srun = launchers[i].srun;
            return 0;
        }
    }
    return name ? ds_fail(DS_EINVAL, "--launcher %s: there are openmpi and slurm", name) : 0;
}

/* What concerns a job of several ranks. */
static int check_job(ds_options *options)
{
    ds_options given = {0};

    options->timeout = 600;
    options->grace = 60;
    options->min_nodes = 1;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (read_number(options, &given, i) < 0)
            return DS_EINVAL;
    options->elastic = options->value[DS_OPT_elastic] || options->value[DS_OPT_elastic_training];
    if (check_launcher(options) < 0)
        return DS_EINVAL;
    if (options->job && !options->ranks && options->command != DS_RUN_PLAN)
        return ds_fail(DS_EINVAL,
                       "--%s is for a job of several ranks: add --num_gpus N, or --hostfile FILE",
                       options->job);
    if (options->elastic && !options->max_restarts)
        return ds_fail(DS_EINVAL, "--elastic is about starting again: add --max_restarts N");
    if (options->command == DS_RUN_PLAN)
        return 0; /* for as many ranks as it likes */
    if (options->value[DS_OPT_json] && !options->value[DS_OPT_dry_run])
        return ds_fail(DS_EINVAL, "--json is for --dry-run, and for dsrun plan");
    if (options->command == DS_RUN_ENV && options->value[DS_OPT_hostfile])
        return 0; /* of all hosts */
    if (options->ranks && options->command != DS_RUN_SCRIPT)
        return ds_fail(DS_EINVAL, "repl and env are one process: leave out what asks for ranks "
                                  "(--hostfile FILE env asks all hosts)");
    return 0;
}

static int check_plan(const ds_options *options)
{
    if (options->command != DS_RUN_PLAN)
        return options->plan ? ds_fail(DS_EINVAL, "--%s is for a plan: dsrun plan --%s …",
                                       options->plan, options->plan)
                             : 0;
    if (options->job)
        return ds_fail(DS_EINVAL, "--%s is for a job that runs; leave it out of the plan",
                       options->job);
    if (!options->script && !options->value[DS_OPT_help])
        return ds_fail(DS_EINVAL, "plan wants a script: dsrun plan --num_gpus 8 train.lua");
    return 0;
}

/* -e HOSTS, in a job: it is no code. */
static void take_hosts(ds_options *options)
{
    int kept = 0;

    if (!options->script)
        return;
    for (int i = 0; i < options->evals; i++) {
        const char *text = options->eval[i];

        if (!names_hosts(text)) {
            options->eval[kept++] = text;
            continue;
        }
        options->value[DS_OPT_exclude] = text;
        options->ranks = options->ranks ? options->ranks : "exclude";
    }
    options->evals = kept;
    if (kept == 0)
        options->value[DS_OPT_eval] = NULL;
}

static int check(ds_options *options)
{
    const char *seed = options->value[DS_OPT_seed];
    const char *device = options->value[DS_OPT_device];
    const char *level = options->value[DS_OPT_log_level];

    if (seed && (!*seed || seed[strspn(seed, "0123456789")] || strlen(seed) > 15))
        return ds_fail(DS_EINVAL, "--seed wants a whole number from 0 to 999999999999999, not '%s'",
                       seed);
    if (device && strcmp(device, "cpu") && strcmp(device, "cuda"))
        return ds_fail(DS_EINVAL, "--device wants cpu or cuda, not '%s'", device);
    take_hosts(options);
    if (check_job(options) < 0 || check_plan(options) < 0)
        return DS_EINVAL;
    if (!level && options->value[DS_OPT_quiet])
        level = "error";
    if (level && ds_log_level(level) < 0)
        return DS_EINVAL;
    for (int i = 0; i < ROWS; i++)
        if (table[i].action == DS_NOTE && options->value[table[i].id])
            ds_logf(DS_LOG_INFO, "--%s changes nothing here: %s", table[i].name, table[i].help);
    return 0;
}

/* Options up to the first word that is none, which is a script or a command. */
static int read_options(ds_options *options, reader *in)
{
    int rc = 0;

    while (rc == 0 && in->next < in->argc && in->argv[in->next][0] == '-' &&
           in->argv[in->next][1]) {
        const char *text = in->argv[in->next++];

        if (!strcmp(text, "--"))
            break;
        rc = text[1] == '-' ? read_long(options, in, text) : read_letters(options, in, text);
    }
    if (rc < 0)
        return rc;
    options->script = in->next < in->argc ? in->argv[in->next++] : NULL;
    options->arguments = in->argv + in->next;
    options->count = in->argc - in->next;
    return 0;
}

int ds_options_parse(ds_options *options, int argc, char **argv)
{
    reader in = {argc, 1, argv};
    int rc;

    memset(options, 0, sizeof *options);
    options->eval = calloc((size_t)argc + 1, sizeof *options->eval);
    if (!options->eval)
        return ds_fail(DS_ENOMEM, "out of memory");
    rc = read_options(options, &in);
    for (int i = 0; rc == 0 && options->script && i < COMMANDS; i++)
        if (!strcmp(options->script, commands[i].name))
            options->command = commands[i].command;
    if (rc == 0 && options->command == DS_RUN_PLAN)
        rc = read_options(options, &in); /* its own, and then its script */
    else if (options->command != DS_RUN_SCRIPT)
        options->script = NULL;
    return rc < 0 ? rc : check(options);
}

/* ---- help */

void ds_options_usage(FILE *out)
{
    fputs("usage: dsrun [options] script.lua [the script's options]\n"
          "       dsrun [options] -e CODE | -\n",
          out);
    for (int i = 0; i < COMMANDS; i++)
        fprintf(out, "       dsrun %-8s %s\n", commands[i].name, commands[i].help);
}

static void show_option(FILE *out, const option *o)
{
    char left[64];

    snprintf(left, sizeof left, "%c%c%s--%s%s%s", o->letter ? '-' : ' ',
             o->letter ? o->letter : ' ', o->letter ? ", " : "  ", o->name, o->argument ? " " : "",
             o->argument ? o->argument : "");
    fprintf(out, "  %-30s  %s\n", left, o->help);
}

void ds_options_plan_help(FILE *out)
{
    static const enum ds_option_id ranks[] = {DS_OPT_num_gpus, DS_OPT_num_nodes, DS_OPT_hostfile,
                                              DS_OPT_include,  DS_OPT_exclude,   DS_OPT_json};

    fputs(
        "usage: dsrun plan [options] train.lua [the script's options]\n\n"
        "Says what each rank of a job would take, at every ZeRO stage: memory by what it is for,\n"
        "what of that fits, bytes on the wire, and, given rates, the time of a step. Runs the\n"
        "script's first steps on tensors that have shapes and no values, in this process alone;\n"
        "loss:item() is 1, checkpoints are neither read nor written, and what the script prints\n"
        "goes to standard error.\n\n",
        out);
    for (int i = 0; i < ROWS; i++)
        for (size_t k = 0; k < sizeof ranks / sizeof *ranks; k++)
            if (table[i].action != GROUP && table[i].id == (int)ranks[k])
                show_option(out, &table[i]);
    for (int i = 0; i < ROWS; i++)
        if (table[i].action == DS_PLAN)
            show_option(out, &table[i]);
    fputs("\nexamples\n"
          "  dsrun plan --num_gpus 8 --num_nodes 8 --memory 16GiB train.lua --deepspeed_config "
          "ds.json\n"
          "  dsrun plan -H hosts --flops 200G --bandwidth 10Gbit/s train.lua\n"
          "  dsrun plan --num_gpus 64 --json train.lua\n",
          out);
}

void ds_options_help(FILE *out)
{
    ds_options_usage(out);
    fputs("\nRuns a Lua script that trains a neural network; '-' reads it from standard input.\n"
          "In the names of options, - and _ are the same.\n",
          out);
    for (int i = 0; i < ROWS; i++) {
        if (table[i].action == GROUP)
            fprintf(out, "\n%s\n", table[i].name);
        else
            show_option(out, &table[i]);
    }
    fputs("\nexamples\n"
          "  dsrun models/gpt/train.lua --steps 500     train a character GPT\n"
          "  dsrun --num_gpus 2 train.lua               two ranks on this machine\n"
          "  dsrun -H hosts train.lua                   ranks on the machines of a file\n"
          "  dsrun -H hosts --dry-run train.lua         where they would run, and how\n"
          "  dsrun --seed 7 train.lua                   the same numbers every time\n"
          "  dsrun -e 'print(ds.randn(2, 3))'           ds is there without require\n"
          "  dsrun --config-help optimizer              a section of the config file\n"
          "  kill -USR2 PID                             where is the script, or each rank?\n",
          out);
}
