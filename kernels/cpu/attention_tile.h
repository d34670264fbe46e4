/* attention_tile.h - products of small matrices out of cache, for attention.
 *
 * Products are made of tiles of TILE_ROWS rows by up to TILE_VECTORS vectors, held in registers:
 * C += A B. Operands are packed first, which also takes care of strides, dtypes and odd sizes:
 *     columns: [rows / lanes][depth][lanes], B of q kᵀ, and A of it: k-major
 *     rows:    [width / lanes][rows][lanes], B of a product that sums over rows
 * Depth is counted in units of 4 bytes: an f32, or, in the `pairs` form, two bf16 that lie one
 * after the other along the depth, as vdpbf16ps wants them: twice the products an instruction.
 */
#ifndef DS_CPU_ATTENTION_TILE_H
#define DS_CPU_ATTENTION_TILE_H

#include "kernels/cpu/simd.h"

#if VF_LANES == 16
#define TILE_ROWS 8 /* 16 of 32 registers accumulate */
#define TILE_VECTORS 2
#else
#define TILE_ROWS 4 /* 12 of 16 */
#define TILE_VECTORS 3
#endif

#define ATTENTION_MAX_D 512

#ifdef __AVX512BF16__
#define ATTENTION_PAIRS 1
#else
#define ATTENTION_PAIRS 0
#endif

static inline int64_t round_up(int64_t n, int64_t to)
{
    return (n + to - 1) / to * to;
}

static inline int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t vectors_of(int64_t n)
{
    return (n + VF_LANES - 1) / VF_LANES;
}

/* Rows of a tensor: row r is outer (r / ratio) + inner (r % ratio) elements from base. */
typedef struct rows {
    char *base;
    int64_t outer, inner, ratio;
    int dtype;
} rows;

static inline char *row_at(const rows *x, int64_t r)
{
    if (x->ratio == 1)
        return x->base + r * x->outer;
    return x->base + r / x->ratio * x->outer + r % x->ratio * x->inner;
}

/* ---- lanes */

/* Lanes below n (any n) of v, the others of `rest`. */
VF_FUNC vf first_lanes(vf v, int64_t n, vf rest)
{
#if VF_LANES == 16
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    __mmask16 below = _mm512_cmplt_epi32_mask((__m512i)lane, _mm512_set1_epi32((int32_t)n));

    return _mm512_mask_mov_ps(rest, below, v);
#elif VF_LANES == 8
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7};

    return vf_select(lane < (int32_t)n, v, rest);
#else
    const vi lane = {0, 1, 2, 3};

    return vf_select(lane < (int32_t)n, v, rest);
#endif
}

/* 2^t; below -126.5: 0 (or the nearest subnormal); NaN for NaN. To 8e-8 of it, in the short form to
 * 3e-6, which is plenty before rounding to bf16. Minimax polynomials on [-1/2, 1/2] by Remez. */
VF_FUNC vf exp2_of(vf t, int brief)
{
    vf n, f, y;
#if VF_LANES == 16
    t = vf_max(vf_set(-160.0f), t);
    n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const float round = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
    vf u = (t = vf_max(vf_set(-127.0f), t)) + round;

    n = u - round;
#endif
    f = t - n;
    if (brief) {
        y = vf_fma(f, vf_set(0.0095701016482f), vf_set(0.055917860533f));
        y = vf_fma(y, f, vf_set(0.24024744839f));
        y = vf_fma(y, f, vf_set(0.6931218147f));
        y = vf_fma(y, f, vf_set(0.99999926144f));
    } else {
        y = vf_fma(f, vf_set(0.0013276471543f), vf_set(0.0096755413713f));
        y = vf_fma(y, f, vf_set(0.055507132757f));
        y = vf_fma(y, f, vf_set(0.24022119723f));
        y = vf_fma(y, f, vf_set(0.69314696706f));
        y = vf_fma(y, f, vf_set(1.0000000717f));
    }
#if VF_LANES == 16
    return _mm512_scalef_ps(y, n);
#else
    return y * (vf)(((vi)u << 23) + 0x3f800000);
#endif
}

