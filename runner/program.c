/* program.c - what ranks run, and its fingerprint.
 *
 * The hash of the file decides, not the version: two builds of one commit may differ.
 */
#include "runner/program.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/host.h"
#include "runner/version.h"

int ds_program_here(ds_program *out, const char *script)
{
    const char *library = getenv("DSRUN_LUA");
    char file[PATH_MAX], folder[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", file, sizeof file - 1);

    *out = (ds_program){0};
    if (length <= 0)
        return ds_fail(DS_ENOENT, "cannot read /proc/self/exe");
    file[length] = 0;
    if (!getcwd(folder, sizeof folder))
        return ds_fail(DS_ENOENT, "the working directory is gone");
    out->file = strdup(file);
    out->folder = strdup(folder);
    if (library && *library)
        out->library = realpath(library, NULL);
    if (script && strcmp(script, "-"))
        out->script = strdup(script);
    if (!out->file || !out->folder || (script && strcmp(script, "-") && !out->script))
        return ds_fail(DS_ENOMEM, "out of memory");
    return 0;
}

void ds_program_free(ds_program *p)
{
    free(p->file);
    free(p->library);
    free(p->libraries);
    free(p->script);
    free(p->folder);
    *p = (ds_program){0};
}

int ds_program_fingerprint(ds_fingerprint *out, const char *script)
{
    char executable[PATH_MAX], root[PATH_MAX], ds[PATH_MAX + 8];
    ds_tree library = {0};
    int rc = ds_host_find(executable, root);

    *out = (ds_fingerprint){0};
    snprintf(out->build, sizeof out->build, "%s (%s)", ds_version, ds_commit);
    if (rc == 0)
        rc = ds_tree_hash_file(out->binary, "/proc/self/exe");
    snprintf(ds, sizeof ds, "%s/ds", root);
    if (rc == 0)
        rc = ds_tree_read(&library, ds, 1);
    if (rc == 0)
        rc = ds_tree_hash(out->library, &library);
    ds_tree_free(&library);
    if (rc == 0 && script && access(script, F_OK) == 0)
        rc = ds_tree_hash_file(out->script, script);
    return rc;
}

int ds_program_print(FILE *to, const char *script)
{
    ds_fingerprint f;
    int rc = ds_program_fingerprint(&f, script);

    if (rc < 0)
        return rc;
    fprintf(to, "build %s\nbinary %s\nlibrary %s\nscript %s\n", f.build, f.binary, f.library,
            f.script);
    return 0;
}
