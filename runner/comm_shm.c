/* comm_shm.c - a lane through memory that the ranks of a host share.
 *
 * Each rank has a segment: counters of the rounds it posted and dropped, each on cache lines of its
 * own, then its slots. Peers read it. A segment is an anonymous file (memfd) that peers open through
 * /proc/PID/fd: no room in /dev/shm is needed, and nothing is left behind however a rank dies. The
 * slots of a rank are small enough to stay in its cache.
 *
 * Where ranks cannot open each other's files (other hosts, other containers, no /proc) they find
 * that out together, and use messages instead.
 */
#include "runner/comm_lane.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"

#define NAME "dsrun-ranks"
#define SLOT (256 << 10)    /* bytes a thread; 128 to 512 KB were alike, less and more slower */
#define MOST_SLOT (2 << 20) /* bytes */
#define HEADER 4096         /* bytes */
#define APART _Alignas(128) /* processors fetch lines in pairs */

typedef struct header {
    uint64_t token[2]; /* so that nothing else is taken for the segment */
    APART _Atomic int64_t posted;
    uint64_t sign[DS_LANE_DEPTH]; /* of the call that posted each slot */
    APART _Atomic int64_t dropped;
    APART _Atomic int aborted;
} header;

/* How a rank tells the others where its segment is. */
typedef struct offer {
    uint64_t token[2];
    int64_t pid;
    int32_t fd, threads; /* fd -1: it has none, or wants none */
} offer;

typedef struct shm {
    ds_lane lane;
    int64_t bytes; /* of a segment */
    char **base;   /* [size]: every rank's segment; NULL: not mapped */
} shm;

static header *head_of(const shm *s, int rank)
{
    return (header *)s->base[rank];
}

static char *slot_of(const shm *s, int rank, int64_t round)
{
    return s->base[rank] + HEADER + round % DS_LANE_DEPTH * s->lane.slot;
}

/* Until a peer's counter is at least `goal`. */
static int wait_for(shm *s, int peer, const _Atomic int64_t *counter, int64_t goal)
{
    ds_patience wait = {0};
    int rc;

    while (atomic_load_explicit(counter, memory_order_acquire) < goal) {
        rc = ds_lane_pause(&s->lane, &wait, peer);
        if (rc < 0)
            return rc;
        if (atomic_load_explicit(&head_of(s, peer)->aborted, memory_order_relaxed))
            return ds_fail(DS_ECOMM, "%s: rank %d ended the job",
                           ds_collective_name(s->lane.comm->running), peer);
    }
    return 0;
}

static int shm_begin(ds_lane *l, char **slot)
{
    shm *s = (shm *)l;
    int rc = 0;

    for (int r = 0; rc == 0 && r < l->size; r++)
        if (r != l->rank)
            rc = wait_for(s, r, &head_of(s, r)->dropped, l->posted - DS_LANE_DEPTH + 1);
    *slot = slot_of(s, l->rank, l->posted);
    return rc;
}

static int shm_post(ds_lane *l, const ds_round *round)
{
    shm *s = (shm *)l;
    int64_t bytes = 0;

    for (int r = 0; r < l->size; r++)
        bytes += round->send[r];
    ds_comm_moved(l->comm, bytes);
    head_of(s, l->rank)->sign[l->posted % DS_LANE_DEPTH] = round->sign;
    l->posted++;
    atomic_store_explicit(&head_of(s, l->rank)->posted, l->posted, memory_order_release);
    return 0;
}

/* A slot that was posted for another call would be read as if it were for this one. */
static int take_from(shm *s, int peer, const ds_round *round)
{
    const header *head = head_of(s, peer);
    int rc = wait_for(s, peer, &head->posted, s->lane.dropped + 1);

    if (rc < 0 || head->sign[s->lane.dropped % DS_LANE_DEPTH] == round->sign)
        return rc;
    return ds_fail(DS_ECOMM,
                   "%s: rank %d called something else, or with another size (collective %lld of "
                   "rank %d); DS_CHECK=comm tells what",
                   ds_collective_name(s->lane.comm->running), peer, (long long)s->lane.comm->number,
                   s->lane.rank);
}

static int shm_take(ds_lane *l, const ds_round *round)
{
    shm *s = (shm *)l;
    int rc = 0;

    for (int r = 0; rc == 0 && r < l->size; r++) {
        if (r != l->rank && (round->recv[r] || round->meet))
            rc = take_from(s, r, round);
        round->from[r] = slot_of(s, r, l->dropped) + l->rank * round->part;
    }
    return rc;
}

static void shm_drop(ds_lane *l)
{
    shm *s = (shm *)l;

    l->dropped++;
    atomic_store_explicit(&head_of(s, l->rank)->dropped, l->dropped, memory_order_release);
}

static void shm_warn(ds_lane *l)
{
    head_of((shm *)l, l->rank)->aborted = 1;
}

static int shm_warned(ds_lane *l)
{
    shm *s = (shm *)l;

    for (int r = 0; r < l->size; r++)
        if (r != l->rank && atomic_load_explicit(&head_of(s, r)->aborted, memory_order_relaxed))
            return 1;
    return 0;
}