/* r[i][j] becomes r[j][i]: at each step, halves of size h change places. */
#define LOW(j, h) ((j) & (h) ? VF_LANES + (j) - (h) : (j))
#define HIGH(j, h) ((j) & (h) ? VF_LANES + (j) : (j) + (h))
#define LANES4(f, j, h) f(j, h), f(j + 1, h), f(j + 2, h), f(j + 3, h)
#define LANES8(f, j, h) LANES4(f, j, h), LANES4(f, j + 4, h)
#define LANES16(f, j, h) LANES8(f, j, h), LANES8(f, j + 8, h)
#if VF_LANES == 16
#define LANES(f, h) LANES16(f, 0, h)
#elif VF_LANES == 8
#define LANES(f, h) LANES8(f, 0, h)
#else
#define LANES(f, h) LANES4(f, 0, h)
#endif
#define SWAP_HALVES(r, h)                                                                          \
    for (int i = 0; i < VF_LANES; i++)                                                             \
        if (!(i & (h))) {                                                                          \
            vf low = __builtin_shufflevector(r[i], r[i + (h)], LANES(LOW, h));                     \
            r[i + (h)] = __builtin_shufflevector(r[i], r[i + (h)], LANES(HIGH, h));                \
            r[i] = low;                                                                            \
        }

VF_FUNC void transpose(vf r[VF_LANES])
{
    SWAP_HALVES(r, 1)
    SWAP_HALVES(r, 2)
#if VF_LANES >= 8
    SWAP_HALVES(r, 4)
#endif
#if VF_LANES == 16
    SWAP_HALVES(r, 8)
#endif
}

/* ---- packing. A float here is a unit: where `pairs` is set, two bf16. */

/* Units u .. u + lanes of a row of D elements; 0 beyond its end. */
VF_FUNC vf load_units(const void *row, int64_t u, int64_t D, int dtype, int pairs)
{
    vf v = {0};

    if (pairs) {
        int64_t left = (D - 2 * u) * 2;

        if (left >= (int64_t)sizeof v)
            memcpy(&v, (const uint16_t *)row + 2 * u, sizeof v);
        else if (left > 0)
            memcpy(&v, (const uint16_t *)row + 2 * u, (size_t)left);
        return v;
    }
    return u + VF_LANES <= D ? vf_load_as(row, u, dtype) : vf_load_part_as(row, u, dtype, D - u);
}

/* Units u .. u + lanes of as many rows as a vector has lanes. */
VF_FUNC void pack_square(float *out, const char *const row[VF_LANES], int64_t u, int64_t D,
                         int dtype, int pairs)
{
    int64_t depth = pairs ? (D + 1) / 2 : D;
    vf m[VF_LANES];

    for (int i = 0; i < VF_LANES; i++)
        m[i] = load_units(row[i], u, D, dtype, pairs);
    transpose(m);
    for (int i = 0; i < VF_LANES && u + i < depth; i++)
        vf_store(out + (u + i) * VF_LANES, m[i]);
}

VF_FUNC void pack_columns_as(float *out, const rows *x, int64_t first, int64_t n, int64_t D,
                             int dtype, int pairs)
{
    static const float zero[ATTENTION_MAX_D]; /* a row beyond the last */
    int64_t depth = pairs ? (D + 1) / 2 : D, whole = D / (pairs ? 2 : 1) / VF_LANES * VF_LANES;

    for (int64_t r = 0; r < n; r += VF_LANES, out += depth * VF_LANES) {
        const char *row[VF_LANES];
        int64_t u = 0;

        for (int64_t i = 0; i < VF_LANES; i++)
            row[i] = r + i < n ? row_at(x, first + r + i) : (const char *)zero;
        for (; u < whole; u += VF_LANES)
            pack_square(out, row, u, INT64_MAX / 2, dtype, pairs); /* nothing to check */
        if (u < depth)
            pack_square(out, row, u, D, dtype, pairs);
    }
}

/* out [n / lanes][depth][lanes]; rows beyond n are 0. */
static inline void pack_columns(float *out, const rows *x, int64_t first, int64_t n, int64_t D,
                                int pairs)
{
    if (pairs)
        pack_columns_as(out, x, first, n, D, DS_BF16, 1);
    else if (x->dtype == DS_F32)
        pack_columns_as(out, x, first, n, D, DS_F32, 0);
    else if (x->dtype == DS_BF16)
        pack_columns_as(out, x, first, n, D, DS_BF16, 0);
    else
        pack_columns_as(out, x, first, n, D, DS_F16, 0);
}

