/* mpirun.h - the command line of Open MPI's mpirun, versions 4 and 5. */
#ifndef DS_MPIRUN_H
#define DS_MPIRUN_H

/* What to start and how. */
typedef struct ds_mpirun {
    int ranks;
    const char *folder;  /* for its files, which it may leave there */
    const char *program; /* what each rank runs */
    int count;           /* and its arguments */
    char **arguments;
} ds_mpirun;

/* Asks mpirun for its version. DS_ENOENT: there is none, or it is not Open MPI's. */
int ds_mpirun_version(int *major);

/* *argv is to be freed with ds_mpirun_free(). */
int ds_mpirun_command(char ***argv, const ds_mpirun *what, int major);
void ds_mpirun_free(char **argv);

#endif
