/* mpirun.c - the command line of Open MPI's mpirun.
 *
 * What it is not asked to do: binding (ranks take their cores themselves), output (ranks send it to
 * dsrun), signals and exit codes (the side channel).
 */
#include "runner/mpirun.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/child.h"
#include "runner/rank.h"

/* An option by version; %s: the folder. NULL: that version needs none. */
static const struct {
    const char *v4[3], *v5[3];
} flags[] = {
    {{"--allow-run-as-root"}, {"--allow-run-as-root"}},
    /* more ranks than cores are the user's to decide */
    {{"--oversubscribe"}, {"--map-by", ":OVERSUBSCRIBE"}},
    /* the default is one core a rank, for all of its threads */
    {{"--bind-to", "none"}, {"--bind-to", "none"}},
    /* version 4 hangs above 32 local ranks when it starts them from several threads; and a rank is
     * killed when the thread that started it ends */
    {{"--mca", "odls_base_num_threads", "0"}, {NULL}},
    /* ranks of this machine, whatever an allocation of SLURM's says */
    {{"--mca", "plm", "isolated"}, {NULL}},
    {{"--mca", "orte_tmpdir_base", "%s"}, {"--prtemca", "prte_tmpdir_base", "%s"}},
    {{"--mca", "btl_vader_backing_directory", "%s"}, {"--mca", "btl_sm_backing_directory", "%s"}},
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

void ds_mpirun_free(char **argv)
{
    for (char **a = argv; a && *a; a++)
        free(*a);
    free(argv);
}

/* Copies with the folder in place of %s, or (NULL) as it is. */
static char *copy(const char *text, const char *folder)
{
    return strdup(folder && !strcmp(text, "%s") ? folder : text);
}

int ds_mpirun_command(char ***out, const ds_mpirun *what, int major)
{
    size_t room = FLAGS * 3 + 8 + (size_t)what->count, n = 0;
    char **argv = calloc(room, sizeof *argv), ranks[16];
    int whole = 1;

    *out = argv;
    if (!argv)
        return ds_fail(DS_ENOMEM, "out of memory");
    argv[n++] = strdup("mpirun");
    for (size_t i = 0; i < FLAGS; i++) {
        const char *const *words = major < 5 ? flags[i].v4 : flags[i].v5;
        for (int w = 0; w < 3 && words[w]; w++)
            argv[n++] = copy(words[w], what->folder);
    }
    snprintf(ranks, sizeof ranks, "%d", what->ranks);
    argv[n++] = strdup("-np");
    argv[n++] = strdup(ranks);
    argv[n++] = strdup(what->program);
    for (int i = 0; i < what->count; i++) {
        const char *a = what->arguments[i];
        char *escaped = ds_rank_colon(a) ? malloc(strlen(a) + 2) : NULL;

        if (escaped)
            sprintf(escaped, "\\%s", a);
        argv[n++] = escaped ? escaped : copy(a, NULL);
    }
    for (size_t i = 0; i < n; i++)
        whole &= argv[i] != NULL;
    return whole ? 0 : ds_fail(DS_ENOMEM, "out of memory");
}
