/* bench_disk.c - what the disk gives: a file written or read with O_DIRECT and io_uring, `depth` blocks
 * of 1 MB under way.
 *
 *     bench_disk write|read FILE MEGABYTES [DEPTH]      → seconds
 */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK (1 << 20)

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int fail(const char *what, int error)
{
    fprintf(stderr, "bench_disk: %s: %s\n", what, strerror(error));
    return 1;
}

int main(int argc, char **argv)
{
    int writing = argc > 3 && !strcmp(argv[1], "write"), depth = argc > 4 ? atoi(argv[4]) : 8;
    long blocks = argc > 3 ? atol(argv[3]) : 0, begun = 0, done = 0;
    struct io_uring ring;
    double start;
    char *memory;
    int fd, rc;

    if (blocks <= 0 || depth <= 0)
        return fail("usage: write|read FILE MEGABYTES [DEPTH]", EINVAL);
    if (posix_memalign((void **)&memory, 4096, (size_t)depth * BLOCK))
        return fail("memory", ENOMEM);
    memset(memory, 7, (size_t)depth * BLOCK);
    start = now();
    fd = open(argv[2], writing ? O_WRONLY | O_CREAT | O_TRUNC | O_DIRECT : O_RDONLY | O_DIRECT,
              0666);
    if (fd < 0)
        return fail(argv[2], errno);
    if (writing && fallocate(fd, 0, 0, blocks * BLOCK) < 0)
        return fail(argv[2], errno);
    rc = io_uring_queue_init((unsigned)depth, &ring, 0);
    if (rc < 0)
        return fail("io_uring", -rc);
    while (done < blocks) {
        struct io_uring_cqe *cqe;
        long slot = begun;

        if (begun >= depth || begun == blocks) {
            if ((rc = io_uring_wait_cqe(&ring, &cqe)) < 0 || cqe->res != BLOCK)
                return fail(argv[2], rc < 0 ? -rc : cqe->res < 0 ? -cqe->res : EIO);
            slot = (long)io_uring_cqe_get_data64(cqe);
            io_uring_cqe_seen(&ring, cqe);
            done++;
        }
        if (begun < blocks) {
            struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);

            if (writing)
                io_uring_prep_write(sqe, fd, memory + slot * BLOCK, BLOCK, (__u64)begun * BLOCK);
            else
                io_uring_prep_read(sqe, fd, memory + slot * BLOCK, BLOCK, (__u64)begun * BLOCK);
            io_uring_sqe_set_data64(sqe, (__u64)slot);
            begun++;
            if ((rc = io_uring_submit(&ring)) < 0)
                return fail("submit", -rc);
        }
    }
    if (writing && fsync(fd) < 0)
        return fail(argv[2], errno);
    printf("%.6f\n", now() - start);
    return close(fd) < 0;
}
