/* tree.c - the files of a folder: the list, its hash, a tar file of them.
 *
 * One walk makes the list, and tar is given that list, so that what is hashed, what is counted and
 * what is copied are the same files.
 */
#include "runner/tree.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "kernels/error.h"
#include "runner/child.h"

#define DEEPEST 64 /* folders in folders: links that are followed may go round */
#define BLOCK ((size_t)1 << 20)
#define SHOWN 4 /* entries of ds_tree_sizes() */

/* ---- the list */

static const char *const left_out[] = {"build", "build[-_.]*", "out"};

static int is_left_out(const char *name, int folder)
{
    for (size_t i = 0; folder && i < sizeof left_out / sizeof *left_out; i++)
        if (fnmatch(left_out[i], name, 0) == 0)
            return 1;
    return name[0] == '.';
}

static int add(ds_tree *t, const char *name, const struct stat *s)
{
    ds_tree_file *grown;

    if (t->count == t->room) {
        t->room = t->room ? 2 * t->room : 64;
        grown = realloc(t->file, (size_t)t->room * sizeof *t->file);
        if (!grown)
            return ds_fail(DS_ENOMEM, "out of memory");
        t->file = grown;
    }
    t->file[t->count] = (ds_tree_file){
        .name = strdup(name),
        .bytes = s->st_size,
        .kind = S_ISLNK(s->st_mode)    ? 'l'
                : s->st_mode & S_IXUSR ? 'x'
                                       : 'f',
    };
    if (!t->file[t->count].name)
        return ds_fail(DS_ENOMEM, "out of memory");
    t->count++;
    t->bytes += s->st_size;
    return 0;
}

static int walk(ds_tree *t, const char *within, int depth);

static int visit(ds_tree *t, DIR *in, const char *within, const char *entry, int depth)
{
    char name[PATH_MAX];
    struct stat s;

    if (snprintf(name, sizeof name, "%s%s%s", within, *within ? "/" : "", entry) >= PATH_MAX)
        return ds_fail(DS_EINVAL, "%s/%s…: the path is too long", t->folder, within);
    if (fstatat(dirfd(in), entry, &s, t->follow ? 0 : AT_SYMLINK_NOFOLLOW) < 0)
        return errno == ENOENT /* it has just gone, or is a link to nothing */
                   ? 0
                   : ds_fail(DS_EIO, "cannot look at %s/%s: %s", t->folder, name, strerror(errno));
    if (is_left_out(entry, S_ISDIR(s.st_mode)))
        return 0;
    if (S_ISDIR(s.st_mode))
        return walk(t, name, depth + 1);
    return S_ISREG(s.st_mode) || S_ISLNK(s.st_mode) ? add(t, name, &s) : 0;
}

static int walk(ds_tree *t, const char *within, int depth)
{
    char path[2 * PATH_MAX];
    struct dirent *entry;
    int rc = 0;
    DIR *in;

    snprintf(path, sizeof path, "%s/%s", t->folder, within);
    if (depth > DEEPEST)
        return ds_fail(DS_EINVAL, "%s: folders in folders, more than %d deep: do links go round?",
                       path, DEEPEST);
    in = opendir(path);
    if (!in)
        return ds_fail(DS_EIO, "cannot read the folder %s: %s", path, strerror(errno));
    while (rc == 0 && (entry = readdir(in)))
        rc = visit(t, in, within, entry->d_name, depth);
    closedir(in);
    return rc;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const ds_tree_file *)a)->name, ((const ds_tree_file *)b)->name);
}

int ds_tree_read(ds_tree *out, const char *folder, int follow)
{
    int rc;

    *out = (ds_tree){.folder = strdup(folder), .follow = follow};
    if (!out->folder)
        return ds_fail(DS_ENOMEM, "out of memory");
    rc = walk(out, "", 0);
    if (rc == 0 && out->count)
        qsort(out->file, (size_t)out->count, sizeof *out->file, by_name);
    return rc;
}

