/* machine.h - facts of this machine (more of them in ds.h). */
#ifndef DS_MACHINE_H
#define DS_MACHINE_H

/* 1: an interface has that address. family: AF_INET or AF_INET6; address: in_addr or in6_addr. */
int ds_machine_has(int family, const void *address);

#endif
