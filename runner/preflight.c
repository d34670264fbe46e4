/* preflight.c - whether a job can start on its hosts.
 *
 * One command a host, whose answer is lines "key value": what it says is judged here, beside what
 * the same command says on this machine. What else a user's shell prints is passed over.
 */
#include "runner/preflight.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"

#define MARK "dsrun-probe" /* what a shell's own files print comes before it */
#define SSH_FAILED 255     /* also behind an answer: the host was cut off since */

/* ---- the question */

/* The daemon of Open MPI 4 is orted, of 5 prted; neither tells Open MPI's version, but the mpirun
 * beside it does. */
static const char common[] =
    "echo " MARK "; echo \"ssh $SSH_CONNECTION\"; echo \"name $(uname -n)\"; "
    "echo \"cores $(getconf _NPROCESSORS_ONLN)\"; "
    "ls /sys/class/infiniband /sys/class/cxi 2>/dev/null | grep -q '[a-z0-9]$' && echo fabric yes; "
    "for d in orted prted; do "
    "p=$(command -v $d) && echo \"mpi $(\"${p%/*}/mpirun\" --version 2>/dev/null | head -n 1)\"; "
    "done; ";

static void ask_for_program(FILE *f, const ds_program *there)
{
    fputs("cd ", f);
    ds_remote_quote(f, there->folder);
    fputs(" && echo folder yes; [ -x ", f);
    ds_remote_quote(f, there->file);
    fputs(" ] && echo program yes && ", f);
    if (there->library) {
        fputs("DSRUN_LUA=", f);
        ds_remote_quote(f, there->library);
        fputc(' ', f);
    }
    if (there->libraries) {
        fputs("LD_LIBRARY_PATH=", f);
        ds_remote_quote(f, there->libraries);
        fputs("${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} ", f);
    }
    ds_remote_quote(f, there->file);
    fputs(" --check-host", f);
    if (there->script) {
        fputc(' ', f);
        ds_remote_quote(f, there->script);
    }
}

static int question(char **out, const ds_program *there)
{
    size_t bytes;
    FILE *f = open_memstream(out, &bytes);

    if (!f)
        return ds_fail(DS_ENOMEM, "out of memory");
    fputs(common, f);
    if (there)
        ask_for_program(f, there);
    return fclose(f) == 0 ? 0 : ds_fail(DS_ENOMEM, "out of memory");
}

/* ---- the answer */

/* NULL: the command did not begin there. */
static const char *answer_of(const ds_remote *r)
{
    const char *mark = strstr(r->output, MARK);

    return mark ? mark + strlen(MARK) : NULL;
}

/* The value of the first line "key value" at or behind `text`: where it begins; NULL: none. */
static const char *find(size_t *bytes, const char *text, const char *key)
{
    size_t n = strlen(key);

    while (text) {
        if (!strncmp(text, key, n) && text[n] == ' ') {
            *bytes = strcspn(text + n + 1, "\r\n");
            return text + n + 1;
        }
        text = strchr(text, '\n');
        text = text ? text + 1 : NULL;
    }
    return NULL;
}

static int has(const char *output, const char *key)
{
    size_t bytes;

    return find(&bytes, output, key) != NULL;
}

static void copy(char *out, size_t room, const char *output, const char *key)
{
    size_t bytes;
    const char *value = find(&bytes, output, key);

    snprintf(out, room, "%.*s", value ? (int)bytes : 0, value ? value : "");
}

/* "client port server port" */
static void read_addresses(ds_preflight_host *out, const char *output)
{
    char text[256];

    copy(text, sizeof text, output, "ssh");
    if (sscanf(text, "%63s %*s %63s", out->launcher, out->address) != 2)
        out->launcher[0] = out->address[0] = 0;
}

/* ---- faults */

typedef struct judge {
    FILE *report;
    const ds_remote *host;
    const char *answer, *self; /* the host's, and this machine's; NULL: none */
    const ds_program *there;
    const ds_fingerprint *here;
    int faults;
} judge;

