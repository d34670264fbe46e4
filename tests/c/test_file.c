/* test_file.c - files: what is written is what is read, in every mode; failures leave the old file;
 * folders; safetensors headers, good and bad. */
#include "tests/c/disk.h"

#include "runner/file.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static int count_files(void)
{
    char *names;
    int64_t bytes = ds_folder_list(&names, folder);
    int n = 0;

    for (int64_t i = 0; i < bytes; i++)
        n += !names[i];
    ds_free(names);
    return n;
}

static char *pattern(int64_t bytes, unsigned seed)
{
    char *p = malloc((size_t)bytes + 1);

    for (int64_t i = 0; i < bytes; i++)
        p[i] = (char)((seed = seed * 1664525u + 1013904223u) >> 24);
    return p;
}

static void assert_holds(const char *path, const char *data, int64_t bytes)
{
    char *back = malloc((size_t)bytes + 1), hash[17], want[17];
    ds_file *f;

    assert_int_equal(ds_file_open(&f, path), 0);
    assert_int_equal(ds_file_bytes(f), bytes);
    assert_int_equal(ds_file_read(f, back, bytes, 0), 0);
    assert_memory_equal(back, data, (size_t)bytes);
    assert_int_equal(ds_file_hash(f, hash), 0);
    ds_hash(want, data, bytes);
    assert_string_equal(hash, want);
    ds_file_close(f);
    free(back);
}

/* ---- one file */

static void test_sizes_and_modes(void **state)
{
    static const char *const modes[] = {"plain", "direct", "uring", "nonsense"};
    static const int64_t sizes[] = {0,
                                    1,
                                    4095,
                                    4096,
                                    65536,
                                    65537,
                                    DS_IO_BLOCK - 1,
                                    DS_IO_BLOCK,
                                    DS_IO_BLOCK + 1,
                                    DS_IO_BLOCK * DS_IO_DEPTH,
                                    DS_IO_BLOCK * (DS_IO_DEPTH + 1) + 5};
    (void)state;
    for (int m = 0; m < 4; m++) {
        setenv("DS_IO", modes[m], 1);
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            int64_t bytes = sizes[i], at = 0, piece = 1;
            char *data = pattern(bytes, (unsigned)i), hash[17], want[17];
            ds_file *f;

            assert_int_equal(ds_file_create(&f, in("f"), bytes, 1), 0);
            for (; at < bytes; at += piece, piece = piece * 3 + 1) {
                if (piece > bytes - at)
                    piece = bytes - at;
                assert_int_equal(ds_file_append(f, data + at, piece, 1), 0);
            }
            assert_int_equal(ds_file_commit(f, hash), 0);
            ds_hash(want, data, bytes);
            assert_string_equal(hash, want);
            assert_holds(in("f"), data, bytes);
            free(data);
        }
    }
    assert_int_equal(count_files(), 1);
}

/* Counts writes that come straight from the caller's memory. */
static const char *own, *own_end;
static int straight;

static int count_straight(ds_queue *q, int slot, int fd, const void *data, int64_t bytes,
                          int64_t at)
{
    straight += (const char *)data >= own && (const char *)data < own_end;
    return system_io.write(q, slot, fd, data, bytes, at);
}

