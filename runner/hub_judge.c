/* hub_judge.c - who waits for whom, who says nothing, who is slow: what the hub makes of reports.
 *
 * Patience comes in two sizes. After seconds it names who is waited for, and no more: a rank that
 * saves or evaluates while others wait at a barrier is doing well, as long as its watchdog reports.
 * Such a job ends only when nothing has moved for the length of the timeout. What cannot get better
 * ends it within seconds: a watchdog that says nothing while others' do (the process is stopped, or
 * its machine hangs), and ranks that all wait while no byte moves (they do not reach each other, or
 * wait in circles); but bytes that move between GPUs are not seen, so where these wait it is the timeout. When all ranks are silent, it is not a matter between ranks, and nothing is done.
 */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runner/comm.h"
#include "runner/hub_ranks.h"

#define SILENT 4.0 /* seconds without a report; there is one every second, */
#define MISSED 2.5 /* so this is the least that means anything */
#define FROZEN                                                                                     \
    7.0 /* seconds without a report that end the job: a watchdog does nothing but report */
#define WAITING 7.0 /* seconds in one collective without a byte moved, before it is said */
#define KNOTTED 6.0 /* seconds in which all wait and not a byte moves, that end the job */
#define START 120.0 /* seconds from the first rank's start to the last one's */
#define END 60.0    /* seconds to end in, once all ranks have said that they do */
#define ANSWER 1.2  /* seconds to say where one is */
#define WINDOW 10.0 /* seconds, and steps, over which ranks' speeds are compared */
#define WINDOW_STEPS 20
#define SLOWER 1.2

/* Text that stops when it is full. */
typedef struct phrase {
    char text[3072];
    size_t used;
} phrase;

__attribute__((format(printf, 2, 3))) static void add(phrase *p, const char *format, ...)
{
    va_list args;
    int n;

    va_start(args, format);
    n = vsnprintf(p->text + p->used, sizeof p->text - p->used, format, args);
    va_end(args);
    if (n > 0)
        p->used += (size_t)n;
    if (p->used >= sizeof p->text)
        p->used = sizeof p->text - 1;
}

static double limit(const ds_hub *h, double usual)
{
    double half = h->config.timeout / 2;

    return usual < half ? usual : half;
}

static int present(const ds_seen *r)
{
    return r->presence == DS_PRESENT || r->presence == DS_ENDING;
}

int ds_hub_hears(const ds_hub *h, int rank, double now)
{
    return now - h->ranks[rank].heard < MISSED;
}

double ds_hub_patience(const ds_hub *h)
{
    return limit(h, SILENT) > MISSED ? limit(h, SILENT) : MISSED;
}

static int silent(const ds_hub *h, const ds_seen *r, double now)
{
    return present(r) && now - r->heard > ds_hub_patience(h);
}

static int waits(const ds_hub *h, const ds_seen *r, double now)
{
    return present(r) && !silent(h, r, now) && r->kind != DS_COLLECTIVES;
}

/* "rank 2", "ranks 0, 1, 3": those for whom the list says 1. */
static void add_ranks(phrase *p, const char *is, int ranks)
{
    int n = 0, shown = 0;

    for (int r = 0; r < ranks; r++)
        n += is[r];
    add(p, n == 1 ? "rank " : "ranks ");
    for (int r = 0; r < ranks; r++)
        if (is[r] && ++shown <= 16)
            add(p, "%s%d", shown > 1 ? ", " : "", r);
    if (shown > 16)
        add(p, " and %d more", shown - 16);
}

static void add_place(phrase *p, const ds_seen *r, double now)
{
    switch (r->presence) {
    case DS_ABSENT:
        add(p, "has not started");
        return;
    case DS_GONE:
        add(p, "has ended");
        return;
    case DS_ENDING:
        add(p, "is ending");
        return;
    default:
        break;
    }
    if (r->step)
        add(p, "step %lld, ", (long long)r->step);
    if (r->kind != DS_COLLECTIVES)
        add(p, "%s #%lld for %.0f s, ", ds_collective_name(r->kind), (long long)r->number,
            now - r->since);
    add(p, "%s", *r->site ? r->site : "not yet in the script");
    if (*r->doing)
        add(p, ", in %s", r->doing);
}

const char *ds_hub_name(char *out, const ds_hub *h, int rank)
{
    const char *where = h->config.where ? h->config.where[rank] : NULL;

    snprintf(out, DS_NAME_BYTES, where ? "rank %d (%s)" : "rank %d", rank, where);
    return out;
}

const char *ds_hub_last_seen(const ds_hub *h, int rank)
{
    return rank >= 0 ? h->ranks[rank].site : "";
}

