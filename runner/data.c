/* data.c - what is handed out: the order of samples, windows over a token stream, and the thread
 * that gathers the windows of the next batches.
 *
 * A window is `length` tokens and the same shifted by one, as i32: half the memory of i64, and
 * embedding and cross-entropy take both.
 */
#include "runner/data.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"

/* ---- shuffling
 *
 * The swap-or-not shuffle (Hoang, Morris, Rogaway 2012, "An enciphering scheme based on a card
 * shuffle", figure 1) computes where one element of [0, size) goes, for any size and without a
 * table: in each round x and its partner k - x mod size swap places, or not, as a hash of the pair
 * says.
 */

enum { ROUNDS = 64 };

/* The finalizer of splitmix64 (Steele, Lea, Flood 2014): every bit of z moves half of the rest. */
static uint64_t mix(uint64_t z)
{
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

int ds_order(int64_t *out, int64_t first, int64_t n, int64_t size, int shuffle, int64_t seed,
             int64_t epoch)
{
    uint64_t state = mix(mix((uint64_t)seed + 0x9e3779b97f4a7c15u) ^ (uint64_t)epoch);

    if (size < 1 || first < 0 || n < 0 || epoch < 0)
        return ds_fail(DS_EINVAL, "there is no order of %lld samples from %lld on in epoch %lld",
                       (long long)size, (long long)first, (long long)epoch);
    for (int64_t i = 0; i < n; i++)
        out[i] = (first + i) % size;
    for (int round = 0; shuffle && round < ROUNDS; round++) {
        uint64_t salt = mix(state += 0x9e3779b97f4a7c15u);
        int64_t k = (int64_t)(mix(salt) % (uint64_t)size);

        for (int64_t i = 0; i < n; i++) {
            int64_t x = out[i], partner = k >= x ? k - x : k - x + size;
            int64_t pair = x > partner ? x : partner;

            out[i] = mix((uint64_t)pair ^ salt) >> 63 ? partner : x;
        }
    }
    return 0;
}

/* ---- windows */

/* The part of a shard that windows are taken from. */
struct span {
    const struct ds_shard *shard;
    int64_t start; /* the first token, within the shard */
    int64_t first; /* windows in the spans before */
};

struct ds_windows {
    atomic_int refs;
    ds_tokens *tokens;
    int64_t length, stride;
    int64_t count;
    uint32_t limit; /* tokens are below it */
    int n;
    struct span span[];
};

/* Copies tokens of one width to i32; the highest of them. */
#define WIDEN(name, type)                                                                          \
    static uint32_t name(int32_t *out, const char *tokens, int64_t n)                              \
    {                                                                                              \
        const type *in = (const type *)(const void *)tokens;                                       \
        uint32_t highest = 0;                                                                      \
                                                                                                   \
        for (int64_t i = 0; i < n; i++) {                                                          \
            uint32_t id = in[i];                                                                   \
                                                                                                   \
            out[i] = (int32_t)id;                                                                  \
            highest = id > highest ? id : highest;                                                 \
        }                                                                                          \
        return highest;                                                                            \
    }
WIDEN(widen_1, uint8_t)
WIDEN(widen_2, uint16_t)
WIDEN(widen_4, uint32_t)

typedef uint32_t widen_function(int32_t *out, const char *tokens, int64_t n);
static widen_function *const widen[] = {[1] = widen_1, [2] = widen_2, [4] = widen_4};

int ds_windows_make(ds_windows **out, ds_tokens *t, int64_t start, int64_t count, int64_t length,
                    int64_t stride, int64_t vocab_size)
{
    int64_t longest = 0, before = 0;
    ds_windows *w;

    if (length < 1 || stride < 1)
        return ds_fail(DS_EINVAL, "windows of length %lld every %lld tokens: both are at least 1",
                       (long long)length, (long long)stride);
    if (start < 0 || count < 0 || start > t->count || count > t->count - start)
        return ds_fail(DS_ERANGE, "tokens %lld to %lld of a stream of %lld", (long long)start + 1,
                       (long long)(start + count), (long long)t->count);
    w = calloc(1, sizeof *w + (size_t)t->n * sizeof *w->span);
    if (!w)
        return ds_fail(DS_ENOMEM, "out of memory: windows over %d files", t->n);
    w->refs = 1;
    w->length = length;
    w->stride = stride;
    w->limit = vocab_size > 0 && vocab_size < INT32_MAX ? (uint32_t)vocab_size : 1u << 31;
    for (int i = 0; i < t->n; before += t->shard[i++].count) {
        /* the shard's share of [start, start + count), as positions within the shard */
        int64_t low = start > before ? start - before : 0;
        int64_t high = start + count - before;
        int64_t tokens = (high < t->shard[i].count ? high : t->shard[i].count) - low;

        longest = tokens > longest ? tokens : longest;
        if (tokens <= length) /* a window takes one more, for the shifted copy */
            continue;
        w->span[w->n++] = (struct span){&t->shard[i], low, w->count};
        w->count += (tokens - length - 1) / stride + 1;
    }
    if (w->count == 0) {
        free(w);
        return ds_fail(DS_EINVAL,
                       "%s: no window of length %lld fits: it takes %lld tokens, and the longest "
                       "run has %lld",
                       t->shard[0].name, (long long)length, (long long)length + 1,
                       (long long)longest);
    }
    w->tokens = t;
    ds_tokens_retain(t);
    *out = w;
    return 0;
}

void ds_windows_retain(ds_windows *w)
{
    atomic_fetch_add(&w->refs, 1);
}

void ds_windows_release(ds_windows *w)
{
    if (!w || atomic_fetch_sub(&w->refs, 1) != 1)
        return;
    ds_tokens_release(w->tokens);
    free(w);
}

int64_t ds_windows_count(const ds_windows *w)
{
    return w->count;
}

static int bad_token(const ds_windows *w, const struct span *s, int64_t start)
{
    int32_t id;

    for (;; start++) { /* there is one */
        widen[s->shard->width](&id, s->shard->data + start * s->shard->width, 1);
        if ((uint32_t)id >= w->limit)
            return ds_fail(DS_ERANGE,
                           "%s: token %u at position %lld is outside the vocabulary of %u",
                           s->shard->name, (unsigned)id, (long long)start + 1, (unsigned)w->limit);
    }
}

int ds_windows_copy(int32_t *x, int32_t *y, const ds_windows *w, const int64_t *index, int64_t n)
{
    for (int64_t i = 0; i < n; i++, x += w->length, y += w->length) {
        int low = 0, high = w->n - 1, width;
        uint32_t highest, last;
        const struct span *s;
        const char *tokens;
        int64_t start;

        if (index[i] < 0 || index[i] >= w->count)
            return ds_fail(DS_ERANGE, "sample %lld of a dataset of %lld", (long long)index[i] + 1,
                           (long long)w->count);
        while (low < high) { /* the last span that begins at or before the window */
            int middle = (low + high + 1) / 2;

            if (w->span[middle].first <= index[i])
                low = middle;
            else
                high = middle - 1;
        }
        s = &w->span[low];
        width = s->shard->width;
        start = s->start + (index[i] - s->first) * w->stride;
        tokens = s->shard->data + start * width;
        highest = widen[width](x, tokens, w->length);
        last = widen[width](y, tokens + width, w->length);
        if (highest >= w->limit || last >= w->limit)
            return bad_token(w, s, start);
    }
    return 0;
}

/* Are x and y dense i32 tensors on the CPU of n windows each? */
static int check_batch(const ds_tensor *x, const ds_tensor *y, int64_t n, int64_t length)
{
    const ds_tensor *both[] = {x, y};

    for (int i = 0; i < 2; i++) {
        const ds_tensor *t = both[i];

        if (t->dtype != DS_I32 || t->device != DS_CPU || !t->dense || t->numel != n * length ||
            (!t->data && t->numel))
            return ds_fail(DS_EINVAL,
                           "a batch of windows goes to dense i32 tensors on the cpu of %lld x %lld "
                           "elements",
                           (long long)n, (long long)length);
    }
    return 0;
}

int ds_windows_gather(ds_tensor *x, ds_tensor *y, const ds_windows *w, const int64_t *index,
                      int64_t n)
{
    int rc = check_batch(x, y, n, w->length);

    return rc < 0 ? rc : ds_windows_copy(x->data, y->data, w, index, n);
}

/* ---- the thread that gathers ahead
 *
 * Lua says which windows the next batches are made of (ds_feed_push) and takes them in that order
 * (ds_feed_take); the thread gathers in between, so that pages of a mapped file are read while the
 * main thread computes. It never enters OpenMP or Lua, and takes no signals.
 */

struct slot {
    int64_t *index;
    int64_t n;
    int32_t *x, *y;
    int code; /* what gathering returned, and its message: ds_error() is of the thread */
    char message[256];
};

struct ds_feed {
    ds_windows *windows;
    int64_t batch; /* most windows in a slot */
    unsigned depth;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    /* Batches so far; each is in slot[number % depth]. taken <= filled <= pushed <= taken + depth.
     * `lock` guards these; slots belong to whom they say: to the thread from filled to pushed. */
    uint64_t pushed, filled, taken;
    int busy; /* the thread is filling slot[filled % depth] */
    int stop;
    struct slot slot[];
};

static void *feed_thread(void *argument)
{
    ds_feed *f = argument;

    pthread_mutex_lock(&f->lock);
    for (;;) {
        struct slot *s;

        while (!f->stop && f->filled == f->pushed)
            pthread_cond_wait(&f->work, &f->lock);
        if (f->stop)
            break;
        s = &f->slot[f->filled % f->depth];
        f->busy = 1;
        pthread_mutex_unlock(&f->lock);
        s->code = ds_windows_copy(s->x, s->y, f->windows, s->index, s->n);
        if (s->code < 0)
            snprintf(s->message, sizeof s->message, "%s", ds_error());
        pthread_mutex_lock(&f->lock);
        f->busy = 0;
        f->filled++;
        pthread_cond_signal(&f->done);
    }
    pthread_mutex_unlock(&f->lock);
    return NULL;
}

static void free_feed(ds_feed *f)
{
    for (unsigned i = 0; i < f->depth; i++) {
        free(f->slot[i].index);
        free(f->slot[i].x);
        free(f->slot[i].y);
    }
    pthread_cond_destroy(&f->work);
    pthread_cond_destroy(&f->done);
    pthread_mutex_destroy(&f->lock);
    ds_windows_release(f->windows);
    free(f);
}

static int start_thread(ds_feed *f)
{
    sigset_t all, before;
    int rc;

    sigfillset(&all); /* signals are the main thread's */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(&f->thread, NULL, feed_thread, f);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc)
        return ds_fail(DS_ENOMEM, "cannot start the loader's thread: %s; prefetch = 0 needs none",
                       strerror(rc));
    return 0;
}

