/* test_hub.c - the middle of the side channel, with ranks made of sockets and time made up. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runner/comm.h"
#include "runner/hub.h"
#include "runner/lines.h"
#include "runner/watch.h"

#define RANKS 4
#define NONE DS_COLLECTIVES

static struct {
    ds_hub *hub;
    int side[RANKS];
    double now;
    char said[16384]; /* all that the hub said since the last look */
    char wrote[256];
} t;

static void say(void *data, int rank, const char *text)
{
    (void)data;
    (void)rank;
    snprintf(t.said + strlen(t.said), sizeof t.said - strlen(t.said), "%s\n", text);
}

static void output(void *data, int rank, int stream, const char *text, size_t bytes)
{
    (void)data;
    snprintf(t.wrote + strlen(t.wrote), sizeof t.wrote - strlen(t.wrote), "%d%c%.*s|", rank,
             stream == DS_STDERR ? 'e' : 'o', (int)bytes, bytes ? text : "");
}

static void serve(void)
{
    struct pollfd fd = {ds_hub_fd(t.hub), POLLIN, 0};

    for (int i = 0; i < 50; i++) { /* until nothing has come for a moment */
        int more = poll(&fd, 1, i ? 5 : 200);
        ds_hub_serve(t.hub, t.now);
        if (i && !more)
            return;
    }
}

static int connect_to_hub(void)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    to.sin_port = htons((uint16_t)ds_hub_port(t.hub));
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
    return fd;
}

static void tell(int fd, const char *text)
{
    assert_int_equal(send(fd, text, strlen(text), MSG_NOSIGNAL), (ssize_t)strlen(text));
}

/* What the hub has sent, up to now; "closed": it has hung up. */
static const char *told(int fd)
{
    static char text[256];
    ssize_t n = recv(fd, text, sizeof text - 1, MSG_DONTWAIT);

    text[n > 0 ? n : 0] = 0;
    return n == 0 ? "closed" : text;
}

static void state_with(int peer, int rank, int kind, int number, int bytes, const char *site,
                       const char *doing)
{
    char text[256];

    snprintf(text, sizeof text, "state %d %d %d %d %d 7 0 0\t%s\t%s\n", kind, number, peer, number,
             bytes, site, doing);
    tell(t.side[rank], text);
}

static void state(int rank, int kind, int number, int bytes, const char *site, const char *doing)
{
    state_with((rank + 1) % RANKS, rank, kind, number, bytes, site, doing);
}

/* Time goes by in seconds, in each of which all ranks but `silent` say the same as before. */
static void pass(int seconds, int silent, const int *kind, int number)
{
    for (int s = 0; s < seconds; s++) {
        t.now += 1;
        for (int r = 0; r < RANKS; r++)
            if (r != silent && t.side[r] >= 0)
                state(r, kind[r], number, 100, "at a.lua:3", kind[r] == NONE ? "get(41)" : "");
        serve();
    }
}

static void assert_said(const char *piece)
{
    if (!strstr(t.said, piece))
        fail_msg("\"%s\" is not in \"%s\"", piece, t.said);
    t.said[0] = 0;
}

static int open_hub(void **unused)
{
    const ds_hub_config config = {.ranks = RANKS,
                                  .token = "secret",
                                  .folder = "/dev/shm/job",
                                  .timeout = 100,
                                  .output = output,
                                  .say = say};

    (void)unused;
    memset(&t, 0, sizeof t);
    t.now = 1000;
    assert_int_equal(ds_hub_open(&t.hub, &config, t.now), 0);
    for (int r = 0; r < RANKS; r++) {
        char hello[64];
        t.side[r] = connect_to_hub();
        snprintf(hello, sizeof hello, "hello secret %d side 0 0\n", r);
        tell(t.side[r], hello);
    }
    serve();
    for (int r = 0; r < RANKS; r++)
        assert_string_equal(told(t.side[r]), "welcome\n");
    assert_int_equal(ds_hub_started(t.hub), RANKS);
    return 0;
}

static int close_hub(void **unused)
{
    (void)unused;
    for (int r = 0; r < RANKS; r++)
        if (t.side[r] >= 0)
            close(t.side[r]);
    ds_hub_close(t.hub);
    return 0;
}

