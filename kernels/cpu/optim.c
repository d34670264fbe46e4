/* optim.c - optimizers: one pass over flat buffers of weights, state and gradients; Lamb, which
 * needs norms of whole tensors, makes two.
 *
 * A pass is bound by memory, so whatever can ride along does: the gradient's scale (loss scale and
 * clipping) and the copy of the new weights in low precision. Blocks of a few KB pass through the
 * first-level cache: low precision gradients are widened there, new weights are rounded from there.
 */
#include "kernels/cpu/level.h"

#include "kernels/cpu/simd.h"
#include "kernels/optim_rules.h"
#include "kernels/scalar.h"
#include "kernels/scratch.h"

#define BLOCK 512 /* elements: few, so that widening and rounding overlap with reading the next */
#define PIECE (32 * BLOCK) /* elements with sums of their own, which threads do not share */

typedef void rule(void *p, void *a, void *b, const void *g, int64_t n, const ds_hyper *h);

#define REAL float
#define SQRT sqrtf
#define FMA DS_FMA
#define NAME(rule) rule##_f32
#include "kernels/cpu/optim_loops.h"
#undef REAL
#undef SQRT
#undef FMA
#undef NAME

#define REAL double
#define SQRT sqrt
#define FMA(a, b, c) ((a) * (b) + (c))
#define NAME(rule) rule##_f64
#include "kernels/cpu/optim_loops.h"

/* Where element i lies. */
static void *at(const ds_tensor *t, int64_t i)
{
    return t ? (char *)t->data + i * ds_bytes_of(t->dtype) : NULL;
}

static void pass_f32(rule *step, const ds_tensor *p, const ds_tensor *const state[2],
                     const ds_tensor *low, const ds_tensor *g, const ds_hyper *h)
{
    int64_t begin, end;
    float wide[BLOCK];

    ds_part(&begin, &end, p->numel, BLOCK);
    for (int64_t i = begin; i < end; i += BLOCK) {
        int64_t n = end - i < BLOCK ? end - i : BLOCK;
        const void *gi = at(g, i);

        if (g->dtype != DS_F32) {
            ds_row_load(wide, gi, g->dtype, n, 1);
            gi = wide;
        }
        step(at(p, i), at(state[0], i), at(state[1], i), gi, n, h);
        if (low)
            ds_row_store(at(low, i), at(p, i), low->dtype, n, 1);
    }
}

/* What the kernels have in common before they start: 0, 1 where the step is to be left out, or an
 * error. *h gets what factor and rates say. */
static int prepare(const char *what, const ds_tensor *p, const ds_tensor *a, const ds_tensor *b,
                   const ds_tensor *low, const ds_tensor *g, const ds_tensor *factor,
                   const ds_tensor *rates, ds_hyper *h)
{
    DS_TRY(ds_check_optimizer(what, p, a, b, low, g, factor, rates));
    return !ds_hyper_read(h, factor ? factor->data : NULL, rates ? rates->data : NULL);
}

static void run(rule *f32, rule *f64, const ds_tensor *p, const ds_tensor *a, const ds_tensor *b,
                const ds_tensor *low, const ds_tensor *g, const ds_hyper *h)
{
    const ds_tensor *const state[2] = {a, b};
    int threads = ds_threads(p->numel * 4);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (p->dtype == DS_F64) {
            int64_t begin, end;

            ds_part(&begin, &end, p->numel, BLOCK);
            f64(at(p, begin), at(a, begin), at(b, begin), at(g, begin), end - begin, h);
        } else {
            pass_f32(f32, p, state, low, g, h);
        }
    }
}

/* What an elementwise rule is: everything above. */
static int step(const char *what, rule *f32, rule *f64, const ds_tensor *p, const ds_tensor *a,
                const ds_tensor *b, const ds_tensor *low, const ds_tensor *g,
                const ds_tensor *factor, const ds_tensor *rates, ds_hyper *h)
{
    int rc = prepare(what, p, a, b, low, g, factor, rates, h);

    if (rc == 0)
        run(f32, f64, p, a, b, low, g, h);
    return rc < 0 ? rc : 0;
}

int DS_CPU(adam)(ds_tensor *p, ds_tensor *m, ds_tensor *v, ds_tensor *low, const ds_tensor *g,
                 double lr, double beta1, double beta2, double eps, double weight_decay, double c1,
                 double c2, double gscale, int decoupled, const ds_tensor *factor,
                 const ds_tensor *rates)
{
    ds_hyper h = ds_hyper_adam(lr, beta1, beta2, eps, weight_decay, c1, c2, gscale, decoupled);

    return step("adam", adam_pass_f32, adam_pass_f64, p, m, v, low, g, factor, rates, &h);
}

