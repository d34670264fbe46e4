/* test_tensor.c - views over random shapes against index arithmetic; the allocator under load; the
 * partitioned optimizer's map.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "runner/alloc.h"

static uint64_t seed = 88172645463325252ull;

static int64_t below(int64_t n)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (int64_t)(seed % (uint64_t)n);
}

/* A dense i64 tensor whose elements are their own row-major numbers. */
static ds_tensor numbered(int ndim, const int64_t *shape)
{
    ds_tensor t;

    assert_int_equal(ds_empty(&t, DS_I64, DS_CPU, ndim, shape), 0);
    for (int64_t i = 0; i < t.numel; i++)
        ((int64_t *)t.data)[i] = i;
    return t;
}

/* The i-th element in row-major order of any view. */
static int64_t at(const ds_tensor *t, int64_t i)
{
    int64_t offset = 0;

    for (int d = t->ndim - 1; d >= 0; d--) {
        offset += i % t->shape[d] * t->stride[d];
        i /= t->shape[d];
    }
    return ((int64_t *)t->data)[offset];
}

static void views_of_random_shapes(void **state)
{
    (void)state;
    for (int round = 0; round < 2000; round++) {
        int64_t shape[4];
        int ndim = 1 + (int)below(4), d0 = (int)below(ndim), d1 = (int)below(ndim);
        ds_tensor x, t, n, flat;
        int64_t start, length;

        for (int d = 0; d < ndim; d++)
            shape[d] = 1 + below(5);
        x = numbered(ndim, shape);
        assert_int_equal(ds_transpose(&t, &x, d0, d1), 0);
        start = below(t.shape[d0]);
        length = 1 + below(t.shape[d0] - start);
        assert_int_equal(ds_narrow(&n, &t, d0, start, length), 0);
        for (int64_t i = 0; i < n.numel; i++) {
            int64_t rest = i, index[4], number = 0;

            for (int d = ndim - 1; d >= 0; d--) {
                index[d] = rest % n.shape[d];
                rest /= n.shape[d];
            }
            index[d0] += start;
            for (int d = 0; d < ndim; d++) {
                int from = d == d0 ? d1 : d == d1 ? d0 : d;

                number = number * shape[d] + index[from];
            }
            assert_int_equal(at(&n, i), number);
        }
        flat.data = NULL;
        if (ds_reshape(&flat, &n, 1, &n.numel) == 0) {
            for (int64_t i = 0; i < n.numel; i++)
                assert_int_equal(at(&flat, i), at(&n, i));
            ds_release(&flat);
        } else {
            assert_int_equal(n.dense, 0);
        }
        ds_release(&x); /* the views hold the memory */
        assert_true(at(&n, 0) >= 0);
        ds_release(&n);
        ds_release(&t);
    }
}

/* Splitting and merging dimensions of a strided view gives the same elements whenever it is allowed,
 * and is allowed whenever the groups of dimensions lie in memory like one. */
static void reshape_of_views(void **state)
{
    int64_t shape[3] = {4, 6, 5}, split[4] = {4, 2, 3, 5}, merged[2] = {24, 5}, wrong[2] = {4, 30};
    int64_t tail[5] = {4, 6, 1, 5, 1}, six[2] = {2, 3};
    ds_tensor x = numbered(3, shape), n, y;

    (void)state;
    assert_int_equal(ds_narrow(&n, &x, 2, 0, 5), 0);
    assert_int_equal(ds_reshape(&y, &n, 4, split), 0);
    ds_release(&y);
    ds_release(&n);
    assert_int_equal(ds_narrow(&n, &x, 2, 1, 3), 0);
    split[3] = merged[1] = tail[3] = 3;
    assert_int_equal(ds_reshape(&y, &n, 4, split), 0);
    for (int64_t i = 0; i < n.numel; i++)
        assert_int_equal(at(&y, i), at(&n, i));
    ds_release(&y);
    assert_int_equal(ds_reshape(&y, &n, 2, merged), 0);
    for (int64_t i = 0; i < n.numel; i++)
        assert_int_equal(at(&y, i), at(&n, i));
    ds_release(&y);
    assert_int_equal(ds_reshape(&y, &n, 5, tail), 0);
    for (int64_t i = 0; i < n.numel; i++)
        assert_int_equal(at(&y, i), at(&n, i));
    ds_release(&y);
    wrong[1] = 18;
    assert_int_equal(ds_reshape(&y, &n, 2, wrong), 1);
    assert_int_equal(ds_reshape(&y, &n, 2, six), DS_EINVAL);
    ds_release(&n);
    ds_release(&x);
}

static void refused_shapes(void **state)
{
    int64_t negative[1] = {-1}, huge[2] = {(int64_t)1 << 40, (int64_t)1 << 40}, two[1] = {2};
    ds_tensor x, y;

    (void)state;
    assert_int_equal(ds_empty(&x, DS_F32, DS_CPU, 1, negative), DS_EINVAL);
    assert_int_equal(ds_empty(&x, DS_F32, DS_CPU, 2, huge), DS_ENOMEM);
    assert_int_equal(ds_empty(&x, 99, DS_CPU, 1, two), DS_EINVAL);
    assert_int_equal(ds_empty(&x, DS_F32, DS_META, 1, two), 0);
    assert_null(x.data);
    ds_release(&x);
    assert_int_equal(ds_empty(&x, DS_F32, DS_CPU, 1, two), 0);
    assert_int_equal(ds_narrow(&y, &x, 0, 1, 2), DS_ERANGE);
    assert_int_equal(ds_transpose(&y, &x, 0, 1), DS_EINVAL);
    ds_release(&x);
    ds_release(&x);
}

