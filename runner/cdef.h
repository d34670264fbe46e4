/* cdef.h - the declarations that Lua's ffi.cdef reads, and the list of kernels. */
#ifndef DS_CDEF_H
#define DS_CDEF_H

#include <stddef.h>

/* The text: the marked parts of kernels/tensor.h and runner/ds.h, then struct ds_ops. NULL: out of
 * memory. The caller frees it. */
char *ds_cdef(size_t *bytes);

enum ds_kind { DS_KIND_UNARY, DS_KIND_BINARY, DS_KIND_COMPARE, DS_KIND_KERNEL };

typedef struct ds_kernel_entry {
    const char *name;
    enum ds_kind kind;
    char saved; /* unary: 'x' or 'y', what its gradient needs; 0: it has no gradient */
} ds_kernel_entry;

/* The kernels in the order of ops.def, ended by a name of NULL. */
extern const ds_kernel_entry ds_kernel_list[];

#endif
