/* mpirun.c - the commands that start ranks.
 *
 * What mpirun is not asked to do: binding (ranks take their cores themselves), output (ranks send it
 * to dsrun), signals and exit codes (the side channel).
 *
 * It starts a daemon of its own on every other host, by ssh. That one goes through this program
 * (ds_agent), so that the job's files are in a folder of the same name everywhere, which goes with it.
 */
#include "runner/mpirun.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/child.h"
#include "runner/rank.h"

#define MOST_WORDS 3
#define WORD_BYTES (PATH_MAX + 256)

/* Which jobs an option is for. */
enum when { ALWAYS, HERE, NETWORK, BY_SSH };

/* Words that stand for something; a row with one that is not there is left out. */
enum word { FOLDER, HOSTS, SSH, AGENT, INTERFACE, CWD, PML, WORDS };
static const char *const names[WORDS] = {"FOLDER",    "HOSTS", "SSH", "AGENT",
                                         "INTERFACE", "CWD",   "PML"};

/* An option of mpirun's, by version. None: that version needs none. */
static const struct {
    enum when when;
    const char *v4[MOST_WORDS], *v5[MOST_WORDS];
} flags[] = {
    {ALWAYS, {"--allow-run-as-root"}, {"--allow-run-as-root"}},
    /* more ranks than cores are the user's to decide */
    {HERE, {"--oversubscribe"}, {"--map-by", ":OVERSUBSCRIBE"}},
    {NETWORK, {"--oversubscribe"}, {"--map-by", "seq:OVERSUBSCRIBE"}},
    /* ranks in the order of the file's lines, also where this machine is one of the hosts, which
     * other ways put first */
    {NETWORK, {"--mca", "rmaps", "seq"}, {NULL}},
    /* the default is one core a rank, for all of its threads */
    {ALWAYS, {"--bind-to", "none"}, {"--bind-to", "none"}},
    /* version 4 hangs above 32 local ranks when it starts them from several threads; and a rank is
     * killed when the thread that started it ends */
    {ALWAYS, {"--mca", "odls_base_num_threads", "0"}, {NULL}},
    {ALWAYS, {"--mca", "orte_tmpdir_base", "FOLDER"}, {"--prtemca", "prte_tmpdir_base", "FOLDER"}},
    {ALWAYS,
     {"--mca", "btl_vader_backing_directory", "FOLDER"},
     {"--mca", "btl_sm_backing_directory", "FOLDER"}},
    /* ranks of this machine, whatever an allocation of SLURM's says */
    {HERE, {"--mca", "plm", "isolated"}, {NULL}},
    {NETWORK, {"--hostfile", "HOSTS"}, {"--hostfile", "HOSTS"}},
    {NETWORK, {"-wdir", "CWD"}, {"--wdir", "CWD"}},
    {BY_SSH, {"--mca", "plm", "rsh"}, {"--prtemca", "plm", "ssh"}},
    {BY_SSH, {"--mca", "plm_rsh_agent", "SSH"}, {"--prtemca", "plm_ssh_agent", "SSH"}},
    /* only this machine needs to reach the others by ssh */
    {BY_SSH, {"--mca", "plm_rsh_no_tree_spawn", "1"}, {"--prtemca", "plm_ssh_no_tree_spawn", "1"}},
    {NETWORK, {"--mca", "orte_launch_agent", "AGENT"}, {"--prtemca", "prte_launch_agent", "AGENT"}},
    /* a host that is gone is noticed after 2 + 3 * 1 s; without these, never */
    {NETWORK,
     {"--mca", "oob_tcp_keepalive_time", "2"},
     {"--prtemca", "oob_tcp_keepalive_time", "2"}},
    {NETWORK,
     {"--mca", "oob_tcp_keepalive_intvl", "1"},
     {"--prtemca", "oob_tcp_keepalive_intvl", "1"}},
    {NETWORK,
     {"--mca", "oob_tcp_keepalive_probes", "3"},
     {"--prtemca", "oob_tcp_keepalive_probes", "3"}},
    /* without it ranks look for fast networks for 0.2 s each, also where there are none */
    {NETWORK, {"--mca", "pml", "PML"}, {"--mca", "pml", "PML"}},
    {NETWORK,
     {"--mca", "oob_tcp_if_include", "INTERFACE"},
     {"--prtemca", "prte_if_include", "INTERFACE"}},
    {NETWORK,
     {"--mca", "btl_tcp_if_include", "INTERFACE"},
     {"--mca", "btl_tcp_if_include", "INTERFACE"}},
};

