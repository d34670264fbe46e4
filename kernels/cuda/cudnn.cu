/* cudnn.cu - finds and opens cuDNN. */
#include "kernels/cuda/cudnn.h"

#include <stdio.h>

#ifdef DS_HAS_CUDNN

#include <dlfcn.h>
#include <limits.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>

#define LIBRARY "libcudnn.so.9"

static ds_cudnn_library library;
static char why_not[512];

/* The folder of a file, with its last slash; "" when it has none. */
static void folder_of(char *folder, size_t bytes, const char *file)
{
    const char *slash = strrchr(file, '/');

    snprintf(folder, bytes, "%.*s", slash ? (int)(slash - file + 1) : 0, file);
}

static void *open_in(const char *folder, const char *below)
{
    char path[PATH_MAX + 64];

    if (!*folder)
        return NULL;
    snprintf(path, sizeof path, "%s%s%s", folder, below, LIBRARY);
    return dlopen(path, RTLD_NOW | RTLD_LOCAL);
}

static int is_cublas(struct dl_phdr_info *info, size_t, void *folder)
{
    if (!strstr(info->dlpi_name, "libcublasLt.so"))
        return 0;
    folder_of((char *)folder, PATH_MAX, info->dlpi_name);
    return 1;
}

static void *open_somewhere(void)
{
    const char *given = getenv("DS_CUDNN_LIBRARY");
    char folder[PATH_MAX] = "";
    Dl_info self;
    void *found;

    if (given && *given) {
        found = dlopen(given, RTLD_NOW | RTLD_LOCAL);
        return found ? found : open_in(given, "/");
    }
    if ((found = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL)))
        return found;
    if (dladdr((void *)open_in, &self) && self.dli_fname)
        folder_of(folder, sizeof folder, self.dli_fname);
    if ((found = open_in(folder, "")))
        return found;
    *folder = 0;
    dl_iterate_phdr(is_cublas, folder);
    if ((found = open_in(folder, "")) || (found = open_in(folder, "../../cudnn/lib/")))
        return found;
    dlerror();
    return NULL;
}

static int fill_table(void *handle)
{
    void *symbol;

#define F(name)                                                                                    \
    symbol = dlsym(handle, "cudnn" #name);                                                         \
    if (!symbol) {                                                                                 \
        snprintf(why_not, sizeof why_not, "cuDNN has no function cudnn" #name);                    \
        return 0;                                                                                  \
    }                                                                                              \
    memcpy(&library.name, &symbol, sizeof symbol);
    DS_CUDNN_FUNCTIONS(F)
#undef F
    return 1;
}

static int open_library(void)
{
    const char *given = getenv("DS_CUDNN_LIBRARY");
    void *handle = open_somewhere();
    int version;

    if (!handle) {
        snprintf(why_not, sizeof why_not, "there is no %s here (DS_CUDNN_LIBRARY%s%.300s)", LIBRARY,
                 given && *given ? " is " : " can name its folder", given ? given : "");
        return 0;
    }
    if (!fill_table(handle))
        return 0;
    version = (int)library.GetVersion();
    if (version < DS_CUDNN_LEAST)
        snprintf(why_not, sizeof why_not, "cuDNN %d.%d.%d is too old, %d.%d is the least",
                 version / 10000, version / 100 % 100, version % 100, DS_CUDNN_LEAST / 10000,
                 DS_CUDNN_LEAST / 100 % 100);
    return version >= DS_CUDNN_LEAST;
}

const ds_cudnn_library *ds_cudnn(void)
{
    static int state; /* 1: open, -1: there is none */

    if (!state)
        state = open_library() ? 1 : -1;
    return state > 0 ? &library : NULL;
}

const char *ds_cudnn_why(void)
{
    return why_not;
}

void ds_cudnn_describe(char *text, size_t bytes)
{
    if (ds_cudnn()) {
        int version = (int)library.GetVersion();

        snprintf(text, bytes, "cuDNN %d.%d.%d", version / 10000, version / 100 % 100,
                 version % 100);
    } else {
        snprintf(text, bytes, "%s", why_not);
    }
}

#else

void ds_cudnn_describe(char *text, size_t bytes)
{
    snprintf(text, bytes, "no cuDNN in this build");
}

#endif
