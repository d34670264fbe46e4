/* process.c - signals, what runs at the end, and where the script is, for the whole process.
 *
 * Signal handlers only set flags, arm a timer and write(2). A signal that asks the process to stop
 * is left to the engine while there is one: it saves and ends at its next step boundary. SIGUSR2
 * asks where the script is. Lua answers at its next call (through its profiler's hook, which fires
 * in compiled code as well); if it does not within half a second, it is in C or in a compiled loop
 * that calls nothing, and the timer says what is known: the breadcrumb and the loop compiled last.
 * A rank's watchdog asks the same way, once a second.
 */
#include "runner/process.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/error.h"

#define MAX_HOOKS 16
#define HANDLER_STACK (64 << 10) /* bytes: a frame holds all vector registers, some 4 KB */
#define NOTE_BYTES 256
#define ANSWER_MS 500
#define LOOK_MS 5

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
static char site[NOTE_BYTES];      /* where Lua was last seen */
static atomic_int site_answers;    /* how often it was */
static _Thread_local int look_was; /* what ds_site_sample() came to: enum look */
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

/* ---- handlers' own stack */

int ds_signal_stack(void)
{
    static char memory[HANDLER_STACK];
    const stack_t stack = {.ss_sp = memory, .ss_size = sizeof memory};

    return sigaltstack(&stack, NULL) < 0
               ? ds_fail(DS_EIO, "no stack for signals: %s", strerror(errno))
               : 0;
}

void ds_signal_off_stack(int signal)
{
    struct sigaction action;

    if (sigaction(signal, NULL, &action) < 0)
        return;
    action.sa_flags |= SA_ONSTACK;
    sigaction(signal, &action, NULL);
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

const char *ds_site_doing(void)
{
    return breadcrumb;
}

void ds_site_loop(const char *where)
{
    note(compiled_loop, where);
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

void ds_site_note(const char *where)
{
    note(site, where);
    atomic_fetch_add(&site_answers, 1);
}

void ds_site_answer(const char *where)
{
    const char *parts[] = {"dsrun: at ", where, *breadcrumb ? "; in " : "", breadcrumb};

    ds_site_note(where);
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
    struct sigaction action = {.sa_handler = on_site_timer, .sa_flags = SA_RESTART | SA_ONSTACK};
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

/* ---- the same for a watchdog, which prints nothing */

enum look { UNKNOWN, ANSWERED, ASLEEP, BUSY };

/* Whether the main thread runs. One that sleeps in a system call is in C, so Lua could not answer;
 * and the signal that asks it would cut a sleep of the script's short. */
static int main_runs(void)
{
    char path[48], text[256];
    const char *state = NULL;
    FILE *f;

    snprintf(path, sizeof path, "/proc/self/task/%d/stat", (int)getpid());
    f = fopen(path, "re");
    if (f) {
        text[fread(text, 1, sizeof text - 1, f)] = 0;
        fclose(f);
        state = strrchr(text, ')'); /* "123 (name) R …" */
    }
    return state && state[1] && state[2] == 'R';
}

void ds_site_sample(int thorough)
{
    const struct timespec moment = {.tv_nsec = LOOK_MS * 1000000L};
    int before = atomic_load(&site_answers), look = ASLEEP;

    look_was = UNKNOWN;
    if (!site_ask)
        return;
    for (int ms = 0; ms < (thorough ? ANSWER_MS : 4 * LOOK_MS) && look != ANSWERED; ms += LOOK_MS) {
        look = main_runs() ? BUSY : ASLEEP;
        if (look == ASLEEP)
            break;
        if (ms == 0)
            site_ask();
        nanosleep(&moment, NULL);
        if (atomic_load(&site_answers) != before)
            look = ANSWERED;
    }
    if (thorough) /* else it is for later, and then it was "last seen" there */
        look_was = look;
}

void ds_site_describe(char *where, char *doing, size_t bytes)
{
    static const char *const looks[] = {
        [UNKNOWN] = "last seen at ",
        [ANSWERED] = "at ",
        [ASLEEP] = "in C code, last seen at ",
        [BUSY] = "in C code or a compiled loop, last seen at ",
    };

    snprintf(doing, bytes, "%s", breadcrumb);
    if (*site)
        snprintf(where, bytes, "%s%s", looks[look_was], site);
    else if (*compiled_loop)
        snprintf(where, bytes, "in a compiled loop at %s", compiled_loop);
    else
        snprintf(where, bytes, "%s", site_ask ? "in the script" : "");
    for (char *c = where; *c; c++) /* it becomes a field of a line */
        *c = *c == '\t' || *c == '\n' ? ' ' : *c;
    for (char *c = doing; *c; c++)
        *c = *c == '\t' || *c == '\n' ? ' ' : *c;
}
