/* gemm_choices.cu - which algorithm was fastest, kept in a file from one run to the next.
 *
 * DS_TUNE names the file; DS_TUNE=1 is ~/.cache/dsrun/products. A line is the GPU's name, cuBLASLt's
 * version, the key's numbers, and the number of the candidate. The first line of a key counts and none
 * is ever changed: so a run that goes on with the same file goes on with the same bits, and of several
 * ranks that time the same product at once all take what the first of them wrote.
 */
#include "kernels/cuda/gemm_plan.h"

#include <cublasLt.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define LINE 768

/* The file's path, or NULL: nothing is to be timed. */
static const char *file_path(void)
{
    static char path[4096];
    const char *tune = getenv("DS_TUNE"), *home = getenv("HOME");

    if (!tune || !*tune || !strcmp(tune, "0"))
        return NULL;
    if (strcmp(tune, "1") != 0)
        return tune;
    snprintf(path, sizeof path, "%s/.cache", home ? home : ".");
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/.cache/dsrun", home ? home : ".");
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/.cache/dsrun/products", home ? home : ".");
    return path;
}

int gemm_choices_wanted(void)
{
    return file_path() != NULL;
}

/* What a line begins with. */
static void write_key(char *text, size_t bytes, const gemm_key *key)
{
    int64_t number[sizeof *key / 8];
    cudaDeviceProp p;
    int used;

    memcpy(number, key, sizeof number);
    if (cudaGetDeviceProperties(&p, ds_cuda.index) != cudaSuccess)
        snprintf(p.name, sizeof p.name, "GPU");
    used = snprintf(text, bytes, "%.200s|%zu|", p.name, cublasLtGetVersion());
    for (size_t i = 0; i < sizeof *key / 8; i++)
        used += snprintf(text + used, bytes - (size_t)used, "%lld ", (long long)number[i]);
}

int gemm_choice_find(const gemm_key *key)
{
    char want[LINE], line[LINE];
    FILE *f = fopen(file_path(), "r");
    int choice = -1;

    if (!f)
        return -1;
    write_key(want, sizeof want, key);
    while (choice < 0 && fgets(line, sizeof line, f))
        if (!strncmp(line, want, strlen(want)) && strchr(line, '\n'))
            choice = atoi(line + strlen(want));
    fclose(f);
    return choice;
}

/* One write() to a file that is opened for appending: lines of several processes do not mix. */
int gemm_choice_keep(const gemm_key *key, int choice)
{
    char line[LINE];
    int file = open(file_path(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666), settled = -1;

    write_key(line, sizeof line - 16, key);
    snprintf(line + strlen(line), 16, "%d\n", choice);
    if (file >= 0) {
        if (write(file, line, strlen(line)) == (ssize_t)strlen(line))
            settled = gemm_choice_find(key);
        close(file);
    }
    return settled < 0 ? choice : settled;
}
