/* line.c - a line typed by the user.
 *
 * libedit is opened when a prompt is first shown: training runs do not pay for loading it.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runner/ds.h"

static struct {
    int looked;
    char *(*readline)(const char *prompt);
    int (*add_history)(const char *line);
} edit;

static void find_editor(void)
{
    static const char *const names[] = {"libedit.so.2", "libedit.so.0", "libreadline.so.8"};

    edit.looked = 1;
    for (size_t i = 0; i < sizeof names / sizeof *names && !edit.readline; i++) {
        void *library = dlopen(names[i], RTLD_LAZY | RTLD_LOCAL);
        if (!library)
            continue;
        /* POSIX's way around ISO C, which knows no conversion of dlsym()'s pointer */
        *(void **)&edit.add_history = dlsym(library, "add_history");
        *(void **)&edit.readline = dlsym(library, "readline");
    }
}

int ds_is_terminal(void)
{
    return isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
}

const char *ds_read_line(const char *prompt)
{
    static char *line;
    static size_t room;
    ssize_t length;

    if (ds_is_terminal()) {
        if (!edit.looked)
            find_editor();
        if (edit.readline) {
            free(line);
            room = 0;
            line = edit.readline(prompt);
            if (line && *line && edit.add_history)
                edit.add_history(line);
            return line;
        }
        fputs(prompt, stdout);
        fflush(stdout);
    }
    length = getline(&line, &room, stdin);
    if (length < 0)
        return NULL;
    if (length > 0 && line[length - 1] == '\n')
        line[length - 1] = 0;
    return line;
}
