/* version.c - compiled again for every commit, so kept small. */
#include "runner/version.h"

#ifndef DS_VERSION
#define DS_VERSION "0"
#define DS_COMMIT "unknown"
#endif

const char ds_version[] = DS_VERSION;
const char ds_commit[] = DS_COMMIT;
#ifndef DS_SANITIZED
#define DS_SANITIZED ""
#endif
#ifdef __clang__
const char ds_compiler[] = __VERSION__ DS_SANITIZED;
#else
const char ds_compiler[] = "gcc " __VERSION__ DS_SANITIZED;
#endif
