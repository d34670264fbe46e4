/* test_data.c - token streams, windows, the order of samples, and the thread that gathers ahead. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/data.h"

static char folder[64];

static int make_folder(void **state)
{
    (void)state;
    strcpy(folder, "/tmp/ds_data_XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    char command[96];

    (void)state;
    snprintf(command, sizeof command, "rm -r %s", folder);
    return system(command);
}

/* A file in the tests' folder; the path is good for the next 31 calls. */
static const char *file(const char *name, const void *data, size_t bytes)
{
    static char paths[32][128];
    static int next;
    char *path = paths[next++ % 32];
    FILE *f;

    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, bytes, f), bytes);
    fclose(f);
    return path;
}

static const char *text(const char *name, const char *string)
{
    return file(name, string, strlen(string));
}

/* A shard of n tokens first, first + 1, … */
static const char *shard(const char *name, int width, int n, int first)
{
    int32_t head[256] = {width == 2 ? 20240520 : 20240801, width == 2 ? 1 : 7, n};
    char bytes[sizeof head + 4 * 1000];

    assert_true(n <= 1000);
    memcpy(bytes, head, sizeof head);
    for (int i = 0; i < n; i++) {
        int32_t id = first + i;

        memcpy(bytes + sizeof head + (size_t)(i * width), &id, (size_t)width);
    }
    return file(name, bytes, sizeof head + (size_t)(n * width));
}

static ds_tensor tensor_of(int32_t *data, int64_t rows, int64_t columns)
{
    return (ds_tensor){.data = data,
                       .numel = rows * columns,
                       .shape = {rows, columns},
                       .stride = {columns, 1},
                       .ndim = 2,
                       .dtype = DS_I32,
                       .dense = 1};
}

static void assert_fails(int rc, int code, const char *message)
{
    assert_int_equal(rc, code);
    if (!strstr(ds_error(), message))
        fail_msg("\"%s\" is not in \"%s\"", message, ds_error());
}

/* ---- characters */

static void vocabulary_is_sorted_by_code_point(void **state)
{
    const char *s = "dé𝄞bad é€"; /* one to four bytes */
    int32_t ids[32];
    char back[32 * 4];
    int64_t n, bytes;
    ds_vocab *v;

    (void)state;
    assert_int_equal(ds_vocab_make(&v, s, (int64_t)strlen(s)), 0);
    assert_int_equal(ds_vocab_size(v), 7); /* space a b d é € 𝄞 */
    assert_int_equal(ds_vocab_encode(ids, &n, v, s, (int64_t)strlen(s)), 0);
    assert_int_equal(n, 9);
    const int32_t expected[] = {3, 4, 6, 2, 1, 3, 0, 4, 5};
    assert_memory_equal(ids, expected, sizeof expected);
    assert_int_equal(ds_vocab_decode(back, &bytes, v, ids, n), 0);
    assert_int_equal(bytes, strlen(s));
    assert_memory_equal(back, s, strlen(s));

    assert_fails(ds_vocab_encode(ids, &n, v, "aЖ", 3), DS_EINVAL, "\"Ж\" (U+0416) at byte 2");
    assert_fails(ds_vocab_encode(ids, &n, v, "ax", 2), DS_EINVAL, "7 characters");
    assert_fails(ds_vocab_encode(ids, &n, v, "a\xff", 2), DS_ECORRUPT, "byte 2 (0xff)");
    assert_fails(ds_vocab_decode(back, &bytes, v, (int32_t[]){0, 7}, 2), DS_ERANGE,
                 "id 7 at position 2");
    assert_fails(ds_vocab_decode(back, &bytes, v, (int32_t[]){-1}, 1), DS_ERANGE, "id -1");
    ds_vocab_free(v);
}

