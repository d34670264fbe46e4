/* hub.h - the middle of the side channel: every rank's watchdog reports here once a second.
 *
 * It lives in the dsrun that launched the ranks, or, where another launcher did, in a thread of rank
 * 0. It knows who waits for whom, prints the cause of a failure once, and says when the job must
 * end; ending it is its owner's work. Time comes from its owner, so tests can make it up.
 *
 * Messages are lines of text. From a rank, after "hello TOKEN RANK CHANNEL PID GROUP" on each of its
 * connections ("side", and for a launcher "out" and "err", which then carry its output as it is):
 *   state KIND NUMBER PEER CALLS BYTES STEP COUNT SECONDS<tab>SITE<tab>DOING   once a second
 *   here …               the same, as an answer to "where"
 *   failed BYTES\n text  the error that ends this rank; answered by "heard"
 *   end CODE             it is about to end; answered by "heard"
 * To a rank: welcome · heard · where · stop SIGNAL · die CODE · done (the hub ends, all is well).
 * From a host that has ranks, "watch FOLDER", answered by "welcome": it sees by this connection whether
 * the hub is still there (watch.h).
 */
#ifndef DS_HUB_H
#define DS_HUB_H

#include <stddef.h>
#include <stdint.h>

#define DS_SITE_BYTES 256 /* a place in a script, as text */
#define DS_NAME_BYTES 320 /* a rank, as text */
#define DS_CUT_OFF_MS 6000

/* A peer that stops to answer (its host is down, its network cut) is an error on that socket after
 * DS_CUT_OFF_MS. A process that is stopped is not meant: its kernel answers. */
void ds_hub_lively(int fd);

/* What has happened to the job. */
enum ds_trouble {
    DS_TROUBLE_NONE,
    DS_TROUBLE_FAILED,  /* a rank says so itself, by an error or a code that is not 0 */
    DS_TROUBLE_LOST,    /* its connection was closed without a word, or its host does not answer */
    DS_TROUBLE_STOPPED, /* the same, after it was asked to stop: nothing in it would save */
    DS_TROUBLE_STUCK,   /* frozen, or all wait for each other, or no progress for the timeout */
};

typedef struct ds_hub_config {
    int ranks;
    int nodes;                /* machines; on one alone, others cannot reach the hub */
    const char *const *where; /* [ranks] "worker-2, slot 1", for messages (optional) */
    const char *token;        /* what a rank must say to be one */
    const char *folder;       /* what a host must say that watches (optional: none does) */
    double timeout;           /* seconds without progress that end the job; 0: nothing does */
    void *data;               /* for the functions below */
    /* What a rank wrote; bytes 0: no more will come. (optional) */
    void (*output)(void *data, int rank, int stream, const char *text, size_t bytes);
    /* Lines for the user; rank: whom they are about, or -1. */
    void (*say)(void *data, int rank, const char *text);
} ds_hub_config;

typedef struct ds_hub ds_hub;

/* Listens on a port of this machine; nodes > 1: on all of its addresses. */
int ds_hub_open(ds_hub **out, const ds_hub_config *config, double now);
void ds_hub_close(ds_hub *h); /* says "done" to ranks that are still there */
int ds_hub_port(const ds_hub *h);
int ds_hub_fd(const ds_hub *h); /* readable: call ds_hub_serve() */

/* Reads what has come, and looks after those from whom nothing comes: at least twice a second. */
void ds_hub_serve(ds_hub *h, double now);

enum ds_trouble ds_hub_trouble(const ds_hub *h);
int ds_hub_culprit(const ds_hub *h);  /* the rank that the trouble began with, or -1 */
int ds_hub_code(const ds_hub *h);     /* the exit code that it told; -1: none */
int ds_hub_signal(const ds_hub *h);   /* the signal by which ranks ended in good order, or 0 */
double ds_hub_since(const ds_hub *h); /* when the trouble began */
int ds_hub_gone(const ds_hub *h, int rank); /* 1: it was there, and its connections are closed */
int ds_hub_all_gone(const ds_hub *h);
int ds_hub_cut_off(const ds_hub *h, int rank);           /* 1: its host has stopped to answer */
int ds_hub_started(const ds_hub *h);                     /* ranks that were ever there */
const char *ds_hub_last_seen(const ds_hub *h, int rank); /* as "at train.lua:3", "" if unknown */
/* "rank 3", and where that is: "rank 3 (worker-2, slot 1)"; out: [DS_NAME_BYTES], returned. */
const char *ds_hub_name(char *out, const ds_hub *h, int rank);

/* Asks all ranks to save and end, as the signal would. */
void ds_hub_stop(ds_hub *h, int signal);
/* Has all ranks say where they are; the answer is printed when it is there, within a second. */
void ds_hub_ask(ds_hub *h, double now);
/* Ends all ranks now: those of this machine by SIGKILL, also where they are stopped. */
void ds_hub_kill(ds_hub *h, int code, double now);

#endif
