/* watch.h - from another host: whether the launcher is still there. */
#ifndef DS_WATCH_H
#define DS_WATCH_H

#define DS_WATCH_ADDRESSES 16 /* that are tried at once, at most */

/* Returns when this host's part of a job is over: `pipe` was closed (as the job's daemon here has
 * ended), or the launcher has ended, or is cut off from this host. Nothing is read from the pipe.
 * hub: where the launcher's hub is, "PORT,ADDRESS,…", numeric, or "PORT" where the pipe alone tells;
 * folder: the job's, which the hub knows it by (ds_hub_config.folder). */
void ds_watch(int pipe, const char *hub, const char *folder);

#endif