static void bad_utf8_is_refused(void **state)
{
    /* clang-format off */
    static const char *const bad[] = {
        "\x80", "\xc3", "\xc0\xaf", "\xe0\x80\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80",
        "\xf0\x80\x80\xaf", "\xf8\x88\x80\x80\x80", "\xff", "\xe2\x82", "\xe2\x28\xa1"};
    /* clang-format on */
    ds_vocab *v = NULL;

    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_fails(ds_vocab_make(&v, bad[i], (int64_t)strlen(bad[i])), DS_ECORRUPT, "not UTF-8");
    assert_null(v);
}

static void bytes_stand_for_themselves(void **state)
{
    int32_t ids[3];
    char back[12];
    int64_t n, bytes;
    ds_vocab *v;

    (void)state;
    assert_int_equal(ds_vocab_make(&v, NULL, 0), 0);
    assert_int_equal(ds_vocab_size(v), 256);
    assert_int_equal(ds_vocab_encode(ids, &n, v, "\0\xffz", 3), 0);
    assert_int_equal(n, 3);
    assert_int_equal(ids[1], 255);
    assert_int_equal(ds_vocab_decode(back, &bytes, v, ids, 3), 0);
    assert_memory_equal(back, "\0\xffz", 3);
    ds_vocab_free(v);
}

/* ---- streams and windows */

static void text_becomes_windows(void **state)
{
    int64_t index[] = {0, 5, 2};
    int32_t a[9], b[9];
    ds_tensor x = tensor_of(a, 3, 3), y = tensor_of(b, 3, 3);
    ds_tokens *t;
    ds_windows *w;
    ds_vocab *v;

    (void)state;
    assert_int_equal(ds_tokens_text(&t, &v, text("t.txt", "hello äpp"), 0), 0);
    assert_int_equal(ds_tokens_count(t), 9); /* characters, not bytes; ids: " ehlopä" */
    assert_int_equal(ds_windows_make(&w, t, 0, 9, 3, 1, ds_vocab_size(v)), 0);
    assert_int_equal(ds_windows_count(w), 6);
    ds_tokens_release(t); /* the windows hold it */
    assert_int_equal(ds_windows_gather(&x, &y, w, index, 3), 0);
    const int32_t ex[] = {2, 1, 3, 0, 6, 5, 3, 3, 4}, ey[] = {1, 3, 3, 6, 5, 5, 3, 4, 0};
    assert_memory_equal(a, ex, sizeof ex);
    assert_memory_equal(b, ey, sizeof ey);

    index[1] = 6;
    assert_fails(ds_windows_gather(&x, &y, w, index, 3), DS_ERANGE, "sample 7 of a dataset of 6");
    index[1] = -1;
    assert_fails(ds_windows_gather(&x, &y, w, index, 3), DS_ERANGE, "sample 0");
    assert_fails(ds_windows_gather(&x, &y, w, index, 2), DS_EINVAL, "2 x 3 elements");
    ds_windows_release(w);
    ds_vocab_free(v);
}

static void large_vocabularies_take_wider_tokens(void **state)
{
    enum { LENGTH = 70000 };
    char *s = malloc(LENGTH * 4), *p = s;
    int32_t *a = malloc(LENGTH * sizeof *a), *b = malloc(LENGTH * sizeof *b);
    int64_t index = 0;
    ds_tensor x = tensor_of(a, 1, LENGTH - 1), y = tensor_of(b, 1, LENGTH - 1);

    (void)state;
    for (int i = 0; i < LENGTH; i++) { /* LENGTH different characters of four bytes, ascending */
        uint32_t c = 0x10000 + (uint32_t)i;

        *p++ = (char)(0xf0 | c >> 18);
        *p++ = (char)(0x80 | (c >> 12 & 0x3f));
        *p++ = (char)(0x80 | (c >> 6 & 0x3f));
        *p++ = (char)(0x80 | (c & 0x3f));
    }
    for (int n = 300; n <= LENGTH; n += LENGTH - 300) { /* two bytes a token, then four */
        ds_tokens *t;
        ds_windows *w;
        ds_vocab *v;

        assert_int_equal(ds_tokens_text(&t, &v, file("big.txt", s, (size_t)n * 4), 0), 0);
        assert_int_equal(t->shard[0].width, n == 300 ? 2 : 4);
        assert_int_equal(ds_vocab_size(v), n);
        assert_int_equal(ds_windows_make(&w, t, 0, n, n - 1, 1, n), 0);
        x = tensor_of(a, 1, n - 1), y = tensor_of(b, 1, n - 1);
        assert_int_equal(ds_windows_gather(&x, &y, w, &index, 1), 0);
        for (int i = 0; i < n - 1; i++) {
            assert_int_equal(a[i], i);
            assert_int_equal(b[i], i + 1);
        }
        ds_windows_release(w);
        ds_tokens_release(t);
        ds_vocab_free(v);
    }
    free(s);
    free(a);
    free(b);
}