#define FLAGS (sizeof flags / sizeof *flags)

int ds_mpirun_version(int *major)
{
    char *const argv[] = {"mpirun", "--version", NULL};
    char line[256] = "";
    int rc = ds_child_ask(line, sizeof line, argv);

    if (rc < 0)
        return rc;
    if (!*line)
        return ds_fail(DS_ENOENT, "several ranks want Open MPI, and there is no mpirun here: "
                                  "install openmpi-bin, or put its folder on PATH");
    if (sscanf(line, "mpirun (Open MPI) %d", major) != 1)
        return ds_fail(DS_ENOENT,
                       "mpirun is not Open MPI's, it says '%.80s': put the folder of "
                       "Open MPI's first on PATH",
                       line);
    return 0;
}

/* ---- building a command */

typedef struct command {
    char **argv;
    size_t count, room;
    int lost; /* there was no memory for a word */
} command;

static void add(command *c, const char *word)
{
    if (c->count + 2 > c->room) {
        char **grown = realloc(c->argv, (c->room + 64) * sizeof *grown);

        if (!grown) {
            c->lost = 1;
            return;
        }
        c->argv = grown;
        c->room += 64;
    }
    c->argv[c->count] = strdup(word);
    c->lost |= !c->argv[c->count];
    c->argv[c->count += !c->lost] = NULL;
}

static void add_number(command *c, int number)
{
    char text[16];

    snprintf(text, sizeof text, "%d", number);
    add(c, text);
}

/* The hosts' names, with commas. */
static void add_list(command *c, const ds_hosts *hosts)
{
    char *text = NULL;
    size_t bytes;
    FILE *f = open_memstream(&text, &bytes);

    for (int h = 0; f && h < hosts->count; h++)
        fprintf(f, "%s%s", h ? "," : "", hosts->host[h].name);
    if (f && fclose(f) == 0)
        add(c, text);
    else
        c->lost = 1;
    free(text);
}

/* The words of a text as a shell takes them apart: blanks, quotes, backslashes; nothing is expanded. */
static int add_words(command *c, const char *text)
{
    char *word = malloc(strlen(text) + 1), quote = 0;
    size_t n = 0;
    int some = 0;

    if (!word)
        return ds_fail(DS_ENOMEM, "out of memory");
    for (const char *t = text;; t++) {
        if (!*t || (!quote && strchr(" \t\n", *t))) {
            word[n] = 0;
            if (some)
                add(c, word);
            n = 0;
            some = 0;
            if (!*t)
                break;
            continue;
        }
        some = 1;
        if (quote ? *t == quote : *t == '"' || *t == '\'')
            quote = quote ? 0 : *t;
        else if (*t == '\\' && quote != '\'' && t[1])
            word[n++] = *++t;
        else
            word[n++] = *t;
    }
    free(word);
    return quote ? ds_fail(DS_EINVAL, "--launcher_args: a %c has no end in: %s", quote, text) : 0;
}

void ds_mpirun_free(char **argv)
{
    for (char **a = argv; a && *a; a++)
        free(*a);
    free(argv);
}

/* Whether the user has something to say of an option of Open MPI's. */
static int is_given(const ds_plan *p, const char *option)
{
    const char *args = p->options->value[DS_OPT_launcher_args];
    char name[96];

    snprintf(name, sizeof name, "OMPI_MCA_%s", option);
    return (args && strstr(args, option)) || ds_variables_find(&p->env, name) || getenv(name);
}

/* Open MPI takes no IPv6 address for a host's name, and cuts user@10.0.0.1 at its first dot: such a
 * host gets a name that is its number, which ds_ssh_alias() turns back for ssh. */
#define ALIAS "dsrun-node-"

static int needs_alias(const char *name)
{
    return strpbrk(name, "@:") != NULL;
}

/* ssh, or this program in front of it, where a host has an alias. */
static const char *ssh_for(const ds_plan *p, char *program)
{
    ssize_t n;

    for (int h = 0; h < p->hosts.count; h++) {
        if (!needs_alias(p->hosts.host[h].name) || p->slurm)
            continue;
        n = readlink("/proc/self/exe", program, PATH_MAX);
        if (n <= 0)
            break;
        snprintf(program + n, PATH_MAX - (size_t)n, " --ssh");
        return program;
    }
    return "ssh";
}

