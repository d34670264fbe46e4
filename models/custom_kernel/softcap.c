/* softcap.c - a kernel of one's own for the CPU: y = cap tanh(x / cap), which keeps x within ±cap.
 *
 * Outputs come first and are made by the caller; what is wrong is told by ds_fail(), before anything
 * is written. Build it as the Makefile says; softcap.lua makes an operation with a gradient of it.
 */
#include <math.h>

#include "kernels/dtype.h"
#include "kernels/error.h"

const char ds_cdef[] =
    "int softcap(ds_tensor *y, const ds_tensor *x, double cap);"
    "int softcap_backward(ds_tensor *dx, const ds_tensor *dy, const ds_tensor *y,"
    "                     double cap);";

static double get(const ds_tensor *t, int64_t i)
{
    switch (t->dtype) {
    case DS_F64:
        return ((const double *)t->data)[i];
    case DS_BF16:
        return ds_bf16_to_f32(((const uint16_t *)t->data)[i]);
    case DS_F16:
        return ds_f16_to_f32(((const uint16_t *)t->data)[i]);
    default:
        return ((const float *)t->data)[i];
    }
}

static void set(ds_tensor *t, int64_t i, double value)
{
    switch (t->dtype) {
    case DS_F64:
        ((double *)t->data)[i] = value;
        break;
    case DS_BF16:
        ((uint16_t *)t->data)[i] = ds_f32_to_bf16((float)value);
        break;
    case DS_F16:
        ((uint16_t *)t->data)[i] = ds_f32_to_f16((float)value);
        break;
    default:
        ((float *)t->data)[i] = (float)value;
    }
}

/* Whether a and b are dense, of one floating dtype and one size. */
static int fits(const char *name, const ds_tensor *a, const ds_tensor *b)
{
    if (!ds_is_float(a->dtype) || a->dtype != b->dtype)
        return ds_fail(DS_EINVAL, "%s: takes one floating dtype, not %s and %s", name,
                       ds_name_of(a->dtype), ds_name_of(b->dtype));
    if (!a->dense || !b->dense || a->numel != b->numel)
        return ds_fail(DS_EINVAL, "%s: takes dense tensors of one size; x:contiguous() makes one",
                       name);
    return 0;
}

int softcap(ds_tensor *y, const ds_tensor *x, double cap)
{
    int rc = fits("softcap", y, x);

    if (rc < 0)
        return rc;
    if (!(cap > 0))
        return ds_fail(DS_EINVAL, "softcap: cap must be above 0, not %g", cap);
    for (int64_t i = 0; i < x->numel; i++)
        set(y, i, cap * tanh(get(x, i) / cap));
    return 0;
}

/* tanh' = 1 - tanh², so dx = dy (1 - (y / cap)²) */
int softcap_backward(ds_tensor *dx, const ds_tensor *dy, const ds_tensor *y, double cap)
{
    int rc = fits("softcap_backward", dx, dy);

    if (rc == 0)
        rc = fits("softcap_backward", dx, y);
    if (rc < 0)
        return rc;
    for (int64_t i = 0; i < dx->numel; i++) {
        double t = get(y, i) / cap;

        set(dx, i, get(dy, i) * (1 - t * t));
    }
    return 0;
}
