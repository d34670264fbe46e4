/* scratch.h - memory for a CPU kernel's own use until it returns.
 *
 * One block a slot and thread, which only grows: made afresh in every call it would cost page
 * faults.
 * A kernel that calls another must know which slots that one uses.
 */
#ifndef DS_SCRATCH_H
#define DS_SCRATCH_H

#include <stddef.h>

enum ds_scratch_slot {
    DS_SCRATCH_DNNL,   /* oneDNN's own */
    DS_SCRATCH_PACKED, /* a matrix in oneDNN's order */
    DS_SCRATCH_A,      /* products: operands in another dtype, and a result */
    DS_SCRATCH_B,
    DS_SCRATCH_C,
    DS_SCRATCH_SUMS,   /* sums of each thread */
    DS_SCRATCH_ROWS,   /* a row for each thread */
    DS_SCRATCH_LOSSES, /* one number a row */
    DS_SCRATCH_BLOCK,  /* a block of sums on their way to low precision */
    DS_SCRATCH_SLOTS
};

/* At least `bytes`, aligned to 64, contents undefined. NULL, and a message: out of memory. */
void *ds_scratch(int slot, size_t bytes);

#endif
