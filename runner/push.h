/* push.h - `--push`: what ranks run is copied to hosts that do not share a file system.
 *
 * Copies lie under the user's cache folder on each host, in folders named after their contents: dsrun
 * with its Lua library, the shared libraries that a host lacks, the script's folder. What is there
 * already is not copied again. Hidden files, build folders and out/ stay behind (tree.h).
 *
 * The cache folder is XDG_CACHE_HOME as it is set here, else as it is there, else ~/.cache: the same
 * path on all hosts, or the push fails. The working directory there is
 *   - inside the copy of the script's folder, where it is inside that folder here (what ranks write
 *     to relative paths stays in the copy, which then is not removed by later pushes),
 *   - else the same path as here, if all hosts have it,
 *   - else the copy of the script's folder.
 */
#ifndef DS_PUSH_H
#define DS_PUSH_H

#include "runner/hostfile.h"
#include "runner/program.h"
#include "runner/remote.h"

/* *there: where it all is on the hosts, with absolute paths; to be freed with ds_program_free(), also
 * after an error. It is not tried there: ds_preflight() does that.
 *
 * DS_ECOMM: it failed on some hosts; *report has a line for each, with its name first, and is to be
 * freed; the others have it all, and there->file is not NULL if there are any. Other codes: it can't
 * be done at all; *report is NULL. */
int ds_push(ds_program *there, char **report, const ds_hosts *hosts, const ds_program *here,
            const ds_ssh *ssh);

#endif
