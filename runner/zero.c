/* zero.c - the element→owner map and the buckets, fixed when the engine is made. */
#include "runner/zero.h"

#include <stdlib.h>
#include <string.h>

struct ds_zero {
    int n_params, n_groups, world, n_buckets;
    int64_t *offset; /* [n_params]: first element of each parameter, in its group's buffer */
    int64_t *numel;  /* [n_params] */
    int32_t *group;  /* [n_params] */
    int64_t *size;   /* [n_groups]: elements with padding, a multiple of world × ALIGN */
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
    free(z->size);
    free(z->buckets);
    free(z);
}

static int place_params(ds_zero *z, const int64_t *numel, const int32_t *group)
{
    for (int i = 0; i < z->n_params; i++) {
        if (group[i] < 0 || group[i] >= z->n_groups || numel[i] < 0 ||
            (i && group[i] < group[i - 1]))
            return ds_fail(DS_EINVAL, "parameter %d of %lld elements cannot be in group %d of %d",
                           i, (long long)numel[i], group[i], z->n_groups);
        z->numel[i] = numel[i];
        z->group[i] = group[i];
        z->offset[i] = z->size[group[i]];
        z->size[group[i]] += round_up(numel[i], DS_ZERO_ALIGN);
    }
    for (int g = 0; g < z->n_groups; g++)
        z->size[g] = round_up(z->size[g], (int64_t)z->world * DS_ZERO_ALIGN);
    return 0;
}

/* Buckets run over each group from its end to its start, as backward fills the gradients, and end
 * at parameters' borders; a parameter larger than a bucket is one of its own. */
static int cut_buckets(ds_zero *z, int64_t bucket_numel)
{
    int first, last = z->n_params - 1;

    z->buckets = calloc(z->n_params ? (size_t)z->n_params : 1, sizeof *z->buckets);
    if (!z->buckets)
        return ds_fail(DS_ENOMEM, "out of host memory");
    for (; last >= 0; last = first - 1) {
        int g = z->group[last];
        int whole = last == z->n_params - 1 || z->group[last + 1] != g;
        int64_t end = whole ? z->size[g] : z->offset[last + 1];

        for (first = last; first > 0 && z->group[first - 1] == g; first--)
            if (end - z->offset[first - 1] > bucket_numel)
                break;
        z->buckets[z->n_buckets++] = (ds_zero_bucket){
            .group = g,
            .first = first,
            .last = last,
            .start = z->offset[first],
            .numel = end - z->offset[first],
        };
    }
    return 0;
}

int ds_zero_make(ds_zero **out, int n_params, const int64_t *numel, const int32_t *group,
                 int n_groups, int world, int64_t bucket_numel)
{
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
    z->offset = calloc((size_t)n_params + 1, sizeof *z->offset);
    z->numel = calloc((size_t)n_params + 1, sizeof *z->numel);
    z->group = calloc((size_t)n_params + 1, sizeof *z->group);
    z->size = calloc((size_t)n_groups, sizeof *z->size);
    rc = DS_ENOMEM;
    if (!z->offset || !z->numel || !z->group || !z->size) {
        ds_fail(rc, "out of host memory");
        goto fail;
    }
    rc = place_params(z, numel, group);
    if (rc < 0)
        goto fail;
    rc = cut_buckets(z, bucket_numel);
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

void ds_zero_shard(int64_t *start, int64_t *numel, const ds_zero *z, int group, int rank)
{
    *numel = ds_zero_group_numel(z, group) / z->world;
    *start = *numel * rank;
}

int ds_zero_owner(const ds_zero *z, int group, int64_t element)
{
    int64_t share = ds_zero_group_numel(z, group) / z->world;

    return share && element >= 0 && element < share * z->world ? (int)(element / share) : -1;
}

int ds_zero_buckets(const ds_zero_bucket **out, const ds_zero *z)
{
    *out = z->buckets;
    return z->n_buckets;
}

/* ---- the control word */

int ds_control_agree(ds_control *word, ds_comm *comm)
{
    ds_tensor t;
    int rc;
    int64_t n = sizeof *word / sizeof(int32_t);

    if (ds_comm_size(comm) == 1)
        return 0;
    rc = ds_empty(&t, DS_I32, DS_CPU, 1, &n);
    if (rc < 0)
        return rc;
    memcpy(t.data, word, sizeof *word);
    rc = ds_all_reduce(&t, &t, DS_MAX, comm, NULL);
    if (rc == 0)
        memcpy(word, t.data, sizeof *word);
    ds_release(&t);
    return rc;
}