/* What the words of the table stand for; those that do not apply stay "". */
static void fill_words(char words[WORDS][WORD_BYTES], const ds_start *s)
{
    const ds_plan *p = s->plan;
    char program[PATH_MAX + 8], port[24] = "";

    memset(words, 0, WORDS * sizeof *words);
    if (s->ssh.port)
        snprintf(port, sizeof port, " -p %d", s->ssh.port);
    snprintf(words[FOLDER], sizeof *words, "%s", s->folder);
    snprintf(words[HOSTS], sizeof *words, "%s/hosts", s->folder);
    snprintf(words[SSH], sizeof *words,
             "%s%s -o BatchMode=yes -o ConnectTimeout=10 "
             "-o ServerAliveInterval=2 -o ServerAliveCountMax=3%s%s",
             ssh_for(p, program), port, s->ssh.control ? " -o ControlPath=" : "",
             s->ssh.control ? s->ssh.control : "");
    /* mpirun takes it apart at blanks */
    if (!strpbrk(s->plan->there->file, " \t") &&
        !(s->plan->there->libraries && strpbrk(s->plan->there->libraries, " \t")))
        snprintf(words[AGENT], sizeof *words, "%s%s%s%s --agent %s %s %s",
                 s->plan->there->libraries ? "env LD_LIBRARY_PATH=" : "",
                 s->plan->there->libraries ? s->plan->there->libraries : "",
                 s->plan->there->libraries ? " " : "", s->plan->there->file, s->folder, p->hub,
                 s->version < 5 ? "orted" : "prted");
    if (!is_given(p, "btl_tcp_if_include") && !is_given(p, "btl_tcp_if_exclude") &&
        !is_given(p, "oob_tcp_if_include") && !is_given(p, "oob_tcp_if_exclude"))
        snprintf(words[INTERFACE], sizeof *words, "%s", p->interface);
    if (!p->fabric && !is_given(p, "pml"))
        snprintf(words[PML], sizeof *words, "ob1");
    snprintf(words[CWD], sizeof *words, "%s", s->plan->there->folder);
}

static const char *meaning(const char *word, char words[WORDS][WORD_BYTES])
{
    for (int w = 0; w < WORDS; w++)
        if (!strcmp(word, names[w]))
            return words[w];
    return word;
}

static void add_flags(command *c, const ds_start *s)
{
    const ds_plan *p = s->plan;
    char words[WORDS][WORD_BYTES];

    fill_words(words, s);
    for (size_t i = 0; i < FLAGS; i++) {
        const char *const *row = s->version < 5 ? flags[i].v4 : flags[i].v5;
        int fits = flags[i].when == ALWAYS ||
                   (p->network ? flags[i].when == NETWORK || (flags[i].when == BY_SSH && !p->slurm)
                               : flags[i].when == HERE);

        for (int w = 0; w < MOST_WORDS && row[w]; w++)
            fits = fits && *meaning(row[w], words);
        for (int w = 0; fits && w < MOST_WORDS && row[w]; w++)
            add(c, meaning(row[w], words));
    }
}

static void add_program(command *c, const ds_start *s, int escapes)
{
    add(c, s->plan->there->file);
    for (int i = 0; i < s->count; i++) {
        const char *a = s->arguments[i];
        char *escaped = escapes && ds_rank_colon(a) ? malloc(strlen(a) + 2) : NULL;

        if (escaped)
            sprintf(escaped, "\\%s", a);
        add(c, escaped ? escaped : a);
        free(escaped);
    }
}

static int mpirun_command(command *c, const ds_start *s)
{
    const ds_plan *p = s->plan;
    const char *args = p->options->value[DS_OPT_launcher_args];
    int rc;

    add(c, "mpirun");
    add_flags(c, s);
    for (int i = 0; p->network && i < p->env.count; i++) {
        add(c, "-x"); /* the value travels as it is, and is in no command line */
        add(c, p->env.each[i].name);
    }
    rc = args ? add_words(c, args) : 0;
    add(c, "-np");
    add_number(c, p->ranks);
    add_program(c, s, 1);
    return rc;
}

/* The number of slots that every host has; 0: they differ. */
static int slots_of_each(const ds_hosts *hosts)
{
    for (int h = 1; h < hosts->count; h++)
        if (hosts->host[h].slots != hosts->host[0].slots)
            return 0;
    return hosts->host[0].slots;
}

/* Ranks host by host, as many on each as it has slots. Where these differ SLURM reads them from
 * SLURM_HOSTFILE; not always, as SLURM 22.05's controller can crash after it. */
