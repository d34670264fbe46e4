/* survey.c - `dsrun --hostfile FILE env`: asks all hosts at once; lua/ds/env_hosts.lua compares. */
#include "runner/survey.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/program.h"

#define MARK "dsrun-env"    /* what a shell's own files print comes before it */
#define SURVEY_SECONDS 40.0 /* nvidia-smi may take some of them */

static int question(char **out)
{
    ds_program here;
    size_t bytes;
    int rc = ds_program_here(&here, NULL);
    FILE *f = rc == 0 ? open_memstream(out, &bytes) : NULL;

    if (f) {
        fputs("echo " MARK "; ", f);
        if (here.library) {
            fputs("DSRUN_LUA=", f);
            ds_remote_quote(f, here.library);
            fputc(' ', f);
        }
        ds_remote_quote(f, here.file);
        fputs(" env --json", f);
        fclose(f);
    }
    ds_program_free(&here);
    return rc < 0 ? rc : *out ? 0 : ds_fail(DS_ENOMEM, "out of memory");
}

static json_t *answer(const ds_remote *r)
{
    const char *report = strstr(r->output, MARK);
    json_t *a =
        json_pack("{s:s, s:s}", "host", r->host, "output", report ? report + strlen(MARK) : "");
    char *why = NULL;
    size_t bytes;
    FILE *f;

    if (!a) /* it was no UTF-8 */
        return json_pack("{s:s, s:s, s:s}", "host", r->host, "output", "", "why",
                         "its answer is no text");
    if (r->code == 0)
        return a;
    f = open_memstream(&why, &bytes);
    if (f) {
        ds_remote_why(f, r);
        fclose(f);
    }
    if (json_object_set_new(a, "why", json_string(why ? why : "")) <
        0) /* words that are no UTF-8 */
        json_object_set_new(a, "why", json_string("it failed"));
    free(why);
    return a;
}

int ds_survey(char **json, const ds_hosts *hosts, const ds_ssh *ssh)
{
    ds_remote *answers = calloc((size_t)hosts->count, sizeof *answers);
    json_t *all = json_array();
    char *command = NULL;
    int rc;

    *json = NULL;
    for (int i = 0; answers && i < hosts->count; i++)
        answers[i].host = hosts->host[i].name;
    rc = answers && all ? question(&command) : ds_fail(DS_ENOMEM, "out of memory");
    if (rc == 0)
        rc = ds_remote_run(answers, hosts->count, ssh, command, SURVEY_SECONDS);
    for (int i = 0; i < hosts->count && rc == 0; i++)
        json_array_append_new(all, answer(&answers[i]));
    if (rc == 0) {
        *json = json_dumps(all, JSON_COMPACT);
        rc = *json ? 0 : ds_fail(DS_ENOMEM, "out of memory");
    }
    ds_remote_free(answers, hosts->count);
    free(answers);
    free(command);
    json_decref(all);
    return rc;
}
