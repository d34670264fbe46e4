/* optim_rules.h - the optimizers' arithmetic on one element: one text for processors and GPUs.
 *
 * Whoever wants it defines REAL (the type), SQRT, FMA and NAME(rule) and includes this, once a type;
 * without REAL it is what all types share. g is the gradient as it lies in memory, to be multiplied by
 * gscale; k holds what does not depend on the element. No branches but ? :, so that a loop over these
 * functions becomes vector code.
 */
#ifndef DS_OPTIM_RULES_H
#define DS_OPTIM_RULES_H

#include <math.h>

#include "kernels/dtype.h"

/* What a call is given. Where a rule has no bias corrections, c1 and c2 are 1. */
typedef struct ds_hyper {
    double lr, beta1, beta2, eps, weight_decay, c1, c2, gscale;
    double momentum, dampening;
    double least, most; /* of Lamb's trust ratio */
    int decoupled, nesterov, first;
} ds_hyper;

/* The same from the kernels' arguments. decoupled: AdamW; Lamb has that, and bounds besides. */
static inline ds_hyper ds_hyper_adam(double lr, double beta1, double beta2, double eps,
                                     double weight_decay, double c1, double c2, double gscale,
                                     int decoupled)
{
    ds_hyper h;

    memset(&h, 0, sizeof h);
    h.lr = lr;
    h.beta1 = beta1;
    h.beta2 = beta2;
    h.eps = eps;
    h.weight_decay = weight_decay;
    h.c1 = c1;
    h.c2 = c2;
    h.gscale = gscale;
    h.decoupled = decoupled;
    return h;
}

static inline ds_hyper ds_hyper_lamb(double lr, double beta1, double beta2, double eps,
                                     double weight_decay, double c1, double c2, double least,
                                     double most, double gscale)
{
    ds_hyper h = ds_hyper_adam(lr, beta1, beta2, eps, weight_decay, c1, c2, gscale, 1);

    h.least = least;
    h.most = most;
    return h;
}

static inline ds_hyper ds_hyper_lion(double lr, double beta1, double beta2, double weight_decay,
                                     double gscale)
{
    return ds_hyper_adam(lr, beta1, beta2, 0, weight_decay, 1, 1, gscale, 1);
}

static inline ds_hyper ds_hyper_adagrad(double lr, double eps, double weight_decay, double gscale)
{
    return ds_hyper_adam(lr, 0, 0, eps, weight_decay, 1, 1, gscale, 0);
}

static inline ds_hyper ds_hyper_sgd(double lr, double momentum, double dampening,
                                    double weight_decay, int nesterov, int first, double gscale)
{
    ds_hyper h = ds_hyper_adam(lr, 0, 0, 0, weight_decay, 1, 1, gscale, 0);

    h.momentum = momentum;
    h.dampening = dampening;
    h.nesterov = nesterov;
    h.first = first;
    return h;
}

/* What tensors on the device say instead: factor [1] multiplies the gradients' scale, rates [3], f64, are
 * lr, c1 and c2; either may be NULL. 0: the factor is not finite, and the step is to be left out. */
DS_FUNC int ds_hyper_read(ds_hyper *h, const float *factor, const double *rates)
{
    if (rates) {
        h->lr = rates[0];
        h->c1 = rates[1];
        h->c2 = rates[2];
    }
    if (!factor)
        return 1;
    h->gscale *= (double)factor[0];
    return factor[0] - factor[0] == 0;
}

/* How far Lamb moves a tensor along its update, as DeepSpeed bounds it, from sums of squares: 1 where
 * one is 0. A NaN passes through, to show in the weights. */
DS_FUNC double ds_lamb_trust(const ds_hyper *h, double weights, double updates)
{
    double ratio;

    if (weights == 0 || updates == 0)
        return 1;
    ratio = sqrt(weights) / sqrt(updates);
    return ratio > h->most ? h->most : ratio < h->least ? h->least : ratio;
}

/* The norm of all gradients, from the sum of the squares of `scale` times them. */
DS_FUNC double ds_clip_norm(double squares, double scale)
{
    return sqrt(squares) / scale;
}

/* What gradients that are `scale` times too large are multiplied by: then their norm is at most
 * max_norm, if that is positive. NaN, so that the step is left out, where `skip` and the norm is none. */
DS_FUNC double ds_clip_factor(double norm, double max_norm, double scale, int skip)
{
    if (skip && !(norm - norm == 0))
        return (double)NAN;
    return (max_norm > 0 && norm + 1e-6 > max_norm ? max_norm / (norm + 1e-6) : 1) / scale;
}

#endif

#ifdef REAL

