/* tile.h - small squares of a matrix, transposed: for the copy kernels, and for what writes a matrix
 * to a file as its transpose.
 *
 * A tile is 64 bytes square in memory and goes through a small buffer, so that every cache line of
 * x and y is touched once. Going down a column element by element would touch as many lines as
 * there are rows, which at strides of a power of two all share a few sets of the cache.
 */
#ifndef DS_TILE_H
#define DS_TILE_H

#include <stdint.h>
#include <string.h>

#define DS_TILE_BYTES 64

typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));

static inline u16x8 load_u16x8(const uint16_t *p)
{
    u16x8 v;

    memcpy(&v, p, sizeof v);
    return v;
}

static inline u32x4 load_u32x4(const uint32_t *p)
{
    u32x4 v;

    memcpy(&v, p, sizeof v);
    return v;
}

/* Interleave the first and the second halves of a pair of rows. */
#define LOW8(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH8(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define LOW4(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH4(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)

/* Rows i and i + 4 become rows 2 i and 2 i + 1: three times that, and 8 × 8 is transposed. Named
 * variables, because compilers keep arrays of vectors in memory. */
#define ROUND8(b, a)                                                                               \
    u16x8 b##0 = LOW8(a##0, a##4), b##1 = HIGH8(a##0, a##4), b##2 = LOW8(a##1, a##5),              \
          b##3 = HIGH8(a##1, a##5), b##4 = LOW8(a##2, a##6), b##5 = HIGH8(a##2, a##6),             \
          b##6 = LOW8(a##3, a##7), b##7 = HIGH8(a##3, a##7)
#define ROUND4(b, a)                                                                               \
    u32x4 b##0 = LOW4(a##0, a##2), b##1 = HIGH4(a##0, a##2), b##2 = LOW4(a##1, a##3),              \
          b##3 = HIGH4(a##1, a##3)

/* y[j][i] = x[i][j] */
static inline void transpose_8x8(uint16_t *y, int64_t ys, const uint16_t *x, int64_t xs)
{
    u16x8 a0 = load_u16x8(x), a1 = load_u16x8(x + xs), a2 = load_u16x8(x + 2 * xs);
    u16x8 a3 = load_u16x8(x + 3 * xs), a4 = load_u16x8(x + 4 * xs), a5 = load_u16x8(x + 5 * xs);
    u16x8 a6 = load_u16x8(x + 6 * xs), a7 = load_u16x8(x + 7 * xs);
    ROUND8(b, a);
    ROUND8(c, b);
    ROUND8(d, c);

    memcpy(y, &d0, 16);
    memcpy(y + ys, &d1, 16);
    memcpy(y + 2 * ys, &d2, 16);
    memcpy(y + 3 * ys, &d3, 16);
    memcpy(y + 4 * ys, &d4, 16);
    memcpy(y + 5 * ys, &d5, 16);
    memcpy(y + 6 * ys, &d6, 16);
    memcpy(y + 7 * ys, &d7, 16);
}

static inline void transpose_4x4(uint32_t *y, int64_t ys, const uint32_t *x, int64_t xs)
{
    u32x4 a0 = load_u32x4(x), a1 = load_u32x4(x + xs), a2 = load_u32x4(x + 2 * xs);
    u32x4 a3 = load_u32x4(x + 3 * xs);
    ROUND4(b, a);
    ROUND4(c, b);

    memcpy(y, &c0, 16);
    memcpy(y + ys, &c1, 16);
    memcpy(y + 2 * ys, &c2, 16);
    memcpy(y + 3 * ys, &c3, 16);
}

/* One tile: `rows` rows of y, each `columns` elements long; rows of y are `ys` elements apart,
 * columns of y (rows of x) `xs`. Lines of x are read whole, then lines of y are written, a few rows
 * at a time. */
#define TILE(type, side, block, transpose_block)                                                   \
    static void tile_##type(void *out, int64_t ys, const void *in, int64_t xs, int64_t rows,       \
                            int64_t columns)                                                       \
    {                                                                                              \
        _Alignas(64) type a[side][side];                                                           \
        type *y = out;                                                                             \
        const type *x = in;                                                                        \
                                                                                                   \
        if (rows < side || columns < side) {                                                       \
            for (int64_t i = 0; i < rows; i++)                                                     \
                for (int64_t j = 0; j < columns; j++)                                              \
                    y[i * ys + j] = x[j * xs + i];                                                 \
            return;                                                                                \
        }                                                                                          \
        for (int64_t j = 0; j < side; j++)                                                         \
            memcpy(a[j], x + j * xs, sizeof a[j]);                                                 \
        for (int64_t i = 0; i < side; i += block)                                                  \
            for (int64_t j = 0; j < side; j += block)                                              \
                transpose_block(y + i * ys + j, ys, &a[j][i], side);                               \
    }

static void transpose_u8(uint8_t *y, int64_t ys, const uint8_t *x, int64_t xs)
{
    (void)ys, (void)xs;
    *y = *x;
}

static void transpose_u64(uint64_t *y, int64_t ys, const uint64_t *x, int64_t xs)
{
    (void)ys, (void)xs;
    *y = *x;
}

TILE(uint8_t, 64, 1, transpose_u8)
TILE(uint16_t, 32, 8, transpose_8x8)
TILE(uint32_t, 16, 4, transpose_4x4)
TILE(uint64_t, 8, 1, transpose_u64)

/* By the size of an element: tile(y, ys, x, xs, rows, columns), at most DS_TILE_BYTES / size rows of y
 * and as many columns. */
typedef void ds_tile(void *y, int64_t ys, const void *x, int64_t xs, int64_t rows, int64_t columns);
static ds_tile *const ds_tiles[] = {
    [1] = tile_uint8_t, [2] = tile_uint16_t, [4] = tile_uint32_t, [8] = tile_uint64_t};

#endif