/* Every distance between a place in memory and its place in the file, with and without O_DIRECT. */
static void test_memory_that_stays_is_written_in_place(void **state)
{
    static const int64_t heads[] = {0, 64, 512, 1000, 4096, 3 * DS_IO_BLOCK + 512};
    static const int64_t shifts[] = {0, 64, 512, 3584};
    int64_t room = 8 * DS_IO_BLOCK, big = 2 * DS_IO_BLOCK + 100;
    char *all = pattern(room, 9), *memory = NULL;
    int fd, can_direct;

    (void)state;
    assert_int_equal(posix_memalign((void **)&memory, 4096, (size_t)room), 0);
    fd = open(in("probe"), O_CREAT | O_RDWR | O_DIRECT, 0600);
    can_direct = fd >= 0;
    close(fd);
    ds_io_now()->write = count_straight;
    own = memory;
    own_end = memory + room;
    for (size_t i = 0; i < 6 * 4 + 6; i++) {
        int64_t head = heads[i % 6], shift = shifts[i / 6 % 4], total = head + 2 * big + 7;
        ds_file *f;

        setenv("DS_IO", i < 24 ? "uring" : "direct", 1);
        straight = 0;
        memcpy(memory + shift, all + head, (size_t)(2 * big));
        assert_int_equal(ds_file_create(&f, in("f"), total, 1), 0);
        assert_int_equal(ds_file_append(f, all, head, 0), 0);
        assert_int_equal(ds_file_append(f, memory + shift, big, 1), 0);
        assert_int_equal(ds_file_append(f, memory + shift + big, big, 1), 0);
        assert_int_equal(ds_file_append(f, all + head + 2 * big, 7, 0), 0);
        assert_int_equal(ds_file_commit(f, NULL), 0);
        assert_holds(in("f"), all, total);
        if (can_direct && (head - shift) % 4096 == 0)
            assert_true(straight > 0);
    }
    free(memory);
    free(all);
}

static void test_a_file_that_is_not_finished_leaves_the_old_one(void **state)
{
    char *data = pattern(3 * DS_IO_BLOCK, 1);
    ds_file *f;

    (void)state;
    assert_int_equal(ds_file_put(in("f"), "old", 3, 1, NULL), 0);
    for (int way = 0; way < 3; way++) {
        assert_int_equal(ds_file_create(&f, in("f"), 3 * DS_IO_BLOCK, 1), 0);
        assert_int_equal(ds_file_append(f, data, 2 * DS_IO_BLOCK, 1), 0);
        if (way == 0) {
            ds_file_discard(f);
        } else if (way == 1) {
            assert_int_equal(ds_file_commit(f, NULL), DS_EINVAL);
            assert_non_null(strstr(ds_error(), "1048576 were appended"));
        } else {
            assert_int_equal(ds_file_append(f, data, 2 * DS_IO_BLOCK, 1), DS_EINVAL);
            assert_int_equal(ds_file_commit(f, NULL), DS_EINVAL);
        }
        assert_int_equal(count_files(), 1);
        assert_holds(in("f"), "old", 3);
    }
    free(data);
}

static void test_a_new_file_does_not_replace(void **state)
{
    (void)state;
    assert_int_equal(ds_file_put(in("f"), "old", 3, 0, NULL), 0);
    assert_int_equal(ds_file_put(in("f"), "new", 3, 0, NULL), DS_EIO);
    assert_non_null(strstr(ds_error(), in("f")));
    assert_holds(in("f"), "old", 3);
}

static void test_missing_and_odd_paths(void **state)
{
    ds_file *f;

    (void)state;
    assert_int_equal(ds_file_open(&f, in("none")), DS_ENOENT);
    assert_non_null(strstr(ds_error(), in("none")));
    assert_int_equal(ds_file_open(&f, folder), DS_ECORRUPT);
    assert_int_equal(ds_file_put(in("no/such/folder"), "x", 1, 1, NULL), DS_ENOENT);
    assert_int_equal(ds_file_put(in("f"), "abc", 3, 1, NULL), 0);
    assert_int_equal(ds_file_open(&f, in("f")), 0);
    assert_int_equal(ds_file_read(f, folder, 3, 1), DS_ERANGE);
    assert_int_equal(ds_file_read(f, folder, -1, 0), DS_ERANGE);
    assert_int_equal(ds_file_read(f, folder, 1, INT64_MAX), DS_ERANGE);
    ds_file_close(f);
}

/* ---- what the system may refuse, by way of the seam */

static int fail_at; /* the call that fails, counted down; 0: none */
static int fail_with;

static int counted(void)
{
    return fail_at > 0 && --fail_at == 0 ? fail_with : 0;
}