static void shm_close(ds_lane *l)
{
    shm *s = (shm *)l;

    for (int r = 0; s->base && r < l->size; r++)
        if (s->base[r])
            munmap(s->base[r], (size_t)s->bytes);
    free(s->base);
    ds_lane_clear(l);
    free(s);
}

static const ds_lane_kind kind = {
    .name = "shm",
    .begin = shm_begin,
    .post = shm_post,
    .take = shm_take,
    .drop = shm_drop,
    .warn = shm_warn,
    .warned = shm_warned,
    .close = shm_close,
};

/* ---- agreeing */

/* Before the slots' size is known the file is as long as it may get; pages that are never touched
 * are never there. */
static void make_offer(offer *mine)
{
    *mine = (offer){.pid = getpid(), .fd = memfd_create(NAME, MFD_CLOEXEC)};
    mine->threads = ds_threads();
    if (mine->fd >= 0 && (getrandom(mine->token, sizeof mine->token, 0) != sizeof mine->token ||
                          ftruncate(mine->fd, HEADER + (off_t)DS_LANE_DEPTH * MOST_SLOT) < 0)) {
        close(mine->fd);
        mine->fd = -1;
    }
}

static char *map_own(const shm *s, const offer *mine)
{
    char *base = mmap(NULL, (size_t)s->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, mine->fd, 0);

    if (base == MAP_FAILED)
        return NULL;
    memcpy(((header *)base)->token, mine->token, sizeof mine->token);
    return base;
}

static char *map_peer(const shm *s, const offer *peer)
{
    static const char name[] = "/memfd:" NAME;
    char path[64], target[64], *base = MAP_FAILED;
    struct stat info;
    int fd;

    snprintf(path, sizeof path, "/proc/%lld/fd/%d", (long long)peer->pid, peer->fd);
    /* on another host, or in another container, that may be anything */
    if (readlink(path, target, sizeof target) < (ssize_t)sizeof name - 1 ||
        memcmp(target, name, sizeof name - 1) != 0)
        return NULL;
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    if (fstat(fd, &info) == 0 && info.st_size >= s->bytes)
        base = mmap(NULL, (size_t)s->bytes, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    return base == MAP_FAILED ? NULL : base;
}

/* Every rank's segment; 0 where one could not be had. Before this rank's own is mapped nobody can
 * know its token, so all tell each other between the two steps. */
static int map_all(shm *s, ds_lane *over, const offer *all, char *say)
{
    int me = over->rank, ok = all[me].fd >= 0;
    char mine;

    s->base[me] = ok ? map_own(s, &all[me]) : NULL;
    mine = (char)(s->base[me] != NULL);
    if (ds_lane_share(over, &mine, say, 1) < 0)
        return DS_ECOMM;
    for (int r = 0; r < over->size && ok; r++)
        ok = say[r];
    for (int r = 0; r < over->size && ok; r++) {
        if (r != me)
            s->base[r] = map_peer(s, &all[r]);
        ok = s->base[r] && !memcmp(head_of(s, r)->token, all[r].token, sizeof all[r].token);
    }
    mine = (char)ok;
    if (ds_lane_share(over, &mine, say, 1) < 0)
        return DS_ECOMM;
    for (int r = 0; r < over->size; r++)
        ok = ok && say[r];
    return ok;
}

/* *out: the lane, or NULL where somebody has no part in it. */
static int build(ds_lane **out, ds_lane *over, const offer *all, char *say)
{
    int threads = MOST_SLOT / SLOT, some = 1, rc;
    shm *s;

    for (int r = 0; r < over->size; r++) {
        some = some && all[r].fd >= 0;
        threads = all[r].threads < threads ? all[r].threads : threads;
    }
    if (!some)
        return 0;
    s = calloc(1, sizeof *s);
    rc = s ? ds_lane_init(&s->lane, &kind, over->comm, over->rank, over->size,
                          (int64_t)SLOT * (threads > 1 ? threads : 1))
           : ds_fail(DS_ENOMEM, "out of memory: a group of ranks");
    if (rc < 0) {
        free(s);
        return rc;
    }
    s->lane.idle = over->idle;
    s->bytes = HEADER + DS_LANE_DEPTH * s->lane.slot;
    s->base = calloc((size_t)over->size, sizeof *s->base);
    rc = s->base ? map_all(s, over, all, say)
                 : ds_fail(DS_ENOMEM, "out of memory: a group of ranks");
    if (rc > 0)
        *out = &s->lane;
    else
        shm_close(&s->lane);
    return rc < 0 ? rc : 0;
}

int ds_shm_open(ds_lane **out, ds_lane *over, int wanted)
{
    offer mine = {.fd = -1}, *all = calloc((size_t)over->size, sizeof *all);
    char *say = calloc((size_t)over->size, 1);
    int rc;

    *out = NULL;
    if (wanted)
        make_offer(&mine);
    rc = all && say ? ds_lane_share(over, &mine, all, sizeof mine)
                    : ds_fail(DS_ENOMEM, "out of memory: a group of ranks");
    if (rc == 0)
        rc = build(out, over, all, say);
    if (mine.fd >= 0)
        close(mine.fd); /* the mappings stay */
    free(all);
    free(say);
    return rc;
}
