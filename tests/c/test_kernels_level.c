/* Choosing the CPU level, its table, its memory; vectors as this file is compiled. */
#include "tests/c/helpers.h"
#include "tests/c/levels.h"

#include "kernels/cpu/simd.h"

static void levels(void **state)
{
    const char *const *all = ds_cpu_levels();
    const ds_backend *backend;
    int known = 0;

    (void)state;
    assert_non_null(all[0]);
    backend = ds_cpu_backend(NULL);
    assert_non_null(backend);
    assert_string_equal(backend->name, "cpu");
    for (int i = 0; all[i]; i++)
        known |= strcmp(all[i], ds_cpu_level()) == 0;
    assert_true(known);
    assert_string_equal(ds_cpu_level(), getenv("DS_CPU_LEVEL"));
    assert_ptr_equal(ds_cpu_backend("x86-64-v2"), backend); /* the first call decided */
}

/* Every slot of this level has a kernel. */
static void table_is_full(void **state)
{
    const ds_ops *ops = kernels();

    (void)state;
#define DS_UNARY(name, saved)                                                                      \
    assert_non_null(ops->name);                                                                    \
    assert_non_null(ops->name##_backward);
#define DS_BINARY(name)                                                                            \
    assert_non_null(ops->name);                                                                    \
    assert_non_null(ops->name##_scalar);
#define DS_COMPARE(name)                                                                           \
    assert_non_null(ops->name);                                                                    \
    assert_non_null(ops->name##_scalar);
#define DS_KERNEL(name, signature) assert_non_null(ops->name);
#include "kernels/ops.def"
}

static void memory(void **state)
{
    const ds_backend *backend = ds_cpu_backend(NULL);

    (void)state;
    for (size_t bytes = 0; bytes <= (size_t)20 << 20; bytes = bytes * 5 + 1) {
        char *block = NULL;

        assert_int_equal(backend->memory_take((void **)&block, bytes), 0);
        assert_true((uintptr_t)block % 64 == 0);
        if (bytes >= (size_t)2 << 20)
            assert_true((uintptr_t)block % ((size_t)2 << 20) == 0);
        memset(block, 1, bytes);
        backend->memory_give(block, bytes);
    }
    {
        void *none;

        fails(backend->memory_take(&none, (size_t)1 << 60), DS_ENOMEM, "out of memory: wanted");
    }
    assert_int_equal(backend->synchronize(), 0);
}

/* ---- simd.h, at whatever level this file was compiled for */

static void vectors(void **state)
{
    float x[VF_LANES], y[VF_LANES];
    uint16_t h[VF_LANES];

    (void)state;
    for (int64_t n = 0; n < VF_LANES; n++) {
        for (int i = 0; i < VF_LANES; i++) {
            x[i] = (float)(i + 1);
            y[i] = -1;
        }
        vf_store_part(y, vf_load_part(x, n), n);
        for (int i = 0; i < VF_LANES; i++)
            assert_true(y[i] == (i < n ? x[i] : -1));
        vf_store(y, vf_load_part(x, n));
        for (int i = 0; i < VF_LANES; i++)
            assert_true(y[i] == (i < n ? x[i] : 0));
    }
    assert_true(vf_sum(vf_load(x)) == VF_LANES * (VF_LANES + 1) / 2);
    assert_true(vf_max_lane(vf_load(x)) == VF_LANES);
    for (int round = 0; round < 2000; round++) {
        for (int i = 0; i < VF_LANES; i++)
            x[i] = (float)(random01() * 300 - 150);
        vf_store(y, vf_exp(vf_load(x)));
        for (int i = 0; i < VF_LANES; i++) {
            double want = exp((double)x[i]);

            near((double)y[i],
                 want < 0x1p-126       ? 0
                 : want > 3.4028235e38 ? INFINITY
                                       : want,
                 want * 0x1p-23, "vf_exp", i);
        }
        vh_store(h, vf_to_bf16(vf_load(x)));
        for (int i = 0; i < VF_LANES; i++)
            assert_int_equal(h[i], ds_f32_to_bf16(x[i]));
        vh_store(h, vf_to_f16(vf_load(x)));
        for (int i = 0; i < VF_LANES; i++)
            assert_int_equal(h[i], ds_f32_to_f16(x[i]));
        vf_store(y, vf_from_f16(vh_load(h)));
        for (int i = 0; i < VF_LANES; i++)
            assert_true(y[i] == ds_f16_to_f32(h[i]));
    }
    x[0] = NAN;
    x[1] = INFINITY;
    x[2] = -INFINITY;
    vf_store(y, vf_exp(vf_load(x)));
    assert_true(isnan(y[0]) && y[1] == INFINITY && y[2] == 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(levels),
        cmocka_unit_test(table_is_full),
        cmocka_unit_test(memory),
        cmocka_unit_test(vectors),
    };
    int done;

    if (argc > 1) /* the call below */
        return ds_cpu_backend(NULL) || !strstr(ds_error(), "has no level \"v9\"");
    if (!getenv("DS_CPU_LEVEL")) {
        char command[4096];

        snprintf(command, sizeof command, "DS_CPU_LEVEL=v9 '%s' refused", argv[0]);
        if (system(command) != 0) {
            fprintf(stderr, "%s: DS_CPU_LEVEL=v9 was not refused\n", argv[0]);
            return 1;
        }
    }
    done = each_level(argv);
    return done >= 0 ? done : cmocka_run_group_tests_name("level", tests, NULL, NULL);
}
