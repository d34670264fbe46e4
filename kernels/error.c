/* error.c - the thread-local slot behind ds_fail(). */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[DS_ERROR_BYTES];

int ds_fail(int code, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return code;
}

const char *ds_error(void)
{
    return message;
}
