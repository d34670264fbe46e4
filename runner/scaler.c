/* scaler.c - the loss scale of fp16 training, after DeepSpeed's DynamicLossScaler.
 *
 * Small gradients vanish in fp16, so the loss is multiplied by a scale and the gradients divided by it
 * again. The scale doubles after a window of steps without overflow and halves at an overflow, after
 * forgiving some (hysteresis). One algorithm for every stage; DeepSpeed has another at stage 0.
 *
 * The caller divides by the scale that the loss was multiplied by, and only then updates.
 * DeepSpeed updates first, so that at every growth it divides by twice that scale: a bug that is not
 * copied.
 */
#include <math.h>

#include "runner/ds.h"

#define MOST 0x1p126 /* 1 / scale is still a normal f32 */

static int check_scale(double scale, const char *what)
{
    if (scale > 0 && scale <= MOST)
        return 0;
    return ds_fail(DS_EINVAL, "loss scale: %s %g must be above 0 and at most 2^126", what, scale);
}

int ds_scaler_static(ds_scaler *s, double scale)
{
    int rc = check_scale(scale, "the fixed scale");

    if (rc == 0)
        *s = (ds_scaler){.cur_scale = scale, .last_overflow_iter = -1};
    return rc;
}

int ds_scaler_dynamic(ds_scaler *s, int initial_power, double min_scale, int64_t window,
                      int64_t hysteresis, int consecutive)
{
    double initial = ldexp(1, initial_power);
    int rc = check_scale(initial, "the initial scale");

    if (rc == 0)
        rc = check_scale(min_scale, "the minimum");
    if (rc < 0)
        return rc;
    if (initial < min_scale)
        return ds_fail(DS_EINVAL, "loss scale: the initial scale 2^%d = %g is below the minimum %g",
                       initial_power, initial, min_scale);
    if (window < 1 || hysteresis < 1)
        return ds_fail(DS_EINVAL, "loss scale: window %lld and hysteresis %lld must be at least 1",
                       (long long)window, (long long)hysteresis);
    *s = (ds_scaler){.cur_scale = initial,
                     .last_overflow_iter = -1,
                     .cur_hysteresis = hysteresis,
                     .dynamic = 1,
                     .min_scale = min_scale,
                     .window = window,
                     .hysteresis = hysteresis,
                     .consecutive = consecutive != 0};
    return 0;
}

static int overflow_now(ds_scaler *s)
{
    int rc = 0;

    if (s->cur_hysteresis > 1)
        s->cur_hysteresis--;
    else if (s->cur_scale > s->min_scale)
        s->cur_scale = fmax(s->cur_scale / 2, s->min_scale);
    else
        rc = ds_fail(DS_ERANGE,
                     "a gradient is not finite, and the loss scale %g is the smallest allowed "
                     "(fp16.min_loss_scale); lower the learning rate, look for a NaN in the data "
                     "(DS_CHECK=nan names the operation), or train in bf16, which needs no scale",
                     s->cur_scale);
    s->last_overflow_iter = s->cur_iter;
    return rc;
}

static void fine_now(ds_scaler *s)
{
    int64_t since = s->cur_iter - s->last_overflow_iter - 1; /* fine steps before this one */

    if (s->consecutive)
        s->cur_hysteresis = s->hysteresis;
    if (since == 0 || since % s->window != 0)
        return;
    s->cur_hysteresis = s->hysteresis;
    if (s->cur_scale <= MOST / 2)
        s->cur_scale *= 2;
}

int ds_scaler_update(ds_scaler *s, int overflow)
{
    int rc = 0;

    if (s->dynamic && overflow)
        rc = overflow_now(s);
    else if (s->dynamic)
        fine_now(s);
    s->cur_iter++;
    return rc;
}

int ds_scaler_restore(ds_scaler *s, double cur_scale, int64_t cur_iter, int64_t last_overflow_iter,
                      int64_t cur_hysteresis)
{
    int rc = check_scale(cur_scale, "the saved scale");

    if (rc < 0)
        return rc;
    if (cur_iter < 0 || last_overflow_iter < -1 || last_overflow_iter >= cur_iter)
        return ds_fail(DS_EINVAL,
                       "loss scale: a saved state of %lld steps with the last overflow at %lld "
                       "makes no sense",
                       (long long)cur_iter, (long long)last_overflow_iter);
    s->cur_iter = cur_iter;
    if (!s->dynamic)
        return 0;
    s->last_overflow_iter = last_overflow_iter;
    s->cur_scale = fmax(cur_scale, s->min_scale);
    s->cur_hysteresis = cur_hysteresis < 1               ? 1
                        : cur_hysteresis > s->hysteresis ? s->hysteresis
                                                         : cur_hysteresis;
    return 0;
}
