/* gemm_plan.h - products as cuBLASLt takes them, and how it makes them. */
#ifndef DS_CUDA_GEMM_PLAN_H
#define DS_CUDA_GEMM_PLAN_H

#include "kernels/cuda/device.h"

/* What decides how a product is made. Numbers only, without gaps: compared and hashed as bytes, written
 * as text. Matrices are by columns, as cuBLASLt counts them: d [m, n] = a [m, k] b [k, n], and ld is the
 * way from one column to the next, or of a transposed one from one row to the next. */
typedef struct gemm_key {
    int64_t m, n, k;
    int64_t a_transposed, b_transposed;
    int64_t a_ld, b_ld, d_ld;
    int64_t dtype, d_dtype; /* of a and b; of d */
    int64_t batch, a_step, b_step, d_step;
    int64_t bias, aux;        /* 1: is there; aux is [m, n] without gaps */
    int64_t a_align, b_align; /* of the pointers, in bytes, at most 16 */
    int64_t d_align;          /* the least of d's, the bias's and aux's */
} gemm_key;

typedef struct gemm_operands {
    const void *a, *b;
    void *d;
    const void *bias;
    void *aux;
    float alpha, beta;
} gemm_operands;

/* d = alpha a b + beta d. DS_ENOSYS, without a message: cuBLASLt has nothing for this key. */
int gemm_multiply(const char *name, const gemm_key *key, const gemm_operands *operands);

/* ---- choices that were timed, kept in a file (gemm_choices.cu) */

/* Whether products are to be timed: DS_TUNE is set. */
int gemm_choices_wanted(void);

/* The candidate that the file names for this key on this GPU; -1: none. */
int gemm_choice_find(const gemm_key *key);

/* Adds one, and returns what the file then says: another process may have been first. */
int gemm_choice_keep(const gemm_key *key, int choice);

#endif
