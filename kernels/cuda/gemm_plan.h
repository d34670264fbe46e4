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
    int64_t bias, aux;        /* enum gemm_beside; aux is [m, n] without gaps */
    int64_t a_align, b_align; /* of the pointers, in bytes, at most 16 */
    int64_t d_align;          /* the least of d's, the bias's and aux's */
} gemm_key;

/* A bias that is added, and the sums that are its gradient; aux that is written, forward, and read,
 * backward. Sums: of d's rows with aux, of b's columns without. */
enum gemm_beside { GEMM_NONE, GEMM_FORWARD, GEMM_BACKWARD };

uint64_t gemm_key_hash(const gemm_key *key);

typedef struct gemm_operands {
    const void *a, *b;
    void *d;
    const void *bias; /* GEMM_BACKWARD: written */
    void *aux;        /* GEMM_BACKWARD: only read */
    float alpha, beta;
} gemm_operands;

/* d = alpha a b + beta d. DS_ENOSYS, without a message: cuBLASLt has nothing for this key. */
int gemm_multiply(const char *name, const gemm_key *key, const gemm_operands *operands);

/* All plans are made anew when they are wanted next. */
void gemm_plans_drop(void);

/* ---- choices among candidates (gemm_choices.cu) */

/* The candidate that was chosen for this key before, in this process or another; -1: none. */
int gemm_choice_find(const gemm_key *key);

/* Whether candidates are to be timed: there is a file that keeps the choices. */
int gemm_choices_wanted(void);

/* Keeps one in the file. The candidate to take: what another process wrote first, or, where the file
 * cannot be written any more, the first. */
int gemm_choice_keep(const gemm_key *key, int choice);

/* A plan was made with this one: it stays, and goes into checkpoints. */
void gemm_choice_use(const gemm_key *key, int choice);

#endif