static void strides_and_parts(void **state)
{
    int64_t index[] = {0, 1};
    int32_t a[8], b[8];
    ds_tensor x = tensor_of(a, 2, 4), y = tensor_of(b, 2, 4);
    ds_tokens *t;
    ds_windows *w;
    ds_vocab *v;

    (void)state;
    assert_int_equal(ds_tokens_text(&t, &v, text("p.txt", "abcdefghijklmnopqrstuvwxyz"), 0), 0);
    assert_int_equal(ds_windows_make(&w, t, 10, 9, 4, 4, 0), 0); /* k … s: two windows exactly */
    assert_int_equal(ds_windows_count(w), 2);
    assert_int_equal(ds_windows_gather(&x, &y, w, index, 2), 0);
    assert_int_equal(a[0], 10);
    assert_int_equal(a[4], 14);
    assert_int_equal(b[7], 18);
    ds_windows_release(w);
    assert_int_equal(ds_windows_make(&w, t, 10, 8, 4, 4, 0), 0); /* one token fewer */
    assert_int_equal(ds_windows_count(w), 1);
    ds_windows_release(w);
    assert_fails(ds_windows_make(&w, t, 10, 4, 4, 4, 0), DS_EINVAL, "longest run has 4");
    assert_fails(ds_windows_make(&w, t, 20, 7, 4, 4, 0), DS_ERANGE, "21 to 27 of a stream of 26");
    assert_fails(ds_windows_make(&w, t, 0, 26, 0, 1, 0), DS_EINVAL, "at least 1");
    assert_fails(ds_windows_make(&w, t, 0, 26, 26, 1, 0), DS_EINVAL, "takes 27 tokens");
    ds_tokens_release(t);
    ds_vocab_free(v);
}

static void shards_are_one_stream_of_windows(void **state)
{
    static const int64_t starts[] = {0, 1, 2, 100, 200, 201}; /* 5 + 2 short + 3 + 4 tokens */
    const char *paths[] = {shard("s1.bin", 2, 5, 0), shard("s2.bin", 2, 2, 50),
                           shard("s3.bin", 4, 3, 100), shard("s4.bin", 2, 4, 200)};
    int64_t index[] = {0, 1, 2, 3, 4, 5};
    int32_t a[12], b[12];
    ds_tensor x = tensor_of(a, 6, 2), y = tensor_of(b, 6, 2);
    ds_tokens *t;
    ds_windows *w;

    (void)state;
    assert_int_equal(ds_tokens_open(&t, paths, 4, 0), 0);
    assert_int_equal(ds_tokens_count(t), 14);
    assert_int_equal(ds_windows_make(&w, t, 0, 14, 2, 1, 0), 0);
    assert_int_equal(ds_windows_count(w), 6);
    assert_int_equal(ds_windows_gather(&x, &y, w, index, 6), 0);
    for (int i = 0; i < 6; i++) {
        assert_int_equal(a[2 * i], starts[i]);
        assert_int_equal(b[2 * i + 1], starts[i] + 2);
    }
    ds_windows_release(w);

    assert_int_equal(ds_windows_make(&w, t, 1, 9, 2, 1, 0), 0); /* within s1 to all of s3 */
    assert_int_equal(ds_windows_count(w), 3);
    y = tensor_of(b, 3, 2), x = tensor_of(a, 3, 2);
    assert_int_equal(ds_windows_gather(&x, &y, w, index, 3), 0);
    assert_int_equal(a[0], 1);
    assert_int_equal(a[4], 100);
    ds_windows_release(w);

    assert_int_equal(ds_windows_make(&w, t, 0, 14, 2, 1, 202), 0);
    index[0] = 4; /* 200, 201 and the shifted 202 */
    x = tensor_of(a, 1, 2), y = tensor_of(b, 1, 2);
    assert_fails(ds_windows_gather(&x, &y, w, index, 1), DS_ERANGE,
                 "s4.bin: token 202 at position 3 is outside the vocabulary of 202");
    ds_windows_release(w);
    ds_tokens_release(t);
}