static const int all_wait[RANKS] = {DS_ALL_REDUCE, DS_ALL_REDUCE, DS_ALL_REDUCE, DS_ALL_REDUCE};
static const int one_late[RANKS] = {DS_ALL_REDUCE, DS_ALL_REDUCE, NONE, DS_ALL_REDUCE};
static const int all_work[RANKS] = {NONE, NONE, NONE, NONE};

static void strangers_are_sent_away(void **unused)
{
    static const char *const lies[] = {"hello wrong 1 side 0 0\n",  "hello secret 1 side 0 0\n",
                                       "hello secret 9 side 0 0\n", "GET / HTTP/1.1\r\n\r\n",
                                       "hello secret -1 out 0 0\n", "watch /dev/shm/jo\n"};
    char junk[4096];
    int fd;

    (void)unused;
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        fd = connect_to_hub();
        tell(fd, lies[i]);
        serve();
        assert_string_equal(told(fd), "closed");
        close(fd);
    }
    fd = connect_to_hub();
    memset(junk, 'x', sizeof junk);
    assert_true(send(fd, junk, sizeof junk, MSG_NOSIGNAL) > 0);
    serve();
    assert_true(recv(fd, junk, sizeof junk, MSG_DONTWAIT) <= 0);
    close(fd);
    fd = connect_to_hub(); /* says nothing at all */
    serve();
    pass(11, -1, all_work, 1);
    assert_string_equal(told(fd), "closed");
    close(fd);
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_NONE);
}

static void a_host_that_watches_is_no_rank(void **unused)
{
    int fd = connect_to_hub();

    (void)unused;
    tell(fd, "watch /dev/shm/job\n");
    serve();
    assert_string_equal(told(fd), "welcome\n");
    pass(15, -1, all_work, 1);
    assert_string_equal(told(fd), ""); /* it need not say who it is any more */
    tell(fd, "end 1\n");
    serve();
    assert_string_equal(told(fd), "closed");
    close(fd);
    assert_int_equal(ds_hub_started(t.hub), RANKS);
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_NONE);
}

/* A process that watches by the hub's address, behind one where nobody is. *pipe: what it watches
 * beside it. */
static pid_t start_watching(int *pipe_end)
{
    int ends[2];
    char hub[64];
    pid_t pid;

    snprintf(hub, sizeof hub, "%d,127.0.0.2,127.0.0.1", ds_hub_port(t.hub));
    assert_int_equal(pipe(ends), 0);
    pid = fork();
    if (pid == 0) {
        close(ends[1]);
        ds_watch(ends[0], hub, "/dev/shm/job");
        _exit(0);
    }
    close(ends[0]);
    *pipe_end = ends[1];
    return pid;
}

/* Whether a process ends within some seconds. */
static int ends_within(pid_t pid, int seconds)
{
    int status;

    for (int i = 0; i < seconds * 100; i++) {
        if (waitpid(pid, &status, WNOHANG) == pid)
            return WIFEXITED(status) && WEXITSTATUS(status) == 0;
        usleep(10000);
    }
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    return 0;
}

static void a_watch_ends_with_its_host_or_with_the_hub(void **unused)
{
    int first, second;
    pid_t of_hub = start_watching(&first), of_pipe = start_watching(&second);

    (void)unused;
    for (int i = 0; i < 20; i++)
        serve();
    assert_int_equal(waitpid(-1, NULL, WNOHANG), 0); /* both go on */
    close(second);
    assert_true(ends_within(of_pipe, 5));
    assert_int_equal(waitpid(of_hub, NULL, WNOHANG), 0);
    close_hub(NULL);
    t.hub = NULL;
    for (int r = 0; r < RANKS; r++)
        t.side[r] = -1;
    assert_true(ends_within(of_hub, 5));
    close(first);
}

static void output_comes_before_what_is_said_after_it(void **unused)
{
    int out = connect_to_hub();

    (void)unused;
    tell(out, "hello secret 1 out 0 0\n");
    serve();
    assert_string_equal(told(out), "welcome\n");
    tell(out, "hello\n");
    tell(t.side[1], "failed 4\nboomend 3\n");
    serve();
    assert_string_equal(t.wrote, "1ohello\n|");
    assert_said("rank 1: boom\n");
    assert_string_equal(told(t.side[1]), "heard\nheard\n");
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_FAILED);
    assert_int_equal(ds_hub_culprit(t.hub), 1);
    assert_int_equal(ds_hub_code(t.hub), 3);
    tell(t.side[2], "failed 5\nlater");
    serve();
    assert_string_equal(t.said, ""); /* the first is the cause */
    assert_string_equal(told(t.side[2]), "heard\n");
    close(out);
}

