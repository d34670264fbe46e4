/* push.c - copies to hosts: asking what is there, and sending what is not.
 *
 * A copy is unpacked under a temporary name, counted, and then renamed, so a name that is there is
 * whole, and two pushes at once do no harm. Each use touches NAME.used; NAME.made is as old as the
 * copy; NAME.with lists the shared libraries that a program was used with. Beyond the last KEPT
 * copies, those not used for a day are removed, unless they hold a file that is younger than the
 * copy: that is a rank's, a checkpoint perhaps.
 */
#include "runner/push.h"

#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/log.h"
#include "runner/parcel.h"

#define MARK "dsrun-push" /* what a shell's own files print comes before it */
#define KEPT 8            /* copies; a push has two or three */
#define ASK_SECONDS 20
#define SEND_SECONDS 60
#define LEAST_SPEED 5e6 /* bytes per second, to all hosts together */

enum { PROGRAM, SCRIPT, LIBRARIES, PARCELS };

/* What is known of a host. */
typedef struct place {
    const char *name;
    char *cache;
    ds_words have, lacks,
        present; /* parcels; shared libraries that dsrun does not, or does, find */
    int folder;  /* 1: it has the working directory */
    int failed;  /* 1: the rest goes on without it */
} place;

typedef struct push {
    place *places;
    ds_remote *answers; /* [n], of the last question */
    int n;
    const ds_program *here;
    const ds_ssh *ssh;
    ds_parcel parcels[PARCELS];
    FILE *report;
    int faults;
    int64_t sent; /* bytes, of all hosts */
} push;

static void fault(push *p, place *place, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static void fault(push *p, place *place, const char *format, ...)
{
    va_list args;

    place->failed = 1;
    fprintf(p->report, "%s: ", place->name);
    va_start(args, format);
    vfprintf(p->report, format, args);
    va_end(args);
    fputc('\n', p->report);
    p->faults++;
}

/* ---- commands */

static void enter_cache(FILE *f, int make)
{
    const char *given = getenv("XDG_CACHE_HOME");

    fputs("umask 077; c=", f);
    if (given && *given == '/')
        ds_remote_quote(f, given);
    else
        fputs("${XDG_CACHE_HOME:-$HOME/.cache}", f);
    fprintf(f, "/dsrun; %scd \"$c\" || exit 1; echo " MARK "; ", make ? "mkdir -p \"$c\"; " : "");
}

/* What dsrun, in the folder of that name, finds and does not find of its shared libraries. */
static void ask_for_libraries(FILE *f, const char *program)
{
    fprintf(f,
            "[ -d %s ] && ldd %s/dsrun 2>&1 | sed -n "
            "-e 's/^[[:space:]]*\\([^ ]*\\) => not found.*/lacks \\1/p' "
            "-e 's/^[[:space:]]*\\([^ ]*\\) => .*/present \\1/p' "
            "-e 's/.*version .\\(.*\\). not found.*/old \\1/p'; ",
            program, program);
}

static void write_question(FILE *f, const push *p)
{
    enter_cache(f, 1);
    fputs("echo \"cache $(pwd)\"; [ -d ", f);
    ds_remote_quote(f, p->here->folder);
    fputs(" ] && echo folder yes; for h in *; do [ -d \"$h\" ] && echo \"have $h\"; done; ", f);
    for (int i = 0; i < PARCELS; i++)
        if (*p->parcels[i].hash)
            fprintf(f, "[ -d %s ] && touch %s.used; ", p->parcels[i].hash, p->parcels[i].hash);
    fprintf(f, "for h in $(cat %s.with 2>/dev/null); do [ -d $h ] && touch $h.used; done; ",
            p->parcels[PROGRAM].hash);
    ask_for_libraries(f, p->parcels[PROGRAM].hash);
    fputs(":", f);
}

/* Copies that nobody has used for a while, and what was left by a push that was cut off. */
static void write_cleaning(FILE *f)
{
    fprintf(f,
            "ls -t | sed -n 's/\\.used$//p' | tail -n +%d | while read h; do "
            "[ -n \"$(find $h.used -mtime +0)\" ] && [ -f $h.made ] && "
            "[ -z \"$(find $h -mindepth 1 -cnewer $h.made | head -n 1)\" ] && "
            "mv $h .tmp.$h && rm -rf .tmp.$h $h.used $h.made $h.with; done; "
            "find . -maxdepth 1 -name '.tmp.*' -mtime +0 -exec rm -rf {} +; ",
            KEPT + 1);
}

static void write_sending(FILE *f, const push *p, int i)
{
    const char *h = p->parcels[i].hash;

    enter_cache(f, 0);
    fprintf(f,
            "t=$(mktemp -d .tmp.XXXXXX) || exit 1; trap 'rm -rf $t $t.made' 0; "
            "e=$(tar -xmof - -C $t 2>&1) || { echo \"$e\" | head -n 1 >&2; exit 1; }; "
            "n=$(find $t \\( -type f -o -type l \\) -print0 | tr -dc '\\0' | wc -c); "
            "[ $n -eq %d ] || { echo \"only $n of %d files arrived\" >&2; exit 1; }; "
            "touch $t.made %s.used; "
            /* where it is there by now, another push was faster */
            "if mv -T $t %s 2>/dev/null; then mv $t.made %s.made; else [ -d %s ] || exit 1; fi; ",
            p->parcels[i].tree.count, p->parcels[i].tree.count, h, h, h, h);
    if (i == PROGRAM)
        ask_for_libraries(f, h);
    if (i == LIBRARIES)
        fprintf(f, "echo %s >>%s.with; ", h, p->parcels[PROGRAM].hash);
    write_cleaning(f);
    fputs(":", f);
}

/* ---- answers */

static int read_line(place *place, push *p, const char *line, size_t bytes)
{
    const struct {
        const char *key;
        ds_words *set;
    } sets[] = {{"have ", &place->have}, {"lacks ", &place->lacks}, {"present ", &place->present}};

    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        size_t n = strlen(sets[i].key);
        if (bytes > n && !strncmp(line, sets[i].key, n))
            return ds_words_add(sets[i].set, line + n, bytes - n);
    }
    if (bytes > 6 && !strncmp(line, "cache ", 6))
        place->cache = strndup(line + 6, bytes - 6);
    else if (bytes > 4 && !strncmp(line, "old ", 4))
        fault(p, place,
              "its system is older than the one that dsrun was built on, %.*s is missing: build "
              "dsrun on the oldest host",
              (int)bytes - 4, line + 4);
    else if (bytes == 10 && !strncmp(line, "folder yes", 10))
        place->folder = 1;
    return 0;
}

