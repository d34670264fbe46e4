/* attention_checks.h - what a call of attention must be, on every device: shapes, dtypes, and messages.
 *
 * q [B, T, H, D], k and v [B, S, G, D] with H a multiple of G, the last dimension dense; `what` begins
 * messages. Devices check besides what only they demand.
 */
#ifndef DS_ATTENTION_CHECKS_H
#define DS_ATTENTION_CHECKS_H

#include "kernels/dtype.h"
#include "kernels/error.h"

typedef struct ds_attention_sizes {
    int64_t B, T, S, H, G, D;
} ds_attention_sizes;

/* That x is a tensor like `like`: 4-d, of its dtype and shape, the last dimension dense. */
static inline int ds_attention_same(const char *what, const ds_tensor *x, const char *name,
                                    const ds_tensor *like)
{
    if (x->ndim != 4 || x->dtype != like->dtype)
        return ds_fail(DS_EINVAL, "%s: %s is %d-d %s, must be 4-d %s", what, name, x->ndim,
                       ds_name_of(x->dtype), ds_name_of(like->dtype));
    for (int i = 0; i < 4; i++)
        if (x->shape[i] != like->shape[i])
            return ds_fail(DS_EINVAL, "%s: size %lld of %s's dimension %d, must be %lld", what,
                           (long long)x->shape[i], name, i + 1, (long long)like->shape[i]);
    if (x->stride[3] != 1 && x->shape[3] > 1)
        return ds_fail(DS_EINVAL, "%s: the last dimension of %s is not dense (stride %lld)", what,
                       name, (long long)x->stride[3]);
    return 0;
}

static inline int ds_attention_fit(const char *what, const ds_tensor *q, const ds_tensor *k)
{
    if (k->dtype != q->dtype || k->shape[0] != q->shape[0] || k->shape[3] != q->shape[3])
        return ds_fail(DS_EINVAL,
                       "%s: key %s [%lld x %lld x %lld x %lld] does not match query %s "
                       "[%lld x %lld x %lld x %lld]",
                       what, ds_name_of(k->dtype), (long long)k->shape[0], (long long)k->shape[1],
                       (long long)k->shape[2], (long long)k->shape[3], ds_name_of(q->dtype),
                       (long long)q->shape[0], (long long)q->shape[1], (long long)q->shape[2],
                       (long long)q->shape[3]);
    if (k->stride[3] != 1 && k->shape[3] > 1)
        return ds_fail(DS_EINVAL, "%s: the last dimension of the key is not dense (stride %lld)",
                       what, (long long)k->stride[3]);
    if (k->shape[2] < 1 || q->shape[2] % k->shape[2])
        return ds_fail(DS_EINVAL, "%s: %lld query heads are not a multiple of %lld key heads", what,
                       (long long)q->shape[2], (long long)k->shape[2]);
    return 0;
}

/* The sizes, and that all but the mask fit. Heads are at most `widest` on `device`, a message's end. */
static inline int ds_attention_check(ds_attention_sizes *z, const char *what, const ds_tensor *q,
                                     const ds_tensor *k, const ds_tensor *v, const ds_tensor *lse,
                                     double p, int widest, const char *device)
{
    int rc = ds_attention_same(what, q, "the query", q);

    if (rc < 0 || (rc = ds_attention_same(what, v, "the value", k)) < 0 ||
        (rc = ds_attention_fit(what, q, k)) < 0)
        return rc;
    z->B = q->shape[0];
    z->T = q->shape[1];
    z->H = q->shape[2];
    z->D = q->shape[3];
    z->S = k->shape[1];
    z->G = k->shape[2];
    if (z->D < 1 || z->D > widest)
        return ds_fail(DS_EINVAL, "%s: heads of %lld, must be 1 to %d wide%s", what,
                       (long long)z->D, widest, device);
    if (p < 0 || p >= 1)
        return ds_fail(DS_EINVAL, "%s: dropout %g, must be in [0, 1)", what, p);
    if ((lse->dtype != DS_F32 && (lse->dtype != DS_F64 || q->dtype != DS_F64)) || lse->ndim != 3 ||
        lse->shape[0] != z->B || lse->shape[1] != z->H || lse->shape[2] != z->T)
        return ds_fail(DS_EINVAL, "%s: lse must be f32 [%lld x %lld x %lld]", what, (long long)z->B,
                       (long long)z->H, (long long)z->T);
    return 0;
}

/* Strides of a mask over B, H, T, S: 0 where it is the same for all. Untouched where there is none. */
static inline int ds_attention_mask(int64_t stride[4], const char *what, const ds_tensor *mask,
                                    const ds_attention_sizes *z)
{
    const int64_t full[4] = {z->B, z->H, z->T, z->S};

    if (!mask)
        return 0;
    if (mask->ndim > 4 || (mask->dtype != DS_BOOL && !ds_is_float(mask->dtype)))
        return ds_fail(DS_EINVAL, "%s: the mask is %d-d %s, must be bool or float, at most 4-d",
                       what, mask->ndim, ds_name_of(mask->dtype));
    for (int i = 4 - mask->ndim; i < 4; i++) {
        int64_t size = mask->shape[i - 4 + mask->ndim];

        if (size != 1 && size != full[i])
            return ds_fail(DS_EINVAL,
                           "%s: the mask has %lld where [batch x heads x queries x keys] is "
                           "[%lld x %lld x %lld x %lld]",
                           what, (long long)size, (long long)full[0], (long long)full[1],
                           (long long)full[2], (long long)full[3]);
        stride[i] = size == 1 ? 0 : mask->stride[i - 4 + mask->ndim];
    }
    return 0;
}

#endif