static void a_lost_rank_is_trouble_at_once(void **unused)
{
    (void)unused;
    state(2, NONE, 1, 0, "at b.lua:9", "");
    serve();
    close(t.side[2]);
    t.side[2] = -1;
    serve();
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_LOST);
    assert_int_equal(ds_hub_culprit(t.hub), 2);
    assert_string_equal(ds_hub_last_seen(t.hub, 2), "at b.lua:9");
}

static void an_end_in_order_is_none(void **unused)
{
    (void)unused;
    for (int r = 0; r < RANKS; r++) {
        tell(t.side[r], "end 0\n");
        serve();
        close(t.side[r]);
        t.side[r] = -1;
        serve();
    }
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_NONE);
    assert_true(ds_hub_all_gone(t.hub));
}

static void a_stop_is_told_to_all(void **unused)
{
    (void)unused;
    ds_hub_stop(t.hub, 15);
    for (int r = 0; r < RANKS; r++)
        assert_string_equal(told(t.side[r]), "stop 15\n");
    tell(t.side[0], "end 143\n");
    serve();
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_NONE);
    assert_int_equal(ds_hub_signal(t.hub), 15);
}

static void a_stop_is_told_to_those_who_come_later(void **unused)
{
    const ds_hub_config config = {.ranks = 1, .token = "secret", .timeout = 100, .say = say};
    ds_hub *four = t.hub;
    int fd;

    (void)unused;
    assert_int_equal(ds_hub_open(&t.hub, &config, t.now), 0);
    ds_hub_stop(t.hub, 10);
    fd = connect_to_hub();
    tell(fd, "hello secret 0 side 0 0\n");
    serve();
    assert_string_equal(told(fd), "welcome\nstop 10\n");
    close(fd);
    ds_hub_close(t.hub);
    t.hub = four;
}

static void who_is_waited_for_is_named_and_left_alone(void **unused)
{
    (void)unused;
    pass(6, -1, one_late, 1234);
    assert_string_equal(t.said, "");
    pass(4, -1, one_late, 1234);
    assert_said("dsrun: rank 2 step 7, at a.lua:3, in get(41); "
                "ranks 0, 1, 3 wait in all_reduce #1234, at a.lua:3\n");
    pass(30, -1, one_late, 1234);
    assert_string_equal(t.said, "");
    pass(1, -1, all_work, 1234);
    pass(85, -1, one_late, 1235);
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_NONE);
}

static void nothing_moving_for_the_timeout_ends_the_job(void **unused)
{
    (void)unused;
    pass(99, -1, one_late, 7);
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_NONE);
    t.said[0] = 0;
    pass(4, -1, one_late, 7);
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_STUCK);
    assert_said("no progress for 100 s (--timeout): rank 2 step 7, at a.lua:3, in get(41); "
                "ranks 0, 1, 3 wait in all_reduce #7");
}

static void ranks_that_all_wait_for_each_other_end_the_job(void **unused)
{
    (void)unused;
    pass(6, -1, all_wait, 7);
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_NONE);
    pass(2, -1, all_wait, 7);
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_STUCK);
    assert_said(
        "all ranks wait, and nothing has moved for 7 s (rank 0 for rank 1; rank 1 for rank 2; "
        "rank 2 for rank 3; rank 3 for rank 0): ranks 0, 1, 2, 3 wait in all_reduce #7");
}

static void devices_that_wait_have_the_timeout(void **unused)
{
    (void)unused;
    for (int s = 0; s < 103; s++) {
        t.now += 1;
        for (int r = 0; r < RANKS; r++)
            state_with(DS_UNSEEN, r, DS_ALL_REDUCE, 7, 100, "at a.lua:3", "");
        serve();
        if (s == 90)
            assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_NONE);
    }
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_STUCK);
    assert_said("no progress for 100 s (--timeout): ranks 0, 1, 2, 3 wait in all_reduce #7");
}