static int srun_command(command *c, const ds_start *s)
{
    const ds_plan *p = s->plan;
    const char *args = p->options->value[DS_OPT_launcher_args];
    int each = slots_of_each(&p->hosts), rc;

    add(c, "srun");
    add(c, "--mpi=pmix");
    add(c, each ? "--distribution=block" : "--distribution=arbitrary");
    if (each) {
        add(c, "--ntasks-per-node");
        add_number(c, each);
        add(c, "--nodelist");
        add_list(c, &p->hosts);
    }
    add(c, "--overcommit");
    add(c, "--cpu-bind=none");
    add(c, "--kill-on-bad-exit=1");
    add(c, "--export=ALL");
    add(c, "--chdir");
    add(c, s->plan->there->folder);
    rc = args ? add_words(c, args) : 0;
    add(c, "--nodes");
    add_number(c, p->hosts.count);
    add(c, "--ntasks");
    add_number(c, p->ranks);
    add_program(c, s, 0);
    return rc;
}

int ds_mpirun_command(char ***argv, const ds_start *start)
{
    command c = {0};
    int rc = start->plan->options->srun ? srun_command(&c, start) : mpirun_command(&c, start);

    *argv = c.argv;
    return rc == 0 && c.lost ? ds_fail(DS_ENOMEM, "out of memory") : rc;
}

static void write_host(FILE *f, const ds_hosts *hosts, int node)
{
    if (needs_alias(hosts->host[node].name))
        fprintf(f, ALIAS "%d\n", node);
    else
        fprintf(f, "%s\n", hosts->host[node].name);
}

/* The name of host number `node` in DSRUN_HOSTS; freed by the caller. */
static char *name_of(int node)
{
    const char *all = getenv("DSRUN_HOSTS");

    for (; all && node > 0; node--) {
        all = strchr(all, ';');
        all += all ? 1 : 0;
    }
    return all ? strndup(all, strcspn(all, " ")) : NULL;
}

int ds_ssh_alias(int argc, char **argv)
{
    int i = 2;

    while (i < argc && argv[i][0] == '-') /* ours and mpirun's options: -p PORT, -o WORD, -x */
        i += !strcmp(argv[i], "-p") || !strcmp(argv[i], "-o") ? 2 : 1;
    if (i < argc && !strncmp(argv[i], ALIAS, strlen(ALIAS)))
        argv[i] = name_of(atoi(argv[i] + strlen(ALIAS)));
    argv[1] = "ssh";
    execvp(argv[1], argv + 1);
    return ds_fail(DS_ENOENT, "there is no ssh on PATH: %s", strerror(errno));
}

int ds_mpirun_hosts(const ds_start *start)
{
    const ds_hosts *hosts = &start->plan->hosts;
    char path[PATH_MAX];
    FILE *f;

    if (!start->plan->network && !start->plan->options->srun)
        return 0;
    snprintf(path, sizeof path, "%s/hosts", start->folder);
    f = fopen(path, "w");
    if (!f)
        return ds_fail(DS_EIO, "cannot write %s: %s", path, strerror(errno));
    for (int h = 0; h < hosts->count; h++)
        for (int s = 0; s < hosts->host[h].slots; s++)
            write_host(f, hosts, h);
    if (start->plan->options->srun && !slots_of_each(hosts))
        setenv("SLURM_HOSTFILE", path, 1);
    return fclose(f) == 0 ? 0 : ds_fail(DS_EIO, "cannot write %s: %s", path, strerror(errno));
}

/* ---- on another host */

int ds_agent(int argc, char **argv)
{
    const char *folder = argc > 4 ? argv[2] : "";
    pid_t cleaner;
    int pipe;

    if (*folder != '/')
        return ds_fail(DS_EINVAL, "--agent is for dsrun's own use");
    /* A host may be this machine under another name: then the folder is there, and not ours. */
    if (mkdir(folder, 0700) == 0) {
        int rc = ds_child_cleaner(&cleaner, &pipe, folder, NULL, argv[3]);

        if (rc < 0)
            return rc;
        /* The daemon keeps its end of the pipe: it closes when that one ends. */
        if (dup(pipe) < 0)
            return ds_fail(DS_EIO, "no descriptor: %s", strerror(errno));
    } else if (errno != EEXIST) {
        return ds_fail(DS_EIO, "cannot make the folder %s on this machine: %s", folder,
                       strerror(errno));
    }
    setenv("DSRUN_FOLDER", folder, 1); /* the daemon is one of what is ended */
    execvp(argv[4], argv + 4);
    return ds_fail(DS_ENOENT,
                   "cannot start %s, Open MPI's daemon: install openmpi-bin here, and see that its "
                   "folder is on PATH for commands over ssh",
                   argv[4]);
}
