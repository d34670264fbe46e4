/* faults.h - all that is wrong with a text, in one message with a line for each. */
#ifndef DS_FAULTS_H
#define DS_FAULTS_H

#include <stddef.h>

#include "kernels/error.h"

#define DS_FAULTS_SHOWN 20

/* {0} to begin with. */
typedef struct ds_faults {
    int count, shown;
    size_t used;
    char text[DS_ERROR_BYTES - 2048]; /* that is left for the end */
} ds_faults;

/* One line more. The first DS_FAULTS_SHOWN are kept, the others counted. */
void ds_fault(ds_faults *faults, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Whether a further fault would only be counted, so there is no need to find words for it. */
int ds_faults_full(const ds_faults *faults);

/* 0 where there are none, else ds_fail(code) with all of them and, if it is not NULL, a last line. */
int ds_faults_fail(const ds_faults *faults, int code, const char *end);

/* A piece of a text as messages show it: not too long, control characters and bytes beyond ASCII as
 * \n, \xff. Returns out, which has room for DS_QUOTE bytes. */
#define DS_QUOTE 80
char *ds_quote(char *out, const char *text, size_t bytes);

#endif
