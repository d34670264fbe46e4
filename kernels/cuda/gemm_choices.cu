/* gemm_choices.cu - which of cuBLASLt's algorithms makes a product: timed once, and then kept.
 *
 * Two algorithms add in different orders, and two timings are never the same; so that the same training
 * gives the same bits in every run, a choice is taken from the first of these that has it:
 *   - a checkpoint that was loaded (ds_cuda_choose): resumed training goes on as it would have;
 *   - this process: a choice stays, whatever happens to the plan;
 *   - the file, $XDG_CACHE_HOME or ~/.cache/dsrun/products, or the one that DS_TUNE names;
 *   - a timing, which the file keeps. Where there is no file that can be written nothing is timed, and
 *     cuBLASLt's own first candidate is taken: reproducible before fast. So with DS_TUNE=0.
 *
 * A line of the file is the GPU's name, cuBLASLt's version, the key's numbers, and the number of the
 * candidate. The first line of a key counts and none is ever changed, so that of several ranks that time
 * the same product at once all take what the first of them wrote. It is read once, and after that only
 * what was added. Ranks of hosts with different files may choose differently: each then makes its own
 * gradients in its own way, the same in every run, and all apply the same average of them.
 */
#include "kernels/cuda/gemm_plan.h"

#include <cublasLt.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define NUMBERS ((int)(sizeof(gemm_key) / 8))
#define LINE 768
#define BUCKETS 1024

typedef struct entry {
    gemm_key key;
    int choice;
    int used; /* a plan was made with it */
    struct entry *next, *next_used;
} entry;

static struct {
    entry *bucket[BUCKETS];
    entry *first_used, **last_used;
    int opened;      /* path and file are known */
    char path[4096]; /* "": there is none */
    int file;        /* to append to; -1: nothing is timed */
    long at;         /* of the file, what was read */
    char *text;      /* what ds_cuda_choices gave */
} choices;

/* ---- entries */

static entry *find(const gemm_key *key)
{
    entry *e = choices.bucket[gemm_key_hash(key) % BUCKETS];

    while (e && memcmp(&e->key, key, sizeof *key) != 0)
        e = e->next;
    return e;
}

/* NULL: out of host memory. */
static entry *add(const gemm_key *key, int choice)
{
    entry **bucket = &choices.bucket[gemm_key_hash(key) % BUCKETS],
          *e = (entry *)calloc(1, sizeof *e);

    if (!e)
        return NULL;
    e->key = *key;
    e->choice = choice;
    e->next = *bucket;
    *bucket = e;
    return e;
}

/* ---- lines */

/* What a line begins with: all that algorithms depend on beside the key. */
static const char *prefix(void)
{
    static char text[320];
    const char *tf32 = getenv("DS_TF32");
    cudaDeviceProp p;

    if (!*text) {
        if (cudaGetDeviceProperties(&p, ds_cuda.index) != cudaSuccess)
            snprintf(p.name, sizeof p.name, "GPU");
        snprintf(text, sizeof text, "%.200s%s|%zu|", p.name,
                 tf32 && !strcmp(tf32, "1") ? ", TF32" : "", cublasLtGetVersion());
    }
    return text;
}

static void write_line(char *text, size_t bytes, const gemm_key *key, int choice)
{
    int64_t number[NUMBERS];
    int used = snprintf(text, bytes, "%s", prefix());

    memcpy(number, key, sizeof number);
    for (int i = 0; i < NUMBERS; i++)
        used += snprintf(text + used, bytes - (size_t)used, "%lld ", (long long)number[i]);
    snprintf(text + used, bytes - (size_t)used, "%d\n", choice);
}

/* Whether a line is whole, and of this GPU and version. */
static int read_line(gemm_key *key, int *choice, const char *line)
{
    int64_t number[NUMBERS];
    size_t length = strlen(prefix());
    const char *p = line + length;
    char *end;

    if (strncmp(line, prefix(), length) != 0)
        return 0;
    for (int i = 0; i < NUMBERS; i++, p = end) {
        number[i] = strtoll(p, &end, 10);
        if (end == p || *end != ' ')
            return 0;
    }
    *choice = (int)strtol(p, &end, 10);
    memcpy(key, number, sizeof number);
    return end != p && *end == '\n' && *choice >= 0;
}

/* ---- the file */