static void patterns_are_sorted_by_bytes(void **state)
{
    char pattern[128], literal[128];
    const char *path = pattern;
    ds_tokens *t;

    (void)state;
    shard("g_10.bin", 2, 3, 0);
    shard("g_9.bin", 2, 3, 0);
    shard("g_[1].bin", 2, 3, 0);
    snprintf(pattern, sizeof pattern, "%s/g_?*.bin", folder);
    assert_int_equal(ds_tokens_open(&t, &path, 1, 0), 0);
    assert_int_equal(t->n, 3);
    assert_non_null(strstr(t->shard[0].name, "g_10"));
    assert_non_null(strstr(t->shard[1].name, "g_9"));
    ds_tokens_release(t);

    snprintf(literal, sizeof literal, "%s/g_[1].bin", folder); /* a file of that name */
    path = literal;
    assert_int_equal(ds_tokens_open(&t, &path, 1, 0), 0);
    assert_int_equal(t->n, 1);
    ds_tokens_release(t);

    snprintf(pattern, sizeof pattern, "%s/none*.bin", folder);
    path = pattern;
    assert_fails(ds_tokens_open(&t, &path, 1, 0), DS_ENOENT, "no file matches");
}

static void raw_files_need_a_dtype(void **state)
{
    const uint16_t ids[] = {7, 8, 65535, 9};
    const int32_t wide[] = {7, -1, 9};
    const char *path = file("raw.bin", ids, sizeof ids);
    int64_t index = 0;
    int32_t a[3], b[3];
    ds_tensor x = tensor_of(a, 1, 3), y = tensor_of(b, 1, 3);
    ds_tokens *t;
    ds_windows *w;

    (void)state;
    assert_fails(ds_tokens_open(&t, &path, 1, 0), DS_ECORRUPT, "dtype = \"uint16\"");
    assert_int_equal(ds_tokens_open(&t, &path, 1, 2), 0);
    assert_int_equal(ds_windows_make(&w, t, 0, 4, 3, 1, 0), 0);
    assert_int_equal(ds_windows_gather(&x, &y, w, &index, 1), 0);
    assert_int_equal(a[2], 65535);
    assert_int_equal(b[2], 9);
    ds_windows_release(w);
    ds_tokens_release(t);

    path = file("wide.bin", wide, sizeof wide);
    assert_int_equal(ds_tokens_open(&t, &path, 1, 4), 0);
    assert_int_equal(ds_windows_make(&w, t, 0, 3, 2, 1, 0), 0);
    x = tensor_of(a, 1, 2), y = tensor_of(b, 1, 2);
    assert_fails(ds_windows_gather(&x, &y, w, &index, 1), DS_ERANGE,
                 "token 4294967295 at position 2");
    ds_windows_release(w);
    ds_tokens_release(t);
}

