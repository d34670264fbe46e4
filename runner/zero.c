/* zero.c - the element→owner map and the buckets, fixed when the engine is made. */
#include "runner/zero.h"

#include <stdlib.h>
#include <string.h>

struct ds_zero {
    int n_params, n_groups, world, n_buckets;
    int64_t *offset;  /* [n_params]: first element of each parameter, in its group's buffer */
    int64_t *numel;   /* [n_params], rounded up to DS_ZERO_ALIGN */
    int32_t *group;   /* [n_params] */
    int32_t *small;   /* [n_params]: in a bucket with others of this kind only */
    int64_t *size;    /* [n_groups]: elements with padding */
    int64_t *borders; /* of the buckets, [n_params][world + 1] */
    ds_zero_bucket *buckets;
};

static int64_t round_up(int64_t n, int64_t step)
{
    return (n + step - 1) / step * step;
}

void ds_zero_free(ds_zero *z)
{
    if (!z)
        return;
    free(z->offset);
    free(z->numel);
    free(z->group);
    free(z->small);
    free(z->size);
    free(z->borders);
    free(z->buckets);
    free(z);
}

static int place_params(ds_zero *z, const int64_t *numel, const int32_t *group,
                        const int32_t *small)
{
    for (int i = 0; i < z->n_params; i++) {
        if (group[i] < 0 || group[i] >= z->n_groups || numel[i] < 0 ||
            (i && group[i] < group[i - 1]))
            return ds_fail(DS_EINVAL, "parameter %d of %lld elements cannot be in group %d of %d",
                           i, (long long)numel[i], group[i], z->n_groups);
        z->numel[i] = round_up(numel[i], DS_ZERO_ALIGN);
        z->group[i] = group[i];
        z->small[i] = small ? small[i] : 0;
        z->offset[i] = z->size[group[i]];
        z->size[group[i]] += z->numel[i];
    }
    return 0;
}

/* ---- parts */

/* Whether the group's parameters, in order, fit into the ranks with at most `most` elements each;
 * [borders]: where each rank's begin and end, in elements of the group. */
static int fits(const ds_zero *z, int group, int64_t most, int64_t *borders)
{
    int64_t used = 0, end = 0;
    int rank = 0;

    for (int i = 0; i < z->n_params; i++) {
        if (z->group[i] != group)
            continue;
        if (used + z->numel[i] > most && used > 0) {
            if (++rank == z->world)
                return 0;
            if (borders)
                borders[rank] = end;
            used = 0;
        }
        used += z->numel[i];
        end += z->numel[i];
        if (used > most)
            return 0;
    }
    while (borders && rank < z->world)
        borders[++rank] = end;
    return 1;
}

/* The smallest largest share that leaves parameters whole, by bisection. borders [world + 1]. */
static void share_whole(const ds_zero *z, int group, int64_t *borders)
{
    int64_t low = z->size[group] / z->world, high = z->size[group];

    while (low < high) {
        int64_t middle = low + (high - low) / 2;

        if (fits(z, group, middle, NULL))
            high = middle;
        else
            low = middle + 1;
    }
    borders[0] = 0;
    fits(z, group, high, borders);
}

static int64_t clamp(int64_t x, int64_t low, int64_t high)
{
    return x < low ? low : x > high ? high : x;
}

/* All of the bucket is one rank's. */
static void give_to(const ds_zero *z, ds_zero_bucket *b, int64_t *borders, int rank)
{
    for (int r = 0; r <= z->world; r++)
        borders[r] = r <= rank ? 0 : b->numel;
    b->borders = borders;
}

/* group_borders: of the bucket's group, or NULL for even parts. */
static void cut_parts(const ds_zero *z, ds_zero_bucket *b, int64_t *borders,
                      const int64_t *group_borders)
{
    int64_t units = b->numel / DS_ZERO_ALIGN;

    for (int r = 0; r <= z->world; r++)
        borders[r] = group_borders
                         ? clamp(group_borders[r], b->start, b->start + b->numel) - b->start
                         : units * r / z->world * DS_ZERO_ALIGN;
    b->borders = borders;
}

/* ---- buckets */

/* Buckets run over each group from its end to its start, as backward fills the gradients, and end
 * at parameters' borders; a parameter larger than a bucket is one of its own, and small ones share
 * none with others. */
static void cut_buckets(ds_zero *z, int64_t bucket_numel)
{
    int first, last = z->n_params - 1;

    for (; last >= 0; last = first - 1) {
        int g = z->group[last];
        int64_t end = z->offset[last] + z->numel[last];

        for (first = last; first > 0 && z->group[first - 1] == g; first--)
            if (end - z->offset[first - 1] > bucket_numel || z->small[first - 1] != z->small[last])
                break;
        z->buckets[z->n_buckets++] = (ds_zero_bucket){
            .group = g,
            .first = first,
            .last = last,
            .start = z->offset[first],
            .numel = end - z->offset[first],
        };
    }
}

