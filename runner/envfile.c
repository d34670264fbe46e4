/* envfile.c - variables for the ranks.
 *
 * DeepSpeed hands the lines of .deepspeed_env to a remote shell, which then takes a comment for the end
 * of the command and quotes as it likes. Here they are read, once, and ranks get the bytes; a file that
 * worked there means the same here.
 */
#include "runner/envfile.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runner/faults.h"
#include "runner/file.h"

#define MOST_BYTES (1 << 20)         /* of a file */
#define MOST_VARIABLES 4096          /* of all */
#define MOST_VALUE ((128 << 10) - 2) /* NAME=VALUE: Linux takes 128 KiB with the final 0 */

#define LETTERS "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"
#define DIGITS "0123456789"

/* What a file must not set. A name that ends with '*' is a beginning. */
static const struct {
    const char *name, *reason;
} owned[] = {
    {"RANK", "dsrun sets it for each rank"},
    {"WORLD_SIZE", "dsrun sets it: hosts and slots say how many ranks there are"},
    {"LOCAL_RANK", "dsrun sets it for each rank"},
    {"LOCAL_SIZE", "dsrun sets it for each host"},
    {"NODE_RANK", "dsrun sets it for each host"},
    {"CROSS_RANK", "dsrun sets it for each host"},
    {"CROSS_SIZE", "dsrun sets it: hosts and slots say how many there are"},
    {"MASTER_ADDR", "dsrun sets it: use --master_addr"},
    {"MASTER_PORT", "dsrun sets it: use --master_port"},
    {"CUDA_VISIBLE_DEVICES", "dsrun sets it for each host: choose slots, as --include host:0,2"},
    {"DSRUN_SIDE", "it is dsrun's own"},
    {"DSRUN_JOB", "it is dsrun's own"},
    {"DSRUN_PID", "it is dsrun's own"},
    {"DSRUN_CPUS", "dsrun sets it: use --bind_core_list"},
    {"DS_ENV_FILE", "this is such a file"},
    {"OMPI_COMM_WORLD_*", "Open MPI sets it for each rank"},
    {"OMPI_UNIVERSE_SIZE", "Open MPI sets it"},
    {"PMIX_RANK", "Open MPI sets it for each rank"},
    {"PMIX_NAMESPACE", "Open MPI sets it"},
    {"PMIX_SERVER_*", "Open MPI sets it"},
    {"PMI_RANK", "the launcher sets it for each rank"},
    {"PMI_SIZE", "the launcher sets it"},
    {"SLURM_STEP_*", "SLURM sets it"},
    {"SLURM_PROCID", "SLURM sets it for each rank"},
    {"SLURM_LOCALID", "SLURM sets it for each rank"},
    {"SLURM_NODEID", "SLURM sets it for each host"},
};

/* Beginnings of what ranks have from the launching shell: settings of what works in a rank. */
static const char *const inherited[] = {
    "NCCL_",     "UCX_",      "OMP_",   "GOMP_",  "DS_",     "DSRUN_",  "LUA_",
    "OMPI_MCA_", "PMIX_MCA_", "FI_",    "CUDA_",  "CUDNN_",  "CUBLAS_", "CUBLASLT_",
    "ONEDNN_",   "DNNL_",     "HCOLL_", "SHARP_", "MLFLOW_",
};

/* ---- variables */

static void free_variable(ds_variable *v)
{
    free(v->name);
    free(v->value);
    free(v->from);
}

void ds_variables_free(ds_variables *v)
{
    for (int i = 0; i < v->count; i++)
        free_variable(&v->each[i]);
    free(v->each);
    *v = (ds_variables){0};
}

const ds_variable *ds_variables_find(const ds_variables *v, const char *name)
{
    for (int i = 0; i < v->count; i++)
        if (!strcmp(v->each[i].name, name))
            return &v->each[i];
    return NULL;
}

