/* cudnn.h - cuDNN, opened when it is first wanted: a machine without it runs all the same.
 *
 * Only the graph interface is used, in its C form. cuDNN 9.16 is the least: earlier ones lack engines
 * for some of the graphs that are built here.
 */
#ifndef DS_CUDA_CUDNN_H
#define DS_CUDA_CUDNN_H

#include <stddef.h>

#define DS_CUDNN_LEAST 91600

#ifndef DS_SIMT
#if __has_include(<cudnn.h>)
#include <cudnn.h>
#if CUDNN_VERSION >= DS_CUDNN_LEAST
#define DS_HAS_CUDNN 1
#endif
#endif
#endif

/* Part of the device's description: "cuDNN 9.19.0", or why there is none that can be used. */
void ds_cudnn_describe(char *text, size_t bytes);

#ifdef DS_HAS_CUDNN

#define DS_CUDNN_FUNCTIONS(F)                                                                      \
    F(GetVersion)                                                                                  \
    F(GetErrorString)                                                                              \
    F(GetLastErrorString)                                                                          \
    F(Create)                                                                                      \
    F(SetStream)                                                                                   \
    F(BackendCreateDescriptor)                                                                     \
    F(BackendDestroyDescriptor)                                                                    \
    F(BackendSetAttribute)                                                                         \
    F(BackendGetAttribute)                                                                         \
    F(BackendFinalize)                                                                             \
    F(BackendExecute)

typedef struct ds_cudnn_library {
#define F(name) decltype(&cudnn##name) name;
    DS_CUDNN_FUNCTIONS(F)
#undef F
} ds_cudnn_library;

/* NULL, and ds_cudnn_why(), where there is none. Looked for: the file or folder that DS_CUDNN_LIBRARY
 * names; where the loader looks; beside this library; beside libcublasLt, also as Python's wheels are
 * laid out. */
const ds_cudnn_library *ds_cudnn(void);
const char *ds_cudnn_why(void);

#endif
#endif