static void bytes_that_move_are_progress(void **unused)
{
    (void)unused;
    for (int s = 0; s < 150; s++) {
        t.now += 1;
        for (int r = 0; r < RANKS; r++)
            state(r, DS_ALL_REDUCE, 7, r == 1 ? s * 1000 : 0, "at a.lua:3", "");
        serve();
    }
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_NONE);
    assert_string_equal(t.said, "");
}

static void long_work_of_all_is_no_trouble(void **unused)
{
    (void)unused;
    pass(150, -1, all_work, 7);
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_NONE);
    assert_string_equal(t.said, "");
}

static void a_silent_rank_is_named_then_given_up(void **unused)
{
    (void)unused;
    pass(1, -1, one_late, 7);
    pass(6, 2, one_late, 7);
    assert_said("rank 2 is silent for 5 s, step 7, at a.lua:3, in get(41); "
                "ranks 0, 1, 3 wait in all_reduce #7");
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_NONE);
    pass(2, 2, one_late, 7);
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_STUCK);
    assert_int_equal(ds_hub_culprit(t.hub), 2);
    assert_said("a rank is frozen or cut off, and the job ends: rank 2 is silent for 8 s");
}

static void silence_of_all_means_nothing(void **unused)
{
    (void)unused;
    pass(2, -1, one_late, 7);
    for (int s = 0; s < 300; s++) { /* ranks are stopped */
        t.now += 1;
        ds_hub_serve(t.hub, t.now);
    }
    state(3, NONE, 7, 100, "at a.lua:3", ""); /* the first to be back */
    serve();
    pass(1, -1, all_work, 7);
    t.now += 500; /* this process was stopped */
    serve();
    pass(1, -1, all_work, 7);
    assert_int_equal(ds_hub_trouble(t.hub), DS_TROUBLE_NONE);
    assert_string_equal(t.said, "");
}

static void all_say_where_they_are(void **unused)
{
    (void)unused;
    ds_hub_ask(t.hub, t.now);
    for (int r = 0; r < RANKS; r++)
        assert_string_equal(told(t.side[r]), "where\n");
    for (int r = 0; r < RANKS - 1; r++)
        tell(t.side[r], "here -1 0 -1 0 0 0 0 0\tat b.lua:1\t\n");
    serve();
    assert_string_equal(t.said, "");
    t.now += 1.5; /* one does not answer */
    serve();
    assert_said("dsrun: rank 0: at b.lua:1\n");
}

static void a_straggler_is_named(void **unused)
{
    (void)unused;
    for (int s = 1; s <= 12; s++) {
        t.now += 1;
        for (int r = 0; r < RANKS; r++) {
            char text[128];
            snprintf(text, sizeof text, "state %d 0 -1 %d 0 %d %d %f\t\t\n", NONE, s, s * 10,
                     s * 10, s * 10 * (r == 3 ? 0.020 : 0.010));
            tell(t.side[r], text);
        }
        serve();
    }
    assert_said("rank 3 is slow: 20 ms a step over the last 10 s, against 10 (median");
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, open_hub, close_hub)
    const struct CMUnitTest tests[] = {
        TEST(strangers_are_sent_away),
        TEST(a_host_that_watches_is_no_rank),
        TEST(a_watch_ends_with_its_host_or_with_the_hub),
        TEST(output_comes_before_what_is_said_after_it),
        TEST(a_lost_rank_is_trouble_at_once),
        TEST(an_end_in_order_is_none),
        TEST(a_stop_is_told_to_all),
        TEST(a_stop_is_told_to_those_who_come_later),
        TEST(who_is_waited_for_is_named_and_left_alone),
        TEST(nothing_moving_for_the_timeout_ends_the_job),
        TEST(ranks_that_all_wait_for_each_other_end_the_job),
        TEST(devices_that_wait_have_the_timeout),
        TEST(bytes_that_move_are_progress),
        TEST(long_work_of_all_is_no_trouble),
        TEST(a_silent_rank_is_named_then_given_up),
        TEST(silence_of_all_means_nothing),
        TEST(all_say_where_they_are),
        TEST(a_straggler_is_named),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