void ds_tree_free(ds_tree *t)
{
    for (int i = 0; i < t->count; i++)
        free(t->file[i].name);
    free(t->file);
    free(t->folder);
    *t = (ds_tree){0};
}

/* ---- hashes */

static int hash_content(XXH3_state_t *state, const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    char *block = malloc(BLOCK);
    ssize_t n = -1;

    if (fd >= 0 && block)
        while ((n = read(fd, block, BLOCK)) > 0)
            XXH3_128bits_update(state, block, (size_t)n);
    if (n < 0)
        ds_fail(DS_EIO, "cannot read %s: %s", path, strerror(errno));
    free(block);
    if (fd >= 0)
        close(fd);
    return n < 0 ? DS_EIO : 0;
}

static int hash_link(XXH3_state_t *state, const char *path)
{
    char target[PATH_MAX];
    ssize_t n = readlink(path, target, sizeof target);

    if (n < 0)
        return ds_fail(DS_EIO, "cannot read the link %s: %s", path, strerror(errno));
    XXH3_128bits_update(state, target, (size_t)n);
    return 0;
}

static int hash_file(XXH3_state_t *state, const ds_tree *t, const ds_tree_file *f)
{
    char path[2 * PATH_MAX];

    snprintf(path, sizeof path, "%s/%s", t->folder, f->name);
    XXH3_128bits_update(state, f->name, strlen(f->name) + 1);
    XXH3_128bits_update(state, &f->kind, 1);
    XXH3_128bits_update(state, &f->bytes, sizeof f->bytes);
    return f->kind == 'l' ? hash_link(state, path) : hash_content(state, path);
}

static int finish(char *hash, XXH3_state_t *state, int rc)
{
    XXH128_hash_t h = XXH3_128bits_digest(state);

    snprintf(hash, DS_TREE_HASH, "%016llx%016llx", (unsigned long long)h.high64,
             (unsigned long long)h.low64);
    XXH3_freeState(state);
    return rc;
}

static XXH3_state_t *begin(void)
{
    XXH3_state_t *state = XXH3_createState();

    if (state)
        XXH3_128bits_reset(state);
    else
        ds_fail(DS_ENOMEM, "out of memory");
    return state;
}

int ds_tree_hash(char *hash, const ds_tree *t)
{
    XXH3_state_t *state = begin();
    int rc = 0;

    if (!state)
        return DS_ENOMEM;
    for (int i = 0; i < t->count && rc == 0; i++)
        rc = hash_file(state, t, &t->file[i]);
    return finish(hash, state, rc);
}

int ds_tree_hash_file(char *hash, const char *path)
{
    XXH3_state_t *state = begin();

    return state ? finish(hash, state, hash_content(state, path)) : DS_ENOMEM;
}

/* ---- a tar file */

/* The names, each ended with a 0, to read from. */
static int open_list(const ds_tree *t)
{
    int fd = memfd_create("names", MFD_CLOEXEC);
    FILE *f = fd >= 0 ? fdopen(dup(fd), "w") : NULL;

    for (int i = 0; f && i < t->count; i++)
        fwrite(t->file[i].name, 1, strlen(t->file[i].name) + 1, f);
    if (!f || fclose(f) != 0 || lseek(fd, 0, SEEK_SET) < 0) {
        if (fd >= 0)
            close(fd);
        return ds_fail(DS_EIO, "cannot keep a list of %d files: %s", t->count, strerror(errno));
    }
    return fd;
}

/* A file without a name, on disk, as it may be large. */
static int open_nameless(void)
{
    const char *folder = getenv("TMPDIR");
    char path[PATH_MAX];
    int fd;

    snprintf(path, sizeof path, "%s/dsrun-push-XXXXXX", folder && *folder ? folder : "/tmp");
    fd = mkostemp(path, O_CLOEXEC);
    if (fd < 0)
        return ds_fail(DS_EIO, "cannot make %s: %s", path, strerror(errno));
    unlink(path);
    return fd;
}

