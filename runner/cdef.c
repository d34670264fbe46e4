/* cdef.c - what Lua reads of the C headers: one source, two readers.
 *
 * The headers themselves lie in the program's read-only data; the parts between their marker
 * comments go to ffi.cdef as they are. The struct of kernels is spelled out from ops.def.
 */
#include "runner/cdef.h"

#include <stdlib.h>
#include <string.h>

#include "runner/ds.h" /* for the dependency: .incbin below names no file to the compiler */

#define INCLUDE_TEXT(symbol, path)                                                                 \
    __asm__(".pushsection .rodata\n" #symbol ":\n.incbin \"" path "\"\n.byte 0\n.popsection\n");   \
    extern const char symbol[]

INCLUDE_TEXT(ds_text_tensor_h, "kernels/tensor.h");
INCLUDE_TEXT(ds_text_ds_h, "runner/ds.h");

/* The second level expands the letters C and T of a signature before it becomes text. */
#define TEXT_(...) #__VA_ARGS__
#define TEXT(...) TEXT_(__VA_ARGS__)

/* clang-format off */
static const char *const ops_text[] = {
    "typedef struct ds_ops {\n",
#define DS_UNARY(name, saved)                             \
    "int (*" #name ")" TEXT((T y, C x)) ";\n"            \
    "int (*" #name "_backward)" TEXT((T dx, C dy, C s)) ";\n",
#define DS_BINARY(name)                                   \
    "int (*" #name ")" TEXT((T y, C a, C b)) ";\n"       \
    "int (*" #name "_scalar)" TEXT((T y, C x, double s, int flip)) ";\n",
#define DS_COMPARE(name) DS_BINARY(name)
#define DS_KERNEL(name, signature) "int (*" #name ")" TEXT(signature) ";\n",
#include "kernels/ops.def"
    "} ds_ops;\n",
};
/* clang-format on */

const ds_kernel_entry ds_kernel_list[] = {
#define DS_UNARY(name, saved) {#name, DS_KIND_UNARY, saved},
#define DS_BINARY(name) {#name, DS_KIND_BINARY, 0},
#define DS_COMPARE(name) {#name, DS_KIND_COMPARE, 0},
#define DS_KERNEL(name, signature) {#name, DS_KIND_KERNEL, 0},
#include "kernels/ops.def"
    {NULL, DS_KIND_KERNEL, 0},
};

/* Appends the part of a header between its markers; returns its new end. */
static char *append_marked(char *out, const char *text)
{
    static const char begin[] = "/* ds.h: begin ffi */", end[] = "/* ds.h: end ffi */";
    const char *from = strstr(text, begin);
    const char *to = from ? strstr(from, end) : NULL;
    size_t bytes;

    if (!to)
        return out;
    from += sizeof begin - 1;
    bytes = (size_t)(to - from);
    memcpy(out, from, bytes);
    return out + bytes;
}

char *ds_cdef(size_t *bytes)
{
    size_t room = strlen(ds_text_tensor_h) + strlen(ds_text_ds_h) + 1;
    size_t count = sizeof ops_text / sizeof *ops_text;
    char *text, *end;

    for (size_t i = 0; i < count; i++)
        room += strlen(ops_text[i]);
    text = malloc(room);
    if (!text)
        return NULL;
    end = append_marked(text, ds_text_tensor_h);
    end = append_marked(end, ds_text_ds_h);
    for (size_t i = 0; i < count; i++) {
        size_t n = strlen(ops_text[i]);
        memcpy(end, ops_text[i], n);
        end += n;
    }
    *end = 0;
    *bytes = (size_t)(end - text);
    return text;
}
