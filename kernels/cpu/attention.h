/* attention.h - what forward and backward share: blocks, their products, masks and dropout.
 *
 * No T x S matrix is ever in memory. A block of query rows meets a strip of keys at a time;
 * scores, weights and their gradients of block x strip live in the first- and second-level
 * cache, and the softmax is kept online (Milakov & Gimelshein 2018; Dao et al. 2022).
 *
 * A unit of work is one (batch, kv head). Its rows are the queries of all the H / G heads that
 * share the kv head: row r is position r / ratio of head g ratio + r % ratio, so that the keys
 * that causality shows never become fewer from one row to the next, and dk, dv are sums over
 * rows.
 */
#ifndef DS_CPU_ATTENTION_H
#define DS_CPU_ATTENTION_H

#include "kernels/cpu/attention_tile.h"

#include <math.h>

#define BLOCK 64              /* query rows; a multiple of VF_LANES */
#define STRIP 256             /* keys; a multiple of VF_LANES */
#define STRIP_LD (STRIP + 16) /* floats from row to row: not a power of two, for the cache's sets */
#define LOG2E 1.4426950408889634

/* A call, checked. */
typedef struct attention {
    const ds_tensor *q, *k, *v, *mask, *lse;
    int64_t batches, T, S, H, G, D;
    int64_t ratio;          /* H / G */
    int64_t row_count;      /* T ratio */
    int64_t depth;          /* D in units */
    int64_t wide;           /* D rounded up to whole vectors */
    int64_t keys;           /* S rounded up to whole vectors */
    int64_t mask_stride[4]; /* over B, H, T, S; elements */
    int pairs;              /* bf16 multiplied in pairs */
    int causal;
    double scale;
    double p; /* dropout */
    uint64_t seed, offset;
} attention;

/* The rows in hand. */
typedef struct block {
    int64_t batch, group; /* kv head */
    int64_t first, n;
    int64_t tiles;
    /* How many keys causality shows to each row; never falls. Rows beyond n: as the last. */
    int64_t seen[BLOCK];
} block;

/* attention.c; `what` begins messages. rc < 0: not a call that makes sense. */
#define attention_check DS_CPU(attention_check)
int attention_check(attention *a, const char *what, const ds_tensor *q, const ds_tensor *k,
                    const ds_tensor *v, const ds_tensor *lse, const ds_tensor *mask, int causal,
                    double scale, double p, uint64_t seed, uint64_t offset);

/* attention_few.c: no more rows than this, as when a model generates: keys and values are read
 * once, as they lie. */
#define ATTENTION_FEW 4
#define attention_few DS_CPU(attention_few)
int attention_few(ds_tensor *y, const attention *a);

/* attention_f64.c: plain loops. */
#define attention_f64 DS_CPU(attention_f64)
int attention_f64(ds_tensor *y, const attention *a);
#define attention_backward_f64 DS_CPU(attention_backward_f64)
int attention_backward_f64(ds_tensor *dq, ds_tensor *dk, ds_tensor *dv, const ds_tensor *dy,
                           const attention *a);

/* ---- rows and blocks */

static inline rows rows_of(const ds_tensor *x, int64_t batch, int64_t head, int64_t ratio)
{
    int64_t bytes = ds_bytes_of(x->dtype);

    return (rows){(char *)x->data + (batch * x->stride[0] + head * ratio * x->stride[2]) * bytes,
                  x->stride[1] * bytes, x->stride[2] * bytes, ratio, x->dtype};
}

/* Row i's place in the tensors. Divisions are slow, and mostly there is nothing to divide. */
static inline void block_place(int64_t *head, int64_t *t, const attention *a, const block *b,
                               int64_t i)
{
    int64_t r = b->first + i;

    *head = a->ratio == 1 ? b->group : b->group * a->ratio + r % a->ratio;
    *t = a->ratio == 1 ? r : r / a->ratio;
}

static inline float *lse_at(const attention *a, const block *b, int64_t i)
{
    const int64_t *stride = a->lse->stride;
    int64_t head, t;

    block_place(&head, &t, a, b, i);
    return (float *)a->lse->data + b->batch * stride[0] + head * stride[1] + t * stride[2];
}

static inline void block_set(block *b, const attention *a, int64_t batch, int64_t group,
                             int64_t first)
{
    int64_t left, seen;

    b->batch = batch;
    b->group = group;
    b->first = first;
    b->n = min64(BLOCK, a->row_count - first);
    b->tiles = (b->n + TILE_ROWS - 1) / TILE_ROWS;
    left = first % a->ratio;
    seen = a->causal ? first / a->ratio + 1 + a->S - a->T : a->S;
    for (int64_t i = 0; i < b->tiles * TILE_ROWS; i++) {
        b->seen[i] = seen < 0 ? 0 : min64(seen, a->S);
        if (a->causal && i < b->n - 1 && ++left == a->ratio) { /* the next row is the next query */
            left = 0;
            seen++;
        }
    }
}