static void bad_files_are_named(void **state)
{
    const char *good = shard("good.bin", 2, 9, 0), *path;
    int32_t head[256] = {20240520, 2, 3};
    char bytes[1100] = {0};
    ds_tokens *t;
    ds_vocab *v;

    (void)state;
    path = file("odd.bin", "abc", 3);
    assert_fails(ds_tokens_open(&t, &path, 1, 2), DS_ECORRUPT, "odd.bin: 3 bytes");
    path = file("short.bin", head, 100);
    assert_fails(ds_tokens_open(&t, &path, 1, 2), DS_ECORRUPT, "short.bin: cut off");
    path = file("version.bin", head, sizeof head);
    assert_fails(ds_tokens_open(&t, &path, 1, 0), DS_ECORRUPT,
                 "version.bin: token file of version 2");
    head[1] = 1;
    memcpy(bytes, head, sizeof head);
    path = file("more.bin", bytes, sizeof head + 8);
    assert_fails(ds_tokens_open(&t, &path, 1, 0), DS_ECORRUPT,
                 "more.bin: its header counts 3 tokens");
    path = file("less.bin", bytes, sizeof head + 5);
    assert_fails(ds_tokens_open(&t, &path, 1, 0), DS_ECORRUPT, "the file has 1029");
    head[2] = -3;
    path = file("negative.bin", head, sizeof head);
    assert_fails(ds_tokens_open(&t, &path, 1, 0), DS_ECORRUPT, "negative.bin");
    head[2] = 0;
    path = file("none.bin", head, sizeof head);
    assert_fails(ds_tokens_open(&t, &path, 1, 0), DS_ECORRUPT, "none.bin: no tokens");
    path = file("empty.bin", "", 0);
    assert_fails(ds_tokens_open(&t, &path, 1, 2), DS_ECORRUPT, "empty.bin is empty");
    assert_fails(ds_tokens_text(&t, &v, path, 0), DS_ECORRUPT, "empty.bin is empty");
    assert_fails(ds_tokens_open(&t, &good, 1, 4), DS_EINVAL,
                 "header says 2 bytes a token, dtype says 4");
    path = folder;
    assert_fails(ds_tokens_open(&t, &path, 1, 2), DS_EIO, "is a directory");
    assert_fails(ds_tokens_text(&t, &v, path, 0), DS_EIO, "is a directory");
    path = "/dev/null";
    assert_fails(ds_tokens_open(&t, &path, 1, 2), DS_ECORRUPT, "no regular file");
    const char *two[] = {good, "/nowhere/x.bin"};
    assert_fails(ds_tokens_open(&t, two, 2, 0), DS_ENOENT, "cannot open /nowhere/x.bin");
    assert_fails(ds_tokens_open(&t, two, 0, 0), DS_EINVAL, "no token file");
    assert_fails(ds_tokens_text(&t, &v, text("latin.txt", "caf\xe9!"), 0), DS_ECORRUPT,
                 "latin.txt: byte 4 (0xe9) is not UTF-8");
    assert_int_equal(ds_tokens_text(&t, &v, text("latin.txt", "caf\xe9!"), 1), 0);
    assert_int_equal(ds_tokens_count(t), 5);
    ds_tokens_release(t);
    ds_vocab_free(v);
}

/* ---- order */

static void order_is_a_permutation(void **state)
{
    int64_t out[5000], seen[5000];

    (void)state;
    for (int64_t size = 1; size <= 5000; size = size < 130 ? size + 1 : size * 3 - 1) {
        memset(seen, 0, sizeof seen);
        assert_int_equal(ds_order(out, 0, size, size, 1, 1234, 5), 0);
        for (int64_t i = 0; i < size; i++) {
            assert_in_range(out[i], 0, size - 1);
            assert_int_equal(seen[out[i]]++, 0);
        }
    }
    assert_fails(ds_order(out, 0, 1, 0, 1, 0, 0), DS_EINVAL, "no order of 0 samples");
}

static void order_is_the_same_by_pieces_and_wraps(void **state)
{
    int64_t whole[200], piece[7];

    (void)state;
    assert_int_equal(ds_order(whole, 0, 200, 100, 1, -3, 9), 0);
    assert_memory_equal(whole, whole + 100, 100 * sizeof *whole);
    for (int64_t first = 0; first < 190; first += 7) {
        assert_int_equal(ds_order(piece, first, 7, 100, 1, -3, 9), 0);
        assert_memory_equal(piece, whole + first, sizeof piece);
    }
    assert_int_equal(ds_order(piece, 98, 4, 100, 0, -3, 9), 0);
    assert_int_equal(piece[1], 99);
    assert_int_equal(piece[2], 0);
}