/* Takes the strings, which are freed where that fails; NULL: there was no memory for them. */
static int put(ds_variables *into, char *name, char *value, char *from)
{
    ds_variable new = {name, value, from}, *old, *more = into->each;
    size_t n = (size_t)into->count;

    if (!name || !value || !from)
        goto fail;
    old = (ds_variable *)ds_variables_find(into, name);
    if (old) {
        free_variable(old);
        *old = new;
        return 0;
    }
    if ((n & (n - 1)) == 0) /* its room is always a power of two */
        more = realloc(more, (n ? 2 * n : 1) * sizeof *more);
    if (!more)
        goto fail;
    into->each = more;
    more[into->count++] = new;
    return 0;

fail:
    free_variable(&new);
    return ds_fail(DS_ENOMEM, "out of memory");
}

/* Why a file may not set it; NULL: it may. */
static const char *owner(const char *name, size_t bytes)
{
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) {
        const char *pattern = owned[i].name;
        size_t length = strcspn(pattern, "*");

        if (bytes >= length && !strncmp(name, pattern, length) &&
            (bytes == length || pattern[length]))
            return owned[i].reason;
    }
    return NULL;
}

static int is_name(const char *text, size_t bytes)
{
    if (bytes == 0 || (*text >= '0' && *text <= '9'))
        return 0;
    for (size_t i = 0; i < bytes; i++)
        if (!text[i] || !strchr(LETTERS DIGITS, text[i]))
            return 0;
    return 1;
}

/* ---- reading */

typedef struct parser {
    ds_variables *into;
    ds_faults *faults;
    const char *path;
    const char *at, *end; /* what is not read yet */
    int line;             /* the number of the line that `at` is in */
    int rc;
} parser;

static int is_blank(char c)
{
    return c == ' ' || c == '\t';
}

static void skip_blanks(parser *p)
{
    while (p->at < p->end && is_blank(*p->at))
        p->at++;
}

/* Where the line ends that `at` is in: at its '\n' or "\r\n", or at the end of all. */
static const char *line_end(const parser *p)
{
    const char *end = memchr(p->at, '\n', (size_t)(p->end - p->at));

    if (!end)
        end = p->end;
    return end > p->at && end[-1] == '\r' ? end - 1 : end;
}

static void next_line(parser *p)
{
    const char *end = memchr(p->at, '\n', (size_t)(p->end - p->at));

    p->at = end ? end + 1 : p->end;
    p->line++;
}

/* What an unquoted value is: up to the end, or a comment behind a blank. */
static char *unquoted(const parser *p, const char *end)
{
    const char *text = p->at, *stop;

    for (stop = text; stop < end; stop++)
        if (*stop == '#' && is_blank(stop[-1])) /* there is at least the '=' before it */
            break;
    while (stop > text && is_blank(stop[-1]))
        stop--;
    return strndup(text, (size_t)(stop - text));
}

/* The closing quote of one that is open at `at`; NULL: there is none. */
static const char *closing(const parser *p)
{
    char quote = *p->at;

    for (const char *c = p->at + 1; c < p->end; c++) {
        if (*c == quote)
            return c;
        if (quote == '"' && *c == '\\')
            c++;
    }
    return NULL;
}

/* What stands between quotes, the first of which is at text[-1]. */
static char *unescape(const char *text, const char *end)
{
    char *value = malloc((size_t)(end - text) + 1), *out = value;
    int escapes = text[-1] == '"';

    for (; value && text < end; text++) {
        if (escapes && *text == '\\' && text + 1 < end && strchr("\"\\n$", text[1])) {
            text++;
            *out++ = *text == 'n' ? '\n' : *text;
        } else {
            *out++ = *text;
        }
    }
    if (value)
        *out = 0;
    return value;
}

/* A value in quotes; afterwards p is in the line where that ends. NULL: a fault, or no memory. */
static char *quoted(parser *p)
{
    const char *begin = p->at, *close = closing(p), *end;
    int line = p->line;
    char *value;

    if (!close) {
        ds_fault(p->faults, "%s:%d: the quote %c that begins here does not end", p->path, line,
                 *begin);
        return NULL;
    }
    for (const char *c = begin; c < close; c++)
        p->line += *c == '\n';
    p->at = close + 1;
    end = line_end(p);
    skip_blanks(p);
    if (p->at < end && !(*p->at == '#' && is_blank(p->at[-1]))) {
        ds_fault(p->faults,
                 "%s:%d: text behind the closing quote of line %d (write \\%c for a quote "
                 "inside of double ones)",
                 p->path, p->line, line, '"');
        return NULL;
    }
    if (memchr(begin, 0, (size_t)(close - begin))) {
        ds_fault(p->faults, "%s:%d: NUL byte between the quotes", p->path, line);
        return NULL;
    }
    value = unescape(begin + 1, close);
    if (!value)
        p->rc = ds_fail(DS_ENOMEM, "out of memory");
    return value;
}