int ds_feed_open(ds_feed **out, ds_windows *w, int64_t batch, int depth)
{
    ds_feed *f;
    int rc = 0;

    if (batch < 1 || depth < 1 || depth > 4096)
        return ds_fail(DS_EINVAL, "prefetch %d batches of %lld: from 1 to 4096, of at least 1",
                       depth, (long long)batch);
    f = calloc(1, sizeof *f + (size_t)depth * sizeof *f->slot);
    if (!f)
        return ds_fail(DS_ENOMEM, "out of memory: prefetch of %d batches", depth);
    f->batch = batch;
    f->depth = (unsigned)depth;
    f->windows = w;
    ds_windows_retain(w);
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->work, NULL);
    pthread_cond_init(&f->done, NULL);
    for (int i = 0; i < depth; i++) {
        struct slot *s = &f->slot[i];

        s->index = calloc((size_t)batch, sizeof *s->index);
        s->x = calloc((size_t)batch, (size_t)w->length * sizeof *s->x);
        s->y = calloc((size_t)batch, (size_t)w->length * sizeof *s->y);
        if (!s->index || !s->x || !s->y)
            rc = ds_fail(DS_ENOMEM, "out of memory: prefetch of %d batches of %lld x %lld tokens",
                         depth, (long long)batch, (long long)w->length);
    }
    if (rc == 0)
        rc = start_thread(f);
    if (rc < 0)
        free_feed(f);
    else
        *out = f;
    return rc;
}

