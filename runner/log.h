/* log.h - lines on stderr: "10:42:07 [rank 0] info: …". stdout belongs to the script. */
#ifndef DS_LOG_H
#define DS_LOG_H

#include "runner/ds.h"

/* Shows lines of this level and below ("debug", "info", "warning", "error", "critical"; DS_EINVAL
 * for another name). Information comes from rank 0 only, warnings and errors from all ranks. */
int ds_log_level(const char *name);
void ds_log_rank(int rank);

void ds_logf(int level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