/* The name in front of the '='. Where it is no name it may be a piece of a secret that lacks its quote,
 * so it is cut. */
static void check_name(const parser *p, const char *name, size_t bytes)
{
    const char *reason = owner(name, bytes);
    char shown[DS_QUOTE];

    if (reason)
        ds_fault(p->faults, "%s:%d: %.*s is not for this file: %s", p->path, p->line, (int)bytes,
                 name, reason);
    else if (!is_name(name, bytes))
        ds_fault(p->faults,
                 "%s:%d: '%s'%s before the '=' is no name: it has letters, digits and '_'", p->path,
                 p->line, ds_quote(shown, name, bytes < 24 ? bytes : 24), bytes < 24 ? "" : "…");
}

/* Adds a variable; takes the value. */
static void keep(parser *p, const char *name, size_t bytes, char *value, int line)
{
    char *from = NULL;

    if (bytes + strlen(value) > MOST_VALUE) {
        ds_fault(p->faults, "%s:%d: the value of %.*s has %zu bytes; there is room for %zu",
                 p->path, line, bytes < 80 ? (int)bytes : 80, name, strlen(value),
                 MOST_VALUE - bytes);
        free(value);
        return;
    }
    if (asprintf(&from, "%s:%d", p->path, line) < 0)
        from = NULL;
    p->rc = put(p->into, strndup(name, bytes), value, from);
    if (p->rc == 0 && p->into->count > MOST_VARIABLES) {
        ds_fault(p->faults, "%s:%d: these are more than %d variables", p->path, line,
                 MOST_VARIABLES);
        p->at = p->end;
    }
}

/* KEY=VALUE, p->at at its first letter; afterwards p is in the last line of it. */
static void read_variable(parser *p, const char *end)
{
    const char *name = p->at, *equals = memchr(name, '=', (size_t)(end - name));
    int line = p->line;
    size_t bytes;
    char *value;

    bytes = (size_t)((equals ? equals : end) - name);
    while (bytes && is_blank(name[bytes - 1]))
        bytes--;
    if (!equals) {
        int known = is_name(name, bytes) && bytes < 80;

        ds_fault(p->faults, "%s:%d: %.*s%sno '=': a line is KEY=VALUE", p->path, line,
                 known ? (int)bytes : 0, name, known ? " has " : "");
        return;
    }
    check_name(p, name, bytes);
    p->at = equals + 1;
    skip_blanks(p);
    if (p->at < end && (*p->at == '"' || *p->at == '\''))
        value = quoted(p); /* also behind a bad name: it may have lines */
    else if ((value = unquoted(p, end)) == NULL)
        p->rc = ds_fail(DS_ENOMEM, "out of memory");
    if (value)
        keep(p, name, bytes, value, line);
}

static void read_line(parser *p)
{
    const char *end = line_end(p), *begin;

    skip_blanks(p);
    if (p->at == end || *p->at == '#')
        return;
    if (memchr(p->at, 0, (size_t)(end - p->at))) {
        ds_fault(p->faults, "%s:%d: NUL byte: this is no text", p->path, p->line);
        return;
    }
    begin = p->at;
    if (end - begin > 7 && !memcmp(begin, "export", 6) && is_blank(begin[6])) {
        p->at += 6;
        skip_blanks(p);
        if (p->at < end && *p->at == '=') /* somebody's variable has that name */
            p->at = begin;
    }
    read_variable(p, end);
}

