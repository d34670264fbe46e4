/* xxh3.h - xxHash, by the library's own choice of instructions where it has one: with AVX-512 it
 * costs half.
 */
#ifndef DS_XXH3_H
#define DS_XXH3_H

#if defined __x86_64__ && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

#endif
