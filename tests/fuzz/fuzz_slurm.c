/* fuzz_slurm.c - any text as the variables of a SLURM allocation: refused by name, or a list of hosts.
 *
 * The input is LIST|TASKS|NTASKS|GPUS|CPUS|CPUS_PER_TASK, as many of them as there are.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/hostfile.h"
#include "runner/slurm.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static const char *const names[] = {
    "SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE",    "SLURM_NTASKS",
    "SLURM_GPUS_ON_NODE", "SLURM_JOB_CPUS_PER_NODE", "SLURM_CPUS_PER_TASK"};

static void require(int holds)
{
    if (!holds)
        abort();
}

static void check(const ds_hosts *hosts)
{
    char name[DS_HOST_NAME_BYTES], written[DS_HOST_NAME_BYTES + 2], reason[DS_HOST_REASON_BYTES];

    require(hosts->count > 0 && ds_hosts_ranks(hosts) <= DS_ALL_SLOTS);
    for (int i = 0; i < hosts->count; i++) {
        const ds_host *h = &hosts->host[i];

        ds_host_shown(written, h->name);
        require(ds_host_name(name, reason, written, strlen(written)) == 0);
        require(!strcmp(name, h->name));
        require(h->slots > 0 && h->slots <= DS_MAX_SLOTS);
        for (int s = 0; s < h->slots; s++)
            require(h->slot[s] == s);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    char *copy = malloc(bytes + 1), *rest = copy, *text;
    ds_slurm_numbers numbers = {0};
    ds_hosts *hosts;
    int n = 0;

    require(copy != NULL);
    memcpy(copy, data, bytes);
    copy[bytes] = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        text = strsep(&rest, "|");
        if (text)
            setenv(names[i], text, 1);
        else
            unsetenv(names[i]);
    }
    if (ds_hosts_slurm(&hosts) == 0)
        check(hosts);
    else
        require(hosts == NULL && strstr(ds_error(), "SLURM") != NULL);
    ds_hosts_free(hosts);
    numbers.text = getenv(names[1]);
    while (n < 100000 && ds_slurm_number(&numbers) >= 0)
        n++;
    free(copy);
    return 0;
}