/* Adds to both; what is in `into` is for nothing where there are faults. */
static int read_text(ds_variables *into, ds_faults *faults, const char *text, size_t bytes,
                     const char *path)
{
    parser p = {into, faults, path, text, text + bytes, 1, 0};

    if (bytes >= 3 && !memcmp(text, "\xef\xbb\xbf", 3)) /* what some editors put before UTF-8 */
        p.at += 3;
    while (p.at < p.end && p.rc == 0) {
        read_line(&p);
        next_line(&p);
    }
    return p.rc;
}

/* Moves what was read to where it is wanted, or ends it. */
static int finish(ds_variables *into, ds_variables *new, const ds_faults *faults, int rc)
{
    if (rc == 0)
        rc = ds_faults_fail(faults, DS_ECORRUPT, NULL);
    for (int i = 0; rc == 0 && i < new->count; i++) {
        rc = put(into, new->each[i].name, new->each[i].value, new->each[i].from);
        new->each[i] = (ds_variable){0};
    }
    ds_variables_free(new);
    return rc;
}

int ds_variables_parse(ds_variables *into, const char *text, size_t bytes, const char *path)
{
    ds_variables new = {0};
    ds_faults faults = {0};
    int rc = read_text(&new, &faults, text, bytes, path);

    return finish(into, &new, &faults, rc);
}

/* ---- files */

static int read_file(ds_variables *into, ds_faults *faults, const char *path, int optional)
{
    char *text;
    int64_t bytes;
    int rc = ds_read_whole(&text, &bytes, path, MOST_BYTES);

    if (rc == DS_ENOENT && optional)
        return 0;
    if (rc == 0)
        rc = read_text(into, faults, text, (size_t)bytes, path);
    free(text);
    return rc;
}

/* The folder, where it is another one than the present one, and open to this user. */
static const char *home(void)
{
    const char *folder = getenv("HOME");
    struct stat here, there;

    if (!folder || !*folder || access(folder, X_OK) < 0 || stat(folder, &there) < 0)
        return NULL;
    if (stat(".", &here) == 0 && here.st_dev == there.st_dev && here.st_ino == there.st_ino)
        return NULL;
    return folder;
}

static int read_files(ds_variables *into, ds_faults *faults)
{
    static const char *const names[] = {".deepspeed_env", ".dsrun_env"};
    const char *folder = home();
    int rc = 0;

    for (size_t i = 0; i < 2 && folder && rc == 0; i++) {
        char *path;

        if (asprintf(&path, "%s/%s", folder, names[i]) < 0)
            return ds_fail(DS_ENOMEM, "out of memory");
        rc = read_file(into, faults, path, 1);
        free(path);
    }
    for (size_t i = 0; i < 2 && rc == 0; i++)
        rc = read_file(into, faults, names[i], 1);
    return rc;
}

int ds_variables_read(ds_variables *into)
{
    const char *named = getenv("DS_ENV_FILE");
    ds_variables new = {0};
    ds_faults faults = {0};
    int rc;

    if (!named || !*named) {
        rc = read_files(&new, &faults);
    } else {
        rc = read_file(&new, &faults, named, 0);
        if (rc == DS_ENOENT)
            ds_fail(rc, "DS_ENV_FILE names %s, and there is no such file", named);
    }
    return finish(into, &new, &faults, rc);
}

/* ---- the launching shell */

static int is_inherited(const char *name, size_t bytes)
{
    for (size_t i = 0; i < sizeof inherited / sizeof *inherited; i++)
        if (!strncmp(name, inherited[i], strlen(inherited[i])))
            return is_name(name, bytes) && !owner(name, bytes);
    return 0;
}

int ds_variables_inherit(ds_variables *into, char **environ)
{
    for (char **e = environ; *e; e++) {
        size_t bytes = strcspn(*e, "=");
        char *name;
        int rc;

        if (!(*e)[bytes] || !is_inherited(*e, bytes))
            continue;
        name = strndup(*e, bytes);
        if (name && ds_variables_find(into, name)) {
            free(name);
            continue;
        }
        rc = put(into, name, strdup(*e + bytes + 1), strdup("environment"));
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* ---- the launcher itself */

int ds_variables_set(ds_variables *into, const char *name, const char *value, const char *from)
{
    return put(into, strdup(name), strdup(value), strdup(from));
}
