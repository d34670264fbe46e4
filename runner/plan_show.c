/* plan_show.c - what --dry-run prints of a plan. */
#include <jansson.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/plan.h"
#include "runner/remote.h"

/* A word as a shell would take it back. */
static void show_word(const char *word, FILE *out)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                                "_-+=:,./@%^";

    if (*word && word[strspn(word, plain)] == 0) {
        fputs(word, out);
        return;
    }
    ds_remote_quote(out, word);
}

static void show_text(const ds_plan *p, char *const *command, FILE *out)
{
    int rank = 0, widest = 4;

    for (int h = 0; h < p->hosts.count; h++)
        if ((int)strlen(p->hosts.host[h].name) > widest)
            widest = (int)strlen(p->hosts.host[h].name);
    fprintf(out, "rank  %-*s  slot  local rank\n", widest, "host");
    for (int h = 0; h < p->hosts.count; h++)
        for (int s = 0; s < p->hosts.host[h].slots; s++)
            fprintf(out, "%4d  %-*s  %4d  %10d\n", rank++, widest, p->hosts.host[h].name,
                    p->hosts.host[h].slot[s], s);
    fputs("\nvariables\n", out);
    for (int i = 0; i < p->env.count; i++) {
        fprintf(out, "  %s=", p->env.each[i].name);
        show_word(p->env.each[i].value, out);
        fprintf(out, "  (%s)\n", p->env.each[i].from);
    }
    fputs("\ncommand\n ", out);
    for (int i = 0; command[i]; i++) {
        fputc(' ', out);
        show_word(command[i], out);
    }
    fputc('\n', out);
}

static json_t *text_of(const char *value)
{
    json_t *json = json_string(value); /* NULL where it is no UTF-8 */

    return json ? json : json_null();
}

static json_t *json_of(const ds_plan *p, char *const *command)
{
    json_t *ranks = json_array(), *words = json_array(), *env = json_object();
    json_t *from = json_object();
    int rank = 0;

    for (int h = 0; h < p->hosts.count; h++)
        for (int s = 0; s < p->hosts.host[h].slots; s++)
            json_array_append_new(ranks, json_pack("{s:i, s:s, s:i, s:i}", "rank", rank++, "host",
                                                   p->hosts.host[h].name, "slot",
                                                   p->hosts.host[h].slot[s], "local_rank", s));
    for (int i = 0; command[i]; i++)
        json_array_append_new(words, text_of(command[i]));
    for (int i = 0; i < p->env.count; i++) {
        json_object_set_new(env, p->env.each[i].name, text_of(p->env.each[i].value));
        json_object_set_new(from, p->env.each[i].name, text_of(p->env.each[i].from));
    }
    return json_pack("{s:o, s:o, s:o, s:o}", "ranks", ranks, "command", words, "env", env,
                     "env_from", from);
}

int ds_plan_show(const ds_plan *p, char *const *command, int json, FILE *out)
{
    json_t *all;
    int rc;

    if (!json) {
        show_text(p, command, out);
        return 0;
    }
    all = json_of(p, command);
    if (!all)
        return ds_fail(DS_ENOMEM, "out of memory");
    rc = json_dumpf(all, out, JSON_INDENT(1));
    json_decref(all);
    fputc('\n', out);
    return rc == 0 ? 0 : ds_fail(DS_EIO, "the plan could not be printed");
}