/* Live tensors never overlap, sizes are honoured, and all comes back. */
static void allocator_under_load(void **state)
{
    enum { N = 300 };
    static ds_tensor t[N];
    static unsigned char mark[N];
    const ds_memory *memory = ds_memory_of(DS_CPU);
    int64_t before = memory->live;

    (void)state;
    memset(t, 0, sizeof t);
    for (int round = 0; round < 20000; round++) {
        int i = (int)below(N);

        if (t[i].storage) {
            unsigned char *p = t[i].data;

            assert_int_equal(p[0], mark[i]);
            assert_int_equal(p[t[i].numel - 1], mark[i]);
            ds_release(&t[i]);
            assert_null(t[i].data);
        } else {
            int64_t n = 1 + (below(8) ? below(3000) : below(3000000));

            assert_int_equal(ds_empty(&t[i], DS_U8, DS_CPU, 1, &n), 0);
            assert_int_equal((uintptr_t)t[i].data % 64, 0);
            mark[i] = (unsigned char)below(256);
            memset(t[i].data, mark[i], (size_t)n);
        }
    }
    for (int i = 0; i < N; i++)
        ds_release(&t[i]);
    assert_int_equal(memory->live, before);
    ds_memory_flush(DS_CPU);
    assert_true(memory->cached < 64 << 20);
}

/* What a step frees is what the next one gets: no new memory after the first. */
static void steady_state_takes_nothing(void **state)
{
    int64_t takes = 0;

    (void)state;
    for (int step = 0; step < 10; step++) {
        ds_tensor t[40];

        for (int i = 0; i < 40; i++) {
            int64_t n = 1000 * (i % 7 + 1) * (i % 3 ? 1 : 100);

            assert_int_equal(ds_empty(&t[i], DS_F32, DS_CPU, 1, &n), 0);
        }
        for (int i = 39; i >= 0; i--)
            ds_release(&t[i]);
        if (step == 0)
            takes = ds_memory_of(DS_CPU)->takes;
    }
    assert_int_equal(ds_memory_of(DS_CPU)->takes, takes);
}

/* The meta device's storages have no data; what they would take is counted like a CPU's. */
static void meta_counts(void **state)
{
    const int64_t shape[] = {1 << 12, 1 << 20};
    ds_memory *meta = ds_memory_of(DS_META), *cpu = ds_memory_of(DS_CPU);
    int64_t live = cpu->live, tags[4] = {0}, bytes;
    ds_tensor t, view, small;

    (void)state;
    cpu->tag = 3;
    assert_int_equal(ds_empty(&t, DS_F32, DS_META, 2, shape), 0);
    cpu->tag = 0;
    assert_null(t.data);
    assert_non_null(t.storage);
    bytes = meta->live;
    assert_true(bytes >= (int64_t)1 << 34 && bytes < ((int64_t)1 << 34) + 4096);
    assert_int_equal(ds_memory_by_tag(DS_META, tags, 4), 512);
    assert_int_equal(tags[3], bytes);
    assert_int_equal(ds_transpose(&view, &t, 0, 1), 0);
    assert_int_equal(ds_references(&t), 2);
    ds_release(&t);
    assert_int_equal(meta->live, bytes);
    ds_release(&view);
    assert_int_equal(meta->live, 0);
    assert_int_equal(meta->peak, bytes);
    ds_memory_reset_peak(DS_META);
    assert_int_equal(ds_empty(&small, DS_BOOL, DS_META, 0, shape), 0);
    assert_int_equal(meta->peak, 64);
    ds_release(&small);
    assert_int_equal(meta->takes, 0);
    assert_int_equal(cpu->live, live);
    assert_null(ds_memory_of(DS_PINNED + 1));
    assert_null(ds_memory_of(-1));
}

/* What a piece of memory holds goes to another one, and its tensors with it. */
static void memory_of_views_moves(void **state)
{
    const int64_t shape[] = {5, 7};
    ds_tensor t, rows, view, from, to;

    (void)state;
    assert_int_equal(ds_empty(&t, DS_F32, DS_CPU, 2, shape), 0);
    for (int i = 0; i < 35; i++)
        ((float *)t.data)[i] = (float)i;
    assert_int_equal(ds_narrow(&rows, &t, 0, 1, 3), 0);
    assert_int_equal(ds_transpose(&view, &rows, 0, 1), 0);
    ds_release(&rows);
    ds_release(&t);
    assert_int_equal(ds_reach(&t), 0);
    assert_int_equal(ds_reach(&view), 4 * 7 * 4);
    assert_int_equal(ds_whole(&from, &t, 1), DS_EINVAL);
    assert_int_equal(ds_whole(&from, &view, (int64_t)1 << 40), DS_EINVAL);
    assert_int_equal(ds_whole(&from, &view, ds_reach(&view)), 0);
    assert_int_equal(from.numel, 4 * 7 * 4);
    assert_int_equal(ds_empty(&to, DS_U8, DS_CPU, 1, &from.numel), 0);
    memcpy(to.data, from.data, (size_t)to.numel);
    ds_release(&from);
    ds_release(&view);
    assert_int_equal(ds_revive(&view, &to, 7 * 4), 0);
    ds_release(&to);
    assert_true(((float *)view.data)[2 * view.stride[0] + view.stride[1]] == 2 * 7 + 2);
    ds_release(&view);
    assert_int_equal(ds_revive(&view, &to, 0), DS_EINVAL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(views_of_random_shapes),
        cmocka_unit_test(reshape_of_views),
        cmocka_unit_test(refused_shapes),
        cmocka_unit_test(allocator_under_load),
        cmocka_unit_test(steady_state_takes_nothing),
        cmocka_unit_test(meta_counts),
        cmocka_unit_test(memory_of_views_moves),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
