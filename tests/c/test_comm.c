/* test_comm.c - groups, arguments, handles, and the transport of one rank. A made-up transport of
 * four ranks shows what comm.c asks of one and what it tells the watchdog.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/comm.h"
#include "runner/rank.h"

static void assert_fails(int rc, int code, const char *message)
{
    assert_int_equal(rc, code);
    if (!strstr(ds_error(), message))
        fail_msg("\"%s\" is not in \"%s\"", message, ds_error());
}

static ds_tensor tensor_of(void *data, int dtype, int64_t rows, int64_t columns)
{
    return (ds_tensor){.data = data,
                       .numel = rows * columns,
                       .shape = {rows, columns},
                       .stride = {columns, 1},
                       .ndim = 2,
                       .dtype = dtype,
                       .dense = 1};
}

/* ---- one rank */

static int no_launcher(void **state)
{
    (void)state;
    unsetenv("OMPI_COMM_WORLD_SIZE");
    unsetenv("PMI_SIZE");
    unsetenv("SLURM_STEP_NUM_TASKS");
    return 0;
}

static int ranks_launched(void)
{
    ds_rank rank;

    ds_rank_find(&rank);
    return rank.size;
}

static void launchers_tell_how_many_there_are(void **state)
{
    (void)state;
    setenv("SLURM_NTASKS", "4", 1); /* an allocation's shell: nothing was launched */
    assert_int_equal(ranks_launched(), 1);
    unsetenv("SLURM_NTASKS");
    setenv("OMPI_COMM_WORLD_SIZE", "1", 1);
    assert_int_equal(ranks_launched(), 1);
    assert_int_equal(ds_comm_join(), 0); /* alone: nothing to do */
    setenv("OMPI_COMM_WORLD_SIZE", "2", 1);
    assert_int_equal(ranks_launched(), 2);
    unsetenv("OMPI_COMM_WORLD_SIZE");
}

static void the_world_is_one_rank(void **state)
{
    ds_comm *c, *again, *part;

    (void)state;
    assert_int_equal(ds_comm_world(&c), 0);
    assert_int_equal(ds_comm_world(&again), 0);
    assert_ptr_equal(c, again);
    assert_int_equal(ds_comm_rank(c), 0);
    assert_int_equal(ds_comm_size(c), 1);
    assert_int_equal(ds_comm_local_rank(c), 0);
    assert_int_equal(ds_comm_local_size(c), 1);
    ds_comm_close(c); /* is the process's: stays */
    assert_int_equal(ds_comm_size(c), 1);

    assert_int_equal(ds_comm_split(&part, c, 3, 7), 0);
    assert_int_equal(ds_comm_rank(part), 0);
    assert_int_equal(ds_comm_size(part), 1);
    assert_int_equal(ds_barrier(part, NULL), 0);
    ds_comm_close(part);
    assert_int_equal(ds_comm_split(&part, c, -1, 0), 0);
    assert_null(part);
    ds_comm_finish();
    assert_int_equal(ds_comm_world(&c), 0); /* opens again */
    ds_comm_finish();
    ds_comm_finish();
}

static void collectives_of_one_rank_are_identities(void **state)
{
    float a[6] = {1, -2, 3, 4, 5, 6}, b[6] = {0}, same[6];
    ds_tensor x = tensor_of(a, DS_F32, 2, 3), y = tensor_of(b, DS_F32, 3, 2);
    ds_work work;
    ds_comm *c;

    (void)state;
    memcpy(same, a, sizeof a);
    assert_int_equal(ds_comm_world(&c), 0);
    for (int op = 0; op < DS_REDUCTIONS; op++) {
        assert_int_equal(ds_all_reduce(&x, &x, op, c, NULL), 0);
        assert_memory_equal(a, same, sizeof a);
        memset(b, 0, sizeof b);
        assert_int_equal(ds_all_reduce(&y, &x, op, c, NULL), 0);
        assert_memory_equal(b, same, sizeof b);
        memset(b, 0, sizeof b);
        assert_int_equal(ds_reduce_scatter(&y, &x, op, c, NULL), 0);
        assert_memory_equal(b, same, sizeof b);
    }
    memset(b, 0, sizeof b);
    assert_int_equal(ds_all_gather(&y, &x, c, NULL), 0);
    assert_memory_equal(b, same, sizeof b);
    memset(b, 0, sizeof b);
    assert_int_equal(ds_all_to_all(&y, &x, c, &work), 0);
    assert_int_equal(ds_test(&work), 1);
    assert_int_equal(ds_wait(&work), 0);
    assert_int_equal(ds_wait(&work), 0);
    assert_memory_equal(b, same, sizeof b);
    assert_int_equal(ds_broadcast(&x, 0, c, NULL), 0);
    assert_memory_equal(a, same, sizeof a);
    assert_int_equal(c->calls, 3 * DS_REDUCTIONS + 3);
    assert_int_equal(c->running, DS_COLLECTIVES);
    ds_comm_finish();
}

