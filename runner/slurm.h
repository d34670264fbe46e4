/* slurm.h - SLURM's way to write a number for each node of a job: "2(x3),1" is 2, 2, 2, 1. */
#ifndef DS_SLURM_H
#define DS_SLURM_H

/* {.text = …} to begin with. */
typedef struct ds_slurm_numbers {
    const char *text; /* what is not read yet */
    int number, left; /* of the last entry: so many nodes more have it */
} ds_slurm_numbers;

/* The next node's number, from 0; -1: there is no further one; -2: the text is not of that kind. */
int ds_slurm_number(ds_slurm_numbers *numbers);

#endif