/* Cuts memory into n pieces of sizes[] floats, each from a cache line of its own on; returns how
 * many floats that takes. memory NULL: only counts. */
static inline int64_t attention_carve(float **const to[], float *memory, const int64_t *sizes,
                                      int n)
{
    int64_t used = 0;

    for (int i = 0; i < n; i++) {
        *to[i] = memory ? memory + used : NULL;
        used += round_up(sizes[i], 16) + 16;
    }
    return used;
}

/* Keys of a strip, from `key` on, that a row sees. */
static inline int64_t seen_from(int64_t seen, int64_t key)
{
    int64_t n = seen - key;

    return n < 0 ? 0 : min64(n, STRIP);
}

/* The same for a tile: its last row sees the most. */
static inline int64_t tile_seen(const block *b, int64_t tile, int64_t key)
{
    return seen_from(b->seen[tile * TILE_ROWS + TILE_ROWS - 1], key);
}

/* Keys, whole vectors of them, that every row of a tile sees. */
static inline int64_t tile_full(const block *b, int64_t tile, int64_t key)
{
    return seen_from(b->seen[tile * TILE_ROWS], key) / VF_LANES * VF_LANES;
}

/* How far a row of a strip goes: keys it sees, keys that its whole tile sees, and the end of
 * what it shares with its tile. Loops end where the tile's do, so that their ends are foreseen. */
typedef struct reach {
    int64_t seen, full, end;
} reach;

VF_FUNC reach reach_of(const block *b, int64_t i, int64_t key)
{
    int64_t tile = i / TILE_ROWS;

    if (tile >= b->tiles)
        return (reach){0, 0, 0};
    return (reach){seen_from(b->seen[i], key), tile_full(b, tile, key),
                   round_up(tile_seen(b, tile, key), VF_LANES)};
}

/* ---- what comes next
 *
 * Packing reads with large strides, which the processor does not foresee: a sixth of the time
 * would go into waiting. So the rows of the unit that follows are fetched to the second-level
 * cache one by one, while the present one is worked on. */

#define UNITS_AHEAD 4 /* or more parts a thread, so that none waits long for another at the end */

/* How many units next to each other a thread takes at a time. */
static inline int64_t units_at_once(int64_t units, int threads)
{
    int64_t n = units / (threads * UNITS_AHEAD);

    return n < 1 ? 1 : n;
}

typedef struct soon {
    rows x[5];
    int64_t count[5]; /* rows of each */
    int n;
    int64_t bytes; /* of a row */
} soon;

/* k, v and others with q's shape. */
static inline void soon_set(soon *s, const attention *a, int64_t unit, const ds_tensor *const x[],
                            int n)
{
    s->n = unit < a->batches * a->G ? n : 0;
    s->bytes = a->D * ds_bytes_of(a->q->dtype);
    for (int i = 0; i < s->n; i++) {
        int is_key = x[i] == a->k || x[i] == a->v;

        s->x[i] = rows_of(x[i], unit / a->G, unit % a->G, is_key ? 1 : a->ratio);
        s->count[i] = is_key ? a->S : a->row_count;
    }
}

VF_FUNC void soon_fetch(const soon *s, int64_t r)
{
    for (int i = 0; i < s->n; i++) {
        const char *row = row_at(&s->x[i], r);

        for (int64_t at = 0; at < s->bytes && r < s->count[i]; at += 64)
            __builtin_prefetch(row + at, 0, 2);
    }
}

/* Whether scores need a pass of their own before the softmax: a mask, or a scale that would turn
 * the order of scores round. */
static inline int is_prepared(const attention *a)
{
    return a->mask || a->scale <= 0;
}

/* The factor that brings scores to exponents of 2. */
static inline float exponent_scale(const attention *a)
{
    return (float)(is_prepared(a) ? LOG2E : a->scale * LOG2E);
}

/* attention.c: s [seen] of row i, from `key` on, scaled and masked. */
#define attention_prepare DS_CPU(attention_prepare)
void attention_prepare(float *s, const attention *a, const block *b, int64_t i, int64_t key,
                       int64_t seen);

/* What dropout makes of n weights of row i, from `key` on: 0 or 1 / (1 - p). */
#define attention_keep DS_CPU(attention_keep)
void attention_keep(float *keep, const attention *a, int64_t batch, int64_t head, int64_t t,
                    int64_t key, int64_t n);

static inline void block_keep(float *keep, const attention *a, const block *b, int64_t i,
                              int64_t key, int64_t n)
{
    int64_t head, t;

    block_place(&head, &t, a, b, i);
    attention_keep(keep, a, b->batch, head, t, key, n);
}

/* Where the mask of a query begins, for key `key`. */
static inline const char *mask_at(const attention *a, int64_t batch, int64_t head, int64_t t,
                                  int64_t key)
{
    const int64_t *stride = a->mask_stride;

    return (const char *)a->mask->data +
           (batch * stride[0] + head * stride[1] + t * stride[2] + key * stride[3]) *
               ds_bytes_of(a->mask->dtype);
}