static void parts_of_one_rank_are_the_whole(void **state)
{
    float a[6] = {1, -2, 3, 4, 5, 6};
    const float half[6] = {0.5f, -1, 1.5f, 2, 2.5f, 3};
    int64_t borders[2] = {0, 6};
    ds_tensor x = tensor_of(a, DS_F32, 2, 3);
    int64_t calls, bytes, before, all;
    ds_comm *c;

    (void)state;
    assert_int_equal(ds_comm_world(&c), 0);
    ds_comm_stats(&before, &bytes, NULL);
    assert_int_equal(ds_reduce_parts(&x, borders, DS_SUM, 0.5, DS_BF16, c, NULL), 0);
    assert_memory_equal(a, half, sizeof a);
    assert_int_equal(ds_gather_parts(&x, borders, c, NULL), 0);
    assert_int_equal(ds_all_reduce_scaled(&x, &x, DS_MEAN, 2, -1, c, NULL), 0);
    assert_true(a[0] == 1 && a[5] == 6);
    ds_comm_stats(&calls, &bytes, c);
    ds_comm_stats(&all, &bytes, NULL);
    assert_int_equal(calls, 3);
    assert_int_equal(all - before, 3);
    assert_int_equal(bytes, 0);
    ds_comm_finish();
}

static void bad_arguments_are_named(void **state)
{
    float a[12] = {0}, b[12];
    int32_t n[6] = {0};
    uint8_t flags[6] = {0};
    ds_tensor x = tensor_of(a, DS_F32, 2, 3), y = tensor_of(b, DS_F32, 2, 2);
    ds_tensor i = tensor_of(n, DS_I32, 2, 3), m = tensor_of(flags, DS_BOOL, 2, 3);
    ds_tensor gone = tensor_of(NULL, DS_F32, 2, 3), strided = x, meta = x, near = x;
    ds_comm *c;

    (void)state;
    strided.dense = 0;
    meta.device = DS_META;
    near.data = a + 1;
    assert_int_equal(ds_comm_world(&c), 0);
    assert_fails(ds_all_reduce(&x, &x, 9, c, NULL), DS_EINVAL,
                 "all_reduce: there is no reduction 9");
    assert_fails(ds_all_reduce(&i, &i, DS_MEAN, c, NULL), DS_EINVAL, "a mean of i32 is no i32");
    assert_fails(ds_all_reduce(&m, &m, DS_SUM, c, NULL), DS_EINVAL, "a sum of bool");
    assert_int_equal(ds_all_reduce(&m, &m, DS_MAX, c, NULL), 0);
    assert_fails(ds_all_reduce(&i, &x, DS_SUM, c, NULL), DS_EINVAL, "f32 in and i32 out");
    assert_fails(ds_all_reduce(&y, &x, DS_SUM, c, NULL), DS_EINVAL, "6 elements in and 4 out");
    assert_fails(ds_all_reduce(&near, &x, DS_SUM, c, NULL), DS_EINVAL, "overlap");
    assert_fails(ds_all_gather(&x, &x, c, NULL), DS_EINVAL, "all_gather: in and out overlap");
    assert_fails(ds_all_reduce(&gone, &gone, DS_SUM, c, NULL), DS_EINVAL, "was released");
    assert_fails(ds_all_reduce(&strided, &strided, DS_SUM, c, NULL), DS_EINVAL, "t:contiguous()");
    assert_fails(ds_all_reduce(&meta, &meta, DS_SUM, c, NULL), DS_EINVAL, "meta device");
    assert_fails(ds_all_reduce(NULL, &x, DS_SUM, c, NULL), DS_EINVAL, "no output tensor");
    assert_fails(ds_broadcast(&x, 1, c, NULL), DS_ERANGE, "broadcast: rank 1 of a group of 1");
    assert_fails(ds_broadcast(&x, -1, c, NULL), DS_ERANGE, "rank -1");
    assert_fails(ds_send(&x, 0, c, NULL), DS_EINVAL, "send: rank 0 is this one");
    assert_fails(ds_recv(&x, 0, c, NULL), DS_EINVAL, "recv: rank 0 is this one");
    assert_fails(ds_reduce_parts(&x, (int64_t[]){0, 7}, DS_SUM, 1, -1, c, NULL), DS_ERANGE,
                 "reduce_parts: border 1 is 7 in a buffer of 6");
    assert_fails(ds_gather_parts(&x, (int64_t[]){3, 2}, c, NULL), DS_ERANGE, "border 1 is 2");
    assert_fails(ds_gather_parts(&x, (int64_t[]){-1, 2}, c, NULL), DS_ERANGE, "border 0 is -1");
    assert_fails(ds_all_reduce_scaled(&i, &i, DS_SUM, 0.5, -1, c, NULL), DS_EINVAL,
                 "i32 cannot be scaled by 0.5");
    assert_fails(ds_all_reduce_scaled(&x, &x, DS_SUM, 1, DS_I32, c, NULL), DS_EINVAL,
                 "f32 cannot travel as i32");
    ds_work work;
    assert_int_equal(ds_broadcast(&x, 5, c, &work), DS_ERANGE);
    assert_int_equal(ds_wait(&work), DS_ERANGE); /* a handle of what never began */
    ds_comm_finish();
}

