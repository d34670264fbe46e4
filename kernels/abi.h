/* abi.h - a number for what a program and its plugin must agree upon: the list of kernels with their
 * arguments, and the sizes of the structs that both see. A plugin of another build is then refused,
 * where it would be called with the wrong arguments.
 */
#ifndef DS_ABI_H
#define DS_ABI_H

#include "kernels/backend.h"

/* The second level expands the letters C and T of a signature before it becomes text. */
#define DS_ABI_TEXT_(...) #__VA_ARGS__
#define DS_ABI_TEXT(...) DS_ABI_TEXT_(__VA_ARGS__)

static inline uint64_t ds_backend_abi(void)
{
    static const char *const text[] = {
#define C const ds_tensor *
#define T ds_tensor *
#define DS_UNARY(name, saved) #name,
#define DS_BINARY(name) #name "2",
#define DS_COMPARE(name) #name "?",
#define DS_KERNEL(name, signature) #name DS_ABI_TEXT(signature),
#include "kernels/ops.def"
#undef C
#undef T
    };
    uint64_t h = 14695981039346656037u ^ sizeof(ds_backend) ^ sizeof(ds_tensor) << 16 ^
                 (uint64_t)sizeof(ds_device_counters) << 32; /* FNV-1a */

    for (size_t i = 0; i < sizeof text / sizeof *text; i++)
        for (const char *p = text[i]; *p; p++)
            h = (h ^ (unsigned char)*p) * 1099511628211u;
    return h;
}

#undef DS_ABI_TEXT
#undef DS_ABI_TEXT_

#endif
