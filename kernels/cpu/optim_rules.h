/* optim_rules.h - the optimizers' arithmetic, once for f32 and once for f64.
 *
 * optim.c includes this with REAL (the type), SQRT, FMA and NAME(rule) defined. Each rule is one
 * pass over n elements; h holds its constants, g is the gradient as it lies in memory, to be
 * multiplied by gscale. Plain loops: they are bound by memory, and the compiler's vectors keep
 * up with it.
 */

static void NAME(adam)(void *restrict pv, void *restrict mv, void *restrict vv,
                       const void *restrict gv, int64_t n, const hyper *h)
{
    REAL *restrict p = pv, *restrict m = mv, *restrict v = vv;
    const REAL *restrict g = gv;
    const REAL gscale = (REAL)h->gscale, beta2 = (REAL)h->beta2, eps = (REAL)h->eps;
    const REAL keep1 = (REAL)(1 - h->beta1), keep2 = (REAL)(1 - h->beta2);
    const REAL rate = (REAL)(h->lr / h->c1), root = (REAL)(1 / sqrt(h->c2));
    /* Adam adds the decay to the gradient, AdamW shrinks the weight beforehand. */
    const REAL decay = (REAL)(h->decoupled ? 0 : h->weight_decay);
    const REAL shrink = (REAL)(h->decoupled ? 1 - h->lr * h->weight_decay : 1);

    for (int64_t i = 0; i < n; i++) {
        REAL d = FMA(decay, p[i], g[i] * gscale);
        REAL mi = FMA(keep1, d - m[i], m[i]);
        REAL vi = FMA(keep2 * d, d, beta2 * v[i]);

        m[i] = mi;
        v[i] = vi;
        p[i] = FMA(-rate, mi / FMA(SQRT(vi), root, eps), shrink * p[i]);
    }
}

/* As torch.optim.SGD: the first step takes the gradient undamped, the rate multiplies the whole
 * velocity. */
static void NAME(sgd)(void *restrict pv, void *restrict bv, void *restrict unused,
                      const void *restrict gv, int64_t n, const hyper *h)
{
    REAL *restrict p = pv, *restrict b = bv;
    const REAL *restrict g = gv;
    const REAL gscale = (REAL)h->gscale, decay = (REAL)h->weight_decay, lr = (REAL)h->lr;
    const REAL momentum = (REAL)(h->first ? 0 : h->momentum);
    const REAL damp = (REAL)(h->first ? 1 : 1 - h->dampening);
    const REAL of_g = (REAL)(h->nesterov ? 1 : 0), of_b = (REAL)(h->nesterov ? h->momentum : 1);

    (void)unused;
    if (!b) {
        for (int64_t i = 0; i < n; i++)
            p[i] -= lr * FMA(decay, p[i], g[i] * gscale);
        return;
    }
    if (h->first) /* what the buffer holds may be anything, NaN too */
        memset(b, 0, (size_t)n * sizeof *b);
    for (int64_t i = 0; i < n; i++) {
        REAL d = FMA(decay, p[i], g[i] * gscale);
        REAL bi = FMA(momentum, b[i], damp * d);

        b[i] = bi;
        p[i] -= lr * FMA(of_g, d, of_b * bi);
    }
}

/* Chen et al. 2023, algorithm 2. sign(0) is 0: an element without gradient only decays. */
static void NAME(lion)(void *restrict pv, void *restrict mv, void *restrict unused,
                       const void *restrict gv, int64_t n, const hyper *h)
{
    REAL *restrict p = pv, *restrict m = mv;
    const REAL *restrict g = gv;
    const REAL gscale = (REAL)h->gscale, beta1 = (REAL)h->beta1, beta2 = (REAL)h->beta2;
    const REAL keep1 = (REAL)(1 - h->beta1), keep2 = (REAL)(1 - h->beta2);
    const REAL lr = (REAL)h->lr, shrink = (REAL)(1 - h->lr * h->weight_decay);

    (void)unused;
    for (int64_t i = 0; i < n; i++) {
        REAL gi = g[i] * gscale;
        REAL c = FMA(beta1, m[i], keep1 * gi);
        REAL up = c > 0 ? lr : 0, down = c < 0 ? lr : 0;

        /* c - c is 0, or NaN: a NaN must show in the weights, not vanish in a comparison. */
        p[i] = shrink * p[i] - (up - down) + (c - c);
        m[i] = FMA(beta2, m[i], keep2 * gi);
    }
}

static void NAME(adagrad)(void *restrict pv, void *restrict sv, void *restrict unused,
                          const void *restrict gv, int64_t n, const hyper *h)
{
    REAL *restrict p = pv, *restrict s = sv;
    const REAL *restrict g = gv;
    const REAL gscale = (REAL)h->gscale, decay = (REAL)h->weight_decay;
    const REAL lr = (REAL)h->lr, eps = (REAL)h->eps;

    (void)unused;
    for (int64_t i = 0; i < n; i++) {
        REAL d = FMA(decay, p[i], g[i] * gscale);
        REAL si = FMA(d, d, s[i]);

        s[i] = si;
        p[i] -= lr * d / (SQRT(si) + eps);
    }
}

/* You et al. 2019, algorithm 2, in two passes: the norms of a whole tensor stand between them. The
 * first moves the averages and adds the squares of weights and update to sums[0] and sums[1]; the
 * second makes the update again, which is cheaper than keeping it. */
static void NAME(lamb_moments)(const void *restrict pv, void *restrict mv, void *restrict vv,
                               const void *restrict gv, int64_t n, const hyper *h, double sums[2])
{
    const REAL *restrict p = pv, *restrict g = gv;
    REAL *restrict m = mv, *restrict v = vv;
    const REAL gscale = (REAL)h->gscale, beta2 = (REAL)h->beta2, eps = (REAL)h->eps;
    const REAL keep1 = (REAL)(1 - h->beta1), keep2 = (REAL)(1 - h->beta2);
    const REAL of_m = (REAL)(1 / h->c1), root = (REAL)(1 / sqrt(h->c2));
    const REAL decay = (REAL)h->weight_decay;
    REAL weights = 0, updates = 0;

#pragma omp simd reduction(+ : weights, updates)
    for (int64_t i = 0; i < n; i++) {
        REAL d = g[i] * gscale;
        REAL mi = FMA(keep1, d - m[i], m[i]);
        REAL vi = FMA(keep2 * d, d, beta2 * v[i]);
        REAL update = FMA(decay, p[i], of_m * mi / FMA(SQRT(vi), root, eps));

        m[i] = mi;
        v[i] = vi;
        weights += p[i] * p[i];
        updates += update * update;
    }
    sums[0] += (double)weights;
    sums[1] += (double)updates;
}

static void NAME(lamb_apply)(void *restrict pv, void *restrict mv, void *restrict vv,
                             const void *restrict unused, int64_t n, const hyper *h)
{
    REAL *restrict p = pv;
    const REAL *restrict m = mv, *restrict v = vv;
    const REAL eps = (REAL)h->eps, root = (REAL)(1 / sqrt(h->c2));
    const REAL rate = (REAL)(h->lr / h->c1), shrink = (REAL)(1 - h->lr * h->weight_decay);

    (void)unused;
    for (int64_t i = 0; i < n; i++)
        p[i] = FMA(-rate, m[i] / FMA(SQRT(v[i]), root, eps), shrink * p[i]);
}