/* The default one's path, its folders made; "" where there is no home. */
static void default_path(char *path, size_t bytes)
{
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int used = cache && *cache == '/' ? snprintf(path, bytes, "%s", cache)
               : home && *home        ? snprintf(path, bytes, "%s/.cache", home)
                                      : 0;

    *path = used ? *path : 0;
    if (!used || used + 32 > (int)bytes) {
        *path = 0;
        return;
    }
    mkdir(path, 0777);
    snprintf(path + used, bytes - (size_t)used, "/dsrun");
    mkdir(path, 0777);
    snprintf(path + used, bytes - (size_t)used, "/dsrun/products");
}

static void stop_writing(void)
{
    if (choices.file >= 0)
        close(choices.file);
    choices.file = -1;
}

static void open_file(void)
{
    const char *tune = getenv("DS_TUNE");
    struct stat is;

    if (choices.opened)
        return;
    choices.opened = 1;
    choices.file = -1;
    if (tune && !strcmp(tune, "0"))
        return;
    if (tune && *tune && strcmp(tune, "1") != 0)
        snprintf(choices.path, sizeof choices.path, "%s", tune);
    else
        default_path(choices.path, sizeof choices.path);
    if (*choices.path)
        choices.file = open(choices.path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (*choices.path && (stat(choices.path, &is) < 0 || !S_ISREG(is.st_mode))) {
        *choices.path = 0;
        stop_writing();
    }
}

/* Takes what the file has that was not read yet, up to its last whole line. */
static void read_more(void)
{
    char line[LINE];
    FILE *f = *choices.path ? fopen(choices.path, "re") : NULL;
    gemm_key key;
    int choice;

    if (!f)
        return;
    fseek(f, choices.at, SEEK_SET);
    while (fgets(line, sizeof line, f)) {
        if (!strchr(line, '\n'))
            continue; /* too long, or somebody is writing it */
        choices.at = ftell(f);
        if (read_line(&key, &choice, line) && !find(&key))
            add(&key, choice);
    }
    fclose(f);
}

/* ---- for plans */

int gemm_choices_wanted(void)
{
    open_file();
    return choices.file >= 0;
}

int gemm_choice_find(const gemm_key *key)
{
    entry *e = find(key);

    if (!e) { /* another process may have been here meanwhile */
        open_file();
        read_more();
        e = find(key);
    }
    return e ? e->choice : -1;
}

/* One write() to a file that is opened for appending: lines of several processes do not mix. */
int gemm_choice_keep(const gemm_key *key, int choice)
{
    char line[LINE];
    entry *e;

    write_line(line, sizeof line, key, choice);
    if (write(choices.file, line, strlen(line)) == (ssize_t)strlen(line)) {
        read_more();
        e = find(key);
        return e ? e->choice : 0;
    }
    stop_writing();
    return 0;
}

void gemm_choice_use(const gemm_key *key, int choice)
{
    entry *e = find(key);

    if (!e)
        e = add(key, choice);
    if (!e || e->used)
        return;
    e->used = 1;
    if (!choices.last_used)
        choices.last_used = &choices.first_used;
    *choices.last_used = e;
    choices.last_used = &e->next_used;
}

/* ---- for checkpoints */

const char *ds_cuda_choices(void)
{
    size_t lines = 1, at = 0;

    for (entry *e = choices.first_used; e; e = e->next_used)
        lines++;
    free(choices.text);
    choices.text = (char *)malloc(lines * LINE);
    if (!choices.text)
        return NULL;
    choices.text[0] = 0;
    for (entry *e = choices.first_used; e; e = e->next_used) {
        write_line(choices.text + at, LINE, &e->key, e->choice);
        at += strlen(choices.text + at);
    }
    return choices.text;
}

int ds_cuda_choose(const char *text)
{
    int changed = 0, choice;
    gemm_key key;

    for (const char *line = text; *line;) {
        const char *end = strchr(line, '\n');
        entry *e;

        if (read_line(&key, &choice, line)) {
            e = find(&key);
            changed |= e && e->used && e->choice != choice;
            if (e)
                e->choice = choice;
            else if (!add(&key, choice))
                return ds_fail(DS_ENOMEM, "out of host memory");
        }
        line = end ? end + 1 : line + strlen(line);
    }
    if (changed)
        gemm_plans_drop();
    return changed;
}
