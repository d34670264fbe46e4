/* hub_ranks.h - what the hub knows of each rank; for hub.c and hub_judge.c alone. */
#ifndef DS_HUB_RANKS_H
#define DS_HUB_RANKS_H

#include "runner/hub.h"

enum ds_presence { DS_ABSENT, DS_PRESENT, DS_ENDING, DS_GONE };

typedef struct ds_seen {
    enum ds_presence presence;
    int side;       /* its side connection's descriptor, or -1 */
    int cut_off;    /* that ended because its host no longer answered */
    int streams;    /* of its output that are still open */
    int pid, group; /* 0: on another machine */
    int lost;       /* it went without saying so */
    int code;       /* what it said it would end with */
    double heard;   /* when it last said anything */
    int kind;       /* the collective it is in; DS_COLLECTIVES: none */
    int peer;       /* the rank that it waits for there, -1, or DS_UNSEEN */
    int64_t number, calls, bytes;
    double since; /* since when it has been in it */
    char site[DS_SITE_BYTES], doing[DS_SITE_BYTES];
    int silent;    /* it was named for not saying anything */
    int64_t step;  /* the number of the engine's last one */
    int64_t steps; /* how many it has reported, and the seconds they took */
    double busy;
    int64_t steps_before; /* as they were when the window began */
    double busy_before;
} ds_seen;

struct ds_hub {
    ds_hub_config config;
    int listener, events, port;
    int reserve;           /* a descriptor for when there are no others */
    struct ds_link *links; /* connections, a list */
    ds_seen *ranks;
    double opened, served;
    double heard; /* when any rank last said anything */
    enum ds_trouble trouble;
    double since;
    int culprit, code;
    int stopping; /* the signal that all ranks were told */
    int ended_by; /* the signal by which they ended */
    int answers;  /* ranks that have yet to say where they are; 0: nobody asked */
    double asked;
    double moved; /* when bytes last moved in a collective, or one began or ended */
    int64_t last_bytes, last_calls;
    double warned_wait; /* the wait that was last warned about, seconds; 0: none */
    double window;      /* when the stragglers' window began */
};

/* Whether a rank has reported lately. */
int ds_hub_hears(const ds_hub *h, int rank, double now);

/* How long a rank may say nothing, seconds. */
double ds_hub_patience(const ds_hub *h);

/* What to do about those from whom nothing comes. */
void ds_hub_judge(ds_hub *h, double now);
void ds_hub_report(ds_hub *h, double now); /* says where all ranks are */
void ds_hub_trouble_with(ds_hub *h, enum ds_trouble trouble, int rank, int code, double now);
void ds_hub_say(ds_hub *h, int rank, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
