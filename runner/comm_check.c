/* comm_check.c - DS_CHECK=comm: before each collective the ranks of a group tell each other what
 * they are about to do. Where that differs, each of them returns the same error, which names who.
 */
#include "runner/comm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"

/* Without gaps, so that equal ones have equal bytes. */
typedef struct record {
    int32_t kind;
    int32_t dtype;
    int32_t op, peer;
    int64_t numel;
    int64_t number;
    uint64_t borders; /* a hash of them */
    double scale;
    int64_t wire;
} record;

static record record_of(const ds_comm *c, const ds_call *call, int64_t number)
{
    const ds_tensor *t = call->in ? call->in : call->out;

    return (record){.kind = call->kind,
                    .dtype = t ? t->dtype : -1,
                    .op = call->op,
                    .peer = call->peer,
                    .numel = t ? t->numel : 0,
                    .number = number,
                    .borders = call->borders ? ds_comm_hash(call->borders, c->size + 1) : 0,
                    .scale = call->scale,
                    .wire = call->wire};
}

/* "all_reduce of f32 [12]", and more where that alone does not tell it from `other`. */
static void describe(char *text, size_t room, const record *r, const record *other)
{
    int used = snprintf(text, room, "%s", ds_collective_name(r->kind));

    if (r->dtype >= 0)
        used += snprintf(text + used, room - (size_t)used, " of %s [%lld]", ds_dtype_name(r->dtype),
                         (long long)r->numel);
    if (r->kind != other->kind || r->dtype != other->dtype || r->numel != other->numel)
        return;
    if (r->op != other->op)
        snprintf(text + used, room - (size_t)used, " by %s", ds_reduction_name(r->op));
    else if (r->peer != other->peer)
        snprintf(text + used, room - (size_t)used, " from rank %d", r->peer);
    else if (r->borders != other->borders)
        snprintf(text + used, room - (size_t)used, " with borders of its own");
    else if (r->scale != other->scale)
        snprintf(text + used, room - (size_t)used, " times %g", r->scale);
    else if (r->wire != other->wire)
        snprintf(text + used, room - (size_t)used, " sent as %s", ds_dtype_name((int)r->wire));
}

static int same(const record *a, const record *b)
{
    return memcmp(a, b, sizeof *a) == 0;
}

/* What most ranks do, the lowest first. */
static int common(const record *all, int size)
{
    int best = 0, most = 0;

    for (int i = 0; i < size && most <= size / 2; i++) {
        int count = 0;

        for (int k = 0; k < size; k++)
            count += same(&all[i], &all[k]);
        if (count > most) {
            most = count;
            best = i;
        }
    }
    return best;
}

static int difference(const record *all, int size)
{
    int usual = common(all, size), odd = 0, others = -1;
    char one[96], two[96], number[64], more[48] = "";

    while (odd < size && same(&all[odd], &all[usual]))
        odd++;
    if (odd == size)
        return 0;
    for (int i = odd; i < size; i++)
        others += !same(&all[i], &all[usual]);
    describe(one, sizeof one, &all[odd], &all[usual]);
    describe(two, sizeof two, &all[usual], &all[odd]);
    snprintf(number, sizeof number, "collective %lld", (long long)all[usual].number);
    if (all[odd].number != all[usual].number)
        snprintf(number, sizeof number, "its collective %lld, the other's %lld",
                 (long long)all[odd].number, (long long)all[usual].number);
    if (others)
        snprintf(more, sizeof more, "; %d more %s", others, others > 1 ? "differ" : "differs");
    return ds_fail(DS_ECOMM, "rank %d called %s, rank %d %s (%s)%s", odd, one, usual, two, number,
                   more);
}

int ds_comm_compare(ds_comm *c, const ds_call *call, int64_t number)
{
    const record mine = record_of(c, call, number);
    record *all = calloc((size_t)c->size, sizeof *all);
    ds_tensor in = {.data = (void *)&mine, .numel = sizeof mine, .dtype = DS_U8, .dense = 1};
    ds_tensor out = {.data = all, .numel = c->size * in.numel, .dtype = DS_U8, .dense = 1};
    const ds_call gather = {.kind = DS_ALL_GATHER, .out = &out, .in = &in};
    ds_work work = {.comm = c};
    int rc;

    if (!all)
        return ds_fail(DS_ENOMEM, "out of memory: comparing %d ranks", c->size);
    rc = c->transport[DS_CPU]->start[DS_ALL_GATHER](c, &gather, &work);
    if (rc == 0)
        rc = difference(all, c->size);
    free(all);
    return rc;
}