static int read_answer(push *p, place *place, const ds_remote *answer)
{
    const char *at = strstr(answer->output, MARK);
    int rc = 0;

    if (answer->code != 0) {
        fprintf(p->report, "%s: %s", place->name, at ? "--push: " : "");
        ds_remote_why(p->report, answer);
        fputc('\n', p->report);
        place->failed = 1;
        p->faults++;
        return 0;
    }
    for (; at && *at && rc == 0; at += *at == '\n') {
        size_t bytes = strcspn(at, "\n");
        rc = read_line(place, p, at, bytes);
        at += bytes;
    }
    return rc;
}

/* Runs on those hosts that are named in `answers`, whose indices are in `who`. */
static int run_on(push *p, const int *who, int n, const char *command, double seconds)
{
    int rc = ds_remote_run(p->answers, n, p->ssh, command, seconds);

    for (int i = 0; i < n && rc == 0; i++)
        rc = read_answer(p, &p->places[who[i]], &p->answers[i]);
    ds_remote_free(p->answers, n);
    return rc;
}

static int ask(push *p)
{
    int *who = malloc((size_t)p->n * sizeof *who), rc;
    char *command = NULL;
    size_t bytes;
    FILE *f = open_memstream(&command, &bytes);

    for (int i = 0; who && i < p->n; i++) {
        who[i] = i;
        p->answers[i] = (ds_remote){.host = p->places[i].name};
    }
    if (f)
        write_question(f, p);
    rc = f && fclose(f) == 0 && who ? run_on(p, who, p->n, command, ASK_SECONDS)
                                    : ds_fail(DS_ENOMEM, "out of memory");
    free(who);
    free(command);
    return rc;
}

