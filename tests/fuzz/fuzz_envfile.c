/* fuzz_envfile.c - any bytes as a file of variables: a message that names file and line, or variables
 * that a process can be given, and that are the same when they are written in quotes and read again.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/envfile.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void require(int holds)
{
    if (!holds)
        abort();
}

/* Every other one as an export, in single quotes where that can be. */
static char *write_again(const ds_variables *v, size_t *bytes)
{
    char *text = NULL;
    FILE *f = open_memstream(&text, bytes);

    require(f != NULL);
    for (int i = 0; i < v->count; i++) {
        const char *value = v->each[i].value;
        char quote = i % 2 && !strchr(value, '\'') ? '\'' : '"';

        fprintf(f, "%s%s=%c", i % 2 ? "export " : "", v->each[i].name, quote);
        for (; *value; value++)
            fprintf(f, quote == '"' && strchr("\"\\$", *value) ? "\\%c" : "%c", *value);
        fprintf(f, "%c # = '\n", quote);
    }
    fclose(f);
    return text;
}

static void check(const ds_variables *v)
{
    ds_variables again = {0};
    size_t bytes;
    char *text;

    for (int i = 0; i < v->count; i++) {
        const ds_variable *each = &v->each[i];

        require(*each->name && !strchr(each->name, '=') && strcmp(each->name, "RANK") != 0);
        require(strlen(each->name) + strlen(each->value) < 131072);
        require(strncmp(each->from, "fuzz:", 5) == 0 && atoi(each->from + 5) > 0);
        require(ds_variables_find(v, each->name) == each);
    }
    text = write_again(v, &bytes);
    require(ds_variables_parse(&again, text, bytes, "again") == 0 && again.count == v->count);
    for (int i = 0; i < v->count; i++) {
        require(!strcmp(again.each[i].name, v->each[i].name));
        require(!strcmp(again.each[i].value, v->each[i].value));
    }
    ds_variables_free(&again);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    ds_variables v = {0};
    char *exact = malloc(bytes); /* so that a byte too far, or before, is seen */

    if (bytes)
        memcpy(exact, data, bytes);
    if (ds_variables_parse(&v, exact, bytes, "fuzz") == 0)
        check(&v);
    else
        require(v.count == 0 && strncmp(ds_error(), "fuzz:", 5) == 0 && atoi(ds_error() + 5) > 0);
    ds_variables_free(&v);
    free(exact);
    return 0;
}