static int seam_open(const char *path, int flags, int mode)
{
    int rc = counted();

    return rc ? rc : system_io.open(path, flags, mode);
}

static int seam_allocate(int fd, int64_t bytes)
{
    int rc = counted();

    return rc ? rc : system_io.allocate(fd, bytes);
}

static int seam_write(ds_queue *q, int slot, int fd, const void *data, int64_t bytes, int64_t at)
{
    int rc = counted();

    return rc ? rc : system_io.write(q, slot, fd, data, bytes, at);
}

static int seam_truncate(int fd, int64_t bytes)
{
    int rc = counted();

    return rc ? rc : system_io.truncate(fd, bytes);
}

static int seam_sync(int fd)
{
    int rc = counted();

    return rc ? rc : system_io.sync(fd);
}

static int seam_rename(const char *from, const char *to)
{
    int rc = counted();

    return rc ? rc : system_io.rename(from, to);
}

static void test_every_call_may_fail(void **state)
{
    int64_t bytes = 20 * DS_IO_BLOCK + 77;
    char *data = pattern(bytes, 3);
    ds_io *io = ds_io_now();
    int calls = 0, rc;

    (void)state;
    assert_int_equal(ds_file_put(in("f"), "old", 3, 1, NULL), 0);
    io->open = seam_open;
    io->allocate = seam_allocate;
    io->write = seam_write;
    io->truncate = seam_truncate;
    io->sync = seam_sync;
    io->rename = seam_rename;
    fail_with = -ENOSPC;
    do {
        fail_at = ++calls;
        rc = ds_file_put(in("f"), data, bytes, 1, NULL);
        if (rc < 0) {
            assert_int_equal(rc, DS_EIO);
            assert_true(fail_at == 0);
            assert_int_equal(count_files(), 1);
        }
        /* renamed already, only the folder's sync failed: the new one, whole */
        if (rc < 0 && !strstr(ds_error(), "cannot sync")) {
            assert_non_null(strstr(ds_error(), "it needs 10485837 bytes and "));
            assert_holds(in("f"), "old", 3);
        }
    } while (rc < 0);
    assert_true(calls > 8);
    assert_holds(in("f"), data, bytes);
    free(data);
}

/* A file system that accepts O_DIRECT or not at all. */
static int open_without_direct(const char *path, int flags, int mode)
{
    return flags & O_DIRECT ? -EINVAL : system_io.open(path, flags, mode);
}

/* Accepts O_DIRECT at open and refuses the transfer: an address that is not aligned does that. */
static int write_unaligned(ds_queue *q, int slot, int fd, const void *data, int64_t bytes,
                           int64_t at)
{
    static char odd[DS_IO_DEPTH][((size_t)4 << 20) + 1];

    assert_true(bytes < (int64_t)sizeof odd[slot]);
    memcpy(odd[slot] + 1, data, (size_t)bytes);
    return system_io.write(q, slot, fd, odd[slot] + 1, bytes, at);
}

static void test_falls_back_where_direct_is_refused(void **state)
{
    int64_t bytes = 20 * DS_IO_BLOCK + 77;
    char *data = pattern(bytes, 4);

    (void)state;
    for (int ring = 0; ring < 2; ring++) {
        setenv("DS_IO", ring ? "uring" : "direct", 1);
        *ds_io_now() = system_io;
        ds_io_now()->open = open_without_direct;
        assert_int_equal(ds_file_put(in("f"), data, bytes, 1, NULL), 0);
        assert_holds(in("f"), data, bytes);
        *ds_io_now() = system_io;
        ds_io_now()->write = write_unaligned;
        assert_int_equal(ds_file_put(in("g"), data, bytes, 1, NULL), 0);
        assert_holds(in("g"), data, bytes);
    }
    free(data);
}