void ds_hub_report(ds_hub *h, double now)
{
    h->answers = 0;
    for (int r = 0; r < h->config.ranks; r++) {
        phrase p = {.used = 0};
        char name[DS_NAME_BYTES];

        add(&p, "dsrun: %s: ", ds_hub_name(name, h, r));
        if (silent(h, &h->ranks[r], now))
            add(&p, "silent for %.0f s, ", now - h->ranks[r].heard);
        add_place(&p, &h->ranks[r], now);
        h->config.say(h->config.data, -1, p.text);
    }
}

/* Those who are waited for (of them, the silent ones if there are any) and those who wait:
 * "rank 2 is silent for 6 s, last seen at train.lua:12, in get(41); ranks 0, 1 wait in all_reduce #7
 * at train.lua:33". */
static void name_them(ds_hub *h, phrase *p, double now)
{
    int ranks = h->config.ranks, named = 0, waiting = 0, collective = DS_COLLECTIVES;
    char *wait = calloc((size_t)ranks, 1);
    int64_t number = 0;
    const char *site = "";
    char name[DS_NAME_BYTES];
    int quiet = 0;

    if (!wait)
        return;
    for (int r = 0; r < ranks; r++)
        quiet += silent(h, &h->ranks[r], now);
    for (int r = 0; r < ranks; r++) {
        const ds_seen *s = &h->ranks[r];

        if (waits(h, s, now)) {
            wait[r] = 1;
            waiting++;
            collective = s->kind;
            number = s->number;
            site = s->site;
        } else if (!quiet || silent(h, s, now)) {
            if (++named > 8)
                continue;
            add(p, "%s%s ", named > 1 ? "; " : "", ds_hub_name(name, h, r));
            if (silent(h, s, now))
                add(p, "is silent for %.0f s, ", now - s->heard);
            add_place(p, s, now);
        }
    }
    if (named > 8)
        add(p, "; and %d more", named - 8);
    if (waiting) {
        add(p, "%s", named ? "; " : "");
        add_ranks(p, wait, ranks);
        add(p, " wait%s in %s #%lld%s%s", waiting == 1 ? "s" : "", ds_collective_name(collective),
            (long long)number, *site ? ", " : "", site);
    }
    free(wait);
}

static void give_up(ds_hub *h, int rank, const char *why, double now)
{
    phrase p = {.used = 0};

    if (h->trouble != DS_TROUBLE_NONE)
        return;
    name_them(h, &p, now);
    ds_hub_say(h, rank, "dsrun: %s: %s", why, p.text);
    ds_hub_trouble_with(h, DS_TROUBLE_STUCK, rank, -1, now);
}

static void time_out(ds_hub *h, int rank, double now)
{
    char why[64];

    snprintf(why, sizeof why, "no progress for %g s (--timeout)", h->config.timeout);
    give_up(h, rank, why, now);
}

/* All wait, and nothing moves: whoever waits for a rank on another machine may not reach it. */
static void untie(ds_hub *h, double now)
{
    phrase p = {.used = 0};
    char name[DS_NAME_BYTES];
    int shown = 0;

    add(&p, "all ranks wait, and nothing has moved for %.0f s", now - h->moved);
    for (int r = 0; r < h->config.ranks && shown < 8; r++) {
        if (h->ranks[r].peer < 0 || !present(&h->ranks[r]))
            continue;
        add(&p, "%s%s", shown++ ? "; " : " (", ds_hub_name(name, h, r));
        add(&p, " for %s", ds_hub_name(name, h, h->ranks[r].peer));
    }
    add(&p, shown ? ")%s" : "%s",
        h->config.nodes > 1 ? ": do their machines reach each other?" : "");
    give_up(h, -1, p.text, now);
}

/* Ranks that are frozen or cut off, while others are not. */
static void judge_silence(ds_hub *h, double now)
{
    int quiet = 0, talking = 0, fresh = 0, longest = -1;

    for (int r = 0; r < h->config.ranks; r++) {
        ds_seen *s = &h->ranks[r];
        int is = silent(h, s, now);

        if (present(s))
            talking += !is;
        quiet += is;
        fresh += is && !s->silent;
        if (is && (longest < 0 || s->heard < h->ranks[longest].heard))
            longest = r;
    }
    if (!quiet || !talking)
        return;
    for (int r = 0; r < h->config.ranks; r++)
        h->ranks[r].silent = silent(h, &h->ranks[r], now);
    if (fresh) {
        phrase p = {.used = 0};
        name_them(h, &p, now);
        ds_hub_say(h, longest, "dsrun: %s", p.text);
    }
    if (now - h->ranks[longest].heard > fmin(FROZEN, h->config.timeout))
        give_up(h, longest, "a rank is frozen or cut off, and the job ends", now);
}