/* ---- rows of a strip */

/* The highest of a row's scores, lane by lane. */
VF_FUNC vf highest(const float *s, reach n)
{
    const vf hidden = vf_set(-INFINITY);
    vf top = hidden;
    int64_t j = 0;

    for (; j < n.full; j += VF_LANES)
        top = vf_max(vf_load(s + j), top);
    for (; j < n.end; j += VF_LANES)
        top = vf_max(first_lanes(vf_load(s + j), n.seen - j, hidden), top);
    return top;
}

/* Scores to weights 2^(score scale - shift), 0 where the row doesn't see; returns their sum,
 * lane by lane. What dropout takes still counts in it. */
VF_FUNC vf weigh(float *s, reach n, float scale, float shift, const float *keep, int pairs)
{
    const int dtype = pairs ? DS_BF16 : DS_F32;
    vf sum = {0}, e;
    int64_t j = 0;

    for (; j < n.full; j += VF_LANES) {
        e = exp2_of(vf_fma(vf_load(s + j), vf_set(scale), vf_set(-shift)), pairs);
        sum += e;
        vf_store_as(s, j, dtype, keep ? e * vf_load(keep + j) : e);
    }
    for (; j < n.end; j += VF_LANES) {
        e = exp2_of(vf_fma(vf_load(s + j), vf_set(scale), vf_set(-shift)), pairs);
        sum += first_lanes(e, n.seen - j, (vf){0});
        e = keep ? e * vf_load(keep + j) : e;
        vf_store_as(s, j, dtype, first_lanes(e, n.seen - j, (vf){0}));
    }
    return sum;
}

/* ---- products of blocks and strips */

/* s [rows][STRIP_LD] = q kᵀ for the strip of keys that begins at `key`. */
VF_FUNC void product_scores(float *s, const float *q, const float *k, const block *b, int64_t key,
                            int64_t depth, int pairs)
{
    int64_t panel = depth * VF_LANES, most = vectors_of(tile_seen(b, b->tiles - 1, key));

    k += key / VF_LANES * panel;
    for (int64_t j = 0; j < most; j += TILE_VECTORS) {
        for (int64_t tile = 0; tile < b->tiles; tile++) {
            int64_t vectors = vectors_of(tile_seen(b, tile, key)) - j, row = tile * TILE_ROWS;

            if (vectors > 0)
                tile_wide(s + row * STRIP_LD + j * VF_LANES, STRIP_LD,
                          q + row / VF_LANES * panel + row % VF_LANES, 1, VF_LANES, k + j * panel,
                          panel, depth, vectors, 0, pairs);
        }
    }
}

/* o [rows][wide] = p v, or added where key > 0; height: of v in units. */
VF_FUNC void product_weighted(float *o, const float *p, const float *v, const block *b, int64_t key,
                              int64_t wide, int64_t height, int pairs)
{
    int64_t panel = height * VF_LANES;

    v += (pairs ? key / 2 : key) * VF_LANES;
    for (int64_t j = 0; j < wide / VF_LANES; j += TILE_VECTORS, v += TILE_VECTORS * panel) {
        int64_t vectors = wide / VF_LANES - j;

        for (int64_t tile = 0; tile < b->tiles; tile++) {
            int64_t seen = tile_seen(b, tile, key), row = tile * TILE_ROWS;
            float *to = o + row * wide + j * VF_LANES;

            seen = pairs ? (seen + 1) / 2 : seen;
            if (key == 0)
                tile_wide(to, wide, p + row * STRIP_LD, STRIP_LD, 1, v, panel, seen, vectors, 0,
                          pairs);
            else if (seen > 0)
                tile_wide(to, wide, p + row * STRIP_LD, STRIP_LD, 1, v, panel, seen, vectors, 1,
                          pairs);
        }
    }
}

/* dk [keys][wide] += pᵀ q: p [rows in units][STRIP_LD], q packed by rows. */
VF_FUNC void product_gathered(float *dk, const float *p, const float *q, const block *b,
                              int64_t key, int64_t wide, int pairs)
{
    int64_t in_unit = pairs ? 2 : 1, rows = b->tiles * TILE_ROWS / in_unit;
    int64_t panel = round_up(b->n, VF_LANES) / in_unit * VF_LANES;
    int64_t tiles = (tile_seen(b, b->tiles - 1, key) + TILE_ROWS - 1) / TILE_ROWS;

    dk += key * wide;
    for (int64_t j = 0; j < wide / VF_LANES; j += TILE_VECTORS, q += TILE_VECTORS * panel) {
        int64_t row = 0;

        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t first, column = tile * TILE_ROWS;

            while (b->seen[row] <= key + column) /* rows before it see none of these keys */
                row++;
            first = row / in_unit;
            tile_wide(dk + column * wide + j * VF_LANES, wide, p + first * STRIP_LD + column, 1,
                      STRIP_LD, q + first * VF_LANES, panel, rows - first, wide / VF_LANES - j, 1,
                      pairs);
        }
    }
}

#endif
