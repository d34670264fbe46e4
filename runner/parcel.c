/* parcel.c - what --push copies to hosts.
 *
 * The script's folder is a parcel of its own: it changes often, the rest seldom. The others are put
 * together in a temporary folder of links, which tar follows.
 */
#include "runner/parcel.h"

#include <errno.h>
#include <glob.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/file.h"
#include "runner/host.h"
#include "runner/remote.h"

#define LDD_SECONDS 30

/* ---- sets of words */

int ds_words_has(const ds_words *set, const char *word)
{
    for (int i = 0; i < set->count; i++)
        if (!strcmp(set->word[i], word))
            return 1;
    return 0;
}

int ds_words_add(ds_words *set, const char *word, size_t bytes)
{
    char *copy = strndup(word, bytes), **grown;

    if (copy && ds_words_has(set, copy)) {
        free(copy);
        return 0;
    }
    grown = copy ? realloc(set->word, ((size_t)set->count + 1) * sizeof *grown) : NULL;
    if (!grown) {
        free(copy);
        return ds_fail(DS_ENOMEM, "out of memory");
    }
    set->word = grown;
    set->word[set->count++] = copy;
    return 0;
}

void ds_words_free(ds_words *set)
{
    for (int i = 0; i < set->count; i++)
        free(set->word[i]);
    free(set->word);
    *set = (ds_words){0};
}

/* ---- a temporary folder of links */

static int open_stage(ds_parcel *p)
{
    const char *folder = getenv("TMPDIR");

    if (!folder || !*folder || strlen(folder) > sizeof p->stage - 24)
        folder = "/tmp";
    snprintf(p->stage, sizeof p->stage, "%s/dsrun-push-XXXXXX", folder);
    if (mkdtemp(p->stage))
        return 0;
    ds_fail(DS_EIO, "cannot make a folder in %s: %s", folder, strerror(errno));
    p->stage[0] = 0;
    return DS_EIO;
}

static int put(const ds_parcel *p, const char *path, const char *name)
{
    char link[PATH_MAX];

    snprintf(link, sizeof link, "%s/%s", p->stage, name);
    return symlink(path, link) == 0 || errno == EEXIST
               ? 0
               : ds_fail(DS_EIO, "cannot make %s: %s", link, strerror(errno));
}

static int seal(ds_parcel *p, const char *folder, int follow)
{
    char text[400] = "";
    FILE *f;
    int rc = ds_tree_read(&p->tree, folder, follow);

    if (rc == 0 && p->tree.bytes > DS_PARCEL_MOST) {
        f = fmemopen(text, sizeof text, "w");
        if (f) {
            ds_tree_sizes(f, &p->tree);
            fclose(f);
        }
        return ds_fail(DS_EINVAL,
                       "--push: %s holds %s, and 1 GiB is the most that is copied to hosts: move "
                       "out of it what ranks do not need, or can find elsewhere",
                       folder, text);
    }
    return rc == 0 ? ds_tree_hash(p->hash, &p->tree) : rc;
}

void ds_parcel_free(ds_parcel *p)
{
    if (p->stage[0])
        ds_remove(p->stage);
    ds_tree_free(&p->tree);
    *p = (ds_parcel){0};
}

/* ---- the program */

/* build/libds_cuda.so and the like, which dsrun opens while it runs. */
static int put_plugins(const ds_parcel *p, const char *file)
{
    const char *slash = strrchr(file, '/');
    char pattern[PATH_MAX];
    glob_t found;
    int rc = 0;

    snprintf(pattern, sizeof pattern, "%.*s/libds_*.so", slash ? (int)(slash - file) : 0, file);
    if (glob(pattern, 0, NULL, &found) != 0)
        return 0;
    for (size_t i = 0; i < found.gl_pathc && rc == 0; i++)
        rc = put(p, found.gl_pathv[i], strrchr(found.gl_pathv[i], '/') + 1);
    globfree(&found);
    return rc;
}

int ds_parcel_program(ds_parcel *out, const char *file)
{
    char executable[PATH_MAX], root[PATH_MAX], models[PATH_MAX + 16];
    int rc;

    *out = (ds_parcel){0};
    rc = ds_host_find(executable, root);
    if (rc == 0)
        rc = open_stage(out);
    if (rc == 0)
        rc = put(out, file, "dsrun");
    if (rc == 0)
        rc = put_plugins(out, file);
    if (rc == 0)
        rc = put(out, root, "lua");
    snprintf(models, sizeof models, "%s/../models", root); /* where `require "models.x"` looks */
    if (rc == 0 && access(models, R_OK) == 0)
        rc = put(out, models, "models");
    return rc == 0 ? seal(out, out->stage, 1) : rc;
}

