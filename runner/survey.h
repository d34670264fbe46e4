/* survey.h - `dsrun --hostfile FILE env`: what dsrun says of each host. */
#ifndef DS_SURVEY_H
#define DS_SURVEY_H

#include "runner/hostfile.h"
#include "runner/remote.h"

/* Runs `dsrun env --json` on all hosts, from this program's path. *json: an array of objects, in the
 * order of the hosts: "host", "output", and "why" where that is no answer, in words for the user; to
 * be freed. */
int ds_survey(char **json, const ds_hosts *hosts, const ds_ssh *ssh);

#endif