/* Sum of (seen - expected)² / expected; for `cells` - 1 degrees of freedom f it has mean f and
 * variance 2 f, so six standard deviations leave one false alarm in hundreds of millions. */
static void assert_uniform(const int *seen, int cells, double expected)
{
    double sum = 0, freedom = cells - 1;

    for (int i = 0; i < cells; i++)
        sum += (seen[i] - expected) * (seen[i] - expected) / expected;
    assert_true((sum - freedom) * (sum - freedom) < 36 * 2 * freedom);
}

static void orders_are_uniform(void **state)
{
    static int whole[256], places[97][97], pairs[97];
    int64_t out[97];

    (void)state;
    for (int64_t seed = 0; seed < 24000; seed++) { /* all 24 orders of 4, in seeds and in epochs */
        ds_order(out, 0, 4, 4, 1, seed / 100, seed % 100);
        whole[out[0] << 6 | out[1] << 4 | out[2] << 2 | out[3]]++;
    }
    int cells[24], n = 0;
    for (int i = 0; i < 256; i++)
        if (whole[i])
            cells[n++] = whole[i];
    assert_int_equal(n, 24);
    assert_uniform(cells, 24, 1000);

    for (int64_t seed = 0; seed < 9700; seed++) { /* every sample at every place; differences */
        ds_order(out, 0, 97, 97, 1, seed, 0);
        for (int i = 0; i < 97; i++) {
            places[i][out[i]]++;
            if (i % 2)
                pairs[(out[i] - out[i - 1] + 97) % 97]++;
        }
    }
    for (int i = 0; i < 97; i++)
        assert_uniform(places[i], 97, 100);
    assert_int_equal(pairs[0], 0);
    assert_uniform(pairs + 1, 96, 9700.0 * 48 / 96);
}

static void epochs_of_a_large_set_differ(void **state)
{
    enum { N = 4000 };
    static int64_t a[N], b[N];
    const int64_t size = (int64_t)1 << 40;
    int cells[16] = {0}, same = 0;

    (void)state;
    ds_order(a, 0, N, size, 1, 42, 0);
    ds_order(b, 0, N, size, 1, 42, 1);
    for (int i = 0; i < N; i++) {
        assert_in_range(a[i], 0, size - 1);
        cells[a[i] >> 36]++;
        same += a[i] == b[i];
    }
    assert_int_equal(same, 0);
    assert_uniform(cells, 16, N / 16.0);
}

/* ---- the thread */

static ds_windows *alphabet(void)
{
    ds_tokens *t;
    ds_windows *w;
    const char *path = shard("feed.bin", 2, 1000, 0);

    assert_int_equal(ds_tokens_open(&t, &path, 1, 0), 0);
    assert_int_equal(ds_windows_make(&w, t, 0, 1000, 8, 1, 998), 0); /* the last two are outside */
    ds_tokens_release(t);
    return w;
}

static void feed_gives_batches_in_order(void **state)
{
    ds_windows *w = alphabet();
    int32_t a[24], b[24];
    int64_t pushed = 0;
    ds_feed *f;

    (void)state;
    assert_int_equal(ds_feed_open(&f, w, 3, 4), 0);
    ds_windows_release(w); /* the feed holds it */
    for (int64_t taken = 0; taken < 300; taken++) {
        int64_t n = 1 + taken % 3;
        ds_tensor x = tensor_of(a, n, 8), y = tensor_of(b, n, 8);

        for (; pushed < taken + 4; pushed++) {
            int64_t first = pushed * 3, index[] = {first, first + 1, first + 2};

            assert_int_equal(ds_feed_push(f, index, 1 + pushed % 3), 0);
        }
        assert_int_equal(ds_feed_take(&x, &y, f), 0);
        for (int64_t i = 0; i < n; i++) {
            assert_int_equal(a[i * 8], taken * 3 + i);
            assert_int_equal(b[i * 8 + 7], taken * 3 + i + 8);
        }
        if (taken % 50 == 49) { /* forgotten, and asked for again */
            ds_feed_flush(f);
            pushed = taken + 1;
        }
    }
    ds_feed_close(f);
}

