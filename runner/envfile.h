/* envfile.h - variables for the ranks: from files of KEY=VALUE, and from the launching shell.
 *
 * A file has a variable on each line:
 *
 *     # a comment; blank lines and CRLF are fine
 *     NCCL_DEBUG=INFO                  # a comment, as there is a blank before the #
 *     export UCX_TLS=tcp,self
 *     LUA_PATH=/data/lua/?.lua;;       unquoted: up to the end of the line, $ ; ' " \ and all
 *     GREETING="say \"hi\"\n"          in double quotes \" \\ \n \$ stand for one character
 *     RAW='as it is: \n $HOME'         in single quotes nothing does
 *     KEY="several
 *     lines"
 *
 * Nothing is expanded. Blanks around '=' and behind an unquoted value are not part of it, all else is,
 * byte for byte. Behind the closing quote there may only be a comment. Of a name that is given again,
 * the later value counts. A name has letters, digits and '_'. What the launcher sets for each rank
 * itself (RANK, WORLD_SIZE, …) is refused.
 */
#ifndef DS_ENVFILE_H
#define DS_ENVFILE_H

#include <stddef.h>

typedef struct ds_variable {
    char *name, *value;
    char *from; /* "FILE:LINE" or "environment" */
} ds_variable;

/* {0} to begin with; then in the order in which names came first. */
typedef struct ds_variables {
    ds_variable *each; /* [count] */
    int count;
} ds_variables;

/* Adds the variables of a text; `path` is for messages and `from`. DS_ECORRUPT: `into` is as it was, and
 * the message has a line for every fault, the first 20 of them: "FILE:LINE: what is wrong". Values are
 * never shown, as they may be secrets. */
int ds_variables_parse(ds_variables *into, const char *text, size_t bytes, const char *path);

/* Adds those of ~/.deepspeed_env, ~/.dsrun_env, ./.deepspeed_env, ./.dsrun_env, as many as there are; or,
 * where DS_ENV_FILE names a file, of that one only. Errors are those of ds_variables_parse(), of all files
 * together; DS_ENOENT: there is no such file; DS_EIO: one cannot be read. */
int ds_variables_read(ds_variables *into);

/* Adds those of an environment that ranks have from the launching shell (NCCL_*, UCX_*, OMP_*, DS_*, …),
 * where `into` has none of that name yet. */
int ds_variables_inherit(ds_variables *into, char **environ);

/* The variable of that name, or NULL. */
const ds_variable *ds_variables_find(const ds_variables *v, const char *name);

/* Adds one, whatever its name, in place of an earlier one. DS_ENOMEM. */
int ds_variables_set(ds_variables *into, const char *name, const char *value, const char *from);

void ds_variables_free(ds_variables *v); /* what is in it, and it is {0} again */

#endif
