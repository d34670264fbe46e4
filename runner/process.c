/* process.c - signals, what runs at the end, and where the script is, for the whole process.
 *
 * Signal handlers only set flags, arm a timer and write(2). A signal that asks the process to stop
 * is left to the engine while there is one: it saves and ends at its next step boundary. SIGUSR2
 * asks where the script is. Lua answers at its next call (through its profiler's hook, which fires
 * in compiled code as well); if it does not within half a second, it is in C or in a compiled loop
 * that calls nothing, and the timer says what is known: the breadcrumb and the loop compiled last.
 */
#include "runner/process.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/error.h"

#define MAX_HOOKS 16
#define NOTE_BYTES 160
#define ANSWER_MS 500

static struct {
    void (*hook[MAX_HOOKS])(void *data, int code);
    void *data[MAX_HOOKS];
    int count;
} at_end;

static atomic_int stop_signal; /* the one that came first */
static atomic_int claims;      /* engines that will see to it */

static atomic_int site_wanted;
static void (*site_ask)(void);
static timer_t site_timer;
static char breadcrumb[NOTE_BYTES];
static char compiled_loop[NOTE_BYTES];

int ds_at_end(void (*hook)(void *data, int code), void *data)
{
    if (at_end.count == MAX_HOOKS)
        return ds_fail(DS_ENOMEM, "more than %d things to do at the end", MAX_HOOKS);
    at_end.hook[at_end.count] = hook;
    at_end.data[at_end.count++] = data;
    return 0;
}

void ds_run_end_hooks(int code)
{
    while (at_end.count > 0) {
        int i = --at_end.count;
        at_end.hook[i](at_end.data[i], code);
    }
}

/* ---- stopping */

int ds_signal_arrived(int signal)
{
    int none = 0;

    if (atomic_load(&claims) == 0)
        return 1;
    return !atomic_compare_exchange_strong(&stop_signal, &none, signal);
}

int ds_signal_pending(void)
{
    return atomic_load_explicit(&stop_signal, memory_order_relaxed);
}

void ds_signal_claim(int on)
{
    atomic_fetch_add(&claims, on ? 1 : -1);
}

/* ---- where the script is */

/* Another thread or a handler may read while this writes: then it sees a mixture of two notes, but
 * always an end, as the last byte stays 0. */
static void note(char *to, const char *text)
{
    size_t length = strnlen(text, NOTE_BYTES - 1);

    memcpy(to, text, length);
    to[length] = 0;
}

void ds_breadcrumb(const char *text)
{
    note(breadcrumb, text);
}

void ds_site_loop(const char *where)
{
    note(compiled_loop, where);
}

int ds_site_wanted(void)
{
    return atomic_load(&site_wanted);
}

/* One write(2), so that lines of several ranks do not mix; safe in a signal handler. */
static void report(const char *const *parts, int count)
{
    char line[1024];
    size_t used = 0;

    for (int i = 0; i < count; i++) {
        size_t n = strnlen(parts[i], sizeof line - 1 - used);
        memcpy(line + used, parts[i], n);
        used += n;
    }
    line[used++] = '\n';
    if (write(STDERR_FILENO, line, used) < 0)
        return; /* nobody to tell */
}

void ds_site_answer(const char *where)
{
    const char *parts[] = {"dsrun: at ", where, *breadcrumb ? "; in " : "", breadcrumb};

    if (atomic_exchange(&site_wanted, 0))
        report(parts, 4);
}

static void on_site_signal(int signal)
{
    const struct itimerspec wait = {.it_value = {.tv_nsec = ANSWER_MS * 1000000L}};
    int error = errno;

    (void)signal;
    atomic_store(&site_wanted, 1);
    timer_settime(site_timer, 0, &wait, NULL);
    site_ask();
    errno = error;
}

static void on_site_timer(int signal)
{
    const char *parts[] = {
        "dsrun: Lua did not answer within 500 ms: in C code, or in a compiled loop without calls",
        *compiled_loop ? " (compiled last: " : "",
        compiled_loop,
        *compiled_loop ? ")" : "",
        *breadcrumb ? "; in " : "",
        breadcrumb,
    };
    int error = errno;

    (void)signal;
    if (atomic_exchange(&site_wanted, 0))
        report(parts, 6);
    errno = error;
}

int ds_site_watch(void (*ask)(void))
{
    struct sigaction action = {.sa_handler = on_site_timer, .sa_flags = SA_RESTART};
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMAX - 1};

    site_ask = ask;
    sigfillset(&action.sa_mask);
    if (timer_create(CLOCK_MONOTONIC, &event, &site_timer) < 0 ||
        sigaction(SIGRTMAX - 1, &action, NULL) < 0)
        return ds_fail(DS_EIO, "no timer for SIGUSR2: %s", strerror(errno));
    action.sa_handler = on_site_signal;
    sigaction(SIGUSR2, &action, NULL);
    return 0;
}