static void after_abort_nothing_starts(void **state)
{
    ds_comm *c, *part;

    (void)state;
    assert_int_equal(ds_comm_world(&c), 0);
    ds_comm_abort(c, "a test");
    assert_fails(ds_barrier(c, NULL), DS_ECOMM, "barrier: the job was ended: a test");
    assert_fails(ds_comm_split(&part, c, 0, 0), DS_ECOMM, "the job was ended");
    ds_comm_finish();
}

/* ---- a transport of four ranks that takes three tries to finish anything */

static struct {
    ds_call call;
    int tries, blocked, running;
    char why[32];
} fake;

static int fake_start(ds_comm *c, const ds_call *call, ds_work *work)
{
    fake.call = *call;
    fake.tries = 0;
    fake.running = c->running;
    work->state = &fake;
    return 0;
}

static int fake_progress(ds_work *work, int block)
{
    fake.blocked += block;
    fake.running = work->comm->running;
    work->done = block || ++fake.tries == 3;
    return work->code = work->done && fake.call.peer == 3 ? ds_fail(DS_ECOMM, "rank 3 is lost") : 0;
}

static void fake_abort(ds_comm *c, const char *why)
{
    (void)c;
    strcpy(fake.why, why);
}

static const ds_transport four = {
    .name = "four",
    .start = {[DS_ALL_REDUCE] = fake_start,
              [DS_REDUCE_SCATTER] = fake_start,
              [DS_ALL_GATHER] = fake_start,
              [DS_BROADCAST] = fake_start,
              [DS_SEND] = fake_start},
    .progress = fake_progress,
    .abort = fake_abort,
};