int DS_CPU(sgd)(ds_tensor *p, ds_tensor *momentum_buffer, ds_tensor *low, const ds_tensor *g,
                double lr, double momentum, double dampening, double weight_decay, int nesterov,
                int first, double gscale, const ds_tensor *factor, const ds_tensor *rates)
{
    ds_hyper h = ds_hyper_sgd(lr, momentum, dampening, weight_decay, nesterov, first, gscale);

    if (!momentum_buffer && momentum != 0)
        return ds_fail(DS_EINVAL, "sgd: momentum %g needs a momentum buffer", momentum);
    return step("sgd", sgd_pass_f32, sgd_pass_f64, p, momentum_buffer, NULL, low, g, factor, rates,
                &h);
}

int DS_CPU(lion)(ds_tensor *p, ds_tensor *m, ds_tensor *low, const ds_tensor *g, double lr,
                 double beta1, double beta2, double weight_decay, double gscale,
                 const ds_tensor *factor, const ds_tensor *rates)
{
    ds_hyper h = ds_hyper_lion(lr, beta1, beta2, weight_decay, gscale);

    return step("lion", lion_pass_f32, lion_pass_f64, p, m, NULL, low, g, factor, rates, &h);
}

int DS_CPU(adagrad)(ds_tensor *p, ds_tensor *sum, ds_tensor *low, const ds_tensor *g, double lr,
                    double eps, double weight_decay, double gscale, const ds_tensor *factor,
                    const ds_tensor *rates)
{
    ds_hyper h = ds_hyper_adagrad(lr, eps, weight_decay, gscale);

    return step("adagrad", adagrad_pass_f32, adagrad_pass_f64, p, sum, NULL, low, g, factor, rates,
                &h);
}

/* One piece of Lamb's first pass; sums: of squares of weights and update. */
static void lamb_piece(const ds_tensor *p, const ds_tensor *m, const ds_tensor *v,
                       const ds_tensor *g, int64_t begin, const ds_hyper *h, double sums[2])
{
    int64_t end = begin + PIECE < p->numel ? begin + PIECE : p->numel;
    float wide[BLOCK];

    sums[0] = sums[1] = 0;
    for (int64_t i = begin; i < end; i += BLOCK) {
        int64_t n = end - i < BLOCK ? end - i : BLOCK;
        const void *gi = at(g, i);

        if (p->dtype == DS_F64) {
            lamb_moments_pass_f64(at(p, i), at(m, i), at(v, i), gi, n, h, sums);
            continue;
        }
        if (g->dtype != DS_F32) {
            ds_row_load(wide, gi, g->dtype, n, 1);
            gi = wide;
        }
        lamb_moments_pass_f32(at(p, i), at(m, i), at(v, i), gi, n, h, sums);
    }
}

int DS_CPU(lamb)(ds_tensor *p, ds_tensor *m, ds_tensor *v, ds_tensor *low, const ds_tensor *g,
                 double lr, double beta1, double beta2, double eps, double weight_decay, double c1,
                 double c2, double min_coeff, double max_coeff, double gscale,
                 const ds_tensor *factor, const ds_tensor *rates)
{
    ds_hyper h =
        ds_hyper_lamb(lr, beta1, beta2, eps, weight_decay, c1, c2, min_coeff, max_coeff, gscale);
    int rc = prepare("lamb", p, m, v, low, g, factor, rates, &h);
    int threads = ds_threads(p->numel * 4);
    int64_t pieces = (p->numel + PIECE - 1) / PIECE;
    double *sums, weights = 0, updates = 0;

    if (rc != 0)
        return rc < 0 ? rc : 0;
    sums = ds_scratch(DS_SCRATCH_SUMS, (size_t)(pieces + 1) * 2 * sizeof *sums);
    if (!sums)
        return DS_ENOMEM;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < pieces; i++)
        lamb_piece(p, m, v, g, i * PIECE, &h, sums + 2 * i);
    for (int64_t i = 0; i < pieces; i++) {
        weights += sums[2 * i];
        updates += sums[2 * i + 1];
    }
    h.lr *= ds_lamb_trust(&h, weights, updates);
    run(lamb_apply_pass_f32, lamb_apply_pass_f64, p, m, v, low, g, &h);
    return 0;
}

/* ---- the norm of all gradients, and the factor that clips it: numbers that stay on the device */

int DS_CPU(square_sum)(ds_tensor *y, const ds_tensor *x, int accumulate)
{
    double sum;

    DS_TRY(ds_check_square_sum(y, x));
    DS_TRY(DS_CPU(sum_squares)(&sum, x));
    if (y->dtype == DS_F64)
        *(double *)y->data = sum + (accumulate ? *(double *)y->data : 0);
    else
        *(float *)y->data = (float)sum + (accumulate ? *(float *)y->data : 0);
    return 0;
}

int DS_CPU(clip_factor)(ds_tensor *factor, ds_tensor *norm, const ds_tensor *squares,
                        double max_norm, double scale, int skip)
{
    double length;

    DS_TRY(ds_check_clip_factor(factor, norm, squares));
    length = ds_clip_norm(*(float *)squares->data, scale);
    *(float *)norm->data = (float)length;
    *(float *)factor->data = (float)ds_clip_factor(length, max_norm, scale, skip);
    return 0;
}
