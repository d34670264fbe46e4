/* scratch.c - blocks on huge pages (where the system gives them), kept until their thread ends. */
#include "kernels/scratch.h"

#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>

#include "kernels/error.h"

#define HUGE_PAGE ((size_t)2 << 20)

static _Thread_local struct block {
    char *base; /* what was mapped */
    size_t mapped;
    char *data; /* on a huge page's border, shifted by a colour */
    size_t bytes;
} scratch[DS_SCRATCH_SLOTS];

static pthread_key_t at_exit;
static pthread_once_t at_exit_made = PTHREAD_ONCE_INIT;

static void free_scratch(void *unused)
{
    (void)unused;
    for (int i = 0; i < DS_SCRATCH_SLOTS; i++)
        if (scratch[i].base)
            munmap(scratch[i].base, scratch[i].mapped);
}

static void make_at_exit(void)
{
    pthread_key_create(&at_exit, free_scratch);
}

void *ds_scratch(int slot, size_t bytes)
{
    struct block *s = &scratch[slot];
    /* Blocks that start at the same place of a huge page would fight for the same cache sets. */
    size_t colour = (size_t)slot * 1024;
    size_t size;

    if (s->data && bytes <= s->bytes)
        return s->data;
    if (s->base)
        munmap(s->base, s->mapped);
    *s = (struct block){0};
    size = (bytes + bytes / 8 + colour + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
    s->base =
        mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (s->base == MAP_FAILED) {
        s->base = NULL;
        ds_fail(DS_ENOMEM, "no memory for %zu bytes of a kernel's scratch", bytes);
        return NULL;
    }
    s->mapped = size + HUGE_PAGE;
    s->data = (char *)(((uintptr_t)s->base + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1)) + colour;
    s->bytes = size - colour;
    pthread_once(&at_exit_made, make_at_exit);
    pthread_setspecific(at_exit, scratch); /* gives the memory back when this thread ends */
    madvise(s->data - colour, size, MADV_HUGEPAGE);
    return s->data;
}
