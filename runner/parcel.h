/* parcel.h - what --push copies to hosts: folders that go there whole, named after their contents. */
#ifndef DS_PARCEL_H
#define DS_PARCEL_H

#include "runner/tree.h"

#define DS_PARCEL_MOST ((int64_t)1 << 30) /* bytes */

typedef struct ds_parcel {
    ds_tree tree;
    char hash[DS_TREE_HASH]; /* its name; "": there is no such parcel */
    char stage[64];          /* a temporary folder of links to what is in it, or "" */
} ds_parcel;

/* A set of words. */
typedef struct ds_words {
    char **word;
    int count;
} ds_words;

int ds_words_add(ds_words *set, const char *word, size_t bytes);
int ds_words_has(const ds_words *set, const char *word);
void ds_words_free(ds_words *set);

/* All of these: *out is to be freed with ds_parcel_free(), also after an error. */

/* The program `file` as "dsrun", what it loads beside itself, and its library as "lua", "models". */
int ds_parcel_program(ds_parcel *out, const char *file);

/* All of the script's folder. DS_EINVAL: that is more than DS_PARCEL_MOST, or the home folder. */
int ds_parcel_script(ds_parcel *out, const char *script);

/* Of the shared libraries that `file` is linked with, those that are missing somewhere, and what they
 * want themselves of what is not `present` there. DS_ENOENT: one is missing here, too. */
int ds_parcel_libraries(ds_parcel *out, const char *file, const ds_words *missing,
                        const ds_words *present);

void ds_parcel_free(ds_parcel *p);

#endif
