/* main.c - the program: options, the script, the end. The only file that ends the process. */
#include <stdio.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/host.h"

int main(int argc, char **argv)
{
    ds_host_config config = {.program = argv[0]};
    ds_host *host;
    int code = 0, exited = 0, i = 1, first;

    while (i + 1 < argc && !strcmp(argv[i], "-e"))
        i += 2;
    first = i;
    if (i < argc) {
        config.script = argv[i];
        config.arguments = argv + i + 1;
        config.count = argc - i - 1;
    }
    if (ds_host_open(&host, &config) < 0) {
        fprintf(stderr, "dsrun: %s\n", ds_error());
        return 2;
    }
    for (i = 1; i < first && !code && !exited; i += 2)
        code = ds_host_run(host, DS_SOURCE_TEXT, argv[i + 1], NULL, &exited);
    if (!code && !exited && config.script)
        code = ds_host_run(host, strcmp(config.script, "-") ? DS_SOURCE_FILE : DS_SOURCE_STDIN,
                           config.script, NULL, &exited);
    if (code < 0) {
        fprintf(stderr, "dsrun: %s\n", ds_error());
        code = 2;
    }
    ds_host_close(host);
    return code;
}