static void test_dead_temporaries_go(void **state)
{
    char name[DS_PATH], dead[DS_PATH];
    pid_t child = fork();

    (void)state;
    if (child == 0)
        _exit(0);
    waitpid(child, NULL, 0);
    assert_int_equal(ds_temporary_name(name, sizeof name, folder), 0);
    assert_int_equal(ds_temporary_dead(strrchr(name, '/') + 1), 0); /* ours */
    snprintf(dead, sizeof dead, "%s", name);
    *strrchr(dead, '-') = 0; /* the counter */
    snprintf(strrchr(dead, '-') + 1, 32, "%d-1", (int)child);
    assert_int_equal(ds_temporary_dead(strrchr(dead, '/') + 1), 1);
    assert_int_equal(ds_temporary_dead(".tmp-elsewhere-1-1"), 0);
    assert_int_equal(ds_temporary_dead("notes.txt"), 0);
    assert_int_equal(ds_file_put(name, "live", 4, 0, NULL), 0);
    assert_int_equal(ds_file_put(dead, "dead", 4, 0, NULL), 0);
    assert_int_equal(ds_file_put(in("f"), "x", 1, 1, NULL), 0);
    assert_int_equal(count_files(), 2);
    assert_int_equal(ds_path_kind(dead), DS_PATH_NONE);
}

/* ---- folders */

static void test_folders(void **state)
{
    char *names;

    (void)state;
    assert_int_equal(ds_folder_make(in("a/b/c")), 0);
    assert_int_equal(ds_folder_make(in("a/b/c")), 0);
    assert_int_equal(ds_file_put(in("a/b/file"), "x", 1, 1, NULL), 0);
    assert_true(ds_folder_make(in("a/b/file")) < 0);
    assert_true(ds_folder_make(in("a/b/file/d")) < 0);
    assert_int_equal(ds_file_put(in("outside"), "x", 1, 1, NULL), 0);
    assert_int_equal(symlink(in("outside"), in("a/link")), 0);
    assert_int_equal(ds_path_kind(in("a/link")), DS_PATH_OTHER);
    assert_int_equal(ds_path_kind(in("a/b/file")), DS_PATH_FILE);
    assert_int_equal(ds_folder_list(&names, in("a/b")), 7);
    assert_memory_equal(names, "c\0file\0", 7);
    ds_free(names);
    assert_int_equal(ds_remove(in("a")), 0);
    assert_int_equal(ds_path_kind(in("a")), DS_PATH_NONE);
    assert_int_equal(ds_path_kind(in("outside")), DS_PATH_FILE);
    assert_int_equal(ds_remove(in("a")), 0);
    assert_true(ds_folder_list(&names, in("a")) < 0);
    assert_non_null(strstr(ds_error(), in("a")));
}

static void test_exchange_and_lock(void **state)
{
    int first, second;

    (void)state;
    assert_int_equal(ds_folder_make(in("a/x")), 0);
    assert_int_equal(ds_folder_make(in("b/y")), 0);
    if (ds_exchange(in("a"), in("b")) == 1) {
        assert_int_equal(ds_path_kind(in("a/y")), DS_PATH_FOLDER);
        assert_int_equal(ds_path_kind(in("b/x")), DS_PATH_FOLDER);
    }
    assert_int_equal(ds_rename(in("a"), in("none/a")), DS_ENOENT);
    first = ds_folder_lock(folder, 0);
    if (first == DS_FOLDER_NO_LOCK)
        return;
    assert_true(first >= 0);
    second = ds_folder_lock(folder, 40);
    assert_int_equal(second, DS_EIO);
    assert_non_null(strstr(ds_error(), "another process has been saving"));
    ds_folder_unlock(first);
    second = ds_folder_lock(folder, 0);
    assert_true(second >= 0);
    ds_folder_unlock(second);
}

/* ---- safetensors */

#define GOLDEN "tests/golden/tensors.safetensors" /* by the format's own library; tensors.py */