static int explain_tar(int status, int errors)
{
    char text[400] = "";
    ssize_t n = pread(errors, text, sizeof text - 1, 0);

    text[n > 0 ? n : 0] = 0;
    text[strcspn(text, "\n")] = 0;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
        return ds_fail(DS_ENOENT, "there is no tar on this machine: install it");
    return ds_fail(DS_EIO, "tar failed: %s", *text ? text : "without a word");
}

static int run_tar(const ds_tree *t, int list, int tar, int errors)
{
    const char *argv[] = {
        "tar",
        "-c",
        "-f",
        "-",
        "--format=gnu",
        "--owner",
        "0",
        "--group",
        "0",
        "--mtime",
        "@0",
        "--no-recursion",
        "-C",
        t->folder,
        "--null",
        "--verbatim-files-from",
        "-T",
        "-",
        t->follow ? "-h" : NULL,
        NULL,
    };
    int status, rc;
    pid_t pid;

    rc = ds_child_spawn(&pid, (char *const *)argv, (int[]){list, tar, errors});
    if (rc < 0)
        return rc;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return ds_fail(DS_EIO, "tar has got lost: %s", strerror(errno));
    return status == 0 ? 0 : explain_tar(status, errors);
}

int ds_tree_pack(char **tar, size_t *bytes, const ds_tree *t)
{
    int list = open_list(t), fd = -1, errors = -1, rc = DS_EIO;
    struct stat s;

    *tar = NULL;
    if (list >= 0)
        fd = open_nameless();
    if (fd >= 0)
        errors = open_nameless();
    if (errors >= 0)
        rc = run_tar(t, list, fd, errors);
    if (rc == 0 && fstat(fd, &s) < 0)
        rc = ds_fail(DS_EIO, "tar's file: %s", strerror(errno));
    if (rc == 0) {
        *bytes = (size_t)s.st_size;
        *tar = mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        if (*tar == MAP_FAILED) {
            *tar = NULL;
            rc = ds_fail(DS_ENOMEM, "tar's file of %zu bytes: %s", *bytes, strerror(errno));
        }
    }
    for (int i = 0; i < 3; i++)
        if ((int[]){list, fd, errors}[i] >= 0)
            close((int[]){list, fd, errors}[i]);
    return rc;
}

void ds_tree_drop(char *tar, size_t bytes)
{
    if (tar)
        munmap(tar, bytes);
}

/* ---- sizes */

static void write_size(FILE *to, int64_t bytes)
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
    double x = (double)bytes;
    int i = 0;

    for (; x >= 1000 && i < 4; i++)
        x /= 1024;
    fprintf(to, i && x < 10 ? "%.1f %s" : "%.0f %s", x, units[i]);
}

/* The largest entry directly in the folder of those smaller than `below` (of equal ones, the first
 * of several is shown only); they stand together in the list. */
static int64_t largest_below(int64_t below, int *first, const ds_tree *t)
{
    int64_t most = -1;

    for (int i = 0, next; i < t->count; i = next) {
        size_t n = strcspn(t->file[i].name, "/");
        int64_t sum = 0;
        for (next = i; next < t->count && !strncmp(t->file[next].name, t->file[i].name, n) &&
                       (!t->file[next].name[n] || t->file[next].name[n] == '/');
             next++)
            sum += t->file[next].bytes;
        if (sum > most && sum < below) {
            most = sum;
            *first = i;
        }
    }
    return most;
}

void ds_tree_sizes(FILE *to, const ds_tree *t)
{
    int64_t bytes = INT64_MAX;
    int first = 0;

    write_size(to, t->bytes);
    for (int i = 0; i < SHOWN; i++) {
        bytes = largest_below(bytes, &first, t);
        if (bytes < 0)
            break;
        fprintf(to, "%s%.*s ", i ? ", " : " (", (int)strcspn(t->file[first].name, "/"),
                t->file[first].name);
        write_size(to, bytes);
    }
    if (t->count)
        fputc(')', to);
}