void ds_feed_close(ds_feed *f)
{
    if (!f)
        return;
    pthread_mutex_lock(&f->lock);
    f->stop = 1;
    pthread_cond_signal(&f->work);
    pthread_mutex_unlock(&f->lock);
    pthread_join(f->thread, NULL);
    free_feed(f);
}

int ds_feed_push(ds_feed *f, const int64_t *index, int64_t n)
{
    int rc = 0;

    if (n < 0 || n > f->batch)
        return ds_fail(DS_EINVAL, "prefetch: a batch of %lld where at most %lld fit", (long long)n,
                       (long long)f->batch);
    pthread_mutex_lock(&f->lock);
    if (f->pushed - f->taken == f->depth) {
        rc = ds_fail(DS_EINVAL, "prefetch: all %u places are taken", f->depth);
    } else {
        struct slot *s = &f->slot[f->pushed++ % f->depth];

        memcpy(s->index, index, (size_t)n * sizeof *index);
        s->n = n;
        pthread_cond_signal(&f->work);
    }
    pthread_mutex_unlock(&f->lock);
    return rc;
}

int ds_feed_take(ds_tensor *x, ds_tensor *y, ds_feed *f)
{
    struct slot *s;
    int rc;

    pthread_mutex_lock(&f->lock);
    if (f->taken == f->pushed) {
        pthread_mutex_unlock(&f->lock);
        return ds_fail(DS_EINVAL, "prefetch: no batch was asked for");
    }
    while (f->filled == f->taken)
        pthread_cond_wait(&f->done, &f->lock);
    s = &f->slot[f->taken % f->depth];
    pthread_mutex_unlock(&f->lock); /* the slot is this thread's until it is taken */
    rc = s->code < 0 ? ds_fail(s->code, "%s", s->message)
                     : check_batch(x, y, s->n, f->windows->length);
    if (rc == 0 && s->n) {
        size_t bytes = (size_t)(s->n * f->windows->length) * sizeof *s->x;

        memcpy(x->data, s->x, bytes);
        memcpy(y->data, s->y, bytes);
    }
    pthread_mutex_lock(&f->lock);
    f->taken++;
    pthread_mutex_unlock(&f->lock);
    return rc;
}

void ds_feed_flush(ds_feed *f)
{
    pthread_mutex_lock(&f->lock);
    f->pushed = f->filled + (uint64_t)f->busy; /* what isn't begun yet is forgotten */
    while (f->filled < f->pushed)
        pthread_cond_wait(&f->done, &f->lock);
    f->taken = f->pushed;
    pthread_mutex_unlock(&f->lock);
}