typedef struct NAME(constants) {
    REAL gscale, beta1, beta2, keep1, keep2, eps, lr, weight_decay;
    REAL decay, shrink;    /* in the gradient; of the weight beforehand */
    REAL rate, of_m, root; /* lr / c1, 1 / c1, 1 / sqrt(c2) */
    REAL momentum, damp, of_g, of_b;
    int first;
} NAME(constants);

DS_FUNC NAME(constants) NAME(constants_of)(const ds_hyper *h)
{
    NAME(constants) k;

    k.gscale = (REAL)h->gscale;
    k.beta1 = (REAL)h->beta1;
    k.beta2 = (REAL)h->beta2;
    k.keep1 = (REAL)(1 - h->beta1);
    k.keep2 = (REAL)(1 - h->beta2);
    k.eps = (REAL)h->eps;
    k.lr = (REAL)h->lr;
    k.weight_decay = (REAL)h->weight_decay;
    k.decay = (REAL)(h->decoupled ? 0 : h->weight_decay);
    k.shrink = (REAL)(h->decoupled ? 1 - h->lr * h->weight_decay : 1);
    k.rate = (REAL)(h->lr / h->c1);
    k.of_m = (REAL)(1 / h->c1);
    k.root = (REAL)(1 / sqrt(h->c2));
    k.momentum = (REAL)(h->first ? 0 : h->momentum);
    k.damp = (REAL)(h->first ? 1 : 1 - h->dampening);
    k.of_g = (REAL)(h->nesterov ? 1 : 0);
    k.of_b = (REAL)(h->nesterov ? h->momentum : 1);
    k.first = h->first;
    return k;
}

/* Adam adds the decay to the gradient, AdamW shrinks the weight beforehand. */
DS_FUNC void NAME(adam)(REAL *p, REAL *m, REAL *v, REAL g, const NAME(constants) * k)
{
    REAL d = FMA(k->decay, *p, g * k->gscale);
    REAL mi = FMA(k->keep1, d - *m, *m);
    REAL vi = FMA(k->keep2 * d, d, k->beta2 * *v);

    *m = mi;
    *v = vi;
    *p = FMA(-k->rate, mi / FMA(SQRT(vi), k->root, k->eps), k->shrink * *p);
}

DS_FUNC void NAME(sgd_plain)(REAL *p, REAL g, const NAME(constants) * k)
{
    *p -= k->lr * FMA(k->decay, *p, g * k->gscale);
}

/* As torch.optim.SGD: the first step takes the gradient undamped, the rate multiplies the whole
 * velocity. What the buffer holds before the first step may be anything, NaN too. */
DS_FUNC void NAME(sgd)(REAL *p, REAL *b, REAL g, const NAME(constants) * k)
{
    REAL d = FMA(k->decay, *p, g * k->gscale);
    REAL bi = FMA(k->momentum, k->first ? 0 : *b, k->damp * d);

    *b = bi;
    *p -= k->lr * FMA(k->of_g, d, k->of_b * bi);
}

/* Chen et al. 2023, algorithm 2. sign(0) is 0: an element without gradient only decays. */
DS_FUNC void NAME(lion)(REAL *p, REAL *m, REAL g, const NAME(constants) * k)
{
    REAL gi = g * k->gscale;
    REAL c = FMA(k->beta1, *m, k->keep1 * gi);
    REAL up = c > 0 ? k->lr : 0, down = c < 0 ? k->lr : 0;

    /* c - c is 0, or NaN: a NaN must show in the weights, not vanish in a comparison. */
    *p = k->shrink * *p - (up - down) + (c - c);
    *m = FMA(k->beta2, *m, k->keep2 * gi);
}

DS_FUNC void NAME(adagrad)(REAL *p, REAL *s, REAL g, const NAME(constants) * k)
{
    REAL d = FMA(k->decay, *p, g * k->gscale);
    REAL si = FMA(d, d, *s);

    *s = si;
    *p -= k->lr * d / (SQRT(si) + k->eps);
}

/* You et al. 2019, algorithm 2, in two passes: the norms of a whole tensor stand between them. The
 * first moves the averages and gives the update, the second makes the update again, which is cheaper
 * than keeping it. */
DS_FUNC REAL NAME(lamb_moments)(REAL p, REAL *m, REAL *v, REAL g, const NAME(constants) * k)
{
    REAL d = g * k->gscale;
    REAL mi = FMA(k->keep1, d - *m, *m);
    REAL vi = FMA(k->keep2 * d, d, k->beta2 * *v);

    *m = mi;
    *v = vi;
    return FMA(k->weight_decay, p, k->of_m * mi / FMA(SQRT(vi), k->root, k->eps));
}

DS_FUNC void NAME(lamb_apply)(REAL *p, REAL m, REAL v, const NAME(constants) * k)
{
    *p = FMA(-k->rate, m / FMA(SQRT(v), k->root, k->eps), k->shrink * *p);
}

#endif