static void shares_are_checked_against_the_ranks(void **state)
{
    float a[12] = {0}, b[12];
    ds_comm c = {.transport = {&four, &four}, .rank = 1, .size = 4, .running = DS_COLLECTIVES};
    ds_tensor whole = tensor_of(a, DS_F32, 4, 3), share = tensor_of(b, DS_F32, 1, 3);
    ds_tensor odd = tensor_of(a, DS_F32, 1, 10), two = tensor_of(b, DS_F32, 1, 2);

    (void)state;
    assert_int_equal(ds_all_gather(&whole, &share, &c, NULL), 0);
    assert_int_equal(ds_reduce_scatter(&share, &whole, DS_MEAN, &c, NULL), 0);
    assert_int_equal(fake.call.op, DS_MEAN);
    assert_ptr_equal(fake.call.in, &whole);
    assert_fails(ds_all_gather(&share, &whole, &c, NULL), DS_EINVAL,
                 "12 elements in and 3 out don't fit 4");
    assert_fails(ds_reduce_scatter(&two, &odd, DS_SUM, &c, NULL), DS_EINVAL,
                 "10 elements in and 2 out");
    assert_fails(ds_all_to_all(&share, &whole, &c, NULL), DS_EINVAL, "all_to_all: 12 elements in");
    assert_fails(ds_barrier(&c, NULL), DS_ENOSYS, "four has no barrier");
    assert_int_equal(ds_send(&share, 0, &c, NULL), 0);
    assert_int_equal(c.calls, 2); /* what two do alone is not counted: ranks count alike */
    assert_fails(ds_send(&share, 1, &c, NULL), DS_EINVAL, "rank 1 is this one");
    assert_fails(ds_send(&share, 4, &c, NULL), DS_ERANGE, "rank 4 of a group of 4");
}

static void handles_finish_later(void **state)
{
    float a[3] = {0};
    ds_comm c = {.transport = {&four, &four}, .size = 4, .running = DS_COLLECTIVES};
    ds_tensor t = tensor_of(a, DS_F32, 1, 3);
    ds_work work, second;

    (void)state;
    fake.blocked = 0;
    assert_int_equal(ds_all_reduce(&t, &t, DS_SUM, &c, &work), 0);
    assert_int_equal(fake.running, DS_ALL_REDUCE);
    assert_int_equal(c.running, DS_COLLECTIVES); /* begun, but this rank isn't stuck in it */
    assert_int_equal(ds_test(&work), 0);
    assert_int_equal(ds_test(&work), 0);
    assert_int_equal(ds_test(&work), 1);
    assert_int_equal(fake.running, DS_ALL_REDUCE);
    assert_int_equal(ds_wait(&work), 0);
    assert_int_equal(fake.blocked, 0); /* it was done */

    assert_int_equal(ds_broadcast(&t, 3, &c, &second), 0);
    assert_int_equal(second.number, work.number + 1);
    assert_fails(ds_wait(&second), DS_ECOMM, "rank 3 is lost");
    assert_int_equal(fake.blocked, 1);
    assert_int_equal(fake.running, DS_BROADCAST);
    assert_int_equal(ds_test(&second), DS_ECOMM);
    assert_int_equal(c.number, second.number);
    assert_fails(ds_broadcast(&t, 3, &c, NULL), DS_ECOMM, "rank 3 is lost"); /* waits by itself */
    assert_int_equal(fake.blocked, 2);

    ds_comm_abort(&c, "enough");
    assert_string_equal(fake.why, "enough");
    assert_fails(ds_broadcast(&t, 0, &c, NULL), DS_ECOMM, "the job was ended");
}

/* ---- the log of collectives */

static ds_comm_entry entry_of(int i)
{
    ds_comm_entry e = {.name = "none"};

    ds_comm_logged(&e, i);
    return e;
}