static int send_packed(push *p, int parcel, const int *who, int n, const char *tar, size_t bytes)
{
    char *command = NULL;
    size_t length;
    FILE *f = open_memstream(&command, &length);
    int rc = DS_ENOMEM;

    for (int i = 0; i < n; i++) {
        p->answers[i] =
            (ds_remote){.host = p->places[who[i]].name, .input = tar, .input_bytes = bytes};
        p->sent += (int64_t)bytes;
    }
    if (f)
        write_sending(f, p, parcel);
    if (f && fclose(f) == 0)
        rc = run_on(p, who, n, command, SEND_SECONDS + (double)bytes * n / LEAST_SPEED);
    else
        ds_fail(rc, "out of memory");
    free(command);
    return rc;
}

/* To the hosts that do not have it; of the libraries, those that lack some. */
static int send_where_missing(push *p, int parcel)
{
    const char *hash = p->parcels[parcel].hash;
    int *who = malloc((size_t)p->n * sizeof *who), n = 0, rc = 0;
    size_t bytes = 0;
    char *tar = NULL;

    if (!who)
        return ds_fail(DS_ENOMEM, "out of memory");
    for (int i = 0; *hash && i < p->n; i++)
        if (!p->places[i].failed && !ds_words_has(&p->places[i].have, hash) &&
            (parcel != LIBRARIES || p->places[i].lacks.count))
            who[n++] = i;
    if (n)
        rc = ds_tree_pack(&tar, &bytes, &p->parcels[parcel].tree);
    if (rc == 0 && n)
        rc = send_packed(p, parcel, who, n, tar, bytes);
    ds_tree_drop(tar, bytes);
    free(who);
    return rc;
}

/* ---- in all */

static int lacks_some(const place *a)
{
    return !a->failed && a->lacks.count;
}

/* Whether all hosts that lack some library have this one. */
static int all_have(const push *p, const char *library)
{
    for (int i = 0; i < p->n; i++)
        if (lacks_some(&p->places[i]) && !ds_words_has(&p->places[i].present, library))
            return 0;
    return 1;
}

/* What any host lacks, and of the rest what all of those have. */
static int gather_libraries(push *p)
{
    ds_words lacks = {0}, present = {0};
    int rc = 0;

    for (int i = 0; i < p->n; i++) {
        const place *a = &p->places[i];
        for (int k = 0; lacks_some(a) && k < a->lacks.count && rc == 0; k++)
            rc = ds_words_add(&lacks, a->lacks.word[k], strlen(a->lacks.word[k]));
        for (int k = 0; lacks_some(a) && k < a->present.count && rc == 0; k++)
            if (all_have(p, a->present.word[k]))
                rc = ds_words_add(&present, a->present.word[k], strlen(a->present.word[k]));
    }
    if (rc == 0 && lacks.count)
        rc = ds_parcel_libraries(&p->parcels[LIBRARIES], p->here->file, &lacks, &present);
    ds_words_free(&lacks);
    ds_words_free(&present);
    return rc;
}

/* The first host that has not failed; NULL: all have. */
static const place *first_place(const push *p)
{
    for (int i = 0; i < p->n; i++)
        if (!p->places[i].failed)
            return &p->places[i];
    return NULL;
}

static void compare_caches(push *p)
{
    const place *first;

    for (int i = 0; i < p->n; i++)
        if (!p->places[i].failed && !p->places[i].cache)
            fault(p, &p->places[i], "--push: it did not answer as sh does");
    first = first_place(p);
    for (int i = 0; i < p->n; i++) {
        place *a = &p->places[i];
        if (!a->failed && strcmp(a->cache, first->cache))
            fault(p, a,
                  "its cache folder is %s, that of %s is %s, and ranks want one path: set "
                  "XDG_CACHE_HOME here to a folder that all hosts can make",
                  a->cache, first->name, first->cache);
    }
}

static char *join(const char *cache, const char *hash, const char *rest)
{
    char *path = NULL;

    return asprintf(&path, "%s/%s%s%s", cache, hash, *rest ? "/" : "", rest) < 0 ? NULL : path;
}