static void feed_tells_what_went_wrong(void **state)
{
    ds_windows *w = alphabet();
    int32_t a[8], b[8];
    ds_tensor x = tensor_of(a, 1, 8), y = tensor_of(b, 1, 8);
    ds_feed *f;

    (void)state;
    assert_int_equal(ds_feed_open(&f, w, 1, 2), 0);
    assert_fails(ds_feed_take(&x, &y, f), DS_EINVAL, "no batch was asked for");
    assert_int_equal(ds_feed_push(f, (int64_t[]){990}, 1), 0);
    assert_int_equal(ds_feed_push(f, (int64_t[]){3}, 1), 0);
    assert_fails(ds_feed_push(f, (int64_t[]){3}, 1), DS_EINVAL, "all 2 places");
    assert_fails(ds_feed_push(f, (int64_t[]){3, 4}, 2), DS_EINVAL, "at most 1");
    assert_fails(ds_feed_take(&x, &y, f), DS_ERANGE, "feed.bin: token 998 at position 999");
    assert_int_equal(ds_feed_take(&x, &y, f), 0);
    assert_int_equal(a[0], 3);
    ds_feed_close(f);
    assert_fails(ds_feed_open(&f, w, 1, 0), DS_EINVAL, "prefetch 0 batches");
    ds_windows_release(w);
}

static void feed_ends_at_any_time_and_takes_no_signals(void **state)
{
    ds_windows *w = alphabet();
    sigset_t usr1;
    ds_feed *f;

    (void)state;
    for (int i = 0; i < 100; i++) {
        assert_int_equal(ds_feed_open(&f, w, 64, 8), 0);
        for (int64_t k = 0; k < i % 9; k++)
            assert_int_equal(ds_feed_push(f, (int64_t[64]){k}, 64), 0);
        if (i % 3 == 0)
            ds_feed_flush(f);
        ds_feed_close(f);
    }
    ds_feed_close(NULL);
    /* blocked here, open in the thread if it were inherited: the process would die of it */
    assert_int_equal(ds_feed_open(&f, w, 1, 1), 0);
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &usr1, NULL);
    kill(getpid(), SIGUSR1);
    assert_int_equal(ds_feed_push(f, (int64_t[]){0}, 1), 0);
    ds_feed_close(f);
    siginfo_t info;
    assert_int_equal(sigwaitinfo(&usr1, &info), SIGUSR1);
    pthread_sigmask(SIG_UNBLOCK, &usr1, NULL);
    ds_windows_release(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(vocabulary_is_sorted_by_code_point),
        cmocka_unit_test(bad_utf8_is_refused),
        cmocka_unit_test(bytes_stand_for_themselves),
        cmocka_unit_test(text_becomes_windows),
        cmocka_unit_test(large_vocabularies_take_wider_tokens),
        cmocka_unit_test(strides_and_parts),
        cmocka_unit_test(shards_are_one_stream_of_windows),
        cmocka_unit_test(patterns_are_sorted_by_bytes),
        cmocka_unit_test(raw_files_need_a_dtype),
        cmocka_unit_test(bad_files_are_named),
        cmocka_unit_test(order_is_a_permutation),
        cmocka_unit_test(order_is_the_same_by_pieces_and_wraps),
        cmocka_unit_test(orders_are_uniform),
        cmocka_unit_test(epochs_of_a_large_set_differ),
        cmocka_unit_test(feed_gives_batches_in_order),
        cmocka_unit_test(feed_tells_what_went_wrong),
        cmocka_unit_test(feed_ends_at_any_time_and_takes_no_signals),
    };

    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