VF_FUNC void pack_rows_as(float *out, const rows *x, int64_t first, int64_t n, int64_t D, int dtype,
                          int pairs)
{
    int64_t height = round_up(n, VF_LANES) / (pairs ? 2 : 1), panel = height * VF_LANES;

    for (int64_t r = 0; r < height; r++) {
        int64_t i = pairs ? 2 * r : r;
        const char *row = i < n ? row_at(x, first + i) : NULL;
        const char *next = pairs && i + 1 < n ? row_at(x, first + i + 1) : NULL;

        for (int64_t d = 0; d < D; d += VF_LANES) {
            float *to = out + d / VF_LANES * panel + r * VF_LANES;
            int64_t left = min64(VF_LANES, D - d);

            if (pairs) {
                vh low = {0}, high = {0};
                vu both;

                if (left == VF_LANES) {
                    low = row ? vh_load((const uint16_t *)row + d) : low;
                    high = next ? vh_load((const uint16_t *)next + d) : high;
                } else {
                    low = row ? vh_load_part((const uint16_t *)row + d, left) : low;
                    high = next ? vh_load_part((const uint16_t *)next + d, left) : high;
                }
                both = __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16;
                vf_store(to, (vf)both);
            } else if (!row) {
                vf_store(to, (vf){0});
            } else {
                vf_store(to, left == VF_LANES ? vf_load_as(row, d, dtype)
                                              : vf_load_part_as(row, d, dtype, left));
            }
        }
    }
}

/* out [D / lanes][n in units][lanes], n rounded up to whole vectors; rows and columns beyond are
 * 0. */
static inline void pack_rows(float *out, const rows *x, int64_t first, int64_t n, int64_t D,
                             int pairs)
{
    if (pairs)
        pack_rows_as(out, x, first, n, D, DS_BF16, 1);
    else if (x->dtype == DS_F32)
        pack_rows_as(out, x, first, n, D, DS_F32, 0);
    else if (x->dtype == DS_BF16)
        pack_rows_as(out, x, first, n, D, DS_BF16, 0);
    else
        pack_rows_as(out, x, first, n, D, DS_F16, 0);
}

/* row [D] of `dtype` = factor x. */
VF_FUNC void store_row_as(void *row, const float *x, int64_t D, int dtype, float factor)
{
    int64_t d = 0;

    for (; d + VF_LANES <= D; d += VF_LANES)
        vf_store_as(row, d, dtype, vf_load(x + d) * factor);
    if (d < D)
        vf_store_part_as(row, d, dtype, vf_load_part(x + d, D - d) * factor, D - d);
}

static inline void store_row(void *row, const float *x, int64_t D, int dtype, float factor)
{
    if (dtype == DS_F32)
        store_row_as(row, x, D, DS_F32, factor);
    else if (dtype == DS_BF16)
        store_row_as(row, x, D, DS_BF16, factor);
    else
        store_row_as(row, x, D, DS_F16, factor);
}

/* ---- products */

/* c + a b in every lane, a the unit at *a. */
VF_FUNC vf multiply_add(const float *a, vf b, vf c, int pairs)
{
#if ATTENTION_PAIRS
    if (pairs) {
        int32_t both;

        memcpy(&both, a, sizeof both);
        return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(both), (__m512bh)b);
    }
#endif
    (void)pairs;
    return vf_fma(vf_set(*a), b, c);
}

/* C [TILE_ROWS][vectors] (+)= A B. Unit (i, k) of A is at a[row i + step k]; vector v of B's step k
 * is at b[panel v + lanes k]. */
VF_FUNC void tile_of(float *c, int64_t c_row, const float *a, int64_t row, int64_t step,
                     const float *b, int64_t panel, int64_t depth, int vectors, int accumulate,
                     int pairs)
{
    vf sum[TILE_ROWS][TILE_VECTORS];

    for (int i = 0; i < TILE_ROWS; i++)
        for (int v = 0; v < vectors; v++)
            sum[i][v] = accumulate ? vf_load(c + i * c_row + v * VF_LANES) : (vf){0};
    for (int64_t k = 0; k < depth; k++) {
        vf bv[TILE_VECTORS];

        for (int v = 0; v < vectors; v++)
            bv[v] = vf_load(b + v * panel + k * VF_LANES);
        for (int i = 0; i < TILE_ROWS; i++)
            for (int v = 0; v < vectors; v++)
                sum[i][v] = multiply_add(a + i * row + k * step, bv[v], sum[i][v], pairs);
    }
    for (int i = 0; i < TILE_ROWS; i++)
        for (int v = 0; v < vectors; v++)
            vf_store(c + i * c_row + v * VF_LANES, sum[i][v]);
}

VF_FUNC void tile_wide(float *c, int64_t c_row, const float *a, int64_t row, int64_t step,
                       const float *b, int64_t panel, int64_t depth, int64_t vectors,
                       int accumulate, int pairs)
{
    if (vectors == 1)
        tile_of(c, c_row, a, row, step, b, panel, depth, 1, accumulate, pairs);
    else if (vectors == 2)
        tile_of(c, c_row, a, row, step, b, panel, depth, 2, accumulate, pairs);
    else
        tile_of(c, c_row, a, row, step, b, panel, depth, TILE_VECTORS, accumulate, pairs);
}

#endif