/* ---- the script */

int ds_parcel_script(ds_parcel *out, const char *script)
{
    char folder[DS_PATH], path[PATH_MAX], home[PATH_MAX];
    const char *given = getenv("HOME");
    int rc;

    *out = (ds_parcel){0};
    rc = ds_path_folder(folder, script);
    if (rc < 0)
        return rc;
    if (!realpath(folder, path))
        return ds_fail(DS_ENOENT, "there is no folder %s: %s", folder, strerror(errno));
    if (!strcmp(path, "/") || (given && realpath(given, home) && !strcmp(path, home)))
        return ds_fail(DS_EINVAL,
                       "--push copies the script's folder, and %s lies in %s itself: move it into "
                       "a folder of its own",
                       script, path);
    return seal(out, path, 0);
}

/* ---- shared libraries */

/* Those of the C library, which belong to a host's kernel and loader. */
static const char *const own[] = {"linux-vdso.", "ld-linux",    "libc.so",    "libm.so",
                                  "libmvec.",    "libpthread.", "libdl.so",   "librt.so",
                                  "libutil.so",  "libanl.so",   "libresolv.", "libnss_"};

static int is_own(const char *name)
{
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (!strncmp(name, own[i], strlen(own[i])))
            return 1;
    return 0;
}

/* What ldd prints of files on this machine. */
static int ask_ldd(ds_remote *answer, const ds_words *files)
{
    char *command = NULL;
    size_t bytes;
    FILE *f = open_memstream(&command, &bytes);
    int rc = 0;

    *answer = (ds_remote){.host = "localhost"};
    if (!f)
        return ds_fail(DS_ENOMEM, "out of memory");
    fputs("ldd", f);
    for (int i = 0; i < files->count; i++) {
        fputc(' ', f);
        ds_remote_quote(f, files->word[i]);
    }
    rc = fclose(f) == 0 ? 0 : ds_fail(DS_ENOMEM, "out of memory");
    if (rc == 0)
        rc = ds_remote_run(answer, 1, NULL, command, LDD_SECONDS);
    if (rc == 0 && answer->code != 0)
        rc = ds_fail(DS_EIO, "ldd failed on this machine: %.200s", answer->errors);
    free(command);
    return rc;
}

/* Reads the next "NAME => PATH (0x…)"; 0: there is none. name, path: [PATH_MAX] */
static int next_library(const char **at, char *name, char *path)
{
    while (**at) {
        const char *line = *at, *end = line + strcspn(line, "\n");
        *at = *end ? end + 1 : end;
        if (sscanf(line, " %4095s => %4095s", name, path) == 2 && *path == '/')
            return 1;
    }
    return 0;
}

/* The files of the missing libraries. */
static int find_missing(ds_words *files, const ds_parcel *p, const char *output,
                        const ds_words *missing)
{
    char name[PATH_MAX], path[PATH_MAX];
    int found = 0, rc = 0;

    while (rc == 0 && next_library(&output, name, path))
        if (ds_words_has(missing, name)) {
            rc = ds_words_add(files, path, strlen(path));
            if (rc == 0)
                rc = put(p, path, name);
            found++;
        }
    if (rc == 0 && found < missing->count)
        rc = ds_fail(DS_ENOENT,
                     "--push: not all of the shared libraries that hosts lack (%s, …) are "
                     "on this machine",
                     missing->word[0]);
    return rc;
}

/* What these want themselves. */
static int put_wanted(const ds_parcel *p, const char *output, const ds_words *present)
{
    char name[PATH_MAX], path[PATH_MAX];
    int rc = 0;

    while (rc == 0 && next_library(&output, name, path))
        if (!is_own(name) && !ds_words_has(present, name))
            rc = put(p, path, name);
    return rc;
}

int ds_parcel_libraries(ds_parcel *out, const char *file, const ds_words *missing,
                        const ds_words *present)
{
    ds_words program = {(char *[]){(char *)file}, 1}, files = {0};
    ds_remote answer;
    int rc;

    *out = (ds_parcel){0};
    rc = open_stage(out);
    if (rc < 0)
        return rc;
    rc = ask_ldd(&answer, &program);
    if (rc == 0)
        rc = find_missing(&files, out, answer.output, missing);
    ds_remote_free(&answer, 1);
    if (rc == 0) {
        rc = ask_ldd(&answer, &files);
        if (rc == 0)
            rc = put_wanted(out, answer.output, present);
        ds_remote_free(&answer, 1);
    }
    ds_words_free(&files);
    return rc == 0 ? seal(out, out->stage, 1) : rc;
}
