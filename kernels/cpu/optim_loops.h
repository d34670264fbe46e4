/* optim_loops.h - the optimizers' passes over n elements, once for f32 and once for f64.
 *
 * optim.c includes this with REAL, SQRT, FMA and NAME(rule) defined as optim_rules.h wants them. Plain
 * loops: they are bound by memory, and the compiler's vectors keep up with it.
 */
#include "kernels/optim_rules.h"

static void NAME(adam_pass)(void *restrict pv, void *restrict mv, void *restrict vv,
                            const void *restrict gv, int64_t n, const ds_hyper *h)
{
    REAL *restrict p = pv, *restrict m = mv, *restrict v = vv;
    const REAL *restrict g = gv;
    const NAME(constants) k = NAME(constants_of)(h);

    for (int64_t i = 0; i < n; i++)
        NAME(adam)(p + i, m + i, v + i, g[i], &k);
}

static void NAME(sgd_pass)(void *restrict pv, void *restrict bv, void *restrict unused,
                           const void *restrict gv, int64_t n, const ds_hyper *h)
{
    REAL *restrict p = pv, *restrict b = bv;
    const REAL *restrict g = gv;
    const NAME(constants) k = NAME(constants_of)(h);

    (void)unused;
    for (int64_t i = 0; !b && i < n; i++)
        NAME(sgd_plain)(p + i, g[i], &k);
    for (int64_t i = 0; b && i < n; i++)
        NAME(sgd)(p + i, b + i, g[i], &k);
}

static void NAME(lion_pass)(void *restrict pv, void *restrict mv, void *restrict unused,
                            const void *restrict gv, int64_t n, const ds_hyper *h)
{
    REAL *restrict p = pv, *restrict m = mv;
    const REAL *restrict g = gv;
    const NAME(constants) k = NAME(constants_of)(h);

    (void)unused;
    for (int64_t i = 0; i < n; i++)
        NAME(lion)(p + i, m + i, g[i], &k);
}

static void NAME(adagrad_pass)(void *restrict pv, void *restrict sv, void *restrict unused,
                               const void *restrict gv, int64_t n, const ds_hyper *h)
{
    REAL *restrict p = pv, *restrict s = sv;
    const REAL *restrict g = gv;
    const NAME(constants) k = NAME(constants_of)(h);

    (void)unused;
    for (int64_t i = 0; i < n; i++)
        NAME(adagrad)(p + i, s + i, g[i], &k);
}

/* Adds the squares of weights and update to sums[0] and sums[1]. */
static void NAME(lamb_moments_pass)(const void *restrict pv, void *restrict mv, void *restrict vv,
                                    const void *restrict gv, int64_t n, const ds_hyper *h,
                                    double sums[2])
{
    const REAL *restrict p = pv, *restrict g = gv;
    REAL *restrict m = mv, *restrict v = vv;
    const NAME(constants) k = NAME(constants_of)(h);
    REAL weights = 0, updates = 0;

#pragma omp simd reduction(+ : weights, updates)
    for (int64_t i = 0; i < n; i++) {
        REAL update = NAME(lamb_moments)(p[i], m + i, v + i, g[i], &k);

        weights += p[i] * p[i];
        updates += update * update;
    }
    sums[0] += (double)weights;
    sums[1] += (double)updates;
}

static void NAME(lamb_apply_pass)(void *restrict pv, void *restrict mv, void *restrict vv,
                                  const void *restrict unused, int64_t n, const ds_hyper *h)
{
    REAL *restrict p = pv;
    const REAL *restrict m = mv, *restrict v = vv;
    const NAME(constants) k = NAME(constants_of)(h);

    (void)unused;
    for (int64_t i = 0; i < n; i++)
        NAME(lamb_apply)(p + i, m[i], v[i], &k);
}