static int cut_all_parts(ds_zero *z, const int32_t *whole, int round_robin)
{
    int64_t *of_group = calloc((size_t)z->world + 1, sizeof *of_group);
    int group = -1;

    if (!of_group)
        return ds_fail(DS_ENOMEM, "out of host memory");
    for (int i = 0; i < z->n_buckets; i++) {
        ds_zero_bucket *b = &z->buckets[i];
        int64_t *borders = z->borders + (int64_t)i * (z->world + 1);

        if (whole[b->group] && round_robin) {
            give_to(z, b, borders, i % z->world);
            continue;
        }
        if (whole[b->group] && b->group != group)
            share_whole(z, b->group, of_group);
        group = b->group;
        cut_parts(z, b, borders, whole[group] ? of_group : NULL);
    }
    free(of_group);
    return 0;
}

int ds_zero_make(ds_zero **out, int n_params, const int64_t *numel, const int32_t *group,
                 const int32_t *small, const int32_t *whole, int n_groups, int world,
                 int64_t bucket_numel, int round_robin)
{
    size_t n = n_params > 0 ? (size_t)n_params : 1;
    ds_zero *z;
    int rc;

    if (n_params < 0 || n_groups < 1 || world < 1 || bucket_numel < 1)
        return ds_fail(DS_EINVAL, "%d parameters in %d groups over %d ranks by buckets of %lld",
                       n_params, n_groups, world, (long long)bucket_numel);
    z = calloc(1, sizeof *z);
    if (!z)
        return ds_fail(DS_ENOMEM, "out of host memory");
    z->n_params = n_params;
    z->n_groups = n_groups;
    z->world = world;
    z->offset = calloc(n, sizeof *z->offset);
    z->numel = calloc(n, sizeof *z->numel);
    z->group = calloc(n, sizeof *z->group);
    z->small = calloc(n, sizeof *z->small);
    z->size = calloc((size_t)n_groups, sizeof *z->size);
    z->borders = calloc(n * ((size_t)world + 1), sizeof *z->borders);
    z->buckets = calloc(n, sizeof *z->buckets);
    rc = DS_ENOMEM;
    if (!z->offset || !z->numel || !z->group || !z->small || !z->size || !z->borders ||
        !z->buckets) {
        ds_fail(rc, "out of host memory");
        goto fail;
    }
    rc = place_params(z, numel, group, small);
    if (rc < 0)
        goto fail;
    cut_buckets(z, bucket_numel);
    rc = cut_all_parts(z, whole, round_robin);
    if (rc < 0)
        goto fail;
    *out = z;
    return 0;

fail:
    ds_zero_free(z);
    return rc;
}

int64_t ds_zero_group_numel(const ds_zero *z, int group)
{
    return group >= 0 && group < z->n_groups ? z->size[group] : 0;
}

int64_t ds_zero_offset(const ds_zero *z, int param)
{
    return param >= 0 && param < z->n_params ? z->offset[param] : -1;
}

int ds_zero_owner(const ds_zero *z, int group, int64_t element)
{
    for (int i = 0; i < z->n_buckets; i++) {
        const ds_zero_bucket *b = &z->buckets[i];

        for (int r = 0; b->group == group && r < z->world; r++)
            if (element - b->start >= b->borders[r] && element - b->start < b->borders[r + 1])
                return r;
    }
    return -1;
}

int ds_zero_buckets(const ds_zero_bucket **out, const ds_zero *z)
{
    *out = z->buckets;
    return z->n_buckets;
}

/* ---- the control word */

enum { FIELDS = sizeof(ds_control) / sizeof(int32_t), SUMS = 8 };

int ds_control_agree(ds_control *word, double *sums, int n, ds_comm *comm)
{
    int ranks = ds_comm_size(comm), rc;
    int64_t mine = SUMS + FIELDS, all = mine * ranks;
    ds_tensor in, out;
    int32_t *field = (int32_t *)word;

    if (n < 0 || n > SUMS)
        return ds_fail(DS_EINVAL, "%d sums in a control word, which has room for %d", n, SUMS);
    if (ranks == 1)
        return 0;
    rc = ds_empty(&in, DS_F64, DS_CPU, 1, &mine);
    if (rc < 0)
        return rc;
    rc = ds_empty(&out, DS_F64, DS_CPU, 1, &all);
    if (rc < 0) {
        ds_release(&in);
        return rc;
    }
    memset(in.data, 0, (size_t)mine * sizeof(double));
    memcpy(in.data, sums, (size_t)n * sizeof *sums);
    for (int i = 0; i < FIELDS; i++)
        ((double *)in.data)[SUMS + i] = field[i];
    rc = ds_all_gather(&out, &in, comm, NULL);
    for (int r = 0; r < ranks && rc == 0; r++) {
        const double *from = (const double *)out.data + r * mine;

        for (int i = 0; i < n; i++)
            sums[i] = (r ? sums[i] : 0) + from[i];
        for (int i = 0; i < FIELDS; i++)
            field[i] = (int32_t)from[SUMS + i] > field[i] ? (int32_t)from[SUMS + i] : field[i];
    }
    ds_release(&in);
    ds_release(&out);
    return rc;
}