static void the_log_has_an_entry_a_kind_and_size(void **state)
{
    float a[12] = {0}, b[3];
    ds_comm c = {.transport = {&four, &four}, .size = 4, .running = DS_COLLECTIVES};
    ds_tensor whole = tensor_of(a, DS_F32, 4, 3), share = tensor_of(b, DS_F32, 1, 3);
    ds_comm_entry e;
    double tput, busbw;
    ds_work work;

    (void)state;
    assert_int_equal(ds_all_reduce(&whole, &whole, DS_SUM, &c, NULL), 0);
    assert_int_equal(ds_comm_logged(&e, 0), 0); /* it is off */
    assert_fails(ds_comm_log("barrier gather", 0, 0), DS_EINVAL, "no collective 'gather' to log");
    assert_int_equal(ds_comm_log(" all_gather all_reduce", 0, 1), 0);

    ds_breadcrumb("engine:step() number 7");
    assert_int_equal(ds_all_gather(&whole, &share, &c, NULL), 0);
    ds_breadcrumb("engine:step() number 8");
    assert_int_equal(ds_all_gather(&whole, &share, &c, NULL), 0);
    ds_breadcrumb("");
    assert_int_equal(ds_all_reduce_scaled(&whole, &whole, DS_SUM, 1, DS_BF16, &c, &work), 0);
    assert_int_equal(entry_of(1).count, 0); /* it has begun */
    assert_int_equal(ds_wait(&work), 0);
    assert_int_equal(ds_wait(&work), 0);
    assert_int_equal(ds_broadcast(&whole, 0, &c, NULL), 0); /* was not asked for */
    assert_int_equal(
        ds_all_gather(&whole, &share, &(ds_comm){.transport = {&four}, .size = 4}, NULL), 0);
    assert_int_equal(ds_comm_logged(&e, -1), 3);

    e = entry_of(0);
    assert_string_equal(e.name, "all_gather");
    assert_string_equal(e.caller, "engine:step()");
    assert_int_equal(e.count, 2);
    assert_int_equal(e.ranks, 4);
    assert_int_equal(e.bytes, 48);
    assert_int_equal(e.message, 12);
    assert_true(e.ms[0] >= 0 && e.ms[1] < 1000);
    e = entry_of(1);
    assert_string_equal(e.name, "all_reduce");
    assert_string_equal(e.caller, "script");
    assert_int_equal(e.count, 1);
    assert_int_equal(e.message, 24); /* as it travels */

    assert_int_equal(ds_comm_bandwidth(&tput, &busbw, 0, 0.001), 0);
    assert_float_equal(tput, 48 * 8 * 1e-3, 1e-9);
    assert_float_equal(busbw, 48 * 8 * 1e-3 * 3 / 4, 1e-9);
    assert_int_equal(ds_comm_bandwidth(&tput, &busbw, 1, 0.001), 0);
    assert_float_equal(tput, 2 * 24 * 8 * 1e-3, 1e-9);
    assert_float_equal(busbw, 2 * 24 * 8 * 1e-3 * 3 / 4, 1e-9);
    assert_fails(ds_comm_bandwidth(&tput, &busbw, 3, 1), DS_ERANGE, "entry 3 of a log of 3");
    assert_int_equal(ds_comm_log(NULL, 0, 0), 0);
}

static void the_log_leaves_out_what_failed_and_grows(void **state)
{
    float a[3] = {0};
    ds_comm c = {.transport = {&four, &four}, .size = 4, .running = DS_COLLECTIVES};
    ds_tensor t = tensor_of(a, DS_F32, 1, 3);
    int before = ds_comm_logged(NULL, -1);

    (void)state;
    assert_int_equal(ds_comm_log("all", 0, 0), 0);
    assert_fails(ds_broadcast(&t, 3, &c, NULL), DS_ECOMM, "rank 3 is lost");
    assert_int_equal(entry_of(before).count, 0);
    for (int i = 0; i < 200; i++)
        assert_int_equal(ds_broadcast(&t, 0, &c, NULL), 0);
    assert_int_equal(entry_of(before).count, 200);
    for (int i = 1; i <= 100; i++) {
        t.numel = t.shape[1] = i % 3 + 1;
        c.size = i + 1;
        assert_int_equal(ds_broadcast(&t, 0, &c, NULL), 0);
    }
    assert_int_equal(ds_comm_logged(NULL, -1), before + 101);
    assert_int_equal(ds_comm_log("", 0, 0), 0);
}

static void names_are_those_of_lua(void **state)
{
    (void)state;
    assert_string_equal(ds_collective_name(DS_REDUCE_SCATTER), "reduce_scatter");
    assert_string_equal(ds_collective_name(DS_COLLECTIVES), "none");
    assert_string_equal(ds_reduction_name(DS_MIN), "min");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(launchers_tell_how_many_there_are),
        cmocka_unit_test(the_world_is_one_rank),
        cmocka_unit_test(collectives_of_one_rank_are_identities),
        cmocka_unit_test(parts_of_one_rank_are_the_whole),
        cmocka_unit_test(bad_arguments_are_named),
        cmocka_unit_test(after_abort_nothing_starts),
        cmocka_unit_test(shares_are_checked_against_the_ranks),
        cmocka_unit_test(handles_finish_later),
        cmocka_unit_test(the_log_has_an_entry_a_kind_and_size),
        cmocka_unit_test(the_log_leaves_out_what_failed_and_grows),
        cmocka_unit_test(names_are_those_of_lua),
    };

    return cmocka_run_group_tests(tests, no_launcher, NULL);
}