static void fault(judge *j, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void fault(judge *j, const char *format, ...)
{
    va_list args;

    fprintf(j->report, "%s: ", j->host->host);
    va_start(args, format);
    vfprintf(j->report, format, args);
    va_end(args);
    fputc('\n', j->report);
    j->faults++;
}

static void judge_mpi(judge *j)
{
    size_t bytes, wanted_bytes;
    const char *wanted = find(&wanted_bytes, j->self, "mpi");
    const char *found = find(&bytes, j->answer, "mpi"), *next = found;

    if (!wanted)
        return; /* this machine has none: the launcher will say so */
    if (!found) {
        fault(j, "Open MPI is missing, or its orted is not on the PATH of a shell that is not "
                 "interactive: install openmpi-bin, or set PATH at the top of ~/.bashrc there");
        return;
    }
    for (size_t n = bytes; next; next = find(&n, next, "mpi"))
        if (!n || !wanted_bytes || (n == wanted_bytes && !strncmp(next, wanted, n)))
            return;
    fault(j, "%.*s there, %.*s here: all hosts want the same version", (int)bytes, found,
          (int)wanted_bytes, wanted);
}

static void judge_script(judge *j, const char *script)
{
    char hash[DS_TREE_HASH];

    copy(hash, sizeof hash, j->answer, "script");
    if (!*hash)
        fault(j, "there is no script %s: copy it, or add --push", script);
    else if (strcmp(hash, j->here->script))
        fault(j, "the script %s there differs from the one here: copy it, or add --push", script);
}

static void judge_start(judge *j, const char *file)
{
    size_t bytes;
    const char *line = ds_remote_last_line(&bytes, j->host->errors);

    fault(j, "%s does not run there (%.*s): install the same build, or add --push", file,
          bytes ? (int)bytes : 14, bytes ? line : "without a word");
}

/* What dsrun says of itself there, beside what it is here. */
static void judge_program(judge *j)
{
    const ds_program *p = j->there;
    ds_fingerprint there;

    copy(there.build, sizeof there.build, j->answer, "build");
    copy(there.binary, sizeof there.binary, j->answer, "binary");
    copy(there.library, sizeof there.library, j->answer, "library");
    if (!has(j->answer, "program")) {
        fault(j, "there is no program %s: install dsrun at the same path, or add --push", p->file);
        return;
    }
    if (!*there.library) {
        judge_start(j, p->file);
        return;
    }
    if (strcmp(there.binary, j->here->binary))
        fault(j, "%s is another build: %s there, %s here%s; install the same one, or add --push",
              p->file, there.build, j->here->build,
              strcmp(there.build, j->here->build) ? "" : " (and yet the files differ)");
    else if (strcmp(there.library, j->here->library))
        fault(j, "dsrun's Lua library there differs from the one here: install the same build, or "
                 "add --push");
    if (p->script && (*p->script == '/' || has(j->answer, "folder")))
        judge_script(j, p->script);
}

static void judge_answer(judge *j)
{
    if (j->host->code == -1) {
        fault(j, "the checks did not end within %.0f s: does one of its file systems hang?",
              j->host->seconds);
        return;
    }
    judge_mpi(j);
    if (j->there && !has(j->answer, "folder"))
        fault(j, "there is no folder %s, the working directory: make it, or mount its file system",
              j->there->folder);
    if (j->there)
        judge_program(j);
}

static void judge_host(judge *j, ds_preflight_host *out)
{
    char number[32];

    if (!j->answer || j->host->code == SSH_FAILED) {
        fprintf(j->report, "%s: ", j->host->host);
        ds_remote_why(j->report, j->host);
        fputc('\n', j->report);
        return;
    }
    out->answered = 1;
    copy(out->name, sizeof out->name, j->answer, "name");
    copy(number, sizeof number, j->answer, "cores");
    out->cores = atoi(number);
    out->fabric = has(j->answer, "fabric");
    if (!ds_remote_is_here(j->host->host))
        read_addresses(out, j->answer);
    judge_answer(j);
    out->ready = j->faults == 0;
}

static int judge_all(ds_preflight_host *out, FILE *report, const ds_remote *answers, int n,
                     const ds_program *there, const ds_fingerprint *here)
{
    int not_ready = 0;

    for (int i = 0; i < n; i++) {
        judge j = {.report = report, .host = &answers[i], .there = there, .here = here};

        j.answer = answer_of(&answers[i]);
        j.self = answer_of(&answers[n]);
        judge_host(&j, &out[i]);
        not_ready += !out[i].ready;
    }
    return not_ready;
}

static int write_report(char **report, ds_preflight_host *out, const ds_remote *answers, int n,
                        const ds_program *there, const ds_fingerprint *here)
{
    size_t bytes;
    FILE *f = open_memstream(report, &bytes);
    int not_ready = f ? judge_all(out, f, answers, n, there, here) : 0;

    if (!f || fclose(f) != 0)
        return ds_fail(DS_ENOMEM, "out of memory");
    if (not_ready)
        return ds_fail(DS_ECOMM, "%d of %d hosts %s not ready", not_ready, n,
                       not_ready == 1 ? "is" : "are");
    free(*report);
    *report = NULL;
    return 0;
}

int ds_preflight(ds_preflight_host *out, char **report, const ds_hosts *hosts,
                 const ds_program *here, const ds_program *there, const ds_ssh *ssh, double seconds)
{
    int n = hosts->count, rc;
    ds_remote *answers = calloc((size_t)n + 1, sizeof *answers);
    ds_fingerprint print = {0};
    char *command = NULL;

    *report = NULL;
    memset(out, 0, (size_t)n * sizeof *out);
    for (int i = 0; answers && i <= n; i++)
        answers[i].host = i < n ? hosts->host[i].name : "localhost"; /* the measure of them */
    rc = answers ? question(&command, there) : ds_fail(DS_ENOMEM, "out of memory");
    if (rc == 0 && here)
        rc = ds_program_fingerprint(&print, here->script);
    if (rc == 0)
        rc = ds_remote_run(answers, n + 1, ssh, command, seconds);
    if (rc == 0)
        rc = write_report(report, out, answers, n, there, &print);
    ds_remote_free(answers, n + 1);
    free(answers);
    free(command);
    return rc;
}
