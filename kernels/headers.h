/* headers.h - which headers a library was compiled with: a number for what they declare.
 *
 * tensor.h includes this, so every library of the user's own carries the number, and ds.load_library
 * refuses one whose number is not the program's: its tensors would lie elsewhere, and what it calls
 * would take other arguments. The number is made of tensor.h, error.h, backend.h, ops.def and
 * runner/ds.h without their comments. After a change of these: scripts/headers --write; make lint looks.
 */
#ifndef DS_HEADERS_H
#define DS_HEADERS_H

#define DS_HEADERS 0x783db758a261a66e

#ifdef __cplusplus
extern "C" {
#endif

/* Weak: one for all files of a library. */
unsigned long long ds_headers(void) __attribute__((weak, visibility("default")));

unsigned long long ds_headers(void)
{
    return DS_HEADERS;
}

#ifdef __cplusplus
}
#endif

#endif
