/* log.c - lines on stderr with time and rank. */
#include "runner/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "kernels/error.h"

static const char *const names[] = {
    [DS_LOG_ERROR] = "error",
    [DS_LOG_WARNING] = "warning",
    [DS_LOG_INFO] = "info",
    [DS_LOG_DEBUG] = "debug",
};

static atomic_int shown = DS_LOG_INFO;
static atomic_int own_rank;

int ds_log_level(const char *name)
{
    if (!strcmp(name, "critical")) /* DeepSpeed's; there is nothing above an error here */
        name = names[DS_LOG_ERROR];
    for (int i = 0; i < (int)(sizeof names / sizeof *names); i++) {
        if (!strcmp(name, names[i])) {
            atomic_store(&shown, i);
            return 0;
        }
    }
    return ds_fail(DS_EINVAL, "log level '%s' is none of debug, info, warning, error, critical",
                   name);
}

void ds_log_rank(int rank)
{
    atomic_store(&own_rank, rank);
}

int ds_log_shows(int level)
{
    return level <= atomic_load(&shown) && (level <= DS_LOG_WARNING || atomic_load(&own_rank) == 0);
}

void ds_log(int level, const char *text)
{
    time_t now = time(NULL);
    struct tm local;
    char clock[16];

    if (level < DS_LOG_ERROR || level > DS_LOG_DEBUG || !ds_log_shows(level))
        return;
    localtime_r(&now, &local);
    strftime(clock, sizeof clock, "%H:%M:%S", &local);
    fprintf(stderr, "%s [rank %d] %s: %s\n", clock, atomic_load(&own_rank), names[level], text);
}

void ds_logf(int level, const char *format, ...)
{
    char text[1024];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    ds_log(level, text);
}