/* The rank that the others wait for: the one that has not begun what they are in, or -1. */
static int waited_for(const ds_hub *h, double now)
{
    for (int r = 0; r < h->config.ranks; r++)
        if (!waits(h, &h->ranks[r], now) && present(&h->ranks[r]))
            return r;
    return -1;
}

/* Ranks that sit in a collective in which nothing moves. */
static void judge_waiting(ds_hub *h, double now)
{
    int64_t bytes = 0, calls = 0;
    double longest = 0, wait;
    int waited = waited_for(h, now), unseen = 0;

    for (int r = 0; r < h->config.ranks; r++) {
        const ds_seen *s = &h->ranks[r];

        bytes += s->bytes;
        calls += s->calls;
        unseen += waits(h, s, now) && s->peer == DS_UNSEEN;
        if (waits(h, s, now) && now - s->since > longest)
            longest = now - s->since;
    }
    if (bytes != h->last_bytes || calls != h->last_calls) {
        h->last_bytes = bytes;
        h->last_calls = calls;
        h->moved = now;
        h->warned_wait = 0;
    }
    wait = now - h->moved < longest ? now - h->moved : longest;
    if (wait > h->config.timeout) {
        time_out(h, waited, now);
    } else if (waited < 0 && !unseen && wait > fmin(KNOTTED, h->config.timeout)) {
        untie(h, now);
    } else if (h->ranks[waited < 0 ? 0 : waited].silent) {
        return; /* that was said already */
    } else if (wait > (h->warned_wait > 0 ? h->warned_wait * 8 : limit(h, WAITING))) {
        phrase p = {.used = 0};
        name_them(h, &p, now);
        ds_hub_say(h, waited, "dsrun: %s", p.text);
        h->warned_wait = wait;
    }
}

/* A job that does not begin, or does not end. */
static void judge_ends(ds_hub *h, double now)
{
    int absent = 0, ending = 0, gone = 0, ranks = h->config.ranks;
    double last = h->opened; /* when the last of them said that it ends */

    for (int r = 0; r < ranks; r++) {
        absent += h->ranks[r].presence == DS_ABSENT;
        ending += h->ranks[r].presence == DS_ENDING;
        gone += h->ranks[r].presence == DS_GONE;
        if (h->ranks[r].since > last)
            last = h->ranks[r].since;
    }
    if (absent && now - h->opened > START) {
        ds_hub_say(h, -1, "dsrun: %d of %d ranks have not started within %.0f s", absent, ranks,
                   START);
        ds_hub_trouble_with(h, DS_TROUBLE_STUCK, -1, -1, now);
    }
    if (ending && ending + gone == ranks && now - last > END) {
        ds_hub_say(h, -1, "dsrun: %d ranks that were about to end have not done so within %.0f s",
                   ending, END);
        ds_hub_trouble_with(h, DS_TROUBLE_STUCK, -1, -1, now);
    }
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* Compares the ranks' own time for a step over a window of time and of steps. */
static void judge_speed(ds_hub *h, double now)
{
    int ranks = h->config.ranks;
    double *each, *sorted, median;
    char name[DS_NAME_BYTES];

    if (ranks < 2 || now - h->window < WINDOW)
        return;
    for (int r = 0; r < ranks; r++)
        if (h->ranks[r].steps - h->ranks[r].steps_before < WINDOW_STEPS)
            return;
    each = malloc(2 * (size_t)ranks * sizeof *each);
    if (!each)
        return;
    sorted = each + ranks;
    for (int r = 0; r < ranks; r++) {
        ds_seen *s = &h->ranks[r];

        each[r] = sorted[r] = (s->busy - s->busy_before) / (double)(s->steps - s->steps_before);
        s->busy_before = s->busy;
        s->steps_before = s->steps;
    }
    qsort(sorted, (size_t)ranks, sizeof *sorted, ascending);
    median = sorted[(ranks - 1) / 2];
    for (int r = 0; r < ranks; r++)
        if (each[r] > SLOWER * median)
            ds_hub_say(h, r,
                       "dsrun: %s is slow: %.3g ms a step over the last %.0f s, against "
                       "%.3g (median of all ranks)",
                       ds_hub_name(name, h, r), each[r] * 1e3, now - h->window, median * 1e3);
    free(each);
    h->window = now;
}

void ds_hub_judge(ds_hub *h, double now)
{
    if (h->answers && now - h->asked > ANSWER)
        ds_hub_report(h, now);
    if (h->trouble != DS_TROUBLE_NONE)
        return;
    judge_silence(h, now);
    judge_waiting(h, now);
    judge_ends(h, now);
    judge_speed(h, now);
}