static const ds_entry *entry_of(const ds_tensors *t, const char *name)
{
    for (int i = 0; i < ds_tensors_count(t); i++)
        if (!strcmp(ds_tensors_entry(t, i)->name, name))
            return ds_tensors_entry(t, i);
    fail_msg("there is no tensor %s", name);
    return NULL;
}

static void test_golden_file(void **state)
{
    float f32[6];
    double f64[2];
    int64_t i64[2];
    uint16_t bf16[3];
    const ds_entry *e;
    ds_tensors *t;
    ds_file *f;

    (void)state;
    assert_int_equal(ds_file_open(&f, GOLDEN), 0);
    assert_int_equal(ds_tensors_parse(&t, f), 0);
    assert_int_equal(ds_tensors_count(t), 11);
    assert_string_equal(ds_tensors_meta(t, "note"), "golden");
    assert_null(ds_tensors_meta(t, "no such key"));
    e = entry_of(t, "f32");
    assert_int_equal(e->dtype, DS_F32);
    assert_int_equal(e->ndim, 2);
    assert_int_equal(e->shape[1], 3);
    assert_int_equal(ds_tensors_read(f, e, f32, 0, 6), 0);
    assert_true(f32[1] == -2.25f && f32[3] == 0.1f && 1 / f32[5] < 0);
    assert_int_equal(ds_tensors_read(f, e, f32, 2, 1), 0);
    assert_true(f32[0] == 3);
    assert_int_equal(ds_tensors_read(f, e, f32, 6, 1), DS_ERANGE);
    assert_int_equal(ds_tensors_read(f, e, f32, -1, 1), DS_ERANGE);
    assert_int_equal(ds_tensors_read(f, entry_of(t, "f64"), f64, 0, 2), 0);
    assert_true(f64[0] == 0.1 && f64[1] == 1e300);
    assert_int_equal(ds_tensors_read(f, entry_of(t, "i64"), i64, 0, 2), 0);
    assert_true(i64[0] == (int64_t)1 << 53 && i64[1] == -1);
    assert_int_equal(ds_tensors_read(f, entry_of(t, "bf16"), bf16, 0, 3), 0);
    assert_int_equal(bf16[1], 0xbf00);
    assert_int_equal(entry_of(t, "scalar")->ndim, 0);
    assert_int_equal(entry_of(t, "empty")->bytes, 0);
    assert_int_equal(entry_of(t, "bool")->dtype, DS_BOOL);
    entry_of(t, "n\xc3\xa4me \"with\" quotes");
    ds_tensors_free(t);
    ds_file_close(f);
}

static int parse_bytes(const char *data, int64_t bytes)
{
    ds_tensors *t;
    ds_file *f;
    int rc;

    assert_int_equal(ds_file_put(in("t"), data, bytes, 1, NULL), 0);
    assert_int_equal(ds_file_open(&f, in("t")), 0);
    rc = ds_tensors_parse(&t, f);
    if (rc >= 0)
        ds_tensors_free(t);
    ds_file_close(f);
    return rc;
}

static void test_cut_anywhere_is_refused(void **state)
{
    int64_t bytes;
    char *data;
    ds_file *f;

    (void)state;
    assert_int_equal(ds_file_open(&f, GOLDEN), 0);
    bytes = ds_file_bytes(f);
    data = malloc((size_t)bytes + 1);
    assert_int_equal(ds_file_read(f, data, bytes, 0), 0);
    ds_file_close(f);
    assert_int_equal(parse_bytes(data, bytes), 0);
    for (int64_t n = 0; n < bytes; n++) {
        assert_int_equal(parse_bytes(data, n), DS_ECORRUPT);
        assert_non_null(strstr(ds_error(), in("t")));
    }
    data[bytes] = 0;
    assert_int_equal(parse_bytes(data, bytes + 1), DS_ECORRUPT);
    free(data);
}

