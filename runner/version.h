/* version.h - which dsrun this is. */
#ifndef DS_VERSION_H
#define DS_VERSION_H

extern const char ds_version[]; /* "0.1.0" */
extern const char ds_commit[];  /* as git describes it, or "unknown" */
extern const char ds_compiler[];

#endif
