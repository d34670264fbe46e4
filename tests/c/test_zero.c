/* test_zero.c - the map from elements to owners: random layouts, by what must hold of any. */
#include "tests/c/helpers.h"

#include "runner/zero.h"

#define MAX_PARAMS 40
#define GROUPS 3

static uint32_t seed = 1;

static int64_t below(int64_t n)
{
    seed = seed * 1664525u + 1013904223u;
    return (int64_t)(seed >> 8) % n;
}

typedef struct layout {
    int n, world;
    int64_t numel[MAX_PARAMS], bucket;
    int32_t group[MAX_PARAMS], small[MAX_PARAMS], whole[GROUPS];
    int round_robin;
    ds_zero *z;
} layout;

static int64_t padded(int64_t n)
{
    return (n + 15) / 16 * 16;
}

static layout random_layout(void)
{
    layout l = {.n = (int)below(MAX_PARAMS), .world = 1 + (int)below(8), .bucket = 1 + below(5000)};

    for (int i = 0; i < l.n; i++) {
        l.numel[i] = below(4) ? below(300) : below(4000);
        l.group[i] = (int32_t)(i * GROUPS / l.n);
    }
    for (int i = 0; i < l.n; i++)
        l.small[i] = l.numel[i] < 100;
    for (int g = 0; g < GROUPS; g++)
        l.whole[g] = (int32_t)below(2);
    l.round_robin = (int)below(2);
    assert_int_equal(ds_zero_make(&l.z, l.n, l.numel, l.group, l.small, l.whole, GROUPS, l.world,
                                  l.bucket, l.round_robin),
                     0);
    return l;
}

static void parameters_follow_each_other(const layout *l)
{
    int64_t end[GROUPS] = {0};

    for (int i = 0; i < l->n; i++) {
        assert_int_equal(ds_zero_offset(l->z, i), end[l->group[i]]);
        end[l->group[i]] += padded(l->numel[i]);
    }
    for (int g = 0; g < GROUPS; g++)
        assert_int_equal(ds_zero_group_numel(l->z, g), end[g]);
}

/* Buckets cover each group from its end to its start and hold no more than asked for. */
static void buckets_cover(const layout *l)
{
    const ds_zero_bucket *b;
    int n = ds_zero_buckets(&b, l->z), last = l->n;
    int64_t start = 0;

    for (int i = 0; i < n; i++) {
        int fresh = i == 0 || b[i].group != b[i - 1].group;

        assert_int_equal(b[i].last, last - 1);
        assert_true(b[i].first <= b[i].last);
        last = b[i].first;
        assert_int_equal(b[i].start + b[i].numel,
                         fresh ? ds_zero_group_numel(l->z, b[i].group) : start);
        start = b[i].start;
        assert_int_equal(start, ds_zero_offset(l->z, b[i].first));
        assert_true(b[i].numel <= l->bucket || b[i].first == b[i].last);
        for (int k = b[i].first; k <= b[i].last; k++)
            assert_int_equal(l->small[k], l->small[b[i].first]);
    }
    assert_int_equal(last, 0);
}

/* Parts follow each other; even ones differ by a line at most, whole ones keep parameters whole. */
static void parts_are_owned(const layout *l)
{
    const ds_zero_bucket *b;
    int n = ds_zero_buckets(&b, l->z);

    for (int i = 0; i < n; i++) {
        int64_t least = INT64_MAX, most = 0;

        assert_int_equal(b[i].borders[0], 0);
        assert_int_equal(b[i].borders[l->world], b[i].numel);
        for (int r = 0; r < l->world; r++) {
            int64_t from = b[i].borders[r], to = b[i].borders[r + 1];

            assert_true(from <= to && from % 16 == 0);
            least = to - from < least ? to - from : least;
            most = to - from > most ? to - from : most;
            if (from < to) {
                assert_int_equal(ds_zero_owner(l->z, b[i].group, b[i].start + from), r);
                assert_int_equal(ds_zero_owner(l->z, b[i].group, b[i].start + to - 1), r);
            }
        }
        if (!l->whole[b[i].group])
            assert_true(most - least <= 16);
    }
    for (int i = 0; i < l->n; i++) {
        int64_t first = ds_zero_offset(l->z, i), size = padded(l->numel[i]);

        if (l->whole[l->group[i]] && size)
            assert_int_equal(ds_zero_owner(l->z, l->group[i], first),
                             ds_zero_owner(l->z, l->group[i], first + size - 1));
    }
    assert_int_equal(ds_zero_owner(l->z, 0, ds_zero_group_numel(l->z, 0)), -1);
    assert_int_equal(ds_zero_owner(l->z, 0, -1), -1);
}

/* No rank has more than an even share and one parameter; in turn, no more than one bucket more than
 * another. */
static void whole_parts_are_balanced(const layout *l)
{
    const ds_zero_bucket *b;
    int n = ds_zero_buckets(&b, l->z);

    for (int i = 0; l->round_robin && i < n; i++)
        for (int r = 0; l->whole[b[i].group] && r <= l->world; r++)
            assert_int_equal(b[i].borders[r], r <= i % l->world ? 0 : b[i].numel);
    if (l->round_robin)
        return;
    for (int g = 0; g < GROUPS; g++) {
        int64_t share[8] = {0}, largest = 0;

        for (int i = 0; i < l->n; i++)
            if (l->group[i] == g && l->numel[i]) {
                share[ds_zero_owner(l->z, g, ds_zero_offset(l->z, i))] += padded(l->numel[i]);
                largest = padded(l->numel[i]) > largest ? padded(l->numel[i]) : largest;
            }
        for (int r = 0; l->whole[g] && r < l->world; r++)
            assert_true(share[r] <= ds_zero_group_numel(l->z, g) / l->world + largest);
    }
}

static void random_layouts_hold(void **state)
{
    (void)state;
    for (int i = 0; i < 500; i++) {
        layout l = random_layout();

        parameters_follow_each_other(&l);
        buckets_cover(&l);
        parts_are_owned(&l);
        whole_parts_are_balanced(&l);
        ds_zero_free(l.z);
    }
}

static void senseless_layouts_are_refused(void **state)
{
    int64_t numel[2] = {4, 4};
    int32_t descending[2] = {1, 0}, whole[2] = {0, 0};
    ds_zero *z;

    (void)state;
    assert_int_equal(ds_zero_make(&z, 2, numel, descending, NULL, whole, 2, 1, 500, 0), DS_EINVAL);
    assert_int_equal(ds_zero_make(&z, 2, numel, whole, NULL, whole, 2, 0, 500, 0), DS_EINVAL);
    assert_int_equal(ds_zero_make(&z, 2, numel, whole, NULL, whole, 2, 1, 0, 0), DS_EINVAL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_layouts_hold),
        cmocka_unit_test(senseless_layouts_are_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