static void test_bad_headers(void **state)
{
#define A(dtype, shape, from, to)                                                                  \
    "\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" from "," to "]"
    static const struct {
        const char *header;
        int data;
        const char *says; /* NULL: it is good */
    } cases[] = {
        {"{}", 0, NULL},
        {"{}  ", 0, NULL},
        {"{\"a\":{" A("F32", "[2]", "0", "8") "}}", 8, NULL},
        {"{\"a\":{" A("F32", "[]", "0", "4") "}}", 4, NULL},
        {"{\"a\":{" A("F32", "[0]", "0", "0") "},\"b\":{" A("U8", "[1]", "0", "1") "}}", 1, NULL},
        {" {}", 0, "not a JSON object"},
        {"[]", 0, "not a JSON object"},
        {"{}x", 0, "not JSON"},
        {"{\"a\":", 0, "not JSON"},
        {"{}", 1, "take 0 bytes, it has 1"},
        {"{\"a\":{" A("F32", "[2]", "0", "8") "}}", 7, "take 8 bytes, it has 7"},
        {"{\"a\":{" A("F32", "[2]", "0", "4") "}}", 4, "do not match its shape"},
        {"{\"a\":{" A("F32", "[2]", "4", "12") "}}", 12, "a gap"},
        {"{\"a\":{" A("F32", "[2]", "8", "0") "}}", 8, "make no sense"},
        {"{\"a\":{" A("F32", "[2]", "-8", "0") "}}", 8, "make no sense"},
        {"{\"a\":{" A("F32", "[-2]", "0", "8") "}}", 8, "its shape makes no sense"},
        {"{\"a\":{" A("F32", "[2.0]", "0", "8") "}}", 8, "its shape makes no sense"},
        {"{\"a\":{" A("F32", "[4611686018427387904,4]", "0", "8") "}}", 8,
         "its shape makes no sense"},
        {"{\"a\":{" A("F32", "[4611686018427387904]", "0", "0") "}}", 0, "do not match"},
        {"{\"a\":{" A("F32", "[1,1,1,1,1,1,1,1,1]", "0", "4") "}}", 4, "more than 8 dimensions"},
        {"{\"a\":{" A("F8_E4M3", "[2]", "0", "2") "}}", 2, "has dtype F8_E4M3; there are F32"},
        {"{\"a\":{" A("F32", "[2]", "0", "8") ",\"x\":1}}", 8, "must have dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "must have dtype"},
        {"{\"a\":3}", 0, "must have dtype"},
        {"{\"a\":{" A("U8", "[1]", "0", "1") "},\"a\":{" A("U8", "[1]", "1", "2") "}}", 2,
         "duplicate"},
        {"{\"a\":{" A("U8", "[2]", "0", "2") "},\"b\":{" A("U8", "[2]", "1", "3") "}}", 3,
         "overlaps"},
        {"{\"a\":{" A("U8", "[9223372036854775807]", "0", "9223372036854775807") "}}", 3, "take"},
        {"{\"a\":{" A("U8", "[99999999999999999999]", "0", "1") "}}", 1, "not JSON"},
        {"{\"__metadata__\":{\"a\":1}}", 0, "'a' is not a string"},
        {"{\"__metadata__\":[]}", 0, "not an object"},
    };
#undef A
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char data[512] = {0};
        size_t length = strlen(cases[i].header);
        int rc;

        data[0] = (char)length;
        data[1] = (char)(length >> 8);
        memcpy(data + 8, cases[i].header, length);
        rc = parse_bytes(data, (int64_t)length + 8 + cases[i].data);
        if (cases[i].says && (rc != DS_ECORRUPT || !strstr(ds_error(), cases[i].says)))
            fail_msg("%s: %d %s", cases[i].header, rc, ds_error());
        if (!cases[i].says && rc < 0)
            fail_msg("%s: %s", cases[i].header, ds_error());
    }
    assert_int_equal(parse_bytes("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10), DS_ECORRUPT);
    assert_int_equal(parse_bytes("\x01\0\0\0\0\0\0\0{}", 10), DS_ECORRUPT);
}

static void test_written_tensors_come_back(void **state)
{
    static const char *const meta[] = {"format", "pt", "note", "\xe2\x82\xac", NULL};
    ds_entry entries[] = {{.name = "wide \"x\"\n", .dtype = DS_F64, .ndim = 1, .shape = {2}},
                          {.name = "w", .dtype = DS_F32, .ndim = 2, .shape = {2, 3}},
                          {.name = "none", .dtype = DS_BF16, .ndim = 3, .shape = {4, 0, 2}},
                          {.name = "flags", .dtype = DS_BOOL, .ndim = 0}};
    double wide[2] = {0.1, -7};
    float w[6] = {1, 2, 3, 4, 5, 6}, back[6];
    char yes = 1;
    ds_tensors *t;
    ds_file *f;

    (void)state;
    assert_int_equal(ds_tensors_create(&f, in("t"), entries, 4, meta, 1), 0);
    assert_int_equal(ds_file_append(f, wide, sizeof wide, 1), 0);
    assert_int_equal(ds_file_append(f, w, sizeof w, 1), 0);
    assert_int_equal(ds_file_append(f, &yes, 1, 1), 0);
    assert_int_equal(ds_file_commit(f, NULL), 0);
    assert_int_equal(ds_file_open(&f, in("t")), 0);
    assert_int_equal(ds_tensors_parse(&t, f), 0);
    assert_int_equal(ds_tensors_count(t), 4);
    assert_int_equal(ds_tensors_entry(t, 0)->offset % 64, 0);
    assert_int_equal(entry_of(t, "w")->offset, entries[1].offset);
    assert_int_equal(ds_tensors_read(f, entry_of(t, "w"), back, 0, 6), 0);
    assert_memory_equal(back, w, sizeof w);
    entry_of(t, "wide \"x\"\n");
    assert_int_equal(entry_of(t, "none")->shape[1], 0);
    assert_string_equal(ds_tensors_meta(t, "note"), "\xe2\x82\xac");
    ds_tensors_free(t);
    ds_file_close(f);
}

static void test_tensors_that_cannot_be_written(void **state)
{
    static const char *const broken[] = {"a", "\xff", NULL};
    ds_entry twice[] = {{.name = "a", .dtype = DS_U8, .ndim = 1, .shape = {1}},
                        {.name = "a", .dtype = DS_U8, .ndim = 1, .shape = {1}}};
    ds_entry huge = {.name = "h", .dtype = DS_F32, .ndim = 2, .shape = {INT64_MAX, 2}};
    ds_entry binary = {.name = "\xff", .dtype = DS_U8, .ndim = 0};
    ds_file *f;

    (void)state;
    assert_int_equal(ds_tensors_create(&f, in("t"), twice, 2, NULL, 1), DS_EINVAL);
    assert_non_null(strstr(ds_error(), "two tensors 'a'"));
    assert_int_equal(ds_tensors_create(&f, in("t"), &huge, 1, NULL, 1), DS_EINVAL);
    assert_int_equal(ds_tensors_create(&f, in("t"), &binary, 1, NULL, 1), DS_EINVAL);
    assert_int_equal(ds_tensors_create(&f, in("t"), twice, 1, broken, 1), DS_EINVAL);
    assert_int_equal(count_files(), 0);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_sizes_and_modes),
        TEST(test_memory_that_stays_is_written_in_place),
        TEST(test_a_file_that_is_not_finished_leaves_the_old_one),
        TEST(test_a_new_file_does_not_replace),
        TEST(test_missing_and_odd_paths),
        TEST(test_every_call_may_fail),
        TEST(test_falls_back_where_direct_is_refused),
        TEST(test_dead_temporaries_go),
        TEST(test_folders),
        TEST(test_exchange_and_lock),
        TEST(test_golden_file),
        TEST(test_cut_anywhere_is_refused),
        TEST(test_bad_headers),
        TEST(test_written_tensors_come_back),
        TEST(test_tensors_that_cannot_be_written),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