/* Whether that folder, "" for the parcel itself, is in it. */
static int is_in_parcel(const ds_parcel *parcel, const char *folder)
{
    size_t n = strlen(folder);

    for (int i = 0; n && i < parcel->tree.count; i++)
        if (!strncmp(parcel->tree.file[i].name, folder, n) && parcel->tree.file[i].name[n] == '/')
            return 1;
    return n == 0;
}

/* The working directory there; see push.h. */
static char *folder_there(const push *p, const char *cache)
{
    const ds_parcel *script = &p->parcels[SCRIPT];
    size_t n = script->tree.folder ? strlen(script->tree.folder) : 0;
    const char *here = p->here->folder;
    int all = 1;

    for (int i = 0; i < p->n; i++)
        all &= p->places[i].failed || p->places[i].folder;
    if (n && !strncmp(here, script->tree.folder, n) && (!here[n] || here[n] == '/'))
        return join(cache, script->hash,
                    is_in_parcel(script, here[n] ? here + n + 1 : "") && here[n] ? here + n + 1
                                                                                 : "");
    if (all)
        return strdup(here);
    return join(cache, *script->hash ? script->hash : p->parcels[PROGRAM].hash, "");
}

static int conclude(push *p, ds_program *there)
{
    const char *cache = first_place(p)->cache, *script = p->here->script;
    const char *slash = script ? strrchr(script, '/') : NULL;

    there->file = join(cache, p->parcels[PROGRAM].hash, "dsrun");
    there->library = join(cache, p->parcels[PROGRAM].hash, "lua");
    there->folder = folder_there(p, cache);
    if (*p->parcels[LIBRARIES].hash)
        there->libraries = join(cache, p->parcels[LIBRARIES].hash, "");
    if (script)
        there->script = join(cache, p->parcels[SCRIPT].hash, slash ? slash + 1 : script);
    if (!there->file || !there->library || !there->folder || (script && !there->script))
        return ds_fail(DS_ENOMEM, "out of memory");
    if (p->sent)
        ds_logf(DS_LOG_INFO, "--push: %.1f MiB sent; ranks run in %s", (double)p->sent / (1 << 20),
                there->folder);
    return 0;
}

static int run(push *p)
{
    int rc = ds_parcel_program(&p->parcels[PROGRAM], p->here->file);

    if (rc == 0 && p->here->script)
        rc = ds_parcel_script(&p->parcels[SCRIPT], p->here->script);
    if (rc == 0)
        rc = ask(p);
    if (rc == 0)
        compare_caches(p);
    for (int i = PROGRAM; i < LIBRARIES && rc == 0; i++)
        rc = send_where_missing(p, i);
    if (rc == 0)
        rc = gather_libraries(p);
    return rc == 0 ? send_where_missing(p, LIBRARIES) : rc;
}

static void free_places(push *p)
{
    for (int i = 0; p->places && i < p->n; i++) {
        free(p->places[i].cache);
        ds_words_free(&p->places[i].have);
        ds_words_free(&p->places[i].lacks);
        ds_words_free(&p->places[i].present);
    }
    free(p->places);
}

int ds_push(ds_program *there, char **report, const ds_hosts *hosts, const ds_program *here,
            const ds_ssh *ssh)
{
    push p = {.n = hosts->count, .here = here, .ssh = ssh};
    size_t bytes;
    int rc = DS_ENOMEM;

    *there = (ds_program){0};
    *report = NULL;
    p.places = calloc((size_t)p.n, sizeof *p.places);
    p.answers = calloc((size_t)p.n, sizeof *p.answers);
    p.report = open_memstream(report, &bytes);
    if (p.places && p.answers && p.report) {
        for (int i = 0; i < p.n; i++)
            p.places[i].name = hosts->host[i].name;
        rc = run(&p);
    } else {
        ds_fail(rc, "out of memory");
    }
    if (p.report)
        fclose(p.report);
    if (rc == 0 && first_place(&p))
        rc = conclude(&p, there);
    if (rc == 0 && p.faults) {
        rc = ds_fail(DS_ECOMM, "--push failed for some hosts");
    } else {
        free(*report);
        *report = NULL;
    }
    for (int i = 0; i < PARCELS; i++)
        ds_parcel_free(&p.parcels[i]);
    free_places(&p);
    free(p.answers);
    return rc;
}
